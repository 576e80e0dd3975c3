"""The CUDA kernels on CPU threads: the same source, compiled by the C++ compiler with `cuda_emulation.h`."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rnncore.kernels.cuda import Cuda, kernels
from rnncore.kernels.cuda.plan import Device, Plan, Shape, layouts

HERE = Path(__file__).parent
HEADERS = HERE.parent / "rnncore" / "kernels" / "cuda"
DIRECTORY = Path(tempfile.mkdtemp(prefix="rnncore-cuda-"))
SMALL = Device("a small GPU", 4, 96 * 1024, 80)


@functools.cache
def library(source: str, direction: str, *options: str) -> Any:
    """`emulate(blocks, threads, shared, arguments)` of a generated file."""
    name = direction.capitalize()
    text = f"""{source}
extern "C" void emulate(int blocks, int threads, int shared, int cluster, const void* arguments) {{
  rnn::grid::launch(blocks, threads, shared, cluster, [&] {{
    rnn::rnn_{direction}(*static_cast<const rnn::{name}*>(arguments));
  }});
}}
"""
    path = DIRECTORY / f"{hashlib.sha256((text + repr(options)).encode()).hexdigest()[:16]}.so"
    path.with_suffix(".cc").write_text(text)
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-w", f"-I{HEADERS}"]
    command += [f'-DRNN_EMULATED="{HERE / "cuda_emulation.h"}"', *options, str(path.with_suffix(".cc")), "-o", str(path)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(path)).emulate


def launch(call: kernels.Call, *options: str) -> list[Any]:
    """Runs a call; outputs begin with numbers that nobody would take for results."""
    inputs = [None if a is None else np.ascontiguousarray(np.asarray(a)) for a in call.inputs]
    outputs: list[Any] = []
    for n, out in enumerate(call.outputs):
        if out is None:
            outputs.append(None)
            continue
        array = np.empty(out.shape, out.dtype)
        array.reshape(-1).view(np.uint8)[:] = 0xFF if n in call.filled else 0x7B
        outputs.append(array)
    words = [0 if a is None or not a.size else a.ctypes.data for a in (*inputs, *outputs)] + list(call.scalars)
    arguments = (ctypes.c_uint64 * len(words))(*words)
    plan = call.plan
    library(call.source, plan.shape.direction, *options)(plan.grid, plan.threads, plan.shared, plan.cluster, arguments)
    return outputs


def callback(call: kernels.Call, *options: str) -> list[Any]:
    """The same where arrays are traced."""
    shapes = [jax.ShapeDtypeStruct((0,), "float32") if out is None else out for out in call.outputs]

    def run(*inputs: Any) -> Any:
        given = iter(inputs)
        found = launch(call._replace(inputs=tuple(a if a is None else next(given) for a in call.inputs)), *options)
        return [np.zeros(0, "float32") if a is None else np.asarray(a) for a in found]

    found = jax.pure_callback(run, shapes, *(a for a in call.inputs if a is not None))
    return [None if out is None else a for a, out in zip(found, call.outputs, strict=True)]


class Emulated(Cuda):
    """The backend, on CPU threads."""

    name = "emulated"
    product = "3xtf32"

    def missing(self, request: Any) -> str | None:
        return None

    def settings(self, request: Any) -> kernels.Settings:
        return kernels.Settings(SMALL, "mma" if request.dtype != "float32" else self.product, callback)


def settings(device: Device = SMALL, product: str = "mma", *options: str, **fixed: Any) -> kernels.Settings:
    """What runs the kernels here; of a plan's fields `fixed` are as given."""

    def choose(device: Device, shape: Shape) -> Plan | str:
        def fits(plan: Plan) -> bool:
            return all(getattr(plan, name) == value for name, value in fixed.items())

        return min(filter(fits, layouts(device, shape)), key=lambda plan: plan.step, default="no such layout")

    return kernels.Settings(device, product, lambda call: callback(call, *options), choose)
