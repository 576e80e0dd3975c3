"""Every backend with loops of its own against float64 on this GPU: values, all gradients, the same bits again.

One process for a backend.  Programs are compiled side by side and run one after the other; a check that hangs or
aborts costs its process, and the next one goes on behind it, without that kind of kernel.
"""

from __future__ import annotations

import concurrent.futures
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_check.problems import Check, distance, draw, load, pulled, reference_path, save_reference
from benchmarks.gpu_check.processes import Runner, tell, work

BFLOAT16, FLOAT16, FLOAT32 = "bfloat16", "float16", "float32"
MOSAIC = (
    Check("lstm", 64, 2, 8, False, BFLOAT16), Check("lstm", 64, 3, 5, True, BFLOAT16),
    Check("gru", 64, 2, 9, True, FLOAT16),  # a gate with r apart
)  # fmt: skip
LARGER = (
    Check("lstm", 32, 3, 5, True, BFLOAT16), Check("lstm", 128, 1, 16, True, BFLOAT16),
    Check("lstm", 256, 1, 16, False, BFLOAT16), Check("lstm", 768, 1, 16, True, BFLOAT16),
    Check("gru", 512, 1, 16, True, BFLOAT16),
)  # fmt: skip
PLAIN = tuple(
    Check(cell, size, 1, batch, masked, dtype)
    for cell, size, batch, masked in (("lstm", 128, 16, False), ("gru", 96, 7, False), ("lstm", 64, 5, True))
    for dtype in (FLOAT32, FLOAT16, BFLOAT16)
) + (Check("elman", 64, 1, 8, False, FLOAT32), Check("lstm", 768, 1, 16, False, FLOAT16))  # fmt: skip
CHECKS = {"mosaic_gpu": MOSAIC, "cudnn": PLAIN, "cuda": (*PLAIN, *MOSAIC, *LARGER)}
"""By backend; one that this rnncore does not have is left out."""
DRY = {name: tuple(c._replace(steps=3) for c in checks[:2]) for name, checks in CHECKS.items()}
ROUNDING = {BFLOAT16: 2.0**-7, FLOAT16: 2.0**-10, FLOAT32: 1e-5}
"""Errors up to here are rounding; a cell may magnify it: up to 1.3 times the scan's in the same dtype is right too."""
APPROXIMATE = {("cudnn", FLOAT32): 2e-5}
"""cuDNN's persistent kernels of small sizes approximate tanh and sigmoid; PyTorch's results have the same bits."""
AGAIN = 3
HUNG = "hung or aborted"
HANG = "GPU_CHECK_HANG"
"""In the environment: the number of a check that is to hang, to try the driver."""
SHARES = 3
"""Processes for a backend: what is lowered in threads of one process waits for Python's lock."""


def backends() -> list[str]:
    """Those of CHECKS that this rnncore has, by the files of the package: the driver imports no JAX."""
    kernels = Path(__file__).resolve().parents[2] / "rnncore" / "kernels"
    return [name for name in CHECKS if (kernels / name).is_dir() or (kernels / f"{name}.py").exists()]


def checks_of(dry: bool) -> dict[str, tuple[Check, ...]]:
    """By backend, of those that this rnncore has."""
    from rnncore.sequence.backends import BACKENDS

    return {name: checks for name, checks in (DRY if dry else CHECKS).items() if name in BACKENDS}


def references(dry: bool) -> None:
    """A part: float64 answers of all checks, on CPU cores in the background."""
    import jax

    jax.config.update("jax_enable_x64", True)
    every = checks_of(dry)
    for check in dict.fromkeys(check for checks in every.values() for check in checks):
        save_reference(work(), check, 0)


def kind_of(backend: str, check: Check) -> str:
    """What a right answer to this check proves: one block to a head, or a cell in a dtype."""
    return "block" if backend == "mosaic_gpu" else f"{check.cell} {check.dtype}"


def worker(dry: bool, backend: str, share: list[int], first: int, bad: list[str], threads: int) -> None:
    """A part: a share of the checks of a backend.

    Args:
      share: which of how many.
      first: the number of the first check.
      bad: kinds that are left out.
      threads: in which programs are compiled.
    """
    which, shares = share
    chosen = []
    for number, check in enumerate(checks_of(dry)[backend]):
        if number >= first and number % shares == which:
            kind = kind_of(backend, check)
            told = {"backend": backend, "share": share, "number": number, "name": check.name, "kind": kind}
            if kind in bad:
                tell("check", **told, raised="this kind hung before")
            else:
                chosen.append((check, told))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        begun = [pool.submit(_compiled, backend, check) if threads > 1 else None for check, _ in chosen]
        for (check, told), ahead in zip(chosen, begun, strict=True):
            if ahead is not None:
                # Before its beginning is told: an abort while several are compiled is no check's own.
                concurrent.futures.wait([ahead])
            tell("begin", **told)
            if os.environ.get(HANG) == str(told["number"]):
                time.sleep(1000)
            begin = time.monotonic()
            try:
                made = ahead.result() if ahead is not None else _compiled(backend, check)
                tell("check", **told, **_compared(backend, check, made), seconds=round(time.monotonic() - begin, 2))
            except (NotImplementedError, ValueError) as reason:
                tell("check", **told, needs=str(reason).split("\n")[0][:400])
            except Exception as failure:  # whatever a kernel that is new to a machine raises is a result
                tell("check", **told, raised=f"{type(failure).__name__}: {str(failure)[:600]}")


def one(dry: bool, backend: str, number: int) -> None:
    """A part: a check is run once, for tools that look on."""
    import jax

    program, args = _compiled(backend, checks_of(dry)[backend][number])
    jax.block_until_ready(program(*args))


def _compiled(backend: str, check: Check) -> tuple[Any, Any]:
    """(the program, its arguments)."""
    import jax
    import jax.numpy as jnp

    cell, moving, given, cotangents = draw(check, 0)
    moving, cotangents = jax.tree.map(lambda a: jnp.asarray(a, check.dtype), (moving, cotangents))
    args = moving, jax.tree.map(jnp.asarray, given), cotangents
    with jax.default_matmul_precision("highest"):
        made = pulled(cell, backend).lower(*args).compile()
    print("compiled", backend, check.name, flush=True)
    return made, args


def _compared(backend: str, check: Check, made: tuple[Any, Any]) -> dict[str, Any]:
    """Fields of a record: the errors, whether the bits are the same again, and whether that is right."""
    program, args = made
    got = _numbers(program(*args))
    same = all(
        all(np.array_equal(a, b, equal_nan=True) for a, b in zip(got, _numbers(program(*args)), strict=True))
        for _ in range(AGAIN)
    )
    want = load(reference_path(work(), check), 60)
    each = [distance(a, b) for a, b in zip(got, want, strict=True)]
    limit, scan = APPROXIMATE.get((backend, check.dtype), ROUNDING[check.dtype]), None
    if max(each) > limit:
        plain = _numbers(_compiled("scan", check)[0](*args))
        scan = max(distance(a, b) for a, b in zip(plain, want, strict=True))
        limit = max(limit, 1.3 * scan)
    right = max(each) <= limit and same
    return {"error": max(each), "limit": limit, "scan": scan, "same": same, "right": bool(right), "each": each}


def _numbers(tree: Any) -> list[np.ndarray]:
    import jax

    return [np.asarray(a).astype(np.float64) for a in jax.tree.leaves(tree)]


def drive(runner: Runner, backends: list[str], limit: float, shares: int = SHARES) -> None:
    """Runs the checks of backends side by side, each share in as few processes as hang."""
    every = [(runner, backend, [which, shares], limit) for backend in backends for which in range(shares)]
    runner.side_by_side(_drive_share, every)


def _drive_share(runner: Runner, backend: str, share: list[int], limit: float) -> None:
    def told(part: str) -> list[dict[str, Any]]:
        return [r for r in runner.found(part) if r["backend"] == backend and r.get("share") == share]

    first, threads, deadline = 0, 4, runner.passed() + limit
    while runner.passed() < deadline and runner.left() > 5:
        begun_before = len(told("begin"))
        bad = sorted(wrong_kinds(runner, backend))
        given = {"backend": backend, "share": share, "first": first, "bad": bad, "threads": threads}
        if runner.run("check", given=given, limit=deadline - runner.passed()):
            return
        begun = told("begin")
        if len(begun) == begun_before:
            if threads == 1:
                return
            threads = 1  # aborted while several were compiled: one after the other it shows which
            continue
        last = begun[-1]
        if last["number"] not in {r["number"] for r in told("check")}:
            runner.write("check", **{k: v for k, v in last.items() if k not in ("part", "at")}, raised=HUNG)
        first = last["number"] + 1


def wrong_kinds(runner: Runner, backend: str) -> set[str]:
    """Kinds with a check that was not right; a check that the backend refuses says nothing."""
    checks = (r for r in runner.found("check") if r["backend"] == backend)
    return {r["kind"] for r in checks if "raised" in r or r.get("right") is False}


def hung(runner: Runner) -> set[str]:
    """Backends with a check that hung or aborted: not to be met again in a process that measures."""
    return {r["backend"] for r in runner.found("check") if r.get("raised") == HUNG}


def right_kinds(runner: Runner, backend: str) -> set[str]:
    """Kinds all of whose checks were right, at least one."""
    right = {r["kind"] for r in runner.found("check") if r["backend"] == backend and r.get("right")}
    return right - wrong_kinds(runner, backend)
