"""BiPer: binary networks through a periodic function (Vargas et al., "BiPer: Binary Neural Networks using a Periodic Function").

    gradmill.biper.convert(model)                 # stage 1: weights sin(omega W), inputs their signs; make the optimizer after this
    ...                                           # train
    gradmill.biper.binarize(model)                # stage 2: sign(sin(omega W)), from stage 1's best; train on
    gradmill.biper.pack(model)                    # one bit a weight, the same outputs; inference
"""
from __future__ import annotations

from typing import Callable

import torch

from gradmill import recipes
from gradmill.convert import _why_not, leave_fast_path
from gradmill.nn.biper import BinaryConv2d, BinaryLinear, BiPerConv2d, BiPerLinear

__all__ = ["binarize", "convert", "pack"]

_BIPER = {torch.nn.Linear: BiPerLinear, torch.nn.Conv2d: BiPerConv2d}
_PACKED = {BiPerLinear: BinaryLinear, BiPerConv2d: BinaryConv2d}


def _replace(model, make) -> list[str]:
    """Puts ``make(name, layer)`` where it is not None; a module that stands in two places stays one. The names."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
    made, names = {}, []
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in parent._modules.items():
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if child is not None and child not in made:
                made[child] = make(name, child)
            if made.get(child) is not None:
                parent._modules[child_name] = made[child]
                names.append(name)
    return names


def convert(model: torch.nn.Module, omega: float = 20.0, filter: Callable[[str, torch.nn.Module], bool] | None = None) -> list[str]:
    """Replaces linear layers and convolutions by BiPer's of stage 1, in place, but the first and the last.

    Exact nn.Linear and nn.Conv2d only; their Parameters, hooks and ties are kept, and each layer gets one Parameter more, ``alpha``.

    Args:
        model: the module whose children are searched. omega: the frequency, the paper's 20.
        filter: ``filter(name, layer)`` says which layers instead: also the first and the last, then.

    Returns:
        The names of the replaced layers.

    Raises:
        TypeError: where model is not a Module. ValueError: for omega, or where no layer is left to replace.
    """
    if not 0 < omega < float("inf"):
        raise ValueError(f"omega is {omega!r}; it must be positive and finite")
    layers = [m for m in model.modules() if type(m) in _BIPER] if isinstance(model, torch.nn.Module) else []
    ends = layers[:1] + layers[-1:]

    def make(name, layer):
        chosen = filter or (lambda name, layer: layer not in ends)
        if type(layer) in _BIPER and not _why_not(name, layer, chosen, (), recipes.ONE_BIT_FQT):
            return _BIPER[type(layer)]._from(layer, omega)

    names = _replace(model, make)
    leave_fast_path(model)
    if not names:
        raise ValueError("model has no nn.Linear or nn.Conv2d inside it to replace beside the first and the last; pass filter= to choose")
    return names


def binarize(model: torch.nn.Module) -> list[str]:
    """Takes every BiPer layer from stage 1 to stage 2, in place: sign(sin(omega W)) instead of sin(omega W). All Parameters stay what they are.

    Returns:
        The names of the layers. ValueError where there is none in stage 1.
    """
    layers = {n: m for n, m in model.named_modules() if type(m) in _PACKED and m.stage == 1}
    if not layers:
        raise ValueError("model has no BiPer layer in stage 1; gradmill.biper.convert makes them")
    for layer in layers.values():
        layer.stage = 2
    return list(layers)


def pack(model: torch.nn.Module) -> list[str]:
    """Packs every BiPer layer to one bit a weight, in place: gradmill.nn.BinaryLinear and BinaryConv2d, which only infer, with the
    outputs of the layer's eval mode, exactly.

    Returns:
        The names of the packed layers. ValueError where there is none inside model, or one is in stage 1 (nothing is changed then).
    """
    early = [n for n, m in model.named_modules() if type(m) in _PACKED and m.stage == 1]
    if early:
        raise ValueError(f"layer {early[0]!r} is in stage 1; gradmill.biper.binarize takes it to stage 2, whose weights are binary")
    names = _replace(model, lambda name, layer: _PACKED[type(layer)]._from(layer) if type(layer) in _PACKED else None)
    if not names:
        raise ValueError("model has no BiPer layer inside it; gradmill.biper.convert makes them")
    return names
