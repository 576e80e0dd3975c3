"""The numbers that every contender gets: parameters, inputs and cotangents of a case."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from benchmarks.workloads import Workload


class Problem(NamedTuple):
    """NumPy arrays in the dtype of the case.

    Fields:
      params: `CellParams` of every layer; their `input_kernel` is None where x W is given.
      xs: inputs (B, T, D); or x W without bias (B, T, G*H), gates one after the other.
      cotangent: (B, T, H), of the outputs; it is also the target of a training step.
    """

    params: tuple[Any, ...]
    xs: Any
    cotangent: Any


def recurrence(workload: Workload) -> rnncore.Recurrence:
    """The structure of the recurrent kernel."""
    if workload.recurrence == "heads":
        return rnncore.Heads(workload.heads)
    return rnncore.Diagonal() if workload.recurrence == "diagonal" else rnncore.Dense()


def make_cell(workload: Workload) -> rnncore.PointwiseCell:
    """rnncore's cell, in whose arrangement parameters and gradients are kept."""
    kinds = {"lstm": rnncore.LSTM, "gru": rnncore.GRU, "elman": rnncore.Elman}
    return kinds[workload.cell](workload.hidden, recurrence=recurrence(workload))


def make_problem(workload: Workload, dtype: str, input_product: bool) -> Problem:
    """Drawn with a fixed seed and rounded to the dtype, so that the float64 reference sees the same values."""
    draw = np.random.default_rng(0)
    layers = [_draw_layer(draw, workload, layer) for layer in range(workload.layers)]
    batch, steps, features, hidden = workload.shape
    xs = draw.standard_normal((batch, steps, features), np.float32)
    cotangent = draw.standard_normal((batch, steps, hidden), np.float32)
    rounded = [jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), p) for p in layers]
    xs, cotangent = (a.astype(jnp.dtype(dtype)) for a in (xs, cotangent))
    if not input_product:
        kernel = rounded[0].input_kernel
        product = xs.astype(np.float32) @ kernel.reshape(features, -1).astype(np.float32)
        xs = product.astype(jnp.dtype(dtype))
        rounded[0] = rounded[0]._replace(input_kernel=None)
    return Problem(tuple(rounded), xs, cotangent)


def _draw_layer(draw: np.random.Generator, workload: Workload, layer: int) -> rnncore.CellParams:
    hidden, gates = workload.hidden, workload.gates
    features = hidden if layer else workload.features
    fan_in = {"dense": hidden, "heads": hidden // workload.heads, "diagonal": 4}[workload.recurrence]
    shape = recurrence(workload).shape(gates, hidden)

    def bias(*size: int) -> np.ndarray:
        # Multiples of 1/128 up to 1/2: in every dtype adding or taking away 1 is exact, as Haiku's offset needs.
        return draw.integers(-64, 65, size).astype(np.float32) / 128

    arrays: tuple[Any, ...] = (
        draw.standard_normal((features, gates, hidden), np.float32) / np.float32(features**0.5),
        draw.standard_normal(shape, np.float32) / np.float32(fan_in**0.5),
        bias(gates, hidden),
        bias(1, hidden) if workload.cell == "gru" else None,
    )
    return rnncore.CellParams._make((*arrays, ()))
