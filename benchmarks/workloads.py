"""What is measured: named shapes, where each comes from, and what others published for it.

Letters: B sequences, T steps, D input features, H units (all heads together).  Published times are other people's, on
their machines: they are printed beside a measurement and never mixed with one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

MEASUREMENTS = ("forward", "gradient")
"""forward: outputs.  gradient: <outputs, cotangent> and its gradients of all parameters and of the inputs."""
GATES = {"lstm": 4, "gru": 3, "elman": 1}
HALF = ("bfloat16", "float16")


class Published(NamedTuple):
    """A time that others published.

    Fields:
      contender, device, dtype: what ran, on what, in which type.
      forward_ms, gradient_ms: milliseconds of a forward pass, and of forward and backward together; None where
        nothing was published.
      input_product: whether x W is part of the time.
      source: where it was published.
    """

    contender: str
    device: str
    dtype: str
    forward_ms: float | None
    gradient_ms: float | None
    input_product: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape to measure.

    Fields:
      name, origin: what it is called, and whose benchmark it is.
      cell: a key of GATES.
      batch, steps, features, hidden: B, T, D, H.
      heads: blocks of the recurrent kernel; 1 is a dense kernel.
      dtypes: of parameters, inputs and outputs.
      input_product: True: x W is inside the measured call.  False: it is given, and its gradient is returned.
      tag: "cpu" or "gpu"; None for a shape that runs only where it is named.
      published: what others measured.
      own_cell: whether a user's own cell of the same arithmetic runs beside the built-in one.
    """

    name: str
    origin: str
    cell: str
    batch: int
    steps: int
    features: int
    hidden: int
    heads: int = 1
    dtypes: tuple[str, ...] = ("float32",)
    input_product: tuple[bool, ...] = (True,)
    tag: str | None = "gpu"
    published: tuple[Published, ...] = ()
    own_cell: bool = False

    @property
    def gates(self) -> int:
        """G, how many gates the cell has."""
        return GATES[self.cell]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, T, D, H)."""
        return self.batch, self.steps, self.features, self.hidden


CPU_SHAPES = ((32, 128, 128, 256), (16, 1000, 64, 128), (64, 100, 512, 512), (8, 256, 64, 64), (1, 512, 64, 64))
"""(B, T, D, H)"""
_FIVE = "this project: five shapes from large batches to a single sequence"
_S = tuple(Workload(f"S{n}", _FIVE, "lstm", *shape, tag="cpu") for n, shape in enumerate(CPU_SHAPES, 1))

_FLASH = "FlashRNN (arXiv:2412.07752), speed_experiments of NX-AI/flashrnn, figure over head dimensions"
# Units of a head, heads, then (forward, forward and backward) in ms of _FLASH_NAMES; H100 SXM.
_FLASH_ROWS: tuple[tuple[int, int, tuple[tuple[float | None, float | None], ...]], ...] = (
    (16, 48, ((1.97, 3.47), (3.56, 8.22), (7.84, 17.88), (150.16, 479.64))),
    (32, 24, ((1.44, 4.10), (2.90, 8.20), (8.12, 18.80), (149.71, 495.83))),
    (64, 12, ((1.99, 18.94), (3.10, 8.64), (8.19, 20.50), (152.03, 500.40))),
    (128, 6, ((3.23, None), (3.22, 9.02), (8.80, 21.66), (146.64, 485.64))),
    (256, 3, ((None, None), (3.62, 11.30), (10.47, 33.48), (154.16, 542.10))),
    (768, 1, ((None, None), (4.87, 13.61), (10.79, 26.49), (147.47, 484.28))),
)
_FLASH_NAMES = ("FlashRNN triton_fused", "FlashRNN cuda_fused", "FlashRNN cuda", "FlashRNN vanilla (torch)")
_FLASH_768 = (
    Published("torch", "H100 SXM", "float16", 2.01, 5.19, True, _FLASH),
    Published("Haste", "H100 SXM", "float32", 18.41, 43.86, True, _FLASH),
)
_768: dict[str, Any] = {"batch": 16, "steps": 1024, "features": 768, "hidden": 768}

_W1 = tuple(
    Workload(
        f"W1-{size}x{heads}", _FLASH, "lstm", **_768, heads=heads, dtypes=("bfloat16", "float32"),
        input_product=(True, False), own_cell=(size, heads) == (64, 12),
        published=tuple(
            Published(who, "H100 SXM", "bfloat16", *ms, False, _FLASH)
            for who, ms in zip(_FLASH_NAMES, times, strict=True)
            if ms != (None, None)
        ) + (_FLASH_768 if heads == 1 else ()),
    )
    for size, heads, times in _FLASH_ROWS
)  # fmt: skip
_EVERY = ("float16", "bfloat16", "float32")
_W4 = (
    Workload(
        "W4-lstm768", "torch.nn.LSTM (cuDNN) at the largest head of FlashRNN's figure, in every type", "lstm", **_768,
        dtypes=_EVERY, published=_FLASH_768[:1],
    ),
    Workload(
        "W4-gru768", "torch.nn.GRU (cuDNN) at the same size; its persistent algorithm is never chosen for a GRU", "gru",
        **_768, dtypes=_EVERY,
    ),
)  # fmt: skip

_SMALL = "xwang233/code-snippet cudnn-rnn-bench-62143, cited in pytorch/pytorch#62143"
# T, B, D, H, then (forward, backward) in ms of both cuDNN algorithms; the GPU is not named.
_SMALL_ROWS = ((3047, 6, 104, 40, (20.7, 27.5), (2.0, 5.0)), (3854, 16, 112, 128, (36.6, 58.9), (10.2, 15.9)))
_W5 = tuple(
    Workload(
        f"W5-H{hidden}", _SMALL, "lstm", batch, steps, features, hidden,
        published=tuple(
            Published(f"torch, cuDNN {name}", "a GPU not named", "float32", there, round(there + back, 3), True, _SMALL)
            for name, (there, back) in (("STANDARD", standard), ("PERSIST_STATIC_SMALL_H", small))
        ),
    )
    for steps, batch, features, hidden, standard, small in _SMALL_ROWS
)  # fmt: skip
_W11 = tuple(
    Workload(
        f"W11-gru{size}x{heads}", "this project: a GRU in the shapes of FlashRNN's benchmark", "gru", **_768,
        heads=heads, dtypes=("bfloat16",), input_product=(False,),
    )
    for size, heads in ((64, 12), (32, 24), (128, 6), (768, 1))
)  # fmt: skip
_W12 = tuple(
    Workload(f"W12-H{hidden}", "this project: float32 layers of the usual sizes", "lstm", 64, 512, hidden, hidden)
    for hidden in (256, 512)
)
_TINY = tuple(
    Workload(f"tiny-{name}", "a check of the suite itself", cell, 2, 6, 5, 4, heads, input_product=product, tag=None)
    for name, cell, heads, product in (
        ("lstm", "lstm", 1, (True, False)), ("gru", "gru", 1, (True, False)), ("elman", "elman", 1, (True,)),
        ("heads", "gru", 2, (True,)),
    )
)  # fmt: skip

WORKLOADS: dict[str, Workload] = {w.name: w for w in (*_S, *_W1, *_W4, *_W5, *_W11, *_W12, *_TINY)}
"""By name."""


def select(tag: str | None, names: Iterable[str] = ()) -> list[Workload]:
    """The workloads of a tag, or those named, whatever their tags; a name may end in "*".

    Raises:
      ValueError: an unknown name.
    """
    found = [w for given in names for w in _named(given)]
    return list(dict.fromkeys(found)) if found else [w for w in WORKLOADS.values() if tag is None or w.tag == tag]


def _named(given: str) -> list[Workload]:
    found = [w for n, w in WORKLOADS.items() if (n.startswith(given[:-1]) if given.endswith("*") else n == given)]
    if not found:
        kinds = ", ".join(dict.fromkeys(n.split("-")[0] for n in WORKLOADS if WORKLOADS[n].tag))
        raise ValueError(f"`select(names=[{given!r}])`: no such workload; expected one of {kinds}, see --list.")
    return found
