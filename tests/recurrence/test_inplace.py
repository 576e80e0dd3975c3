"""The reverse rule in every way of cutting and keeping a run, against plain autodiff."""

from __future__ import annotations

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore

IDS = ("elman_silu", "lstm_both-dense", "gru-heads", "mgu-diagonal", "user_fast_slow-dense")
STEPS = 7


def options_of(case, name):
    """Masks, zoneout and whatever else a run can have."""
    rng = np.random.default_rng(3)
    mask = jnp.asarray(rng.random((4, cases.HIDDEN)) < 0.7) / 0.7
    carry = jax.eval_shape(case.cell.initial_carry)
    stay = type(carry)(*(jnp.asarray(rng.random((4, STEPS, cases.HIDDEN)) < 0.3) for _ in carry))
    return {
        "plain": {},
        "reverse": {"reverse": True},
        "states": {"return_states": True, "recurrent_mask": mask},
        "stay": {"zoneout": stay, "recurrent_mask": mask},
    }[name]


@functools.cache
def expected(case, name, masked):
    problem = cases.draw(case, steps=STEPS, lengths=masked, resets=masked)
    run = cases.runner(case, "autodiff", **options_of(case, name))
    results, gradients, cotangents = cases.pull(run, problem)
    return problem, results, gradients, cotangents


@pytest.mark.sample(1)
@pytest.mark.parametrize("recompute", ["nothing", "gates", "chunk"])
@pytest.mark.parametrize("every", [None, 3], ids=["whole", "chunks-and-a-rest"])
@pytest.mark.parametrize("id", IDS)
def test_chunks_and_policies(id, every, recompute):
    case = cases.BY_ID[id]
    problem, results, gradients, cotangents = expected(case, "states", True)
    options = options_of(case, "states") | {"checkpoint_every": every, "recompute": recompute}
    got = cases.puller(cases.runner(case, "scan", **options))(problem, cotangents)
    cases.assert_close(got, (results, gradients), cases.FLOAT64)


@pytest.mark.sample(1)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("name", ["plain", "reverse", "stay"])
def test_options(name, masked):
    case = cases.BY_ID["lstm_both-dense"]
    problem, results, gradients, cotangents = expected(case, name, masked)
    run = cases.runner(case, "scan", checkpoint_every=2, **options_of(case, name))
    cases.assert_close(cases.puller(run)(problem, cotangents), (results, gradients), cases.FLOAT64)


@pytest.mark.slow
def test_time_first_and_vmap():
    """Time along the first axis, and one example at a time under vmap, are the batch with time second."""
    case = cases.BY_ID["user_fast_slow-dense"]
    problem, results, gradients, cotangents = expected(case, "plain", False)
    run = cases.runner(case, "scan", time_major=True, checkpoint_every=3)

    def turned(params, xs, carry, *_):
        carry, ys = run(params, jnp.swapaxes(xs, 0, 1), carry)
        return carry, jnp.swapaxes(ys, 0, 1)

    def mapped(params, xs, carry, *_):
        one = cases.runner(case, "scan", checkpoint_every=3)
        return jax.vmap(one, (None, 0, 0))(params, xs, carry)

    for way in (turned, mapped):
        cases.assert_close(cases.puller(way)(problem, cotangents), (results, gradients), cases.FLOAT64)


def test_the_precision_around_the_model_holds_for_its_gradient():
    cell = rnncore.LSTM(4)
    params = cell.init(jax.random.key(0), 3)

    def loss(params, xs):
        with jax.default_matmul_precision("highest"):
            return jnp.sum(rnncore.unroll(cell, params, xs)[1])

    closed = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, jnp.ones((2, 5, 3)))
    asked = [e.params["precision"] for e in cases.equations(closed.jaxpr) if e.primitive.name == "dot_general"]
    assert len(asked) >= 5 and set(asked) == {(jax.lax.Precision.HIGHEST,) * 2}


def test_weight_gradients_of_half_precision_are_summed_in_float32():
    """Ones summed over T and the batch: bfloat16 would stop at 256."""
    cell = rnncore.Elman(2, activation_fn=lambda x: x)
    params = jax.tree.map(lambda a: jnp.zeros_like(a, jnp.bfloat16), cell.init(jax.random.key(0), 3))
    xs = jnp.ones((4, 256, 3), jnp.bfloat16)
    for options in ({}, {"checkpoint_every": 1}):

        def loss(params, options=options):
            _, ys = rnncore.unroll(cell, params, xs, **options)
            return jnp.sum(ys.astype(jnp.float32))

        gradients = jax.grad(loss)(params)
        np.testing.assert_array_equal(gradients.bias.astype(jnp.float32), 1024)
        np.testing.assert_array_equal(gradients.input_kernel.astype(jnp.float32), 1024)


@pytest.mark.slow
def test_residuals_in_bfloat16_give_gradients_of_that_precision():
    cell = rnncore.LSTM(8)
    params = cell.init(jax.random.key(0), 3)
    xs = jax.random.normal(jax.random.key(1), (2, 20, 3), jnp.float32)

    def gradients(**options):
        def loss(params):
            return jnp.sum(jnp.sin(rnncore.unroll(cell, params, xs, **options)[1]))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    for recompute in ("nothing", "gates"):
        pairs = zip(gradients(), gradients(residual_dtype=jnp.bfloat16, recompute=recompute), strict=True)
        errors = [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) for a, b in pairs]
        assert 1e-5 < max(errors) < 2**-7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_dtype": jnp.int8}, "expected a floating dtype"),
        ({"residual_dtype": "half a float"}, "expected a floating dtype"),
    ],
)
def test_residual_dtypes_that_make_no_sense(options, message):
    cell = rnncore.Elman(2)
    with pytest.raises(ValueError, match=message):
        rnncore.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3)), **options)
