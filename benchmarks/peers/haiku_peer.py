"""Haiku: `dynamic_unroll` over its LSTM, whose one kernel is for [x, h], with gates i, g, f, o and 1 added to f."""

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


class HaikuPeer(Peer):
    """`haiku.dynamic_unroll(haiku.LSTM(H), ..., time_major=False)`; its GRU and Elman network are other equations."""

    library, package, module = "haiku", "dm-haiku", "haiku"

    def contenders(self, cell: str) -> tuple[str, ...]:
        return ("haiku",) if cell == "lstm" else ()

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        import haiku as hk

        hidden, params = case.workload.hidden, problem.params

        def layer(xs: Any) -> Any:
            core = hk.LSTM(hidden)
            # Its initial states are float32 whatever the inputs are.
            start = jax.tree.map(lambda a: a.astype(xs.dtype), core.initial_state(xs.shape[0]))
            return hk.dynamic_unroll(core, xs, start, time_major=False)[0]

        kernels = [np.asarray(k)[:, ORDER] for k in (params.input_kernel, params.recurrent_kernel)]
        whole, bias = np.concatenate(kernels, 0), np.array(params.bias)
        bias[1] -= 1
        tree = {"lstm/linear": {"w": whole.reshape(len(whole), -1), "b": bias[ORDER].reshape(-1)}}

        def to_core(tree: dict[str, dict[str, Any]]) -> rnncore.CellParams:
            own = tree["lstm/linear"]
            whole, bias = own["w"].reshape(-1, 4, hidden)[:, ORDER], own["b"].reshape(4, hidden)[ORDER]
            return rnncore.CellParams(whole[:-hidden], whole[-hidden:], bias, None, ())

        forward = hk.without_apply_rng(hk.transform(layer)).apply
        return jax_programs.build(forward, tree, to_core, case, problem, measurement)
