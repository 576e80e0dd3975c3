"""Layers one after the other, each with its directions, for backends that run one cell at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rnncore import _lengths
from rnncore._types import Array
from rnncore.recurrence.run import Differentiable, Problem, Result


def run_layers(run: Callable[[Problem], Result], problem: Problem, side_by_side: bool = False) -> Result:
    """The run of a stack: of parameters and carries there is, for each layer, a tuple with one for each direction.

    The second direction gets its inputs reversed.  `side_by_side`: both are one run, under vmap.
    """
    request, differentiable, constants = problem
    xs, lengths, ends = differentiable.xs, constants.lengths, []
    for row, starts in zip(differentiable.params, differentiable.initial_carry, strict=True):
        one = dataclasses.replace(request, input_size=xs.shape[-1])
        ways = (xs, _lengths.reverse_time(xs, lengths)) if len(row) == 2 else (xs,)
        layer = [Differentiable(own, x, start, None) for own, x, start in zip(row, ways, starts, strict=True)]

        def of(direction: Differentiable, one: Any = one) -> Result:
            return run(Problem(one, direction, constants))

        if side_by_side and len(layer) == 2:
            both = jax.vmap(of)(jax.tree.map(lambda *two: jnp.stack(two), *layer))
            results = [jax.tree.map(lambda a, way=way: a[way], both) for way in range(2)]
        else:
            results = list(map(of, layer))
        outputs: list[Array] = [result.outputs for result in results]
        outputs[1:] = [_lengths.reverse_time(ys, lengths) for ys in outputs[1:]]
        ends.append(tuple(result.carry for result in results))
        xs = jnp.concatenate(outputs, -1)
    return Result(tuple(ends), xs)
