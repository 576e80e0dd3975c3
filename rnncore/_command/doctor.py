"""Shows versions, devices, compiler, cache and backends, and what is slow on this machine and how to fix it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import rnncore
from rnncore._command import timing
from rnncore.kernels import cache, compiler
from rnncore.kernels.cpp import handlers

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--json", action="store_true", help="the same as a JSON object")


def main(args: argparse.Namespace) -> int:
    """Prints the findings."""
    found = examine()
    print(json.dumps(found, indent=1) if args.json else told(found))
    return 0


def examine() -> dict[str, Any]:
    """Everything that is printed, by its heading."""
    cell = rnncore.LSTM(256)
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), 128))
    choice = rnncore.explain_backend(cell, params, jax.ShapeDtypeStruct((32, 128, 128), jnp.float32))
    command, kept = compiler.find(), cache.directory()
    return {
        "versions": {
            "rnncore": rnncore.__version__, "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "cores": timing.cores(),
        "compiler": " ".join(command) if command else None,
        "cache": {"directory": str(kept) if kept else None, "writable": kept is not None and _writable(kept)},
        "backends": {choice.name: f"chosen: {choice.reason}", **choice.rejected},
        "advice": advice(choice, command, kept),
    }  # fmt: skip


def advice(choice: rnncore.BackendChoice, command: tuple[str, ...] | None, kept: Path | None) -> list[str]:
    """What is slow here, and what to do about it."""
    found = list(choice.faster)
    on = jax.default_backend()
    if on == "cpu" and (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        found.append('there is an NVIDIA GPU, and JAX runs on the CPU: pip install -U "jax[cuda13]"')
    if on == "cpu" and handlers.turned_off():
        found.append("RNNCORE_CPP is set to 0, so the scan runs: unset it for the C++ loop")
    elif on == "cpu" and command is None:
        found.append("no C++ compiler is found, so the scan runs: install g++ or clang++, or name one in CXX")
    elif on == "cpu" and (kept is None or not _writable(kept)):
        found.append(
            "compiled cells cannot be kept, so each process compiles them again: set RNNCORE_CACHE_DIR to a directory "
            "of your own"
        )
    for option in ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs", "jax_check_tracer_leaks"):
        if getattr(jax.config, option, False):
            found.append(f"{option} is on, which slows every step: jax.config.update({option!r}, False)")
    if jax.config.read("jax_enable_x64"):
        found.append("jax_enable_x64 is on: arrays without a dtype are float64, which takes at least twice as long")
    if on == "cpu" and timing.cores() == 1:
        found.append("this process may use one core: widen its affinity or the limits of its container")
    return found


def _writable(directory: Path) -> bool:
    """Whether files can be made in a directory, or the directory itself where there is none."""
    there = next(p for p in (directory, *directory.parents) if p.exists())
    return os.access(there, os.W_OK)


def told(found: dict[str, Any]) -> str:
    """The findings as text."""
    kept = found["cache"]
    lines = [
        "versions   " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        f"devices    {'; '.join(found['devices'])}; {found['cores']} CPU cores",
        f"compiler   {found['compiler'] or 'none'}",
        f"cache      {kept['directory'] or 'none'}{'' if kept['writable'] else ' (not writable)'}",
        "backends   for an LSTM, float32, (B, T, D, H) = (32, 128, 128, 256):",
        *(f"  {name:11} {why}" for name, why in found["backends"].items()),
        "advice" if found["advice"] else "advice     none: the fastest backend for this machine runs",
        *(f"  - {one}" for one in found["advice"]),
    ]
    return "\n".join(lines)
