"""Runs an example as its user would, and reads what it leaves behind."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.image
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


class Run(NamedTuple):
    """Exit code, what was printed, and the files."""

    code: int
    printed: str
    results: dict[str, Any]
    prefix: Path


def load(name: str) -> Any:
    """The script as a module; run as a script it finds its helper files beside it, and so it does here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


def run(example: Any, prefix: Path, *options: str) -> Run:
    """Runs the example; JSON and picture have to be there, and no half-written file."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = example.main([*options, "--out", str(prefix)])
    check_picture(Path(f"{prefix}.png"))
    assert not list(prefix.parent.glob("*.part"))
    results = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    assert f"wrote {prefix}.json and {prefix}.png" in printed.getvalue()
    return Run(code, printed.getvalue(), results, prefix)


def check_picture(path: Path) -> None:
    """A PNG of a fair size that is not blank."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(path)[..., :3]
    assert pixels.shape[0] >= 600 and pixels.shape[1] >= 1000
    assert pixels.std() > 0.05
    # Nothing runs out of the figure.
    border = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
    assert (border == 1).all()


def check_partial(example: Any, results: dict[str, Any], tmp_path: Path) -> None:
    """What stands in `results` before the end can be told and drawn too."""
    example._run._picture.write(example.draw(results | {"interrupted": True}), tmp_path / "partial.png")
    check_picture(tmp_path / "partial.png")
    assert example.words(results)


def refused(example: Any, capsys: pytest.CaptureFixture, tmp_path: Path, *options: str) -> str:
    """What the user reads whose options are wrong; nothing is written."""
    with pytest.raises(SystemExit) as stop:
        example.main([*options, "--out", str(tmp_path / "none")])
    assert stop.value.code == 2
    assert not list(tmp_path.glob("none*"))
    return capsys.readouterr().err


def check_help(example: Any, capsys: pytest.CaptureFixture, *own: str) -> None:
    """--help names every option and its default."""
    with pytest.raises(SystemExit) as stop:
        example.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    names = ("--steps", "--batch", "--learning-rate", "--seed", "--out", *own)
    assert stop.value.code == 0 and [name for name in names if name not in text] == []
    assert text.count("(default:") >= len(names) - 1 and "(default: None)" not in text
