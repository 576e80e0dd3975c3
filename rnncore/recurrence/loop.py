"""The static parameters of the primitives of a run: a backend, a request, and the structures of the trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax

from rnncore.recurrence.run import Constants, Differentiable, Request, Result


class Functions(Protocol):
    """The backend as the primitives use it: see `backend.LoopBackend`."""

    def __hash__(self) -> int: ...

    @property
    def opaque(self) -> bool: ...

    @property
    def maps_into_batch(self) -> bool: ...

    def forward(self, request: Request, differentiable: Differentiable, constants: Constants) -> Result: ...

    def forward_with_residuals(
        self, request: Request, differentiable: Differentiable, constants: Constants
    ) -> tuple[Result, Any]: ...

    def backward(
        self, request: Request, differentiable: Differentiable, constants: Constants, result: Result, residuals: Any,
        cotangents: Result, wanted: Differentiable,
    ) -> Differentiable: ...  # fmt: skip

    def tangent(
        self, request: Request, differentiable: Differentiable, constants: Constants, result: Result, residuals: Any,
        tangents: Differentiable,
    ) -> Result: ...  # fmt: skip

    def plain(self, request: Request, differentiable: Differentiable, constants: Constants) -> Result: ...

    def plain_tangent(
        self, request: Request, differentiable: Differentiable, constants: Constants, result: Result,
        tangents: Differentiable,
    ) -> Result: ...  # fmt: skip

    def residuals_move(self, request: Request) -> bool: ...

    def plain_with_residuals(
        self, request: Request, differentiable: Differentiable, constants: Constants
    ) -> tuple[Result, Any]: ...

    def plain_tangent_from_residuals(
        self, request: Request, differentiable: Differentiable, constants: Constants, result: Result, residuals: Any,
        tangents: Differentiable,
    ) -> Result: ...  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Loop:
    """The static parameters of the primitives: a backend, a request, and the structures of the trees.

    Fields:
      inexact: the leaves of the result that have tangents; a cell may call a boolean a gate.
      residuals: None before anything is kept.
    """

    backend: Functions
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
