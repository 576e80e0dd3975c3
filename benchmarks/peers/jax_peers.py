"""The peers that are JAX libraries: Flax, Haiku, Equinox.

Haiku has one kernel for [x, h], gates in the order i, g, f, o, and adds 1 to the forget gate; its GRU and VanillaRNN
are other cells than those of the other libraries.  Equinox has a cell for one vector: `lax.scan` over time and `vmap`
over the batch, as its documentation has it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from benchmarks.peers.base import PRECISIONS, Built, Case, Peer
from benchmarks.peers.problem import Problem, wide
from rnncore._command import timing


class Layer(NamedTuple):
    """How to run a layer of a library.

    Fields:
      apply: (its own tree of parameters, inputs (B, T, D)) -> outputs (B, T, H).
      own: `rnncore.CellParams` in its own tree.
      core: the way back, of gradients in NumPy.
    """

    apply: Callable[[Any, Any], Any]
    own: Callable[[Any], Any] = lambda params: params
    core: Callable[[Any], Any] = lambda params: params


def build(
    layer: Layer, case: Case, problem: Problem, measurement: str, compiler_options: dict[str, Any] | None = None,
    algorithm: str | None = None,
) -> Built:  # fmt: skip
    """Jits, lowers and compiles one measurement.

    Trees of parameters are flattened outside the program: the time that Python takes to flatten a library's own
    containers at every call is not measured.
    """
    precision = PRECISIONS[case.precision]
    pinned = contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)
    # The suite may run where x64 is on; libraries that make zeros would make float64 ones.
    with jax.enable_x64(False), pinned:
        leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, layer.own(problem.params)))
        xs, cotangent = jnp.asarray(problem.xs), jnp.asarray(problem.cotangent)

        def outputs(leaves: list, xs: Any) -> Any:
            return layer.apply(jax.tree.unflatten(tree, leaves), xs)

        def loss(leaves: list, xs: Any, cotangent: Any) -> Any:
            return jnp.vdot(outputs(leaves, xs), cotangent, preferred_element_type=jnp.float32)

        is_forward = measurement == "forward"
        step = outputs if is_forward else jax.value_and_grad(loss, (0, 1))
        arguments = (leaves, xs) if is_forward else (leaves, xs, cotangent)
        compiled, figures = timing.compile_step(jax.jit(step), arguments, compiler_options)
    call = functools.partial(compiled, *arguments)

    def result() -> Any:
        out = wide(call())
        return out if is_forward else (layer.core(jax.tree.unflatten(tree, out[1][0])), out[1][1])

    return Built(call, jax.block_until_ready, result, figures, algorithm)


@dataclasses.dataclass(frozen=True)
class JaxPeer(Peer):
    """A JAX library.

    Fields:
      names: contenders by cell.
      layer: (contender, cell, units, dtype) -> its layer.
    """

    library: str
    package: str
    module: str
    names: dict[str, tuple[str, ...]]
    layer: Callable[[str, str, int, Any], Layer]

    def contenders(self, cell: str) -> tuple[str, ...]:
        return self.names.get(cell, ())

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        layer = self.layer(contender, case.workload.cell, case.workload.hidden, case.dtype)
        return build(layer, case, problem, measurement)


# The side of a gate that carries its bias, and the gates; a GRU's n has a second one on the recurrent side.
GATES: dict[str, tuple[str, Sequence[str]]] = {"lstm": ("h", "ifgo"), "gru": ("i", "rzn"), "elman": ("i", [""])}


def linen(contender: str, cell: str, hidden: int, dtype: Any = "float32") -> Layer:
    """`flax.linen.RNN(cell)`; parameters {"ii": {"kernel": ...}, "hi": {"kernel": ..., "bias": ...}, ...}."""
    import flax.linen as nn

    biased, gates = GATES[cell]

    def own(params: rnncore.CellParams) -> dict[str, Any]:
        tree: dict[str, dict[str, Any]] = {}
        for n, gate in enumerate(gates):
            tree[f"i{gate}"] = {"kernel": params.input_kernel[:, n]}
            tree[f"h{gate}"] = {"kernel": params.recurrent_kernel[:, n]}
            tree[f"{biased}{gate}"]["bias"] = params.bias[n]  # type: ignore[index]
        if params.recurrent_bias is not None:
            tree["hn"]["bias"] = params.recurrent_bias[0]
        return {"params": {"cell": tree}}

    def core(tree: dict[str, Any]) -> rnncore.CellParams:
        mine = tree["params"]["cell"]

        def stack(side: str, leaf: str, axis: int) -> Any:
            return np.stack([mine[f"{side}{gate}"][leaf] for gate in gates], axis)

        second = mine["hn"]["bias"][None] if cell == "gru" else None
        kernels = stack("i", "kernel", 1), stack("h", "kernel", 1)
        return rnncore.CellParams(*kernels, stack(biased, "bias", 0), second, ())

    make = getattr(nn, contender.removeprefix("flax.linen "))
    # Only the shapes of what this would draw are looked at, and the orthogonal default has none in half types.
    zeros, kind = nn.initializers.zeros_init(), jnp.dtype(dtype)
    return Layer(nn.RNN(make(hidden, dtype=kind, param_dtype=kind, recurrent_kernel_init=zeros)).apply, own, core)


def haiku(contender: str, cell: str, hidden: int, dtype: Any) -> Layer:
    """`haiku.dynamic_unroll(haiku.LSTM(H), ..., time_major=False)`."""
    import haiku as hk

    order = [0, 2, 1, 3]  # of i, f, g, o: Haiku's i, g, f, o; its own inverse

    def own(params: rnncore.CellParams) -> dict[str, dict[str, Any]]:
        whole = np.concatenate([np.asarray(k)[:, order] for k in (params.input_kernel, params.recurrent_kernel)], 0)
        bias = np.array(params.bias)
        bias[1] -= 1
        return {"lstm/linear": {"w": whole.reshape(len(whole), -1), "b": bias[order].reshape(-1)}}

    def core(tree: dict[str, dict[str, Any]]) -> rnncore.CellParams:
        mine = tree["lstm/linear"]
        whole = mine["w"].reshape(len(mine["w"]), 4, hidden)[:, order]
        return rnncore.CellParams(whole[:-hidden], whole[-hidden:], mine["b"].reshape(4, hidden)[order], None, ())

    def layer(xs: Any) -> Any:
        made = hk.LSTM(hidden)
        # Its initial states are float32 whatever the inputs are.
        start = jax.tree.map(lambda a: a.astype(xs.dtype), made.initial_state(xs.shape[0]))
        return hk.dynamic_unroll(made, xs, start, time_major=False)[0]

    return Layer(hk.without_apply_rng(hk.transform(layer)).apply, own, core)


def equinox(contender: str, cell: str, hidden: int, dtype: Any) -> Layer:
    """`equinox.nn.LSTMCell` and `GRUCell`; kernels (G*H, D)."""
    import equinox as eqx

    is_lstm = cell == "lstm"
    names = ["weight_ih", "weight_hh", "bias", *([] if is_lstm else ["bias_n"])]

    def own(params: rnncore.CellParams) -> Any:
        with jax.enable_x64(False):
            make = eqx.nn.LSTMCell if is_lstm else eqx.nn.GRUCell
            made = make(params.input_kernel.shape[0], hidden, key=jax.random.key(0))
        kernels = [np.asarray(k).reshape(len(k), -1).T for k in (params.input_kernel, params.recurrent_kernel)]
        second = [] if params.recurrent_bias is None else [np.asarray(params.recurrent_bias)[0]]
        leaves = [*kernels, np.asarray(params.bias).reshape(-1), *second]
        return eqx.tree_at(lambda c: [getattr(c, name) for name in names], made, leaves)

    def core(made: Any) -> rnncore.CellParams:
        given, recurrent = (w.T.reshape(w.shape[1], -1, hidden) for w in (made.weight_ih, made.weight_hh))
        second = None if is_lstm else made.bias_n[None]
        return rnncore.CellParams(given, recurrent, made.bias.reshape(-1, hidden), second, ())

    def apply(made: Any, xs: Any) -> Any:
        def one(sequence: Any) -> Any:
            zeros = jnp.zeros(hidden, sequence.dtype)

            def step(state: Any, x: Any) -> Any:
                state = made(x, state)
                return state, state[0] if is_lstm else state

            return jax.lax.scan(step, (zeros, zeros) if is_lstm else zeros, sequence)[1]

        return jax.vmap(one)(xs)

    return Layer(apply, own, core)


LINEN = {
    "lstm": ("flax.linen LSTMCell", "flax.linen OptimizedLSTMCell"), "gru": ("flax.linen GRUCell",),
    "elman": ("flax.linen SimpleCell",),
}  # fmt: skip
JAX_PEERS = (
    JaxPeer("flax.linen", "flax", "flax", LINEN, linen),
    JaxPeer("haiku", "dm-haiku", "haiku", {"lstm": ("haiku",)}, haiku),
    JaxPeer("equinox", "equinox", "equinox", {"lstm": ("equinox",), "gru": ("equinox",)}, equinox),
)
