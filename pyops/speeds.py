"""How fast a recipe was measured to be beside torch's fp32: what ``convert`` warns from."""
from __future__ import annotations

import functools
import json
import math
import pathlib


@functools.cache
def _table() -> dict[str, dict[str, dict[str, float]]]:
    """{instruction set: {recipe: {"1024x4096": torch's fp32 time over the recipe's, forward and backward}}}, a convolution's
    shape being "128x3x3x256", as ``python bench/speeds.py`` wrote it from committed results."""
    return json.loads(pathlib.Path(__file__).with_name("speeds.json").read_text())


def measured(recipe: str, *shape: int) -> float | None:
    """Speed of a recipe over torch's fp32 at the measured layer nearest in size to that of this ``shape``, on a CPU of the instruction
    set that runs here: (inputs, outputs) of a linear layer, (inputs, height, width of the window, outputs) of a convolution of one group.
    None where nothing like it was measured: a recipe, an instruction set or a window without results, a layer more than 8 times smaller or larger than any."""
    from gradmill import _C

    known = {tuple(map(int, name.split("x"))): speed for name, speed in _table().get(_C.isa() if _C else "", {}).get(recipe, {}).items()}
    distance = {other: abs(math.log2(max(1, math.prod(shape)) / math.prod(other))) for other in known if other[1:-1] == shape[1:-1]}
    nearest = min(distance, key=distance.get, default=None)
    return None if nearest is None or distance[nearest] > 3 else known[nearest]
