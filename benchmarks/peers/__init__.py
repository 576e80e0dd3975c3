"""The contenders, behind the interface of `base.py`."""

from __future__ import annotations

from benchmarks.peers.base import Built as Built
from benchmarks.peers.base import Case as Case
from benchmarks.peers.base import Peer as Peer
from benchmarks.peers.flashrnn_peer import FlashRNNPeer
from benchmarks.peers.jax_peers import JAX_PEERS
from benchmarks.peers.rnncore_peer import RnncorePeer
from benchmarks.peers.torch_peer import TorchPeer
from benchmarks.workloads import GATES

PEERS: tuple[Peer, ...] = (RnncorePeer(), *JAX_PEERS, TorchPeer(), FlashRNNPeer())
"""In the order of a round."""

CONTENDERS: tuple[str, ...] = tuple(dict.fromkeys(c for p in PEERS for cell in GATES for c in p.contenders(cell)))
"""Every name that a record may have."""
