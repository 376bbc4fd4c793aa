"""BitDelta: a fine-tuned model as its base and one bit a weight (Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit").

    tuned = gradmill.bitdelta.compress(base, finetuned)          # signs and a scale for each linear layer
    gradmill.bitdelta.distill(tuned, finetuned, batches)         # trains the scales, nothing else
    gradmill.bitdelta.save(tuned, "tenant.safetensors")          # a sixteenth of the linear layers in bf16
    many = gradmill.bitdelta.merge([tuned, another])             # one model, one batch, a tenant for each row
    with gradmill.bitdelta.serving(torch.tensor([0, 1, 1])):
        y = many(x)
"""
from __future__ import annotations

import copy
import os
from typing import Callable, Iterable

import torch

from gradmill._files import read_layers, write_layers
from gradmill.convert import leave_fast_path
from gradmill.nn.bit_delta import BitDeltaLinear, serving
from gradmill.optim._base import CheckpointError

__all__ = ["compress", "distill", "merge", "save", "load", "serving", "tenant_bytes"]

FORMAT = "bitdelta 2"


def _layers(model) -> dict[str, BitDeltaLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BitDeltaLinear)}


def _put(model, name: str, layer):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    leave_fast_path(model)


def _shell(model, keep: Iterable[torch.Tensor] = ()):
    """A copy of a model that shares the tensors in ``keep``."""
    return copy.deepcopy(model, {id(t): t for t in keep})


def compress(base: torch.nn.Module, finetuned: torch.nn.Module, filter: Callable[[str, torch.nn.Module], bool] | None = None,
             others: str = "finetuned") -> torch.nn.Module:
    """A model that computes what ``finetuned`` does from ``base``'s linear weights and one bit a weight.

    Args:
        base, finetuned: models with the same modules; float32, bfloat16 or float16 weights.
        filter: ``filter(name, layer)`` says which exact nn.Linear layers to compress; by default all.
        others: whose parameters (embeddings, norms, layers left out) the result copies: "finetuned", or "base", which it then shares.

    Returns:
        A new model with :class:`gradmill.nn.BitDeltaLinear` layers, whose weight is base's own Parameter. Of what is its own only the scales
        (``alphas``) require a gradient; what it shares with base keeps base's ``requires_grad``: freeze base before you make an optimizer of all parameters.

    Raises:
        ValueError: where the models' linear layers differ in name or shape, or none is left to compress.
    """
    if others not in ("finetuned", "base"):
        raise ValueError(f"others is {others!r}; it must be 'finetuned' or 'base'")
    old, new = ({n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear} for model in (base, finetuned))
    if {n: m.weight.shape for n, m in old.items()} != {n: m.weight.shape for n, m in new.items()}:
        odd = sorted(n for n in old.keys() | new.keys() if n not in old or n not in new or old[n].weight.shape != new[n].weight.shape)
        raise ValueError(f"base and finetuned differ in the linear layers {', '.join(odd[:5])}")
    names = [n for n, m in new.items() if n and (filter is None or filter(n, m))]
    if not names:
        raise ValueError("finetuned has no nn.Linear inside it to compress; it must have one that filter, if given, accepts")
    source = finetuned if others == "finetuned" else base
    held = {p: p.requires_grad for model in (base, finetuned) for p in model.parameters()}
    shared = [t for n in names for t in (old[n].weight, new[n].weight)] + ([] if others == "finetuned" else [*base.parameters(), *base.buffers()])
    result = _shell(source, shared)
    result.requires_grad_(False) if others == "finetuned" else None
    for name in names:
        _put(result, name, BitDeltaLinear.from_linears(old[name], new[name]))
    for name, p in result.named_parameters():
        if others == "finetuned" and not any(p is old[n].weight for n in names):
            p.requires_grad_(name.endswith(".alphas") or name == "alphas")
    for p, flag in held.items():
        p.requires_grad_(flag)
    return result


def distill(model: torch.nn.Module, finetuned: torch.nn.Module, data: Iterable, steps: int = 200, lr: float = 1e-4, progress: bool = True) -> list[float]:
    """Trains the scales, and nothing else, to bring a compressed model's outputs to the fine-tuned one's: AdamW without decay on the mean
    squared error of the logits (BitDelta, 3.2).

    Args:
        model: from :func:`compress`. finetuned: what it stands for, not changed.
        data: batches, read again when they end (a list or a DataLoader; a generator must have ``steps`` of them): tensors, or tuples of the model's
            positional arguments, without targets.
        steps, lr: the paper's 200 and 1e-4.

    Returns:
        The losses. Raises ValueError where the model has no BitDelta layer or ``data`` is empty.
    """
    from rich.progress import Progress

    from gradmill.optim import AdamW

    layers = _layers(model)
    if not layers:
        raise ValueError("model has no BitDeltaLinear; it must come from gradmill.bitdelta.compress")
    alphas = [layer.alphas for layer in layers.values()]
    optimizer = AdamW(alphas, lr=lr, weight_decay=0.0)
    losses, batches = [], iter(data)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("scales", total=steps)
        for _ in range(steps):
            batch = next(batches, None)
            if batch is None:
                batches = iter(data)
                batch = next(batches, None)
                if batch is None:
                    raise ValueError("data has no batches" if not losses else
                                     f"data ended after {len(losses)} of {steps} steps and cannot be read again; give a list or a DataLoader, or steps={len(losses)}")
            batch = batch if isinstance(batch, (tuple, list)) else (batch,)
            with torch.no_grad():
                want = _logits(finetuned(*batch))
            loss = (_logits(model(*batch)).float() - want.float()).square().mean()
            for alpha, gradient in zip(alphas, torch.autograd.grad(loss, alphas, allow_unused=True)):
                alpha.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.update(task, advance=1, description=f"scales, loss {losses[-1]:.3g}")
    return losses


def _logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits if hasattr(output, "logits") else output[0]


def merge(models: list[torch.nn.Module]) -> torch.nn.Module:
    """One model that serves the tenants of several, in order, a different one for each row of a batch (:func:`serving`).

    All must have been compressed against the same base with ``others="base"``, or agree in every other parameter: a norm or an
    embedding is not per tenant. Raises ValueError where they do not.
    """
    if not models:
        raise ValueError("models is empty; merge needs at least one")
    every = [_layers(m) for m in models]
    first = every[0]
    inside = tuple(name + "." for name in first)
    rest = {k: v for k, v in models[0].state_dict().items() if not k.startswith(inside)}
    for i, (model, layers) in enumerate(zip(models, every)):
        if layers.keys() != first.keys() or any(not torch.equal(layers[n].weight, first[n].weight) for n in first):
            raise ValueError(f"models[{i}] has other BitDelta layers, or another base, than models[0]")
        mine = {k: v for k, v in model.state_dict().items() if not k.startswith(inside)}
        odd = [k for k in rest.keys() | mine.keys() if k not in rest or k not in mine or not torch.equal(rest[k], mine[k])]
        if odd:
            raise ValueError(f"models[{i}] differs from models[0] in {sorted(odd)[0]}, which is not a BitDelta layer's; compress with others='base'")
    result = _shell(models[0], [layer.weight for layer in first.values()])
    for name, layer in first.items():
        together = [layers[name] for layers in every]
        biases = None if layer.biases is None else torch.cat([m.biases for m in together])
        _put(result, name, BitDeltaLinear(layer.weight, torch.cat([m.bits for m in together]), torch.cat([m.alphas.detach() for m in together]), biases, layer.bias))
    return result


def tenant_bytes(model: torch.nn.Module) -> int:
    """Exact bytes of one tenant's BitDelta layers: bits, scale and bias of each. Its bf16 copy would take 2 a weight."""
    return sum(layer.tenant_bytes() for layer in _layers(model).values())


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Up to 16 values of a base's weight, by which load tells bases of the same shapes apart."""
    flat = weight.detach().flatten()
    return flat[::max(1, flat.numel() // 16)][:16].cpu().to(torch.float32)


def save(model: torch.nn.Module, path: str | os.PathLike):
    """Writes a compressed model without its base: bits, scales and biases of every BitDelta layer, and its other parameters and buffers as they are.
    A safetensors file, ``gradmill_format`` in its metadata; written under a temporary name, then renamed."""
    layers = _layers(model)
    if not layers:
        raise ValueError("model has no BitDeltaLinear; it must come from gradmill.bitdelta.compress")
    base = {f"{name}.{part}" for name in layers for part in ("weight", "bias")}
    write_layers(path, FORMAT, {k: v for k, v in model.state_dict().items() if k not in base},
                 {n: {"shape": tuple(layer.weight.shape), "base": _sample(layer.weight).tolist()} for n, layer in layers.items()})


def load(base: torch.nn.Module, path: str | os.PathLike) -> torch.nn.Module:
    """The model that :func:`save` wrote, on top of ``base``, whose linear weights it shares.

    Raises:
        gradmill.CheckpointError: if the file is not one of these, or does not fit ``base``: other layers or shapes, or weights other than those
            it was compressed against (values of each are compared to bf16's rounding, so that base may stand in another dtype).
    """
    tensors, names = read_layers(path, FORMAT)
    modules = dict(base.named_modules())
    for name, layer in names.items():
        if type(modules.get(name)) is not torch.nn.Linear or list(modules[name].weight.shape) != layer["shape"]:
            raise CheckpointError(f"{path} needs an nn.Linear {name} with a weight of shape {tuple(layer['shape'])}, which base does not have")
        if not torch.allclose(_sample(modules[name].weight), torch.tensor(layer["base"], dtype=torch.float32), rtol=2.0 ** -7, atol=2.0 ** -24, equal_nan=True):
            raise CheckpointError(f"{path} was compressed against another base: the weight of {name} has other values")
    result = _shell(base, [modules[n].weight for n in names])
    for name in names:
        linear = modules[name]
        bits, biases = tensors.get(f"{name}.bits"), tensors.get(f"{name}.biases")
        if bits is None or f"{name}.alphas" not in tensors or tuple(bits.shape[1:]) != (linear.out_features, -(-linear.in_features // 8)):
            raise CheckpointError(f"{path}: {name}.bits or {name}.alphas is missing or of the wrong shape")
        _put(result, name, BitDeltaLinear(linear.weight, bits, tensors[f"{name}.alphas"], biases, linear.bias).to(linear.weight.device))
    kept = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    wrong = result.load_state_dict(tensors, strict=False)
    missing = [k for k in wrong.missing_keys if k not in kept]
    if missing or wrong.unexpected_keys:
        raise CheckpointError(f"{path} does not fit base: missing {missing[:3]}, unexpected {wrong.unexpected_keys[:3]}")
    return result
