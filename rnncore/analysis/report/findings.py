"""The findings of a report: sentences with their uncertainty, and warnings where a number means little."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np

from rnncore.analysis.report.measured import LayerReport, Spread
from rnncore.analysis.retention.curve import RetentionCurve

SATURATED = 0.5
"""A gate counts as saturated if at least this share of its values lies beyond its thresholds."""
EMPTY_BOUND = 3.0
"""A bound is called too loose if it lies at least this many decades above what it bounds."""


def findings(layers: Sequence[LayerReport]) -> list[str]:
    """Three to six sentences about all layers."""
    live = [one for one in layers if not one.cut_off]
    found = [f"No gradient of the loss reaches {_list([one.name for one in layers if one.cut_off])}."] * (
        len(live) < len(layers)
    )
    found += _reach(live) + _half_lives(live) + _left(live) + _forget_gates(live) + _bounds(live) + _exponents(live)
    return found[:6]


def _reach(layers: Sequence[LayerReport]) -> list[str]:
    known = [one for one in layers if one.reach is not None]
    if not known:
        return []
    first, *rest = known
    parts = [f"{first.reach} of {_lengths(first)} steps in {first.name}"]
    parts += [f"{one.reach} in {one.name}" for one in rest]
    return [f"90 % of the squared gradient of the loss reaches back {_list(parts)}{_over(first.reach)}."]


def _half_lives(layers: Sequence[LayerReport]) -> list[str]:
    losing = [one for one in layers if one.half_life and math.isfinite(one.half_life.median)]
    keeping = [one for one in layers if one.half_life and not math.isfinite(one.half_life.median)]
    found = []
    if losing:
        what = "the gradient that arrives at its last state"
        first, *rest = losing
        parts = [f"{first.name} loses half of {what} in {first.half_life} steps"]
        parts += [f"{one.name} in {one.half_life}" for one in rest]
        found.append(f"{_list(parts)}{_over(first.half_life)}.")
    for one in keeping:
        grows = one.rate is not None and one.rate.median < 0
        tail = f": it grows by {_power(-one.rate.median * one.steps / math.log(10))}" if grows and one.rate else ""
        found.append(f"{one.name} keeps more than half of the gradient over all {one.steps} steps{tail}.")
    return [" ".join(found)] if found else []


def _left(layers: Sequence[LayerReport]) -> list[str]:
    parts = [f"{_power(_last(one.retention))} in {one.name}" for one in layers if one.retention and one.steps > 1]
    longest = max((one.steps for one in layers), default=0)
    when = f"all steps (up to {longest})"
    if any(_lengths(one) != str(one.steps) for one in layers):
        when = f"as many steps as the shortest sequence has ({longest})"
    return [f"What is left of that gradient after {when}: {_list(parts)}."] if parts else []


def _forget_gates(layers: Sequence[LayerReport]) -> list[str]:
    parts = []
    for one in layers:
        if one.direct is None or one.rms is None:
            continue
        alone, exact = _last(one.direct), _last(one.rms)
        if abs(alone - exact) > 1:
            parts.append(f"{_power(alone)} in {one.name}, where the exact derivative keeps {_power(exact)}")
    return [f"The forget gates alone predict {_list(parts)}."] if parts else []


def _bounds(layers: Sequence[LayerReport]) -> list[str]:
    parts = []
    for one in layers:
        if one.bound is None or one.rms is None:
            continue
        bound, exact = _last(one.bound), _last(one.rms)
        if bound - exact > EMPTY_BOUND:
            parts.append(f"{_power(bound)} for {one.name}, which keeps {_power(exact)}")
    return [f"The upper bound, a product of norms, is {_list(parts)}: too loose to tell anything."] if parts else []


def _exponents(layers: Sequence[LayerReport]) -> list[str]:
    parts = []
    for one in layers:
        if one.exponents is None:
            continue
        leading = np.asarray(one.exponents.exponents, np.float64)[..., 0].reshape(-1)
        errors = np.asarray(one.exponents.standard_error, np.float64)[..., 0].reshape(-1)
        if not np.all(np.isfinite(leading)):
            continue
        spread = leading.std(ddof=1) / math.sqrt(len(leading)) if len(leading) > 1 else errors[0]
        error = f" ± {spread:.2g}" if math.isfinite(spread) else ""
        value = float(leading.mean())
        sure = math.isfinite(spread) and abs(value) > 2 * spread
        verb = "perturbations grow" if value > 0 else "perturbations decay"
        verb = verb if sure else "neither growth nor decay is certain"
        parts.append(f"{value:.3g}{error} per step in {one.name} ({verb})")
    return [f"The largest Lyapunov exponent is {_list(parts)}."] if parts else []


def warnings(layers: Sequence[LayerReport]) -> list[str]:
    """Where a number means little, by layer."""
    found = []
    for one in layers:
        found += [f"{one.name}: {text}" for text in _warnings_of(one)]
    return found


def _warnings_of(one: LayerReport) -> list[str]:
    layer, run, curve, found = one.layer, one.layer.run, one.retention, []
    dtype = jax.tree.leaves(run.carries)[0].dtype
    if layer.dtype in ("bfloat16", "float16"):
        found.append(f"the model runs it in {layer.dtype}; the analysis uses {dtype}, without that rounding.")
    if one.cut_off:
        return [*found, "it is cut off from the loss (stop_gradient, or outputs that are never used)."]
    if curve is not None and one.half_life is not None and not math.isfinite(one.half_life.median):
        found.append(f"the window of {one.steps} steps is too short for a half-life; run longer sequences.")
    elif one.half_life is not None and one.half_life.median > one.steps / 4:
        found.append(f"the window of {one.steps} steps covers fewer than four half-lives; run longer sequences.")
    if curve is not None and curve.kind == "rms" and layer.states is not None:
        found.append("no gradient arrives at its last state; its decay is that over all directions.")
    without = None if curve is None else curve.without_gradient
    if without is not None and (lost := int(np.sum(np.asarray(without)))):
        found.append(f"{lost} sequences have no gradient at their last state and are left out.")
    if dtype == np.float32 and layer.states is not None and curve is not None and _last(curve) < -37:
        found.append(
            f"{_power(_last(curve))} is left after {curve.lags[-1]} steps, below the range of float32: dL/ds_t "
            "underflows to 0 there, the curves do not; use float64 for both."
        )
    for name, gate in (one.gates or {}).items():
        share = float(gate.overall.left + gate.overall.right)
        if share > SATURATED:
            low, high = gate.thresholds
            found.append(
                f"the gate {name} is saturated: {share:.0%} of its values lie below {low:g} or above {high:g}."
            )
    if one.exponents is not None and (lost := int(np.sum(np.isneginf(np.asarray(one.exponents.exponents))))):
        count = np.size(one.exponents.exponents)
        found.append(f"{lost} of {count} exponents are -inf: the product of Jacobians is rank-deficient.")
    return found


def _last(curve: RetentionCurve) -> float:
    return float(curve.mean_log()[-1]) / math.log(10.0)


def _power(log10: float) -> str:
    """A factor in words: 43 %, 10^-7, 0."""
    if not math.isfinite(log10):
        return "0" if log10 < 0 else "infinity"
    if -2 < log10 <= 0:
        return f"{100 * 10**log10:.2g} %"
    return f"10^{log10:.1f}" if abs(log10) < 10 else f"10^{log10:.0f}"


def _over(spread: Spread | None) -> str:
    if spread is None or spread.sequences < 2:
        return ""
    return f" (medians over {spread.sequences} sequences, quartiles in parentheses)"


def _lengths(one: LayerReport) -> str:
    """The number of steps, or "24 to 150" if sequences differ."""
    lengths = one.layer.run.lengths
    longest = one.steps if lengths is None else int(np.max(np.asarray(lengths), initial=one.steps))
    return str(one.steps) if longest == one.steps else f"{one.steps} to {longest}"


def _list(parts: Sequence[str]) -> str:
    return ", ".join(parts)
