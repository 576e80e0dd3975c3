"""Long short-term memory."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Activation, exportable
from rnncore.cells.base import PointwiseCell, not_in_carry


@exportable
class LSTMCarry(NamedTuple):
    """Carry of an LSTM: cell state c and output h, both (..., H), in Flax's order; or one value for each."""

    c: Any
    h: Any

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(not_in_carry(self, name))


@dataclasses.dataclass(frozen=True)
class LSTM(PointwiseCell):
    """Long short-term memory, optionally with peepholes and a coupled input-forget gate.

    i_t = sigmoid(W_i x_t + U_i h_{t-1} + b_i [+ p_i c_{t-1}])     (coupled: i_t = 1 - f_t)
    f_t = sigmoid(W_f x_t + U_f h_{t-1} + b_f [+ p_f c_{t-1}])
    g_t = tanh(W_g x_t + U_g h_{t-1} + b_g)
    c_t = f_t c_{t-1} + i_t g_t
    o_t = sigmoid(W_o x_t + U_o h_{t-1} + b_o [+ p_o c_t])
    h_t = o_t tanh(c_t)

    Args:
      hidden_size: H.
      forget_bias: added to b_f once, at initialisation.
      peepholes: the gates in brackets see the cell state through per-unit weights, 0 at init.
      coupled: three gates f, g, o, with i_t = 1 - f_t.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      recurrence, kernel_init, recurrent_init, bias_init: as in `PointwiseCell`.

    Example:
      >>> import jax, rnncore
      >>> params = rnncore.LSTM(4, forget_bias=1.0).init(jax.random.key(0), 3)
      >>> params.bias[1].tolist()
      [1.0, 1.0, 1.0, 1.0]

    Source: Hochreiter and Schmidhuber (1997); Gers, Schmidhuber and Cummins (2000) for the forget
    gate; Gers and Schmidhuber (2000) for peepholes; Greff et al. (2017), arXiv:1503.04069, for the
    coupled gate.  Flax: forget_bias 0, carry (c, h).  torch.nn.LSTM: two biases that add up, and
    the state in the order (h, c).
    """

    forget_bias: float = dataclasses.field(default=0.0, kw_only=True)
    peepholes: bool = dataclasses.field(default=False, kw_only=True)
    coupled: bool = dataclasses.field(default=False, kw_only=True)
    gate_fn: Activation = dataclasses.field(default=jax.nn.sigmoid, kw_only=True)
    activation_fn: Activation = dataclasses.field(default=jnp.tanh, kw_only=True)

    Carry: ClassVar[Any] = LSTMCarry
    forgets = "f"

    @property
    def gates(self) -> tuple[str, ...]:
        return ("f", "g", "o") if self.coupled else ("i", "f", "g", "o")

    @property
    def units(self) -> tuple[str, ...]:
        if not self.peepholes:
            return ()
        return ("f", "o") if self.coupled else ("i", "f", "o")

    def pointwise(self, p: Any, z: Any, r: Any, carry: LSTMCarry) -> tuple[LSTMCarry, Any]:
        a = self.Gates(*(zg + rg for zg, rg in zip(z, r, strict=True)))
        f = self.gate_fn(a.f + p.f * carry.c if self.peepholes else a.f)
        g = self.activation_fn(a.g)
        if self.coupled:
            i = 1 - f
        else:
            i = self.gate_fn(a.i + p.i * carry.c if self.peepholes else a.i)
        c = f * carry.c + i * g
        o = self.gate_fn(a.o + p.o * c if self.peepholes else a.o)
        gates = self.Gates(f, g, o) if self.coupled else self.Gates(i, f, g, o)
        return LSTMCarry(c, o * self.activation_fn(c)), gates
