"""What every contender gets and is compared with: the cell, parameters, inputs and cotangents, the float64 answers.

The answers are those of rnncore's own scan, which its tests hold to an independent NumPy reference.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from benchmarks.workloads import Workload


class OwnLSTM(rnncore.PointwiseCell):
    """`rnncore.LSTM` as a user would write it: what a cell that rnncore does not know costs beside the built-in one."""

    gates = ("i", "f", "g", "o")
    Carry = rnncore.LSTMCarry

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        i, f, o = (jax.nn.sigmoid(a + b) for a, b in ((z.i, r.i), (z.f, r.f), (z.o, r.o)))
        g = jnp.tanh(z.g + r.g)
        c = f * carry.c + i * g
        return carry._replace(c=c, h=o * jnp.tanh(c)), self.Gates(i, f, g, o)


class _Given:
    """Of a cell over x W in place of x: what is left of the projection is the bias, and there is no input kernel."""

    def project(self, params: Any, xs: Any) -> Any:
        return xs + params.bias.reshape(-1)

    def init(self, key: Any, input_size: int, dtype: Any = jnp.float32) -> Any:
        return super().init(key, input_size, dtype)._replace(input_kernel=None)  # type: ignore[misc]


CELLS: dict[str, type] = {"lstm": rnncore.LSTM, "gru": rnncore.GRU, "elman": rnncore.Elman, "own lstm": OwnLSTM}
GIVEN: dict[str, type] = {
    name: dataclasses.dataclass(frozen=True)(type(f"Given{kind.__name__}", (_Given, kind), {}))
    for name, kind in CELLS.items()
}  # fmt: skip


def make_cell(workload: Workload, input_product: bool = True, own: bool = False) -> rnncore.PointwiseCell:
    """The cell of a workload, over x or over x W; a user's own one in place of the built-in."""
    kind = (CELLS if input_product else GIVEN)[f"own {workload.cell}" if own else workload.cell]
    kernel = rnncore.Heads(workload.heads) if workload.heads > 1 else rnncore.Dense()
    made: rnncore.PointwiseCell = kind(workload.hidden, recurrence=kernel)
    return made


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


def wide(tree: Any) -> Any:
    """NumPy float64 of all arrays."""
    return jax.tree.map(lambda a: np.asarray(a).astype(np.float64), tree)


def reference(workload: Workload, problem: Problem, input_product: bool) -> dict[str, Any]:
    """{"forward": outputs, "gradient": (gradients of the parameters, gradient of the inputs)} in float64."""
    cell = make_cell(workload, input_product)

    @jax.jit
    def answers(params: Any, xs: Any, cotangent: Any) -> Any:
        ys, pull = jax.vjp(lambda *a: rnncore.unroll(cell, *a, backend="scan")[1], params, xs)
        return {"forward": ys, "gradient": pull(cotangent)}

    with jax.enable_x64(True):
        return wide(answers(*wide(problem)))
