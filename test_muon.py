"""
These tests check muon.py, and the learning rates by kind of parameter. The reference is the paper's update in float64,
in which an orthogonalised matrix is computed from its singular values, and PyTorch's own Muon.

    pytest -q test_muon.py
"""
import copy
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import muon
from conftest import (QUICK, ROOT, bad, checkpoint_of, each_arch, log_of, quick, shell, small_config, small_model,
                      stream_of, train)
from muon import Muon
from test_models import randn


def reference_orthogonal(x):
    """Return U f(S) V^T in float64: five times the polynomial f(s) = a s + b s^3 + c s^5 on the singular values."""
    U, s, Vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U @ torch.diag(s) @ Vh


def reference_muon(p, gradients, lr, weight_decay, first_update=0):
    """Return the matrix p after one update for each gradient, in float64."""
    p = p.double()
    average = torch.zeros_like(p)
    for update, gradient in enumerate(gradients, first_update):
        mu = 0.95 if update >= 300 else 0.85 + 0.1 * update / 300
        average = mu * average + (1 - mu) * gradient
        direction = (1 - mu) * gradient + mu * average
        p = p - lr * weight_decay * p - lr * 0.2 * math.sqrt(max(p.shape)) * reference_orthogonal(direction)
    return p


def updated(p, gradients, lr=0.02, weight_decay=0.1, first_update=0, Optimizer=Muon, **options):
    """Return a parameter after one update by Muon for each gradient."""
    p = torch.nn.Parameter(p.clone())
    optimizer = Optimizer([{"params": [p], "weight_decay": weight_decay, **options}], lr=lr)
    optimizer.updates = first_update
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40), (1, 8)])
@pytest.mark.parametrize("first_update", [0, 298, 1000])
def test_an_update_is_the_papers(shape, first_update):
    p = randn(*shape)
    gradients = [randn(*shape, seed=seed) for seed in range(1, 5)]
    ours = updated(p, gradients, first_update=first_update)
    expected = reference_muon(p, gradients, 0.02, 0.1, first_update)
    torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=0)
    for wrong in (reference_muon(p, gradients, 0.02, 0.0, first_update),  # no decay
                  reference_muon(p, gradients, 0.02, 0.1, first_update=150)):  # another momentum
        assert (ours - wrong).abs().max() > 2e-4 or shape == (1, 8)  # a row has one direction, whatever the momentum


def test_torchs_muon_is_the_same_in_bf16():
    """PyTorch's has a constant momentum, and rounds to bf16 on every device."""
    def torchs(groups, lr):
        return torch.optim.Muon(groups, lr=lr, adjust_lr_fn="match_rms_adamw")

    for shape in (32, 32), (64, 24), (24, 64):
        p = randn(*shape)
        gradients = [randn(*shape, seed=seed) for seed in range(1, 5)]
        change = updated(p, gradients, first_update=300) - p
        expected = updated(p, gradients, Optimizer=torchs) - p
        assert (change - expected).norm() < 0.01 * expected.norm()
        early = updated(p, gradients) - p  # negative control: the first updates have less momentum
        assert (early - expected).norm() > 0.01 * expected.norm()


def test_matrices_that_are_stored_as_one_are_treated_apart():
    """Queries, keys and values of different heights, and experts with two matrices each."""
    rows = [16, 8, 8]
    p = randn(32, 16)
    gradient = randn(32, 16, seed=1) * torch.tensor([10.0] * 16 + [1.0] * 16)[:, None]  # loud queries
    ours = updated(p, [gradient], rows=rows)
    pairs = zip(p.split(rows), gradient.split(rows))
    assert torch.equal(ours, torch.cat([updated(matrix, [part]) for matrix, part in pairs]))
    fused = updated(p, [gradient], weight_decay=0) - p
    apart = updated(p, [gradient], weight_decay=0, rows=rows) - p
    assert fused[16:].square().mean() < 0.5 * apart[16:].square().mean()  # the loud part takes it all

    experts, gradient = randn(3, 16, 20), randn(3, 16, 20, seed=1)
    ours = updated(experts, [gradient], rows=[8, 8])
    for expert in range(3):
        for part in slice(0, 8), slice(8, 16):
            alone = updated(experts[expert, part], [gradient[expert, part]])
            torch.testing.assert_close(ours[expert, part], alone, atol=1e-6, rtol=0)
    together = updated(experts.flatten(0, 1), [gradient.flatten(0, 1)]).view(experts.shape)
    for wrong in updated(experts, [gradient]), together:
        assert (ours - wrong).abs().max() > 1e-3  # gate and up as one matrix; all experts as one


def test_an_update_is_as_large_as_adamws():
    """The root mean square of an update is about 0.2 times the learning rate, for every shape."""
    for shape in (64, 64), (64, 256), (256, 64), (4, 32, 64):
        p = torch.zeros(shape)
        update = updated(p, [randn(*shape, seed=seed) for seed in range(10)][-1:], lr=1.0)
        assert 0.15 < update.square().mean().sqrt() < 0.25
        bare = muon.orthogonalize(randn(*shape))
        assert bare.square().mean().sqrt() < 0.15  # negative control: what is only orthogonal is smaller


STORED_AS_ONE = {  # heights of the matrices in a parameter of the small models
    "gpt2": {"c_attn": [64, 64, 64]},
    "phi": {"qkv_proj": [64, 32, 32], "gate_up_proj": [160, 160]},
    "deepseek": {"experts.gate_up_proj": [48, 48]},
}


@each_arch
def test_muon_has_the_matrices_and_knows_their_parts(arch):
    cfg = small_config(arch, optimizer="muon")
    model = small_model(arch)
    adamw, ours = model.configure_optimizers(cfg, "cpu")
    names = {p: name for name, p in model.named_parameters()}
    stored = STORED_AS_ONE.get(arch, {})
    for group in ours.param_groups:
        for p in group["params"]:
            assert p.dim() >= 2 and not any(word in names[p] for word in ("embed", "wte", "wpe", "lm_head", "head."))
            rows = [rows for name, rows in stored.items() if name in names[p]]
            assert group.get("rows") == (rows[0] if rows else None), names[p]
    matrices = {names[p] for p in ours.params}
    others = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert matrices | others == set(names.values())
    large = {name for name in others if dict(model.named_parameters())[name].dim() >= 2}
    words = {"gpt2": "wte wpe", "deepseek": "embed_tokens gate.weight", "mta": "embed_tokens mixing kernel",
             "rwkv": "emb.weight head.weight att. ffn.x_k"}.get(arch, "embed_tokens").split()
    assert all(any(word in name for word in words) for name in large), large


@each_arch
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_by_kind(arch, optimizer):
    """Each kind of parameter has its multiple of the learning rate; a rate of zero leaves it as it is."""
    rates = dict(embd_lr=2.0, matrix_lr=3.0, vector_lr=5.0, head_lr=7.0, tie=False)
    model = small_model(arch, tie=False)
    scales = {}
    for group in model.configure_optimizers(small_config(arch, optimizer=optimizer, **rates), "cpu").param_groups:
        for p in group["params"]:
            scales[p] = group["lr_scale"]
    assert set(scales) == set(model.parameters())
    for name, p in model.named_parameters():
        if "embed" in name or "wte" in name or "wpe" in name or name == "emb.weight":
            expected = 2.0
        elif name in ("head.weight", "lm_head.weight"):
            expected = 7.0
        elif p.dim() < 2 or "mixing" in name or "kernel" in name:
            expected = 5.0
        elif arch == "rwkv":
            expected = 10.0 if name.endswith("w0") else 3.0 if name.endswith("weight") else 5.0
        else:
            expected = 3.0
        assert scales[p] == expected, name


def test_a_rate_of_zero_changes_nothing(monkeypatch):
    train("gpt2", monkeypatch, *quick("gpt2"), "--optimizer=muon", "--matrix_lr=0", "--checkpoint_interval=4")
    first, last = (checkpoint_of(step=step)["model"] for step in (4, 8))
    for name, p in first.items():
        still = name.startswith("transformer.h.") and p.dim() == 2
        assert torch.equal(p, last[name]) == still, name


SHARED = r"""
import os, sys, torch, torch.distributed as dist
from muon import Muon
if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank = int(os.environ.get("RANK", 0))
generator = torch.Generator().manual_seed(0)
shapes = [(8, 24), (24, 8), (3, 8, 16), (32, 16), (4, 4)]
params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
optimizer = Muon([{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:]}], lr=0.02)
if os.path.exists("state.pt"):
    state = torch.load("state.pt")
    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for p, saved in zip(params, state["params"]):
            p.copy_(saved)
    generator.set_state(state["generator"])
for _ in range(4):
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
held = [p.numel() for p in params if p in optimizer.state]
text = f"{rank} {sum(held)} {sum(p.numel() for p in params)}\n"
sys.stdout.write(text)  # in one piece, since two processes write
state = optimizer.state_dict()
if rank == 0:
    params = [p.data for p in params]
    torch.save({"params": params, "optimizer": state, "generator": generator.get_state()}, sys.argv[1])
"""


def run_shared(name, processes):
    """Make four updates in this number of processes, from state.pt if it exists, and return what they wrote to a file,
    and what each process said."""
    with open("shared.py", "w") as f:
        f.write(SHARED)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    result = subprocess.run([sys.executable, *launch, "shared.py", name], capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": ROOT})
    assert result.returncode == 0, result.stderr
    return torch.load(name), [tuple(map(int, line.split())) for line in result.stdout.splitlines()]


def test_the_work_is_shared_and_the_result_the_same():
    """Two processes have the bits of one, each with its share of the momentum; the state moves between them."""
    one, _ = run_shared("one.pt", 1)
    two, said = run_shared("two.pt", 2)

    def assert_same(a, b):
        assert all(torch.equal(x, y) for x, y in zip(a["params"], b["params"], strict=True))
        assert a["optimizer"]["updates"] == b["optimizer"]["updates"]
        for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
            assert torch.equal(x["momentum_buffer"], y["momentum_buffer"])

    def assert_shared(said):
        held = [numbers for _, numbers, _ in said]
        assert sum(held) == said[0][2] and max(held) < 0.7 * said[0][2]

    assert_same(one, two)
    assert_shared(said)
    os.rename("two.pt", "state.pt")
    one, _ = run_shared("one.pt", 1)
    two, said = run_shared("two.pt", 2)
    assert_same(one, two)
    assert_shared(said)
    assert one["optimizer"]["updates"] == 8


def test_a_run_resumes_with_its_momentum(monkeypatch):
    """With two processes a resumed log has the bytes of a whole one. After a change from two processes to one, or from
    one to two, it is the same but for rounding, as with other optimizers."""
    # steps as large as this make the momentum matter
    options = [*QUICK, "--optimizer=muon", "--learning_rate=3e-2", "--warmup_steps=0"]

    def run_in(folder, processes, *more):
        if processes == 1:
            train("gpt2", monkeypatch, *options, f"--log_dir={folder}", *more)
        else:
            result = shell("train_gpt2.py", *options, f"--log_dir={folder}", *more, processes=processes)
            assert result.returncode == 0, result.stderr

    def resumed(whole, folder, processes, change=lambda state: None):
        """Continue a whole run from its step 4 in another folder, after a change of Muon's state; return the log."""
        os.makedirs(folder)
        shutil.copy(f"{whole}/log.txt", folder)
        checkpoint = checkpoint_of(whole, step=4)
        change(checkpoint["optimizer"][1])
        torch.save(checkpoint, f"{folder}/model_00004.pt")
        run_in(folder, processes, "--resume=auto")
        return log_of(folder)

    def forget_momentum(state):
        for buffers in state["state"].values():
            buffers["momentum_buffer"].zero_()

    run_in("log/one", 1)
    run_in("log/two", 2)
    assert resumed("log/one", "log/one-one", 1) == log_of("log/one")
    assert resumed("log/two", "log/two-two", 2) == log_of("log/two")
    resumed("log/two", "log/two-one", 1)
    resumed("log/one", "log/one-two", 2)
    for stream, tolerance in ("train", 1e-5), ("val", 1e-4), ("norm", 1e-4):
        for start, end in ("log/two", "log/two-one"), ("log/one", "log/one-two"):
            np.testing.assert_allclose(stream_of(stream, end), stream_of(stream, start), rtol=tolerance)
    # negative controls: without its momentum, or the count of its updates, the run is another
    for name, change in ("momentum", forget_momentum), ("count", lambda state: state.update(updates=300)):
        resumed("log/one", f"log/no-{name}", 1, change)
        ours, expected = (stream_of("train", folder) for folder in (f"log/no-{name}", "log/one"))
        assert abs(ours / expected - 1).max() > 1e-4


OVERFLOW = f"""
import os, sys, torch
sys.path.insert(0, {ROOT!r})
import train_gpt2
scale, calls = torch.amp.GradScaler.scale, []
def overflow(self, loss):
    calls.append(loss)
    return scale(self, loss) * (torch.inf if len(calls) <= 6 else 1)  # three steps of two micro-batches
if os.environ["RANK"] == "1":
    torch.amp.GradScaler.scale = overflow
train_gpt2.main()
"""


def test_processes_skip_an_update_together():
    """The gradients overflow in one of two processes: neither makes the update, nor counts it."""
    with open("overflow.py", "w") as f:
        f.write(OVERFLOW)
    options = [*quick("gpt2"), "--optimizer=muon", "--dtype=float16"]
    result = shell(os.path.abspath("overflow.py"), *options, processes=2)
    assert result.returncode == 0, result.stderr
    lines = log_of().decode().splitlines()
    assert [line for line in lines if " skipped " in line] == [f"{step} skipped 1" for step in range(3)]
    early, late = checkpoint_of(step=2), checkpoint_of(step=8)
    assert (early["optimizer"][1]["updates"], late["optimizer"][1]["updates"]) == (0, 5)
    assert not any(buffers["momentum_buffer"].any() for buffers in early["optimizer"][1]["state"].values())
    assert all(buffers["momentum_buffer"].any() for buffers in late["optimizer"][1]["state"].values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_of_another_optimizer_is_refused(optimizer, monkeypatch, capsys):
    """Such as that of PyTorch's Muon, which earlier versions used, or one in which a part is missing."""
    options = [*quick("gpt2"), f"--optimizer={optimizer}"]
    train("gpt2", monkeypatch, *options)
    path = "log/gpt2-tiny/model_00008.pt"
    whole = checkpoint_of()
    if optimizer == "adamw":
        damages = {"another shape": lambda state: state["state"][1].update(exp_avg=torch.zeros(999, 999))}
    else:
        damages = {
            "updates": lambda states: states[1].pop("updates"),
            "momentum_buffer": lambda states: states[1]["state"].pop(1),
            "another shape": lambda states: states[1]["state"][1].update(momentum_buffer=torch.zeros(1, 32))}
    for word, damage in damages.items():
        checkpoint = copy.deepcopy(whole)
        damage(checkpoint["optimizer"])
        torch.save(checkpoint, path)
        words = path, "no state of this version's optimizer", word
        bad(capsys, lambda: train("gpt2", monkeypatch, *options, "--resume=auto"), *words)


def test_orthogonalize_takes_zeros_and_stacks():
    assert not muon.orthogonalize(torch.zeros(2, 4, 3)).any()
    x = randn(5, 4, 7)
    together = muon.orthogonalize(x)
    for matrix, result in zip(x, together):
        torch.testing.assert_close(result, muon.orthogonalize(matrix), atol=1e-5, rtol=0)
        s = torch.linalg.svdvals(result)
        assert s.max() < 1.3 and s.min() > 0.3
