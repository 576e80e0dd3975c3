"""sLSTM: long short-term memory with exponential gates, a normaliser and a stabiliser."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import exportable
from rnncore.cells.base import PointwiseCell, not_in_carry


@exportable
class SLSTMCarry(NamedTuple):
    """Carry of an sLSTM: cell state c, normaliser n, stabiliser m, output h, all (..., H); or one value for each."""

    c: Any
    n: Any
    m: Any
    h: Any

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(not_in_carry(self, name))


@dataclasses.dataclass(frozen=True)
class SLSTM(PointwiseCell):
    """sLSTM: an LSTM whose input gate is exponential and whose cell state is divided by the sum of its gates.

    a_g = W_g x_t + U_g h_{t-1} + b_g   for g = i, f, z, o
    m_t = max(a_i, log sigmoid(a_f) + m_{t-1})
    i_t = exp(a_i - m_t),   f_t = exp(log sigmoid(a_f) + m_{t-1} - m_t)
    c_t = f_t c_{t-1} + i_t tanh(a_z),   n_t = f_t n_{t-1} + i_t
    h_t = sigmoid(a_o) c_t / n_t

    m only keeps the exponentials from overflowing: h does not depend on it.  Where n_{t-1} is 0, as in the initial
    carry, nothing has been stored, and the step begins anew with m_t = a_i and f_t = 1.

    Args:
      hidden_size: H.
      recurrence, kernel_init, recurrent_init, bias_init: as in `PointwiseCell`; the paper has `Heads(4)`.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> cell = rnncore.SLSTM(8, recurrence=rnncore.Heads(2))
      >>> carry, ys = rnncore.unroll(cell, cell.init(jax.random.key(0), 3), 50 * jnp.ones((2, 5, 3)))
      >>> ys.shape, bool(jnp.isfinite(ys).all()), carry._fields
      ((2, 5, 8), True, ('c', 'n', 'm', 'h'))

    Source: Beck et al. (2024), arXiv:2405.04517.  As the cell of the xlstm package, with the state in the order
    (c, n, m, h) and not (h, c, n, m), and with n = 0 looked for unit by unit and not in the whole batch.  The package
    starts U at 0 and b_f spread from 5 to -7; here they start as those of other cells.  PyTorch and Flax have no sLSTM.
    """

    Carry: ClassVar[Any] = SLSTMCarry

    gates = ("i", "f", "z", "o")

    def pointwise(self, p: Any, z: Any, r: Any, carry: SLSTMCarry) -> tuple[SLSTMCarry, Any]:
        del p
        a = self.Gates(*(zg + rg for zg, rg in zip(z, r, strict=True)))
        old = jax.nn.log_sigmoid(a.f) + carry.m
        first = carry.n == 0
        m = jnp.where(first, a.i, jnp.maximum(a.i, old))
        i = jnp.exp(a.i - m)
        f = jnp.exp(jnp.where(first, 0.0, old - m))
        candidate, o = jnp.tanh(a.z), jax.nn.sigmoid(a.o)
        c, n = f * carry.c + i * candidate, f * carry.n + i
        return SLSTMCarry(c, n, m, o * c / n), self.Gates(i, f, candidate, o)
