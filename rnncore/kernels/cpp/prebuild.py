"""Compiles the usual cells beforehand, for a wheel whose users need neither a compiler nor the seconds that it takes.

  python -m rnncore.kernels.cpp.prebuild
  python -m rnncore.kernels.cpp.prebuild --include other/site-packages/jaxlib/include --out prebuilt

Writes one file for each cell, dtype, level of this machine's processors (`handlers.LEVELS`) and version of XLA's
interface into the package's `prebuilt` folder, where a build finds them.  A file is named after its source, its level
and that version, and taken only where all three are the same.  The interface's version is that of the installed
jaxlib; `--include` adds others.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from rnncore.cells.base import PointwiseCell
from rnncore.cells.elman import Elman
from rnncore.cells.gru import GRU
from rnncore.cells.lstm import LSTM
from rnncore.kernels import compiler
from rnncore.kernels.cpp import emit, handlers

CELLS: dict[str, PointwiseCell] = {
    "LSTM": LSTM(8), "LSTM with peepholes": LSTM(8, peepholes=True), "GRU": GRU(8),
    "Elman": Elman(8),
}  # fmt: skip
DTYPES = ("float32", "float64")
# Other machines may have older libraries than this one.
STATIC = ("-static-libstdc++", "-static-libgcc", "-s")


def sources() -> dict[str, str]:
    """What a file is of, to its source."""
    found = {}
    for dtype in DTYPES:
        with jax.enable_x64(dtype == "float64"):
            for name, cell in CELLS.items():
                found[f"{name}, {dtype}"] = emit.source(cell, emit.Variant(dtype, dtype, dtype))
    return found


def build(sources: dict[str, str], levels: Sequence[str], includes: Sequence[str], to: Path) -> list[Path]:
    """Compiles every source for every level and interface that is not there yet, and returns the files."""
    command = compiler.require()
    to.mkdir(parents=True, exist_ok=True)
    paths = []
    for include in dict.fromkeys(includes):
        for level in levels:
            flags = [f"-march={level}" if flag == handlers.NATIVE else flag for flag in handlers.FLAGS]
            for what, source in sources.items():
                path = to / f"{handlers.key_of(source, level, compiler.api_version(Path(include)))}.so"
                paths.append(path)
                if not path.exists():
                    making = path.with_suffix(".making")
                    compiler.compile_to(making, source, (*command, *flags, *STATIC), what, handlers.HEADERS, include)
                    making.with_suffix(".cc").unlink()
                    making.replace(path)
    return paths


def main(argv: list[str] | None = None) -> int:
    """Runs the script."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m rnncore.kernels.cpp.prebuild", description=summary, epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    levels = list(handlers.LEVELS.get(platform.machine(), {}))
    parser.add_argument("--levels", nargs="*", default=levels, choices=levels, help=f"default: {' '.join(levels)}")
    parser.add_argument("--include", nargs="*", default=[], help="include folders of other versions of jaxlib")
    parser.add_argument("--out", type=Path, default=handlers.PREBUILT, help=f"default: {handlers.PREBUILT}")
    args = parser.parse_args(argv)
    if not levels:
        parser.error(f"there are no levels for {platform.machine()}; expected one of {', '.join(handlers.LEVELS)}")
    paths = build(sources(), args.levels, [jax.ffi.include_dir(), *args.include], args.out)
    print(f"{len(paths)} files in {args.out}, {sum(p.stat().st_size for p in paths) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
