"""What a peer is: a library behind one interface, so that all of them run the same problem."""

from __future__ import annotations

import abc
import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.peers.problem import Problem
from benchmarks.workloads import HALF, Workload

PRECISIONS = {"float32": "float32", "tf32": "tensorfloat32", "default": None}
"""Of products of float32 numbers, by our names: what `jax.default_matmul_precision` calls them."""
LEARNING_RATE = 1e-3
MOMENTUM = 0.9
"""Adam's first decay rate: after one step its first moment is (1 - MOMENTUM) times the gradient."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What all contenders of an interleaved run share.

    Fields:
      workload, dtype: the shape, and the type of parameters, inputs and outputs.
      precision: of PRECISIONS; "default" for half types, whose products have one precision only.
      input_product: whether x W is inside the measured call.
      platform: "cpu", "gpu" or "tpu".
    """

    workload: Workload
    dtype: str = "float32"
    precision: str = "float32"
    input_product: bool = True
    platform: str = "cpu"

    @property
    def title(self) -> str:
        """One line for a person."""
        about = [self.workload.name, self.dtype]
        about += [] if self.dtype in HALF else [f"products in {self.precision}"]
        return ", ".join(about + ([] if self.input_product else ["x W given"]))


@dataclasses.dataclass(frozen=True)
class Built:
    """One measurement of one contender, ready to run.

    Fields:
      call: runs it once; the result may still be on its way.
      wait: returns when a result of `call` is there.
      result: outputs (forward), or (gradients of the parameters of every layer, gradient of the inputs or None),
        as `reference.py` arranges them, in NumPy float64.
      peak: runs its argument and returns the most bytes that the device held meanwhile, or None where that
        cannot be known.
      figures: compile_seconds, temporary_bytes, argument_bytes, output_bytes; None where there is none.
      algorithm: what ran inside, where there is a choice.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    result: Callable[[], Any]
    peak: Callable[[Callable[[], Any]], int | None]
    figures: dict[str, Any]
    algorithm: str | None = None


class Peer(abc.ABC):
    """A library.  A contender is one way to run a layer with it, with a name of its own.

    Fields:
      library: name of the library in records.
      package: what pip calls it.
      module: what Python calls it.
    """

    library: str
    package: str
    module: str

    def version(self) -> str | None:
        """Of the installed package, or None."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def unavailable(self, platform: str) -> str | None:
        """Why nothing of it can run here, or None."""
        del platform
        if importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed"
        return None

    def absent(self, contender: str, platform: str) -> str | None:
        """Why a contender cannot run anything here, or None."""
        del contender
        return self.unavailable(platform)

    @abc.abstractmethod
    def contenders(self, cell: str) -> tuple[str, ...]:
        """Names of the ways to run a cell; none if the library has no such cell."""

    def form(self, contender: str, cell: str) -> str:
        """Which equation of `reference.FORMS` a contender computes."""
        del contender, cell
        return "same"

    def why_not(self, contender: str, case: Case) -> str | None:
        """Why a contender cannot run a case, or None."""
        del contender
        workload = case.workload
        if workload.recurrence != "dense":
            return f"{self.library} has dense recurrent kernels only, not {workload.recurrence}"
        if not case.input_product:
            return f"{self.library} takes inputs, not their products with the kernel"
        return None

    def asked(self, contender: str, workload: Workload) -> bool:
        """Whether a contender is of interest at a workload; where it is not, nothing is said about it."""
        del contender, workload
        return True

    def fault(self, contender: str, case: Case) -> str | None:
        """What a trial outside this process found wrong with a contender, or None; called before `build`."""
        del contender, case
        return None

    def slow_to_build(self, contender: str) -> bool:
        """Whether building takes minutes, too long for a short run."""
        del contender
        return False

    @abc.abstractmethod
    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        """One measurement, compiled; raises whatever the library raises."""


def jax_peak(call: Callable[[], Any]) -> int | None:
    """Runs a call and returns the device's peak bytes if it raised them: JAX cannot reset that figure."""
    device = jax.devices()[0]
    before = (device.memory_stats() or {}).get("peak_bytes_in_use")
    jax.block_until_ready(call())
    after = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return after if before is not None and after is not None and after > before else None
