"""The cells that Flax does not have, as modules of linen and nnx, compared with the functional cells."""

from __future__ import annotations

from typing import Any

import flax.linen as flax_linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from linen_cases import close, normal, some_variables
from nnx_cases import noisy

import rnncore
from rnncore import analysis, linen, nnx
from rnncore.linen.own_cells import CELLS

D, H, B, T = 3, 4, 2, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "SLSTMCell": {"recurrence": rnncore.Heads(2)}, "LSTMPCell": {"projection_size": 2}, "LayerNormLSTMCell": {},
    "LayerNormGRUCell": {}, "MinGRUCell": {}, "MinLSTMCell": {"positive": False}, "RGLRUCell": {},
    "QRNNCell": {"pooling": "ifo"}, "LeakyCell": {"learn_tau": True, "recurrence": rnncore.Dale((1, 1, 1, -1))},
}  # fmt: skip
FLOATS = {"param_dtype": jnp.float64}


def linen_cell(name: str, **more: Any) -> Any:
    return getattr(linen, name)(H, **OPTIONS[name], **FLOATS, **more)


def nnx_cell(name: str, **more: Any) -> Any:
    return noisy(getattr(nnx, name)(D, H, **OPTIONS[name], **FLOATS, rngs=flax_nnx.Rngs(0), **more))


def runs(name: str) -> Any:
    """(carry, outputs) and gradients by linen, nnx, Flax's own RNN and `unroll`, all with the same parameters."""
    xs, lengths = normal(1, (B, T, D)), jnp.array([T, 2])
    cell = linen_cell(name)
    layer = linen.RNN(cell, return_carry=True, backend="scan")
    variables = some_variables(layer, xs)
    _, params = linen.functional(cell, variables["params"]["cell"])
    other = nnx.from_functional(nnx_cell(name), params)
    graph, state = flax_nnx.split(nnx.RNN(other, return_carry=True, backend="scan"))

    def by_unroll(weights: Any, xs: Any) -> Any:
        core, params = linen.functional(cell, weights)
        carry, ys = rnncore.unroll(core, params, xs, seq_lengths=lengths, backend="scan")
        return (carry[0] if len(carry) == 1 else tuple(carry)), ys

    def by_linen(weights: Any, xs: Any) -> Any:
        return layer.apply({"params": {"cell": weights}}, xs, seq_lengths=lengths)

    def by_nnx(weights: Any, xs: Any) -> Any:
        flax_nnx.replace_by_pure_dict(own := flax_nnx.clone(state), {"cell": weights})  # the names are the same
        return flax_nnx.merge(graph, own)(xs, seq_lengths=lengths)

    def by_flax(weights: Any, xs: Any) -> Any:
        return flax_linen.RNN(linen_cell(name), return_carry=True).apply({"params": {"cell": weights}}, xs)

    def of(run: Any, weights: Any, xs: Any) -> Any:
        out, back = jax.vjp(run, weights, xs)
        return out, back(jax.tree.map(lambda a: normal(5, a.shape), out))

    ways = {"unroll": by_unroll, "linen": by_linen, "nnx": by_nnx}
    weights = variables["params"]["cell"]
    return jax.jit(lambda: {way: of(run, weights, xs) for way, run in ways.items()} | {"flax": by_flax(weights, xs)})()


@pytest.mark.ci
@pytest.mark.sample(3)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_way_to_run_it_gives_the_same(name: str):
    found = runs(name)
    close(found["linen"], found["unroll"])
    close(found["nnx"], found["unroll"])
    close(found["flax"][1][0], found["unroll"][0][1][0])  # of the sequence that has full length


def test_all_of_them_are_here():
    assert sorted(OPTIONS) == sorted(cell.__name__ for cell in CELLS)
    assert sorted(OPTIONS) == sorted(cell.__name__ for cell in nnx.own_cells.CELLS)
    for name in OPTIONS:
        for core in (linen_cell(name).core, nnx_cell(name).core):
            assert type(core).__name__ == name.removesuffix("Cell") and core.hidden_size == H
            assert all(getattr(core, option) == value for option, value in OPTIONS[name].items())


@pytest.mark.ci
@pytest.mark.parametrize("name", ["LSTMPCell", "RGLRUCell", "QRNNCell"])
def test_initial_values_carries_and_both_directions(name: str):
    xs, size = jnp.ones((B, T, D)), 2 if name == "LSTMPCell" else H
    layer = linen.Bidirectional(*(linen.RNN(linen_cell(name)) for _ in range(2)))
    ys, variables = layer.init_with_output(jax.random.key(0), xs)
    other = nnx.Bidirectional(*(nnx.RNN(nnx_cell(name)) for _ in range(2)))(xs)
    assert ys.shape == other.shape == (B, T, 2 * size)
    own = variables["params"]["forward_rnn"]["cell"]
    assert {a.dtype for a in own.values()} == {jnp.dtype("float64")} and not own["bias"].any()
    assert abs(float(own["input_kernel"].std()) - D**-0.5) < 0.25
    if name == "RGLRUCell":
        assert (own["units_decay"] < 0).all()
    carry = linen_cell(name, carry_init=flax_linen.initializers.normal()).initialize_carry(jax.random.key(0), (B, D))
    again = nnx_cell(name, carry_init=flax_nnx.initializers.normal()).initialize_carry((B, D), flax_nnx.Rngs(1))
    for leaves in (jax.tree.leaves(carry), jax.tree.leaves(again)):
        assert [a.shape for a in leaves] == ([(B, H)] if name == "RGLRUCell" else [(B, H), (B, size)])
        assert all(np.std(a) > 0 for a in leaves) and leaves[0].dtype == jnp.float64


def test_the_analysis_takes_them():
    xs = normal(1, (B, T, D), jnp.float32)
    model = linen.RNN(linen.LayerNormGRUCell(H))  # not a pointwise cell
    variables = some_variables(model, xs)
    run = analysis.trajectory(model, variables, xs)
    assert type(run.cell) is rnncore.LayerNormGRU and run.gates._fields == ("r", "z", "n")
    close(run.carries.h[:, 1:], model.apply(variables, xs), 1e-6)


def test_what_makes_no_sense():
    with pytest.raises(TypeError, match="there is no such option; it has .*pooling"):
        nnx.QRNNCell(D, H, window=2, rngs=flax_nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"params\['bias'\] has shape \(4,\), expected \(2, 4\)"):
        weights = linen.MinGRUCell(H).init(jax.random.key(0), jnp.zeros(H), jnp.ones(D))["params"]
        linen.functional(linen.MinGRUCell(H), weights | {"bias": jnp.zeros(H)})
    cell = rnncore.MinGRU(H + 1)
    with pytest.raises(ValueError, match="input_kernel has shape"):
        nnx.from_functional(nnx.MinGRUCell(D, H, rngs=flax_nnx.Rngs(0)), cell.init(jax.random.key(0), D))


def test_initialisers_that_draw_boxes_are_refused():
    init = flax_linen.with_partitioning(flax_linen.initializers.lecun_normal(), (None, "h"))
    with pytest.raises(NotImplementedError, match=r"MinGRUCell\(kernel_init=...\)`: draws a <Partitioned>"):
        linen.RNN(linen.MinGRUCell(H, kernel_init=init)).init(jax.random.key(0), jnp.ones((B, T, D)))
