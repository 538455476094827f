"""Asks WSI-LLaVA about a slide.

python sample.py --slide S --ask Q     one answer, streamed; S is a slide file, or the name of a prepared slide
python sample.py --slide S             a chat about it
python sample.py --slide S --ask Q --heatmap out.png    and which tiles made the answer what it is
"""

import argparse
import functools
import json
import re
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import safetensors
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import wsi_llava
from wsi_llava import UserError

# --------------------------------------------------------------------------------------------------------------------
# Many questions
# --------------------------------------------------------------------------------------------------------------------


def answer_rows(model, tokenizer, rows, visual, max_new_tokens=96, batch=64):
    """Greedy answers to the first question of each row of the dataset, in the rows' order.

    visual: {slide: visual tokens [V,C]}, or None to ask without the slide. Questions of the same length go together, so
    that a batch holds no padding and every answer is what it would be alone.
    """
    prompts = []
    for row in rows:
        question = row["conversations"][0]
        if visual is None:
            question = {**question, "value": question["value"].replace("<image>\n", "")}
        prompts.append(tokenizer.encode_chat([question])[0])
    answers = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    while order:
        group = [i for i in order[:batch] if len(prompts[i]) == len(prompts[order[0]])]
        order = order[len(group) :]
        slides = None if visual is None else torch.stack([visual[rows[i]["slide"]] for i in group]).to(model.device)
        steps = model.generate(slides, [prompts[i] for i in group], max_new_tokens, eos=tokenizer.eos)
        for i, ids in zip(group, zip(*steps)):
            answers[i] = tokenizer.decode([t for t in ids if t is not None and t != tokenizer.eos])
    return answers


def same_answer(answer, truth):
    """Whether two short answers say the same, up to case, spaces and final punctuation."""
    return " ".join(answer.lower().split()).rstrip(".") == " ".join(truth.lower().split()).rstrip(".")


# --------------------------------------------------------------------------------------------------------------------
# One slide
# --------------------------------------------------------------------------------------------------------------------


class Chat:
    """A conversation about one slide: visual tokens [V,C] -> replies. The key-value cache is kept from turn to turn."""

    def __init__(self, model, tokenizer, visual, **options):
        self.model, self.tokenizer, self.visual, self.options = model, tokenizer, visual, options
        like = model.mm_projector[0].weight
        self.cache = wsi_llava.KVCache(model.cfg.llama, 1, model.cfg.llama.context, like.device, like.dtype)
        self.tail = []  # the last reply's tokens that the cache does not hold yet

    def reply(self, question):
        """Yields the answer piece by piece. Raises UserError where the conversation no longer fits the context."""
        if not self.cache.length:
            ids, _ = self.tokenizer.encode_chat([{"from": "human", "value": f"<image>\n{question}"}])
            visual = self.visual[None].to(self.model.device)
        else:
            ids, visual = self.tail + self.tokenizer.encode(f"USER: {question} ASSISTANT:"), None
        answer, shown = [], ""
        for (token,) in self.model.generate(visual, [ids], eos=self.tokenizer.eos, cache=self.cache, **self.options):
            self.tail = [token] if token == self.tokenizer.eos else [token, self.tokenizer.eos]
            if token != self.tokenizer.eos:
                answer.append(token)
            text = self.tokenizer.decode(answer)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character waits for its other bytes
                yield text[len(shown) :]
                shown = text


def slide_tokens(args, meta, model):
    """--slide, a file or the name of a prepared slide -> its visual tokens [V,C]; a raw slide is prepared first."""
    path = Path(args.slide)
    if path.is_file():
        import prepare  # here, so that asking about prepared slides needs no OpenSlide

        failures = prepare.prepare_slides(prepare.with_defaults(args), {path.stem: path})
        if failures:
            raise UserError(failures[0][1])
        name = path.stem
    else:
        name = args.slide
        if not (args.data / "features" / f"{name}.safetensors").exists():
            raise UserError(f"--slide {name}: neither a file nor the name of a slide in {args.data}/features")
    if not len(wsi_llava.read_features(args.data, name)[0]):
        raise UserError(f"--slide {name}: no tissue was found on it; look at {args.data}/qc/{name}.jpg")
    wsi_llava.cache_visual_tokens(model, args.data, [name])
    return wsi_llava.read_visual_tokens(args.data, name, model.cfg)


def show(pieces):
    """Prints an answer as it comes -> the answer."""
    answer = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        answer += piece
    print()
    return answer


def chat_loop(chat):
    """Reads questions until the end of the input or /quit."""
    talking = sys.stdin.isatty()
    print("Ask about the slide; /quit ends.") if talking else None
    while True:
        try:
            question = input("> " if talking else "").strip()
        except EOFError:
            return
        if question == "/quit":
            return
        if question:
            try:
                show(chat.reply(question))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------------------
# Where the answer comes from
#
# The relevance of a tile is its share of log p(answer | slide), by integrated gradients (arXiv 1703.01365): on the way from
# a slide on which every tile is the average tile to the real one, the gradient with respect to the tiles' features, through
# the language model, projector, pool and slide encoder, times the change of the features. The shares of all tiles add up to
# what the slide does for the answer: log p(answer | slide) - log p(answer | average tiles), in nats.
#
# Why not the language model's attention: the slide encoder has mixed the tiles before, so the visual token that is read need
# not be where the evidence lies. train.py --demo measures it on the held-out slides where the evidence was planted; there
# (50 slides), of the ways tried, how often the hottest tile holds the evidence, and its relevance over the mean tile's:
#
#     chance                                                                      3%     1.0
#     attention; attention times its gradient, rolled out (arXiv 2103.15679)      2%     1.0
#     gradient times features, at the real slide alone                           48%     4.8
#     integrated gradients                                                      100%    29.5
# --------------------------------------------------------------------------------------------------------------------

PASSES = 16  # forward and backward, at points between the average tile and the real ones
TILE = wsi_llava.SlideEncoderConfig.tile_size
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
    data/features. The weights stay frozen and layers are recomputed in the backward pass, so memory is the model's and one
    layer's.
    """
    talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    ids, labels = tokenizer.encode_chat(talk)
    spelled = [*spelling(tokenizer, answer, word), False]  # the answer's tokens, and the </s> after them
    labels = [wsi_llava.IGNORE] * (len(ids) - len(spelled)) + [
        label if spells else wsi_llava.IGNORE for label, spells in zip(labels[-len(spelled) :], spelled)
    ]
    model.requires_grad_(False)
    model.llama.checkpointing = True
    if model.slide_encoder:
        model.slide_encoder.checkpointing = True
    features = features.to(model.device, torch.float32)
    average = features.mean(0).expand_as(features)

    def at(share):
        """A point of the path -> (share, log p, d log p / d share by tile [N])."""
        tiles = torch.lerp(average, features, share).requires_grad_()
        logp = -model(model.encode_slide(tiles, coords)[None], [ids], [labels], "sum")
        slope = (torch.autograd.grad(logp, tiles)[0] * (features - average)).sum(1)
        return share, logp.item(), slope.cpu()

    def area(a, b):
        return (b[0] - a[0]) * (a[2] + b[2]) / 2

    path = []
    for i in progress(range(PASSES)):
        if i < 2:
            path.append(at(float(i)))
        else:  # halve the stretch whose area is furthest from the climb that it should be
            wrong = [abs(b[1] - a[1] - area(a, b).sum().item()) for a, b in zip(path, path[1:])]
            k = wrong.index(max(wrong)) + 1
            path.insert(k, at((path[k - 1][0] + path[k][0]) / 2))
    return sum(area(a, b) for a, b in zip(path, path[1:])), path[-1][1] - path[0][1]


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

    def __init__(self, data, name):
        path = data / "features" / f"{name}.safetensors"
        with safetensors.safe_open(path, framework="np") as file:
            found = json.loads((file.metadata() or {}).get("wsi_llava", "{}"))
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
    return prepare.Slide(path, mpp) if path else BareGrid(data, name)


def draw_heatmap(path, slide, coords, relevance, lines, what="the answer"):
    """One picture: the slide with its tiles, the tiles in the colour of their relevance, the most relevant ones enlarged.

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
        tile = Image.fromarray(slide.tile(*coords[n].tolist()))
        canvas.paste(tile.resize((cell - 22, cell - 36), Image.Resampling.LANCZOS), (x + 4, y + 4))
        at = ", ".join(f"{c * slide.scale:.0f}" for c in coords[n].tolist())
        draw.text((x, y + cell - 25), f"{relevance[n]:.2g} at {at}", grey, small)
    with wsi_llava.replacing(path) as temporary:
        canvas.save(temporary, "PNG")


def scanned_corner(slide):
    """Level-0 (x, y) where the scanned area of a slide begins, for formats that tell (MRXS): QuPath counts from there."""
    properties = {} if isinstance(slide, BareGrid) else slide.file.properties
    return [int(properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy"]


def save_geojson(path, coords, relevance, scale, corner=(0, 0)):
    """The tiles for QuPath: squares in level-0 pixels, counted from `corner` (see scanned_corner), the relevance as a
    measurement (Measure > Show measurement maps). scale: level-0 pixels per tiled pixel."""
    shades = colours((relevance / relevance.max().clip(1e-12)).clip(0)).tolist()
    features = []
    for (x, y), value, shade in zip((coords * scale - corner).tolist(), relevance.tolist(), shades):
        a, b = x + TILE * scale, y + TILE * scale
        corners = [[round(p, 2) for p in corner] for corner in ((x, y), (a, y), (a, b), (x, b), (x, y))]
        properties = {"objectType": "tile", "color": shade, "measurements": {"relevance": value}}
        geometry = {"type": "Polygon", "coordinates": [corners]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    with wsi_llava.replacing(path) as temporary:
        temporary.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def check_heatmap_flags(args):
    """What can be refused before the model is loaded."""
    pictures = [path for path in (args.heatmap, args.heatmap_geojson) if path]
    if args.word and not pictures:
        raise UserError(f"--word {args.word} says which word --heatmap explains; give --heatmap FILE with it")
    if pictures and not (args.slide and args.ask):
        raise UserError("--heatmap explains one answer: it needs --slide and --ask")
    if args.heatmap and args.heatmap.suffix.lower() != ".png":
        raise UserError(f"--heatmap {args.heatmap}: the picture is a PNG; give it a name that ends in .png")
    for path in pictures:
        if not path.parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist; make it first")


def explain(args, model, tokenizer, answer):
    """--heatmap and --heatmap-geojson: which tiles of --slide made the model answer --ask so."""
    path = Path(args.slide) if Path(args.slide).is_file() else None
    name = path.stem if path else args.slide
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
        save_geojson(args.heatmap_geojson, coords, relevance, slide.scale, scanned_corner(slide))
    print("Wrote " + " and ".join(str(path) for path in (args.heatmap, args.heatmap_geojson) if path))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--slide", help="a slide file, or the name of a prepared slide")
    add("--ask", help="one question; without it, a chat")
    add("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    add("--temperature", type=float, default=0.0, help="0 (default): the most likely token, always; above: sampled")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the smallest set of tokens of this probability (default: 1)",
    )
    add("--top-k", type=int, default=0, help="sample from the k most likely tokens (default: 0, all)")
    add("--heatmap", metavar="PNG", type=Path, help="with --ask: a picture of which tiles made the answer what it is")
    add("--heatmap-geojson", metavar="FILE", type=Path, help="with --ask: the same for QuPath, a square a tile")
    add("--word", help="of --heatmap: explain this word of the answer alone")
    add("--int8", action="store_true", help="the language model's weights rounded to int8: half of bfloat16's memory")
    add("--mpp", type=float, help="um per pixel at level 0, for a raw slide whose metadata lack it")
    wsi_llava.add_shared_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if not args.slide:
        raise UserError("nothing to ask about: give --slide FILE or the name of a prepared slide (--help explains)")
    check_heatmap_flags(args)
    wsi_llava.resolve_device(args)
    started = time.time()
    meta = wsi_llava.read_meta(args.data)
    model, tokenizer = wsi_llava.assemble(args, meta, 3, int8=args.int8)
    model.to(args.device)
    visual = slide_tokens(args, meta, model)
    print(
        f"{args.slide}: {len(visual)} visual tokens; model of {args.out}/stage3 on {args.device}, {time.time() - started:.1f} s."
    )
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    chat = Chat(model, tokenizer, visual, **options, top_k=args.top_k, seed=args.seed)
    if args.ask:
        answer = show(chat.reply(args.ask))
        if args.heatmap or args.heatmap_geojson:
            explain(args, model, tokenizer, answer)
    else:
        chat_loop(chat)


if __name__ == "__main__":
    wsi_llava.run(main)
