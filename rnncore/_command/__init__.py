"""What `python -m rnncore` does: doctor, explain, bench."""
