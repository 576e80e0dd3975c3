"""The benchmark of the analysis runs at a tiny size, and its table can be written; no time is asserted on."""

from __future__ import annotations

import json

import jax

from benchmarks import analysis
from benchmarks.report import earlier


def test_every_part_leaves_records_that_the_table_can_show(tmp_path, capsys):
    with jax.enable_x64(False):
        assert analysis.main(["--quick", "--rounds", "1", "--out", str(tmp_path / "a.json")]) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    parts = [record["part"] for record in result["records"]]
    assert {"retention", "lyapunov", "monitor"} < set(parts) and len(parts) == 10
    errors = [r["relative_error"] for r in result["records"] if r.get("relative_error") is not None]
    assert len(errors) == 5 and max(errors) < 1e-5
    text = earlier.analysis(result)
    assert text.count("\n| ") == 8 and "leading Lyapunov exponents, LSTM" in text
    assert "monitor" in capsys.readouterr().out
