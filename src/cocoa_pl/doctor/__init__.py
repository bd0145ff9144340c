"""Training data in, everything that is wrong with them out: what `cocoa doctor` runs."""
