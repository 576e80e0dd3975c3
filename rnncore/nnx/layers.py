"""Layers: LSTM, GRU and Elman networks of several layers, in one direction or both, with their regularisers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Required, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from rnncore import _arguments, cells, initializers
from rnncore._types import Activation, Array, Initializer
from rnncore.layers import layer_modules
from rnncore.layers.stack import Merge, Stack, StackParams
from rnncore.nnx import initial


class Options(TypedDict, total=False):
    """The options that `LSTM`, `GRU` and `Elman` share."""

    heads: int
    activation_fn: Activation
    kernel_init: Initializer
    recurrent_kernel_init: Initializer | None
    bias_init: Initializer
    num_layers: int
    bidirectional: bool
    merge: Merge
    dropout: float
    recurrent_dropout: float
    learned_carry: bool
    dtype: Any
    param_dtype: Any
    carry_dtype: Any
    output_dtype: Any
    time_major: bool
    return_carry: bool
    deterministic: bool
    checkpoint_every: int | None
    recompute: str
    backend: str | None
    rngs: Required[nnx.Rngs]


class Layers(nnx.Module):
    """What `LSTM`, `GRU` and `Elman` share: the parameters of a `rnncore.Stack`, and the call."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _arguments.refuse_foreign(cls, kwargs)
        initial.check_rngs(cls, args, kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        make: Callable[..., cells.PointwiseCell],
        in_features: int,
        hidden_features: int,
        *,
        heads: int = 1,
        activation_fn: Activation = jnp.tanh,
        kernel_init: Initializer = initializers.lecun_normal,
        recurrent_kernel_init: Initializer | None = None,
        bias_init: Initializer = initializers.zeros,
        num_layers: int = 1,
        bidirectional: bool = False,
        merge: Merge = "concat",
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: Mapping[str, float],
        learned_carry: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        carry_dtype: Any = None,
        output_dtype: Any = None,
        time_major: bool = False,
        return_carry: bool = False,
        deterministic: bool = False,
        checkpoint_every: int | None = None,
        recompute: str = "nothing",
        backend: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.stack = stack = layer_modules.stack_of(
            make, hidden_features, heads=heads, activation_fn=activation_fn, kernel_init=kernel_init,
            recurrent_kernel_init=recurrent_kernel_init, bias_init=bias_init, zoneout=zoneout, num_layers=num_layers,
            bidirectional=bidirectional, merge=merge, dropout=dropout, recurrent_dropout=recurrent_dropout,
            learned_carry=learned_carry,
        )  # fmt: skip
        self.in_features = in_features
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "carry_dtype": carry_dtype, "output_dtype": output_dtype}
        _arguments.check_dtypes(type(self).__name__, dtypes)
        for name, size in stack.sizes(in_features).items():
            entries = stack.init_entries(rngs.params(), size, param_dtype)
            setattr(self, name, nnx.Dict({leaf: nnx.Param(value) for leaf, value in entries.items()}))
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.carry_dtype = carry_dtype
        self.output_dtype = output_dtype
        self.time_major = time_major
        self.return_carry = return_carry
        self.deterministic = deterministic
        self.checkpoint_every = checkpoint_every
        self.recompute = recompute
        self.backend = backend
        # Unused random state would make nnx.split(model, nnx.Param) fail.
        self.rngs = rngs.dropout.fork() if stack.is_random else nnx.data(None)

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
        return layer_modules.run_layers(
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
        return stack.start(params, batch_shape, layer_modules.carry_dtype(self))


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

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        forget_bias: float = 0.0,
        zoneout: float = 0.0,
        zoneout_cell: float = 0.0,
        gate_fn: Activation = jax.nn.sigmoid,
        **options: Unpack[Options],
    ):
        make = functools.partial(cells.LSTM, forget_bias=forget_bias, gate_fn=gate_fn)
        super().__init__(make, in_features, hidden_features, zoneout={"h": zoneout, "c": zoneout_cell}, **options)


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

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        forget_bias: float = 0.0,
        zoneout: float = 0.0,
        gate_fn: Activation = jax.nn.sigmoid,
        **options: Unpack[Options],
    ):
        make = functools.partial(cells.GRU, forget_bias=forget_bias, gate_fn=gate_fn)
        super().__init__(make, in_features, hidden_features, zoneout={"h": zoneout}, **options)


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

    def __init__(self, in_features: int, hidden_features: int, *, zoneout: float = 0.0, **options: Unpack[Options]):
        super().__init__(cells.Elman, in_features, hidden_features, zoneout={"h": zoneout}, **options)
