"""Benchmark runs end even where a process handles no signal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HANGS = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from benchmarks.options import terminable

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
from benchmarks.options import terminable

try:
    with terminable(grace=0.5):
        print("waits", flush=True)
        time.sleep(60)
except KeyboardInterrupt as stop:
    time.sleep(1)  # longer than the grace, which ends when the signal is handled
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
    assert status == 130 and "still running 0.5 s after a signal: killed" in printed and seconds >= 0.5


def test_one_that_handles_the_signal_ends_by_itself():
    status, printed, _ = ended(HEARS, signal.SIGTERM)
    assert status == 0 and printed == "heard SIGTERM\n"
