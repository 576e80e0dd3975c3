"""Shared by the shorter examples: the command line, the training loop with its progress bar, and the output."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import _options
import _picture
import _report
import flax
import jax
import numpy as np
import optax
from tqdm import tqdm

import rnncore

# Colours of Okabe and Ito, each with its own line style, for colour-blind readers and grey prints.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": (0, (5, 2))},
    {"color": "#000000", "linestyle": (0, (1, 1.3))},
    {"color": "#009E73", "linestyle": (0, (6, 2, 1, 2))},
)
SHOW_OVER = 20  # roughly how many steps the loss in the progress bar is averaged over


def command(document: str, *, out: str, steps: int, batch: int, learning_rate: float) -> argparse.ArgumentParser:
    """The options that every example has, with defaults of its own."""
    parser = _options.bare(document)
    add = parser.add_argument
    add("--steps", type=_options.at_least(1), default=steps, help="training steps of each network")
    add("--batch", type=_options.at_least(1), default=batch, help="sequences in a training step")
    add("--learning-rate", type=_options.positive, default=learning_rate, help="of Adam, at the start")
    add("--seed", type=_options.at_least(0), default=0, help="of the initial parameters and of the batches")
    add("--out", metavar="PREFIX", default=out, help="writes PREFIX.json and PREFIX.png")
    return parser


def optimizer(args: argparse.Namespace) -> Any:
    """Adam with clipped gradients and a learning rate that falls to a twentieth along a cosine."""
    rate = optax.cosine_decay_schedule(args.learning_rate, args.steps, alpha=0.05)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def stepper(optimizer: Any, loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The compiled step ((params, moments), batch) -> ((params, moments), loss) of a loss (params, batch)."""

    @jax.jit
    def step(state: Any, batch: Any) -> Any:
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return step


def train(
    runs: dict[str, Any], name: str, steps: int, step: Callable[[Any, Any], tuple[Any, Any]], state: Any,
    batches: Iterable[Any], watch: Callable[[Any], dict[str, float]], every: int,
) -> Any:  # fmt: skip
    """Takes `steps` steps under a progress bar; `runs` always holds what has been measured so far.

    Args:
      runs: gets a record under `name`: "loss", one for each step; "seconds", the time of each step
        except the first, which compiles; a list of values under each name that `watch` reports;
        and the steps of these values under "watched".
      step: (state, batch) to (new state, loss).
      watch: state to measurements; called before the first step, every `every` steps, and after the last.

    Raises:
      FloatingPointError: the loss is no longer finite.
    """
    record: dict[str, Any] = {"loss": [], "seconds": [], "watched": []}
    shown = None

    def look(number: int) -> None:
        values = watch(state)
        record["watched"].append(number)
        for key, value in values.items():
            record.setdefault(key, []).append(value)

    look(0)
    runs[name] = record
    with tqdm(total=steps, desc=name, unit="step", dynamic_ncols=True) as bar:
        for number, batch in zip(range(1, steps + 1), batches, strict=False):
            begin = time.perf_counter()
            state, value = step(state, batch)
            loss = float(value)
            if number > 1:
                record["seconds"].append(time.perf_counter() - begin)
            if not math.isfinite(loss):
                raise FloatingPointError(f"{name} diverged at step {number}; try a smaller --learning-rate")
            record["loss"].append(loss)
            shown = loss if shown is None else shown + (loss - shown) / SHOW_OVER
            bar.set_postfix_str(f"loss {shown:.4f}", refresh=False)
            bar.update()
            # Skip a measurement that would come shortly before the last one.
            if number == steps or (number % every == 0 and number + every <= steps):
                look(number)
    return state


def main(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, load: Callable[[argparse.Namespace], Any],
    work: Callable[[argparse.Namespace, Any, dict[str, Any]], None], words: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any]], Any],
) -> int:  # fmt: skip
    """Does the work and writes the results, even if it is interrupted or fails.

    Args:
      load: options to data; a ValueError or OSError here is a user error, shown without a traceback.
      work: (options, data, results); adds what it measures to results["runs"].
      words, draw: results to the text for the terminal, and to the figure.

    Returns:
      The exit code: 0, 1 if the training diverged, 130 after Ctrl-C.
    """
    begin, args = time.perf_counter(), parser.parse_args(argv)
    data, picture = Path(f"{args.out}.json"), Path(f"{args.out}.png")
    packages = (jax, flax, optax, np, rnncore)
    results: dict[str, Any] = {
        "interrupted": False,
        "settings": vars(args),
        "versions": {"python": platform.python_version(), **{p.__name__: p.__version__ for p in packages}},
        "device": f"{jax.devices()[0].platform}, {os.cpu_count()} CPU cores",
        "runs": {},
    }
    try:
        loaded = load(args)
        data.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    code = 0
    try:
        work(args, loaded, results)
    except KeyboardInterrupt:
        results["interrupted"], code = True, 130
        print("\ninterrupted; writing what was measured so far")
    except FloatingPointError as error:
        code = 1
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
    if not results["runs"]:
        print("nothing was measured")
        return code
    results["elapsed_seconds"] = time.perf_counter() - begin
    _report.save(results, data)
    print(words(results))
    _picture.write(draw(results), picture)
    print(f"wrote {data} and {picture} after {results['elapsed_seconds']:.0f} s")
    return code


def axes(columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure with panels side by side, in the style of all examples."""
    figure, panels = _picture.plt.subplots(1, columns, figsize=size, squeeze=False, layout="constrained", **options)
    for panel in panels[0]:
        panel.grid(True, color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels[0]


def smooth(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Running mean over `window` values around each value, fewer at the ends."""
    sums, count = np.concatenate([[0.0], np.cumsum(values)]), len(values)
    # As many on the left as on the right, so that a slope is not biased to one side.
    reach = np.minimum(np.minimum(np.arange(count), np.arange(count)[::-1]), window // 2)
    start, end = np.arange(count) - reach, np.arange(count) + reach + 1
    return (sums[end] - sums[start]) / (end - start)
