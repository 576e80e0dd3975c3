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
OWN_CELLS = ("rnncore cuda, own cell", "rnncore mosaic_gpu, own cell")


class Group(NamedTuple):
    """One or more workloads in one call of `benchmarks.run`.

    Fields:
      workloads, dtypes, contenders: as there; contenders in the order in which they are built.
      product: "inside" or "given": where x W is.
      extra: further options.
    """

    workloads: tuple[str, ...]
    dtypes: tuple[str, ...]
    contenders: tuple[str, ...]
    product: str = "inside"
    extra: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{' '.join(self.workloads)} {' '.join(self.dtypes)} x W {self.product}"


TF32 = ("--precision", "tf32")
GROUPS = (
    Group(("W1-768x1",), ("bfloat16",), (*OWN, "torch", PLAIN[0], FLAX[0])),
    Group(("W1-64x12",), ("bfloat16",), (*KERNELS, OWN_CELLS[0], "FlashRNN triton_fused"), "given"),
    Group(("W4-lstm768",), ("float32",), (*OWN, "torch", PLAIN[0], FLAX[0]), extra=TF32),
    Group(("W4-lstm768",), ("float16",), (*OWN, "torch")),
    Group(("W12-H256", "W12-H512"), ("float32",), ("rnncore cuda", "rnncore cudnn", "torch"), extra=TF32),
    Group(("W4-gru768",), ("bfloat16",), (*OWN, "torch", PLAIN[0], FLAX[1])),
    Group(("W1-128x6",), ("bfloat16",), KERNELS, "given"),
    Group(("W1-256x3",), ("bfloat16",), (KERNELS[1],), "given"),
    Group(("W5-H40", "W5-H128"), ("float32",), ("rnncore cuda", "rnncore cudnn", "torch"), extra=TF32),
    Group(("W1-768x1",), ("bfloat16",), (KERNELS[1],), "given"),
    Group(("W1-32x24",), ("bfloat16",), KERNELS, "given"),
    Group(("W4-gru768",), ("float32",), (*OWN, "torch"), extra=TF32),
    Group(("W4-lstm768",), ("float32",), (PLAIN[1],), extra=TF32),
    Group(("W1-64x12",), ("bfloat16",), (OWN_CELLS[1],), "given"),
)
DRY = (
    Group(("tiny-lstm",), ("float32",), (*OWN, "torch", *PLAIN, *FLAX, "FlashRNN triton_fused")),
    Group(("tiny-gru",), ("float32",), PLAIN, "given"),
)


def groups(dry: bool) -> tuple[Group, ...]:
    """All, with the contenders that this rnncore knows."""
    from benchmarks.peers import CONTENDERS

    return tuple(
        group._replace(contenders=tuple(c for c in group.contenders if c in CONTENDERS))
        for group in (DRY if dry else GROUPS)
    )


def reference_path(work: Path, workload: str, dtype: str, input_product: bool, form: str) -> Path:
    """Where the answers to a case lie once they are there."""
    words = "_".join((workload, dtype, "inside" if input_product else "given", form.replace(" ", "-")))
    return work / f"{words}.npz"


def references(dry: bool) -> None:
    """A part: float64 answers of all groups, in their order, on CPU cores in the background."""
    import jax

    from benchmarks.peers.problem import make_problem
    from benchmarks.peers.reference import reference
    from benchmarks.workloads import WORKLOADS

    for group in groups(dry):
        for name in group.workloads:
            for dtype in group.dtypes:
                path = reference_path(work(), name, dtype, group.product == "inside", "same")
                if path.exists():
                    continue
                product = group.product == "inside"
                problem = make_problem(WORKLOADS[name], dtype, product)
                found = reference(WORKLOADS[name], problem, product, "same")
                save(path, [np.asarray(a) for a in jax.tree.leaves(_kept(found))])
                print("reference", path.name, flush=True)


def _kept(found: dict[str, Any]) -> Any:
    return found["forward"], found["gradient"]


def stored(patience: float, workload: Any, problem: Any, input_product: bool, form: str) -> dict[str, Any]:
    """What `benchmarks.peers.reference.reference` gives, from the background."""
    import jax

    from benchmarks.peers.reference import reference

    if form != "same":
        return reference(workload, problem, input_product, form)
    arrays = load(reference_path(work(), workload.name, str(problem.xs.dtype), input_product, form), patience)
    shapes = (0, (problem.params, problem.xs))
    tree = jax.tree.structure(shapes)
    forward, gradient = jax.tree.unflatten(tree, arrays)
    return {"forward": forward, "gradient": gradient}


def worker(dry: bool, first: str, seconds: str, right: str, dropped: str) -> None:
    """A part: the groups from number `first` on, within a time.

    Args:
      right: "yes" where Mosaic's kernels have just been checked; else they are not timed.
      dropped: contenders to leave out, parted by semicolons.
    """
    from benchmarks import run
    from benchmarks.peers import rnncore_peer

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what the driver sees that it goes on by
    rnncore_peer.CHECKED = right == "yes"
    deadline = time.monotonic() + float(seconds)
    for number, group in list(enumerate(groups(dry)))[int(first) :]:
        left = deadline - time.monotonic()
        if left < 5:
            break
        names = [c for c in group.contenders if c not in dropped.split(";")]
        if not rnncore_peer.CHECKED:
            names = [c for c in names if "mosaic_gpu" not in c]
        if not names:
            continue
        tell("group", number=number, name=group.name)
        status = run.main(
            [
                "--tag", "cpu" if dry else "gpu", "--quick", "--no-bounds", "--input-product", group.product,
                "--workloads", *group.workloads, "--dtypes", *group.dtypes, "--contenders", *names, *group.extra,
                "--measurements", "forward", "gradient", "--budget", f"{left:.0f}", "--out", str(folder() / TIMES),
                *(["--rounds", "2", "--seconds", "0.001"] if dry else []),
            ],
            functools.partial(stored, 60.0),
        )  # fmt: skip
        tell("group", number=number, name=group.name, status=status)


def drive(runner: Runner, limit: float, right: bool, dropped: set[str], stall: float = 75) -> None:
    """Runs the groups in as few processes as hang; a group that hangs is tried again without kernels of our own."""
    first, deadline = 0, runner.passed() + limit
    while runner.passed() < deadline and runner.left() > 10:
        seconds = min(deadline - runner.passed(), runner.left()) - 3
        before = len(runner.found("group"))
        arguments = (str(first), f"{seconds:.0f}", "yes" if right else "no", ";".join(sorted(dropped)))
        if runner.run("times", *arguments, limit=deadline - runner.passed(), stall=stall):
            return
        begun = runner.found("group")
        if len(begun) == before:
            return
        first = begun[-1]["number"]
        if {*OWN} <= dropped:
            first += 1
        dropped = dropped | {*OWN, *KERNELS}
