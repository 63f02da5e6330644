"""
compare.py is checked on a CPU, on made-up folders and on two real runs: its ranking, its statistics, its remarks on
what cannot be compared, its plot, and its errors.

    pytest -q test_compare.py                              # this file alone; test_models.py says what to install
    pytest -q test_compare.py -k "sign or p_values"        # the statistics of HellaSwag
    pytest -q test_compare.py -k effects                   # those of --effects
    pytest -q test_compare.py -k vocabularies              # runs with different vocabularies

The references are scipy's binomial test, the table of McNemar's test, a simulation of equal models, made-up effects
that must be found again, and formulas in the test itself. The comparison with scipy is skipped where scipy is not
installed, the plot without matplotlib.
"""
import itertools
import json
import math
import os
import re
import shutil
import sys
import types

import numpy as np
import pytest

import compare
import hellaswag
from conftest import bad, quick, stream_of, train


def made_up(folder, arch="gpt2", val=4.0, hits=None, steps=1000, every=500, flops_per_token=8_000_000, **options):
    """Make a folder as a run leaves it behind; the validation loss falls by 1 every `every` steps, to val.

    hits says for each HellaSwag item whether it was right; options replace values of the run's config."""
    config = {
        "vocab_size": 50304,
        "total_batch_size": 1000,
        "max_steps": 1000,
        "warmup_steps": 10,
        "data_dir": "data",
        "beta2": 0.95,
        "hella_limit": 100,
        "hellaswag_file": "items",
        "seed": 1,
        "n_layer": 2,  # the order of the options does not matter
        **options,
    }
    run = {
        "arch": arch,
        "config": config,
        "params": {"total": 1234, "active": 1000, "non_embedding": 900},
        "device": "cpu",
        "flops_per_token": flops_per_token,
        "processes": 2,
        "tokens_per_second": 500,
    }
    os.makedirs(folder)
    evaluated = range(0, steps + 1, every)
    *_, last = evaluated
    with open(f"{folder}/log.txt", "w") as f:
        for step in range(steps):
            if step in evaluated:
                f.write(f"{step} val {val + (last - step) / every:.4f}\n")
            f.write(f"{step} train 4.0\n")
        if steps in evaluated:
            f.write(f"{steps} val {val:.4f}\n")
        if hits is not None:
            np.save(f"{folder}/hella_{steps}.npy", hits)
            f.write(f"{steps} hella {np.mean(hits):.4f}\n")
    write_json(f"{folder}/run.json", run)


def started(folder, *starts):
    """Give the run.json of a made-up run a list of starts: (step, what differs in its config), the last one on top."""
    run = read_json(f"{folder}/run.json")
    run["starts"] = [{"step": step, "config": run["config"] | options} for step, options in starts]
    run["config"] = run["starts"][-1]["config"]
    write_json(f"{folder}/run.json", run)


def read_json(path):
    """Return the object in a JSON file."""
    with open(path) as f:
        return json.load(f)


def write_json(path, content):
    """Write an object as JSON."""
    with open(path, "w") as f:
        json.dump(content, f)


def show(*arguments):
    """Call compare.py as if from the shell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare.py", *arguments])
        compare.main()


def compared(capsys, *arguments):
    """Return what compare.py prints for these arguments: the rows of its table as dicts, in order. A difference to the
    first line is under the column's name with a Δ in front; it is "-" in the first line, and where there is no table
    of them."""
    capsys.readouterr()
    show(*arguments)
    printed = capsys.readouterr().out
    rows, *second = [table_rows(lines) for lines in re.findall(r"(?:^\|.*\n?)+", printed, re.M)]
    titles = [column for column in rows[0] if column in ("bits per byte of endings", "gap of endings")]
    titles += [column for column in rows[0] if column in compare.LOSSES.values()] + ["points on HellaSwag"]
    none = {"p": "-", **{f"Δ {title}": "-" for title in titles}}
    differences = [none] * len(rows)
    if second:
        (second,) = second
        assert [row["model"] for row in second] == [row["model"] for row in rows[1:]]
        differences[1:] = [{"p": row["p"]} | {f"Δ {title}": row[title] for title in titles} for row in second]
    return [row | difference for row, difference in zip(rows, differences, strict=True)]


def table_rows(text):
    """Return the rows of a table in Markdown as dicts."""
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert set("".join(rule)) == {"-"}
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_sign_test_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in (0, 0), (0, 1), (5, 5), (1, 9), (10, 3), (120, 80), (3000, 2800), (6000, 4042):
        expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert compare.sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_the_table_ranks_and_compares(capsys):
    rng = np.random.default_rng(0)
    a = rng.random(100) < 0.4
    b = rng.random(100) < 0.3
    made_up("log/gpt2", val=3.5, hits=b)
    made_up("log/llama", "llama", 3.2, a, beta2=0.99)
    made_up("log/worse/phi", "phi", 3.9, b[:50], hella_limit=50)
    rows = compared(capsys)
    assert [row["model"] for row in rows] == ["llama", "gpt2", "phi"]
    first, second, third = rows
    assert first["parameters"] == "1,234"
    assert first["active"] == "1,000"
    assert first["tokens"] == "1,000,000"
    assert first["MFLOP/token"] == "8.0"
    assert first["tokens/s"] == "500 on 2 x cpu"
    assert first["validation loss"] == "3.2000"
    error = math.sqrt(a.mean() * (1 - a.mean()) / 100)
    assert first["HellaSwag acc_norm"] == f"{a.mean():.4f} ± {error:.4f}"
    assert first["remarks"] == "beta2=0.99"
    assert second["remarks"] == ""
    assert first["p"] == first["Δ points on HellaSwag"] == "-"
    # the table of McNemar's test
    only_a = int((a & ~b).sum())
    only_b = int((b & ~a).sum())
    difference = only_b - only_a  # of 100 items, so in points
    half = 1.9842 * math.sqrt((only_b + only_a - difference ** 2 / 100) * 100 / 99)  # t of 99 degrees of freedom
    interval = f"[{difference - half:+.2f}, {difference + half:+.2f}]"
    assert second["Δ points on HellaSwag"] == f"{difference:+.2f} {interval}"
    assert second["p"] == f"{compare.sign_test(only_b, only_a):.2g}"
    assert third["p"] == "-"  # other items
    assert compared(capsys, "log/worse", "log/gpt2", "log/llama/log.txt") == rows


def test_seeds_share_a_line(capsys):
    three, five, two = (np.arange(100) % 10 < k for k in (3, 5, 2))
    made_up("log/gpt2-1", val=3.5, hits=three, seed=1, log_dir="x", batch_size=4)
    made_up("log/gpt2-2", val=3.1, hits=five, seed=2, device="cuda", data_dir="/elsewhere/data/")
    made_up("log/rwkv", "rwkv", 3.4, two)
    first, second = compared(capsys)
    assert first["model"] == "gpt2"
    assert first["runs"] == "2"
    assert first["validation loss"] == "3.3000 (3.1000 to 3.5000)"
    # of the items both seeds have 0.3 right, and one of them another 0.2
    assert first["HellaSwag acc_norm"].startswith("0.4000 ± 0.0436 (0.3000 to 0.5000)")
    # two seeds of losses 3.1 and 3.5 against one: 12.7062 is the t of 1 degree of freedom
    half = 12.7062 * math.sqrt(0.08 * 1.5)
    assert second["Δ validation loss"] == f"+0.1000 [{0.1 - half:+.4f}, {0.1 + half:+.4f}]"
    assert second["Δ points on HellaSwag"].startswith("-20.00 [")

    made_up("log/gpt2-3", val=3.5, hits=three, seed=2)
    first, _ = compared(capsys)
    assert first["remarks"] == "a seed comes twice"
    os.symlink("..", "log/gpt2-3/up")
    os.symlink("gpt2-3", "log/latest")
    rows = compared(capsys, "log", "log/rwkv/log.txt", "log/latest")
    assert [row["runs"] for row in rows] == ["3", "1"]  # each once

    made_up("log/gpt2-4", val=3.0, hits=three, n_layer=5)  # another model
    remarks = {row["model"]: row["remarks"] for row in compared(capsys)}
    assert remarks == {"gpt2 (gpt2-4)": "", "gpt2 (gpt2-1)": "n_layer=2; a seed comes twice", "rwkv": ""}


def test_student_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in 1, 1.7, 4, 30, 1000, 1e5:
        for p in 0.4, 0.05, 1e-4:
            t = stats.t.isf(p / 2, freedom)
            assert compare.quantile(p, freedom) == pytest.approx(t, rel=5e-3)
            assert compare.p_value(-t, freedom) == pytest.approx(p, rel=5e-3)


def made_up_group(samples):
    """Return what compare.difference needs to know of a group: samples has what (runs, items) measured."""
    group = types.SimpleNamespace(
        results=[None] * len(samples), reasons=[], remarks=[], items="same", endings=None, losses=list(samples.mean(1)),
        samples={"acc": samples, "loss": samples})
    group.mean = lambda name: list(group.samples[name].mean(1))
    return group


@pytest.mark.parametrize("runs", [(1, 1), (2, 2, 2), (3, 1, 2, 2), (5, 3, 3, 3)])
@pytest.mark.parametrize("of_runs, of_cells, of_models", [(1, 0.5, 0), (0, 10, 0), (0.5, 10, 0), (0.5, 5, 5)])
def test_intervals_of_equal_architectures_cover_the_truth(runs, of_runs, of_cells, of_models):
    """95% intervals of the difference between equal models hold 0 in 93 to 97% of the cases: whether it is the runs
    that differ, what a run does with an item, or what a model does with it. One run against one is tested as a pair of
    checkpoints, so without a spread of runs."""
    if max(runs) == 1:
        of_runs = 0
        if not of_cells:
            return
    rng = np.random.default_rng(sum(runs))
    covered = even = 0
    repeats, n = 2000, 400
    for _ in range(repeats):
        items = rng.normal(0, 10, n)
        groups = []
        for n_runs in runs:
            per_run = rng.normal(0, of_runs, (n_runs, 1)) + rng.normal(0, of_cells, (n_runs, n))
            groups.append(made_up_group(3 + items + rng.normal(0, of_models, n) + per_run))
        d = compare.difference(*groups[:2], "loss", compare.pool(groups, "loss"))
        covered += abs(d.mean) < compare.quantile(0.05, d.freedom) * d.error
        even += d.p < 0.5
    assert 0.93 <= covered / repeats <= 0.97, covered / repeats
    assert 0.45 <= even / repeats <= 0.56, even / repeats


def test_p_values_of_equal_models_are_even():
    """For one run against one, and three against three, of the same model, one in twenty p-values of accuracy is below
    0.05."""
    rng = np.random.default_rng(0)
    for n_runs, most in (1, 60), (3, 70):
        chance = rng.beta(0.6, 1.4, 2000)  # of each item to be right
        low = 0
        for _ in range(1000):
            groups = [made_up_group((rng.random((n_runs, 2000)) < chance).astype(float)) for _ in range(2)]
            low += compare.difference(*groups, "acc", compare.pool(groups, "acc")).p < 0.05
        assert 25 <= low <= most, (n_runs, low)


def test_without_items_the_spread_of_seeds_is_the_error(capsys):
    """Another setting's seeds tell the spread; a seed that comes twice, and a run that cannot be compared, do not."""
    for seed, val in (1, 3.0), (2, 3.02), (3, 3.04):
        made_up(f"log/a{seed}", "gpt2", val, seed=seed)
    for name, val in ("b", 3.2), ("c", 3.3):
        made_up(f"log/{name}", name, val)
    made_up("log/d1", "phi", 3.9, seed=1)
    made_up("log/d2", "phi", 3.4, seed=1)
    made_up("log/e", "rwkv", 4.0, data_dir="other")
    rows = compared(capsys)
    half = 4.3027 * 0.02 * math.sqrt(1 / 3 + 1)  # t of 2 degrees of freedom
    assert rows[1]["Δ validation loss"] == f"+0.1800 [{0.18 - half:+.4f}, {0.18 + half:+.4f}]"
    assert rows[-1]["Δ validation loss"] == "-"
    show()
    text = capsys.readouterr().out
    assert "the spread between seeds (2 degrees of freedom)" in text
    smallest = (4.3027 + 1.0607) * 0.02 * math.sqrt(1 / 3 + 1)  # the second is the t with 20% above it
    assert f"find a true difference of {smallest:.4f} in validation loss." in text
    assert "One pair of seeds" not in text
    show("log/a1", "log/a2", "log/b")
    assert "(1 degrees of freedom)" in (text := capsys.readouterr().out) and "about 90% of such intervals" in text
    show("log/b", "log/c")
    assert "Differences" not in capsys.readouterr().out


def with_items(folder, losses, rows=None, step=1000):
    """Let a made-up run have HellaSwag's losses (items, 4), whose right ending is the first, and those of rows."""
    ones = np.ones(losses.shape, np.int32)
    n_bytes = np.tile(np.arange(len(losses), dtype=np.int32)[:, None] + 1, 4)
    np.savez(f"{folder}/hella_{step}.npz", losses=losses.astype(np.float32), tokens=ones, bytes=n_bytes,
             labels=np.zeros(len(losses), np.int64))
    add_to_log(folder, f"{step} hella {(losses.argmin(1) == 0).mean():.4f}")
    if rows is not None:
        np.save(f"{folder}/val_{step}.npy", rows.astype(np.float32))


def test_rows_and_endings_are_compared_in_pairs(capsys):
    """The differences are those of a loop; their intervals those of paired differences. A file of hellaswag.py --save
    is one line more."""
    rng = np.random.default_rng(0)
    losses = {name: rng.uniform(1, 9, (100, 4)) for name in "abr"}
    rows = {name: rng.normal(mean, 0.1, 64) for name, mean in (("a", 3), ("b", 3.1))}
    made_up("log/a", "llama", rows["a"].mean())
    made_up("log/b", "gpt2", rows["b"].mean())
    os.mkdir("elsewhere")
    add_to_log("elsewhere")
    for name in "ab":
        with_items(f"log/{name}", losses[name], rows[name])
    with_items("elsewhere", losses["r"])
    os.rename("elsewhere/hella_1000.npz", "gpt2-124M.npz")
    first, second, third = compared(capsys, "log", "gpt2-124M.npz")

    bpb, gap = {}, {}
    for name in "abr":
        nats = losses[name].astype(np.float32).astype(float)
        bpb[name] = nats[:, 0].sum() / sum(range(1, 101)) / math.log(2)
        gap[name] = np.mean([(nats[i, 1:].mean() - nats[i, 0]) / (i + 1) for i in range(100)])
    for row, name in zip((first, second, third), "abr"):
        assert row["bits per byte of endings"] == f"{bpb[name]:.4f}"
        assert row["gap of endings"] == f"{gap[name]:.5f}"
    d = (rows["b"] - rows["a"]).astype(np.float32)
    half = 1.9983 * d.std(ddof=1) / 8  # t of 63 degrees of freedom
    mean, low, high = map(float, re.findall(r"[-+.\d]+", second["Δ validation loss"]))
    assert (mean, low, high) == pytest.approx((d.mean(), d.mean() - half, d.mean() + half), abs=2e-4)
    assert second["Δ bits per byte of endings"].startswith(f"{bpb['b'] - bpb['a']:+.4f} [")
    assert second["Δ gap of endings"].startswith(f"{gap['b'] - gap['a']:+.5f} [")
    assert third["Δ bits per byte of endings"].startswith(f"{bpb['r'] - bpb['a']:+.4f} [")
    assert (third["model"], third["remarks"], third["Δ validation loss"]) == ("gpt2-124M", "HellaSwag only", "-")
    right = {name: losses[name].argmin(1) == 0 for name in "abr"}
    assert third["p"] == f"{compare.sign_test((right['r'] & ~right['a']).sum(), (right['a'] & ~right['r']).sum()):.2g}"
    with np.load("gpt2-124M.npz") as file:
        other = dict(file)
    other["bytes"] += 1
    np.savez("gpt2-124M.npz", **other)  # other items
    assert compared(capsys, "log", "gpt2-124M.npz")[2]["Δ points on HellaSwag"] == "-"
    show("log", "gpt2-124M.npz", "--effects")
    assert "gpt2-124M" not in capsys.readouterr().out
    with open("gpt2-124M.npz", "w") as file:
        file.write("x")
    bad(capsys, lambda: show("log", "gpt2-124M.npz"), "gpt2-124M.npz is damaged")


def test_a_spread_that_is_unknown_gives_no_interval(capsys, recwarn):
    """One row or item, or losses that are not finite, say nothing of the error; two equal checkpoints do not differ.
    A model without finite losses is right nowhere."""
    rng = np.random.default_rng(0)
    for name, arch, val in ("a", "llama", 3.0), ("b", "gpt2", 3.1):
        made_up(f"log/{name}", arch, val)
        with_items(f"log/{name}", rng.uniform(1, 9, (1, 4)), np.array([val]))
    titles = ["validation loss", "bits per byte of endings", "gap of endings"]
    assert [compared(capsys, "log")[1][f"Δ {title}"] for title in titles] == ["-"] * 3

    infinite = rng.uniform(1, 9, (20, 4))
    infinite[:10] = math.inf
    infinite[10:] = math.nan
    rows = np.full(16, math.inf)
    rows[:8] = math.nan
    with_items("log/a", rng.uniform(1, 9, (20, 4)), rng.normal(3, 0.1, 16))
    with_items("log/b", infinite, rows)
    second = compared(capsys, "log")[1]
    assert [second[f"Δ {title}"] for title in titles] == ["-"] * 3
    with np.load("log/b/hella_1000.npz") as file:
        scores = hellaswag.item_scores(file["losses"], file["tokens"], file["bytes"], file["labels"])
    assert not any(scores[name].any() for name in ("acc", "acc_norm", "acc_bytes"))
    assert not recwarn.list

    for path in "hella_1000.npz", "val_1000.npy", "log.txt":
        shutil.copy(f"log/a/{path}", f"log/b/{path}")
    second = compared(capsys, "log")[1]
    assert second["p"] == "1"
    assert [second[f"Δ {title}"] for title in titles[:2]] == ["+0.0000 [+0.0000, +0.0000]"] * 2
    show("log")
    assert "true difference" not in capsys.readouterr().out  # of 0


def test_a_reference_stands_beside_old_runs(capsys):
    """Of an old run it is not known which items it was evaluated on."""
    made_up("log/a", hits=np.arange(20) % 3 == 0)
    made_up("log/b", "llama", 4.1)
    with_items("log/b", np.random.default_rng(0).uniform(1, 9, (20, 4)))
    rows = compared(capsys, "log", *["log/b/hella_1000.npz"] * 2)
    assert [row["model"] for row in rows] == ["gpt2", "llama", "hella_1000"]
    assert [row["p"] == "-" for row in rows] == [True, False, True]


@pytest.mark.parametrize("change", [
    {"labels": np.full(20, -1)}, {"labels": np.full(20, 4)}, {"labels": np.zeros(1, int)}, {"labels": np.zeros(20)},
    {"tokens": np.zeros((20, 4), np.int32)}, {"bytes": np.zeros((20, 4), np.int32)},
    {"tokens": np.ones((1, 4), np.int32)}, {"losses": np.ones((20, 4), complex)},
    {name: np.ones((20, 5), np.float32) for name in ("losses", "tokens", "bytes")},
    {name: np.ones((0, 4), np.float32) for name in ("losses", "tokens", "bytes")} | {"labels": np.zeros(0, int)},
])
def test_damaged_items_are_one_line(change, capsys):
    made_up("log/a")
    with_items("log/a", np.random.default_rng(0).uniform(1, 9, (20, 4)))
    with np.load("log/a/hella_1000.npz") as file:
        whole = dict(file)
    np.savez("log/a/hella_1000.npz", **whole | change)
    bad(capsys, lambda: show("log"), "hella_1000.npz is damaged")


def test_the_best_of_several_learning_rates_is_named(capsys):
    for i, (rate, val) in enumerate([(0.001, 3.2), (0.002, 3.0), (0.004, 3.1)]):
        made_up(f"log/a{i}", "gpt2", val, learning_rate=rate)
        made_up(f"log/b{i}", "llama", val + 0.05 - 0.2 * i, learning_rate=rate)
    made_up("log/c", "phi", 4.0, learning_rate=0.001)
    remarks = [(row["model"], row["remarks"]) for row in compared(capsys)]
    assert remarks == [
        ("llama (b2)", "learning_rate=0.004, the best of 3"), ("llama (b1)", "learning_rate=0.002"),
        ("gpt2 (a1)", "learning_rate=0.002, the best of 3"), ("gpt2 (a2)", "learning_rate=0.004"),
        ("gpt2 (a0)", "learning_rate=0.001"), ("llama (b0)", "learning_rate=0.001"), ("phi", "")]


def test_what_is_not_comparable_is_marked(capsys):
    made_up("log/a", "gpt2", 3.5)
    made_up("log/b", "llama", 3.6)
    made_up("log/c", "phi", 3.0, data_dir="other")
    made_up("log/d", "gemma", 3.1, steps=700)
    made_up("log/e", "rwkv", 3.2, min_lr_ratio=1.0)
    made_up("log/f", "gpt2", 2.0, init_from="gpt2")
    made_up("log/g", "llama", 2.5, steps=300, every=100, seed=2)
    made_up("log/h", "deepseek", 2.1, every=300)
    with open("log/d/log.txt", "a") as f:
        f.write("700 tra")  # a line in the making
    os.mkdir("log/build-nanogpt")
    with open("log/build-nanogpt/log.txt", "w") as f:  # as its train_gpt2.py writes it
        f.write("0 val 10.9527\n0 hella 0.2463\n0 train 10.955029\n1 train 10.6\n2 val 3.3\n2 hella 0.2955\n")
    rows = {row["model"]: row for row in compared(capsys)}
    assert list(rows) == [
        "gpt2 (a)", "llama (b)", "gpt2 (f)", "deepseek", "llama (g)", "phi", "gemma", "rwkv", "build-nanogpt"]
    remarks = {model: row["remarks"] for model, row in rows.items()}
    assert not remarks["gpt2 (a)"]
    assert not remarks["llama (b)"]  # the finished seed stays above
    assert remarks["gpt2 (f)"] == "not comparable: init_from=gpt2 instead of ''"
    assert remarks["llama (g)"] == "not comparable: in progress, step 300 of 1000"
    assert remarks["deepseek"] == "not comparable: validation loss of step 900, not 1000"
    assert remarks["phi"] == "not comparable: data_dir=other instead of data"
    assert remarks["gemma"] == "not comparable: in progress, step 700 of 1000"
    assert remarks["rwkv"] == "not comparable: min_lr_ratio=1.0 instead of None"
    assert rows["gemma"]["tokens"] == "700,000"
    assert rows["gemma"]["validation loss"] == "3.1000"
    peer = rows["build-nanogpt"]
    assert peer["tokens"] == f"{2 * 524288:,}"
    assert peer["validation loss"] == "3.3000"
    assert peer["parameters"] == "-"
    assert peer["HellaSwag acc_norm"] == "0.2955 ± 0.0046"
    assert "no run.json" in peer["remarks"]


def test_what_changed_on_the_way_is_counted_and_named(capsys):
    made_up("log/a", "llama", 3.0)
    made_up("log/steady", "gpt2", 3.1)  # what may change, and a key that the old config lacks
    free = dict(batch_size=2, log_dir="x", device="cuda", compile=True, eval_interval=9, resume="auto", hella_limit=9,
                keep_checkpoints=3, hellaswag_file="y", val_tokens=9, data_dir="/moved/data/", momentum=0.95)
    started("log/steady", (0, {}), (500, free), (600, {"learning_rate": 9.0}), (600, {}), (1000, {"max_steps": 1000}))
    made_up("log/finished", "gemma", 3.2)  # neither the start that was lost nor the one that only evaluated counts
    started("log/finished", (0, {}), (700, {"beta2": 0.5}), (300, {}), (1000, {"beta2": 0.6, "max_steps": 2000}))
    made_up("log/b", "phi", 3.0, learning_rate=0.001)
    started("log/b", (0, {}), (500, {"learning_rate": 0.0005}))
    made_up("log/c", "rwkv", 3.0)
    started("log/c", (0, {"total_batch_size": 500}), (400, {"total_batch_size": 2000}), (300, {}), (600, {}))
    made_up("log/c2", "rwkv", 3.0, seed=2)  # another group than the seed whose steps grew
    made_up("log/d", "mistral", 3.0)
    names = ("max_steps", "warmup_steps", "min_lr_ratio", "weight_decay", "beta1", "beta2", "grad_clip", "optimizer",
             "seed", "data_dir", "dtype", "momentum", "init_from")
    started("log/d", (0, {name: "a" for name in names} | {"max_steps": 3}),
            (20, {name: "" if name == "init_from" else "b" for name in names} | {"max_steps": 1000}))
    made_up("log/e", "deepseek", 3.0, steps=500)  # shortened after its last step: its learning rate never fell
    started("log/e", (0, {}), (500, {"max_steps": 500}))
    rows = {row["model"]: row for row in compared(capsys)}
    assert list(rows)[:4] == ["llama", "rwkv (c2)", "gpt2", "gemma"]
    assert [row["remarks"] for row in rows.values()][:4] == ["", "", "", ""]
    assert [row["tokens"] for row in rows.values()][:4] == ["1,000,000"] * 4
    assert rows["phi"]["remarks"].startswith(
        "not comparable: learning_rate changed at step 500: 0.001 -> 0.0005")
    assert rows["phi"]["tokens"] == "1,000,000"
    assert rows["rwkv (c)"]["remarks"] == "not comparable: total_batch_size changed at step 300: 500 -> 1000"
    assert rows["rwkv (c)"]["tokens"] == f"{300 * 500 + 700 * 1000:,}"
    for name in names:
        old, new = {"max_steps": ("3", "1000"), "init_from": ("a", "''")}.get(name, ("a", "b"))
        assert f"{name} changed at step 20: {old} -> {new};" in rows["mistral"]["remarks"] + ";"
    assert rows["deepseek"]["remarks"] == "not comparable: in progress, step 500 of 1000"
    started("log/a", (0, {}), (300, {}))
    run = read_json("log/a/run.json")
    run["starts"][0]["config"] = {}  # what an old config lacks did not change
    write_json("log/a/run.json", run)
    (row,) = compared(capsys, "log/a")
    assert (row["tokens"], row["remarks"]) == ("1,000,000", "")
    run["starts"].append({"step": 600, "config": run["config"] | {"beta2": 0.9}})
    write_json("log/a/run.json", run | {"config": run["starts"][-1]["config"]})
    (row,) = compared(capsys, "log/a")
    assert row["remarks"] == "not comparable: beta2 changed at step 600: 0.95 -> 0.9"
    started("log/a", (400, {}))  # from a checkpoint of another folder
    (row,) = compared(capsys, "log/a")
    assert row["tokens"] == "1,000,000"
    assert row["remarks"] == "run.json does not describe the first 400 steps"


def add_to_log(folder, *lines):
    """Add lines to the log of a made-up run."""
    with open(f"{folder}/log.txt", "a") as f:
        f.writelines(f"{line}\n" for line in lines)


def test_hellaswag_of_another_step_is_named(capsys):
    hits = np.arange(100) % 10 < 3
    for seed in 1, 2:
        made_up(f"log/{seed}", "gpt2", 3.0, seed=seed)
        add_to_log(f"log/{seed}", "100 hella 0.3")
        np.save(f"log/{seed}/hella_100.npy", hits)
    add_to_log("log/2", "1000 hella 0.3")  # only one seed has it
    np.save("log/2/hella_1000.npy", hits)
    made_up("log/a", "llama", 3.1, hits)
    made_up("log/b", "phi", 3.2)
    for folder in "log/1", "log/2", "log/a", "log/b":
        assert [row["remarks"] for row in compared(capsys)] == ["HellaSwag of step 100", "", ""]
        add_to_log(folder, "1000 val_full 3.0")
    assert [row["remarks"] for row in compared(capsys)] == ["HellaSwag of step 100", "", ""]
    os.remove("log/1/run.json")
    assert "HellaSwag of step 100" in compared(capsys, "log/1")[0]["remarks"]


def test_the_full_validation_loss_ranks_where_all_have_it(capsys):
    made_up("log/a1", "gpt2", 3.0, seed=1, val_full_tokens=9)
    made_up("log/a2", "gpt2", 3.2, seed=2, val_full_tokens=9)
    made_up("log/b", "llama", 3.2, val_full_tokens=9)
    made_up("log/c", "phi", 2.0, steps=500, val_full_tokens=9)
    add_to_log("log/a1", "1000 val_full 3.4")
    add_to_log("log/a2", "1000 val_full 3.6")
    for lines in [], ["500 val_full 3.3"]:  # not at the last step
        add_to_log("log/b", *lines)
        rows = compared(capsys)
        assert [row["model"] for row in rows] == ["gpt2", "llama", "phi"]
        assert rows[0]["validation loss"] == "3.1000 (3.0000 to 3.2000)"
    add_to_log("log/b", "1000 val_full 3.3")
    rows = compared(capsys)
    assert [row["full validation loss"] for row in rows] == ["3.3000", "3.5000 (3.4000 to 3.6000)", "2.0000"]
    assert [row["remarks"] for row in rows] == [
        "", "", "not comparable: in progress, step 500 of 1000; validation loss: val, not val_full"]
    assert "validation loss" in compared(capsys, "log/c")[0]
    started("log/b", (0, {"val_full_tokens": 8}))  # other tokens
    assert [row["validation loss"] for row in compared(capsys)][1:] == ["3.2000", "2.0000"]


def test_a_run_that_diverged_comes_last(capsys):
    made_up("log/a1", "gpt2", 3.0, seed=1)
    made_up("log/a2", "gpt2", 3.0, seed=2)
    made_up("log/a3", "gpt2", math.nan, seed=3)
    made_up("log/a4", "gpt2", math.nan, seed=4)
    made_up("log/b", "llama", math.inf)
    made_up("log/c", "phi", 4.0)
    made_up("log/d", "rwkv", 9.0, data_dir="other")
    made_up("log/e", "gemma", 3.5)
    add_to_log("log/e", "500 val nan")  # it recovered
    rows = compared(capsys)
    assert [row["model"] for row in rows][:4] == ["gpt2 (a1)", "gemma", "phi", "rwkv"]
    assert [row["validation loss"] for row in rows][:4] == ["3.0000 (3.0000 to 3.0000)", "3.5000", "4.0000", "9.0000"]
    remarks = {row["model"]: (row["validation loss"], row["remarks"]) for row in rows[4:]}
    assert remarks == {"gpt2 (a3)": ("nan", "not comparable: it diverged"),
                       "llama": ("inf", "not comparable: it diverged")}


def test_logs_of_other_programs_are_named(capsys):
    made_up("log/a")
    for name, text in {
            "nanogpt": "iter 0: loss 10.9, time 9ms, mfu -100.00%\n", "modded": "step:0/9 val_loss:10.8\n",
            "csv": "step,loss\n0,10.9\n", "date": "2024 Nov 26\n", "cut": "0 va", "empty": ""}.items():
        os.mkdir(f"log/{name}")
        with open(f"log/{name}/log.txt", "w") as f:
            f.write(text)
        bad(capsys, lambda: show(f"log/{name}"), "no log to read")
        problem = "is empty so far" if name == "empty" else "is of another format"
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("skipped: ") and f"log/{name}/log.txt {problem}" in line


ADVICE = "to compare vocabularies, give all runs the same --val_bytes"


def test_larger_vocabularies_are_gpt2s(capsys):
    """Sizes from 50,257 upwards count as equal, and the remarks show the real one."""
    made_up("log/a", "gpt2", 3.0)
    made_up("log/b", "llama", 3.1, vocab_size=50257)
    made_up("log/c", "phi", 3.2, vocab_size=60000)
    made_up("log/d", "gemma", 3.3, vocab_size=256)
    assert [row["remarks"] for row in compared(capsys)] == [
        "", "", "", f"not comparable: vocab_size=256 instead of 50304: {ADVICE}"]
    (row,) = [row for row in compared(capsys, "log/a", "log/d") if row["model"] == "gpt2"]
    assert row["remarks"] in ("", f"not comparable: vocab_size=50304 instead of 256: {ADVICE}")
    made_up("log/e", "phi", 3.3, vocab_size=256)
    assert "vocab_size=50304 instead of 256" in compared(capsys, "log/a", "log/d", "log/e")[-1]["remarks"]


def validated(folder, bpb, vocab=None, text="t", bytes_per_token=4.0):
    """Give a made-up run what one with --val_bytes has: bits per byte of a text and, perhaps, its own vocabulary."""
    run = read_json(f"{folder}/run.json")
    size, last = run["config"]["vocab_size"], run["config"]["max_steps"]
    run["vocab"] = {"name": "own" if vocab else "gpt2", "tokens": size, "sha256": vocab and vocab * 64}
    run["val_text"] = {"bytes": 3000, "sha256": text * 64}
    run["bytes_per_token"] = bytes_per_token
    write_json(f"{folder}/run.json", run)
    add_to_log(folder, f"{last // 2} bpb {bpb + 1:.4f}", f"{last} bpb {bpb:.4f}")


# the same text in shorter tokens, cut into other steps
OWN = dict(vocab_size=8192, data_dir="own", block_size=9, total_batch_size=500, warmup_steps=3, max_steps=2500,
           steps=2500, val_tokens=8)


def test_vocabularies_are_compared_by_bits_per_byte(capsys):
    for seed, bpb in (1, 1.10), (2, 1.14):
        made_up(f"log/{seed}", "gpt2", 3.0, seed=seed)
        validated(f"log/{seed}", bpb, bytes_per_token=5.0)
    made_up("log/b", "llama", 2.5, **OWN)
    validated("log/b", 1.2, "b")
    made_up("log/c", "llama", 2.4, **OWN)  # another vocabulary of the same size
    validated("log/c", 1.3, "c")
    made_up("log/padded", "phi", 2.3, **OWN | {"vocab_size": 8256})  # the same as the last one, and padding
    validated("log/padded", 1.15, "c")
    rows = compared(capsys)
    assert [row["model"] for row in rows] == ["gpt2", "phi", "llama (b)", "llama (c)"]
    assert [row["bits per byte"] for row in rows] == ["1.1200 (1.1000 to 1.1400)", "1.1500", "1.2000", "1.3000"]
    assert [row["vocabulary"] for row in rows] == ["50304", "8256 (cccccccc)", "8192 (bbbbbbbb)", "8192 (cccccccc)"]
    assert not any("loss" in column or "acc_norm" in column for column in rows[0])
    assert [row["remarks"] for row in rows] == [
        "data_dir=data; max_steps=1000; total_batch_size=1000; warmup_steps=10", "", "", ""]
    rows = compared(capsys, "log/b", "log/c")
    assert [row["bits per byte"] for row in rows] == ["1.2000", "1.3000"]
    rows = compared(capsys, "log/padded", "log/c")  # one vocabulary: its loss per token is enough
    assert [row["validation loss"] for row in rows] == ["2.3000", "2.4000"]
    assert "vocabulary" not in rows[0] and "bits per byte" not in rows[0]
    assert [row["remarks"] for row in rows] == ["", ""]


def test_vocabularies_that_cannot_be_compared_say_why(capsys):
    for i in range(3):
        made_up(f"log/{i}", "llama", 2.0, **OWN, seed=i)
        validated(f"log/{i}", 1.0, "a")
    made_up("log/near", "gpt2", 3.0)
    validated("log/near", 1.1, bytes_per_token=4.91)
    made_up("log/far", "phi", 2.0, **OWN)
    validated("log/far", 0.9, "b", bytes_per_token=4.09)
    made_up("log/large", "gemma", 2.0, **OWN | {"total_batch_size": 10 ** 6})
    validated("log/large", 0.9, "c")
    made_up("log/rate", "rwkv", 2.0, **OWN, min_lr_ratio=1.0)
    validated("log/rate", 0.9, "d")
    made_up("log/half", "mistral", 2.0, **OWN | {"max_steps": 1250, "steps": 1250, "every": 250})
    validated("log/half", 0.9, "a")
    made_up("log/steps", "hybrid", 3.0, max_steps=990, steps=990, every=495)  # in a vocabulary steps count, too
    validated("log/steps", 0.9, bytes_per_token=4.91)
    made_up("log/text", "gpt2", 2.0, **OWN | {"vocab_size": 256})
    validated("log/text", 0.9, text="u")
    made_up("log/old", "mta", 2.0)
    made_up("log/running", "deepseek", 2.0, steps=500)
    validated("log/running", 0.9, bytes_per_token=5.0)
    with open("log/running/log.txt") as f:
        *lines, _ = f
    with open("log/running/log.txt", "w") as f:
        f.writelines(lines)
    first, second, *rows = compared(capsys)
    assert [first["model"], second["model"]] == ["llama", "gpt2 (near)"]
    assert "not comparable" not in first["remarks"] + second["remarks"]
    assert {row["model"]: row["remarks"].removeprefix("not comparable: ") for row in rows} == {
        "phi": "trained on about 5.11 MB of text instead of 5 MB",
        "gemma": "trained on about 10 GB of text instead of 5 MB",
        "rwkv": "min_lr_ratio=1.0 instead of None",
        "mistral": "max_steps=1250 instead of 2500",
        "hybrid": "max_steps=990 instead of 1000",
        "gpt2 (text)": f"vocab_size=256 instead of 8192 (aaaaaaaa): {ADVICE}; "
                       "val_bytes=3000 (uuuuuuuu) instead of 3000 (tttttttt)",
        "mta": "val_bytes=0 instead of 3000 (tttttttt); no bits per byte",
        "deepseek": "in progress, step 500 of 1000"}
    bits = {row["model"]: row["bits per byte"] for row in rows}
    assert bits["deepseek"] == "1.9000" and bits["mta"] == "-"
    rows = compared(capsys, "log/0", "log/running")  # the first vocabulary has finished, the other not yet
    assert [row["bits per byte"] for row in rows] == ["1.0000", "1.9000"]


def test_runs_of_one_vocabulary_are_validated_on_the_same_text(capsys):
    for i, text in enumerate("ttu"):
        made_up(f"log/{i}", "gpt2", 3.0 - i, seed=i)
        validated(f"log/{i}", 1.0 + i, text=text)
    made_up("log/old", "llama", 0.5)
    made_up("log/no_val_bytes", "phi", 0.5)
    write_json("log/no_val_bytes/run.json", read_json("log/no_val_bytes/run.json") | {
        "vocab": {"name": "gpt2", "tokens": 50257, "sha256": None}, "val_text": None, "bytes_per_token": None})
    rows = compared(capsys, "log/0", "log/1", "log/2")
    assert [(row["runs"], row["validation loss"], row["remarks"]) for row in rows] == [
        ("2", "2.5000 (2.0000 to 3.0000)", ""),
        ("1", "1.0000", "not comparable: val_bytes=3000 (uuuuuuuu) instead of 3000 (tttttttt)")]
    assert compared(capsys, "log/0", "log/1", "log/old")[-1]["remarks"] == (
        "not comparable: val_bytes=0 instead of 3000 (tttttttt)")
    assert [row["remarks"] for row in compared(capsys, "log/old", "log/no_val_bytes")] == ["", ""]


def test_hellaswag_across_vocabularies_is_per_byte(capsys):
    rng = np.random.default_rng(0)
    right = {}
    n_bytes = rng.integers(2, 5, (100, 4), np.int32)
    for name, vocab in ("a", None), ("b", "b"), ("old", "c"):
        losses = rng.random((100, 4), np.float32) + 1
        lengths = {"tokens": rng.integers(2, 5, (100, 4), np.int32), "bytes": n_bytes}
        labels = rng.integers(0, 4, 100)
        for unit in lengths:
            right[name, unit] = np.array([np.argmin(loss / length) == label
                                          for loss, length, label in zip(losses, lengths[unit], labels)])
        made_up(f"log/{name}", f"gpt2-{name}", 3.0, right[name, "tokens"])
        validated(f"log/{name}", 1.1 if vocab else 1.0, vocab)
        if name != "old":
            os.remove(f"log/{name}/hella_1000.npy")
            np.savez(f"log/{name}/hella_1000.npz", losses=losses, **lengths, labels=labels)
    for name in "a", "b":
        correct = right[name, "tokens"]
        (row,) = compared(capsys, f"log/{name}")
        assert row["HellaSwag acc_norm"] == f"{correct.mean():.4f} ± {correct.std() / 10:.4f}"
    rows = compared(capsys)
    column = "HellaSwag accuracy per byte"
    for name, row in zip("ab", rows):
        correct = right[name, "bytes"]
        assert row[column] == f"{correct.mean():.4f} ± {correct.std() / 10:.4f}"
        assert correct.sum() != right[name, "tokens"].sum()
    assert rows[2][column] == rows[2]["Δ points on HellaSwag"] == rows[2]["p"] == "-"
    assert "HellaSwag's items are not all there" in rows[2]["remarks"]
    a, b = right["a", "bytes"], right["b", "bytes"]
    assert rows[1]["Δ points on HellaSwag"].startswith(f"{int(b.sum()) - int(a.sum()):+.2f} [")
    assert rows[1]["p"] == f"{compare.sign_test(int((b & ~a).sum()), int((a & ~b).sum())):.2g}"


def test_vocabularies_in_the_plot_and_in_effects(monkeypatch, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    vocabularies = {"a": (5.0, {}), "b": (4.0, OWN)}
    for (vocab, (length, options)), pos in itertools.product(vocabularies.items(), ("learned", "rope")):
        made_up(f"log/{vocab}-{pos}", "hybrid", 2.0, **options, pos=pos)
        validated(f"log/{vocab}-{pos}", 1.0 + 0.1 * (vocab == "b") + 0.02 * (pos == "rope"), vocab,
                  bytes_per_token=length)
    capsys.readouterr()
    show("--effects")
    text = capsys.readouterr().out
    assert text.startswith("Bits per byte: 4 runs, 4 settings. ")
    assert dict(re.findall(r"^\| (\S+=.*?) +\| ([+-]\S+)", text, re.M)) == {
        "vocab_size=8192 (bbbbbbbb)": "+0.1000", "pos=rope": "+0.0200",
        "vocab_size=8192 (bbbbbbbb) x pos=rope": "+0.0000"}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **options: None)  # which is slow
    show("--plot=curves.png")
    loss, _ = pyplot.gcf().axes
    assert loss.get_ylabel() == "bits per byte"
    assert loss.get_lines()[0].get_ydata().tolist() == [2.0, 1.0]


def test_compare_reads_real_runs_and_draws(monkeypatch, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for arch in "gpt2", "deepseek":
        train(arch, monkeypatch, *quick(arch))
    made_up("log/z", "phi", 3.0)
    first, second, third = compared(capsys, "log", "--plot=curves.png")
    assert first["tokens"] == second["tokens"] == "4,096"
    assert all(row["active"] != "-" for row in (first, second, third))
    assert float(first["full validation loss"]) == stream_of("val_full", f"log/{first['model']}-tiny")[-1]
    assert pyplot.gcf().axes[0].get_ylabel() == "validation loss"  # val, which has more than one step
    assert pyplot.imread("curves.png").std() > 0.05
    assert os.path.getsize("curves.png") < 200_000


def drawn(capsys, *paths):
    """Return the axes that --plot draws, and the texts of the legend."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    compared(capsys, *paths, "--plot=curves.png")
    figure = pyplot.gcf()
    figure.canvas.draw()
    (legend,) = figure.legends
    return figure.axes, [text.get_text() for text in legend.get_texts()]


def ticks(axis):
    """Return the labels along the x axis."""
    return [text.get_text() for text in axis.get_xticklabels()]


def test_the_plot_shows_errors_chance_and_short_labels(capsys):
    hits = np.arange(100) % 10 < 3
    made_up("log/a1", "gpt2", 3.0, hits, seed=1, n_layer=3)
    made_up("log/a2", "gpt2", 3.2, hits, seed=2, n_layer=3)
    made_up("log/b", "gpt2", 3.3, hits)
    made_up("log/c", "llama", 3.4, hits)
    axes, labels = drawn(capsys)
    assert labels == ["gpt2 n_layer=3", "gpt2 n_layer=2", "llama"]
    loss, hella = axes  # equal FLOPs per token: no second column
    assert loss.get_ylabel() == "validation loss"
    for axis in axes:
        assert axis.get_xlabel() == "tokens"
        assert ticks(axis)[:4] == ["0", "200k", "400k", "600k"]
        assert len({line.get_marker() for line in axis.get_lines() if line.get_marker() != "None"}) == 3
    assert [line.get_color() for line in hella.get_lines() if set(line.get_ydata()) == {0.25}] == ["grey"]
    assert [text.get_text() for text in hella.texts] == ["chance"]
    bars = [bar.get_segments()[0] for bar in hella.collections]
    assert [bar[:, 1].tolist() for bar in bars] == [pytest.approx([0.3 - error, 0.3 + error])
                                                    for error in [math.sqrt(0.3 * 0.7 / 100)] * 3]
    assert len({bar[0, 0] for bar in bars}) == 3  # side by side

    made_up("log/d", "llama", 3.5, hits, flops_per_token=4 * 10 ** 12, total_batch_size=10 ** 7, n_head=3)
    started("log/d", (0, {"total_batch_size": 10 ** 6}), (500, {}))
    (_, flops, _, _), labels = drawn(capsys)
    assert flops.get_xlabel() == "1e22 FLOPs"
    assert ticks(flops)[:3] == ["0", "0.5", "1"]
    assert labels[-1] == "llama n_head=3 total_batch_size=10000000"
    tokens, labels = drawn(capsys, "log/d")
    assert labels == ["llama"]
    assert ticks(tokens[0])[:3] == ["0", "1B", "2B"]
    assert tokens[0].get_lines()[0].get_xdata().tolist() == [0.5e9, 5.5e9]
    made_up("log/e1", "llama", 3.4, steps=500)
    made_up("log/e2", "llama", 3.4, steps=500, seed=2)
    assert drawn(capsys, "log/c", "log/e1", "log/e2")[1] == ["llama (c)", "llama (e*)"]


FACTORS = {"pos": ("learned", "rope"), "bias": (True, False), "norm": ("layernorm", "rmsnorm"),
           "mlp": ("gelu", "swiglu"), "n_kv_head": (12, 3)}
FFN_DIM = {("gelu", 12): 3072, ("gelu", 3): 3648, ("swiglu", 12): 2048, ("swiglu", 3): 2432}  # equal parameters
HALF_FRACTION = [signs for signs in itertools.product((-1, 1), repeat=5) if math.prod(signs) == 1]
LADDER = [(1,) * n + (-1,) * (5 - n) for n in range(6)]
# of an option, from its first level to its second, and of a pair, half of what one changes in the effect of the other
EFFECTS = {("pos",): -0.05, ("bias",): 0.002, ("norm",): 0.008, ("mlp",): -0.04, ("n_kv_head",): 0.012,
           ("pos", "bias"): 0.004, ("pos", "norm"): -0.006, ("pos", "mlp"): 0.014, ("pos", "n_kv_head"): -0.002,
           ("bias", "norm"): 0.01, ("bias", "mlp"): -0.008, ("bias", "n_kv_head"): 0.016, ("norm", "mlp"): -0.012,
           ("norm", "n_kv_head"): 0.018, ("mlp", "n_kv_head"): -0.02}


def true_loss(signs, effects=EFFECTS):
    """Return the loss of a made-up model; a sign of -1 stands for the first level of a factor, 1 for the second."""
    sign = dict(zip(FACTORS, signs))
    return 3.3 + sum(effect / 2 * math.prod(sign[name] for name in names) for names, effect in effects.items())


def made_up_design(folder, design, loss=true_loss, seed=1, **options):
    """Make a run for each setting of a design, a list of signs."""
    for i, signs in enumerate(design):
        levels = {name: both[sign > 0] for (name, both), sign in zip(FACTORS.items(), signs)}
        ffn_dim = FFN_DIM[levels["mlp"], levels["n_kv_head"]]
        made_up(f"{folder}/{i}-{seed}", "hybrid", loss(signs), seed=seed, **levels, ffn_dim=ffn_dim, **options)


def effects_of(capsys, *paths):
    """Return what --effects prints: {names of the options: (effect, standard error)}, from first to second level of the
    factors, and the lines around the table."""
    capsys.readouterr()
    show(*paths, "--effects")
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|--")) + 1
    last = lines.index("", first)
    found = {}
    for line in lines[first:last]:
        term, effect, error = (cell.strip() for cell in line.strip("|").split("|"))
        effect = float(effect)
        names = []
        for part in term.split(" x "):
            name, level = part.split("=")
            names.append(name)
            effect *= {str(FACTORS[name][0]): -1, str(FACTORS[name][1]): 1}[level]
        found[tuple(names)] = effect, float(error.replace("-", "nan"))
    return found, [lines[0], *lines[last + 1:]]


def test_effects_of_a_half_fraction_are_exact(capsys):
    made_up_design("log", HALF_FRACTION)
    found, (title, noise, follows, *explained) = effects_of(capsys)
    assert {names: effect for names, (effect, _) in found.items()} == EFFECTS
    assert [*map(len, found)] == [1] * 5 + [2] * 10
    sizes = [abs(effect) for effect, _ in found.values()]
    assert sizes == sorted(sizes[:5])[::-1] + sorted(sizes[5:])[::-1]
    assert title.startswith("Validation loss: 16 runs, 16 settings. Baseline, the best: ")
    best = min(HALF_FRACTION, key=true_loss)
    assert title.split("best: ")[1] == ", ".join(
        f"{name}={levels[sign > 0]}" for (name, levels), sign in zip(FACTORS.items(), best)) + "."
    assert "No residual degrees of freedom" in noise and "--seed" in noise
    assert all(math.isnan(error) for _, error in found.values())
    assert follows == "ffn_dim follows mlp, n_kv_head: their effects include its own."
    assert len(explained) == 3 and "told apart" not in str(explained)
    # each run has a part in every effect: a sixteenth of the mean of eight
    add_to_log("log/0-1", f"1000 val {true_loss(HALF_FRACTION[0]) + 0.016:.4f}")
    changed, _ = effects_of(capsys)
    assert {round(abs(changed[names][0] - effect), 9) for names, effect in EFFECTS.items()} == {0.002}
    for i in range(16):
        add_to_log(f"log/{i}-1", f"1000 val_full {true_loss(HALF_FRACTION[i], {('norm',): 0.1}):.4f}")
    found, (title, *_) = effects_of(capsys)
    assert title.startswith("Full validation loss: 16 runs")
    assert all(effect == (0.1 if names == ("norm",) else 0) for names, (effect, _) in found.items())


def test_effects_have_the_standard_errors_of_the_noise(capsys):
    rng = np.random.default_rng(0)
    losses = np.array([[true_loss(signs) for signs in HALF_FRACTION]] * 3) + rng.normal(0, 0.02, (3, 16))
    losses = losses.round(4)  # as in a log
    for seed, row in enumerate(losses):
        loss = dict(zip(HALF_FRACTION, row))
        made_up_design("log", HALF_FRACTION, loss.get, seed=seed)
    found, (title, noise, *_) = effects_of(capsys)
    assert "48 runs, 16 settings" in title
    sigma = math.sqrt(losses.var(axis=0, ddof=1).mean())
    assert noise == f"sigma = {sigma:.4f}, from seeds (degrees of freedom: 32)."
    signs = dict(zip(FACTORS, np.array(HALF_FRACTION).T))
    for names, (effect, error) in found.items():
        sign = np.prod([signs[name] for name in names], axis=0)
        expected = losses[:, sign > 0].mean() - losses[:, sign < 0].mean()
        assert effect == pytest.approx(expected, abs=0.6e-4)
        assert error == pytest.approx(2 * sigma / math.sqrt(48), abs=0.6e-4)
    # what the noise that was put in says
    assert sigma == pytest.approx(0.02, rel=0.3)
    z = [(found[names][0] - effect) / (2 * 0.02 / math.sqrt(48)) for names, effect in EFFECTS.items()]
    assert max(map(abs, z)) < 3
    assert 0.6 < np.std(z) < 1.4


def test_effects_of_a_ladder_are_its_steps(capsys):
    made_up_design("log", LADDER)
    found, notes = effects_of(capsys)
    steps = np.diff([true_loss(signs) for signs in LADDER])
    assert {names: effect for names, (effect, _) in found.items()} == {
        (name,): pytest.approx(step, abs=1e-9) for name, step in zip(FACTORS, steps)}
    assert "No residual degrees of freedom" in notes[1]
    assert "ffn_dim follows mlp, n_kv_head: their effects include its own." in notes
    assert "Not told apart from sums of other terms, and taken as zero: all pairs." in notes
    # one run again, with another seed
    made_up_design("log", LADDER[:1], lambda signs: true_loss(signs) + 0.02, seed=2)
    found, notes = effects_of(capsys)
    sigma = 0.02 / math.sqrt(2)
    assert notes[1] == f"sigma = {sigma:.4f}, from seeds (degrees of freedom: 1)."
    assert found["pos",][1] == pytest.approx(sigma * math.sqrt(1 + 1 / 2), abs=0.6e-4)
    assert found["mlp",][1] == pytest.approx(sigma * math.sqrt(1 + 1), abs=0.6e-4)


def test_effects_without_seeds_have_the_standard_errors_of_what_the_fit_leaves_over(capsys):
    made_up_design("log/half", HALF_FRACTION)
    corner = (-1,) * 5
    made_up_design("log/corner", [corner], lambda signs: true_loss(signs) + 0.02)
    found, notes = effects_of(capsys)
    # predicted from the others with their variance: 16 orthogonal terms, each of variance sigma^2 / 16
    sigma = 0.02 / math.sqrt(1 + 16 / 16)
    assert notes[1] == (f"sigma = {sigma:.4f}, from what the fit leaves over, as no seed differs "
                        "(degrees of freedom: 1).")
    # the run halves a variance in one of 16 directions, in which all terms have an equal part
    error = 2 * sigma * math.sqrt((1 - 1 / 32) / 16)
    assert [each for _, each in found.values()] == pytest.approx([error] * 15, abs=0.6e-4)


def test_effects_that_cannot_be_told_apart_are_named(capsys):
    cube = [*itertools.product((-1, 1), repeat=3)]
    main_effects = {names: effect for names, effect in EFFECTS.items() if len(names) == 1}

    def loss(signs):
        return true_loss(signs, main_effects | {("pos", "bias"): 0.03, ("norm", "mlp"): 0.006})

    # the fourth option changes with the product of three: pairs with pairs
    made_up_design("log/half", [(a, b, c, a * b * c, 1) for a, b, c in cube], loss)
    found, notes = effects_of(capsys, "log/half")
    assert "ffn_dim follows mlp: their effects include its own." in notes
    told = [note for note in notes if "cannot be told apart" in note]
    assert {frozenset(re.findall(r"(\w+)=", note)) for note in told} == {frozenset(["pos", "bias", "norm", "mlp"])}
    assert len(told) == 3 and len(found) == 7
    assert found["pos", "bias"][0] == 0.036  # the sum of both
    # without its last run no pair can be told apart from the others
    made_up_design("seven", [(a, b, c, a * b * c, 1) for a, b, c in cube[:7]], loss)
    found, notes = effects_of(capsys, "seven")
    assert set(found) == {("pos",), ("bias",), ("norm",), ("mlp",)}
    assert "Not told apart from sums of other terms, and taken as zero: all pairs." in notes
    assert not any("includes theirs" in note for note in notes)
    # the whole factorial
    made_up_design("log/rest", [(a, b, c, -a * b * c, 1) for a, b, c in cube], loss)
    found, notes = effects_of(capsys, "log")
    assert not any("told apart" in note for note in notes)
    assert found["pos", "bias"][0] == 0.03 and found["norm", "mlp"][0] == 0.006

    # options with pairs: the fourth option changes with the product of two
    made_up_design("quarter", [(a, b, c, a * b, 1) for a, b, c in cube], loss)
    found, notes = effects_of(capsys, "quarter")
    (note,) = [note for note in notes if note.startswith("mlp=")]
    assert re.fullmatch(r"mlp=\w+ cannot be told apart from pos=\w+ x bias=\w+: its effect includes theirs.", note)
    assert found["mlp",][0] == pytest.approx(-0.04 + 0.03)

    # other learning rates at two corners of a half fraction: pairs of all options but this one
    made_up_design("rates", HALF_FRACTION, learning_rate=0.001)
    corners = HALF_FRACTION[0], HALF_FRACTION[-1]
    made_up_design("rates/high", corners, lambda signs: true_loss(signs) + 0.03, learning_rate=0.002)
    show("rates", "--effects")
    text = capsys.readouterr().out
    rows = re.findall(r"^\| (\w+=.*?) +\| (\S+)", text, re.M)
    assert len(rows) == 16 and sum(" x " in term for term, _ in rows) == 10
    assert re.search("taken as zero: " + ", ".join([r"\w+=\w+ x learning_rate=0.002"] * 5) + r"\.", text)
    assert dict(rows)["learning_rate=0.002"] == "+0.0300"

    # options with options: the third changes where one of the others does, which here both never do
    made_up_design("three", [(-1, -1, -1, 1, 1), (1, -1, 1, 1, 1), (-1, 1, 1, 1, 1)])
    found, notes = effects_of(capsys, "three")
    assert set(found) == {("pos",), ("bias",)}
    (note,) = [note for note in notes if "told apart" in note and note.startswith("norm=")]
    assert re.fullmatch(r"norm=\w+ cannot be told apart from pos=\w+, bias=\w+: not fitted.", note)


def test_effects_of_options_that_follow_others(capsys):
    made_up_design("log", [(-1, -1, 1, 1, 1), (1, 1, 1, 1, 1)])
    found, notes = effects_of(capsys)
    assert set(found) == {("pos",)}
    assert "bias follows pos: their effects include its own." in notes
    made_up_design("log/more", [(-1, 1, 1, 1, 1)])
    found, notes = effects_of(capsys)
    assert set(found) == {("pos",), ("bias",)}
    assert "follows" not in str(notes)
    # a width with a level for each of two options follows both, and no longer where one of them comes with two widths
    for (mlp, n_kv_head), ffn_dim in FFN_DIM.items():
        made_up(f"wide/{ffn_dim}", "hybrid", 3.2 + n_kv_head / 100, ffn_dim=ffn_dim, mlp=mlp, n_kv_head=n_kv_head)
    found, notes = effects_of(capsys, "wide")
    assert set(found) == {("mlp",), ("n_kv_head",), ("mlp", "n_kv_head")}
    assert "ffn_dim follows mlp, n_kv_head: their effects include its own." in notes
    made_up("wide/other", "hybrid", 3.3, ffn_dim=2048, mlp="gelu", n_kv_head=12)
    capsys.readouterr()
    show("wide", "--effects")
    text = capsys.readouterr().out
    assert "ffn_dim follows" not in text and "ffn_dim=3072" in text
    for depth, ((mlp, n_kv_head), ffn_dim) in itertools.product((2, 3), FFN_DIM.items()):
        made_up(f"deep/{depth}-{ffn_dim}", "hybrid", 3.2 + depth / 10, mlp=mlp, n_kv_head=n_kv_head, n_layer=depth,
                ffn_dim=ffn_dim // depth)
    show("deep", "--effects")
    assert "ffn_dim follows n_layer, mlp, n_kv_head: " in capsys.readouterr().out
    # the architecture follows nothing
    for arch, n_head in ("gpt2", 4), ("llama", 2), ("llama", 8):
        made_up(f"arch/{n_head}", arch, 3.0 + n_head / 100, n_head=n_head)
    show("arch", "--effects")
    text = capsys.readouterr().out
    assert "| arch=gpt2 " in text and "follows" not in text
    assert "n_head=4 cannot be told apart from arch=gpt2" in text


def test_effects_of_scripts_and_learning_rates(capsys):
    arch = {"gpt2": 0.0, "llama": -0.1, "phi": -0.06}
    rate = {0.001: 0.0, 0.002: 0.03, 0.004: 0.09}
    own = {"gpt2": {}, "llama": {"rope_theta": 5e5, "ffn_dim": 9}, "phi": {"rope_theta": 1e4, "ffn_dim": 9}}
    for (a, b), seed in itertools.product(itertools.product(arch, rate), (1, 2)):
        warmup = 10 if b < 0.004 else 20
        made_up(f"log/{a}-{b}-{seed}", a, 3.3 + arch[a] + rate[b] + 0.002 * (a == "phi") * (b == 0.002),
                learning_rate=b, warmup_steps=warmup, seed=seed, batch_size=seed, device=f"{a}", **own[a])
    show("--effects")
    text = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (\w+=.*?) +\| (\S+) +\| 0.0000", text, re.M))
    # an option by itself: between means; a pair: half of the interaction of the four settings
    third = 0.002 / 3
    assert rows == {
        "arch=phi": f"{0.04 + third:+.4f}", "arch=gpt2": "+0.1000",
        "learning_rate=0.002": f"{0.03 + third:+.4f}", "learning_rate=0.004": "+0.0900",
        "arch=phi x learning_rate=0.002": "+0.0010", "arch=phi x learning_rate=0.004": "+0.0000",
        "arch=gpt2 x learning_rate=0.002": "+0.0000", "arch=gpt2 x learning_rate=0.004": "+0.0000"}
    assert "Baseline, the best: arch=llama, learning_rate=0.001." in text
    assert "rope_theta follows arch: " in text and "warmup_steps follows learning_rate: " in text
    assert not re.search("ffn_dim|seed=|batch_size|device|log_dir|told apart", text)
    # the table still calls these runs not comparable
    assert any("learning_rate=" in row["remarks"] for row in compared(capsys))


def test_effects_say_in_a_line_what_is_wrong(capsys):
    def attempt(*paths):
        return lambda: show(*paths, "--effects")

    made_up_design("log", LADDER[:3])
    bad(capsys, attempt("log/0-1"), "--effects needs runs that differ in an option")
    made_up_design("log", LADDER[:1], seed=2)
    bad(capsys, attempt("log/0-1", "log/0-2"), "--effects needs runs that differ in an option")
    made_up_design("same", LADDER[:1])
    bad(capsys, attempt("log", "same"), "hybrid (0-1): a seed comes twice")
    made_up_design("short", LADDER[3:4], steps=500)
    bad(capsys, attempt("log", "short"), "hybrid (0-1) is not comparable: in progress, step 500 of 1000")
    made_up_design("long", LADDER[3:4], steps=2000, max_steps=2000)
    bad(capsys, attempt("log", "long"), "not comparable: max_steps=2000 instead of 1000")
    made_up_design("other", LADDER[3:4], data_dir="books")
    bad(capsys, attempt("log", "other"), "not comparable: data_dir=books instead of data")
    made_up_design("nan", LADDER[3:4], lambda signs: math.nan)
    bad(capsys, attempt("log", "nan"), "not comparable: it diverged")
    assert not capsys.readouterr().out
    attempt("log")()
    assert "Validation loss: 4 runs, 3 settings." in capsys.readouterr().out


def test_compare_says_in_a_line_what_is_wrong(monkeypatch, capsys):
    def attempt(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
        compare.main()

    bad(capsys, lambda: attempt(), "log is not there")
    os.makedirs("log/empty")
    bad(capsys, lambda: attempt(), "no log to read in log")
    open("log/empty/log.txt", "w").close()
    bad(capsys, lambda: attempt("log/empty"), "no log to read in log/empty")

    made_up("log/a", hits=np.ones(5, bool))
    hits = "log/a/hella_1000.npy"
    for content in b"", b"xyz", b"PK", b"\x93NUMPY":
        with open(hits, "wb") as f:
            f.write(content)
        bad(capsys, lambda: attempt("log/a"), hits, "move it away")
    for array in np.ones((2, 5), bool), np.array(["a"]), np.zeros(0, bool):
        np.save(hits, array)
        bad(capsys, lambda: attempt("log/a"), hits, "move it away")
    np.save(hits, np.ones(5, bool))
    endings = dict.fromkeys(("losses", "tokens", "bytes"), np.ones((5, 4))) | {"labels": np.zeros(5, int)}
    npz = "log/a/hella_1000.npz"
    short = {"tokens": np.ones((3, 4))}, {"labels": np.zeros(3, int)}
    for arrays in {}, {"losses": endings["losses"]}, *(endings | each for each in short):
        np.savez(npz, **arrays)
        bad(capsys, lambda: attempt("log/a"), npz, "move it away")
    for content in b"", b"PK", b"\x93NUMPY":
        with open(npz, "wb") as f:
            f.write(content)
        bad(capsys, lambda: attempt("log/a"), npz, "move it away")
    np.savez(npz, **endings)
    attempt("log/a")

    def is_damaged():
        capsys.readouterr()
        bad(capsys, lambda: attempt("log/a"), "no log to read in log/a")
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "log/a/log.txt, or run.json beside it, is damaged" in message

    whole = read_json("log/a/run.json")
    for text in "{", "[" * 100_000:
        with open("log/a/run.json", "w") as f:
            f.write(text)
        is_damaged()
    for content in [], {}, whole | {"arch": 1}, whole | {"params": {}}, whole | {"flops_per_token": "x"}:
        write_json("log/a/run.json", content)
        is_damaged()
    for content in ({"vocab": {}}, {"val_text": {"bytes": 1, "sha256": None}}, {"bytes_per_token": "x"},
                    {"flops_per_token": math.nan}):
        write_json("log/a/run.json", whole | content)
        is_damaged()
    for starts in "x", [1], [{"step": 0}], [{"step": "x", "config": whole["config"]}], [{"step": 0, "config": None}]:
        write_json("log/a/run.json", whole | {"starts": starts})
        is_damaged()
    for name, value in (("max_steps", None), ("total_batch_size", "x"), ("beta2", []), ("data_dir", 1),
                        ("beta1", math.inf)):
        write_json("log/a/run.json", whole | {"config": whole["config"] | {name: value}})
        is_damaged()

    made_up("log/b")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bad(capsys, lambda: attempt("log/b", "--plot=x.png"), "pip install matplotlib")
    for name in "", "/", "log", "x":
        bad(capsys, lambda: attempt("log/b", f"--plot={name}"), "--plot=", "curves.png")
