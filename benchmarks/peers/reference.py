"""Right answers in float64, by rnncore's own scan, which its tests hold to an independent NumPy reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from benchmarks.peers.own_cell import OwnLSTM
from benchmarks.peers.problem import Problem, make_cell
from benchmarks.workloads import Workload


class _Given:
    """Of a cell whose inputs are x W already: what is left of the projection is the bias."""

    def project(self, params: Any, xs: Any) -> Any:
        return xs + params.bias.reshape(-1)

    def init(self, key: Any, input_size: int, dtype: Any = jnp.float32) -> Any:
        return super().init(key, input_size, dtype)._replace(input_kernel=None)  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class GivenLSTM(_Given, rnncore.LSTM):
    """LSTM over given products."""


@dataclasses.dataclass(frozen=True)
class GivenGRU(_Given, rnncore.GRU):
    """GRU over given products."""


@dataclasses.dataclass(frozen=True)
class GivenOwnLSTM(_Given, OwnLSTM):
    """A user's LSTM over given products."""


GIVEN: dict[type, type] = {rnncore.LSTM: GivenLSTM, rnncore.GRU: GivenGRU, OwnLSTM: GivenOwnLSTM}


def with_given_products(cell: rnncore.Cell) -> rnncore.Cell:
    """The same cell over x W in place of x; its parameters have no input kernel."""
    return GIVEN[type(cell)](**{f.name: getattr(cell, f.name) for f in dataclasses.fields(cell)})


def wide(tree: Any) -> Any:
    """NumPy float64 of all arrays."""
    return jax.tree.map(lambda a: np.asarray(a).astype(np.float64), tree)


def reference(workload: Workload, problem: Problem, input_product: bool) -> dict[str, Any]:
    """{"forward": outputs, "gradient": (gradients of the parameters, gradient of the inputs)} in float64."""
    cell: rnncore.Cell = make_cell(workload)
    cell = cell if input_product else with_given_products(cell)

    @jax.jit
    def answers(params: Any, xs: Any, cotangent: Any) -> Any:
        ys, pull = jax.vjp(lambda *a: rnncore.unroll(cell, *a, backend="scan")[1], params, xs)
        return {"forward": ys, "gradient": pull(cotangent)}

    with jax.enable_x64(True):
        return wide(answers(*wide(problem)))
