"""The benchmark of models whose import alone is changed; no time is asserted on."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from benchmarks import front_door

FIELDS = {"part", "side", "shape_BTDH", "compile_seconds", "temporary_bytes"}
TIMES = {"calls_a_round", "ms", "median_ms", "min_ms", "max_ms", "speed_against_flax"}


def test_a_quick_run_has_all_fields(tmp_path, capsys):
    path = tmp_path / "front_door.json"
    options = ["--quick", "--rounds", "2", "--seconds", "1e-4", "--compilations", "1", "--out", str(path)]
    assert front_door.main([*options, "--parts", "step"]) == 0
    result = json.loads(path.read_text())
    assert result["machine"]["jax"] == jax.__version__ and not result["interrupted"]
    ours = [record for record in result["records"] if record["side"] == "rnncore"]
    assert [record["part"] for record in ours] == ["step"]
    assert set(ours[0]) - {"speed_against_torch"} == FIELDS | TIMES | {"largest_relative_difference"}
    assert ours[0]["largest_relative_difference"] < 1e-4  # Adam divides gradients by their own size
    assert "step: geometric mean" in capsys.readouterr().out


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_both_sides_start_from_the_same_parameters(api):
    part = {"linen": "step", "nnx": "nnx"}[api]
    sides = [front_door.program(part, side, front_door.QUICK).arguments[0] for side in front_door.SIDES[api]]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, sides))


def test_the_tagger_is_one_model_on_both_sides():
    def step(nn):
        program = front_door.tagger(nn, front_door.QUICK)
        return program.run(*program.arguments)

    flax, ours = (jax.eval_shape(lambda nn=nn: step(nn)) for nn in front_door.SIDES["linen"].values())
    assert flax == ours and len(jax.tree.leaves(ours)) > 50
