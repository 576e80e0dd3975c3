"""Measures recurrent layers of several libraries on the same problems, in turns, and checks every answer.

  python -m benchmarks.run --tag cpu                      five shapes on the CPU
  python -m benchmarks.run --tag gpu --workloads W4-*     an NVIDIA GPU; `benchmarks.gpu_check` measures one in minutes
  python -m benchmarks.run --workloads S4 S5 --contenders "rnncore scan" torch

Every contender gets the same parameters and inputs, and its outputs and gradients are compared with a float64
reference; one whose answer is wrong gets no time.  All contenders of a workload take turns, A B C A B C.
Records are appended to a file of JSON lines as they come; Ctrl-C keeps what was done.  Contenders:
`pip install -e ".[bench]"` brings Haiku and Equinox.  PyTorch is not among them, because it downloads
gigabytes: install it yourself, on a CPU its CPU build.  What is not installed is named in the results as missing.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import measure, records, workloads
from benchmarks.peers import CONTENDERS, Case
from benchmarks.workloads import HALF, Workload


def cases(chosen: Sequence[Workload], precisions: Sequence[str], platform: str) -> list[Case]:
    """Every type, precision and place of the input product of the workloads; half types have one precision."""
    return [
        Case(workload, dtype, precision, product, platform)
        for workload in chosen
        for dtype in workload.dtypes
        for precision in (("default",) if dtype in HALF else precisions)
        for product in workload.input_product
    ]


def run_all(todo: Sequence[Case], contenders: Sequence[str], settings: measure.Settings, write: measure.Write) -> None:
    """Measures every case."""

    def write_and_tell(kind: str, **fields: Any) -> dict[str, Any]:
        if kind == "missing":
            print(f"missing: {fields['contender']}, {fields.get('measurement')}: {fields['reason']}", flush=True)
        return write(kind, **fields)

    entries = measure.present(todo, contenders, write)
    for number, case in enumerate(todo, 1):
        records.say(f"{number} of {len(todo)}: {case.title}")
        for r in measure.run_case(case, entries, settings, write_and_tell):
            name = r.get("contender") or f"({r['bound']})"
            print(f"{name:30} {r['measurement']:10} {r['median_ms']:10.4g} ms", flush=True)
        jax.clear_caches()
        gc.collect()


def parser() -> argparse.ArgumentParser:
    made = records.parser("run", __doc__, rounds=11)
    add = made.add_argument
    add("--tag", choices=("cpu", "gpu"), help="which workloads, and on what (default: cpu)")
    add("--workloads", nargs="+", default=(), metavar="NAME",
        help="these, whatever their tags; a name that ends in * stands for all that begin so; see --list")  # fmt: skip
    add("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS, metavar="NAME",
        help="these only; see --list (default: all)")  # fmt: skip
    add("--list", action="store_true", help="names of workloads, of --tag where it is given, and of contenders")
    return made


def list_names(tag: str | None) -> str:
    """What --list prints: of every workload, or of those with a tag."""
    about = (
        f"  {w.name:14} {w.cell} (B, T, D, H) = {w.shape}, heads {w.heads}, {', '.join(w.dtypes)}; "
        f"{w.tag or 'by name only'}; {w.origin}"
        for w in workloads.select(tag)
    )
    return "\n".join(["workloads:", *about, "contenders:", *(f"  {name}" for name in CONTENDERS)])


def main(argv: list[str] | None = None) -> int:
    """Runs the script; exit status 0, 130 where it was interrupted, 2 for what cannot be run."""
    made = parser()
    args = made.parse_args(argv)
    if args.list:
        print(list_names(args.tag))
        return 0
    tag = args.tag or "cpu"
    if tag == "cpu":
        # Has an effect where no device was asked for yet.
        jax.config.update("jax_platforms", "cpu")
    try:
        platform = jax.default_backend()
    except RuntimeError as error:
        made.error(f"JAX finds no device: {error}")
    if platform != tag:
        devices = ", ".join(f"{d.platform}:{d.device_kind}" for d in jax.devices())
        hint = 'install jax with CUDA, as by `pip install "jax[cuda13]"`, or use --tag cpu'
        made.error(f"--tag {tag}: JAX {jax.__version__} runs on {platform} here ({devices}); {hint}")
    try:
        chosen = workloads.select(tag, args.workloads)
    except ValueError as error:
        made.error(str(error))
    todo = cases(chosen, ("float32", "tf32") if platform == "gpu" else ("float32",), platform)
    settings = measure.Settings(args.rounds, args.seconds)
    return records.session(
        tag, args.out or records.default_path(tag, args.record), argv, args.rounds, args.seconds,
        lambda write: run_all(todo, args.contenders, settings, write),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
