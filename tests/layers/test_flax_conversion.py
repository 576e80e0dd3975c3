"""A trained cell from flax.linen to flax.nnx and back, held to what both compute themselves."""

from __future__ import annotations

from typing import Any

import flax.linen as their_linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as their_nnx
from nnx_cases import D, H, T, f64, noisy, normal

import rnncore
from rnncore import linen, nnx

PAIRS = [
    (their_linen, their_nnx, "LSTMCell", {}), (their_linen, their_nnx, "OptimizedLSTMCell", {}),
    (their_linen, their_nnx, "SimpleCell", {}), (linen, nnx, "LSTMCell", {}), (linen, nnx, "OptimizedLSTMCell", {}),
    (linen, nnx, "SimpleCell", {}), (linen, nnx, "MGUCell", {}), (linen, nnx, "GRUCell", {"recurrent_bias": True}),
    (their_linen, nnx, "GRUCell", {"recurrent_bias": True}), (their_linen, nnx, "MGUCell", {}),
]  # fmt: skip
IDS = [f"{a.__name__}-{b.__name__}-{name}" for a, b, name, _ in PAIRS]


def pair(old: Any, new: Any, name: str, options: Any) -> tuple[Any, Any, Any]:
    """A linen cell, noise for its parameters, and an nnx cell with other noise."""
    cell = getattr(old, name)(H)
    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), begin(name), jnp.ones(D, f64)))["params"]
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.6, a.shape)), shapes)
    other = noisy(getattr(new, name)(D, H, rngs=their_nnx.Rngs(3), dtype=None, param_dtype=f64, **options))
    return cell, weights, other


def begin(name: str) -> Any:
    return (jnp.zeros(H), jnp.zeros(H)) if "LSTM" in name else jnp.zeros(H)


def outputs(step: Any, name: str) -> Any:
    carry, ys = begin(name), []
    for x in normal(5, (T, D), f64):
        carry, y = step(carry, x)
        ys.append(y)
    return jnp.stack(ys)


@pytest.mark.sample(6)
@pytest.mark.parametrize(("old", "new", "name", "options"), PAIRS, ids=IDS)
def test_from_linen_to_nnx_and_back(old: Any, new: Any, name: str, options: Any):
    cell, weights, other = pair(old, new, name, options)
    want = outputs(lambda c, x: cell.apply({"params": weights}, c, x), name)
    assert nnx.from_functional(other, linen.functional(cell, weights)[1]) is other
    np.testing.assert_allclose(outputs(other, name), want, atol=1e-12)
    back = linen.from_functional(cell, nnx.functional(other)[1])
    assert jax.tree.structure(back) == jax.tree.structure(weights)
    jax.tree.map(np.testing.assert_array_equal, back, weights)


@pytest.mark.parametrize(("old", "new", "name", "options"), PAIRS, ids=IDS)
def test_from_nnx_to_linen(old: Any, new: Any, name: str, options: Any):
    cell, _, other = pair(old, new, name, options)
    weights = linen.from_functional(cell, nnx.functional(other)[1])
    got = outputs(lambda c, x: cell.apply({"params": weights}, c, x), name)
    np.testing.assert_allclose(got, outputs(other, name), atol=1e-12)


def test_indrnn_there_and_back():
    cell = noisy(nnx.IndRNNCell(D, H, rngs=their_nnx.Rngs(0), param_dtype=f64, dtype=None))
    params = nnx.functional(cell)[1]
    empty = nnx.from_functional(nnx.IndRNNCell(D, H, rngs=their_nnx.Rngs(1), param_dtype=f64, dtype=None), params)
    jax.tree.map(np.testing.assert_array_equal, nnx.functional(empty)[1], params)


def test_what_does_not_fit_is_refused():
    gru = rnncore.GRU(H).init(jax.random.key(0), D)
    with pytest.raises(NotImplementedError, match="b_hn, and the cell has none"):
        nnx.from_functional(their_nnx.GRUCell(D, H, rngs=their_nnx.Rngs(0)), gru)
    with pytest.raises(ValueError, match="expected .* the 4 gates"):
        linen.from_functional(linen.LSTMCell(H), gru)
    with pytest.raises(ValueError, match="input_kernel has shape"):
        nnx.from_functional(nnx.LSTMCell(D, H, rngs=their_nnx.Rngs(0)), gru._replace(recurrent_bias=None))
    with pytest.raises(NotImplementedError, match="expected exactly"):
        linen.from_functional(linen.RNN(linen.LSTMCell(H)), gru)
    with pytest.raises(NotImplementedError, match="RNN is not exactly one of the pointwise cells"):
        nnx.from_functional(nnx.RNN(nnx.LSTMCell(D, H, rngs=their_nnx.Rngs(0))), gru)


def test_biases_that_are_none_become_zeros():
    params = rnncore.LSTM(H).init(jax.random.key(0), D)._replace(bias=None)
    weights = linen.from_functional(linen.LSTMCell(H), params)
    assert not any(jnp.any(weights[n]["bias"]) for n in ("hi", "hf", "hg", "ho"))
    cell = nnx.from_functional(noisy(nnx.LSTMCell(D, H, rngs=their_nnx.Rngs(0))), params)
    assert not jnp.any(nnx.functional(cell)[1].bias)
