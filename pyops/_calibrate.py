"""What calibration batches tell about a model's layers."""
from __future__ import annotations

from typing import Iterable

import torch


def call(model: torch.nn.Module, batch):
    """The model on a batch: a tensor, a tuple of positional or a dict of keyword arguments."""
    return model(**batch) if isinstance(batch, dict) else model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@torch.no_grad()
def input_energy(model: torch.nn.Module, layers: dict[str, torch.nn.Module], batches: Iterable) -> dict[str, torch.Tensor]:
    """Mean square of each input feature of ``layers``, over all that they are called with: {name: float64 (in,)}. The model runs in eval mode.

    Raises ValueError where there is no batch, a layer is never called, or what it gets is not finite.
    """
    if isinstance(batches, (torch.Tensor, dict)):
        raise TypeError(f"calibration is {type(batches).__name__}; it must be an iterable of batches: [batch], if it is one batch")
    sums, counts, modes = {}, dict.fromkeys(layers, 0), {m: m.training for m in model.modules()}

    def watch(name):
        def hook(layer, arguments):
            x = arguments[0].detach().to(torch.float64)
            x = x.reshape(-1, x.shape[-1])
            sums[name] = x.square().sum(0) + sums.get(name, 0)
            counts[name] += len(x)
        return hook

    handles, any_batch = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()], False
    try:
        model.eval()
        for batch in batches:
            any_batch = True
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not any_batch:
        raise ValueError("calibration has no batches")
    for name in layers:
        if not counts[name]:
            raise ValueError(f"calibration never calls the layer {name!r}")
        if not sums[name].isfinite().all():
            raise ValueError(f"calibration gives the layer {name!r} an input that is not finite")
    return {name: sums[name] / counts[name] for name in layers}
