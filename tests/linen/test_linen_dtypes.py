"""Dtypes of the linen layers: Flax's wherever Flax runs, and the documented ones where it fails."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import chex
import flax.linen as theirs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_cases import CELLS, B, D, H, close, f32, foreign, normal, projected, same_bits, some_variables

from rnncore import linen as ours

T, SPACE = 4, 5
bf16, f16 = jnp.bfloat16, jnp.float16
ALL = (*CELLS, "ConvLSTMCell")
# (dtype, param_dtype, dtype of the initial carry or None for the cell's own)
MATRIX = list(itertools.product((None, f32, bf16, f16), (f32, bf16, f16), (None, f32, bf16, f16)))


def cell_of(library: Any, name: str, **fields: Any) -> Any:
    if name == "ConvLSTMCell":
        fields["kernel_size"] = (3,)
    elif library is theirs:
        # With JAX 0.12 the QR of orthogonal() keeps Flax from applying half-precision parameters too.
        fields.setdefault("recurrent_kernel_init", theirs.initializers.lecun_normal())
    return getattr(library, name)(features=H, **fields)


def inputs_of(name: str, dtype: Any = f32) -> jax.Array:
    return normal(1, (B, T, SPACE, D) if name == "ConvLSTMCell" else (B, T, D), dtype)


@functools.cache
def carry_of(name: str, dtype: Any) -> Any:
    shape = (B, SPACE, H) if name == "ConvLSTMCell" else (B, H)
    h = (0.5 * normal(2, shape, f32)).astype(dtype)
    return (h, -h) if "LSTM" in name else h


@functools.cache
def variables_of(name: str, param_dtype: Any) -> Any:
    exact = some_variables(theirs.RNN(cell_of(theirs, name)), inputs_of(name))
    return jax.tree.map(lambda a: a.astype(param_dtype), exact)


def the_dtype(tree: Any) -> Any:
    (dtype,) = {a.dtype for a in jax.tree.leaves(tree)}
    return dtype


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ALL)
def test_every_combination_of_dtypes(name: str) -> None:
    """The carry keeps its dtype; the outputs have that of one step's output, which Flax's cell tells."""
    xs, failed = inputs_of(name), 0
    for dtype, param_dtype, carry_dtype in MATRIX:
        carry = None if carry_dtype is None else carry_of(name, carry_dtype)
        mine, flaxen = (cell_of(nn, name, dtype=dtype, param_dtype=param_dtype) for nn in (ours, theirs))
        variables = variables_of(name, param_dtype)

        def run(nn: Any, cell: Any, variables: Any = variables, carry: Any = carry) -> Any:
            layer = nn.RNN(cell, return_carry=True)
            return jax.eval_shape(lambda v, x, c: layer.apply(v, x, initial_carry=c), variables, xs, carry)

        last, ys = run(ours, mine)
        own = carry_of(name, param_dtype) if carry is None else carry
        assert the_dtype(last) == the_dtype(own)
        try:
            wanted, wanted_ys = run(theirs, flaxen)
        except TypeError as error:
            assert "carry" in str(error)
            failed += 1
            _, y = jax.eval_shape(flaxen.apply, {"params": variables["params"]["cell"]}, own, xs[:, 0])
            assert ys.dtype == y.dtype
        else:
            assert (the_dtype(last), ys.dtype) == (the_dtype(wanted), wanted_ys.dtype)
    assert failed == (32 if name == "SimpleCell" else 24)


EVERYWHERE: list[tuple[Any, Any, Any]] = [(None, f16, f32), (bf16, bf16, bf16)]
NOT_IN_THE_SIMPLE_CELL: list[tuple[Any, Any, Any]] = [(f16, f32, f32)]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["LSTMCell", "MGUCell", "SimpleCell", "ConvLSTMCell"])
def test_values_and_gradients_where_flax_runs(name: str) -> None:
    """To the rounding of the steps' sums, whose order differs; in half precision T steps pass it on."""
    cases = EVERYWHERE if name == "SimpleCell" else EVERYWHERE + NOT_IN_THE_SIMPLE_CELL
    arguments = [(variables_of(name, params), carry_of(name, carry)) for _, params, carry in cases]

    @jax.jit
    def run(xs: jax.Array, arguments: list) -> list:
        out = []
        for (dtype, param_dtype, _), args in zip(cases, arguments, strict=True):

            def loss(variables: Any, carry: Any, layer: Any) -> Any:
                out = layer.apply(variables, xs, initial_carry=carry)
                return projected(out).astype(f32), out

            for nn in (ours, theirs):
                layer = nn.RNN(cell_of(nn, name, dtype=dtype, param_dtype=param_dtype), return_carry=True)
                out.append(jax.grad(loss, argnums=(0, 1), has_aux=True)(*args, layer))
        return out

    got = run(inputs_of(name), arguments)
    for (dtype, param_dtype, carry_dtype), mine, flaxen in zip(cases, got[::2], got[1::2], strict=True):
        least = dtype or jnp.result_type(f32, param_dtype)
        eps = max(float(jnp.finfo(a).eps) for a in (least, carry_dtype))
        close(mine[1], flaxen[1], 2 * T * eps)
        for a, b in zip(jax.tree.leaves(mine[0]), jax.tree.leaves(flaxen[0]), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            rounding = max(eps, float(jnp.finfo(a.dtype).eps))
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert np.linalg.norm(a - b) < 4 * T * rounding * np.linalg.norm(b)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", [name for name in ALL if name != "OptimizedLSTMCell"])
def test_values_where_flax_fails(name: str) -> None:
    """Half-precision parameters and carry, as the defaults make them: float32 throughout, to their rounding."""
    halves = (bf16, f16)

    @jax.jit
    def run(xs: jax.Array, arguments: list) -> list:
        out = []
        for half, (variables, carry) in zip(halves, arguments, strict=True):
            exact = jax.tree.map(lambda a: a.astype(f32), (variables, carry))
            layer = theirs.RNN(cell_of(theirs, name), return_carry=True)
            wanted = layer.apply(exact[0], xs, initial_carry=exact[1])
            layer = ours.RNN(cell_of(ours, name, param_dtype=half), return_carry=True)
            out.append((layer.apply(variables, xs, initial_carry=carry), wanted))
        return out

    got = run(inputs_of(name), [(variables_of(name, half), carry_of(name, half)) for half in halves])
    for half, ((last, ys), wanted) in zip(halves, got, strict=True):
        assert (the_dtype(last), ys.dtype) == (half, f32)
        close(jax.tree.map(lambda a: a.astype(f32), (last, ys)), wanted, 2 * T * float(jnp.finfo(half).eps))


@pytest.mark.parametrize("name", ["OptimizedLSTMCell", "SimpleCell"])
def test_complex_numbers_run_as_in_flax(name: str, unrolled: list) -> None:
    """Of parameters or of inputs, under nn.scan; padding and lengths as with real ones."""
    xs = inputs_of(name) + 1j * inputs_of(name)[::-1]
    mine, flaxen = (nn.RNN(cell_of(nn, name, param_dtype=xs.dtype), return_carry=True) for nn in (ours, theirs))
    variables = jax.tree.map(lambda a: a.astype(xs.dtype) * (1 + 0.5j), variables_of(name, f32))
    lengths = jnp.array([2, T])

    @jax.jit
    def run(variables: Any, xs: jax.Array) -> Any:
        def of(layer: Any) -> Any:
            return layer.apply(variables, xs), layer.apply(variables, xs.real, seq_lengths=lengths)

        return of(mine), of(flaxen)

    got, want = run(variables, xs)
    assert the_dtype(got) == xs.dtype and not unrolled
    chex.assert_trees_all_close(got, want, rtol=0, atol=2e-6)
    with pytest.raises(NotImplementedError, match="recompute means nothing, because its numbers are complex"):
        mine.copy(recompute="gates").apply(variables, xs)


# ----------------------------------------------------------------------------- initial values in half


@pytest.mark.sample(2)
@pytest.mark.parametrize("half", [bf16, f16])
@pytest.mark.parametrize("name", CELLS)
def test_parameters_in_half_precision_can_be_drawn(name: str, half: Any) -> None:
    """Flax fails in the QR of orthogonal(); ours draws in float32 and rounds, and draws the rest as Flax does."""

    def drawn(nn: Any, dtype: Any, **fields: Any) -> Any:
        cell = cell_of(nn, name, param_dtype=dtype, **fields)
        return cell.init(jax.random.key(5), carry_of(name, dtype), inputs_of(name)[:, 0])["params"]

    with pytest.raises((NotImplementedError, TypeError), match="float16"):
        drawn(theirs, half, recurrent_kernel_init=theirs.LSTMCell.recurrent_kernel_init)
    variables, single = drawn(ours, half), drawn(ours, f32)
    as_flax = drawn(theirs, half)
    for gate, weights in variables.items():
        assert the_dtype(weights) == half
        if gate.startswith("h"):
            same_bits(weights["kernel"], single[gate]["kernel"].astype(half))
        else:
            same_bits(weights, as_flax[gate])


def test_orthogonal_that_the_user_passes_or_wraps_can_be_drawn_too() -> None:
    init = theirs.with_partitioning(theirs.initializers.orthogonal(0.5, column_axis=0), (None, "model"))
    layer, xs = ours.RNN(ours.SimpleCell(H, recurrent_kernel_init=init)), inputs_of("SimpleCell")
    half, single = (
        layer.clone(cell=layer.cell.clone(param_dtype=dtype)).init(jax.random.key(5), xs)["params"]["cell"]["h"]
        for dtype in (bf16, f32)
    )
    assert isinstance(half["kernel"], theirs.Partitioned) and half["kernel"].names == (None, "model")
    same_bits(half["kernel"].value, single["kernel"].value.astype(bf16))


def test_other_initialisers_draw_half_precision_as_flax_does() -> None:
    fields = dict(recurrent_kernel_init=theirs.initializers.normal(), param_dtype=bf16)
    x, h = inputs_of("GRUCell")[:, 0], carry_of("GRUCell", bf16)
    same_bits(*(nn.GRUCell(H, **fields).init(jax.random.key(3), h, x) for nn in (ours, theirs)))


# ------------------------------------------------------------------------- carry_dtype and output_dtype


@pytest.mark.parametrize("kind", ["ours", "foreign", "conv"])
def test_carry_dtype_and_output_dtype(kind: str, unrolled: list) -> None:
    """As casting the initial carry and the outputs by hand, on both ways."""
    name = "ConvLSTMCell" if kind == "conv" else "LSTMCell"
    cell = foreign(name)(H) if kind == "foreign" else cell_of(ours, name)
    xs, variables, carry = inputs_of(name), variables_of(name, f32), carry_of(name, f32)
    plain = ours.RNN(cell, return_carry=True)
    cast = ours.RNN(cell, return_carry=True, carry_dtype=bf16, output_dtype=f16)
    lengths = jnp.array([2, T])

    @jax.jit
    def run(variables: Any, xs: jax.Array, carry: Any) -> Any:
        options = dict(seq_lengths=lengths, return_states=True)
        by_hand = plain.apply(variables, xs, initial_carry=jax.tree.map(lambda a: a.astype(bf16), carry), **options)
        return cast.apply(variables, xs, initial_carry=carry, **options), by_hand

    (last, ys, states), (wanted, wanted_ys, wanted_states) = run(variables, xs, carry)
    assert (the_dtype(last), ys.dtype, the_dtype(states.carries)) == (bf16, f16, bf16)
    same_bits((last, ys, states), (wanted, wanted_ys.astype(f16), wanted_states))
    assert len(unrolled) == (2 if kind == "ours" else 0)
    assert the_dtype(jax.eval_shape(lambda: cast.apply(variables, xs))[0]) == bf16


@pytest.mark.parametrize("name", ["LSTMCell", "SimpleCell"])
def test_a_wide_carry_under_narrow_parameters_is_flax_with_that_carry(name: str) -> None:
    xs, variables = inputs_of(name), variables_of(name, bf16)
    mine = ours.RNN(cell_of(ours, name, param_dtype=bf16), return_carry=True, carry_dtype=f32)
    flaxen = theirs.RNN(cell_of(theirs, name, param_dtype=bf16), return_carry=True)
    zeros = jax.tree.map(jnp.zeros_like, carry_of(name, f32))
    close(mine.apply(variables, xs), flaxen.apply(variables, xs, initial_carry=zeros), 2e-6)


def test_output_dtype_in_a_bidirectional_layer() -> None:
    children = (ours.RNN(ours.GRUCell(H, dtype=bf16), output_dtype=bf16) for _ in range(2))
    ys, _ = jax.eval_shape(lambda: ours.Bidirectional(*children).init_with_output(jax.random.key(0), inputs_of("")))
    assert (ys.shape, ys.dtype) == ((B, T, 2 * H), bf16)
