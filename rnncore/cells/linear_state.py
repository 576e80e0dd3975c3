"""Cells with an elementwise linear state: s_t = a_t s_{t-1} + b_t, where a_t and b_t see the inputs alone."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rnncore import _compat
from rnncore.cells import pointwise
from rnncore.cells.base import Cell, PointwiseCell
from rnncore.cells.structured_kernels import Unconnected

FREE, AFFINE, OTHER = 0, 1, 2
"""How a value depends on the old carry: not at all, by an affine function, in another way."""

_KEEPS = frozenset("add sub neg add_any convert_element_type reduce_precision copy copy_p".split())
# Not stop_gradient: the slope of the update is not that of its derivative then.


@functools.lru_cache(maxsize=256)
def linear_fields(cell: Cell) -> tuple[str, ...] | None:
    """The fields of the carry that the update reads, if their new values are affine in them; None if they are not.

    What is not read, such as h = o tanh(c), may depend on them in any way.  Read off the update's jaxpr, like all that
    is known of a cell.
    """
    if not isinstance(cell, PointwiseCell) or not isinstance(cell.recurrence, Unconnected):
        return None
    names = cell.Carry._fields
    shape = jax.ShapeDtypeStruct((1, cell.hidden_size), jnp.float32)
    closed, _ = pointwise.opened(cell.pointwise, *pointwise.examples(cell, shape))
    jaxpr = closed.jaxpr
    old = dict(zip(jaxpr.invars[-len(names) :], names, strict=True))
    new = dict(zip(names, jaxpr.outvars, strict=False))  # the carry comes first
    read = {old[v] for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, _compat.Literal) and v in old}
    read |= {old[v] for v in jaxpr.outvars if not isinstance(v, _compat.Literal) and v in old}
    order = dict.fromkeys(old, AFFINE)

    def of(v: Any) -> int:
        return FREE if isinstance(v, _compat.Literal) else order.get(v, FREE)

    for eqn in jaxpr.eqns:
        orders = [of(v) for v in eqn.invars]
        found = _order(eqn.primitive.name, orders)
        # A conversion to whole numbers rounds.
        if found == AFFINE and not all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.outvars):
            found = OTHER
        order.update(dict.fromkeys(eqn.outvars, found))
    return tuple(n for n in names if n in read) if all(of(new[n]) < OTHER for n in read) else None


def _order(primitive: str, orders: list[int]) -> int:
    """How the result of an operation depends on the old carry, from how its operands do."""
    most = max(orders, default=FREE)
    if most == FREE or primitive in _KEEPS:
        return most
    if primitive == "mul":
        return min(sum(orders), OTHER)
    if primitive == "div":
        return orders[0] if orders[1] == FREE else OTHER
    if primitive == "select_n":
        return most if orders[0] == FREE else OTHER
    return OTHER
