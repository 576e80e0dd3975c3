"""How a recurrence is mapped to the blocks of a GPU: a pure function of shapes, cell and device properties.

The matrix of a head is cut into rows of 16 units (times the gates, in the forward loop) and into ranges of k.  A warp
has one of each: its fragments of the matrix lie in its registers, then in shared memory, and what is left is read
through the L2 cache at every step.  `split` warps share the rows of a group and add up their sums; `groups` groups and
`tiles` tiles of eight sequences make a block, `blocks` blocks a head.  All blocks of a head and a tile of sequences
have to run at once, because they wait for each other; so do, as they are launched, all others.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

ROWS, COLUMNS = 16, 8
"""Units and sequences of one instruction of the matrix unit."""
REGISTERS = 65536
"""Of a multiprocessor, in words: the same from compute capability 7.5 to 12.0."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What a layout depends on.

    Fields:
      name: the vendor's name.
      processors: multiprocessors.
      shared: bytes of shared memory that a block may have.
      capability: compute capability times ten, such as 90.
      clock: GHz, for the estimate.
      bandwidth: of memory, GB/s, for the estimate.
    """

    name: str
    processors: int
    shared: int
    capability: int
    clock: float = 1.7
    bandwidth: float = 1000.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a run asks for.

    Fields:
      direction: "forward" or "backward".
      dtype: of the product's operands: "bfloat16", "float16" or "float32".
      stored: of what is kept for the derivative.
      product: "mma", "tf32", "3xtf32" or "fma".
      gates, fields, width: of the cell: G, its carry's fields, its residuals.
      size, heads, sequences: units of a head, heads, B.
      lengths, resets, mask: whether there are lengths, resets, a recurrent mask.
      keeps, states: whether residuals, and the carries and gates of all steps, are given out.
      zoneout: for each field of the carry 0 to 3: none, by booleans, by shares, by one share; empty for none at all.
    """

    direction: str
    dtype: str
    stored: str
    product: str
    gates: int
    fields: int
    width: int
    size: int
    heads: int
    sequences: int
    lengths: bool = False
    resets: bool = False
    mask: bool = False
    keeps: bool = False
    states: bool = False
    zoneout: tuple[int, ...] = ()

    @property
    def chunk(self) -> int:
        """Numbers of k in 64 bytes."""
        return 64 // (4 if self.dtype == "float32" else 2)

    @property
    def chunks(self) -> int:
        """Of k, for one gate."""
        return -(-self.size // self.chunk)

    @property
    def padded(self) -> int:
        """Units of a head in whole chunks."""
        return self.chunks * self.chunk

    @property
    def rows(self) -> int:
        """Groups of units."""
        return -(-self.size // ROWS)

    @property
    def sets(self) -> int:
        """Fragments of a group."""
        return self.gates if self.direction == "forward" else 1

    @property
    def depth(self) -> int:
        """Chunks of k in all."""
        return self.chunks * (1 if self.direction == "forward" else self.gates)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A layout.

    Fields:
      shape: of what.
      sync: how the blocks of a head wait for each other: "none" for one, "cluster" or "grid".
      blocks, groups, split, tiles: see above.
      in_registers, in_shared, streamed: chunks of k of a warp by where they lie.
      ahead: chunks of the other operand that are fetched at a time.
      sums: 2 where the warps' sums of one step lie beside those of the next, 1 where they wait for them.
      shared: bytes of shared memory of a block.
      apart: whether what enters the product has an array of its own.
      step: predicted microseconds of a step.
    """

    shape: Shape
    sync: str
    blocks: int
    groups: int
    split: int
    tiles: int
    in_registers: int
    in_shared: int
    streamed: int
    ahead: int
    sums: int
    shared: int
    apart: bool
    step: float

    def __str__(self) -> str:
        waits = {"none": "none waits", "cluster": "a head's in a cluster", "grid": "a head's wait for each other"}
        places = {"registers": self.in_registers, "shared memory": self.in_shared, "the L2 cache": self.streamed}
        matrix = " and ".join(f"{count} / {self.each} in {place}" for place, count in places.items() if count)
        return (
            f"{self.grid} blocks of {self.threads} threads ({waits[self.sync]}), {COLUMNS * self.tiles} sequences "
            f"each; of the matrix {matrix}; {self.step:.2f} us a step predicted"
        )

    @property
    def each(self) -> int:
        """Chunks of k of a warp."""
        return self.in_registers + self.in_shared + self.streamed

    @property
    def threads(self) -> int:
        return 32 * self.groups * self.split

    @property
    def grid(self) -> int:
        return self.shape.heads * self.blocks * -(-self.shape.sequences // (COLUMNS * self.tiles))

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.blocks if self.sync == "cluster" else 1


def products(dtype: str, precision: str | None, capability: int) -> str:
    """How the product is computed; float32 follows `jax.default_matmul_precision`, by default TF32 as JAX does."""
    if dtype != "float32":
        return "mma"
    if capability < 80:
        return "fma"
    low = (None, "default", "fastest", "bfloat16", "tensorfloat32", "bfloat16_3x")
    return "tf32" if precision in low else "3xtf32"


@functools.lru_cache(maxsize=1024)
def plan_of(device: Device, shape: Shape) -> Plan | str:
    """The layout with the shortest predicted step, or the reason why none fits."""
    if shape.dtype == "bfloat16" and device.capability < 80:
        return f"bfloat16 takes a GPU of compute capability 8.0, and this one has {device.capability / 10}"
    best = min(layouts(device, shape), key=lambda plan: plan.step, default=None)
    if best is None:
        return (
            f"{shape.heads} heads of {shape.size} units with {shape.sequences} sequences take more blocks than "
            f"{device.name}'s {device.processors} multiprocessors run at once; give it fewer sequences at a time"
        )
    return best


def layouts(device: Device, shape: Shape) -> Iterator[Plan]:
    """All that fit."""
    for groups, tiles, split in itertools.product(_GROUPS, _TILES, _SPLITS):
        if groups > shape.rows or groups * split > 16 or split > shape.depth:
            continue
        if tiles > 1 and COLUMNS * (tiles // 2) >= shape.sequences:
            continue
        # Blocks exchange whole chunks, and every unit of a chunk needs a block that writes it.
        together = -(-shape.padded // ROWS // groups)
        for sync in ("none",) if shape.rows <= groups else ("cluster", "grid"):
            found = _laid_out(device, shape, sync, 1 if sync == "none" else together, groups, split, tiles)
            if found is not None:
                yield found


_GROUPS, _TILES, _SPLITS = (1, 2, 3, 4, 6, 8, 12, 16), (1, 2, 4), (1, 2, 3, 4, 6, 8, 12, 16)
_CLUSTERS = (2, 4, 8, 16)


def _laid_out(device: Device, shape: Shape, sync: str, blocks: int, groups: int, split: int, tiles: int) -> Plan | None:
    grid = shape.heads * -(-shape.sequences // (COLUMNS * tiles)) * blocks
    if sync == "grid" and grid > device.processors:
        return None
    whole = blocks * groups * ROWS == shape.padded
    if sync == "cluster" and not (whole and device.capability in (90, 100) and blocks in _CLUSTERS):
        return None
    sets, each, warps = shape.sets, -(-shape.depth // split), groups * split
    own = 4 * tiles if split == 1 else -(-128 * tiles * groups // (32 * warps))
    inputs = shape.gates + 1 if shape.direction == "forward" else shape.width + 1
    limit = min(255, REGISTERS // (32 * warps) // 8 * 8)
    changed = shape.mask or shape.resets if shape.direction == "forward" else shape.stored != shape.dtype
    apart = sync == "grid" and (changed or shape.size != shape.padded)
    line = shape.depth * 64
    board = 2 * COLUMNS * tiles * (-(-line // 128) * 128 + 64) + 128 if sync != "grid" else 0
    best: Plan | None = None
    most = max(1, min(each, 8 // tiles))
    reserve = 24 * (tiles > 1 or device.capability < 80) + 48 * (shape.product == "3xtf32")
    for ahead, sums, spare in itertools.product(
        sorted({most, -(-most // 2), 1}, reverse=True), (2, 1), sorted({reserve, 0}, reverse=True)
    ):
        # Registers per thread: sums, chunks already fetched, its units' carry and prefetched inputs, and the rest.
        fetched = 4 * tiles * ahead * (2 if each > ahead else 1)
        taken = 4 * sets * tiles + fetched + own * (2 * shape.fields + inputs + 4) + 60 + 2 * tiles
        # The compiler's own use is known to within a few registers; any excess is spilled.
        taken += spare
        in_registers = min(each, max(0, limit - taken) // (8 * sets))
        partial = sums * warps * sets * tiles * 512 if split > 1 else 0
        room = device.shared - partial - board
        if room < 0:
            continue
        chunk_bytes = warps * sets * 1024
        in_shared = min(each - in_registers, room // chunk_bytes)
        plan = Plan(
            shape, sync, blocks, groups, split, tiles, in_registers, in_shared, each - in_registers - in_shared, ahead,
            sums, in_shared * chunk_bytes + partial + board, apart, 0.0,
        )  # fmt: skip
        step = _microseconds(device, plan, own, min(limit, taken + 8 * sets * in_registers))
        step += (0.2 if shape.product != "3xtf32" else 3.0) * (spare < reserve)
        plan = dataclasses.replace(plan, step=step)
        best = plan if best is None or plan.step < best.step else best
    return best


def _microseconds(device: Device, plan: Plan, own: int, registers: int) -> float:
    """The predicted step: cycles by what a layout does, fitted to 149 layouts that were timed on an H200.

    Half of them are within a tenth of the fit; a few figures are moved so that the best layouts of the rows that matter
    come first.
    """
    shape, warps, tiles, split = plan.shape, plan.groups * plan.split, plan.tiles, plan.split
    sets, forward = shape.sets, shape.direction == "forward"
    passes = {"mma": 1, "tf32": 2, "3xtf32": 8, "fma": 40}[shape.product]
    rounds = -(-min(warps, -(-plan.groups * tiles * 4 // own)) // 4)  # of warps with pairs, four of which run at once
    moved = shape.gates + 1 + (shape.width if shape.keeps or not forward else 0)  # numbers in and out, of a pair
    read = COLUMNS * tiles * shape.depth * 64
    cycles = (710.0 if plan.sync == "none" else 860.0) + own * rounds * (
        106 + (27 if split == 1 else 17) * moved + (6 * sets * split if split > 1 else 0)
    )
    cycles += 2 * plan.each * passes * (4 * sets * tiles * -(-warps // 4) + 23)
    cycles += (1.8 * plan.in_shared + 2 * plan.streamed) * warps * sets * 8 + 600 * (plan.streamed > 0)
    if plan.sync == "grid":
        cycles += 1330 + read / 50 + read * plan.grid / 64 / device.processors * 1.45
        cycles += 70 * warps * (not forward) + 60 * (-(-plan.each // plan.ahead) - 1)
    if plan.sync == "cluster":
        sent = (1 if forward else shape.gates) * max(1.0, plan.blocks * 4 / shape.chunk)
        cycles += 460 + read / 18 + 90 * own * rounds * sent
    cycles += 60 * (plan.sums == 1)
    return _waves(device, plan, registers) * cycles / device.clock / 1000


def _waves(device: Device, plan: Plan, registers: int) -> int:
    """How many waves of blocks there are.  Clusters run in parts of the chip of about 18 processors, or 16 of them."""
    if plan.sync == "grid":
        return 1
    each = max(
        1, min(REGISTERS // (plan.threads * registers), 2048 // plan.threads, device.shared // (plan.shared + 1))
    )
    if plan.sync == "none":
        return -(-plan.grid // (device.processors * each))
    at_once = device.processors // 18 * (18 // plan.blocks) * each
    return -(-(plan.grid // plan.blocks) // max(1, at_once))
