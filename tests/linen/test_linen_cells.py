"""The Flax cells of rnncore.linen, held to their flax.linen namesakes."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import flax
import flax.linen as theirs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import linen as ours

D, H = 3, 4
GATED = ("LSTMCell", "OptimizedLSTMCell", "GRUCell")
CELLS = (*GATED, "MGUCell", "SimpleCell")
ATOL = {jnp.dtype("float32"): 1e-6, jnp.dtype("float64"): 1e-12}


def both(name: str, *args: Any, **fields: Any) -> tuple[Any, Any]:
    return getattr(ours, name)(*args, **fields), getattr(theirs, name)(*args, **fields)


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def some_variables(module: Any, *args: Any) -> Any:
    """Variables of the module with noise in all of them, biases too; costs no compilation."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: module.init(jax.random.key(0), *args)))
    return tree.unflatten([0.6 * normal(i, a.shape, a.dtype) for i, a in enumerate(leaves)])


def same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def close(a: Any, b: Any, atol: float) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=0, atol=atol)


def step_and_gradients(cell: Any, variables: Any, carry: Any, x: jax.Array) -> Any:
    """A step's carry and output, and the gradients of a random projection of both to all that went in."""

    def loss(variables: Any, carry: Any, x: jax.Array) -> Any:
        out = cell.apply(variables, carry, x)
        leaves = jax.tree.leaves(out)
        return sum(jnp.vdot(normal(9 + i, a.shape, a.dtype), a) for i, a in enumerate(leaves)), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(variables, carry, x)
    return out, gradients


def check_step(mine: Any, flaxen: Any, batch: tuple[int, ...], dtype: Any, atol: float) -> None:
    x = normal(1, (*batch, D), dtype)
    shapes = jax.eval_shape(lambda: flaxen.initialize_carry(jax.random.key(0), x.shape))
    carry = jax.tree.map(lambda a: normal(2, a.shape, a.dtype), shapes)
    args = some_variables(flaxen, carry, x), carry, x
    close(*jax.jit(lambda *args: [step_and_gradients(cell, *args) for cell in (mine, flaxen)])(*args), atol)


# ------------------------------------------------------------------------------ fields and parameters


@pytest.mark.parametrize("name", CELLS)
def test_fields_have_flax_names_order_and_defaults(name: str) -> None:
    def described(cls: type) -> list:
        # An initialiser is a new closure at every call of its factory; its qualified name tells which it is.
        defaults = [(f, inspect.unwrap(f.default)) for f in dataclasses.fields(cls) if f.name != "parent"]
        return [(f.name, getattr(default, "__qualname__", default), f.kw_only) for f, default in defaults]

    mine, flaxen = getattr(ours, name), getattr(theirs, name)
    assert described(mine) == described(flaxen)
    assert mine.__name__ == name
    assert issubclass(mine, theirs.RNNCellBase)
    assert mine(H).num_feature_axes == 1


@pytest.mark.parametrize(
    ("name", "param_dtype"), [*((name, jnp.float32) for name in CELLS), ("OptimizedLSTMCell", jnp.float64)]
)
def test_initial_values_bit_for_bit(name: str, param_dtype: Any) -> None:
    biases = ("forget_bias_init", "activation_bias_init") if name == "MGUCell" else ("bias_init",)
    spread = {field: theirs.initializers.normal(i + 1.0) for i, field in enumerate(biases)}
    mine, flaxen = both(name, H, param_dtype=param_dtype, **spread)
    x = jnp.ones((2, D), jnp.float32)
    carry = mine.initialize_carry(jax.random.key(0), x.shape)
    got, want = (cell.init(jax.random.key(5), carry, x) for cell in (mine, flaxen))
    same_bits(got, want)
    assert [*got["params"]] == [*want["params"]]
    assert [[*gate] for gate in got["params"].values()] == [[*gate] for gate in want["params"].values()]


@pytest.mark.parametrize("name", CELLS)
def test_initial_carry_bit_for_bit(name: str) -> None:
    mine, flaxen = both(name, H, carry_init=theirs.initializers.normal(), param_dtype=jnp.float32)
    for shape in ((D,), (2, D), (2, 3, D)):
        same_bits(*(cell.initialize_carry(jax.random.key(4), shape) for cell in (mine, flaxen)))


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", GATED)
def test_positional_construction(name: str) -> None:
    init = theirs.initializers
    fields = (H, jax.nn.hard_sigmoid, jax.nn.soft_sign, init.normal(), init.normal(0.5), init.ones, None, jnp.float64)
    check_step(*both(name, *fields, init.normal()), (2,), jnp.float64, 1e-12)


def test_positional_construction_of_the_simple_cell() -> None:
    init = theirs.initializers
    fields = (H, jax.nn.soft_sign, init.normal(), init.normal(0.5), init.ones, None, jnp.float64, init.normal(), True)
    check_step(*both("SimpleCell", *fields), (2,), jnp.float64, 1e-12)


def test_positional_construction_of_the_minimal_cell() -> None:
    init = theirs.initializers
    functions = (H, jax.nn.hard_sigmoid, jax.nn.soft_sign)
    inits = (init.normal(), init.normal(0.5), init.constant(2.0), init.constant(-1.0))
    cells = both("MGUCell", *functions, *inits, None, jnp.float64, init.normal(), False)
    check_step(*cells, (2,), jnp.float64, 1e-12)
    carry, x = jnp.zeros((2, H)), jnp.ones((2, D))
    same_bits(*(cell.init(jax.random.key(0), carry, x) for cell in cells))


@pytest.mark.parametrize("reset_gate", [True, False])
def test_the_bias_of_the_minimal_cell_that_a_reset_gate_needs(reset_gate: bool) -> None:
    mine, flaxen = both("MGUCell", H, reset_gate=reset_gate, param_dtype=jnp.float64)
    carry, x = jnp.zeros((2, H)), jnp.ones((2, D))
    got, want = (cell.init(jax.random.key(0), carry, x) for cell in (mine, flaxen))
    same_bits(got, want)
    assert ("bias" in got["params"]["hn"]) == reset_gate and "bias" not in got["params"]["hf"]
    cell, params = ours.functional(flaxen, want["params"])
    assert cell == rnncore.MGU(H, reset_gate=reset_gate, gate_fn=mine.gate_fn, activation_fn=mine.activation_fn)
    assert (params.recurrent_bias is not None) == reset_gate
    if reset_gate:
        with pytest.raises(ValueError, match="pick the cell's own entry"):
            ours.functional(mine, got["params"] | {"hn": {"kernel": jnp.ones((H, H))}})


@pytest.mark.parametrize("name", CELLS)
def test_the_hidden_size_is_that_of_the_carry(name: str) -> None:
    cells = both(name, H + 3, param_dtype=jnp.float64)
    x, h = normal(1, (2, D), jnp.float64), normal(2, (2, H), jnp.float64)
    carry = (h, h) if "LSTM" in name else h
    variables = some_variables(cells[1], carry, x)
    close(*(cell.apply(variables, carry, x) for cell in cells), 1e-12)
    assert jax.tree.leaves(cells[0].initialize_carry(jax.random.key(0), x.shape))[0].shape == (2, H + 3)


@pytest.mark.parametrize("name", CELLS)
def test_partitioned_initialisers_keep_their_boxes(name: str) -> None:
    kernel_init = theirs.with_partitioning(theirs.initializers.lecun_normal(), (None, "model"))
    mine, flaxen = both(name, H, kernel_init=kernel_init)
    x = normal(1, (2, D), jnp.float32)
    carry = mine.initialize_carry(jax.random.key(0), x.shape)
    got, want = (cell.init(jax.random.key(5), carry, x) for cell in (mine, flaxen))
    same_bits(got, want)
    boxed = jax.tree.leaves(got, is_leaf=lambda a: isinstance(a, theirs.Partitioned))
    assert sum(isinstance(a, theirs.Partitioned) for a in boxed) == len(mine.tree.inputs)
    close(mine.apply(got, carry, x), flaxen.apply(got, carry, x), 1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_wrong_or_missing_parameters_are_flax_errors(name: str) -> None:
    mine, _ = both(name, H)
    x = jnp.ones((2, D), jnp.float32)
    carry = mine.initialize_carry(jax.random.key(0), x.shape)
    with pytest.raises(flax.errors.ScopeCollectionNotFound):
        mine.apply({}, carry, x)
    variables = mine.init(jax.random.key(0), carry, x)
    with pytest.raises(flax.errors.ScopeParamShapeError):
        mine.apply(variables, carry, jnp.ones((2, D + 1), jnp.float32))


def test_an_lstm_carry_that_is_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected the tuple \(c, h\)"):
        ours.LSTMCell(H).init(jax.random.key(0), jnp.zeros((2, H)), jnp.zeros((2, D)))


# --------------------------------------------------------------------------------------- one step


@pytest.mark.sample(3)
@pytest.mark.parametrize(("batch", "dtype"), [((), jnp.float32), ((2, 3), jnp.float64)], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_step_and_gradients(name: str, batch: tuple[int, ...], dtype: Any) -> None:
    check_step(*both(name, H, param_dtype=dtype), batch, dtype, ATOL[jnp.dtype(dtype)])


@pytest.mark.sample(2)
@pytest.mark.parametrize("gate_fn,activation_fn", [(jax.nn.softmax, jnp.tanh), (jax.nn.hard_sigmoid, jax.nn.gelu)])
@pytest.mark.parametrize("name", GATED)
def test_step_with_other_functions(name: str, gate_fn: Any, activation_fn: Any) -> None:
    cells = both(name, H, gate_fn=gate_fn, activation_fn=activation_fn, param_dtype=jnp.float64)
    check_step(*cells, (2,), jnp.float64, 1e-12)


@pytest.mark.parametrize("residual", [False, True])
def test_step_of_the_simple_cell_with_other_fields(residual: bool) -> None:
    cells = both("SimpleCell", H, activation_fn=jax.nn.gelu, residual=residual, param_dtype=jnp.float64)
    check_step(*cells, (2,), jnp.float64, 1e-12)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", CELLS)
def test_carry_without_the_batch_of_the_inputs(name: str) -> None:
    mine, flaxen = both(name, H)
    x, carry = normal(1, (5, D), jnp.float32), mine.initialize_carry(jax.random.key(0), (D,))
    variables = some_variables(flaxen, carry, x)
    close(mine.apply(variables, carry, x), flaxen.apply(variables, carry, x), 1e-6)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", CELLS)
def test_step_in_bfloat16(name: str) -> None:
    """dtypes exactly as in Flax; values to the rounding of the sums, whose order differs."""
    mine, flaxen = both(name, H, dtype=jnp.bfloat16)
    x = normal(1, (6, D), jnp.float32)
    carry = jax.tree.map(lambda a: normal(2, a.shape, a.dtype), mine.initialize_carry(jax.random.key(0), x.shape))
    variables = some_variables(flaxen, carry, x)
    got, want = mine.apply(variables, carry, x), flaxen.apply(variables, carry, x)
    close(got, want, 3 * 2.0**-8)
    exact = flaxen.copy(dtype=None).apply(variables, carry, x)
    off = max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True))
    assert off > 1e-4  # it did compute in bfloat16


@pytest.mark.parametrize(
    "inputs,params,carries",
    [("float64", "float32", "float32"), ("bfloat16", "float32", "float64"), ("int32", "float32", "float32")],
)
@pytest.mark.parametrize("name", CELLS)
def test_dtypes_are_promoted_as_in_flax(name: str, inputs: str, params: str, carries: str) -> None:
    mine, flaxen = both(name, H, param_dtype=params)
    x = (2 * normal(1, (2, D), jnp.float32)).astype(inputs)
    carry = jax.tree.map(
        lambda a: normal(2, a.shape, a.dtype).astype(carries), mine.initialize_carry(jax.random.key(0), x.shape)
    )
    variables = some_variables(flaxen, carry, x)
    close(mine.apply(variables, carry, x), flaxen.apply(variables, carry, x), 1e-6)


# ------------------------------------------------------------------------------------- functional


@pytest.mark.sample(1)
@pytest.mark.parametrize(("library", "name"), [*((ours, name) for name in CELLS), (theirs, "GRUCell")])
def test_functional_is_the_same_network(library: Any, name: str) -> None:
    module = getattr(library, name)(H, param_dtype=jnp.float64)
    xs = normal(1, (2, 5, D), jnp.float64)
    layer = theirs.RNN(getattr(theirs, name)(H, param_dtype=jnp.float64))
    variables = some_variables(layer, xs)

    def run(variables: Any) -> jax.Array:
        cell, params = ours.functional(module, variables["params"]["cell"])
        return rnncore.unroll(cell, params, xs, initial_carry=cell.initial_carry((2,), jnp.float64))[1]

    weight = normal(2, (2, 5, H), jnp.float64)

    def both(run: Any) -> Any:
        ys, back = jax.vjp(run, variables)
        return ys, back(weight)

    close(*jax.jit(lambda: (both(run), both(lambda v: layer.apply(v, xs))))(), 1e-12)


def test_functional_shapes_and_kinds() -> None:
    expected = {"LSTMCell": (rnncore.LSTM, 4), "OptimizedLSTMCell": (rnncore.LSTM, 4), "GRUCell": (rnncore.GRU, 3),
                "MGUCell": (rnncore.MGU, 2), "SimpleCell": (rnncore.Elman, 1)}  # fmt: skip
    for name, (kind, gates) in expected.items():
        module = getattr(ours, name)(H)
        carry = module.initialize_carry(jax.random.key(0), (D,))
        cell, params = ours.functional(module, module.init(jax.random.key(0), carry, jnp.ones(D))["params"])
        assert type(cell) is kind and cell.hidden_size == H
        assert params.input_kernel.shape == (D, gates, H)
        assert params.recurrent_kernel.shape == (H, gates, H)
        assert params.bias is not None and params.bias.shape == (gates, H)
        assert jax.tree.structure(params) == jax.tree.structure(cell.init(jax.random.key(0), D))


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", CELLS)
def test_functional_takes_dtype_and_functions_from_the_module(name: str) -> None:
    fields = {"residual": True} if name == "SimpleCell" else {"gate_fn": jax.nn.hard_sigmoid}
    module = getattr(ours, name)(H, dtype=jnp.bfloat16, activation_fn=jax.nn.soft_sign, **fields)
    carry = module.initialize_carry(jax.random.key(0), (D,))
    cell, params = ours.functional(module, module.init(jax.random.key(0), carry, jnp.ones(D))["params"])
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert cell.activation_fn is jax.nn.soft_sign
    assert all(getattr(cell, field) == value for field, value in fields.items())


def test_functional_takes_boxed_and_frozen_parameters() -> None:
    kernel_init = theirs.with_partitioning(theirs.initializers.lecun_normal(), (None, "model"))
    module = ours.GRUCell(H, kernel_init=kernel_init)
    boxed = module.init(jax.random.key(0), jnp.zeros(H), jnp.ones(D))["params"]
    same_bits(ours.functional(module, flax.core.freeze(boxed))[1], ours.functional(module, theirs.meta.unbox(boxed))[1])


def test_functional_refuses_what_it_cannot_know() -> None:
    class Mine(ours.LSTMCell):
        pass

    for module in (Mine(H), theirs.remat(ours.LSTMCell)(H), theirs.ConvLSTMCell(H, (3,)), theirs.Dense(H)):
        with pytest.raises(NotImplementedError, match="expected exactly an LSTMCell"):
            ours.functional(module, {})


def test_functional_refuses_parameters_of_something_else() -> None:
    xs = jnp.ones((2, 5, D))
    layer = ours.RNN(ours.LSTMCell(H))
    variables = layer.init(jax.random.key(0), xs)
    for wrong in (variables, variables["params"], {}, None):
        with pytest.raises(ValueError, match="pick the cell's own entry"):
            ours.functional(layer.cell, wrong)
    cell = variables["params"]["cell"]
    with pytest.raises(ValueError, match="pick the cell's own entry"):
        ours.functional(ours.GRUCell(H), cell)
    with pytest.raises(ValueError, match=r"params\['if'\]\['kernel'\] has shape \(4, 4\), expected \(3, 4\)"):
        ours.functional(layer.cell, cell | {"if": {"kernel": jnp.ones((D + 1, H))}})
    with pytest.raises(ValueError, match=r"params\['hg'\]\['bias'\] has shape \(1,\), expected \(4,\)"):
        ours.functional(layer.cell, cell | {"hg": {"kernel": jnp.ones((H, H)), "bias": jnp.ones(1)}})


# ---------------------------------------------------------------------------------- the namespace


def test_other_names_are_those_of_flax() -> None:
    assert ours.Dense is theirs.Dense and ours.Conv is theirs.Conv and ours.Module is theirs.Module
    assert ours.LSTMCell is not theirs.LSTMCell and ours.RNN is not theirs.RNN
    with pytest.raises(AttributeError, match="nor has flax.linen"):
        _ = ours.NoSuchThing
