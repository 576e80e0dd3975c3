"""The outer of two levels of scan: a run in chunks of K steps, each of which may be recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rnncore._types import PyTree


def run_chunks(
    chunk: Callable[[Any, Any, Any], tuple[Any, PyTree]], carry: Any, xs: PyTree, steps: int, every: int, again: bool
) -> tuple[Any, PyTree]:
    """Scans `chunk` over stretches of `every` steps; the last one may be shorter.

    Args:
      chunk: (carry, first step's index, xs of the stretch) -> (carry, ys of the stretch).
      carry: the carry before the first step.
      xs: pytree of (T, ...) inputs.
      steps: T.
      every: K, at least 1.
      again: recompute the inside of a chunk in reverse mode instead of keeping it.

    Returns:
      (carry, ys stacked to (T, ...)).
    """
    if again:
        chunk = jax.checkpoint(chunk, prevent_cse=False)
    if every >= steps:
        return chunk(carry, 0, xs)
    count, left = divmod(steps, every)
    whole = count * every
    stretches = jax.tree.map(lambda a: a[:whole].reshape(count, every, *a.shape[1:]), xs)

    def body(carry: Any, now: Any) -> Any:
        index, stretch = now
        return chunk(carry, index * every, stretch)

    carry, ys = lax.scan(body, carry, (jnp.arange(count), stretches))
    ys = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), ys)
    if left:
        carry, rest = chunk(carry, whole, jax.tree.map(lambda a: a[whole:], xs))
        ys = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, rest)
    return carry, ys
