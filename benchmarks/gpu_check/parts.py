"""Parts in processes of their own: what is installed, the scan's loop as a CUDA graph, what a step launches."""

from __future__ import annotations

import importlib
import re
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import lib  # no public route exists

import rnncore
from benchmarks.gpu_check.problems import distance
from benchmarks.gpu_check.processes import folder, tell
from rnncore import gpu

QUERY = ("name", "driver_version", "memory.total", "memory.used", "clocks.sm")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
"""Operations that launch nothing."""
PROGRAMS = "programs.txt"
MODULES = ("torch", "flax", "haiku", "equinox", "flashrnn", "triton", "optax")


def environment(dry: bool) -> None:
    """The GPU, its driver, and versions."""
    del dry
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
        smi = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as failure:
        smi = str(failure)
    device = jax.devices()[0]
    product = jnp.ones((64, 64)) @ jnp.ones((64, 64))
    told: dict[str, Any] = {
        "smi": smi, "jax": jax.__version__, "platform": jax.default_backend(), "device": device.device_kind,
        "capability": str(getattr(device, "compute_capability", None)),
        "processors": getattr(device, "core_count", None), "toolkit": str(lib.cuda_path),
        "works": float(product[0, 0]) == 64,
    }  # fmt: skip
    tell("environment", **told)
    versions = {}
    for name in MODULES:
        try:
            versions[name] = getattr(importlib.import_module(name), "__version__", "there")
        except Exception as failure:  # a broken installation is a result
            versions[name] = f"{type(failure).__name__}: {str(failure)[:150]}"
    tell("versions", **versions)


def graph(dry: bool) -> None:
    """The scan as a CUDA graph: the numbers of the plain loop at the first, the second and every later call.

    A WHILE command buffer may abort the process at its second execution (openxla/xla, pull request 35760).
    """
    steps, hidden = (9, 16) if dry else (256, 256)
    cell = rnncore.LSTM(hidden)
    params = cell.init(jax.random.key(0), hidden, jnp.bfloat16)
    xs = jax.random.normal(jax.random.key(1), (16, steps, hidden), jnp.bfloat16)

    def loss(params: Any, xs: Any) -> Any:
        ys = rnncore.unroll(cell, params, xs, backend="scan")[1]
        return jnp.sum(ys.astype(jnp.float32) ** 2)

    def numbers(step: Any) -> list:
        return [np.asarray(a.astype(jnp.float32), np.float64) for a in jax.tree.leaves(step(params, xs))]

    options = gpu.loop_as_graph_options()
    want = numbers(jax.jit(jax.value_and_grad(loss)))
    step, errors = jax.jit(jax.value_and_grad(loss), compiler_options=options or None), []
    for call in range(5):
        errors.append(max(distance(a, b) for a, b in zip(numbers(step), want, strict=True)))
        print("call", call, errors[-1], flush=True)
    begin = time.perf_counter()
    jax.block_until_ready([step(params, xs) for _ in range(5)])
    ms = (time.perf_counter() - begin) * 200
    tell("graph", calls=len(errors), errors=errors, right=max(errors) < 1e-2, ms=round(ms, 3), options=options)


def programs(dry: bool) -> None:
    """What XLA makes of the scan on this GPU: whether it knows how often a loop runs, and what a step launches."""
    steps, hidden = (9, 16) if dry else (1024, 768)
    cell = rnncore.LSTM(hidden)
    params = cell.init(jax.random.key(0), hidden, jnp.bfloat16)
    xs = jnp.ones((16, steps, hidden), jnp.bfloat16)

    def outputs(params: Any, xs: Any) -> Any:
        return rnncore.unroll(cell, params, xs, backend="scan")[1]

    def gradient(params: Any, xs: Any) -> Any:
        return jax.grad(lambda *a: jnp.sum(outputs(*a).astype(jnp.float32) ** 2), (0, 1))(params, xs)

    for name, run in (("forward", outputs), ("gradient", gradient)):
        text = jax.jit(run).lower(params, xs).compile().as_text() or ""
        with (folder() / PROGRAMS).open("a") as file:
            file.write(f"===== {name}\n{text}\n")
        tell("programs", name=name, loops=loops(text))


def loops(text: str) -> list[dict[str, Any]]:
    """For each loop of a compiled program: its trip count where XLA knows it, and the operations of a step by kind."""
    bodies: dict[str, dict[str, int]] = {}
    name = ""
    for line in text.splitlines():
        if (head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)) is not None:
            name = head[1]
        elif (operation := re.search(r" = .*?[\])}] ([a-z\-]+)\(", line)) is not None and operation[1] not in FREE:
            kinds = bodies.setdefault(name, {})
            kinds[operation[1]] = kinds.get(operation[1], 0) + 1
    found = []
    for line in text.splitlines():
        if (loop := re.search(r" while\(.*body=%?([\w.\-]+)", line)) is not None:
            trips = re.search(r"known_trip_count[^0-9]*([0-9]+)", line)
            found.append({"steps": int(trips[1]) if trips else None, "operations": bodies.get(loop[1], {})})
    return found
