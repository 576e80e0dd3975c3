"""A cell written as C++ on vectors (`rnncore.kernels.emit`); `vectors.h` has the functions that it calls."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from rnncore.cells.base import Cell, GatedCell
from rnncore.cells.reductions import declared
from rnncore.kernels import emit, kernel_body
from rnncore.kernels.cpp import residuals, stages

_LANE_BY_LANE = (
    "acos acosh asin asinh atan atan2 atanh cbrt ceil cos cosh erf erfc exp2 floor nextafter pow sin sinh sqrt tan"
).split()

OPERATIONS: dict[str, str] = {
    **emit.COMMON,
    **{name: f"each<std::{name}>({{}})" for name in _LANE_BY_LANE},
    "abs": "absolute({0})",
    "eq of masks": "~({0} ^ {1})",
    "expm1": "exponential_less_one({0})",
    "lgamma": "each<std::lgamma>({0})",
    "log": "logarithm({0})",
    "log1p": "logarithm_of_one_more({0})",
    "ne of masks": "{0} ^ {1}",
    "rem": "each<std::fmod>({0}, {1})",
    "round": "each<std::{rounding}>({0})",
    "rsqrt": "1 / each<std::sqrt>({0})",
}
"""Operation to its expression; {} stands for all operands."""


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


def described(cell: Cell, variant: Variant) -> str:
    """What is compiled, for messages."""
    types = dict.fromkeys(variant[:3])
    return f"{type(declared(cell)).__name__} ({', '.join(types)}{', with states' if variant.states else ''})"


def body(cell: GatedCell, variant: Variant) -> kernel_body.Body:
    """The update, what its derivative keeps, and its transpose."""
    return kernel_body.of(cell, (1, 1), variant.real, variant.states)


def _number(value: Any, dtype: Any) -> str:
    if dtype == jnp.bool_:
        return "~none()" if value else "none()"
    if jnp.issubdtype(dtype, jnp.integer):
        return f"(bits{{}} + {int(value)}u{'l' if dtype.itemsize == 8 else ''})"
    value = float(value)
    if math.isfinite(value):
        return f"all(real({value!r}))"
    return "all(real(NAN))" if math.isnan(value) else f"all(real({'-' if value < 0 else ''}HUGE_VAL))"


CPP = emit.Language("C++", OPERATIONS, _number, lambda kind, value: f"({kind})({value})", "static RNN_INLINE")


@functools.lru_cache(maxsize=256)
def why_not(cell: GatedCell, variant: Variant) -> str | None:
    """Reason why the cell cannot be written in C++, or None."""
    return emit.why_not(declared(cell), lambda: _struct(cell, variant), CPP)


def _struct(cell: GatedCell, variant: Variant) -> list[str]:
    part = body(cell, variant)
    if stages.reduces(part):
        return emit.struct(part, CPP, stages.lines(part, CPP))
    *lines, end = emit.struct(part, CPP)
    none = ["  struct Updating {", "    static constexpr int held = 0;", "  };"]
    return [*lines, *none, "  using Keeping = Updating;", "  using Transposing = Updating;", end]


_TYPES = {"float64": "double", "float32": "float", "bfloat16": "bfloat16", "float16": "float16"}


@functools.lru_cache(maxsize=256)
def source(cell: GatedCell, variant: Variant) -> str:
    """The whole file for one cell."""
    types = ("REAL", variant.real), ("STORED", variant.stored), ("RESIDUAL", variant.residual)
    lines = [
        *(f"#define RNN_{name} {_TYPES[of]}" for name, of in types),
        '#include "vectors.h"',
        "namespace rnn {",
        *_struct(cell, variant),
        *_kept(cell, variant),
        "}  // namespace rnn",
        '#include "handlers.h"',
    ]
    return "\n".join([*lines, ""])


def plan(cell: GatedCell, variant: Variant) -> residuals.Plan:
    """What is kept of a step; in fewer bits than the sums nothing is formed again, for errors would add up."""
    return residuals.plan(body(cell, variant), variant.residual == variant.real)


def _kept(cell: GatedCell, variant: Variant) -> list[str]:
    """The lines of `struct Kept`."""
    part, what = body(cell, variant), plan(cell, variant)
    fields, reformed = [f for f, _ in what.reformed], [n for _, n in what.reformed]

    def numbers(name: str, of: Sequence[int]) -> str:
        return f"  static constexpr int {name}[] = {{{', '.join(map(str, (*of, -1)))}}};"

    inputs = ("p", len(cell.units)), ("kept", part.width), ("s", len(cell.Carry._fields))
    return [
        "struct Kept {",
        f"  static constexpr int count = {len(what.kept)}, h_at = {what.h}, reformed = {len(reformed)};",
        "  // Where each residual is kept, -1: nowhere; which of them are old fields that are formed again, and which.",
        numbers("at", [what.kept.index(n) if n in what.kept else -1 for n in range(part.width)]),
        numbers("reformed_at", reformed),
        numbers("reformed_fields", fields),
        f"  static constexpr bool reform_sees_h = {'true' if what.sees_h else 'false'};",
        *emit.function("reform", what.reform, inputs, [("fresh", len(reformed))], part.dtype, CPP),
        "};",
    ]
