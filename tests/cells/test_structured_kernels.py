"""Kernels made of parameters: low rank, sparse, Dale's law; runs, derivatives, Jacobians and online learning."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from online_cases import by_bptt, cotangents_of, numeric_jacobians, through_time

import rnncore
from rnncore import analysis, online
from rnncore.kernels import cpp

H = cases.HIDDEN
MASK = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]], bool)
SIGNS = (1, -1, 1, -1)
KERNELS = {
    "low_rank": rnncore.LowRank(2), "sparse": rnncore.Sparse.of(MASK), "dale": rnncore.Dale(SIGNS),
    "dale_sparse": rnncore.Dale(SIGNS, rnncore.Sparse.of(MASK)),
}  # fmt: skip
CELLS = {
    "lstm": (rnncore.LSTM, reference.lstm()), "gru": (rnncore.GRU, reference.gru()),
    "leaky": (rnncore.Leaky, reference.leaky(1 / 10)),
}  # fmt: skip
ROWS = [pytest.param(cell, kernel, id=f"{cell}-{kernel}") for cell in CELLS for kernel in KERNELS]
PRESENT = ["scan", "autodiff", *(["cpp"] if cpp.missing_compiler("cpu") is None else [])]


def case_of(cell: str, kernel: str) -> cases.Case:
    return cases.Case(f"{cell}-{kernel}", CELLS[cell][0](H, recurrence=KERNELS[kernel]), CELLS[cell][1])


def dense_of(kernel: str, weights: np.ndarray) -> tuple[np.ndarray, Any]:
    """The dense kernel (H, G, H), entry by entry, and what pulls its gradient back."""
    sign = np.array(SIGNS if kernel.startswith("dale") else (1,) * H)[:, None, None]
    mask = MASK[:, None] if "sparse" in kernel else np.ones((H, 1, H), bool)
    if kernel == "low_rank":
        read, write = weights[:, 0], weights[:, 1:]
        dense = sum(read[k][:, None, None] * write[k] for k in range(2))

        def back(d: np.ndarray) -> np.ndarray:
            d_read = [[np.sum(d[j] * write[k]) for j in range(H)] for k in range(2)]
            d_write = [sum(read[k][j] * d[j] for j in range(H)) for k in range(2)]
            return np.concatenate([np.array(d_read)[:, None], np.array(d_write)], 1)

        return dense, back
    dale = kernel.startswith("dale")
    dense = mask * (sign * np.abs(weights) if dale else weights)
    return dense, lambda d: mask * (sign * np.sign(weights) * d if dale else d)


@pytest.mark.sample(1)
@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize(("cell", "kernel"), ROWS)
def test_runs_and_gradients_are_those_of_the_dense_kernel(cell: str, kernel: str, backend: str):
    """In NumPy: the run over the kernel written out, its gradient pulled back by hand; lengths and resets."""
    case = case_of(cell, kernel)
    problem = cases.draw(case, (4,), lengths=True, resets=True)
    results, gradients, d_results = cases.pull(cases.runner(case, backend), problem)
    dense, back = dense_of(kernel, np.asarray(problem.params.recurrent_kernel))
    written = problem._replace(params=problem.params._replace(recurrent_kernel=jnp.asarray(dense)))
    want, (d_params, *rest) = cases.expected(case, written, d_results)
    d_params = d_params._replace(recurrent_kernel=back(d_params.recurrent_kernel))
    cases.assert_close(results, want, cases.FLOAT64)
    cases.assert_close((cases.as_reference(gradients[0]), *gradients[1:]), (d_params, *rest), cases.FLOAT64)


@pytest.mark.sample(1)
@pytest.mark.parametrize("kernel", KERNELS)
def test_forward_mode_and_second_order_are_those_of_plain_autodiff(kernel: str):
    case = case_of("gru", kernel)
    problem = cases.draw(case, (2,))
    direction = cases.cotangents(problem.params, 3)

    def value(params: Any, backend: str) -> Any:
        return jnp.sum(jnp.sin(cases.runner(case, backend)(params, *problem[1:])[1]))

    def both(backend: str) -> Any:
        along = jax.jvp(lambda p: value(p, backend), (problem.params,), (direction,))
        twice = jax.jvp(jax.grad(lambda p: value(p, backend)), (problem.params,), (direction,))
        return along, twice

    cases.assert_close(jax.jit(both, static_argnums=0)("scan"), jax.jit(both, static_argnums=0)("autodiff"), 1e-11)


@dataclasses.dataclass(frozen=True)
class Factors(rnncore.Recurrence):
    """U = A B by the contract of `Recurrence` alone: kernel (2, H, G r), one gate."""

    rank: int = 2
    default_init = staticmethod(jax.nn.initializers.normal(0.3))

    def shape(self, gates: int, hidden_size: int) -> tuple[int, ...]:
        return (2, hidden_size, gates * self.rank)

    def matmul(self, kernel: Any, h: Any) -> Any:
        return (h @ kernel[0]) @ kernel[1].T

    def transposed(self, kernel: Any) -> Any:
        return kernel[::-1]

    def matmul_transposed(self, kernel: Any, h: Any) -> Any:
        return (h @ kernel[1]) @ kernel[0].T

    def gate_matrices(self, kernel: Any) -> Any:
        return (kernel[1] @ kernel[0].T)[None]


@dataclasses.dataclass(frozen=True)
class Saturating(Factors):
    """Not linear in h."""

    def matmul(self, kernel: Any, h: Any) -> Any:
        return jnp.tanh(super().matmul(kernel, h))

    def matmul_transposed(self, kernel: Any, h: Any) -> Any:
        return jnp.tanh(super().matmul_transposed(kernel, h))


OWN = {
    "low_rank": rnncore.GRU(12, recurrence=rnncore.LowRank(1)), "factors": rnncore.Elman(4, recurrence=Factors()),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_products_that_are_not_linear_in_the_kernel(name: str):
    """By its own product: runs, every gradient, forward mode and second order are those of autodiff."""
    cell = OWN[name]
    case = cases.Case(name, cell, None)
    problem = cases.draw(case, (2,), 4, lengths=True, resets=True)
    direction = cases.cotangents(problem[:3], 3)
    chosen = rnncore.explain_backend(cell, *problem[:2])
    assert chosen.name == "scan" and type(cell.recurrence) in (rnncore.LowRank, Factors)

    @functools.partial(jax.jit, static_argnums=0)
    def everything(backend: str) -> Any:
        def value(*moving: Any) -> Any:
            carry, ys = cases.runner(case, backend)(*moving, *problem[3:])
            return jnp.sum(jnp.sin(ys)) + jnp.sum(carry.h**2)

        gradient = jax.value_and_grad(value, (0, 1, 2))
        return jax.jvp(gradient, problem[:3], direction), jax.jvp(value, problem[:3], direction)

    want = everything("autodiff")
    for backend in PRESENT if name == "low_rank" else ["scan"]:
        cases.assert_close(everything(backend), want, 1e-11)


@pytest.mark.skipif("cpp" not in PRESENT, reason="no C++ compiler here")
def test_low_rank_in_the_compiled_loop():
    """By its factors, over several vectors of units: as the dense kernel that they make, with the rest of a run."""
    cell = rnncore.GRU(40, recurrence=rnncore.LowRank(3))
    case = cases.Case("low_rank", cell, None)
    problem = cases.draw(case, (3, 9), 30, lengths=True, resets=True)
    shrunk = problem._replace(params=jax.tree.map(lambda a: a / 2, problem.params))
    mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, (9, 40)) * 2.0)
    plain = dataclasses.replace(cell, recurrence=rnncore.Dense())

    def gradients(cell: rnncore.Cell, kernel: Any) -> Any:
        """Of each of three batches, which the loop takes as one, apart."""

        def value(params: Any, xs: Any, carry: Any, lengths: Any, resets: Any) -> Any:
            params = params._replace(recurrent_kernel=kernel(params.recurrent_kernel))
            run = cases.runner(dataclasses.replace(case, cell=cell), "cpp", recurrent_mask=mask)
            carry, ys = run(params, xs, carry, lengths, resets)
            return jnp.sum(jnp.sin(ys)) + jnp.sum(carry.h**2)

        return jax.jit(jax.vmap(jax.value_and_grad(value, (0, 1, 2)), (None, 0, 0, 0, 0)))(*shrunk)

    want = gradients(plain, lambda k: cell.recurrence.effective(k)[1])
    cases.assert_close(gradients(cell, lambda k: k), want, 1e-11)


def test_products_that_are_not_linear_in_h():
    cell = rnncore.Elman(4, recurrence=Saturating())
    params, xs = cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3))
    with pytest.raises(NotImplementedError, match="Saturating.matmul is not linear in h.*'autodiff' takes it"):
        rnncore.unroll(cell, params, xs, backend="scan")
    assert rnncore.explain_backend(cell, params, xs).name == "autodiff"


def test_low_rank_multiplies_by_its_factors():
    """From half of the products on: none of (H, G H) is left."""
    cell = rnncore.GRU(48, recurrence=rnncore.LowRank(2))
    params, xs = cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3))

    def widest(cell: rnncore.Cell, params: Any, backend: str) -> int:
        closed = jax.make_jaxpr(lambda p: rnncore.unroll(cell, p, xs, backend=backend)[1])(params)
        dots = [e for e in cases.equations(closed.jaxpr) if e.primitive.name == "dot_general"]
        return max(min(e.invars[1].aval.shape) for e in dots)

    assert widest(cell, params, "scan") == 3
    full = dataclasses.replace(cell, recurrence=rnncore.LowRank(19))
    assert widest(full, full.init(jax.random.key(0), 3), "scan") == 48


@pytest.mark.sample(2)
@pytest.mark.parametrize("kernel", KERNELS)
def test_jacobians(kernel: str):
    case = case_of("lstm", kernel)
    problem = cases.draw(case, (2,))
    run = analysis.trajectory(case.cell, problem.params, problem.xs, initial_carry=problem.carry)
    analytic, by_vjp = (analysis.step_jacobians(run, method=m) for m in ("analytic", "vjp"))
    cases.assert_close(analytic, by_vjp, cases.FLOAT64)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("cell", "kernel"), ROWS)
def test_real_time_recurrent_learning(cell: str, kernel: str):
    case = case_of(cell, kernel)
    problem = cases.draw(case, (4,), lengths=True, resets=True)
    d_carry, d_outputs = cotangents_of(problem, H)
    got = through_time(online.RTRL(case.cell), problem, d_carry, d_outputs)[2]
    cases.assert_close(got, by_bptt(case, problem, d_carry, d_outputs)[1], cases.FLOAT64)


@pytest.mark.sample(2)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_snap_keeps_what_its_steps_reach(order: int):
    """P written out for one sequence, masked by counting steps on the graph; at the longest path it is exact."""
    case = case_of("lstm", "sparse")
    problem = cases.draw(case, (), 6)
    d_carry, d_outputs = cotangents_of(problem, H)
    zero = jax.tree.map(jnp.zeros_like, problem.carry)
    got = through_time(online.SnAp(case.cell, order), problem, zero, d_outputs)[2]

    reached = {(j, j) for j in range(H)}
    for _ in range(order - 1):
        reached |= {(j, i) for j, k in reached for i in range(H) if MASK[k, i]}
    keep = np.array([[(j, i % H) in reached for j in range(H)] for i in range(2 * H)])  # rows c, then h
    dense = problem.params._replace(
        recurrent_kernel=jnp.asarray(np.asarray(problem.params.recurrent_kernel) * MASK[:, None])
    )
    cell, carry = rnncore.LSTM(H), problem.carry
    influence = jax.tree.map(lambda p: np.zeros((2 * H, *p.shape)), dense)
    want = jax.tree.map(lambda p: np.zeros(p.shape), dense)
    for x, dy in zip(problem.xs, d_outputs, strict=True):
        carry, jacobian, immediate = numeric_jacobians(cell, dense, carry, x)

        def moved(i: Any, p: Any, jacobian: Any = jacobian) -> Any:
            new = i + np.tensordot(jacobian, p, 1)
            return new * keep.reshape(2 * H, *(1,) * (new.ndim - 2), H)

        influence = jax.tree.map(moved, immediate, influence)
        want = jax.tree.map(lambda t, p, dy=dy: t + np.tensordot(dy, p[H:], 1), want, influence)
    want = want._replace(recurrent_kernel=want.recurrent_kernel * MASK[:, None])
    cases.assert_close(got, want, cases.FLOAT64)
    if order == 4:
        cases.assert_close(got, by_bptt(case, problem, zero, d_outputs)[1], cases.FLOAT64)


@pytest.mark.ci
def test_snap_over_a_dense_kernel():
    case = cases.BY_ID["gru-dense"]
    problem = cases.draw(case, (2,))
    d_carry, d_outputs = cotangents_of(problem, H)
    run = lambda rule: through_time(rule, problem, d_carry, d_outputs)[2]  # noqa: E731
    cases.assert_close(run(online.SnAp(case.cell, 2)), run(online.RTRL(case.cell)), cases.FLOAT64)
    cases.assert_close(run(online.SnAp(case.cell, 1)), run(online.SnAp1(case.cell)), cases.FLOAT64)


def test_initial_kernels_are_of_the_size_of_others():
    """What reaches a unit adds up to variance 1, within a factor of two."""
    for recurrence in (rnncore.LowRank(8), rnncore.Sparse.random(64, 0.25), rnncore.Dale((1,) * 64)):
        params = rnncore.LSTM(64, recurrence=recurrence).init(jax.random.key(0), 3)
        u = np.asarray(recurrence.gate_matrices(params.recurrent_kernel))
        assert 0.5 < (u**2).sum(-1).mean() < 2


def test_explain_backend_takes_shapes():
    cell = rnncore.GRU(H, recurrence=rnncore.LowRank(2))
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), 3))
    assert (
        rnncore.explain_backend(cell, params, jax.ShapeDtypeStruct((2, 5, 3), jnp.float32), backend="scan").name
        == "scan"
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rnncore.Elman(4, recurrence=rnncore.LowRank(5)).init(jax.random.key(0), 3), "a rank from 1 to"),
        (lambda: rnncore.Sparse.of(np.ones((2, 2))), r"expected bool \(H, H\)"),
        (lambda: rnncore.Sparse.random(4, 1.5), "a share from 0 to 1"),
        (
            lambda: rnncore.Elman(5, recurrence=rnncore.Sparse.of(MASK)).init(jax.random.key(0), 3),
            "4 units, the cell has 5",
        ),
        (lambda: rnncore.Dale((1, 0)), "expected 1 or -1"),
        (lambda: rnncore.Elman(5, recurrence=rnncore.Dale(SIGNS)).init(jax.random.key(0), 3), "one for each of 5"),
        (lambda: online.SnAp(rnncore.GRU(4), 0), "at least 1 step"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, words: str):
    with pytest.raises(ValueError, match=words):
        make()
