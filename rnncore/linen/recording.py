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
import jax.numpy as jnp
from flax import errors

from rnncore import flax_modules as modules
from rnncore._types import Array, PyTree
from rnncore.cells import pointwise
from rnncore.cells.base import Cell, PointwiseCell
from rnncore.layers.foreign import foreign_cell
from rnncore.layers.recording import Layer, LayerRun, Moves, run_layer, run_moved, run_stack, zero_moves
from rnncore.linen.bidirectional import Bidirectional
from rnncore.linen.convert import TREES, class_of
from rnncore.linen.flax_scan import has_plain_parameters
from rnncore.linen.layers import Layers
from rnncore.linen.rnn import RNN
from rnncore.sequence.call import States

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
        given: dict[str, Any] = {}
        for name, move in (moves or {}).items():
            *path, leaf = self._places[name]
            place = given
            for part in path:
                place = place.setdefault(part, {})
            place[leaf] = move
        self.layers, self.left_out, self._places, self._names = {}, {}, {}, {}
        variables = {k: v for k, v in self.variables.items() if k not in (RUNS, MOVES)} | {MOVES: given}
        mutable = [RUNS, *(k for k in self.variables if k != "params")]
        with nn.intercept_methods(self._intercept):
            outputs, state = self.model.apply(
                variables, mutable=mutable, rngs=self.rngs, method=lambda module: self.call(module)
            )
        runs = state.get(RUNS, {})
        return outputs, {name: functools.reduce(lambda d, k: d[k], path, runs) for name, path in self._places.items()}

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

    def _rnn(
        self, rnn: Any, inputs: Array, *, initial_carry: Any = None, init_key: Array | None = None,
        seq_lengths: Any = None, return_carry: bool | None = None, time_major: bool | None = None,
        reverse: bool | None = None, keep_order: bool | None = None, resets: Any = None,
        reset_carry: Any = None, return_states: bool = False,
    ) -> Any:  # fmt: skip
        """What the call of an `RNN` returns."""
        if not has_plain_parameters(rnn):
            raise NotImplementedError("its parameters are not simply the same at every step")
        features = rnn.cell.num_feature_axes
        call = modules.call_of(
            rnn, inputs, return_carry=return_carry, time_major=time_major, reverse=reverse, keep_order=keep_order
        )  # fmt: skip
        step_shape = call.step_shape
        carry = initial_carry
        if carry is None:
            carry = rnn.cell.initialize_carry(jax.random.key(0) if init_key is None else init_key, step_shape)
        carry = modules.cast(carry, getattr(rnn, "carry_dtype", None))
        reset_carry = modules.checked_reset_carry(reset_carry, carry, resets)
        cell, params, start, known = _cell_of(rnn.cell, inputs, carry, step_shape)
        again = None if reset_carry is None else type(start)(*jax.tree.leaves(reset_carry))
        xs = jnp.asarray(inputs, params.input_kernel.dtype) if known else inputs
        xs = xs.reshape(*xs.shape[: xs.ndim - features], -1)
        visit = functools.partial(self._visit, rnn, self._name(rnn))
        last, outputs, carries, gates = run_layer(
            lambda _, layer, run: visit("", layer, run), "", cell, params, xs, start, time_axis=call.time_axis,
            seq_lengths=seq_lengths, resets=resets, reset_carry=again, reverse=call.reverse,
            keep_order=call.keep_order,
        )  # fmt: skip
        back = modules.from_core if known else lambda c: jax.tree.unflatten(jax.tree.structure(carry), list(c))
        y = jax.eval_shape(lambda: rnn.cell.clone(parent=None, name=None).apply(
            {"params": nn.meta.unbox(rnn.cell.variables["params"])}, carry, jnp.zeros(step_shape, inputs.dtype)
        )[1])  # fmt: skip
        outputs = modules.cast(outputs.astype(y.dtype), getattr(rnn, "output_dtype", None))
        result = (back(last), outputs) if call.return_carry else (outputs,)
        if return_states:
            result = (*result, States(back(carries), gates if known else None))
        return result[0] if len(result) == 1 else result

    def _layers(
        self, layers: Any, xs: Array, *, seq_lengths: Any = None, resets: Any = None, initial_carry: Any = None,
        return_carry: bool | None = None, return_states: bool = False, deterministic: bool | None = None,
    ) -> Any:  # fmt: skip
        """What the call of an `LSTM`, `GRU` or `Elman` layer returns."""
        said = layers.deterministic if deterministic is None else deterministic
        if layers.stack.is_random and not said:
            raise NotImplementedError("its dropout is drawn; call the model with deterministic=True")
        if return_states:
            raise NotImplementedError("it is called with return_states=True")
        stack, params = layers.functional(layers.variables["params"])
        base = self._name(layers)
        last, outputs, _ = run_stack(
            functools.partial(self._visit, layers, base), stack, params, xs, initial_carry=initial_carry,
            dtype=layers.dtype,
            carry_dtype=layers.carry_dtype if initial_carry is not None else modules.carry_dtype(layers),
            output_dtype=layers.output_dtype, seq_lengths=seq_lengths, resets=resets, time_major=layers.time_major,
        )  # fmt: skip
        returned = layers.return_carry if return_carry is None else return_carry
        return (last, outputs) if returned else outputs


def _cell_of(cell: Any, inputs: Array, carry: Any, step_shape: tuple[int, ...]) -> tuple[Cell, PyTree, Any, bool]:
    """(functional cell, its parameters, its carry, whether its equations are known)."""
    kind = class_of(cell)
    weights = nn.meta.unbox(cell.variables["params"])
    if kind in TREES and TREES[kind].is_complete(cell, weights):
        functions = [getattr(cell, name) for name in ("gate_fn", "activation_fn") if hasattr(cell, name)]
        if not any(isinstance(function, nn.Module) for function in functions):
            core, params = TREES[kind].assemble(cell, weights, inputs, jax.tree.leaves(carry)[-1])
            if not isinstance(core, PointwiseCell) or pointwise.why_not_elementwise(core) is None:
                return core, params, modules.to_core(core, carry), True
    alone = cell.clone(parent=None, name=None)

    def step(weights: PyTree, carry: Any, x: Array) -> tuple[Any, Array]:
        try:
            return alone.apply({"params": weights}, carry, x)
        except errors.InvalidRngError as error:
            raise NotImplementedError(f"its cell {kind.__name__} draws random numbers in every step") from error

    lead = len(step_shape) - cell.num_feature_axes
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[lead:], a.dtype), carry)
    foreign = foreign_cell(step, weights, one, features=step_shape[lead:])
    start = foreign.named_carry(jax.tree.leaves(carry))
    return foreign, weights, start, False
