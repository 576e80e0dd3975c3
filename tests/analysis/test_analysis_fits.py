"""Fits of retention curves: exponential, power law, and the choice between them."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import analysis
from rnncore.analysis import RetentionCurve


def curve_of(logs, lags=None, **options):
    logs = jnp.asarray(logs)
    lags = jnp.arange(logs.shape[-1]) if lags is None else jnp.asarray(lags)
    return RetentionCurve(lags, logs, "rms", "state", "end", "", 1, logs.dtype.name, **options)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_exact_curves_are_told_apart(dtype):
    lags = jnp.arange(101)
    exponential = curve_of((0.25 - 0.105361 * lags).astype(dtype)).fit()
    assert exponential.model == "exponential" and exponential.chosen is exponential.exponential
    assert exponential.chosen.rate == pytest.approx(0.105361, rel=1e-5)
    assert exponential.chosen.offset == pytest.approx(0.25, rel=1e-4)
    assert exponential.half_life == pytest.approx(6.5788, abs=1e-3)
    assert exponential.chosen.window == (20, 100) and exponential.chosen.points == 81
    power = curve_of((-1.5 * jnp.log1p(lags)).astype(dtype)).fit()
    assert power.model == "power" and power.chosen.rate == pytest.approx(1.5, rel=1e-5)
    assert power.chosen.r_squared == pytest.approx(1) and power.exponential.r_squared < 0.99
    # The law itself is at 1/2 where (k + 1)^-1.5 is, which lies between lags 0 and 1.
    assert power.half_life == pytest.approx(math.log(2) / (1.5 * math.log(2)))
    for fit in (exponential, power):
        np.testing.assert_allclose(
            fit.chosen.log_retention(lags[20:]),
            fit.chosen.offset - fit.chosen.rate * (lags[20:] if fit.model == "exponential" else np.log1p(lags[20:])),
        )


def test_fits_are_those_of_the_normal_equations():
    """Rate, errors, R^2 and AIC against the design matrix, with noise."""
    rng = np.random.default_rng(0)
    lags = np.arange(1, 41)
    logs = -0.2 * lags + rng.normal(0, 0.3, (3, 40))
    for average in ("mean_log", "log_mean"):
        mean = logs.mean(0) if average == "mean_log" else np.log(np.exp(logs).mean(0))
        fit = curve_of(logs, lags).fit(window=(6, 30), average=average)
        inside = (lags >= 6) & (lags <= 30)
        y, count = mean[inside], 25
        for line, x in ((fit.exponential, lags[inside]), (fit.power, np.log1p(lags[inside]))):
            design = np.stack([np.ones(count), -x], 1)
            want, (missed,), *_ = np.linalg.lstsq(design, y)
            errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * missed / (count - 2))
            got = (line.offset, line.rate, line.offset_error, line.rate_error)
            np.testing.assert_allclose(got, [*want, *errors], rtol=1e-9)
            assert line.aic == pytest.approx(count * np.log(missed / count) + 6)
            assert line.r_squared == pytest.approx(1 - missed / np.sum((y - y.mean()) ** 2))
            assert (line.window, line.points) == ((6, 30), count)
        assert fit.model == "exponential" and fit.exponential.aic < fit.power.aic - 10


def test_a_named_model_is_kept():
    curve = curve_of(-0.1 * jnp.arange(50.0))
    fit = curve.fit("power", (5, 40))
    assert fit.model == "power" and fit.chosen is fit.power and fit.exponential == curve.fit(window=(5, 40)).exponential
    # A power law has no half-life of its own; that is then the crossing of the curve.
    assert fit.half_life == pytest.approx(math.log(2) / 0.1, rel=1e-9) and curve.fit("exponential").half_life > 0


def test_rounding_does_not_choose():
    """A curve that stays where it is, up to rounding, is an exponential of rate 0."""
    for noise in (0.0, 1e-16):
        fit = curve_of(noise * np.random.default_rng(0).normal(size=50)).fit()
        assert fit.model == "exponential" and fit.power.aic == fit.exponential.aic
        assert fit.chosen.rate == pytest.approx(0, abs=1e-16)
    growing = curve_of(0.1 * np.arange(20)).fit()
    assert growing.half_life == math.inf and growing.to_dict()["half_life"] is None


def uniform_gates(bias):
    """A trajectory of an LSTM whose forget gates stay at sigmoid(bias) (H,)."""
    cell = rnncore.LSTM(len(bias), recurrence=rnncore.Diagonal())
    zeros = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0), 1, bias.dtype))
    params = zeros._replace(bias=zeros.bias.at[1].set(bias))
    return analysis.trajectory(cell, params, jnp.zeros((100, 1), bias.dtype))


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_uniform_forget_gates_decay_by_a_power_law(dtype):
    """E f^k = 1 / (k + 1) and rms 1 / sqrt(2 k + 1), over gates at the middles of 4000 equal parts of (0, 1)."""
    f = (jnp.arange(4000, dtype=dtype) + 0.5) / 4000
    run = uniform_gates(jnp.log(f) - jnp.log1p(-f))
    lags = np.arange(101)
    logs = np.asarray(analysis.direct_retention(run), np.float64)
    np.testing.assert_allclose(np.exp(logs).mean(-1), 1 / (lags + 1), rtol=1e-3)
    curve = analysis.retention_curve(run, path="direct")
    np.testing.assert_allclose(np.exp(curve.log_retention), 1 / np.sqrt(2 * lags + 1), rtol=1e-3)
    assert np.exp(curve.log_retention)[100] == pytest.approx(0.0705, abs=5e-5)
    fit = curve.fit()
    assert fit.model == "power" and fit.power.rate == pytest.approx(0.5, abs=0.01)
    # A single rate would be a property of the window: it halves with every doubling of the lag.
    rates = [curve.fit("exponential", window).chosen.rate for window in ((10, 20), (20, 40), (40, 80))]
    assert rates[0] / rates[1] == pytest.approx(2, rel=0.1) and rates[1] / rates[2] == pytest.approx(2, rel=0.1)


def test_the_initialiser_of_uniform_gates_gives_that_law():
    bias = rnncore.initializers.uniform_gate()(jax.random.key(0), (4, 20_000), jnp.float64)[1]
    logs = analysis.direct_retention(uniform_gates(bias))[jnp.array([10, 100])]
    # Five standard deviations of the mean of 20000 draws of f^k.
    deviations = [math.sqrt((1 / (2 * k + 1) - 1 / (k + 1) ** 2) / 20_000) for k in (10, 100)]
    assert np.all(np.abs(np.exp(logs).mean(-1) - [1 / 11, 1 / 101]) < 5 * np.array(deviations))


def test_one_forget_bias_decays_exponentially():
    """f = sigmoid(b): the half-life of the direct path by the fit, and what 1 % after 100 steps takes."""
    for bias, f, half_life in ((0, 0.5, 1), (1, 0.73106, 2.213), (3, 0.95257, 14.27), (5, 0.99331, 103.2)):
        fit = analysis.retention_curve(uniform_gates(jnp.full(2, float(bias))), path="direct").fit()
        assert fit.model == "exponential" and fit.half_life == pytest.approx(half_life, rel=5e-4)
        assert math.exp(-fit.chosen.rate) == pytest.approx(f, abs=5e-6)
    for left, f, bias in ((1e-2, 0.954993, 3.0549), (math.exp(-1), math.exp(-0.01), 4.6002)):
        needed = -math.log(left ** (-1 / 100) - 1)
        assert needed == pytest.approx(bias, abs=1e-4) and 1 / (1 + math.exp(-needed)) == pytest.approx(f, abs=1e-6)
        curve = analysis.retention_curve(uniform_gates(jnp.full(2, needed)), path="direct")
        assert math.exp(curve.log_retention[100]) == pytest.approx(left, rel=1e-10)


def test_fits_go_to_json():
    fit = curve_of(-0.1 * jnp.arange(50.0)).fit()
    read = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert read["model"] == "exponential" and read["power"]["window"] == [10, 49]
    assert read["exponential"]["rate"] == fit.exponential.rate and read["half_life"] == fit.half_life


@pytest.mark.parametrize(
    ("logs", "options", "message"),
    [
        (-jnp.arange(9.0), {"model": "linear"}, "expected 'exponential', 'power' or 'auto'"),
        (-jnp.arange(9.0), {"average": "median"}, "expected 'mean_log' or 'log_mean'"),
        (
            -jnp.arange(9.0),
            {"window": (7, 20)},
            r"`fit\(window=\(7, 20\)\)`: 2 of the lags 0 to 8 lie in it .* needs 3",
        ),
        (-jnp.arange(9.0), {"window": 4}, "expected the first and the last lag"),
        (-jnp.arange(2.0), {}, "1 of the lags 0 to 1 lie in it"),
        (jnp.log(jnp.array([1.0, 0.5, 0.2, 0.1, 0.0])), {}, "at lag 4 the retention of some sequence is exactly 0"),
        (jnp.array([0.0, -1.0, -2.0, -3.0, jnp.inf]), {}, "at lag 4 the mean is over a sequence that is not as long"),
    ],
)
def test_fits_that_make_no_sense(logs, options, message):
    with pytest.raises(ValueError, match=message):
        curve_of(logs).fit(**options)


def test_a_window_before_the_end_of_a_curve_that_vanishes():
    curve = curve_of(jnp.where(jnp.arange(20) < 15, -0.3 * jnp.arange(20), -jnp.inf))
    assert curve.fit(window=(0, 14)).chosen.rate == pytest.approx(0.3)
