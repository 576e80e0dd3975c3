"""Recurrent layers that the same lines build from Flax and from rnncore, and how far their results are apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np

import rnncore.linen
import rnncore.nnx

Shape = tuple[int, int, int, int]
"""(B, T, D, H)"""
SIDES: dict[str, dict[str, Any]] = {
    "linen": {"flax": flax.linen, "rnncore": rnncore.linen}, "nnx": {"flax": flax.nnx, "rnncore": rnncore.nnx}
}  # fmt: skip


def layer(
    api: str, side: str, cell: str, features: int, hidden: int, dtype: Any = None
) -> tuple[Callable[[Any, Any], Any], Any]:
    """((parameters, inputs) -> outputs, initial parameters) of an RNN; the dtype is Flax's default where it is None.

    Args:
      api: of SIDES.
      cell: a name, for linen also in Bidirectional(...).
    """
    nn = SIDES[api][side]
    kinds = {} if dtype is None else {"dtype": dtype, "param_dtype": dtype}
    if api == "linen":
        name = cell.removeprefix("Bidirectional(").removesuffix(")")
        make = functools.partial(getattr(nn, name), hidden, **kinds)
        made = nn.RNN(make()) if name == cell else nn.Bidirectional(nn.RNN(make()), nn.RNN(make()))
        return made.apply, made.init(jax.random.key(0), jnp.zeros((1, 1, features), dtype or jnp.float32))
    made = nn.RNN(getattr(nn, cell)(features, hidden, **kinds, rngs=nn.Rngs(0)))
    graph, params, rest = nn.split(made, nn.Param, ...)  # Flax's holds a random state besides its parameters
    return lambda params, xs: nn.merge(graph, params, rest, copy=True)(xs), params


def inputs(shape: Shape) -> jax.Array:
    """Random ones in float32."""
    return jax.random.normal(jax.random.key(1), shape[:3], jnp.float32)


def difference(results: Iterable[Any]) -> float:
    """Of two trees: the largest in any array, in terms of the largest number in that array."""
    pairs = zip(*(map(np.asarray, jax.tree.leaves(result)) for result in results), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in pairs)
