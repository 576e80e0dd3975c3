"""The tables of memory by policy and of compile time by length."""

from __future__ import annotations

import statistics

from benchmarks.report import words
from benchmarks.report.results import Results, groups


def memory(results: Results) -> str | None:
    """One row for each policy and shape: temporary memory and time, and both in terms of Flax's."""
    told = []
    for run in results.chosen("memory"):
        records = run.of("memory")
        rows = [
            [r["policy"], str(tuple(r["shape_BTDH"])), words.number(r["median_ms"]), words.times(r["times_flax_time"]),
             words.mebibytes(r["temporary_bytes"]), words.times(r["times_flax_memory"])]
            for r in records
        ]  # fmt: skip
        head = ("policy", "(B, T, D, H)", "ms", "of Flax's time", "temporary MiB", "of Flax's memory")
        caption = (
            f"A gradient step of a float32 LSTM layer. Medians of {words.counts(r['ms'] for r in records)} interleaved "
            "rounds; in terms of flax.linen's `RNN(OptimizedLSTMCell)` in the same run. MiB: temporary memory of the "
            f"compiled step, without what `cpp` keeps for its next call. {words.place(run)}. {words.NOISE}"
        )
        told += [words.table(head, rows), caption, words.state(run)]
    return "\n\n".join(filter(None, told)) or None


def compiling(results: Results) -> str | None:
    """One row for each contender: seconds to compile a gradient step by length, and the longest over the shortest."""
    told = []
    for run in results.chosen("compile"):
        by = {key[0]: found for key, found in groups(run.of("compile"), "contender").items()}
        lengths = sorted({r["T"] for found in by.values() for r in found})
        rows = []
        for contender, found in by.items():
            seconds = {r["T"]: r["compile_seconds"] for r in found}
            cells = [spread(seconds[t]) if t in seconds else words.NONE for t in lengths]
            both = lengths[0] in seconds and lengths[-1] in seconds and len(lengths) > 1
            medians = [statistics.median(seconds[t]) for t in (lengths[0], lengths[-1])] if both else []
            rows.append([contender, *cells, words.times(medians[1] / medians[0] if medians else None)])
        head = ["contender", *(f"T = {t}: s" for t in lengths), f"T = {lengths[-1]} / T = {lengths[0]}"]
        shape = next(iter(by.values()))[0].get("shape_BDH")
        size = f" of a float32 LSTM layer, B={shape[0]}, D={shape[1]}, H={shape[2]}" if shape else ""
        caption = (
            f"Seconds to lower and compile a gradient step{size}, median [least..largest] of "
            f"{words.counts(r['compile_seconds'] for found in by.values() for r in found)}. "
            f"Those of the C++ compiler, once for a cell, are not among `cpp`'s. {words.place(run)}."
        )
        told += [words.table(head, rows), caption, words.state(run)]
    return "\n\n".join(filter(None, told)) or None


def spread(seconds: list[float]) -> str:
    """Median, least and largest."""
    middle, low, high = (f"{x:.2f}" for x in (statistics.median(seconds), min(seconds), max(seconds)))
    return f"{middle} [{low}..{high}]"
