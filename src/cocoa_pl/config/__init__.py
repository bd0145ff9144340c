"""YAML and command lines: from Hydra to plain objects, with one sentence for each mistake."""
