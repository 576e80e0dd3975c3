"""torch.nn.LSTM, GRU and RNN: outputs, final states and all gradients, live and from stored values."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "torch.npz"
KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
CELLS: dict[str, Any] = {
    "lstm": rnncore.LSTM,
    "gru": rnncore.GRU,
    "rnn_tanh": rnncore.Elman,
    "rnn_relu": functools.partial(rnncore.Elman, activation_fn=jax.nn.relu),
}
Values = dict[str, np.ndarray]


def from_torch(kind: str, values: Values, suffix: str) -> rnncore.CellParams:
    """Parameters of one direction.  torch's b_hh adds to b_ih, save on the GRU's n, where the reset stands between."""
    hidden = values[f"weight_hh_{suffix}"].shape[1]

    def kernel(name: str) -> jax.Array:
        weight = values[f"{name}_{suffix}"]  # (G*H, D or H)
        return jnp.asarray(weight.T.reshape(weight.shape[1], -1, hidden))

    bias, second = (values[f"{name}_{suffix}"].reshape(-1, hidden) for name in ("bias_ih", "bias_hh"))
    recurrent = None
    if kind == "gru":
        recurrent, second = second[2:], np.concatenate([second[:2], np.zeros((1, hidden))])
    return rnncore.CellParams(kernel("weight_ih"), kernel("weight_hh"), bias + second, recurrent, ())


def to_torch(kind: str, gradients: rnncore.CellParams, suffix: str) -> Values:
    """Gradients of one direction under torch's names; both biases of a sum have the gradient of the sum."""
    bias = second = np.asarray(gradients.bias)
    if kind == "gru":
        second = np.concatenate([bias[:2], np.asarray(gradients.recurrent_bias)])
    weights = {"weight_ih": gradients.input_kernel, "weight_hh": gradients.recurrent_kernel}
    named = {name: np.asarray(w).reshape(w.shape[0], -1).T for name, w in weights.items()}
    named |= {"bias_ih": bias.reshape(-1), "bias_hh": second.reshape(-1)}
    return {f"{name}_{suffix}": value for name, value in named.items()}


def check(kind: str, run: str, values: Values, backend: str = "scan") -> None:
    """One bidirectional layer of torch against two runs of rnncore."""
    hidden = values["weight_hh_l0"].shape[1]
    cell = CELLS[kind](hidden)
    fields = cell.Carry._fields
    lengths = values["lengths"] if run == "packed" else None
    inside = np.ones(values["xs"].shape[:2], bool)
    if lengths is not None:
        inside = np.arange(inside.shape[1]) < lengths[:, None]
    got: Values = {"grad.xs": np.zeros_like(values["xs"])}
    outputs, last, start = [], [], []
    for direction, suffix in enumerate(("l0", "l0_reverse")):
        # torch's outputs past the length are constant zeros, so nothing flows back from there.
        half = slice(direction * hidden, (direction + 1) * hidden)
        d_outputs = jnp.asarray(values["d_outputs"][..., half] * inside[..., None])
        d_carry = cell.Carry(*(jnp.asarray(values[f"d_{f}_n"][direction]) for f in fields))
        carry = cell.Carry(*(jnp.asarray(values[f"{f}_0"][direction]) for f in fields))

        def layer(params: Any, xs: Any, carry: Any, lengths: Any, _: Any, backwards: bool = direction == 1) -> Any:
            return rnncore.unroll(
                cell, params, xs, initial_carry=carry, seq_lengths=lengths, reverse=backwards, keep_order=backwards,
                backend=backend,
            )  # fmt: skip

        problem = cases.Problem(from_torch(kind, values, suffix), jnp.asarray(values["xs"]), carry, lengths, None)
        (end, ys), (params, xs, first) = cases.puller(layer)(problem, (d_carry, d_outputs))
        outputs.append(np.asarray(ys) * inside[..., None])
        last.append(end)
        start.append(first)
        got["grad.xs"] += np.asarray(xs)
        got |= {f"grad.{name}": value for name, value in to_torch(kind, params, suffix).items()}
    got["outputs"] = np.concatenate(outputs, -1)
    got |= {f"{f}_n": np.stack([getattr(end, f) for end in last]) for f in fields}
    got |= {f"grad.{f}_0": np.stack([getattr(first, f) for first in start]) for f in fields}
    want = {name.removeprefix(f"{run}."): a for name, a in values.items() if name.startswith(f"{run}.")}
    assert set(got) == set(want)
    cases.assert_close(got, want, cases.FLOAT64)


@functools.cache
def golden() -> Values:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.sample(2)
@pytest.mark.parametrize("run", ["full", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_stored_values(kind: str, run: str):
    values = {name.removeprefix(f"{kind}/"): a for name, a in golden().items() if name.startswith(f"{kind}/")}
    check(kind, run, values)


@pytest.mark.sample(3)
@pytest.mark.parametrize("run", ["full", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_live(kind: str, run: str):
    pytest.importorskip("torch")
    import make_golden

    values = make_golden.compute(kind, batch=5, steps=7, features=4, hidden=6, seed=1)
    check(kind, run, values)


def test_the_stored_values_are_those_of_torch():
    pytest.importorskip("torch")
    import make_golden

    stored = {name: a for name, a in golden().items() if name != "torch_version"}
    computed = make_golden.everything()
    assert set(computed) == set(stored)
    cases.assert_close(computed, stored, 1e-13)
