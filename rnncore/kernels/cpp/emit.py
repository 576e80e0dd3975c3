"""A cell's update, what it keeps for its derivative, and its transposed linearised step, written as C++ on vectors.

The operations are those of the jaxprs of `kernel_body.Body`; `vectors.h` has the functions they call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rnncore import _compat
from rnncore.cells import pointwise
from rnncore.cells.base import PointwiseCell
from rnncore.kernels import kernel_body

_LANE_BY_LANE = (
    "acos acosh asin asinh atan atan2 atanh cbrt ceil cos cosh erf erfc exp2 floor log log1p nextafter pow sin sinh "
    "sqrt tan"
).split()

_BITWISE = ("and", "or", "xor", "not")

OPERATIONS: dict[str, str] = {
    **{name: f"each<std::{name}>({{}})" for name in _LANE_BY_LANE},
    **dict.fromkeys(("add", "add_any"), "{0} + {1}"),
    **dict.fromkeys(("copy", "copy_p", "stop_gradient", "broadcast_in_dim", "optimization_barrier"), "{0}"),
    "abs": "absolute({0})",
    "and": "{0} & {1}",
    "clamp": "smaller(larger({1}, {0}), {2})",
    "div": "{0} / {1}",
    "eq": "{0} == {1}",
    "exp": "exponential({0})",
    "expm1": "exponential_less_one({0})",
    "ge": "{0} >= {1}",
    "gt": "{0} > {1}",
    "integer_pow": "power<{y}>({0})",
    "is_finite": "{0} - {0} == 0",
    "le": "{0} <= {1}",
    "lgamma": "each<std::lgamma>({0})",
    "logistic": "logistic({0})",
    "lt": "{0} < {1}",
    "max": "larger({0}, {1})",
    "min": "smaller({0}, {1})",
    "mul": "{0} * {1}",
    "ne": "{0} != {1}",
    "neg": "-{0}",
    "not": "~{0}",
    "one_minus_square": "1 - {0} * {0}",
    "or": "{0} | {1}",
    "rem": "each<std::fmod>({0}, {1})",
    "round": "each<{rounding}>({0})",
    "rsqrt": "1 / each<std::sqrt>({0})",
    "select_n": "select({0}, {2}, {1})",
    "sign": "signum({0})",
    "square": "{0} * {0}",
    "sub": "{0} - {1}",
    "tanh": "hyperbolic_tangent({0})",
    "xor": "{0} ^ {1}",
}
"""Operation to its expression; {} stands for all operands."""


class Unsayable(Exception):
    """An operation that has no expression here."""


class Variant(NamedTuple):
    """What a compiled file is of, besides the cell.

    Fields:
      real: dtype of all arithmetic, of parameters and of carries: float32 or float64.
      stored: dtype of inputs, outputs and states over time.
      residual: dtype of what is kept for the derivative.
      states: whether states and gates can be returned.
    """

    real: str
    stored: str
    residual: str
    states: bool = False


def body(cell: PointwiseCell, variant: Variant) -> kernel_body.Body:
    """The update, what its derivative keeps, and its transpose."""
    return kernel_body.of(cell, (1, 1), variant.real, variant.states)


@functools.lru_cache(maxsize=256)
def why_not(cell: PointwiseCell, variant: Variant) -> str | None:
    """Reason why the cell cannot be written in C++, or None."""
    try:
        source(cell, variant)
    except Unsayable as error:
        return f"{type(cell).__name__} applies {error}, for which it has no C++"
    return None


_TYPES = {"float64": "double", "float32": "float", "bfloat16": "bfloat16", "float16": "float16"}


@functools.lru_cache(maxsize=256)
def source(cell: PointwiseCell, variant: Variant) -> str:
    """The whole file for one cell."""
    part, dtype = body(cell, variant), variant.real
    units, gates, fields, rest = len(cell.units), len(cell.gates), len(cell.Carry._fields), len(part.rest)
    plan = residuals(cell, variant)
    arguments = [("p", units), ("z", gates), ("r", rest), ("s", fields)]
    results = [("out", fields), ("gates", part.emitted)]
    reformed = [n for _, n in plan.reformed]
    functions = [
        ("forward", part.folded, arguments, results),
        ("keep", part.keeping, arguments, [*results, ("kept", part.width)]),
        (
            "backward", part.transposed,
            [("p", units), ("kept", part.width), ("ds", fields), ("dgates", part.emitted)],
            [("dp", units), ("dz", gates), ("dr", rest), ("dold", fields)],
        ),
        (
            "reform", plan.reform, [("p", units), ("kept", part.width), ("s", fields)], [("fresh", len(reformed))],
        ),
    ]  # fmt: skip
    constants = {
        "gates": gates, "fields": fields, "hidden": part.hidden, "units": units, "residuals": part.width, "rest": rest,
        "emitted": part.emitted, "kept": len(plan.kept), "reformed": len(reformed), "h_at": plan.h,
    }  # fmt: skip
    rest_of = ", ".join(str(part.rest.index(g) if g in part.rest else -1) for g in range(gates))
    types = ("REAL", variant.real), ("STORED", variant.stored), ("RESIDUAL", variant.residual)
    lines = [
        *(f"#define RNN_{name} {_TYPES[of]}" for name, of in types),
        '#include "vectors.h"',
        "namespace rnn {",
        "struct Cell {",
        f"  static constexpr bool states = {'true' if variant.states else 'false'};",
        "  static constexpr int " + ", ".join(f"{name} = {value}" for name, value in constants.items()) + ";",
        f"  static constexpr int rest_of[gates] = {{{rest_of}}};  // among `rest`; -1: z and r of it are added up",
        "  // Of the residuals: where each is kept, -1: nowhere; which are old fields that are formed again.",
        _list("kept_at", [plan.kept.index(n) if n in plan.kept else -1 for n in range(part.width)]),
        _list("reformed_at", reformed),
        _list("reformed_fields", [field for field, _ in plan.reformed]),
        f"  static constexpr bool reform_sees_h = {'true' if plan.sees_h else 'false'};",
    ]
    for name, closed, inputs, outputs in functions:
        parameters = [f"const vec* {what}" for what, _ in inputs] + [f"vec* {what}" for what, _ in outputs]
        lines.append(f"  static RNN_INLINE void {name}({', '.join(parameters)}) {{")
        lines += ["    " + line for line in _statements(closed, inputs, outputs, dtype)]
        lines.append("  }")
    return "\n".join([*lines, "};", "}  // namespace rnn", '#include "handlers.h"', ""])


def _list(name: str, numbers: Sequence[int]) -> str:
    return f"  static constexpr int {name}[] = {{{', '.join(map(str, (*numbers, -1)))}}};"


class Residuals(NamedTuple):
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
def residuals(cell: PointwiseCell, variant: Variant) -> Residuals:
    """An LSTM's c_t is f_t c_{t-1} + i_t g_t, and the gates are kept: so its c need not be.

    In fewer bits than the sums have nothing is formed again: errors would add up over the steps.
    """
    part = body(cell, variant)
    fields, hidden = len(cell.Carry._fields), part.hidden
    first = part.keeping.jaxpr.invars[-fields:]
    of_kept = part.keeping.jaxpr.outvars[-part.width :] if part.width else []
    old = {f: n for n, v in enumerate(of_kept) for f in range(fields) if v is first[f]}
    h = old.pop(hidden, -1)
    if variant.residual != variant.real:
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
    return Residuals(kept, h, tuple((f, old[f]) for f in wanted), closed, sees_h)


def _reform(part: Any, of_kept: Any, first: Any, known: Any, wanted: Any) -> dict[int, list[Any]]:
    """For those of the wanted fields of which it is so, the equations that form the new one by arithmetic."""
    jaxpr = part.keeping.jaxpr
    maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    allowed = {*jaxpr.invars[: len(part.cell.units)], *of_kept, *(first[f] for f in known)} - {
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
            if eqn is None or eqn.primitive.name in pointwise.TRANSCENDENTAL:
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
        env = dict(zip(of_kept, flat[units:], strict=False))
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


Names = Sequence[tuple[str, int]]


def _elements(names: Names) -> list[str]:
    return [f"{name}[{n}]" for name, count in names for n in range(count)]


def _statements(closed: Any, inputs: Names, outputs: Names, dtype: str) -> list[str]:
    """A flat jaxpr, a line for each equation."""
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.invars, _elements(inputs), strict=True))
    env |= {v: _number(value, jnp.result_type(value)) for v, value in zip(jaxpr.constvars, closed.consts, strict=True)}

    def read(v: Any) -> str:
        is_literal = isinstance(v, _compat.Literal)
        return _number(v.val, v.aval.dtype) if is_literal else env[v]

    lines = []
    for n, eqn in enumerate(jaxpr.eqns):
        out: Any = eqn.outvars[0]
        if jnp.issubdtype(out.aval.dtype, jnp.floating) and out.aval.dtype != dtype:
            raise Unsayable(f"`{eqn.primitive.name}` to {out.aval.dtype}")
        env[out] = f"v{n}"
        lines.append(f"const {_kind(out.aval.dtype, eqn)} v{n} = {_expression(eqn, [read(v) for v in eqn.invars])};")
    return lines + [f"{to} = {read(v)};" for to, v in zip(_elements(outputs), jaxpr.outvars, strict=True)]


def _kind(dtype: Any, eqn: Any) -> str:
    """The C++ type of a value: "vec", "mask", or "bits" for what formulas do to a number's representation."""
    if dtype == jnp.bool_:
        return "mask"
    if jnp.issubdtype(dtype, jnp.floating):
        return "vec"
    if jnp.issubdtype(dtype, jnp.unsignedinteger) and eqn.primitive.name in (*_BITWISE, "bitcast_convert_type"):
        return "bits"
    raise Unsayable(f"`{eqn.primitive.name}` on {dtype}")


def _expression(eqn: Any, values: list[str]) -> str:
    name, out = eqn.primitive.name, eqn.outvars[0].aval.dtype
    kinds = [_kind(v.aval.dtype, eqn) for v in eqn.invars]
    if name == "convert_element_type":
        to = _kind(out, eqn)
        return values[0] if to == kinds[0] else f"{values[0]} != 0" if to == "mask" else f"numbers({values[0]})"
    if name == "bitcast_convert_type" and out.itemsize == eqn.invars[0].aval.dtype.itemsize:
        return f"({_kind(out, eqn)})({values[0]})"
    if name == "polynomial":
        x, *coefficients = values
        return functools.reduce(lambda total, c: f"({total}) * {x} + {c}", reversed(coefficients))
    if kinds[-1] == "mask" and name in ("eq", "ne"):
        return ("{} ^ {}" if name == "ne" else "~({} ^ {})").format(*values)
    if name not in OPERATIONS or len(eqn.outvars) > 1:
        raise Unsayable(f"`{name}`")
    if name == "select_n" and len(values) > 3:
        raise Unsayable("`select_n` of more than two")
    if kinds[-1] == "mask" and name not in (*_BITWISE, "select_n", "copy", "broadcast_in_dim", "stop_gradient"):
        raise Unsayable(f"`{name}` of booleans")
    options = {"y": eqn.params.get("y"), "rounding": _rounding(eqn) if name == "round" else None}
    pattern = OPERATIONS[name].replace("{}", ", ".join(values))
    return pattern.format(*values, **options)


def _rounding(eqn: Any) -> str:
    return "std::round" if eqn.params["rounding_method"].name == "AWAY_FROM_ZERO" else "std::nearbyint"


def _number(value: Any, dtype: Any) -> str:
    value = np.asarray(value)[()]
    if dtype == jnp.bool_:
        return "~none()" if value else "none()"
    if jnp.issubdtype(dtype, jnp.integer):
        return f"(bits{{}} + {int(value)}u{'l' if dtype.itemsize == 8 else ''})"
    value = float(value)
    if math.isfinite(value):
        return f"all(real({value!r}))"
    return "all(real(NAN))" if math.isnan(value) else f"all(real({'-' if value < 0 else ''}HUGE_VAL))"
