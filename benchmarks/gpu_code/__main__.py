"""What NVIDIA's compiler makes of Mosaic's kernels, on a machine without a GPU, and that it does not get worse.

  python -m benchmarks.gpu_code              registers, spilled bytes and shared memory of every kernel
  python -m benchmarks.gpu_code --check      fails where a figure has grown over the recorded one
  python -m benchmarks.gpu_code --record     records them

Needs JAX 0.11 or newer, its CUDA plugin of the same version, ptxas and libdevice of a CUDA toolkit (CUDA_ROOT), and a C
compiler: `pip install --no-deps jax-cuda13-pjrt jax-cuda13-plugin nvidia-cuda-nvcc nvidia-nvvm`.  No driver, no GPU.
Figures are recorded by versions of JAX and of ptxas; for others there is nothing to compare with, which is said.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import jax

from benchmarks import options
from benchmarks.gpu_code import compiler
from benchmarks.gpu_code.compiler import Figures
from benchmarks.gpu_code.lowering import KERNELS, modules

RECORDED = Path(__file__).with_name("recorded.json")
WAYS = ("forward", "backward")
Found = dict[str, list[int]]


def main(argv: list[str] | None = None) -> int:
    """Runs the command; exit status 0, 1 where a figure has grown, 2 for what cannot be run."""
    made = options.parser("gpu_code", __doc__)
    made.add_argument("--check", action="store_true", help="compare with what is recorded")
    made.add_argument("--record", action="store_true", help="record for these versions")
    made.add_argument("--first", type=options.count, metavar="N", help="the first N only (default: all)")
    args = made.parse_args(argv)
    found = compiler.find()
    if isinstance(found, str):
        made.error(found)
    jax.config.update("jax_platforms", "cpu")
    versions = f"JAX {'.'.join(jax.__version__.split('.')[:3])}, ptxas {compiler.version(found)}"
    print(f"{versions}: registers, spilled bytes, stack bytes of a thread; shared bytes of a block")
    everything: Found = {}
    for name, check in itertools.islice(KERNELS.items(), args.first):
        for way, figures in zip(WAYS, compiler.compiled(found, modules(check)), strict=True):
            everything[f"{name}, {way}"] = list(figures)
            print(f"{name:48} {way:8} {' '.join(f'{n:7}' for n in figures)}", flush=True)
    recorded: dict[str, Found] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if args.record:
        recorded[versions] = recorded.get(versions, {}) | everything
        lines = (f"  {json.dumps(name)}: {{\n{_lines(rows)}\n  }}" for name, rows in sorted(recorded.items()))
        RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if not args.check:
        return 0
    if versions not in recorded:
        print(f"nothing recorded for {versions}; recorded: {', '.join(recorded) or 'nothing'}")
        return 0
    told = grown(everything, recorded[versions])
    print("\n".join(told) or "no figure has grown", file=sys.stderr if told else sys.stdout)
    return 1 if told else 0


def _lines(rows: Found) -> str:
    return ",\n".join(f"    {json.dumps(name)}: {json.dumps(figures)}" for name, figures in rows.items())


def grown(found: Found, recorded: Found) -> list[str]:
    """Sentences on the figures that are larger than the recorded ones, and on kernels without a record."""
    told = []
    for name, figures in found.items():
        if name not in recorded:
            told.append(f"{name}: not recorded; `python -m benchmarks.gpu_code --record`")
            continue
        for what, now, before in zip(Figures._fields, figures, recorded[name], strict=True):
            if now > before:
                told.append(f"{name}: {what} have grown from {before} to {now}")
    return told


if __name__ == "__main__":
    sys.exit(main())
