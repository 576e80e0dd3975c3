"""The commands of `python -m rnncore`: doctor, explain, bench."""
