"""nn.Linear whose matmuls run in a recipe."""
from __future__ import annotations

import torch

from gradmill import functional, recipes
from gradmill.nn._layer import RecipeLayer


class Linear(RecipeLayer, torch.nn.Linear):
    """torch.nn.Linear with its three matmuls, and where the recipe says so its weight, in low precision.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        recipe: a name (see ``gradmill.recipes.RECIPES``) or a :class:`gradmill.recipes.Recipe`.

    ``state_dict`` keeps torch.nn.Linear's names; loading a float ``weight`` into a quantised layer packs it. Under a recipe that
    fakes (qat_w4, qat_w3, qat_w2) the layer has two more Parameters, ``weight_steps`` and ``weight_zeros`` (out, groups) fp32;
    loading a checkpoint without them takes them anew from its weight. After writing into the weight otherwise, call
    :meth:`reset_steps_`. Under one with delayed scaling it has the buffer ``amax_history`` (3, history) fp32: the largest magnitudes of X, W
    and dY in the steps before, in the state_dict; zeros, which is no history, where a checkpoint has none.

    Raises:
        ValueError: for a recipe that there is not; from ``forward``, which takes float32, bfloat16 or float16, for a shape (TypeError: a dtype).
    """

    _plain = torch.nn.Linear

    def __init__(self, in_features, out_features, bias=True, recipe="int8", device=None, dtype=None):
        recipe = recipes.get(recipe)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(recipe)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, recipe="int8") -> "Linear":
        """The same layer: parameters (the same objects, unless the recipe stores weights in low precision), hooks,
        training mode and any attributes set on it are kept."""
        return cls._from(linear, recipe)

    def _adopt(self, recipe: recipes.Recipe):
        super()._adopt(recipe)
        if recipe.history:
            self.register_buffer("amax_history", torch.zeros((3, recipe.history), dtype=torch.float32, device=self.weight.device))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if self.recipe.history and prefix + "weight" in state_dict and prefix + "amax_history" in missing_keys:
            missing_keys.remove(prefix + "amax_history")
            if self.amax_history.device == self.weight.device:
                self.amax_history.zero_()
            else:  # the weight was assigned over a layer on the meta device
                self.amax_history = torch.zeros_like(self.amax_history, device=self.weight.device)

    def dequantize_(self) -> torch.nn.Linear:
        new = super().dequantize_()
        new._buffers = {k: v for k, v in self._buffers.items() if k != "amax_history"}
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._look(x)
        return functional.linear(x, self.weight, self.bias, self.recipe, **self._steps, amax_history=self._buffers.get("amax_history"))

    @property
    def measured_as(self) -> tuple[int, ...]:
        """The shape by which gradmill.speeds knows the layer."""
        return self.in_features, self.out_features

    def kept_bytes(self) -> tuple[int, int]:
        """Bytes of 1,024 tokens' input kept for backward: by torch.nn.Linear, by this layer."""
        size = self.weight.dtype.itemsize
        outside = 1024 * -(-self.in_features // 8) if self.recipe.one_bit is not None else 0  # which elements dX is zero at
        return 1024 * self.in_features * size, self.recipe.saved_bytes(1024, self.in_features, size) + outside if self.weight.requires_grad else 0
