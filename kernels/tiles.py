"""Which tiles a product is cut into: a committed table, so that nothing is tuned at import or in the first step, and the same shapes
give the same bits on every day.

tiles.json: architecture -> format -> shape class -> [BM, BN, BK, GROUP, warps, stages, programs a core]. "torch" lists the "format
class" pairs where the library's product (_int_mm, _scaled_mm) was measured faster; "from" says on which GPU a format's rows were measured.
Formats without an entry there have rows chosen by counting: the matrix instruction's own tile sizes, two or more stages that fit the
shared memory (163, 99, 227, 227, 64 KiB), accumulators that fit the registers. `python bench/tiles.py` measures and rewrites rows.
"""
from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from gradmill.kernels._common import INTERPRETING

TABLE_FILE = Path(__file__).with_name("tiles.json")
#: Formats of the table: operands of int8, of FP8 with scales by rows and by blocks; packed weights for 16-bit inputs, with one scale a tile
#: row and with gathered scales; fp32 inputs; signs and planes (BK in bytes).
FORMATS = ("int8", "fp8", "fp8_block", "packed", "gather", "fp32", "binary")
#: Shape classes of an (m, n) result, narrowest first; a format without a row for one takes the next.
CLASSES = ("m16", "m64", "small", "large")
#: Cores that the interpreter pretends to have: few, so that a program there walks several tiles too.
INTERPRETED_CORES = 2


class Tile(NamedTuple):
    bm: int
    bn: int
    bk: int
    group: int      # rows of tiles that are walked column by column
    warps: int
    stages: int
    programs: int   # that a core (SM, CU) holds at a time

    @property
    def launch(self) -> dict:
        return {"BM": self.bm, "BN": self.bn, "BK": self.bk, "GROUP": self.group, "num_warps": self.warps, "num_stages": self.stages}


def _read() -> dict:
    table = json.loads(TABLE_FILE.read_text())
    small = {"int8": (32, 32, 64), "fp8": (32, 32, 64), "fp8_block": (32, 32, 64), "packed": (32, 32, 32), "gather": (32, 32, 32), "fp32": (32, 32, 32),
             "binary": (16, 32, 8)}
    table["interpreter"] = {"from": {}, "torch": [], **{format: {"large": (*sizes, 2, 4, 1, 1)} for format, sizes in small.items()}}
    return table


TABLE = _read()


def architecture(device: torch.device) -> str:
    """The table's row for a device: the nearest architecture whose instructions and shared memory it has."""
    if INTERPRETING:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    named = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    return named.get(tuple(capability), "sm_89")  # 8.6, 8.9 and 12.x: 99 KiB of shared memory, mma.sync


def shape_class(m: int, n: int) -> str:
    """small: fewer tiles of 128 x 128 than an H100 has cores."""
    return "m16" if m <= 16 else "m64" if m <= 64 else "small" if m * n <= 128 << 14 else "large"


def choose(format: str, arch: str, m: int, n: int) -> Tile:
    rows = TABLE[arch][format]
    return Tile(*next(rows[c] for c in CLASSES[CLASSES.index(shape_class(m, n)):] if c in rows))


def torch_is_faster(format: str, arch: str, m: int, n: int) -> bool:
    return f"{format} {shape_class(m, n)}" in TABLE[arch]["torch"]


@functools.lru_cache(maxsize=None)
def cores(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def grid(m: int, n: int, tile: Tile, device: torch.device) -> tuple[int]:
    """As many programs as run at a time, each of which walks tiles until none is left."""
    tiles = -(-m // tile.bm) * -(-n // tile.bn)
    return (min(tiles, tile.programs * (INTERPRETED_CORES if INTERPRETING else cores(device))),)
