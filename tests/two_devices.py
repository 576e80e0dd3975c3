"""Gradients with the batch over two devices of shard_map, in a process of its own: this one has a single device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import rnncore

SCRIPT = """
import sys
import cases, jax, jax.numpy as jnp, rnncore
from jax.sharding import AxisType, PartitionSpec as P
jax.config.update("jax_enable_x64", True)
backend, dtype, tolerance = sys.argv[1:]
case = cases.BY_ID["lstm_both-heads"]
problem = cases.draw(case, batch=(6,), dtype=dtype, lengths=True, resets=True)
def gradient(name):
    def local(params, *rest):
        def loss(params):
            return jnp.sum(cases.runner(case, name)(params, *rest)[1] ** 2)
        return jax.grad(loss)(params)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), *[P("batch")] * 4), out_specs=P()))
cases.assert_close(gradient(backend)(*problem), gradient("scan")(*problem), float(tolerance))
print("ok")
"""


def assert_gradients_are_summed(backend: str, dtype: str, tolerance: float, before: str = "") -> None:
    """The gradients of a backend, summed over both devices, are the scan's; `before` runs first."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(rnncore.__file__).parents[1])])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, "-c", before + SCRIPT, backend, dtype, str(tolerance)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "ok", done.stdout + done.stderr
