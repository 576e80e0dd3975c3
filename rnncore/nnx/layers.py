"""Layers: LSTM, GRU and Elman networks of several layers, in one direction or both, with their regularisers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import field
from typing import Any, ClassVar

import jax
from flax import nnx

from rnncore import _arguments, cells
from rnncore import flax_modules as modules
from rnncore._types import Activation, Array
from rnncore.layers import fields
from rnncore.layers.stack import Stack, StackParams
from rnncore.nnx import initial


@dataclasses.dataclass(eq=False, repr=False)
class Layers(fields.LayerFields, nnx.Module):
    """What `LSTM`, `GRU` and `Elman` share: the parameters of a `rnncore.Stack`, and the call."""

    in_features: int
    hidden_features: int
    deterministic: bool = field(default=False, kw_only=True)
    rngs: nnx.Rngs = field(kw_only=True)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _arguments.refuse_foreign(cls, kwargs)
        initial.check_rngs(cls, args, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        rngs = self.rngs
        self.stack = stack = fields.stack_of(self, self.hidden_features)
        modules.check_dtypes(self)
        for name, size in stack.sizes(self.in_features).items():
            entries = stack.init_entries(rngs.params(), size, self.param_dtype)
            setattr(self, name, nnx.Dict({leaf: nnx.Param(value) for leaf, value in entries.items()}))
        # Unused random state would make nnx.split(model, nnx.Param) fail.
        self.rngs = rngs.dropout.fork() if stack.is_random else nnx.data(None)  # type: ignore[assignment]

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
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
    ) -> Any:
        """Runs the layers over a sequence.

        Args:
          xs: (*batch, T, D), or (T, *batch, D) with `time_major`.
          seq_lengths: integers (*batch): the carry is the one after the last valid step.
          resets: booleans of xs's shape without D, True at the first step of an episode: the carry
            returns to the layers' own initial carry, zeros or learned.
          initial_carry: what an earlier call returned; by default the layers' own.
          return_carry: in place of the constructor's.
          return_states: also return every carry and gate of every layer and direction.
          deterministic: no dropout, zoneout by its expectation; in place of the attribute, which
            `model.eval()` and `model.train()` set.
          rngs: for the masks, in place of the layers' own stream; a key too.

        Returns:
          outputs, (carry, outputs), (outputs, states) or (carry, outputs, states).  The carry is a
          tuple for each layer, in it one carry for each direction; so are the states.

        Raises:
          ValueError: invalid shapes or lengths.
        """
        stack, params = self.functional()
        key = None
        if stack.is_random and not (self.deterministic if deterministic is None else deterministic):
            stream = self.rngs if rngs is None else rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
            key = stream() if isinstance(stream, nnx.RngStream) else stream
        return fields.run_layers(
            self, stack, params, xs, key=key, initial_carry=initial_carry, seq_lengths=seq_lengths, resets=resets,
            return_carry=return_carry, return_states=return_states,
        )  # fmt: skip

    def functional(self) -> tuple[Stack, StackParams]:
        """These layers as a functional stack and its parameters, for `rnncore.unroll_stack` and the analysis."""
        names = [name for row in self.stack.names for name in row]
        tree = {name: {leaf: value[...] for leaf, value in getattr(self, name).items()} for name in names}
        return self.stack, self.stack.from_tree(tree)

    def initialize_carry(self, batch_shape: tuple[int, ...] = ()) -> Any:
        """The layers' own initial carry, zeros or learned, for a batch, as a call takes it.

        Args:
          batch_shape: the batch axes of the inputs.
        """
        stack, params = self.functional()
        return stack.start(params, batch_shape, fields.carry_dtype(self))


@dataclasses.dataclass(eq=False, repr=False)
class LSTM(Layers):
    """LSTM layers: `rnncore.LSTM` in a `rnncore.Stack`, with dropout, zoneout and learned carries.

    i, f, o = sigmoid(W x + U h + b),  g = tanh(W x + U h + b),  c' = f c + i g,  h' = o tanh(c')

    Args:
      in_features, hidden_features: D and H.
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
      rngs: the stream `params`, and `dropout` where a rate is not zero; kept only there.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import nnx
      >>> layers = nnx.LSTM(3, 4, num_layers=2, bidirectional=True, dropout=0.1, forget_bias=1.0, rngs=nnx.Rngs(0))
      >>> carry, ys = layers(jnp.ones((2, 5, 3)), return_carry=True)
      >>> ys.shape, carry[1][0].c.shape
      ((2, 5, 8), (2, 4))

    Source: see `rnncore.LSTM` and `rnncore.Stack`.  As torch.nn.LSTM, which has one of these
    regularisers (dropout), two biases and the outputs first; Flax has no such layer.
    """

    make: ClassVar[Callable[..., cells.PointwiseCell]] = cells.LSTM
    own: ClassVar[tuple[str, ...]] = ("forget_bias", "gate_fn")

    zoneout_cell: float = field(default=0.0, kw_only=True)
    forget_bias: float = field(default=0.0, kw_only=True)
    gate_fn: Activation = field(default=jax.nn.sigmoid, kw_only=True)


@dataclasses.dataclass(eq=False, repr=False)
class GRU(Layers):
    """GRU layers: `rnncore.GRU` (reset after the product) in a `rnncore.Stack`.

    r, z = sigmoid(W x + U h + b),  n = tanh(W_n x + b_n + r (U_n h + b_hn)),  h' = (1 - z) n + z h

    Args:
      forget_bias: added to b_z once, at initialisation: z is the gate that keeps the old state.
      All others: as in `LSTM`, which has zoneout_cell besides.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import nnx
      >>> layers = nnx.GRU(3, 4, num_layers=2, rngs=nnx.Rngs(0))
      >>> layers(jnp.ones((2, 5, 3)), seq_lengths=jnp.array([5, 2])).shape
      (2, 5, 4)

    Source: see `rnncore.GRU` and `rnncore.Stack`.
    """

    make: ClassVar[Callable[..., cells.PointwiseCell]] = cells.GRU
    own: ClassVar[tuple[str, ...]] = ("forget_bias", "gate_fn")

    forget_bias: float = field(default=0.0, kw_only=True)
    gate_fn: Activation = field(default=jax.nn.sigmoid, kw_only=True)


@dataclasses.dataclass(eq=False, repr=False)
class Elman(Layers):
    """Elman layers, the plain recurrent network: `rnncore.Elman` in a `rnncore.Stack`.

    h' = tanh(W x + U h + b)

    Args:
      activation_fn: in place of tanh.
      All others: as in `LSTM`, which has zoneout_cell, forget_bias and gate_fn besides.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import nnx
      >>> nnx.Elman(3, 4, recurrent_dropout=0.2, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 3)), deterministic=True).shape
      (2, 5, 4)

    Source: see `rnncore.Elman` and `rnncore.Stack`.
    """

    make: ClassVar[Callable[..., cells.PointwiseCell]] = cells.Elman
