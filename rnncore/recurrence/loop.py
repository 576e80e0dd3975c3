"""The static parameters of the primitives of a run: a backend, a request, and the structures of the trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from rnncore.recurrence.run import Differentiable, Problem, Request, Result


@dataclasses.dataclass(frozen=True)
class Loop:
    """The static parameters of the primitives: a backend, a request, and the structures of the trees.

    Fields:
      backend: a `backend.LoopBackend`.
      inexact: the leaves of the result that have tangents; a cell may call a boolean a gate.
      residuals: None before anything is kept.
    """

    backend: Any
    request: Request
    differentiable: Any
    constants: Any
    result: Any
    inexact: tuple[int, ...]
    residuals: Any = None

    @property
    def held(self) -> tuple[Any, ...]:
        """The structures of the operands of a derivative."""
        return self.differentiable, self.constants, self.result, self.residuals

    @property
    def count(self) -> int:
        """Arrays in them."""
        return sum(tree.num_leaves for tree in self.held)

    def problem(self, flat: Sequence[Any]) -> Problem:
        """The run whose arrays come first."""
        (differentiable, constants), _ = parted((self.differentiable, self.constants), flat)
        return Problem(self.request, differentiable, constants)

    def opened(self, flat: Sequence[Any]) -> tuple[Problem, Result, Any, list[Any]]:
        """(the run, its result, its residuals, the other operands) of a derivative."""
        (differentiable, constants, result, residuals), rest = parted(self.held, flat)
        return Problem(self.request, differentiable, constants), result, residuals, rest

    def differentiable_at(self, where: Sequence[int], leaves: Sequence[Any], other: Any = None) -> Differentiable:
        """A tree of these leaves, `other` elsewhere."""
        return at_leaves(self.differentiable, where, leaves, other)


def at_leaves(tree: Any, where: Sequence[int], leaves: Sequence[Any], other: Any = None) -> Any:
    flat = [other] * tree.num_leaves
    for n, leaf in zip(where, leaves, strict=True):
        flat[n] = leaf
    return jax.tree.unflatten(tree, flat)


def parted(trees: Sequence[Any], flat: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The leading leaves as trees of these structures, and the rest."""
    parts, rest = [], list(flat)
    for tree in trees:
        parts.append(jax.tree.unflatten(tree, rest[: tree.num_leaves]))
        rest = rest[tree.num_leaves :]
    return parts, rest
