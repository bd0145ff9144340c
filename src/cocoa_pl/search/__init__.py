"""A folder of images in, those that are nearest to a text or an image out."""
