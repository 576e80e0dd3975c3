"""Writes golden/torch.npz: what torch.nn.LSTM, GRU and RNN compute in float64, gradients included.

  python tests/make_golden.py

Every layer is bidirectional, so that one run gives both directions, and runs twice: on whole
sequences ("full") and on packed ones ("packed").  Numbers come from NumPy, not from torch's generator.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

PATH = pathlib.Path(__file__).parent / "golden" / "torch.npz"
MAKERS: dict[str, tuple[Any, dict[str, str]]] = {
    "lstm": (torch.nn.LSTM, {}),
    "gru": (torch.nn.GRU, {}),
    "rnn_tanh": (torch.nn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (torch.nn.RNN, {"nonlinearity": "relu"}),
}


def compute(
    kind: str, batch: int = 2, steps: int = 5, features: int = 3, hidden: int = 4, seed: int = 0
) -> dict[str, np.ndarray]:
    """One layer's parameters, inputs, cotangents ("d_"), results and gradients ("grad.") by name.

    Inputs and outputs are (B, T, .), states (2, B, H) with the forward direction first, parameters
    under torch's names.
    """
    rng = np.random.default_rng(seed)
    make, options = MAKERS[kind]
    layer = make(features, hidden, batch_first=True, bidirectional=True, **options).double()
    states = ["h", "c"] if kind == "lstm" else ["h"]
    given = {name: rng.normal(0, 0.6, tuple(p.shape)) for name, p in layer.named_parameters()}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.from_numpy(given[name]))
    given["xs"] = rng.normal(0, 1, (batch, steps, features))
    given |= {f"{s}_0": rng.normal(0, 1, (2, batch, hidden)) for s in states}
    given["d_outputs"] = rng.normal(0, 1, (batch, steps, 2 * hidden))
    given |= {f"d_{s}_n": rng.normal(0, 1, (2, batch, hidden)) for s in states}
    # torch packs no empty sequence; the lengths here are not sorted.
    lengths = np.resize([2, steps, 1, steps - 1], batch)

    made = {**given, "lengths": lengths}
    for run in ("full", "packed"):
        xs = torch.from_numpy(given["xs"].copy()).requires_grad_()
        start = [torch.from_numpy(given[f"{s}_0"].copy()).requires_grad_() for s in states]
        packed = pack_padded_sequence(xs, torch.from_numpy(lengths), batch_first=True, enforce_sorted=False)
        outputs, last = layer(xs if run == "full" else packed, tuple(start) if kind == "lstm" else start[0])
        if run == "packed":
            outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=steps)
        ends = list(last) if kind == "lstm" else [last]
        results = {"outputs": outputs, **{f"{s}_n": end for s, end in zip(states, ends, strict=True)}}
        inputs = {"xs": xs, **{f"{s}_0": first for s, first in zip(states, start, strict=True)}}
        inputs |= dict(layer.named_parameters())
        gradients = torch.autograd.grad(
            list(results.values()), list(inputs.values()), [torch.from_numpy(given[f"d_{r}"]) for r in results]
        )
        made |= {f"{run}.{name}": result.detach().numpy() for name, result in results.items()}
        made |= {f"{run}.grad.{name}": g.numpy() for name, g in zip(inputs, gradients, strict=True)}
    return made


def everything() -> dict[str, np.ndarray]:
    """What the file holds: names of all kinds behind "kind/"."""
    return {f"{kind}/{name}": a for kind in MAKERS for name, a in compute(kind).items()}


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, torch_version=np.asarray(torch.__version__), **everything())
    print(f"{PATH.name}: {PATH.stat().st_size} bytes, torch {torch.__version__}")
