"""The whole tables of the CPU: one row for every contender at every workload, with the bounds."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report import words
from benchmarks.report.results import Record, Results, Run, groups

HEAD = (
    "contender", "ms: median [least..largest]", "us a step", "times as fast as the best peer", "compile s",
    "temporary MiB", "error",
)  # fmt: skip
# Contenders that agree in these are compared; what differs within a run gets a column.
ALIKE = ("dtype", "matmul_precision", "input_product")
TITLES = {"dtype": "dtype", "matmul_precision": "precision", "input_product": "input product", "algorithm": "algorithm"}
MEASURES = {
    "forward": "outputs only",
    "gradient": "the outputs' product with a cotangent, and its gradients in terms of all parameters and of the inputs",
    "training_step": "one step of Adam on the mean squared distance of the outputs from a target",
}


def cpu(results: Results, measurement: str) -> str | None:
    """All workloads of the runs that count, one after the other; None where there are none."""
    runs = results.chosen("time", tag="cpu", measurement=measurement)
    return "\n\n".join(section(run, measurement) for run in runs) or None


def section(run: Run, measurement: str) -> str:
    """One run: a table for each workload, then what holds for all."""
    records = run.of("time", measurement=measurement)
    extra = [field for field in TITLES if len({r[field] for r in records}) > 1]
    told = [f"**JAX {run.machine['jax']}, {run.machine['device']}**"]
    for found in groups(records, "workload").values():
        told += [words.title(found[0]), workload(run, measurement, found, extra)]
    told.append(
        f"{measurement}: {MEASURES.get(measurement, measurement)}. {words.conditions(run, records)}. Times as fast: "
        "the median over rounds of the ratio within a round to the fastest that is not rnncore. MiB: temporary memory "
        "of the compiled program. Error: against float64, the largest of any array in terms of its norm. "
        f"{words.place(run)}. {words.NOISE}"
    )
    told += [words.equations(records), bandwidths(run), words.state(run), words.missing(run, records)]
    return "\n\n".join(filter(None, told))


def workload(run: Run, measurement: str, records: Sequence[Record], extra: Sequence[str]) -> str:
    """The table of one workload, with a column for every extra field."""
    rows: list[list[str]] = []
    for _, alike in groups(records, *ALIKE).items():
        best = words.fastest(r for r in alike if words.is_peer(r))
        for r in sorted(alike, key=lambda r: r["median_ms"]):
            faster = words.times(words.ratio(best, r) if best else None)
            cells = [r["contender"], words.spread(r), words.number(r["us_per_step"]), faster]
            cells += [words.number(r["compile_seconds"]), words.mebibytes(r["temporary_bytes"]),
                      words.error(r["relative_error"])]  # fmt: skip
            rows.append(cells + [words.shown(r[field]) for field in extra])
    for r in run.of("bound", workload=records[0]["workload"], measurement=measurement):
        step = words.number(r["median_ms"] * 1e3 / records[0]["T"])
        cells = [f"*bound: {r['bound']}*", words.spread(r), step, *[words.NONE] * 4]
        rows.append(cells + [words.shown(r.get(field)) for field in extra])
    return words.table([*HEAD, *(TITLES[field] for field in extra)], rows)


def bandwidths(run: Run) -> str:
    """The bounds that belong to no workload."""
    told = []
    for r in run.of("bound", workload=None):
        figures = [f"{words.number(r[f])} {unit}" for f, unit in UNITS.items() if r.get(f) is not None]
        told.append(f"{r['bound']} ({r['dtype']}): {', '.join(figures) or words.number(r['median_ms']) + ' ms'}")
    return f"Bounds of the machine: {'; '.join(told)}." if told else ""


UNITS = {"gigaflops": "GFLOP/s", "gigabytes_per_second": "GB/s"}
