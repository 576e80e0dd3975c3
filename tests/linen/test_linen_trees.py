"""Fields, parameter trees and initial values of rnncore.linen layers are those of flax.linen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as theirs
import jax
import jax.numpy as jnp
import pytest
from linen_cases import B, D, H, T, close, f32, f64, normal, projected, same_bits, some_variables, with_gradients

from rnncore import linen as ours


@pytest.mark.parametrize("name,own", [("RNN", 6), ("Bidirectional", 0)])
def test_fields_are_those_of_flax_and_our_own_come_after(name: str, own: int) -> None:
    def described(library: Any) -> list:
        fields = [f for f in dataclasses.fields(getattr(library, name)) if f.name not in ("parent", "name")]
        # Flax's default merge_fn is a private function of its own; ours does not begin with an underscore.
        values = [getattr(f.default, "__name__", f.default) for f in fields]
        values = [v.lstrip("_") if isinstance(v, str) else v for v in values]
        return [(f.name, value, f.kw_only) for f, value in zip(fields, values, strict=True)]

    mine, flaxen = described(ours), described(theirs)
    assert mine[: len(flaxen)] == flaxen
    assert (
        mine[len(flaxen) :]
        == [
            ("checkpoint_every", None, True),
            ("recompute", "nothing", True),
            ("backend", None, True),
            ("carry_dtype", None, True),
            ("output_dtype", None, True),
        ][:own]
    )


def test_positional_construction() -> None:
    xs, options = normal(1, (T, B, D)), (True, True, True, True, 2)
    mine, flaxen = (nn.RNN(nn.GRUCell(H, param_dtype=f64), *options) for nn in (ours, theirs))
    variables = some_variables(flaxen, xs)
    close(mine.apply(variables, xs), flaxen.apply(variables, xs))
    mine, flaxen = (
        nn.Bidirectional(*(nn.RNN(nn.GRUCell(H, param_dtype=f64)) for _ in range(2)), jnp.add, True, True)
        for nn in (ours, theirs)
    )
    variables = some_variables(flaxen, xs)
    close(mine.apply(variables, xs), flaxen.apply(variables, xs))


def in_setup(nn: Any) -> Any:
    class Model(theirs.Module):
        def setup(self) -> None:
            self.r = nn.RNN(nn.LSTMCell(H))
            self.cell = nn.GRUCell(H)
            self.shared = [nn.RNN(self.cell), nn.RNN(self.cell, reverse=True)]
            self.head = theirs.Dense(2)

        def __call__(self, xs: Any) -> Any:
            return self.head(self.r(xs) + sum(r(xs) for r in self.shared))

    return Model()


def in_compact(nn: Any) -> Any:
    class Model(theirs.Module):
        @theirs.compact
        def __call__(self, xs: Any) -> Any:
            xs = theirs.Dense(D)(xs)
            xs = nn.RNN(nn.LSTMCell(H), name="lost")(xs)
            xs = theirs.Dropout(0.5, deterministic=False)(xs)
            xs = nn.RNN(nn.OptimizedLSTMCell(H))(xs)
            xs = nn.RNN(nn.GRUCell(H, name="mine"))(xs)
            xs = nn.RNN(nn.MGUCell(H))(xs)
            xs = nn.RNN(nn.ConvLSTMCell(1, (2,)))(xs[..., None])[..., 0]
            xs = nn.Bidirectional(nn.RNN(nn.LSTMCell(H)), nn.RNN(nn.SimpleCell(H)))(xs)
            noise = jax.random.normal(self.make_rng("noise"), xs.shape, xs.dtype)
            return theirs.Dense(2)(theirs.Dropout(0.5, deterministic=False)(xs) + noise)

    return Model()


def standalone(nn: Any) -> Any:
    return nn.RNN(nn.OptimizedLSTMCell(H), return_carry=True)


def bidirectional(nn: Any) -> Any:
    return nn.Bidirectional(nn.RNN(nn.GRUCell(H)), nn.RNN(nn.LSTMCell(H)), return_carry=True)


def rematerialised(nn: Any) -> Any:
    class Model(theirs.Module):
        @theirs.compact
        def __call__(self, xs: Any) -> Any:
            xs = nn.RNN(theirs.remat(nn.LSTMCell)(H))(xs)
            return theirs.remat(nn.RNN)(nn.GRUCell(H))(xs)

    return Model()


def shared_in_compact(nn: Any) -> Any:
    class Model(theirs.Module):
        @theirs.compact
        def __call__(self, xs: Any) -> Any:
            cell = nn.MGUCell(H)
            there, back = nn.RNN(cell), nn.RNN(cell, reverse=True, keep_order=True)
            return there(xs) * back(xs)

    return Model()


def compiled(nn: Any) -> Any:
    class Model(theirs.Module):
        @theirs.compact
        def __call__(self, xs: Any) -> Any:
            xs = theirs.jit(nn.RNN)(nn.GRUCell(H))(xs)
            return nn.RNN(theirs.jit(nn.SimpleCell)(H))(xs)

    return Model()


def stacked(nn: Any) -> Any:
    """nn.scan over three layers, nn.remat around each: parameters stacked on axis 0."""

    class Layer(theirs.Module):
        @theirs.compact
        def __call__(self, xs: Any, _: Any) -> Any:
            return xs + nn.RNN(nn.LSTMCell(H))(xs), None

    class Model(theirs.Module):
        @theirs.compact
        def __call__(self, xs: Any) -> Any:
            many = theirs.scan(theirs.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return many()(theirs.Dense(H)(xs), None)[0]

    return Model()


def layers(nn: Any) -> Any:
    """Three networks at once, with their own parameters."""
    return theirs.vmap(nn.RNN, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)(
        nn.SimpleCell(H)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [standalone, in_setup, in_compact, shared_in_compact, bidirectional, rematerialised, compiled, stacked, layers],
    ids=lambda f: f.__name__,
)
def test_trees_and_initial_values_bit_for_bit_and_results_with_gradients(model: Callable) -> None:
    xs = normal(1, (B, T, D), f32)
    rngs = {"params": jax.random.key(3), "dropout": jax.random.key(4), "noise": jax.random.key(5)}
    (got_y, got), (want_y, want) = (model(nn).init_with_output(rngs, xs) for nn in (ours, theirs))
    if model is compiled:
        close(got, want, 2e-7)  # XLA rounds what it compiles together in its own way.
    else:
        same_bits(got, want)
    close(got_y, want_y, 2e-6)
    variables = jax.tree.map(lambda a: a + 0.3 * normal(7, a.shape, a.dtype), want)

    @jax.jit
    def run(variables: Any, xs: jax.Array) -> list:
        def loss(variables: Any, xs: jax.Array, nn: Any) -> Any:
            out = model(nn).apply(variables, xs, rngs=rngs)
            return projected(out), out

        return [jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, xs, nn) for nn in (ours, theirs)]

    (gradients, got_y), (wanted, want_y) = run(variables, xs)
    close(got_y, want_y, 3e-6)
    close(gradients, wanted, 2e-5)


def test_partitioned_initialisers_keep_their_boxes() -> None:
    init = theirs.with_partitioning(theirs.initializers.lecun_normal(), (None, "model"))
    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.RNN(nn.GRUCell(H, kernel_init=init)) for nn in (ours, theirs))
    variables = mine.init(jax.random.key(0), xs)
    same_bits(variables, flaxen.init(jax.random.key(0), xs))
    assert isinstance(variables["params"]["cell"]["ir"]["kernel"], theirs.Partitioned)
    close(with_gradients(mine, variables, xs), with_gradients(flaxen, variables, xs), 3e-6)


def test_gates_of_different_widths_are_refused() -> None:
    rnn, xs = ours.RNN(ours.LSTMCell(4)), jnp.ones((2, 5, 3))
    variables = rnn.init(jax.random.key(0), xs)
    cell = variables["params"]["cell"]
    cell["ii"]["kernel"], cell["if"]["kernel"] = jnp.ones((3, 2)), jnp.ones((3, 6))
    with pytest.raises(ValueError, match="the gates have 2, 6, 4, 4 units: expected as many in each"):
        rnn.apply(variables, xs)
