"""
plan.py is checked on a CPU: published laws at published sizes, the parts of every model, epochs, time, price, warnings,
and bad input.

    pytest -q test_plan.py                                 # this file alone; test_models.py says what to install
"""
import json
import math
import os
import re
import sys

import pytest

import fineweb
import plan
from conftest import ARCHS, BYTE_VOCAB, SCRIPTS, bad, tokens

PLAN_A = ["--n_layer=16", "--n_embd=320", "--n_head=5", "--n_kv_head=5", "--ffn_dim=854", "--vocab_size=50257"]


@pytest.fixture(autouse=True)
def no_forward_pass(monkeypatch):
    """Spare the forward pass that estimates the memory: 100 bytes, and 10 a row."""
    monkeypatch.setattr(plan, "estimate_memory", lambda *args, **options: (100, 10, 0.0))


def planned(capsys, monkeypatch, *options):
    """Return what plan.py prints."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *options])
    plan.main()
    return capsys.readouterr().out


def finished_run(folder, loss, n_params, max_steps, tokens_per_second=None, device="cpu", vocab_size=50304, vocab=None,
                 arch="gpt2", non_embedding=0):
    """Write log.txt and run.json of a finished run of steps of 1,000,000 tokens."""
    os.makedirs(folder)
    config = {"data_dir": "x", "vocab_size": vocab_size, "total_batch_size": 10**6, "max_steps": max_steps,
              "hellaswag_file": "h", "hella_limit": 0}
    info = {"arch": arch, "device": device, "flops_per_token": 6 * n_params, "tokens_per_second": tokens_per_second,
            "processes": 2, "config": config, "vocab": vocab,
            "params": {"total": n_params, "active": n_params, "non_embedding": non_embedding},
            "starts": [{"step": 0, "config": config}]}
    with open(f"{folder}/run.json", "w") as file:
        json.dump(info, file)
    with open(f"{folder}/log.txt", "w") as file:
        file.write(f"{max_steps - 1} train 1.0\n{max_steps} val {loss}\n")


@pytest.mark.parametrize("N, rows", [
    # the "40M" plan's own table says 4.75, 4.06, 3.87, 3.78, which follow from no published law
    (40e6, {"Hoffmann": [4.07, 3.58, 3.43, 3.36], "Besiroglu": [4.07, 3.54, 3.40, 3.33],
            "Muennighoff": [4.03, 3.56, 3.43, 3.36]}),
    (35.76e6, {"Hoffmann": [4.11, 3.62, 3.48, 3.40], "Besiroglu": [4.11, 3.59, 3.45, 3.38],
               "Muennighoff": [4.08, 3.60, 3.47, 3.41]}),
])
def test_laws(N, rows):
    for law, expected in rows.items():
        losses = [plan.predicted(N, D)[law] for D in (0.8e9, 4.14e9, 8.28e9, 12.42e9)]
        assert losses == pytest.approx(expected, abs=0.006)


def test_repeated_tokens_and_superfluous_parameters():
    """Muennighoff et al.: 2, 4, 8 and 16 epochs are worth 1.97, 3.73, 6.62 and 10.6; no number is worth 16.4."""
    worth = [plan.worth(epochs, 1, plan.R_TOKENS) for epochs in (0.5, 1, 2, 4, 8, 16, 10**6)]
    assert worth == pytest.approx([0.5, 1, 1.97, 3.73, 6.62, 10.6, 16.39], rel=3e-3)
    assert plan.worth(124e6, 0.051 * 80e6, plan.R_PARAMETERS) == pytest.approx(25.7e6, rel=3e-3)
    assert plan.predicted(124e6, 320e6, 80e6)["Muennighoff"] == pytest.approx(4.67, abs=0.005)
    assert plan.predicted(35.8e6, 320e6, 80e6)["Muennighoff"] == pytest.approx(4.77, abs=0.005)
    assert plan.predicted(1e8, 1e9, 1e9) == plan.predicted(1e8, 1e9)


def test_the_40m_plan(capsys, monkeypatch):
    """At 30% of the peak eight V100 do 1.08M tokens/s, not 50,000 to 150,000."""
    out = planned(capsys, monkeypatch, "llama", *PLAN_A, "--gpus=8xV100", "--mfu=0.3")
    assert "35,763,840, 35,763,840 per token" in out
    assert re.search(r"embedding +16,082,240 +45%\n", out)
    assert "FLOPs           277.5 M per token" in out
    assert 1.07e6 < float(re.search(r"([\d,]+) tokens/s", out)[1].replace(",", "")) < 1.09e6
    assert "V100 has no bfloat16" in out
    assert re.search(r"vocabulary of 50,257 is far from the 4,9\d\d", out)
    assert "memory          about 0.0 GiB" in out


@pytest.mark.parametrize("arch", ARCHS)
def test_parts(arch, capsys, monkeypatch):
    import torch
    with torch.device("meta"):
        model = SCRIPTS[arch].Model(SCRIPTS[arch].Config())
    parts, params = plan.count_parts(model), model.num_params()
    assert sum(parts.values()) == params["total"] + params.get("mtp", 0)
    assert parts["embedding"] + parts.get("head", 0) == params["total"] - params["non_embedding"]
    assert parts["norms"] == sum(p.numel() for name, p in model.named_parameters()
                                 if re.search(r"norm|ln", name) and not name.startswith("mtp"))
    assert parts["MLP"] > parts["attention"] > 10**6 or arch == "rwkv"


def test_the_nearest_finished_run_shifts_the_prediction(capsys, monkeypatch):
    out = planned(capsys, monkeypatch, "gpt2")
    assert "shifted       3.28, through llm.c's GPT-2: 3.27 after 10.26 B tokens" in out
    finished_run("log/far", 9.0, 10**6, 10)
    finished_run("log/other_vocabulary", 9.0, 124475904, 10000, vocab_size=320)
    finished_run("log/another_of_this_size", 9.0, 124475904, 10000, vocab={"sha256": "12ab"})
    assert planned(capsys, monkeypatch, "gpt2") == out
    finished_run("log/near", 3.5, 124475904, 10000)
    assert "shifted       3.50, through log/near: 3.50 after 10 B tokens" in planned(capsys, monkeypatch, "gpt2")
    assert "llm.c" in planned(capsys, monkeypatch, "gpt2", "--log=elsewhere")
    finished_run("broken/a", 3.5, 124475904, 10000)
    with open("broken/a/run.json", "w") as file:
        file.write("{")
    finished_run("broken/diverged", math.nan, 124475904, 10000)
    assert planned(capsys, monkeypatch, "gpt2", "--log=broken") == out
    # llm.c's run has 124.5e6 x 10.26e9: a plan of a hundredth of that, or less, is not shifted
    for steps, is_near in (250, True), (150, False):
        shifted = "shifted" in planned(capsys, monkeypatch, "gpt2", "--log=x", f"--max_steps={steps}")
        assert shifted == is_near


def test_a_finished_run_counts_one_matrix_of_the_vocabulary(capsys, monkeypatch):
    """RWKV's embedding and head are two matrices. A run with the loss that the laws predict shifts nothing."""
    loss = sum(plan.predicted(122606080 - 32194560, 1e10).values()) / 3
    finished_run("log/rwkv", loss, 122606080, 10000, arch="rwkv", non_embedding=122606080 - 2 * 32194560)
    out = planned(capsys, monkeypatch, "rwkv")
    assert f"shifted       {loss:.2f}, through log/rwkv: {loss:.2f} after 10 B tokens" in out
    finished_run("edited/rwkv", loss, 122606080, 10000, arch="rwkv", non_embedding=None)
    assert "through llm.c's" in planned(capsys, monkeypatch, "rwkv", "--log=edited")


def test_data_time_and_price(capsys, monkeypatch):
    os.mkdir("data")
    fineweb.write_shard("data/x_val_000000.bin", tokens(5000, vocab=256).numpy())
    fineweb.write_shard("data/x_train_000001.bin", tokens(10240, vocab=256).numpy())
    with open("data/vocab.tiktoken", "w") as file:
        file.write(BYTE_VOCAB)
    size = ["--n_layer=2", "--n_embd=64", "--data_dir=data", "--block_size=64", "--total_batch_size=1024"]
    out = planned(capsys, monkeypatch, "llama", *size, "--max_steps=100", "--batch_size=16")
    assert "102,400, " in out
    assert "10,240 are unique, so 10.00 epochs, worth 80,017 fresh tokens" in out
    assert 10240 * (1 + 15.387756 * (1 - math.exp(-9 / 15.387756))) == pytest.approx(80017, abs=1)
    assert "warning         10.0 epochs" in out
    assert "shifted" not in out  # no run with this vocabulary
    assert "time            unknown: give --mfu" in out
    assert "batch_size=48" in planned(capsys, monkeypatch, "llama", *size, "--batch_size=48", "--max_steps=9")
    # a run on two H100 at half of the peak
    finished_run("log/x", 3.0, 10**8, 10, tokens_per_second=2 * 989.4e12 / 2 / 6e8, device="NVIDIA H100 80GB HBM3")
    out = planned(capsys, monkeypatch, "gpt2", "--gpus=4xH100", "--price=3")
    hours = 9999744000 / (4 * 989.4e12 / 2 / 855383040) / 3600
    assert f"{hours:.1f} hours on 4xH100" in out
    assert "(MFU 50% from log/x)" in out
    assert f"; {hours * 4 * 3:,.0f} USD" in out
    finished_run("log/y", 3.0, 10**8, 10, tokens_per_second=1e6, device="NVIDIA RTX A1000 Laptop GPU")
    assert "time            unknown: give --mfu" in planned(capsys, monkeypatch, "gpt2", "--gpus=1xA100")
    finished_run("log/z", 3.0, 10**8, 10, tokens_per_second=1e6, device="NVIDIA H100 NVL")
    assert planned(capsys, monkeypatch, "gpt2", "--gpus=4xH100", "--price=3") == out


def test_all_scripts_in_one_table(capsys, monkeypatch):
    lines = planned(capsys, monkeypatch, "all", "--gpus=8xA100", "--mfu=0.4").splitlines()
    assert [line.split()[1] for line in lines[2:]] == ARCHS


@pytest.mark.parametrize("options, says", [
    ("llama --gpus=A100", "--gpus=A100"),
    ("llama --gpus=0xA100", "--gpus=0xA100"),
    ("llama --gpus=8xTPU", "--gpus=8xTPU"),
    ("bert", "bert"),
    ("llama --n_layers=3", "--n_layer"),
    ("all --window=16", "unknown option --window=16 (train_deepseek.py --help"),
    ("llama --n_head=5", "n_head=5"),
    ("llama --max_steps=0", "--max_steps=0"),
    ("llama --mfu=40", "--mfu=40"),
    ("llama --mfu=nan", "--mfu=nan"),
    ("llama --price=-1", "--price=-1"),
    ("llama --price=nan", "--price=nan"),
    ("llama --budget=0", "--budget=0"),
])
def test_bad_options(options, says, capsys, monkeypatch):
    bad(capsys, lambda: planned(capsys, monkeypatch, *options.split()), says)
