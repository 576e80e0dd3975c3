"""The names of `rnncore.linen` that are not flax.linen's own."""

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
