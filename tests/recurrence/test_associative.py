"""The backend "associative_scan": which cells it takes, and derivatives that the table of cases does not ask for."""

from __future__ import annotations

from typing import Any, NamedTuple

import cases
import jax
import jax.numpy as jnp
import pytest

import rnncore
from rnncore import parallel
from rnncore.cells.linear_state import linear_fields

NAME = "associative_scan"
NONE = rnncore.Unconnected()


class SRU(rnncore.PointwiseCell):
    """A simple recurrent unit, whose output is not linear in the state that it reads."""

    gates = ("f", "r", "x")
    Carry = rnncore.LSTMCarry

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        f, reset = jax.nn.sigmoid(z.f), jax.nn.sigmoid(z.r)
        c = f * carry.c + (1 - f) * z.x
        return self.Carry(c, reset * jnp.tanh(c) + (1 - reset) * z.x), self.Gates(f, reset, z.x)


class Turning(NamedTuple):
    """Two states that turn into each other."""

    a: Any
    h: Any


class Rotation(rnncore.PointwiseCell):
    """A state of two numbers for each unit, turned by an angle that the input gives; r has a bias of its own."""

    gates = ("angle", "x")
    recurrent_bias = ("angle",)
    Carry = Turning

    def pointwise(self, p: Any, z: Any, r: Any, carry: Turning) -> tuple[Turning, Any]:
        angle = z.angle * r.angle
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return Turning(cos * carry.a - sin * carry.h + z.x, (sin * carry.a + cos * carry.h) / 2), {"angle": angle}


class Squared(rnncore.PointwiseCell):
    """Not linear in its state."""

    gates = ("x",)

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        return self.Carry(z.x * carry.h * carry.h), self.Gates(z.x)


@pytest.mark.parametrize(
    ("cell", "fields"),
    [
        (rnncore.MinGRU(4), ("h",)), (rnncore.MinLSTM(4), ("h",)), (rnncore.RGLRU(4), ("h",)),
        (rnncore.QRNN(4), ("c",)), (rnncore.QRNN(4, pooling="f"), ("h",)), (SRU(4, recurrence=NONE), ("c",)),
        (Rotation(4, recurrence=NONE), ("a", "h")), (Squared(4, recurrence=NONE), None),
        (rnncore.MinGRU(4, recurrence=rnncore.Diagonal()), None), (rnncore.LSTM(4), None),
        (rnncore.ResetBeforeGRU(4), None), (rnncore.Leaky(4, recurrence=NONE), ("h",)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_linear_is_read_off_the_update(cell: Any, fields: Any):
    assert linear_fields(cell) == fields


@pytest.mark.ci
@pytest.mark.parametrize("make", [SRU, Rotation], ids=lambda make: make.__name__)
def test_cells_of_a_user_and_parallel_unroll(make: Any):
    """Values, gradients with resets, the gradient of a gradient's norm, under vmap, against autodiff of the loop."""
    case = cases.Case("user", make(3, recurrence=NONE), None)
    problem = cases.draw(case, (2,), 7, resets=True)

    def found(run: Any) -> Any:
        def loss(params: Any, xs: Any, carry: Any, resets: Any) -> Any:
            last, ys = run(params, xs, carry, resets)
            return jnp.sum(jnp.sin(ys)) + sum(map(jnp.sum, last))

        def norm(*arrays: Any) -> Any:
            gradients = jax.grad(loss, (0, 1, 2))(*arrays)
            return sum(jnp.sum(a**2) for a in jax.tree.leaves(gradients)), gradients

        both = jax.grad(norm, (0, 1, 2), has_aux=True)
        return jax.vmap(both, (None, 0, 0, 0))(problem.params, problem.xs, problem.carry, problem.resets)

    def by(backend: str) -> Any:
        return lambda p, xs, carry, resets: rnncore.unroll(
            case.cell, p, xs, initial_carry=carry, resets=resets, backend=backend
        )

    def solved(p: Any, xs: Any, carry: Any, resets: Any) -> Any:
        run = parallel.unroll(case.cell, p, xs, initial_carry=carry, resets=resets)
        return run.carry, run.outputs

    got, again, want = jax.jit(lambda: [found(run) for run in (by(NAME), solved, by("autodiff"))])()
    cases.assert_close(got, want, 1e-11)
    cases.assert_close(again, want, 1e-11)


def test_the_choice_says_why():
    cell = rnncore.MinGRU(4)
    params, xs = cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3))
    choice = rnncore.explain_backend(cell, params, xs)
    assert choice.name != NAME and "on a CPU the loops over time are faster" in choice.rejected[NAME]
    assert rnncore.explain_backend(cell, params, xs, backend=NAME).name == NAME
    gru = rnncore.GRU(4)
    why = rnncore.explain_backend(gru, gru.init(jax.random.key(0), 3), xs).rejected[NAME]
    assert "the state of GRU is not linear in its past" in why
    with pytest.raises(NotImplementedError, match="recompute='gates': it has no loop over time"):
        rnncore.unroll(cell, params, xs, backend=NAME, recompute="gates")


def test_half_precision_forms_states_in_single():
    cell = rnncore.RGLRU(4)
    params, xs = cell.init(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (400, 3))
    params, xs = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, xs))
    carry, ys = rnncore.unroll(cell, params, xs, backend=NAME)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (params, xs))
    want = rnncore.unroll(cell, *wide, backend="scan")[1]
    assert ys.dtype == carry.h.dtype == jnp.bfloat16
    assert float(jnp.abs(ys.astype(jnp.float32) - want).max()) < 0.05 * float(jnp.abs(want).max())


@pytest.mark.parametrize("seen", [jax.lax.stop_gradient, lambda h: (4 * h).astype(jnp.int32).astype(h.dtype)])
def test_what_only_looks_affine_is_refused(seen: Any):
    """A stopped gradient hides the slope; whole numbers have none."""

    class Own(rnncore.PointwiseCell):
        gates = ("a", "b")

        def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
            h = jax.nn.sigmoid(z.a) * seen(carry.h) + z.b
            return self.Carry(h), self.Gates(z.a, h)

    assert linear_fields(Own(3, recurrence=NONE)) is None
