"""What kernel backends share: the body made of a cell, and all that stands around the two kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import plain_kernels
import pytest
import two_devices

import rnncore
from rnncore.cells import pointwise
from rnncore.kernels import kernel_body
from rnncore.kernels.op_lowerings import LOWERINGS
from rnncore.sequence.backends import BACKENDS

IDS = (
    "elman_relu", "elman_silu", "lstm-heads", "lstm_both-dense", "lstm_no_bias", "lstm_functions", "gru-heads",
    "gru_no_recurrent_bias", "mgu-dense", "user_fast_slow-heads",
)  # fmt: skip
# float32, with sums of some hundred terms of about 1: forward, back, and over steps and sequences.
FLOAT32 = 2e-5
NAME = "plain"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of plain kernels."""
    monkeypatch.setitem(BACKENDS, NAME, plain_kernels.PLAIN)


@pytest.mark.sample(1)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("id", IDS)
def test_everything_around_the_kernels(id: str, masked: bool):
    case = cases.BY_ID[id]
    problem = cases.draw(case, steps=7, dtype=jnp.float32, lengths=masked, resets=masked)
    results, gradients, cotangents = cases.pull(cases.runner(case, NAME), problem)
    want = cases.puller(cases.runner(case, "scan"))(problem, cotangents)
    cases.assert_close((results, gradients), want, FLOAT32)


def test_a_reset_carry_of_its_own_and_more_batch_axes():
    case = cases.BY_ID["lstm_both-dense"]
    problem = cases.draw(case, batch=(2, 3), dtype=jnp.float32, lengths=True, resets=True)
    target = cases.cotangents(problem.carry, 5)

    def gradient(backend: str) -> Any:
        def loss(target: Any) -> Any:
            run = cases.runner(case, backend, reset_carry=target)
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(run(*problem)))

        return jax.value_and_grad(loss)(target)

    cases.assert_close(gradient(NAME), gradient("scan"), FLOAT32)


@pytest.mark.slow
def test_vmap_takes_sequences_into_the_batch_and_parameters_one_by_one():
    case = cases.BY_ID["gru-heads"]
    problem = cases.draw(case, batch=(3, 2), dtype=jnp.float32)

    def gradient(backend: str) -> Any:
        def loss(params: Any, xs: Any, carry: Any) -> Any:
            run = cases.runner(case, backend)
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(run(params, xs, carry)))

        return jax.vmap(jax.grad(loss, (0, 1, 2)), (None, 0, 0))(*problem[:3])

    cases.assert_close(gradient(NAME), gradient("scan"), FLOAT32)
    several = jax.tree.map(lambda a: jnp.stack([a, a]), problem.params)
    run = cases.runner(case, NAME)
    mapped = jax.vmap(lambda params: run(params, problem.xs, problem.carry))(several)
    cases.assert_close(jax.tree.map(lambda a: a[1], mapped), run(*problem), FLOAT32)


def test_the_weights_gradients_are_products_outside_the_loop():
    """Each product in a loop costs a step's latency; dU, dW and db are sums over all steps."""
    case = cases.BY_ID["lstm-dense"]
    problem = cases.draw(case, dtype=jnp.float32)
    run = cases.runner(case, NAME)
    gradient = jax.jit(jax.grad(lambda p: run(p, *problem[1:])[1].sum()))
    text = gradient.lower(problem.params).compile().as_text()
    assert text.count(" dot(") == 6  # z, r in the loop; r again, dr U^T in the loop; dU, dW


@pytest.mark.parametrize(
    "options, why",
    [
        ({"recurrent_mask": 1}, "recurrent_mask"),
        ({"zoneout": 1}, "zoneout"),
        ({"return_states": True}, "return_states=True"),
        ({"checkpoint_every": 2}, "checkpoint_every"),
        ({"recompute": "gates"}, "recompute='gates'"),
    ],
)
def test_refusals(options: dict, why: str):
    case = cases.BY_ID["gru-dense"]
    problem = cases.draw(case, dtype=jnp.float32)
    given = {"recurrent_mask": jnp.ones((4, cases.HIDDEN)), "zoneout": case.cell.Carry(0.1)}
    options = {name: given.get(name, value) for name, value in options.items()}
    with pytest.raises(NotImplementedError, match=why):
        cases.runner(case, NAME, **options)(*problem)


def test_refusals_of_cells():
    problem = cases.draw(cases.BY_ID["indrnn"], dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="Diagonal recurrences have no matrix"):
        cases.runner(cases.BY_ID["indrnn"], NAME)(*problem)

    class Shifted(rnncore.LSTM):
        def recurrent_matmul(self, params: Any, h: Any) -> Any:
            return 1 + super().recurrent_matmul(params, h)

    case = cases.Case("shifted", Shifted(cases.HIDDEN), None)
    with pytest.raises(NotImplementedError, match="Shifted has a `recurrent_matmul` of its own"):
        cases.runner(case, NAME)(*cases.draw(case, dtype=jnp.float32))
    case = cases.BY_ID["reset_before_gru"]
    with pytest.raises(NotImplementedError, match="not a PointwiseCell"):
        cases.runner(case, NAME)(*cases.draw(case, dtype=jnp.float32))


PLAIN = """
import plain_kernels
from rnncore.sequence.backends import BACKENDS
BACKENDS["plain"] = plain_kernels.PLAIN
"""


@pytest.mark.slow
def test_the_batch_over_devices():
    """Inside shard_map, over two: the gradients are summed over both."""
    two_devices.assert_gradients_are_summed(NAME, "float32", FLOAT32, PLAIN)


# ------------------------------------------------------------------------------------- the body


class Odd(rnncore.PointwiseCell):
    """What kernels form from other operations."""

    gates = ("a", "b")

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        a, b = z.a + r.a, z.b + r.b
        odd = jnp.expm1(-jnp.abs(a)) + jnp.log1p(b * b) + jnp.sinh(0.1 * a) - jnp.cosh(0.1 * b) + jnp.tan(0.2 * a)
        odd = odd + jnp.sqrt(jax.nn.softplus(a)) * jnp.square(b) + jax.nn.sigmoid(a) + jax.lax.stop_gradient(b)
        return carry._replace(h=jnp.tanh(0.3 * odd) + 0.1 * carry.h), self.Gates(a, b)


def tiles(rng: np.random.Generator, count: int, shape: tuple[int, ...], scale: float = 1.0) -> tuple:
    return tuple(jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for _ in range(count))


SCALE = jnp.float32(0.5)  # an array that a cell catches
CAUGHT = rnncore.Elman(4, activation_fn=lambda x: jnp.tanh(SCALE * x))
GELU = rnncore.Elman(4, activation_fn=lambda x: jax.nn.gelu(x, approximate=False))


# Every pointwise cell of the table; kernel structures do not matter here.
TABLE = {case.id: case.cell for case in cases.CASES if isinstance(case.cell, rnncore.PointwiseCell)}
BODIES = {"odd": Odd(4), "caught": CAUGHT, "gelu": GELU} | {
    id: cell for id, cell in TABLE.items() if not id.endswith(("-heads", "-diagonal"))
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("cell", BODIES.values(), ids=BODIES)
def test_the_body_is_the_cell_and_its_vjp(cell: Any):
    shape = (8, 16)
    part, rng = kernel_body.of(cell, shape), np.random.default_rng(0)
    counts = (len(cell.units), len(cell.gates), len(cell.gates), len(cell.Carry._fields))
    units, zs, rs, carry = (tiles(rng, n, shape) for n in counts)
    dcarry = tiles(rng, len(carry), shape)

    def update(units: Any, zs: Any, rs: Any, carry: Any) -> Any:
        named = rnncore.cells.base.named("Units", tuple(cell.units))
        return tuple(cell.pointwise(named(*units), cell.Gates(*zs), cell.Gates(*rs), cell.Carry(*carry))[0])

    new, back = jax.vjp(update, units, zs, rs, carry)
    dunits, dzs, drs, dold = back(dcarry)
    cases.assert_close(part.forward(units, zs, rs, carry), new, 2e-6)
    sums = tuple(z + r if a else z for z, r, a in zip(zs, rs, part.additive, strict=True))
    residuals = part.residuals(units, sums, tuple(rs[g] for g in part.rest), carry)
    assert len(residuals) == part.width
    want = (dunits, dzs, tuple(drs[g] for g in part.rest), dold)
    cases.assert_close(part.backward(units, residuals, dcarry), want, 1e-5)


POINTS = np.concatenate([np.linspace(-6, 6, 97), [-100, -30, -1e-4, 1e-5, 30, 100]]).astype(np.float32)
FINITE, INFINITE = POINTS[np.abs(POINTS) < 80], np.array([np.inf], np.float32)
REWRITES = [  # operation, where it is defined, relative and absolute error
    ("expm1", POINTS[POINTS < 80], 5e-7, 0), ("log1p", np.abs(POINTS), 3e-7, 0), ("sqrt", np.abs(POINTS), 3e-7, 0),
    ("logistic", POINTS, 3e-7, 1e-7), ("erf", POINTS, 0, 2e-6), ("erfc", POINTS, 0, 2e-6), ("floor", POINTS, 0, 0),
    ("ceil", POINTS, 0, 0), ("sinh", FINITE, 1e-6, 0), ("cosh", FINITE, 1e-6, 0),
    ("sin", POINTS, 0, 1e-5), ("cos", POINTS, 0, 1e-5), ("log1p", INFINITE, 0, 0), ("sqrt", INFINITE, 0, 0),
    ("tan", POINTS[np.abs(POINTS) < 1.5], 1e-6, 1e-7), ("one_minus_square", POINTS, 3e-7, 1e-6),
]  # fmt: skip


@pytest.mark.sample(7)
@pytest.mark.parametrize("name, points, relative, absolute", REWRITES, ids=[f"{r[0]}-{len(r[1])}" for r in REWRITES])
def test_rewritten_operations(name: str, points: np.ndarray, relative: float, absolute: float):
    """Also where the plain formula would lose its digits or overflow."""
    plain = getattr(jax.lax, name, None) or (lambda x: 1 - x * x)
    got = np.asarray(LOWERINGS[name](jnp.asarray(points)))
    want = np.asarray(plain(jnp.asarray(points, jnp.float64)))
    with np.errstate(invalid="ignore"):
        assert np.all((got == want) | (np.abs(got - want) <= relative * np.abs(want) + absolute))


def test_not_of_booleans_and_of_integers():
    flip = LOWERINGS["not"]
    assert flip(jnp.array([True, False])).tolist() == [False, True] and flip(jnp.array([5, -1])).tolist() == [-6, 0]


@pytest.mark.parametrize("y", [-3, -1, 0, 1, 2, 7])
def test_integer_powers(y: int):
    x = jnp.asarray(POINTS[(np.abs(POINTS) > 0.1) & (np.abs(POINTS) < 10)])
    np.testing.assert_allclose(LOWERINGS["integer_pow"](x, y=y), np.asarray(x, np.float64) ** y, rtol=2e-6)


def test_unusual_uses_of_known_operations_are_named():
    def three(x: Any) -> Any:
        return jax.lax.select_n((x > 0).astype(jnp.int32) + (x > 1), x, 2 * x, -x)

    cell = dataclasses.replace(cases.BY_ID["elman_silu"].cell, activation_fn=three)
    assert "`select_n of more than two`" in (kernel_body.of(cell, (8, 16)).why_not(pointwise.ELEMENTWISE) or "")


def test_an_operation_that_a_kernel_language_lacks_is_named():
    cell = dataclasses.replace(cases.BY_ID["elman_silu"].cell, activation_fn=jnp.arctan)
    why = kernel_body.of(cell, (8, 16)).why_not({"add", "mul", "div"})
    assert why == "the update of Elman applies `atan`, which its kernel language lacks"
    assert kernel_body.of(cell, (8, 16)).why_not({"add", "mul", "div", "atan", "broadcast_in_dim"}) is None
