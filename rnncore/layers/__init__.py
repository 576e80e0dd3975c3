"""Layers and directions of a cell, and conversion of the weights of other libraries."""
