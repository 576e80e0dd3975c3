"""Haiku: `dynamic_unroll` over its LSTM.

It has one kernel for [x, h], gates in the order i, g, f, o, and adds 1 to the forget gate.  Its GRU and VanillaRNN are
other cells than those of the other libraries.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import rnncore
from benchmarks.peers import jax_programs
from benchmarks.peers.base import Built, Case, Peer
from benchmarks.peers.problem import Problem

ORDER = [0, 2, 1, 3]
"""Of i, f, g, o: Haiku's i, g, f, o; its own inverse."""


def to_haiku(params: rnncore.CellParams) -> dict[str, dict[str, Any]]:
    """Haiku's tree of parameters."""
    whole = np.concatenate([np.asarray(k)[:, ORDER] for k in (params.input_kernel, params.recurrent_kernel)], 0)
    bias = np.array(params.bias)
    bias[1] -= 1
    return {"lstm/linear": {"w": whole.reshape(len(whole), -1), "b": bias[ORDER].reshape(-1)}}


def to_core(tree: dict[str, dict[str, Any]], hidden: int) -> rnncore.CellParams:
    """Of gradients: the offset of the forget gate has none."""
    own = tree["lstm/linear"]
    whole = own["w"].reshape(len(own["w"]), 4, hidden)[:, ORDER]
    return rnncore.CellParams(whole[:-hidden], whole[-hidden:], own["b"].reshape(4, hidden)[ORDER], None, ())


class HaikuPeer(Peer):
    """`haiku.dynamic_unroll(haiku.LSTM(H), ..., time_major=False)`."""

    library, package, module = "haiku", "dm-haiku", "haiku"

    def contenders(self, cell: str) -> tuple[str, ...]:
        return ("haiku",) if cell == "lstm" else ()

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        import haiku as hk

        hidden = case.workload.hidden

        def layer(xs: Any) -> Any:
            core = hk.LSTM(hidden)
            # Its initial states are float32 whatever the inputs are.
            start = jax.tree.map(lambda a: a.astype(xs.dtype), core.initial_state(xs.shape[0]))
            return hk.dynamic_unroll(core, xs, start, time_major=False)[0]

        apply = hk.without_apply_rng(hk.transform(layer)).apply
        back = lambda tree: to_core(tree, hidden)  # noqa: E731
        return jax_programs.build(apply, to_haiku(problem.params), back, case, problem, measurement)
