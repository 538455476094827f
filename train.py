"""Trains WSI-LLaVA in the paper's three stages, each on what the one before it left.

    python train.py --stage 1   WSI-text alignment: slides meet their reports in one space (the slide encoder)
    python train.py --stage 2   feature space alignment: slide -> report (trains the projector)
    python train.py --stage 3   instruction tuning on all tasks (the projector, and the LLM by LoRA or --full)
    python train.py --demo      all of it on a cohort of toy slides, then questions about slides not seen
    python train.py --stage 3 --ablations    what each piece is worth: trained again without it, and compared
    python train.py --alignment              are slides nearer to their own reports than to others'?

Reads data/ (made by prepare.py); writes out/stageN: model.safetensors (what the stage trained), config.json,
train_state.pt (to resume from), log.jsonl, loss.svg. Several GPUs: torchrun --nproc-per-node 8 train.py ...

One loop, run_stage, serves all stages. A stage is a task, Alignment or Conversation, which knows its rows and
does backward(batch) and validate(). With the demo's preset there is a stage 0 before them, which trains a
stand-in for the language model.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import typing
import zlib
from dataclasses import dataclass

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm import tqdm

import prepare
import sample
import wsi_llava
from wsi_llava import (
    IGNORE,
    PRESETS,
    UserError,
    at_least,
    check,
    read_features,
    read_visual_tokens,
    reading,
    replacing,
    some_path,
    without_image,
    write_tensors,
    write_text,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def pattern(text):
    """A type for argparse: a regular expression."""
    try:
        re.compile(wsi_llava.some_text(text))
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is not a pattern ({error})") from None
    return text


# A type for argparse: a learning rate; one step of a larger one ruins everything.
rate = at_least(0, float, 10)


def setting(help, kind=None, **default):
    """A field of Recipe. help: what --help says of its flag; kind: its type for argparse, if special."""
    return dataclasses.field(metadata={"help": help, "kind": kind}, **default)


@dataclass
class Recipe:
    """Hyperparameters of one stage. Every field is also a flag, which overrides it."""

    lr: float = setting("the learning rate at its highest, after the warmup", rate)
    batch_size: int = setting("rows a step, of all processes, at most: an epoch's batches are of one size")
    epochs: float = setting("how often every row is seen")
    warmup: float = setting("share of the steps in which the rate rises", wsi_llava.share, default=0.03)
    weight_decay: float = setting("AdamW's", default=0.0)
    projector_lr: float = setting("stage 3: the projector's own learning rate (0: --lr)", rate, default=0.0)
    full_lr: float = setting("stage 3 with --full: in place of --lr (0: --lr stays)", rate, default=0.0)
    lora_rank: int = setting("stage 3: rank of the adapters, the updates to the LLM's matrices", default=0)
    lora_alpha: float = setting("stage 3: the adapters' updates are scaled by alpha / rank", default=0.0)
    lora_dropout: float = setting("stage 3: dropout of the adapters' input", wsi_llava.share, default=0.0)
    lora_target: str = setting(
        "stage 3: which linear layers of the decoder get adapters, a pattern; LoRA's own: q_proj|v_proj",
        pattern,
        default=".*",
    )
    micro_batch: int = setting(
        "stages 2 and 3: rows that go through the model at once; their gradients add up to the batch's",
        default=8,
    )
    max_length: int = setting(
        "stages 2 and 3: positions, text and visual tokens together; longer rows are cut, and counted",
        default=2048,
    )
    checkpointing: bool = setting(
        "recompute activations in the backward pass: a third more time, a fraction of the memory",
        default=True,
    )


RECIPES = {  # the values of LLaVA-1.5 and the paper where they say
    "7b": {
        1: Recipe(1e-4, 64, 20, warmup=0.05, weight_decay=0.05),
        2: Recipe(1e-3, 256, 1),
        3: Recipe(
            2e-4, 128, 3, projector_lr=2e-5, full_lr=2e-5, lora_rank=128, lora_alpha=256, lora_dropout=0.05
        ),
    },
    "demo": {
        1: Recipe(1e-3, 60, 30, warmup=0.05, weight_decay=0.05, checkpointing=False),
        2: Recipe(2e-3, 32, 4, micro_batch=32, checkpointing=False),
        3: Recipe(
            3e-3, 48, 2, projector_lr=1e-3, lora_rank=16, lora_alpha=32, micro_batch=12, checkpointing=False
        ),
    },
}
RECIPES["13b"] = RECIPES["7b"]
STAND_IN = Recipe(2e-3, 32, 0, 0.08, weight_decay=0.05, micro_batch=16, max_length=512, checkpointing=False)
TITLES = ["a stand-in language model", "WSI-text alignment", "feature space alignment", "instruction tuning"]
TILES_AT_ONCE = 4096  # stage 1: short slides go through the slide encoder together, up to so many tiles


# ---- Several processes: torchrun starts them, each takes its share of every batch --------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def my_share(items):
    """Of a list that all processes hold, what this one works on."""
    return items[rank() :: world()]


def all_sum(x):
    """The sum of a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def gather(x):
    """-> a list of what each process gave, on every process."""
    found = [x]
    if world() > 1:
        found = [None] * world()
        dist.all_gather_object(found, x)
    return found


def environment(name, default):
    """A number that torchrun leaves in the environment."""
    text = os.environ.get(name, default)
    check(text.isdecimal(), f"{name}={wsi_llava.one_line(text)} in the environment is not a number: unset it")
    return int(text)


def join_processes(args):
    """Joins the processes that torchrun started, one GPU each; does nothing without torchrun."""
    processes, local = environment("WORLD_SIZE", "1"), environment("LOCAL_RANK", "0")
    environment("RANK", "0")  # checked here, read by torch
    if processes == 1:
        return
    if args.device == "auto" and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        check(local < gpus, f"torchrun started more processes than this machine has GPUs ({gpus})")
        torch.cuda.set_device(local)
        args.device = f"cuda:{local}"
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")


def say(text):
    """Prints above the progress bar; rank 0 only."""
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()  # line by line also into a file or a pipe


def sum_gradients(params, weight, sharded=False):
    """Sums the processes' gradients and divides by the batch's weight: DistributedDataParallel's work, done
    once after the last micro-batch. Unlike there, processes may run different numbers of backwards."""
    if world() > 1 and not sharded:
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for work in [dist.all_reduce(p.grad, async_op=True) for p in params]:
            work.wait()
    for p in params:
        if p.grad is not None:
            p.grad.mul_((world() if sharded else 1) / weight)  # FSDP has taken the mean


def shard(model, dtype):
    """FSDP2: each process keeps a share of every layer's weights, gradients and optimizer state."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model.slide_encoder = None  # it has done its work
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.llama.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


# ---- Data: the rows of the dataset, and the batches that are drawn from them -------------------------------


class Row(typing.NamedTuple):
    """A line of data/qa, parsed when it is asked for (175,000 open in seconds), and what batches go by."""

    line: bytes
    slides: tuple
    task: str
    tiles: int  # of all its slides

    def read(self):
        return json.loads(self.line)


def count_tiles(data, slide, imported):
    """How many tiles of a slide there are to learn from; of imported visual tokens: 1."""
    path = wsi_llava.features_file(data, slide)
    if path.exists():
        return wsi_llava.feature_metadata(path)["tiles"]
    return int(imported and wsi_llava.slide_file(data / "visual_tokens", slide).exists())


def load_rows(data, split, skip_missing=False, tokens=False):
    """data/qa/<split>.jsonl -> a list of Rows, all of whose slides have features (tokens: or imported visual
    tokens). Raises UserError where some have none."""
    path = data / "qa" / f"{split}.jsonl"
    check(path.is_file(), f"{path}: no such file; run python prepare.py --qa FILE... first")
    imported = tokens and wsi_llava.read_meta(data)["encoder"]["source"] == wsi_llava.IMPORTED_TOKENS
    rows, tiles = [], {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            with reading(f"{path}, line {number}", "not a row; run python prepare.py --qa again"):
                row = json.loads(line)
                prepare.check_row(row)
            slides = tuple(prepare.slides_of(row))
            for slide in slides:
                if slide not in tiles:
                    tiles[slide] = count_tiles(data, slide, imported)
            rows.append(Row(line, slides, row["task"], sum(tiles[slide] for slide in slides)))
    lacking = {slide for slide, n in tiles.items() if not n}  # without tissue there is nothing to learn
    advice = "prepare them with python prepare.py --slides, or leave their questions out with --skip-missing"
    what = f"{path} names {len(lacking)} slides without features in {data}/features, the first"
    check(skip_missing or not lacking, f"{what}: {min(lacking, default='')}; {advice}")
    rows = [row for row in rows if not lacking.intersection(row.slides)]
    check(rows, f"{path}: no question is about a slide that has features in {data}/features")
    return rows


def slides_in(rows):
    """The names of all slides that the rows are about, sorted."""
    return sorted({slide for row in rows for slide in row.slides})


def held_out(row, share):
    """Whether a row is for validation: by its slides' names alone, the same in every stage and run."""
    return any(zlib.crc32(slide.encode()) % 1000 < share * 1000 for slide in row.slides)


def split_validation(rows, args):
    """Rows to train on, and at most --val-rows to validate on."""
    train = [row for row in rows if not held_out(row, args.val)]
    check(train, f"--val {args.val} leaves no slide to train on; lower it")
    return train, [row for row in rows if held_out(row, args.val)][: args.val_rows]


def hash_of(rows):
    """What tells these rows from others: their texts, and the size of their slides."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.line + str(row.tiles).encode())
    return digest.hexdigest()[:16]


def one_report_a_slide(rows):
    """The last report of each slide: two in one batch would be each other's false negatives."""
    chosen, seen = [], set()
    for row in reversed(rows):
        if is_report(row) and not seen.intersection(row.slides):
            chosen.append(row)
            seen.update(row.slides)
    return chosen[::-1]


def is_report(row):
    return wsi_llava.is_report({"task": row.task})


def size_of_run(stage, recipe, n):
    """-> how many batches an epoch of n rows is shared among, evenly; how many steps the run has."""
    check(stage != 1 or n > 1, f"stage 1 contrasts slides and needs at least 2 with a report; found {n}")
    alone = "--batch-size 1: stage 1 contrasts the slides of a batch; raise it"
    check(stage != 1 or recipe.batch_size > 1, alone)
    # No row is left out and none comes twice: batches of nearly one size, none above --batch-size.
    batches = math.ceil(n / recipe.batch_size)
    few = f"a batch of {n // batches} is too small for {world()} processes; raise --batch-size or start fewer"
    check(n // batches >= world(), few)
    steps = round(recipe.epochs * batches)
    return batches, max(1, steps) if recipe.epochs > 0 else 0


def batch_of(step, n, batches, seed):
    """The rows of a step, as indices: they follow from seed and step, so resuming needs no state."""
    epoch, k = divmod(step, batches)
    order = np.random.default_rng([*seed, epoch]).permutation(n)
    return order[k * n // batches : (k + 1) * n // batches].tolist()


def read_ahead(read, parts, args):
    """[read(row) of each row], part by part. On a GPU, threads read the next part while this one is at
    work; on a CPU they would take the model's cores."""
    if args.device.type == "cpu":
        for part in parts:
            yield [read(row) for row in part]
        return
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        waiting = []
        for part in [*parts, []]:
            coming = [pool.submit(read, row) for row in part]
            if waiting:
                yield [job.result() for job in waiting]
            waiting = coming


# ---- Stage 1: slides and reports in one space --------------------------------------------------------------


class TextEncoder(torch.nn.Module):
    """Reports -> [B,C]: the LLM's (frozen) token embeddings [B,T,C_llm], a mask [B,T] (True: a token), a
    small bidirectional Transformer, mean over the tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = torch.nn.Linear(cfg.in_width, cfg.width)
        self.pos_embed = torch.nn.Parameter(0.02 * torch.randn(1, cfg.max_length, cfg.width))
        blocks = [wsi_llava.Block(cfg.width, cfg.heads, cfg.mlp_hidden, 1.0) for _ in range(cfg.depth)]
        self.blocks = torch.nn.ModuleList(blocks)
        self.norm = torch.nn.LayerNorm(cfg.width, eps=1e-6)

    def forward(self, token_embeds, mask):
        _, T, C = token_embeds.shape
        # An LLM's embeddings are small, and differ in size from one LLM to the next: without the norm, the
        # position embedding drowns them.
        x = self.embed(F.layer_norm(token_embeds, (C,))) + self.pos_embed[:, :T]  # [B,T,C_llm] -> [B,T,C]
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])  # [B,1,1,T]: nobody looks at the padding
        x = self.norm(x) * mask.unsqueeze(-1)  # [B,T,C], zero at the padding
        return x.sum(1) / mask.sum(1, keepdim=True)  # [B,C] / [B,1]


class WSITextAlignment(torch.nn.Module):
    """Stage 1: slide encoder, text encoder, a linear head each to the shared space; CLIP's temperature.

    A slide's embedding is the mean of its visual tokens, not the CLS: the tokens are what the language
    model reads later, and a loss on the CLS alone would leave their last layer untrained.
    """

    def __init__(self, cfg):
        super().__init__()
        self.n_visual_tokens = cfg.n_visual_tokens
        self.slide_encoder = wsi_llava.SlideEncoder(cfg.slide_encoder)
        self.text_encoder = TextEncoder(cfg.text_encoder)
        self.slide_head = torch.nn.Linear(cfg.slide_encoder.width, cfg.text_encoder.embed_width, bias=False)
        self.text_head = torch.nn.Linear(cfg.text_encoder.width, cfg.text_encoder.embed_width, bias=False)
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_slides(self, features, coords, lengths, cases=None):
        """Packed features [sum of N,C_tile], coords [sum of N,2] and the N of each slide -> [B,E] of unit
        length. cases: how many slides each row has (default: one); a case's embedding is of the mean of
        its slides'."""
        tokens = self.slide_encoder.visual_tokens(features, coords, self.n_visual_tokens, lengths)  # [S,V,C]
        slides = tokens.mean(1)  # [S,C]
        if cases and max(cases) > 1:
            slides = torch.stack([case.mean(0) for case in slides.split(cases)])  # [B,C]
        return F.normalize(self.slide_head(slides), dim=-1)

    def embed_texts(self, token_embeds, mask):
        """token_embeds [B,T,C_llm], mask [B,T] -> [B,E] of unit length."""
        return F.normalize(self.text_head(self.text_encoder(token_embeds, mask)), dim=-1)

    def embed_words(self, ids, words):
        """ids: B lists of tokens; words: the LLM's token embeddings [vocab,C] -> [B,E] of unit length."""
        ids = [torch.tensor(row, device=words.device) for row in ids]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)  # [B,T]
        return self.embed_texts(F.embedding(ids.clamp(min=0), words).to(self.logit_scale.dtype), ids >= 0)

    def loss(self, slides, texts):
        """Symmetric InfoNCE over pairs [B,E]: each slide finds its report, each report its slide."""
        logits = self.logit_scale.exp().clamp(max=100) * slides @ texts.T  # [B slides,B texts]
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def token_embeddings(args, meta):
    """What stage 1 reads reports with: the LLM's token embeddings [vocab,C_llm], frozen; its Tokenizer."""
    folder, tokenizer = wsi_llava.pick_llm(args, meta)
    words = wsi_llava.load_llama(folder).embed_tokens.weight.detach()
    return words.to(args.device, torch.float32), tokenizer


def load_alignment(args, meta):
    """Stage 1's model -> (its config, WSITextAlignment, token_embeddings' two)."""
    path = wsi_llava.stage_weights(args, 1)
    cfg = wsi_llava.load_config(path.parent)
    wsi_llava.check_tile_encoder(cfg.slide_encoder, meta, path.parent)
    with torch.device("meta"):
        model = WSITextAlignment(cfg)
    model = wsi_llava.load_strict(model, wsi_llava.read_tensors(path), path).to(args.device).eval()
    return cfg, model, *token_embeddings(args, meta)


def slide_encoder_to_train(args, meta):
    """What stage 1 starts from -> (SlideEncoder, or None for a new one; its config)."""
    gigapath = wsi_llava.GIGAPATH / "slide_encoder.pth"
    both = args.from_scratch and args.slide_encoder
    check(not both, "--from-scratch, or --slide-encoder: give one of them")
    if args.slide_encoder or (meta["preset"] != "demo" and not args.from_scratch and gigapath.exists()):
        path = args.slide_encoder or gigapath
        encoder = wsi_llava.load_slide_encoder(path)
        wsi_llava.check_tile_encoder(encoder.cfg, meta, path)
        return encoder, encoder.cfg
    missing = "is missing; name it with --slide-encoder, or train --from-scratch"
    check(meta["preset"] == "demo" or args.from_scratch, f"no slide encoder: {gigapath} {missing}")
    cfg = PRESETS[args.preset or meta["preset"]].slide_encoder
    return None, dataclasses.replace(cfg, in_width=meta["encoder"]["width"])  # a new one takes any features


def autocast(args):
    """bfloat16 is for the products. What is trained stays in float32: updates are too small for 8 bits."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == torch.bfloat16)


def read_pair(data, row, tokenizer, cfg):
    """A slide, or a case, and its report -> {"slides": [(features [N,C_tile], coords [N,2])], "ids"}."""
    width = cfg.slide_encoder.in_width
    slides = [read_features(data, slide, cfg.max_tiles, width) for slide in row.slides]
    ids = tokenizer.encode(row.read()["conversations"][1]["value"])
    return {"slides": slides, "ids": ids[: cfg.text_encoder.max_length]}


def embed(args, model, words, pairs):
    """What read_pair gave -> embeddings of the slides and of the reports, [B,E] each."""
    dtype = model.logit_scale.dtype  # float32
    slides = [slide for pair in pairs for slide in pair["slides"]]
    features = torch.cat([features for features, _ in slides]).to(args.device, dtype)  # [sum of N,C_tile]
    coords = torch.cat([coords for _, coords in slides]).to(args.device)
    lengths = [len(coords) for _, coords in slides]
    cases = [len(pair["slides"]) for pair in pairs]
    with autocast(args):
        embedded = model.embed_slides(features, coords, lengths, cases)
        texts = model.embed_words([pair["ids"] for pair in pairs], words)
    return embedded.to(dtype), texts.to(dtype)


def recall(similarity):
    """[n,n] slide-report similarities -> recall@1, 5 and 10, slide to report and back."""
    own = similarity.diagonal()
    ranks = {"slide->report": (similarity > own[:, None]).sum(1), "report->slide": (similarity > own).sum(0)}
    return {f"{name} R@{k}": (r < k).float().mean().item() for name, r in ranks.items() for k in (1, 5, 10)}


class Alignment:
    """Stage 1: WSI-text alignment by symmetric InfoNCE with the gradient-cache method (arXiv 2101.06983).

    A contrastive loss needs a large batch, and slides are long. So: embed everything without grad; take
    the loss's gradient with respect to the embeddings; embed again, micro-batch by micro-batch, and carry
    that gradient back. Memory is one micro-batch's, and the gradient is exactly that of the whole batch.
    Several processes embed a share each. A batch that is one micro-batch is embedded once.
    """

    beta2, sharded = 0.98, False

    def __init__(self, stage, args, recipe, meta):
        none = "--no-slide-encoder: stage 1 trains the slide encoder; start with --stage 2"
        check(not args.no_slide_encoder, none)
        self.args = args
        self.words, self.tokenizer = token_embeddings(args, meta)  # [vocab,C_llm]
        encoder, encoder_cfg = slide_encoder_to_train(args, meta)
        cfg = self.cfg = wsi_llava.WSILLaVAConfig.from_dict(PRESETS[args.preset or meta["preset"]].to_dict())
        cfg.slide_encoder = dataclasses.replace(encoder_cfg, trained_on=meta["encoder"]["fingerprint"])
        cfg.text_encoder.in_width, cfg.max_tiles = self.words.shape[1], args.max_tiles
        self.model = WSITextAlignment(cfg)
        if encoder:
            self.model.slide_encoder.load_state_dict(encoder.state_dict())
        self.start = wsi_llava.fingerprint(self.model)
        self.model.to(args.device, torch.float32).slide_encoder.checkpointing = recipe.checkpointing
        rows = one_report_a_slide(load_rows(args.data, "train", args.skip_missing))
        self.train, self.val = split_validation(rows, args)
        if not encoder:  # the inputs' mean and deviation, of some slides
            some = [self.read(row)["slides"][0][0] for row in self.train[:200]]
            self.model.slide_encoder.standardize_inputs(torch.cat(some).to(args.device))
        # The peak of a group's learning rate; run_stage multiplies it by the schedule.
        params = self.params = list(self.model.parameters())
        self.groups = [{"name": "slide and text encoder", "params": params, "peak": recipe.lr}]

    def read(self, row):
        return read_pair(self.args.data, row, self.tokenizer, self.cfg)

    def micro_batches(self, rows):
        """Rows whose slides are packed into one sequence of TILES_AT_ONCE tiles, or of fewer, so that
        every process has some; a slide that is longer comes alone."""
        most = self.args.max_tiles or math.inf
        tiles = [min(row.tiles, most * len(row.slides)) for row in rows]
        at_once = min(TILES_AT_ONCE, math.ceil(sum(tiles) / world()))
        # First fit, in the batch's own order: a new micro-batch begins where a row no longer fits.
        parts, room = [], 0
        for row, n in zip(rows, tiles):
            if n > room:
                parts.append([])
                room = at_once
            parts[-1].append(row)
            room -= n
        return parts

    def shares(self, parts):
        """This process's micro-batches -> (number, its place in the whole batch, its pairs)."""
        ends = np.cumsum([len(part) for part in parts]).tolist()
        mine = my_share(range(len(parts)))
        for k, pairs in zip(mine, read_ahead(self.read, [parts[k] for k in mine], self.args)):
            yield k, slice(ends[k] - len(parts[k]), ends[k]), pairs

    def embed_all(self, parts, seed):
        """The whole batch's embeddings, [B,E] twice: each process fills its rows, the sum gathers them."""
        n, width = sum(len(part) for part in parts), self.cfg.text_encoder.embed_width
        dtype = self.model.logit_scale.dtype
        slides, texts = torch.zeros(2, n, width, device=self.args.device, dtype=dtype)
        for k, place, pairs in self.shares(parts):
            torch.manual_seed(seed + k)
            slides[place], texts[place] = embed(self.args, self.model, self.words, pairs)
        return all_sum(slides), all_sum(texts)

    def backward(self, batch):
        """Adds the gradient of a batch, rows' indices -> (its loss, the tiles that it took)."""
        parts = self.micro_batches([self.train[i] for i in batch])
        seed, tiles = torch.initial_seed(), sum(self.train[i].tiles for i in batch)
        if len(parts) == 1 and world() == 1:  # its activations fit: nothing to cache
            pairs = [self.read(row) for row in parts[0]]
            loss = self.model.loss(*embed(self.args, self.model, self.words, pairs))
            loss.backward()
            return loss.item(), tiles
        # First pass: the embeddings of the whole batch, without activations.
        with torch.no_grad():
            slides, texts = self.embed_all(parts, seed)
        # The loss, and its gradient with respect to the embeddings: small, [B,E] twice.
        slides.requires_grad_(), texts.requires_grad_()
        loss = self.model.loss(slides, texts)
        loss.backward()
        if rank():
            self.model.logit_scale.grad.zero_()  # all of it on every process; the sum is to hold it once
        # Second pass: embedded again, with activations, and that gradient carried on into the weights.
        for k, place, pairs in self.shares(parts):  # read again, not held: memory stays one micro-batch's
            torch.manual_seed(seed + k)  # the second pass must draw the dropout of the first
            embedded = embed(self.args, self.model, self.words, pairs)
            torch.autograd.backward(embedded, (slides.grad[place], texts.grad[place]))
        sum_gradients(self.params, 1)
        return loss.item(), tiles

    @torch.no_grad()
    def validate(self):
        """-> {metric: value} of the rows for validation; {} where there are too few."""
        if len(self.val) < max(2, world()):
            return {}
        slides, texts = self.embed_all(self.micro_batches(self.val), 0)
        return {"loss": self.model.loss(slides, texts).item(), **recall(slides @ texts.T)}

    def report(self, when):
        """Nothing beyond what validate() tells."""

    def write_result(self, folder, weights):
        """The whole model, and its slide encoder as later stages, and GigaPath's users, take it."""
        write_text(folder / "config.json", self.cfg.to_json())
        prefix = "slide_encoder."
        encoder = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        wsi_llava.save_slide_encoder(self.cfg.slide_encoder, encoder, folder / "slide_encoder.safetensors")
        write_tensors(folder / "model.safetensors", weights)


# ---- Stages 2 and 3: answers to questions about slides -----------------------------------------------------


def model_to_train(args, recipe, meta, stage):
    """The model of stage 2 or 3 on its device, frozen but for what the stage trains -> (WSILLaVA, Tokenizer).

    What is trained is kept in float32; of a language model trained whole, that is all of it.
    """
    full = stage == 3 and args.full
    model, tokenizer = wsi_llava.load_model(args, meta, stage - 1, torch.float32 if full else args.dtype)
    cfg = model.cfg
    # Everything is frozen, and then what this stage trains is not.
    model.requires_grad_(False)
    if full:
        model.llama.requires_grad_(True)
    elif stage == 3:
        cfg.lora_rank, cfg.lora_alpha = recipe.lora_rank, recipe.lora_alpha
        cfg.lora_target = recipe.lora_target
        wsi_llava.add_lora(model.llama, cfg.lora_rank, cfg.lora_alpha, cfg.lora_target, recipe.lora_dropout)
    model.mm_projector.requires_grad_(True)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model, tokenizer


def write_visual_tokens(args, model, slides):
    """Runs the frozen slide encoder once over every slide that lacks its visual tokens, each process over
    a share. -> {slide: why it has none}, on every process."""
    with autocast(args):
        bar = functools.partial(tqdm, desc="visual tokens", unit="slide", disable=rank() > 0)
        written, problems = wsi_llava.cache_visual_tokens(model, args.data, my_share(slides), bar)
    written = sum(gather(written))  # also waits for the others
    problems = {slide: why for share in gather(problems) for slide, why in share.items()}
    there = len(slides) - written - len(problems)
    say(f"Visual tokens of {wsi_llava.count(len(slides), 'slide')}: {written} computed, {there} were there.")
    return problems


def encode_row(tokenizer, row, slides, plain=False):
    """A row of the dataset -> ids and labels, with so many slides before its first question; plain: as
    LLaVA's stage 2 has it, the slides and then the report."""
    if plain:
        return tokenizer.encode_plain(row["conversations"][1]["value"], slides)
    return tokenizer.encode_chat(wsi_llava.slide_first(row["conversations"], slides))


def project_and_embed(model, samples):
    """Projected slides and embedded reports as vectors, [n,C_llm] twice: the mean over visual tokens and
    over words, both less their mean over the samples, of unit length."""
    slides, texts = [], []
    for example in samples:
        projected = model.project(example["visual"].flatten(0, 1).to(model.device))
        words = [i for i, label in zip(example["ids"], example["labels"]) if label >= 0]
        slides.append(projected.float().mean(0))
        texts.append(model.llama.embed_tokens(torch.tensor(words, device=model.device)).float().mean(0))
    slides, texts = torch.stack(slides), torch.stack(texts)
    return F.normalize(slides - slides.mean(0), dim=-1), F.normalize(texts - texts.mean(0), dim=-1)


@torch.no_grad()
def alignment(args, model, samples):
    """Whether projected slides are nearer to their own reports than to others' -> (their cosines [n,n],
    slides by reports; {what: value}): as vectors, and as the language model sees it, by its loss on a
    report after the report's own slide and after another's."""
    slides, texts = project_and_embed(model, samples)
    cosine = slides @ texts.T
    own, n = cosine.diagonal(), len(samples)
    others = (cosine.sum() - own.sum()) / max(1, n * (n - 1))
    found = {"cosine to the own report": own.mean().item(), "to others": others.item()}
    # As the language model sees it: if it reads the slide, another's makes the report less likely.
    for name, shift in (("loss of a report after its own slide", 0), ("after another", 1)):
        losses = []
        for i, example in enumerate(samples):
            others_slides, S = samples[i - shift]["visual"], len(example["visual"])
            visual = others_slides[torch.arange(S) % len(others_slides)]  # as many as the report has slides
            with autocast(args):
                losses.append(model([visual], [example["ids"]], [example["labels"]]))
        found[name] = torch.stack(losses).mean().item()
    return cosine, found


class Conversation:
    """Stages 2 and 3: next-token loss on the answers, given the slides' visual tokens. And stage 0, on
    all of the text and without slides."""

    def __init__(self, stage, args, recipe, meta):
        self.stage, self.args, self.micro_batch = stage, args, recipe.micro_batch
        full = stage == 0 or stage == 3 and args.full
        self.beta2, self.sharded = 0.999 if stage else 0.95, stage == 3 and full and world() > 1
        self.saved_dtype = args.dtype if full else torch.float32  # 7B in float32 would be 27 GB
        # The model, and the rows that it learns from.
        rows = load_rows(args.data, "train", args.skip_missing or stage == 0, tokens=True)
        if stage == 0:
            self.model, self.tokenizer = stand_in_to_train(args)
            rows += [row._replace(task=PLAIN) for row in rows if is_report(row)]  # stage 2 shows them so
        else:
            self.model, self.tokenizer = model_to_train(args, recipe, meta, stage)
        self.cfg, self.start = self.model.cfg, wsi_llava.fingerprint(self.model)
        self.model.to(args.device).llama.checkpointing = recipe.checkpointing
        self.train, self.val = self.choose(rows)
        # Rows longer than the context, or than --max-length, lose the end of their answers.
        self.longest = min(recipe.max_length, self.cfg.llama.context)
        self.cut, self.lost, self.first_cut = 0, 0, None  # rows longer than that; those left without answers
        self.check_room()
        if self.sharded:
            shard(self.model, args.dtype)
        # What the optimizer trains: the projector, and of the language model the adapters or all of it.
        llm = "language model" if full else f"LoRA adapters of rank {recipe.lora_rank}"
        lr = recipe.projector_lr if stage == 3 and recipe.projector_lr else recipe.lr
        self.groups, model = [], self.model
        for name, part, peak in (("projector", model.mm_projector, lr), (llm, model.llama, recipe.lr)):
            params = [p for p in part.parameters() if p.requires_grad]
            if params:
                self.groups.append({"name": name, "params": params, "peak": peak})
        self.params = [p for group in self.groups for p in group["params"]]

    def choose(self, rows):
        """The rows to train and to validate on; their slides' visual tokens are on disk then."""
        if self.stage == 0:
            return rows, []
        if self.stage == 2:
            rows = [row for row in rows if is_report(row)]
            lacks = "holds no reports (tasks with 'report' in the name): stage 2 needs them"
            check(rows, f"{self.args.data}/qa/train.jsonl {lacks}")
        problems = write_visual_tokens(self.args, self.model, slides_in(rows))
        if problems:
            first = next(iter(problems.values()))
            say(f"Left out {wsi_llava.count(len(problems), 'slide')} that cannot be read, the first: {first}")
            rows = [row for row in rows if not problems.keys() & set(row.slides)]
            check(rows, f"{self.args.data}/visual_tokens: no slide is left to train on, the first: {first}")
        return split_validation(rows, self.args)

    def check_room(self):
        """Refuses a --max-length under which not even the shortest rows keep a word of an answer."""
        shortest = sorted(self.train, key=lambda row: len(row.line))[:8]
        samples = [self.read(row) for row in shortest]
        what = f"--max-length {self.longest}: {self.cfg.n_visual_tokens} visual tokens and the question of"
        what += f" {samples[0]['id']} leave no room for its answer; raise it"
        check(not all(example["lost"] for example in samples), what)

    def read(self, row):
        """-> {"id", "ids", "labels" (of the prompt), "visual" ([S,V,C], or None), "cut", "lost"}."""
        content = row.read()
        shown = () if self.stage == 0 or self.stage == 3 and self.args.no_image else row.slides
        ids, labels = encode_row(self.tokenizer, content, len(shown), self.stage == 2 or row.task == PLAIN)
        if self.stage == 0:
            labels = ids
        visual = [read_visual_tokens(self.args.data, slide, self.cfg) for slide in shown]
        # An <image> is one id and many positions; what is too long loses the end of its answer.
        more = sum(len(tokens) - 1 for tokens in visual)  # positions than ids
        room = max(0, self.longest - more)
        example = {"id": content["id"], "visual": torch.stack(visual) if visual else None}
        example |= {"ids": ids[:room], "labels": labels[:room], "positions": more + len(ids[:room])}
        example |= {"cut": len(ids) > room, "lost": False}
        if not any(label >= 0 for label in example["labels"][1:]):
            # one token that teaches nothing takes its place
            example |= {"ids": [self.tokenizer.eos], "labels": [IGNORE], "visual": None}
            example |= {"positions": 1, "lost": True}
        return example

    def micro_batches(self, rows):
        """As many for each process: rows of like length together, so that little is padded. Sorted inside
        the batch only: batches of one length would be of one task, and no random draws."""
        rows = sorted(rows, key=lambda row: len(row.line))
        rounds = min(math.ceil(len(rows) / (self.micro_batch * world())), len(rows) // world())
        parts = rounds * world()
        return [rows[k * len(rows) // parts : (k + 1) * len(rows) // parts] for k in range(parts)]

    def losses(self, rows, learn):
        """Runs a batch, each process its share, and backward where it is to learn -> (loss, labelled
        tokens, positions, rows cut, rows without an answer), sums over all processes."""
        device = "cpu" if self.args.device.type == "mps" else self.args.device  # mps has no float64
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        seed, parts = torch.initial_seed(), my_share(self.micro_batches(rows))
        for k, samples in enumerate(read_ahead(self.read, parts, self.args)):
            torch.manual_seed(seed + k * world() + rank())  # no two processes draw the same dropout
            ids = [s["ids"] for s in samples]
            labels = [s["labels"] for s in samples]
            with autocast(self.args):
                loss = self.model([s["visual"] for s in samples], ids, labels, reduction="sum")
            # The sum, not the mean: rows differ in labelled tokens, and the whole batch's number is known
            # only at the end. sum_gradients divides by it.
            if learn:
                loss.backward()
            labelled = sum(label >= 0 for row in labels for label in row[1:])
            positions = sum(s["positions"] for s in samples)
            cut = [s["id"] for s in samples if s["cut"]]
            self.first_cut = self.first_cut or (cut + [None])[0]
            counts = [loss.item(), labelled, positions, len(cut), sum(s["lost"] for s in samples)]
            sums += torch.tensor(counts, dtype=torch.float64, device=device)
        return all_sum(sums).tolist()

    def backward(self, batch):
        """Adds the gradient of a batch, rows' indices -> (its loss, the positions that it took)."""
        loss, labelled, positions, cut, lost = self.losses([self.train[i] for i in batch], learn=True)
        sum_gradients(self.params, max(1, labelled), self.sharded)
        self.cut, self.lost = self.cut + int(cut), self.lost + int(lost)
        return loss / max(1, labelled), int(positions)

    @torch.no_grad()
    def validate(self):
        """-> {metric: value} of the rows for validation; {} where there are too few."""
        if len(self.val) < world():
            return {}
        loss, labelled, *_ = self.losses(self.val, learn=False)
        return {"loss": loss / max(1, labelled)}

    def report(self, when):
        """Says, "before" training and "after" it, what is worth knowing beside the loss."""
        if self.stage == 2:
            some = self.val if len(self.val) > 1 else self.train[:256]
            samples = [example for example in map(self.read, some) if not example["lost"]]
            found = alignment(self.args, self.model, samples)[1] if samples else {}
            say(f"alignment {when} training: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
        if self.cut:
            first = ([x for x in gather(self.first_cut) if x] + [None])[0]
            long = f"{self.cut} samples were longer than --max-length {self.longest} and were cut"
            say(f"{long}, {self.lost} of them so that no answer is left; the first: {first}")

    def write_result(self, folder, weights):
        if self.stage == 0:
            return wsi_llava.save_llama(self.model.llama, folder, self.tokenizer)
        write_text(folder / "config.json", self.cfg.to_json())
        weights = {name: x.to(self.saved_dtype) for name, x in weights.items()}
        write_tensors(folder / "model.safetensors", weights)


# ---- The loop ----------------------------------------------------------------------------------------------


def pick_recipe(stage, args, meta):
    """The preset's recipe for the stage, with the user's flags on top. The stand-in's is its own."""
    if stage == 0:
        return STAND_IN
    flags = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe)}
    given = {name: value for name, value in flags.items() if value is not None}
    recipe = dataclasses.replace(RECIPES[args.preset or meta["preset"]][stage], **given)
    if stage == 3 and args.full and (args.lr is None or args.full_lr):
        recipe.lr = recipe.full_lr or recipe.lr
    if stage in args.skip_stage:
        recipe.epochs = 0
    return recipe


def schedule(step, steps, warmup):
    """Linear warmup, then half a cosine to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, steps - rising))


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C, and the SIGTERM of a job's time limit, end a run between two steps: the list then fills."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        tqdm.write("Finishing this step, then saving; once more to stop at once.")

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def alone_in(folder):
    """Refuses a second run in a stage's folder; sweeps up what a killed one had half written. Rank 0 only."""
    folder.mkdir(parents=True, exist_ok=True)
    if rank() or fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = "another run is training here; wait for it, or name another --out"
            raise UserError(f"{folder}: {busy}") from None
        except OSError:  # a file system without locks
            pass
        for path in folder.glob(".*.part"):
            path.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


# What a run is beside its recipe: flags that change what is learned. How often it saves is not among them.
FLAGS_OF_A_RUN = ("seed", "dtype", "val", "clip", "keep", "full", "no_slide_encoder", "no_image", "max_tiles")


def identity(stage, args, recipe, task, steps):
    """What makes a run the one that it is, as {what: text}: resumed otherwise, it would be neither the
    one nor the other. Processes and micro-batches may change: they change the last bits alone."""
    run = {"stage": stage, "steps": steps} | dataclasses.asdict(recipe)
    del run["micro_batch"], run["checkpointing"]
    run |= {name: getattr(args, name) for name in FLAGS_OF_A_RUN}
    run |= {"the training rows": hash_of(task.train), "what it started from": task.start}
    return {what: str(value) for what, value in run.items()}


def resume(path, run, model, optimizer):
    """Loads what an interrupted run saved, on any number of processes -> (steps done, log)."""
    with reading(path, "damaged; leave --resume out to start the stage anew"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        old, step, log = state["run"], state["step"], state["log"]
        other = [f"{what} {old.get(what)}, not {run[what]}" for what in run if old.get(what) != run[what]]
        anew = "leave --resume out to start anew"
        check(not other, f"{path} belongs to another run: {'; '.join(other[:3])}; {anew}")
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        others = f"{path}: does not hold the weights that this stage trains; {anew}"
        check(state["model"].keys() == names, others)
        options = StateDictOptions(full_state_dict=True, strict=False)  # the frozen weights are not in it
        states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(model, optimizer, **states, options=options)
    say(f"Resuming at step {step} of {run['steps']}.")
    return step, log


def start_anew(folder):
    """Removes what an earlier run left, its state first: then at every instant either the folder holds
    the result of a whole run, or a resumed run makes it."""
    for name in ("train_state.pt", "model.safetensors", "slide_encoder.safetensors", "best.safetensors"):
        (folder / name).unlink(missing_ok=True)


def save(folder, run, task, step, optimizer, log, keep):
    """Writes what --resume needs; with the last step, and before that, the stage's result.

    The state comes last: a state that says "done" has its result beside it, whatever a kill or a full
    disk left of the rest. Killed before, a resumed run does the last steps again, and writes the same
    result again.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, moments = get_state_dict(task.model, optimizer, options=options)  # sharded or not; all take part
    finite = all(x.isfinite().all() for x in weights.values())
    advice = "try a lower --lr or --dtype float32"
    check(finite, f"{folder}: after step {step} the weights are not finite, and were not saved; {advice}")
    if rank():
        return
    best, done = folder / "best.safetensors", step == int(run["steps"])
    losses = [entry["val_loss"] for entry in log if "val_loss" in entry]
    if keep == "best" and losses and log[-1].get("val_loss") == min(losses):
        write_tensors(best, weights)
    if done:
        task.write_result(folder, wsi_llava.read_tensors(best) if best.exists() else weights)
    with replacing(folder / "train_state.pt") as path:
        torch.save({"run": run, "step": step, "model": weights, "optimizer": moments, "log": log}, path)
    if done:
        best.unlink(missing_ok=True)


def draw_curves(path, log, width=520, height=300):
    """Training loss (every step, and smoothed) and validation loss (dots) as an SVG."""
    losses = [entry["loss"] for entry in log]
    top = 1.05 * max(max(entry["loss"], entry.get("val_loss", 0)) for entry in log) + 1e-9
    steps = log[-1]["step"]
    x = [45 + (width - 55) * entry["step"] / steps for entry in log]
    span, shapes = max(1, len(losses) // 25), []
    smooth = [np.mean(losses[max(0, i - span) : i + 1]) for i in range(len(losses))]
    for values, colour, thick in ((losses, "#b2caeb", 1), (smooth, "#1f5fb4", 2)):
        points = " ".join(f"{a:.1f},{(height - 20) - (height - 40) * y / top:.1f}" for a, y in zip(x, values))
        shapes.append(f'<polyline fill="none" stroke="{colour}" stroke-width="{thick}" points="{points}"/>')
    for a, entry in zip(x, log):
        if "val_loss" in entry:
            y = (height - 20) - (height - 40) * entry["val_loss"] / top
            shapes.append(f'<circle r="3" fill="#d65a1e" cx="{a:.1f}" cy="{y:.1f}"/>')
    for i in range(5):
        shapes.append(f'<text x="4" y="{height - 16 - (height - 40) * i / 4:.0f}">{top * i / 4:.2f}</text>')
    shapes.append(f'<text x="{width / 2:.0f}" y="{height - 4}">step, of {steps}</text>')
    shapes.append('<text x="50" y="14" fill="#1f5fb4">training loss</text>')
    shapes.append('<text x="150" y="14" fill="#d65a1e">validation loss</text>')
    write_svg(path, shapes, width, height)


def write_svg(path, shapes, width, height):
    style = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="11"'
    frame = f'<rect width="{width}" height="{height}" fill="white"/>'
    write_text(path, f'<svg {style} width="{width}" height="{height}">{frame}{"".join(shapes)}</svg>\n')


def say_start(stage, args, task, steps, batches):
    """What will be trained, on what, for how long."""
    trains = []
    for group in task.groups:
        size = sum(p.numel() for p in group["params"])
        trains.append(f"{group['name']} {size:,} (lr {group['peak']:g})")
    frozen = sum(p.numel() for p in task.model.parameters() if not p.requires_grad)
    slides, val = len(slides_in(task.train)), len(task.val)
    say(f"Stage {stage}, {TITLES[stage]}")
    shares = ", each with a share of the weights" if task.sharded else ""
    say(f"  on      {args.device} in {str(args.dtype).removeprefix('torch.')}, processes: {world()}{shares}")
    say(f"  trains  {', '.join(trains)}; frozen {frozen:,}")
    say(f"  data    {len(task.train):,} rows of {slides:,} slides, {val:,} more to validate on")
    say(f"  plan    {steps:,} steps, {batches:,} an epoch, of {len(task.train) / batches:.0f} rows each")


def say_step(where, entry, seconds_left, device):
    """The line of a step, made to be grepped."""
    eta = datetime.timedelta(seconds=round(seconds_left))
    say(
        f"{where} loss {entry['loss']:.4f} lr {entry['lr']:.2e} grad_norm {entry['grad_norm']:.3f} tokens/s "
        f"{entry['tokens_per_s']:,.0f} eta {eta} memory {wsi_llava.peak_memory(device) / 1e9:.2f} GB"
    )


def train_stage(stage, args):
    """Trains a stage and writes out/stageN; the stand-in of stage 0 goes to data/llm. Stopped by Ctrl-C
    or a job's time limit, it saves first. Raises UserError where it cannot start, or was stopped."""
    if stage and wsi_llava.read_meta(args.data)["preset"] == "demo" and not args.llm:
        stand_in(args)
    folder = args.out / f"stage{stage}" if stage else args.data / "llm"
    with alone_in(folder), stop_signals() as stop:
        run_stage(stage, args, folder, stop)


def run_stage(stage, args, folder, stop):
    """The loop. stop: a list that fills when the run is asked to end."""
    # What is trained, on what, and for how long.
    meta = wsi_llava.read_meta(args.data)
    recipe = pick_recipe(stage, args, meta)
    torch.manual_seed(args.seed)
    task = (Alignment if stage == 1 else Conversation)(stage, args, recipe, meta)
    batches, steps = size_of_run(stage, recipe, len(task.train))
    steps = steps if stage else args.llm_steps
    optimizer = torch.optim.AdamW(task.groups, betas=(0.9, task.beta2), weight_decay=recipe.weight_decay)

    # Where an interrupted run saved last, or from the start, in a folder that is cleared first.
    run, step, log = identity(stage, args, recipe, task, steps), 0, []
    if args.resume and (folder / "train_state.pt").exists():
        step, log = resume(folder / "train_state.pt", run, task.model, optimizer)
        gone = f"{folder}/model.safetensors: the stage was done, but this is gone; leave --resume out"
        check(step < steps or (folder / "model.safetensors").exists(), gone)
        if step == steps and rank() == 0:  # a kill may have come between the last state and this
            (folder / "best.safetensors").unlink(missing_ok=True)
    elif rank() == 0:
        start_anew(folder)
    say_start(stage, args, task, steps, batches)
    if step == 0:
        task.report("before")

    wsi_llava.check_regular(folder / "log.jsonl", "delete it")
    log_file = open(folder / "log.jsonl" if rank() == 0 else os.devnull, "w")  # noqa: SIM115 (closed below)
    log_file.writelines(json.dumps(entry) + "\n" for entry in log)
    bar = tqdm(total=steps, initial=step, desc=f"stage {stage}", unit="step", disable=rank() > 0)
    began, first, finished = time.time(), step, step == steps > 0
    task.model.train()
    with wsi_llava.writing(folder / "log.jsonl"), log_file, bar:
        while step < steps:
            # The batch, and what is random in it, follow from the seed, the stage and the step.
            batch = batch_of(step, len(task.train), batches, [args.seed, stage])
            torch.manual_seed(hash((args.seed, stage, step)) % 2**62)
            height = schedule(step, steps, recipe.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * height

            # Forward and backward: the gradient of the mean over the batch, summed over the processes.
            started = time.time()
            loss, tokens = task.backward(batch)
            norm = torch.nn.utils.clip_grad_norm_(task.params, args.clip or math.inf)  # 0: off
            norm = float(norm.full_tensor() if task.sharded else norm)
            if not math.isfinite(loss + norm):
                raise not_finite(stage, step + 1, loss, norm, task, batch, folder, log_file)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            # One greppable line, now and then the losses on what is held out.
            entry = {"step": step, "loss": round(loss, 5), "lr": optimizer.param_groups[-1]["lr"]}
            entry |= {"grad_norm": round(norm, 4), "tokens_per_s": round(tokens / (time.time() - started), 1)}
            log.append(entry)
            where = f"stage {stage} step {step}/{steps}"
            if step % args.log_every == 0:
                say_step(where, entry, (time.time() - began) / (step - first) * (steps - step), args.device)
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}")
            evaluated = step == steps or step % (args.eval_every or max(1, steps // 8)) == 0
            if evaluated:
                task.model.eval()
                metrics = task.validate()
                task.model.train()
                ruined = f"stage {stage}, step {step}: on what is held out, {metrics}; try a lower --lr"
                check(all(map(math.isfinite, metrics.values())), ruined)
                entry |= {f"val_{name}": round(value, 5) for name, value in metrics.items()}
                if metrics:
                    say(f"{where} " + "  ".join(f"val {name} {value:.4g}" for name, value in metrics.items()))
                if rank() == 0:
                    draw_curves(folder / "loss.svg", log)
            print(json.dumps(entry), file=log_file, flush=True)

            # Saved every so often, and when asked to stop: then all processes stop after the same step.
            stopping = all_sum(torch.tensor(float(bool(stop)), device=args.device)) > 0
            due = stopping or step % args.save_every == 0 or evaluated and args.keep == "best"
            if due and step < steps:
                save(folder, run, task, step, optimizer, log, args.keep)
            stopped = f"interrupted after step {step} of {steps}, saved; --resume goes on from there"
            check(step == steps or not stopping, stopped)
    if not finished:
        save(folder, run, task, step, optimizer, log, args.keep)
    task.model.eval()
    task.report("after")
    say(f"Stage {stage} is done: {folder}/model.safetensors; losses in {folder}/log.jsonl and loss.svg.")
    all_sum(torch.zeros(1, device=args.device))  # nobody goes on before the files are there


def not_finite(stage, step, loss, norm, task, batch, folder, log_file):
    """The end of a run whose loss or gradient is not finite: its batch goes into the log -> a UserError."""
    ids = [task.train[i].read()["id"] for i in batch]
    log_file.write(json.dumps({"step": step, "loss": str(loss), "grad_norm": str(norm), "ids": ids}) + "\n")
    few = ", ".join(ids[:8]) + (", ..." if len(ids) > 8 else "")
    return UserError(
        f"stage {stage}, step {step}: the loss is {loss}, the norm of its gradient {norm}; the batch was "
        f"{few} (all in {folder}/log.jsonl); try a lower --lr or --dtype float32"
    )


# ---- Stage 0: a stand-in for Vicuna, where there is none. It has read the training texts and seen no slide -

PLAIN = "report, plain"  # the task of a report that stage 0 reads by itself, without a question


def train_tokenizer(path, texts):
    """SentencePiece with Llama's conventions, so that the stand-in and Vicuna share every line of code."""
    model, lines = io.BytesIO(), [line for text in texts for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=1024,
        hard_vocab_limit=False,  # few texts have fewer pieces
        byte_fallback=True,  # whatever a user types has a code
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,  # the same model every time
        minloglevel=2,
    )
    with replacing(path) as temporary:
        temporary.write_bytes(model.getvalue())


def stand_in(args):
    """Makes data/tokenizer.model and data/llm, unless they are there and of data/qa/train.jsonl's texts."""
    path, mark = args.data / "qa" / "train.jsonl", args.data / "llm" / "texts"
    check(path.is_file(), f"{path}: no such file; run python prepare.py --qa FILE... first")
    texts = hashlib.sha256(str(args.seed).encode() + path.read_bytes()).hexdigest()[:16]
    if mark.is_file() and mark.read_bytes() == texts.encode():
        return
    say("No language model at hand (--llm): training a stand-in on the training texts alone.")
    if rank() == 0:
        mark.unlink(missing_ok=True)  # until it is whole again
    train_stage(0, argparse.Namespace(**vars(args) | {"resume": False}))
    if rank() == 0:
        write_text(mark, texts)


def stand_in_to_train(args):
    """-> (a WSILLaVA of whose parts only a new, small language model is trained, its Tokenizer)."""
    path = args.data / "tokenizer.model"
    if rank() == 0:
        vicuna = wsi_llava.CHAT_FORMATS["vicuna"]
        prompt, texts = vicuna.start + vicuna.human.format(""), []
        for row in load_rows(args.data, "train", skip_missing=True, tokens=True):
            texts += [
                prompt,
                *(turn["value"] for turn in wsi_llava.slide_first(row.read()["conversations"], 0)),
            ]
        train_tokenizer(path, texts)
    gather(None)  # the others wait
    # A WSILLaVA without a slide encoder and with a frozen projector is a language model alone.
    tokenizer = wsi_llava.Tokenizer(path)
    cfg = wsi_llava.WSILLaVAConfig.from_dict(PRESETS["demo"].to_dict() | {"no_slide_encoder": True})
    cfg.llama = dataclasses.replace(cfg.llama, vocab=len(tokenizer))
    model = wsi_llava.WSILLaVA(cfg)
    model.mm_projector.requires_grad_(False)
    for p in model.llama.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.04)
    return model, tokenizer


# ---- Out again: what the stages trained, in the layouts in which LLaVA's weights are published -------------


def export(args):
    """out/stage3 -> a LLaVA folder: the language model, its adapters merged, and the projector; or adapters
    and projector alone. Beside them the tokenizer, and the slide encoder, which LLaVA has no place for."""
    folder = args.export or args.export_adapter
    unfinished = folder / ".unfinished"  # a killed export is begun anew
    new = not folder.exists() or not any(folder.iterdir()) or unfinished.exists()
    check(new, f"{folder} is not empty; name a new folder to export to")
    wsi_llava.stage_weights(args, 3)  # without it there is nothing of the user's own to export
    meta = wsi_llava.read_meta(args.data)
    model, tokenizer = wsi_llava.load_model(args, meta, 3)
    base, _ = wsi_llava.pick_llm(args, meta)
    what = f"{args.out}/stage3 is an ablation without slide encoder, which no published layout can say"
    check(not model.cfg.no_slide_encoder, what)
    reason = "its language model is --llm with --lora merged" if args.lora else "stage 3 trained no adapters"
    adapters = model.cfg.lora_rank and not args.lora
    check(args.export or adapters, f"--export-adapter: {reason}; use --export, which writes the whole model")
    say(f"Exporting {args.out}/stage3 to {folder} in {str(args.dtype).removeprefix('torch.')} ...")
    with alone_in(folder):
        unfinished.touch()
        besides = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "chat_template*")
        for path in [tokenizer.path, *(path for beside in besides for path in base.glob(beside))]:
            if path.is_file():
                with replacing(folder / path.name) as temporary:
                    temporary.write_bytes(path.read_bytes())
        encoder = model.slide_encoder
        if encoder:
            file = folder / "slide_encoder.safetensors"
            wsi_llava.save_slide_encoder(encoder.cfg, encoder.state_dict(), file)
        if args.export:
            wsi_llava.save_llama(model.llama, folder, tokenizer, model.mm_projector, args.layout)
        else:
            wsi_llava.save_lora(model, folder, base, tokenizer, args.layout)
        unfinished.unlink()
    llm = f"--llm {folder}" if args.export else f"--llm {base} --lora {folder}"
    say(
        f"Done. It answers where --out holds no stage 2 or 3: "
        f"python sample.py {llm} --slide-encoder {folder}/slide_encoder.safetensors --out new ..."
    )


# ---- What it is worth: slides against reports, one piece less at a time ------------------------------------


def load_whole(args):
    """The model as far as it is trained, or a published one, on its device -> (WSILLaVA, Tokenizer)."""
    model, tokenizer = wsi_llava.load_model(args, wsi_llava.read_meta(args.data), 3)
    return model.to(args.device), tokenizer


def visual_tokens(args, model, slides):
    """-> {slide: visual tokens [V,C]}, made where they lack. The UserError says which slide has none."""
    problems = write_visual_tokens(args, model, slides)
    first = next(iter(problems.values()), "")
    check(not problems, f"{len(problems)} slides cannot be asked about, the first: {first}")
    return {slide: read_visual_tokens(args.data, slide, model.cfg) for slide in slides}


def retrieval(args, rows):
    """Cosines of slides and reports in stage 1's own space [n,n], on the CPU; None without stage 1."""
    meta = wsi_llava.read_meta(args.data)
    encoded = meta["encoder"]["source"] == wsi_llava.IMPORTED_TOKENS
    if encoded or not (args.out / "stage1" / "model.safetensors").exists():
        return None
    cfg, model, words, tokenizer = load_alignment(args, meta)
    slides, texts = [], []
    for row in rows:
        with torch.no_grad():
            slide, text = embed(args, model, words, [read_pair(args.data, row, tokenizer, cfg)])
        slides.append(slide)
        texts.append(text)
    return (torch.cat(slides) @ torch.cat(texts).T).cpu()


def draw_similarity(path, panels, side=420):
    """{title: similarities [n,n], slides by reports} -> a PNG: one hopes for a bright diagonal."""
    picture = Image.new("RGB", ((side + 20) * len(panels) + 20, side + 70), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for i, (title, matrix) in enumerate(panels.items()):
        low, high = matrix.min(), matrix.max()
        grey = (255 * (matrix - low) / (high - low).clamp(min=1e-9)).byte().numpy()
        square = Image.fromarray(grey).resize((side, side), Image.Resampling.NEAREST)
        x = 20 + i * (side + 20)
        picture.paste(square, (x, 40))
        draw.text((x, 12), title, fill="black", font=font)
        scale = f"rows: slides, columns: their reports; black {low:.2f}, white {high:.2f}"
        draw.text((x, side + 46), scale, fill="black", font=font)
    with replacing(path) as temporary:
        picture.save(temporary, "PNG")


def show_alignment(args):
    """--alignment: is a slide nearer to its own report than to others', before the projector and behind it?
    For whatever model is at hand, on the reports of the test split, or of training where there is none."""
    split = "test" if (args.data / "qa" / "test.jsonl").exists() else "train"
    rows = one_report_a_slide(load_rows(args.data, split, args.skip_missing, tokens=True))[:256]
    check(len(rows) > 1, f"{args.data}/qa/{split}.jsonl: --alignment needs the reports of two slides or more")
    model, tokenizer = load_whole(args)
    visual = visual_tokens(args, model, slides_in(rows))
    room, examples = model.cfg.llama.context, []
    for row in rows:
        tokens = torch.stack([visual[slide] for slide in row.slides])  # [S,V,C]
        ids, labels = encode_row(tokenizer, row.read(), len(tokens), plain=True)
        kept = room - tokens.shape[0] * (tokens.shape[1] - 1)
        full = f"{row.read()['id']}: its slides leave no room in the language model's context"
        check(kept > len(tokens) + 2, full)
        examples.append({"visual": tokens, "ids": ids[:kept], "labels": labels[:kept]})
    cosine, found = alignment(args, model, examples)
    panels = {"after the projector (cosine)": cosine.cpu()}
    before = retrieval(args, rows)
    if before is not None:
        panels = {"before it, stage 1's space (cosine)": before} | panels
    n = len(rows)
    chance = f"by chance R@1 {1 / n:.2f}, R@5 {min(1, 5 / n):.2f}"
    say(f"\nAlignment of {n} slides and their reports ({split}; {chance})")
    for title, matrix in panels.items():
        say(f"  {title}: " + ", ".join(f"{name} {share:.2f}" for name, share in recall(matrix).items()))
    say("  " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    draw_similarity(args.out / "alignment.png", panels)
    say(f"  all pairs: {args.out}/alignment.png")


ABLATIONS = {  # what is taken away -> the flags that do it, and the first stage to train again
    "the slide encoder": ({"no_slide_encoder": True}, 2),
    "stage 2": ({"skip_stage": [2]}, 2),
    "the image": ({"no_image": True}, 3),
    "three of four tiles": ({"max_tiles": 0.25}, 1),  # of the median slide
    "stage 1": ({"skip_stage": [1]}, 1),  # last: it has visual tokens of its own in the place of the others'
}
WHOLE = "nothing (the whole model)"


def shared_flags(args, out):
    """The flags that say which data and which weights, as sample.py takes them."""
    flags = ["--data", args.data, "--out", out, "--device", args.device, "--seed", args.seed]
    flags += ["--dtype", str(args.dtype).removeprefix("torch.")]
    for name in ("preset", "slide_encoder", "llm", "lora", "projector", "chat_format"):
        if getattr(args, name) is not None:
            flags += [f"--{name.replace('_', '-')}", getattr(args, name)]
    return [str(flag) for flag in flags]


def answer_test(args, out, name, *flags):
    """Asks the model of a folder all questions of the test split, by sample.py -> the file of its answers."""
    path, questions = out / name, args.data / "qa" / "test.jsonl"
    lacks = "no such file; run python prepare.py --qa FILE --split test first"
    check(questions.exists(), f"{questions}: {lacks}")
    for newer in (questions, out / "stage3" / "model.safetensors"):
        if path.exists() and path.stat().st_mtime < newer.stat().st_mtime:
            path.unlink()  # another model's, or answers to other questions
    asked = ["--qa", str(questions), "--predictions", str(path), "--batch-size", "64"]
    sample.main([*asked, "--max-new-tokens", "96", *flags, *shared_flags(args, out)])
    return path


def compare(answers, seed):
    """{variant: {n: (question, answer)}}, the whole model first -> lines of the table: of each group of
    questions, metric and variant the mean, and the paired difference from the whole."""
    groups, lines = {}, []
    for n in sorted(set.intersection(*map(set, answers.values()))):
        row = answers[WHOLE][n][0]
        row["scores"] = {name: sample.score_answer(row, found[n][1]) for name, found in answers.items()}
        for metric in ("accuracy", "exact match", "BLEU-1", "ROUGE-L"):
            if metric in row["scores"][WHOLE]:
                groups.setdefault(("all", metric), []).append(row)
                groups.setdefault((row["task"], metric), []).append(row)
    for (group, metric), rows in groups.items():
        for name, facts in sample.compare(rows, metric, list(answers), False, seed).items():
            line = dict.fromkeys(("difference", "difference_low", "difference_high", "p")) | facts
            lines.append({"questions": group, "metric": metric, "without": name, "n": len(rows)} | line)
    return lines


def draw_ablations(path, lines):
    """The means with their intervals, from 0 to 1, a block a metric, as an SVG."""
    shapes, y = [], 0

    def at(value):
        return 240 + 300 * value

    for metric in dict.fromkeys(line["metric"] for line in lines):
        y += 30
        block = [line for line in lines if line["metric"] == metric]
        shapes.append(f'<text x="10" y="{y}" font-weight="bold">{metric}, trained without</text>')
        for tick in (0, 0.25, 0.5, 0.75, 1):  # the axis
            x = at(tick)
            shapes.append(f'<text x="{x}" y="{y}" fill="#888888" text-anchor="middle">{tick:g}</text>')
            shapes.append(f'<path d="M{x} {y + 6}V{y + 10 + 20 * len(block)}" stroke="#dddddd"/>')
        for line in block:
            y += 20
            low, mean, high = (at(line[key]) for key in ("low", "mean", "high"))
            shapes.append(f'<text x="20" y="{y + 4}">{line["without"]}</text>')
            shapes.append(f'<path d="M{low:.1f} {y}H{high:.1f}" stroke="#1f5fb4" stroke-width="2"/>')
            shapes.append(f'<circle cx="{mean:.1f}" cy="{y}" r="4" fill="#1f5fb4"/>')
            shapes.append(f'<text x="555" y="{y + 4}">{line["mean"]:.2f}</text>')
        y += 10
    write_svg(path, shapes, 600, y + 20)


def variants(args):
    """The ablations that tell something of this data and model -> {name: (flags, first stage)}."""
    chosen, pointless = {}, set()
    if not (args.out / "stage1" / "slide_encoder.safetensors").exists():  # it is published, or there is none
        pointless.add("stage 1")
    if wsi_llava.read_meta(args.data)["encoder"]["source"] == wsi_llava.IMPORTED_TOKENS:
        pointless |= {"the slide encoder", "three of four tiles"}
    if args.no_slide_encoder:
        pointless.add("the slide encoder")
    rows = load_rows(args.data, "train", skip_missing=True, tokens=True)
    tiles = float(np.median([row.tiles / len(row.slides) for row in rows]))
    for name, (flags, first) in ABLATIONS.items():
        if "max_tiles" in flags:
            flags = {"max_tiles": max(1, round(flags["max_tiles"] * tiles))}
        if name not in pointless:
            chosen[name] = flags, first
    return chosen


def ablations(args):
    """--ablations: what each piece is worth. The model of --out is trained again without it, in a folder
    of its own, and both answer data/qa/test.jsonl. Interrupted, the same command goes on."""
    args.resume, folder, found = True, args.out / "ablations", {}
    for name, (flags, first) in {WHOLE: ({}, 4), **variants(args)}.items():
        say(f"\nWithout {name}")
        variant = argparse.Namespace(**(vars(args) | flags))
        variant.out = args.out if name == WHOLE else folder / name.replace(" ", "-")
        # Stages before the first that differs are copied; that one and those after it are trained again.
        stages = [stage for stage in (1, 2, 3) if (args.out / f"stage{stage}" / "model.safetensors").exists()]
        if variant.no_slide_encoder and 1 in stages:
            stages.remove(1)
        for stage in stages:
            if stage >= first:
                train_stage(stage, variant)
            elif name != WHOLE:
                copied = shutil.ignore_patterns("train_state.pt", ".*")
                there = variant.out / f"stage{stage}"
                shutil.copytree(args.out / f"stage{stage}", there, ignore=copied, dirs_exist_ok=True)
        asked = ["--baselines"] if variant.no_image else []
        field = "answer_no_image" if variant.no_image else "answer"
        _, answers = sample.read_predictions(answer_test(args, variant.out, "ablation.jsonl", *asked))
        found[name] = {n: (row, row[field]) for n, row in answers.items() if row.get(field) is not None}
    lines = compare(found, args.seed)
    check(lines, f"{args.data}/qa/test.jsonl: no question was answered by all of the models")
    shown = [line for line in lines if line["questions"] == "all"]
    say(f"\nAblations: {args.data}/qa/test.jsonl, in brackets 95% bootstrap intervals over slides\n")
    say(f"{'metric':12} {'trained without':28} {'questions':>9}  {'mean':22} difference from the whole")
    for line in shown:
        ends = "[{low:.3f}, {high:.3f}]".format(**line)
        paired = "{difference:+.3f} [{difference_low:+.3f}, {difference_high:+.3f}]"
        paired = "" if line["difference"] is None else paired.format(**line)
        say("{metric:12} {without:28} {n:9,}  {mean:.3f} ".format(**line) + f"{ends}  {paired}".rstrip())
    table = io.StringIO()
    writer = csv.DictWriter(table, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(folder / "ablations.csv", table.getvalue())
    draw_ablations(folder / "ablations.svg", shown)
    say(f"\nAlso task by task: {folder}/ablations.csv; as a picture: {folder}/ablations.svg")


# ---- The demo: the three stages on the toy cohort, then questions about slides that it has never seen ------


def truth(row):
    """The true answer of a row of one question."""
    return row["conversations"][1]["value"]


HEATMAPS = 20  # slides; each takes 32 passes


def print_relevance(args, model, tokenizer, cases):
    """Heatmaps against the truth: how relevant to "Yes, brown pigment is present." are the tiles that
    hold it? The first held-out slides with pigment count. The very first becomes a picture."""
    planted = {case["slide"]: case["planted"] for case in cases}
    times, hits, chance, picture = [], [], [], args.out / "heatmap.png"
    for row in load_rows(args.data, "test"):
        (slide, *_), content = row.slides, row.read()
        if row.task != "focus" or not planted[slide] or len(hits) == HEATMAPS:
            continue
        question = without_image(content["conversations"][0]["value"])
        features, coords = read_features(args.data, slide, args.max_tiles)
        holds = np.array([corner in planted[slide] for corner in coords.tolist()])
        if not holds.any():  # --max-tiles left them out
            continue
        relevance = sample.tile_relevance(model, tokenizer, features, coords, question, truth(content))
        relevance = relevance.numpy()
        if not hits:
            view = sample.open_slide(args.data, slide)
            lines = [f"{slide}: {question}", f"Answer: {truth(content)}"]
            sample.draw_heatmap(picture, view, coords.numpy(), relevance, lines)
        hits.append(holds[relevance.argmax()])
        chance.append(holds.mean())
        speaking = relevance.clip(min=0)  # negative: evidence against the answer
        times.append(speaking[holds].mean() / max(speaking.mean(), 1e-12))
    n = len(hits)
    if n:
        times, hits, chance = np.mean(times), np.mean(hits), np.mean(chance)
        say(
            f"\nWhere the answers come from: on the {n} held-out slides with brown pigment, the tiles that "
            f"hold it get {times:.1f} times the mean relevance (random: 1.0), and the most relevant tile is "
            f"one of them in {hits:.0%} (random: {chance:.0%}). One of them: {picture}"
        )


def print_dialogue(args, model, tokenizer):
    """A chat about the first held-out slide that has one, beside the truth -> the slide."""
    row = next(row for row in load_rows(args.data, "test") if row.task == "dialogue")
    visual = visual_tokens(args, model, row.slides)[row.slides[0]]
    say(f"\nA dialogue about {row.slides[0]}, a held-out slide (in brackets: the truth):")
    chat, turns = sample.Chat(model, tokenizer, visual, max_new_tokens=64), row.read()["conversations"]
    for question, answer in zip(turns[::2], turns[1::2]):
        question = without_image(question["value"])
        say(f"  USER: {question}\n  ASSISTANT: {''.join(chat.reply(question))}  [{answer['value']}]")
    return row.slides[0]


def demo(args):
    """--demo: the toy cohort, the three stages, and what they are worth on slides that were held out."""
    parts = {"start": time.time()}
    args.preset, args.log_every, args.val_rows = "demo", args.log_every * 20, min(args.val_rows, 96)
    cases = prepare.prepare_demo(prepare.with_defaults(args))
    parts["slides and features"] = time.time()
    stand_in(args)
    parts["stand-in"] = time.time()
    for stage in (2, 3) if args.no_slide_encoder else (1, 2, 3):
        train_stage(stage, args)
        parts[f"stage {stage}"] = time.time()
    answer_test(args, args.out, "test.jsonl", "--baselines", "--evaluate", str(args.out / "test.jsonl"))
    parts["answers"] = time.time()
    show_alignment(args)
    model, tokenizer = load_whole(args)
    slide = print_dialogue(args, model, tokenizer)
    if not args.no_image:
        print_relevance(args, model, tokenizer, cases)
    parts["alignment, dialogue, heatmaps"] = time.time()
    pictures = f"{args.out}/stage*/loss.svg, {args.out}/alignment.png, {args.data}/qc/{slide}.jpg"
    say(f"\nPictures: {pictures} (tissue and tiles)")
    ends = itertools.pairwise(parts.values())
    took = [f"{name} {end - begin:.0f}" for name, (begin, end) in zip(list(parts)[1:], ends)]
    say(f"Took {time.time() - parts['start']:.0f} s: {', '.join(took)}.")
    say(f"Ask it yourself: python sample.py --slide {slide}")


# ---- Flags, and what they start ----------------------------------------------------------------------------


def add_recipe_flags(parser):
    """A flag for each field of Recipe, whose help ends in the values of the recipes."""
    about = "In brackets: the defaults by preset, of stages 1, 2, 3 where they differ; 13b has those of 7b."
    add = parser.group("the recipe", about)
    for f in dataclasses.fields(Recipe):
        text = []
        for preset in ("7b", "demo"):
            values = [str(getattr(recipe, f.name)) for recipe in RECIPES[preset].values()]
            text.append(f"{preset}: {', '.join(values if len(set(values)) > 1 else values[:1])}")
        kind = f.metadata["kind"] or at_least(1 if f.type is int else 0, f.type, 1e38)
        extra = {"type": kind, "metavar": "X"}
        if f.type is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        help = f"{f.metadata['help']} ({'; '.join(text)})".replace("%", "%%")
        add(f"--{f.name.replace('_', '-')}", help, **extra)


def parse(argv=None):
    parser = wsi_llava.Parser(__doc__)
    count, yes = at_least(1), {"action": "store_true"}
    folder = {"metavar": "DIR", "type": some_path}
    add = parser.group("what to do")
    add("--stage", "the stage to train", type=int, choices=[1, 2, 3])
    add("--demo", "draw toy slides if needed, train all stages, answer held-out questions", **yes)
    worth = "with --stage 3 or --demo: then train again without each piece, and compare the answers"
    add("--ablations", worth, **yes)
    near = "how near slides are to their reports, before the projector and after"
    add("--alignment", near, **yes)
    add("--export", "write out/stage3 as a Hugging Face folder, its adapters merged, and stop", **folder)
    add("--export-adapter", "the same as a LoRA folder, to stand on --llm", **folder)
    layout = "of an export: transformers' (default) or LLaVA's own"
    add("--layout", layout, choices=["hf", "llava"], default="hf")
    add("--resume", "go on where an interrupted run of the stage saved last", **yes)
    add = parser.group("what is trained, and on what")
    add("--full", "stage 3 trains the whole language model instead of LoRA adapters", **yes)
    add("--from-scratch", "stage 1 starts from a random slide encoder, not GigaPath's", **yes)
    add("--skip-missing", "leave out questions about slides that have no features", **yes)
    held_out = "share of the training slides to validate on (default: 0.05)"
    add("--val", held_out, type=at_least(0, float, 0.9), default=0.05)
    add("--val-rows", "validate on at most so many rows (default: 256)", type=count, default=256)
    keep = "the stage's result: the last weights (default), or those of lowest validation loss"
    add("--keep", keep, choices=["last", "best"], default="last")
    clip = "a gradient of larger norm is scaled down to it (default: 1; 0: never)"
    add("--clip", clip, type=at_least(0, float), default=1.0)
    lines = "steps between lines on the screen (default: 1; the demo: 20)"
    add("--log-every", lines, type=count, default=1)
    add("--eval-every", "steps between validations (default: an eighth of the run)", type=count)
    add("--save-every", "steps between checkpoints (default: 200)", type=count, default=200)
    stand_in = "training steps of the demo preset's stand-in language model (default: 160)"
    add("--llm-steps", stand_in, type=count, default=160)
    add = parser.group("ablations", "What is a piece worth? Train without it.")
    stages = {"type": int, "choices": [1, 2], "nargs": "*", "default": []}
    add("--skip-stage", "leave these stages' weights as they start", **stages)
    add("--no-slide-encoder", "tile features go straight to the pool (stages 2 and 3)", **yes)
    tiles = "at most so many tiles of a slide, drawn at random (default: all)"
    add("--max-tiles", tiles, type=at_least(0), default=0)
    add("--no-image", "stage 3: the language model gets the questions without the slide", **yes)
    add_recipe_flags(parser)
    wsi_llava.add_shared_flags(parser)
    prepare.add_demo_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    compared = args.demo or args.stage == 3
    whole = "--ablations goes with --stage 3 or --demo, whose model it compares with"
    check(compared or not args.ablations, whole)
    join_processes(args)
    wsi_llava.resolve_device(args)
    few = f"fewer than the {world()} processes, each of which takes some; raise it"
    check(args.val_rows >= world(), f"--val-rows {args.val_rows}: {few}")
    alone = world() > 1 and (args.demo or args.ablations or args.alignment)
    check(not alone, "--demo, --ablations and --alignment run in one process; start without torchrun")
    if args.demo:
        demo(args)
    elif args.stage:
        args.resume = args.resume or args.ablations  # what is trained already is not trained again
        train_stage(args.stage, args)
    elif args.alignment:
        show_alignment(args)
    elif args.export or args.export_adapter:
        export(args)
    else:
        given = "give --stage 1, 2 or 3, --alignment, --export or --demo (--help explains)"
        raise UserError(f"nothing to do: {given}")
    if args.ablations:
        ablations(args)
    if dist.is_initialized():
        # gloo's threads may hold tensors, which they cannot free while Python is shutting down.
        dist.destroy_process_group()


if __name__ == "__main__":
    wsi_llava.run(main)
