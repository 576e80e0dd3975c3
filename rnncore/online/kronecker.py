"""Kronecker-factored real-time recurrent learning."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.cells.base import CellParams
from rnncore.cells.blocks import to_blocks
from rnncore.online.local import all_additive, from_pieces, local_step
from rnncore.online.rule import Memory, Rule

TINY = 1e-7


@dataclasses.dataclass(frozen=True)
class KFRTRL(Rule):
    """Kronecker-factored RTRL: an unbiased estimate, of a vector times a matrix over states and pre-activations.

    d s_t / d params ~ u_t (x) A_t,   v_t = [x_t, 1, h_{t-1}],   D_t = d s_t / d (pre-activations)
    u_t = c_1 p_1 u_{t-1} + c_2 p_2 v_t,   A_t = (c_1 / p_1) J_t A_{t-1} + (c_2 / p_2) D_t,   c_1, c_2 random signs

    p_1 and p_2 balance the norms.  One step's contribution has exactly this form, so only sums of steps are estimated,
    which lowers the variance below UORO's.  Every block of units of every sequence has its own factors and signs.

    Args:
      cell: a `PointwiseCell` over Dense(), Heads(N) or Diagonal() all of whose gates see z and r as their sum alone,
        without per-unit parameters: Elman, Leaky, LSTM without peepholes.

    Raises:
      NotImplementedError: a cell such as a GRU, whose influence is not such a product.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import online
      >>> cell = rnncore.LSTM(4)
      >>> rule, params = online.KFRTRL(cell), cell.init(jax.random.key(0), 3)
      >>> memory = rule.init(params, cell.initial_carry((2,)))
      >>> memory, y = rule.step(params, memory, jnp.ones((2, 3)), key=jax.random.key(1))
      >>> rule.gradient(params, memory, jnp.ones_like(y)).bias.shape
      (4, 4)

    Source: Mujika, Meier and Steger (2018), arXiv:1805.10842.
    """

    needs_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all_additive(self.cell) or self.cell.units:
            raise NotImplementedError(
                f"`KFRTRL(cell={type(self.cell).__name__})`: expected gates that see W x + U h + b as a sum and no "
                "per-unit parameters, as in Elman, Leaky and LSTM; in other cells a step's part is no Kronecker "
                "product. Use RTRL, SnAp1 or UORO."
            )

    def _start(self, params: CellParams, carry: Any) -> tuple[Array, Any]:
        batch, (count, size) = carry.h.shape[:-1], self._blocks
        rows = params.input_kernel.shape[0] + (params.bias is not None) + size
        matrix = (*batch, count, size, len(self.cell.gates), size)
        zeros = jax.tree.map(lambda c: jnp.zeros(matrix, c.dtype), carry)
        return jnp.zeros((*batch, count, rows), carry.h.dtype), zeros

    def _advance(self, params: CellParams, carry: Any, influence: Any, x: Array, key: Any) -> tuple[Any, Any]:
        apart, (vector, matrix) = self._blocks.apart, influence
        local = local_step(self.cell, params, carry, x)
        ((values, coefficients),) = local.pieces
        kernel = to_blocks(self.cell.recurrence, params.recurrent_kernel)
        # All units of a block read the same.
        read = jnp.swapaxes(apart(values)[..., 0], -1, -2)  # (*batch, N, R)
        own = jnp.eye(self._blocks.size, dtype=read.dtype)
        through = jnp.einsum("lgni,...nlkj->...gnikj", kernel, matrix.h)
        moved, added = [], []
        for field in range(len(carry)):
            weights = apart(jnp.stack(list(local.diagonals.recurrent[field]), -2))
            new = jnp.einsum("...gni,...gnikj->...nikj", weights, through)
            for direct, before in zip(local.diagonals.state[field], matrix, strict=True):
                new = new + apart(direct)[..., None, None] * before
            moved.append(new)
            here = jnp.moveaxis(apart(coefficients[field]), -3, -1)  # (*batch, N, S, G)
            added.append(here[..., None] * own[:, None, :])
        sign = jax.random.rademacher(key, (2, *vector.shape[:-1]), vector.dtype)
        p_1 = jnp.sqrt((norms(moved, 3) + TINY) / (norms([vector], 1) + TINY))
        p_2 = jnp.sqrt((norms(added, 3) + TINY) / (norms([read], 1) + TINY))
        vector = (sign[0] * p_1)[..., None] * vector + (sign[1] * p_2)[..., None] * read
        old, new = ((s / p)[..., None, None, None] for s, p in zip(sign, (p_1, p_2), strict=True))
        return local.carry, (vector, type(carry)(*(old * m + new * a for m, a in zip(moved, added, strict=True))))

    def _gradient(self, params: CellParams, memory: Memory, cotangent: Any) -> CellParams:
        vector, matrix = memory.influence
        rows: Any = 0
        for d, a in zip(cotangent, matrix, strict=True):
            rows = rows + jnp.einsum("...ni,...nigj->...ngj", self._blocks.apart(d), a)
        vector, rows = vector.reshape(-1, *vector.shape[-2:]), rows.reshape(-1, *rows.shape[-3:])
        piece = jnp.einsum("bnr,bngj->rgnj", vector, rows)
        return from_pieces(self.cell, params, (piece.reshape(*piece.shape[:2], -1),))


def norms(arrays: list[Array], axes: int) -> Array:
    """Euclidean norm over the last axes of all arrays together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(a), tuple(range(-axes, 0))) for a in arrays))
