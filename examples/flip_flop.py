"""The 3-bit flip-flop: a network that remembers three signs, and the fixed points that store them.

    python examples/flip_flop.py                    # a few minutes on two CPU cores
    python examples/flip_flop.py --peer ~/fixed-point-finder    # also times that library; needs PyTorch

From time to time one of three inputs gives a pulse of +1 or -1.  Output i is the sign of the last pulse of input i.
Eight memories need eight stable fixed points.  Between them lie saddles, across which a pulse pushes the state.
"""

import argparse
import contextlib
import io
import itertools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import rnncore
from rnncore import analysis

parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("--steps", type=int, default=800, help="training steps")
parser.add_argument("--hidden", type=int, default=24, help="units of the GRU")
parser.add_argument("--length", type=int, default=60, help="steps of a sequence")
parser.add_argument("--peer", metavar="FOLDER", help="a clone of mattgolub/fixed-point-finder, to time as well")
parser.add_argument("--starts", type=int, default=512, help="random states from which to look for fixed points")


def sequences(rng: np.random.Generator, batch: int, length: int) -> tuple[jax.Array, jax.Array]:
    """(pulses, signs to remember), both (batch, length, 3)."""
    pulses = rng.choice([-1.0, 0.0, 1.0], (batch, length, 3), p=[0.05, 0.9, 0.05])
    pulses[:, 0] = rng.choice([-1.0, 1.0], (batch, 3))
    signs = pulses.copy()
    for t in range(1, length):
        signs[:, t] = np.where(pulses[:, t], pulses[:, t], signs[:, t - 1])
    return jnp.asarray(pulses, jnp.float32), jnp.asarray(signs, jnp.float32)


def train(options: argparse.Namespace) -> tuple[rnncore.GRU, rnncore.CellParams, jax.Array, float]:
    """(cell, its parameters, the readout (H, 3), the last loss)."""
    cell = rnncore.GRU(options.hidden)
    weights = (cell.init(jax.random.key(0), 3), 0.1 * jax.random.normal(jax.random.key(1), (options.hidden, 3)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    moments = optimizer.init(weights)

    @jax.jit
    def update(weights, moments, xs, signs):
        def loss(weights):
            _, hs = rnncore.unroll(cell, weights[0], xs)
            return jnp.mean((hs @ weights[1] - signs) ** 2)

        value, gradient = jax.value_and_grad(loss)(weights)
        updates, moments = optimizer.update(gradient, moments, weights)
        return optax.apply_updates(weights, updates), moments, value

    rng, value = np.random.default_rng(0), jnp.inf
    with tqdm(range(options.steps), desc="training", dynamic_ncols=True) as bar:
        for step in bar:
            weights, moments, value = update(weights, moments, *sequences(rng, 64, options.length))
            if step % 20 == 0:
                bar.set_postfix(loss=f"{value:.4f}")
    return cell, *weights, float(value)


def compare(folder: str, cell: rnncore.GRU, wide: rnncore.CellParams, starts: np.ndarray) -> None:
    """Times both libraries in turns, on the same network and starts; the other one in float32, at most 5000 Adam steps.

    Its default learning rate of 1 makes the states jump around; of 1, 0.1, 0.01 and 0.003, 0.1 left the smallest
    residuals.
    """
    import torch

    torch.set_num_threads(1)  # its steps are too small to share
    sys.path.insert(0, folder)
    from FixedPointFinderTorch import FixedPointFinderTorch  # type: ignore[import-not-found]

    theirs = torch.nn.GRU(3, cell.hidden_size, batch_first=True)
    state = rnncore.to_torch(rnncore.Stack(cell), rnncore.StackParams(((wide,),), None))
    theirs.load_state_dict({name: torch.tensor(np.asarray(a), dtype=torch.float32) for name, a in state.items()})
    seconds: dict[str, list[float]] = {"rnncore": [], "fixed-point-finder": []}
    found: Any = None
    for _ in range(3):
        begin = time.perf_counter()
        ours = analysis.fixed_points(cell, wide, jnp.zeros(3), starts)
        seconds["rnncore"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            finder = FixedPointFinderTorch(theirs, lr_init=0.1, verbose=False)
            found, _ = finder.find_fixed_points(starts.astype(np.float32), np.zeros((1, 3), np.float32))
        seconds["fixed-point-finder"].append(time.perf_counter() - begin)
        print(", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items()), flush=True)
    stable = int(np.sum(found.is_stable)) if found.is_stable is not None else 0
    residuals = np.sqrt(2 * np.quantile(found.qstar, (0.0, 0.5, 1.0)))
    print(f"rnncore {ours}, seconds in each round {np.round(seconds['rnncore'], 2)}, the first with compilation")
    print(
        f"fixed-point-finder: {found.n} points, {stable} stable, residuals {residuals[0]:.1e} to {residuals[2]:.1e}, "
        f"median {residuals[1]:.1e}, seconds {np.round(seconds['fixed-point-finder'], 2)}"
    )
    ratios = np.divide(seconds["fixed-point-finder"], seconds["rnncore"])
    print(f"rnncore takes 1/{np.median(ratios[1:]):.1f} of its time, 1/{ratios[0]:.1f} with compilation")


def main() -> None:
    options = parser.parse_args()
    cell, params, readout, loss = train(options)
    print(f"loss {loss:.5f}: mean squared error of the remembered signs, which are +1 and -1")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), params)
        rng = np.random.default_rng(1)
        xs, _ = sequences(rng, 32, options.length)
        run = analysis.trajectory(cell, wide, jnp.asarray(np.asarray(xs), jnp.float64))
        visited = np.asarray(run.carries.h).reshape(-1, options.hidden)
        # Start from visited states, and from halfway between two of them, where the saddles are.
        pairs = rng.integers(0, len(visited), (2, options.starts))
        starts = (visited[pairs[0]] + visited[pairs[1]] * rng.integers(0, 2, (options.starts, 1))) / 2
        starts += rng.normal(0, 0.05, starts.shape)
        starts = np.concatenate([visited[::7], starts])
        if options.peer:
            compare(options.peer, cell, wide, starts)
        found = analysis.fixed_points(cell, wide, jnp.zeros(3), starts)
        print(found)
        for i in range(len(found)):
            signs = np.asarray(found.states[i] @ np.asarray(readout)).round(2)
            kind = "stable" if found.stable[i] else f"{found.unstable_directions[i]} unstable directions"
            print(
                f"reads {signs}: {kind}, slowest direction {abs(found.time_constants[i, 0]):.1f} steps, "
                f"residual {found.residuals[i]:.0e}, from {found.counts[i]} starts"
            )
        memories = {tuple(np.sign(found.states[i] @ np.asarray(readout))) for i in np.flatnonzero(found.stable)}
        whole = memories == set(itertools.product((-1.0, 1.0), repeat=3))
        print("each of the eight memories has a stable point" if whole else f"{len(memories)} of eight memories found")


if __name__ == "__main__":
    main()
