"""What the tests of rnncore.linen share: variables, options, and how a layer and its namesake are compared."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as theirs
import jax
import jax.numpy as jnp
import numpy as np

from rnncore import linen as ours

B, T, D, H = 2, 5, 3, 4
CELLS = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "MGUCell", "SimpleCell")
f32, f64 = jnp.float32, jnp.float64


@functools.cache
def foreign(name: str) -> Any:
    """A cell that computes what Flax's does, of a class that nothing is known of: it runs under nn.scan."""
    return type(name, (getattr(theirs, name),), {})


def normal(seed: int, shape: tuple[int, ...], dtype: Any = f64) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def some_variables(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Variables of the layer with noise in all of them, biases too; costs no compilation."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: layer.init(jax.random.key(0), *args, **kwargs)))
    return tree.unflatten([0.6 * normal(i, a.shape, a.dtype) for i, a in enumerate(leaves)])


def same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def close(a: Any, b: Any, atol: float = 1e-12) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=0, atol=atol)


def projected(out: Any) -> jax.Array:
    """A random projection of all that came out."""
    return sum(jnp.vdot(normal(70 + i, a.shape, a.dtype), a) for i, a in enumerate(jax.tree.leaves(out)))  # type: ignore


def with_gradients(
    layer: Any, variables: Any, xs: jax.Array, carry: Any = None, seq_lengths: Any = None, **options: Any
) -> Any:
    """What the layer returns, and the gradients to parameters, inputs and initial carry."""

    @jax.jit
    def run(variables: Any, xs: jax.Array, carry: Any, seq_lengths: Any) -> Any:
        def loss(variables: Any, xs: jax.Array, carry: Any) -> Any:
            out = layer.apply(variables, xs, initial_carry=carry, seq_lengths=seq_lengths, **options)
            return projected(out), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(variables, xs, carry)
        return out, gradients

    return run(variables, xs, carry, seq_lengths)


def start(name: str, batch: tuple[int, ...] = (B,), dtype: Any = f64) -> Any:
    arrays = normal(21, (*batch, H), dtype), normal(22, (*batch, H), dtype)
    return arrays if "LSTM" in name else arrays[0]


LENGTHS = jnp.array([1, 3, T])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "time major": dict(time_major=True),
    "reverse": dict(reverse=True),
    "reverse, keep order": dict(reverse=True, keep_order=True),
    "keep order": dict(keep_order=True),
    "lengths": dict(seq_lengths=LENGTHS),
    "lengths, reverse": dict(seq_lengths=LENGTHS, reverse=True),
    "lengths, reverse, keep order": dict(seq_lengths=LENGTHS, reverse=True, keep_order=True),
    "all": dict(seq_lengths=LENGTHS, reverse=True, keep_order=True, time_major=True),
    "full lengths": dict(seq_lengths=jnp.full(3, T)),
}


def check_call(name: str, dtype: Any, atol: float, batch: tuple[int, ...], options: Any, **fields: Any) -> None:
    fields["param_dtype"] = dtype
    mine, flaxen = (nn.RNN(getattr(nn, name)(H, **fields), return_carry=True) for nn in (ours, theirs))
    shape = (T, *batch, D) if options.get("time_major") else (*batch, T, D)
    xs, carry = normal(1, shape, dtype), start(name, batch, dtype)
    variables = some_variables(flaxen, xs)
    close(
        with_gradients(mine, variables, xs, carry, **options),
        with_gradients(flaxen, variables, xs, carry, **options),
        atol,
    )
