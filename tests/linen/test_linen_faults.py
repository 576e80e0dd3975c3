"""Faults of flax.linen's recurrent layers as the installed Flax has them, and what rnncore.linen does there."""

from __future__ import annotations

from typing import Any

import flax.linen as theirs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_cases import B, D, H, T, close, f32, normal, same_bits, some_variables, start

from rnncore import linen as ours

bf16 = jnp.bfloat16
KEY = jax.random.key(0)


def layers(cell: str = "GRUCell", **fields: Any) -> Any:
    return (nn.RNN(getattr(nn, cell)(H, **fields), return_carry=True) for nn in (ours, theirs))


@pytest.mark.slow
def test_lengths_with_two_batch_axes() -> None:
    """Flax fails, and where both axes are as long returns a carry with one axis too many."""
    mine, flaxen = layers()
    xs, lengths = normal(1, (2, 3, T, D), f32), jnp.array([[1, 2, 3], [4, 5, 1]])
    variables = some_variables(flaxen, xs)
    with pytest.raises((ValueError, TypeError), match="broadcast"):
        flaxen.apply(variables, xs, seq_lengths=lengths)
    h, ys = mine.apply(variables, xs, seq_lengths=lengths)
    assert h.shape == (2, 3, H)
    close(h, jnp.take_along_axis(ys, lengths[..., None, None] - 1, 2)[:, :, 0], 0.0)

    square, lengths = normal(1, (3, 3, T, D), f32), jnp.full((3, 3), 2)
    assert flaxen.apply(variables, square, seq_lengths=lengths)[0].shape == (3, 3, 3, H)
    h, ys = mine.apply(variables, square, seq_lengths=lengths)
    close(h, ys[:, :, 1], 0.0)


def test_length_zero() -> None:
    """Flax returns the carry after the last step of padding; the initial carry is right."""
    mine, flaxen = layers()
    xs, carry, lengths = normal(1, (B, T, D), f32), start("GRUCell", dtype=f32), jnp.array([0, T])
    variables = some_variables(flaxen, xs)
    (h, ys), (wrong, _) = (m.apply(variables, xs, initial_carry=carry, seq_lengths=lengths) for m in (mine, flaxen))
    close(wrong, ys[:, -1], 1e-6)
    close(h, jnp.stack([carry[0], ys[1, -1]]), 0.0)


@pytest.mark.parametrize(
    "lengths,taken_as,message",
    [([T + 4, 1], [T, 1], "values from 1 to 9; expected 0 to T = 5"), ([2], [2, 2], "expected the batch shape")],
)
def test_lengths_that_make_no_sense(lengths: list, taken_as: list, message: str) -> None:
    """Flax takes a length above T as T and spreads one length over the batch, silently; ours says what is wrong."""
    mine, flaxen = layers()
    xs = normal(1, (B, T, D), f32)
    variables = some_variables(flaxen, xs)
    same_bits(*(flaxen.apply(variables, xs, seq_lengths=jnp.array(n)) for n in (lengths, taken_as)))
    with pytest.raises(ValueError, match=message):
        mine.apply(variables, xs, seq_lengths=jnp.array(lengths))


def test_no_steps_with_lengths() -> None:
    mine, flaxen = layers()
    variables = some_variables(flaxen, normal(1, (B, T, D), f32))
    call = dict(initial_carry=start("GRUCell", dtype=f32), seq_lengths=jnp.zeros(B, int))
    with pytest.raises((IndexError, TypeError, ValueError)):
        flaxen.apply(variables, jnp.ones((B, 0, D), f32), **call)
    h, ys = mine.apply(variables, jnp.ones((B, 0, D), f32), **call)
    same_bits(h, call["initial_carry"])
    assert ys.shape == (B, 0, H)


def test_nan_in_the_padding() -> None:
    """With outputs masked and the carry taken at the length, Flax's gradients of all weights are NaN."""
    xs, lengths = normal(1, (B, T, D), f32), jnp.array([2, T])
    inside = (jnp.arange(T) < lengths[:, None])[..., None]
    mine, flaxen = layers()
    variables = some_variables(flaxen, xs)

    @jax.jit
    def gradients(xs: jax.Array) -> list:
        def loss(variables: Any, layer: Any) -> jax.Array:
            h, ys = layer.apply(variables, xs, seq_lengths=lengths)
            return h.sum() + jnp.where(inside, ys, 0.0).sum()

        return [jax.grad(loss)(variables, layer) for layer in (mine, flaxen)]

    (clean, wanted), (got, poisoned) = gradients(xs), gradients(jnp.where(inside, xs, jnp.nan))
    close(clean, wanted, 1e-5)
    close(got, clean, 1e-5)
    kernels = [poisoned["params"]["cell"][gate]["kernel"] for gate in ("ir", "iz", "in", "hr", "hz", "hn")]
    assert all(jnp.isnan(kernel).any() for kernel in kernels)


def test_the_outputs_of_a_half_precision_layer_are_single() -> None:
    """RNN(LSTMCell(dtype=bfloat16)) returns float32 where Dense(dtype=bfloat16) does not; `output_dtype` mends it."""
    xs = jnp.ones((B, T, D), f32)
    mine, flaxen = layers("LSTMCell", dtype=bf16)
    variables = jax.eval_shape(flaxen.init, KEY, xs)
    dtypes = [jax.eval_shape(m.apply, variables, xs)[1].dtype for m in (mine, flaxen, mine.clone(output_dtype=bf16))]
    assert dtypes == [f32, f32, bf16]


def test_the_simple_cell_in_half_precision() -> None:
    xs = jnp.ones((B, T, D), f32)
    mine, flaxen = layers("SimpleCell", dtype=bf16)
    with pytest.raises(TypeError, match="carry"):
        jax.eval_shape(flaxen.init, KEY, xs)
    variables = jax.eval_shape(mine.init, KEY, xs)
    h, ys = jax.eval_shape(mine.apply, variables, xs)
    assert (h.dtype, ys.dtype) == (f32, bf16)


def test_parameters_in_half_precision() -> None:
    """Flax's cells fail in the QR of their recurrent initialiser; see test_linen_dtypes for ours' values."""
    carry, x = jnp.zeros((B, H), bf16), jnp.ones((B, D), f32)
    with pytest.raises((NotImplementedError, TypeError), match="bfloat16"):
        theirs.GRUCell(H, param_dtype=bf16).init(KEY, carry, x)
    variables = ours.GRUCell(H, param_dtype=bf16).init(KEY, carry, x)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype(bf16)}


def test_a_tuple_of_inputs() -> None:
    """Flax fails in the middle; ours says what to do: booleans of episodes are `resets`, the rest is one array."""
    xs, resets = normal(1, (B, T, D), f32), jnp.zeros((B, T), bool).at[:, 3].set(True)
    mine, flaxen = layers()
    with pytest.raises(AttributeError, match="ndim"):
        flaxen.init(KEY, (xs, resets))
    with pytest.raises(ValueError, match="expected one array.*`resets`"):
        mine.init(KEY, (xs, resets))
    variables = some_variables(flaxen, xs)
    _, ys = mine.apply(variables, xs, resets=resets)
    close(ys[:, 3:], flaxen.apply(variables, xs[:, 3:])[1], 1e-6)


def test_bidirectional_with_children_that_read_time_first() -> None:
    """Flax overrides them without a word: the result is that of children without the option."""
    xs = normal(1, (B, T, D), f32)

    def layer(nn: Any, time_major: bool) -> Any:
        return nn.Bidirectional(*(nn.RNN(nn.GRUCell(H), time_major=time_major) for _ in range(2)))

    variables = some_variables(layer(theirs, False), xs)
    same_bits(*(layer(theirs, turned).apply(variables, xs) for turned in (True, False)))
    with pytest.raises(ValueError, match="give Bidirectional time_major=True as well"):
        layer(ours, True).apply(variables, xs)
    turned = jnp.swapaxes(layer(theirs, False).apply(variables, jnp.swapaxes(xs, 0, 1)), 0, 1)
    close(layer(ours, True).apply(variables, xs, time_major=True), turned, 1e-6)


def test_bidirectional_asked_to_read_backwards() -> None:
    """Flax ignores `reverse`; ours refuses it."""
    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.Bidirectional(*(nn.RNN(nn.GRUCell(H)) for _ in range(2))) for nn in (ours, theirs))
    variables = some_variables(flaxen, xs)
    same_bits(flaxen.apply(variables, xs, reverse=True), flaxen.apply(variables, xs))
    with pytest.raises(NotImplementedError, match="both directions are read already"):
        mine.apply(variables, xs, reverse=True)


@pytest.mark.parametrize("fields", [dict(strides=(2,)), dict(padding="VALID")], ids=str)
def test_strides_and_padding_of_the_convolutional_cell(fields: dict[str, Any]) -> None:
    """See test_linen_conv for ours' values."""
    xs = jnp.ones((B, T, 6, D), f32)
    mine, flaxen = (nn.RNN(nn.ConvLSTMCell(H, (3,), **fields)) for nn in (ours, theirs))
    with pytest.raises((TypeError, ValueError), match="shape"):
        jax.eval_shape(flaxen.init_with_output, KEY, xs)
    ys, _ = jax.eval_shape(mine.init_with_output, KEY, xs)
    assert ys.shape == (B, T, 3 if "strides" in fields else 4, H)


def test_a_convolution_that_leaves_one_position() -> None:
    """Flax spreads it over a carry of the inputs' size; in ours the carry has one position."""
    xs = normal(1, (B, T, 3, D), f32)
    mine, flaxen = (nn.RNN(nn.ConvLSTMCell(H, (3,), padding="VALID")) for nn in (ours, theirs))
    variables = some_variables(flaxen, xs)
    spread = flaxen.apply(variables, xs)
    assert spread.shape == (B, T, 3, H)
    np.testing.assert_array_equal(spread[:, 0, 1:], spread[:, 0, :-1])
    ys = mine.apply(variables, xs)
    assert ys.shape == (B, T, 1, H)
    close(ys[:, 0, 0], spread[:, 0, 0], 1e-6)


def test_a_random_carry_is_the_same_in_every_call_without_a_key() -> None:
    """So in Flax, and kept; `init_key` draws another."""
    xs = normal(1, (B, T, D), f32)
    mine, flaxen = layers(carry_init=theirs.initializers.normal(1.0))
    variables = some_variables(flaxen, xs)
    for layer in (mine, flaxen):
        same_bits(layer.apply(variables, xs), layer.apply(variables, xs))
        same_bits(layer.apply(variables, xs), layer.apply(variables, xs, init_key=jax.random.key(0)))
        moved = layer.apply(variables, xs, init_key=jax.random.key(1))[1] - layer.apply(variables, xs)[1]
        assert jnp.abs(moved).max() > 1e-2
