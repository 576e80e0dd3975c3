"""Which of cuDNN's algorithms runs, and in which arithmetic: PyTorch's rules, so that both call it alike."""

from __future__ import annotations

from typing import NamedTuple

import jax

STANDARD, PERSIST_STATIC, PERSIST_STATIC_SMALL_H = 0, 1, 3
RELU, TANH, LSTM, GRU = range(4)
DEFAULT_MATH, TENSOR_OP_MATH, FMA_MATH = 0, 1, 3
DATA = {"float32": 0, "float16": 2, "bfloat16": 9}
"""Name of a dtype to cuDNN's number for it."""

# As XLA takes these words for float32 products on a GPU: all that is below "highest" may be TF32.
TF32_ALLOWED: dict[str | None, bool] = {
    **dict.fromkeys(("highest", "float32", "F32_F32_F32"), False),
    **dict.fromkeys((None, "default", "fastest", "bfloat16", "high", "tensorfloat32", "bfloat16_3x"), True),
    **dict.fromkeys(("DEFAULT", "TF32_TF32_F32"), True),
}
"""Value of `jax.default_matmul_precision` to whether cuDNN may round the factors of a product to TF32."""


class Device(NamedTuple):
    """Compute capability and multiprocessors of a GPU."""

    major: int
    minor: int
    multiprocessors: int


def device() -> Device:
    """The GPU that JAX runs on."""
    first = jax.local_devices()[0]
    major, minor = map(int, str(first.compute_capability).split("."))
    return Device(major, minor, first.core_count)


def math(dtype: str, precision: str | None) -> int:
    """Arithmetic of the products of 16 and of 32 bits; sums are float32."""
    if dtype == "float16":
        return TENSOR_OP_MATH
    return DEFAULT_MATH if dtype == "bfloat16" or TF32_ALLOWED[precision] else FMA_MATH


def choose(
    gpu: Device, mode: int, dtype: str, shape: tuple[int, int, int, int], layers: int, directions: int, lengths: bool,
    forward: bool,
) -> int:  # fmt: skip
    """The algorithm of a run.

    Args:
      gpu: the device.
      mode: cuDNN's number of the cell.
      dtype: of all arrays.
      shape: steps, sequences, features of the inputs, units.
      layers, directions: how many.
      lengths: whether the library gets lengths.
      forward: whether it is the forward pass; the backward one may take another algorithm.

    Source: PyTorch, aten/src/ATen/native/cudnn/RNN.cpp, `get_algo` and what it calls.
    """
    _, _, features, hidden = shape
    if lengths:
        return STANDARD
    small = {True: (384, 192), False: (256, 128)}[forward][mode in (LSTM, GRU)]
    if hidden <= small and gpu.major >= 6:
        return PERSIST_STATIC_SMALL_H
    fits = layers == directions == 1 and hidden <= 1024 and hidden % 128 == 0 and features % 128 == 0
    return PERSIST_STATIC if dtype == "float16" and fits and _persists_well(gpu, mode, shape) else STANDARD


def _persists_well(gpu: Device, mode: int, shape: tuple[int, int, int, int]) -> bool:
    """Whether PyTorch found the persistent algorithm worth it for so many sequences on such a GPU."""
    steps, batch, _, hidden = shape
    if gpu.major == 7:
        multiple = batch == 8 or batch % 16 == 0 and batch not in (80, 112)
        enough = any(steps >= least and batch <= most for least, most in ((40, 128), (20, 96), (10, 32)))
        return gpu.minor != 5 and multiple and enough
    if gpu.major < 8 or gpu.multiprocessors < 98 or gpu.minor == 6 or mode == GRU:
        return False
    return batch % 8 == 0 and batch <= 128 and (mode == LSTM or batch < 96 or hidden < 896)
