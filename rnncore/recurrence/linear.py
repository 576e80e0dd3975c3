"""Linear recurrences over a whole sequence at once: u_t = A_t u_{t-1} + b_t with u_0 = 0, in about log2(T) rounds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Array


def by_blocks(a: Array, b: Array) -> Array:
    """u (T, ..., m) for blocks a (T, ..., m, m) and b (T, ..., m)."""

    def compose(first: Any, second: Any) -> Any:
        (a, b), (c, d) = first, second
        return c @ a, (c @ b[..., None])[..., 0] + d

    return jax.lax.associative_scan(compose, (a, b))[1]


def dot(row: Any, column: Any) -> Array:
    """The sum of the products of two rows of arrays."""
    return sum((x * y for x, y in zip(row[1:], column[1:], strict=True)), row[0] * column[0])


def by_units(a: Any, b: Any) -> Any:
    """The same unit by unit: a is a tuple of F tuples of F arrays (T, ...), b one of F arrays; F is 1 or 2.

    Written out over the F fields: a product of matrices as small as these is slower than its sums.
    """
    fields = range(len(b))

    def compose(first: Any, second: Any) -> Any:
        (a, b), (c, d) = first, second
        product = tuple(tuple(dot(c[n], [a[k][m] for k in fields]) for m in fields) for n in fields)
        return product, tuple(dot(c[n], b) + d[n] for n in fields)

    return jax.lax.associative_scan(compose, (a, b))[1]


def in_order(advance: Any, b: Any) -> Any:
    """The same step by step, where A_t u is advance(data_t, u); `b` is a pair of trees (T, ...), the data and b."""

    def step(u: Any, now: Any) -> Any:
        data, added = now
        u = jax.tree.map(jnp.add, advance(data, u), added)
        return u, u

    start = jax.tree.map(lambda a: jnp.zeros_like(a[0]), b[1])
    return jax.lax.scan(step, start, b)[1]
