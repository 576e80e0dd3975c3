"""Derivatives under vmap against a loop over the examples, at small odd sizes: some compilers got them wrong.

See docs/known_issues.md.  These hold with the compiler's default flags, which is what users have.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FLOAT64, assert_close
from flax import nnx as flax_nnx

import rnncore
from rnncore import analysis, linen, nnx
from rnncore.kernels import compiler

CELLS: dict[str, Callable[[int], rnncore.Cell]] = {
    "LSTM": rnncore.LSTM,
    "LSTM, all": lambda size: rnncore.LSTM(size, peepholes=True, coupled=True),
    "GRU": rnncore.GRU,
    "MGU": rnncore.MGU,
    "Elman": rnncore.Elman,
    "ResetBeforeGRU": rnncore.ResetBeforeGRU,
}
BACKENDS = ("autodiff", "scan", *(("cpp",) if compiler.find() else ()))
SIZES = [(5, 4, 2), (5, 4, 4), (7, 1, 5)]
"""(H, sequences of a batch, examples); the first two are those that were wrong."""
GRADIENTS = [(name, "autodiff", SIZES[0]) for name in CELLS]
GRADIENTS += [(name, "autodiff", size) for name in ("LSTM", "GRU") for size in SIZES[1:]]
GRADIENTS += [(name, backend, SIZES[1]) for name in ("LSTM", "GRU") for backend in BACKENDS[1:]]
"""(cell, backend, size): what the compiler does not see inside of, as the C++ loop, is mapped by rules of our own."""


def test_flags_are_those_of_users() -> None:
    given = os.environ.get("XLA_FLAGS", "").split()
    changing = ("optimization_level", "fusion_emitters", "max_isa", "prefer_vector_width", "disable_hlo_passes")
    assert not [flag for flag in given if any(word in flag for word in changing)]


def drawn(batch: int, examples: int, steps: int = 6, features: int = 3) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (examples, batch, steps, features), jnp.float64)


def assert_mapped(function: Callable[[Any], Any], xs: jax.Array, called: bool = False) -> None:
    """vmap of the function is a loop over the examples, jitted and, where asked, called."""
    looped = jax.tree.map(lambda *rows: np.stack(rows), *map(jax.jit(function), xs))
    assert_close(jax.jit(jax.vmap(function))(xs), looped, 10 * FLOAT64)
    if called:
        assert_close(jax.vmap(function)(xs), looped, 10 * FLOAT64)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "backend", "size"),
    GRADIENTS,
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_gradients(name: str, backend: str, size: tuple[int, int, int]) -> None:
    hidden, batch, examples = size
    cell = CELLS[name](hidden)
    params = cell.init(jax.random.key(0), 3, jnp.float64)

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(rnncore.unroll(cell, params, x, backend=backend)[1]))

    called = name in ("LSTM", "GRU") and backend == "autodiff" and size == SIZES[0]
    assert_mapped(lambda x: jax.grad(loss, (0, 1))(params, x), drawn(batch, examples), called)


@pytest.mark.sample(1)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_other_derivatives(name: str, backend: str) -> None:
    """Forward mode, and forward over reverse."""
    cell = CELLS[name](5)
    params = cell.init(jax.random.key(0), 3, jnp.float64)

    def run(x: Any) -> Any:
        return rnncore.unroll(cell, params, x, backend=backend)[1]

    def both(x: Any) -> Any:
        second = jax.jvp(jax.grad(lambda x: jnp.sum(jnp.sin(run(x)))), (x,), (x,))[1]
        return jax.jvp(run, (x,), (x,))[1], second

    assert_mapped(both, drawn(4, 2))


@pytest.mark.ci
@pytest.mark.parametrize("make", [
    lambda: linen.RNN(linen.OptimizedLSTMCell(5, param_dtype=jnp.float64)),
    lambda: linen.RNN(linen.GRUCell(5, param_dtype=jnp.float64)),
    lambda: linen.LSTM(5, num_layers=2, bidirectional=True, param_dtype=jnp.float64),
])  # fmt: skip
@pytest.mark.sample(1)
def test_linen(make: Callable[[], Any]) -> None:
    layer, xs = make(), drawn(4, 2)
    variables = layer.init(jax.random.key(0), xs[0])
    loss = jax.grad(lambda variables, x: jnp.sum(jnp.sin(layer.apply(variables, x))), (0, 1))
    assert_mapped(lambda x: loss(variables, x), xs)


def test_nnx() -> None:
    layer, xs = nnx.RNN(nnx.LSTMCell(3, 5, param_dtype=jnp.float64, rngs=flax_nnx.Rngs(0))), drawn(4, 2)
    graph, state = flax_nnx.split(layer)
    loss = jax.grad(lambda state, x: jnp.sum(jnp.sin(flax_nnx.merge(graph, state)(x))), (0, 1))
    assert_mapped(lambda x: loss(state, x), xs)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_jacobians_of_the_analysis(name: str) -> None:
    cell = CELLS[name](5)
    params = cell.init(jax.random.key(0), 3, jnp.float64)

    def jacobians(x: Any) -> Any:
        return analysis.step_jacobians(analysis.trajectory(cell, params, x))

    assert_mapped(jacobians, drawn(4, 2))
