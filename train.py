"""Trains WSI-LLaVA in the paper's three stages, each on what the one before it left.

    python train.py --stage 1   WSI-text alignment: slides meet their reports in one space (the slide encoder)
    python train.py --stage 2   feature space alignment: slide -> report (trains the projector)
    python train.py --stage 3   instruction tuning on all tasks (the projector, and the LLM by LoRA or --full)
    python train.py --demo      all of it on a cohort of toy slides, then questions about slides not seen

Reads data/ (made by prepare.py); writes out/stageN: model.safetensors (what the stage trained), config.json,
train_state.pt (to resume from), log.jsonl, loss.svg. Several GPUs: torchrun --nproc-per-node 8 train.py ...

One loop, run_stage, serves all stages: a stage is a task, Alignment or Conversation. The demo has no Vicuna;
the loop that trains its small stand-in is the simplest here, and the place to begin reading.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import prepare
import wsi_llava
from wsi_llava import PRESETS, at_least, check, is_report, reading, replacing, write_text

# check(ok, message) ends the run with one line, unless ok; reading(file, hint) with what is wrong in a file.
# replacing(path) gives a temporary path, and renames it at the end: a file is whole or not there.

rate = at_least(0, float, 10)  # a type for argparse; one step of a larger learning rate ruins everything


def setting(help, kind=None, **default):
    """A field of Recipe, with its flag's help and, if special, its type for argparse."""
    return dataclasses.field(metadata={"help": help, "kind": kind}, **default)


@dataclasses.dataclass
class Recipe:
    """Hyperparameters of one stage. Every field is also a flag, which overrides it."""

    lr: float = setting("the learning rate at its highest, after the warmup", rate)
    batch_size: int = setting("rows a step, of all processes together, at most")
    epochs: float = setting("how often every row is seen")
    warmup: float = setting("share of the steps in which the rate rises", at_least(0, float, 1), default=0.03)
    weight_decay: float = setting("AdamW's", default=0.0)
    clip: float = setting("a gradient of larger norm is scaled down to it (0: never)", default=1.0)
    projector_lr: float = setting("stage 3: the projector's own learning rate (0: --lr)", rate, default=0.0)
    lora_rank: int = setting("stage 3: rank of the adapters (0: none)", default=0)
    lora_alpha: float = setting("stage 3: the adapters are scaled by alpha / rank", default=0.0)
    lora_dropout: float = setting("stage 3: dropout before the adapters", at_least(0, float, 1), default=0.0)
    max_length: int = setting("stages 2 and 3: a row's text and visual tokens, at most", default=2048)
    micro_batch: int = setting("stages 2 and 3: rows that go through the model at once", default=8)
    val_rows: int = setting("validate on so many rows, at most", default=256)
    checkpointing: bool = setting("recompute activations: slower, in less memory", default=True)


DEMO = {"val_rows": 96, "checkpointing": False}
RECIPES = {  # Recipe(lr, batch_size, epochs, ...): the values of LLaVA-1.5 and the paper where they say
    "7b": {
        1: Recipe(1e-4, 64, 20, warmup=0.05, weight_decay=0.05),
        2: Recipe(1e-3, 256, 1),
        3: Recipe(2e-4, 128, 3, projector_lr=2e-5, lora_rank=128, lora_alpha=256, lora_dropout=0.05),
    },
    "demo": {
        1: Recipe(1e-3, 60, 40, warmup=0.05, weight_decay=0.05, **DEMO),
        2: Recipe(2e-3, 32, 4, micro_batch=32, **DEMO),
        3: Recipe(3e-3, 48, 2, projector_lr=1e-3, lora_rank=16, lora_alpha=32, micro_batch=12, **DEMO),
    },
}
RECIPES["13b"] = RECIPES["7b"]
TITLES = {1: "WSI-text alignment", 2: "feature space alignment", 3: "instruction tuning"}
TILES_AT_ONCE = 4096  # stage 1: short slides go through the slide encoder together, up to so many tiles


# ---- Several processes: torchrun starts them, each takes its share of every batch ----


# torchrun numbers the processes: items[RANK::WORLD] is this one's share.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def all_sum(x):
    """The sum over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def gather(x):
    """-> a list of what each process gave; all wait for the last."""
    found = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(found, x)
    return found


def join_processes(args):
    """Resolves --device; joins the processes that torchrun started, one GPU each."""
    if WORLD > 1 and args.device == "auto" and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    wsi_llava.resolve_device(args)
    if args.device.type == "cuda" and args.device.index is not None:
        torch.cuda.set_device(args.device)
    if WORLD > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")


def say(text):
    """Prints above the progress bar, once."""
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()  # line by line also into a file or a pipe


def sum_gradients(groups, weight, sharded=False):
    """Sums the processes' gradients, and divides by the batch's weight: DistributedDataParallel's work, done
    once, after the last micro-batch."""
    for p in itertools.chain(*(group["params"] for group in groups)):
        if WORLD > 1 and not sharded:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        if p.grad is not None:
            p.grad.mul_((WORLD if sharded else 1) / weight)  # FSDP has taken the mean


def shard(model, dtype):
    """FSDP2: each process keeps a share of every layer's weights, gradients and moments."""
    model.slide_encoder = None  # it has done its work
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.llama.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


# ---- Data: the rows of the dataset, and the batches that are drawn from them ----


def load_rows(args, tokens=False):
    """The rows to learn from, with "tiles", their slide's number; tokens: visual tokens will do. Raises
    UserError where slides have no features, unless --skip-missing leaves them out."""
    path, tiles = args.data / "qa" / "train.jsonl", {}
    rows = prepare.read_qa(path)
    for slide in slides_in(rows):
        features = wsi_llava.features_file(args.data, slide)
        imported = tokens and wsi_llava.slide_file(args.data / "visual_tokens", slide).exists()
        tiles[slide] = wsi_llava.feature_metadata(features)["tiles"] if features.exists() else int(imported)
    lacking = [slide for slide, n in tiles.items() if not n]  # without tissue there is nothing to learn
    what = f"{path} names {len(lacking)} slides without features, the first: {min(lacking, default='')}"
    check(args.skip_missing or not lacking, f"{what}; prepare them, or --skip-missing")
    return [row | {"tiles": tiles[row["slide"]]} for row in rows if tiles[row["slide"]]]


def slides_in(rows):
    """The names of all slides that the rows are about, sorted."""
    return sorted({row["slide"] for row in rows})


def split_validation(rows, args, most):
    """Rows to train on, and at most so many to validate on, from all over the file, which goes task by task.
    By the patient's name, or the slide's: the same in every stage and run."""
    train, val = [], []
    for row in rows:
        number = zlib.crc32(prepare.patient_of(row["slide"]).encode()) % 1000  # hash() differs run by run
        (val if number < args.val * 1000 else train).append(row)
    check(train, f"{args.data}: no slide is left to train on, with --val {args.val}")
    n = min(len(val), most)
    return train, [val[i * len(val) // n] for i in range(n)]


def size_of_run(stage, recipe, n):
    """-> the number of batches an epoch, equally large, that hold each of n rows once; the run's steps."""
    batches = math.ceil(n / recipe.batch_size)
    few = f"a batch of {n // batches} is too small for stage {stage} in {WORLD} processes"
    least = max(WORLD, 2 if stage == 1 else 1)  # stage 1 contrasts the slides of a batch
    check(n // batches >= least, f"{few}; raise --batch-size or train on more slides")
    return batches, max(int(recipe.epochs > 0), round(recipe.epochs * batches))


def batch_of(step, n, batches, seed):
    """The rows of a step, as indices: they follow from seed and step, so resuming needs no state."""
    epoch, k = divmod(step, batches)
    order = np.random.default_rng([*seed, epoch]).permutation(n)
    return order[k * n // batches : (k + 1) * n // batches].tolist()


# ---- The demo's language model: it has read the training texts and seen no slide ----


def train_tokenizer(path, texts):
    """SentencePiece with Llama's conventions: the stand-in and Vicuna share all code."""
    model, lines = io.BytesIO(), [line for text in texts for line in text.split("\n")]
    options = {"model_type": "bpe", "vocab_size": 1024, "normalization_rule_name": "identity"}
    options |= {"hard_vocab_limit": False, "remove_extra_whitespaces": False}  # few texts have fewer pieces
    options |= {"byte_fallback": True, "num_threads": 1, "minloglevel": 2}  # any text has a code; no chance
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    with replacing(path) as temporary:
        temporary.write_bytes(model.getvalue())


def train_stand_in(args, batch_size=32, epochs=1.28, lr=2e-3):
    """A small Llama on the training texts -> data/llm; its tokenizer -> data/tokenizer.model."""
    rows, path = prepare.read_qa(args.data / "qa" / "train.jsonl"), args.data / "tokenizer.model"
    talks = [wsi_llava.slide_first(row["conversations"], image=False) for row in rows]
    words = [turn["value"] for talk in talks for turn in talk]
    vicuna = wsi_llava.CHAT_FORMATS["vicuna"]  # what stands around every turn is worth pieces of its own
    train_tokenizer(path, words + [vicuna.start + vicuna.human.format("")] * len(rows))
    tokenizer = wsi_llava.Tokenizer(path)
    texts = [tokenizer.encode_chat(talk)[0] for talk in talks]
    for row in filter(is_report, rows):  # by itself, as stage 2 shows it
        texts.append(tokenizer.encode_plain(row["conversations"][1]["value"], image=False)[0])

    torch.manual_seed(args.seed)
    llama = wsi_llava.Llama(dataclasses.replace(PRESETS["demo"].llama, vocab=tokenizer.size)).to(args.device)
    for p in llama.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.04)
    optimizer = torch.optim.AdamW(llama.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    batches = math.ceil(len(texts) / batch_size)
    steps = math.ceil(epochs * batches)
    for step in tqdm(range(steps), desc="stand-in", unit="step"):
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps, warmup=0.08)
        batch = [torch.tensor(texts[i]) for i in batch_of(step, len(texts), batches, [args.seed, 0])]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-1)
        ids = ids[:, : llama.cfg.context].to(args.device)  # [B,T]
        logits = llama(ids.clamp(min=0))  # [B,T,vocab]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wsi_llava.save_llama(llama, args.data / "llm", tokenizer)
    say(f"Wrote it to {args.data}/llm after {steps} steps, at a loss of {loss.item():.2f}.")


def stand_in(args):
    """Makes the stand-in, unless it is there and of these texts."""
    mark, rows = args.data / "llm" / "texts", args.data / "qa" / "train.jsonl"
    with reading(rows, "python prepare.py --qa FILE... makes it"):
        texts = hashlib.sha256(f"{args.seed} ".encode() + rows.read_bytes()).hexdigest()[:16]
    if RANK == 0 and not (mark.is_file() and mark.read_bytes() == texts.encode()):
        say("No language model (--llm): training a stand-in on the training texts alone.")
        with alone_in(mark.parent):
            mark.unlink(missing_ok=True)  # until it is whole again
            train_stand_in(args)
            write_text(mark, texts)
    gather(None)  # the others wait


# ---- Stage 1: slides and reports in one space; first of all, what the stages share ----


def autocast(args):
    """bfloat16 is for the products. What is trained stays in float32: updates are too small for 8 bits."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == torch.bfloat16)


class Task:
    """A stage: model; groups, what is trained of it; train and val, rows; backward(batch), validate()."""

    beta2, sharded, cut = 0.999, False, 0  # AdamW's; by FSDP; rows that lost the end of their answers

    def passes(self, parts, seed):
        """This process's parts of a batch, one by one -> (number, what read() made of its rows)."""
        threads = 1 if self.args.device.type == "cpu" else self.args.workers  # a CPU's cores are the model's
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:

            def start(k):
                return pool.map(self.read, parts[k]) if k < len(parts) else None

            ahead = start(RANK)
            for k in range(RANK, len(parts), WORLD):
                samples, ahead = list(ahead), start(k + WORLD)  # the next is read while this one is at work
                torch.manual_seed(seed + k)  # a part's dropout is the same whenever it is passed
                yield k, samples


def slide_encoder_to_train(args, meta, preset):
    """What stage 1 starts from -> (SlideEncoder, or None for a new one; its config)."""
    path = args.slide_encoder or wsi_llava.GIGAPATH / "slide_encoder.pth"
    check(not (args.from_scratch and args.slide_encoder), "--from-scratch or --slide-encoder: not both")
    if args.from_scratch or (meta["preset"] == "demo" and not args.slide_encoder):
        return None, dataclasses.replace(preset.slide_encoder, in_width=meta["encoder"]["width"])
    check(path.exists(), f"{path}: no such file; name one with --slide-encoder, or train --from-scratch")
    encoder = wsi_llava.load_slide_encoder(path, preset.n_visual_tokens)
    wsi_llava.check_tile_encoder(encoder.cfg, meta, path)
    return encoder, encoder.cfg


def recall(similarity):
    """[n,n] slide-report similarities -> recall@1, 5 and 10, slide to report and back."""
    own = similarity.diagonal()
    ranks = {"slide->report": (similarity > own[:, None]).sum(1), "report->slide": (similarity > own).sum(0)}
    return {f"{name} R@{k}": (r < k).float().mean().item() for name, r in ranks.items() for k in (1, 5, 10)}


class Alignment(Task):
    """Stage 1: WSI-text alignment by symmetric InfoNCE with the gradient-cache method (arXiv 2101.06983).

    A contrastive loss needs a large batch, and slides are long. So: embed everything without grad; take
    the loss's gradient with respect to the embeddings; embed again, micro-batch by micro-batch, and carry
    that gradient back. Memory is one micro-batch's; the gradient is exactly that of the whole batch.
    """

    beta2 = 0.98

    def __init__(self, stage, args, recipe, meta):
        check(not args.no_slide_encoder, "--no-slide-encoder: stage 1 trains it; start with --stage 2")
        self.args = args
        self.words, self.tokenizer = wsi_llava.token_embeddings(args, meta)  # [vocab,C_llm], frozen
        cfg = self.cfg = copy.deepcopy(PRESETS[args.preset or meta["preset"]])
        encoder, encoder_cfg = slide_encoder_to_train(args, meta, cfg)
        cfg.slide_encoder = dataclasses.replace(encoder_cfg, trained_on=meta["encoder"]["fingerprint"])
        cfg.llama.width, cfg.max_tiles = self.words.shape[1], args.max_tiles
        self.model = wsi_llava.WSITextAlignment(cfg)
        if encoder:
            self.model.slide_encoder.load_state_dict(encoder.state_dict())
        self.start = wsi_llava.fingerprint(self.model)
        self.model.to(args.device, torch.float32).slide_encoder.checkpointing = recipe.checkpointing
        # One report a slide, its last: two in a batch would be each other's false negatives.
        reports = {row["slide"]: row for row in load_rows(args) if is_report(row)}
        self.train, self.val = split_validation(list(reports.values()), args, recipe.val_rows)
        if not encoder:  # the inputs' mean and deviation, of some slides
            some = [self.read(row)["features"] for row in self.train[:200]]
            self.model.slide_encoder.standardize_inputs(torch.cat(some).to(args.device))
        params = list(self.model.parameters())
        self.groups = [{"name": "slide and text encoder", "params": params, "peak": recipe.lr}]

    def read(self, row):
        """-> {"features" [N,C_tile], "coords" [N,2], "ids" of the report}."""
        width, longest = self.cfg.slide_encoder.in_width, self.cfg.text_encoder.max_length
        features, coords = wsi_llava.read_features(self.args.data, row["slide"], self.cfg.max_tiles, width)
        ids = self.tokenizer.encode(row["conversations"][1]["value"])[:longest]
        return {"features": features, "coords": coords, "ids": ids}

    def embed(self, samples):
        """What read() gave -> embeddings of slides and reports, [n,E] each."""
        features = torch.cat([s["features"] for s in samples]).to(self.words)  # [sum of N,C_tile]
        coords = torch.cat([s["coords"] for s in samples]).to(self.words.device)
        lengths = [len(s["coords"]) for s in samples]
        with autocast(self.args):
            slides = self.model.embed_slides(features, coords, lengths)
            texts = self.model.embed_words([s["ids"] for s in samples], self.words)
        return slides.to(self.words.dtype), texts.to(self.words.dtype)

    def micro_batches(self, rows):
        """Rows whose slides are packed into one sequence of TILES_AT_ONCE tiles, or of fewer, so that every
        process has some; a longer slide comes alone."""
        tiles = [min(row["tiles"], self.args.max_tiles or math.inf) for row in rows]
        at_once = min(TILES_AT_ONCE, math.ceil(sum(tiles) / WORLD))
        # First fit, in the batch's own order: a new micro-batch begins where a row no longer fits.
        parts, room = [], 0
        for row, n in zip(rows, tiles):
            if n > room:
                parts.append([])
                room = at_once
            parts[-1].append(row)
            room -= n
        return parts

    def embed_parts(self, parts, seed):
        """Yields, of each micro-batch of this process, (its place in the batch, slides, texts [n,E])."""
        ends = np.cumsum([len(part) for part in parts]).tolist()
        for k, samples in self.passes(parts, seed):
            yield slice(ends[k] - len(parts[k]), ends[k]), *self.embed(samples)

    def embed_all(self, parts, seed):
        """The whole batch's embeddings, [B,E] twice: each process fills its rows, the sum gathers them."""
        n, width = sum(map(len, parts)), self.cfg.text_encoder.embed_width
        slides, texts = torch.zeros(2, n, width, device=self.words.device, dtype=self.words.dtype)
        for place, *embedded in self.embed_parts(parts, seed):
            slides[place], texts[place] = embedded
        return all_sum(slides), all_sum(texts)

    def backward(self, batch):
        """Adds the gradient of a batch, rows' indices -> (its loss, the tiles that it took)."""
        parts = self.micro_batches([self.train[i] for i in batch])
        seed, tiles = torch.initial_seed(), sum(self.train[i]["tiles"] for i in batch)
        if len(parts) == 1 and WORLD == 1:  # its activations fit: nothing to cache
            ((_, slides, texts),) = self.embed_parts(parts, seed)
            loss = self.model.loss(slides, texts)
            loss.backward()
            return loss.item(), tiles
        # First pass: the embeddings of the whole batch, without activations.
        with torch.no_grad():
            slides, texts = self.embed_all(parts, seed)
        # The loss, and its gradient with respect to the embeddings: small, [B,E] twice.
        slides.requires_grad_(), texts.requires_grad_()
        loss = self.model.loss(slides, texts)
        loss.backward()
        if RANK:
            self.model.logit_scale.grad.zero_()  # all of it on every process; the sum is to hold it once
        # Second pass: embedded again, with activations, and that gradient carried into the weights.
        for place, *embedded in self.embed_parts(parts, seed):
            torch.autograd.backward(embedded, (slides.grad[place], texts.grad[place]))
        sum_gradients(self.groups, 1)
        return loss.item(), tiles

    @torch.no_grad()
    def validate(self):
        """-> {metric: value} of the rows for validation; {} where there are too few."""
        if len(self.val) < max(2, WORLD):
            return {}
        slides, texts = self.embed_all(self.micro_batches(self.val), 0)
        return {"loss": self.model.loss(slides, texts).item(), **recall(slides @ texts.T)}

    def write_result(self, folder, weights):
        """The whole model, and its slide encoder as later stages, and GigaPath's users, take it."""
        write_text(folder / "config.json", self.cfg.to_json())
        prefix = "slide_encoder."
        encoder = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        about = {"config": self.cfg.slide_encoder.to_json()}  # what the shapes do not tell
        wsi_llava.write_tensors(folder / "slide_encoder.safetensors", encoder, about)
        wsi_llava.write_tensors(folder / "model.safetensors", weights)


# ---- Stages 2 and 3: answers to questions about slides ----


def model_to_train(args, recipe, meta, stage):
    """The model of stage 2 or 3 -> (WSILLaVA, Tokenizer). What is trained is kept in float32."""
    full = stage == 3 and args.full
    model, tokenizer = wsi_llava.load_model(args, meta, stage - 1, torch.float32 if full else args.dtype)
    # Everything is frozen, and then what this stage trains is not.
    model.requires_grad_(False)
    if full:
        model.llama.requires_grad_(True)
    elif stage == 3 and recipe.lora_rank:
        model.cfg.lora_rank, model.cfg.lora_alpha = recipe.lora_rank, recipe.lora_alpha
        wsi_llava.add_lora(model.llama, recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout)
    model.mm_projector.requires_grad_(True)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    model.to(args.device).llama.checkpointing = recipe.checkpointing
    return model, tokenizer


class Conversation(Task):
    """Stages 2 and 3: next-token loss on the answers, given the slide's visual tokens."""

    def __init__(self, stage, args, recipe, meta):
        self.stage, self.args, self.micro_batch = stage, args, recipe.micro_batch
        self.shown, full = not (stage == 3 and args.no_image), stage == 3 and args.full
        self.sharded = full and WORLD > 1
        self.saved_dtype = args.dtype if full else torch.float32  # 7B in float32 would be 27 GB
        rows = load_rows(args, tokens=True)
        if stage == 2:
            rows = list(filter(is_report, rows))
            check(rows, f"{args.data}/qa/train.jsonl: holds no reports (tasks with 'report' in the name)")
        self.model, self.tokenizer = model_to_train(args, recipe, meta, stage)
        self.cfg, self.start = self.model.cfg, wsi_llava.fingerprint(self.model)
        self.train, self.val = split_validation(self.with_tokens(rows), args, recipe.val_rows)
        self.longest = min(recipe.max_length, self.cfg.llama.context)  # what is longer is cut
        if self.sharded:
            shard(self.model, args.dtype)
        llm = "language model" if full else f"LoRA adapters of rank {recipe.lora_rank}"
        lr = recipe.projector_lr if stage == 3 and recipe.projector_lr else recipe.lr
        parts = {"projector": (self.model.mm_projector, lr), llm: (self.model.llama, recipe.lr)}
        self.groups = []
        for name, (part, peak) in parts.items():
            params = [p for p in part.parameters() if p.requires_grad]
            if params:
                self.groups.append({"name": name, "params": params, "peak": peak})

    def with_tokens(self, rows):
        """The rows whose slides have visual tokens; the frozen slide encoder makes those that lack."""
        slides, written, problems = slides_in(rows), 0, {}
        bar = tqdm(slides[RANK::WORLD], desc="visual tokens", unit="slide", disable=RANK > 0)
        with autocast(self.args):
            own = wsi_llava.cache_visual_tokens(self.model, self.args.data, bar)
        for n, why in gather(own):
            written, problems = written + n, problems | why
        there = len(slides) - written - len(problems)
        say(f"Visual tokens of {len(slides):,} slides: {written:,} computed, {there:,} were there.")
        if problems:
            say(f"Left out slides that cannot be read: {len(problems):,}, such as {min(problems.values())}")
        return [row for row in rows if row["slide"] not in problems]

    def read(self, row):
        """-> {"visual" ([V,C], or None), "ids", "labels" (of the prompt), "positions", "cut"}."""
        ids, labels = self.tokenizer.encode_chat(wsi_llava.slide_first(row["conversations"], self.shown))
        if self.stage == 2:  # LLaVA's plain form: the slide, and then its report
            ids, labels = self.tokenizer.encode_plain(row["conversations"][1]["value"])
        visual = wsi_llava.read_visual_tokens(self.args.data, row["slide"], self.cfg) if self.shown else None
        more = len(visual) - 1 if self.shown else 0  # an <image> is one id and many positions
        room = max(1, self.longest - more)
        cut = len(ids) > room
        if not any(label >= 0 for label in labels[1:room]):  # no answer is left: a token that teaches nothing
            ids, labels, visual, more = [self.tokenizer.eos], [wsi_llava.IGNORE], None, 0
        found = {"visual": visual, "ids": ids[:room], "labels": labels[:room], "cut": cut}
        return found | {"positions": more + len(found["ids"])}

    def micro_batches(self, rows):
        """As many for each process: rows of like length together, so that little is padded. (In the batch
        only: batches of one length would be of one task, and no random draws.)"""
        rows = sorted(rows, key=lambda row: len(str(row["conversations"])))
        parts = WORLD * min(math.ceil(len(rows) / (self.micro_batch * WORLD)), len(rows) // WORLD)
        return [rows[k * len(rows) // parts : (k + 1) * len(rows) // parts] for k in range(parts)]

    def losses(self, rows, learn):
        """A batch's (loss, labelled tokens, positions, rows cut), sums over the processes' shares of it."""
        sums = np.zeros(4)
        for _, samples in self.passes(self.micro_batches(rows), torch.initial_seed()):
            ids, labels = [s["ids"] for s in samples], [s["labels"] for s in samples]
            with autocast(self.args):
                loss = self.model([s["visual"] for s in samples], ids, labels, reduction="sum")
            # A sum: the batch's labelled tokens, which it is to be divided by, are known at the end.
            if learn:
                loss.backward()
            labelled = sum(label >= 0 for row in labels for label in row[1:])
            positions, cut = sum(s["positions"] for s in samples), sum(s["cut"] for s in samples)
            sums += [loss.item(), labelled, positions, cut]
        return sum(gather(sums)).tolist()

    def backward(self, batch):
        """Adds the gradient of a batch, rows' indices -> (its loss, the positions that it took)."""
        rows = [self.train[i] for i in batch]
        loss, labelled, positions, cut = self.losses(rows, learn=True)
        check(labelled, f"--max-length {self.longest}: no room for the answer of {rows[0]['id']}; raise it")
        sum_gradients(self.groups, labelled, self.sharded)
        self.cut += int(cut)
        return loss / labelled, int(positions)

    @torch.no_grad()
    def validate(self):
        """The loss; and after another slide's tokens: higher, where the model reads its slides."""
        if len(self.val) < WORLD:
            return {}
        views, slides = {"loss": self.val}, slides_in(self.val)
        if len(slides) > 1 and self.shown:
            other = dict(zip(slides, slides[1:] + slides[:1]))
            views["loss after another slide"] = [row | {"slide": other[row["slide"]]} for row in self.val]
        metrics = {}
        for name, rows in views.items():
            loss, labelled, *_ = self.losses(rows, learn=False)
            metrics[name] = loss / max(1, labelled)
        return metrics

    def write_result(self, folder, weights):
        write_text(folder / "config.json", self.cfg.to_json())
        weights = {name: x.to(self.saved_dtype) for name, x in weights.items()}
        wsi_llava.write_tensors(folder / "model.safetensors", weights)


# ---- The loop ----


def pick_recipe(stage, args, meta):
    """The preset's recipe, with the user's flags on top."""
    flags = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe)}
    given = {name: value for name, value in flags.items() if value is not None}
    if stage in args.skip_stage:
        given["epochs"] = 0
    return dataclasses.replace(RECIPES[args.preset or meta["preset"]][stage], **given)


def schedule(step, steps, warmup):
    """Linear warmup, then half a cosine to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, steps - rising))


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C, and the SIGTERM of a job's time limit, end a run between two steps: the list then fills. A
    second Ctrl-C ends it at once; a second SIGTERM, as torchrun and Slurm send together, does not."""
    asked = []

    def ask(number, frame):
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        if not asked:
            tqdm.write("Finishing this step, then saving; a second Ctrl-C stops at once.")
        asked.append(number)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def alone_in(folder):
    """Refuses a second run in a folder; sweeps up what a killed one had half written. Rank 0 only."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".claims", "ab") as claims:
        busy = f"{folder}: another run is training here; wait for it, or name another --out"
        check(RANK or prepare.claim(claims, "training"), busy)
        for path in folder.glob(".*.part") if RANK == 0 else ():
            path.unlink(missing_ok=True)
        yield


FLAGS_OF_A_RUN = ("seed", "dtype", "val", "full", "no_slide_encoder", "no_image", "max_tiles")
NOT_OF_A_RUN = ("micro_batch", "checkpointing", "val_rows")  # they change the last bits alone, or nothing


def identity(stage, args, recipe, task, steps):
    """What makes a run the one that it is: resumed otherwise, it would be neither."""
    run = {"stage": stage, "steps": steps} | dataclasses.asdict(recipe)
    run |= {name: getattr(args, name) for name in FLAGS_OF_A_RUN}
    run["the training rows"] = hashlib.sha256(json.dumps(task.train).encode()).hexdigest()[:16]
    run["what it started from"] = task.start
    return {what: str(value) for what, value in run.items() if what not in NOT_OF_A_RUN}


def resume(path, run, model, optimizer):
    """Loads what an interrupted run saved -> (steps done, log)."""
    with reading(path, "damaged; leave --resume out to start the stage anew"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        old, step, log = state["run"], state["step"], state["log"]
        other = [f"{what} {old.get(what)}, not {run[what]}" for what in run if old.get(what) != run[what]]
        check(not other, f"{path} belongs to another run: {'; '.join(other[:3])}; leave --resume out")
        options = StateDictOptions(full_state_dict=True, strict=False)  # the frozen weights are not in it
        states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(model, optimizer, **states, options=options)
    say(f"Resuming at step {step} of {run['steps']}.")
    return step, log


def save(folder, run, task, step, optimizer, log):
    """Writes, after the last step, the stage's result; then what --resume needs: a state that says "done" has
    its result beside it, whatever a kill left. Killed before, a resumed run does the last steps again."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, moments = get_state_dict(task.model, optimizer, options=options)  # sharded or not; all take part
    finite = all(x.isfinite().all() for x in weights.values())
    check(finite, f"{folder}: after step {step} the weights are not finite, and not saved; try a lower --lr")
    if RANK:
        return
    if step == int(run["steps"]):
        task.write_result(folder, weights)
    with replacing(folder / "train_state.pt") as path:
        torch.save({"run": run, "step": step, "model": weights, "optimizer": moments, "log": log}, path)


def draw_curves(path, log, width=520, height=300):
    """The training loss (line) and the validation loss (dots) as an SVG."""
    top, steps = max(max(entry["loss"], entry.get("val_loss", 0)) for entry in log), log[-1]["step"]

    def at(entry, loss):
        return f"{width * entry['step'] / steps:.1f} {height - (height - 30) * loss / max(top, 1e-9):.1f}"

    line = " ".join(at(entry, entry["loss"]) for entry in log)
    dots = "".join(f"M{at(entry, entry['val_loss'])}h0" for entry in log if "val_loss" in entry)
    told = f"loss, 0 to {top:.2f}, in {steps} steps: training (line), validation (dots)"
    text = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" style="background:#fff">
        <text x="20" y="16">{told}</text> <polyline points="{line}" fill="none" stroke="#1f5fb4"/>
        <path d="{dots}" stroke="#d65a1e" stroke-width="6" stroke-linecap="round"/></svg>\n"""
    write_text(path, text)


def write_log(folder, log, draw):
    """Adds the last entry to log.jsonl, and draws the curves."""
    if RANK == 0:
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps(log[-1]) + "\n")
        if draw:
            draw_curves(folder / "loss.svg", log)


def say_start(stage, args, task, steps, batches):
    """What will be trained, on what, for how long."""
    rows, slides, val = len(task.train), len(slides_in(task.train)), len(task.val)
    shares = ", each with a share of the weights" if task.sharded else ""
    say(f"Stage {stage}, {TITLES[stage]}, on {args.device} in {args.dtype}, processes: {WORLD}{shares}")
    for group in task.groups:
        say(f"  trains  {group['name']}, {sum(p.numel() for p in group['params']):,} (lr {group['peak']:g})")
    say(f"  data    {rows:,} rows of {slides:,} slides, {val:,} more to validate on")
    say(f"  plan    {steps:,} steps, {batches:,} an epoch, of {rows / batches:.0f} rows each")


def run_stage(stage, args, folder, stop):
    """The loop. stop: a list that fills when the run is asked to end."""
    # What is trained, on what, and for how long.
    torch.manual_seed(args.seed)
    meta = wsi_llava.read_meta(args.data)
    recipe = pick_recipe(stage, args, meta)
    task = (Alignment if stage == 1 else Conversation)(stage, args, recipe, meta)
    batches, steps = size_of_run(stage, recipe, len(task.train))
    optimizer = torch.optim.AdamW(task.groups, betas=(0.9, task.beta2), weight_decay=recipe.weight_decay)

    # Where an interrupted run saved last, or from the start, in a folder that is cleared first.
    run, step, log = identity(stage, args, recipe, task, steps), 0, []
    if args.resume and (folder / "train_state.pt").exists():
        step, log = resume(folder / "train_state.pt", run, task.model, optimizer)
    elif RANK == 0:  # the state first: at every instant the folder holds a whole run's result, or no state
        for name in ("train_state.pt", "model.safetensors", "slide_encoder.safetensors"):
            (folder / name).unlink(missing_ok=True)
    if RANK == 0:
        write_text(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    say_start(stage, args, task, steps, batches)
    params = list(itertools.chain(*(group["params"] for group in task.groups)))
    task.model.train()
    with tqdm(total=steps, initial=step, desc=f"stage {stage}", unit="step", disable=RANK > 0) as bar:
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
            norm = torch.nn.utils.clip_grad_norm_(params, recipe.clip or math.inf)
            norm = float(norm.full_tensor() if task.sharded else norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()

            # What there is to say of the step; now and then also the losses on what is held out.
            entry = {"step": step, "loss": round(loss, 5), "lr": optimizer.param_groups[-1]["lr"]}
            entry |= {"grad_norm": round(norm, 4), "tokens_per_s": round(tokens / (time.time() - started))}
            due = step == steps or step % (args.eval_every or max(1, steps // 8)) == 0
            if due:
                task.model.eval()
                entry |= {f"val_{name}": round(value, 5) for name, value in task.validate().items()}
                task.model.train()
            ids = ", ".join(task.train[i]["id"] for i in batch)
            ruined = f"stage {stage}: {entry} is not finite; try a lower --lr; the batch: {ids}"
            check(all(map(math.isfinite, entry.values())), ruined)
            log.append(entry)
            write_log(folder, log, due)
            if due or step % args.log_every == 0:
                told = " ".join(f"{name} {value:.5g}" for name, value in entry.items() if name != "step")
                say(f"stage {stage} step {step}/{steps} {told}")

            # A state to resume from. Asked to stop, all processes stop after the same step.
            stopping = any(gather(bool(stop)))
            if (due or stopping) and step < steps:
                save(folder, run, task, step, optimizer, log)
            check(step == steps or not stopping, f"interrupted after step {step} of {steps}; see --resume")
    save(folder, run, task, step, optimizer, log)
    cut = f"; {task.cut:,} rows were longer than --max-length, and cut" if task.cut else ""
    say(f"Stage {stage} is done: {folder}/model.safetensors; losses in log.jsonl and loss.svg{cut}.")


# ---- Out again, and the demo ----


def export(args):
    """out/stage3 -> a Hugging Face folder: the language model, its adapters merged, and its tokenizer; beside
    them the projector and the slide encoder."""
    folder = args.export
    check(not (folder / "config.json").exists(), f"{folder}: holds a model already; name a new folder")
    wsi_llava.trained_stage(args, 3)  # without it there is nothing of the user's own to export
    meta = wsi_llava.read_meta(args.data)
    model, tokenizer = wsi_llava.load_model(args, meta, 3)
    ablation = "has no slide encoder, which no published layout can say"
    check(not model.cfg.no_slide_encoder, f"{args.out}/stage3 {ablation}")
    folder.mkdir(parents=True, exist_ok=True)
    base, _ = wsi_llava.pick_llm(args, meta)
    for path in {tokenizer.path, *base.glob("tokenizer*"), *base.glob("special_tokens_map.json")}:
        with replacing(folder / path.name) as temporary:
            temporary.write_bytes(path.read_bytes())
    config = folder / "tokenizer_config.json"
    if config.exists():  # the base's chat template is not the prompt of training
        kept = wsi_llava.read_json(config, "copy it again") | {"chat_template": None}
        write_text(config, json.dumps(kept, indent=2))
    encoder, file = model.slide_encoder, folder / "slide_encoder.safetensors"
    if encoder:
        wsi_llava.write_tensors(file, encoder.state_dict(), {"config": encoder.cfg.to_json()})
    wsi_llava.save_llama(model.llama, folder, tokenizer, model.mm_projector)  # its config.json comes last
    say(f"Done, without a chat template: python sample.py --llm {folder} --slide-encoder {file} --out new")


def show(script, *flags):
    """Prints a command as a user types it; runs it -> seconds."""
    began, flags = time.time(), list(map(str, flags))
    say(f"\n$ python {script} {shlex.join(flags)}")
    status = subprocess.call([sys.executable, str(Path(__file__).with_name(script)), *flags])
    check(status == 0, f"{script} ended with status {status}; see above")
    return time.time() - began


def demo(args, given):
    """--demo: from slides to answers, and a picture of where one is from. given: the flags beside --demo."""
    where, defaults = [], parse([])
    for name in ("data", "out", "device", "dtype", "seed", "workers"):
        if getattr(args, name) != getattr(defaults, name):
            where += [f"--{name}", getattr(args, name)]
    took = {"slides": show("prepare.py", "--demo", args.demo, *where)}
    for stage in (1, 2, 3):
        took[f"stage {stage}"] = show("train.py", "--stage", stage, "--log-every", 20, *given)
    questions, answers = args.data / "qa" / "test.jsonl", args.out / "test.jsonl"
    asked = ("--qa", questions, "--baselines", "--predictions", answers, "--evaluate", answers)
    took["answers"] = show("sample.py", *asked, "--max-new-tokens", 96, *where)
    focus = [row for row in prepare.read_qa(questions) if row["task"] == "focus"]
    row = next(row for row in focus if row["conversations"][1]["value"].startswith("Yes"))
    question = wsi_llava.without_image(row["conversations"][0]["value"])
    heatmap = ("--heatmap", args.out / "heatmap.png")
    took["heatmap"] = show("sample.py", "--slide", row["slide"], "--ask", question, *heatmap, *where)
    parts = ", ".join(f"{what} {seconds:.0f}" for what, seconds in took.items())
    say(f"\nTook {sum(took.values()):.0f} s: {parts}.")


# ---- Flags, and what they start ----


def add_recipe_flags(parser):
    """A flag for each field of Recipe; its help ends in the recipes' values."""
    about = "In brackets: the defaults of stages 1, 2, 3, where they differ; 13b has those of 7b."
    add = parser.group("the recipe", about)
    for f in dataclasses.fields(Recipe):
        text = []
        for preset in ("7b", "demo"):
            values = [str(getattr(recipe, f.name)) for recipe in RECIPES[preset].values()]
            text.append(f"{preset}: {', '.join(values if len(set(values)) > 1 else values[:1])}")
        least = 1 if f.type is int and f.default != 0 else 0
        extra = {"type": f.metadata["kind"] or at_least(least, f.type, 1e38), "metavar": "X"}
        if f.type is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        help = f"{f.metadata['help']} ({'; '.join(text)})".replace("%", "%%")
        add(f"--{f.name.replace('_', '-')}", help, **extra)


def parse(argv=None):
    parser = wsi_llava.Parser(__doc__)
    count, yes = at_least(1), {"action": "store_true"}
    add = parser.group("what to do")
    add("--stage", "the stage to train", type=int, choices=[1, 2, 3])
    add("--demo", "all of it on N toy slides (400)", metavar="N", nargs="?", const=400, type=at_least(5))
    add("--export", "write out/stage3 for transformers", metavar="DIR", type=Path)
    add("--resume", "go on where an interrupted run saved last", **yes)
    add = parser.group("what is trained, and on what")
    add("--full", "stage 3 trains the whole language model, no adapters; with --lr 2e-5", **yes)
    add("--from-scratch", "stage 1 starts from a random slide encoder", **yes)
    add("--skip-missing", "leave out questions about slides without features", **yes)
    add("--val", "share of slides to validate on (default: 0.05)", type=at_least(0, float, 0.9), default=0.05)
    add("--log-every", "steps between lines on the screen (default: 1)", type=count, default=1)
    add("--eval-every", "steps between validations, saved states (default: an eighth of all)", type=count)
    add = parser.group("ablations", "Train without a piece, with another --out; then sample.py --evaluate.")
    add("--skip-stage", "do not train these", type=int, choices=[1, 2], nargs="*", default=[])
    add("--no-slide-encoder", "tile features go straight to the pool (stages 2 and 3)", **yes)
    add("--max-tiles", "so many of a slide's tiles, at random (0: all)", type=at_least(0), default=0)
    add("--no-image", "stage 3: questions without the slide", **yes)
    add_recipe_flags(parser)
    wsi_llava.add_weights_flags(parser)
    wsi_llava.add_shared_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    check(args.stage or args.export or args.demo, "nothing to do: give --stage, --export or --demo")
    if args.demo:
        given = shlex.join(sys.argv[1:] if argv is None else argv)
        return demo(args, shlex.split(re.sub(r"--demo\b[ =]?\d*", "", given)))
    join_processes(args)
    if args.export:
        return export(args)
    if wsi_llava.read_meta(args.data)["preset"] == "demo" and not args.llm:
        stand_in(args)
    folder = args.out / f"stage{args.stage}"
    with alone_in(folder), stop_signals() as stop:
        run_stage(args.stage, args, folder, stop)
    if dist.is_initialized():
        dist.destroy_process_group()  # else gloo's threads free their tensors while Python is shutting down


if __name__ == "__main__":
    wsi_llava.run(main)
