"""
These tests check on a CPU what NanoTitan claims about its code. One line installs what they need and runs them all:

    pip install -r requirements.txt pytest pytest-xdist transformers rwkv "lm_eval[hf]" matplotlib \
      x-transformers triton && pytest -q -n 2 --dist worksteal

This file checks what all training scripts have in common, and the architectures. test_training.py checks data, runs and
HellaSwag, test_fineweb.py checks fineweb.py, and test_compare.py checks compare.py; conftest.py holds what they share.

    pytest -q test_models.py                               # this file alone
    pytest -q test_models.py -k mistral                    # one architecture
    pytest -q test_models.py -k "notices and deepseek"     # the deliberate mistakes in one architecture
    pytest -q test_models.py -k "every_script or same_names or import"    # what the scripts have in common

The references are ones that we did not write (the models of transformers, and BlinkDL's package rwkv), or plain
restatements in the test itself: masks, loops over tokens and experts, and the papers' equations in float64. Weights are
random everywhere: fresh ones, with their zero biases and unit norms, would hide mistakes. No test of this file needs a
network, and none is skipped.
"""
import ast
import contextlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import fields, replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import common
from conftest import (ARCHS, HF, ROOT, SCRIPTS, bad, byte_tokenizer, checkpoint_of, each_arch,
                      each_in_transformers, each_with_attention, quick, small_config, small_model, source_of,
                      tokens, train, trained_model)


def randn(*shape, seed=0, dtype=torch.float32):
    """Return normal random numbers of the given shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_all_close(ours, theirs, atol, rtol=0.0):
    """Assert that two lists of tensors are equal within a tolerance, pair by pair."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


# ---- what all scripts have in common ---------------------------------------------------------------------------------

LOOP_BEGIN = "# ==== training loop: identical in every train_*.py ===="
LOOP_END = "# ==== end of training loop ===="


def test_the_training_loop_is_the_same_in_every_script():
    loops = set()
    for arch in ARCHS:
        text = source_of(f"train_{arch}.py")
        loop = text[text.index(LOOP_BEGIN):text.index(LOOP_END)]
        loops.add(loop)
        assert "scaler.scale(loss).backward()" in loop
        assert "scaler.step(optimizer)" in loop
    assert len(loops) == 1


# training options that one architecture has in addition, or whose default its paper prescribes
OWN_OPTIONS = {
    "gpt2": ["init_from"],
    "deepseek": ["bias_update_speed", "balance_loss_alpha", "mtp_loss_weight"],
    "hybrid": ["head_lr"],
    "mta": ["batch_size"],
    "rwkv": ["batch_size", "beta2", "chunk_size", "recompute", "head_lr"],
}


def test_the_training_options_are_the_same_in_every_script():
    """They come in the same order with the same defaults, except for OWN_OPTIONS; so do the options of a run, except
    for the log's folder."""
    def defaults(arch, group, without):
        Config = SCRIPTS[arch].Config
        default = {field.name: field.default for field in fields(Config)}
        return [(name, default[name]) for name in Config.option_groups()[group] if name not in without]

    for arch in ARCHS:
        own = OWN_OPTIONS.get(arch, []) + OWN_OPTIONS["gpt2"]  # GPT-2 is the one compared with
        assert defaults(arch, "training", own) == defaults("gpt2", "training", own), arch
        assert defaults(arch, "run", ["log_dir"]) == defaults("gpt2", "run", ["log_dir"]), arch
        assert SCRIPTS[arch].Config().log_dir == f"log/{arch}"
    assert SCRIPTS["rwkv"].Config().beta2 == 0.99
    assert SCRIPTS["rwkv"].Config().batch_size == SCRIPTS["mta"].Config().batch_size == 32


# the options of each model's shape, listed by hand: a checkpoint can only be resumed with the same values
MODEL_OPTIONS = {
    "gpt2": {"n_head"},
    "llama": {"n_head", "n_kv_head", "ffn_dim", "rope_theta", "norm_eps"},
    "mistral": {"n_head", "n_kv_head", "ffn_dim", "rope_theta", "norm_eps", "window"},
    "phi": {"n_head", "n_kv_head", "ffn_dim", "rope_theta", "norm_eps", "partial_rotary_factor"},
    "gemma": {"n_head", "n_kv_head", "head_dim", "ffn_dim", "rope_theta", "rope_theta_local", "norm_eps", "window",
              "window_pattern"},
    "deepseek": {"n_head", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                 "rope_theta", "init_std", "n_dense_layer", "ffn_dim", "moe_ffn_dim", "n_routed_experts",
                 "n_activated_experts", "n_shared_experts", "n_group", "topk_group", "route_scale", "mtp"},
    "mta": {"n_head", "n_kv_head", "ffn_dim", "rope_theta", "norm_eps", "init_std", "kq_period", "query_kernel",
            "key_kernel"},
    "rwkv": {"head_dim", "ffn_dim"},
    "hybrid": {"n_head", "pos", "norm", "mlp", "bias", "n_kv_head", "ffn_dim", "rope_theta", "norm_eps", "qk_norm",
               "window_pattern", "window", "share", "share_order", "rank", "embd_rank", "tie", "zero_init"},
}


@each_arch
def test_options_belong_to_the_model_the_training_or_the_run(arch, monkeypatch, capsys):
    """Each option belongs to exactly one of them, by sets of names, and --help shows it with its group."""
    Config = SCRIPTS[arch].Config
    groups = Config.option_groups()
    shape = {"block_size", "vocab_size", "n_layer", "n_embd"}
    assert set(groups["model"]) == shape | MODEL_OPTIONS[arch]
    assert sorted(sum(groups.values(), [])) == sorted(field.name for field in fields(Config))
    monkeypatch.setattr(sys, "argv", [f"train_{arch}.py", "--help"])
    with pytest.raises(SystemExit):
        common.parse_args(Config, {})
    shown = capsys.readouterr().out
    places = {name: re.search(rf"^  --{name} ", shown, re.M).start() for name in sum(groups.values(), [])}
    for group, following in ("model", "training"), ("training", "run"), ("run", "instead of training"):
        begin = shown.index(f"\n{group}:\n")
        end = shown.index(f"\n{following}:\n")
        assert all(begin < places[name] < end for name in groups[group])


class Difference(NamedTuple):
    """A function, a method ("Class.method") or a class without its methods that is not the same in all scripts."""
    name: str
    groups: str  # scripts whose code is equal stand in one group
    reason: str


ALL_APART = "deepseek | gemma | gpt2 | hybrid | llama | mistral | mta | phi | rwkv"
# hybrid stands alone wherever its options decide
EXCEPTIONS = [
    Difference("Attention.__init__", "deepseek | gemma | hybrid | llama | mistral | mta | phi",
               "latents in DeepSeek, norms in Gemma, windows in Mistral, kernels in MTA, fused matrices in Phi"),
    Difference("Attention.forward", "deepseek | gemma | hybrid | llama | mistral | mta | phi", "as Attention.__init__"),
    Difference("Block.__init__", "deepseek | gemma | gpt2 | hybrid | llama mistral phi | mta | rwkv",
               "experts in DeepSeek, four norms in Gemma, LayerNorm in GPT-2, kernels in some blocks of MTA, time and "
               "channel mix in RWKV"),
    Difference("Block.forward", "deepseek | gemma | gpt2 | hybrid | llama mta phi | mistral | rwkv",
               "as Block.__init__, but for MTA; Mistral hands a mask to its windows"),
    Difference("Config", ALL_APART, "each architecture has options of its shape"),
    Difference("Config.__post_init__", ALL_APART, "each architecture has limits of its shape"),
    Difference("MLP.__init__", "deepseek | gemma llama mistral mta | gpt2 | hybrid | phi",
               "DeepSeek chooses the width, GPT-2 has no gate, Phi has gate and up in one matrix"),
    Difference("MLP.forward", "deepseek llama mistral mta | gemma | gpt2 | hybrid | phi",
               "GELU in Gemma and GPT-2, no gate in GPT-2, one matrix in Phi"),
    Difference("Model.__init__", ALL_APART, "each architecture has its own modules and initialisation"),
    Difference("Model.compile", "deepseek | gemma mistral | gpt2 | hybrid | llama mta phi | rwkv",
               "one more block in DeepSeek, a mask for windows; LayerNorm is a kernel of its own in GPT-2 and RWKV"),
    Difference("Model.configure_optimizers", "deepseek | gemma llama mistral | gpt2 | hybrid | mta | phi | rwkv",
               "experts in DeepSeek, fused matrices in GPT-2 and Phi, kernels in MTA, more groups in RWKV"),
    Difference("Model.flops_per_token", "deepseek | gemma | gpt2 | hybrid | llama phi | mistral | mta | rwkv",
               "idle experts, windows, learned positions, kernels and RWKV's state are counted differently"),
    Difference("Model.forward", "deepseek | gemma gpt2 hybrid llama mistral mta phi | rwkv",
               "extra losses in DeepSeek, L2Wrap in RWKV"),
    Difference("Model.hidden", "deepseek | gemma | gpt2 | hybrid | llama mta phi | mistral | rwkv",
               "each hands its blocks something else: rope, masks, positions, a state"),
    Difference("Model.loss", "deepseek gemma gpt2 hybrid llama mistral mta phi | rwkv", "L2Wrap in RWKV"),
    Difference("Model.num_params", "deepseek | gemma llama mistral mta phi | gpt2 | hybrid | rwkv",
               "idle experts in DeepSeek, positions in GPT-2, an untied head in RWKV"),
    Difference("RMSNorm.__init__", "deepseek | gemma | llama mistral mta phi",
               "a default of eps in DeepSeek; the weight starts at 0 in Gemma"),
    Difference("RMSNorm.forward", "deepseek llama mistral mta phi | gemma", "Gemma multiplies by 1 + w"),
    Difference("main", "deepseek gemma hybrid llama mistral mta phi rwkv | gpt2",
               "--init_from sets GPT-2's shape in a line before the loop"),
    Difference("rotate", "deepseek | gemma hybrid llama mistral mta | phi",
               "DeepSeek turns pairs of neighbours, Phi a part of the head"),
    Difference("to_hf", ALL_APART, "each has its own class in transformers, RWKV its own format of checkpoints"),
]


def definitions(text):
    """Yield (name, code) of the functions, methods and classes of a script, without docstrings and comments.

    A class counts without its methods: its bases, decorators and fields."""
    def code(node):
        return ast.dump(node)

    module = ast.parse(text)
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, code(node)
        elif isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            for method in methods:
                yield f"{node.name}.{method.name}", code(method)
            node.body = [child for child in node.body if child not in methods]
            yield node.name, code(node)


def test_same_names_are_the_same_code():
    """What has the same name in several scripts has the same code, except for EXCEPTIONS, of which each is needed."""
    scripts_by_code = {}  # name -> code -> scripts
    for arch in ARCHS:
        for name, code in definitions(source_of(f"train_{arch}.py")):
            scripts_by_code.setdefault(name, {}).setdefault(code, []).append(arch)
    different = {}
    for name, scripts in scripts_by_code.items():
        if len(scripts) > 1:
            different[name] = " | ".join(sorted(" ".join(group) for group in scripts.values()))
    expected = {exception.name: exception.groups for exception in EXCEPTIONS}
    for name in sorted(different.keys() | expected.keys()):
        found = different.get(name, "equal")
        listed = expected.get(name, "equal")
        assert found == listed, f"{name}: the scripts' code is {found}, in EXCEPTIONS it is {listed}"


@each_arch
def test_importing_a_script_starts_nothing(arch):
    code = (f"import sys, train_{arch}; "
            "assert not [m for m in sys.modules if m.startswith(('transformers', 'datasets'))]")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# module: which of ours it may import; no module comes before those that it imports
IMPORTS = {
    "fineweb": set(),
    "common": {"fineweb"},
    "run": {"common", "fineweb"},
    "hellaswag": {"common", "fineweb", "run"},
    "compare": {"common", "fineweb", "hellaswag"},
    "muon": set(),
    **{f"train_{arch}": {"common", "fineweb", "hellaswag", "muon", "run"} for arch in ARCHS},
}


def test_the_imports_point_one_way():
    for place, (name, allowed) in enumerate(IMPORTS.items()):
        imported = set(re.findall(r"^\s*(?:import|from) (\w+)", source_of(f"{name}.py"), re.M))
        assert imported & IMPORTS.keys() <= allowed, name
        assert allowed <= set(list(IMPORTS)[:place]), name


def test_files_are_short_and_narrow():
    """The files that every script uses fit into one reading, and all lines into a window."""
    for path in sorted(os.listdir(ROOT)):
        if path.endswith(".py"):
            lines = source_of(path).splitlines()
            limit = 120 if path.startswith(("test_", "conftest")) else 100
            assert max(map(len, lines)) <= limit, path
            assert len(lines) <= {"common.py": 500, "run.py": 600, "muon.py": 130}.get(path, len(lines)), path


def test_shared_files_know_no_architecture():
    """common.py and run.py hold no module and name no architecture."""
    for name in "common.py", "run.py":
        text = source_of(name)
        assert "nn.Module" not in text
        assert not re.search("|".join(set(ARCHS) - {"gpt2"}), text, re.I), name


# ---- parameters and FLOPs --------------------------------------------------------------------------------------------

# Counted by instantiating the reference implementation at this shape.
PARAMS = {
    "gpt2": 124_475_904,
    "llama": 123_587_328,
    "mistral": 123_587_328,
    "phi": 123_587_328,
    "gemma": 123_607_296,
    "deepseek": 122_999_040,
    "mta": 123_597_084,
    "rwkv": 122_606_080,
    "hybrid": 123_587_328,
}


def transformer_flops(n, seen):
    """Return 6 N + 12 d S: d = 768 is the width of all heads, S the positions that each layer sees, summed."""
    return 6 * n + 12 * 768 * seen


EXPERT = 3 * 768 * 256  # parameters
# DeepSeek: a token uses 2 of 8 experts in 11 layers, and in the block for multi-token prediction; the head comes twice.
DEEPSEEK_USED = PARAMS["deepseek"] - 11 * 6 * EXPERT + (8_212_864 - 6 * EXPERT) + 50304 * 768
FLOPS = {
    "gpt2": transformer_flops(PARAMS["gpt2"] - 1024 * 768, 12 * 1024),  # without the positions
    "llama": transformer_flops(PARAMS["llama"], 12 * 1024),
    "mistral": transformer_flops(PARAMS["mistral"], 12 * 256),
    "phi": transformer_flops(PARAMS["phi"], 12 * 1024),
    "hybrid": transformer_flops(PARAMS["hybrid"], 12 * 1024),
    "gemma": transformer_flops(PARAMS["gemma"], 10 * 256 + 2 * 1024),
    "deepseek": transformer_flops(DEEPSEEK_USED, 13 * 1024),
    # each weight of a kernel or mixing matrix meets every score
    "mta": transformer_flops(PARAMS["mta"], 12 * 1024) + 6 * 1024 * (12 * 2 * 12 * 12 + 3 * 2 * 12 * 6 * 11),
    # without the embedding, but with the head; the steps of the state
    "rwkv": 6 * (PARAMS["rwkv"] - 50304 * 640) + 27 * 11 * 640 * 64,
}


def meta_model(arch, options, monkeypatch):
    """Return the model that a command line asks for, without its memory."""
    monkeypatch.setattr(sys, "argv", [f"train_{arch}.py", *options])
    script = SCRIPTS[arch]
    cfg, _ = common.parse_args(script.Config, script.TINY)
    with torch.device("meta"):
        return script.Model(cfg)


@each_arch
def test_parameters_and_flops(arch, monkeypatch):
    model = meta_model(arch, [], monkeypatch)
    params = model.num_params()
    numel = sum(p.numel() for p in set(model.parameters()))
    assert params["total"] == PARAMS[arch] == numel - params.get("mtp", 0)
    assert params["total"] <= 124.6e6
    assert model.flops_per_token() == FLOPS[arch]
    # the embedding, GPT-2's positions, and RWKV's head
    embedding = sum(p.numel() for name, p in model.named_parameters() if len(p) == 50304 or "wpe" in name)
    assert params["non_embedding"] == params["total"] - embedding
    row = re.search(rf"^\| `train_{arch}.py` \|.*", source_of("README.md"), re.M)[0]
    assert f"| {PARAMS[arch]:,} | {FLOPS[arch] / 1e6:.0f} M |" in row


def test_published_small_shapes(monkeypatch):
    """The README has a table of command lines and counts; the counts here are those of shared plans and papers."""
    pattern = r"^\|.*\| `python train_(\w+).py (--.*?)` \| ([\d,]+) \|"
    rows = re.findall(pattern, source_of("README.md"), re.M)
    counts = [int(count.replace(",", "")) for _, _, count in rows]
    assert counts == [
        121_205_248, 124_558_272, 124_475_904, 123_689_472, 123_682_560, 123_587_328, 204_765_184, 202_668_032,
        202_658_816, 203_318_272, 35_763_840, 31_740_416, 33_460_992, 4_895_424, 2_682_816,
        866_240]
    for (arch, options, _), count in zip(rows, counts):
        assert meta_model(arch, options.split(), monkeypatch).num_params()["total"] == count


# ---- parity with the reference implementations -----------------------------------------------------------------------

@each_in_transformers
def test_logits_and_gradients_equal_transformers(arch):
    model = small_model(arch)
    to_hf = SCRIPTS[arch].to_hf
    hf = to_hf(model).eval()
    assert type(hf).__name__ == HF[arch]
    idx = tokens(2, 64)
    logits, _ = model(idx)
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, hf(idx).logits, atol=1e-4, rtol=0)
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    reference = hf(idx, labels=idx).loss
    reference.backward()
    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=0)
    # Gradients take the place of the weights, so that to_hf gives them transformers' names and shapes.
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:  # multi-token prediction takes part in training alone
                p.copy_(p.grad)
    for (name, ours), theirs in zip(to_hf(model).named_parameters(), hf.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, atol=1e-5, rtol=1e-3, msg=lambda m: f"gradient of {name}: {m}")


def pip_rwkv(model, idx):
    """Return the logits of BlinkDL's own package, from an official checkpoint. It takes one sequence at a time."""
    os.environ.update(RWKV_V7_ON="1", RWKV_CUDA_ON="0", RWKV_JIT_ON="0")
    from rwkv.model import RWKV
    torch.save(SCRIPTS["rwkv"].to_hf(model), "official.pth")
    with contextlib.redirect_stdout(None):
        runner = RWKV(model="official", strategy="cpu fp32")
    rows = []
    for row in idx:
        logits, _ = runner.forward(row.tolist(), None, full_output=True)
        rows.append(logits)
    return torch.stack(rows)


# ---- deliberate mistakes ---------------------------------------------------------------------------------------------
#
# A change is a function of (model, script, patch) that returns the model with the mistake. `patch` is pytest's
# monkeypatch, which takes back at the end of the test what a change does to the script.

def option(**values):
    """Make a change that gives options other values while the weights stay."""
    def change(model, script, patch):
        wrong = script.Model(replace(model.cfg, **values)).eval()
        wrong.load_state_dict(model.state_dict())
        return wrong
    return change


def edit(where, old, new):
    """Make a change that replaces a piece of text in the method `where`, "Class.method", of the script."""
    def change(model, script, patch):
        owner, name = where.split(".")
        owner = getattr(script, owner)
        text = textwrap.dedent(inspect.getsource(getattr(owner, name)))
        assert text.count(old) == 1
        namespace = {}
        exec(text.replace(old, new), vars(script), namespace)
        patch.setattr(owner, name, namespace[name])
        return model
    return change


def replace_method(where, wrong):
    """Make a change that puts another function in place of the method `where`, "Class.method", of the script."""
    def change(model, script, patch):
        owner, name = where.split(".")
        patch.setattr(getattr(script, owner), name, wrong)
        return model
    return change


def replace_function(name, wrong):
    """Make a change that puts another function in place of a function of the script."""
    def change(model, script, patch):
        patch.setattr(script, name, wrong)
        return model
    return change


class Functional:
    """torch.nn.functional with one function replaced."""

    def __init__(self, name, wrong):
        setattr(self, name, wrong)

    def __getattr__(self, name):
        return getattr(F, name)


def replace_functional(name, wrong):
    """Make a change that puts another function in place of one of torch.nn.functional, as the script sees it."""
    return replace_function("F", Functional(name, wrong))


def attend_with(**wrong):
    """Make a change that gives scaled_dot_product_attention other arguments."""
    def attend(q, k, v, **arguments):
        return F.scaled_dot_product_attention(q, k, v, **{**arguments, **wrong})
    return replace_functional("scaled_dot_product_attention", attend)


def roll(name, rows, dim=0):
    """Make a change that moves the rows of the parameters whose name ends like this."""
    def change(model, script, patch):
        for parameter, p in model.named_parameters():
            if parameter.endswith(name):
                p.data.copy_(p.data.roll(rows, dim))
        return model
    return change


def set_eps(norm, eps):
    """Make a change that gives all norms of a class another epsilon."""
    def change(model, script, patch):
        for module in model.modules():
            if type(module).__name__ == norm:
                module.eps = eps
        return model
    return change


def remove(*names):
    """Make a change that replaces the modules whose names end like this by the identity."""
    def change(model, script, patch):
        for name, _ in list(model.named_modules()):
            if name.endswith(names):
                model.set_submodule(name, torch.nn.Identity())
        return model
    return change


def exact_gelu(x, approximate="none"):
    """Compute GELU without its approximation by tanh."""
    return F.gelu(x)


def silu_for_gelu(x, approximate):
    """Compute SiLU where GELU is asked for."""
    return F.silu(x)


def tiled_heads(q, k, v, **arguments):
    """Give key-value heads to query heads in turn instead of in groups."""
    times = q.size(1) // k.size(1)
    k = k.repeat(1, times, 1, 1)
    v = v.repeat(1, times, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, **{**arguments, "enable_gqa": False})


def interleaved(x, rope):
    """Rotate pairs of neighbours."""
    cos, sin = rope[:, :, None]
    a = x[..., ::2]
    b = x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def half_split(x, rope):
    """Rotate pairs of one value of the first half and one of the second."""
    cos, sin = rope[:, :, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rotate_values(model, script, patch):
    """Rotate the values, too."""
    def attend(q, k, v, **arguments):
        v = script.rotate(v.transpose(1, 2), model.rope).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, **arguments)
    return replace_functional("scaled_dot_product_attention", attend)(model, script, patch)


def plain_norm(self, x):
    """Multiply by w instead of Gemma's 1 + w."""
    return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def norms_behind(self, x, *args):
    """Normalise behind attention and MLP instead of in front of them."""
    x = self.input_layernorm(x + self.self_attn(x, *args))
    return self.post_attention_layernorm(x + self.mlp(x))


def norms_swapped(self, x, *args):
    """Swap Gemma's norm in front of attention or MLP with the one behind it."""
    x = x + self.input_layernorm(self.self_attn(self.post_attention_layernorm(x), *args))
    return x + self.pre_feedforward_layernorm(self.mlp(self.post_feedforward_layernorm(x)))


def rotate_before_the_norm(model, script, patch):
    """Rotate first and normalise then, with the weight of the first layer's q_norm."""
    rotate = script.rotate
    norm = model.model.layers[0].self_attn.q_norm

    def rotate_and_norm(x, rope):
        return norm(rotate(x, rope))
    patch.setattr(script, "rotate", rotate_and_norm)
    for block in model.model.layers:
        block.self_attn.q_norm = torch.nn.Identity()
    return model


def shift_back(x, last):
    """Return each token's successor instead of its predecessor."""
    return x.roll(-1, 1)


def read_before_writing(r, log_w, k, v, a, b, state, chunk):
    """Read RWKV's state before the token's own key and value are written."""
    y = []
    for t in range(r.size(2)):
        y.append((state @ r[:, :, t, :, None]).squeeze(-1))
        token = (x[:, :, t] for x in (r, log_w, k, v, a, b))
        _, state = SCRIPTS["rwkv"].wkv_step(*token, state)
    return torch.stack(y, 2), state


def small_queries(model):
    """Make queries small: Gemma's scaled embedding hides the epsilon of the norms; queries near zero do not."""
    for block in model.model.layers:
        block.self_attn.q_proj.weight.data.mul_(0.01)


class Mistake(NamedTuple):
    """A mistake to make in our model, which the comparison with the reference must notice."""
    name: str
    archs: str  # where it is made
    change: Callable  # (model, script, patch) -> the model with the mistake
    prepare: Callable | None = None  # a function of the model, called before the reference is made from it


MISTAKES = [
    # activations
    Mistake("exact GELU", "gpt2 gemma", replace_functional("gelu", exact_gelu)),
    Mistake("GELU for SiLU", "llama mistral phi deepseek", replace_functional("silu", exact_gelu)),
    Mistake("SiLU for GELU", "gemma", replace_functional("gelu", silu_for_gelu)),

    # attention
    Mistake("no mask", "gpt2 llama phi gemma deepseek", attend_with(is_causal=False)),
    Mistake("query scale", "gpt2 llama mistral phi gemma", attend_with(scale=0.2)),
    Mistake("query scale without rope", "deepseek", attend_with(scale=0.25)),

    # norms' epsilon
    Mistake("LayerNorm's eps", "gpt2", set_eps("LayerNorm", 1e-3)),
    Mistake("eps", "llama mistral phi", option(norm_eps=1e-6)),
    Mistake("eps of LLaMA", "gemma", option(norm_eps=1e-5), prepare=small_queries),
    Mistake("larger eps", "deepseek", set_eps("RMSNorm", 1e-4)),

    # the order of the weights in a matrix
    Mistake("order of q, k, v", "gpt2", roll("c_attn.weight", 64)),
    Mistake("order of q, k, v in one matrix", "phi", roll("qkv_proj.weight", 32)),
    Mistake("order of gate and up", "phi", roll("gate_up_proj.weight", 160)),

    # positions
    Mistake("positions by one", "gpt2", roll("wpe.weight", 1)),
    Mistake("theta", "llama", option(rope_theta=10000.0)),
    Mistake("theta of LLaMA", "mistral phi deepseek", option(rope_theta=500000.0)),
    Mistake("local theta", "gemma", option(rope_theta_local=1000000.0)),
    Mistake("global theta", "gemma", option(rope_theta=10000.0)),
    Mistake("all of the head rotated", "phi", option(partial_rotary_factor=1.0)),
    Mistake("interleaved pairs", "llama mistral gemma", replace_function("rotate", interleaved)),
    Mistake("values rotated", "llama phi", rotate_values),

    # heads and windows
    Mistake("k/v heads in turn", "llama mistral phi gemma",
            replace_functional("scaled_dot_product_attention", tiled_heads)),
    Mistake("window + 1", "mistral gemma", option(window=17)),
    Mistake("window - 1", "mistral gemma", option(window=15)),
    Mistake("no window", "mistral gemma", option(window=64)),
    Mistake("first layer global", "gemma", option(window_pattern=1)),
    Mistake("all layers local", "gemma", option(window_pattern=3)),

    # the place of the norms
    Mistake("w instead of 1 + w", "gemma", replace_method("RMSNorm.forward", plain_norm)),
    Mistake("norms behind instead of in front", "llama mistral phi", replace_method("Block.forward", norms_behind)),
    Mistake("norms in front and behind swapped", "gemma", replace_method("Block.forward", norms_swapped)),
    Mistake("no norm of queries and keys", "gemma", remove("q_norm", "k_norm")),
    Mistake("norm of queries behind the rotation", "gemma", rotate_before_the_norm),

    # DeepSeek's attention
    Mistake("half-split rotation", "deepseek", replace_function("rotate", half_split)),
    Mistake("rope in front of nope", "deepseek", edit(
        "Attention.forward",
        "q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], dim=-1)",
        "q_rope, q_nope = q.split([self.rope_dim, self.nope_dim], dim=-1)")),
    Mistake("shared key not rotated", "deepseek", edit(
        "Attention.forward",
        "rotate(k_rope[:, :, None], rope)",
        "k_rope[:, :, None]")),
    Mistake("query latent not normalised", "deepseek", edit(
        "Attention.forward",
        "self.q_a_layernorm(self.q_a_proj(x))",
        "self.q_a_proj(x)")),
    Mistake("key-value latent not normalised", "deepseek", edit(
        "Attention.forward",
        "self.kv_a_layernorm(latent)",
        "latent")),

    # DeepSeek's experts
    Mistake("order of gate and up in the experts", "deepseek", roll("experts.gate_up_proj", 48, dim=1)),
    Mistake("softmax for sigmoid", "deepseek", edit("Gate.forward", ".sigmoid()", ".softmax(-1)")),
    Mistake("bias in the weights", "deepseek", edit(
        "Gate.forward",
        "weight = score.gather",
        "weight = (score + self.e_score_correction_bias).gather")),
    Mistake("no bias", "deepseek", edit("Gate.forward", "(score + self.e_score_correction_bias)", "score")),
    Mistake("no groups", "deepseek", option(topk_group=4)),
    Mistake("one group", "deepseek", option(topk_group=1)),
    Mistake("not scaled", "deepseek", option(route_scale=1.0)),
    Mistake("groups by their best", "deepseek", edit("Gate.forward", "topk(choice, 2)", "topk(choice, 1)")),
    Mistake("groups without the bias", "deepseek", edit(
        "Gate.forward",
        "topk(choice, 2)",
        "topk(score.unflatten(-1, (cfg.n_group, -1)), 2)")),
    Mistake("weights not normalised", "deepseek", edit(
        "Gate.forward",
        " / (weight.sum(-1, keepdim=True) + 1e-20)",
        "")),
    Mistake("no shared expert", "deepseek", edit("MoE.forward", " + self.shared_experts(x)", "")),
    Mistake("scaled shared expert", "deepseek", edit("MoE.forward", "+ self", "+ 1.41 * self")),

    # RWKV
    Mistake("no ln0", "rwkv", remove("blocks.0.ln0")),
    Mistake("shift into the future", "rwkv", replace_function("shift", shift_back)),
    Mistake("GroupNorm's eps", "rwkv", set_eps("GroupNorm", 1e-5)),
    Mistake("eps of the norms", "rwkv", set_eps("LayerNorm", 1e-3)),
    Mistake("decay without exp(-0.5)", "rwkv", edit("TimeMix.forward", "-math.exp(-0.5) *", "-")),
    Mistake("gate without sigmoid", "rwkv", edit(
        "TimeMix.forward",
        "torch.sigmoid(xg @ self.g1)",
        "(xg @ self.g1)")),
    Mistake("no value residual", "rwkv", edit("TimeMix.forward", "v = v + (v_first - v) *", "v = v + 0 *")),
    Mistake("values of the layer before", "rwkv", edit(
        "TimeMix.forward",
        "v = v + (v_first - v) *",
        "v = v_first = v + (v_first - v) *")),
    Mistake("keys changed before their norm", "rwkv", edit(
        "TimeMix.forward",
        "F.normalize(heads(k * self.k_k)",
        "F.normalize(heads(k * (1 + (rate - 1) * self.k_a) * self.k_k)")),
    Mistake("keys not normalised", "rwkv", edit(
        "TimeMix.forward",
        "F.normalize(heads(k * self.k_k), dim=-1)",
        "heads(k * self.k_k)")),
    Mistake("bonus of the unchanged key", "rwkv", edit(
        "TimeMix.forward",
        "r * k * self",
        "r * heads(self.key(xk)) * self")),
    Mistake("bonus in front of the norm", "rwkv", edit(
        "TimeMix.forward",
        "self.ln_x(y.reshape",
        "self.ln_x((y + (r * k * self.r_k).sum(-1, keepdim=True) * v_heads).reshape")),
    Mistake("state read before it is written", "rwkv", replace_function("wkv", read_before_writing)),
    Mistake("relu not squared", "rwkv", edit("ChannelMix.forward", "k * k", "k")),
    Mistake("no rate", "rwkv", edit(
        "TimeMix.forward",
        "removal_key * heads(rate)",
        "removal_key")),
    Mistake("mixes of decay and rate swapped", "rwkv", edit(
        "TimeMix.forward",
        "self.x_r, self.x_w, self.x_k, self.x_v, self.x_a",
        "self.x_r, self.x_a, self.x_k, self.x_v, self.x_w")),

    # the embedding
    Mistake("embedding not scaled", "gemma", edit("Model.hidden", " * math.sqrt(self.cfg.n_embd)", "")),
]


@pytest.mark.parametrize("mistake, arch", [
    pytest.param(mistake, arch, id=f"{mistake.name}-{arch}")
    for mistake in MISTAKES for arch in mistake.archs.split()])
def test_parity_notices(mistake, arch, monkeypatch):
    """These negative controls show what the tolerance of 1e-4 is worth: each ingredient made wrong moves the logits by
    more than three times that."""
    n_layer = 3 if arch == "rwkv" else 2
    script = SCRIPTS[arch]
    model = small_model(arch, n_layer=n_layer)
    idx = tokens(2, 64)
    if mistake.prepare:
        mistake.prepare(model)
    reference = pip_rwkv(model, idx) if arch == "rwkv" else script.to_hf(model).eval()(idx).logits
    logits, _ = model(idx)
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=0)
    wrong, _ = mistake.change(model, script, monkeypatch)(idx)
    assert not (wrong - reference).abs().max() <= 3e-4  # nan is noticed, too


# ---- windows ---------------------------------------------------------------------------------------------------------

WINDOWED = {"mistral": dict(), "gemma": dict(window_pattern=100)}  # with these options every layer has a window


@each_arch
@pytest.mark.parametrize("n_layer", [1, 2, 3])
def test_attention_reaches_what_it_says(arch, n_layer):
    """A changed token changes nothing in the past, everything within reach, and nothing beyond the reach of the stacked
    windows."""
    model = small_model(arch, n_layer=n_layer, n_dense_layer=0, **WINDOWED.get(arch, {}))
    idx = tokens(1, 64)
    reach = n_layer * 15 if arch in WINDOWED else 63
    # An expert's product is rounded by how many tokens chose it, a chunk by the decay up to its middle.
    same = 1e-5 if arch in ("deepseek", "rwkv") else 0
    logits, _ = model(idx)
    for position in 0, 1, 14, 15, 16, 31, 62, 63:
        changed = idx.clone()
        changed[0, position] = (changed[0, position] + 1) % 512
        changed_logits, _ = model(changed)
        moved = (changed_logits - logits).squeeze(0).abs().amax(-1)
        end = position + reach + 1
        assert (moved[:position] <= same).all(), position
        assert (moved[position:end] > same).all(), position
        assert (moved[end:] == 0).all(), position
    for T in 1, 15, 16, 17, 37:
        shorter, _ = model(idx[:, :T])
        torch.testing.assert_close(shorter, logits[:, :T], atol=1e-5, rtol=0)


def test_gemma_has_a_global_layer_after_five_local_ones():
    idx, changed = tokens(2, 1, 128)
    for n_layer, layers in (5, "LLLLL"), (6, "LLLLLG"), (12, "LLLLLGLLLLLG"):
        model = small_model("gemma", n_layer=n_layer, n_embd=32, block_size=128, window_pattern=6)
        assert "".join("L" if block.local else "G" for block in model.model.layers) == layers
        changed[0, 1:] = idx[0, 1:]  # the first token alone is another one
        logits, _ = model(idx)
        changed_logits, _ = model(changed)
        moved = (logits - changed_logits).squeeze(0).abs().amax(-1)
        beyond = moved[76:]  # five windows of 16 reach 75 positions further
        assert (beyond > 0).all() if "G" in layers else (beyond == 0).all()


@pytest.mark.parametrize("arch", WINDOWED)
@pytest.mark.parametrize("T, window", [(64, 16), (61, 16), (16, 16), (17, 16), (5, 1), (7, 3), (10, 100)])
def test_windows_equal_the_masked_form(arch, T, window):
    """Forward and backward equal attention with a (T, T) mask; so does the form for CUDA, which a CPU has without
    gradients."""
    script = SCRIPTS[arch]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 16, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    i = torch.arange(T)
    mask = (i <= i[:, None]) & (i > i[:, None] - window)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    y = script.sliding_window_attention(q, k, v, window)
    torch.testing.assert_close(y, expected, atol=2e-6, rtol=0)
    ours = torch.autograd.grad(y.square().sum(), (q, k, v))
    theirs = torch.autograd.grad(expected.square().sum(), (q, k, v))
    assert_all_close(ours, theirs, atol=2e-5)
    block_mask = script.window_block_mask(T, window, "cpu")
    flex = script.sliding_window_attention(q.detach(), k.detach(), v.detach(), window, block_mask)
    torch.testing.assert_close(flex, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("arch", WINDOWED)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_compiled_window_is_the_same(arch, autocast, monkeypatch):
    """What compile() sets up on CUDA gives one graph and the same loss and gradients, and other lengths still work.

    PyTorch refuses gradients of flex_attention on a CPU because it has no kernel; its definition in plain operators,
    used here, has them."""
    script = SCRIPTS[arch]
    idx = tokens(2, 256)
    model = small_model(arch, block_size=256)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, loss = model(idx, idx)
        return loss, torch.autograd.grad(loss, model.parameters())

    expected_loss, expected_gradients = step()
    flex = script.flex_attention
    used = []

    def counted(*args, **options):
        used.append(1)
        return flex(*args, **options)

    monkeypatch.setattr(sys.modules["torch.nn.attention.flex_attention"], "_validate_device", lambda *args: None)
    monkeypatch.setattr(script, "flex_attention", counted)
    model.block_mask = script.window_block_mask(256, 16, "cpu")
    assert model.block_mask.sparsity() > 0  # one of the blocks of 128 x 128 is skipped
    model(idx[:, :255])
    assert not used
    model.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    loss, gradients = step()
    assert used
    tolerance = 0.06 if autocast else 1e-5  # bf16 keeps 8 bits, and Gemma normalises often
    torch.testing.assert_close(loss, expected_loss, atol=0.1 * tolerance, rtol=0)
    for ours, theirs in zip(gradients, expected_gradients):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


# ---- DeepSeek's experts and multi-token prediction -------------------------------------------------------------------

def reference_moe(moe, x):
    """Compute equations 12 to 16 token by token, expert by expert, in float64: (y, chosen experts of each token)."""
    cfg = moe.gate.cfg
    group_size = cfg.n_routed_experts // cfg.n_group
    w = moe.gate.weight.double()
    bias = moe.gate.e_score_correction_bias.double()
    gate_up = moe.experts.gate_up_proj.double()
    down = moe.experts.down_proj.double()
    shared = [getattr(moe.shared_experts, f"{name}_proj").weight.double() for name in ("gate", "up", "down")]

    def mlp(x, gate, up, down):
        return down @ (F.silu(gate @ x) * (up @ x))

    def choose(score):
        choice = (score + bias).tolist()

        def best_two(group):
            members = choice[group * group_size:(group + 1) * group_size]
            return sum(sorted(members)[-2:])

        groups = sorted(range(cfg.n_group), key=best_two, reverse=True)[:cfg.topk_group]
        among = [e for e in range(cfg.n_routed_experts) if e // group_size in groups]
        return sorted(among, key=lambda e: -choice[e])[:cfg.n_activated_experts]

    y = []
    chosen = []
    for token in x.flatten(0, 1).double():
        score = 1 / (1 + torch.exp(-(w @ token)))
        best = choose(score)
        total = sum(score[e] for e in best)
        result = mlp(token, *shared)
        for e in best:
            gate, up = gate_up[e].chunk(2)
            result = result + cfg.route_scale * score[e] / total * mlp(token, gate, up, down[e])
        y.append(result)
        chosen.append(best)
    return torch.stack(y).view(x.shape), chosen


ROUTES = {
    "any": dict(),
    "8 experts, 2 chosen": dict(n_routed_experts=8, n_activated_experts=2),
    "one group": dict(n_group=1, topk_group=1),
    "all chosen": dict(n_routed_experts=4, n_activated_experts=4, n_group=1, topk_group=1),
    "one expert takes all": dict(n_activated_experts=1),
    "some take none": dict(),
    "one token": dict(),
}
FAVOURED = {"one expert takes all": 1, "some take none": 8}  # the first experts, whose biases make tokens choose them


@pytest.mark.parametrize("route", ROUTES)
def test_experts_equal_a_loop_over_tokens(route):
    """Equal are the values, the choice, and the gradients of the input, of the router and of every expert, used or
    not."""
    moe = small_model("deepseek", **ROUTES[route]).model.layers[1].mlp.train()
    shape = (1, 1, 64) if route == "one token" else (2, 33, 64)
    x = randn(*shape, seed=1).requires_grad_()
    moe.gate.e_score_correction_bias[:FAVOURED.get(route, 0)] += 100
    y, _ = moe(x)
    expected, chosen = reference_moe(moe, x)
    counts = torch.tensor(chosen).flatten().bincount(minlength=moe.gate.cfg.n_routed_experts)
    assert (moe.gate.load == counts).all()
    if route in FAVOURED:
        assert (counts == 0).sum() >= 8
    torch.testing.assert_close(y, expected.float(), atol=2e-6, rtol=1e-5)
    inputs = [x, *moe.parameters()]
    gy = randn(*y.shape, seed=2)
    ours = torch.autograd.grad(y, inputs, gy)
    theirs = torch.autograd.grad(expected, inputs, gy.double())
    assert_all_close(ours, theirs, atol=1e-5, rtol=1e-4)
    expert, weight, _ = moe.gate(x)
    flat = x.flatten(0, 1), expert.flatten(0, 1), weight.flatten(0, 1)
    torch.testing.assert_close(moe.experts.compute_all_experts(*flat), moe.experts(*flat), atol=2e-6, rtol=1e-5)


def test_multi_token_prediction_equals_transformers(monkeypatch):
    from transformers.modeling_layers import MtpModel
    script = SCRIPTS["deepseek"]
    model = small_model("deepseek")
    idx = tokens(2, 64)
    reference = MtpModel(script.to_hf(model), 1).eval()
    weights = {}
    for name, p in model.state_dict().items():
        if name.startswith("mtp."):
            weights[f"layers.0.{name.removeprefix('mtp.')}"] = p
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) == {"embed_tokens.weight", "shared_head.weight"}  # the model's own
    hidden = model.hidden(idx)[:, :-1]
    positions = torch.arange(1, 64).expand(2, -1)
    expected = reference.forward_layer(0, hidden, positions, None, input_ids=idx[:, 1:])

    def ours():
        ahead, _ = model.mtp(hidden, model.embed(idx[:, 1:]), model.rope[:, :63])
        return ahead

    torch.testing.assert_close(ours(), expected, atol=1e-4, rtol=0)
    swap = edit(
        "MTP.forward",
        "[self.enorm(embedding), self.hnorm(hidden)]",
        "[self.hnorm(hidden), self.enorm(embedding)]")
    swap(model, script, monkeypatch)
    assert (ours() - expected).abs().max() > 0.1


def reference_balance_loss(score):
    """Restate equations 17 to 20 for one sequence, with 16 experts of which 4 are chosen, without its weight alpha."""
    frequency = torch.zeros(16)
    for token in score:
        frequency[token.topk(4).indices] += 16 / (4 * len(score))
    probability = (score / score.sum(-1, keepdim=True)).mean(0)
    return (frequency * probability).sum()


def test_the_loss_in_training_is_logged_without_its_companions():
    """The value is the next token's loss; the gradient is that of all three losses, their weights as scheduled, each
    restated here."""
    alpha = 0.3
    model = small_model("deepseek", max_steps=148, balance_loss_alpha=alpha)
    idx = tokens(3, 64)
    x = idx[:, :-1]
    y = idx[:, 1:]
    _, value = model(x, y)
    assert not any(module.load.any() for module in model.modules() if hasattr(module, "load"))  # eval counts nothing
    model.train()
    gates = [model.model.layers[1].mlp.gate, model.mtp.mtp_block.mlp.gate]
    inputs = []
    handles = [gate.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for gate in gates]

    def expected_loss(mtp_weight):
        balance = 0
        for gate, z in zip(gates, inputs):
            scores = torch.sigmoid(z @ gate.weight.T)
            balance += alpha * sum(reference_balance_loss(score) for score in scores) / 3  # the mean of 3 sequences
        hidden = model.hidden(x)
        ahead, _ = model.mtp(hidden[:, :-1], model.embed(x[:, 1:]), model.rope[:, :62])
        next_token = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), y.flatten())
        after_next = F.cross_entropy(model.lm_head(ahead).flatten(0, 1), idx[:, 2:].flatten())
        return next_token + balance + mtp_weight * after_next

    for updates, mtp_weight in (0, 0.3), (99, 0.3), (100, 0.1), (148, 0.1):
        model.updates.fill_(updates)
        inputs.clear()
        _, loss = model(x, y)
        assert loss == value
        expected = expected_loss(mtp_weight)
        ours = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
        theirs = torch.autograd.grad(expected, model.parameters(), retain_graph=True)
        assert_all_close(ours, theirs, atol=1e-6, rtol=1e-4)
    for handle in handles:
        handle.remove()
    _, loss = small_model("deepseek", mtp=False).train()(x, y)
    loss.backward()


def test_the_bias_follows_the_load():
    """By hand: gamma x sign(mean - load) after each update, the load counted over all micro-steps; 0 at the end of the
    schedule."""
    script = SCRIPTS["deepseek"]
    cfg = small_config("deepseek", n_routed_experts=4, n_activated_experts=1, n_group=1, topk_group=1, max_steps=148)
    model = script.Model(cfg)
    optimizer = model.configure_optimizers(cfg, "cpu")
    gate = model.model.layers[1].mlp.gate
    ahead = model.mtp.mtp_block.mlp.gate
    cases = [  # updates made, load of the four experts, their change in gammas, maxvio
        (0, [5, 1, 2, 0], [-1, 1, 0, 1], 1.5),
        (142, [1, 1, 1, 5], [1, 1, 1, -1], 1.5),
        (143, [0, 8, 0, 0], [0, 0, 0, 0], 3),
    ]
    for updates, load, change, maxvio in cases:
        gate.e_score_correction_bias.zero_()
        gate.load += torch.tensor(load) - 1.0
        gate.load += 1  # two micro-steps
        ahead.load += 2.0
        model.updates.fill_(updates)
        optimizer.step()
        expected = 0.001 * torch.tensor(change, dtype=torch.float32)
        torch.testing.assert_close(gate.e_score_correction_bias, expected)
        assert not gate.load.any()
        assert model.updates == updates + 1
        assert model.extra_logs()["maxvio"] == maxvio
        assert not ahead.e_score_correction_bias.any()
    gate.load += 1  # of a step that float16's scaler skipped
    model.extra_logs()
    assert not gate.load.any()
    assert not any(p is gate.e_score_correction_bias for group in optimizer.param_groups for p in group["params"])


def test_the_bias_balances_a_skewed_router():
    """The inputs are fixed and all prefer the same experts: with gamma the load evens out, without it stays."""
    for gamma, balanced in (0.01, True), (0.0, False):
        model = small_model("deepseek", bias_update_speed=gamma, max_steps=10**6, mtp=False).train()
        gate = model.model.layers[1].mlp.gate
        x = randn(8, 64, 64, seed=3) + 0.5
        for _ in range(200):
            with torch.no_grad():
                gate(x)
            model.update_bias()
        assert (model.maxvio < 0.2) == balanced
        assert (model.maxvio > 1) == (not balanced)


def test_grouped_products_compile_to_one_graph():
    """What CUDA runs, bf16 autocast and grouped products, is compiled on a CPU: it gives the eager result within bf16's
    rounding."""
    x = randn(2, 40, 64, seed=1)

    def results(compiled):
        moe = small_model("deepseek").model.layers[1].mlp.train()
        moe.gate.e_score_correction_bias[:4] += 100  # twelve experts stay empty
        if compiled:
            moe.compile(dynamic=False, fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            y, balance_loss = moe(x)
        load = moe.gate.load.clone()
        gradients = torch.autograd.grad(y.float().square().mean() + balance_loss, moe.parameters())
        _, gate_up_gradient, *_ = gradients
        assert not gate_up_gradient[4:].any()  # gradients of empty experts are zero, not what was in memory
        return [y.float(), load, *gradients]

    for a, b in zip(results(False), results(True)):
        assert (a - b).norm() <= 0.02 * a.norm()
        assert torch.isfinite(b).all()


# ---- RWKV-7's time mix -----------------------------------------------------------------------------------------------

WKV_MODES = ["random", "fast", "slow", "mixed", "similar keys", "repeated", "repeated, fast"]


def wkv_inputs(mode, T, N=64):
    """Return r, log w, k, v, a, b (1, 2, T, N) and a state (1, 2, N, N), float64.

    The modes push the decay to its ends and repeat the keys."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    r, k, v, rate, which, decay = (normal(1, 2, T, N) for _ in range(6))
    rate = rate.sigmoid()
    fast = torch.full_like(r, -0.6065)
    slow = torch.full_like(r, -7e-5)
    log_w = -0.6065 * (2 * decay - 2).sigmoid()
    if mode == "mixed":
        log_w = torch.where(which > 0, fast, slow)
    elif mode in ("fast", "repeated, fast"):
        log_w = fast
    elif mode in ("slow", "repeated"):
        log_w = slow
    if mode == "similar keys":
        k = k[:, :, :1] + 0.3 * normal(1, 2, T, N)
        rate = (normal(1, 2, T, N) + 2).sigmoid()
    if "repeated" in mode:  # as in "------"
        k = k[:, :, :1].expand_as(k)
        rate = torch.full_like(rate, 0.999)
    kk = F.normalize(k, dim=-1)
    return [r / 8, log_w, k / 8, v, -kk, kk * rate, 0.1 * normal(1, 2, N, N)]


def naive_wkv(r, log_w, k, v, a, b, state):
    """Run the recurrence token by token: (y, new state)."""
    def outer(x, z):
        return x[..., :, None] * z[..., None, :]

    y = []
    for t in range(r.size(2)):
        removed = torch.einsum("bhvk,bhk,bhl->bhvl", state, a[:, :, t], b[:, :, t])
        decayed = state * log_w[:, :, t, None, :].exp()
        state = decayed + removed + outer(v[:, :, t], k[:, :, t])
        y.append(torch.einsum("bhvk,bhk->bhv", state, r[:, :, t]))
    return torch.stack(y, 2), state


def relative_error(x, y):
    """Return the largest difference in terms of the largest value of y."""
    return ((x - y).abs().max() / y.abs().max()).item()


@pytest.mark.parametrize("mode", WKV_MODES)
def test_chunks_equal_the_recurrence(mode):
    """Equal are the output, the final state and all gradients, from a state that is not 0.

    A series over the whole chunk instead of UnitLowerInverse's blocks passes "random" and fails where keys repeat."""
    script = SCRIPTS["rwkv"]
    for T in 1, 63, 64, 200:
        inputs = [x.requires_grad_() for x in wkv_inputs(mode, T)]
        y, state = naive_wkv(*inputs)
        gy = randn(*y.shape, seed=0, dtype=torch.float64)
        gs = randn(*state.shape, seed=1, dtype=torch.float64)

        def with_gradients(y, state, inputs):
            scalar = (y * gy.to(y.dtype)).sum() + (state * gs.to(y.dtype)).sum()
            return [y, state, *torch.autograd.grad(scalar, inputs)]

        expected = with_gradients(y, state, inputs)
        for chunk in 16, 32, 64:
            for dtype, tolerance in (torch.float64, 1e-12), (torch.float32, 2e-5):
                ours = [x.detach().to(dtype).requires_grad_() for x in inputs]
                results = with_gradients(*script.wkv(*ours, chunk), ours)
                assert max(relative_error(*pair) for pair in zip(results, expected)) < tolerance
        expected_y, expected_state, *_ = expected
        *vectors, state = inputs
        for t in range(T):
            y, state = script.wkv_step(*(x[:, :, t] for x in vectors), state)
        assert relative_error(state, expected_state) < 1e-14
        assert relative_error(y, expected_y[:, :, -1]) < 1e-13 * math.sqrt(T)


def test_a_series_over_the_chunk_would_not_do():
    """Negative control of the test above: the inverse as a product of powers of the whole matrix."""
    def series(A):
        X = torch.eye(64) + A
        power = A
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


def reference_time_mix(p, z, last, S, v_first, n_head):
    """Restate the time mix of one token: p the layer's weights, z the input, last the input before, S the state.

    Returns y, the new state, and the first layer's values."""
    def heads(x):
        return x.view(n_head, -1)

    mixed = {name: z + (last - z) * p[f"x_{name}"] for name in "rwkvag"}
    r = p["receptance.weight"] @ mixed["r"]
    k = p["key.weight"] @ mixed["k"]
    v = p["value.weight"] @ mixed["v"]
    w = p["w0"] + torch.tanh(mixed["w"] @ p["w1"]) @ p["w2"]
    decay = torch.exp(-torch.exp(-F.softplus(-w) - 0.5))
    rate = torch.sigmoid(p["a0"] + mixed["a"] @ p["a1"] @ p["a2"])
    gate = torch.sigmoid(mixed["g"] @ p["g1"]) @ p["g2"]
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(p["v0"] + mixed["v"] @ p["v1"] @ p["v2"])
    kk = heads(k * p["k_k"])
    kk = kk / kk.norm(dim=-1, keepdim=True)
    k = k * (1 + (rate - 1) * p["k_a"])
    removed = (S @ kk[..., None]) @ (kk * heads(rate))[:, None]
    S = S * heads(decay)[:, None] - removed + heads(v)[..., None] @ heads(k)[:, None]
    y = (S @ heads(r)[..., None]).squeeze(-1)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 64e-5).sqrt()
    y = y.flatten() * p["ln_x.weight"] + p["ln_x.bias"]
    bonus = (heads(r) * heads(k) * p["r_k"]).sum(-1, keepdim=True) * heads(v)
    return p["output.weight"] @ ((y + bonus.flatten()) * gate), S, v_first


def reference_rwkv(weights, idx, n_head):
    """Restate RWKV-7 from its paper's equations, token by token, in the precision of the weights: logits (B, T, V).

    The weights have their official names."""
    n_layer = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))

    def part(prefix):  # the weights below a prefix, vectors (C) instead of (1, 1, C)
        found = {}
        for name, p in weights.items():
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = p.flatten() if p.dim() == 3 else p
        return found

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    time_mix = [part(f"blocks.{i}.att.") for i in range(n_layer)]
    channel_mix = [part(f"blocks.{i}.ffn.") for i in range(n_layer)]
    C = weights["emb.weight"].size(1)
    N = C // n_head
    zeros = weights["emb.weight"].new_zeros
    rows = []
    for row in idx:
        att_last = [zeros(C)] * n_layer
        ffn_last = [zeros(C)] * n_layer
        memory = [zeros(n_head, N, N)] * n_layer
        logits = []
        for token in row:
            x = norm(weights["emb.weight"][token], "blocks.0.ln0")
            v_first = None
            for i in range(n_layer):
                z = norm(x, f"blocks.{i}.ln1")
                y, memory[i], v_first = reference_time_mix(time_mix[i], z, att_last[i], memory[i], v_first, n_head)
                att_last[i] = z
                x = x + y
                z = norm(x, f"blocks.{i}.ln2")
                p = channel_mix[i]
                key = p["key.weight"] @ (z + (ffn_last[i] - z) * p["x_k"])
                ffn_last[i] = z
                x = x + p["value.weight"] @ torch.relu(key) ** 2
            logits.append(weights["head.weight"] @ norm(x, "ln_out"))
        rows.append(torch.stack(logits))
    return torch.stack(rows)


def double_weights(model):
    """Return the parameters of a model in float64, by name."""
    return {name: p.detach().double() for name, p in model.named_parameters()}


def test_rwkv_equals_the_official_package_and_float64():
    """Logits equal those of pip's rwkv at a length that no chunk divides; logits and all gradients equal float64."""
    model = small_model("rwkv", n_layer=3, n_embd=128, head_dim=64, vocab_size=100)
    idx = tokens(1, 150, vocab=100)
    ours, _ = model(idx)
    official = pip_rwkv(model, idx)
    assert (ours - official).abs().max() < 5e-5 * official.std()
    assert (ours.argmax(-1) == official.argmax(-1)).all()

    model = small_model("rwkv")
    idx = tokens(2, 71)
    weights = {name: p.requires_grad_() for name, p in double_weights(model).items()}
    expected = reference_rwkv(weights, idx, 2)
    logits, _ = model(idx)
    assert (logits - expected).abs().max() < 5e-5 * expected.std()
    targets = tokens(2, 71, seed=2)
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    _, loss = model(idx, targets)
    loss.backward()
    for name, p in model.named_parameters():
        reference = weights[name].grad
        assert (p.grad - reference).abs().max() < 1e-4 * reference.abs().max(), name

    # a run of one token, and of two, at the rate 1 and next to no decay
    repeated = torch.tensor([[5] * 64 + [6, 7] * 100])
    for size in 32, 64:
        model = small_model("rwkv", chunk_size=size, block_size=264)
        for block in model.blocks:
            block.att.w0.data.fill_(-9)
            block.att.a0.data.fill_(9)
        _, loss = model(repeated, repeated)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        expected = reference_rwkv(double_weights(model), repeated, 2)
        logits, _ = model(repeated)
        assert (logits - expected).abs().max() < 1e-4 * expected.std()


class Stateless:
    """What generate needs of a model, without new_state: it then reads the whole text for every token."""

    def __init__(self, model):
        self.cfg = model.cfg
        self.hidden = model.hidden
        self.lm_head = model.lm_head


def test_rwkv_reads_on_from_a_state():
    """Token by token, in pieces, and at once give the same; so generate, which reads each token once, samples the same
    text."""
    model = small_model("rwkv")
    idx = tokens(2, 150)
    whole = model.hidden(idx)
    for pieces in [1] * 150, [77, 1, 72], [64, 64, 22]:
        state = model.new_state(2)
        parts = [model.hidden(piece, state) for piece in idx.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=5e-5 * whole.std().item(), rtol=0)

    def sample(model):
        return common.generate(model, byte_tokenizer(), list(b"some text"), "cpu", seed=3, new_tokens=40)

    assert sample(model) == sample(Stateless(model))


def official_time_mix_init(layer):
    """Restate the initial vectors of the time mix in a layer (0, 1 or 2) of three, of width 128 with heads of 64."""
    zigzag = []
    for n in range(128):
        place = (n % 64 - 31.5) / 31.5  # -1 to 1 within a head
        zigzag.append(place * abs(place))
    linear = [n / 127 - 0.5 for n in range(128)]
    expected = {
        "w0": [-6 + 6 * (n / 127) ** (1 + (layer / 2) ** 0.3) + 0.5 + 2.5 * zigzag[n] for n in range(128)],
        "a0": [-0.19 + 0.3 * zigzag[n] + 0.4 * linear[n] for n in range(128)],
        "k_k": [0.71 - 0.1 * x for x in linear],
        "k_a": [1.02] * 128,
        "r_k": [-0.04] * 128,
        "w1": [0.0] * 4096,
        "ln_x.weight": [((1 + layer) / 3) ** 0.7] * 128,
    }
    for name, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
        expected[f"x_{name}"] = [1 - (n / 128) ** (power * (1 - layer / 3)) for n in range(128)]
    if layer > 0:
        expected["v0"] = [0.73 - 0.4 * x for x in linear]
    return expected


def test_rwkv_trains_as_officially():
    """L2Wrap's gradient, the rate of w0, and the initialisation are restated."""
    script = SCRIPTS["rwkv"]
    model = small_model("rwkv").train()
    idx = tokens(2, 40)
    targets = tokens(2, 40, seed=2)
    # L2Wrap
    logits = model(idx)[0].detach().requires_grad_()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    largest, at = logits.detach().max(-1, keepdim=True)
    logits.grad.scatter_add_(-1, at, largest * 1e-4 / 80)
    hidden = model.hidden(idx).detach().requires_grad_()
    loss = model.loss(hidden, targets)
    loss.backward()
    torch.testing.assert_close(hidden.grad, logits.grad @ model.head.weight, atol=1e-8, rtol=1e-5)
    assert loss == model.eval().loss(hidden, targets)
    # the optimizer
    cfg = small_config("rwkv", n_layer=3, n_embd=128, head_dim=64)
    torch.manual_seed(0)
    model = script.Model(cfg)
    optimizer = model.configure_optimizers(cfg, "cpu")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        group = groups[id(p)]
        assert group.get("lr_scale", 1.0) == (2.0 if name.endswith("att.w0") else 1.0)
        assert group["eps"] == 1e-18
        assert group["betas"] == (0.9, 0.99)
    # the initialisation
    for layer, block in enumerate(model.blocks):
        att = block.att
        ffn = block.ffn
        for name, values in official_time_mix_init(layer).items():
            ours = att.get_parameter(name).flatten()
            torch.testing.assert_close(ours, torch.tensor(values), atol=1e-5, rtol=1e-5)
        x_k = [1 - (n / 128) ** ((1 - layer / 3) ** 4) for n in range(128)]
        torch.testing.assert_close(ffn.x_k.flatten(), torch.tensor(x_k), atol=1e-5, rtol=1e-5)
        orthogonal = [  # matrix, gain
            (att.receptance.weight, 1.0),
            (att.value.weight, 1.0),
            (att.key.weight, 0.1),
            (att.w2, 0.1),
            (ffn.key.weight.T, 1.0),
            (model.head.weight.T, 0.5 * 2),
        ]
        for matrix, gain in orthogonal:
            expected = gain ** 2 * torch.eye(len(matrix))
            torch.testing.assert_close(matrix @ matrix.T, expected, atol=1e-5, rtol=0)
        assert not att.output.weight.any()
        assert not ffn.value.weight.any()
    assert 0.9e-4 < model.emb.weight.abs().max() <= 1e-4


def test_rwkv_in_bf16_and_with_recomputing(monkeypatch):
    """bf16 autocast keeps the loss; the decay and the state stay float32. Recomputing changes no bit of a gradient."""
    script = SCRIPTS["rwkv"]
    model = small_model("rwkv")
    idx = tokens(2, 130)
    targets = tokens(2, 130, seed=2)
    wkv = script.wkv
    calls = []
    returned = []

    def recorded(*args):
        calls.append(args)  # before the call, which recomputing ends early
        results = wkv(*args)
        returned.append(results)
        return results

    monkeypatch.setattr(script, "wkv", recorded)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        _, loss = model(idx, targets)
    assert abs(loss - model(idx, targets)[1]) < 3e-3
    assert len(calls) == 4  # two layers, in bf16 and in fp32
    for args, results in zip(calls, returned, strict=True):
        *tensors, _ = args
        _, log_w, *_ = args
        assert all(x.dtype == torch.float32 for x in (*tensors, *results))
        assert (log_w != log_w.bfloat16()).float().mean() > 0.9  # not rounded to bf16 on the way
        assert all(torch.equal(a, b) for a, b in zip(results, wkv(*args)))

    gradients = []
    for recompute in False, True:
        calls.clear()
        model = small_model("rwkv", recompute=recompute).train()
        _, loss = model(idx, targets)
        gradients.append(torch.autograd.grad(loss, model.parameters()))
        assert len(calls) == (4 if recompute else 2)
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("arch", ["rwkv", "deepseek"])
def test_compiled_gradients_keep_their_precision(arch):
    """What runs in float32 inside of bf16 autocast, RWKV's operator and DeepSeek's router, must do so backward, too.

    With the loop's setting a compiled backward pass is as close to float64 as an eager one; without, it is not
    (negative control)."""
    script = SCRIPTS[arch]
    gate = small_model("deepseek").model.layers[1].mlp.gate.train()

    def operator(*args):
        with torch.autocast("cpu", enabled=False):
            y, _ = script.wkv(*args, torch.zeros(1, 2, 64, 64), 64)
        return y

    def router(x, weight):
        _, weights, _ = gate(x)
        return weights

    if arch == "rwkv":
        call = operator
        *vectors, _ = wkv_inputs("similar keys", 128)
        leaves = [x.float().requires_grad_() for x in vectors]
    else:
        call = router
        leaves = [randn(2, 40, 64).requires_grad_(), gate.weight]

    def gradients(call):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(*leaves)
        return torch.autograd.grad(y, leaves, randn(*y.shape, seed=3))

    eager = gradients(call)
    for setting, fine in ("off", True), ("same_as_forward", False):
        torch._dynamo.reset()
        with torch._functorch.config.patch(backward_pass_autocast=setting):
            ours = gradients(torch.compile(call, backend="aot_eager", dynamic=False, fullgraph=True))
        assert all((a - b).norm() < 1e-4 * b.norm() for a, b in zip(ours, eager)) == fine
    assert 'backward_pass_autocast = "off"' in inspect.getsource(common.configure_compiler)


def test_rwkv_compiles_two_blocks_and_the_loss():
    """There are three graphs however many layers, with recomputing inside."""
    idx = tokens(2, 64)
    model = small_model("rwkv", n_layer=4, recompute=True).train()
    model.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, loss = model(idx, idx)
    gradients = torch.autograd.grad(loss, model.parameters())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    model = small_model("rwkv", n_layer=4).train()
    _, expected = model(idx, idx)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for a, b in zip(gradients, torch.autograd.grad(expected, model.parameters())):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_rwkv_exports_an_official_checkpoint(monkeypatch, capsys):
    options = [*quick("rwkv"), "--n_embd=64", "--head_dim=64"]
    train("rwkv", monkeypatch, *options)
    train("rwkv", monkeypatch, *options, "--export=exported")
    weights = torch.load("exported/model.pth", weights_only=True)
    assert weights.keys() == checkpoint_of("log/rwkv-tiny")["model"].keys()
    assert {"emb.weight", "blocks.0.ln0.bias", "blocks.0.att.r_k", "head.weight"} < weights.keys()
    model = trained_model("rwkv")
    idx = tokens(1, 40, vocab=256)
    logits, _ = model(idx)
    torch.testing.assert_close(logits, pip_rwkv(model, idx), atol=1e-4, rtol=0)
    bad(capsys, lambda: train("rwkv", monkeypatch, *options, "--export=exported"), "not empty")


# ---- what every architecture must do ---------------------------------------------------------------------------------

@each_arch
def test_targets_of_minus_one_do_not_count(arch):
    model = small_model(arch)
    idx = tokens(2, 16)
    targets = tokens(2, 16, seed=2)
    targets[0, 5:] = -1
    logits, _ = model(idx)
    logp = logits.log_softmax(-1)
    counted = [logp[0, range(5), targets[0, :5]], logp[1, range(16), targets[1]]]
    _, loss = model(idx, targets)
    torch.testing.assert_close(loss, -torch.cat(counted).mean())


@each_arch
def test_the_residual_stream_is_bf16_under_autocast(arch):
    model = small_model(arch, n_layer=3).train()
    seen = []

    def record(block, args, y):
        x = y[0] if isinstance(y, tuple) else y
        seen.append(x.dtype)

    for name, module in model.named_modules():
        if re.fullmatch(r"(transformer\.h|model\.layers|blocks)\.\d+|mtp\.mtp_block", name):
            module.register_forward_hook(record)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(2, 32), tokens(2, 32))
    assert seen == [torch.bfloat16] * (4 if arch == "deepseek" else 3)


@each_in_transformers
def test_attention_comes_out_in_the_memory_order_of_its_projection(arch, monkeypatch):
    """What leaves the kernel has the layout of the queries: in another one o_proj copies it, in every layer of every
    step."""
    attend = F.scaled_dot_product_attention
    seen = []

    def record(*args, **options):
        y = attend(*args, **options)
        seen.append(y)
        return y

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    small_model(arch, window=64, v_head_dim=24)(tokens(2, 64))  # DeepSeek's 16 + 8, as in its default shape
    assert len(seen) == 2
    assert all(y.transpose(1, 2).is_contiguous() for y in seen)


@each_arch
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_learns(arch, optimizer):
    cfg = small_config(arch, optimizer=optimizer, learning_rate=3e-3)
    torch.manual_seed(0)
    model = SCRIPTS[arch].Model(cfg)
    opt = model.configure_optimizers(cfg, "cpu")
    grouped = [p for group in opt.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())

    def should_decay(name, p):
        return p.dim() >= 2 and (arch not in ("rwkv", "mta") or name.endswith(".weight"))

    decayed = {p for group in opt.param_groups for p in group["params"] if group["weight_decay"] > 0}
    assert decayed == {p for name, p in model.named_parameters() if should_decay(name, p)}
    idx = tokens(4, 65)
    before = [p.clone() for p in model.parameters()]
    losses = []
    for _ in range(30):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(512)) < 0.2
    assert losses[-1] < 0.8 * losses[0]
    assert all((a != b).any() for a, b in zip(before, model.parameters()))


def expected_std(arch, name):
    """Return the standard deviation with which a matrix of 8 layers starts."""
    if arch == "deepseek":
        return 0.006
    if arch != "gemma" and re.search(r"(c_proj|o_proj|down_proj).weight", name):
        return 0.02 / 4  # a residual projection: 0.02 / sqrt(2 x 8)
    return 0.02


@each_with_attention
def test_initialisation(arch):
    cfg = small_config(arch, n_layer=8, n_embd=256, ffn_dim=512, n_head=4, block_size=256)
    for name, p in SCRIPTS[arch].Model(cfg).state_dict().items():
        if "mixing" in name:
            assert torch.equal(p, torch.eye(4))
        elif "kernel" in name:
            assert p.sum() == 4 and (p[:, -1, 5] == 1).all()  # only a query and its key, for each of four heads
        elif "attn.gate" in name:
            continue  # test_it_starts_as_llama in test_mta.py
        elif p.dim() >= 2:
            std = expected_std(arch, name)
            assert abs(p.std() / std - 1) < 0.03, name
            assert abs(p.mean()) < std / 20, name
        else:
            assert (p == (name.endswith("weight") and arch != "gemma")).all(), name


BAD_SHAPES = [  # architecture, option, what the error must name
    ("gpt2", "--n_head=5", "n_head=5"),
    ("llama", "--n_head=5", "n_head=5"),
    ("llama", "--n_kv_head=5", "n_kv_head=5"),
    ("llama", "--n_head=256", "n_head=256"),
    ("phi", "--n_kv_head=24", "n_kv_head=24"),
    ("mistral", "--window=0", "window=0"),
    ("phi", "--partial_rotary_factor=1.5", "partial_rotary_factor=1.5"),
    ("phi", "--partial_rotary_factor=0.05", "64 values"),
    ("phi", "--partial_rotary_factor=0", "rotary"),
    ("gemma", "--head_dim=33", "head_dim=33"),
    ("gemma", "--window_pattern=0", "window_pattern=0"),
    ("deepseek", "--qk_rope_head_dim=7", "qk_rope_head_dim=7"),
    ("deepseek", "--moe_ffn_dim=100", "moe_ffn_dim=100"),
    ("deepseek", "--n_dense_layer=12", "n_dense_layer=12"),
    ("deepseek", "--n_group=3", "n_group=3"),
    ("deepseek", "--n_group=8", "n_group=8"),
    ("deepseek", "--topk_group=5", "topk_group=5"),
    ("deepseek", "--n_activated_experts=9", "n_activated_experts=9"),
    ("deepseek", "--block_size=1", "block_size=1"),
    ("mta", "--key_kernel=4", "key_kernel=4"),
    ("mta", "--query_kernel=0", "query_kernel=0"),
    ("mta", "--kq_period=0", "kq_period=0"),
    ("mta", "--n_kv_head=5", "n_kv_head=5"),
    ("rwkv", "--head_dim=48", "head_dim=48"),
    ("rwkv", "--head_dim=1", "head_dim=1"),
    ("rwkv", "--chunk_size=48", "chunk_size=48"),
]


@pytest.mark.parametrize("arch, option, word", BAD_SHAPES)
def test_a_bad_shape_is_one_line(arch, option, word, monkeypatch, capsys):
    bad(capsys, lambda: train(arch, monkeypatch, option), word)


def test_gpt2_starts_from_published_weights(monkeypatch, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(
        vocab_size=300, n_positions=48, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)).eval()
    hf.save_pretrained("published")
    script = SCRIPTS["gpt2"]
    model = script.Model(script.Config(init_from="published")).eval()
    idx = tokens(2, 48, vocab=300)
    logits, _ = model(idx)
    torch.testing.assert_close(logits, hf(idx).logits, atol=1e-4, rtol=0)
    train("gpt2", monkeypatch, "--init_from=published", "--tiny", "--val_tokens=96", "--batch_size=2",
          "--total_batch_size=96", "--max_steps=1", "--sample_interval=0")
    config = checkpoint_of(step=1)["config"]
    assert config["n_layer"] == 3
    assert not config["init_from"]  # the checkpoint stands on its own, but run.json says where it began
    with open("log/gpt2-tiny/run.json") as f:
        config = json.load(f)["config"]
    assert (config["n_layer"], config["block_size"], config["init_from"]) == (3, 48, "published")
    script.Config(init_from="missing")  # a Config reads no file
    with open("published/config.json") as f:
        config = json.load(f)
    with open("published/config.json", "w") as f:
        json.dump({**config, "n_head": 5}, f)
    bad(capsys, lambda: train("gpt2", monkeypatch, "--init_from=published"), "published", "n_head=5")
    os.mkdir("empty")
    options = ["--tiny", "--total_batch_size=1024", "--batch_size=1", "--init_from=empty"]
    bad(capsys, lambda: train("gpt2", monkeypatch, *options), "--init_from=empty")


def published_gpt2(**settings):
    """Write a GPT-2 of transformers with random weights to the folder "published"."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    shape = dict(vocab_size=300, n_positions=48, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**{**shape, **settings})).save_pretrained("published")


def edit_config(**settings):
    """Change settings in the config.json of the folder "published"."""
    with open("published/config.json") as f:
        config = json.load(f)
    with open("published/config.json", "w") as f:
        json.dump({**config, **settings}, f)


@pytest.mark.parametrize("setting, value", [
    ("activation_function", "gelu"),
    ("activation_function", "relu"),
    ("layer_norm_epsilon", 1e-6),
    ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True),
    ("reorder_and_upcast_attn", True),
    ("tie_word_embeddings", False),
    ("n_inner", 96),
    ("add_cross_attention", True),
    ("n_ctx", 24),
    ("pruned_heads", {"0": [1]}),
    ("quantization_config", {"quant_method": "bitsandbytes"}),
    ("rotary_of_the_future", True),
])
def test_init_from_refuses_what_gpt2_here_lacks(setting, value, monkeypatch, capsys):
    published_gpt2()
    edit_config(**{setting: value})
    words = "--init_from=published", f"{setting}={value!r}"
    bad(capsys, lambda: train("gpt2", monkeypatch, "--init_from=published"), *words)


def test_init_from_refuses_other_classes_and_says_all(monkeypatch, capsys):
    published_gpt2(n_inner=96, activation_function="gelu")
    bad(capsys, lambda: train("gpt2", monkeypatch, "--init_from=published"), "n_inner=96", "activation_function='gelu'")
    SCRIPTS["llama"].to_hf(small_model("llama")).save_pretrained("llama")
    bad(capsys, lambda: train("gpt2", monkeypatch, "--init_from=llama"), "--init_from=llama", "type llama")
    with open("published/config.json", "w") as f:
        f.write("{")
    bad(capsys, lambda: train("gpt2", monkeypatch, "--init_from=published"), "--init_from=published")


def test_init_from_takes_what_changes_no_logits():
    """What the published files of GPT-2 hold beside its shape; a width of the MLP that is the usual one."""
    from transformers import GPT2LMHeadModel
    published_gpt2(attn_pdrop=0.1, n_inner=4 * 32)
    edit_config(n_ctx=48, n_special=0, predict_special_tokens=True, output_past=True, pad_token_id=0, do_sample=True,
                max_length=50, torch_dtype="float32", _num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0},
                summary_type="cls_index", summary_first_dropout=0.1, initializer_range=0.01, pruned_heads={},
                task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}, bos_token_id=7)
    script = SCRIPTS["gpt2"]
    model = script.Model(script.Config(init_from="published")).eval()
    idx = tokens(2, 48, vocab=300)
    reference = GPT2LMHeadModel.from_pretrained("published").eval()
    torch.testing.assert_close(model(idx)[0], reference(idx).logits, atol=1e-4, rtol=0)
    # an export is something to start from, too
    script.to_hf(model).save_pretrained("again")
    again = script.Model(script.Config(init_from="again")).eval()
    torch.testing.assert_close(again(idx)[0], model(idx)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("change, word", [
    (lambda weights: weights.pop("transformer.ln_f.bias"), "transformer.ln_f.bias"),
    (lambda weights: weights.update({"transformer.h.0.attn.q_norm.weight": torch.ones(16)}), "q_norm"),
    (lambda weights: weights.update({"transformer.h.3.ln_1.weight": torch.ones(32)}), "h.3.ln_1"),
    (lambda weights: weights.update({"transformer.wpe.weight": torch.ones(40, 32)}), "wpe"),
    (lambda weights: weights.update({"lm_head.weight": torch.ones(300, 32)}), "lm_head"),
    (lambda weights: weights.update({"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}), None),
    (lambda weights: weights.update({"lm_head.weight": weights["transformer.wte.weight"].clone()}), None),
])
def test_init_from_reads_all_weights_or_none(change, word, capsys):
    from safetensors.torch import load_file, save_file
    published_gpt2()
    weights = load_file("published/model.safetensors")
    wte = weights["transformer.wte.weight"].clone()
    change(weights)
    save_file(weights, "published/model.safetensors", {"format": "pt"})
    script = SCRIPTS["gpt2"]

    def load():
        return script.Model(script.Config(init_from="published"))

    if word:
        bad(capsys, load, "--init_from=published", word)
    else:  # what old files hold
        assert torch.equal(load().lm_head.weight, wte)
