"""Constructors, state trees, initial values and metadata of rnncore.nnx are those of flax.nnx."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as orbax
import pytest
from flax import nnx as theirs
from nnx_cases import CELLS, NEW, B, D, H, T, both, close, f32, f64, make, noisy, normal, pure, same_bits

import rnncore
from rnncore import nnx as ours


def keywords(cls: type) -> dict[str, Any]:
    """The keyword arguments of a constructor with their defaults."""
    found = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}


def paths(layer: Any) -> list:
    return [(path, type(v), v.shape, v.dtype) for path, v in theirs.to_flat_state(theirs.state(layer))]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", CELLS)
def test_a_cell_takes_every_argument_of_flax(name: str) -> None:
    """Each with another value than its default, and kept where Flax keeps it."""
    init = theirs.initializers
    values = dict(
        gate_fn=jax.nn.hard_sigmoid, activation_fn=jax.nn.gelu, kernel_init=init.normal(), bias_init=init.normal(0.5),
        recurrent_kernel_init=init.normal(0.1), dtype=jnp.bfloat16, param_dtype=f64, carry_init=init.normal(2.0),
        promote_dtype=lambda arrays, *, dtype=None, inexact=True: arrays, keep_rngs=True, rngs=None, residual=True,
        kernel_metadata={"a": 1}, recurrent_kernel_metadata={"b": 2}, bias_metadata={"c": 3},
    )  # fmt: skip
    options = {key: values[key] for key in keywords(getattr(theirs, name)) if key != "rngs"}
    with pytest.warns(UserWarning, match="carry_init is provided|keep_rngs argument is deprecated"):
        mine, flaxen = (getattr(nn, name)(D, H, rngs=theirs.Rngs(3), **options) for nn in (ours, theirs))
    assert paths(mine) == paths(flaxen)
    same_bits(*(pure(theirs.state(cell, theirs.Param)) for cell in (mine, flaxen)))
    for key in options:
        assert getattr(mine, key, None) is getattr(flaxen, key, None)
    for got, want in zip(*(jax.tree.leaves(cell, is_leaf=is_variable) for cell in (mine, flaxen)), strict=True):
        assert got.get_metadata() == want.get_metadata()
    same_bits(*(cell.initialize_carry((2, D)) for cell in (mine, flaxen)))
    same_bits(*(cell.initialize_carry((2, 5, D), theirs.Rngs(4), init.normal()) for cell in (mine, flaxen)))
    assert isinstance(mine, getattr(theirs, name)) and mine.num_feature_axes == 1


def is_variable(a: Any) -> bool:
    return isinstance(a, theirs.Variable)


@pytest.mark.sample(4)
@pytest.mark.parametrize("param_dtype", [f32, f64])
@pytest.mark.parametrize("name", CELLS)
def test_trees_and_initial_values_bit_for_bit(name: str, param_dtype: Any) -> None:
    mine, flaxen = (make(nn, name, 5, param_dtype=param_dtype) for nn in (ours, theirs))
    assert paths(mine) == paths(flaxen)
    same_bits(*(pure(theirs.state(cell)) for cell in (mine, flaxen)))


def test_the_two_lstm_cells_have_different_trees() -> None:
    """Flax's docstring calls their parameters compatible."""
    gates, joined = (pure(theirs.state(make(theirs, name))) for name in CELLS[:2])
    assert sorted(gates) == ["hf", "hg", "hi", "ho", "if_", "ig", "ii", "io"] and sorted(joined) == [
        "dense_h",
        "dense_i",
    ]
    functional = [ours.functional(make(ours, name))[1] for name in CELLS[:2]]
    same_bits(*(jax.tree.map(jnp.zeros_like, params) for params in functional))


@pytest.mark.parametrize("cls,own", [("RNN", 6), ("Bidirectional", 0)])
def test_the_layers_take_the_arguments_of_flax_and_our_own_come_after(cls: str, own: int) -> None:
    mine, flaxen = (keywords(getattr(nn, cls)) for nn in (ours, theirs))
    names = ["checkpoint_every", "recompute", "backend", "carry_dtype", "output_dtype"][:own]
    assert [*mine] == [*flaxen, *names]
    for name in flaxen:
        values = [getattr(v, "__name__", v) for v in (mine[name], flaxen[name])]
        # Flax's default merge_fn is a private function of its own; ours does not begin with an underscore.
        assert values[0] == (values[1].lstrip("_") if isinstance(values[1], str) else values[1])
    call, flax_call = (inspect.signature(getattr(nn, cls).__call__).parameters for nn in (ours, theirs))
    assert [*call][: len(flax_call)] == [*flax_call]
    assert [*call][len(flax_call) :] == ["resets", "reset_carry", "return_states"][:own]


@pytest.mark.parametrize("name", CELLS)
def test_an_rnn_holds_its_cell_and_nothing_else(name: str) -> None:
    mine = ours.RNN(make(ours, name))
    assert [*pure(theirs.state(mine))] == ["cell"]
    assert {kind for _, kind, *_ in paths(mine)} == {theirs.Param}
    layer = ours.Bidirectional(mine, ours.RNN(make(ours, name, 1)))
    assert [*pure(theirs.state(layer))] == ["backward_rnn", "forward_rnn"]
    assert paths(mine) == paths(theirs.RNN(make(theirs, name), rngs=False))


def test_cells_of_flax_and_of_the_user_in_our_rnn() -> None:
    """Zeros of a known cell need no stream; what makes the carry of an unknown one cannot be known."""

    class Drawn(theirs.GRUCell):
        def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
            return jax.random.normal(rngs(), (*input_shape[:-1], H))

    class Plain(theirs.GRUCell):
        pass

    kept = {cls: "rngs" in pure(theirs.state(ours.RNN(cls(D, H, rngs=theirs.Rngs(0))))) for cls in (Drawn, Plain)}
    assert kept == {Drawn: True, Plain: False}
    assert ours.RNN(Plain(D, H, rngs=theirs.Rngs(0)))(jnp.ones((B, T, D), f32)).shape == (B, T, H)


def test_sharding_of_the_parameters_is_kept() -> None:
    options = dict(
        kernel_metadata={"out_sharding": (None, "model")}, bias_metadata={"out_sharding": ("model",)},
        recurrent_kernel_metadata={"out_sharding": ("data", "model")},
    )  # fmt: skip
    # Constants: under a mesh everything is compiled anew, an orthogonal matrix too.
    ones = theirs.initializers.ones
    constant = options | dict(kernel_init=ones, recurrent_kernel_init=ones)
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        for name in CELLS:
            mine, flaxen = (theirs.state(make(nn, name, **constant)) for nn in (ours, theirs))
            specs = [theirs.get_partition_spec(state) for state in (mine, flaxen)]
            leaves = [jax.tree.leaves(pure(s), is_leaf=lambda a: isinstance(a, jax.P)) for s in specs]
            assert leaves[0] == leaves[1]
            assert {jax.P(None, "model"), jax.P("data", "model"), jax.P("model")} == {*leaves[0]}
        for name, more in NEW.items():
            own = dict(recurrent_kernel_metadata={"out_sharding": ("model",)}) if name == "IndRNNCell" else {}
            cell = make(ours, name, **(options if own else constant) | own, **more)
            assert cell.dense_i.kernel.out_sharding == (None, "model")
            assert cell.dense_i.bias.out_sharding == ("model",)
            if name == "IndRNNCell":
                assert cell.u.out_sharding == ("model",)
            else:
                assert cell.dense_h.kernel.out_sharding == ("data", "model")
                assert cell.b_hn.out_sharding == ("model",)
        assert ours.RNN(cell)(jnp.ones((B, T, D), f32)).shape == (B, T, H)


def test_every_other_name_is_that_of_flax() -> None:
    assert ours.Linear is theirs.Linear and ours.Param is theirs.Param and ours.jit is theirs.jit
    with pytest.raises(AttributeError, match="'rnncore.nnx' has no attribute 'NoSuchCell', nor has flax.nnx"):
        _ = ours.NoSuchCell


# -------------------------------------------------------------------------------------- checkpoints


def every_cell(nn: Any, seed: int = 0) -> Any:
    return theirs.Dict({name: nn.RNN(make(nn, name, seed)) for name in CELLS})


def outputs(layers: Any, xs: jax.Array) -> list:
    return [layers[name](xs) for name in CELLS]


@pytest.mark.slow
def test_checkpoints_of_either_library_load_in_the_other(tmp_path: Path) -> None:
    """Flax's layers hold rng state; the parameters are what is saved and loaded."""
    xs = normal(1, (B, T, D), f32)
    saved = {"flax": noisy(every_cell(theirs)), "rnncore": noisy(every_cell(ours))}
    others = {"flax": every_cell(ours, 9), "rnncore": every_cell(theirs, 9)}
    with orbax.StandardCheckpointer() as checkpointer:
        for key, layers in saved.items():
            checkpointer.save(tmp_path / key, pure(theirs.state(layers, theirs.Param)))
        checkpointer.wait_until_finished()
        for key, other in others.items():
            target = theirs.state(other, theirs.Param)
            theirs.replace_by_pure_dict(target, checkpointer.restore(tmp_path / key, pure(target)))
            theirs.update(other, target)
    run = theirs.jit(lambda layers, xs: {key: outputs(layers[key], xs) for key in ("flax", "rnncore")})
    close(run(theirs.Dict(others), xs), run(theirs.Dict(saved), xs), 1e-6)


def test_a_state_of_flax_with_rng_state_loads_through_its_parameters() -> None:
    flaxen, mine = theirs.RNN(make(theirs, "GRUCell")), ours.RNN(make(ours, "GRUCell", 1))
    graph, params = theirs.split(mine, theirs.Param)
    merged = theirs.merge(graph, theirs.state(flaxen, theirs.Param))
    close(merged(jnp.ones((B, T, D), f32)), flaxen(jnp.ones((B, T, D), f32)), 1e-6)
    assert "rngs" in pure(theirs.state(flaxen))


# --------------------------------------------------------------------------------------- functional


def test_functional_is_the_cell() -> None:
    """Its unroll is the layer's, of every cell."""
    cells = [noisy(make(ours, name, param_dtype=f64)) for name in CELLS]
    cells += [noisy(make(ours, name, param_dtype=f64, **options)) for name, options in NEW.items()]
    xs = normal(1, (B, T, D))

    @jax.jit
    def run() -> Any:
        return [rnncore.unroll(*ours.functional(cell), xs)[1] for cell in cells], [ours.RNN(cell)(xs) for cell in cells]

    close(*run())


def test_gradients_flow_through_functional() -> None:
    """To the same parameters as through the step of the cell."""
    cell, xs = noisy(make(ours, "GRUCell", param_dtype=f64, recurrent_bias=True)), normal(1, (B, T, D))

    @jax.jit
    def run() -> Any:
        def through_core(cell: Any) -> jax.Array:
            _, ys = rnncore.unroll(*ours.functional(cell), xs)
            return (ys**2).sum()

        def through_steps(cell: Any) -> jax.Array:
            return (theirs.RNN(cell)(xs) ** 2).sum()

        return [pure(theirs.grad(f)(theirs.clone(cell))) for f in (through_core, through_steps)]

    close(*run())


@pytest.mark.parametrize("name", CELLS)
def test_functional_takes_cells_of_flax(name: str) -> None:
    mine, flaxen = both(name)
    (core, params), (flax_core, flax_params) = (ours.functional(cell) for cell in (mine, flaxen))
    assert core == flax_core
    same_bits(params, flax_params)
    assert params.input_kernel.shape == (D, len(core.gates), H)
    assert ours.functional(make(ours, name, dtype=jnp.bfloat16))[1].bias.dtype == jnp.bfloat16


def test_functional_refuses_what_it_cannot_know() -> None:
    class Other(ours.GRUCell):
        pass

    lora = make(ours, "GRUCell")
    lora.dense_i = theirs.LoRALinear(D, 3 * H, lora_rank=2, rngs=theirs.Rngs(0))
    wrong = make(ours, "GRUCell")
    wrong.dense_h.kernel = theirs.Param(jnp.zeros((2, H, 3 * H)))
    bare = make(ours, "LSTMCell")
    bare.hf.bias = theirs.data(None)
    precise = make(ours, "SimpleCell")
    precise.dense_i.precision = jax.lax.Precision.HIGHEST
    for cell, why in (
        (Other(D, H, rngs=theirs.Rngs(0)), "Other is not exactly one of the pointwise cells of rnncore.nnx"),
        (lora, "its dense_i is a LoRALinear and not exactly an nnx.Linear"),
        (wrong, r"its dense_h.kernel has shape \(2, 4, 12\), expected \(4, 12\)"),
        (bare, "its hf has no bias"),
        (precise, "its dense_i has precision="),
        (make(ours, "GRUCell", gate_fn=jax.nn.softmax), "not elementwise"),
        (make(ours, "IndRNNCell", promote_dtype=np.asarray), "its dense_i has promote_dtype="),
        (make(ours, "GRUCell", activation_fn=theirs.PReLU()), "its function PReLU is a module"),
    ):
        with pytest.raises(NotImplementedError, match=why):
            ours.functional(cell)
