"""Writes the tables of the documents from the results of the benchmarks: no number is typed by hand.

python -m benchmarks.table benchmarks/results/lstm_against_flax_cpu_jax0.10.json    to README.md
python -m benchmarks.table benchmarks/results/migration_cpu.json                    to docs/migration.md
python -m benchmarks.table benchmarks/results/analysis_cpu.json                     to README.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import timing

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- end of table -->"


def lstm_against_flax(result: dict[str, Any]) -> str:
    """One row for each shape: Flax, and both modes of differentiation."""
    rows = ["| (B, T, D, H) | flax.linen ms | `any` ms | times as fast | `reverse` ms | times as fast |"]
    rows.append("|---|---|---|---|---|---|")
    shapes: dict[tuple, dict] = {}
    for record in result["records"]:
        shapes.setdefault(tuple(record["shape_BTDH"]), {})[record["contender"]] = record
    for shape, by in shapes.items():
        cells = [str(shape), f"{by['flax']['median_ms']:.1f}"]
        for mode in ("any", "reverse"):
            cells += [f"{by[mode]['median_ms']:.1f}", f"{by[mode]['speed_against_flax']:.2f}"]
        rows.append("| " + " | ".join(cells) + " |")
    means = [
        timing.geometric_mean([by[mode]["speed_against_flax"] for by in shapes.values()]) for mode in ("any", "reverse")
    ]
    rows.append(f"| geometric mean | | | {means[0]:.2f} | | {means[1]:.2f} |")
    rows.append("")
    rows.append(f"{_run(result)}; `any` and `reverse` are rnncore's modes of differentiation. {NOISE}")
    return "\n".join(rows)


def migration(result: dict[str, Any]) -> str:
    """One row for each layer and shape, before and after the change of the import."""
    rows = [
        "| layer | (B, T, D, H) | ms before | after | times as fast | MiB before | after | compile s before | after "
        "| error before | after |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    pairs = list(zip(result["records"][::2], result["records"][1::2], strict=True))
    for before, after in pairs:
        if (before["side"], after["side"]) != ("flax", "rnncore") or before["layer"] != after["layer"]:
            raise ValueError(f"records out of order at {before['layer']}, {before['shape_BTDH']}")
        cells = [f"`{before['layer']}`", str(tuple(before["shape_BTDH"]))]
        cells += [f"{r['median_ms']:.3g}" for r in (before, after)] + [f"{after['speed_against_flax']:.2f}"]
        cells += [_mebibytes(r["temporary_bytes"]) for r in (before, after)]
        cells += [f"{r['compile_seconds']:.2f}" for r in (before, after)]
        cells += [f"{r['relative_error']:.0e}" for r in (before, after)]
        rows.append("| " + " | ".join(cells) + " |")
    mean = timing.geometric_mean([after["speed_against_flax"] for _, after in pairs])
    rows.append(f"| geometric mean | | | | {mean:.2f} | | | | | | |")
    rows.append("")
    furthest = max(after["largest_relative_difference"] for _, after in pairs)
    rows.append(
        f"A gradient step of a mean of squares in float32. {_run(result)}. MiB: temporary memory of the compiled step. "
        "Error: of the loss and all gradients against Flax in float64, the largest of any array in terms of its norm; "
        f"before and after differ by at most {furthest:.0e} of the largest number in an array. {NOISE}"
    )
    return "\n".join(rows)


def analysis(result: dict[str, Any]) -> str:
    """One row for each measurement of the analysis."""
    records = result["records"]
    rows = ["| what | time | beside |", "|---|---|---|"]
    for record in (r for r in records if "contender" in r and r["contender"] != "vmap(jacrev)"):
        batch, steps, _, hidden = record["shape_BTDH"]
        rows.append(
            f"| {record['part']}, LSTM, B={batch}, T={steps}, H={hidden}: `{record['contender']}` "
            f"| {record['median_ms']:.3g} ms | {record['speed_against_jacrev']:.3g} times as fast as `vmap(jacrev)` |"
        )
    for record in (r for r in records if r["part"] == "retention"):
        batch, steps, _, hidden = record["shape_BTDH"]
        spent = ", ".join(f"{s:.2f} s at T={t}" for t, s in record["compile_seconds_by_T"].items())
        rows.append(
            f"| five retention curves of {record['lags']} lags, LSTM, B={batch}, T={steps}, H={hidden} "
            f"| {record['median_seconds']:.3g} s | compilation {spent} |"
        )
    for record in (r for r in records if r["part"] == "lyapunov"):
        used, explicit = (_mebibytes(record[n]) for n in ("temporary_bytes", "bytes_of_all_U_sized_jacobians"))
        rows.append(
            f"| {record['exponents']} leading Lyapunov exponents, {record['cell']}, T={record['steps']}, "
            f"H={record['hidden']} | {record['seconds']:.3g} s | {used} MiB; T matrices of H x H: {explicit} MiB |"
        )
    for record in (r for r in records if r["part"] == "monitor"):
        batch, steps, hidden = record["shape_BTH"]
        rows.append(
            f"| one record of the monitor, {record['layers']} LSTM layers, B={batch}, T={steps}, H={hidden} "
            f"| {record['record_seconds']:.2g} s | {100 * record['share_of_100_steps']:.1f} % of 100 training steps |"
        )
    rows += ["", f"{_run(result)}. {NOISE}"]
    return "\n".join(rows)


NOISE = "The machine is shared: read differences below 5 % as nothing."
# By the name in the result: the name in the document's marker, the document, what writes the table.
TABLES: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "lstm_against_flax": ("benchmarks", "README.md", lstm_against_flax),
    "migration": ("migration", "docs/migration.md", migration),
    "analysis": ("analysis", "README.md", analysis),
}


def _run(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"Medians of one interleaved run on {machine['cores']} cores of {machine['device'].split('(')[1].rstrip(')')}, "
        f"JAX {machine['jax']}, Flax {machine['flax']}"
    )


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}" if size > 2**30 else f"{size / 2**20:.3g}"


def put(text: str, marker: str, table: str) -> str:
    """The text with the table in place of what stands between its markers.

    Raises:
      ValueError: the markers are not there.
    """
    begin = f"<!-- table: {marker} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"expected the lines {begin} and {END} where the table is to stand")
    return f"{before}{begin}\n{table}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """Replaces the tables in their documents."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that the benchmarks wrote")
    for path in parser.parse_args(argv).results:
        result = json.loads(path.read_text())
        # Results of the first benchmark do not name it.
        marker, document, table = TABLES[result.get("benchmark", "lstm_against_flax")]
        try:
            text = (ROOT / document).read_text()
            (ROOT / document).write_text(put(text, marker, table(result)))
        except (OSError, ValueError) as error:
            parser.error(f"{document}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
