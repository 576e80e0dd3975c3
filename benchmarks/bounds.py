"""The matrix products of a step, by XLA, with no loop around them: what the rest of a layer is measured against.

The products of the recurrence are formed one after the other, none waiting for the last and each result thrown away
for the next; those that can be formed over all steps at once (x W, and in a gradient dU, dW, dx) are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.peers.base import PRECISIONS, Case
from benchmarks.workloads import Workload
from rnncore._command import timing


def products(case: Case, measurement: str) -> Callable[[], Any]:
    """A compiled call of the products of a case."""
    precision = PRECISIONS[case.precision]
    pinned = contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)
    with jax.enable_x64(False), pinned:
        operands = _operands(case.workload, case.dtype)
        run = functools.partial(_products, measurement == "gradient", case.input_product)
        return functools.partial(timing.compile_step(jax.jit(run), (operands,))[0], operands)


def _operands(workload: Workload, dtype: str) -> dict[str, Any]:
    """Stand-ins for the arrays of a layer, time first; the values do not matter."""
    batch, steps, features, hidden = workload.shape
    heads, slab = workload.heads, workload.gates * hidden
    shapes = {
        "x": (steps, batch, features), "h": (steps, heads, batch, hidden // heads), "W": (features, slab),
        "dG": (steps, heads, batch, slab // heads), "U": (heads, hidden // heads, slab // heads),
    }  # fmt: skip
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), len(shapes)), strict=True))
    return {name: jax.random.normal(keys[name], shape, jnp.float32).astype(dtype) for name, shape in shapes.items()}


def _products(is_gradient: bool, input_product: bool, own: dict[str, Any]) -> dict[str, Any]:
    """Every result is returned, so that none is left out."""
    out = {"hU": _step_by_step(own["h"], own["U"])}
    x = own["x"].reshape(-1, own["x"].shape[-1])
    if input_product:
        out["xW"] = x @ own["W"]
    if is_gradient:
        out["dh"] = _step_by_step(own["dG"], jnp.swapaxes(own["U"], 1, 2))
        out["dU"] = jnp.einsum("tnbd,tnbe->nde", own["h"], own["dG"])
        if input_product:
            slopes = jnp.moveaxis(own["dG"], 1, 2).reshape(len(x), -1)
            out |= {"dW": x.T @ slopes, "dx": slopes @ own["W"].T}
    return out


def _step_by_step(left: Any, right: Any) -> Any:
    """(T, N, B, d) times (N, d, e), a product for each step; the last one's result."""

    def product(_: Any, now: Any) -> Any:
        # Of one head a plain product, which runs better than a batch of one.
        return (now[0] @ right[0])[None] if len(right) == 1 else jnp.matmul(now, right), None

    return lax.scan(product, jnp.zeros((*left.shape[1:3], right.shape[-1]), left.dtype), left)[0]
