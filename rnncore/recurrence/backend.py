"""The interface of a backend: a way to run a cell over time."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

from rnncore._types import PyTree
from rnncore.cells.recurrent_kernels import Recurrence
from rnncore.recurrence import mesh, plain, primitives
from rnncore.recurrence.run import Differentiable, Problem, Request, Result

GATHERED = "only where it is named: data that is sharded over devices would be gathered to each of them"
"""Why an opaque backend is not chosen on several devices."""


class Backend(abc.ABC):
    """A way to run a cell over time; one instance of each class, hashed by its identity.

    Attributes:
      name: as `unroll(backend=...)` has it.
      opaque: whether XLA can neither partition its calls over devices nor export them: on an explicit mesh
        it then runs in `jax.shard_map`, and `jax.export`, or another platform than JAX's default, takes `plain`.
      must_be_named: why it runs only where it is named; None if it may be chosen, see `why_not_by_default`.
      keeps_time_axis: whether it takes xs and returns outputs with the caller's time axis.
      takes_symbolic: whether steps and batch may be symbolic, as under `jax.export`.
    """

    name: ClassVar[str]
    opaque: ClassVar[bool] = False
    must_be_named: ClassVar[str | None] = None
    keeps_time_axis: ClassVar[bool] = False
    takes_symbolic: ClassVar[bool] = False

    @abc.abstractmethod
    def unsupported(self, request: Request) -> str | None:
        """Reason why this backend cannot serve the request, or None; symbolic ones as `takes_symbolic` says."""

    def takes_product(self, recurrence: Recurrence) -> bool:
        """Whether it multiplies by the own `matmul` of a structure that is formed of parameters."""
        return False

    def why_not_by_default(self, request: Request) -> str | None:
        """Reason why a request that it can serve runs here only where the backend is named, or None."""
        return self.must_be_named

    def prepare(self, request: Request) -> str | None:
        """Called once it is chosen, before it runs: why another backend has to be chosen after all, or None."""
        return None

    def describe(self, request: Request) -> str | None:
        """How it would run a request that it can serve, for `explain_backend`, or None."""
        return None

    def remedy(self, request: Request) -> str | None:
        """How to make a request run on this backend where another is chosen, for `explain_backend`, or None."""
        if self.must_be_named is None or self.unsupported(request):
            return None
        return f"backend={self.name!r} can serve this call and may be faster: measure it. It runs {self.must_be_named}"

    def runs_layers(self, request: Request, layers: int, directions: int) -> bool:
        """Whether `run` takes this many layers and directions at once, and is faster that way.

        Parameters, initial carries and the last ones are then, for each layer, a tuple of those of its directions, and
        the request is that of the first of them.
        """
        return False

    @abc.abstractmethod
    def run(self, problem: Problem) -> Result:
        """The run, with its derivatives."""


class LoopBackend(Backend):
    """A backend with its own loops, from which `primitives.py` derives every mode and order of differentiation.

    Its functions are traced with the matmul precision of the request, and under vmap: opaque calls in them say by
    `batching.over_batch` where their batch lies.  They are never differentiated themselves.

    Attributes:
      maps_into_batch: whether every residual is an array (n, *batch, ...), so that vmap over sequences can give the
        functions a larger batch in place of vmap: gradients of shared parameters are then summed inside.
    """

    maps_into_batch: ClassVar[bool] = False

    @abc.abstractmethod
    def forward(self, problem: Problem, keep: bool) -> tuple[Result, PyTree]:
        """The run, and, with `keep`, what `backward` needs besides both: any pytree of arrays; else None."""

    @abc.abstractmethod
    def backward(
        self, problem: Problem, result: Result, residuals: PyTree, cotangents: Result, wanted: Differentiable
    ) -> Differentiable:
        """The cotangents of what is differentiable, in its shapes and dtypes.

        Args:
          problem: the run.
          result, residuals: what `forward` gave.
          cotangents: of the result; None for every array of it whose cotangent is zero, see `run.dense`.
          wanted: a boolean for each array of `differentiable`; other entries are ignored and may be None.
        """

    def tangent(self, problem: Problem, result: Result, residuals: PyTree, tangents: Differentiable) -> Result:
        """The tangent of the result, linear in `tangents`, which has None for every array without a tangent.

        This one forms what the linearised step depends on from the outputs; a backend whose residuals are all of that
        calls `plain.tangent` with them.
        """
        return self.plain_tangent(problem, result, tangents)

    def plain(self, problem: Problem) -> Result:
        """The run by operations that JAX differentiates to every order: for second and higher ones."""
        return plain.run(problem)

    def plain_tangent(self, problem: Problem, result: Result, tangents: Differentiable) -> Result:
        """`tangent` by operations that JAX differentiates to every order, as a function of the result as well."""
        if problem.request.recompute != "nothing":
            # What a memory policy does not keep is not formed for all steps here either.
            return plain.jvp(self.plain, problem, tangents)
        return plain.tangent(problem, result, plain.residuals_from_outputs(problem, result.outputs), tangents)

    def residuals_move(self, request: Request) -> bool:
        """Whether second and higher orders differentiate residuals too, which saves forming them once more.

        Then `plain_with_residuals` and `tangent` are operations that JAX differentiates to every order.
        """
        return False

    def plain_with_residuals(self, problem: Problem) -> tuple[Result, PyTree]:
        """`forward` by such operations, with residuals; asked for where `residuals_move` says so."""
        return self.forward(problem, True)

    def run(self, problem: Problem) -> Result:
        run = functools.partial(primitives.run, self)
        return mesh.by_device(run, problem) if self.opaque else run(problem)


_OPTIONS: dict[str, Callable[[Request], bool]] = {
    "resets": lambda r: r.resets,
    "recurrent_mask": lambda r: r.recurrent_mask,
    "zoneout": lambda r: r.zoneout,
    "return_states": lambda r: r.return_states,
    "checkpoint_every": lambda r: r.checkpoint_every is not None,
    "recompute": lambda r: r.recompute != "nothing",
    "residual_dtype": lambda r: r.residual_dtype not in (None, r.dtype),
}


def without(request: Request, options: Sequence[str], because: str) -> str | None:
    """Reason why a backend that lacks these options of `unroll` cannot serve the request, or None."""
    shown = {"return_states": "=True", "recompute": f"={request.recompute!r}"}
    shown["residual_dtype"] = f"={request.residual_dtype!r}"
    for option in options:
        if _OPTIONS[option](request):
            return f"{option}{shown.get(option, '')}: {because}"
    return None
