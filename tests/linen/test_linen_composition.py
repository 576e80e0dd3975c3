"""Linen layers inside models: names, partitioned parameters, transformations of the whole, foreign parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as theirs
import jax
import jax.numpy as jnp
import pytest
from linen_cases import LENGTHS, B, D, H, T, close, f32, f64, normal, projected, same_bits, some_variables

from rnncore import linen as ours


@pytest.mark.parametrize("name", ["RNN", "Bidirectional"])
def test_a_call_takes_what_flax_takes(name: str) -> None:
    mine, flaxen = (inspect.signature(getattr(nn, name).__call__).parameters for nn in (ours, theirs))
    shared = list(mine.values())[: len(flaxen)]
    assert [(p.name, p.default, p.kind) for p in shared] == [(p.name, p.default, p.kind) for p in flaxen.values()]
    own = ["resets", "reset_carry", "return_states"] if name == "RNN" else []
    assert [*mine][len(flaxen) :] == own


class Named(theirs.Module):
    """Every way in which a cell can get its name in a compact parent."""

    nn: Any

    @theirs.compact
    def __call__(self, xs: Any) -> Any:
        nn = self.nn
        xs = nn.RNN(nn.LSTMCell(4), name="top")(xs)
        xs = nn.Bidirectional(nn.RNN(nn.LSTMCell(H)), nn.RNN(nn.LSTMCell(H)))(xs)
        xs = nn.RNN(nn.GRUCell(H, name="mine"))(xs)
        xs = nn.RNN(theirs.remat(nn.LSTMCell)(H))(xs)
        xs = nn.RNN(nn.OptimizedLSTMCell(H))(nn.RNN(nn.MGUCell(H))(nn.RNN(nn.SimpleCell(H))(xs)))
        return nn.RNN(nn.ConvLSTMCell(1, (2,)))(xs[..., None])


class InSetup(theirs.Module):
    nn: Any

    def setup(self) -> None:
        nn = self.nn
        self.r = nn.RNN(nn.LSTMCell(H))
        self.cell = nn.GRUCell(H)
        self.q = nn.RNN(self.cell)
        self.both = nn.Bidirectional(nn.RNN(nn.MGUCell(H)), nn.RNN(nn.MGUCell(H)))

    def __call__(self, xs: Any) -> Any:
        return self.both(self.q(self.r(xs)))


def test_parameter_paths() -> None:
    xs = jnp.ones((B, T, D), f32)

    def tree(make: Callable, nn: Any) -> Any:
        return jax.eval_shape(make(nn).init, jax.random.key(0), xs)["params"]

    names = {
        lambda nn: nn.RNN(nn.LSTMCell(H)): {"cell"},
        Named: {"LSTMCell_0", "LSTMCell_1", "LSTMCell_2", "mine", "CheckpointLSTMCell_0", "SimpleCell_0", "MGUCell_0",
                "OptimizedLSTMCell_0", "ConvLSTMCell_0"},
        InSetup: {"r", "cell", "both"},
    }  # fmt: skip
    for make, expected in names.items():
        mine, flaxen = tree(make, ours), tree(make, theirs)
        assert set(mine) == expected
        assert jax.tree.map(lambda a: (a.shape, a.dtype), mine) == jax.tree.map(lambda a: (a.shape, a.dtype), flaxen)
    in_setup = tree(InSetup, ours)
    assert set(in_setup["r"]) == {"cell"} and set(in_setup["both"]) == {"forward_rnn", "backward_rnn"}


def test_one_cell_under_two_names_of_a_class_is_one_network() -> None:
    """The class name is part of path and key, so a subclass of the same name has the same tree and values."""

    class LSTMCell(ours.LSTMCell):
        pass

    class Model(theirs.Module):
        cell: Any

        @theirs.compact
        def __call__(self, xs: Any) -> Any:
            return ours.RNN(self.cell(H))(xs)

    class Other(Model):
        """Constructs Flax's cell and layer."""

        @theirs.compact
        def __call__(self, xs: Any) -> Any:
            return theirs.RNN(theirs.LSTMCell(H))(xs)

    xs = normal(1, (B, T, D), f32)
    got, want = (m.init_with_output(jax.random.key(3), xs) for m in (Model(LSTMCell), Other(None)))
    same_bits(got[1], want[1])
    close(got[0], want[0], 1e-6)
    assert set(Model(ours.OptimizedLSTMCell).init(jax.random.key(3), xs)["params"]) == {"OptimizedLSTMCell_0"}


def partitioned(nn: Any) -> Any:
    """Boxed kernels under nn.scan over layers and nn.vmap over copies, which add an axis to the boxes."""
    init = theirs.with_partitioning(theirs.initializers.lecun_normal(), ("in", "model"))
    recurrent = theirs.with_logical_partitioning(theirs.initializers.orthogonal(), ("units", "model"))
    fields = dict(kernel_init=init, recurrent_kernel_init=recurrent)

    class Layer(theirs.Module):
        @theirs.compact
        def __call__(self, xs: Any, _: Any) -> Any:
            return nn.RNN(nn.SimpleCell(D, **fields))(xs), None

    class Model(theirs.Module):
        @theirs.compact
        def __call__(self, xs: Any) -> Any:
            options = dict(variable_axes={"params": 0}, split_rngs={"params": True})
            named = {theirs.PARTITION_NAME: "layers"}
            xs, _ = theirs.scan(Layer, **options, length=2, metadata_params=named)()(xs, None)
            copies = theirs.vmap(
                nn.RNN, **options, in_axes=None, axis_size=2, metadata_params={theirs.PARTITION_NAME: "copies"}
            )
            return copies(nn.GRUCell(H, **fields))(xs) + nn.RNN(nn.MGUCell(H, **fields))(xs)

    return Model()


@pytest.mark.slow
def test_partitioned_parameters_in_stacks() -> None:
    xs = normal(1, (B, T, D), f32)
    got, want = (partitioned(nn).init(jax.random.key(0), xs) for nn in (ours, theirs))
    same_bits(got, want)
    assert theirs.get_partition_spec(got) == theirs.get_partition_spec(want)
    params = got["params"]
    assert params["ScanLayer_0"]["SimpleCell_0"]["h"]["kernel"].names == ("layers", "units", "model")
    assert params["GRUCell_0"]["hn"]["kernel"].names == ("copies", "units", "model")
    assert params["MGUCell_0"]["in"]["kernel"].names == ("in", "model")

    @jax.jit
    def run(variables: Any) -> list:
        def loss(variables: Any, nn: Any) -> Any:
            out = partitioned(nn).apply(variables, xs)
            return projected(out), out

        return [jax.grad(loss, has_aux=True)(variables, nn) for nn in (ours, theirs)]

    close(*run(got), 2e-5)


# ------------------------------------------------------------------------ transformations of the whole


def whole(nn: Any) -> Any:
    class Model(theirs.Module):
        @theirs.compact
        def __call__(self, xs: Any, lengths: Any) -> Any:
            wide = dict(param_dtype=f64)
            xs = nn.RNN(nn.MGUCell(H, **wide))(xs, seq_lengths=lengths)
            children = nn.RNN(nn.LSTMCell(H, **wide)), nn.RNN(theirs.GRUCell(H, **wide))
            carry, xs = nn.Bidirectional(*children, return_carry=True)(xs, seq_lengths=lengths)
            return carry, theirs.Dense(2, param_dtype=f64)(xs)

    return Model()


def under_grad(f: Callable) -> Callable:
    return jax.grad(lambda v, x, n: projected(f(v, x, n)), argnums=(0, 1))


def under_grad_of_remat_of_vmap(f: Callable) -> Callable:
    return under_grad(jax.checkpoint(jax.vmap(f, (None, 0, None))))


def under_jvp_of_grad(f: Callable) -> Callable:
    def run(v: Any, x: Any, n: Any) -> Any:
        tangents = jax.tree.map(lambda a: normal(5, a.shape), (v, x))
        return jax.jvp(lambda v, x: under_grad(f)(v, x, n), (v, x), tangents)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("transform", [under_grad_of_remat_of_vmap, under_jvp_of_grad], ids=lambda f: f.__name__)
def test_transformations_of_a_whole_model(transform: Callable) -> None:
    xs = normal(1, (2, 3, T, D)) if "vmap" in transform.__name__ else normal(1, (3, T, D))
    variables = some_variables(whole(theirs), xs[0] if xs.ndim == 4 else xs, LENGTHS)

    @jax.jit
    def run(variables: Any, xs: jax.Array) -> list:
        return [transform(jax.jit(whole(nn).apply))(variables, xs, LENGTHS) for nn in (ours, theirs)]

    close(*run(variables, xs), 1e-11)


# ----------------------------------------------------------------------------------------- foreign parts


class Mean(theirs.Module):
    """Anything with the call of an RNN: here a running mean, whose carry is the last one."""

    tell: Callable

    @theirs.compact
    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        self.tell(kwargs)
        inputs = jnp.flip(inputs, -2) if kwargs["reverse"] else inputs
        ys = jnp.cumsum(inputs, -2) / jnp.arange(1, 1 + inputs.shape[-2], dtype=inputs.dtype)[:, None]
        return ys[..., -1, :], jnp.flip(ys, -2) if kwargs["reverse"] else ys


def test_a_foreign_layer_in_bidirectional() -> None:
    xs = normal(1, (B, T, D), f32)
    said: dict[Any, list] = {ours: [], theirs: []}
    layers = [
        nn.Bidirectional(Mean(said[nn].append), nn.RNN(theirs.LSTMCell(H)), return_carry=True) for nn in (ours, theirs)
    ]
    swapped = [nn.Bidirectional(nn.RNN(nn.GRUCell(H)), Mean(said[nn].append)) for nn in (ours, theirs)]
    for mine, flaxen in (layers, swapped):
        variables = some_variables(flaxen, xs)
        close(mine.apply(variables, xs), flaxen.apply(variables, xs), 1e-6)
    forward, backward = said[ours]
    shared = dict(initial_carry=None, init_key=None, seq_lengths=None, return_carry=True, time_major=False)
    assert forward == shared | dict(reverse=False)
    assert backward == shared | dict(reverse=True, keep_order=True) == said[theirs][-1]
