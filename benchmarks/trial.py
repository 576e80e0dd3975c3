"""Runs a contender once in a process of its own, before the run itself dares to.

A kernel that is new to a machine may wait for ever, or write where it may not and take with it all that its process
has on the GPU.  Tried here first it costs the run one contender, and not all that come after it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.peers.base import Case
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 90.0
WORKS = "the device works"
"""What a trial prints once it has the device."""


def fault(contender: str, case: Case, seconds: float = SECONDS) -> str | None:
    """What is wrong with a contender at a case, or None; also None where a second process does not get the device."""
    arguments = [contender, case.workload.name, case.dtype, case.precision, str(int(case.input_product))]
    # The run's own process has taken most of the memory.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    why = ""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.trial", *arguments], cwd=ROOT, env=environment, timeout=seconds,
            capture_output=True,
        )  # fmt: skip
        told = done.stdout
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            why = f"exit status {done.returncode}: {lines[-1][:300]}"
    except subprocess.TimeoutExpired as late:
        told, why = late.stdout or b"", f"not at its end after {seconds:g} s"
    if not why or WORKS.encode() not in told:
        return None
    return f"tried in a process of its own at {case.title}: {why}"


def main(argv: list[str]) -> None:
    """The trial: a gradient, in which the forward kernel runs too."""
    from benchmarks.peers import PEERS
    from benchmarks.peers.problem import make_problem

    contender, name, dtype, precision, product = argv
    workload = WORKLOADS[name]
    case = Case(workload, dtype, precision, product == "1", jax.default_backend())
    jax.block_until_ready(jnp.zeros(8) + 1)
    print(WORKS, flush=True)
    peer = next(p for p in PEERS if contender in p.contenders(workload.cell))
    problem = make_problem(workload, dtype, case.input_product)
    jax.block_until_ready(peer.build(contender, case, problem, "gradient").call())


if __name__ == "__main__":
    main(sys.argv[1:])
