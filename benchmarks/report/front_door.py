"""Whole models with the import changed: a table of ratios and a bar chart of a training step."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from benchmarks.report import words
from benchmarks.report.results import Record, Results
from rnncore._command import timing

Data = dict[str, Any]

ROWS = {
    "step": "a training step of a linen model",
    "nnx": "a training step of an nnx model",
    "forward": "a forward run of a linen model",
    "tagger": "a training step of a tagger with two bidirectional layers",
}


def table(benchmark: dict[str, Any]) -> str:
    """A row for each part: how many times as fast as Flax and PyTorch, the mean over its shapes and the least."""
    rows = []
    for part, what in ROWS.items():
        own = _of(benchmark, part)
        rows.append([what, *(_speeds([r[f"speed_against_{peer}"] for r in own if f"speed_against_{peer}" in r])
                             for peer in ("flax", "torch"))])  # fmt: skip
    (memory,), (flax,) = _of(benchmark, "memory"), _of(benchmark, "memory", "flax")
    share = memory["temporary_bytes"] / flax["temporary_bytes"]
    rows.append([f"memory of a training step, {words_of(memory)}", f"{words.times(share)} of its memory", words.NONE])
    machine = benchmark["machine"]
    caption = (
        "Times as fast: the geometric mean over five shapes of an LSTM layer and the least of them; float32, the "
        f"import changed and no option set. Medians of {benchmark['rounds']} interleaved rounds; {machine['device']}, "
        f"{machine['cores']} cores, JAX {machine['jax']}; {benchmark['started'][:10]}. {words.NOISE}"
    )
    return words.table(("whole models", "against Flax", "against PyTorch"), rows) + "\n\n" + caption


def words_of(record: Record) -> str:
    """The shape."""
    return str(tuple(record["shape_BTDH"]))


def _of(benchmark: dict[str, Any], part: str, side: str = "rnncore") -> list[Record]:
    return [r for r in benchmark["records"] if r["part"] == part and r["side"] == side]


def _speeds(found: list[float]) -> str:
    if not found:
        return words.NONE
    mean = words.times(timing.geometric_mean(found))
    return mean if len(found) == 1 else f"{mean} (least {words.times(min(found))})"


def steps(results: Results) -> Data | None:
    """What the chart shows: speed of a training step in terms of Flax's, by shape."""
    if "front door" not in results.objects:
        return None
    benchmark = results.objects["front door"]
    bars: dict[str, list[float]] = {"Flax": [], "PyTorch": [], "rnncore": []}
    groups = []
    for own in _of(benchmark, "step"):
        against_flax, against_torch = own["speed_against_flax"], own.get("speed_against_torch")
        if against_torch is None:
            return None
        batch, length, _, hidden = own["shape_BTDH"]
        groups.append(f"B={batch}, T={length},\n{hidden} units")
        for name, speed in zip(bars, (1.0, against_flax / against_torch, against_flax), strict=True):
            bars[name].append(speed)
    if not groups:
        return None
    for found in bars.values():
        found.append(timing.geometric_mean(found))
    machine = benchmark["machine"]
    title = f"{machine['device']}, {machine['cores']} cores, float32"
    return {"title": title, "groups": [*groups, "geometric\nmean"], "bars": bars}


def png(data: Data) -> bytes:
    """The chart; the same bytes for the same data and matplotlib."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(figsize=(9.0, 3.4), dpi=95, layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for n, (name, found) in enumerate(data["bars"].items()):
            at = [g + (n - 1) * 0.27 for g in range(len(found))]
            drawn = axis.bar(at, found, 0.27, label=name, color=("#b8bcc4", "#E69F00", "#0072B2")[n])
            if name == "rnncore":
                axis.bar_label(drawn, [f"{x:.1f}x" for x in found], padding=2, fontsize=9)
        axis.set_xticks(range(len(data["groups"])), data["groups"], fontsize=9)
        axis.set_ylabel("speed, Flax = 1")
        title = f"A training step of an LSTM model with the import changed; {data['title']}"
        axis.set_title(title, loc="left", fontsize=11)
        axis.legend(frameon=False, ncols=3, fontsize=9)
        axis.set_ylim(0, 1.2 * max(max(found) for found in data["bars"].values()))
        axis.spines[["top", "right"]].set_visible(False)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None, "Data": _digest(data)})
    return out.getvalue()


def _digest(data: Data) -> str:
    """A name for what is shown; it is written into the picture, whose bytes depend on the version of matplotlib."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def shows(path: Path, data: Data) -> bool:
    """Whether a picture exists and was drawn from this data."""
    return path.exists() and b"tEXtData\0" + _digest(data).encode() in path.read_bytes()
