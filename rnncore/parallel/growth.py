"""How errors in a state persist in later ones: the transient growth of products of Jacobians."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Array

PROBES = 8


def transient_growth(jacobian: Any) -> tuple[Array, Array]:
    """The sum of |J_t ... J_{j+1}| over all j up to t, (W, M), and ln |J_W ... J_1|, (M).

    Sizes are root mean squares over at most 8 directions.

    Args:
      jacobian: of W steps, as `Sweep.jacobian` makes it; M is the number of blocks of all sequences.
    """
    blocks = _as_blocks(jacobian)
    steps, count, size = blocks.shape[:3]
    probes = min(PROBES, size)
    directions = jax.random.normal(jax.random.key(0), (size, probes), blocks.dtype)
    directions = jnp.linalg.qr(directions)[0]
    largest = jnp.asarray(1e30, blocks.dtype)

    def sizes_of(products: Array) -> Array:
        # In two steps: the squares may overflow.
        most = jnp.max(jnp.abs(products), (-2, -1), keepdims=True)
        most = jnp.where(most > 0, most, 1)
        return most[..., 0, 0] * jnp.sqrt(jnp.sum((products / most) ** 2, (-2, -1)) / probes)

    def step(state: Any, now: Any) -> Any:
        (products, oldest, log), (t, j) = state, now
        products = jnp.clip(jnp.einsum("mab,wmbp->wmap", j, products), -largest, largest)
        products = products.at[t].set(jnp.broadcast_to(directions, (count, size, probes)))
        # The product of all steps, which may be larger or smaller than any number, has a scale of its own.
        oldest = jnp.where(t > 0, j @ oldest, oldest)
        scale = sizes_of(oldest)
        oldest = oldest / jnp.where(scale > 0, scale, 1)[..., None, None]
        return (products, oldest, log + jnp.log(scale)), jnp.sum(sizes_of(products), 0)

    oldest = jnp.broadcast_to(directions, (count, size, probes))
    start = (jnp.zeros((steps, count, size, probes), blocks.dtype), oldest, jnp.zeros(count, blocks.dtype))
    (_, _, log), sums = jax.lax.scan(step, start, (jnp.arange(steps), blocks))
    return sums, log


def _as_blocks(jacobian: Any) -> Array:
    """(W, M, m, m)."""
    if isinstance(jacobian, tuple):
        jacobian = jnp.stack([jnp.stack(row, -1) for row in jacobian], -2)
    return jacobian.reshape(jacobian.shape[0], -1, *jacobian.shape[-2:])
