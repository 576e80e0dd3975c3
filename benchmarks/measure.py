"""One case: every contender is built and checked, then all take turns.

A contender that is not installed, cannot run the case, fails, gives a wrong answer or is not reached leaves a record
that says so.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import bounds
from benchmarks.peers import PEERS, Case, Peer
from benchmarks.peers.problem import make_problem, reference
from benchmarks.workloads import MEASUREMENTS
from rnncore._command import timing

log = logging.getLogger(__name__)
NOT_REACHED = "not reached within the budget"
# Above these a result is a wrong answer, by the kind of arithmetic; rounding alone stays far below.
LARGEST_ERROR = {"float32": 1e-3, "tf32": 0.1, "default": 0.1, "float16": 0.1, "bfloat16": 0.5}


class Settings(NamedTuple):
    """Of a run.

    Fields:
      rounds, seconds: how often all contenders take their turn, and about how long a turn is.
      deadline: of `time.monotonic`.
      threads: in which the programs of a case are built side by side; their `compile_seconds` are then None.
      with_products: whether the products alone run beside the contenders.
      reference: right answers, see `reference.reference`.
    """

    rounds: int
    seconds: float
    deadline: float = math.inf
    threads: int = 1
    with_products: bool = True
    reference: Callable[..., dict[str, Any]] = reference


Write = Callable[..., dict[str, Any]]
Entry = tuple[Peer, str]
Key = tuple[str, str]  # (contender or bound, measurement)


def present(cases: Sequence[Case], wanted: Sequence[str], write: Write) -> list[Entry]:
    """(peer, contender) of those wanted that can run on this machine; the others leave a record."""
    entries = []
    cells = dict.fromkeys(case.workload.cell for case in cases)
    for peer in PEERS:
        for contender in dict.fromkeys(c for cell in cells for c in peer.contenders(cell) if c in wanted):
            if (why := peer.absent(contender, cases[0].platform)) is None:
                entries.append((peer, contender))
            else:
                write("missing", workload=None, contender=contender, dtype=None, reason=why)
    return entries


def run_case(case: Case, entries: Sequence[Entry], settings: Settings, write: Write) -> list[dict[str, Any]]:
    """Measures a case and returns the records of times and bounds that it wrote.

    An interruption during the rounds keeps those that all contenders had finished, and is raised again.
    """
    w = case.workload
    about = {
        "workload": w.name, "dtype": case.dtype, "matmul_precision": case.precision,
        "input_product": case.input_product,
    }  # fmt: skip
    shape = {"cell": w.cell, "B": w.batch, "T": w.steps, "D": w.features, "H": w.hidden, "heads": w.heads}

    def missing(contender: str, measurement: str | None, reason: str) -> None:
        write("missing", **about, contender=contender, measurement=measurement, reason=reason)

    able = []
    for peer, contender in entries:
        if contender in peer.contenders(w.cell) and peer.asked(contender, w):
            if (reason := peer.why_not(contender, case)) is None:
                able.append((peer, contender))
            else:
                missing(contender, None, reason)
    found: dict[Key, dict[str, Any]] = {}
    calls: dict[Key, Callable[[], Any]] = {}
    waits: dict[Key, timing.Wait] = {}
    problem = make_problem(w, case.dtype, case.input_product)
    with _builder(settings.threads) as begin:
        jobs = [
            (peer, contender, m, begin(functools.partial(peer.build, contender, case, problem, m)))
            for peer, contender in able
            for m in MEASUREMENTS
        ]
        right: Any = None
        for peer, contender, measurement, build in jobs:
            if time.monotonic() > settings.deadline:
                missing(contender, measurement, NOT_REACHED)
                continue
            # Whatever a library raises on a machine that is new to it is a result, and the others go on.
            try:
                built = build()
                log.info("built: %s, %s", contender, measurement)
                if right is None:
                    right = _reference(case, problem, settings)
                error = timing.relative_error(built.result(), right[measurement])
                built.wait(built.call())
            except Exception as failure:
                first = str(failure).strip().partition("\n")[0]
                missing(contender, measurement, f"{type(failure).__name__}: {first[:300]}")
                continue
            limit = LARGEST_ERROR[case.precision if case.dtype == "float32" else case.dtype]
            if not error <= limit:
                told = f"relative error {error:.1e} against float64, at most {limit:.0e} is rounding"
                missing(contender, measurement, f"a wrong answer: {told}")
                continue
            key = (contender, measurement)
            calls[key], waits[key] = built.call, built.wait
            found[key] = {
                **about, **shape, "contender": contender, "library": peer.library, "version": peer.version(),
                "measurement": measurement, **built.figures, "relative_error": error, "algorithm": built.algorithm,
            }  # fmt: skip
            if settings.threads > 1:
                found[key]["compile_seconds"] = None
    for measurement in dict.fromkeys(m for _, m in calls) if settings.with_products else ():
        key = ("products", measurement)
        calls[key] = bounds.products(case, measurement)
        found[key] = {**about, "bound": "products", "measurement": measurement}
        jax.block_until_ready(calls[key]())
    gc.collect()
    return _take_turns(found, calls, waits, settings, write)


@contextlib.contextmanager
def _builder(threads: int) -> Iterator[Callable[..., Callable[[], Any]]]:
    """A function that begins a build and returns one that gives its result."""
    if threads == 1:
        yield lambda build: build
        return
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        yield lambda build: pool.submit(build).result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _reference(case: Case, problem: Any, settings: Settings) -> dict[str, Any]:
    try:
        return settings.reference(case.workload, problem, case.input_product)
    except Exception as failure:
        raise RuntimeError(f"no float64 reference: {type(failure).__name__}: {failure}") from failure


def _take_turns(
    found: dict[Key, dict[str, Any]], calls: dict[Key, Callable[[], Any]], waits: dict[Key, timing.Wait],
    settings: Settings, write: Write,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rounds, and their records, also of the rounds before an interruption."""
    turns: dict[Key, dict[str, Any]] = {}
    written = []

    def after_round(number: int) -> None:
        # A run that is killed keeps at least these: a process that waits for a hung kernel handles no other end.
        for key, turn in turns.items() if number == 0 else ():
            if "bound" not in found[key]:
                write("round", **found[key], ms=turn["ms"][0])

    try:
        timing.take_turns(
            calls, settings.rounds, settings.seconds, waits=waits, turns=turns, deadline=settings.deadline,
            after_round=after_round,
        )  # fmt: skip
    finally:
        for key, turn in turns.items():
            if not turn["ms"]:
                continue
            record = found[key] | turn | timing.spread(turn["ms"])
            if "bound" in record:
                written.append(write("bound", **record))
            else:
                written.append(write("time", **record, us_per_step=record["median_ms"] * 1e3 / record["T"]))
    return written
