"""Jacobians of single steps, and products of many."""
