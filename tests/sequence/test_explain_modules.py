"""What `explain_backend` says of Flax modules, the warning of a slow path, and cells under nn.remat."""

from __future__ import annotations

import warnings
from typing import Any

import flax.linen as theirs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as theirs_nnx

import rnncore
from rnncore import flax_modules, linen, nnx

XS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)))
WIDE: dict[str, Any] = {"param_dtype": jnp.float64}


class Mine(linen.LSTMCell):
    """What it computes nobody knows."""


class MineInNNX(nnx.GRUCell):
    """Likewise."""


class Model(theirs.Module):
    @theirs.compact
    def __call__(self, xs: Any, train: bool = False) -> Any:
        xs = linen.RNN(theirs.remat(linen.GRUCell)(4))(xs)
        xs = theirs.Dropout(0.5, deterministic=not train)(xs)
        xs = linen.Bidirectional(linen.RNN(theirs.LSTMCell(4)), linen.RNN(linen.LSTMCell(4)))(xs)
        xs = linen.LSTM(4, num_layers=2, backend="autodiff")(xs)
        return linen.RNN(linen.ConvLSTMCell(1, (2,)), name="conv")(xs[..., None])


class ModelInNNX(theirs_nnx.Module):
    def __init__(self, rngs: Any):
        self.first = nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs))
        self.both = nnx.Bidirectional(
            nnx.RNN(theirs_nnx.GRUCell(4, 4, rngs=rngs)), nnx.RNN(MineInNNX(4, 4, rngs=rngs)), rngs=rngs
        )

    def __call__(self, xs: Any) -> Any:
        return self.both(self.first(xs))


def test_a_linen_model_from_shapes():
    model, key = Model(), jax.random.key(0)
    xs = jax.ShapeDtypeStruct((2, 5, 3), jnp.float32)
    variables = jax.eval_shape(model.init, key, xs)
    said = rnncore.explain_backend(model, variables, xs, train=True, rngs={"dropout": key})
    assert {name: choice.name for name, choice in said.items()} == {
        "RNN_0": "scan", "RNN_1": "scan", "RNN_2": "scan", "LSTM_0/forward_0": "autodiff",
        "LSTM_0/forward_1": "autodiff", "conv": "nn.scan",
    }  # fmt: skip
    assert "recompute='gates'" in said["RNN_0"].rejected["cuda"]
    assert said["LSTM_0/forward_1"].reason == "named by the caller"
    assert "ConvLSTMCell is not exactly" in said["conv"].reason and not said["conv"].faster
    assert "RNN_1, RNN_2: backend 'scan'" in str(said)


def test_an_nnx_model_also_inside_a_compiled_function():
    model = ModelInNNX(theirs_nnx.Rngs(0))
    apply = theirs_nnx.jit(lambda model, xs: model(xs))
    wanted = apply(model, XS)
    said = rnncore.explain_backend(model, XS)
    assert {name: choice.name for name, choice in said.items()} == {
        "first": "scan", "both/forward_rnn": "scan", "both/backward_rnn": "nnx.scan",
    }  # fmt: skip
    assert "pass GRUCell itself" in said["both/backward_rnn"].faster[0]

    class Around(theirs_nnx.Module):
        def __init__(self) -> None:
            self.inner = model

        def __call__(self, xs: Any) -> Any:
            return apply(self.inner, xs)

    assert [choice.name for choice in rnncore.explain_backend(Around(), XS).values()] == ["scan", "scan", "nnx.scan"]
    np.testing.assert_array_equal(apply(model, XS), wanted)


def test_nothing_of_an_explanation_is_kept_for_real_runs():
    """A function that is compiled for the first time while it is explained."""
    inner = jax.jit(lambda variables, xs: linen.RNN(linen.GRUCell(4)).apply(variables, xs))

    class Model(theirs.Module):
        @theirs.compact
        def __call__(self, xs: Any) -> Any:
            return inner({"params": self.param("p", lambda key: weights)}, xs)

    layer = linen.RNN(linen.GRUCell(4))
    weights = layer.init(jax.random.key(0), XS)["params"]
    assert [c.name for c in rnncore.explain_backend(Model(), {"params": {"p": weights}}, XS).values()] == ["scan"]
    got = inner({"params": weights}, XS)
    assert jnp.abs(got).max() > 0.1
    np.testing.assert_allclose(got, layer.apply({"params": weights}, XS), atol=1e-6)


def test_what_would_be_faster(monkeypatch: pytest.MonkeyPatch):
    layer = linen.RNN(linen.LSTMCell(4))
    variables = layer.init(jax.random.key(0), XS)
    monkeypatch.setenv("CXX", "no-such-compiler")
    (advice,) = rnncore.explain_backend(layer, variables, XS)["RNN"].faster
    assert "C++ compiler" in advice and "CXX" in advice
    assert f"faster: {advice}" in str(rnncore.explain_backend(layer, variables, XS))


def test_modules_that_cannot_be_explained():
    flaxen = theirs.RNN(theirs.LSTMCell(4))
    xs = XS.astype(jnp.float32)
    variables = flaxen.init(jax.random.key(0), xs)
    with pytest.raises(ValueError, match="no recurrent layer of rnncore .* take that of rnncore.linen"):
        rnncore.explain_backend(flaxen, variables, xs)
    with pytest.raises(TypeError, match="expected the variables, as `module.init"):
        rnncore.explain_backend(linen.RNN(linen.LSTMCell(4)), XS)
    with pytest.raises(ValueError, match="rnncore.nnx.functional"):
        rnncore.explain_backend(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), XS)


# ------------------------------------------------------------------------------------------ the warning


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The warnings of slow paths, as in a new process."""
    monkeypatch.setattr(flax_modules, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def test_it_comes_once_for_a_cell_and_reason(said: list):
    layer = linen.RNN(Mine(4))
    variables = layer.init(jax.random.key(0), XS)
    layer.apply(variables, XS)
    rnncore.explain_backend(layer, variables, XS)
    (warning,) = said
    assert warning.category is rnncore.SlowPathWarning
    assert "`RNN(Mine(...))`: runs under nn.scan" in str(warning.message) and "pass LSTMCell" in str(warning.message)
    known = linen.RNN(linen.LSTMCell(4))
    with theirs.intercept_methods(lambda fun, args, kwargs, context: fun(*args, **kwargs)):
        known.apply(variables, XS)
    known.apply(variables, XS)
    assert "outside of nn.intercept_methods" in str(said[1].message) and len(said) == 2
    nnx.RNN(MineInNNX(3, 4, rngs=nnx.Rngs(0)))(XS)
    assert "runs under nnx.scan" in str(said[2].message) and len(said) == 3
    # Each points to the line of the call, and not into the library or Flax.
    assert {warning.filename for warning in said} == {__file__}


def test_nothing_is_said_where_nothing_can_be_done(said: list):
    linen.RNN(linen.ConvLSTMCell(1, (2,))).init(jax.random.key(0), XS[..., None])
    linen.RNN(linen.GRUCell(4, gate_fn=jax.nn.softmax)).init(jax.random.key(0), XS)
    linen.RNN(linen.GRUCell(4)).init(jax.random.key(0), XS)
    assert not said


# ------------------------------------------------------------------------------------------------ remat


@pytest.mark.slow
@pytest.mark.parametrize("cell", [linen.LSTMCell, theirs.GRUCell])
def test_remat_of_a_cell_takes_the_fast_way(cell: type, unrolled: list):
    flaxen = theirs.RNN(theirs.remat(getattr(theirs, cell.__name__))(4, **WIDE))
    layer = linen.RNN(theirs.remat(cell)(4, **WIDE))
    variables = flaxen.init(jax.random.key(0), XS)
    mine = layer.init(jax.random.key(0), XS)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, mine, variables))
    count = len(unrolled)
    assert count

    def loss(variables: Any, rnn: Any) -> Any:
        return jnp.sum(jnp.sin(rnn.apply(variables, XS)) * XS[..., :1])

    got, wanted = (jax.value_and_grad(loss)(variables, rnn) for rnn in (layer, flaxen))
    assert len(unrolled) == count + 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), got, wanted)


@pytest.mark.sample(1)
@pytest.mark.parametrize("asked, taken", [("nothing", "gates"), ("chunk", "chunk")])
def test_the_memory_policy_of_remat(asked: str, taken: str):
    layer = linen.RNN(theirs.remat(linen.LSTMCell)(4), recompute=asked)
    variables = layer.init(jax.random.key(0), XS)
    said = rnncore.explain_backend(layer, variables, XS)["RNN"]
    assert f"recompute={taken!r}" in said.rejected["mosaic_gpu"]
