"""Benchmark runs that build in threads, and those that end though a process hears no signal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import run

FLAX = "flax.linen OptimizedLSTMCell"
ROOT = Path(__file__).resolve().parents[2]
HANGS = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from benchmarks.run import terminable

mutex = ctypes.create_string_buffer(64)
library = ctypes.CDLL(None)
with terminable(grace=0.5):
    library.pthread_mutex_lock(mutex)
    print("waits", flush=True)
    library.pthread_mutex_lock(mutex)  # for ever, and no signal gets Python out of it
"""
HEARS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from benchmarks.run import terminable

try:
    with terminable(grace=0.5):
        print("waits", flush=True)
        time.sleep(60)
except KeyboardInterrupt as stop:
    time.sleep(1)  # longer than the grace, which is over when the signal has been heard
    print("heard", stop)
"""


def ended(text: str, number: int) -> tuple[int, str, float]:
    """(exit status, output, seconds) of a script that is sent a signal when it says that it waits."""
    command = [sys.executable, "-c", text, str(ROOT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    time.sleep(1)  # what comes behind that line is called
    begin = time.monotonic()
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    return process.returncode, printed, time.monotonic() - begin


def test_a_process_that_waits_for_ever_ends_after_the_grace():
    status, printed, seconds = ended(HANGS, signal.SIGTERM)
    assert status == 130 and "not at its end 0.5 s after a signal: killed" in printed and seconds >= 0.5


def test_one_that_hears_the_signal_ends_by_itself():
    status, printed, _ = ended(HEARS, signal.SIGTERM)
    assert status == 0 and printed == "heard SIGTERM\n"


def test_programs_built_in_threads_are_the_same_and_the_first_round_is_written_at_once(tmp_path):
    out = tmp_path / "r.jsonl"
    options = ["--tag", "cpu", "--quick", "--rounds", "2", "--seconds", "1e-9", "--no-bounds", "--threads", "3"]
    options += ["--workloads", "tiny-lstm", "--input-product", "inside", "--measurements", "forward", "gradient"]
    assert run.main([*options, "--contenders", "rnncore scan", FLAX, "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    times, rounds = ([r for r in found if r["record"] == kind] for kind in ("time", "round"))
    pairs = {(r["contender"], r["measurement"]) for r in times}
    assert len(pairs) == len(times) == 4 and pairs == {(r["contender"], r["measurement"]) for r in rounds}
    assert all(r["compile_seconds"] is None and r["input_product"] is True for r in times), "others compiled beside it"
    assert all(0 < r["relative_error"] < 2e-6 and len(r["ms"]) == 2 for r in times)
    assert all(r["ms"] in [t["ms"][0] for t in times] for r in rounds)
    assert not [r for r in found if r["record"] == "bound"]
