"""`python -m rnncore`: doctor, explain and bench, and the package as tools see it."""

from __future__ import annotations

import json
import os
import pydoc
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen
import flax.nnx
import pytest

import rnncore
from rnncore import linen, nnx
from rnncore.__main__ import main
from rnncore._command import bench, doctor
from rnncore.kernels import compiler

MODELS = """
from rnncore import linen, nnx

def tagger():
    return nnx.RNN(nnx.GRUCell(4, 6, rngs=nnx.Rngs(0)), backend="scan")

classifier = linen.RNN(linen.LSTMCell(6), backend="autodiff")
"""


def test_doctor_tells_what_is_there(capsys: Any) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert rnncore.__version__ in said and "not chosen" not in said and "chosen: " in said
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"cpp", "scan", "cuda", "cudnn"} <= found["backends"].keys() and found["devices"]


def test_doctor_says_what_is_slow(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "nvidia-smi" else None)
    for name in ("CXX", "RNNCORE_CPP"):
        monkeypatch.delenv(name, raising=False)
    choice = rnncore.BackendChoice("scan", "", {})
    assert [a.partition(":")[0] for a in doctor.advice(choice, compiler.find(), tmp_path)][:2] == [
        "there is an NVIDIA GPU, and JAX runs on the CPU",
        "no C++ compiler is found, so the scan runs",
    ]
    monkeypatch.setenv("RNNCORE_CPP", "0")
    assert "unset it" in " ".join(doctor.advice(choice, None, tmp_path))
    monkeypatch.delenv("RNNCORE_CPP")
    assert "RNNCORE_CACHE_DIR" in " ".join(doctor.advice(choice, ("c++",), None))


def test_explain_a_shape_and_a_file(capsys: Any, tmp_path: Path) -> None:
    assert main(["explain", "2", "5", "3", "4", "--cell", "reset_before_gru"]) == 0
    assert capsys.readouterr().out.startswith("backend 'autodiff'")
    file = tmp_path / "models.py"
    file.write_text(MODELS)
    for name, said in (("", "backend 'autodiff': named"), (":tagger", "backend 'scan': named")):
        assert main(["explain", f"{file}{name}", "--inputs", "2", "5", "4"]) == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("given,said", [
    (["explain", "2", "5", "3"], "expected four sizes B T D H"),
    (["explain", "nowhere.py", "--inputs", "2"], "no such file"),
    (["explain", "nowhere.py"], "give the shape of the model's inputs"),
    (["bench", "--rounds", "0"], "expected at least 1 round"),
])  # fmt: skip
def test_what_cannot_be_run_is_said(given: list[str], said: str, capsys: Any) -> None:
    assert main(given) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_bench_measures_writes_and_draws(capsys: Any, tmp_path: Path) -> None:
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    sizes = ["--shapes", "2,5,3,4", "--rounds", "2", "--seconds", "0.001"]
    assert main(["bench", *sizes, "--json", str(out), "--plot", str(picture)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    (one,) = found["shapes"]
    assert {"flax.linen", "rnncore scan", "rnncore autodiff"} <= one["contenders"].keys()
    assert all(len(row["ms"]) == 2 and min(row["ms"]) > 0 for row in one["contenders"].values())
    assert "cuda" in " ".join(one["left_out"]) and "of Flax" in said and picture.stat().st_size > 5000


def test_bench_gives_no_time_to_a_wrong_answer(monkeypatch: Any, capsys: Any) -> None:
    right = bench._outputs
    monkeypatch.setattr(
        bench, "_outputs",
        lambda layer, v, xs: right(layer, v, xs) * (1.1 if getattr(layer, "backend", None) == "scan" else 1),
    )  # fmt: skip
    assert main(["bench", "--forward", "--shapes", "2,5,3,4", "--rounds", "1", "--seconds", "0.001"]) == 0
    said = capsys.readouterr().out
    assert "rnncore scan: left out: its result differs from Flax's by 1.0e-01" in said and "rnncore autodiff  " in said


def test_modules_come_when_they_are_asked_for() -> None:
    code = (
        "import sys, rnncore; before = 'flax' in sys.modules; names = dir(rnncore)\n"
        "print(before, [getattr(rnncore, n).__name__ for n in rnncore._LAZY if n in names])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(rnncore.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("False") and done.stdout.count("'rnncore.") == len(rnncore._LAZY)
    assert set(dir(rnncore)) == {*rnncore.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rnncore.nonsense


def test_help_names_what_there_is() -> None:
    said = pydoc.plain(pydoc.render_doc(rnncore))
    assert not [name for name in rnncore.__all__ if name not in said]


@pytest.mark.parametrize("ours,theirs", [(linen, flax.linen), (nnx, flax.nnx)], ids=["linen", "nnx"])
def test_every_name_of_flax_is_passed_on(ours: Any, theirs: Any) -> None:
    """No file of this package may stand in front of a name of Flax; `scan` once did."""
    names = {name for name in dir(theirs) if not name.startswith("_")}
    assert names <= set(dir(ours)) == set(ours.__all__)
    own = {name for name in dir(ours._names) if not name.startswith("_")}
    assert len(own) > 20 and len(names - own) > 100
    assert not [name for name in names - own if getattr(ours, name) is not getattr(theirs, name)]
    assert not [name for name in own if getattr(ours, name) is not getattr(ours._names, name)]
