"""What the tests of rnncore.nnx share: cells with noise in them, and how a layer and its namesake compare."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx as theirs
from linen_cases import LENGTHS, OPTIONS, B, D, H, T, close, f32, f64, normal, projected, same_bits, start

from rnncore import nnx as ours

__all__ = [
    "LENGTHS", "OPTIONS", "B", "D", "H", "T", "close", "f32", "f64", "normal", "projected", "same_bits", "start"
]  # fmt: skip

CELLS = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell")
NEW = {"MGUCell": {}, "IndRNNCell": {}, "GRUCell": dict(recurrent_bias=True)}
bf16, f16 = jnp.bfloat16, jnp.float16


def make(nn: Any, name: str, seed: int = 0, size: int = D, **options: Any) -> Any:
    """A cell of a library; `dtype` is None also for the SimpleCell, so that float64 stays what it is."""
    return getattr(nn, name)(size, H, rngs=theirs.Rngs(seed), **({"dtype": None} | options))


def both(name: str, **options: Any) -> tuple[Any, Any]:
    """The cell of either library, with the same noise in all parameters, biases too."""
    mine, flaxen = (make(nn, name, **options) for nn in (ours, theirs))
    return noisy(mine), noisy(flaxen)


def noisy(layer: Any) -> Any:
    """The layer with noise in all of its parameters, the same for equal trees."""
    params = theirs.state(layer, theirs.Param)
    leaves, tree = jax.tree.flatten(params)
    theirs.update(layer, tree.unflatten([0.6 * normal(i, a.shape, a.dtype) for i, a in enumerate(leaves)]))
    return layer


def pure(state: Any) -> Any:
    """A state as nested dictionaries of arrays."""
    return theirs.to_pure_dict(state)


def with_gradients(layer: Any, *args: Any, **options: Any) -> Any:
    """What a layer returns for `args`, and the gradients to its parameters and to `args`."""
    graph, params, rest = theirs.split(layer, theirs.Param, ...)

    def loss(params: Any, *args: Any) -> Any:
        out = theirs.merge(graph, params, rest)(*args, **options)
        return projected(out), out

    gradients, out = jax.grad(loss, argnums=tuple(range(1 + len(args))), has_aux=True)(params, *args)
    return out, (pure(gradients[0]), *gradients[1:])


class Layer(theirs.Module):
    """An RNN whose initial carry is a positional argument."""

    def __init__(self, rnn: Any):
        self.rnn = rnn

    def __call__(self, xs: Any, carry: Any, **options: Any) -> Any:
        return self.rnn(xs, initial_carry=carry, **options)


def compare(mine: Any, flaxen: Any, *args: Any, atol: float = 1e-12, **options: Any) -> None:
    """Values and gradients of two layers, compiled as one program."""
    run = jax.jit(lambda *args: tuple(with_gradients(layer, *args, **options) for layer in (mine, flaxen)))
    close(*run(*args), atol)


def check_call(name: str, dtype: Any, atol: float, batch: tuple[int, ...], options: Any, **fields: Any) -> None:
    """The layer over a cell against Flax's over its own, at the same parameters."""
    mine, flaxen = both(name, param_dtype=dtype, **fields)
    shape = (T, *batch, D) if options.get("time_major") else (*batch, T, D)
    mine, flaxen = ours.RNN(mine, return_carry=True), theirs.RNN(flaxen, return_carry=True, rngs=False)
    xs, carry = normal(1, shape, dtype), start(name, batch, dtype)
    compare(Layer(mine), Layer(flaxen), xs, carry, atol=atol, **options)
