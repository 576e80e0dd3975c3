"""unroll_stack: layers of a cell over a sequence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp

from rnncore import _arguments
from rnncore._types import Array
from rnncore.layers.stack import Merge, Stack, StackParams, check_stack
from rnncore.sequence import checks
from rnncore.sequence.call import Options, unroll
from rnncore.sequence.layers import unroll_layers

_MERGES: Mapping[Merge, Callable[[Array, Array], Array]] = {
    "concat": lambda a, b: jnp.concatenate([a, b], -1),
    "sum": jnp.add,
    "mean": lambda a, b: (a + b) / 2,
    "mul": jnp.multiply,
}


class StackOptions(TypedDict, total=False):
    """The options of `unroll_stack` but `return_states`, which says what is returned."""

    key: Array | None
    initial_carry: Any
    dtype: Any
    carry_dtype: Any
    output_dtype: Any
    seq_lengths: Any
    resets: Any
    time_major: bool
    checkpoint_every: int | None
    recompute: str
    residual_dtype: Any
    backend: str | None


@overload
def unroll_stack(
    stack: Stack,
    params: StackParams,
    xs: Array,
    *,
    return_states: Literal[False] = False,
    **options: Unpack[StackOptions],
) -> tuple[Any, Array]: ...


@overload
def unroll_stack(
    stack: Stack, params: StackParams, xs: Array, *, return_states: Literal[True], **options: Unpack[StackOptions]
) -> tuple[Any, Array, Any]: ...


@overload
def unroll_stack(
    stack: Stack, params: StackParams, xs: Array, *, return_states: bool, **options: Unpack[StackOptions]
) -> tuple[Any, Array] | tuple[Any, Array, Any]: ...


def unroll_stack(
    stack: Stack,
    params: StackParams,
    xs: Array = None,  # type: ignore[assignment]
    *,
    key: Array | None = None,
    initial_carry: Any = None,
    dtype: Any = None,
    carry_dtype: Any = None,
    output_dtype: Any = None,
    seq_lengths: Any = None,
    resets: Any = None,
    time_major: bool = False,
    return_states: bool = False,
    checkpoint_every: int | None = None,
    recompute: str = "nothing",
    residual_dtype: Any = None,
    backend: str | None = None,
    **removed: Any,
) -> tuple[Any, Array] | tuple[Any, Array, Any]:
    """Runs a stack over time.

    Feeding a stream in pieces, each with the carry that the previous call returned, equals feeding it
    whole, if the stack is unidirectional and no key is given.

    Args:
      stack: the description.
      params: its parameters, as `stack.init` makes them.
      xs: inputs (*batch, T, D), or (T, *batch, D) with `time_major`.
      key: for dropout, recurrent dropout and zoneout, as in training.  None runs without: zoneout then
        takes its expectation, s_t = rate s_{t-1} + (1 - rate) update.
      initial_carry: for each layer a tuple of carries, one for each direction, as this function
        returns them; by default the stack's own, learned or zeros.
      dtype: dtype of the products, to which inputs and parameters are cast; None promotes them.
      carry_dtype: dtype of the carries; None takes that of `initial_carry`, else of the products.
      output_dtype: dtype of the outputs of the last layer; None takes that of the products.
      seq_lengths, time_major, return_states: as in `rnncore.unroll`.
      checkpoint_every, recompute, residual_dtype, backend: likewise, for every layer.  A backend that can (as
        "cudnn") runs all layers and directions in one call, unless something is between them: active
        dropout, zoneout, or a `merge` other than "concat".
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
    checks.refuse_removed("unroll_stack", removed, inspect.signature(unroll_stack).parameters)
    check_stack("unroll_stack", stack)
    checks.check_arguments("unroll_stack", "stack", params, xs)
    if not isinstance(params, StackParams):
        raise ValueError(
            f"`unroll_stack(params=<{type(params).__name__}>)`: expected StackParams, as `stack.init(key, D)` makes "
            "them."
        )
    _arguments.check_dtypes("unroll_stack", {"dtype": dtype, "carry_dtype": carry_dtype, "output_dtype": output_dtype})
    _arguments.check_inputs("unroll_stack", "xs", xs)
    xs = jnp.asarray(xs)
    if xs.ndim < 2:
        raise ValueError(f"`unroll_stack(xs=<{xs.dtype} {xs.shape}>)`: expected (*batch, T, D), at least two axes.")
    shared: dict[str, Any] = dict(
        checkpoint_every=checkpoint_every, recompute=recompute, residual_dtype=residual_dtype, backend=backend
    )
    keys: Any = [[None] * (stack.directions + 1)] * stack.num_layers
    if key is not None:
        keys = jax.random.split(key, (stack.num_layers, stack.directions + 1))

    def one(level: int, way: int, own: Any, xs: Array, **options: Any) -> Any:
        return unroll(
            stack.cell, own, xs, **options, **_regularisers(stack, keys[level][way], xs, time_major),
            return_states=return_states, **shared,
        )  # fmt: skip

    def between(level: int, xs: Array) -> Array:
        if key is None or not stack.dropout:
            return xs
        keep = 1 - stack.dropout
        # A product, not a selection: with an explicit mesh it takes on the sharding of the data.
        return xs * (jax.random.bernoulli(keys[level][stack.directions], keep, xs.shape).astype(xs.dtype) / keep)

    def together(layers: Any, carry: Any, xs: Array) -> tuple[Any, Array] | None:
        options = Options(seq_lengths=seq_lengths, time_major=time_major, **shared)
        return unroll_layers(stack.cell, layers, carry, xs, options)

    apart = not _is_one_call(stack, key) or resets is not None or return_states
    carry, outputs, states = run_levels(
        stack, params, xs, one, between, None if apart else together, initial_carry=initial_carry, dtype=dtype,
        carry_dtype=carry_dtype, output_dtype=output_dtype, seq_lengths=seq_lengths, resets=resets,
        time_major=time_major,
    )  # fmt: skip
    return (carry, outputs, states) if return_states else (carry, outputs)


def run_levels(
    stack: Stack, params: StackParams, xs: Any, one: Callable[..., Any],
    between: Callable[[int, Array], Array] | None = None, together: Callable[..., Any] | None = None, *,
    initial_carry: Any = None, dtype: Any = None, carry_dtype: Any = None, output_dtype: Any = None,
    seq_lengths: Any = None, resets: Any = None, time_major: bool = False,
) -> tuple[Any, Array, Any]:  # fmt: skip
    """(carry, outputs, states) of all layers.

    Args:
      one: runs one layer and direction: (level, way, params, xs, options of `unroll`) to (carry, outputs[, states]).
      between: (level, outputs) to the inputs of the next layer.
      together: (params, carries, xs) to (carries, outputs) of all layers, or None where that is not to be had.
      All others: as in `unroll_stack`.
    """
    xs = jnp.asarray(xs)
    time_axis = 0 if time_major else xs.ndim - 2
    dtype = jnp.result_type(xs, *jax.tree.leaves(params.layers)) if dtype is None else dtype
    output_dtype = dtype if output_dtype is None else output_dtype
    layers, xs = jax.tree.map(lambda a: a.astype(dtype), (params.layers, xs))
    batch_shape = xs.shape[:time_axis] + xs.shape[time_axis + 1 : -1]
    start = stack.start(params, batch_shape, dtype if carry_dtype is None else carry_dtype)
    carry = start if initial_carry is None else _checked(stack, initial_carry)
    if initial_carry is not None and carry_dtype is not None:
        carry = jax.tree.map(lambda a: jnp.asarray(a, carry_dtype), carry)
    back = None
    if resets is not None:
        back = _backward_resets(checks.check_resets(resets, xs.shape[:-1]), seq_lengths, time_axis)
    result = None if together is None else together(layers, carry, xs)
    if result is not None:
        return result[0], result[1].astype(output_dtype), ()
    ends, states = [], []
    for level, weights in enumerate(layers):
        results = [
            one(
                level, way, own, xs, initial_carry=carry[level][way], seq_lengths=seq_lengths,
                resets=back if way else resets, reset_carry=None if resets is None else start[level][way],
                reverse=bool(way), keep_order=True, time_major=time_major,
            )
            for way, own in enumerate(weights)
        ]  # fmt: skip
        last = level + 1 == stack.num_layers
        ways = [outputs for _, outputs, *_ in results]
        ys = _MERGES[stack.merge](*ways) if len(ways) == 2 else ways[0]
        xs = ys.astype(output_dtype if last else dtype)
        ends.append(tuple(end for end, *_ in results))
        states.append(tuple(more[0] for _, _, *more in results if more))
        if between is not None and not last:
            xs = between(level, xs)
    return tuple(ends), xs, tuple(states)


def _is_one_call(stack: Stack, key: Array | None) -> bool:
    """Whether nothing is between layers and directions, so that a backend may run them all in one call."""
    plain = not any(stack.zoneout or ()) and (key is None or not stack.is_random)
    return plain and (stack.directions == 1 or stack.merge == "concat")


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


def _regularisers(stack: Stack, key: Array | None, xs: Array, time_major: bool) -> dict[str, Any]:
    """The recurrent mask and zoneout of one layer and direction with these inputs."""
    zoneout = stack.zoneout if any(stack.zoneout or ()) else None
    if key is None:
        return {"zoneout": zoneout}
    mask_key, *keys = jax.random.split(key, 1 + len(zoneout or ()))
    mask, keep, axes = None, 1 - stack.recurrent_dropout, xs.shape[:-1]
    if stack.recurrent_dropout:
        batch = axes[1:] if time_major else axes[:-1]
        mask = jax.random.bernoulli(mask_key, keep, (*batch, stack.cell.output_size)).astype(xs.dtype) / keep
    if zoneout is not None:
        sizes = (a.shape for a in jax.eval_shape(stack.cell.initial_carry))
        draws = zip(keys, zoneout, sizes, strict=True)
        zoneout = type(zoneout)(*(jax.random.bernoulli(k, rate, axes + n) if rate else None for k, rate, n in draws))
    return {"recurrent_mask": mask, "zoneout": zoneout}


def _backward_resets(resets: Array, lengths: Any, time_axis: int) -> Array:
    """Backwards an episode is entered at its last step: one before the first of the next, if that is a valid one."""
    steps = resets.shape[time_axis]
    following = jnp.arange(1, steps + 1).reshape((steps,) + (1,) * (resets.ndim - time_axis - 1))
    ends = steps if lengths is None else jnp.expand_dims(lengths, time_axis)
    return jnp.roll(resets, -1, time_axis) & (following < ends)
