"""Recurrent cells, one per file: each defines its pointwise update, and the rest is derived from it."""

from rnncore.cells.base import Cell as Cell
from rnncore.cells.base import CellParams as CellParams
from rnncore.cells.base import GatedCell as GatedCell
from rnncore.cells.base import HiddenCarry as HiddenCarry
from rnncore.cells.base import PointwiseCell as PointwiseCell
from rnncore.cells.base import named
from rnncore.cells.elman import Elman as Elman
from rnncore.cells.elman import IndRNN as IndRNN
from rnncore.cells.gru import GRU as GRU
from rnncore.cells.gru_reset_before import ResetBeforeGRU as ResetBeforeGRU
from rnncore.cells.layer_norm import LayerNormGRU as LayerNormGRU
from rnncore.cells.layer_norm import LayerNormLSTM as LayerNormLSTM
from rnncore.cells.leaky import Leaky as Leaky
from rnncore.cells.lstm import LSTM as LSTM
from rnncore.cells.lstm import LSTMCarry as LSTMCarry
from rnncore.cells.mgu import MGU as MGU
from rnncore.cells.minimal import RGLRU as RGLRU
from rnncore.cells.minimal import MinGRU as MinGRU
from rnncore.cells.minimal import MinLSTM as MinLSTM
from rnncore.cells.projected_lstm import LSTMP as LSTMP
from rnncore.cells.projected_lstm import LSTMPParams as LSTMPParams
from rnncore.cells.qrnn import QRNN as QRNN
from rnncore.cells.qrnn import windows as windows
from rnncore.cells.reductions import ReducingCell as ReducingCell
from rnncore.cells.slstm import SLSTM as SLSTM
from rnncore.cells.slstm import SLSTMCarry as SLSTMCarry

_LSTMS = [LSTM(1, peepholes=p, coupled=c) for p in (False, True) for c in (False, True)]
for _cell in (*_LSTMS, GRU(1), MGU(1), Elman(1), IndRNN(1)):
    # Created at import, so that a process without such a cell can deserialize what `jax.export` wrote.
    _made = _cell.Gates, named("Units", tuple(_cell.units))
