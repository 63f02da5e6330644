"""
Everything that NanoTitan claims, checked on a CPU:   pip install -r requirements.txt pytest transformers && pytest -q

The references are ones that we did not write (transformers) or plain restatements in the test itself (a naive loader, a
HellaSwag loop of one item at a time, float64 formulas). Weights are random everywhere: fresh ones, with their zero biases
and unit norms, would hide mistakes. HELLASWAG_FILE may name the HellaSwag file; without it and without a network those
tests are skipped, likewise where GPT-2's BPE cannot be loaded.
"""
import glob
import hashlib
import http.server
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import fineweb
import hellaswag

ROOT = os.path.dirname(os.path.abspath(__file__))
ARCHS = sorted(os.path.basename(p)[6:-3] for p in glob.glob(os.path.join(ROOT, "train_*.py")))
SCRIPTS = {arch: importlib.import_module(f"train_{arch}") for arch in ARCHS}
SMALL = dict(n_layer=2, n_head=4, n_embd=64, block_size=64, vocab_size=512)  # with these a model is small in every script
MARKERS = "# ==== training loop: identical in every train_*.py ====", "# ==== end of training loop ===="
each_arch = pytest.mark.parametrize("arch", ARCHS)


def small_model(arch, seed=0, **options):
    """A small model with every parameter random, so that each matters."""
    script = SCRIPTS[arch]
    torch.manual_seed(seed)
    model = script.Model(script.Config(**{**SMALL, **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() < 2 else 0.1) + (p.dim() < 2))
    return model


def tokens(*shape, vocab=512, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def gpt2_bpe():
    tokenizer = common.get_tokenizer(50304)
    return tokenizer or pytest.skip("GPT-2's BPE is neither in TIKTOKEN_CACHE_DIR nor to be downloaded")


@pytest.fixture(scope="session")
def hellaswag_items(tmp_path_factory):
    path = os.environ.get("HELLASWAG_FILE")
    if not path:
        path = str(tmp_path_factory.mktemp("hellaswag") / hellaswag.FILE)
        try:
            hellaswag.fetch(path)
        except OSError as e:
            pytest.skip(f"no HELLASWAG_FILE and no network: {e}")
    return hellaswag.load(path)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test has its own working folder, and leaves the process as it found it."""
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for s, handler in handlers.items():
        signal.signal(s, handler)


def train(arch, monkeypatch, *options):
    """main() of a train script in this process, as if started from the shell in the current folder."""
    monkeypatch.setattr(sys, "argv", [f"train_{arch}.py", *options])
    SCRIPTS[arch].main()


def shell(*command, processes=0, **kw):
    """Run a script of this repository in the current folder."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else [sys.executable]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **kw.pop("env", {})}
    return subprocess.run([*launch, os.path.join(ROOT, command[0]), *command[1:]], capture_output=True, text=True, env=env, **kw)


def bad(capsys, call, *words):
    """call() must end with exit code 1 and one line on stderr (what sys.exit prints) that holds all words."""
    with pytest.raises(SystemExit) as e:
        call()
    message = e.value.code
    assert isinstance(message, str) and "\n" not in message, message
    for word in words:
        assert word in message, message


def shards(folder, n_train=30000, n_val=5000, vocab=256, parts=3, seed=0):
    """Random shards on disk; returns (train, val) as arrays."""
    rng = np.random.default_rng(seed)
    train, val = rng.integers(0, vocab, n_train, np.uint16), rng.integers(0, vocab, n_val, np.uint16)
    os.makedirs(folder, exist_ok=True)
    fineweb.write_shard(f"{folder}/x_val_000000.bin", val)
    cuts = [0, *sorted(rng.integers(1, n_train, parts - 1).tolist()), n_train]
    for i, (a, b) in enumerate(zip(cuts, cuts[1:]), 1):
        fineweb.write_shard(f"{folder}/x_train_{i:06d}.bin", train[a:b])
    return train, val


# quick options of a run that does everything: 512 tokens a step, evaluation, checkpoints
QUICK = ["--tiny", "--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--total_batch_size=512", "--batch_size=4",
         "--max_steps=8", "--eval_interval=4", "--checkpoint_interval=2", "--val_tokens=2048", "--sample_interval=0"]


# ---- the house -------------------------------------------------------------------------------------------------------

def test_the_training_loop_is_the_same_in_every_script():
    loops = set()
    for arch in ARCHS:
        text = open(os.path.join(ROOT, f"train_{arch}.py")).read()
        begin, end = text.index(MARKERS[0]), text.index(MARKERS[1])
        loops.add(text[begin:end])
        assert "loss.backward()" in text[begin:end] and "optimizer.step()" in text[begin:end]
    assert len(loops) == 1


def test_the_training_options_are_the_same_in_every_script():
    """Same fields in the same order with the same defaults, but for the folder of the log and what a paper prescribes."""
    blocks = {}
    for arch in ARCHS:
        names = [(f.name, f.default) for f in fields(SCRIPTS[arch].Config)]
        start = [n for n, _ in names].index("total_batch_size")
        blocks[arch] = [(n, d) for n, d in names[start:] if n != "log_dir"]
    assert all(block == blocks["gpt2"] for block in blocks.values())


@each_arch
def test_importing_a_script_starts_nothing(arch):
    code = f"import sys, train_{arch}; assert not [m for m in sys.modules if m.startswith(('transformers', 'datasets', 'wandb'))]"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_imports_point_one_way():
    for name, allowed in {"fineweb": set(), "hellaswag": {"common"}, "common": {"fineweb", "hellaswag"},
                          **{f"train_{arch}": {"common"} for arch in ARCHS}}.items():
        text = open(os.path.join(ROOT, f"{name}.py")).read()
        ours = {"common", "fineweb", "hellaswag", *(f"train_{arch}" for arch in ARCHS)}
        assert set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.M)) & ours <= allowed, name


# ---- architectures ---------------------------------------------------------------------------------------------------

PARAMS = {"gpt2": 124_475_904}


@each_arch
def test_parameter_count(arch):
    with torch.device("meta"):
        model = SCRIPTS[arch].Model(SCRIPTS[arch].Config())
    assert model.num_params()["total"] == PARAMS[arch] == sum(p.numel() for p in set(model.parameters()))
    if arch == "gpt2":  # 6 (parameters without wpe) + 12 L d T
        assert model.flops_per_token() == 6 * (124_475_904 - 1024 * 768) + 12 * 12 * 768 * 1024


@each_arch
def test_logits_and_gradients_equal_transformers(arch):
    model = small_model(arch)
    hf = SCRIPTS[arch].to_hf(model).eval()
    idx = tokens(2, 64)
    assert model(idx)[0].std() > 0.5
    torch.testing.assert_close(model(idx)[0], hf(idx).logits, atol=1e-4, rtol=0)
    loss = model(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    reference = hf(idx, labels=idx).loss
    reference.backward()
    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    for (name, ours), theirs in zip(SCRIPTS[arch].to_hf(model).named_parameters(), hf.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, atol=1e-5, rtol=1e-3, msg=lambda m: f"gradient of {name}: {m}")


def no_mask(*args, **kw):
    return F.scaled_dot_product_attention(*args, **{**kw, "is_causal": False})


@pytest.mark.parametrize("part, wrong", [
    ("F.gelu", lambda x, approximate: torch.nn.functional.gelu(x)), ("F.scaled_dot_product_attention", no_mask)])
def test_gpt2_parity_notices(part, wrong, monkeypatch):
    """Negative controls: an exact GELU, a missing mask, another eps, swapped q and k."""
    model, idx = small_model("gpt2"), tokens(2, 64)
    reference = SCRIPTS["gpt2"].to_hf(model).eval()(idx).logits

    class Wrong:
        def __getattr__(self, name):
            return wrong if f"F.{name}" == part else getattr(F, name)
    monkeypatch.setattr(SCRIPTS["gpt2"], "F", Wrong())
    assert (model(idx)[0] - reference).abs().max() > 3e-4


def test_gpt2_parity_notices_eps_and_order():
    idx = tokens(2, 64)
    for spoil in (lambda m: [setattr(x, "eps", 1e-3) for x in m.modules() if isinstance(x, torch.nn.LayerNorm)],
                  lambda m: [b.attn.c_attn.weight.data.copy_(b.attn.c_attn.weight.data.roll(64, 0)) for b in m.transformer.h],
                  lambda m: m.transformer.wpe.weight.data.copy_(m.transformer.wpe.weight.data.roll(1, 0))):
        model = small_model("gpt2")
        reference = SCRIPTS["gpt2"].to_hf(model).eval()(idx).logits
        spoil(model)
        assert (model(idx)[0] - reference).abs().max() > 3e-4


@each_arch
def test_the_past_matters_and_the_future_does_not(arch):
    model, idx = small_model(arch), tokens(1, 64)
    logits = model(idx)[0]
    for position in 0, 1, 31, 62, 63:
        changed = idx.clone()
        changed[0, position] = (changed[0, position] + 1) % 512
        moved = (model(changed)[0] - logits)[0].abs().amax(-1)
        assert (moved[:position] == 0).all() and (moved[position:] > 1e-6).all(), position
    torch.testing.assert_close(model(idx[:, :1])[0], logits[:, :1], atol=1e-5, rtol=0)  # T = 1
    torch.testing.assert_close(model(idx[:, :37])[0], logits[:, :37], atol=1e-5, rtol=0)


@each_arch
def test_targets_of_minus_one_do_not_count(arch):
    model, idx, targets = small_model(arch), tokens(2, 16), tokens(2, 16, seed=2)
    targets[0, 5:] = -1
    logp = model(idx)[0].log_softmax(-1)
    expected = -torch.cat([logp[0, range(5), targets[0, :5]], logp[1, range(16), targets[1]]]).mean()
    torch.testing.assert_close(model(idx, targets)[1], expected)


@each_arch
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_learns(arch, optimizer):
    script = SCRIPTS[arch]
    cfg = script.Config(**SMALL, optimizer=optimizer, learning_rate=3e-3)
    torch.manual_seed(0)
    model = script.Model(cfg)
    opt = model.configure_optimizers(cfg, "cpu")
    grouped = [p for g in opt.param_groups for p in g["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
    assert all((g["weight_decay"] > 0) == (p.dim() >= 2) for g in opt.param_groups for p in g["params"])
    idx, before = tokens(4, 65), [p.clone() for p in model.parameters()]
    losses = []
    for _ in range(30):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(512)) < 0.2 and losses[-1] < 0.8 * losses[0]
    assert all((a != b).any() for a, b in zip(before, model.parameters()))


def test_gpt2_initialisation():
    model = SCRIPTS["gpt2"].Model(SCRIPTS["gpt2"].Config(n_layer=8, n_embd=256, n_head=4, block_size=256))
    for name, p in model.state_dict().items():
        std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
        if p.dim() == 2:
            assert abs(p.std() / std - 1) < 0.03 and abs(p.mean()) < std / 20, name
        else:
            assert (p == ("ln_" in name and name.endswith("weight"))).all(), name


def test_gpt2_starts_from_published_weights(monkeypatch, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=48, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)).eval()
    hf.save_pretrained("published")
    script = SCRIPTS["gpt2"]
    model = script.Model(script.Config(init_from="published")).eval()
    idx = tokens(2, 48, vocab=300)
    torch.testing.assert_close(model(idx)[0], hf(idx).logits, atol=1e-4, rtol=0)
    options = ["--tiny", "--val_tokens=96", "--batch_size=2", "--total_batch_size=96", "--max_steps=1", "--sample_interval=0"]
    train("gpt2", monkeypatch, "--init_from=published", *options)
    checkpoint = common.read_checkpoint("log/gpt2-tiny/model_00001.pt")
    assert checkpoint["config"]["n_layer"] == 3 and not checkpoint["config"]["init_from"]
    bad(capsys, lambda: train("gpt2", monkeypatch, "--init_from=nowhere", *options), "nowhere")
