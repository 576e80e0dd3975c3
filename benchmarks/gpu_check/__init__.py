"""One command that finds out everything about rnncore on a GPU; see `command.py`."""
