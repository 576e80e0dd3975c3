"""Over 100 steps the LSTM keeps 1e-2 of a gradient and the RNN 1e-10: under which initialisation?

Measures d s_T / d s_{T-100} of untrained networks with common initialisations and inputs x ~ N(0, s^2), after 50 steps
of burn-in, with exact Jacobians in float64, as

  operator  the largest singular value: the best direction
  rms       ||.||_F / sqrt n: the average over directions
  direct    the product of the forget gates alone, rms over units, which is often taken for the gradient (LSTM)

s is the whole state, which is (c, h) for an LSTM.  The tables show medians and quartiles over --seeds draws of
parameters and inputs.  A claim holds at a setting if the median lies within half a decade of it.

  python examples/claim_initialisation.py
  python examples/claim_initialisation.py --seeds 20 --out full
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import _claims
import _options
import _run
import jax
import numpy as np
from tqdm import tqdm

from rnncore import analysis, initializers

CLAIMED = {"LSTM": -2.0, "RNN": -10.0}  # log10 after 100 steps
WITHIN = 0.5  # decades
KINDS = {"rms": ("rms", "state"), "operator": ("operator", "state"), "direct": ("rms", "direct")}
OF = {"rms": "rms of the whole state", "operator": "operator norm of the whole state",
      "direct": "product of forget gates"}  # fmt: skip


def networks(lags: int) -> dict[str, tuple[str, _claims.Build]]:
    """Name to (kind of network, how to build it); chrono gets the number of steps that matter."""
    orthogonal, biased = functools.partial(_claims.orthogonal, "LSTM"), initializers.forget_bias
    return {
        "RNN, PyTorch default": ("RNN", _claims.torch("RNN")),
        "RNN, Keras default": ("RNN", _claims.keras("RNN")),
        "RNN, orthogonal, LeCun inputs": ("RNN", _claims.orthogonal("RNN")),
        "LSTM, PyTorch default": ("LSTM", _claims.torch("LSTM")),
        "LSTM, PyTorch, b_f = 1 in all": ("LSTM", _claims.torch("LSTM", 1.0)),
        "LSTM, PyTorch, both b_f = 1": ("LSTM", _claims.torch("LSTM", 2.0)),
        "LSTM, Keras default": ("LSTM", _claims.keras("LSTM")),
        **{f"LSTM, orthogonal, b_f = {b}": ("LSTM", orthogonal(biased(float(b)))) for b in range(4)},
        f"LSTM, orthogonal, chrono({lags})": ("LSTM", orthogonal(initializers.chrono(lags))),
        "LSTM, orthogonal, uniform gate": ("LSTM", orthogonal(initializers.uniform_gate())),
    }


def measure(args: argparse.Namespace, build: _claims.Build, scale: float, seed: int) -> dict[str, float]:
    """log10 of every kind at the last lag, and the slope of ln rms over the last four fifths of the lags."""
    key, data = jax.random.split(jax.random.key(seed))
    cell, params = build(args.hidden, args.inputs, key)
    xs = _claims.inputs(data, args.burn_in + args.lags, args.inputs, scale)
    run = _claims.run(cell, params, xs, args.burn_in)
    found = {}
    for name, (kind, path) in KINDS.items():
        if path == "direct" and not hasattr(run.gates, "f"):
            continue
        lags = range(args.lags // 5, args.lags + 1) if name == "rms" else (args.lags,)
        curve = analysis.retention_curve(run, kind=kind, path=path, lags=lags)
        found[name] = float(curve.log10[-1])
        if name == "rms":
            found["slope"] = -curve.decay_rate((args.lags // 5, args.lags)).rate
    return found


def work(args: argparse.Namespace, builds: dict[str, tuple[str, _claims.Build]], results: dict[str, Any]) -> None:
    """One network after the other, at one scale after the other, with all seeds."""
    total = len(builds) * len(args.scales) * args.seeds
    with tqdm(total=total, unit="run", dynamic_ncols=True) as bar:
        for name, (kind, build) in builds.items():
            for scale in args.scales:
                bar.set_description(f"{name}, x std {scale:g}")
                drawn: dict[str, list[float]] = {}
                for seed in range(args.seeds):
                    for key, value in measure(args, build, scale, seed).items():
                        drawn.setdefault(key, []).append(value)
                    bar.update()
                entry = results["runs"].setdefault(name, {"network": kind, "scales": {}})
                entry["scales"][f"{scale:g}"] = {key: _claims.quartiles(v) for key, v in drawn.items()}


def words(results: dict[str, Any]) -> str:
    """A table for every kind, and a verdict on each claim."""
    runs, settings = results["runs"], results["settings"]
    lags, scales = settings["lags"], [f"{s:g}" for s in settings["scales"]]
    lines = []
    for kind, label in {**OF, "slope": "slope of ln rms per step"}.items():
        told: Callable[[list[float]], str] = slopes if kind == "slope" else powers
        rows = []
        for name, entry in runs.items():
            if any(kind in found for found in entry["scales"].values()):
                cells = [told(entry["scales"][s][kind]) if s in entry["scales"] else "" for s in scales]
                rows.append([name, *cells])
        if rows:
            what = "" if kind == "slope" else f"log10 of d s_T / d s_(T-{lags}), "
            lines += [f"{what}{label}: median (quartiles) over {settings['seeds']} seeds",
                      _claims.table(["initialisation", *(f"x std {s}" for s in scales)], rows), ""]  # fmt: skip
    return "\n".join(lines + [verdict(results, kind) for kind in CLAIMED] + defaults(results))


def defaults(results: dict[str, Any]) -> list[str]:
    """How far apart the two networks are at the defaults of each library."""
    lines = []
    for library in ("PyTorch", "Keras"):
        entries = (results["runs"].get(f"{kind}, {library} default", {"scales": {}}) for kind in ("RNN", "LSTM"))
        rnn, lstm = (entry["scales"] for entry in entries)
        both = [(s, lstm[s]["rms"][1] - rnn[s]["rms"][1]) for s in rnn if s in lstm]
        if both:
            told = ", ".join(f"{gap:+.1f} (inputs of std {s})" for s, gap in both)
            lines.append(f"LSTM over RNN at the defaults of {library}, decades of rms; the claims say +8: {told}")
    return lines


def powers(values: list[float]) -> str:
    """Median and quartiles of a log10."""
    low, middle, high = (f"{round(v, 1) + 0.0:.1f}" for v in values)
    return f"{middle} ({low} to {high})"


def slopes(values: list[float]) -> str:
    """The median of a slope."""
    return f"{values[1]:+.3f}"


def verdict(results: dict[str, Any], network: str) -> str:
    """Where the claim about a kind of network holds, and how wrong it is elsewhere."""
    claim, holds, off, exact = CLAIMED[network], [], [], 0
    for name, entry in results["runs"].items():
        if entry["network"] != network:
            continue
        for scale, found in entry["scales"].items():
            good = [kind for kind in OF if kind in found and abs(found[kind][1] - claim) <= WITHIN]
            exact += "rms" in good or "operator" in good
            if good:
                told = ", ".join(f"{kind} {_claims.exponent(found[kind][1])}" for kind in good)
                holds.append(f"  holds: {name}, inputs of std {scale}: {told}")
            off.append((found["rms"][1], f"{name}, inputs of std {scale}"))
    if not off:
        return f'"{network} 1e{claim:.0f}": not measured'
    (low, least), (high, most) = min(off), max(off)
    head = (
        f'"{network} keeps 1e{claim:.0f} over {results["settings"]["lags"]} steps": the gradient agrees within '
        f"{WITHIN} decades at {exact} of {len(off)} settings; rms goes from {_claims.exponent(low)} ({least}) to "
        f"{_claims.exponent(high)} ({most})"
    )
    if high - low > 4 * WITHIN:
        head += ", so it depends on the initialisation, not on the architecture"
    return "\n".join([head, *holds])


def draw(results: dict[str, Any]) -> Any:
    """One row for each initialisation: medians and quartiles at every scale, with the claims as bands."""
    runs, scales = results["runs"], [f"{s:g}" for s in results["settings"]["scales"]]
    kinds = [kind for kind in CLAIMED if any(entry["network"] == kind for entry in runs.values())]
    counts = [sum(entry["network"] == kind for entry in runs.values()) for kind in kinds]
    figure, grid = _run._picture.plt.subplots(
        len(kinds), 1, figsize=(10.5, max(5.0, 2.2 + 0.62 * sum(counts))), squeeze=False, sharex=True,
        layout="constrained", height_ratios=[n + 0.4 for n in counts],
    )  # fmt: skip
    markers = ("o", "s", "^", "D", "v", "P")
    colours = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9")
    values = [found[k][1] for e in runs.values() for found in e["scales"].values() for k in OF if k in found]
    values = [v for v in values if np.isfinite(v)]
    low, high = max(min(values), -35.0), max(*values, 0.0)
    for axis, kind in zip(grid[:, 0], kinds, strict=True):
        names = [name for name, entry in runs.items() if entry["network"] == kind]
        axis.axvspan(CLAIMED[kind] - WITHIN, CLAIMED[kind] + WITHIN, color="#E69F00", alpha=0.35, linewidth=0)
        axis.annotate(f"claim: $10^{{{CLAIMED[kind]:.0f}}}$", (CLAIMED[kind] - WITHIN, 1), (-4, -3), fontsize=10,
                      xycoords=("data", "axes fraction"), textcoords="offset points", ha="right", va="top")  # fmt: skip
        for row, name in enumerate(names):
            if row % 2:
                axis.axhspan(row - 0.5, row + 0.5, color="#000000", alpha=0.04, linewidth=0)
            for n, scale in enumerate(scales):
                found = runs[name]["scales"].get(scale)
                if found is None:
                    continue
                y = row + 0.62 * ((n + 0.5) / len(scales) - 0.5)
                look = {"color": colours[n % 6], "marker": markers[n % 6]}
                mark(axis, found["rms"], y, markersize=4.5, **look)
                if "direct" in found:
                    mark(axis, found["direct"], y, markersize=8, markerfacecolor="none", **look)
        axis.set_yticks(range(len(names)), [name.partition(", ")[2] for name in names])
        axis.set_ylim(len(names) - 0.5, -0.9)
        axis.set_title({"LSTM": "LSTM", "RNN": "vanilla RNN, tanh"}[kind], loc="left", fontsize=11)
        axis.grid(True, axis="x", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.axvline(0, color="#000000", linewidth=0.8)
    _claims.powers_axis(grid[-1, 0], low, high, which="x")
    grid[-1, 0].set_xlim(5 * np.floor((low - 0.3) / 5), high + 1)
    lags = results["settings"]["lags"]
    grid[-1, 0].set_xlabel(f"share of a gradient left after {lags} steps (medians; bars: quartiles)")
    line = _run._picture.Line2D
    handles = [line([], [], linestyle="", color=colours[n % 6], marker=markers[n % 6], label=f"x std {s}")
               for n, s in enumerate(scales)]  # fmt: skip
    handles += [line([], [], linestyle="", color="#777777", marker="o", label="filled: gradient, rms of the state"),
                line([], [], linestyle="", color="#777777", marker="o", markerfacecolor="white",
                     label="hollow: product of forget gates")]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9, handletextpad=0.2)
    note = ", interrupted" if results["interrupted"] else ""
    figure.suptitle(f"What an untrained network keeps of a gradient: a matter of the initialisation{note}",
                    x=0.01, ha="left", fontsize=12)  # fmt: skip
    return figure


def mark(axis: Any, values: list[float], y: float, **look: Any) -> None:
    """A median with its quartiles; a retention of exactly 0 is not drawn."""
    low, middle, high = values
    if np.isfinite(low):
        axis.plot([low, high], [y, y], color=look["color"], linewidth=1.4, zorder=2)
    if np.isfinite(middle):
        axis.plot([middle], [y], linestyle="", zorder=3, **look)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = _claims.command(__doc__ or "", out="claim_initialisation", hidden=128, inputs=32, lags=100, seeds=5)
    parser.add_argument("--scales", type=_claims.spread, nargs="+", default=[0.0, 0.1, 0.7, 1.0],
                        help="standard deviations of x")  # fmt: skip
    parser.add_argument("--burn-in", type=_options.at_least(0), default=50, help="steps to run from a zero state first")

    def load(args: argparse.Namespace) -> dict[str, tuple[str, _claims.Build]]:
        jax.config.update("jax_enable_x64", True)
        return networks(args.lags)

    return _run.main(parser, argv, load, work, words, draw)


if __name__ == "__main__":
    sys.exit(main())
