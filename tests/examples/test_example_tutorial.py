"""The tutorial runs from the first cell to the last, at a small size."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "examples" / "tutorial.py"


def test_every_cell_runs_and_the_page_and_the_records_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--steps", "6", "--hidden", "3", "--out", str(tmp_path / "t")])
    with jax.enable_x64(False):
        names = runpy.run_path(str(SCRIPT))
    printed = capsys.readouterr().out
    assert "held-out digits classified correctly" in printed and "wrote" in printed
    np.testing.assert_allclose(sum(names["after"].layers["pixels"].shares.values()), 1, atol=1e-4)
    records = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(7))
    # The monitor's estimate and the exact curve of the untrained model measure the same thing.
    exact = np.mean(np.asarray(names["before"].layers["pixels"].rms.log10)[:, 10])
    assert records[0]["layers"][0]["log10_retention"]["10"] == pytest.approx(exact, abs=0.5)
    assert "<img" in (tmp_path / "t.html").read_text()
