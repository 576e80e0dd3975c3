"""The interface of a rule of online learning: a memory that moves forward with the carry, and a gradient from it."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.cells import pointwise, structured_kernels
from rnncore.cells.base import CellParams, PointwiseCell
from rnncore.cells.blocks import Blocks, blocks_of


class Memory(NamedTuple):
    """The state between steps; its size does not depend on their number.

    Fields:
      carry: the cell's carry, arrays (*batch, H).
      influence: what the rule keeps of d s_t / d params.
    """

    carry: Any
    influence: PyTree


@dataclasses.dataclass(frozen=True)
class Rule(abc.ABC):
    """A rule of online learning for a pointwise cell: a frozen, hashable description.

    Args:
      cell: the cell that learns.
    """

    cell: PointwiseCell

    needs_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.cell, PointwiseCell):
            raise ValueError(
                f"`{type(self).__name__}(cell=<{type(self.cell).__name__}>)`: expected a PointwiseCell, such as "
                "rnncore.LSTM(256), of which the derivatives of a step are known."
            )
        pointwise.check_elementwise(self.cell)

    def init(self, params: CellParams, carry: Any) -> Memory:
        """The memory before the first step, from a carry that does not depend on the parameters."""
        rule, params = self._plain(params)
        return Memory(carry, rule._start(params, carry))

    @property
    def _blocks(self) -> Blocks:
        return blocks_of(self.cell.recurrence, self.cell.hidden_size)

    def _plain(self, params: CellParams) -> tuple[Rule, CellParams]:
        """The rule for the plain kernel that a structured one runs as, whose gradient is pulled back once."""
        cell, params = structured_kernels.plain(self.cell, params)
        return (self if cell is self.cell else dataclasses.replace(self, cell=cell)), params

    def step(
        self,
        params: CellParams,
        memory: Memory,
        x: Array,
        *,
        reset: Array | None = None,
        reset_carry: Any = None,
        valid: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Memory, Array]:
        """One step.

        Args:
          params: the cell's parameters; they may change from step to step.
          memory: of the step before, or of `init`.
          x: (*batch, D).
          reset: booleans (*batch): where True the step begins with `reset_carry` and no influence.
          reset_carry: the carry after a reset, a constant; zeros by default.
          valid: booleans (*batch): where False, past the length of a sequence, the memory does not change.
          key: for rules that draw random numbers.

        Returns:
          (memory, y), the output y (*batch, H).

        Raises:
          ValueError: a missing key, for rules that need one; shapes that do not fit.
        """
        name = type(self).__name__
        if self.needs_key and key is None:
            raise ValueError(f"`{name}.step(key=None)`: expected a key for its random signs, a new one at every step.")
        batch, features = jnp.shape(memory.carry.h)[:-1], params.input_kernel.shape[0]
        if jnp.shape(x) != (*batch, features):
            raise ValueError(
                f"`{name}.step(x=<{jnp.shape(x)}>)`: expected {(*batch, features)}, the batch axes of the carry and D."
            )
        for what, mask in (("reset", reset), ("valid", valid)):
            if mask is not None and (jnp.shape(mask) != batch or jnp.result_type(mask) != jnp.bool_):
                raise ValueError(
                    f"`{name}.step({what}=<{jnp.result_type(mask)} {jnp.shape(mask)}>)`: expected bool {batch}."
                )
        before = memory
        if reset is not None:
            start = jax.tree.map(jnp.zeros_like, memory.carry) if reset_carry is None else reset_carry
            start = jax.tree.map(lambda a, c: jnp.broadcast_to(a, c.shape).astype(c.dtype), start, memory.carry)
            before = select(reset, Memory(start, jax.tree.map(jnp.zeros_like, memory.influence)), before)
        rule, params = self._plain(params)
        new = Memory(*rule._advance(params, before.carry, before.influence, jnp.asarray(x), key))
        # As a run does: the carry keeps its dtype.
        new = jax.tree.map(lambda a, b: a.astype(b.dtype), new, memory)
        if valid is not None:
            new = select(valid, new, memory)
        return new, self.cell.output(new.carry)

    def gradient(self, params: CellParams, memory: Memory, cotangent: Any) -> CellParams:
        """d L_t / d params of what step t adds to a loss, summed over the batch.

        Args:
          params: the cell's parameters.
          memory: after step t.
          cotangent: d L_t / d y_t (*batch, H), or d L_t / d s_t, a carry of such arrays.

        Returns:
          `CellParams`; the sum over all steps is the gradient of the sum of the L_t.

        Raises:
          ValueError: a cotangent of the wrong shape.
        """
        carry = memory.carry
        if not isinstance(cotangent, type(carry)):
            y, pull = jax.vjp(self.cell.output, carry)
            if jnp.shape(cotangent) != y.shape:
                raise ValueError(
                    f"`{type(self).__name__}.gradient(cotangent=<{jnp.shape(cotangent)}>)`: expected {y.shape}, as the "
                    f"output, or a {type(carry).__name__}."
                )
            (cotangent,) = pull(jnp.asarray(cotangent, y.dtype))
        rule, core = self._plain(params)
        gradient = rule._gradient(core, memory, cotangent)
        if rule.cell is self.cell:
            return gradient
        _, back = jax.vjp(lambda k: self.cell.recurrence.effective(k)[1], params.recurrent_kernel)  # type: ignore[attr-defined]
        return gradient._replace(recurrent_kernel=back(gradient.recurrent_kernel)[0])

    @abc.abstractmethod
    def _start(self, params: CellParams, carry: Any) -> PyTree:
        """Zeros for the influence; every array begins with the batch axes."""

    @abc.abstractmethod
    def _advance(self, params: CellParams, carry: Any, influence: PyTree, x: Array, key: Any) -> tuple[Any, PyTree]:
        """(carry, influence) after a step."""

    @abc.abstractmethod
    def _gradient(self, params: CellParams, memory: Memory, cotangent: Any) -> CellParams:
        """The gradient for the cotangent of a carry."""


def select(mask: Array, there: PyTree, here: PyTree) -> PyTree:
    """`there` for the sequences where mask (*batch) is True."""

    def one(a: Array, b: Array) -> Array:
        return jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b)

    return jax.tree.map(one, there, here)


def over_batch(a: Array, rest: int) -> Array:
    """The sum over all but the last `rest` axes."""
    return a.sum(tuple(range(a.ndim - rest)))
