"""A run with every mode and order of differentiation: three JAX primitives that are each other's derivatives.

  run       differentiable, constants -> result [, residuals]    its jvp is `tangent`
  tangent   held, tangents -> tangents of the result             linear in them; its transpose is `backward`
  backward  held, cotangents -> cotangents of differentiable     linear in them; its transpose is `tangent`

where held = (differentiable, constants, result, residuals).  Reverse mode is then one run that keeps residuals and one
backward loop, forward mode one such run and one tangent loop.  Result and residuals stand in held as values that were
worked out before: all that depends on them is a function of the first two alone, and is differentiated as such.  So
they have no tangents, and what second and higher orders need besides the two linear parts is JAX's derivative of
`Backend.plain`.

vmap gives the same primitive with one more entry in `maps`: it is vmap of the backend's function as it was, so that
all rules hold inside of any number of maps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

from rnncore import _compat
from rnncore._types import Array
from rnncore.recurrence.run import Constants, Differentiable, Request, Result

RESIDUALS = "rnncore_residuals"
"""Name, for checkpoint policies, of what a run keeps for its derivative, its result included."""


class Functions(Protocol):
    """What the primitives call: see `backend.LoopBackend`."""

    def __hash__(self) -> int: ...

    @property
    def opaque(self) -> bool: ...

    @property
    def maps_into_batch(self) -> bool: ...

    def forward(self, request: Request, differentiable: Differentiable, constants: Constants) -> Result: ...

    def forward_with_residuals(
        self, request: Request, differentiable: Differentiable, constants: Constants
    ) -> tuple[Result, Any]: ...

    def backward(
        self, request: Request, differentiable: Differentiable, constants: Constants, result: Result, residuals: Any,
        cotangents: Result, wanted: Differentiable,
    ) -> Differentiable: ...  # fmt: skip

    def tangent(
        self, request: Request, differentiable: Differentiable, constants: Constants, result: Result, residuals: Any,
        tangents: Differentiable,
    ) -> Result: ...  # fmt: skip

    def plain(self, request: Request, differentiable: Differentiable, constants: Constants) -> Result: ...


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What the primitives are of: a backend, a request, and the structures of the trees.

    Fields:
      inexact: the leaves of the result that have tangents; a cell may call a boolean a gate.
      residuals: None before anything is kept.
    """

    backend: Functions
    request: Request
    differentiable: Any
    constants: Any
    result: Any
    inexact: tuple[int, ...]
    residuals: Any = None

    @property
    def held(self) -> tuple[Any, ...]:
        """The structures of what a derivative is handed."""
        return self.differentiable, self.constants, self.result, self.residuals

    @property
    def count(self) -> int:
        """Arrays in them."""
        return sum(tree.num_leaves for tree in self.held)

    def differentiable_at(self, where: Sequence[int], leaves: Sequence[Any], other: Any = None) -> Differentiable:
        """A tree of these leaves, `other` elsewhere."""
        return _at(self.differentiable, where, leaves, other)


def _at(tree: Any, where: Sequence[int], leaves: Sequence[Any], other: Any = None) -> Any:
    flat = [other] * tree.num_leaves
    for n, leaf in zip(where, leaves, strict=True):
        flat[n] = leaf
    return jax.tree.unflatten(tree, flat)


def _parted(trees: Sequence[Any], flat: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The leading leaves as trees of these structures, and the rest."""
    parts, rest = [], list(flat)
    for tree in trees:
        parts.append(jax.tree.unflatten(tree, rest[: tree.num_leaves]))
        rest = rest[tree.num_leaves :]
    return parts, rest


def run(backend: Functions, request: Request, differentiable: Differentiable, constants: Constants) -> Result:
    """`backend.forward`, with all its derivatives."""
    shapes = jax.eval_shape(_on_trees(backend, request, "forward"), differentiable, constants)
    leaves, tree = jax.tree.flatten(shapes)
    inexact = tuple(n for n, a in enumerate(leaves) if jnp.issubdtype(a.dtype, jnp.inexact))
    loop = _Loop(backend, request, jax.tree.structure(differentiable), jax.tree.structure(constants), tree, inexact)
    flat = run_p.bind(*jax.tree.leaves((differentiable, constants)), loop=loop, maps=(), which=())
    return jax.tree.unflatten(tree, flat)


@functools.lru_cache(maxsize=1024)
def _on_trees(backend: Functions, request: Request, name: str) -> Callable:
    """A function of the backend, traced once for the same shapes."""

    def call(*trees: Any) -> Any:
        with jax.default_matmul_precision(request.precision):
            return getattr(backend, name)(request, *trees)

    return jax.jit(call)


# ------------------------------------------------------------- the functions, of and to flat lists of arrays
#
# `which` is static and says: of `tangent` which leaves of differentiable move; of `backward` which leaves of the result
# have a cotangent and which cotangents are wanted.


def _run(loop: _Loop, which: tuple, *flat: Array) -> list[Array]:
    (differentiable, constants), _ = _parted((loop.differentiable, loop.constants), flat)
    name = "forward" if loop.residuals is None else "forward_with_residuals"
    return jax.tree.leaves(_on_trees(loop.backend, loop.request, name)(differentiable, constants))


def _tangent(loop: _Loop, which: tuple[int, ...], *flat: Array) -> list[Array]:
    held, moved = _parted(loop.held, flat)
    with jax.default_matmul_precision(loop.request.precision):
        found = loop.backend.tangent(*(loop.request, *held, loop.differentiable_at(which, moved)))
    return _inexact(loop, found)


def _backward(loop: _Loop, which: tuple[tuple[int, ...], tuple[int, ...]], *flat: Array) -> list[Array]:
    held, arriving = _parted(loop.held, flat)
    cotangents = _at(loop.result, which[0], arriving)
    wanted = loop.differentiable_at(which[1], [True] * len(which[1]), False)
    with jax.default_matmul_precision(loop.request.precision):
        found = loop.backend.backward(*(loop.request, *held, cotangents, wanted))
    leaves = loop.differentiable.flatten_up_to(found)
    return [leaves[n] for n in which[1]]


def _inexact(loop: _Loop, result: Any) -> list[Array]:
    leaves = loop.result.flatten_up_to(result)
    return [leaves[n] for n in loop.inexact]


def _plain(loop: _Loop, which: tuple[int, ...], flat: Any) -> tuple[Callable, list[Array]]:
    """`Backend.plain` as a function of some leaves of differentiable, and these."""
    (differentiable, constants, *_), _ = _parted(loop.held, flat)
    leaves = jax.tree.leaves(differentiable)

    def plain(*some: Array) -> list[Array]:
        changed = dict(zip(which, some, strict=True))
        tree = jax.tree.unflatten(loop.differentiable, [changed.get(n, a) for n, a in enumerate(leaves)])
        return _inexact(loop, loop.backend.plain(loop.request, tree, constants))

    return plain, [leaves[n] for n in which]


def _plain_tangent(loop: _Loop, which: tuple[int, ...], *flat: Array) -> list[Array]:
    plain, primals = _plain(loop, which, flat)
    with jax.default_matmul_precision(loop.request.precision):
        return jax.jvp(plain, primals, list(flat[loop.count :]))[1]


def _plain_backward(loop: _Loop, which: tuple[tuple[int, ...], tuple[int, ...]], *flat: Array) -> list[Array]:
    plain, primals = _plain(loop, which[1], flat)
    arriving = dict(zip(which[0], flat[loop.count :], strict=True))
    with jax.default_matmul_precision(loop.request.precision):
        results, back = jax.vjp(plain, *primals)
        pairs = zip(loop.inexact, results, strict=True)
        return list(back([arriving.get(n, jnp.zeros_like(a)) for n, a in pairs]))


def _run_plain(loop: _Loop, which: tuple, *flat: Array) -> list[Array]:
    """`_run` by `Backend.plain`, with zeros for residuals: `_plain_tangent` and `_plain_backward` need none."""
    trees, _ = _parted((loop.differentiable, loop.constants), flat)
    with jax.default_matmul_precision(loop.request.precision):
        results = jax.tree.leaves(loop.backend.plain(loop.request, *trees))
    if loop.residuals is None:
        return results
    _, kept = jax.eval_shape(_on_trees(loop.backend, loop.request, "forward_with_residuals"), *trees)
    return results + [jnp.zeros(a.shape, a.dtype) for a in jax.tree.leaves(kept)]


# -------------------------------------------------------------------------------------- the primitives


@functools.lru_cache(maxsize=4096)
def _mapped(function: Callable, loop: _Loop, maps: tuple, which: Any) -> Callable:
    """A function of flat arrays under all its maps, the last of which is the outermost."""
    call: Callable = functools.partial(function, loop, which)
    for dims in maps:
        call = jax.vmap(call, dims)
    return jax.jit(call)


def _primitive(name: str, function: Callable, plain: Callable, roles: Callable) -> Primitive:
    """A primitive of one of the functions above; `plain` is the same for other machines, for `roles` see below."""
    primitive = Primitive(f"rnncore_{name}")
    primitive.multiple_results = True

    def evaluate(*flat: Array, **params: Any) -> list[Array]:
        return _mapped(function, **params)(*flat)

    def batch(flat: Any, dims: Any, loop: _Loop, maps: tuple, which: Any) -> Any:
        if not maps and loop.backend.maps_into_batch:
            axes, results = roles(loop, which, [a.ndim - (d is not None) for a, d in zip(flat, dims, strict=True)])
            if results is not None and _only_sequences(axes, dims, loop):
                merged = map(_into_batch(flat, dims), flat, dims, axes)
                return primitive.bind(*merged, loop=_with_batch(loop, flat, dims), maps=(), which=which), results
        front = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(flat, dims, strict=True)]
        mapped = tuple(None if d is None else 0 for d in dims)
        out = primitive.bind(*front, loop=loop, maps=(*maps, mapped), which=which)
        return out, [0] * len(out)

    def evaluate_plain(*flat: Array, **params: Any) -> list[Array]:
        return _mapped(plain, **params)(*flat)

    def lower(context: Any, *flat: Any, loop: _Loop, **params: Any) -> Any:
        away = _compat.is_exporting(context) and loop.backend.opaque
        rule = mlir.lower_fun(evaluate_plain if away else evaluate, multiple_results=True)
        return rule(context, *flat, loop=loop, **params)

    primitive.def_impl(evaluate)
    def abstract(*avals: Any, loop: _Loop, maps: tuple, which: Any) -> Any:
        if primitive.name == "rnncore_tangent" and not maps and all(map(_compat.is_of_one_device, avals)):
            # Known without tracing the loop, which in reverse mode is transposed and never run.
            before = loop.differentiable.num_leaves + loop.constants.num_leaves
            return [avals[before + n].to_tangent_aval() for n in loop.inexact]
        return jax.make_jaxpr(_mapped(function, loop, maps, which))(*avals).out_avals

    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, lower)
    batching.primitive_batchers[primitive] = batch
    return primitive


# vmap over sequences makes them more of the batch, as the outermost of its axes.  The gradients of parameters are then
# sums over all sequences at once, where vmap of the loop would form them one by one to add them up.  `roles` are the
# axes at which the batch begins in each operand, None where the sequences share it, and the same of each result, or
# None in their place where vmap of the loop is called for.


def _axes(loop: _Loop, ndims: Sequence[int]) -> tuple[list[int | None], list[int], list[int]]:
    """Where the batch begins in (differentiable, constants), in the result, and in the residuals."""
    xs = 0 if loop.request.time_axis else 1

    def fill(tree: Any, axis: Any) -> Any:
        return jax.tree.map(lambda _: axis, tree)

    d = _at(loop.differentiable, (), (), 0)
    count = loop.differentiable.num_leaves
    c = jax.tree.unflatten(loop.constants, ndims[count : count + loop.constants.num_leaves])
    result = _at(loop.result, (), (), 0)
    operands = (
        Differentiable(fill(d.params, -1), xs, fill(d.initial_carry, 0), fill(d.reset_carry, 0)),
        Constants(
            fill(c.lengths, 0), fill(c.resets, 1), fill(c.recurrent_mask, 0),
            jax.tree.map(lambda ndim: 1 if ndim else -1, c.zoneout),
        ),
    )  # fmt: skip
    results = Result(fill(result.carry, 0), xs, fill(result.carries, 1), fill(result.gates, 1))
    residuals = 0 if loop.residuals is None else loop.residuals.num_leaves
    shared = [None if axis < 0 else axis for axis in jax.tree.leaves(operands)]
    return shared, jax.tree.leaves(results), [1] * residuals


def _run_roles(loop: _Loop, which: tuple, ndims: Sequence[int]) -> Any:
    operands, results, residuals = _axes(loop, ndims)
    return operands, results + residuals


def _tangent_roles(loop: _Loop, which: tuple[int, ...], ndims: Sequence[int]) -> Any:
    operands, results, residuals = _axes(loop, ndims)
    moved = [operands[n] for n in which]
    return operands + results + residuals + moved, [results[n] for n in loop.inexact]


def _backward_roles(loop: _Loop, which: tuple[tuple[int, ...], tuple[int, ...]], ndims: Sequence[int]) -> Any:
    operands, results, residuals = _axes(loop, ndims)
    arriving, wanted = ([results[n] for n in which[0]], [operands[n] for n in which[1]])
    # Of each map's own gradient of the parameters a sum over all of them would be no use.
    return operands + results + residuals + arriving, None if None in wanted else wanted


def _only_sequences(axes: Sequence[int | None], dims: Sequence[int | None], loop: _Loop) -> bool:
    """Whether a map is over sequences: not over tangents alone, to which the run they belong to is common."""
    held = loop.count if loop.residuals is not None else len(dims)
    of_run = any(d is not None for d in dims[:held])
    return of_run and all(axis is not None or d is None for axis, d in zip(axes, dims, strict=True))


def _size(flat: Sequence[Any], dims: Sequence[int | None]) -> int:
    return next(a.shape[d] for a, d in zip(flat, dims, strict=True) if d is not None)


def _into_batch(flat: Sequence[Any], dims: Sequence[int | None]) -> Callable[..., Array]:
    size = _size(flat, dims)

    def merged(a: Array, dim: int | None, axis: int | None) -> Array:
        if axis is None:
            return a
        return jnp.repeat(jnp.expand_dims(a, axis), size, axis) if dim is None else jnp.moveaxis(a, dim, axis)

    return merged


def _with_batch(loop: _Loop, flat: Sequence[Any], dims: Sequence[int | None]) -> _Loop:
    request = loop.request
    batch_shape = (_size(flat, dims), *request.batch_shape)
    time_axis = request.time_axis + 1 if request.time_axis else 0
    larger = dataclasses.replace(request, batch_shape=batch_shape, time_axis=time_axis)
    return dataclasses.replace(loop, request=larger)


run_p = _primitive("run", _run, _run_plain, _run_roles)
tangent_p = _primitive("tangent", _tangent, _plain_tangent, _tangent_roles)
backward_p = _primitive("backward", _backward, _plain_backward, _backward_roles)


def _moving(tangents: Any) -> tuple[int, ...]:
    return tuple(n for n, t in enumerate(tangents) if not isinstance(t, ad.Zero))


def _behind_held(maps: tuple, count: int, axes: Callable[[tuple], tuple]) -> tuple:
    """`maps` of a call whose first `count` operands are as they were and whose others lie at `axes(dims)`."""
    return tuple((*dims[:count], *axes(dims)) for dims in maps)


def _zeros(values: Any) -> list[Any]:
    return [ad.Zero(jax.typeof(a).to_tangent_aval()) for a in values]


def _keeping(loop: _Loop, maps: tuple, primals: Any) -> _Loop:
    """The loop with the structure of its residuals."""
    if loop.residuals is not None:
        return loop
    avals = [jax.typeof(a) for a in primals]
    if maps:
        axes = [sum(dims[n] is not None for dims in maps) for n in range(len(avals))]
        avals = [jax.ShapeDtypeStruct(a.shape[k:], a.dtype) for a, k in zip(avals, axes, strict=True)]
    trees, _ = _parted((loop.differentiable, loop.constants), avals)
    _, residuals = jax.eval_shape(_on_trees(loop.backend, loop.request, "forward_with_residuals"), *trees)
    return dataclasses.replace(loop, residuals=jax.tree.structure(residuals))


def _run_jvp(primals: Any, tangents: Any, loop: _Loop, maps: tuple, which: tuple) -> Any:
    moves, shown = _moving(tangents[: loop.differentiable.num_leaves]), loop.result.num_leaves
    if not moves:
        results = run_p.bind(*primals, loop=loop, maps=maps, which=which)
        return results, _zeros(results)
    keeping = _keeping(loop, maps, primals)
    results = run_p.bind(*primals, loop=keeping, maps=maps, which=which)
    results = checkpoint_name(results, RESIDUALS)
    shared = _behind_held(maps, len(primals), lambda dims: (0,) * len(results) + tuple(dims[n] for n in moves))
    found = tangent_p.bind(
        *primals, *results, *(tangents[n] for n in moves), loop=keeping, maps=shared, which=moves
    )
    results = results if loop.residuals is not None else results[:shown]
    changes = _zeros(results)
    for n, a in zip(loop.inexact, found, strict=True):
        changes[n] = a
    return results, changes


def _linear_jvp(primitive: Primitive, plain: Callable) -> Callable:
    """The rule of a primitive that is linear in what stands behind held, and is `plain` as a function of the rest."""

    def rule(primals: Any, tangents: Any, loop: _Loop, maps: tuple, which: Any) -> Any:
        out = primitive.bind(*primals, loop=loop, maps=maps, which=which)
        changes: list[Any] = _zeros(out)
        linear = tangents[loop.count :]
        if _moving(linear):
            changes = _bound(primitive, loop, maps, which, primals[: loop.count], linear)
        moves = _moving(tangents[: loop.differentiable.num_leaves])
        if moves:
            function = _mapped(plain, loop, maps, which)

            def of_moving(*some: Array) -> list[Array]:
                changed = dict(zip(moves, some, strict=True))
                return function(*(changed.get(n, a) for n, a in enumerate(primals)))

            more = jax.jvp(of_moving, [primals[n] for n in moves], [tangents[n] for n in moves])[1]
            changes = [b if isinstance(a, ad.Zero) else a + b for a, b in zip(changes, more, strict=True)]
        return out, changes

    return rule


def _bound(primitive: Primitive, loop: _Loop, maps: tuple, which: Any, held: Any, linear: Any) -> list[Any]:
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


def _tangent_transpose(cts: Any, *operands: Any, loop: _Loop, maps: tuple, which: tuple[int, ...]) -> Any:
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


def _backward_transpose(cts: Any, *operands: Any, loop: _Loop, maps: tuple, which: Any) -> Any:
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
    """Nothing is kept for nobody."""
    eqn = last[-1]  # JAX 0.12 says before it which inputs are live
    loop = eqn.params["loop"]
    shown = loop.result.num_leaves
    if not any(used):
        return [False] * len(eqn.invars), None
    if loop.residuals is not None and not any(used[shown:]):
        without = dataclasses.replace(loop, residuals=None)
        eqn = eqn.replace(outvars=eqn.outvars[:shown], params={**eqn.params, "loop": without})
    return [True] * len(eqn.invars), eqn


def _backward_dce(used: list[bool], *last: Any) -> Any:
    """Cotangents that nobody uses are not formed."""
    eqn = last[-1]
    if not any(used):
        return [False] * len(eqn.invars), None
    arriving, wanted = eqn.params["which"]
    wanted = tuple(n for n, u in zip(wanted, used, strict=True) if u)
    outvars = [v for v, u in zip(eqn.outvars, used, strict=True) if u]
    return [True] * len(eqn.invars), eqn.replace(outvars=outvars, params={**eqn.params, "which": (arriving, wanted)})


ad.primitive_jvps[run_p] = _run_jvp
ad.primitive_jvps[tangent_p] = _linear_jvp(tangent_p, _plain_tangent)
ad.primitive_jvps[backward_p] = _linear_jvp(backward_p, _plain_backward)
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_transposes[backward_p] = _backward_transpose
pe.dce_rules[run_p] = _run_dce
pe.dce_rules[backward_p] = _backward_dce
