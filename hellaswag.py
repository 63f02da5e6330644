"""
HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): which of four endings continues a short context?

    python hellaswag.py log/gpt2/model_19073.pt    # score a checkpoint of any train_<arch>.py
    python hellaswag.py gpt2                       # score a Hugging Face model with GPT-2's vocabulary
                                                   # (OpenAI's 124M: acc 0.2859, acc_norm 0.2955)
    python hellaswag.py gpt2 --style=lm-eval       # as published tables have it

Two styles. "completion", as build-nanogpt's hellaswag.py: the model reads context + " " + ending, and picks the ending with
the lowest summed loss (acc) or the lowest loss per token (acc_norm). "lm-eval", as EleutherAI's lm-evaluation-harness: the
activity comes first, WikiHow's markers are taken out, and acc_norm is the lowest loss per character.
"""
import hashlib
import http.client
import importlib
import itertools
import json
import lzma
import os
import re
import sys
import time
import urllib.request

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE, SHA256 = 12_246_618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
FILE = "hellaswag_val.jsonl"  # where fetch() puts it


def fetch(path=FILE):
    """Download the validation set to `path` unless it is there. Raises OSError when it cannot be had whole and genuine."""
    if os.path.exists(path):
        return
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            data = response.read()
    except http.client.HTTPException as e:
        raise OSError(f"{URL}: {e!r}") from None
    if len(data) != SIZE or hashlib.sha256(data).hexdigest() != SHA256:
        raise OSError(f"{URL} gave {len(data)} bytes that are not HellaSwag's validation set")
    part = f"{path}.{os.getpid()}.tmp"
    with open(part, "wb") as f:
        f.write(data)
    os.replace(part, path)


def load(path, style="completion"):
    """The items of a .jsonl or .jsonl.xz file: dicts with the texts that the style reads, `endings` (4 str) and `label`
    (0..3). Raises ValueError that names the line when one is not such an item, OSError when the file cannot be read."""
    items, names = [], STYLES[style][1]
    with (lzma.open if str(path).endswith(".xz") else open)(path, "rb") as f:
        try:
            for n, line in enumerate(f, 1):
                item = json.loads(line)
                item = {**{k: item[k] for k in names}, "endings": item["endings"], "label": int(item["label"])}
                texts = [item[names[0]], *item["endings"]]
                if (len(texts) != 5 or not all(isinstance(t, str) and t for t in texts) or item["label"] not in range(4)
                        or not all(isinstance(item[k], str) for k in names)):
                    raise ValueError
                items.append(item)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path}, line {n}: not an item of the original file, with the texts {', '.join(names)}, four endings "
                             "and a label 0..3") from None
        except (EOFError, lzma.LZMAError) as e:
            raise ValueError(f"{path}: damaged after line {len(items)}: {e}") from None
    if not items:
        raise ValueError(f"{path}: no HellaSwag items in it")
    return items


def render(item, encode):
    """One item -> four times (tokens of context + ending, number of ending tokens, None). The context is tokenised apart
    from the ending, which starts with a space: that is how GPT-2's vocabulary spells a word inside a text."""
    ctx = encode(item["ctx"])
    endings = [encode(" " + ending) for ending in item["endings"]]
    return [(ctx + ending, len(ending), None) for ending in endings]


def render_lm_eval(item, encode):
    """The same for lm-evaluation-harness (tasks/hellaswag/utils.py; TemplateLM._encode_pair in api/model.py), with the
    ending's length in characters: context and ending are tokenised as one, and a space that is left at the context's end
    belongs to the ending."""
    def clean(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))  # WikiHow's [header], [step], ...
        return text.replace("  ", " ")

    ctx = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    endings = [clean(ending) for ending in item["endings"]]
    texts = [encode(f"{ctx} {ending}") for ending in endings]
    return [(ids, len(ids) - len(encode(ctx.rstrip())), len(ending)) for ids, ending in zip(texts, endings)]


STYLES = {"completion": (render, ("ctx",)), "lm-eval": (render_lm_eval, ("activity_label", "ctx_a", "ctx_b"))}


class HellaSwag:
    """Scores every item in few large forward passes. Rows are sorted by length and padded on the right, which a causal
    model does not notice; for a compiled model to multiples of 64 and a fixed number of rows a width, so that it compiles
    a handful of shapes once. The head sees the ending positions only. The answer depends on none of this."""

    def __init__(self, items, tokenizer, block_size, batch_tokens, world, compile=False, style="completion"):
        self.labels = np.array([item["label"] for item in items])
        self.world, self.compile, self.hidden, self.batches = world, compile, None, []
        rows = [(ids[-block_size:], min(n, block_size - 1), length) for item in items  # row 4 i + j is ending j of item i
                for ids, n, length in STYLES[style][0](item, tokenizer.encode_ordinary)]
        self.length = torch.tensor([length or n for _, n, length in rows]).view(-1, 4)  # what acc_norm divides losses by
        multiple = 64 if compile else 8
        width = [min(block_size, -(-len(ids) // multiple) * multiple) for ids, *_ in rows]
        for w, group in itertools.groupby(sorted(range(len(rows)), key=width.__getitem__), width.__getitem__):
            group, n_rows = list(group), max(1, batch_tokens // w)
            for k in range(0, len(group), n_rows):
                tokens = torch.zeros(n_rows if compile else len(group[k:k + n_rows]), w, dtype=torch.long)
                ending = []  # (row in the batch, position before the token, the token, row overall) of each ending token
                for r, i in enumerate(group[k:k + n_rows]):
                    ids, n, _ = rows[i]
                    tokens[r, :len(ids)] = torch.tensor(ids)
                    ending += [(r, t - 1, ids[t], i) for t in range(len(ids) - n, len(ids))]
                self.batches.append((tokens, torch.tensor(ending).T))
        self.batches = self.batches[world.rank::world.size]

    def losses(self, model, progress=False):
        """The summed loss of each ending: float32 (items, 4), on the CPU."""
        if self.hidden is None:
            self.hidden = torch.compile(model.hidden, dynamic=False) if self.compile else model.hidden
        device = self.world.device
        chunk = 128 if device.type == "cpu" else 8192  # ending tokens whose logits are alive at once: 25 MB suits a cache
        losses = torch.zeros(self.length.numel(), device=device)
        with torch.no_grad(), self.world.autocast():
            for tokens, ending in tqdm(self.batches, desc="HellaSwag", unit="batch", disable=not progress):
                row, position, target, index = ending.to(device)
                hidden = self.hidden(tokens.to(device))[row, position]
                for h, t, i in zip(hidden.split(chunk), target.split(chunk), index.split(chunk)):
                    losses.index_add_(0, i, F.cross_entropy(model.lm_head(h).float(), t, reduction="none"))
        return self.world.sum(losses).cpu().view(-1, 4)

    def score(self, model, progress=False):
        """Two bool arrays with an entry an item: right by summed loss (acc), right by loss per token or character (acc_norm)."""
        losses = self.losses(model, progress)
        return tuple(x.argmin(1).numpy() == self.labels for x in (losses, losses / self.length))


class HuggingFace(torch.nn.Module):
    """A transformers model with the two names that the scorer uses: hidden(idx) and lm_head(hidden)."""

    def __init__(self, name):
        super().__init__()
        from transformers import AutoModelForCausalLM
        self.model = AutoModelForCausalLM.from_pretrained(name)
        self.lm_head = self.model.get_output_embeddings()

    def hidden(self, idx):
        return self.model.base_model(idx).last_hidden_state


def main():
    import common  # not at the top: common imports this file
    parser = common.Parser(description="HellaSwag accuracy of a checkpoint or of a Hugging Face model")
    parser.add_argument("model", help="model_*.pt of a train script, or the name or folder of a Hugging Face model")
    parser.add_argument("--hellaswag_file", default=FILE, help="items, .jsonl or .jsonl.xz (%(default)s: downloaded if missing)")
    parser.add_argument("--style", default="completion", choices=STYLES, help="how items are put and scored (%(default)s)")
    parser.add_argument("--hella_limit", type=int, default=10042, help="score the first N items only")
    parser.add_argument("--batch_size", type=int, default=4, help="full rows in a forward pass; the result is the same")
    parser.add_argument("--device", default=common.default_device(), help="cuda, mps or cpu (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.set_defaults(seed=0)
    args = parser.parse_args()
    if min(args.hella_limit, args.batch_size) < 1:
        parser.error("--hella_limit and --batch_size are at least 1")
    with common.one_line_errors():
        if args.model.endswith(".pt") or os.path.isfile(args.model):
            try:
                checkpoint = common.read_checkpoint(args.model)
                arch = checkpoint["arch"]
                script = importlib.import_module(f"train_{arch}")
            except (ImportError, ValueError) as e:
                common.fail(e)
            model = common.load_model(args.model, checkpoint, arch, script.Config, script.Model)
            vocab_size, args.block_size = model.cfg.vocab_size, model.cfg.block_size
        else:
            try:
                model = HuggingFace(args.model)
            except (ImportError, OSError, ValueError) as e:
                common.fail(f"{args.model} is neither a checkpoint nor a Hugging Face model: {e}")
            vocab_size, args.block_size = model.model.config.vocab_size, model.model.config.max_position_embeddings
            if vocab_size != 256 and not 50257 <= vocab_size <= 50304:
                common.fail(f"{args.model} has {vocab_size} tokens: not GPT-2's vocabulary, which this task is rendered in")
        world = common.init_world(args)
        scorer = common.load_hellaswag(args, world, common.get_tokenizer(vocab_size), args.style) or sys.exit(1)
        start = time.time()
        correct = scorer.score(model.to(world.device).eval(), progress=True)
        n, seconds = len(scorer.labels), time.time() - start
    for name, hits in zip(("acc", "acc_norm"), correct):
        p = hits.mean()
        print(f"{name:8s} {p:.4f} +- {(p * (1 - p) / n) ** 0.5:.4f}  ({hits.sum()}/{n})")
    print(f"{n / seconds:.1f} items/s")


if __name__ == "__main__":
    main()
