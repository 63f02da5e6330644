"""
These tests check on an NVIDIA GPU what a CPU never runs: compiled bf16 models with flash attention, flex_attention and
grouped products. Without a GPU they are skipped, and test_models.py checks the same mathematics on a CPU.

    python -m pytest -q test_cuda.py
    python -m pytest -q -n 8 test_cuda.py     # with pytest-xdist, several at a time: most of the time is compilation
"""
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hellaswag
from common import World, configure_compiler
from conftest import ARCHS, SCRIPTS, Reduced, quick, small_model, stream_of, tokens, train
from test_mta import attention_by_sums, random_inputs
from test_models import WKV_MODES, naive_wkv, randn, relative_error, wkv_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
# wider than the small models of a CPU: heads of 64, and rows of two of flex_attention's blocks of 128
SHAPE = dict(n_layer=3, n_head=4, n_embd=256, head_dim=64, ffn_dim=512, block_size=256, window=100)
# DeepSeek's default widths of a head; SMALL has odd ones, for which there is no flash attention
HEADS = dict(qk_nope_head_dim=40, qk_rope_head_dim=24, v_head_dim=64)


@pytest.fixture(autouse=True)
def settings():
    """What init_world and the training loop set: TF32 products, and a backward pass as precise as the forward one."""
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("high")
    configure_compiler()
    yield
    torch.set_float32_matmul_precision("highest")


def errors(ours, reference):
    """Return |a - b| / |b| for each pair of tensors."""
    return [((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()
            for a, b in zip(ours, reference, strict=True)]


@pytest.mark.parametrize("arch, widths", [*((arch, {}) for arch in ARCHS), ("deepseek", HEADS)])
def test_cuda_compiled_gradients(arch, widths):
    """The compiled bf16 model has the loss and the gradient of every parameter of the fp32 model, as closely as bf16
    without compilation. PyTorch's issue 193061 is about gradients of norms that are silently wrong when compiled."""
    model = small_model(arch, **SHAPE, **widths).cuda().train()
    idx, targets = tokens(4, 256).cuda(), tokens(4, 256, seed=2).cuda()

    def results(autocast):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            _, loss = model(idx, targets)
        return [loss.detach(), *torch.autograd.grad(loss, model.parameters())]

    torch.set_float32_matmul_precision("highest")
    reference = results(autocast=False)
    torch.set_float32_matmul_precision("high")
    eager = errors(results(autocast=True), reference)
    model.compile(dynamic=False, fullgraph=True)
    compiled = errors(results(autocast=True), reference)
    names = ["loss", *(name for name, _ in model.named_parameters())]
    worst = max(range(len(names)), key=lambda i: compiled[i])
    print(f"{arch}: {names[worst]} differs most: {compiled[worst]:.4f}, uncompiled {eager[worst]:.4f}; "
          f"median {np.median(compiled):.4f}, uncompiled {np.median(eager):.4f}")
    wrong = {name: (ours, theirs) for name, ours, theirs in zip(names, compiled, eager) if ours > max(0.02, 2 * theirs)}
    assert not wrong


def test_cuda_flex_attention():
    """The window of Mistral and Gemma in bf16 is the masked attention of float64, forward and backward."""
    script = SCRIPTS["mistral"]
    B, T, window = 2, 512, 100
    q, k, v = (randn(B, heads, T, 64, seed=heads + i).cuda().requires_grad_() for i, heads in enumerate((4, 2, 2)))
    i = torch.arange(T, device="cuda")
    mask = (i[None] <= i[:, None]) & (i[:, None] - i[None] < window)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)
    gradient = randn(*expected.shape, seed=9).cuda()
    reference = [expected, *torch.autograd.grad(expected, (q, k, v), gradient.double())]
    block_mask = script.window_block_mask(T, window, "cuda")
    attention = torch.compile(script.sliding_window_attention, dynamic=False, fullgraph=True)
    for size, close in (window, True), (window + 1, False):
        block_mask = script.window_block_mask(T, size, "cuda")
        y = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), size, block_mask)
        ours = [y, *torch.autograd.grad(y, (q, k, v), gradient.bfloat16())]
        assert (max(errors(ours, reference)) < 0.01) == close, errors(ours, reference)


def test_cuda_key_query_attention():
    """MTA's attention with kernels, compiled in bf16, is the definition in float64, forward and backward."""
    inputs = [x.cuda().requires_grad_() for x in random_inputs(T=256, D=64)]
    expected = attention_by_sums(*inputs)
    gradient = randn(*expected.shape, seed=9).cuda()
    reference = [expected, *torch.autograd.grad(expected, inputs, gradient.double())]
    ours = [x.detach().float().requires_grad_() for x in inputs]
    attention = torch.compile(SCRIPTS["mta"].key_query_attention, dynamic=False, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = attention(*ours)
    found = errors([y, *torch.autograd.grad(y, ours, gradient.to(y))], reference)
    assert max(found) < 0.02, found


@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_grouped_experts(compiled):
    """F.grouped_mm in bf16 is every expert computed for every token in fp32; experts without tokens get no gradient."""
    experts = small_model("deepseek", **SHAPE).model.layers[1].mlp.experts.cuda()
    n = len(experts.down_proj)
    x = randn(512, 256).cuda().requires_grad_()
    chosen = torch.stack([torch.randperm(n - 2)[:4] for _ in range(512)]).cuda()  # the last two experts stay empty
    weight = torch.rand(512, 4, device="cuda")

    def results(y):
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *experts.parameters()])]

    torch.set_float32_matmul_precision("highest")
    reference = results(experts.compute_all_experts(x, chosen, weight))
    if compiled:
        experts.compile(dynamic=False, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        ours = results(experts(x, chosen, weight))
    assert max(errors(ours, reference)) < 0.02, errors(ours, reference)
    assert not any(gradient[-2:].any() for gradient in ours[2:])


@pytest.mark.parametrize("mode", WKV_MODES)
def test_cuda_time_mix(mode):
    """RWKV's products of chunks with TF32 are the recurrence in float64, within TF32's rounding."""
    *vectors, state = wkv_inputs(mode, 256)
    gradient = randn(1, 2, 256, 64, seed=3)

    def results(call, inputs):
        inputs = [x.requires_grad_() for x in inputs]
        y, new_state = call(inputs)
        return [y, new_state, *torch.autograd.grad(y, inputs, gradient.to(y))]

    reference = results(lambda inputs: naive_wkv(*inputs), [x.clone() for x in (*vectors, state)])
    inputs = [x.detach().float().cuda() for x in (*vectors, state)]
    ours = results(lambda inputs: SCRIPTS["rwkv"].wkv(*inputs, 64), inputs)
    found = errors([x.cpu() for x in ours], reference)
    print(mode, *(f"{error:.5f}" for error in found))
    assert max(found) < 0.02, found


def test_cuda_hellaswag(gpt2_bpe, hellaswag_items):
    """The compiled bf16 scores are those of fp32 on a CPU, but for near ties."""
    items = hellaswag_items[:400]
    model = small_model("llama", **{**SHAPE, "block_size": 192})

    def losses(device, compile):
        scorer = hellaswag.HellaSwag(items, Reduced(gpt2_bpe), 192, 16384, World(torch.device(device)), compile)
        return scorer.losses(model.to(device))

    reference = losses("cpu", False)
    eager = losses("cuda", False)
    model.compile(dynamic=False, fullgraph=True)
    compiled = losses("cuda", True)
    for ours in eager, compiled:
        assert ((ours - reference).abs() / reference).max() < 0.02
        assert (ours.argmin(1) != reference.argmin(1)).float().mean() < 0.05


@pytest.mark.parametrize("mode", WKV_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_rwkv_kernels(mode, dtype):
    """RWKV-7's kernels are as close to float64 as TF32 and bf16 allow, and give the same twice: nothing races. They
    train in bf16; float32 shows their mistakes more clearly."""
    from test_rwkv_kernel import bf16_limit, kernel_results
    for T in 1, 63, 200:
        results, expected = kernel_results(SCRIPTS["rwkv"], mode, T, device="cuda", dtype=dtype)
        again, _ = kernel_results(SCRIPTS["rwkv"], mode, T, device="cuda", dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(results, again))
        found = [relative_error(x.double(), reference) for x, reference in zip(results, expected)]
        print(f"{mode}, {dtype}, {T} tokens:", *(f"{error:.5f}" for error in found))
        assert max(found) < (bf16_limit(mode) if dtype == torch.bfloat16 else 2e-2), found


@pytest.mark.parametrize("arch, dtype", [*((arch, "bfloat16") for arch in ARCHS),
                                         ("gpt2", "float16"), ("rwkv", "float16")])
def test_cuda_run(arch, dtype, monkeypatch, capsys):
    """A compiled run trains, and one that lost its last checkpoint resumes with the same numbers, but for the order of
    sums. It writes samples of text."""
    options = [*quick(arch), "--device=cuda", "--compile", f"--dtype={dtype}", "--log_dir=log"]
    train(arch, monkeypatch, *options)
    whole = {name: stream_of(name, "log") for name in ("train", "norm", "val")}
    assert whole["train"][-1] < whole["train"][0]
    shutil.copytree("log", "killed")
    for name in "model_00008.pt", "model_00006.pt":
        os.remove(f"killed/{name}")
    train(arch, monkeypatch, *options, "--log_dir=killed", "--resume=auto")
    for name, values in whole.items():
        np.testing.assert_allclose(stream_of(name, "killed"), values, rtol=0.01)
    capsys.readouterr()
    train(arch, monkeypatch, *options, "--sample=The ")
    train(arch, monkeypatch, *options, "--sample=The ")
    first, second = capsys.readouterr().out[:-1].split("The ")[1:]
    assert first.strip() == second.strip() and len(first) > 20
