"""Everything that a GPU can tell about rnncore, in one command, each part in a process of its own.

  python -m benchmarks.gpu_check                       eight minutes; from the root of the checkout
  python -m benchmarks.gpu_check --parts checks,times --seconds 300
  python -m benchmarks.gpu_check --dry                 the same parts on a CPU, tiny; what needs a GPU says so

environment: the GPU and versions.  checks: every backend with loops of its own against float64, by kind of kernel.
graph: the loop as a CUDA graph, five calls.  times: rows of the benchmark against torch and Flax, alone on the card.
programs: what a step of the scan launches.
gradients: the analysis against the CPU's numbers and times.  job: examples/gradient_retention.py.
sanitizer: NVIDIA's compute-sanitizer over small runs.  The last two are left out of a dry run.

A part that hangs or aborts is killed and costs its own time only.  Records are appended to DIR/checks.jsonl and
DIR/times.jsonl as they come, and every part has a log, DIR/log_*.txt; the table at the end is made from the records, so
that a run cut short at any second keeps what it found: `--table` prints it again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from benchmarks import options
from benchmarks.gpu_check import checks, processes, results, sanitizer, times, toolkit
from benchmarks.gpu_check.processes import LOGS, RECORDS, TIMES, Runner
from benchmarks.gpu_check.table import table

PARTS = ("environment", "checks", "graph", "times", "programs", "gradients", "job", "sanitizer")
LATER = {"programs": 20, "gradients": 75, "job": 90, "sanitizer": 75}
"""Parts behind the times, and the seconds that are kept for each."""
JOB = ("examples/gradient_retention.py", "--steps", "400")
WORKERS = {
    "environment": ("parts", "environment"), "graph": ("parts", "graph"), "programs": ("parts", "programs"),
    "check": ("checks", "worker"), "one": ("checks", "one"), "times": ("times", "worker"),
    "gradients": ("gradients", "worker"), "check references": ("checks", "references"),
    "time references": ("times", "references"),
}  # fmt: skip
"""Module and function of a part; those that the driver does not need are not imported there, nor is JAX."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; exit status 0, also where parts failed, and 130 where it was interrupted."""
    made = parser()
    args = made.parse_args(argv)
    if args.part:
        processes.die_with_parent()
        if args.part.endswith("references"):
            processes.step_aside()
        module, name = WORKERS[args.part]
        getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), name)(args.dry, **json.loads(args.given))
        return 0
    args.out = args.out.resolve()
    if args.table or args.results:
        print(table(args.out))
        if args.results:
            print(f"{results.as_one_run(args.out, args.results)} times appended to {os.path.relpath(args.results)}")
        return 0
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        made.error(f"--parts {','.join(sorted(unknown))}: unknown; expected some of {','.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for path in (args.out / RECORDS, args.out / TIMES, *args.out.glob(LOGS)):
        path.unlink(missing_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    home = toolkit.home()
    if not args.dry:
        toolkit.link(home)
    # Several processes share the card: none may take all of its memory at once.
    environment = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "1",
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]),
        **({"JAX_PLATFORMS": "cpu"} if args.dry else toolkit.environment(home)),
    }  # fmt: skip
    runner = Runner(args.out, work, args.seconds, environment, ["--dry"] if args.dry else [])
    runner.write("driver", seconds=args.seconds, dry=args.dry, toolkit=None if home is None else str(home))
    if home is None and not args.dry:
        print(
            f"no CUDA toolkit found ({toolkit.LIBDEVICE} under CUDA_ROOT, CUDA_HOME, nvcc's folder, {toolkit.USUAL}): "
            "kernels of Mosaic GPU need it; set CUDA_ROOT to its folder",
            flush=True,
        )
    status = 0
    try:
        with options.terminable():
            drive(runner, args)
    except KeyboardInterrupt:
        status = 130
        print("interrupted; the records so far:", flush=True)
    finally:
        runner.kill_all()
        shutil.rmtree(work, ignore_errors=True)
        print(table(args.out))
        print(f"{runner.passed():.0f} s; records in {os.path.relpath(args.out)}", flush=True)
    return status


def parser() -> argparse.ArgumentParser:
    made = options.parser("gpu_check", __doc__)
    add = made.add_argument
    add("--out", type=Path, default=Path("gpu_check"), metavar="DIR", help="folder of the records (default: gpu_check)")
    add("--seconds", type=options.duration, default=480, help="for everything (default: 480)")
    add("--parts", type=lambda text: text.split(","), default=PARTS, help=f"these only (default: {','.join(PARTS)})")
    add("--dry", action="store_true", help="on a CPU, tiny")
    add("--table", action="store_true", help="the table of the records in DIR, and nothing else")
    add("--results", type=Path, metavar="FILE",
        help="appends the times in DIR to a file of results, as one run, and nothing else")  # fmt: skip
    add("--part", help=argparse.SUPPRESS)
    add("--given", default="{}", help=argparse.SUPPRESS)
    return made


def drive(runner: Runner, args: argparse.Namespace) -> None:
    """The parts in order: correctness side by side, then times, alone on the card."""
    background = [
        runner.start(f"{name} references", environment={"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""})
        for name in ("check", "time")
        if f"{name}s" in args.parts
    ]
    beside = [name for name in ("environment", "graph") if name in args.parts]
    limits = {"limit": 120, "stall": 90}
    threads = [threading.Thread(target=runner.run, args=(name,), kwargs=limits, daemon=True) for name in beside]
    for thread in threads:
        thread.start()
    if "checks" in args.parts:
        checks.drive(runner, checks.backends(), min(200, 0.45 * args.seconds), 1 if args.dry else checks.SHARES)
    for thread in threads:
        thread.join()
    if "times" in args.parts:
        dropped = {f"rnncore {name}" for name in checks.hung(runner) - {"mosaic_gpu"}}
        if not checks.right_kinds(runner, "mosaic_gpu"):  # they have just been checked; else they are not timed
            dropped |= {c for group in times.GROUPS for c in group.contenders if "mosaic_gpu" in c}
        if not any(r["right"] for r in runner.found("graph")):
            dropped.add(times.PLAIN[1])
        kept = sum(LATER[part] for part in args.parts if part in LATER)
        times.drive(runner, max(runner.left() - kept, runner.left() / 2), dropped)
    for process in background:
        runner.kill(process)
    if "programs" in args.parts:
        runner.run("programs", limit=60)
    if "gradients" in args.parts:
        both = {} if args.dry else {"JAX_PLATFORMS": "cuda,cpu"}
        runner.run("gradients", limit=120, stall=90, environment=both)
    if "job" in args.parts and not args.dry:
        runner.run("job", command=[sys.executable, *JOB, "--out", str(runner.out / "gradient_retention")], limit=150)
    if "sanitizer" in args.parts and not args.dry:
        sanitizer.drive(runner, [name for name in checks.backends() if checks.right_kinds(runner, name)])


if __name__ == "__main__":
    sys.exit(main())
