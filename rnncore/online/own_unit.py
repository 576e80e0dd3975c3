"""Rules that follow each parameter within its own unit: SnAp-1, e-prop and RFLO.

  P_t = gain_t P_{t-1} + d s_t / d params,   P (F, parameters of unit i, unit i)

A step costs what F F H (G (D + S) + ...) multiplications cost, as much as the products of the step itself.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp

from rnncore._types import Array
from rnncore.cells.base import CellParams
from rnncore.cells.blocks import own_gain
from rnncore.cells.diagonals import Diagonals
from rnncore.cells.elman import Elman
from rnncore.cells.leaky import Leaky
from rnncore.online.local import from_pieces, local_step, piece_shapes
from rnncore.online.rule import Memory, Rule, over_batch


@dataclasses.dataclass(frozen=True)
class OwnUnit(Rule):
    """What these rules share."""

    @abc.abstractmethod
    def _gain(self, params: CellParams, parts: Diagonals) -> Any:
        """The part of d s_t / d s_{t-1} that the rule keeps: gain.a.b (*batch, H) for fields a, b of the carry."""

    def _start(self, params: CellParams, carry: Any) -> Any:
        batch, hidden = carry.h.shape[:-1], carry.h.shape[-1]
        shapes = piece_shapes(self.cell, params)
        return type(carry)(*(tuple(jnp.zeros((*batch, *s, hidden), c.dtype) for s in shapes) for c in carry))

    def _advance(self, params: CellParams, carry: Any, influence: Any, x: Array, key: Any) -> tuple[Any, Any]:
        local = local_step(self.cell, params, carry, x)
        gain = self._gain(params, local.diagonals)

        def one(field: int, n: int) -> Array:
            values, coefficients = local.pieces[n]
            new = values[..., None, :] * coefficients[field][..., None, :, :]
            for a, before in zip(gain[field], influence, strict=True):
                new = new + a[..., None, None, :] * before[n]
            return new

        pieces = range(len(local.pieces))
        return local.carry, type(carry)(*(tuple(one(f, n) for n in pieces) for f in range(len(carry))))

    def _gradient(self, params: CellParams, memory: Memory, cotangent: Any) -> CellParams:
        def one(*by_field: Array) -> Any:
            return sum(over_batch(d[..., None, None, :] * p, 3) for d, p in zip(cotangent, by_field, strict=True))

        pieces = tuple(one(*by_field) for by_field in zip(*memory.influence, strict=True))
        return from_pieces(self.cell, params, pieces)


@dataclasses.dataclass(frozen=True)
class SnAp1(OwnUnit):
    """Sparse one-step approximation: what a parameter does to its own unit, through that unit's own recurrence.

    P_t = (diag J_t) P_{t-1} + d s_t / d params,   J_t = d s_t / d s_{t-1}

    Exact over a `Diagonal` kernel.

    Args:
      cell: a `PointwiseCell` over Dense(), Heads(N) or Diagonal().

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import online
      >>> cell = rnncore.GRU(4)
      >>> rule, params = online.SnAp1(cell), cell.init(jax.random.key(0), 3)
      >>> memory = rule.init(params, cell.initial_carry((2,)))
      >>> memory, y = rule.step(params, memory, jnp.ones((2, 3)))
      >>> rule.gradient(params, memory, jnp.ones_like(y)).recurrent_kernel.shape
      (4, 3, 4)

    Source: Menick et al. (2020), arXiv:2006.07232.
    """

    def _gain(self, params: CellParams, parts: Diagonals) -> Any:
        return own_gain(self.cell, params, parts)


@dataclasses.dataclass(frozen=True)
class EProp(OwnUnit):
    """e-prop: what a parameter does to its own unit, the outputs of all units held fixed.

    P_t = (d s_t / d s_{t-1} at constant r_t) P_{t-1} + d s_t / d params

    Args:
      cell: a `PointwiseCell` over Dense(), Heads(N) or Diagonal().

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import online
      >>> cell = rnncore.LSTM(4)
      >>> rule, params = online.EProp(cell), cell.init(jax.random.key(0), 3)
      >>> memory, y = rule.step(params, rule.init(params, cell.initial_carry()), jnp.ones(3))
      >>> rule.gradient(params, memory, jnp.ones_like(y)).bias.shape
      (4, 4)

    Source: Bellec et al. (2020), doi:10.1038/s41467-020-17236-y, its rule for the LSTM; the learning signal is the
    caller's d L_t / d y_t, see `online.feedback` for the random one.
    """

    def _gain(self, params: CellParams, parts: Diagonals) -> Any:
        return parts.state


@dataclasses.dataclass(frozen=True)
class RFLO(EProp):
    """Random feedback local online learning of a leaky network.

    P_t = (1 - alpha) P_{t-1} + alpha phi'(a_t) [x_t, h_{t-1}, 1],   dL_t / dh_t = B (d L_t / d output)

    The eligibility is that of e-prop; the random feedback B belongs to the readout, `online.feedback`.

    Args:
      cell: `Leaky`, or `Elman`, which is one with alpha = 1; the rule is defined for no other.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import online
      >>> cell = rnncore.Leaky(4, dt=1.0, tau=10.0)
      >>> rule, params = online.RFLO(cell), cell.init(jax.random.key(0), 3)
      >>> memory, y = rule.step(params, rule.init(params, cell.initial_carry()), jnp.ones(3))
      >>> rule.gradient(params, memory, jnp.ones_like(y)).bias.shape
      (1, 4)

    Source: Murray (2019), doi:10.7554/eLife.43299.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.cell) not in (Leaky, Elman) or getattr(self.cell, "residual", False):
            raise NotImplementedError(
                f"`RFLO(cell={type(self.cell).__name__})`: the rule is defined for Leaky and Elman, whose state decays "
                "at a fixed rate; use EProp, which is the same rule for gated cells."
            )
