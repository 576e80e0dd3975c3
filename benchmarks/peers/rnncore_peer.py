"""rnncore itself, in its modes of differentiation and on its backends."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import jax

import rnncore
from benchmarks.peers import jax_programs
from benchmarks.peers.base import Built, Case, Peer
from benchmarks.peers.problem import Problem, make_cell
from benchmarks.peers.reference import with_given_products

ANY, REVERSE, GRAPH, CUDNN = "rnncore any", "rnncore reverse", "rnncore reverse, CUDA graph", "rnncore cudnn"


class RnncorePeer(Peer):
    """`rnncore.unroll` on backend "scan" in both modes, with the loop as a CUDA graph, and on backend "cudnn"."""

    library = package = module = "rnncore"

    def version(self) -> str | None:
        return rnncore.__version__

    def contenders(self, cell: str) -> tuple[str, ...]:
        return (ANY, REVERSE, GRAPH) + ((CUDNN,) if cell == "lstm" else ())

    def absent(self, contender: str, platform: str) -> str | None:
        if contender in (GRAPH, CUDNN) and platform != "gpu":
            return f"needs an NVIDIA GPU; JAX runs on {platform} here"
        if contender == GRAPH and importlib.util.find_spec("rnncore.gpu") is None:
            return "this rnncore has no rnncore.gpu"
        return None

    def why_not(self, contender: str, case: Case) -> str | None:
        if contender != CUDNN:
            return None
        if not case.input_product:
            return "cuDNN takes inputs, not their products with the kernel"
        problem = _shapes(case)
        try:
            rnncore.explain_backend(
                make_cell(case.workload), problem.params[0], problem.xs, differentiation="reverse", backend="cudnn"
            )
        except (NotImplementedError, ValueError) as error:
            return str(error)
        return None

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        cell: rnncore.Cell = make_cell(case.workload)
        cell = cell if case.input_product else with_given_products(cell)
        mode: Any = "any" if contender == ANY else "reverse"
        backend = "cudnn" if contender == CUDNN else "scan"
        run = functools.partial(rnncore.unroll, cell, differentiation=mode, backend=backend)
        chosen = rnncore.explain_backend(cell, problem.params[0], problem.xs, differentiation=mode).name
        options = None
        if contender == GRAPH:
            options = importlib.import_module("rnncore.gpu").loop_as_graph_options()
        return jax_programs.build(
            jax_programs.layer_by_layer(lambda own, xs: run(own, xs)[1]), problem.params, lambda tree: tree, case,
            problem, measurement, compiler_options=options, algorithm=f"{backend}; backend=None takes {chosen}",
        )  # fmt: skip


def _shapes(case: Case) -> Problem:
    """The problem of a case as shapes: nothing is drawn."""
    workload, dtype = case.workload, case.dtype
    cell = make_cell(workload)
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), workload.features, dtype))
    xs = jax.ShapeDtypeStruct((workload.batch, workload.steps, workload.features), dtype)
    return Problem((params,), xs, None)
