"""What nn.Linear and nn.Conv2d share: a recipe, its parameters, and the way from and to torch's layer."""
from __future__ import annotations

import warnings
import weakref

import torch

from gradmill import functional, recipes
from gradmill.ops import _registry
from gradmill.weight import QuantizedWeight

_FAKE = ("weight_steps", "weight_zeros")  # Parameters of a recipe that fakes
_PARTS = ("codes", "scales", "zeros")       # of a QuantizedWeight
_looked = weakref.WeakSet()                # layers whose first input was looked at by look_at_signs


def look_at_signs(layer: torch.nn.Module, x: torch.Tensor):
    """Says once if the signs of a layer's first input, of which it takes nothing else, are all the same: behind a ReLU, say."""
    if torch.compiler.is_compiling() or layer in _looked or x.numel() < 16 or not _registry.readable(x):
        return
    _looked.add(layer)
    if bool((x >= 0).all()):
        warnings.warn(f"{layer} takes the signs of its input, and its first input of shape {tuple(x.shape)} has no negative value: all its outputs are the same, and "
                      "a norm behind it multiplies gradients by up to 1/sqrt(eps). Put a norm or Hardtanh before it, not a ReLU", stacklevel=4)


class KeepsFloat32:
    """Mixin before a module: the Parameters and buffers that ``_float32`` names stay float32 under ``.to(dtype)``, ``.half()`` and their like,
    bit for bit, because kernels read them so; gradients too. They follow to other devices."""

    _float32: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        held = {name: (t.data, None if t.grad is None else t.grad.data) for name in self._float32
                if (t := self._parameters.get(name, self._buffers.get(name))) is not None and t.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, (value, grad) in held.items():
            new = self._parameters.get(name, self._buffers.get(name))
            if new.dtype != torch.float32:
                kept_grad, new.grad = new.grad, None
                new.data = value.to(new.device)
                if kept_grad is not None:
                    new.grad = grad.to(new.device)
        return self


class RecipeLayer(KeepsFloat32):
    """Mixin before a torch layer with ``weight`` and ``bias``, which ``_plain`` names."""

    _plain: type[torch.nn.Module]
    _float32 = ("weight_steps", "weight_zeros", "steps", "amax_history")

    def _apply(self, fn, recurse=True):
        # torch swaps a tensor subclass's memory with the new one's, which it refuses while a graph holds the weight: an output that is alive.
        # Here the Parameter takes the new values in place, as torch has it for plain ones.
        weight = self._parameters.get("weight")
        new = None
        if isinstance(weight, QuantizedWeight):
            with torch.no_grad():
                new = fn(weight)
        if not isinstance(new, QuantizedWeight) or not torch._has_compatible_shallow_copy_type(weight, new):  # to or from the meta device
            return super()._apply(fn, recurse)
        grad, self._parameters["weight"] = weight.grad, None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight
        weight.grad = None
        weight.data = new
        if grad is not None:
            weight.grad = fn(grad)
        return self

    def _adopt(self, recipe: recipes.Recipe):
        self.recipe = recipe
        self._pack()
        if self._made:
            for name, start in self._first_steps():
                self.register_parameter(name, torch.nn.Parameter(start, self.weight.requires_grad))

    def _pack(self):
        if self.recipe.weight is not None and not isinstance(self.weight, QuantizedWeight):
            requires_grad = self.weight.requires_grad and not self.recipe.frozen
            self.weight = torch.nn.Parameter(QuantizedWeight.quantize(self.weight.detach(), self.recipe.weight), requires_grad)

    @property
    def _made(self) -> tuple[str, ...]:
        """Names of the Parameters that are made from the weight."""
        return _FAKE if self.recipe.fake is not None else _FAKE[:1] if self.recipe.one_bit is not None else ()

    def _first_steps(self):
        weight = self.weight.detach()
        if self.recipe.one_bit is not None:  # the best scale for the signs of a row: its mean magnitude
            return [(_FAKE[0], weight.to(torch.float32).flatten(1).abs().mean(1, keepdim=True))]
        return zip(_FAKE, functional.fake_quantize_parameters(weight, *self.recipe.fake))

    @classmethod
    def _from(cls, layer: torch.nn.Module, recipe):
        new = cls.__new__(cls)
        new.__dict__ = layer.__dict__.copy()
        for name in ("_parameters", "_buffers", "_modules"):
            new.__dict__[name] = layer.__dict__[name].copy()
        new._adopt(recipes.get(recipe))
        return new

    @property
    def _steps(self) -> dict:
        """What the functional form takes beside the weight."""
        return {"steps": self._parameters.get("weight_steps" if self._made else "steps"), "zeros": self._parameters.get("weight_zeros")}

    def reset_steps_(self):
        """Takes steps and zero points anew from the range of each group of the weight. ValueError unless the recipe fakes."""
        if not self._made:
            raise ValueError(f"recipe is {self.recipe.name}; only one that fakes (qat_w4, qat_w3, qat_w2) or one_bit_fqt has steps to reset")
        for name, start in self._first_steps():
            old = self._parameters[name]
            if old.device == start.device:
                with torch.no_grad():
                    old.copy_(start)
            else:  # the weight was assigned over a layer on the meta device
                self._parameters[name] = torch.nn.Parameter(start, old.requires_grad)
        return self

    def reset_parameters(self):
        super().reset_parameters()
        if self._parameters.get("weight_steps") is not None:  # not yet there when torch's constructor calls
            self.reset_steps_()

    _in_parts = False  # see gradmill.state_in_parts

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._in_parts and isinstance(self.weight, QuantizedWeight):
            weight = destination.pop(prefix + "weight")
            destination.update({f"{prefix}weight_{part}": getattr(weight, part) for part in _PARTS})

    def _join_parts(self, state_dict, prefix, error_msgs):
        """The parts in ``state_dict``, a copy, as the weight that they are."""
        parts = [state_dict.pop(f"{prefix}weight_{part}", None) for part in _PARTS]
        if any(part is None for part in parts):
            return
        mine = self.weight
        wants = [getattr(mine, part) for part in _PARTS] if isinstance(mine, QuantizedWeight) else []
        if [(p.shape, p.dtype) for p in parts] != [(p.shape, p.dtype) for p in wants]:
            shapes = ", ".join(str(tuple(p.shape)) for p in parts)
            error_msgs.append(f"{prefix}weight is in the checkpoint in parts of shapes {shapes}, which are not those of a weight of shape {tuple(mine.shape)} in this "
                              f"layer's recipe {self.recipe.name}: convert the model with the recipe of the one that was saved")
        else:
            state_dict[prefix + "weight"] = QuantizedWeight(*parts, mine.format, mine.shape, mine.dtype)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        if prefix + "weight_codes" in state_dict:
            self._join_parts(state_dict, prefix, error_msgs)
        if self.recipe.frozen and prefix + "steps" in state_dict and self._parameters.get("steps") is None:
            self.train_steps_()  # as qat.pack leaves a layer
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._pack()  # assign=True puts a float weight in the packed one's place
        names = [prefix + name for name in self._made]
        if names and prefix + "weight" in state_dict and not any(name in state_dict for name in names):
            missing_keys[:] = [key for key in missing_keys if key not in names]
            self.reset_steps_()

    def train_steps_(self, mode: bool = True):
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

    def _look(self, x):
        if not torch.compiler.is_compiling() and (profiler := _registry.profiler) is not None:
            profiler.see(self)
        if self.recipe.one_bit is not None:
            look_at_signs(self, x)

    def dequantize_(self) -> torch.nn.Module:
        """This layer as torch's plain one, sharing what it can."""
        new = self._plain.__new__(self._plain)
        if self._parameters.get("steps") is not None:
            self.train_steps_(False)
        new.__dict__ = {k: v for k, v in self.__dict__.items() if k not in ("recipe", "_in_parts")}
        new._parameters = self._parameters.copy()
        if isinstance(self.weight, QuantizedWeight):
            new._parameters["weight"] = torch.nn.Parameter(self.weight.dequantize(), self.weight.requires_grad)
        if self.recipe.fake is not None:  # the values that the products saw
            steps, zeros = (new._parameters.pop(name).detach() for name in _FAKE)
            with torch.autocast(self.weight.device.type, enabled=False):
                values = functional.fake_quantize(self.weight.detach(), steps, zeros, *self.recipe.fake)
            new._parameters["weight"] = torch.nn.Parameter(values, self.weight.requires_grad)
        if self.recipe.one_bit is not None:  # for inputs that are signs already
            scales = new._parameters.pop("weight_steps").detach().view(-1, *[1] * (self.weight.dim() - 1))
            weight = self.weight.detach()
            new._parameters["weight"] = torch.nn.Parameter(torch.where(weight < 0, -scales, scales).to(weight.dtype), self.weight.requires_grad)
        return new

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"
