"""What training a LLaMA takes, by size and optimizer: the table and the picture of docs/results, from gradmill.memory's exact counts.

    python bench/memory.py
"""
from __future__ import annotations

import argparse
import io
import pathlib

from gradmill import demo, memory

#: name -> (optimizer, options of gradmill.memory.plan)
CONFIGURATIONS = {
    "AdamW": ("adamw", dict(states="bf16")),
    "AdamW, 8-bit states": ("adamw8bit", {}),
    "GaLore": ("galore", dict(states="bf16", bits=16)),
    "GaLore, 8-bit states": ("galore", dict(states="int8", bits=16)),
    "Q-GaLore": ("qgalore", dict(weights="int8")),
    "Q-GaLore, gradients one at a time": ("qgalore", dict(weights="int8", release_gradients=True)),
}
#: What the papers print, GB: weights and states in bf16 (Zhao et al., "GaLore", table 2; 7B: table 3, 8-bit states), and everything, activations included
#: (Zhang et al., "Q-GaLore").
PAPERS = {"AdamW": {"llama-60m": 0.36, "llama-130m": 0.76, "llama-350m": 2.06, "llama-1b": 7.80},
          "GaLore": {"llama-60m": 0.24, "llama-130m": 0.52, "llama-350m": 1.22, "llama-1b": 4.38},
          "AdamW, 8-bit states": {"llama-7b": 26}, "GaLore, 8-bit states": {"llama-7b": 18}, "Q-GaLore, gradients one at a time": {"llama-7b": 15.26}}
PARTS = {"weights": "#1b6ca8", "gradients": "#c9d3dc", "optimizer states": "#d95f02", "their bases": "#f2b380"}


def parts(plan) -> list[float]:
    """Bytes a parameter of PARTS, the states without their bases."""
    return [n / plan.parameters for n in (plan.weight_bytes, plan.gradient_bytes, plan.state_bytes - plan.basis_bytes, plan.basis_bytes)]


def picture(plans) -> bytes:
    """Bytes a parameter, stacked, models side by side, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5), dpi=110, layout="constrained", facecolor="white")
    (panels,) = figure.subplots(1, len(memory.LLAMA), sharey=True, squeeze=False)
    names = list(CONFIGURATIONS)[::-1]
    for axes, model in zip(panels, memory.LLAMA):
        left = [0.0] * len(names)
        for part, (label, color) in enumerate(PARTS.items()):
            widths = [parts(plans[name, model])[part] for name in names]
            axes.barh(names, widths, left=left, color=color, edgecolor="white", linewidth=0.5, label=label)
            left = [a + b for a, b in zip(left, widths)]
        for i, name in enumerate(names):
            total = plans[name, model].total_bytes / 1e9
            axes.text(left[i] + 0.15, i, f"{total:.2f}" if total < 10 else f"{total:.1f}", va="center", fontsize=9)
        axes.set_title(f"{model.removeprefix('llama-').upper()}, rank {memory.LLAMA[model].rank}", fontsize=10)
        axes.set_xlim(0, 10.5)
        axes.set_xticks(range(0, 9, 2))
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("bytes per parameter; at the bars' ends GB (1e9) in all", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, title="LLaMAs in training, without activations")
    FigureCanvasAgg(figure)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def table(plans) -> str:
    lines = ["# What training a LLaMA takes", "",
             "Weights, gradients and optimizer states, counted on torch's meta device by `gradmill.memory.plan` (the real model and optimizer; "
             "tests/test_memory.py holds it against what is allocated); activations come on top. Weights and gradients bf16 (Q-GaLore: linear layers INT8, "
             "gradients bf16), \"AdamW\" and \"GaLore\" with bf16 states and basis, Q-GaLore with an INT4 basis and 8-bit states; ranks GaLore's paper's.", "",
             "Bytes a parameter, in brackets GB (1e9):", "",
             "| | " + " | ".join(memory.LLAMA) + " |", "| --- |" + " ---: |" * len(memory.LLAMA)]
    for name in CONFIGURATIONS:
        lines.append(f"| {name} | " + " | ".join(f"{p.bytes_per_parameter:.2f} ({p.total_bytes / 1e9:.2f})" for p in (plans[name, m] for m in memory.LLAMA)) + " |")
    lines += ["", "Weights and states alone, GB, and the papers' figures (Zhao et al., \"GaLore\", tables 2 and 3; Zhang et al., \"Q-GaLore\", whose 15.26 GB are a "
              "measured peak, activations and allocator included). The papers count nominal parameters (60M, 130M) and leave out what a code's scales take.", "",
              "| | " + " | ".join(memory.LLAMA) + " |", "| --- |" + " ---: |" * len(memory.LLAMA)]
    for name in CONFIGURATIONS:
        cells = []
        for model in memory.LLAMA:
            plan, paper = plans[name, model], PAPERS.get(name, {}).get(model)
            cells.append(f"{(plan.weight_bytes + plan.state_bytes) / 1e9:.2f}" + (f" (paper {paper:g})" if paper else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "![the first table as bars](memory.png)", "", "`python bench/memory.py`"]) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python bench/memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent / "docs" / "results")
    args = parser.parse_args(argv)
    plans = {(name, model): memory.plan(model, optimizer, **options) for name, (optimizer, options) in CONFIGURATIONS.items() for model in memory.LLAMA}
    args.out.mkdir(parents=True, exist_ok=True)
    for path, data in ((args.out / "memory.md", table(plans).encode()), (args.out / "memory.png", picture(plans))):
        demo.write_whole(path, data)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
