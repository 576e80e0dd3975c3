"""Proximal policy optimisation with a recurrent network, on a maze that cannot be solved without memory.

A T-maze: the first place of a corridor shows a sign, left or right.  At the far end, which looks the same
for both signs, the agent has to turn that way.  A policy without memory reaches the goal half of the time,
however long it is trained.

What a recurrent network adds to PPO, and what is easy to get wrong:

  * The reset belongs to the done of the step BEFORE: if an episode ended at step t - 1, the observation of
    step t is the first of the next one, and the carry is reset before it is read.
  * The carry at the start of a rollout is stored, and the replay starts from it.  A reset does not return to
    it, which is why there is a `reset_carry` besides `initial_carry`.
  * The value of the step after the last one needs the same carry and the same reset.
  * Minibatches are whole sequences: they are chosen among environments, not among steps.
  * While the parameters change, the stored carry becomes stale.  Burn-in runs the first steps of a rollout
    again with the current parameters, without gradients, and the loss begins where they end.

  python examples/recurrent_ppo.py
  python examples/recurrent_ppo.py --corridor 20 --steps 400
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import _options
import _run
import jax
import jax.numpy as jnp
import numpy as np
import optax

import rnncore

AHEAD, LEFT, RIGHT = range(3)  # actions
FEATURES = 3
GOAL, WRONG = 1.0, -0.1  # rewards; WRONG also for walking into a wall
DISCOUNT, TRACE, CLIP, ENTROPY, VALUE = 0.98, 0.95, 0.2, 0.01, 0.5
EPOCHS, MINIBATCHES = 4, 4


class Maze(NamedTuple):
    """The state of B environments.

    Fields:
      sign: LEFT or RIGHT, (B,).
      place: 0 at the sign, `corridor` at the junction.
      age: steps of this episode so far.
      fresh: whether the next observation is the first of an episode.
    """

    sign: Any
    place: Any
    age: Any
    fresh: Any


def start(key: jax.Array, batch: int) -> Maze:
    zeros = jnp.zeros(batch, jnp.int32)
    return Maze(jax.random.randint(key, (batch,), LEFT, RIGHT + 1), zeros, zeros, jnp.ones(batch, bool))


def observe(maze: Maze, corridor: int) -> jax.Array:
    """(B, 3): the sign as -1 or 1 where it is visible; whether in the corridor; whether at the junction."""
    junction = maze.place == corridor
    sign = jnp.where(maze.place == 0, 2 * (maze.sign == RIGHT) - 1, 0)
    return jnp.stack([sign, ~junction, junction], -1).astype(jnp.float32)


def move(maze: Maze, action: jax.Array, key: jax.Array, corridor: int) -> tuple[Maze, jax.Array, jax.Array]:
    """(the state of the next step, reward, done); an episode that is over starts again."""
    junction, turns = maze.place == corridor, action != AHEAD
    reward = jnp.where(junction & (action == maze.sign), GOAL, jnp.where(junction | turns, WRONG, 0.0))
    age = maze.age + 1
    done = (junction & turns) | (age >= 3 * corridor)
    walked = Maze(maze.sign, maze.place + (~junction & ~turns), age, done)
    anew = start(key, action.shape[0])
    return jax.tree.map(lambda a, b: jnp.where(done, a, b), anew, walked), reward, done


# ------------------------------------------------------------------------------------------ the agent


class Agent(NamedTuple):
    """A recurrent network with two readouts, one step at a time and over whole sequences.

    Fields:
      init: key -> parameters.
      step: (params, carry, x (B, D), fresh (B,)) -> (carry, (logits (B, 3), value (B,))).
      replay: (params, carry, xs (T, B, D), fresh (T, B)) -> (carry, (logits (T, B, 3), values (T, B))).
      carry: batch -> the initial carry.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    replay: Callable[..., Any]
    carry: Callable[..., Any]


def readouts(params: Any, ys: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = ys @ params["kernel"] + params["bias"]
    return out[..., :-1], out[..., -1]


def init_readouts(key: jax.Array, hidden: int) -> Any:
    """Small weights, so that the first policy is nearly uniform."""
    return {"kernel": 0.1 * jax.random.normal(key, (hidden, 4)) / hidden**0.5, "bias": jnp.zeros(4)}


def recurrent(cell: rnncore.Cell) -> Agent:
    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key)
        return {"cell": cell.init(keys[0], FEATURES), "readouts": init_readouts(keys[1], cell.hidden_size)}

    def step(params: Any, carry: Any, x: jax.Array, fresh: jax.Array) -> Any:
        carry = jax.tree.map(lambda s: jnp.where(fresh[:, None], 0, s), carry)
        carry, y = cell.step(params["cell"], carry, cell.project(params["cell"], x))
        return carry, readouts(params["readouts"], y)

    def replay(params: Any, carry: Any, xs: jax.Array, fresh: jax.Array) -> Any:
        carry, ys = rnncore.unroll(
            cell, params["cell"], xs, initial_carry=carry, resets=fresh, time_major=True,
            reset_carry=jax.tree.map(jnp.zeros_like, carry),
        )  # fmt: skip
        return carry, readouts(params["readouts"], ys)

    return Agent(init, step, replay, lambda batch: cell.initial_carry((batch,)))


def forgetful(agent: Agent) -> Agent:
    """The same network with its past cut off: every step is the first of an episode."""
    return agent._replace(
        step=lambda params, carry, x, fresh: agent.step(params, carry, x, jnp.ones_like(fresh)),
        replay=lambda params, carry, xs, fresh: agent.replay(params, carry, xs, jnp.ones_like(fresh)),
    )


# ----------------------------------------------------------------------------------------------- PPO


class Rollout(NamedTuple):
    """T steps of B environments, as (T, B, ...) arrays, and the carry that they started from.

    Fields:
      fresh: whether an observation is the first of an episode: the done of the step before.
    """

    carry: Any
    xs: Any
    fresh: Any
    actions: Any
    logs: Any
    values: Any
    rewards: Any
    dones: Any


class Learner(NamedTuple):
    """What one update passes to the next."""

    params: Any
    moments: Any
    maze: Maze
    carry: Any
    key: Any


def roll(agent: Agent, params: Any, maze: Maze, carry: Any, key: jax.Array, steps: int, corridor: int) -> Any:
    """(maze, carry, Rollout) after `steps` steps of the sampled policy."""

    def step(state: Any, key: jax.Array) -> Any:
        maze, carry = state
        x, keys = observe(maze, corridor), jax.random.split(key)
        carry, (logits, value) = agent.step(params, carry, x, maze.fresh)
        action = jax.random.categorical(keys[0], logits)
        log = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], -1)[:, 0]
        after, reward, done = move(maze, action, keys[1], corridor)
        return (after, carry), (x, maze.fresh, action, log, value, reward, done)

    (maze, after), seen = jax.lax.scan(step, (maze, carry), jax.random.split(key, steps))
    return maze, after, Rollout(carry, *seen)


def advantages(rollout: Rollout, bootstrap: jax.Array) -> jax.Array:
    """Generalised advantage estimates (T, B); nothing is carried across the end of an episode."""

    def step(later: Any, now: Any) -> Any:
        estimate, value_after = later
        value, reward, done = now
        goes_on = 1.0 - done
        error = reward + DISCOUNT * value_after * goes_on - value
        estimate = error + DISCOUNT * TRACE * goes_on * estimate
        return (estimate, value), estimate

    first = (jnp.zeros_like(bootstrap), bootstrap)
    return jax.lax.scan(step, first, (rollout.values, rollout.rewards, rollout.dones), reverse=True)[1]


def burned_in(agent: Agent, params: Any, rollout: Rollout, steps: int) -> Any:
    """The carry after the first steps of a rollout with the current parameters, as a constant."""
    if not steps:
        return rollout.carry
    carry, _ = agent.replay(params, rollout.carry, rollout.xs[:steps], rollout.fresh[:steps])
    return jax.lax.stop_gradient(carry)


def loss_of(agent: Agent, params: Any, carry: Any, rollout: Rollout, advantage: Any, target: Any) -> jax.Array:
    """The clipped objective, the squared error of the values, and the entropy."""
    _, (logits, values) = agent.replay(params, carry, rollout.xs, rollout.fresh)
    logs = jax.nn.log_softmax(logits)
    log = jnp.take_along_axis(logs, rollout.actions[..., None], -1)[..., 0]
    ratio = jnp.exp(log - rollout.logs)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)
    entropy = -jnp.sum(jnp.exp(logs) * logs, -1)
    return -gain.mean() + VALUE * jnp.square(values - target).mean() - ENTROPY * entropy.mean()


def updater(agent: Agent, optimizer: Any, steps: int, corridor: int, burn_in: int) -> Callable[..., Any]:
    """The compiled update (learner, _) -> (learner, mean loss): a rollout, then a few epochs over it."""

    def learn(state: Any, rollout: Rollout, advantage: Any, key: jax.Array) -> Any:
        batch, target = rollout.actions.shape[1], advantage + rollout.values

        def minibatch(state: Any, chosen: jax.Array) -> Any:
            params, moments = state
            carry = jax.tree.map(lambda a: a[chosen], rollout.carry)
            rows, some, goals = jax.tree.map(lambda a: a[:, chosen], (rollout[1:], advantage, target))
            now = Rollout(carry, *rows)
            begin = burned_in(agent, params, now, burn_in)
            later = jax.tree.map(lambda a: a[burn_in:], (now[1:], some, goals))
            rest = Rollout(begin, *later[0])
            value, gradient = jax.value_and_grad(lambda p: loss_of(agent, p, begin, rest, *later[1:]))(params)
            change, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, change), moments), value

        orders = jax.vmap(lambda k: jax.random.permutation(k, batch))(jax.random.split(key, EPOCHS))
        return jax.lax.scan(minibatch, state, orders.reshape(EPOCHS * MINIBATCHES, -1))

    @jax.jit
    def update(learner: Learner, _: Any) -> Any:
        key, *keys = jax.random.split(learner.key, 3)
        maze, carry, rollout = roll(agent, learner.params, learner.maze, learner.carry, keys[0], steps, corridor)
        _, (_, bootstrap) = agent.step(learner.params, carry, observe(maze, corridor), maze.fresh)
        state = (learner.params, learner.moments)
        (params, moments), losses = learn(state, rollout, advantages(rollout, bootstrap), keys[1])
        return Learner(params, moments, maze, carry, key), losses.mean()

    return update


def first_learner(agent: Agent, optimizer: Any, batch: int, seed: int) -> Learner:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = agent.init(keys[0])
    return Learner(params, optimizer.init(params), start(keys[1], batch), agent.carry(batch), keys[2])


# ------------------------------------------------------------------------------------------ the example


def success(agent: Agent, params: Any, corridor: int) -> jax.Array:
    """The share of episodes in which the sampled policy reaches the goal."""
    batch, steps = 256, 6 * corridor
    maze, carry = start(jax.random.key(7), batch), agent.carry(batch)
    _, _, rollout = roll(agent, params, maze, carry, jax.random.key(8), steps, corridor)
    return jnp.sum(rollout.rewards == GOAL) / jnp.maximum(jnp.sum(rollout.dones), 1)


def work(args: argparse.Namespace, _: None, results: dict[str, Any]) -> None:
    """Trains a GRU, then the same network with its past cut off."""
    agent = recurrent(rnncore.GRU(args.hidden))
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(args.learning_rate, eps=1e-5))
    for name, made in (("GRU", agent), ("GRU without its past", forgetful(agent))):
        measure = jax.jit(lambda params, made=made: success(made, params, args.corridor))

        def watch(learner: Learner, measure: Any = measure) -> dict[str, float]:
            return {"success": float(measure(learner.params))}

        update = updater(made, optimizer, args.rollout, args.corridor, args.burn_in)
        learner, every = first_learner(made, optimizer, args.batch, args.seed), max(args.steps // 20, 1)
        _run.train(results["runs"], name, args.steps, update, learner, itertools.repeat(None), watch, every)


def words(results: dict[str, Any]) -> str:
    """How often each reaches the goal."""
    settings = results["settings"]
    lines = [f"T-maze with a corridor of {settings['corridor']}; without memory half of the episodes reach the goal"]
    for name, run in results["runs"].items():
        taken = run["watched"][-1] * settings["batch"] * settings["rollout"]
        solved = [n for n, share in zip(run["watched"], run["success"], strict=True) if share >= 0.95]
        line = f"{name}: {run['success'][-1]:.1%} after {run['watched'][-1]} updates, {taken:,} steps"
        line += f"; above 95 % from update {solved[0]} on" if solved else ""
        lines.append(f"{line}; {sum(run['seconds']):.0f} s")
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> Any:
    """The share of episodes that end at the goal against the steps taken."""
    figure, (axis,) = _run.axes(1, (8, 5))
    settings = results["settings"]
    steps = settings["batch"] * settings["rollout"] / 1e6
    for style, (name, run) in zip(_run.STYLES, results["runs"].items(), strict=False):
        axis.plot(np.array(run["watched"]) * steps, run["success"], linewidth=1.8, **style, label=name)
    axis.axhline(0.5, color="#777777", linewidth=1, linestyle=(0, (1, 2)), label="the most without memory")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("environment steps, millions")
    axis.set_ylabel("share of episodes that end at the goal")
    axis.legend(frameon=False, loc="lower right")
    note = ", interrupted" if results["interrupted"] else ""
    title = f"Recurrent PPO on a T-maze with a corridor of {settings['corridor']}{note}"
    axis.set_title(title, loc="left", fontsize=12)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = _run.command(__doc__ or "", out="recurrent_ppo", steps=200, batch=64, learning_rate=1e-3)
    parser.add_argument("--hidden", type=_options.at_least(1), default=32, help="hidden units")
    parser.add_argument("--corridor", type=_options.at_least(1), default=10, help="places before the junction")
    parser.add_argument("--rollout", type=_options.at_least(2), default=64, help="steps per environment and update")
    parser.add_argument("--burn-in", type=_options.at_least(0), default=8, help="first steps of a rollout without loss")

    def load(args: argparse.Namespace) -> None:
        if args.burn_in >= args.rollout:
            raise ValueError(f"--burn-in {args.burn_in} leaves nothing of a rollout of {args.rollout} steps")
        if args.batch % MINIBATCHES:
            raise ValueError(f"--batch {args.batch} cannot be divided into {MINIBATCHES} equal minibatches")

    return _run.main(parser, argv, load, work, words, draw)


if __name__ == "__main__":
    sys.exit(main())
