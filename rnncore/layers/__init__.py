"""Layers and directions of a cell, and the weights of other libraries."""
