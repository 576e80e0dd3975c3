"""Cells of rnncore.nnx: steps, the cells and options that Flax has not, dtypes."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as theirs
from nnx_cases import (
    CELLS,
    NEW,
    B,
    D,
    H,
    Layer,
    T,
    bf16,
    both,
    close,
    compare,
    f16,
    f32,
    f64,
    make,
    noisy,
    normal,
    pure,
    same_bits,
    start,
)

from rnncore import analysis
from rnncore import nnx as ours

# -------------------------------------------------------------------------------------------- steps


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", CELLS)
def test_a_step_is_that_of_flax_bit_for_bit(name: str) -> None:
    """One program: the cells hold no step of their own where Flax has one."""
    for batch, options in (((), {}), ((2, 3), dict(dtype=bf16))):
        programs = []
        for cell in (make(ours, name, **options), make(theirs, name, **options)):
            graph, params = theirs.split(cell)
            programs.append(
                jax.make_jaxpr(lambda params, carry, x, graph=graph: theirs.merge(graph, params)(carry, x))(
                    params, start(name, batch, f32), normal(1, (*batch, D), f32)
                )
            )
        assert str(programs[0]) == str(programs[1])


def test_steps_of_other_parts_and_functions_are_those_of_flax() -> None:
    x, h = normal(1, (B, D), f32), start("GRUCell", dtype=f32)
    cells = both("GRUCell", gate_fn=jax.nn.softmax, promote_dtype=lambda arrays, *, dtype=None, inexact=True: arrays)
    for cell in cells:
        cell.dense_i = theirs.LoRALinear(D, 3 * H, lora_rank=2, rngs=theirs.Rngs(2))
    mine, flaxen = map(noisy, cells)
    same_bits(mine(h, x), flaxen(h, x))


def subclassed(cell: Any) -> Any:
    """The same cell as a subclass, so that an RNN takes its `__call__`."""
    cls = type("Sub", (type(cell),), {})
    graph, state = theirs.split(cell)
    other = make(type("library", (), {cls.__name__: cls}), cls.__name__, **sub_options(cell))
    theirs.update(other, state)
    return other


def sub_options(cell: Any) -> dict[str, Any]:
    options: dict[str, Any] = dict(param_dtype=cell.param_dtype)
    if hasattr(cell, "reset_gate"):
        options["reset_gate"] = cell.reset_gate
    elif hasattr(cell, "b_hn"):
        options["recurrent_bias"] = cell.b_hn is not None
    return options


NEW_CELLS = [*NEW.items(), ("MGUCell", dict(reset_gate=False))]
OPTIONS = dict(seq_lengths=jnp.array([0, 2, T]), reverse=True)


def two_ways(name: str, options: dict[str, Any]) -> list:
    """Layers that run a cell through rnncore.unroll, and as a subclass under nnx.scan."""
    cell = noisy(make(ours, name, param_dtype=f64, **options))
    return [Layer(ours.RNN(c, return_carry=True)) for c in (cell, subclassed(cell))]


def test_the_sequence_of_a_new_cell_is_its_step_again_and_again(unrolled: list) -> None:
    layers = [two_ways(name, options) for name, options in NEW_CELLS]
    xs, carry = normal(1, (3, T, D)), start("", (3,))

    @jax.jit
    def run() -> Any:
        return [[theirs.clone(layer)(xs, carry, **OPTIONS) for layer in pair] for pair in layers]

    for got, want in run():
        close(got, want)
    assert len(unrolled) == len(NEW_CELLS)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name,options", [("MGUCell", {}), ("GRUCell", dict(recurrent_bias=True))], ids=str)
def test_gradients_of_the_new_biases_and_gates(name: str, options: dict[str, Any]) -> None:
    compare(*two_ways(name, options), normal(1, (3, T, D)), start("", (3,)), **OPTIONS)


# ------------------------------------------------------------------------------- new cells and options


def joined(params: Any, names: str, leaf: str) -> jax.Array:
    """Gates of a linen cell beside each other."""
    return jnp.concatenate([params[n][leaf] for n in names.split()], -1)


@pytest.mark.parametrize("reset_gate", [True, False])
def test_mgu_is_that_of_linen(reset_gate: bool) -> None:
    flaxen = linen.MGUCell(H, reset_gate=reset_gate, param_dtype=f64)
    x, h = normal(1, (B, D)), start("MGUCell")
    shapes, tree = jax.tree.flatten(jax.eval_shape(lambda: flaxen.init(jax.random.key(0), h, x)["params"]))
    params = tree.unflatten([normal(i, a.shape, a.dtype) for i, a in enumerate(shapes)])
    mine = make(ours, "MGUCell", reset_gate=reset_gate, param_dtype=f64)
    mine.dense_i.kernel[...] = joined(params, "if in", "kernel")
    mine.dense_i.bias[...] = joined(params, "if in", "bias")
    mine.dense_h.kernel[...] = joined(params, "hf hn", "kernel")
    assert (mine.b_hn is not None) == reset_gate
    if reset_gate:
        mine.b_hn[...] = params["hn"]["bias"]
    close(mine(h, x), flaxen.apply({"params": params}, h, x))


def test_initial_values_of_the_new_cells() -> None:
    mgu = make(ours, "MGUCell")
    np.testing.assert_array_equal(mgu.dense_i.bias[...], np.repeat([1.0, 0.0], H))
    assert not mgu.b_hn[...].any()
    for block in jnp.split(mgu.dense_h.kernel[...], 2, axis=-1):
        np.testing.assert_allclose(block @ block.T, np.eye(H), atol=1e-5)
    ind = make(ours, "IndRNNCell", size=5)
    assert ind.u.shape == (H,) and ((ind.u[...] >= 0) & (ind.u[...] <= 1)).all() and ind.u[...].std() > 0
    biased = make(ours, "GRUCell", recurrent_bias=True)
    same_bits(pure(theirs.state(biased, lambda path, _: "b_hn" not in path)), pure(theirs.state(make(ours, "GRUCell"))))
    ones = make(ours, "GRUCell", recurrent_bias=True, bias_init=theirs.initializers.ones)
    assert ones.b_hn[...].tolist() == [1.0] * H


def test_ind_rnn_step() -> None:
    cell = noisy(make(ours, "IndRNNCell", param_dtype=f64))
    x, h = normal(1, (B, D)), start("IndRNNCell")
    want = jax.nn.relu(x @ cell.dense_i.kernel[...] + cell.dense_i.bias[...] + cell.u[...] * h)
    close(cell(h, x), (want, want))


def test_parameters_of_a_linen_gru_need_its_recurrent_bias() -> None:
    flaxen, x, h = linen.GRUCell(H, param_dtype=f64), normal(1, (B, D)), start("GRUCell")
    shapes, tree = jax.tree.flatten(jax.eval_shape(lambda: flaxen.init(jax.random.key(0), h, x)["params"]))
    params = tree.unflatten([normal(i, a.shape, a.dtype) for i, a in enumerate(shapes)])
    want = flaxen.apply({"params": params}, h, x)
    off = []
    for recurrent_bias in (True, False):
        mine = make(ours, "GRUCell", recurrent_bias=recurrent_bias, param_dtype=f64)
        mine.dense_i.kernel[...] = joined(params, "ir iz in", "kernel")
        mine.dense_i.bias[...] = joined(params, "ir iz in", "bias")
        mine.dense_h.kernel[...] = joined(params, "hr hz hn", "kernel")
        if recurrent_bias:
            mine.b_hn[...] = params["hn"]["bias"]
        off.append(float(jnp.abs(mine(h, x)[0] - want[0]).max()))
    assert off[0] < 1e-12 and off[1] > 1e-2
    assert "b_hn" not in pure(theirs.state(make(theirs, "GRUCell")))


def test_parameters_of_a_torch_gru() -> None:
    """Stored values of torch.nn.GRU(bidirectional=True); its biases on r and z add up."""
    with np.load(pathlib.Path(__file__).parent.parent / "golden" / "torch.npz") as file:
        values = {name.removeprefix("gru/"): jnp.asarray(a) for name, a in file.items() if name.startswith("gru/")}
    children = []
    for suffix in ("l0", "l0_reverse"):
        cell = make(ours, "GRUCell", recurrent_bias=True, param_dtype=f64)
        second = values[f"bias_hh_{suffix}"]
        cell.dense_i.kernel[...] = values[f"weight_ih_{suffix}"].T
        cell.dense_h.kernel[...] = values[f"weight_hh_{suffix}"].T
        cell.dense_i.bias[...] = values[f"bias_ih_{suffix}"] + second.at[2 * H :].set(0)
        cell.b_hn[...] = second[2 * H :]
        children.append(ours.RNN(cell))
    layer = ours.Bidirectional(*children, return_carry=True)
    lengths = values["lengths"]
    last, ys = jax.jit(layer)(values["xs"], initial_carry=tuple(values["h_0"]), seq_lengths=lengths)
    inside = (jnp.arange(T) < lengths[:, None])[..., None]
    close((jnp.stack(last), jnp.where(inside, ys, 0)), (values["packed.h_n"], values["packed.outputs"]))


@pytest.mark.sample(1)
@pytest.mark.parametrize("name,gates", [("OptimizedLSTMCell", 4), ("GRUCell", 3)])
def test_per_gate_initial_values(name: str, gates: int) -> None:
    """Flax's blocks share one orthogonal matrix, so their mean square is 1 / gates; ours on demand have 1."""
    size = 32

    def blocks(nn: Any, **options: Any) -> np.ndarray:
        cell = getattr(nn, name)(D, size, rngs=theirs.Rngs(0), **options)
        return np.asarray(cell.dense_h.kernel[...]).reshape(size, gates, size)

    plain, fixed = blocks(theirs), blocks(ours, per_gate_init=True)
    assert np.array_equal(blocks(ours), plain)
    for g in range(gates):
        block = fixed[:, g]
        np.testing.assert_allclose(block @ block.T, np.eye(size), atol=1e-5)
        values = np.linalg.svd(plain[:, g], compute_uv=False)
        assert abs((values**2).mean() - 1 / gates) < 0.03 and values.max() < 0.97
    assert np.abs(fixed[:, 0] - fixed[:, 1]).max() > 0.1
    drawn = blocks(ours, per_gate_init=True, recurrent_kernel_init=theirs.initializers.normal(0.1))
    assert abs(drawn.std() - 0.1) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name,plain,fixed", [("OptimizedLSTMCell", -12.4, -9.9), ("GRUCell", -11.3, -9.1)])
def test_retention_at_the_start_is_what_the_docstring_says(name: str, plain: float, fixed: float) -> None:
    xs = jax.random.normal(jax.random.key(1), (4, 50, 32), f32)
    for per_gate_init, said in ((False, plain), (True, fixed)):
        layer = getattr(ours, name)(32, 64, per_gate_init=per_gate_init, rngs=theirs.Rngs(0))
        run = analysis.trajectory(*ours.functional(layer), xs)
        curve = analysis.retention_curve(run, kind="rms", path="state", lags=(50,))
        assert abs(float(curve.log10.mean()) - said) < 0.25
        assert f"10^{said}" in " ".join(getattr(ours, name).__doc__.split())


# ------------------------------------------------------------------------------------------- dtypes


EVERY = [*((name, {}) for name in CELLS), *NEW_CELLS[:3]]


HALF = [*((*every, bf16) for every in EVERY), ("OptimizedLSTMCell", {}, f16)]


@pytest.mark.sample(5)
@pytest.mark.parametrize("name,options,dtype", HALF, ids=str)
def test_recurrent_kernels_in_half_precision_are_the_rounded_ones(name: str, options: Any, dtype: Any) -> None:
    """Flax's orthogonal matrix fails in half precision, but for its LSTMCell's."""
    if name in CELLS and name != "LSTMCell":
        with pytest.raises((NotImplementedError, TypeError), match="dtype"):
            make(theirs, name, param_dtype=dtype)
    half, single = (pure(theirs.state(make(ours, name, param_dtype=d, **options))) for d in (dtype, f32))
    assert {a.dtype for a in jax.tree.leaves(half)} == {jnp.dtype(dtype)}
    for side in {"dense_h", "hi", "hf", "hg", "ho"} & half.keys():
        same_bits(half[side]["kernel"], single[side]["kernel"].astype(dtype))


def run_dtypes(nn: Any, name: str, x: Any, dtype: Any, param_dtype: Any, carry: Any, more: Any) -> Any:
    """dtypes of (carry, outputs) of a run and of one step, traced only; with an initialiser that Flax can draw."""
    options = {} if dtype == "default" else dict(dtype=dtype)
    init = {} if name == "IndRNNCell" else dict(recurrent_kernel_init=theirs.initializers.normal())

    def run(xs: Any) -> Any:
        cell = getattr(nn, name)(D, H, param_dtype=param_dtype, rngs=theirs.Rngs(0), **options, **init, **more)
        start = jnp.zeros((B, H), param_dtype if carry is None else carry)
        start = (start, start) if "LSTM" in name else start
        given = {} if carry is None else dict(initial_carry=start)
        return nn.RNN(cell, return_carry=True)(xs, **given), cell(start, xs[:, 0])

    return jax.tree.map(lambda a: a.dtype, jax.eval_shape(run, jax.ShapeDtypeStruct((B, 2, D), x)))


HALVES = [*itertools.product(("default", f32, bf16, f16), (f32, bf16, f16), (None, f32, bf16, f16))]
WIDE = [("default", f64, f32), ("default", f32, f64), (f64, f32, None), (f32, f64, None), (bf16, f64, f64)]
SMALL = [("default", bf16, None), ("default", f16, f32), (f32, bf16, None)]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name,options", EVERY, ids=str)
def test_dtypes_are_those_of_flax_and_every_combination_runs(name: str, options: Any) -> None:
    """The carry keeps its dtype, outputs have that of a step; Flax fails where the step's carry has another."""
    known = name in CELLS and not options
    # None and the parameters' dtype say the same of the carry.
    combinations = [(f32, *c) for c in HALVES + WIDE if c[2] != c[1]] + [(bf16, *c) for c in SMALL]
    ran = failed = 0
    for x, dtype, param_dtype, carry in combinations if known else combinations[::4]:
        got = run_dtypes(ours, name, x, dtype, param_dtype, carry, options)
        (last, outputs), (step_last, step_output) = got
        assert {*jax.tree.leaves(last)} == {jnp.dtype(param_dtype if carry is None else carry)}
        assert outputs == step_output
        if known and step_last == last:
            assert run_dtypes(theirs, name, x, dtype, param_dtype, carry, {}) == got
            ran += 1
        elif known and failed < 3:
            with pytest.raises(TypeError, match="carry"):
                run_dtypes(theirs, name, x, dtype, param_dtype, carry, {})
            failed += 1
    assert not known or (ran >= 10 and failed == 3)


@pytest.mark.parametrize("nn", [ours, theirs], ids=["unroll", "nnx.scan"])
def test_carry_and_output_dtypes_can_be_chosen(nn: Any) -> None:
    def run(**options: Any) -> Any:
        cell = make(nn, "LSTMCell", gate_fn=jax.nn.softmax if nn is theirs else jax.nn.sigmoid)
        return ours.RNN(cell, return_carry=True, **options)(jnp.ones((B, T, D), f32), return_states=True)

    for carry, output in itertools.product((None, f64, bf16), (None, f16)):
        dtypes = jax.tree.map(
            lambda a: a.dtype, jax.eval_shape(lambda c=carry, o=output: run(carry_dtype=c, output_dtype=o))
        )
        last, outputs, states = dtypes
        assert {*last, *states.carries} == {jnp.dtype(carry or f32)}
        assert outputs == jnp.dtype(output or (f64 if carry == f64 else f32))
    with pytest.raises(ValueError, match="carry_dtype=.*expected a floating dtype"):
        run(carry_dtype=jnp.int32)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_complex_numbers_run_as_in_flax(name: str, unrolled: list) -> None:
    xs = normal(1, (B, T, D), f32) + 1j * normal(2, (B, T, D), f32)
    options = dict(param_dtype=xs.dtype, recurrent_kernel_init=theirs.initializers.normal())
    mine, flaxen = both(name, **options)
    layers = ours.RNN(mine, return_carry=True), theirs.RNN(flaxen, return_carry=True, rngs=False)
    carry = start(name, (B,), f32)
    carry = jax.tree.map(lambda a: a.astype(xs.dtype) * 1j, carry)
    got, want = jax.jit(lambda: [theirs.clone(layer)(xs, initial_carry=carry) for layer in layers])()
    assert {a.dtype for a in jax.tree.leaves(got)} == {xs.dtype} and not unrolled
    chex.assert_trees_all_close(got, want, rtol=0, atol=2e-6)
