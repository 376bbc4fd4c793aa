"""convert: swaps a model's linear layers for gradmill's, in place."""
from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Callable

import torch

from gradmill import formats, recipes
from gradmill.nn.linear import Linear
from gradmill.weight import nbytes

__all__ = ["Report", "convert"]

#: Names of a language model's or classifier's last layer, which loses most from low precision.
HEAD_NAMES = ("lm_head", "head", "output", "classifier", "embed_out", "score", "fc_out")


@dataclass
class Report:
    """What :func:`convert` did: ``str(report)`` is a table."""

    recipe: str
    replaced: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  #: (name, why)
    bytes_before: int = 0  #: of the replaced layers' weights
    bytes_after: int = 0
    #: replaced layer -> bytes: its weight before and after, what is kept of its input for backward before and after, for 1,024 tokens
    bytes: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    new_parameters: bool = False  #: the recipe stores weights in low precision or adds steps: an optimizer made before is out of date

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table()
        table.add_column("layer", overflow="fold")
        table.add_column("result", overflow="fold")
        table.add_column("weight bytes", justify="right")
        table.add_column("kept per 1,024 tokens", justify="right")
        for name in self.replaced:
            before, after, kept_before, kept = self.bytes[name]
            table.add_row(name, "replaced", f"{before:,} -> {after:,}", f"{kept_before:,} -> {kept:,}")
        for name, why in self.skipped:
            table.add_row(name, f"skipped: {why}")
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        after = "\nThe converted layers have new parameters: make the optimizer after this." if self.new_parameters else ""
        return (f"gradmill.convert, recipe {self.recipe}: {len(self.replaced)} replaced, {len(self.skipped)} skipped; replaced weights "
                f"{self.bytes_before:,} -> {self.bytes_after:,} bytes\n{text.getvalue().rstrip()}{after}")


def convert(model: torch.nn.Module, recipe: str | recipes.Recipe = "int8",
            filter: Callable[[str, torch.nn.Module], bool] | None = None) -> Report:
    """Replaces every ``torch.nn.Linear`` in ``model`` by :class:`gradmill.nn.Linear`, in place.

    Exact ``nn.Linear`` only (subclasses may mean something else); ties, hooks and, where the recipe allows, the
    Parameter objects themselves are kept, so an optimizer made before still steps them. Where the recipe stores
    weights in low precision the Parameters are new: make the optimizer afterwards.

    Args:
        model: the module whose children are searched. ``model`` itself is not replaced.
        recipe: a name or a :class:`gradmill.recipes.Recipe`.
        filter: ``filter(name, layer)`` says whether to convert; by default everything but the head (a layer named
            lm_head, head, output, classifier, embed_out, score or fc_out, or one whose weight is an embedding's).

    Returns:
        A :class:`Report`.

    Raises:
        TypeError: if model is not a Module. ValueError: unknown recipe, or ``model`` is itself an ``nn.Linear``.
    """
    recipe = recipes.get(recipe)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
    if type(model) is torch.nn.Linear:
        raise ValueError("model is itself a torch.nn.Linear, which cannot be replaced in place: use gradmill.nn.Linear.from_linear")
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    report, done, packed = Report(recipe.name), {}, {}
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):  # not named_children: it hides the second name of a tie
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if isinstance(child, Linear):
                report.skipped.append((name, f"already a gradmill layer, recipe {child.recipe.name}"))
            elif isinstance(child, torch.nn.Linear) and type(child) is not torch.nn.Linear:
                report.skipped.append((name, f"a subclass of nn.Linear ({type(child).__name__})"))
            elif isinstance(child, torch.nn.MultiheadAttention) and child.in_proj_weight is not None:
                report.skipped.append((f"{name}.in_proj_weight", "a bare Parameter of nn.MultiheadAttention, which calls no nn.Linear for it"))
            elif type(child) is torch.nn.Linear:
                why = _why_not(name, child_name, child, filter, embeddings, recipe)
                if why:
                    report.skipped.append((name, why))
                    continue
                if id(child) not in done:  # a module used twice stays one module
                    before = id(child.weight)
                    report.bytes_before += nbytes(child.weight)
                    new = Linear.from_linear(child, recipe)
                    report.new_parameters |= recipe.weight is not None or recipe.fake is not None
                    for kind, parameter in new._parameters.items():  # tied weights stay tied, with all that is made from them
                        if kind.startswith("weight"):
                            new._parameters[kind] = packed.setdefault((before, kind), parameter)
                            report.bytes_after += nbytes(parameter)
                    done[id(child)] = (new, child)  # keeps `child` alive: its id stays its own
                setattr(parent, child_name, done[id(child)][0])
                report.replaced.append(name)
                new, old = done[id(child)]
                kept = recipe.saved_bytes(1024, old.in_features, old.weight.element_size()) if new.weight.requires_grad else 0
                report.bytes[name] = nbytes(old.weight), nbytes(new.weight), 1024 * old.in_features * old.weight.element_size(), kept
    return report


def _why_not(name, child_name, child, filter, embeddings, recipe) -> str:
    if child._parameters.get("weight") is None:
        return "its weight is computed (weight_norm, prune or a parametrisation)"
    if "forward" in child.__dict__ or child._compiled_call_impl is not None:
        return "its forward was replaced or compiled"
    if filter is not None:
        if not filter(name, child):
            return "the filter said no"
    elif child_name in HEAD_NAMES:
        return "the head (pass filter= to convert it)"
    elif id(child.weight) in embeddings:
        return "its weight is an embedding's (pass filter= to convert it)"
    if recipe.weight is not None and id(child.weight) in embeddings:
        return "its weight is an embedding's, which cannot be stored quantised"
    if formats.float_code(child.weight.dtype) is None:
        return f"its weight is {child.weight.dtype}; float32, bfloat16 or float16 can be converted"
    if child.weight.is_sparse:
        return "its weight is sparse"
    return ""
