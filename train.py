"""Trains WSI-LLaVA in the paper's three stages, each on what the one before it left.

    python train.py --stage 1   WSI-text alignment: slides meet their reports in one space (trains the slide encoder)
    python train.py --stage 2   feature space alignment: slide -> report (trains the projector)
    python train.py --stage 3   instruction tuning on all tasks (trains the projector, and the LLM by LoRA or --full)
    python train.py --demo      all of it on a cohort of toy slides, then questions about slides it has not seen

Reads data/ (made by prepare.py); writes out/stageN: model.safetensors (what the stage trained), config.json,
train_state.pt (to resume from), log.jsonl and loss.png. Several GPUs: torchrun --nproc-per-node 8 train.py ...
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    IMAGE_TOKEN,
    PRESETS,
    UserError,
    at_least,
    check,
    read_features,
    read_visual_tokens,
    replacing,
    without_image,
)


def setting(help, **default):
    """A field of Recipe; `help` is what --help says of its flag."""
    return dataclasses.field(metadata={"help": help}, **default)


@dataclass
class Recipe:
    """Hyperparameters of one stage. Every field is also a flag, which overrides it."""

    lr: float = setting("the learning rate at its highest, after the warmup")
    batch_size: int = setting("rows of the dataset a step, of all processes together")
    epochs: float = setting("how often every row is seen")
    warmup: float = setting("the share of the steps in which the learning rate rises", default=0.03)
    weight_decay: float = setting("AdamW's", default=0.0)
    projector_lr: float = setting("stage 3: the projector's own learning rate (0: --lr)", default=0.0)
    full_lr: float = setting("stage 3 with --full: takes the place of --lr (0: it does not)", default=0.0)
    lora_rank: int = setting("stage 3: rank of the adapters, the updates to the LLM's matrices", default=0)
    lora_alpha: float = setting("stage 3: the adapters' updates are scaled by alpha / rank", default=0.0)
    lora_dropout: float = setting("stage 3: dropout of what enters the adapters", default=0.0)
    lora_target: str = setting(
        "stage 3: which of the decoder's linear layers get adapters, a pattern; q_proj|v_proj is LoRA's own choice",
        default=".*",
    )
    micro_batch: int = setting(
        "stages 2 and 3: rows that go through the model at once; their gradients add up to the batch's", default=8
    )
    max_length: int = setting(
        "stages 2 and 3: positions, text and visual tokens together; longer rows are cut, and counted", default=2048
    )
    checkpointing: bool = setting(
        "recompute activations in the backward pass: a third more time, a fraction of the memory", default=True
    )


RECIPES = {  # the values of LLaVA-1.5 and the paper where they say
    "7b": {
        1: Recipe(1e-4, 64, 20, warmup=0.05, weight_decay=0.05),
        2: Recipe(1e-3, 256, 1),
        3: Recipe(2e-4, 128, 3, projector_lr=2e-5, full_lr=2e-5, lora_rank=128, lora_alpha=256, lora_dropout=0.05),
    },
    "demo": {
        1: Recipe(1e-3, 60, 34, warmup=0.05, weight_decay=0.05, checkpointing=False),
        2: Recipe(2e-3, 32, 4, micro_batch=32, checkpointing=False),
        3: Recipe(2e-3, 48, 3, projector_lr=1e-3, lora_rank=16, lora_alpha=32, micro_batch=24, checkpointing=False),
    },
}
RECIPES["13b"] = RECIPES["7b"]
TITLES = {1: "WSI-text alignment", 2: "feature space alignment", 3: "instruction tuning"}
TILES_AT_ONCE = 4096  # stage 1: short slides go through the slide encoder together, up to so many tiles


# --------------------------------------------------------------------------------------------------------------------
# Several processes: torchrun starts them, each takes its share of every batch
# --------------------------------------------------------------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(parts):
    """Of a list that all processes hold, this one's share."""
    return parts[rank() :: world()]


def all_sum(x):
    """The sum of a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def join_processes(args):
    """Joins the processes that torchrun started, one GPU each; does nothing without torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    local = int(os.environ["LOCAL_RANK"])
    if args.device == "auto" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"torchrun started more processes than this machine has GPUs ({torch.cuda.device_count()})")
        torch.cuda.set_device(local)
        args.device = f"cuda:{local}"
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")


def say(*text):
    """Prints, above the progress bar; of several processes, one speaks."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, text)))
        sys.stdout.flush()  # line by line also into a file or a pipe


# --------------------------------------------------------------------------------------------------------------------
# Data: rows of the dataset, the samples made of them, the micro-batches of a step
#
# Words, here and in the stages below: a row is a line of data/qa, a sample what the model takes of it. `parts` are a
# batch's micro-batches over all processes, each a list of indices of rows; `micro` are the samples of this process's.
# --------------------------------------------------------------------------------------------------------------------


class Rows:
    """Rows of data/qa/<split>.jsonl. Of each, `index` keeps where it starts, its slide, task, length in bytes and
    number of tiles; the row itself is read when it is asked for. So 175,000 questions open in seconds.
    """

    def __init__(self, path, index):
        self.path, self.index = path, index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        with open(self.path, "rb") as file:
            file.seek(self.index[i]["offset"])
            return json.loads(file.readline())

    def where(self, keep):
        """The rows whose entry in the index passes keep(entry)."""
        return Rows(self.path, [entry for entry in self.index if keep(entry)])

    def slides(self):
        return sorted({entry["slide"] for entry in self.index})


def load_rows(data, split, skip_missing=False, tokens=False):
    """data/qa/<split>.jsonl -> Rows, whose slides all have features (tokens: or imported visual tokens).

    Raises UserError where some have none.
    """
    path = data / "qa" / f"{split}.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such file; run python prepare.py --qa FILE... first")
    index, offset = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                entry = {"offset": offset, "slide": row["slide"], "task": row["task"], "length": len(line)}
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}: not a row ({error}); run python prepare.py --qa again"
                ) from None
            index.append(entry)
            offset += len(line)
    rows = Rows(path, index)
    have = {p.stem for p in (data / "features").glob("*.safetensors")} & set(rows.slides())
    tiles = {slide: len(read_features(data, slide, coordinates=not tokens)[1]) for slide in have}
    if tokens and wsi_llava.read_meta(data)["encoder"]["source"] == wsi_llava.IMPORTED_TOKENS:
        tiles |= {p.stem: 1 for p in (data / "visual_tokens").glob("*.safetensors")}
    missing = [slide for slide in rows.slides() if not tiles.get(slide)]  # without tissue there is nothing to learn
    if missing and not skip_missing:
        raise UserError(
            f"{path} names {len(missing)} slides without features in {data}/features, the first: {missing[0]}; "
            f"prepare them with python prepare.py --slides, or leave their questions out with --skip-missing"
        )
    rows = rows.where(lambda entry: tiles.get(entry["slide"]))
    if not len(rows):
        raise UserError(f"{path}: no question is about a slide that has features in {data}/features")
    for entry in rows.index:
        entry["tiles"] = tiles[entry["slide"]]
    return rows


def split_validation(rows, share):
    """Training and validation rows. By slide, and by its name alone: the same slides in every stage and every run."""

    def held(entry):
        return zlib.crc32(entry["slide"].encode()) % 1000 < share * 1000

    return rows.where(lambda entry: not held(entry)), rows.where(held)


def one_report_a_slide(rows):
    """Two reports of a slide in one batch would be each other's false negatives."""
    last = {entry["slide"]: entry for entry in rows.index if wsi_llava.is_report(entry)}
    return Rows(rows.path, list(last.values()))


class Pairs(torch.utils.data.Dataset):
    """Stage 1: slides and their reports. A sample: id, features [N,C_tile], coords [N,2], ids of the report."""

    def __init__(self, rows, args, tokenizer, longest):
        self.rows, self.data, self.max_tiles = rows, args.data, args.max_tiles
        self.tokenizer, self.longest = tokenizer, longest

    def __getitem__(self, i):
        row = self.rows[i]
        features, coords = read_features(self.data, row["slide"], self.max_tiles)
        ids = self.tokenizer.encode(row["conversations"][1]["value"])[: self.longest]
        return {"id": row["id"], "features": features, "coords": coords, "ids": ids}

    def parts(self, chosen):
        """A batch's micro-batches, over all processes: slides that are packed into one sequence of TILES_AT_ONCE tiles,
        or of fewer, so that every process has one."""
        tiles = {i: min(self.rows.index[i]["tiles"], self.max_tiles or math.inf) for i in chosen}
        at_once = min(TILES_AT_ONCE, math.ceil(sum(tiles.values()) / world()))
        parts, room = [], 0
        for i in chosen:
            if tiles[i] > room:
                parts.append([])
                room = at_once
            parts[-1].append(i)
            room -= tiles[i]
        return parts


class Conversations(torch.utils.data.Dataset):
    """Stages 2 and 3. A sample: id, ids and labels of the prompt, visual tokens, whether it was cut."""

    def __init__(self, rows, args, tokenizer, cfg, stage, recipe):
        self.rows, self.data, self.no_image = rows, args.data, args.no_image
        self.tokenizer, self.cfg, self.plain, self.micro_batch = tokenizer, cfg, stage == 2, recipe.micro_batch
        self.longest = min(recipe.max_length, cfg.llama.context)

    def __getitem__(self, i):
        row = self.rows[i]
        talk = wsi_llava.slide_first(row["conversations"], image=not self.no_image)
        ids, labels = self.tokenizer.encode_plain(talk[1]["value"]) if self.plain else self.tokenizer.encode_chat(talk)
        images = ids.count(IMAGE_TOKEN)
        room = self.longest - images * (self.cfg.n_visual_tokens - 1)
        visual = read_visual_tokens(self.data, row["slide"], self.cfg)[None].expand(images, -1, -1)
        sample = {"id": row["id"], "ids": ids[:room], "labels": labels[:room], "cut": len(ids) > room}
        return sample | {"visual": visual[: sample["ids"].count(IMAGE_TOKEN)]}

    def parts(self, chosen):
        """A batch's micro-batches, as many for each process: samples of like length together, so that little is padded.

        Sorted inside the batch only: batches stay random draws, which batches of one length, hence of one task, are
        not.
        """
        chosen = sorted(chosen, key=lambda i: self.rows.index[i]["length"])
        rounds = min(math.ceil(len(chosen) / (self.micro_batch * world())), len(chosen) // world())
        return [part.tolist() for part in np.array_split(chosen, rounds * world())]


def plan(dataset, batch_size, steps, first, seed):
    """Yields (step, its micro-batches: lists of indices). It follows from (seed, step), so resuming needs no state."""
    per_epoch = len(dataset.rows) // batch_size
    for step in range(first, steps):
        epoch, k = divmod(step, per_epoch)
        if step == first or k == 0:
            order = np.random.default_rng([*seed, epoch]).permutation(len(dataset.rows)).tolist()
        yield step, dataset.parts(order[k * batch_size : (k + 1) * batch_size])


def micro_batches(dataset, parts, args):
    """This process's samples, part by part. On a GPU, readers load ahead; on a CPU they'd take the model's cores."""
    workers = args.workers if args.device.type == "cuda" else 0
    return iter(torch.utils.data.DataLoader(dataset, batch_sampler=parts, num_workers=workers, collate_fn=list))


# --------------------------------------------------------------------------------------------------------------------
# The three stages. Each is a Task for the one training loop below.
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What the loop needs to know of a stage."""

    model: torch.nn.Module
    cfg: wsi_llava.WSILLaVAConfig
    groups: list  # optimizer groups: {"name", "params", "lr"}
    train: torch.utils.data.Dataset
    val: torch.utils.data.Dataset
    backward: object  # (parts of a batch, this process's micro-batches) -> Totals; adds to the parameters' gradients
    validate: object  # (parts, micro-batches) -> {metric: value}
    before_and_after: object = None  # () -> {metric: value}, shown before the first step and after the last
    sharded: bool = False  # FSDP: gradients are averaged over the processes already
    saved_dtype: torch.dtype = torch.float32  # of the weights in model.safetensors


@dataclass
class Totals:
    """What a batch came to, over all processes."""

    loss: float  # the sum that the gradients are of
    weight: float  # divide both by it: labelled tokens, or 1 where the loss is a mean already
    tokens: int  # positions (stage 1: tiles) that went through the model
    cut: int = 0  # samples that were longer than --max-length


class TextEncoder(torch.nn.Module):
    """Reports -> [B,C]: the LLM's (frozen) token embeddings [B,T,C_llm], a mask [B,T] (True: a token), a small
    bidirectional Transformer, mean over the tokens.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = torch.nn.Linear(cfg.in_width, cfg.width)
        self.pos_embed = torch.nn.Parameter(0.02 * torch.randn(1, cfg.max_length, cfg.width))
        self.blocks = torch.nn.ModuleList(wsi_llava.Block(cfg.width, cfg.heads, cfg.mlp_hidden, 1.0) for _ in range(cfg.depth))
        self.norm = torch.nn.LayerNorm(cfg.width, eps=1e-6)

    def forward(self, token_embeds, mask):
        _, T, C = token_embeds.shape
        # An LLM's embeddings are small, and differ in size from one LLM to the next: without the norm, the position
        # embedding drowns them.
        x = self.embed(F.layer_norm(token_embeds, (C,))) + self.pos_embed[:, :T]  # [B,T,C_llm] -> [B,T,C]
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])  # [B,1,1,T]: nobody looks at the padding
        x = self.norm(x) * mask.unsqueeze(-1)  # [B,T,C], zero at the padding
        return x.sum(1) / mask.sum(1, keepdim=True)  # [B,C] / [B,1]


class WSITextAlignment(torch.nn.Module):
    """Stage 1: slide encoder, text encoder, a linear head each to the shared space, and CLIP's temperature.

    A slide's embedding is the mean of its visual tokens, not the CLS: the tokens are what the language model reads
    later, and a loss on the CLS alone would leave their last layer untrained.
    """

    def __init__(self, cfg):
        super().__init__()
        self.n_visual_tokens = cfg.n_visual_tokens
        self.slide_encoder = wsi_llava.SlideEncoder(cfg.slide_encoder)
        self.text_encoder = TextEncoder(cfg.text_encoder)
        self.slide_head = torch.nn.Linear(cfg.slide_encoder.width, cfg.text_encoder.embed_width, bias=False)
        self.text_head = torch.nn.Linear(cfg.text_encoder.width, cfg.text_encoder.embed_width, bias=False)
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_slides(self, features, coords, lengths):
        """Packed features [sum of N,C_tile], coords [sum of N,2] and the N of each slide -> [S,E] of unit length."""
        tokens = self.slide_encoder.visual_tokens(features, coords, self.n_visual_tokens, lengths)  # [S,V,C]
        return F.normalize(self.slide_head(tokens.mean(1)), dim=-1)

    def embed_texts(self, token_embeds, mask):
        """token_embeds [B,T,C_llm], mask [B,T] -> [B,E] of unit length."""
        return F.normalize(self.text_head(self.text_encoder(token_embeds, mask)), dim=-1)

    def embed_words(self, ids, words):
        """ids: B lists of tokens; words: the LLM's token embeddings [vocab,C] -> [B,E] of unit length."""
        ids = [torch.tensor(row, device=words.device) for row in ids]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)  # [B,T]
        return self.embed_texts(F.embedding(ids.clamp(min=0), words).to(self.logit_scale.dtype), ids >= 0)

    def loss(self, slides, texts):
        """Symmetric InfoNCE over a batch of pairs [B,E]: each slide finds its report, each report its slide."""
        logits = self.logit_scale.exp().clamp(max=100) * slides @ texts.T  # [B slides,B texts]
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def token_embeddings(args, meta):
    """What stage 1 reads reports with: the LLM's token embeddings [vocab,C_llm], frozen, and its Tokenizer."""
    folder, tokenizer = wsi_llava.pick_llm(args, meta)
    words = wsi_llava.load_llama(folder).embed_tokens.weight.detach()
    return words.to(args.device, torch.float32), tokenizer


def load_alignment(args, meta):
    """Stage 1's model -> (its config, WSITextAlignment, the LLM's token embeddings [vocab,C_llm], Tokenizer)."""
    path = wsi_llava.stage_weights(args, 1)
    cfg = wsi_llava.load_config(path.parent)
    wsi_llava.check_tile_encoder(cfg.slide_encoder, meta, path.parent)
    with torch.device("meta"):
        model = WSITextAlignment(cfg)
    model = wsi_llava.load_strict(model, wsi_llava.read_tensors(path), path).to(args.device).eval()
    return cfg, model, *token_embeddings(args, meta)


def autocast(args):
    """bfloat16 is for the products. What is trained stays in float32: updates are too small for bfloat16's 8 bits."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == torch.bfloat16)


def embed(args, model, words, samples):
    """Samples of Pairs -> embeddings of their slides and of their reports, [B,E] each."""
    dtype = model.logit_scale.dtype  # float32
    features = torch.cat([s["features"] for s in samples]).to(args.device, dtype)  # [sum of N,C_tile]
    coords = torch.cat([s["coords"] for s in samples]).to(args.device)
    with autocast(args):
        slides = model.embed_slides(features, coords, [len(s["coords"]) for s in samples])
        texts = model.embed_words([s["ids"] for s in samples], words)
    return slides.to(dtype), texts.to(dtype)


def places(parts):
    """This process's parts of a batch -> (number, its rows in the whole batch)."""
    start = 0
    for k, part in enumerate(parts):
        if k % world() == rank():
            yield k, slice(start, start + len(part))
        start += len(part)


def embed_batch(args, model, words, parts, micro, seed=0):
    """The whole batch's embeddings, [n,E] twice, on every process: each fills its own rows, the sum gathers them."""
    n, width = sum(map(len, parts)), model.slide_head.out_features
    slides, texts = torch.zeros(2, n, width, device=args.device, dtype=model.logit_scale.dtype)
    for (k, place), samples in zip(places(parts), micro):
        torch.manual_seed(seed + k)
        slides[place], texts[place] = embed(args, model, words, samples)
    return all_sum(slides), all_sum(texts)


def recall(similarity):
    """[n,n] slide-report similarities -> recall@1, 5 and 10, slide to report and back."""
    own = similarity.diagonal()
    ranks = {"slide->report": (similarity > own[:, None]).sum(1), "report->slide": (similarity > own).sum(0)}
    return {f"{name} R@{k}": (r < k).float().mean().item() for name, r in ranks.items() for k in (1, 5, 10)}


def stage1(args, recipe, meta):
    """WSI-text alignment by symmetric InfoNCE with the gradient-cache method (arXiv 2101.06983).

    A contrastive loss needs a large batch, and slides are long. So: embed everything without grad; take the loss's
    gradient with respect to the embeddings; embed again, micro-batch by micro-batch, and carry that gradient back.
    Memory is one micro-batch's, and the gradient is exactly that of the whole batch. Several processes embed a share
    each.
    """
    if args.no_slide_encoder:
        raise UserError("--no-slide-encoder: stage 1 trains the slide encoder; start with --stage 2")
    words, tokenizer = token_embeddings(args, meta)  # [vocab,C_llm]
    cfg = wsi_llava.WSILLaVAConfig.from_dict(PRESETS[args.preset or meta["preset"]].to_dict())
    cfg.max_tiles = args.max_tiles
    slide_encoder = None
    path = args.slide_encoder or wsi_llava.WEIGHTS / "gigapath" / "slide_encoder.pth"
    if args.slide_encoder or (meta["preset"] != "demo" and path.exists()):
        slide_encoder = wsi_llava.load_slide_encoder(path)
        cfg.slide_encoder = slide_encoder.cfg
    elif meta["preset"] != "demo" and not args.from_scratch:
        raise UserError(f"no slide encoder: {path} is missing; name it with --slide-encoder, or train --from-scratch")
    wsi_llava.check_tile_encoder(cfg.slide_encoder, meta, path if slide_encoder else f"--preset {meta['preset']}")
    cfg.slide_encoder.trained_on = meta["encoder"]["fingerprint"]
    cfg.text_encoder.in_width = words.shape[1]
    model = WSITextAlignment(cfg)
    if slide_encoder is not None:
        model.slide_encoder = slide_encoder
    model.to(args.device, torch.float32).slide_encoder.checkpointing = recipe.checkpointing
    rows = one_report_a_slide(load_rows(args.data, "train", args.skip_missing))
    train, val = (Pairs(r, args, tokenizer, cfg.text_encoder.max_length) for r in split_validation(rows, args.val))
    if slide_encoder is None:
        some = [train[i]["features"] for i in range(min(200, len(train.rows)))]
        model.slide_encoder.standardize_inputs(torch.cat(some).to(args.device))

    def backward(parts, micro):
        seed, tiles = torch.initial_seed(), sum(train.rows.index[i]["tiles"] for part in parts for i in part)
        if len(parts) == 1 and world() == 1:  # all fits at once
            loss = model.loss(*embed(args, model, words, next(micro)))
            loss.backward()
            return Totals(loss.item(), 1, tiles)
        with torch.no_grad():
            slides, texts = embed_batch(args, model, words, parts, micro, seed)
        slides.requires_grad_(), texts.requires_grad_()
        loss = model.loss(slides, texts)
        loss.backward()
        if rank():
            model.logit_scale.grad.zero_()  # every process has all of it; the sum over them is to hold it once
        for k, place in places(parts):
            samples = [train[i] for i in parts[k]]  # read again, not held: memory stays one micro-batch's
            torch.manual_seed(seed + k)  # the second pass must draw the dropout of the first
            torch.autograd.backward(embed(args, model, words, samples), (slides.grad[place], texts.grad[place]))
        return Totals(loss.item(), 1, tiles)

    @torch.no_grad()
    def validate(parts, micro):
        slides, texts = embed_batch(args, model, words, parts, micro)
        return {"loss": model.loss(slides, texts).item(), **recall(slides @ texts.T)}

    groups = [{"name": "slide and text encoder", "params": list(model.parameters()), "lr": recipe.lr}]
    return Task(model, cfg, groups, train, val, backward, validate)


@torch.no_grad()
def alignment(args, model, samples):
    """Whether projected slides are nearer to their own reports than to others' -> {what: value}, in two measures:

    as vectors (mean over the visual tokens, mean over the embedded words, both less their mean over the slides;
    cosine), and as the language model sees it (its loss on a report, after the report's own slide and after another's).
    """
    slides = torch.stack([model.project(s["visual"][0].to(model.device)).float().mean(0) for s in samples])
    words = [[i for i, label in zip(s["ids"], s["labels"]) if label >= 0] for s in samples]
    texts = [model.llama.embed_tokens(torch.tensor(ids, device=model.device)).float().mean(0) for ids in words]
    slides, texts = (F.normalize(x - x.mean(0), dim=-1) for x in (slides, torch.stack(texts)))
    cosine = slides @ texts.T
    own, n = cosine.diagonal(), len(samples)
    others = (cosine.sum() - own.sum()) / max(1, n * (n - 1))
    losses = []
    for shift in (0, 1):
        with autocast(args):
            found = [model([samples[i - shift]["visual"]], [s["ids"]], [s["labels"]]) for i, s in enumerate(samples)]
        losses.append(torch.stack(found).mean().item())
    return {
        "cosine to the own report": own.mean().item(),
        "to others": others.item(),
        "loss of a report after its own slide": losses[0],
        "after another": losses[1],
    }


# --------------------------------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------------------------------


def model_to_train(args, recipe, meta, stage):
    """The model of stage 2 or 3 on its device, frozen but for what the stage trains -> (WSILLaVA, Tokenizer).

    What is trained is kept in float32; of a language model trained whole, that is all of it.
    """
    full = stage == 3 and args.full
    model, tokenizer = wsi_llava.load_model(args, meta, stage - 1, torch.float32 if full else args.dtype)
    cfg = model.cfg
    model.requires_grad_(False)
    if full:
        model.llama.requires_grad_(True)
    elif stage == 3:
        cfg.lora_rank, cfg.lora_alpha, cfg.lora_target = recipe.lora_rank, recipe.lora_alpha, recipe.lora_target
        wsi_llava.add_lora(model.llama, cfg.lora_rank, cfg.lora_alpha, cfg.lora_target, recipe.lora_dropout)
    model.mm_projector.requires_grad_(True)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    model.to(args.device).llama.checkpointing = recipe.checkpointing
    return model, tokenizer


def write_visual_tokens(args, model, slides):
    """Runs the frozen slide encoder once over every slide that lacks its visual tokens, each process over a share. ->
    {slide: why it has none}, on every process."""
    with autocast(args):
        written, problems = wsi_llava.cache_visual_tokens(
            model, args.data, mine(slides), lambda x: tqdm(x, desc="visual tokens", unit="slide", disable=rank() > 0)
        )
    written = int(all_sum(torch.tensor(written, device=args.device)))  # also waits for the others
    if world() > 1:
        shares = [None] * world()
        dist.all_gather_object(shares, problems)
        problems = {slide: why for share in shares for slide, why in share.items()}
    there = len(slides) - written - len(problems)
    say(f"Visual tokens of {len(slides)} slides: {written} computed, {there} were there.")
    return problems


def shard(model, dtype):
    """FSDP2: each process keeps a share of every layer's weights, gradients and optimizer state."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model.slide_encoder = None  # it has done its work
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.llama.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def language_task(args, recipe, meta, stage):
    """Stages 2 and 3: next-token loss on the answers, given the slide's visual tokens."""
    model, tokenizer = model_to_train(args, recipe, meta, stage)
    cfg, full = model.cfg, stage == 3 and args.full
    rows = load_rows(args.data, "train", args.skip_missing, tokens=True)
    if stage == 2:
        rows = rows.where(wsi_llava.is_report)
        if not len(rows):
            raise UserError(
                f"{args.data}/qa/train.jsonl holds no reports (tasks with 'report' in the name): stage 2 needs them"
            )
    problems = write_visual_tokens(args, model, rows.slides())
    if problems:
        say(f"Left out, {len(problems)} slides that cannot be read, the first: {next(iter(problems.values()))}")
        rows = rows.where(lambda entry: entry["slide"] not in problems)
        check(len(rows), f"{args.data}/visual_tokens: no slide is left to train on")
    train, val = (Conversations(r, args, tokenizer, cfg, stage, recipe) for r in split_validation(rows, args.val))
    if full and world() > 1:
        shard(model, args.dtype)

    def run(samples):
        """-> (summed loss, labelled tokens, positions, cut samples)"""
        ids, labels = [s["ids"] for s in samples], [s["labels"] for s in samples]
        with autocast(args):
            loss = model([s["visual"].to(args.device) for s in samples], ids, labels, reduction="sum")
        labelled = sum(l >= 0 for x in labels for l in x[1:])
        positions = sum(len(s["ids"]) + len(s["visual"]) * (cfg.n_visual_tokens - 1) for s in samples)
        return loss, labelled, positions, sum(s["cut"] for s in samples)

    def totals(parts, micro, work):
        sums = torch.zeros(4, dtype=torch.float64, device=args.device)
        seed = torch.initial_seed()
        for k, samples in enumerate(micro):
            torch.manual_seed(seed + k * world() + rank())  # no two processes draw the same dropout
            loss, *counts = run(samples)
            work(loss)
            sums += torch.tensor([loss.item(), *counts], dtype=torch.float64, device=args.device)
        loss, labelled, positions, cut = all_sum(sums).tolist()
        return Totals(loss, max(1, labelled), int(positions), int(cut))

    def backward(parts, micro):
        return totals(parts, micro, lambda loss: loss.backward())

    @torch.no_grad()
    def validate(parts, micro):
        found = totals(parts, micro, lambda loss: None)
        return {"loss": found.loss / found.weight}

    projector = list(model.mm_projector.parameters())
    lr = recipe.projector_lr if stage == 3 and recipe.projector_lr else recipe.lr
    groups = [{"name": "projector", "params": projector, "lr": lr}]
    if stage == 3:
        name = "language model" if full else f"LoRA adapters of rank {recipe.lora_rank}"
        params = [p for p in model.llama.parameters() if p.requires_grad]
        groups.append({"name": name, "params": params, "lr": recipe.lr})
    task = Task(model, cfg, groups, train, val, backward, validate, sharded=full and world() > 1)
    if full:
        task.saved_dtype = args.dtype  # 7B in float32 would be 27 GB
    if stage == 2 and not args.no_image:
        some = val if len(val.rows) > 1 else train
        task.before_and_after = lambda: alignment(args, model, [some[i] for i in range(min(256, len(some.rows)))])
    return task


def resume(path, run, model, optimizer):
    """Loads what an interrupted run saved, on any number of processes -> (steps done, log)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        saved_run, first, log = state["run"], state["step"], state["log"]
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged ({reason}); leave --resume out to start the stage anew") from None
    if saved_run != run:
        raise UserError(f"{path} belongs to another run ({saved_run}, not {run}); leave --resume out to start anew")
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )
    say(f"Resuming at step {first} of {run['steps']}.")
    return first, log


def summarize(stage, args, recipe, task, steps, batch_size, first, folder):
    """What will be trained, on what, for how long: timed on one micro-batch, whose gradients are thrown away."""
    trained = {id(p) for g in task.groups for p in g["params"]}
    parts = {}
    for name, p in task.model.named_parameters():
        if id(p) not in trained:
            part = name.split(".")[0]
            parts[part] = parts.get(part, 0) + p.numel()
    index = task.train.rows.index
    _, first_parts = next(plan(task.train, batch_size, 1, 0, [args.seed, stage]))
    rounds = math.ceil(len(first_parts) / world())
    task.model.train()
    started = time.time()
    task.backward(first_parts[: world()], micro_batches(task.train, mine(first_parts[: world()]), args))
    task.model.zero_grad(set_to_none=True)
    duration = datetime.timedelta(seconds=round((time.time() - started) * rounds * (steps - first)))
    lines = {
        "on": f"{args.device} in {str(args.dtype).removeprefix('torch.')}, {world()} process{'es' * (world() > 1)}",
        "trains": ", ".join(
            f"{g['name']} {sum(p.numel() for p in g['params']):,} (lr {g['lr']:g})" for g in task.groups
        ),
        "frozen": ", ".join(f"{name} {count:,}" for name, count in parts.items()) or "nothing",
        "data": f"{len(index):,} {'reports' if stage < 3 else 'questions'} of {len(task.train.rows.slides()):,} slides, "
        f"{len(task.val.rows):,} more of {len(task.val.rows.slides()):,} slides to validate on",
        "plan": f"{steps:,} steps of {batch_size} ({recipe.epochs:g} epochs), about {duration} by the first micro-batch",
        "writes": f"{folder}/: model.safetensors at the end, train_state.pt every {args.save_every} steps",
    }
    say(f"Stage {stage}, {TITLES[stage]}")
    for name, text in lines.items():
        say(f"  {name:8}{text}")


def show_alignment(task, when):
    """Prints, of the stages that have it, what before_and_after measures."""
    if task.before_and_after:
        found = task.before_and_after()
        say(f"alignment {when} training: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))


def gather_gradients(task, weight):
    """Sums the processes' gradients and divides by the batch's weight: DistributedDataParallel's work, done once after
    the last micro-batch, and free of its rule that all processes run the same number of backwards."""
    params = [p for g in task.groups for p in g["params"]]
    if world() > 1 and not task.sharded:
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for work in [dist.all_reduce(p.grad, async_op=True) for p in params]:
            work.wait()
    for p in params:
        if p.grad is not None:
            p.grad.mul_((world() if task.sharded else 1) / weight)  # FSDP takes the mean


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C, and the SIGTERM of a job's time limit, end a run between two steps: the list yielded then fills."""
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


def pick_recipe(stage, args, meta):
    """The preset's recipe for the stage, with the user's flags on top."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if getattr(args, f.name) is not None}
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


def draw_curves(path, logs):
    """Training loss (thin: every step; thick: smoothed) and validation loss (dots), one panel a stage, side by side."""
    width, height, left, top, bottom = 520, 360, 62, 40, 44
    picture = Image.new("RGB", (width * len(logs), height), "white")
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(16), ImageFont.load_default(12)
    for panel, (title, log) in enumerate(logs.items()):
        x0, x1, y0, y1 = panel * width + left, (panel + 1) * width - 18, height - bottom, top
        losses = np.array([entry["loss"] for entry in log])
        high = max([*losses, *[e["val_loss"] for e in log if "val_loss" in e]]) * 1.05 + 1e-9
        last = log[-1]["step"]

        def point(step, loss, x0=x0, x1=x1, y0=y0, y1=y1, last=last, high=high):
            return x0 + (x1 - x0) * step / last, y0 + (y1 - y0) * loss / high

        for i in range(5):
            y = y0 + (y1 - y0) * i / 4
            draw.line((x0, y, x1, y), fill=(226, 226, 226))
            draw.text((x0 - 8, y), f"{high * i / 4:.2f}", fill=(90, 90, 90), font=small, anchor="rm")
            x = x0 + (x1 - x0) * i / 4
            draw.text((x, y0 + 8), f"{last * i / 4:.0f}", fill=(90, 90, 90), font=small, anchor="ma")
        draw.text(((x0 + x1) / 2, height - 6), "step", fill=(90, 90, 90), font=small, anchor="mb")
        draw.text((x0, 10), f"{title}: loss", fill="black", font=font)
        draw.text((x1, 12), "training", fill=(31, 95, 180), font=small, anchor="ra")
        draw.text((x1 - 60, 12), "validation", fill=(214, 90, 30), font=small, anchor="ra")
        span = max(1, len(losses) // 25)
        smooth = np.convolve(np.pad(losses, (span - 1, 0), mode="edge"), np.ones(span) / span, "valid")
        for values, colour, thick in ((losses, (178, 202, 235), 1), (smooth, (31, 95, 180), 3)):
            line = [point(entry["step"], value) for entry, value in zip(log, values)]
            draw.line(line * (2 if len(line) == 1 else 1), fill=colour, width=thick)
        dots = [point(entry["step"], entry["val_loss"]) for entry in log if "val_loss" in entry]
        if len(dots) > 1:
            draw.line(dots, fill=(214, 90, 30), width=2)
        for x, y in dots:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(214, 90, 30))
    with replacing(path) as temporary:
        picture.save(temporary, "PNG")


def size_of_run(stage, recipe, n):
    """How many rows of n a batch has, and how many batches the run -> (batch_size, steps)."""
    if stage == 1 and n < 2:
        raise UserError(f"stage 1 contrasts slides with one another and needs at least 2 with a report; found {n}")
    batch_size = min(recipe.batch_size, n)
    if batch_size < world():
        raise UserError(
            f"a batch of {batch_size} is too small for {world()} processes; raise --batch-size or start fewer"
        )
    steps = round(recipe.epochs * (n // batch_size))
    return batch_size, max(1, steps) if recipe.epochs > 0 else steps


def save_stage(args, task, folder, run, step, optimizer, log):
    """Everything that the next stage or --resume needs, each file written aside and renamed."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, optimizer_state = get_state_dict(task.model, optimizer, options=options)  # sharded or not; all take part
    if rank():
        return
    state = {"run": run, "step": step, "model": weights, "optimizer": optimizer_state, "log": log}
    with replacing(folder / "train_state.pt") as path:
        torch.save(state, path)

    def write(path):
        wsi_llava.write_tensors(path, {name: x.to(task.saved_dtype) for name, x in weights.items()})

    best = folder / "best.safetensors"
    if args.keep == "best" and step and log[-1].get("val_loss") == min(e.get("val_loss", math.inf) for e in log):
        write(best)
    if step == run["steps"]:  # a stage's result appears when it is whole: the next stage takes no half-trained weights
        wsi_llava.write_text(folder / "config.json", task.cfg.to_json())
        if isinstance(task.model, WSITextAlignment):  # the form in which the later stages, and GigaPath's users, take it
            result = wsi_llava.read_tensors(best) if best.exists() else weights
            names = [name for name in result if name.startswith("slide_encoder.")]
            encoder = {name.removeprefix("slide_encoder."): result[name] for name in names}
            wsi_llava.save_slide_encoder(task.cfg.slide_encoder, encoder, folder / "slide_encoder.safetensors")
        if best.exists():
            os.replace(best, folder / "model.safetensors")
        else:
            write(folder / "model.safetensors")


def not_finite(stage, step, loss, norm, task, parts, folder, log_file):
    """The end of a run whose loss or gradient is not finite: its batch goes into the log -> the UserError to raise."""
    ids = [task.train.rows[i]["id"] for part in parts for i in part]
    log_file.write(json.dumps({"step": step, "loss": str(loss), "grad_norm": str(norm), "ids": ids}) + "\n")
    return UserError(
        f"stage {stage}, step {step}: the loss is {loss}, the norm of its gradient {norm}; the batch was "
        f"{', '.join(ids[:8])}{', ...' * (len(ids) > 8)} (all in {folder}/log.jsonl); "
        f"try a lower --lr or --dtype float32"
    )


def say_step(where, entry, seconds_left, device):
    """The line of a step, made to be grepped."""
    eta = datetime.timedelta(seconds=round(seconds_left))
    say(
        f"{where} loss {entry['loss']:.4f} lr {entry['lr']:.2e} grad_norm {entry['grad_norm']:.3f} tokens/s "
        f"{entry['tokens_per_s']:,.0f} eta {eta} memory {wsi_llava.peak_memory(device) / 1e9:.2f} GB"
    )


def train_stage(stage, args):
    """Trains a stage and writes out/stageN. Raises UserError where it cannot start, or was stopped, and has saved."""
    meta = wsi_llava.read_meta(args.data)
    recipe = pick_recipe(stage, args, meta)
    torch.manual_seed(args.seed)
    task = stage1(args, recipe, meta) if stage == 1 else language_task(args, recipe, meta, stage)
    model = task.model
    batch_size, steps = size_of_run(stage, recipe, len(task.train.rows))
    folder = args.out / f"stage{stage}"
    folder.mkdir(parents=True, exist_ok=True)
    beta2 = 0.98 if stage == 1 else 0.999
    optimizer = torch.optim.AdamW(task.groups, betas=(0.9, beta2), weight_decay=recipe.weight_decay)
    peaks = [group["lr"] for group in task.groups]
    run = {"steps": steps, "batch_size": batch_size, "items": len(task.train.rows), "seed": args.seed}
    first, log = 0, []
    if args.resume and (folder / "train_state.pt").exists():
        first, log = resume(folder / "train_state.pt", run, model, optimizer)
    summarize(stage, args, recipe, task, steps, batch_size, first, folder)
    validating = len(task.val.rows) >= max(world(), 2 if stage == 1 else 1)
    val_parts = task.val.parts(list(range(min(len(task.val.rows), args.val_rows)))) if validating else []
    eval_every = args.eval_every or max(1, steps // 8)
    if not first:
        for name in ("model.safetensors", "best.safetensors"):
            (folder / name).unlink(missing_ok=True) if rank() == 0 else None
        show_alignment(task, "before")
    log_file = open(folder / "log.jsonl" if rank() == 0 else os.devnull, "w")  # noqa: SIM115 (closed by the loop's with)
    log_file.writelines(json.dumps(entry) + "\n" for entry in log)
    batches = plan(task.train, batch_size, steps, first, [args.seed, stage])
    ahead = plan(task.train, batch_size, steps, first, [args.seed, stage])  # the same, for the readers to run ahead in
    loader = micro_batches(task.train, (part for _, parts in ahead for part in mine(parts)), args)
    bar = tqdm(total=steps, initial=first, desc=f"stage {stage}", unit="step", disable=rank() > 0)
    began, cut = time.time(), 0
    model.train()
    with log_file, bar, stop_signals() as asked:
        for step, parts in batches:
            started, done = time.time(), step + 1
            torch.manual_seed(args.seed * 1_000_003 + stage * 100_000_007 + step * 1009)
            height = schedule(step, steps, recipe.warmup)
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * height
            found = task.backward(parts, itertools.islice(loader, len(mine(parts))))
            gather_gradients(task, found.weight)
            norm = torch.nn.utils.clip_grad_norm_([p for g in task.groups for p in g["params"]], args.clip)
            norm = float(norm.full_tensor() if task.sharded else norm)
            loss = found.loss / found.weight
            if not math.isfinite(loss + norm):
                raise not_finite(stage, done, loss, norm, task, parts, folder, log_file)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            cut += found.cut
            entry = {"step": done, "loss": round(loss, 5), "lr": optimizer.param_groups[-1]["lr"]}
            entry |= {"grad_norm": round(norm, 4), "tokens_per_s": round(found.tokens / (time.time() - started), 1)}
            entry |= {"cut": found.cut} if found.cut else {}
            log.append(entry)
            where = f"stage {stage} step {done}/{steps}"
            if done % args.log_every == 0:
                say_step(where, entry, (time.time() - began) / (done - first) * (steps - done), args.device)
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}")

            last = done == steps
            evaluated = validating and (last or done % eval_every == 0)
            if evaluated:
                model.eval()
                metrics = task.validate(val_parts, micro_batches(task.val, mine(val_parts), args))
                model.train()
                entry |= {f"val_{name}": round(value, 5) for name, value in metrics.items()}
                say(f"{where} " + "  ".join(f"val {name} {value:.4g}" for name, value in metrics.items()))
            print(json.dumps(entry), file=log_file, flush=True)
            if rank() == 0 and (evaluated or last):
                draw_curves(folder / "loss.png", {f"stage {stage}, {TITLES[stage]}": log})

            stopping = all_sum(torch.tensor(float(bool(asked)), device=args.device)) > 0
            if last or stopping or done % args.save_every == 0 or (evaluated and args.keep == "best"):
                save_stage(args, task, folder, run, done, optimizer, log)
            if stopping and not last:
                raise UserError(f"interrupted after step {done} of {steps}, saved; --resume goes on from there")
    if not steps:
        save_stage(args, task, folder, run, 0, optimizer, log)
    show_alignment(task, "after")
    if cut:
        say(f"{cut} samples were longer than --max-length {recipe.max_length} and were cut.")
    say(f"Stage {stage} is done: {folder}/model.safetensors; curves in {folder}/loss.png.")
    all_sum(torch.zeros(1, device=args.device))  # nobody goes on before the files are there


# --------------------------------------------------------------------------------------------------------------------
# Out again: what the stages trained, in the layouts in which LLaVA's weights are published
# --------------------------------------------------------------------------------------------------------------------


def export(args):
    """out/stage3 -> a LLaVA folder: the language model with its adapters merged and the projector, or the adapters and
    the projector alone. Beside them the tokenizer, and the slide encoder, which LLaVA has no place for."""
    folder = args.export or args.export_adapter
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder to export to")
    wsi_llava.stage_weights(args, 3)  # without it there is nothing of the user's own to export
    model, tokenizer = wsi_llava.load_model(args, wsi_llava.read_meta(args.data), 3)
    base, _ = wsi_llava.pick_llm(args, wsi_llava.read_meta(args.data))
    if model.cfg.no_slide_encoder:
        raise UserError(f"{args.out}/stage3 is an ablation without slide encoder, which no published layout can say")
    if args.export_adapter and (args.lora or not model.cfg.lora_rank):
        reason = "its language model is --llm with --lora merged" if args.lora else "stage 3 trained no adapters"
        raise UserError(f"--export-adapter: {reason}; use --export, which writes the whole model")
    say(f"Exporting {args.out}/stage3 to {folder} in {str(args.dtype).removeprefix('torch.')} ...")
    folder.mkdir(parents=True, exist_ok=True)
    beside = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "chat_template*")
    for path in [tokenizer.path, *(path for pattern in beside for path in base.glob(pattern))]:
        shutil.copy(path, folder)
    encoder = model.slide_encoder
    wsi_llava.save_slide_encoder(encoder.cfg, encoder.state_dict(), folder / "slide_encoder.safetensors")
    if args.export:
        wsi_llava.save_llama(model.llama, folder, tokenizer, model.mm_projector, args.layout)
    else:
        wsi_llava.save_lora(model, folder, base, tokenizer, args.layout)
    llm = f"--llm {folder}" if args.export else f"--llm {base} --lora {folder}"
    say(
        f"Done. It answers where --out holds no stage 2 or 3: "
        f"python sample.py {llm} --slide-encoder {folder}/slide_encoder.safetensors --out new ..."
    )


# --------------------------------------------------------------------------------------------------------------------
# The demo: the three stages on the toy cohort, then questions about slides that it has never seen
# --------------------------------------------------------------------------------------------------------------------


def truth(row):
    """The true answer of a row of one question."""
    return row["conversations"][1]["value"]


def held_out(args):
    """-> the trained model, its tokenizer, {held-out slide: visual tokens [V,C]}, the short questions about these."""
    model, tokenizer = wsi_llava.load_model(args, wsi_llava.read_meta(args.data), 3)
    model.to(args.device)
    rows = load_rows(args.data, "test")
    slides = rows.slides()
    wsi_llava.cache_visual_tokens(model, args.data, slides)
    visual = {slide: read_visual_tokens(args.data, slide, model.cfg) for slide in slides}
    return model, tokenizer, visual, [row for row in rows if not wsi_llava.is_report(row) and row["task"] != "dialogue"]


def accuracies(rows, answers):
    """{kind of question: (share answered right, count)} of the demo's short questions, in the order of its tables."""
    right = {}
    for row, answer in zip(rows, answers):
        gives_away = row["task"] == "subtype"
        same = sample.same_answer(answer, truth(row))
        right.setdefault(f"{row['task']} ({'text gives it away' if gives_away else 'needs the slide'})", []).append(
            same
        )
        right.setdefault("all that need the slide", []).extend([same] * (not gives_away))
    right["all that need the slide"] = right.pop("all that need the slide")  # comes last
    return {name: (float(np.mean(same)), len(same)) for name, same in right.items()}


def print_retrieval(args):
    """Stage 1 by itself: which of the held-out reports belongs to which of the held-out slides."""
    cfg, model, words, tokenizer = load_alignment(args, wsi_llava.read_meta(args.data))
    rows = load_rows(args.data, "test")
    pairs = Pairs(one_report_a_slide(rows), args, tokenizer, cfg.text_encoder.max_length)
    n = len(pairs.rows)
    parts = pairs.parts(list(range(n)))
    with torch.no_grad():
        slides, texts = embed_batch(args, model, words, parts, micro_batches(pairs, parts, args))
    found = recall(slides @ texts.T)
    print(
        f"\nRetrieval among {n} held-out slides and reports (chance: R@1 {1 / n:.2f}, R@5 {5 / n:.2f}, R@10 {10 / n:.2f})"
    )
    for direction in ("slide->report", "report->slide"):
        print("  " + direction + "".join(f"   R@{k} {found[f'{direction} R@{k}']:.2f}" for k in (1, 5, 10)))


def print_relevance(args, model, tokenizer, cases, said):
    """Heatmaps against the truth: how relevant to "Yes, brown pigment is present." are the tiles that hold it? All
    held-out slides with pigment count, also those about which the model is wrong. The first on which it is right
    becomes a picture. said: {id: the model's answer}."""
    planted = {case["slide"]: case["planted"] for case in cases}
    times, hits, chance, drawn, picture = [], [], [], False, args.out / "heatmap.png"
    rows = load_rows(args.data, "test")
    for row in rows.where(lambda entry: entry["task"] == "focus" and planted[entry["slide"]]):
        slide, question = row["slide"], without_image(row["conversations"][0]["value"])
        features, coords = read_features(args.data, slide, args.max_tiles)
        holds = np.array([corner in planted[slide] for corner in coords.tolist()])
        if not holds.any():  # --max-tiles left them out
            continue
        relevance, _ = sample.tile_relevance(model, tokenizer, features, coords, question, truth(row))
        relevance = relevance.numpy()
        if not drawn and sample.same_answer(said[row["id"]], truth(row)):
            drawn = True
            lines = [f"{slide}: {question}", f"Answer: {said[row['id']]}"]
            view = sample.slide_or_grid(args.data, slide)
            sample.draw_heatmap(picture, view, coords.numpy(), relevance, lines)
        hits.append(holds[relevance.argmax()])
        chance.append(holds.mean())
        speaking = relevance.clip(min=0)  # below zero: against the answer
        times.append(speaking[holds].mean() / max(speaking.mean(), 1e-12))
    if hits:
        print(
            f"\nWhere the answers come from: on the {len(hits)} held-out slides with brown pigment, the tiles that hold it "
            f"get {np.mean(times):.1f} times the mean relevance (random: 1.0), and the most relevant tile is one of them in "
            f"{np.mean(hits):.0%} (random: {np.mean(chance):.0%})." + f" One of them: {picture}" * drawn
        )


ABLATIONS = {  # name -> what is changed, and the stages that it has in common with the run beside it
    "nothing (the run above)": ({}, (1, 2, 3)),
    "no slide encoder": ({"no_slide_encoder": True}, ()),
    "16 tiles a slide": ({"max_tiles": 16}, ()),
    "no stage 1": ({"skip_stage": [1]}, ()),
    "no stage 2": ({"skip_stage": [2]}, (1,)),
    "no image": ({"no_image": True}, (1, 2)),
}


def ablations(args):
    """What each piece is worth: the demo with one thing changed, in out/ablations. Interrupted, --resume goes on."""
    names, table = None, []
    for name, (changes, common) in ABLATIONS.items():
        say(f"\nWithout a piece: {name}")
        variant = argparse.Namespace(**(vars(args) | changes))
        variant.out = args.out / "ablations" / name.replace(" ", "-") if changes else args.out
        for stage in common if changes else ():
            shutil.copytree(args.out / f"stage{stage}", variant.out / f"stage{stage}", dirs_exist_ok=True)
        for stage in (1, 2, 3):
            if stage not in common and not (stage == 1 and variant.no_slide_encoder):
                train_stage(stage, variant)
        model, tokenizer, visual, closed = held_out(variant)
        found = accuracies(closed, sample.answer_rows(model, tokenizer, closed, None if variant.no_image else visual))
        names = [kind.split(" (")[0] for kind in found]
        table.append(
            name.ljust(26)
            + "".join(f"{share:{max(10, len(n) + 2)}.2f}" for n, (share, _) in zip(names, found.values()))
        )
    print("\nAccuracy on the held-out slides with one thing changed")
    print("changed".ljust(26) + "".join(f"{n:>{max(10, len(n) + 2)}}" for n in names))
    print("\n".join(table))


def print_accuracies(args, model, tokenizer, visual, closed):
    """The table of the short questions, answered with the slide, another's, or none -> the answers with the slide."""
    slides = sorted(visual)
    other = dict(zip(slides, slides[1:] + slides[:1]))  # the slides are in random order of findings
    answers = {
        "model": sample.answer_rows(model, tokenizer, closed, None if args.no_image else visual),
        "other slide": sample.answer_rows(model, tokenizer, closed, {s: visual[other[s]] for s in slides}),
        "no slide": sample.answer_rows(model, tokenizer, closed, None),
    }
    counts = collections.defaultdict(collections.Counter)  # of the answers to each kind of question, in training
    for row in load_rows(args.data, "train"):
        counts[row["task"]][truth(row)] += 1
    answers["majority"] = [counts[row["task"]].most_common(1)[0][0] for row in closed]
    print(f"\nAccuracy on {len(closed)} questions about {len(slides)} held-out slides")
    print("question kind".ljust(32) + "count".rjust(6) + "".join(name.rjust(13) for name in answers))
    found = [accuracies(closed, got) for got in answers.values()]
    for name, (_, count) in found[0].items():
        print(name.ljust(32) + f"{count:6d}" + "".join(f"{shares[name][0]:13.2f}" for shares in found))
    return answers["model"]


def print_dialogue(args, model, tokenizer, visual):
    """A chat about the first held-out slide that has one, beside the truth -> the slide."""
    talk = next(row for row in load_rows(args.data, "test") if row["task"] == "dialogue")
    print(f"\nA dialogue about {talk['slide']}, a held-out slide (in brackets: the truth):")
    chat = sample.Chat(model, tokenizer, visual[talk["slide"]], max_new_tokens=64)
    for question, answer in zip(talk["conversations"][::2], talk["conversations"][1::2]):
        question = without_image(question["value"])
        print(f"  USER: {question}\n  ASSISTANT: {''.join(chat.reply(question))}  [{answer['value']}]")
    return talk["slide"]


def demo(args):
    """--demo: the toy cohort, the three stages, and what they are worth on slides that were held out."""
    started = time.time()
    args.preset, args.log_every = "demo", args.log_every * 20
    cases = prepare.prepare_demo(prepare.with_defaults(args))
    stages = (2, 3) if args.no_slide_encoder else (1, 2, 3)
    for stage in stages:
        train_stage(stage, args)
    model, tokenizer, visual, closed = held_out(args)
    answers = print_accuracies(args, model, tokenizer, visual, closed)
    if 1 in stages:
        print_retrieval(args)
    slide = print_dialogue(args, model, tokenizer, visual)
    if not args.no_image:
        said = dict(zip((row["id"] for row in closed), answers))
        print_relevance(args, model, tokenizer, cases, said)
    logs = {}
    for stage in stages:
        lines = (args.out / f"stage{stage}" / "log.jsonl").read_text().splitlines()
        logs[f"stage {stage}, {TITLES[stage]}"] = [json.loads(line) for line in lines]
    draw_curves(args.out / "loss.png", logs)
    print(f"\nPictures: {args.out}/loss.png (the three losses), {args.data}/qc/{slide}.jpg (tissue and tiles)")
    print(f"Took {time.time() - started:.0f} s. Ask it yourself: python sample.py --slide {slide}")
    if args.ablations:
        ablations(args)


# --------------------------------------------------------------------------------------------------------------------
# Flags, and what they start
# --------------------------------------------------------------------------------------------------------------------


def add_recipe_flags(parser):
    """A flag for each field of Recipe, whose help ends in the values of the recipes."""
    brackets = "In brackets: the defaults by preset, of stages 1, 2 and 3 where they differ; 13b has those of 7b."
    group = parser.add_argument_group("the recipe", brackets)
    for f in dataclasses.fields(Recipe):
        text = []
        for preset in ("7b", "demo"):
            values = [str(getattr(recipe, f.name)) for recipe in RECIPES[preset].values()]
            text.append(f"{preset}: {', '.join(values if len(set(values)) > 1 else values[:1])}")
        kind = f.type if f.type is str else at_least(1 if f.type is int else 0, f.type)
        extra = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": kind, "metavar": "X"}
        group.add_argument(f"--{f.name.replace('_', '-')}", help=f"{f.metadata['help']} ({'; '.join(text)})", **extra)


def parse(argv=None):
    parser = wsi_llava.Parser(__doc__)
    add = parser.add_argument_group("what to do").add_argument
    add("--stage", type=int, choices=[1, 2, 3], help="the stage to train")
    add("--demo", action="store_true", help="draw toy slides if needed, train all stages, answer held-out questions")
    add("--ablations", action="store_true", help="after the demo, train it again without one piece at a time")
    add("--export", type=Path, metavar="DIR", help="write out/stage3 as a Hugging Face folder, its adapters merged, and stop")
    add("--export-adapter", type=Path, metavar="DIR", help="the same as a LoRA folder, to stand on --llm")
    add("--layout", choices=["hf", "llava"], default="hf", help="of an export: transformers' (default) or LLaVA's own")
    add("--resume", action="store_true", help="go on where an interrupted run of the stage saved last")
    add = parser.add_argument_group("what is trained, and on what").add_argument
    add("--full", action="store_true", help="stage 3 trains the whole language model instead of LoRA adapters")
    add("--from-scratch", action="store_true", help="stage 1 starts from a random slide encoder, not GigaPath's")
    add("--skip-missing", action="store_true", help="leave out questions about slides that have no features")
    add("--val", type=float, default=0.05, help="share of the training slides to validate on (default: 0.05)")
    count = at_least(1)
    add("--val-rows", type=count, default=256, help="validate on at most so many rows (default: 256)")
    keep = "the stage's result: the last weights (default), or those of lowest validation loss"
    add("--keep", choices=["last", "best"], default="last", help=keep)
    add("--clip", type=float, default=1.0, help="a gradient of larger norm is scaled down to it (default: 1)")
    add("--log-every", type=count, default=1, help="steps between lines on the screen (default: 1; the demo: 20)")
    add("--eval-every", type=count, help="steps between validations (default: an eighth of the run)")
    add("--save-every", type=count, default=200, help="steps between checkpoints (default: 200)")
    group = parser.add_argument_group("ablations", "What is a piece worth? Train without it.")
    add = group.add_argument
    skipped = "leave these stages' weights as they start"
    add("--skip-stage", type=int, choices=[1, 2], nargs="*", default=[], help=skipped)
    add("--no-slide-encoder", action="store_true", help="tile features go straight to the pool (stages 2 and 3)")
    tiles = "at most so many tiles of a slide, drawn at random (default: all)"
    add("--max-tiles", type=at_least(0), default=0, help=tiles)
    add("--no-image", action="store_true", help="the language model gets the questions without the slide")
    add_recipe_flags(parser)
    wsi_llava.add_shared_flags(parser)
    prepare.add_demo_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    join_processes(args)
    wsi_llava.resolve_device(args)
    if args.demo:
        if world() > 1:
            raise UserError("--demo runs in one process; start it without torchrun")
        demo(args)
    elif args.stage:
        train_stage(args.stage, args)
    elif args.export or args.export_adapter:
        export(args)
    else:
        raise UserError("nothing to do: give --stage 1, 2 or 3, --export or --demo (--help explains)")
    if dist.is_initialized():  # gloo's threads may hold tensors, which they cannot free while Python is shutting down
        dist.destroy_process_group()


if __name__ == "__main__":
    wsi_llava.run(main)
