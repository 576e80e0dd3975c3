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

if TYPE_CHECKING:
    # For editors and type checkers, every name that is not replaced below is flax.nnx's, with its types.
    from rnncore.nnx._names import *  # noqa: F403

from rnncore import _arguments
from rnncore.nnx import explain as _explain  # noqa: F401
from rnncore.nnx.bidirectional import Bidirectional as Bidirectional
from rnncore.nnx.convert import from_functional as from_functional
from rnncore.nnx.convert import functional as functional
from rnncore.nnx.gated import GRUCell as GRUCell
from rnncore.nnx.gated import MGUCell as MGUCell
from rnncore.nnx.layers import GRU as GRU
from rnncore.nnx.layers import LSTM as LSTM
from rnncore.nnx.layers import Elman as Elman
from rnncore.nnx.lstm import LSTMCell as LSTMCell
from rnncore.nnx.lstm import OptimizedLSTMCell as OptimizedLSTMCell
from rnncore.nnx.own_cells import LayerNormGRUCell as LayerNormGRUCell
from rnncore.nnx.own_cells import LayerNormLSTMCell as LayerNormLSTMCell
from rnncore.nnx.own_cells import LeakyCell as LeakyCell
from rnncore.nnx.own_cells import LSTMPCell as LSTMPCell
from rnncore.nnx.own_cells import MinGRUCell as MinGRUCell
from rnncore.nnx.own_cells import MinLSTMCell as MinLSTMCell
from rnncore.nnx.own_cells import QRNNCell as QRNNCell
from rnncore.nnx.own_cells import RGLRUCell as RGLRUCell
from rnncore.nnx.own_cells import SLSTMCell as SLSTMCell
from rnncore.nnx.rnn import RNN as RNN
from rnncore.nnx.simple import IndRNNCell as IndRNNCell
from rnncore.nnx.simple import SimpleCell as SimpleCell

_OWN = (
    "Bidirectional",
    "Elman",
    "GRU",
    "GRUCell",
    "IndRNNCell",
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
        """All other names come from flax.nnx."""
        if name.startswith("__") or not hasattr(_flax, name):
            near = "" if name.startswith("__") else _arguments.nearest(name, __all__)
            raise AttributeError(f"module 'rnncore.nnx' has no attribute {name!r}, nor has flax.nnx{near}")
        return getattr(_flax, name)

    def __dir__() -> list[str]:
        return __all__
