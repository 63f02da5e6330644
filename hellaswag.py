"""
HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): which of four endings continues a
short context?

    python hellaswag.py log/gpt2/model_19073.pt  # score a checkpoint of any train_<arch>.py
    python hellaswag.py gpt2                     # score a Hugging Face model with its own
                                                 # tokenizer (124M: acc 0.2859, acc_norm 0.2955)
    python hellaswag.py gpt2 --style=lm-eval     # score it as published tables do

There are two styles. In "completion", as in build-nanogpt's hellaswag.py, the model reads the
context, a space and an ending, and picks the ending with the lowest summed loss (acc), the lowest
loss per token (acc_norm) or the lowest loss per UTF-8 byte of the space and the ending (acc_bytes).
In "lm-eval", as in EleutherAI's lm-evaluation-harness, the activity comes first, WikiHow's markers
are removed, and acc_norm is the lowest loss per character, acc_bytes that per byte, of the ending
without the space. Between models with different tokenizers compare acc, acc_bytes, or acc_norm in
the style "lm-eval": a loss per token depends on the tokens.

Two more scores use all losses, not only the answer. "bpb" is the bits per byte of right endings,
which shows how fluent the model is in such text. "gap" is the mean loss per byte of the wrong
endings minus that of the right one, in nats. It is not 0 at chance, as the wrong endings have more
tokens per byte: an untrained model has 0.01 with GPT-2's vocabulary, and 0.03 with one of 8,192
tokens. So it falls with the loss at first, as in all small runs of the README, and grows only when
the model learns to choose. DataDecide (Magnusson et al. 2025, arXiv 2504.11393) compares scores of
this kind.

With --save=FILE.npz the losses are kept, so that compare.py can show the model beside others.
"""
import hashlib
import http.client
import importlib
import json
import lzma
import math
import os
import re
import sys
import time
import urllib.request
from collections import defaultdict
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common import (configure_compiler, default_device, default_dtype, init_world,
                    token_losses)
from fineweb import Parser, describe, explain, fail, get_tokenizer, one_line_errors, replacing
from run import load_model, read_checkpoint

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE = 12_246_618
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
FILE = "hellaswag_val.jsonl"  # where download() puts it


# ---- items ---------------------------------------------------------------------------------------

def download(path=FILE):
    """Download the validation set, unless path exists. Raises OSError if it cannot be had whole."""
    if os.path.exists(path):
        return
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            data = response.read()
    except http.client.HTTPException as e:
        raise OSError(f"{URL}: {e!r}") from None
    if len(data) != SIZE or hashlib.sha256(data).hexdigest() != SHA256:
        raise OSError(f"{URL} gave {len(data)} bytes that are not HellaSwag's validation set")
    with replacing(path) as file:
        file.write(data)


def parse_item(line, texts):
    """Return one line's item. Raises ValueError, KeyError or TypeError if it is not one."""
    fields = json.loads(line)
    item = {key: fields[key] for key in (*texts, "endings")}
    item["label"] = int(fields["label"])
    strings = [item[key] for key in texts] + list(item["endings"])
    if not all(isinstance(string, str) for string in strings):
        raise TypeError
    if len(item["endings"]) != 4 or not all([item[texts[0]], *item["endings"]]):
        raise ValueError
    if item["label"] not in range(4):
        raise ValueError
    return item


def load_items(path, style="completion"):
    """Return the items of a .jsonl or .jsonl.xz file: dicts with the texts that the style reads,
    `endings` (4 str) and `label` (0 to 3). Raises ValueError that names the line if one is not such
    an item, and OSError if the file cannot be read."""
    texts = STYLES[style].texts
    items = []
    with (lzma.open if str(path).endswith(".xz") else open)(path, "rb") as file:
        try:
            for line in file:
                items.append(parse_item(line, texts))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise ValueError(
                f"{path}, line {len(items) + 1}: not an item of the original file, which has "
                f"{', '.join(texts)}, four endings and a label from 0 to 3") from None
        except (EOFError, lzma.LZMAError) as e:
            raise ValueError(f"{path}: damaged after line {len(items)}: {e}") from None
    if not items:
        raise ValueError(f"{path}: no HellaSwag items in it")
    return items


# ---- styles --------------------------------------------------------------------------------------

class Row(NamedTuple):
    """A context with one of its endings, as tokens."""
    ids: list  # tokens of the context, then of the ending
    n_ending: int  # number of tokens of the ending
    n_bytes: int  # number of UTF-8 bytes of the ending, by which acc_bytes divides
    characters: int = 0  # number of characters of the ending, if acc_norm divides by them


def encode_pairs(encode, context, endings):
    """Return a list of (ids of context and ending, how many of them belong to the ending).

    As in lm-evaluation-harness (TemplateLM._encode_pair) both are tokenised together, since some
    tokenizers put something in front of every text, a space or <s>. A space at the end of the
    context belongs to the ending."""
    n_context = len(encode(context.rstrip()))
    pairs = [encode(context + ending) for ending in endings]
    return [(ids, len(ids) - n_context) for ids in pairs]


def count_bytes(text):
    """Return the number of UTF-8 bytes; a lone surrogate counts as a question mark."""
    return len(text.encode(errors="replace"))


def render(item, encode):
    """Return the four rows of an item in the style "completion". With bytes, and with GPT-2's
    vocabulary, a space and an ending have the same tokens after the context as alone."""
    endings = [" " + ending for ending in item["endings"]]
    pairs = encode_pairs(encode, item["ctx"], endings)
    return [Row(*pair, count_bytes(ending)) for pair, ending in zip(pairs, endings)]


def render_lm_eval(item, encode):
    """Return the four rows of an item in the style "lm-eval" (lm-evaluation-harness:
    tasks/hellaswag/utils.py)."""
    def clean(text):
        text = text.strip().replace(" [title]", ". ")
        text = re.sub(r"\[.*?\]", "", text)  # WikiHow's [header], [step], ...
        return text.replace("  ", " ")

    context = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    endings = [clean(ending) for ending in item["endings"]]
    pairs = encode_pairs(encode, context, [" " + ending for ending in endings])
    return [Row(*pair, count_bytes(ending), len(ending)) for pair, ending in zip(pairs, endings)]


class Style(NamedTuple):
    render: callable
    texts: tuple  # which texts of an item it reads; the first must not be empty


STYLES = {"completion": Style(render, ("ctx",)),
          "lm-eval": Style(render_lm_eval, ("activity_label", "ctx_a", "ctx_b"))}


# ---- scores --------------------------------------------------------------------------------------

@np.errstate(invalid="ignore")  # a model that diverged may have infinite losses
def item_scores(losses, lengths, n_bytes, labels):
    """Return what each score says of each item, (items,): whether it is right by "acc", "acc_norm"
    and "acc_bytes" (bool), and "bpb" and "gap" (float). The mean over the items is the score.

    losses: the summed losses of the endings in nats; lengths: what acc_norm divides them by;
    n_bytes: their UTF-8 bytes; each (items, 4). labels: the right endings (items,)."""
    scores = {"acc": losses, "acc_norm": losses / lengths, "acc_bytes": losses / n_bytes}
    # where a loss is nan there is no answer
    scores = {name: (score.argmin(1) == labels) & np.isfinite(score.min(1))
              for name, score in scores.items()}

    def of_right(numbers):
        return numbers[np.arange(len(labels)), labels].astype(float)

    bits, right_bytes = of_right(losses) / math.log(2), of_right(n_bytes)
    bpb = bits.sum() / right_bytes.sum()
    # one number for each item: their mean is bpb, their spread gives its error (delta method)
    scores["bpb"] = bpb + (bits - bpb * right_bytes) / right_bytes.mean()
    per_byte = losses / n_bytes
    right = of_right(per_byte)
    scores["gap"] = (per_byte.sum(1) - right) / 3 - right
    return scores


class HellaSwag:
    """Scores every item with few large forward passes.

    Rows of similar length share a batch and are padded on the right, which a causal model does not
    notice. For a compiled model, widths are multiples of 64 and each has a fixed number of rows, so
    that only a handful of shapes is compiled. Only the ending positions go through the head. The
    answers depend on none of this."""

    def __init__(self, items, tokenizer, block_size, batch_tokens, world, compile=False,
                 style="completion"):
        """batch_tokens: tokens in a forward pass. A row longer than block_size is cut at its
        start, first in the context, then in the ending, whose bytes still count in full."""
        self.labels = np.array([item["label"] for item in items])
        self.world = world
        rows = []  # row 4 i + j is ending j of item i
        for item in items:
            for row in STYLES[style].render(item, tokenizer.encode_ordinary):
                ids = row.ids[-block_size:]
                # the first token is not scored: no token precedes it, to predict it from
                rows.append(row._replace(ids=ids, n_ending=min(row.n_ending, len(ids) - 1)))

        def of_endings(numbers):  # int32 (items, 4)
            return np.array(numbers, np.int32).reshape(-1, 4)

        self.tokens = of_endings([row.n_ending for row in rows])
        self.bytes = of_endings([row.n_bytes for row in rows])
        # what acc_norm divides the loss of each ending by
        self.lengths = of_endings([row.characters or row.n_ending for row in rows])
        multiple = 64 if compile else 8
        by_width = defaultdict(list)
        for i, row in enumerate(rows):
            width = math.ceil(len(row.ids) / multiple) * multiple
            by_width[min(block_size, width)].append(i)
        self.batches = []
        for width in sorted(by_width):
            n_rows = max(1, batch_tokens // width)
            for start in range(0, len(by_width[width]), n_rows):
                indices = by_width[width][start:start + n_rows]
                height = n_rows if compile else len(indices)
                self.batches.append(self.batch(rows, indices, height, width))
        self.batches = self.batches[world.rank::world.size]

    @staticmethod
    def batch(rows, indices, height, width):
        """Return the tokens of these rows, int64 (height, width), and for each ending token its
        row in the batch, the position before it, the token and its row among all: int64 (4, n)."""
        tokens = torch.zeros(height, width, dtype=torch.long)
        endings = []
        for r, i in enumerate(indices):
            ids = rows[i].ids
            tokens[r, :len(ids)] = torch.tensor(ids)
            for t in range(len(ids) - rows[i].n_ending, len(ids)):
                endings.append((r, t - 1, ids[t], i))
        return tokens, torch.tensor(endings).T

    def losses(self, model, watch=iter):
        """Return the summed loss of each ending: float32 (items, 4), on the CPU. watch: a function
        that the batches pass through, to show progress or to give up."""
        device = self.world.device
        losses = torch.zeros(self.tokens.size, device=device)
        with torch.no_grad(), self.world.autocast():
            for tokens, endings in watch(self.batches):
                row, position, target, index = endings.to(device)
                hidden = model.hidden(tokens.to(device))[row, position]
                losses.index_add_(0, index, token_losses(model, hidden, target))
        return self.world.sum(losses).cpu().view(-1, 4)

    def scores(self, losses):
        return item_scores(losses.numpy(), self.lengths, self.bytes, self.labels)

    def save(self, path, losses):
        """Write a file from which every score follows, with the same bytes for the same losses. Its
        arrays are `losses`, float32, `tokens` and `bytes`, int32, of each ending (items, 4), and
        `labels`, int64 (items,)."""
        with replacing(path) as file:
            np.savez(file, losses=losses.numpy(), tokens=self.tokens, bytes=self.bytes,
                     labels=self.labels)


def load_hellaswag(cfg, world, tokenizer):
    """Return the scorer of a run; None if it scores no items, has no tokenizer or a context of 1,
    or if the default file is neither there nor to be downloaded. Any other file must exist."""
    def download_or_say_why():
        try:
            download()
        except OSError as e:
            print(f"no HellaSwag in this run: {e}; put {FILE} here, or use --hellaswag_file=FILE",
                  file=sys.stderr)

    if not cfg.hella_limit or tokenizer is None or cfg.block_size < 2:  # no room for an ending
        return None
    if cfg.hellaswag_file == FILE:
        world.local_first(download_or_say_why)
        world.check_same(f"whether they have {FILE}", os.path.exists(FILE))
        if not os.path.exists(FILE):
            return None
    with explain(f"--hellaswag_file={cfg.hellaswag_file}", OSError, ValueError):
        items = load_items(cfg.hellaswag_file)[:cfg.hella_limit]
    world.check_same("HellaSwag's items", len(items))
    batch_tokens = cfg.batch_size * cfg.block_size
    return HellaSwag(items, tokenizer, cfg.block_size, batch_tokens, world, cfg.compile)


# ---- command line --------------------------------------------------------------------------------

class HuggingFace(torch.nn.Module):
    """A transformers model with the two methods that HellaSwag calls. `hidden` returns the logits
    and lm_head does nothing, because models differ in what they do before the logits: some project
    the hidden states, some cap or scale the logits."""

    def __init__(self, name):
        super().__init__()
        from transformers import AutoModelForCausalLM
        self.model, info = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True)
        if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
            raise ValueError(f"weights are missing or of another shape: {wrong}")
        self.lm_head = torch.nn.Identity()

    def hidden(self, idx):
        return self.model(idx, use_cache=False).logits

    def compile(self, **options):
        self.model.compile(**options)


class HuggingFaceTokenizer:
    """The tokenizer of a transformers model, with the method that HellaSwag calls.

    As in lm-evaluation-harness a text starts with the special tokens that the tokenizer puts there,
    such as <s>. None is added at the end, and "<s>" within the text is ordinary text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
        starts = (i for i in range(len(full)) if full[i:i + len(plain)] == plain)
        self.start = full[:next(starts, 0)]

    def encode_ordinary(self, text):
        return self.start + self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True)


def load_hf_tokenizer(name, config):
    """Return the tokenizer of a Hugging Face model: its own, or GPT-2's for a folder without one
    that is GPT-2 by its class, its number of tokens and its last one. The number of tokens alone
    proves nothing, since two vocabularies may have the same."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as e:  # what is raised where files are missing depends on the class
        reason = describe(e)
    else:
        vocab = tokenizer.get_vocab()
        ordinary = [vocab[token] for token in set(vocab) - set(tokenizer.all_special_tokens)]
        if ordinary and max(ordinary) >= config.vocab_size:
            fail(f"{name}: the tokenizer has token {max(ordinary)}, but the model only "
                 f"{config.vocab_size} tokens: put the model's own tokenizer there")
        if ordinary:
            return HuggingFaceTokenizer(tokenizer)
        reason = "the files are missing"  # some classes raise nothing and have no tokens then
    files = os.listdir(name) if os.path.isdir(name) else ["tokenizer.json"]
    has_none = not any(file.startswith(("tokenizer", "vocab", "merges")) for file in files)
    is_gpt2 = config.model_type == "gpt2" and config.vocab_size == 50257
    if has_none and is_gpt2 and config.bos_token_id == config.eos_token_id == 50256:
        return get_tokenizer("", config.vocab_size)
    fail(f"{name} has no tokenizer that can be read: put its tokenizer.json and "
         f"tokenizer_config.json there, or export it anew ({reason})")


def load_checkpoint_model(path):
    """Return (model, tokenizer, block_size) of a checkpoint of one of our scripts."""
    try:
        checkpoint = read_checkpoint(path)
        script = importlib.import_module(f"train_{checkpoint['arch']}")
    except (ImportError, ValueError) as e:
        fail(e)
    model = load_model(path, checkpoint, script.Config, script.Model)
    tokenizer = get_tokenizer(checkpoint["vocab"], model.cfg.vocab_size)
    return model, tokenizer, model.cfg.block_size


def load_hf_model(name):
    """Return (model, tokenizer, block_size) of a Hugging Face model, a name or a folder."""
    with explain(f"{name} is neither a checkpoint nor a Hugging Face model", Exception):
        import transformers
        transformers.logging.set_verbosity_error()
        model = HuggingFace(name)
    config = model.model.config.get_text_config()
    lengths = [getattr(config, key, None) for key in (
        "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx",
        "seq_length")]
    # a model without any of these has no limit, such as Mamba; lm-evaluation-harness takes 2048
    block_size = next((length for length in lengths if length), 2048)
    return model, load_hf_tokenizer(name, config), block_size


@one_line_errors()
def main():
    parser = Parser(description="Score a checkpoint or a Hugging Face model on HellaSwag.")
    add = parser.add_argument
    add("model", help="model_*.pt of a train script, or the name or folder of a Hugging Face model")
    add("--hellaswag_file", default=FILE,
        help="items, .jsonl or .jsonl.xz (default: %(default)s, downloaded if missing)")
    add("--style", default="completion", choices=STYLES,
        help="how items are worded and scored (default: %(default)s)")
    add("--hella_limit", type=int, default=10042, help="score only the first N items")
    add("--batch_size", type=int, default=4,
        help="rows of full context in a forward pass; the result does not depend on it")
    add("--device", default=default_device(), help="cuda, mps or cpu (default: %(default)s)")
    add("--compile", action="store_true", help="compile the model with torch.compile")
    add("--save", metavar="FILE.npz", help="keep the losses for compare.py (style completion)")
    args = parser.parse_args()
    if args.save is not None and (args.style != "completion" or not args.save.endswith(".npz")):
        parser.error("--save needs --style=completion, and a name that ends in .npz")
    if min(args.hella_limit, args.batch_size) < 1:
        parser.error("--hella_limit and --batch_size must be at least 1")
    if args.save:  # scoring may take hours: say first what would be said after it
        folder = os.path.dirname(args.save) or "."
        with explain(f"--save={args.save}", OSError):
            os.makedirs(folder, exist_ok=True)
        if os.path.isdir(args.save) or not os.access(folder, os.W_OK):
            fail(f"--save={args.save} cannot be written: choose another place")
    is_checkpoint = args.model.endswith(".pt") or os.path.isfile(args.model)
    load = load_checkpoint_model if is_checkpoint else load_hf_model
    model, tokenizer, block_size = load(args.model)
    if tokenizer is None:
        sys.exit(1)  # get_tokenizer has printed the reason
    if block_size < 2:
        fail(f"{args.model} has a context of one token, which leaves no room for an ending")
    world = init_world(args.device, default_dtype(args.device), seed=0)
    file = args.hellaswag_file
    if file == FILE:
        with explain(f"cannot download {FILE} (put it here, or pass --hellaswag_file)", OSError):
            world.local_first(download)
    with explain(f"--hellaswag_file={file}", OSError, ValueError):
        items = load_items(file, args.style)[:args.hella_limit]
    if args.compile:
        configure_compiler()
        model.compile(dynamic=False)
    batch_tokens = args.batch_size * min(block_size, 1024)  # no item is longer than that
    scorer = HellaSwag(items, tokenizer, block_size, batch_tokens, world, args.compile, args.style)
    start = time.time()
    progress = partial(tqdm, desc="HellaSwag", unit="batch")
    losses = scorer.losses(model.to(world.device).eval(), progress)
    seconds = time.time() - start
    for name, values in scorer.scores(losses).items():
        error = values.std() / math.sqrt(len(values))
        count = f"  ({values.sum()}/{len(values)})" if values.dtype == bool else ""
        digits = 5 if name == "gap" else 4
        print(f"{name:9s} {values.mean():.{digits}f} +- {error:.{digits}f}{count}")
    print(f"{len(items) / seconds:.1f} items/s")
    if args.save:
        with explain(f"--save={args.save}", OSError):
            scorer.save(args.save, losses)


if __name__ == "__main__":
    main()
