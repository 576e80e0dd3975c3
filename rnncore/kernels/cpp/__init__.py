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

from rnncore.cells.base import PointwiseCell
from rnncore.cells.recurrent_kernels import Dense, Heads
from rnncore.kernels import kernel_body
from rnncore.kernels.cpp import compiler, emit, recurrence
from rnncore.recurrence.backend import without
from rnncore.recurrence.run import Request

DTYPES = ("float32", "float64")


class Cpp(recurrence.CppLoops):
    """See the package."""

    name = "cpp"
    must_be_named = "only where it is named: it calls the C++ compiler of this machine"
    keeps_time_axis = True

    def unsupported(self, request: Request) -> str | None:
        cell = request.cell
        if not isinstance(cell, PointwiseCell):
            return f"{type(cell).__name__} is not a PointwiseCell, so no loop can be made of its pointwise update"
        if not isinstance(cell.recurrence, Dense | Heads):
            return f"{type(cell.recurrence).__name__} recurrences have no product; it has loops for Dense and Heads"
        refused = without(
            request,
            ("zoneout", "return_states", "checkpoint_every", "recompute", "residual_dtype"),
            "its loop runs all steps at once and keeps what the derivative needs as it is",
        )
        if refused is None and 0 in request.batch_shape:
            refused = f"it takes no empty batch, and this one is {request.batch_shape}"
        if refused is not None:
            return refused
        if request.dtype not in DTYPES or request.dtypes != {request.dtype}:
            got = ", ".join(sorted(request.dtypes))
            return f"it takes float32 or float64, one of them; parameters, inputs and carry are {got}"
        changed = kernel_body.why_not_as_declared(cell, "project", "mix", "output", "split")
        return changed or missing_compiler(request.platform) or emit.why_not(cell, request.dtype)


def missing_compiler(platform: str) -> str | None:
    """Reason why its loops cannot run on this platform, or None."""
    if platform != "cpu":
        return f"it needs a CPU, and JAX runs on {platform} here"
    if compiler.find() is None:
        return "it needs a C++ compiler, and none is found: install one, or name it in CXX"
    return None
