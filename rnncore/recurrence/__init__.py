"""The run of a cell over time: what is asked for, the step, its derivatives, and the scan."""
