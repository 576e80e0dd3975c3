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
    arguments = [("p", units), ("z", gates), ("r", rest), ("s", fields)]
    results = [("out", fields), ("gates", part.emitted)]
    functions = (
        ("forward", part.folded, arguments, results),
        ("keep", part.keeping, arguments, [*results, ("kept", part.width)]),
        (
            "backward", part.transposed,
            [("p", units), ("kept", part.width), ("ds", fields), ("dgates", part.emitted)],
            [("dp", units), ("dz", gates), ("dr", rest), ("dold", fields)],
        ),
    )  # fmt: skip
    constants = {
        "gates": gates, "fields": fields, "hidden": part.hidden, "units": units, "residuals": part.width, "rest": rest,
        "emitted": part.emitted,
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
    ]
    for name, closed, inputs, outputs in functions:
        parameters = [f"const vec* {what}" for what, _ in inputs] + [f"vec* {what}" for what, _ in outputs]
        lines.append(f"  static RNN_INLINE void {name}({', '.join(parameters)}) {{")
        lines += ["    " + line for line in _statements(closed, inputs, outputs, dtype)]
        lines.append("  }")
    return "\n".join([*lines, "};", "}  // namespace rnn", '#include "handlers.h"', ""])


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
