"""Trains WSI-LLaVA in the paper's three stages, each on what the one before it left.

    python train.py --stage 1   WSI-text alignment: slides meet their reports in one space (the slide encoder)
    python train.py --stage 2   feature space alignment: slide -> report (trains the projector)
    python train.py --stage 3   instruction tuning on all tasks (the projector, and the LLM by LoRA or --full)
    python train.py --demo      all of it on a cohort of toy slides, then questions about slides not seen

Reads data/ (made by prepare.py); writes out/stageN: model.safetensors (what the stage trained), config.json,
train_state.pt (to resume from), log.jsonl, loss.svg. Several GPUs: torchrun --nproc-per-node 8 train.py ...

One loop, run_stage, serves all stages. A stage is a task, Alignment or Conversation, which knows its rows and
does backward(batch) and validate(). With the demo's preset there is a stage 0 before them, which trains a
stand-in for the language model.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import typing
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm import tqdm

import prepare
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
    lora_rank: int = setting("stage 3: rank of the adapters, the updates to the LLM's matrices", default=0)
    lora_alpha: float = setting("stage 3: the adapters' updates are scaled by alpha / rank", default=0.0)
    lora_dropout: float = setting("stage 3: dropout of the adapters' input", wsi_llava.share, default=0.0)
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
        3: Recipe(2e-4, 128, 3, projector_lr=2e-5, lora_rank=128, lora_alpha=256, lora_dropout=0.05),
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
    slide: str
    task: str
    tiles: int  # of its slide

    def read(self):
        return json.loads(self.line)


def count_tiles(data, slide, imported):
    """How many tiles of a slide there are to learn from; of imported visual tokens: 1."""
    path = wsi_llava.features_file(data, slide)
    if path.exists():
        return wsi_llava.feature_metadata(path)["tiles"]
    return int(imported and wsi_llava.slide_file(data / "visual_tokens", slide).exists())


def load_rows(data, split, skip_missing=False, tokens=False):
    """data/qa/<split>.jsonl -> a list of Rows, whose slides have features (tokens: or imported visual
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
            slide = row["slide"]
            if slide not in tiles:
                tiles[slide] = count_tiles(data, slide, imported)
            rows.append(Row(line, slide, row["task"], tiles[slide]))
    lacking = {slide for slide, n in tiles.items() if not n}  # without tissue there is nothing to learn
    advice = "prepare them with python prepare.py --slides, or leave their questions out with --skip-missing"
    what = f"{path} names {len(lacking)} slides without features in {data}/features, the first"
    check(skip_missing or not lacking, f"{what}: {min(lacking, default='')}; {advice}")
    rows = [row for row in rows if row.slide not in lacking]
    check(rows, f"{path}: no question is about a slide that has features in {data}/features")
    return rows


def slides_in(rows):
    """The names of all slides that the rows are about, sorted."""
    return sorted({row.slide for row in rows})


def held_out(row, share):
    """Whether a row is for validation: by its slide's name alone, the same in every stage and run."""
    return zlib.crc32(row.slide.encode()) % 1000 < share * 1000


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
        if is_report(row) and row.slide not in seen:
            chosen.append(row)
            seen.add(row.slide)
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


def slide_encoder_to_train(args, meta):
    """What stage 1 starts from -> (SlideEncoder, or None for a new one; its config)."""
    gigapath = wsi_llava.GIGAPATH / "slide_encoder.pth"
    both = args.from_scratch and args.slide_encoder
    check(not both, "--from-scratch, or --slide-encoder: give one of them")
    if args.slide_encoder or (meta["preset"] != "demo" and not args.from_scratch and gigapath.exists()):
        path = args.slide_encoder or gigapath
        n = PRESETS[args.preset or meta["preset"]].n_visual_tokens
        encoder = wsi_llava.load_slide_encoder(path, n)
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
    """A slide and its report -> {"slide": (features [N,C_tile], coords [N,2]), "ids"}."""
    slide = read_features(data, row.slide, cfg.max_tiles, cfg.slide_encoder.in_width)
    ids = tokenizer.encode(row.read()["conversations"][1]["value"])
    return {"slide": slide, "ids": ids[: cfg.text_encoder.max_length]}


def embed(args, model, words, pairs):
    """What read_pair gave -> embeddings of the slides and of the reports, [B,E] each."""
    dtype = model.logit_scale.dtype  # float32
    slides = [pair["slide"] for pair in pairs]
    features = torch.cat([features for features, _ in slides]).to(args.device, dtype)  # [sum of N,C_tile]
    coords = torch.cat([coords for _, coords in slides]).to(args.device)
    lengths = [len(coords) for _, coords in slides]
    with autocast(args):
        embedded = model.embed_slides(features, coords, lengths)
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
        self.words, self.tokenizer = wsi_llava.token_embeddings(args, meta)  # [vocab,C_llm]
        encoder, encoder_cfg = slide_encoder_to_train(args, meta)
        cfg = self.cfg = wsi_llava.WSILLaVAConfig.from_dict(PRESETS[args.preset or meta["preset"]].to_dict())
        cfg.slide_encoder = dataclasses.replace(encoder_cfg, trained_on=meta["encoder"]["fingerprint"])
        cfg.text_encoder.in_width, cfg.max_tiles = self.words.shape[1], args.max_tiles
        self.model = wsi_llava.WSITextAlignment(cfg)
        if encoder:
            self.model.slide_encoder.load_state_dict(encoder.state_dict())
        self.start = wsi_llava.fingerprint(self.model)
        self.model.to(args.device, torch.float32).slide_encoder.checkpointing = recipe.checkpointing
        rows = one_report_a_slide(load_rows(args.data, "train", args.skip_missing))
        self.train, self.val = split_validation(rows, args)
        if not encoder:  # the inputs' mean and deviation, of some slides
            some = [self.read(row)["slide"][0] for row in self.train[:200]]
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
        tiles = [min(row.tiles, most) for row in rows]
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

    def report(self):
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
        wsi_llava.add_lora(model.llama, cfg.lora_rank, cfg.lora_alpha, recipe.lora_dropout)
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


def encode_row(tokenizer, row, image, plain=False):
    """A row of the dataset -> ids and labels, with its slide before the first question or without; plain: as
    LLaVA's stage 2 has it, the slide and then the report."""
    if plain:
        return tokenizer.encode_plain(row["conversations"][1]["value"], image)
    return tokenizer.encode_chat(wsi_llava.slide_first(row["conversations"], image))


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
            rows = [row for row in rows if row.slide not in problems]
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
        """-> {"id", "ids", "labels" (of the prompt), "visual" ([V,C], or None), "cut", "lost"}."""
        content = row.read()
        shown = self.stage == 2 or self.stage == 3 and not self.args.no_image
        ids, labels = encode_row(self.tokenizer, content, shown, self.stage == 2 or row.task == PLAIN)
        if self.stage == 0:
            labels = ids
        visual = read_visual_tokens(self.args.data, row.slide, self.cfg) if shown else None
        # An <image> is one id and many positions; what is too long loses the end of its answer.
        more = len(visual) - 1 if shown else 0  # positions than ids
        room = max(0, self.longest - more)
        example = {"id": content["id"], "visual": visual}
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
        metrics = {"loss": loss / max(1, labelled)}
        # A model that reads its slides finds an answer less likely after another slide's tokens.
        slides = slides_in(self.val)
        if len(slides) > 1 and not self.args.no_image:
            other = dict(zip(slides, slides[1:] + slides[:1]))
            rows = [row._replace(slide=other[row.slide]) for row in self.val]
            loss, labelled, *_ = self.losses(rows, learn=False)
            metrics["loss after another slide"] = loss / max(1, labelled)
        return metrics

    def report(self):
        """Says, after training, what is worth knowing beside the loss."""
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
FLAGS_OF_A_RUN = ("seed", "dtype", "val", "clip", "full", "no_slide_encoder", "no_image", "max_tiles")


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
    for name in ("train_state.pt", "model.safetensors", "slide_encoder.safetensors"):
        (folder / name).unlink(missing_ok=True)


def save(folder, run, task, step, optimizer, log):
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
    if step == int(run["steps"]):
        task.write_result(folder, weights)
    with replacing(folder / "train_state.pt") as path:
        torch.save({"run": run, "step": step, "model": weights, "optimizer": moments, "log": log}, path)


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
    elif rank() == 0:
        start_anew(folder)
    say_start(stage, args, task, steps, batches)

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
            if step == steps or step % (args.eval_every or max(1, steps // 8)) == 0:
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
            if (stopping or step % args.save_every == 0) and step < steps:
                save(folder, run, task, step, optimizer, log)
            stopped = f"interrupted after step {step} of {steps}, saved; --resume goes on from there"
            check(step == steps or not stopping, stopped)
    if not finished:
        save(folder, run, task, step, optimizer, log)
    task.model.eval()
    task.report()
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
                *(turn["value"] for turn in wsi_llava.slide_first(row.read()["conversations"], image=False)),
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


# ---- Out again: what the stages trained, as transformers takes it ------------------------------------------


def export(args):
    """out/stage3 -> a Hugging Face folder: the language model, its adapters merged, and the projector. Beside
    them the tokenizer, and the slide encoder, which such a folder has no place for."""
    folder = args.export
    unfinished = folder / ".unfinished"  # a killed export is begun anew
    new = not folder.exists() or not any(folder.iterdir()) or unfinished.exists()
    check(new, f"{folder} is not empty; name a new folder to export to")
    wsi_llava.stage_weights(args, 3)  # without it there is nothing of the user's own to export
    meta = wsi_llava.read_meta(args.data)
    model, tokenizer = wsi_llava.load_model(args, meta, 3)
    base, _ = wsi_llava.pick_llm(args, meta)
    what = f"{args.out}/stage3 is an ablation without slide encoder, which no published layout can say"
    check(not model.cfg.no_slide_encoder, what)
    say(f"Exporting {args.out}/stage3 to {folder} in {str(args.dtype).removeprefix('torch.')} ...")
    with alone_in(folder):
        unfinished.touch()
        for path in [tokenizer.path, *base.glob("tokenizer*"), base / "special_tokens_map.json"]:
            if path.is_file():
                with replacing(folder / path.name) as temporary:
                    temporary.write_bytes(path.read_bytes())
        config = folder / "tokenizer_config.json"
        if config.exists():  # the base's chat template is not the prompt of training
            kept = wsi_llava.read_json(config, "copy it again") | {"chat_template": None}
            write_text(config, json.dumps(kept, indent=2))
        encoder = model.slide_encoder
        if encoder:
            file = folder / "slide_encoder.safetensors"
            wsi_llava.save_slide_encoder(encoder.cfg, encoder.state_dict(), file)
        wsi_llava.save_llama(model.llama, folder, tokenizer, model.mm_projector)
        unfinished.unlink()
    say(
        f"Done. It answers where --out holds no stage 2 or 3: "
        f"python sample.py --llm {folder} --slide-encoder {folder}/slide_encoder.safetensors --out new ...\n"
        f"It has no chat template; its prompt is {tokenizer.chat.start + tokenizer.chat.human.format('...')!r}"
    )


# ---- The demo: the three stages on the toy cohort, then questions about slides that it has never seen ------


def cohort_question(data):
    """A question about a held-out slide whose tiles with the answer are known -> (slide, question)."""
    for row in load_rows(data, "test"):
        question, answer = (turn["value"] for turn in row.read()["conversations"][:2])
        if row.task == "focus" and answer.startswith("Yes"):
            return row.slide, without_image(question)
    raise UserError(f"{data}/qa/test.jsonl: no question about a focus; draw more slides with --demo-slides")


def demo(argv, args):
    """--demo: shows and runs what a user would type, from slides to a picture of where an answer is from."""
    own = [flag for flag in argv if flag != "--demo"]
    where, defaults = [], parse([])
    for name in ("data", "out", "device", "dtype", "seed", "workers"):
        if getattr(args, name) != getattr(defaults, name):
            where += [f"--{name}", str(getattr(args, name))]
    took = {}

    def show(what, script, *flags):
        """Prints a command and runs it; sample.py's in a process of its own: this file needs nothing of it."""
        say(f"\n$ python {script} {shlex.join(flags)}")
        began = time.time()
        if script == "sample.py":
            path = Path(__file__).with_name(script)
            done = subprocess.run([sys.executable, str(path), *flags])
            check(done.returncode == 0, f"{script} ended with status {done.returncode}; see above")
        else:
            {"prepare.py": prepare, "train.py": sys.modules[__name__]}[script].main(list(flags))
        took[what] = time.time() - began

    show("slides", "prepare.py", "--demo", str(args.demo_slides), *where)
    for stage in "123":
        show(f"stage {stage}", "train.py", "--stage", stage, "--log-every", "20", "--val-rows", "96", *own)
    questions, answers = str(args.data / "qa" / "test.jsonl"), str(args.out / "test.jsonl")
    asked = ("--qa", questions, "--baselines", "--predictions", answers, "--evaluate", answers)
    show("answers", "sample.py", *asked, "--max-new-tokens", "96", *where)
    slide, question = cohort_question(args.data)
    heatmap = ("--heatmap", str(args.out / "heatmap.png"))
    show("heatmap", "sample.py", "--slide", slide, "--ask", question, *heatmap, *where)
    parts = ", ".join(f"{what} {seconds:.0f}" for what, seconds in took.items())
    say(f"\nTook {sum(took.values()):.0f} s: {parts}.")


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
    toys = "toy slides to train on (default: 500); a fifth more are held out"
    add("--demo-slides", toys, type=at_least(5), default=500)
    add("--export", "write out/stage3 as a Hugging Face folder, its adapters merged", **folder)
    add("--resume", "go on where an interrupted run of the stage saved last", **yes)
    add = parser.group("what is trained, and on what")
    add("--full", "stage 3 trains the whole language model instead of LoRA adapters", **yes)
    add("--from-scratch", "stage 1 starts from a random slide encoder, not GigaPath's", **yes)
    add("--skip-missing", "leave out questions about slides that have no features", **yes)
    held_out = "share of the training slides to validate on (default: 0.05)"
    add("--val", held_out, type=at_least(0, float, 0.9), default=0.05)
    add("--val-rows", "validate on at most so many rows (default: 256)", type=count, default=256)
    clip = "a gradient of larger norm is scaled down to it (default: 1; 0: never)"
    add("--clip", clip, type=at_least(0, float), default=1.0)
    lines = "steps between lines on the screen (default: 1; the demo: 20)"
    add("--log-every", lines, type=count, default=1)
    add("--eval-every", "steps between validations (default: an eighth of the run)", type=count)
    add("--save-every", "steps between checkpoints (default: 200)", type=count, default=200)
    stand_in = "training steps of the demo preset's stand-in language model (default: 160)"
    add("--llm-steps", stand_in, type=count, default=160)
    add = parser.group(
        "ablations",
        "What is a piece worth? Train without it, with an --out of its own; then sample.py --evaluate.",
    )
    stages = {"type": int, "choices": [1, 2], "nargs": "*", "default": []}
    add("--skip-stage", "leave these stages' weights as they start", **stages)
    add("--no-slide-encoder", "tile features go straight to the pool (stages 2 and 3)", **yes)
    tiles = "at most so many tiles of a slide, drawn at random (default: all)"
    add("--max-tiles", tiles, type=at_least(0), default=0)
    add("--no-image", "stage 3: the language model gets the questions without the slide", **yes)
    add_recipe_flags(parser)
    wsi_llava.add_weights_flags(parser, tiles=False)
    wsi_llava.add_shared_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    join_processes(args)
    wsi_llava.resolve_device(args)
    few = f"fewer than the {world()} processes, each of which takes some; raise it"
    check(args.val_rows >= world(), f"--val-rows {args.val_rows}: {few}")
    check(not (args.demo and world() > 1), "--demo runs in one process; start without torchrun")
    if args.demo:
        return demo(sys.argv[1:] if argv is None else argv, parse(argv))  # as typed: the device unresolved
    if args.stage:
        train_stage(args.stage, args)
    elif args.export:
        export(args)
    else:
        given = "give --stage 1, 2 or 3, --export or --demo (--help explains)"
        raise UserError(f"nothing to do: {given}")
    if dist.is_initialized():
        # gloo's threads may hold tensors, which they cannot free while Python is shutting down.
        dist.destroy_process_group()


if __name__ == "__main__":
    wsi_llava.run(main)
