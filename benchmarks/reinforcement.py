"""Recurrent reinforcement learning: single steps, and an update of PPO beside the pattern that others use.

python -m benchmarks.reinforcement       into benchmarks/results/reinforcement/
python -m benchmarks.report              the tables of docs/reinforcement.md
"""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import flax.linen as flax_linen
import jax
import jax.numpy as jnp
import numpy as np
import optax

import rnncore
from benchmarks import options
from rnncore import linen
from rnncore._command import timing

sys.path.append(str(Path(__file__).parents[1] / "examples"))
ppo: Any = importlib.import_module("recurrent_ppo")


class ScannedRNN(flax_linen.Module):
    """Flax's GRU under nn.scan, with the reset inside of the step: what recurrent agents in JAX are made of."""

    hidden: int

    @functools.partial(
        flax_linen.scan, variable_broadcast="params", in_axes=0, out_axes=0, split_rngs={"params": False}
    )
    @flax_linen.compact
    def __call__(self, carry: Any, now: Any) -> Any:
        x, fresh = now
        carry = jnp.where(fresh[:, None], jnp.zeros_like(carry), carry)
        return flax_linen.GRUCell(self.hidden)(carry, x)


def scanned(hidden: int) -> Any:
    """The agent of the example with `ScannedRNN` in the place of the cell."""
    network = ScannedRNN(hidden)

    def carry(batch: int) -> jax.Array:
        return jnp.zeros((batch, hidden))

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key)
        now = jnp.zeros((1, 1, ppo.FEATURES)), jnp.zeros((1, 1), bool)
        return {"cell": network.init(keys[0], carry(1), now), "readouts": ppo.init_readouts(keys[1], hidden)}

    def replay(params: Any, carry: Any, xs: Any, fresh: Any) -> Any:
        carry, ys = network.apply(params["cell"], carry, (xs, fresh))
        return carry, ppo.readouts(params["readouts"], ys)

    def step(params: Any, carry: Any, x: Any, fresh: Any) -> Any:
        carry, out = replay(params, carry, x[None], fresh[None])
        return carry, jax.tree.map(lambda a: a[0], out)

    return ppo.Agent(init, step, replay, carry)


def updates(sizes: tuple[int, int, int], rounds: int, seconds: float) -> dict[str, Any]:
    """Whole updates, the gradient of one replay, and rollouts, for (environments, steps, units)."""
    batch, steps, hidden = sizes
    agents = {"ours": ppo.recurrent(rnncore.GRU(hidden)), "ScannedRNN": scanned(hidden)}
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3))
    row: dict[str, Any] = {"batch": batch, "steps": steps, "hidden": hidden}
    calls: dict[str, dict[str, Any]] = {"update": {}, "gradient": {}, "rollout": {}}
    for name, agent in agents.items():
        learner = ppo.first_learner(agent, optimizer, batch, 0)
        update = ppo.updater(agent, optimizer, steps, 10, 0)
        roll = jax.jit(functools.partial(ppo.roll, agent, steps=steps, corridor=10))
        start = learner.params, learner.maze, learner.carry, learner.key
        rollout = roll(*start)[2]
        ones = jnp.ones_like(rollout.values)
        gradient = jax.jit(jax.grad(functools.partial(ppo.loss_of, agent)))
        calls["update"][name] = functools.partial(update, learner, None)
        calls["gradient"][name] = functools.partial(gradient, learner.params, rollout.carry, rollout, ones, ones)
        calls["rollout"][name] = functools.partial(roll, *start)
    for what, own in calls.items():
        row |= ratio_of(what, own, "ScannedRNN", "ours", rounds, seconds)
    print(row, flush=True)
    return row


def ratio_of(what: str, calls: Any, reference: str, name: str, rounds: int, seconds: float) -> dict[str, float]:
    """Times of two, and the median over rounds of how much faster `name` is than the reference."""
    pair = {key: calls[key] for key in (reference, name)}
    for call in pair.values():
        jax.block_until_ready(call())
    turns = timing.take_turns(pair, rounds, seconds)
    found = {f"{what}_{key}_ms": float(np.median(turn["ms"])) for key, turn in turns.items()}
    ratios = np.array(turns[reference]["ms"]) / np.array(turns[name]["ms"])
    return found | {f"{what}_ratio": float(np.median(ratios))}


def by_hand(params: Any, h: jax.Array, x: jax.Array) -> jax.Array:
    """A GRU's step as one writes it for one network and no other."""
    size = h.shape[-1]
    z = x @ params.input_kernel.reshape(-1, 3 * size) + params.bias.reshape(-1)
    r = h @ params.recurrent_kernel.reshape(size, 3 * size)
    reset, update = jnp.split(jax.nn.sigmoid(z[..., : 2 * size] + r[..., : 2 * size]), 2, -1)
    n = jnp.tanh(z[..., 2 * size :] + reset * (r[..., 2 * size :] + params.recurrent_bias[0]))
    return (1 - update) * n + update * h


def single_steps(batch: int, hidden: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """1000 steps in a scan that nobody has made faster: cell.step, under jit, and under jit of vmap."""
    cell, layer, theirs = rnncore.GRU(hidden), linen.GRUCell(hidden), flax_linen.GRUCell(hidden)
    params = cell.init(jax.random.key(0), 16)
    xs = jax.random.normal(jax.random.key(1), (1000, batch, 16))
    h = jnp.zeros((batch, hidden))
    variables = theirs.init(jax.random.key(0), h, xs[0])
    functions: dict[str, Any] = {
        "by hand": (params, by_hand),
        "ours": (params, lambda p, h, x: cell.step(p, rnncore.HiddenCarry(h), cell.project(p, x))[0].h),
        "Flax's cell": (variables, lambda p, h, x: theirs.apply(p, h, x)[0]),
        "our linen cell": (variables, lambda p, h, x: layer.apply(p, h, x)[0]),
    }
    pairs = {"step": ("by hand", "ours"), "layer": ("Flax's cell", "our linen cell")}
    for names in pairs.values():
        theirs_first, ours_first = (functions[name][1](functions[name][0], h, xs[0]) for name in names)
        assert jnp.allclose(theirs_first, ours_first, atol=1e-6)
    rows = []
    for mapped in (False, True):
        calls = {}
        for name, (p, f) in functions.items():
            step = jax.vmap(f, (None, 0, 0)) if mapped else f
            run = jax.jit(lambda p, h, xs, step=step: jax.lax.scan(lambda h, x: (step(p, h, x), None), h, xs)[0])
            calls[name] = functools.partial(run, p, h, xs)
        row: dict[str, Any] = {"batch": batch, "hidden": hidden, "vmap": mapped}
        for what, names in pairs.items():
            row |= ratio_of(what, calls, *names, rounds, seconds)
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    args = options.parser("reinforcement", __doc__, rounds=11, out="JSON file").parse_args()
    turn = args.rounds, args.seconds
    results = {
        "jax": jax.__version__, "device": jax.devices()[0].device_kind,
        "steps": [row for sizes in ((1, 64), (64, 128)) for row in single_steps(*sizes, *turn)],
        "updates": [updates(sizes, *turn) for sizes in ((64, 64, 32), (64, 128, 128), (16, 128, 256))],
    }  # fmt: skip
    timing.write(args.out or options.RESULTS / "reinforcement" / f"{jax.default_backend()}.json", results)


if __name__ == "__main__":
    main()
