"""What a peer is: a library behind one interface, so that all of them run the same problem."""

from __future__ import annotations

import abc
import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

from benchmarks.peers.problem import Problem
from benchmarks.workloads import HALF, Workload

PRECISIONS = {"float32": "float32", "tf32": "tensorfloat32", "default": None}
"""Of products of float32 numbers, by our names: what `jax.default_matmul_precision` calls them."""


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
        """One line for the terminal."""
        about = [self.workload.name, self.dtype]
        about += [] if self.dtype in HALF else [f"products in {self.precision}"]
        return ", ".join(about + ([] if self.input_product else ["x W given"]))


@dataclasses.dataclass(frozen=True)
class Built:
    """One measurement of one contender, ready to run.

    Fields:
      call: runs it once; the result may not be computed yet when it returns.
      wait: returns when a result of `call` is computed.
      result: outputs (forward), or (gradients of the parameters, gradient of the inputs), in NumPy float64.
      figures: compile_seconds and temporary_bytes; None where there is none.
      algorithm: what ran inside, where there is a choice.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    result: Callable[[], Any]
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

    def absent(self, contender: str, platform: str) -> str | None:
        """Why a contender cannot run anything here, or None."""
        del contender, platform
        return None if importlib.util.find_spec(self.module) else f"{self.package} is not installed"

    @abc.abstractmethod
    def contenders(self, cell: str) -> tuple[str, ...]:
        """Names of the ways to run a cell; none if the library has no such cell."""

    def why_not(self, contender: str, case: Case) -> str | None:
        """Why a contender cannot run a case, or None."""
        del contender
        if case.workload.heads > 1:
            return f"{self.library} has dense recurrent kernels only"
        return None if case.input_product else f"{self.library} takes inputs, not their products with the kernel"

    def asked(self, contender: str, workload: Workload) -> bool:
        """Whether a contender is of interest at a workload."""
        del contender, workload
        return True

    @abc.abstractmethod
    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        """One measurement, compiled; raises whatever the library raises."""
