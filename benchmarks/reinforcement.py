"""Recurrent reinforcement learning: single steps, and an update of PPO beside the pattern that others use.

python -m benchmarks.reinforcement       # into benchmarks/results/reinforcement/ and docs/reinforcement.md
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import flax.linen as flax_linen
import jax
import jax.numpy as jnp
import numpy as np
import optax

import rnncore
from benchmarks.parallel import write_table
from rnncore import linen
from rnncore._command import timing

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))
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


def updates(sizes: list[tuple[int, int, int]], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Whole updates, and the gradient of one replay, for (environments, steps, units)."""
    rows = []
    for batch, steps, hidden in sizes:
        agents = {"ours": ppo.recurrent(rnncore.GRU(hidden)), "ScannedRNN": scanned(hidden)}
        optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3))
        row: dict[str, Any] = {"batch": batch, "steps": steps, "hidden": hidden}
        whole, gradients, rollouts = {}, {}, {}
        for name, agent in agents.items():
            learner = ppo.first_learner(agent, optimizer, batch, 0)
            update = ppo.updater(agent, optimizer, steps, 10, 0)
            roll = jax.jit(functools.partial(ppo.roll, agent, steps=steps, corridor=10))
            _, _, rollout = roll(learner.params, learner.maze, learner.carry, learner.key)
            ones = jnp.ones_like(rollout.values)
            gradient = jax.jit(jax.grad(functools.partial(ppo.loss_of, agent)))
            whole[name] = functools.partial(update, learner, None)
            gradients[name] = functools.partial(gradient, learner.params, rollout.carry, rollout, ones, ones)
            rollouts[name] = functools.partial(roll, learner.params, learner.maze, learner.carry, learner.key)
        for what, calls in (("update", whole), ("gradient", gradients), ("rollout", rollouts)):
            row |= ratio_of(what, calls, "ScannedRNN", "ours", rounds, seconds)
        rows.append(row)
        print(row, flush=True)
    return rows


def ratio_of(what: str, calls: Any, reference: str, name: str, rounds: int, seconds: float) -> dict[str, float]:
    """Times, and the median over rounds of how much faster `name` is than the reference."""
    for call in calls.values():
        jax.block_until_ready(call())
    turns = timing.take_turns(calls, rounds, seconds)
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


def single_steps(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """1000 steps in a scan that nobody has made faster: cell.step, under jit, and under jit of vmap."""
    rows = []
    for batch, hidden in ((1, 64), (64, 128)):
        cell, layer, theirs = rnncore.GRU(hidden), linen.GRUCell(hidden), flax_linen.GRUCell(hidden)
        params = cell.init(jax.random.key(0), 16)
        xs = jax.random.normal(jax.random.key(1), (1000, batch, 16))
        h = jnp.zeros((batch, hidden))
        variables = theirs.init(jax.random.key(0), h, xs[0])
        functions: dict[str, Any] = {
            "by hand": (params, lambda p, h, x: by_hand(p, h, x)),
            "ours": (params, lambda p, h, x, cell=cell: cell.step(p, rnncore.HiddenCarry(h), cell.project(p, x))[0].h),
            "Flax's cell": (variables, lambda p, h, x, c=theirs: c.apply(p, h, x)[0]),
            "our linen cell": (variables, lambda p, h, x, c=layer: c.apply(p, h, x)[0]),
        }
        got = {name: f(p, h, xs[0]) for name, (p, f) in functions.items()}
        assert jnp.allclose(got["by hand"], got["ours"], atol=1e-6)
        assert jnp.allclose(got["Flax's cell"], got["our linen cell"], atol=1e-6)
        for mapped in (False, True):
            calls = {}
            for name, (p, f) in functions.items():
                step = jax.vmap(f, (None, 0, 0)) if mapped else f
                run = jax.jit(lambda p, h, xs, step=step: jax.lax.scan(lambda h, x: (step(p, h, x), None), h, xs)[0])
                calls[name] = functools.partial(run, p, h, xs)
            row: dict[str, Any] = {"batch": batch, "hidden": hidden, "vmap": mapped}
            pair = {name: calls[name] for name in ("by hand", "ours")}
            row |= ratio_of("step", pair, "by hand", "ours", rounds, seconds)
            pair = {name: calls[name] for name in ("Flax's cell", "our linen cell")}
            row |= ratio_of("layer", pair, "Flax's cell", "our linen cell", rounds, seconds)
            rows.append(row)
            print(row, flush=True)
    return rows


def table_of_updates(rows: list[dict[str, Any]]) -> str:
    head = "| environments, steps, units | whole update | gradient of one replay | rollout |"
    lines = [head, "|---|---|---|---|"]
    for r in rows:
        ratios = " | ".join(f"{r[f'{what}_ratio']:.2f}" for what in ("update", "gradient", "rollout"))
        lines.append(f"| {r['batch']}, {r['steps']}, {r['hidden']} | {ratios} |")
    return "\n".join(lines)


def table_of_steps(rows: list[dict[str, Any]]) -> str:
    lines = ["| batch, units | `cell.step` against one by hand | linen cell against Flax's |", "|---|---|---|"]
    for r in rows:
        how = f"{r['batch']}, {r['hidden']}" + (", vmap" if r["vmap"] else "")
        lines.append(f"| {how} | {r['step_ratio']:.2f} | {r['layer_ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds")
    parser.add_argument("--seconds", type=float, default=0.2, help="of one turn")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/reinforcement")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/reinforcement.md")
    options = parser.parse_args()
    results = {
        "jax": jax.__version__, "device": jax.devices()[0].device_kind,
        "steps": single_steps(options.rounds, options.seconds),
        "updates": updates([(64, 64, 32), (64, 128, 128), (16, 128, 256)], options.rounds, options.seconds),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{jax.default_backend()}.json").write_text(json.dumps(results, indent=1) + "\n")
    write_table("updates", table_of_updates(results["updates"]), options.docs)
    write_table("steps", table_of_steps(results["steps"]), options.docs)


if __name__ == "__main__":
    main()
