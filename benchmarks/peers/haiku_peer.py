"""Haiku: `dynamic_unroll` over its cores.

Its LSTM has one kernel for [x, h], gates in the order i, g, f, o, and adds 1 to the forget gate.  Its GRU
resets before the product and has z and 1 - z swapped.  Its VanillaRNN has relu.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import rnncore
from benchmarks.peers import jax_programs
from benchmarks.peers.base import Built, Case, Peer
from benchmarks.peers.problem import Problem
from rnncore.cells.gru_reset_before import ResetBeforeGRUParams

LSTM_ORDER = [0, 2, 1, 3]
"""Of i, f, g, o: Haiku's i, g, f, o; its own inverse."""
GRU_ORDER = [1, 0, 2]
"""Of r, z, n: Haiku's z, r, a; its own inverse."""
NEGATED = np.array([1, -1, 1])
"""Of r, z, n: sigmoid(-a) = 1 - sigmoid(a) swaps z and 1 - z."""


def lstm_to_haiku(params: rnncore.CellParams) -> dict[str, dict[str, Any]]:
    kernels = [np.asarray(k)[:, LSTM_ORDER] for k in (params.input_kernel, params.recurrent_kernel)]
    whole = np.concatenate(kernels, 0)
    bias = np.array(params.bias)
    bias[1] -= 1
    return {"lstm/linear": {"w": whole.reshape(len(whole), -1), "b": bias[LSTM_ORDER].reshape(-1)}}


def lstm_to_core(tree: dict[str, dict[str, Any]], hidden: int) -> rnncore.CellParams:
    """Of gradients: the offset of the forget gate has none."""
    own = tree["lstm/linear"]
    whole = own["w"].reshape(len(own["w"]), 4, hidden)[:, LSTM_ORDER]
    bias = own["b"].reshape(4, hidden)[LSTM_ORDER]
    return rnncore.CellParams(whole[:-hidden], whole[-hidden:], bias, None, ())


def gru_to_haiku(params: rnncore.CellParams) -> dict[str, dict[str, Any]]:
    def turned(a: Any) -> np.ndarray:
        a = np.asarray(a)
        return (a * NEGATED.astype(a.dtype)[:, None])[..., GRU_ORDER, :]

    flat = lambda a: turned(a).reshape(len(a), -1)  # noqa: E731
    return {
        "gru": {
            "w_i": flat(params.input_kernel), "w_h": flat(params.recurrent_kernel), "b": turned(params.bias).reshape(-1)
        }
    }  # fmt: skip


def gru_to_core(tree: dict[str, dict[str, Any]], hidden: int) -> ResetBeforeGRUParams:
    def turned(a: np.ndarray) -> Any:
        return a.reshape(*a.shape[:-1], 3, hidden)[..., GRU_ORDER, :] * NEGATED[:, None]

    own = tree["gru"]
    return ResetBeforeGRUParams(turned(own["w_i"]), turned(own["w_h"]), turned(own["b"]))


def elman_to_haiku(params: rnncore.CellParams) -> dict[str, dict[str, Any]]:
    return {
        "vanilla_rnn/linear": {"w": params.input_kernel[:, 0], "b": params.bias[0]},  # type: ignore[index]
        "vanilla_rnn/linear_1": {"w": params.recurrent_kernel[:, 0]},
    }


def elman_to_core(tree: dict[str, dict[str, Any]], hidden: int) -> rnncore.CellParams:
    del hidden
    one, two = tree["vanilla_rnn/linear"], tree["vanilla_rnn/linear_1"]
    return rnncore.CellParams(one["w"][:, None], two["w"][:, None], one["b"][None], None, ())


TRANSLATIONS: dict[str, tuple[Any, Any]] = {
    "lstm": (lstm_to_haiku, lstm_to_core),
    "gru": (gru_to_haiku, gru_to_core),
    "elman": (elman_to_haiku, elman_to_core),
}


class HaikuPeer(Peer):
    """`haiku.dynamic_unroll(core, ..., time_major=False)`, one for each layer."""

    library, package, module = "haiku", "dm-haiku", "haiku"

    def contenders(self, cell: str) -> tuple[str, ...]:
        return ("haiku",)

    def form(self, contender: str, cell: str) -> str:
        return {"lstm": "same", "gru": "gru reset before", "elman": "elman relu"}[cell]

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        import haiku as hk

        cell, hidden = case.workload.cell, case.workload.hidden
        to_haiku, to_core = TRANSLATIONS[cell]

        def layer(xs: Any) -> Any:
            core: Any = {
                "lstm": lambda: hk.LSTM(hidden),
                "gru": lambda: hk.GRU(hidden),
                "elman": lambda: hk.VanillaRNN(hidden, double_bias=False),
            }[cell]()
            # Its initial states are float32 whatever the inputs are.
            start = jax.tree.map(lambda a: a.astype(xs.dtype), core.initial_state(xs.shape[0]))
            return hk.dynamic_unroll(core, xs, start, time_major=False)[0]

        forward = jax_programs.layer_by_layer(hk.without_apply_rng(hk.transform(layer)).apply)
        back = lambda trees: tuple(to_core(tree, hidden) for tree in trees)  # noqa: E731
        return jax_programs.build(forward, tuple(map(to_haiku, problem.params)), back, case, problem, measurement)
