"""A run with every mode and order of differentiation: three JAX primitives that are each other's derivatives.

  run       differentiable, constants -> result [, residuals]    its jvp is `tangent`
  tangent   held, tangents -> tangents of the result             linear in them; its transpose is `backward`
  backward  held, cotangents -> cotangents of differentiable     linear in them; its transpose is `tangent`

where held = (differentiable, constants, result, residuals).  Reverse mode is then one run that keeps residuals and one
backward loop, forward mode one such run and one tangent loop.  What second and higher orders need besides the two
linear parts is JAX's derivative of `Backend.plain_tangent` and of its transpose, which are functions of the result too:
its tangents are at hand, and the run is not run again.  The same holds of residuals where the backend says so
(`residuals_move`); elsewhere they stand in held as values that were worked out before, and have no tangents.

vmap gives the same primitive with one more entry in `maps`: it is vmap of the backend's function as it was, so that
all rules hold inside of any number of maps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.interpreters import batching as jax_batching
from jax.interpreters import partial_eval as pe

from rnncore import _compat
from rnncore._types import Array
from rnncore.recurrence import batching
from rnncore.recurrence.joint import jvp_at
from rnncore.recurrence.loop import Loop, at_leaves
from rnncore.recurrence.run import Constants, Differentiable, Problem, Request, Result

RESIDUALS = "rnncore_residuals"
"""Name, for checkpoint policies, of what a run keeps for its derivative, its result included."""


def run(backend: Any, problem: Problem) -> Result:
    """`backend.forward` without residuals, with all its derivatives; backend: a `backend.LoopBackend`."""
    request, differentiable, constants = problem
    shapes, _ = jax.eval_shape(_forward(backend, request, False), differentiable, constants)
    leaves, tree = jax.tree.flatten(shapes)
    inexact = tuple(n for n, a in enumerate(leaves) if jnp.issubdtype(a.dtype, jnp.inexact))
    loop = Loop(backend, request, jax.tree.structure(differentiable), jax.tree.structure(constants), tree, inexact)
    flat = run_p.bind(*jax.tree.leaves((differentiable, constants)), loop=loop, maps=(), which=())
    return jax.tree.unflatten(tree, flat)


@functools.lru_cache(maxsize=1024)
def _forward(backend: Any, request: Request, keep: bool) -> Callable:
    """`backend.forward`, traced once for the same shapes."""

    def call(differentiable: Differentiable, constants: Constants) -> Any:
        with jax.default_matmul_precision(request.precision):
            return backend.forward(Problem(request, differentiable, constants), keep)

    return jax.jit(call)


# ------------------------------------------------------------- the functions, of and to flat lists of arrays
#
# `which` is static and says: of `tangent` which leaves of differentiable move; of `backward` which leaves of the result
# have a cotangent and which cotangents are wanted.


def _run(loop: Loop, which: tuple, *flat: Array) -> list[Array]:
    request, *arrays = loop.problem(flat)
    return jax.tree.leaves(_forward(loop.backend, request, loop.residuals is not None)(*arrays))


def _tangent(loop: Loop, which: tuple[int, ...], *flat: Array) -> list[Array]:
    *held, moved = loop.opened(flat)
    return _inexact(loop, loop.backend.tangent(*held, loop.differentiable_at(which, moved)))


def _backward(loop: Loop, which: tuple[tuple[int, ...], tuple[int, ...]], *flat: Array) -> list[Array]:
    *held, arriving = loop.opened(flat)
    cotangents = at_leaves(loop.result, which[0], arriving)
    wanted = loop.differentiable_at(which[1], [True] * len(which[1]), False)
    leaves = loop.differentiable.flatten_up_to(loop.backend.backward(*held, cotangents, wanted))
    return [leaves[n] for n in which[1]]


def _inexact(loop: Loop, result: Any) -> list[Array]:
    leaves = loop.result.flatten_up_to(result)
    return [leaves[n] for n in loop.inexact]


def _plain_tangent(loop: Loop, which: tuple[int, ...], *flat: Array) -> list[Array]:
    """`_tangent` as a function of all its operands but the residuals."""
    problem, result, _, moved = loop.opened(flat)
    return _inexact(loop, loop.backend.plain_tangent(problem, result, loop.differentiable_at(which, moved)))


def _higher_tangent(loop: Loop, which: tuple[int, ...], *flat: Array) -> list[Array]:
    """`_tangent` as a function of all its operands, differentiated by JAX."""
    return (_tangent if _residuals_move(loop, flat) else _plain_tangent)(loop, which, *flat)


def _transposed(tangent: Callable, loop: Loop, which: tuple[tuple[int, ...], tuple[int, ...]], *flat: Array) -> Any:
    held, cotangents = flat[: loop.count], flat[loop.count :]
    arriving = dict(zip(which[0], cotangents, strict=True))
    own = zip(loop.inexact, _inexact(loop, loop.opened(held)[1]), strict=True)
    back = jax.linear_transpose(lambda *moved: tangent(loop, which[1], *held, *moved), *(held[n] for n in which[1]))
    return list(back([arriving.get(n, jnp.zeros_like(a)) for n, a in own]))


_plain_backward = functools.partial(_transposed, _plain_tangent)
_higher_backward = functools.partial(_transposed, _higher_tangent)


def _run_with_residuals(loop: Loop, which: tuple, *flat: Array) -> list[Array]:
    """`_run` with residuals, as JAX differentiates it."""
    return jax.tree.leaves(loop.backend.plain_with_residuals(loop.problem(flat)))


def _run_plain(loop: Loop, which: tuple, *flat: Array) -> list[Array]:
    """`_run` by `Backend.plain`, with zeros for residuals: `_plain_tangent` and `_plain_backward` need none."""
    request, *arrays = problem = loop.problem(flat)
    results = jax.tree.leaves(loop.backend.plain(problem))
    if loop.residuals is None:
        return results
    _, kept = jax.eval_shape(_forward(loop.backend, request, True), *arrays)
    return results + [jnp.zeros(a.shape, a.dtype) for a in jax.tree.leaves(kept)]


# -------------------------------------------------------------------------------------- the primitives


@functools.lru_cache(maxsize=4096)
def _mapped(function: Callable, loop: Loop, maps: tuple, which: Any) -> Callable:
    """A function of flat arrays under all its maps, the last of which is the outermost."""

    def one(*flat: Array) -> list[Array]:
        with jax.default_matmul_precision(loop.request.precision):
            return function(loop, which, *flat)

    call: Callable = one
    for dims in maps:
        call = jax.vmap(call, dims)
    return jax.jit(call)


def _primitive(name: str, function: Callable, plain: Callable, higher: Callable, roles: Callable) -> Primitive:
    """A primitive of one of the functions above: `plain` for other machines, `higher` as JAX differentiates it."""
    primitive = Primitive(f"rnncore_{name}")
    primitive.multiple_results = True

    def evaluate(*flat: Array, **params: Any) -> list[Array]:
        return _mapped(higher if _shared(**params) else function, **params)(*flat)

    def batch(flat: Any, dims: Any, loop: Loop, maps: tuple, which: Any) -> Any:
        if not maps and loop.backend.maps_into_batch:
            axes, results = roles(loop, which, [a.ndim - (d is not None) for a, d in zip(flat, dims, strict=True)])
            if results is not None and batching.only_sequences(axes, dims, loop):
                merged = map(batching.into_batch(flat, dims), flat, dims, axes)
                larger = batching.with_batch(loop, flat, dims)
                return primitive.bind(*merged, loop=larger, maps=(), which=which), results
        front = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(flat, dims, strict=True)]
        mapped = tuple(None if d is None else 0 for d in dims)
        out = primitive.bind(*front, loop=loop, maps=(*maps, mapped), which=which)
        return out, [0] * len(out)

    def evaluate_plain(*flat: Array, **params: Any) -> list[Array]:
        return _mapped(plain, **params)(*flat)

    def lower(context: Any, *flat: Any, loop: Loop, **params: Any) -> Any:
        away = loop.backend.opaque and _compat.runs_elsewhere(context, loop.request.platform)
        rule = mlir.lower_fun(evaluate_plain if away else evaluate, multiple_results=True)
        return rule(context, *flat, loop=loop, **params)

    def abstract(*avals: Any, loop: Loop, maps: tuple, which: Any) -> Any:
        if primitive.name == "rnncore_tangent" and not maps and all(map(_compat.is_of_one_device, avals)):
            # Known without tracing the loop, which in reverse mode is transposed and never run.
            before = loop.differentiable.num_leaves + loop.constants.num_leaves
            return [avals[before + n].to_tangent_aval() for n in loop.inexact], set()
        # An interpreted kernel has effects, which whatever lowers this has to know.
        traced = jax.make_jaxpr(_mapped(function, loop, maps, which))(*avals)
        return traced.out_avals, traced.effects

    primitive.def_impl(evaluate)
    primitive.def_effectful_abstract_eval(abstract)
    mlir.register_lowering(primitive, lower)
    jax_batching.primitive_batchers[primitive] = batch
    return primitive


def _shared(loop: Loop, maps: tuple, which: Any) -> bool:
    """Whether many tangents or cotangents are of one run: an opaque call would have to have its own copy for each."""
    if not maps or not loop.backend.opaque or loop.residuals is None:
        return False
    held = [d for dims in maps for d in dims[: loop.count]]
    return all(d is None for d in held) and loop.backend.residuals_move(loop.request)


run_p = _primitive("run", _run, _run_plain, _run_with_residuals, batching.run_roles)
tangent_p = _primitive("tangent", _tangent, _plain_tangent, _higher_tangent, batching.tangent_roles)
backward_p = _primitive("backward", _backward, _plain_backward, _higher_backward, batching.backward_roles)


def _moving(tangents: Any) -> tuple[int, ...]:
    return tuple(n for n, t in enumerate(tangents) if not isinstance(t, ad.Zero))


def _behind_held(maps: tuple, count: int, axes: Callable[[tuple], tuple]) -> tuple:
    """`maps` of a call whose first `count` operands are as they were and whose others lie at `axes(dims)`."""
    return tuple((*dims[:count], *axes(dims)) for dims in maps)


def _zeros(values: Any) -> list[Any]:
    return [ad.Zero(jax.typeof(a).to_tangent_aval()) for a in values]


def _keeping(loop: Loop, maps: tuple, primals: Any) -> Loop:
    """The loop with the structure of its residuals."""
    if loop.residuals is not None:
        return loop
    avals = [jax.typeof(a) for a in primals]
    if maps:
        axes = [sum(dims[n] is not None for dims in maps) for n in range(len(avals))]
        avals = [jax.ShapeDtypeStruct(a.shape[k:], a.dtype) for a, k in zip(avals, axes, strict=True)]
    request, *shapes = loop.problem(avals)
    _, residuals = jax.eval_shape(_forward(loop.backend, request, True), *shapes)
    return dataclasses.replace(loop, residuals=jax.tree.structure(residuals))


def _run_jvp(primals: Any, tangents: Any, loop: Loop, maps: tuple, which: tuple) -> Any:
    moves, shown = _moving(tangents[: loop.differentiable.num_leaves]), loop.result.num_leaves
    if not moves:
        results = run_p.bind(*primals, loop=loop, maps=maps, which=which)
        return results, _zeros(results)
    if loop.residuals is not None and _residuals_move(loop, primals):
        results, changes = jvp_at(_mapped(_run_with_residuals, loop, maps, which), moves, primals, tangents)
        zeros = _zeros(results)
        return results, [z if a.dtype == jax.dtypes.float0 else a for a, z in zip(changes, zeros, strict=True)]
    keeping = _keeping(loop, maps, primals)
    results = run_p.bind(*primals, loop=keeping, maps=maps, which=which)
    results = checkpoint_name(results, RESIDUALS)
    shared = _behind_held(maps, len(primals), lambda dims: (0,) * len(results) + tuple(dims[n] for n in moves))
    found = tangent_p.bind(*primals, *results, *(tangents[n] for n in moves), loop=keeping, maps=shared, which=moves)
    results = results if loop.residuals is not None else results[:shown]
    changes = _zeros(results)
    for n, a in zip(loop.inexact, found, strict=True):
        changes[n] = a
    return results, changes


def _residuals_move(loop: Loop, operands: Any) -> bool:
    """Whether the residuals of a run have tangents; inside shard_map a step may keep others than were compiled for."""
    return loop.backend.residuals_move(loop.request) and not any(map(_compat.varying_axes, operands))


def _linear_jvp(primitive: Primitive, higher: Callable) -> Callable:
    """The rule of a primitive that is linear in what stands behind held, and is `higher` as a function of the rest."""

    def rule(primals: Any, tangents: Any, loop: Loop, maps: tuple, which: Any) -> Any:
        moves = _moving(tangents[: loop.count])
        linear = tuple(loop.count + n for n in _moving(tangents[loop.count :]))
        if moves:
            # The derivative also computes the value, so nothing runs twice.
            return jvp_at(_mapped(higher, loop, maps, which), moves + linear, primals, tangents)
        out = primitive.bind(*primals, loop=loop, maps=maps, which=which)
        if not linear:
            return out, _zeros(out)
        return out, _bound(primitive, loop, maps, which, primals[: loop.count], tangents[loop.count :])

    return rule


def _bound(primitive: Primitive, loop: Loop, maps: tuple, which: Any, held: Any, linear: Any) -> list[Any]:
    """A linear primitive on those of its linear operands that are not zero."""
    here = _moving(linear)
    maps = _behind_held(maps, len(held), lambda dims: tuple(dims[len(held) + n] for n in here))
    if primitive is tangent_p:
        which = tuple(which[n] for n in here)
    else:
        which = tuple(which[0][n] for n in here), which[1]
    return primitive.bind(*held, *(linear[n] for n in here), loop=loop, maps=maps, which=which)


def _summed(found: Sequence[Any], maps: tuple, first: int, which: Sequence[int]) -> list[Any]:
    """Cotangents over all maps, the outermost one first, to those of operands that some maps share."""
    levels = len(maps)
    axes = [tuple(levels - 1 - m for m, dims in enumerate(maps) if dims[first + n] is None) for n in which]
    return [jnp.sum(a, axis) if axis else a for a, axis in zip(found, axes, strict=True)]


def _tangent_transpose(cts: Any, *operands: Any, loop: Loop, maps: tuple, which: tuple[int, ...]) -> Any:
    held, moved = operands[: loop.count], operands[loop.count :]
    asked = [n for n, a in enumerate(moved) if ad.is_undefined_primal(a)]
    arriving = _moving(cts)
    if not arriving or not asked:
        return [None] * len(operands)
    shared = _behind_held(maps, len(held), lambda _: (0,) * len(arriving))
    wanted = tuple(loop.inexact[n] for n in arriving), tuple(which[n] for n in asked)
    found = backward_p.bind(*held, *(cts[n] for n in arriving), loop=loop, maps=shared, which=wanted)
    answers = dict(zip(asked, _summed(found, maps, len(held), asked), strict=True))
    return [None] * len(held) + [answers.get(n) for n in range(len(moved))]


def _backward_transpose(cts: Any, *operands: Any, loop: Loop, maps: tuple, which: Any) -> Any:
    held, cotangents = operands[: loop.count], operands[loop.count :]
    moves = _moving(cts)
    if not moves:
        return [None] * len(operands)
    shared = _behind_held(maps, len(held), lambda _: (0,) * len(moves))
    found = tangent_p.bind(
        *held, *(cts[n] for n in moves), loop=loop, maps=shared, which=tuple(which[1][n] for n in moves)
    )
    of_leaf = dict(zip(loop.inexact, found, strict=True))
    found = _summed([of_leaf[n] for n in which[0]], maps, len(held), range(len(which[0])))
    asked = map(ad.is_undefined_primal, cotangents)
    return [None] * len(held) + [a if wanted else None for a, wanted in zip(found, asked, strict=True)]


def _run_dce(used: list[bool], *last: Any) -> Any:
    """Residuals that are not used are not kept."""
    eqn = last[-1]  # JAX 0.12 passes which inputs are live first
    loop = eqn.params["loop"]
    shown = loop.result.num_leaves
    if not any(used):
        return [False] * len(eqn.invars), None
    if loop.residuals is not None and not any(used[shown:]):
        without = dataclasses.replace(loop, residuals=None)
        eqn = eqn.replace(outvars=eqn.outvars[:shown], params={**eqn.params, "loop": without})
    return [True] * len(eqn.invars), eqn


def _backward_dce(used: list[bool], *last: Any) -> Any:
    """Unused cotangents are not computed."""
    eqn = last[-1]
    if not any(used):
        return [False] * len(eqn.invars), None
    arriving, wanted = eqn.params["which"]
    wanted = tuple(n for n, u in zip(wanted, used, strict=True) if u)
    outvars = [v for v, u in zip(eqn.outvars, used, strict=True) if u]
    return [True] * len(eqn.invars), eqn.replace(outvars=outvars, params={**eqn.params, "which": (arriving, wanted)})


ad.primitive_jvps[run_p] = _run_jvp
ad.primitive_jvps[tangent_p] = _linear_jvp(tangent_p, _higher_tangent)
ad.primitive_jvps[backward_p] = _linear_jvp(backward_p, _higher_backward)
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_transposes[backward_p] = _backward_transpose
pe.dce_rules[run_p] = _run_dce
pe.dce_rules[backward_p] = _backward_dce
