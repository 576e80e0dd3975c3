"""What a GPU is given, read without one: options of XLA, and the products of programs lowered for CUDA."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import _compat, gpu

B, T, D, H = 2, 7, 3, 4
KEY = "xla_gpu_enable_command_buffer"


# -------------------------------------------------------------------------------------- options


def test_the_options_are_this_jaxlibs_defaults_and_loops():
    defaults = _compat.command_buffer_commands()
    assert {"FUSION", "CUBLAS", "CUBLASLT"} <= set(defaults) and "WHILE" not in defaults
    options = gpu.loop_as_graph_options("gpu")
    assert sorted(options) == [KEY, "xla_gpu_graph_min_graph_size"]
    assert set(options[KEY].split(",")) == {*defaults, "WHILE"}


@pytest.mark.parametrize("defaults", [[], ["CUBLAS", "FUSION"], ["FUSION", "WHILE"]], ids=["none", "few", "loops too"])
def test_the_compiler_reads_the_options(monkeypatch: pytest.MonkeyPatch, defaults: list[str]):
    """On every platform it parses them: a name that it does not know is an error."""
    if defaults:
        monkeypatch.setattr(_compat, "command_buffer_commands", lambda: defaults)
    else:  # as with XLA_FLAGS=--xla_gpu_enable_command_buffer=
        monkeypatch.setattr(_compat, "command_buffer_commands", list)
    options = gpu.loop_as_graph_options("gpu")
    assert options[KEY] == ",".join(sorted({*(defaults or gpu.DEFAULT), "WHILE"}))
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1.0) == 2.0
    options[KEY] += ",LOOPS"
    with pytest.raises(jax.errors.JaxRuntimeError, match="'LOOPS' is not a valid enum value"):
        jax.jit(lambda x: x + 1, compiler_options=options)(1.0)


def test_elsewhere_there_are_none():
    assert gpu.loop_as_graph_options("cpu") == gpu.loop_as_graph_options("tpu") == {}
    assert gpu.loop_as_graph_options() == gpu.loop_as_graph_options(jax.default_backend())


def test_a_step_is_the_same_with_them():
    """With a GPU this runs the loop as a graph; elsewhere the options change nothing and must not be in the way."""
    cell, params, xs = small("lstm", jnp.float32)
    grad = jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(rnncore.unroll(cell, p, x)[1])), (0, 1))
    with jax.default_matmul_precision("highest"):
        got = jax.jit(grad, compiler_options=gpu.loop_as_graph_options())(params, xs)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, jax.jit(grad)(params, xs)
        )


# -------------------------------------------------------------------------------------- products

CELLS: dict[str, rnncore.Cell] = {
    "lstm": rnncore.LSTM(H),
    "lstm-heads": rnncore.LSTM(H, recurrence=rnncore.Heads(2)),
    "gru": rnncore.GRU(H),
    "reset_before_gru": rnncore.ResetBeforeGRU(H),
}


def small(name: str, dtype: Any) -> tuple[Any, Any, Any]:
    cell = CELLS[name]
    params = cell.init(jax.random.key(0), D, dtype)
    return cell, params, jax.random.normal(jax.random.key(1), (B, T, D), dtype)


class Product(NamedTuple):
    """A product of a program: the loop that it stands in (None outside), its precision and what it takes and gives."""

    loop: int | None
    precision: str
    operands: tuple[str, str]
    result: str


def products(function: Any, *arguments: Any) -> list[Product]:
    """All products of a program as it is lowered for CUDA; loops are numbered in order of appearance."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    module = lowered.compiler_ir("stablehlo")
    functions = {op.attributes["sym_name"].value: op for op in module.body.operations}
    found: list[Product] = []
    loops = 0

    def visit(op: Any, loop: int | None) -> None:
        nonlocal loops
        name = op.operation.name
        if name == "stablehlo.dot_general":
            kinds = [str(v.type).removeprefix("tensor<").removesuffix(">") for v in (*op.operands, op.results[0])]
            words = {str(p).split()[-1].rstrip(">") for p in op.attributes["precision_config"]}
            assert len(words) == 1
            found.append(Product(loop, words.pop(), (kinds[0], kinds[1]), kinds[2]))
        if name == "stablehlo.while":
            loop, loops = loops, loops + 1
        if name == "func.call":
            visit(functions[op.attributes["callee"].value], loop)
        for region in op.operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    visit(inner, loop)

    visit(functions["main"], None)
    # A step outside of the loops is traced to see how the cell is built; nothing uses it, and XLA leaves it out.
    return [p for p in found if p.loop is not None or not p.result.startswith(f"{B}x")]


def loss(cell: Any, **options: Any) -> Any:
    return lambda params, xs: jnp.sum(jnp.sin(rnncore.unroll(cell, params, xs, **options)[1].astype(jnp.float32)))


def test_a_step_holds_one_product_each_way():
    """Forward h U, backward dr U^T; the inputs' product and all weight gradients stand outside the loops."""
    cell, params, xs = small("lstm", jnp.float32)
    run = loss(cell)
    forward = products(run, params, xs)
    assert [(p.loop, p.result) for p in forward] == [(None, f"{T * B}x{4 * H}xf32"), (0, f"{B}x{4 * H}xf32")]
    both = products(jax.grad(run, (0, 1)), params, xs)
    inside = [(p.loop, p.operands[0], p.result) for p in both if p.loop is not None]
    step, slab = f"{B}x{H}xf32", f"{B}x{4 * H}xf32"
    assert inside == [(0, step, slab), (1, slab, step)]
    outside = [p.result for p in both if p.loop is None]
    weights = {f"{4 * H}x{D}xf32", f"{4 * H}x{H}xf32"}
    # One of each; the inputs' product also as the value of functions that are only transposed, which nothing uses.
    z, dx = f"{T * B}x{4 * H}xf32", f"{T * B}x{D}xf32"
    assert set(outside) == {z, dx, *weights} and all(outside.count(kind) == 1 for kind in (dx, *weights))


def second_order(run: Any) -> Any:
    """Forward over reverse."""
    return lambda params, xs: jax.jvp(lambda p: jax.grad(run)(p, xs), (params,), (params,))[1]


PROGRAMS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "lstm": ("lstm", {}, jax.grad),
    "heads": ("lstm-heads", {}, jax.grad),
    "gru, gates again": ("gru", {"recompute": "gates", "checkpoint_every": 3}, jax.grad),
    "gru, chunks again": ("gru", {"recompute": "chunk"}, jax.grad),
    "second order": ("lstm", {}, second_order),
    "autodiff": ("reset_before_gru", {}, jax.grad),
}


@pytest.mark.parametrize(("policy", "precision"), [("highest", "HIGHEST"), ("tensorfloat32", "HIGH")])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_precision_that_is_asked_for_reaches_every_product(program: str, policy: str, precision: str):
    name, options, derivative = PROGRAMS[program]
    cell, params, xs = small(name, jnp.float32)
    with jax.default_matmul_precision(policy):
        found = products(derivative(loss(cell, **options)), params, xs)
    assert len(found) >= 5 and {p.precision for p in found} == {precision}


def test_without_a_policy_no_product_has_one():
    cell, params, xs = small("lstm", jnp.float32)
    assert {p.precision for p in products(jax.grad(loss(cell)), params, xs)} == {"DEFAULT"}


def test_a_policy_around_the_model_alone_holds_for_its_gradient_too():
    cell, params, xs = small("lstm", jnp.float32)

    def run(params: Any, xs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return loss(cell)(params, xs)

    assert {p.precision for p in products(jax.grad(run), params, xs)} == {"HIGHEST"}


@pytest.mark.parametrize("carry_dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16_is_multiplied_as_bfloat16(carry_dtype: Any):
    """No factor of any product is widened on the way, the carry and cotangents included."""
    cell, params, xs = small("lstm", jnp.bfloat16)
    carry = cell.initial_carry((B,), carry_dtype)
    found = products(jax.grad(loss(cell, initial_carry=carry), (0, 1)), params, xs)
    assert len(found) >= 6
    assert {operand.split("x")[-1] for p in found for operand in p.operands} == {"bf16"}
