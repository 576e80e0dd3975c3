"""rnncore itself, on its backends."""

from __future__ import annotations

import functools
from typing import Any

import jax

import rnncore
from benchmarks.peers import jax_peers
from benchmarks.peers.base import Built, Case, Peer
from benchmarks.peers.problem import Problem, make_cell
from benchmarks.workloads import Workload
from rnncore import gpu
from rnncore.kernels import cpp, mosaic_gpu, pallas_tpu

SCAN, GRAPH, OWN_CELL = "rnncore scan", "rnncore scan, CUDA graph", ", own cell"
BACKENDS = ("cpp", "mosaic_gpu", "cuda", "cudnn", "pallas_tpu")
"""Named backends; the contenders are called "rnncore " and the name."""


class RnncorePeer(Peer):
    """`rnncore.unroll` on backend "scan", with the loop as a CUDA graph, and on the named backends.

    "own cell" is a user's LSTM in place of the built-in one, through the same kernels.
    """

    library = package = module = "rnncore"

    def version(self) -> str | None:
        return rnncore.__version__

    def contenders(self, cell: str) -> tuple[str, ...]:
        own = [f"rnncore {name}{OWN_CELL}" for name in ("mosaic_gpu", "cuda")] if cell == "lstm" else []
        return (SCAN, GRAPH, *(f"rnncore {name}" for name in BACKENDS), *own)

    def absent(self, contender: str, platform: str) -> str | None:
        missing: dict[str, Any] = {
            "cpp": cpp.missing_compiler, "mosaic_gpu": mosaic_gpu.missing_gpu, "pallas_tpu": pallas_tpu.missing_platform
        }  # fmt: skip
        name = backend_of(contender)
        if name in missing:
            return missing[name](platform)
        if contender != SCAN and platform != "gpu":
            return f"needs an NVIDIA GPU; JAX runs on {platform} here"
        return None

    def why_not(self, contender: str, case: Case) -> str | None:
        if backend_of(contender) == "cudnn" and not case.input_product:
            return "cuDNN takes inputs, not their products with the kernel"
        try:
            rnncore.explain_backend(_cell(contender, case), *_shapes(case), backend=backend_of(contender))
        except (NotImplementedError, ValueError) as error:
            return str(error)
        return None

    def asked(self, contender: str, workload: Workload) -> bool:
        return workload.own_cell or not contender.endswith(OWN_CELL)

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        backend = backend_of(contender)
        run = functools.partial(rnncore.unroll, _cell(contender, case), backend=backend)
        chosen = rnncore.explain_backend(_cell(contender, case), *_shapes(case)).name
        graph = gpu.loop_as_graph_options() if contender == GRAPH else None
        layer = jax_peers.Layer(lambda params, xs: run(params, xs)[1])
        return jax_peers.build(layer, case, problem, measurement, graph, f"{backend}; backend=None takes {chosen}")


def backend_of(contender: str) -> str:
    """The backend that a contender runs on."""
    return contender.removeprefix("rnncore ").partition(",")[0]


def _cell(contender: str, case: Case) -> rnncore.Cell:
    """The cell that a contender runs."""
    return make_cell(case.workload, case.input_product, contender.endswith(OWN_CELL))


def _shapes(case: Case) -> tuple[Any, Any]:
    """Parameters and inputs of a case as shapes: nothing is drawn."""
    workload, dtype, cell = case.workload, case.dtype, _cell(SCAN, case)
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), workload.features, dtype))
    features = workload.features if case.input_product else workload.gates * workload.hidden
    return params, jax.ShapeDtypeStruct((workload.batch, workload.steps, features), dtype)
