"""
These tests check train_hybrid.py: each combination of ingredients that transformers has is compared with its class, at
random weights; its ends are train_gpt2.py and train_llama.py.

    pytest -q test_hybrid.py
"""
import collections
import itertools
import math

import pytest
import torch

import train_gpt2
import train_hybrid
import train_llama
import train_mistral
from conftest import bad, log_of, quick, small_config, stream_of, tokens, train
from test_models import Mistake, edit, exact_gelu, option, replace_functional

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


def assert_same_model(model, hf):
    """Assert that logits, and the gradient of every parameter, are those of a model of transformers.

    Its gradients come back to our parameters through hf_weights, which repeats and multiplies them."""
    idx = tokens(2, 48)
    logits, _ = model(idx)
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, hf(idx).logits, atol=1e-4, rtol=0)
    parameters = dict(model.named_parameters())
    _, loss = model(idx[:, :-1], idx[:, 1:])
    ours = torch.autograd.grad(loss, parameters.values())
    theirs = dict(hf.named_parameters())
    gradients = dict(zip(theirs, torch.autograd.grad(hf(idx, labels=idx).loss, theirs.values())))
    name = type(hf).__name__.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    weights = train_hybrid.hf_weights(model.cfg, name, model.state_dict(keep_vars=True))
    shared = [key for key in theirs if key in weights]  # without the biases that we lack
    expected = torch.autograd.grad([weights[key] for key in shared], parameters.values(), [
        gradients[key] for key in shared])
    for key, a, b in zip(parameters, ours, expected):
        assert (a - b).norm() <= 1e-4 * b.norm(), key


@pytest.mark.parametrize("rung", LADDER)
def test_logits_and_gradients_equal_transformers(rung):
    options, name = LADDER[rung]
    model = small_hybrid(**options)
    hf = train_hybrid.to_hf(model).eval()
    assert type(hf).__name__ == ("GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    assert_same_model(model, hf)


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
    Mistake("window + 1", "windows", option(window=17)),
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
    """With GPT-2's settings it has GPT-2's initial weights, and its log but for rounding."""
    torch.manual_seed(0)
    gpt2 = train_gpt2.Model(small_config("gpt2"))
    torch.manual_seed(0)
    model = train_hybrid.Model(small_config("hybrid", **GPT2, ffn_dim=256))
    ours = train_gpt2.to_hf(gpt2).state_dict()
    for name, p in train_hybrid.to_hf(model).state_dict().items():
        assert torch.equal(p, ours[name]), name
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


@pytest.mark.parametrize("option, word", [
    ("--pos=alibi", "pos=alibi"), ("--norm=none", "norm=none"), ("--mlp=relu", "mlp=relu"),
    ("--qk_norm=l2", "qk_norm=l2"), ("--window_pattern=SX", "window_pattern=SX"),
    ("--window_pattern=", "window_pattern="), ("--share=5", "share=5"),
    ("--share_order=random", "share_order=random"), ("--n_kv_head=5", "n_kv_head=5"), ("--n_head=5", "n_head=5"),
    ("--head_lr=2", "tie=false"), ("--rank=-1", "rank=-1"), ("--share=0", "share=0")])
def test_a_bad_option_is_one_line(option, word, monkeypatch, capsys):
    bad(capsys, lambda: train("hybrid", monkeypatch, option), word)


def test_every_combination_equals_its_class_or_is_refused():
    """All 6,912 combinations of ingredients: 304 are in transformers, and their logits equal those of their classes."""
    choices = dict(pos=["learned", "rope", "none"], norm=["layernorm", "rmsnorm"], bias=[False, True],
                   mlp=["gelu", "swiglu", "geglu", "relu2"], n_kv_head=[2, 4], qk_norm=["none", "rmsnorm", "layernorm"],
                   window_pattern=["L", "S", "SL", "LS"], embd_rank=[0, 24], tie=[False, True])
    idx = tokens(1, 32)
    found = collections.Counter()
    for values in itertools.product(*choices.values()):
        options = dict(zip(choices, values))
        try:
            name = train_hybrid.hf_class(small_config("hybrid", **options))
        except SystemExit:
            found["none"] += 1
            continue
        found[name] += 1
        model = small_hybrid(**options, n_embd=32, ffn_dim=48, vocab_size=96, window=8)
        logits, _ = model(idx % 96)
        torch.testing.assert_close(train_hybrid.to_hf(model).eval()(idx % 96).logits, logits, atol=1e-4, rtol=0)
    print(found)


@pytest.mark.parametrize("options, closest, missing", [
    (dict(pos="learned"), "GPT2", "--norm=rmsnorm --mlp=swiglu --n_kv_head=2"),
    (dict(qk_norm="layernorm"), "Llama", "--qk_norm=layernorm"),
    (dict(pos="none", mlp="gelu"), "Arcee", "--pos=none"),
    (dict(embd_rank=16), "Llama", "--embd_rank=16"),
    (dict(window_pattern="SL", norm="layernorm", mlp="gelu"), "Starcoder2", "--window_pattern=SL"),
    (dict(window_pattern="S", bias=True), "Llama", "--window_pattern=SS"),
    ({**GPT2, "embd_rank": 24, "norm_eps": 1e-6}, "OPT", "--norm_eps=1e-06")], ids=str)
def test_no_class_no_export(options, closest, missing, capsys):
    bad(capsys, lambda: train_hybrid.to_hf(small_hybrid(**options)), f"the closest, {closest}, lacks {missing}")


def test_zero_init_and_untied_heads():
    torch.manual_seed(0)
    model = train_hybrid.Model(small_config("hybrid", zero_init=True, tie=False, rank=8, embd_rank=16, n_layer=4))
    for name, p in model.named_parameters():
        zero = name.endswith("1.weight") and ("o_proj" in name or "down_proj" in name)
        assert p.any() != zero, name
    products = [m[1].weight @ m[0].weight for m in model.modules()
                if isinstance(m, torch.nn.Sequential) and m[1].weight.any()]
    assert math.isclose(torch.cat([p.flatten() for p in products]).std().item(), 0.02, rel_tol=0.05)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    idx = tokens(2, 32)
    optimizer = model.configure_optimizers(small_config("hybrid", tie=False, learning_rate=1e-3), "cpu")
    before = [p.clone() for p in model.parameters()]
    for _ in range(3):
        model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((p != q).any() for p, q in zip(model.parameters(), before))
