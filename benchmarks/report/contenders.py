"""The whole tables: a row for every contender of every workload, and in columns of their own what others published."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report import words
from benchmarks.report.results import Record, Results, Run, groups
from benchmarks.workloads import MEASUREMENTS, WORKLOADS, Published

# Contenders that agree in these are compared; what differs within a run gets a column.
ALIKE = ("dtype", "matmul_precision", "input_product")
TITLES = {"dtype": "dtype", "matmul_precision": "precision", "input_product": "input product"}
NEAR = tuple(f"{m} {what}" for m in MEASUREMENTS for what in ("ms: median [least..largest]", "times the best peer"))


def table(results: Results, tag: str) -> str | None:
    """All workloads of the runs of a tag that count, one after the other; None where there are none."""
    return "\n\n".join(section(run) for run in results.chosen("time", tag=tag)) or None


def section(run: Run) -> str:
    """One run: a table for each workload, then what holds for all."""
    records = [r for r in run.of("time") if r["measurement"] in MEASUREMENTS]
    told = [f"**JAX {run.machine['jax']}, {run.machine['device']}**"]
    for (name,), found in groups(records, "workload").items():
        told += [words.title(found[0]), workload(run, found, WORKLOADS[name].published if name in WORKLOADS else ())]
    told.append(
        f"{words.conditions(run, records)}. Times the best peer: the median over rounds of how many times as fast as "
        "the fastest that is not rnncore, in the same dtype and precision and with the same products inside. Error: "
        "against float64, the largest of forward and gradient. Published numbers are those of their authors on their "
        f"machines; none of them was measured here. {words.place(run)}. {words.NOISE}"
    )
    told += [words.state(run), words.missing(run, records)]
    return "\n\n".join(filter(None, told))


def workload(run: Run, records: Sequence[Record], published: Sequence[Published]) -> str:
    """Contenders by dtype and input product, the fastest gradient first; then bounds; then what was only published."""
    bounds = [dict.fromkeys(ALIKE) | r for r in run.of("bound", workload=records[0]["workload"])]
    extra = [f for f in TITLES if len({r[f] for r in records}) > 1]
    head = ["contender", *(TITLES[f] for f in extra), *NEAR, "error", "algorithm"]
    head += ["published forward ms", "published gradient ms", "by whom"] if published else []
    left, rows = list(published), []
    for (dtype, _, product), alike in groups(records, *ALIKE).items():
        best = {m: words.fastest(r for r in alike if words.is_peer(r) and r["measurement"] == m) for m in MEASUREMENTS}
        ordered = sorted(groups(alike, "contender").items(), key=lambda own: max(r["median_ms"] for r in own[1]))
        for (contender,), found in ordered:
            by = {r["measurement"]: r for r in found}
            cells = [contender, *(words.shown(found[0][f]) for f in extra)]
            for m in MEASUREMENTS:
                cells += measured(by.get(m), best[m])
            algorithms = {r["algorithm"] for r in found} - {None}
            cells += [words.error(max(r["relative_error"] for r in found)), ", ".join(sorted(algorithms)) or words.NONE]
            same = [p for p in left if (p.contender, p.dtype, p.input_product) == (contender, dtype, product)]
            left = [p for p in left if p not in same]
            rows.append(cells + (theirs(same) if published else []))
    for found in groups(bounds, "bound", *ALIKE).values():
        by = {r["measurement"]: r for r in found if r["measurement"] in MEASUREMENTS}
        cells = [f"*the {found[0]['bound']} alone, by XLA*", *(words.shown(found[0][f]) for f in extra)]
        for m in MEASUREMENTS:
            cells += [words.spread(by[m]) if m in by else words.NONE, words.NONE]
        rows.append([*cells, words.NONE, words.NONE, *(theirs([]) if published else [])])
    for p in left:
        about = {"dtype": p.dtype, "matmul_precision": words.NONE, "input_product": words.shown(p.input_product)}
        rows.append([p.contender, *(about[f] for f in extra), *[words.NONE] * (len(NEAR) + 2), *theirs([p])])
    return words.table(head, rows)


def measured(record: Record | None, best: Record | None) -> list[str]:
    """Time and ratio of one measurement."""
    if record is None:
        return [words.NONE] * 2
    return [words.spread(record), words.times(words.ratio(best, record) if best else None)]


def theirs(published: Sequence[Published]) -> list[str]:
    """Published times, forward and gradient, and where they are from."""
    told = [", ".join(words.number(getattr(p, name)) for p in published) or words.NONE
            for name in ("forward_ms", "gradient_ms")]  # fmt: skip
    return [*told, "; ".join(f"{p.device}, {p.source}" for p in published) or words.NONE]
