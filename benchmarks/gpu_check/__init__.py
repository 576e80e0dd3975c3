"""One command that finds out everything about rnncore on a GPU; see `__main__.py`."""
