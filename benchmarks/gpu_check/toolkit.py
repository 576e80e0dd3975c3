"""Where the CUDA toolkit is, said to JAX before JAX is imported.

JAX beside PyTorch's CUDA 13 wheels takes the string "None" for the toolkit's folder (seen on JAX 0.11.2), and Mosaic
then finds no libdevice.  CUDA_ROOT in the environment is asked first.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

LIBDEVICE = "nvvm/libdevice/libdevice.10.bc"  # said again in rnncore, which the driver does not import
USUAL = Path("/usr/local/cuda")


def home(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder that holds libdevice, or None.

    Looked for in CUDA_ROOT, CUDA_HOME, beside nvcc on the path, at the usual place, and in packages of pip.
    """
    nvcc = shutil.which("nvcc", path=environment.get("PATH"))
    named = [environment.get(name) for name in ("CUDA_ROOT", "CUDA_HOME")]
    packages = importlib.util.find_spec("nvidia")
    installed = [f"{place}/cu13" for place in (packages.submodule_search_locations or () if packages else ())]
    for found in (*named, nvcc and Path(nvcc).resolve().parent.parent, USUAL, *installed):
        if found and (Path(found) / LIBDEVICE).exists():
            return Path(found).resolve()
    return None


def environment(home: Path | None) -> dict[str, str]:
    """What a process that imports JAX is to have in its environment."""
    if home is None:
        return {}
    # XLA, too, looks for libdevice: in this folder, then in the working directory.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={home}".strip()
    path = f"{home / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"CUDA_ROOT": str(home), "CUDA_HOME": str(home), "PATH": path, "XLA_FLAGS": flags}


def link(home: Path | None) -> None:
    """The toolkit under the usual name, where a compiled-in path is looked at, if that is free and may be made."""
    if home is not None and not USUAL.exists():
        with contextlib.suppress(OSError):
            USUAL.symlink_to(home)
