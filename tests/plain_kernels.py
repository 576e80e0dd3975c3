"""The kernels of `host.Kernels` in plain JAX: what every backend's kernels have to compute."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rnncore.kernels import host, kernel_body

WIDE = jnp.float32


def wide(arrays: Any) -> Any:
    return tuple(a.astype(WIDE) for a in arrays)


def gates_of(slab: jax.Array, count: int) -> list[jax.Array]:
    return [a.astype(WIDE) for a in jnp.split(slab, count, -1)]


def forward(cell: Any, loop: host.Loop, z: jax.Array, keep: str | None) -> host.Outputs:
    rows, hidden, count = z.shape[1], cell.hidden_size, len(cell.gates)
    part = kernel_body.of(cell, (rows, hidden))
    units = tuple(jnp.broadcast_to(u, (rows, hidden)) for u in loop.units)
    start, target = wide(loop.start), wide(loop.reset_carry or ())

    def step(state: Any, now: Any) -> Any:
        (carry, last), (t, z, resets) = state, now
        if resets is not None:
            carry = tuple(jnp.where(resets[:, None], a, b) for a, b in zip(target, carry, strict=True))
        rs = gates_of(host.recurrent_matmul(cell, loop.kernel, carry[part.hidden].astype(z.dtype)[None])[0], count)
        for n, gate in enumerate(part.rest):
            rs[gate] = rs[gate] + loop.rest_bias[n]
        carry = part.forward(units, tuple(gates_of(z, count)), tuple(rs), carry)
        ends = True if loop.lengths is None else (t == loop.lengths - 1)[:, None]
        last = tuple(jnp.where(ends, a, b) for a, b in zip(carry, last, strict=True))
        others = [a.astype(keep) for n, a in enumerate(carry) if n != part.hidden] if keep else ()
        return (carry, last), (carry[part.hidden].astype(z.dtype), tuple(others))

    (_, last), (hs, others) = lax.scan(step, (start, start), (jnp.arange(z.shape[0]), z, loop.resets))
    return host.Outputs(hs, others, last)


def backward(cell: Any, loop: host.Loop, residuals: Any, dhs: jax.Array, dlast: Any) -> host.Cotangents:
    steps, rows, hidden = dhs.shape
    count, part = len(cell.gates), kernel_body.of(cell, (rows, hidden))
    units = tuple(jnp.broadcast_to(u, (rows, hidden)) for u in loop.units)
    zeros = jnp.zeros_like(dhs[0], WIDE)

    def step(state: Any, now: Any) -> Any:
        (ds, dreset_carry, dunits), (t, residuals, dh, resets) = state, now
        if loop.lengths is not None:
            ends = (t == loop.lengths - 1)[:, None]
            ds = tuple(a + jnp.where(ends, b, 0) for a, b in zip(ds, dlast, strict=True))
        ds = tuple(a + dh if n == part.hidden else a for n, a in enumerate(ds))
        more, dzs, drest, ds = part.backward(units, wide(residuals), ds)
        dunits = tuple(a + b for a, b in zip(dunits, more, strict=True))
        apart = iter(drest)
        dr = jnp.stack([a if additive else next(apart) for a, additive in zip(dzs, part.additive, strict=True)], 1)
        dr = dr.astype(loop.kernel.dtype).reshape(rows, count, -1, host.head_size(cell))
        back = jnp.einsum("bgne,ndge->bnd", dr, loop.kernel, preferred_element_type=WIDE).reshape(rows, hidden)
        ds = tuple(a + back if n == part.hidden else a for n, a in enumerate(ds))
        if resets is not None:
            here = resets[:, None]
            dreset_carry = tuple(a + jnp.where(here, b, 0) for a, b in zip(dreset_carry, ds, strict=True))
            ds = tuple(jnp.where(here, 0, a) for a in ds)
        rest = jnp.concatenate(drest, -1).astype(dhs.dtype) if drest else None
        return (ds, dreset_carry, dunits), (jnp.concatenate(dzs, -1).astype(dhs.dtype), rest)

    none = tuple(zeros for _ in dlast)
    begin = (dlast if loop.lengths is None else none, none if loop.resets is not None else None, (zeros,) * len(units))
    inputs = (jnp.arange(steps), residuals, dhs, loop.resets)
    (ds, dreset_carry, dunits), (dz, rest) = lax.scan(step, begin, inputs, reverse=True)
    return host.Cotangents(dz, rest, ds, dreset_carry, dunits)


class Plain(host.KernelBackend):
    """A backend of these kernels."""

    name = "plain"

    def kernels(self) -> host.Kernels:
        return host.Kernels(forward, backward)


PLAIN = Plain()
