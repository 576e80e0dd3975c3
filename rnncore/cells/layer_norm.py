"""LSTM and GRU with layer normalization inside the recurrence."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from rnncore._types import Activation, Array
from rnncore.cells.base import CellParams
from rnncore.cells.lstm import LSTMCarry
from rnncore.cells.reductions import ReducingCell


@dataclasses.dataclass(frozen=True)
class _LayerNormCell(ReducingCell):
    """What both share: gains by gate and unit, `units.input_g` and `units.recurrent_g`, and groups of gates."""

    epsilon: float = dataclasses.field(default=1e-5, kw_only=True)
    forget_bias: float = dataclasses.field(default=0.0, kw_only=True)
    gate_fn: Activation = dataclasses.field(default=jax.nn.sigmoid, kw_only=True)
    activation_fn: Activation = dataclasses.field(default=jnp.tanh, kw_only=True)

    together: ClassVar[tuple[tuple[str, ...], ...]]
    """Gates that are normalized as one vector."""
    more: ClassVar[tuple[str, ...]]
    """Per-unit parameters other than the gains."""

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(f"{part}_{g}" for part in ("input", "recurrent") for g in self.gates) + self.more

    def init(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> CellParams:
        """Draws parameters in `dtype`; gains start at 1."""
        params = super().init(key, input_size, dtype)
        gains = {n: jnp.ones_like(a) for n, a in params.units._asdict().items() if not n.endswith("shift")}  # type: ignore[attr-defined]
        return params._replace(units=params.units._replace(**gains))  # type: ignore[attr-defined]

    def receive(self, p: Any, z: Any, bias: Any) -> Any:
        """Normalized, times the gains `units.input_g`, plus the biases."""
        return super().receive(p, self._scaled("input", p, z), bias)

    def _normalized(self, *parts: Array) -> list[Array]:
        """Arrays (*batch, H) minus their mean, over their standard deviation, of the units of a head in all of them."""
        wide = [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in parts]

        def mean(of: Sequence[Array]) -> Array:
            return self.mean_over_units(functools.reduce(operator.add, of) / len(of))

        middle = mean(wide)
        centered = [a - middle for a in wide]
        scale = lax.rsqrt(mean([jnp.square(a) for a in centered]) + self.epsilon)
        return [(c * scale).astype(a.dtype) for c, a in zip(centered, parts, strict=True)]

    def _scaled(self, part: str, p: Any, values: Any) -> Any:
        """The gates' values, normalized and times their gains."""
        found: dict[str, Array] = {}
        for names in self.together:
            parts = self._normalized(*(getattr(values, n) for n in names))
            found |= {n: getattr(p, f"{part}_{n}") * a for n, a in zip(names, parts, strict=True)}
        return self.Gates(**found)


@dataclasses.dataclass(frozen=True)
class LayerNormLSTM(_LayerNormCell):
    """LSTM with layer normalization of both products and of the cell state.

    (i_t, f_t, g_t, o_t) before their functions: w norm(W x_t) + u norm(U h_{t-1}) + b
    c_t = f_t c_{t-1} + i_t g_t
    h_t = o_t tanh(v norm(c_t) + b_c)

    norm(a) = (a - mean a) / sqrt(var a + epsilon), over the units of all four gates as one vector; with `Heads` over
    those of a head.  The gains w, u, v and b_c are per-unit parameters: `units.input_i`, `units.recurrent_i` and so on,
    `units.cell` and `units.cell_shift`.

    Args:
      hidden_size: H.
      epsilon: added to the variance.
      forget_bias: added to b_f once, at initialisation.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      recurrence, kernel_init, recurrent_init, bias_init: as in `PointwiseCell`.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> cell = rnncore.LayerNormLSTM(4)
      >>> carry, ys = rnncore.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))
      >>> ys.shape
      (2, 5, 4)

    Source: Ba, Kiros and Hinton (2016), arXiv:1607.06450, equations 20 to 22, of which one bias b stands for the three
    that add up; the LayerNormLSTMCell of PyTorch's fastrnns is the same.  TensorFlow's LayerNormBasicLSTMCell takes
    each gate apart, and W x + U h as one.
    """

    Carry: ClassVar[Any] = LSTMCarry
    together = (("i", "f", "g", "o"),)
    forgets = "f"
    more = ("cell", "cell_shift")

    gates = ("i", "f", "g", "o")

    def combine(self, p: Any, z: Any, r: Any, carry: LSTMCarry) -> tuple[LSTMCarry, Any]:
        r = self._scaled("recurrent", p, r)
        i, f, o = (self.gate_fn(getattr(z, n) + getattr(r, n)) for n in ("i", "f", "o"))
        g = self.activation_fn(z.g + r.g)
        c = f * carry.c + i * g
        (level,) = self._normalized(c)
        return LSTMCarry(c, o * self.activation_fn(p.cell * level + p.cell_shift)), self.Gates(i, f, g, o)


@dataclasses.dataclass(frozen=True)
class LayerNormGRU(_LayerNormCell):
    """GRU with layer normalization of both products, reset after the product.

    (r_t, z_t) = sigmoid(w norm(W x_t) + u norm(U h_{t-1}) + b)
    n_t = tanh(w_n norm(W_n x_t) + b_n + r_t (u_n norm(U_n h_{t-1}) + b_hn))
    h_t = (1 - z_t) n_t + z_t h_{t-1}

    norm(a) = (a - mean a) / sqrt(var a + epsilon), over the units of r and z as one vector, and over those of n; with
    `Heads` over those of a head.  The gains w, u and b_hn are per-unit parameters: `units.input_r`, `units.recurrent_r`
    and so on, and `units.recurrent_shift`.

    Args:
      hidden_size: H.
      epsilon: added to the variance.
      forget_bias: added to b_z once, at initialisation.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      recurrence, kernel_init, recurrent_init, bias_init: as in `PointwiseCell`.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> cell = rnncore.LayerNormGRU(4)
      >>> rnncore.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))[1].shape
      (2, 5, 4)

    Source: Ba, Kiros and Hinton (2016), arXiv:1607.06450, equations 23 to 25, with z and 1 - z swapped as in `GRU`.
    """

    together = (("r", "z"), ("n",))
    forgets = "z"
    more = ("recurrent_shift",)

    gates = ("r", "z", "n")

    def combine(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        r = self._scaled("recurrent", p, r)
        reset, keep = self.gate_fn(z.r + r.r), self.gate_fn(z.z + r.z)
        n = self.activation_fn(z.n + reset * (r.n + p.recurrent_shift))
        return self.Carry((1 - keep) * n + keep * carry.h), self.Gates(reset, keep, n)
