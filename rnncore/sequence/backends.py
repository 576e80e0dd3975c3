"""The backends, by name."""

from __future__ import annotations

from rnncore.kernels import cpp, cuda, cudnn, mosaic_gpu, pallas_tpu
from rnncore.recurrence.associative import AssociativeScan
from rnncore.recurrence.autodiff import Autodiff
from rnncore.recurrence.backend import Backend
from rnncore.recurrence.scan import Scan

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        mosaic_gpu.MosaicGPU(), cuda.Cuda(), pallas_tpu.PallasTPU(), cudnn.CuDNN(), AssociativeScan(),
        cpp.Cpp(), Scan(), Autodiff(),
    )
}  # fmt: skip
"""In order of preference: the first that can serve a call and need not be named is chosen."""
