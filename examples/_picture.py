"""The picture: retention against lag on a log scale, one panel for each network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import _report
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

# Colours of Okabe and Ito, which colour-blind readers can tell apart; in grey print the markers differ.
PATHS: dict[str, tuple[str, str, str]] = {
    "state": ("#000000", "", "exact, whole state"),
    "cell": ("#0072B2", "o", "exact, cell state"),
    "direct": ("#D55E00", "v", "direct forget-gate path"),
    "bound": ("#009E73", "s", "bound: product of step norms"),
    "weight bound": ("#CC79A7", "D", "bound: power of the weight norm"),
}
TOP, BOTTOM = 5, -30  # powers of ten; curves are cut off beyond them, and a note says where they go


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws everything that was measured; needs at least one stage."""
    measured = _report.stages(results)
    networks = list(dict.fromkeys(network for network, _, _ in measured))
    bottom = lower_end(measured)
    figure, axes = plt.subplots(
        1, len(networks), figsize=(1.6 + 4.7 * len(networks), 5.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, network in zip(axes[0], networks, strict=True):
        panel(axis, network, results["networks"][network], bottom)
    axes[0, 0].set_ylabel("share of the gradient left   " r"$\Vert dl_T/ds_{T-k}\Vert \; / \; \Vert dl_T/ds_T\Vert$")
    figure.suptitle(title(results, len(networks)), x=0.01, ha="left", fontsize=12)
    handles = keys(measured)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(2 * len(networks), 4), frameon=False, fontsize=9
    )
    write(figure, path)


def write(figure: Any, path: Path) -> None:
    """Saves a figure completely or not at all, and closes it."""
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=150, format="png")
    part.replace(path)
    plt.close(figure)


def title(results: dict[str, Any], panels: int) -> str:
    """What is shown, and for which networks."""
    what = "How much of the gradient of one loss term survives k steps back"
    unit = "word" if "words" in results["text"] else "character"
    setting = f"{unit} models with {results['settings']['hidden']} units, on held-out text"
    if results["interrupted"]:
        setting += ", interrupted"
    return f"{what}: {setting}" if panels > 1 else f"{what}\n{setting}"


def lower_end(measured: list) -> int:
    """Power of ten at the bottom of the axis: below all curves, but not below 10^-30."""
    values = [v for _, _, entry in measured for curve in entry["curves"].values() for v in curve["mean_log10"]]
    lowest = min((v for v in values if v is not None and math.isfinite(v)), default=-1.0)
    return max(BOTTOM, 5 * math.floor((lowest - 0.5) / 5))


def panel(axis: Any, network: str, entry: dict[str, Any], bottom: int) -> None:
    """All curves of one network."""
    done = [stage for stage in _report.STAGES if stage in entry]
    for stage in done:
        for order, (name, curve) in enumerate(entry[stage]["curves"].items()):
            plot(axis, curve, name, stage, order)
    state = entry[done[-1]]["curves"]["state"]
    lags = state["lags"]
    axis.set_title(f"$\\bf{{{_report.NETWORKS[network].replace(' ', chr(92) + ' ')}}}$\n{summary(state, done[-1])}",
                   loc="left", fontsize=10)  # fmt: skip
    axis.set_xlabel("lag k in steps")
    axis.set_xlim(0, lags[-1])
    axis.set_ylim(bottom, TOP)
    # The data are exponents, so values beyond the range of floats are cut off cleanly.
    ticks = range(bottom, TOP + 1, 5)
    axis.set_yticks(ticks, [f"$10^{{{tick}}}$" for tick in ticks])
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    away = [c["mean_log10"][-1] for c in entry[done[-1]]["curves"].values()]
    powers = [f"$10^{{{v:.0f}}}$" for v in away if v is not None and v > TOP]
    if powers:
        note = f"off the scale {_report.STAGES[done[-1]]}: {' and '.join(powers)} at lag {lags[-1]}"
        axis.text(0.99, 0.955, note, transform=axis.transAxes, ha="right", fontsize=8.5, color="#444444",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip


def summary(curve: dict[str, Any], stage: str) -> str:
    """The end of a curve in a few words."""
    last = curve["mean_log10"][-1]
    kept = "nothing" if last is None else f"$10^{{{last:.1f}}}$"
    half_life = curve["half_life"]["exponential"]
    tail = "no half-life" if half_life is None else f"half-life {_report.steps(half_life)} steps"
    return f"{_report.STAGES[stage]}: lag {curve['lags'][-1]} keeps {kept}, {tail}"


def plot(axis: Any, curve: dict[str, Any], name: str, stage: str, order: int) -> None:
    """One curve; the exact one after training also gets its spread over positions."""
    lags, trained = np.array(curve["lags"]), stage == "trained"
    spacing = (3 * order, max(len(lags) // 8, 1))
    axis.plot(lags, powers_of_ten(curve["mean_log10"]), markevery=spacing, zorder=3 if trained else 2,
              **line_style(name, trained))  # fmt: skip
    if trained and name == "state":
        low, high = (np.maximum(powers_of_ten(curve[key]), 2 * BOTTOM) for key in ("low_log10", "high_log10"))
        axis.fill_between(lags, low, high, color=PATHS[name][0], alpha=0.12, linewidth=0, zorder=1)


def powers_of_ten(values: list[float | None]) -> np.ndarray:
    """The curve as an array; a retention of exactly 0 goes below every axis."""
    return np.array([-np.inf if v is None else v for v in values], float)


def line_style(name: str, trained: bool) -> dict[str, Any]:
    """Solid, full and filled after training; dashed, lighter and hollow at initialisation."""
    colour, marker, _ = PATHS[name]
    return {
        "color": colour, "marker": marker, "markersize": 5, "linestyle": "-" if trained else (0, (4, 2)),
        "linewidth": (1.6 if marker else 2.6) if trained else 1.2, "alpha": 1.0 if trained else 0.55,
        "markerfacecolor": colour if trained else "white",
    }  # fmt: skip


def keys(measured: list) -> list[Any]:
    """The legend: stages by the line, paths by colour and marker."""
    present = {stage for _, stage, _ in measured}
    handles: list[Any] = [
        Line2D([], [], label=_report.STAGES[stage], **{**line_style("state", stage == "trained"), "color": "#777777"})
        for stage in _report.STAGES
        if stage in present
    ]
    if "trained" in present:
        handles.append(Patch(color="#000000", alpha=0.12, linewidth=0, label="8 in 10 positions (state)"))
    for name in (n for n in PATHS if any(n in entry["curves"] for _, _, entry in measured)):
        handles.append(Line2D([], [], label=PATHS[name][2], **line_style(name, True)))
    return handles
