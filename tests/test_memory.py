"""gradmill memory: the plan against what weights, gradients and a stepped optimizer really hold."""
import json
import runpy
from pathlib import Path

import pytest
import torch

import gradmill
from gradmill import cli, memory
from gradmill.memory import LLAMA, Llama
from gradmill.optim import GaLoreAdamW, release_gradients, state_nbytes

SMALL = Llama(width=128, hidden=344, heads=2, layers=2, rank=32, vocabulary=211)
CASES = [
    ("adamw", {}), ("adamw", dict(weights="fp32", states="bf16")), ("adamw8bit", {}), ("adamw4bit", dict(weights="int8")), ("lion", dict(states="fp8")), ("sgd", {}),
    ("galore", dict(bits=16, states="bf16")), ("galore", dict(weights="fp32", rank=0.1)), ("qgalore", dict(weights="int8")), ("qgalore", dict(bits=8, rank=17)),
    ("fira", {}), ("frugal", dict(weights="int8")), ("dct", dict(states="int8")),
]


def trained(shape, optimizer, weights="bf16", **options):
    """A model of such a shape on the CPU after one step, and its optimizer."""
    model = memory.build(shape, weights, "cpu")
    options.setdefault("rank", (0.25 if optimizer == "frugal" else shape.rank) if optimizer in ("galore", "qgalore", "fira", "frugal", "dct") else None)
    made = memory.make_optimizer(model, optimizer, **options)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype)
    made.step()
    return model, made


@pytest.mark.parametrize("optimizer, options", CASES, ids=lambda v: v if isinstance(v, str) else ",".join(f"{k}={x}" for k, x in v.items()) or "-")
def test_a_plan_is_what_is_allocated(optimizer, options):
    plan = memory.plan(SMALL, optimizer, **options)
    model, made = trained(SMALL, optimizer, **options)
    params = list(model.parameters())
    assert plan.parameters == sum(p.numel() for p in params)
    assert plan.weight_bytes == sum(gradmill.nbytes(p) for p in params)
    assert plan.gradient_bytes == sum(p.grad.nbytes for p in params)
    assert plan.state_bytes == state_nbytes(made)
    assert plan.basis_bytes == sum(v.nbytes for state in made.state.values() for k, v in state.items() if k.startswith("basis_"))
    assert plan.total_bytes == plan.weight_bytes + plan.gradient_bytes + plan.state_bytes
    assert plan.bytes_per_parameter == plan.total_bytes / plan.parameters


def test_the_queue_of_cosines_is_all_that_a_long_run_adds():
    plan = memory.plan(SMALL, "qgalore")
    model, made = trained(SMALL, "qgalore")
    for group in made.param_groups:
        for p in group["params"]:
            made.state[p].update(dict(next_refresh=1) if "next_refresh" in made.state[p] else {})
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype)
    made.step()
    queues = [state["cosines"].nbytes for state in made.state.values() if "cosines" in state]
    assert len(queues) == 14 and 0 < max(queues) <= 20 and state_nbytes(made) == plan.state_bytes + sum(queues)


def test_released_gradients_live_one_at_a_time():
    """The most bytes of gradients that are there at once, counted as backward goes."""
    layers = torch.nn.Sequential(*[torch.nn.Linear(n, m, bias=False) for n, m in ((40, 70), (70, 90), (90, 30))])
    made, peak = GaLoreAdamW(layers.parameters()), []
    for p in layers.parameters():  # hooks run in the order of their making: this one before the release
        p.register_post_accumulate_grad_hook(lambda p: peak.append(sum(q.grad.nbytes for q in layers.parameters() if q.grad is not None)))
    release_gradients(layers, made)
    layers(torch.randn(3, 40)).sum().backward()
    assert len(peak) == 3 and max(peak) == 70 * 90 * 4
    whole, released = (memory.plan(SMALL, "qgalore", release_gradients=r) for r in (False, True))
    assert released.gradient_bytes == 128 * 344 * 2 and whole.total_bytes - released.total_bytes == whole.gradient_bytes - released.gradient_bytes


def test_offloaded_states_are_not_on_the_gpu():
    here, away = (memory.plan(SMALL, "adamw8bit", offload=offload) for offload in (False, True))
    assert here.state_bytes == away.state_bytes > 0 and away.total_bytes == here.total_bytes - here.state_bytes == away.weight_bytes + away.gradient_bytes
    here, away = (memory.plan(SMALL, "galore", offload=offload) for offload in (False, True))  # the basis stays beside the gradient
    assert here.basis_bytes == away.basis_bytes > 0 and away.total_bytes == here.total_bytes - here.state_bytes + here.basis_bytes


def test_the_papers_models():
    """Parameters of the LLaMAs with an untied head, added up by hand; AdamW in bf16 is 2 + 2 + 4 bytes a parameter."""
    for name, billions in (("llama-60m", 0.058), ("llama-130m", 0.134), ("llama-350m", 0.368), ("llama-1b", 1.339), ("llama-7b", 6.738)):
        s, plan = LLAMA[name], memory.plan(name, "adamw", states="bf16")
        assert plan.parameters == 2 * s.vocabulary * s.width + s.layers * (4 * s.width ** 2 + 3 * s.width * s.hidden + 2 * s.width) + s.width
        assert round(plan.parameters / 1e9, 3) == billions and plan.total_bytes == 8 * plan.parameters
    p, s = memory.plan("llama-7b", "qgalore", rank=1024, weights="int8", release_gradients=True), LLAMA["llama-7b"]
    square, wide, full = s.width ** 2, s.width * s.hidden, 2 * s.vocabulary * s.width + (2 * s.layers + 1) * s.width
    assert p.weight_bytes == s.layers * (4 * square + 3 * wide) * (256 + 4 + 1) // 256 + 2 * full  # a scale and a zero point in 256
    assert p.basis_bytes == s.layers * 7 * 1024 * s.width // 256 * (128 + 4 + 1)
    assert p.total_bytes < 15.26e9, "Q-GaLore's figure, with activations"


def test_command(capsys):
    assert cli.main("memory --model llama-7b --optimizer qgalore --rank 1024 --weights int8 --release-gradients --json".split()) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == memory.plan("llama-7b", "qgalore", rank=1024, weights="int8", release_gradients=True).to_dict()
    assert cli.main("memory --model llama-60m --optimizer galore --rank 0.25 --states bf16 --bits 8".split()) == 0
    shown = capsys.readouterr().out
    plan = memory.plan("llama-60m", "galore", rank=0.25, states="bf16", bits=8)
    assert all(f"{n:,}" in shown for n in (plan.parameters, plan.weight_bytes, plan.gradient_bytes, plan.state_bytes, plan.basis_bytes, plan.total_bytes))


@pytest.mark.parametrize("arguments, named", [
    (["--optimizer", "adamw", "--rank", "8"], "adamw has none"), (["--optimizer", "lion", "--bits", "8"], "does not project"), (["--optimizer", "dct", "--bits", "8"], "indices"),
    (["--rank", "0"], "rank is 0"), (["--rank", "1.5"], "rank is 1.5"), (["--rank", "512"], "rank 512"),
])
def test_choices_that_do_not_fit(arguments, named, capsys):
    assert cli.main(["memory", "--model", "llama-60m", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_unknown_names_list_the_choices():
    for arguments, named in ((("gpt-2", "adamw"), "llama-7b"), (("llama-7b", "adam9"), "qgalore")):
        with pytest.raises(ValueError, match=named):
            memory.plan(*arguments)
    with pytest.raises(ValueError, match="int8"):
        memory.plan("llama-60m", "adamw", weights="int3")
    with pytest.raises(ValueError, match="needs one"):
        memory.make_optimizer(memory.build(SMALL), "qgalore")


def test_the_papers_table_and_picture(tmp_path, monkeypatch):
    """bench/memory.py, for one small model."""
    monkeypatch.setattr(memory, "LLAMA", {"llama-60m": SMALL})
    script = Path(__file__).resolve().parent.parent / "bench" / "memory.py"
    runpy.run_path(str(script))["main"](["--out", str(tmp_path)])
    plan = memory.plan("llama-60m", "qgalore", weights="int8", release_gradients=True)
    text = (tmp_path / "memory.md").read_text()
    assert f"{plan.bytes_per_parameter:.2f} ({plan.total_bytes / 1e9:.2f})" in text and "(paper 0.24)" in text
    assert (tmp_path / "memory.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_script_that_trains_a_llama_on_a_gpu_trains_a_small_one_here():
    """bench/llama.py, both ways: gradients are released, logits come in chunks, plain torch's layers step in backward."""
    from argparse import Namespace

    from gradmill.bench import llama

    args = Namespace(device="cpu", steps=2, batch=3, seq=200, rank=32, lr=1e-3, model="small")
    for by_torch in (False, True):
        report = llama.train(args, SMALL, by_torch)
        assert report["peak_bytes"] is None and report["step_s"] > 0
        assert len(report["losses"]) == 2 and all(4.5 < loss < 7 for loss in report["losses"]), report["losses"]  # log(211) is 5.35

    torch.manual_seed(1)
    model = llama.Model(memory.build(SMALL, "fp32", "cpu"), SMALL, 200, "cpu")
    x, y = torch.randint(211, (3, 200)), torch.randint(211, (3, 200))
    whole = torch.nn.functional.cross_entropy(model.llama["lm_head"](model.hidden(x)).flatten(0, 1), y.flatten())
    assert 3 * 200 > llama.CHUNK
    torch.testing.assert_close(model(x, y), whole)
    weight = torch.randn(64, 40)
    for w in (weight, weight.t().contiguous()):
        layer = llama.PlainLinear(w, 8)
        bound = layer.method.weight[1].max().item() / 2 + 1e-6
        torch.testing.assert_close(layer.weight(torch.float32), w, rtol=0, atol=bound)
        before, g = layer.weight(torch.float32).clone(), torch.randn(5, w.shape[0])
        x = torch.randn(5, w.shape[1], requires_grad=True)
        layer(x).backward(g)
        torch.testing.assert_close(x.grad, g @ before)
        assert not torch.equal(layer.weight(torch.float32), before)
