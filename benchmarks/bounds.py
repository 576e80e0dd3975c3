"""What no layer can beat by much: its matrix products without the loop's dependence, an empty loop, a copy.

products: the products of the step, one after the other, none waiting for the last and each result thrown away
  for the next; and those that can be formed over all steps at once (x W, and in a gradient dU, dW, dx) as they are.
products batched: the same products, all of them over all steps at once.
empty loop: as many steps of a loop that does nothing, twice as many for a gradient.
copy bandwidth: bytes read and written where a large array is added to in place; of the machine, not of a workload.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.peers.base import PRECISIONS, Case
from benchmarks.workloads import Workload
from rnncore._command import timing

COPY_BYTES = 2**28
QUICK_COPY_BYTES = 2**25


class Bound(NamedTuple):
    """A compiled program that runs beside the contenders.

    Fields:
      call: runs it once.
      gigaflop: of its products, one call; None where it has none.
    """

    call: Callable[[], Any]
    gigaflop: float | None


def bounds(case: Case, measurement: str) -> dict[str, Bound]:
    """By name, those of a forward pass or of a gradient; none for a training step, whose products are a gradient's."""
    if measurement not in ("forward", "gradient"):
        return {}
    workload = case.workload
    precision = PRECISIONS[case.precision]
    pinned = contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)
    found = {}
    with jax.enable_x64(False), pinned:
        operands = [_operands(workload, case.dtype, layer) for layer in range(workload.layers)]
        is_gradient = measurement == "gradient"
        for name, batched in (("products", False), ("products batched", True)):
            run = functools.partial(_products, is_gradient, case.input_product, batched)
            compiled, _ = timing.compile_step(jax.jit(run), (operands,))
            flops = workload_gigaflop(workload, case.input_product) * (3 if is_gradient else 1)
            found[name] = Bound(functools.partial(compiled, operands), flops)
        steps = workload.layers * workload.steps * (2 if is_gradient else 1)
        compiled, _ = timing.compile_step(jax.jit(functools.partial(_empty_loop, steps)), (jnp.zeros(()),))
        found["empty loop"] = Bound(functools.partial(compiled, jnp.zeros(())), None)
    return found


def workload_gigaflop(workload: Workload, input_product: bool) -> float:
    """Of the products of a forward pass, in 10^9; a gradient's are three times that.

    A diagonal kernel has no product.
    """
    batch, steps, features, hidden = workload.shape
    total = 0
    for layer in range(workload.layers):
        rows = {"dense": hidden, "heads": hidden // workload.heads, "diagonal": 0}[workload.recurrence]
        rows += (hidden if layer else features) if input_product else 0
        total += 2 * batch * steps * rows * workload.gates * hidden
    return total / 1e9


def _operands(workload: Workload, dtype: str, layer: int) -> dict[str, Any]:
    """Stand-ins for the arrays of a layer, time first; the values do not matter, so they are drawn fast."""
    batch, steps, features, hidden = workload.shape
    features, heads, slab = hidden if layer else features, workload.heads, workload.gates * hidden
    shapes = {
        "x": (steps, batch, features), "h": (steps, heads, batch, hidden // heads), "W": (features, slab),
        "dG": (steps, heads, batch, slab // heads), "U": (heads, hidden // heads, slab // heads),
    }  # fmt: skip
    if workload.recurrence == "diagonal":
        del shapes["U"], shapes["h"]
    keys = dict(zip(shapes, jax.random.split(jax.random.key(layer), len(shapes)), strict=True))
    return {name: jax.random.normal(keys[name], shape, jnp.float32).astype(dtype) for name, shape in shapes.items()}


def _products(is_gradient: bool, input_product: bool, batched: bool, layers: list[dict[str, Any]]) -> Any:
    """All products of all layers; every result is given back, so that none is left out."""
    return [_layer_products(is_gradient, input_product, batched, own) for own in layers]


def _layer_products(is_gradient: bool, input_product: bool, batched: bool, own: dict[str, Any]) -> dict[str, Any]:
    out = {}
    x = own["x"].reshape(-1, own["x"].shape[-1])
    slab = jnp.moveaxis(own["dG"], 1, 2).reshape(len(x), -1)  # the cotangent of all gates, a row for each input
    if input_product:
        out["z"] = x @ own["W"]
        if is_gradient:
            out["dW"], out["dx"] = x.T @ slab, slab @ own["W"].T
    if "U" not in own:
        return out
    along = _at_once if batched else _step_by_step
    out["r"] = along(own["h"], own["U"])
    if is_gradient:
        out["dh"] = along(own["dG"], jnp.swapaxes(own["U"], 1, 2))
        out["dU"] = jnp.einsum("tnbd,tnbe->nde", own["h"], own["dG"])
    return out


def _step_by_step(left: Any, right: Any) -> Any:
    """(T, N, B, d) times (N, d, e), a product for each step; the last one's result."""
    start = jnp.zeros((*left.shape[1:3], right.shape[-1]), left.dtype)
    return lax.scan(lambda _, now: (_of_heads(now, right), None), start, left)[0]


def _at_once(left: Any, right: Any) -> Any:
    """(T, N, B, d) times (N, d, e), one product for all steps of a head."""
    steps, heads, batch, size = left.shape
    rows = jnp.moveaxis(left, 1, 0).reshape(heads, steps * batch, size)
    return _of_heads(rows, right)


def _of_heads(rows: Any, kernel: Any) -> Any:
    """(N, M, d) times (N, d, e); of one head a plain product, which runs better than a batch of one."""
    return (rows[0] @ kernel[0])[None] if len(kernel) == 1 else jnp.matmul(rows, kernel)


def _empty_loop(steps: int, start: Any) -> Any:
    """`steps` additions to one number, which no compiler folds: a loop is a loop to XLA."""
    return lax.scan(lambda carry, _: (carry + 1, None), start, None, length=steps)[0]


def copy_bandwidth(rounds: int, quick: bool) -> dict[str, Any]:
    """The figures of the record: ms of every round, and gigabytes_per_second, read and written."""
    size = QUICK_COPY_BYTES if quick else COPY_BYTES
    with jax.enable_x64(False):
        source = jnp.zeros((size // 4,), jnp.float32)
        # In place: a fresh result would measure how fast the system hands out memory.
        compiled, _ = timing.compile_step(jax.jit(lambda a: a + 1, donate_argnums=0), (source,))
        array = jax.block_until_ready(compiled(source))
    ms = []
    for _ in range(rounds):
        begin = time.perf_counter()
        array = jax.block_until_ready(compiled(array))
        ms.append((time.perf_counter() - begin) * 1e3)
    spread = timing.spread(ms)
    rate = 2 * size / 1e6 / spread["median_ms"]
    return {"ms": ms, **spread, "bytes": 2 * size, "gigabytes_per_second": rate}
