"""What the recorders of both Flax flavours share: the call of an RNN module, recorded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rnncore import flax_modules as modules
from rnncore._types import PyTree
from rnncore.cells import Cell
from rnncore.layers.foreign import ForeignCell, foreign_cell
from rnncore.layers.recording import Visit, run_layer
from rnncore.sequence.call import States


def record_rnn(visit: Visit, rnn: Any, call: modules.Call, cell: Cell, params: PyTree) -> Any:
    """What the call of an RNN module returns, through its functional cell or a `foreign_cell` of it."""
    features, xs = rnn.cell.num_feature_axes, call.inputs
    enter: Any
    leave: Any
    if isinstance(cell, ForeignCell):
        structure = jax.tree.structure(call.carry)
        enter, leave = lambda c: cell.named_carry(jax.tree.leaves(c)), lambda c: jax.tree.unflatten(structure, list(c))
        dtype = jax.eval_shape(cell.step_fn, params, call.carry, jnp.zeros(call.step_shape, xs.dtype))[1].dtype
    else:
        enter, leave = functools.partial(modules.to_core, cell), modules.from_core
        xs = jnp.asarray(xs, params.input_kernel.dtype)
        dtype = modules.output_dtype(call, cell, params, enter(call.carry), xs.dtype)
    last, outputs, carries, gates = run_layer(
        visit, "", cell, params, xs.reshape(*xs.shape[: xs.ndim - features], -1), initial_carry=enter(call.carry),
        seq_lengths=call.seq_lengths, resets=call.resets,
        reset_carry=None if call.reset_carry is None else enter(call.reset_carry), reverse=call.reverse,
        keep_order=call.keep_order, time_major=call.time_major,
    )  # fmt: skip
    gates = None if isinstance(cell, ForeignCell) else gates
    states = (States(leave(carries), gates),) if call.return_states else ()
    return modules.result_of(rnn, call, leave(last), outputs.astype(dtype), *states)


def foreign_of(step: Callable[..., Any], params: PyTree, cell: Any, call: modules.Call) -> ForeignCell:
    """Flax's cell as a `foreign_cell`, from its step as a function of the parameters."""
    lead = len(call.step_shape) - cell.num_feature_axes
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[lead:], a.dtype), call.carry)
    return foreign_cell(step, params, one, features=call.step_shape[lead:])
