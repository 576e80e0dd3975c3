"""Finds the recurrent layers of an nnx model while it runs, records them, and runs them with added terms.

In a copy of the model every recurrent layer is replaced by a class of this file, whose call records its run.  Its
inputs and records are variables of the layer, so that `nnx.jit` and `nnx.remat` inside the model handle them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rnncore import flax_modules as modules
from rnncore._types import Array, PyTree
from rnncore.layers.foreign import foreign_cell
from rnncore.layers.recording import Layer, LayerRun, Moves, run_layer, run_moved, run_stack, zero_moves
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

    @property
    def layers(self) -> dict[str, Layer]:
        return self._tape.layers

    @property
    def left_out(self) -> dict[str, str]:
        return self._tape.left_out

    def __call__(self, moves: Mapping[str, Moves] | None = None) -> tuple[Any, dict[str, LayerRun]]:
        """(outputs of the model, what ran by the name of the layer)."""
        before, self._tape = self._tape, Tape()
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


def _or_as_always(node: Any, record: Callable[..., Any], plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return record(node, *args, **kwargs)
    except NotImplementedError as error:
        tape, name, _ = node.rnncore_place
        tape.left_out[name] = str(error)
        return plain(node, *args, **kwargs)


class _RecordedRNN(rnn.RNN):
    def __call__(self, inputs: Array, **options: Any) -> Any:
        return _or_as_always(self, _run_rnn, rnn.RNN.__call__, inputs, **options)


class _RecordedFlaxRNN(nnx.RNN):
    def __call__(self, inputs: Array, **options: Any) -> Any:
        return _or_as_always(self, _run_rnn, nnx.RNN.__call__, inputs, **options)


def _recorded_layers(kind: type) -> type:
    def call(self: Any, xs: Array, **options: Any) -> Any:
        return _or_as_always(self, _run_layers, kind.__call__, xs, **options)

    return type(f"_Recorded{kind.__name__}", (kind,), {"__call__": call})


RECORDED: dict[type, type] = {rnn.RNN: _RecordedRNN, nnx.RNN: _RecordedFlaxRNN} | {
    kind: _recorded_layers(kind) for kind in (layers.LSTM, layers.GRU, layers.Elman)
}


def _run_rnn(
    node: Any, inputs: Array, *, initial_carry: Any = None, seq_lengths: Any = None, return_carry: bool | None = None,
    time_major: bool | None = None, reverse: bool | None = None, keep_order: bool | None = None, rngs: Any = None,
    resets: Any = None, reset_carry: Any = None, return_states: bool = False,
) -> Any:  # fmt: skip
    """What the call of an `RNN` returns."""
    if return_states:
        raise NotImplementedError("it is called with return_states=True")
    if node.state_axes != nnx.StateAxes(rnn._AXES) or node.broadcast_rngs is not None:
        raise NotImplementedError("state_axes or broadcast_rngs say how its state goes through the steps")
    call = modules.call_of(
        node, inputs, return_carry=return_carry, time_major=time_major, reverse=reverse, keep_order=keep_order
    )  # fmt: skip
    cell, step_shape = node.cell, call.step_shape
    features = cell.num_feature_axes
    carry = initial_carry
    if carry is None:
        stream = node.rngs if rngs is None else rngs
        if stream is None and initial.is_random(cell):
            raise NotImplementedError("its initial carry is random; give initial_carry")
        carry = initial.carry(cell, step_shape, stream)
    carry = modules.cast(carry, getattr(node, "carry_dtype", None))
    reset_carry = modules.checked_reset_carry(reset_carry, carry, resets)
    known = trees.why_unknown(cell) is None
    core: Any
    if known:
        core, params = trees.assemble(cell, inputs, jax.tree.leaves(carry)[-1])
        start, xs = modules.to_core(core, carry), jnp.asarray(inputs, params.input_kernel.dtype)
        y = jax.eval_shape(core.step, params, start, core.project(params, jnp.zeros(step_shape, xs.dtype)))[1]
    else:
        core, params = _foreign(cell, carry, step_shape)
        start = core.named_carry(jax.tree.leaves(carry))
        xs = inputs.reshape(*inputs.shape[: inputs.ndim - features], -1)
        y = jax.eval_shape(core.step_fn, params, carry, jnp.zeros(step_shape, inputs.dtype))[1]
    again = None if reset_carry is None else type(start)(*jax.tree.leaves(reset_carry))
    last, outputs, _, _ = run_layer(
        lambda name, layer, run: _visit(node, name, layer, run), "", core, params, xs, start, time_axis=call.time_axis,
        seq_lengths=seq_lengths, resets=resets, reset_carry=again, reverse=call.reverse, keep_order=call.keep_order,
    )  # fmt: skip
    outputs = modules.cast(outputs.astype(y.dtype), getattr(node, "output_dtype", None))
    back = modules.from_core(last) if known else jax.tree.unflatten(jax.tree.structure(carry), list(last))
    return (back, outputs) if call.return_carry else outputs


def _foreign(cell: Any, carry: Any, step_shape: tuple[int, ...]) -> tuple[Any, PyTree]:
    """(a cell of any kind as a functional one, its parameters)."""
    graph, *states = nnx.split(cell, nnx.Param, ...)
    params, rest = states
    if jax.tree.leaves(rest):
        raise NotImplementedError(
            f"its cell {type(cell).__name__} keeps state besides parameters (random numbers, statistics)"
        )

    def step(weights: PyTree, carry: Any, x: Array) -> tuple[Any, Array]:
        return nnx.merge(graph, params_like(weights), copy=True)(carry, x)

    lead = len(step_shape) - cell.num_feature_axes
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[lead:], a.dtype), carry)
    pure = nnx.to_pure_dict(params)

    def params_like(weights: PyTree) -> Any:
        state = jax.tree.map(lambda a: a, params)
        nnx.replace_by_pure_dict(state, weights)
        return state

    return foreign_cell(step, pure, one, features=step_shape[lead:]), pure


def _run_layers(
    node: Any, xs: Array, *, seq_lengths: Any = None, resets: Any = None, initial_carry: Any = None,
    return_carry: bool | None = None, return_states: bool = False, deterministic: bool | None = None, rngs: Any = None,
) -> Any:  # fmt: skip
    """What the call of an `LSTM`, `GRU` or `Elman` layer returns."""
    del rngs
    if node.stack.is_random and not (node.deterministic if deterministic is None else deterministic):
        raise NotImplementedError("its dropout is drawn; call model.eval() first")
    if return_states:
        raise NotImplementedError("it is called with return_states=True")
    stack, params = node.functional()
    last, outputs, _ = run_stack(
        lambda name, layer, run: _visit(node, name, layer, run), stack, params, xs, initial_carry=initial_carry,
        dtype=node.dtype, carry_dtype=node.carry_dtype if initial_carry is not None else modules.carry_dtype(node),
        output_dtype=node.output_dtype, seq_lengths=seq_lengths, resets=resets, time_major=node.time_major,
    )  # fmt: skip
    returned = node.return_carry if return_carry is None else return_carry
    return (last, outputs) if returned else outputs
