"""Launches through XLA: one handler for all kernels, compiled once, and the properties of the GPU."""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore.kernels import compiler, ffi
from rnncore.kernels.cuda import nvrtc
from rnncore.kernels.cuda.kernels import Call
from rnncore.kernels.cuda.plan import Device

SOURCE = Path(__file__).parent / "handler.cc"
# CUdevice_attribute
_PROCESSORS, _MAJOR, _MINOR, _SHARED, _CLOCK = 16, 75, 76, 97, 13


def launch(call: Call, device: Device) -> list[Any]:
    """Runs a call, see `kernels.Call`."""
    name = f"rnn_{call.plan.shape.direction}"
    code, key = nvrtc.code_for(call.source, device.capability, f"the {call.plan.shape.direction} loop of a cell")
    results = [((0,), "float32") if out is None else (out.shape, out.dtype) for out in call.outputs]
    arrays = [jnp.zeros((0,), "float32") if a is None else a for a in call.inputs]
    found = ffi.call(
        target(), results, arrays, code=np.frombuffer(code, np.uint8), key=key, name=name,
        blocks=np.int64(call.plan.grid), threads=np.int64(call.plan.threads), shared=np.int64(call.plan.shared),
        cluster=np.int64(call.plan.cluster), together=call.plan.sync == "grid",
        filled=np.int64(sum(1 << n for n in call.filled)), scalars=np.array(call.scalars, np.int64),
    )  # fmt: skip
    return [None if out is None else a for a, out in zip(found, call.outputs, strict=True)]


def target() -> str:
    """The name under which XLA finds the handler, which is compiled on first use."""
    with _lock:
        return _registered()


_lock = threading.Lock()


@functools.cache
def _registered() -> str:
    library, key = compiler.library(SOURCE.read_text(), "the call that launches kernels")
    return ffi.register(f"rnncore_cuda_{key}", library, "rnn_cuda", "CUDA")


@functools.cache
def device() -> Device | None:
    """The properties of the first GPU, as its driver reports them; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(number), jax.local_devices()[0].local_hardware_id or 0):
        return None

    def ask(attribute: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, number)
        return value.value

    name = ctypes.create_string_buffer(128)
    driver.cuDeviceGetName(name, len(name), number)
    return Device(
        name.value.decode(), ask(_PROCESSORS), ask(_SHARED), 10 * ask(_MAJOR) + ask(_MINOR), ask(_CLOCK) / 1e6
    )  # fmt: skip
