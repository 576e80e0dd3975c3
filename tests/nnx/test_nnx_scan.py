"""Which nnx cells take the fast way through rnncore.unroll, and that all others come out as in Flax."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as theirs
from nnx_cases import (
    LENGTHS,
    OPTIONS,
    B,
    D,
    H,
    Layer,
    T,
    both,
    close,
    compare,
    f32,
    f64,
    make,
    noisy,
    normal,
    projected,
    same_bits,
    start,
    with_gradients,
)

from rnncore import nnx as ours


def doubled(nn: Any) -> Any:
    """A user's subclass with another step."""

    class Doubled(nn.GRUCell):
        def __call__(self, carry: Any, inputs: Any) -> Any:
            return super().__call__(carry, 2 * inputs)

    return Doubled(D, H, param_dtype=f64, rngs=theirs.Rngs(0))


def with_lora(nn: Any) -> Any:
    cell = make(nn, "GRUCell", param_dtype=f64)
    cell.dense_i = theirs.LoRALinear(D, 3 * H, lora_rank=2, param_dtype=f64, rngs=theirs.Rngs(0))
    return cell


class SoftSlope(theirs.Module):
    """An activation with a parameter."""

    def __init__(self) -> None:
        self.slope = theirs.Param(jnp.ones((), f64))

    def __call__(self, x: Any) -> Any:
        return jnp.tanh(x * self.slope[...])


SCANNED = {
    "subclass": doubled,
    "LoRA": with_lora,
    "not elementwise": lambda nn: make(nn, "GRUCell", gate_fn=jax.nn.softmax, param_dtype=f64),
    "module": lambda nn: make(nn, "SimpleCell", activation_fn=SoftSlope(), param_dtype=f64),
}


def pair(kind: str) -> list:
    cells = [noisy(SCANNED[kind](nn)) for nn in (ours, theirs)]
    return [Layer(nn.RNN(cell, return_carry=True, rngs=False)) for nn, cell in zip((ours, theirs), cells, strict=True)]


def test_what_is_not_exactly_known_goes_through_nnx_scan(unrolled: list) -> None:
    xs, carry, pairs = normal(1, (3, T, D)), start("GRUCell", (3,)), [pair(kind) for kind in SCANNED]

    @jax.jit
    def run() -> Any:
        options = OPTIONS["lengths, reverse, keep order"]
        return [[theirs.clone(layer)(xs, carry, **options) for layer in layers] for layers in pairs]

    for got, want in run():
        close(got, want)
    assert not unrolled


@pytest.mark.parametrize("kind", ["LoRA", "module"])
def test_gradients_to_parameters_of_other_parts(kind: str) -> None:
    compare(*pair(kind), normal(1, (3, T, D)), start("GRUCell", (3,)), **OPTIONS["lengths, reverse"])


def test_every_option_under_nnx_scan() -> None:
    """Against the same cell through rnncore.unroll, resets and states too."""
    fast = noisy(make(ours, "LSTMCell", param_dtype=f64))

    class Sub(ours.LSTMCell):
        pass

    slow = Sub(D, H, param_dtype=f64, rngs=theirs.Rngs(0))
    theirs.update(slow, theirs.state(fast))
    carry, resets = start("LSTMCell", (3,)), jnp.zeros((3, T), bool).at[:, 2].set(True)

    def turned(a: jax.Array, options: Any) -> jax.Array:
        return jnp.swapaxes(a, 0, 1) if options.get("time_major") else a

    def run(cell: Any) -> Any:
        layer = ours.RNN(theirs.clone(cell), return_carry=True)
        found = []
        for o in OPTIONS.values():
            kwargs = dict(initial_carry=carry, resets=turned(resets, o), return_states=True) | o
            last, ys, states = layer(turned(normal(1, (3, T, D)), o), **kwargs)
            found.append((last, ys, states.carries))
        return found

    close(*jax.jit(lambda: (run(slow), run(fast)))())


def test_functions_that_cannot_be_static_go_through_nnx_scan(unrolled: list) -> None:
    """What has caught a traced value, and what cannot be hashed."""
    xs = normal(1, (B, T, D))

    @dataclasses.dataclass
    class Scaled:
        by: float

        def __call__(self, x: Any) -> Any:
            return jnp.tanh(self.by * x)

    def loss(slope: jax.Array, nn: Any) -> jax.Array:
        functions = (lambda x: jnp.tanh(slope * x)), Scaled(2)
        cells = [make(nn, "GRUCell", activation_fn=f, param_dtype=f64) for f in functions]
        return sum(projected(nn.RNN(noisy(cell), rngs=False)(xs, initial_carry=start("GRUCell"))) for cell in cells)

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    close(run(jnp.array(0.7), ours), run(jnp.array(0.7), theirs))
    assert not unrolled


@pytest.mark.parametrize(
    "options",
    [dict(state_axes=theirs.StateAxes({theirs.Param: None, ...: theirs.Carry})), dict(broadcast_rngs="dropout")],
    ids=["state_axes", "broadcast_rngs"],
)
def test_state_axes_and_broadcast_rngs_go_through_nnx_scan(options: Any, unrolled: list) -> None:
    mine, flaxen = both("GRUCell")
    xs = normal(1, (B, T, D), f32)
    close(ours.RNN(mine, **options)(xs), theirs.RNN(flaxen, **options)(xs), 1e-6)
    assert not unrolled


class Dropping(theirs.RNNCellBase):
    """A user's cell: dropout of the inputs, batch normalisation, and a GRU of either library."""

    def __init__(self, nn: Any):
        rngs = theirs.Rngs(0, dropout=1)
        self.dropout = theirs.Dropout(0.5, rngs=rngs)
        self.norm = theirs.BatchNorm(D, rngs=rngs)
        self.cell = make(nn, "GRUCell")

    def __call__(self, carry: Any, inputs: Any) -> Any:
        return self.cell(carry, self.norm(self.dropout(inputs)))

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return self.cell.initialize_carry(input_shape, rngs, carry_init)

    @property
    def num_feature_axes(self) -> int:
        return 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("broadcast_rngs", [None, "dropout"])
def test_a_foreign_cell_with_dropout_and_batch_norm(broadcast_rngs: Any) -> None:
    """New masks at every step, or one for all; running averages move on from step to step and call to call."""
    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.RNN(Dropping(nn), broadcast_rngs=broadcast_rngs) for nn in (ours, theirs))
    first = mine(xs)
    close(first, flaxen(xs), 1e-6)
    lengths = jnp.array([T, 2])
    close(mine(xs, seq_lengths=lengths), flaxen(xs, seq_lengths=lengths), 1e-6)
    states = [theirs.state(layer.cell, theirs.Any(theirs.BatchStat, theirs.RngCount)) for layer in (mine, flaxen)]
    close(*(theirs.to_pure_dict(s) for s in states), 1e-6)
    assert jnp.abs(mine.cell.norm.mean[...]).max() > 0.01
    assert jnp.abs(mine(xs) - first).max() > 1e-2


class Grid(theirs.RNNCellBase):
    """A cell of the user with two feature axes."""

    def __init__(self) -> None:
        self.weight = theirs.Param(jnp.array(0.7, f64))

    def __call__(self, carry: Any, inputs: Any) -> Any:
        carry = jnp.tanh(self.weight[...] * carry + inputs)
        return carry, carry

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return jnp.zeros(input_shape, f64)

    @property
    def num_feature_axes(self) -> int:
        return 2


def test_a_cell_with_more_feature_axes() -> None:
    layers = ours.RNN(Grid(), return_carry=True), theirs.RNN(Grid(), return_carry=True, rngs=False)
    compare(*layers, normal(1, (3, T, 4, 2)), seq_lengths=LENGTHS, reverse=True)


def test_fields_of_unroll(unrolled: list) -> None:
    """They reach it and change no number; under nnx.scan they mean nothing and are refused."""
    cell = noisy(make(ours, "LSTMCell", param_dtype=f64))
    chosen = dict(checkpoint_every=2, recompute="chunk", backend="scan")
    layers = [Layer(ours.RNN(cell, return_carry=True, **options)) for options in ({}, chosen)]
    xs, carry = normal(1, (B, T, D)), start("LSTMCell")
    plain, other = jax.jit(lambda *args: [with_gradients(layer, *args) for layer in layers])(xs, carry)
    close(plain, other)
    for name in ("checkpoint_every", "recompute", "backend"):
        with pytest.raises(NotImplementedError, match=f"{name} means nothing, because Doubled is not exactly"):
            ours.RNN(doubled(ours), **{name: chosen[name]})(jnp.ones((B, T, D)))
    with pytest.raises(TypeError, match="differentiation='any'.*no longer needed"):
        ours.RNN(cell, differentiation="any")


def test_streams_of_an_unknown_cell_are_those_of_flax() -> None:
    class Drawn(theirs.GRUCell):
        def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
            return jax.random.normal(rngs(), (*input_shape[:-1], H), f32)

    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.RNN(Drawn(D, H, rngs=theirs.Rngs(0))) for nn in (ours, theirs))
    outputs = [(mine(xs), flaxen(xs)) for _ in range(2)]
    for got, want in outputs:
        close(got, want, 1e-6)
    assert jnp.abs(outputs[0][0] - outputs[1][0]).max() > 1e-2
    same_bits(mine.rngs.count[...], flaxen.rngs.count[...])
