"""Gradients of a loss at every step, and what to do about them."""
