"""Truncated backpropagation through time: its gradients, the state it carries, and the cutting of streams."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_close

import rnncore
from rnncore import Stack, unroll_stack
from rnncore.training import StreamState, segments, truncated_bptt

B, T, K, D, H = 2, 12, 4, 3, 4
f64 = jnp.float64
STACK = Stack(rnncore.LSTM(H), num_layers=2)
XS = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)))
RESETS = jnp.zeros((B, T), bool).at[:, 5].set(True)
PARAMS = STACK.init(jax.random.key(0), D, f64)


def loss_fn(params: Any, carry: Any, segment: Any) -> Any:
    xs, resets = segment
    carry, ys = unroll_stack(STACK, params, xs, initial_carry=carry, resets=resets)
    return jnp.sum(jnp.sin(ys)), carry


def start(rate: float) -> tuple[Any, StreamState]:
    optimizer = optax.sgd(rate)
    return optimizer, StreamState(PARAMS, optimizer.init(PARAMS), STACK.initial_carry((B,), f64))


def test_without_learning_the_segments_are_the_sequence():
    """At rate 0 losses add up to that of the whole run, and the last carry is the whole run's."""
    optimizer, state = start(0.0)
    state, losses = jax.lax.scan(truncated_bptt(loss_fn, optimizer), state, segments((XS, RESETS), K))
    carry, ys = unroll_stack(STACK, PARAMS, XS, resets=RESETS)
    assert_close((state.carry, jnp.sum(losses)), (carry, jnp.sum(jnp.sin(ys))), 1e-12)


@pytest.mark.slow
def test_an_update_takes_the_gradient_of_its_segment_at_a_constant_carry():
    optimizer, state = start(1.0)
    update = jax.jit(truncated_bptt(loss_fn, optimizer))
    first, second, _ = zip(*segments((XS, RESETS), K), strict=True)
    after, _ = update(state, first)
    again, _ = update(after, second)

    def both(params: Any, cut: bool) -> Any:
        _, carry = loss_fn(params, state.carry, first)
        return loss_fn(params, jax.lax.stop_gradient(carry) if cut else carry, second)[0]

    moved = jax.tree.map(jnp.subtract, after.params, again.params)
    # The second segment starts from the carry that the parameters before the first update made.
    _, carry = loss_fn(PARAMS, state.carry, first)
    want = jax.grad(lambda p: loss_fn(p, carry, second)[0])(after.params)
    assert_close(moved, want, 1e-12)
    full, cut = (jax.jit(jax.grad(both), static_argnums=1)(PARAMS, c) for c in (False, True))
    assert not np.allclose(full.layers[0][0].recurrent_kernel, cut.layers[0][0].recurrent_kernel)


def test_aux_comes_out_and_a_changed_carry_is_refused():
    optimizer, state = start(0.1)
    segment = jax.tree.map(lambda a: a[0], segments((XS, RESETS), K))

    def with_aux(params: Any, carry: Any, segment: Any) -> Any:
        loss, carry = loss_fn(params, carry, segment)
        return loss, (carry, {"steps": K})

    _, (loss, aux) = truncated_bptt(with_aux, optimizer, has_aux=True)(state, segment)
    assert loss.shape == () and aux == {"steps": K}

    def narrow(params: Any, carry: Any, segment: Any) -> Any:
        loss, carry = loss_fn(params, carry, segment)
        return loss, jax.tree.map(lambda a: a.astype(jnp.float32), carry)

    with pytest.raises(ValueError, match="went in as .*float64.* came out as .*float32"):
        truncated_bptt(narrow, optimizer)(state, segment)


@pytest.mark.parametrize("time_axis", [0, 1])
def test_segments_stack_on_a_new_first_axis(time_axis: int):
    xs = np.moveaxis(np.arange(2 * 6 * 3).reshape(2, 6, 3), 1, time_axis)
    got = segments({"x": xs}, 2, time_axis=time_axis)["x"]
    want = np.stack([np.take(xs, range(n, n + 2), time_axis) for n in (0, 2, 4)])
    np.testing.assert_array_equal(got, want)
    (longer,) = segments(xs, 4, time_axis=time_axis, drop_remainder=True)
    np.testing.assert_array_equal(longer, np.concatenate(want[:2], time_axis))


def test_segments_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"12 steps on axis 1, 2 too many.*drop_remainder"):
        segments(XS, 5)
    with pytest.raises(ValueError, match="at least one step"):
        segments(XS, 0)
