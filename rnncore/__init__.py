"""rnncore: recurrent networks in JAX that run fast and say where their gradients go."""

from rnncore import initializers as initializers
from rnncore.cells import GRU as GRU
from rnncore.cells import LSTM as LSTM
from rnncore.cells import MGU as MGU
from rnncore.cells import RGLRU as RGLRU
from rnncore.cells import Cell as Cell
from rnncore.cells import CellParams as CellParams
from rnncore.cells import Elman as Elman
from rnncore.cells import HiddenCarry as HiddenCarry
from rnncore.cells import IndRNN as IndRNN
from rnncore.cells import Leaky as Leaky
from rnncore.cells import LSTMCarry as LSTMCarry
from rnncore.cells import MinGRU as MinGRU
from rnncore.cells import MinLSTM as MinLSTM
from rnncore.cells import PointwiseCell as PointwiseCell
from rnncore.cells import ResetBeforeGRU as ResetBeforeGRU
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

__version__ = "0.1.0"
