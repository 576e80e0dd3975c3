"""The short tables of the CPU: one row a shape, rnncore beside the best JAX peer and PyTorch."""

from __future__ import annotations

import re

from benchmarks.report import words
from benchmarks.report.results import Record, Results, Run, groups
from rnncore._command import timing

OURS = {"scan": ("rnncore scan", "rnncore reverse"), "cpp": ("rnncore cpp",)}
"""By the names that they have had."""
PEERS = {"best": "that peer", "torch": "PyTorch"}
HEAD = ("(B, T, D, H)", "best JAX peer, ms", "PyTorch, ms", *(f"`{n}`, ms" for n in OURS),
        *(f"`cpp`: times the speed of {name}" for name in PEERS.values()))  # fmt: skip


def shapes(run: Run, measurement: str) -> dict[str, list[Record]]:
    """The records of the shapes S1, S2, ... in float32 with the input product inside, by workload in their order."""
    chosen = run.of("time", measurement=measurement, dtype="float32", input_product=True)
    found = groups((r for r in chosen if re.fullmatch(r"S\d+", r["workload"])), "workload")
    return {key[0]: found[key] for key in sorted(found, key=lambda key: int(key[0][1:]))}


def run_of(results: Results, measurement: str) -> Run | None:
    """Of the runs that count, one for each device and JAX, that with the most contenders, then the newest."""
    runs = [run for run in results.chosen("time", tag="cpu", measurement=measurement) if shapes(run, measurement)]
    return max(runs, key=lambda run: len({r["contender"] for r in run.of("time")}), default=None)


def parts(records: list[Record]) -> dict[str, Record | None]:
    """The contenders of a row: best, torch, those of OURS; None for what was not measured."""
    by = {r["contender"]: r for r in records}
    return {
        "best": words.fastest(r for r in records if words.is_jax_peer(r)),
        "torch": words.fastest(r for r in records if r["library"] == "torch"),
        **{name: next((by[n] for n in names if n in by), None) for name, names in OURS.items()},
    }  # fmt: skip


def cpu(results: Results, measurement: str) -> str | None:
    """The table of a measurement; None where the shapes were not measured."""
    run = run_of(results, measurement)
    if run is None:
        return None
    rows, ratios = [], []
    for records in shapes(run, measurement).values():
        found = parts(records)
        own = found["cpp"]
        quotients = [words.ratio(peer, own) if own and (peer := found[name]) else None for name in PEERS]
        ratios.append(quotients)
        ms = [words.number(r["median_ms"]) if r else words.NONE for r in found.values()]
        for n, r in enumerate((found["best"], found["torch"])):
            if r and r["contender"] != "torch":
                ms[n] += f" ({r['contender'].removeprefix('torch, ')})"
        rows.append([words.shape(records[0]), *ms, *map(words.times, quotients)])
    # A mean over some of the shapes would not compare with one over all.
    means = [timing.geometric_mean(list(column)) if all(column) else None for column in zip(*ratios, strict=True)]
    rows.append(["geometric mean", *[""] * (len(HEAD) - 1 - len(PEERS)), *map(words.times, means)])
    records = [r for found in shapes(run, measurement).values() for r in found]
    caption = (
        f"{words.conditions(run, records)}. Ratios are times as fast, medians over rounds of the ratio within a round. "
        f"`scan` and `cpp` are rnncore's backends. {words.place(run)}. {words.NOISE}"
    )
    return "\n\n".join(filter(None, (words.table(HEAD, rows), caption, words.state(run))))
