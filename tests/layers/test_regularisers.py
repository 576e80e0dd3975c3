"""Recurrent masks, zoneout and reset carries: against a loop written out step by step."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, Problem

import rnncore

B, T, H = 3, 5, cases.HIDDEN
CELLS = ("elman_silu", "lstm_both-dense", "gru-heads", "indrnn", "user_fast_slow-dense")
every_mode = pytest.mark.parametrize(("case", "backend"), cases.rows(ids=CELLS, every_backend=True))


def draws(case: Case, kind: str) -> dict[str, Any]:
    """A recurrent mask, zoneout for every field of the carry (booleans, shares, or a number), a reset carry."""
    rng = np.random.default_rng(7)
    carry = jax.eval_shape(lambda: case.cell.initial_carry((B,)))
    stays = {
        "booleans": [jnp.asarray(rng.random((B, T, H)) < 0.3) for _ in carry],
        "shares": [jnp.asarray(rng.random((B, T, H))) for _ in carry],
        "numbers": [0.25 + 0.5 * n for n in range(len(carry))],
        "h only": [*[None] * (len(carry) - 1), jnp.asarray(rng.random((B, T, H)) < 0.3)],
    }
    return dict(
        recurrent_mask=jnp.asarray(rng.random((B, H)) < 0.5) * 2.0,
        zoneout=type(carry)(*stays[kind]),
        reset_carry=jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), carry),
    )


def by_hand(case: Case, problem: Problem, given: Any) -> Any:
    """What `unroll` should do, one step after another, with JAX's own derivatives."""
    cell, carry, ys = case.cell, problem.carry, []
    assert isinstance(cell, rnncore.PointwiseCell)
    last = carry
    for t in range(T):
        back = problem.resets[:, t, None]
        pairs = zip(given["reset_carry"], carry, strict=True)
        carry = type(carry)(*(jnp.where(back, a, b) for a, b in pairs))
        r = cell.recurrent_matmul(problem.params, carry.h * given["recurrent_mask"])
        p = jax.tree.map(lambda u: jnp.broadcast_to(u, (B, H)), problem.params.units)
        z = cell.project(problem.params, problem.xs[:, t])
        new, _ = cell.pointwise(p, cell.split(z), cell.split(r), carry)
        fields = []
        for stay, n, o in zip(given["zoneout"], new, carry, strict=True):
            share = 0.0 if stay is None else stay[:, t] if jnp.ndim(stay) else stay
            fields.append(share * o + (1 - jnp.asarray(share, n.dtype)) * n)
        carry = type(carry)(*fields)
        ys.append(carry.h)
        here = problem.lengths[:, None] == t + 1
        last = type(carry)(*(jnp.where(here, a, b) for a, b in zip(carry, last, strict=True)))
    return last, jnp.stack(ys, 1)


def loop_of(case: Case, given: Any) -> Any:
    return lambda *args: by_hand(case, Problem(*args), given)


@pytest.mark.sample(1)
@every_mode
def test_values_and_gradients_are_those_of_the_loop(case: Case, backend: str):
    problem, given = cases.draw(case, (B,), T, lengths=True, resets=True), draws(case, "booleans")
    results, gradients, d_results = cases.pull(cases.runner(case, backend, **given), problem)
    want = cases.puller(loop_of(case, given))(problem, d_results)
    cases.assert_close((results, gradients), want, cases.FLOAT64)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("shares", {"checkpoint_every": 2, "recompute": "gates"}),
        ("numbers", {"checkpoint_every": 2, "recompute": "chunk"}),
        ("h only", {"return_states": True}),
    ],
)
@pytest.mark.parametrize(("case", "backend"), cases.rows(ids=("lstm_both-heads",)))
def test_every_kind_of_zoneout_and_memory_policy(case: Case, backend: str, kind: str, options: Any):
    problem, given = cases.draw(case, (B,), T, lengths=True, resets=True), draws(case, kind)
    states = "return_states" in options

    def run(*args: Any) -> Any:
        carry, ys, *more = cases.runner(case, backend, **given, **options)(*args)
        if more:  # the carries are those after zoneout: h is the output
            carry = (carry, more[0].carries.h - ys)
        return carry, ys

    def loop(*args: Any) -> Any:
        carry, ys = by_hand(case, Problem(*args), given)
        return ((carry, jnp.zeros_like(ys)) if states else carry), ys

    results, gradients, d_results = cases.pull(run, problem)
    cases.assert_close((results, gradients), cases.puller(loop)(problem, d_results), cases.FLOAT64)


def test_second_order_and_forward_mode():
    case = cases.BY_ID["lstm_both-dense"]
    problem, given = cases.draw(case, (B,), T, lengths=True, resets=True), draws(case, "shares")
    tangents = cases.cotangents(problem[:3], seed=3)

    def moved(run: Any) -> Any:
        """The gradient along a direction, and how it changes along it."""

        def loss(*moving: Any) -> Any:
            carry, ys = run(*moving, *problem[3:])
            return jnp.sum(jnp.sin(ys)) + jnp.sum(carry.h * carry.h)

        slope = jax.jvp(loss, problem[:3], tangents)[1]
        return slope, jax.jvp(jax.grad(loss, argnums=(0, 1, 2)), problem[:3], tangents)[1]

    ours = jax.jit(lambda: moved(cases.runner(case, "scan", **given)))()
    loop = jax.jit(lambda: moved(loop_of(case, given)))()
    cases.assert_close(ours, loop, cases.FLOAT64)


def test_vmap_over_masks_is_one_run_for_each():
    case = cases.BY_ID["gru-dense"]
    params, xs, carry, *_ = cases.draw(case, (B,), T)
    rng = np.random.default_rng(5)
    masks, stay = (jnp.asarray(rng.random((2, *shape)) < 0.5) for shape in ((B, H), (B, T, H)))

    def loss(mask: Any, stay: Any) -> Any:
        def run(params: Any) -> Any:
            options = dict(recurrent_mask=mask, zoneout=rnncore.HiddenCarry(stay))
            return jnp.sum(rnncore.unroll(case.cell, params, xs, initial_carry=carry, **options)[1] ** 2)

        return jax.grad(run)(params)

    together = jax.jit(jax.vmap(loss))(masks, stay)
    apart = [jax.jit(loss)(m, s) for m, s in zip(masks, stay, strict=True)]
    cases.assert_close(together, jax.tree.map(lambda *a: jnp.stack(a), *apart), cases.FLOAT64)
    assert not np.allclose(apart[0].recurrent_kernel, apart[1].recurrent_kernel)


def test_masks_are_constants_to_derivatives():
    case = cases.BY_ID["gru-dense"]
    params, xs, carry, *_ = cases.draw(case, (B,), T)

    def loss(mask: Any, share: Any) -> Any:
        options = dict(recurrent_mask=mask, zoneout=rnncore.HiddenCarry(share))
        return jnp.sum(rnncore.unroll(case.cell, params, xs, initial_carry=carry, **options)[1])

    mask, share = jnp.full((B, H), 0.5), jnp.full((B, T, H), 0.25)
    for gradient in jax.grad(loss, argnums=(0, 1))(mask, share):
        np.testing.assert_array_equal(gradient, 0)
    assert loss(mask, share) != loss(2 * mask, share) and loss(mask, share) != loss(mask, 2 * share)


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"reverse": True, "keep_order": True}])
def test_time_major_and_reverse_take_zoneout_in_the_order_of_the_inputs(options: Any):
    case = cases.BY_ID["lstm-dense"]
    params, xs, carry, lengths, _ = cases.draw(case, (B,), T, lengths=True)
    rng = np.random.default_rng(5)
    stay = [jnp.asarray(rng.random((B, T, H)) < 0.5) for _ in carry]

    def run(time_major: bool) -> Any:
        turn = (lambda a: jnp.swapaxes(a, 0, 1)) if time_major else lambda a: a
        last, ys = rnncore.unroll(
            case.cell, params, turn(xs), initial_carry=carry, seq_lengths=lengths, time_major=time_major,
            zoneout=rnncore.LSTMCarry(*map(turn, stay)), **options,
        )  # fmt: skip
        return last, turn(ys)

    cases.assert_close(run(True), run(False), 0.0)
    # In reverse a unit that stays at input step t keeps its value there: seen in the order of the inputs.
    if options.get("keep_order"):
        _, ys = run(False)
        valid = np.arange(T - 1) + 1 < np.asarray(lengths)[:, None]
        same = np.asarray(ys[:, :-1] == ys[:, 1:])
        np.testing.assert_array_equal(same[valid], np.asarray(stay[1])[:, :-1][valid])


def test_pieces_of_a_stream_reset_to_the_reset_carry():
    case = cases.BY_ID["lstm-dense"]
    params, xs, _, _, resets = cases.draw(case, (B,), T, resets=True)
    learned = jax.tree.map(lambda a: a + 0.7, case.cell.initial_carry((B,), xs.dtype))
    whole, ys = rnncore.unroll(case.cell, params, xs, initial_carry=learned, resets=resets)
    carry, pieces = learned, []
    for part in (slice(0, 2), slice(2, T)):
        options = dict(initial_carry=carry, resets=resets[:, part], reset_carry=learned)
        carry, y = rnncore.unroll(case.cell, params, xs[:, part], **options)
        pieces.append(y)
    assert np.asarray(resets[:, 2:]).any()
    cases.assert_close((carry, jnp.concatenate(pieces, 1)), (whole, ys), cases.FLOAT64)


LSTM = rnncore.LSTM(H)
XS = jnp.ones((B, T, 3))
WRONG = {
    "shape of the mask": (dict(recurrent_mask=jnp.ones((B, T, H))), "recurrent_mask.*expected .3, 4."),
    "a carry of another cell": (dict(zoneout=rnncore.HiddenCarry(0.1)), "zoneout.*LSTMCarry"),
    "shape of zoneout": (dict(zoneout=rnncore.LSTMCarry(jnp.ones((B, H)), None)), "c=.3, 4.*expected a number"),
    "share above 1": (dict(zoneout=rnncore.LSTMCarry(None, 1.5)), "h=1.5.*share from 0 to 1"),
    "reset carry without resets": (dict(reset_carry=LSTM.initial_carry((B,))), "reset_carry.*only with resets"),
    "shape of the reset carry": (
        dict(resets=jnp.zeros((B, T), bool), reset_carry=LSTM.initial_carry((2,))), "reset_carry.*expected"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_regularisers_are_refused(fault: str):
    options, message = WRONG[fault]
    with pytest.raises(ValueError, match=f"(?s)`unroll.*{message}"):
        rnncore.unroll(LSTM, LSTM.init(jax.random.key(0), 3), XS, **options)


def test_a_mask_on_a_cell_that_shows_no_product_is_refused_by_every_backend():
    cell = rnncore.ResetBeforeGRU(H)
    params = cell.init(jax.random.key(0), 3)
    with pytest.raises(NotImplementedError, match="no backend.*scan: .*autodiff: .*recurrent_mask masks"):
        rnncore.unroll(cell, params, XS, recurrent_mask=jnp.ones((B, H)))
    rnncore.unroll(cell, params, XS, zoneout=rnncore.HiddenCarry(0.1))
