"""
RWKV-7's Triton kernels are checked without a GPU: in Triton's interpreter against the float64 recurrence, and by
compiling them for an A100 and an H100. test_cuda.py checks them on a GPU.

    pip install triton                                          # elsewhere CUDA builds of PyTorch bring it
    pytest -q test_rwkv_kernel.py                               # this file alone
    TRITON_INTERPRET=1 pytest -q test_rwkv_kernel.py -k float64 # the kernels' results, test by test

The interpreter is chosen before Triton is imported, so a process of its own runs the tests that need it.
"""
import importlib.util
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

import train_rwkv
from conftest import ROOT, quick, small_model, stream_of, tokens, train
from test_models import WKV_MODES, naive_wkv, randn, relative_error, wkv_inputs

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language


def kernel_results(script, mode, T, N=64, device="cpu", dtype=torch.float32):
    """Return output, last state and the gradients of all seven inputs: (of wkv_fused, of the recurrence in float64).
    dtype is that of all inputs but log w and the state; both sides get what is rounded to it."""
    kinds = [torch.float32 if i in (1, 6) else dtype for i in range(7)]
    ours = [x.to(device, kind).requires_grad_() for x, kind in zip(wkv_inputs(mode, T, N), kinds)]
    inputs = [x.detach().double().requires_grad_() for x in ours]

    def with_gradients(y, state, inputs):
        gy, gs = randn(*y.shape, seed=0).to(device, dtype), randn(*state.shape, seed=1).to(device)
        return [y, state, *torch.autograd.grad((y * gy).sum() + (state * gs).sum(), inputs)]

    expected = with_gradients(*naive_wkv(*inputs), inputs)
    *vectors, state = ours
    y, state = script.wkv_fused(*(x.transpose(1, 2) for x in vectors), state)
    results = with_gradients(y.transpose(1, 2), state, ours)
    assert [x.dtype for x in results] == [dtype, torch.float32, *kinds]
    return results, expected


def kernel_error(*args, **options):
    """Return the largest relative error among what kernel_results returns."""
    return max(relative_error(x.double(), reference) for x, reference in zip(*kernel_results(*args, **options)))


def bf16_limit(mode):
    """Return the error that bf16 may have: rounding the exact result costs 3e-3, and repeated keys add up errors."""
    return 4e-2 if "repeated" in mode else 1.5e-2


MISTAKES = [  # a part of the source, and a wrong one
    ("U = product(product(S, A, DTYPE) + product(v, ak, DTYPE), X, DTYPE)",
     "U = product(product(S, A, DTYPE), X, DTYPE)"),
    ("tl.static_range(1, 4)", "tl.static_range(1, 3)"),
    ("product(S, R, DTYPE) + product(U, br, DTYPE)", "product(S, R, DTYPE)"),
    ("S = S * tl.exp(tl.sum(log_w, axis=1))[None, :]", "S = S * 1.0"),
    ("G = dS * tl.exp(tl.sum(log_w, axis=1))[None, :]  # (6)", "G = dS * 1.0"),
    ("D = product(product(dy, br.T, DTYPE) + product(G, B, DTYPE), X.T, DTYPE)",
     "D = product(product(dy, br.T, DTYPE) + product(G, B, DTYPE), X, DTYPE)"),
    ("dab = tl.where(i < t,", "dab = tl.where(i <= t,"),
    ("dS = G + product(D, A.T, DTYPE) + product(dy, R.T, DTYPE)  # (12)", "dS = G + product(dy, R.T, DTYPE)"),
    ("- tl.cumsum(q, axis=1) + q - da * a", "- tl.cumsum(q, axis=1) + q"),
]


if train_rwkv.INTERPRETED:
    @pytest.mark.parametrize("T", [1, 16, 63])
    @pytest.mark.parametrize("mode", WKV_MODES)
    def test_the_kernels_equal_the_recurrence_in_float64(mode, T):
        assert kernel_error(train_rwkv, mode, T) < 2e-5

    @triton.jit
    def product_in_bf16(x, y, DTYPE):
        """Round to the nearest bfloat16, which the interpreter itself does not do."""
        x, y = x.to(tl.int32, bitcast=True), y.to(tl.int32, bitcast=True)
        x, y = (x + 0x7FFF + (x >> 16 & 1)) & -0x10000, (y + 0x7FFF + (y >> 16 & 1)) & -0x10000
        return tl.dot(x.to(tl.float32, bitcast=True), y.to(tl.float32, bitcast=True))

    @pytest.mark.parametrize("mode", WKV_MODES)
    def test_products_in_bf16_are_close_enough(mode, monkeypatch):
        monkeypatch.setattr(train_rwkv, "product", product_in_bf16)
        assert 1e-3 < kernel_error(train_rwkv, mode, 63) < bf16_limit(mode)

    @pytest.mark.parametrize("N", [16, 32])
    def test_the_kernels_know_smaller_heads(N):
        assert kernel_error(train_rwkv, "mixed", 40, N) < 2e-5

    @pytest.mark.parametrize("right, wrong", MISTAKES)
    def test_mistakes_in_the_kernels_are_noticed(right, wrong, tmp_path):
        with open(f"{ROOT}/train_rwkv.py") as file:
            source = file.read()
        assert source.count(right) == 1
        path = tmp_path / "mistaken.py"
        path.write_text(source.replace(right, wrong).replace("nanotitan::", "mistaken::"))
        spec = importlib.util.spec_from_file_location("mistaken", path)
        script = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "mistaken", script)  # where dataclasses look for it
            spec.loader.exec_module(script)
        assert not kernel_error(script, "mixed", 63) < 1e-3

    def count_launches(monkeypatch):
        """Return a list that grows with each launch of a kernel."""
        calls, launch = [], train_rwkv.launch
        monkeypatch.setattr(train_rwkv, "launch", lambda *args: calls.append(args) or launch(*args))
        return calls

    def outputs_of(model, idx):
        """Return the loss of the next token and the gradients of all parameters."""
        model.zero_grad()
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    @pytest.mark.parametrize("way", ["eager", "recompute", "compiled"])
    def test_the_model_is_the_same_with_the_kernels(way, monkeypatch):
        """The context of 40 tokens is no multiple of a chunk. Compiled, the blocks are whole graphs."""
        model = small_model("rwkv", recompute=way == "recompute").train()
        idx = tokens(2, 41)
        with monkeypatch.context() as patch:
            patch.setattr(train_rwkv, "has_kernel", lambda *_: False)
            expected = outputs_of(model, idx)
        calls = count_launches(monkeypatch)
        if way == "compiled":
            torch._dynamo.reset()
            model.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        for ours, reference in zip(outputs_of(model, idx), expected):
            assert (ours - reference).norm() <= 1e-4 * reference.norm() + 1e-9
        passes = {"eager": 2, "recompute": 3, "compiled": 2}[way]  # of which one is backward
        assert len(calls) == passes * model.cfg.n_layer

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_runs_keep_the_decay_and_the_state_in_float32(dtype, monkeypatch):
        model = small_model("rwkv").train()
        idx = tokens(2, 41)
        expected, *_ = outputs_of(model, idx)
        calls = count_launches(monkeypatch)
        with torch.autocast("cpu", dtype):
            loss, *gradients = outputs_of(model, idx)
        assert abs(loss - expected) < 0.01 and all(x.isfinite().all() for x in gradients)
        for _, (r, log_w, k, v, a, b, *_), outputs in calls:
            assert all(x.dtype == torch.bfloat16 for x in (r, k, v, a, b))
            assert log_w.dtype == torch.float32 and (log_w != log_w.bfloat16()).float().mean() > 0.9
            assert outputs[1].dtype == torch.float32  # the last state, or the gradient of log w

    def test_the_operators_keep_the_rules_of_torch():
        vectors = [x.float().transpose(1, 2).contiguous() for x in wkv_inputs("random", 20, 16)[:-1]]
        inputs = [*vectors, randn(1, 2, 16, 16)]
        torch.library.opcheck(train_rwkv.wkv_forward, (inputs,))
        y, end, *kept = train_rwkv.wkv_forward(inputs)
        torch.library.opcheck(train_rwkv.wkv_backward, ([*vectors, *kept, y, end],))

    def test_a_run_is_the_same_with_the_kernels(monkeypatch):
        options = [*quick("rwkv"), "--max_steps=20", "--eval_interval=20", "--checkpoint_interval=0",
                   "--total_batch_size=128", "--val_tokens=128", "--val_full_tokens=0", "--log_dir=log/kernel"]
        calls = count_launches(monkeypatch)
        train("rwkv", monkeypatch, *options)
        assert len(calls) >= 2 * 20
        with monkeypatch.context() as patch:
            patch.setattr(train_rwkv, "has_kernel", lambda *_: False)
            train("rwkv", monkeypatch, *options, "--log_dir=log/plain")
        assert stream_of("train", "log/kernel") == pytest.approx(stream_of("train", "log/plain"), abs=1e-5)

else:
    def test_the_kernels_in_the_interpreter():
        """This file in Triton's interpreter."""
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
        assert re.search(r"^\d+ passed", result.stdout, re.M), result.stdout

    def test_the_script_runs_without_triton():
        code = ("import sys; sys.modules['triton'] = None; import torch, train_rwkv; assert train_rwkv.triton is None; "
                "model = train_rwkv.Model(train_rwkv.Config(n_layer=1, n_embd=64, vocab_size=64)); "
                "idx = torch.zeros(1, 20, dtype=torch.long); model(idx, idx)[1].backward()")
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    def resources(name, capability, launch):
        """Compile a kernel ahead of time; return registers and bytes of stack a thread, and shared memory in bytes."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        kernel = getattr(train_rwkv, name)
        constants = {"N": 64, "C": train_rwkv.CHUNK, "DTYPE": tl.bfloat16}
        float32 = {"log_w_ptr", "dlog_w_ptr", "state_ptr", "dstate_ptr", "end_ptr", "dend_ptr"}

        def type_of(argument):
            if argument in constants:
                return "constexpr"
            if argument in ("T", "H"):
                return "i32"
            return "*fp32" if argument in float32 else "*bf16"

        names = kernel.arg_names
        source = ASTSource(
            kernel, {argument: type_of(argument) for argument in names},
            constexprs={(names.index(key),): value for key, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i, key in enumerate(names) if type_of(key).startswith("*")})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
        tools = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([f"{tools}/cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        registers, stack = (int(re.search(rf"{word}:(\d+)", usage.stdout)[1]) for word in ("REG", "STACK"))
        return registers, stack, compiled.metadata.shared

    @pytest.mark.parametrize("name", ["wkv_forward_kernel", "wkv_backward_kernel"])
    @pytest.mark.parametrize("capability", [80, 90])
    def test_the_kernels_fit_an_a100_and_an_h100(name, capability, monkeypatch):
        """Three programs fit the registers and the shared memory of an A100's multiprocessor, and a thread spills less
        than 1 KB. Where far too much is asked of it, ptxas gives a thread 32 registers and spills everything."""
        monkeypatch.setenv("TRITON_CACHE_DIR", os.getcwd())
        registers, stack, shared = resources(name, capability, train_rwkv.LAUNCH)
        assert 100 < registers <= 65536 // (3 * 128)
        assert stack < 1024
        assert shared < 54 * 1024

    def test_too_few_registers_are_noticed(monkeypatch):
        """Negative control of the test above."""
        monkeypatch.setenv("TRITON_CACHE_DIR", os.getcwd())
        registers, stack, _ = resources("wkv_backward_kernel", 80, {**train_rwkv.LAUNCH, "maxnreg": 64})
        assert registers <= 64 and stack > 1024
