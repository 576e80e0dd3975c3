"""A monitor for training loops that measures every N steps where the gradients of the model go."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array, PyTree
from rnncore.analysis.dynamics.lyapunov import lyapunov_exponents
from rnncore.analysis.retention._chains import pull_back
from rnncore.analysis.run._alignment import chosen_lags
from rnncore.analysis.run.flat import state_size
from rnncore.analysis.run.gate_statistics import gate_statistics
from rnncore.analysis.run.trajectory import Trajectory, cell_trajectory
from rnncore.cells.base import Cell, PointwiseCell
from rnncore.layers.compose import unroll_stack
from rnncore.layers.stack import Stack, StackParams


class Monitor:
    """Records retention, gate saturation and leading Lyapunov exponents of a model in training as JSON lines.

    retention(k)^2 = mean over probes v of ||P_k^T v||^2 / n,  v ~ N(0, I),  which estimates ||P_k||_F^2 / n

    A record is {"step": ..., "layers": [{"name", "n", "log10_retention": {lag: number},
    "gates": {gate: {"mean", "left", "right"}}, "exponents": [...]}, ...]}.  Retention is the mean over
    sequences of log10 of `retention_curve` with its defaults, estimated without forming a matrix: with m
    probes and s sequences its error is about 0.3 / sqrt(m s) of a decade.  Exponents are the largest, per
    step, over the last three quarters of the steps.  -inf and NaN are written as null.

    Args:
      path: of the JSON lines file, which is created or continued.
      every: N, the training steps from one record to the next.
      lags: steps back, increasing, at most the length of the sequences.
      exponents: how many leading Lyapunov exponents; 0 for none.
      sequences: how many sequences to measure, the first of each batch.
      probes: m, the number of random directions for retention.
      key: for probes and frames; `jax.random.key(0)` by default, the same for every record.

    Attributes:
      records: all records, including those already in the file.

    Raises:
      ValueError: numbers below the least allowed, lags that do not increase.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, rnncore
      >>> from rnncore.analysis import Monitor
      >>> stack = rnncore.Stack(rnncore.LSTM(8, forget_bias=1.0), num_layers=2)
      >>> params, xs = stack.init(jax.random.key(0), 3), jnp.ones((4, 20, 3))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     monitor = Monitor(f"{folder}/gradients.jsonl", every=10, lags=(1, 5, 20))
      ...     for step in range(21):
      ...         _ = monitor(step, stack, params, xs)
      >>> [record["step"] for record in monitor.records]
      [0, 10, 20]

    Source: Hutchinson (1990) for the probes.  Loggers of other libraries record norms of parameter gradients, which
    sum over all lags.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        every: int = 100,
        lags: Sequence[int] = (1, 10, 30, 100),
        exponents: int = 2,
        sequences: int = 4,
        probes: int = 8,
        key: Array | None = None,
    ):
        for name, value, least in (
            ("every", every, 1), ("sequences", sequences, 1), ("probes", probes, 1), ("exponents", exponents, 0)
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"`Monitor({name}={value})`: expected at least {least}.")
        self.path = Path(path)
        self.every, self.lags, self.exponents = every, chosen_lags("Monitor", tuple(lags)), exponents
        self.sequences, self.probes = sequences, probes
        self.key = jax.random.key(0) if key is None else key
        self.records: list[dict[str, Any]] = read_records(self.path)

    def __call__(self, step: int, model: Cell | Stack, params: PyTree, xs: Array) -> dict[str, Any] | None:
        """Takes a record if one is due.

        A loop restarted from a checkpoint overwrites earlier records of this step and later ones.

        Args:
          step: of the training loop; a record is due if `every` divides it.
          model, params: a cell or a `rnncore.Stack` and its parameters, as `functional` returns them for linen and
            nnx modules.
          xs: inputs (B, T, D) of the model, of which the first `sequences` are used.

        Returns:
          The record, or None.

        Raises:
          ValueError: inputs that are not (B, T, D), or shorter than the largest lag.
        """
        if step % self.every:
            return None
        if jnp.ndim(xs) != 3 or xs.shape[1] < max(self.lags[-1], 1):
            raise ValueError(
                f"`Monitor(lags=..., {self.lags[-1]})(xs=<{jnp.shape(xs)}>)`: expected (B, T, D) with T of at least "
                "the largest lag."
            )
        stack = model if isinstance(model, Stack) else Stack(model)
        given = params if isinstance(params, StackParams) else StackParams(((params,),), None)
        settings = (self.lags, self.exponents, self.probes)
        measured = _measure(stack, settings, given, xs[: self.sequences], self.key)
        names = [name for row in stack.names for name in row]
        layers = [self._layer(name, found) for name, found in zip(names, measured, strict=True)]
        record = {"step": int(step), "layers": layers}
        if self.records and self.records[-1]["step"] >= step:
            self.records = [r for r in self.records if r["step"] < step]
            _write(self.path, self.records)
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return record

    def _layer(self, name: str, measured: dict[str, Any]) -> dict[str, Any]:
        logs = np.asarray(measured["retention"], np.float64) / math.log(10)
        return {
            "name": name,
            "n": int(measured["n"]),
            "log10_retention": {str(lag): _number(log) for lag, log in zip(self.lags, logs, strict=True)},
            "gates": {g: {k: _number(v) for k, v in s.items()} for g, s in measured["gates"].items()},
            "exponents": [_number(v) for v in np.atleast_1d(measured["exponents"])],
        }


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the records of a monitor's file, none if it does not exist.  A last line cut short by a crash is dropped.

    Args:
      path: of the file.

    Returns:
      A list of dicts, see `Monitor`.

    Raises:
      ValueError: a line other than the last that is not a record.

    Example:
      >>> from rnncore import analysis
      >>> analysis.read_records("no_such_file.jsonl")
      []
    """
    path = Path(path)
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"`read_records({str(path)!r})`: line {number} is not a JSON record.") from None
            _write(path, records)
    return records


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    """Replaces the whole file at once, so that a crash never leaves half of it."""
    beside = path.with_name(path.name + ".new")
    beside.write_text("".join(json.dumps(record) + "\n" for record in records))
    beside.replace(path)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(stack: Stack, settings: tuple, params: StackParams, xs: Array, key: Array) -> list[dict[str, Any]]:
    """Measures every cell of the stack over its own inputs, without dropout, in the order of the names."""
    found = []
    carries = stack.start(params, xs.shape[:1], jnp.promote_types(xs.dtype, jnp.float32))
    for level, (layer, starts) in enumerate(zip(params.layers, carries, strict=True)):
        for way, (own, start) in enumerate(zip(layer, starts, strict=True)):
            ordered = jnp.flip(xs, 1) if way else xs
            found.append(_layer(cell_trajectory(stack.cell, own, ordered, start), settings, key))
        if level + 1 < stack.num_layers:
            this = Stack(stack.cell, bidirectional=stack.bidirectional, merge=stack.merge)
            _, xs = unroll_stack(this, StackParams((layer,), None), xs, initial_carry=(starts,))
    return found


def _layer(run: Trajectory, settings: tuple, key: Array) -> dict[str, Any]:
    lags, exponents, probes = settings
    n = state_size(run)
    rows = jax.random.normal(key, (*run.batch_shape, probes, n), run.xs.dtype)

    def log_rms(block: Array, _: Any) -> Array:
        return 0.5 * jnp.log(jnp.mean(jnp.sum(block * block, -1), -1) / n)

    measured: dict[str, Any] = {"n": n, "retention": jnp.mean(pull_back(run, rows, lambda _: log_rms, None, lags), -1)}
    burn_in = run.steps // 4
    kept = min(exponents, n) if run.steps > burn_in else 0
    measured["exponents"] = jnp.zeros((0,), run.xs.dtype)
    if kept:
        measured["exponents"] = jnp.mean(lyapunov_exponents(run, kept, burn_in=burn_in, key=key).exponents, 0)
    measured["gates"] = {}
    if isinstance(run.cell, PointwiseCell):
        measured["gates"] = {
            gate: {"mean": s.overall.mean, "left": s.overall.left, "right": s.overall.right}
            for gate, s in gate_statistics(run).items()
        }
    return measured


def _number(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None
