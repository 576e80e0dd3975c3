"""The tables of the pages on learning online, parallel in time, reinforcement learning and sLSTM."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.report.results import Record, groups
from benchmarks.report.words import NONE, table

LIMIT = 100  # of iterations in the forecasts


def cosines(result: dict[str, Any]) -> str:
    """Of every cell and rule, by task: untrained and trained."""
    rows = result["cosines"]
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    by = {(r["cell"], r["rule"], r["task"], r["when"]): r["cosine"] for r in rows}
    return table(
        ("cell", "rule", *tasks),
        [
            (cell, rule, *(f"{by[cell, rule, t, 'untrained']:.2f}, {by[cell, rule, t, 'trained']:.2f}" for t in tasks))
            for cell, rule in groups(rows, "cell", "rule")
        ],
    )


def online_times(result: dict[str, Any]) -> str:
    """RTRL beside backpropagation."""
    return table(
        ("cell", "BPTT, ms", "RTRL, ms", "RTRL in terms of BPTT"),
        [(r["cell"], *(f"{r[k]:.2f}" for k in ("bptt_ms", "rtrl_ms")), f"{r['ratio']:.1f}") for r in result["times"]],
    )


def verdict(rows: list[Record]) -> dict[str, int]:
    """How many forecasts of each kind; a run that did not converge took more than it was allowed."""
    there, others = ([r for r in rows if r["converged"] is is_there] for is_there in (True, False))
    close = sum(r["took"] / 2 <= r["said"] <= 2 * r["took"] for r in there)
    return {
        "cases": len(rows),
        "converged": len(there),
        "within a factor of two": close + sum(r["said"] >= LIMIT / 2 for r in others),
        "refused, and converged after all": sum(r["refused"] for r in there),
        "not refused, and did not converge": sum(not r["refused"] for r in others),
        "exponent below 0, and did not converge": sum(r["exponent"] < 0 for r in others),
    }


def forecasts(result: dict[str, Any]) -> str:
    """By cell, and all together."""
    rows = result["forecasts"]["rows"]
    counts = {name: verdict(own) for (name,), own in groups(rows, "cell").items()} | {"all": verdict(rows)}
    cells = [(name, *map(str, found.values())) for name, found in counts.items()]
    return table(("cell", *counts["all"]), cells)


def parallel_times(result: dict[str, Any]) -> str:
    """Newton's method beside the scan and the default."""
    names = [f"{what}_{key}_ms" for what in ("forward", "gradient") for key in ("newton", "scan", "default")]
    head = ("cell", "forecast", "iterations", "Newton, ms", "scan, ms", "default, ms")
    return table(
        (*head, "Newton, gradient", "scan, gradient", "default, gradient"),
        [
            (r["cell"], f"{r['said']:.0f}", str(r["took"]), *(f"{r[name]:.1f}" for name in names))
            for r in result["times"]["rows"]
        ],
    )


def updates(result: dict[str, Any]) -> str:
    """Of PPO: how many times as fast as the pattern of others."""
    return table(
        ("environments, steps, units", "whole update", "gradient of one replay", "rollout"),
        [
            (f"{r['batch']}, {r['steps']}, {r['hidden']}",
             *(f"{r[f'{what}_ratio']:.2f}" for what in ("update", "gradient", "rollout")))
            for r in result["updates"]
        ],
    )  # fmt: skip


def single_steps(result: dict[str, Any]) -> str:
    """How many times as fast one step is."""
    return table(
        ("batch, units", "`cell.step` against one by hand", "linen cell against Flax's"),
        [
            (f"{r['batch']}, {r['hidden']}{', vmap' * r['vmap']}",
             *(f"{r[f'{what}_ratio']:.2f}" for what in ("step", "layer")))
            for r in result["steps"]
        ],
    )  # fmt: skip


def slstm(result: dict[str, Any]) -> str:
    """Times, and how many times as long each form of PyTorch takes; ratios within a round, their median."""
    rows = []
    for cores, rounds in result["by_cores"].items():
        for case in rounds[0]["rnncore"]:
            own = [turn["rnncore"][case]["ms"] for turn in rounds]
            cells = [cores, case, f"{statistics.median(own):.2f}"]
            for name in ("step", "whole"):
                ratios = [t[name][case]["ms"] / ms for t, ms in zip(rounds, own, strict=True) if case in t[name]]
                cells.append(f"{statistics.median(ratios):.1f}" if ratios else NONE)
            rows.append(cells)
    head = ("cores", "B, T, H", "rnncore, ms", "torch.compile, the step", "torch.compile, the whole")
    return table(head, rows)
