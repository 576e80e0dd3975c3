"""Layers one after the other, each with its directions, for backends that run one cell at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rnncore import _lengths
from rnncore._types import Array
from rnncore.recurrence.run import Constants, Differentiable, Request, Result

Run = Callable[[Request, Differentiable, Constants], Result]


def each_way(run: Run, request: Request, layer: Sequence[Differentiable], constants: Constants) -> list[Result]:
    """One run for each direction, the second of which gets its inputs reversed."""
    return [run(request, direction, constants) for direction in layer]


def side_by_side(run: Run, request: Request, layer: Sequence[Differentiable], constants: Constants) -> list[Result]:
    """The directions as one run under vmap."""
    if len(layer) == 1:
        return each_way(run, request, layer, constants)
    together: Any = jax.tree.map(lambda *ways: jnp.stack(ways), *layer)
    results = jax.vmap(lambda direction: run(request, direction, constants))(together)
    return [jax.tree.map(lambda a, way=way: a[way], results) for way in range(len(layer))]


def run_layers(
    run: Run, request: Request, differentiable: Differentiable, constants: Constants, directions: Callable = each_way
) -> Result:
    """The run of a stack: of parameters and carries there is, for each layer, a tuple with one for each direction."""
    xs, lengths, ends = differentiable.xs, constants.lengths, []
    for row, starts in zip(differentiable.params, differentiable.initial_carry, strict=True):
        one = dataclasses.replace(request, input_size=xs.shape[-1])
        ways = (xs, _lengths.reverse_time(xs, lengths)) if len(row) == 2 else (xs,)
        layer = [Differentiable(own, x, start, None) for own, x, start in zip(row, ways, starts, strict=True)]
        results = directions(run, one, layer, constants)
        outputs: list[Array] = [result.outputs for result in results]
        outputs[1:] = [_lengths.reverse_time(ys, lengths) for ys in outputs[1:]]
        ends.append(tuple(result.carry for result in results))
        xs = jnp.concatenate(outputs, -1)
    return Result(tuple(ends), xs, None, None)
