"""A run that JAX differentiates to every order, and the tangent of one whose residuals have been kept.

The derivative of a recurrence is a recurrence.  With L_t the linearised step,

  ds_t = L_t(dunits, dx_t, dU h_{t-1} + U dh_{t-1}, ds_{t-1})

and dU h_{t-1}, the derivative of the product in its parameters, needs no loop: it is a product over all steps.  What
remains is the same kind of recurrence with L in place of the step, so that higher orders follow in the same way, and
JAX transposes it.  No weight gradient travels through the loop.  L_t is arithmetic on the results of the step's
transcendental functions (`pointwise.linearize`).

Every backend has its second and higher derivatives, and by default its tangent, from here.  A derivative knows the
outputs of the run, and so all products U h_{t-1} at once: what L_t depends on is formed from them without running the
recurrence again (`residuals_from_outputs`), by operations that JAX differentiates further.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from rnncore import _lengths
from rnncore._types import Array, PyTree
from rnncore.cells.base import CellParams, GatedCell
from rnncore.recurrence import step as steps
from rnncore.recurrence.chunks import chunk_size, scan_chunks
from rnncore.recurrence.joint import jvp_at, value_and_tangent
from rnncore.recurrence.run import Differentiable, Problem, Request, Result, dense
from rnncore.recurrence.step import Inputs, LinearizedStep, RecurrentProduct, Step

CARRIES = "rnncore_carries"
"""Name, for checkpoint policies, of what a recurrence that rematerializes keeps."""


def run(problem: Problem) -> Result:
    """The run of a gated cell, with the memory policy of the request."""
    return _run(problem, steps.of(problem))


def run_with_residuals(problem: Problem) -> tuple[Result, PyTree]:
    """The run, and what its steps keep, for `residuals`; without a memory policy."""
    result = _run(problem, linearized(problem).forward)
    gates, kept = result.gates
    return result._replace(gates=gates), kept


def residuals(problem: Problem, outputs: Array, kept: PyTree) -> tuple[Array, ...]:
    """The residuals of `tangent`, of the outputs of a run and what its steps keep."""
    return linearized(problem).residuals(_first(problem), before(problem, outputs), kept)


def linearized(problem: Problem, keep: tuple[str, ...] = ("state", "sum", "input")) -> LinearizedStep:
    """The derivative of the steps of a run; by default it keeps all that is not its parameters or its outputs."""
    return LinearizedStep(
        steps.of(problem), steps.recurrent_product(step_cell(problem.request)), _first(problem), keep
    )  # fmt: skip


def _first(problem: Problem) -> Inputs:
    """The inputs of the first step."""
    request, (params, xs, start, reset_carry), _ = problem
    cell = step_cell(request)
    zs = cell.split(cell.project(params, jnp.take(xs, 0, request.time_axis)))
    return Inputs(steps.recurrent_params(params), steps.spread_units(params, start.h), zs, start, reset_carry)


def step_cell(request: Request) -> GatedCell:
    assert isinstance(request.cell, GatedCell)
    return request.cell


def _run(problem: Problem, step: Step) -> Result:
    request, (params, xs, start, reset_carry), constants = problem
    cell, recompute = step_cell(request), request.recompute
    xs = jnp.moveaxis(xs, request.time_axis, 0)
    product = steps.recurrent_product(cell)
    projection, kernel = steps.input_params(cell, params), steps.recurrent_params(params)
    recurrent, product = (kernel, product.tangent_params(kernel)), product.with_tangent_params
    units = steps.spread_units(params, start.h)

    def chunk(carry: Any, first: Any, now: Any) -> Any:
        (carry, last), (xs, resets, zoneout) = carry, now
        zs = cell.split(cell.project(projection, xs))
        inputs = Inputs(recurrent, units, zs, carry, reset_carry, resets, constants.recurrent_mask, zoneout)
        carry, outputs, (carries, gates) = recurrence(step, product, inputs, recompute == "gates")
        last = carry if constants.lengths is None else _lengths.last_valid(last, carries, constants.lengths, first)
        return (carry, last), (outputs, carries if request.return_states else None, gates)

    size = chunk_size(request)
    if recompute == "gates":
        # The projected inputs are recomputed too: they are four times the size of the carries.
        policy = jax.checkpoint_policies.save_only_these_names(CARRIES)
        # Inside a scan XLA cannot merge both computations; for a single chunk it would.
        chunk = jax.checkpoint(chunk, policy=policy, prevent_cse=size >= request.steps)
    stacks = (xs, *steps.per_step(request, constants))
    (_, last), (outputs, carries, gates) = scan_chunks(
        chunk, (start, start), stacks, request.steps, size, recompute == "chunk"
    )
    return Result(last, jnp.moveaxis(outputs, 0, request.time_axis), carries, gates)


def jvp(run: Callable[[Problem], Result], problem: Problem, tangents: Differentiable) -> Result:
    """The tangent of a plain run; None for an array that does not move."""
    request, differentiable, constants = problem
    tree: Any
    leaves, tree = jax.tree.flatten(differentiable)
    moves = {n: t for n, t in enumerate(tree.flatten_up_to(tangents)) if t is not None}
    return jvp_at(lambda *flat: run(Problem(request, tree.unflatten(flat), constants)), [*moves], leaves, moves)[1]


def tangent(
    problem: Problem, result: Result, residuals: tuple[Array, ...], tangents: Differentiable
) -> Result:  # fmt: skip
    """The tangent of a run whose residuals are at hand, as one loop of L_t.

    Args:
      problem, result: the run.
      residuals: (T, *batch, H) arrays, all that L_t depends on but per-unit parameters: what
        `kernel_body.Body.residuals` gives, in its order.
      tangents: None for an array that does not move.
    """
    request, differentiable, constants = problem
    cell, axis = step_cell(request), request.time_axis
    params, xs, start, _ = differentiable
    moved = dense(tangents, differentiable)
    inputs, linear = _first(problem), linearized(problem, ())
    recurrent, units, product = inputs.recurrent_params, inputs.units, linear.product
    resets, zoneout = steps.per_step(request, constants)
    projection, dprojection = steps.input_params(cell, params), steps.input_params(cell, tangents.params)
    drecurrent = None
    if jax.tree.leaves(steps.recurrent_params(tangents.params)):
        drecurrent = steps.recurrent_params(moved.params)
    dunits = steps.spread_units(moved.params, start.h) if jax.tree.leaves(tangents.params.units) else None
    tangent_params = product.tangent_params(recurrent)

    def chunk(carry: Any, first: Any, now: Any) -> Any:
        (carry, last), (xs, dxs, residuals, hs, resets, zoneout) = carry, now
        dz = _moved_projection(cell, projection, xs, dprojection, dxs)
        prepared = linear.prepare(
            steps.masked(constants.recurrent_mask, hs), recurrent, drecurrent, cell.split(dz), dunits
        )
        inputs = Inputs(
            tangent_params, units, (residuals, *prepared), carry, moved.reset_carry, resets, constants.recurrent_mask,
            zoneout,
        )  # fmt: skip
        carry, dhs, (carries, gates) = recurrence(linear.tangent, product.tangent, inputs, False)
        last = carry if constants.lengths is None else _lengths.last_valid(last, carries, constants.lengths, first)
        return (carry, last), (dhs, (carries, gates) if request.return_states else (None, None))

    dxs = None if tangents.xs is None else jnp.moveaxis(tangents.xs, axis, 0)
    stacks = (jnp.moveaxis(xs, axis, 0), dxs, residuals, before(problem, result.outputs), resets, zoneout)
    begin = (moved.initial_carry, moved.initial_carry)
    (_, last), (dhs, states) = scan_chunks(chunk, begin, stacks, request.steps, chunk_size(request), False)
    return Result(last, jnp.moveaxis(dhs, 0, axis), *states)


def residuals_from_outputs(problem: Problem, outputs: Array) -> tuple[Array, ...]:
    """The residuals of `tangent` as a function of the outputs too: no product with U remains in a loop."""
    request, (params, xs, start, reset_carry), constants = problem
    cell, axis = step_cell(request), request.time_axis
    linear, inputs = linearized(problem), _first(problem)
    step, product, recurrent, units = linear.step, linear.product, inputs.recurrent_params, inputs.units
    projection = steps.input_params(cell, params)
    resets, zoneout = steps.per_step(request, constants)
    hs = before(problem, outputs)

    def body(carry: Any, now: Any) -> Any:
        x, rest, h, resets, zoneout = now
        old = steps.reset(resets, reset_carry, carry)._replace(h=h)
        new, (_, kept) = linear.forward.update(units, x, rest, old)
        # The next step reads its h from the outputs.
        return steps.blend(zoneout, old, new)._replace(h=carry.h), kept

    def chunk(carry: Any, first: Any, now: Any) -> Any:
        xs, hs, resets, zoneout = now
        zs = cell.split(cell.project(projection, xs))
        masked_h = steps.masked(constants.recurrent_mask, hs)
        x, rest = step.add_recurrent(zs, product.product(recurrent, masked_h))
        if len(start) > 1:
            return lax.scan(body, carry, (x, rest, hs, resets, zoneout))
        return carry, jax.vmap(linear.forward.update, (None, 0, 0, 0))(units, x, rest, start._replace(h=hs))[1][1]

    stacks = (jnp.moveaxis(xs, axis, 0), hs, resets, zoneout)
    _, kept = scan_chunks(chunk, start, stacks, request.steps, chunk_size(request), False)
    return linear.residuals(inputs, hs, kept)


def _moved_projection(cell: GatedCell, params: CellParams, xs: Array, dparams: CellParams, dxs: Any) -> Array:
    """The tangent of the projected inputs: a product for each of the two that moves."""
    tree: Any
    flat, tree = jax.tree.flatten((params, xs))
    moves = {n: t for n, t in enumerate(tree.flatten_up_to((dparams, dxs))) if t is not None}
    if not moves:
        shape = jax.eval_shape(cell.project, params, xs)
        return jnp.zeros(shape.shape, shape.dtype)
    return jvp_at(lambda *flat: cell.project(*tree.unflatten(flat)), [*moves], flat, moves)[1]


def before(problem: Problem, outputs: Array) -> Array:
    """h_{t-1} of every step of a run, time-major, after resets."""
    request, (_, _, start, reset_carry), constants = problem
    resets, _ = steps.per_step(request, constants)
    return previous(start, reset_carry, resets, jnp.moveaxis(outputs, request.time_axis, 0))


def previous(initial_carry: Any, reset_carry: Any, resets: Array | None, hs: Array) -> Array:
    """h_{t-1} of every step, after resets."""
    before = jnp.concatenate([initial_carry.h.astype(hs.dtype)[None], hs[:-1]])
    return before if resets is None else jnp.where(resets, reset_carry.h[None], before)


def _loop(step: Step, product: RecurrentProduct, inputs: Inputs) -> tuple[Any, Array, PyTree]:
    def body(carry: Any, now: Any) -> Any:
        x, resets, zoneout = now
        new, emitted = steps.advance(step, product, inputs._replace(xs=x, resets=resets, zoneout=zoneout), carry)
        return new, (new.h, (new if step.carries else None, emitted))

    last, (hs, emitted) = lax.scan(body, inputs.initial_carry, (inputs.xs, inputs.resets, inputs.zoneout))
    return last, hs, emitted


def recurrence(step: Step, product: RecurrentProduct, inputs: Inputs, rematerialize: bool) -> tuple[Any, Array, PyTree]:
    """(last carry, h of every step (T, *batch, H), (carries or None, emitted) of every step).

    With `rematerialize` derivatives keep the carries alone and form the products and gates again where they need them.
    The carries are named CARRIES; a checkpoint policy around the recurrence can leave out all else, its inputs too.
    """

    @jax.custom_jvp
    def run(inputs: Inputs) -> Any:
        return _loop(step, product, inputs)

    def rule(primals: Any, tangents: Any) -> Any:
        (inputs,), (moved,) = primals, tangents
        return value_and_tangent(functools.partial(_loop, step, product), apart, inputs, moved)

    def apart(inputs: Inputs, moved: Inputs) -> Any:
        """A loop of the step and one of its tangent, which JAX transposes with no weight gradient in it."""
        first = inputs._replace(xs=jax.tree.map(lambda a: a[0], inputs.xs))
        keep = ("state",) if rematerialize else ("state", "sum")
        linear = LinearizedStep(step, product, first, keep, rematerialize)
        last, hs, (carries, (emitted, kept)) = recurrence(linear.forward, product, inputs, rematerialize)
        if rematerialize:
            hs, kept = checkpoint_name((hs, kept), CARRIES)
        dparams = _dense(moved.recurrent_params, inputs.recurrent_params) if _moves(moved.recurrent_params) else None
        dunits = _dense(moved.units, inputs.units) if _moves(moved.units) else None
        dxs, dstart, dreset = (_dense(m, i) for m, i in zip(moved[2:5], inputs[2:5], strict=True))

        def tangent(inputs: Any, hs: Any, kept: Any, dparams: Any, dxs: Any, dunits: Any, *dcarries: Any) -> Any:
            before = previous(inputs.initial_carry, inputs.reset_carry, inputs.resets, hs)
            residuals = linear.residuals(inputs, before, kept)
            masked_h = steps.masked(inputs.recurrent_mask, before)
            xs = (residuals, *linear.prepare(masked_h, inputs.recurrent_params, dparams, dxs, dunits))
            tangent_params = product.tangent_params(inputs.recurrent_params)
            dstart, dreset = dcarries
            moved = inputs._replace(recurrent_params=tangent_params, xs=xs, initial_carry=dstart, reset_carry=dreset)
            return recurrence(linear.tangent, product.tangent, moved, False)

        changes = tangent(inputs, hs, kept, dparams, dxs, dunits, dstart, dreset)
        return (last, hs, (carries, emitted)), changes

    run.defjvp(rule, symbolic_zeros=True)
    return run(inputs)


def _moves(tangents: Any) -> bool:
    leaves = jax.tree.leaves(tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
    return any(not isinstance(t, SymbolicZero) for t in leaves)


def _dense(tangents: Any, primals: Any) -> Any:
    """Tangents with the symbolic zeros written out."""
    return jax.tree.map(
        lambda t, x: jnp.zeros_like(x) if isinstance(t, SymbolicZero) else t,
        tangents,
        primals,
        is_leaf=lambda t: isinstance(t, SymbolicZero),
    )
