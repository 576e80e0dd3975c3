"""Weights of Keras, Haiku and Equinox: their own outputs, there and back, and what is refused."""

from __future__ import annotations

import pathlib
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

import rnncore
from rnncore import Stack

H = 4
relu = rnncore.Elman(H, activation_fn=jax.nn.relu)


def golden(library: str, kind: str) -> dict[str, np.ndarray]:
    """What tests/make_golden_layers.py wrote of one kind, by the names within it."""
    with np.load(pathlib.Path(__file__).parent.parent / "golden" / f"{library}.npz") as file:
        return {n.removeprefix(f"{kind}/"): file[n].astype(float) for n in file.files if n.startswith(f"{kind}/")}


def keras_weights(made: dict[str, np.ndarray]) -> Any:
    return [[made[f"{level}/{n}"] for n in range(6)] for level in range(2)]


def haiku_weights(made: dict[str, np.ndarray]) -> Any:
    params: dict[str, dict[str, np.ndarray]] = {}
    for name, array in made.items():
        if ":" in name:
            module, _, leaf = name.partition(":")
            params.setdefault(module, {})[leaf] = array
    return params


def equinox_weights(made: dict[str, np.ndarray]) -> Any:
    return [
        types.SimpleNamespace(**{n.partition("/")[2]: a for n, a in made.items() if n.startswith(f"{cell}/")})
        for cell in range(4)
    ]


ROWS: list[tuple[str, str, rnncore.Cell, Callable, Callable, Callable]] = [
    *(
        ("keras", kind, cell, keras_weights, rnncore.from_keras, rnncore.to_keras)
        for kind, cell in {
            "lstm": rnncore.LSTM(H), "gru": rnncore.GRU(H), "gru_reset_before": rnncore.ResetBeforeGRU(H),
            "rnn": rnncore.Elman(H),
        }.items()
    ),
    *(
        ("haiku", kind, cell, haiku_weights, rnncore.from_haiku, rnncore.to_haiku)
        for kind, cell in {"lstm": rnncore.LSTM(H), "gru": rnncore.ResetBeforeGRU(H), "rnn": relu}.items()
    ),
    *(
        ("equinox", kind, cell, equinox_weights, rnncore.from_equinox, rnncore.to_equinox)
        for kind, cell in {"lstm": rnncore.LSTM(H), "gru": rnncore.GRU(H)}.items()
    ),
]  # fmt: skip
IDS = [f"{library}-{kind}" for library, kind, *_ in ROWS]


def again(library: str, made: Any) -> Any:
    """What `to_` gives in the form that `from_` takes."""
    return [types.SimpleNamespace(**m) for m in made] if library == "equinox" else made


@pytest.mark.sample(2)
@pytest.mark.parametrize(("library", "kind", "cell", "weights", "there", "back"), ROWS, ids=IDS)
def test_outputs_are_those_of_the_library(
    library: str, kind: str, cell: Any, weights: Callable, there: Callable, back: Callable
):
    """Two bidirectional layers, as the library itself computed them: in float64, Keras in float32."""
    near = 1e-6 if library == "keras" else 1e-12
    made, stack = golden(library, kind), Stack(cell, num_layers=2, bidirectional=True)
    params = there(stack, weights(made))
    _, ys = rnncore.unroll_stack(stack, params, jnp.asarray(made["xs"]))
    np.testing.assert_allclose(ys, made["outputs"], atol=near, rtol=0)
    # And back: what the library would load computes the same.
    params = there(stack, again(library, back(stack, params)))
    _, ys = rnncore.unroll_stack(stack, params, jnp.asarray(made["xs"]))
    np.testing.assert_allclose(ys, made["outputs"], atol=near, rtol=0)


@pytest.mark.parametrize(("library", "kind", "cell", "weights", "there", "back"), ROWS, ids=IDS)
def test_there_and_back_is_the_identity(
    library: str, kind: str, cell: Any, weights: Callable, there: Callable, back: Callable
):
    """From the library's arrays, and from our parameters."""
    stack = Stack(cell, num_layers=2, bidirectional=True)
    theirs = weights(golden(library, kind))
    once = back(stack, there(stack, theirs))
    if (library, kind) not in (("haiku", "rnn"), ("keras", "gru")):  # there two biases become one sum
        want = [vars(c) for c in theirs] if library == "equinox" else theirs
        assert_close(once, want, 1e-15)
    shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), 3, jnp.float64))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.6, a.shape)), shapes)
    round_trip = there(stack, again(library, back(stack, params)))
    assert jax.tree.structure(round_trip) == jax.tree.structure(params)
    assert_close(round_trip, params, 1e-15)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("library", "there", "back"),
    [("keras", rnncore.from_keras, rnncore.to_keras), ("equinox", rnncore.from_equinox, rnncore.to_equinox)],
)
def test_layers_without_biases(library: str, there: Callable, back: Callable):
    stack = Stack(rnncore.GRU(H), num_layers=2)
    params = stack.init(jax.random.key(0), 3, jnp.float64)
    bare = params._replace(
        layers=tuple(tuple(p._replace(bias=None, recurrent_bias=None) for p in layer) for layer in params.layers)
    )
    assert_close(there(stack, again(library, back(stack, bare))), bare, 0.0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rnncore.from_haiku(Stack(rnncore.GRU(H)), {}), NotImplementedError, "resets before the product"),
        (lambda: rnncore.from_haiku(Stack(rnncore.Elman(H)), {}), NotImplementedError, "relu"),
        (lambda: rnncore.from_haiku(Stack(rnncore.LSTM(H)), {}), ValueError, r"has no \['lstm/linear'\]\['w'\]"),
        (lambda: rnncore.from_haiku(Stack(rnncore.LSTM(H)), {}, ["a", "b"]), ValueError, "expected 1 names"),
        (lambda: rnncore.to_haiku(Stack(rnncore.MGU(H)), None), NotImplementedError, "Haiku has no other"),
        (lambda: rnncore.from_keras(Stack(rnncore.MGU(H)), []), NotImplementedError, "Keras has no other"),
        (lambda: rnncore.from_keras(Stack(rnncore.LSTM(H)), []), ValueError, "expected 1 lists"),
        (
            lambda: rnncore.from_keras(Stack(rnncore.GRU(H)), [[np.ones((3, 12)), np.ones((4, 12)), np.ones(12)]]),
            NotImplementedError, "reset_after=False, which is ResetBeforeGRU",
        ),
        (
            lambda: rnncore.from_keras(Stack(rnncore.LSTM(H)), [[np.ones((3, 16)), np.ones((5, 16)), np.ones(16)]]),
            ValueError, r"recurrent kernel of layer 0 has shape \(5, 16\), expected \(4, 16\)",
        ),
        (lambda: rnncore.from_equinox(Stack(rnncore.Elman(H)), []), NotImplementedError, "Equinox has no other"),
        (lambda: rnncore.from_equinox(Stack(rnncore.LSTM(H)), []), ValueError, "expected 1, one for each"),
        (
            lambda: rnncore.to_keras(Stack(rnncore.LSTM(H, recurrence=rnncore.Heads(2))), None),
            NotImplementedError, "over Dense",
        ),
    ],
)  # fmt: skip
def test_what_has_no_like_is_refused(call: Callable, error: Any, words: str):
    with pytest.raises(error, match=words):
        call()
