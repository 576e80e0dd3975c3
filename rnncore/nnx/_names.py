"""The names of `rnncore.nnx` that are not flax.nnx's own."""

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
