"""Writes a cell and the layout of a run as CUDA C++, to compile together with the headers of this directory."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp

from rnncore.cells.base import PointwiseCell
from rnncore.kernels import emit, kernel_body
from rnncore.kernels.cuda.plan import Plan

_FUNCTIONS = (
    "acos acosh asin asinh atan atan2 atanh cbrt ceil cos cosh erf erfc exp2 expm1 floor lgamma log log1p nextafter "
    "pow sin sinh sqrt tan"
).split()

OPERATIONS: dict[str, str] = {
    **emit.COMMON,
    **{name: f"{name}f({{}})" for name in _FUNCTIONS},
    "abs": "fabsf({0})",
    "not of masks": "!{0}",
    "rem": "fmodf({0}, {1})",
    "round": "{rounding}f({0})",
    "rsqrt": "rsqrtf({0})",
}
"""Operation to its expression, see `emit.Language`; `scalars.cuh` has the functions that are not CUDA's own."""


def _number(value: Any, dtype: Any) -> str:
    if dtype == jnp.bool_:
        return "true" if value else "false"
    if jnp.issubdtype(dtype, jnp.integer):
        return f"bits({int(value)}u)"
    value = float(value)
    if math.isfinite(value):
        return f"{value!r}f"
    return "float_of(0x7fffffffu)" if math.isnan(value) else f"float_of(0x{'f' if value < 0 else '7'}f800000u)"


def _bitcast(kind: str, value: str) -> str:
    return f"bits_of({value})" if kind == "bits" else f"float_of({value})"


CUDA = emit.Language("CUDA", OPERATIONS, _number, _bitcast, "static RNN_DEVICE")

TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "float"}
"""Dtypes by their names in the kernels."""
PRODUCTS = {"mma": 0, "tf32": 1, "3xtf32": 2, "fma": 3}
"""Ways to form the recurrent product, by their numbers in the kernels."""


@functools.lru_cache(maxsize=256)
def why_not(cell: PointwiseCell) -> str | None:
    """Reason why the cell cannot be written in CUDA, or None."""
    return emit.why_not(cell, lambda: emit.struct(kernel_body.of(cell, (1, 1)), CUDA), CUDA)


@functools.lru_cache(maxsize=256)
def source(cell: PointwiseCell, plan: Plan) -> str:
    """The whole file for one cell and one layout, whose direction names its kernel."""
    shape = plan.shape
    values = {
        "size": shape.size, "heads": shape.heads, "blocks": plan.blocks, "groups": plan.groups, "split": plan.split,
        "tiles": plan.tiles, "in_registers": plan.in_registers, "in_shared": plan.in_shared, "ahead": plan.ahead,
        "sums": plan.sums,
    }  # fmt: skip
    flags = {
        "cluster": plan.sync == "cluster", "apart": plan.apart, "lengths": shape.lengths, "resets": shape.resets,
        "mask": shape.mask, "keeps": shape.keeps,
    }  # fmt: skip
    fields, rest = len(cell.Carry._fields), kernel_body.of(cell, (1, 1)).rest
    rest_of = tuple(rest.index(g) if g in rest else -1 for g in range(len(cell.gates)))
    lines = [
        f"#define RNN_PRODUCT {PRODUCTS[shape.product]}",
        f"#define RNN_FAST {int(shape.dtype != 'float32')}",
        '#include "device.cuh"',
        '#include "scalars.cuh"',
        "namespace rnn {",
        *emit.struct(kernel_body.of(cell, (1, 1), "float32", shape.states), CUDA),
        "struct Plan {",
        "  static constexpr int " + ", ".join(f"{name} = {value}" for name, value in values.items()) + ";",
        "  static constexpr bool " + ", ".join(f"{name} = {str(value).lower()}" for name, value in flags.items()) + ";",
        "  // What stays of a field of the carry: 0 nothing, 1 by booleans, 2 by shares, 3 by one share.",
        f"  static RNN_CONSTANT int stay(int n) {{ return {_chosen(shape.zoneout or (0,) * fields)}; }}",
        "  // Cell::rest_of, for indices that only the unrolled loop knows.",
        f"  static RNN_CONSTANT int rest_of(int n) {{ return {_chosen(rest_of)}; }}",
        "};",
        f"using Element = {TYPES[shape.dtype]};",
        f"using Stored = {TYPES[shape.stored]};",
        "}  // namespace rnn",
        '#include "product.cuh"',
        f'#include "{shape.direction}.cuh"',
    ]
    return "\n".join([*lines, ""])


def _chosen(values: tuple[int, ...]) -> str:
    """An expression of `n` with one of these values."""
    *others, last = values
    return " ".join([f"n == {n} ? {value} :" for n, value in enumerate(others)] + [str(last)])
