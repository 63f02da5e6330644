"""
Plan a run before it runs: its size, data, loss, time and memory. It trains nothing, needs no GPU.

    python plan.py llama                                     # train_llama.py as it is
    python plan.py llama --n_layer=16 --n_embd=320 --data_dir=mine   # with options of the script
    python plan.py all --gpus=8xA100 --mfu=0.4               # all scripts in one table

The predicted loss comes from laws of the form E + A / N^a + B / D^b, for N parameters and D tokens.
They were fitted to other text in other vocabularies: their differences carry over, their values do
not. For GPT-2 of 124M they give about 3.04 on FineWeb, where llm.c measured 3.27. So the prediction
is also shown shifted by the error of the laws at a finished run: the run in log/, or llm.c's, that
has the same vocabulary and the nearest N D, if within a factor of 100. Both are estimates.
"""
import importlib
import math
import os
import re
import sys
from statistics import fmean as mean

import torch

import compare
from common import PEAK_FLOPS, World, accumulation_steps, parse_args, peak_flops
from fineweb import Parser, digest, fail, one_line_errors, open_shards, vocab_of
from run import estimate_memory

SCRIPTS = sorted(name[len("train_"):-len(".py")]
                 for name in os.listdir(os.path.dirname(os.path.abspath(__file__)))
                 if re.fullmatch(r"train_\w+\.py", name))
# E, A, B, a, b of each law: arXiv 2203.15556, section D.3; 2404.10102, table 1; 2305.16264, A.7
LAWS = {"Hoffmann": (1.69, 406.4, 410.7, 0.34, 0.28),
        "Besiroglu": (1.8172, 482.01, 2085.43, 0.3478, 0.3658),
        "Muennighoff": (1.869, 520.8, 1487.7, 0.3526596, 0.3526596)}
# how repeated tokens and superfluous parameters lose their worth: 2305.16264, equations 5 and 6
R_TOKENS, R_PARAMETERS, PARAMETERS_PER_TOKEN = 15.387756, 5.309743, 0.051
# GPT-2 of 124M after 10.26B tokens of FineWeb: llm.c, discussion 481
LLMC = {"where": "llm.c's GPT-2", "loss": 3.272, "N": 124.5e6, "D": 10.26e9}
# GPUs without bfloat16, and their float16 peak in FLOP/s (NVIDIA's data sheets)
NO_BFLOAT16 = {"V100": 125e12, "T4": 65e12}
# the first pattern that is found in the name of a parameter says what it is part of
PARTS = {"prediction": "^mtp", "head": "head", "embedding": "emb|project_|wte|wpe",
         "norms": "norm|ln", "MLP": "mlp|ffn", "attention": ""}


# ---- laws ----------------------------------------------------------------------------------------

def worth(amount, unique, scale):
    """Return how many fresh units `amount` units are worth, of which only `unique` differ."""
    if amount <= unique:
        return amount
    return unique * (1 + scale * (1 - math.exp(-(amount / unique - 1) / scale)))


def predicted(N, D, unique=math.inf):
    """Return {law: loss in nats per token} for N parameters, with one matrix of the vocabulary, and
    D tokens, of which `unique` differ."""
    fresh = worth(D, unique, R_TOKENS)
    losses = {}
    for law, (E, A, B, a, b) in LAWS.items():
        n = N
        if law == "Muennighoff" and D > unique:  # a large model on little text wastes parameters
            n = worth(N, PARAMETERS_PER_TOKEN * unique, R_PARAMETERS)
        losses[law] = E + A / n ** a + B / fresh ** b
    return losses


def results(log):
    """Return the runs with a run.json below a folder, the latest first; damaged ones are named."""
    paths = compare.find_logs([log]) if os.path.exists(log) else []
    found = []
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        try:
            found.append(compare.read_result(path))
        except Exception as error:  # an edited file can raise any kind of error
            print(f"skipped: {path}, or run.json beside it, is damaged: {error!r}", file=sys.stderr)
    return [result for result in found if result.has_run_json and result.curves]


def reference(cfg, N, D, log):
    """Return the finished run with the same vocabulary whose N D is nearest, as a dict like LLMC;
    None if none is within a factor of 100: the error of the laws at another scale says nothing."""
    vocab = digest(vocab_of(cfg.data_dir))
    known = [LLMC] if cfg.vocab_size in (50257, 50304) and not vocab else []
    for result in results(log):
        config, params = result.config, result.info["params"]
        sha256 = result.info["vocab"]["sha256"] if result.info["vocab"] else ""
        same_vocab = config["vocab_size"] == cfg.vocab_size and sha256 == vocab
        losses = result.curves["val_full"] or result.curves["val"]
        if result.finished and not result.diverged and result.steps and losses and same_vocab:
            untied = result.info["arch"] == "rwkv" or not config.get("tie", True)
            one_matrix = (params["total"] - params["non_embedding"]) // 2 if untied else 0
            known.append({"where": os.path.relpath(result.folder), "loss": losses[max(losses)],
                          "N": params["total"] - one_matrix, "D": result.tokens(result.steps)})

    def distance(run):
        return abs(math.log(run["N"] * run["D"] / (N * D)))

    nearest = min(known, key=distance, default=None)
    return nearest if nearest and distance(nearest) < math.log(100) else None


# ---- one plan ------------------------------------------------------------------------------------

def count_parts(model):
    """Return {part: its number of parameters}; shared ones count once."""
    counts = dict.fromkeys(PARTS, 0)
    for name, p in model.named_parameters():
        part = next(part for part, pattern in PARTS.items() if re.search(pattern, name))
        counts[part] += p.numel()
    return {part: count for part, count in counts.items() if count}


def best_vocab_size(n_other, width):
    """Return the compute-optimal size of the vocabulary for a model of this width. The parameters
    of embedding and head grow as n_other^0.83, n_other being all the rest (arXiv 2407.13623)."""
    return 1.57e6 * (n_other / 19.7e6) ** 0.83 / width


def mfu_of_last_run(log, gpu):
    """Return (MFU, folder) of the latest run on a kind of GPU, or None."""
    for result in results(log):
        info = result.info
        same_peak = gpu in PEAK_FLOPS and peak_flops(info["device"]) == PEAK_FLOPS[gpu]
        if same_peak and info["tokens_per_second"]:
            rate = info["tokens_per_second"] / (info.get("processes") or 1)
            return (rate * info["flops_per_token"] / PEAK_FLOPS[gpu],
                    os.path.relpath(result.folder))


def make_plan(arch, options, args):
    """Return what there is to say of train_<arch>.py with these options, as a dict of numbers and
    texts. args: the options of plan.py."""
    script = importlib.import_module(f"train_{arch}")
    sys.argv = [f"train_{arch}.py", *options]
    cfg, _ = parse_args(script.Config, script.TINY)
    if cfg.max_steps == 0:
        fail("--max_steps=0 leaves nothing to plan")
    with torch.device("meta"):
        model = script.Model(cfg)
    parts, params = count_parts(model), model.num_params()
    plan = {"arch": arch, "parts": parts, "total": params["total"], "active": params["active"],
            "flops": model.flops_per_token(), "tokens": cfg.max_steps * cfg.total_batch_size,
            "warnings": []}
    warn = plan["warnings"].append
    # where embedding and head are two matrices, the laws count one
    N = params["total"] - (parts["embedding"] if "head" in parts else 0)
    plan["unique"] = math.inf
    if os.path.isdir(cfg.data_dir):
        plan["unique"] = len(open_shards(cfg.data_dir, "train", cfg.vocab_size))
    epochs = plan["tokens"] / plan["unique"]
    if epochs > 4:
        warn(f"{epochs:.1f} epochs: beyond 4, repeated tokens are worth ever less")
    plan["losses"] = predicted(N, plan["tokens"], plan["unique"])
    plan["reference"] = reference(cfg, N, plan["tokens"], args.log)
    if run := plan["reference"]:
        missed = run["loss"] - mean(predicted(run["N"], run["D"]).values())
        plan["shifted"] = mean(plan["losses"].values()) + missed
    n_other = params["non_embedding"]
    best = best_vocab_size(n_other, cfg.n_embd)
    if not 1 / 8 < cfg.vocab_size / best < 8:
        warn(f"a vocabulary of {cfg.vocab_size:,} is far from the {best:,.0f} that suit this size "
             "(2407.13623)")
    plan_time(plan, cfg, args)
    world = World(torch.device("cpu"), dtype=torch.bfloat16)
    fixed, per_row, _ = estimate_memory(cfg, world, script.Model, compiled=True)
    plan["memory"] = fixed + cfg.batch_size * per_row
    return plan


def plan_time(plan, cfg, args):
    """Add hours and price on the GPUs, and what is wrong with them."""
    count, _, gpu = args.gpus.partition("x")
    peaks = PEAK_FLOPS | NO_BFLOAT16
    if not count.isdecimal() or int(count) < 1 or gpu not in peaks:
        fail(f"--gpus={args.gpus} must look like 8xA100, with one of the GPUs {', '.join(peaks)}")
    if gpu in NO_BFLOAT16:
        plan["warnings"].append(f"{gpu} has no bfloat16: the scripts take float16 there")
    try:
        accumulation_steps(cfg, World(torch.device("cpu"), size=int(count)))
    except SystemExit as e:
        plan["warnings"].append(str(e.code).removeprefix("error: "))
    mfu, source = args.mfu, "--mfu"
    if mfu is None:
        mfu, source = mfu_of_last_run(args.log, gpu) or (None, None)
    if mfu:
        rate = mfu * peaks[gpu] * int(count) / plan["flops"]
        plan |= {"mfu": mfu, "source": source, "rate": rate,
                 "hours": plan["tokens"] / rate / 3600}
        plan["price"] = plan["hours"] * int(count) * args.price


# ---- output --------------------------------------------------------------------------------------

def big(x):
    """Return a number with its unit of a thousand."""
    for unit, name in (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"):
        if x >= unit:
            return f"{x / unit:.4g} {name}"
    return f"{x:,.0f}"


def show(plan, args):
    """Print a plan for one glance."""
    total = plan["total"]
    print(f"train_{plan['arch']}.py\nparameters      {total:,}, {plan['active']:,} per token; "
          f"{args.budget - total:+,} to the budget of {args.budget:,}")
    whole = sum(plan["parts"].values())
    for part, count in plan["parts"].items():
        print(f"  {part:<13} {count:>13,}  {count / whole:4.0%}")
    print(f"FLOPs           {big(plan['flops'])} per token, {big(plan['flops'] * plan['tokens'])} "
          "in all")
    text = f"{big(plan['tokens'])}, {plan['tokens'] / total:.1f} per parameter"
    if plan["unique"] < math.inf:
        fresh = worth(plan["tokens"], plan["unique"], R_TOKENS)
        text += (f"; {big(plan['unique'])} are unique, so {plan['tokens'] / plan['unique']:.2f} "
                 f"epochs, worth {big(fresh)} fresh tokens")
    print(f"tokens          {text}")
    print("predicted loss  " + ", ".join(f"{law} {x:.2f}" for law, x in plan["losses"].items()))
    if run := plan["reference"]:
        print(f"  shifted       {plan['shifted']:.2f}, through {run['where']}: {run['loss']:.2f} "
              f"after {big(run['D'])} tokens")
    if "hours" in plan:
        print(f"time            {plan['hours']:.1f} hours on {args.gpus} at {plan['rate']:,.0f} "
              f"tokens/s (MFU {plan['mfu']:.0%} from {plan['source']}), without evaluations; "
              f"{plan['price']:,.0f} USD")
    else:
        print("time            unknown: give --mfu, or train on this kind of GPU first")
    print(f"memory          about {plan['memory'] / 2**30:.1f} GiB a GPU, compiled")
    for warning in plan["warnings"]:
        print(f"warning         {warning}")


def row(plan):
    """Return a plan as a line of compare.py's table."""
    return {"model": plan["arch"], "parameters": f"{plan['total']:,}",
            "active": f"{plan['active']:,}", "MFLOP/token": f"{plan['flops'] / 1e6:.0f}",
            "tokens per parameter": f"{plan['tokens'] / plan['total']:.1f}",
            "predicted loss": f"{mean(plan['losses'].values()):.2f}",
            "shifted": f"{plan['shifted']:.2f}" if plan["reference"] else "-",
            "hours": f"{plan['hours']:.1f}" if "hours" in plan else "-",
            "USD": f"{plan['price']:,.0f}" if "hours" in plan else "-",
            "GiB": f"{plan['memory'] / 2**30:.1f}", "warnings": "; ".join(plan["warnings"])}


@one_line_errors()
def main():
    parser = Parser(allow_abbrev=False, description="Plan a run before it runs. Other options are "
                    "those of the script.")
    add = parser.add_argument
    add("arch", choices=[*SCRIPTS, "all"], help="train_<arch>.py, or all scripts in one table")
    add("--gpus", default="1xH100", help="number and kind of GPUs (default: %(default)s)")
    add("--mfu", type=float, help="fraction of the peak that the run will reach (default: that of "
        "the latest run in log/ on this kind of GPU)")
    add("--price", type=float, default=2.5, help="USD for a GPU hour (default: %(default)s)")
    add("--budget", type=int, default=124_600_000, help="parameters allowed (default: %(default)s)")
    add("--log", default="log", help="folder of finished runs (default: %(default)s)")
    args, options = parser.parse_known_args()
    if args.mfu is not None and not 0 < args.mfu <= 1:
        fail(f"--mfu={args.mfu} must be a fraction of the peak: more than 0, at most 1")
    if not 0 <= args.price < math.inf or args.budget < 1:
        fail(f"--price={args.price} must be at least 0, and --budget={args.budget} at least 1")
    if args.arch != "all":
        return show(make_plan(args.arch, options, args), args)
    print(compare.table([row(make_plan(arch, options, args)) for arch in SCRIPTS]))


if __name__ == "__main__":
    main()
