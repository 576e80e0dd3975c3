"""How much of a gradient an untrained cell keeps, and how long it takes to know, on the device that JAX has.

  python -m benchmarks.retention --out benchmarks/results/retention_cpu.json
  python -m benchmarks.report

Of every cell and initialisation the exact retention ||d s_T / d s_(T-k)||_F / sqrt n of the whole carry s, for every k
up to 100: the mean over a batch of sequences of its logarithm, and the decay rate, minus its slope per step.  Figures
are medians over five draws of parameters and normal inputs, in float32.  Seconds: all five curves, compiled before.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from benchmarks import objects
from rnncore import analysis, initializers
from rnncore._command import timing

LAGS = (1, 10, 100)
CRITICAL = initializers.critical_forget_bias()
CELLS: dict[str, dict[str, Any]] = {
    "Elman": {"Flax's initialisation": rnncore.Elman},
    "LSTM": {
        "Flax's initialisation": rnncore.LSTM,
        "forget bias 1": functools.partial(rnncore.LSTM, forget_bias=1.0),
        f"critical forget bias {CRITICAL:.2f}": functools.partial(rnncore.LSTM, forget_bias=CRITICAL),
        "chrono": functools.partial(
            rnncore.LSTM, bias_init=initializers.chrono(LAGS[-1], gates=rnncore.LSTM(1).gates, forget="f", input="i")
        ),
    },
    "GRU": {
        "Flax's initialisation": rnncore.GRU,
        "forget bias 1": functools.partial(rnncore.GRU, forget_bias=1.0),
        "chrono": functools.partial(
            rnncore.GRU, bias_init=initializers.chrono(LAGS[-1], gates=rnncore.GRU(1).gates, forget="z", input=None)
        ),
    },
    "MGU": {"Flax's initialisation": rnncore.MGU},
    "sLSTM": {"its own initialisation": rnncore.SLSTM},
}


@functools.partial(jax.jit, static_argnums=0)
def curves(cell: Any, params: Any, xs: Any) -> Any:
    """ln retention at lags 1 to 100, for a leading axis of draws."""

    def one(params: Any, xs: Any) -> Any:
        run = analysis.trajectory(cell, params, xs)
        return analysis.retention_curve(run, kind="rms", lags=range(1, LAGS[-1] + 1)).mean_log()

    return jax.vmap(one)(params, xs)


def measure(case: tuple[str, str], quick: bool) -> list[dict[str, Any]]:
    """The record of a cell at an initialisation."""
    batch, steps, features, hidden, draws = (2, 101, 3, 8, 2) if quick else (8, 120, 32, 128, 5)
    cell = CELLS[case[0]][case[1]](hidden)
    keys = jax.random.split(jax.random.key(0), (draws, 2))
    params = jax.vmap(lambda key: cell.init(key, features, jnp.float32))(keys[:, 0])
    xs = jax.vmap(lambda key: jax.random.normal(key, (batch, steps, features), jnp.float32))(keys[:, 1])
    logs = np.asarray(curves(cell, params, xs), np.float64)
    ms = timing.take_turns({"curves": lambda: curves(cell, params, xs)}, 3, 1e-9)["curves"]["ms"]
    tail = np.arange(LAGS[-1] // 5, LAGS[-1])
    slopes = [np.polyfit(tail, row[tail], 1)[0] if np.all(np.isfinite(row[tail])) else -math.inf for row in logs]

    def known(x: float) -> float | None:
        return float(f"{x:.4g}") if math.isfinite(x) else None

    return [{
        "cell": case[0], "initialisation": case[1], "shape_BTDH": [batch, steps, features, hidden], "draws": draws,
        "log10_retention": {str(k): known(float(np.median(logs[:, k - 1])) / math.log(10)) for k in LAGS},
        "decay_rate": known(-float(np.median(slopes))), "seconds": known(statistics.median(ms) / 1e3),
    }]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measures all; exit status 0, or 130 where it was interrupted."""
    args = objects.parser("retention", __doc__).parse_args(argv)
    cases = [(cell, name) for cell, names in CELLS.items() for name in names]
    return objects.run("retention", args, cases, lambda case: measure(case, args.quick))


if __name__ == "__main__":
    sys.exit(main())
