"""Right answers in float64, by rnncore's own scan, which its tests hold to an independent NumPy reference.

Not every library's cell is the same equation.  A contender is compared with its own equation, given
parameters that match; which one it is stands in the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from benchmarks.peers.own_cell import OwnLSTM
from benchmarks.peers.problem import Problem, make_cell, recurrence
from benchmarks.workloads import Workload
from rnncore.cells.gru_reset_before import ResetBeforeGRUParams


class Form(NamedTuple):
    """An equation.

    Fields:
      note: what it is, for records.
      cell: workload -> the rnncore cell that computes it.
      params: a layer's parameters of the problem -> those of that cell.
    """

    note: str
    cell: Callable[[Workload], rnncore.Cell]
    params: Callable[[Any], Any]


FORMS = {
    "same": Form("the cell of the workload, rnncore's scan in float64", make_cell, lambda p: p),
    "gru without b_hn": Form(
        "GRU without the bias b_hn, rnncore's scan in float64", make_cell, lambda p: p._replace(recurrent_bias=None)
    ),
    "gru reset before": Form(
        "GRU with the reset before the product (ResetBeforeGRU), rnncore in float64",
        lambda workload: rnncore.ResetBeforeGRU(workload.hidden),
        lambda p: ResetBeforeGRUParams(p.input_kernel, p.recurrent_kernel, p.bias),
    ),
    "elman relu": Form(
        "Elman network with relu, rnncore's scan in float64",
        lambda workload: rnncore.Elman(workload.hidden, activation_fn=jax.nn.relu, recurrence=recurrence(workload)),
        lambda p: p,
    ),
}


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
class GivenElman(_Given, rnncore.Elman):
    """Elman network over given products."""


@dataclasses.dataclass(frozen=True)
class GivenOwnLSTM(_Given, OwnLSTM):
    """A user's LSTM over given products."""


GIVEN: dict[type, type] = {
    rnncore.LSTM: GivenLSTM, rnncore.GRU: GivenGRU, rnncore.Elman: GivenElman, OwnLSTM: GivenOwnLSTM
}  # fmt: skip


def with_given_products(cell: rnncore.Cell) -> rnncore.Cell:
    """The same cell over x W in place of x; its parameters have no input kernel."""
    fields = {f.name: getattr(cell, f.name) for f in dataclasses.fields(cell)}
    return GIVEN[type(cell)](**fields)


def wide(tree: Any) -> Any:
    """NumPy float64 of all arrays."""
    return jax.tree.map(lambda a: np.asarray(a).astype(np.float64), tree)


def reference(workload: Workload, problem: Problem, input_product: bool, form: str) -> dict[str, Any]:
    """{measurement: outputs, or (gradients of every layer's parameters, gradient of the inputs)} in float64.

    A training step is compared by the gradients of its loss, which its first moments hold; there the
    inputs have none.
    """
    cell = FORMS[form].cell(workload)
    params = tuple(map(FORMS[form].params, problem.params))
    if not input_product:
        cell = with_given_products(cell)
    backend = "scan" if isinstance(cell, rnncore.PointwiseCell) else "autodiff"

    def outputs(params: Any, xs: Any) -> Any:
        for own in params:
            xs = rnncore.unroll(cell, own, xs, backend=backend)[1]
        return xs

    @jax.jit
    def answers(params: Any, xs: Any, cotangent: Any) -> Any:
        ys, pull = jax.vjp(outputs, params, xs)
        step = pull(2 * (ys - cotangent) / ys.size)
        return {"forward": ys, "gradient": pull(cotangent), "training_step": (step[0], None)}

    with jax.enable_x64(True):
        return wide(answers(*wide((params, problem.xs, problem.cotangent))))
