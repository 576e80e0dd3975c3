"""The tables of the benchmarks that keep one JSON object: migration, analysis, retention."""

from __future__ import annotations

from typing import Any

from benchmarks.report.words import NOISE, mebibytes, table
from rnncore._command import timing


def migration(result: dict[str, Any]) -> str:
    """One row for each layer and shape, before and after the change of the import."""
    rows = []
    pairs = list(zip(result["records"][::2], result["records"][1::2], strict=True))
    for before, after in pairs:
        if (before["side"], after["side"]) != ("flax", "rnncore") or before["layer"] != after["layer"]:
            raise ValueError(f"records out of order at {before['layer']}, {before['shape_BTDH']}")
        cells = [f"`{before['layer']}`", str(tuple(before["shape_BTDH"]))]
        cells += [f"{r['median_ms']:.3g}" for r in (before, after)] + [f"{after['speed_against_flax']:.2f}"]
        cells += [mebibytes(r["temporary_bytes"]) for r in (before, after)]
        cells += [f"{r['compile_seconds']:.2f}" for r in (before, after)]
        cells += [f"{r['relative_error']:.0e}" for r in (before, after)]
        rows.append(cells)
    mean = timing.geometric_mean([after["speed_against_flax"] for _, after in pairs])
    rows.append(["geometric mean", "", "", "", f"{mean:.2f}", *[""] * 6])
    head = ("layer", "(B, T, D, H)", "ms before", "after", "times as fast", "MiB before", "after", "compile s before",
            "after", "error before", "after")  # fmt: skip
    furthest = max(after["largest_relative_difference"] for _, after in pairs)
    return (
        f"{table(head, rows)}\n\n"
        f"A gradient step of a mean of squares in float32. {run_of(result)}. MiB: temporary memory of the compiled "
        "step. Error: of the loss and all gradients against Flax in float64, the largest of any array in terms of its "
        f"norm; before and after differ by at most {furthest:.0e} of the largest number in an array. {NOISE}"
    )


def analysis(result: dict[str, Any]) -> str:
    """One row for each measurement of the analysis."""
    records = result["records"]
    rows = []
    for record in (r for r in records if "contender" in r and r["contender"] != "vmap(jacrev)"):
        batch, steps, _, hidden = record["shape_BTDH"]
        rows.append(
            (f"{record['part']}, LSTM, B={batch}, T={steps}, H={hidden}: `{record['contender']}`",
             f"{record['median_ms']:.3g} ms", f"{record['speed_against_jacrev']:.3g} times as fast as `vmap(jacrev)`")
        )  # fmt: skip
    for record in (r for r in records if r["part"] == "retention"):
        batch, steps, _, hidden = record["shape_BTDH"]
        spent = ", ".join(f"{s:.2f} s at T={t}" for t, s in record["compile_seconds_by_T"].items())
        rows.append(
            (f"five retention curves of {record['lags']} lags, LSTM, B={batch}, T={steps}, H={hidden}",
             f"{record['median_seconds']:.3g} s", f"compilation {spent}")
        )  # fmt: skip
    for record in (r for r in records if r["part"] == "lyapunov"):
        used, explicit = (mebibytes(record[n]) for n in ("temporary_bytes", "bytes_of_all_U_sized_jacobians"))
        rows.append(
            (f"{record['exponents']} leading Lyapunov exponents, {record['cell']}, T={record['steps']}, "
             f"H={record['hidden']}", f"{record['seconds']:.3g} s", f"{used} MiB; T matrices of H x H: {explicit} MiB")
        )  # fmt: skip
    for record in (r for r in records if r["part"] == "monitor"):
        batch, steps, hidden = record["shape_BTH"]
        rows.append(
            (f"one record of the monitor, {record['layers']} LSTM layers, B={batch}, T={steps}, H={hidden}",
             f"{record['record_seconds']:.2g} s", f"{100 * record['share_of_100_steps']:.1f} % of 100 training steps")
        )  # fmt: skip
    return f"{table(('what', 'time', 'beside'), rows)}\n\n{run_of(result)}. {NOISE}"


def retention(result: dict[str, Any]) -> str:
    """One row for each cell and initialisation."""
    rows = []
    for r in result["records"]:
        kept = ["-inf" if v is None else f"{v:.1f}" for v in r["log10_retention"].values()]
        rate = "-" if r["decay_rate"] is None else f"{r['decay_rate']:.3f}"
        rows.append((r["cell"], r["initialisation"], *kept, rate, f"{r['seconds']:.3g}"))
    first = result["records"][0]
    batch, steps, features, hidden = first["shape_BTDH"]
    head = ("cell", "initialisation", *(f"k = {k}" for k in first["log10_retention"]), "decay rate", "seconds")
    machine = result["machine"]
    return (
        f"{table(head, rows)}\n\n"
        f"log10 of ||d s_T / d s_(T-k)||_F / sqrt n of the whole carry, the mean over a batch of its logarithm, and "
        f"minus the slope of ln retention per step over the last four fifths of the lags: medians of {first['draws']} "
        f"draws. Seconds: their curves of 100 lags together, exact. B={batch}, T={steps}, D={features}, H={hidden}, "
        f"float32, {machine['device']}, JAX {machine['jax']}; commit {machine['commit']}, {result['started'][:10]}. "
        f"{NOISE}"
    )


def run_of(result: dict[str, Any]) -> str:
    """Where such a result was measured."""
    machine = result["machine"]
    return (
        f"Medians of one interleaved run on {machine['cores']} cores of {machine['device'].split('(')[1].rstrip(')')}, "
        f"JAX {machine['jax']}, Flax {machine['flax']}; commit {machine['commit']}, {result['started'][:10]}"
    )
