"""Quantisation-aware training: from layers that fake quantisation to packed ones (Chen et al., "EfficientQAT")."""
from __future__ import annotations

import torch

from gradmill.formats import Format
from gradmill.nn._layer import RecipeLayer
from gradmill.recipes import RECIPES, Recipe
from gradmill.reference.quant import SMALLEST_STEP, _fake_codes, pack_bits, round_even
from gradmill.weight import QuantizedWeight, as_matrix

__all__ = ["pack"]


@torch.no_grad()
def pack(model: torch.nn.Module, train_steps: bool = True) -> list[str]:
    """Packs every layer of a recipe that fakes (qat_w4, qat_w3, qat_w2), in place: the end of Block-AP and the start of E2E-QP.

    The packed weight has exactly the values the layer's products saw: its codes, its steps as scales, its zero points rounded. The layer's
    recipe becomes the weight-only one of the same bits and group (w4, w3, w2), and its parameters are new: make the optimizer afterwards.

    Args:
        model: a module with such layers inside, or one of them itself.
        train_steps: make the step sizes a Parameter ``steps`` (see ``gradmill.nn.Linear.train_steps_``), and nothing else of the layer but its bias.

    Returns:
        The names of the packed layers. ValueError where there is none, or where one's bits have no packed format (8, 4, 3 and 2 have).
    """
    packed = []
    for name, layer in model.named_modules():
        if not (isinstance(layer, RecipeLayer) and layer.recipe.fake is not None):
            continue
        bits, group = layer.recipe.fake
        if bits not in (2, 3, 4, 8):
            raise ValueError(f"layer {name!r} fakes {bits} bits; only 8, 4, 3 and 2 can be packed")
        format = Format(f"uint{bits}", group)
        weight, steps, zeros = (layer._parameters.pop(n).detach() for n in ("weight", "weight_steps", "weight_zeros"))
        matrix = as_matrix(weight)
        rows, columns = matrix.shape
        *_, codes, _ = _fake_codes(matrix, steps, zeros, bits, group)
        bad = ~torch.isfinite(_fake_codes(matrix, steps, zeros, bits, group)[0]).all(-1)
        codes = codes.flatten(1)[:, :columns].nan_to_num(0.0).to(torch.int64)
        codes = pack_bits(codes, bits) if bits < 8 else codes.to(torch.uint8)
        scales = torch.where(bad, torch.nan, torch.where(steps < SMALLEST_STEP, SMALLEST_STEP, steps)).to(torch.float32).contiguous()
        points = round_even(zeros.clamp(0, 2.0 ** bits - 1)).nan_to_num(0.0).to(torch.uint8).contiguous()
        layer.register_parameter("weight", torch.nn.Parameter(QuantizedWeight(codes, scales, points, format, weight.shape, weight.dtype), False))
        known = RECIPES.get(f"w{bits}")
        layer.recipe = known if known is not None and known.weight == format else Recipe(f"w{bits}", weight=format, frozen=True)
        if train_steps:
            layer.train_steps_()
        packed.append(name)
    if not packed:
        raise ValueError("model has no layer whose recipe fakes (qat_w4, qat_w3, qat_w2); gradmill.convert makes them")
    return packed
