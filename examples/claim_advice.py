"""The usual advice against vanishing gradients, tested: how does each piece change the gradient kept over 100 steps?

  forget bias     "initialise the forget bias to 1": torch.nn.LSTM has two biases, and the effective one is their sum;
                  the name of neither contains "forget"
  clipping        "clip the gradient norm at 0.25"
  c_0             "start from a small cell state such as 0.1"
  output gates    "keep output gates sparse": here by a bias that closes them

The networks are untrained, the inputs x ~ N(0, 1), the Jacobians exact, in float64.  The measure is the rms of
d s_T / d s_(T-k) of the whole state, before and after, compared with the product of the forget gates.  Clipping acts
on parameter gradients, so its measure is what step T-k adds to the gradient of a loss at step T, divided by what step
T adds.  c_0 acts on the first steps, so it is measured on those, without burn-in.  All numbers are medians over
--seeds draws of parameters and inputs.

  python examples/claim_advice.py
  python examples/claim_advice.py --seeds 20 --lags 200
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import _claims
import _options
import _run
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import rnncore
from rnncore import analysis, initializers

CLIP = 0.25
LOUD = 1e3  # factor that makes the loss steep enough for clipping to act
NOTHING = 0.05  # decades that do not count as a difference
Values = dict[str, float]
PYTORCH_NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


class Advice(NamedTuple):
    """One row of the audit.

    Fields:
      advice, setting: as text.
      measure: (options, seed) to log10 before and after, with any other results.
    """

    advice: str
    setting: str
    measure: Callable[[argparse.Namespace, int], Values]


def retained(args: argparse.Namespace, cell: Any, params: Any, xs: jax.Array, start: Any = None) -> Values:
    """log10 of the three kinds: over the first steps if a start is given, else over the last ones after the burn-in."""
    if start is None:
        run, anchor = _claims.run(cell, params, xs, args.burn_in), "end"
    else:
        run, anchor = analysis.trajectory(cell, params, xs[: args.lags], start), "start"
    paths = {"state": args.lags, "direct": args.lags, "cell": args.lags - 1}
    return {
        path: float(analysis.retention_curve(run, path=path, anchor=anchor, lags=(lag,)).log10[0])
        for path, lag in paths.items()
    }


def before_and_after(before: Values, after: Values) -> Values:
    """The two in one flat record."""
    named = [(f"{name}_before", value) for name, value in before.items()]
    return dict(named + [(f"{name}_after", value) for name, value in after.items()])


def data(args: argparse.Namespace, seed: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """(key of the parameters, inputs)."""
    key, draws = jax.random.split(jax.random.key(seed))
    return key, _claims.inputs(draws, args.burn_in + args.lags, args.inputs, scale)


def swap(args: argparse.Namespace, seed: int, one: _claims.Build, other: _claims.Build) -> Values:
    """One initialisation compared with another, from the same draw."""
    key, xs = data(args, seed, 1.0)
    before, after = (retained(args, *build(args.hidden, args.inputs, key), xs) for build in (one, other))
    return before_and_after(before, after)


def output_gate(args: argparse.Namespace, seed: int, build: _claims.Build, bias: float, scale: float) -> Values:
    """A bias on the output gates."""
    key, xs = data(args, seed, scale)
    cell, params = build(args.hidden, args.inputs, key)
    closed = params._replace(bias=params.bias.at[cell.gates.index("o")].add(bias))
    return before_and_after(retained(args, cell, params, xs), retained(args, cell, closed, xs))


def initial_cell(args: argparse.Namespace, seed: int, build: _claims.Build, value: float) -> Values:
    """c_0 = value instead of 0; h_0 = 0."""
    key, xs = data(args, seed, 1.0)
    cell, params = build(args.hidden, args.inputs, key)
    zero = cell.initial_carry((), _claims.FLOAT)
    start = zero._replace(c=jnp.full_like(zero.c, value))
    return before_and_after(retained(args, cell, params, xs, zero), retained(args, cell, params, xs, start))


def clipping(args: argparse.Namespace, seed: int, build: _claims.Build) -> Values:
    """What each step adds to the gradient, before and after optax has clipped it."""
    key, xs = data(args, seed, 1.0)
    cell, params = build(args.hidden, args.inputs, key)
    weights = jax.random.normal(jax.random.fold_in(key, 7), (args.hidden,), _claims.FLOAT)
    carry, _ = rnncore.unroll(cell, params, xs[: args.burn_in]) if args.burn_in else (None, None)

    def loss(carry: Any, outputs: jax.Array) -> jax.Array:
        return LOUD * outputs[-1] @ weights

    steps = analysis.gradients_over_time(loss, cell, params, xs[args.burn_in :], carry).parameters
    whole = jax.tree.map(lambda a: a.sum(0), steps)
    clip = optax.clip_by_global_norm(CLIP)
    clipped, _ = clip.update(whole, clip.init(whole))
    after = jax.tree.map(lambda a, b, c: a * jnp.where(b == 0, 1.0, c / b), steps, whole, clipped)

    def share(steps: Any) -> float:
        norms = jnp.sqrt(sum(jnp.square(a).reshape(len(a), -1).sum(-1) for a in jax.tree.leaves(steps)))
        return float(jnp.log10(norms[0] / norms[-1]))

    return {
        "state_before": share(steps), "state_after": share(after),
        "norm_before": norm(whole), "norm_after": norm(clipped),
    }  # fmt: skip


def norm(tree: Any) -> float:
    """Euclidean, over all leaves."""
    return math.sqrt(sum(float(jnp.vdot(a, a)) for a in jax.tree.leaves(tree)))


def audit() -> list[Advice]:
    """All rows."""
    torch = functools.partial(_claims.torch, "LSTM")
    big = _claims.orthogonal("LSTM", initializers.forget_bias(3.0))
    rows = [
        Advice("forget bias 1", "PyTorch default, the sum of both biases 1",
               functools.partial(swap, one=torch(), other=torch(1.0))),
        Advice("forget bias 1", "PyTorch default, both biases 1, sum 2",
               functools.partial(swap, one=torch(), other=torch(2.0))),
        Advice(f"clip at {CLIP}", "PyTorch default", functools.partial(clipping, build=torch())),
        Advice(f"clip at {CLIP}", "orthogonal, b_f = 3", functools.partial(clipping, build=big)),
    ]  # fmt: skip
    for value in (0.1, 1.0):
        for name, build in (("PyTorch default", torch()), ("orthogonal, b_f = 3", big)):
            rows.append(Advice(f"c_0 = {value:g}", name, functools.partial(initial_cell, build=build, value=value)))
    for bias in (-2.0, -6.0):
        for name, build, scale in (("PyTorch default", torch(), 1.0), ("orthogonal, b_f = 3, no input", big, 0.0)):
            rows.append(Advice(f"output bias {bias:+g}", name,
                               functools.partial(output_gate, build=build, bias=bias, scale=scale)))  # fmt: skip
    return rows


def work(args: argparse.Namespace, rows: list[Advice], results: dict[str, Any]) -> None:
    """One row after the other."""
    with tqdm(total=len(rows) * args.seeds, unit="run", dynamic_ncols=True) as bar:
        for row in rows:
            bar.set_description(f"{row.advice}: {row.setting}")
            drawn: dict[str, list[float]] = {}
            for seed in range(args.seeds):
                for key, value in row.measure(args, seed).items():
                    drawn.setdefault(key, []).append(value)
                bar.update()
            record: dict[str, Any] = {key: _claims.quartiles(values) for key, values in drawn.items()}
            changes = np.subtract(drawn["state_after"], drawn["state_before"])
            record |= {"advice": row.advice, "setting": row.setting, "change": _claims.quartiles(changes)}
            results["runs"][f"{row.advice}: {row.setting}"] = record


def effect(record: dict[str, Any]) -> str:
    """What a piece of advice does, as text."""
    change = record["change"][1]
    if abs(change) < NOTHING:
        return "no effect"
    return f"keeps {'more' if change > 0 else 'less'}: {change:+.1f} decades"


def middle(record: dict[str, Any], key: str) -> str:
    """A median as a power of ten, or "-" if there is none."""
    return _claims.exponent(record[key][1]) if key in record else "-"


def words(results: dict[str, Any]) -> str:
    """Table and verdicts."""
    runs, lags = results["runs"], results["settings"]["lags"]
    head = ["advice", "setting", "before", "after", "effect", "gates before", "gates after"]
    keys = ("direct_before", "direct_after")
    rows = [[r["advice"], r["setting"], middle(r, "state_before"), middle(r, "state_after"), effect(r),
             *(middle(r, key) for key in keys)] for r in runs.values()]  # fmt: skip
    lines = [f"share of the gradient left after {lags} steps, medians over {results['settings']['seeds']} seeds; "
             "gates: product of the forget gates", _claims.table(head, rows, left=2), "", "verdicts"]  # fmt: skip

    def of(begin: str) -> list[dict[str, Any]]:
        return [record for record in runs.values() if record["advice"].startswith(begin)]

    def told(records: list[dict[str, Any]]) -> str:
        return "; ".join(f"{r['advice']}, {r['setting']}: {effect(r)}" for r in records)

    if records := of("forget"):
        hit = [name for name in PYTORCH_NAMES if "forget" in name]
        works = all(record["change"][1] > NOTHING for record in records)
        outcome = "works; how well depends on the resulting bias" if works else "does not always work"
        lines.append(
            f"  forget bias: {outcome}. {told(records)}. A loop over the "
            f'parameters of torch.nn.LSTM whose name contains "forget" sets {len(hit)} of {len(PYTORCH_NAMES)} '
            f"({', '.join(PYTORCH_NAMES)})."
        )
    if records := of("clip"):
        norms = "; ".join(f"{r['norm_before'][1]:.3g} to {r['norm_after'][1]:.3g} ({r['setting']})" for r in records)
        change = max(abs(c) for r in records for c in r["change"])
        lines.append(
            f"  clipping: {'does not change' if change < NOTHING else 'changes'} retention. Gradient norms go from "
            f"{norms}; the shares of the steps change by {change:.1e} decades at most, because the whole gradient is "
            "scaled by one number."
        )
    if records := of("c_0"):
        lines.append(
            f"  c_0: {told(records)}. It scales one term of one step, c_0 times d f_1 / d h_0, and moves the states."
        )
    if records := of("output"):
        gaps = "; ".join(
            f"{r['advice']}, {r['setting']}: {r['cell_before'][1] - r['direct_before'][1]:+.1f} to "
            f"{r['cell_after'][1] - r['direct_after'][1]:+.1f}" for r in records
        )  # fmt: skip
        lines.append(
            f"  output gates: {told(records)}. Closing them removes the paths through h and leaves the forget "
            f"gates: d c_T / d c_k over the product of gates, in decades: {gaps}. So closed gates tame an "
            "exploding gradient, but shrink a vanishing one further."
        )
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> Any:
    """One row for each piece of advice, with an arrow from before to after."""
    runs = list(results["runs"].values())
    figure, (axis,) = _run.axes(1, (11, 1.9 + 0.42 * max(len(runs), 6)))
    names = [f"{path}_{when}" for path in ("state", "direct") for when in ("before", "after")]
    values = [record[name][1] for record in runs for name in names if name in record]
    values = [v for v in values if math.isfinite(v)]
    low, high = min(values), max(*values, 0.0)
    begin = None
    exact: dict[str, Any] = {"linestyle": "", "color": "#0072B2", "marker": "o"}
    gates: dict[str, Any] = {"linestyle": "", "color": "#D55E00", "marker": "v", "markerfacecolor": "none"}
    for row, record in enumerate(runs):
        if record["advice"].split()[0] != begin and row:
            axis.axhline(row - 0.5, color="#999999", linewidth=0.8)
        begin = record["advice"].split()[0]
        before, after = (record[f"state_{when}"][1] for when in ("before", "after"))
        if "direct_before" in record:
            for when, size in (("before", 5), ("after", 8)):
                axis.plot([record[f"direct_{when}"][1]], [row + 0.2], markersize=size, **gates)
        if abs(after - before) > 0.03 * (high - low):
            arrow = {"arrowstyle": "-|>", "color": "#0072B2", "shrinkA": 5, "shrinkB": 6, "linewidth": 1.5}
            axis.annotate("", (after, row - 0.1), (before, row - 0.1), arrowprops=arrow)
        axis.plot([before], [row - 0.1], markersize=9, markerfacecolor="white", **exact)
        axis.plot([after], [row - 0.1], markersize=5, **exact)
        axis.text(1.01, row, effect(record), transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    axis.axvline(0, color="#000000", linewidth=0.8)
    axis.set_yticks(range(len(runs)), [f"{r['advice']}: {r['setting']}" for r in runs])
    axis.set_ylim(len(runs) - 0.5, -0.6)
    axis.grid(False, axis="y")
    _claims.powers_axis(axis, low, high, which="x")
    axis.set_xlim(low - 1, high + 1)
    axis.set_xlabel(f"share of the gradient left after {results['settings']['lags']} steps (medians)")
    line = _run._picture.Line2D
    handles = [
        line([], [], markersize=9, markerfacecolor="white", label="before", **exact),
        line([], [], markersize=5, label="after", **exact),
        line([], [], markersize=5, label="product of forget gates before", **gates),
        line([], [], markersize=8, label="and after", **gates),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    note = ", interrupted" if results["interrupted"] else ""
    figure.suptitle(f"What the usual advice does to the gradient of an LSTM{note}", x=0.01, ha="left", fontsize=12)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = _claims.command(__doc__ or "", out="claim_advice", hidden=128, inputs=32, lags=100, seeds=5)
    parser.add_argument("--burn-in", type=_options.at_least(0), default=50, help="steps to run from a zero state first")

    def load(args: argparse.Namespace) -> list[Advice]:
        jax.config.update("jax_enable_x64", True)
        return audit()

    return _run.main(parser, argv, load, work, words, draw)


if __name__ == "__main__":
    sys.exit(main())
