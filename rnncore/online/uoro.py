"""Unbiased online recurrent optimisation: the influence as one random outer product."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.cells.base import CellParams
from rnncore.online.rule import Memory, Rule

TINY = 1e-7


@dataclasses.dataclass(frozen=True)
class UORO(Rule):
    """Unbiased online recurrent optimisation: an estimate of rank one whose expectation is the exact gradient.

    s~_t = rho_0 J_t s~_{t-1} + rho_1 nu_t,   theta~_t = theta~_{t-1} / rho_0 + (nu_t d s_t / d params) / rho_1
    d L_t / d params ~ (d L_t / d s_t . s~_t) theta~_t,   nu_t random signs

    rho_0 and rho_1 balance the norms of both factors, which makes the variance small.  Every sequence has its own
    signs and factors.

    Args:
      cell: any `PointwiseCell`, over any recurrence.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import online
      >>> cell = rnncore.LSTM(4)
      >>> rule, params = online.UORO(cell), cell.init(jax.random.key(0), 3)
      >>> memory = rule.init(params, cell.initial_carry((2,)))
      >>> memory, y = rule.step(params, memory, jnp.ones((2, 3)), key=jax.random.key(1))
      >>> rule.gradient(params, memory, jnp.ones_like(y)).bias.shape
      (4, 4)

    Source: Tallec and Ollivier (2017), arXiv:1702.05043.
    """

    needs_key: ClassVar[bool] = True

    def _start(self, params: CellParams, carry: Any) -> tuple[Any, CellParams]:
        batch = carry.h.shape[:-1]
        return jax.tree.map(jnp.zeros_like, carry), jax.tree.map(
            lambda p: jnp.zeros((*batch, *p.shape), p.dtype), params
        )

    def _advance(self, params: CellParams, carry: Any, influence: Any, x: Array, key: Any) -> tuple[Any, Any]:
        keys = jax.random.split(key, len(carry))
        pairs = zip(keys, carry, strict=True)
        signs = type(carry)(*(jax.random.rademacher(k, c.shape, c.dtype) for k, c in pairs))

        def one(carry: Any, state: Any, theta: Any, x: Array, signs: Any) -> tuple[Any, Any]:
            def step(params: CellParams, carry: Any) -> Any:
                new, _ = self.cell.update(params, carry, self.cell.project(params, x))
                return jax.tree.map(lambda a, b: a.astype(b.dtype), new, carry)

            new, moved = jax.jvp(lambda c: step(params, c), (carry,), (state,))
            _, pull = jax.vjp(lambda p: step(p, carry), params)
            (added,) = pull(signs)
            rho_0 = jnp.sqrt(norm(theta) / (norm(moved) + TINY)) + TINY
            rho_1 = jnp.sqrt(norm(added) / (norm(signs) + TINY)) + TINY
            state = jax.tree.map(lambda m, n: rho_0 * m + rho_1 * n, moved, signs)
            return new, (state, jax.tree.map(lambda t, a: t / rho_0 + a / rho_1, theta, added))

        mapped: Any = one
        for _ in x.shape[:-1]:
            mapped = jax.vmap(mapped)
        return mapped(carry, *influence, x, signs)

    def _gradient(self, params: CellParams, memory: Memory, cotangent: Any) -> CellParams:
        state, theta = memory.influence
        share: Any = sum(jnp.sum(d * s, -1) for d, s in zip(cotangent, state, strict=True))
        return jax.tree.map(lambda t: jnp.tensordot(share, t, share.ndim), theta)


def norm(tree: PyTree) -> Array:
    """Euclidean norm of a tree."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(tree)))
