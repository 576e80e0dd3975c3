"""Retention curves of closed form, and what is read off a curve."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis_cases import LSTMS, STEPS, close, linear, run_of

import rnncore
from rnncore import analysis
from rnncore.analysis import RetentionCurve

# -------------------------------------------------------------------------------- closed forms


def test_scalar_linear_network():
    curve = analysis.retention_curve(linear([[0.9]], 100))
    assert curve.decay_rate().rate == pytest.approx(0.105361, abs=1e-6)
    assert curve.decay_rate().r_squared == pytest.approx(1.0, abs=1e-12)
    assert curve.decay_rate().window == (20, 100)
    assert curve.half_life() == pytest.approx((6.5788, 6.5788), abs=1e-4)
    assert 10 ** float(curve.log10[100]) == pytest.approx(2.656e-5, rel=1e-3)


def test_orthogonal_linear_network_keeps_everything():
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
    run = linear(rotation, 50)
    for kind in ("operator", "rms", "bound", "a_priori_bound"):
        curve = analysis.retention_curve(run, kind=kind)
        assert np.abs(curve.log_retention).max() < 1e-12
        assert curve.decay_rate().rate == pytest.approx(0, abs=1e-12)
        assert curve.half_life().crossing == math.inf


def test_shear_grows_before_it_decays():
    run = linear([[0.9, 1.0], [0.0, 0.9]], 100)
    curve = analysis.retention_curve(run, kind="operator", lags=(1, 5, 10, 20, 50, 100))
    want = [1.5296, 3.3836, 3.9053, 2.7072, 0.2864, 0.0030]
    np.testing.assert_allclose(np.exp(curve.log_retention), want, atol=5e-5)
    bound = analysis.retention_curve(run, kind="bound", lags=(100,))
    assert float(bound.log10[0]) == pytest.approx(math.log10(2.9e18), abs=0.01)


@pytest.mark.parametrize("anchor", ["end", "start"])
@pytest.mark.parametrize("kind", ["operator", "rms"])
def test_nothing_left_is_minus_infinity(kind, anchor):
    curve = analysis.retention_curve(linear([[0.0, 5.0], [0.0, 0.0]], 4), kind=kind, anchor=anchor)
    size = 5 if kind == "operator" else 5 / math.sqrt(2)
    close(curve.log_retention[:2], [0, math.log(size)])
    assert np.all(curve.log_retention[2:] == -np.inf)
    assert np.all(curve.log_mean()[2:] == -np.inf) and np.all(curve.mean_log()[2:] == -np.inf)
    with pytest.raises(ValueError, match=r"at lag 2 the retention of some sequence is exactly 0.*ends before it"):
        curve.decay_rate()
    summary = curve.to_dict()
    assert summary["mean_log10"][2:] == [None] * 3 and summary["decay_rate"] is None
    assert summary["half_life"] == {"exponential": None, "crossing": 2.0}


def test_forget_bias_sets_the_half_life_of_the_direct_path():
    cell = rnncore.LSTM(3)
    zeros = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0), 2, jnp.float64))
    table = {0: (7.89e-31, 1), 1: (2.48e-14, 2.213), 2: (3.07e-6, 5.461), 3: (7.76e-3, 14.27), 4: (0.163, 38.19)}
    table |= {3.0549: (1e-2, 15.05), 4.6002: (math.exp(-1), 69.3)}
    for bias, (left, half_life) in table.items():
        params = zeros._replace(bias=zeros.bias.at[1].set(bias))
        curve = analysis.retention_curve(analysis.trajectory(cell, params, jnp.ones((100, 2))), path="direct")
        assert 10 ** float(curve.log10[100]) == pytest.approx(left, rel=4e-3)
        assert curve.half_life() == pytest.approx((half_life, half_life), rel=1e-3)


def test_ten_thousand_steps_back_in_float32():
    run = linear([[0.0, 0.5], [-0.5, 0.0]], 10_000, jnp.float32)
    v = rnncore.HiddenCarry(jnp.array([1.0, 2.0], jnp.float32))
    for options in ({"kind": "rms"}, {"kind": "rms", "anchor": "start"}, {"kind": "adjoint", "adjoint": v}):
        curve = analysis.retention_curve(run, lags=(1, 300, 10_000), **options)
        assert curve.dtype == "float32" and curve.log_retention.dtype == jnp.float32
        np.testing.assert_allclose(curve.log_retention, math.log(0.5) * np.array([1, 300, 10_000]), rtol=1e-6)


# --------------------------------------------------------------------------- reading the curve


def curve_of(logs, lags=None):
    logs = jnp.asarray(logs, jnp.float64)
    lags = jnp.arange(logs.shape[-1]) if lags is None else jnp.asarray(lags)
    return RetentionCurve(lags, logs, "rms", "state", "end", "", 1, "float64")


def test_mean_of_logs_and_log_of_mean():
    curve = curve_of(np.log([[1.0, 0.01], [1.0, 0.81]]))
    close(np.exp(curve.mean_log()), [1.0, 0.09])
    close(np.exp(curve.log_mean()), [1.0, 0.41])
    close(curve.log10[0], [0.0, -2.0])
    alone = curve_of(np.log([1.0, 0.25]))
    close(alone.mean_log(), alone.log_mean())


def test_decay_rate_is_the_line_of_least_squares():
    rng = np.random.default_rng(0)
    logs = rng.normal(size=(3, 41)) - 0.2 * np.arange(41)
    for window, first, last in ((None, 8, 40), ((3, 20), 3, 20)):
        slope, offset = np.polyfit(np.arange(first, last + 1), logs.mean(0)[first : last + 1], 1)
        fit = curve_of(logs).decay_rate(window)
        assert fit.rate == pytest.approx(-slope, rel=1e-10) and fit.window == (first, last)
        correlation = np.corrcoef(np.arange(first, last + 1), logs.mean(0)[first : last + 1])[0, 1]
        assert fit.r_squared == pytest.approx(correlation**2, rel=1e-10)
    with pytest.raises(ValueError, match=r"`decay_rate\(window=\(40, 60\)\)`: 1 of the lags 0 to 40 lie in it"):
        curve_of(logs).decay_rate((40, 60))


def test_half_life_by_fit_and_by_crossing():
    # Grows to 2 first: the crossing is on the curve, the fit on its tail.
    curve = curve_of(np.log([1.0, 2.0, 1.0, 0.75, 0.25, 0.125]))
    crossing = 3 + math.log(1.5) / math.log(3.0)
    assert curve.half_life((3, 5)).crossing == pytest.approx(crossing)
    assert curve.half_life((4, 5)).exponential == pytest.approx(1.0)
    assert curve_of([0.0, 0.1, 0.2]).half_life() == (math.inf, math.inf)
    assert curve_of([-4.0, -8.0, -12.0], lags=[4, 8, 12]).half_life().crossing == pytest.approx(math.log(2.0))


def test_to_dict_is_json():
    run = run_of(LSTMS["plain"])
    curve = analysis.retention_curve(run, path="cell")
    text = json.dumps(curve.to_dict(window=(1, 4)), allow_nan=False)
    summary = json.loads(text)
    assert summary["kind"] == "rms" and summary["path"] == "cell" and summary["n"] == 4
    assert summary["sequences"] == 2 and summary["lags"] == list(range(STEPS))
    assert summary["decay_rate"]["rate"] == curve.decay_rate((1, 4)).rate
    assert summary["decay_rate"]["window"] == [1, 4]
    close(summary["mean_log10"], np.asarray(curve.mean_log()) / math.log(10))
    growing = curve_of([0.0, 0.1, 0.2, 0.3]).to_dict()
    assert growing["half_life"] == {"exponential": None, "crossing": None}
    assert growing["decay_rate"]["rate"] == pytest.approx(-0.1)


def test_curve_is_a_pytree_that_keeps_what_it_is():
    curve = curve_of([0.0, -1.0])
    doubled = jax.tree.map(lambda a: 2 * a, curve)
    assert doubled.kind == "rms" and doubled.log_retention.tolist() == [0.0, -2.0]
