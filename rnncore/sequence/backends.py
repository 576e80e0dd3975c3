"""Ways to run a cell over time.  Each is a module with `unsupported(request)` and `run(...)`.

One that may serve a request and is still not to be chosen unless it is named says why in `unchosen(request)`.
"""

from __future__ import annotations

from types import ModuleType

from rnncore.kernels import cpp, cudnn, mosaic_gpu, pallas_tpu
from rnncore.recurrence import autodiff, scan
from rnncore.recurrence.request import Operands as Operands
from rnncore.recurrence.request import Request as Request
from rnncore.recurrence.request import Result as Result

BACKENDS: dict[str, ModuleType] = {
    "mosaic_gpu": mosaic_gpu, "pallas_tpu": pallas_tpu, "cpp": cpp, "scan": scan, "autodiff": autodiff,
    "cudnn": cudnn,
}  # fmt: skip
"""By name, the preferred one first."""


def unchosen(name: str, request: Request) -> str | None:
    """Reason why a backend runs only where it is named, or None."""
    why = getattr(BACKENDS[name], "unchosen", None)
    return None if why is None else why(request)
