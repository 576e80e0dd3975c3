"""The migration benchmark and its table; no time is asserted on."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from benchmarks import migration
from benchmarks.report import earlier
from rnncore._command import timing

FIELDS = {
    "layer", "side", "shape_BTDH", "relative_error", "compile_seconds", "temporary_bytes", "calls_a_round", "ms",
    "median_ms", "min_ms", "max_ms", "speed_against_flax", "largest_relative_difference",
}  # fmt: skip
FEW = ["linen.MGUCell", "nnx.GRUCell"]


def test_a_quick_run_has_all_fields_and_a_table(tmp_path):
    path = tmp_path / "new" / "quick.json"
    options = ["--quick", "--rounds", "2", "--seconds", "1e-4", "--layers", *FEW, "--out", str(path)]
    assert migration.main(options) == 0
    result = json.loads(path.read_text())
    assert result["benchmark"] == "migration" and result["quick"] is True and result["interrupted"] is False
    assert result["machine"]["jax"] == jax.__version__ and result["machine"]["rnncore"] == rnncore.__version__
    assert [(r["layer"], r["side"]) for r in result["records"]] == [(n, s) for n in FEW for s in migration.SIDES]
    for record in result["records"]:
        assert set(record) == FIELDS and record["shape_BTDH"] == list(migration.QUICK[0])
        assert len(record["ms"]) == 2 and 0 < record["min_ms"] <= record["median_ms"] <= record["max_ms"]
        assert 0 < record["relative_error"] < 2e-6 and record["largest_relative_difference"] < 2e-6
    assert [r["speed_against_flax"] for r in result["records"][::2]] == [1.0, 1.0]
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in earlier.migration(result).splitlines()]
    rows = [row for row in rows if len(row) == 13 and "." in row[1]]
    assert [row[1] for row in rows] == FEW and {row[2] for row in rows} == {"(2, 6, 3, 4)"}
    for row, (before, after) in zip(rows, zip(*[iter(result["records"])] * 2, strict=True), strict=True):
        assert row[3:6] == [f"{x:.3g}" for x in (before["median_ms"], after["median_ms"])] + [
            f"{after['speed_against_flax']:.2f}"
        ]


@pytest.mark.parametrize("layer", migration.LAYERS)
def test_both_sides_are_the_same_model(layer):
    """Parameters in the same tree with the same values, and gradients of the same shapes."""
    with jax.enable_x64(False):
        steps = {side: migration.build(layer, side, (2, 3, 5, 4), jnp.float32) for side in migration.SIDES}
        xs = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)
        shapes = {side: jax.eval_shape(step, steps["flax"][1], xs) for side, (step, _) in steps.items()}
    jax.tree.map(np.testing.assert_array_equal, steps["flax"][1], steps["rnncore"][1])
    assert jax.tree.structure(shapes["flax"]) == jax.tree.structure(shapes["rnncore"])
    got, want = ([(a.shape, a.dtype) for a in jax.tree.leaves(shapes[side])] for side in migration.SIDES)
    assert got == want


def test_stopped_on_the_way_it_keeps_what_was_done(tmp_path, monkeypatch, capsys):
    def measure(layer, shape, *_):
        if layer == FEW[1]:
            raise KeyboardInterrupt
        rest = {"temporary_bytes": None, "compile_seconds": 1.0, "relative_error": 1e-7}
        both = {"layer": layer, "shape_BTDH": shape, "median_ms": 2.0, "largest_relative_difference": 1e-7, **rest}
        return [both | {"side": s, "speed_against_flax": speed} for s, speed in (("flax", 1.0), ("rnncore", 1.25))]

    monkeypatch.setattr(migration, "measure", measure)
    path = tmp_path / "cut.json"
    assert migration.main(["--quick", "--layers", *FEW, "--out", str(path)]) == 130
    result = json.loads(path.read_text())
    assert result["interrupted"] is True and [r["layer"] for r in result["records"]] == [FEW[0]] * 2
    printed = capsys.readouterr()
    assert "geometric mean 1.25" in printed.out and "interrupted" in printed.err
    assert "| - | - |" in earlier.migration(result)


def test_wrong_options_are_refused(capsys):
    for options, message in ((["--rounds", "0"], "0: expected a whole"), (["--layers", "linen.RNN"], "invalid choice")):
        with pytest.raises(SystemExit):
            migration.main(options)
        assert message in capsys.readouterr().err


def test_turns_are_taken_one_by_one():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    turns = timing.take_turns(calls, rounds=3, seconds=1e-12)
    assert order == ["a", "b"] * 4 and [turn["calls_a_round"] for turn in turns.values()] == [1, 1]
    assert timing.summary([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == {
        "median_ms": 2.0, "min_ms": 1.0, "max_ms": 4.0, "speed_against_flax": 1.0,
    }  # fmt: skip
