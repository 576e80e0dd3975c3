"""The run of a cell over time: its description, the step, its derivatives, and the scan."""
