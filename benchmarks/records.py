"""The lines that a run leaves behind, and the table that it shows meanwhile."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.peers import PEERS, Case
from rnncore._command import timing

RESULTS = Path(__file__).resolve().parent / "results"
# Above these a result is a wrong answer, by the kind of arithmetic; rounding alone stays far below.
LARGEST_ERROR = {"float32": 1e-3, "tf32": 0.1, "default": 0.1, "float16": 0.1, "bfloat16": 0.5}


class Writer:
    """Appends JSON lines to a file, each written out as soon as it is there."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.run = path, uuid.uuid4().hex[:12]
        # A run that was killed may have left half a line.
        cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("a")
        if cut:
            self._file.write("\n")

    def __call__(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Writes a record of a kind and returns it."""
        record = {"record": kind, "run": self.run, **fields}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        return record

    def close(self) -> None:
        self._file.close()


def asked(argv: Sequence[str] | None) -> list[str]:
    """The options of a run without --out and its path, which say something of a machine and not of the run."""
    given = iter(sys.argv[1:] if argv is None else argv)
    return [a for a in given if not (a == "--out" and [next(given, None)]) and not a.startswith("--out=")]


def now() -> str:
    """Date and time, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def versions() -> dict[str, str | None]:
    """Of JAX and of every contender's package; None for what is not installed."""
    found: dict[str, str | None] = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    return found | {peer.module: peer.version() for peer in PEERS}


def machine() -> dict[str, Any]:
    """What ran; dtype and the like stand in every record."""
    told = {k: v for k, v in timing.machine().items() if k not in ("dtype", "input_product")}
    return told | {"platform": jax.default_backend(), "versions": versions()}


def folder(record: bool) -> Path:
    """Where a file of no name goes: where the command was called, or with --record among the project's own results."""
    return RESULTS if record else Path.cwd()


def default_path(tag: str, record: bool) -> Path:
    """<tag>_<device>_jax<major.minor>.jsonl"""
    kind = jax.devices()[0].device_kind
    # A CPU calls itself "cpu"; the processor's name is in brackets in what the machine is called.
    name = timing.machine()["device"].partition("(")[2].rstrip(")") if kind.lower() == "cpu" else kind
    words = re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)", "", name.lower()))
    slug = "-".join(word for word in words[:6] if word not in ("cpu", "processor")) or "cpu"
    return folder(record) / f"{tag}_{slug}_jax{'.'.join(jax.__version__.split('.')[:2])}.jsonl"


def case_fields(case: Case) -> dict[str, Any]:
    """What of a record says which case it belongs to."""
    w = case.workload
    return {
        "workload": w.name, "cell": w.cell, "recurrence": w.recurrence, "B": w.batch, "T": w.steps, "D": w.features,
        "H": w.hidden, "heads": w.heads, "layers": w.layers, "dtype": case.dtype, "matmul_precision": case.precision,
        "input_product": case.input_product,
    }  # fmt: skip


def wrong_answer(error: float, case: Case) -> str | None:
    """Why a time may not be quoted, or None: its answer is too far from the reference."""
    kind = case.dtype if case.dtype in LARGEST_ERROR and case.dtype != "float32" else case.precision
    if math.isfinite(error) and error <= LARGEST_ERROR[kind]:
        return None
    return f"a wrong answer: relative error {error:.1e} against float64, at most {LARGEST_ERROR[kind]:.0e} is rounding"


def summary(times: Iterable[dict[str, Any]], bounds: Iterable[dict[str, Any]]) -> str:
    """Contenders and bounds of a case, for the terminal."""
    lines = [f"{'':28} {'':13} {'median ms':>10} {'us/step':>9} {'of best peer':>12} {'error':>8}"]
    times = list(times)
    for measurement in dict.fromkeys(r["measurement"] for r in times):
        rows = sorted((r for r in times if r["measurement"] == measurement), key=lambda r: r["median_ms"])
        best = min((r["median_ms"] for r in rows if r["library"] != "rnncore"), default=None)
        for r in rows:
            speed = f"{best / r['median_ms']:.2f} x" if best else "-"
            lines.append(
                f"{r['contender']:28} {measurement:13} {r['median_ms']:10.4g} {r['us_per_step']:9.4g} {speed:>12} "
                f"{r['relative_error']:8.1e}"
            )
        for r in bounds:
            if r["measurement"] == measurement:
                rate = f"{r['gigaflops']:.4g} GF/s" if r.get("gigaflops") else ""
                step = r["median_ms"] * 1e3 / rows[0]["T"]
                name = f"({r['bound']})"
                lines.append(f"{name:28} {measurement:13} {r['median_ms']:10.4g} {step:9.4g} {rate:>12}")
    return "\n".join(lines)
