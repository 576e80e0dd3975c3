"""Equinox: a cell for one vector, `lax.scan` over time, `vmap` over the batch, as its documentation has it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from benchmarks.peers import jax_programs
from benchmarks.peers.base import Built, Case, Peer
from benchmarks.peers.problem import Problem


def _rows(kernel: Any) -> np.ndarray:
    """(D, G, H) to (G*H, D)."""
    return np.asarray(kernel).reshape(kernel.shape[0], -1).T


class EquinoxPeer(Peer):
    """`equinox.nn.LSTMCell` and `GRUCell`."""

    library, package, module = "equinox", "equinox", "equinox"

    def contenders(self, cell: str) -> tuple[str, ...]:
        return ("equinox",) if cell != "elman" else ()

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        import equinox as eqx

        hidden, is_lstm = case.workload.hidden, case.workload.cell == "lstm"
        make = eqx.nn.LSTMCell if is_lstm else eqx.nn.GRUCell

        def to_equinox(params: rnncore.CellParams) -> Any:
            with jax.enable_x64(False):
                cell = make(params.input_kernel.shape[0], hidden, key=jax.random.key(0))
            leaves = [_rows(params.input_kernel), _rows(params.recurrent_kernel), np.asarray(params.bias).reshape(-1)]
            names = ["weight_ih", "weight_hh", "bias"]
            if not is_lstm:
                names, leaves = [*names, "bias_n"], [*leaves, np.asarray(params.recurrent_bias)[0]]
            return eqx.tree_at(lambda c: [getattr(c, name) for name in names], cell, leaves)

        def to_core(cell: Any) -> rnncore.CellParams:
            kernels = [w.T.reshape(w.shape[1], -1, hidden) for w in (cell.weight_ih, cell.weight_hh)]
            second = None if is_lstm else cell.bias_n[None]
            return rnncore.CellParams(kernels[0], kernels[1], cell.bias.reshape(-1, hidden), second, ())

        def layer(cell: Any, xs: Any) -> Any:
            def one(sequence: Any) -> Any:
                zeros = jnp.zeros(hidden, sequence.dtype)

                def step(state: Any, x: Any) -> Any:
                    state = cell(x, state)
                    return state, state[0] if is_lstm else state

                return jax.lax.scan(step, (zeros, zeros) if is_lstm else zeros, sequence)[1]

            return jax.vmap(one)(xs)

        return jax_programs.build(layer, to_equinox(problem.params), to_core, case, problem, measurement)
