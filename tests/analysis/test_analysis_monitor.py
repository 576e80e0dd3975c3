"""The monitor: its numbers against the exact ones, when it records, and how it goes on after a stop."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import Stack, analysis, unroll_stack
from rnncore.analysis import Monitor, read_records

B, T, D, H = 3, 12, 3, 4
XS = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
STACK = Stack(rnncore.LSTM(H), num_layers=2, bidirectional=True, learned_carry=True)
LAGS = (1, 4, T)


def some_params(stack: Stack) -> Any:
    shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), D))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.6, a.shape), a.dtype), shapes)


@pytest.mark.slow
def test_every_layer_and_direction_is_measured_on_its_own_inputs(tmp_path):
    """Against `retention_curve` and `gate_statistics` of trajectories put together here."""
    params = some_params(STACK)
    monitor = Monitor(tmp_path / "m.jsonl", every=1, lags=LAGS, probes=4000, sequences=B, exponents=2)
    record = monitor(0, STACK, params, XS)
    assert [layer["name"] for layer in record["layers"]] == ["forward_0", "backward_0", "forward_1", "backward_1"]
    below = Stack(STACK.cell, bidirectional=True, learned_carry=True)
    _, middle = unroll_stack(below, rnncore.StackParams(params.layers[:1], params.carry[:1]), XS)
    layers = iter(record["layers"])
    for inputs, layer, starts in zip((XS, middle), params.layers, params.carry, strict=True):
        for way, (own, start) in enumerate(zip(layer, starts, strict=True)):
            start = jax.tree.map(lambda a: jnp.broadcast_to(a, (B, H)), start)
            run = analysis.trajectory(STACK.cell, own, inputs[:, ::-1] if way else inputs, start)
            got = next(layers)
            curve = analysis.retention_curve(run, kind="rms", lags=LAGS)
            want = np.mean(np.asarray(curve.log10), 0)
            np.testing.assert_allclose(list(got["log10_retention"].values()), want, atol=0.03)
            f = run.gates.f
            np.testing.assert_allclose(got["gates"]["f"]["mean"], np.mean(f), rtol=1e-5)
            np.testing.assert_allclose(got["gates"]["f"]["right"], np.mean(np.asarray(f) > 0.9), atol=1e-6)
            exponents = analysis.lyapunov_exponents(run, 2, burn_in=T // 4).exponents
            np.testing.assert_allclose(got["exponents"], np.mean(np.asarray(exponents), 0), rtol=1e-4)
            assert got["n"] == 2 * H


@pytest.mark.slow
def test_it_records_when_it_is_due_and_every_line_is_json(tmp_path):
    stack = Stack(rnncore.GRU(H))
    params, path = some_params(stack), tmp_path / "folder" / "m.jsonl"
    monitor = Monitor(path, every=5, lags=(1, 3))
    returned = [monitor(step, stack.cell, params.layers[0][0], XS) for step in range(12)]
    assert [n for n, record in enumerate(returned) if record] == [0, 5, 10]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == monitor.records == [r for r in returned if r]
    assert lines[0]["layers"] == lines[1]["layers"], "the same model gives the same numbers"


def test_training_that_goes_on_from_a_checkpoint_writes_over_what_came_after_it(tmp_path):
    stack, path = Stack(rnncore.Elman(H)), tmp_path / "m.jsonl"
    params = some_params(stack)
    first = Monitor(path, every=10, lags=(1,), exponents=0)
    for step in (0, 10, 20, 30):
        first(step, stack, params, XS)
    with path.open("a") as file:
        file.write('{"step": 40, "layers": [')  # the machine stopped here
    again = Monitor(path, every=10, lags=(1,), exponents=0)
    assert [r["step"] for r in again.records] == [0, 10, 20, 30]
    other = jax.tree.map(lambda a: 0.5 * a, params)
    again(20, stack, other, XS)
    assert [r["step"] for r in read_records(path)] == [0, 10, 20]
    assert read_records(path)[2] != first.records[2] and read_records(path)[1] == first.records[1]


@pytest.mark.slow
def test_what_is_not_finite_is_null_and_half_precision_is_widened(tmp_path):
    cell = rnncore.Elman(H, activation_fn=jax.nn.relu)
    params = jax.tree.map(lambda a: -jnp.abs(a), some_params(Stack(cell)).layers[0][0])
    monitor = Monitor(tmp_path / "m.jsonl", every=1, lags=(0, 3), exponents=1)
    record = monitor(0, cell, params, jnp.abs(XS))  # all units dead
    (layer,) = record["layers"]
    assert layer["log10_retention"]["3"] is None and layer["exponents"] == [None]
    assert abs(layer["log10_retention"]["0"]) < 0.3
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), some_params(STACK))
    assert Monitor(tmp_path / "h.jsonl", every=1, lags=(1,))(0, STACK, half, XS.astype(jnp.bfloat16))


def test_wrong_settings_and_inputs_are_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    for options, message in (
        (dict(every=0), "every=0"),
        (dict(lags=(3, 1)), "increasing"),
        (dict(lags=()), "increasing"),
        (dict(probes=0), "probes=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Monitor(path, **options)
    cell = rnncore.GRU(H)
    params = cell.init(jax.random.key(0), D)
    with pytest.raises(ValueError, match="T of at least the largest lag"):
        Monitor(path, every=1, lags=(1, T + 1))(0, cell, params, XS)
    with pytest.raises(ValueError, match=r"expected \(B, T, D\)"):
        Monitor(path, every=1, lags=(1,))(0, cell, params, XS[0])
    path.write_text('nonsense\n{"step": 0, "layers": []}\n')
    with pytest.raises(ValueError, match="line 1 is not a JSON record"):
        Monitor(path)
