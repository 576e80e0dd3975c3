"""Checks of the arguments of `unroll`, each with its error."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from rnncore import _arguments
from rnncore._types import Array, PyTree
from rnncore.cells import pointwise
from rnncore.cells.base import Cell, CellParams, GatedCell, parameter_shapes

_CACHED = functools.cached_property


def check_params(cell: Cell, params: PyTree, xs: Any) -> None:
    """Structure and shapes of the parameters; a bias may be None."""
    got = f"`unroll({type(cell).__name__}, params, xs=<{xs.dtype} {xs.shape}>)`"
    want = parameter_shapes(cell, xs.shape[-1])
    if isinstance(cell, GatedCell) and isinstance(params, CellParams):
        want = want._replace(**{name: None for name in ("bias", "recurrent_bias") if getattr(params, name) is None})
        # Without per-unit parameters any empty tuple is accepted.
        want = want if cell.units or params.units else want._replace(units=params.units)
    advice = f"make them by `cell.init(key, {xs.shape[-1]})`"
    if not pointwise.same_structure(params, want):
        raise ValueError(
            f"{got}: the parameters are a {type(params).__name__} of {len(jax.tree.leaves(params))} arrays, expected "
            f"a {type(want).__name__} of {len(jax.tree.leaves(want))}; {advice}."
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    wrong = [(p, jnp.shape(a), w.shape) for (p, a), w in zip(leaves, jax.tree.leaves(want), strict=True)]
    wrong = [(path, have, shape) for path, have, shape in wrong if have != shape]
    if [jax.tree_util.keystr(path) for path, _, _ in wrong] == [".input_kernel"] and wrong[0][1][1:] == wrong[0][2][1:]:
        raise ValueError(
            f"{got}: the inputs have D = {xs.shape[-1]} features, the parameters expect D = {wrong[0][1][0]}."
        )
    for path, have, shape in wrong:
        raise ValueError(
            f"{got}: params{jax.tree_util.keystr(path)} has shape {have}, expected {shape} for D = {xs.shape[-1]} and "
            f"hidden_size = {cell.hidden_size}; {advice}."
        )


def check_carry(name: str, cell: Cell, carry: Any, batch_shape: tuple[int, ...], dtype: Any) -> None:
    expected = jax.eval_shape(functools.partial(cell.initial_carry, batch_shape, dtype))
    if not pointwise.same_structure(carry, expected):
        raise ValueError(
            f"`unroll({name}=<{type(carry).__name__}>)`: expected {type(expected).__name__}"
            f"{getattr(expected, '_fields', '')}, as `cell.initial_carry(batch_shape)` makes it."
        )
    for got, want in zip(jax.tree.leaves(carry), jax.tree.leaves(expected), strict=True):
        if jnp.shape(got) != want.shape or not jnp.issubdtype(jnp.result_type(got), jnp.floating):
            raise ValueError(
                f"`unroll({name}=<{jnp.result_type(got)} {jnp.shape(got)}>)`: expected floating point "
                f"{want.shape}, the batch axes of xs and the hidden size."
            )


def check_resets(resets: Any, shape: tuple[int, ...]) -> Array:
    resets = jnp.asarray(resets)
    if resets.dtype != np.bool_ or resets.shape != shape:
        raise ValueError(
            f"`unroll(resets=<{resets.dtype} {resets.shape}>)`: expected bool {shape}, the axes of xs but for features."
        )
    return resets


def check_mask(mask: Any, shape: tuple[int, ...]) -> Array:
    mask = jnp.asarray(mask)
    if mask.shape != shape:
        raise ValueError(
            f"`unroll(recurrent_mask=<{mask.dtype} {mask.shape}>)`: expected {shape}, the batch axes of xs and H."
        )
    return mask


def check_zoneout(cell: Cell, zoneout: Any, shape: tuple[int, ...]) -> Any:
    carry = jax.eval_shape(cell.initial_carry)
    expected = type(carry)
    if type(zoneout) is not expected:
        raise ValueError(
            f"`unroll(zoneout=<{type(zoneout).__name__}>)`: expected {expected.__name__}{expected._fields} with None, "
            "a share or an array for each."
        )
    for name, value in zip(zoneout._fields, zoneout, strict=True):
        if value is None:
            continue
        want = (*shape, *getattr(carry, name).shape)
        number = jnp.ndim(value) == 0
        got = f"`unroll(zoneout={expected.__name__}({name}={value if number else jnp.shape(value)}))`"
        if not number and jnp.shape(value) != want:
            raise ValueError(f"{got}: expected a number or an array {want}, the axes of xs with H for features.")
        if number and not isinstance(value, jax.core.Tracer) and not 0 <= value <= 1:
            raise ValueError(f"{got}: expected a share from 0 to 1.")
    # A number is a share, True too; an array of booleans says which units keep their value.
    shares = (None if z is None else jnp.asarray(z) if jnp.ndim(z) else jnp.asarray(z, float) for z in zoneout)
    return type(zoneout)(*shares)


def check_symbolic(xs: Any, steps: Any, **chunks: Any) -> None:
    """Rejects the symbolic shapes of `jax.export` that cannot be served."""
    if is_symbolic_dim(xs.shape[-1]):
        raise ValueError(
            f"`unroll(xs=<{xs.dtype} {xs.shape}>)`: the features are symbolic, expected the number that the parameters "
            "are made for; batch and steps may be symbolic."
        )
    for name, value in chunks.items():
        if is_symbolic_dim(steps) and value not in (None, "nothing"):
            raise NotImplementedError(
                f"`unroll({name}={value!r})` with a symbolic number of steps, {steps}: chunks need a number; leave "
                f"{name} out, or export for a fixed number of steps."
            )


def check_cell(name: str, cell: Any) -> None:
    """ValueError unless this is a cell."""
    if isinstance(cell, Cell):
        fields = {field.name for field in dataclasses.fields(cell)}
        more = [n for n in vars(cell) if n not in fields and not isinstance(getattr(type(cell), n, None), _CACHED)]
        if more:
            raise ValueError(
                f"`{name}(cell=<{type(cell).__name__}>)`: its attribute {more[0]!r} is no field, so that cells that "
                "differ in it count as equal; expected `@dataclasses.dataclass(frozen=True)` above the class and "
                f"`{more[0]}: ...` in it."
            )
        return
    shown = cell.__name__ if isinstance(cell, type) else type(cell).__name__
    expected = "expected an rnncore cell, such as rnncore.LSTM(256), an instance and not the class"
    if any(base.__module__.partition(".")[0] == "flax" for base in type(cell).__mro__):
        expected = (
            "a Flax module; expected an rnncore cell. rnncore.linen.functional(cell, params) and "
            "rnncore.nnx.functional(cell) give the rnncore cell and the parameters of a Flax cell"
        )
    elif not isinstance(cell, type):
        expected = "expected an rnncore cell, such as rnncore.LSTM(256)"
    raise ValueError(f"`{name}(cell=<{shown}>)`: {expected}.")


def check_arguments(name: str, first: str, params: Any, xs: Any) -> None:
    """TypeError where the parameters were forgotten."""
    if xs is None:
        raise TypeError(
            f"`{name}({first}, {_shown(params)})`: expected {name}({first}, params, xs); make the parameters by "
            f"`{first}.init(key, D)`."
        )
    if not hasattr(xs, "dtype") and not jax.tree_util.all_leaves([xs]) and hasattr(params, "dtype"):
        got = f"`{name}({first}, {_shown(params)}, {_shown(xs)})`"
        raise TypeError(f"{got}: expected the parameters before the inputs.")


def _shown(value: Any) -> str:
    return f"<{value.dtype} {value.shape}>" if hasattr(value, "dtype") else f"<{type(value).__name__}>"


def refuse_removed(name: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    """TypeError for unknown options: those of earlier versions and of other libraries."""
    for option, value in options.items():
        why = _arguments.known_as(option, known) or "there is no such option" + _arguments.nearest(option, known)
        raise TypeError(f"`{name}({option}={_arguments.shown(value)})`: {why}.")
