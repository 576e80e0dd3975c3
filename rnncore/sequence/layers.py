"""Layers and directions in one call, for backends that support it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rnncore import _lengths
from rnncore._types import Array
from rnncore.cells.base import Cell
from rnncore.recurrence.backend import Backend
from rnncore.recurrence.run import Constants, Differentiable, Problem, Request
from rnncore.sequence import call, choices
from rnncore.sequence.backends import BACKENDS
from rnncore.sequence.call import Options


def unroll_layers(cell: Cell, layers: Any, carries: Any, xs: Array, options: Options) -> tuple[Any, Array] | None:
    """Runs layers, each over the outputs of the one below, whose directions stand side by side.

    Args:
      cell: of all layers.
      layers, carries: for each layer the parameters and initial carries of one direction, or of the forward and the
        backward one.
      xs: inputs (*batch, T, D), or (T, *batch, D).
      options: of `unroll`, for every layer; resets, masks, zoneout and states are for calls of one layer.

    Returns:
      (carries after the last valid step, outputs (*batch, T, directions * H)); None where the backend that runs them
      takes a layer and a direction at a time.

    Raises:
      As `unroll` does, for any of the layers.
    """
    first, names, width = None, set(), xs.shape[-1]
    for row, starts in zip(layers, carries, strict=True):
        for own, start in zip(row, starts, strict=True):
            inputs: Any = jax.ShapeDtypeStruct((*xs.shape[:-1], width), xs.dtype)
            request, layout, (_, constants) = call._prepare(cell, own, inputs, options._replace(initial_carry=start))
            first = first or request
            choice = call.choose(request, options.backend, prepare=not choices.is_recording())
            names.add(choice.name)
            if len(names) > 1 or not _takes(first, names, layers):
                return None
        width = len(row) * cell.hidden_size
    axis = 0 if layout.time_major else xs.ndim - 2
    if choices.is_recording():
        choices.record(choice, together=True)
        return carries, jnp.zeros((*xs.shape[:-1], width), xs.dtype)
    return _run_layers(first, BACKENDS[names.pop()], axis, Differentiable(layers, xs, carries, None), constants)


def _takes(request: Request, names: set[str], layers: Any) -> bool:
    (name,) = names
    return request.steps > 0 and BACKENDS[name].runs_layers(request, len(layers), len(layers[0]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_layers(
    request: Request, backend: Backend, axis: int, differentiable: Differentiable, constants: Constants
) -> tuple[Any, Array]:
    xs = jnp.moveaxis(differentiable.xs, axis, 0)
    if constants.lengths is not None:
        xs = _lengths.blank_padding(xs, constants.lengths)
    result = backend.run(Problem(request, *call._follow(differentiable._replace(xs=xs), constants, 0)))
    return result.carry, jnp.moveaxis(result.outputs, 0, axis)
