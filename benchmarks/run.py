"""Measures recurrent layers of many libraries on the same problems, in turns, and checks every answer.

  python -m benchmarks.run --tag cpu                      five shapes on the CPU
  python -m benchmarks.run --tag gpu --quick              one NVIDIA GPU, offline, as far as eight minutes go
  python -m benchmarks.run --tag cpu --workloads S4 S5 --contenders "rnncore scan" torch

Every contender gets the same parameters and inputs, and its outputs and gradients are compared with a float64
reference; one that answers wrongly gets no time.  All contenders of a workload take turns, A B C A B C.
Records are appended to a file of JSON lines as they come; Ctrl-C keeps what was done.  Contenders:
`pip install -e ".[bench]"` brings Haiku and Equinox.  PyTorch is not among them, because it draws gigabytes: install
it yourself, on a CPU its CPU build.  What is not installed is named in the results as missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import bounds, measure, records, workloads
from benchmarks.peers import CONTENDERS, PEERS, Case, Peer
from benchmarks.peers.base import PRECISIONS
from benchmarks.workloads import HALF, MEASUREMENTS, WORKLOADS, Workload
from rnncore._command import timing

QUICK_BUDGET = 450.0
QUICK_GPU_CONTENDERS = tuple(
    name
    for name in CONTENDERS
    if name.startswith(("rnncore", "FlashRNN triton", "flax.linen OptimizedLSTMCell", "flax.linen GRUCell"))
    or name in ("torch", "flax.linen SimpleCell")
)
"""Of a short run on a GPU: what programs take to compile is most of its time."""


class Progress:
    """A bar on stderr, or a line for each case where stderr is no terminal."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit="turn", dynamic_ncols=True)

    def case(self, title: str) -> None:
        """A case begins."""
        if self._bar is not None:
            self._bar.set_description(title)
        else:
            print(title, file=sys.stderr, flush=True)

    def tick(self, turns: int) -> None:
        if self._bar is not None:
            self._bar.update(turns)

    def say(self, text: str) -> None:
        """Text on stdout that the bar does not run into."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def cases(chosen: Sequence[Workload], precisions: Sequence[str], platform: str, quick: bool) -> list[Case]:
    """Every type, precision and place of the input product of the workloads; half types have one precision.

    In a short run a second precision comes last, but for the first workload.
    """
    found = [
        Case(workload, dtype, precision, product, platform)
        for workload in chosen
        for dtype in workload.dtypes
        for precision in (("default",) if dtype in HALF else precisions)
        for product in workload.input_product
    ]

    def is_second(case: Case) -> bool:
        return case.dtype not in HALF and case.precision != precisions[0] and case.workload.name != chosen[0].name

    return sorted(found, key=is_second) if quick else found


@contextlib.contextmanager
def terminable(grace: float = 10.0) -> Iterator[None]:
    """Inside, SIGTERM is a KeyboardInterrupt; a process that has not heard it, or Ctrl-C, after `grace` seconds ends.

    Python answers a signal between two of its own operations, and a process that waits for a hung kernel comes to
    none: a second thread sees the signal too.
    """

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt("SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may set a handler.
        return
    done = threading.Event()
    listen, tell = socket.socketpair()
    tell.setblocking(False)
    before, before_wakeup = signal.signal(signal.SIGTERM, stop), signal.set_wakeup_fd(tell.fileno())

    def watch() -> None:
        while (heard := listen.recv(1)) and heard[0] not in (signal.SIGINT, signal.SIGTERM):
            pass
        if heard and not done.wait(grace):
            print(f"not at its end {grace:g} s after a signal: killed; the records are complete", file=sys.stderr)
            os._exit(130)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before_wakeup)
        signal.signal(signal.SIGTERM, before)
        tell.close()  # ends the watcher
        watcher.join()
        listen.close()


def parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n\n")
    names = "; a name that ends in * stands for all that begin so"
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=summary, epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add("--tag", choices=("cpu", "gpu", "quick"),
        help="which workloads, and on what; quick: the short run of what JAX runs on here (default: cpu)")  # fmt: skip
    add("--quick", action="store_true", help="the workloads of a short run, 5 rounds of shorter turns")
    add("--workloads", nargs="+", default=(), metavar="NAME", help=f"these, whatever their tags{names}; see --list")
    add("--contenders", nargs="+", default=(), metavar="NAME",
        help="these only; see --list (default: all, for a quick run on a GPU the fastest of each library)")  # fmt: skip
    add("--measurements", nargs="+", default=(), choices=MEASUREMENTS, help="these only")
    add("--dtypes", nargs="+", default=(), choices=("float32", *HALF), help="these only, of each workload's own")
    add("--precision", nargs="+", default=(), choices=tuple(PRECISIONS),
        help="of products of float32 numbers (default: float32, on a GPU float32 and tf32)")  # fmt: skip
    add("--input-product", choices=("inside", "given"),
        help="only with x W inside the measured call, or only with x W given (default: both)")  # fmt: skip
    add("--no-bounds", action="store_true", help="without the bounds that run beside the contenders")
    add("--threads", type=int, help="programs built side by side (default: 1, for a quick run on a GPU up to 12)")
    add("--rounds", type=int, help="rounds of all contenders in turn (default: 11, with --quick 5)")
    add("--seconds", type=float, help="time of one turn, roughly (default: 0.2, with --quick 0.05)")
    add("--budget", type=float, metavar="SECONDS", help="what is not reached by then is left out and named "
        f"(default: none, for a quick run on a GPU {QUICK_BUDGET:.0f})")  # fmt: skip
    add("--out", type=Path, metavar="FILE",
        help="JSON lines, appended (default: <tag>_<device>_jax<version>.jsonl where you are)")  # fmt: skip
    add("--record", action="store_true", help="append to the project's own results, benchmarks/results/")
    add("--list", action="store_true", help="names of workloads, of --tag where it is given, and of contenders")
    return made


def choose(args: argparse.Namespace, platform: str) -> list[Workload]:
    """The workloads of the run, cut to the measurements and types that were asked for.

    Raises:
      ValueError: unknown names, or nothing left to measure.
    """
    tag = args.tag if args.tag != "quick" else platform
    unknown = [name for name in args.contenders if name not in CONTENDERS]
    if unknown:
        raise ValueError(f"--contenders {', '.join(unknown)}: unknown; expected some of {', '.join(CONTENDERS)}")
    chosen = []
    for workload in workloads.select(tag, args.quick or args.tag == "quick", args.workloads):
        kept = [m for m in workload.measurements if m in (args.measurements or MEASUREMENTS)]
        dtypes = [d for d in workload.dtypes if d in (args.dtypes or workload.dtypes)]
        products = [p for p in workload.input_product if args.input_product in (None, "inside" if p else "given")]
        if kept and dtypes and products:
            chosen.append(
                dataclasses.replace(
                    workload, measurements=tuple(kept), dtypes=tuple(dtypes), input_product=tuple(products)
                )
            )
    if not chosen:
        raise ValueError("nothing is left to measure; see --list")
    return chosen


def list_names(tag: str | None, quick: bool) -> str:
    """What --list prints: of every workload, or of those with a tag."""
    lines = ["workloads:"]
    for w in WORKLOADS.values() if tag is None else workloads.select(tag, quick):
        tags = ", ".join(sorted(w.tags)) or "by name only"
        lines.append(
            f"  {w.name:18} {w.recurrence} {w.cell} (B, T, D, H) = {w.shape}, heads {w.heads}, layers {w.layers}, "
            f"{', '.join(w.dtypes)}; {tags}; {w.origin}"
        )
    return "\n".join([*lines, "contenders:", *(f"  {name}" for name in CONTENDERS)])


def main(argv: list[str] | None = None, reference: Any = None) -> int:
    """Runs the script; exit status 0, 130 where it was interrupted, 2 for what cannot be run.

    Args:
      argv: options; those of the command line.
      reference: where right answers come from, `benchmarks.peers.reference.reference` or one like it.
    """
    made = parser()
    args = made.parse_args(argv)
    if args.list:
        tag = jax.default_backend() if args.tag == "quick" else args.tag
        print(list_names(tag, args.quick or args.tag == "quick"))
        return 0
    args.tag = args.tag or "cpu"
    if args.tag == "cpu":
        # Has an effect where no device was asked for yet.
        jax.config.update("jax_platforms", "cpu")
    try:
        platform = jax.default_backend()
    except RuntimeError as error:
        made.error(f"JAX finds no device: {error}")
    if args.tag in ("cpu", "gpu") and platform != args.tag:
        devices = ", ".join(f"{d.platform}:{d.device_kind}" for d in jax.devices())
        hint = 'install jax with CUDA, as by `pip install "jax[cuda13]"`, or use --tag cpu'
        made.error(f"--tag {args.tag}: JAX {jax.__version__} runs on {platform} here ({devices}); {hint}")
    args.quick = args.quick or args.tag == "quick"
    args.contenders = args.contenders or (QUICK_GPU_CONTENDERS if args.quick and platform == "gpu" else CONTENDERS)
    args.rounds = (5 if args.quick else 11) if args.rounds is None else args.rounds
    args.seconds = (0.05 if args.quick else 0.2) if args.seconds is None else args.seconds
    if args.rounds < 1 or not args.seconds > 0:
        made.error(f"--rounds {args.rounds} --seconds {args.seconds}: expected at least 1 round of more than 0 s")
    if args.budget is None and args.quick and platform == "gpu":
        args.budget = QUICK_BUDGET
    if args.budget is not None and not args.budget > 0:
        made.error(f"--budget {args.budget}: expected more than 0 s")
    args.precision = args.precision or (("float32", "tf32") if platform == "gpu" else ("float32",))
    try:
        chosen = choose(args, platform)
    except ValueError as error:
        made.error(str(error))
    if args.threads is None:
        args.threads = min(12, timing.cores()) if args.quick and platform == "gpu" else 1
    if args.threads < 1:
        made.error(f"--threads {args.threads}: expected at least 1")
    deadline = float("inf") if args.budget is None else time.monotonic() + args.budget
    answers = measure.reference if reference is None else reference
    settings = measure.Settings(args.rounds, args.seconds, deadline, args.threads, answers)
    told = {name: getattr(args, name) for name in ("tag", "quick", "rounds", "seconds", "budget", "precision")}
    writer = records.Writer(args.out or records.default_path(args.tag, args.record))
    interrupted, reason = False, None
    with terminable():
        try:
            where = records.machine()
            writer(
                "run", argv=records.asked(argv), started=records.now(), machine=where,
                commit=where["commit"], **told,
            )  # fmt: skip
            reason = run_all(cases(chosen, args.precision, platform, args.quick), args, settings, writer)
        except KeyboardInterrupt as stop:
            interrupted, reason = True, str(stop) or "Ctrl-C"
        writer("end", finished=records.now(), interrupted=interrupted, reason=reason)
    writer.close()
    print(f"records: {os.path.relpath(writer.path)}")
    if interrupted:
        print("interrupted; the records above are complete", file=sys.stderr)
    return 130 if interrupted else 0


def run_all(todo: Sequence[Case], args: argparse.Namespace, settings: measure.Settings, write: Any) -> str | None:
    """Every case; returns a reason if the budget cut the run."""
    entries = present(todo, args.contenders, write)
    if not args.no_bounds:
        copy = bounds.copy_bandwidth(args.rounds, args.quick)
        write("bound", workload=None, bound="copy bandwidth", dtype="float32", measurement="copy", **copy)
    plans = []
    for case in todo:
        # Where x W is left out too, the bounds stand beside the variant with it.
        with_bounds = case.input_product == case.workload.input_product[0] and not args.no_bounds
        plans.append(measure.plan_case(case, entries, with_bounds, args.quick, write))
    progress = Progress(sum(len(p.entries) * len(p.measurements) * (1 + settings.rounds) for p in plans))
    cut = False

    def write_and_tell(kind: str, **fields: Any) -> dict[str, Any]:
        if kind == "missing":
            progress.say(f"missing: {fields['contender']}, {fields['measurement']}: {fields['reason']}")
        return write(kind, **fields)

    try:
        for n, plan in enumerate(plans):
            progress.case(plan.case.title)
            written = measure.run_case(plan, settings, write_and_tell, progress.tick)
            cut = cut or time.monotonic() > settings.deadline
            if written:
                told = [[r for r in written if r["record"] == kind] for kind in ("time", "bound")]
                progress.say(f"\n{plan.case.title}\n{records.summary(*told)}")
            if n + 1 == len(plans) or plans[n + 1].case.workload != plan.case.workload:
                measure.forget()
    finally:
        progress.close()
    return f"the budget of {args.budget:g} s was used up" if cut else None


def present(todo: Sequence[Case], wanted: Sequence[str], write: Any) -> list[tuple[Peer, str]]:
    """(peer, contender) of those wanted that can run here; the others leave their record."""
    entries = []
    cells = dict.fromkeys(case.workload.cell for case in todo)
    for peer in PEERS:
        for contender in dict.fromkeys(c for cell in cells for c in peer.contenders(cell) if c in wanted):
            if (why := peer.absent(contender, todo[0].platform)) is None:
                entries.append((peer, contender))
            else:
                write("missing", workload=None, contender=contender, dtype=None, reason=why)
    return entries


if __name__ == "__main__":
    sys.exit(main())
