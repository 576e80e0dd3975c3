"""The outer of two levels of loops: a run in chunks of K steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rnncore._types import PyTree
from rnncore.recurrence.run import Request


def chunk_size(request: Request) -> int:
    """K: the caller's, or a default for a pointwise cell.

    With `recompute` about sqrt(T), which needs the least memory for a run that is recomputed chunk by chunk.
    Otherwise T, except on one CPU, for known sizes.  There a slab of all steps that outgrows the caches costs page
    faults and memory traffic: above 4 MiB it is cut into chunks of about 2 MiB, at least 8 steps.  Either way
    a divisor of T, if one is near.
    """
    if request.checkpoint_every is not None:
        return request.checkpoint_every
    if request.symbolic:
        return request.steps
    if request.recompute != "nothing":
        wanted = max(8, math.isqrt(request.steps))
    else:
        size = len(request.cell.gates) * request.cell.hidden_size  # type: ignore[attr-defined]
        step_bytes = math.prod(request.batch_shape) * size * jnp.dtype(request.dtype).itemsize
        if request.platform != "cpu" or request.devices > 1 or step_bytes * request.steps <= 4 * 2**20:
            return request.steps
        wanted = max(8, 2 * 2**20 // step_bytes)
    near = [k for k in range(wanted // 2 + 1, 2 * wanted) if request.steps % k == 0]
    return min(near, key=lambda k: abs(k - wanted), default=wanted)


def over_chunks(
    chunk: Callable[[Any, int, Any], Any], state: Any, steps: int, chunk_size: int, backward: bool = False
) -> Any:
    """`chunk` (first step, size, state) -> state over all of them, in order or from the last to the first."""
    count, left = divmod(steps, chunk_size)

    def whole(i: Any, state: Any) -> Any:
        return chunk((count - 1 - i if backward else i) * chunk_size, chunk_size, state)

    if left and backward:
        state = chunk(count * chunk_size, left, state)
    if count:
        state = lax.fori_loop(0, count, whole, state) if count > 1 else whole(0, state)
    return chunk(count * chunk_size, left, state) if left and not backward else state


def scan_chunks(
    chunk: Callable[[Any, Any, Any], tuple[Any, PyTree]], carry: Any, xs: PyTree, steps: int, chunk_size: int,
    rematerialize: bool,
) -> tuple[Any, PyTree]:  # fmt: skip
    """Scans `chunk` over stretches of steps, so that JAX can differentiate it; the last one may be shorter.

    Args:
      chunk: (carry, first step's index, xs of the stretch) -> (carry, ys of the stretch).
      carry: the carry before the first step.
      xs: pytree of (T, ...) inputs.
      steps, chunk_size: T and K.
      rematerialize: recompute the inside of a chunk in reverse mode instead of keeping it.

    Returns:
      (carry, ys stacked to (T, ...)).
    """
    if rematerialize:
        chunk = jax.checkpoint(chunk, prevent_cse=False)
    if chunk_size >= steps:
        return chunk(carry, 0, xs)
    count, left = divmod(steps, chunk_size)
    whole = count * chunk_size
    stretches = jax.tree.map(lambda a: a[:whole].reshape(count, chunk_size, *a.shape[1:]), xs)

    def body(carry: Any, now: Any) -> Any:
        index, stretch = now
        return chunk(carry, index * chunk_size, stretch)

    carry, ys = lax.scan(body, carry, (jnp.arange(count), stretches))
    ys = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), ys)
    if left:
        carry, rest = chunk(carry, whole, jax.tree.map(lambda a: a[whole:], xs))
        ys = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, rest)
    return carry, ys
