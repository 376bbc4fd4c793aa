"""Quantisation-aware training of a model's blocks, and from layers that fake quantisation to packed ones (Chen et al., "EfficientQAT")."""
from __future__ import annotations

import copy
import io
import math
import warnings
from dataclasses import dataclass, field
from typing import Callable, Iterable, NamedTuple

import torch

from gradmill.convert import convert
from gradmill.formats import Format
from gradmill.nn._layer import _FAKE, RecipeLayer
from gradmill.recipes import RECIPES, Recipe
from gradmill.reference.quant import SMALLEST_STEP, _fake_codes, pack_bits, round_even
from gradmill.weight import QuantizedWeight, as_matrix

__all__ = ["BlockLoss", "BlockReport", "block_ap", "pack"]


class BlockLoss(NamedTuple):
    """Mean squared error of a block's output to the full-precision chain's, over the data."""

    before: float  #: rounded to nearest, behind the trained blocks
    after: float   #: equal where training made it worse, and the block is kept rounded


@dataclass
class BlockReport:
    """What :func:`block_ap` did: ``str(report)`` is a table."""

    bits: int
    group: int
    blocks: dict[str, BlockLoss] = field(default_factory=dict)  #: by name
    layers: list[str] = field(default_factory=list)  #: the quantised ones

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("block")
        for title in ("loss, rounded to nearest", "trained", "ratio"):
            table.add_column(title, justify="right")
        for name, (before, after) in self.blocks.items():
            table.add_row(name, f"{before:.4g}", f"{after:.4g}", f"{after / before:.3f}" if before else "-")
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        return (f"gradmill.qat.block_ap, {self.bits} bits in groups of {self.group or 'a row'}: {len(self.layers)} layers in {len(self.blocks)} blocks\n"
                f"{text.getvalue().rstrip()}\nThe blocks have new parameters: make the optimizer after this.")


def block_ap(model: torch.nn.Module, data: Iterable, bits: int = 2, group: int = 64, blocks: str | Iterable[torch.nn.Module] | None = None,
             epochs: int = 2, lr: float | None = None, steps_lr: float = 1e-4, filter: Callable[[str, torch.nn.Module], bool] | None = None,
             packed: bool = False, progress: bool = True) -> BlockReport:
    """Trains a model's blocks one after the other to be quantised, in place: Block-AP (Chen et al., "EfficientQAT", 3.2).

    Each block's linear layers and convolutions see their weights quantised; its weights, step sizes, zero points, norms and biases all train, to bring
    its output to that of the full-precision block behind full-precision ones; a block that ends farther from it than it began is kept as it began. Its own input comes from the quantised blocks before it. AdamW without
    weight decay, the learning rates falling to a twentieth along a cosine. Everything runs in eval mode (no dropout). Needed beside the
    model: twice the hidden states of all the data, and gradients and moments of one block. The trained blocks replace the old ones when all
    are done, so that until then ``model`` is what it was, whatever fails; with ``packed`` what waits takes the bits of its weights only.

    Args:
        model: a module that calls its blocks in order, each once, with the output of the one before as first argument (a block may give a tuple
            whose first element that is). Called with its inputs it must not fill a cache; a transformers model's ``config.use_cache`` is off meanwhile.
        data: batches for ``model``: a tensor, a tuple of positional or a dict of keyword arguments each. Read once.
        bits, group: 2 to 8; neighbours along a row that share a step and a zero point (even; 0: a row).
        blocks: a ModuleList's name, or the blocks themselves; by default the only outermost ModuleList with linear layers inside.
        epochs: passes over the data for each block.
        lr: of weights, norms and biases; by default the paper's 1e-5, for 2 bits 2e-5. steps_lr: of step sizes and zero points.
        filter: ``filter(name, layer)`` says which layers inside the blocks to quantise; by default all.
        packed: pack each block when it is trained (8, 4, 3 or 2 bits), as :func:`pack` does.

    Returns:
        A :class:`BlockReport`. Without ``packed`` the layers' recipe fakes: :func:`pack` packs them.

    Raises:
        TypeError: where model is not a Module.
        ValueError: for bits, group, epochs, rates, blocks that are not found, tied to something outside or not called as said, no layer to
            quantise, or data without a batch.
        RuntimeError: where a loss is not finite.
    """
    from rich.progress import Progress

    from gradmill.optim import AdamW

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
    if bits not in range(2, 9) or packed and bits not in (2, 3, 4, 8):
        raise ValueError(f"bits is {bits!r}; it must be {'8, 4, 3 or 2 to be packed' if packed else '2 to 8'}")
    if not (isinstance(group, int) and group >= 0 and group % 2 == 0):
        raise ValueError(f"group is {group!r}; it must be an even number, or 0 for a whole row")
    if not (isinstance(epochs, int) and epochs >= 0):
        raise ValueError(f"epochs is {epochs!r}; it must be an integer, at least 0")
    lr = (2e-5 if bits == 2 else 1e-5) if lr is None else lr
    for name, rate in (("lr", lr), ("steps_lr", steps_lr)):
        if not 0 <= rate < math.inf:
            raise ValueError(f"{name} is {rate!r}; it must be finite and at least 0")
    known = RECIPES.get(f"qat_w{bits}")
    recipe = known if known is not None and known.fake == (bits, group) else Recipe(f"qat_w{bits}_{group or 'row'}", fake=(bits, group))
    names = _find_blocks(model, blocks)
    modes = {m: m.training for m in model.modules()}
    caching = [config for m in model.modules() if getattr(config := getattr(m, "config", None), "use_cache", None) is True]
    report, trained = BlockReport(bits, group), {}
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        exact, rest = _first_inputs(model, names, data)
        seen = list(exact)  # the quantised chain's hidden states
        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task("blocks", total=len(names) * max(epochs, 1) * len(exact))
            for place, (name, block) in enumerate(names.items()):
                arguments = [batch[place] for batch in rest]
                with torch.no_grad():
                    exact = [_call(block, h, a) for h, a in zip(exact, arguments)]
                holder = torch.nn.ModuleList([copy.deepcopy(block)])
                wanted = lambda path, layer: filter is None or filter(name + path[1:], layer)
                with warnings.catch_warnings():  # of speed, for each block
                    warnings.filterwarnings("ignore", "recipe .* trains slower")
                    report.layers += [name + path[1:] for path in convert(holder, recipe, wanted).replaced]
                new = holder[0]
                before = _block_loss(name, new, seen, exact, arguments)
                rounded = copy.deepcopy(new.state_dict())
                _train(AdamW, new, seen, exact, arguments, epochs, lr, steps_lr,
                       lambda loss: bar.update(task, advance=1, description=f"block {name}, loss {loss:.3g}"))
                after = _block_loss(name, new, seen, exact, arguments)
                if after > before:
                    new.load_state_dict(rounded)
                report.blocks[name] = BlockLoss(before, min(before, after))
                with torch.no_grad():
                    seen = [_call(new, h, a) for h, a in zip(seen, arguments)]
                flags = {n: p.requires_grad for n, p in block.named_parameters()}
                for n, p in new.named_parameters():
                    p.requires_grad_(flags[n] if n in flags else flags[n.removesuffix("_steps").removesuffix("_zeros")])
                if packed and any(isinstance(m, RecipeLayer) and m.recipe.fake is not None for m in new.modules()):
                    pack(holder)
                    new = holder[0]
                trained[block] = new
        if not report.layers:
            raise ValueError("blocks have no layer to quantise; they must have an nn.Linear or nn.Conv2d that filter, if given, accepts")
    finally:
        for module, mode in modes.items():
            module.training = mode
        for config in caching:
            config.use_cache = True
    for old, new in trained.items():
        mode_of = {n: m.training for n, m in old.named_modules()}
        for n, m in new.named_modules():
            m.training = mode_of[n]
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module in trained:
                parent._modules[child] = trained[module]
    return report


def _find_blocks(model, blocks) -> dict[str, torch.nn.Module]:
    """Blocks by name, in the order given."""
    if blocks is None:
        lists = {n: m for n, m in model.named_modules() if n and isinstance(m, torch.nn.ModuleList) and any(
            isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) for layer in m.modules())}
        outer = [n for n in lists if not any(n.startswith(other + ".") for other in lists)]
        if len(outer) != 1:
            has = f"the ModuleLists {', '.join(outer)}" if outer else "no ModuleList with layers inside"
            raise ValueError(f"blocks was not given, and model has {has}; name one, or pass the blocks")
        blocks = outer[0]
    if isinstance(blocks, str):
        found = dict(model.named_modules()).get(blocks)
        if not isinstance(found, (torch.nn.ModuleList, torch.nn.Sequential)):
            found = "" if found is None else f", not of a {type(found).__name__}"
            raise ValueError(f"blocks is {blocks!r}; it must be the name of a ModuleList or Sequential of model{found}")
        blocks = found
    blocks = list(blocks)
    known = {m: n for n, m in model.named_modules()}
    for i, block in enumerate(blocks):
        if not known.get(block):
            raise ValueError(f"blocks[{i}] is a {type(block).__name__} that is not inside model")
    if not blocks or len(set(blocks)) < len(blocks):
        raise ValueError(f"blocks has {len(blocks)} elements, {len(set(blocks))} of them different; it must have at least one, and none twice")
    for block in blocks:
        inside, own = set(block.modules()), {id(p) for p in block.parameters()}
        for path, module in model.named_modules():
            for n, p in module._parameters.items() if module not in inside else ():
                if id(p) in own:
                    other = f"{path}.{n}" if path else n
                    raise ValueError(f"block {known[block]!r} shares its weights with {other!r}, outside of it; it cannot be trained alone")
    return {known[block]: block for block in blocks}


class _Stop(Exception):
    pass


def _split(args, kwargs):
    """A block's hidden state, and what else it is called with."""
    if args:
        return args[0], (None, args[1:], kwargs)
    first = next((k for k, v in kwargs.items() if isinstance(v, torch.Tensor)), None)
    return kwargs.get(first), (first, (), {k: v for k, v in kwargs.items() if k != first})


def _hidden(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def _call(block, hidden, arguments):
    key, args, kwargs = arguments
    hidden = hidden.clone()  # a block may write into its input
    return _hidden(block(hidden, *args, **kwargs) if key is None else block(*args, **{key: hidden}, **kwargs))


@torch.no_grad()
def _first_inputs(model, names, data):
    """The first block's hidden state of each batch, and for each batch and block what else it was called with. The model runs up to its last block."""
    places = {block: place for place, block in enumerate(names.values())}
    labels, hidden, rest, last = list(names), [], [], None

    def enter(block, args, kwargs):
        place = places[block]
        if place != len(rest[-1]):
            raise ValueError(f"block {labels[place]!r} is called as number {len(rest[-1])}; model must call its blocks in order, each once")
        h, other = _split(args, kwargs)
        if not isinstance(h, torch.Tensor):
            raise ValueError(f"block {labels[place]!r} is called with {type(h).__name__} first; it must be a tensor, the output of the block before")
        if place == 0:
            hidden.append(h.detach().clone())
        elif h is not last and not (h.shape == last.shape and torch.equal(h, last)):
            raise ValueError(f"block {labels[place]!r} does not take the output of {labels[place - 1]!r} as its first argument")
        rest[-1].append(other)

    def leave(block, args, output):
        nonlocal last
        last = _hidden(output)
        if places[block] == len(places) - 1:
            raise _Stop

    hooks = [hook for block in places for hook in (block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave))]
    try:
        for batch in data:
            rest.append([])
            try:
                model(**batch) if isinstance(batch, dict) else model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
            except _Stop:
                continue
            raise ValueError(f"block {labels[len(rest[-1])]!r} was not called by model")
    finally:
        for hook in hooks:
            hook.remove()
    if not rest:
        raise ValueError("data has no batches")
    return hidden, rest


def _mse(block, hidden, want, arguments):
    return (_call(block, hidden, arguments).float() - want.float()).square().mean()


@torch.no_grad()
def _block_loss(name, block, hidden, wants, arguments) -> float:
    loss = sum(_mse(block, *batch).item() for batch in zip(hidden, wants, arguments)) / len(hidden)
    if not math.isfinite(loss):
        raise RuntimeError(f"block {name!r} has a loss of {loss}; model is as it was")
    return loss


@torch.enable_grad()
def _train(AdamW, block, hidden, wants, arguments, epochs, lr, steps_lr, advance):
    named = [(n, p.requires_grad_()) for n, p in block.named_parameters()]
    if not named or not epochs:
        return
    steps = [p for n, p in named if n.rpartition(".")[2] in _FAKE]
    parameters = [p for n, p in named if n.rpartition(".")[2] not in _FAKE]
    optimizer = AdamW([{"params": group, "lr": rate} for group, rate in ((parameters, lr), (steps, steps_lr)) if group], weight_decay=0.0)
    total = epochs * len(hidden)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.05 + 0.475 * (1 + math.cos(math.pi * step / total)))
    for _ in range(epochs):
        for batch in zip(hidden, wants, arguments):
            loss = _mse(block, *batch)
            for (_, p), gradient in zip(named, torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)):
                p.grad = gradient
            optimizer.step()
            schedule.step()
            advance(loss.item())
    optimizer.zero_grad()


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
