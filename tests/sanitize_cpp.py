"""The C++ loops under the compiler's sanitizers, over odd sizes and all options; a minute or two.

    python tests/sanitize_cpp.py

Each loop is compiled into a program of its own, without Python or XLA, that runs it on arrays of exactly their sizes:
with the sanitizers of addresses and of undefined behaviour, and with that of threads.  Exit status 1 if one reports
anything, or if a run that keeps all differs from one that runs stretches again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cases
import jax

import rnncore
from rnncore.cells.reductions import Whole
from rnncore.kernels import compiler
from rnncore.kernels.cpp import emit, handlers

WIDE = emit.Variant("float32", "float32", "float32", states=True)
NARROW = emit.Variant("float32", "bfloat16", "bfloat16")
CELLS = {
    "LSTM with peepholes and states": (rnncore.LSTM(8, peepholes=True), WIDE),
    "LSTM with layer normalization and states": (Whole.of(rnncore.LayerNormLSTM(8)), WIDE),
    "a cell with all that one may have, in bfloat16": (cases.FastSlow(8), NARROW),
}
SANITIZERS = {"addresses and undefined behaviour": "address,undefined", "threads": "thread"}
FLAGS = ("-std=c++17", "-O1", "-g", handlers.NATIVE, "-fno-sanitize-recover=all", "-pthread", "-w", "-DRNN_ROWS=3")
RUNS = 40


def main() -> int:
    command, failed = compiler.find(), 0
    if command is None:
        print("no C++ compiler here")
        return 0
    driver = (Path(__file__).parent / "sanitize_cpp.cc").read_text()
    with tempfile.TemporaryDirectory() as work:
        for what, (cell, variant) in CELLS.items():
            text = Path(work) / "cell.cc"
            text.write_text(emit.source(cell, variant).replace("handlers.h", "runs.h") + driver)
            for name, sanitizer in SANITIZERS.items():
                begin, program = time.monotonic(), Path(work) / "program"
                flags = (*FLAGS, f"-fsanitize={sanitizer}", f"-I{handlers.HEADERS}", f"-I{jax.ffi.include_dir()}")
                subprocess.run([*command, *flags, str(text), "-o", str(program)], check=True)
                compiled = time.monotonic() - begin
                done = subprocess.run([str(program), str(RUNS)], capture_output=True, text=True)
                seconds = time.monotonic() - begin
                verdict = "ok" if done.returncode == 0 else f"exit status {done.returncode}"
                print(f"{what}; {name}: {verdict}, {RUNS} runs, {seconds:.0f} s ({compiled:.0f} compiling)", flush=True)
                if done.returncode:
                    failed += 1
                    print((done.stdout + done.stderr)[:8000], flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
