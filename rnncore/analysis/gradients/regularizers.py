"""Penalties and gradient estimators that help gradients survive many steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.analysis.dynamics.lyapunov import lyapunov_exponents
from rnncore.analysis.gradients._backward import backward, through_gates
from rnncore.analysis.run.trajectory import cell_trajectory, trailing
from rnncore.cells import pointwise
from rnncore.cells.base import Cell, CellParams, PointwiseCell
from rnncore.recurrence.step import spread_units
from rnncore.sequence.call import unroll

NO_GRADIENT = 1e-20
"""Steps whose gradient has a squared norm below this do not count, as in the released code."""


def pascanu_omega(
    loss: Callable[[Any, Array], Array],
    cell: PointwiseCell,
    params: CellParams,
    xs: Array,
    initial_carry: Any = None,
    *,
    form: str = "paper",
    seq_lengths: Any = None,
    resets: Any = None,
    reset_carry: Any = None,
) -> Array:
    """Pascanu's regulariser: how far each step is from preserving the norm of the gradient that passes through it.

    paper: Omega = sum_t (q_t - 1)^2,   code: Omega = mean_t (q_t^2 - 1)^2,   q_t = ||J_t^T v_t|| / ||v_t||
    v_t = dL/ds_t, total over all later steps,   J_t = d s_t / d s_{t-1},   s the whole carry, [c; h] for an LSTM

    As in the paper, its gradient is the immediate partial derivative with respect to U in J_t alone: states,
    gates and v_t count as constants, so the other parameters get no gradient and no second-order derivative is
    needed.  "code" is the version that the authors released: squared norms, and a mean over the steps that have
    a gradient; near q = 1 "paper" is about T / 4 times as large.

    Args:
      loss: the training loss, (carry, outputs) as `rnncore.unroll` returns them, batch axes included, to one number.
        Its scale cancels.
      cell: any pointwise cell.
      params: its parameters.
      xs: inputs (*batch, T, D).
      initial_carry, seq_lengths, resets, reset_carry: as in `rnncore.unroll`.  Padding and steps with a
        reset do not count.
      form: "paper", a sum over steps and a mean over the batch; "code", a mean over both.  In both, steps with
        ||v_t||^2 below 1e-20 do not count.

    Returns:
      Omega, one number, to add to the loss with a factor.

    Raises:
      ValueError: unknown form; what `unroll` refuses; values that are not finite (outside jit).
      NotImplementedError: the cell is not a `PointwiseCell`.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.Elman(4, activation_fn=jax.nn.identity)  # its initial U is orthogonal
      >>> loss = lambda carry, outputs: jnp.sum(carry.h ** 2)
      >>> params = cell.init(jax.random.key(0), 3)
      >>> bool(analysis.pascanu_omega(loss, cell, params, jnp.ones((2, 5, 3))) < 1e-10)
      True

    Source: Pascanu, Mikolov and Bengio (2013), arXiv:1211.5063, section 3.3; its code, pascanur/trainingRNNs.
    """
    if form not in ("paper", "code"):
        raise ValueError(f"`pascanu_omega(form={form!r})`: expected 'paper' or 'code'.")
    _pointwise("pascanu_omega", cell)
    fixed = jax.lax.stop_gradient(params)
    given = (xs, initial_carry, seq_lengths, resets, reset_carry)
    done = jax.lax.stop_gradient(backward("pascanu_omega", loss, cell, fixed, *given))
    _, d_r, d_before = through_gates(cell, fixed, done)
    with jax.default_matmul_precision("highest"):
        # The only place where U is not a constant.
        d_h = jax.linear_transpose(
            lambda h: cell.recurrent_matmul(params._replace(recurrent_bias=None), h), done.before.h
        )
        (through,) = d_h(jnp.concatenate(list(d_r), -1))
    d_before = d_before._replace(h=d_before.h + through)

    square, of = _square_norm(d_before), _square_norm(done.after)
    counts = of >= NO_GRADIENT
    if resets is not None:
        counts &= ~jnp.asarray(resets)
    if seq_lengths is not None:
        counts &= jnp.arange(xs.shape[-2]) < jnp.asarray(seq_lengths)[..., None]
    ratio = jnp.where(counts, square, 1.0) / jnp.where(counts, of, 1.0)
    if form == "code":
        return jnp.sum(jnp.where(counts, (ratio - 1) ** 2, 0.0)) / jnp.maximum(jnp.sum(counts), 1)
    # The square root has no derivative at 0: a step through which nothing passes adds 1 and no gradient.
    some = ratio > 0
    root = jnp.where(some, jnp.sqrt(jnp.where(some, ratio, 1.0)), 0.0)
    return jnp.mean(jnp.sum(jnp.where(counts, (root - 1) ** 2, 0.0), -1))


def gate_sparsity(gates: Any, gate: str = "o", seq_lengths: Any = None) -> Array:
    """A penalty that makes a gate sparse: the mean of its values, to add to the loss with a factor.

    penalty = mean over sequences, steps and units of |o_t|

    Closed output gates block the paths through h and leave the one through the forget gates.

    Args:
      gates: the gates by name, `states.gates` of `unroll(..., return_states=True)` or `trajectory(...).gates`.
      gate: the name of the gate.
      seq_lengths: (*batch), as in the run; padding does not count.

    Returns:
      One number, differentiable in the parameters.

    Raises:
      ValueError: no gate of that name.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell, xs = rnncore.LSTM(4), jnp.ones((2, 5, 3))
      >>> params = cell.init(jax.random.key(0), 3)
      >>> def loss(params):
      ...     carry, _, states = rnncore.unroll(cell, params, xs, return_states=True)
      ...     return jnp.sum(carry.h ** 2) + 0.1 * analysis.gate_sparsity(states.gates)
      >>> jax.grad(loss)(params).bias.shape
      (4, 4)
    """
    named = gates._asdict() if hasattr(gates, "_asdict") else gates
    if not isinstance(named, Mapping) or gate not in named:
        have = ", ".join(named) if isinstance(named, Mapping) else type(gates).__name__
        raise ValueError(f"`gate_sparsity(gate={gate!r})`: expected one of the gates of the run, {have}.")
    values = jnp.abs(named[gate])
    if seq_lengths is None:
        return jnp.mean(values)
    inside = (jnp.arange(values.shape[-2]) < jnp.asarray(seq_lengths)[..., None])[..., None]
    return jnp.mean(values, where=jnp.broadcast_to(inside, values.shape))


def gradient_flossing(
    cell: Cell,
    params: PyTree,
    xs: Array,
    k: int,
    target: float = 0.0,
    *,
    initial_carry: Any = None,
    qr_every: int = 1,
    burn_in: int = 0,
    key: Array | None = None,
) -> Array:
    """Gradient flossing: a loss that pushes the k leading Lyapunov exponents towards a target.

    loss = mean over i <= k of (lambda_i - target)^2, mean over the batch

    The derivative is exact, through the states, the step Jacobians and every QR.  That of a QR divides by R_ii:
    choose k below the rank of the long product, and float64 if exponents lie far apart.  A lost direction (an
    exponent of -inf) makes the loss inf and its gradient NaN.

    Args:
      cell: any rnncore cell.
      params: its parameters.
      xs: inputs (*batch, T, D).
      k: how many exponents.
      target: the target; 0 preserves the size of gradients.
      initial_carry: as in `rnncore.unroll`.
      qr_every, burn_in, key: as in `lyapunov_exponents`.

    Returns:
      The loss, one number.

    Raises:
      ValueError: as `trajectory` and `lyapunov_exponents`; a lost direction (outside jit and grad).

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> params = cell.init(jax.random.key(0), 3)
      >>> grads = jax.grad(analysis.gradient_flossing, 1)(cell, params, jnp.ones((2, 10, 3)), 2)
      >>> grads.bias.shape, bool(jnp.isfinite(grads.bias).all())
      ((4, 4), True)

    Source: Engelken (2023), arXiv:2312.17306.
    """
    run = cell_trajectory(cell, params, xs, initial_carry)
    exponents = lyapunov_exponents(run, k, qr_every=qr_every, burn_in=burn_in, key=key).exponents
    value = jnp.mean(jnp.square(exponents - target))
    if not isinstance(value, jax.core.Tracer) and not jnp.isfinite(value):
        raise ValueError(
            f"`gradient_flossing(k={k})`: an exponent is -inf, the product of Jacobians has a rank below k; ask for "
            "fewer exponents."
        )
    return value


def h_detach(cell: PointwiseCell, params: CellParams, xs: Array, key: Array, p: float = 0.5, **options: Any) -> Any:
    """`rnncore.unroll` that blocks, with probability p at each step, the gradient through h_{t-1} into the gates.

    r_t = U stop_gradient(h_{t-1}) with probability p, else U h_{t-1};   the values are those of unroll

    One draw per step, shared by the batch.  With p = 1 only the direct path is left: d c_T / d c_0 of an
    LSTM is the product of its forget gates.  Where h_{t-1} also enters elsewhere, as in z h_{t-1} of a GRU,
    its gradient passes.

    Args:
      cell: any pointwise cell.
      params: its parameters.
      xs: inputs (*batch, T, D).
      key: for the draws; use a new one for every training step.
      p: the probability; 0.25 to 0.5 in the paper.
      options: of `rnncore.unroll`, except recurrent_mask and backend.

    Returns:
      What `rnncore.unroll` returns.

    Raises:
      ValueError: p outside 0 to 1; what `unroll` refuses.
      NotImplementedError: the cell is not a `PointwiseCell`; recurrent_mask.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> params, xs = cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3))
      >>> carry, outputs = analysis.h_detach(cell, params, xs, jax.random.key(1), p=0.25)
      >>> bool(jnp.allclose(outputs, rnncore.unroll(cell, params, xs)[1], atol=1e-6))
      True

    Source: Kanuparthi et al. (2019), arXiv:1810.03023.
    """
    _pointwise("h_detach", cell)
    pointwise.check_elementwise(cell)
    if not isinstance(p, jax.core.Tracer) and not 0 <= p <= 1:
        raise ValueError(f"`h_detach(p={p})`: expected a probability from 0 to 1.")
    xs = jnp.asarray(xs)
    if not jnp.issubdtype(xs.dtype, jnp.floating) or xs.ndim < 2:
        raise ValueError(
            f"`h_detach(xs=<{xs.dtype} {xs.shape}>)`: expected floating point (*batch, T, D); embed or convert it "
            "first."
        )
    first = bool(options.get("time_major", False))
    steps = xs.shape[0 if first else -2]
    blocked = jax.random.bernoulli(key, p, (steps,)).astype(xs.dtype)
    blocked = trailing(blocked, xs) if first else blocked[:, None]
    wide = jnp.concatenate([xs, jnp.broadcast_to(blocked, (*xs.shape[:-1], 1))], -1)
    missing = tuple(name for name in ("bias", "recurrent_bias") if getattr(params, name, 0) is None)
    return unroll(_Detached(cell.hidden_size, cell, missing), params, wide, **options)


@dataclasses.dataclass(frozen=True)
class _Detached(Cell):
    """A cell with one additional input feature: whether the gradient through h is blocked in this step."""

    cell: PointwiseCell
    missing: tuple[str, ...]

    def init(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> PyTree:
        nothing: dict[str, Any] = dict.fromkeys(self.missing)
        return self.cell.init(key, input_size - 1, dtype)._replace(**nothing)

    def initial_carry(self, batch_shape: Sequence[int] = (), dtype: Any = jnp.float32) -> Any:
        return self.cell.initial_carry(batch_shape, dtype)

    def project(self, params: CellParams, xs: Array) -> PyTree:
        return self.cell.project(params, xs[..., :-1]), jax.lax.stop_gradient(xs[..., -1:])

    def update(self, params: CellParams, carry: Any, z: PyTree) -> tuple[Any, PyTree]:
        z, blocked = z
        cell, h = self.cell, carry.h
        h = jnp.where(blocked > 0.5, jax.lax.stop_gradient(h), h)
        units = spread_units(params, h)
        return cell.pointwise(units, cell.split(z), cell.split(cell.recurrent_matmul(params, h)), carry)

    def output(self, carry: Any) -> Array:
        return self.cell.output(carry)


def _pointwise(call: str, cell: Any) -> None:
    if isinstance(cell, PointwiseCell):
        return
    if not isinstance(cell, Cell):
        raise ValueError(
            f"`{call}(cell=<{type(cell).__name__}>)`: expected an rnncore cell, such as rnncore.LSTM(256)."
        )
    raise NotImplementedError(
        f"`{call}({type(cell).__name__})`: expected a PointwiseCell, whose recurrent product is known; write the "
        "cell as one, see `rnncore.PointwiseCell`."
    )


def _square_norm(carry: Any) -> Array:
    """Over all fields, (*batch, T)."""
    return sum((jnp.sum(jnp.square(a), -1) for a in jax.tree.leaves(carry)), start=0.0)  # type: ignore[return-value]
