"""Layers: LSTM, GRU and Elman networks of several layers, in one direction or both, with their regularisers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from rnncore import _arguments, cells, initializers
from rnncore import flax_modules as modules
from rnncore._types import Activation, Array, Initializer
from rnncore.layers import layer_modules
from rnncore.layers.stack import Merge, Stack, StackParams

OF_STACK = (
    "heads", "activation_fn", "kernel_init", "recurrent_kernel_init", "bias_init", "num_layers", "bidirectional",
    "merge", "dropout", "recurrent_dropout", "learned_carry",
)  # fmt: skip
"""Fields that describe the stack, besides zoneout."""


class Layers(nn.Module):
    """What `LSTM`, `GRU` and `Elman` share: the fields, the call, the parameters of a `rnncore.Stack`."""

    make: ClassVar[Callable[..., cells.PointwiseCell]]
    """The functional cell."""
    own: ClassVar[tuple[str, ...]] = ()
    """Fields that only this kind of cell has."""

    features: int
    num_layers: int = field(default=1, kw_only=True)
    bidirectional: bool = field(default=False, kw_only=True)
    merge: Merge = field(default="concat", kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)
    recurrent_dropout: float = field(default=0.0, kw_only=True)
    zoneout: float = field(default=0.0, kw_only=True)
    heads: int = field(default=1, kw_only=True)
    learned_carry: bool = field(default=False, kw_only=True)
    activation_fn: Activation = field(default=jnp.tanh, kw_only=True)
    kernel_init: Initializer = field(default=initializers.lecun_normal, kw_only=True)
    recurrent_kernel_init: Initializer | None = field(default=None, kw_only=True)
    bias_init: Initializer = field(default=initializers.zeros, kw_only=True)
    dtype: Any = field(default=None, kw_only=True)
    param_dtype: Any = field(default=jnp.float32, kw_only=True)
    carry_dtype: Any = field(default=None, kw_only=True)
    output_dtype: Any = field(default=None, kw_only=True)
    time_major: bool = field(default=False, kw_only=True)
    return_carry: bool = field(default=False, kw_only=True)
    deterministic: bool | None = field(default=None, kw_only=True)
    checkpoint_every: int | None = field(default=None, kw_only=True)
    recompute: str = field(default="nothing", kw_only=True)
    backend: str | None = field(default=None, kw_only=True)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _arguments.refuse_foreign(cls, kwargs)
        _arguments.refuse_positional(cls, args, "features")
        return super().__new__(cls)

    @nn.compact
    @_arguments.takes_inputs
    def __call__(
        self,
        xs: Array,
        *,
        seq_lengths: Any = None,
        resets: Any = None,
        initial_carry: Any = None,
        return_carry: bool | None = None,
        return_states: bool = False,
        deterministic: bool | None = None,
    ) -> Any:
        """Runs the layers over a sequence.

        Args:
          xs: (*batch, T, D), or (T, *batch, D) with `time_major`.
          seq_lengths: integers (*batch): the carry is the one after the last valid step.
          resets: booleans of xs's shape without D, True at the first step of an episode: the carry
            returns to the layers' own initial carry, zeros or learned.
          initial_carry: what an earlier call returned; by default the layers' own.
          return_carry: in place of the field.
          return_states: also return every carry and gate of every layer and direction.
          deterministic: no dropout, zoneout by its expectation; in place of the field.  Required, here
            or in the field, where a rate is not zero; masks are drawn from the `dropout` stream.

        Returns:
          outputs, (carry, outputs), (outputs, states) or (carry, outputs, states).  The carry is a
          tuple for each layer, in it one carry for each direction; so are the states.

        Raises:
          ValueError: invalid shapes, lengths or rates; `deterministic` given nowhere.
        """
        modules.check_dtypes(self)
        stack = self.stack
        tree = {
            name: self.param(name, stack.init_entries, size, self.param_dtype)
            for name, size in stack.sizes(jnp.shape(xs)[-1]).items()
        }
        key = None
        if stack.is_random and not nn.merge_param("deterministic", self.deterministic, deterministic):
            key = self.make_rng("dropout")
        return layer_modules.run_layers(
            self, stack, stack.from_tree(tree), xs, key=key, initial_carry=initial_carry, seq_lengths=seq_lengths,
            resets=resets, return_carry=return_carry, return_states=return_states,
        )  # fmt: skip

    @property
    def stack(self) -> Stack:
        """The description of these layers."""
        make = functools.partial(self.make, **{name: getattr(self, name) for name in self.own})
        options = {name: getattr(self, name) for name in OF_STACK}
        zoneout = {"h": self.zoneout, "c": getattr(self, "zoneout_cell", 0.0)}
        return layer_modules.stack_of(make, self.features, zoneout=zoneout, **options)

    @nn.nowrap
    def functional(self, params: Mapping[str, Any]) -> tuple[Stack, StackParams]:
        """These layers as a functional stack and its parameters, for `rnncore.unroll_stack` and the analysis.

        Args:
          params: the layers' own entry of the variables' `params`, {"forward_0": {...}, ...}.
        """
        stack = self.stack
        return stack, stack.from_tree(nn.meta.unbox(params))

    def initialize_carry(self, batch_shape: tuple[int, ...] = ()) -> Any:
        """The layers' own initial carry for a batch, as a call takes it: `layer.apply(variables, (8,), method=...)`.

        Args:
          batch_shape: the batch axes of the inputs.
        """
        stack = self.stack
        params = StackParams((), None)
        if stack.learned_carry:
            params = stack.from_tree({n: self.get_variable("params", n) for row in stack.names for n in row})
        return stack.start(params, batch_shape, layer_modules.carry_dtype(self))


class LSTM(Layers):
    """LSTM layers: `rnncore.LSTM` in a `rnncore.Stack`, with dropout, zoneout and learned carries.

    i, f, o = sigmoid(W x + U h + b),  g = tanh(W x + U h + b),  c' = f c + i g,  h' = o tanh(c')

    Args:
      features: H.
      num_layers: L; each reads the outputs of the one below.
      bidirectional, merge: both directions in every layer, joined by "concat", "sum", "mean", "mul".
      dropout: rate between layers; recurrent_dropout: rate of variational dropout on h_{t-1}, one mask
        for all steps; zoneout, zoneout_cell: rates at which h and c keep their value.
      heads: N blocks of H/N units that see only their own h; 1 is a dense recurrent kernel.
      forget_bias: added to b_f once, at initialisation.
      learned_carry: the initial carry is a parameter; resets return to it.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      kernel_init, recurrent_kernel_init, bias_init: initialisers of W, U (None: orthogonal for each
        gate and head) and b.
      dtype: dtype of the products and outputs; None promotes inputs and parameters.
      param_dtype, carry_dtype, output_dtype: of the parameters; of the carries (None: param_dtype); of
        the outputs, where it differs.
      time_major, return_carry, deterministic: see the call.
      checkpoint_every, recompute, backend: as in `rnncore.unroll`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layers = nn.LSTM(4, num_layers=2, bidirectional=True, dropout=0.1, forget_bias=1.0, return_carry=True)
      >>> xs = jnp.ones((2, 5, 3))
      >>> variables = layers.init(jax.random.key(0), xs, deterministic=True)
      >>> carry, ys = layers.apply(variables, xs, deterministic=False, rngs={"dropout": jax.random.key(1)})
      >>> ys.shape, carry[1][0].c.shape, sorted(variables["params"])
      ((2, 5, 8), (2, 4), ['backward_0', 'backward_1', 'forward_0', 'forward_1'])

    Source: see `rnncore.LSTM` and `rnncore.Stack`.  As torch.nn.LSTM, which has one of these
    regularisers (dropout), two biases and the outputs first; Flax has no such layer.
    """

    make: ClassVar[Callable[..., cells.PointwiseCell]] = cells.LSTM
    own: ClassVar[tuple[str, ...]] = ("forget_bias", "gate_fn")

    zoneout_cell: float = field(default=0.0, kw_only=True)
    forget_bias: float = field(default=0.0, kw_only=True)
    gate_fn: Activation = field(default=jax.nn.sigmoid, kw_only=True)


class GRU(Layers):
    """GRU layers: `rnncore.GRU` (reset after the product) in a `rnncore.Stack`.

    r, z = sigmoid(W x + U h + b),  n = tanh(W_n x + b_n + r (U_n h + b_hn)),  h' = (1 - z) n + z h

    Args:
      forget_bias: added to b_z once, at initialisation: z is the gate that keeps the old state.
      All others: as in `LSTM`, which has zoneout_cell besides.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layers, xs = nn.GRU(4, num_layers=2), jnp.ones((2, 5, 3))
      >>> layers.init_with_output(jax.random.key(0), xs, seq_lengths=jnp.array([5, 2]))[0].shape
      (2, 5, 4)

    Source: see `rnncore.GRU` and `rnncore.Stack`.
    """

    make: ClassVar[Callable[..., cells.PointwiseCell]] = cells.GRU
    own: ClassVar[tuple[str, ...]] = ("forget_bias", "gate_fn")

    forget_bias: float = field(default=0.0, kw_only=True)
    gate_fn: Activation = field(default=jax.nn.sigmoid, kw_only=True)


class Elman(Layers):
    """Elman layers, the plain recurrent network: `rnncore.Elman` in a `rnncore.Stack`.

    h' = tanh(W x + U h + b)

    Args:
      activation_fn: in place of tanh.
      All others: as in `LSTM`, which has zoneout_cell, forget_bias and gate_fn besides.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layers, xs = nn.Elman(4, recurrent_dropout=0.2), jnp.ones((2, 5, 3))
      >>> layers.init_with_output(jax.random.key(0), xs, deterministic=True)[0].shape
      (2, 5, 4)

    Source: see `rnncore.Elman` and `rnncore.Stack`.
    """

    make: ClassVar[Callable[..., cells.PointwiseCell]] = cells.Elman
