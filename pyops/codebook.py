"""Weights as packed indices into codebooks that train ("Joint Learning of Codebooks and Mappings", JLCM).

    report = gradmill.codebook.fit(model, bits=4, rows_per_group=64, calibration=batches)     # in place; print(report)
    optimizer = gradmill.optim.AdamW(model.parameters(), lr=1e-3)                             # codebooks, norms, biases
    indices = gradmill.codebook.Indices(model, lr=0.02)                                       # what the weights point to
    loss(model).backward(); optimizer.step(); indices.step(); optimizer.zero_grad(); indices.zero_grad()
    gradmill.codebook.save(model, "small.safetensors")
"""
from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from typing import Callable, Iterable, NamedTuple

import torch

from gradmill import recipes
from gradmill._calibrate import input_energy
from gradmill._files import read_layers, write_layers
from gradmill.autograd.codebook import ROWS, gradient_tiles
from gradmill.convert import _why_not, in_blocks, leave_fast_path
from gradmill.nn.codebook import CodebookLinear
from gradmill.ops.codebook import MAX_GROUPS, move_indices
from gradmill.optim._base import CheckpointError
from gradmill.reference.philox import stream
from gradmill.reference.quant import pack_bits

__all__ = ["Indices", "LayerFit", "Report", "fit", "load", "save"]

FORMAT = "codebook 1"
QUANTILES = 32  #: a row's distribution, as rows are grouped by it


class LayerFit(NamedTuple):
    """One replaced layer."""

    before: int  #: bytes of its weight
    after: int  #: of indices, row groups, codebooks and scales
    groups: int
    error: float  #: squared error of the weights over their squares, weighted by the calibration
    again: bool  #: the weight stands under an earlier name too: totals leave it out


@dataclass
class Report:
    """What :func:`fit` did: ``str(report)`` is a table."""

    bits: int
    layers: dict[str, LayerFit] = field(default_factory=dict)  #: the replaced ones by name
    skipped: list[tuple[str, str]] = field(default_factory=list)  #: (name, why)

    @property
    def bytes_before(self) -> int:
        return sum(layer.before for layer in self.layers.values() if not layer.again)

    @property
    def bytes_after(self) -> int:
        return sum(layer.after for layer in self.layers.values() if not layer.again)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table()
        table.add_column("layer", overflow="fold")
        for title in ("weight bytes", "factor", "groups", "relative error"):
            table.add_column(title, justify="right")
        for name, layer in self.layers.items():
            table.add_row(name, f"{layer.before:,} -> {layer.after:,}", f"{layer.before / layer.after:.2f}", str(layer.groups), f"{layer.error:.3g}")
        for name, why in self.skipped:
            table.add_row(name, f"skipped: {why}")
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        return (f"gradmill.codebook.fit, {self.bits} bits: {len(self.layers)} replaced, {len(self.skipped)} skipped; replaced weights {self.bytes_before:,} -> "
                f"{self.bytes_after:,} bytes\n{text.getvalue().rstrip()}\nThe replaced layers have new parameters: make the optimizer after this.")


# --- fitting ----------------------------------------------------------------------------------------------
def lloyd(x: torch.Tensor, weights: torch.Tensor, count: int, iterations: int) -> torch.Tensor:
    """``count`` ascending codewords (float64) of x (n,) for the least sum of weights * squared distance that Lloyd's algorithm finds.

    Of three starts the best: the density that is best for many codewords, the cube root of x's own (Panter and Dite, "Quantization distortion in
    pulse-count modulation with nonuniform spacing of levels"), x's own density, and even steps, which reach outliers. It works on sorted x and
    running sums: an iteration costs count log n. A codeword that nothing is nearest to stays where it is.
    """
    x, order = x.to(torch.float64).sort()
    weights = weights.to(torch.float64)[order]
    nothing = x.new_zeros(1)
    mass, moment = torch.cat((nothing, weights.cumsum(0))), torch.cat((nothing, (weights * x).cumsum(0)))
    low, high = x[0].item(), x[-1].item()
    if not high > low:
        return x.new_full((count,), low)
    bins = max(64, 16 * count)
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    inside = mass[torch.searchsorted(x, edges[1:], right=True)].diff(prepend=nothing).clamp(min=0)
    best, least = None, float("inf")
    for power in (1 / 3, 1.0, 0.0):
        share = torch.cat((nothing, inside.pow(power).cumsum(0)))
        want = (torch.arange(count, dtype=torch.float64) + 0.5) / count * share[-1]
        at = torch.searchsorted(share, want, right=True).clamp(1, bins)
        words = edges[at - 1] + (edges[at] - edges[at - 1]) * ((want - share[at - 1]) / (share[at] - share[at - 1]).clamp(min=1e-300)).clamp(0, 1)
        for _ in range(iterations):
            ends = torch.cat((torch.zeros(1, dtype=torch.int64), torch.searchsorted(x, (words[1:] + words[:-1]) / 2), torch.tensor([len(x)])))
            m, s = mass[ends].diff(), moment[ends].diff()
            new = torch.where(m > 0, s / torch.where(m > 0, m, torch.ones_like(m)), words).sort().values
            moved = (new - words).abs().max().item()
            words = new
            if moved <= 1e-9 * (high - low):
                break
        between = torch.bucketize(x, (words[1:] + words[:-1]) / 2)
        cost = (weights * (x - words[between]).square()).sum().item()
        if cost < least:
            best, least = words, cost
    return best


def row_groups(weight: torch.Tensor, groups: int, shared: bool, iterations: int = 25) -> torch.Tensor:
    """The group (int64) of each row of weight (rows, columns): k-means of the rows' quantile functions, where squared distance is that of the
    optimal transport of one row's weights to the other's (Wasserstein-2); with ``shared``, of the logarithms of their root mean squares, as groups
    differ in scale alone. The better of two starts: equal parts in the order of size, and rows that are far from each other."""
    rows, columns = weight.shape
    if groups == 1 or not columns:
        return torch.zeros(rows, dtype=torch.int64)
    size = weight.to(torch.float64).square().mean(1).sqrt()
    if shared:
        points = size.clamp(min=1e-30).log()[:, None]
    else:
        at = ((torch.arange(QUANTILES) + 0.5) / QUANTILES * columns).long()
        points = weight.sort(1).values[:, at].to(torch.float64)
    sorted_by_size = torch.stack([points[part].mean(0) for part in size.argsort(stable=True).tensor_split(groups)])
    apart, far = [points[0]], torch.full((rows,), float("inf"), dtype=torch.float64)  # each the farthest from those before
    for _ in range(groups - 1):
        far = torch.minimum(far, (points - apart[-1]).square().sum(1))
        apart.append(points[far.argmax()])
    best, least = None, float("inf")
    for centres in (sorted_by_size, torch.stack(apart)):
        for _ in range(iterations):
            distance, nearest = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").min(1)
            members = torch.bincount(nearest, minlength=groups)
            means = torch.zeros_like(centres).index_add_(0, nearest, points) / members.clamp(min=1)[:, None]
            new = torch.where(members[:, None] > 0, means, centres)
            if torch.equal(new, centres):
                break
            centres = new
        cost = distance.square().sum().item()
        if best is None or cost < least:
            best, least = nearest, cost
    return best


@torch.no_grad()
def _fitted(linear: torch.nn.Linear, bits: int, groups: int, shared: bool, energy: torch.Tensor | None, iterations: int) -> tuple[CodebookLinear, float]:
    """The layer, and its relative error. All on the CPU."""
    device, dtype = linear.weight.device, linear.weight.dtype
    weight = linear.weight.detach().to("cpu", torch.float32)
    rows, columns = weight.shape
    column = torch.ones(columns, dtype=torch.float64) if energy is None else energy.cpu() / energy.mean().clamp(min=1e-300).cpu() + 1e-6
    member = row_groups(weight, groups, shared)
    new = CodebookLinear(columns, rows, False, bits, groups, shared, device="cpu", dtype=dtype)
    scales = torch.ones(groups, dtype=torch.float64)
    if shared:
        for g in range(groups):
            of_group = weight[member == g]
            if of_group.numel() and of_group.any():
                scales[g] = of_group.to(torch.float64).square().mean().sqrt()
        new.scales.copy_(scales.to(torch.float32)[:, None])
    error, total = 0.0, (column * weight.to(torch.float64).square()).sum().item()
    for g in range(1 if shared else groups):
        mine = torch.arange(rows) if shared else (member == g).nonzero().flatten()
        if not len(mine) or not columns:
            continue
        scale = scales[member[mine]][:, None]
        x, load = weight[mine] / scale.to(torch.float32), column * scale.square()
        words = lloyd(x.flatten(), load.flatten(), 1 << bits, iterations).to(torch.float32)
        between = (words[1:].to(torch.float64) + words[:-1].to(torch.float64)) / 2
        for run in torch.arange(len(mine)).split(ROWS):
            q = torch.bucketize(x[run].to(torch.float64), between)
            error += (load[run] * (words[q].to(torch.float64) - x[run]).square()).sum().item()
            new.indices[mine[run]] = pack_bits(q, bits)
        new.codebooks[g] = words
    new.row_groups.copy_(member.to(torch.uint8))
    new.requires_grad_(linear.weight.requires_grad)
    return new.to(device), error / total if total else 0.0


def _adopt(new: CodebookLinear, linear: torch.nn.Linear) -> CodebookLinear:
    """What a replaced layer hands on: bias, mode."""
    new.bias = linear.bias
    return new.train(linear.training)


def fit(model: torch.nn.Module, bits: int = 4, rows_per_group: int = 64, groups: int | None = None, shared: bool = False, calibration: Iterable | None = None,
        filter: Callable[[str, torch.nn.Module], bool] | None = None, iterations: int = 100, progress: bool = True) -> Report:
    """Replaces the weight of every ``torch.nn.Linear`` in ``model`` by packed indices into codebooks, in place.

    Rows of like distribution share a codebook, found by weighted k-means in one dimension (Lloyd's algorithm, :func:`lloyd`); deterministic,
    whatever the threads. These exact classes only; biases stay the Parameters they are, tied weights stay tied. Layers with hooks, or whose
    forward was replaced, are skipped and said.

    Args:
        model: the module whose children are searched. ``model`` itself is not replaced.
        bits: of an index, 1 to 8.
        rows_per_group: mean number of rows with a codebook of their own: a codebook costs 32 * 2^bits bits. groups: how many groups instead.
            At most 256 in either case.
        shared: one codebook for all rows of a layer and one scale a group: for many bits, where codebooks are long.
        calibration: batches for the model (a tensor, a tuple of positional or a dict of keyword arguments each): the error of a weight then counts
            as much as the mean square of the input it is multiplied by. By default all weights count alike.
        filter: ``filter(name, layer)`` says whether to replace; by default everything but the head (:func:`gradmill.convert`).
        iterations: of Lloyd's algorithm, at most. progress: a bar, layer by layer.

    Returns:
        A :class:`Report`. The replaced layers have new Parameters: make the optimizer afterwards.

    Raises:
        TypeError: if model is not a Module. ValueError: for bits, groups, no layer to replace, calibration without a batch, or a weight that is not
            finite (nothing is changed then).
    """
    from rich.progress import Progress

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
    if bits not in range(1, 9):
        raise ValueError(f"bits is {bits!r}; it must be 1 to 8")
    if groups is not None and not 1 <= groups <= MAX_GROUPS:
        raise ValueError(f"groups is {groups!r}; it must be 1 to {MAX_GROUPS}")
    if rows_per_group < 1:
        raise ValueError(f"rows_per_group is {rows_per_group!r}; it must be at least 1")
    report, places, blocks = Report(bits), [], in_blocks(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):
            if isinstance(child, torch.nn.Linear):
                name = f"{parent_name}.{child_name}" if parent_name else child_name
                why = _why_not(name, child, filter, embeddings, recipes.get("w4"), in_block=id(child) in blocks) or _cannot(parent, child)
                places += [] if why else [(name, parent, child_name, child)]
                report.skipped += [(name, why)] if why else []
    if not places:
        raise ValueError("model has no nn.Linear inside it to replace; it must have one that filter, if given, accepts")
    for name, _, _, child in places:
        if not child.weight.isfinite().all():
            raise ValueError(f"the weight of {name!r} has a nan or an inf; a codebook needs finite weights")
    energies = {} if calibration is None else input_energy(model, {name: child for name, _, _, child in places}, calibration)
    made, fits = {}, {}
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("codebooks", total=len(places))
        for name, _, _, child in places:
            weight = id(child.weight)
            if weight not in fits:
                count = min(groups or -(-child.out_features // rows_per_group), MAX_GROUPS, max(child.out_features, 1))
                fits[weight] = _fitted(child, bits, count, shared, energies.get(name), iterations)
            bar.update(task, advance=1, description=f"codebooks: {name}")
    seen = set()
    for name, parent, child_name, child in places:
        first, error = fits[id(child.weight)]
        if child not in made:
            again = id(child.weight) in seen
            new = CodebookLinear(child.in_features, child.out_features, False, bits, first.groups, shared, "meta", first.dtype) if again else first
            if again:  # another layer with the same weight: the same tensors
                new._buffers.update(first._buffers)
                new._parameters.update(codebooks=first.codebooks, scales=first.scales)
            made[child] = _adopt(new, child)
        new = made[child]
        setattr(parent, child_name, new)
        report.layers[name] = LayerFit(child.weight.nbytes, new.nbytes(), new.groups, error, id(child.weight) in seen)
        seen.add(id(child.weight))
    leave_fast_path(model)
    return report


def _cannot(parent, layer) -> str:
    if isinstance(parent, torch.nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight and does not call it"
    if any(getattr(layer, hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")):
        return "it has hooks"
    return ""


# --- training the indices ---------------------------------------------------------------------------------
class Indices(torch.optim.Optimizer):
    """Steps of the indices of every :class:`gradmill.nn.CodebookLinear` in a model, beside an optimizer for its Parameters.

    Each index has a fraction of 8 binary digits, which is all the state there is: a byte a weight. A step of rate lr moves the two, as one number,
    by lr against the sign of the gradient, on average over a row; the farther away the next codeword is, the less
    (:func:`gradmill.ops.move_indices`):

        index -= lr * G / rms(G's row) * 2 mean / (distance + mean)

    with G the gradient of the weight, mean the mean distance of neighbours in the codebook; rounded stochastically to 256ths of an index, keyed, so
    that a resumed run has the bits of one that was never interrupted. JLCM publishes that the weight falls with the distance, not how: the formula
    is ours. Rows with a gradient that is not finite are left alone, so a GradScaler's scale needs no unscaling and a skipped step does nothing here.

    From construction on every backward pass keeps each layer's X and dY until :meth:`zero_grad`: nothing is summed over the weight, whose gradient
    is made 256 rows at a time within :meth:`step`. Layers train their indices in eager mode (the passes are kept in a Python list); :meth:`stop`
    ends it.

    Args:
        model: with CodebookLinear layers. lr: mean movement of an index in a step, in codewords; 0.01 to 0.05 over some hundreds of steps. Any LR
        scheduler takes it.
        seed: of the rounding; drawn from torch's generator by default.

    Raises:
        ValueError: where model has no such layer, for lr, or under torch.distributed with several ranks, whose replicas would drift apart.
    """

    def __init__(self, model: torch.nn.Module, lr: float = 0.02, seed: int | None = None):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module, whose CodebookLinear layers are found")
        if not 0 <= lr < float("inf"):
            raise ValueError(f"lr is {lr!r}; it must be finite and at least 0")
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError("codebook.Indices steps on one process's gradients; with several ranks the indices of replicas would drift apart")
        self._layers: dict[int, list[CodebookLinear]] = {}  # by their indices: tied ones together
        for module in model.modules():
            if isinstance(module, CodebookLinear):
                self._layers.setdefault(id(module.indices), []).append(module)
                module.kept = []
        if not self._layers:
            raise ValueError("model has no CodebookLinear; gradmill.codebook.fit makes them")
        seed = int(torch.randint(0, 2 ** 62, ())) if seed is None else seed
        super().__init__([layers[0].indices for layers in self._layers.values()], {"lr": lr, "seed": seed})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for indices in group["params"]:
                layers, state = self._layers[id(indices)], self.state[indices]
                if any(layer.kept is None for layer in layers):
                    raise RuntimeError("gradmill.codebook.Indices was stopped, so that its layers keep no gradients: make another")
                pairs = [pair for layer in layers for pair in layer.kept]
                if not state:
                    state["step"], state["fractions"] = 0, torch.zeros((layers[0].out_features, layers[0].in_features), dtype=torch.int8, device=indices.device)
                if pairs:
                    state["step"] += 1
                    self._move(layers[0].sort_(), pairs, state, float(group["lr"]), torch.tensor([group["seed"], state["step"]]), stream(number, "weight"))
                number += 1
        return loss

    def _move(self, layer, pairs, state, lr, key, id):
        books = layer.books().contiguous()
        for first, dw in gradient_tiles(pairs, layer.out_features):
            rows = slice(first, first + ROWS)
            size = dw.to(torch.float64).square().mean(1, keepdim=True).sqrt()
            rates = torch.where((size > 0) & size.isfinite(), lr / size, 0.0).to(torch.float32)
            move_indices(layer.indices[rows], state["fractions"][rows], books, layer.row_groups[rows], dw, rates, layer.bits, key, id, first)

    def zero_grad(self, set_to_none: bool = True):
        """Forgets the backward passes since the last one."""
        for layers in self._layers.values():
            for layer in layers:
                layer.kept = []

    def stop(self):
        """Backward passes keep nothing any more."""
        for layers in self._layers.values():
            for layer in layers:
                layer.kept = None


# --- files ------------------------------------------------------------------------------------------------
def save(model: torch.nn.Module, path: str | os.PathLike):
    """Writes a model with CodebookLinear layers, packed as they are: a safetensors file, ``gradmill_format`` in its metadata; written under a
    temporary name, then renamed. Tied tensors are written once for each name. Raises ValueError where model has no such layer."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CodebookLinear)}
    if not layers:
        raise ValueError("model has no CodebookLinear; gradmill.codebook.fit makes them")
    write_layers(path, FORMAT, model.state_dict(), {n: (m.out_features, m.in_features, m.bits, m.groups, m.scales is not None) for n, m in layers.items()})


def load(model: torch.nn.Module, path: str | os.PathLike) -> torch.nn.Module:
    """Makes ``model``, which has nn.Linear or CodebookLinear where the saved one has CodebookLinear layers, what :func:`save` wrote; in place.
    Returns it.

    Raises:
        gradmill.CheckpointError: if the file is not one of these, or does not fit ``model``.
    """
    tensors, layers = read_layers(path, FORMAT)
    modules = dict(model.named_modules())
    for name, (rows, columns, bits, groups, shared) in layers.items():
        old = modules.get(name)
        if not (type(old) in (torch.nn.Linear, CodebookLinear) and (old.out_features, old.in_features) == (rows, columns)):
            raise CheckpointError(f"{path} needs a linear layer {name} with a weight of shape {(rows, columns)}, which model does not have")
    for name, (rows, columns, bits, groups, shared) in layers.items():
        old = modules[name]
        weight = old.weight if type(old) is torch.nn.Linear else old.codebooks
        new = CodebookLinear(columns, rows, False, bits, groups, shared, weight.device, weight.dtype if type(old) is torch.nn.Linear else old.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _adopt(new, old))
    leave_fast_path(model)
    try:
        wrong = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit model: {error}") from None
    if wrong.missing_keys or wrong.unexpected_keys:
        raise CheckpointError(f"{path} does not fit model: missing {wrong.missing_keys[:3]}, unexpected {wrong.unexpected_keys[:3]}")
    return model
