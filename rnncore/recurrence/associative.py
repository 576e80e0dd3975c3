"""Backend "associative_scan": all steps of a cell with a linear state at once, by `jax.lax.associative_scan`.

  s_t = a_t s_{t-1} + b_t,   (a, b) then (c, d) is (c a, c b + d), in about log2(T) rounds

Cells: elementwise linear ones over `Unconnected`, such as `MinGRU`, `MinLSTM`, `RGLRU` and `QRNN`; whether one is, is
read off its update.  Dtypes: all; states are formed in float32 or wider.  Options: lengths, resets, states, both
directions; no zoneout, and no memory policy, for there is no loop over time.  Memory: about 3 T B H numbers for each
field.  Derivatives: the rule of the recurrence, which is again such a scan, in reverse for the backward pass; every
mode and order.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rnncore import _lengths
from rnncore._types import Array
from rnncore.cells.base import PointwiseCell
from rnncore.recurrence import linear
from rnncore.recurrence import step as steps
from rnncore.recurrence.backend import Backend, without
from rnncore.recurrence.run import Problem, Request, Result


class AssociativeScan(Backend):
    """See the module."""

    name = "associative_scan"

    def unsupported(self, request: Request) -> str | None:
        options = ("zoneout", "checkpoint_every", "recompute", "residual_dtype")
        if request.linear is None:
            name = type(request.cell).__name__
            return f"the state of {name} is not linear in its past"
        return without(request, options, "it has no loop over time")

    def why_not_by_default(self, request: Request) -> str | None:
        if request.platform == "cpu":
            return "on a CPU the loops over time are faster, at every length that was measured"
        return f"whether it is faster than the loops has not been measured on a {request.platform.upper()}"

    def remedy(self, request: Request) -> str | None:
        if request.platform == "cpu" or self.unsupported(request):
            return None
        return (
            f"backend={self.name!r} has no loop over time and may be faster where T is long and B H small: measure it"
        )

    def run(self, problem: Problem) -> Result:
        request, (params, xs, start, reset_carry), constants = problem
        cell = request.cell
        assert isinstance(cell, PointwiseCell) and request.linear is not None
        resets, _ = steps.per_step(request, constants)
        zs = cell.project(params, jnp.moveaxis(xs, request.time_axis, 0))
        carries, gates = states(cell, request.linear, params, zs, start, reset_carry, resets)
        last = jax.tree.map(lambda a: a[-1], carries)
        if constants.lengths is not None:
            last = _lengths.last_valid(start, carries, constants.lengths, 0)
        outputs = jnp.moveaxis(cell.output(carries), 0, request.time_axis)
        return Result(last, outputs, *((carries, gates) if request.return_states else (None, None)))


def states(
    cell: PointwiseCell, fields: tuple[str, ...], params: Any, zs: Array, start: Any, reset_carry: Any,
    resets: Array | None,
) -> tuple[Any, Any]:  # fmt: skip
    """(carries, gates) of all steps of a cell with a linear state, time-major, in the dtypes of the first carry.

    Args:
      cell, params: over `Unconnected`, or over the diagonal kernel of zeros that this runs as.
      fields: of the carry, those that the update reads: `linear_fields`.
      zs: the projected inputs (T, *batch, G*H).
      start, reset_carry, resets: as a run has them; resets (T, *batch, 1).
    """
    z = cell.split(zs)
    shape = (zs.shape[0], *start.h.shape)
    nothing = jnp.zeros_like(start.h)  # r is 0, or its bias
    r = jax.tree.map(lambda a: jnp.broadcast_to(a, shape), cell.split(cell.recurrent_matmul(params, nothing)))
    p = jax.tree.map(lambda u: jnp.broadcast_to(u, shape), params.units)
    zero = jax.tree.map(lambda s: jnp.zeros(shape, jnp.promote_types(s.dtype, jnp.float32)), start)

    def update(*read: Array) -> tuple[Array, ...]:
        new, _ = cell.pointwise(p, z, r, zero._replace(**dict(zip(fields, read, strict=True))))
        return tuple(getattr(new, n).astype(getattr(zero, n).dtype) for n in fields)

    previous = zero
    if fields:
        # Affine: its value at 0 and its slope along each field are all that there is to know.
        none = tuple(getattr(zero, n) for n in fields)
        added, slope = jax.linearize(update, *none)
        columns = [slope(*(jnp.ones_like(s) if m == n else s for m, s in enumerate(none))) for n in range(len(fields))]
        decay = tuple(zip(*columns, strict=True))
        if resets is not None:
            again = tuple(getattr(reset_carry, n) for n in fields)
            begun = tuple(b + linear.dot(row, again) for row, b in zip(decay, added, strict=True))
            added = tuple(jnp.where(resets, b, a) for a, b in zip(added, begun, strict=True))
            decay = jax.tree.map(lambda a: jnp.where(resets, 0, a), decay)
        first = tuple(getattr(start, n).astype(s.dtype) for n, s in zip(fields, none, strict=True))
        added = tuple(
            b.at[0].add(linear.dot([a[0] for a in row], first)) for row, b in zip(decay, added, strict=True)
        )  # fmt: skip
        found = recurrence(decay, added)
        before = {n: jnp.concatenate([s[None], u[:-1]]) for n, s, u in zip(fields, first, found, strict=True)}
        previous = steps.reset(resets, reset_carry, zero._replace(**before))
    new, gates = cell.pointwise(p, z, r, previous)
    return steps.blend(None, start, new), gates


@jax.custom_jvp
def recurrence(a: Any, b: Any) -> Any:
    """u_t = A_t u_{t-1} + b_t with u_0 = 0 unit by unit, see `linear.by_units`, with the derivative that it has."""
    return linear.by_units(a, b)


@recurrence.defjvp
def _recurrence_jvp(primals: Any, tangents: Any) -> Any:
    # d u_t = A_t d u_{t-1} + (d A_t u_{t-1} + d b_t): the same recurrence.
    (a, b), (da, db) = primals, tangents
    u = recurrence(a, b)
    before = tuple(jnp.concatenate([jnp.zeros_like(s[:1]), s[:-1]]) for s in u)
    added = tuple(linear.dot(row, before) + d for row, d in zip(da, db, strict=True))
    return u, recurrence(a, added)
