"""Mosaic's own compiler, which JAX's CUDA plugin holds, without a GPU: PTX, and what ptxas says of it.

The compiler asks the driver for the GPU's capability and in the end hands it the kernel.  A stand-in for the driver
(`driver.c`) answers the one and refuses the other; by then everything has been dumped.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_check import toolkit

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = (("jax_plugins.xla_cuda13", "jax_cuda13_plugin"), ("jax_plugins.xla_cuda12", "jax_cuda12_plugin"))


class Figures(NamedTuple):
    """Of a kernel.

    Fields:
      registers: of a thread.
      spilled: bytes of a thread that go to memory and come back for want of registers.
      stack: bytes of a thread's own memory, which is where spilled ones lie.
      shared: bytes of a block.
    """

    registers: int
    spilled: int
    stack: int
    shared: int


class Compiler(NamedTuple):
    """What is needed.

    Fields:
      plugin: the library with Mosaic's compiler in it.
      runtime: the one that kernels are started with.
      toolkit: the folder that holds libdevice and ptxas.
      cc: a C compiler.
    """

    plugin: Path
    runtime: Path
    toolkit: Path
    cc: str


def find() -> Compiler | str:
    """What this machine has, or what is missing."""
    home = toolkit.home()
    ptxas = home and home / "bin" / "ptxas"
    if home is None or not ptxas or not ptxas.exists():
        return "no CUDA toolkit with ptxas and libdevice: set CUDA_ROOT to its folder"
    cc = shutil.which("cc")
    if cc is None:
        return "no C compiler `cc` on the path"
    for plugin, runtime in PLUGINS:
        try:
            specs = [importlib.util.find_spec(name) for name in (plugin, runtime)]
        except ModuleNotFoundError:
            continue
        places = [spec.submodule_search_locations for spec in specs if spec is not None]
        folders = [Path(place[0]) for place in places if place]
        if len(folders) == 2:
            return Compiler(folders[0] / "xla_cuda_plugin.so", folders[1] / "libmosaic_gpu_runtime.so", home, cc)
    return "JAX's CUDA plugin is missing: `pip install --no-deps jax-cuda13-pjrt jax-cuda13-plugin` of JAX's version"


def version(found: Compiler) -> str:
    """Of ptxas, as 13.0."""
    told = subprocess.run([found.toolkit / "bin" / "ptxas", "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"release (\d+\.\d+)", told.stdout)
    assert match is not None, told.stdout
    return match[1]


def compiled(found: Compiler, modules: list[bytes]) -> list[Figures]:
    """Figures of kernels, in order.

    Args:
      modules: see `lowering.modules`.

    Raises:
      RuntimeError: a kernel that the compiler does not take, with what it says.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The loader takes this for the driver by its soname.
        stub = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
        subprocess.run([found.cc, *stub, str(Path(__file__).with_name("driver.c"))], check=True)
        figures = []
        for number, module in enumerate(modules):
            own = folder / str(number)
            own.mkdir()
            (own / "module").write_bytes(module)
            environment = {
                **os.environ, "MOSAIC_GPU_CUDA_ROOT": str(found.toolkit), "CUDA_ROOT": str(found.toolkit),
                "MOSAIC_GPU_RUNTIME_LIB_PATH": str(found.runtime), "MOSAIC_GPU_DUMP_TO": str(own),
                "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1",
                "PATH": f"{found.toolkit / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
            }  # fmt: skip
            files = (folder / "libcuda.so.1", found.plugin, own / "module")
            command = [sys.executable, "-m", "benchmarks.gpu_code.compiler", *map(str, files)]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            said = [path.read_text() for path in own.glob("*.ptxas")]
            if len(said) != 1:
                raise RuntimeError(f"no kernel: exit status {done.returncode}: {done.stderr.strip()[-800:]}")
            figures.append(read(said[0], next(own.glob("*.mlir-passes.log"))))
    return figures


def read(said: str, passes: Path) -> Figures:
    """Figures from what ptxas says and from the log of the passes, which knows the shared memory."""
    wanted = (r"Used (\d+) registers", r"(\d+) bytes stack", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    found = [re.search(pattern, said) for pattern in wanted]
    registers, stack, stores, loads = (int(match[1]) if match else -1 for match in found)
    if min(registers, stack, stores, loads) < 0:
        raise RuntimeError(f"ptxas says something else than expected: {said[:400]}")
    with passes.open() as lines:
        sizes = (re.search(r"dynamic_shared_memory_size %c(\d+)_i32", line) for line in lines)
        shared = next((int(match[1]) for match in sizes if match), None)
    if shared is None:
        raise RuntimeError("the log of Mosaic's passes names no size of shared memory")
    return Figures(registers, stores + loads, stack, shared)


def _compile(stub: str, plugin: str, module: str) -> None:
    """In a process of its own, without JAX: the stand-in has to be there before anything asks for a driver."""
    ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
    compile_module = ctypes.CDLL(plugin, mode=ctypes.RTLD_LOCAL).MosaicGpuCompile
    compile_module.restype, compile_module.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
    data = Path(module).read_bytes()
    compile_module(data, len(data))  # nothing, because the stand-in loads nothing


if __name__ == "__main__":
    _compile(*sys.argv[1:])
