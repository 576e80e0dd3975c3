"""Backend "cpp": a whole run in one C++ loop for the CPU, made from any pointwise cell and compiled where it runs.

The update, what its derivative needs, and its transpose are written as C++ (`emit.py`), compiled with this library's
loops (`forward.h`, `backward.h`) by the C++ compiler of the machine, once, and kept on the disk (`compiler.py`).  A
thread runs all steps of its share of the sequences, and waits for no other within a step; where there are few sequences
and a large matrix, threads share the units of each step.  The matrices are laid out once a call in the order in which
products read them; a product leaves its gates in registers, where the update takes them.  Inputs are projected, and in
reverse mode all weight gradients summed, a few steps at a time, while they are in the cache.

Platform: CPU, with a C++17 compiler that has GCC's vectors (GCC, Clang): what CXX names, or c++, g++, clang++.  The
first call with a cell compiles for some seconds; RNNCORE_CACHE_DIR (by default rnncore in the user's cache directory)
keeps the result, and shapes do not matter to it.  Cells: every PointwiseCell whose update is said in the operations of
`emit.OPERATIONS`, with a dense recurrence or heads.  Dtypes: float32 or float64, of all arrays alike; float64 applies
the C library's functions, lane by lane.  Lengths, resets, recurrent masks, any number of batch axes: yes; zoneout,
states, chunks: no.  Differentiation: reverse mode of first order.  vmap over sequences becomes more of a batch, and
over parameters runs one call after the other.  Data that is sharded over devices is gathered to each of them, unless
shard_map parts it.  Memory of a gradient step, in arrays of T x B x H: 1 + R, with R as in `rnncore.unroll` and in R
the units of a head padded to a multiple of 16.  The same call gives the same bits on the same number of threads.
"""

from __future__ import annotations

from rnncore.cells.base import CellParams, PointwiseCell
from rnncore.cells.recurrent_kernels import Dense, Diagonal, Heads
from rnncore.kernels import kernel_body
from rnncore.kernels.cpp import compiler, emit, recurrence
from rnncore.recurrence.request import Operands, Request, Result

DTYPES = ("float32", "float64", "bfloat16", "float16")


def unsupported(request: Request) -> str | None:
    """Reason why this backend cannot serve the request, or None."""
    cell = request.cell
    if not isinstance(cell, PointwiseCell):
        return f"{type(cell).__name__} is not a PointwiseCell, so no loop can be made of its pointwise update"
    if not isinstance(cell.recurrence, Dense | Heads | Diagonal):
        return f"{type(cell.recurrence).__name__} recurrences: it has loops for Dense, Heads and Diagonal"
    if request.differentiation != "reverse":
        return "it has reverse mode of first order only: say differentiation='reverse'"
    if not request.dtypes | {request.dtype, request.residual_dtype or "float32"} <= set(DTYPES):
        got = ", ".join(sorted(request.dtypes | {request.residual_dtype or request.dtype}))
        return f"it takes {', '.join(DTYPES)}; parameters, inputs, carry and residuals are {got}"
    changed = kernel_body.why_not_as_declared(cell, "project", "mix", "output", "split")
    return (
        changed
        or missing_compiler(request.platform)
        or emit.why_not(cell, recurrence.variant_of(request, request.dtype, request.dtype))
    )


def missing_compiler(platform: str) -> str | None:
    """Reason why its loops cannot run on this platform, or None."""
    if platform != "cpu":
        return f"it needs a CPU, and JAX runs on {platform} here"
    if compiler.find() is None:
        return "it needs a C++ compiler, and none is found: install one, or name it in CXX"
    return None


def unchosen(request: Request) -> str | None:
    """Reason why this backend runs only where it is named."""
    del request
    return "only where it is named: it calls the C++ compiler of this machine"


def keeps_time_axis(request: Request) -> bool:
    """Whether inputs and outputs may have time where the caller has it, see `Request.time_axis`."""
    del request
    return True


def run(request: Request, params: CellParams, operands: Operands) -> Result:
    """Runs the cell, see `Operands` and `Result`."""
    return recurrence.run(request, params, operands)
