"""Transformations over whole nnx models: jit, vmap, grad, remat, scan over layers, training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx as theirs
from nnx_cases import B, D, H, T, close, f32, f64, noisy, normal, projected, pure

from rnncore import nnx as ours

LENGTHS = jnp.array([2, T])


class Model(theirs.Module):
    """Two layers and a head, over the classes of either library."""

    def __init__(self, nn: Any, rngs: theirs.Rngs, **options: Any):
        wide = dict(param_dtype=f64, rngs=rngs)
        self.both = nn.Bidirectional(*(nn.RNN(nn.LSTMCell(D, 2, **wide), **options) for _ in range(2)))
        self.rnn = nn.RNN(nn.GRUCell(4, H, **wide), **options)
        self.head = theirs.Linear(H, 2, **wide)

    def __call__(self, xs: Any, lengths: Any = LENGTHS) -> Any:
        return self.head(self.rnn(self.both(xs, seq_lengths=lengths), seq_lengths=lengths))


def loss(model: Any, xs: Any, lengths: Any = LENGTHS) -> jax.Array:
    return projected(model(xs, lengths))


@pytest.fixture(scope="module")
def model() -> Model:
    return noisy(Model(ours, theirs.Rngs(0)))


@pytest.fixture(scope="module")
def wanted(model: Model) -> Any:
    """Value and gradients of the model of Flax's layers, at the same parameters."""
    flaxen = Model(theirs, theirs.Rngs(0))
    theirs.update(flaxen, theirs.state(model, theirs.Param))
    value, gradients = theirs.jit(theirs.value_and_grad(loss))(flaxen, normal(1, (B, T, D)))
    return value, pure(gradients)


def merged(transform: Callable) -> Callable:
    """Value and gradients through `jax.grad` of a function of the split parameters, transformed."""

    def run(model: Any, xs: Any) -> Any:
        graph, params = theirs.split(model, theirs.Param)
        function = transform(lambda params, xs: loss(theirs.merge(graph, params), xs))
        value, gradients = jax.jit(jax.value_and_grad(function))(params, xs)
        return value, gradients

    return run


WAYS: dict[str, Callable] = {
    "nnx.jit of nnx.grad of nnx.remat": theirs.jit(theirs.value_and_grad(theirs.remat(loss))),
    "jax.jit of jax.grad of jax.checkpoint": merged(jax.checkpoint),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_a_whole_model(way: str, model: Model, wanted: Any) -> None:
    value, gradients = WAYS[way](model, normal(1, (B, T, D)))
    close((value, pure(gradients)), wanted)


def test_forward_mode_and_second_order() -> None:
    """Forward over reverse and reverse over forward give one Hessian-vector product."""
    graph, params = theirs.split(noisy(layer(jax.random.key(0))), theirs.Param)
    xs, direction = normal(1, (B, T, D)), jax.tree.map(lambda a: normal(5, a.shape, a.dtype), params)

    def value(params: Any) -> jax.Array:
        return projected(theirs.merge(graph, params)(xs))

    def along(params: Any) -> jax.Array:
        return jax.jvp(value, (params,), (direction,))[1]

    @jax.jit
    def run(params: Any) -> Any:
        return jax.jvp(jax.grad(value), (params,), (direction,))[1], jax.grad(along)(params)

    over_reverse, over_forward = map(pure, run(params))
    close(over_reverse, over_forward, 1e-10)
    assert all(jnp.abs(a).max() > 1e-2 for a in jax.tree.leaves(over_reverse))


def test_batches_by_vmap_are_batches(model: Model) -> None:
    """The module closed over by jax.vmap, and taken by nnx.vmap."""
    xs, lengths = normal(1, (3, B, T, D)), jnp.array([[0, 1], [2, T], [T, 3]])
    through_nnx = theirs.vmap(lambda m, xs, n: m(xs, n), in_axes=(None, 0, 0))

    @jax.jit
    def run(xs: jax.Array, n: jax.Array) -> Any:
        return [model(xs, n), jax.vmap(model)(xs, n), through_nnx(theirs.clone(model), xs, n)]

    want, *got = run(xs, lengths)
    close(got, [want, want])


def layer(key: jax.Array, size: int = D) -> Any:
    init = theirs.initializers.normal(0.5)
    return ours.RNN(ours.GRUCell(size, H, recurrent_kernel_init=init, param_dtype=f64, rngs=theirs.Rngs(key)))


@pytest.mark.slow
def test_an_ensemble() -> None:
    """Members made under nnx.vmap and run under nnx.vmap are those made and run one by one."""
    xs, keys = normal(1, (B, T, D)), jax.random.split(jax.random.key(3), 2)

    @jax.jit
    def run(xs: jax.Array, keys: jax.Array) -> Any:
        together = theirs.vmap(lambda m, xs: m(xs), in_axes=(0, None))(theirs.vmap(lambda key: layer(key))(keys), xs)
        return together, jnp.stack([layer(key)(xs) for key in keys])

    together, apart = run(xs, keys)
    close(together, apart)
    assert jnp.abs(together[0] - together[1]).max() > 0.1


@pytest.mark.slow
def test_scan_over_layers() -> None:
    """A deep stack as one scanned layer, gradients too, against a loop over its layers."""
    xs, depth = normal(1, (B, T, H)), 3

    stack = noisy(theirs.vmap(lambda key: layer(key, H))(jax.random.split(jax.random.key(0), depth)))
    graph, params = theirs.split(stack, theirs.Param)

    def scanned(params: Any, xs: Any) -> jax.Array:
        run = theirs.scan(lambda xs, layer: layer(xs), in_axes=(theirs.Carry, 0), out_axes=theirs.Carry)
        return projected(run(xs, theirs.merge(graph, params)))

    def looped(params: Any, xs: Any) -> jax.Array:
        for n in range(depth):
            xs = theirs.merge(graph, jax.tree.map(lambda a, n=n: a[n], params))(xs)
        return projected(xs)

    @jax.jit
    def run(params: Any, xs: Any) -> Any:
        return [jax.value_and_grad(f, (0, 1))(params, xs) for f in (scanned, looped)]

    close(*(jax.tree.leaves(a) for a in run(params, xs)))


@pytest.mark.slow
def test_training_with_nnx_optimizer() -> None:
    """A task that needs memory: the sum of the inputs so far."""
    model = Model(ours, theirs.Rngs(1), checkpoint_every=2, recompute="chunk")
    optimizer = theirs.Optimizer(model, optax.adam(0.03), wrt=theirs.Param)
    xs = normal(1, (16, T, D))
    target = jnp.cumsum(xs[..., :2], axis=1) / 2

    @theirs.jit
    def step(model: Model, optimizer: theirs.Optimizer) -> jax.Array:
        def error(model: Model) -> jax.Array:
            return jnp.mean((model(xs, jnp.full(16, T)) - target) ** 2)

        value, gradients = theirs.value_and_grad(error)(model)
        optimizer.update(model, gradients)
        return value

    errors = [float(step(model, optimizer)) for _ in range(40)]
    assert errors[-1] < 0.2 * errors[0]
    assert model.rnn.cell.dense_i.kernel.dtype == f64


def test_abstract_models() -> None:
    """Without any array: nnx.eval_shape of construction and call, as a checkpoint reader makes them."""
    made = theirs.eval_shape(lambda: Model(ours, theirs.Rngs(0)))
    graph, params = theirs.split(made, theirs.Param)
    out = jax.eval_shape(lambda p, xs: theirs.merge(graph, p)(xs), params, jax.ShapeDtypeStruct((B, T, D), f32))
    assert out.shape == (B, T, 2) and out.dtype == f64
