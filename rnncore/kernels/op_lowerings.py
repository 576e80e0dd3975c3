"""Operations that kernel languages lack, in terms of others; exact to float32 unless a comment says otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from rnncore._types import Array


def _expm1(x: Array) -> Array:
    return jnp.tanh(0.5 * x) * (jnp.exp(x) + 1)


def _log1p(x: Array) -> Array:
    # Goldberg's: what log(1 + x) loses where 1 + x is rounded is put right by the factor.
    u = 1 + x
    plain = (u == 1) | (u == x)  # the factor is 1 there, and 0/0 or inf/inf as it is written
    return jnp.where(u == 1, x, jnp.log(u)) * jnp.where(plain, 1.0, x / jnp.where(plain, 1.0, u - 1))


def _erfc(x: Array) -> Array:
    # Abramowitz and Stegun (1964), 7.1.28: within 3e-7.
    terms = (1.0, 0.0705230784, 0.0422820123, 0.0092705272, 0.0001520143, 0.0002765672, 0.0000430638)
    root = _polynomial(jnp.minimum(jnp.abs(x), 10.0), *terms)  # from where on it is 0
    for _ in range(4):
        root = root * root
    return jnp.where(x < 0, 2 - 1 / root, 1 / root)


def _reduced(x: Array) -> Array:
    """x less the nearest multiple of 2 pi: a GPU's approximate sine wants small arguments."""
    turns = jnp.round(x * 0.15915494309189535)
    return (x - turns * 6.28125) - turns * 0.0019353071795864769


def _integer_pow(x: Array, y: int) -> Array:
    power, out = x, None
    for bit in reversed(bin(abs(y))[2:]):
        if bit == "1":
            out = power if out is None else out * power
        power = power * power
    out = jnp.ones_like(x) if out is None else out
    return 1 / out if y < 0 else out


def _polynomial(x: Array, *coefficients: Any) -> Array:
    return functools.reduce(lambda total, c: total * x + c, reversed(coefficients))


LOWERINGS: dict[str, Callable] = {
    "add_any": lambda x, y: x + y,
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "stop_gradient": lambda x: x,
    "square": lambda x: x * x,
    "one_minus_square": lambda x: 1 - x * x,
    "logistic": lambda x: 0.5 * jnp.tanh(0.5 * x) + 0.5,
    "expm1": _expm1,
    "log1p": _log1p,
    "sqrt": lambda x: jnp.where((x == 0) | (x == jnp.inf), x, x * lax.rsqrt(x)),
    "sin": lambda x: jnp.sin(_reduced(x)),
    "cos": lambda x: jnp.cos(_reduced(x)),
    "integer_pow": _integer_pow,
    "not": lambda x: x ^ (True if x.dtype == jnp.bool_ else -1),
    "exp": lambda x: jnp.exp(x),  # at whatever accuracy there is
    "erf": lambda x: 1 - _erfc(x),
    "erfc": _erfc,
    "floor": lambda x: jnp.round(x) - jnp.where(jnp.round(x) > x, 1.0, 0.0),
    "ceil": lambda x: jnp.round(x) + jnp.where(jnp.round(x) < x, 1.0, 0.0),
    "polynomial": _polynomial,
    "tan": lambda x: jnp.sin(_reduced(x)) / jnp.cos(_reduced(x)),
    "sinh": lambda x: 0.5 * (_expm1(x) - _expm1(-x)),
    "cosh": lambda x: 0.5 * (jnp.exp(x) + jnp.exp(-x)),
}
"""Operations, by name, that kernels form from others."""
