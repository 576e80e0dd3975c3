"""Pickle and copy: workers, joblib and Ray hand cells, layers, parameters and results to other processes."""

import copy
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, FastSlow, assert_close, draw
from flax import nnx as flax_nnx

import rnncore
from rnncore import analysis, initializers, linen, nnx

D, H = 3, 4
XS = jax.random.normal(jax.random.key(0), (2, 20, D))


def rngs() -> flax_nnx.Rngs:
    return flax_nnx.Rngs(0)


LINEN: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: linen.RNN(getattr(linen, name)(H)) for name in (
        "LSTMCell", "OptimizedLSTMCell", "GRUCell", "MGUCell", "SimpleCell",
    )},
    "Bidirectional": lambda: linen.Bidirectional(linen.RNN(linen.LSTMCell(H)), linen.RNN(linen.GRUCell(H))),
    **{name: lambda name=name: getattr(linen, name)(H, num_layers=2, learned_carry=True) for name in (
        "LSTM", "GRU", "Elman",
    )},
}  # fmt: skip
NNX: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: nnx.RNN(getattr(nnx, name)(D, H, rngs=rngs())) for name in (
        "LSTMCell", "OptimizedLSTMCell", "GRUCell", "MGUCell", "SimpleCell", "IndRNNCell",
    )},
    "per gate": lambda: nnx.RNN(nnx.GRUCell(D, H, per_gate_init=True, rngs=rngs())),
    "Bidirectional": lambda: nnx.Bidirectional(
        nnx.RNN(nnx.LSTMCell(D, H, rngs=rngs())), nnx.RNN(nnx.GRUCell(D, H, rngs=rngs())), rngs=rngs()
    ),
    **{name: lambda name=name: getattr(nnx, name)(D, H, num_layers=2, rngs=rngs()) for name in (
        "LSTM", "GRU", "Elman",
    )},
}  # fmt: skip
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)), "copy": copy.copy, "deepcopy": copy.deepcopy,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cells_and_parameters(case: Case) -> None:
    params = draw(case).params
    for copied in COPIES.values():
        cell, again = copied(case.cell), copied(params)
        assert cell == case.cell and hash(cell) == hash(case.cell)
        assert jax.tree.structure(again) == jax.tree.structure(params)
        assert_close(again, params, 0)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "make",
    [
        initializers.per_gate, lambda: initializers.forget_bias(2.0), lambda: initializers.chrono(30),
        initializers.uniform_gate, lambda: initializers.forget_bias(1.0, gates=["z", "f"]),
    ],
)  # fmt: skip
def test_initialisers_are_values(make: Callable[[], Any], how: str) -> None:
    cell = rnncore.LSTM(H, bias_init=make())
    again = COPIES[how](cell)
    assert again == cell == rnncore.LSTM(H, bias_init=make())
    assert hash(again) == hash(cell)


def test_stack() -> None:
    stack = rnncore.Stack(FastSlow(H), num_layers=2, bidirectional=True, dropout=0.1, learned_carry=True)
    params = stack.init(jax.random.key(0), D)
    want = rnncore.unroll_stack(stack, params, XS)
    for copied in COPIES.values():
        assert copied(stack) == stack
        assert_close(rnncore.unroll_stack(copied(stack), copied(params), XS), want, 0)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", LINEN)
def test_linen(name: str) -> None:
    layer = LINEN[name]()
    variables = layer.init(jax.random.key(1), XS)
    want = layer.apply(variables, XS)
    for copied in COPIES.values():
        again = copied(layer)
        assert again == layer
        assert_close(again.init(jax.random.key(1), XS), variables, 0)
        assert_close(again.apply(copied(variables), XS), want, 0)


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", NNX)
def test_nnx(name: str) -> None:
    layer = NNX[name]()
    want = layer(XS)
    for copied in COPIES.values():
        assert_close(copied(layer)(XS), want, 0)
        shared = copied([layer, layer])
        assert shared[0] is shared[1]


def results() -> dict[str, Any]:
    cell = rnncore.LSTM(H)
    params = cell.init(jax.random.key(0), D)
    recorded = analysis.trajectory(cell, params, XS)
    return {
        "states": rnncore.unroll(cell, params, XS, return_states=True)[2],
        "choice": rnncore.explain_backend(cell, params, XS),
        "trajectory": recorded,
        "curve": analysis.retention_curve(recorded, lags=(1, 5)),
        "exponents": analysis.lyapunov_exponents(recorded),
        "gates": analysis.gate_statistics(recorded),
        "paths": analysis.gate_paths(recorded),
        "window": analysis.effective_window(recorded),
    }


@pytest.mark.slow
def test_results() -> None:
    for (name, result), copied in itertools.product(results().items(), COPIES.values()):
        again = copied(result)
        assert type(again) is type(result), name
        assert jax.tree.structure(again) == jax.tree.structure(result), name
        chex.assert_trees_all_equal(again, result)


CHILD = """
import pickle, sys
import jax, numpy as np
import rnncore
layers, cell, params, xs, wanted, results = pickle.load(open(sys.argv[1], "rb"))
for layer, variables, ys in layers:
    np.testing.assert_allclose(layer.apply(variables, xs) if variables else layer(xs), ys, rtol=0, atol=1e-6)
got = rnncore.unroll(cell, params, xs, return_states=True)
for a, b in zip(jax.tree.leaves(got), wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
print("read", len(layers), results["curve"].mean.shape if hasattr(results["curve"], "mean") else "")
"""


@pytest.mark.slow
def test_another_process(tmp_path: Path) -> None:
    layers: list[Any] = []
    for make in LINEN.values():
        layer = make()
        variables = layer.init(jax.random.key(0), XS)
        layers.append((layer, variables, np.asarray(layer.apply(variables, XS))))
    layers += [(layer, None, np.asarray(layer(XS))) for layer in (make() for make in NNX.values())]
    cell = rnncore.LSTM(H, peepholes=True, gate_fn=jax.nn.hard_sigmoid, activation_fn=jax.nn.relu)
    params = cell.init(jax.random.key(0), D)
    wanted = [np.asarray(a) for a in jax.tree.leaves(rnncore.unroll(cell, params, XS, return_states=True))]
    file = tmp_path / "all.pickle"
    file.write_bytes(pickle.dumps((layers, cell, params, jnp.asarray(XS), wanted, results())))
    child = subprocess.run([sys.executable, "-c", CHILD, str(file)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(f"read {len(layers)}")
