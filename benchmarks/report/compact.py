"""The short tables of the CPU: one row a shape, rnncore beside the best JAX peer, torch and the products alone."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.report import words
from benchmarks.report.results import Record, Results, Run, groups
from rnncore._command import timing

OURS = {"scan": ("rnncore scan", "rnncore reverse"), "cpp": ("rnncore cpp",)}
"""By the names that they have had."""
PAIRS = (("best", "scan"), ("best", "cpp"), ("torch", "scan"), ("torch", "cpp"))
RATIOS = tuple(f"{'best JAX' if slow == 'best' else slow} / {fast}" for slow, fast in PAIRS)
HEAD = (
    "(B, T, D, H)", "best JAX peer", "its ms", "torch ms", *(f"`{name}` ms" for name in OURS), *RATIOS,
    "products alone ms", "fastest of ours / products",
)  # fmt: skip


def shapes(run: Run, measurement: str) -> dict[str, list[Record]]:
    """The records of the shapes S1, S2, ... in float32 with the input product inside, by workload in their order."""
    chosen = run.of("time", measurement=measurement, dtype="float32", input_product=True)
    found = groups((r for r in chosen if re.fullmatch(r"S\d+", r["workload"])), "workload")
    return {key[0]: found[key] for key in sorted(found, key=lambda key: int(key[0][1:]))}


def run_of(results: Results, measurement: str) -> Run | None:
    """Of the runs that count, one for each device and JAX, that with the most contenders, then the newest."""
    runs = [run for run in results.chosen("time", tag="cpu", measurement=measurement) if shapes(run, measurement)]
    return max(runs, key=lambda run: len({r["contender"] for r in run.of("time")}), default=None)


def parts(run: Run, records: list[Record], measurement: str) -> dict[str, Any]:
    """Who stands in a row: best, torch, those of OURS, products; None for what was not measured."""
    by = {r["contender"]: r for r in records}
    bounds = run.of("bound", workload=records[0]["workload"], bound="products", measurement=measurement)
    return {
        "best": words.fastest(r for r in records if words.is_jax_peer(r)),
        "torch": words.fastest(r for r in records if r["library"] == "torch"),
        **{name: next((by[n] for n in names if n in by), None) for name, names in OURS.items()},
        "products": words.fastest(r for r in bounds if r["dtype"] == "float32"),
    }  # fmt: skip


def cpu(results: Results, measurement: str) -> str | None:
    """The table of a measurement; None where the shapes were not measured."""
    run = run_of(results, measurement)
    if run is None:
        return None
    rows, ratios = [], []
    for records in shapes(run, measurement).values():
        p = parts(run, records, measurement)
        quotients = [words.ratio(p[slow], p[fast]) if p[slow] and p[fast] else None for slow, fast in PAIRS]
        ours = words.fastest(p[name] for name in OURS if p[name])
        above = words.ratio(ours, p["products"]) if ours and p["products"] else None
        ratios.append([*quotients, above])
        name = p["best"]["contender"] if p["best"] else words.NONE
        ms = [words.number(p[who] and p[who]["median_ms"]) for who in ("best", "torch", *OURS, "products")]
        if p["torch"] and p["torch"]["contender"] != "torch":
            ms[1] += f" ({p['torch']['contender'].removeprefix('torch, ')})"
        title = f"{records[0]['workload']} {words.shape(records[0])}"
        rows.append([title, name, *ms[:-1], *map(words.times, quotients), ms[-1], words.times(above)])
    # A mean over some of the shapes would not compare with one over all.
    means = [timing.geometric_mean(list(column)) if all(column) else None for column in zip(*ratios, strict=True)]
    blank = [""] * (3 + len(OURS))
    rows.append(["geometric mean", *blank, *map(words.times, means[:-1]), "", words.times(means[-1])])
    return words.table(HEAD, rows) + "\n\n" + caption(run, measurement)


def caption(run: Run, measurement: str) -> str:
    """What was measured where, and who is missing."""
    records = [r for found in shapes(run, measurement).values() for r in found]
    told = [
        f"{words.conditions(run, records)}. Ratios are times as fast, medians over rounds of the ratio within a round. "
        "`scan` and `cpp` are rnncore's backends; "
        "products alone: the matrix products of the step, by XLA, with no loop around them. "
        f"{words.place(run)}. {words.NOISE}",
        words.state(run),
        words.missing(run, records),
    ]
    return "\n\n".join(filter(None, told))
