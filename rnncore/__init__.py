"""rnncore: fast recurrent networks in JAX, with exact analysis of their gradients.

- `unroll(cell, params, xs)` runs a cell over a sequence; `explain_backend` says how, and why.
- Cells: `LSTM`, `GRU`, `MGU`, `Elman`, `IndRNN`, `Leaky`, `MinLSTM`, `MinGRU`, `RGLRU`, `QRNN`, `SLSTM`, `LSTMP`,
  `LayerNormLSTM`, `LayerNormGRU`, `ResetBeforeGRU`; one of your own is a subclass of `PointwiseCell`; one of another
  library goes through `foreign_cell`.
- Recurrent kernels: `Dense`, `Heads`, `Diagonal`, `LowRank`, `Sparse`, `Dale`, `Unconnected`.
- Layers: `Stack` and `unroll_stack`; `from_torch`, `from_keras`, `from_haiku`, `from_equinox` and back.
- `rnncore.linen`, `rnncore.nnx`: drop-in replacements for flax.linen and flax.nnx.
- `rnncore.analysis`: Jacobians, gradients over time, retention, reports on whole models.
- `rnncore.training`, `rnncore.online`: truncated backpropagation; learning forward in time.
- `rnncore.parallel`: all steps at once, by Newton's method or a parallel scan.
- `rnncore.initializers`, `rnncore.gpu`: initial values; options of XLA for time loops.

`python -m rnncore --help`: which backend runs on this machine, and how fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rnncore import _arguments
from rnncore import initializers as initializers
from rnncore.cells import GRU as GRU
from rnncore.cells import LSTM as LSTM
from rnncore.cells import LSTMP as LSTMP
from rnncore.cells import MGU as MGU
from rnncore.cells import QRNN as QRNN
from rnncore.cells import RGLRU as RGLRU
from rnncore.cells import SLSTM as SLSTM
from rnncore.cells import Cell as Cell
from rnncore.cells import CellParams as CellParams
from rnncore.cells import Elman as Elman
from rnncore.cells import GatedCell as GatedCell
from rnncore.cells import HiddenCarry as HiddenCarry
from rnncore.cells import IndRNN as IndRNN
from rnncore.cells import LayerNormGRU as LayerNormGRU
from rnncore.cells import LayerNormLSTM as LayerNormLSTM
from rnncore.cells import Leaky as Leaky
from rnncore.cells import LSTMCarry as LSTMCarry
from rnncore.cells import LSTMPParams as LSTMPParams
from rnncore.cells import MinGRU as MinGRU
from rnncore.cells import MinLSTM as MinLSTM
from rnncore.cells import PointwiseCell as PointwiseCell
from rnncore.cells import ReducingCell as ReducingCell
from rnncore.cells import ResetBeforeGRU as ResetBeforeGRU
from rnncore.cells import SLSTMCarry as SLSTMCarry
from rnncore.cells import windows as windows
from rnncore.cells.recurrent_kernels import Dense as Dense
from rnncore.cells.recurrent_kernels import Diagonal as Diagonal
from rnncore.cells.recurrent_kernels import Heads as Heads
from rnncore.cells.recurrent_kernels import Recurrence as Recurrence
from rnncore.cells.structured_kernels import Dale as Dale
from rnncore.cells.structured_kernels import LowRank as LowRank
from rnncore.cells.structured_kernels import Sparse as Sparse
from rnncore.cells.structured_kernels import Unconnected as Unconnected
from rnncore.flax_modules import SlowPathWarning as SlowPathWarning
from rnncore.layers.compose import unroll_stack as unroll_stack
from rnncore.layers.equinox_weights import from_equinox as from_equinox
from rnncore.layers.equinox_weights import to_equinox as to_equinox
from rnncore.layers.foreign import foreign_cell as foreign_cell
from rnncore.layers.haiku_weights import from_haiku as from_haiku
from rnncore.layers.haiku_weights import to_haiku as to_haiku
from rnncore.layers.keras_weights import from_keras as from_keras
from rnncore.layers.keras_weights import to_keras as to_keras
from rnncore.layers.stack import Stack as Stack
from rnncore.layers.stack import StackParams as StackParams
from rnncore.layers.torch_weights import from_torch as from_torch
from rnncore.layers.torch_weights import to_torch as to_torch
from rnncore.sequence.call import States as States
from rnncore.sequence.call import explain_backend as explain_backend
from rnncore.sequence.call import unroll as unroll
from rnncore.sequence.choices import BackendChoice as BackendChoice
from rnncore.sequence.choices import BackendChoices as BackendChoices

if TYPE_CHECKING:
    from rnncore import analysis as analysis
    from rnncore import gpu as gpu
    from rnncore import linen as linen
    from rnncore import nnx as nnx
    from rnncore import online as online
    from rnncore import parallel as parallel
    from rnncore import training as training

__version__ = "0.1.0"

_LAZY = ("analysis", "gpu", "linen", "nnx", "online", "parallel", "training")
"""Modules that are imported on first use: they import Flax or optax, or are slow to import."""

if not TYPE_CHECKING:
    _public = {name for name, value in globals().items() if getattr(value, "__module__", "").startswith("rnncore.")}
    __all__ = sorted({*_LAZY, "initializers", *_public})

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return importlib.import_module(f"rnncore.{name}")
        near = "" if name.startswith("__") else _arguments.nearest(name, __all__)
        raise AttributeError(f"module 'rnncore' has no attribute {name!r}{near}")

    def __dir__() -> list[str]:
        return [*__all__, "__version__"]
