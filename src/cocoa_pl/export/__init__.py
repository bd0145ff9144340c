"""Folders of a trained model for other tools, with proof that they give its vectors."""
