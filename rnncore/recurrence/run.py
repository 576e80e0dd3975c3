"""One description of a run, which every loop reads: what is static, the arrays, and the result.

s_t = update(params, s_{t-1}, x_t),   with, at every step and in this order,

  s_{t-1} -> reset_carry where resets_t,   h_{t-1} -> recurrent_mask h_{t-1} in the product,
  s_t -> zoneout_t s_{t-1} + (1 - zoneout_t) s_t;   the last carry is s_{length}, the initial one for length 0.

`step.py` implements these once for all loops that are written in JAX.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from rnncore._types import PyTree
from rnncore.cells.base import Cell


@dataclasses.dataclass(frozen=True)
class Request:
    """All that is static about a run: backends are chosen by this alone.

    Fields:
      cell: the cell.
      steps, batch_shape, input_size: T, the batch axes, D.
      dtype: name of the dtype of the projected inputs.
      dtypes: names of the dtypes of parameters, inputs and carries together.
      precision: what `jax.default_matmul_precision` asks for, None by default; it is set while a loop is traced.
      platform, devices: "cpu", "gpu" or "tpu", and how many of them this process sees.
      lengths, resets, recurrent_mask, zoneout: whether the run has them.
      return_states: whether it must return carries and gates of every step.
      checkpoint_every: steps to a chunk; None lets the backend choose.
      recompute: "nothing", "gates" or "chunk".
      residual_dtype: name of the dtype in which what reverse mode keeps is stored; None for its own.
      time_axis: where time lies in xs and in the outputs: 0, or `len(batch_shape)` where the caller has it there and
        the backend takes it (`Backend.keeps_time_axis`).
      linear: the fields of the carry that the update reads where the state is elementwise linear in its past, see
        `cells.linear_state`; None where it is not.
    """

    cell: Cell
    steps: int
    batch_shape: tuple[int, ...]
    input_size: int
    dtype: str
    dtypes: frozenset[str]
    precision: str | None
    platform: str
    devices: int
    lengths: bool
    resets: bool
    recurrent_mask: bool
    zoneout: bool
    return_states: bool
    checkpoint_every: int | None
    recompute: str
    residual_dtype: str | None = None
    time_axis: int = 0
    linear: tuple[str, ...] | None = None

    @property
    def symbolic(self) -> bool:
        """Whether steps or batch are symbolic, as inside `jax.export`."""
        return any(map(is_symbolic_dim, (self.steps, *self.batch_shape, self.input_size)))


class Differentiable(NamedTuple):
    """The arrays that a run is differentiated with respect to, in the order of processing.

    Fields:
      params: the cell's parameters, a `CellParams` for a pointwise cell.
      xs: (T, *batch, D), or with time along the request's `time_axis`.
      initial_carry: carry of (*batch, H) arrays.
      reset_carry: the carry that a reset returns to, in the dtypes of the initial one; None without resets.
    """

    params: PyTree
    xs: Any
    initial_carry: Any
    reset_carry: Any


class Constants(NamedTuple):
    """The other arrays that it depends on, time-major; None for those that the run does not have.

    Fields:
      lengths: (*batch) int32 from 0 to T.
      resets: (T, *batch) booleans.
      recurrent_mask: (*batch, H), multiplies h_{t-1} where it enters the recurrent product.
      zoneout: a carry with, for each field, None, a share () for all steps and units, or (T, *batch, H) booleans
        (where True the unit keeps its value) or shares.
    """

    lengths: Any
    resets: Any
    recurrent_mask: Any
    zoneout: Any


class Problem(NamedTuple):
    """A run: what is static about it, and its arrays."""

    request: Request
    differentiable: Differentiable
    constants: Constants


class Result(NamedTuple):
    """What a run gives.

    Fields:
      carry: after the last valid step, in the dtypes of the initial one.
      outputs: (T, *batch, H), with time as xs has it.
      carries, gates: the carry and what the cell calls its gates at every step, (T, *batch, H) arrays; None unless
        the request has `return_states`.
    """

    carry: Any
    outputs: Any
    carries: Any = None
    gates: Any = None


def operand_axes(request: Request, differentiable: Differentiable, constants: Constants) -> tuple[Any, Any]:
    """Where the batch begins in every array of a run, -1 in what the sequences share; of constants that are `ndim`s."""
    operands = Differentiable(
        _filled(differentiable.params, -1), 0 if request.time_axis else 1, _filled(differentiable.initial_carry, 0),
        _filled(differentiable.reset_carry, 0),
    )  # fmt: skip
    lengths, resets, recurrent_mask, zoneout = constants
    stacks = jax.tree.map(lambda ndim: 1 if ndim else -1, zoneout)
    return operands, Constants(_filled(lengths, 0), _filled(resets, 1), _filled(recurrent_mask, 0), stacks)


def result_axes(request: Request, result: Result) -> Result:
    """The same of its result."""
    in_time = _filled(result.carries, 1), _filled(result.gates, 1)
    return Result(_filled(result.carry, 0), 0 if request.time_axis else 1, *in_time)


def _filled(tree: Any, value: int) -> Any:
    return jax.tree.map(lambda _: value, tree)


def dense(tree: Any, like: Any) -> Any:
    """Tangents or cotangents of `like` with zeros in the place of None."""

    def one(a: Any, d: Any) -> Any:
        return jnp.zeros_like(a) if d is None and a is not None else d

    return jax.tree.map(one, like, tree, is_leaf=lambda a: a is None)
