"""Loops generated from a cell's pointwise update, one package for each kind of machine, and calls of cuDNN."""
