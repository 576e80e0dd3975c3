"""Online rules run over time, backpropagation through time, and Jacobians by autodiff, to compare."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp

from rnncore import online


def through_time(rule: online.Rule, problem: cases.Problem, d_carry: Any, d_outputs: Any, key: Any = None) -> Any:
    """(outputs, last carry, gradient) of a whole run, forward in time; d_outputs 0 past the length."""
    params, xs, carry, lengths, resets = problem
    batch, steps = xs.shape[:-2], xs.shape[-2]
    lengths = jnp.full(batch, steps) if lengths is None else lengths
    resets = jnp.zeros((*batch, steps), bool) if resets is None else resets

    def step(state: Any, now: Any) -> Any:
        memory, total = state
        t, x, reset, dy, key = now
        memory, y = rule.step(params, memory, x, reset=reset, reset_carry=carry, valid=t < lengths, key=key)
        total = jax.tree.map(jnp.add, total, rule.gradient(params, memory, dy))
        return (memory, total), y

    first = lambda a: jnp.moveaxis(a, len(batch), 0)  # noqa: E731
    keys = None if key is None else jax.random.split(key, steps)
    now = (jnp.arange(steps), first(xs), first(resets), first(d_outputs), keys)
    start = (rule.init(params, carry), jax.tree.map(jnp.zeros_like, params))
    (memory, total), ys = jax.lax.scan(step, start, now)
    total = jax.tree.map(jnp.add, total, rule.gradient(params, memory, d_carry))
    return jnp.moveaxis(ys, 0, len(batch)), memory.carry, total


def cotangents_of(problem: cases.Problem, hidden: int) -> tuple[Any, Any]:
    """Random ones, 0 for outputs past the length."""
    batch, steps = problem.xs.shape[:-2], problem.xs.shape[-2]
    d_carry, d_outputs = cases.cotangents((problem.carry, jnp.zeros((*batch, steps, hidden))))
    if problem.lengths is not None:
        d_outputs = jnp.where((jnp.arange(steps) < problem.lengths[..., None])[..., None], d_outputs, 0)
    return d_carry, d_outputs


def by_bptt(case: cases.Case, problem: cases.Problem, d_carry: Any, d_outputs: Any) -> Any:
    """Results and the gradient of the parameters, resets and initial carry as in `through_time`."""
    results, (gradient, *_) = cases.autodiff_puller(case)(problem, (d_carry, d_outputs))
    return results, gradient


@functools.partial(jax.jit, static_argnums=(0, 4))
def numeric_jacobians(cell: Any, params: Any, carry: Any, x: Any, constant_r: bool = False) -> tuple[Any, Any, Any]:
    """(new carry, d s / d s_before (FH, FH), d s / d params by leaf (FH, ...)), by autodiff of the step as a whole."""
    z = cell.project(params, x)
    r_of = cell.recurrent_matmul(params, carry.h)

    def step(carry: Any) -> Any:
        r = r_of if constant_r else cell.recurrent_matmul(params, carry.h)
        return jnp.concatenate(cell.pointwise(params.units, cell.split(z), cell.split(r), carry)[0])

    def of_params(params: Any) -> Any:
        new, _ = cell.update(params, carry, cell.project(params, x))
        return jnp.concatenate(new)

    by_state = jnp.concatenate(jax.jacrev(step)(carry), -1)
    return cell.update(params, carry, z)[0], by_state, jax.jacrev(of_params)(params)
