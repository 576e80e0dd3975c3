"""What is measured: named shapes, where each comes from, and what others published for it.

Letters: B sequences, T steps, D input features, H units (all heads together), N heads, L layers.
Published times are other people's, on their machines: they are printed beside a measurement and never
mixed with one.  So are times that this project wants to reach, and estimates of the least possible.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

MEASUREMENTS = ("forward", "gradient", "training_step")
"""forward: outputs.  gradient: <outputs, cotangent> and its gradients of all parameters and of the inputs.
training_step: one step of Adam on the mean squared distance of the outputs from a target."""
CELLS = ("lstm", "gru", "elman")
GATES = {"lstm": 4, "gru": 3, "elman": 1}
RECURRENCES = ("dense", "heads", "diagonal")
BOTH = ("forward", "gradient")
HALF = ("bfloat16", "float16")


class Published(NamedTuple):
    """A time that others published.

    Fields:
      contender, device, dtype: what ran, on what, in which type.
      forward_ms, gradient_ms: milliseconds of a forward pass, and of forward and backward together; None
        where nothing was published.
      input_product: whether x W is part of the time.
      source: where it stands.
    """

    contender: str
    device: str
    dtype: str
    forward_ms: float | None
    gradient_ms: float | None
    input_product: bool
    source: str


class Floor(NamedTuple):
    """An estimate, measured by nobody, of the least that a forward step can take.

    Fields:
      low_us, high_us: microseconds a step, from and to.
      device, dtype, input_product: as in `Published`.
      source: what it is computed from.
    """

    low_us: float
    high_us: float
    device: str
    dtype: str
    input_product: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape to measure.

    Fields:
      name, origin: what it is called, and whose benchmark it is.
      cell: of CELLS.
      batch, steps, features, hidden: B, T, D, H.
      heads, recurrence: N, and the structure of the recurrent kernel, of RECURRENCES.
      layers: L, each over the outputs of the one below.
      dtypes: of parameters, inputs and outputs; the first is the one that matters most.
      input_product: True: x W is inside the measured call.  False: it is given, and so is its gradient's place.
      measurements: of MEASUREMENTS.
      tags: "cpu", "gpu": where it is at home; "quick": also part of a short run.
      published: what others measured.
      wanted: what this project wants to reach, said like that.
      floor: an estimate of the least possible, or None.
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
    layers: int = 1
    recurrence: str = "dense"
    dtypes: tuple[str, ...] = ("float32",)
    input_product: tuple[bool, ...] = (True,)
    measurements: tuple[str, ...] = BOTH
    tags: frozenset[str] = frozenset({"gpu"})
    published: tuple[Published, ...] = ()
    wanted: tuple[Published, ...] = ()
    floor: Floor | None = None
    own_cell: bool = False

    def __post_init__(self) -> None:
        if self.cell not in CELLS or self.recurrence not in RECURRENCES or set(self.measurements) - set(MEASUREMENTS):
            raise ValueError(f"`Workload({self.name!r})`: an unknown cell, recurrence or measurement: {self}.")
        if self.hidden % self.heads or (self.heads > 1) != (self.recurrence == "heads"):
            what = f"heads={self.heads} do not fit {self.recurrence}, H={self.hidden}"
            raise ValueError(f"`Workload({self.name!r})`: {what}.")
        if self.layers > 1 and self.input_product != (True,):
            raise ValueError(f"`Workload({self.name!r})`: with several layers only the first could do without x W.")

    @property
    def gates(self) -> int:
        """G, how many gates the cell has."""
        return GATES[self.cell]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, T, D, H)."""
        return self.batch, self.steps, self.features, self.hidden


_CPU_SHAPES = ((32, 128, 128, 256), (16, 1000, 64, 128), (64, 100, 512, 512), (8, 256, 64, 64), (1, 512, 64, 64))
_S = tuple(
    Workload(
        f"S{n}", "this project: five shapes from large batches to a single sequence", "lstm", *shape,
        measurements=MEASUREMENTS, tags=frozenset({"cpu", "quick"} if n > 3 else {"cpu"}),
    )
    for n, shape in enumerate(_CPU_SHAPES, 1)
)  # fmt: skip

_FLASH = "FlashRNN (arXiv:2412.07752), speed_experiments of NX-AI/flashrnn, figure over head dimensions"
# DH, NH, then (forward, forward and backward) in ms of _FLASH_NAMES; H100 SXM.
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

_AIM = "this project's aim"
# By (DH, NH): (forward, forward and backward) in ms, without x W.
_AIMS: dict[tuple[int, int], tuple[float | None, float | None]] = {
    (64, 12): (1.0, 4.0), (32, 24): (1.0, None), (128, 6): (1.2, 5.0), (768, 1): (2.5, 6.0)
}  # fmt: skip
_OWN_AIM = Published(
    "*wanted: rnncore mosaic_gpu, own cell*", "H200", "bfloat16", None, None, False,
    f"{_AIM}: at most 1.2 times what the built-in LSTM takes",
)  # fmt: skip
_FLOOR = (
    "an estimate: arithmetic from 128 bytes of shared memory a clock and multiprocessor, the rate of the matrix unit "
    "and what it takes to synchronise a grid"
)
# By (DH, NH): microseconds a forward step, from and to.
_FLOORS = {(64, 12): (0.4, 0.6), (128, 6): (0.7, 1.0), (768, 1): (1.2, 1.6)}


def _wanted(size: int, heads: int) -> tuple[Published, ...]:
    """What is wanted of a shape of _FLASH_ROWS."""
    if (size, heads) not in _AIMS:
        return ()
    aim = Published("*wanted: rnncore*", "H200", "bfloat16", *_AIMS[size, heads], False, _AIM)
    return (aim, _OWN_AIM) if (size, heads) == (64, 12) else (aim,)


def _floor(size: int, heads: int) -> Floor | None:
    """What bounds a shape of _FLASH_ROWS, where that was estimated."""
    if (size, heads) not in _FLOORS:
        return None
    return Floor(*_FLOORS[size, heads], "H200", "bfloat16", False, _FLOOR)


def _flash(name: str, size: int, heads: int, batch: int = 16, steps: int = 1024, **rest: object) -> Workload:
    """A shape of FlashRNN's benchmark: 768 units in heads of `size`."""
    options: dict = {
        "cell": "lstm", "dtypes": ("bfloat16", "float32"), "input_product": (True, False), "origin": _FLASH
    } | rest  # fmt: skip
    return Workload(
        name=name, batch=batch, steps=steps, features=768, hidden=768, heads=heads,
        recurrence="heads" if heads > 1 else "dense", **options,
    )  # fmt: skip


_W1 = tuple(
    _flash(
        f"W1-{size}x{heads}", size, heads, tags=frozenset({"gpu", "quick"}),
        published=tuple(
            Published(who, "H100 SXM", "bfloat16", *ms, False, _FLASH)
            for who, ms in zip(_FLASH_NAMES, times, strict=True)
            if ms != (None, None)
        ) + (_FLASH_768 if heads == 1 else ()),
        wanted=_wanted(size, heads), floor=_floor(size, heads), own_cell=(size, heads) == (64, 12),
    )
    for size, heads, times in _FLASH_ROWS
)  # fmt: skip
_W2 = tuple(
    _flash(f"W2-{size}x{heads}-B{batch}", size, heads, batch=batch, dtypes=("bfloat16",))
    for size, heads in ((64, 12), (768, 1))
    for batch in (2, 8, 16, 32, 64, 128, 256)
)
_W3 = tuple(
    _flash(f"W3-{size}x{heads}-T{steps}", size, heads, steps=steps, dtypes=("bfloat16",))
    for size, heads in ((64, 12), (768, 1))
    for steps in (256, 512, 1024, 2048)
)
_W4 = (
    _flash(
        "W4-lstm768", 768, 1, dtypes=("float16", "bfloat16", "float32"), input_product=(True,),
        measurements=MEASUREMENTS[:2], published=_FLASH_768[:1], tags=frozenset({"gpu", "quick"}),
        origin="torch.nn.LSTM (cuDNN) at the largest head of FlashRNN's figure, in every type",
    ),
    Workload(
        "W4-gru768", "torch.nn.GRU (cuDNN) at the same size; its persistent algorithm is never chosen for a GRU",
        "gru", 16, 1024, 768, 768, dtypes=("float16", "bfloat16", "float32"), tags=frozenset({"gpu", "quick"}),
    ),
)  # fmt: skip

_SMALL = "xwang233/code-snippet cudnn-rnn-bench-62143, cited in pytorch/pytorch#62143"
# T, B, D, H, L, dtype, then (forward, backward) in ms of both cuDNN algorithms; the GPU is not named.
_SMALL_ROWS = (
    (3047, 6, 104, 40, 1, "float32", (20.7, 27.5), (2.0, 5.0)),
    (2721, 6, 128, 72, 1, "float32", (18.6, 34.2), (2.4, 4.5)),
    (3854, 16, 112, 128, 1, "float32", (36.6, 58.9), (10.2, 15.9)),
    (1252, 12, 304, 192, 1, "float16", (9.8, 15.0), (17.0, 14.6)),
    (5654, 5, 232, 64, 4, "float32", (146.5, 217.5), (13.5, 23.6)),
)
_W5 = tuple(
    Workload(
        f"W5-H{hidden}" + (f"-L{layers}" if layers > 1 else ""), _SMALL, "lstm", batch, steps, features, hidden,
        layers=layers, dtypes=(dtype,), tags=frozenset({"gpu", "quick"} if hidden in (40, 128) else {"gpu"}),
        published=tuple(
            Published(f"torch, cuDNN {name}", "a GPU not named", dtype, there, round(there + back, 3), True, _SMALL)
            for name, (there, back) in (("STANDARD", standard), ("PERSIST_STATIC_SMALL_H", small))
        ),
    )
    for steps, batch, features, hidden, layers, dtype, standard, small in _SMALL_ROWS
)  # fmt: skip

_W6 = tuple(
    Workload(
        f"W6-N{batch}-H{hidden}-C{features}", "Haste's benchmark (lmnt-com/haste): 50 steps, a subset of its grid",
        "lstm", batch, 50, features, hidden,
        tags=frozenset({"gpu", "quick"} if (batch, hidden, features) == (64, 512, 256) else {"gpu"}),
    )
    for batch in (1, 16, 64, 128)
    for hidden in (128, 512, 1024, 2048)
    for features in (128, 256)
)  # fmt: skip

_DEER = "DEER (arXiv:2309.12252), machine-discovery/deer experiments/01_speed_benchmark, mean of 5 seeds"
_DEER_MS = {
    1_000: ((9.96, 35.1), (0.557, 0.852)),
    10_000: ((97.4, 348.5), (0.713, 1.37)),
    100_000: ((972.0, 3473.0), (0.873, 4.30)),
}
_W7 = tuple(
    Workload(
        f"W7-H{hidden}-T{steps}", f"{_DEER}; as many features as units", "gru", 16, steps, hidden, hidden,
        tags=frozenset({"gpu", "quick"} if (hidden, steps) in ((8, 1000), (8, 10_000)) else {"gpu"}),
        published=tuple(
            Published(who, "a V100 is named in one file", "float32", *ms, True, _DEER)
            for who, ms in zip(("flax GRUCell in lax.scan", "DEER"), _DEER_MS[steps], strict=True)
            if hidden == 1
        ),
    )
    for hidden in (1, 8, 32, 64)
    for steps in _DEER_MS
)  # fmt: skip

_PARARNN = "the README of pararnn-torch 0.17.4: diagonal sLSTM, which is not this LSTM"
_PARARNN_MS = {256: (6.4, 112.0), 1024: (15.3, 429.0), 2048: (29.1, 840.0), 4096: (69.1, 1735.0)}
_W8 = tuple(
    Workload(
        f"W8-{cell}-H{hidden}-T{steps}", "ParaRNN (arXiv:2510.21450): diagonal recurrent kernels", cell, 8, steps,
        hidden, hidden, recurrence="diagonal",
        published=tuple(
            Published(who, "RTX 2080 Ti", "float32", ms, None, False, _PARARNN)
            for who, ms in zip(
                ("pararnn-torch, diagonal sLSTM", "pararnn-torch, compiled sequential sLSTM"), _PARARNN_MS[steps],
                strict=True,
            )
            if cell == "lstm" and hidden == 256
        ) if steps in _PARARNN_MS else (),
    )
    for cell in ("gru", "lstm")
    for steps, hidden in ((256, 256), (1024, 256), (2048, 256), (4096, 256), (512, 1024))
)  # fmt: skip

_TORCHRL = "pytorch/rl #3738 and #4174: the block GRU of DreamerV3, which has layer norm besides"
_DREAMER_MS: dict[tuple[int, int, int], dict[str, tuple[float | None, float | None]]] = {
    (16, 64, 512): {"torchrl Triton": (4.22, 7.44), "torchrl scan": (65.4, 115.0)},
    (16, 512, 512): {"torchrl Triton": (28.3, 62.6), "torchrl scan": (541.0, 855.0)},
    (256, 512, 128): {"torchrl Triton": (None, 19.6)},
}
_W9 = tuple(
    Workload(
        f"W9-B{batch}-H{hidden}-T{steps}", "the recurrence of DreamerV3 (arXiv:2301.04104) as torchrl times it", "gru",
        batch, steps, hidden, hidden, heads=8, recurrence="heads", dtypes=("bfloat16",),
        published=tuple(Published(who, "GB200", "bfloat16", *ms, True, _TORCHRL) for who, ms in times.items()),
    )
    for (batch, steps, hidden), times in _DREAMER_MS.items()
)  # fmt: skip

_W11 = tuple(
    _flash(
        f"W11-gru{size}x{heads}", size, heads, cell="gru", dtypes=("bfloat16",), input_product=(False,),
        origin="this project: a GRU in the shapes of FlashRNN's benchmark", tags=frozenset({"gpu", "quick"}),
    )
    for size, heads in _AIMS
)  # fmt: skip

_W12 = tuple(
    Workload(
        f"W12-H{hidden}",
        "this project: float32 layers of the usual sizes",
        "lstm",
        64,
        512,
        hidden,
        hidden,
        tags=frozenset({"gpu"}),
    )
    for hidden in (256, 512)
)

_TINY = tuple(
    Workload(name, "a check of the suite itself", cell, 2, 6, 5, 4, measurements=MEASUREMENTS, tags=frozenset(), **rest)
    for name, cell, rest in (
        ("tiny-lstm", "lstm", {"input_product": (True, False)}),
        ("tiny-gru", "gru", {"input_product": (True, False)}),
        ("tiny-elman", "elman", {}),
        ("tiny-heads", "gru", {"heads": 2, "recurrence": "heads"}),
        ("tiny-diagonal", "lstm", {"recurrence": "diagonal"}),
        ("tiny-layers", "lstm", {"layers": 2}),
    )
)

_ALL: tuple[Workload, ...] = (*_S, *_W1, *_W2, *_W3, *_W4, *_W5, *_W6, *_W7, *_W8, *_W9, *_W11, *_W12, *_TINY)
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _ALL}
"""By name.  The tiny ones have no tag: they run only where they are named."""

# What a short run on a GPU measures, the most telling first, in which types; without x W in bfloat16 only.
# Shapes in heads have few contenders and take little time; float32 has many, in two precisions.
QUICK_GPU: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("W1-768x1", ("bfloat16",)),
    ("W1-64x12", ("bfloat16",)),
    ("W1-128x6", ("bfloat16",)),
    ("W1-32x24", ("bfloat16",)),
    ("W11-gru64x12", ("bfloat16",)),
    ("W11-gru768x1", ("bfloat16",)),
    ("W4-lstm768", ("float16",)),
    ("W1-768x1", ("float32",)),
    ("W4-gru768", ("bfloat16", "float32")),
    ("W5-H40", ("float32",)),
    ("W11-gru128x6", ("bfloat16",)),
    ("W11-gru32x24", ("bfloat16",)),
    ("W1-256x3", ("bfloat16",)),
    ("W1-16x48", ("bfloat16",)),
    ("W7-H8-T1000", ("float32",)),
    ("W6-N64-H512-C256", ("float32",)),
    ("W5-H128", ("float32",)),
    ("W4-gru768", ("float16",)),
    ("W7-H8-T10000", ("float32",)),
)


def select(tag: str, quick: bool = False, names: Iterable[str] = ()) -> list[Workload]:
    """The workloads of a run, in the order in which they are to be run.

    Args:
      tag: "cpu" or "gpu".
      quick: only those of a short run; on a GPU the most telling first and in fewer types.
      names: these instead, whatever their tags; a name that ends in "*" stands for all that begin so.

    Raises:
      ValueError: an unknown tag or name, or nothing left.
    """
    if tag not in ("cpu", "gpu"):
        raise ValueError(f"`select(tag={tag!r})`: expected 'cpu' or 'gpu'.")
    wanted = [name for given in names for name in _named(given)]
    if wanted:
        return [WORKLOADS[name] for name in dict.fromkeys(wanted)]
    if tag == "gpu" and quick:
        return [_shortened(WORKLOADS[name], dtypes) for name, dtypes in QUICK_GPU]
    return [w for w in WORKLOADS.values() if tag in w.tags and (not quick or "quick" in w.tags)]


def _shortened(workload: Workload, dtypes: tuple[str, ...]) -> Workload:
    """For a short run on a GPU: in some types, no training steps, and where x W is left out that in bfloat16 only."""
    products = workload.input_product if dtypes == ("bfloat16",) else (True,)
    return dataclasses.replace(workload, dtypes=dtypes, measurements=BOTH, input_product=products)


def _named(given: str) -> list[str]:
    """The names that a name or a pattern such as `W1-*` stands for."""
    found = [n for n in WORKLOADS if (n.startswith(given[:-1]) if given.endswith("*") else n == given)]
    if not found:
        kinds = ", ".join(dict.fromkeys(n.split("-")[0] for n in WORKLOADS if WORKLOADS[n].tags))
        raise ValueError(f"`select(names=[{given!r}])`: no such workload; expected one of {kinds}, see --list.")
    return found
