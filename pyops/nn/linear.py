"""nn.Linear whose matmuls run in a recipe."""
from __future__ import annotations

import torch

from gradmill import functional, recipes
from gradmill.ops.quant import fake_quantize
from gradmill.weight import QuantizedWeight

_FAKE = ("weight_steps", "weight_zeros")  # Parameters of a recipe that fakes


class Linear(torch.nn.Linear):
    """torch.nn.Linear with its three matmuls, and where the recipe says so its weight, in low precision.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        recipe: a name (see ``gradmill.recipes.RECIPES``) or a :class:`gradmill.recipes.Recipe`.

    ``state_dict`` keeps torch.nn.Linear's names; loading a float ``weight`` into a quantised layer packs it. Under a recipe that
    fakes (qat_w4, qat_w3, qat_w2) the layer has two more Parameters, ``weight_steps`` and ``weight_zeros`` (out, groups) fp32;
    loading a checkpoint without them takes them anew from its weight. After writing into the weight otherwise, call
    :meth:`reset_steps_`.
    """

    def __init__(self, in_features, out_features, bias=True, recipe="int8", device=None, dtype=None):
        recipe = recipes.get(recipe)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(recipe)

    def _adopt(self, recipe: recipes.Recipe):
        self.recipe = recipe
        if recipe.weight is not None and not isinstance(self.weight, QuantizedWeight):
            requires_grad = self.weight.requires_grad and not recipe.frozen
            self.weight = torch.nn.Parameter(QuantizedWeight.quantize(self.weight.detach(), recipe.weight), requires_grad)

        if recipe.fake is not None:
            for name, start in zip(_FAKE, functional.fake_quantize_parameters(self.weight.detach(), *recipe.fake)):
                self.register_parameter(name, torch.nn.Parameter(start, self.weight.requires_grad))

    def reset_steps_(self) -> "Linear":
        """Takes steps and zero points anew from the range of each group of the weight. ValueError unless the recipe fakes."""
        if self.recipe.fake is None:
            raise ValueError(f"recipe is {self.recipe.name}; only one that fakes (qat_w4, qat_w3, qat_w2) has steps to reset")
        for name, start in zip(_FAKE, functional.fake_quantize_parameters(self.weight.detach(), *self.recipe.fake)):
            old = self._parameters[name]
            if old.device == start.device:
                with torch.no_grad():
                    old.copy_(start)
            else:  # the weight was assigned over a layer on the meta device
                self._parameters[name] = torch.nn.Parameter(start, old.requires_grad)
        return self

    def reset_parameters(self):
        super().reset_parameters()
        if self._parameters.get("weight_steps") is not None:  # not yet there when torch.nn.Linear's constructor calls
            self.reset_steps_()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        names = [prefix + name for name in _FAKE]
        if self.recipe.fake is not None and prefix + "weight" in state_dict and not any(name in state_dict for name in names):
            missing_keys[:] = [key for key in missing_keys if key not in names]
            self.reset_steps_()

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, recipe="int8") -> "Linear":
        """The same layer: parameters (the same objects, unless the recipe stores weights in low precision), hooks,
        training mode and any attributes set on it are kept."""
        new = cls.__new__(cls)
        new.__dict__ = linear.__dict__.copy()
        for name in ("_parameters", "_buffers", "_modules"):
            new.__dict__[name] = linear.__dict__[name].copy()
        new._adopt(recipes.get(recipe))
        return new

    def train_steps_(self, mode: bool = True) -> "Linear":
        """Makes the step sizes (scales) of a packed weight a Parameter ``steps`` (out, groups) fp32, or packs them back:
        the end-to-end phase of Chen et al., "EfficientQAT". ValueError unless the recipe is weight-only."""
        if not (self.recipe.frozen and isinstance(self.weight, QuantizedWeight)):
            raise ValueError(f"recipe is {self.recipe.name}; only the step sizes of a weight-only recipe (w8, w4, w3, w2) can train")
        if mode and self._parameters.get("steps") is None:
            self.steps = torch.nn.Parameter(self.weight.scales.clone())
        elif not mode and self._parameters.get("steps") is not None:
            self.weight.scales.copy_(self.steps.detach())
            del self.steps
        return self

    def dequantize_(self) -> torch.nn.Linear:
        """This layer as a plain torch.nn.Linear, sharing what it can."""
        new = torch.nn.Linear.__new__(torch.nn.Linear)
        if self._parameters.get("steps") is not None:
            self.train_steps_(False)
        new.__dict__ = {k: v for k, v in self.__dict__.items() if k != "recipe"}
        new._parameters = self._parameters.copy()
        if isinstance(self.weight, QuantizedWeight):
            new._parameters["weight"] = torch.nn.Parameter(self.weight.dequantize(), self.weight.requires_grad)
        if self.recipe.fake is not None:  # the values that the products saw
            steps, zeros = (new._parameters.pop(name).detach().to(torch.float32) for name in _FAKE)
            values = fake_quantize(self.weight.detach(), steps, zeros, *self.recipe.fake, self.weight.dtype)
            new._parameters["weight"] = torch.nn.Parameter(values, self.weight.requires_grad)
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias, self.recipe,
                                 self._parameters.get("weight_steps" if self.recipe.fake else "steps"), self._parameters.get("weight_zeros"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"
