"""
These tests check train_mta.py, Multi-Token Attention. The reference is written here from the equations of the paper
(arXiv 2504.00927, sections 2 and 3), in float64, and reads the exported weights, which carry the names of the authors'
code: once as loops over plain numbers, and once as sums of shifted tensors, which have gradients. The authors' code
itself is not a package; train_mta.py was compared with it by hand.

    pytest -q test_mta.py
"""
import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import train_llama
import train_mta
from conftest import bad, checkpoint_of, quick, small_config, tokens, train, trained_model
from test_models import Mistake, assert_all_close, edit, option, randn, replace_function


# ---- the reference ---------------------------------------------------------------------------------------------------

def attention_by_loops(q, k, v, mixing_before, mixing_after, kernel_before, kernel_after):
    """Return y (M, T, D) of q (M, T, D), k and v (G, T, D), number by number. Kernels may be None."""
    M, T, D = q.shape
    group = [h // (M // len(k)) for h in range(M)]  # of a query head
    q, k, v, mixing_before, mixing_after = (x.tolist() for x in (q, k, v, mixing_before, mixing_after))
    square = [(i, j) for i in range(T) for j in range(T)]

    def convolve(x, kernel):
        """Equation 4: the sum over the lags i' = 0, 1, ... and j' = -S to S of theta[i', j'] x[i - i', j - j']."""
        if kernel is None:
            return x
        _, n_query, n_key = kernel.shape
        S = n_key // 2
        theta = kernel.flip(1, 2).tolist()  # the last row belongs to lag 0, the last column to lag -S
        y = [[[0.0] * T for _ in range(T)] for _ in range(M)]
        for h in range(M):
            for i, j in square:
                for i_lag in range(n_query):
                    for j_lag in range(-S, S + 1):
                        if i - i_lag >= 0 and 0 <= j - j_lag < T:
                            y[h][i][j] += theta[h][i_lag][j_lag + S] * x[h][i - i_lag][j - j_lag]
        return y

    def mix(x, mixing):
        return [[[sum(mixing[o][h] * x[h][i][j] for h in range(M)) for j in range(T)] for i in range(T)]
                for o in range(M)]

    scores = [[[0.0] * T for _ in range(T)] for _ in range(M)]
    for h in range(M):
        for i, j in square:
            if j <= i:  # equation 5: the score of a future key is 0 for the convolution
                scores[h][i][j] = sum(q[h][i][d] * k[group[h]][j][d] for d in range(D)) / math.sqrt(D)
    scores = mix(convolve(scores, kernel_before), mixing_before)
    weights = [[[0.0] * T for _ in range(T)] for _ in range(M)]
    for h in range(M):
        for i in range(T):
            powers = [math.exp(scores[h][i][j]) for j in range(i + 1)]
            for j in range(i + 1):
                weights[h][i][j] = powers[j] / sum(powers)
    weights = convolve(weights, kernel_after)
    for h in range(M):
        for i, j in square:
            if j > i:
                weights[h][i][j] = 0.0
    weights = mix(weights, mixing_after)
    y = [[[sum(weights[h][i][j] * v[group[h]][j][d] for j in range(T)) for d in range(D)] for i in range(T)]
         for h in range(M)]
    return torch.tensor(y, dtype=torch.float64)


def shifted_sum(x, kernel, allowed=None):
    """Return equation 4 for x (B, M, T, T): the sum over all lags of theta[i', j'] x[i - i', j - j']. Where `allowed`
    is False at (i, j - j'), the term is left out."""
    T = x.size(-1)
    _, n_query, n_key = kernel.shape
    S = n_key // 2
    y = torch.zeros_like(x)
    for i_lag in range(min(n_query, T)):
        x_i = torch.zeros_like(x)
        x_i[..., i_lag:, :] = x[..., :T - i_lag, :]
        if allowed is not None:
            x_i = torch.where(allowed, x_i, 0)
        for j_lag in range(-min(S, T - 1), min(S, T - 1) + 1):
            x_ij = torch.zeros_like(x)
            if j_lag >= 0:
                x_ij[..., j_lag:] = x_i[..., :T - j_lag]
            else:
                x_ij[..., :j_lag] = x_i[..., -j_lag:]
            y = y + kernel[:, n_query - 1 - i_lag, S - j_lag, None, None] * x_ij
    return y


def attention_by_sums(q, k, v, mixing_before, mixing_after, kernel_before=None, kernel_after=None, equation=5):
    """The same with a batch, by sums of shifted tensors. equation 4 masks only the keys after the last query."""
    _, M, T, D = q.shape
    k = torch.stack([k[:, h // (M // k.size(1))] for h in range(M)], 1)
    v = torch.stack([v[:, h // (M // v.size(1))] for h in range(M)], 1)
    i = torch.arange(T)
    past = (i <= i[:, None]).to(q.device)
    scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) / math.sqrt(D)
    if equation == 5:
        scores = torch.where(past, scores, 0)
    if kernel_before is not None:
        scores = shifted_sum(scores, kernel_before, allowed=past if equation == 4 else None)
    scores = (mixing_before[:, :, None, None] * scores[:, None]).sum(2)
    weights = torch.where(past, scores, -torch.inf).softmax(-1)
    if kernel_after is not None:
        weights = torch.where(past, shifted_sum(weights, kernel_after), 0)
    weights = (mixing_after[:, :, None, None] * weights[:, None]).sum(2)
    return (weights[..., None] * v[:, :, None]).sum(3)


def reference_logits(weights, cfg, idx):
    """Return the logits of the authors' model in float64; weights: theirs, by name. The layers 2, 6, 10, ... have
    kernels, or, in general, those whose names say so."""
    w = {name: x.double() for name, x in weights.items()}
    B, T = idx.shape
    D = cfg.n_embd // cfg.n_head
    wavelengths = cfg.rope_theta ** (-torch.arange(0, D, 2).double() / D)
    turn = torch.polar(torch.ones(T, D // 2).double(), torch.outer(torch.arange(T).double(), wavelengths))

    def norm(x, weight):
        return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + cfg.norm_eps)

    def rotate(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn[:, None]).flatten(-2)

    x = w["tok_embeddings.weight"][idx]
    for layer in range(cfg.n_layer):
        prefix = f"layers.{layer}."
        p = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
        z = norm(x, p["attention_norm.weight"])
        q, k, v = ((z @ p[f"attention.w{name}.weight"].T).view(B, T, -1, D) for name in "qkv")
        q, k, v = (y.transpose(1, 2) for y in (rotate(q), rotate(k), v))
        kernels = [p[f"attention.{name}"][:, 0] for name in ("mta_kernel", "mta_kernel_after_sm")
                   if f"attention.{name}" in p]
        y = attention_by_sums(q, k, v, p["attention.wpsm.weight"], p["attention.head_kernel"][0].T, *kernels)
        y = norm(y.transpose(1, 2), p["attention.subln.weight"])
        y = y * torch.sigmoid((y * p["attention.gate.weight"][0]).sum(-1, keepdim=True) + p["attention.gate.bias"])
        x = x + y.flatten(2) @ p["attention.wo.weight"].T
        z = norm(x, p["ffn_norm.weight"])
        gate, up = z @ p["feed_forward.w1.weight"].T, z @ p["feed_forward.w3.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ p["feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.tied_module.weight"].T


# ---- parity ----------------------------------------------------------------------------------------------------------

def random_model(**options):
    """Return a model of four layers, of which layer 2 has kernels, with all parameters random."""
    model = train_mta.Model(small_config("mta", n_layer=4, kq_period=4, **options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.1 if name.endswith("proj.weight") else 0.3
            p.copy_(torch.randn(p.shape, generator=generator) * std + float(p.dim() < 2))
    return model


def random_inputs(M=4, G=2, T=20, D=8, query_kernel=6, key_kernel=11, B=2, dtype=torch.float64):
    """Return q, k, v, both mixing matrices and both kernels."""
    shapes = [(B, M, T, D), (B, G, T, D), (B, G, T, D), (M, M), (M, M), *[(M, query_kernel, key_kernel)] * 2]
    return [randn(*shape, seed=seed, dtype=dtype) * (1.0 if seed < 3 else 0.3) for seed, shape in enumerate(shapes)]


def attention_by_convolution(q, k, v, mixing_before, mixing_after, kernel_before, kernel_after):
    """The definition with PyTorch's convolution, in which the mistakes below are made."""
    _, M, T, D = q.shape
    _, query_kernel, key_kernel = kernel_before.shape
    k, v = (x.repeat_interleave(M // x.size(1), dim=1) for x in (k, v))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)

    def convolve(x, kernel):
        beside = key_kernel // 2
        x = F.pad(x, (beside, beside, query_kernel - 1, 0))
        return F.conv2d(x, kernel[:, None], groups=M)

    scores = (q @ k.mT * D ** -0.5).masked_fill(future, 0)
    scores = torch.einsum("oh,bhij->boij", mixing_before, convolve(scores, kernel_before))
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    weights = convolve(weights, kernel_after).masked_fill(future, 0)
    return torch.einsum("oh,bhij->boij", mixing_after, weights) @ v


@pytest.mark.parametrize("shape", [
    dict(T=9), dict(T=14, G=4), dict(T=17, G=1, query_kernel=3, key_kernel=5), dict(T=9, query_kernel=2, key_kernel=9),
    dict(T=9, M=6, query_kernel=1, key_kernel=1), dict(T=1), dict(T=3)], ids=str)
def test_attention_equals_loops_over_numbers(shape):
    inputs = random_inputs(B=1, D=3, **shape)
    expected = attention_by_loops(*[x[0] for x in inputs[:3]], *inputs[3:])[None]
    for form in attention_by_sums, attention_by_convolution, train_mta.key_query_attention:
        torch.testing.assert_close(form(*inputs), expected, atol=1e-12, rtol=0)
    expected = attention_by_loops(*[x[0] for x in inputs[:3]], *inputs[3:5], None, None)[None]
    for form in attention_by_sums, train_mta.head_mixing_attention:
        torch.testing.assert_close(form(*inputs[:5]), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [
    dict(T=T, query_kernel=query_kernel, key_kernel=key_kernel)
    for T, query_kernel, key_kernel in [
        (70, 6, 11), (1, 6, 11), (2, 6, 11), (5, 6, 11), (7, 6, 11), (11, 6, 11), (12, 6, 11), (20, 3, 5), (20, 2, 9),
        (20, 6, 1), (20, 1, 7), (20, 1, 1), (20, 4, 41)]], ids=str)
def test_attention_has_the_gradients_of_the_definition(shape):
    """Gradients of queries, keys, values, mixing matrices and kernels in float64, also for texts shorter than a
    kernel."""
    inputs = [x.requires_grad_() for x in random_inputs(**shape)]
    expected = attention_by_sums(*inputs)
    gradient = randn(*expected.shape, seed=9, dtype=torch.float64)
    reference = torch.autograd.grad(expected, inputs, gradient, allow_unused=True)
    y = train_mta.key_query_attention(*inputs)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    assert_all_close(torch.autograd.grad(y, inputs, gradient), reference, atol=1e-11)
    expected = attention_by_sums(*inputs[:5])
    reference = torch.autograd.grad(expected, inputs[:5], gradient)
    y = train_mta.head_mixing_attention(*inputs[:5])
    assert_all_close(torch.autograd.grad(y, inputs[:5], gradient), reference, atol=1e-11)


@pytest.mark.parametrize("options", [
    dict(), dict(n_kv_head=4), dict(n_kv_head=1, query_kernel=3, key_kernel=5),
    dict(n_head=6, n_embd=96, n_kv_head=2, query_kernel=2, key_kernel=9)], ids=str)
def test_logits_and_gradients_equal_the_reference(options):
    model = random_model(**options)
    idx = tokens(2, 48)
    weights = {name: x.double().requires_grad_() for name, x in train_mta.to_hf(model).items()}
    weights["output.tied_module.weight"] = weights["tok_embeddings.weight"]
    expected = reference_logits(weights, model.cfg, idx)
    logits, _ = model(idx)
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, expected.float(), atol=1e-4, rtol=0)
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    reference = F.cross_entropy(expected[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    reference.backward()
    torch.testing.assert_close(loss, reference.float(), atol=1e-5, rtol=0)
    # gradients take the place of the weights, so that to_hf gives them the authors' names and shapes
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    for name, gradient in train_mta.to_hf(model).items():
        expected = weights[name].grad
        assert (gradient - expected).abs().max() < 1e-4 * expected.abs().max(), name


def test_mixed_heads_equal_x_transformers():
    """Lucidrains' package has attention whose heads mix; it adds its input to the first mix."""
    attend = pytest.importorskip("x_transformers.attend", reason="pip install x-transformers").Attend(
        heads=4, causal=True, pre_talking_heads=True, post_talking_heads=True)
    inputs = random_inputs(dtype=torch.float32)[:5]
    q, k, v, before, after = inputs
    attend.pre_softmax_talking_heads.weight.data.copy_((before - torch.eye(4))[:, :, None, None])
    attend.post_softmax_talking_heads.weight.data.copy_(after[:, :, None, None])
    expected, _ = attend(q, *(x.repeat_interleave(2, dim=1) for x in (k, v)))
    torch.testing.assert_close(train_mta.head_mixing_attention(*inputs), expected, atol=1e-5, rtol=0)
    wrong = train_mta.head_mixing_attention(q, k, v, before.T, after)
    assert (wrong - expected).abs().max() > 0.1


# ---- deliberate mistakes ---------------------------------------------------------------------------------------------

def edit_function(name, old, new):
    """Make a change that replaces a piece of text in a function of the script."""
    def change(model, script, patch):
        text = inspect.getsource(getattr(script, name))
        assert text.count(old) == 1
        namespace = {}
        exec(text.replace(old, new), vars(script), namespace)
        patch.setattr(script, name, namespace[name])
        return model
    return change


def definition(old, new):
    """Make a change that puts the definition, with a piece of its text replaced, in place of key-query attention."""
    text = inspect.getsource(attention_by_convolution)
    assert text.count(old) == 1
    namespace = {}
    exec(text.replace(old, new), globals(), namespace)
    return replace_function("key_query_attention", namespace["attention_by_convolution"])


def products(old, new):
    """Make a change in the script's key-query attention."""
    return edit_function("key_query_attention", old, new)


def attention(old, new):
    """Make a change in Attention.forward."""
    return edit("Attention.forward", old, new)


def kernels_in_layer(layer):
    """Make a change that moves the kernels from layer 2 to another one."""
    def change(model, script, patch):
        ours, other = (model.model.layers[i].self_attn for i in (2, layer))
        other.kernel_before, other.kernel_after = ours.kernel_before, ours.kernel_after
        ours.has_kernels, other.has_kernels = False, True
        return model
    return change


def equation_4(*args):
    """Mask only what lies in the future of the last query under the kernel."""
    return attention_by_sums(*args, equation=4)


KERNEL = "kernel[:, None]"
MIXING = "mixing = self.mixing_before, self.mixing_after"
PAIRS = "torch.block_diag(*[torch.ones(2, 2)] * 2)"
NORM = "self.norm(y.transpose(1, 2))"
MISTAKES = [
    # kernels
    Mistake("kernel reversed in queries", "mta", definition(KERNEL, "kernel.flip(1)[:, None]")),
    Mistake("kernel reversed in keys", "mta", definition(KERNEL, "kernel.flip(2)[:, None]")),
    Mistake("kernel reversed in both", "mta", definition(KERNEL, "kernel.flip(1, 2)[:, None]")),
    Mistake("one kernel for all heads", "mta", definition(KERNEL, "kernel[:1].expand_as(kernel)[:, None]")),
    Mistake("no first convolution", "mta", definition("convolve(scores, kernel_before)", "scores")),
    Mistake("no second convolution", "mta", definition("convolve(weights, kernel_after)", "weights")),
    Mistake("heads mixed before the convolution", "mta", definition(
        'torch.einsum("oh,bhij->boij", mixing_before, convolve(scores, kernel_before))',
        'convolve(torch.einsum("oh,bhij->boij", mixing_before, scores), kernel_before)')),
    Mistake("keys padded on the left", "mta", definition("(beside, beside,", "(2 * beside, 0,")),
    Mistake("keys padded on the right", "mta", definition("(beside, beside,", "(0, 2 * beside,")),
    Mistake("queries on both sides", "mta", definition(
        "query_kernel - 1, 0)", "query_kernel // 2, (query_kernel - 1) // 2)")),
    Mistake("rows normalised again", "mta", definition(
        "torch.einsum(\"oh,bhij->boij\", mixing_after, weights)",
        "torch.einsum(\"oh,bhij->boij\", mixing_after, weights / weights.sum(-1, keepdim=True))")),
    Mistake("kernels in layer 0", "mta", kernels_in_layer(0)),
    Mistake("kernels in layer 1", "mta", kernels_in_layer(1)),
    Mistake("kernels in layer 3", "mta", kernels_in_layer(3)),

    # masks
    Mistake("equation 4 for equation 5", "mta", replace_function("key_query_attention", equation_4)),
    Mistake("no mask before the convolution", "mta", definition(
        "(q @ k.mT * D ** -0.5).masked_fill(future, 0)", "(q @ k.mT * D ** -0.5)")),
    Mistake("no mask after the convolution", "mta", definition(
        "convolve(weights, kernel_after).masked_fill(future, 0)", "convolve(weights, kernel_after)")),

    # heads
    Mistake("first mixing transposed", "mta", attention(MIXING, "mixing = self.mixing_before.T, self.mixing_after")),
    Mistake("second mixing transposed", "mta", attention(MIXING, "mixing = self.mixing_before, self.mixing_after.T")),
    Mistake("both transposed", "mta", attention(MIXING, "mixing = self.mixing_before.T, self.mixing_after.T")),
    Mistake("mixing in pairs", "mta", attention(
        MIXING, f"mixing = self.mixing_before * {PAIRS}, self.mixing_after * {PAIRS}")),
    Mistake("k/v heads in turn", "mta", definition(
        "x.repeat_interleave(M // x.size(1), dim=1)", "x.repeat(1, M // x.size(1), 1, 1)")),
    Mistake("k/v heads in turn, without kernels", "mta", edit_function(
        "head_mixing_attention",
        'torch.einsum("ogh,bghtd->botgd", mixing_before.unflatten(1, (G, -1)),\n'
        "                           q.unflatten(1, (G, -1)))",
        'torch.einsum("ohg,bhgtd->botgd", mixing_before.unflatten(1, (-1, G)),\n'
        "                           q.unflatten(1, (-1, G)))")),
    Mistake("SDPA's own scale", "mta", edit_function("head_mixing_attention", "scale=D ** -0.5", "scale=None")),

    # norm and gate
    Mistake("no norm", "mta", attention(NORM, "y.transpose(1, 2)")),
    Mistake("norm over all heads", "mta", attention(
        NORM, "self.norm.weight * F.rms_norm(y.transpose(1, 2), y.transpose(1, 2).shape[2:], eps=1e-5)")),
    Mistake("LayerNorm", "mta", attention(
        NORM, "F.layer_norm(y.transpose(1, 2), (self.head_dim,), self.norm.weight, eps=1e-5)")),
    Mistake("eps", "mta", option(norm_eps=1e-6)),
    Mistake("gate in front of the norm", "mta", attention(
        "return self.o_proj((y * gate)", "y = z * torch.sigmoid((z * self.gate_weight).sum(-1, keepdim=True) "
        "+ self.gate_bias)\n    return self.o_proj((self.norm(y) * 1)".replace("z", "(y / self.norm.weight)"))),
    Mistake("no gate", "mta", attention("(y * gate)", "y")),
    Mistake("no bias of the gate", "mta", attention(" + self.gate_bias", "")),
    Mistake("depth scaling besides the gate", "mta", attention("(y * gate)", "(y * gate * 0.8)")),

    # LLaMA
    Mistake("theta of LLaMA", "mta", option(rope_theta=500000.0)),

    # the form without convolutions
    Mistake("no diagonals of scores", "mta", products(
        "torch.where(distance < n, from_diagonals(near_scores), scores)", "scores")),
    Mistake("too few diagonals of scores", "mta", products("n = before + beside + 1", "n = before")),
    Mistake("no diagonals of weights", "mta", products(
        'y = y + torch.einsum("bhnt,bnct->bhct", near_weights, neighbours(v, range(0, -reach, -1), 1))', "")),
    Mistake("diagonals of weights counted twice", "mta", products("weights.masked_fill(distance < n, 0)", "weights")),
    Mistake("too few diagonals of weights", "mta", products("n = beside + 1", "n = beside - 1")),
    Mistake("too short a reach of weights", "mta", products("reach = n + beside + before", "reach = n + beside")),
    Mistake("values reversed", "mta", products("around[::-1]", "around")),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_parity_notices(mistake, monkeypatch):
    """Each ingredient made wrong moves the logits by more than three times the tolerance of parity."""
    model = random_model()
    idx = tokens(2, 48)
    reference = reference_logits(train_mta.to_hf(model), model.cfg, idx).float()
    logits, _ = model(idx)
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=0)
    wrong, _ = mistake.change(copy.deepcopy(model), train_mta, monkeypatch)(idx)
    assert not (wrong - reference).abs().max() <= 3e-4


# ---- what it must do -------------------------------------------------------------------------------------------------

def test_the_reach_of_a_layer():
    """A row depends on the last 11 queries where there are kernels of 6, and on its own query elsewhere; on no future
    key or value, and on every past one."""
    inputs = [x.requires_grad_() for x in random_inputs(T=40, B=1)]
    q, k, v, *_ = inputs
    for y, reach in (train_mta.key_query_attention(*inputs), 10), (train_mta.head_mixing_attention(*inputs[:5]), 0):
        for row in 1, 5, 25, 39:
            gradients = torch.autograd.grad(y[:, :, row].sum(), (q, k, v), retain_graph=True)
            queries, keys, values = (g.abs().amax((0, 1, 3)) > 0 for g in gradients)
            assert queries.nonzero().flatten().tolist() == list(range(max(0, row - reach), row + 1))
            for seen in keys, values:
                assert not seen[row + 1:].any()
                assert seen[:row + 1].all()


def test_which_layers_have_kernels():
    for n_layer, period, expected in (12, 4, [2, 6, 10]), (4, 4, [2]), (6, 2, [1, 3, 5]), (3, 1, [0, 1, 2]), (2, 4, []):
        with torch.device("meta"):
            layers = train_mta.Model(train_mta.Config(n_layer=n_layer, kq_period=period)).model.layers
        assert [i for i, block in enumerate(layers) if block.self_attn.has_kernels] == expected


def test_it_starts_as_llama():
    """At the start attention in front of norm and gate is LLaMA's, and the gate is about a half."""
    torch.manual_seed(0)
    model = train_mta.Model(small_config("mta", n_layer=4, kq_period=4))
    q, k, v, *_ = random_inputs(T=40, dtype=torch.float32, D=16)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for layer, form in (0, train_mta.head_mixing_attention), (2, train_mta.key_query_attention):
        attn = model.model.layers[layer].self_attn
        kernels = (attn.kernel_before, attn.kernel_after) if layer == 2 else ()
        y = form(q, k, v, attn.mixing_before, attn.mixing_after, *kernels)
        torch.testing.assert_close(y, expected, atol=2e-6, rtol=0)
        assert (attn.norm.weight == 1).all() and attn.gate_bias == 0
    gates = torch.cat([block.self_attn.gate_weight for block in model.model.layers])
    assert 0.01 < gates.std() < 0.03
    llama = train_llama.Model(small_config("llama", n_layer=4))
    extra = model.num_params()["total"] - llama.num_params()["total"]
    assert extra == 4 * (2 * 4 * 4 + 2 * 16 + 1) + 2 * 4 * 6 * 11


def test_the_authors_initialisation():
    """With --init_std=0 a weight starts with the standard deviation 1 / sqrt(inputs)."""
    torch.manual_seed(0)
    layers = train_mta.Model(small_config("mta", init_std=0.0, n_embd=256, ffn_dim=512)).model.layers
    for block in layers:
        for p, inputs in ((block.self_attn.q_proj.weight, 256), (block.self_attn.o_proj.weight, 256),
                          (block.mlp.up_proj.weight, 256), (block.mlp.down_proj.weight, 512),
                          (torch.cat([block.self_attn.gate_weight for block in layers]), 256)):
            assert p.std().item() == pytest.approx(inputs**-0.5, rel=0.2 if p.dim() < 2 else 0.05)


def test_the_paper_shape_has_the_same_size():
    """12 key-value heads and an MLP of 8/3 of the width, as in the paper, have as many parameters."""
    with torch.device("meta"):
        model = train_mta.Model(train_mta.Config(n_kv_head=12, ffn_dim=2048))
    assert model.num_params()["total"] == 123_597_084


def test_right_padding_is_harmless():
    model = random_model()
    idx = tokens(2, 48)
    logits, _ = model(idx)
    padded = torch.cat([idx[:, :30], torch.zeros(2, 18, dtype=torch.long)], 1)
    padded_logits, _ = model(padded)
    torch.testing.assert_close(padded_logits[:, :30], logits[:, :30], atol=2e-5, rtol=0)


@pytest.mark.parametrize("form", [train_mta.head_mixing_attention, train_mta.key_query_attention])
def test_bf16_is_as_close_as_it_can_be(form):
    """Near the identity, values and gradients in bf16 are those of float64 but for bf16's rounding of 0.4%."""
    inputs = random_inputs(T=48, D=16)
    for mixing in inputs[3:5]:
        mixing.mul_(0.3).add_(torch.eye(4))
    for kernel in inputs[5:]:
        kernel.mul_(0.3)[:, -1, 5] += 1
    inputs = inputs[:5] if form is train_mta.head_mixing_attention else inputs
    gradient = randn(2, 4, 48, 16, seed=9)

    def results(call, inputs):
        inputs = [x.requires_grad_() for x in inputs]
        y = call(*inputs)
        return [y, *torch.autograd.grad(y, inputs, gradient.to(y))]

    reference = results(attention_by_sums, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(form, [x.detach().float() for x in inputs])
    for a, b in zip(ours, reference, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_compiled_it_has_two_kinds_of_block():
    """Compiled block by block there is one graph with kernels and one without, whatever the number of layers."""
    idx = tokens(2, 48)
    model = random_model().train()
    _, expected = model(idx, idx)
    expected_gradients = torch.autograd.grad(expected, model.parameters())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    _, loss = model(idx, idx)
    gradients = torch.autograd.grad(loss, model.parameters())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4  # two blocks, the norm and the loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for a, b in zip(gradients, expected_gradients):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_export_has_the_names_of_the_authors(monkeypatch, capsys):
    train("mta", monkeypatch, *quick("mta"))
    train("mta", monkeypatch, *quick("mta"), "--export=exported")
    weights = torch.load("exported/model.pth", weights_only=True)
    layer = {
        "attention.wq.weight": (32, 32), "attention.wk.weight": (16, 32), "attention.wv.weight": (16, 32),
        "attention.wo.weight": (32, 32), "attention.wpsm.weight": (2, 2), "attention.head_kernel": (1, 2, 2),
        "attention.mta_kernel": (2, 1, 6, 11), "attention.mta_kernel_after_sm": (2, 1, 6, 11),
        "attention.subln.weight": (16,), "attention.gate.weight": (1, 16), "attention.gate.bias": (1,),
        "attention_norm.weight": (32,), "ffn_norm.weight": (32,), "feed_forward.w1.weight": (96, 32),
        "feed_forward.w2.weight": (32, 96), "feed_forward.w3.weight": (96, 32)}
    expected = {"tok_embeddings.weight": (320, 32), "norm.weight": (32,), "output.tied_module.weight": (320, 32)}
    expected |= {f"layers.0.{name}": shape for name, shape in layer.items()}
    assert {name: tuple(w.shape) for name, w in weights.items()} == expected
    model = trained_model("mta")
    idx = tokens(1, 32, vocab=256)
    logits, _ = model(idx)
    torch.testing.assert_close(logits, reference_logits(weights, model.cfg, idx).float(), atol=1e-4, rtol=0)
    assert not torch.equal(checkpoint_of("log/mta-tiny")["model"]["model.layers.0.self_attn.kernel_before"],
                           train_mta.Model(model.cfg).model.layers[0].self_attn.kernel_before)  # it has learned
    bad(capsys, lambda: train("mta", monkeypatch, *quick("mta"), "--export=exported"), "not empty")
