"""The retention of untrained cells: runs, is exact, and says so in a table."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from benchmarks import retention
from benchmarks.report import earlier


def test_it_runs_and_the_table_has_a_row_for_each(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "CELLS", {name: retention.CELLS[name] for name in ("Elman", "GRU")})
    out = tmp_path / "r.json"
    assert retention.main(["--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [(r["cell"], r["initialisation"]) for r in result["records"]][0] == ("Elman", "Flax's initialisation")
    assert len(result["records"]) == 4 and all(r["seconds"] > 0 for r in result["records"])
    text = earlier.retention(result)
    assert text.count("| GRU |") == 3 and "k = 100" in text


def test_a_linear_unit_has_the_retention_of_its_weight():
    """h_t = x_t + 0.9 h_(t-1): 0.9 ** k."""
    cell = rnncore.Elman(1, activation_fn=lambda x: x)
    params = cell.init(jax.random.key(0), 2, jnp.float32)
    params = params._replace(recurrent_kernel=jnp.full_like(params.recurrent_kernel, 0.9))
    one = jax.tree.map(lambda a: a[None], params)
    logs = retention.curves(cell, one, jnp.ones((1, 2, 101, 2), jnp.float32))
    np.testing.assert_allclose(logs[0], np.arange(1, 101) * math.log(0.9), rtol=1e-5)


def test_help_says_what_is_measured(capsys):
    with pytest.raises(SystemExit):
        retention.main(["--help"])
    assert "retention" in capsys.readouterr().out
