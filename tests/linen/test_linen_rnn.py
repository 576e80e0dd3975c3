"""RNN of rnncore.linen: values and gradients held to flax.linen."""

from __future__ import annotations

import flax.linen as theirs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_cases import (
    CELLS,
    OPTIONS,
    B,
    D,
    H,
    T,
    check_call,
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


@pytest.mark.sample(1)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, unrolled: list) -> None:
    check_call("OptimizedLSTMCell", f64, 1e-12, (3,), OPTIONS[options])
    assert len(unrolled) == 1


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "name,options", [("LSTMCell", "all"), ("SimpleCell", "all"), ("GRUCell", "all"), ("GRUCell", "reverse")]
)
def test_options_of_the_other_cells(name: str, options: str, unrolled: list) -> None:
    check_call(name, f64, 1e-12, (3,), OPTIONS[options])
    assert len(unrolled) == 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", CELLS)
def test_single_precision(name: str) -> None:
    check_call(name, f32, 5e-6, (3,), OPTIONS["lengths"])


@pytest.mark.sample(1)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_number_of_batch_axes(batch: tuple[int, ...]) -> None:
    check_call("LSTMCell", f64, 1e-12, batch, {})
    check_call("SimpleCell", f64, 1e-12, batch, dict(time_major=True, reverse=True))


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", CELLS)
def test_other_functions(name: str, unrolled: list) -> None:
    fields = dict(residual=True) if name == "SimpleCell" else dict(gate_fn=jax.nn.hard_sigmoid)
    check_call(name, f64, 1e-12, (2,), {}, activation_fn=jax.nn.gelu, **fields)
    assert len(unrolled) == 1


def test_fields_and_call_arguments_say_the_same() -> None:
    options = dict(time_major=True, return_carry=True, reverse=True, keep_order=True)
    xs, lengths = normal(1, (T, B, D), f32), jnp.array([2, T])
    by_field, by_call = ours.RNN(ours.GRUCell(H), **options), ours.RNN(ours.GRUCell(H))
    variables = by_field.init(jax.random.key(0), xs)
    got = by_field.apply(variables, xs, seq_lengths=lengths)
    same_bits(got, by_call.apply(variables, xs, seq_lengths=lengths, **options))
    close(got, theirs.RNN(theirs.GRUCell(H), **options).apply(variables, xs, seq_lengths=lengths), 1e-6)
    off = by_field.apply(variables, xs, **dict.fromkeys(options, False))
    close(off, by_call.apply(variables, xs), 1e-6)
    assert isinstance(off, jax.Array)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_random_initial_carry(name: str) -> None:
    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.RNN(getattr(nn, name)(H, carry_init=theirs.initializers.normal(1.0))) for nn in (ours, theirs))
    variables = flaxen.init(jax.random.key(0), xs)
    for key in (None, jax.random.key(8)):
        close(mine.apply(variables, xs, init_key=key), flaxen.apply(variables, xs, init_key=key), 1e-6)
    moved = mine.apply(variables, xs, init_key=jax.random.key(8)) - mine.apply(variables, xs)
    assert jnp.abs(moved).max() > 1e-2


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["OptimizedLSTMCell", "GRUCell"])
def test_bfloat16(name: str) -> None:
    """dtypes exactly as in Flax; values to the rounding of sums whose order differs."""
    xs, carry = normal(1, (B, T, D), f32), start(name, dtype=f32)
    mine, flaxen = (nn.RNN(getattr(nn, name)(H, dtype=jnp.bfloat16), return_carry=True) for nn in (ours, theirs))
    variables = some_variables(flaxen, xs)
    (got, got_gradients), (want, gradients) = (with_gradients(m, variables, xs, carry) for m in (mine, flaxen))
    close(got, want, 4 * 2.0**-8)
    for a, b in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(gradients), strict=True):
        assert a.dtype == b.dtype
        assert jnp.linalg.norm(a - b) < 0.03 * jnp.linalg.norm(b)


@pytest.mark.sample(1)
@pytest.mark.parametrize("cell", [ours.SimpleCell, foreign("SimpleCell"), theirs.remat(ours.SimpleCell)])
def test_simple_cell_in_bfloat16_runs_where_flax_fails(cell: type) -> None:
    xs = normal(1, (B, T, D), f32)
    with pytest.raises(TypeError, match="carry"):
        theirs.RNN(theirs.SimpleCell(H, dtype=jnp.bfloat16)).init(jax.random.key(0), xs)
    layer = ours.RNN(cell(H, dtype=jnp.bfloat16), return_carry=True)
    variables = layer.init(jax.random.key(0), xs)
    h, ys = layer.apply(variables, xs)
    assert (h.dtype, ys.dtype) == (f32, jnp.bfloat16)
    exact = theirs.RNN(theirs.SimpleCell(H)).apply(variables, xs)
    np.testing.assert_allclose(ys.astype(f32), exact, rtol=0, atol=0.03)
    gradients = jax.grad(lambda v: projected(layer.apply(v, xs)).astype(f32))(variables)
    wanted = jax.grad(lambda v: projected(layer.clone(cell=ours.SimpleCell(H)).apply(v, xs)))(variables)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == f32
        assert jnp.linalg.norm(a - b) < 0.05 * jnp.linalg.norm(b)


def test_integer_inputs_as_in_flax() -> None:
    xs = jax.nn.one_hot(jnp.array([[0, 2, 1], [1, 1, 0]]), D, dtype=jnp.int32)
    mine, flaxen = (nn.RNN(nn.GRUCell(H)) for nn in (ours, theirs))
    variables = mine.init(jax.random.key(0), xs)
    close(mine.apply(variables, xs), flaxen.apply(variables, xs), 1e-6)
