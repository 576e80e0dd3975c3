"""Backend "cpp": a whole run in one C++ loop for the CPU, made of a cell's update and compiled where it runs.

The update, what its derivative needs, and its transpose are written as C++ (`emit.py`), compiled with this library's
loops (`forward.h`, `backward.h`) by the C++ compiler of the machine, once, and kept on the disk (`handlers.py`).  A
thread runs all steps of its share of the sequences, and waits for no other within a step; where there are few sequences
and a large matrix, threads share the units of each step.  The matrices are laid out once a call in the order in which
products read them; a product leaves its gates in registers, where the update takes them.  Inputs are
projected, and in reverse mode all weight gradients summed, a few steps at a time, while they are in the cache.

Platform: CPU, with a C++17 compiler that has GCC's vectors (GCC, Clang): what CXX names, or c++, g++, clang++.  The
first run of a cell compiles for some seconds; RNNCORE_CACHE_DIR (by default rnncore in the user's cache directory)
keeps the result, and shapes do not matter to it.  It is chosen by itself on one CPU device; RNNCORE_CPP=0 leaves it to
those who name it.  Cells: every PointwiseCell whose update is said in the operations of `emit.OPERATIONS`, and every
ReducingCell, in stages (`stages.py`), with a dense, block-diagonal, diagonal or low-rank recurrence.  Dtypes: float64,
float32, bfloat16, float16 in any mixture; sums and the carry are float32 inside, or float64 where something is; float64
applies the C library's functions, lane by lane.  All options of `rnncore.unroll`: with `recompute`, "gates" or "chunk"
alike, the carry of every K-th step is kept and the steps between run again; `residual_dtype` then has no meaning.  vmap
over sequences becomes more of a batch, and over parameters runs one call after the other.  Data that is sharded over
devices is gathered to each of them, unless shard_map parts it.  Memory of a gradient step, in arrays of T x B x H:
1 + R, with R: LSTM 4, GRU 4, MGU 3, Elman 1, LayerNormLSTM 16, LayerNormGRU 13, in which the units of a head are padded
to a multiple of 16.  The same call gives the same bits on the same number of threads.
"""

from __future__ import annotations

from rnncore.cells import pointwise
from rnncore.cells.base import PointwiseCell
from rnncore.cells.recurrent_kernels import Dense, Diagonal, Heads, Recurrence
from rnncore.cells.reductions import MEAN, ReducingCell
from rnncore.cells.structured_kernels import LowRank
from rnncore.kernels import compiler
from rnncore.kernels.cpp import emit, handlers, recurrence
from rnncore.recurrence.backend import GATHERED
from rnncore.recurrence.run import Request

DTYPES = ("float32", "float64", "bfloat16", "float16")


class Cpp(recurrence.CppLoops):
    """See the package."""

    name = "cpp"
    opaque = True
    keeps_time_axis = True

    def takes_product(self, recurrence: Recurrence) -> bool:
        return type(recurrence) is LowRank

    def unsupported(self, request: Request) -> str | None:
        cell = request.cell
        if not isinstance(cell, PointwiseCell | ReducingCell):
            return f"{type(cell).__name__} is not a PointwiseCell, so no loop can be made of its pointwise update"
        if type(cell.recurrence) not in (Dense, Heads, Diagonal, LowRank):
            return f"{type(cell.recurrence).__name__} recurrences: it has loops for Dense, Heads, Diagonal and LowRank"
        if not request.dtypes | {request.dtype, request.residual_dtype or "float32"} <= set(DTYPES):
            got = ", ".join(sorted(request.dtypes | {request.residual_dtype or request.dtype}))
            return f"it takes {', '.join(DTYPES)}; parameters, inputs, carry and residuals are {got}"
        compiled = recurrence.compiled_cell(cell)
        projects = () if isinstance(cell, ReducingCell) else ("project",)
        changed = pointwise.why_not_as_declared(cell, *projects, "recurrent_matmul", "output", "split", "update")
        if changed is not None:
            return changed
        if isinstance(cell, ReducingCell) and pointwise.why_not_elementwise(compiled, MEAN):
            return f"{type(cell).__name__} mixes units by other operations than `self.mean_over_units`"
        if request.platform != "cpu":
            return f"it needs a CPU, and JAX runs on {request.platform} here"
        variant = recurrence.variant_of(request)
        return emit.why_not(compiled, variant) or handlers.missing(emit.source(compiled, variant))

    def why_not_by_default(self, request: Request) -> str | None:
        if handlers.turned_off():
            return "RNNCORE_CPP turns it off where it is not named"
        failed = handlers.failed(_source(request))
        if failed is not None:
            return failed
        if request.devices > 1:
            return GATHERED
        return None

    def remedy(self, request: Request) -> str | None:
        if request.platform != "cpu":
            return None
        if not compiler.find():
            # What else it cannot do is said of a machine that could compile.
            return "a C++ compiler (g++ or clang++; CXX names another) lets most cells run by backend 'cpp'"
        if self.unsupported(request):
            return None
        if handlers.turned_off():
            return "backend 'cpp' is the fastest loop on a CPU: unset RNNCORE_CPP, or name it"
        if request.devices > 1:
            return "backend='cpp' is the fastest loop on a CPU, for data that lies on one device"
        return None

    def prepare(self, request: Request) -> str | None:
        return handlers.why_not(_source(request), emit.described(request.cell, recurrence.variant_of(request)))


def _source(request: Request) -> str:
    """The file of a request's cell."""
    return emit.source(recurrence.compiled_cell(request.cell), recurrence.variant_of(request))


def missing_compiler(platform: str) -> str | None:
    """Reason why a new cell cannot run on this platform, or None."""
    if platform != "cpu":
        return f"it needs a CPU, and JAX runs on {platform} here"
    return None if compiler.find() else compiler.MISSING
