"""Stack: layers of a cell, each over the outputs of the one below, in one direction or in both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from rnncore._types import Array, Differentiation
from rnncore.cells.base import Cell
from rnncore.sequence import unroll

Merge = Literal["concat", "sum", "mean", "mul"]


class StackParams(NamedTuple):
    """Parameters of a `Stack`.

    Fields:
      layers: for each layer, from the bottom, a tuple of the cell's parameters for each direction:
        (forward,) or (forward, backward).
      carry: in the same arrangement the initial carries, of (H,) arrays; None where they are zeros.
    """

    layers: tuple[tuple[Any, ...], ...]
    carry: tuple[tuple[Any, ...], ...] | None


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of one cell, each over the outputs of the one below: a frozen description.

    ys^l = merge(cell(xs^l) forward, cell(xs^l) backward),   xs^{l+1} = dropout(ys^l),   xs^1 = xs

    Args:
      cell: the cell of every layer and direction; each has its own parameters.
      num_layers: L.
      bidirectional: read in both directions in every layer.
      merge: how the two directions become one: "concat" (2H features), "sum", "mean", "mul".
      dropout: rate at which outputs are zeroed on their way to the next layer, at every step anew,
        the rest scaled by 1 / (1 - rate).
      recurrent_dropout: rate of variational dropout: units of h_{t-1} zeroed where they enter the
        recurrent product, the same ones at every step.
      zoneout: rates at which units keep their value at a step: the cell's carry with a rate or None
        for each field, such as LSTMCarry(0.5, 0.05).
      learned_carry: the initial carry is a parameter; else zeros.

    Raises:
      ValueError: no layers, a rate outside [0, 1), an unknown merge.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> stack = rnncore.Stack(rnncore.LSTM(4), num_layers=2, bidirectional=True, dropout=0.1)
      >>> params = stack.init(jax.random.key(0), 3)
      >>> carry, ys = rnncore.unroll_stack(stack, params, jnp.ones((2, 5, 3)), key=jax.random.key(1))
      >>> ys.shape, carry[1][0].h.shape
      ((2, 5, 8), (2, 4))

    Source: Schuster and Paliwal (1997) for both directions; Zaremba, Sutskever and Vinyals (2014),
    arXiv:1409.2329, for dropout between layers; Gal and Ghahramani (2016), arXiv:1512.05287, for
    variational dropout; Krueger et al. (2017), arXiv:1606.01305, for zoneout.  As torch.nn.LSTM with
    num_layers, bidirectional and dropout; the rest it has not.
    """

    cell: Cell
    num_layers: int = dataclasses.field(default=1, kw_only=True)
    bidirectional: bool = dataclasses.field(default=False, kw_only=True)
    merge: Merge = dataclasses.field(default="concat", kw_only=True)
    dropout: float = dataclasses.field(default=0.0, kw_only=True)
    recurrent_dropout: float = dataclasses.field(default=0.0, kw_only=True)
    zoneout: Any = dataclasses.field(default=None, kw_only=True)
    learned_carry: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"`Stack(num_layers={self.num_layers})`: expected at least one layer.")
        if self.merge not in get_args(Merge):
            choices = ", ".join(map(repr, get_args(Merge)))
            raise ValueError(f"`Stack(merge={self.merge!r})`: expected one of {choices}.")
        rates = {"dropout": self.dropout, "recurrent_dropout": self.recurrent_dropout}
        if self.zoneout is not None:
            rates |= {f"zoneout {name}": rate or 0.0 for name, rate in self.zoneout._asdict().items()}
        for name, rate in rates.items():
            if not 0 <= rate < 1:
                raise ValueError(f"`Stack({name}={rate})`: expected a rate from 0 to below 1.")

    @property
    def directions(self) -> int:
        """1, or 2 where it is bidirectional."""
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """Features of the outputs: H, or 2 H of two directions side by side."""
        return self.cell.hidden_size * (2 if self.bidirectional and self.merge == "concat" else 1)

    @property
    def is_random(self) -> bool:
        """Whether training draws masks."""
        return bool(self.dropout and self.num_layers > 1 or self.recurrent_dropout or any(self.zoneout or ()))

    def init(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> StackParams:
        """Draws parameters in `dtype` for inputs of `input_size` features."""
        keys = jax.random.split(key, (self.num_layers, self.directions))
        sizes = [input_size] + [self.output_size] * (self.num_layers - 1)
        layers = tuple(
            tuple(self.cell.init(k, size, dtype) for k in row) for row, size in zip(keys, sizes, strict=True)
        )
        return StackParams(layers, self.initial_carry((), dtype) if self.learned_carry else None)

    def initial_carry(self, batch_shape: Sequence[int] = (), dtype: Any = jnp.float32) -> tuple[tuple[Any, ...], ...]:
        """Zeros: for each layer a tuple of carries, one for each direction."""
        carry = self.cell.initial_carry(batch_shape, dtype)
        return ((carry,) * self.directions,) * self.num_layers

    def start(self, params: StackParams, batch_shape: Sequence[int], dtype: Any) -> tuple[tuple[Any, ...], ...]:
        """The stack's own initial carry, zeros or learned, for a batch."""
        zeros = self.initial_carry(batch_shape, dtype)
        if params.carry is None:
            return zeros
        return jax.tree.map(lambda a, z: jnp.broadcast_to(a, z.shape).astype(z.dtype), params.carry, zeros)


def unroll_stack(
    stack: Stack,
    params: StackParams,
    xs: Array,
    *,
    key: Array | None = None,
    initial_carry: Any = None,
    carry_dtype: Any = None,
    seq_lengths: Any = None,
    resets: Any = None,
    time_major: bool = False,
    return_states: bool = False,
    differentiation: Differentiation = "any",
    checkpoint_every: int | None = None,
    recompute: str = "nothing",
    backend: str | None = None,
) -> Any:
    """Runs a stack over time.

    Feeding a stream in pieces, each with the carry that the one before returned, equals feeding it
    whole, if it is unidirectional and no key is given.

    Args:
      stack: the description.
      params: its parameters, as `stack.init` makes them.
      xs: inputs (*batch, T, D), or (T, *batch, D) with `time_major`.
      key: for dropout, recurrent dropout and zoneout, as in training.  None runs without: zoneout then
        takes its expectation, s_t = rate s_{t-1} + (1 - rate) update.
      initial_carry: for each layer a tuple of carries, one for each direction, as this function
        returns them; by default the stack's own, learned or zeros.
      carry_dtype: dtype of the carries where `initial_carry` is None; by default that of the inputs.
      seq_lengths, return_states, differentiation, checkpoint_every, recompute, backend: as in
        `rnncore.unroll`.
      resets: booleans of xs's shape without D: True at the first step of an episode.  The carry then
        returns to the stack's own initial carry, also where `initial_carry` is another one.  The
        backward direction returns there after that step, on its way into the episode before.

    Returns:
      (carry, outputs), or (carry, outputs, states) with `return_states`: for each layer a tuple of
      `rnncore.States`, one for each direction, in the order of the inputs.

    Raises:
      ValueError, NotImplementedError: as `rnncore.unroll` does.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> stack = rnncore.Stack(rnncore.GRU(4), num_layers=2)
      >>> params, xs = stack.init(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (2, 6, 3))
      >>> carry, whole = rnncore.unroll_stack(stack, params, xs)
      >>> carry, first = rnncore.unroll_stack(stack, params, xs[:, :2])
      >>> carry, rest = rnncore.unroll_stack(stack, params, xs[:, 2:], initial_carry=carry)
      >>> bool(jnp.allclose(whole, jnp.concatenate([first, rest], axis=1), atol=1e-6))
      True

    Source: see `Stack`.  torch.nn.LSTM returns (outputs, (h, c)) with all layers and directions
    stacked on one axis.
    """
    xs = jnp.asarray(xs)
    time_axis = 0 if time_major else xs.ndim - 2
    batch_shape = xs.shape[:time_axis] + xs.shape[time_axis + 1 : -1]
    start = stack.start(params, batch_shape, xs.dtype if carry_dtype is None else carry_dtype)
    carry = start if initial_carry is None else _checked(stack, initial_carry)
    back = None if resets is None else _backward_resets(jnp.asarray(resets), seq_lengths, time_axis)
    keys: Any = [[None] * (stack.directions + 1)] * stack.num_layers
    if key is not None:
        keys = jax.random.split(key, (stack.num_layers, stack.directions + 1))
    ends, states = [], []
    for level, weights in enumerate(params.layers):
        results = []
        for way, own in enumerate(weights):
            results.append(
                unroll(
                    stack.cell, own, xs, initial_carry=carry[level][way], seq_lengths=seq_lengths,
                    resets=back if way else resets, reset_carry=None if resets is None else start[level][way],
                    **_regularisers(stack, keys[level][way], batch_shape, xs.shape[time_axis], time_axis, xs.dtype),
                    reverse=bool(way), keep_order=True, time_major=time_major, return_states=return_states,
                    differentiation=differentiation, checkpoint_every=checkpoint_every, recompute=recompute,
                    backend=backend,
                )
            )  # fmt: skip
        xs = _merge(stack.merge, [ys for _, ys, *_ in results])
        ends.append(tuple(end for end, *_ in results))
        states.append(tuple(more[0] for _, _, *more in results if more))
        if key is not None and stack.dropout and level + 1 < stack.num_layers:
            keep = 1 - stack.dropout
            mask = jax.random.bernoulli(keys[level][stack.directions], keep, xs.shape)
            xs = jnp.where(mask, xs / keep, 0).astype(xs.dtype)
    return (tuple(ends), xs, tuple(states)) if return_states else (tuple(ends), xs)


def _checked(stack: Stack, carry: Any) -> Any:
    arranged = isinstance(carry, tuple | list) and len(carry) == stack.num_layers
    if not arranged or any(
        not isinstance(layer, tuple | list) or hasattr(layer, "_fields") or len(layer) != stack.directions
        for layer in carry
    ):
        raise ValueError(
            f"`unroll_stack(initial_carry=<{type(carry).__name__}>)`: expected a tuple of {stack.num_layers}, for each "
            f"layer a tuple of {stack.directions}, for each direction a carry, as `unroll_stack` returns it."
        )
    return carry


def _regularisers(
    stack: Stack, key: Array | None, batch: tuple[int, ...], steps: int, time_axis: int, dtype: Any
) -> dict[str, Any]:
    """The recurrent mask and zoneout of one layer and direction."""
    zoneout = stack.zoneout if any(stack.zoneout or ()) else None
    if key is None:
        return {"zoneout": zoneout}
    size = stack.cell.hidden_size
    mask_key, *keys = jax.random.split(key, 1 + len(zoneout or ()))
    mask, keep = None, 1 - stack.recurrent_dropout
    if stack.recurrent_dropout:
        mask = jax.random.bernoulli(mask_key, keep, (*batch, size)).astype(dtype) / keep
    if zoneout is not None:
        shape = (*batch[:time_axis], steps, *batch[time_axis:], size)
        draws = (jax.random.bernoulli(k, rate, shape) if rate else None for k, rate in zip(keys, zoneout, strict=True))
        zoneout = type(zoneout)(*draws)
    return {"recurrent_mask": mask, "zoneout": zoneout}


def _merge(merge: Merge, ways: list[Array]) -> Array:
    if len(ways) == 1:
        return ways[0]
    forward, backward = ways
    if merge == "concat":
        return jnp.concatenate(ways, -1)
    if merge == "mul":
        return forward * backward
    return forward + backward if merge == "sum" else (forward + backward) / 2


def _backward_resets(resets: Array, lengths: Any, time_axis: int) -> Array:
    """Backwards an episode is entered at its last step: one before the first of the next, if that is a valid one."""
    steps = resets.shape[time_axis]
    following = jnp.arange(1, steps + 1).reshape((steps,) + (1,) * (resets.ndim - time_axis - 1))
    ends = steps if lengths is None else jnp.expand_dims(lengths, time_axis)
    return jnp.roll(resets, -1, time_axis) & (following < ends)
