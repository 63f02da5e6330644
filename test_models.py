"""
Everything that NanoTitan claims, checked on a CPU:

    pip install -r requirements.txt pytest pytest-xdist transformers rwkv "lm_eval[hf]" matplotlib && pytest -q -n 2

The references are ones that we did not write (transformers, rwkv) or plain restatements in the test itself (a naive loader, a
HellaSwag loop of one item at a time, float64 formulas). Weights are random everywhere: fresh ones, with their zero biases
and unit norms, would hide mistakes. HELLASWAG_FILE may name the HellaSwag file; without it and without a network those
tests are skipped, likewise where GPT-2's BPE cannot be loaded.
"""
import contextlib
import glob
import gzip
import hashlib
import http.server
import importlib
import inspect
import io
import json
import lzma
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
import urllib.parse
from dataclasses import fields

os.environ["OMP_NUM_THREADS"] = "1"  # here and in subprocesses: equal bits, and small models gain nothing from more

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import compare
import fineweb
import hellaswag

ROOT = os.path.dirname(os.path.abspath(__file__))
ARCHS = sorted(os.path.basename(p)[6:-3] for p in glob.glob(os.path.join(ROOT, "train_*.py")))
SCRIPTS = {arch: importlib.import_module(f"train_{arch}") for arch in ARCHS}
SMALL = dict(n_layer=2, n_head=4, n_kv_head=2, head_dim=32, n_embd=64, ffn_dim=160, block_size=64, vocab_size=512, window=16,
             window_pattern=2, partial_rotary_factor=0.75, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
             v_head_dim=20, moe_ffn_dim=48, n_routed_experts=16, n_activated_experts=4,
             n_group=4, topk_group=2)  # those that a script has make its model small
MARKERS = "# ==== training loop: identical in every train_*.py ====", "# ==== end of training loop ===="
each_arch = pytest.mark.parametrize("arch", ARCHS)
each_transformer = pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "rwkv"])
HF = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "phi": "Phi3ForCausalLM",
      "gemma": "Gemma3ForCausalLM", "deepseek": "DeepseekV3ForCausalLM"}


def small_config(arch, **options):
    names = {f.name for f in fields(SCRIPTS[arch].Config)}
    return SCRIPTS[arch].Config(**{k: v for k, v in {**SMALL, **options}.items() if k in names})


def small_model(arch, seed=0, **options):
    """A small model with every parameter random, so that each matters, and DeepSeek's biases of the choice. RWKV's decay
    is slow enough to reach back, and its vectors, (1, 1, C), count as such."""
    torch.manual_seed(seed)
    model = SCRIPTS[arch].Model(small_config(arch, **options)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            vector = p.numel() == p.size(-1)
            p.copy_(torch.randn_like(p) * (0.5 if vector else 0.1) + (-2 if name.endswith("w0") else vector))
        for name, b in model.named_buffers():
            if name.endswith("correction_bias"):
                b.normal_(std=0.2)
    return model


def tokens(*shape, vocab=512, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def gpt2_bpe():
    tokenizer = common.get_tokenizer(50304)
    return tokenizer or pytest.skip("GPT-2's BPE is neither in TIKTOKEN_CACHE_DIR nor to be downloaded")


@pytest.fixture(scope="session")
def hellaswag_path(tmp_path_factory):
    path = os.environ.get("HELLASWAG_FILE")
    if not path:
        path = str(tmp_path_factory.mktemp("hellaswag") / hellaswag.FILE)
        try:
            hellaswag.fetch(path)
        except OSError as e:
            pytest.skip(f"no HELLASWAG_FILE and no network: {e}")
    return path


@pytest.fixture(scope="session")
def hellaswag_items(hellaswag_path):
    return hellaswag.load(hellaswag_path)


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


def quick(arch):
    more = {"deepseek": ["--n_dense_layer=0"], "rwkv": ["--head_dim=16"]}.get(arch, [])
    return [option for option in QUICK if arch != "rwkv" or "n_head" not in option] + more


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
        own = {"deepseek": ["bias_update_speed", "balance_loss_alpha", "mtp_loss_weight"], "rwkv": ["batch_size", "beta2", "chunk_size", "recompute"]}.get(arch, [])
        blocks[arch] = [(n, d) for n, d in names[start:] if n not in ("log_dir", *own)]
    assert (SCRIPTS["rwkv"].Config().beta2, SCRIPTS["rwkv"].Config().batch_size) == (0.99, 32)
    assert all(block == [x for x in blocks["gpt2"] if arch != "rwkv" or x[0] not in ("beta2", "batch_size")] for arch, block in blocks.items())


@each_arch
def test_importing_a_script_starts_nothing(arch):
    code = f"import sys, train_{arch}; assert not [m for m in sys.modules if m.startswith(('transformers', 'datasets', 'wandb'))]"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_imports_point_one_way():
    for name, allowed in {"fineweb": set(), "hellaswag": {"common"}, "common": {"fineweb", "hellaswag"}, "compare": {"common"},
                          **{f"train_{arch}": {"common"} for arch in ARCHS}}.items():
        text = open(os.path.join(ROOT, f"{name}.py")).read()
        ours = {"common", "compare", "fineweb", "hellaswag", *(f"train_{arch}" for arch in ARCHS)}
        assert set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.M)) & ours <= allowed, name


# ---- architectures ---------------------------------------------------------------------------------------------------

# counted by instantiating the reference implementation at this shape, or by hand for the published small ones
PARAMS = {"gpt2": 124_475_904, "llama": 123_587_328, "mistral": 123_587_328, "phi": 123_587_328, "gemma": 123_607_296,
          "deepseek": 122_999_040, "rwkv": 122_606_080}
# 6 N + 12 (width of the heads) (what the layers see, summed), N without GPT-2's positions
FLOPS = {"gpt2": 6 * (124_475_904 - 1024 * 768) + 12 * 768 * 12 * 1024, "llama": 6 * 123_587_328 + 12 * 768 * 12 * 1024,
         "mistral": 6 * 123_587_328 + 12 * 768 * 12 * 256, "phi": 6 * 123_587_328 + 12 * 768 * 12 * 1024,
         "gemma": 6 * 123_607_296 + 12 * 768 * (10 * 256 + 2 * 1024),
         # without 6 of 8 experts in 11 layers; the block that predicts the token after the next, likewise, and the head again
         "deepseek": 6 * (122_999_040 - 66 * 3 * 768 * 256 + 8_212_864 - 6 * 3 * 768 * 256 + 50304 * 768) + 12 * 768 * 13 * 1024,
         "rwkv": 6 * (122_606_080 - 50304 * 640) + 27 * 11 * 640 * 64}  # without the embedding, but the head; the state's steps


def meta_model(arch, options, monkeypatch):
    """The model that a command line asks for, without its memory."""
    monkeypatch.setattr(sys, "argv", [f"train_{arch}.py", *options])
    with torch.device("meta"):
        return SCRIPTS[arch].Model(common.parse_args(SCRIPTS[arch].Config, SCRIPTS[arch].TINY)[0])


@each_arch
def test_parameters_and_flops(arch, monkeypatch):
    model = meta_model(arch, [], monkeypatch)
    params, numel = model.num_params(), sum(p.numel() for p in set(model.parameters()))
    assert params["total"] == PARAMS[arch] == numel - params.get("mtp", 0) <= 124.6e6
    assert model.flops_per_token() == FLOPS[arch]
    embedding = sum(p.numel() for name, p in model.named_parameters() if len(p) == 50304 or "wpe" in name)  # and RWKV's head
    assert params["non_embedding"] == params["total"] - embedding
    row = re.search(rf"^\| `train_{arch}.py` \|.*", open(os.path.join(ROOT, "README.md")).read(), re.M)[0]
    assert f"| {PARAMS[arch]:,} | {FLOPS[arch] / 1e6:.0f} M |" in row


def test_published_small_shapes(monkeypatch):
    """The README's table of command lines and counts; the counts here are those of shared plans and papers."""
    rows = re.findall(r"^\|.*\| `python train_(\w+).py (--n_layer.*?)` \| ([\d,]+) \|", open(os.path.join(ROOT, "README.md")).read(), re.M)
    counts = [int(count.replace(",", "")) for _, _, count in rows]
    assert counts == [121_205_248, 124_558_272, 35_763_840, 31_740_416]
    for (arch, options, _), count in zip(rows, counts):
        assert meta_model(arch, options.split(), monkeypatch).num_params()["total"] == count


@each_transformer
def test_logits_and_gradients_equal_transformers(arch):
    model = small_model(arch)
    hf = SCRIPTS[arch].to_hf(model).eval()
    assert type(hf).__name__ == HF[arch]
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
            if p.grad is not None:  # multi-token prediction takes part in training alone
                p.copy_(p.grad)
    for (name, ours), theirs in zip(SCRIPTS[arch].to_hf(model).named_parameters(), hf.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, atol=1e-5, rtol=1e-3, msg=lambda m: f"gradient of {name}: {m}")


def pip_rwkv(model, idx):
    """Logits of BlinkDL's own package, from an official checkpoint. It takes one sequence at a time."""
    os.environ.update(RWKV_V7_ON="1", RWKV_CUDA_ON="0", RWKV_JIT_ON="0")
    from rwkv.model import RWKV
    torch.save(SCRIPTS["rwkv"].to_hf(model), "official.pth")
    with contextlib.redirect_stdout(None):
        runner = RWKV(model="official", strategy="cpu fp32")
    return torch.stack([runner.forward(row.tolist(), None, full_output=True)[0] for row in idx])


class Functional:
    """torch.nn.functional with something wrong."""

    def __init__(self, **wrong):
        self.__dict__.update(wrong)

    def __getattr__(self, name):
        return getattr(F, name)


def tiled_heads(q, k, v, **kw):
    """Grouped-query attention that gives key-value heads to query heads in turn instead of in groups."""
    k, v = (x.repeat(1, q.size(1) // x.size(1), 1, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, **{**kw, "enable_gqa": False})


def interleaved(x, rope):
    (cos, sin), a, b = rope[:, :, None], x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def roll(name, rows):
    return lambda model, script, patch: [p.data.copy_(p.data.roll(rows, 0)) for n, p in model.named_parameters() if n.endswith(name)]


def functional(**wrong):
    return lambda model, script, patch: patch.setattr(script, "F", Functional(**wrong))


def method(owner, **wrong):
    return lambda model, script, patch: [patch.setattr(getattr(script, owner), k, v) for k, v in wrong.items()]


def edited(script, patch, name, old, new):
    """Change the text of a method, "Owner.method", in a script."""
    owner, method = name.split(".")
    owner = getattr(script, owner)
    text = inspect.getsource(getattr(owner, method))
    assert text.count(old) == 1
    namespace = {}
    exec(textwrap.dedent(text).replace(old, new), vars(script), namespace)
    patch.setattr(owner, method, namespace[method])


def edit(name, old, new):
    return lambda model, script, patch: edited(script, patch, name, old, new)


def reversed_step(r, log_w, k, v, a, b, state):
    y = []
    for t in range(r.size(2)):
        y.append((state @ r[:, :, t, :, None]).squeeze(-1))
        _, state = SCRIPTS["rwkv"].wkv_step(*(x[:, :, t] for x in (r, log_w, k, v, a, b)), state)
    return torch.stack(y, 2), state


def half_split(x, rope):
    (cos, sin), (a, b) = rope[:, :, None], x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(**kw):
    return functional(scaled_dot_product_attention=lambda *args, **given: F.scaled_dot_product_attention(*args, **{**given, **kw}))


def plain_norm(self, x):
    return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def swapped_norms(self, x, *args):
    x = x + self.input_layernorm(self.self_attn(self.post_attention_layernorm(x), *args))
    return x + self.pre_feedforward_layernorm(self.mlp(self.post_feedforward_layernorm(x)))


def post_norm(self, x, *args):
    x = self.input_layernorm(x + self.self_attn(x, *args))
    return self.post_attention_layernorm(x + self.mlp(x))


def exact_gelu(x, approximate="none"):
    return F.gelu(x)


# name: (architectures, a mistake to make in ours). A str is the command line's: other options with the same weights
MISTAKES = {
    "exact GELU": ("gpt2 gemma", functional(gelu=exact_gelu)),
    "GELU for SiLU": ("llama mistral phi deepseek", functional(silu=exact_gelu)),
    "SiLU for GELU": ("gemma", functional(gelu=lambda x, approximate: F.silu(x))),
    "no mask": ("gpt2 llama phi gemma deepseek", attention(is_causal=False)),
    "query scale": ("gpt2 llama mistral phi gemma", attention(scale=0.2)), "query scale without rope": ("deepseek", attention(scale=0.25)),
    "LayerNorm's eps": ("gpt2", lambda model, *_: [setattr(x, "eps", 1e-3) for x in model.modules() if isinstance(x, torch.nn.LayerNorm)]),
    "eps": ("llama mistral phi", "norm_eps=1e-6"),
    "eps of LLaMA": ("gemma", "norm_eps=1e-5"), "larger eps": ("deepseek", lambda model, *_: [setattr(x, "eps", 1e-4) for x in model.modules() if hasattr(x, "eps")]),
    "order of q, k, v": ("gpt2", roll("c_attn.weight", 64)),
    "order of q, k, v in one matrix": ("phi", roll("qkv_proj.weight", 32)),
    "order of gate and up": ("phi", roll("gate_up_proj.weight", 160)),
    "positions by one": ("gpt2", roll("wpe.weight", 1)),
    "theta": ("llama", "rope_theta=10000"), "theta of LLaMA": ("mistral phi deepseek", "rope_theta=500000"),
    "local theta": ("gemma", "rope_theta_local=1000000"), "global theta": ("gemma", "rope_theta=10000"),
    "all of the head rotated": ("phi", "partial_rotary_factor=1"),
    "interleaved pairs": ("llama mistral gemma", lambda model, script, patch: patch.setattr(script, "rotate", interleaved)),
    "values rotated": ("llama phi", lambda model, script, patch: patch.setattr(
        script, "F", Functional(scaled_dot_product_attention=lambda q, k, v, **kw: F.scaled_dot_product_attention(q, k, script.rotate(v.transpose(1, 2), model.rope).transpose(1, 2), **kw)))),
    "k/v heads in turn": ("llama mistral phi gemma", functional(scaled_dot_product_attention=tiled_heads)),
    "window + 1": ("mistral gemma", "window=17"), "window - 1": ("mistral gemma", "window=15"),
    "no window": ("mistral gemma", "window=64"), "first layer global": ("gemma", "window_pattern=1"), "all layers local": ("gemma", "window_pattern=3"),
    "w instead of 1 + w": ("gemma", method("RMSNorm", forward=plain_norm)),
    "norms behind instead of in front": ("llama mistral phi", method("Block", forward=post_norm)),
    "norms in front and behind swapped": ("gemma", method("Block", forward=swapped_norms)),
    "no norm of queries and keys": ("gemma", lambda model, *_: [[setattr(b.self_attn, n, torch.nn.Identity()) for n in ("q_norm", "k_norm")] for b in model.model.layers]),
    "norm of queries behind the rotation": ("gemma", lambda model, script, patch: [
        patch.setattr(script, "rotate", lambda x, rope, rotate=script.rotate: model.model.layers[0].self_attn.q_norm(rotate(x, rope))),
        [setattr(b.self_attn, "q_norm", torch.nn.Identity()) for b in model.model.layers]]),
    "half-split rotation": ("deepseek", lambda model, script, patch: patch.setattr(script, "rotate", half_split)),
    "rope in front of nope": ("deepseek", edit("Attention.forward", "split([self.nope, self.rope], dim=-1)  #", "split([self.rope, self.nope], dim=-1)[::-1]  #")),
    "shared key not rotated": ("deepseek", edit("Attention.forward", "rotate(k_rope[:, :, None], rope)", "k_rope[:, :, None]")),
    "query latent not normalised": ("deepseek", edit("Attention.forward", "self.q_a_layernorm(self.q_a_proj(x))", "self.q_a_proj(x)")),
    "key-value latent not normalised": ("deepseek", edit("Attention.forward", "self.kv_a_layernorm(latent)", "latent")),
    "order of gate and up in the experts": ("deepseek", lambda model, *_: [p.data.copy_(p.data.roll(48, 1)) for n, p in model.named_parameters() if "experts.gate_up" in n]),
    "softmax for sigmoid": ("deepseek", edit("Gate.forward", ".sigmoid()", ".softmax(-1)")),
    "bias in the weights": ("deepseek", edit("Gate.forward", "weight = score.gather", "weight = (score + self.e_score_correction_bias).gather")),
    "no bias": ("deepseek", edit("Gate.forward", "(score + self.e_score_correction_bias)", "score")),
    "no groups": ("deepseek", "topk_group=4"), "one group": ("deepseek", "topk_group=1"), "not scaled": ("deepseek", "route_scale=1"),
    "groups by their best": ("deepseek", edit("Gate.forward", "topk(choice, 2)", "topk(choice, 1)")),
    "groups without the bias": ("deepseek", edit("Gate.forward", "topk(choice, 2)", "topk(score.unflatten(-1, (cfg.n_group, -1)), 2)")),
    "weights not normalised": ("deepseek", edit("Gate.forward", " / (weight.sum(-1, keepdim=True) + 1e-20)", "")),
    "no shared expert": ("deepseek", edit("MoE.forward", " + self.shared_experts(x)", "")),
    "scaled shared expert": ("deepseek", edit("MoE.forward", "+ self", "+ 1.41 * self")),
    "no ln0": ("rwkv", lambda model, *_: setattr(model.blocks[0], "ln0", torch.nn.Identity())),
    "shift into the future": ("rwkv", lambda model, script, patch: patch.setattr(script, "shift", lambda x, last: x.roll(-1, 1))),
    "GroupNorm's eps": ("rwkv", lambda model, *_: [setattr(b.att.ln_x, "eps", 1e-5) for b in model.blocks]),
    "eps of the norms": ("rwkv", lambda model, *_: [setattr(m, "eps", 1e-3) for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]),
    "decay without exp(-0.5)": ("rwkv", edit("TimeMix.forward", "-math.exp(-0.5) *", "-")),
    "gate without sigmoid": ("rwkv", edit("TimeMix.forward", "torch.sigmoid(xg @ self.g1)", "(xg @ self.g1)")),
    "no value residual": ("rwkv", edit("TimeMix.forward", "v = v + (v_first - v) *", "v = v + 0 *")),
    "values of the layer before": ("rwkv", edit("TimeMix.forward", "torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)", "torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2); v_first = v")),
    "keys changed before their norm": ("rwkv", edit("TimeMix.forward", "F.normalize(heads(k * self.k_k)", "F.normalize(heads(k * (1 + (rate - 1) * self.k_a) * self.k_k)")),
    "keys not normalised": ("rwkv", edit("TimeMix.forward", "F.normalize(heads(k * self.k_k), dim=-1)", "heads(k * self.k_k)")),
    "bonus of the unchanged key": ("rwkv", edit("TimeMix.forward", "r * k * self", "r * heads(self.key(xk)) * self")),
    "bonus in front of the norm": ("rwkv", edit("TimeMix.forward", "y = self.ln_x(y.transpose(1, 2).reshape(B * T, C)).view(B, T, C)", "y = self.ln_x((y + (r * k * self.r_k.unsqueeze(1)).sum(-1, keepdim=True) * v_heads).transpose(1, 2).reshape(B * T, C)).view(B, T, C)")),
    "state read before it is written": ("rwkv", lambda model, script, patch: patch.setattr(script, "wkv", lambda r, w, k, v, a, b, state, chunk: reversed_step(r, w, k, v, a, b, state))),
    "relu not squared": ("rwkv", edit("ChannelMix.forward", "k * k", "k")),
    "no rate": ("rwkv", edit("TimeMix.forward", "kk * heads(rate)", "kk")),
    "mixes of decay and rate swapped": ("rwkv", edit("TimeMix.forward", "self.x_r, self.x_w, self.x_k, self.x_v, self.x_a", "self.x_r, self.x_a, self.x_k, self.x_v, self.x_w")),
    "embedding not scaled": ("gemma", lambda model, script, patch: patch.setattr(script.math, "sqrt", lambda x: 1.0)),
}


@pytest.mark.parametrize("mistake, arch", [(name, arch) for name, (archs, _) in MISTAKES.items() for arch in archs.split()])
def test_parity_notices(mistake, arch, monkeypatch):
    """Negative controls: what the tolerance of 1e-4 is worth. Each ingredient made wrong moves the logits by three times that."""
    model, idx, wrong = small_model(arch, **dict(n_layer=3) if arch == "rwkv" else {}), tokens(2, 64), MISTAKES[mistake][1]
    if mistake == "eps of LLaMA":  # the scaled embedding hides it; queries near zero do not
        for block in model.model.layers:
            block.self_attn.q_proj.weight.data.mul_(0.01)
    reference = pip_rwkv(model, idx) if arch == "rwkv" else SCRIPTS[arch].to_hf(model).eval()(idx).logits
    torch.testing.assert_close(model(idx)[0], reference, atol=1e-4, rtol=0)
    if isinstance(wrong, str):
        name, value = wrong.split("=")
        state = model.state_dict()
        model = SCRIPTS[arch].Model(small_config(arch, **{name: type(getattr(model.cfg, name))(value)})).eval()
        model.load_state_dict(state)
    else:
        wrong(model, SCRIPTS[arch], monkeypatch)
    assert not (model(idx)[0] - reference).abs().max() <= 3e-4  # nan is noticed, too


WINDOWED = {"mistral": dict(), "gemma": dict(window_pattern=100)}  # with these options every layer has a window


@each_arch
@pytest.mark.parametrize("n_layer", [1, 2, 3])
def test_attention_reaches_what_it_says(arch, n_layer):
    """By experiment: what a changed token changes. Never the past; everything within reach; nothing beyond the reach of the
    stacked windows."""
    model, idx = small_model(arch, n_layer=n_layer, n_dense_layer=0, **WINDOWED.get(arch, {})), tokens(1, 64)
    reach = n_layer * 15 if arch in WINDOWED else 63
    # rounding: of an expert's product by how many tokens chose it, of a chunk by the decay up to its middle
    same = 1e-5 if arch in ("deepseek", "rwkv") else 0
    logits = model(idx)[0]
    for position in 0, 1, 14, 15, 16, 31, 62, 63:
        changed = idx.clone()
        changed[0, position] = (changed[0, position] + 1) % 512
        moved = (model(changed)[0] - logits)[0].abs().amax(-1)
        assert (moved[:position] <= same).all() and (moved[position:position + reach + 1] > same).all(), position
        assert (moved[position + reach + 1:] == 0).all(), position
    for T in 1, 15, 16, 17, 37:
        torch.testing.assert_close(model(idx[:, :T])[0], logits[:, :T], atol=1e-5, rtol=0)


def test_gemma_has_a_global_layer_after_five_local_ones():
    idx, changed = tokens(2, 1, 128)
    for n_layer, layers in (5, "LLLLL"), (6, "LLLLLG"), (12, "LLLLLGLLLLLG"):
        model = small_model("gemma", n_layer=n_layer, n_embd=32, block_size=128, window_pattern=6)
        assert "".join("L" if b.local else "G" for b in model.model.layers) == layers
        changed[0, 1:] = idx[0, 1:]
        moved = (model(idx)[0] - model(changed)[0])[0].abs().amax(-1)
        assert (moved[76:] > 0).all() == (n_layer > 5) and (n_layer > 5 or (moved[76:] == 0).all())


@pytest.mark.parametrize("arch", WINDOWED)
@pytest.mark.parametrize("T, window", [(64, 16), (61, 16), (16, 16), (17, 16), (5, 1), (7, 3), (10, 100)])
def test_windows_equal_the_masked_form(arch, T, window):
    """Forward and backward against a (T, T) mask; the form for CUDA, which a CPU has without gradients, gives the same."""
    script, g = SCRIPTS[arch], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 16, generator=g, requires_grad=True) for heads in (4, 2, 2))
    i = torch.arange(T)
    mask = (i <= i[:, None]) & (i > i[:, None] - window)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    y = script.sliding_window_attention(q, k, v, window)
    torch.testing.assert_close(y, expected, atol=2e-6, rtol=0)
    for ours, theirs in zip(*(torch.autograd.grad(z.square().sum(), (q, k, v)) for z in (y, expected))):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    block_mask = script.window_block_mask(T, window, "cpu")
    flex = script.sliding_window_attention(q.detach(), k.detach(), v.detach(), window, block_mask)
    torch.testing.assert_close(flex, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("arch", WINDOWED)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_compiled_window_is_the_same(arch, autocast, monkeypatch):
    """What compile() sets up on CUDA: one graph, the same loss and gradients, and other lengths still work. PyTorch refuses
    gradients of flex_attention on a CPU because it has no kernel; its definition in plain operators, used here, has them."""
    script, idx, used = SCRIPTS[arch], tokens(2, 256), []
    model = small_model(arch, block_size=256)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(idx, idx)[1]
        return loss, torch.autograd.grad(loss, model.parameters())
    expected = step()
    flex = script.flex_attention
    monkeypatch.setattr(sys.modules["torch.nn.attention.flex_attention"], "_validate_device", lambda *args: None)
    monkeypatch.setattr(script, "flex_attention", lambda *args, **kw: used.append(1) or flex(*args, **kw))
    model.block_mask = script.window_block_mask(256, 16, "cpu")
    assert model.block_mask.sparsity() > 0  # one of the blocks of 128 x 128 is skipped
    model(idx[:, :255])
    assert not used
    model.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    loss, gradients = step()
    assert used
    tolerance = 0.06 if autocast else 1e-5  # bf16 keeps 8 bits, and Gemma normalises often
    torch.testing.assert_close(loss, expected[0], atol=0.1 * tolerance, rtol=0)
    for ours, theirs in zip(gradients, expected[1]):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


# ---- DeepSeek's experts and multi-token prediction ----

def reference_moe(moe, x):
    """Equations 12 to 16 token by token, expert by expert, in float64: (y, chosen experts a token)."""
    cfg, y, chosen = moe.gate.cfg, [], []
    w, bias = moe.gate.weight.double(), moe.gate.e_score_correction_bias.double()
    gate_up, down = moe.experts.gate_up_proj.double(), moe.experts.down_proj.double()
    def mlp(x, gate, up, down):
        return down @ (F.silu(gate @ x) * (up @ x))
    for token in x.flatten(0, 1).double():
        score = 1 / (1 + torch.exp(-(w @ token)))
        choice = (score + bias).tolist()
        size = cfg.n_routed_experts // cfg.n_group
        groups = [sorted(choice[g * size:(g + 1) * size])[-2:] for g in range(cfg.n_group)]
        kept = sorted(range(cfg.n_group), key=lambda g: -sum(groups[g]))[:cfg.topk_group]
        among = [e for e in range(cfg.n_routed_experts) if e // size in kept]
        best = sorted(among, key=lambda e: -choice[e])[:cfg.n_activated_experts]
        total = sum(score[e] for e in best)
        shared = [getattr(moe.shared_experts, f"{n}_proj").weight.double() for n in ("gate", "up", "down")]
        y.append(mlp(token, *shared) + sum(cfg.route_scale * score[e] / total * mlp(token, *gate_up[e].chunk(2), down[e]) for e in best))
        chosen.append(best)
    return torch.stack(y).view(x.shape), chosen


ROUTES = {"any": {}, "8 experts, 2 chosen": dict(n_routed_experts=8, n_activated_experts=2), "one group": dict(n_group=1, topk_group=1),
          "all chosen": dict(n_routed_experts=4, n_activated_experts=4, n_group=1, topk_group=1), "one expert takes all": dict(n_activated_experts=1),
          "some take none": {}, "one token": {}}


@pytest.mark.parametrize("route", ROUTES)
def test_experts_equal_a_loop_over_tokens(route):
    """Values, the choice, and the gradient of the input, of the router and of every expert, used or not."""
    moe = small_model("deepseek", **ROUTES[route]).model.layers[1].mlp.train()
    x = torch.randn(*((1, 1) if route == "one token" else (2, 33)), 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    if "take" in route:
        moe.gate.e_score_correction_bias[:1 if route == "one expert takes all" else 8] += 100
    y, _ = moe(x)
    expected, chosen = reference_moe(moe, x)
    counts = torch.tensor(chosen).flatten().bincount(minlength=moe.gate.cfg.n_routed_experts)
    assert (moe.gate.load == counts).all() and ("take" not in route or (counts == 0).sum() >= 8)
    torch.testing.assert_close(y, expected.float(), atol=2e-6, rtol=1e-5)
    inputs = [x, *moe.parameters()]
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g.double())):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    gate = [z.flatten(0, 1) for z in moe.gate(x)[:2]]
    torch.testing.assert_close(moe.experts.definition(x.flatten(0, 1), *gate), moe.experts(x.flatten(0, 1), *gate), atol=2e-6, rtol=1e-5)


def test_multi_token_prediction_equals_transformers(monkeypatch):
    from transformers.modeling_layers import MtpModel
    model, idx = small_model("deepseek"), tokens(2, 64)
    reference = MtpModel(SCRIPTS["deepseek"].to_hf(model), 1).eval()
    missing, unexpected = reference.load_state_dict({f"layers.0.{k[4:]}": v for k, v in model.state_dict().items() if k.startswith("mtp.")}, strict=False)
    assert not unexpected and set(missing) == {"embed_tokens.weight", "shared_head.weight"}  # the model's own
    hidden, positions = model.hidden(idx), torch.arange(1, 64).expand(2, -1)
    expected = reference.forward_layer(0, hidden[:, :-1], positions, None, input_ids=idx[:, 1:])
    ours = lambda: model.mtp(hidden[:, :-1], model.embed(idx[:, 1:]), model.rope[:, :63])[0]
    torch.testing.assert_close(ours(), expected, atol=1e-4, rtol=0)
    edited(SCRIPTS["deepseek"], monkeypatch, "MTP.forward", "[self.enorm(embedding), self.hnorm(hidden)]", "[self.hnorm(hidden), self.enorm(embedding)]")
    assert (ours() - expected).abs().max() > 0.1


def test_the_loss_in_training_is_logged_without_its_companions():
    """The value is the next token's loss; the gradient that of all three, their weights as scheduled, each restated here."""
    model, idx = small_model("deepseek", max_steps=148, balance_loss_alpha=0.3), tokens(3, 64)
    x, y = idx[:, :-1], idx[:, 1:]
    value = model(x, y)[1]
    assert not any(m.load.any() for m in model.modules() if hasattr(m, "load"))  # eval counts nothing
    model.train()
    blocks = [model.model.layers[1], model.mtp.mtp_block]
    inputs = []
    handles = [b.mlp.gate.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for b in blocks]
    for updates, weight in (0, 0.3), (99, 0.3), (100, 0.1), (148, 0.1):
        model.updates.fill_(updates)
        inputs.clear()
        loss = model(x, y)[1]
        assert loss == value
        balance = 0
        for b, z in zip(blocks, inputs):
            score = torch.sigmoid(z @ b.mlp.gate.weight.T)
            for s in score:  # a sequence
                f = torch.zeros(16)
                for token in s:
                    f[token.topk(4).indices] += 16 / (4 * len(s))
                balance += 0.3 * (f * (s / s.sum(-1, keepdim=True)).mean(0)).sum() / 3
        hidden = model.hidden(x)
        ahead = model.lm_head(model.mtp(hidden[:, :-1], model.embed(x[:, 1:]), model.rope[:, :62])[0])
        expected = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), y.flatten()) + balance + weight * F.cross_entropy(
            ahead.flatten(0, 1), idx[:, 2:].flatten())
        for a, b in zip(*(torch.autograd.grad(z, model.parameters(), retain_graph=True) for z in (loss, expected))):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    for handle in handles:
        handle.remove()
    small_model("deepseek", mtp=False).train()(x, y)[1].backward()


def test_the_bias_follows_the_load():
    """By hand: gamma x sign(mean - load) after each update, counted over all micro-steps, 0 at the end of the schedule."""
    script, cfg = SCRIPTS["deepseek"], small_config("deepseek", n_routed_experts=4, n_activated_experts=1, n_group=1, topk_group=1, max_steps=148)
    model = script.Model(cfg)
    optimizer = model.configure_optimizers(cfg, "cpu")
    gate, ahead = model.model.layers[1].mlp.gate, model.mtp.mtp_block.mlp.gate
    for updates, load, change, maxvio in (0, [5, 1, 2, 0], [-1, 1, 0, 1], 1.5), (142, [1, 1, 1, 5], [1, 1, 1, -1], 1.5), (143, [0, 8, 0, 0], [0, 0, 0, 0], 3):
        gate.e_score_correction_bias.zero_()
        gate.load += torch.tensor(load) - 1.0
        gate.load += 1  # two micro-steps
        ahead.load += 2.0
        model.updates.fill_(updates)
        optimizer.step()
        torch.testing.assert_close(gate.e_score_correction_bias, 0.001 * torch.tensor(change, dtype=torch.float32))
        assert not gate.load.any() and model.updates == updates + 1 and model.streams()["maxvio"] == maxvio
        assert not ahead.e_score_correction_bias.any()
    assert not any(p is gate.e_score_correction_bias for g in optimizer.param_groups for p in g["params"])


def test_the_bias_balances_a_skewed_router():
    """Fixed inputs that all prefer the same experts: with gamma the load evens out, without it stays."""
    for gamma, balanced in (0.01, True), (0.0, False):
        model = small_model("deepseek", bias_update_speed=gamma, max_steps=10**6, mtp=False).train()
        moe, x = model.model.layers[1].mlp, torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(3)) + 0.5
        for _ in range(200):
            with torch.no_grad():
                moe.gate(x)
            model.update_bias()
        assert (model.maxvio < 0.2) == balanced and (model.maxvio > 1) == (not balanced)


def test_grouped_products_compile_to_one_graph():
    """What CUDA runs, bf16 autocast and grouped products, compiled on a CPU: the eager result within bf16's rounding."""
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1))
    results = []
    for compiled in False, True:
        moe = small_model("deepseek").model.layers[1].mlp.train()
        moe.gate.e_score_correction_bias[:4] += 100  # twelve experts stay empty
        if compiled:
            moe.compile(dynamic=False, fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            y, balance_loss = moe(x)
        results.append([y.float(), moe.gate.load.clone(), *torch.autograd.grad(y.float().square().mean() + balance_loss, moe.parameters())])
        assert not results[-1][3][4:].any()  # gradients of empty experts are zero, not what was in memory
    for a, b in zip(*results):
        assert (a - b).norm() <= 0.02 * a.norm() and torch.isfinite(b).all()


# ---- RWKV-7's time mix ----

def wkv_inputs(mode, T, N=64, dtype=torch.float64):
    """r, log w, k, v, a, b (1, 2, T, N) and a state, float64. The modes push the decay to its ends and repeat the keys."""
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    r, k, v, rate = randn(1, 2, T, N), randn(1, 2, T, N), randn(1, 2, T, N), randn(1, 2, T, N).sigmoid()
    fast, slow = torch.full_like(r, -0.6065), torch.full_like(r, -7e-5)
    log_w = {"mixed": torch.where(randn(1, 2, T, N) > 0, fast, slow), "fast": fast, "repeated, fast": fast, "slow": slow,
             "repeated": slow}.get(mode, -0.6065 * (2 * randn(1, 2, T, N) - 2).sigmoid())
    if mode == "similar keys":
        k, rate = k[:, :, :1] + 0.3 * randn(1, 2, T, N), (randn(1, 2, T, N) + 2).sigmoid()
    if "repeated" in mode:  # as in "------"
        k, rate = k[:, :, :1].expand_as(k), torch.full_like(rate, 0.999)
    kk = F.normalize(k, dim=-1)
    return [r / 8, log_w, k / 8, v, -kk, kk * rate, 0.1 * randn(1, 2, N, N)]


def naive_wkv(r, log_w, k, v, a, b, state):
    y = []
    for t in range(r.size(2)):
        outer = lambda x, z: x[:, :, t, :, None] * z[:, :, t, None, :]
        removed = torch.einsum("bhvk,bhk,bhl->bhvl", state, a[:, :, t], b[:, :, t])
        state = state * log_w[:, :, t, None, :].exp() + removed + outer(v, k)
        y.append(torch.einsum("bhvk,bhk->bhv", state, r[:, :, t]))
    return torch.stack(y, 2), state


@pytest.mark.parametrize("mode", ["random", "fast", "slow", "mixed", "similar keys", "repeated", "repeated, fast"])
def test_chunks_equal_the_recurrence(mode):
    """Output, final state and all gradients, from a state that is not 0. A series over the whole chunk instead of
    UnitLowerInverse's blocks passes "random" and fails where keys repeat."""
    script = SCRIPTS["rwkv"]
    relative = lambda x, y: ((x - y).abs().max() / y.abs().max()).item()
    for T in 1, 63, 64, 200:
        inputs = [x.requires_grad_() for x in wkv_inputs(mode, T)]
        y, state = naive_wkv(*inputs)
        gy, gs = (torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i, x in enumerate((y, state)))
        expected = [y, state, *torch.autograd.grad((y * gy).sum() + (state * gs).sum(), inputs)]
        for chunk in 16, 32, 64:
            for dtype, tolerance in (torch.float64, 1e-12), (torch.float32, 2e-5):
                ours = [x.detach().to(dtype).requires_grad_() for x in inputs]
                y, state = script.wkv(*ours, chunk)
                results = [y, state, *torch.autograd.grad((y * gy.to(dtype)).sum() + (state * gs.to(dtype)).sum(), ours)]
                assert max(relative(*pair) for pair in zip(results, expected)) < tolerance
        *xs, state = inputs
        for t in range(T):
            y, state = script.wkv_step(*(x[:, :, t] for x in xs), state)
        assert relative(state, expected[1]) < 1e-14 and relative(y, expected[0][:, :, -1]) < 1e-13 * math.sqrt(T)


def test_a_series_over_the_chunk_would_not_do():
    """Negative control of the test above: the inverse as a product of powers of the whole matrix."""
    def series(A):
        X, power = torch.eye(64) + A, A
        for _ in range(5):
            power = power @ power
            X = X + X @ power
        return X
    for mode, fine in ("random", True), ("similar keys", False), ("repeated", False):
        *_, a, b, _ = (x.float() for x in wkv_inputs(mode, 64))
        A = (a @ b.mT).tril(-1)
        exact = torch.linalg.inv(torch.eye(64, dtype=torch.float64) - A.double())
        assert ((series(A) - exact).abs().max() < 1e-3) == fine
        torch.testing.assert_close(SCRIPTS["rwkv"].UnitLowerInverse.apply(A).double(), exact, atol=1e-4, rtol=0)


def reference_rwkv(weights, idx, n_head):
    """RWKV-7 restated from its paper's equations, token by token, in the precision of the weights; official names."""
    w, n_layer = weights, 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)
    rows = []
    for row in idx:
        states = [[0.0, 0.0, 0.0] for _ in range(n_layer)]
        logits = []
        for token in row:
            x = norm(w["emb.weight"][token], "blocks.0.ln0")
            for i in range(n_layer):
                p = {name.removeprefix(f"blocks.{i}."): z.squeeze(0).squeeze(0) if z.dim() == 3 else z for name, z in w.items() if name.startswith(f"blocks.{i}.")}
                state = states[i]
                z = norm(x, f"blocks.{i}.ln1")
                mix = {c: z + (state[0] - z) * p[f"att.x_{c}"] for c in "rwkvag"}
                state[0] = z
                r, k, v = p["att.receptance.weight"] @ mix["r"], p["att.key.weight"] @ mix["k"], p["att.value.weight"] @ mix["v"]
                decay = torch.exp(-torch.exp(-F.softplus(-(p["att.w0"] + torch.tanh(mix["w"] @ p["att.w1"]) @ p["att.w2"])) - 0.5))
                rate = torch.sigmoid(p["att.a0"] + mix["a"] @ p["att.a1"] @ p["att.a2"])
                gate = torch.sigmoid(mix["g"] @ p["att.g1"]) @ p["att.g2"]
                if i == 0:
                    v_first = v
                else:
                    v = v + (v_first - v) * torch.sigmoid(p["att.v0"] + mix["v"] @ p["att.v1"] @ p["att.v2"])
                heads = lambda z: z.view(n_head, -1)
                kk = heads(k * p["att.k_k"])
                kk = kk / kk.norm(dim=-1, keepdim=True)
                k = k * (1 + (rate - 1) * p["att.k_a"])
                S = state[2] if torch.is_tensor(state[2]) else torch.zeros(n_head, kk.size(1), kk.size(1), dtype=x.dtype)
                S = S * heads(decay)[:, None] - (S @ kk[..., None]) @ (kk * heads(rate))[:, None] + heads(v)[..., None] @ heads(k)[:, None]
                state[2] = S
                y = (S @ heads(r)[..., None])[..., 0]
                y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 64e-5).sqrt()
                y = y.flatten() * p["att.ln_x.weight"] + p["att.ln_x.bias"]
                y = y + ((heads(r) * heads(k) * p["att.r_k"]).sum(-1, keepdim=True) * heads(v)).flatten()
                x = x + p["att.output.weight"] @ (y * gate)
                z = norm(x, f"blocks.{i}.ln2")
                x = x + p["ffn.value.weight"] @ torch.relu(p["ffn.key.weight"] @ (z + (state[1] - z) * p["ffn.x_k"])) ** 2
                state[1] = z
            logits.append(w["head.weight"] @ norm(x, "ln_out"))
        rows.append(torch.stack(logits))
    return torch.stack(rows)


def test_rwkv_equals_the_official_package_and_float64():
    """Logits against pip's rwkv at a length that no chunk divides; logits and all gradients against float64."""
    model, idx = small_model("rwkv", n_layer=3, n_embd=128, head_dim=64, vocab_size=100), tokens(1, 150, vocab=100)
    ours, official = model(idx)[0], pip_rwkv(model, idx)
    assert (ours - official).abs().max() < 5e-5 * official.std() and (ours.argmax(-1) == official.argmax(-1)).all()
    model, idx = small_model("rwkv"), tokens(2, 71)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    expected = reference_rwkv(weights, idx, 2)
    assert (model(idx)[0] - expected).abs().max() < 5e-5 * expected.std()
    targets = tokens(2, 71, seed=2)
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    model(idx, targets)[1].backward()
    for name, p in model.named_parameters():
        assert (p.grad - weights[name].grad).abs().max() < 1e-4 * weights[name].grad.abs().max(), name
    repeated = torch.tensor([[5] * 64 + [6, 7] * 100])
    for size in 32, 64:  # a run of one token, and of two, at the rate 1 and next to no decay
        model = small_model("rwkv", chunk_size=size, block_size=264)
        for block in model.blocks:
            block.att.w0.data.fill_(-9)
            block.att.a0.data.fill_(9)
        loss = model(repeated, repeated)[1]
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        double = reference_rwkv({name: p.detach().double() for name, p in model.named_parameters()}, repeated, 2)
        assert (model(repeated)[0] - double).abs().max() < 1e-4 * double.std()


def test_rwkv_reads_on_from_a_state():
    """Token by token, in pieces, and at once: the same; so generate, which reads each token once, samples the same text."""
    model, idx = small_model("rwkv"), tokens(2, 150)
    whole = model.hidden(idx)
    for pieces in [1] * 150, [77, 1, 72], [64, 64, 22]:
        state = model.new_state(2)
        parts = torch.cat([model.hidden(piece, state) for piece in idx.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(parts, whole, atol=5e-5 * whole.std().item(), rtol=0)
    text = [common.generate(m, common.Bytes(), "some text", 64, "cpu", seed=3, new_tokens=40) for m in (model, Stateless(model))]
    assert text[0] == text[1]


class Stateless:
    def __init__(self, model):
        self.hidden, self.lm_head = model.hidden, model.lm_head


def test_rwkv_trains_as_officially():
    """L2Wrap's gradient, the rate of w0, and the initialisation, restated."""
    script, cfg = SCRIPTS["rwkv"], small_config("rwkv", n_layer=3, n_embd=128, head_dim=64)
    model, idx, targets = small_model("rwkv").train(), tokens(2, 40), tokens(2, 40, seed=2)
    logits = model(idx)[0].detach().requires_grad_()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    largest, at = logits.detach().max(-1, keepdim=True)
    logits.grad.scatter_add_(-1, at, largest * 1e-4 / 80)
    hidden = model.hidden(idx).detach().requires_grad_()
    loss = model.loss(hidden, targets)
    loss.backward()
    torch.testing.assert_close(hidden.grad, logits.grad @ model.head.weight, atol=1e-8, rtol=1e-5)
    assert loss == model.eval().loss(hidden, targets)
    torch.manual_seed(0)
    model = script.Model(cfg)
    groups = {id(p): g for g in model.configure_optimizers(cfg, "cpu").param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        g = groups[id(p)]
        assert g.get("lr_scale", 1.0) == (2.0 if name.endswith("att.w0") else 1.0) and g["eps"] == 1e-18 and g["betas"] == (0.9, 0.99)
    for l, block in enumerate(model.blocks):
        zigzag = [(n % 64 - 31.5) / 31.5 * abs((n % 64 - 31.5) / 31.5) for n in range(128)]
        linear = [n / 127 - 0.5 for n in range(128)]
        expected = {"w0": [-6 + 6 * (n / 127) ** (1 + (l / 2) ** 0.3) + 0.5 + 2.5 * zigzag[n] for n in range(128)],
                    "a0": [-0.19 + 0.3 * zigzag[n] + 0.4 * linear[n] for n in range(128)], "k_k": [0.71 - 0.1 * x for x in linear],
                    "k_a": [1.02] * 128, "r_k": [-0.04] * 128, "w1": [0.0] * 4096, "ln_x.weight": [((1 + l) / 3) ** 0.7] * 128,
                    **{f"x_{c}": [1 - (n / 128) ** (power * (1 - l / 3)) for n in range(128)] for c, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2))}}
        if l:
            expected["v0"] = [0.73 - 0.4 * x for x in linear]
        for name, values in expected.items():
            torch.testing.assert_close(block.att.get_parameter(name).flatten(), torch.tensor(values), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(block.ffn.x_k.flatten(), torch.tensor([1 - (n / 128) ** ((1 - l / 3) ** 4) for n in range(128)]), atol=1e-5, rtol=1e-5)
        orthogonal = {block.att.receptance.weight: 1.0, block.att.value.weight: 1.0, block.att.key.weight: 0.1, block.att.w2: 0.1, block.ffn.key.weight.T: 1.0, model.head.weight.T: 0.5 * 2}
        for matrix, gain in orthogonal.items():
            torch.testing.assert_close(matrix @ matrix.T, gain ** 2 * torch.eye(len(matrix)), atol=1e-5, rtol=0)
        assert not block.att.output.weight.any() and not block.ffn.value.weight.any()
    assert 0.9e-4 < model.emb.weight.abs().max() <= 1e-4


def test_rwkv_in_bf16_and_with_recomputing(monkeypatch):
    """bf16 autocast keeps the loss; the decay and the state stay float32. Recomputing changes no bit of the gradients."""
    model, idx, targets = small_model("rwkv"), tokens(2, 130), tokens(2, 130, seed=2)
    wkv, seen = SCRIPTS["rwkv"].wkv, []
    monkeypatch.setattr(SCRIPTS["rwkv"], "wkv", lambda *args: seen.append((args, wkv(*args))) or seen[-1][1])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        loss = model(idx, targets)[1]
    assert abs(loss - model(idx, targets)[1]) < 3e-3
    assert len(seen) == 4  # two layers, in bf16 and in fp32
    for args, results in seen:
        assert all(x.dtype == torch.float32 for x in (*args[:-1], *results))
        assert (args[1] != args[1].bfloat16()).float().mean() > 0.9  # not rounded to bf16 on the way
        assert all(torch.equal(a, b) for a, b in zip(results, wkv(*args)))
    gradients, calls = [], []
    monkeypatch.setattr(SCRIPTS["rwkv"], "wkv", lambda *args: calls.append(1) or wkv(*args))
    for recompute in False, True:
        calls.clear()
        model = small_model("rwkv", recompute=recompute).train()
        gradients.append(torch.autograd.grad(model(idx, targets)[1], model.parameters()))
        assert len(calls) == (4 if recompute else 2)
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("arch", ["rwkv", "deepseek"])
def test_compiled_gradients_keep_their_precision(arch):
    """What runs in float32 inside of bf16 autocast, RWKV's operator and DeepSeek's router, must do so backward, too: with the
    loop's setting a compiled backward pass is as close to float64 as an eager one; without, not (negative control)."""
    script, (*args, _) = SCRIPTS[arch], (x.float() for x in wkv_inputs("similar keys", 128))
    gate, x = small_model("deepseek").model.layers[1].mlp.gate.train(), torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))

    def operator(*args):
        with torch.autocast("cpu", enabled=False):
            return script.wkv(*args, torch.zeros(1, 2, 64, 64), 64)[0]
    call, inputs = (operator, args) if arch == "rwkv" else (lambda x, w: gate(x)[1], [x, gate.weight])
    def gradients(call):
        leaves = [z.detach().requires_grad_() for z in inputs] if arch == "rwkv" else [x.requires_grad_(), gate.weight]
        with torch.autocast("cpu", torch.bfloat16):
            y = call(*leaves)
        return torch.autograd.grad(y, leaves, torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    eager = gradients(call)
    for setting, fine in ("off", True), ("same_as_forward", False):
        torch._dynamo.reset()
        with torch._functorch.config.patch(backward_pass_autocast=setting):
            ours = gradients(torch.compile(call, backend="aot_eager", dynamic=False, fullgraph=True))
        assert all((a - b).norm() < 1e-4 * b.norm() for a, b in zip(ours, eager)) == fine
    assert 'backward_pass_autocast = "off"' in inspect.getsource(script.main)


def test_rwkv_compiles_two_blocks_and_the_loss():
    """However many layers; recomputing inside."""
    model, idx, expected = small_model("rwkv", n_layer=4, recompute=True).train(), tokens(2, 64), []
    model.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss = model(idx, idx)[1]
    gradients = torch.autograd.grad(loss, model.parameters())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    model = small_model("rwkv", n_layer=4).train()
    expected = model(idx, idx)[1]
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for a, b in zip(gradients, torch.autograd.grad(expected, model.parameters())):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_rwkv_exports_an_official_checkpoint(monkeypatch, capsys):
    options = [*quick("rwkv"), "--n_embd=64", "--head_dim=64"]
    train("rwkv", monkeypatch, *options)
    train("rwkv", monkeypatch, *options, "--export=exported")
    weights = torch.load("exported/model.pth", weights_only=True)
    checkpoint = common.read_checkpoint("log/rwkv-tiny/model_00008.pt")
    assert weights.keys() == checkpoint["model"].keys() and {"emb.weight", "blocks.0.ln0.bias", "blocks.0.att.r_k", "head.weight"} < weights.keys()
    model = common.load_model("x", checkpoint, "rwkv", SCRIPTS["rwkv"].Config, SCRIPTS["rwkv"].Model)
    idx = tokens(1, 40, vocab=256)
    torch.testing.assert_close(model(idx)[0], pip_rwkv(model, idx), atol=1e-4, rtol=0)
    bad(capsys, lambda: train("rwkv", monkeypatch, *options, "--export=exported"), "not empty")


@each_arch
def test_targets_of_minus_one_do_not_count(arch):
    model, idx, targets = small_model(arch), tokens(2, 16), tokens(2, 16, seed=2)
    targets[0, 5:] = -1
    logp = model(idx)[0].log_softmax(-1)
    expected = -torch.cat([logp[0, range(5), targets[0, :5]], logp[1, range(16), targets[1]]]).mean()
    torch.testing.assert_close(model(idx, targets)[1], expected)


@each_arch
def test_the_residual_stream_is_bf16_under_autocast(arch):
    model, seen = small_model(arch, n_layer=3).train(), []
    for block in [m for name, m in model.named_modules() if re.fullmatch(r"(transformer\.h|model\.layers|blocks)\.\d+|mtp\.mtp_block", name)]:
        block.register_forward_hook(lambda block, args, y: seen.append((y[0] if isinstance(y, tuple) else y).dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(2, 32), tokens(2, 32))
    assert seen == [torch.bfloat16] * (4 if arch == "deepseek" else 3)


@each_transformer
def test_attention_comes_out_in_the_memory_order_of_its_projection(arch, monkeypatch):
    """What leaves the kernel has the layout of the queries: in another one o_proj copies it, in every layer of every step."""
    seen, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: seen.append(attend(*args, **kw)) or seen[-1])
    small_model(arch, window=64, v_head_dim=24)(tokens(2, 64))  # DeepSeek's 16 + 8, as in its default shape
    assert len(seen) == 2 and all(y.transpose(1, 2).is_contiguous() for y in seen)


@each_arch
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_learns(arch, optimizer):
    script = SCRIPTS[arch]
    cfg = small_config(arch, optimizer=optimizer, learning_rate=3e-3)
    torch.manual_seed(0)
    model = script.Model(cfg)
    opt = model.configure_optimizers(cfg, "cpu")
    grouped = [p for g in opt.param_groups for p in g["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
    decay = {p for name, p in model.named_parameters() if p.dim() >= 2 and (arch != "rwkv" or name.endswith(".weight"))}
    assert {p for g in opt.param_groups for p in g["params"] if g["weight_decay"] > 0} == decay
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


@each_transformer
def test_initialisation(arch):
    model = SCRIPTS[arch].Model(small_config(arch, n_layer=8, n_embd=256, ffn_dim=512, n_head=4, block_size=256))
    for name, p in model.state_dict().items():
        std = 0.006 if arch == "deepseek" else 0.02 / 4 if re.search(r"(c_proj|o_proj|down_proj).weight", name) and arch != "gemma" else 0.02
        if p.dim() >= 2:
            assert abs(p.std() / std - 1) < 0.03 and abs(p.mean()) < std / 20, name
        else:
            assert (p == (name.endswith("weight") and arch != "gemma")).all(), name


BAD_SHAPES = [("gpt2", "--n_head=5", "n_head=5"), ("llama", "--n_head=5", "n_head=5"), ("llama", "--n_kv_head=5", "n_kv_head=5"),
              ("llama", "--n_head=256", "n_head=256"), ("phi", "--n_kv_head=24", "n_kv_head=24"), ("mistral", "--window=0", "window=0"),
              ("phi", "--partial_rotary_factor=1.5", "partial_rotary_factor=1.5"), ("phi", "--partial_rotary_factor=0.05", "64 values"),
              ("phi", "--partial_rotary_factor=0", "rotary"), ("gemma", "--head_dim=33", "head_dim=33"), ("gemma", "--window_pattern=0", "window_pattern=0"),
              ("deepseek", "--qk_rope_head_dim=7", "qk_rope_head_dim=7"), ("deepseek", "--moe_ffn_dim=100", "moe_ffn_dim=100"),
              ("deepseek", "--n_dense_layer=12", "n_dense_layer=12"), ("deepseek", "--n_group=3", "n_group=3"), ("deepseek", "--n_group=8", "n_group=8"),
              ("deepseek", "--topk_group=5", "topk_group=5"), ("deepseek", "--n_activated_experts=9", "n_activated_experts=9"),
              ("deepseek", "--block_size=1", "block_size=1"), ("rwkv", "--head_dim=48", "head_dim=48"), ("rwkv", "--head_dim=1", "head_dim=1"), ("rwkv", "--chunk_size=48", "chunk_size=48")]


@pytest.mark.parametrize("arch, option, word", BAD_SHAPES)
def test_a_bad_shape_is_one_line(arch, option, word, monkeypatch, capsys):
    bad(capsys, lambda: train(arch, monkeypatch, option), word)


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
    os.mkdir("empty")
    bad(capsys, lambda: train("gpt2", monkeypatch, "--tiny", "--total_batch_size=1024", "--batch_size=1", "--init_from=empty"), "--init_from=empty")


# ---- data and schedule -----------------------------------------------------------------------------------------------

def loader(split, world_size=1, rank=0, **options):
    cfg = SCRIPTS["gpt2"].Config(**{**dict(block_size=16, batch_size=4, total_batch_size=1024, vocab_size=256, data_dir="data",
                                           val_tokens=3000), **options})
    return common.DataLoader(cfg, split, common.World(torch.device("cpu"), rank, world_size), False)


@pytest.mark.parametrize("batch_size, world_size", [(4, 1), (16, 1), (64, 1), (2, 2), (4, 8), (1, 4)])
def test_a_step_is_a_slice_of_the_stream(batch_size, world_size):
    """Step s is tokens [1024 s, 1024 (s + 1)) for every split into processes and micro-steps, from every starting step, over
    shard boundaries and, after 29 steps, over the end of the data."""
    train, _ = shards("data")
    stream = np.concatenate([train, train])
    micro_steps = 1024 // (16 * batch_size * world_size)
    for start in 0, 27:
        ranks = [loader("train", world_size, r, batch_size=batch_size).train_batches(start, micro_steps) for r in range(world_size)]
        for step in range(start, start + 4):
            rows = [next(ranks[r])[:2] for _ in range(micro_steps) for r in range(world_size)]
            x, y = (torch.cat(z).flatten().numpy() for z in zip(*rows))
            assert (x == stream[1024 * step:1024 * (step + 1)]).all() and (y == stream[1024 * step + 1:1024 * (step + 1) + 1]).all()


@pytest.mark.parametrize("val_tokens, rows", [(3000, 187), (10**6, 312), (16, 1)])
@pytest.mark.parametrize("batch_size, world_size", [(4, 1), (3, 2), (64, 1), (5, 4)])
def test_validation_is_the_same_tokens_for_every_batch_size(val_tokens, rows, batch_size, world_size):
    _, val = shards("data")
    seen = []
    for rank in range(world_size):
        data = loader("val", world_size, rank, batch_size=batch_size, val_tokens=val_tokens)
        assert data.val_rows == rows
        for x, y, n in data.val_batches():
            assert x.shape == y.shape == (batch_size, 16) and (y[n:] == -1).all() and (y[:n] >= 0).all()
            seen += [(*a.tolist(), b[-1].item()) for a, b in zip(x[:n], y[:n])]
    assert sorted(seen) == sorted(tuple(val[16 * i:16 * i + 17].tolist()) for i in range(rows))


def corrupt(path, at, value, dtype=np.int32):
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(np.array([value], dtype).tobytes())


def test_bad_data_is_one_line(capsys):
    path = "data/x_train_000002.bin"
    bad(capsys, lambda: loader("train"), "data", "fineweb.py")
    os.mkdir("data")
    bad(capsys, lambda: loader("train"), "no train shards", "data")
    spoil = [(lambda: corrupt(path, 0, 7), "not a"), (lambda: corrupt(path, 4, 2), "not a"), (lambda: corrupt(path, 8, 5), "tokens"),
             (lambda: corrupt(path, 8, -5), "tokens"), (lambda: os.truncate(path, os.path.getsize(path) - 2), "tokens"),
             (lambda: os.truncate(path, 100), "not a"), (lambda: open(path, "wb").write(b"\x93NUMPY" + b"x" * 3000), "not a")]
    for act, word in spoil:
        shards("data")
        act()
        bad(capsys, lambda: loader("train"), path, word)
    shards("data")
    os.remove("data/x_val_000000.bin")
    bad(capsys, lambda: loader("val"), "no val shards")
    shards("data", n_val=16)
    bad(capsys, lambda: loader("val"), "block_size=16")
    shards("data")
    bad(capsys, lambda: loader("val", val_tokens=15), "val_tokens=15")
    corrupt("data/x_train_000001.bin", 1024 + 20, 300, np.uint16)
    bad(capsys, lambda: next(loader("train").train_batches(0, 1)), "x_train_000001.bin", "300", "vocab_size=256")


def test_cosine_schedule():
    cfg = SCRIPTS["gpt2"].Config()
    lr = [common.cosine_lr(cfg, s) for s in range(cfg.max_steps + 2)]
    assert lr[0] == pytest.approx(6e-4 / 715) and lr[714] == lr[715] == pytest.approx(6e-4)
    assert lr[(715 + 19073) // 2] == pytest.approx(3.3e-4) and lr[19073] == lr[19074] == pytest.approx(6e-5)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # torch's own cosine as the reference
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=19073 - 715, eta_min=0.1)
    for step in range(715, 3000):
        assert lr[step] == pytest.approx(6e-4 * optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    common.cosine_lr(SCRIPTS["gpt2"].Config(max_steps=5, warmup_steps=5), 5)


def test_batch_that_does_not_divide(monkeypatch, capsys):
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--batch_size=3"), "batch_size=3", "[1, 2, 4, 8, 16]")
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--block_size=33"), "block_size=33", "no --batch_size does")


# ---- HellaSwag -------------------------------------------------------------------------------------------------------

def one_at_a_time(model, items, encode):
    """The reference: build-nanogpt's way, one item at a time with all logits, restated."""
    right = []
    for item in items:
        ctx, ends = encode(item["ctx"]), [encode(" " + ending) for ending in item["endings"]]
        idx, mask = torch.zeros(2, 4, len(ctx) + max(map(len, ends)), dtype=torch.long)
        for r, end in enumerate(ends):
            idx[r, :len(ctx + end)] = torch.tensor(ctx + end)
            mask[r, len(ctx):len(ctx + end)] = 1
        with torch.no_grad():
            losses = F.cross_entropy(model(idx)[0][:, :-1].flatten(0, 1), idx[:, 1:].flatten(), reduction="none").view(4, -1)
        sums = (losses * mask[:, 1:]).sum(1)
        right.append([x.argmin().item() == item["label"] for x in (sums, sums / mask.sum(1))])
    return np.array(right).T


class Reduced:
    """GPT-2's BPE folded to a small vocabulary, so that all 10,042 items are quick."""
    n_vocab, eot_token = 512, 0

    def __init__(self, bpe):
        self.bpe = bpe

    def encode_ordinary(self, text):
        return [t % 512 for t in self.bpe.encode_ordinary(text)]


@each_arch
def test_hellaswag_equals_one_item_at_a_time(arch, gpt2_bpe, hellaswag_items):
    """Every item of the whole set (some of them for the later architectures), and 100 with other batches and paddings."""
    hellaswag_items = hellaswag_items if arch == "gpt2" else hellaswag_items[::20]
    model, encode = small_model(arch, n_layer=1, n_dense_layer=0, n_embd=32, n_head=2, block_size=192), Reduced(gpt2_bpe)
    score = lambda items, tokens=8192, compile=False: hellaswag.HellaSwag(items, encode, 192, tokens, common.World(torch.device("cpu")), compile)
    ours, reference = score(hellaswag_items).score(model), one_at_a_time(model, hellaswag_items, encode.encode_ordinary)
    assert (np.array(ours) != reference).sum() <= 2  # ties in the last bit
    assert 0.2 < ours[1].mean() < 0.3 and (ours[0] != ours[1]).mean() > 0.1
    for batch_tokens in 1, 500, 10**6:
        assert (np.array(score(hellaswag_items[:100], batch_tokens).score(model)) == reference[:, :100]).all()
    fixed = score(hellaswag_items[:100], 2048, compile=True)
    shapes = {tuple(t.shape) for t, _ in fixed.batches}
    assert all(w % 64 == 0 for _, w in shapes) and len(shapes) == len({w for _, w in shapes})
    fixed.hidden = model.hidden  # the compiled model's batches, not compiled
    assert (np.array(fixed.score(model)) == reference[:, :100]).all()
    spoiled = [{**item, "ctx": item["endings"][0]} for item in hellaswag_items[:100]]  # negative control
    assert (np.array(score(spoiled).score(model)) != reference[:, :100]).any()


def test_hellaswag_is_split_over_processes(gpt2_bpe, hellaswag_items, monkeypatch):
    model, encode, items = small_model("gpt2", block_size=192), Reduced(gpt2_bpe), hellaswag_items[:40]
    whole = hellaswag.HellaSwag(items, encode, 192, 1024, common.World(torch.device("cpu"))).score(model)
    parts = []
    monkeypatch.setattr(common.World, "sum", lambda self, x: parts.append(x.clone()) or x)
    scorers = [hellaswag.HellaSwag(items, encode, 192, 1024, common.World(torch.device("cpu"), r, 3)) for r in range(3)]
    for scorer in scorers:
        scorer.score(model)
    assert sum(len(s.batches) for s in scorers) > 3
    monkeypatch.setattr(common.World, "sum", lambda self, x: sum(parts))
    assert (np.array(scorers[0].score(model)) == np.array(whole)).all()


def test_hellaswag_items_longer_than_the_context_lose_its_start():
    model, world = small_model("gpt2", vocab_size=256, block_size=24), common.World(torch.device("cpu"))
    rng = np.random.default_rng(0)
    word = lambda n: "".join(map(chr, rng.integers(97, 123, n)))
    items = [{"ctx": word(40), "endings": [word(9) for _ in range(4)], "label": 0} for _ in range(60)]
    cut = [{**item, "ctx": item["ctx"][-14:]} for item in items]  # 14 + space + 9 = 24
    score = lambda items: np.array(hellaswag.HellaSwag(items, common.Bytes(), 24, 480, world).score(model))
    assert (score(items) == one_at_a_time(model, cut, common.Bytes().encode_ordinary)).all()
    hellaswag.HellaSwag([{**items[0], "ctx": "a", "endings": [word(n) for n in (1, 23, 24, 60)]}], common.Bytes(), 24, 480, world).score(model)


@pytest.mark.parametrize("line, word", [
    ('{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}', "line 2"), ('{"ctx": "a", "endings": ["b", "c", "d", "e"]}', "line 2"),
    ('{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}', "line 2"), ("not json", "line 2"), ("[]", "line 2"),
    ('{"ctx": 3, "endings": ["b", "c", "d", "e"], "label": 1}', "line 2"), ('{"ctx": "a", "endings": "bcde", "label": 1', "line 2")])
def test_a_malformed_hellaswag_file_names_the_line(line, word, monkeypatch, capsys):
    good = '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 3}\n'
    open("h.jsonl", "w").write(good + line + "\n" + good)
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--hella_limit=3", "--hellaswag_file=h.jsonl"), "h.jsonl", word)
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--hella_limit=3", "--hellaswag_file=missing.jsonl"), "missing.jsonl")
    assert not os.path.exists("log")


class Server(http.server.BaseHTTPRequestHandler):
    files = {}

    def do_GET(self):
        data = self.files.get(self.path)
        self.send_response(200 if data else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write((data or b"")[:-5] if "short" in self.path else data or b"")

    def log_message(self, *args):
        pass


def test_hellaswag_is_fetched_whole_or_not_at_all(monkeypatch, capsys):
    item = b'{"ctx": "a man", "endings": ["eats", "sits", "runs", "sees"], "label": 3}\n'
    data = item * 6
    Server.files = {"/good": data, "/other": data[:-1] + b" ", "/short": data}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hellaswag, "SIZE", len(data))
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(data).hexdigest())
    for path in "/missing", "/other", "/short":
        monkeypatch.setattr(hellaswag, "URL", url + path)
        with pytest.raises(OSError):
            hellaswag.fetch()
        assert os.listdir() == []
    train("gpt2", monkeypatch, *QUICK, "--hella_limit=10")  # goes on without, and says so once
    assert capsys.readouterr().err.count("no HellaSwag") == 1 and "hella" not in open("log/gpt2-tiny/log.txt").read()
    monkeypatch.setattr(hellaswag, "URL", url + "/good")
    train("gpt2", monkeypatch, *QUICK, "--hella_limit=10", "--log_dir=log/b")
    assert open(hellaswag.FILE, "rb").read() == data
    assert re.findall(r"^(\d+) hella [01]\.\d{4}$", open("log/b/log.txt").read(), re.M) == ["0", "4", "8"]
    assert np.load("log/b/hella_8.npy").shape == (6,)
    server.shutdown()


# ---- runs ------------------------------------------------------------------------------------------------------------

def log_of(folder="log/gpt2-tiny"):
    return open(f"{folder}/log.txt", "rb").read()


def stream_of(name, folder):
    return np.array([float(line.split()[2]) for line in log_of(folder).decode().splitlines() if line.split()[1] == name])


@each_arch
def test_a_tiny_run_from_the_shell(arch):
    """A short version of the first command in the README, with everything it promises."""
    result = shell(f"train_{arch}.py", "--tiny", "--max_steps=60", "--eval_interval=30", "--sample_interval=60", "--checkpoint_interval=0")
    assert result.returncode == 0, result.stderr
    train_loss, val = stream_of("train", f"log/{arch}-tiny"), stream_of("val", f"log/{arch}-tiny")
    assert len(train_loss) == 60 and abs(train_loss[0] - math.log(256)) < 0.3 and train_loss[-1] < 3.3 and val[2] < val[1] < val[0]
    assert all(re.fullmatch(r"\d+ (train|val|lr|norm|maxvio) \S+", line) for line in log_of(f"log/{arch}-tiny").decode().splitlines())
    for words in "sample: ", f"log: log/{arch}-tiny/log.txt", "checkpoint: ", "next: python ":
        assert words in result.stdout
    run = json.load(open(f"log/{arch}-tiny/run.json"))
    assert run["arch"] == arch and run["config"]["max_steps"] == 60 and run["params"]["total"] > 0 and run["flops_per_token"] > 0
    command = re.search(r"next: python (.*) --sample", result.stdout)[1].split()
    sample = shell(*command, "--sample=The statement", "--seed=1")
    assert sample.returncode == 0 and sample.stdout.startswith("The statement") and len(sample.stdout) > 50
    assert shell(*command, "--sample=The statement", "--seed=1").stdout == sample.stdout


@pytest.mark.parametrize("arch", ["gpt2", "deepseek"])
def test_resume_is_exact(arch, monkeypatch, capsys):
    """Interrupted after any step and resumed, a run ends with the same log and the same weights."""
    train(arch, monkeypatch, *quick(arch), "--log_dir=log/whole")
    whole = common.read_checkpoint("log/whole/model_00008.pt")
    for stop in 2, 6:
        train(arch, monkeypatch, *quick(arch), f"--log_dir=log/{stop}")
        for step in range(stop + 1, 9):
            if os.path.exists(f"log/{stop}/model_{step:05d}.pt"):
                os.remove(f"log/{stop}/model_{step:05d}.pt")
        with open(f"log/{stop}/log.txt", "a") as f:
            f.write("9 tra")  # torn by a kill
        train(arch, monkeypatch, *quick(arch), f"--log_dir=log/{stop}", "--resume=auto")
        assert f"resumed log/{stop}/model_{stop:05d}.pt at step {stop}" in capsys.readouterr().out
        assert log_of(f"log/{stop}") == log_of("log/whole")
        again = common.read_checkpoint(f"log/{stop}/model_00008.pt")
        for name, p in whole["model"].items():
            assert torch.equal(p, again["model"][name]), name
        for i, state in whole["optimizer"]["state"].items():
            assert all(torch.equal(v, again["optimizer"]["state"][i][k]) for k, v in state.items())
    assert not any("_orig_mod" in k or k.startswith("module.") for k in whole["model"])
    train(arch, monkeypatch, *quick(arch), "--log_dir=log/whole", "--resume=auto")  # finished: nothing changes
    assert log_of("log/whole") == log_of("log/6")
    train(arch, monkeypatch, *quick(arch), "--log_dir=log/decay", "--resume=log/whole/model_00004.pt", "--weight_decay=9", "--optimizer=adamw")
    assert "weight_decay 0.1 -> 9.0" in capsys.readouterr().out
    decayed = common.read_checkpoint("log/decay/model_00008.pt")
    assert decayed["optimizer"]["param_groups"][0]["weight_decay"] == 9.0
    assert stream_of("train", "log/decay")[0] == stream_of("train", "log/whole")[4]


def test_killed_in_the_middle_of_a_save(monkeypatch):
    """kill -9 while the checkpoint of step 6 is half written: the one of step 4 counts, and the log ends the same."""
    train("gpt2", monkeypatch, *QUICK, "--log_dir=log/whole")
    code = ("import os, signal, sys, torch, train_gpt2\nsave = torch.save\n"
            "def dying(state, f):\n    save(state, f)\n    if state['step'] == 6:\n        f.flush(); f.truncate(1000); os.kill(os.getpid(), signal.SIGKILL)\n"
            "torch.save = dying\nsys.argv = sys.argv[:1] + sys.argv[1:]\ntrain_gpt2.main()")
    env = {**os.environ, "PYTHONPATH": ROOT}
    result = subprocess.run([sys.executable, "-c", code, *QUICK], env=env, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL
    assert os.path.exists("log/gpt2-tiny/model_00006.pt.tmp") and not os.path.exists("log/gpt2-tiny/model_00006.pt")
    train("gpt2", monkeypatch, *QUICK, "--resume=auto")
    assert log_of() == log_of("log/whole")
    assert not glob.glob("log/gpt2-tiny/*.tmp")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_resumed(signum, monkeypatch):
    """SIGTERM and SIGINT finish the step and save; nothing saves on SIGKILL, which loses steps, never the result."""
    options = [*QUICK, "--max_steps=100", "--checkpoint_interval=20", "--eval_interval=50"]
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "train_gpt2.py"), *options], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step    30/"):
            process.send_signal(signum)
            break
    rest = process.stdout.read()
    assert process.wait() == (0 if signum != signal.SIGKILL else -signum)
    newest = max(glob.glob("log/gpt2-tiny/model_*.pt"))
    assert (signum == signal.SIGKILL) == newest.endswith("00020.pt") or newest > "log/gpt2-tiny/model_00030.pt"
    assert signum == signal.SIGKILL or f"stopped; {newest} holds everything" in rest
    train("gpt2", monkeypatch, *options, "--resume=auto")
    train("gpt2", monkeypatch, *options, "--log_dir=log/whole")
    assert log_of() == log_of("log/whole")


@each_arch
def test_processes_and_micro_batches_do_not_change_the_result(arch, monkeypatch):
    """1 process x 16 rows, 1 x 2 with accumulation and 2 x 2 with accumulation; resumed with another number of processes."""
    shards("data")
    script, options = f"train_{arch}.py", [*quick(arch), "--data_dir=data", "--hella_limit=0"]
    train(arch, monkeypatch, *options, "--batch_size=16", "--log_dir=log/a")
    train(arch, monkeypatch, *options, "--batch_size=2", "--log_dir=log/b")
    result = shell(script, *options, "--batch_size=2", "--log_dir=log/c", processes=2)
    assert result.returncode == 0, result.stderr
    os.makedirs("log/d")
    os.link("log/c/model_00004.pt", "log/d/model_00004.pt")
    train(arch, monkeypatch, *options, "--batch_size=8", "--log_dir=log/d", "--resume=auto")
    for other in "bcd":
        for stream in "train", "val", "norm":
            a, b = stream_of(stream, "log/a"), stream_of(stream, f"log/{other}")
            np.testing.assert_allclose(b, a[-len(b):], rtol=1e-5 if stream == "train" else 1e-4)
        assert (stream_of("maxvio", "log/a")[-4:] == stream_of("maxvio", f"log/{other}")[-4:]).all()
        for name, bias in common.read_checkpoint("log/a/model_00008.pt")["model"].items():
            if name.endswith("correction_bias"):
                assert bias.any() and torch.equal(bias, common.read_checkpoint(f"log/{other}/model_00008.pt")["model"][name])


def test_two_machines_train_as_one():
    """Two agents of torchrun that meet over the network, in one folder, leave the log of two processes of one machine."""
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
             f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", os.path.join(ROOT, "train_gpt2.py"), *QUICK, "--log_dir=log/two"]
    agents = [subprocess.Popen(agent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in agents]
    assert all(process.returncode == 0 for process in agents), outputs
    result = shell("train_gpt2.py", *QUICK, "--log_dir=log/one", processes=2)
    assert result.returncode == 0 and log_of("log/two") == log_of("log/one"), result.stderr
    assert json.load(open("log/two/run.json"))["processes"] == 2


@each_arch
def test_compiled_is_the_same(arch, monkeypatch, gpt2_bpe, hellaswag_items, capsys):
    """torch.compile on the CPU: the same losses; HellaSwag, samples and saving work, and names stay clean."""
    with open("h.jsonl", "w") as f:
        f.writelines(json.dumps(item) + "\n" for item in hellaswag_items[:8])
    data = gpt2_bpe.encode_ordinary(" ".join(item["ctx"] for item in hellaswag_items[:300]))
    os.mkdir("data")
    fineweb.write_shard("data/x_val_000000.bin", data[:2000])
    fineweb.write_shard("data/x_train_000001.bin", data[2000:])
    options = [*quick(arch), "--data_dir=data", "--vocab_size=50304", "--block_size=64", "--hella_limit=8", "--hellaswag_file=h.jsonl",
               "--max_steps=4", "--eval_interval=2", "--sample_interval=2"]
    train(arch, monkeypatch, *options, "--log_dir=log/eager")
    train(arch, monkeypatch, *options, "--log_dir=log/compiled", "--compile")
    for stream in "train", "val", "hella":
        a, b = stream_of(stream, "log/eager"), stream_of(stream, "log/compiled")
        assert len(a) >= 3
        np.testing.assert_allclose(a, b, rtol=1e-4)
    assert capsys.readouterr().out.count("sample: Hello") == 4
    names = [list(common.read_checkpoint(f"log/{x}/model_00004.pt")["model"]) for x in ("eager", "compiled")]
    assert names[0] == names[1]


@each_transformer
def test_export_opens_with_transformers(arch, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM
    train(arch, monkeypatch, *quick(arch))
    train(arch, monkeypatch, *quick(arch), "--export=exported")
    hf = AutoModelForCausalLM.from_pretrained("exported").eval()
    assert type(hf).__name__ == HF[arch]
    script, checkpoint = SCRIPTS[arch], common.read_checkpoint(f"log/{arch}-tiny/model_00008.pt")
    model = common.load_model("x", checkpoint, arch, script.Config, script.Model)
    idx = tokens(2, 32, vocab=256)
    torch.testing.assert_close(hf(idx).logits, model(idx)[0], atol=1e-4, rtol=0)
    assert hf.generate(idx[:1, :5], max_new_tokens=5, do_sample=False).shape == (1, 10)
    bad(capsys, lambda: train(arch, monkeypatch, *quick(arch), "--export=exported"), "not empty")
    monkeypatch.setitem(sys.modules, "transformers", None)
    bad(capsys, lambda: train(arch, monkeypatch, *quick(arch), "--export=again"), "pip install transformers")


def test_hellaswag_from_the_shell(monkeypatch, gpt2_bpe, hellaswag_items):
    with open("h.jsonl", "w") as f:
        f.writelines(json.dumps(item) + "\n" for item in hellaswag_items[:30])
    os.mkdir("data")
    for name in "x_val_000000.bin", "x_train_000001.bin":
        fineweb.write_shard(f"data/{name}", gpt2_bpe.encode_ordinary(" ".join(item["ctx"] for item in hellaswag_items[:50])))
    train("gpt2", monkeypatch, *QUICK, "--data_dir=data", "--vocab_size=50304", "--block_size=256", "--batch_size=1",
          "--hella_limit=30", "--hellaswag_file=h.jsonl")
    train("gpt2", monkeypatch, *QUICK, "--export=exported")
    ours = shell("hellaswag.py", "log/gpt2-tiny/model_00008.pt", "--hellaswag_file=h.jsonl")
    theirs = shell("hellaswag.py", "exported", "--hellaswag_file=h.jsonl")
    assert ours.returncode == theirs.returncode == 0, ours.stderr + theirs.stderr
    assert ours.stdout.splitlines()[:2] == theirs.stdout.splitlines()[:2]
    acc_norm = re.search(r"acc_norm (0\.\d{4}) \+- 0\.\d{4}  \(\d+/30\)", ours.stdout)[1]
    assert float(acc_norm) == stream_of("hella", "log/gpt2-tiny")[-1] and "items/s" in ours.stdout
    with open("h.jsonl") as f:
        items = [json.loads(line) for line in f]
    with open("raw.jsonl", "w") as f:
        f.writelines(json.dumps({**item, "activity_label": "Doing", "ctx_a": item["ctx"], "ctx_b": ""}) + "\n" for item in items)
    ours = shell("hellaswag.py", "exported", "--hellaswag_file=raw.jsonl", "--style=lm-eval")
    assert ours.returncode == 0 and "/30)" in ours.stdout
    lacking = shell("hellaswag.py", "log/gpt2-tiny/model_00008.pt", "--hellaswag_file=h.jsonl", "--style=lm-eval")
    assert lacking.returncode == 1 and lacking.stderr.count("\n") == 1 and "line 1" in lacking.stderr and "ctx_a" in lacking.stderr
    for name in "nothing.pt", "h.jsonl":
        result = shell("hellaswag.py", name, "--hellaswag_file=h.jsonl")
        assert result.returncode == 1 and result.stderr.count("\n") == 1 and name in result.stderr


def lm_eval_items(path, n=600):
    """Real items with the fields of the original file, where a copy has the context in one piece: cut into two at its
    last sentence. Every sixth gets WikiHow's markers, which a copy may lack."""
    with (lzma.open if path.endswith(".xz") else open)(path, "rb") as f:
        items = [json.loads(line) for line in f.readlines()[::10042 // n][:n]]
    for i, item in enumerate(items):
        if "ctx_a" not in item:
            first, dot, last = item["ctx"].rpartition(". ")
            item["ctx_a"], item["ctx_b"] = first + dot.strip(), last
        if i % 6 == 0:
            item["ctx_a"] = "[header] " + item["ctx_a"].replace(". ", " [title] ", 1)
            item["ctx_b"] += (" [step]", "  [substeps] ", " [title]")[i % 18 // 6]
            item["endings"][i % 4] = " [header] " + item["endings"][i % 4].replace(" ", "  ", 2) + " [title] " + "\u2014" * 8 + " [step]."
    return items


def test_lm_eval_style_equals_the_harness(gpt2_bpe, hellaswag_path):
    """lm-evaluation-harness, run on the export of a random model, finds the same likelihoods and answers for 600 real items."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from tiktoken.load import read_file_cached
    from transformers import GPT2TokenizerFast

    class Folded(HFLM):
        def tok_encode(self, *args, **kw):  # as Reduced: a small vocabulary is quick
            return [t % Reduced.n_vocab for t in super().tok_encode(*args, **kw)]
    os.mkdir("tokenizer")
    for name, file in ("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe"):
        with open(f"tokenizer/{name}", "wb") as f:
            f.write(read_file_cached(f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}"))
    items = lm_eval_items(hellaswag_path)
    with open("items.jsonl", "w") as f:
        f.writelines(json.dumps({k: item[k] for k in ("ctx", "activity_label", "ctx_a", "ctx_b", "endings", "label")}) + "\n" for item in items)
    os.mkdir("tasks")
    with open("tasks/local.yaml", "w") as f:  # the harness's own task, on a local file
        f.write(f"include: {os.path.dirname(lm_eval.__file__)}/tasks/hellaswag/hellaswag.yaml\ntask: local\ndataset_path: json\n"
                f"dataset_kwargs: {{data_files: {{validation: {os.path.abspath('items.jsonl')}}}}}\ntraining_split: null\n")
    model = small_model("gpt2", vocab_size=Reduced.n_vocab, block_size=512)
    theirs = Folded(SCRIPTS["gpt2"].to_hf(model), tokenizer=GPT2TokenizerFast.from_pretrained("tokenizer"), batch_size=8, device="cpu")
    theirs = lm_eval.simple_evaluate(theirs, tasks=["local"], task_manager=TaskManager(include_path="tasks"), log_samples=True, bootstrap_iters=0)
    samples = sorted(theirs["samples"]["local"], key=lambda sample: sample["doc_id"])
    expected = -torch.tensor([[float(choice[0]) for choice in sample["filtered_resps"]] for sample in samples])
    answers = np.array([[sample["acc"], sample["acc_norm"]] for sample in samples]).T.astype(bool)
    world = common.World(torch.device("cpu"))
    ours, other = (hellaswag.HellaSwag(hellaswag.load("items.jsonl", style), Reduced(gpt2_bpe), 512, 4096, world, style=style)
                   for style in ("lm-eval", "completion"))
    assert expected.shape == (600, 4) and (np.array(ours.score(model)) == answers).all()
    torch.testing.assert_close(ours.losses(model), expected, atol=2e-3, rtol=0)
    assert ((other.losses(model) - expected).abs() > 0.02).float().mean() > 0.9  # the other style is another task


def test_bench_keeps_nothing(monkeypatch, capsys):
    monkeypatch.setitem(common.PEAK_FLOPS, "cpu", 1e12)
    train("gpt2", monkeypatch, *QUICK, "--bench=3")
    out = capsys.readouterr().out
    assert re.search(r"median of 3 steps: [\d.]+ ms \| [\d,]+ tok/s \| [\d.]+% MFU", out) and os.listdir() == []


def test_samples_and_short_contexts(monkeypatch, capsys):
    """A sample within a run shortens its prompt; a recurrent model has no limit, others say theirs."""
    for arch in "gpt2", "rwkv":
        train(arch, monkeypatch, *quick(arch), "--block_size=8", "--sample_interval=4")
        assert capsys.readouterr().out.count("sample: Hello, I") == 2
    train("rwkv", monkeypatch, *quick("rwkv"), "--block_size=8", "--sample=" + 40 * "x")
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--block_size=8", "--sample=" + 40 * "x"), "40 tokens")


def test_samples_never_contain_padding():
    model = small_model("gpt2", vocab_size=512, block_size=16)
    with torch.no_grad():
        model.lm_head.weight[256:] *= 100  # the padding would win every draw
    text = common.generate(model, common.Bytes(), "ab", 16, "cpu", seed=0, new_tokens=40)
    assert text.startswith("ab") and len(text.encode(errors="replace")) >= 40
    with pytest.raises(SystemExit, match="17 tokens"):
        common.generate(model, common.Bytes(), "a" * 17, 16, "cpu", seed=0)
    assert common.generate(model, common.Bytes(), "", 16, "cpu", seed=0)


# ---- bad input: one line, exit code 1, nothing lost ------------------------------------------------------------------

@pytest.mark.parametrize("option, words", [
    ("--n_layers=3", "--n_layer"), ("--learn_rate=1", "--learning_rate"), ("--zzz", "--help"), ("stray", "stray"),
    ("--n_layer=two", "--n_layer"), ("--n_layer=0", "n_layer=0"), ("--batch_size=-4", "batch_size=-4"), ("--learning_rate=nan", "learning_rate"),
    ("--compile=maybe", "--compile"), ("--optimizer=sgd", "muon"), ("--device=tpu9", "--device=tpu9"), ("--n_head=5", "n_head=5"),
    ("--bench=-1", "bench"), ("--bench=1 --sample=x", "one at a time"), ("--beta1=1", "beta1"), ("--seed=18446744073709551616", "seed"), ("--n_embd=9223372036854775800", "n_embd"), ("--sample=x", "no checkpoint"), ("--export=x", "no checkpoint"), ("--resume=x.pt", "x.pt"), ("--data_dir=nowhere", "nowhere")])
def test_bad_options(option, words, monkeypatch, capsys):
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, *option.split()), words)
    assert not os.path.exists("log")


def test_an_error_is_one_line_without_a_traceback():
    result = shell("train_gpt2.py", "--data_dir=nowhere")
    assert (result.returncode, result.stdout) == (1, "") and result.stderr.count("\n") == 1 and "nowhere" in result.stderr


class Attack:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_checkpoints_that_must_not_be_used(monkeypatch, capsys):
    train("gpt2", monkeypatch, *QUICK)
    log, path = log_of(), "log/gpt2-tiny/model_00008.pt"
    resume = lambda *options: train("gpt2", monkeypatch, *QUICK, "--log_dir=log/new", *options)
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK), "--resume=auto", "--log_dir")
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--resume=log/gpt2-tiny/model_00002.pt"), "move them away")
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--resume=auto", "--max_steps=7"), "max_steps=7")
    torch.save({"arch": Attack()}, "attack.pt")
    bad(capsys, lambda: resume("--resume=attack.pt"), "attack.pt")
    assert not os.path.exists("executed")
    open("cut.pt", "wb").write(open(path, "rb").read()[:5000])
    open("empty.pt", "wb")
    torch.save({"model": {}}, "part.pt")
    torch.save([1, 2], "list.pt")
    for name in "cut.pt", "empty.pt", "part.pt", "list.pt", "log":
        bad(capsys, lambda: resume(f"--resume={name}"), name)
    torch.save({**common.read_checkpoint(path), "arch": "llama"}, "llama.pt")
    bad(capsys, lambda: resume("--resume=llama.pt"), "llama", "train_llama.py")
    bad(capsys, lambda: resume(f"--resume={path}", "--n_layer=3", "--n_embd=16"), "--n_layer=1", "--n_embd=32")
    bad(capsys, lambda: resume(f"--resume={path}", "--optimizer=muon"), "optimizer")
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--sample=" + "x" * 33), "33 tokens")
    assert log_of() == log and not os.path.exists("log/new")
    open("log/gpt2-tiny/model_00009.pt", "wb").write(b"half")  # auto: the newest readable one
    train("gpt2", monkeypatch, *QUICK, "--resume=auto")
    assert "model_00009.pt" in capsys.readouterr().err and log_of() == log
    for step in 2, 4, 6, 8:
        open(f"log/gpt2-tiny/model_{step:05d}.pt", "wb").write(b"half")
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--resume=auto"), "model_00009.pt")
    assert log_of() == log


def test_a_log_is_never_cut_by_mistake(monkeypatch, capsys):
    train("gpt2", monkeypatch, *QUICK)
    train("gpt2", monkeypatch, *QUICK, "--seed=2", "--log_dir=log/b")
    log = log_of()
    shutil.copy("log/gpt2-tiny/model_00008.pt", "elsewhere.pt")
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--resume=elsewhere.pt"), "another run")
    for path in glob.glob("log/gpt2-tiny/model_*.pt"):
        os.remove(path)
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--resume=auto"), "no checkpoint")
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK), "--resume=auto")
    assert log_of() == log
    os.makedirs("log/c")  # stopped before the first step, or before the first checkpoint: nothing to lose
    open("log/c/log.txt", "w").write("0 val 5.5159\n")
    train("gpt2", monkeypatch, *QUICK, "--log_dir=log/c")
    os.makedirs("log/d")
    open("log/d/log.txt", "w").write("0 val 5.5159\n0 train 5.5\n1 tra")
    train("gpt2", monkeypatch, *QUICK, "--log_dir=log/d", "--resume=auto")
    assert log_of("log/c") == log_of("log/d") == log


def test_a_full_disk_leaves_the_old_checkpoint(monkeypatch, capsys):
    save = torch.save

    def full(state, f):
        save(state, f)
        if state["step"] == 4:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK), "model_00004.pt", "No space left")
    monkeypatch.setattr(torch, "save", save)
    assert glob.glob("log/gpt2-tiny/model*") == ["log/gpt2-tiny/model_00002.pt"]
    train("gpt2", monkeypatch, *QUICK, "--resume=auto")


@pytest.mark.parametrize("arch", ["gpt2", "rwkv"])
def test_a_full_disk_leaves_no_half_export(arch, monkeypatch, capsys):
    train(arch, monkeypatch, *quick(arch))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no file may grow beyond this
    try:
        bad(capsys, lambda: train(arch, monkeypatch, *quick(arch), "--export=exported"), "cannot write exported")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.path.exists("exported")
    train(arch, monkeypatch, *quick(arch), "--export=exported")


def test_the_newest_checkpoints_stay(monkeypatch):
    def steps():
        return [int(path[-8:-3]) for path in sorted(glob.glob("log/gpt2-tiny/model_*.pt"))]
    options = [*QUICK, "--checkpoint_interval=1", "--keep_checkpoints=2"]
    train("gpt2", monkeypatch, *options)
    assert steps() == [7, 8]
    train("gpt2", monkeypatch, *options, "--keep_checkpoints=1", "--resume=auto")  # at its end: evaluated and saved again
    assert steps() == [8] and json.load(open("log/gpt2-tiny/run.json"))["tokens_per_second"] > 0
    train("gpt2", monkeypatch, *options, "--keep_checkpoints=0", "--log_dir=all")
    assert len(glob.glob("all/model_*.pt")) == 8


def test_rotation_takes_nothing_else(monkeypatch, capsys):
    """A damaged newer checkpoint, which --resume passes over, does not count; files of other names stay."""
    options = [*QUICK, "--checkpoint_interval=1", "--keep_checkpoints=1", "--log_dir=run"]
    train("gpt2", monkeypatch, *options)
    others = ["run/model_best_model_00001.pt", "run/model_3.pt", "run/model_00100.pt"]
    for path in others:
        open(path, "w").close()
    os.mkdir("run/model_00002.pt")
    os.rename("run/model_00008.pt", "run/model_00005.pt")
    train("gpt2", monkeypatch, *options, "--resume=auto")
    assert sorted(glob.glob("run/model_*.pt")) == sorted([*others, "run/model_00002.pt", "run/model_00008.pt"])
    assert "run/model_00100.pt is not a readable checkpoint" in capsys.readouterr().err
    os.remove("run/log.txt")
    bad(capsys, lambda: train("gpt2", monkeypatch, *options), "holds a run")


def test_a_bad_update_stops_the_run_and_is_never_saved(monkeypatch, capsys):
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--learning_rate=1e30", "--warmup_steps=0", "--grad_clip=1e30", "--checkpoint_interval=1"),
        "step", "learning_rate")
    for path in glob.glob("log/gpt2-tiny/model_*.pt"):
        assert all(v.isfinite().all() for v in common.read_checkpoint(path)["model"].values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 13 GiB"),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_says_what_to_do(error, monkeypatch, capsys):
    def forward(*args):
        raise error
    monkeypatch.setattr(SCRIPTS["gpt2"].Model, "forward", forward)
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK), "--batch_size", "the result is the same")


# ---- compare.py ------------------------------------------------------------------------------------------------------

def made_up(folder, arch="gpt2", val=4.0, hits=None, steps=1000, every=500, **options):
    """A folder as a run leaves it behind; the validation loss falls by 1 a step of `every`, to val."""
    config = {"n_layer": 2, "vocab_size": 50304, "total_batch_size": 1000, "max_steps": 1000, "warmup_steps": 10, "data_dir": "data",
              "beta2": 0.95, "hella_limit": 100, "hellaswag_file": "items", "seed": 1, **options}
    os.makedirs(folder)
    evaluated = range(0, steps + 1, every)
    with open(f"{folder}/log.txt", "w") as f:
        for step in range(steps):
            if step in evaluated:
                f.write(f"{step} val {val + (evaluated[-1] - step) / every:.4f}\n")
            f.write(f"{step} train 4.0\n")
        if steps in evaluated:
            f.write(f"{steps} val {val:.4f}\n")
        if hits is not None:
            np.save(f"{folder}/hella_{steps}.npy", hits)
            f.write(f"{steps} hella {np.mean(hits):.4f}\n")
    with open(f"{folder}/run.json", "w") as f:
        json.dump({"arch": arch, "config": config, "params": {"total": 1234, "active": 1000, "non_embedding": 900}, "device": "cpu",
                   "flops_per_token": 8e6, "processes": 2, "tokens_per_second": 500}, f)


def compared(capsys, *paths):
    """What compare.py prints for these: rows as dicts, in order."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare.py", *paths])
        compare.main()
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert set("".join(rule)) == {"-"}
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_sign_test_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in (0, 0), (0, 1), (5, 5), (1, 9), (10, 3), (120, 80), (3000, 2800), (6000, 4042):
        expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert compare.sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_the_table_ranks_and_compares(capsys):
    rng = np.random.default_rng(0)
    a, b = rng.random(100) < 0.4, rng.random(100) < 0.3
    made_up("log/gpt2", val=3.5, hits=b)
    made_up("log/llama", "llama", 3.2, a, beta2=0.99)
    made_up("log/worse/phi", "phi", 3.9, b[:50], hella_limit=50)
    first, second, third = rows = compared(capsys)
    assert [row["model"] for row in rows] == ["llama", "gpt2", "phi"]
    assert first["parameters"] == "1,234" and first["active"] == "1,000" and first["tokens"] == "1,000,000"
    assert first["MFLOP/token"] == "8.0" and first["tokens/s"] == "500 on 2 x cpu" and first["validation loss"] == "3.2000"
    assert first["HellaSwag acc_norm"] == f"{a.mean():.4f} ± {math.sqrt(a.mean() * (1 - a.mean()) / 100):.4f}"
    assert first["remarks"] == "beta2=0.99" and second["remarks"] == "" and first["p"] == first["points to the first"] == "-"
    only_b, only_a = int((b & ~a).sum()), int((a & ~b).sum())  # the table of McNemar's test
    d, half = only_b - only_a, 1.96 * math.sqrt(only_b + only_a - (only_b - only_a) ** 2 / 100)  # points of 100 items
    assert second["points to the first"] == f"{d:+.2f} [{d - half:+.2f}, {d + half:+.2f}]"
    assert second["p"] == f"{compare.sign_test(only_b, only_a):.2g}"
    assert third["p"] == "-"  # other items
    assert compared(capsys, "log/worse", "log/gpt2", "log/llama/log.txt") == rows


def test_seeds_share_a_line(capsys):
    hits = [np.arange(100) % 10 < k for k in (3, 5, 2)]
    made_up("log/gpt2-1", val=3.5, hits=hits[0], seed=1, log_dir="x", batch_size=4)
    made_up("log/gpt2-2", val=3.1, hits=hits[1], seed=2, device="cuda", data_dir="/elsewhere/data/")
    made_up("log/rwkv", "rwkv", 3.4, hits[2])
    first, second = compared(capsys)
    assert (first["model"], first["runs"], first["validation loss"]) == ("gpt2", "2", "3.3000 (3.1000 to 3.5000)")
    assert first["HellaSwag acc_norm"].startswith("0.4000 ± 0.0436 (0.3000 to 0.5000)")  # of 0.3 both are right, of 0.2 one
    error = np.std([0.5] * 20 + [1] * 10 + [0] * 70) * 10  # rwkv has 0.1 of 0.2 that both have right: 0.2 by one, 0.1 by both
    assert second["points to the first"] == f"-20.00 [{-20 - 1.96 * error:+.2f}, {-20 + 1.96 * error:+.2f}]"
    assert float(second["p"]) == pytest.approx(math.erfc(20 / error / math.sqrt(2)), rel=0.05)
    made_up("log/gpt2-3", val=3.5, hits=hits[0], seed=2)
    assert compared(capsys)[0]["remarks"] == "a seed comes twice"
    os.symlink("..", "log/gpt2-3/up")
    os.symlink("gpt2-3", "log/latest")
    assert [row["runs"] for row in compared(capsys, "log", "log/rwkv/log.txt", "log/latest")] == ["3", "1"]  # each once
    made_up("log/gpt2-4", val=3.0, hits=hits[0], n_layer=5)  # another model
    assert {row["model"]: row["remarks"] for row in compared(capsys)} == {
        "gpt2 (gpt2-4)": "", "gpt2 (gpt2-1)": "n_layer=2; a seed comes twice", "rwkv": ""}


def test_p_values_of_equal_models_are_even():
    """1 run against 1, 2 against 2, 3 against 1 of the same model: one in twenty p-values is below 0.05."""
    rng = np.random.default_rng(0)
    for a, b in (1, 1), (2, 2), (3, 1):
        chance, low = rng.beta(0.6, 1.4, 2000), 0
        for _ in range(200):
            g, leader = (types.SimpleNamespace(runs=[None] * n, items="same", hits=(rng.random((n, 2000)) < chance).mean(0)) for n in (a, b))
            low += float(compare.against(g, leader)[1]) < 0.05
        assert low <= 22, (a, b, low)


def test_what_is_not_comparable_is_marked(capsys):
    made_up("log/a", "gpt2", 3.5)
    made_up("log/b", "llama", 3.6)
    made_up("log/c", "phi", 3.0, data_dir="other")
    made_up("log/d", "gemma", 3.1, steps=700)
    made_up("log/e", "rwkv", 3.2, learning_rate=1.0)
    made_up("log/f", "gpt2", 2.0, init_from="gpt2")
    made_up("log/g", "llama", 2.5, steps=300, every=100, seed=2)
    made_up("log/h", "deepseek", 2.1, every=300)
    with open("log/d/log.txt", "a") as f:
        f.write("700 tra")  # a line in the making
    os.mkdir("log/build-nanogpt")
    with open("log/build-nanogpt/log.txt", "w") as f:  # as its train_gpt2.py writes it
        f.write("0 val 10.9527\n0 hella 0.2463\n0 train 10.955029\n1 train 10.6\n2 val 3.3\n2 hella 0.2955\n")
    rows = {row["model"]: row for row in compared(capsys)}
    assert list(rows) == ["gpt2 (a)", "llama (b)", "gpt2 (f)", "deepseek", "llama (g)", "phi", "gemma", "rwkv", "build-nanogpt"]
    assert not rows["gpt2 (a)"]["remarks"] and not rows["llama (b)"]["remarks"]
    assert rows["gpt2 (f)"]["remarks"] == "not comparable: init_from=gpt2 instead of ''"
    assert rows["llama (g)"]["remarks"] == "not comparable: in progress, step 300 of 1000"  # and the finished seed stays above
    assert rows["deepseek"]["remarks"] == "not comparable: validation loss of step 900, not 1000"
    assert rows["phi"]["remarks"] == "not comparable: data_dir=other instead of data"
    assert rows["gemma"]["remarks"] == "not comparable: in progress, step 700 of 1000"
    assert rows["gemma"]["tokens"] == "700,000" and rows["gemma"]["validation loss"] == "3.1000"
    assert rows["rwkv"]["remarks"] == "not comparable: learning_rate=1.0 instead of None"
    peer = rows["build-nanogpt"]
    assert (peer["tokens"], peer["validation loss"], peer["parameters"]) == (f"{2 * 524288:,}", "3.3000", "-")
    assert peer["HellaSwag acc_norm"] == "0.2955 ± 0.0046" and "no run.json" in peer["remarks"]


def test_compare_reads_real_runs_and_draws(monkeypatch, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for arch in "gpt2", "deepseek":
        train(arch, monkeypatch, *quick(arch))
    made_up("log/z", "phi", 3.0)
    rows = compared(capsys, "log", "--plot=curves.png")
    assert [row["tokens"] for row in rows[:2]] == ["4,096"] * 2 and all(row["active"] != "-" for row in rows)
    assert float(rows[0]["validation loss"]) == stream_of("val", f"log/{rows[0]['model']}-tiny")[-1]
    assert pyplot.imread("curves.png").std() > 0.05 and os.path.getsize("curves.png") < 200_000


def test_compare_says_in_a_line_what_is_wrong(monkeypatch, capsys):
    def attempt(*argv):
        monkeypatch.setattr(sys, "argv", ["compare.py", *argv])
        compare.main()
    bad(capsys, lambda: attempt(), "log is not there")
    os.makedirs("log/empty")
    bad(capsys, lambda: attempt(), "no log to read in log")
    open("log/empty/log.txt", "w").close()
    bad(capsys, lambda: attempt("log/empty"), "no log to read in log/empty")
    made_up("log/a", hits=np.ones(5, bool))
    whole = json.load(open("log/a/run.json"))
    for content in "", "xyz", "PK", b"\x93NUMPY", np.ones((2, 5), bool), np.array(["a"]), np.zeros(0, bool):
        with open("log/a/hella_1000.npy", "wb") as f:
            np.save(f, content) if isinstance(content, np.ndarray) else f.write(content if isinstance(content, bytes) else content.encode())
        bad(capsys, lambda: attempt("log/a"), "log/a/hella_1000.npy", "move it away")
    np.save("log/a/hella_1000.npy", np.ones(5, bool))
    broken = [whole | {"config": whole["config"] | {k: v}} for k, v in (("max_steps", None), ("total_batch_size", "x"), ("beta2", []), ("data_dir", 1))]
    for content in "{", [], {}, "[" * 100_000, whole | {"arch": 1}, whole | {"params": {}}, whole | {"flops_per_token": "x"}, *broken:
        with open("log/a/run.json", "w") as f:
            f.write(content if isinstance(content, str) else json.dumps(content))
        capsys.readouterr()
        bad(capsys, lambda: attempt("log/a"), "no log to read in log/a")
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "log/a/log.txt, or run.json beside it, is damaged" in message
    made_up("log/b")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bad(capsys, lambda: attempt("log/b", "--plot=x.png"), "pip install matplotlib")
    for name in "", "/", "log", "x":
        bad(capsys, lambda: attempt("log/b", f"--plot={name}"), "--plot=", "curves.png")


# ---- fineweb.py: text to shards ---------------------------------------------------------------------------------------

def run_fineweb(*args, code=0, env=None, **kw):
    """Runs fineweb.py with small default sizes; returns (stdout, lines of stderr without tqdm's bars)."""
    r = subprocess.run([sys.executable, os.path.join(ROOT, "fineweb.py"), *map(str, args)], capture_output=True, text=True,
                       env={**os.environ, **(env or {})}, timeout=120, **kw)
    bars = r"it/s|B/s|tok/s|\d+%\||examples|\[00:|\[A"
    lines = [x for x in re.split(r"[\r\n]+", r.stderr) if x.strip() and not re.search(bars, x)]
    assert r.returncode == code, r.stderr
    return r.stdout, lines


def shard_bytes(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.bin"))}


def some_documents(n=120, seed=0):
    """Documents of all lengths, with everything that could trip a tokenizer."""
    rng = random.Random(seed)
    words = ["the", "Vogon", "naïve", "日本語", "😀", "x" * 50, "<|endoftext|>", "  ", "\n\n", "1234567",
             "don't", "\u0000", "\t"]
    docs = [" ".join(rng.choices(words, k=rng.choice([1, 3, 20, 300]))) for _ in range(n)]
    return docs[:5] + ["", " \n", "lone \ud800 surrogate", "word " * 5000] + docs[5:]


def expected_shards(gpt2_bpe, docs, val, size, most=None):
    """The format, spelled out once more and independently of fineweb.py."""
    stream = [t for d in docs if d and d.strip() for t in [50256] + gpt2_bpe.encode_ordinary(d)][:most]
    cuts = [0] + list(range(val, len(stream), size)) + [len(stream)]
    parts = [stream[a:b] for a, b in zip(cuts, cuts[1:]) if b > a]
    return {f"fineweb_{'train' if i else 'val'}_{i:06d}.bin":
            b"".join(x.to_bytes(4, "little") for x in [20240520, 1, len(p)] + [0] * 253) + np.array(p, "<u2").tobytes()
            for i, p in enumerate(parts)}


def jsonl(docs, column="text"):
    return "".join(json.dumps({"id": i, column: d}) + "\n" for i, d in enumerate(docs)).encode()


def test_import_starts_nothing():
    code = "import sys, fineweb; print(sorted({'torch', 'tiktoken', 'datasets', 'tqdm', 'common'} & set(sys.modules)))"
    r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (r.stdout, r.stderr) == ("[]\n", "")


@pytest.mark.parametrize("procs", [1, 2])
@pytest.mark.parametrize("val, size, most", [(2000, 7001, None), (1, 97, 3000), (3000, 10**6, None), (2000, 500, 4000)])
def test_bytes(gpt2_bpe, tmp_path, procs, val, size, most):
    docs = some_documents()
    (tmp_path / "a.jsonl").write_bytes(jsonl(docs))
    args = ["--files", tmp_path / "a.jsonl", "--val_tokens", val, "--shard_size", size, "--num_proc", procs,
            "--data_dir", tmp_path / "out"] + (["--max_tokens", most] if most else [])
    run_fineweb(*args)
    want = expected_shards(gpt2_bpe, docs, val, size, most)
    assert len(want) > 1 and shard_bytes(tmp_path / "out") == want
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert "nothing to do" in run_fineweb(*args)[0] and shard_bytes(tmp_path / "out") == want


def test_killed_and_resumed(gpt2_bpe, tmp_path):
    files = [tmp_path / f"{i}.jsonl.gz" for i in range(6)]  # several files: those read to the end are skipped later
    for i, f in enumerate(files):
        f.write_bytes(gzip.compress(jsonl(some_documents(250, seed=i)), 1))
    docs = [d for i in range(6) for d in some_documents(250, seed=i)]
    args = [sys.executable, os.path.join(ROOT, "fineweb.py"), "--files", *files, "--val_tokens", "1000", "--shard_size", "5000",
            "--num_proc", "2", "--data_dir", tmp_path / "out"]
    rng, resumed, workers = random.Random(), 0, set()
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGKILL):
        p = subprocess.Popen(args, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        before, end = len(shard_bytes(tmp_path / "out")), time.time() + 30
        resumed += before > 0
        while time.time() < end and p.poll() is None and len(shard_bytes(tmp_path / "out")) <= before + rng.randint(0, 20):
            time.sleep(0.01)
        workers |= children(p.pid)
        with contextlib.suppress(ProcessLookupError):  # Ctrl-C reaches the whole group, kill -9 here the parent only
            (os.killpg if how == signal.SIGINT else os.kill)(p.pid, how)
        out, err = p.communicate(timeout=30)
        if how == signal.SIGINT and p.returncode:
            assert "Traceback" not in err and err.rstrip().splitlines()[-1].startswith("fineweb.py: interrupted")
    end = time.time() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.time() < end:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers), "a worker outlived its killed parent"
    assert resumed
    subprocess.run(args, check=True, capture_output=True)
    assert shard_bytes(tmp_path / "out") == expected_shards(gpt2_bpe, docs, 1000, 5000)
    assert not list((tmp_path / "out").glob("*.tmp"))


def children(pid):
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        return {int(x) for t in tasks for x in open(f"/proc/{pid}/task/{t}/children").read().split()}
    except OSError:
        return set()


def test_place_after_every_shard(gpt2_bpe, tmp_path):
    """From each recorded place the rest comes out the same, wherever the cut fell (blank documents, document ends)."""
    docs = ["a b c", "", "d e", " ", "f", "g h i j k l m n o p"] * 9
    (tmp_path / "a.jsonl").write_bytes(jsonl(docs))
    args = ["--files", str(tmp_path / "a.jsonl"), "--val_tokens", "3", "--shard_size", "2", "--num_proc", "1"]
    full = expected_shards(gpt2_bpe, docs, 3, 2)
    answers = iter([(np.concatenate([np.array([50256] + gpt2_bpe.encode_ordinary(d)) for d in docs if d.strip()]),
                     [1 + len(gpt2_bpe.encode_ordinary(d)) if d.strip() else 0 for d in docs], 0.5)])
    stream, place = fineweb.Stream(answers, 0, 0), {}
    for k in range(len(full)):
        place[k] = stream.more() and stream.place()
        list(stream.take(2 if k else 3))
    for k in (4, len(full) - 1):
        out = tmp_path / f"from{k}"
        out.mkdir()
        for name in list(full)[:k]:
            (out / name).write_bytes(full[name])
        options = {**fineweb.Files([args[1]]).id, "shard_size": 2, "val_tokens": 3, "max_tokens": None}
        fineweb.save_progress(str(out), {"options": options, "shard": k, "document": place[k][0], "token": place[k][1],
                                         "counts": [], "tokens": 1 + 2 * k, "finished": False})
        run_fineweb(*args, "--data_dir", out)
        assert shard_bytes(out) == full


def txt(docs):
    return "<|endoftext|>".join(docs).encode()


def zst(data):
    import pyarrow
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as f:
        f.write(data)
    return sink.getvalue().to_pybytes()


def parquet(docs, column="text"):
    import pyarrow as pa, pyarrow.parquet as pq
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(docs)), column: docs}), sink, row_group_size=50)
    return sink.getvalue()


@pytest.mark.parametrize("name, pack", [
    ("a.jsonl", jsonl), ("a.JSONL.gz", lambda d: gzip.compress(jsonl(d))),
    ("a.jsonl.xz", lambda d: lzma.compress(jsonl(d))), ("a.jsonl.zst", lambda d: zst(jsonl(d))),
    ("a.json", lambda d: json.dumps([{"text": x} for x in d], indent=1).encode()),
    ("a.json.gz", lambda d: gzip.compress(jsonl(d, "TEXT"))), ("a.parquet", lambda d: parquet(d, "Text")),
    ("a.txt", txt), ("a.txt.xz", lambda d: lzma.compress(txt(d))), ("a.txt.zst", lambda d: zst(txt(d))),
    ("a[1].jsonl", jsonl)])
def test_local_formats(gpt2_bpe, tmp_path, name, pack):
    docs = [d.replace("<|endoftext|>", "eot").replace("\ud800", "\r\n") for d in some_documents()] + [""]
    (tmp_path / name).write_bytes(pack(docs))
    run_fineweb("--files", tmp_path / name, "--val_tokens", 500, "--shard_size", 4000, "--data_dir", tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == expected_shards(gpt2_bpe, docs, 500, 4000)


def test_order_of_files(gpt2_bpe, tmp_path):
    for name in ("b2", "b1", "a1"):
        (tmp_path / f"{name}.txt").write_text(f"this is {name}")
    run_fineweb("--files", tmp_path / "b*.txt", tmp_path / "a1.txt", "--val_tokens", 2, "--data_dir", tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == expected_shards(gpt2_bpe, ["this is b1", "this is b2", "this is a1"], 2, 10**8)


def test_memory_of_a_long_document(gpt2_bpe, tmp_path):
    (tmp_path / "a.txt").write_text("word salad, " * 10**6)  # 12 MB
    run = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")  # its workers included, KB
    r = subprocess.run([sys.executable, "-c", run, sys.executable, os.path.join(ROOT, "fineweb.py"), "--files", tmp_path / "a.txt",
                        "--shard_size", "100000", "--data_dir", tmp_path / "out"],
                       capture_output=True, text=True, check=True)
    assert int(r.stdout.split()[-1]) < 400_000 and len(shard_bytes(tmp_path / "out")) > 30


def test_check(gpt2_bpe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    val, train = out / "fineweb_val_000000.bin", out / "fineweb_train_000001.bin"
    def good():
        fineweb.write_shard(str(val), [50256, 1, 2, 50256, 3])
        fineweb.write_shard(str(train), (x for x in ([4, 5], np.array([50256, 6]))))  # starts inside a document: fine
    def check(code):
        return run_fineweb("--check", "--data_dir", out, code=code)[0]
    good()
    assert "2 shards, 9 tokens, 0 bad" in check(0)
    def change(path, at, value):
        data = bytearray(path.read_bytes())
        data[at:at + len(value)] = value
        path.write_bytes(data)
    for damage in [lambda: change(train, 0, b"\0\0\0\0"), lambda: change(val, 4, b"\2\0\0\0"),
                   lambda: change(val, 8, b"\4\0\0\0"),
                   lambda: change(train, 1024, np.array([50257], "<u2").tobytes()), lambda: change(val, 1024, b"\1\0"),
                   lambda: train.write_bytes(train.read_bytes()[:-1]), lambda: train.write_bytes(b""),
                   lambda: fineweb.write_shard(str(train), [])]:
        damage()
        table = check(1)
        assert "1 bad" in table and table.count("BAD") == 1, table
        good()
    val.unlink()
    assert "MISSING: 0" in check(1)


BAD = {  # files to make; options; what the one line must say
    "no match": ({}, "--files none*.txt", "none*.txt"),
    "unknown kind": ({"a.doc": b"x"}, "--files a.doc", "a.doc"),
    "not gzip": ({"a.jsonl.gz": b"hello"}, "--files a.jsonl.gz", "a.jsonl.gz"),
    "cut gzip": ({"a.txt.gz": gzip.compress(bytes(range(97, 120)) * 99)[:-9]}, "--files a.txt.gz", "a.txt.gz"),
    "cut xz": ({"a.txt.xz": lzma.compress(b"hello" * 99)[:-9]}, "--files a.txt.xz", "a.txt.xz"),
    "not zst": ({"a.txt.zst": b"hello"}, "--files a.txt.zst", "a.txt.zst"),
    "not parquet": ({"a.parquet": b"hello"}, "--files a.parquet", "a.parquet"),
    "not utf-8": ({"a.txt": b"caf\xe9"}, "--files a.txt", "a.txt"),
    "bad json": ({"a.jsonl": b'{"text": "a"}\n\n{"text": \n'}, "--files a.jsonl", "a.jsonl line 3"),
    "bad array": ({"a.json": b'[{"text": "a"},'}, "--files a.json", "a.json"),
    "no field": ({"a.jsonl": b'{"text": "a"}\n{"id": 1, "body": "b"}\n'}, "--files a.jsonl",
                 "line 2: no text column among: id, body"),
    "not an object": ({"a.jsonl": b'"a"\n'}, "--files a.jsonl", "a.jsonl line 1"),
    "not a string": ({"a.jsonl": b'{"text": 5}\n'}, "--files a.jsonl", "a.jsonl line 1"),
    "no column": ({"a.parquet": lambda: parquet(["x"], "body")}, "--files a.parquet", "no text column among: id, body"),
    "not text": ({"a.parquet": lambda: parquet([1, 2])}, "--files a.parquet", "int64"),
    "empty": ({"a.jsonl": b""}, "--files a.jsonl", "only 0 tokens"),
    "blank": ({"a.txt": b" \n"}, "--files a.txt", "only 0 tokens"),
    "small": ({"a.txt": b"hello world"}, "--files a.txt", "only 3 tokens"),
    "no train": ({"a.txt": b"hello world"}, "--files a.txt --val_tokens 3", "only 3 tokens"),
    "max <= val": ({"a.txt": b"a"}, "--files a.txt --val_tokens 5 --max_tokens 5", "--max_tokens 5"),
    "negative": ({}, "--max_tokens -5", "--max_tokens"),
    "zero": ({}, "--num_proc 0", "--num_proc"),
    "no number": ({}, "--shard_size big", "--shard_size"),
    "too big": ({"a.txt": b"a"}, "--files a.txt --shard_size 3000000000", "--shard_size"),
    "unknown option": ({}, "--sharad_size 5", "--sharad_size"),
    "two sources": ({"a.txt": b"a"}, "--files a.txt --dataset b", "--files"),
    "not a folder": ({"a.txt": b"a b c", "out": b""}, "--files a.txt --val_tokens 2", "out"),
    "nothing to check": ({}, "--check", "--data_dir"),
    "foreign shards": ({"a.txt": b"a b c", "out/fineweb_val_000000.bin": b""}, "--files a.txt --val_tokens 2",
                       "progress.json"),
    "broken progress": ({"a.txt": b"a b c", "out/progress.json": b"{"}, "--files a.txt --val_tokens 2",
                        "progress.json"),
    "no network": ({}, "--dataset no/such", "--dataset no/such"),
    "no network 2": ({}, "--pretokenized", "kjj0/fineweb10B-gpt2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(gpt2_bpe, tmp_path, case):
    files, options, says = BAD[case]
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data() if callable(data) else data)
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    _, err = run_fineweb("--data_dir", "out", *options.split(), code=1, env=env, cwd=tmp_path)
    assert len(err) == 1 and err[0].startswith("fineweb.py: ") and says in err[0], err
    assert case == "foreign shards" or not list(tmp_path.glob("out/*.bin")) + list(tmp_path.glob("out/*.tmp"))


def test_other_options_are_refused_and_harmless(gpt2_bpe, tmp_path):
    (tmp_path / "a.txt").write_text("a b c d e f g")
    (tmp_path / "b.txt").write_text("a b c d e f g h")
    def args(file="a.txt", val=2, size=3):
        return ["--files", file, "--val_tokens", val, "--shard_size", size, "--data_dir", "out"]
    assert "only 8 tokens" in run_fineweb(*args(val=99), code=1, cwd=tmp_path)[1][0]
    run_fineweb(*args(), cwd=tmp_path)  # nothing was finished before, so other options are welcome
    before = shard_bytes(tmp_path / "out")
    for other, says in ((args(size=4), "--shard_size 3"), (args(val=3), "--val_tokens 2"), (args("b.txt"), "--files"),
                        (args() + ["--max_tokens", 5], "--max_tokens None")):
        _, err = run_fineweb(*other, code=1, cwd=tmp_path)
        assert len(err) == 1 and says in err[0]
        assert shard_bytes(tmp_path / "out") == before


def test_disk_full(gpt2_bpe, tmp_path):
    """A file-size limit stands in for a full disk: finished shards stay, the unfinished one goes, the rest follows."""
    docs = some_documents()
    (tmp_path / "a.jsonl").write_bytes(jsonl(docs))
    args = ["--files", tmp_path / "a.jsonl", "--val_tokens", 1000, "--shard_size", 10000,
            "--data_dir", tmp_path / "out"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
    _, err = run_fineweb(*args, code=1, preexec_fn=limit)
    assert len(err) == 1 and "File too large" in err[0]
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["fineweb_val_000000.bin", "progress.json"]
    run_fineweb(*args)
    assert shard_bytes(tmp_path / "out") == expected_shards(gpt2_bpe, docs, 1000, 10000)

# ---- fineweb.py and the hub: a stand-in for huggingface.co on the loopback ----


class Hub(http.server.BaseHTTPRequestHandler):
    repos, log = {}, []  # "owner/name" -> {path: bytes}; requests for contents
    protocol_version = "HTTP/1.1"

    def answer(self, body=b"", code=200, **headers):
        self.send_response(code)
        for k, v in {"Content-Length": len(body), "X-Repo-Commit": "c" * 40, **headers}.items():
            self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        url = urllib.parse.unquote(self.path.partition("?")[0])
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        m = re.match(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/[^/]+)?(?:/(.+))?$", url)
        if not m or m[1] not in self.repos:
            return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
        repo, kind, path = m.groups()
        files = self.repos[repo]
        entries = [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in files.items()]
        if kind == "resolve":
            if path not in files:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound")
            if self.command == "GET":
                self.log.append(path)
            first, last = (re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-")).groups()
            part = files[path][int(first):int(last) + 1 if last else None]
            span = {"Content_Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(files[path])}"}
            span = span if self.headers.get("Range") else {}
            etag = f'"{hash(files[path]):x}"'
            return self.answer(part, 206 if span else 200, ETag=etag, Accept_Ranges="bytes", **span)
        if kind == "tree":
            reply = [e for e in entries if not path or e["path"].startswith(path + "/")]
        elif kind == "paths-info":
            wanted = json.loads(sent)["paths"] if sent.startswith("{") else urllib.parse.parse_qs(sent)["paths"]
            reply = [e for e in entries if e["path"] in wanted]
        else:
            reply = {"_id": "0" * 24, "id": repo, "sha": "c" * 40, "private": False, "disabled": False, "gated": False,
                     "downloads": 0, "likes": 0, "tags": [], "siblings": [{"rfilename": p} for p in files]}
        self.answer(json.dumps(reply).encode(), Content_Type="application/json")

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    Hub.repos, Hub.log = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"),
           "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    server.shutdown()
    server.server_close()


def test_hub(gpt2_bpe, tmp_path, hub):
    docs = [d.replace("\ud800", "") for d in some_documents(300)]
    Hub.repos["some/set"] = {"train-00000.parquet": parquet(docs[:200], "TEXT"),
                             "train-00001.parquet": parquet(docs[200:], "TEXT")}
    Hub.repos["some/images"] = {"train-00000.parquet": parquet(docs[:20], "caption")}
    want = expected_shards(gpt2_bpe, docs, 1000, 5000)
    args = ["--dataset", "some/set", "--val_tokens", 1000, "--shard_size", 5000]
    total = sum(np.frombuffer(b[:12], "<i4")[2] for b in want.values())
    for out, more in (("whole", []), ("streamed", ["--max_tokens", total + 1])):
        run_fineweb(*args, *more, "--data_dir", tmp_path / out, env=hub)
        assert shard_bytes(tmp_path / out) == want, out
    for out in ("whole", "streamed"):  # resumed before the third shard
        path = tmp_path / out / "progress.json"
        progress = json.loads(path.read_text())
        for name in list(want)[2:]:
            (tmp_path / out / name).unlink()
        flat = [0] + list(np.cumsum([1 + len(gpt2_bpe.encode_ordinary(d)) if d.strip() else 0 for d in docs]))
        document = int(np.searchsorted(flat, 6000, side="right")) - 1
        place = {"shard": 2, "document": document, "token": int(6000 - flat[document]), "tokens": 6000}
        path.write_text(json.dumps(progress | place | {"finished": False}))
        more = ["--max_tokens", total + 1] if out == "streamed" else []
        run_fineweb(*args, *more, "--data_dir", tmp_path / out, env=hub)
        assert shard_bytes(tmp_path / out) == want, out
    for options, says in ((["--dataset", "some/images"], "no text column among: id, caption"),
                          (["--dataset", "some/set", "--split", "test"], "--split")):
        _, err = run_fineweb(*options, "--data_dir", tmp_path / "bad", env=hub, code=1)
        assert len(err) == 1 and err[0].startswith("fineweb.py: ") and says in err[0], err


def test_pretokenized(tmp_path, hub):
    def shard(n, seed):
        path = tmp_path / "shard"
        fineweb.write_shard(str(path), [50256] + [seed] * (n - 1))
        return path.read_bytes()
    Hub.repos["kjj0/fineweb10B-gpt2"] = there = {
        "README.md": b"x", "fineweb_val_000000.bin": shard(100, 0),
        **{f"fineweb_train_{i:06d}.bin": shard(100, i) for i in (2, 1, 3)}}
    Hub.repos["kjj0/finewebedu10B-gpt2"] = {"finewebedu_val_000000.bin": shard(90, 0),
                                           "finewebedu_train_000001.bin": shard(90, 1)}
    out = tmp_path / "out"
    run_fineweb("--pretokenized", "--max_tokens", 250, "--data_dir", out, env=hub)
    assert list(shard_bytes(out)) == ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"]
    (out / "fineweb_train_000002.bin").write_bytes(b"half")
    Hub.log.clear()
    run_fineweb("--pretokenized", "--data_dir", out, env=hub)
    assert shard_bytes(out) == {k: v for k, v in sorted(there.items()) if k.endswith(".bin")}
    assert sorted(Hub.log) == ["fineweb_train_000002.bin", "fineweb_train_000003.bin"]  # only what was not whole
    run_fineweb("--check", "--data_dir", out)
    run_fineweb("--pretokenized", "--dataset", "kjj0/finewebedu10B-gpt2", "--data_dir", tmp_path / "edu", env=hub)
    assert list(shard_bytes(tmp_path / "edu")) == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    Hub.repos["some/empty"] = {"README.md": b"x"}
    for repo in ("some/empty", "no/such"):
        _, err = run_fineweb("--pretokenized", "--dataset", repo, "--data_dir", tmp_path / "bad", env=hub, code=1)
        assert len(err) == 1 and repo in err[0]
