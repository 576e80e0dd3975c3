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

if TYPE_CHECKING:
    # For editors and type checkers, every name that is not replaced below is flax.linen's, with its types.
    from rnncore.linen._names import *  # noqa: F403

from rnncore import _arguments
from rnncore.linen import explain as _explain  # noqa: F401
from rnncore.linen.bidirectional import Bidirectional as Bidirectional
from rnncore.linen.cells import GRUCell as GRUCell
from rnncore.linen.cells import LSTMCell as LSTMCell
from rnncore.linen.cells import MGUCell as MGUCell
from rnncore.linen.cells import OptimizedLSTMCell as OptimizedLSTMCell
from rnncore.linen.cells import SimpleCell as SimpleCell
from rnncore.linen.conv import ConvLSTMCell as ConvLSTMCell
from rnncore.linen.convert import from_functional as from_functional
from rnncore.linen.convert import functional as functional
from rnncore.linen.layers import GRU as GRU
from rnncore.linen.layers import LSTM as LSTM
from rnncore.linen.layers import Elman as Elman
from rnncore.linen.own_cells import LayerNormGRUCell as LayerNormGRUCell
from rnncore.linen.own_cells import LayerNormLSTMCell as LayerNormLSTMCell
from rnncore.linen.own_cells import LeakyCell as LeakyCell
from rnncore.linen.own_cells import LSTMPCell as LSTMPCell
from rnncore.linen.own_cells import MinGRUCell as MinGRUCell
from rnncore.linen.own_cells import MinLSTMCell as MinLSTMCell
from rnncore.linen.own_cells import QRNNCell as QRNNCell
from rnncore.linen.own_cells import RGLRUCell as RGLRUCell
from rnncore.linen.own_cells import SLSTMCell as SLSTMCell
from rnncore.linen.rnn import RNN as RNN

_OWN = (
    "Bidirectional",
    "ConvLSTMCell",
    "Elman",
    "GRU",
    "GRUCell",
    "LSTM",
    "LSTMCell",
    "LSTMPCell",
    "LayerNormGRUCell",
    "LayerNormLSTMCell",
    "LeakyCell",
    "MGUCell",
    "MinGRUCell",
    "MinLSTMCell",
    "OptimizedLSTMCell",
    "QRNNCell",
    "RGLRUCell",
    "RNN",
    "SLSTMCell",
    "SimpleCell",
    "from_functional",
    "functional",
)

if not TYPE_CHECKING:
    __all__ = sorted({*_OWN, *(name for name in dir(_flax) if not name.startswith("_"))})

    def __getattr__(name: str) -> object:
        """All other names come from flax.linen."""
        if name.startswith("__") or not hasattr(_flax, name):
            near = "" if name.startswith("__") else _arguments.nearest(name, __all__)
            raise AttributeError(f"module 'rnncore.linen' has no attribute {name!r}, nor has flax.linen{near}")
        return getattr(_flax, name)

    def __dir__() -> list[str]:
        return __all__
