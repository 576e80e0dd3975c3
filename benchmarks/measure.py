"""One case: every contender is built and checked, then all take turns.

A contender that is not installed, cannot do it, fails, answers wrongly or is not reached leaves a record
that says so.
"""

from __future__ import annotations

import concurrent.futures
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import bounds, records
from benchmarks.peers import Built, Case, Peer
from benchmarks.peers.problem import Problem, make_problem
from benchmarks.peers.reference import FORMS, reference
from rnncore._command import timing

log = logging.getLogger(__name__)
NOT_REACHED = "not reached within the budget"


class Plan(NamedTuple):
    """What is to be measured in a case.

    Fields:
      case: see `Case`.
      entries: (peer, contender) of those that can run it.
      measurements: of each of them.
      bounds: whether the bounds run beside them.
    """

    case: Case
    entries: tuple[tuple[Peer, str], ...]
    measurements: tuple[str, ...]
    bounds: bool


class Settings(NamedTuple):
    """Of a run.

    Fields:
      rounds, seconds: how often everything takes its turn, and about how long a turn is.
      deadline: of `time.monotonic`.
      threads: in which the programs of a case are built side by side; their `compile_seconds` are then None.
      reference: right answers, see `reference.reference`.
    """

    rounds: int
    seconds: float
    deadline: float = math.inf
    threads: int = 1
    reference: Callable[..., dict[str, Any]] = reference


Write = Callable[..., dict[str, Any]]
Tick = Callable[[int], Any]
Key = tuple[str, str]  # (contender or bound, measurement)


def run_case(plan: Plan, settings: Settings, write: Write, tick: Tick) -> list[dict[str, Any]]:
    """Measures a case and returns the records of times and bounds that it wrote.

    An interruption during the rounds leaves those that all had finished, and goes on upwards.
    """
    found: dict[Key, dict[str, Any]] = {}
    calls: dict[Key, Callable[[], Any]] = {}
    waits: dict[Key, timing.Wait] = {}
    answers = Answers(plan.case, settings.reference)
    for peer, contender, measurement, built in _build_all(plan, settings, answers, write):
        checked = None if built is None else _check(peer, contender, plan.case, measurement, answers, write, built)
        if checked is not None:
            key = (contender, measurement)
            calls[key], waits[key], found[key] = checked
            if settings.threads > 1:
                found[key]["compile_seconds"] = None
        tick(1)
    ready = {measurement for _, measurement in calls}
    for measurement in plan.measurements if plan.bounds else ():
        # Nothing to bound where no contender could run.
        for name, bound in bounds.bounds(plan.case, measurement).items() if measurement in ready else ():
            key = (name, measurement)
            found[key] = {"bound": name, "measurement": measurement, "gigaflop": bound.gigaflop}
            calls[key] = bound.call
            jax.block_until_ready(bound.call())
    gc.collect()
    return _take_turns(plan.case, found, calls, waits, settings, write, tick)


class Answers:
    """The problem of a case and what is right for it, made when first asked for; a failure is kept too."""

    def __init__(self, case: Case, reference: Callable[..., dict[str, Any]] = reference) -> None:
        self.case, self._reference = case, reference
        self._problem: Problem | None = None
        self._found: dict[str, dict[str, Any] | Exception] = {}

    def draw(self) -> None:
        """Makes the problem."""
        assert self.problem is not None

    @property
    def problem(self) -> Problem:
        if self._problem is None:
            self._problem = make_problem(self.case.workload, self.case.dtype, self.case.input_product)
        return self._problem

    def of(self, form: str, measurement: str) -> Any:
        """The reference of a measurement for an equation."""
        if form not in self._found:
            try:
                self._found[form] = self._reference(self.case.workload, self.problem, self.case.input_product, form)
            except Exception as failure:  # see _prepare
                self._found[form] = RuntimeError(f"no float64 reference: {type(failure).__name__}: {failure}")
        answer = self._found[form]
        if isinstance(answer, Exception):
            raise answer
        return answer[measurement]


def _missing(write: Write, case: Case, contender: str, measurement: str | None, reason: str) -> None:
    write(
        "missing", workload=case.workload.name, contender=contender, dtype=case.dtype, reason=reason,
        measurement=measurement, matmul_precision=case.precision, input_product=case.input_product,
    )  # fmt: skip


Building = concurrent.futures.Future[Built]


def _build_all(plan: Plan, settings: Settings, answers: Answers, write: Write) -> Iterator[tuple]:
    """(peer, contender, measurement, what is being built or None where a record says why not), in order.

    In one thread each is built when the one before has been checked.
    """
    answers.draw()  # before several threads ask for it
    pool = concurrent.futures.ThreadPoolExecutor(settings.threads)
    begun: list[tuple] = []
    try:
        for peer, contender in plan.entries:
            for measurement in plan.measurements:
                fault = NOT_REACHED if time.monotonic() > settings.deadline else peer.fault(contender, plan.case)
                if fault is not None:
                    _missing(write, plan.case, contender, measurement, fault)
                    begun.append((peer, contender, measurement, None))
                else:
                    made = pool.submit(_build, peer, contender, plan.case, answers, measurement)
                    begun.append((peer, contender, measurement, made))
                if settings.threads == 1:
                    yield begun.pop()
        yield from begun
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _build(peer: Peer, contender: str, case: Case, answers: Answers, measurement: str) -> Built:
    built = peer.build(contender, case, answers.problem, measurement)
    log.info("built: %s, %s", contender, measurement)
    return built


def _check(
    peer: Peer, contender: str, case: Case, measurement: str, answers: Answers, write: Write, building: Building
) -> tuple[Callable[[], Any], timing.Wait, dict[str, Any]] | None:
    """Checks and warms up: (call, wait, fields of its record); None where a record says why not."""
    form = peer.form(contender, case.workload.cell)
    # Whatever a library raises on a machine that nobody has seen before is a result, and the others go on.
    try:
        built = building.result()
        right = answers.of(form, measurement)
        error = timing.relative_error(built.result(), right)
        peak = built.peak(built.call)
        log.info("checked: %s, %s", contender, measurement)
    except Exception as failure:
        first = str(failure).strip().partition("\n")[0]
        _missing(write, case, contender, measurement, f"{type(failure).__name__}: {first[:300]}")
        return None
    if (wrong := records.wrong_answer(error, case)) is not None:
        _missing(write, case, contender, measurement, wrong)
        return None
    return built.call, built.wait, {
        "contender": contender, "library": peer.library, "version": peer.version(), "measurement": measurement,
        **built.figures, "device_peak_bytes": peak, "relative_error": error, "reference": FORMS[form].note,
        "algorithm": built.algorithm,
    }  # fmt: skip


def _take_turns(
    case: Case, found: dict[Key, dict[str, Any]], calls: dict[Key, Callable[[], Any]], waits: dict[Key, timing.Wait],
    settings: Settings, write: Write, tick: Tick,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rounds, and their records, also of the rounds before an interruption."""
    turns: dict[Key, dict[str, Any]] = {}
    shared, steps = records.case_fields(case), case.workload.steps
    written = []

    def after_round(number: int) -> None:
        # A run that is killed has at least these: a process that waits for a hung kernel hears no other end.
        for key, turn in turns.items() if number == 0 else ():
            record, ms = found[key], turn["ms"][0]
            if "bound" not in record:
                write("round", **shared, **record, ms=ms, us_per_step=ms * 1e3 / steps)

    try:
        timing.take_turns(
            calls, settings.rounds, settings.seconds, lambda: tick(1), waits=waits, turns=turns,
            deadline=settings.deadline, after_round=after_round,
        )  # fmt: skip
    finally:
        for key, turn in timing.complete_rounds(turns).items() if len(turns) == len(calls) else ():
            record, spread = found[key], timing.spread(turn["ms"])
            if "bound" in record:
                gigaflop = record.pop("gigaflop")
                rate = {} if gigaflop is None else {"gigaflops": gigaflop * 1e3 / spread["median_ms"]}
                own = {f: shared[f] for f in ("workload", "dtype", "matmul_precision", "input_product")}
                written.append(write("bound", **own, **record, **turn, **spread, **rate))
            else:
                step = {"us_per_step": spread["median_ms"] * 1e3 / steps}
                written.append(write("time", **shared, **record, **turn, **spread, **step))
    return written


def forget() -> None:
    """Lets the compiled programs and arrays of a workload go."""
    jax.clear_caches()
    gc.collect()


def plan_case(case: Case, entries: Sequence[tuple[Peer, str]], with_bounds: bool, quick: bool, write: Write) -> Plan:
    """The plan of a case; a contender that cannot run it leaves its record at once."""
    able = []
    for peer, contender in entries:
        if contender not in peer.contenders(case.workload.cell) or not peer.asked(contender, case.workload):
            continue  # The library has no such cell, this is one of its others, or it is asked elsewhere.
        reason = peer.why_not(contender, case)
        if reason is None and quick and peer.slow_to_build(contender):
            reason = "takes minutes to build: measured without --quick only"
        if reason is None:
            able.append((peer, contender))
        else:
            _missing(write, case, contender, None, reason)
    return Plan(case, tuple(able), case.workload.measurements, with_bounds)
