"""Layer normalization inside the recurrence: the definition, every mode, the compiled loop, what does not run it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import analysis
from rnncore.kernels import compiler


def test_is_the_definition_by_torchs_layer_norm():
    """One step of Ba et al.'s LSTM from torch.nn.functional.layer_norm over all gates, as PyTorch's fastrnns has it."""
    torch = pytest.importorskip("torch")
    case = cases.BY_ID["layer_norm_lstm"]
    drawn = cases.draw(case, (3,), 1)
    p, size = drawn.params, cases.HIDDEN
    x, c, h = (torch.tensor(np.asarray(a)) for a in (drawn.xs[:, 0], *drawn.carry))

    def norm(a: Any, gain: Any) -> Any:
        return torch.nn.functional.layer_norm(a, a.shape[-1:], torch.tensor(np.concatenate(gain)), eps=1e-5)

    W, U = (torch.tensor(np.asarray(k).reshape(k.shape[0], -1)) for k in (p.input_kernel, p.recurrent_kernel))
    gates = norm(x @ W, p.units[:4]) + norm(h @ U, p.units[4:8]) + torch.tensor(np.asarray(p.bias).reshape(-1))
    i, f, g, o = gates.split(size, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(norm(c, [p.units.cell]) + torch.tensor(np.asarray(p.units.cell_shift)))
    got = cases.runner(case, "scan")(*drawn)[0]
    cases.assert_close(got, rnncore.LSTMCarry(c.numpy(), h.numpy()), cases.FLOAT64)


@pytest.mark.slow
def test_second_order():
    case = cases.BY_ID["layer_norm_gru"]
    drawn = cases.draw(case, (2,), 2)
    direction = cases.cotangents(drawn.params, 3)

    @functools.partial(jax.jit, static_argnums=0)
    def twice(backend: str) -> Any:
        def value(params: Any) -> Any:
            return jnp.sum(jnp.sin(cases.runner(case, backend)(params, *drawn[1:])[1]))

        return jax.jvp(jax.grad(value), (drawn.params,), (direction,))

    cases.assert_close(twice("scan"), twice("autodiff"), 1e-11)


@pytest.mark.sample(1)
@pytest.mark.parametrize("recompute", ["gates", "chunk"])
def test_memory_policies(recompute: str):
    case = cases.BY_ID["layer_norm_lstm_heads"]
    problem = cases.draw(case, (2,), resets=True)
    cases.assert_expected(case, problem, *cases.pull(cases.runner(case, "scan", recompute=recompute), problem))


class Competing(rnncore.GatedCell):
    """Units that share a sum, over the root of their mean square: values by unit and by sequence, a user's own."""

    gates = ("h",)

    def combine(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        share = jax.nn.softmax(z.h + r.h)
        h = share * jax.lax.rsqrt(jnp.mean(jnp.square(share), -1))[..., None] - carry.h
        return self.Carry(h), self.Gates(share)


@pytest.mark.sample(1)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_cell_of_a_user(batch: tuple[int, ...]):
    case = cases.Case("competing", Competing(cases.HIDDEN), None)
    problem = cases.draw(case, batch, 3)
    cases.assert_expected(case, problem, *cases.pull(cases.runner(case, "scan"), problem))


COMPILED = pytest.mark.skipif(compiler.find() is None, reason="no C++ compiler here")


def sized(id: str, hidden: int) -> cases.Case:
    case = cases.BY_ID[id]
    return dataclasses.replace(case, cell=dataclasses.replace(case.cell, hidden_size=hidden))


@pytest.mark.ci
@COMPILED
@pytest.mark.sample("layer_norm_lstm_heads")
@pytest.mark.parametrize("id", ["layer_norm_lstm_heads", "layer_norm_gru"])
def test_in_the_compiled_loop(id: str):
    """In stages: against the reference, then in several vectors with every option, each head padded for itself."""
    case = cases.BY_ID[id]
    problem = cases.draw(case, lengths=True, resets=True)
    cases.assert_expected(case, problem, *cases.pull(cases.runner(case, "cpp"), problem))

    case = sized(id, 74)
    problem = cases.draw(case, (5,), 9, lengths=True, resets=True)
    mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, (5, 74)) * 2.0)
    zoneout = case.cell.Carry(*(0.3 for _ in case.cell.Carry._fields))
    options: dict[str, Any] = {"recurrent_mask": mask, "zoneout": zoneout, "recompute": "chunk", "checkpoint_every": 4}
    results, gradients, cotangents = cases.pull(cases.runner(case, "cpp", **options), problem)
    want = cases.puller(cases.runner(case, "scan", **options))(problem, cotangents)
    cases.assert_close((results, gradients), want, 1e-11)


@COMPILED
@pytest.mark.slow
@pytest.mark.parametrize("id", ["layer_norm_lstm_heads", "layer_norm_gru"])
def test_states_and_forward_mode_in_the_compiled_loop(id: str):
    case = sized(id, 18)
    problem = cases.draw(case, lengths=True, resets=True)
    moved = cases.cotangents(problem[:3])

    def both(backend: str) -> Any:
        run = cases.runner(case, backend, return_states=True)
        value = lambda *moving: run(*moving, *problem[3:])  # noqa: E731
        squared = lambda *moving: sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(value(*moving)))  # noqa: E731
        twice = lambda: jax.jvp(jax.grad(squared, (0, 1, 2)), problem[:3], moved)  # noqa: E731
        return jax.jit(lambda: (jax.jvp(value, problem[:3], moved), twice()))()

    cases.assert_close(both("cpp"), both("autodiff"), 1e-11)


@COMPILED
@pytest.mark.slow
def test_threads_that_share_a_step_give_the_same_bits():
    case = sized("layer_norm_lstm_heads", 192)
    problem = cases.draw(case, (3,), 20, 40, dtype=jnp.float32)
    shrunk = problem._replace(params=jax.tree.map(lambda a: a / 4, problem.params))
    results, gradients, cotangents = cases.pull(cases.runner(case, "cpp"), shrunk)
    again = cases.puller(cases.runner(case, "cpp"))
    for _ in range(5):
        cases.assert_close(again(shrunk, cotangents), (results, gradients), 0.0)
    want = cases.puller(cases.runner(case, "scan"))(shrunk, cotangents)
    cases.assert_close((results, gradients), want, 1e-5)


class Shares(rnncore.ReducingCell):
    """A softmax, which is no mean."""

    gates = ("h",)

    def combine(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        h = jax.nn.softmax(z.h + r.h)
        return self.Carry(h), self.Gates(h)


@pytest.mark.ci
def test_says_where_it_runs():
    cell = rnncore.LayerNormLSTM(4)
    params, xs = cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3))
    choice = rnncore.explain_backend(cell, params, xs)
    assert "not a PointwiseCell" in choice.rejected["cuda"] and "LayerNorm" not in choice.rejected.get("cpp", "")
    other = Shares(4)
    choice = rnncore.explain_backend(other, other.init(jax.random.key(0), 3), xs)
    assert choice.name == "scan" and "Shares mixes units by other operations" in choice.rejected["cpp"]
    run = analysis.trajectory(cell, params, xs)
    assert analysis.step_jacobians(run, method="vjp").shape == (2, 5, 8, 8)
    with pytest.raises(NotImplementedError, match="no elementwise coefficients"):
        analysis.step_jacobians(run, method="analytic")


def test_forgets_the_size_of_its_weights_and_starts_with_gains_of_one():
    cell = dataclasses.replace(cases.BY_ID["layer_norm_lstm"].cell, epsilon=0.0, forget_bias=1.0)
    params = cell.init(jax.random.key(0), 3)
    ones = {n: a for n, a in params.units._asdict().items() if n != "cell_shift"}
    assert all((a == 1).all() for a in ones.values()) and not params.units.cell_shift.any()
    assert params.bias[1].tolist() == [1.0] * 4 and not params.bias[0].any()
    xs = jax.random.normal(jax.random.key(1), (2, 5, 3))
    larger = params._replace(input_kernel=3 * params.input_kernel, recurrent_kernel=5 * params.recurrent_kernel)
    start = rnncore.LSTMCarry(*jax.random.normal(jax.random.key(2), (2, 2, 4)))
    runs = [rnncore.unroll(cell, p, xs, initial_carry=start)[1] for p in (params, larger)]
    cases.assert_close(*runs, 1e-5)
