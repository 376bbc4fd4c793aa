"""convert: swaps a model's linear layers and convolutions for gradmill's, in place."""
from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

import torch

from gradmill import formats, recipes, speeds
from gradmill.nn import Conv2d, Linear
from gradmill.nn._layer import RecipeLayer
from gradmill.weight import nbytes

__all__ = ["LayerBytes", "Report", "convert", "state_in_parts"]

#: torch's layer -> what makes gradmill's of it.
MADE_FROM = {torch.nn.Linear: Linear.from_linear, torch.nn.Conv2d: Conv2d.from_conv2d}
#: What the report names, replaced or not; beside them what transformers calls Conv1D, GPT-2's linear layer.
SIMILAR = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)

#: A recipe measured below this share of fp32's speed is reported: less is within a measurement's spread.
SLOWER = 0.95
#: Names of a language model's or classifier's last layer, which loses most from low precision.
HEAD_NAMES = ("lm_head", "head", "output", "classifier", "embed_out", "score", "fc_out")
#: Those of them that some models (GPT-J, RWKV) also give to a layer of every block.
OF_BLOCKS_TOO = ("output", "fc_out")
#: Names under which peft keeps a layer that it wraps, and layers that it trains in its place or beside it.
PEFT_KEEPS, PEFT_TRAINS = ("base_layer", "original_module"), ("lora_A", "lora_B", "modules_to_save")


class LayerBytes(NamedTuple):
    """Bytes of one replaced layer. Kept of its input for backward: for 1,024 tokens, or an output of 32 x 32 positions."""

    weight_before: int
    weight_after: int  #: with its steps and zero points
    kept_before: int
    kept_after: int
    again: bool  #: the weight stands under an earlier name too: totals leave it out


@dataclass
class Report:
    """What :func:`convert` did: ``str(report)`` is a table."""

    recipe: str
    layers: dict[str, LayerBytes] = field(default_factory=dict)  #: the replaced ones by name
    skipped: list[tuple[str, str]] = field(default_factory=list)  #: (name, why)
    slower: dict[str, float] = field(default_factory=dict)  #: layer -> speed over torch's fp32 on a CPU, where that was measured to be below 1
    new_parameters: bool = False  #: the recipe stores weights in low precision or adds steps: an optimizer made before is out of date

    @property
    def replaced(self) -> list[str]:
        return list(self.layers)

    @property
    def bytes_before(self) -> int:
        """Of the replaced layers' weights, each counted once."""
        return sum(layer.weight_before for layer in self.layers.values() if not layer.again)

    @property
    def bytes_after(self) -> int:
        return sum(layer.weight_after for layer in self.layers.values() if not layer.again)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table()
        table.add_column("layer", overflow="fold")
        table.add_column("result", overflow="fold")
        table.add_column("weight bytes", justify="right")
        table.add_column("kept per 1,024 tokens or output positions", justify="right")
        for name, layer in self.layers.items():
            speed = f", {self.slower[name]:.2g}x fp32's speed" if name in self.slower else ""
            table.add_row(name, f"replaced{speed}", f"{layer.weight_before:,} -> {layer.weight_after:,}", f"{layer.kept_before:,} -> {layer.kept_after:,}")
        for name, why in self.skipped:
            table.add_row(name, f"skipped: {why}")
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        after = "\nThe converted layers have new parameters: make the optimizer after this." if self.new_parameters else ""
        return (f"gradmill.convert, recipe {self.recipe}: {len(self.layers)} replaced, {len(self.skipped)} skipped; replaced weights "
                f"{self.bytes_before:,} -> {self.bytes_after:,} bytes\n{text.getvalue().rstrip()}{after}")


def convert(model: torch.nn.Module, recipe: str | recipes.Recipe = "int8",
            filter: Callable[[str, torch.nn.Module], bool] | None = None) -> Report:
    """Replaces every ``torch.nn.Linear`` and ``torch.nn.Conv2d`` in ``model`` by gradmill's of that name, in place.

    These exact classes only (subclasses may mean something else); ties, hooks and, where the recipe allows, the
    Parameter objects themselves are kept, so an optimizer made before still steps them. Where the recipe stores
    weights in low precision the Parameters are new: make the optimizer afterwards.

    Args:
        model: the module whose children are searched. ``model`` itself is not replaced.
        recipe: a name or a :class:`gradmill.recipes.Recipe`.
        filter: ``filter(name, layer)`` says whether to convert; by default everything but depthwise convolutions and the head (a layer named
            lm_head, head, output, classifier, embed_out, score or fc_out, the latter and output not where they stand in every block of a
            ModuleList, or one whose weight is an embedding's); for recipes that store
            or see weights in few bits everything but peft's adapters too, and for one_bit_fqt everything but the first and the last layer.

    A model that reads a layer's weight itself instead of calling the layer (Mamba's dt_proj in transformers) takes nothing of the recipe there but
    how the weight is stored: leave such a layer out with ``filter``.

    Returns:
        A :class:`Report`. A UserWarning says where the recipe was measured to be slower than fp32 on this kind of CPU.

    Raises:
        TypeError: if model is not a Module. ValueError: unknown recipe, or ``model`` is itself such a layer.
    """
    recipe = recipes.get(recipe)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
    if type(model) in MADE_FROM:
        made_from = MADE_FROM[type(model)]
        raise ValueError(f"model is itself a torch.nn.{type(model).__name__}, which cannot be replaced in place: use gradmill.nn.{made_from.__qualname__}")
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    ends = {}
    if recipe.one_bit is not None:  # the paper keeps both ends of a network
        layers = [m for m in model.modules() if isinstance(m, tuple(MADE_FROM))]
        for layer, which in zip((layers[0], layers[-1]) if layers else (), ("first", "last")):
            ends.setdefault(id(layer), f"the {which} layer, which {recipe.name} keeps (pass filter= to convert it)")
    report, done, packed = Report(recipe.name), {}, {}
    blocks = in_blocks(model)
    for parent_name, parent in list(model.named_modules()):
        if not type(parent).__module__.startswith(("torch.nn.", "gradmill.")):
            for name, parameter in parent._parameters.items():
                if parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1:
                    report.skipped.append((f"{parent_name}.{name}" if parent_name else name, f"a bare Parameter of {len(parameter)} matrices, which no nn.Linear holds "
                                           "(a mixture's experts? gradmill.nn.GroupedLinear is a layer for them)"))
        for child_name, child in list(parent._modules.items()):  # not named_children: it hides the second name of a tie
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if isinstance(child, torch.nn.MultiheadAttention) and child.in_proj_weight is not None:
                report.skipped.append((f"{name}.in_proj_weight", "a bare Parameter of nn.MultiheadAttention, which calls no nn.Linear for it"))
            if type(child).__name__ == "Conv1D" and type(child).__module__ == "transformers.pytorch_utils":
                report.skipped.append((name, "a Conv1D of transformers, whose weight is a linear layer's transposed: put an nn.Linear in its place first"))
            if not isinstance(child, SIMILAR):
                continue
            why = _why_not(name, child, filter, embeddings, recipe, ends.get(id(child), ""), id(child) in blocks)
            if why:
                report.skipped.append((name, why))
                continue
            before, again = (id(child.weight), "weight"), id(child) in done
            if not again:  # a module used twice stays one module
                new = MADE_FROM[type(child)](child, recipe)
                report.new_parameters |= recipe.weight is not None or bool(new._made)
                again = before in packed
                for kind, parameter in new._parameters.items():  # tied weights stay tied, with all that is made from them
                    if kind.startswith("weight"):
                        new._parameters[kind] = packed.setdefault((before[0], kind), parameter)
                done[id(child)] = (new, child)  # keeps `child` alive: its id stays its own
            new = done[id(child)][0]
            setattr(parent, child_name, new)
            after = sum(nbytes(p) for kind, p in new._parameters.items() if kind.startswith("weight"))
            if new.weight.device.type == "cpu" and new.measured_as:
                speed = speeds.measured(recipe.name, *new.measured_as)
                if speed is not None and speed < SLOWER:
                    report.slower[name] = speed
            report.layers[name] = LayerBytes(nbytes(child.weight), after, *new.kept_bytes(), again)
    leave_fast_path(model)
    if report.slower:
        worst = min(report.slower, key=report.slower.get)
        warnings.warn(f"recipe {recipe.name} trains slower than torch's fp32 at {len(report.slower)} of the {len(report.layers)} layers on this kind of "
                      f"CPU, by measurements of layers of like size: {report.slower[worst]:.2g} times as fast at layer {worst!r}. What it may save there is memory: "
                      "convert with another recipe, or leave layers out with filter=.", stacklevel=2)
    return report


def state_in_parts(model: torch.nn.Module, mode: bool = True):
    """From now on ``model.state_dict()`` holds ``weight_codes``, ``weight_scales`` and ``weight_zeros``, plain tensors, in place of each packed ``weight``:
    what a safetensors file can hold, so that transformers' ``Trainer`` and ``save_pretrained`` write checkpoints. ``load_state_dict`` takes either form,
    in this mode or not, bit for bit; into a converted model: one that is not (``from_pretrained`` makes it) does not know the parts.

    Args:
        model: with gradmill's layers, converted already. mode: False goes back to a :class:`gradmill.QuantizedWeight` under ``weight``.
    """
    for layer in model.modules():
        if isinstance(layer, RecipeLayer):
            layer._in_parts = mode


def leave_fast_path(model: torch.nn.Module):
    """Turns off torch's fast path in the encoder layers of ``model`` that hold a gradmill module: in eval mode it reads the weights of linear layers
    instead of calling them, and would leave out what they do."""
    for module in model.modules():
        if isinstance(module, (torch.nn.TransformerEncoder, torch.nn.TransformerEncoderLayer)):
            if any(type(m).__module__.startswith("gradmill.") for m in module.modules()):
                module.activation_relu_or_gelu, module.use_nested_tensor = 0, False  # what the one and the other ask for it


def in_blocks(model: torch.nn.Module) -> set[int]:
    """ids of the modules inside ModuleLists: where a layer that is named like a head may be one of every block."""
    return {id(m) for blocks in model.modules() if isinstance(blocks, torch.nn.ModuleList) for m in blocks.modules()}


def named_as_head(part: str, in_block: bool) -> bool:
    return part in HEAD_NAMES and not (in_block and part in OF_BLOCKS_TOO)


def _why_not(name, child, filter, embeddings, recipe, end="", in_block=False) -> str:
    kind, parts = type(child).__name__, name.split(".")
    peft = next((i for i, part in enumerate(parts) if part in PEFT_KEEPS + PEFT_TRAINS), len(parts))
    if isinstance(child, RecipeLayer):
        return f"already a gradmill layer, recipe {child.recipe.name}"
    if type(child) not in MADE_FROM:
        for plain in MADE_FROM:
            if isinstance(child, plain):
                return f"a subclass of nn.{plain.__name__} ({kind})"
        return f"a transposed convolution ({kind})" if child.transposed else f"not a 2-D convolution ({kind})"
    if child._parameters.get("weight") is None:
        return "its weight is computed (weight_norm, prune or a parametrisation)"
    if "forward" in child.__dict__ or child._compiled_call_impl is not None:
        return "its forward was replaced or compiled"
    if filter is not None:
        if not filter(name, child):
            return "the filter said no"
    elif end:
        return end
    elif named_as_head(parts[peft - 1], in_block):
        return "the head (pass filter= to convert it)"
    elif parts[peft:] and parts[peft] in PEFT_TRAINS and (recipe.weight is not None or recipe.fake is not None or recipe.one_bit is not None):
        return "an adapter of peft, which trains in full precision (pass filter= to convert it)"
    elif isinstance(child, torch.nn.Conv2d) and child.groups == child.in_channels > 1:
        return "a depthwise convolution, whose channels would run one after the other, tens of times slower (pass filter= to convert it)"
    elif id(child.weight) in embeddings:
        return "its weight is an embedding's (pass filter= to convert it)"
    if recipe.weight is not None and id(child.weight) in embeddings:
        return "its weight is an embedding's, which cannot be stored quantised"
    if formats.float_code(child.weight.dtype) is None:
        return f"its weight is {child.weight.dtype}; float32, bfloat16 or float16 can be converted"
    if child.weight.is_sparse:
        return "its weight is sparse"
    if recipe.history and not isinstance(child, torch.nn.Linear):
        return f"recipe {recipe.name}'s delayed scaling is for linear layers"
    return ""
