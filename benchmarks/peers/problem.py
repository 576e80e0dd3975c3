"""The numbers that every contender gets: parameters, inputs and cotangents of a case."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import rnncore
from benchmarks.workloads import Workload


class Problem(NamedTuple):
    """NumPy arrays in the dtype of the case.

    Fields:
      params: `CellParams`; `input_kernel` is None where x W is given.
      xs: inputs (B, T, D); or x W without bias (B, T, G*H), gates one after the other.
      cotangent: of the outputs, (B, T, H).
    """

    params: Any
    xs: Any
    cotangent: Any


def make_cell(workload: Workload) -> rnncore.PointwiseCell:
    """rnncore's cell, in whose layout parameters and gradients are compared."""
    made: Any = {"lstm": rnncore.LSTM, "gru": rnncore.GRU, "elman": rnncore.Elman}[workload.cell]
    return made(workload.hidden, recurrence=rnncore.Heads(workload.heads) if workload.heads > 1 else rnncore.Dense())


def make_problem(workload: Workload, dtype: str, input_product: bool) -> Problem:
    """Drawn with a fixed seed and rounded to the dtype, so that the float64 reference sees the same values."""
    draw, kind = np.random.default_rng(0), jnp.dtype(dtype)
    batch, steps, features, hidden = workload.shape
    gates = workload.gates
    shape = make_cell(workload).recurrence.shape(gates, hidden)
    kernel = draw.standard_normal((features, gates, hidden), np.float32) / np.float32(features**0.5)
    recurrent = draw.standard_normal(shape, np.float32) / np.float32((hidden // workload.heads) ** 0.5)
    bias, second = (draw.integers(-64, 65, (n, hidden)).astype(np.float32) / 128 for n in (gates, 1))
    xs = draw.standard_normal((batch, steps, features), np.float32).astype(kind)
    cotangent = draw.standard_normal((batch, steps, hidden), np.float32).astype(kind)
    wide: tuple[Any, ...] = (kernel, recurrent, bias, second if workload.cell == "gru" else None)
    params = rnncore.CellParams._make((*(None if a is None else a.astype(kind) for a in wide), ()))
    if not input_product:
        given: Any = params.input_kernel
        product = xs.astype(np.float32) @ given.reshape(features, -1).astype(np.float32)
        xs, params = product.astype(kind), params._replace(input_kernel=None)  # type: ignore[arg-type]
    return Problem(params, xs, cotangent)
