"""Initial values: what they promise of every gate and head, their distributions, and their messages."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import initializers

KEY = jax.random.key(0)
MANY = 200_000


def draw(initializer: Any, shape: tuple[int, ...] = (4, MANY), seed: int = 0) -> np.ndarray:
    return np.asarray(initializer(jax.random.key(seed), shape, jnp.float64))


def gate_of(bias: np.ndarray, index: int = 1) -> np.ndarray:
    """The gate at the origin: the sigmoid of its bias."""
    return 1 / (1 + np.exp(-bias[index]))


# ----------------------------------------------------------------------------------- orthogonal


@pytest.mark.parametrize("gates", [1, 3, 4])
def test_every_gate_is_orthogonal(gates: int):
    kernel = draw(initializers.per_gate(), (6, gates, 6))
    for g in range(gates):
        np.testing.assert_allclose(kernel[:, g] @ kernel[:, g].T, np.eye(6), atol=1e-13)
    for g in range(1, gates):
        assert np.abs(kernel[:, g] - kernel[:, 0]).max() > 0.1


def test_every_gate_of_every_head_is_orthogonal():
    kernel = draw(initializers.per_gate(), (2, 3, 4, 3))
    blocks = [kernel[n, :, g] for n in range(2) for g in range(4)]
    for block in blocks:
        np.testing.assert_allclose(block @ block.T, np.eye(3), atol=1e-13)
    assert all(np.abs(a - b).max() > 0.05 for i, a in enumerate(blocks) for b in blocks[:i])


@pytest.mark.sample(3)
@pytest.mark.parametrize("recurrence", [rnncore.Dense(), rnncore.Heads(3)], ids=repr)
@pytest.mark.parametrize("cell", [rnncore.LSTM, rnncore.GRU, rnncore.MGU, rnncore.Elman])
def test_cells_start_with_orthogonal_gate_matrices(cell: Any, recurrence: Any):
    params = cell(6, recurrence=recurrence).init(KEY, 2, jnp.float64)
    for matrix in recurrence.gate_matrices(params.recurrent_kernel):
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(6), atol=1e-13)


def test_reset_before_gru_starts_with_orthogonal_gates():
    kernel = rnncore.ResetBeforeGRU(5).init(KEY, 2, jnp.float64).recurrent_kernel
    for g in range(3):
        np.testing.assert_allclose(kernel[:, g] @ kernel[:, g].T, np.eye(5), atol=1e-13)


def test_one_orthogonal_matrix_over_all_gates_is_not_the_same():
    whole = draw(jax.nn.initializers.orthogonal(), (32, 4 * 32)).reshape(32, 4, 32)
    # The number of the docstring: the norm of a block is sqrt(H / G), not sqrt(H).
    norms = [np.linalg.norm(whole[:, g]) for g in range(4)]
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(norms))), np.sqrt(32 / 4), rtol=1e-12)
    assert max(np.linalg.norm(whole[:, g], 2) for g in range(4)) < 0.95


def test_per_gate_takes_any_block_initializer():
    kernel = draw(initializers.per_gate(jax.nn.initializers.constant(0.25)), (2, 3, 4, 3))
    assert (kernel == 0.25).all() and kernel.shape == (2, 3, 4, 3)


@pytest.mark.sample(12)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("initializer", "shape"),
    [
        (initializers.per_gate(), (3, 4, 3)),
        (initializers.forget_bias(), (4, 3)),
        (initializers.chrono(10), (4, 3)),
        (initializers.uniform_gate(), (4, 3)),
    ],
    ids=["per_gate", "forget_bias", "chrono", "uniform_gate"],
)
def test_dtypes(initializer: Any, shape: tuple[int, ...], dtype: Any):
    values = initializer(KEY, shape, dtype)
    assert values.dtype == dtype and values.shape == shape and jnp.isfinite(values).all()


# ----------------------------------------------------------------------------------- gate biases


@pytest.mark.parametrize(("b", "f"), [(0, 0.5), (1, 0.73106), (2, 0.88080), (3, 0.95257), (4, 0.98201), (5, 0.99331)])
def test_forget_bias(b: float, f: float):
    bias = draw(initializers.forget_bias(b), (4, 3))
    np.testing.assert_allclose(gate_of(bias), f, atol=5e-6)
    assert (bias[[0, 2, 3]] == 0).all()


def test_forget_bias_of_another_cell():
    bias = draw(initializers.forget_bias(2.0, gates=rnncore.GRU(3).gates, gate="z"), (3, 5))
    assert bias.tolist() == [[0] * 5, [2] * 5, [0] * 5]
    params = rnncore.GRU(5, bias_init=initializers.forget_bias(2.0, gates=("r", "z", "n"), gate="z")).init(KEY, 3)
    np.testing.assert_array_equal(params.bias, bias)


@pytest.mark.parametrize(("t_max", "mean_f"), [(28, 0.89850), (100, 0.96008), (784, 0.99236)])
def test_chrono(t_max: int, mean_f: float):
    bias = draw(initializers.chrono(t_max))
    np.testing.assert_array_equal(bias[0], -bias[1])
    assert (bias[[2, 3]] == 0).all()
    u = np.exp(bias[1])
    assert u.min() >= 1 and u.max() <= t_max - 1
    # b_f = log u with u uniform on (1, t_max - 1), so 1/(1 - f) = 1 + u is uniform on (2, t_max).
    assert u.mean() == pytest.approx(t_max / 2, rel=5e-3)
    assert np.quantile(u, 0.25) == pytest.approx(1 + (t_max - 2) / 4, rel=2e-2)
    np.testing.assert_allclose(1 / (1 - gate_of(bias)), 1 + u, rtol=1e-10)
    # E f = 1 - log(t_max / 2) / (t_max - 2)
    assert 1 - np.log(t_max / 2) / (t_max - 2) == pytest.approx(mean_f, abs=5e-6)
    f = gate_of(bias)
    assert f.mean() == pytest.approx(mean_f, abs=4 * f.std() / np.sqrt(MANY))


def test_what_chrono_keeps_over_100_steps():
    kept = gate_of(draw(initializers.chrono(100))) ** 100
    # Monte Carlo errors of 200 000 draws: 3e-4 and less.
    assert kept.mean() == pytest.approx(0.1496, abs=1e-3)
    assert np.sqrt((kept**2).mean()) == pytest.approx(0.1939, abs=1e-3)
    assert kept.max() == pytest.approx(0.99**100, abs=1e-4)


def test_chrono_of_another_cell():
    bias = draw(initializers.chrono(20, gates=("r", "z", "n"), forget="z", input=None), (3, 50))
    assert (bias[[0, 2]] == 0).all() and (bias[1] > 0).all()


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_what_uniform_gates_keep(steps: int):
    bias = draw(initializers.uniform_gate())
    np.testing.assert_array_equal(bias[0], -bias[1])
    assert (bias[[2, 3]] == 0).all()
    f = gate_of(bias)
    deviation = np.sqrt(1 / (2 * steps + 1) / MANY)
    assert (f**steps).mean() == pytest.approx(1 / (steps + 1), abs=4 * deviation)
    assert np.sqrt((f ** (2 * steps)).mean()) == pytest.approx(1 / np.sqrt(2 * steps + 1), rel=2e-2)


def test_uniform_gates_keep_off_the_ends():
    f = gate_of(draw(initializers.uniform_gate(), (4, 10), seed=3))
    assert f.min() >= 0.1 and f.max() <= 0.9


@pytest.mark.parametrize(
    "make",
    [lambda: initializers.chrono(30), initializers.uniform_gate, initializers.per_gate],
    ids=["chrono", "uniform", "gate"],
)
def test_the_key_decides(make: Any):
    shape = (4, 4, 4) if make is initializers.per_gate else (4, 8)
    np.testing.assert_array_equal(draw(make(), shape, seed=1), draw(make(), shape, seed=1))
    assert (draw(make(), shape, seed=1) != draw(make(), shape, seed=2)).any()


@pytest.mark.parametrize("start", [initializers.forget_bias(1.0), initializers.chrono(50), initializers.uniform_gate()])
def test_the_first_step_of_an_lstm_has_these_gates(start: Any):
    cell = rnncore.LSTM(16, bias_init=start)
    params = cell.init(KEY, 2, jnp.float64)
    _, gates = cell.update(params, cell.initial_carry((), jnp.float64), cell.project(params, jnp.zeros(2)))
    np.testing.assert_allclose(gates.f, gate_of(np.asarray(params.bias)), rtol=1e-14)


# --------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: initializers.chrono(2), r"`chrono\(t_max=2\)`: expected at least 3 steps"),
        (
            lambda: initializers.chrono(9, forget="z"),
            r"`chrono\(gate='z'\)`: not among the gates \('i', 'f', 'g', 'o'\)",
        ),
        (lambda: initializers.chrono(9, gates=("r", "z", "n"), forget="z"), r"`chrono\(gate='i'\)`: not among"),
        (lambda: initializers.uniform_gate(forget="q"), r"`uniform_gate\(gate='q'\)`: not among the gates"),
        (lambda: initializers.forget_bias(gate="q"), r"`forget_bias\(gate='q'\)`: not among.*name the cell's gates"),
        (lambda: draw(initializers.uniform_gate(), (4, 1)), r"shape=\(4, 1\)\)`: expected at least 2 units"),
        (
            lambda: draw(initializers.per_gate(), (4, 4)),
            r"`per_gate\(...\)\(key, shape=\(4, 4\)\)`: expected \(..., rows, G",
        ),
    ],
)
def test_messages(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["forget_bias", "chrono", "uniform_gate"])
@pytest.mark.parametrize("shape", [(3, 4), (4,), (16,), (2, 4, 4)])
def test_shapes_that_do_not_fit_the_gates(name: str, shape: tuple[int, ...]):
    make = {
        "forget_bias": initializers.forget_bias(),
        "chrono": initializers.chrono(10),
        "uniform_gate": initializers.uniform_gate(),
    }
    with pytest.raises(ValueError) as raised:
        make[name](KEY, shape)
    start = f"`{name}(gates=('i', 'f', 'g', 'o'))(key, shape={shape})`: expected (4, H); pass the `gates`"
    assert str(raised.value).startswith(start)
