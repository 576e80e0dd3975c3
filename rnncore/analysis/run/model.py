"""The runs of the recurrent layers of a model, and the gradient of its loss at every step of each layer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.analysis.run.flat import states_of
from rnncore.analysis.run.trajectory import Trajectory, cell_trajectory, check_finite, check_loss
from rnncore.cells.base import Cell
from rnncore.layers.recording import Layer, LayerRun, Moves, run_moved, run_stack, zero_moves
from rnncore.layers.stack import Stack, StackParams

Call = Callable[[Any, Any], Any]
"""(model, batch) to the outputs of the model; a linen model is bound to its variables."""


class RecurrentLayer(NamedTuple):
    """One recurrent layer and direction of a model, as it ran.

    Fields:
      name: its path in the model, with "(call 2)" for a second call.
      cell, params: the functional cell and its parameters.
      run: its trajectory, in the order of its steps: that of a reverse layer starts at the last input.
      reverse: whether the layer reads its inputs backwards.
      dtype: in which the model runs it; half precision is analysed in float32.
      states: dL/ds_t, a carry of arrays (*batch, T + 1, ...), where there is a loss.
      inputs: dL/dx_t, (*batch, T, D), where there is a loss.
    """

    name: str
    cell: Cell
    params: PyTree
    run: Trajectory
    reverse: bool
    dtype: str
    states: Any = None
    inputs: Array | None = None

    def __repr__(self) -> str:
        way = ", backwards" if self.reverse else ""
        return f"RecurrentLayer({self.name!r}: {self.run!r}{way})"


class Record(NamedTuple):
    """What one pass through a model leaves.

    Fields:
      value: the loss; None without one.
      layers: by name.
      left_out: why other layers could not be recorded, by name.
    """

    value: Array | None
    layers: dict[str, RecurrentLayer]
    left_out: dict[str, str]


def recurrent_layers(
    model: Any, *arguments: Any, call: Call | None = None, rngs: Any = None
) -> dict[str, RecurrentLayer]:
    """The recurrent layers of a Flax model by name, each with its functional cell, parameters and trajectory.

    Args:
      model: a flax.linen or flax.nnx model, with layers of rnncore or Flax, however nested.
      arguments: (variables, batch) for a linen model; (batch,) for an nnx model.
      call: (model, batch) to outputs; by default `model(inputs)`, where the inputs are the batch itself or the first
        entry of a tuple or list.
      rngs: passed to `apply` of a linen model.

    Returns:
      A dict from names to `RecurrentLayer`, in the order in which they run.

    Raises:
      ValueError: arguments that do not fit; a model in which no recurrent layer runs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import analysis, linen as nn
      >>> model, xs = nn.Sequential([nn.Dense(3), nn.RNN(nn.GRUCell(4)), nn.LSTM(5)]), jnp.ones((2, 6, 3))
      >>> for layer in analysis.recurrent_layers(model, model.init(jax.random.key(0), xs), xs).values():
      ...     print(layer.name, type(layer.cell).__name__, layer.run.carries.h.shape)
      layers_1 GRU (2, 7, 4)
      layers_2/forward_0 LSTM (2, 7, 5)
    """
    recorder, _ = recorder_of("recurrent_layers", model, arguments, call, rngs)
    return record("recurrent_layers", recorder).layers


def trajectory(model: Any, *arguments: Any, **options: Any) -> Any:
    """Runs a cell, or the recurrent layers of a module, and records every carry and gate.

    s_t, gates_t = update(params, s_{t-1}, z_t),   z_t = project(params, x_t),   t = 1 .. T

    A step with a reset starts from `reset_carry`, a constant: its Jacobian d s_t / d s_{t-1} is exactly 0, and
    so is every product across it.  A step in the padding leaves the carry as it is: its Jacobian is the identity.

    Args:
      model, arguments: (cell, params, xs[, initial_carry]) for any rnncore cell, a `foreign_cell` included;
        (stack, params, xs) for a `Stack`; (module, variables, xs) for a linen RNN, Bidirectional or layer, (module, xs)
        for an nnx one.  xs: inputs (*batch, T, D) with any number of batch axes.  Half precision is analysed in
        float32, which the trajectory's repr shows.
      options: initial_carry, seq_lengths, resets, reset_carry as in `rnncore.unroll`, or options of the module's call.
        With lengths each sequence ends at its own last step, to which anchor "end" refers; the padding is ignored.

    Returns:
      `Trajectory`, or a dict of them by name if the module has several layers or directions.

    Raises:
      ValueError: inputs that are not floating point or have no steps; parameters, inputs or states
        that are not finite, which is not checked inside jit.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))
      >>> run.carries.c.shape, run.gates.f.shape
      ((2, 6, 4), (2, 5, 4))
    """
    if isinstance(model, Cell):
        return cell_trajectory(model, *arguments, **options)
    if isinstance(model, Stack):
        recorder: Any = _StackRecorder(model, *arguments, **options)
    else:
        recorder, _ = recorder_of("trajectory", model, arguments, lambda bound, xs: bound(xs, **options), None)
    found = {name: layer.run for name, layer in record("trajectory", recorder).layers.items()}
    return found if len(found) > 1 else next(iter(found.values()))


def recorder_of(name: str, model: Any, arguments: tuple, call: Call | None, rngs: Any) -> tuple[Any, Any]:
    """(a model as a function of what is added to its layers, the batch)."""
    kind = _flavour(model)
    if kind is None:
        also = "an rnncore cell or Stack, or " if name == "trajectory" else ""
        raise ValueError(f"`{name}(model=<{type(model).__name__}>)`: expected {also}a flax.linen or flax.nnx model.")
    expected = 2 if kind == "linen" else 1
    if len(arguments) != expected:
        want = "(model, variables, batch)" if kind == "linen" else "(model, batch)"
        raise ValueError(
            f"`{name}` of a flax.{kind} model: expected {want} and options by name, got "
            f"{len(arguments)} argument(s) after the model."
        )
    *variables, batch = arguments
    if kind == "linen" and not (isinstance(variables[0], Mapping) and "params" in variables[0]):
        names = f" of {', '.join(map(str, variables[0]))}" if isinstance(variables[0], Mapping) else ""
        raise ValueError(
            f"`{name}(model, variables=<{type(variables[0]).__name__}{names}>, ...)`: expected the variables as "
            "`model.init(key, inputs)` returns them, with 'params'."
        )
    chosen = _call_inputs if call is None else call
    # Imports Flax only for a Flax model.
    if kind == "linen":
        from rnncore.linen import recording

        return recording.Recorder(model, variables[0], lambda bound: chosen(bound, batch), rngs), batch
    from rnncore.nnx import recording as nnx_recording

    return nnx_recording.Recorder(model, lambda bound: chosen(bound, batch)), batch


def _flavour(model: Any) -> str | None:
    modules = {
        base.__module__.split(".")[:2][-1] for base in type(model).__mro__ if base.__module__.startswith("flax.")
    }
    return "linen" if "linen" in modules else "nnx" if "nnx" in modules else None


def _call_inputs(model: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        raise ValueError(
            f"`batch=<mapping of {', '.join(map(str, batch))}>`: pass call=lambda model, batch: ..., which calls "
            "the model on its inputs."
        )
    whole = not isinstance(batch, tuple | list)
    inputs = batch if whole else batch[0]
    try:
        return model(inputs)
    except TypeError:
        try:
            inspect.signature(model.__call__).bind(inputs)
        except TypeError as error:
            raise ValueError(
                f"`batch=<{type(batch).__name__}>`: {type(model).__name__} is called as "
                f"model(batch{'' if whole else '[0]'}), but {error}; pass call=lambda model, batch: ..., which calls "
                "the model on its inputs."
            ) from None
        raise


class _StackRecorder:
    """The counterpart of the recorders of Flax models, for a `Stack`."""

    def __init__(self, stack: Stack, params: StackParams, xs: Array, *, initial_carry: Any = None,
                 seq_lengths: Any = None, resets: Any = None, time_major: bool = False):  # fmt: skip
        self.run = functools.partial(
            run_stack, stack=stack, params=params, xs=xs, initial_carry=initial_carry, dtype=None, carry_dtype=None,
            output_dtype=None, seq_lengths=seq_lengths, resets=resets, time_major=time_major,
        )  # fmt: skip
        self.layers: dict[str, Layer] = {}
        self.left_out: dict[str, str] = {}

    def __call__(self, moves: Mapping[str, Moves] | None = None) -> tuple[Any, dict[str, LayerRun]]:
        runs: dict[str, LayerRun] = {}

        def visit(name: str, layer: Layer, run: LayerRun) -> Any:
            self.layers[name], runs[name] = layer, run
            return run_moved(layer.cell, run, zero_moves(layer.cell, run) if moves is None else moves[name])

        return self.run(visit)[1], runs


def record(call: str, recorder: Any, loss: Callable[[Any], Array] | None = None) -> Record:
    """Runs a model once, and with a loss once back.

    Args:
      call: for messages.
      recorder: from what is added to the layers, by name, to (outputs, `LayerRun`s by name), with the attributes
        `layers` and `left_out`.
      loss: outputs to one number.
    """
    shapes = jax.eval_shape(lambda: recorder()[1])
    layers = dict(recorder.layers)
    if not layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in recorder.left_out.items())
        raise ValueError(
            f"`{call}(model, ...)`: the model runs no recurrent layer that can be analysed"
            f"{f' ({why})' if why else ''}; expected an RNN around a cell, or a layer of rnncore (LSTM, GRU, Elman); "
            "wrap a loop of your own with `rnncore.foreign_cell`."
        )
    value: Any = None
    gradients: dict[str, Any] = dict.fromkeys(layers)
    if loss is None:
        _, runs = recorder()
    else:
        zeros = {
            name: jax.tree.map(
                lambda a: jnp.zeros(a.shape, a.dtype),
                jax.eval_shape(functools.partial(zero_moves, layer.cell), shapes[name]),
            )
            for name, layer in layers.items()
        }

        def whole(moves: dict[str, Moves]) -> tuple[Array, dict[str, LayerRun]]:
            outputs, runs = recorder(moves)
            value = jnp.asarray(loss(outputs))
            check_loss(call, value)
            return value, runs

        value, pull, runs = jax.vjp(whole, zeros, has_aux=True)
        (gradients,) = pull(jnp.ones_like(value))
        check_finite(f"{call}(...)", gradients, "the gradient leaves the floating-point range; shorten or use float64")
    found = {}
    for name, layer in layers.items():
        arrays = runs[name]
        run = cell_trajectory(
            layer.cell, arrays.params, arrays.xs, arrays.initial_carry, seq_lengths=arrays.seq_lengths,
            resets=arrays.resets, reset_carry=arrays.reset_carry,
        )  # fmt: skip
        moves, states, inputs = gradients[name], None, None
        if moves is not None:  # dL/ds_t and dL/dx_t
            states, inputs = states_of(moves.start, moves.states, len(run.batch_shape)), moves.inputs
        found[name] = RecurrentLayer(name, layer.cell, arrays.params, run, layer.reverse, layer.dtype, states, inputs)
    return Record(value, found, dict(recorder.left_out))
