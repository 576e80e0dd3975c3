"""Loops made from a cell's pointwise update for one kind of machine, and NVIDIA's library."""
