"""The gradmill command: ``gradmill info``, ``demo``, ``memory``, ``profile`` and ``bench``."""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys


def _parser() -> argparse.ArgumentParser:
    import gradmill
    from gradmill import memory
    from gradmill.demo import OPTIMIZERS, Options, recipe_names
    from gradmill.optim._base import STATES

    parser = argparse.ArgumentParser(prog="gradmill", description="Custom kernels that make PyTorch training cheaper.")
    parser.add_argument("--version", action="version", version=f"gradmill {gradmill.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{info,demo,memory,profile,bench}")
    info = commands.add_parser("info", help="what was compiled, what this machine has, where each op runs (the default)",
                               description="What was compiled, what this machine has, and in which backend each op runs.")
    info.add_argument("--json", action="store_true", help="print JSON, for programs")

    d = Options()
    demo = commands.add_parser(
        "demo", help="train a small language model with torch and with gradmill, side by side",
        description="Trains one byte-level language model twice from the same seed on the same batches: with torch's layers and fused "
                    "AdamW, and with gradmill. Prints a table side by side and writes demo.json and demo.png. Ctrl-C keeps what "
                    "was measured.")
    demo.add_argument("--recipe", choices=recipe_names(), help="gradmill's matmuls and weights (default int8_weights; with fedspeed and xgrad int8)")
    demo.add_argument("--optimizer", choices=list(OPTIMIZERS), metavar="NAME", default=d.optimizer,
                      help=f"gradmill's optimizer (default %(default)s): {', '.join(OPTIMIZERS)}")
    demo.add_argument("--no-baseline", dest="baseline", action="store_false", help="leave out torch's half")
    demo.add_argument("--steps", type=int, default=d.steps, help="training steps of each half (default %(default)s)")
    demo.add_argument("--device", choices=["auto", "cpu", "cuda"], default=d.device, help="default: cuda if there is one")
    demo.add_argument("--seed", type=int, default=d.seed, help="of weights, batches and rounding (default %(default)s)")
    demo.add_argument("--batch", type=int, default=d.batch, help="windows of text in a step (default %(default)s)")
    demo.add_argument("--seq", type=int, default=d.seq, help="bytes in a window (default %(default)s)")
    demo.add_argument("--width", type=int, default=d.width, help="model width: 32 or a multiple of 64 (default %(default)s)")
    demo.add_argument("--depth", type=int, default=d.depth, help="blocks (default %(default)s)")
    demo.add_argument("--lr", type=float, help="gradmill's peak learning rate (default: one that suits the optimizer)")
    demo.add_argument("--baseline-lr", type=float, help="torch's peak learning rate (default: the best of those tried)")
    demo.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    demo.add_argument("--text", metavar="PATH", help="a file or folder to learn instead of Python's standard library")
    demo.add_argument("--out", metavar="FOLDER", default=d.out, help="where demo.json and demo.png go (default ./%(default)s)")

    m = commands.add_parser(
        "memory", help="bytes that training a LLaMA takes for weights, gradients and optimizer states",
        description="Counts the bytes of weights, gradients and optimizer states of a configuration, exactly and before anything is trained. "
                    "Activations are not counted.")
    ranks = ", ".join(f"{name} {shape.rank}" for name, shape in memory.LLAMA.items())
    m.add_argument("--model", choices=list(memory.LLAMA), required=True, help="sizes as in GaLore's paper, vocabulary 32000")
    m.add_argument("--optimizer", choices=list(memory.OPTIMIZERS), default="qgalore", help="default %(default)s")
    m.add_argument("--weights", choices=memory.WEIGHTS, default="bf16",
                   help="int8: linear layers but the head in INT8, the rest and all gradients bf16 (default %(default)s)")
    m.add_argument("--rank", type=_rank, help=f"of a projection; below 1 a fraction of the side (defaults: {ranks}; frugal 0.25)")
    m.add_argument("--states", choices=STATES, help="how optimizer states are stored (default: the optimizer's own)")
    m.add_argument("--bits", type=int, choices=[4, 8, 16, 32], help="of a projection's basis (default: the optimizer's own)")
    m.add_argument("--release-gradients", action="store_true", help="gradients live one at a time, as gradmill.optim.release_gradients frees them")
    m.add_argument("--offload", action="store_true", help="the optimizer's states are in CPU memory (offload=True)")
    m.add_argument("--json", action="store_true", help="print JSON, for programs")
    commands.add_parser(
        "profile", help="run your program and show what gradmill's ops cost in it", usage="gradmill profile [-h] [--] [python] SCRIPT|-m MODULE ...",
        description="Runs a script or a module as python would, in this process, and prints at its end, also after an exception, a table per "
                    "gradmill op: calls, time, share of the wall time, bytes, backend, and what could be faster. The exit code is the program's.")
    commands.add_parser("bench", help="gradmill, torch and peers, interleaved, with the machine's limits (gradmill bench --help)", add_help=False)
    return parser


def _bench(arguments: list[str]) -> int:
    """Runs bench/run.py, the wheel's or the checkout's, in a Python of its own: it sets thread counts before torch is loaded."""
    here = pathlib.Path(__file__).resolve().parent
    for script in (here / "bench" / "run.py", here.parent / "bench" / "run.py"):
        if script.with_name("runner.py").exists():
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, *(["-P"] if getattr(sys.flags, "safe_path", False) else []), str(script), *arguments])
    print(f"gradmill bench: error: bench/run.py is neither in {here} nor beside it: reinstall gradmill", file=sys.stderr)
    return 2


def _profile(program: list[str], console) -> int:
    from gradmill.profile import run

    try:
        return run(program[program[:1] == ["--"]:], console)
    except ValueError as error:
        print(f"gradmill profile: error: {error}", file=sys.stderr)
        return 2


def _rank(text: str) -> int | float:
    """A whole rank, or a fraction."""
    try:
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 2 for arguments that make no sense, 130 after Ctrl-C, 1 where nobody reads what it prints."""
    try:
        code = _command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\ngradmill: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # python flushes once more as it ends
        return 1


def _command(argv: list[str]) -> int:
    from rich.console import Console

    if argv[:1] == ["bench"]:
        return _bench(argv[1:])
    if argv[:1] == ["profile"] and argv[1:2] not in (["-h"], ["--help"]):  # argparse would take -m and -u for options of its own
        return _profile(argv[1:], Console())
    parser = _parser()
    arguments = parser.parse_args(argv)
    console = Console()
    if arguments.command == "demo":
        from gradmill import demo

        options = vars(arguments)
        options.pop("command")
        try:
            return demo.run(demo.Options(**options), console)
        except demo.DemoError as error:
            print(f"gradmill demo: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\ngradmill demo: stopped; files of this run that are there are whole", file=sys.stderr)
            return 130
    if arguments.command == "memory":
        from gradmill import memory

        options = vars(arguments)
        options.pop("command")
        as_json = options.pop("json")
        try:
            plan = memory.plan(**options)
        except ValueError as error:
            print(f"gradmill memory: error: {error}", file=sys.stderr)
            return 2
        if as_json:
            print(json.dumps(plan.to_dict(), indent=2))
        else:
            plan.show(console)
        return 0
    from gradmill import info

    if getattr(arguments, "json", False):
        print(json.dumps(info.collect(), indent=2))
    else:
        info.show(console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
