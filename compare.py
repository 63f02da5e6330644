"""
Which architecture wins? One table, best first, from what the runs left behind: finished ones and those in progress.

    python compare.py                              # every run below log/
    python compare.py log/gpt2 log/llama*          # these
    python compare.py --plot=curves.png            # and curves against tokens and FLOPs (needs matplotlib)

A run is a folder with log.txt, and beside it run.json and the hella_*.npy that say which items were right. Logs without them
are read too: build-nanogpt's are the same. Runs that differ in their seed alone share a line: mean (least to most).

The order is that of the validation loss. What was trained on other data (a folder of another name), on other tokens or with
another schedule than most runs stands below the others, with the reason; so does a run in progress. HellaSwag is compared
item by item with the first line: the difference in points, its 95% interval, and a p-value, by McNemar's exact test for one
run against one (Dietterich 1998, "Approximate Statistical Tests for Comparing Supervised Classification Learning
Algorithms", section 3.1), else by the normal distribution that the interval is taken from.
"""
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from common import Parser, fail, one_line_errors

# what two runs must share for their results to be compared; other options of training are remarked on where they differ
SETTING = ("data_dir", "vocab_size", "block_size", "total_batch_size", "max_steps", "warmup_steps", "learning_rate",
           "min_lr_ratio", "val_tokens", "init_from")
# and what changes no result, or only as another seed would
HARMLESS = ("seed", "batch_size", "chunk_size", "recompute", "eval_interval", "hella_limit", "checkpoint_interval",
            "keep_checkpoints", "sample_interval", "log_dir", "hellaswag_file", "resume", "device", "compile", "tiny")
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
        """From log.txt and run.json beside it. Raises some exception if they are damaged."""
        folder, streams, info = os.path.dirname(os.path.abspath(path)), defaultdict(dict), {}
        with open(path, errors="replace") as f:
            for line in f:
                if m := re.fullmatch(r"(\d+) (\w+) ([-+.\w]+)\n", line):  # else a line in the making
                    streams[m[2]][int(m[1])] = float(m[3])
        if os.path.exists(file := os.path.join(folder, "run.json")):
            with open(file) as f:
                info = json.load(f)
            config, numbers = info["config"], [info["flops_per_token"], info["params"]["total"], info["params"]["active"]]
            numbers += [info.get("tokens_per_second") or 0, *(config[k] for k in ("max_steps", "total_batch_size", "hella_limit"))]
            texts = [info["arch"], info["device"], config["data_dir"], config["hellaswag_file"]]
            if (not all(isinstance(t, str) for t in texts) or not all(isinstance(n, (int, float)) for n in numbers)
                    or not all(isinstance(v, (int, float, str)) for v in config.values())):
                raise TypeError("a value in run.json is of another kind")
        config = {k: v for k, v in info.get("config", BUILD_NANOGPT).items() if k not in HARMLESS}
        if info:
            config |= {"data_dir": os.path.basename(os.path.normpath(config["data_dir"])),
                       "vocab_size": min(config["vocab_size"], 50257),  # beyond these is padding
                       "init_from": config.get("init_from", "")}
        return cls(folder, streams, info, config)

    @property
    def steps(self):
        """Updates made. `train` is written with the number of updates before its own."""
        return max(step + (stream == "train") for stream, values in self.streams.items() for step in values)

    @property
    def finished(self):
        return not self.info or self.steps >= self.config["max_steps"]

    @property
    def items(self):
        """Which HellaSwag items it is evaluated on: file and number."""
        config = self.info.get("config", {"hellaswag_file": "", "hella_limit": 10042})
        return os.path.basename(config["hellaswag_file"]), config["hella_limit"]

    def hits(self, step):
        """The HellaSwag items that were right, bool (items,), or None."""
        path = os.path.join(self.folder, f"hella_{step}.npy")
        if not os.path.exists(path):
            return None
        try:
            hits = np.load(path)
            if hits.ndim != 1 or hits.dtype != bool or not len(hits):
                raise ValueError
            return hits
        except Exception:  # what a damaged file raises is np.load's secret
            fail(f"{path} is not what a run leaves behind: move it away")


class Group:
    """Runs that differ in their seed alone. reasons: why they are not comparable; remarks: what else sets them apart."""

    def __init__(self, runs):
        self.runs, self.info, self.config = runs, runs[0].info, runs[0].config
        self.label = self.arch = self.info.get("arch", os.path.basename(runs[0].folder))
        self.steps, self.reasons, self.remarks = min(run.steps for run in runs), [], []
        self.loss = float(np.mean(self.last("val") or math.nan))
        hits = [run.hits(self.at("hella")) for run in runs]
        self.items = runs[0].items if len({run.items for run in runs}) == 1 else None
        whole = self.items and all(h is not None and len(h) == len(hits[0]) for h in hits)
        self.hits = np.mean(hits, axis=0) if whole else None  # (items,): the part of the runs that had it right

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
    """Every log below the given files and folders, once."""
    found = []
    for path in paths:
        if not os.path.exists(path):
            fail(f"{path} is not there: name folders that hold log.txt, or train first")
        found += [path] if os.path.isfile(path) else [os.path.join(folder, "log.txt") for folder, _, files in os.walk(path)
                                                      if "log.txt" in files]
    return sorted(set(map(os.path.realpath, found)))


def group(runs):
    """Runs -> groups, the comparable ones first, then by validation loss; each knows what sets it apart."""
    by_config = defaultdict(list)
    for run in runs:
        by_config[json.dumps([run.info.get("arch", run.folder), run.finished, run.config], sort_keys=True)].append(run)
    groups = sorted(map(Group, by_config.values()), key=lambda g: (math.isnan(g.loss), g.loss))
    described = [g for g in groups if g.info]
    votes = Counter(tuple((k, g.config.get(k)) for k in SETTING) for g in described for _ in g.runs)
    usual = dict(max(votes, key=lambda setting: (votes[setting], dict(setting)["max_steps"]), default=()))
    for g in groups:
        g.reasons += [f"{k}={g.config.get(k)} instead of {v or repr(v)}" for k, v in usual.items() if g.info and g.config.get(k) != v]
        if not g.info:
            g.reasons.append("no run.json: taken as build-nanogpt's, 524,288 tokens a step, 10,042 HellaSwag items")
        elif not g.runs[0].finished:
            g.reasons.append(f"in progress, step {g.steps} of {g.config['max_steps']}")
        elif g.at("val") != g.steps:
            g.reasons.append(f"validation loss of step {g.at('val')}, not {g.steps}")
    groups.sort(key=lambda g: bool(g.reasons))
    for g in described:
        kin = [r for r in described if r.arch == g.arch]
        for k in sorted({k for r in kin for k in r.config} - set(SETTING)):
            names = list(g.config)
            trains = k in names and names.index(k) >= names.index("total_batch_size")  # else it belongs to the model
            most, _ = Counter(r.config[k] for r in (described if trains else kin) if k in r.config).most_common(1)[0]
            if g.config.get(k) != most:
                g.remarks.append(f"{k}={g.config[k]}" if k in g.config else f"{k} is not in its run.json")
        if len({run.info["config"].get("seed") for run in g.runs}) < len(g.runs):
            g.remarks.append("a seed comes twice")
        if g.hits is None and any(run.streams["hella"] for run in g.runs):
            g.remarks.append("HellaSwag's items are not all there, or not the same in all runs")
        if len(kin) > 1:
            g.label += f" ({os.path.basename(g.runs[0].folder)})"
    return groups


def sign_test(wins, losses):
    """Two-sided p-value: so uneven, or more so, would a fair coin be."""
    n = wins + losses
    total = term = 1
    for k in range(min(wins, losses)):
        term = term * (n - k) // (k + 1)  # n over k + 1
        total += term
    return min(1.0, 2 * total / 2 ** n)


def against(g, leader):
    """HellaSwag item by item: the difference in points with its 95% interval, and the p-value."""
    if g is leader or g.hits is None or leader.hits is None or g.items != leader.items or len(g.hits) != len(leader.hits):
        return "-", "-"
    d = 100 * (g.hits - leader.hits.astype(float))
    mean, error = d.mean(), d.std() / math.sqrt(len(d))
    if len(g.runs) == len(leader.runs) == 1:
        p = sign_test(int((d > 0).sum()), int((d < 0).sum()))
    else:
        p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else 1.0
    return f"{mean:+.2f} [{mean - 1.96 * error:+.2f}, {mean + 1.96 * error:+.2f}]", f"{p:.2g}"


def spread(values, error=""):
    if not values:
        return "-"
    between = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{error}{between}"


def accuracy(g):
    """HellaSwag with its standard error over the items."""
    if not g.items or not (values := g.last("hella")):
        return "-"
    p, n = np.mean(values), g.items[1] or math.nan
    error = math.sqrt(abs(p * (1 - p)) / n) if g.hits is None else g.hits.std() / math.sqrt(len(g.hits))
    return spread(values, f" ± {error:.4f}")


def rates(g):
    """Tokens/s, apart for each kind of machine."""
    machines = defaultdict(list)
    for run in g.runs:
        if rate := run.info.get("tokens_per_second"):
            machines[f"{run.info.get('processes')} x {run.info['device']}"].append(rate)
    return "; ".join(f"{np.mean(rate):,.0f} on {machine}" for machine, rate in machines.items()) or "-"


def table(groups):
    rows = [("model", "runs", "parameters", "active", "MFLOP/token", "tokens", "validation loss", "HellaSwag acc_norm",
             "points to the first", "p", "tokens/s", "remarks")]
    for g in groups:
        rows.append((
            g.label, str(len(g.runs)),
            *(f"{g.info['params'][k]:,}" if g.info else "-" for k in ("total", "active")),
            f"{g.info['flops_per_token'] / 1e6:,.1f}" if g.info else "-",
            f"{g.steps * g.config['total_batch_size']:,}", spread(g.last("val")), accuracy(g), *against(g, groups[0]), rates(g),
            "; ".join((["not comparable: " + "; ".join(g.reasons)] if g.reasons else []) + g.remarks)))
    rows = [[" ".join(cell.split()).replace("|", "/") for cell in row] for row in rows]
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
            axis.plot(x, values.mean(0), "." + ("--" if g.reasons else "-"), color=f"C{i}", label=g.label.replace("$", r"\$"))
            axis.fill_between(x, values.min(0), values.max(0), color=f"C{i}", alpha=0.2, lw=0)
        axis.set(xlabel=unit, ylabel="validation loss" if stream == "val" else "HellaSwag acc_norm", xlim=(0, None))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    try:
        figure.savefig(path, dpi=90)
    except ValueError as e:
        fail(f"--plot={path}: {e}")


@one_line_errors()
def main():
    parser = Parser(description="Which architecture wins? One table, best first, from the logs of the runs.")
    parser.add_argument("paths", nargs="*", default=["log"], help="folders to search for log.txt, or such files (log)")
    parser.add_argument("--plot", metavar="FILE", help="draw validation loss and HellaSwag against tokens and FLOPs")
    args, runs = parser.parse_args(), []
    if args.plot is not None and not re.search(r"\w\.\w+$", args.plot):
        fail(f"--plot={args.plot} is not the name of an image: curves.png, say")
    for path in find(args.paths):
        try:
            run = Run.read(path)
        except Exception as e:  # a file that was edited can raise anything
            print(f"passed over: {path}, or run.json beside it, is damaged: {e!r}"[:500], file=sys.stderr)
            continue
        if any(run.streams.values()):
            runs.append(run)
        else:
            print(f"passed over: {path} holds no line of a log yet", file=sys.stderr)
    if not runs:
        fail(f"no log to read in {' '.join(args.paths)}: train first, or name the folders of runs")
    groups = group(runs)
    sys.stdout.reconfigure(errors="replace")  # the terminal may not know ±
    print(table(groups), flush=True)
    if args.plot:
        plot(groups, args.plot)


if __name__ == "__main__":
    main()
