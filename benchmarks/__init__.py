"""Benchmarks: scripts that a person runs, never timed tests."""
