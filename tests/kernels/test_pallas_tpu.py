"""Backend "pallas_tpu": its kernels interpreted on the CPU, translated for a TPU, its layouts and its refusals."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import GRU, LSTM, Heads
from rnncore.kernels import pallas_tpu
from rnncore.kernels.pallas_tpu import kernels as pallas_tpu_kernels
from rnncore.kernels.pallas_tpu import plan as plans
from rnncore.recurrence.run import Request

TPU, SCAN = "pallas_tpu", "scan"
B, T = 11, 7
# Two orders of summing some hundred terms of about 1 in float32, forward, back and over steps.
FLOAT32 = 1e-5
# h, z, the residuals and dr are each rounded to 8 bits once a step, by half of 2**-8 at most, over T steps.
BFLOAT16 = 4 * T * 2**-9


@pytest.fixture(autouse=True)
def on_a_tpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The platform is there, and nothing that another test has traced is run again."""
    monkeypatch.setattr(pallas_tpu, "missing_platform", lambda platform: None)
    cases.forget()
    yield
    cases.forget()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, with blocks so short that there are several tiles and several blocks, and padding in each."""
    monkeypatch.setattr(pallas_tpu_kernels, "kernels", functools.partial(pallas_tpu_kernels.kernels, True))
    monkeypatch.setattr(plans, "MAX_STEPS", 3)
    monkeypatch.setattr(plans, "MAX_ROWS", 8)


def widened(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def compare(case: cases.Case, problem: cases.Problem, tolerance: float, double: bool = False, **options: Any) -> None:
    """Results and gradients for random cotangents, against the scan's in the same dtype or in float64."""
    results, gradients, cotangents = cases.pull(cases.runner(case, TPU, **options), problem)
    if double:
        problem, cotangents = widened((problem, cotangents))
    want = cases.puller(cases.runner(case, SCAN, **options))(problem, cotangents)
    cases.assert_close((results, gradients), want, tolerance)


# -------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("id", [
    "elman-dense", "elman_relu", "lstm_both-heads", "lstm_no_bias", "gru-dense", "gru-heads", "mgu-dense",
    "user_fast_slow-dense", "user_fast_slow-heads",
])  # fmt: skip
@pytest.mark.sample(1)
def test_ragged_sequences_with_resets(interpreted: None, id: str):
    case = cases.BY_ID[id]
    compare(case, cases.draw(case, (B,), T, dtype=jnp.float32, lengths=True, resets=True), FLOAT32)


@pytest.mark.parametrize("id, lengths, resets", [
    ("lstm_both-dense", False, False), ("user_fast_slow-heads", False, True), ("gru-dense", True, False),
])  # fmt: skip
@pytest.mark.slow
def test_full_sequences(interpreted: None, id: str, lengths: bool, resets: bool):
    case = cases.BY_ID[id]
    compare(case, cases.draw(case, (B,), T, dtype=jnp.float32, lengths=lengths, resets=resets), FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("id", ["lstm_both-heads", "gru-dense", "user_fast_slow-dense"])
def test_bfloat16(interpreted: None, id: str):
    case = cases.BY_ID[id]
    problem = cases.draw(case, (B,), T, dtype=jnp.bfloat16, lengths=True, resets=True)
    compare(case, problem, BFLOAT16, double=True)


def test_residuals_of_their_own_dtype(interpreted: None):
    case = cases.BY_ID["lstm-dense"]
    problem = cases.draw(case, (B,), T, dtype=jnp.float32)
    compare(case, problem, BFLOAT16, residual_dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(
    "hidden, heads", [(6, 3), (256, 4), (256, 2)], ids=["padded", "two in a block", "whole blocks"]
)
def test_blocks_of_heads(interpreted: None, hidden: int, heads: int):
    case = cases.Case("heads", LSTM(hidden, recurrence=Heads(heads)), None)
    problem = cases.draw(case, (3,), 5, dtype=jnp.float32, resets=True)
    small = jax.tree.map(lambda a: 0.1 * a, problem.params)  # of 128 terms each
    compare(case, problem._replace(params=small), FLOAT32)


class Divided(rnncore.PointwiseCell):
    """NaN wherever its parameter is 0, as it is in the padding."""

    gates = ("n",)
    units = ("scale",)

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        n = jnp.tanh(z.n + r.n)
        return carry._replace(h=n / (p.scale * p.scale)), self.Gates(n)


def test_padded_units_disturb_nothing(interpreted: None):
    case = cases.Case("divided", Divided(cases.HIDDEN), None)
    problem = cases.draw(case, (3,), 5, dtype=jnp.float32)
    scale = jnp.asarray([1.0, -1.5, 2.0, 1.2], jnp.float32)
    params = problem.params._replace(units=type(problem.params.units)(scale))
    compare(case, problem._replace(params=params), FLOAT32)


@pytest.mark.sample(1)
@pytest.mark.parametrize("id", ["lstm_both-dense", "gru-dense", "user_fast_slow-dense"])
def test_saturated_units_are_finite(interpreted: None, id: str):
    case = cases.BY_ID[id]
    problem = cases.draw(case, (4,), 5, dtype=jnp.float32)
    far = jnp.where(problem.xs > 0, 100.0, -100.0).astype(jnp.float32)
    results, gradients, _ = cases.pull(cases.runner(case, TPU), problem._replace(xs=far))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((results, gradients)))


@pytest.mark.slow
def test_vmap_over_sequences_and_a_reset_carry(interpreted: None):
    case = cases.BY_ID["gru-heads"]
    problem = cases.draw(case, (3, 2), 5, dtype=jnp.float32, lengths=True, resets=True)
    target = cases.cotangents(problem.carry, 5)

    def gradient(backend: str) -> Any:
        def loss(params: Any, xs: Any, carry: Any, lengths: Any, resets: Any, target: Any) -> Any:
            results = cases.runner(case, backend, reset_carry=target)(params, xs, carry, lengths, resets)
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(results))

        every = jax.vmap(jax.grad(loss, (0, 1, 2, 5)), (None, 0, 0, 0, 0, 0))
        return jax.jit(every)(*problem, target)

    cases.assert_close(gradient(TPU), gradient(SCAN), FLOAT32)


# -------------------------------------------------------------------------------------- translation


def lowered(cell: Any, batch: int, steps: int, dtype: Any = jnp.float32, precision: str | None = None) -> str:
    """The gradient of an unroll with lengths and resets, as a TPU gets it."""
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), 3, dtype))
    xs = jax.ShapeDtypeStruct((batch, steps, 3), dtype)
    masks = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((batch, steps), bool)

    def loss(params: Any, xs: Any, lengths: Any, resets: Any) -> Any:
        return jnp.sum(cases.runner(cases.Case("", cell, None), TPU)(params, xs, None, lengths, resets)[1])

    with jax.default_matmul_precision(precision):
        step = jax.jit(jax.grad(loss, (0, 1)))
        return step.trace(params, xs, *masks).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("precision", [None, "high", "highest"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", [
    LSTM(512), LSTM(256, recurrence=Heads(4)), GRU(200), cases.FastSlow(6, recurrence=Heads(3)),
], ids=["lstm", "lstm_heads", "gru", "fast_slow"])  # fmt: skip
@pytest.mark.sample(4)
def test_what_a_tpu_gets_is_the_two_kernels(cell: Any, dtype: str, precision: str | None):
    text = lowered(cell, 64, 37, dtype, precision)
    assert re.findall(r'kernel_name = "(\w+)"', text) == ["rnncore_forward", "rnncore_backward"]
    assert text.count("@tpu_custom_call") == 2 and "stablehlo.while" not in text


def test_every_known_operation_is_translated_by_this_jax():
    from jax._src.pallas.mosaic import lowering  # no public table exists

    table = next(rules for core, rules in lowering.lowering_rules.items() if core.name == "TC")
    assert pallas_tpu.KNOWN <= {primitive.name for primitive in table}


@pytest.mark.slow
def test_inside_shard_map():
    script = Path(__file__).parent.with_name("pallas_tpu_checks.py")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "ok", done.stdout + done.stderr


# -------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("hidden, head, expected", [
    (4, 4, (1, 128)), (200, 200, (1, 256)), (512, 512, (1, 512)),  # dense
    (4, 2, (2, 128)), (256, 64, (2, 128)), (512, 128, (1, 128)), (768, 192, (1, 256)), (800, 100, (1, 128)),
])  # fmt: skip
def test_heads_share_blocks_where_that_makes_the_kernel_smaller(hidden: int, head: int, expected: tuple[int, int]):
    assert plans.packing(hidden, head) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("steps, rows", [(1, 1), (7, 3), (256, 64), (1000, 300), (31, 5000)])
@pytest.mark.parametrize("cell", [LSTM(512), GRU(200), cases.FastSlow(256, recurrence=Heads(4))], ids=lambda c: type(c))
def test_a_layout_covers_the_problem_and_fits(cell: Any, steps: int, rows: int, dtype: str):
    for plan in plans.forward(cell, steps, rows, dtype, dtype), plans.backward(cell, steps, rows, dtype, dtype):
        assert plan.bytes <= plans.VMEM_LIMIT
        assert plan.width % 128 == 0 and plan.blocks * plan.real == cell.hidden_size
        assert plan.rows % (8 if dtype == "float32" else 16) == 0 and plan.steps <= min(plans.MAX_STEPS, steps, 32)
        # All of the problem, and no tile or block with nothing in it.
        assert (plan.tiles - 1) * plan.rows < rows <= plan.tiles * plan.rows
        assert (plan.spans - 1) * plan.steps < steps <= plan.spans * plan.steps


def test_the_bytes_of_a_layout():
    plan = plans.forward(LSTM(512), 256, 64, "float32", None)
    kernel, row = 4 * 512 * 4 * 512, 64 * 512 * 4
    blocks = 2 * plan.steps * 5 * row  # z and h
    carries = 2 * (2 * 3 + 1) * row  # c and h: two buffers of start, target and last, one of the running one
    working = 2 * (4 + 2) * row
    masks, units = 4 * 2 * 2 * 64 * 128, 4 * 2 * 8 * 512 * 4
    assert plan.bytes == plans.RESERVE + kernel + blocks + carries + working + masks + units
    assert (plan.tiles, plan.rows) == (1, 64) and plan.steps >= plans.FEW_STEPS


# -------------------------------------------------------------------------------------- refusals


def request(**changes: Any) -> Request:
    """One that it takes, with changes."""
    plain = Request(
        cell=LSTM(4), steps=T, batch_shape=(B,), input_size=3, dtype="float32", dtypes=frozenset({"float32"}),
        precision=None, platform="tpu", devices=1, lengths=True, resets=True, recurrent_mask=False, zoneout=False,
        return_states=False,
        checkpoint_every=None, recompute="nothing",
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "states": ({"return_states": True}, "return_states=True"),
    "float64": ({"dtype": "float64", "dtypes": frozenset({"float64"})}, "parameters, inputs and carry are float64"),
    "mixed": ({"dtypes": frozenset({"float32", "bfloat16"})}, "parameters, inputs and carry are bfloat16, float32"),
    "residuals": ({"residual_dtype": "float16"}, "residual_dtype='float16': its kernels store float32 and bfloat16"),
    "large": ({"cell": LSTM(1024)}, "need 18.5 MiB of VMEM, and it may take 16 (pallas_tpu_plan.VMEM_LIMIT)"),
    "operation": (
        {"cell": rnncore.Elman(4, activation_fn=jnp.arctan)},
        "of Elman applies `atan`, which its kernel language lacks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_has_a_reason(name: str):
    changes, message = REFUSED[name]
    assert pallas_tpu.PallasTPU().unsupported(request()) is None
    assert message in pallas_tpu.PallasTPU().unsupported(request(**changes))


def test_the_limit_is_a_constant_that_can_be_raised(monkeypatch: pytest.MonkeyPatch):
    assert pallas_tpu.PallasTPU().unsupported(request(cell=LSTM(896))) is None
    monkeypatch.setattr(plans, "VMEM_LIMIT", 64 * 2**20)
    assert pallas_tpu.PallasTPU().unsupported(request(cell=LSTM(1024))) is None


def test_which_platforms_have_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    assert pallas_tpu.missing_platform("tpu") is None
    if jax.default_backend() != "tpu":
        case = cases.BY_ID["gru-dense"]
        with pytest.raises(NotImplementedError, match="it needs a TPU, and JAX runs on .* here.*Use backend=None"):
            cases.runner(case, TPU)(*cases.draw(case, dtype=jnp.float32))


def test_it_is_never_chosen_unless_named():
    case = cases.BY_ID["gru-dense"]
    problem = cases.draw(case, dtype=jnp.float32)
    choice = rnncore.explain_backend(case.cell, *problem[:2])
    assert choice.name != "pallas_tpu" and "it has not run on a TPU yet" in choice.rejected["pallas_tpu"]
