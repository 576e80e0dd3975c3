"""Every transformation of JAX on every loop, against plain autodiff of a loop that is written out step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import plain_kernels
import pytest

import rnncore
from rnncore.kernels import compiler
from rnncore.sequence.backends import BACKENDS

BATCH, STEPS, FEATURES, HIDDEN = 2, 3, 2, 3
CELLS = {
    "lstm": rnncore.LSTM(HIDDEN),
    "gru": rnncore.GRU(HIDDEN),
    "peepholes, masked": rnncore.LSTM(HIDDEN, peepholes=True),
    "user, masked": cases.FastSlow(HIDDEN),
}
LOOPS = {"scan": cases.FLOAT64, "cpp": cases.FLOAT64, "plain": 2e-5}
"""Backend to its tolerance: the plain kernels, like those that they stand for, have float32 inside."""

Loss = Callable[[Any, jax.Array], jax.Array]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "plain", plain_kernels.PLAIN)


# -------------------------------------------------------------------------------------- the runs


def masks_of(name: str) -> dict[str, Any]:
    if not name.endswith("masked"):
        return {}
    resets = jnp.asarray([[True, False, True], [False, True, False]])
    return {"seq_lengths": jnp.asarray([STEPS, 2]), "resets": resets}


def written_out(cell: Any, params: Any, xs: jax.Array, seq_lengths: Any = None, resets: Any = None) -> tuple[Any, Any]:
    """(last carry, outputs) by nothing but array operations."""
    carry = last = cell.initial_carry(xs.shape[:1], xs.dtype)
    start, outputs = carry, []
    rows = dict(zip(cell.recurrent_bias, () if params.recurrent_bias is None else params.recurrent_bias, strict=True))
    units = rnncore.cells.base.named("Units", tuple(cell.units))(
        *(jnp.broadcast_to(u, carry.h.shape) for u in params.units)
    )
    for t in range(xs.shape[1]):
        if resets is not None:
            carry = jax.tree.map(lambda a, b, t=t: jnp.where(resets[:, t, None], a, b), start, carry)
        z = jnp.einsum("bd,dgh->gbh", xs[:, t], params.input_kernel) + params.bias[:, None]
        r = jnp.einsum("bd,dgh->gbh", carry.h, params.recurrent_kernel)
        r = [r[g] + rows.get(gate, 0) for g, gate in enumerate(cell.gates)]
        carry, _ = cell.pointwise(units, cell.Gates(*z), cell.Gates(*r), carry)
        outputs.append(carry.h)
        ends = True if seq_lengths is None else (seq_lengths == t + 1)[:, None]
        last = jax.tree.map(lambda a, b, ends=ends: jnp.where(ends, a, b), carry, last)
    return last, jnp.stack(outputs, 1)


def loss_of(name: str, loop: str | None) -> Loss:
    """(params, xs) -> a number that all of the result has a part in; of the written-out loop where none is named."""
    cell, masks = CELLS[name], masks_of(name)
    weights = jax.random.normal(jax.random.key(2), (BATCH, STEPS, HIDDEN), jnp.float64)
    run = functools.partial(written_out, cell)
    if loop is not None:
        run = functools.partial(rnncore.unroll, cell, backend=loop)

    def loss(params: Any, xs: jax.Array) -> jax.Array:
        carry, outputs = run(params, xs, **masks)
        w = weights.astype(xs.dtype)
        return jnp.sum(jnp.sin(outputs) * w) + sum(jnp.sum(jnp.cos(a) * w[:, 0]) for a in carry)

    return loss


@functools.cache
def problem(name: str, dtype: Any) -> tuple[Any, jax.Array]:
    case = cases.Case(name, CELLS[name], None)
    drawn = cases.draw(case, (BATCH,), STEPS, FEATURES, dtype=dtype)
    return drawn.params, drawn.xs


# -------------------------------------------------------------------------------------- the transformations


def along(f: Loss, params: Any, xs: jax.Array) -> jax.Array:
    return jax.jvp(lambda x: f(params, x), (xs,), (jnp.cos(xs),))[1]


def third(f: Loss) -> Loss:
    def along_x(params: Any, xs: jax.Array) -> Any:
        return jax.grad(jax.grad(jax.grad(lambda s: f(params, xs * s))))(1.1)

    return along_x


def hessian_vector(f: Loss) -> Loss:
    def product(params: Any, xs: jax.Array) -> Any:
        ones = jax.tree.map(jnp.ones_like, params)
        return jax.jvp(lambda p: jax.grad(f, (0, 1))(p, xs), (params,), (ones,))

    return product


def transposed(f: Loss) -> Loss:
    return lambda p, x: jax.linear_transpose(jax.linearize(lambda x: f(p, x), x)[1], x)(jnp.ones((), x.dtype))


def remat(policy: str) -> Callable[[Loss], Loss]:
    return lambda f: jax.grad(jax.checkpoint(f, policy=getattr(jax.checkpoint_policies, policy)), (0, 1))


def several(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.stack([a, a * 2, -a]), tree)


def scales(x: jax.Array, count: int) -> jax.Array:
    return jnp.arange(1, 1 + count, dtype=x.dtype) / count


def of_several(f: Loss, p: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(jax.vmap(lambda s: f(jax.tree.map(lambda a: a * s, p), x * s))(scales(x, 3)))


def nested(f: Loss) -> Loss:
    def of_scales(p: Any, x: jax.Array) -> Any:
        hessian = jax.hessian(lambda q, r: f(p, x * q * r))
        return jax.vmap(lambda s: jax.vmap(lambda r: hessian(s, r))(scales(x, 2)))(scales(x, 2))

    return of_scales


def step(f: Loss, p: Any, x: jax.Array) -> Any:
    return x - 0.1 * jax.grad(f, 1)(p, x), f(p, x)


FIRST: dict[str, Callable[[Loss], Any]] = {
    "value": lambda f: f,
    "gradient of params": jax.grad,
    "gradient of xs": lambda f: jax.grad(f, 1),
    "value and gradient": lambda f: jax.value_and_grad(f, (0, 1)),
    "jvp": lambda f: lambda p, x: jax.jvp(f, (p, x), (jax.tree.map(jnp.ones_like, p), jnp.cos(x))),
    "jvp of xs": lambda f: lambda p, x: along(f, p, x),
    "jacfwd": lambda f: jax.jacfwd(f, 1),
    "jacrev": lambda f: jax.jacrev(f, 1),
    "linearize": lambda f: lambda p, x: jax.linearize(lambda x: f(p, x), x)[1](jnp.cos(x)),
    "linear transpose": transposed,
    **{f"remat, {name}": remat(name) for name in ("nothing_saveable", "dots_saveable", "everything_saveable")},
    "scan around": lambda f: lambda p, x: jax.lax.scan(lambda x, _: step(f, p, x), x, None, length=2),
    "scan differentiated": lambda f: jax.grad(
        lambda p, x: jax.lax.scan(lambda a, s: (a + f(p, x * s), None), jnp.zeros((), x.dtype), scales(x, 2))[0]
    ),
    "cond around": lambda f: lambda p, x: jax.lax.cond(x[0, 0, 0] < 9, lambda x: jax.grad(f, 1)(p, x), jnp.sin, x),
    "vmap over xs": lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, several(x)),
    "vmap of gradient over xs": lambda f: lambda p, x: jax.vmap(jax.grad(f, (0, 1)), (None, 0))(p, several(x)),
    "vmap of gradient over params": lambda f: lambda p, x: jax.vmap(jax.grad(f, (0, 1)), (0, None))(several(p), x),
    "gradient of vmap over xs": lambda f: jax.grad(lambda p, x: jnp.sum(jax.vmap(f, (None, 0))(p, several(x))), (0, 1)),
    "gradient of vmap over both": lambda f: jax.grad(functools.partial(of_several, f), (0, 1)),
    "jvp of vmap over both": lambda f: lambda p, x: along(functools.partial(of_several, f), p, x),
}
HIGHER: dict[str, Callable[[Loss], Any]] = {
    "forward over reverse": lambda f: jax.hessian(f, 1),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(f, 1), 1),
    "reverse over forward": lambda f: jax.grad(functools.partial(along, f), (0, 1)),
    "forward over forward": lambda f: lambda p, x: along(functools.partial(along, f), p, x),
    "Hessian of both times a vector": hessian_vector,
    "third order": third,
    "Hessian under two vmaps": nested,
    "Hessian under remat": lambda f: lambda p, x: along(lambda p, x: along(jax.checkpoint(f), p, x), p, x),
    "custom_vjp around": lambda f: (
        lambda p, x: jax.grad(lambda x: jnp.sum(jax.vjp(lambda x: f(p, x), x)[1](jnp.ones((), x.dtype))[0] ** 2))(x)
    ),
}
BRIEF = ("value and gradient", "jvp", "vmap of gradient over params", "gradient of vmap over xs")
BRIEF_HIGHER = ("reverse over forward", "Hessian of both times a vector")


SCAN_ALONE = ("value", "gradient of params", "gradient of xs", "jvp of xs", "jacfwd", "linearize", "third order",
              "remat, dots_saveable", "remat, everything_saveable", "reverse over reverse", "Hessian under remat",
              "forward over forward")  # fmt: skip
"""What the rules make of others of these, whatever loop they end in."""


def columns(name: str, order: str, loop: str = "scan") -> dict[str, Callable[[Loss], Any]]:
    """All of them for the first cell and loop; of the others some, for the rules are the same."""
    found = FIRST if order == "first" else HIGHER
    if name == "lstm":
        return {c: t for c, t in found.items() if loop == "scan" or c not in SCAN_ALONE}
    return {c: t for c, t in found.items() if c in BRIEF + BRIEF_HIGHER}


def results(f: Loss, name: str, order: str, dtype: Any, loop: str = "scan") -> dict[str, Any]:
    every = columns(name, order, loop)
    program = jax.jit(lambda p, x: {c: t(f)(p, x) for c, t in every.items()})
    return program(*problem(name, dtype))


@functools.cache
def expected(name: str, order: str) -> dict[str, Any]:
    return results(loss_of(name, None), name, order, jnp.float64)


@pytest.mark.sample("scan-gru-first", "scan-gru-higher", "cpp-lstm-higher")
@pytest.mark.parametrize("order", ["first", "higher"])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("loop", LOOPS)
def test_every_transformation(loop: str, name: str, order: str):
    if loop == "cpp" and compiler.find() is None:
        pytest.skip("no C++ compiler here")
    dtype = jnp.float32 if loop == "plain" else jnp.float64
    found, want = results(loss_of(name, loop), name, order, dtype, loop), expected(name, order)
    wrong = {}
    for column in found:
        try:
            cases.assert_close(found[column], want[column], LOOPS[loop] * (1 if order == "first" else 20))
        except AssertionError as error:
            wrong[column] = str(error)
    assert not wrong


# -------------------------------------------------------------------------------------- what is not computed


@pytest.mark.sample(1)
@pytest.mark.parametrize("loop", ["scan", "plain"])
def test_a_gradient_is_one_loop_forward_and_one_backward(loop: str):
    """Read off the program: a plain run is one loop, of which nothing is kept, a gradient and a tangent are two."""
    cell = CELLS["lstm"]
    params, xs = problem("lstm", jnp.float32)

    def run(params: Any, xs: jax.Array) -> jax.Array:
        return rnncore.unroll(cell, params, xs, backend=loop)[1]

    def whiles(function: Callable) -> int:
        return jax.jit(function).lower(params, xs).compile().as_text().count(" while(")

    assert whiles(run) == 1
    assert whiles(lambda p, x: jax.jvp(lambda x: run(p, x), (x,), (x,))[0]) == 1  # the tangent is not asked for
    assert whiles(jax.grad(lambda p, x: run(p, x).sum())) == 2
    assert whiles(jax.grad(lambda p, x: run(p, x).sum(), (0, 1))) == 2


def test_a_plain_run_keeps_nothing():
    """Its loop carries the state, the outputs and the counter; that of a gradient carries what is kept as well."""
    cell = CELLS["lstm"]
    params, xs = problem("lstm", jnp.float32)

    def carried(function: Callable) -> list[int]:
        closed = jax.make_jaxpr(function)(params, xs)
        loops = [e for e in cases.equations(closed.jaxpr) if e.primitive.name in ("while", "scan")]
        stack = BATCH * STEPS * HIDDEN
        return [sum(v.aval.size == stack for v in e.outvars) for e in loops if len(e.outvars) > 1]

    def run(params: Any, xs: jax.Array) -> jax.Array:
        return jnp.sum(rnncore.unroll(cell, params, xs, backend="scan")[1])

    assert carried(run) == [1]  # the outputs
    kept, _ = carried(jax.grad(run))
    assert kept == 1 + 5  # as the table of `recompute` in `unroll` has it for an LSTM


def test_gradients_that_nobody_wants_are_not_formed():
    cell = CELLS["lstm"]
    params, xs = problem("lstm", jnp.float32)

    def products(*wanted: int) -> int:
        gradient = jax.grad(lambda p, x: rnncore.unroll(cell, p, x, backend="scan")[1].sum(), wanted)
        return jax.jit(gradient).lower(params, xs).compile().as_text().count(" dot(")

    # z, r forward; dh backward; dU and dW, or dx.
    assert products(0) == 2 + 1 + 2
    assert products(1) == 2 + 1 + 1
    assert products(0, 1) == 2 + 1 + 3
