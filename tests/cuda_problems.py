"""Problems for the CUDA kernels, and their results by a written-out loop in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore.kernels import host, kernel_body
from rnncore.kernels.cuda import kernels
from rnncore.kernels.cuda.plan import Device

DEVICES = {
    d.name: d
    for d in (
        Device("T4", 40, 64 * 1024, 75, 1.4, 300), Device("A100", 108, 163 * 1024, 80, 1.4, 1555),
        Device("RTX 3090", 82, 99 * 1024, 86, 1.7, 936), Device("L4", 58, 99 * 1024, 89, 1.7, 300),
        Device("RTX 4090", 128, 99 * 1024, 89, 2.4, 1008), Device("H100", 132, 227 * 1024, 90, 1.75, 3350),
        Device("H200", 132, 227 * 1024, 90, 1.75, 4800), Device("B200", 148, 227 * 1024, 100, 1.8, 8000),
        Device("RTX 5090", 170, 99 * 1024, 120, 2.3, 1792),
    )
}  # fmt: skip
"""Some GPUs, by the figures of their makers."""


def problem(
    cell: Any, rows: int, steps: int, dtype: str, *, lengths: bool = False, resets: bool = False, mask: bool = False,
    zoneout: tuple[int, ...] | None = None, seed: int = 0,
) -> tuple[host.Loop, Any]:  # fmt: skip
    """(run, z), drawn."""
    draw = np.random.default_rng(seed)
    count, hidden = len(cell.gates), cell.hidden_size
    heads = getattr(cell.recurrence, "num_heads", 1)
    size, rest = hidden // heads, len(kernel_body.of(cell, (1, 1)).rest)

    def normal(*shape: int, scale: float = 1.0, of: str = "float32") -> Any:
        return jnp.asarray(scale * draw.normal(size=shape), of)

    def carry() -> Any:
        return tuple(normal(rows, hidden, scale=0.5) for _ in cell.Carry._fields)

    def staying(kind: int) -> Any:
        shares = draw.random((steps, rows, hidden) if kind < 3 else ())
        return None if kind == 0 else jnp.asarray(shares < 0.3) if kind == 1 else jnp.asarray(shares, "float32")

    run = host.Loop(
        kernel=normal(heads, size, count, size, scale=size**-0.5, of=dtype),
        rest_bias=normal(rest, hidden) if rest else None,
        units=tuple(normal(hidden, scale=0.5) for _ in cell.units),
        start=carry(),
        reset_carry=carry() if resets else None,
        mask=jnp.asarray(2.0 * (draw.random((rows, hidden)) < 0.6), "float32") if mask else None,
        lengths=jnp.asarray(draw.integers(0, steps + 1, rows), "int32") if lengths else None,
        resets=jnp.asarray(draw.random((steps, rows)) < 0.3) if resets else None,
        zoneout=tuple(map(staying, zoneout)) if zoneout else None,
    )
    return run, normal(steps, rows, count * hidden, of=dtype)


def plain(cell: Any, run: host.Loop, z: Any, rounded: Any = None) -> tuple[Any, Any]:
    """(hs, last, others, gates), step by step; `rounded` is applied to h where it enters the product."""
    heads, size, count, _ = run.kernel.shape
    rows, hidden = run.start[0].shape
    rest = kernel_body.of(cell, (1, 1)).rest
    fields = cell.Carry._fields
    h = fields.index("h")
    carry, last, hs, others, gates = run.start, run.start, [], [], []
    p = type("p", (), dict(zip(cell.units, run.units, strict=True))) if cell.units else None
    for t in range(z.shape[0]):
        if run.resets is not None:
            carry = tuple(jnp.where(run.resets[t][:, None], b, a) for a, b in zip(carry, run.reset_carry, strict=True))
        entering = carry[h] if run.mask is None else carry[h] * run.mask
        entering = entering if rounded is None else rounded(entering)
        r = jnp.einsum("bnd,ndge->gbne", entering.reshape(rows, heads, size), run.kernel).reshape(count, rows, hidden)
        for n, g in enumerate(rest):
            r = r.at[g].add(run.rest_bias[n])
        zs = z[t].reshape(rows, count, hidden)
        new, emitted = cell.pointwise(
            p, cell.Gates(*(zs[:, g] for g in range(count))), cell.Gates(*r), cell.Carry(*carry)
        )
        if run.zoneout is not None:

            def blend(k: Any, old: Any, new: Any) -> Any:
                return new if k is None else jnp.where(k, old, new) if k.dtype == bool else k * old + (1 - k) * new

            now = [k if k is None or k.ndim == 0 else k[t] for k in run.zoneout]
            new = tuple(map(blend, now, carry, new))
        carry = tuple(new)
        hs.append(carry[h])
        others.append([a for n, a in enumerate(carry) if n != h])
        gates.append(jax.tree.leaves(emitted))
        if run.lengths is None:
            last = carry
        else:
            last = tuple(jnp.where((run.lengths == t + 1)[:, None], b, a) for a, b in zip(last, carry, strict=True))
    return (
        jnp.stack(hs),
        last,
        [jnp.stack(a) for a in zip(*others, strict=True)],
        [jnp.stack(a) for a in zip(*gates, strict=True)],
    )


def in_float64(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype("float64") if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def relative(got: Any, wanted: Any) -> float:
    """The largest relative error of a tree's arrays."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    errors = [float(jnp.linalg.norm(a.astype("float64") - b) / (jnp.linalg.norm(b) + 1e-30)) for a, b in pairs]
    return float("nan") if any(np.isnan(errors)) else max(errors, default=0.0)


def _apart(slab: Any, hidden: int) -> list[Any]:
    return [] if slab is None else jnp.split(jnp.asarray(slab), slab.shape[-1] // hidden, -1)


def check(
    settings: kernels.Settings, cell: Any, rows: int, steps: int, dtype: str, states: bool = False, **options: Any
) -> dict[str, float]:  # fmt: skip
    """Relative errors of all that the two kernels give, against float64."""
    run, z = problem(cell, rows, steps, dtype, **options)
    draw = np.random.default_rng(1)
    hidden = cell.hidden_size
    dhs = jnp.asarray(draw.normal(size=(steps, rows, hidden)), dtype)
    dlast = tuple(jnp.asarray(draw.normal(size=(rows, hidden)), "float32") for _ in run.start)
    kept = kernels.forward(settings, cell, run, z, dtype, states=states)
    states_given = (kept.others, kept.gates)
    extra = [None if a is None else jnp.asarray(draw.normal(size=a.shape), "float32") for a in states_given]
    found = kernels.backward(settings, cell, run, kept.residuals, dhs, dlast, *extra, states=states)

    wide, z64 = in_float64(run), in_float64(z)
    names = ("rest_bias", "units", "start", "reset_carry")

    def fun(z: Any, moving: Any) -> Any:
        return plain(cell, wide._replace(**dict(zip(names, moving, strict=True))), z)

    (hs, last, others, gates), back = jax.vjp(fun, z64, tuple(getattr(wide, n) for n in names))
    pairs = zip(extra, (others, gates), strict=True)
    given = [jax.tree.map(jnp.zeros_like, b) if a is None else _apart(in_float64(a), hidden) for a, b in pairs]
    dz, (drest_bias, dunits, dstart, dreset_carry) = back((in_float64(dhs), in_float64(dlast), *given))
    if run.lengths is not None:  # which the kernel leaves to its caller
        never = (run.lengths == 0)[:, None]
        dstart = tuple(a - jnp.where(never, b, 0) for a, b in zip(dstart, dlast, strict=True))
    got_rest = None if found.rest is None else found.rest.astype("float64").sum((0, 1)).reshape(drest_bias.shape)
    return {
        "hs": relative(kept.hs, hs), "last": relative(kept.last, last), "dz": relative(found.z, dz),
        "drest": relative(got_rest, drest_bias), "dstart": relative(found.start, dstart),
        "dreset_carry": relative(found.reset_carry, dreset_carry),
        "dunits": relative([a.astype("float64").sum(0) for a in found.units], list(dunits)),
        "states": relative([_apart(a, hidden) for a in states_given], [others, gates]) if states else 0.0,
    }  # fmt: skip
