"""How a recurrence is laid over the blocks of a GPU: a pure function of shapes, cell and the device's figures.

The matrix of a head is cut into rows of 16 units (times the gates, in the forward loop) and into ranges of k.  A warp
has one of each: its fragments of the matrix lie in its registers, then in shared memory, and what is left is read
through the L2 cache at every step.  `split` warps share the rows of a group and add up their sums; `groups` groups and
`tiles` tiles of eight sequences make a block, `blocks` blocks a head.  All blocks of a head and a tile of sequences
have to run at once, because they wait for each other; so do, as they are launched, all others.
"""

from __future__ import annotations

import dataclasses
import functools
import math

ROWS, COLUMNS = 16, 8
"""Units and sequences of one instruction of the matrix unit."""
REGISTERS = 65536
"""Of a multiprocessor, in words: the same from compute capability 7.5 to 12.0."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What a layout depends on.

    Fields:
      name: as its maker calls it.
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


DEVICES = {
    d.name: d
    for d in (
        Device("T4", 40, 64 * 1024, 75, 1.4, 300), Device("A100", 108, 163 * 1024, 80, 1.4, 1555),
        Device("RTX 3090", 82, 99 * 1024, 86, 1.7, 936), Device("L4", 58, 99 * 1024, 89, 1.7, 300),
        Device("RTX 4090", 128, 99 * 1024, 89, 2.4, 1008), Device("H100", 132, 227 * 1024, 90, 1.75, 3350),
        Device("H200", 132, 227 * 1024, 90, 1.75, 4800), Device("B200", 148, 227 * 1024, 100, 1.8, 8000),
        Device("RTX 5090", 170, 99 * 1024, 120, 2.3, 1792),
    )
}  # fmt: skip
"""Some GPUs, by the figures of their makers."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A layout.

    Fields:
      direction: "forward" or "backward".
      dtype: of the product's operands: "bfloat16", "float16" or "float32".
      stored: of what is kept for the derivative.
      product: "mma", "tf32", "3xtf32" or "fma".
      size, heads, sequences: units of a head, heads, B.
      blocks, groups, split, tiles: see above.
      in_registers, in_shared, streamed: chunks of k of a warp by where they lie.
      shared: bytes of shared memory of a block.
      step: predicted microseconds of a step.
      lengths, resets, mask: whether there are lengths, resets, a recurrent mask.
      keeps, states: whether residuals, and the carries of all steps, are given out.
      apart: whether what enters the product has an array of its own.
      stay: for each field of the carry 0, 1 or 2: no zoneout, by booleans, by shares; empty for none at all.
    """

    direction: str
    dtype: str
    stored: str
    product: str
    size: int
    heads: int
    sequences: int
    blocks: int
    groups: int
    split: int
    tiles: int
    in_registers: int
    in_shared: int
    streamed: int
    shared: int
    step: float
    lengths: bool = False
    resets: bool = False
    mask: bool = False
    keeps: bool = False
    states: bool = False
    apart: bool = False
    stay: tuple[int, ...] = ()

    @property
    def threads(self) -> int:
        return 32 * self.groups * self.split

    @property
    def grid(self) -> int:
        return self.heads * self.blocks * -(-self.sequences // (COLUMNS * self.tiles))

    @property
    def chunk(self) -> int:
        """Numbers of k in 64 bytes."""
        return 64 // _bytes(self.dtype)

    @property
    def padded(self) -> int:
        """Units of a head in whole chunks."""
        return -(-self.size // self.chunk) * self.chunk


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def products(dtype: str, precision: str | None, capability: int) -> str:
    """The way to form the product: float32 follows `jax.default_matmul_precision`, by default TF32 as elsewhere in JAX."""
    if dtype != "float32":
        return "mma"
    if capability < 80:
        return "fma"
    low = (None, "default", "fastest", "bfloat16", "tensorfloat32", "bfloat16_3x")
    return "tf32" if precision in low else "3xtf32"


@functools.lru_cache(maxsize=1024)
def plan_of(
    device: Device, direction: str, dtype: str, stored: str, product: str, *, gates: int, size: int, heads: int,
    sequences: int, width: int, fields: int, lengths: bool = False, resets: bool = False, mask: bool = False,
    keeps: bool = False, states: bool = False, stay: tuple[int, ...] = (),
) -> Plan | str:  # fmt: skip
    """The layout with the shortest predicted step, or the reason why there is none.

    Args:
      gates, width, fields: of the cell: G, its residuals and its carry's fields.
    """
    if dtype == "bfloat16" and device.capability < 80:
        return f"bfloat16 takes a GPU of compute capability 8.0, and this one has {device.capability / 10}"
    best: Plan | None = None
    chunk = 64 // _bytes(dtype)
    chunks = -(-size // chunk)
    sets, depth = (gates, chunks) if direction == "forward" else (1, gates * chunks)
    rows = -(-size // ROWS)
    for groups in (1, 2, 3, 4, 6, 8, 12, 16):
        if groups > rows and groups > 1:
            continue
        for tiles in (1, 2, 4):
            if tiles > 1 and COLUMNS * (tiles // 2) >= sequences:
                continue
            for split in (1, 2, 3, 4, 6, 8, 12, 16):
                if groups * split > 16 or split > depth:
                    continue
                found = _laid_out(
                    device, direction, dtype, product, gates, size, heads, sequences, width, fields, groups, tiles,
                    split, sets, depth, rows, resets, mask, stored,
                )  # fmt: skip
                if found is not None and (best is None or found.step < best.step):
                    best = dataclasses.replace(
                        found, stored=stored, lengths=lengths, resets=resets, mask=mask, keeps=keeps,
                        states=states, stay=stay
                    )
    if best is None:
        return (
            f"{heads} heads of {size} units with {sequences} sequences take more blocks than {device.name}'s "
            f"{device.processors} multiprocessors run at once; give it fewer sequences at a time"
        )
    return best


def _laid_out(
    device: Device, direction: str, dtype: str, product: str, gates: int, size: int, heads: int, sequences: int,
    width: int, fields: int, groups: int, tiles: int, split: int, sets: int, depth: int, rows: int, resets: bool,
    mask: bool, stored: str,
) -> Plan | None:  # fmt: skip
    threads, each = 32 * groups * split, -(-depth // split)
    blocks = -(-rows // groups)
    alone = blocks == 1
    tile_count = -(-sequences // (COLUMNS * tiles))
    grid = heads * tile_count * blocks
    ahead = 1 if tiles >= 4 else min(each, 8 // tiles)
    own = 4 * tiles if split == 1 else -(-128 * tiles * groups // threads)
    # Registers of a thread: sums, chunks that have come in, what its units carry and read ahead, and the rest.
    inputs = gates + 1 if direction == "forward" else width + 1
    taken = 4 * sets * tiles + 4 * tiles * ahead * (2 if each > ahead else 1) + own * (2 * fields + inputs) + 64
    # Two blocks to a multiprocessor where they need each other's time.
    per = 1
    limit = min(255, REGISTERS // threads // 8 * 8)
    in_registers = min(each, max(0, limit - taken) // (8 * sets))
    chunk_bytes = groups * split * sets * 1024
    partial = 2 * groups * split * sets * tiles * 512 if split > 1 else 0
    padded = -(-size // (64 // _bytes(dtype))) * 64
    line = padded if direction == "forward" else padded * gates
    board = 2 * COLUMNS * tiles * (-(-line // 128) * 128 + 64) if alone else 0
    room = device.shared - partial - board
    if room < 0:
        return None
    in_shared = min(each - in_registers, room // chunk_bytes)
    streamed = each - in_registers - in_shared
    if grid > device.processors * per:
        return None
    apart = not alone and (mask or resets if direction == "forward" else stored != dtype)
    apart = apart or (not alone and size % (64 // _bytes(dtype)) != 0)
    step = _microseconds(
        device, direction, dtype, product, gates, sequences, width, groups, tiles, split, sets, each, in_shared,
        streamed, blocks, grid, own, line,
    )  # fmt: skip
    return Plan(
        direction, dtype, "", product, size, heads, sequences, blocks, groups, split, tiles, in_registers, in_shared,
        streamed, in_shared * chunk_bytes + partial + board, step, apart=apart,
    )  # fmt: skip


def _microseconds(
    device: Device, direction: str, dtype: str, product: str, gates: int, sequences: int, width: int, groups: int,
    tiles: int, split: int, sets: int, each: int, in_shared: int, streamed: int, blocks: int, grid: int, own: int,
    line: int,
) -> float:  # fmt: skip
    """A step by its parts, one after the other, in cycles of a multiprocessor; the figures are those of Hopper."""
    warps, alone = groups * split, blocks == 1
    passes = {"mma": 1, "tf32": 1, "3xtf32": 3, "fma": 24}[product]
    issue = 2 * each * sets * tiles * passes * math.ceil(warps / 4) * 8
    chain = 2 * each * passes * 33 / max(1, min(1, sets * tiles))
    cycles = max(issue, chain)
    cycles += (in_shared * warps * sets * 1024) / 128  # the matrix from shared memory
    cycles += (streamed * warps * sets * 1024) / 64 * max(1.0, grid / device.processors)
    read = COLUMNS * tiles * line
    if alone:
        cycles += 60 + read * groups / 128
    else:
        cycles += 1200 + read / 48 + read * grid / (3000 * device.processors / 132)
    if split > 1:
        cycles += 80 + warps * sets * tiles * 512 / 128 + own * sets * split * math.ceil(warps / 4)
    functions = 5 if direction == "forward" else 2
    cycles += 100 + own * functions * 8 * math.ceil(min(warps, groups * tiles * 4 / max(own, 1)) / 4) + own * 20
    return cycles / device.clock / 1000
