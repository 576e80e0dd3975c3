"""What the forward loop keeps of a step for the derivative, and what the backward one forms again from that.

An LSTM's c_t is f_t c_{t-1} + i_t g_t, and the gates are kept: so c need not be, but at a few steps.  The old h is an
output of the run.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from rnncore import _compat
from rnncore.cells import pointwise
from rnncore.cells.reductions import MEAN
from rnncore.kernels import kernel_body


class Plan(NamedTuple):
    """What becomes of the residuals of a step.

    Fields:
      kept: those that are stored.
      h: the old h, which is an output; -1 for none.
      reformed: (field, residual) of old fields of the carry that are formed again from the step before, by arithmetic.
      reform: jaxpr of (units, residuals, old carry): these fields of the new carry.
      sees_h: whether that depends on the old h.
    """

    kept: tuple[int, ...]
    h: int
    reformed: tuple[tuple[int, int], ...]
    reform: Any
    sees_h: bool


@functools.lru_cache(maxsize=256)
def plan(part: kernel_body.Body, reforms: bool) -> Plan:
    """The plan of a cell; `reforms`: whether fields may be formed again."""
    fields, hidden = len(part.cell.Carry._fields), part.hidden
    first = part.keeping.jaxpr.invars[-fields:]
    of_kept = part.keeping.jaxpr.outvars[-part.width :] if part.width else []
    old = {f: n for n, v in enumerate(of_kept) for f in range(fields) if v is first[f]}
    h = old.pop(hidden, -1)
    if not reforms:
        old = {}
    while True:
        found = _reform(part, of_kept, first, [hidden, *old], sorted(old))
        failed = [f for f in old if f not in found]
        if not failed:
            break
        for f in failed:
            del old[f]
    wanted = sorted(old)
    closed, sees_h = _as_function(part, of_kept, first, wanted, found)
    gone = {h, *old.values()}
    kept = tuple(n for n in range(part.width) if n not in gone)
    return Plan(kept, h, tuple((f, old[f]) for f in wanted), closed, sees_h)


def _reform(part: Any, of_kept: Any, first: Any, known: Any, wanted: Any) -> dict[int, list[Any]]:
    """For those of the wanted fields of which it is so, the equations that form the new one by arithmetic."""
    jaxpr = part.keeping.jaxpr
    maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    known_values = (v for v in of_kept if not isinstance(v, _compat.Literal))  # a residual may be a number
    allowed = {*jaxpr.invars[: len(part.cell.units)], *known_values, *(first[f] for f in known)} - {
        v for n, v in enumerate(first) if n not in known
    }
    found: dict[int, list[Any]] = {}
    for f in wanted:
        path, todo = [], [jaxpr.outvars[f]]
        while todo:
            v = todo.pop()
            if isinstance(v, _compat.Literal) or v in allowed:
                continue
            eqn = maker.get(v)
            if eqn is None or eqn.primitive.name in (*pointwise.TRANSCENDENTAL, MEAN):
                break
            path.append(eqn)
            todo += eqn.invars
        else:
            order = {id(eqn): n for n, eqn in enumerate(jaxpr.eqns)}
            found[f] = sorted({id(e): e for e in path}.values(), key=lambda eqn: order[id(eqn)])
    return found


def _as_function(part: Any, of_kept: Any, first: Any, wanted: Any, found: dict[int, list[Any]]) -> tuple[Any, bool]:
    """(jaxpr of (units, residuals, old carry) to the wanted fields of the new one, whether it reads the old h)."""
    jaxpr, units = part.keeping.jaxpr, len(part.cell.units)
    eqns = {id(eqn): eqn for f in wanted for eqn in found[f]}
    ordered = [eqn for eqn in jaxpr.eqns if id(eqn) in eqns]

    def reform(*flat: Any) -> Any:
        pairs = zip(of_kept, flat[units:], strict=False)
        env = {v: value for v, value in pairs if not isinstance(v, _compat.Literal)}
        # Of a residual that is an old field the field itself is read.
        env |= dict(zip(jaxpr.invars[:units], flat, strict=False))
        env |= dict(zip(first, flat[units + len(of_kept) :], strict=True))

        def read(v: Any) -> Any:
            return v.val if isinstance(v, _compat.Literal) else env[v]

        for eqn in ordered:
            out = eqn.primitive.bind(*map(read, eqn.invars), **eqn.primitive.get_bind_params(eqn.params))
            env[eqn.outvars[0]] = out
        return [read(jaxpr.outvars[f]) for f in wanted]

    closed = kernel_body.inlined(reform, *[part.tile] * (units + len(of_kept) + len(first)))
    h = jaxpr.invars[-len(first) + part.hidden]
    return closed, any(v is h for eqn in ordered for v in eqn.invars)
