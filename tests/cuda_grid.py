"""The CUDA kernels on CPU threads: the same source, compiled by the C++ compiler with `cuda_emulation.h`."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import cuda_problems
import jax
import numpy as np

from rnncore.kernels.cuda import Cuda, kernels
from rnncore.kernels.cuda.plan import Device, Plan, Shape, layouts

HERE = Path(__file__).parent
HEADERS = HERE.parent / "rnncore" / "kernels" / "cuda"
EMULATED = f'-DRNN_EMULATED="{HERE / "cuda_emulation.h"}"'
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
    command += [
        f'-DRNN_EMULATED="{HERE / "cuda_emulation.h"}"',
        *options,
        str(path.with_suffix(".cc")),
        "-o",
        str(path),
    ]
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


def races(cell: Any, dtype: str, product: str, layout: dict[str, Any], rows: int, *options: str) -> str:
    """What ThreadSanitizer says of both kernels: they run in a process of their own, on numbers that do not matter."""
    said = []

    def alone(call: kernels.Call) -> list[Any]:
        found = launch(call)
        sizes = [0 if a is None else a.nbytes for a in (*call.inputs, *found)]
        filled = [int(n - len(call.inputs) in call.filled) for n in range(len(sizes))]
        plan, name = call.plan, call.plan.shape.direction
        text = f"""{call.source}
#include <cstdio>
int main() {{
  static const long sizes[] = {{{", ".join(map(str, sizes))}}};
  static const int filled[] = {{{", ".join(map(str, filled))}}};
  std::vector<uint64_t> words;
  for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++) {{
    char* place = sizes[n] ? static_cast<char*>(aligned_alloc(64, (sizes[n] + 63) / 64 * 64)) : nullptr;
    if (place) std::memset(place, filled[n] ? 0xff : 0, sizes[n]);
    words.push_back(reinterpret_cast<uint64_t>(place));
  }}
  for (long scalar : {{{", ".join(f"{n}L" for n in call.scalars)}}}) words.push_back(scalar);
  rnn::grid::launch({plan.grid}, {plan.threads}, {plan.shared}, {plan.cluster}, [&] {{
    rnn::rnn_{name}(*reinterpret_cast<const rnn::{name.capitalize()}*>(words.data()));
  }});
  std::puts("ended");
}}
"""
        path = DIRECTORY / f"{hashlib.sha256((text + repr(options)).encode()).hexdigest()[:16]}.cc"
        path.write_text(text)
        command = ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", "-w", f"-I{HEADERS}"]
        command += [
            f'-DRNN_EMULATED="{HERE / "cuda_emulation.h"}"',
            *options,
            str(path),
            "-o",
            str(path.with_suffix("")),
        ]
        subprocess.run(command, check=True)
        environment = os.environ | {"TSAN_OPTIONS": "report_thread_leaks=0 exitcode=0 report_bugs=1"}
        run = subprocess.run([path.with_suffix("")], capture_output=True, text=True, env=environment, timeout=300)
        assert "ended" in run.stdout, run.stderr[-2000:]
        said.append(run.stderr)
        return found

    made = settings(Device("a small Hopper", 16, 96 * 1024, 90), product, **layout)._replace(launch=alone)
    run, z = cuda_problems.problem(cell, rows, 3, dtype)
    kept = kernels.forward(made, cell, run, z, dtype)
    kernels.backward(made, cell, run, kept.residuals, kept.hs, run.start)
    return "\n".join(said)


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
