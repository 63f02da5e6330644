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

triton = pytest.importorskip("triton")


def kernel_error(script, mode, T, N=64, device="cpu", dtype=torch.float32):
    """Return the largest relative error of wkv_fused against the recurrence in float64: of its output, its last state,
    and the gradients of all seven inputs. dtype is that of all inputs but log w and the state."""
    inputs = [x.to(device).requires_grad_() for x in wkv_inputs(mode, T, N)]

    def with_gradients(y, state, inputs):
        gy, gs = (randn(*x.shape, seed=seed).to(x) for seed, x in enumerate((y, state)))
        return [y, state, *torch.autograd.grad((y * gy).sum() + (state * gs).sum(), inputs)]

    expected = with_gradients(*naive_wkv(*inputs), inputs)
    ours = [x.detach().to(torch.float32 if i in (1, 6) else dtype).requires_grad_() for i, x in enumerate(inputs)]
    *vectors, state = ours
    y, state = script.wkv_fused(*(x.transpose(1, 2) for x in vectors), state)
    results = with_gradients(y.transpose(1, 2), state, ours)
    return max(relative_error(x.double(), reference) for x, reference in zip(results, expected))


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

    def test_the_operators_keep_the_rules_of_torch():
        vectors = [x.float().transpose(1, 2).contiguous() for x in wkv_inputs("random", 20, 16)[:-1]]
        inputs = [*vectors, randn(1, 2, 16, 16)]
        checks = "test_schema", "test_faketensor"
        torch.library.opcheck(train_rwkv.wkv_forward, (inputs,), test_utils=checks)
        y, end, *kept = train_rwkv.wkv_forward(inputs)
        torch.library.opcheck(train_rwkv.wkv_backward, ([*vectors, *kept, y, end],), test_utils=checks)

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

    @pytest.mark.parametrize("name", ["wkv_forward_kernel", "wkv_backward_kernel"])
    @pytest.mark.parametrize("capability", [80, 90])
    def test_the_kernels_fit_an_a100_and_an_h100(name, capability):
        """Compiled ahead of time they keep their state in registers: it is not spilled beyond 1 KB of stack, and three
        programs fit the shared memory of an A100's multiprocessor."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        kernel = getattr(train_rwkv, name)
        constants = {"N": 64, "C": train_rwkv.CHUNK, "DTYPE": triton.language.bfloat16}
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
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=train_rwkv.LAUNCH)
        tools = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([f"{tools}/cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        assert 100 < int(re.search(r"REG:(\d+)", usage.stdout)[1]) <= 168
        assert int(re.search(r"STACK:(\d+)", usage.stdout)[1]) < 1024
        assert compiled.metadata.shared < 54 * 1024
