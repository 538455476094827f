"""Asks WSI-LLaVA about slides: one question, a chat, or a whole benchmark and its evaluation.

python sample.py --slide S --ask Q                    one answer; S: a file, or a prepared slide's name
python sample.py --slide S                            a chat about it
python sample.py --slide S --ask Q --heatmap out.png  which tiles made the answer
python sample.py --slide S --zero-shot TEXT TEXT      which text fits the slide, by stage 1
python sample.py --qa FILE --baselines --evaluate     answers to all questions, and their table
python sample.py --evaluate A B C --judge-model M     several systems, graded by a language model
"""

import csv
import email.utils
import hashlib
import io
import json
import math
import os
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain, compress, product, starmap
from pathlib import Path
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import prepare
import wsi_llava
from wsi_llava import TILE, UserError, check, count, few, one_line, reading, slide_first, write_text

# ---- Slides and conversations ----


def load_model(args):
    """The model as far as it is trained, on --device -> (WSILLaVA, Tokenizer)."""
    model, tokenizer = wsi_llava.load_model(args, wsi_llava.read_meta(args.data), int8=args.int8)
    model.cfg.max_tiles = args.max_tiles or model.cfg.max_tiles
    return model.to(args.device), tokenizer


def prepare_raw(args, name):
    """The name of --slide in data/; a file is prepared first."""
    folders = [args.data / "features", args.data / "visual_tokens"]
    if any((folder / f"{name}.safetensors").exists() for folder in folders):
        return name
    check(Path(name).exists(), f"--slide {name}: neither a file nor a slide in {folders[0]}")
    raw = prepare.find_slides([name])
    check(len(raw) == 1, f"--slide {name}: holds {len(raw)} slides; name one")
    failures = prepare.prepare_slides(prepare.with_defaults(args), raw)
    check(not failures, failures and failures[0])
    return next(iter(raw))


@torch.inference_mode()
def zero_shot(args, slide):
    """Prints --zero-shot's texts by probability: a softmax of their similarities to the slide."""
    cfg, model, words, tokenizer = wsi_llava.load_alignment(args, wsi_llava.read_meta(args.data))
    features, coords = wsi_llava.read_features(args.data, slide, args.max_tiles or cfg.max_tiles)
    check(len(features), f"--slide {slide}: no tissue was found on it")
    features, coords = features.to(args.device, torch.float32), coords.to(args.device)
    ids = [tokenizer.encode(text)[: cfg.text_encoder.max_length] for text in args.zero_shot]
    similar = model.embed_slides(features, coords, [len(features)]) @ model.embed_words(ids, words).T
    shares = (model.logit_scale.exp().clamp(max=100) * similar)[0].softmax(-1)  # [texts]
    for i in shares.argsort(descending=True).tolist():
        print(f"{shares[i]:8.4f}  {args.zero_shot[i]}")


class Chat:
    """A conversation about a slide, visual tokens [V,C]. Turns share a key-value cache."""

    def __init__(self, model, tokenizer, visual, **options):
        self.model, self.tokenizer, self.visual, self.options = model, tokenizer, visual, options
        cfg, like = model.cfg.llama, model.mm_projector[0].weight
        self.cache = wsi_llava.KVCache(cfg, 1, cfg.context, like.device, like.dtype)
        self.tail = []  # tokens of the last reply that the cache lacks

    def reply(self, question):
        """Yields the answer piece by piece. UserError: the context is full."""
        # A later question goes on where the cache ends, less the tokens that generate() yielded last.
        turns, visual = slide_first([{"from": "human", "value": question}]), [self.visual]
        ids, eos, ends = self.tokenizer.encode_chat(turns)[0], self.tokenizer.eos, self.tokenizer.ends
        if self.cache.length:
            later = self.tokenizer.encode_turn(wsi_llava.without_image(question), first=False)
            ids, visual = self.tail + later, None
        said, shown, text = [], 0, ""
        for (token,) in self.model.generate(visual, [ids], ends=ends, cache=self.cache, **self.options):
            self.tail = [eos] if token in ends else [token, eos]
            said += [] if token in ends else [token]
            text = self.tokenizer.decode(said)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character waits
                yield text[shown:]
                shown = len(text)
        yield text[shown:]


def talk(chat, question=None):
    """Streams the answer to a question, or to each line of the input -> the last answer."""
    prompt, answer = "> " if sys.stdin.isatty() else "", ""
    lines = [question] if question else iter(lambda: input(prompt).strip(), None)
    with suppress(EOFError):
        for asked in filter(None, lines):
            started, answer = time.time(), ""
            for piece in chat.reply(asked):
                print(piece, end="", flush=True)
                answer += piece
            print(f"\n({time.time() - started:.1f} s)")
    return answer


def ask_about_slide(args):
    """--slide: one answer, a chat, or zero-shot."""
    slide = prepare_raw(args, args.slide)
    if args.zero_shot:
        return zero_shot(args, slide)
    model, tokenizer = load_model(args)
    _, problems = wsi_llava.cache_visual_tokens(model, args.data, [slide])
    check(not problems, f"--slide {slide}: {problems.get(slide)}")
    visual = wsi_llava.read_visual_tokens(args.data, slide, model.cfg)
    print(f"{slide}: {len(visual)} visual tokens, on {args.device}. Ctrl-D ends a chat.")
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "seed")}
    answer = talk(Chat(model, tokenizer, visual, **options), args.ask)
    if args.heatmap:
        explain(args, model, tokenizer, slide, answer)


# ---- Where the answer comes from ----
#
# A tile's share of log p(answer | slide), by integrated gradients (arXiv 1703.01365) from a slide of average
# tiles on. Of 50 toy slides it found the planted tile in 100%; attention, of mixed tiles, in 2%.

PASSES, PANEL = 32, 560  # steps; pixels of a panel's longer side
# Pale to dark, evenly in lightness.
ANCHORS = np.array([(255, 247, 190), (253, 190, 95), (235, 105, 55), (165, 35, 90), (60, 10, 85)])


def tile_relevance(model, tokenizer, features, coords, question, answer):
    """What each tile, [N,C_tile] at coords [N,2], adds to log p(answer) -> [N], in nats."""
    check(tokenizer.encode(answer), "--heatmap: the answer is empty")
    turns = slide_first([{"from": "human", "value": question}])
    ids, labels = tokenizer.encode_chat([*turns, {"from": "gpt", "value": answer}])
    labels[-1] = wsi_llava.IGNORE  # the </s> after the answer
    room = model.llama.cfg.context - model.cfg.n_visual_tokens + 1  # it may be full
    model.requires_grad_(False)
    for part in filter(None, (model.llama, model.slide_encoder)):
        part.checkpointing = True
    features = features.to(model.device, torch.float32)
    average, relevance = features.mean(0).expand_as(features), torch.zeros(len(features))
    for i in tqdm(range(PASSES), unit="pass", leave=False):
        tiles = torch.lerp(average, features, (i + 0.5) / PASSES).requires_grad_()
        logp = -model(model.encode_slide(tiles, coords)[None], [ids[:room]], [labels[:room]], "sum")
        slope = torch.autograd.grad(logp, tiles)[0]  # [N,C_tile]
        relevance += (slope * (features - average)).sum(1).cpu() / PASSES
    return relevance


def colours(relevance):
    """[N] -> uint8 RGB [N,3], pale to dark from 0 to the largest."""
    shares = (relevance / max(1e-12, relevance.max())).clip(0)
    stops = np.linspace(0, 1, len(ANCHORS))
    return np.stack([np.interp(shares, stops, channel) for channel in ANCHORS.T], -1).astype(np.uint8)


def draw_heatmap(path, slide, coords, relevance, title):
    """The slide; its tiles, coloured by relevance [N]; the nine most relevant."""
    pixel, cell, top = max(slide.width, slide.height) / PANEL, PANEL // 3, 90
    picture = slide.thumbnail(pixel)
    grey = picture.convert("L").convert("RGB")
    faded = Image.blend(grey, Image.new("RGB", grey.size, "white"), 0.3)
    draw = ImageDraw.Draw(faded, "RGBA")
    for (x, y), shade in zip(coords / pixel, colours(relevance).tolist()):
        draw.rectangle((x, y, x + TILE / pixel, y + TILE / pixel), (*shade, 170))
    canvas = Image.new("RGB", (3 * PANEL + 96, top + PANEL + 24), "white")
    canvas.paste(picture, (24, top))
    canvas.paste(faded, (48 + PANEL, top))
    draw = ImageDraw.Draw(canvas)
    draw.text((24, 16), title, "black", font_size=18)
    for i, n in enumerate(np.argsort(-relevance, kind="stable")[:9]):
        x, y = 72 + 2 * PANEL + i % 3 * cell, top + i // 3 * cell
        tile = Image.fromarray(slide.tile(*coords[n].tolist())).convert("RGB")
        canvas.paste(tile.resize((cell - 16, cell - 30)), (x, y))
        draw.text((x, y + cell - 25), f"{relevance[n]:.2g} nats", "black", font_size=14)
    with wsi_llava.replacing(path) as temporary:
        canvas.save(temporary, "PNG")


def write_heatmaps(paths, source, coords, relevance, title):
    """Pictures, and tiles for QuPath. source: what prepare.Slide takes."""
    slide, tiles = prepare.Slide(*source), []
    for (x, y), value, shade in zip(coords.tolist(), relevance.tolist(), colours(relevance).tolist()):
        facts = {"color": shade, "measurements": {"relevance": value}}
        tiles.append(wsi_llava.geojson_tile(x, y, slide.scale, slide.corner, **facts))
    for path in paths:
        if path.suffix == ".png":
            draw_heatmap(path, slide, coords, relevance, title)
        else:
            write_text(path, json.dumps({"type": "FeatureCollection", "features": tiles}))


def explain(args, model, tokenizer, name, answer):
    """--heatmap: which tiles made the model answer so."""
    place = Path(args.slide) if Path(args.slide).exists() else args.data / "slides"
    file = prepare.find_slides([place]).get(name) if place.exists() else None
    check(file, f"{name}: its file is not in {place}; give --slide its path")
    mpp = wsi_llava.feature_metadata(wsi_llava.features_file(args.data, name)).get("mpp")
    features, coords = wsi_llava.read_features(args.data, name, model.cfg.max_tiles)
    relevance = tile_relevance(model, tokenizer, features, coords, args.ask, answer).numpy()
    print(f"Over a slide of average tiles, this one adds {relevance.sum():.2f} nats to the answer.")
    title = one_line(f"{name}: {args.ask} - {answer}", 150)
    # In a process of its own: a damaged slide may kill it.
    prepare.apart(file, write_heatmaps, args.heatmap, (file, mpp), coords.numpy(), relevance, title)
    print(f"Wrote {few(args.heatmap)}")


# ---- Closed answers: choice and yes/no ----


def plain(text):
    return " ".join(text.lower().split()).rstrip(".")


def without_thoughts(text):
    """A text less <think>...</think>, also where one is missing."""
    text = re.sub(r"<(think|thinking|reasoning)>.*?(</\1>|$)", "", text, flags=re.I | re.S)
    return re.sub(r"^.*</(think|thinking|reasoning)>", "", text, flags=re.I | re.S).strip()


# How options are written: A) B. (C) [D] E: F - G、, or a) (b) [c], or 1) 2. 3、
STYLES = {
    "ABCDEFGH": r"[(\[]?([A-H])(?:\s?[).:\]、](?=\s|$|\w)|\s?-\s)",
    "abcdefgh": r"[(\[]?([a-h])\s?[)\]、](?=\s|$|\w)",
    "12345678": r"[(\[]?([1-8])(?:\s?[)\]、](?=\s|$|\w)|\.(?=\s))",
}


def choices(question):
    """The options of a question: "Which? A) Glands B. Sheets" -> {"A": "Glands", "B": "Sheets"}."""
    for labels, pattern in STYLES.items():
        marks = []  # A, B, C, ... in this order; not a stray "protein B."
        for match in re.finditer(rf"(?<![!-~]){pattern}", question):
            if match[1] == labels[len(marks) : len(marks) + 1]:
                marks.append(match)
        if len(marks) > 1:
            ends = [match.start() for match in marks[1:]] + [len(question)]
            return {m[1].upper(): question[m.end() : end].strip() for m, end in zip(marks, ends)}
    return {}


# To be read, an answer gets a private character for each option that it names.
OPTION, NOTHING = "[\ue000-\ue007]", "[^\\w\ue000-\ue007]*"
OPTIONS = rf"{OPTION}(?:(?:[\s,/&()\[\]:*\"'-]|\b(?:and|or|nor)\b)*{OPTION})*"  # one, or several in a row
# "neither A nor B", "not a typical A", but not "no doubt: A"; "A is unlikely".
REJECTING = rf"""(?ix: \b (?: not | cannot | neither | nor | never | no | exclud\w+ | rul\w+\ out
    | rather\ than | instead\ of | unlike | \w+n't) \b
    (?: \s+ (?!(?: doubt | only | but)\b) [\w'-]+ ){{0,4}}? [\s"'(*\[]* ){OPTIONS}"""
REJECTED = rf"""{OPTIONS}(?ix: (?: \s+ (?: is|can|could|may|be|does|do|very|the|an?|\w+ly) ){{0,3}}? \s+
    (?: \w+n't | cannot | not | wrong | incorrect | false | unlikely | excluded | ruled\ out) \b)"""
IS = r"(?:\s+(?:is|would be|should be)\b"
SAYING = rf"(?i:\b(?:answer|option|choice)\b{IS})?)"
STATING = rf"(?i:\b(?:(?:answer|option|choice){IS}|\s?:)|choose|select|pick)(?:\s+option)?)"


def mark_options(text, options):
    """The text, its options, by words or label, made characters of OPTION."""
    marks = {label: chr(0xE000 + i) for i, label in enumerate(options)}
    # The longest first: it may hold another.
    for label in sorted(options, key=lambda label: -len(options[label])):
        if words := re.escape(" ".join(options[label].split()).strip(".,; ")):
            text = re.sub(rf"(?<!\w){words}(?!\w)", marks[label], text, flags=re.I)
    labels = "".join(options)
    any_case, others = f"[{labels}{labels.lower()}]", re.sub(r"[\dA]", "", labels)
    # Capitals alone are options; an A before a small word is an article.
    alone = rf"A(?!\s+(?!(?:and|or|nor|is|because|since|as|but|due)\b)[a-z])|[{others}_]"
    for before, label in (
        (rf"(^{NOTHING}|[(\[])", rf"{any_case}(?=\s?[).:,\]、]|\s+-|\W*$)"),
        (rf"({SAYING}\W*)", rf"[{labels}](?!\w)|{any_case}(?!\w|\s+[a-z])"),
        (r"(?<![\w'-])()", rf"(?:{alone})(?![\w'-])"),
    ):
        text = re.sub(f"{before}({label})", lambda m: m[1] + marks.get(m[2].upper(), m[2]), text)
    return re.sub(rf"({OPTION})(?:\W*\1)+", r"\1", text)  # "B. Sarcoma" names one option, once


def parse_choice(text, options):
    """The label that an answer states, begins with, or names alone."""
    text = mark_options(" ".join(text.split()), options)
    text = re.sub(REJECTED, " ", re.sub(REJECTING, " ", text))
    stated = re.findall(rf"{STATING}[\s:*\"'(\[]*({OPTIONS})", text)
    first = re.findall(rf"^{NOTHING}({OPTIONS})", text)
    named = set(re.findall(OPTION, "".join(stated or first or text)))
    return list(options)[ord(named.pop()) - 0xE000] if len(named) == 1 else None


def parse_yes_no(text):
    """yes or no, at the start or as "the answer is"; else None."""
    said = r"(?:.*\banswer(?: is)?\b)?\W*(yes|no|true|false)\b(?!\W+(?:or|and|doubt)\b)"
    match = re.match(said, text.strip(), re.I | re.S)
    return match and {"true": "yes", "false": "no"}.get(match[1].lower(), match[1].lower())


@lru_cache(1 << 16)
def closed_parser(question, truth):
    options = choices(question)
    if options and parse_choice(truth, options):
        return partial(parse_choice, options=options)
    return parse_yes_no if re.fullmatch(r"\W*(yes|no|true|false)\W*", truth, re.I) else None


# ---- Many questions ----

# Fields of answers in --predictions -> systems of the tables.
FIELDS = {"answer": "model", "answer_no_image": "no slide", "answer_shuffled": "other slide"}
ROOM = 8192  # positions held at once: 4 GB of a 7B's keys and values


def open_lines(path):
    """A JSON lines file of ours, less half a last line -> (its objects, the file to append to)."""
    with reading(path, "not what sample.py writes; move it away"):
        *lines, last = (path.read_bytes() if path.exists() else b"").split(b"\n")
        with suppress(ValueError):  # whole, but for its end
            lines += [last] if json.loads(last) else []
        check(lines or last[:2] in (b"", b'{"'), f"{path}: not what sample.py writes; move it away")
        objects = [json.loads(line) for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    prepare.write_qa(path, objects)
    return objects, open(path, "a", encoding="utf-8")


def read_questions(files, data):
    """Question files -> a row for each human turn that is not for training."""
    kept, rows = [], []
    for file in files:
        kept += [row for row in prepare.read_qa(file) if row.pop("split", None) != "train"]
    check(kept, f"{few(files)}: only questions for training")
    slides = [*(data / "features").glob("*.*"), *(data / "visual_tokens").glob("*.*")]
    for row in prepare.match_slides(kept, {path.stem for path in slides}):
        turns = row["conversations"]
        for k in range(0, len(turns), 2):
            texts = {"question": wsi_llava.without_image(turns[k]["value"]), "truth": turns[k + 1]["value"]}
            rows.append({"n": len(rows), **row, "turn": k // 2, **texts, "conversations": turns[: k + 1]})
    return rows


def prompt_ids(tokenizer, row, image=True):
    return tokenizer.encode_chat(slide_first(row["conversations"], image))[0]


def answer_rows(model, tokenizer, rows, visual, max_new_tokens=96):
    """Answers to the rows' last questions. visual: {slide: visual tokens [V,C]}, or None."""
    prompts = [prompt_ids(tokenizer, row, visual is not None) for row in rows]
    answers, by_length, ends = [None] * len(rows), defaultdict(list), tokenizer.ends
    for i, ids in enumerate(prompts):
        by_length[len(ids)].append(i)  # unpadded, an answer is what it is alone
    for length, same in by_length.items():
        at_once = max(1, ROOM // (length + max_new_tokens + model.cfg.n_visual_tokens))
        for start in range(0, len(same), at_once):
            group = same[start : start + at_once]
            slides = visual and [visual[rows[i]["slide"]] for i in group]
            steps = model.generate(slides, [prompts[i] for i in group], max_new_tokens, ends=ends)
            for i, ids in zip(group, zip(*steps)):
                answers[i] = tokenizer.decode([token for token in ids if token not in {None, *ends}])
    return answers


def answer_file(args):
    """--qa: every question -> --predictions; resumes by itself."""
    check(not args.temperature, "--temperature: --qa answers greedily")
    rows, (model, tokenizer), path = read_questions(args.qa, args.data), load_model(args), args.predictions
    digest, cfg = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16], model.cfg
    settings = {name: str(getattr(args, name)) for name in ("dtype", "baselines", "max_new_tokens", "seed")}
    settings |= {"questions": digest, "asked": len(rows), "max_tiles": cfg.max_tiles}
    settings["model"] = wsi_llava.fingerprint(model)
    lines, file = open_lines(path)
    with reading(path, "not what --qa writes; name another"):
        old, done = lines[0]["settings"] if lines else settings, {row["n"] for row in lines[1:]}
    if not lines:
        print(json.dumps({"settings": settings}), file=file, flush=True)
    for name, value in settings.items():
        made = f"{path} was made with {name} {old.get(name)}, not {value}"
        check(str(old.get(name)) == str(value), f"{made}; name another --predictions")
    slides = list(dict.fromkeys(row["slide"] for row in rows))
    _, problems = wsi_llava.cache_visual_tokens(model, args.data, slides, tqdm)
    good = [slide for slide in slides if slide not in problems]
    views = {"answer": dict(zip(good, good))}  # {field: {slide: what is shown}, or None}
    if args.baselines:
        order = np.random.default_rng(args.seed).permutation(good).tolist()
        views |= {"answer_no_image": None, "answer_shuffled": dict(zip(order, order[1:] + order[:1]))}
    tokens = partial(wsi_llava.read_visual_tokens, args.data, cfg=cfg)
    lengths = [len(prompt_ids(tokenizer, row)) + cfg.n_visual_tokens for row in rows]
    long = {n for n, length in enumerate(lengths) if length > cfg.llama.context}
    todo = [row for row in rows if row["n"] not in done | long and row["slide"] not in problems]
    todo.sort(key=lambda row: lengths[row["n"]])
    print(f"{len(rows):,} questions about {len(slides):,} slides, {len(todo):,} to ask, into {path}.")
    with file, tqdm(total=len(todo), unit="question") as bar:
        for start in range(0, len(todo), 64):
            group = todo[start : start + 64]
            for field, instead in views.items():
                visual = instead and {row["slide"]: tokens(instead[row["slide"]]) for row in group}
                answers = answer_rows(model, tokenizer, group, visual, args.max_new_tokens)
                for row, answer in zip(group, answers):
                    row[field] = answer
            for row in group:
                del row["conversations"]
                print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
            bar.update(len(group))
    print(f"Answered {count(len(todo), 'question')}; {len(long)} too long.")
    for slide, why in list(problems.items())[:5]:
        print(f"No answers about {slide}: {why}")


# ---- Text metrics, as the released evaluation takes them: of one answer each ----


def tokenize(text):
    """Words and punctuation: what nltk.word_tokenize makes of 99.5% of WSI-Bench's answers."""
    return re.findall(r"\w+(?:[-./+=,]+\w+)*\+?|'\w+|[^\w\s]", text)


def bleu(reference, candidate):
    """Tokens -> [BLEU-1, ..., BLEU-4], smoothed by nltk's method 4 (Chen and Cherry 2014)."""

    def ngrams(tokens, n):
        return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    length, logs, empty = len(candidate), [], 0
    for n in range(1, 5):
        have = ngrams(candidate, n)
        match, total = (have & ngrams(reference, n)).total(), max(1, have.total())
        if n == 1 and not match:
            return [0.0] * 4
        if not match and length > 1:  # the more orders lack one, the less it counts
            empty += 1
            match = math.log(length) / (5 * 2**empty)
        logs.append(math.log(match / total) if match else 0.0)
    brevity = min(0.0, 1 - len(reference) / length)
    return [math.exp(brevity + sum(logs[:n]) / n) for n in range(1, 5)]


def common_words(x, y):
    """The words of a longest common subsequence."""
    above = [()] * (len(y) + 1)
    for a in x:
        row = [()]
        for j, b in enumerate(y):
            row.append((*above[j], a) if a == b else max(row[j], above[j + 1], key=len))
        above = row
    return set(above[-1])


def rouge_l(reference, candidate):
    """Tokens -> ROUGE-L's F as the `rouge` package has it: of sets of words, sentences united."""
    sides = []
    for tokens in (reference, candidate):
        sides.append([" ".join(s.split()).split(" ") for s in " ".join(tokens).split(".") if s])
    if not all(sides):
        return 0.0
    common = set().union(*starmap(common_words, product(*sides)))
    recall, precision = (len(common) / len(set(chain(*sentences))) for sentences in sides)
    return 2 * precision * recall / (precision + recall + 1e-8)


def find_meteor():
    """METEOR, or nan without nltk's WordNet."""
    try:
        from nltk.translate.meteor_score import single_meteor_score

        single_meteor_score(["a"], ["b"])
        return single_meteor_score
    except (ImportError, LookupError):
        return lambda *_: math.nan


# ---- The judge: WSI-Precision and WSI-Relevance ----
#
# A model scores the truth's claims against the answer (precision), and the reverse (relevance). Prompts hold
# no JSON: repeated, they grade nothing.

JUDGED = ("WSI-Precision", "WSI-Relevance")
CLAIMS = """Split this answer to a question about a pathology slide into claims. {scope}One finding or fact \
a claim, but keep together what only makes sense together; leave out, repeat and add nothing. Reply with \
JSON alone: {{"claims": [a text for each claim]}}"""
SCORES = """Score claims about a pathology slide by a text that answers the same question. 1: the text says \
the same. 0.7: with a small omission or deviation. 0.3: with an error in its core (grade, type, malignant \
or not). 0: it says something else{silent} Reply with JSON alone: {{"scores": [a number for each claim]}}"""
SILENT = SCORES.format(silent=", or nothing about it.")
NULL = SCORES.format(silent=". null, in place of a score: the text says nothing about it.")
PROMPTS = {  # for claims, precision, relevance
    "ours": (CLAIMS.format(scope="Take what answers the question and nothing else. "), SILENT, SILENT),
    "authors": (CLAIMS.format(scope=""), SILENT, NULL),
}
GRADES = {"1": 1, "1.0": 1, "0.7": 0.7, "0.3": 0.3, "0": 0, "0.0": 0}
SENT = {"temperature": 0, "max_tokens": 4096}  # what a server that lacks it says:
REFUSED = {"temperature": "temperature", "max_tokens": "max_tokens|context|completion"}
ATTEMPTS, AT_ONCE, OPENAI = 7, 8, "https://api.openai.com/v1"
BACKOFF, SILENCE, LONGEST = 2.0, 120.0, 600.0  # seconds: the first wait, doubled each time; a reply's
SENDER = OpenerDirector()  # follows no redirect: it would take the key along
for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
    SENDER.add_handler(handler)


def last_list(text, name, allowed, lengths):
    """-> (the last list of that name in a reply's JSON, ""), or (None, why none fits)."""
    problem = "unusable (it holds no JSON)"
    for match in reversed(list(re.finditer("{", text))):
        with suppress(ValueError, TypeError, RecursionError):
            found = json.JSONDecoder().raw_decode(text, match.start())[0].get(name)
            problem = f'unusable (no list "{name}" of {lengths.start}, as asked for)'
            fits = [str(x) in allowed if allowed else re.search(r"\w", x) for x in found]
            if isinstance(found, list) and len(found) in lengths and all(fits):
                return found, ""
    return None, problem


def retry_after(told, otherwise):
    """The seconds that a server asks for, a number or a date."""
    with suppress(ValueError, TypeError):
        if re.fullmatch("[0-9.]+", told):
            return float(told)
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    return otherwise


class Judge:
    """A grading model at an OpenAI-compatible endpoint; keeps usable replies."""

    def __init__(self, url, model, path, protocol="ours"):
        self.where, self.model, self.protocol = f"--judge-url {url}", model, protocol
        check(re.fullmatch(r"https?://[^/?#@\s]+(/[!-~]*)?", url), f"{self.where}: not a URL like {OPENAI}")
        self.url, key = f"{url.rstrip('/')}/chat/completions", os.environ.get("OPENAI_API_KEY", "").strip()
        check(key.isascii() and key.isprintable(), "OPENAI_API_KEY: not a key")
        self.key, self.secret = key, key if len(key) > 7 else "\0"
        lines, self.file = open_lines(path)
        with reading(path, "not the judge's replies; delete it"):
            self.replies = {line["key"]: line["reply"] for line in lines}
        self.sent, self.lock, self.over = SENT, threading.Lock(), threading.Event()
        self.problems, self.in_a_row = Counter(), 0

    def post(self, messages):
        """-> (a reply without its reasoning, what is wrong with it); (None, why it was refused)."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        for attempt in range(ATTEMPTS):
            # A refusal is of what was sent; other threads drop options meanwhile.
            sent, wait, status, text = self.sent, BACKOFF * 2**attempt, 0, ""
            body = json.dumps({"model": self.model, "messages": messages, **sent}).encode()
            try:
                with SENDER.open(Request(self.url, body, headers), timeout=SILENCE) as response:
                    status, wait = response.status, retry_after(response.headers["Retry-After"], wait)
                    text = response.read().decode("utf-8", "replace").replace(self.secret, "***")
                if status == 200:
                    choice = json.loads(text)["choices"][0]
                    said, end = choice["message"].get("content"), choice.get("finish_reason") or "stop"
                    said, refusal = without_thoughts(said or ""), choice["message"].get("refusal") or ""
                    whole = said and not refusal and re.match("stop|eos|end|complete", end.lower())
                    return said, "" if whole else one_line(f"no whole reply (finish_reason {end}) {refusal}")
                problem = f"HTTP {status}"
            except Exception as error:  # of the network, or no reply
                problem, text = f"no answer ({type(error).__name__})", text or str(error)
            problem = f"{problem}: {one_line(' '.join(text.split()))}"
            unwanted = [name for name in sent if re.search(REFUSED[name], text, re.I)]
            if status in (400, 422) and unwanted:
                self.sent, wait = {name: x for name, x in sent.items() if name not in unwanted}, 0
            elif status in (401, 402, 403, 404) or 300 <= status < 400:
                raise UserError(f"{self.where}: {problem}; check it, --judge-model, OPENAI_API_KEY")
            elif 400 <= status < 500 and status not in (408, 409, 425, 429):
                return None, problem
            if attempt == ATTEMPTS - 1 or wait > LONGEST or self.over.wait(wait):
                again = f"run the same command again, in {wait:,.0f} s or later: it goes on"
                raise UserError(f"{self.where}: {problem}; {again}")

    def ask(self, prompt, content, *form):
        """last_list of the reply, or None."""
        content = json.dumps(content, ensure_ascii=False)
        messages = [{"role": "system", "content": prompt}, {"role": "user", "content": content}]
        key = hashlib.sha256(json.dumps([self.model, messages]).encode()).hexdigest()
        found, problem = last_list(self.replies.get(key, ""), *form)
        if not problem:
            return found
        for asked in range(4):
            reply, problem = self.post(messages)
            if problem and (reply is None or asked):  # of what was cut, once more
                break
            found, problem = (None, problem) if problem else last_list(reply, *form)
            if not problem:
                break
            again = f"Your reply is {problem}. Reply again, in that form alone."
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": again}]
        with self.lock:
            if not problem:
                print(json.dumps({"key": key, "reply": reply}), file=self.file, flush=True)
                self.replies[key], self.in_a_row = reply, 0
                return found
            self.problems[problem] += 1
            self.in_a_row += 1
        # What a judge never answered is no zero.
        check(self.in_a_row < 2 * AT_ONCE, f"{self.where}: {self.in_a_row} times in a row: {problem}")

    def score(self, metric, question, truth, answer):
        """The mean score of one side's claims; None: unusable."""
        precision, (for_claims, *for_scores) = metric == JUDGED[0], PROMPTS[self.protocol]
        claimed, text = (truth, answer) if precision else (answer, truth)
        if not claimed.strip() or not text.strip():
            return 0.0
        content, prompt = {"question": question, "answer": claimed}, for_scores[not precision]
        if self.protocol == "authors" and precision:
            del content["question"]  # the truth is split alone
        claims = self.ask(for_claims, content, "claims", None, range(precision, 1000))
        if not claims:
            return None if claims is None else 0.0  # an answer may claim nothing
        content, n = {"question": question, "claims": claims, "text": text}, len(claims)
        allowed = GRADES.keys() | {"None" if prompt is NULL else "0"}
        scores = self.ask(prompt, content, "scores", allowed, range(n, n + 1)) or ()
        scores = [GRADES[str(x)] for x in scores if str(x) in GRADES]
        return float(np.mean(scores)) if scores else None


def grade(judge, rows, systems, notes):
    """Grades all open questions -> {system: {metric: values [n]}}."""
    asked = [i for i, row in enumerate(rows) if not closed_parser(row["question"], row["truth"])]
    todo, what = list(product(systems, JUDGED, asked)), count(len(asked), "open question")
    print(f"{what}, {count(len(systems), 'system')}: up to {2 * len(todo):,} calls of {judge.model}.")

    def work(item):
        system, metric, i = item
        return judge.score(metric, rows[i]["question"], rows[i]["truth"], systems[system][i])

    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        found = list(tqdm(pool.map(work, todo), total=len(todo), unit="grade"))
    finally:  # Ctrl-C: what waits is not asked
        judge.over.set()
        pool.shutdown(cancel_futures=True)
    zero, rule = (math.nan, "left out") if judge.protocol == "authors" else (0.0, "counted as 0")
    note = f"Judge: {judge.model}, protocol {judge.protocol}; {found.count(None)} unusable grades are {rule}"
    notes.append(note + "".join(f"; {n} times {what}" for what, n in judge.problems.items()) + ".")
    check(not todo or found.count(None) < len(todo), f"{judge.where}: no grade came back. {notes[-1]}")
    grades = {system: {metric: np.full(len(rows), np.nan) for metric in JUDGED} for system in systems}
    for (system, metric, i), value in zip(todo, found):
        grades[system][metric][i] = zero if value is None else value
    return grades


# ---- Predictions: ours, and anybody's ----

# Our names, and others', the surest first; "answer" is the truth where another column answers.
SAID = "prediction pred predicted model_answer model_output output response generated_text generated text"
TRUTH = "truth t-answer ground_truth groundtruth gt gt_answer correct_answer reference label target answer"
THEIRS = {"id": "id question_id qid", "slide": "slide slide_id image", "question": "question prompt"}
THEIRS |= {"task": "task metadata", "cancer": "cancer tumor", "answer": f"{SAID} answer", "truth": TRUTH}
THEIRS |= {field: field for field in FIELDS if field != "answer"}
OWN = "kind|group|metric|questions|training slides|published|majority|(.*, )?(no|other) slide|.* - .*"


def read_answers(path):
    """Predictions -> (rows under our names, a note)."""
    with reading(path, "predictions are JSON lines, a JSON list or CSV"):
        table = [{x.strip().lower(): y for x, y in row.items()} for _, row in prepare.read_entries(path)]
        ours = table.pop(0)["settings"] if "settings" in table[0] else None
        columns = dict.fromkeys(chain(*table))
        taken = {name: [x for x in theirs.split() if x in columns] for name, theirs in THEIRS.items()}
        check(taken["answer"] or ours is not None, f"{path}: no answers among {', '.join(columns)}")
        taken = {name: known[0] for name, known in taken.items() if known}
        if taken.get("truth") == taken.get("answer"):
            taken.pop("truth", None)
        note = "took " + ", ".join(f"{column} for the {name}" for name, column in taken.items())
        if ours is not None:
            note = f"answers {len(table)} of {ours.get('asked', 'all')} questions"
        rows = []
        for entry in table:
            row = dict.fromkeys(THEIRS, "") | dict.fromkeys(FIELDS)
            for name, column in taken.items():
                if entry.get(column) is not None:
                    row[name] = prepare.words(entry[column], name)
            row["question"] = wsi_llava.without_image(row["question"])
            row["slide"] = row["slide"] and prepare.slide_id(row["slide"])
            rows.append(row | {"asked": plain(row["question"])})
    return rows, note


def match(rows, theirs):
    """Which of `theirs` answers each row, by keys of but one row -> (a list, the others)."""
    found, unused = [None] * len(rows), dict(enumerate(theirs))
    for parts in (("id", "asked"), ("slide", "asked"), ("id",)):
        ours, others = ([tuple(row[part] for part in parts) for row in side] for side in (rows, theirs))
        times, place = Counter(ours + others), {key: j for j, key in enumerate(others)}
        for i, key in enumerate(ours):
            if not found[i] and all(key) and times[key] == 2 and place.get(key) in unused:
                found[i] = unused.pop(place[key])
    return found, list(unused.values())


def read_systems(paths):
    """-> (the first file's rows that all answer, {file, or its baseline: answers [n]}, notes)."""
    rows, systems, notes, stems = [], {}, [], [path.stem for path in paths]
    check(len(set(paths)) == len(paths), "--evaluate: a file twice")
    for path in paths:
        found, note = read_answers(path)
        if path == paths[0]:
            rows, whole = found, all(row["question"] and row["truth"] for row in found)
            check(whole, f"{path}: lacks questions or true answers; name one of --qa first")
        else:
            found, lost = match(rows, found)
            first = f"; the first: {few(filter(None, lost[0].values()))}" if lost else ""
            note += f"; {count(len(lost), 'row')} match no question, or not one alone{first}"
            check(any(found), f"{path}: {note}")
        notes.append(f"{path}: {note}.")
        odd = stems.count(path.stem) > 1 or re.fullmatch(OWN, path.stem)
        name = os.path.join(".", path) if odd else path.stem
        for field, column in FIELDS.items():
            answers = [row and row[field] for row in found]
            if any(answer is not None for answer in answers):
                system = column if len(paths) == 1 else name if field == "answer" else f"{name}, {column}"
                systems[system] = [answer and without_thoughts(answer) for answer in answers]
    by_all = [None not in answers for answers in zip(*systems.values())]
    check(any(by_all), f"{few(paths)}: no question is answered by all")
    answered = f"{sum(by_all):,} of {len(rows):,} questions answered by all: the means are of these"
    notes.insert(0, f"{answered}. In brackets: 95% bootstrap intervals over slides.")
    systems = {system: list(compress(answers, by_all)) for system, answers in systems.items()}
    return list(compress(rows, by_all)), systems, notes


# ---- Scores and tables: a score is an array with a number a question, a group of questions a mask ----

CAPABILITIES = {  # of WSI-Bench: the first words of their tasks
    "morphology": "Global Key Regional Specific Morphology Caption Feature cellular infiltration tissue",
    "diagnosis": "Histological Grading Molecular Staging Diagnosis Classification Grade Subtype Stage",
    "treatment": "Treatment Prognosis",
    "report": "report",
}
CAPABILITY = {word: name for name, words in CAPABILITIES.items() for word in words.split()}
TEXTUAL = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "METEOR", "exact match")  # of open questions
METRICS = (*JUDGED, "accuracy", *TEXTUAL)
ON_SCREEN = {"all": ("accuracy", "exact match", *JUDGED), "task": ("accuracy", "exact match")}
# Of arXiv 2412.02141, in the order of METRICS.
PUBLISHED = {"morphology": (0.488, 0.610, 0.951), "diagnosis": (0.610, 0.612, 0.863)}
PUBLISHED |= {"treatment": (0.810, 0.845, 1.0), "report": (0.380, 0.429)}


def score(rows, answers, meteor):
    """Answers [n] -> ({metric: values [n], nan: none}; closed answers without a choice)."""
    scores, unread = {metric: np.full(len(rows), np.nan) for metric in METRICS[2:]}, []
    for i, (row, answer) in enumerate(zip(rows, answers)):
        parser, truth = closed_parser(row["question"], row["truth"]), row["truth"]
        if parser and answer is not None:
            scores["accuracy"][i] = parser(answer) == parser(truth)
            unread += [answer] if parser(answer) is None else []
        elif answer is not None:
            tokens = tokenize(truth), tokenize(answer)
            values = *bleu(*tokens), rouge_l(*tokens), meteor(*tokens), plain(answer) == plain(truth)
            for metric, value in zip(TEXTUAL, values):
                scores[metric][i] = value
    return scores, unread


@lru_cache(8)
def resampled(n, seed):
    """How often each of n slides is in 1,000 bootstrap samples, [1000,n]."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), 1000).astype(float)


def interval(values, slides, seed):
    """Mean of values [n] and its 95% bootstrap interval over slides [n], or None."""
    known = ~np.isnan(values)
    if not known.any():
        return None
    _, index = np.unique(slides[known], return_inverse=True)
    sums, counts = np.bincount(index, values[known]), np.bincount(index)
    draws = resampled(len(sums), seed)
    return sums.sum() / counts.sum(), *np.percentile((draws @ sums) / (draws @ counts), [2.5, 97.5])


def tabulate(rows, scores, trained_on, seed):
    """{system: {metric: values [n]}} -> lines {kind, group, metric, ..., system: (mean, low, high)}."""
    slides, lines, (first, *others) = np.array([row["slide"] for row in rows]), [], scores
    tasks = ["report" if wsi_llava.is_report(row) else re.split("[_ ]", row["task"])[0] for row in rows]
    kinds = {"all": ["all"] * len(rows), "capability": [CAPABILITY.get(task, "other") for task in tasks]}
    kinds |= {"task": [row["task"] for row in rows], "cancer type": [row["cancer"] for row in rows]}
    for kind, groups in kinds.items():
        names = sorted(set(groups)) if kind == "all" or len(set(groups)) > 1 else []
        for group, metric in product(names, METRICS):
            inside = np.array(groups) == group
            values = {x: np.where(inside, found.get(metric, np.nan), np.nan) for x, found in scores.items()}
            line = {"kind": kind, "group": group, "metric": metric}
            line["questions"] = int((~np.isnan(values[first])).sum())
            line["training slides"] = trained_on[group] if kind == "cancer type" and trained_on else None
            published = dict(zip(METRICS, PUBLISHED.get(group, ()))) if kind == "capability" else {}
            line["published"] = published.get(metric)
            line |= {system: interval(x, slides, seed) for system, x in values.items()}
            for system in others:  # paired
                line[f"{system} - {first}"] = interval(values[system] - values[first], slides, seed)
            lines += [line] if line["questions"] else []
    return lines


def correlations(scores):
    """Of the text metrics' ranks with the judge's, a text."""

    def ranks(values):  # ties share one
        _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[index]

    texts = []
    for x, y in product(TEXTUAL, JUDGED):
        known = ~np.isnan(scores[x] + scores[y])
        if known.sum() > 2:
            with np.errstate(invalid="ignore"):  # one side may be constant
                rank = np.corrcoef(ranks(scores[x][known]), ranks(scores[y][known]))[0, 1]
            texts.append(f"{x} with {y} {rank:.2f}")
    return ", ".join(texts)


def markdown(table):
    """Lines of cells, the header first -> a table."""
    lines = []
    for line in table:
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*x) if isinstance(x, tuple) else x for x in line]
        lines.append(["" if x is None else one_line(x).replace("|", "\\|") for x in cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def on_screen(lines, systems):
    """The table for 160 columns."""
    table, rouge = [["task", "metric", "n", *(name[-20:] for name in systems), "ROUGE-L"]], None
    for line in lines:
        metric = line["metric"]
        if metric == "ROUGE-L":
            rouge = f"{line[systems[0]][0]:.3f}"
        elif metric in ON_SCREEN.get(line["kind"], ()):
            cells = [line["group"][:28], metric, line["questions"], *(line[x] for x in systems)]
            table.append([*cells, rouge if metric == "exact match" else None])
    return markdown(table)


def csv_text(lines):
    """A number a cell; an apostrophe before what spreadsheets take for a formula."""
    rows, file = [], io.StringIO()
    for line in lines:
        rows.append({})
        for key, cell in line.items():
            rows[-1] |= zip((key, f"{key} low", f"{key} high"), cell if isinstance(cell, tuple) else [cell])
    header = list(dict.fromkeys(chain(*rows)))
    for cells in (header, *([row.get(key) for key in header] for row in rows)):
        cells = [f"'{x}" if isinstance(x, str) and x[:1] in tuple("=+-@\t\r") else x for x in cells]
        csv.writer(file, lineterminator="\n").writerow(cells)
    return file.getvalue()


def evaluate(args, paths):
    """--evaluate: a table, and all of it beside the first file."""
    (rows, systems, notes), scores, grades, meteor = read_systems(paths), {}, {}, find_meteor()
    if args.judge_model:
        asked = args.judge_url, args.judge_model, paths[0].with_name("judge.jsonl"), args.judge_protocol
        grades = grade(Judge(*asked), rows, systems, notes)
    train, told, seen = args.data / "qa" / "train.jsonl", defaultdict(Counter), set()
    for row in prepare.read_qa(train) if train.exists() else []:
        told[row["task"]].update(turn["value"] for turn in row["conversations"][1::2])
        seen.add((row["cancer"], row["slide"]))
    if told.keys() & {row["task"] for row in rows}:
        most = {task: answers.most_common(1)[0][0] for task, answers in told.items()}
        systems["majority"] = [most.get(row["task"]) for row in rows]
        notes.append(f"majority: a task's most frequent answer in {train}.")
    for system, answers in systems.items():
        found, unread = score(rows, answers, meteor)
        scores[system] = found | grades.get(system, {})
        if unread:
            what = f"{count(len(unread), 'closed answer')} name no option, or several: wrong"
            notes.append(f"{system}: {what}; the first: {one_line(unread[0], 60)!r}.")
    for system in list(grades)[:1]:
        notes.append(f"Rank correlations of {system}: {correlations(scores[system])}.")
    lines = tabulate(rows, scores, Counter(cancer for cancer, _ in seen), args.seed)
    header = [key for key in lines[0] if any(line[key] is not None for line in lines)]
    table = markdown([header, *([line[key] for key in header] for line in lines)])
    notes = "".join(f"- {one_line(note, 2000)}\n" for note in notes)
    path = paths[0].with_name("evaluation.md")
    write_text(path, f"# Evaluation\n\n{notes}\n{table}\n")
    write_text(path.with_suffix(".csv"), csv_text(lines))
    systems = [x for x in systems if not x.endswith((", no slide", ", other slide"))]
    print(f"\n{on_screen(lines, systems[:4])}\n\n{notes}- All of it: {path} (and .csv)")


# ---- Flags, and what they start ----


def parse(argv=None):
    parser, number = wsi_llava.Parser(__doc__), wsi_llava.at_least
    add, file = parser.group("one slide"), {"type": Path, "metavar": "FILE"}
    add("--slide", "a slide file, or a prepared slide's name", metavar="S")
    add("--ask", "one question; without it, a chat", metavar="Q")
    add("--zero-shot", "each text's probability, by stage 1", metavar="TEXT", nargs="+")
    add("--heatmap", "the tiles behind the answer: .png, .geojson", nargs="+", default=[], **file)
    add("--mpp", "um per pixel of a raw slide that does not tell it", type=number(0.05, float, 20))
    add = parser.group("how it answers")
    add("--int8", "the language model in int8: half the memory", action="store_true")
    add("--max-new-tokens", "longest answer (default: 512)", type=number(1), default=512)
    add("--temperature", "above 0 (default): sampled", type=number(0, float, 100), default=0.0)
    add("--max-tiles", "of a slide, at random (default: 0, all)", type=number(0), default=0)
    add = parser.group("many questions")
    add("--qa", "answer these files' questions; resumes", nargs="+", **file)
    add("--predictions", "default: predictions.jsonl in --out", **file)
    add("--baselines", "also without the slide, and with another's", action="store_true")
    add = parser.group("evaluation")
    add("--evaluate", "a table of these files (default: --predictions)", nargs="*", **file)
    add("--judge-model", "grades open answers; key: OPENAI_API_KEY", metavar="M")
    add("--judge-url", "OpenAI-compatible (default: OpenAI's)", metavar="URL", default=OPENAI)
    add("--judge-protocol", "ours (default), or the released one", choices=PROMPTS, default="ours")
    wsi_llava.add_weights_flags(parser)
    wsi_llava.add_shared_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    args.predictions = args.predictions or args.out / "predictions.jsonl"
    wsi_llava.resolve_device(args)
    given = args.slide or args.qa or args.evaluate is not None
    check(given, "nothing to do: give --slide, --qa or --evaluate")
    for path in args.heatmap:
        check(args.slide and args.ask, "--heatmap needs --slide and --ask")
        fits = path.suffix in (".png", ".geojson") and path.parent.is_dir()
        check(fits, f"--heatmap {path}: must end in .png or .geojson, in a folder that is there")
    if args.qa:
        answer_file(args)
    elif args.slide and args.evaluate is None:
        ask_about_slide(args)
    if args.evaluate is not None:
        evaluate(args, args.evaluate or [args.predictions])


if __name__ == "__main__":
    wsi_llava.run(main, on_interrupt="interrupted; --qa and --evaluate go on where they stopped")
