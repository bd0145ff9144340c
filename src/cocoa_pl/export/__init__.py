"""A trained model in, folders that other tools open out, with proof that they give its vectors."""
