"""Long short-term memory with a projection of its output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rnncore import _arguments, _products, initializers
from rnncore._types import Activation, Array, Initializer, exportable
from rnncore.cells.base import Cell, CellParams, PointwiseCell, check_init, named
from rnncore.cells.lstm import LSTM, LSTMCarry
from rnncore.cells.structured_kernels import LowRank


@exportable
class LSTMPParams(NamedTuple):
    """input_kernel (D, 4, H), recurrent_kernel (P, 4, H), bias (4, H) or None, projection (H, P); gates i, f, g, o."""

    input_kernel: Array
    recurrent_kernel: Array
    bias: Array | None
    projection: Array


@exportable
class _Carry(NamedTuple):
    """Of the pointwise cell: c, o tanh(c) as h, and what the projected h_0 adds to the gates of the first step."""

    c: Any
    i: Any
    f: Any
    g: Any
    o: Any
    h: Any


@dataclasses.dataclass(frozen=True)
class _Unprojected(PointwiseCell):
    """The LSTM whose h is o tanh(c), not projected: its recurrent kernel is U V."""

    lstm: LSTM = dataclasses.field(kw_only=True)

    Carry: ClassVar[Any] = _Carry

    @property
    def gates(self) -> tuple[str, ...]:
        return self.lstm.gates

    def pointwise(self, p: Any, z: Any, r: Any, carry: _Carry) -> tuple[_Carry, Any]:
        entering = self.Gates(*(zg + rg for zg, rg in zip(z, r, strict=True)))
        start = self.Gates(carry.i, carry.f, carry.g, carry.o)
        new, gates = self.lstm.pointwise(p, entering, start, LSTMCarry(carry.c, carry.h))
        none = jax.tree.map(jnp.zeros_like, z)
        return _Carry(c=new.c, **none._asdict(), h=new.h), gates


@dataclasses.dataclass(frozen=True)
class LSTMP(Cell):
    """Long short-term memory with a projection: units keep H cell states and give P outputs.

    i_t, f_t, o_t = sigmoid(W x_t + U h_{t-1} + b),   g_t = tanh(W_g x_t + U_g h_{t-1} + b_g)
    c_t = f_t c_{t-1} + i_t g_t
    h_t = V (o_t tanh(c_t))

    As a function of o_t tanh(c_t) the recurrent kernel U V is one of rank P: the cell runs as an LSTM over it, in any
    loop and with all derivatives, and the outputs are projected for all steps at once.

    Args:
      hidden_size: H.
      projection_size: P, the size of h and of the output.
      forget_bias: added to b_f once, at initialisation.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      kernel_init: initialiser of W, called with shape (D, 4*H), and of V with (H, P).
      recurrent_init: initialiser of U, (P, 4, H).
      bias_init: initialiser of the (4, H) bias.

    Raises:
      ValueError: a projection_size that is not from 1 to hidden_size - 1.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> cell = rnncore.LSTMP(8, projection_size=3)
      >>> carry, ys = rnncore.unroll(cell, cell.init(jax.random.key(0), 5), jnp.ones((2, 6, 5)))
      >>> ys.shape, carry.c.shape, carry.h.shape
      ((2, 6, 3), (2, 8), (2, 3))

    Source: Sak, Senior and Beaufays (2014), arXiv:1402.1128, without their peepholes.  As torch.nn.LSTM with proj_size,
    which has two biases that add up, V as weight_hr, and the state in the order (h, c).  Flax has no such cell.
    """

    projection_size: int
    forget_bias: float = dataclasses.field(default=0.0, kw_only=True)
    gate_fn: Activation = dataclasses.field(default=jax.nn.sigmoid, kw_only=True)
    activation_fn: Activation = dataclasses.field(default=jnp.tanh, kw_only=True)
    kernel_init: Initializer = dataclasses.field(default=initializers.lecun_normal, kw_only=True)
    recurrent_init: Initializer = dataclasses.field(default=initializers.per_gate(), kw_only=True)
    bias_init: Initializer = dataclasses.field(default=initializers.zeros, kw_only=True)

    Carry: ClassVar[Any] = LSTMCarry

    def __post_init__(self) -> None:
        super().__post_init__()
        _arguments.check_size("LSTMP", "projection_size", self.projection_size)
        if not 1 <= self.projection_size < self.hidden_size:
            raise ValueError(
                f"`LSTMP(hidden_size={self.hidden_size}, projection_size={self.projection_size})`: expected a "
                "projection to fewer than hidden_size features; without one it is `LSTM`."
            )

    @property
    def gates(self) -> tuple[str, ...]:
        return self._lstm.gates

    @property
    def output_size(self) -> int:
        """P."""
        return self.projection_size

    @property
    def projected_size(self) -> int | None:
        """4*H."""
        return 4 * self.hidden_size

    def init(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> LSTMPParams:
        """Draws parameters in `dtype` for inputs of `input_size` features; `forget_bias` is added to b_f."""
        check_init(self, key, input_size, dtype)
        hidden, size = self.hidden_size, self.projection_size
        input_key, recurrent_key, bias_key, projection_key = jax.random.split(key, 4)
        return LSTMPParams(
            self.kernel_init(input_key, (input_size, 4 * hidden), dtype).reshape(input_size, 4, hidden),
            self.recurrent_init(recurrent_key, (size, 4, hidden), dtype),
            self.bias_init(bias_key, (4, hidden), dtype).at[1].add(self.forget_bias),
            self.kernel_init(projection_key, (hidden, size), dtype),
        )

    def initial_carry(self, batch_shape: Sequence[int] = (), dtype: Any = jnp.float32) -> LSTMCarry:
        """Zeros: c (*batch_shape, H) and h (*batch_shape, P)."""
        return LSTMCarry(*(jnp.zeros((*batch_shape, n), dtype) for n in (self.hidden_size, self.projection_size)))

    def project(self, params: LSTMPParams, xs: Array) -> Array:
        """z = x W + b as a slab: (..., D) to (..., 4*H)."""
        return self.pointwise_cell.project(self.pointwise_params(params), xs)

    def update(self, params: LSTMPParams, carry: LSTMCarry, z: Array) -> tuple[LSTMCarry, Any]:
        """One step: (carry, z slab) to (new carry, gates)."""
        cell = self._lstm
        new, gates = cell.pointwise((), cell.split(z), cell.split(self._recurrent_matmul(params, carry.h)), carry)
        return LSTMCarry(new.c, self.leave_output(params, new.h)), gates

    def _recurrent_matmul(self, params: LSTMPParams, h: Array) -> Array:
        """U h of all gates as a slab: (..., P) to (..., 4*H)."""
        kernel = params.recurrent_kernel
        return _products.times(h.astype(kernel.dtype), kernel.reshape(kernel.shape[0], -1))

    @property
    def pointwise_cell(self) -> PointwiseCell:
        """The cell that runs, over u = (c, o tanh(c)); `update` is the reference, and runs where it cannot."""
        return _Unprojected(self.hidden_size, lstm=self._lstm, recurrence=LowRank(self.projection_size))

    @property
    def _lstm(self) -> LSTM:
        return LSTM(self.hidden_size, gate_fn=self.gate_fn, activation_fn=self.activation_fn)

    def pointwise_params(self, params: LSTMPParams) -> CellParams:
        """The parameters of that cell, differentiable in these."""
        kernel = jnp.concatenate([params.projection.T[:, None], params.recurrent_kernel], 1)
        return CellParams(params.input_kernel, kernel, params.bias, None, named("Units", ())())

    def enter(self, params: LSTMPParams, carry: LSTMCarry) -> _Carry:
        """The carry of that cell that corresponds to one of this; linear in the carry."""
        start = self.pointwise_cell.split(self._recurrent_matmul(params, carry.h))
        start = jax.tree.map(lambda a: a.astype(carry.h.dtype), start)
        return _Carry(c=carry.c, **start._asdict(), h=jnp.zeros_like(carry.c, carry.h.dtype))

    def leave(self, params: LSTMPParams, carry: _Carry) -> LSTMCarry:
        """The carry after a step, from that of the pointwise cell; with any leading axes."""
        return LSTMCarry(carry.c, self.leave_output(params, carry.h))

    def leave_output(self, params: LSTMPParams, h: Array) -> Array:
        """The output, from that of the pointwise cell; with any leading axes."""
        return _products.times(h.astype(params.projection.dtype), params.projection).astype(h.dtype)

    def zoneout(self, zoneout: LSTMCarry) -> Any:
        """The equivalent zoneout of the pointwise cell, or None if there is no equivalent."""
        return None if zoneout.h is not None else _Carry(c=zoneout.c, i=None, f=None, g=None, o=None, h=None)
