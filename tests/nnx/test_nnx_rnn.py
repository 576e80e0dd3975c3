"""RNN of rnncore.nnx: values and gradients held to flax.nnx."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as theirs
from nnx_cases import (
    CELLS,
    LENGTHS,
    OPTIONS,
    B,
    D,
    Layer,
    T,
    bf16,
    both,
    check_call,
    close,
    f32,
    f64,
    make,
    noisy,
    normal,
    pure,
    same_bits,
    start,
    with_gradients,
)

from rnncore import nnx as ours

GRADIENTS = [
    ("OptimizedLSTMCell", "lengths, reverse"),
    ("LSTMCell", "all"),
    ("GRUCell", "all"),
    ("SimpleCell", "plain"),
]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name,options", GRADIENTS)
def test_values_and_gradients(name: str, options: str, unrolled: list) -> None:
    check_call(name, f64, 1e-12, (3,), OPTIONS[options])
    assert len(unrolled) == 1


def test_values_with_every_option(unrolled: list) -> None:
    name = "OptimizedLSTMCell"
    mine, flaxen = both(name, param_dtype=f64)
    xs, carry = normal(1, (3, T, D)), start(name, (3,))

    def run(layer: Any) -> Any:
        layer = theirs.clone(layer)
        turned = {False: xs, True: jnp.swapaxes(xs, 0, 1)}
        return [layer(turned["time_major" in o], initial_carry=carry, **o) for o in OPTIONS.values()]

    layers = ours.RNN(mine, return_carry=True), theirs.RNN(flaxen, return_carry=True, rngs=False)
    close(*jax.jit(lambda: tuple(map(run, layers)))())
    assert len(unrolled) == len(OPTIONS)


def test_single_precision_other_functions_and_mixtures_of_the_libraries(unrolled: list) -> None:
    """Values of every cell: in float32, with other functions, Flax's cells in our RNN, ours in Flax's."""
    xs = normal(1, (B, T, D), f32)
    pairs = [both(name) for name in CELLS]
    for name in CELLS:
        options = dict(residual=True) if name == "SimpleCell" else dict(gate_fn=jax.nn.hard_sigmoid)
        pairs.append(both(name, activation_fn=jax.nn.gelu, **options))

    @jax.jit
    def run() -> Any:
        want = [theirs.RNN(theirs.clone(flaxen))(xs) for _, flaxen in pairs]
        return want, [
            [ours.RNN(mine)(xs) for mine, _ in pairs],
            [ours.RNN(flaxen)(xs) for _, flaxen in pairs],
            [theirs.RNN(theirs.clone(mine))(xs) for mine, _ in pairs],
        ]

    want, others = run()
    for got in others:
        close(got, want, 2e-6)
    assert len(unrolled) == 2 * len(pairs)


def test_any_number_of_batch_axes(unrolled: list) -> None:
    mine, flaxen = (nn.RNN(cell, time_major=True) for nn, cell in zip((ours, theirs), both("GRUCell"), strict=True))
    inputs = [normal(1, (T, *batch, D), f32) for batch in ((), (2,), (2, 3))]
    run = jax.jit(lambda: [[theirs.clone(layer)(xs, reverse=True) for xs in inputs] for layer in (mine, flaxen)])
    close(*run(), 1e-6)
    assert len(unrolled) == len(inputs)


def test_constructor_and_call_arguments_say_the_same() -> None:
    options = dict(time_major=True, return_carry=True, reverse=True, keep_order=True)
    xs, lengths = normal(1, (T, B, D), f32), jnp.array([2, T])
    mine, flaxen = both("GRUCell")
    by_field, by_call = ours.RNN(mine, **options), ours.RNN(mine)
    got = by_field(xs, seq_lengths=lengths)
    same_bits(got, by_call(xs, seq_lengths=lengths, **options))
    close(got, theirs.RNN(flaxen, **options)(xs, seq_lengths=lengths), 1e-6)
    off = by_field(xs, **dict.fromkeys(options, False))
    same_bits(off, by_call(xs))
    assert isinstance(off, jax.Array)


def same_streams(mine: Any, flaxen: Any) -> None:
    states = [pure(theirs.state(layer, theirs.RngState)) for layer in (mine, flaxen)]
    assert sorted(states[0]["rngs"]) == ["count", "key"]
    same_bits(*(jax.tree.map(lambda a: jax.random.key_data(a) if a.dtype != jnp.uint32 else a, s) for s in states))


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_random_initial_carries_are_those_of_flax(name: str) -> None:
    """With the default stream, which moves on with every call, and with each kind of `rngs`."""
    xs = normal(1, (B, T, D), f32)
    with pytest.warns(UserWarning, match="carry_init is provided"):
        cells = both(name, carry_init=theirs.initializers.normal(1.0))
    mine, flaxen = ours.RNN(cells[0]), theirs.RNN(cells[1])
    same_streams(mine, flaxen)
    outputs = [(mine(xs), flaxen(xs)) for _ in range(2)]
    outputs += [tuple(layer(xs, rngs=theirs.Rngs(8)) for layer in (mine, flaxen))]
    outputs += [tuple(layer(xs, rngs=theirs.Rngs(carry=3).carry) for layer in (mine, flaxen))]
    for got, want in outputs:
        close(got, want, 1e-6)
    firsts = jnp.stack([got for got, _ in outputs])
    assert all(jnp.abs(firsts[i] - firsts[j]).max() > 1e-2 for i in range(4) for j in range(i))
    mine, flaxen = (nn.RNN(cell, rngs=theirs.Rngs(5)) for nn, cell in zip((ours, theirs), cells, strict=True))
    close(mine(xs), flaxen(xs), 1e-6)
    same_streams(mine, flaxen)


def test_bfloat16() -> None:
    """dtypes exactly as in Flax; values to the rounding of sums whose order differs."""
    name = "GRUCell"
    xs, carry = normal(1, (B, T, D), f32), start(name, dtype=f32)
    mine, flaxen = both(name, dtype=bf16)
    layers = Layer(ours.RNN(mine, return_carry=True)), Layer(theirs.RNN(flaxen, return_carry=True, rngs=False))
    run = jax.jit(lambda *args: [with_gradients(layer, *args) for layer in layers])
    (got, got_gradients), (want, gradients) = run(xs, carry)
    close(got, want, 4 * 2.0**-8)
    for a, b in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(gradients), strict=True):
        assert a.dtype == b.dtype
        assert jnp.linalg.norm(a - b) < 0.03 * jnp.linalg.norm(b)


def test_integer_inputs_as_in_flax() -> None:
    xs = jax.nn.one_hot(jnp.array([[0, 2, 1], [1, 1, 0]]), D, dtype=jnp.int32)
    mine, flaxen = both("GRUCell")
    close(ours.RNN(mine)(xs), theirs.RNN(flaxen)(xs), 1e-6)


# ------------------------------------------------------------------------------------ Bidirectional


def bidirectional_of(nn: Any, cells: Any, **options: Any) -> Any:
    return nn.Bidirectional(*(nn.RNN(cell) for cell in cells), rngs=nn is ours, **options)


def test_bidirectional(unrolled: list) -> None:
    name, kwargs = "LSTMCell", dict(seq_lengths=LENGTHS, time_major=True)
    xs = normal(1, (T, 3, D))
    carry = start(name, (3,)), jax.tree.map(jnp.sin, start(name, (3,)))
    pairs = zip(both(name, param_dtype=f64), both(name, param_dtype=f64, seed=1), strict=True)
    layers = [bidirectional_of(nn, cells, return_carry=True) for nn, cells in zip((ours, theirs), pairs, strict=True)]
    layers = [noisy(layer) for layer in layers]
    run = jax.jit(lambda *args: [with_gradients(Layer(theirs.clone(layer)), *args, **kwargs) for layer in layers])
    (got, got_gradients), (want, gradients) = run(xs, carry)
    close(got, want)
    close(got_gradients, gradients)
    assert len(unrolled) == 2


def test_bidirectional_with_children_of_either_library_and_another_merge() -> None:
    xs = normal(1, (B, T, D), f32)

    def layer(nn: Any, forward: Any, backward: Any) -> Any:
        children = [
            child.RNN(make(child, "GRUCell", seed, carry_init=theirs.initializers.normal(1.0)))
            for seed, child in enumerate((forward, backward))
        ]
        return nn.Bidirectional(*children, merge_fn=jnp.multiply)

    with pytest.warns(UserWarning, match="carry_init is provided"):
        flaxen = layer(theirs, theirs, theirs)
        others = [layer(*libraries) for libraries in ((ours, ours, theirs), (ours, theirs, ours), (theirs, ours, ours))]
    want, given = flaxen(xs), flaxen(xs, rngs=theirs.Rngs(6))
    for other in others:
        close(other(xs), want, 1e-6)
        close(other(xs, rngs=theirs.Rngs(6)), given, 1e-6)
    streams = [theirs.RngStream(7, tag="carry") for _ in range(2)]
    shared = [
        nn.Bidirectional(other.forward_rnn, other.backward_rnn, merge_fn=jnp.multiply, rngs=stream)
        for nn, stream in zip((ours, theirs), streams, strict=True)
    ]
    close(*(layer(xs) for layer in shared), 1e-6)
    assert [int(stream.count[...]) for stream in streams] == [2, 2]
