"""
Which architecture wins? One table, best first, from what the runs left behind: finished ones and those in progress.

    python compare.py                              # every run below log/
    python compare.py log/gpt2 log/llama*          # these
    python compare.py --plot=curves.png            # and curves against tokens and FLOPs (needs matplotlib)

A run is a folder with log.txt, and beside it run.json and the hella_*.npy that say which items were right. Logs without them
are read too: build-nanogpt's are the same. Runs that differ in their seed alone share a line: mean (least to most).

The order is that of the validation loss. What was trained on other data, on other tokens or with another schedule than most
runs stands below the others, with the reason; so does a run in progress. HellaSwag is compared item by item with the first
line: the difference in points, its 95% interval, and the p-value of McNemar's exact test (Dietterich 1998,
"Approximate Statistical Tests for Comparing Supervised Classification Learning Algorithms", section 3.1).
"""
import glob
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from common import Parser, fail

# what two runs must share for their results to be compared; other options of training are remarked on where they differ
SETTING = ("data_dir", "vocab_size", "block_size", "total_batch_size", "max_steps", "warmup_steps", "learning_rate",
           "min_lr_ratio", "val_tokens")
# and what changes no result, or only as another seed would
HARMLESS = ("seed", "batch_size", "chunk_size", "recompute", "eval_interval", "hella_limit", "checkpoint_interval",
            "keep_checkpoints", "sample_interval", "log_dir", "hellaswag_file", "resume", "device", "compile", "tiny")
RUN_JSON = ("arch", "config", "params", "flops_per_token", "device", "processes")
BUILD_NANOGPT = {"total_batch_size": 524288}  # what its logs do not say


@dataclass
class Run:
    """streams: {name: {step: value}}; info: run.json, or {}; config: its options, without those that change no result."""
    folder: str
    streams: dict
    info: dict
    config: dict

    @classmethod
    def read(cls, path):
        """From log.txt and the file beside it. Raises OSError, ValueError, KeyError or TypeError if they are damaged."""
        folder, streams, info = os.path.dirname(os.path.abspath(path)), defaultdict(dict), {}
        with open(path, errors="replace", newline="\n") as f:
            for line in f:
                if m := re.fullmatch(r"(\d+) (\w+) ([-+.\w]+)\n", line):  # else a line in the making
                    streams[m[2]][int(m[1])] = float(m[3])
        if os.path.exists(file := os.path.join(folder, "run.json")):
            with open(file) as f:
                info = json.load(f)
            info = {k: info[k] for k in RUN_JSON} | {"tokens_per_second": info.get("tokens_per_second")}
        config = {k: v for k, v in info.get("config", BUILD_NANOGPT).items() if k not in HARMLESS}
        if info:
            config["data_dir"] = os.path.basename(os.path.normpath(config["data_dir"]))
            config["vocab_size"] = min(config["vocab_size"], 50257)  # beyond these is padding
        return cls(folder, streams, info, config)

    @property
    def steps(self):
        """Updates made. `train` is written with the number of updates before its own."""
        return max(step + (stream == "train") for stream, values in self.streams.items() for step in values)

    def hits(self, step):
        """The HellaSwag items that were right, bool (items,), or None."""
        path = os.path.join(self.folder, f"hella_{step}.npy")
        try:
            return np.load(path) if os.path.exists(path) else None
        except (EOFError, OSError, ValueError) as e:
            fail(f"{path} is damaged: {e}")


class Group:
    """Runs that differ in their seed alone. reasons: why they are not comparable; remarks: what else sets them apart."""

    def __init__(self, runs):
        self.runs, self.info, self.config = runs, runs[0].info, runs[0].config
        self.label = self.arch = self.info.get("arch", os.path.basename(runs[0].folder))
        self.steps, self.reasons, self.remarks = min(run.steps for run in runs), [], []
        self.loss = float(np.mean(self.last("val") or math.nan))
        hits = [run.hits(self.at("hella")) for run in runs]
        same = all(h is not None and len(h) == len(hits[0]) for h in hits)
        self.hits = np.mean(hits, axis=0) if same else None  # (items,): the part of the runs that had it right

    def at(self, stream):
        """The last step that all runs have, or None."""
        return max(set.intersection(*(set(run.streams[stream]) for run in self.runs)), default=None)

    def last(self, stream):
        return [run.streams[stream][self.at(stream)] for run in self.runs if self.at(stream) is not None]

    def curve(self, stream):
        """Steps that all runs have, without the untrained model's, and the values (runs, steps)."""
        steps = sorted(set.intersection(*(set(run.streams[stream]) for run in self.runs)) - {0})
        return np.array(steps), np.array([[run.streams[stream][step] for step in steps] for run in self.runs])


def find(paths):
    """Every log below the given files and folders."""
    found = []
    for path in paths:
        if not os.path.exists(path):
            fail(f"{path} is not there: name folders that hold log.txt, or train first")
        found += [path] if os.path.isfile(path) else glob.glob(os.path.join(glob.escape(path), "**", "log.txt"), recursive=True)
    return sorted(set(found))


def group(runs):
    """Runs -> groups, the comparable ones first, then by validation loss; each knows what sets it apart."""
    by_config = defaultdict(list)
    for run in runs:
        by_config[json.dumps([run.info.get("arch", run.folder), run.config], sort_keys=True)].append(run)
    groups = sorted(map(Group, by_config.values()), key=lambda g: (math.isnan(g.loss), g.loss))
    described = [g for g in groups if g.info]
    votes = Counter(tuple((k, g.config.get(k)) for k in SETTING) for g in described for _ in g.runs)
    usual = dict(max(votes, key=lambda setting: (votes[setting], dict(setting)["max_steps"]), default=()))
    for g in groups:
        g.reasons += [f"{k}={g.config.get(k)}, others {v}" for k, v in usual.items() if g.info and g.config.get(k) != v]
        if not g.info:
            g.reasons.append("no run.json: taken as build-nanogpt's, 524,288 tokens a step, 10,042 HellaSwag items")
        elif g.steps < g.config["max_steps"]:
            g.reasons.append(f"in progress, step {g.steps} of {g.config['max_steps']}")
    groups.sort(key=lambda g: bool(g.reasons))
    for g in described:
        names = list(g.config)
        for k in names:
            trains = names.index(k) >= names.index("total_batch_size")  # else it belongs to the model
            rivals = [r for r in groups if k in r.config and (trains or r.arch == g.arch)]
            most, _ = Counter(r.config[k] for r in rivals).most_common(1)[0]
            if k not in SETTING and g.config[k] != most:
                g.remarks.append(f"{k}={g.config[k]}")
        if len({run.info["config"].get("seed") for run in g.runs}) < len(g.runs):
            g.remarks.append("a seed comes twice")
        if sum(r.arch == g.arch for r in described) > 1:
            g.label += f" ({os.path.basename(g.runs[0].folder)})"
    return groups


def sign_test(wins, losses):
    """Two-sided p-value: so uneven, or more so, would a fair coin be."""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2 ** n)


def against(g, leader):
    """HellaSwag item by item: the difference in points with its 95% interval, and the p-value. Of several seeds an item
    counts for the group that has it right more often; of one each, that is McNemar's exact test."""
    if g is leader or g.hits is None or leader.hits is None or len(g.hits) != len(leader.hits):
        return "-", "-"
    d = 100 * (g.hits - leader.hits.astype(float))
    half = 1.96 * d.std() / math.sqrt(len(d))
    p = sign_test(int((d > 0).sum()), int((d < 0).sum()))
    return f"{d.mean():+.2f} [{d.mean() - half:+.2f}, {d.mean() + half:+.2f}]", f"{p:.2g}"


def spread(values, error=""):
    if not values:
        return "-"
    between = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{error}{between}"


def accuracy(g):
    """HellaSwag with its standard error over the items."""
    if not (values := g.last("hella")):
        return "-"
    p, n = np.mean(values), g.info.get("config", {}).get("hella_limit", 10042)
    error = math.sqrt(p * (1 - p) / n) if g.hits is None else g.hits.std() / math.sqrt(len(g.hits))
    return spread(values, f" ± {error:.4f}")


def table(groups):
    rows = [("model", "runs", "parameters", "active", "MFLOP/token", "tokens", "validation loss", "HellaSwag acc_norm",
             "points to the first", "p", "tokens/s", "remarks")]
    for g in groups:
        rates = [rate for run in g.runs if (rate := run.info.get("tokens_per_second"))]
        rows.append((
            g.label, str(len(g.runs)),
            *(f"{g.info['params'][k]:,}" if g.info else "-" for k in ("total", "active")),
            f"{g.info['flops_per_token'] / 1e6:,.1f}" if g.info else "-",
            f"{g.steps * g.config['total_batch_size']:,}", spread(g.last("val")), accuracy(g), *against(g, groups[0]),
            f"{np.mean(rates):,.0f} on {g.info['processes']} x {g.info['device']}" if rates else "-",
            "; ".join((["not comparable: " + "; ".join(g.reasons)] if g.reasons else []) + g.remarks)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def plot(groups, path):
    try:
        import matplotlib
    except ImportError:
        fail("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharey="row", layout="constrained")
    for axis, (stream, unit) in zip(axes.flat, [(s, u) for s in ("val", "hella") for u in ("tokens", "FLOPs")]):
        for i, g in enumerate(groups):
            steps, values = g.curve(stream)
            x = steps * g.config["total_batch_size"] * (1.0 if unit == "tokens" else g.info.get("flops_per_token", math.nan))
            axis.plot(x, values.mean(0), "." + ("--" if g.reasons else "-"), color=f"C{i}", label=g.label)
            axis.fill_between(x, values.min(0), values.max(0), color=f"C{i}", alpha=0.2, lw=0)
        axis.set(xlabel=unit, ylabel="validation loss" if stream == "val" else "HellaSwag acc_norm")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    try:
        figure.savefig(path, dpi=90)
    except (OSError, ValueError) as e:
        fail(f"cannot write {path}: {e}")


def main():
    parser = Parser(description="Which architecture wins? One table, best first, from the logs of the runs.")
    parser.add_argument("paths", nargs="*", default=["log"], help="folders to search for log.txt, or such files (log)")
    parser.add_argument("--plot", metavar="FILE", help="draw validation loss and HellaSwag against tokens and FLOPs")
    args = parser.parse_args()
    runs = []
    for path in find(args.paths):
        try:
            run = Run.read(path)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:
            fail(f"{path}, or run.json beside it, is damaged: {e!r}")
        if any(run.streams.values()):
            runs.append(run)
        else:
            print(f"passed over: {path} holds no line of a log yet", file=sys.stderr)
    if not runs:
        fail(f"no log.txt in {' '.join(args.paths)}: train first, or name the folders of runs")
    groups = group(runs)
    print(table(groups))
    if args.plot:
        plot(groups, args.plot)


if __name__ == "__main__":
    main()
