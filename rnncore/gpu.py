"""Options of XLA for time loops on a GPU."""

from __future__ import annotations

import jax

from rnncore import _compat

# What every JAX from 0.10 to 0.12 puts into CUDA graphs by default.
DEFAULT = ("CONDITIONAL", "CUBLAS", "CUBLASLT", "CUDNN", "CUSTOM_CALL", "DYNAMIC_SLICE_FUSION", "FUSION")


def loop_as_graph_options(platform: str | None = None) -> dict[str, str | int]:
    """Options for `jax.jit` under which XLA may put a whole time loop into one CUDA graph.

    By default XLA launches the two to five kernels of every step from the host, and short steps are bound by these
    launches.  As a graph the loop is one launch, and its condition is evaluated on the device.
    This holds for loops all of whose operations can be captured in a graph, on NVIDIA GPUs with CUDA and driver 12.3 or
    newer.  While a profiler runs, XLA does not use graphs.  A graph takes time to create, at the first call and again
    whenever buffers have moved since the last one.  The gain has not been measured yet: measure your program with
    and without.

    This adds loops and small graphs to what this jaxlib and XLA_FLAGS put into graphs by default.  An option given
    to jit holds for the outermost jit only: give it to the jit of the whole step.

    Args:
      platform: "gpu" or another one; that which JAX runs on by default.

    Returns:
      `compiler_options`; none where the platform is not "gpu", so that the same code runs everywhere.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import gpu
      >>> cell = rnncore.GRU(4)
      >>> params = cell.init(jax.random.key(0), 3)
      >>> step = jax.jit(lambda xs: rnncore.unroll(cell, params, xs), compiler_options=gpu.loop_as_graph_options())
      >>> step(jnp.ones((2, 5, 3)))[1].shape
      (2, 5, 4)
      >>> gpu.loop_as_graph_options("cpu")
      {}

    Source: XLA's `xla_gpu_enable_command_buffer` and `xla_gpu_graph_min_graph_size`.
    """
    if (jax.default_backend() if platform is None else platform) != "gpu":
        return {}
    commands = {*(_compat.command_buffer_commands() or DEFAULT), "WHILE"}
    return {"xla_gpu_enable_command_buffer": ",".join(sorted(commands)), "xla_gpu_graph_min_graph_size": 1}
