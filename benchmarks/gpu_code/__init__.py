"""What NVIDIA's compiler makes of Mosaic's kernels, on a machine without a GPU; see `__main__.py`."""
