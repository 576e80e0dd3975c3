"""Parallel in time: the same states and derivatives as step by step, and a forecast that knows where it ends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import parallel
from rnncore.parallel.growth import transient_growth

WHOLE = ("lstm-diagonal", "rglru", "user_fast_slow-heads")
OWN = ("gru-dense",)


def both(case: cases.Case, method: str, resets: bool) -> tuple[Any, Any]:
    """(values and all gradients of `parallel.unroll`, those of the scan) for one random cotangent."""
    problem = cases.draw(case, (2,), 12, resets=resets)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(2, 12, case.cell.hidden_size)))

    def newton(params: Any, xs: Any, carry: Any) -> Any:
        run = parallel.unroll(case.cell, params, xs, initial_carry=carry, resets=problem.resets, method=method)
        return run.outputs, run.carry

    def scan(params: Any, xs: Any, carry: Any) -> Any:
        last, ys = rnncore.unroll(case.cell, params, xs, initial_carry=carry, resets=problem.resets, backend="autodiff")
        return ys, last

    def all_of(run: Any) -> Any:
        def pulled(*arrays: Any) -> Any:
            (ys, last), back = jax.vjp(run, *arrays)
            return ys, last, back((dy, jax.tree.map(jnp.ones_like, last)))

        return jax.jit(pulled)(problem.params, problem.xs, problem.carry)

    return all_of(newton), all_of(scan)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", [*WHOLE, *OWN])
def test_states_and_gradients_are_those_of_the_run_step_by_step(name: str):
    got, want = both(cases.BY_ID[name], "quasi" if name in OWN else "newton", resets=name != "rglru")
    cases.assert_close(got, want, 1e-11)


def test_second_derivatives_and_vmap():
    cell = rnncore.Elman(3)
    params = cell.init(jax.random.key(0), 2, jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (2, 6, 2), jnp.float64)

    def hessian(run: Any) -> Any:
        def loss(kernel: Any, xs: Any) -> Any:
            return jnp.sum(run(params._replace(recurrent_kernel=kernel), xs) ** 2)

        return jax.jit(jax.vmap(jax.hessian(loss), (None, 0)))(params.recurrent_kernel, xs)

    got = hessian(lambda p, xs: parallel.unroll(cell, p, xs).outputs)
    want = hessian(lambda p, xs: rnncore.unroll(cell, p, xs, backend="autodiff")[1])
    cases.assert_close(got, want, 1e-11)


def test_a_linear_state_takes_one_iteration():
    cell = rnncore.RGLRU(4)
    params, xs = cell.init(jax.random.key(0), 3, jnp.float64), jnp.ones((300, 3), jnp.float64)
    run = parallel.unroll(cell, params, xs, check=False)
    assert int(run.iterations) == 1 and bool(run.converged)
    assert float(run.residual) < 1e-13


def elman(gain: float) -> tuple[Any, Any, Any]:
    cell = rnncore.Elman(8)
    params = cell.init(jax.random.key(0), 3, jnp.float64)
    kernel = gain * 8**-0.5 * jax.random.normal(jax.random.key(1), (8, 1, 8), jnp.float64)
    return cell, params._replace(recurrent_kernel=kernel), jax.random.normal(jax.random.key(2), (300, 3), jnp.float64)


def test_the_first_states_are_exact_whatever_happens_later():
    """A chaotic run that is cut off: the residual is reported, all is NaN, and no state is made up."""
    cell, params, xs = elman(5.0)
    run = parallel.unroll(cell, params, xs, max_iterations=3, check=False)
    assert not run.converged and int(run.iterations) == 3 and float(run.residual) > 1e-3
    assert jnp.isnan(run.outputs).all() and jnp.isnan(run.carry.h).all()


@pytest.mark.ci
def test_the_forecast_tells_a_calm_run_from_a_wild_one_and_refuses_it():
    cell, params, xs = elman(1.0)
    calm = parallel.forecast(cell, params, xs)
    run = parallel.unroll(cell, params, xs)
    assert calm.converges and run.converged
    assert run.iterations / 2 <= calm.iterations <= run.iterations * 2
    assert calm.exponent < 0 and 1 < calm.growth < 20
    cell, params, xs = elman(5.0)
    wild = parallel.forecast(cell, params, xs, max_iterations=30)
    assert not wild.converges and wild.iterations > 15
    with pytest.raises(NotImplementedError, match=r"the forecast is about \d+ iterations.*Use rnncore.unroll"):
        parallel.unroll(cell, params, xs, max_iterations=30)


@pytest.mark.parametrize("size", [1, 3])
def test_growth_is_the_sum_of_sizes_of_the_products(size: int):
    jacobians = np.random.default_rng(0).normal(0, 0.6, (6, 2, size, size))
    sums, log = transient_growth(jnp.asarray(jacobians))
    for m in range(2):
        for t in range(6):
            product, total = np.eye(size), 1.0
            for j in range(t, 0, -1):
                product = product @ jacobians[j, m]
                total += np.linalg.norm(product) / size**0.5
            assert sums[t, m] == pytest.approx(total, rel=1e-10)
        assert log[m] == pytest.approx(np.log(np.linalg.norm(product) / size**0.5), rel=1e-10)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "deer"}, ValueError, "expected 'newton' or 'quasi'"),
        ({"max_iterations": 0}, ValueError, "max_iterations=0"),
        ({"sweeps": -1}, ValueError, "sweeps=-1"),
        ({"tolerance": 0.0}, ValueError, "expected a positive number"),
        ({"reset_carry": rnncore.HiddenCarry(jnp.zeros(8))}, ValueError, "only with resets"),
    ],
)
def test_options_that_make_no_sense(options: Any, error: Any, words: str):
    with pytest.raises(error, match=words):
        parallel.unroll(*elman(1.0), **options)


def test_cells_and_dtypes_that_it_cannot_take():
    cell = rnncore.ResetBeforeGRU(4)
    with pytest.raises(NotImplementedError, match="expected a PointwiseCell"):
        parallel.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3)))
    cell, params, xs = elman(1.0)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, xs))
    with pytest.raises(NotImplementedError, match="cannot converge"):
        parallel.unroll(cell, *half)


@pytest.mark.slow
def test_the_python_block_of_the_page_runs(capsys):
    page = Path(__file__).parents[2] / "docs" / "parallel.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict = {}
    with jax.enable_x64(False):
        exec(compile(block.replace("2000", "300"), "parallel block", "exec"), names)
    assert names["run"].converged.all() and "iterations; the first 256 steps took" in capsys.readouterr().out
