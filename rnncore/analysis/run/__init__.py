"""The run that is analysed: every state and gate of a cell."""
