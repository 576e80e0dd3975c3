"""Finds the recurrent layers of a Flax model while it runs, records them, and runs them with added terms.

An interceptor takes the place of every layer.  What it needs and what it keeps are collections of the model, so that
`nn.remat` and `nn.jit` between the model and the layer handle them like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import errors
from flax.traverse_util import flatten_dict, unflatten_dict

from rnncore import flax_modules as modules
from rnncore._types import Array, PyTree
from rnncore.cells import Cell
from rnncore.flax_recording import foreign_of, record_rnn
from rnncore.layers.layer_modules import run_layers
from rnncore.layers.recording import Layer, LayerRun, Moves, run_moved, run_stack, zero_moves
from rnncore.linen.bidirectional import Bidirectional
from rnncore.linen.convert import TREES, class_of, unfit_functions
from rnncore.linen.flax_scan import has_plain_parameters
from rnncore.linen.layers import Layers
from rnncore.linen.rnn import RNN, initializer

RUNS, MOVES = "rnncore_runs", "rnncore_moves"
RNNS = (RNN, nn.RNN)
BIDIRECTIONAL = (Bidirectional, nn.Bidirectional)


class Recorder:
    """A model and how to call it, as a function of what is added to its recurrent layers.

    Attributes:
      layers: by name, what is static about every layer that the last call went through.
      left_out: by name, why a layer could not be recorded; it then ran normally.
    """

    def __init__(self, model: nn.Module, variables: Mapping[str, Any], call: Callable[[nn.Module], Any], rngs: Any):
        self.model, self.variables, self.call, self.rngs = model, dict(variables), call, rngs
        self.layers: dict[str, Layer] = {}
        self.left_out: dict[str, str] = {}
        self._places: dict[str, tuple[str, ...]] = {}
        self._names: dict[tuple[str, ...], str] = {}

    def __call__(self, moves: Mapping[str, Moves] | None = None) -> tuple[Any, dict[str, LayerRun]]:
        """(outputs of the model, what ran by the name of the layer)."""
        given = unflatten_dict({self._places[name]: move for name, move in (moves or {}).items()})
        self.layers, self.left_out, self._places, self._names = {}, {}, {}, {}
        variables = {k: v for k, v in self.variables.items() if k not in (RUNS, MOVES)} | {MOVES: given}
        mutable = [RUNS, *(k for k in self.variables if k != "params")]
        with nn.intercept_methods(self._intercept):
            outputs, state = self.model.apply(
                variables, mutable=mutable, rngs=self.rngs, method=lambda module: self.call(module)
            )
        runs = flatten_dict(state.get(RUNS, {}))
        return outputs, {name: runs[path] for name, path in self._places.items()}

    def _intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or module.is_initializing():
            return next_fun(*args, **kwargs)
        if type(module) in BIDIRECTIONAL:
            for child, way in ((module.forward_rnn, "forward"), (module.backward_rnn, "backward")):
                self._names.setdefault(child.path, f"{self._name(module)}/{way}")
        run = self._rnn if type(module) in RNNS else self._layers if isinstance(module, Layers) else None
        if run is None:
            return next_fun(*args, **kwargs)
        try:
            if not module.is_mutable_collection(RUNS):
                raise NotImplementedError("it is inside nn.scan, nn.vmap or a similar transformation")
            return run(module, *args, **kwargs)
        except NotImplementedError as error:
            self.left_out[self._name(module)] = str(error)
            with modules.without_warning():  # that there is an interceptor
                return next_fun(*args, **kwargs)

    def _name(self, module: nn.Module) -> str:
        return self._names.get(module.path, "/".join(module.path) or type(module).__name__)

    def _visit(self, module: nn.Module, base: str, name: str, layer: Layer, run: LayerRun) -> Any:
        """Runs a layer with what the collection says, and keeps what ran in the other."""
        count = 0
        while module.has_variable(RUNS, leaf := f"{name}_{count}"):
            count += 1
        whole = base if not name else f"{base}/{name}"
        whole = whole if not count else f"{whole} (call {count + 1})"
        self.layers[whole], self._places[whole] = layer, (*module.path, leaf)
        moves = module.get_variable(MOVES, leaf) if module.has_variable(MOVES, leaf) else zero_moves(layer.cell, run)
        module.put_variable(RUNS, leaf, run)
        return run_moved(layer.cell, run, moves)

    def _rnn(self, rnn: Any, inputs: Array, *, init_key: Array | None = None, **options: Any) -> Any:
        """What the call of an `RNN` returns."""
        if not has_plain_parameters(rnn):
            raise NotImplementedError("its parameters are not simply the same at every step")
        call = modules.call_of(rnn, inputs, initializer(rnn.cell, init_key), **options)
        visit = functools.partial(self._visit, rnn, self._name(rnn))
        return record_rnn(visit, rnn, call, *_cell_of(rnn.cell, call))

    def _layers(self, layers: Any, xs: Array, *, deterministic: bool | None = None, **options: Any) -> Any:
        """What the call of an `LSTM`, `GRU` or `Elman` layer returns."""
        if layers.stack.is_random and not (layers.deterministic if deterministic is None else deterministic):
            raise NotImplementedError("its dropout is drawn; call the model with deterministic=True")
        run = functools.partial(run_stack, functools.partial(self._visit, layers, self._name(layers)))
        stack, params = layers.functional(layers.variables["params"])
        return run_layers(layers, stack, params, xs, run=run, **options)


def _cell_of(cell: Any, call: modules.Call) -> tuple[Cell, PyTree]:
    """The functional cell and its parameters, or a `foreign_cell` where the equations are not known."""
    kind = class_of(cell)
    weights = nn.meta.unbox(cell.variables["params"])
    if kind in TREES and TREES[kind].is_complete(cell, weights):
        if unfit_functions(cell, call.carry) is None:
            return TREES[kind].assemble(cell, weights, call.inputs, jax.tree.leaves(call.carry)[-1])
    alone = cell.clone(parent=None, name=None)

    def step(weights: PyTree, carry: Any, x: Array) -> tuple[Any, Array]:
        try:
            return alone.apply({"params": weights}, carry, x)
        except errors.InvalidRngError as error:
            raise NotImplementedError(f"its cell {kind.__name__} draws random numbers in every step") from error

    return foreign_of(step, weights, cell, call), weights
