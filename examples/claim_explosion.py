"""Forget gates are at most 1, so the gradient of an LSTM cannot explode: is that true?

The argument takes the forget gate f_t for d c_t / d c_{t-1}.  But the gradient also flows through h_{t-1} into the
gates and the candidate.  At the origin (no input, c = h = 0) with an orthogonal U_g, the Jacobian of a step has the
eigenvalues f + i o lambda(U_g), |lambda| = 1, and 0.  If one lambda is 1, as it nearly is in large networks, the
spectral radius is

  rho = f + i o = sigmoid(b_f) + 1/4,   above 1 for a forget bias b_f > ln 3 = 1.0986

although every forget gate is below 1.  This example sweeps b_f and measures the slope of ln retention of the whole
state (c, h) against the lag, without input and with inputs x ~ N(0, s^2).  It compares this with the direct path, the
product of the forget gates alone.  Jacobians are exact, in float64; each gate's recurrent matrix is orthogonal.

  python examples/claim_explosion.py
  python examples/claim_explosion.py --hidden 256 --seeds 10
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import _claims
import _options
import _run
import jax
import numpy as np
from tqdm import tqdm

from rnncore import analysis, initializers

LOWEST, HIGHEST = -1.0, 5.0
CRITICAL = initializers.critical_forget_bias()
FLAT = 1e-3  # a slope closer to 0 than this, a factor of 1.1 over 100 steps, is neither growth nor decay


def measure(args: argparse.Namespace, bias: float, scale: float, seed: int) -> dict[str, float]:
    """One network on one sequence."""
    key, data = jax.random.split(jax.random.key(seed))
    cell, params = _claims.orthogonal("LSTM", initializers.forget_bias(bias))(args.hidden, args.inputs, key)
    xs = _claims.inputs(data, args.burn_in + args.lags, args.inputs, scale)
    run = _claims.run(cell, params, xs, args.burn_in)
    first = args.lags // 5
    lags = sorted({*np.linspace(first, args.lags, 9).astype(int).tolist()})
    found = {"largest_gate": float(run.gates.f.max())}
    for kind, path in (("rms", "state"), ("operator", "state"), ("rms", "direct")):
        curve = analysis.retention_curve(run, kind=kind, path=path, lags=lags)
        name = "direct" if path == "direct" else kind
        found[f"{name}_slope"] = -curve.decay_rate((first, args.lags)).rate
        found[f"{name}_log10"] = float(curve.log10[-1])
    return found


def radius(args: argparse.Namespace, bias: float) -> float:
    """Largest |eigenvalue| of the Jacobian of one step at the origin, computed numerically."""
    key = jax.random.key(0)
    cell, params = _claims.orthogonal("LSTM", initializers.forget_bias(bias))(args.hidden, args.inputs, key)
    run = analysis.trajectory(cell, params, _claims.inputs(key, 1, args.inputs, 0.0))
    return float(np.abs(np.asarray(analysis.jacobian_eigenvalues(run, 1))).max())


def work(args: argparse.Namespace, biases: list[float], results: dict[str, Any]) -> None:
    """All biases for the first input scale, then for the next; medians over the seeds."""
    results["biases"], results["critical_bias"] = biases, CRITICAL
    results["radius"] = {"derived": [gate(b) + 0.25 for b in biases], "computed": []}
    with tqdm(total=len(biases) * (1 + len(args.scales) * args.seeds), unit="run", dynamic_ncols=True) as bar:
        for bias in biases:
            results["radius"]["computed"].append(radius(args, bias))
            bar.update()
        for scale in args.scales:
            record: dict[str, list] = {}
            for bias in biases:
                bar.set_description(f"x ~ N(0, {scale:g}^2), b_f {bias:.2f}")
                runs = []
                for seed in range(args.seeds):
                    runs.append(measure(args, bias, scale, seed))
                    bar.update()
                for name in runs[0]:
                    values = [run[name] for run in runs]
                    taken = max(values) if name == "largest_gate" else float(np.median(values))
                    record.setdefault(name, []).append(taken)
                results["runs"][f"{scale:g}"] = record


def gate(bias: float) -> float:
    """sigmoid(b)."""
    return 1 / (1 + math.exp(-bias))


def crossing(biases: Sequence[float], slopes: Sequence[float]) -> float | None:
    """The bias at which the slope first changes from decay to growth, interpolated; None if it never does."""
    for n in range(1, len(slopes)):
        if slopes[n - 1] <= 0 < slopes[n]:
            part = -slopes[n - 1] / (slopes[n] - slopes[n - 1])
            return biases[n - 1] + part * (biases[n] - biases[n - 1])
    return None


def words(results: dict[str, Any]) -> str:
    """Table and verdict."""
    biases, runs, lags = results["biases"], results["runs"], results["settings"]["lags"]
    head = ["b_f", "f + i o", "ln(f + i o)", *(f"slope, x std {s}" for s in runs)]
    head += [f"lag {lags}, std {s}" for s in runs]
    rows = []
    for n, bias in enumerate(biases):
        derived = gate(bias) + 0.25
        done = [run if n < len(run["rms_slope"]) else None for run in runs.values()]
        rows.append([
            f"{bias:.3f}", f"{derived:.4f}", f"{math.log(derived):+.4f}",
            *("" if run is None else f"{run['rms_slope'][n]:+.4f}" for run in done),
            *("" if run is None else _claims.exponent(run["rms_log10"][n]) for run in done),
        ])  # fmt: skip
    error = max(abs(a - b) for a, b in zip(*results["radius"].values(), strict=False))
    lines = [
        f"slope of ln retention (rms, whole state) per step, medians over {results['settings']['seeds']} seeds",
        _claims.table(head, rows), "",
        f"radius at the origin, eigenvalues against f + i o: largest difference {error:.1e}",
    ]  # fmt: skip
    grown = False
    for scale, run in runs.items():
        slopes, done = run["rms_slope"], biases[: len(run["rms_slope"])]
        worst = int(np.argmax(slopes))
        where = crossing(done, slopes)
        text = f"inputs of std {scale}: "
        if slopes[worst] > FLAT:
            grown = True
            begin = "grows over the whole sweep" if where is None else f"grows from b_f = {where:.3f} on"
            text += (
                f"the gradient {begin}, most at b_f = {done[worst]:.3g}: {slopes[worst]:+.4f} per step, "
                f"{_claims.exponent(run['rms_log10'][worst])} after {lags} steps, with no forget gate above "
                f"{run['largest_gate'][worst]:.4f}; the product of the gates predicts "
                f"{_claims.exponent(run['direct_log10'][worst])}"
            )
        else:
            text += f"no growth: the largest slope is {slopes[worst]:+.4f} per step, at b_f = {done[worst]:.3g}"
        lines.append(text)
    if "0" in runs:
        where = crossing(biases, runs["0"]["operator_slope"])
        if where is not None:
            lines.append(f"without input the operator norm crosses at b_f = {where:.4f}; ln 3 = {CRITICAL:.4f}")
    lines.append(
        "verdict: FALSE. f <= 1 bounds the direct path only; the path through h_{t-1} and the candidate adds up to "
        "i o = 1/4 to it, and the gradient explodes." if grown else
        "verdict: no explosion at these settings, which does not prove the claim."
    )  # fmt: skip
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> Any:
    """Slope against forget bias."""
    figure, (axis,) = _run.axes(1, (9, 5.6))
    biases, runs = results["biases"], results["runs"]
    fine = np.linspace(biases[0], biases[-1], 200)
    axis.axhspan(0, 1, color="#000000", alpha=0.05, linewidth=0)
    axis.axhline(0, color="#000000", linewidth=0.9)
    axis.axvline(CRITICAL, color="#000000", linewidth=0.9, linestyle=(0, (2, 2)))
    axis.plot(fine, [math.log(gate(b) + 0.25) for b in fine], color="#999999", linewidth=4, alpha=0.6,
              label="ln(f + i o), derived for the origin")  # fmt: skip
    markers = ("o", "s", "^", "D")
    for n, (scale, run) in enumerate(runs.items()):
        count, style = len(run["rms_slope"]), _run.STYLES[n % len(_run.STYLES)]
        name = "no input" if float(scale) == 0 else f"x ~ N(0, {scale}²)"
        axis.plot(biases[:count], run["rms_slope"], marker=markers[n % 4], markersize=5, linewidth=1.8, **style,
                  label=f"whole state, {name}")  # fmt: skip
    last = list(runs.values())[-1]
    axis.plot(biases[: len(last["direct_slope"])], last["direct_slope"], color="#CC79A7", marker="v", markersize=5,
              linewidth=1.4, linestyle=(0, (8, 2, 1, 2, 1, 2)),
              label=f"product of forget gates, inputs of std {list(runs)[-1]}")  # fmt: skip
    slopes = [s for run in runs.values() for name in ("rms_slope", "direct_slope") for s in run[name]]
    low, high = max(min(slopes), -1.0) - 0.05, max(*slopes, math.log(gate(biases[-1]) + 0.25)) + 0.08
    axis.set_ylim(low, high)
    axis.set_xlim(biases[0], biases[-1])
    if biases[0] < CRITICAL < biases[-1]:
        axis.annotate(f"ln 3 = {CRITICAL:.4f}", (CRITICAL, low), (5, 8), textcoords="offset points", fontsize=10)
    axis.annotate("explodes", (0, 0), (8, 6), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="left", fontsize=10, color="#444444")  # fmt: skip
    axis.annotate("vanishes", (0, 0), (8, -15), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="left", fontsize=10, color="#444444")  # fmt: skip
    axis.set_xlabel("forget bias $b_f$")
    axis.set_ylabel("slope of ln retention (natural log per step)")
    axis.legend(frameon=False, loc="lower right", handlelength=3.6)
    note = ", interrupted" if results["interrupted"] else ""
    axis.set_title("Forget gates below 1, and the gradient of the LSTM still explodes: "
                   f"H = {results['settings']['hidden']}{note}", loc="left", fontsize=12)  # fmt: skip
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = _claims.command(__doc__ or "", out="claim_explosion", hidden=128, inputs=32, lags=100, seeds=3)
    parser.add_argument("--points", type=_options.at_least(3), default=13, help="forget biases from -1 to 5")
    parser.add_argument("--scales", type=_claims.spread, nargs="+", default=[0.0, 0.1, 1.0],
                        help="standard deviations of x")  # fmt: skip
    parser.add_argument("--burn-in", type=_options.at_least(0), default=50, help="steps to run from a zero state first")

    def load(args: argparse.Namespace) -> list[float]:
        jax.config.update("jax_enable_x64", True)
        return np.linspace(LOWEST, HIGHEST, args.points).tolist()

    return _run.main(parser, argv, load, work, words, draw)


if __name__ == "__main__":
    sys.exit(main())
