"""gradmill against torch, the installed peers and this machine's own limits, side by side in one process.

    python bench/run.py                                    all families, under 5 minutes on 2 threads (= make bench)
    python bench/run.py --quick --family optim,quant       fewer rounds, two families
    python bench/run.py --full --json OUT.json --html OUT.html    to publish: scaling, torch.compile; 25 to 40 minutes on 2 threads
    python bench/run.py --isa avx2                         gradmill and torch both held to AVX2
    python bench/run.py --device cuda
    python bench/run.py --from OUT.json --html OUT.html    a page of an earlier run

`gradmill bench` is the same command, also where only the wheel is installed.
docs/benchmarks.md says how to read what it prints.
"""
from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
#: Seconds of timing per case and the fewest samples of a slow entry.
PACE = {"quick": (1.0, 3), "default": (1.5, 3), "full": (12.0, 7)}


def package():
    """This folder as the package gradmill_bench, without putting anything on sys.path."""
    spec = importlib.util.spec_from_file_location("gradmill_bench", HERE / "__init__.py", submodule_search_locations=[str(HERE)])
    module = sys.modules["gradmill_bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def arguments(argv=None):
    name = "gradmill bench" if HERE.parent.name == "gradmill" else "python bench/run.py"   # in the wheel it is the command alone
    parser = argparse.ArgumentParser(prog=name, description=__doc__.replace("python bench/run.py", name), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="?", metavar="FAMILY", default="", help="the same as --family FAMILY")
    parser.add_argument("--family", default="", help="comma-separated: quant, matmul, conv, optim, projection, binary, codebook, overhead, training, scaling (default: all; "
                        "scaling and the larger models only with --full or by name)")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of every library (default: all that this process may use)")
    parser.add_argument("--isa", choices=("portable", "avx2", "avx512", "avx512_vnni"), help="hold gradmill and torch to an instruction set")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--quick", dest="pace", action="store_const", const="quick", help="1 s a case")
    pace.add_argument("--full", dest="pace", action="store_const", const="full", help="12 s a case, every case, torch.compile too: numbers to publish")
    peers = parser.add_mutually_exclusive_group()
    peers.add_argument("--peers", action="store_true", help="installed peers take part (they do anyway)")
    peers.add_argument("--no-peers", action="store_true", help="torch only")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: shows that everything runs, measures nothing")
    parser.add_argument("--json", metavar="FILE", help="everything, every sample")
    parser.add_argument("--markdown", metavar="FILE", help="the tables, for docs")
    parser.add_argument("--html", metavar="FILE", help="one self-contained page: ratios, rooflines, scaling, memory")
    parser.add_argument("--png", metavar="FILE", help="one picture: every job's ratio to torch and to its best peer")
    parser.add_argument("--from", dest="source", metavar="JSON", help="measure nothing: make --html (and --png) of an earlier run's --json")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.set_defaults(pace="default")
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads is {args.threads}; it must be at least 1")
    for option in ("json", "markdown", "html", "png"):   # now, not when all is measured
        if getattr(args, option):
            problem = unwritable(pathlib.Path(getattr(args, option)).resolve())
            if problem:
                parser.error(f"--{option} {getattr(args, option)}: {problem}")
    return args


def unwritable(path: pathlib.Path) -> str:
    """Why no file can be written there, or "". Its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"its folder cannot be made ({error.strerror})"
    return "it is a folder; name a file" if path.is_dir() else "" if os.access(path.parent, os.W_OK) else "its folder is not writable"


def prepare_environment(args):
    """What has to stand in the environment before torch is loaded. --isa starts this program anew with it."""
    threads = args.threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no peer fetches kernels in the middle of a measurement
    if args.isa and os.environ.get("GRADMILL_BENCH_ISA") != args.isa:
        package()
        from gradmill_bench.limits import ISA_ENVIRONMENT
        os.execve(sys.executable, [sys.executable, *(["-P"] if sys.flags.safe_path else []), str(HERE / "run.py"), *sys.argv[1:]],
                  {**os.environ, **ISA_ENVIRONMENT[args.isa], "GRADMILL_BENCH_ISA": args.isa})
    return threads


def main() -> int:
    args = arguments()
    threads = prepare_environment(args)
    package()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from gradmill_bench import limits as machine, page, peers, report, runner
    if args.source:
        try:
            data = json.loads(pathlib.Path(args.source).read_text())
            text = page.page(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"--from {args.source}: no run's JSON ({runner.explain(error)})", file=sys.stderr)
            return 2
        if args.html or not args.png:
            report.write(args.html or str(pathlib.Path(args.source).with_suffix(".html")), text)
        if args.png:
            page.picture(data, args.png)
        return 0
    console = Console(highlight=False, width=min(100, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 100)
    named = tuple(f for f in (args.family or args.families).split(",") if f)
    families = named or runner.FAMILIES
    unknown = [f for f in families if f not in runner.FAMILIES]
    if unknown:
        meant = [close for f in unknown for close in difflib.get_close_matches(f, runner.FAMILIES, 1)]
        console.print(f"--family {','.join(unknown)}: there are {', '.join(runner.FAMILIES)}{f' (did you mean {chr(44).join(meant)}?)' if meant else ''}", soft_wrap=True)
        return 2
    cases = [c for c in runner.load(families) if args.case in c.name and (not c.full or args.pace == "full" or (named if c.family == "scaling" else args.case))]
    if not cases:
        console.print(f"--case {args.case}: no case's name contains it (--list names them; some are of --full runs alone)")
        return 2
    if args.list:
        print("\n".join(f"{c.family}.{c.name}" for c in cases))
        return 0
    import torch
    if args.device == "cuda" and not torch.cuda.is_available():
        console.print("--device cuda: torch finds no CUDA device")
        return 2
    runner.pin(threads)
    seconds, rounds = (0.05, 2) if args.tiny else PACE[args.pace]
    ctx, clock = runner.Context(args.device, args.tiny, args.pace == "full"), runner.timer(args.device)

    facts = machine.describe(args.device)
    cap = machine.check_cap(args.isa, threads, 1 if args.tiny else 3) if args.isa else {}
    cap_notes = report.cap_lines(args.isa, cap) if args.isa else []
    limits = machine.measure(ctx, clock, min(seconds, 4))
    facts["peers"] = {} if args.no_peers else peers.found(args.device)
    for line in [*report.machine_lines(facts, limits), *cap_notes]:
        console.print(line, style="bold red" if line.startswith("!") else "", markup=False, soft_wrap=True)
    console.print("\n".join(page.peer_lines(facts)), markup=False, soft_wrap=True)
    if args.tiny:
        console.print("! --tiny: these sizes measure overheads; nothing below is a result.", style="bold red")
    console.print()

    results, started, stopped = [], time.perf_counter(), True   # until the end is reached
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True,
                   disable=not console.is_terminal, refresh_per_second=1)   # a bar that moves more often would be other work
    task = bar.add_task("", total=len(cases))

    def save(after=()):
        settings = {"pace": args.pace, "seconds_per_case": seconds, "rounds": rounds, "tiny": args.tiny, "complete": not stopped,
                    "took_s": time.perf_counter() - started}
        data = report.as_data(facts, limits, dict(after), cap, settings, results)
        if args.json:
            report.write(args.json, report.dumps(data))
        return settings, data
    bar.start()
    try:
        for family in families:
            mine = [c for c in cases if c.family == family]
            for line in report.header(family) if mine else []:
                console.print(line)
            for c in mine:
                bar.update(task, description=f"{c.family}.{c.name}")
                result = runner.measure(c, ctx, clock, seconds=seconds / (3 if c.family == "scaling" else 1), rounds=rounds, peers=not args.no_peers)
                runner.score(result, limits)
                results.append(result)
                for line in report.block(result):
                    console.print(line)
                bar.advance(task)
                if args.json:
                    save()   # what ends this process later leaves what was measured until here
            console.print()
        stopped = False
    except KeyboardInterrupt:
        console.print("Stopped; what was measured until now:")
    finally:
        bar.stop()
    after = {} if stopped else machine.measure(ctx, clock, min(seconds, 4))
    console.print(report.summary(results))
    for line in [] if args.tiny else report.drift_lines(limits, after):
        console.print(line, style="bold red", markup=False)
    if any(r.disturbed for r in results):
        console.print("! Jobs marked ! were timed while other processes worked: measure again on a quiet machine.", style="bold red")
    settings, data = save(after)
    console.print(f"\n[dim]median of interleaved samples; spread: half the interquartile range; a ratio is the median over"
                  f"\nrounds of the other's time by gradmill's in the same round; tie: the ratio's interquartile range is"
                  f"\nwider than the difference. {settings['took_s']:.0f} s.[/dim]")
    if args.html:
        report.write(args.html, page.page(data))
    if args.png:
        page.picture(data, args.png)
    if args.markdown:
        report.write(args.markdown, report.markdown(facts, limits, after, cap_notes, settings, results))
    return 130 if stopped else 1 if any(r.failed for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
