"""Training on streams: truncated backpropagation through time."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rnncore._types import PyTree


class StreamState(NamedTuple):
    """The state between updates.

    Fields:
      params: the parameters.
      optimizer: the optimiser's state.
      carry: the carry of the stream.
    """

    params: PyTree
    optimizer: PyTree
    carry: PyTree


def truncated_bptt(
    loss_fn: Callable[..., Any], optimizer: optax.GradientTransformation, *, has_aux: bool = False
) -> Callable[[StreamState, PyTree], tuple[StreamState, Any]]:
    """Makes the update of truncated backpropagation through time: one optimiser step for each segment of a stream.

    loss, s' = loss_fn(params, s, segment);  params' = params + optimizer(d loss / d params at constant s)

    The carry s' that a segment ends with starts the next one, as a constant: gradients reach back to
    the segment's first step and no further, while the state remembers the whole stream.

    Args:
      loss_fn: (params, carry, segment) -> (loss, carry), or (loss, (carry, aux)) with `has_aux`; the
        loss a scalar, the carry of the structure that it came in.
      optimizer: of optax.
      has_aux: the loss function returns something to report besides.

    Returns:
      update(state, segment) -> (state, loss), or (state, (loss, aux)), to put under `jax.jit`.  It has
      the form of a step of `jax.lax.scan`, which runs it over all `segments` in one call.  The first
      state is `StreamState(params, optimizer.init(params), carry)`.

    Raises:
      ValueError: the loss function returns a carry of another structure, shape or dtype.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rnncore
      >>> from rnncore.training import StreamState, segments, truncated_bptt
      >>> cell = rnncore.GRU(4)
      >>> def loss_fn(params, carry, segment):
      ...     carry, ys = rnncore.unroll(cell, params, segment, initial_carry=carry)
      ...     return jnp.mean((ys[:, :-1, :1] - segment[:, 1:, :1]) ** 2), carry
      >>> params, optimizer = cell.init(jax.random.key(0), 1), optax.adam(1e-2)
      >>> state = StreamState(params, optimizer.init(params), cell.initial_carry((2,)))
      >>> xs = jnp.sin(jnp.arange(60.0)).reshape(1, 60, 1) * jnp.ones((2, 1, 1))
      >>> state, losses = jax.lax.scan(truncated_bptt(loss_fn, optimizer), state, segments(xs, 20))
      >>> losses.shape
      (3,)

    Source: Williams and Peng (1990), with both of their lengths equal to the segment's.
    """
    if not hasattr(optimizer, "update"):
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise ValueError(
            f"`truncated_bptt(loss_fn, optimizer=<{name}>)`: expected an optimiser of optax, such as optax.adam(1e-3)."
        )

    def update(state: StreamState, segment: PyTree) -> tuple[StreamState, Any]:
        def loss(params: PyTree) -> Any:
            value, rest = loss_fn(params, state.carry, segment)
            return value, rest if has_aux else (rest, None)

        (value, (carry, aux)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        _check_carry(state.carry, carry)
        updates, inner = optimizer.update(gradients, state.optimizer, state.params)
        new = StreamState(optax.apply_updates(state.params, updates), inner, carry)
        return new, (value, aux) if has_aux else value

    return update


def segments(tree: PyTree, steps: int, *, time_axis: int = 1, drop_remainder: bool = False) -> PyTree:
    """Cuts sequences into segments of so many steps, stacked on a new first axis.

    (B, T, ...) becomes (T / steps, B, steps, ...)

    Args:
      tree: arrays with time on `time_axis`: inputs, targets, resets.
      steps: length of a segment.
      time_axis: 1 for (B, T, ...), 0 for (T, B, ...).
      drop_remainder: leave out the last steps that do not fill a segment.

    Returns:
      The tree with arrays (S, ...), for `jax.lax.scan` or a Python loop.

    Raises:
      ValueError: steps below 1; a length that is no multiple of it, without `drop_remainder`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore.training import segments
      >>> segments({"x": jnp.ones((2, 60, 3)), "y": jnp.ones((2, 60))}, 20)["x"].shape
      (3, 2, 20, 3)

    Source: plain reshaping.
    """
    try:
        steps = operator.index(steps)  # what `analysis.choose_truncation` found is one too
    except TypeError:
        raise ValueError(f"`segments(tree, steps={steps!r})`: expected an int, the steps of a segment.") from None
    if steps < 1:
        raise ValueError(f"`segments(tree, steps={steps})`: expected at least one step per segment.")

    def cut(a: Any) -> Any:
        a = jnp.asarray(a)
        count, left = divmod(a.shape[time_axis], steps)
        if left and not drop_remainder:
            raise ValueError(
                f"`segments(tree, steps={steps})`: an array {a.shape} has {a.shape[time_axis]} steps on axis "
                f"{time_axis}, {left} too many; pad it, or give drop_remainder=True."
            )
        a = jax.lax.slice_in_dim(a, 0, count * steps, axis=time_axis)
        a = a.reshape(*a.shape[:time_axis], count, steps, *a.shape[time_axis + 1 :])
        return jnp.moveaxis(a, time_axis, 0)

    return jax.tree.map(cut, tree)


def _check_carry(before: PyTree, after: PyTree) -> None:
    shapes = [jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), carry) for carry in (before, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`truncated_bptt(loss_fn, ...)`: the carry went in as {shapes[0]} and came out as {shapes[1]}; return the "
            "carry that the run ended with, of the dtype that it started with."
        )
