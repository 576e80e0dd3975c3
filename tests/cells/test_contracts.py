"""What a loop takes for granted of a cell or a call, and what happens where it is not so: another loop, or an error."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rnncore
from rnncore.kernels.cpp import handlers
from rnncore.sequence import checks

XS = jax.random.normal(jax.random.key(1), (2, 5, 3))


class Doubled(rnncore.Elman):
    def recurrent_matmul(self, params: Any, h: Any) -> Any:
        return 2 * super().recurrent_matmul(params, h)


class Shown(rnncore.Elman):
    def output(self, carry: Any) -> Any:
        return 10 * carry.h


class Clipped(rnncore.Elman):
    def update(self, params: Any, carry: Any, z: Any, mask: Any = None) -> Any:
        new, gates = super().update(params, carry, z, mask)
        return new._replace(h=jnp.clip(new.h, -0.1, 0.1)), gates


class Turned(rnncore.LSTM):
    def split(self, slab: Any) -> Any:
        return self.Gates(*list(super().split(slab))[::-1])


@dataclasses.dataclass(frozen=True)
class Upper(rnncore.Dense):
    def matmul(self, kernel: Any, h: Any) -> Any:
        return super().matmul(kernel * jnp.triu(jnp.ones((kernel.shape[0], kernel.shape[2])))[:, None, :], h)


OWN = {
    "recurrent_matmul": Doubled(4), "output": Shown(4), "update": Clipped(4), "split": Turned(4),
    "matmul of the kernel": rnncore.Elman(4, recurrence=Upper()),
}  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize("what", OWN)
def test_a_method_of_its_own_is_run_and_differentiated(what: str):
    cell = OWN[what]
    params = cell.init(jax.random.key(0), 3, jnp.float64)

    def loss(params: Any) -> Any:
        return jnp.sum(rnncore.unroll(cell, params, XS)[1] ** 2)

    def looped(params: Any) -> Any:
        total, carry = jnp.zeros(()), cell.initial_carry((2,), jnp.float64)
        for t in range(XS.shape[1]):
            carry, _ = cell.update(params, carry, cell.project(params, XS[:, t]))
            total += jnp.sum(cell.output(carry) ** 2)
        return total

    assert rnncore.explain_backend(cell, params, XS).name == "autodiff"
    chex.assert_trees_all_close(jax.grad(loss)(params), jax.grad(looped)(params), rtol=1e-11, atol=1e-12)


def test_a_method_by_its_old_name_is_said_to_have_a_new_one():
    with pytest.raises(TypeError, match="`class Old`: defines `mix`, which is called `recurrent_matmul` now"):
        type("Old", (rnncore.Elman,), {"mix": lambda self, params, h: h})
    with pytest.raises(TypeError, match="`class Old`: defines `mix_transposed`, which is called `matmul_transposed`"):
        type("Old", (rnncore.Dense,), {"mix_transposed": lambda self, kernel, h: h})


def test_cells_that_differ_in_what_is_no_field_are_refused():
    class Leak(rnncore.Elman):
        def __init__(self, hidden_size: int, rate: float):
            super().__init__(hidden_size)
            object.__setattr__(self, "rate", rate)

    cell = Leak(4, 0.1)
    assert cell == Leak(4, 0.9), "which is why"
    with pytest.raises(ValueError, match="its attribute 'rate' is no field.*dataclass"):
        rnncore.unroll(cell, cell.init(jax.random.key(0), 3), XS)


@pytest.mark.parametrize("backend", ["scan", "autodiff", None])
def test_an_explicit_mesh_of_one_device(backend: str | None):
    cell = rnncore.LSTM(4)
    params = cell.init(jax.random.key(0), 3, jnp.float64)

    def gradient(xs: Any) -> Any:
        return jax.grad(lambda p: jnp.sum(jnp.sin(rnncore.unroll(cell, p, xs, backend=backend)[1])))(params)

    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        got = gradient(jax.device_put(XS, NamedSharding(mesh, P("a"))))
    chex.assert_trees_all_close(got, gradient(XS), rtol=1e-12)


def test_a_number_is_a_share_of_zoneout_and_not_a_choice_of_units():
    cell = rnncore.LSTM(4)
    zoneout = checks.check_zoneout(cell, rnncore.LSTMCarry(True, 0.5), (2, 5, 4))
    assert jnp.issubdtype(zoneout.c.dtype, jnp.floating) and zoneout.c == 1


def test_a_cxx_that_is_no_command_compiles_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("CXX", "it's")
    monkeypatch.setattr(handlers, "_names", {})  # another test may have compiled this cell
    cell = rnncore.LSTM(4)
    assert rnncore.unroll(cell, cell.init(jax.random.key(0), 3), XS)[1].shape == (2, 5, 4)
    assert "is no command" in caplog.text
