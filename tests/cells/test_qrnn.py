"""The quasi-recurrent cell: a convolution over time before an elementwise linear state."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import rnncore

WIDTH, T, D, H = 3, 6, 2, 4


def written_out(xs: np.ndarray, resets: np.ndarray) -> np.ndarray:
    """The windows of one sequence, step by step."""
    made = np.zeros((T, WIDTH, D))
    for t in range(T):
        for back in range(WIDTH):
            if t - back < 0 or resets[t - back + 1 : t + 1].any():
                break
            made[t, WIDTH - 1 - back] = xs[t - back]
    return made.reshape(T, -1)


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, T, D)), rng.random((3, T)) < 0.3


def test_windows_are_the_inputs_of_the_last_steps(drawn: Any):
    xs, resets = drawn
    got = rnncore.windows(xs, WIDTH, resets=resets)
    want = np.stack([written_out(x, r) for x, r in zip(xs, resets, strict=True)])
    np.testing.assert_array_equal(got, want)
    major = rnncore.windows(xs.swapaxes(0, 1), WIDTH, resets=resets.swapaxes(0, 1), time_major=True)
    np.testing.assert_array_equal(np.swapaxes(major, 0, 1), want)


def test_windows_go_on_where_a_stream_was_cut(drawn: Any):
    xs, _ = drawn
    whole = rnncore.windows(xs, WIDTH)
    np.testing.assert_array_equal(rnncore.windows(xs[:, 4:], WIDTH, previous=xs[:, 2:4]), whole[:, 4:])


def test_windows_of_a_reversed_run_do_not_reach_into_the_padding(drawn: Any):
    xs, _ = drawn
    lengths = np.array([T, 4, 0])
    got = rnncore.windows(xs, WIDTH, seq_lengths=lengths, reverse=True)
    for e, n in enumerate(lengths):
        turned = np.zeros((T, D))
        turned[:n] = xs[e, :n][::-1]
        np.testing.assert_array_equal(got[e, :n], written_out(turned, np.zeros(T, bool))[:n][::-1])


@pytest.mark.parametrize("pooling", ["f", "fo", "ifo"])
def test_a_run_is_a_convolution_and_a_pooling(pooling: Any, drawn: Any):
    """Against the paper's equations: a masked convolution, and the reference's step."""
    xs, _ = drawn
    cell = rnncore.QRNN(H, pooling=pooling)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), cell.init(jax.random.key(0), WIDTH * D))
    kernel = np.asarray(params.input_kernel).reshape(WIDTH, D, len(cell.gates), H)
    padded = np.concatenate([np.zeros((3, WIDTH - 1, D)), xs], 1)
    convolved = np.einsum("btkd,kdgh->btgh", np.stack([padded[:, k : k + T] for k in range(WIDTH)], 2), kernel)
    c, want = np.zeros((3, H)), []
    for t in range(T):
        a = dict(zip(cell.gates, np.moveaxis(convolved[:, t], 1, 0), strict=True))
        f = reference.sigmoid(a["f"])
        enters = reference.sigmoid(a["i"]) if pooling == "ifo" else 1 - f
        c = f * c + enters * np.tanh(a["z"])
        want.append(c if pooling == "f" else reference.sigmoid(a["o"]) * c)
    ys = rnncore.unroll(cell, params, rnncore.windows(jnp.asarray(xs), WIDTH))[1]
    cases.assert_close(ys, np.stack(want, 1), cases.FLOAT64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda xs: rnncore.QRNN(H, pooling="of"), "expected one of 'f', 'fo', 'ifo'"),
        (lambda xs: rnncore.windows(xs, 0), "at least 1 input"),
        (lambda xs: rnncore.windows(xs, 2, previous=xs), r"previous has shape \(3, 6, 2\), expected \(3, 1, 2\)"),
        (lambda xs: rnncore.windows(xs, 2, resets=jnp.zeros((3, T))), r"expected bool \(3, 6\)"),
    ],
)
def test_what_makes_no_sense(call: Any, words: str, drawn: Any):
    with pytest.raises(ValueError, match=words):
        call(jnp.asarray(drawn[0]))
