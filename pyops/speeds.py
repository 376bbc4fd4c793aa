"""How fast a recipe was measured to be beside torch's fp32: what ``convert`` warns from."""
from __future__ import annotations

import functools
import json
import math
import pathlib


@functools.cache
def _table() -> dict[str, dict[str, dict[str, float]]]:
    """{instruction set: {recipe: {"1024x4096": torch's fp32 time over the recipe's, forward and backward}}}, as
    ``python bench/speeds.py`` wrote it from committed results."""
    return json.loads(pathlib.Path(__file__).with_name("speeds.json").read_text())


def measured(recipe: str, inputs: int, outputs: int) -> float | None:
    """Speed of a recipe over torch's fp32 at the measured layer nearest in size to (inputs -> outputs), on a CPU of the
    instruction set that runs here. None where nothing like it was measured: a recipe or an instruction set without results,
    a layer more than 8 times smaller or larger than any."""
    from gradmill import _C

    shapes = _table().get(_C.isa() if _C else "", {}).get(recipe, {})
    distance = {name: abs(math.log2(max(1, inputs * outputs) / math.prod(map(int, name.split("x"))))) for name in shapes}
    nearest = min(distance, key=distance.get, default=None)
    return None if nearest is None or distance[nearest] > 3 else shapes[nearest]
