"""Search of a folder of images by a text, an image, or both."""
