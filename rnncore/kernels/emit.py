"""A cell's update, what it keeps for its derivative, and its transposed linearised step, written in a C-like language.

The operations are those of the jaxprs of `kernel_body.Body`, a line for each equation.  A `Language` says how each of
them is written; the functions that its expressions call stand in headers of the backend.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rnncore import _compat
from rnncore.kernels import kernel_body

BITWISE = ("and", "or", "xor", "not")
_OF_MASKS = (*BITWISE, "eq", "ne", "select_n", "copy", "broadcast_in_dim", "stop_gradient")


COMMON: dict[str, str] = {
    **dict.fromkeys(("add", "add_any"), "{0} + {1}"),
    **dict.fromkeys(("copy", "copy_p", "stop_gradient", "broadcast_in_dim", "optimization_barrier"), "{0}"),
    "and": "{0} & {1}",
    "clamp": "smaller(larger({1}, {0}), {2})",
    "div": "{0} / {1}",
    "eq": "{0} == {1}",
    "exp": "exponential({0})",
    "ge": "{0} >= {1}",
    "gt": "{0} > {1}",
    "integer_pow": "power<{y}>({0})",
    "is_finite": "{0} - {0} == 0",
    "le": "{0} <= {1}",
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
    "select_n": "select({0}, {2}, {1})",
    "sign": "signum({0})",
    "square": "{0} * {0}",
    "sub": "{0} - {1}",
    "tanh": "hyperbolic_tangent({0})",
    "xor": "{0} ^ {1}",
}
"""Operations whose expressions are the same in every language, see `Language`."""


class Unsayable(Exception):
    """An operation that has no expression in the language."""


@dataclasses.dataclass(frozen=True)
class Language:
    """How operations are written.  Values are of the types `vec`, `mask` and `bits` (of a number's representation).

    Fields:
      name: as messages say it.
      operations: operation to its expression; {} stands for all operands, {y} for an exponent and {rounding} for the
        C function that rounds.  "NAME of masks", where it is there, goes before NAME for booleans.
      number: (value, dtype) to a constant.
      bitcast: (type, value) to the value's bits as that type.
      qualifier: what stands before a function.
    """

    name: str
    operations: Mapping[str, str]
    number: Callable[[Any, Any], str]
    bitcast: Callable[[str, str], str]
    qualifier: str


def why_not(cell: Any, write: Callable[[], Any], language: Language) -> str | None:
    """Reason why `write`, which writes the cell in the language, cannot do so, or None."""
    try:
        write()
    except Unsayable as error:
        return f"{type(cell).__name__} applies {error}, for which it has no {language.name}"
    return None


def struct(part: kernel_body.Body, language: Language, staged: Sequence[str] = ()) -> list[str]:
    """The lines of `struct Cell`; `staged`: those that stand for its functions, where they are not elementwise."""
    cell = part.cell
    constants = {
        "gates": len(cell.gates), "fields": len(cell.Carry._fields), "hidden": part.hidden, "units": len(cell.units),
        "residuals": part.width, "rest": len(part.rest), "emitted": part.emitted,
    }  # fmt: skip
    rest_of = ", ".join(str(part.rest.index(g) if g in part.rest else -1) for g in range(len(cell.gates)))
    lines = [
        "struct Cell {",
        f"  static constexpr bool states = {str(part.states).lower()}, reduces = {str(bool(staged)).lower()};",
        "  static constexpr int " + ", ".join(f"{name} = {value}" for name, value in constants.items()) + ";",
        f"  static constexpr int rest_of[gates] = {{{rest_of}}};  // among `rest`; -1: z and r of it are added up",
        *staged,
    ]
    for name, closed, inputs, outputs in () if staged else functions(part):
        lines += function(name, closed, inputs, outputs, part.dtype, language)
    return [*lines, "};"]


Names = Sequence[tuple[str, int]]


def functions(part: kernel_body.Body) -> list[tuple[str, Any, Names, Names]]:
    """(name, jaxpr, inputs, outputs) of the update, of the update with what it keeps, and of its transpose."""
    cell = part.cell
    units, gates, fields, rest = len(cell.units), len(cell.gates), len(cell.Carry._fields), len(part.rest)
    arguments = [("p", units), ("z", gates), ("r", rest), ("s", fields)]
    results = [("out", fields), ("gates", part.emitted)]
    return [
        ("forward", part.with_sums, arguments, results),
        ("keep", part.keeping, arguments, [*results, ("kept", part.width)]),
        (
            "backward", part.transposed,
            [("p", units), ("kept", part.width), ("ds", fields), ("dgates", part.emitted)],
            [("dp", units), ("dz", gates), ("dr", rest), ("dold", fields)],
        ),
    ]  # fmt: skip


def function(name: str, closed: Any, inputs: Names, outputs: Names, dtype: str, language: Language) -> list[str]:
    """The lines of a member function that evaluates a flat jaxpr; inputs and outputs are arrays of vectors."""
    parameters = [f"const vec* {what}" for what, _ in inputs] + [f"vec* {what}" for what, _ in outputs]
    writer = Writer(closed, inputs, dtype, language)
    lines = [*map(writer.line, closed.jaxpr.eqns), *writer.results(outputs, closed.jaxpr.outvars)]
    return [f"  {language.qualifier} void {name}({', '.join(parameters)}) {{", *("    " + a for a in lines), "  }"]


def _elements(names: Names) -> list[str]:
    return [f"{name}[{n}]" for name, count in names for n in range(count)]


class Writer:
    """Equations of a flat jaxpr, written one at a time.

    Attributes:
      env: what has a name or is a number.
      kinds: the types of what equations make.
    """

    def __init__(self, closed: Any, inputs: Names, dtype: str, language: Language):
        self.dtype, self.language = dtype, language
        self.env = dict(zip(closed.jaxpr.invars, _elements(inputs), strict=True))
        for v, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            self.env[v] = language.number(np.asarray(value)[()], jnp.result_type(value))
        self.kinds: dict[Any, str] = {}

    def read(self, v: Any) -> str:
        is_literal = isinstance(v, _compat.Literal)
        return self.language.number(np.asarray(v.val)[()], v.aval.dtype) if is_literal else self.env[v]

    def line(self, eqn: Any) -> str:
        """The line of the next equation."""
        out: Any = eqn.outvars[0]
        if jnp.issubdtype(out.aval.dtype, jnp.floating) and out.aval.dtype != self.dtype:
            raise Unsayable(f"`{eqn.primitive.name}` to {out.aval.dtype}")
        self.env[out] = f"v{len(self.kinds)}"
        expression = _expression(eqn, [self.read(v) for v in eqn.invars], self.language)
        self.kinds[out] = _kind(out.aval.dtype, eqn)
        return f"const {self.kinds[out]} {self.env[out]} = {expression};"

    def results(self, outputs: Names, values: Sequence[Any]) -> list[str]:
        return [f"{to} = {self.read(v)};" for to, v in zip(_elements(outputs), values, strict=True)]


def _kind(dtype: Any, eqn: Any) -> str:
    """The type of a value: "vec", "mask", or "bits" for what formulas do to a number's representation."""
    if dtype == jnp.bool_:
        return "mask"
    if jnp.issubdtype(dtype, jnp.floating):
        return "vec"
    if jnp.issubdtype(dtype, jnp.unsignedinteger) and eqn.primitive.name in (*BITWISE, "bitcast_convert_type"):
        return "bits"
    raise Unsayable(f"`{eqn.primitive.name}` on {dtype}")


def _expression(eqn: Any, values: list[str], language: Language) -> str:
    name, out = eqn.primitive.name, eqn.outvars[0].aval.dtype
    kinds = [_kind(v.aval.dtype, eqn) for v in eqn.invars]
    if name == "convert_element_type":
        to = _kind(out, eqn)
        return values[0] if to == kinds[0] else f"{values[0]} != 0" if to == "mask" else f"numbers({values[0]})"
    if name == "bitcast_convert_type" and out.itemsize == eqn.invars[0].aval.dtype.itemsize:
        return language.bitcast(_kind(out, eqn), values[0])
    if name == "polynomial":
        x, *coefficients = values
        return functools.reduce(lambda total, c: f"({total}) * {x} + {c}", reversed(coefficients))
    if name not in language.operations or len(eqn.outvars) > 1:
        raise Unsayable(f"`{name}`")
    if name == "select_n" and len(values) > 3:
        raise Unsayable("`select_n` of more than two")
    pattern = language.operations[name]
    if kinds[-1] == "mask":
        if name not in _OF_MASKS:
            raise Unsayable(f"`{name}` of booleans")
        pattern = language.operations.get(f"{name} of masks", pattern)
    options = {"y": eqn.params.get("y"), "rounding": _rounding(eqn) if name == "round" else None}
    return pattern.replace("{}", ", ".join(values)).format(*values, **options)


def _rounding(eqn: Any) -> str:
    return "round" if eqn.params["rounding_method"].name == "AWAY_FROM_ZERO" else "nearbyint"
