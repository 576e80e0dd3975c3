"""sLSTM against the cell of the xlstm package, and what its stabiliser promises."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import rnncore
from rnncore.kernels import cpp

PRESENT = ["scan", *(["cpp"] if cpp.missing_compiler("cpu") is None else [])]
STEPS, BATCH, HEADS, SIZE = 5, 2, 2, 2
HIDDEN = HEADS * SIZE
CELL = rnncore.SLSTM(HIDDEN, recurrence=rnncore.Heads(HEADS))


def wave(*shape: int, speed: float) -> Any:
    return jnp.asarray(np.sin(speed * np.arange(1, np.prod(shape) + 1)).reshape(shape))


# What the vanilla cell of xlstm 2.0.6 gives in float64 (slstm_forward on 3 wave(5, 2, 16, speed=0.7), from zeros, with
# the recurrent kernel wave(2, 2, 4, 2, speed=1.3) and the bias wave(16, speed=0.9)): the last state, and by autograd
# gradients of sum(wave(5, 2, 4, speed=1.1) h) in the kernel, the bias and the inputs of the first sequence and step.
H = [
    [0.0548036686, 0.0740488843, 0.0272704738, -0.2385739028],
    [0.3696151447, 0.2191564333, 0.0758190016, 0.0704628652],
]
C = [[1.0404288011, 1.2953553012, 0.1817539627, -0.3012993039], [0.861742683, 0.9945406872, 1.0545448041, 1.1513645668]]
N = [[1.0444653743, 1.3141874386, 2.2924093943, 1.0975056679], [1.0182034693, 1.0081371658, 1.0631588021, 1.1931055078]]
M = [[3.0424759638, 2.1009455499, 0.6743844654, 1.8429236239], [2.8353419121, 4.1971308979, 3.2653253209, 1.5277322225]]
VALUE = -0.9140982803867151
D_KERNEL = [
    0.18672025, -0.0059185436, -0.003147465, 0.0034342064, -0.0010871733, -0.0034888965, -0.0864954548, -0.0219964931,
    0.1616916224, -0.0198941208, 0.0088528905, 0.0046976638, 0.066570101, -0.0167672801, -0.0717070628, 0.0248773824,
    -0.1828238898, -0.0356414124, -0.1093788437, 0.0092977364, -0.0239296761, 0.0257425563, -0.0197591429, 0.0121205716,
    -0.025289199, -0.0375818808, -0.0431463749, 0.0098519442, 0.0504410687, 0.0181752236, -0.01643404, 0.062511997,
]  # fmt: skip
D_BIAS = [
    0, 0, 0, 0, -0.13620267766, -0.0084698904528, -0.25829971692, 0.066565594743, -0.33764620073, 0.17276701586,
    0.27343907466, 0.099639608583, 0.23481128661, -0.13280953423, 0.042726984772, 0.069923751607,
]  # fmt: skip
D_INPUT = [
    -0.0059757809, -0.0075678785, -0.136771411, 0.2862042471, 0, 0, 0, 0, 0.1227976678, -0.022949796, -0.0134496891,
    0.0435455089, 0.1809101313, 0.1240727296, 0.0176330278, -0.1148590536,
]  # fmt: skip


@pytest.mark.ci
@pytest.mark.sample(1)
@pytest.mark.parametrize("backend", PRESENT)
def test_is_the_cell_of_the_xlstm_package(backend: str):
    xs = 3 * wave(STEPS, BATCH, 4 * HIDDEN, speed=0.7)
    identity = jnp.eye(4 * HIDDEN, dtype=xs.dtype).reshape(-1, 4, HIDDEN)
    kernel, bias = wave(HEADS, SIZE, 4, SIZE, speed=1.3), wave(4, HIDDEN, speed=0.9)
    weights = wave(STEPS, BATCH, HIDDEN, speed=1.1)

    def value(params: Any, xs: Any) -> Any:
        carry, ys = rnncore.unroll(CELL, params, xs, time_major=True, backend=backend)
        return jnp.sum(weights * ys), carry

    params = rnncore.CellParams(identity, kernel, bias, None, ())
    (total, carry), (d_params, d_xs) = jax.value_and_grad(value, (0, 1), has_aux=True)(params, xs)
    cases.assert_close((carry, total), (rnncore.SLSTMCarry(*map(np.array, (C, N, M, H))), VALUE), 1e-9)
    cases.assert_close(d_params.recurrent_kernel.reshape(-1), np.array(D_KERNEL), 1e-9)
    cases.assert_close((d_params.bias.reshape(-1), d_xs[0, 0]), (np.array(D_BIAS), np.array(D_INPUT)), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("backend", PRESENT)
def test_neither_overflows_nor_divides_by_zero(backend: str):
    """Gates of hundreds in float32, where exp alone is 0 or inf from 104 on; against float64 in its own range."""
    params = CELL.init(jax.random.key(0), 3)
    xs = jax.random.uniform(jax.random.key(1), (4, 8, 3), minval=-300.0, maxval=300.0)
    resets = jax.random.bernoulli(jax.random.key(2), 0.2, (4, 8))
    got, back = jax.vjp(lambda p: rnncore.unroll(CELL, p, xs, resets=resets, backend=backend)[1], params)
    start = tuple(np.zeros((4, HIDDEN)) for _ in range(4))
    given = cases.as_reference(params), np.asarray(xs, np.float64), start
    assert float(jnp.abs(got).max()) <= 1
    cases.assert_close(got, reference.forward(reference.slstm(), *given, resets=np.asarray(resets)).outputs, 1e-4)
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(back(jnp.ones_like(got))))


def test_the_stabiliser_changes_no_output():
    """m + k with c and n times exp(-k) is the same state."""
    case = cases.BY_ID["slstm"]
    problem = cases.draw(case, (2,))
    k = jnp.linspace(-3, 3, cases.HIDDEN)
    c, n, m, h = problem.carry
    moved = rnncore.SLSTMCarry(c * jnp.exp(-k), n * jnp.exp(-k), m + k, h)
    run = cases.runner(case, "scan")
    cases.assert_close(run(*problem._replace(carry=moved))[1], run(*problem)[1], cases.FLOAT64)
