"""Flax modules: `from rnncore import linen as nn` in place of Flax's.

The recurrent classes here have the fields, parameter trees, initial values, call signatures and
results of their flax.linen namesakes, so a model and its checkpoints carry over.  Every other name
is flax.linen's own.  `LSTM`, `GRU` and `Elman` are layers that Flax does not have; `SLSTMCell`,
`MinGRUCell` and the rest of `own_cells` are cells that it does not have.  `functional` turns a
trained Flax cell into the functional cell and its parameters, for `rnncore.unroll` and the analysis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as _flax

from rnncore import flax_modules as _modules
from rnncore.linen import _names
from rnncore.linen import explain as _explain  # noqa: F401
from rnncore.linen._names import *  # noqa: F403

if TYPE_CHECKING:
    # For editors and type checkers every other name is flax.linen's, with its types.  Of two imports of a name mypy
    # takes the first and pyright the last.
    from flax.linen import *  # type: ignore[assignment] # noqa: F403

    from rnncore.linen._names import *  # noqa: F403
else:
    __all__, __getattr__, __dir__ = _modules.front(__name__, _names, _flax)
