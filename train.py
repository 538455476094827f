"""Trains WSI-LLaVA in the paper's three stages, each on what the one before it left.

    python train.py --stage 1    WSI-text alignment: slides and their reports meet in one space (trains the slide encoder)
    python train.py --stage 2    feature space alignment: slide -> report (trains the projector)
    python train.py --stage 3    instruction tuning on all tasks (trains the projector, and the LLM by LoRA or --full)
    python train.py --demo       all of it on a cohort of toy slides, then questions about slides it has not seen

Reads data/ (made by prepare.py); writes out/stageN: model.safetensors (what the stage trained), config.json,
train_state.pt (to resume from), log.jsonl and loss.png.
"""

import argparse
import collections
import dataclasses
import json
import math
import re
import time
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from tqdm import tqdm

import prepare
import sample
import wsi_llava
from wsi_llava import PRESETS, UserError, is_report, read_features, read_visual_tokens, replacing


@dataclass
class Recipe:
    """Hyperparameters of one stage. Every field is also a flag, which overrides it."""

    lr: float
    batch_size: int
    epochs: float
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.0
    projector_lr: float = 0.0  # stage 3 (0: lr)
    lora_rank: int = 0  # stage 3
    lora_alpha: float = 0.0
    micro_batch: int = 8  # samples that go through the model at once; gradients add up to the batch
    max_length: int = 2048  # tokens of text
    checkpointing: bool = True  # recompute activations in the backward: a third more time, a fraction of the memory


RECIPES = {  # the values of LLaVA-1.5 and the paper where they say
    "7b": {
        1: Recipe(1e-4, 64, 20, warmup=0.05, weight_decay=0.05),
        2: Recipe(1e-3, 256, 1),
        3: Recipe(2e-4, 128, 3, projector_lr=2e-5, lora_rank=128, lora_alpha=256),
    },
    "demo": {
        1: Recipe(1e-3, 60, 34, warmup=0.05, weight_decay=0.05, checkpointing=False),
        2: Recipe(2e-3, 32, 4, micro_batch=32, checkpointing=False),
        3: Recipe(2e-3, 48, 3, projector_lr=1e-3, lora_rank=16, lora_alpha=32, micro_batch=24, checkpointing=False),
    },
}
RECIPES["13b"] = RECIPES["7b"]


# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


def load_rows(data, split, skip_missing=False):
    """data/qa/<split>.jsonl -> its rows, whose slides all have features. Raises UserError where some have none."""
    path = data / "qa" / f"{split}.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such file; run python prepare.py --qa FILE... first")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error.msg}); run python prepare.py --qa again"
            ) from None
    have = {p.stem for p in (data / "features").glob("*.safetensors")} & {row["slide"] for row in rows}
    have = {slide for slide in have if len(read_features(data, slide)[1])}  # without tissue there is nothing to learn
    missing = sorted({row["slide"] for row in rows} - have)
    if missing and not skip_missing:
        raise UserError(
            f"{path} names {len(missing)} slides without features in {data}/features, the first: {missing[0]}; "
            f"prepare them with python prepare.py --slides, or leave their questions out with --skip-missing"
        )
    rows = [row for row in rows if row["slide"] in have]
    if not rows:
        raise UserError(f"{path}: no question is about a slide that has features in {data}/features")
    return rows


def split_validation(rows, share):
    """Training and validation rows. By slide, and by its name alone: the same slides in every stage and every run."""
    held = {r["slide"] for r in rows if zlib.crc32(r["slide"].encode()) % 1000 < share * 1000}
    return [r for r in rows if r["slide"] not in held], [r for r in rows if r["slide"] in held]


# --------------------------------------------------------------------------------------------------------------------
# The three stages. Each is a Task for the one training loop below.
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    model: torch.nn.Module
    cfg: wsi_llava.WSILLaVAConfig
    groups: list  # optimizer groups: {"name", "params", "lr"}
    items: list  # what an epoch goes through
    backward: object  # (items of a batch) -> (loss, tokens), gradients added to the parameters
    validate: object  # () -> {metric: value}
    saved: str  # pattern of the parameters that the stage leaves to the next


def stage1(args, recipe, meta):
    """WSI-text alignment by symmetric InfoNCE with the gradient-cache method (arXiv 2101.06983).

    A contrastive loss needs a large batch, and slides are long. So: embed everything without grad; take the loss's
    gradient with respect to the embeddings; embed again, slide by slide, and carry that gradient back. Memory is one
    micro-batch's, and the gradient is exactly that of the whole batch.
    """
    folder, tokenizer = wsi_llava.pick_llm(args, meta)
    words = wsi_llava.load_llama(folder).embed_tokens.weight.detach().to(args.device, args.dtype)  # [vocab,C], frozen
    cfg = wsi_llava.WSILLaVAConfig.from_dict(PRESETS[args.preset or meta["preset"]].to_dict())
    slide_encoder = None
    path = args.slide_encoder or wsi_llava.WEIGHTS / "gigapath" / "slide_encoder.pth"
    if args.slide_encoder or (meta["preset"] != "demo" and path.exists()):
        slide_encoder = wsi_llava.load_slide_encoder(path)
        cfg.slide_encoder = slide_encoder.cfg
    elif meta["preset"] != "demo" and not args.from_scratch:
        raise UserError(f"no slide encoder: {path} is missing; name it with --slide-encoder, or train --from-scratch")
    wsi_llava.check_tile_width(cfg.slide_encoder, meta, args.data)
    cfg.text_encoder.in_width = words.shape[1]
    cfg.fingerprints = {"tile_encoder": meta["encoder"]["fingerprint"]}
    model = wsi_llava.WSITextAlignment(cfg)
    if slide_encoder is not None:
        model.slide_encoder = slide_encoder
    model.to(args.device, args.dtype).slide_encoder.checkpointing = recipe.checkpointing

    pairs = Pairs(args, model, words, tokenizer)
    train, val = split_validation(one_report_a_slide(load_rows(args.data, "train", args.skip_missing)), args.val)
    if slide_encoder is None:
        some = [read_features(args.data, row["slide"])[0] for row in train[:200]]
        model.slide_encoder.standardize_inputs(torch.cat(some).to(args.device))

    def backward(rows):
        parts, seed = list(pairs.chunks(rows)), torch.initial_seed()
        with torch.no_grad():
            embedded = []
            for i, part in enumerate(parts):
                torch.manual_seed(seed + i)  # the second pass must draw the same dropout
                embedded.append(pairs.embed(part))
        slides, texts = (torch.cat(x).requires_grad_() for x in zip(*embedded))
        loss = model.loss(slides, texts)
        loss.backward()
        start = 0
        for i, part in enumerate(parts):
            torch.manual_seed(seed + i)
            chunk = slice(start, start + len(part))
            torch.autograd.backward(pairs.embed(part), (slides.grad[chunk], texts.grad[chunk]))
            start += len(part)
        return loss.item(), pairs.tiles(rows)

    groups = [{"name": "slide and text encoder", "params": list(model.parameters()), "lr": recipe.lr}]
    return Task(model, cfg, groups, train, backward, (lambda: pairs.retrieval(val)) if val else None, r".*")


class Pairs:
    """Slides and their reports in the shared space of a WSITextAlignment."""

    def __init__(self, args, model, words, tokenizer):
        self.args, self.model, self.words, self.tokenizer = args, model, words, tokenizer

    def tiles(self, rows):
        return sum(len(read_features(self.args.data, row["slide"])[1]) for row in rows)

    def embed(self, rows):
        """Slides with the same number of tiles, and their reports -> two times [B,E]."""
        args = self.args
        loaded = [read_features(args.data, row["slide"]) for row in rows]
        features = torch.stack([f for f, _ in loaded]).to(args.device, args.dtype)
        coords = torch.stack([c for _, c in loaded]).to(args.device)
        longest = self.model.text_encoder.cfg.max_length
        ids = [torch.tensor(self.tokenizer.encode(row["conversations"][1]["value"])[:longest]) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1).to(args.device)
        words = F.embedding(ids.clamp(min=0), self.words)  # [B,T,C_llm]
        return self.model.embed_slides(features, coords), self.model.embed_texts(words, ids >= 0)

    def chunks(self, rows):
        """Micro-batches: slides of the same length together, since the slide encoder knows no padding."""
        by_length = {}
        for row in rows:
            by_length.setdefault(len(read_features(self.args.data, row["slide"])[1]), []).append(row)
        for length, group in sorted(by_length.items()):
            size = max(1, 4096 // max(1, length))
            yield from (group[i : i + size] for i in range(0, len(group), size))

    @torch.no_grad()
    def retrieval(self, rows):
        slides, texts = (torch.cat(x) for x in zip(*[self.embed(part) for part in self.chunks(rows)]))
        return {"loss": self.model.loss(slides, texts).item(), **recall(slides @ texts.T), "pairs": len(rows)}


def one_report_a_slide(rows):
    """Two reports of a slide in one batch would be each other's false negatives."""
    return list({row["slide"]: row for row in rows if is_report(row)}.values())


def recall(similarity):
    """[n,n] slide-report similarities -> recall@1, 5 and 10, slide to report and back."""
    own = similarity.diagonal()
    ranks = {"slide->report": (similarity > own[:, None]).sum(1), "report->slide": (similarity > own).sum(0)}
    return {f"{name} R@{k}": (rank < k).float().mean().item() for name, rank in ranks.items() for k in (1, 5, 10)}


def language_task(args, recipe, meta, stage):
    """Stages 2 and 3: next-token loss on the answers, given the slide's visual tokens."""
    model, tokenizer = wsi_llava.assemble(args, meta, stage - 1)
    cfg = model.cfg
    model.requires_grad_(False)
    if stage == 3 and args.full:
        model.llama.requires_grad_(True)
    elif stage == 3:
        cfg.lora_rank, cfg.lora_alpha = recipe.lora_rank, recipe.lora_alpha
        wsi_llava.add_lora(model.llama, recipe.lora_rank, recipe.lora_alpha)
    model.mm_projector.requires_grad_(True)
    model.to(args.device).llama.checkpointing = recipe.checkpointing

    rows = load_rows(args.data, "train", args.skip_missing)
    if stage == 2:
        rows = [row for row in rows if is_report(row)]
        if not rows:
            raise UserError(
                f"{args.data}/qa/train.jsonl holds no reports (tasks with 'report' in the name): stage 2 needs them"
            )
    train, val = split_validation(rows, args.val)
    slides = sorted({row["slide"] for row in rows})
    written = wsi_llava.cache_visual_tokens(
        model, args.data, slides, lambda x: tqdm(x, desc="visual tokens", unit="slide")
    )
    print(f"Visual tokens of {len(slides)} slides: {written} computed, {len(slides) - written} were there.")

    def encode(row):
        if stage == 2:
            ids, labels = tokenizer.encode_plain(row["conversations"][1]["value"])
        else:
            ids, labels = tokenizer.encode_chat(row["conversations"])
        return ids[: recipe.max_length], labels[: recipe.max_length]

    def batch_loss(rows):
        """-> (mean loss, number of labelled tokens)"""
        ids, labels = zip(*[encode(row) for row in rows])
        visual = [
            read_visual_tokens(args.data, row["slide"])[None].expand(i.count(wsi_llava.IMAGE_TOKEN), -1, -1)
            for row, i in zip(rows, ids)
        ]
        return model([v.to(args.device) for v in visual], ids, labels), sum(l >= 0 for x in labels for l in x)

    def backward(rows):
        rows = sorted(rows, key=lambda row: len(row["conversations"][-1]["value"]))  # less padding
        micro = [rows[i : i + recipe.micro_batch] for i in range(0, len(rows), recipe.micro_batch)]
        total = sum(sum(l >= 0 for l in encode(row)[1]) for row in rows)
        mean = 0.0
        for part in micro:
            loss, tokens = batch_loss(part)
            (loss * tokens / total).backward()  # so that every token of the batch weighs the same
            mean += loss.item() * tokens / total
        return mean, total

    def validate():
        losses = [batch_loss(val[i : i + recipe.micro_batch]) for i in range(0, min(len(val), 256), recipe.micro_batch)]
        return {"loss": sum(l.item() * n for l, n in losses) / sum(n for _, n in losses)}

    groups = [
        {"name": "projector", "params": list(model.mm_projector.parameters()), "lr": recipe.projector_lr or recipe.lr}
    ]
    if stage == 3:
        params = [p for p in model.llama.parameters() if p.requires_grad]
        groups.append({"name": "language model", "params": params, "lr": recipe.lr})
    saved = r"mm_projector\..*|llama\..*" if stage == 3 and args.full else wsi_llava.trained_names(cfg)
    return Task(model, cfg, groups, train, backward, validate if val else None, saved)


# --------------------------------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------------------------------


def train_stage(stage, args):
    meta = wsi_llava.read_meta(args.data)
    recipe = dataclasses.replace(RECIPES[args.preset or meta["preset"]][stage])
    for f in dataclasses.fields(Recipe):
        if getattr(args, f.name) is not None:
            setattr(recipe, f.name, getattr(args, f.name))
    torch.manual_seed(args.seed)
    task = stage1(args, recipe, meta) if stage == 1 else language_task(args, recipe, meta, stage)
    model, n = task.model, len(task.items)
    batch_size = min(recipe.batch_size, n)
    if stage == 1 and batch_size < 2:
        raise UserError(f"stage 1 contrasts slides with one another and needs at least 2 with a report; found {n}")
    per_epoch = n // batch_size
    steps = max(1, round(recipe.epochs * per_epoch))
    trained = ", ".join(f"{g['name']} {sum(p.numel() for p in g['params']):,}" for g in task.groups)
    things, slides = "reports" if stage < 3 else "questions", len({row["slide"] for row in task.items})
    print(
        f"Stage {stage}: {n} {things} of {slides} slides, {steps} steps of {batch_size} on {args.device}; "
        f"trains {trained} of {sum(p.numel() for p in model.parameters()):,} parameters."
    )
    folder = args.out / f"stage{stage}"
    folder.mkdir(parents=True, exist_ok=True)
    beta2 = 0.98 if stage == 1 else 0.999
    optimizer = torch.optim.AdamW(task.groups, betas=(0.9, beta2), weight_decay=recipe.weight_decay)
    peaks = [group["lr"] for group in task.groups]
    first, log, run = 0, [], {"steps": steps, "batch_size": batch_size, "items": n, "seed": args.seed}
    state_file = folder / "train_state.pt"
    if args.resume and state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        if state["run"] != run:
            raise UserError(
                f"{state_file} belongs to another run ({state['run']}, not {run}); leave --resume out to start anew"
            )
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        first, log = state["step"], state["log"]
        print(f"Resuming at step {first} of {steps}.")

    def save(step):
        """Everything that the next stage or --resume needs, each file written aside and renamed."""
        weights = {
            k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if re.fullmatch(task.saved, k)
        }
        with replacing(state_file) as path:
            state = {"run": run, "step": step, "model": weights, "optimizer": optimizer.state_dict(), "log": log}
            torch.save(state, path)
        with replacing(folder / "log.jsonl") as path:
            path.write_text("".join(json.dumps(entry) + "\n" for entry in log))
        draw_curves(folder / "loss.png", {f"stage {stage}": log})
        if step == steps:  # a stage's result appears when it is whole: the next stage takes no half-trained weights
            with replacing(folder / "config.json") as path:
                path.write_text(task.cfg.to_json())
            with replacing(folder / "model.safetensors") as path:
                save_file(weights, path)

    if not args.resume:
        (folder / "model.safetensors").unlink(missing_ok=True)
    eval_every = args.eval_every or max(1, steps // 8)
    model.train()
    with tqdm(total=steps, initial=first, desc=f"stage {stage}", unit="step") as progress:
        step = first
        try:
            for step in range(first, steps):
                started = time.time()
                epoch, k = divmod(step, per_epoch)
                # Data order and every random number follow from (seed, stage, step): resuming needs no state of either.
                order = np.random.default_rng([args.seed, stage, epoch]).permutation(n)
                torch.manual_seed(args.seed * 1_000_003 + stage * 100_000_007 + step * 1009)
                batch = [task.items[i] for i in order[k * batch_size : (k + 1) * batch_size]]
                for group, peak in zip(optimizer.param_groups, peaks):
                    group["lr"] = peak * schedule(step, steps, recipe.warmup)
                loss, tokens = task.backward(batch)
                if not math.isfinite(loss):
                    raise UserError(
                        f"stage {stage}, step {step}: the loss is {loss}; the batch was "
                        f"{', '.join(row['id'] for row in batch[:8])}, ...; try a lower --lr or --dtype float32"
                    )
                norm = torch.nn.utils.clip_grad_norm_([p for g in task.groups for p in g["params"]], 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                entry = {"step": step + 1, "loss": round(loss, 5), "lr": optimizer.param_groups[-1]["lr"]}
                entry |= {
                    "grad_norm": round(norm.item(), 4),
                    "tokens_per_s": round(tokens / (time.time() - started), 1),
                }
                log.append(entry)
                progress.update()
                progress.set_postfix_str(f"loss {loss:.3f}")
                if (step + 1) % eval_every == 0 or step + 1 == steps:
                    entry |= evaluate(model, task.validate)
                    text = " ".join(f"{k.replace(' ', '_')} {v:.4g}" for k, v in entry.items())
                    tqdm.write(f"stage {stage} {text}")
                if (step + 1) % args.save_every == 0 or step + 1 == steps:
                    save(step + 1)
        except KeyboardInterrupt:
            save(len(log))
            raise UserError(
                f"interrupted after step {len(log)} of {steps}, saved; --resume goes on from there"
            ) from None
    print(f"Stage {stage} is done: {folder}/model.safetensors; curves in {folder}/loss.png.")


def schedule(step, steps, warmup):
    """Linear warmup, then half a cosine to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, steps - rising))


@torch.no_grad()
def evaluate(model, validate):
    if validate is None:
        return {}
    model.eval()
    metrics = {f"val_{name}": value for name, value in validate().items()}
    model.train()
    return metrics


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

        def point(step, loss):
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


# --------------------------------------------------------------------------------------------------------------------
# The demo: the three stages on the toy cohort, then questions about slides that it has never seen
# --------------------------------------------------------------------------------------------------------------------


def demo(args):
    started = time.time()
    args.preset = "demo"
    prepare.prepare_demo(prepare.with_defaults(args))
    for stage in (1, 2, 3):
        train_stage(stage, args)
    meta = wsi_llava.read_meta(args.data)
    model, tokenizer = wsi_llava.assemble(args, meta, 3)
    model.to(args.device)
    rows = load_rows(args.data, "test")
    slides = sorted({row["slide"] for row in rows})
    wsi_llava.cache_visual_tokens(model, args.data, slides)
    visual = {slide: read_visual_tokens(args.data, slide) for slide in slides}

    closed = [row for row in rows if not is_report(row) and row["task"] != "dialogue"]
    other = dict(zip(slides, slides[1:] + slides[:1]))  # the slides are in random order of findings
    answers = {
        "model": sample.answer_rows(model, tokenizer, closed, visual),
        "other slide": sample.answer_rows(model, tokenizer, closed, {s: visual[other[s]] for s in slides}),
        "no slide": sample.answer_rows(model, tokenizer, closed, None),
    }
    train_rows = load_rows(args.data, "train")
    tasks = [task for task in dict.fromkeys(row["task"] for row in closed)]
    common = {
        task: collections.Counter(truth(row) for row in train_rows if row["task"] == task).most_common(1)[0][0]
        for task in tasks
    }
    answers["majority"] = [common[row["task"]] for row in closed]
    right = {name: [sample.same_answer(a, truth(row)) for a, row in zip(got, closed)] for name, got in answers.items()}

    print(f"\nAccuracy on {len(closed)} questions about {len(slides)} held-out slides")
    print("question kind".ljust(32) + "count".rjust(6) + "".join(name.rjust(13) for name in answers))
    needs = {task: f"{task} ({'text gives it away' if task == 'subtype' else 'needs the slide'})" for task in tasks}
    groups = [(needs[task], [task]) for task in tasks] + [
        ("all that need the slide", [t for t in tasks if t != "subtype"])
    ]
    for name, members in groups:
        chosen = [i for i, row in enumerate(closed) if row["task"] in members]
        cells = "".join(f"{np.mean([right[a][i] for i in chosen]):13.2f}" for a in answers)
        print(name.ljust(32) + f"{len(chosen):6d}" + cells)
    print_retrieval(args, meta, tokenizer, rows)

    talk = next(row for row in rows if row["task"] == "dialogue")
    slide = talk["slide"]
    print(f"\nA dialogue about {slide}, a held-out slide (in brackets: the truth):")
    chat = sample.Chat(model, tokenizer, visual[slide], max_new_tokens=64)
    for question, answer in zip(talk["conversations"][::2], talk["conversations"][1::2]):
        question = question["value"].replace("<image>\n", "")
        print(f"  USER: {question}\n  ASSISTANT: {''.join(chat.reply(question))}  [{answer['value']}]")
    logs = {}
    for stage in (1, 2, 3):
        lines = (args.out / f"stage{stage}" / "log.jsonl").read_text().splitlines()
        logs[f"stage {stage}"] = [json.loads(line) for line in lines]
    draw_curves(args.out / "loss.png", logs)
    print(f"\nPictures: {args.out}/loss.png (the three losses), {args.data}/qc/{slide}.jpg (tissue and tiles)")
    print(f"Took {time.time() - started:.0f} s. Ask it yourself: python sample.py --slide {slide}")


def truth(row):
    return row["conversations"][1]["value"]


def print_retrieval(args, meta, tokenizer, rows):
    """Stage 1 by itself: which of the held-out reports belongs to which of the held-out slides."""
    cfg, tensors, source = wsi_llava.read_stage(args, 1)
    model = wsi_llava.load_strict(wsi_llava.WSITextAlignment(cfg), tensors, source).to(args.device, args.dtype).eval()
    words = (
        wsi_llava.load_llama(wsi_llava.pick_llm(args, meta)[0]).embed_tokens.weight.detach().to(args.device, args.dtype)
    )
    found = Pairs(args, model, words, tokenizer).retrieval(one_report_a_slide(rows))
    n = found["pairs"]
    print(
        f"\nRetrieval among {n} held-out slides and reports (chance: R@1 {1 / n:.2f}, R@5 {5 / n:.2f}, R@10 {10 / n:.2f})"
    )
    for direction in ("slide->report", "report->slide"):
        print("  " + direction + "".join(f"   R@{k} {found[f'{direction} R@{k}']:.2f}" for k in (1, 5, 10)))


# --------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", type=int, choices=[1, 2, 3], help="the stage to train")
    add(
        "--demo",
        action="store_true",
        help="prepare the toy cohort if needed, train all stages, answer held-out questions",
    )
    add("--resume", action="store_true", help="go on where an interrupted run of the stage saved last")
    add("--full", action="store_true", help="stage 3 trains the whole language model instead of LoRA adapters")
    add("--from-scratch", action="store_true", help="stage 1 starts from a random slide encoder, not GigaPath's")
    add("--skip-missing", action="store_true", help="leave out questions about slides that have no features")
    add("--val", type=float, default=0.05, help="share of the training slides to validate on (default: 0.05)")
    add("--eval-every", type=int, help="steps between validations (default: an eighth of the run)")
    add("--save-every", type=int, default=200, help="steps between checkpoints (default: 200)")
    for f in dataclasses.fields(Recipe):
        kind = f.type if f.type is not bool else argparse.BooleanOptionalAction
        extra = {"action": kind} if f.type is bool else {"type": kind}
        add(f"--{f.name.replace('_', '-')}", default=None, help="default: the recipe of the preset and stage", **extra)
    wsi_llava.add_shared_flags(parser)
    prepare.add_demo_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    wsi_llava.resolve_device(args)
    if args.demo:
        demo(args)
    elif args.stage:
        train_stage(args.stage, args)
    else:
        raise UserError("nothing to do: give --stage 1, 2 or 3, or --demo (--help explains)")


if __name__ == "__main__":
    wsi_llava.run(main)
