"""The end of the output, which is read first: a verdict for each backend, checks, and times against torch and Flax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu_check.processes import RECORDS, TIMES, read

Record = dict[str, Any]


def table(out: Path) -> str:
    """Of a run's folder, whole or cut short; the most telling stands last."""
    records = read(out / RECORDS)
    parts = (failures(records), check_lines(records), time_lines(read(out / TIMES)), verdicts(records))
    return "\n".join(line for lines in parts for line in lines)


def failures(records: list[Record]) -> list[str]:
    """What is here, and the parts that failed."""
    lines = []
    for r in records:
        if r["part"] in ("environment", "versions", "graph", "programs") or (r["part"] == "ran" and r.get("failed")):
            lines.append(" ".join(f"{k}={v}" for k, v in r.items() if k not in ("at", "options"))[:300])
    return lines


def check_lines(records: list[Record]) -> list[str]:
    """One for each check."""
    lines = ["", "checks: worst relative error against float64, what is allowed, the same bits again"]
    for r in records:
        if r["part"] != "check":
            continue
        told = str(r.get("needs") or r.get("raised"))[:110]
        if "error" in r:
            told = f"{r['error']:.1e} of {r['limit']:.1e} same={r['same']} {'right' if r['right'] else 'WRONG'}"
        lines.append(f"  {r['backend']:10} {r['kind'][:14]:14} {r['name']:32} {told}")
    return lines


def time_lines(records: list[Record]) -> list[str]:
    """A row for each contender of a case, fastest first, beside torch and Flax."""
    cases: dict[tuple, dict[str, dict[str, Record]]] = {}
    for kind in ("round", "time"):  # a case that was cut short has the first round only
        for r in (r for r in records if r["record"] == kind):
            key = (r["workload"], r["dtype"], r["matmul_precision"], r["input_product"])
            ms = r["ms"] if kind == "round" else r["median_ms"]
            told = {"ms": ms, "error": r["relative_error"], "once": kind == "round"}
            cases.setdefault(key, {}).setdefault(r["contender"], {})[r["measurement"]] = told
    lines = ["", "times, ms: forward, forward and backward (* one round); how many times as fast as torch, as Flax"]
    for (workload, dtype, precision, inside), rows in cases.items():
        arithmetic = "" if precision == "default" else f", {precision}"
        lines.append(f"  {workload} {dtype}{arithmetic}, x W {'inside' if inside else 'given'}")
        for contender, found in sorted(rows.items(), key=lambda row: min(m["ms"] for m in row[1].values())):
            cells = [_cell(found.get(m)) for m in ("forward", "gradient")]
            against = [_against(rows, found, name) for name in ("torch", "flax.linen")]
            error = max(m["error"] for m in found.values())
            lines.append(f"    {contender:30} {' '.join(cells)}  {'  '.join(against)}  error {error:.0e}")
    missing = {(r["contender"], str(r["reason"])[:100]): r["workload"] for r in records if r["record"] == "missing"}
    lines += [f"  missing {who} at {where}: {why}" for (who, why), where in missing.items()]
    return lines


def _cell(found: Record | None) -> str:
    return f"{'-':>10}" if found is None else f"{found['ms']:9.3f}{'*' if found['once'] else ' '}"


def _against(rows: dict[str, dict[str, Record]], found: dict[str, Record], name: str) -> str:
    """How many times as fast as the fastest contender whose name begins so, in both measurements."""
    ratios = []
    for measurement in ("forward", "gradient"):
        others = [r[measurement]["ms"] for who, r in rows.items() if who.startswith(name) and measurement in r]
        mine = found.get(measurement)
        ratios.append(f"{min(others) / mine['ms']:.2f}" if others and mine else "-")
    return f"{name.split('.')[0]} {ratios[0]:>5} {ratios[1]:>5}"


def verdicts(records: list[Record]) -> list[str]:
    """A plain sentence for each backend, and for the loop as a graph."""
    lines = ["", "verdict on this GPU"]
    checks = [r for r in records if r["part"] == "check"]
    for backend in dict.fromkeys(r["backend"] for r in checks):
        lines.append(f"  {backend}: {_verdict([r for r in checks if r['backend'] == backend])}")
    graphs = [r for r in records if r["part"] == "graph"]
    started = any(r["part"] == "ran" and r.get("of") == "graph" for r in records)
    if graphs:
        state = "right at five calls" if graphs[-1]["right"] else "WRONG"
        lines.append(f"  scan's loop as a CUDA graph: {state}, errors {graphs[-1]['errors'][0]:.0e}")
    elif started:
        lines.append("  scan's loop as a CUDA graph: DOES NOT RUN here; leave `loop_as_graph_options` out")
    for r in (r for r in records if r["part"] == "gradients"):
        told = r.get("raised") or (
            f"{r['ms']:.1f} ms, differs from the CPU's by {r['difference']:.1e} {r['unit']}"
            + ("" if r["right"] is None else f" of {r['limit']:.0e} allowed: {'right' if r['right'] else 'WRONG'}")
        )
        lines.append(f"  {r['name']} on {r['platform']} in {r['precision']}: {told}")
    lines += [_sanitized(r) for r in records if r["part"] == "sanitizer"]
    return lines


def _verdict(checks: list[Record]) -> str:
    if all("needs" in r for r in checks):
        return f"not here: {checks[0]['needs'][:200]}"
    words, refused = [], dict[str, list[str]]()
    for kind in dict.fromkeys(r["kind"] for r in checks):
        own = [r for r in checks if r["kind"] == kind]
        tried = [r for r in own if "needs" not in r]
        good = sum(bool(r.get("right")) for r in tried)
        if not tried:
            refused.setdefault(own[0]["needs"], []).append(kind[:40])
        elif good == len(tried):
            words.append(f"{kind}: right ({good} of {good})")
        else:
            words.append(f"{kind}: DO NOT USE ({good} of {len(tried)} right)")
    words += [f"not here: {', '.join(kinds)} ({why[:160]})" for why, kinds in refused.items()]
    return "; ".join(words)


def _sanitized(record: Record) -> str:
    errors = record.get("errors")
    told = record.get("needs") or ("not at its end" if errors is None else f"{errors} errors")
    named = record["first"][0] if errors and record["first"] else ""
    return f"  {record.get('tool')} {record.get('backend')} {record.get('number')}: {told} {named}"
