"""The plots: speed by shape, and retention by initialisation; matplotlib without a screen."""

from __future__ import annotations

import hashlib
import io
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.report import compact, front_door, words
from benchmarks.report.results import Record, Results
from rnncore._command import timing

COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#000000", "#F0E442")
DASHES: tuple[Any, ...] = (
    "-", (0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 2)), (0, (8, 2, 1, 2, 1, 2)), (0, (12, 2)),
)  # fmt: skip
# Order, and so colour, of the bars: the same library has the same colour in every plot.
BARS = ("rnncore scan", "rnncore reverse", "rnncore cpp", "torch", "flax", "haiku", "equinox", "jax")

Data = dict[str, Any]


def speed(results: Results) -> Data | None:
    """What the plot of speed shows: of each group of bars and each bar the median and quartiles over rounds."""
    run = compact.run_of(results, "gradient")
    if run is None:
        return None
    bars: dict[str, list[list[float] | None]] = {}
    groups, shapes = [], compact.shapes(run, "gradient")
    for workload, records in shapes.items():
        best = words.fastest(r for r in records if words.is_jax_peer(r))
        if best is None:
            continue
        groups.append(f"{workload}\n{words.shape(records[0])}")
        for name in BARS:
            own = words.fastest(r for r in records if name in (r["contender"], r["library"].split(".")[0]))
            bars.setdefault(name, []).append(ratios(best, own) if own else None)
    bars = {name: found for name, found in bars.items() if any(found)}
    if not bars:
        return None
    for found in bars.values():  # a mean over some of the shapes would not compare with one over all
        found.append([timing.geometric_mean([f[0] for f in found if f])] * 3 if all(found) else None)
    return {"title": f"{run.machine['device']}, JAX {run.machine['jax']}, float32",
            "groups": [*groups, "geometric\nmean"], "bars": bars}  # fmt: skip


def ratios(best: Record, own: Record) -> list[float]:
    """Median, lower and upper quartile over rounds of the ratio within a round."""
    middle = words.ratio(best, own)
    if len(best["ms"]) != len(own["ms"]) or len(own["ms"]) < 2:
        return [middle] * 3
    low, _, high = statistics.quantiles([a / b for a, b in zip(best["ms"], own["ms"], strict=True)], method="inclusive")
    return [middle, low, high]


def retention(results: Results) -> Data | None:
    """What the plot of retention shows: of each cell and initialisation the quartiles by lag."""
    runs = results.chosen("retention")
    records = [r for r in runs[0].of("retention") if "curve" in r and r.get("path", "state") == "state"] if runs else []
    if not records:
        return None
    curves: dict[str, dict[str, Any]] = {}
    for r in records:
        curves.setdefault(r["cell"], {})[r["initialisation"]] = r["curve"]
    return {"title": f"H = {records[0]['H']}, {records[0]['seeds']} seeds", "curves": curves}


def draw_speed(data: Data, axes_of: Any) -> Any:
    """Bars side by side for every shape; the line at 1 is the best JAX peer."""
    figure, axes = axes_of(1, 1, (10.0, 4.6))
    axis, count = axes[0][0], len(data["bars"])
    width = 0.84 / count
    for n, (name, found) in enumerate(data["bars"].items()):
        colour = COLOURS[BARS.index(name)]
        for group, value in enumerate(found):
            if value is None:
                continue
            middle, low, high = value
            at = group + (n - (count - 1) / 2) * width
            axis.bar(at, middle, width * 0.9, color=colour, label=name if group == 0 else None)
            axis.plot([at, at], [low, high], color="#333333", linewidth=1.0)
            axis.annotate(f"{middle:.2f}", (at, max(high, middle)), (0, 3), textcoords="offset points", ha="center",
                          va="bottom", fontsize=7, rotation=90, zorder=4,
                          bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3})  # fmt: skip
    axis.axhline(1.0, color="#000000", linewidth=0.9, linestyle=(0, (4, 2)), zorder=0.5)
    axis.set_xticks(range(len(data["groups"])), data["groups"], fontsize=8)
    axis.set_xlabel("shape (B, T, D, H)")
    axis.set_ylabel("times as fast as the best JAX peer")
    axis.set_ylim(0, 1.14 * max(value[2] for found in data["bars"].values() for value in found if value))
    axis.set_title("Forward plus backward of one LSTM layer; bars: median over rounds, lines: quartiles",
                   loc="left", fontsize=10)  # fmt: skip
    figure.legend(loc="outside lower center", ncols=count, frameon=False, fontsize=9, title=data["title"])
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_retention(data: Data, axes_of: Any) -> Any:
    """A panel for every cell; one colour and dash for an initialisation in all of them."""
    cells = list(data["curves"])
    columns = min(len(cells), 2)
    figure, axes = axes_of(-(-len(cells) // columns), columns, (10.0, 3.2 * -(-len(cells) // columns) + 1.2))
    names = list(dict.fromkeys(name for curves in data["curves"].values() for name in curves))
    panels = [axis for line in axes for axis in line]
    values = [q for curves in data["curves"].values() for c in curves.values() for q in c["log10_quartiles"]]
    floor = min((v for q in values for v in q if v is not None), default=-1.0)
    for axis, cell in zip(panels, cells, strict=False):
        for name, curve in data["curves"][cell].items():
            n = names.index(name)
            known = [(k, *q) for k, q in zip(curve["lags"], curve["log10_quartiles"], strict=True) if None not in q]
            if not known:
                continue
            lags, low, middle, high = zip(*known, strict=True)
            colour = COLOURS[n % len(COLOURS)]
            axis.fill_between(lags, low, high, color=colour, alpha=0.2, linewidth=0)
            # The first is broad and pale: others lie on top of it.
            look = {"linewidth": 4.0, "alpha": 0.45} if n == 0 else {"linewidth": 1.6}
            axis.plot(lags, middle, color=colour, linestyle=DASHES[n % len(DASHES)], label=name, **look)
        axis.axhline(0, color="#000000", linewidth=0.8)
        axis.set_title(cell, loc="left", fontsize=11)
        axis.set_xlabel("steps back k")
        axis.set_ylabel("log$_{10}$ of the gradient left")
        axis.set_ylim(1.05 * min(floor, -1.0), 2.0)
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in panels[len(cells) :]:
        axis.set_visible(False)
    found: dict[str, Any] = {}
    for axis in panels:
        found |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"What an untrained network keeps of a gradient, rms of the whole state; median and quartiles; "
                    f"{data['title']}", x=0.01, ha="left", fontsize=11)  # fmt: skip
    return figure


# By name: what is shown, how it is drawn, where it lies below the root, what the document says for who cannot see it.
PLOTS: dict[str, tuple[Any, Any, str, str]] = {
    "plot-speed": (speed, draw_speed, "benchmarks/plots/speed_cpu.png",
                   "Speed of a gradient step relative to the best JAX peer, by shape"),
    "plot-retention": (retention, draw_retention, "benchmarks/plots/retention.png",
                       "Share of a gradient left by steps back, for every cell and initialisation"),
    "plot-front-door": (front_door.steps, front_door.draw_steps, "docs/front_door.png",
                        "Speed of a training step of Flax, PyTorch and rnncore, by shape, in terms of Flax's"),
}  # fmt: skip


def digest(data: Data) -> str:
    """A name for what is shown; it is written into the picture, whose bytes depend on the version of matplotlib."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def png(name: str, data: Data) -> bytes:
    """The picture: the same bytes for the same data and matplotlib."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def axes_of(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
        figure = Figure(figsize=size, dpi=95, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns, squeeze=False)

    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        out = io.BytesIO()
        PLOTS[name][1](data, axes_of).savefig(out, format="png", metadata={"Software": None, "Data": digest(data)})
    return out.getvalue()


def shows(path: Path, data: Data) -> bool:
    """Whether a picture is there and was drawn from this data."""
    return path.exists() and b"tEXtData\0" + digest(data).encode() in path.read_bytes()
