"""What the project claims about speed, measured side by side with its peers: see `__main__.py`."""
