"""Analysis of a pointwise update: whether it is elementwise, how r enters it, and its linearisation.

A pointwise function is traced to a jaxpr, nested jit calls are inlined, and then
  * `check_elementwise` rejects operations that mix units,
  * `additive_gates` finds the gates that see z and r only as z + r,
  * `linearize` splits the derivative into values worth saving and cheap linear operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore import _compat
from rnncore._types import PyTree
from rnncore.cells.base import GatedCell, PointwiseCell, named

TRANSCENDENTAL = frozenset(
    "tanh logistic exp exp2 expm1 log log1p erf erfc erf_inv sin cos tan sinh cosh asin acos atan asinh "
    "acosh atanh atan2 pow sqrt rsqrt cbrt lgamma digamma".split()
)
ELEMENTWISE = TRANSCENDENTAL | frozenset(
    "add sub mul div rem max min neg sign abs floor ceil round square integer_pow is_finite nextafter "
    "select_n clamp lt le gt ge eq ne and or xor not convert_element_type reduce_precision copy copy_p "
    "stop_gradient optimization_barrier add_any real imag conj".split()
)
CALLS = tuple("jit pjit closed_call core_call custom_jvp_call custom_vjp_call checkpoint remat remat2".split())


def _inner_jaxpr(eqn: Any) -> Any:
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            return eqn.params[name]
    return None


def _rounds_nothing(eqn: Any) -> bool:
    """Whether the operation rounds to the precision that the value already has, as `jax.checkpoint` inserts."""
    if eqn.primitive.name != "reduce_precision":
        return False
    info = jnp.finfo(eqn.invars[0].aval.dtype)
    return (info.nexp, info.nmant) == (eqn.params["exponent_bits"], eqn.params["mantissa_bits"])


def opened_calls(closed: Any, calls: Collection[str]) -> Callable:
    """The jaxpr as a function in which calls of these names are inlined; their custom rules are lost."""

    def evaluate(jaxpr: Any, consts: Any, args: Any) -> list:
        env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> Any:
            return v.val if isinstance(v, _compat.Literal) else env[v]

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            inner = _inner_jaxpr(eqn) if eqn.primitive.name in calls else None
            if inner is not None:
                outs = evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)
            elif _rounds_nothing(eqn):
                outs = values
            else:
                outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
                outs = outs if eqn.primitive.multiple_results else [outs]
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    return lambda *args: evaluate(closed.jaxpr, closed.consts, args)


def _open_jits(closed: Any) -> Callable:
    """The jaxpr as a function in which nested jit calls are inlined, so that policies see inside."""
    return opened_calls(closed, ("jit", "pjit"))


def opened(fun: Callable, *args: PyTree) -> tuple[Any, Any]:
    """(jaxpr with nested jits inlined, output tree) of a function at these arguments."""
    flat, tree = jax.tree.flatten(args)

    def on_leaves(*leaves: Any) -> Any:
        return fun(*jax.tree.unflatten(tree, leaves))

    closed, shapes = jax.make_jaxpr(on_leaves, return_shape=True)(*flat)
    return jax.make_jaxpr(_open_jits(closed))(*flat), jax.tree.structure(shapes)


def same_structure(a: PyTree, b: PyTree) -> bool:
    """Whether two pytrees have the same structure."""
    structures: list[Any] = [jax.tree.structure(a), jax.tree.structure(b)]
    return structures[0] == structures[1]


def examples(cell: GatedCell, value: Any) -> tuple[Any, Any, Any, Any]:
    """Arguments (p, z, r, carry) of `combine` that are this value throughout."""
    units, gates = named("Units", tuple(cell.units)), cell.Gates(*(value for _ in cell.gates))
    return units(*(value for _ in cell.units)), gates, gates, cell.Carry(*(value for _ in cell.Carry._fields))


@functools.lru_cache(maxsize=256)
def check_elementwise(cell: GatedCell, reductions: tuple[str, ...] = ()) -> None:
    """ValueError, naming the operation and its line, unless the cell's update is elementwise.

    `reductions`: names of operations over units that it may apply.
    """
    shape = (3, cell.hidden_size)
    update = cell.pointwise if isinstance(cell, PointwiseCell) else cell.combine
    name = f"`{type(cell).__name__}.{update.__name__}`"
    if "h" not in cell.Carry._fields:
        raise ValueError(
            f"`{type(cell).__name__}.Carry`: {cell.Carry.__name__}{cell.Carry._fields} has no field `h`, the output of "
            "the cell; name it so."
        )
    unknown = [gate for gate in cell.recurrent_bias if gate not in cell.gates]
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise ValueError(f"`{type(cell).__name__}.recurrent_bias`: {names} not among the gates {tuple(cell.gates)}.")
    arguments = examples(cell, jnp.zeros(shape))
    carry = arguments[-1]
    try:
        out = jax.eval_shape(update, *arguments)
        new, _ = out
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{name} could not be traced on arrays of shape {shape}: {error} It must return (new carry, gates)."
        ) from error
    if not same_structure(new, carry):
        raise ValueError(f"{name}: returned a carry {new}, expected the structure of {cell.Carry.__name__}.")
    for leaf in jax.tree.leaves(out):
        if leaf.shape != shape:
            raise ValueError(f"{name}: returned an array of shape {leaf.shape} for inputs of shape {shape}.")
    closed = jax.make_jaxpr(update)(*arguments)
    _check_jaxpr(closed, shape, name, "unknown line", ELEMENTWISE.union(reductions))


def why_not_static(functions: Sequence[Callable], size: int) -> str | None:
    """Why functions of units cannot be part of a static description of a cell, or None."""
    for fun in functions:
        try:
            hash(fun)
        except TypeError:
            return f"its function {fun!r} cannot be hashed"
        consts = jax.make_jaxpr(fun)(jax.ShapeDtypeStruct((1, size), jnp.float32)).consts
        if any(isinstance(const, jax.core.Tracer) for const in consts):
            return f"its function {fun!r} closes over a value that is being differentiated or compiled"
    return None


@functools.lru_cache(maxsize=256)
def has_caught_traced(cell: GatedCell) -> bool:
    """Whether the update uses a value from outside that is being differentiated, mapped or compiled."""
    values = jax.ShapeDtypeStruct((1, cell.hidden_size), jnp.float32)
    consts = jax.make_jaxpr(cell.combine)(*examples(cell, values)).consts
    return any(isinstance(const, jax.core.Tracer) for const in consts)


def why_not_elementwise(cell: GatedCell, *reductions: str) -> str | None:
    """What `check_elementwise` says, or None."""
    try:
        check_elementwise(cell, reductions)
    except ValueError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=256)
def why_not_as_declared(cell: GatedCell, *methods: str) -> str | None:
    """Reason why a loop that has these methods of `GatedCell` built in cannot run the cell, or None."""
    own = [name for name in methods if getattr(type(cell), name) is not getattr(GatedCell, name)]
    if not own:
        return None
    return f"{type(cell).__name__} has a `{own[0]}` of its own, and it runs that of PointwiseCell"


def why_not_a_product(cell: GatedCell) -> str | None:
    """Reason why the recurrent product cannot be differentiated once for all steps, or None: see `Recurrence`."""
    kind = type(cell.recurrence)
    pair = ("matmul", "matmul_transposed")
    own = {name: next(n for n, c in enumerate(kind.__mro__) if name in vars(c)) for name in pair}
    if own["matmul"] < own["matmul_transposed"]:
        return (
            f"{kind.__name__} has a `matmul` of its own and not the `matmul_transposed` that belongs to it; backend "
            "'autodiff' takes it"
        )
    size, gates = cell.hidden_size, len(cell.gates)
    kernel = jax.ShapeDtypeStruct(cell.recurrence.shape(gates, size), jnp.float32)
    h, r = jax.ShapeDtypeStruct((size,), jnp.float32), jax.ShapeDtypeStruct((gates * size,), jnp.float32)

    def transpose(kernel: Any, h: Any, r: Any) -> Any:
        return jax.linear_transpose(lambda h: cell.recurrence.matmul(kernel, h), h)(r)

    try:
        jax.eval_shape(transpose, kernel, h, r)
    except Exception:  # JAX reports that something is not linear by several exceptions, among them AssertionError.
        return (
            f"{kind.__name__}.matmul is not linear in h, so the step has no recurrent product; "
            "backend 'autodiff' takes it"
        )
    return None


def _check_jaxpr(closed: Any, shape: tuple[int, ...], name: str, line: str, allowed: Collection[str]) -> None:
    jaxpr = getattr(closed, "jaxpr", closed)
    hint = (
        "A cell may mix units only through its recurrent kernel; write the update elementwise, "
        "or subclass `rnncore.Cell`, which runs through plain autodiff."
    )
    for const in jaxpr.constvars:
        if const.aval.shape:
            raise ValueError(
                f"{name} is not elementwise: it uses a captured array of shape {const.aval.shape}; "
                "declare it in `units` to make it a per-unit parameter."
            )
    for eqn in jaxpr.eqns:
        primitive = eqn.primitive.name
        here = _compat.source_line(eqn) or line  # JAX's own jitted functions have none
        inner = _inner_jaxpr(eqn)
        if inner is not None and primitive in CALLS:
            _check_jaxpr(inner, shape, name, here, allowed)
            continue
        scalars = all(not v.aval.shape for v in eqn.invars)
        same = all(v.aval.shape in ((), shape) for v in (*eqn.invars, *eqn.outvars))
        if scalars and primitive == "broadcast_in_dim" and same:
            continue
        if primitive not in allowed or not same:
            shapes = ", ".join(str(v.aval.shape) for v in (*eqn.invars, *eqn.outvars))
            raise ValueError(f"{name} is not elementwise: it applies `{primitive}` (shapes {shapes}) at {here}. {hint}")


def additive_gates(cell: GatedCell, p: Any, z: Any, r: Any, carry: Any) -> tuple[bool, ...]:
    """For each gate whether the update sees z_g and r_g only as their sum."""
    closed, _ = opened(cell.combine, p, z, r, carry)
    jaxpr, count, skip = closed.jaxpr, len(cell.gates), len(jax.tree.leaves(p))
    inputs = jaxpr.invars[skip : skip + 2 * count]

    def only_summed(zg: Any, rg: Any) -> bool:
        if any(v is zg or v is rg for v in jaxpr.outvars):
            return False
        uses = [e for e in jaxpr.eqns if any(v is zg or v is rg for v in e.invars)]
        return all(e.primitive.name == "add" and {id(v) for v in e.invars} == {id(zg), id(rg)} for e in uses)

    return tuple(only_summed(inputs[g], inputs[count + g]) for g in range(count))


def save_transcendentals(primitive: Any, *_: Any, **__: Any) -> bool:
    """Checkpoint policy: keep what is expensive to recompute; products and sums are recomputed."""
    return primitive.name in TRANSCENDENTAL


class Linearized(NamedTuple):
    """A pointwise function split in two.

    Fields:
      forward: flat inputs -> (flat outputs, saved values).
      tangent: (residuals, tangents of the flat inputs) -> tangents of the flat outputs; linear in those.
      needed: for each residual, the index of the input that it is, or None for the next saved value.
    """

    forward: Callable
    tangent: Callable
    needed: tuple[int | None, ...]


def linearize(
    fun: Callable, policy: Callable, *flat: Any, runner: Callable[[Any], Callable] = _compat.jaxpr_as_fun
) -> Linearized:
    """Splits `fun` (flat inputs to a tuple) at these arguments: see `Linearized`; `runner` runs its jaxpr."""
    made: dict[str, Any] = {}

    def split(*args: Any) -> Any:
        out, tangent = jax.linearize(jax.checkpoint(fun, policy=policy, prevent_cse=False), *args)
        leaves, made["tree"] = jax.tree.flatten(tangent)
        return tuple(out), tuple(leaves)

    closed, (out, _) = jax.make_jaxpr(split, return_shape=True)(*flat)
    closed = jax.make_jaxpr(_open_jits(closed))(*flat)
    jaxpr, width = closed.jaxpr, len(out)
    position = {id(v): i for i, v in enumerate(jaxpr.invars)}
    leaves = jaxpr.outvars[width:]
    recomputed = _recomputed(closed, leaves)
    known = [n for n in range(len(leaves)) if n not in recomputed]
    needed = tuple(position.get(id(leaves[n])) for n in known)
    run = runner(closed)

    def forward(*args: Any) -> tuple[tuple, tuple]:
        values = run(*args)
        return tuple(values[:width]), tuple(values[width + n] for n, i in zip(known, needed, strict=True) if i is None)

    def tangent(residuals: Any, tangents: Any) -> tuple:
        env = {id(leaves[n]): value for n, value in zip(known, residuals, strict=True)}
        for eqns in recomputed.values():
            for eqn in eqns:
                values = [v.val if isinstance(v, _compat.Literal) else env[id(v)] for v in eqn.invars]
                env[id(eqn.outvars[0])] = eqn.primitive.bind(*values, **eqn.params)
        return tuple(made["tree"].unflatten([env[id(v)] for v in leaves])(*tangents))

    return Linearized(forward, tangent, needed)


def _recomputed(closed: Any, leaves: Sequence[Any]) -> dict[int, list[Any]]:
    """The residuals that are one transcendental function of the others, and the equations that compute them.

    An LSTM's tanh(c_t) is one: c_t is a sum of products of gates and c_{t-1}, which are kept.  Reading a
    stack from memory costs as much as that function.
    """
    maker = {id(v): eqn for eqn in closed.jaxpr.eqns for v in eqn.outvars}
    order = {id(eqn): n for n, eqn in enumerate(closed.jaxpr.eqns)}
    recomputed: dict[int, list[Any]] = {}
    sources: set[int] = set()
    for n, leaf in enumerate(leaves):
        others = {id(v) for m, v in enumerate(leaves) if m != n and m not in recomputed}
        made = maker.get(id(leaf))
        if id(leaf) in others | sources or made is None or made.primitive.name not in ELEMENTWISE:
            continue
        path: dict[int, Any] = {}
        uses: set[int] = set()
        todo, possible = [made], True
        while todo and possible:
            eqn = todo.pop()
            path[id(eqn)] = eqn
            for v in eqn.invars:
                if isinstance(v, _compat.Literal):
                    continue
                if id(v) in others:
                    uses.add(id(v))
                    continue
                source = maker.get(id(v))
                simple = source is not None and source.primitive.name in ELEMENTWISE - TRANSCENDENTAL
                possible = possible and simple
                if simple:
                    todo.append(source)
        if possible:
            sources |= uses
            recomputed[n] = sorted(path.values(), key=lambda eqn: order[id(eqn)])
    return recomputed
