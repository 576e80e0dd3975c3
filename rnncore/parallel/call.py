"""The arguments of a parallel run: checked once, converted to time-major."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.cells import linear_state, pointwise, structured_kernels
from rnncore.cells.base import Cell, PointwiseCell
from rnncore.cells.blocks import blocks_of
from rnncore.parallel.newton import Newton
from rnncore.parallel.sweep import Sweep
from rnncore.sequence import checks

METHODS = ("newton", "quasi")


class Options(NamedTuple):
    """The options of `parallel.unroll`, see there."""

    initial_carry: Any = None
    resets: Any = None
    reset_carry: Any = None
    time_major: bool = False
    method: str = "newton"
    tolerance: float | None = None
    max_iterations: int = 100
    sweeps: int = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static about a call; `linear` as in `cells.linear_state`."""

    newton: Newton
    time_major: bool
    linear: tuple[str, ...] | None


class Arrays(NamedTuple):
    """The arrays of a call, time-major."""

    params: PyTree
    xs: Array
    start: Any
    reset_carry: Any
    resets: Array | None


def prepare(cell: Cell, params: PyTree, xs: Array, options: Options) -> tuple[Settings, Arrays]:
    """All checks of a call, in one place."""
    initial_carry, resets, reset_carry, time_major, method, tolerance, max_iterations, sweeps = options
    checks.check_arguments("parallel.unroll", "cell", params, xs)
    checks.check_cell("parallel.unroll", cell)
    name = type(cell).__name__
    if not isinstance(cell, PointwiseCell):
        raise NotImplementedError(
            f"`parallel.unroll(cell=<{name}>)`: expected a PointwiseCell, of which the Jacobian of a step is known; "
            "use rnncore.unroll."
        )
    pointwise.check_elementwise(cell)
    own = pointwise.why_not_as_declared(cell, "update", "split")
    if own:
        raise NotImplementedError(f"`parallel.unroll(cell=<{name}>)`: {own}; use rnncore.unroll.")
    if method not in METHODS:
        raise ValueError(f"`parallel.unroll(method={method!r})`: expected 'newton' or 'quasi'.")
    for option, number, least in (("max_iterations", max_iterations, 1), ("sweeps", sweeps, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"`parallel.unroll({option}={number!r})`: expected an int, at least {least}.")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"`parallel.unroll(tolerance={tolerance!r})`: expected a positive number, or None.")
    xs = jnp.asarray(xs)
    if not jnp.issubdtype(xs.dtype, jnp.floating) or xs.ndim < 2:
        raise ValueError(
            f"`parallel.unroll(xs=<{xs.dtype} {xs.shape}>)`: expected floating point (*batch, T, D), at least two axes."
        )
    checks.check_params(cell, params, xs)
    xs = xs if time_major else jnp.moveaxis(xs, -2, 0)
    steps, *batch = xs.shape[:-1]
    if not steps:
        raise ValueError(f"`parallel.unroll(xs=<{xs.dtype} {xs.shape}>)`: expected at least one step.")
    linear = linear_state.linear_fields(cell)
    cell, params = structured_kernels.plain(cell, params)
    assert isinstance(cell, PointwiseCell)
    blocks_of(cell.recurrence, cell.hidden_size)  # refuses a structure of which it is not known
    dtype = jnp.result_type(*jax.tree.leaves(params), xs)
    if jnp.finfo(dtype).bits < 32:
        raise NotImplementedError(
            f"`parallel.unroll(xs=<{xs.dtype}>)`: in {dtype} the iteration cannot converge; expected "
            "float32 or float64 parameters and inputs."
        )
    for what, carry in (("initial_carry", initial_carry), ("reset_carry", reset_carry)):
        if carry is not None:
            checks.check_carry(what, cell, carry, tuple(batch), dtype)
    if reset_carry is not None and resets is None:
        raise ValueError("`parallel.unroll(reset_carry=...)`: has an effect only with resets.")
    if resets is not None:
        resets = checks.check_resets(resets, (*batch, steps) if not time_major else (steps, *batch))
        resets = resets if time_major else jnp.moveaxis(resets, -1, 0)
        resets = resets[..., None]
    start = cell.initial_carry(tuple(batch), dtype) if initial_carry is None else initial_carry
    start = jax.tree.map(lambda a: jnp.asarray(a, dtype), start)
    if resets is not None:
        back = start if reset_carry is None else reset_carry
        reset_carry = jax.tree.map(lambda a: jnp.asarray(a, dtype), back)
    if tolerance is None:
        tolerance = 128 * float(jnp.finfo(dtype).eps)
    newton = Newton(Sweep(cell, method == "quasi"), float(tolerance), max_iterations, sweeps)
    return Settings(newton, time_major, linear), Arrays(params, xs, start, reset_carry, resets)
