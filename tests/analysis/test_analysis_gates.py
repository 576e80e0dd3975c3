"""Gate statistics against NumPy, and the three time scales of a forget gate."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis_cases import LSTMS, close, run_of
from cases import FastSlow

import rnncore
from rnncore import analysis

LSTM = LSTMS["plain"]


def assert_summary(got, values, lower, upper, levels):
    """values: (N, ...), all that counts."""
    close(got.mean, values.mean(0), 1e-12)
    close(got.quantiles, np.quantile(values, levels, 0), 1e-12)
    close(got.left, (values < lower).mean(0), 1e-12)
    close(got.right, (values > upper).mean(0), 1e-12)


@pytest.mark.parametrize("lengths", [None, (6, 3)], ids=["whole", "lengths"])
def test_statistics_are_those_of_numpy(lengths):
    run, count = run_of(LSTM), lengths or (6, 6)
    if lengths:
        first = jax.tree.map(lambda a: a[:, 0], run.carries)
        run = analysis.trajectory(LSTM, run.params, run.xs, first, seq_lengths=jnp.array(lengths))
    levels = (0.0, 0.3, 1.0)
    given = {"i": (0.3, 0.6), "g": (-0.2, 0.4)}
    statistics = analysis.gate_statistics(run, thresholds=given, quantiles=levels)
    assert list(statistics) == ["i", "f", "g", "o"]
    for name, got in statistics.items():
        gate = np.asarray(getattr(run.gates, name))
        values = np.concatenate([gate[b, :n] for b, n in enumerate(count)])
        thresholds = given.get(name, (0.1, 0.9))
        assert got.thresholds == thresholds
        assert_summary(got.unit, values, *thresholds, levels)
        assert_summary(got.overall, values.reshape(-1), *thresholds, levels)
        assert got.unit.quantiles.shape == (3, 4) and got.overall.mean.shape == ()
    assert 0 < float(statistics["i"].overall.left) < 1 and 0 < float(statistics["g"].overall.right) < 1


@pytest.mark.parametrize(
    ("cell", "candidates", "gates"),
    [
        (rnncore.GRU(4), {"n"}, {"r", "z", "n"}),
        (rnncore.ResetBeforeGRU(4), {"n"}, {"r", "z", "n"}),
        (rnncore.Elman(4), {"h"}, {"h"}),
        (FastSlow(4), set(), {"keep", "n"}),  # a user's cell that returns a dict
    ],
)
def test_candidates_have_thresholds_of_their_own(cell, candidates, gates):
    statistics = analysis.gate_statistics(run_of(cell))
    assert set(statistics) == gates
    for name, got in statistics.items():
        assert got.thresholds == ((-0.9, 0.9) if name in candidates else (0.1, 0.9))
    same = analysis.gate_statistics(run_of(cell), thresholds=(0.4, 0.6))
    assert all(got.thresholds == (0.4, 0.6) for got in same.values())


def test_statistics_of_one_float32_sequence_inside_jit():
    cell = rnncore.LSTM(3, forget_bias=6.0)
    run = analysis.trajectory(cell, cell.init(jax.random.key(0), 2), jnp.zeros((5, 2), jnp.float32))
    got = jax.jit(lambda run: analysis.gate_statistics(run)["f"].unit)(run)
    assert got.mean.dtype == got.right.dtype == jnp.float32
    assert got.right.tolist() == [1.0] * 3 and got.left.tolist() == [0.0] * 3


def test_timescales_by_forget_bias():
    f = jax.nn.sigmoid(jnp.asarray([1.0, 0.0]))
    close(analysis.timescales(f), [3.71828, 2.0], 1e-5)
    close(analysis.timescales(f, "exp"), [3.19222, 1 / math.log(2)], 1e-5)
    close(analysis.timescales(f, "half_life"), [2.21268, 1.0], 1e-5)
    # The table of half-lives by bias.
    biases = jnp.arange(6.0)
    table = [1, 2.213, 5.461, 14.27, 38.19, 103.2]
    np.testing.assert_allclose(analysis.timescales(jax.nn.sigmoid(biases), "half_life"), table, rtol=5e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_timescales_of_gates_that_are_shut_or_open(dtype):
    f = jnp.asarray([0.0, 1.0], dtype)
    for kind, shut in (("lin", 1.0), ("exp", 0.0), ("half_life", 0.0)):
        got = analysis.timescales(f, kind)
        assert got.dtype == dtype and got.tolist() == [shut, math.inf]
        # A trace cannot see the values, and gives the same.
        assert jax.jit(lambda f, kind=kind: analysis.timescales(f, kind))(f).tolist() == [shut, math.inf]


@pytest.mark.parametrize(
    ("f", "kind", "message"),
    [
        (0.5, "tau", r"`timescales\(kind='tau'\)`: expected one of 'lin', 'exp', 'half_life'"),
        (1, "lin", r"`timescales\(<int.* \(\)>\)`: expected floating point; convert"),
        (jnp.array([0.5, 1.5]), "exp", r"<float64 \(2,\)>\)`: expected gate values from 0 to 1"),
        (jnp.array([-0.5]), "lin", "expected gate values from 0 to 1"),
        (jnp.array([jnp.nan]), "lin", "expected gate values from 0 to 1"),
    ],
)
def test_bad_gate_values(f, kind, message):
    with pytest.raises(ValueError, match=message):
        analysis.timescales(f, kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": (0.9, 0.1)}, r"expected \(lower, upper\) with lower <= upper"),
        ({"thresholds": (0.1, 0.5, 0.9)}, r"expected \(lower, upper\)"),
        ({"thresholds": {"z": (0.1, 0.9)}}, "LSTM has no gate 'z', only i, f, g, o"),
        ({"quantiles": (0.5, 1.5)}, "expected numbers from 0 to 1, at least one"),
        ({"quantiles": ()}, "at least one"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        analysis.gate_statistics(run_of(LSTM), **options)


class Nameless(rnncore.PointwiseCell):
    """Returns its gates as a bare array."""

    gates = ("h",)

    def pointwise(self, p, z, r, carry):
        h = jnp.tanh(z.h + r.h)
        return self.Carry(h), h


def test_gates_without_names_and_runs_without_steps():
    with pytest.raises(NotImplementedError, match="Nameless returns its gates as a .*a named tuple or a dict"):
        analysis.gate_statistics(run_of(Nameless(4)))
    run = run_of(LSTM)
    empty = analysis.trajectory(LSTM, run.params, run.xs, seq_lengths=jnp.array([0, 0]))
    with pytest.raises(ValueError, match="every sequence of the trajectory has length 0"):
        analysis.gate_statistics(empty)
