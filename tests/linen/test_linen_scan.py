"""Which cells take the fast way through rnncore.unroll, and that all others come out as in Flax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as theirs
import jax
import jax.numpy as jnp
import pytest
from linen_cases import (
    CELLS,
    LENGTHS,
    OPTIONS,
    B,
    D,
    H,
    T,
    close,
    f32,
    f64,
    foreign,
    normal,
    projected,
    same_bits,
    some_variables,
    start,
    with_gradients,
)

from rnncore import linen as ours


class Doubled(ours.GRUCell):
    """A user's subclass with another step."""

    @theirs.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        return super().__call__(carry, 2 * inputs)


class DoubledInFlax(theirs.GRUCell):
    """The same over Flax's cell."""

    @theirs.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        return super().__call__(carry, 2 * inputs)


class SoftSlope(theirs.Module):
    """An activation with a parameter."""

    @theirs.compact
    def __call__(self, x: Any) -> Any:
        return jnp.tanh(x * self.param("slope", theirs.initializers.ones, (), f64))


WIDE: dict[str, Any] = dict(param_dtype=f64)
SCANNED: dict[str, tuple[Callable, Callable]] = {
    "subclass of Flax's": (lambda: foreign("LSTMCell")(H, **WIDE), lambda: theirs.LSTMCell(H, **WIDE)),
    "subclass": (lambda: Doubled(H, **WIDE), lambda: DoubledInFlax(H, **WIDE)),
    "not elementwise": (
        lambda: ours.GRUCell(H, gate_fn=jax.nn.softmax, **WIDE),
        lambda: theirs.GRUCell(H, gate_fn=jax.nn.softmax, **WIDE),
    ),
    "module": (
        lambda: ours.SimpleCell(H, activation_fn=SoftSlope(), **WIDE),
        lambda: theirs.SimpleCell(H, activation_fn=SoftSlope(), **WIDE),
    ),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", SCANNED)
def test_what_is_not_exactly_a_known_cell_goes_through_nn_scan(kind: str, unrolled: list) -> None:
    mine, flaxen = (nn.RNN(make(), return_carry=True) for nn, make in zip((ours, theirs), SCANNED[kind], strict=True))
    xs, options = normal(1, (3, T, D)), OPTIONS["lengths, reverse, keep order"]
    carry = start("LSTM" if "LSTM" in type(mine.cell).__name__ else "", (3,))
    variables = some_variables(flaxen, xs, initial_carry=carry)
    assert jax.tree.structure(variables) == jax.tree.structure(some_variables(mine, xs, initial_carry=carry))
    close(*(with_gradients(layer, variables, xs, carry, **options) for layer in (mine, flaxen)))
    assert not unrolled


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", CELLS)
def test_cells_of_flax_take_the_fast_way(name: str, unrolled: list) -> None:
    mine, flaxen = (nn.RNN(getattr(theirs, name)(H, **WIDE), return_carry=True) for nn in (ours, theirs))
    xs, carry = normal(1, (3, T, D)), start(name, (3,))
    variables = flaxen.init(jax.random.key(0), xs)
    same_bits(mine.init(jax.random.key(0), xs), variables)
    assert len(unrolled) == 1
    args = some_variables(flaxen, xs), xs, carry
    close(*(with_gradients(layer, *args, **OPTIONS["lengths, reverse"]) for layer in (mine, flaxen)))
    assert len(unrolled) == 2


def test_captured_intermediates_of_every_step(unrolled: list) -> None:
    """They are kept where `variable_axes` says so, as in Flax; else only the layer's own output is."""
    xs = normal(1, (T, B, D), f32)
    for axes in ({"intermediates": 0}, {}):
        mine, flaxen = (nn.RNN(nn.SimpleCell(H), variable_axes=axes, time_major=True) for nn in (ours, theirs))
        variables = some_variables(flaxen, xs)
        unrolled.clear()

        def run(layer: Any, variables: Any = variables) -> Any:
            def seen(module: Any, method: str) -> bool:
                return type(module).__name__ in ("RNN", "SimpleCell") and method == "__call__"

            return layer.apply(variables, xs, capture_intermediates=seen)

        got, want = run(mine), run(flaxen)
        close(got, want, 1e-6)
        assert ("cell" in got[1]["intermediates"]) == bool(axes)
        assert len(unrolled) == (0 if axes else 1)


def test_a_function_that_has_caught_a_traced_value_goes_through_nn_scan(unrolled: list) -> None:
    xs = normal(1, (B, T, D))
    variables = some_variables(theirs.RNN(theirs.GRUCell(H, param_dtype=f64)), xs)

    def loss(slope: jax.Array, nn: Any) -> jax.Array:
        layer = nn.RNN(nn.GRUCell(H, activation_fn=lambda x: jnp.tanh(slope * x), param_dtype=f64))
        return projected(layer.apply(variables, xs))

    slope = jnp.array(0.7)
    close(jax.grad(loss)(slope, ours), jax.grad(loss)(slope, theirs))
    close(jax.jit(loss, static_argnums=1)(slope, ours), loss(slope, theirs))
    assert not unrolled


def test_a_function_that_has_caught_a_constant(unrolled: list) -> None:
    """A number keeps the fast way; an array belongs to units, which only nn.scan can tell apart."""
    xs = normal(1, (B, T, D))
    variables = some_variables(theirs.RNN(theirs.GRUCell(H, param_dtype=f64)), xs)
    for slope, fast in ((jnp.array(0.7), 1), (jnp.linspace(0.1, 1.0, H), 0)):

        def loss(variables: Any, nn: Any, slope: Any = slope) -> jax.Array:
            layer = nn.RNN(nn.GRUCell(H, activation_fn=lambda x: jnp.tanh(slope * x), param_dtype=f64))
            return projected(layer.apply(variables, xs))

        unrolled.clear()
        run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        close(run(variables, ours), run(variables, theirs))
        assert len(unrolled) == fast


def test_a_function_over_groups_of_units(unrolled: list) -> None:
    def normalised(x: jax.Array) -> jax.Array:
        groups = x.reshape(*x.shape[:-1], 2, H // 2)
        return (groups - groups.mean(-1, keepdims=True)).reshape(x.shape)

    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.RNN(nn.SimpleCell(H, activation_fn=normalised)) for nn in (ours, theirs))
    variables = some_variables(flaxen, xs)
    close(mine.apply(variables, xs), flaxen.apply(variables, xs), 1e-6)
    assert not unrolled


def test_a_function_that_cannot_be_hashed_goes_through_nn_scan(unrolled: list) -> None:
    @dataclasses.dataclass
    class Scaled:
        by: float

        def __call__(self, x: Any) -> Any:
            return jnp.tanh(self.by * x)

    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.RNN(nn.GRUCell(H, activation_fn=Scaled(0.5))) for nn in (ours, theirs))
    variables = some_variables(flaxen, xs)
    close(mine.apply(variables, xs), flaxen.apply(variables, xs), 1e-6)
    assert not unrolled


@pytest.mark.slow
def test_parameters_of_every_step_go_through_nn_scan(unrolled: list) -> None:
    xs = normal(1, (T, B, D), f32)
    fields = dict(variable_axes={"params": 0}, variable_broadcast=False, split_rngs={"params": True}, time_major=True)
    mine, flaxen = (nn.RNN(nn.GRUCell(H), **fields) for nn in (ours, theirs))
    variables = flaxen.init(jax.random.key(0), xs)
    same_bits(mine.init(jax.random.key(0), xs), variables)
    assert variables["params"]["cell"]["ir"]["kernel"].shape == (T, D, H)
    close(mine.apply(variables, xs), flaxen.apply(variables, xs), 1e-6)
    assert not unrolled


def test_an_interceptor_sees_the_cell(unrolled: list) -> None:
    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.RNN(nn.SimpleCell(H)) for nn in (ours, theirs))
    variables = mine.init(jax.random.key(0), xs)
    unrolled.clear()

    def halve(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        step = type(context.module).__name__ == "SimpleCell" and context.method_name == "__call__"
        return (out[0] / 2, out[1]) if step else out

    with theirs.intercept_methods(halve):
        got, want = mine.apply(variables, xs), flaxen.apply(variables, xs)
    close(got, want, 1e-6)
    assert not unrolled
    assert jnp.abs(got - mine.apply(variables, xs)).max() > 1e-2


@pytest.mark.parametrize("options", ["lengths", "all"])
def test_a_cell_with_more_feature_axes(options: str) -> None:
    shape = (T, 3, 4, 2) if options == "all" else (3, T, 4, 2)
    xs = normal(1, shape, f32)
    mine, flaxen = (nn.RNN(theirs.ConvLSTMCell(2, (3,)), return_carry=True) for nn in (ours, theirs))
    kwargs = dict(OPTIONS[options])
    lengths = kwargs.pop("seq_lengths")
    variables = some_variables(flaxen, xs, time_major=options == "all")
    got, want = (
        jax.jit(lambda xs, lengths, m=m: m.apply(variables, xs, seq_lengths=lengths, **kwargs)) for m in (mine, flaxen)
    )
    close(got(xs, lengths), want(xs, lengths), 1e-6)
    broken = xs.at[(-1, 0) if options == "all" else (0, -1)].set(jnp.nan)
    close(got(broken, lengths)[0], got(xs, lengths)[0], 0.0)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", CELLS)
def test_our_cell_in_flax_rnn(name: str) -> None:
    mine, flaxen = (theirs.RNN(getattr(nn, name)(H, param_dtype=f64), return_carry=True) for nn in (ours, theirs))
    xs = normal(1, (3, T, D))
    variables = flaxen.init(jax.random.key(0), xs)
    same_bits(mine.init(jax.random.key(0), xs), variables)
    args = some_variables(flaxen, xs), xs, start(name, (3,))
    close(with_gradients(mine, *args, seq_lengths=LENGTHS), with_gradients(flaxen, *args, seq_lengths=LENGTHS))


@pytest.mark.slow
def test_transformations_of_the_layer() -> None:
    xs = normal(1, (3, B, T, D))
    mine, flaxen = (nn.RNN(nn.LSTMCell(H, param_dtype=f64)) for nn in (ours, theirs))
    variables = some_variables(flaxen, xs[0])

    def loss(layer: Any) -> Callable:
        return lambda v, x: projected(layer.apply(v, x))

    for transform in (
        lambda f: jax.vmap(jax.grad(f), (None, 0)),
        lambda f: jax.grad(lambda v, x: jax.vmap(jax.checkpoint(f), (None, 0))(v, x).sum()),
    ):
        close(jax.jit(transform(loss(mine)))(variables, xs), jax.jit(transform(loss(flaxen)))(variables, xs))
    tangents = jax.tree.map(lambda a: normal(5, a.shape), (variables, xs[0]))
    close(*(jax.jit(lambda p, t, m=m: jax.jvp(m.apply, p, t))((variables, xs[0]), tangents) for m in (mine, flaxen)))
