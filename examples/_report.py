"""The output of a run: the JSON file, the table and the verdict.

The results are one plain dictionary, the content of the JSON file.  A retention is stored as log10,
because 10^-60 is a valid result that float32 cannot hold; a retention of exactly 0 has no logarithm
and is null.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

NETWORKS = {"rnn": "vanilla RNN", "lstm": "LSTM"}
STAGES = {"initialisation": "at initialisation", "trained": "after training"}
ABOUT = (
    "Retention ||dl_T/ds_(T-k)|| / ||dl_T/ds_T|| of the gradient of one loss term l_T by lag k, on held-out text. "
    "mean_log10: mean of log10 over positions (sequences), low_log10 and high_log10 their 10 % and 90 % quantiles, "
    "log10_of_mean the log10 of the mean. decay_rate: minus the slope of the mean of ln retention within the window. "
    "half_life: ln 2 / rate, and the lag at which the curve crosses 1/2. null: no such number. Losses in nats."
)
TABLE_LAGS = (1, 10, 50, 100)


def save(results: dict[str, Any], path: Path) -> None:
    """Writes the JSON file in one step, so that it is never incomplete, even if the run is killed."""
    text = json.dumps(finite(results), indent=1, allow_nan=False, ensure_ascii=False)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)


def finite(value: Any) -> Any:
    """The value with null for every number that JSON cannot hold, and numbers rounded to seven digits."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def stages(results: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(network, stage, measurement) for everything that was measured, in the order of the tables."""
    return [
        (network, stage, entry[stage])
        for network, entry in results["networks"].items()
        for stage in STAGES
        if stage in entry
    ]


def power(log10: float | None) -> str:
    """A retention as text: 10^-3.2, or 0 if it is exactly 0."""
    return "0" if log10 is None or not math.isfinite(log10) else f"10^{round(log10, 1) + 0.0:.1f}"


def steps(half_life: float | None) -> str:
    """A half-life in steps; a gradient that does not decay has none."""
    if half_life is None or not math.isfinite(half_life):
        return "none"
    return f"{half_life:.1f}" if half_life < 10_000 else "> 10000"


def table(results: dict[str, Any]) -> str:
    """One line per curve: retention at a few lags, decay rate, quality of the fit, half-life."""
    last = results["settings"]["lags"]
    chosen = sorted({lag for lag in TABLE_LAGS if lag <= last} | {last})
    head = ["network", "when", "curve", *(f"lag {lag}" for lag in chosen), "rate/step", "R^2", "half-life", "half at"]
    rows = []
    for network, stage, measured in stages(results):
        for path, curve in measured["curves"].items():
            values = [power(curve["mean_log10"][curve["lags"].index(lag)]) for lag in chosen]
            fit, half = curve["decay_rate"] or {}, curve["half_life"]
            numbers = [number(fit.get("rate"), 4), number(fit.get("r_squared"), 3)]
            numbers += [steps(half["exponential"]), steps(half["crossing"])]
            rows.append([NETWORKS[network], STAGES[stage], path, *values, *numbers])
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        texts = [c.ljust(w) if n < 3 else c.rjust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(texts).rstrip()

    rule = "-" * len(line(head))
    return "\n".join([line(head), rule, *map(line, rows)])


def number(value: float | None, digits: int) -> str:
    """A number that may be missing, and is never shown as -0."""
    return "-" if value is None or not math.isfinite(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def decay(curve: dict[str, Any]) -> str:
    """Rate and half-life of a curve as text."""
    fit = curve["decay_rate"]
    if fit is None:
        return "no decay rate can be fitted"
    rate = f"{abs(fit['rate']):.4f} per step (R^2 {fit['r_squared']:.3f})"
    if fit["rate"] <= 0:
        return f"it grows by {rate}, so there is no half-life"
    return f"it decays by {rate}; half-life {steps(curve['half_life']['exponential'])} steps"


def verdicts(results: dict[str, Any]) -> list[str]:
    """One sentence for each network and each exact curve, from the last stage that was measured."""
    sentences = []
    for network, entry in results["networks"].items():
        done = [stage for stage in STAGES if stage in entry]
        if not done:
            continue
        curves = entry[done[-1]]["curves"]
        for name in (n for n in ("state", "cell") if n in curves):
            curve = curves[name]
            text = (
                f"{NETWORKS[network]}, {name}: {STAGES[done[-1]]}, lag {curve['lags'][-1]} keeps "
                f"{power(curve['mean_log10'][-1])} of the gradient of one loss term"
            )
            if len(done) > 1:
                text += f" ({power(entry[done[0]]['curves'][name]['mean_log10'][-1])} at initialisation)"
            text += f"; {decay(curve)}"
            if name == "cell":
                text += f"; the direct path alone predicts {power(curves['direct']['mean_log10'][-1])}"
            sentences.append(text + ".")
    return sentences


def losses(results: dict[str, Any]) -> list[str]:
    """How well each network learned."""
    lines, unit = [], "word" if "words" in results["text"] else "character"
    for network, entry in results["networks"].items():
        values = [f"{entry[s]['validation_loss_nats']:.3f} {STAGES[s]}" for s in STAGES if s in entry]
        text = f"{NETWORKS[network]}: held-out loss {', '.join(values)} (nats per {unit})"
        training = entry.get("training", {})
        if training.get("steps"):
            speed = training["tokens_per_second"]
            text += f"; {training['steps']} steps in {training['seconds']:.0f} s, {speed:,.0f} {unit}s per second"
        lines.append(text)
    return lines


def opening(results: dict[str, Any]) -> str:
    """What the run is about to do, in two lines."""
    text, settings = results["text"], results["settings"]
    unit = "words" if "words" in text else "characters"
    return (
        f"text: {text['source']}, {text[unit]:,} {unit}, {text['distinct']} distinct, "
        f"the last {text['validation']:,} held out\n"
        f"measuring {settings['positions']} loss terms over 1 to {settings['lags']} steps back; "
        "Ctrl-C stops and keeps what was measured"
    )


def text(results: dict[str, Any]) -> str:
    """Table and verdict for the terminal."""
    if not stages(results):
        return "nothing was measured"
    note = (
        "retention = mean over positions of log10 ||dl_T/ds_(T-k)|| / ||dl_T/ds_T||; rate: -d ln retention / d lag, "
        "first fifth of the lags left out;\nhalf-life = ln 2 / rate; half at: the lag where half is gone."
    )
    return "\n".join(["", table(results), "", note, "", *losses(results), "", *verdicts(results)])
