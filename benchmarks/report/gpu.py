"""The tables of a GPU: what was measured; in columns of their own what others have published and what is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.report import words
from benchmarks.report.results import Record, Results, Run, groups
from benchmarks.report.whole import ALIKE, bandwidths
from benchmarks.workloads import WORKLOADS, Floor, Published

MEASUREMENTS = ("forward", "gradient")
HEAD = (
    "contender", "dtype", "precision", "input product",
    "forward ms: median [least..largest]", "us a step", "times as fast as the best peer",
    "gradient ms: median [least..largest]", "us a step", "times as fast as the best peer",
    "error", "algorithm", "published or wanted forward ms", "published or wanted gradient ms", "by whom",
)  # fmt: skip


def gpu(results: Results) -> str | None:
    """All workloads of the runs that count, one after the other; None where there are none."""
    runs = results.chosen("time", tag="gpu")
    if not runs:
        return None
    return "\n\n".join(map(section, runs))


def section(run: Run) -> str:
    """One run: a table for each workload, then what holds for all."""
    records = run.of("time")
    told = [f"**JAX {run.machine['jax']}, {run.machine['device']}**"]
    for (name,), found in groups(records, "workload").items():
        known = WORKLOADS.get(name)
        given = (*known.published, *known.wanted) if known else ()
        told += [words.title(found[0]), workload(run, found, given, known.floor if known else None)]
    told.append(
        f"{words.conditions(run, records)}. Times as fast: the median over rounds of the ratio within a round to the "
        "fastest that is not rnncore, in the same dtype and precision and with the same products inside. Error: "
        "against float64, the largest of forward and gradient. Published numbers are those of their authors on their "
        "machines, what is wanted is an aim and a floor an estimate; none of them was measured here. "
        f"{words.place(run)}."
    )
    told += [words.equations(records), training(records), bandwidths(run)]
    told += [words.state(run), words.missing(run, records)]
    return "\n\n".join(filter(None, told))


def workload(run: Run, records: Sequence[Record], published: Sequence[Published], floor: Floor | None = None) -> str:
    """Contenders by dtype and input product; then bounds; then what was only published or is wanted; then the floor."""
    left = list(published)
    rows = []
    for (dtype, precision, product), alike in groups(records, *ALIKE).items():
        best = {m: words.fastest(r for r in alike if words.is_peer(r) and r["measurement"] == m) for m in MEASUREMENTS}
        for (contender,), found in groups(alike, "contender").items():
            by = {r["measurement"]: r for r in found}
            cells = [contender, dtype, precision, words.shown(product)]
            for m in MEASUREMENTS:
                cells += measured(by.get(m), best[m])
            errors = [by[m]["relative_error"] for m in MEASUREMENTS if m in by and by[m]["relative_error"] is not None]
            algorithms = {r["algorithm"] for r in found} - {None}
            cells += [words.error(max(errors, default=None)), ", ".join(sorted(algorithms)) or words.NONE]
            same = [p for p in left if (p.contender, p.dtype, p.input_product) == (contender, dtype, product)]
            left = [p for p in left if p not in same]
            rows.append(cells + theirs(same))
    for found in groups(bounds_of(run, records), "bound", *ALIKE).values():
        by = {r["measurement"]: r for r in found}
        cells = [f"*bound: {found[0]['bound']}*", *(words.shown(found[0][field]) for field in ALIKE)]
        for m in MEASUREMENTS:
            step = words.number(by[m]["median_ms"] * 1e3 / records[0]["T"]) if m in by else words.NONE
            cells += [words.spread(by[m]) if m in by else words.NONE, step, words.NONE]
        rows.append([*cells, words.NONE, words.NONE, *theirs([])])
    for p in left:
        rows.append([p.contender, p.dtype, words.NONE, words.shown(p.input_product), *[words.NONE] * 8, *theirs([p])])
    if floor is not None:
        rows.append(least(floor, records[0]["T"]))
    return words.table(HEAD, rows)


def bounds_of(run: Run, records: Sequence[Record]) -> Iterable[Record]:
    """The bounds of the workload of some records; all that a contender has and a bound may lack is None."""
    return [dict.fromkeys(ALIKE) | r for r in run.of("bound", workload=records[0]["workload"])]


def measured(record: Record | None, best: Record | None) -> list[str]:
    """Time, time a step and ratio of one measurement."""
    if record is None:
        return [words.NONE] * 3
    faster = words.times(words.ratio(best, record) if best else None)
    return [words.spread(record), words.number(record["us_per_step"]), faster]


def theirs(published: Sequence[Published]) -> list[str]:
    """Published times, forward and gradient, and where they are from."""
    told = [", ".join(words.number(getattr(p, name)) for p in published) or words.NONE
            for name in ("forward_ms", "gradient_ms")]  # fmt: skip
    return [*told, "; ".join(f"{p.device}, {p.source}" for p in published) or words.NONE]


def least(floor: Floor, steps: int) -> list[str]:
    """The row of an estimate: milliseconds of all steps, from and to."""
    told = " to ".join(words.number(us * steps / 1e3) for us in (floor.low_us, floor.high_us))
    where = f"{floor.device}, {floor.low_us:g} to {floor.high_us:g} us a step; {floor.source}"
    own = ["*floor, an estimate*", floor.dtype, words.NONE, words.shown(floor.input_product)]
    return [*own, *[words.NONE] * 8, told, words.NONE, where]


def training(records: Sequence[Record]) -> str:
    """Steps of training in a line for each workload; empty where none was measured."""
    lines = []
    steps = [r for r in records if r["measurement"] == "training_step"]
    for (name, dtype, precision, product), found in groups(steps, "workload", *ALIKE).items():
        told = ", ".join(f"`{r['contender']}` {words.spread(r)}" for r in found)
        inside = "" if product else ", without the input product"
        lines.append(f"- `{name}`, {dtype}, precision {precision}{inside}: {told}")
    return "Training steps, ms:\n\n" + "\n".join(lines) if lines else ""
