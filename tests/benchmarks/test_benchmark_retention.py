"""The benchmark of gradient retention: its initialisations, its figures, its records; no time is asserted on."""

from __future__ import annotations

import argparse
import json
import math

import flax.linen
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from benchmarks import retention
from benchmarks.report import others, plots
from benchmarks.report.results import read
from rnncore import linen

SIZES = argparse.Namespace(
    hidden=6, features=3, batch=2, steps=9, lags=[1, 3, 6], seeds=2, first_seed=5, scale=0.5, quick=True
)


def draw(cell, name, hidden=64, features=48, last=50):
    return retention.INITIALISATIONS[name][1](retention.CELLS[cell](hidden), jax.random.key(3), features, last)


@pytest.mark.parametrize("cell", retention.CELLS)
def test_flax_defaults_are_those_of_flax(cell):
    """The same spread of input kernels, orthogonal recurrent blocks, the same biases."""
    flax_cell = {"Elman": flax.linen.SimpleCell, "LSTM": flax.linen.OptimizedLSTMCell, "GRU": flax.linen.GRUCell,
                 "MGU": flax.linen.MGUCell}[cell](64)  # fmt: skip
    with jax.enable_x64(False):
        variables = flax.linen.RNN(flax_cell).init(jax.random.key(0), jnp.ones((1, 1, 48)))
        own, theirs = draw(cell, "Flax"), linen.functional(flax_cell, variables["params"]["cell"])[1]
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, theirs)
    np.testing.assert_array_equal(own.bias, theirs.bias)
    for params in (own, theirs):
        assert float(jnp.std(params.input_kernel)) == pytest.approx(48**-0.5, rel=0.03)
        for block in jnp.moveaxis(params.recurrent_kernel, 1, 0):
            np.testing.assert_allclose(block @ block.T, np.eye(64), atol=1e-5)


@pytest.mark.parametrize("cell", retention.INITIALISATIONS["PyTorch"][0])
def test_pytorch_defaults_are_uniform(cell):
    params, edge = draw(cell, "PyTorch"), 1 / 8
    spread = edge / math.sqrt(3)
    for kernel in (params.input_kernel, params.recurrent_kernel):
        assert float(jnp.abs(kernel).max()) <= edge and float(jnp.std(kernel)) == pytest.approx(spread, rel=0.03)
    # Two biases that add up, but for the candidate of the GRU, whose second one stands inside the product with r.
    sums = params.bias[:2] if cell == "GRU" else params.bias
    assert edge < float(jnp.abs(sums).max()) <= 2 * edge
    assert float(jnp.std(sums)) == pytest.approx(math.sqrt(2) * spread, rel=0.2)
    if cell == "GRU":
        for row in (params.bias[2], params.recurrent_bias[0]):
            assert 0.5 * edge < float(jnp.abs(row).max()) <= edge
        assert not np.allclose(params.bias[2], params.recurrent_bias[0])
    else:
        assert params.recurrent_bias is None


def test_biases_are_put_on_the_gate_that_keeps_the_state():
    for cell in retention.GATED:
        gates, plain = retention.CELLS[cell](64).gates, draw(cell, "Flax")
        keep = gates.index(retention.KEEP[cell])
        chrono, uniform = (draw(cell, name) for name in ("chrono", "uniform gate"))
        for params in (chrono, uniform):  # only the biases are others
            np.testing.assert_array_equal(params.recurrent_kernel, plain.recurrent_kernel)
            others = [g for g in range(len(gates)) if g != keep and gates[g] != "i"]
            assert not np.any(np.asarray(params.bias)[others])
        scales = 1 + jnp.exp(chrono.bias[keep])  # 1 / (1 - f) at the origin
        assert 2 <= float(scales.min()) < 5 and 40 < float(scales.max()) <= 50
        f = jax.nn.sigmoid(uniform.bias[keep])
        assert 0 < float(f.min()) < 0.1 and 0.9 < float(f.max()) < 1 and abs(float(f.mean()) - 0.5) < 0.1
        if "i" in gates:
            np.testing.assert_array_equal(chrono.bias[0], -chrono.bias[1])
    for cell, name, value in (("LSTM", "forget bias 1", 1.0), ("GRU", "forget bias 1", 1.0),
                              ("LSTM", "critical forget bias", math.log(3))):  # fmt: skip
        keep = retention.CELLS[cell](64).gates.index(retention.KEEP[cell])
        bias = np.zeros_like(draw(cell, "Flax").bias)
        bias[keep] = value
        np.testing.assert_allclose(draw(cell, name).bias, bias, rtol=1e-6)


def test_a_glorot_kernel_is_drawn_gate_by_gate():
    params = draw("GRU", "Glorot recurrent kernel")
    edge = math.sqrt(6 / 128)
    assert 0.98 * edge < float(jnp.abs(params.recurrent_kernel).max()) <= edge
    np.testing.assert_array_equal(params.input_kernel, draw("GRU", "Flax").input_kernel)


@pytest.mark.parametrize(("cell", "name"), [("LSTM", "PyTorch"), ("MGU", "uniform gate")])
def test_figures_are_those_of_explicit_jacobians(cell, name):
    """||J_T ... J_(T-k+1)||_F / sqrt n by jacfwd of the k steps, for every seed and sequence; medians of the means."""
    made, last = retention.CELLS[cell](SIZES.hidden), SIZES.lags[-1]
    by_path = {record["path"]: record for record in retention.measure(cell, name, SIZES)}
    assert list(by_path) == list(retention.PATHS.get(cell, ("state",)))
    found: dict[str, list] = {path: [] for path in by_path}
    for seed in range(SIZES.first_seed, SIZES.first_seed + SIZES.seeds):
        key, data = jax.random.split(jax.random.key(seed))
        params = retention.INITIALISATIONS[name][1](made, key, SIZES.features, last)
        xs = SIZES.scale * jax.random.normal(data, (SIZES.batch, SIZES.steps, SIZES.features), jnp.float32)
        logs = [[explicit(made, params, x, k, path) for path in by_path] for x in xs for k in SIZES.lags]
        mean = np.reshape(logs, (SIZES.batch, len(SIZES.lags), len(by_path))).mean(0) / math.log(10)
        for n, path in enumerate(by_path):
            found[path].append(mean[:, n])
    for path, record in by_path.items():
        middle, low, high = (np.percentile(found[path], q, axis=0) for q in (50, 25, 75))
        np.testing.assert_allclose(list(record["retention_log10"].values()), middle, atol=2e-4)
        quartiles = list(record["retention_log10_quartiles"].values())
        np.testing.assert_allclose(quartiles, np.stack([low, high], 1), atol=2e-4)


def explicit(cell, params, x, k, path):
    """ln of the retention of one sequence over k steps, from the Jacobian of the last k steps as one function."""
    params, x = jax.tree.map(lambda a: a.astype(jnp.float64), (params, x))
    start, _ = rnncore.unroll(cell, params, x[: len(x) - k])
    zs = cell.project(params, x[len(x) - k :])
    flat, unravel = jax.flatten_util.ravel_pytree(start)

    def steps(s):
        carry = unravel(s)
        for z in zs:
            carry, _ = cell.update(params, carry, z)
        return jax.flatten_util.ravel_pytree(carry)[0]

    jacobian = jax.jacfwd(steps)(flat)
    if path == "cell":  # c_T in terms of c with h = o tanh(c) tied to it; the carry is (c, h)
        hidden = cell.hidden_size
        slope = start.h / jnp.tanh(start.c) * (1 - jnp.tanh(start.c) ** 2)
        jacobian = jacobian[:hidden, :hidden] + jacobian[:hidden, hidden:] * slope
    return math.log(float(jnp.linalg.norm(jacobian)) / math.sqrt(len(jacobian)))


def test_figures_of_a_known_curve():
    lags = np.arange(1, 41)
    logs = np.stack([-0.5 * lags, -0.1 * lags, -0.3 * lags])
    found = retention.figures(logs, [1, 10, 40])
    assert found["decay_rate"] == pytest.approx(0.3, rel=1e-4)
    assert found["decay_rate_quartiles"] == [pytest.approx(0.2, rel=1e-4), pytest.approx(0.4, rel=1e-4)]
    assert found["retention_log10"]["10"] == pytest.approx(-3 / math.log(10), rel=1e-4)
    assert found["curve"]["lags"] == [*range(1, 11), 15, 20, 25, 30, 35, 40]
    assert len(found["curve"]["log10_quartiles"]) == 16
    logs[0, 20:] = -math.inf
    found = retention.figures(logs, [1, 40])  # nothing is left of one seed: no rate of all of them
    assert found["decay_rate"] is None and found["retention_log10_quartiles"]["40"][0] is None
    assert found["retention_log10"]["40"] == pytest.approx(-12 / math.log(10), rel=1e-4)
    with pytest.raises(ArithmeticError, match="NaN"):
        retention.figures(np.array([[0.0, math.nan]]), [1])


def test_records_are_what_the_report_reads(tmp_path, capsys):
    path = tmp_path / "new" / "r.jsonl"
    options = ["--quick", "--cells", "LSTM", "GRU", "--initialisations", "Flax", "critical forget bias", "chrono"]
    assert retention.main([*options, "--out", str(path)]) == 0
    results = read([path])
    (run,) = results.runs
    told = [(r["cell"], r["initialisation"], r["path"]) for r in run.of("retention")]
    assert told == [
        ("LSTM", name, way)
        for name in ("Flax defaults", "critical forget bias 1.0986", "chrono(10)")
        for way in ("state", "cell")
    ] + [("GRU", "Flax defaults", "state"), ("GRU", "chrono(10)", "state")]
    assert run.complete and run.head["tag"] == "retention" and run.machine["versions"]["jax"] == jax.__version__
    assert others.retention(results).count("\n| ") == 8 and set(plots.retention(results)["curves"]) == {"LSTM", "GRU"}
    printed = capsys.readouterr()
    assert "critical forget bias 1.0986" in printed.out and str(path) in printed.err


def test_stopped_on_the_way_it_keeps_what_was_done(tmp_path, monkeypatch, capsys):
    done = {"retention_log10": {"1": -0.1}, "retention_log10_quartiles": {"1": [-0.2, None]}, "decay_rate": None}

    def measure(cell, name, args):
        if name == "PyTorch":
            raise KeyboardInterrupt
        size = {"B": 2, "T": 12, "D": 3, "H": 8, "seeds": 2}
        return [{"record": "retention", "cell": cell, "initialisation": name, "path": "state", **size, **done}]

    monkeypatch.setattr(retention, "measure", measure)
    path = tmp_path / "cut.jsonl"
    assert retention.main(["--quick", "--out", str(path)]) == 130
    kinds = [json.loads(line)["record"] for line in path.read_text().splitlines()]
    assert kinds == ["run", "retention", "end"] and not read([path]).runs[0].complete
    printed = capsys.readouterr()
    assert "-0.1 (-0.2, -inf)" in printed.out and "interrupted" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "100"], "expected more steps"),
        (["--lags", "10", "1"], "expected increasing"),
        (["--lags", "1", "3"], "at least 5"),
        (["--seeds", "0"], "--seeds 0: expected at least 1"),
        (["--first-seed", "-1"], "--first-seed -1: expected at least 0"),
        (["--hidden", "1"], "expected at least 2"),
        (["--scale", "nan"], "expected a standard deviation"),
        (["--quick", "--record"], "do not belong among the results"),
        (["--cells", "Haste"], "invalid choice"),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        retention.main(options)
    assert message in capsys.readouterr().err
