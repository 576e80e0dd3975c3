"""Flax NNX modules: `from rnncore import nnx` in place of Flax's.

The recurrent classes here have the constructors, state trees, initial values, call signatures and
results of their flax.nnx namesakes, so a model and its checkpoints carry over; `MGUCell`,
`IndRNNCell`, the cells of `own_cells` and the layers `LSTM`, `GRU` and `Elman` are new.  Every other
name is flax.nnx's own.  `functional` turns a trained cell into the functional cell and its
parameters, for `rnncore.unroll` and the analysis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flax import nnx as _flax

from rnncore import flax_modules as _modules
from rnncore.nnx import _names
from rnncore.nnx import explain as _explain  # noqa: F401
from rnncore.nnx._names import *  # noqa: F403

if TYPE_CHECKING:
    # For editors and type checkers every other name is flax.nnx's, with its types.  Of two imports of a name mypy
    # takes the first and pyright the last.
    from flax.nnx import *  # type: ignore[assignment] # noqa: F403

    from rnncore.nnx._names import *  # noqa: F403
else:
    __all__, __getattr__, __dir__ = _modules.front(__name__, _names, _flax)
