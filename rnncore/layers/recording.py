"""Recurrent layers that record their runs, and add zeros with respect to which a loss can be differentiated.

A layer of a model is run here in the model's place, with something added to its inputs and to every state.  No Flax
in here: `rnncore.linen.recording` and `rnncore.nnx.recording` find the layers of a model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore import _lengths
from rnncore._types import Array, PyTree
from rnncore.cells.base import Cell, PointwiseCell
from rnncore.layers import compose
from rnncore.layers.stack import Stack, StackParams
from rnncore.sequence.call import States, unroll


class LayerRun(NamedTuple):
    """The arrays of one run of one layer and direction, batch-major, in the order in which the steps were taken.

    Fields:
      params: of the cell.
      xs: (*batch, T, D).
      initial_carry: (*batch, ...).
      seq_lengths, resets, reset_carry: as in `rnncore.unroll`, or None.
    """

    params: PyTree
    xs: Array
    initial_carry: Any
    seq_lengths: Array | None = None
    resets: Array | None = None
    reset_carry: Any = None


class Moves(NamedTuple):
    """What is added to a run.

    Fields:
      start: a carry, to the initial one.
      inputs: (*batch, T, D).
      states: (*batch, T, n), to the fields of the carry side by side after every step.
    """

    start: Any
    inputs: Array
    states: Array


@dataclasses.dataclass(frozen=True)
class Moved(Cell):
    """A cell whose inputs hold n more features, which are added to its state after the step."""

    cell: Cell

    def init(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> PyTree:
        return self.cell.init(key, input_size - sum(map(math.prod, self.shapes)), dtype)

    def initial_carry(self, batch_shape: Sequence[int] = (), dtype: Any = jnp.float32) -> Any:
        return self.cell.initial_carry(batch_shape, dtype)

    def project(self, params: PyTree, xs: Array) -> PyTree:
        size = xs.shape[-1] - sum(map(math.prod, self.shapes))
        return self.cell.project(params, xs[..., :size]), xs[..., :size], xs[..., size:]

    def update(self, params: PyTree, carry: Any, z: PyTree) -> tuple[Any, PyTree]:
        z, x, flat = z
        new, gates = self.cell.update(params, carry, z)
        leaves, tree = jax.tree.flatten(new)
        lead = flat.shape[:-1]
        pieces = jax.lax.split(flat, [math.prod(shape) for shape in self.shapes], flat.ndim - 1)
        moved = [
            a + move.reshape(*lead, *shape).astype(a.dtype)
            for a, move, shape in zip(leaves, pieces, self.shapes, strict=True)
        ]
        return jax.tree.unflatten(tree, moved), (carry, x, z, gates)

    def output(self, carry: Any) -> Array:
        return self.cell.output(carry)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the carry's arrays for one sequence."""
        return [a.shape for a in jax.tree.leaves(jax.eval_shape(self.cell.initial_carry))]


def zero_moves(cell: Cell, run: LayerRun) -> Moves:
    """Zeros for a run, in the dtypes of its carry and inputs."""
    n = sum(map(math.prod, Moved(cell.hidden_size, cell).shapes))
    dtype = jnp.result_type(*jax.tree.leaves(run.initial_carry))
    states = jnp.zeros((*run.xs.shape[:-1], n), dtype)
    return Moves(jax.tree.map(jnp.zeros_like, run.initial_carry), jnp.zeros_like(run.xs), states)


def run_moved(cell: Cell, run: LayerRun, moves: Moves) -> tuple[Any, Array, Any, Any]:
    """(carry, outputs, carries, gates) of a run with the moves added, batch-major."""
    xs, start = run.xs + moves.inputs, jax.tree.map(jnp.add, run.initial_carry, moves.start)
    wide = jnp.concatenate([xs, moves.states.astype(xs.dtype)], -1)
    reset_carry = run.initial_carry if run.resets is not None and run.reset_carry is None else run.reset_carry
    carry, outputs, states = unroll(
        Moved(cell.hidden_size, cell), without_gaps(cell, run.params, xs.shape[-1]), wide, initial_carry=start,
        seq_lengths=run.seq_lengths, resets=run.resets, reset_carry=reset_carry, return_states=True,
    )  # fmt: skip
    *_, gates = states.gates
    if isinstance(gates, dict) and "output" in gates:  # a foreign cell's own
        outputs = gates["output"]
    return carry, outputs, states.carries, gates


def without_gaps(cell: Cell, params: PyTree, features: int) -> PyTree:
    """Parameters with zeros for biases that are None, as a cell that is not pointwise must have them."""
    if not isinstance(cell, PointwiseCell):
        return params
    whole = jax.eval_shape(lambda: cell.init(jax.random.key(0), features, params.input_kernel.dtype))
    for name in ("bias", "recurrent_bias"):
        if getattr(params, name) is None and getattr(whole, name) is not None:
            zeros = jnp.zeros(getattr(whole, name).shape, params.input_kernel.dtype)
            params = params._replace(**{name: zeros})
    return params if cell.units else params._replace(units=whole.units)


# ------------------------------------------------------------------------------------- layers of a model


class Layer(NamedTuple):
    """What is static about a recorded layer.

    Fields:
      cell: the cell.
      reverse: whether it reads from the last step to the first.
      dtype: the dtype in which the model itself runs it; half precision is recorded in float32.
    """

    cell: Cell
    reverse: bool
    dtype: str


Visit = Callable[[str, Layer, LayerRun], tuple[Any, Array, Any, Any]]
"""(what to add to the layer's name, what ran) to what `run_moved` returns."""


def widened(tree: PyTree) -> PyTree:
    """Half precision as float32: products over many steps need it."""

    def wide(a: Any) -> Any:
        narrow = jnp.issubdtype(jnp.result_type(a), jnp.floating) and jnp.finfo(jnp.result_type(a)).bits < 32
        return jnp.asarray(a, jnp.float32) if narrow else a

    return jax.tree.map(wide, tree)


def run_layer(
    visit: Visit, name: str, cell: Cell, params: PyTree, inputs: Array, *, initial_carry: Any, seq_lengths: Any,
    resets: Any, reset_carry: Any, reverse: bool, keep_order: bool, time_major: bool,
) -> tuple[Any, Array, Any, Any]:  # fmt: skip
    """(carry, outputs, carries, gates) of one layer, as an RNN gives them, time where the inputs have it.

    Args:
      visit: runs the layer in the order of its steps.
      inputs: features on one axis.
    """
    time_axis = 0 if time_major else inputs.ndim - 2
    dtype = jnp.result_type(*jax.tree.leaves(initial_carry))
    xs = jnp.moveaxis(inputs, time_axis, 0)
    lengths = None if seq_lengths is None else _lengths.check_lengths(seq_lengths, xs.shape[1:-1], xs.shape[0])
    if lengths is not None:
        xs = _lengths.blank_padding(xs, lengths)
    if resets is not None:
        resets = jnp.moveaxis(jnp.asarray(resets), time_axis, 0)
    if reverse:
        xs, resets = _lengths.reverse_time((xs, resets), lengths)
    lead = xs.ndim - 2

    def batch_major(a: Any) -> Any:
        return None if a is None else jnp.moveaxis(a, 0, lead)

    run = widened(LayerRun(params, batch_major(xs), initial_carry, lengths, batch_major(resets), reset_carry))
    # The carry is that of the step's own dtype, of which the functional cell makes no other.
    last, *inside = visit(name, Layer(cell, reverse, dtype.name), run)
    outputs, carries, gates = jax.tree.map(lambda a: jnp.moveaxis(a, lead, 0), tuple(inside))
    if reverse and keep_order:
        outputs, carries, gates = _lengths.reverse_time((outputs, carries, gates), lengths)
    outputs, carries, gates = jax.tree.map(lambda a: jnp.moveaxis(a, 0, time_axis), (outputs, carries, gates))
    last, carries = (jax.tree.map(lambda a: a.astype(dtype), tree) for tree in (last, carries))
    return last, outputs, carries, gates


def run_stack(
    visit: Visit, stack: Stack, params: StackParams, xs: Array, *, return_states: bool = False, **options: Any
) -> tuple[Any, ...]:
    """(carry, outputs[, states by layer and direction]) as `unroll_stack` gives them without regularisers."""
    if any(stack.zoneout or ()):
        raise NotImplementedError("zoneout mixes old and new state at every step; analyse the layer without it")

    def one(level: int, way: int, own: PyTree, xs: Array, **options: Any) -> Any:
        last, outputs, *inside = run_layer(visit, stack.names[level][way], stack.cell, own, xs, **options)
        return last, outputs, States(*inside)

    carry, outputs, states = compose.run_levels(stack, params, xs, one, **options)
    return (carry, outputs, states) if return_states else (carry, outputs)
