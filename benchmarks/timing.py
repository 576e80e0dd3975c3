"""What every benchmark does alike: compile, take turns, compare with a float64 run, describe the machine."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np

import rnncore


def compile_step(step: Any, arguments: tuple) -> tuple[Any, dict[str, Any]]:
    """(compiled program, its compile_seconds and temporary_bytes) of a jitted function."""
    begin = time.perf_counter()
    compiled = step.lower(*arguments).compile()
    seconds = time.perf_counter() - begin
    analysis = compiled.memory_analysis()
    return compiled, {"compile_seconds": seconds, "temporary_bytes": getattr(analysis, "temp_size_in_bytes", None)}


def repetitions(call: Callable[[], Any], seconds: float) -> int:
    """How many calls fill `seconds`; at least one.  The call has to have run before."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return max(1, math.ceil(seconds / (time.perf_counter() - begin)))


def take_turns(
    calls: dict[str, Callable[[], Any]], rounds: int, seconds: float, tick: Callable[[], Any] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Runs all in turn, A B C A B C: {name: calls_a_round and ms, one time of a call for each round}.

    Args:
      calls: all have run before.
      seconds: of one turn, roughly.
      tick: called after every turn.
    """
    counts = {name: repetitions(call, seconds) for name, call in calls.items()}
    turns: dict[str, dict[str, Any]] = {name: {"calls_a_round": count, "ms": []} for name, count in counts.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(counts[name]):
                out = call()
            jax.block_until_ready(out)
            turns[name]["ms"].append((time.perf_counter() - begin) / counts[name] * 1e3)
            tick()
    return turns


def summary(ms: list[float], reference: list[float]) -> dict[str, float]:
    """Median, least and largest time, and the median over rounds of how much faster than the reference."""
    return {
        "median_ms": statistics.median(ms),
        "min_ms": min(ms),
        "max_ms": max(ms),
        "speed_against_flax": statistics.median(f / m for f, m in zip(reference, ms, strict=True)),
    }


def relative_error(got: Any, want: Any) -> float:
    """Largest relative Frobenius-norm error over the leaves."""
    return max(
        float(np.linalg.norm(np.asarray(g, np.float64) - np.asarray(w)) / np.linalg.norm(np.asarray(w)))
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    )


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, values)))


def machine() -> dict[str, Any]:
    """What ran."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    model = names[0] if names else platform.processor()
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind} ({model})",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__,
        "rnncore": rnncore.__version__, "commit": commit.stdout.strip(), "dtype": "float32",
        "input_product": "included",
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def write(path: Path | None, result: dict[str, Any]) -> None:
    """The JSON file, where one is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
