"""The contenders: one file a library, behind the interface of `base.py`."""

from __future__ import annotations

from benchmarks.peers.base import Built as Built
from benchmarks.peers.base import Case as Case
from benchmarks.peers.base import Peer as Peer
from benchmarks.peers.equinox_peer import EquinoxPeer
from benchmarks.peers.flashrnn_peer import FlashRNNPeer
from benchmarks.peers.flax_linen import LinenPeer
from benchmarks.peers.flax_nnx import NnxPeer
from benchmarks.peers.haiku_peer import HaikuPeer
from benchmarks.peers.jax_cudnn import JaxCudnnPeer
from benchmarks.peers.rnncore_peer import RnncorePeer
from benchmarks.peers.torch_peer import TorchPeer
from benchmarks.workloads import CELLS

PEERS: tuple[Peer, ...] = (
    RnncorePeer(), LinenPeer(), NnxPeer(), HaikuPeer(), EquinoxPeer(), TorchPeer(), JaxCudnnPeer(), FlashRNNPeer()
)  # fmt: skip
"""In the order of a round."""

CONTENDERS: tuple[str, ...] = tuple(dict.fromkeys(c for p in PEERS for cell in CELLS for c in p.contenders(cell)))
"""Every name that a record may have."""
