"""DTensor parameters (FSDP2), DDP and torch.distributed.checkpoint: two gloo processes, started once for all checks.

Run as a program, this file forks the two processes; each runs every ``check_`` function, on a process group of its own, and
writes what failed. As a test module it starts that program and has a test for each check.
"""
import copy
import datetime
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

PROCESSES = 2
SHAPES = [(70, 130), (5, 300), (1, 64), (131,), (3, 4, 30), (1,), (0, 4), (131, 70), (7, 2, 3)]


# --- in the two processes ---------------------------------------------------------------------------------
def mesh():
    from torch.distributed.device_mesh import init_device_mesh
    return init_device_mesh("cpu", (PROCESSES,))


def shard(t):
    from torch.distributed.tensor import Shard, distribute_tensor
    return distribute_tensor(t, mesh(), [Shard(0)])


def values(dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype) for s in SHAPES]


def whole(t):
    if hasattr(t, "full_tensor") and t.dtype.itemsize == 1 and t.is_floating_point():  # gloo does not send float8
        from gradmill.optim._base import like_shards
        return like_shards(t.to_local().view(torch.uint8), t, t.shape).full_tensor().view(t.dtype)
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def same(a, b, what):
    a, b = whole(a.detach()), b.detach()
    assert a.dtype == b.dtype and a.shape == b.shape, (what, a.dtype, b.dtype, a.shape, b.shape)
    assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)) if a.numel() else True, what


def pair(make, dtype=torch.bfloat16):
    """(parameters, optimizer) of one process, and sharded over both."""
    single = [torch.nn.Parameter(v.clone()) for v in values(dtype)]
    parts = [torch.nn.Parameter(shard(v)) for v in values(dtype)]
    return (single, make(single)), (parts, make(parts))


def give(single, parts, step, spoil=False):
    for p, q, g in zip(single, parts, values(torch.float32, 100 + step)):
        if spoil and g.numel():
            g.view(-1)[0] = float("nan")  # on the first process only
        p.grad, q.grad = g.to(p.dtype), shard(g.to(p.dtype))


def check_sharded_steps_are_bit_equal_to_one_process():
    from gradmill.optim import AdamW, Lion
    for cls, options in ((AdamW, {}), (AdamW, {"amsgrad": True}), (Lion, {})):
        for states in ("fp32", "bf16", "fp8", "int8", "int4"):
            for bits in (None, 24, 32):
                (single, a), (parts, b) = pair(lambda ps: cls(ps, lr=0.01, states=states, min_quantized_numel=1, seed=3, master_weight_bits=bits, **options))
                for step in range(3):
                    give(single, parts, step)
                    a.step(), b.step()
                for p, q in zip(single, parts):
                    same(q, p, (cls, states, bits, p.shape))
                    for name, value in a.state[p].items():
                        if isinstance(value, torch.Tensor) and name != "step":
                            same(b.state[q][name], value, (cls, states, bits, p.shape, name))


def check_norms_span_the_shards():
    """Sums of shards are added in another order than one process adds: 2^-50 in the norm, an ulp in the weight."""
    from gradmill.optim import LAMB, LARS, AdamW, StableSPAM
    for cls in (LAMB, LARS, StableSPAM, AdamW):
        (single, a), (parts, b) = pair(lambda ps: cls(ps, lr=0.01, max_grad_norm=0.5, seed=3), torch.float32)
        for step in range(4):
            give(single, parts, step)
            a.step(), b.step()
            assert abs(a.grad_norm / b.grad_norm - 1) < 1e-12
        for p, q in zip(single, parts):
            torch.testing.assert_close(whole(q.detach()), p.detach(), rtol=1e-6, atol=1e-7)


def check_a_nan_on_one_process_stops_both():
    from gradmill.optim import AdamW
    for policy in ("skip", "raise"):
        (single, _), (parts, b) = pair(lambda ps: AdamW(ps, on_nonfinite=policy))
        before = [whole(q.detach()).clone() for q in parts]
        give(single, parts, 0, spoil=True)
        try:
            b.step()
            assert policy == "skip"
        except FloatingPointError:
            assert policy == "raise"
        for p, q in zip(before, parts):
            same(q, p, policy)


def check_other_placements_are_refused_by_name():
    from gradmill.optim import AdamW
    from torch.distributed.tensor import Shard, distribute_tensor
    try:
        AdamW([torch.nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh(), [Shard(1)]))])
        raise AssertionError("accepted")
    except TypeError as error:
        assert "first dimension" in str(error)


def check_offload_of_shards_elsewhere_is_refused_by_name():
    from gradmill.optim import AdamW, staging
    parts = [torch.nn.Parameter(shard(v)) for v in values()]
    AdamW(parts, offload=True)  # on the CPU it changes nothing
    staged, staging.staged = staging.staged, lambda device: True
    try:
        AdamW(parts, offload=True)
        raise AssertionError("accepted")
    except ValueError as error:
        assert "CPUOffloadPolicy" in str(error)
    finally:
        staging.staged = staged


PROJECTIONS = [dict(basis="svd", bits=32), dict(basis="subspace", bits=4, group_size=8, moments="rotate"), dict(basis="subspace", bits=8, background=1),
               dict(basis="dct", refresh_every=1, moments="rotate"), dict(basis="dct", moments="rotate"), dict(basis="random"), dict(basis="coordinate", moments="reset")]


def check_projected_shards_step_as_one_process_does():
    """Rows projected by themselves have the same bits; where R is a sum over the processes, it rounds otherwise."""
    from gradmill.optim import AdamW, Projection
    for n, options in enumerate(PROJECTIONS):
        for residual in (None, "fira", "sign", "sgd"):
            for states, dtype in (("fp32", torch.float32), ("int8", torch.bfloat16))[:1 if residual == "sign" else 2]:
                projection = Projection(3, **{"refresh_every": 3, "residual": residual, **options})
                (single, a), (parts, b) = pair(lambda ps: AdamW(ps, lr=0.01, eps=1e-3, states=states, min_quantized_numel=1, seed=3, projection=projection), dtype)
                for step in range(5):
                    give(single, parts, step)
                    a.step(), b.step()
                for p, q in zip(single, parts):
                    what = (options, residual, states, tuple(p.shape))
                    projected = "next_refresh" in a.state[p]
                    left = projected and p.shape[0] < p[0].numel()
                    if residual != "fira" and not left:
                        same(q, p, what)
                    else:
                        torch.testing.assert_close(whole(q.detach()), p.detach(), rtol=0, atol=2e-4 if dtype == torch.float32 else 0.05, msg=lambda m: f"{what}: {m}")
                    for name, value in a.state[p].items():
                        if name.startswith("basis_"):
                            same(b.state[q][name], value, (*what, name))
                        elif isinstance(value, torch.Tensor):
                            assert value.shape == b.state[q][name].shape, (*what, name)
                assert sum("next_refresh" in state for state in b.state.values()) == 4


def check_projected_shards_resume_and_load_what_one_process_saved():
    from gradmill.optim import AdamW, Projection

    def made(ps):
        return AdamW(ps, lr=0.01, eps=1e-3, states="int8", min_quantized_numel=1, seed=3,
                     projection=Projection(3, refresh_every=3, group_size=8, background=1, moments="rotate"))
    (single, a), (parts, b) = pair(made, torch.float32)
    for step in range(4):  # step 4 started a refresh
        give(single, parts, step)
        a.step(), b.step()
    for saved in (a.state_dict(), b.state_dict()):
        resumed = [torch.nn.Parameter(shard(whole(q.detach()))) for q in parts]
        c = made(resumed)
        c.load_state_dict(copy.deepcopy(saved))
        for step in (4, 5):
            give([torch.empty_like(p) for p in single], resumed, step)
            c.step()
        copies = [torch.nn.Parameter(shard(whole(q.detach()))) for q in parts]
        d = made(copies)
        d.load_state_dict(copy.deepcopy(b.state_dict()))
        for step in (4, 5):
            give([torch.empty_like(p) for p in single], copies, step)
            d.step()
        for p, q in zip(resumed, copies):
            torch.testing.assert_close(whole(p.detach()), whole(q.detach()), rtol=0, atol=1e-3)


def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(130, 71), torch.nn.Tanh(), torch.nn.Linear(71, 3), torch.nn.Linear(3, 1))


def batches(step):
    return torch.randn(8, 130, generator=torch.Generator().manual_seed(step))


def train_steps(net, optimizer, steps, share):
    """Each process takes its share of the batch (share None: the whole one)."""
    for step in steps:
        x = batches(step)
        optimizer.zero_grad()
        net(x if share is None else x.chunk(PROCESSES)[share]).square().mean().backward()
        optimizer.step()


def sharded_model():
    from torch.distributed.fsdp import fully_shard
    net = model()
    for layer in net:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh())
    return fully_shard(net, mesh=mesh())


def make_optimizer(net, lr=0.01, projection=None):
    from gradmill.optim import AdamW
    return AdamW(net.parameters(), lr=lr, states="int8", min_quantized_numel=1, seed=5, projection=projection)


def check_fully_shard_trains_as_one_process_does():
    one, many = model(), sharded_model()
    train_steps(one, make_optimizer(one), range(5), None)
    train_steps(many, make_optimizer(many), range(5), dist.get_rank())
    for p, q in zip(one.parameters(), many.parameters()):
        torch.testing.assert_close(whole(q.detach()), p.detach(), rtol=0, atol=2e-3)  # a code of a moment may round otherwise


def check_ddp_replicas_stay_equal():
    from gradmill.optim import Projection, release_gradients
    for projection in (None, Projection(4, refresh_every=2), Projection(4, refresh_every=2, background=1), Projection(4, "random", residual="fira", refresh_every=2)):
        one, net = model(), model()
        ddp = torch.nn.parallel.DistributedDataParallel(net)
        train_steps(one, make_optimizer(one, projection=projection), range(5), None)
        train_steps(ddp, make_optimizer(ddp, projection=projection), range(5), dist.get_rank())
        for p, q in zip(one.parameters(), net.parameters()):
            torch.testing.assert_close(q.detach(), p.detach(), rtol=0, atol=2e-3)
            gathered = [torch.empty_like(q) for _ in range(PROCESSES)]
            dist.all_gather(gathered, q.detach())
            same(gathered[0], gathered[1], "replicas")
    try:
        release_gradients(ddp, make_optimizer(ddp))
        raise AssertionError("released under DDP")
    except ValueError as error:
        assert "DistributedDataParallel" in str(error)


def check_torch_distributed_checkpoint_resumes_bit_equal():
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, get_state_dict, set_state_dict
    net = sharded_model()
    optimizer = make_optimizer(net)
    train_steps(net, optimizer, range(3), dist.get_rank())
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    weights, states = get_state_dict(net, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder[0])
    full = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    train_steps(net, optimizer, range(3, 6), dist.get_rank())

    again = sharded_model()
    other = make_optimizer(again, lr=0.5)
    weights, states = get_state_dict(again, other)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder[0])
    set_state_dict(again, other, model_state_dict=weights, optim_state_dict=states)
    assert other.param_groups[0]["lr"] == 0.01
    train_steps(again, other, range(3, 6), dist.get_rank())
    for p, q in zip(net.parameters(), again.parameters()):
        same(q, whole(p.detach()), "weights")
        for name, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                same(other.state[q][name], whole(value), name)
            else:
                assert other.state[q][name] == value, name
    if dist.get_rank() == 0:  # the gathered states fit an optimizer of one process
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
        alone = model()
        single = make_optimizer(alone)
        set_optimizer_state_dict(alone, single, full)
        assert single.state[alone[0].weight]["exp_avg_codes"].shape == (71, 130)


def check_a_whole_state_dict_loads_into_shards():
    from gradmill.optim import AdamW
    for states in ("fp32", "int4"):
        (single, a), (parts, b) = pair(lambda ps: AdamW(ps, lr=0.01, states=states, min_quantized_numel=1, seed=3, master_weight_bits=24))
        give(single, parts, 0)
        a.step()
        for p, q in zip(single, parts):
            q.data.copy_(shard(p.detach()))
        b.load_state_dict(copy.deepcopy(a.state_dict()))
        give(single, parts, 1)
        a.step(), b.step()
        for p, q in zip(single, parts):
            same(q, p, (states, p.shape))


CHECKS = [name for name in dict(globals()) if name.startswith("check_")]


def process(rank, folder):
    torch.set_num_threads(1)
    for name in CHECKS:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=PROCESSES, timeout=datetime.timedelta(seconds=60))
        try:
            globals()[name]()
            result = ""
        except Exception:
            result = traceback.format_exc()
        Path(folder, f"{name}.{rank}.json").write_text(json.dumps(result))
        dist.destroy_process_group()


if __name__ == "__main__":
    import torch.multiprocessing
    torch.multiprocessing.start_processes(process, args=(sys.argv[1],), nprocs=PROCESSES, start_method="fork")
    sys.exit()


# --- as tests ---------------------------------------------------------------------------------------------
import pytest  # noqa: E402  (the processes need none)

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available() or not hasattr(os, "fork"),
                                reason="needs torch.distributed with gloo, and fork")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=540)
    return folder, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name, results):
    folder, output = results
    for rank in range(PROCESSES):
        file = folder / f"{name}.{rank}.json"
        assert file.exists(), f"process {rank} did not finish {name}:\n{output}"
        failure = json.loads(file.read_text())
        if failure:
            pytest.fail(f"process {rank}:\n{failure}", pytrace=False)
