"""flax.linen: `RNN` over its cells."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import rnncore
from benchmarks.peers import jax_programs
from benchmarks.peers.base import Built, Case, Peer
from benchmarks.peers.problem import Problem

CELLS = {"lstm": ("LSTMCell", "OptimizedLSTMCell"), "gru": ("GRUCell",), "elman": ("SimpleCell",)}
# The side of a gate that carries its bias, and whether there is a second one on the recurrent side of n.
GATES = {"lstm": ("ifgo", "h"), "gru": ("rzn", "i"), "elman": ("", "i")}


def to_flax(params: rnncore.CellParams, cell: str) -> dict[str, Any]:
    """Parameters in the cell's tree: {"ii": {"kernel": ...}, "hi": {"kernel": ..., "bias": ...}, ...}."""
    gates, biased = GATES[cell]
    tree: dict[str, dict[str, Any]] = {}
    for n, gate in enumerate(gates or [""]):
        tree[f"i{gate}"] = {"kernel": params.input_kernel[:, n]}
        tree[f"h{gate}"] = {"kernel": params.recurrent_kernel[:, n]}
        tree[f"{biased}{gate}"]["bias"] = params.bias[n]  # type: ignore[index]
    if params.recurrent_bias is not None:
        tree["hn"]["bias"] = params.recurrent_bias[0]
    return {"params": {"cell": tree}}


def to_core(tree: dict[str, Any], cell: str) -> rnncore.CellParams:
    """The way back."""
    gates, biased = GATES[cell]
    own = tree["params"]["cell"]

    def stack(side: str, leaf: str, axis: int) -> Any:
        return np.stack([own[f"{side}{gate}"][leaf] for gate in gates or [""]], axis)

    second = own["hn"]["bias"][None] if cell == "gru" else None
    return rnncore.CellParams(stack("i", "kernel", 1), stack("h", "kernel", 1), stack(biased, "bias", 0), second, ())


class LinenPeer(Peer):
    """`flax.linen.RNN(cell)`."""

    library, package, module = "flax.linen", "flax", "flax"

    def contenders(self, cell: str) -> tuple[str, ...]:
        return tuple(f"flax.linen {name}" for name in CELLS[cell])

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        import flax.linen as nn

        cell, dtype = case.workload.cell, np.asarray(problem.xs).dtype
        make = getattr(nn, contender.removeprefix("flax.linen "))
        # Only the shapes of what this would draw are looked at, and the orthogonal default has none in half types.
        zeros = nn.initializers.zeros_init()
        layer = nn.RNN(make(case.workload.hidden, dtype=dtype, param_dtype=dtype, recurrent_kernel_init=zeros))
        back = functools.partial(to_core, cell=cell)
        return jax_programs.build(layer.apply, to_flax(problem.params, cell), back, case, problem, measurement)
