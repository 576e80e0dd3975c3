"""Stack: layers and directions put together by hand, streams in pieces, resets both ways, and what randomness does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

import rnncore
from rnncore import LSTMCarry, Stack, unroll, unroll_stack

B, T, D, H = 3, 6, 3, 4
f64 = jnp.float64
XS = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)))
RESETS = jnp.asarray(np.random.default_rng(1).random((B, T)) < 0.4)
LENGTHS = jnp.array([2, 0, T])
CELLS = {"lstm": rnncore.LSTM(H), "gru": rnncore.GRU(H, recurrence=rnncore.Heads(2)), "elman": rnncore.Elman(H)}
TOLERANCE = 1e-12


def some_params(stack: Stack, size: int = D) -> Any:
    shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), size, f64))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.6, a.shape)), shapes)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("name", "merge"), [("lstm", "concat"), ("gru", "sum"), ("elman", "mean"), ("elman", "mul")])
def test_a_bidirectional_stack_is_its_layers_one_after_another(name: str, merge: Any):
    stack = Stack(CELLS[name], num_layers=2, bidirectional=True, merge=merge)
    params = some_params(stack)
    join = {
        "concat": lambda a, b: jnp.concatenate([a, b], -1),
        "sum": jnp.add,
        "mean": lambda a, b: (a + b) / 2,
        "mul": jnp.multiply,
    }[merge]
    ys, ends = XS, []
    for forward, backward in params.layers:
        end, there = unroll(stack.cell, forward, ys, seq_lengths=LENGTHS)
        start, back = unroll(stack.cell, backward, ys, seq_lengths=LENGTHS, reverse=True, keep_order=True)
        ys = join(there, back)
        ends.append((end, start))
    carry, got = unroll_stack(stack, params, XS, seq_lengths=LENGTHS)
    assert got.shape[-1] == stack.output_size
    assert_close((carry, got), (tuple(ends), ys), 0.0)


@pytest.mark.sample(1)
@pytest.mark.parametrize("batch", [(), (2, 2)])
def test_time_major_and_any_batch_axes(batch: tuple[int, ...]):
    stack = Stack(rnncore.LSTM(H), num_layers=2, bidirectional=True, learned_carry=True)
    params = some_params(stack)
    xs = jnp.asarray(np.random.default_rng(3).normal(size=(*batch, T, D)))
    resets = jnp.asarray(np.random.default_rng(4).random((*batch, T)) < 0.4)
    carry, ys = unroll_stack(stack, params, xs, resets=resets)
    turned = unroll_stack(
        stack, params, jnp.moveaxis(xs, -2, 0), resets=jnp.moveaxis(resets, -1, 0), time_major=True
    )  # fmt: skip
    assert ys.shape == (*batch, T, 2 * H) and carry[1][1].c.shape == (*batch, H)
    assert_close(turned, (carry, jnp.moveaxis(ys, 0, -2) if not batch else jnp.moveaxis(ys, 2, 0)), 0.0)


@pytest.mark.parametrize("learned", [False, True])
def test_a_stream_in_pieces_is_the_stream(learned: bool):
    """Under jit, with resets and another initial carry than the one that resets return to."""
    stack = Stack(
        rnncore.LSTM(H), num_layers=2, learned_carry=learned, zoneout=LSTMCarry(0.3, 0.1), recurrent_dropout=0.3
    )
    params = some_params(stack)
    first = jax.tree.map(lambda a: a + 0.5, stack.initial_carry((B,), f64))
    run = jax.jit(lambda xs, resets, carry: unroll_stack(stack, params, xs, resets=resets, initial_carry=carry))
    whole = run(XS, RESETS, first)
    carry, pieces = first, []
    for part in (slice(0, 2), slice(2, 4), slice(4, T)):
        carry, ys = run(XS[:, part], RESETS[:, part], carry)
        pieces.append(ys)
    assert np.asarray(RESETS[:, 2:]).any()
    assert_close((carry, jnp.concatenate(pieces, 1)), whole, TOLERANCE)


@pytest.mark.slow
def test_resets_cut_a_sequence_into_episodes_both_ways():
    """Each episode comes out as if it stood alone, from the learned carry; a piece ends where the next begins."""
    stack = Stack(rnncore.GRU(H), num_layers=2, bidirectional=True, learned_carry=True)
    params, cuts = some_params(stack), [0, 2, 3, T]
    resets = jnp.zeros(T, bool).at[jnp.array(cuts[:-1])].set(True)
    _, ys = unroll_stack(stack, params, XS[0], resets=resets)
    alone = [unroll_stack(stack, params, XS[0, a:b])[1] for a, b in zip(cuts, cuts[1:], strict=False)]
    assert_close(ys, jnp.concatenate(alone), TOLERANCE)


def test_backward_resets_stop_at_the_length():
    """A flag in the padding must not reset the backward run before its first step."""
    stack = Stack(rnncore.GRU(H), bidirectional=True)
    params = some_params(stack)
    start = jax.tree.map(lambda a: a + 0.5, stack.initial_carry((B,), f64))
    flagged = jnp.zeros((B, T), bool).at[:, 2].set(True)
    lengths = jnp.array([2, 2, 2])
    got = unroll_stack(stack, params, XS, resets=flagged, seq_lengths=lengths, initial_carry=start)
    want = unroll_stack(stack, params, XS, seq_lengths=lengths, initial_carry=start)
    assert_close((got[0], got[1][:, :2]), (want[0], want[1][:, :2]), 0.0)


def test_states_of_every_layer_and_direction_in_the_order_of_the_inputs():
    stack = Stack(rnncore.LSTM(H), num_layers=2, bidirectional=True)
    carry, ys, states = unroll_stack(stack, some_params(stack), XS, return_states=True)
    (_, (forward, backward)) = states
    np.testing.assert_array_equal(jnp.concatenate([forward.carries.h, backward.carries.h], -1), ys)
    np.testing.assert_array_equal(forward.carries.c[:, -1], carry[1][0].c)
    np.testing.assert_array_equal(backward.carries.c[:, 0], carry[1][1].c)
    assert states[0][1].gates.f.shape == (B, T, H)


# -------------------------------------------------------------------------------------- randomness


def test_dropout_between_layers_zeroes_inputs_of_the_next_layer_only():
    """With an upper layer that shows its inputs the mask can be read off."""
    cell = rnncore.Elman(H, activation_fn=lambda a: a)
    stack = Stack(cell, num_layers=2, dropout=0.25)
    params = some_params(stack, D)
    kernel = jnp.eye(H, dtype=f64)[:, None]
    silent = params.layers[1][0]._replace(
        input_kernel=kernel, recurrent_kernel=0 * kernel, bias=jnp.zeros((1, H), f64)
    )  # fmt: skip
    params = params._replace(layers=(params.layers[0], (silent,)))
    _, plain = unroll_stack(stack, params, XS)
    draws = jax.vmap(lambda k: unroll_stack(stack, params, XS, key=k)[1])(jax.random.split(jax.random.key(0), 200))
    share = np.mean(np.asarray(draws == 0))
    assert abs(share - 0.25) < 3 * np.sqrt(0.25 * 0.75 / draws.size)
    np.testing.assert_allclose(draws, np.where(draws == 0, 0, plain / 0.75), rtol=1e-12, atol=0)
    alone = Stack(cell, dropout=0.25)
    lower = rnncore.StackParams(params.layers[:1], None)
    assert_close(unroll_stack(alone, lower, XS, key=jax.random.key(1)), unroll_stack(alone, lower, XS), 0.0)


def test_recurrent_dropout_masks_the_same_units_at_every_step():
    """A diagonal kernel of ones sums the inputs; a masked unit forgets everything at every step."""
    cell = rnncore.Elman(H, activation_fn=lambda a: a, recurrence=rnncore.Diagonal())
    stack = Stack(cell, recurrent_dropout=0.5)
    ones = jnp.ones((1, H), f64)
    params = rnncore.StackParams(((rnncore.CellParams(ones[None], ones, None, None, ()),),), None)
    xs = jnp.ones((50, T, 1), f64)
    _, ys = unroll_stack(stack, params, xs, key=jax.random.key(0))
    dropped = np.asarray(ys[:, 1] == 1)
    assert 0.3 < dropped.mean() < 0.7
    doubled = 2.0 ** np.arange(1, T + 1) - 1  # h_t = 1 + 2 h_{t-1}
    want = np.where(dropped[:, None], 1.0, doubled[None, :, None])
    np.testing.assert_array_equal(ys, want)


def test_zoneout_keeps_units_at_its_rate_and_takes_its_expectation_without_a_key():
    cell = rnncore.Elman(H, activation_fn=lambda a: a, recurrence=rnncore.Diagonal())
    stack = Stack(cell, zoneout=rnncore.HiddenCarry(0.25))
    eye = jnp.ones((1, H), f64)
    params = rnncore.StackParams(((rnncore.CellParams(eye[None], 0 * eye, None, None, ()),),), None)
    xs = jnp.arange(1.0, 41.0, dtype=f64)[None, :, None] * jnp.ones((30, 1, 1))
    _, ys = unroll_stack(stack, params, xs, key=jax.random.key(0))
    stayed = np.asarray(ys[:, 1:] == ys[:, :-1])
    assert abs(stayed.mean() - 0.25) < 3 * np.sqrt(0.25 * 0.75 / stayed.size)
    _, ys = unroll_stack(stack, params, xs)
    h, want = 0.0, []
    for t in range(40):
        h = 0.25 * h + 0.75 * (t + 1)
        want.append(h)
    np.testing.assert_allclose(ys[0, :, 0], want, rtol=1e-12)


def test_the_same_key_draws_the_same_masks_and_layers_draw_their_own():
    stack = Stack(rnncore.LSTM(H), num_layers=2, bidirectional=True, recurrent_dropout=0.5, zoneout=LSTMCarry(0.2, 0.2))
    params = some_params(stack)
    one = params.layers[1][0]
    same = rnncore.StackParams(((params.layers[0][0],) * 2, (one, one)), None)
    a, b = (unroll_stack(stack, same, XS, key=jax.random.key(k))[1] for k in (0, 0))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, unroll_stack(stack, same, XS, key=jax.random.key(1))[1])
    # Forward over a palindrome equals backward over it, unless the masks differ.
    palindrome = jnp.concatenate([XS, XS[:, ::-1]], 1)
    one_layer = Stack(rnncore.LSTM(H), bidirectional=True, recurrent_dropout=0.5)
    for key, equal in ((None, True), (jax.random.key(0), False)):
        ((end, start),), _ = unroll_stack(one_layer, same._replace(layers=same.layers[:1]), palindrome, key=key)
        assert np.allclose(end.h, start.h) == equal


def test_gradients_of_a_learned_carry_count_every_reset():
    stack = Stack(rnncore.Elman(H), learned_carry=True)
    params = some_params(stack)
    _, ys = unroll_stack(stack, params, XS, resets=jnp.ones((B, T), bool))

    def loss(params: Any, xs: Any, resets: Any) -> Any:
        return jnp.sum(unroll_stack(stack, params, xs, resets=resets)[1] ** 2)

    every = jax.grad(loss)(params, XS, jnp.ones((B, T), bool))
    apart = jax.grad(loss)(params, XS.reshape(B * T, 1, D), jnp.zeros((B * T, 1), bool))
    assert_close(every, apart, TOLERANCE)
    assert np.abs(every.carry[0][0].h).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("policy", [{"checkpoint_every": 2, "recompute": "chunk"}, {"residual_dtype": jnp.float64}])
def test_every_policy_gives_the_same_gradients_with_everything_on(policy: Any):
    stack = Stack(
        rnncore.LSTM(H), num_layers=2, bidirectional=True, dropout=0.2, recurrent_dropout=0.2,
        zoneout=LSTMCarry(0.1, 0.1), learned_carry=True,
    )  # fmt: skip
    params = some_params(stack)

    @jax.jit
    def both(params: Any) -> Any:
        def loss(params: Any, **options: Any) -> Any:
            out = unroll_stack(
                stack, params, XS, key=jax.random.key(0), resets=RESETS, seq_lengths=LENGTHS, **options
            )  # fmt: skip
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(out))

        return jax.grad(lambda p: loss(p, **policy))(params), jax.grad(lambda p: loss(p, backend="autodiff"))(params)

    ours, plain = both(params)
    assert_close(ours, plain, TOLERANCE)


# ------------------------------------------------------------------------------------------ errors

WRONG = {
    "num_layers": (dict(num_layers=0), "num_layers=0.*at least one"),
    "merge": (dict(merge="max"), "merge='max'.*'concat', 'sum', 'mean', 'mul'"),
    "dropout": (dict(dropout=1.0), r"dropout=1.0.*from 0 to below 1"),
    "recurrent_dropout": (dict(recurrent_dropout=-0.1), r"recurrent_dropout=-0.1"),
    "zoneout": (dict(zoneout=LSTMCarry(None, 2.0)), r"zoneout h=2.0"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_stacks_are_refused(fault: str):
    options, message = WRONG[fault]
    with pytest.raises(ValueError, match=message):
        Stack(rnncore.LSTM(H), **options)


def test_a_carry_in_another_arrangement_is_refused():
    stack = Stack(rnncore.LSTM(H), num_layers=2)
    params = some_params(stack)
    carry = rnncore.LSTM(H).initial_carry((B,), f64)
    for wrong in (carry, (carry, carry), ((carry,),), ((carry, carry), (carry, carry))):
        with pytest.raises(ValueError, match="expected a tuple of 2, for each layer a tuple of 1"):
            unroll_stack(stack, params, XS, initial_carry=wrong)
