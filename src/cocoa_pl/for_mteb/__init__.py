"""mteb's tasks with models of this project; needs the extra `mteb`."""
