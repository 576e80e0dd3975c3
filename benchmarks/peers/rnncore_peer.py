"""rnncore itself, on its backends."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import jax

import rnncore
from benchmarks import trial
from benchmarks.peers import jax_programs
from benchmarks.peers.base import Built, Case, Peer
from benchmarks.peers.own_cell import OwnLSTM
from benchmarks.peers.problem import Problem, make_cell
from benchmarks.peers.reference import with_given_products
from benchmarks.workloads import Workload
from rnncore.kernels import cpp, mosaic_gpu, pallas_tpu
from rnncore.kernels.mosaic_gpu.plan import Plan, plan_of
from rnncore.sequence.backends import BACKENDS

SCAN, GRAPH = "rnncore scan", "rnncore scan, CUDA graph"
CUDNN, CUDA, OWN_CUDA = "rnncore cudnn", "rnncore cuda", "rnncore cuda, own cell"
CPP, MOSAIC, OWN, TPU = "rnncore cpp", "rnncore mosaic_gpu", "rnncore mosaic_gpu, own cell", "rnncore pallas_tpu"
# Those that name a backend; the others run on "scan".
NAMED = {
    CPP: "cpp", CUDNN: "cudnn", MOSAIC: "mosaic_gpu", OWN: "mosaic_gpu", TPU: "pallas_tpu", CUDA: "cuda",
    OWN_CUDA: "cuda",
}  # fmt: skip

CHECKED = False
"""Whether this process need not try Mosaic's kernels first in a process of their own."""


class RnncorePeer(Peer):
    """`rnncore.unroll` on backend "scan", with the loop as a CUDA graph, and on the named backends.

    "own cell" is a user's LSTM in place of the built-in one, through the same kernels.
    """

    library = package = module = "rnncore"

    def __init__(self) -> None:
        self._faults: list[str | None] = []

    def version(self) -> str | None:
        return rnncore.__version__

    def contenders(self, cell: str) -> tuple[str, ...]:
        every = (SCAN, CPP, GRAPH, MOSAIC, CUDA, CUDNN, TPU, *((OWN, OWN_CUDA) if cell == "lstm" else ()))
        return tuple(name for name in every if NAMED.get(name, "scan") in BACKENDS)

    def absent(self, contender: str, platform: str) -> str | None:
        if contender in (GRAPH, CUDNN, CUDA, OWN_CUDA) and platform != "gpu":
            return f"needs an NVIDIA GPU; JAX runs on {platform} here"
        if contender == GRAPH and importlib.util.find_spec("rnncore.gpu") is None:
            return "this rnncore has no rnncore.gpu"
        if contender == CPP:
            return cpp.missing_compiler(platform)
        if contender in (MOSAIC, OWN):
            return mosaic_gpu.missing_gpu(platform)
        return pallas_tpu.missing_platform(platform) if contender == TPU else None

    def why_not(self, contender: str, case: Case) -> str | None:
        if contender not in NAMED:
            return None
        if contender == CUDNN and not case.input_product:
            return "cuDNN takes inputs, not their products with the kernel"
        cell, problem = _cell(contender, case), _shapes(case)
        try:
            rnncore.explain_backend(cell, problem.params[0], problem.xs, backend=NAMED[contender])
        except (NotImplementedError, ValueError) as error:
            return str(error)
        return None

    def asked(self, contender: str, workload: Workload) -> bool:
        return contender not in (OWN, OWN_CUDA) or workload.own_cell

    def fault(self, contender: str, case: Case) -> str | None:
        """One trial of Mosaic's kernels, and none where they have proved themselves."""
        if CHECKED or NAMED.get(contender) != "mosaic_gpu":
            return None
        if not self._faults:
            self._faults.append(trial.fault(contender, case))
        return self._faults[0]

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        cell = _cell(contender, case)
        backend = NAMED.get(contender, "scan")
        run = functools.partial(rnncore.unroll, cell, backend=backend)
        chosen = rnncore.explain_backend(cell, problem.params[0], problem.xs).name
        options = None
        if contender == GRAPH:
            options = importlib.import_module("rnncore.gpu").loop_as_graph_options()
        how = f"{backend}, {_told(_layout(case))}" if backend == "mosaic_gpu" else backend
        return jax_programs.build(
            jax_programs.layer_by_layer(lambda own, xs: run(own, xs)[1]), problem.params, lambda tree: tree, case,
            problem, measurement, compiler_options=options, algorithm=f"{how}; backend=None takes {chosen}",
        )  # fmt: skip


def _cell(contender: str, case: Case) -> rnncore.Cell:
    """The cell that a contender runs."""
    cell: rnncore.Cell = make_cell(case.workload)
    if contender in (OWN, OWN_CUDA):
        cell = OwnLSTM(case.workload.hidden, recurrence=make_cell(case.workload).recurrence)
    return cell if case.input_product else with_given_products(cell)


def _layout(case: Case) -> Plan:
    """How "mosaic_gpu" lays out a case that it can serve."""
    plan = plan_of(make_cell(case.workload), case.workload.batch, False, False)
    assert isinstance(plan, Plan), plan
    return plan


def _told(plan: Plan) -> str:
    """A layout in words."""
    return f"one block of {plan.size} units to a head"


def _shapes(case: Case) -> Problem:
    """The problem of a case as shapes: nothing is drawn."""
    workload, dtype = case.workload, case.dtype
    cell: rnncore.Cell = make_cell(workload)
    cell = cell if case.input_product else with_given_products(cell)
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), workload.features, dtype))
    features = workload.features if case.input_product else workload.gates * workload.hidden
    xs = jax.ShapeDtypeStruct((workload.batch, workload.steps, features), dtype)
    return Problem((params,), xs, None)
