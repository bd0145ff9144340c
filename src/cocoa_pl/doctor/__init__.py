"""Checks of training data before training: what `cocoa doctor` runs."""
