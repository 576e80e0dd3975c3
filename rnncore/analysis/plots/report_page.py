"""The page of an `analysis.Report`: findings first, a picture of every layer, a table, how it was computed."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import rnncore
from rnncore.analysis.plots.style import COLOURS, DASHES, signed_map
from rnncore.analysis.report.measured import LayerReport

DPI = 150
SIZE = (4.3, 2.9)
"""Inches of a picture: wide enough for a telephone at the size of its own letters."""
ROOM = 3.0
"""Decades above or below what was measured that a bound may lie and still be in the picture."""
PAPER = {"light": ("#ffffff", "#1a1a1a", "#e4e4e4"), "dark": ("#16181c", "#e6e6e6", "#33363c")}
"""Ground, ink and grid."""
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --ground: #fff; --faint: #5a5a5a; --line: #ccc; --mark: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --ground: #16181c; --faint: #a6a6a6; --line: #44474d; --mark: #ff8a80; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 76rem;
  margin: 0 auto; padding: 1.2rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.4rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
ul { padding-left: 1.2rem; max-width: 60rem; }
li { margin: 0.35rem 0; }
.warnings li::marker { content: "!  "; color: var(--mark); font-weight: bold; }
.faint, figcaption, caption { color: var(--faint); font-size: 0.9rem; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem 1rem; }
.row + .row, table + table { margin-top: 1.5rem; }
figure { margin: 0; }
sup { white-space: nowrap; line-height: 0; }
img { width: 100%; max-width: 42rem; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums;
  overflow-wrap: break-word; }
caption { text-align: left; padding: 0.3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.5rem 0.3rem 0; text-align: left; vertical-align: top; }
td:first-child { overflow-wrap: anywhere; min-width: 6rem; }
@media (max-width: 60rem) {
  thead { position: absolute; clip-path: inset(50%); height: 1px; width: 1px; overflow: hidden; }
  tr { display: block; border-bottom: 2px solid var(--line); padding: 0.4rem 0; }
  td { display: grid; grid-template-columns: 11rem 1fr; border: 0; padding: 0.1rem 0; }
  td::before { content: attr(data-label); color: var(--faint); } }
@media print { body { max-width: none; color: #000; background: #fff; } .layer { break-inside: avoid; } }
"""


class Picture(NamedTuple):
    """One picture of one layer.

    Fields:
      name: above it; caption: below it, and the alternative text.
      draw: into axes.
    """

    name: str
    caption: str
    draw: Callable[[Axes], None]


def save(report: Any, path: str | Path, before: Any = None) -> Path:
    """Writes the page; see `Report.save`."""
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"`Report.save({path.name!r})`: expected a name that ends in .html.")
    if before is not None and not set(before.layers) & set(report.layers):
        raise ValueError(
            f"`Report.save(before=<layers {', '.join(before.layers)}>)`: none of them is in this report, which has "
            f"{', '.join(report.layers)}."
        )
    path.write_text(page(report, before), encoding="utf-8")
    return path


def page(report: Any, before: Any = None) -> str:
    """The HTML."""
    both = [("before", before), ("after", report)] if before is not None else [("", report)]
    body = [f"<h1>{html.escape(report.title)}</h1>"]
    count = len(report.layers)
    loss = "" if report.value is None else f"Loss {report.value:.4g}; "
    body.append(f'<p class="faint">{loss}{count} recurrent layer{"s" * (count != 1)}.</p>')
    body.append('<div class="row">')
    for when, one in both:
        assert one is not None
        heading = "Findings" if not when else f"Findings {when}"
        heading += f" (loss {one.value:.4g})" if when and one.value is not None else ""
        body += [f"<div><h2>{heading}</h2>", _items(one.findings)]
        body += [_items(one.warnings, "warnings")] * bool(one.warnings)
        body.append("</div>")
    body.append("</div>")
    for name in report.layers:
        body.append(f'<section class="layer"><h2>{html.escape(name)}</h2>')
        kinds = _pictures([(when, one.layers[name]) for when, one in both if one and name in one.layers])
        # One row of all pictures, or with another report a row for each kind, the two side by side.
        rows = kinds if before is not None else [[pair for kind in kinds for pair in kind]]
        for row in rows:
            figures = []
            for when, picture in row:
                heading = picture.name + (f", {when}" if when else "")
                figures.append(_figure(f"{name}, {heading}", picture, heading))
            body += ['<div class="row">', *figures, "</div>"]
        body.append("</section>")
    body.append("<h2>Numbers</h2>")
    body += [_table(one.table, f"By layer{f', {when}' if when else ''}.") for when, one in both if one is not None]
    body += [_paths(report), _computed(report)]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(report.title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style>'
    )
    return "\n".join(["<!doctype html>", f'<html lang="en"><head>{head}</head>', "<body>", *body, "</body></html>", ""])


def _text(text: str) -> str:
    """Escaped, with exponents as exponents."""
    return re.sub(r"10\^(-?\d+(?:\.\d+)?)", r"10<sup>\1</sup>", html.escape(text))


def _items(texts: Sequence[str], kind: str = "findings") -> str:
    return "\n".join([f'<ul class="{kind}">', *(f"<li>{_text(text)}</li>" for text in texts), "</ul>"])


def _table(rows: Sequence[Sequence[Any]], caption: str) -> str:
    header, *rest = rows
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    lines = [
        "".join(
            f'<td data-label="{html.escape(str(name), quote=True)}">{html.escape(str(cell))}</td>'
            for name, cell in zip(header, row, strict=True)
        )
        for row in rest
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    top = f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>"
    return f"<table>{top}<tbody>{body}</tbody></table>"


def _paths(report: Any) -> str:
    shares: list[Sequence[Any]] = [("layer", "path", "share")]
    gates: list[Sequence[Any]] = [("layer", "gate", "mean", "low", "high")]
    for one in report.layers.values():
        shares += [(one.name, name, f"{share:.1%}") for name, share in (one.shares or {}).items()]
        for name, gate in (one.gates or {}).items():
            whole, (low, high) = gate.overall, gate.thresholds
            beyond = f"{float(whole.left):.1%} below {low:g}", f"{float(whole.right):.1%} above {high:g}"
            gates.append((one.name, name, f"{float(whole.mean):.3f}", *beyond))
    captions = "Share of each path in the step Jacobian, signed; they add up to 1.", "Values of the gates."
    return "\n".join(_table(rows, text) for rows, text in zip((shares, gates), captions, strict=True) if len(rows) > 1)


def _computed(report: Any) -> str:
    texts = [
        "dL/ds_t: the total derivative of the loss with respect to every state of the layer, from one backward pass.",
        "90 % within: the number of last steps, in the order in which the layer reads, that hold 90 % of the sum of "
        "|dL/ds_t|^2.",
        "Half gone after: the k at which |J_(T-k+1)' ... J_T' v| / |v| falls to 1/2, v = dL/ds_T, within the layer.",
        "In parentheses: quartiles over the sequences. Decay: the slope of a line through ln retention, without the "
        "first fifth of the lags.",
        "All directions: the root mean square over directions of the exact product of step Jacobians. Forget gates "
        "alone: their product, which is not the derivative. Bound: the product of the norms of the step Jacobians.",
        "Lyapunov exponents: repeated QR along the run, without its first quarter.",
    ]
    for one in report.layers.values():
        layer, run = one.layer, one.layer.run
        dtype = jax.tree.leaves(run.carries)[0].dtype
        way = ", reads backwards" if layer.reverse else ""
        texts.append(
            f"{one.name}: {type(layer.cell).__name__}, H = {layer.cell.hidden_size}, n = {one.n}, "
            f"D = {run.xs.shape[-1]}, T = {run.steps}, batch {run.batch_shape}, {dtype}{way}."
        )
        texts += [f"{one.name}, not computed: {what}. {why}" for what, why in one.left_out]
    texts.append(f"rnncore {rnncore.__version__}, JAX {jax.__version__}.")
    return f"<h2>How it was computed</h2>{_items(texts, 'computed')}"


# ------------------------------------------------------------------------------------------------- pictures


def _figure(label: str, picture: Picture, heading: str) -> str:
    codes = {mode: _drawn(picture, mode) for mode in PAPER}
    alt = html.escape(f"{label}: {picture.caption}", quote=True)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{codes["dark"]}">'
        f'<img alt="{alt}" src="data:image/png;base64,{codes["light"]}" width="{round(SIZE[0] * DPI)}" '
        f'height="{round(SIZE[1] * DPI)}"></picture><figcaption><b>{html.escape(heading)}.</b> '
        f"{_text(picture.caption)}</figcaption></figure>"
    )


def _drawn(picture: Picture, mode: str) -> str:
    ground, ink, grid = PAPER[mode]
    settings: Any = {
        "figure.facecolor": ground, "axes.facecolor": ground, "savefig.facecolor": ground, "text.color": ink,
        "axes.edgecolor": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "grid.color": grid,
        "font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=SIZE, layout="constrained")
        picture.draw(figure.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _pictures(reports: Sequence[tuple[str, LayerReport]]) -> list[list[tuple[str, Picture]]]:
    """By kind, for each report, with the axes in common."""
    kinds = []
    for make in (_retention, _heatmap, _gates):
        pictures = [(when, picture) for when, one in reports if (picture := make(one, [r for _, r in reports]))]
        if pictures:
            kinds.append(pictures)
    return kinds


def _retention(one: LayerReport, everyone: Sequence[LayerReport]) -> Picture | None:
    drawn = _curves(one)
    if not drawn:
        return None
    finite = [a[np.isfinite(a)] for r in everyone for _, _, rows in _curves(r) for a in rows]
    low = min([a.min() for a in finite if a.size] + [-1.0])
    high = max([a.max() for a in finite if a.size] + [0.0])
    span = max(high - low, 1.0)

    def draw(ax: Axes) -> None:
        for i, (label, lags, (mean, under, over)) in enumerate(drawn):
            ax.plot(lags, mean, color=_ink(ax, i), linestyle=DASHES[i], linewidth=1.8, label=label)
            if not np.array_equal(under, over):
                ax.fill_between(lags, np.maximum(under, low - span), over, color=_ink(ax, i), alpha=0.2, linewidth=0)
        ax.set_ylim(low - 0.06 * span, high + 0.08 * span)
        if one.bound is not None:
            bound = np.asarray(one.bound.mean_log(), np.float64) / math.log(10)
            lags = np.asarray(one.bound.lags)
            if abs(bound[-1]) < 1e6 and low - ROOM <= bound[-1] <= high + ROOM:
                ax.set_ylim(min(low, bound[-1]) - 0.06 * span, max(high, bound.max()) + 0.08 * span)
                look: dict[str, Any] = {"color": ax.xaxis.label.get_color(), "linewidth": 0.8, "linestyle": (0, (1, 1))}
                ax.plot(lags, bound, label="bound", **look)
            else:
                ax.plot([], [], " ", label=f"bound: 10^{bound[-1]:.0f} at lag {lags[-1]}, not drawn")
        ax.grid(True, linewidth=0.6)
        ax.set_xlabel("steps back")
        ax.set_ylabel(r"$\log_{10}$ of what is left")
        ax.legend(loc="lower left", fontsize=7.5, frameon=False, handlelength=2.6)

    labels = ", ".join(label for label, _, _ in drawn)
    last = drawn[0][2][0][-1]
    text = f"{labels}; 10^{last:.1f} is left {drawn[0][1][-1]} steps back." if np.isfinite(last) else labels
    return Picture("what is left", text, draw)


def _curves(one: LayerReport) -> list[tuple[str, np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """(label, lags, (mean, lower and upper quartile)) in log10; curves that are exactly 0 end where they are."""
    found, seen = [], set()
    labels = {"adjoint": "gradient of the loss", "rms": "all directions"}
    for curve, label in ((one.retention, None), (one.rms, None), (one.direct, "forget gates alone")):
        name = label or (labels[curve.kind] if curve is not None else "")
        if curve is None or name in seen:
            continue
        seen.add(name)
        rows = np.asarray(curve.log_retention, np.float64).reshape(-1, len(curve.lags)) / math.log(10)
        if curve.without_gradient is not None:
            rows = rows[~np.asarray(curve.without_gradient).reshape(-1)]
        mean = np.asarray(curve.mean_log(), np.float64) / math.log(10)
        rows, mean = (np.where(np.isfinite(a), a, np.nan) for a in (rows, mean))
        under, over = (mean, mean)
        if len(rows) > 2 and not np.isnan(rows).any():
            under, over = np.quantile(rows, (0.25, 0.75), axis=0)
        found.append((name, np.asarray(curve.lags), (mean, under, over)))
    return found


def _ink(ax: Axes, i: int) -> str:
    """The i-th colour, lighter on a dark ground where it is dark."""
    dark = matplotlib.colors.to_rgb(ax.get_facecolor())[0] < 0.5
    return {"#0072B2": "#56B4E9", "#000000": "#e6e6e6"}.get(COLOURS[i], COLOURS[i]) if dark else COLOURS[i]


def _heatmap(one: LayerReport, everyone: Sequence[LayerReport]) -> Picture | None:
    values = _of_one_sequence(one)
    if values is None:
        return None
    top = max(float(np.abs(a).max()) for r in everyone if (a := _of_one_sequence(r)) is not None)
    if not top:
        return None

    def draw(ax: Axes) -> None:
        signed_map(ax, values, 0, top, r"$dL/dh_t$")
        ax.set_xlabel("step t, in the layer's order")
        ax.set_ylabel("unit")

    largest = int(np.argmax(np.linalg.norm(values, axis=-1)))
    return Picture(
        "gradient over time",
        f"dL/dh_t of the first sequence, by step and unit; largest at step {largest} of {len(values) - 1}. Dark blue "
        "is negative, light yellow positive, grey 0.", draw,
    )  # fmt: skip


def _of_one_sequence(one: LayerReport) -> np.ndarray | None:
    """dL/dh (T + 1, H) of the first sequence."""
    if one.layer.states is None:
        return None
    field = getattr(one.layer.states, "h", one.layer.states[-1])
    lead = len(one.layer.run.batch_shape)
    a = np.asarray(field, np.float64)
    return a.reshape(-1, *a.shape[lead:])[0].reshape(a.shape[lead], -1)


def _gates(one: LayerReport, everyone: Sequence[LayerReport]) -> Picture | None:
    if not one.gates:
        return None
    gates = one.gates
    spans = [np.asarray(gate.overall.quantiles) for r in everyone for gate in (r.gates or {}).values()]
    left, right = min(float(a.min()) for a in spans), max(float(a.max()) for a in spans)
    rim = 0.05 * (right - left) or 0.1

    def draw(ax: Axes) -> None:
        names = list(gates)
        for i, name in enumerate(names):
            low, quarter, middle, three, high = np.asarray(gates[name].overall.quantiles, np.float64)
            ax.plot([low, high], [i, i], color=_ink(ax, 0), linewidth=1.2)
            ax.plot([quarter, three], [i, i], color=_ink(ax, 0), linewidth=7, alpha=0.6, solid_capstyle="butt")
            ax.plot([middle], [i], "o", color=ax.xaxis.label.get_color(), markersize=4.5)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_xlim(left - rim, right + rim)
        ax.grid(True, axis="x", linewidth=0.6)
        ax.set_xlabel("value")
        ax.set_ylabel("gate")

    means = ", ".join(f"{name} {float(gate.overall.mean):.2f}" for name, gate in gates.items())
    text = f"Median, quartiles and 5 to 95 % of the values over units, steps and sequences; means: {means}."
    return Picture("gates", text, draw)
