"""
These tests check train_hybrid.py: each combination of ingredients that transformers has is compared with its class, at
random weights; its ends are train_gpt2.py and train_llama.py.

    pytest -q test_hybrid.py
"""
import collections
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import train_gpt2
import train_hybrid
import train_llama
import train_mistral
from conftest import bad, checkpoint_of, log_of, quick, shards, shell, small_config, stream_of, tokens, train
from test_models import Mistake, edit, exact_gelu, option, replace_functional, tiled_heads

GPT2 = dict(pos="learned", norm="layernorm", mlp="gelu", bias=True, n_kv_head=4)
ROPE = {**GPT2, "pos": "rope"}
LADDER = {  # name: (options, class); what is not given is as in LLaMA
    "GPT-2": (GPT2, "GPT2"),
    "+ rope": (ROPE, "Starcoder2"),
    "+ rope, grouped queries": ({**ROPE, "n_kv_head": 2}, "Starcoder2"),
    "- biases": ({**ROPE, "bias": False}, "Starcoder2"),
    "+ rmsnorm": (dict(mlp="gelu", n_kv_head=4), "Arcee"),
    "+ rmsnorm, with biases": (dict(mlp="gelu", n_kv_head=4, bias=True), "Arcee"),
    "+ swiglu": (dict(n_kv_head=4), "Llama"),
    "LLaMA": (dict(), "Llama"),
    "LLaMA - rmsnorm": (dict(norm="layernorm"), "StableLm"),
    "LLaMA - swiglu": (dict(mlp="gelu"), "Arcee"),
    "LLaMA + biases": (dict(bias=True), "Llama"),
    "no positions": (dict(pos="none"), "SmolLM3"),
    "geglu": (dict(mlp="geglu"), "Llama"),
    "relu2": (dict(mlp="relu2"), "Arcee"),
    "norm of queries and keys": (dict(qk_norm="rmsnorm"), "Qwen3"),
    "LayerNorm of queries and keys": (dict(norm="layernorm", qk_norm="layernorm"), "StableLm"),
    "every other layer a window": (dict(qk_norm="rmsnorm", window_pattern="SL", n_layer=3), "Qwen3"),
    "windows": ({**ROPE, "window_pattern": "S"}, "Starcoder2"),
    "shared by neighbours": (dict(n_layer=4, share=2), "Llama"),
    "shared in turn": (dict(n_layer=6, share=3, share_order="cycle"), "Llama"),
    "low rank": (dict(rank=12), "Llama"),
    "low rank with biases": (dict(rank=12, bias=True), "Llama"),
    "low rank, shared": (dict(n_layer=4, share=2, rank=12), "Llama"),
    "factorised embedding": ({**GPT2, "embd_rank": 24}, "OPT"),
    "GPT-2 - biases": ({**GPT2, "bias": False}, "GPT2"),
    "Mistral": (dict(window_pattern="S"), "Mistral"),
    "LLaMA, every other layer a window": (dict(window_pattern="LS", n_layer=3), "Ministral"),
    "LLaMA with a head of its own": (dict(tie=False), "Llama"),
    "all at once": (dict(n_layer=6, share=3, share_order="cycle", rank=12, window_pattern="SSL", qk_norm="rmsnorm",
                         tie=False, mlp="geglu"), "Qwen3"),
}


def small_hybrid(seed=0, **options):
    """Return a small model with all parameters random."""
    model = train_hybrid.Model(small_config("hybrid", **options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            std, mean = (0.5, 1.0) if p.dim() < 2 else (0.2 if model.cfg.rank or model.cfg.embd_rank else 0.1, 0.0)
            p.copy_(torch.randn(p.shape, generator=generator) * std + mean)
    return model


def gradients_of(model, loss):
    """Return the gradient of the loss by the name of each parameter."""
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values())))


def assert_same_model(model, name, their_logits, their_gradients):
    """Assert that logits and the gradients of all parameters are those of a model with the names of class `name`.

    Its gradients come back to our parameters through hf_weights, which renames, joins, repeats and multiplies them."""
    idx = tokens(2, 48)
    logits, _ = model(idx)
    torch.testing.assert_close(logits, their_logits, atol=1e-4, rtol=0)
    _, loss = model(idx[:, :-1], idx[:, 1:])
    weights = train_hybrid.hf_weights(model.cfg, name, model.state_dict(keep_vars=True))
    both = [key for key in their_gradients if key in weights]  # they may have biases that we lack
    expected = torch.autograd.grad(
        [weights[key] for key in both], model.parameters(), [their_gradients[key] for key in both])
    for (key, ours), theirs in zip(gradients_of(model, loss).items(), expected, strict=True):
        # without a rotation the bias of the keys changes nothing: its gradient is zero but for rounding
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7, key


@pytest.mark.parametrize("rung", LADDER)
def test_logits_and_gradients_equal_transformers(rung):
    options, name = LADDER[rung]
    model = small_hybrid(**options)
    hf = train_hybrid.to_hf(model).eval()
    assert type(hf).__name__ == ("GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    idx = tokens(2, 48)
    logits = hf(idx).logits
    assert logits.std() > 0.5
    assert_same_model(model, name, logits, gradients_of(hf, hf(idx, labels=idx).loss))


def test_learned_positions_in_modern_blocks():
    """SmolLM3 without rotary positions, given embeddings and positions, is the model with learned ones."""
    model = small_hybrid(pos="learned")
    without = small_hybrid(pos="none")
    weights = {name: p for name, p in model.state_dict().items() if "positions" not in name}
    without.load_state_dict(weights)
    hf = train_hybrid.to_hf(without).eval()
    idx = tokens(2, 48)
    embeddings = model.model.embed_tokens(idx) + model.model.embed_positions.weight[:48]
    torch.testing.assert_close(model(idx)[0], hf(inputs_embeds=embeddings).logits, atol=1e-4, rtol=0)


def relu_between_factors(model, script, patch):
    """Put a ReLU between the two matrices of each projection of low rank."""
    for module in model.modules():
        if isinstance(module, torch.nn.Sequential):
            module.insert(1, torch.nn.ReLU())
    return model


def tie(model, script, patch):
    """Give the head the embedding's weights."""
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


MISTAKES = [
    Mistake("learned positions by one", "GPT-2", edit(
        "Model.hidden", "embed_positions.weight[:T]", "embed_positions.weight[1:T + 1]")),
    Mistake("theta", "LLaMA", option(rope_theta=10000.0)),
    Mistake("LayerNorm for RMSNorm", "LLaMA", option(norm="layernorm")),
    Mistake("RMSNorm for LayerNorm", "LLaMA - rmsnorm", option(norm="rmsnorm")),
    Mistake("gelu for swiglu", "LLaMA", option(mlp="geglu")),
    Mistake("relu for relu2", "relu2", edit("MLP.forward", ".square()", "")),
    Mistake("exact gelu", "+ rmsnorm", replace_functional("gelu", exact_gelu)),
    Mistake("exact gelu in the gate", "geglu", replace_functional("gelu", exact_gelu)),
    Mistake("no norm of queries", "norm of queries and keys", edit("Attention.forward", "self.q_norm(q)", "q")),
    Mistake("norm behind the rotation", "norm of queries and keys", edit(
        "Attention.forward", "q, k = rotate(q, rope), rotate(k, rope)",
        "q, k = self.q_norm(rotate(q / self.q_norm.weight, rope)), rotate(k, rope)")),
    Mistake("LayerNorm's eps", "LLaMA - rmsnorm", option(norm_eps=1e-3)),
    Mistake("RMSNorm's eps", "LLaMA", option(norm_eps=1e-3)),
    Mistake("no bias in the norms", "GPT-2", edit("Norm.forward", "self.weight, self.bias", "self.weight, None")),
    Mistake("k/v heads in turn", "LLaMA", replace_functional("scaled_dot_product_attention", tiled_heads)),
    Mistake("positions where none are", "no positions", option(pos="rope")),
    Mistake("RMSNorm of queries", "LayerNorm of queries and keys", option(qk_norm="rmsnorm")),
    Mistake("all passes share", "shared by neighbours", option(share=4)),
    Mistake("neighbours share", "shared in turn", option(share_order="immediate")),
    Mistake("ReLU between the factors", "low rank", relu_between_factors),
    Mistake("tied after all", "LLaMA with a head of its own", tie),
    Mistake("window + 1", "windows", option(window=17)),
    Mistake("window - 1", "Mistral", option(window=15)),
    Mistake("pattern reversed", "every other layer a window", option(window_pattern="LS")),
    Mistake("embedding not projected", "factorised embedding", edit(
        "Model.hidden", "return self.model.project_out(x)", "return self.model.project_out(-x)")),
    Mistake("second norm left out", "shared by neighbours", edit(
        "Block.forward", "self.mlp(self.post_attention_layernorm(x))", "self.mlp(x)")),
    Mistake("no bias in the MLP", "+ rope", edit("MLP.forward", "return self.down_proj(y)",
                                                 "return self.down_proj(y) - self.down_proj.bias")),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_parity_notices(mistake, monkeypatch):
    model = small_hybrid(**LADDER[mistake.archs][0])
    idx = tokens(2, 48)
    reference = train_hybrid.to_hf(model).eval()(idx).logits
    torch.testing.assert_close(model(idx)[0], reference, atol=1e-4, rtol=0)
    wrong = mistake.change(model, train_hybrid, monkeypatch)
    assert not (wrong(idx)[0] - reference).abs().max() <= 3e-4


def test_shared_passes():
    """Which passes share: neighbours, or all blocks in turn; each has norms of its own."""
    for order, expected in ("immediate", [0, 0, 0, 1, 1, 1]), ("cycle", [0, 1, 0, 1, 0, 1]):
        layers = small_hybrid(n_layer=6, share=3, share_order=order).model.layers
        units = list(dict.fromkeys(block.mlp for block in layers))
        assert [units.index(block.mlp) for block in layers] == expected
        assert [units.index(block.mlp) for block in layers] == [
            list(dict.fromkeys(b.self_attn for b in layers)).index(block.self_attn) for block in layers]
        assert len({block.input_layernorm for block in layers}) == 6


def test_its_log_is_llamas(monkeypatch):
    train("llama", monkeypatch, *quick("llama"), "--log_dir=log/llama")
    train("hybrid", monkeypatch, *quick("hybrid"), "--log_dir=log/hybrid")
    assert log_of("log/hybrid") == log_of("log/llama")
    train("hybrid", monkeypatch, *quick("hybrid"), "--mlp=geglu", "--log_dir=log/geglu")
    assert log_of("log/geglu") != log_of("log/llama")


GPT2_OPTIONS = ["--pos=learned", "--norm=layernorm", "--mlp=gelu", "--bias", "--n_kv_head=2", "--ffn_dim=128"]


def test_it_is_gpt2(monkeypatch):
    """With GPT-2's settings it has GPT-2's initial weights, and logits, gradients and log but for rounding."""
    torch.manual_seed(0)
    gpt2 = train_gpt2.Model(small_config("gpt2"))
    torch.manual_seed(0)
    model = train_hybrid.Model(small_config("hybrid", **GPT2, ffn_dim=256))
    ours = train_gpt2.to_hf(gpt2).state_dict()
    for name, p in train_hybrid.to_hf(model).state_dict().items():
        assert torch.equal(p, ours[name]), name
    model = small_hybrid(**GPT2, ffn_dim=256)  # random weights show what fresh ones hide
    gpt2.load_state_dict(train_gpt2.transpose_conv1d(train_hybrid.to_hf(model).state_dict()))
    idx = tokens(2, 48)
    gradients = train_gpt2.transpose_conv1d(gradients_of(gpt2, gpt2(idx[:, :-1], idx[:, 1:])[1]))
    assert_same_model(model, "GPT2", gpt2(idx)[0], gradients)
    train("gpt2", monkeypatch, *quick("gpt2"), "--log_dir=log/gpt2")
    train("hybrid", monkeypatch, *quick("hybrid"), *GPT2_OPTIONS, "--log_dir=log/hybrid")
    for stream, tolerance in ("train", 1e-4), ("val", 1e-4), ("norm", 1e-3):
        assert stream_of(stream, "log/hybrid") == pytest.approx(stream_of(stream, "log/gpt2"), rel=tolerance)


def test_counts():
    """The rungs without biases have equally many parameters in their blocks; FLOPs are those of the scripts."""
    def model(**options):
        with torch.device("meta"):
            return train_hybrid.Model(train_hybrid.Config(**options))

    for options in (dict(mlp="gelu", n_kv_head=12, ffn_dim=3072), dict(n_kv_head=12, ffn_dim=2048),
                    dict(mlp="gelu", ffn_dim=3648), dict(), dict(mlp="relu2", ffn_dim=3648)):
        blocks = model(**options).model.layers
        norms = 24 * 768
        assert sum(p.numel() for p in blocks.parameters()) == 84_953_856 - 768
        assert sum(p.numel() for p in blocks.parameters() if p.dim() == 2) == 84_953_856 - 768 - norms
    gpt2 = dict(pos="learned", norm="layernorm", mlp="gelu", bias=True, n_kv_head=12, ffn_dim=3072)
    cases = [(dict(), train_llama, dict()), (gpt2, train_gpt2, dict()),
             (dict(window_pattern="S", rope_theta=10000.0), train_mistral, dict())]
    for options, script, theirs in cases:
        with torch.device("meta"):
            expected = script.Model(script.Config(**theirs))
        ours = model(**options)
        assert ours.num_params() == expected.num_params()
        assert ours.flops_per_token() == expected.flops_per_token()
    # 3 blocks of 3 passes have a third of the weights, and the FLOPs of 9
    shared, full = model(n_layer=9, share=3), model(n_layer=9)
    assert shared.flops_per_token() == full.flops_per_token()
    matrices = 84_953_856 - 768 - 24 * 768
    assert full.num_params()["total"] - shared.num_params()["total"] == 6 * matrices / 12
    assert full.num_params()["non_embedding"] - shared.num_params()["non_embedding"] == 6 * matrices / 12
    attended = 12 * 12 * 768 * 1024
    # a head of its own adds parameters but no products; positions add neither
    untied, tied = model(tie=False, pos="learned"), model()
    assert untied.num_params()["total"] == tied.num_params()["total"] + (50304 + 1024) * 768
    assert untied.num_params()["non_embedding"] == tied.num_params()["non_embedding"]
    assert untied.flops_per_token() == tied.flops_per_token()
    # all 84,953,856 of the blocks stay, and the embedding is a product
    narrow = model(embd_rank=64)
    assert narrow.num_params()["total"] == 84_953_856 + 50304 * 64 + 2 * 64 * 768
    assert narrow.num_params()["non_embedding"] == 84_953_856
    assert narrow.flops_per_token() == 6 * narrow.num_params()["total"] + attended
    # two factors for each of q, o; k, v; gate, up, down; and 25 norms
    factors = model(rank=32)
    layer = 32 * (2 * (768 + 768) + 2 * (768 + 192) + 3 * (768 + 2432))
    assert factors.num_params()["total"] == 12 * layer + 25 * 768 + 50304 * 768
    assert factors.flops_per_token() == 6 * factors.num_params()["total"] + attended
    # every third layer sees all, the others 256 positions; more than there are count as all
    windows = tied.flops_per_token() - attended
    assert model(window_pattern="SSL").flops_per_token() == windows + 12 * 768 * (8 * 256 + 4 * 1024)
    assert model(window_pattern="S", window=2000).flops_per_token() == tied.flops_per_token()


@pytest.mark.parametrize("option, word", [
    ("--pos=alibi", "pos=alibi"), ("--norm=none", "norm=none"), ("--mlp=relu", "mlp=relu"),
    ("--qk_norm=l2", "qk_norm=l2"), ("--window_pattern=SX", "window_pattern=SX"),
    ("--window_pattern=", "window_pattern="), ("--share=5", "share=5"),
    ("--share_order=random", "share_order=random"), ("--n_kv_head=5", "n_kv_head=5"), ("--n_head=5", "n_head=5"),
    ("--head_lr=2", "tie=false"), ("--share_order=cycle", "share_order=cycle"), ("--embd_rank=-1", "embd_rank=-1"),
    ("--window=0", "window=0"), ("--window_pattern=sl", "window_pattern=sl"), ("--rank=-1", "rank=-1"),
    ("--share=0", "share=0"), ("--rank=769", "n_embd=768"), ("--embd_rank=769", "n_embd=768"),
    ("--rope_theta=0", "rope_theta=0"), ("--pos=none --rope_theta=10000", "needs --pos=rope")])
def test_a_bad_option_is_one_line(option, word, monkeypatch, capsys):
    bad(capsys, lambda: train("hybrid", monkeypatch, *option.split()), word)


def test_every_combination_equals_its_class_or_is_refused():
    """Of all 4,608 combinations of ingredients 168 are in transformers: their logits equal those of the class."""
    choices = dict(pos=["learned", "rope", "none"], norm=["layernorm", "rmsnorm"], bias=[False, True],
                   mlp=["gelu", "swiglu", "geglu", "relu2"], n_kv_head=[2, 4], qk_norm=["none", "rmsnorm", "layernorm"],
                   window_pattern=["L", "S", "SL", "LS"], embd_rank=[0, 24], tie=[False, True])
    idx = tokens(1, 32, vocab=96)
    found = collections.Counter()
    for values in itertools.product(*choices.values()):
        options = dict(zip(choices, values))
        try:
            name = train_hybrid.hf_class(small_config("hybrid", **options))
        except SystemExit:
            continue
        found[name] += 1
        model = small_hybrid(**options, n_embd=32, ffn_dim=48, vocab_size=96, window=8)
        logits, _ = model(idx)
        assert logits.std() > 0.1
        torch.testing.assert_close(train_hybrid.to_hf(model).eval()(idx).logits, logits, atol=1e-4, rtol=0)
    # activations x biases x key-value heads x norms of queries and keys x patterns x tied or not
    assert found == {
        "Llama": 2 * 2 * 2 * 1 * 1 * 2, "Arcee": 2 * 2 * 2 * 1 * 1 * 2, "SmolLM3": 2 * 2 * 2 * 1 * 1 * 2,
        "Mistral": 2 * 1 * 2 * 1 * 1 * 2, "Ministral": 2 * 1 * 2 * 1 * 2 * 2, "Qwen3": 2 * 1 * 2 * 1 * 4 * 2,
        "StableLm": 2 * 1 * 2 * 2 * 1 * 2, "Starcoder2": 2 * 2 * 2 * 1 * 2 * 2, "GPT2": 2 * 2 * 1 * 1 * 1 * 2,
        "OPT": 2 * 2 * 1 * 1 * 1 * 2}


@pytest.mark.parametrize("options, closest, missing", [
    (dict(pos="learned"), "Llama", "--pos=learned"),
    ({**GPT2, "n_kv_head": 2}, "Starcoder2", "--pos=learned"),
    ({**GPT2, "n_kv_head": 2, "embd_rank": 24}, "OPT", "--n_kv_head=2"),
    (dict(pos="none", norm="layernorm"), "SmolLM3", "--norm=layernorm"),
    (dict(mlp="gelu", qk_norm="rmsnorm", bias=True), "Arcee", "--qk_norm=rmsnorm"),
    (dict(mlp="gelu", window_pattern="SL", pos="none"), "Arcee", "--pos=none --window_pattern=SL"),
    (dict(qk_norm="layernorm"), "Llama", "--qk_norm=layernorm"),
    (dict(pos="none", mlp="gelu"), "Arcee", "--pos=none"),
    (dict(embd_rank=16), "Llama", "--embd_rank=16"),
    (dict(window_pattern="SL", norm="layernorm", mlp="gelu"), "Starcoder2", "--window_pattern=SL"),
    (dict(window_pattern="S", bias=True), "Llama", "--window_pattern=SS"),
    ({**GPT2, "embd_rank": 24, "norm_eps": 1e-6}, "GPT2", "--embd_rank=24")], ids=str)
def test_no_class_no_export(options, closest, missing, capsys):
    bad(capsys, lambda: train_hybrid.to_hf(small_hybrid(**options)), f"the closest, {closest}, lacks {missing}")


def test_residual_projections_start_by_the_number_of_passes():
    torch.manual_seed(0)
    for share in 1, 4:
        block = train_hybrid.Model(small_config("hybrid", n_layer=8, share=share)).model.layers[0]
        weights = torch.cat([block.self_attn.o_proj.weight.flatten(), block.mlp.down_proj.weight.flatten()])
        assert math.isclose(weights.std().item(), 0.02 / 4, rel_tol=0.03)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_kinds_of_parameters_have_their_rates(optimizer):
    rates = dict(embd_lr=2.0, head_lr=3.0, matrix_lr=4.0, vector_lr=5.0)
    options = dict(pos="learned", rank=8, embd_rank=16, tie=False, bias=True, norm="layernorm", qk_norm="layernorm")
    cfg = small_config("hybrid", **options, **rates, optimizer=optimizer)
    model = train_hybrid.Model(cfg)
    rate = {p: group["lr_scale"] for group in model.configure_optimizers(cfg, "cpu").param_groups
            for p in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        kind = ("vector" if p.dim() < 2 else "embd" if "embed_" in name else "head" if "lm_head" in name else "matrix")
        assert rate[p] == rates[f"{kind}_lr"], name


def test_zero_init_and_untied_heads():
    torch.manual_seed(0)
    model = train_hybrid.Model(small_config("hybrid", zero_init=True, tie=False, rank=8, embd_rank=16, n_layer=4))
    for name, p in model.named_parameters():
        zero = name.endswith("1.weight") and ("o_proj" in name or "down_proj" in name)
        assert p.any() != zero, name
    products = [m[1].weight @ m[0].weight for m in model.modules()
                if isinstance(m, torch.nn.Sequential) and m[1].weight.any()]
    assert math.isclose(torch.cat([p.flatten() for p in products]).std().item(), 0.02, rel_tol=0.05)
    embedding = model.model.embed_tokens.weight @ model.model.project_in.weight.T
    head = model.lm_head.weight @ model.model.project_out.weight
    assert math.isclose(embedding.std().item(), 0.02, rel_tol=0.05)
    assert math.isclose(head.std().item(), 0.02, rel_tol=0.05)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    idx = tokens(2, 32)
    optimizer = model.configure_optimizers(small_config("hybrid", tie=False, learning_rate=1e-3), "cpu")
    before = [p.clone() for p in model.parameters()]
    for _ in range(3):
        model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((p != q).any() for p, q in zip(model.parameters(), before))


MIXTURE = ["--n_layer=4", "--share=2", "--share_order=cycle", "--window_pattern=SL", "--window=8", "--rank=8",
           "--embd_rank=16", "--tie=false", "--head_lr=2", "--qk_norm=rmsnorm"]


def test_shared_weights_over_processes_and_resumed(monkeypatch):
    """Gradients of weights that several passes share are summed over processes once; a resumed run goes on as before,
    and its shared weights are still shared."""
    shards("data")
    options = [*quick("hybrid"), *MIXTURE, "--data_dir=data", "--hella_limit=0"]
    train("hybrid", monkeypatch, *options, "--log_dir=log/one")
    result = shell("train_hybrid.py", *options, "--log_dir=log/two", processes=2)
    assert result.returncode == 0, result.stderr
    for stream, tolerance in ("train", 1e-5), ("val", 1e-4), ("norm", 1e-4):
        assert stream_of(stream, "log/two") == pytest.approx(stream_of(stream, "log/one"), rel=tolerance)
    os.makedirs("log/resumed")
    os.link("log/one/model_00004.pt", "log/resumed/model_00004.pt")
    train("hybrid", monkeypatch, *options, "--log_dir=log/resumed", "--resume=auto")
    assert log_of("log/one").endswith(log_of("log/resumed"))
    weights = checkpoint_of("log/resumed")["model"]
    name = "model.layers.{}.self_attn.q_proj.1.weight"
    assert torch.equal(weights[name.format(0)], weights[name.format(2)])
    assert not torch.equal(weights[name.format(0)], weights[name.format(1)])


@pytest.mark.parametrize("options, graphs", [
    (dict(window_pattern="SL", n_layer=4), 4), (dict(window_pattern="SSL", n_layer=6, share=3), 4),
    (dict(rank=8, n_layer=4, share=2, share_order="cycle", embd_rank=16, tie=False), 3),
    ({**GPT2, "qk_norm": "layernorm"}, 3)], ids=str)
def test_compiled_it_is_the_same(options, graphs):
    """There is a graph for each kind of block, however many there are, and one each for the last norm and the loss."""
    model = small_hybrid(**options).train()
    idx = tokens(2, 64)
    expected = gradients_of(model, model(idx, idx)[1])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    ours = gradients_of(model, model(idx, idx)[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


EXPORTED = [rung for rung, (options, name) in LADDER.items() if options.get("pos") not in ("learned", "none")]


@pytest.mark.parametrize("rung", EXPORTED)
def test_an_export_names_the_rotation_for_other_readers(rung):
    """transformers 4, vLLM and llama.cpp read these names; with others they rotate by a default."""
    options, _ = LADDER[rung]
    train_hybrid.to_hf(small_hybrid(**options, rope_theta=1234.0)).save_pretrained("exported")
    with open("exported/config.json") as f:
        config = json.load(f)
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (1234.0, 1.0)
    assert config.get("rope_scaling") is None


OLD_READER = """
import torch, transformers
idx = torch.load("idx.pt")
for name, expected in torch.load("logits.pt").items():
    model = transformers.AutoModelForCausalLM.from_pretrained(name).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(idx).logits, expected, atol=1e-4, rtol=0, msg=name)
print(transformers.__version__)
"""


def test_transformers_4_reads_an_export():
    """One model of each class; transformers 4 has no Ministral."""
    folder = os.environ.get("OLD_TRANSFORMERS")
    if not folder:
        pytest.skip("OLD_TRANSFORMERS=FOLDER, as in test_models.py")
    idx = tokens(2, 48)
    logits = {}
    for options, name in LADDER.values():
        if name not in logits and name != "Ministral":
            model = small_hybrid(**options, **({} if name == "OPT" else {"norm_eps": 1e-3}))
            train_hybrid.to_hf(model).save_pretrained(name)
            logits[name] = model(idx)[0].detach()
    torch.save(idx, "idx.pt")
    torch.save(logits, "logits.pt")
    result = subprocess.run([sys.executable, "-c", OLD_READER], env={**os.environ, "PYTHONPATH": folder},
                            capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "4.57.1\n"), result.stderr
