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


def why_not(part: kernel_body.Body, language: Language) -> str | None:
    """Reason why a cell cannot be written in the language, or None."""
    try:
        struct(part, language)
    except Unsayable as error:
        return f"{type(part.cell).__name__} applies {error}, for which it has no {language.name}"
    return None


def struct(part: kernel_body.Body, language: Language) -> list[str]:
    """The lines of `struct Cell`."""
    cell, dtype = part.cell, part.dtype
    units, gates, fields, rest = len(cell.units), len(cell.gates), len(cell.Carry._fields), len(part.rest)
    arguments = [("p", units), ("z", gates), ("r", rest), ("s", fields)]
    results = [("out", fields), ("gates", part.emitted)]
    functions = (
        ("forward", part.with_sums, arguments, results),
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
    lines = [
        "struct Cell {",
        f"  static constexpr bool states = {'true' if part.states else 'false'};",
        "  static constexpr int " + ", ".join(f"{name} = {value}" for name, value in constants.items()) + ";",
        f"  static constexpr int rest_of[gates] = {{{rest_of}}};  // among `rest`; -1: z and r of it are added up",
    ]
    for name, closed, inputs, outputs in functions:
        lines += function(name, closed, inputs, outputs, dtype, language)
    return [*lines, "};"]


Names = Sequence[tuple[str, int]]


def function(name: str, closed: Any, inputs: Names, outputs: Names, dtype: str, language: Language) -> list[str]:
    """The lines of a member function that evaluates a flat jaxpr; inputs and outputs are arrays of vectors."""
    parameters = [f"const vec* {what}" for what, _ in inputs] + [f"vec* {what}" for what, _ in outputs]
    lines = _statements(closed, inputs, outputs, dtype, language)
    return [f"  {language.qualifier} void {name}({', '.join(parameters)}) {{", *("    " + a for a in lines), "  }"]


def _elements(names: Names) -> list[str]:
    return [f"{name}[{n}]" for name, count in names for n in range(count)]


def _statements(closed: Any, inputs: Names, outputs: Names, dtype: str, language: Language) -> list[str]:
    """A flat jaxpr, a line for each equation."""
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.invars, _elements(inputs), strict=True))
    for v, value in zip(jaxpr.constvars, closed.consts, strict=True):
        env[v] = language.number(np.asarray(value)[()], jnp.result_type(value))

    def read(v: Any) -> str:
        is_literal = isinstance(v, _compat.Literal)
        return language.number(np.asarray(v.val)[()], v.aval.dtype) if is_literal else env[v]

    lines = []
    for n, eqn in enumerate(jaxpr.eqns):
        out: Any = eqn.outvars[0]
        if jnp.issubdtype(out.aval.dtype, jnp.floating) and out.aval.dtype != dtype:
            raise Unsayable(f"`{eqn.primitive.name}` to {out.aval.dtype}")
        env[out] = f"v{n}"
        expression = _expression(eqn, [read(v) for v in eqn.invars], language)
        lines.append(f"const {_kind(out.aval.dtype, eqn)} v{n} = {expression};")
    return lines + [f"{to} = {read(v)};" for to, v in zip(_elements(outputs), jaxpr.outvars, strict=True)]


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
