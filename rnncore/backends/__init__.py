"""Ways to run a cell over time.  Each is a module with `unsupported(request)` and `run(...)`."""

from __future__ import annotations

from types import ModuleType

from rnncore.backends import autodiff, scan
from rnncore.backends.request import Operands as Operands
from rnncore.backends.request import Request as Request
from rnncore.backends.request import Result as Result

BACKENDS: dict[str, ModuleType] = {"scan": scan, "autodiff": autodiff}
"""By name, the preferred one first."""
