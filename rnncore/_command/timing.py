"""Shared by all benchmarks: compile, take turns, compare with a float64 run, describe the machine."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

import rnncore


def compile_step(
    step: Any, arguments: tuple, compiler_options: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """(compiled program, its compile_seconds and temporary_bytes) of a jitted function."""
    begin = time.perf_counter()
    compiled = step.lower(*arguments).compile(compiler_options)
    seconds = time.perf_counter() - begin
    analysis = compiled.memory_analysis()
    return compiled, {"compile_seconds": seconds, "temporary_bytes": getattr(analysis, "temp_size_in_bytes", None)}


Wait = Callable[[Any], Any]
"""Returns when the result of a call is computed."""


def repetitions(call: Callable[[], Any], seconds: float, wait: Wait = jax.block_until_ready) -> int:
    """How many calls fill `seconds`; at least one.  The call has to have run before."""
    begin = time.perf_counter()
    wait(call())
    return max(1, math.ceil(seconds / (time.perf_counter() - begin)))


Name = TypeVar("Name", bound=Hashable)


def take_turns(
    calls: Mapping[Name, Callable[[], Any]],
    rounds: int,
    seconds: float,
    *,
    waits: Mapping[Name, Wait] | None = None,
    turns: dict[Name, dict[str, Any]] | None = None,
    deadline: float = math.inf,
    after_round: Callable[[int], Any] = lambda number: None,
) -> dict[Name, dict[str, Any]]:
    """Runs all in turn, A B C A B C: {name: calls_a_round and ms, one time of a call for each round}.

    Args:
      calls: all have run before.
      seconds: of one turn, roughly.
      waits: by name, for what is not a JAX program.
      turns: filled as the rounds go, so that an interruption leaves the rounds that all have run.
      deadline: of `time.monotonic`; no round but the first begins after it.
      after_round: called with the number of a round, from 0, when all have taken their turn.
    """  # fmt: skip
    waits, turns = waits or {}, {} if turns is None else turns
    for name, call in calls.items():
        count = repetitions(call, seconds, waits.get(name, jax.block_until_ready))
        turns[name] = {"calls_a_round": count, "ms": []}
    for done in range(rounds):
        if done and time.monotonic() > deadline:
            break
        spent = {}
        for name, call in calls.items():
            count, wait = turns[name]["calls_a_round"], waits.get(name, jax.block_until_ready)
            begin = time.perf_counter()
            for _ in range(count):
                out = call()
            wait(out)
            spent[name] = (time.perf_counter() - begin) / count * 1e3
        for name, ms in spent.items():
            turns[name]["ms"].append(ms)
        after_round(done)
    return turns


def spread(ms: list[float]) -> dict[str, float]:
    """Median, least and largest time."""
    return {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms)}


def summary(ms: list[float], reference: list[float]) -> dict[str, float]:
    """Median, least and largest time, and the median over rounds of how much faster than the reference."""
    faster = statistics.median(f / m for f, m in zip(reference, ms, strict=True))
    return {**spread(ms), "speed_against_flax": faster}


def relative_error(got: Any, want: Any) -> float:
    """Largest relative Frobenius-norm error over the leaves."""
    return max(
        float(np.linalg.norm(np.asarray(g, np.float64) - np.asarray(w)) / np.linalg.norm(np.asarray(w)))
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    )


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, values)))


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """The machine and the versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    model = names[0] if names else platform.processor()
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind} ({model})",
        "cores": cores(),
        "python": platform.python_version(), "jax": jax.__version__, "flax": importlib.metadata.version("flax"),
        "rnncore": rnncore.__version__, "commit": commit.stdout.strip(), "dtype": "float32",
        "input_product": "included",
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Writes the JSON file, if there is a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
