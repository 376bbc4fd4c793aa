"""On-device training: INT8 weights and activations, a few of which train, under a budget of memory.

Lin et al., "On-Device Training Under 256KB Memory": ``plan`` chooses the layers, input channels and biases that train so that a step fits, ``prepare`` makes the
model so, ``SGD`` trains it.
"""
from __future__ import annotations

import copy
import io
from dataclasses import asdict, dataclass, field
from typing import Callable, Iterable

import torch

from gradmill import optim
from gradmill.autograd.ondevice import PIECE
from gradmill.convert import SIMILAR, leave_fast_path
from gradmill.formats import FORMATS
from gradmill.nn.ondevice import Int8Conv2d, Int8Layer, Int8Linear
from gradmill.ops.quant import quantize
from gradmill.reference.philox import stream
from gradmill.weight import QuantizedWeight, nbytes

__all__ = ["Bytes", "LayerPlan", "Plan", "SGD", "dequantize", "measure", "plan", "prepare"]

MADE_FROM = {torch.nn.Linear: Int8Linear, torch.nn.Conv2d: Int8Conv2d}
NORMS = {torch.nn.Conv2d: torch.nn.BatchNorm2d, torch.nn.Linear: torch.nn.BatchNorm1d}
CAPS = {torch.nn.ReLU: torch.inf, torch.nn.ReLU6: 6.0}
#: Shares of a layer's input channels that ``plan`` tries.
SHARES = (0.125, 0.25, 0.5, 1.0)


# --- the optimizer ----------------------------------------------------------------------------------------
class SGD(optim.SGD):
    """SGD without momentum over INT8 weights whose scales stay: each step's change is rounded stochastically to whole codes.

    Lin et al., "On-Device Training Under 256KB Memory", 3.1 (QAS). A step on the integers w = W / s_W takes their own gradient, s_W dW, divided by s_W^2
    (biases, s_W s_x db by (s_W s_x)^2): w <- round(w - lr dW / s_W), which is a step of W by lr dW. That is derived for SGD and holds for it alone: momentum in units of
    the integers would still be it, Adam would need 1 / s_W; hence no other optimizer here. The weight's ``grad`` is dW. A code that would leave
    [-127, 127] stays at its end. Parameters that are not QuantizedWeights (biases) take the plain step.

    Args:
        params, lr, weight_decay: as in torch.optim.SGD.
        options: max_grad_norm, on_nonfinite, maximize, seed, ...: see :class:`gradmill.optim.FusedOptimizer`; :func:`gradmill.optim.release_gradients` works.
    """

    def __init__(self, params, lr=1e-2, weight_decay=0, **options):
        super().__init__(params, lr=lr, weight_decay=weight_decay, **options)

    def check_group(self, group):
        super().check_group(group)
        if group["momentum"]:
            raise ValueError(f"momentum is {group['momentum']}; quantisation-aware scaling is SGD's without momentum")

    def _step_items(self, group, items, factor, **options):
        fixed = [item for item in items if isinstance(item.param, QuantizedWeight) and item.param.format == FORMATS["int8_row"]]
        for item in fixed:
            weight, grad = item.param, item.grad.reshape(item.param.codes.shape)
            lr, at = float(group["lr"]) * factor * (-1.0 if group["maximize"] else 1.0), stream(item.state["rng_id"], "weight")
            rows = max(1, PIECE // max(1, 4 * grad.shape[1]))
            for first in range(0, len(grad), rows):  # in pieces, each with random bits of its own
                codes, scales = weight.codes[first:first + rows], weight.scales[first:first + rows]
                moved = grad[first:first + rows].to(torch.float32).mul(-lr).div_(scales).add_(codes, alpha=1.0 - float(group["lr"]) * float(group["weight_decay"]))
                key = torch.tensor([group["seed"] ^ first, item.step], dtype=torch.int64)
                codes.copy_(quantize(moved, "int8", 0, False, key, at, torch.ones_like(scales))[0])
        super()._step_items(group, [item for item in items if not any(item is other for other in fixed)], factor, **options)


# --- bytes ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bytes:
    """Bytes of a training step. ``peak``: the most that was allocated at once; ``workspace``: what of it the other three do not explain."""

    weights: int
    saved: int      #: kept for backward at the end of forward, weights aside
    gradients: int  #: all at once, after backward
    peak: int
    workspace: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "workspace", max(0, self.peak - self.weights - self.saved - self.gradients))


def measure(model: torch.nn.Module, x: torch.Tensor, loss: Callable | None = None) -> Bytes:
    """What a step of SGD takes: a copy of the model runs forward, backward and step on ``x``, and torch's allocator tells every allocation.

    Exact for tensors, the weights and the batch included; buffers inside native kernels (packed panels of a matrix product) are not tensors, nor
    seen in torch's own kernels. ``loss``: output -> scalar; default the mean square of the output.

    Raises:
        ValueError: unless model and x are on the CPU and something trains.
    """
    model = copy.deepcopy(model)
    held = [*model.parameters(), *model.buffers()]
    if any(t.device.type != "cpu" for t in (*held, x)):
        raise ValueError("model or x is not on the CPU; bytes are counted there (they are the same elsewhere)")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model has no parameter that requires a gradient; there is no step to count")
    for p in trained:
        p.grad = None
    inner = [t for p in held for t in ((p.codes, p.scales, p.zeros) if isinstance(p, QuantizedWeight) else (p,))]
    weights, saved = {t.untyped_storage().data_ptr() for t in inner}, {}
    optimizer = SGD(trained, lr=0.0) if any(isinstance(p, QuantizedWeight) for p in trained) else torch.optim.SGD(trained, lr=0.0)

    def keep(t):
        for part in (t.codes, t.scales) if isinstance(t, QuantizedWeight) else (t,):
            if part.untyped_storage().data_ptr() not in weights:
                saved[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return t

    def forward(batch):
        out = model(batch)
        return loss(out) if loss is not None else sum(t.to(torch.float32).square().mean() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))

    with torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            value = forward(x.clone())
        saved = sum(saved.values())
        del value
        peak = sum(t.untyped_storage().nbytes() for t in {t.untyped_storage().data_ptr(): t for t in inner}.values()) + _most_allocated(
            lambda: (forward(x.clone()).backward(), optimizer.step()))
    return Bytes(sum(nbytes(p) for p in held), saved, sum(p.grad.nbytes for p in trained if p.grad is not None), peak)


def _most_allocated(run: Callable[[], object]) -> int:
    """The most bytes of CPU tensors allocated at once within run()."""
    profiler = torch.autograd  # the old one: it starts no tracing library, which takes a second and prints
    profiler._enable_profiler_legacy(profiler.ProfilerConfig(profiler.ProfilerState.CPU, False, True, False, False, False, torch._C._profiler._ExperimentalConfig()))
    try:
        run()
    finally:
        records = profiler._disable_profiler_legacy()
    total = most = 0
    for event in (e for thread in records for e in thread if e.kind() == "memory_alloc"):
        total += event.cpu_memory_usage()
        most = max(most, total)
    return most


# --- plans ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LayerPlan:
    """What becomes of a layer."""

    name: str
    channels: tuple[int, ...]  #: input channels that train
    of: int                    #: of so many
    bias: bool                 #: whether the bias trains
    x_scale: float             #: a step of the input's codes
    norm: str | None           #: the BatchNorm that is folded into it
    activation: str | None     #: the ReLU or ReLU6 that it does itself
    saved_bytes: int           #: kept for backward
    gradient_bytes: int
    contribution: float        #: of what trains, as a share of that of everything


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` chose: ``str(plan)`` is a table, :func:`prepare` carries it out."""

    layers: list[LayerPlan]
    batch: tuple[int, ...]   #: the shape of the batch that was measured
    memory_bytes: int | None
    bytes: Bytes             #: of a step of the prepared model
    torch_bytes: Bytes       #: of a step that trains all of the model as it was, in its own floats
    other_saved_bytes: int   #: kept by what is no INT8 layer, the loss and the batch included
    floats: dict[str, str] = field(default_factory=dict)  #: linear layers and convolutions that stay as they are, name -> why

    def to_dict(self) -> dict:
        """Plain data, for ``torch.save`` or JSON beside the model's state_dict; :meth:`from_dict` makes it a plan again."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict) -> "Plan":
        """The plan that :meth:`to_dict` gave, also by way of JSON. ValueError where ``saved`` is none."""
        def counted(b):
            return Bytes(*(b[name] for name in ("weights", "saved", "gradients", "peak")))
        try:
            layers = [LayerPlan(**{**layer, "channels": tuple(layer["channels"])}) for layer in saved["layers"]]
            return cls(layers, tuple(saved["batch"]), saved["memory_bytes"], counted(saved["bytes"]), counted(saved["torch_bytes"]), saved["other_saved_bytes"], dict(saved["floats"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"saved is no plan's to_dict(): {error!r}") from None

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for name, side in (("layer", "left"), ("trains", "left"), ("kept bytes", "right"), ("gradient bytes", "right"), ("contribution", "right")):
            table.add_column(name, justify=side, overflow="fold")
        for layer in self.layers:
            what = [f"{len(layer.channels)} of {layer.of} input channels"] * bool(layer.channels) + ["bias"] * layer.bias
            merged = "".join(f" + {n}" for n in (layer.norm, layer.activation) if n)
            table.add_row(layer.name + merged, ", ".join(what) or "-", f"{layer.saved_bytes:,}", f"{layer.gradient_bytes:,}", f"{100 * layer.contribution:.1f} %")
        for name, why in self.floats.items():
            table.add_row(name, f"stays in floats: {why}")
        total = Table()
        for name in ("bytes of a step", "this plan", "torch, everything"):
            total.add_column(name, justify="left" if name.startswith("bytes") else "right")
        for name, key in (("weights", "weights"), ("kept for backward", "saved"), ("gradients", "gradients"), ("workspace beside them at the peak", "workspace"), ("peak", "peak")):
            total.add_row(name, *(f"{getattr(b, key):,}" for b in (self.bytes, self.torch_bytes)))
        text = io.StringIO()
        console = Console(file=text, width=110)
        console.print(table)
        console.print(total)
        limit = "no limit" if self.memory_bytes is None else f"limit {self.memory_bytes:,} bytes"
        return (f"gradmill.ondevice, batch {'x'.join(map(str, self.batch))}, {limit}: peak {self.bytes.peak:,} bytes, "
                f"{self.torch_bytes.peak / self.bytes.peak:.1f}x less than training everything\n{text.getvalue().rstrip()}")


@dataclass
class _Layer:
    """A layer that can become INT8, as found in the model."""

    name: str
    shape: torch.Size = torch.Size()
    largest: float = 0.0
    norm: str | None = None
    activation: str | None = None


def _set(model, name: str, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class Merged(torch.nn.Module):
    """Stands where a module was whose work the layer before it now does."""

    def __init__(self, was: torch.nn.Module):
        super().__init__()
        self.was = was

    def forward(self, x):
        return x


def _why_not(module) -> str:
    if type(module) not in MADE_FROM or module._parameters.get("weight") is None:
        return "not an nn.Linear or nn.Conv2d with a weight of its own"
    try:
        MADE_FROM[type(module)](module, 1.0)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _watch(model, inputs: Iterable) -> tuple[dict, list]:
    """Runs the model on each input: what every module was called with first (module -> [input, output, calls in the first run]), by order of calls, and the first output."""
    seen, first, hooks = {}, [], []
    names = {m: n for n, m in model.named_modules() if not any(True for _ in m.children())}
    largest: dict = {}

    def look(module, arguments, output):
        x = arguments[0] if arguments and isinstance(arguments[0], torch.Tensor) else None
        if not first:
            entry = seen.setdefault(module, [x, output, 0])
            entry[2] += 1
        if x is not None and x.is_floating_point() and x.numel():
            largest[module] = max(largest.get(module, 0.0), float(x.abs().max()))
    for module in names:
        hooks.append(module.register_forward_hook(look))
    try:
        with torch.no_grad():
            for x in inputs:
                y = model(x)
                if not first:
                    first.append(y)
    finally:
        for hook in hooks:
            hook.remove()
    return {names[m]: (m, *entry, largest.get(m, 0.0)) for m, entry in seen.items()}, first[0]


def _fold(layer, norm):
    """A copy of a linear layer or convolution that does its BatchNorm's work (in eval mode) too."""
    scale = (norm.running_var.to(torch.float64) + norm.eps).rsqrt()
    scale, shift = (scale, 0.0) if norm.weight is None else (scale * norm.weight.detach(), norm.bias.detach())
    new = copy.deepcopy(layer)
    with torch.no_grad():
        bias = 0.0 if layer.bias is None else layer.bias.to(torch.float64)
        new.weight.copy_(layer.weight * scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        new.bias = torch.nn.Parameter(((bias - norm.running_mean) * scale + shift).to(layer.weight.dtype))
    return new


def _same(a, b) -> bool:
    a, b = ([t for t in torch.utils._pytree.tree_leaves(y) if isinstance(t, torch.Tensor)] for y in (a, b))
    return all(torch.allclose(p.float(), q.float(), rtol=1e-3, atol=1e-3 * float(q.float().abs().max()) if q.numel() else 0) for p, q in zip(a, b))


def _merge(model, layer: _Layer):
    """Puts a plan's merges into the model: the layer folded, what it does now out of the way."""
    if layer.norm is not None:
        _set(model, layer.name, _fold(model.get_submodule(layer.name), model.get_submodule(layer.norm)))
        _set(model, layer.norm, torch.nn.Identity())


def _find(model, x, data) -> tuple[list[_Layer], dict[str, str]]:
    """The layers that can become INT8, in the order of their calls, with the BatchNorm and the ReLU that each can take over; and why other linear
    layers and convolutions cannot. Folds the norms in ``model``."""
    calls, want = _watch(model, [x])
    layers, floats = [], {n: "not called for the example input" for n, m in model.named_modules() if isinstance(m, SIMILAR) and n not in calls}
    for name, (module, given, output, count, _) in calls.items():
        why = f"called {count} times in a forward" if count != 1 else "its input is no tensor" if given is None else _why_not(module)
        if why:
            if isinstance(module, SIMILAR):
                floats[name] = why
            continue
        layer = _Layer(name, given.shape)
        for kinds, attribute in (((NORMS[type(module)],), "norm"), (tuple(CAPS), "activation")):
            after = [(n, c) for n, c in calls.items() if c[1] is output]
            if len(after) == 1 and type(after[0][1][0]) in kinds and after[0][1][3] == 1 and not getattr(after[0][1][0], "inplace", False) and \
                    getattr(after[0][1][0], "track_running_stats", True):
                setattr(layer, attribute, after[0][0])
                output = after[0][1][2]
        layers.append(layer)
    for layer in layers:  # what else reads the layer's own output is not seen in the calls, but in the result
        for attribute in ("norm", "activation"):
            other = getattr(layer, attribute)
            if other is None:
                continue
            old = model.get_submodule(layer.name), model.get_submodule(other)
            if attribute == "norm":
                _merge(model, layer)
            else:
                _set(model, layer.name, torch.nn.Sequential(*old))
                _set(model, other, torch.nn.Identity())
            with torch.no_grad():
                fits = _same(model(x), want)
            if attribute == "activation" or not fits:  # an activation is taken over when the layer becomes INT8
                _set(model, layer.name, old[0])
                _set(model, other, old[1])
            if not fits:
                setattr(layer, attribute, None)
                if attribute == "norm":
                    layer.activation = None
    calls, _ = _watch(model, [x, *(batch[0] for batch in data)])
    for layer in layers:
        layer.largest = calls[layer.name][4]
    return layers, floats


def _contributions(model, layers, data, loss):
    """What a step of SGD on each layer's bias, and on each of its input channels, takes off the loss, to first order and but for the rate: squared gradients, summed. Without
    data: squared weights."""
    modules = [model.get_submodule(layer.name) for layer in layers]
    weights = [m.weight.detach().clone() for m in modules]
    biases = [torch.zeros(()) for _ in modules]
    if data:
        model.zero_grad(set_to_none=True)
        for m in modules:
            for p in m.parameters():
                p.requires_grad_(True)
        with torch.enable_grad():
            for x, y in data:
                (loss(model(x), y) / len(data)).backward()
        weights = [torch.zeros_like(m.weight) if m.weight.grad is None else m.weight.grad.clone() for m in modules]
        biases = [torch.zeros(()) if m.bias is None or m.bias.grad is None else m.bias.grad.clone() for m in modules]
        model.zero_grad(set_to_none=True)
    return [b.double().square().sum().item() for b in biases], [w.double().square().transpose(0, 1).flatten(1).sum(1) for w in weights]


def _choices(module, energy) -> list[tuple[tuple[int, ...], float]]:
    """(channels, contribution) for each share: those of the largest L2 norm."""
    weight, groups = module.weight.detach(), getattr(module, "groups", 1)
    count = weight.shape[1]
    order = weight.double().square().transpose(0, 1).flatten(1).sum(1).argsort(descending=True, stable=True).tolist()
    sizes = {count} if groups > 1 else {max(1, round(share * count)) for share in SHARES}
    return [((), 0.0), *((tuple(sorted(order[:n])), float(energy[sorted(order[:n])].sum())) for n in sorted(sizes))]


def _knapsack(options: list[list[tuple[float, int]]], budget: int) -> list[int]:
    """The option (value, cost) of each item whose values add up to most while the costs, in 1/4096ths of the budget rounded up, do not exceed it. The first costs nothing."""
    unit = max(1, -(-budget // 4096))
    size = budget // unit + 1
    best, taken = torch.zeros(size, dtype=torch.float64), []
    for choices in options:
        rows = torch.full((len(choices), size), -torch.inf, dtype=torch.float64)
        for i, (value, cost) in enumerate(choices):
            cost = -(-cost // unit)
            if cost < size:
                rows[i, cost:] = best[:size - cost] + value
        best, which = rows.max(0)
        taken.append(which)
    left, chosen = size - 1, []
    for choices, which in zip(reversed(options), reversed(taken)):
        chosen.append(int(which[left]))
        left -= -(-choices[chosen[-1]][1] // unit)
    return chosen[::-1]


def _int8_copy(model, layers, channels, biases):
    """A copy of the model, norms folded already, that trains these."""
    result = copy.deepcopy(model).requires_grad_(False)
    for layer, chosen, bias in zip(layers, channels, biases):
        _replace(result, layer.name, layer.largest / 127 if layer.largest > 0 else 1.0, chosen, bias, layer.activation, True)
    return result


def _replace(model, name, x_scale, channels, bias, activation, qas):
    module = model.get_submodule(name)
    cap = None
    if activation is not None:
        cap = CAPS[type(model.get_submodule(activation))]
        _set(model, activation, Merged(model.get_submodule(activation)))
    _set(model, name, MADE_FROM[type(module)](module, x_scale, channels, bias, cap, qas))
    leave_fast_path(model)


def plan(model: torch.nn.Module, example_input: torch.Tensor, memory_bytes: int | None = None, data: Iterable | None = None,
         loss: Callable = torch.nn.functional.cross_entropy, share: float | None = None) -> Plan:
    """Chooses the layers, input channels and biases that train, so that a step takes no more than ``memory_bytes``.

    Every nn.Linear and nn.Conv2d (these classes, called once in a forward) becomes INT8; a BatchNorm directly behind it is folded into it, with its running statistics, and a
    ReLU or ReLU6 done by it, where the model's output shows that nothing else reads what lies between. Everything else stays as it is and does not train.
    The last k biases train, and of the layers behind the first of these some input channels: an eighth, a quarter, half or all, those of the largest L2 norm (Lin et al.,
    3.2). What a choice contributes: the squares of its gradients over ``data``, which to first order is what a step of SGD takes off the loss, and adds up over
    layers (the paper fine-tunes each choice alone, and searches by evolution). The search is exact for those sums: for every k a knapsack over what a layer keeps and its
    gradients take, on top of the measured peak with biases alone; then the choice is measured, and the knapsack's budget set by bisection to what just fits.

    Args:
        model: in floats, on the CPU; not changed. It is looked at in eval mode.
        example_input: a batch as large as those to train on; inputs' scales are taken from its largest magnitudes, and from data's.
        memory_bytes: for the peak of a step by :func:`measure`; None for no limit.
        data: (input, target) batches; without, squared weights are taken for contributions, which says little.
        loss: (output, target) -> scalar.
        share: trains this share of every layer's input channels and all biases instead of choosing (0 for biases alone); memory_bytes must be None.

    Raises:
        TypeError: if model is no Module or example_input no tensor. ValueError: if no layer can become INT8, the model is one itself, or even the last layer's
            bias (its input channels, where it has none) needs more than memory_bytes.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
    if not isinstance(example_input, torch.Tensor):
        raise TypeError(f"example_input is {type(example_input).__name__}; it must be a torch.Tensor, a batch")
    if type(model) in MADE_FROM:
        raise ValueError(f"model is itself a torch.nn.{type(model).__name__}, which cannot be replaced in place: use gradmill.nn.{MADE_FROM[type(model)].__name__}")
    if memory_bytes is not None and not isinstance(memory_bytes, (int, float)):
        raise TypeError(f"memory_bytes is {memory_bytes!r}; it must be a number of bytes or None")
    if share is not None and (memory_bytes is not None or not 0 <= share <= 1):
        raise ValueError(f"share is {share!r} and memory_bytes {memory_bytes!r}; share must be 0 to 1, without memory_bytes, or None")
    if data is not None and not (data := list(data)):
        raise ValueError("data has no batches; it must have one at least, or be None")
    plain = copy.deepcopy(model).eval()
    for m in plain.modules():
        if type(m) in CAPS:
            m.inplace = False
    layers, floats = _find(plain, example_input, data or [])
    if not layers:
        raise ValueError("model has no nn.Linear or nn.Conv2d that is called once; there is nothing to train in INT8" + "".join(f"; {n}: {why}" for n, why in list(floats.items())[:5]))
    modules = [plain.get_submodule(layer.name) for layer in layers]
    of_bias, energies = _contributions(plain, layers, data or [], loss)
    choices = [_choices(m, energy) for m, energy in zip(modules, energies)]
    count = len(layers)

    def measured(reach: int, chosen: list[int]):
        channels = [choices[i][chosen[i]][0] for i in range(count)]
        biases = [i >= reach and modules[i].bias is not None for i in range(count)]
        made = _int8_copy(plain, layers, channels, biases)
        return measure(made, example_input), made, channels, biases

    def costs(i: int) -> list[tuple[float, int]]:
        n, positions, groups = layers[i].shape[0], torch.Size(layers[i].shape[2:]).numel(), getattr(modules[i], "groups", 1)
        rest = modules[i].weight[:, 0].numel()
        if type(modules[i]) is torch.nn.Linear:
            n, positions = layers[i].shape[:-1].numel(), 1
        return [(value, len(channels) * (n * positions * groups + 4 * rest)) for channels, value in choices[i]]

    if share is not None or memory_bytes is None:
        share = 1.0 if share is None else share
        picked = [min(range(len(c)), key=lambda j, c=c, m=m: abs(len(c[j][0]) - share * m.weight.shape[1])) for c, m in zip(choices, modules)]
        found = measured(0, picked)
    else:
        found = _search(memory_bytes, count, [costs(i) for i in range(count)], of_bias, modules, measured)
    bytes, made, channels, biases = found
    total = sum(of_bias) + sum(float(e.sum()) for e in energies)
    rows = []
    for i, layer in enumerate(layers):
        new = made.get_submodule(layer.name)
        value = biases[i] * of_bias[i] + sum(float(energies[i][c]) for c in channels[i])
        earlier = any(biases[:i]) or any(channels[:i])
        rows.append(LayerPlan(layer.name, channels[i], modules[i].weight.shape[1], biases[i], float(new.x_scale), layer.norm, layer.activation,
                              new.saved_bytes(layer.shape, earlier), sum(p.numel() * p.dtype.itemsize for p in new.parameters() if p.requires_grad), value / total if total else 0.0))
    everything = copy.deepcopy(model).requires_grad_(True)
    return Plan(rows, tuple(example_input.shape), memory_bytes, bytes, measure(everything, example_input), bytes.saved - sum(r.saved_bytes for r in rows), floats)


def _search(memory_bytes: int, count: int, options, of_bias, modules, measured):
    """What ``measured`` gives for the best choice that fits."""
    none = [0] * count
    last = none if modules[-1].bias is not None else [*none[:-1], 1]
    reaches = {}
    for reach in reversed(range(count)):  # the further back, the more
        chosen = none if modules[reach].bias is not None or reach < count - 1 else last
        if reach < count - 1 and not any(m.bias is not None for m in modules[reach:]):
            chosen = last
        reaches[reach] = measured(reach, chosen)
        if reaches[reach][0].peak > memory_bytes:
            smallest = reaches.pop(reach)[0].peak
            if not reaches:
                raise ValueError(f"memory_bytes is {memory_bytes:,}; training the last layer's {'bias' if last is none else 'first input channels'} alone takes "
                                 f"{smallest:,}: use a smaller batch or model")
            break
    best = max(((sum(of_bias[reach:]), result) for reach, result in reaches.items()), key=lambda found: found[0])
    for reach, (base, *_) in sorted(reaches.items()):
        if sum(of_bias[reach:]) + sum(max(value for value, _ in choices) for choices in options[reach:]) <= best[0]:
            continue  # not even everything would be better
        tried: dict = {}
        low, high = 0, sum(max(cost for _, cost in choices) for choices in options[reach:])  # budgets beside the biases' peak: all of it, then between what fits and what does not
        budget = high
        for _ in range(10):
            chosen = [0] * reach + _knapsack(options[reach:], budget)
            if tuple(chosen) not in tried:
                tried[tuple(chosen)] = measured(reach, chosen)
            result, value = tried[tuple(chosen)], sum(of_bias[reach:]) + sum(options[i][chosen[i]][0] for i in range(count))
            fits = result[0].peak <= memory_bytes
            if fits and value > best[0]:
                best = value, result
            low, high = (budget, high) if fits else (low, budget)
            if high - low < 2:
                break
            budget = (low + high) // 2
    return best[1]


def prepare(model: torch.nn.Module, plan: Plan, qas: bool = True) -> torch.nn.Module:
    """Carries out a plan in ``model``, in place, and returns it: INT8 layers, and ``requires_grad`` where something trains. Leave it in eval mode where it has norms or dropout left.

    ``qas=False`` leaves out quantisation-aware scaling (for comparison). Raises ValueError where the model is not the plan's, with nothing changed.
    """
    modules = dict(model.named_modules())
    for layer in plan.layers:
        module = modules.get(layer.name)
        if type(module) not in MADE_FROM or module.weight.shape[1] != layer.of or any(n is not None and n not in modules for n in (layer.norm, layer.activation)):
            raise ValueError(f"model is not the plan's: {layer.name!r} is {type(module).__name__}; it must be a torch layer with {layer.of} input channels")
    model.requires_grad_(False)
    for layer in plan.layers:
        _merge(model, layer)
        _replace(model, layer.name, layer.x_scale, layer.channels, layer.bias, layer.activation, qas)
    return model


def dequantize(model: torch.nn.Module) -> torch.nn.Module:
    """Turns a prepared model's INT8 layers back into torch's, in place, of the same values in fp32 and all trainable, and returns it. Folded norms stay folded."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Layer):
            _set(model, name, module.dequantize())
        elif isinstance(module, Merged):
            _set(model, name, module.was)
    return model
