"""The update of online learning, and readouts with feedback alignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rnncore._types import Array, PyTree
from rnncore.online.rule import Memory, Rule


class OnlineState(NamedTuple):
    """The state between steps.

    Fields:
      params: {"cell": the cell's parameters, "readout": those of the loss function}.
      optimizer: the optimiser's state.
      memory: the rule's.
    """

    params: PyTree
    optimizer: PyTree
    memory: Memory


class OnlineInput(NamedTuple):
    """One step of a stream; `jax.lax.scan` takes it with a time axis in front.

    Fields:
      x: inputs (*batch, D).
      target: whatever the loss function takes.
      reset, valid, key: as in `Rule.step`.
    """

    x: Array
    target: PyTree
    reset: Array | None = None
    valid: Array | None = None
    key: Array | None = None


def online_update(
    rule: Rule, loss_fn: Callable[..., Array], optimizer: optax.GradientTransformation
) -> Callable[[OnlineState, OnlineInput], tuple[OnlineState, Array]]:
    """Makes the update of online learning: one optimiser step at every step of a stream.

    y_t from the rule's step,   L_t = loss_fn(readout, y_t, target_t),   params' = params + optimizer(d L_t / d params)

    Nothing is truncated: d L_t / d params reaches back to the last reset, as far as the rule does.

    Args:
      rule: `RTRL`, `SnAp1` or another, with its cell.
      loss_fn: (readout parameters, y (*batch, H), target) -> loss, a scalar; steps that are not valid must add nothing
        to it.
      optimizer: of optax, for {"cell": ..., "readout": ...}.

    Returns:
      update(state, now) -> (state, loss), with `OnlineState` and `OnlineInput`, of the form of a step of
      `jax.lax.scan`.  The first state is
      `OnlineState(params, optimizer.init(params), rule.init(params["cell"], carry))`.

    Raises:
      ValueError: as `Rule.step`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rnncore
      >>> from rnncore import online
      >>> cell = rnncore.GRU(8, recurrence=rnncore.Diagonal())
      >>> rule, optimizer = online.RTRL(cell), optax.adam(1e-2)
      >>> def loss_fn(readout, y, target):
      ...     return jnp.mean((y @ readout - target) ** 2)
      >>> params = {"cell": cell.init(jax.random.key(0), 1), "readout": jnp.zeros((8, 1))}
      >>> state = online.OnlineState(params, optimizer.init(params), rule.init(params["cell"], cell.initial_carry()))
      >>> wave = jnp.sin(jnp.arange(2001.0) / 5)[:, None]
      >>> update = online.online_update(rule, loss_fn, optimizer)
      >>> state, losses = jax.lax.scan(update, state, online.OnlineInput(wave[:-1], wave[1:]))
      >>> bool(losses[-100:].mean() < losses[:100].mean() / 10)
      True

    Source: Williams and Zipser (1989).  `rnncore.training.truncated_bptt` is the update by segments.
    """

    def update(state: OnlineState, now: OnlineInput) -> tuple[OnlineState, Array]:
        params = state.params
        memory, y = rule.step(
            params["cell"], state.memory, now.x, reset=now.reset, valid=now.valid, key=now.key
        )  # fmt: skip
        loss, (readout, dy) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params["readout"], y, now.target)
        gradients = {"cell": rule.gradient(params["cell"], memory, dy), "readout": readout}
        updates, inner = optimizer.update(gradients, state.optimizer, params)
        return OnlineState(optax.apply_updates(params, updates), inner, memory), loss

    return update


def feedback(y: Array, kernel: Array, weights: Array) -> Array:
    """A readout y W whose error is fed back to y through other weights: feedback alignment.

    out = y W,   d L / d y := (d L / d out) B^T in place of (d L / d out) W^T

    Args:
      y: outputs of a cell (*batch, H).
      kernel: W (H, K).
      weights: B (H, K), random and fixed in the papers.

    Returns:
      y W (*batch, K); its gradient with respect to W is exact.

    Raises:
      ValueError: the weights and the kernel differ in shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import online
      >>> dy = jax.grad(lambda y: online.feedback(y, jnp.zeros((2, 1)), jnp.ones((2, 1))).sum())(jnp.ones(2))
      >>> dy.tolist()
      [1.0, 1.0]

    Source: Lillicrap et al. (2016), doi:10.1038/ncomms13276; Murray (2019) and Bellec et al. (2020) use it online.
    """
    if jnp.shape(kernel) != jnp.shape(weights):
        raise ValueError(
            f"`feedback(kernel=<{jnp.shape(kernel)}>, weights=<{jnp.shape(weights)}>)`: expected two of one shape."
        )
    back = y @ jax.lax.stop_gradient(weights)
    return jax.lax.stop_gradient(y) @ kernel + back - jax.lax.stop_gradient(back)
