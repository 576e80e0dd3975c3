"""The largest singular value of linear maps given as functions, by restarted Lanczos iteration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.analysis.jacobians.products import renormalise

Gram = Callable[[Array], tuple[Array, Array]]
"""Vectors (N, n) to (A^T A times each of them (N, n), the powers of two (N,) that were taken out)."""
BASIS = 24
ROUNDS = 50


def top_right_vectors(gram: Gram, count: int, size: int, dtype: Any) -> tuple[Array, Array]:
    """The unit vectors that N maps A stretch most.

    Every round builds an orthonormal basis of the Krylov space v, S v, S^2 v ... of S = A^T A, diagonalises S
    within it and restarts from the best vector, until ||S v - theta v|| is below theta times a third of
    the square root of the machine epsilon.  The error of ||A v|| is of second order in that.

    Args:
      gram: the N maps.
      count: N.
      size: n.
      dtype: of the vectors.

    Returns:
      (vectors (N, n), relative residuals (N,)); any vector and 0 for a map that is zero.
    """
    basis_size = min(size, BASIS)
    tolerance = math.sqrt(jnp.finfo(dtype).eps) / 3
    start = jax.random.normal(jax.random.key(0), (size,), dtype)
    start = jnp.broadcast_to(start / jnp.linalg.norm(start), (count, size))
    # S may lie outside the range of floating point: everything is in units of its image of the first vector.
    _, unit = renormalise(*_as_rows(gram(start)))

    def scaled(v: Array) -> Array:
        product, exponent = gram(v)
        return product * jnp.exp2((exponent - unit).astype(dtype))[:, None]

    def one_round(state: Any) -> Any:
        v, _, rounds = state
        zeros = jnp.zeros((count, basis_size), dtype)

        def extend(j: Array, state: Any) -> Any:
            basis, v, diagonal, beside = state
            basis = basis.at[:, j].set(v)
            w = scaled(v)
            diagonal = diagonal.at[:, j].set(jnp.sum(v * w, -1))
            size_before = jnp.linalg.norm(w, axis=-1)
            for _ in range(2):  # once leaves what cancellation brought back
                w = w - jnp.einsum("nk,nki->ni", jnp.einsum("nki,ni->nk", basis, w), basis)
            length = jnp.linalg.norm(w, axis=-1)
            # Nothing but rounding is left: the space is complete, and zeros add nothing to it.
            length = jnp.where(length > 4 * jnp.finfo(dtype).eps * size_before, length, 0)
            v = jnp.where(length[:, None] > 0, w / jnp.where(length > 0, length, 1)[:, None], 0)
            return basis, v, diagonal, beside.at[:, j].set(length)

        blank = jnp.zeros((count, basis_size, size), dtype)
        basis, _, diagonal, beside = jax.lax.fori_loop(0, basis_size, extend, (blank, v, zeros, zeros))
        inner = jax.vmap(jnp.diag)(diagonal) + jax.vmap(lambda b: jnp.diag(b, 1) + jnp.diag(b, -1))(beside[:, :-1])
        values, vectors = jnp.linalg.eigh(inner)
        best, value = vectors[:, :, -1], values[:, -1]
        found = jnp.einsum("nk,nki->ni", best, basis)
        length = jnp.linalg.norm(found, axis=-1, keepdims=True)
        residual = jnp.abs(beside[:, -1] * best[:, -1])
        relative = jnp.where(value > 0, residual / jnp.where(value > 0, value, 1), 0)
        # A zero map has no best vector, and may be answered by one outside the basis.
        found = jnp.where(length > 0.5, found / jnp.where(length > 0.5, length, 1), start)
        return found, relative, rounds + 1

    def unfinished(state: Any) -> Array:
        _, relative, rounds = state
        return jnp.any(relative > tolerance) & (rounds < ROUNDS)

    first = one_round((start, jnp.zeros((count,), dtype), 0))
    found, relative, _ = jax.lax.while_loop(unfinished, one_round, first)
    return found, relative


def _as_rows(scaled: tuple[Array, Array]) -> tuple[Array, Array]:
    vectors, exponent = scaled
    return vectors[:, None, :], exponent
