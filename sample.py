"""Asks WSI-LLaVA about slides: one question, a chat, or a whole benchmark and its evaluation.

python sample.py --slide S --ask Q          one answer, streamed; S: a slide file, or a prepared slide's name
python sample.py --slide S                  a chat about it
python sample.py --slide S --ask Q --heatmap out.png    and which tiles made the answer what it is
python sample.py --slide S --zero-shot TEXT TEXT        which of the texts fits the slide, by stage 1
python sample.py --qa FILE --baselines --evaluate       answers to all questions, then tables, in out/
python sample.py --qa FILE --max-tiles 100 --predictions F     with so many of a slide's tiles
python sample.py --evaluate A B C           several systems' predictions in one table
python sample.py --evaluate A --judge-model M           open answers graded by a language model

"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

import prepare
import wsi_llava
from wsi_llava import IMAGE_TOKEN, TILE, UserError, check, one_line, read_features, reading, write_text

# ---- The slides that are asked about: files and names -> visual tokens -------------------------------------


def load_model(args, meta):
    """The model as far as it is trained, on --device -> (WSILLaVA, Tokenizer). Raises UserError."""
    model, tokenizer = wsi_llava.load_model(args, meta, 3, int8=args.int8)
    if args.max_tiles:
        model.cfg.max_tiles = args.max_tiles  # read_features draws them, the same ones for every model
    return model.to(args.device), tokenizer


def gigabytes(args):
    """The peak of memory so far, in words."""
    return f"{wsi_llava.peak_memory(args.device) / 1e9:.2f} GB"


def check_output(path, mark):
    """Refuses to replace what is not this command's own earlier output, which has the mark near its
    beginning."""
    path = Path(path)
    check(path.parent.is_dir(), f"{path}: the folder {path.parent} does not exist; make it first")
    check(not path.is_dir(), f"{path}: a folder; name a file in it")
    check(path.is_file() or not path.exists(), f"{path}: a device or a pipe; name a file")
    if path.exists():
        with open(path, "rb") as file:
            beginning = file.read(400)
        what = "exists, and is no earlier output of this command; name another file, or move it away"
        check(not beginning or mark.encode() in beginning, f"{path}: {what}")


def prepare_raw(args, name):
    """--slide's file or name -> the name of a slide in data/. A file is prepared first, like any other."""
    known = wsi_llava.is_slide_name(name) and wsi_llava.features_file(args.data, name).exists()
    if known or not Path(name).exists():
        return name
    raw = prepare.find_slides([name])
    check(len(raw) == 1, f"--slide {name}: holds {len(raw)} slides; name one")
    failures = prepare.prepare_slides(prepare.with_defaults(args), raw)
    check(not failures, failures and failures[0][1])
    return next(iter(raw))


def slide_facts(data, slide):
    """What prepare.py noted of a slide's features; {} where nothing can be read, or nothing is noted."""
    with contextlib.suppress(UserError):
        return wsi_llava.feature_metadata(wsi_llava.features_file(data, slide))
    return {}


def why_missing(cfg, data, slide):
    """Why this slide cannot be asked about, in words, or None."""
    known = wsi_llava.is_slide_name(slide)
    if not known or not wsi_llava.features_file(data, slide).exists():
        imported = known and wsi_llava.visual_tokens_file(data, slide, cfg).exists()  # as good as features
        return None if imported else f"neither a file nor the name of a slide in {data}/features"
    try:
        empty = not len(read_features(data, slide)[0])
    except UserError as error:
        return str(error)
    return f"no tissue was found on it; look at {data}/qc/{slide}.jpg" if empty else None


def slide_tokens(args, model, slide):
    """The name of a slide in data/ -> visual tokens [V,C], kept in data/visual_tokens."""
    problem = why_missing(model.cfg, args.data, slide)
    check(not problem, f"--slide {slide}: {problem}")
    _, problems = wsi_llava.cache_visual_tokens(model, args.data, [slide])
    check(not problems, f"--slide {slide}: {problems.get(slide)}")
    return wsi_llava.read_visual_tokens(args.data, slide, model.cfg)


@torch.inference_mode()
def zero_shot(args, meta, slide, texts):
    """Probability of each text: softmax of its scaled similarity to the slide, in the space of stage 1."""
    cfg, model, words, tokenizer = wsi_llava.load_alignment(args, meta)
    problem = why_missing(cfg, args.data, slide)
    check(not problem, f"--slide {slide}: {problem}")
    features, coords = read_features(args.data, slide, cfg.max_tiles)
    features, coords = features.to(args.device, torch.float32), coords.to(args.device)
    embedded = model.embed_slides(features, coords, [len(features)])
    ids = [tokenizer.encode(text)[: cfg.text_encoder.max_length] for text in texts]
    similarity = embedded @ model.embed_words(ids, words).T  # [1,texts]
    return (model.logit_scale.exp().clamp(max=100) * similarity)[0].softmax(-1).tolist()


# ---- A conversation ----------------------------------------------------------------------------------------


class Chat:
    """A conversation about a slide, visual tokens [V,C]. The key-value cache is kept between turns."""

    def __init__(self, model, tokenizer, visual, **options):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.visual = visual
        like = model.mm_projector[0].weight
        self.cache = wsi_llava.KVCache(model.cfg.llama, 1, model.cfg.llama.context, like.device, like.dtype)
        self.tail = []  # the last reply's tokens that the cache does not hold yet
        self.tokens = 0  # of the last reply

    def reply(self, question):
        """Yields the answer piece by piece. Raises UserError where the talk no longer fits the context."""
        question = wsi_llava.without_image(question)
        # The first question brings the slide. A later one goes on where the cache ends: after the last
        # answer, less the token or two that generate() yielded and did not read.
        if not self.cache.length:
            question = "<image>\n" + question
            ids, visual = self.tokenizer.encode_chat([{"from": "human", "value": question}])[0], [self.visual]
        else:
            ids, visual = self.tail + self.tokenizer.encode_turn(question, first=False), None
        answer, shown, text, self.tokens = [], "", "", 0
        for (token,) in self.model.generate(
            visual, [ids], ends=self.tokenizer.ends, cache=self.cache, **self.options
        ):
            self.tokens += 1
            ended = token in self.tokenizer.ends
            self.tail = [self.tokenizer.eos] if ended else [token, self.tokenizer.eos]
            if not ended:
                answer.append(token)
            text = self.tokenizer.decode(answer)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character waits for its other bytes
                yield text[len(shown) :]
                shown = text
        if len(shown) < len(text):
            yield text[len(shown) :]
        self.answer = text


def stream_answer(chat, question):
    """Streams one answer -> (tokens, seconds)."""
    started = time.time()
    for piece in chat.reply(question):
        print(piece, end="", flush=True)
    print()
    return chat.tokens, time.time() - started


def chat_loop(chat):
    """Questions from a person or a pipe, until the input ends -> (tokens, seconds)."""
    talking, tokens, seconds = sys.stdin.isatty(), 0, 0.0
    if hasattr(sys.stdin, "reconfigure"):  # bytes that are not UTF-8 cost their own line only, below
        sys.stdin.reconfigure(errors="surrogateescape")
    if talking:
        print("Ask about the slide; the end of the input (Ctrl-D) ends the chat.")
    while True:
        try:
            line = input("> " if talking else "").strip()
        except EOFError:
            return tokens, seconds
        try:
            check(line == line.encode(errors="replace").decode(), "the line is not UTF-8; type it again")
            if line:
                more, took = stream_answer(chat, line)
                tokens, seconds = tokens + more, seconds + took
        except UserError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)


# ---- Where the answer comes from ---------------------------------------------------------------------------
#
# The relevance of a tile is its share of log p(answer | slide), by integrated gradients (arXiv 1703.01365):
# on the way from a slide on which every tile is the average tile to the real one, the gradient with respect
# to the tiles' features, through the language model, projector, pool and slide encoder, times the change of
# the features. The shares of all tiles add up to what the slide does for the answer: log p(answer | slide) -
# log p(answer | average tiles), in nats.
#
# Why not the language model's attention: the slide encoder has mixed the tiles before, so the visual token
# that is read need not be where the evidence lies. train.py --demo measures it on held-out slides where the
# evidence was planted; on 50 such slides of an earlier cohort, of the ways tried, how often the hottest
# tile holds the evidence, and its relevance over the mean tile's:
#
#     chance                                                                      3%     1.0
#     attention; attention times its gradient, rolled out (arXiv 2103.15679)      2%     1.0
#     gradient times features, at the real slide alone                           48%     4.8
#     integrated gradients                                                      100%    29.5

PASSES = 32  # forward and backward, at the midpoints of as many steps from the average tile to the real ones
PANEL = 560  # pixels of a panel's longer side
BEST = 9  # tiles shown
OVERLAY_ALPHA = 170  # opacity of the colours, of 255: the tissue shows through
# Pale to dark, evenly in lightness: read rightly in grey, and by the colour-blind.
ANCHORS = np.array([(255, 247, 190), (253, 190, 95), (235, 105, 55), (165, 35, 90), (60, 10, 85)])
HEATMAP_MARK = "wsi-llava heatmap"  # in the written files, so that only these are replaced


def tile_relevance(model, tokenizer, features, coords, question, answer, progress=iter):
    """What each tile adds to log p(answer) -> float32 [N], in nats (negative: evidence against). The sum comes
    close to what the slide adds. features [N,C_tile], coords [N,2] as in data/features.
    The weights stay frozen and layers are recomputed in the backward pass, so memory is the model's and one
    layer's."""
    check(tokenizer.encode(answer), "--heatmap: the answer is empty, so there is nothing to explain")
    talk = [*wsi_llava.slide_first([{"from": "human", "value": question}]), {"from": "gpt", "value": answer}]
    ids, labels = tokenizer.encode_chat(talk)
    labels[-1] = wsi_llava.IGNORE  # the </s> after the answer
    room = model.llama.cfg.context - model.cfg.n_visual_tokens + 1  # an answer may have filled the context
    ids, labels = ids[:room], labels[:room]
    model.requires_grad_(False)
    model.llama.checkpointing = True
    if model.slide_encoder:
        model.slide_encoder.checkpointing = True
    features = features.to(model.device, torch.float32)
    average = features.mean(0).expand_as(features)

    relevance = torch.zeros(len(features))
    for k in progress(range(PASSES)):
        tiles = torch.lerp(average, features, (k + 0.5) / PASSES).requires_grad_()
        logp = -model(model.encode_slide(tiles, coords)[None], [ids], [labels], "sum")
        slope = torch.autograd.grad(logp, tiles)[0]  # d log p / d tiles, [N,C_tile]
        relevance += (slope * (features - average)).sum(1).cpu() / PASSES
    return relevance


def colours(shares):
    """Shares from 0 to 1 -> uint8 RGB."""
    stops = np.linspace(0, 1, len(ANCHORS))
    return np.stack([np.interp(shares, stops, channel) for channel in ANCHORS.T], -1).astype(np.uint8)


@functools.cache
def slide_files(folder):
    """{name: file} of the slides below a folder, or of one file."""
    return prepare.find_slides([folder])


def find_slide(data, name, path=None, mpp=None):
    """The file of a prepared slide -> what prepare.Slide takes to open it as it was prepared. path: the file,
    or a folder with it (default: data/slides)."""
    path, target = Path(path or data / "slides"), wsi_llava.read_meta(data)["mpp"]
    file = slide_files(path).get(name) if path.exists() else None
    check(file, f"{name}: its file is not in {path}; name its folder with --slides DIR")
    scale = slide_facts(data, name).get("scale")
    given = target / scale if scale else None  # what it was prepared with, as --mpp-csv may have said
    return file, given, target, mpp


def slide_place(source):
    """Level-0 pixels per tiled pixel of a slide, and where its scanned area begins."""
    slide = prepare.Slide(*source)
    return slide.scale, slide.corner()


def draw_heatmap(path, source, coords, relevance, lines):
    """One picture: the slide with its tiles, the tiles coloured by their relevance, the most relevant ones
    enlarged.

    source: as by find_slide. coords [N,2], relevance [N]: numpy. lines: the title."""
    slide = prepare.Slide(*source)
    pixel = max(slide.width, slide.height) / PANEL  # tiled pixels per pixel of the picture
    picture = slide.thumbnail(pixel)
    large, small, grey = ImageFont.load_default(22), ImageFont.load_default(15), (90, 90, 90)
    wide, high, cell = picture.width, max(1e-12, relevance.max()), PANEL // 3
    left, middle, right = 24, 48 + wide, 152 + 2 * wide
    width = right + PANEL + 10
    wrap = functools.partial(textwrap.wrap, width=width // 11, max_lines=3, placeholder=" ...")
    lines = list(itertools.chain(*map(wrap, lines)))
    top = 70 + 30 * len(lines)
    canvas = Image.new("RGB", (width, top + PANEL + 24), "white")
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((left, 20 + 30 * i), line, "black", large)
    draw.text((left, top - 10), f"the slide and its {len(coords):,} tiles", grey, small, "ls")
    draw.text((middle, top - 10), "relevance to the answer (nats)", grey, small, "ls")
    draw.text((right, top - 10), "the most relevant tiles", grey, small, "ls")

    # The slide and the outlines of its tiles.
    outlined = picture.copy()
    outline = ImageDraw.Draw(outlined, "RGBA")
    for x, y in coords / pixel:
        outline.rectangle((x, y, x + TILE / pixel, y + TILE / pixel), outline=(30, 80, 255, 110))
    canvas.paste(outlined, (left, top))

    # The slide, faded, under its tiles in the colour of their relevance: a pixel a tile, enlarged.
    faded = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "white"), 0.3)
    x, y = coords.T // TILE
    grid = np.zeros((y.max() + 1, x.max() + 1, 4), np.uint8)
    grid[y, x, :3], grid[y, x, 3] = colours((relevance / high).clip(0)), OVERLAY_ALPHA
    size = [round(side * TILE / pixel) for side in grid.shape[1::-1]]
    overlay = Image.fromarray(grid).resize(size, Image.Resampling.NEAREST)
    faded.paste(overlay, mask=overlay)
    canvas.paste(faded, (middle, top))
    bar = Image.fromarray(np.repeat(colours(np.linspace(1, 0, picture.height))[:, None], 14, axis=1))
    canvas.paste(bar, (middle + wide + 10, top), Image.new("L", bar.size, OVERLAY_ALPHA))
    for level in np.linspace(0, 1, 5):
        y = top + (1 - level) * (picture.height - 1)
        draw.text((middle + wide + 30, y), f"{level * high:.2g}", grey, small, "lm")

    # The most relevant tiles, framed in their colour.
    for i, n in enumerate(np.argsort(-relevance, kind="stable")[:BEST]):
        x, y = right + i % 3 * cell, top + i // 3 * cell
        colour = tuple(colours(relevance[n].clip(0) / high).tolist())
        draw.rectangle((x, y, x + cell - 15, y + cell - 29), colour)
        tile = Image.fromarray(slide.tile(*coords[n].tolist())).convert("RGB")
        canvas.paste(tile.resize((cell - 22, cell - 36), Image.Resampling.LANCZOS), (x + 4, y + 4))
        at = ", ".join(f"{c * slide.scale:.0f}" for c in coords[n].tolist())
        draw.text((x, y + cell - 25), f"{relevance[n]:.2g} at {at}", grey, small)
    made_by = PngImagePlugin.PngInfo()
    made_by.add_text("Software", HEATMAP_MARK)
    with wsi_llava.replacing(path) as temporary:
        canvas.save(temporary, "PNG", pnginfo=made_by)


def save_geojson(path, coords, relevance, scale, corner=(0, 0)):
    """The tiles for QuPath: squares in level-0 pixels, counted from `corner` (a Slide's), the relevance as a
    measurement (Measure > Show measurement maps). scale: level-0 pixels per tiled pixel."""
    shades = colours((relevance / relevance.max().clip(1e-12)).clip(0)).tolist()
    tiles = []
    for (x, y), value, shade in zip(coords.tolist(), relevance.tolist(), shades):
        facts = {"color": shade, "measurements": {"relevance": value}}
        tiles.append(wsi_llava.geojson_tile(x, y, scale, corner, **facts))
    write_text(path, json.dumps({"type": "FeatureCollection", "made_by": HEATMAP_MARK, "features": tiles}))


def check_heatmap_flags(args):
    """What can be refused before the model is loaded."""
    pictures = [path for path in (args.heatmap, args.heatmap_geojson) if path]
    if pictures:
        check(args.slide and args.ask, "--heatmap explains one answer: it needs --slide and --ask")
    if args.heatmap:
        png = args.heatmap.suffix.lower() == ".png"
        check(png, f"--heatmap {args.heatmap}: the picture is a PNG; give it a name that ends in .png")
    for path in pictures:
        check_output(path, HEATMAP_MARK)


def explain(args, model, tokenizer, name, answer):
    """--heatmap and --heatmap-geojson: which tiles of the slide made the model answer --ask so."""
    given = Path(args.slide)
    source = find_slide(args.data, name, given if given.exists() else args.slides, args.mpp)
    scale, corner = prepare.apart(source[0], slide_place, source)  # a damaged file may kill who opens it
    features, coords = read_features(args.data, name, model.cfg.max_tiles)
    print(f"Relevance of {len(coords):,} tiles: {PASSES} passes on {args.device}.")
    bar = functools.partial(tqdm, unit="pass", leave=False)
    relevance = tile_relevance(model, tokenizer, features, coords, args.ask, answer, bar)
    relevance, coords = relevance.numpy(), coords.numpy()
    x, y = coords[relevance.argmax()] * scale
    print(
        f"Against a slide of average tiles, this one adds about {relevance.sum():.2f} nats to the answer; the "
        f"tile that adds most, {relevance.max():.2f}, is at level-0 pixel {x:.0f}, {y:.0f}."
    )
    if relevance.sum() < 0.1:
        print(
            "So little means that a slide of average tiles gets this answer too: no tile made it what it is."
        )
    if args.heatmap:
        lines = [f"{name}: {args.ask}", f"Answer: {answer}"]
        prepare.apart(source[0], draw_heatmap, args.heatmap, source, coords, relevance, lines)
    if args.heatmap_geojson:
        save_geojson(args.heatmap_geojson, coords, relevance, scale, corner)
    print("Wrote " + " and ".join(str(path) for path in (args.heatmap, args.heatmap_geojson) if path))


# ---- Closed answers: choice and yes/no ---------------------------------------------------------------------


def plain(text):
    return " ".join(text.lower().split()).rstrip(".")


def same_answer(answer, truth):
    """Whether two short answers say the same, up to case, spaces and final punctuation."""
    return plain(answer) == plain(truth)


# How options are written: A) B. (C) [D] E: F - G、, or a) (b) [c], or 1) 2. 3、; never inside of a word.
STYLES = {
    "ABCDEFGH": r"[(\[]?([A-H])(?:\s?[).:\]、](?=\s|$|\w)|\s?-\s)",
    "abcdefgh": r"[(\[]?([a-h])\s?[)\]、](?=\s|$|\w)",
    "12345678": r"[(\[]?([1-8])(?:\s?[)\]、](?=\s|$|\w)|\.(?=\s))",
}


def choices(question):
    """The options of a question: "... A) Adenocarcinoma B. Sarcoma" -> {"A": "Adenocarcinoma", "B":
    "Sarcoma"}."""
    for labels, pattern in STYLES.items():
        marks = []  # A, B, C, ... in this order; a stray "protein B." inside an option is passed over
        for match in re.finditer(rf"(?<![!-~]){pattern}", question):
            if len(marks) < len(labels) and match[1] == labels[len(marks)]:
                marks.append(match)
        if len(marks) > 1:
            ends = [match.start() for match in marks[1:]] + [len(question)]
            return {m[1].upper(): question[m.end() : end].strip() for m, end in zip(marks, ends)}
    return {}


# An answer is read after every option that it names, by label or words, has become one private character.
OPTION = "[\ue000-\ue007]"
OPTIONS = rf"{OPTION}(?:(?:[\s,/&()\[\]:*\"'-]|\b(?:and|or|nor)\b)*{OPTION})*"  # one, or several in a row
REJECTING = r"(?i:\b(?:not|cannot|neither|nor|never|no|exclud\w+|rul\w+ out|rather than|instead of|unlike)\b|\w+n't\b)"
BETWEEN = r"(?:\s+(?!(?:doubt|only|but)\b)[\w'-]+){0,4}?[\s\"'(*\[]*"  # "not a typical A", not "no doubt: A"
REJECTED = r"""(?ix: \s+ (?:isn't | is\ (?:\w+\s)? (?:not|wrong|incorrect|false|unlikely|excluded|ruled\ out)
    | (?:can|could|may)\ be\ (?:excluded|ruled\ out) | cannot | can't | do(?:es)?n't | do(?:es)?\ not) \b)"""
SAYING = r"(?i:\b(?:answer|option|choice)\b(?:\s+(?:is|would be|should be))?)"
STATING = r"(?i:\b(?:(?:answer|option|choice)(?:\s+(?:is|would be|should be)\b|\s?:)|choose|select|pick)(?:\s+option)?)"


def mark_options(text, options):
    """The text with every option that it names, by its words or by its label, as a character of OPTION."""
    marks = {label: chr(0xE000 + i) for i, label in enumerate(options)}
    # The longest first: "adenocarcinoma" is in "mucinous adenocarcinoma".
    for label in sorted(options, key=lambda label: -len(options[label])):
        if words := re.escape(" ".join(options[label].split()).strip(".,; ")):
            text = re.sub(rf"(?<!\w){words}(?!\w)", marks[label], text, flags=re.I)
    labels = "".join(options)
    any_case, others = f"[{labels}{labels.lower()}]", re.sub(r"[\dA]", "", labels)
    # Capitals by themselves are options; an A before a small word is an article.
    alone = rf"A(?!\s+(?!(?:and|or|nor|is|because|since|as|but|due)\b)[a-z])|[{others}_]"
    for before, label, after in (
        (r"(^[^\w\ue000-\ue007]*)", any_case, r"(?=\s?[).:,\]、]|\s+-|\W*$)"),
        (r"([(\[])", any_case, r"(?=[)\]])"),
        (rf"({SAYING}\W*)", f"[{labels}]", r"(?!\w)"),
        (rf"({SAYING}\W*)", any_case, r"(?!\w|\s+[a-z])"),
        (r"(?<![\w'-])()", alone, r"(?![\w'-])"),
    ):
        text = re.sub(f"{before}({label}){after}", lambda m: m[1] + marks.get(m[2].upper(), m[2]), text)
    return re.sub(rf"({OPTION})(?:\W*\1)+", r"\1", text)  # "B. Sarcoma" names one option, once


def parse_choice(text, options):
    """The label that an answer chooses: "B", "(b)", "B. Sarcoma", "It is sarcoma."; None for none or several.

    What it says outright counts ("the answer is ..."), else what it begins with, else all that it names. An
    option that is rejected ("not A", "neither A nor B", "A is unlikely") is not chosen."""
    text = mark_options(" ".join(text.split()), options)
    text = re.sub(f"{REJECTING}{BETWEEN}{OPTIONS}", " ", text)
    text = re.sub(f"{OPTIONS}{REJECTED}", " ", text)
    stated = re.findall(rf"{STATING}[\s:*\"'(\[]*({OPTIONS})", text)
    first = re.findall(rf"^[^\w\ue000-\ue007]*({OPTIONS})", text)
    named = set(re.findall(OPTION, "".join(stated or first or text)))
    return list(options)[ord(named.pop()) - 0xE000] if len(named) == 1 else None


def parse_yes_no(text):
    """ "yes" or "no", None where an answer says neither at its start nor as "the answer is ..."."""
    said = r"(?:.*\banswer(?: is)?\b)?\W*(yes|no|true|false)\b(?!\W+(?:or|and|doubt)\b)"
    match = re.match(said, text.strip(), re.I | re.S)
    return match and {"true": "yes", "false": "no"}.get(match[1].lower(), match[1].lower())


@functools.lru_cache(1 << 16)  # asked for each system's answer
def closed_options(question, truth):
    """The options of a closed question, {label: text}; those of yes/no are "yes" and "no". {} for an open
    one."""
    options = choices(question)
    if options and parse_choice(truth, options):
        return options
    return {"yes": "Yes", "no": "No"} if re.fullmatch(r"\W*(yes|no|true|false)\W*", truth, re.I) else {}


def closed_parser(question, truth):
    """For a closed question, the function that reads its answers; None for an open one."""
    options = closed_options(question, truth)
    if "yes" in options:
        return parse_yes_no
    return functools.partial(parse_choice, options=options) if options else None


# ---- A model behind a server -------------------------------------------------------------------------------

LONGEST_WAIT = 600  # seconds that a server may ask us to wait; then the run stops instead
LONGEST_REPLY = 1 << 24  # bytes
PASSING = (408, 409, 425, 429)  # HTTP's errors that may pass, beside all from 500
# What reading a reply of another form raises.
UNUSABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def whole_lines(path):
    """A JSON lines file, if there is one, less half a last line that a kill left -> (its objects, their
    bytes)."""
    with reading(path, "not the JSON lines that sample.py writes; delete it, or name another, and run again"):
        data = path.read_bytes() if path.exists() else b""
        end = data.rfind(b"\n") + 1
        lines = [json.loads(line) for line in data[:end].splitlines()]
        objects = all(isinstance(line, dict) for line in lines)
        check(objects, f"{path}: not JSON lines of objects; name another")
        return lines, end


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: followed, it would take the API key to another host."""

    def redirect_request(self, *_):
        return None


OPENER = urllib.request.build_opener(NoRedirect)


def api_key():
    return os.environ.get("OPENAI_API_KEY", "").strip()


def without_key(text):
    """What a server says, less what it repeats of the key: errors are printed, and replies are kept."""
    return text.replace(api_key(), "***") if len(api_key()) > 7 else text  # shorter, it may be a word


def endpoint(where, url):
    """A flag's URL -> (that of chat completions, headers with the key). where: the flag and its value."""
    check(url.startswith(("http://", "https://")), f"{where}: begins with neither http:// nor https://")
    try:
        parts = urllib.parse.urlsplit(url)
        fine = parts.hostname and parts.port != 0 and re.fullmatch("[!-?A-~]+", url)  # no spaces, no user@
    except ValueError:
        fine = False
    check(fine, f"{where}: not a URL like https://api.openai.com/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    headers, key = {"Content-Type": "application/json"}, api_key()
    check(key.isascii() and key.isprintable(), "OPENAI_API_KEY: not a key; set it again")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    if key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        print(f"warning: {where}: OPENAI_API_KEY goes there unencrypted; use https", file=sys.stderr)
    return urllib.parse.urlunsplit(parts._replace(path=path, fragment="")), headers


def read_body(response, seconds):
    """A reply's bytes, less the key; they must end in time, however slowly they drip."""
    body, deadline = b"", time.monotonic() + seconds
    while chunk := response.read1(1 << 16):
        body += chunk
        if time.monotonic() > deadline or len(body) > LONGEST_REPLY:
            raise TimeoutError("its reply does not end")
    return without_key(body.decode("latin-1")).encode("latin-1")  # any bytes, there and back


def server_words(body):
    """What a server says in place of an answer: its JSON's error, or a page's text, in one line."""
    text = body.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except UNUSABLE:
        text = re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", text)
    return one_line(" ".join(str(text).split()))


def reply_text(body):
    """The text of a chat completion. Raises ValueError with the server's own words where there is none."""
    try:
        message = json.loads(body)["choices"][0]["message"]
        content = message.get("content") or message.get("reasoning_content") or ""
        if isinstance(content, list):  # of parts
            content = "".join(part.get("text") or "" for part in content)
        return str(content)
    except UNUSABLE:
        raise ValueError(f"no answer in its reply: {server_words(body)}") from None


class Server:
    """A model behind an OpenAI-compatible endpoint. Usable replies are kept in a file, under the hash of
    model and prompt: nothing is paid for twice, and an interrupted run goes on. flag: the one that named the
    url."""

    def __init__(self, flag, url, model, path, attempts=5, timeout=120.0, backoff=2.0):
        self.where, self.model = f"{flag} {url}", model
        self.attempts, self.timeout, self.backoff = attempts, timeout, backoff
        self.options = {"temperature": 0, "max_tokens": 4096}
        self.url, self.headers = endpoint(self.where, url)
        lines, end = whole_lines(path)
        with reading(path, "not the replies that sample.py keeps; delete it and run again"):
            self.replies = {line["key"]: str(line["reply"]) for line in lines}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.lock = open(path, "a", encoding="utf-8"), threading.Lock()  # noqa: SIM115
        os.truncate(path, end)
        self.problems = collections.Counter()  # why replies stayed unusable

    def post(self, messages):
        """One reply's text. What may pass is tried again, when the server says, or ever later. Raises OSError
        with the server's own words, and UserError for what no later question will pass either."""
        for attempt in range(self.attempts):
            body = json.dumps({"model": self.model, "messages": messages, **self.options}).encode()
            wait, nobody = self.backoff * 2**attempt, False
            try:
                request = urllib.request.Request(self.url, body, self.headers)
                with OPENER.open(request, timeout=self.timeout) as response:
                    return reply_text(read_body(response, self.timeout))
            except urllib.error.HTTPError as error:
                problem, told = self.refused(error)
                wait = wait if told is None else told
            except (http.client.InvalidURL, UnicodeError) as error:
                raise UserError(f"{self.where}: not a URL that can be asked ({one_line(error)})") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = getattr(error, "reason", error)
                nobody = isinstance(error, urllib.error.URLError) and not isinstance(reason, TimeoutError)
                problem = f"{type(error).__name__}: {one_line(reason)}"
            if attempt < self.attempts - 1:
                time.sleep(wait)
        check(not nobody, f"{self.where}: nobody answers there ({problem})")
        raise OSError(problem)

    def refused(self, error):
        """An HTTP error that may pass -> (what the server says, the seconds that it asks to wait, or None).
        Raises as post does for one that will not."""
        words, wait = "", None
        with contextlib.suppress(OSError, http.client.HTTPException):
            words = server_words(read_body(error, self.timeout))
        with contextlib.suppress(TypeError, ValueError):
            wait = float(error.headers.get("Retry-After"))
            wait = wait if 0 <= wait < math.inf else None
        problem = without_key(f"HTTP {error.code} {error.reason}: {words}".rstrip(": "))
        if 300 <= error.code < 400:
            location = without_key(one_line(error.headers.get("Location")))
            raise UserError(f"{self.where}: redirects to {location}; name that instead")
        mine = error.code in (401, 403, 404)
        check(not mine, f"{self.where}: {problem}; check it, the model, OPENAI_API_KEY")
        later = f"asks to wait for {wait or 0:,.0f} s; run the same command then, it goes on"
        check((wait or 0) <= LONGEST_WAIT, f"{self.where}: {later}")
        unknown = [name for name in self.options if error.code == 400 and name in words]
        if unknown:  # newer models want no max_tokens, or no temperature
            self.options = {name: x for name, x in self.options.items() if name not in unknown}
            return problem, 0
        if error.code not in PASSING and error.code < 500:
            raise OSError(problem)
        return problem, wait

    def ask(self, messages, read):
        """read(a reply's text), asking again with the reason where it raises; None where it stays unusable."""
        key = hashlib.sha256(json.dumps([self.model, messages, 0]).encode()).hexdigest()
        if key in self.replies:
            with contextlib.suppress(*UNUSABLE):
                return read(self.replies[key])
        for _ in range(self.attempts):
            try:
                reply = self.post(messages)
                answer = read(reply)
            except OSError as error:
                problem = str(error)
                break
            except UNUSABLE as error:
                problem = f"unusable ({type(error).__name__}: {one_line(error)})"
                more = f"Your reply is {problem}. Reply again, in the form that was asked for alone."
                messages = messages + [{"role": "assistant", "content": reply}]
                messages = messages + [{"role": "user", "content": more}]
            else:
                with self.lock, wsi_llava.writing(self.file.name):
                    self.replies[key] = reply
                    self.file.write(json.dumps({"key": key, "reply": reply}) + "\n")
                    self.file.flush()
                return answer
        self.problems[problem] += 1
        return None

    def reasons(self):
        return "".join(f"; {n} times: {problem}" for problem, n in self.problems.most_common(3))


def in_parallel(work, items, n):
    """Yields work(item) of each, n at once, in order. Ctrl-C: what was asked is kept, what waits is not
    asked."""
    pool = concurrent.futures.ThreadPoolExecutor(n)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


# ---- Many questions ----------------------------------------------------------------------------------------

# Of a line of --predictions, the fields that hold answers -> their columns in the tables.
FIELDS = {"answer": "model", "answer_no_image": "no slide", "answer_shuffled": "other slide"}
AT_ONCE = 64  # slides that are asked about together; with more, more questions of one length meet


def slides_of(row):
    """The id of the slide that a row is about, in a list."""
    return row["slide"] if isinstance(row["slide"], list) else [row["slide"]]


def all_slides(rows):
    """The slides that rows are about, each once."""
    return list(dict.fromkeys(itertools.chain(*map(slides_of, rows))))


def some(names):
    """The first of many names."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:5] + ["..."] if len(names) > 5 else names)


def read_questions(files, data=None):
    """Question files in any shape that prepare.read_qa takes -> one row for each human turn, numbered by "n".

    data: slides there are found by the beginnings of their names. What a file says is for training is left
    out."""
    kept, rows = [], []
    for file in files:
        kept += [row for row in prepare.read_qa(file) if row.pop("split", None) != "train"]
    check(kept, f"{some(map(str, files))}: only questions for training; name a file of test questions")
    if data:
        paths = itertools.chain(data.glob("features/*.safetensors"), data.glob("visual_tokens/*.safetensors"))
        kept = prepare.match_slides(kept, {path.stem for path in paths})
    for row in kept:
        talk = row["conversations"]
        for k in range(0, len(talk), 2):
            texts = {"question": wsi_llava.without_image(talk[k]["value"]), "truth": talk[k + 1]["value"]}
            rows.append({"n": len(rows), **row, "turn": k // 2, **texts, "conversations": talk[: k + 1]})
    return rows


def by_length(prompts, batch):
    """Indices of the prompts in groups of one length: no batch holds padding, every answer is what it is
    alone."""

    def length(i):
        return len(prompts[i]), prompts[i].count(IMAGE_TOKEN)

    for _, group in itertools.groupby(sorted(range(len(prompts)), key=length), length):
        group = list(group)
        for start in range(0, len(group), batch):
            yield group[start : start + batch]


def prompt_ids(tokenizer, row, image=True):
    """The prompt of a row's last question, after the true earlier turns; its slide comes first, or not at
    all."""
    turns = row["conversations"][:-1] if row["conversations"][-1]["from"] == "gpt" else row["conversations"]
    return tokenizer.encode_chat(wsi_llava.slide_first(turns, image))[0]


def tokens_of(rows, visual):
    """The rows' visual tokens out of {slide: [V,C]} -> a list of [V,C]; None without."""
    if visual is None:
        return None
    same = len({visual[slide].shape for slide in all_slides(rows)}) == 1
    check(same, "data/visual_tokens: the slides have different numbers of them; import them anew")
    return [visual[row["slide"]] for row in rows]


def answer_rows(model, tokenizer, rows, visual, max_new_tokens=96, batch=64, **options):
    """Answers to the last question of each row of the dataset, in the rows' order. options: generate's.

    visual: {slide: visual tokens [V,C]}, or None to ask without the slide."""
    prompts = [prompt_ids(tokenizer, row, visual is not None) for row in rows]
    answers, options = [None] * len(rows), options | {"ends": tokenizer.ends}
    for group in by_length(prompts, batch):
        slides = tokens_of([rows[i] for i in group], visual)
        steps = model.generate(slides, [prompts[i] for i in group], max_new_tokens, **options)
        for i, ids in zip(group, zip(*steps)):
            answers[i] = tokenizer.decode([t for t in ids if t is not None and t not in tokenizer.ends])
    return answers


def ask_group(model, tokenizer, rows, visual, args):
    """Rows of equally long prompts -> their answers by one view, a dict each. visual: as for answer_rows."""
    try:
        texts = answer_rows(model, tokenizer, rows, visual, args.max_new_tokens, args.batch_size)
    except UserError as error:  # the prompt is too long, of all of them
        return [{"answer": "", "error": str(error)} for _ in rows]
    except torch.OutOfMemoryError:
        hint = "out of memory; the same command with a smaller one goes on"
        raise UserError(f"--batch-size {args.batch_size}: {hint}") from None
    return [{"answer": text} for text in texts]


def ask_here(args, model, tokenizer, tokens, rows, views):
    """Yields (row, its answers) of all rows, by our model. tokens: a slide's name -> its visual tokens.
    views: {field: {slide: the one to show in its place}, or None for no slide}."""
    names = all_slides(rows)
    for k in range(0, len(names), AT_ONCE):
        near = set(names[k : k + AT_ONCE])
        part = [row for row in rows if slides_of(row)[0] in near]
        for group in by_length([prompt_ids(tokenizer, row) for row in part], args.batch_size):
            started, group = time.time(), [part[i] for i in group]
            found = [{} for _ in group]
            for field, instead in views.items():
                visual = instead and {slide: tokens(instead[slide]) for slide in all_slides(group)}
                for answers, new in zip(found, ask_group(model, tokenizer, group, visual, args)):
                    answers |= new if field == "answer" else {field: new["answer"]}
            cost = {"seconds": round((time.time() - started) / len(group), 4)}
            cost["peak_memory"] = wsi_llava.peak_memory(args.device)
            for row, answers in zip(group, found):
                yield row, answers | cost


def read_predictions(path):
    """-> (settings, {n: row}). Of a question that was missing first and answered later, the later row
    counts."""
    lines, _ = whole_lines(path)
    ours = lines and isinstance(lines[0].get("settings"), dict)
    check(ours, f"{path}: no predictions of sample.py --qa FILE, whose first line would hold the settings")
    with reading(path, "not what sample.py --qa writes; name another"):
        return lines[0]["settings"], {row["n"]: row for row in lines[1:]}


def open_predictions(path, settings):
    """A file to append to, new or gone on with -> (file, {n: row} so far). Raises UserError for other
    settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path, '{"settings"')
    if not whole_lines(path)[0]:
        write_text(path, json.dumps({"settings": settings}) + "\n")
    old, rows = read_predictions(path)
    for name, value in settings.items():
        same = old.get(name) == value
        check(same, f"{path} was made with {name} {old.get(name)}, not {value}; name another --predictions")
    os.truncate(path, whole_lines(path)[1])
    return open(path, "a", encoding="utf-8"), rows


def shown(args, slides):
    """{field: {slide: the one to show in its place}, or None for no slide} of what is asked of every
    question."""
    views = {"answer": dict(zip(slides, slides))}
    if args.baselines:  # everyone gets another's slide, unless there is only one
        order = np.random.default_rng(args.seed).permutation(slides).tolist()
        views |= {"answer_no_image": None, "answer_shuffled": dict(zip(order, order[1:] + order[:1]))}
    return views


def write_prediction(file, row, answers):
    """A line of --predictions: the row, less its conversation, and what was answered."""
    row = {k: v for k, v in row.items() if k != "conversations"} | answers
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()
    gone = os.fstat(file.fileno()).st_nlink == 0
    check(not gone, f"{file.name}: deleted while it was written, so its answers are lost; run again")


def answer_into(args, path, rows, settings, problems, ask):
    """Asks what a file of predictions does not hold yet, and appends the answers, a line each, after a line
    of settings. problems: {slide: why it cannot be asked about}. ask(rows, views): as ask_here."""
    slides = all_slides(rows)
    file, done = open_predictions(path, settings)
    todo = [row for row in rows if done.get(row["n"], {}).get("answer") is None]
    lacking = [row for row in todo if problems.keys() & set(slides_of(row))]
    askable = [row for row in todo if not problems.keys() & set(slides_of(row))]
    ways = " three ways," if args.baselines else ""
    print(
        f"{len(rows):,} questions about {len(slides):,} slides, {len(problems):,} of which are not prepared; "
        f"{len(rows) - len(todo):,} are answered. Asks the others{ways} into {path}."
    )
    failed, started = collections.defaultdict(list), time.time()
    bar = tqdm(total=len(askable), unit="question", disable=not askable)
    with wsi_llava.writing(path), file, bar:
        for row in lacking:
            why = next(problems[slide] for slide in slides_of(row) if slide in problems)
            failed["are about slides that are missing"].append(slides_of(row)[0])
            if row["n"] not in done:
                write_prediction(file, row, {"answer": None, "missing": why})
        for row, answers in ask(askable, shown(args, [slide for slide in slides if slide not in problems])):
            write_prediction(file, row, answers)
            bar.update()
            if "error" in answers:
                failed["were too long to ask"].append(slides_of(row)[0])
            elif answers["answer"] is None:
                failed["got no answer"].append(f"{slides_of(row)[0]} ({answers['missing']})")
    answered = len(todo) - sum(map(len, failed.values()))
    rate = answered / max(time.time() - started, 1e-9)
    print(f"Answered {answered:,} questions, {rate:.1f}/s, peak memory {gigabytes(args)}.")
    for what, names in failed.items():
        print(f"{len(names):,} questions {what}: {some(names)}")


def answer_file(args):
    """--qa: every question of the files -> --predictions. Resumes by itself. Greedy, so that a table can be
    made again. Of a dialogue every question is asked, after the true earlier answers."""
    check(not args.temperature, "--temperature: --qa answers greedily, so that its table can be made again")
    rows = read_questions(args.qa, args.data)
    settings = {"questions": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}
    settings |= {"baselines": args.baselines, "seed": args.seed}
    model, tokenizer = load_model(args, wsi_llava.read_meta(args.data))
    settings |= {"model": wsi_llava.fingerprint(model), "dtype": str(args.dtype)}
    settings |= {"max_new_tokens": args.max_new_tokens, "max_tiles": model.cfg.max_tiles}
    problems = {slide: why for slide in all_slides(rows) if (why := why_missing(model.cfg, args.data, slide))}
    good = [slide for slide in all_slides(rows) if slide not in problems]
    bar = functools.partial(tqdm, desc="visual tokens", unit="slide", disable=not good)
    problems |= wsi_llava.cache_visual_tokens(model, args.data, good, bar)[1]
    cached = functools.lru_cache(4 * AT_ONCE)
    tokens = cached(lambda slide: wsi_llava.read_visual_tokens(args.data, slide, model.cfg))
    ask = functools.partial(ask_here, args, model, tokenizer, tokens)
    answer_into(args, args.predictions, rows, settings, problems, ask)


# ---- Text metrics, as the released evaluation takes them: of one answer, then the mean over answers --------


def tokenize(text):
    """Words and punctuation, in their own case: what nltk.word_tokenize makes of 99.5% of WSI-Bench's
    answers."""
    return re.findall(r"\w+(?:[-./+=,]+\w+)*\+?|'\w+|[^\w\s]", text)


def bleu(reference, candidate):
    """Tokens -> [BLEU-1, ..., BLEU-4] of one sentence with nltk's smoothing method 4 (Chen and Cherry
    2014)."""

    def ngrams(tokens, n):
        return collections.Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    length, logs, empty = len(candidate), [], 0
    for n in range(1, 5):
        have = ngrams(candidate, n)
        match, total = (have & ngrams(reference, n)).total(), max(1, have.total())
        if n == 1 and not match:
            return [0.0] * 4
        if not match and length > 1:  # the more orders lack one, the shorter the answer, the less it counts
            empty += 1
            match = math.log(length) / (5 * 2**empty)
        logs.append(math.log(match / total) if match else 0.0)  # nltk leaves an order without any n-gram out
    brevity = min(0.0, 1 - len(reference) / length)
    return [math.exp(brevity + sum(logs[:n]) / n) for n in range(1, 5)]


def common_words(x, y):
    """The words of a longest common subsequence of x and y."""
    table = [[0] * (len(y) + 1)]
    for a in x:
        above, row = table[-1], [0]
        for j, b in enumerate(y):
            row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
        table.append(row)
    words, i, j = set(), len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            words.add(x[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def rouge_l(reference, candidate):
    """Tokens -> ROUGE-L's F as the `rouge` package has it: over sets of words, all sentences' subsequences
    united."""
    sides = []
    for tokens in (reference, candidate):
        sentences = [" ".join(s.split()).split(" ") for s in " ".join(tokens).split(".") if s]
        sides.append((sentences, set(itertools.chain(*sentences))))
    (references, all_reference), (candidates, all_candidate) = sides
    if not candidates or not references:
        return 0.0
    common = set()
    for r, c in itertools.product(references, candidates):
        common |= common_words(r, c)
    recall, precision = len(common) / len(all_reference), len(common) / len(all_candidate)
    return 2 * precision * recall / (precision + recall + 1e-8)


def find_meteor():
    """METEOR of (reference, candidate) tokens, where nltk and its WordNet are installed; else None."""
    try:
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import single_meteor_score

        wordnet.ensure_loaded()
    except (ImportError, LookupError):
        return None
    return single_meteor_score


# ---- The judge: WSI-Precision and WSI-Relevance ------------------------------------------------------------

JUDGED = ("WSI-Precision", "WSI-Relevance")
SCALE = (1, 0.7, 0.3, 0)
CLAIMS = """You prepare the grading of answers to questions about whole slide pathology images. Split the given \
answer into claims. {scope}One finding or fact a claim, but keep together what only makes sense together; leave \
nothing out, repeat nothing, add nothing. Reply with strict JSON alone: {{"claims": ["...", "..."]}}"""
SCORES = """You grade claims about a whole slide pathology image against a text, both of which answer the same \
question. Give each claim one score. 1: the text says the same. 0.7: mostly the same, with a small omission or \
deviation. 0.3: the text mentions it, but with an error in its core, such as the grade, the type or whether it is \
malignant. 0: the text says something else{silent} Reply with strict JSON alone, one score a claim, in the claims' \
order: {{"scores": [1, 0.3]}}"""
SCOPE = "Take what answers the question and nothing else. "
SILENT = SCORES.format(silent=", or nothing about it.")
NULL = SCORES.format(silent=". null, in place of a score: the text says nothing about it.")
# What --judge-protocol switches in the texts; Judge.score has the rest.
PROMPTS = {
    "ours": {"claims": CLAIMS.format(scope=SCOPE), "precision": SILENT, "relevance": SILENT},
    "authors": {"claims": CLAIMS.format(scope=""), "precision": SILENT, "relevance": NULL},
}


def last_json(text, read):
    """read(the last JSON in the text that it can read): models think aloud, fence their JSON, or say it
    twice."""
    decoder, place, found, problem = json.JSONDecoder(), 0, None, ValueError("holds no JSON")
    while start := re.compile(r"[\[{]").search(text, place):
        place = start.end()
        with contextlib.suppress(json.JSONDecodeError):
            value, place = decoder.raw_decode(text, start.start())
            try:
                found = read(value)
            except UNUSABLE as error:
                problem = error
    if found is None:
        raise problem
    return found


def listed(reply, name):
    """The list in a reply: {"claims": [...]} or [...], its items bare or {"claim": ..., "explanation":
    ...}."""
    items = reply[f"{name}s"] if isinstance(reply, dict) else reply
    items = items if isinstance(items, list) else []
    return [item[name] if isinstance(item, dict) else item for item in items]


def check_claims(reply, least):
    """The judge's claims, at least so many. Raises KeyError or ValueError for a reply of another form."""
    claims = listed(reply, "claim")
    if len(claims) < least or not all(isinstance(claim, str) and claim.strip() for claim in claims):
        raise ValueError(f'"claims" must be a list of {least} texts or more')
    return claims


def check_scores(reply, n, silence=False):
    """The judge's scores of n claims, texts of numbers too. silence: null is one. Raises as check_claims
    does."""
    scores = listed(reply, "score")
    if len(scores) != n:
        raise ValueError(f'"scores" must be a list of {n} numbers, one for each claim')
    for i, score in enumerate(scores):
        with contextlib.suppress(ValueError):
            scores[i] = float(score) if isinstance(score, str) else score
        if isinstance(score, bool) or not (scores[i] in SCALE or (silence and score is None)):
            raise ValueError(f"{score} is not on the scale; only 1, 0.7, 0.3 and 0 are")
    return scores


class Judge(Server):
    """A server that grades. protocol: "authors" differs in what it is shown and in what counts (see
    score)."""

    def __init__(self, *where, protocol="ours", **options):
        super().__init__("--judge-url", *where, **options)
        self.authors, self.prompts = protocol == "authors", PROMPTS[protocol]

    def ask_json(self, prompt, content, read):
        content = json.dumps(content, ensure_ascii=False)
        messages = [{"role": "system", "content": prompt}, {"role": "user", "content": content}]
        return self.ask(messages, lambda reply: last_json(reply, read))

    def score(self, question, claimed, text, metric):
        """The mean score of one side's claims against the other's text; None where nothing usable came
        back."""
        if not claimed.strip() or not text.strip():
            return 0.0
        content = {"question": question, "answer": claimed}
        if self.authors and metric == "precision":  # the truth is split by itself
            del content["question"]
        read = functools.partial(check_claims, least=metric == "precision")  # an answer may claim nothing
        claims = self.ask_json(self.prompts["claims"], content, read)
        if not claims:
            return None if claims is None else 0.0
        content = {"question": question, "claims": claims, "text": text}
        silence = self.authors and metric == "relevance"  # what the truth does not address is left out
        read = functools.partial(check_scores, n=len(claims), silence=silence)
        scores = self.ask_json(self.prompts[metric], content, read)
        scores = [score for score in scores or () if score is not None]
        return float(np.mean(scores)) if scores else None

    def grade(self, question, answer, truth):
        """-> {"WSI-Precision": claims of the truth, scored against the answer; "WSI-Relevance": the other way
        round}: each the mean over its claims, None where the replies stayed unusable."""
        sides = (truth, answer, "precision"), (answer, truth, "relevance")
        return {metric: self.score(question, *side) for metric, side in zip(JUDGED, sides)}


def find_judge(args, path):
    """The Judge that the flags name, with its replies so far in the file; None where they name none."""
    if not args.judge_model:
        return None
    return Judge(args.judge_url, args.judge_model, path, protocol=args.judge_protocol)


def grade_rows(judge, rows, systems, n):
    """Adds "grades" {system: Judge.grade's} to the rows, n of them at once."""

    def work(row):
        for system in systems:
            row["grades"][system] = judge.grade(row["question"], row["answers"][system], row["truth"])

    graded = in_parallel(work, rows, n)
    for _ in tqdm(graded, total=len(rows), desc="judge", unit="question"):
        pass


# ---- Several systems' answers to the same questions --------------------------------------------------------

# What others call what we call so, the surest first: the scripts of LLaVA, WSI-LLaVA and SlideChat.
THEIRS = {"id": "id question_id qid", "slide": "slide image", "question": "question prompt"}
THEIRS |= {"task": "task metadata", "answer": "output text prediction answer", "truth": "truth t-answer"}


def read_table(path):
    """A CSV, of whatever spreadsheet, -> its rows as dicts."""
    with reading(path, "not a CSV that can be read; save it as CSV (UTF-8) again"):
        text = path.read_text(encoding="utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows.fieldnames = [name.strip().lower() for name in rows.fieldnames]
        return list(rows)


def csv_text(rows):
    """Rows of cells -> a CSV. A text that a spreadsheet would take for a formula gets an apostrophe before
    it."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for row in rows:
        formulas = [isinstance(cell, str) and cell.startswith(tuple("=+-@\t\r")) for cell in row]
        writer.writerow(["'" + cell if formula else cell for cell, formula in zip(row, formulas)])
    return file.getvalue()


def own_names(row):
    """A row of anybody's predictions -> the same under our names; what it does not hold is None or an empty
    text."""
    # Ours keep their names; of others' names the surest counts.
    row = {key.strip().lower(): value for key, value in row.items()}
    found = dict.fromkeys(("n", "turn")) | row
    for name, theirs in THEIRS.items():
        found[name] = next((row[key] for key in theirs.split() if row.get(key) is not None), None)
    if found["truth"] is None and found["answer"] is not row.get("answer"):
        found["truth"] = row.get("answer")  # the truth, where another column holds what the system said
    if "n" not in row and found["slide"]:  # not ours: files, in folders of their cancer type
        slides = found["slide"] if isinstance(found["slide"], list) else [found["slide"]]
        found["cancer"] = row.get("cancer") or slides[0].rpartition("/")[0]
        found["slide"] = [prepare.slide_id(slide) for slide in slides]
    for name in ("id", "truth", "task", "cancer", *FIELDS):
        if found.get(name) is not None:
            found[name] = str(found[name])
    for name in ("question", "slide", "task", "cancer"):
        found[name] = found.get(name) or ""
    numbered = found["n"] is None or type(found["n"]) is int
    if not numbered or not all(isinstance(slide, str) for slide in slides_of(found)):
        given = f"{found['slide']}, {found['n']}"
        raise ValueError(f"its slide or number is of another type than expected: {given}")
    return found | {"question": wsi_llava.without_image(found["question"])}


def read_answers(path):
    """Anybody's predictions -> (our settings or {}, rows under our names)."""
    settings = {}
    with reading(path, "expected predictions: of sample.py --qa, JSON lines, a JSON list or a CSV"):
        if path.suffix.lower() == ".csv":
            rows = read_table(path)
        elif path.read_bytes().startswith(b'{"settings"'):
            settings, found = read_predictions(path)
            rows = [found[n] for n in sorted(found)]
        else:
            rows = [entry for _, entry in prepare.read_entries(path)]
    with reading(path, "expected an id, or slide and question, and an answer in every row"):
        rows = [own_names(row) for row in rows]
    check(rows, f"{path}: holds no answers")
    return settings, rows


def keys_of(settings, row):
    """What a question can be known by, the surest first; what lacks a part of a key is not known by it."""
    question, slide = plain(row["question"]), " + ".join(slides_of(row))
    ours = str(settings.get("questions") or "")
    keys = ("n", ours, row["n"]), ("all", row["id"], slide, row["task"], question)
    keys += ("question", row["id"], question), ("slide", slide, question), ("id", row["id"])
    return [key for key in keys if None not in key and "" not in key]


def index_rows(settings, rows):
    """{key: the rows that it fits}."""
    index = collections.defaultdict(list)
    for row in rows:
        for key in keys_of(settings, row):
            index[key].append(row)
    return index


def find_row(index, settings, row):
    """The one row of the index that is the same question; None where none or several are."""
    return next((index[key][0] for key in keys_of(settings, row) if len(index.get(key, ())) == 1), None)


def read_systems(paths):
    """Files of predictions -> (settings, rows, systems, notes). The questions are the first file's; a row's
    "answers" are {system: text, or None}. A system is a file, or of a single one a field."""
    settings, rows = read_answers(paths[0])
    what = "lacks questions and true answers, so it cannot come first; name one of --qa before it"
    check(all(row["question"] and row["truth"] for row in rows), f"{paths[0]}: {what}")
    for row in rows:
        row |= {"answers": {}, "grades": {}, "scores": {}}
    index, systems, notes, stems = index_rows(settings, rows), [], [], [path.stem for path in paths]
    for path in paths:
        about, theirs = (settings, rows) if path == paths[0] else read_answers(path)
        stem, lost = str(path) if stems.count(path.stem) > 1 else path.stem, []
        names = {"answer": stem} | {field: f"{stem}, {FIELDS[field]}" for field in list(FIELDS)[1:]}
        present = set().union(*theirs)
        names = {field: name for field, name in names.items() if field in present}
        if len(paths) == 1:
            names = {field: FIELDS[field] for field in names}
        # Each answer goes to the one question that it can be matched with.
        for row in theirs:
            own = find_row(index, about, row)
            if own is None:
                lost.append(row["id"] or f"{row['slide']}: {row['question'][:60]}")
            else:
                own["answers"] |= {name: row.get(field) for field, name in names.items()}
        if lost:
            notes.append(f"{path}: {len(lost):,} rows match no question, or several: {some(lost)}.")
        for name in names.values():
            absent = sum(row["answers"].get(name) is None for row in rows)
            if absent:
                notes.append(f"{name}: {absent:,} of {len(rows):,} questions not answered.")
        systems += names.values()
    return settings, rows, systems, notes


def answered_by_all(rows, systems):
    return [row for row in rows if None not in map(row["answers"].get, systems)]


def read_training(path):
    """data/qa/train.jsonl -> ({cancer type: its slides}, {task: its most frequent answer}), empty without
    it."""
    slides, answers = collections.defaultdict(set), collections.defaultdict(collections.Counter)
    if path.exists():
        with reading(path, "prepare.py --qa writes it again"), open(path, encoding="utf-8") as file:
            for row in map(json.loads, file):
                slides[row.get("cancer") or ""].update(slides_of(row))
                answers[row["task"]].update(turn["value"] for turn in row["conversations"][1::2])
    return slides, {task: counts.most_common(1)[0][0] for task, counts in answers.items() if counts}


# ---- Statistics --------------------------------------------------------------------------------------------


@functools.lru_cache(8)
def resampled(n, seed):
    """How often each of n slides is drawn in 1,000 bootstrap samples, [1000,n]."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), 1000).astype(float)


def interval(values, slides, seed):
    """Mean, and the 95% bootstrap interval over slides: a slide's questions stand and fall together. A value
    that is not a number is left out."""
    known = ~np.isnan(values)
    _, index = np.unique(slides, return_inverse=True)
    sums, counts = np.bincount(index, np.where(known, values, 0)), np.bincount(index, known)
    draws = resampled(len(sums), seed)
    with np.errstate(invalid="ignore"):
        means = (draws @ sums) / (draws @ counts)
    return [float(x) for x in (sums.sum() / counts.sum(), *np.nanpercentile(means, [2.5, 97.5]))]


def paired(values, first, slides, seed):
    """A system's values [n] beside the first system's on the same questions (None: this is the first) -> what
    a Line says of them."""
    found = dict(zip(("mean", "low", "high"), interval(values, slides, seed)))
    if first is not None and not np.isnan(values - first).all():
        difference = interval(values - first, slides, seed)
        found |= dict(zip(("difference", "difference_low", "difference_high"), difference))
    return found


def spearman(x, y):
    """Rank correlation; ties share their mean rank. Not a number where one side is constant."""

    def ranks(values):
        _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[index]

    x, y = (r - r.mean() for r in map(ranks, (x, y)))
    return float((x @ y) / math.sqrt((x @ x) * (y @ y))) if x.any() and y.any() else math.nan


# ---- The tables --------------------------------------------------------------------------------------------

CAPABILITIES = {  # of WSI-Bench's 11 tasks, under the names of both of its shapes
    "morphology": "Global_Morphology_Description Key_Diagnostic_Description Regional_Structure_Description "
    "Specific_Feature_Description Morphology_choice Caption Feature Morphology cellular infiltration tissue",
    "diagnosis": "Histological_Typing Grading Molecular_Subtyping Molecular_Subtyping_choice Staging "
    "Staging_choice Diagnosis_choice Classification Grade Subtype Stage",
    "treatment": "Treatment_Planing Treatment_Planning Treatment Prognosis Prognosis_TF_question",
}
CAPABILITY = {task: name for name, tasks in CAPABILITIES.items() for task in tasks.split()}
NLU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "METEOR")  # of open answers, by their text
METRICS = (*JUDGED, "accuracy", *NLU, "exact match")
BRIEF = ("average", *JUDGED, "accuracy", "BLEU-1", "ROUGE-L", "exact match")  # on the screen
# WSI-LLaVA's (arXiv 2412.02141), in the order of METRICS. Its accuracies are confirmed by MLLM-HWSI (CVPR
# 2026). Its BLEU to METEOR of reports are left out: other papers give systems on the same reports two and
# three times as much.
PUBLISHED = {"morphology": (0.488, 0.610, 0.951), "diagnosis": (0.610, 0.612, 0.863)}
PUBLISHED |= {"treatment": (0.810, 0.845, 1.0), "report": (0.380, 0.429)}
AVERAGE = 0.754  # of the nine figures of the three capabilities
KINDS = ("all", "capability", "task", "cancer type")  # what a line of the tables is about
MAJORITY = "majority"  # the system that gives each task's most frequent answer in training


@dataclasses.dataclass
class Line:
    """A line of the tables: one metric of one system on one group of questions."""

    kind: str
    group: str
    metric: str
    system: str
    questions: int = 0  # that every system answered
    missing: int = 0  # the others
    unusable: int = 0  # answers, or grades of the judge
    slides: int | None = None  # of a cancer type, in training
    mean: float | None = None
    low: float | None = None  # 95% interval over slides
    high: float | None = None
    difference: float | None = None  # from the first system, on the same questions
    difference_low: float | None = None
    difference_high: float | None = None
    published: float | None = None


def score_answer(row, answer, meteor=None, by_text=True):
    """{metric: value} of an answer to a row's question; None of a closed answer that names no choice, or
    several."""
    parser = closed_parser(row["question"], row["truth"])
    if parser:
        said = parser(answer)
        return {"accuracy": None if said is None else float(said == parser(row["truth"]))}
    found, truth, tokens = {}, tokenize(row["truth"]), tokenize(answer)
    if by_text:
        found |= dict(zip(NLU, [*bleu(truth, tokens), rouge_l(truth, tokens)]))
        found |= {"METEOR": meteor(truth, tokens)} if meteor else {}
    return found | {"exact match": float(same_answer(answer, row["truth"]))}


def score_row(row, systems, meteor):
    """Adds "scores" {system: {metric: value}} to a row; a value is None where an answer or a grade is
    unusable."""
    for system in systems:
        answer, found = row["answers"].get(system), row["scores"].setdefault(system, {})
        if answer is not None:
            found |= score_answer(row, answer, meteor, by_text=system != MAJORITY)
            found |= row["grades"].get(system, {})


def compare(rows, metric, systems, left_out, seed):
    """{system: what a Line says of its values of a metric}, of rows that have it. left_out: what is unusable
    counts for nothing, and not as 0."""
    found, first, slides = {}, None, [" + ".join(slides_of(row)) for row in rows]
    for system in systems:
        scores = [row["scores"].get(system, {}).get(metric, math.nan) for row in rows]
        nothing = math.nan if left_out else 0.0
        values = np.array([nothing if score is None else score for score in scores], float)
        if not np.isnan(values).all():
            found[system] = {"unusable": scores.count(None)} | paired(values, first, slides, seed)
        first = values if system == systems[0] else first
    return found


def tabulate(rows, systems, training, args):
    """Scored rows -> Lines, one for each group, metric and system. training: {cancer type: its slides}."""
    # Every row belongs to a group of each kind.
    groups, lines = collections.defaultdict(list), []
    for row in rows:
        capability = "report" if wsi_llava.is_report(row) else CAPABILITY.get(row["task"], "other")
        for key in zip(KINDS, ("all", capability, row["task"], row["cancer"])):
            groups[key].append(row)
    several = collections.Counter(kind for kind, _ in groups)
    for kind, group in sorted(groups, key=lambda key: (KINDS.index(key[0]), key[1])):
        if kind != "all" and several[kind] == 1:  # it would say the same once more
            continue
        members, facts = groups[kind, group], {}
        facts["slides"] = len(training.get(group, ())) if kind == "cancer type" and training else None
        published = dict(zip(METRICS, PUBLISHED.get(group, ()))) if kind == "capability" else {}
        unanswered = [row for row in members if not row["scores"]]
        closed = [bool(closed_parser(row["question"], row["truth"])) for row in unanswered]
        # A line for each system and each metric that any row of the group has.
        for metric in METRICS:
            chosen = [row for row in members if metric in set().union(*row["scores"].values())]
            facts |= {"questions": len(chosen), "missing": closed.count(metric == "accuracy")}
            facts["published"] = published.get(metric)
            left_out = metric in JUDGED and args.judge_protocol == "authors"
            found = compare(chosen, metric, systems, left_out, args.seed) if chosen else {}
            for system, values in found.items():
                lines.append(Line(kind, group, metric, system, **facts, **values))
    return [*averages(lines, systems), *lines]


def averages(lines, systems):
    """The mean of the nine figures of the three capabilities, of every system that has them."""
    for system in systems:
        nine = [line for line in lines if line.system == system and line.group in CAPABILITIES]
        nine = [line for line in nine if line.metric in METRICS[:3]]
        if len(nine) == 9:
            line = Line("all", "all", "average", system, published=AVERAGE)
            line.mean = float(np.mean([x.mean for x in nine]))
            for name in ("questions", "missing", "unusable"):
                setattr(line, name, sum(getattr(x, name) for x in nine))
            yield line


def markdown(header, rows):
    """A Markdown table whose columns are aligned, to be read as it is."""
    table = []
    for row in (header, *rows):
        table.append([one_line("" if cell is None else cell).replace("|", "\\|") for cell in row])
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table)


def with_interval(mean, low, high, sign=""):
    return f"{mean:{sign}.3f}" + ("" if low is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]")


def side_by_side(lines, systems, difference=False):
    """Lines -> a Markdown table with a column a system: the means, or the differences from the first system.
    A column that says nothing in any row is left out."""
    groups, rows = collections.defaultdict(dict), []
    for line in lines:
        groups[line.kind, line.group, line.metric][line.system] = line
    facts = [] if difference else ["questions", "missing", "unusable", "slides"]
    header = ["kind", "group", "metric", *facts, *systems, *([] if difference else ["published"])]
    for key, found in groups.items():
        cells, line = [], next(iter(found.values()))
        for system in systems:
            x = found.get(system)
            if x is None or (difference and x.difference is None):
                cells.append("n/a")
            elif difference:
                cells.append(with_interval(x.difference, x.difference_low, x.difference_high, "+"))
            else:
                cells.append(with_interval(x.mean, x.low, x.high))
        unusable = [x.unusable for x in found.values()]
        if not difference:
            unusable = ", ".join(map(str, unusable)) if any(unusable) else None
            cells = [line.questions, line.missing or None, unusable, line.slides, *cells, line.published]
        rows.append([*key, *cells])
    columns = [column for column in zip(header, *rows) if set(column[1:]) != {None}]
    header, *rows = zip(*columns)
    return markdown(header, rows)


def correlations(rows, systems):
    """Whether the text metrics tell what the judge tells: rank correlations."""
    scored = [row["scores"][system] for row in rows for system in systems if system in row["scores"]]
    for target in JUDGED:
        rated, found = [scores for scores in scored if scores.get(target) is not None], []
        for metric in (*NLU, "exact match", *JUDGED):
            pairs = [(scores[metric], scores[target]) for scores in rated if scores.get(metric) is not None]
            if len(pairs) > 2 and metric != target:
                found.append(f"{metric} {spearman(*map(np.array, zip(*pairs))):.2f} ({len(pairs)})")
        if found:
            yield f"Rank correlation with {target} (answers): {', '.join(found)}."


def describe_scores(rows, first, judge, args):
    """Notes on what was scored: closed answers that name no choice, and the judge. first: a system."""
    unread = [row for row in rows if row["scores"][first].get("accuracy", 0) is None]
    if unread:
        few = "; ".join(f"{row['id']}: {one_line(row['answers'][first], 60)!r}" for row in unread[:5])
        wrong = f"{len(unread):,} closed answers of {first} name no choice, or several, and count as wrong"
        yield f"{wrong}: {few}"
    if judge:
        grades = [value for row in rows for grade in row["grades"].values() for value in grade.values()]
        rule = "are left out" if judge.authors else "count as 0"
        unusable = f"{grades.count(None):,} grades stayed unusable and {rule}{judge.reasons()}"
        yield f"Judge: {judge.model}, protocol {args.judge_protocol}. {unusable}."


def evaluate(args, paths):
    """--evaluate: files of predictions -> tables on the screen, and whole in evaluation.md and .csv beside the
    first of them."""
    settings, rows, asked, notes = read_systems(paths)
    written = {ending: paths[0].with_name(f"evaluation.{ending}") for ending in ("md", "csv")}
    check_output(written["md"], "# Evaluation")
    check_output(written["csv"], "kind,group")
    here = answered_by_all(rows, asked)
    none = "holds no answers yet; sample.py --qa goes on with it"
    none = "no question is answered by all" if paths[1:] else none
    check(here, f"{some(map(str, paths))}: {none}")
    by_all = "answered by all" if paths[1:] else "answered"
    answered = f"{len(here):,} of {len(rows):,} questions {by_all}; the others are in no mean"
    notes.insert(0, f"{answered}. In brackets: 95% bootstrap intervals over slides.")
    # The answer that is most frequent in training: a system like the others.
    training, majority = read_training(args.data / "qa" / "train.jsonl")
    known = [row for row in here if row["task"] in majority]
    for row in known:
        row["answers"][MAJORITY] = majority[row["task"]]
    systems = [*asked, MAJORITY] if known else asked
    if known:
        file = f"{args.data}/qa/train.jsonl"
        notes.append(f"{MAJORITY}: a task's most frequent answer in {file}, whatever the slide.")
    judge = find_judge(args, paths[0].with_name("judge.jsonl"))
    if judge:
        todo = [row for row in here if not closed_parser(row["question"], row["truth"])]
        kept = f"{len(judge.replies):,} of its replies are kept already"
        print(f"{len(todo):,} open questions for {judge.model}; {kept}.")
        grade_rows(judge, todo, asked, args.requests)
    # The metrics, and what is to be said of them all.
    meteor = find_meteor()
    for row in tqdm(here, desc="metrics", unit="question", disable=len(here) < 1000):
        score_row(row, systems, meteor)
    notes += [*describe_scores(here, asked[0], judge, args), *correlations(here, asked)]
    if not meteor:
        notes.append("METEOR: n/a; it needs nltk and its WordNet (python -m nltk.downloader wordnet).")
    lines = tabulate(rows, systems, training, args)
    write_evaluation(written, lines, systems, notes)


def write_evaluation(written, lines, systems, notes):
    """The tables and notes of --evaluate: into files, and in short on the screen."""
    header = [field.name for field in dataclasses.fields(Line)]
    write_text(written["csv"], csv_text([header, *(dataclasses.astuple(line) for line in lines)]))
    listed_notes = "".join(f"- {note}\n" for note in notes)
    text = f"# Evaluation\n\n{listed_notes}\n{side_by_side(lines, systems)}\n"
    shown = [line for line in lines if line.kind != "cancer type" and line.metric in BRIEF]
    shown = [line for line in shown if line.kind != "task" or line.metric not in NLU]
    print(f"\n{side_by_side(shown, systems)}\n")
    if systems[1:]:
        beside = f"Paired difference from {systems[0]}"
        text += f"\n## {beside}\n\n{side_by_side(lines, systems[1:], difference=True)}\n"
        print(f"{beside}:\n{side_by_side(shown, systems[1:], difference=True)}\n")
    write_text(written["md"], text)
    print("\n".join(notes))
    print(f"All metrics, and each cancer type: {written['md']} (and .csv)")


# ---- Flags, and what they start ----------------------------------------------------------------------------


def ask_about_slide(args):
    """--slide: one answer, a chat, or zero-shot."""
    started = time.time()
    slide = prepare_raw(args, args.slide)
    meta = wsi_llava.read_meta(args.data)
    if args.zero_shot:
        found = dict(zip(args.zero_shot, zero_shot(args, meta, slide, args.zero_shot)))
        print(f"{slide}: model of {args.out}/stage1 on {args.device}, {time.time() - started:.1f} s.")
        for text, p in sorted(found.items(), key=lambda item: -item[1]):
            print(f"{p:8.4f}  {text}")
        return
    model, tokenizer = load_model(args, meta)
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
    options = {name: getattr(args, name) for name in names}

    chat = Chat(model, tokenizer, slide_tokens(args, model, slide), **options)
    trained, dtype = args.out / "stage3", str(args.dtype).removeprefix("torch.")
    origin = f"model of {trained}" if trained.exists() else "published model"
    where = f"{origin} on {args.device} in {dtype}, {time.time() - started:.1f} s"
    print(f"{slide}: {len(chat.visual)} visual tokens; {where}.")
    if args.ask:
        tokens, seconds = stream_answer(chat, args.ask)
    else:
        tokens, seconds = chat_loop(chat)
    if args.heatmap or args.heatmap_geojson:
        explain(args, model, tokenizer, slide, chat.answer)
    print(f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s, peak memory {gigabytes(args)}.")


def temperature(text):
    """A type for argparse: 0, or what logits can be divided by."""
    value = wsi_llava.at_least(0, float, 100)(text)
    if 0 < value < 0.001:
        raise argparse.ArgumentTypeError(f"{text} is neither 0 (the most likely token) nor from 0.001 to 100")
    return value


def parse(argv=None):
    parser = wsi_llava.Parser(__doc__)
    count, some, text = wsi_llava.at_least(0), wsi_llava.at_least(1), wsi_llava.some_text
    add = parser.group("one slide")
    file = {"type": wsi_llava.some_path, "metavar": "FILE"}
    folder, many = file | {"metavar": "DIR"}, {"nargs": "+", "type": text}
    add("--slide", "a slide file, or the name of a prepared slide", metavar="S", type=text)
    add("--ask", "one question; without it, a chat", type=text, metavar="Q")
    add("--zero-shot", "the probability of each text, by stage 1 alone", metavar="TEXT", **many)
    add("--heatmap", "with --ask: a picture (PNG) of which tiles made the answer what it is", **file)
    add("--heatmap-geojson", "the same for QuPath, a square a tile", **file)
    mpp = wsi_llava.at_least(0.05, float, 20)
    add("--mpp", "um per pixel at level 0, for a raw slide whose metadata lack it", type=mpp)
    add("--slides", "where the slides' files are, for pictures (default: slides in --data)", **folder)
    add = parser.group("how it answers")
    tiles = "from so many of a slide's tiles, drawn at random, always the same ones (0: all)"
    add("--max-tiles", tiles, type=count, default=0)
    add("--int8", "the language model in int8: half of bfloat16's memory", action="store_true")
    add("--max-new-tokens", "longest answer, in tokens (default: 512)", type=some, default=512)
    add("--temperature", "0 (default): the most likely token; above: sampled", type=temperature, default=0.0)
    mass = "sample from the likeliest tokens of this probability (default: 1)"
    add("--top-p", mass, type=wsi_llava.share, default=1)
    add("--top-k", "sample from the k most likely tokens (default: 0, all)", type=count, default=0)
    add = parser.group("many questions")
    add("--qa", "answer all of these files' questions; resumes", nargs="+", **file)
    add("--predictions", "the answers' file (default: predictions.jsonl in --out)", **file)
    add("--baselines", "also answer without the slide, and with another's", action="store_true")
    add("--batch-size", "questions at once (default: 8)", type=some, default=8)
    add = parser.group("evaluation")
    add("--evaluate", "tables of predictions, ours first (default: --predictions)", nargs="*", **file)
    judge = "grade open answers: WSI-Precision, WSI-Relevance; its key: OPENAI_API_KEY"
    add("--judge-model", judge, type=text, metavar="M")
    url = {"default": "https://api.openai.com/v1", "metavar": "URL"}
    add("--judge-url", "where it is, OpenAI-compatible (default: OpenAI's)", **url)
    add("--requests", "requests to the judge at once (default: 8)", type=some, default=8)
    rules = "what counts: ours (default), or as in the authors' released evaluation"
    add("--judge-protocol", rules, choices=PROMPTS, default="ours")
    wsi_llava.add_weights_flags(parser)
    wsi_llava.add_shared_flags(parser)
    args = parser.parse_args(argv)
    args.predictions = args.predictions or args.out / "predictions.jsonl"
    return args


def main(argv=None):
    args = parse(argv)
    check_heatmap_flags(args)
    wsi_llava.resolve_device(args)
    todo = args.slide or args.qa or args.evaluate is not None
    check(todo, "nothing to do: give --slide, --qa or --evaluate (--help explains)")
    if args.qa:
        answer_file(args)
    if args.evaluate is not None:
        evaluate(args, args.evaluate or [args.predictions])
    elif args.slide and not args.qa:
        ask_about_slide(args)


if __name__ == "__main__":
    wsi_llava.run(main, on_interrupt="interrupted; --qa and --evaluate go on where they stopped")
