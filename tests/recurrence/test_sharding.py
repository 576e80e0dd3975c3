"""Batch split over eight virtual CPU devices: exact, and reduced outside the time loop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rnncore.kernels import compiler

KINDS = ["shard_map", "auto", "explicit", "pmap"]


@pytest.mark.ci
@pytest.mark.sample("cpp")
@pytest.mark.parametrize("backend", ["scan", "cpp", "plain"])
def test_sharded_batch(backend):
    if backend == "cpp" and compiler.find() is None:
        pytest.skip("no C++ compiler here")
    script = Path(__file__).parent.with_name("sharding_checks.py")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script), backend, *KINDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == KINDS, done.stdout + done.stderr
