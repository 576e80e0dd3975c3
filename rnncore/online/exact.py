"""Real-time recurrent learning, exact.

  P_t = J_t P_{t-1} + d s_t / d params,   J_t = diag(state) + sum_g diag(recurrent_g) U_g

Over blocks of S units P has N S^2 G (D + S) numbers for a field and a sequence, and a step is a product of S x S with
it.  Over a `Diagonal` kernel it is as large as the parameters, and the rule is `SnAp1`'s.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.cells.base import CellParams
from rnncore.cells.blocks import jacobian
from rnncore.cells.structured_kernels import Sparse
from rnncore.online.local import from_pieces, local_step, piece_shapes
from rnncore.online.own_unit import SnAp1
from rnncore.online.rule import Memory, Rule, over_batch


@dataclasses.dataclass(frozen=True)
class RTRL(Rule):
    """Real-time recurrent learning: the exact gradient at every step, in memory that does not grow with time.

    P_t = J_t P_{t-1} + d s_t / d params,   d L_t / d params = (d L_t / d s_t) P_t

    With parameters held fixed the sum over all steps is the gradient of backpropagation through time.  Updated on the
    way, P_t is exact for the parameters that each step had.

    Args:
      cell: a `PointwiseCell` over Dense(), Heads(N) or Diagonal().

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import online
      >>> cell = rnncore.LSTM(4, recurrence=rnncore.Diagonal())
      >>> rule, params = online.RTRL(cell), cell.init(jax.random.key(0), 3)
      >>> xs = jax.random.normal(jax.random.key(1), (50, 3))
      >>> def step(state, x):
      ...     memory, total = state
      ...     memory, y = rule.step(params, memory, x)
      ...     return (memory, jax.tree.map(jnp.add, total, rule.gradient(params, memory, 2 * y))), None
      >>> start = rule.init(params, cell.initial_carry()), jax.tree.map(jnp.zeros_like, params)
      >>> (_, total), _ = jax.lax.scan(step, start, xs)
      >>> full = jax.grad(lambda p: jnp.sum(rnncore.unroll(cell, p, xs)[1] ** 2))(params)
      >>> bool(jnp.allclose(total.recurrent_kernel, full.recurrent_kernel, rtol=1e-4))
      True

    Source: Williams and Zipser (1989); over a diagonal kernel Mozer (1989).
    """

    def _plain(self, params: CellParams) -> tuple[Rule, CellParams]:
        rule, params = super()._plain(params)
        return (SnAp1(rule.cell) if rule._blocks.size == 1 else rule), params

    def _start(self, params: CellParams, carry: Any) -> Any:
        blocks = self._blocks
        batch = carry.h.shape[:-1]
        shapes = [(*batch, blocks.number, blocks.size, *s, blocks.size) for s in piece_shapes(self.cell, params)]
        return type(carry)(*(tuple(jnp.zeros(s, c.dtype) for s in shapes) for c in carry))

    def _advance(self, params: CellParams, carry: Any, influence: Any, x: Array, key: Any) -> tuple[Any, Any]:
        apart, local = self._blocks.apart, local_step(self.cell, params, carry, x)
        own = jnp.eye(self._blocks.size, dtype=carry.h.dtype)

        def one(field: int, n: int) -> Array:
            values, coefficients = local.pieces[n]
            values = jnp.broadcast_to(values, (*values.shape[:-1], carry.h.shape[-1]))
            added = apart(values)[..., :, None, :, :] * apart(coefficients[field])[..., None, :, :, :]
            new = jnp.moveaxis(added, -2, -4)[..., None, :, :, :] * own[:, None, None]
            moved = influence.h[n]
            flat = jacobian(self.cell, params, local.diagonals, field, "h") @ moved.reshape(*moved.shape[:-3], -1)
            new = new + flat.reshape(moved.shape)
            for name, before in zip(influence._fields, influence, strict=True):
                if name != "h":
                    direct = apart(getattr(local.diagonals.state[field], name))
                    new = new + direct[..., None, None, None] * before[n]
            return self._kept(new)

        pieces = range(len(local.pieces))
        return local.carry, type(carry)(*(tuple(one(f, n) for n in pieces) for f in range(len(carry))))

    def _gradient(self, params: CellParams, memory: Memory, cotangent: Any) -> CellParams:
        def one(*by_field: Array) -> Array:
            total: Any = 0
            for d, p in zip(cotangent, by_field, strict=True):
                pulled = self._blocks.apart(d)[..., None, :] @ p.reshape(*p.shape[:-3], -1)
                total = total + over_batch(pulled.reshape(*p.shape[:-4], *p.shape[-3:]), 4)
            rows = jnp.moveaxis(total, 0, -2)  # (R, C, N, S)
            return rows.reshape(*rows.shape[:2], -1)

        pieces = tuple(one(*by_field) for by_field in zip(*memory.influence, strict=True))
        return from_pieces(self.cell, params, pieces)

    def _kept(self, influence: Array) -> Array:
        """The part of the influence (*batch, N, S, R, C, S) that is kept: all of it."""
        return influence


@dataclasses.dataclass(frozen=True)
class SnAp(RTRL):
    """Sparse n-step approximation: what a parameter does to the units that it reaches within n steps.

    P_t = pattern * (J_t P_{t-1} + d s_t / d params)

    The pattern has the entries that n steps over the connections can make.

    Over a dense kernel or heads all units are reached in two steps, and n = 2 is `RTRL`; over `Sparse` connections it
    is less, and once n reaches the longest path between two units it is exact.

    Args:
      cell: a `PointwiseCell`, over `Sparse`, or `Dale` within it, where the pattern is to be one.
      order: n; 1 is `SnAp1`, which keeps less.
      connections: the pattern of one step; that of the cell's recurrence by default.

    Raises:
      ValueError: an order below 1.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import online
      >>> cell = rnncore.GRU(8, recurrence=rnncore.Sparse.random(8, 0.2))
      >>> rule, params = online.SnAp(cell, order=2), cell.init(jax.random.key(0), 3)
      >>> memory, y = rule.step(params, rule.init(params, cell.initial_carry()), jnp.ones(3))
      >>> rule.gradient(params, memory, jnp.ones_like(y)).recurrent_kernel.shape
      (8, 3, 8)

    Source: Menick et al. (2020), arXiv:2006.07232.  The pattern is masked here, not stored sparsely: a step costs what
    RTRL's does.
    """

    order: int = 2
    connections: Sparse | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order < 1:
            raise ValueError(f"`SnAp(cell, order={self.order})`: expected at least 1 step.")
        recurrence: Any = self.cell.recurrence
        within = getattr(recurrence, "within", recurrence)
        if isinstance(within, Sparse):
            object.__setattr__(self, "connections", within)

    def _kept(self, influence: Array) -> Array:
        blocks = self._blocks
        if self.connections is None:
            reached = np.ones((blocks.size, blocks.size), bool) if self.order > 1 else np.eye(blocks.size, dtype=bool)
        else:
            step = self.connections.mask | np.eye(blocks.size, dtype=bool)
            reached = np.linalg.matrix_power(step.astype(float), self.order - 1) > 0
        # P is by (i, ..., j) of what unit j's parameters do to unit i.
        return jnp.where(reached.T[:, None, None, :], influence, 0)
