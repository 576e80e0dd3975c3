"""Cells that Flax has not: functional cells as modules, with the arrays of their parameters under the same names."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from rnncore import cells, initializers
from rnncore import flax_modules as modules
from rnncore._types import Activation, Array, Initializer
from rnncore.cells.qrnn import Pooling
from rnncore.cells.recurrent_kernels import Recurrence
from rnncore.layers.entries import entry_shapes, to_entries
from rnncore.linen import trees
from rnncore.linen.cells import Cell


@functools.lru_cache(maxsize=256)
def _unboxed(cell: str, name: str, init: Initializer) -> Initializer:
    """An initialiser that refuses to draw boxes: an entry here is a part of one array that it draws."""
    if init in (initializers.lecun_normal, initializers.zeros):
        return init

    def draw(*arguments: Any) -> Array:
        made = init(*arguments)
        if isinstance(made, nn.meta.AxisMetadata):
            raise NotImplementedError(
                f"`{cell}({name}=...)`: draws a <{type(made).__name__}>, and this cell keeps plain arrays; give a "
                "plain initialiser and partition the parameters after `init`."
            )
        return made

    return draw


class OwnCell(Cell):
    """What these cells share: one step, and the parameters, each drawn as the functional cell draws it."""

    kind: ClassVar[type[cells.Cell]]
    """The functional cell."""
    tree: ClassVar[trees.Entries] = trees.Entries()

    features: int
    kernel_init: Initializer = field(default=initializers.lecun_normal, kw_only=True)
    recurrent_kernel_init: Initializer | None = field(default=None, kw_only=True)
    bias_init: Initializer = field(default=initializers.zeros, kw_only=True)
    dtype: Any = field(default=None, kw_only=True)
    param_dtype: Any = field(default=jnp.float32, kw_only=True)
    carry_init: Initializer = field(default=nn.initializers.zeros_init(), kw_only=True)

    @property
    def core(self) -> Any:
        """The functional cell."""
        given = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(self.kind)}
        given["recurrent_init"] = self.recurrent_kernel_init
        del given["hidden_size"]
        given = {n: v for n, v in given.items() if v is not None}
        inits = {n: _unboxed(type(self).__name__, n, v) for n, v in given.items() if n.endswith("_init")}
        return self.kind(self.features, **given | inits)

    @nn.nowrap
    def _weights(self, inputs: Array, h: Array) -> dict[str, Array]:
        del h
        core, size = self.core, jnp.shape(inputs)[-1]

        def draw(key: Array, name: str) -> Array:
            return to_entries(core.init(key, size, self.param_dtype))[name]

        return {name: self.param(name, draw, name) for name in entry_shapes(core, size)}

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Any:
        """The carry before the first step.

        Args:
          rng: key for `carry_init`, split for the fields of the carry.
          input_shape: (*batch, D), the shape of one step's input.
        """
        like = jax.eval_shape(lambda: self.core.initial_carry(input_shape[:-1]))
        keys = jax.random.split(rng, len(like))
        drawn = (self.carry_init(key, a.shape, self.param_dtype) for key, a in zip(keys, like, strict=True))
        return modules.from_core(type(like)(*drawn))


class SLSTMCell(OwnCell):
    """sLSTM, the LSTM with exponential gates: `rnncore.SLSTM`.  Carry (c, n, m, h), output h.

    Args:
      features: H.
      recurrence: the structure of the recurrent kernel, `rnncore.Heads(4)` in the paper; None: dense.
      kernel_init, recurrent_kernel_init, bias_init: initialisers of the arrays `input_kernel` (D, 4, H),
        `recurrent_kernel` (None: the structure's own) and `bias` (4, H).
      dtype: dtype of the products; None promotes inputs and parameters.
      param_dtype: dtype of the parameters and of the initial carry.
      carry_init: initialiser of the carry.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import linen as nn
      >>> layer = nn.RNN(nn.SLSTMCell(8, recurrence=rnncore.Heads(2)))
      >>> ys, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))
      >>> ys.shape, sorted(variables["params"]["cell"])
      ((2, 5, 8), ['bias', 'input_kernel', 'recurrent_kernel'])

    Source: see `rnncore.SLSTM`, whose arrays these are.
    """

    kind: ClassVar[type[cells.Cell]] = cells.SLSTM
    recurrence: Recurrence | None = field(default=None, kw_only=True)


class LSTMPCell(OwnCell):
    """LSTM with a projection: `rnncore.LSTMP`.  Carry (c (*batch, H), h (*batch, P)), output h.

    Args:
      features: H.
      projection_size: P, the size of h.
      forget_bias: added to b_f once, at initialisation.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      All others: as in `SLSTMCell`, which has a recurrence besides; `projection` (H, P) is drawn by kernel_init.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layer = nn.RNN(nn.LSTMPCell(8, projection_size=3))
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 5, 3)

    Source: see `rnncore.LSTMP`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.LSTMP
    projection_size: int = field(kw_only=True)
    forget_bias: float = field(default=0.0, kw_only=True)
    gate_fn: Activation = field(default=jax.nn.sigmoid, kw_only=True)
    activation_fn: Activation = field(default=jnp.tanh, kw_only=True)


class LayerNormLSTMCell(OwnCell):
    """LSTM with layer normalization: `rnncore.LayerNormLSTM`.  Carry (c, h), output h.

    Args:
      features: H.
      epsilon: added to the variance.
      forget_bias: added to b_f once, at initialisation.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      All others: as in `SLSTMCell`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layer = nn.RNN(nn.LayerNormLSTMCell(4))
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 5, 4)

    Source: see `rnncore.LayerNormLSTM`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.LayerNormLSTM
    epsilon: float = field(default=1e-5, kw_only=True)
    forget_bias: float = field(default=0.0, kw_only=True)
    gate_fn: Activation = field(default=jax.nn.sigmoid, kw_only=True)
    activation_fn: Activation = field(default=jnp.tanh, kw_only=True)
    recurrence: Recurrence | None = field(default=None, kw_only=True)


class LayerNormGRUCell(LayerNormLSTMCell):
    """GRU with layer normalization: `rnncore.LayerNormGRU`.  Carry h, output h.

    Args:
      features: H.
      forget_bias: added to b_z once, at initialisation.
      All others: as in `LayerNormLSTMCell`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layer = nn.RNN(nn.LayerNormGRUCell(4))
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 5, 4)

    Source: see `rnncore.LayerNormGRU`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.LayerNormGRU


class MinGRUCell(OwnCell):
    """Minimal GRU, whose gates see the inputs alone: `rnncore.MinGRU`.  Carry h, output h.

    Args:
      features: H.
      positive: keep the states positive.
      All others: as in `SLSTMCell`; recurrence None: `rnncore.Unconnected()`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layer = nn.RNN(nn.MinGRUCell(4))
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 5, 4)

    Source: see `rnncore.MinGRU`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.MinGRU
    positive: bool = field(default=True, kw_only=True)
    recurrence: Recurrence | None = field(default=None, kw_only=True)


class MinLSTMCell(MinGRUCell):
    """Minimal LSTM, whose gates see the inputs alone: `rnncore.MinLSTM`.  Carry h, output h.

    Args:
      features: H.
      All others: as in `MinGRUCell`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layer = nn.RNN(nn.MinLSTMCell(4))
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 5, 4)

    Source: see `rnncore.MinLSTM`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.MinLSTM


class RGLRUCell(OwnCell):
    """Real-gated linear recurrent unit: `rnncore.RGLRU`.  Carry h, output h.

    Args:
      features: H.
      scale: c.
      All others: as in `MinGRUCell`; `units_decay` (H,) starts as in the paper.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layer = nn.RNN(nn.RGLRUCell(4))
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 5, 4)

    Source: see `rnncore.RGLRU`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.RGLRU
    scale: float = field(default=8.0, kw_only=True)
    recurrence: Recurrence | None = field(default=None, kw_only=True)


class QRNNCell(OwnCell):
    """Quasi-recurrent cell over windows of the inputs: `rnncore.QRNN`.  Carry (c, h), or h of pooling "f"; output h.

    Args:
      features: H.
      pooling: "f", "fo" or "ifo".
      activation_fn: in place of tanh.
      All others: as in `MinGRUCell`.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import linen as nn
      >>> layer, xs = nn.RNN(nn.QRNNCell(4)), jnp.ones((2, 5, 3))
      >>> layer.init_with_output(jax.random.key(0), rnncore.windows(xs, 2))[0].shape
      (2, 5, 4)

    Source: see `rnncore.QRNN` and `rnncore.windows`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.QRNN
    pooling: Pooling = field(default="fo", kw_only=True)
    activation_fn: Activation = field(default=jnp.tanh, kw_only=True)
    recurrence: Recurrence | None = field(default=None, kw_only=True)


class LeakyCell(OwnCell):
    """Leaky network of continuous time: `rnncore.Leaky`.  Carry h, output h.

    Args:
      features: H.
      dt, tau, learn_tau: as in `rnncore.Leaky`; learned ones are `units_log_tau` (H,).
      activation_fn: in place of tanh.
      All others: as in `SLSTMCell`.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import linen as nn
      >>> layer = nn.RNN(nn.LeakyCell(4, dt=1.0, tau=10.0, recurrence=rnncore.Dale((1, 1, 1, -1))))
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 5, 4)

    Source: see `rnncore.Leaky`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.Leaky
    dt: float = field(default=1.0, kw_only=True)
    tau: float | tuple[float, ...] = field(default=10.0, kw_only=True)
    learn_tau: bool = field(default=False, kw_only=True)
    activation_fn: Activation = field(default=jnp.tanh, kw_only=True)
    recurrence: Recurrence | None = field(default=None, kw_only=True)


CELLS: tuple[type[OwnCell], ...] = (
    SLSTMCell, LSTMPCell, LayerNormLSTMCell, LayerNormGRUCell, MinGRUCell, MinLSTMCell, RGLRUCell, QRNNCell, LeakyCell,
)  # fmt: skip
