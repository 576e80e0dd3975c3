"""The telling rows of the benchmark, alone on the card, in one process while none hangs.

Groups are run in order, the most telling first.  float64 references come from CPU cores in the background.
"""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu_check.problems import load, save
from benchmarks.gpu_check.processes import TIMES, Runner, folder, tell, work

PLAIN = ("rnncore scan", "rnncore scan, CUDA graph")
FLAX = ("flax.linen OptimizedLSTMCell", "flax.linen GRUCell")
OWN = ("rnncore cudnn", "rnncore cuda")
KERNELS = ("rnncore mosaic_gpu", "rnncore cuda")
FLASH = "FlashRNN triton_fused"
OWN_CELLS = ("rnncore cuda, own cell", "rnncore mosaic_gpu, own cell")


class Group(NamedTuple):
    """One or more workloads in one run of `benchmarks.run`.

    Fields:
      workloads, dtypes, contenders: their names.
      product: "inside" or "given": where x W is.
      precision: of float32 products.
    """

    workloads: tuple[str, ...]
    dtypes: tuple[str, ...]
    contenders: tuple[str, ...]
    product: str = "inside"
    precision: str = "tf32"

    @property
    def name(self) -> str:
        return f"{' '.join(self.workloads)} {' '.join(self.dtypes)} x W {self.product}"


GROUPS = (
    Group(("W1-768x1",), ("bfloat16",), (*OWN, "torch", PLAIN[0], FLAX[0])),
    Group(("W1-64x12",), ("bfloat16",), (*KERNELS, OWN_CELLS[0], FLASH), "given"),
    Group(("W4-lstm768",), ("float32",), (*OWN, "torch", PLAIN[0], FLAX[0])),
    Group(("W4-lstm768",), ("float16",), (*OWN, "torch")),
    Group(("W12-H256", "W12-H512"), ("float32",), ("rnncore cuda", "rnncore cudnn", "torch")),
    Group(("W4-gru768",), ("bfloat16",), (*OWN, "torch", PLAIN[0], FLAX[1])),
    Group(("W1-128x6",), ("bfloat16",), (*KERNELS, FLASH), "given"),
    Group(("W1-256x3",), ("bfloat16",), KERNELS[1:], "given"),
    Group(("W5-H40", "W5-H128"), ("float32",), ("rnncore cuda", "rnncore cudnn", "torch")),
    Group(("W1-768x1",), ("bfloat16",), KERNELS[1:], "given"),
    Group(("W1-32x24",), ("bfloat16",), (*KERNELS, FLASH), "given"),
    Group(("W4-gru768",), ("float32",), (*OWN, "torch")),
    Group(("W4-lstm768",), ("float32",), (PLAIN[1],)),
    Group(("W1-64x12",), ("bfloat16",), (OWN_CELLS[1],), "given"),
)
DRY = (
    Group(("tiny-lstm",), ("float32",), (*OWN, "torch", *PLAIN, *FLAX), precision="float32"),
    Group(("tiny-gru",), ("float32",), PLAIN, "given", "float32"),
)


def groups(dry: bool) -> tuple[Group, ...]:
    """All, in their order."""
    return DRY if dry else GROUPS


def cases(group: Group, platform: str) -> list[Any]:
    """The cases of a group."""
    from benchmarks import run
    from benchmarks.workloads import WORKLOADS

    every = run.cases([WORKLOADS[name] for name in group.workloads], (group.precision,), platform)
    return [c for c in every if c.dtype in group.dtypes and c.input_product == (group.product == "inside")]


def reference_path(work: Path, workload: str, dtype: str, input_product: bool) -> Path:
    """Where the answers to a case lie once they are computed."""
    return work / f"{workload}_{dtype}_{'inside' if input_product else 'given'}.npz"


def references(dry: bool) -> None:
    """A part: float64 answers of all groups, in their order, on CPU cores in the background."""
    import jax

    from benchmarks.peers.problem import make_problem, reference

    for case in (case for group in groups(dry) for case in cases(group, "cpu")):
        path = reference_path(work(), case.workload.name, case.dtype, case.input_product)
        if path.exists():
            continue
        problem = make_problem(case.workload, case.dtype, case.input_product)
        found = reference(case.workload, problem, case.input_product)
        save(path, [np.asarray(a) for a in jax.tree.leaves((found["forward"], found["gradient"]))])
        print("reference", path.name, flush=True)


def stored(workload: Any, problem: Any, input_product: bool) -> dict[str, Any]:
    """What `benchmarks.peers.problem.reference` gives, from the background."""
    import jax

    arrays = load(reference_path(work(), workload.name, str(problem.xs.dtype), input_product), patience=60)
    tree = jax.tree.structure((0, (problem.params, problem.xs)))
    forward, gradient = jax.tree.unflatten(tree, arrays)
    return {"forward": forward, "gradient": gradient}


def worker(dry: bool, first: int, seconds: float, dropped: list[str]) -> None:
    """A part: the groups from number `first` on, within a time, without contenders that are dropped."""
    from benchmarks import measure, records, run
    from rnncore._command import timing

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the driver kills a process that is silent
    tag, rounds, turn = ("cpu", 2, 0.001) if dry else ("gpu", 5, 0.05)
    deadline = time.monotonic() + seconds
    for number, group in list(enumerate(groups(dry)))[first:]:
        if deadline - time.monotonic() < 5:
            break
        names = [c for c in group.contenders if c not in dropped]
        if not names:
            continue
        tell("group", number=number, name=group.name)
        threads = 1 if dry else min(12, timing.cores())
        settings = measure.Settings(rounds, turn, deadline, threads, with_products=False, reference=stored)
        measure_group = functools.partial(run.run_all, cases(group, tag), names, settings)
        status = records.session(tag, folder() / TIMES, [], rounds, turn, measure_group, quick=True)
        tell("group", number=number, name=group.name, status=status)


def drive(runner: Runner, limit: float, dropped: set[str]) -> None:
    """Runs the groups in as few processes as hang; a group that hangs is tried again without kernels of our own."""
    first, deadline = 0, runner.passed() + limit
    while runner.passed() < deadline and runner.left() > 10:
        seconds = min(deadline - runner.passed(), runner.left()) - 3
        before = len(runner.found("group"))
        given = {"first": first, "seconds": seconds, "dropped": sorted(dropped)}
        if runner.run("times", given=given, limit=deadline - runner.passed(), stall=75):
            return
        begun = runner.found("group")
        if len(begun) == before:
            return
        first = begun[-1]["number"]
        if {*OWN} <= dropped:
            first += 1
        dropped = dropped | {*OWN, *KERNELS}
