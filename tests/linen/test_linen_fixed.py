"""What rnncore.linen.RNN does that Flax does not: lengths done right, resets, states, clear errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import BAD_MASKS
from linen_cases import (
    OPTIONS,
    B,
    D,
    H,
    T,
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

import rnncore.sequence
from rnncore import linen as ours


def test_lengths_of_zero_give_the_initial_carry(unrolled: list) -> None:
    for cell in (ours.GRUCell(H, param_dtype=f64), foreign("GRUCell")(H, param_dtype=f64)):
        layer, carry = ours.RNN(cell, return_carry=True), start("GRUCell", (3,))
        xs = normal(1, (3, T, D))
        variables = layer.init(jax.random.key(0), xs)
        last, ys = layer.apply(variables, xs, initial_carry=carry, seq_lengths=jnp.array([0, 2, 0]))
        close(last, carry.at[1].set(ys[1, 1]))
    assert len(unrolled) == 2


@pytest.mark.sample(1)
@pytest.mark.parametrize("cell", [ours.LSTMCell, foreign("LSTMCell")], ids=["ours", "foreign"])
def test_square_batch_axes_with_lengths(cell: type) -> None:
    xs, lengths = normal(1, (3, 3, T, D)), jnp.array([[0, 1, 2], [3, 4, 5], [5, 2, 0]])
    layer, carry = ours.RNN(cell(H, param_dtype=f64), return_carry=True, reverse=True), start("LSTMCell", (3, 3))
    flat = ours.RNN(ours.LSTMCell(H, param_dtype=f64), return_carry=True, reverse=True)
    variables = layer.init(jax.random.key(0), xs)
    (c, h), ys = layer.apply(variables, xs, initial_carry=carry, seq_lengths=lengths)
    one = jax.tree.map(lambda a: a.reshape(9, H), carry)
    (c9, h9), ys9 = flat.apply(variables, xs.reshape(9, T, D), initial_carry=one, seq_lengths=lengths.reshape(9))
    close(((c, h), ys), ((c9.reshape(c.shape), h9.reshape(h.shape)), ys9.reshape(ys.shape)))


@pytest.mark.sample(1)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("cell", [ours.LSTMCell, foreign("LSTMCell")], ids=["ours", "foreign"])
def test_padding_that_is_not_finite_reaches_nothing(cell: type, bad: float) -> None:
    lengths, inside = jnp.array([0, 2, T]), (jnp.arange(T) < jnp.array([0, 2, T])[:, None])[..., None]
    layer, carry = ours.RNN(cell(H, param_dtype=f64), reverse=True), start("LSTMCell", (3,))
    clean = jnp.where(inside, normal(1, (3, T, D)), 0.0)
    variables = layer.init(jax.random.key(0), clean)

    def run(xs: jax.Array) -> Any:
        def loss(variables: Any, xs: jax.Array, carry: Any) -> Any:
            last, ys = layer.apply(variables, xs, initial_carry=carry, seq_lengths=lengths, return_carry=True)
            out = last, jnp.where(inside, ys, 0.0)
            return projected(out), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(variables, xs, carry)

    got = run(jnp.where(inside, clean, bad))
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(got))
    close(got, run(clean), 0.0)


def test_no_steps_at_all() -> None:
    for cell in (ours.LSTMCell(H), foreign("LSTMCell")(H)):
        layer, carry = ours.RNN(cell, return_carry=True), start("LSTMCell", dtype=f32)
        variables = layer.init(jax.random.key(0), jnp.ones((B, T, D), f32))
        for lengths in (None, jnp.zeros(B, int)):
            last, ys = layer.apply(variables, jnp.ones((B, 0, D), f32), initial_carry=carry, seq_lengths=lengths)
            same_bits(last, carry)
            assert ys.shape == (B, 0, H)
    layer = ours.RNN(ours.LSTMCell(H))
    same_bits(
        layer.init(jax.random.key(0), jnp.ones((B, 0, D), f32)), layer.init(jax.random.key(0), jnp.ones((B, T, D), f32))
    )


@pytest.mark.sample(1)
@pytest.mark.parametrize("cell", [ours.LSTMCell, foreign("LSTMCell")], ids=["ours", "foreign"])
@pytest.mark.parametrize("time_major", [False, True])
def test_resets_start_again_from_the_initial_carry(cell: type, time_major: bool) -> None:
    xs, carry = normal(1, (B, T, D)), start("LSTMCell")
    layer = ours.RNN(cell(H, param_dtype=f64), return_carry=True)
    variables = layer.init(jax.random.key(0), xs)
    resets = jnp.zeros((B, T), bool).at[:, 2].set(True)

    def turned(a: jax.Array) -> jax.Array:
        return jnp.swapaxes(a, 0, 1) if time_major else a

    last, ys = layer.apply(variables, turned(xs), initial_carry=carry, resets=turned(resets), time_major=time_major)
    _, first = layer.apply(variables, xs[:, :2], initial_carry=carry)
    again, second = layer.apply(variables, xs[:, 2:], initial_carry=carry)
    close((last, turned(ys)), (again, jnp.concatenate([first, second], 1)))


@pytest.mark.parametrize("cell", [ours.LSTMCell, foreign("LSTMCell")], ids=["ours", "foreign"])
def test_resets_return_to_another_carry_than_the_stored_one(cell: type) -> None:
    """As the loop of a rollout has it: the carry is stored, an episode begins with the cell's own."""
    xs, stored = normal(1, (B, T, D)), start("LSTMCell")
    one = cell(H, param_dtype=f64)
    layer, own = ours.RNN(one, return_carry=True), one.initialize_carry(jax.random.key(0), (B, D))
    variables = layer.init(jax.random.key(0), xs)
    resets = jnp.array([[True, False, False, True, False], [False, False, True, True, False]])
    carry, ys = stored, []
    for t in range(T):
        carry = jax.tree.map(lambda new, old, t=t: jnp.where(resets[:, t, None], new, old), own, carry)
        carry, y = one.apply({"params": variables["params"]["cell"]}, carry, xs[:, t])
        ys.append(y)
    got = layer.apply(variables, xs, initial_carry=stored, resets=resets, reset_carry=own)
    close(got, (carry, jnp.stack(ys, 1)))
    with pytest.raises(ValueError, match="has an effect only with resets"):
        layer.apply(variables, xs, reset_carry=own)
    with pytest.raises(ValueError, match="expected those of the initial carry"):
        layer.apply(variables, xs, resets=resets, reset_carry=own[0])


@pytest.mark.sample(2)
@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell"])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_states_are_the_last_element(cell: str, options: str) -> None:
    kwargs, carry = OPTIONS[options], start(cell, (3,))
    xs = normal(1, (T, 3, D) if kwargs.get("time_major") else (3, T, D))
    fast, slow = (ours.RNN(kind(H, param_dtype=f64)) for kind in (getattr(ours, cell), foreign(cell)))
    variables = fast.init(jax.random.key(0), xs, time_major=kwargs.get("time_major"))
    kwargs = kwargs | dict(initial_carry=carry, return_states=True)
    ys, states = fast.apply(variables, xs, **kwargs)
    other_ys, others = slow.apply(variables, xs, **kwargs)
    close((ys, states.carries), (other_ys, others.carries))
    assert others.gates is None
    assert jax.tree.structure(states.carries) == jax.tree.structure(carry)
    assert {a.shape for a in states.gates} == {ys.shape}
    same_bits(states.carries[1] if cell == "LSTMCell" else states.carries, ys)
    last, ys_too, _ = fast.apply(variables, xs, return_carry=True, **kwargs)
    same_bits(ys_too, ys)
    assert jax.tree.structure(last) == jax.tree.structure(carry)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "fields",
    [
        dict(checkpoint_every=2),
        dict(checkpoint_every=2, recompute="chunk"),
        dict(recompute="gates"),
        dict(backend="autodiff"),
    ],
    ids=str,
)
def test_fields_of_unroll_reach_it_and_change_no_number(fields: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    xs, carry = normal(1, (B, T, D)), start("LSTMCell")
    plain = ours.RNN(ours.LSTMCell(H, param_dtype=f64))
    variables = some_variables(plain, xs)
    seen: dict[str, Any] = {}
    original = rnncore.sequence.unroll
    monkeypatch.setattr(rnncore.sequence, "unroll", lambda *a, **k: (seen.update(k), original(*a, **k))[1])
    close(with_gradients(plain.copy(**fields), variables, xs, carry), with_gradients(plain, variables, xs, carry))
    plain.copy(**fields).apply(variables, xs)
    assert fields.items() <= seen.items()


@pytest.mark.parametrize("fields", [dict(checkpoint_every=2), dict(recompute="gates"), dict(backend="scan")], ids=str)
def test_fields_of_unroll_are_refused_under_nn_scan(fields: dict[str, Any]) -> None:
    name = next(iter(fields))
    with pytest.raises(NotImplementedError, match=f"{name} means nothing, because LSTMCell is not exactly"):
        ours.RNN(foreign("LSTMCell")(H), **fields).init(jax.random.key(0), jnp.ones((B, T, D)))
    with pytest.raises(NotImplementedError, match=r"`softmax`|not elementwise"):
        ours.RNN(ours.GRUCell(H, gate_fn=jax.nn.softmax), **fields).init(jax.random.key(0), jnp.ones((B, T, D)))


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("cell", [ours.GRUCell, foreign("GRUCell")], ids=["ours", "foreign"])
@pytest.mark.parametrize("kwargs,message", BAD_MASKS, ids=str)
def test_bad_calls(cell: type, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.RNN(cell(H), return_carry=True).init(jax.random.key(0), jnp.ones((B, T, D)), **kwargs)


def test_bad_inputs_and_carries() -> None:
    layer, key = ours.RNN(ours.LSTMCell(H)), jax.random.key(0)
    with pytest.raises(ValueError, match="expected one array"):
        layer.init(key, (jnp.ones((B, T, D)), jnp.ones((B, T))))
    with pytest.raises(ValueError, match="expected at least 2 axes"):
        layer.init(key, jnp.ones(D))
    variables = layer.init(key, jnp.ones((B, T, D)))
    with pytest.raises(ValueError, match=r"expected the tuple \(c, h\)"):
        layer.apply(variables, jnp.ones((B, T, D)), initial_carry=jnp.zeros((B, H)))
    with pytest.raises(ValueError, match="expected floating point"):
        layer.apply(variables, jnp.ones((B, T, D)), initial_carry=(jnp.zeros((B, H + 1)), jnp.zeros((B, H + 1))))
    with pytest.raises(ValueError, match="D = 7 features, the parameters expect D = 3"):
        layer.apply(variables, jnp.ones((B, T, 7)))
