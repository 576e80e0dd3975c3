"""Recurrent cells in NumPy float64, with backpropagation through time written by hand.

This is what the library is held to, so it imports NumPy only and prefers plainness to speed: one
sequence at a time, one step at a time, every kernel written out as one matrix for each gate.

Letters: T steps, D features, H units, G gates.  x (D,), h (H,); a step's carry is a tuple of (H,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class Params(NamedTuple):
    """Parameters in the library's layout; bias and recurrent_bias may be None."""

    input_kernel: Array  # (D, G, H)
    recurrent_kernel: Array  # dense (H, G, H), or (P, G, H), heads (N, H/N, G, H/N), diagonal (G, H)
    bias: Array | None  # (G, H)
    recurrent_bias: Array | None  # one row for each of Cell.biased
    units: tuple[Array, ...]  # (H,) each, or a projection (H, P)


class Weights(NamedTuple):
    """The same, written out gate by gate: z_g = x W_g + b_g, r_g = h U_g + c_g."""

    W: Array  # (G, D, H)
    U: Array  # (G, H, H), or (G, P, H)
    b: Array  # (G, H)
    c: Array  # (G, H)
    p: Array  # (number of units, H), or (1, H, P)


class Cell(NamedTuple):
    """A cell: forward (w, x, s) -> (s', gates, kept), backward (w, dw, kept, ds') -> (dx, ds), adding to dw."""

    gates: tuple[str, ...]
    biased: tuple[int, ...]  # gates whose r has a bias of its own
    forward: Callable[..., Any]
    backward: Callable[..., Any]


# ------------------------------------------------------------------------------- activations


def sigmoid(a: Array) -> Array:
    return 1 / (1 + np.exp(-a))


ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "tanh": (np.tanh, lambda a: 1 - np.tanh(a) ** 2),
    "sigmoid": (sigmoid, lambda a: sigmoid(a) * (1 - sigmoid(a))),
    "relu": (lambda a: np.maximum(a, 0), lambda a: (a > 0).astype(float)),
    "silu": (lambda a: a * sigmoid(a), lambda a: sigmoid(a) * (1 + a * (1 - sigmoid(a)))),
    "hard_sigmoid": (lambda a: np.clip((a + 3) / 6, 0, 1), lambda a: (np.abs(a) < 3) / 6),
}
"""Name to (function, derivative)."""


# ------------------------------------------------------------------------------- the cells


def sums(w: Weights, x: Array, h: Array) -> list[Array]:
    """x W_g + b_g + h U_g for every gate: the pre-activation of a gate that sees only the sum."""
    return [x @ W + b + h @ U for W, b, U in zip(w.W, w.b, w.U, strict=True)]


def back_input(w: Weights, dw: Weights, x: Array, dz: Sequence[Array]) -> Array:
    """Gradient of z_g = x W_g + b_g: adds to dw, returns dx."""
    for g, d in enumerate(dz):
        dw.W[g] += np.outer(x, d)
        dw.b[g] += d
    return sum(W @ d for W, d in zip(w.W, dz, strict=True))


def back_recurrent(w: Weights, dw: Weights, h: Array, dr: Sequence[Array]) -> Array:
    """Gradient of r_g = h U_g + c_g: adds to dw, returns dh."""
    for g, d in enumerate(dr):
        dw.U[g] += np.outer(h, d)
        dw.c[g] += d
    return sum(U @ d for U, d in zip(w.U, dr, strict=True))


def elman(activation: str = "tanh", residual: bool = False) -> Cell:
    """h' = phi(x W + h U + b [+ h])."""
    phi, dphi = ACTIVATIONS[activation]

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        (h,) = s
        (a,) = sums(w, x, h)
        if residual:
            a = a + h
        return (phi(a),), (phi(a),), (x, h, a)

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, h, a = kept
        da = ds[0] * dphi(a)
        dh = back_recurrent(w, dw, h, [da])
        return back_input(w, dw, x, [da]), (dh + da if residual else dh,)

    return Cell(("h",), (), forward, backward)


def leaky(alpha: float | None = None) -> Cell:
    """h' = h + alpha (tanh(x W + h U + b) - h); without an alpha it is exp(-p) of each unit."""

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        (h,) = s
        (a,) = sums(w, x, h)
        rate = np.exp(-w.p[0]) if alpha is None else alpha
        return (h + rate * (np.tanh(a) - h),), (np.tanh(a),), (x, h, a, rate)

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, h, a, rate = kept
        da = ds[0] * rate * (1 - np.tanh(a) ** 2)
        if alpha is None:
            dw.p[0] -= ds[0] * (np.tanh(a) - h) * rate
        dh = back_recurrent(w, dw, h, [da])
        return back_input(w, dw, x, [da]), (dh + ds[0] * (1 - rate),)

    return Cell(("h",), (), forward, backward)


def _positive(a: Array) -> tuple[Array, Array]:
    """(g, g'): a + 1/2 above 0, sigmoid(a) below."""
    return np.where(a >= 0, a + 0.5, sigmoid(a)), np.where(a >= 0, 1.0, sigmoid(a) * (1 - sigmoid(a)))


def mingru(positive: bool = True) -> Cell:
    """h' = (1 - z) h + z g(n)."""

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        (h,) = s
        az, an = sums(w, x, h)
        n = _positive(an)[0] if positive else an
        z = sigmoid(az)
        return ((1 - z) * h + z * n,), (z, n), (x, h, az, an)

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, h, az, an = kept
        n, slope = _positive(an) if positive else (an, 1.0)
        z = sigmoid(az)
        da = [ds[0] * (n - h) * z * (1 - z), ds[0] * z * slope]
        return back_input(w, dw, x, da), (back_recurrent(w, dw, h, da) + ds[0] * (1 - z),)

    return Cell(("z", "n"), (), forward, backward)


def minlstm(positive: bool = True) -> Cell:
    """h' = (f h + i g(n)) / (f + i)."""

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        (h,) = s
        af, ai, an = sums(w, x, h)
        n = _positive(an)[0] if positive else an
        f, i = sigmoid(af), sigmoid(ai)
        return ((f * h + i * n) / (f + i),), (f, i, n), (x, h, af, ai, an)

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, h, af, ai, an = kept
        n, slope = _positive(an) if positive else (an, 1.0)
        f, i = sigmoid(af), sigmoid(ai)
        df, di = i * (h - n) / (f + i) ** 2, f * (n - h) / (f + i) ** 2
        da = [ds[0] * df * f * (1 - f), ds[0] * di * i * (1 - i), ds[0] * i / (f + i) * slope]
        return back_input(w, dw, x, da), (back_recurrent(w, dw, h, da) + ds[0] * f / (f + i),)

    return Cell(("f", "i", "n"), (), forward, backward)


def rglru(scale: float = 8.0) -> Cell:
    """h' = a h + sqrt(1 - a^2) i v,  a = exp(-c log(1 + exp(p)) r)."""

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        (h,) = s
        ar, ai, v = sums(w, x, h)
        r, i = sigmoid(ar), sigmoid(ai)
        a = np.exp(-scale * np.log1p(np.exp(w.p[0])) * r)
        return (a * h + np.sqrt(1 - a * a) * i * v,), (r, i, v), (x, h, r, i, v, a)

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, h, r, i, v, a = kept
        root, rate = np.sqrt(1 - a * a), np.log1p(np.exp(w.p[0]))
        d_log = ds[0] * (h - a / root * i * v) * a  # of log a
        dw.p[0] -= d_log * scale * r * sigmoid(w.p[0])
        da = [-d_log * scale * rate * r * (1 - r), ds[0] * root * v * i * (1 - i), ds[0] * root * i]
        return back_input(w, dw, x, da), (back_recurrent(w, dw, h, da) + ds[0] * a,)

    return Cell(("r", "i", "v"), (), forward, backward)


def qrnn(pooling: str) -> Cell:
    """c' = f c + j z with j = i, or 1 - f without i; the output is o c', or c' without o."""
    names = ("z", *pooling)

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        a = sums(w, x, s[-1])
        g = {"z": np.tanh(a[0])} | {n: sigmoid(b) for n, b in zip(pooling, a[1:], strict=True)}
        c = g["f"] * s[0] + g.get("i", 1 - g["f"]) * g["z"]
        new = (c, g["o"] * c) if "o" in g else (c,)
        return new, tuple(g[n] for n in names), (x, s, g, c)

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, s, g, c = kept
        d = {}
        dc = ds[0]
        if "o" in g:
            d["o"], dc = ds[1] * c, dc + ds[1] * g["o"]
        d["f"], d["z"] = dc * s[0], dc * g.get("i", 1 - g["f"])
        if "i" in g:
            d["i"] = dc * g["z"]
        else:
            d["f"] = d["f"] - dc * g["z"]
        da = [d[n] * ((1 - g[n] ** 2) if n == "z" else g[n] * (1 - g[n])) for n in names]
        dh = back_recurrent(w, dw, s[-1], da)
        return back_input(w, dw, x, da), (dc * g["f"], dh) if "o" in g else (dc * g["f"] + dh,)

    return Cell(names, (), forward, backward)


def lstm(gate: str = "sigmoid", activation: str = "tanh", peepholes: bool = False, coupled: bool = False) -> Cell:
    """c' = f c + i g, h' = o phi(c'); with `coupled` i = 1 - f; with `peepholes` i, f see c and o sees c'."""
    sig, dsig = ACTIVATIONS[gate]
    phi, dphi = ACTIVATIONS[activation]
    names = ("f", "g", "o") if coupled else ("i", "f", "g", "o")
    seeing = [n for n in names if n != "g"]

    def units(p: Array) -> dict[str, Array]:
        return dict(zip(seeing, p, strict=True))

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        c, h = s
        a = dict(zip(names, sums(w, x, h), strict=True))
        if peepholes:
            p = units(w.p)
            a["f"] = a["f"] + p["f"] * c
            if not coupled:
                a["i"] = a["i"] + p["i"] * c
        f, g = sig(a["f"]), phi(a["g"])
        i = 1 - f if coupled else sig(a["i"])
        c_new = f * c + i * g
        if peepholes:
            a["o"] = a["o"] + p["o"] * c_new
        o = sig(a["o"])
        gates = (f, g, o) if coupled else (i, f, g, o)
        return (c_new, o * phi(c_new)), gates, (x, c, h, a, i, f, g, o, c_new)

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, c, h, a, i, f, g, o, c_new = kept
        dc_new, dh_new = ds
        da = {"o": dh_new * phi(c_new) * dsig(a["o"])}
        dc_new = dc_new + dh_new * o * dphi(c_new)
        if peepholes:
            p, dp = units(w.p), units(dw.p)
            dp["o"] += da["o"] * c_new
            dc_new = dc_new + da["o"] * p["o"]
        di, df = dc_new * g, dc_new * c
        da["g"] = dc_new * i * dphi(a["g"])
        if coupled:
            da["f"] = (df - di) * dsig(a["f"])
        else:
            da["f"], da["i"] = df * dsig(a["f"]), di * dsig(a["i"])
        dc = dc_new * f
        if peepholes:
            for n in ("f",) if coupled else ("i", "f"):
                dp[n] += da[n] * c
                dc = dc + da[n] * p[n]
        da = [da[n] for n in names]
        return back_input(w, dw, x, da), (dc, back_recurrent(w, dw, h, da))

    return Cell(names, (), forward, backward)


def lstmp() -> Cell:
    """c' = f c + i g, h' = (o tanh(c')) V."""

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        c, h = s
        ai, af, ag, ao = sums(w, x, h)
        i, f, g, o = sigmoid(ai), sigmoid(af), np.tanh(ag), sigmoid(ao)
        c_new = f * c + i * g
        return (c_new, (o * np.tanh(c_new)) @ w.p[0]), (i, f, g, o), (x, c, h, i, f, g, o, c_new)

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, c, h, i, f, g, o, c_new = kept
        dc, dh = ds
        u = np.tanh(c_new)
        dw.p[0] += np.outer(o * u, dh)
        du = w.p[0] @ dh
        dc = dc + du * o * (1 - u * u)
        da = [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), du * u * o * (1 - o)]
        return back_input(w, dw, x, da), (dc * f, back_recurrent(w, dw, h, da))

    return Cell(("i", "f", "g", "o"), (), forward, backward)


def norm(parts: Sequence[Array], heads: int) -> tuple[list[Array], Callable[..., list[Array]]]:
    """Arrays (H,) normalized over all of them head by head, and what pulls gradients back."""
    rows = np.stack(parts).reshape(len(parts), heads, -1)
    centered = rows - rows.mean((0, 2), keepdims=True)
    scale = 1 / np.sqrt((centered**2).mean((0, 2), keepdims=True) + 1e-5)
    normal = centered * scale

    def back(d: Sequence[Array]) -> list[Array]:
        d = np.stack(d).reshape(normal.shape)
        mean, along = d.mean((0, 2), keepdims=True), (d * normal).mean((0, 2), keepdims=True)
        return list((scale * (d - mean - normal * along)).reshape(len(parts), -1))

    return list(normal.reshape(len(parts), -1)), back


def layer_norm_lstm(heads: int = 1) -> Cell:
    """a = p_0..3 norm(x W) + p_4..7 norm(h U) + b, c' = f c + i g, h' = o tanh(p_8 norm(c') + p_9)."""

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        c, h = s
        of_x, back_x = norm([x @ W for W in w.W], heads)
        of_h, back_h = norm([h @ U for U in w.U], heads)
        ai, af, ag, ao = (w.p[n] * of_x[n] + w.p[4 + n] * of_h[n] + w.b[n] for n in range(4))
        i, f, g, o = sigmoid(ai), sigmoid(af), np.tanh(ag), sigmoid(ao)
        c_new = f * c + i * g
        (level,), back_c = norm([c_new], heads)
        u = np.tanh(w.p[8] * level + w.p[9])
        kept = (x, c, h, of_x, back_x, of_h, back_h, i, f, g, o, level, back_c, u)
        return (c_new, o * u), (i, f, g, o), kept

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, c, h, of_x, back_x, of_h, back_h, i, f, g, o, level, back_c, u = kept
        dc, dh = ds
        d_level = dh * o * (1 - u * u)
        dw.p[8] += d_level * level
        dw.p[9] += d_level
        dc = dc + back_c([d_level * w.p[8]])[0]
        da = [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * u * o * (1 - o)]
        for n, d in enumerate(da):
            dw.p[n] += d * of_x[n]
            dw.p[4 + n] += d * of_h[n]
            dw.b[n] += d
        dz = back_x([d * w.p[n] for n, d in enumerate(da)])
        dr = back_h([d * w.p[4 + n] for n, d in enumerate(da)])
        return back_normalized(w, dw, x, h, dz, dr, dc * f)

    return Cell(("i", "f", "g", "o"), (), forward, backward)


def back_normalized(
    w: Weights, dw: Weights, x: Array, h: Array, dz: Sequence[Array], dr: Sequence[Array], *others: Array
) -> tuple[Array, tuple]:
    """(dx, ds) of x W and h U without their biases, which stand behind the normalization."""
    for n in range(len(dz)):
        dw.W[n] += np.outer(x, dz[n])
        dw.U[n] += np.outer(h, dr[n])
    dx = sum(W @ d for W, d in zip(w.W, dz, strict=True))
    return dx, (*others, sum(U @ d for U, d in zip(w.U, dr, strict=True)))


def layer_norm_gru(heads: int = 1) -> Cell:
    """r, z as of an LSTM over their two gates, n = tanh(p_2 norm(x W_n) + b_n + r (p_5 norm(h U_n) + p_6))."""

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        (h,) = s
        xs, hs = [x @ W for W in w.W], [h @ U for U in w.U]
        (gates_x, back_gates_x), (gates_h, back_gates_h) = norm(xs[:2], heads), norm(hs[:2], heads)
        (n_x, back_n_x), (n_h, back_n_h) = norm(xs[2:], heads), norm(hs[2:], heads)
        of_x, of_h = gates_x + n_x, gates_h + n_h
        r, z = (sigmoid(w.p[n] * of_x[n] + w.p[3 + n] * of_h[n] + w.b[n]) for n in range(2))
        q = w.p[5] * of_h[2] + w.p[6]
        n = np.tanh(w.p[2] * of_x[2] + w.b[2] + r * q)
        backs = (back_gates_x, back_n_x, back_gates_h, back_n_h)
        return ((1 - z) * n + z * h,), (r, z, n), (x, h, of_x, of_h, r, z, n, q, backs)

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, h, of_x, of_h, r, z, n, q, (back_gates_x, back_n_x, back_gates_h, back_n_h) = kept
        (d,) = ds
        dan = d * (1 - z) * (1 - n**2)
        of_gates = [dan * q * r * (1 - r), d * (h - n) * z * (1 - z)]
        along_x, along_h = [*of_gates, dan], [*of_gates, dan * r]
        for m in range(3):
            dw.p[m] += along_x[m] * of_x[m]
            dw.p[3 + m] += along_h[m] * of_h[m]
            dw.b[m] += along_x[m]
        dw.p[6] += along_h[2]
        dz, dr = ([a * w.p[at + m] for m, a in enumerate(along)] for at, along in ((0, along_x), (3, along_h)))
        dz, dr = back_gates_x(dz[:2]) + back_n_x(dz[2:]), back_gates_h(dr[:2]) + back_n_h(dr[2:])
        dx, (dh,) = back_normalized(w, dw, x, h, dz, dr)
        return dx, (dh + d * z,)

    return Cell(("r", "z", "n"), (), forward, backward)


def slstm() -> Cell:
    """i = exp(a_i - m'), f = exp(log sigmoid(a_f) + m - m'), m' the larger exponent; h' = o c' / n'.

    Where n is 0 m' is a_i and f is 1.
    """

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        c, n, m, h = s
        ai, af, az, ao = sums(w, x, h)
        old = -np.logaddexp(0, -af) + m
        first = n == 0
        m_new = np.where(first, ai, np.maximum(ai, old))
        i, f = np.exp(ai - m_new), np.where(first, 1.0, np.exp(np.minimum(old - m_new, 0)))
        z, o = np.tanh(az), sigmoid(ao)
        c_new, n_new = f * c + i * z, f * n + i
        kept = (x, c, n, h, af, first, ai >= old, i, f, z, o, c_new, n_new)
        return (c_new, n_new, m_new, o * c_new / n_new), (i, f, z, o), kept

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, c, n, h, af, first, by_input, i, f, z, o, c_new, n_new = kept
        dc, dn, dm, dh = ds
        dao = dh * c_new / n_new * o * (1 - o)
        dc, dn = dc + dh * o / n_new, dn - dh * o * c_new / n_new**2
        d_exp_i, d_exp_f = (dc * z + dn) * i, np.where(first, 0.0, (dc * c + dn * n) * f)
        dm = dm - d_exp_i - d_exp_f
        dai = d_exp_i + np.where(first | by_input, dm, 0.0)
        dold = d_exp_f + np.where(first | by_input, 0.0, dm)
        da = [dai, dold * sigmoid(-af), dc * i * (1 - z * z), dao]
        return back_input(w, dw, x, da), (dc * f, dn * f, dold, back_recurrent(w, dw, h, da))

    return Cell(("i", "f", "z", "o"), (), forward, backward)


def gru(gate: str = "sigmoid", activation: str = "tanh") -> Cell:
    """h' = (1 - z) n + z h with n = phi(x W_n + b_n + r (h U_n + c_n)): the reset after the product."""
    sig, dsig = ACTIVATIONS[gate]
    phi, dphi = ACTIVATIONS[activation]

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        (h,) = s
        ar, az, _ = sums(w, x, h)
        r, z = sig(ar), sig(az)
        q = h @ w.U[2] + w.c[2]
        an = x @ w.W[2] + w.b[2] + r * q
        n = phi(an)
        return ((1 - z) * n + z * h,), (r, z, n), (x, h, ar, az, an, r, z, n, q)

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, h, ar, az, an, r, z, n, q = kept
        (d,) = ds
        dan = d * (1 - z) * dphi(an)
        daz = d * (h - n) * dsig(az)
        dar = dan * q * dsig(ar)
        dh = d * z + back_recurrent(w, dw, h, [dar, daz, dan * r])
        return back_input(w, dw, x, [dar, daz, dan]), (dh,)

    return Cell(("r", "z", "n"), (2,), forward, backward)


def reset_before_gru() -> Cell:
    """h' = (1 - z) n + z h with n = tanh(x W_n + b_n + (r h) U_n): the reset before the product."""
    dsig = ACTIVATIONS["sigmoid"][1]

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        (h,) = s
        ar, az, _ = sums(w, x, h)
        r, z = sigmoid(ar), sigmoid(az)
        n = np.tanh(x @ w.W[2] + w.b[2] + (r * h) @ w.U[2])
        return ((1 - z) * n + z * h,), (r, z, n), (x, h, ar, az, r, z, n)

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, h, ar, az, r, z, n = kept
        (d,) = ds
        dan = d * (1 - z) * (1 - n**2)
        daz = d * (h - n) * dsig(az)
        dw.U[2] += np.outer(r * h, dan)
        drh = w.U[2] @ dan
        dar = drh * h * dsig(ar)
        dh = d * z + drh * r + back_recurrent(w, dw, h, [dar, daz, np.zeros_like(dan)])
        return back_input(w, dw, x, [dar, daz, dan]), (dh,)

    return Cell(("r", "z", "n"), (), forward, backward)


def mgu(reset_gate: bool = True) -> Cell:
    """h' = (1 - f) n + f h with n = tanh(x W_n + b_n + f (h U_n + c_n)); without reset_gate no f and no c_n in n."""
    dsig = ACTIVATIONS["sigmoid"][1]

    def forward(w: Weights, x: Array, s: tuple) -> tuple:
        (h,) = s
        af, _ = sums(w, x, h)
        f = sigmoid(af)
        q = h @ w.U[1] + w.c[1]
        n = np.tanh(x @ w.W[1] + w.b[1] + (f * q if reset_gate else q))
        return ((1 - f) * n + f * h,), (f, n), (x, h, af, f, n, q)

    def backward(w: Weights, dw: Weights, kept: tuple, ds: tuple) -> tuple:
        x, h, af, f, n, q = kept
        (d,) = ds
        dan = d * (1 - f) * (1 - n**2)
        df, dq = d * (h - n), dan
        if reset_gate:
            df, dq = df + dan * q, dan * f
        daf = df * dsig(af)
        dh = d * f + back_recurrent(w, dw, h, [daf, dq])
        return back_input(w, dw, x, [daf, dan]), (dh,)

    return Cell(("f", "n"), (1,) if reset_gate else (), forward, backward)


# ----------------------------------------------------------------------- kernels as matrices


def entries(kernel: Array) -> Any:
    """Pairs (index into the kernel, index into the (G, H, H) matrices) that hold the same number."""
    if kernel.ndim == 3:
        return (((j, g, k), (g, j, k)) for j, g, k in np.ndindex(*kernel.shape))
    if kernel.ndim == 4:
        size = kernel.shape[1]
        return (((n, j, g, k), (g, n * size + j, n * size + k)) for n, j, g, k in np.ndindex(*kernel.shape))
    return (((g, k), (g, k, k)) for g, k in np.ndindex(*kernel.shape))


def write_out(cell: Cell, params: Params) -> Weights:
    """The parameters as one matrix for each gate."""
    _, gates, hidden = params.input_kernel.shape
    dense = params.recurrent_kernel.ndim == 3 and params.recurrent_kernel.size > 0  # an unconnected one has no rows
    U = np.zeros((gates, params.recurrent_kernel.shape[0] if dense else hidden, hidden))
    for here, there in entries(params.recurrent_kernel):
        U[there] = params.recurrent_kernel[here]
    c = np.zeros((gates, hidden))
    if params.recurrent_bias is not None:
        c[list(cell.biased)] = params.recurrent_bias
    b = np.zeros((gates, hidden)) if params.bias is None else params.bias
    p = np.stack(params.units) if params.units else np.zeros((0, hidden))
    return Weights(np.moveaxis(params.input_kernel, 1, 0), U, b, c, p)


def read_back(cell: Cell, dw: Weights, params: Params) -> Params:
    """Gradients in the layout of the parameters."""
    kernel = np.zeros_like(params.recurrent_kernel)
    for here, there in entries(kernel):
        kernel[here] = dw.U[there]
    return Params(
        np.moveaxis(dw.W, 0, 1),
        kernel,
        None if params.bias is None else dw.b,
        None if params.recurrent_bias is None else dw.c[list(cell.biased)],
        tuple(dw.p),
    )


# ------------------------------------------------------------------------------- over time


class Run(NamedTuple):
    """Results of `forward`, every array with the batch axes in front and then time where it has time."""

    last: tuple[Array, ...]
    outputs: Array
    carries: tuple[Array, ...]
    gates: tuple[Array, ...]


def order_of(steps: int, length: int, reverse: bool) -> list[int]:
    """Index into the sequence of what is processed first, second, ...; padding stays behind the data."""
    data, padding = list(range(length)), list(range(length, steps))
    return data[::-1] + padding[::-1] if reverse else data + padding


def one_forward(cell: Cell, w: Weights, xs: Array, start: tuple, length: int, resets: Array) -> tuple:
    """One sequence, in the order of processing: (last carry, carries, gates, kept)."""
    s = last = start
    carries, gates, tape = [], [], []
    for t in range(len(xs)):
        if resets[t]:
            s = start
        s, gate, kept = cell.forward(w, xs[t], s)
        carries.append(s)
        gates.append(gate)
        tape.append(kept)
        if t == length - 1:
            last = s
    return last, carries, gates, tape


def one_backward(
    cell: Cell, w: Weights, dw: Weights, tape: list, length: int, resets: Array, d_outputs: Array, d_last: tuple
) -> tuple[list[Array], tuple]:
    """Gradients of one sequence's inputs and start, in the order of processing; adds to dw."""
    zero = tuple(np.zeros_like(d) for d in d_last)
    ds, dstart = zero, d_last if length == 0 else zero
    dxs: list[Any] = [None] * len(tape)
    for t in reversed(range(len(tape))):
        if t == length - 1:
            ds = tuple(a + b for a, b in zip(ds, d_last, strict=True))
        ds = (*ds[:-1], ds[-1] + d_outputs[t])  # the output is h, the last field of every carry
        dxs[t], ds = cell.backward(w, dw, tape[t], ds)
        if resets[t]:
            dstart = tuple(a + b for a, b in zip(dstart, ds, strict=True))
            ds = zero
    return dxs, tuple(a + b for a, b in zip(dstart, ds, strict=True))


def forward(
    cell: Cell, params: Params, xs: Array, start: tuple, *,
    lengths: Array | None = None, resets: Array | None = None, reverse: bool = False, keep_order: bool = False,
) -> Run:  # fmt: skip
    """Runs the cell over xs (*batch, T, D) from start, a tuple of (*batch, H)."""
    *batch, steps, _ = xs.shape
    w = write_out(cell, params)
    hidden = w.b.shape[1]
    last = tuple(np.zeros_like(s) for s in start)
    carries = tuple(np.zeros((*batch, steps, s.shape[-1])) for s in start)
    gates = tuple(np.zeros((*batch, steps, hidden)) for _ in cell.gates)
    for e in np.ndindex(*batch):
        length = steps if lengths is None else int(lengths[e])
        order = order_of(steps, length, reverse)
        reset = np.zeros(steps, bool) if resets is None else resets[e][order]
        end, ss, gs, _ = one_forward(cell, w, xs[e][order], tuple(s[e] for s in start), length, reset)
        for n, s in enumerate(end):
            last[n][e] = s
        for t, i in enumerate(order):
            place = (*e, i if keep_order else t)
            for n, s in enumerate(ss[t]):
                carries[n][place] = s
            for n, gate in enumerate(gs[t]):
                gates[n][place] = gate
    return Run(last, carries[-1], carries, gates)


def gradients(
    cell: Cell, params: Params, xs: Array, start: tuple, d_outputs: Array, d_last: tuple, *,
    lengths: Array | None = None, resets: Array | None = None, reverse: bool = False, keep_order: bool = False,
) -> tuple[Params, Array, tuple]:  # fmt: skip
    """Gradients (params, xs, start) of sum(outputs * d_outputs) + sum(last * d_last)."""
    *batch, steps, _ = xs.shape
    w = write_out(cell, params)
    dw = Weights(*(np.zeros_like(a) for a in w))
    dxs, dstart = np.zeros_like(xs), tuple(np.zeros_like(s) for s in start)
    for e in np.ndindex(*batch):
        length = steps if lengths is None else int(lengths[e])
        order = order_of(steps, length, reverse)
        reset = np.zeros(steps, bool) if resets is None else resets[e][order]
        tape = one_forward(cell, w, xs[e][order], tuple(s[e] for s in start), length, reset)[-1]
        dy = d_outputs[e][order] if keep_order else d_outputs[e]
        dx, ds = one_backward(cell, w, dw, tape, length, reset, dy, tuple(d[e] for d in d_last))
        for t, i in enumerate(order):
            dxs[(*e, i)] = dx[t]
        for n, d in enumerate(ds):
            dstart[n][e] = d
    return read_back(cell, dw, params), dxs, dstart
