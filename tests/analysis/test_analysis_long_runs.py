"""Products over many steps, whose rows are fewer after a while: against all rows, and where none may be left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis_cases import close

import rnncore
from rnncore import analysis
from rnncore.analysis.retention import _chains

pytestmark = pytest.mark.slow

STEPS, H = 300, 24


def run_of(cell, dtype=jnp.float64, scale=1.0):
    params = cell.init(jax.random.key(0), 3, dtype)
    xs = scale * jax.random.normal(jax.random.key(1), (2, STEPS, 3), dtype)
    return analysis.trajectory(cell, params, xs)


@pytest.fixture
def rows(monkeypatch):
    """How many rows the blocks had before and after every look at them."""
    seen, plain = [], _chains._fewer_rows

    def watched(block):
        fewer = plain(block)
        seen.append((block.shape[1], fewer.shape[1]))
        return fewer

    monkeypatch.setattr(_chains, "_fewer_rows", watched)
    return seen


@pytest.mark.parametrize(("kind", "path", "anchor"), [
    ("rms", "state", "end"), ("operator", "state", "end"), ("rms", "cell", "end"), ("rms", "state", "start"),
    ("rms", "cell", "start"),
])  # fmt: skip
def test_fewer_rows_say_the_same(kind, path, anchor, rows, monkeypatch):
    run = run_of(rnncore.LSTM(H), jnp.float32)
    lags = (0, 1, 63, 64, 65, 200, STEPS - 1)
    got = analysis.retention_curve(run, kind=kind, path=path, anchor=anchor, lags=lags).log_retention
    assert any(after < before for before, after in rows)
    monkeypatch.setattr(_chains, "FIRST", STEPS)
    want = analysis.retention_curve(run, kind=kind, path=path, anchor=anchor, lags=lags).log_retention
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), run)
    exact = analysis.retention_curve(wide, kind=kind, path=path, anchor=anchor, lags=lags).log_retention
    # Not further from float64 than all rows are, but for rounding of the same size.
    worst = float(jnp.max(jnp.abs(want - exact)))
    assert float(jnp.max(jnp.abs(got - exact))) <= 2 * worst + 1e-4


def test_influence_of_the_inputs_too(rows, monkeypatch):
    run = run_of(rnncore.GRU(H))
    got = analysis.input_influence(run)
    assert any(after < before for before, after in rows)
    monkeypatch.setattr(_chains, "FIRST", STEPS)
    close(got, analysis.input_influence(run), 1e-9)


def test_units_that_do_not_mix_keep_all_their_rows(rows):
    """One unit is far above the others until it is cut off: then the others, 10^-60 of it, are all there is."""
    size = 20
    cell = rnncore.IndRNN(size, activation_fn=jax.nn.identity)
    params = cell.init(jax.random.key(0), 1, jnp.float64)
    decay = jnp.full(size, 0.5).at[0].set(1.0)
    params = params._replace(recurrent_kernel=jnp.broadcast_to(decay, params.recurrent_kernel.shape))
    run = analysis.trajectory(cell, params, jnp.zeros((STEPS, 1)))
    curve = analysis.retention_curve(run, kind="rms", lags=(0, STEPS))
    close(curve.log_retention[1], -0.5 * np.log(size), 1e-12)
    assert all(after == before for before, after in rows) and rows
