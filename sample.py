"""Asks WSI-LLaVA about slides: one question, a chat, or a whole benchmark and its evaluation.

    python sample.py --slide S --ask Q          one answer, streamed; S is a slide file, or a prepared slide's name
    python sample.py --slide S                  a chat about it
    python sample.py --slide S --ask Q --heatmap out.png    and which tiles made the answer what it is
    python sample.py --slide S --zero-shot TEXT TEXT        which of the texts fits the slide, by stage 1 alone
    python sample.py --qa FILE --baselines --evaluate       answers to all questions, then their tables, in out/
    python sample.py --evaluate FILE --judge-model M        the tables, open answers graded by a language model

Several slides of one case go into one prompt: --slide a.svs b.svs. --region x,y,w,h asks about a part of a slide.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import http.client
import io
import json
import math
import os
import re
import shlex
import socket
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import wsi_llava
from wsi_llava import (
    TILE,
    UserError,
    at_least,
    read_features,
    read_visual_tokens,
    replacing,
    without_image,
    write_text,
)

# --------------------------------------------------------------------------------------------------------------------
# The model, and the slides that it is asked about: files and names -> visual tokens
# --------------------------------------------------------------------------------------------------------------------


def load_model(args, meta):
    """The model as far as it is trained, on --device -> (WSILLaVA, Tokenizer). Raises UserError as wsi_llava.load_model does."""
    model, tokenizer = wsi_llava.load_model(args, meta, 3, int8=args.int8)
    return model.to(args.device), tokenizer


def gigabytes(args):
    """The peak of memory so far, in words."""
    return f"{wsi_llava.peak_memory(args.device) / 1e9:.2f} GB"


def prepare_raw(args, names):
    """--slide's files and names -> names of slides in data/. Files are prepared first, like any other slide."""
    raw = []
    for name in names:
        prepared = wsi_llava.is_slide_name(name) and wsi_llava.features_file(args.data, name).exists()
        if Path(name).exists() and not prepared:
            raw.append(name)
    if not raw:
        return names
    import prepare  # here, so that asking about prepared slides needs no OpenSlide

    slides = {name: prepare.find_slides([name]) for name in raw}
    failures = prepare.prepare_slides(
        prepare.with_defaults(args), {slide: path for found in slides.values() for slide, path in found.items()}
    )
    if failures:
        raise UserError(failures[0][1])
    return [slide for name in names for slide in slides.get(name, [name])]


def why_missing(cfg, data, slide):
    """What keeps a slide from being asked about, in words; None where nothing does."""
    unknown = f"neither a file nor the name of a slide in {data}/features"
    if not wsi_llava.is_slide_name(slide):
        return unknown
    if not wsi_llava.features_file(data, slide).exists():
        imported = wsi_llava.visual_tokens_file(data, slide, cfg).exists()  # without features, but as good
        return None if imported else unknown
    try:
        empty = not len(read_features(data, slide)[0])
    except UserError as error:
        return str(error)
    return f"no tissue was found on it; look at {data}/qc/{slide}.jpg" if empty else None


@torch.inference_mode()
def region_tokens(model, data, slide, region):
    """Visual tokens [V,C] of the tiles whose centres lie in the region (x, y, width, height), in level-0 pixels."""
    path = wsi_llava.features_file(data, slide)
    try:
        scale = wsi_llava.feature_metadata(path)["scale"]  # level-0 pixels per tiled pixel
    except (UserError, KeyError):
        raise UserError(f"--region: {path} does not tell its scale to level 0") from None
    features, coords = read_features(data, slide, model.cfg.max_tiles)
    centres = (coords + model.cfg.slide_encoder.tile_size / 2) * scale  # [N,2]
    x, y, width, height = region
    inside = ((centres >= torch.tensor([x, y])) & (centres < torch.tensor([x + width, y + height]))).all(1)
    if not inside.any():
        low, high = centres.min(0).values.tolist(), centres.max(0).values.tolist()
        raise UserError(
            f"--region {x:g},{y:g},{width:g},{height:g}: no tile of {slide} lies inside; the centres of its tiles lie "
            f"between {low[0]:.0f},{low[1]:.0f} and {high[0]:.0f},{high[1]:.0f} (level-0 pixels)"
        )
    return model.encode_slide(features[inside], coords[inside])


def slide_tokens(args, model, slides):
    """Names of slides in data/ -> visual tokens [S,V,C], kept in data/visual_tokens; those of --region on the fly."""
    for slide in slides:
        if problem := why_missing(model.cfg, args.data, slide):
            raise UserError(f"--slide {slide}: {problem}")
    if args.region:
        return torch.stack([region_tokens(model, args.data, slide, args.region) for slide in slides])
    _, problems = wsi_llava.cache_visual_tokens(model, args.data, slides)
    for slide, problem in problems.items():
        raise UserError(f"--slide {slide}: {problem}")
    return torch.stack([read_visual_tokens(args.data, slide, model.cfg) for slide in slides])


@torch.inference_mode()
def zero_shot(args, meta, slide, texts):
    """Probability of each text: softmax of its scaled similarity to the slide, in the space of stage 1."""
    import train  # here: only stage 1's model is defined there

    cfg, model, words, tokenizer = train.load_alignment(args, meta)
    if problem := why_missing(cfg, args.data, slide):
        raise UserError(f"--slide {slide}: {problem}")
    features, coords = read_features(args.data, slide, cfg.max_tiles)
    slides = model.embed_slides(features.to(args.device, torch.float32), coords.to(args.device), [len(features)])
    texts = model.embed_words([tokenizer.encode(text)[: cfg.text_encoder.max_length] for text in texts], words)
    return (model.logit_scale.exp().clamp(max=100) * slides @ texts.T)[0].softmax(-1).tolist()


# --------------------------------------------------------------------------------------------------------------------
# A conversation
# --------------------------------------------------------------------------------------------------------------------


class Chat:
    """A conversation about slides, visual tokens [V,C] or [S,V,C]. The key-value cache is kept between turns."""

    def __init__(self, model, tokenizer, visual, **options):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.visual = visual if visual.dim() == 3 else visual[None]
        like = model.mm_projector[0].weight
        self.cache = wsi_llava.KVCache(model.cfg.llama, 1, model.cfg.llama.context, like.device, like.dtype)
        self.tail = []  # the last reply's tokens that the cache does not hold yet
        self.turns, self.tokens = [], 0  # what was said; tokens of the last reply

    def reply(self, question):
        """Yields the answer piece by piece. Raises UserError where the conversation no longer fits the context."""
        question, n = without_image(question), len(self.visual)
        if not self.cache.length:
            marks = "<image>\n" if n == 1 else "".join(f"Slide {i}: <image>\n" for i in range(1, n + 1))
            question = marks + question
            ids, visual = self.tokenizer.encode_chat([{"from": "human", "value": question}])[0], [self.visual]
        else:
            ids, visual = self.tail + self.tokenizer.encode_turn(question, first=False), None
        answer, shown, text, self.tokens = [], "", "", 0
        for (token,) in self.model.generate(visual, [ids], ends=self.tokenizer.ends, cache=self.cache, **self.options):
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
        self.turns += [{"from": "human", "value": question}, {"from": "gpt", "value": text}]


def stream_answer(args, names, chat, question):
    """Streams one answer, or with --json prints one object -> (tokens, seconds)."""
    started = time.time()
    for piece in chat.reply(question):
        print("" if args.json else piece, end="", flush=True)
    tokens, seconds = chat.tokens, time.time() - started
    if args.json:
        found = {"slides": names, "region": args.region, "question": question, "answer": chat.turns[-1]["value"]}
        found |= {"tokens": tokens, "seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds, 2)}
        found |= {"finished": len(chat.tail) == 1, "peak_memory": wsi_llava.peak_memory(args.device)}
        print(json.dumps(found, ensure_ascii=False), file=args.json, flush=True)
    else:
        print()
    return tokens, seconds


HELP = "/slide NAME... asks about other slides, /save FILE keeps the conversation, /quit ends"


def chat_loop(args, open_chat, names, chat):
    """Questions and commands, from a person or a pipe, until the end of the input or /quit -> (tokens, seconds)."""
    talking, spent = sys.stdin.isatty(), [0, 0.0]
    if talking:
        print(f"Ask about the slide; {HELP}.")
    while True:
        try:
            line = input("> " if talking else "").strip()
        except EOFError:
            return spent
        try:
            command, *rest = shlex.split(line) if line.startswith("/") else [""]
            if command == "/quit":
                return spent
            elif command == "/slide" and rest:
                args.region = None  # it was the other slide's
                names, chat = open_chat(rest)
                print(f"{', '.join(names)}: {chat.visual.shape[:2].numel()} visual tokens.")
            elif command == "/save" and len(rest) == 1:
                row = {"id": "chat", "slide": names[0], "task": "chat", "conversations": chat.turns}
                write_text(rest[0], json.dumps(row, ensure_ascii=False) + "\n")
                print(f"Wrote {len(chat.turns) // 2} turns to {rest[0]}.")
            elif command:
                raise UserError(f"{line}: not a command; {HELP}")
            elif line:
                spent = [a + b for a, b in zip(spent, stream_answer(args, names, chat, line))]
        except (UserError, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------------------
# Many questions
# --------------------------------------------------------------------------------------------------------------------


def by_length(prompts, batch):
    """Indices of the prompts, in groups of one length: no batch holds padding, and every answer is what it is alone."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while order:
        group = [i for i in order[:batch] if len(prompts[i]) == len(prompts[order[0]])]
        order = order[len(group) :]
        yield group


def prompt_ids(tokenizer, row, image=True):
    """The prompt of a row's last question, after the true earlier turns; its slide comes first, or not at all."""
    turns = row["conversations"][: len(row["conversations"]) - (row["conversations"][-1]["from"] == "gpt")]
    return tokenizer.encode_chat(wsi_llava.slide_first(turns, image))[0]


def answer_rows(model, tokenizer, rows, visual, max_new_tokens=96, batch=64, **options):
    """Answers to the last question of each row of the dataset, in the rows' order. options: generate's.

    visual: {slide: visual tokens [V,C]}, or None to ask without the slide.
    """
    prompts = [prompt_ids(tokenizer, row, visual is not None) for row in rows]
    answers = [None] * len(rows)
    for group in by_length(prompts, batch):
        slides = None if visual is None else torch.stack([visual[rows[i]["slide"]] for i in group]).to(model.device)
        steps = model.generate(slides, [prompts[i] for i in group], max_new_tokens, ends=tokenizer.ends, **options)
        for i, ids in zip(group, zip(*steps)):
            answers[i] = tokenizer.decode([t for t in ids if t is not None and t not in tokenizer.ends])
    return answers


# Of a line of --predictions, the fields that hold answers -> their columns in the tables.
FIELDS = {"answer": "model", "answer_no_image": "no slide", "answer_shuffled": "other slide"}
FIELDS |= {"majority": "majority"}  # each task's most frequent answer in training, whatever the slide
AT_ONCE = 64  # slides whose visual tokens are in memory together; with more, more questions of one length meet


def read_questions(files):
    """Question files in any shape that prepare.read_qa takes -> one row for each human turn, numbered by "n"."""
    import prepare

    rows = []
    for row in (row for file in files for row in prepare.read_qa(file)):
        talk = row["conversations"]
        for k in range(0, len(talk), 2):
            texts = {"question": without_image(talk[k]["value"]), "truth": talk[k + 1]["value"]}
            rows.append({"n": len(rows), **row, "turn": k // 2, **texts, "conversations": talk[: k + 1]})
    return rows


def whole_lines(path):
    """A JSON lines file, if there is one, less half a last line that a kill left -> (its objects, their bytes)."""
    data = path.read_bytes() if path.exists() else b""
    end = data.rfind(b"\n") + 1
    try:
        return [json.loads(line) for line in data[:end].splitlines()], end
    except ValueError as error:
        raise UserError(f"{path}: not JSON lines ({error}); delete it and run again") from None


def read_predictions(path):
    """-> (settings, {n: row}). Of a question that was missing first and answered later, the later row counts."""
    lines, _ = whole_lines(path)
    if not lines or not isinstance(lines[0], dict) or "settings" not in lines[0]:
        raise UserError(f"{path}: no predictions of sample.py --qa FILE, whose first line would hold the settings")
    return lines[0]["settings"], {row["n"]: row for row in lines[1:]}


def open_predictions(path, settings):
    """A file to append to, new or gone on with -> (file, {n: row} so far). Raises UserError for other settings."""
    lines, end = whole_lines(path)
    if not lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"settings": settings}) + "\n")
        return open(path, "a", encoding="utf-8"), {}
    old, rows = read_predictions(path)
    for name, value in settings.items():
        if old.get(name) != value:
            raise UserError(f"{path} was made with {name} {old.get(name)}, not {value}; name another --predictions")
    os.truncate(path, end)
    return open(path, "a", encoding="utf-8"), rows


def ask_three_ways(model, tokenizer, rows, visual, other, args):
    """Rows of equally long prompts -> {field: answer} of each, with --baselines also without the slide, or another."""
    views = {"answer": visual}
    if args.baselines:
        views |= {
            "answer_no_image": None,
            "answer_shuffled": {row["slide"]: visual[other[row["slide"]]] for row in rows},
        }
    options = {"max_new_tokens": args.max_new_tokens}
    try:
        texts = [answer_rows(model, tokenizer, rows, view, batch=args.batch_size, **options) for view in views.values()]
    except UserError as error:  # the prompt is too long, of all of them
        return [{**dict.fromkeys(views, ""), "error": str(error)} for _ in rows]
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch-size {args.batch_size}: out of memory; the same command with a smaller one goes on"
        ) from None
    return [dict(zip(views, answers)) for answers in zip(*texts)]


def write_prediction(file, row, **answers):
    """A line of --predictions: the row, less its conversation, and what was answered."""
    row = {k: v for k, v in row.items() if k != "conversations"} | answers
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def answer_file(args, meta):
    """--qa: every question of the files -> --predictions, a line each, after a line of settings. Resumes by itself.

    Greedy, so that a table can be made again. Of a dialogue every question is asked, after the true earlier answers.
    """
    if args.temperature:
        raise UserError("--temperature: --qa answers greedily, so that its table can be made again; leave the flag out")
    rows = read_questions(args.qa)
    model, tokenizer = load_model(args, meta)
    settings = {"questions": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}
    settings |= {"model": wsi_llava.fingerprint(model), "dtype": str(args.dtype)}
    settings |= {name: getattr(args, name) for name in ("max_new_tokens", "baselines", "seed")}
    slides = dict.fromkeys(row["slide"] for row in rows)
    problems = {slide: why for slide in slides if (why := why_missing(model.cfg, args.data, slide))}
    file, done = open_predictions(args.predictions, settings)
    todo = [row for row in rows if done.get(row["n"], {}).get("answer") is None]
    print(
        f"{len(rows):,} questions about {len(slides):,} slides, {len(problems):,} of which are not prepared; "
        f"{len(rows) - len(todo):,} are answered. Asks the others{' three ways' * args.baselines}, into {args.predictions}."
    )
    for slide in tqdm([s for s in slides if s not in problems], desc="visual tokens", unit="slide", disable=not todo):
        problems |= wsi_llava.cache_visual_tokens(model, args.data, [slide])[1]
    lacking = [row for row in todo if row["slide"] in problems]
    todo = [row for row in todo if row["slide"] not in problems]
    order = np.random.default_rng(args.seed).permutation([s for s in slides if s not in problems]).tolist()
    other = dict(zip(order, order[1:] + order[:1]))  # everyone gets another's slide, unless there is only one
    started, failed = time.time(), []
    with file, tqdm(total=len(todo), unit="question", disable=not todo) as bar:
        for row in lacking:
            if row["n"] not in done:
                write_prediction(file, row, answer=None, missing=problems[row["slide"]])
        for k in range(0, len(order), AT_ONCE):
            near = order[k : k + AT_ONCE]
            part = [row for row in todo if row["slide"] in set(near)]
            shown = {row["slide"] for row in part}
            visual = {s: read_visual_tokens(args.data, s, model.cfg) for s in shown | {other[s] for s in shown}}
            for group in by_length([prompt_ids(tokenizer, row) for row in part], args.batch_size):
                group = [part[i] for i in group]
                for row, answers in zip(group, ask_three_ways(model, tokenizer, group, visual, other, args)):
                    write_prediction(file, row, **answers)
                    failed += [row] * ("error" in answers)
                bar.update(len(group))
    seconds = time.time() - started
    rate = len(todo) / max(seconds, 1e-9)
    print(f"Answered {len(todo) - len(failed):,} questions, {rate:.1f}/s, peak memory {gigabytes(args)}.")
    for what, bad in (("were too long to ask", failed), ("are about slides that are missing", lacking)):
        if bad:
            names = list(dict.fromkeys(row["slide"] for row in bad))
            print(f"{len(bad):,} questions {what}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}")


# --------------------------------------------------------------------------------------------------------------------
# Closed answers: choice and yes/no
# --------------------------------------------------------------------------------------------------------------------


def same_answer(answer, truth):
    """Whether two short answers say the same, up to case, spaces and final punctuation."""
    return " ".join(answer.lower().split()).rstrip(".") == " ".join(truth.lower().split()).rstrip(".")


def choices(question):
    """The options of a question: "... A) Adenocarcinoma B. Sarcoma" -> {"A": "Adenocarcinoma", "B": "Sarcoma"}."""
    found = []  # matches of A, B, C, ... in this order; a stray "protein B." inside an option is passed over
    for match in re.finditer(r"(?<![^\s(])\(?([A-H])\s?[).:](?=\s|$|\w)", question):
        if match[1] == "ABCDEFGH"[len(found)]:
            found.append(match)
            if len(found) == 8:
                break
    ends = [match.start() for match in found[1:]] + [len(question)]
    return {m[1]: question[m.end() : end].strip() for m, end in zip(found, ends)} if len(found) > 1 else {}


def parse_choice(text, options):
    """The letter that an answer chooses: "B", "(b)", "B. Sarcoma", "It is sarcoma."; None for none or several."""
    text, letters = text.strip(), "".join(options)
    either = f"[{letters}{letters.lower()}]"
    says = r".*\b(?i:answer|option|choice)(?:\s+(?:is|would be|should be))?\W*"
    for pattern in (
        rf"\W*({either})\W*",  # the letter alone
        rf"\W*({either})(?:\s?[).:,]|\s+-).*",  # it comes first
        rf"{says}({either})(?:\W*|[).:,;].*)",
        rf"{says}([{letters}])\b.*",  # but not "the answer is a tumor"
    ):
        if match := re.fullmatch(pattern, text, re.S):
            return match[1].upper()
    plain = {letter: " ".join(option.lower().split()).rstrip(".") for letter, option in options.items()}
    named = {k: v for k, v in plain.items() if v and v in " ".join(text.lower().split())}
    named = {k for k, v in named.items() if not any(v != w and v in w for w in named.values())}
    # Letters by themselves; an A before a small word is an article.
    alone = re.findall(rf"\(({either})\)|(?<![\w-])(A(?!\s+(?!and\b|or\b)[a-z])|[{letters[1:]}])(?![\w-])", text)
    for found in (named, {max(pair).upper() for pair in alone}):
        if len(found) == 1:
            return found.pop()
    return None


def parse_yes_no(text):
    """ "yes" or "no", None where an answer says neither at its start nor as "the answer is ..."."""
    match = re.match(r"(?:.*\banswer(?: is)?\b)?\W*(yes|no|true|false)\b", text.strip(), re.I | re.S)
    return match and {"true": "yes", "false": "no"}.get(match[1].lower(), match[1].lower())


def closed_parser(question, truth):
    """For a closed question, the function that reads its answers; None for an open one."""
    options = choices(question)
    if options and parse_choice(truth, options):
        return lambda text: parse_choice(text, options)
    return parse_yes_no if re.fullmatch(r"\W*(yes|no|true|false)\W*", truth, re.I) else None


# --------------------------------------------------------------------------------------------------------------------
# Text metrics, as the released evaluation takes them: BLEU and ROUGE-L of one answer, then the mean over answers
# --------------------------------------------------------------------------------------------------------------------


def tokenize(text):
    """Words and punctuation, in their own case: what nltk.word_tokenize makes of 99.5% of WSI-Bench's answers."""
    return re.findall(r"\w+(?:[-./+=,]+\w+)*\+?|'\w+|[^\w\s]", text)


def bleu(reference, candidate):
    """Tokens -> [BLEU-1, ..., BLEU-4] of one sentence with nltk's smoothing method 4 (Chen and Cherry 2014)."""

    def ngrams(tokens, n):
        return collections.Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    length, logs, empty = len(candidate), [], 0
    for n in range(1, 5):
        have = ngrams(candidate, n)
        match, total = (have & ngrams(reference, n)).total(), max(1, have.total())
        if n == 1 and not match:
            return [0.0] * 4
        if not match and length > 1:  # the more orders have no match, and the shorter the answer, the less it counts
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
    """Tokens -> ROUGE-L's F as the `rouge` package has it: over sets of words, all sentences' subsequences united."""
    sides = []
    for tokens in (reference, candidate):
        sentences = [" ".join(s.split()).split(" ") for s in " ".join(tokens).split(".") if s]
        sides.append((sentences, {word for sentence in sentences for word in sentence}))
    (references, all_reference), (candidates, all_candidate) = sides
    if not candidates or not references:
        return 0.0
    common = len(set().union(*(common_words(r, c) for r in references for c in candidates)))
    recall, precision = common / len(all_reference), common / len(all_candidate)
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


# --------------------------------------------------------------------------------------------------------------------
# The judge: WSI-Precision and WSI-Relevance
# --------------------------------------------------------------------------------------------------------------------

CLAIMS = """You prepare the grading of answers to questions about whole slide pathology images. Split the given answer into \
claims. Take what answers the question and nothing else; one finding or fact a claim, but keep together what only makes sense \
together; leave nothing out, repeat nothing, add nothing. Reply with strict JSON alone: {"claims": ["...", "..."]}"""
SCORES = """You grade claims about a whole slide pathology image against a text, both of which answer the same question. Give \
each claim one score. 1: the text says the same. 0.7: mostly the same, with a small omission or deviation. 0.3: the text \
mentions it, but with an error in its core, such as the grade, the type or whether it is malignant. 0: the text says something \
else, or nothing about it. Reply with strict JSON alone, one score a claim, in the claims' order: {"scores": [1, 0.3]}"""
SCALE = (1, 0.7, 0.3, 0)


def check_claims(reply, least):
    """The judge's claims, at least so many. Raises KeyError, TypeError or ValueError for a reply of another form."""
    claims = reply["claims"]
    if not isinstance(claims, list) or len(claims) < least or not all(isinstance(c, str) and c.strip() for c in claims):
        raise ValueError(f'"claims" must be a list of {least} texts or more')
    return claims


def check_scores(reply, n):
    """The judge's scores of n claims. Raises KeyError, TypeError or ValueError for a reply of another form."""
    scores = reply["scores"]
    if not isinstance(scores, list) or len(scores) != n:
        raise ValueError(f'"scores" must be a list of {n} numbers, one for each claim')
    if bad := [s for s in scores if isinstance(s, bool) or s not in SCALE]:
        raise ValueError(f"{bad[0]} is not on the scale; only 1, 0.7, 0.3 and 0 are")
    return scores


class Judge:
    """A language model behind an OpenAI-compatible endpoint. Raw replies are kept in a file under the hash of model and
    prompt: nothing is paid for twice, and an interrupted run goes on. dry: counts calls and tokens and makes none.
    """

    def __init__(self, url, model, path, dry=False, attempts=5, timeout=120.0, backoff=2.0):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--judge-url {url}: begins with neither http:// nor https://")
        self.url = url if url.endswith("/chat/completions") else url.rstrip("/") + "/chat/completions"
        self.model, self.dry, self.attempts, self.timeout, self.backoff = model, dry, attempts, timeout, backoff
        lines, end = whole_lines(path)
        self.replies = {line["key"]: line["reply"] for line in lines}
        if not dry:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file, self.lock = open(path, "a", encoding="utf-8"), threading.Lock()  # noqa: SIM115 (open for the run)
            os.truncate(path, end)
        self.planned, self.tokens = set(), 0  # of a dry run
        self.problems = collections.Counter()  # why replies stayed unusable

    def post(self, messages):
        """One reply's text. Failures that pass are tried again, after Retry-After or ever longer. Raises OSError."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        body = json.dumps({"model": self.model, "messages": messages}).encode()
        for attempt in range(self.attempts):
            wait = self.backoff * 2**attempt
            try:
                request = urllib.request.Request(self.url, body, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}"
                if error.code in (401, 403, 404):
                    raise UserError(
                        f"--judge-url {self.url}: {problem}; check it, --judge-model, OPENAI_API_KEY"
                    ) from None
                if error.code in (400, 413, 422):
                    break  # this prompt will not pass later either
                with contextlib.suppress(TypeError, ValueError):
                    wait = float(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                problem, reason = type(error).__name__, getattr(error, "reason", error)
                if isinstance(reason, (ConnectionRefusedError, socket.gaierror)) and attempt == self.attempts - 1:
                    raise UserError(f"--judge-url {self.url}: nobody answers there ({reason})") from None
            if attempt < self.attempts - 1:
                time.sleep(wait)
        raise OSError(problem)

    def ask(self, task, content, check, stand_in):
        """check(the JSON of the reply), asking again with the reason where it fails; None where it stays unusable."""
        content = json.dumps(content, ensure_ascii=False)
        messages = [{"role": "system", "content": task}, {"role": "user", "content": content}]
        for _ in range(self.attempts):
            key = hashlib.sha256(json.dumps([self.model, messages]).encode()).hexdigest()
            reply = self.replies.get(key)
            if reply is None and self.dry:
                if key not in self.planned:
                    self.planned.add(key)
                    self.tokens += sum(map(len, (task, content, json.dumps(stand_in)))) // 4  # four characters a token
                return stand_in
            try:
                if reply is None:
                    reply = self.post(messages)
                    with self.lock:
                        self.replies[key] = reply
                        self.file.write(json.dumps({"key": key, "reply": reply}) + "\n")
                        self.file.flush()
                found = re.search(r"\{.*\}", reply, re.S)  # models like to fence their JSON
                return check(json.loads(found[0] if found else reply))
            except OSError as error:
                self.problems[str(error)] += 1
                return None
            except (ValueError, KeyError, TypeError) as error:
                problem = f"unusable ({type(error).__name__}: {error})"
                again = f"Your reply is {problem}. Reply again, with the strict JSON alone."
                messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": again}]
        self.problems[problem] += 1
        return None

    def reasons(self):
        return "".join(f"; {n} times: {problem}" for problem, n in self.problems.most_common(3))

    def grade(self, question, answer, truth):
        """-> {"WSI-Precision": claims of the truth, scored against the answer; "WSI-Relevance": the other way round}.

        Each the mean over its claims, None where the replies stayed unusable.
        """

        def score(claimed, text, least):
            if not claimed.strip() or not text.strip():
                return 0.0
            content = {"question": question, "answer": claimed}
            claims = self.ask(CLAIMS, content, lambda reply: check_claims(reply, least), [claimed])
            if not claims:  # nothing said that bears on the question, or nothing usable
                return None if claims is None else 0.0
            content = {"question": question, "claims": claims, "text": text}
            scores = self.ask(SCORES, content, lambda reply: check_scores(reply, len(claims)), [0] * len(claims))
            return None if scores is None else float(np.mean(scores))

        return {"WSI-Precision": score(truth, answer, 1), "WSI-Relevance": score(answer, truth, 0)}


def find_judge(args, path):
    """The Judge that the flags name, with its replies so far in the file; None where they name none."""
    if args.judge_dry_run and not args.judge_model:
        raise UserError("--judge-dry-run: which judge? name it with --judge-model")
    return Judge(args.judge_url, args.judge_model, path, args.judge_dry_run) if args.judge_model else None


def grade_rows(judge, rows, fields, workers):
    """Adds "grades" {field: Judge.grade's} to the rows, so many of them at once."""
    print(f"{len(rows):,} open questions for {judge.model}; {len(judge.replies):,} of its replies are kept already.")

    def work(row):
        row["grades"] = {field: judge.grade(row["question"], row[field], row["truth"]) for field in fields}

    with concurrent.futures.ThreadPoolExecutor(1 if judge.dry else workers) as pool:
        try:
            for _ in tqdm(pool.map(work, rows), total=len(rows), desc="judge", unit="question", disable=judge.dry):
                pass
        except BaseException:  # Ctrl-C too: what was asked is kept, what waits is not asked
            pool.shutdown(cancel_futures=True)
            raise


# --------------------------------------------------------------------------------------------------------------------
# Evaluation: the tables
# --------------------------------------------------------------------------------------------------------------------

CAPABILITIES = {  # of WSI-Bench's 11 tasks, under the names of both of its shapes
    "morphology": "Global_Morphology_Description Key_Diagnostic_Description Regional_Structure_Description "
    "Specific_Feature_Description Morphology_choice Caption Feature Morphology cellular infiltration tissue",
    "diagnosis": "Histological_Typing Grading Molecular_Subtyping Molecular_Subtyping_choice Staging Staging_choice "
    "Diagnosis_choice Classification Grade Subtype Stage",
    "treatment": "Treatment_Planing Treatment_Planning Treatment Prognosis Prognosis_TF_question",
}
CAPABILITY = {task: name for name, tasks in CAPABILITIES.items() for task in tasks.split()}
JUDGED = ("WSI-Precision", "WSI-Relevance")  # of open answers, by the judge
NLU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "METEOR")  # of open answers, by their text
METRICS = (*JUDGED, "accuracy", *NLU, "exact match")
PUBLISHED = {  # of WSI-LLaVA, December 2024, in the order of METRICS
    "morphology": (0.488, 0.610, 0.951),
    "diagnosis": (0.610, 0.612, 0.863),
    "treatment": (0.810, 0.845, 1.0),
    "report": (0.380, 0.429, None, 0.3531, 0.1859, 0.1058, 0.0665, 0.2626, 0.3072),
}
AVERAGE = 0.754  # of the nine figures of the three capabilities
# Of what a line of the tables is about, and what it says before the means.
KINDS = ("all", "capability", "common or rare", "task", "cancer type")
COLUMNS = ("kind", "group", "metric", "questions", "missing", "unusable")


def score_row(row, fields, meteor):
    """Adds "scores" {field: {metric: value}} to a row, and "unusable" {field: metrics without value, which count 0}."""
    row["scores"], row["unusable"], parser = {}, {}, row["parser"]
    for field in fields:
        if parser:
            said = parser(row[field])
            found = {"accuracy": None if said is None else said == parser(row["truth"])}
        else:
            truth, tokens = tokenize(row["truth"]), tokenize(row[field])
            found = dict(zip(NLU, [*bleu(truth, tokens), rouge_l(truth, tokens)]))
            found |= {"METEOR": meteor(truth, tokens)} if meteor else {}
            found |= {"exact match": same_answer(row[field], row["truth"]), **row.get("grades", {}).get(field, {})}
        row["scores"][field] = {metric: float(value or 0) for metric, value in found.items()}
        row["unusable"][field] = [metric for metric, value in found.items() if value is None]


def interval(values, slides, seed):
    """Mean, and the 95% bootstrap interval over slides: a slide's questions stand and fall together."""
    _, index = np.unique(slides, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(1000, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return [float(x) for x in (np.mean(values), *np.percentile(means, [2.5, 97.5]))]


def spearman(x, y):
    """Rank correlation; ties share their mean rank. Not a number where one side is constant."""

    def ranks(values):
        _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[index]

    x, y = (r - r.mean() for r in map(ranks, (x, y)))
    return float((x @ y) / math.sqrt((x @ x) * (y @ y))) if x.any() and y.any() else math.nan


def majority_answers(training):
    """{task: its most frequent answer in data/qa/train.jsonl}; {} where that is not there."""
    counts = collections.defaultdict(collections.Counter)
    with open(training, encoding="utf-8") if training.exists() else contextlib.nullcontext([]) as file:
        for row in map(json.loads, file):
            counts[row["task"]].update(turn["value"] for turn in row["conversations"][1::2])
    return {task: answers.most_common(1)[0][0] for task, answers in counts.items()}


def common_and_rare(rows, training):
    """{cancer type: "common ..." or "rare ..."}: rare has fewer slides (in training, if known) than the median type."""
    slides, known = collections.defaultdict(set), training.exists()
    with open(training, encoding="utf-8") if known else contextlib.nullcontext([]) as file:
        for row in map(json.loads, file) if known else rows:
            slides[row.get("cancer")].add(row["slide"])
    counts = {cancer: len(slides[cancer]) for cancer in {row["cancer"] for row in rows}}
    middle, where = np.median(list(counts.values())), "training" if known else "these"
    name = {cancer: f"{'rare' if n < middle else 'common'} types, by {where} slides" for cancer, n in counts.items()}
    return name if len(name) > 1 else {}


def tabulate(rows, fields, rarity, seed):
    """Scored rows -> lines {**COLUMNS, field: [mean, low, high], "published"}, a line for each group and metric."""
    groups = collections.defaultdict(list)
    for row in rows:
        capability = "report" if wsi_llava.is_report(row) else CAPABILITY.get(row["task"], "other")
        for key in zip(KINDS, ("all", capability, rarity.get(row["cancer"]), row["task"], row["cancer"])):
            groups[key].append(row)
    lines = []
    for (kind, group), members in sorted(groups.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1] or "")):
        for metric in METRICS if group else ():
            fitting = [row for row in members if bool(row["parser"]) == (metric == "accuracy")]
            chosen = [row for row in fitting if metric in row.get("scores", {}).get("answer", {})]
            if not chosen and (metric != "METEOR" or not fitting):
                continue
            missing = sum(row["answer"] is None for row in fitting)
            unusable = sum(metric in row["unusable"]["answer"] for row in chosen)
            line = dict(zip(COLUMNS, (kind, group, metric, len(chosen), missing, unusable)))
            for field in fields if chosen else ():
                if metric not in chosen[0]["scores"][field]:  # nobody judges the majority's answers
                    continue
                values = [row["scores"][field][metric] for row in chosen]
                line[field] = interval(values, [row["slide"] for row in chosen], seed)
            published = dict(zip(METRICS, PUBLISHED.get(group, ()))) if kind == "capability" else {}
            lines.append({**line, "published": published.get(metric)})
    nine = [line for line in lines if line["group"] in CAPABILITIES and line["metric"] in METRICS[:3]]
    if len(nine) == 9:
        total = [sum(line[column] for line in nine) for column in COLUMNS[3:]]
        judged = [field for field in fields if all(field in line for line in nine)]
        means = {field: [float(np.mean([line[field][0] for line in nine]))] for field in judged}
        lines.insert(0, {**dict(zip(COLUMNS, ("all", "all", "average", *total))), **means, "published": AVERAGE})
    return lines


def markdown(lines, fields):
    """The lines as a Markdown table whose columns are aligned, to be read as it is."""
    table = [[*COLUMNS, *(FIELDS[field] for field in fields), "published"]]
    for line in lines:
        cells = [f"{line[column]}" for column in COLUMNS]
        for mean, *ends in (line.get(field, [None]) for field in fields):
            cells.append("n/a" if mean is None else f"{mean:.3f}" + " [{:.3f}, {:.3f}]".format(*ends) * bool(ends))
        table.append([*cells, "" if line["published"] is None else f"{line['published']:g}"])
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table)


def agreement(rows):
    """How far the text metrics tell the same story as the judge: rank correlations over the open questions."""
    scores = [row["scores"]["answer"] for row in rows if "grades" in row]
    for name in JUDGED if scores else ():
        judge = [s[name] for s in scores]
        found = {m: spearman([s[m] for s in scores], judge) for m in NLU if m in scores[0]}
        yield f"Spearman's correlation with {name}: " + ", ".join(f"{m} {r:.2f}" for m, r in found.items()) + "."


def write_tables(path, result, fields):
    """evaluation.json, .md and .csv beside the predictions."""
    texts = {"json": json.dumps(result, indent=1, ensure_ascii=False) + "\n"}
    notes = "".join(f"- {note}\n" for note in result["notes"])
    texts["md"] = f"# Evaluation\n\n{notes}\n{markdown(result['table'], fields)}\n"
    cells = io.StringIO()
    writer = csv.writer(cells, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"{field}_{x}" for field in fields for x in ("mean", "low", "high")), "published"])
    for line in result["table"]:
        values = [x for field in fields for x in [*line.get(field, []), "", "", ""][:3]]
        writer.writerow([*(line[column] for column in COLUMNS), *values, line["published"]])
    texts["csv"] = cells.getvalue()
    for ending, text in texts.items():
        write_text(path.with_name(f"evaluation.{ending}"), text)


def evaluate(args, path):
    """--evaluate: a file of predictions -> tables on the screen, and whole in evaluation.md, .csv, .json beside it."""
    settings, rows = read_predictions(path)
    rows = [{**rows[n], "parser": closed_parser(rows[n]["question"], rows[n]["truth"])} for n in sorted(rows)]
    here = [row for row in rows if row["answer"] is not None]
    if not here:
        raise UserError(f"{path}: holds no answers yet; sample.py --qa goes on with it")
    majority = majority_answers(args.data / "qa" / "train.jsonl")
    for row in here:
        if majority:
            row["majority"] = majority.get(row["task"], "")
    fields, meteor = [field for field in FIELDS if field in here[0]], find_meteor()
    notes = [f"{len(here):,} of {len(rows):,} questions answered. In brackets: 95% bootstrap intervals over slides."]
    if len(rows) > len(here):
        notes.append(f"Missing: {len(rows) - len(here):,} questions, about slides that were not prepared; in no mean.")
    judge = find_judge(args, path.with_name("judge.jsonl"))
    if judge:
        asked = [field for field in fields if field != "majority"]
        grade_rows(judge, [row for row in here if not row["parser"]], asked, args.judge_workers)
        if judge.dry:
            print(
                f"The judge would be called {len(judge.planned):,} times, for about {judge.tokens:,} tokens. Nothing was sent."
            )
            return
    for row in tqdm(here, desc="metrics", unit="question", disable=len(here) < 1000):
        score_row(row, fields, meteor)
    if unread := [row for row in here if row["parser"] and row["unusable"]["answer"]]:
        some = "; ".join(f"{row['id']}: {row['answer'][:60]!r}" for row in unread[:5])
        notes.append(
            f"{len(unread):,} closed answers name no choice and count as wrong: {some}{', ...' * (len(unread) > 5)}"
        )
    if judge:
        failed = sum(len(row["unusable"][field]) for row in here if "grades" in row for field in fields)
        notes.append(f"Judge: {args.judge_model}. {failed:,} grades stayed unusable and count as 0{judge.reasons()}.")
        notes += agreement(here)
    if not meteor:
        notes.append("METEOR: n/a; it needs nltk and its WordNet (python -m nltk.downloader wordnet).")
    rarity = common_and_rare(rows, args.data / "qa" / "train.jsonl")
    if rarity:
        notes.append("Rare cancer types have fewer slides than the median type.")
    lines = tabulate(rows, fields, rarity, args.seed)
    result = {"predictions": str(path), "settings": settings, "notes": notes, "table": lines}
    write_tables(path, result, fields)
    brief = ("average", *METRICS[:4], "ROUGE-L", "exact match")
    shown = [line for line in lines if line["kind"] != "cancer type" and line["metric"] in brief]
    print("\n".join(["", markdown(shown, fields), "", *notes]))
    print(f"All metrics, and each cancer type: {path.with_name('evaluation.md')} (and .csv, .json)")
    if args.json:
        print(json.dumps(result, ensure_ascii=False), file=args.json)


# --------------------------------------------------------------------------------------------------------------------
# Where the answer comes from
#
# The relevance of a tile is its share of log p(answer | slide), by integrated gradients (arXiv 1703.01365): on the way
# from a slide on which every tile is the average tile to the real one, the gradient with respect to the tiles'
# features, through the language model, projector, pool and slide encoder, times the change of the features. The shares
# of all tiles add up to what the slide does for the answer: log p(answer | slide) - log p(answer | average tiles), in
# nats.
#
# Why not the language model's attention: the slide encoder has mixed the tiles before, so the visual token that is read
# need not be where the evidence lies. train.py --demo measures it on the held-out slides where the evidence was
# planted; there (50 slides), of the ways tried, how often the hottest tile holds the evidence, and its relevance over
# the mean tile's:
#
#     chance                                                                      3%     1.0
#     attention; attention times its gradient, rolled out (arXiv 2103.15679)      2%     1.0
#     gradient times features, at the real slide alone                           48%     4.8
#     integrated gradients                                                      100%    29.5
# --------------------------------------------------------------------------------------------------------------------

PASSES = 16  # forward and backward, at points between the average tile and the real ones
PANEL = 560  # pixels of a panel's longer side
BEST = 9  # tiles shown
VEIL = 170  # opacity of the colours, of 255: the tissue shows through
# Pale to dark, evenly in lightness: read rightly in grey, and by the colour-blind.
ANCHORS = np.array([(255, 247, 190), (253, 190, 95), (235, 105, 55), (165, 35, 90), (60, 10, 85)])


def spelling(tokenizer, answer, word):
    """Which of the answer's tokens spell `word`, wherever it stands in it (None: all) -> a list of bools."""
    ids = tokenizer.encode(answer)
    if not ids:
        raise UserError("--heatmap: the answer is empty, so there is nothing to explain")
    if word is None:
        return [True] * len(ids)
    ends = [len(tokenizer.decode(ids[:i])) for i in range(len(ids) + 1)]
    spans = [m.span() for m in re.finditer(re.escape(word), tokenizer.decode(ids), re.IGNORECASE)]
    if not spans:
        raise UserError(f'--word {word}: not in the answer "{answer}"; name a word of it, or leave --word out')
    return [any(start < b and a < end for a, b in spans) for start, end in zip(ends, ends[1:])]


def tile_relevance(model, tokenizer, features, coords, question, answer, word=None, progress=iter):
    """What each tile adds to log p(answer), or to that of one word of it -> float32 [N], in nats (below zero: it speaks
    against), and what the slide adds, measured: the sum comes close to it. features [N,C_tile], coords [N,2] as in
    data/features. The weights stay frozen and layers are recomputed in the backward pass, so memory is the model's and
    one layer's.
    """
    talk = [*wsi_llava.slide_first([{"from": "human", "value": question}]), {"from": "gpt", "value": answer}]
    ids, labels = tokenizer.encode_chat(talk)
    spelled = [*spelling(tokenizer, answer, word), False]  # the answer's tokens, and the </s> after them
    labels = [wsi_llava.IGNORE] * (len(ids) - len(spelled)) + [
        label if spells else wsi_llava.IGNORE for label, spells in zip(labels[-len(spelled) :], spelled)
    ]
    room = model.llama.cfg.context - model.cfg.n_visual_tokens + 1  # an answer may have filled the context
    ids, labels = ids[:room], labels[:room]
    model.requires_grad_(False)
    model.llama.checkpointing = True
    if model.slide_encoder:
        model.slide_encoder.checkpointing = True
    features = features.to(model.device, torch.float32)
    average = features.mean(0).expand_as(features)

    def at(place):
        """A point of the path, from 0 to 1 -> (place, log p, d log p / d place by tile [N])."""
        tiles = torch.lerp(average, features, place).requires_grad_()
        logp = -model(model.encode_slide(tiles, coords)[None], [ids], [labels], "sum")
        slope = (torch.autograd.grad(logp, tiles)[0] * (features - average)).sum(1)
        return place, logp.item(), slope.cpu()

    def area(a, b):
        """The trapezoid of an interval, by tile [N]."""
        return (b[0] - a[0]) * (a[2] + b[2]) / 2

    def share(a, b):
        """The same, less what it exceeds the change in log p by: where log p jumps, a slope at one end is no mean."""
        change, trapezoid = b[1] - a[1], area(a, b)
        return trapezoid * min(max(change / (trapezoid.sum().item() or 1.0), 0.0), 1.0)

    path = []
    for i in progress(range(PASSES)):
        if i < 2:
            path.append(at(float(i)))
        else:  # bisect the interval whose trapezoid misses its change in log p by most
            wrong = [abs(b[1] - a[1] - area(a, b).sum().item()) for a, b in zip(path, path[1:])]
            k = wrong.index(max(wrong)) + 1
            path.insert(k, at((path[k - 1][0] + path[k][0]) / 2))
    return sum(share(a, b) for a, b in zip(path, path[1:])), path[-1][1] - path[0][1]


def colours(share):
    """Shares from 0 to 1 -> uint8 RGB."""
    places = np.linspace(0, 1, len(ANCHORS))
    return np.stack([np.interp(share, places, channel) for channel in ANCHORS.T], -1).astype(np.uint8)


def painted(picture, pixel, coords, relevance):
    """The picture of a slide, `pixel` tiled pixels a pixel, faded, under its tiles in the colour of their relevance."""
    picture = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "white"), 0.3)
    share = (relevance / relevance.max().clip(1e-12)).clip(0)
    x, y = coords.T // TILE
    grid = np.zeros((y.max() + 1, x.max() + 1, 4), np.uint8)  # a pixel a tile, however many there are
    grid[y, x, :3], grid[y, x, 3] = colours(share), VEIL
    size = [round(side * TILE / pixel) for side in grid.shape[1::-1]]
    tiles = Image.fromarray(grid).resize(size, Image.Resampling.NEAREST)
    picture.paste(tiles, mask=tiles)
    return picture


def outlined(picture, pixel, coords):
    """The picture of a slide with its tiles."""
    picture = picture.copy()
    draw = ImageDraw.Draw(picture, "RGBA")
    for x, y in coords / pixel:
        draw.rectangle((x, y, x + TILE / pixel, y + TILE / pixel), outline=(30, 80, 255, 110))
    return picture


class BareGrid:
    """In the place of a prepare.Slide whose file is not at hand: its size and scale, and nothing to see."""

    corner = (0, 0)

    def __init__(self, data, name):
        path = wsi_llava.features_file(data, name)
        found = wsi_llava.feature_metadata(path)
        try:
            self.scale = found["scale"]
            self.width, self.height = found["width"] / self.scale, found["height"] / self.scale
        except KeyError as error:
            raise UserError(f"{path}: its metadata has no {error}, so its tiles have no place on a slide") from None

    def thumbnail(self, pixel):
        return Image.new("RGB", (max(1, round(self.width / pixel)), max(1, round(self.height / pixel))), "white")

    def tile(self, x, y):
        return np.full((TILE, TILE, 3), 255, np.uint8)


def slide_or_grid(data, name, path=None, mpp=None):
    """A prepared slide, read from `path` or from data/slides; its bare grid where the file is in neither."""
    import prepare  # here, so that asking about prepared slides needs no OpenSlide

    path = path or next(iter(sorted((data / "slides").glob(f"{name}.*"))), None)
    return prepare.Slide(path, mpp, wsi_llava.read_meta(data)["mpp"]) if path else BareGrid(data, name)


def draw_heatmap(path, slide, coords, relevance, lines, what="the answer"):
    """One picture: the slide with its tiles, the tiles coloured by their relevance, the most relevant ones enlarged.

    slide: a prepare.Slide or BareGrid. coords [N,2], relevance [N]: numpy. lines: the title. what: is explained.
    """
    pixel = max(slide.width, slide.height) / PANEL
    picture = slide.thumbnail(pixel)
    large, small, grey = ImageFont.load_default(22), ImageFont.load_default(15), (90, 90, 90)
    wide, cell = picture.width, PANEL // 3
    left, middle, right = 24, 48 + wide, 152 + 2 * wide
    width = right + PANEL + 10
    lines = [part for line in lines for part in textwrap.wrap(line, width // 11, max_lines=3, placeholder=" ...")]
    top = 70 + 30 * len(lines)
    canvas = Image.new("RGB", (width, top + PANEL + 24), "white")
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((left, 20 + 30 * i), line, "black", large)
    titles = f"the slide and its {len(coords):,} tiles", f"relevance to {what} (nats)", "the most relevant tiles"
    for x, title in zip((left, middle, right), titles):
        draw.text((x, top - 10), title, grey, small, "ls")
    canvas.paste(outlined(picture, pixel, coords), (left, top))
    canvas.paste(painted(picture, pixel, coords, relevance), (middle, top))
    high = max(1e-12, relevance.max())
    bar = Image.fromarray(np.repeat(colours(np.linspace(1, 0, picture.height))[:, None], 14, axis=1))
    canvas.paste(bar, (middle + wide + 10, top), Image.new("L", bar.size, VEIL))
    for share in np.linspace(0, 1, 5):
        y = top + (1 - share) * (picture.height - 1)
        draw.text((middle + wide + 30, y), f"{share * high:.2g}", grey, small, "lm")
    for i, n in enumerate(np.argsort(-relevance, kind="stable")[:BEST]):
        x, y = right + i % 3 * cell, top + i // 3 * cell
        draw.rectangle((x, y, x + cell - 15, y + cell - 29), tuple(colours(relevance[n].clip(0) / high).tolist()))
        tile = Image.fromarray(slide.tile(*coords[n].tolist())).convert("RGB")
        canvas.paste(tile.resize((cell - 22, cell - 36), Image.Resampling.LANCZOS), (x + 4, y + 4))
        at = ", ".join(f"{c * slide.scale:.0f}" for c in coords[n].tolist())
        draw.text((x, y + cell - 25), f"{relevance[n]:.2g} at {at}", grey, small)
    with replacing(path) as temporary:
        canvas.save(temporary, "PNG")


def save_geojson(path, coords, relevance, scale, corner=(0, 0)):
    """The tiles for QuPath: squares in level-0 pixels, counted from `corner` (a Slide's), the relevance as a
    measurement (Measure > Show measurement maps). scale: level-0 pixels per tiled pixel."""
    shades = colours((relevance / relevance.max().clip(1e-12)).clip(0)).tolist()
    features = [
        wsi_llava.geojson_feature(
            "tile", [wsi_llava.tile_corners(x, y)], scale, corner, color=shade, measurements={"relevance": value}
        )
        for (x, y), value, shade in zip(coords.tolist(), relevance.tolist(), shades)
    ]
    write_text(path, json.dumps({"type": "FeatureCollection", "features": features}))


def check_heatmap_flags(args):
    """What can be refused before the model is loaded."""
    pictures = [path for path in (args.heatmap, args.heatmap_geojson) if path]
    if args.word and not pictures:
        raise UserError(f"--word {args.word} says which word --heatmap explains; give --heatmap FILE with it")
    if pictures and not (args.slide and args.ask):
        raise UserError("--heatmap explains one answer: it needs --slide and --ask")
    if pictures and (len(args.slide) > 1 or args.region):
        raise UserError("--heatmap explains a whole slide: give --slide one name, and no --region")
    if args.heatmap and args.heatmap.suffix.lower() != ".png":
        raise UserError(f"--heatmap {args.heatmap}: the picture is a PNG; give it a name that ends in .png")
    for path in pictures:
        if not path.parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist; make it first")


def explain(args, model, tokenizer, name, answer):
    """--heatmap and --heatmap-geojson: which tiles of the slide made the model answer --ask so."""
    path = Path(args.slide[0]) if Path(args.slide[0]).exists() else None
    slide = slide_or_grid(args.data, name, path, args.mpp)
    features, coords = wsi_llava.read_features(args.data, name, model.cfg.max_tiles)
    what = f'"{args.word}"' if args.word else "the answer"
    print(f"Relevance of {len(coords):,} tiles to {what}: {PASSES} forward and backward passes on {args.device}.")
    bar = functools.partial(tqdm, unit="pass", leave=False)
    relevance, gain = tile_relevance(model, tokenizer, features, coords, args.ask, answer, args.word, bar)
    relevance, coords = relevance.numpy(), coords.numpy()
    x, y = coords[relevance.argmax()] * slide.scale
    print(
        f"Against a slide of average tiles, this one adds {gain:.2f} nats to {what}; the tiles' shares come to "
        f"{relevance.sum():.2f}, the largest {relevance.max():.2f} at level-0 pixel {x:.0f}, {y:.0f}."
    )
    if isinstance(slide, BareGrid):
        print(
            f"{name}: its file is not at hand, so the map shows the bare grid, and where QuPath crops a slide (MRXS), the "
            f"GeoJSON is shifted; name the file with --slide."
        )
    if args.heatmap:
        draw_heatmap(args.heatmap, slide, coords, relevance, [f"{name}: {args.ask}", f"Answer: {answer}"], what)
    if args.heatmap_geojson:
        save_geojson(args.heatmap_geojson, coords, relevance, slide.scale, slide.corner)
    print("Wrote " + " and ".join(str(path) for path in (args.heatmap, args.heatmap_geojson) if path))


# --------------------------------------------------------------------------------------------------------------------
# Flags, and what they start
# --------------------------------------------------------------------------------------------------------------------


def ask_about_slides(args):
    """--slide: one answer, a chat, or zero-shot."""
    started = time.time()
    if len(args.slide) > 1 and (args.region or args.zero_shot):
        raise UserError("--region and --zero-shot are about one slide; give --slide one name")
    names = prepare_raw(args, args.slide)
    meta = wsi_llava.read_meta(args.data)
    if args.zero_shot:
        found = dict(zip(args.zero_shot, zero_shot(args, meta, names[0], args.zero_shot)))
        print(f"{names[0]}: model of {args.out}/stage1 on {args.device}, {time.time() - started:.1f} s.")
        print("\n".join(f"{p:8.4f}  {text}" for text, p in sorted(found.items(), key=lambda item: -item[1])))
        if args.json:
            print(json.dumps({"slide": names[0], "probabilities": found}, ensure_ascii=False), file=args.json)
        return
    model, tokenizer = load_model(args, meta)
    options = {k: getattr(args, k) for k in "max_new_tokens temperature top_p top_k seed".split()}

    def open_chat(names):
        names = prepare_raw(args, names)
        return names, Chat(model, tokenizer, slide_tokens(args, model, names), **options)

    names, chat = open_chat(names)
    trained, dtype = args.out / "stage3", str(args.dtype).removeprefix("torch.")
    print(
        f"{', '.join(names)}: {chat.visual.shape[:2].numel()} visual tokens; "
        f"{f'model of {trained}' if trained.exists() else 'published model'} on {args.device} in {dtype}, "
        f"{time.time() - started:.1f} s."
    )
    tokens, seconds = (
        stream_answer(args, names, chat, args.ask) if args.ask else chat_loop(args, open_chat, names, chat)
    )
    if args.heatmap or args.heatmap_geojson:
        explain(args, model, tokenizer, names[0], chat.turns[-1]["value"])
    print(f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s, peak memory {gigabytes(args)}.")


def rectangle(text):
    """x,y,width,height -> floats."""
    values = [float(part) for part in text.split(",")]
    if len(values) != 4 or min(values[2:]) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not x,y,width,height in level-0 pixels")
    return values


def parse(argv=None):
    parser = wsi_llava.Parser(__doc__)
    share = at_least(0, float)
    add = parser.add_argument_group("one slide, or one case").add_argument
    add("--slide", nargs="+", metavar="S", help="a slide file, or the name of a prepared slide; several: one case")
    add("--ask", metavar="Q", help="one question; without it, a chat")
    add("--region", metavar="X,Y,W,H", type=rectangle, help="only this part of the slide, in level-0 pixels")
    add("--zero-shot", metavar="TEXT", nargs="+", help="the probability of each text, by stage 1 alone")
    add("--heatmap", metavar="PNG", type=Path, help="with --ask: a picture of which tiles made the answer what it is")
    add("--heatmap-geojson", metavar="FILE", type=Path, help="with --ask: the same for QuPath, a square a tile")
    add("--word", help="of --heatmap: explain this word of the answer alone")
    add("--mpp", type=float, help="um per pixel at level 0, for a raw slide whose metadata lack it")
    add("--json", action="store_true", help="for programs: one JSON object an answer on stdout, nothing else there")
    add = parser.add_argument_group("how it answers").add_argument
    add("--int8", action="store_true", help="the language model's weights rounded to int8: half of bfloat16's memory")
    add("--max-new-tokens", type=at_least(1), default=512, help="longest answer, in tokens (default: 512)")
    add("--temperature", type=share, default=0.0, help="0 (default): the most likely token, always; above: sampled")
    add("--top-p", type=share, default=1.0, help="sample from the likeliest tokens of this probability (default: 1)")
    add("--top-k", type=at_least(0), default=0, help="sample from the k most likely tokens (default: 0, all)")
    add = parser.add_argument_group("many questions, and their evaluation").add_argument
    add("--qa", metavar="FILE", nargs="+", help="answer every question of these files, into --predictions; resumes")
    add("--predictions", metavar="FILE", type=Path, help="the answers' file (default: predictions.jsonl in --out)")
    add("--baselines", action="store_true", help="also answer without the slide, and with another's")
    add("--batch-size", type=at_least(1), default=8, help="questions at once (default: 8)")
    tables = "tables of a file of predictions (default: --predictions)"
    add("--evaluate", metavar="FILE", nargs="?", const="", help=tables)
    add("--judge-model", metavar="M", help="grade open answers by this model: WSI-Precision, WSI-Relevance")
    add("--judge-url", metavar="URL", default="https://api.openai.com/v1", help="OpenAI-compatible (default: OpenAI's)")
    add("--judge-workers", type=at_least(1), default=8, help="requests to the judge at once (default: 8)")
    add("--judge-dry-run", action="store_true", help="only count the judge's calls and tokens")
    wsi_llava.add_shared_flags(parser)
    args = parser.parse_args(argv)
    args.predictions = args.predictions or args.out / "predictions.jsonl"
    args.json = sys.stdout if args.json else None  # what a program reads; all that is printed goes to stderr then
    return args


def main(argv=None):
    args = parse(argv)
    check_heatmap_flags(args)
    wsi_llava.resolve_device(args)
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        if args.qa:
            answer_file(args, wsi_llava.read_meta(args.data))
        if args.evaluate is not None:
            evaluate(args, Path(args.evaluate or args.predictions))
        elif args.slide and not args.qa:
            ask_about_slides(args)
        elif not args.qa:
            raise UserError("nothing to do: give --slide, --qa or --evaluate (--help explains)")


if __name__ == "__main__":
    wsi_llava.run(main, on_interrupt="interrupted; --qa and --evaluate go on where they stopped")
