"""How far back the inputs matter, against closed forms and the whole derivative."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis_cases import close, linear, run_of

import rnncore
from rnncore import analysis

EXACT = 1e-12
XS = jnp.ones((2, 4, 2))


def test_window_of_a_scalar_linear_network():
    a, steps = 0.9, 60
    run = linear([[a]], steps)
    scaled = run.params._replace(input_kernel=jnp.full((1, 1, 1), 2.0))
    run = analysis.trajectory(run.cell, scaled, run.xs)
    close(analysis.input_influence(run), math.log(2) + math.log(a) * np.arange(steps)[::-1], EXACT)
    for share in (0.5, 0.9, 0.99):
        want = math.ceil(math.log(1 - share * (1 - a ** (2 * steps))) / math.log(a**2))
        assert int(analysis.effective_window(run, share)) == want
    assert int(analysis.effective_window(run, 1.0)) == steps
    silent = analysis.trajectory(run.cell, scaled._replace(input_kernel=jnp.zeros((1, 1, 1))), run.xs)
    assert int(analysis.effective_window(silent)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("of", [None, "h"])
def test_influence_is_the_derivative_in_every_input(of):
    run = run_of(rnncore.LSTM(4))
    first = jax.tree.map(lambda a: a[:, 0], run.carries)
    resets, lengths = jnp.zeros((2, 6), bool).at[0, 2].set(True), jnp.array([6, 4])
    ragged = analysis.trajectory(run.cell, run.params, run.xs, first, resets=resets, seq_lengths=lengths)

    def last(xs):
        carry, _ = rnncore.unroll(run.cell, run.params, xs, initial_carry=first, resets=resets, seq_lengths=lengths)
        return getattr(carry, of or "c")

    jacobian = np.asarray(jax.jit(jax.jacrev(last))(run.xs))
    want = np.stack([np.linalg.norm(jacobian[b, :, b], axis=(0, -1)) for b in (0, 1)])
    assert np.all(want[0, :2] == 0) and np.all(want[1, 4:] == 0) and want[1, 0] > 1e-3
    close(np.exp(analysis.input_influence(ragged, of)), want, EXACT)
    window = analysis.effective_window(ragged, 0.8, of=of)
    for b, length in enumerate((6, 4)):
        mass = want[b, :length][::-1] ** 2
        assert window[b] == np.searchsorted(np.cumsum(mass), 0.8 * mass.sum()) + 1


def test_influence_does_not_underflow_in_float32():
    run = linear([[0.0, 0.5], [-0.5, 0.0]], 1000, jnp.float32)
    logs = analysis.input_influence(run)
    assert logs.dtype == jnp.float32 and np.all(np.isfinite(logs))
    np.testing.assert_allclose(logs[0] - logs[-1], 999 * math.log(0.5), rtol=1e-6)
    assert int(analysis.effective_window(run)) == 2


def test_window_of_input_gradients():
    gradients = jnp.asarray([[[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]]])
    assert analysis.effective_window(gradients).tolist() == [3, 1]
    assert analysis.effective_window(gradients * 1e-250, share=1 / 27).tolist() == [1, 1]
    assert analysis.effective_window(0 * gradients).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (XS, {"share": 0.0}, r"`effective_window\(share=0.0\)`: expected more than 0 and at most 1"),
        (XS, {"share": 1.5}, "expected more than 0"),
        (XS, {"of": "c"}, "`of` applies to a trajectory only"),
        (jnp.ones((2, 4, 2), int), {}, r"<int64 \(2, 4, 2\)>\)`: expected a trajectory, or floating point"),
        (jnp.ones(4), {}, r"expected a trajectory, or floating point \(\*batch, T, D\)"),
        (XS * jnp.nan, {}, "holds 16 NaN or infinite numbers; find out"),
    ],
)
def test_bad_windows(source, options, message):
    with pytest.raises(ValueError, match=message):
        analysis.effective_window(source, **options)


def test_a_trajectory_without_the_field():
    with pytest.raises(ValueError, match=r"`input_influence\(of='c'\)`: the carry of Elman has no 'c', only h"):
        analysis.effective_window(linear([[0.5]], 3), of="c")
