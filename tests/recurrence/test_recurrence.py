"""Structures of the recurrent kernel: all are a dense matrix for each gate."""

from __future__ import annotations

import math
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore

GATES, HIDDEN = 3, 6
STRUCTURES = [rnncore.Dense(), rnncore.Heads(1), rnncore.Heads(2), rnncore.Heads(6), rnncore.Diagonal()]
KEY = jax.random.key(0)


def kernel_of(recurrence: Any, gates: int = GATES, hidden: int = HIDDEN) -> Any:
    return jax.random.normal(KEY, recurrence.shape(gates, hidden), jnp.float64)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("recurrence", "shape"),
    [
        (rnncore.Dense(), (6, 3, 6)),
        (rnncore.Heads(2), (2, 3, 3, 3)),
        (rnncore.Heads(6), (6, 1, 3, 1)),
        (rnncore.Diagonal(), (3, 6)),
    ],
    ids=repr,
)
def test_shapes(recurrence: Any, shape: tuple[int, ...]):
    assert recurrence.shape(GATES, HIDDEN) == shape
    kernel = recurrence.default_init(KEY, shape, jnp.float64)
    assert kernel.shape == shape and recurrence.gate_matrices(kernel).shape == (GATES, HIDDEN, HIDDEN)


@pytest.mark.sample(5)
@pytest.mark.parametrize("lead", [(), (4,), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("recurrence", STRUCTURES, ids=repr)
def test_r_is_the_gate_matrix_times_h(recurrence: Any, lead: tuple[int, ...]):
    kernel, h = kernel_of(recurrence), jax.random.normal(KEY, (*lead, HIDDEN), jnp.float64)
    r = np.asarray(recurrence.matmul(kernel, h))
    assert r.shape == (*lead, GATES * HIDDEN)
    matrices = np.asarray(recurrence.gate_matrices(kernel))
    for place in np.ndindex(*lead):
        want = np.concatenate([matrices[g] @ np.asarray(h)[place] for g in range(GATES)])
        np.testing.assert_allclose(r[place], want, atol=1e-14)


def test_the_matrices_by_hand():
    """Row = output, column = input."""
    dense = np.arange(8.0).reshape(2, 2, 2)  # (from unit, gate, to unit)
    for g in range(2):
        want = [[dense[0, g, 0], dense[1, g, 0]], [dense[0, g, 1], dense[1, g, 1]]]
        np.testing.assert_array_equal(rnncore.Dense().gate_matrices(jnp.asarray(dense))[g], want)

    heads = np.arange(1.0, 9.0).reshape(2, 2, 1, 2)  # (head, from unit, gate, to unit)
    want = [[1, 3, 0, 0], [2, 4, 0, 0], [0, 0, 5, 7], [0, 0, 6, 8]]
    np.testing.assert_array_equal(rnncore.Heads(2).gate_matrices(jnp.asarray(heads))[0], want)

    np.testing.assert_array_equal(rnncore.Diagonal().gate_matrices(jnp.array([[2.0, 3.0]]))[0], [[2, 0], [0, 3]])


@pytest.mark.parametrize("recurrence", STRUCTURES, ids=repr)
def test_matmul_is_linear_in_the_kernel_and_in_h(recurrence: Any):
    one, two = kernel_of(recurrence), 0.5 - kernel_of(recurrence) ** 2
    h, k = jax.random.normal(KEY, (2, 4, HIDDEN), jnp.float64)
    times = recurrence.matmul
    np.testing.assert_allclose(times(one + 3 * two, h), times(one, h) + 3 * times(two, h), atol=1e-13)
    np.testing.assert_allclose(times(one, h + 3 * k), times(one, h) + 3 * times(one, k), atol=1e-13)


@pytest.mark.sample(2)
@pytest.mark.parametrize("recurrence", STRUCTURES, ids=repr)
def test_gradients_are_those_of_the_dense_matrices(recurrence: Any):
    kernel, h = kernel_of(recurrence), jax.random.normal(KEY, (2, 4, HIDDEN), jnp.float64)
    cotangent = jnp.cos(jnp.arange(2 * 4 * GATES * HIDDEN, dtype=jnp.float64)).reshape(2, 4, -1)

    def dense(kernel: Any, h: Any) -> Any:
        return jnp.einsum("gij,...j->...gi", recurrence.gate_matrices(kernel), h).reshape(2, 4, -1)

    got, want = (jax.vjp(f, kernel, h)[1](cotangent) for f in (recurrence.matmul, dense))
    cases.assert_close(got, want, 1e-13)


@pytest.mark.sample(1)
@pytest.mark.parametrize("make", [rnncore.Elman, rnncore.LSTM, rnncore.GRU, rnncore.MGU])
@pytest.mark.parametrize("recurrence", [rnncore.Heads(3), rnncore.Diagonal()], ids=repr)
def test_a_structured_cell_is_the_dense_cell_with_its_matrices(make: Any, recurrence: Any):
    cell, dense = make(HIDDEN, recurrence=recurrence), make(HIDDEN)
    params = cell.init(KEY, 3, jnp.float64)
    matrices = recurrence.gate_matrices(params.recurrent_kernel)
    as_dense = params._replace(recurrent_kernel=jnp.transpose(matrices, (2, 0, 1)))
    xs = jax.random.normal(KEY, (2, 5, 3), jnp.float64)
    got, want = rnncore.unroll(cell, params, xs), rnncore.unroll(dense, as_dense, xs)
    cases.assert_close(got, want, 1e-13)


@pytest.mark.parametrize("recurrence", STRUCTURES, ids=repr)
def test_the_slab_has_the_recurrent_bias_in_its_gate(recurrence: Any):
    cell = rnncore.GRU(HIDDEN, recurrence=recurrence)
    bias = jnp.arange(1.0, 7.0)
    params = cell.init(KEY, 3, jnp.float64)._replace(recurrent_bias=bias[None])
    slab = cell.recurrent_matmul(params, jnp.zeros((2, HIDDEN)))
    parts = cell.split(slab)
    assert parts._fields == ("r", "z", "n") and not parts.r.any() and not parts.z.any()
    np.testing.assert_array_equal(parts.n, jnp.stack([bias, bias]))


def test_diagonal_kernels_start_between_0_and_1():
    kernel = np.asarray(rnncore.Diagonal.default_init(KEY, (4, 2000), jnp.float64))
    assert kernel.min() >= 0 and kernel.max() <= 1 and kernel.mean() == pytest.approx(0.5, abs=0.02)


def test_heads_do_not_see_each_other():
    cell = rnncore.LSTM(4, recurrence=rnncore.Heads(2))
    params = cell.init(KEY, 3, jnp.float64)
    xs = jax.random.normal(KEY, (5, 3), jnp.float64)

    def last(start: Any) -> Any:
        return rnncore.unroll(cell, params, xs, initial_carry=start)[0].h

    jacobian = jax.jacrev(last)(cell.initial_carry((), jnp.float64)).h
    assert not jacobian[:2, 2:].any() and not jacobian[2:, :2].any()
    assert jacobian[:2, :2].all() and jacobian[2:, 2:].all()


@pytest.mark.parametrize("heads", [0, -2, 4, 12])
def test_heads_that_do_not_fit(heads: int):
    cell = rnncore.LSTM(HIDDEN, recurrence=rnncore.Heads(heads))
    message = rf"`Heads\(num_heads={heads}\)`: does not divide hidden_size=6; choose a number of heads that does"
    with pytest.raises(ValueError, match=message):
        cell.init(KEY, 3)


@pytest.mark.parametrize("recurrence", STRUCTURES, ids=repr)
def test_structures_are_values(recurrence: Any):
    again = type(recurrence)(*(getattr(recurrence, f) for f in recurrence.__dataclass_fields__))
    assert again == recurrence and hash(again) == hash(recurrence)
    assert sum(other == recurrence for other in STRUCTURES) == 1


@pytest.mark.parametrize("recurrence", STRUCTURES, ids=repr)
def test_numbers_in_a_kernel(recurrence: Any):
    """What a structure saves: H^2, H^2/N and H numbers for each gate."""
    per_gate = {"Dense": HIDDEN**2, "Diagonal": HIDDEN}.get(type(recurrence).__name__)
    want = GATES * (per_gate or HIDDEN**2 // recurrence.num_heads)
    assert math.prod(recurrence.shape(GATES, HIDDEN)) == want
