"""Weights to and from PyTorch: both ways, against the modules themselves, and what has no like there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

import rnncore
from rnncore import Stack, StackParams, from_torch, to_torch, unroll_stack

B, T, D, H = 2, 5, 3, 4
f64 = jnp.float64
CELLS = {"LSTM": rnncore.LSTM(H), "GRU": rnncore.GRU(H), "RNN": rnncore.Elman(H)}
SHAPES = [dict(), dict(num_layers=2), dict(num_layers=2, bidirectional=True)]
XS = np.random.default_rng(0).normal(size=(B, T, D))


def some_params(stack: Stack) -> StackParams:
    shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), D, f64))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.6, a.shape)), shapes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_there_and_back_is_the_identity(name: str, shape: Any):
    stack = Stack(CELLS[name], **shape)
    params = some_params(stack)
    back = from_torch(stack, to_torch(stack, params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert_close(back, params, 0.0)


@pytest.mark.parametrize("name", CELLS)
def test_layers_without_biases(name: str):
    stack = Stack(CELLS[name], num_layers=2)
    params = some_params(stack)
    bare = params._replace(
        layers=tuple(tuple(p._replace(bias=None, recurrent_bias=None) for p in layer) for layer in params.layers)
    )
    state = to_torch(stack, bare)
    assert sorted(state) == ["weight_hh_l0", "weight_hh_l1", "weight_ih_l0", "weight_ih_l1"]
    assert_close(from_torch(stack, state), bare, 0.0)


@pytest.mark.sample(3)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_outputs_are_those_of_the_module(name: str, shape: Any, bias: bool):
    torch = pytest.importorskip("torch")
    module = getattr(torch.nn, name)(D, H, batch_first=True, bias=bias, dtype=torch.float64, **shape)
    stack = Stack(CELLS[name], **shape)
    params = from_torch(stack, module.state_dict())
    carry, ys = unroll_stack(stack, params, jnp.asarray(XS))
    want, last = module(torch.tensor(XS))
    np.testing.assert_allclose(ys, want.detach().numpy(), atol=1e-12)
    last = (last[1], last[0]) if name == "LSTM" else (last,)  # torch: (h, c)
    for n, field in enumerate(last):
        got = np.stack([way[n] for layer in carry for way in layer])
        np.testing.assert_allclose(got, field.detach().numpy(), atol=1e-12)
    # And back: the same module from our parameters, its two biases joined in one.
    module.load_state_dict({k: torch.tensor(v) for k, v in to_torch(stack, params).items()})
    np.testing.assert_allclose(module(torch.tensor(XS))[0].detach().numpy(), ys, atol=1e-12)


WITHOUT_LIKE = {
    "peepholes": Stack(rnncore.LSTM(H, peepholes=True)),
    "residual": Stack(rnncore.Elman(H, residual=True)),
    "heads": Stack(rnncore.GRU(H, recurrence=rnncore.Heads(2))),
    "mgu": Stack(rnncore.MGU(H)),
    "merge": Stack(rnncore.LSTM(H), bidirectional=True, merge="sum"),
    "learned carry": Stack(rnncore.LSTM(H), learned_carry=True),
}


@pytest.mark.parametrize("what", WITHOUT_LIKE)
def test_a_stack_without_a_like_in_torch_is_refused(what: str):
    stack = WITHOUT_LIKE[what]
    with pytest.raises(NotImplementedError, match="from_torch.*PyTorch has no other"):
        from_torch(stack, {})
    with pytest.raises(NotImplementedError, match="to_torch"):
        to_torch(stack, some_params(stack))


def test_entries_that_do_not_fit_are_named():
    stack = Stack(rnncore.LSTM(H))
    state = to_torch(stack, some_params(stack))
    faults = {
        "has no 'weight_hh_l0'": {k: v for k, v in state.items() if k != "weight_hh_l0"},
        "has no 'bias_hh_l0'": {k: v for k, v in state.items() if k != "bias_hh_l0"},
        r"'weight_hh_l0' has shape \(16, 2\), expected \(16, 4\)": state | {"weight_hh_l0": np.ones((16, 2))},
        "'weight_hr_l0'.*left over.*is that of LSTMP": state | {"weight_hr_l0": np.ones((2, 4))},
        r"\['weight_ih_l1'\] are left over; expected 1 layers": state | {"weight_ih_l1": np.ones((16, 4))},
    }
    for message, wrong in faults.items():
        with pytest.raises(ValueError, match=message):
            from_torch(stack, wrong)


def test_biases_here_and_not_there_are_refused():
    stack = Stack(rnncore.LSTM(H), num_layers=2)
    params = some_params(stack)
    mixed = params._replace(layers=((params.layers[0][0]._replace(bias=None),), params.layers[1]))
    with pytest.raises(ValueError, match="a bias in every layer and direction, or in none"):
        to_torch(stack, mixed)
