"""
RWKV-7 "Goose" (Peng et al. 2025, arXiv 2503.14456; code: BlinkDL/RWKV-LM,
RWKV-v7/train_temp/src/model.py). It is a recurrent network: what it knows of the past is one matrix
per head and the last input of each mix, however long the past is. It differs from LLaMA 3 in these
points:
- The time mix replaces attention. Its state decays, forgets what a new key replaces and stores the
  new value under that key (the delta rule).
- The channel mix replaces the MLP: relu(x)^2 without a gate. Both mixes see each token mixed with
  the one before it.
- Low-rank matrices give the decay, the in-context learning rate (how much of the old value is
  removed), the value residual and the gate. LayerNorms have biases, and the head is not tied.
- Initialisation and training are the authors': weight decay only for linear layers and embeddings,
  AdamW betas of 0.9 and 0.99 and an epsilon of 1e-18, twice the learning rate for w0, and a
  gradient that pulls the largest logit of each token a little towards 0.
It has 122,606,080 parameters in 11 layers of width 640.

What to expect: it leads the small runs of the README, 0.2 ahead of Gemma 3 in validation loss, and
takes 1.5 times as long as GPT-2 there. It has no context limit: --sample takes prompts of any
length and reads each token once, with a state of constant size. --export writes model.pth for RWKV
runners, with the run's tokenizer. On NVIDIA's GPUs from Ampere on, bf16 and float16 runs use a
Triton kernel for the time mix, which has not run on a GPU yet. Elsewhere plain PyTorch computes it,
whose memory traffic limits the speed; --recompute saves memory there and costs time.

Run it:
  python train_rwkv.py --tiny                # a small model on built-in text, minutes on a CPU
  python train_rwkv.py                       # one GPU, after python fineweb.py
  torchrun --nproc_per_node=8 train_rwkv.py  # eight GPUs: the same result, sooner
  torchrun --nproc_per_node=8 train_rwkv.py --resume=auto
  python train_rwkv.py --sample="Hello, I'm a language model,"
and on each of two nodes, where HOST is the address of one of them:
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST train_rwkv.py
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from common import (RunConfig, ShardLoader, accumulation_steps, configure_compiler, cosine_lr,
                    init_world, parse_args, row_losses)
from fineweb import get_tokenizer, one_line_errors, vocab_of
from hellaswag import load_hellaswag
from muon import Muon, Optimizers
from run import Run, check_memory, use_checkpoint

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:  # PyTorch's builds for CPUs and for Windows come without Triton
    triton = constexpr = None

    def jit(kernel):
        return kernel

ARCH = "rwkv"


@dataclass
class Config(RunConfig):
    # model
    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50304  # size of the embedding; by default the tokens of data_dir and padding
    n_layer: int = 11  # number of blocks
    n_embd: int = 640  # width of the residual stream
    head_dim: int = 64  # width of a head, whose state is head_dim x head_dim
    ffn_dim: int = 2560  # hidden width of the channel mix
    # training
    total_batch_size: int = 524288  # tokens per step
    batch_size: int = 32  # sequences per device and micro-batch; lower it if memory runs out
    max_steps: int = 19073  # number of steps; by default 10.0B of FineWeb 10BT's 10.3B tokens
    warmup_steps: int = 715  # steps of linear warm-up; by default 375M tokens, as GPT-3
    learning_rate: float = 6e-4  # peak learning rate (GPT-3, table 2.1)
    min_lr_ratio: float = 0.1  # learning rate at the end of the cosine, as a fraction of the peak
    weight_decay: float = 0.1  # weight decay of linear layers and embeddings
    beta1: float = 0.9  # AdamW: decay rate of the running mean of gradients
    beta2: float = 0.99  # AdamW: decay rate of the running mean of squares (the authors' value)
    grad_clip: float = 1.0  # largest global norm of the gradient; 0: no clipping
    optimizer: str = "adamw"  # adamw, or muon for the matrices in the blocks and AdamW for the rest
    embd_lr: float = 1.0  # multiple of the learning rate for the embedding
    head_lr: float = 1.0  # the same for the head
    matrix_lr: float = 1.0  # the same for the matrices in the blocks
    vector_lr: float = 1.0  # the same for all other parameters
    chunk_size: int = 64  # tokens per chunk of the time mix (8 to 128): changes speed, not results
    recompute: bool = False  # recompute the time mix in the backward pass: less memory, slower
    # run: see RunConfig in common.py
    log_dir: str = f"log/{ARCH}"
    training_options = RunConfig.training_options | {"chunk_size", "recompute"}

    def __post_init__(self):
        if self.n_embd % self.head_dim or self.head_dim < 2:
            raise ValueError(f"--n_embd={self.n_embd} must be a multiple of "
                             f"--head_dim={self.head_dim}, which is at least 2")
        if self.chunk_size not in (8, 16, 32, 64, 128):  # more would overflow float32
            raise ValueError(f"--chunk_size={self.chunk_size} must be 8, 16, 32, 64 or 128")

    def rank(self, factor):
        """Return the rank of a low-rank matrix: factor x sqrt(n_embd) in multiples of 32, not 0."""
        return max(32, round(factor * self.n_embd ** 0.5 / 32) * 32)


TINY = dict(block_size=64, n_layer=3, n_embd=128, head_dim=32, ffn_dim=512,
            log_dir=f"log/{ARCH}-tiny")


def shift(x, last):
    """Return each token's predecessor: x (B, T, C), last (B, C), the one before x -> (B, T, C)."""
    return torch.cat([last.unsqueeze(1).type_as(x), x[:, :-1]], dim=1)


def wkv_step(r, log_w, k, v, a, b, state):
    """Return y and the new state after one token: the definition of the time mix (section 3),
        S = S diag(w) + (S a) b^T + v k^T,   y = S r
    Vectors are float32 (B, H, N). The state S is (B, H, N, N), its rows belong to values and its
    columns to keys. With a = -key and b = rate * key the middle term removes from the state what
    it holds under this key, at that rate, before the new value is stored."""
    a, r, v = a[..., None], r[..., None], v[..., None]
    b, k, w = b[..., None, :], k[..., None, :], log_w.exp()[..., None, :]
    state = state * w + (state @ a) * b + v * k
    return (state @ r).squeeze(-1), state


class UnitLowerInverse(torch.autograd.Function):
    """The inverse (I - A)^-1 of a strictly lower triangular A (..., C, C), C = 8, 16, ... or 128.

    The diagonal blocks of 8 x 8 are inverted as (I + A) (I + A^2) (I + A^4), which is exact because
    their eighth power is 0. Then neighbouring blocks are merged. The same product for the whole
    chunk would take fewer steps, but its powers overflow float32 if keys repeat, as in "------"."""

    @staticmethod
    def forward(ctx, A):
        C, size = A.size(-1), 8

        def diagonal(size):
            """Return the diagonal blocks of A: (..., C / size, size, size)."""
            blocks = A.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
            return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)

        # elementwise, because TF32 matrix products are too coarse for these powers
        power = diagonal(size)
        X = torch.eye(size, device=A.device, dtype=A.dtype) + power
        for _ in range(2):
            power = (power.unsqueeze(-1) * power.unsqueeze(-3)).sum(-2)  # A^2, A^4
            X = X + (X.unsqueeze(-1) * power.unsqueeze(-3)).sum(-2)
        # merge neighbours: the inverse of [[P, 0], [-A, Q]] is [[P^-1, 0], [Q^-1 A P^-1, Q^-1]]
        while size < C:
            first, second = X[..., ::2, :, :], X[..., 1::2, :, :]  # P^-1 and Q^-1
            corner = second @ diagonal(2 * size)[..., size:, :size] @ first
            X = torch.cat([F.pad(first, (0, size)), torch.cat([corner, second], dim=-1)], dim=-2)
            size *= 2
        X = X.squeeze(-3)
        ctx.save_for_backward(X)
        return X

    @staticmethod
    def backward(ctx, gradient):
        X, = ctx.saved_tensors
        return X.mT @ gradient @ X.mT


def wkv(r, log_w, k, v, a, b, state, chunk):
    """Return what wkv_step gives for T tokens, by matrix products. r, log_w, k, v, a, b: float32
    (B, H, T, N). state: (B, H, N, N). Return y (B, H, T, N) and the state after the last token.

    The tokens are cut into chunks. In the formulas each row of r, k, v, a and b is a token of one
    chunk, and S is the transposed state before that chunk: its rows belong to keys. r, k, a, b and
    S are already multiplied by the decay between their token and the middle of the chunk. Row t of
    s is a_t S_{t-1}: minus what the state holds under the key of token t. It follows:
        (1) s = a S + tril(a b^T, -1) s + tril(a k^T, -1) v, which is solved for s:
        (2) s = W S + U   with   X = (I - tril(a b^T, -1))^-1,   W = X a,   U = X tril(a k^T, -1) v
        (3) the next S = (S + b^T s + k^T v) times the decay to the middle of the next chunk
        (4) y = r S + tril(r b^T) s + tril(r k^T) v
    Only (2) and (3) wait for the chunk before. As log_w > -0.6066, exponents in a chunk of C tokens
    stay below 0.6066 (C / 2 + 1), which is 20 for 64 tokens: exp(20) fits float32, not float16."""
    B, H, T, N = r.shape
    if T % chunk:
        r, log_w, k, v, a, b = (F.pad(x, (0, 0, 0, -T % chunk)) for x in (r, log_w, k, v, a, b))
    r, log_w, k, v, a, b = (x.reshape(B * H, -1, chunk, N) for x in (r, log_w, k, v, a, b))
    log_decay = log_w.cumsum(dim=-2)  # (B H, T / chunk, chunk, N), as all of them now
    end = log_decay[..., -1:, :]
    middle = log_decay[..., chunk // 2, None, :].detach()  # y does not depend on it
    next_middle = torch.cat([middle[:, 1:], torch.zeros_like(middle[:, :1])], dim=1)
    a = a * (log_decay - log_w - middle).exp()
    r = r * (log_decay - middle).exp()
    b = b * (middle - log_decay).exp()
    k = k * (middle - log_decay).exp()
    X = UnitLowerInverse.apply((a @ b.mT).tril(-1))
    W = X @ a
    U = X @ ((a @ k.mT).tril(-1) @ v)
    kv = k.mT @ v
    onward = (end - middle + next_middle).exp().mT  # the decay from this middle to the next
    state = middle[:, 0].exp().mT * state.flatten(0, 1).mT
    states, removed = [], []
    chunks = zip(*(x.unbind(1) for x in (W, U, b.mT, kv, onward)))
    for W_i, U_i, b_i, kv_i, onward_i in chunks:
        states.append(state)
        removed.append(torch.baddbmm(U_i, W_i, state))  # (2)
        state = onward_i * torch.baddbmm(state + kv_i, b_i, removed[-1])  # (3)
    S, s = torch.stack(states, 1), torch.stack(removed, 1)
    y = r @ S + (r @ b.mT).tril() @ s + (r @ k.mT).tril() @ v  # (4)
    return y.view(B, H, -1, N)[:, :, :T], state.mT.unflatten(0, (B, H))


# ---- the same as one Triton kernel, and one for the backward pass -------------------------------

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
CHUNK = 16  # tokens per chunk of the kernels
# With at most 168 registers per thread, three programs share a multiprocessor: those of the default
# batch run all at once on an A100 or H100. This was chosen from compiler reports, not by timing.
LAUNCH = dict(num_warps=4, num_stages=1, maxnreg=168)


@jit
def load(tensor, places, mask):
    return tl.load(tensor + places, mask=mask, other=0.0).to(tl.float32)


@jit
def product(x, y, DTYPE: constexpr):
    """Return x y, summed in float32; the factors are rounded to DTYPE, float32 to TF32."""
    return tl.dot(x.to(DTYPE), y.to(DTYPE), input_precision="tf32")


@jit
def places_of(program, chunk, T, H, N: constexpr, C: constexpr):
    """Return where a chunk's vectors are in a tensor (B, T, H, N), as columns: (N, C), and which of
    its tokens exist: (1, C)."""
    token = chunk * C + tl.arange(0, C)[None, :]
    first = (program // H * T * H + program % H) * N  # an int64, as is program
    return first + token * (H * N) + tl.arange(0, N)[:, None], token < T


@jit
def decayed(r, log_w, k, a, b, g):
    """Return R, K, A and B of wkv_fused."""
    return r * tl.exp(g), k * tl.exp(-g), a * tl.exp(g - log_w), b * tl.exp(-g)


@jit
def wkv_forward_kernel(r_ptr, log_w_ptr, k_ptr, v_ptr, a_ptr, b_ptr, state_ptr,  # inputs
                       y_ptr, end_ptr, S_ptr, U_ptr, X_ptr,  # outputs
                       T, H, N: constexpr, C: constexpr, DTYPE: constexpr):
    program = tl.program_id(0).to(tl.int64)  # b H + h
    n_chunks = tl.cdiv(T, C)
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    square = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    S = tl.load(state_ptr + program * N * N + square)
    for chunk in range(n_chunks):
        place, exists = places_of(program, chunk, T, H, N, C)
        log_w = load(log_w_ptr, place, exists)
        r, k, v = load(r_ptr, place, exists), load(k_ptr, place, exists), load(v_ptr, place, exists)
        a, b = load(a_ptr, place, exists), load(b_ptr, place, exists)
        R, K, A, B = decayed(r, log_w, k, a, b, tl.cumsum(log_w, axis=1))
        ab = tl.where(i < t, product(B.T, A, DTYPE), 0.0)  # (1)
        ak = tl.where(i < t, product(K.T, A, DTYPE), 0.0)
        br = tl.where(i <= t, product(B.T, R, DTYPE), 0.0)
        kr = tl.where(i <= t, product(K.T, R, DTYPE), 0.0)
        # (2): invert blocks of 2 x 2, then merge neighbours to blocks of 4, 8 and 16
        X = tl.where(i == t, 1.0, tl.where(i // 2 == t // 2, ab, 0.0))
        for p in tl.static_range(1, 4):
            corner = tl.where((i >> p != t >> p) & (i >> (p + 1) == t >> (p + 1)), ab, 0.0)
            X += product(product(X, corner, DTYPE), X, DTYPE)
        U = product(product(S, A, DTYPE) + product(v, ak, DTYPE), X, DTYPE)  # (3)
        y = product(S, R, DTYPE) + product(U, br, DTYPE) + product(v, kr, DTYPE)  # (4)
        tl.store(S_ptr + (program * n_chunks + chunk) * N * N + square, S)
        tl.store(X_ptr + (program * n_chunks + chunk) * C * C + i * C + t, X)
        tl.store(U_ptr + place, U, mask=exists)
        tl.store(y_ptr + place, y, mask=exists)
        S = S + product(U, B.T, DTYPE) + product(v, K.T, DTYPE)  # (5)
        S = S * tl.exp(tl.sum(log_w, axis=1))[None, :]
    tl.store(end_ptr + program * N * N + square, S)


@jit
def wkv_backward_kernel(r_ptr, log_w_ptr, k_ptr, v_ptr, a_ptr, b_ptr, S_ptr, U_ptr, X_ptr,
                        dy_ptr, dend_ptr,  # inputs up to here
                        dr_ptr, dlog_w_ptr, dk_ptr, dv_ptr, da_ptr, db_ptr, dstate_ptr,  # outputs
                        T, H, N: constexpr, C: constexpr, DTYPE: constexpr):
    program = tl.program_id(0).to(tl.int64)
    n_chunks = tl.cdiv(T, C)
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    square = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    dS = tl.load(dend_ptr + program * N * N + square)
    for chunk in range(n_chunks - 1, -1, -1):
        place, exists = places_of(program, chunk, T, H, N, C)
        log_w = load(log_w_ptr, place, exists)
        r, k, v = load(r_ptr, place, exists), load(k_ptr, place, exists), load(v_ptr, place, exists)
        a, b = load(a_ptr, place, exists), load(b_ptr, place, exists)
        U, dy = load(U_ptr, place, exists), load(dy_ptr, place, exists)
        S = tl.load(S_ptr + (program * n_chunks + chunk) * N * N + square).to(tl.float32)
        X = tl.load(X_ptr + (program * n_chunks + chunk) * C * C + i * C + t).to(tl.float32)
        g = tl.cumsum(log_w, axis=1)
        R, K, A, B = decayed(r, log_w, k, a, b, g)
        ak = tl.where(i < t, product(K.T, A, DTYPE), 0.0)  # (1)
        br = tl.where(i <= t, product(B.T, R, DTYPE), 0.0)
        kr = tl.where(i <= t, product(K.T, R, DTYPE), 0.0)
        G = dS * tl.exp(tl.sum(log_w, axis=1))[None, :]  # (6)
        D = product(product(dy, br.T, DTYPE) + product(G, B, DTYPE), X.T, DTYPE)  # (7)
        dv = product(dy, kr.T, DTYPE) + product(G, K, DTYPE) + product(D, ak.T, DTYPE)  # (8)
        tl.store(dv_ptr + place, dv, mask=exists)
        dab = tl.where(i < t, product(U.T, D, DTYPE), 0.0)  # (9)
        dak = tl.where(i < t, product(v.T, D, DTYPE), 0.0)
        dbr = tl.where(i <= t, product(U.T, dy, DTYPE), 0.0)
        dkr = tl.where(i <= t, product(v.T, dy, DTYPE), 0.0)
        dA = product(S.T, D, DTYPE) + product(B, dab, DTYPE) + product(K, dak, DTYPE)  # (10)
        dR = product(S.T, dy, DTYPE) + product(B, dbr, DTYPE) + product(K, dkr, DTYPE)
        GU, Gv = product(G.T, U, DTYPE), product(G.T, v, DTYPE)
        dB = GU + product(A, dab.T, DTYPE) + product(R, dbr.T, DTYPE)  # (11)
        dK = Gv + product(A, dak.T, DTYPE) + product(R, dkr.T, DTYPE)
        dS = G + product(D, A.T, DTYPE) + product(dy, R.T, DTYPE)  # (12)
        da = dA * tl.exp(g - log_w)  # (13)
        dr = dR * tl.exp(g)
        db = dB * tl.exp(-g)
        dk = dK * tl.exp(-g)
        tl.store(da_ptr + place, da, mask=exists)
        tl.store(dr_ptr + place, dr, mask=exists)
        tl.store(db_ptr + place, db, mask=exists)
        tl.store(dk_ptr + place, dk, mask=exists)
        q = dr * r - dk * k + da * a - db * b  # (14)
        whole = tl.sum(G * S, axis=0) + tl.sum(GU * B + Gv * K + q, axis=1)
        dlog_w = whole[:, None] - tl.cumsum(q, axis=1) + q - da * a
        tl.store(dlog_w_ptr + place, dlog_w, mask=exists)
    tl.store(dstate_ptr + program * N * N + square, dS)


def launch(kernel, inputs, outputs):
    """Run a kernel. inputs and outputs: contiguous tensors, the first one of (B, T, H, N)."""
    B, T, H, N = inputs[0].shape
    # Triton's interpreter cannot multiply bfloat16
    is_float32 = INTERPRETED or inputs[0].dtype == torch.float32
    DTYPE = tl.float32 if is_float32 else tl.bfloat16
    kernel[(B * H,)](*inputs, *outputs, T, H, N, CHUNK, DTYPE, **LAUNCH)


def forward_outputs(inputs):
    """Return room for y, the last state, and S, U and X of each chunk for the backward pass."""
    r, *_, state = inputs
    B, T, H, N = r.shape
    n_chunks = (T + CHUNK - 1) // CHUNK
    return [torch.empty_like(r), torch.empty_like(state), r.new_empty(B, H, n_chunks, N, N),
            torch.empty_like(r), r.new_empty(B, H, n_chunks, CHUNK, CHUNK)]


def backward_outputs(inputs):
    """Return room for the gradients of r, log_w, k, v, a, b and state."""
    *vectors, S, U, X, dy, dend = inputs
    return [torch.empty_like(x) for x in (*vectors, dend)]


# custom operators: torch.compile needs only the shapes of what they return
@torch.library.custom_op("nanotitan::wkv_forward", mutates_args=())
def wkv_forward(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    outputs = forward_outputs(inputs)
    launch(wkv_forward_kernel, inputs, outputs)
    return outputs


@torch.library.custom_op("nanotitan::wkv_backward", mutates_args=())
def wkv_backward(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    outputs = backward_outputs(inputs)
    launch(wkv_backward_kernel, inputs, outputs)
    return outputs


wkv_forward.register_fake(forward_outputs)
wkv_backward.register_fake(backward_outputs)


class FusedWKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        inputs = [x.contiguous() for x in inputs]
        y, end, *kept = wkv_forward(inputs)
        ctx.save_for_backward(*inputs[:-1], *kept)
        return y, end

    @staticmethod
    def backward(ctx, dy, dend):
        return tuple(wkv_backward([*ctx.saved_tensors, dy.contiguous(), dend.contiguous()]))


def wkv_fused(r, log_w, k, v, a, b, state):
    """Return what wkv_step gives for T tokens, by one kernel. r, k, v, a, b: bfloat16 or float32
    (B, T, H, N). log_w: float32 (B, T, H, N). state: float32 (B, H, N, N). N: 16, 32 or 64. Return
    y (B, T, H, N) of r's type and the state after the last token.

    A program for each sequence and head walks through chunks of 16 tokens, with the state S in
    registers. In the formulas a column of r, k, v, a, b or y is a token of one chunk, a prime is
    the transpose, [i < t] keeps what is above the diagonal, g is the sum of log w from the start of
    the chunk up to each token, and E is the decay of the whole chunk, a number for each key.
        R = r e^g,  K = k e^-g,  A = a e^(g - log w),  B = b e^-g
        (1) ab, ak = [i < t] B'A, K'A,  br, kr = [i <= t] B'R, K'R
        (2) X = (I - ab)^-1
        (3) U = (S A + v ak) X, where column t is S_{t-1} a_t
        (4) y = S R + U br + v kr
        (5) the next S = (S + U B' + v K') E
    As log_w > -0.6066, exponents stay below 9.8. For the backward pass S, U and X are kept. Another
    kernel walks back through the chunks, with dS, the gradient of the state after the chunk:
        (6) G = dS E
        (7) D = (dy br' + G B) X', the gradient of S A + v ak
        (8) dv = dy kr' + G K + D ak'
        (9) dab, dak = [i < t] U'D, v'D,  dbr, dkr = [i <= t] U'dy, v'dy
        (10) dA = S'D + B dab + K dak,  dR = S'dy + B dbr + K dkr
        (11) dB = G'U + A dab' + R dbr',  dK = G'v + A dak' + R dkr'
        (12) dS before the chunk = G + D A' + dy R'
        (13) dr, dk, da and db are dR, dK, dA and dB, each times the exponential in R, K, A or B
        (14) the gradient of g is q = dr r - dk k + da a - db b. A token's log w is in g from this
             token on, in E, and, with the other sign, in A."""
    return FusedWKV.apply(r, log_w, k, v, a, b, state)


@torch.compiler.assume_constant_result
def has_kernel(device, dtype, N):
    """Return whether wkv_fused is to be used: in 16-bit runs on NVIDIA's GPUs from Ampere on, and
    everywhere in Triton's interpreter, which TRITON_INTERPRET=1 in the environment chooses."""
    if triton is None or N not in (16, 32, 64):
        return False
    if INTERPRETED:
        return True
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return (is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)
            and dtype in (torch.bfloat16, torch.float16))


def wkv_by_device(r, log_w, k, v, a, b, state, dtype, chunk):
    """Return y (B, T, H, N) and the state after T tokens, by the kernel or by wkv. r, log_w, k, v,
    a, b: float32 (B, T, H, N). dtype: the type of the run. In a 16-bit run the kernel reads and
    writes bfloat16, because k e^-g would overflow float16; log_w stays float32."""
    if has_kernel(r.device, dtype, r.size(-1)):
        kernel_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        r, k, v, a, b = (x.to(kernel_dtype) for x in (r, k, v, a, b))
        return wkv_fused(r, log_w, k, v, a, b, state)
    y, state = wkv(*(x.transpose(1, 2) for x in (r, log_w, k, v, a, b)), state, chunk)
    return y.transpose(1, 2), state


class TimeMix(nn.Module):
    """Attention's replacement. Names and initialisation of the parameters are the official code's:
        x_r, x_w, x_k, x_v, x_a, x_g   share of the token before in the input of r, w, k, v, a, g
        w0, w1, w2                     bias and low-rank matrices of the decay
        a0, a1, a2                     the same of the in-context learning rate, below `rate`
        v0, v1, v2                     the same of the value residual; not in the first layer
        g1, g2                         low-rank matrices of the gate
        k_k, k_a                       scales of the key to remove and of the key to store
        r_k                            weight of the bonus: the token's own value, past the state
        ln_x                           norm of each head's output
    """

    def __init__(self, cfg, layer):
        super().__init__()
        self.cfg = cfg
        self.first = layer == 0
        C, H, N = cfg.n_embd, cfg.n_embd // cfg.head_dim, cfg.head_dim
        depth = layer / max(1, cfg.n_layer - 1)  # 0 to 1
        remaining = 1 - layer / cfg.n_layer  # 1 to 1 / n_layer
        i = torch.arange(C)
        linear = i / (C - 1) - 0.5
        zigzag = (i % N - (N - 1) / 2) / ((N - 1) / 2)
        zigzag = zigzag * zigzag.abs()
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        for name, power in powers.items():
            mix = 1 - (i / C) ** (power * remaining)
            setattr(self, f"x_{name}", nn.Parameter(mix.view(1, 1, C)))
        ranks = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}
        for name in ["w", "a", "g"] if self.first else ["w", "a", "v", "g"]:
            rank = cfg.rank(ranks[name])
            setattr(self, f"{name}1", nn.Parameter(torch.zeros(C, rank)))
            setattr(self, f"{name}2", nn.Parameter(nn.init.orthogonal_(torch.empty(rank, C), 0.1)))
        w0 = -5.5 + 6 * (i / (C - 1)) ** (1 + depth ** 0.3) + 2.5 * zigzag
        self.w0 = nn.Parameter(w0.view(1, 1, C))
        self.a0 = nn.Parameter((-0.19 + 0.3 * zigzag + 0.4 * linear).view(1, 1, C))
        if not self.first:
            self.v0 = nn.Parameter((0.73 - 0.4 * linear).view(1, 1, C))
        self.k_k = nn.Parameter((0.71 - 0.1 * linear).view(1, 1, C))
        self.k_a = nn.Parameter(torch.full((1, 1, C), 1.02))
        self.r_k = nn.Parameter(torch.full((H, N), -0.04))
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, 0.1)
        nn.init.orthogonal_(self.value.weight)
        nn.init.zeros_(self.output.weight)
        self.ln_x = nn.GroupNorm(H, C, eps=64e-5)
        nn.init.constant_(self.ln_x.weight, ((1 + layer) / cfg.n_layer) ** 0.7)

    def forward(self, x, v_first, last, state):
        """Return y and the new v_first, last and state. v_first goes to the next layer; last and
        state go to the next tokens of this layer.

        x: (B, T, C). v_first: the first layer's v (B, T, C), None in the first layer. last: the
        input of the token before x (B, C). state: (B, H, N, N)."""
        B, T, C = x.shape
        change = shift(x, last) - x
        mixes = self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g
        xr, xw, xk, xv, xa, xg = (x + change * mix for mix in mixes)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # the logarithm of the decay, in (-0.6066, 0), stays in fp32: bf16 would be too coarse
        decay = self.w0 + (torch.tanh(xw @ self.w1) @ self.w2).float()
        log_w = -math.exp(-0.5) * torch.sigmoid(decay)
        if self.first:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)
        rate = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)
        g = torch.sigmoid(xg @ self.g1) @ self.g2

        def heads(x):
            """Split x into heads: float32 (B, T, H, N)."""
            return x.float().unflatten(-1, (-1, self.cfg.head_dim))

        removal_key = F.normalize(heads(k * self.k_k), dim=-1)
        r, k, v_heads = heads(r), heads(k * (1 + (rate - 1) * self.k_a)), heads(v)
        with torch.autocast(x.device.type, enabled=False):
            vectors = r, heads(log_w), k, v_heads, -removal_key, removal_key * heads(rate)
            if T == 1:
                y, state = wkv_step(*(z.squeeze(1) for z in vectors), state)
            elif self.cfg.recompute and self.training:
                y, state = checkpoint(wkv_by_device, *vectors, state, g.dtype,
                                      self.cfg.chunk_size, use_reentrant=False)
            else:
                y, state = wkv_by_device(*vectors, state, g.dtype, self.cfg.chunk_size)
        y = self.ln_x(y.reshape(B * T, C)).view(B, T, C)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v_heads
        y = y + bonus.reshape(B, T, C)
        return self.output(y.type_as(g) * g), v_first, x[:, -1], state


class ChannelMix(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        C = cfg.n_embd
        mix = 1 - (torch.arange(C) / C) ** ((1 - layer / cfg.n_layer) ** 4)
        self.x_k = nn.Parameter(mix.view(1, 1, C))
        self.key = nn.Linear(C, cfg.ffn_dim, bias=False)
        self.value = nn.Linear(cfg.ffn_dim, C, bias=False)
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)

    def forward(self, x, last):
        """Return y and the last token of x: x (B, T, C), the token before x (B, C)."""
        k = torch.relu(self.key(x + (shift(x, last) - x) * self.x_k))
        return self.value(k * k), x[:, -1]  # autocast would compute k ** 2 in fp32


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(cfg.n_embd)
        self.ln1 = nn.LayerNorm(cfg.n_embd)
        self.ln2 = nn.LayerNorm(cfg.n_embd)
        self.att = TimeMix(cfg, layer)
        self.ffn = ChannelMix(cfg, layer)

    def forward(self, x, v_first, state):
        att_last, ffn_last, memory = state
        y, v_first, att_last, memory = self.att(self.ln1(x).type_as(x), v_first, att_last, memory)
        x = x + y
        y, ffn_last = self.ffn(self.ln2(x).type_as(x), ffn_last)
        return x + y, v_first, (att_last, ffn_last, memory)


class Model(nn.Module):
    """Parameters carry the names of the official checkpoints."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.emb = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.ln_out = nn.LayerNorm(cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, 0.5 * max(1, cfg.vocab_size / cfg.n_embd) ** 0.5)

    def new_state(self, batch_size):
        """Return what each layer knows of the past before the first token: the last inputs of
        its two mixes (B, C) and its memory (B, H, N, N), all float32."""
        C, N = self.cfg.n_embd, self.cfg.head_dim
        zeros = self.emb.weight.new_zeros
        return [(zeros(batch_size, C), zeros(batch_size, C), zeros(batch_size, C // N, N, N))
                for _ in self.blocks]

    def hidden(self, idx, state=None):
        """Return what lm_head turns into logits: idx int64 (B, T) -> (B, T, C). With a state it
        continues from there, and updates the state."""
        if state is None:
            state = self.new_state(len(idx))
        x = self.blocks[0].ln0(self.emb(idx))
        v_first = None
        if torch.is_autocast_enabled(idx.device.type):
            # a bf16 residual stream halves the memory traffic between matrix products
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        for i, block in enumerate(self.blocks):
            x, v_first, state[i] = block(x, v_first, state[i])
        return self.ln_out(x)

    def lm_head(self, hidden):
        return self.head(hidden)  # common.py calls the head by this name

    def loss(self, hidden, targets):
        """Return the cross-entropy. In training its gradient also pulls the largest logit of
        each token a little towards 0 (L2Wrap in model.py)."""
        logits = self.head(hidden).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        if not self.training:
            return loss
        pull = 0.5e-4 * logits.amax(-1).square().mean()
        return loss + (pull - pull.detach())  # adds only to the gradient

    def forward(self, idx, targets=None):
        """Return (logits, None), or (None, loss) if there are targets.

        idx and targets: int64 (B, T), where a target of -1 does not count. logits: float32
        (B, T, vocab_size). loss: the mean cross-entropy of the next token, a scalar."""
        hidden = self.hidden(idx)
        if targets is None:
            return self.head(hidden).float(), None
        return None, self.loss(hidden, targets)

    def compile(self, **options):
        """Compile each block and the loss separately. All blocks but the first share a graph, so
        that this takes seconds; DDP sums a block's gradients while those of the block before are
        computed."""
        for block in self.blocks:
            block.compile(**options)
        self.loss = torch.compile(self.loss, **options)

    def num_params(self):
        total = sum(p.numel() for p in self.parameters())
        embedding = self.emb.weight.numel() + self.head.weight.numel()
        return {"total": total, "active": total, "non_embedding": total - embedding}

    def flops_per_token(self):
        """Return the FLOPs of forward and backward pass: 6 N, and 27 d D per layer. N excludes
        the embedding, which is in no matrix product. A forward step of the state, D x D in each
        of d / D heads, takes 9 D^2; what the form with chunks computes on top of that is not
        counted."""
        cfg = self.cfg
        n = self.num_params()["total"] - self.emb.weight.numel()
        return 6 * n + 27 * cfg.n_layer * cfg.n_embd * cfg.head_dim

    def configure_optimizers(self, cfg, device_type):
        """Return a fused AdamW, with weight decay only for the weights of linear layers and
        embeddings, and twice the learning rate for w0 (model.py). With --optimizer=muon the
        linear layers in the blocks go to Muon instead."""
        embd = {"params": [self.emb.weight],
                "weight_decay": cfg.weight_decay, "lr_scale": cfg.embd_lr}
        head = {"params": [self.head.weight],
                "weight_decay": cfg.weight_decay, "lr_scale": cfg.head_lr}
        matrices = {"params": [m.weight for m in self.blocks.modules() if isinstance(m, nn.Linear)],
                    "weight_decay": cfg.weight_decay, "lr_scale": cfg.matrix_lr}
        w0 = {"params": [block.att.w0 for block in self.blocks],
              "weight_decay": 0.0, "lr_scale": 2 * cfg.vector_lr}
        grouped = {p for group in (embd, head, matrices, w0) for p in group["params"]}
        others = {"params": [p for p in self.parameters() if p not in grouped],
                  "weight_decay": 0.0, "lr_scale": cfg.vector_lr}
        muon = cfg.optimizer == "muon"
        adamw = torch.optim.AdamW(
            [embd, head, w0, others] if muon else [embd, head, matrices, w0, others],
            lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=1e-18,
            fused=device_type in ("cuda", "cpu"))
        return Optimizers([adamw, Muon([matrices], lr=cfg.learning_rate)]) if muon else adamw


def to_hf(model):
    """Return the weights of an official checkpoint, which --export writes as model.pth for RWKV
    runners, since transformers has no RWKV-7."""
    return model.state_dict()


@one_line_errors()
def main():
    cfg, mode = parse_args(Config, TINY)
    # ==== training loop: identical in every train_*.py ====
    if mode.sample is not None or mode.export is not None:
        return use_checkpoint(cfg, mode, ARCH, Config, Model, to_hf)
    world = init_world(cfg.device, cfg.dtype, cfg.seed)
    accumulation = accumulation_steps(cfg, world)
    train_loader = ShardLoader(cfg, "train", world, synthetic=mode.bench)
    tokenizer = None if mode.bench else get_tokenizer(vocab_of(cfg.data_dir), cfg.vocab_size)
    val_loader = ShardLoader(cfg, "val", world, tokenizer, synthetic=mode.bench)
    hellaswag = load_hellaswag(cfg, world, tokenizer)
    check_memory(cfg, world, Model, accumulation)
    model = Model(cfg).to(world.device)
    optimizer = model.configure_optimizers(cfg, world.device.type)
    # float16 has a narrow range: the loss is scaled, and an update with an overflow is skipped
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.dtype == "float16")
    # this loads the checkpoint that --resume names
    run = Run(cfg, ARCH, world, model, optimizer, scaler, val_loader, hellaswag, mode.bench)
    if cfg.compile:
        configure_compiler()
        model.compile(dynamic=False, fullgraph=True)
    ddp_model = model
    if world.size > 1:
        device_ids = None if world.device.type == "cpu" else [world.device]
        ddp_model = DDP(model, device_ids=device_ids, gradient_as_bucket_view=True,
                        bucket_cap_mb=100, broadcast_buffers=False)
    batches = train_loader.train_batches(run.start_step, accumulation)

    for step in range(run.start_step, cfg.max_steps + 1):  # `step` updates have been made
        last_step = step == cfg.max_steps

        # evaluate (a stopped run is evaluated after it resumes)
        if run.evaluation_due(step) and not run.stopping:
            run.flush()  # a run that has diverged ends here
            model.eval()
            streams = {"val": val_loader.val_tokens}
            if last_step and cfg.val_full_tokens:
                streams["val_full"] = cfg.val_full_tokens
            for stream, n_tokens in streams.items():
                table = val_loader.loss_table(n_tokens)
                with torch.no_grad(), world.autocast():
                    for rows, x, y in run.until_signal(val_loader.val_batches(n_tokens)):
                        table[rows] = row_losses(model, x, y, val_loader.token_bytes)
                run.log_val(step, stream, table)
            if hellaswag:
                run.log_hella(step, hellaswag.losses(model, run.until_signal))
            model.train()

        # sample
        if tokenizer and cfg.sample_interval and step and step % cfg.sample_interval == 0:
            run.show_sample(step, tokenizer)

        # save
        checkpoint_due = cfg.checkpoint_interval and step % cfg.checkpoint_interval == 0
        if last_step or run.stopping or (checkpoint_due and step > run.start_step):
            run.save(step)
        if last_step or run.stopping:
            break

        # train
        run.begin_update()
        lr = cosine_lr(cfg, step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]  # --embd_lr, --matrix_lr and so on
        train_loss = torch.zeros((), device=world.device)
        for micro_step in range(accumulation):
            x, y = next(batches)
            # DDP averages the gradients over the processes only in the last micro-step
            if world.size > 1:
                ddp_model.require_backward_grad_sync = micro_step == accumulation - 1
            with world.autocast():
                _, loss = ddp_model(x, y)
                loss = loss / accumulation
            scaler.scale(loss).backward()
            train_loss += loss.detach()
        scaler.unscale_(optimizer)
        # 0 means no clipping
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.log_train(step, train_loss, norm, lr)
    del ddp_model  # DDP must go before the process group, or the shutdown can deadlock
    run.close()
    # ==== end of training loop ====


if __name__ == "__main__":
    main()
