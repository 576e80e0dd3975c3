"""Omega, gradient flossing and h-detach against written-out formulas, finite differences and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import analysis


def close(got, want, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


@functools.cache
def problem(cell, scale=0.6, steps=6):
    """(params, inputs of two sequences, initial carry), random."""
    rng = np.random.default_rng(0)

    def normal(a):
        return jnp.asarray(rng.normal(0, scale, a.shape))

    params = jax.tree.map(normal, jax.eval_shape(lambda: cell.init(jax.random.key(0), 3)))
    carry = jax.tree.map(normal, jax.eval_shape(lambda: cell.initial_carry((2,))))
    return params, jnp.asarray(rng.normal(size=(2, steps, 3))), carry


def loss_of_all(carry, outputs):
    return jnp.sum(jnp.sin(outputs)) + jnp.sum(carry.h**2)


def loss_of_last(carry, outputs):
    return jnp.sum(jnp.cos(carry.h))


def slope(f, params, direction, eps=1e-5):
    """Central difference along a direction."""
    ends = [f(jax.tree.map(lambda a, d, s=s: a + s * eps * d, params, direction)) for s in (1, -1)]
    return (ends[0] - ends[1]) / (2 * eps)


def inner(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# ---------------------------------------------------------------------------------------- omega


def test_omega_is_the_formula_of_exact_jacobians():
    cell = rnncore.LSTM(3, peepholes=True)
    params, xs, carry = problem(cell)
    run = analysis.trajectory(cell, params, xs, carry)
    jacobians = np.asarray(analysis.step_jacobians(run))
    rows = np.concatenate(list(analysis.gradients_over_time(loss_of_all, cell, params, xs, carry).states), -1)[:, 1:]
    pulled = np.einsum("bti,btij->btj", rows, jacobians)
    ratio = np.linalg.norm(pulled, axis=-1) / np.linalg.norm(rows, axis=-1)

    @jax.jit
    def omegas(params):
        return [analysis.pascanu_omega(loss_of_all, cell, params, xs, carry, form=form) for form in ("paper", "code")]

    close(omegas(params), [((ratio - 1) ** 2).sum(-1).mean(), ((ratio**2 - 1) ** 2).mean()])


@pytest.mark.slow
def test_gradient_of_omega_is_the_immediate_one_in_u():
    """h_t = tanh(h U + ...): with h_t and v_t as numbers, v (1 - h^2) U^T is all that U does."""
    cell = rnncore.Elman(3)
    params, xs, carry = problem(cell)
    h = analysis.trajectory(cell, params, xs, carry).carries.h[:, 1:]
    v = analysis.gradients_over_time(loss_of_last, cell, params, xs, carry).states.h[:, 1:]

    def written_out(kernel, form):
        square = jnp.sum(((v * (1 - h**2)) @ kernel[:, 0].T) ** 2, -1) / jnp.sum(v**2, -1)
        if form == "code":
            return jnp.mean((square - 1) ** 2)
        return jnp.mean(jnp.sum((jnp.sqrt(square) - 1) ** 2, -1))

    @jax.jit
    def omegas(params):
        def one(form):
            return jax.value_and_grad(
                lambda params: analysis.pascanu_omega(loss_of_last, cell, params, xs, carry, form=form)
            )(params)

        return {form: one(form) for form in ("paper", "code")}

    for form, (value, grads) in omegas(params).items():
        want, d_kernel = jax.value_and_grad(written_out)(params.recurrent_kernel, form)
        close(value, want)
        close(grads.recurrent_kernel, d_kernel)
        assert not np.any(grads.input_kernel) and not np.any(grads.bias)


def test_steps_that_do_not_count_in_omega():
    cell = rnncore.Elman(3, activation_fn=jax.nn.relu)
    params, xs, carry = problem(cell)
    lengths, resets = jnp.array([6, 4]), jnp.zeros((2, 6), bool).at[0, 2].set(True)

    @jax.jit
    def omegas(params, xs, carry):
        """The whole, and what should count of it: a loss of the last state has no gradient before a reset."""

        def omega(xs, carry, **options):
            return analysis.pascanu_omega(loss_of_last, cell, params, xs, carry, **options)

        after = cell.update(params, jax.tree.map(lambda a: a[0], carry), cell.project(params, xs[0, 2]))[0]
        parts = omega(xs[0, 3:], after) + omega(xs[1, :4], jax.tree.map(lambda a: a[1], carry))
        return omega(xs, carry, seq_lengths=lengths, resets=resets), parts / 2

    close(*omegas(params, xs, carry))


def test_omega_without_any_gradient():
    cell = rnncore.Elman(3, activation_fn=jax.nn.relu)
    params, xs, carry = problem(cell)

    @jax.jit
    @jax.value_and_grad
    def omega(params, weight):
        def loss(carry, outputs):
            return weight * carry.h.sum()

        both = [analysis.pascanu_omega(loss, cell, params, xs, carry, form=form) for form in ("paper", "code")]
        return both[0] + both[1]

    # No step counts, and nothing is NaN.
    value, grads = omega(params, 0.0)
    assert value == 0 and all(np.all(g == 0) for g in jax.tree.leaves(grads))
    # All units dead: the last step alone has a gradient, keeps none of it, adds 1 twice, and gives no NaN.
    value, grads = omega(params._replace(bias=jnp.full_like(params.bias, -50.0)), 1.0)
    assert value == 2 and np.all(np.isfinite(grads.recurrent_kernel))


# ------------------------------------------------------------------------------------- flossing


@pytest.mark.ci
def test_flossing_has_the_gradient_of_finite_differences():
    cell, k, target, options = rnncore.LSTM(3), 4, 0.3, {"burn_in": 1, "qr_every": 2}
    params, xs, carry = problem(cell)
    direction = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(5).normal(size=a.shape)), params)

    @jax.jit
    @jax.value_and_grad
    def floss(params):
        return analysis.gradient_flossing(cell, params, xs, k, target, initial_carry=carry, **options)

    value, grads = floss(params)
    exponents = analysis.lyapunov_exponents(analysis.trajectory(cell, params, xs, carry), k, **options).exponents
    close(value, np.mean((exponents - target) ** 2))
    want = float(slope(lambda params: floss(params)[0], params, direction))
    assert abs(want) > 0.1
    assert float(inner(grads, direction)) == pytest.approx(want, rel=1e-7)


@pytest.mark.slow
def test_descent_on_the_flossing_loss_brings_exponents_to_zero():
    cell = rnncore.Elman(4)
    params, xs, _ = problem(cell, 0.3, 12)

    @jax.jit
    def descend(params):
        def step(params, _):
            value, grads = jax.value_and_grad(analysis.gradient_flossing, 1)(cell, params, xs, 2)
            return jax.tree.map(lambda p, g: p - 0.02 * g, params, grads), value

        return jax.lax.scan(step, params, None, length=60)

    trained, values = descend(params)
    before, after = (analysis.lyapunov_exponents(analysis.trajectory(cell, p, xs), 2) for p in (params, trained))
    assert values[-1] < 0.2 * values[0]
    assert np.abs(after.exponents).max() < 0.5 * np.abs(before.exponents).max()


# ------------------------------------------------------------------------------------- h-detach


def test_h_detach_with_p_1_is_the_direct_path():
    cell = rnncore.LSTM(3)
    params, xs, carry = problem(cell)

    def last(c, p):
        return analysis.h_detach(cell, params, xs, jax.random.key(0), p, initial_carry=carry._replace(c=c))[0].c

    f = analysis.trajectory(cell, params, xs, carry).gates.f
    jacobian = jax.jit(jax.jacrev(last), static_argnums=1)
    for b in range(2):
        close(jacobian(carry.c, 1.0)[b, :, b], np.diag(np.prod(np.asarray(f[b]), 0)), 1e-15)
    direct = analysis.direct_retention(analysis.trajectory(cell, params, xs, carry))[:, -1]
    close(np.log(np.diagonal(jacobian(carry.c, 1.0)[1, :, 1])), direct[1])
    # p = 0 is the exact gradient.
    jacobians = analysis.step_jacobians(analysis.trajectory(cell, params, xs, carry))
    product = analysis.jacobian_product(jacobians).to_dense()[:, -1, :3, :3]
    for b in range(2):
        close(jacobian(carry.c, 0.0)[b, :, b], product[b], 1e-12)


def test_h_detach_blocks_single_steps():
    """Where the draw falls, K_t and G_t are missing from the product, and only there."""
    cell, key = rnncore.LSTM(3), jax.random.key(4)
    params, xs, carry = problem(cell)
    blocked = np.asarray(jax.random.bernoulli(key, 0.5, (6,)))
    assert 0 < blocked.sum() < 6
    jacobians = np.asarray(analysis.step_jacobians(analysis.trajectory(cell, params, xs, carry)))[0].copy()
    jacobians[blocked, :, 3:] = 0.0
    want = functools.reduce(lambda product, j: j @ product, jacobians, np.eye(6))

    def last(c, h):
        return jnp.concatenate(list(analysis.h_detach(cell, params, xs, key, initial_carry=type(carry)(c, h))[0]), -1)

    got = jax.jit(jax.jacrev(last, (0, 1)))(carry.c, carry.h)
    close(np.concatenate([got[0][0, :, 0], got[1][0, :, 0]], -1), want, 1e-12)


@pytest.mark.sample(1)
@pytest.mark.parametrize("cell", [rnncore.LSTM(3, coupled=True), rnncore.GRU(3)], ids=["lstm", "gru"])
def test_h_detach_returns_what_unroll_returns(cell):
    params, xs, carry = problem(cell)
    for without, options in (
        ({}, {"initial_carry": carry, "seq_lengths": jnp.array([6, 2]), "return_states": True, "reverse": True}),
        ({"bias": None}, {"time_major": True, "resets": jnp.zeros((2, 6), bool).at[0, 1].set(True)}),
    ):
        given = params._replace(**without)
        got = analysis.h_detach(cell, given, xs, jax.random.key(0), 0.5, **options)
        want = rnncore.unroll(cell, given, xs, **options)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(lambda a, b: close(a, b, 1e-13), got, want)


def test_h_detach_leaves_the_gradient_beside_the_product():
    """A GRU with p = 1 keeps z_t h_{t-1}."""
    cell = rnncore.GRU(3)
    params, xs, carry = problem(cell)

    def last(h):
        return analysis.h_detach(cell, params, xs[0], jax.random.key(0), 1.0, initial_carry=type(carry)(h))[0].h

    got = jax.jit(jax.jacrev(last))(carry.h[0])
    z = analysis.trajectory(cell, params, xs[0], jax.tree.map(lambda a: a[0], carry)).gates.z
    close(got, np.diag(np.prod(np.asarray(z), 0)), 1e-14)


# ---------------------------------------------------------------------------------------- errors


def test_errors():
    cell = rnncore.LSTM(3)
    params, xs, _ = problem(cell)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"`pascanu_omega\(form='both'\)`: expected 'paper' or 'code'"):
        analysis.pascanu_omega(loss_of_all, cell, params, xs, form="both")
    other = rnncore.ResetBeforeGRU(3)
    for call in (
        lambda: analysis.pascanu_omega(loss_of_all, other, problem(other)[0], xs),
        lambda: analysis.h_detach(other, problem(other)[0], xs, key),
    ):
        with pytest.raises(NotImplementedError, match=r"\(ResetBeforeGRU\)`: expected a PointwiseCell"):
            call()
    with pytest.raises(ValueError, match=r"`h_detach\(cell=<str>\)`: expected an rnncore cell"):
        analysis.h_detach("lstm", params, xs, key)
    with pytest.raises(ValueError, match=r"`h_detach\(p=1.5\)`: expected a probability"):
        analysis.h_detach(cell, params, xs, key, 1.5)
    with pytest.raises(ValueError, match=r"`h_detach\(xs=<int64 \(2, 6, 3\)>\)`: expected floating point"):
        analysis.h_detach(cell, params, xs.astype(int), key)
    with pytest.raises(ValueError, match=r"`lyapunov_exponents\(k=7\)`: the state has n = 6 entries"):
        analysis.gradient_flossing(cell, params, xs, 7)
    with pytest.raises(ValueError, match=r"params=...\)`: .bias of shape \(4, 3\) holds 12 NaN"):
        analysis.gradient_flossing(cell, params._replace(bias=params.bias * jnp.nan), xs, 2)
    with pytest.raises(ValueError, match=r"`gradient_flossing\(k=4\)`: an exponent is -inf, .* ask for fewer"):
        analysis.gradient_flossing(cell, params._replace(recurrent_kernel=0 * params.recurrent_kernel), xs, 4)


@pytest.mark.slow
def test_sparsity_is_the_mean_of_a_gate_without_the_padding():
    cell = rnncore.LSTM(4)
    params, xs, carry = problem(cell)
    lengths = jnp.array([6, 2])

    def penalty(params, gate="o"):
        _, _, states = rnncore.unroll(cell, params, xs, initial_carry=carry, seq_lengths=lengths, return_states=True)
        return analysis.gate_sparsity(states.gates, gate, lengths)

    gates = analysis.trajectory(cell, params, xs, carry).gates
    close(penalty(params), np.concatenate([gates.o[0], gates.o[1, :2]]).mean())
    close(analysis.gate_sparsity(gates, "f"), np.mean(gates.f))
    pushed = jax.tree.map(lambda a, b: a - 20 * b, params, jax.grad(penalty)(params))
    assert penalty(pushed) < 0.8 * penalty(params)
    with pytest.raises(ValueError, match="expected one of the gates of the run, i, f, g, o"):
        analysis.gate_sparsity(gates, "z")
