"""Finds the recurrent layers of an nnx model while it runs, records them, and runs them with added terms.

In a copy of the model every recurrent layer is replaced by a class of this file, whose call records its run.  Its
inputs and records are variables of the layer, so that `nnx.jit` and `nnx.remat` inside the model handle them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from rnncore import flax_modules as modules
from rnncore._types import Array, PyTree
from rnncore.flax_recording import foreign_of, record_rnn
from rnncore.layers.layer_modules import run_layers
from rnncore.layers.recording import Layer, LayerRun, Moves, run_moved, run_stack, zero_moves
from rnncore.nnx import initial, layers, rnn, trees


class Kept(nnx.Variable):
    """What ran in a layer, or what is added there."""


class Tape:
    """What one call of a model leaves behind in Python; equal to itself alone, so that nothing compiled is reused."""

    def __init__(self) -> None:
        self.layers: dict[str, Layer] = {}
        self.left_out: dict[str, str] = {}
        self.places: dict[str, tuple[Any, str]] = {}


class Recorder:
    """A model and how to call it, as a function of what is added to its recurrent layers.

    Attributes:
      layers: by name, what is static about every layer that the last call went through.
      left_out: by name, why a layer could not be recorded; it then ran normally.
    """

    def __init__(self, model: nnx.Module, call: Callable[[nnx.Module], Any]):
        self.graph, self.state = nnx.split(model)
        self.call = call
        self._tape = Tape()
        self.layers, self.left_out = self._tape.layers, self._tape.left_out

    def __call__(self, moves: Mapping[str, Moves] | None = None) -> tuple[Any, dict[str, LayerRun]]:
        """(outputs of the model, what ran by the name of the layer)."""
        before, self._tape = self._tape, Tape()
        self.layers, self.left_out = self._tape.layers, self._tape.left_out
        model = nnx.merge(self.graph, self.state, copy=True)
        nodes, names = {}, {}
        for path, node in nnx.iter_graph(model):
            if not isinstance(node, nnx.Module):
                continue
            name = "/".join(map(str, path)) or type(node).__name__
            if isinstance(node, nnx.Bidirectional):
                for child, way in ((node.forward_rnn, "forward"), (node.backward_rnn, "backward")):
                    names[id(child)] = f"{name}/{way}"
            if type(node) in RECORDED:
                nodes[path] = node
                names.setdefault(id(node), name)
        for path, node in nodes.items():
            kind = type(node)
            node.__class__ = RECORDED[kind]
            setattr(node, "rnncore_place", (self._tape, names[id(node)], path))  # noqa: B010
        for name, move in (moves or {}).items():
            path, leaf = before.places[name]
            setattr(nodes[path], f"rnncore_moves_{leaf}", Kept(move))
        outputs = self.call(model)
        runs = {
            name: getattr(nodes[path], f"rnncore_run_{leaf}").get_value()
            for name, (path, leaf) in self._tape.places.items()
        }
        return outputs, runs


def _visit(node: Any, name: str, layer: Layer, run: LayerRun) -> Any:
    """Runs a layer with what its variable says, and keeps what ran in another."""
    tape, base, path = node.rnncore_place
    count = 0
    while hasattr(node, f"rnncore_run_{name}_{count}"):
        count += 1
    leaf = f"{name}_{count}"
    whole = "/".join(filter(None, (base, name))) + (f" (call {count + 1})" if count else "")
    tape.layers[whole], tape.places[whole] = layer, (path, leaf)
    given = getattr(node, f"rnncore_moves_{leaf}", None)
    setattr(node, f"rnncore_run_{leaf}", Kept(run))
    return run_moved(layer.cell, run, zero_moves(layer.cell, run) if given is None else given.get_value())


def _run_rnn(node: Any, inputs: Array, *, rngs: Any = None, **options: Any) -> Any:
    """What the call of an `RNN` returns."""
    if node.state_axes != nnx.StateAxes(rnn._AXES) or node.broadcast_rngs is not None:
        raise NotImplementedError("state_axes or broadcast_rngs say how its state goes through the steps")
    cell, stream = node.cell, node.rngs if rngs is None else rngs

    def initialize(shape: tuple[int, ...]) -> Any:
        if stream is None and initial.is_random(cell):
            raise NotImplementedError("its initial carry is random; give initial_carry")
        return initial.carry(cell, shape, stream)

    call = modules.call_of(node, inputs, initialize, **options)
    known = trees.why_unknown(cell) is None
    core, params = trees.assemble(cell, inputs, jax.tree.leaves(call.carry)[-1]) if known else _foreign(cell, call)
    return record_rnn(functools.partial(_visit, node), node, call, core, params)


def _foreign(cell: Any, call: modules.Call) -> tuple[Any, PyTree]:
    """(a cell of any kind as a functional one, its parameters)."""
    graph, *states = nnx.split(cell, nnx.Param, ...)
    params, rest = states
    if jax.tree.leaves(rest):
        raise NotImplementedError(
            f"its cell {type(cell).__name__} keeps state besides parameters (random numbers, statistics)"
        )

    def step(weights: PyTree, carry: Any, x: Array) -> tuple[Any, Array]:
        state = jax.tree.map(lambda a: a, params)
        nnx.replace_by_pure_dict(state, weights)
        return nnx.merge(graph, state, copy=True)(carry, x)

    pure = nnx.to_pure_dict(params)
    return foreign_of(step, pure, cell, call), pure


def _run_layers(node: Any, xs: Array, *, deterministic: bool | None = None, rngs: Any = None, **options: Any) -> Any:
    """What the call of an `LSTM`, `GRU` or `Elman` layer returns."""
    del rngs
    if node.stack.is_random and not (node.deterministic if deterministic is None else deterministic):
        raise NotImplementedError("its dropout is drawn; call model.eval() first")
    run = functools.partial(run_stack, functools.partial(_visit, node))
    stack, params = node.functional()
    return run_layers(node, stack, params, xs, run=run, **options)


def _recorded(kind: type, record: Callable[..., Any]) -> type:
    """A class whose call records its run, or runs as always where that is not possible."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return record(self, *args, **options)
        except NotImplementedError as error:
            tape, name, _ = self.rnncore_place
            tape.left_out[name] = str(error)
            return kind.__call__(self, *args, **options)

    return type(f"_Recorded{kind.__name__}", (kind,), {"__call__": call})


RECORDED: dict[type, type] = {kind: _recorded(kind, _run_rnn) for kind in (rnn.RNN, nnx.RNN)}
RECORDED |= {kind: _recorded(kind, _run_layers) for kind in (layers.LSTM, layers.GRU, layers.Elman)}
