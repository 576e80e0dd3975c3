"""The gradient of the parameters of every gate as a sum over steps, compared with `jax.grad`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array, PyTree
from rnncore.analysis.gradients._backward import Loss
from rnncore.analysis.gradients.over_time import gradients_over_time
from rnncore.cells.base import Cell, PointwiseCell
from rnncore.cells.recurrent_kernels import Dense
from rnncore.sequence.call import unroll


class GateTable(NamedTuple):
    """The result of `gate_table`; `print` shows it as a table.

    Fields:
      sums: the sum over steps, an array by parameter and gate, such as sums["W"]["f"].
      grads: the same from `jax.grad`.
    """

    sums: dict[str, dict[str, Array]]
    grads: dict[str, dict[str, Array]]

    def difference(self, parameter: str, gate: str) -> float:
        """The largest difference of an entry, relative to the largest entry of `jax.grad`."""
        one, other = np.asarray(self.sums[parameter][gate]), np.asarray(self.grads[parameter][gate])
        return float(np.abs(one - other).max() / (np.abs(other).max() or 1.0))

    def __str__(self) -> str:
        lines = ["gate  parameter  norm of the sum over steps  norm by jax.grad  relative difference"]
        for gate in next(iter(self.sums.values())):
            for name in self.sums:
                one, other = (float(np.linalg.norm(np.ravel(a[name][gate]))) for a in self)
                lines.append(f"{gate:<4}  dL/d{name}_{gate:<3}  {one:26.6g}  {other:16.6g}  "
                             f"{self.difference(name, gate):19.1e}")  # fmt: skip
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


def gate_table(
    loss: Loss, cell: PointwiseCell, params: PyTree, xs: Array, initial_carry: Any = None, **options: Any
) -> GateTable:
    """The gradients of the weights and the bias of every gate as sums over steps, and from `jax.grad`.

    dL/dW_g = sum_t delta_gt x_t^T,   dL/dU_g = sum_t delta_gt h_{t-1}^T,   dL/db_g = sum_t delta_gt
    delta_gt = dL/da_gt, the gradient at the pre-activation of gate g, `gradients_over_time(...).gates`

    For U_n of a GRU r_t delta_nt takes the place of delta_nt.  The sums are formed from the gradients at the gates,
    not by differentiating the run again, so the last column of the table verifies these closed forms.

    Args:
      loss, cell, params, xs, initial_carry, options: as in `gradients_over_time`; the recurrent kernel `Dense`.

    Returns:
      `GateTable`: W (H, D), U (H, H), b (H,) for each gate.

    Raises:
      ValueError: as `gradients_over_time`.
      NotImplementedError: the cell is not a `PointwiseCell`, or its kernel is not dense.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> params, xs = cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3))
      >>> table = analysis.gate_table(lambda carry, outputs: jnp.sum(carry.h ** 2), cell, params, xs)
      >>> list(table.sums["U"]), table.difference("U", "f") < 1e-5
      (['i', 'f', 'g', 'o'], True)
    """
    if isinstance(cell, Cell) and not (isinstance(cell, PointwiseCell) and isinstance(cell.recurrence, Dense)):
        raise NotImplementedError(
            f"`gate_table({type(cell).__name__})`: expected a PointwiseCell with a dense recurrent kernel, whose gates "
            "have matrices of their own; `gradients_over_time(...).parameters` takes any cell."
        )
    found = gradients_over_time(loss, cell, params, xs, initial_carry, **options)
    done = found._pass
    lead = tuple(range(done.xs.ndim - 1))

    def outer(deltas: Any, inputs: Array) -> dict[str, Array]:
        return {name: jnp.tensordot(d, inputs, (lead, lead), precision="highest") for name, d in deltas.items()}

    inward, across = found.gates._asdict(), found.recurrent._asdict()
    sums = {"W": outer(inward, done.xs), "U": outer(across, done.before.h)}
    whole = jax.grad(lambda params: loss(*unroll(cell, params, xs, initial_carry=initial_carry, **options)))(params)
    grads = {
        "W": dict(zip(cell.gates, jnp.transpose(whole.input_kernel, (1, 2, 0)), strict=True)),
        "U": dict(zip(cell.gates, cell.recurrence.gate_matrices(whole.recurrent_kernel), strict=True)),
    }
    if params.bias is not None:
        sums["b"] = {name: jnp.sum(d, lead) for name, d in inward.items()}
        grads["b"] = dict(zip(cell.gates, whole.bias, strict=True))
    return GateTable(sums, grads)
