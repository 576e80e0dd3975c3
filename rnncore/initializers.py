"""Initialisers for recurrent networks.

Every function returns an initialiser of the jax.nn.initializers kind, `(key, shape, dtype) -> Array`.
Bias initialisers draw the (G, H) bias of a cell and are told the order of its gates.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
from jax.nn import initializers as jax_initializers

from rnncore._types import Array, Initializer

LSTM_GATES = ("i", "f", "g", "o")

P = ParamSpec("P")


@dataclasses.dataclass(frozen=True)
class Made:
    """The initialiser that a function makes of its arguments, as a value: it can be compared and pickled.

    A function inside of another one could not.
    """

    make: Callable[..., Initializer]
    arguments: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, key: Array, shape: Sequence[int], *dtype: Any, **options: Any) -> Any:
        return self.__wrapped__(key, shape, *dtype, **options)  # without a dtype the function's own default holds

    @property
    def __wrapped__(self) -> Initializer:
        """The function; `inspect.unwrap` finds it."""
        return getattr(self.make, "__wrapped__", self.make)(*self.arguments, **dict(self.options))


def as_value(make: Callable[P, Initializer]) -> Callable[P, Made]:
    """A function that makes initialisers, so that what it makes is a `Made`."""

    @functools.wraps(make)
    def made(*arguments: P.args, **options: P.kwargs) -> Made:
        make(*arguments, **options)  # its checks
        fixed = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        return Made(made, arguments, tuple(sorted(fixed.items())))

    return made


lecun_normal = Made(jax_initializers.lecun_normal)
orthogonal = Made(jax_initializers.orthogonal)
zeros = jax_initializers.zeros
unit_interval = Made(jax_initializers.uniform, (1.0,))


@as_value
def per_gate(block: Initializer = orthogonal) -> Initializer:
    """Draws every gate's block of a (rows, G, columns) kernel on its own.

    An orthogonal matrix drawn over (H, G*H) has gate blocks of spectral norm about 0.86 and
    Frobenius norm sqrt(H/G): none of them is orthogonal.  Drawn gate by gate each block U_g has
    U_g U_g^T = I, so the network starts with the gradient retention of an orthogonal matrix.

    Args:
      block: initialiser of one (rows, columns) block.

    Returns:
      Initialiser for shapes (..., rows, G, columns); leading axes (heads) are drawn apart too.

    Raises:
      ValueError: the shape has fewer than three axes.

    Example:
      >>> import jax
      >>> kernel = per_gate()(jax.random.key(0), (4, 3, 4))
      >>> bool(jax.numpy.allclose(kernel[:, 0] @ kernel[:, 0].T, jax.numpy.eye(4), atol=1e-5))
      True

    Source: Saxe, McClelland and Ganguli (2014), arXiv:1312.6120, for the orthogonal block.
    Keras and flax.nnx's OptimizedLSTMCell draw one orthogonal matrix over all gates.
    """

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        if len(shape) < 3:
            raise ValueError(f"`per_gate(...)(key, shape={tuple(shape)})`: expected (..., rows, G, columns).")
        *lead, rows, gates, columns = shape
        count = gates
        for size in lead:
            count *= size
        # The QR behind an orthogonal block has no half-precision form: draw in float32 and round.
        wide = jnp.promote_types(dtype, jnp.float32)
        blocks = [block(k, (rows, columns), wide).astype(dtype) for k in jax.random.split(key, count)]
        stacked = jnp.stack(blocks).reshape(*lead, gates, rows, columns)
        return jnp.moveaxis(stacked, -3, -2)

    return init


@as_value
def forget_bias(value: float = 1.0, *, gates: Sequence[str] = LSTM_GATES, gate: str = "f") -> Initializer:
    """Bias of `value` on the forget gate, 0 elsewhere: f = sigmoid(value) at the origin.

    Args:
      value: the bias b_f.
      gates: gate names of the cell in order (`LSTM.gates`).
      gate: the name of the gate that forgets ("f" in LSTM, "z" in GRU).

    Returns:
      Initialiser for a (G, H) bias.

    Raises:
      ValueError: `gate` is not among `gates`, or the shape does not fit them.

    Example:
      >>> import jax
      >>> forget_bias(1.0)(jax.random.key(0), (4, 2))[1].tolist()
      [1.0, 1.0]

    Source: Gers, Schmidhuber and Cummins (2000); Jozefowicz, Zaremba and Sutskever (2015).
    Keras adds 1 by default; Flax and PyTorch add nothing.
    """
    return _bias("forget_bias", gates, gate, None, lambda key, shape, dtype: value)


@as_value
def chrono(t_max: int, *, gates: Sequence[str] = LSTM_GATES, forget: str = "f", input: str | None = "i") -> Initializer:
    """Forget biases whose time scales are spread evenly over 2 to `t_max` steps.

    b_f = log u with u ~ U(1, t_max - 1), b_i = -b_f.  Then 1/(1 - f) = 1 + u at the origin.

    Args:
      t_max: longest dependency expected, in steps; at least 3.
      gates: gate names of the cell in order.
      forget: name of the gate that keeps the state ("f" in LSTM, "z" in GRU).
      input: name of the gate that gets the opposite bias; None where there is none.

    Returns:
      Initialiser for a (G, H) bias.

    Raises:
      ValueError: t_max below 3, an unknown gate name, or a shape that does not fit.

    Example:
      >>> import jax
      >>> bias = chrono(100)(jax.random.key(0), (4, 8))
      >>> bool((bias[0] == -bias[1]).all())
      True

    Source: Tallec and Ollivier (2018), arXiv:1804.11188.
    """
    if t_max < 3:
        raise ValueError(f"`chrono(t_max={t_max})`: expected at least 3 steps.")
    return _bias(
        "chrono", gates, forget, input,
        lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape[1:], dtype, 1.0, t_max - 1.0)),
    )  # fmt: skip


@as_value
def uniform_gate(*, gates: Sequence[str] = LSTM_GATES, forget: str = "f", input: str | None = "i") -> Initializer:
    """Forget gates uniform in (0, 1) at the origin, so that E[f^k] = 1/(k + 1).

    b_f = log(u / (1 - u)) with u ~ U(1/H, 1 - 1/H), b_i = -b_f.

    Args:
      gates: gate names of the cell in order.
      forget: name of the gate that keeps the state.
      input: name of the gate that gets the opposite bias; None where there is none.

    Returns:
      Initialiser for a (G, H) bias.

    Raises:
      ValueError: an unknown gate name, a shape that does not fit, or H below 2.

    Example:
      >>> import jax
      >>> uniform_gate()(jax.random.key(0), (4, 8)).shape
      (4, 8)

    Source: Gu, Gulcehre, Paine, Hoffman and Pascanu (2020), arXiv:1910.09890.
    """

    def draw(key: Array, shape: Sequence[int], dtype: Any) -> Array:
        if shape[1] < 2:
            raise ValueError(f"`uniform_gate(...)(key, shape={tuple(shape)})`: expected at least 2 units.")
        edge = 1.0 / shape[1]
        u = jax.random.uniform(key, shape[1:], dtype, edge, 1.0 - edge)
        return jnp.log(u) - jnp.log1p(-u)

    return _bias("uniform_gate", gates, forget, input, draw)


def critical_forget_bias(radius: float = 1.0, i: float = 0.5, o: float = 0.5) -> float:
    """The forget bias at which an LSTM's Jacobian at the origin has a given spectral radius.

    f + i o = radius,   b_f = ln(f / (1 - f))

    With x = h = c = b_g = 0 the eigenvalues of d s_t / d s_{t-1} that are not 0 are f + i o lambda(U_g); an
    orthogonal U_g has |lambda| = 1, and the largest is reached where one of them is 1.  Above the bias for
    radius 1, ln 3 = 1.0986 with i = o = 1/2, small states and gradients grow.

    Args:
      radius: the spectral radius that is wanted.
      i: input gate at the origin, sigmoid(b_i).
      o: output gate at the origin, sigmoid(b_o).

    Returns:
      The bias, a number for `forget_bias` or `LSTM(forget_bias=...)`.

    Raises:
      ValueError: gates outside 0 to 1, or a radius that no f between 0 and 1 gives.

    Example:
      >>> round(critical_forget_bias(), 4), round(critical_forget_bias(0.75), 4)
      (1.0986, 0.0)

    Source: derived here.  The mean-field counterpart is that of Can, Krishnamurthy and Schwab (2020), arXiv:2002.00025.
    """
    if not (0 <= i <= 1 and 0 <= o <= 1):
        raise ValueError(f"`critical_forget_bias(i={i}, o={o})`: expected gates from 0 to 1.")
    f = radius - i * o
    if not 0 < f < 1:
        raise ValueError(
            f"`critical_forget_bias(radius={radius}, i={i}, o={o})`: needs a forget gate of {f:.6g}, and a gate lies "
            f"between 0 and 1; expected a radius between {i * o:.6g} and {1 + i * o:.6g}."
        )
    return math.log(f) - math.log1p(-f)


def _bias(name: str, gates: Sequence[str], forget: str, input: str | None, draw: Callable[..., Any]) -> Initializer:
    """Of a (G, H) bias: what `draw(key, shape, dtype)` gives on one gate, its opposite on another, else 0."""
    for gate in (forget, input):
        if gate is not None and gate not in gates:
            raise ValueError(f"`{name}(gate={gate!r})`: not among the gates {tuple(gates)}; name the cell's gates.")

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        if len(shape) != 2 or shape[0] != len(gates):
            raise ValueError(
                f"`{name}(gates={tuple(gates)})(key, shape={tuple(shape)})`: expected ({len(gates)}, H); "
                "pass the `gates` of the cell that the bias is for."
            )
        values, order = draw(key, shape, dtype), tuple(gates)
        bias = jnp.zeros(shape, dtype).at[order.index(forget)].set(values)
        return bias if input is None else bias.at[order.index(input)].set(-values)

    return init
