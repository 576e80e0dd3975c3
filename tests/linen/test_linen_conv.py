"""ConvLSTMCell of rnncore.linen: Flax's where Flax runs, and strides and padding that work."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import flax.linen as theirs
import jax
import jax.numpy as jnp
import pytest
from linen_cases import close, f32, f64, normal, projected, same_bits, some_variables, with_gradients

from rnncore import linen as ours

B, T, C, F = 2, 3, 2, 3


def both(**fields: Any) -> Any:
    return (nn.RNN(nn.ConvLSTMCell(F, param_dtype=f64, **fields), return_carry=True) for nn in (ours, theirs))


def test_fields_have_flax_names_order_and_defaults() -> None:
    def described(cls: type) -> list:
        names = [(f.name, getattr(f.default, "__qualname__", f.default), f.kw_only) for f in dataclasses.fields(cls)]
        return [field for field in names if field[0] != "parent"]

    assert described(ours.ConvLSTMCell) == described(theirs.ConvLSTMCell)
    assert ours.ConvLSTMCell.__name__ == "ConvLSTMCell" and ours.ConvLSTMCell(F, (3, 3)).num_feature_axes == 3


@pytest.mark.slow
@pytest.mark.parametrize("use_bias", [True, False])
def test_initial_values_bit_for_bit(use_bias: bool) -> None:
    init = theirs.initializers.normal()
    fields = ((3, 2), None, "SAME", use_bias, None, f32, init)
    cells = [nn.ConvLSTMCell(F, *fields) for nn in (ours, theirs)]
    carries = [cell.initialize_carry(jax.random.key(4), (B, 4, 5, C)) for cell in cells]
    same_bits(*carries)
    x = normal(1, (B, 4, 5, C), f32)
    got, want = (cell.init(jax.random.key(5), carry, x) for cell, carry in zip(cells, carries, strict=True))
    same_bits(got, want)
    assert [*got["params"]] == [*want["params"]]
    assert jax.tree.map(jnp.shape, got["params"]["ih"]["kernel"]) == (3, 2, C, 4 * F)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "space,fields,lengths",
    [((4,), dict(kernel_size=(3,)), [1, T]), ((4, 3), dict(kernel_size=(3, 2), use_bias=False, strides=(1, 1)), None)],
    ids=str,
)
def test_values_and_gradients(space: tuple[int, ...], fields: dict[str, Any], lengths: Any) -> None:
    mine, flaxen = both(**fields)
    xs, shape = normal(1, (B, T, *space, C)), (B, *space, F)
    carry = normal(2, shape), normal(3, shape)
    variables = some_variables(flaxen, xs)
    options = dict(seq_lengths=None if lengths is None else jnp.array(lengths), reverse=True)
    close(*(with_gradients(layer, variables, xs, carry, **options) for layer in (mine, flaxen)))
    other = theirs.RNN(ours.ConvLSTMCell(F, param_dtype=f64, **fields), return_carry=True)
    close(other.apply(variables, xs, initial_carry=carry), flaxen.apply(variables, xs, initial_carry=carry))


def test_every_padding_that_flax_runs() -> None:
    xs = normal(1, (B, T, 5, C))
    cases = [(2, "SAME"), (2, "SAME_LOWER"), (3, "CIRCULAR"), (3, "REFLECT"), (3, "CAUSAL"), (3, 1), (3, (1,))]
    cases += [(2, ((1, 0),)), (3, ((2, 0),)), (1, "VALID")]

    @jax.jit
    def run(xs: jax.Array) -> list:
        out = []
        for size, padding in cases:
            mine, flaxen = both(kernel_size=(size,), padding=padding)
            variables = some_variables(mine, xs)
            out.append((mine.apply(variables, xs), flaxen.apply(variables, xs)))
        return out

    for got, want in run(xs):
        close(got, want)


def by_hand(variables: Any, xs: jax.Array, carry: Any, fields: dict[str, Any], own: Any) -> Any:
    """The cell written out: the inputs convolved beforehand, then a plain loop over the carry's grid."""
    params, rank = variables["params"]["cell"], xs.ndim - 3
    zs = theirs.Conv(4 * F, param_dtype=f64, **fields).apply({"params": params["ih"]}, xs)
    c, h = carry
    ys = []
    for t in range(xs.shape[1]):
        letters = "".join("XYZ"[:rank])
        numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
        r = jax.lax.conv_general_dilated(h, params["hh"]["kernel"], (1,) * rank, own, dimension_numbers=numbers)
        i, g, f, o = jnp.split(zs[:, t] + r + params["hh"]["bias"], 4, -1)
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        ys.append(h)
    return (c, h), jnp.stack(ys, 1)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "space,grid,fields,own",
    [
        ((6, 5), (3, 3), dict(kernel_size=(3, 3), strides=(2, 2)), "SAME"),
        ((6,), (4,), dict(kernel_size=(3,), padding="VALID"), "SAME"),
        ((7,), (3,), dict(kernel_size=(2,), strides=2, padding="VALID"), "SAME"),
        ((5,), (3,), dict(kernel_size=(2,), strides=(2,), padding=((1, 0),)), ((1, 0),)),
        ((5,), (8,), dict(kernel_size=(2,), padding=((3, 1),)), "SAME"),
    ],
    ids=str,
)
def test_strides_and_padding(space: Any, grid: Any, fields: dict[str, Any], own: Any) -> None:
    """The carry lies on the grid of the strided inputs; the convolution of h stays on it."""
    layer, flaxen = both(**fields)
    xs = normal(1, (B, T, *space, C))
    with pytest.raises((TypeError, ValueError), match="shape"):
        jax.eval_shape(flaxen.init_with_output, jax.random.key(0), xs)
    variables, shape = some_variables(layer, xs), (B, *grid, F)
    carry = normal(2, shape), normal(3, shape)

    @jax.jit
    def wanted(variables: Any, xs: jax.Array, carry: Any) -> Any:
        def loss(*args: Any) -> Any:
            out = by_hand(*args, fields, own)
            return projected(out), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(variables, xs, carry)
        return out, gradients

    close(with_gradients(layer, variables, xs, carry), wanted(variables, xs, carry))
    same_bits(layer.cell.initialize_carry(jax.random.key(0), (B, *space, C)), (jnp.zeros(shape), jnp.zeros(shape)))


def test_the_carry_has_the_grid_of_the_convolved_inputs() -> None:
    paddings = ("SAME", "VALID", "CIRCULAR", "CAUSAL", 2, (1,), ((0, 3),))
    tried = 0
    for n, size, stride, padding in itertools.product((1, 4, 7), (1, 2, 3), (None, 2, 3), paddings):
        cell = ours.ConvLSTMCell(F, (size,), stride, padding)
        if padding == "VALID" and size > n:
            with pytest.raises(ValueError, match=f"nothing is left of inputs with the spatial axes .{n},."):
                cell.initialize_carry(jax.random.key(0), (B, n, C))
            continue
        conv = theirs.Conv(4 * F, (size,), stride, padding)
        out, _ = jax.eval_shape(lambda c=conv, n=n: c.init_with_output(jax.random.key(0), jnp.ones((B, n, C))))
        c, _ = jax.eval_shape(lambda cell=cell, n=n: cell.initialize_carry(jax.random.key(0), (B, n, C)))
        assert c.shape == (*out.shape[:-1], F)
        tried += 1
    assert tried == 3 * 3 * 3 * len(paddings) - 6


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(kernel_size=3), r"kernel_size=3\)`: expected a positive number for each spatial axis"),
        (dict(kernel_size=()), r"kernel_size=\(\)\)`: expected a positive number"),
        (dict(kernel_size=(3, 0)), "expected a positive number"),
        (dict(kernel_size=(3, 3), strides=(2,)), r"strides=\(2,\)\)`: expected 2 positive numbers"),
        (dict(kernel_size=(3,), strides=0), "strides=0.*expected 1 positive numbers"),
        (dict(kernel_size=(3,), strides=(-1,)), "expected 1 positive numbers"),
        (dict(kernel_size=(3,), padding="same"), "padding='same'.*expected one of SAME, SAME_LOWER, VALID"),
        (dict(kernel_size=(3, 3), padding="CAUSAL"), "one spatial axis only; kernel_size has 2"),
        (dict(kernel_size=(3, 3), padding=((1, 1),)), "or 2 of numbers and .low, high. pairs"),
        (dict(kernel_size=(3,), padding=((1, 1, 1),)), "or 1 of numbers and .low, high. pairs"),
        (dict(kernel_size=(3,), padding=None), "padding=None.*expected a name"),
    ],
    ids=str,
)
def test_what_fits_no_convolution_is_refused_at_construction(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.ConvLSTMCell(F, **fields)


def test_a_carry_of_the_inputs_size_is_refused() -> None:
    cell = ours.ConvLSTMCell(F, (3,), (2,))
    with pytest.raises(ValueError, match=r"expected \(c, h\) whose last axes are \(3, 3\)"):
        cell.init(jax.random.key(0), (jnp.ones((B, 6, F)), jnp.ones((B, 6, F))), jnp.ones((B, 6, C)))
    with pytest.raises(ValueError, match="last axes"):
        cell.init(jax.random.key(0), (jnp.ones((B, 3, F)), jnp.ones((B, 6, F))), jnp.ones((B, 6, C)))
