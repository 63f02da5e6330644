"""
Compare training runs: print one table, best run first, of finished runs and runs in progress.

    python compare.py                           # every run below log/
    python compare.py log/gpt2 log/llama*       # these runs
    python compare.py --plot=curves.png         # also draw the curves (needs matplotlib)
    python compare.py log/ladder --effects      # what each option that differs does to the loss
    python compare.py log gpt2.npz              # also what hellaswag.py --save has kept of a model

A run is a folder with log.txt, run.json (its options), val_<step>.npy, the loss of each validation
row, and hella_<step>.npz, the losses of each HellaSwag item's endings; an old run has no rows, and
hella_<step>.npy, whether the model was right. A log.txt without run.json is read as
build-nanogpt's, whose format is the same. Runs that differ only in their seed share a row: mean
(low to high).

The lines are sorted by validation loss: that on the full set (val_full) if all comparable runs have
it. Runs that are in progress, that changed their training on the way, or that differ from most runs
in their data (the name of the data folder), their tokens or their schedule, are not comparable:
they stand below the others, with the reason. Runs with other learning rates are comparable: if an
architecture has several, the remarks say which is the best of how many.

Losses per token of two vocabularies do not compare, as their tokens differ in length. Such runs are
comparable if they were validated on the same text, by the same --val_bytes, and trained on as much
text, within 2% (tokens times bytes per token of the validation text). Their batches and steps may
differ. Then the table, --plot and --effects show bits per byte of the validation text, and
HellaSwag's answer is the ending with the lowest loss per byte, not per token; old runs show "-".

A second table has the differences to the first line, with 95% intervals: of the validation loss,
of HellaSwag's accuracy in points with a p-value, and of its scores "bpb" and "gap" (see
hellaswag.py). The variance of a difference of two means is that of a crossed design with random
runs and random items (Clark 1973, "The language-as-fixed-effect fallacy"):
    s2 (1/m + 1/n) + max(0, d2/N - i2/N (1/m + 1/n))
for m and n runs (seeds) and N items, or rows of validation. s2 is the variance of the runs' means
around that of their setting, pooled over all settings; d2 that of the paired differences of the
items; i2 that of what seeds do to single items, which both terms contain. Quantiles are Student's,
with Satterthwaite's degrees of freedom. If no setting has two seeds, the first term is unknown and
left out: then intervals speak of these checkpoints only, and the p-value of one run against one is
that of McNemar's exact test (Dietterich 1998, "Approximate Statistical Tests for Comparing
Supervised Classification Learning Algorithms", section 3.1).

--effects fits the validation loss of all runs by least squares: a term for each level of an option
and for each pair of options, as in the analysis of factorial designs (Box, Hunter and Hunter,
"Statistics for Experimenters", 2nd edition, chapters 5 and 6). Other seeds are replicates.
"""
import json
import math
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import combinations
from statistics import mode

import numpy as np

from common import RunConfig
from fineweb import Parser, fail, one_line_errors
from hellaswag import item_scores

# Runs are comparable only if these options are equal. Those of TOKENIZED may differ between
# vocabularies, as one text has other tokens in each.
TOKENIZED = ("data_dir", "block_size", "total_batch_size", "max_steps", "warmup_steps",
             "val_tokens")
SETTING = ("vocab_size", *TOKENIZED, "min_lr_ratio", "val_bytes", "init_from")
# The options of SETTING that --effects studies like any other option that differs.
STUDIED = {"warmup_steps", "min_lr_ratio"}
# These options may change when a run resumes: what is trained stays the same.
NEUTRAL = {field.name for field in fields(RunConfig)} - {"data_dir", "dtype", "seed"}
NEUTRAL |= {"batch_size", "chunk_size", "recompute"}
# These do not change the result of a run, or change it only as another seed would.
HARMLESS = NEUTRAL - {"val_tokens"} | {"dtype", "seed"}
# Any other option that differs is named in the remarks.

# The streams of log.txt that the table may show.
LOSSES = {"val": "validation loss", "val_full": "full validation loss", "bpb": "bits per byte"}
# HellaSwag's accuracy in the table: by the loss per token, or per byte between vocabularies.
ACCURACIES = {"acc_norm": "HellaSwag acc_norm", "acc_bytes": "HellaSwag accuracy per byte"}
# Columns of the table of differences, by score: the title, the unit, a factor, and the digits.
HELLASWAG_DIFFERENCES = {
    "acc": ("points on HellaSwag", "points on HellaSwag", 100, 2),
    "bpb": ("bits per byte of endings", "bits per byte of endings", 1, 4),
    "gap": ("gap of endings", "in their gap", 1, 5)}

# Types of the values in run.json; "params.total" stands for info["params"]["total"].
NUMBER = int | float
RUN_JSON = {
    "arch": str, "device": str, "flops_per_token": NUMBER,
    "tokens_per_second": NUMBER | None,
    "params": dict, "params.total": NUMBER, "params.active": NUMBER, "params.non_embedding": NUMBER,
    "vocab": dict | None, "vocab.sha256": str | None,  # None: GPT-2's or unknown
    "val_text": dict | None, "val_text.bytes": int, "val_text.sha256": str,
    "bytes_per_token": NUMBER | None,
    "config": dict, "config.data_dir": str, "config.vocab_size": NUMBER,
    "config.total_batch_size": NUMBER, "config.max_steps": NUMBER,
    "config.hellaswag_file": str, "config.hella_limit": NUMBER}
# What an old run.json lacks, or has only after the first checkpoint.
UNKNOWN = {"tokens_per_second": None, "vocab": None, "val_text": None, "bytes_per_token": None}
# The content of run.json for a run of build-nanogpt, which writes none. NaN and None mean unknown.
BUILD_NANOGPT = {
    "flops_per_token": math.nan,
    "params": {"total": math.nan, "active": math.nan, "non_embedding": math.nan},
    "config": {"data_dir": "edu_fineweb10B", "vocab_size": 50304, "total_batch_size": 524288,
               "max_steps": 19073, "hellaswag_file": "", "hella_limit": 10042}}
NO_RUN_JSON = "no run.json: taken as build-nanogpt's, 524,288 tokens a step, 10,042 HellaSwag items"


@dataclass
class Result:
    """What one run left behind."""
    folder: str
    curves: dict  # {name: {step: value}}, the lines of log.txt
    info: dict  # the content of run.json
    has_run_json: bool

    @cached_property
    def parts(self):
        """The training as a list of (first step, step after the last, config), one for each start
        of which updates remain: the part of a start ends at the step where a later one resumes."""
        parts, end = [], self.steps
        for start in reversed(self.info["starts"]):
            if start["step"] < end:
                parts.insert(0, (start["step"], end, start["config"]))
                end = start["step"]
        if parts:  # steps before the first known start had as many tokens: resuming demands it
            parts[0] = (0, *parts[0][1:])
        return parts

    def tokens(self, step):
        """Return the number of tokens that were trained until a step."""
        return sum((min(step, end) - first) * config["total_batch_size"]
                   for first, end, config in self.parts if first < step)

    @property
    def changes(self):
        """What changed between the parts of the training and may change the result, as texts."""
        changes, known = [], {}
        for first, _, config in self.parts:
            now = {name: value for name, value in config.items() if name not in NEUTRAL}
            now["data_dir"] = folder_name(config["data_dir"])
            for name in sorted(now):
                if now[name] != known.get(name, now[name]):
                    changes.append(f"{name} changed at step {first}: "
                                   f"{shown(known[name])} -> {shown(now[name])}")
            known |= now
        return changes

    @property
    def config(self):
        """The options of the latest start. Those that shape the training are of the latest start
        of which updates remain: resuming a finished run changes nothing but its evaluation."""
        latest = self.info["config"]
        trained = self.parts[-1][2] if self.parts else latest
        return latest | {name: value for name, value in trained.items() if name not in NEUTRAL}

    @property
    def options(self):
        """The options that may change the result."""
        options = {name: value for name, value in self.config.items() if name not in HARMLESS}
        options["data_dir"] = folder_name(options["data_dir"])
        options["init_from"] = options.get("init_from", "")  # only GPT-2 has this option
        vocab, text = self.info["vocab"], self.info["val_text"]
        if vocab and vocab["sha256"]:  # this tells vocabularies of one size apart
            options["vocab_size"] = f"{options['vocab_size']} ({vocab['sha256'][:8]})"
        options["val_bytes"] = f"{text['bytes']} ({text['sha256'][:8]})" if text else 0
        return options

    @property
    def items(self):
        """The HellaSwag items that the run is evaluated on: the name of the file, and how many."""
        config = self.info["config"]
        return os.path.basename(config["hellaswag_file"]), config["hella_limit"]

    @cached_property
    def steps(self):
        """The number of updates made. The line "s train" is written by update s + 1."""
        return max(step + 1 if name == "train" else step
                   for name, values in self.curves.items() for step in values)

    @property
    def finished(self):
        return self.steps >= self.config["max_steps"]

    @property
    def diverged(self):
        """Whether the last validation loss is nan or infinite."""
        curves = [self.curves[name] for name in ("val", "val_full") if self.curves[name]]
        return not all(math.isfinite(curve[max(curve)]) for curve in curves)

    def scores(self, step):
        """Return what read_scores returns of HellaSwag at a step, {} if that is unknown. An old run
        has acc_norm alone."""
        path = os.path.join(self.folder, f"hella_{step}")
        if os.path.exists(f"{path}.npz"):
            return read_scores(f"{path}.npz")
        if not os.path.exists(f"{path}.npy"):
            return {}
        return {"acc_norm": read_array(f"{path}.npy", bool)}

    def rows(self, stream, step):
        """Return the loss of each row of validation, float32 (rows,), or None if unknown."""
        path = os.path.join(self.folder, f"{stream}_{step}.npy")
        return read_array(path, np.float32) if os.path.exists(path) else None


def read_array(path, dtype):
    """Return the array in a file that a run wrote: it has one dimension."""
    try:
        array = np.load(path)
        if array.ndim != 1 or array.dtype != dtype or len(array) == 0:
            raise ValueError
    except Exception:  # np.load raises many kinds of error
        fail(f"{path} is damaged, or no run wrote it: move it away")
    return array


def read_scores(path):
    """Return hellaswag.item_scores of a hella_<step>.npz, and the bytes of its endings (items, 4),
    by which one sees whether two files hold the same items."""
    try:
        saved = np.load(path)
        losses, tokens, n_bytes, labels = (
            saved[name] for name in ("losses", "tokens", "bytes", "labels"))
        is_whole = losses.shape == tokens.shape == n_bytes.shape == (len(labels), 4)
        # the minimum of an empty array is an error, too
        in_range = tokens.min() > 0 and n_bytes.min() > 0 and labels.min() >= 0
        if not is_whole or not in_range or losses.dtype.kind != "f":
            raise ValueError
        return item_scores(losses, tokens, n_bytes, labels) | {"bytes": n_bytes}
    except Exception:  # np.load raises many kinds of error
        fail(f"{path} is damaged, or no run wrote it: move it away")


def folder_name(path):
    return os.path.basename(os.path.normpath(path))


def shown(value):
    return "''" if value == "" else value


def size(n_bytes):
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.3g} MB"


def is_of(value, types):
    """Return whether a value of run.json has one of the types, and, as a number, is finite."""
    return isinstance(value, types) and (not isinstance(value, float) or math.isfinite(value))


def check_types(info):
    """Raise an error that names the key if a value of run.json is missing or has a wrong type."""
    for name, types in RUN_JSON.items():
        parent, _, key = name.rpartition(".")
        values = info[parent] if parent else info
        if values is not None and not is_of(values[key], types):
            raise TypeError(f"{name} cannot be {values[key]!r}")
    starts = info["starts"]
    if not all(isinstance(start["step"], int) for start in starts):
        raise TypeError("the step of a start is not a number")
    for config in [info["config"], *(start["config"] for start in starts)]:
        for name, value in config.items():
            if not is_of(value, RUN_JSON.get(f"config.{name}", NUMBER | str)):
                raise TypeError(f"config.{name} cannot be {value!r}")


def read_result(path):
    """Return the Result of a log. Raise an error of any kind if the log or run.json is damaged."""
    folder = os.path.dirname(os.path.abspath(path))
    curves = defaultdict(dict)
    with open(path, errors="replace") as file:
        for line in file:
            match = re.fullmatch(r"(\d+) (\w+) ([-+.\w]+)\n", line)
            if match:  # the last line of a run in progress may be incomplete
                step, name, value = match.groups()
                curves[name][int(step)] = float(value)
    run_json = os.path.join(folder, "run.json")
    has_run_json = os.path.exists(run_json)
    # the folder takes the place of the architecture, so that no other run joins the group
    info = {"arch": folder, **UNKNOWN, **BUILD_NANOGPT}
    if has_run_json:
        with open(run_json) as file:
            info = UNKNOWN | json.load(file)
    # before there was a list of starts, run.json described the only one
    info["starts"] = info.get("starts") or [{"step": 0, "config": info["config"]}]
    if has_run_json:
        check_types(info)
    config = info["config"]
    for start in reversed(info["starts"]):  # what an old config lacks has the value of the next one
        config = start["config"] = config | start["config"]
    return Result(folder, curves, info, has_run_json)


def find_logs(paths):
    """Return the paths of all logs among and below the given files and folders, each once."""
    logs = []
    for path in paths:
        if not os.path.exists(path):
            fail(f"{path} is not there: name folders that hold log.txt, or train a model first")
        if os.path.isfile(path):
            logs.append(path)
        for folder, _, files in os.walk(path):
            if "log.txt" in files:
                logs.append(os.path.join(folder, "log.txt"))
    return sorted({os.path.realpath(log) for log in logs})


class Group:
    """Results of runs that differ only in their seed: one line of the table."""

    def __init__(self, results):
        first = results[0]
        self.results = results
        self.info = first.info
        self.arch = first.info["arch"]
        self.label = os.path.basename(self.arch)
        self.options = first.options
        self.changes = first.changes
        self.setting = {name: self.options.get(name) for name in SETTING}
        # tokens above a vocabulary are padding; GPT-2's serves every larger size
        own_vocab = self.info["vocab"] and self.info["vocab"]["sha256"]
        self.setting["vocab_size"] = own_vocab or min(first.config["vocab_size"], 50257)
        tokens = self.options["max_steps"] * self.options["total_batch_size"]
        self.text = tokens * (self.info["bytes_per_token"] or math.nan)  # bytes to train on
        self.steps = min(result.steps for result in results)
        self.curves = {name: self.common_curve(name) for name in (*LOSSES, "hella")}
        same_items = all(result.items == first.items for result in results)
        self.items = first.items if same_items else None
        self.show("val")
        self.reasons = [] if first.has_run_json else [NO_RUN_JSON]  # why it is not comparable
        self.remarks = []  # what else sets it apart from other groups

    def show(self, stream):
        """Let the table show the last value of a stream of LOSSES, and HellaSwag's accuracy: with
        "bpb" by the loss per byte, else per token.

        Then `samples` has what is known of items: {name: float (runs, items)} with the names of
        DIFFERENCES, and "loss" for the rows of validation."""
        self.val_step = max(self.curves[stream], default=None)
        self.losses = self.curves[stream].get(self.val_step, [])  # a value for each run
        self.accuracy = "acc_bytes" if stream == "bpb" else "acc_norm"
        if stream == "bpb":  # the log has the accuracy per token
            correct = {step: self.scores_at(step).get("acc") for step in self.curves["hella"]}
            self.curves["hella"] = {step: list(runs.mean(1)) for step, runs in correct.items()
                                    if runs is not None}
        self.hella_step = max(self.curves["hella"], default=None)
        self.accuracies = self.curves["hella"].get(self.hella_step, [])
        self.samples = self.scores_at(self.hella_step)
        rows = [result.rows(stream, self.val_step) for result in self.results]
        if all(each is not None and len(each) == len(rows[0]) for each in rows):
            self.samples["loss"] = np.stack(rows).astype(float)

    def place(self):
        """Return the key that sorts the table."""
        loss = np.mean(self.losses or [math.nan])
        return len(self.reasons) > 0, not math.isfinite(loss), loss

    def common_curve(self, name):
        """Return {step: [the value of each run]} for the steps that all runs have, in order."""
        curves = [result.curves[name] for result in self.results]
        steps = set.intersection(*map(set, curves))
        return {step: [curve[step] for curve in curves] for step in sorted(steps)}

    def scores_at(self, step):
        """Return {"acc", "bpb", "gap": float (runs, items)} of HellaSwag at a step, where all runs
        have it. `endings` becomes the bytes of the endings."""
        runs = [result.scores(step) for result in self.results]
        self.endings = runs[0].get("bytes")
        names = {"acc": self.accuracy, "bpb": "bpb", "gap": "gap"}
        if not self.items or len({len(score) for run in runs for score in run.values()}) != 1:
            return {}
        return {name: np.stack([run[score] for run in runs]).astype(float)
                for name, score in names.items() if all(score in run for run in runs)}

    def mean(self, name):
        """Return the score of each run, or [] if it is unknown."""
        if name == "loss":
            return self.losses
        return list(self.samples[name].mean(1)) if name in self.samples else []

    def hella_error(self, step):
        """Return the standard error, over the items, of HellaSwag's accuracy at a step."""
        correct = self.scores_at(step).get("acc")
        if correct is not None:
            return correct.mean(0).std() / math.sqrt(correct.shape[1])
        p = np.mean(self.curves["hella"][step])
        return math.sqrt(abs(p * (1 - p)) / (self.info["config"]["hella_limit"] or math.nan))


class Reference:
    """A model of which only HellaSwag's scores are known, from a file of hellaswag.py --save. It
    has what the tables show of a group."""

    def __init__(self, path, accuracy):
        """accuracy: the score that the table shows, "acc_norm" or "acc_bytes"."""
        scores = read_scores(path)
        self.label = os.path.basename(path).removesuffix(".npz")
        self.accuracy = accuracy
        self.results = [None]  # as a setting with one run
        self.reasons = ["HellaSwag only"]
        self.losses = []
        self.items = None  # the name of their file is unknown
        self.endings = scores["bytes"]
        self.samples = {name: scores[score][None].astype(float) for name, score in (
            ("acc", accuracy), ("bpb", "bpb"), ("gap", "gap"))}

    mean = Group.mean

    def row(self, columns):
        """Return the line of the table as {column: cell}."""
        acc = self.samples["acc"][0]
        cell = f"{acc.mean():.4f} ± {acc.std() / math.sqrt(len(acc)):.4f}"
        return {column: "-" for column in columns} | {
            "model": self.label, ACCURACIES[self.accuracy]: cell,
            "bits per byte of endings": mean_and_range(self.mean("bpb")),
            "gap of endings": mean_and_range(self.mean("gap"), digits=5),
            "remarks": self.reasons[0]}


def cluster(results):
    """Return the groups of the results, best first. Runs that diverged get groups of their own."""
    clusters = defaultdict(list)
    for result in results:
        key = (result.info["arch"], result.finished, result.diverged, tuple(result.changes),
               frozenset(result.options.items()))
        clusters[key].append(result)
    return sorted(map(Group, clusters.values()), key=Group.place)


def differences(group, usual):
    """Return in what a group's setting differs from that of another, the usual one, as texts."""
    mine, its = group.setting, usual.setting
    other_vocabulary = mine["vocab_size"] != its["vocab_size"]
    across = other_vocabulary and mine["val_bytes"] == its["val_bytes"] != 0
    texts = []
    for name in mine:
        may_differ = name in TOKENIZED and other_vocabulary or name == "vocab_size" and across
        if mine[name] != its[name] and not may_differ:
            value, expected = (shown(each.options.get(name)) for each in (group, usual))
            texts.append(f"{name}={value} instead of {expected}")
            if name == "vocab_size":
                texts[-1] += ": to compare vocabularies, give all runs the same --val_bytes"
    if across and not math.isclose(group.text, usual.text, rel_tol=0.02):
        texts.append(f"trained on about {size(group.text)} of text instead of {size(usual.text)}")
    return texts


def usual_group(groups):
    """Return a group with the setting of most runs, of those whose setting did not change on the
    way, if there are any. If several are equally common, the longest one wins."""
    groups = [group for group in groups if not group.changes] or groups

    def alike(group):
        return sum(len(other.results) for other in groups if not differences(other, group))

    return max(groups, key=lambda group: (alike(group), group.setting["max_steps"]))


def reasons_not_comparable(group, usual, stream):
    """Return the reasons why a group is not comparable with groups of the usual group's setting."""
    reasons = group.changes + differences(group, usual)
    if not group.results[0].finished:
        reasons.append(f"in progress, step {group.steps} of {group.options['max_steps']}")
    elif not group.losses:
        reasons.append(f"no {LOSSES[stream]}")
    elif group.val_step != group.steps:
        reasons.append(f"{LOSSES[stream]} of step {group.val_step}, not {group.steps}")
    if group.results[0].diverged:
        reasons.append("it diverged")
    return reasons


def remark(group, groups):
    """Return what else sets a group apart. An option of training is compared with its most common
    value in all groups, any other option with that in the groups of the same architecture."""
    remarks = []
    same_arch = [other for other in groups if other.arch == group.arch]
    names = {name for other in same_arch for name in other.options}
    names -= set(SETTING)  # which the reasons name
    if group.accuracy == "acc_bytes" and not group.reasons:
        names |= set(TOKENIZED) & group.options.keys()
    for name in sorted(names):
        others = groups if name in (*RunConfig.training_options, *TOKENIZED) else same_arch
        most_common = mode(other.options[name] for other in others if name in other.options)
        if name not in group.options:
            remarks.append(f"{name} is not in its run.json")
        elif group.options[name] != most_common:
            remarks.append(f"{name}={group.options[name]}")
    if unknown := max(result.info["starts"][0]["step"] for result in group.results):
        remarks.append(f"run.json does not describe the first {unknown} steps")
    seeds = {result.config.get("seed") for result in group.results}
    if len(seeds) < len(group.results):
        remarks.append("a seed comes twice")
    if "acc" not in group.samples and any(result.curves["hella"] for result in group.results):
        remarks.append("HellaSwag's items are not all there, or not the same in all runs")
    return remarks


def choose_stream(groups):
    """Let the table show val_full, the loss on more tokens at the end of a run, if all comparable
    runs have it. Return the stream that the table shows: "val_full" or "val"."""
    comparable = [group for group in groups if not group.reasons]
    sizes = {result.config.get("val_full_tokens") for g in comparable for result in g.results}
    if len(sizes) != 1 or any(g.steps not in g.curves["val_full"] for g in comparable):
        return "val"
    for group in groups:
        if group.steps in group.curves["val_full"]:
            group.show("val_full")
        elif group.losses:
            group.remarks.append("validation loss: val, not val_full")
    return "val_full"


def rank(results, studied=()):
    """Return the groups in the order of the table, with reasons, remarks and distinct labels, and
    the stream of LOSSES that they show. The options `studied` may differ."""
    groups = cluster(results)
    for group in groups:
        group.setting = {k: value for k, value in group.setting.items() if k not in studied}
    described = [group for group in groups if group.results[0].has_run_json]
    usual = usual_group(described or groups)
    # {vocabulary: a group of it that may be compared with the usual group}
    peers = {group.setting["vocab_size"]: group for group in groups
             if not differences(group, usual)}
    stream = "bpb" if len(peers) > 1 else "val"
    for group in groups:
        group.show(stream)
    for group in described:
        peer = peers.get(group.setting["vocab_size"], usual)
        group.reasons = reasons_not_comparable(group, peer, stream)
        group.remarks = remark(group, described)
        if sum(other.arch == group.arch for other in described) > 1:
            group.label += f" ({os.path.basename(group.results[0].folder)})"
    if stream == "val":
        stream = choose_stream(groups)
    for group in groups:
        if group.losses and group.hella_step not in (None, group.val_step):
            group.remarks.append(f"HellaSwag of step {group.hella_step}")
    groups = sorted(groups, key=Group.place)
    remark_rates(groups)
    return groups, stream


def remark_rates(groups):
    """Name the learning rates where comparable groups differ in nothing else. groups: best first.
    """
    alike = defaultdict(list)
    for group in groups:
        if not group.reasons and "learning_rate" in group.options:
            others = {k: v for k, v in group.options.items() if k != "learning_rate"}
            alike[group.arch, frozenset(others.items())].append(group)
    for same in alike.values():
        for group in same if len(same) > 1 else []:
            rate = f"learning_rate={group.options['learning_rate']}"
            group.remarks = [text for text in group.remarks if text != rate]
            best = f", the best of {len(same)}" if group is same[0] else ""
            group.remarks.insert(0, rate + best)


def sign_test(wins, losses):
    """Return the two-sided p-value of the sign test: the chance that a fair coin splits at least
    as unevenly."""
    n = wins + losses
    term = total = 1  # n choose 0
    for k in range(min(wins, losses)):
        term = term * (n - k) // (k + 1)  # n choose k + 1
        total += term
    return min(1.0, 2 * total / 2 ** n)


def student(freedom):
    """Return angles x, float (20001,), and the two-sided p-values in Student's distribution of
    t = sqrt(freedom) tan(x), whose density in x is cos(x) ** (freedom - 1)."""
    x = np.linspace(0, math.pi / 2, 20001)
    density = np.cos(x) ** (freedom - 1)
    areas = (density[1:] + density[:-1]) / 2
    beyond = np.append(areas[::-1].cumsum()[::-1], 0.0)
    return x, beyond / beyond[0]


def p_value(t, freedom):
    """Return the two-sided p-value of t."""
    return float(np.interp(math.atan(abs(t) / math.sqrt(freedom)), *student(freedom)))


def quantile(p, freedom):
    """Return the t whose two-sided p-value is p."""
    x, p_values = student(freedom)
    return math.sqrt(freedom) * math.tan(np.interp(p, p_values[::-1], x[::-1]))


def pool(groups, name):
    """Return (s2, i2, degrees of freedom) of the docstring at the top for a score, from the
    comparable groups. i2 is 0 where items are unknown."""
    between, freedom, within, cells = 0.0, 0, 0.0, 0
    for group in groups:
        n_runs = len(group.mean(name))
        if group.reasons or "a seed comes twice" in group.remarks or n_runs < 2:
            continue
        between += n_runs * np.var(group.mean(name))
        freedom += n_runs - 1
        if name in group.samples:
            x = group.samples[name]  # (runs, items)
            rest = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
            within += (rest ** 2).sum()
            cells += (n_runs - 1) * (x.shape[1] - 1)
    return between / max(1, freedom), within / max(1, cells), freedom


@dataclass
class Difference:
    """A score of one group minus that of another."""
    mean: float
    error: float  # standard error
    freedom: float  # its degrees of freedom
    p: float


def same_items(group, first):
    if group.endings is None or first.endings is None:
        return group.items == first.items
    return np.array_equal(group.endings, first.endings)


@np.errstate(invalid="ignore")  # a model that diverged may have infinite losses
def difference(group, first, name, pooled):
    """Return the Difference of a score between two groups, or None if that or its error is unknown.
    Losses are on the same rows in comparable groups only. pooled: what `pool` returns."""
    s2, i2, freedom = pooled
    a, b = group.samples.get(name), first.samples.get(name)
    paired = a is not None and b is not None and a.shape[1] == b.shape[1]
    if name == "loss":
        if group.reasons or first.reasons or not (paired or freedom):
            return None
    elif not paired or not same_items(group, first):
        return None
    mean = np.mean(group.mean(name)) - np.mean(first.mean(name))
    share = 1 / len(group.results) + 1 / len(first.results)
    of_seeds, of_items = s2 * share, 0.0
    parts = of_seeds ** 2 / freedom if freedom else 0.0  # for Satterthwaite's degrees of freedom
    if paired:
        each = a.mean(0) - b.mean(0)  # (items,)
        rest = max(1, len(each) - 1)
        of_items = np.maximum(0.0, (each.var() - i2 * share) / rest)  # nan stays nan
        parts += of_items ** 2 / rest
    variance = of_seeds + of_items
    if not 0 < variance < math.inf:  # no spread was seen, so that none is known
        is_same = paired and not each.any()
        return Difference(0.0, 0.0, 1.0, 1.0) if is_same else None
    error = math.sqrt(variance)
    total_freedom = min(variance ** 2 / parts, 1e5)  # more is the normal distribution
    p = p_value(mean / error, total_freedom)
    if name == "acc" and not freedom and len(a) == len(b) == 1:
        p = sign_test(wins=int((each > 0).sum()), losses=int((each < 0).sum()))
    return Difference(mean, error, total_freedom, p)


def difference_table(groups, stream):
    """Return the differences to the first line, and what they tell, as text. "" if none is known.
    """
    columns = {"loss": (LOSSES[stream], f"in {LOSSES[stream]}", 1, 4), **HELLASWAG_DIFFERENCES}
    pooled = {name: pool(groups, name) for name in columns}
    first, *others = groups
    rows, smallest = [], defaultdict(list)  # smallest: the differences that would be found
    for group in others:
        row = {"model": group.label}
        for name, (title, _, scale, digits) in columns.items():
            d = difference(group, first, name, pooled[name])
            row[title] = "-"
            if d:
                half = quantile(0.05, d.freedom) * d.error
                low, high = (f"{scale * x:+.{digits}f}" for x in (d.mean - half, d.mean + half))
                row[title] = f"{scale * d.mean:+.{digits}f} [{low}, {high}]"
            if name == "acc":
                row["p"] = f"{d.p:.2g}" if d else "-"
            if d and d.error and not group.reasons:
                # 80% power: 20% exceed the t whose two-sided p-value is 0.4
                t = quantile(0.05, d.freedom) + quantile(0.4, d.freedom)
                smallest[name].append(t * d.error)
        rows.append(row)
    if all(set(row.values()) == {row["model"], "-"} for row in rows):
        return ""

    lines = ["\n", f"Differences to {first.label}, with 95% intervals:", "", table(rows), ""]
    if freedom := max(pooled[name][2] for name in columns):
        lines.append(f"Intervals hold the spread between seeds ({freedom} degrees of freedom) and "
                     "between rows or items: they speak of architectures.")
        if freedom == 1:
            lines.append("One pair of seeds tells little of it: about 90% of such intervals, not "
                         "95%, hold the truth.")
    else:
        lines.append("No setting has two seeds: intervals hold only the spread between rows or "
                     "items, and speak of these checkpoints, not of architectures.")
    found = [f"{scale * np.median(smallest[name]):.{digits}f} {unit}"
             for name, (_, unit, scale, digits) in columns.items() if smallest[name]]
    if found:
        lines.append("4 in 5 comparisons like these find a true difference of "
                     f"{', or of '.join(found)}.")
    return "\n".join(lines)


def mean_and_range(values, error="", digits=4):
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}{error}"
    if len(values) == 1 or not np.isfinite(values).all():
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def accuracy(group):
    """Return the cell of HellaSwag's accuracy, with its standard error over the items."""
    if group.items is None or not group.accuracies:
        return "-"
    return mean_and_range(group.accuracies, f" ± {group.hella_error(group.hella_step):.4f}")


def throughput(group):
    """Return the cell of tokens/s: the mean over the runs on each kind of machine."""
    machines = defaultdict(list)
    for result in group.results:
        if result.info["tokens_per_second"]:
            machine = f"{result.info.get('processes')} x {result.info['device']}"
            machines[machine].append(result.info["tokens_per_second"])
    cells = [f"{np.mean(rates):,.0f} on {machine}" for machine, rates in machines.items()]
    return "; ".join(cells) or "-"


def number(value, form=","):
    return "-" if math.isnan(value) else format(value, form)


def table_row(group, stream):
    """Return the line of a group as {column: cell}."""
    reasons = ["not comparable: " + "; ".join(group.reasons)] if group.reasons else []
    vocabulary = {"vocabulary": str(group.options["vocab_size"])} if stream == "bpb" else {}
    return {
        "model": group.label, "runs": str(len(group.results)),
        "parameters": number(group.info["params"]["total"]),
        "active": number(group.info["params"]["active"]),
        "MFLOP/token": number(group.info["flops_per_token"] / 1e6, ",.1f"),
        "tokens": number(group.results[0].tokens(group.steps)),
        **vocabulary,
        LOSSES[stream]: mean_and_range(group.losses),
        ACCURACIES[group.accuracy]: accuracy(group),
        "bits per byte of endings": mean_and_range(group.mean("bpb")),
        "gap of endings": mean_and_range(group.mean("gap"), digits=5),
        "tokens/s": throughput(group),
        "remarks": "; ".join(reasons + group.remarks)}


def table(rows):
    """Return the rows, dicts {column: cell}, as a table in Markdown."""
    rows = [list(rows[0]), *(row.values() for row in rows)]
    rows = [[" ".join(cell.split()).replace("|", "/") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    head, *lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([head, rule, *lines])


def choose_options(groups):
    """Return the options to fit as {name: its level in each group}, and those that follow others
    as {name: the others}: where the others are equal, so are they.

    An option follows one other, or up to three with fewer levels, as the width of an MLP that keeps
    the parameters equal. Where two follow each other, the later one in run.json is left out; arch
    never is. A group whose model lacks an option counts as having the baseline's level, that of the
    first group which has it."""
    settings = [{"arch": group.arch, **group.options} for group in groups]
    levels = {}
    for name in dict.fromkeys(name for setting in settings for name in setting):
        baseline = next(setting[name] for setting in settings if name in setting)
        levels[name] = [setting.get(name, baseline) for setting in settings]
    levels = {name: values for name, values in levels.items() if len(set(values)) > 1}

    def count(*names):
        return len(set(zip(*(levels[name] for name in names))))

    follows = {}
    for name in sorted(levels, key=count)[::-1]:
        others = [other for other in levels if other != name and other not in follows]
        coarser = [other for other in others if count(other) < count(name)]
        possible = [each for size in (2, 3) for each in combinations(coarser, size)]
        possible = [(other,) for other in others] + possible
        leaders = next((each for each in possible if count(*each, name) == count(*each)), None)
        if leaders and name != "arch":
            follows[name] = leaders
    return {name: levels[name] for name in levels if name not in follows}, follows


def sum_of(column, terms):
    """Return the names of the terms {name: column} of which the column is a weighted sum, without
    the mean's, or None if it is no such sum."""
    known = np.stack(list(terms.values()), 1)  # (runs, terms)
    weights = np.linalg.lstsq(known, column, rcond=None)[0]
    if not np.allclose(known @ weights, column):
        return None
    return [name for name, weight in zip(terms, weights) if abs(weight) > 1e-9 and name != "mean"]


def choose_terms(options, of_run):
    """Return the terms to fit as {name: column (runs,)}, and notes on those that these runs cannot
    tell apart. options: {name: its level in each group}; of_run: the group of each run.

    One of L levels has the column 1 - 1/L in its runs and -1/L in the others, a pair twice the
    product of its columns: then the coefficients are what `effects` explains."""
    terms, option_of, notes = {"mean": np.ones(len(of_run))}, {}, []
    for option, levels in options.items():
        baseline, *others = dict.fromkeys(levels)
        for level in others:
            term = f"{option}={shown(level)}"
            column = np.array([levels[i] == level for i in of_run]) - 1 / (1 + len(others))
            if same := sum_of(column, terms):
                notes.append(f"{term} cannot be told apart from {', '.join(same)}: not fitted.")
            else:
                terms[term], option_of[term] = column, option

    pairs = {f"{a} x {b}": 2 * terms[a] * terms[b] for a, b in combinations(option_of, 2)
             if option_of[a] != option_of[b]}
    aliases, unclear = defaultdict(list), set()
    for pair, column in pairs.items():
        same = sum_of(column, terms)
        if same is None:
            terms[pair] = column
        elif len(same) == 1:
            aliases[same[0]].append(pair)
        else:
            unclear |= {pair, *same} & pairs.keys()
    notes += [f"{term} cannot be told apart from {', '.join(others)}: its effect includes theirs."
              for term, others in aliases.items() if term not in unclear]
    unclear.update(*(aliases[term] for term in unclear & aliases.keys()))
    if unclear:
        names = ", ".join(sorted(unclear)) if unclear < pairs.keys() else "all pairs"
        notes.append(f"Not told apart from sums of other terms, and taken as zero: {names}.")
    return {term: column for term, column in terms.items() if term not in unclear}, notes


def noise(groups, residuals, n_terms):
    """Return the standard deviation of the loss of equal runs, and a note on its source."""
    if freedom := len(residuals) - len(groups):
        squares, source = sum(np.var(g.losses) * len(g.losses) for g in groups), "seeds"
    elif freedom := len(residuals) - n_terms:
        squares, source = residuals @ residuals, "what the fit leaves over, as no seed differs"
    else:
        return math.nan, ("No residual degrees of freedom: standard errors need replicates, the "
                          "same runs with another --seed.")
    sigma = math.sqrt(squares / freedom)
    return sigma, f"sigma = {sigma:.4f}, from {source} (degrees of freedom: {freedom})."


def effects(groups, stream):
    """Return the effects of the options on a stream of LOSSES, as a table and notes in text."""
    for group in groups:
        if group.reasons:
            fail(f"--effects: {group.label} is not comparable: {'; '.join(group.reasons)}")
        if "a seed comes twice" in group.remarks:
            fail(f"--effects: {group.label}: a seed comes twice, which says nothing of the noise")
    options, follows = choose_options(groups)
    if not options:
        fail("--effects needs runs that differ in an option: these do not")
    of_run = [i for i, group in enumerate(groups) for _ in group.losses]
    losses = np.concatenate([group.losses for group in groups])  # (runs,)
    terms, unclear = choose_terms(options, of_run)
    columns = np.stack(list(terms.values()), 1)  # (runs, terms)
    inverse = np.linalg.pinv(columns)  # (terms, runs)
    coefficients = inverse @ losses
    sigma, source = noise(groups, losses - columns @ coefficients, len(terms))
    errors = sigma * np.linalg.norm(inverse, axis=1)  # roots of the diagonal of sigma^2 (X'X)^-1

    rows = sorted(zip(terms, coefficients.round(4) + 0.0, errors),  # + 0.0: no -0.0000
                  key=lambda row: (" x " in row[0], -abs(row[1])))
    rows = [{"option": term, "effect": f"{effect:+.4f}", "standard error": number(error, ".4f")}
            for term, effect, error in rows if term != "mean"]
    baseline = ", ".join(f"{name}={shown(levels[0])}" for name, levels in options.items())
    followers = [f"{name} follows {', '.join(leaders)}: their effects include its own."
                 for name, leaders in follows.items()]
    return "\n".join([
        f"{LOSSES[stream].capitalize()}: {len(losses)} runs, {len(groups)} settings. "
        f"Baseline, the best: {baseline}.", "",
        table(rows), "", source, *followers, *unclear,
        "Effect: the loss at this level minus that at the baseline, averaged over the others.",
        "Pair a x b: half of what the effect of a gains when b leaves the baseline.",
        "What only three options or more do together is taken as zero."])


def legend_label(group, groups):
    """Return the architecture and the few options in which its groups differ, or, where that does
    not tell them apart, what the names of the folders share."""
    arch = os.path.basename(group.arch)
    same_arch = [other.options for other in groups if other.arch == group.arch]
    differing = [name for name in sorted(set().union(*same_arch))
                 if len({options.get(name) for options in same_arch}) > 1]
    if len(differing) > 3 or same_arch.count(group.options) > 1:
        names = [os.path.basename(result.folder) for result in group.results]
        return f"{arch} ({names[0] if len(names) == 1 else os.path.commonprefix(names) + '*'})"
    options = [f"{name}={shown(group.options.get(name))}" for name in differing]
    return " ".join([arch, *options])


def draw(axis, groups, name, unit):
    """Draw the stream "val", "bpb" or "hella" of each group over "tokens" or "FLOPs"."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    scales = [group.info["flops_per_token"] if unit == "FLOPs" else 1.0 for group in groups]
    end = max(1.0, np.nanmax([float(group.results[0].tokens(group.steps) * scale)
                              for group, scale in zip(groups, scales)]))
    for i, (group, scale) in enumerate(zip(groups, scales)):
        # without step 0, whose loss is that of the untrained model
        curve = {step: values for step, values in group.curves[name].items() if step > 0}
        x = np.array([group.results[0].tokens(step) * scale for step in curve], float)
        errors = None
        if name == "hella":
            errors = [group.hella_error(step) for step in curve]
            x += (i - (len(groups) - 1) / 2) * 0.008 * end  # so that the bars stand side by side
        else:
            lows, highs = map(min, curve.values()), map(max, curve.values())
            axis.fill_between(x, list(lows), list(highs), color=f"C{i}", alpha=0.2, lw=0)
        label = legend_label(group, groups).replace("$", r"\$")  # dollars enclose a formula
        every = max(1, len(x) // 10)  # a marker and a bar at about ten points, the last is one
        every = (len(x) - 1) % every, every
        axis.errorbar(x, [np.mean(values) for values in curve.values()], errors, label=label,
                      color=f"C{i}", marker="os^Dv<>PX"[i % 9], fillstyle="none", lw=1.2,
                      markevery=every, errorevery=every, ls="--" if group.reasons else "-")
    if name == "hella":
        axis.axhline(0.25, color="grey")
        axis.annotate("chance", (1.01, 0.25), xycoords=axis.get_yaxis_transform(), color="grey",
                      va="center", annotation_clip=False)  # outside, where no curve is
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if unit == "FLOPs":
        power = math.floor(math.log10(end))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 10 ** power:.3g}")
        unit = f"1e{power} FLOPs"
    else:
        short = EngFormatter(sep="")
        axis.xaxis.set_major_formatter(lambda x, _: short(x).replace("G", "B"))
    axis.set(xlabel=unit, xlim=(0, 1.05 * end))
    axis.set_ylabel((LOSSES | {"hella": "HellaSwag ± standard error"})[name])
    axis.grid(alpha=0.3)


def plot(groups, path, stream):
    """Draw validation loss or bits per byte, and HellaSwag, over tokens and, if the models differ
    in FLOPs per token, over FLOPs. Shades: from the lowest to the highest seed."""
    try:
        import matplotlib
    except ImportError:
        fail("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    flops = {group.info["flops_per_token"] for group in groups}
    units = ["tokens", "FLOPs"] if sum(f > 0 for f in flops) > 1 else ["tokens"]
    width = 5.5 * len(units)
    figure, axes = plt.subplots(2, len(units), figsize=(width, 7.5), sharey="row", squeeze=False,
                                layout="constrained")
    for row, name in zip(axes, (stream.removesuffix("_full"), "hella")):
        for axis, unit in zip(row, units):
            draw(axis, groups, name, unit)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    title = "dashed: not comparable" if any(group.reasons for group in groups) else None
    figure.legend(handles, labels, loc="outside lower center", title=title,
                  ncols=max(1, int(11 * width / (max(map(len, labels)) + 7))))
    try:
        figure.savefig(path, dpi=90)
    except ValueError as error:
        fail(f"--plot={path}: {error}")


@one_line_errors()
def main():
    parser = Parser(description="Compare training runs: print one table, best run first.")
    parser.add_argument("paths", nargs="*", default=["log"],
                        help="folders to search for log.txt, log files, or files of hellaswag.py "
                             "--save (default: log)")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves over tokens and over FLOPs")
    parser.add_argument("--effects", action="store_true",
                        help="instead of the table, what each option that differs does to the loss")
    args = parser.parse_args()
    if args.plot is not None and not re.search(r"\w\.\w+$", args.plot):
        fail(f"--plot={args.plot} is not the name of an image: use a name such as curves.png")

    references = [path for path in dict.fromkeys(args.paths)
                  if path.endswith(".npz") and os.path.isfile(path)]
    results = []
    for path in find_logs([path for path in args.paths if path not in references]):
        try:
            result = read_result(path)
        except Exception as error:  # an edited file can raise any kind of error
            message = f"skipped: {path}, or run.json beside it, is damaged: {error!r}"
            print(message[:500], file=sys.stderr)
            continue
        if result.curves.keys() & {"train", "val", "hella"}:
            results.append(result)
        else:
            problem = ("is of another format: it has no line such as '0 val 10.9527'"
                       if os.path.getsize(path) else "is empty so far")
            print(f"skipped: {path} {problem}", file=sys.stderr)
    if not results:
        fail(f"no log to read in {' '.join(args.paths)}: train first, or name the folders of runs")

    groups, stream = rank(results, STUDIED if args.effects else ())
    sys.stdout.reconfigure(errors="replace")  # the terminal may not be able to show ±
    if args.effects:
        print(effects(groups, stream), flush=True)
    else:
        rows = [table_row(group, stream) for group in groups]
        references = [Reference(path, groups[0].accuracy) for path in references]
        rows += [reference.row(rows[0]) for reference in references]
        print(table(rows) + difference_table([*groups, *references], stream), flush=True)
    if args.plot:
        plot(groups, args.plot, stream)


if __name__ == "__main__":
    main()
