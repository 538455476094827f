"""Slides -> tile features, question files -> one dataset. Everything that train.py and sample.py read comes from here.

    python prepare.py --slides DIR                 every slide below DIR: tissue, tiles, features, a picture to check
    python prepare.py --qa FILE... [--split test]  WSI-Bench's question files, either shape, into data/qa/
    python prepare.py --demo                       draws a cohort of toy slides, with reports and questions

A slide is cut into 256-px tiles at 0.5 um/px where there is tissue, and every tile becomes one vector:

    data/features/<slide>.safetensors   features float16 [N,C], coords int32 [N,2] (x, y in pixels at the tiled resolution)
    data/qc/<slide>.jpg                 thumbnail with the outline of the tissue and the kept tiles: look at it
"""

import argparse
import concurrent.futures
import hashlib
import io
import json
import math
import multiprocessing
import re
import struct
import sys
from pathlib import Path

import numpy as np
import openslide
import safetensors
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import save_file
from tqdm import tqdm

import wsi_llava
from wsi_llava import PRESETS, SYSTEM, UserError, replacing

TILE = 256  # pixels at the tiled resolution
TARGET_MPP = 0.5  # um/px; Prov-GigaPath was trained at it
NATIVE = 0.02  # a level this close to the target is read as it is, without resampling
MASK = 32  # tiled pixels per pixel of the tissue mask: 8 x 8 mask pixels a tile
SUFFIXES = "svs tif tiff ndpi mrxs scn bif vms vmu svslide png jpg jpeg".split()


# --------------------------------------------------------------------------------------------------------------------
# A slide at the target resolution
# --------------------------------------------------------------------------------------------------------------------


class Slide:
    """A slide seen as one image at the tiled resolution.

    width, height: pixels at the tiled resolution. scale: level-0 pixels per tiled pixel. mpp: um per level-0 pixel.
    Raises UserError where the file is no slide or its um/px are unknown.
    """

    def __init__(self, path, mpp=None):
        try:
            self.file = openslide.open_slide(str(path))
        except (openslide.OpenSlideError, OSError) as error:
            raise UserError(f"{path}: not a slide that OpenSlide can read ({error})") from None
        self.path = Path(path)
        self.mpp = mpp or self._recorded_mpp()
        scale = TARGET_MPP / self.mpp
        # The coarsest level that is at least as fine as the target; the finest there is where none is.
        downsamples = self.file.level_downsamples
        fine = [level for level, d in enumerate(downsamples) if d <= scale * (1 + NATIVE)]
        self.level = fine[-1] if fine else 0
        self.zoom = scale / downsamples[self.level]  # level pixels per tiled pixel
        if abs(self.zoom - 1) <= NATIVE:
            self.zoom = 1.0
        self.scale = self.zoom * downsamples[self.level]
        self.width, self.height = (int(side / self.scale) for side in self.file.dimensions)

    def _recorded_mpp(self):
        x, y = (self.file.properties.get(f"openslide.mpp-{axis}") for axis in "xy")
        if not x or not y:
            raise UserError(
                f"{self.path}: its metadata has no um/px; give it with --mpp, for example --mpp 0.25 for 40x"
            )
        return (float(x) + float(y)) / 2

    def tile(self, x, y):
        """The tile whose upper left corner is (x, y), in tiled pixels -> uint8 [256,256,3]; beyond the slide is white."""
        side = math.ceil(TILE * self.zoom)
        region = self.file.read_region((round(x * self.scale), round(y * self.scale)), self.level, (side, side))
        region = flatten(region)
        if side != TILE:
            span = TILE * self.zoom
            region = region.resize((TILE, TILE), Image.Resampling.LANCZOS, box=(0, 0, span, span))
        return np.asarray(region)

    def thumbnail(self, pixel):
        """The whole slide, `pixel` tiled pixels a pixel."""
        size = max(1, round(self.width / pixel)), max(1, round(self.height / pixel))
        level = self.file.get_best_level_for_downsample(self.scale * pixel)
        whole = self.file.read_region((0, 0), level, self.file.level_dimensions[level])
        return flatten(whole).resize(size, Image.Resampling.BOX)


def flatten(image):
    """RGBA -> RGB on white: scanners leave what they did not scan transparent."""
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def find_slides(inputs):
    """Folders (searched through) and files -> {slide id: path}, sorted. The id is the file's stem."""
    slides = {}
    for entry in map(Path, inputs):
        if not entry.exists():
            raise UserError(f"{entry}: no such file or folder (--slides)")
        files = [entry] if entry.is_file() else sorted(p for p in entry.rglob("*") if p.is_file())
        for path in files:
            if entry.is_file() or path.suffix.lower().lstrip(".") in SUFFIXES:
                if slides.setdefault(path.stem, path).resolve() != path.resolve():
                    raise UserError(
                        f"{slides[path.stem]} and {path} have the same name; rename one: it is the slide's id"
                    )
    if not slides:
        raise UserError(f"no slides below {', '.join(map(str, inputs))} (looked for .{', .'.join(SUFFIXES)})")
    return dict(sorted(slides.items()))


# --------------------------------------------------------------------------------------------------------------------
# Tissue and tiles
# --------------------------------------------------------------------------------------------------------------------


def otsu(values):
    """Otsu's threshold of uint8 values: the cut that separates them into the two most distinct groups."""
    counts = np.bincount(values.ravel(), minlength=256).astype(float)
    weight = counts.cumsum()
    total = (counts * np.arange(256)).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (total[-1] * weight / weight[-1] - total) ** 2 / (weight * (weight[-1] - weight))
    return int(np.nanargmax(np.where(np.isfinite(between), between, -1)))


def tissue_mask(thumbnail):
    """RGB thumbnail -> bool [h,w]: stained tissue is saturated, glass is not.

    Otsu always finds two groups, also where there is only glass or only tissue: hence the bounds on its threshold.
    """
    saturation = thumbnail.filter(ImageFilter.GaussianBlur(1)).convert("HSV").getchannel("S")
    saturation = np.asarray(saturation)
    return saturation > np.clip(otsu(saturation), 12, 30)


def tile_grid(mask, min_tissue):
    """Corners of the tiles with at least that share of tissue: int32 [N,2] (x, y) in tiled pixels, in raster order."""
    side = TILE // MASK
    rows, columns = mask.shape[0] // side, mask.shape[1] // side  # whole tiles only
    share = mask[: rows * side, : columns * side].reshape(rows, side, columns, side).mean((1, 3))
    y, x = np.nonzero(share >= min_tissue)
    return np.stack([x, y], axis=1).astype(np.int32) * TILE


def draw_qc(path, slide, mask, coords):
    """The slide with the outline of its tissue (green) and the kept tiles (blue): what a person checks before trusting."""
    pixel = max(slide.width, slide.height) / 768
    picture = slide.thumbnail(pixel)
    draw = ImageDraw.Draw(picture, "RGBA")
    side = TILE / pixel
    for x, y in coords / pixel:
        draw.rectangle((x, y, x + side, y + side), fill=(30, 80, 255, 24), outline=(30, 80, 255, 140))
    solid = Image.fromarray(mask.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.BILINEAR)
    solid = solid.point([0] * 128 + [255] * 128)
    edge = np.asarray(solid) != np.asarray(solid.filter(ImageFilter.MinFilter(5)))
    picture.paste((0, 150, 60), mask=Image.fromarray(edge.astype(np.uint8) * 255))
    with replacing(path) as temporary:
        picture.save(temporary, "JPEG", quality=90)


# --------------------------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode_tiles(slide, coords, encoder, workers, batch, progress):
    """Reads the tiles in threads while the encoder works -> features float16 [N,C]. progress(done) after each batch."""
    weight = encoder.cls_token
    features = torch.empty(len(coords), encoder.cfg.width, dtype=torch.float16)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        batches = [range(i, min(i + batch, len(coords))) for i in range(0, len(coords), batch)]
        reading = [[pool.submit(slide.tile, *coords[i].tolist()) for i in b] for b in batches[:2]]
        for number, b in enumerate(batches):
            tiles = np.stack([future.result() for future in reading.pop(0)])
            if number + 2 < len(batches):
                reading.append([pool.submit(slide.tile, *coords[i].tolist()) for i in batches[number + 2]])
            images = preprocess(tiles, weight.device).to(weight.dtype)
            features[b.start : b.stop] = encoder(images).to("cpu", torch.float16)
            progress(b.stop)
    return features


def preprocess(tiles, device):
    return wsi_llava.preprocess_tiles(torch.from_numpy(tiles).to(device))


def prepare_slide(path, data, encoder, params, mpp, workers, batch, progress):
    """One slide -> data/features, data/qc; returns the number of tiles. Raises UserError where it cannot be read."""
    slide = Slide(path, mpp)
    try:
        mask = tissue_mask(slide.thumbnail(MASK))
        coords = tile_grid(mask, params["min_tissue"])
        features = encode_tiles(slide, coords, encoder, workers, batch, lambda done: progress(done, len(coords)))
        draw_qc(data / "qc" / f"{path.stem}.jpg", slide, mask, coords)
    except openslide.OpenSlideError as error:
        raise UserError(f"{path}: a part of it cannot be decoded ({error})") from None
    width, height = slide.file.dimensions
    metadata = {"width": width, "height": height, "mpp": slide.mpp, "scale": slide.scale, "params": params}
    with replacing(data / "features" / f"{path.stem}.safetensors") as temporary:
        tensors = {"features": features, "coords": torch.from_numpy(coords)}
        # One entry: safetensors writes several in random order, and the same slide should give the same bytes.
        save_file(tensors, temporary, {"wsi_llava": json.dumps(metadata)})
    return len(coords)


def feature_params(path):
    """The parameters with which a file of features was made."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return json.loads(file.metadata()["wsi_llava"])["params"]
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of features ({error}); delete it and run again") from None


def open_data(args):
    """data/meta.json, made or checked: one folder holds the features of one tile encoder -> (meta, encoder)."""
    data = Path(args.data)
    old = wsi_llava.read_meta(data) if (data / "meta.json").exists() else None
    if old:  # by default, the encoder that made what is there
        args.preset = args.preset or old["preset"]
        if old["encoder"]["source"] != "untrained":
            args.tile_encoder = args.tile_encoder or Path(old["encoder"]["source"])
    encoder, source = wsi_llava.pick_tile_encoder(args)
    meta = {
        "version": wsi_llava.VERSION,
        "preset": args.preset or ("demo" if source is None else "7b"),
        "tile_size": TILE,
        "mpp": TARGET_MPP,
        "encoder": {
            "source": str(source) if source else "untrained",
            "fingerprint": wsi_llava.fingerprint(encoder),
            "width": encoder.cfg.width,
        },
    }
    if old:
        if old["encoder"]["fingerprint"] != meta["encoder"]["fingerprint"]:
            raise UserError(
                f"{data} holds features of another tile encoder ({old['encoder']['source']}, not "
                f"{meta['encoder']['source']}); name a new folder with --data"
            )
        meta = old
    for folder in ("features", "qc", "qa"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    with replacing(data / "meta.json") as path:
        path.write_text(json.dumps(meta, indent=2))
    return meta, encoder


def prepare_slides(args, slides):
    """All slides of {id: path}, resuming where an earlier run stopped. Returns the failures, [(path, message)]."""
    meta, encoder = open_data(args)
    data = Path(args.data)
    params = {
        "tile": TILE,
        "target_mpp": TARGET_MPP,
        "mpp": args.mpp,
        "min_tissue": args.min_tissue,
        "encoder": meta["encoder"]["fingerprint"],
    }
    todo = {}
    for name, path in slides.items():
        done = data / "features" / f"{name}.safetensors"
        if done.exists() and not args.overwrite:
            old = feature_params(done)
            changed = [k for k in params if old.get(k) != params[k]]
            if changed:
                k = changed[0]
                raise UserError(f"{done} was made with {k} {old.get(k)}, not {params[k]}; --overwrite makes it again")
        else:
            todo[name] = path
    if meta["encoder"]["source"] == "untrained":
        print(
            "No GigaPath weights found or named: tiles go through a small untrained encoder, for trying the pipeline only."
        )
    print(
        f"Found {len(slides)} slides, {len(slides) - len(todo)} done already; "
        f"{len(todo)} to tile at {TARGET_MPP} um/px and encode on {args.device} into {data}/features."
    )
    encoder = encoder.to(args.device, args.dtype)
    failures, empty, tiles = [], [], 0
    with tqdm(total=len(todo), unit="slide", disable=not todo) as bar:
        for name, path in todo.items():

            def progress(done, total, name=name):
                bar.set_postfix_str(f"{name[:24]} tile {done}/{total}")

            try:
                count = prepare_slide(path, data, encoder, params, args.mpp, args.workers, args.batch, progress)
                tiles += count
                if not count:
                    empty.append(name)
            except UserError as error:
                failures.append((path, str(error)))
            bar.update()
    print(f"Wrote {tiles} tiles of {len(todo) - len(failures)} slides to {data}/features, pictures to {data}/qc.")
    if empty:
        print(f"No tissue found in {len(empty)}: {', '.join(empty[:5])}{', ...' * (len(empty) > 5)}")
    return failures


# --------------------------------------------------------------------------------------------------------------------
# Questions
# --------------------------------------------------------------------------------------------------------------------


def read_qa(path):
    """One question file -> rows {"id","slide","task","conversations"}. Both shapes of WSI-Bench:

    a JSON list of {"id","image","conversations"}, whose task is the file's name, or JSON lines of
    {"question_id","image","question","T-answer","metadata"}, whose task is the metadata. This project's own rows pass too.
    Raises UserError that names the line (or the item of a list).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (--qa)") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a text file that can be read ({error})") from None
    if not text.strip():
        raise UserError(f"{path}: empty; expected WSI-Bench questions, a JSON list or JSON lines")
    if text.lstrip().startswith("["):
        try:
            entries = [(f"item {i}", entry) for i, entry in enumerate(json.loads(text), 1)]
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    else:
        entries = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                if line.strip():
                    entries.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from None
    task = re.sub(r"^\d+_|_(test|train)$", "", path.stem)
    rows = []
    for where, entry in entries:
        try:
            rows.append(_qa_row(entry, task))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"is malformed ({error})"
            raise UserError(f"{path}, {where}: {what}; expected WSI-Bench's fields") from None
    if not rows:
        raise UserError(f"{path}: holds no questions")
    return rows


def _qa_row(entry, task):
    slide = entry["slide"] if "slide" in entry else re.sub(r"\.(pt|h5|svs|tiff?)$", "", entry["image"].split("/")[-1])
    if "conversations" in entry:
        turns = [{"from": turn["from"], "value": str(turn["value"])} for turn in entry["conversations"]]
        task = entry.get("task", task)
        name = entry["id"]
    else:
        turns = [
            {"from": "human", "value": f"<image>\n{entry['question']}"},
            {"from": "gpt", "value": str(entry["T-answer"])},
        ]
        task = str(entry.get("metadata") or task)
        name = entry["question_id"]
    if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2) or not turns:
        raise ValueError("conversations must alternate human and gpt")
    cancer = entry.get("cancer") or (entry["image"].split("/")[0] if "/" in entry.get("image", "") else "")
    return {"id": str(name), "slide": slide, "task": task, "cancer": cancer, "conversations": turns}


def import_qa(files, data, split):
    """Question files -> data/qa/<split>.jsonl (split None: "test" where the file's name says so, else "train")."""
    splits = {}
    for file in files:
        name = split or ("test" if re.search(r"(^|[_-])test", Path(file).stem) else "train")
        splits.setdefault(name, []).extend(read_qa(file))
    have = {path.stem for path in (data / "features").glob("*.safetensors")}
    (data / "qa").mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        write_qa(data / "qa" / f"{name}.jsonl", rows)
        slides = {row["slide"] for row in rows}
        print(
            f"Wrote {len(rows)} questions of {len({r['task'] for r in rows})} tasks about {len(slides)} slides to "
            f"{data}/qa/{name}.jsonl; {len(slides & have)} of these slides have features."
        )


def write_qa(path, rows):
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------------
# The toy cohort: slides whose reports and questions are true of what is drawn
# --------------------------------------------------------------------------------------------------------------------

SIDE = 2048  # pixels of a toy slide, at 0.5 um/px: 8 x 8 tiles
TYPES = ["adenocarcinoma", "squamous cell carcinoma", "small cell carcinoma", "mucinous carcinoma"]
GRADES = {"grade 1": (0.15, 0.25), "grade 2": (0.42, 0.54), "grade 3": (0.76, 0.90)}  # tumour's share of the tissue
QUADRANTS = {"upper left": (-1, -1), "upper right": (1, -1), "lower left": (-1, 1), "lower right": (1, 1)}
SUBTYPES = {
    ("positive", "negative"): "luminal A",
    ("positive", "positive"): "luminal B",
    ("negative", "positive"): "HER2-enriched",
    ("negative", "negative"): "basal-like",
}


def noise(rng, size, cells):
    """A smooth random field float32 [size,size], mean 0, with about `cells` bumps across."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def scatter(rng, mask, spacing):
    """Jittered grid points (x, y) in full pixels where the mask (at SIDE / 8) is True."""
    grid = np.stack(np.meshgrid(np.arange(0, SIDE, spacing), np.arange(0, SIDE, spacing)), -1).reshape(-1, 2)
    points = grid + rng.uniform(0, spacing, grid.shape)
    points = points[(points < SIDE).all(1)]
    return points[mask[(points[:, 1] // 8).astype(int), (points[:, 0] // 8).astype(int)]]


def draw_slide(case):
    """Draws one toy H&E slide -> (RGB image SIDE x SIDE, the corners of the tiles that hold the pigment)."""
    rng = np.random.default_rng(case["seed"])
    size = SIDE // 8  # regions are laid out at an eighth of the resolution
    y, x = np.mgrid[:size, :size] / size * 2 - 1
    angle = np.arctan2(y, x)
    radius = 0.86 + sum(rng.uniform(-0.05, 0.05) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(2, 6))
    tissue = np.hypot(x, y) < radius

    dx, dy = QUADRANTS[case["position"]]
    cx, cy = dx * rng.uniform(0.36, 0.46), dy * rng.uniform(0.36, 0.46)
    necrosis = np.hypot(x - cx, y - cy) < 0.29 + 0.03 * noise(rng, size, 8)
    viable = tissue & ~necrosis
    field = noise(rng, size, 5) + 0.25 * noise(rng, size, 16)
    tumour = viable & (field > np.quantile(field[viable], 1 - rng.uniform(*GRADES[case["grade"]])))
    stroma = viable & ~tumour

    ground = {  # what lies between the nuclei
        "adenocarcinoma": (214, 160, 200),
        "squamous cell carcinoma": (228, 138, 168),
        "small cell carcinoma": (186, 160, 206),
        "mucinous carcinoma": (206, 212, 234),
    }[case["type"]]
    colour = np.empty((size, size, 3), np.float32)
    colour[:] = (244, 243, 244)
    for region, rgb in ((stroma, (235, 184, 204)), (tumour, ground), (necrosis & tissue, (216, 190, 178))):
        colour[region] = rgb
    colour += (tissue * (5 * noise(rng, size, 12) + 5 * noise(rng, size, 64)))[..., None]
    colour = np.clip(colour, 0, 255).astype(np.uint8)
    picture = (
        Image.fromarray(colour).filter(ImageFilter.GaussianBlur(0.7)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    )
    draw = ImageDraw.Draw(picture)

    def dot(px, py, rx, ry, fill):
        draw.ellipse((px - rx, py - ry, px + rx, py + ry), fill=fill)

    def nucleus(px, py, rx, ry, dark=0):
        shade = rng.uniform(-14, 14) - dark
        dot(px, py, rx, ry, (int(112 + shade), int(72 + shade), int(146 + shade)))

    ring = np.linspace(0, 2 * math.pi, 9)[:-1]
    for px, py in scatter(rng, stroma, 46):  # fibroblasts: few, slender
        along, across = 10 * np.cos(ring), 2.5 * np.sin(ring)
        c, s = np.cos(a := rng.uniform(0, 3.2)), np.sin(a)
        draw.polygon(
            np.stack([px + c * along - s * across, py + s * along + c * across], -1).ravel().tolist(), (118, 76, 150)
        )
    for px, py in scatter(rng, necrosis & tissue, 22):  # ghosts and dust, no nuclei
        dot(px, py, *[rng.uniform(1.5, 3)] * 2, (150, 120, 120))
    if case["type"] == "adenocarcinoma":  # glands: a lumen in a ring of nuclei
        for px, py in scatter(rng, tumour, 84):
            r = rng.uniform(17, 27)
            dot(px, py, r, r, (246, 240, 246))
            for a in np.arange(0, 2 * math.pi, 11 / r):
                nucleus(px + (r + 7) * math.cos(a), py + (r + 7) * math.sin(a), 5.5, 5.5)
    elif case["type"] == "squamous cell carcinoma":  # sheets with keratin pearls
        for px, py in scatter(rng, tumour, 34):
            nucleus(px, py, rng.uniform(6, 8), rng.uniform(6, 8))
        for px, py in scatter(rng, tumour, 150):
            for r, shade in ((34, 0), (26, 22), (18, 0), (10, 22)):
                dot(px, py, r, r, (240 - shade, 104 + shade, 128))
    elif case["type"] == "small cell carcinoma":  # crowded, small, dark
        for px, py in scatter(rng, tumour, 17):
            nucleus(px, py, rng.uniform(5, 6.5), rng.uniform(5, 6.5), 34)
    else:  # clusters that float in pools of mucin
        for px, py in scatter(rng, tumour, 92):
            for _ in range(7):
                nucleus(*(np.array((px, py)) + rng.normal(0, 11, 2)), 6, 6)

    planted = []
    if case["focus"] == "present":  # brown pigment in the middle of one or two tiles that hold tissue all over
        inside = np.argwhere(tissue.reshape(8, size // 8, 8, size // 8).mean((1, 3)) > 0.95)
        for row, column in rng.permutation(inside)[: rng.integers(1, 3)]:
            centre = (np.array((column, row)) + 0.5) * TILE + rng.uniform(-24, 24, 2)
            for px, py in centre + rng.normal(0, 26, (46, 2)).clip(-64, 64):
                dot(px, py, *[rng.uniform(5, 9)] * 2, (int(rng.uniform(96, 122)), int(rng.uniform(58, 74)), 22))
            planted.append([int(column) * TILE, int(row) * TILE])
    picture = picture.filter(ImageFilter.SMOOTH)
    stain = rng.uniform(0.85, 1.15)  # no two laboratories stain alike
    table = [round(255 * (i / 255) ** stain) for i in range(256)]
    return picture.point(table * 3), planted


def write_tiff(path, image):
    """A tiled, pyramidal TIFF with its um/px, JPEG tiles, levels at 1, 1/2 and 1/4: what OpenSlide calls generic-tiff.

    Pillow cannot write tiles, and this is all that the format asks for: per level one directory of 12-byte entries,
    and every tile a JPEG of its own.
    """
    body, offset_of_next = bytearray(struct.pack("<2sHI", b"II", 42, 0)), 4
    for level in range(3):
        size = (SIDE >> level, SIDE >> level)
        picture = image if level == 0 else image.resize(size, Image.Resampling.BOX)
        offsets, lengths = [], []
        for y in range(0, size[1], TILE):
            for x in range(0, size[0], TILE):
                tile = io.BytesIO()
                picture.crop((x, y, x + TILE, y + TILE)).save(tile, "JPEG", quality=80)
                offsets.append(len(body))
                lengths.append(len(tile.getvalue()))
                body += tile.getvalue() + b"\0" * (len(tile.getvalue()) % 2)
        values = len(body)
        per_cm = round(1e4 / TARGET_MPP) >> level
        body += struct.pack("<3H2x2I", 8, 8, 8, per_cm, 1) + struct.pack(f"<{2 * len(offsets)}I", *offsets, *lengths)
        entries = [  # tag, type (3 short, 4 long, 5 rational), count, value or where it is
            (254, 4, 1, int(level > 0)),  # NewSubfileType: a reduced image
            (256, 4, 1, size[0]),
            (257, 4, 1, size[1]),
            (258, 3, 3, values),  # BitsPerSample
            (259, 3, 1, 7),  # Compression: JPEG
            (262, 3, 1, 6),  # Photometric: YCbCr
            (277, 3, 1, 3),  # SamplesPerPixel
            (282, 5, 1, values + 8),  # XResolution
            (283, 5, 1, values + 8),
            (296, 3, 1, 3),  # ResolutionUnit: centimetre
            (322, 4, 1, TILE),
            (323, 4, 1, TILE),
            (324, 4, len(offsets), values + 16),  # TileOffsets
            (325, 4, len(offsets), values + 16 + 4 * len(offsets)),  # TileByteCounts
        ]
        if len(offsets) == 1:
            raise ValueError("a level of one tile would keep its offset in the entry itself")
        struct.pack_into("<I", body, offset_of_next, len(body))
        body += struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        offset_of_next = len(body)
        body += struct.pack("<I", 0)
    with replacing(path) as temporary:
        temporary.write_bytes(body)


def draw_case(case, path):
    """One process's share of the drawing -> the tiles of the pigment."""
    image, planted = draw_slide(case)
    write_tiff(path, image)
    return planted


def balanced(rng, values, n):
    """n values, each as often as the others (give or take one), shuffled."""
    return [values[i] for i in rng.permutation(np.arange(n) % len(values))]


def invent_cases(n_train, n_test, seed):
    """What each toy slide shows. The four findings are drawn independently, so none tells of another."""
    rng = np.random.default_rng(seed)
    cases = []
    for split, n in (("train", n_train), ("test", n_test)):
        columns = [
            balanced(rng, list(values), n) for values in (TYPES, GRADES, QUADRANTS, ("present", "absent"), SUBTYPES)
        ]
        for row in zip(*columns):
            case = dict(zip(("type", "grade", "position", "focus", "receptors"), row))
            name = f"demo_{len(cases):04d}"
            cases.append({"slide": name, "split": split, "seed": int(rng.integers(2**31)), **case})
    return cases


def write_report(case, rng):
    """A report in the style of one of three pathologists, who differ in their words and in what they mention first."""
    share = {"grade 1": "about a fifth", "grade 2": "about half", "grade 3": "most"}[case["grade"]]
    some, position = case["focus"] == "present", case["position"]
    tumour = f"{'an' if case['type'][0] in 'aeiou' else 'a'} {case['type']}"
    styles = [
        f"The tumor is {tumour}. It takes up {share} of the tissue, which makes it {case['grade']}. "
        f"Necrosis is seen at the {position}. {'A focus of brown pigment is present.' if some else 'Brown pigment is absent.'}",
        f"Sections show {tumour} of {case['grade']} with necrosis at the {position}. "
        f"{'There is a focus of brown pigment.' if some else 'There is no brown pigment.'} Tumor fills {share} of the tissue.",
        f"{'Brown pigment is found.' if some else 'No brown pigment is found.'} The {position} is necrotic. "
        f"With {share} of the tissue taken up, this is {tumour}, {case['grade']}.",
    ]
    return styles[rng.integers(3)]


def write_questions(case, rng):
    """Rows of the dataset about one slide: its report, one question of each kind, and a dialogue of three of them."""
    er, her2 = case["receptors"]
    say = {
        "report": (["Write a report of this slide.", "What does this slide show?"], write_report(case, rng)),
        "type": (
            ["What is the histological type of the tumor?", "Which type of tumor is this?"],
            f"The tumor is {'an' if case['type'][0] in 'aeiou' else 'a'} {case['type']}.",
        ),
        "grade": (
            ["What is the grade of the tumor?", "How is this tumor graded by its share of the tissue?"],
            f"The tumor is {case['grade']}.",
        ),
        "position": (
            ["Where on the slide is the necrosis?", "Which part of the slide is necrotic?"],
            f"The necrosis is at the {case['position']}.",
        ),
        "focus": (
            ["Is there a focus of brown pigment?", "Can brown pigment be found on this slide?"],
            "Yes, brown pigment is present." if case["focus"] == "present" else "No, brown pigment is absent.",
        ),
        "subtype": (  # the text gives the answer away: a model without the slide does as well, and the table shows it
            [f"Estrogen receptor is {er} and HER2 is {her2}. What is the molecular subtype?"],
            f"The molecular subtype is {SUBTYPES[case['receptors']]}.",
        ),
    }
    turns = {
        task: [{"from": "human", "value": str(rng.choice(questions))}, {"from": "gpt", "value": answer}]
        for task, (questions, answer) in say.items()
    }
    order = rng.permutation(["type", "grade", "position", "focus"])[:3]
    turns["dialogue"] = [dict(turn) for task in order for turn in turns[task]]
    rows = []
    for task, conversation in turns.items():
        conversation[0]["value"] = "<image>\n" + conversation[0]["value"]
        name = f"{case['slide']}-{task}"
        rows.append({"id": name, "slide": case["slide"], "task": task, "cancer": "demo", "conversations": conversation})
    return rows


def prepare_demo(args):
    """Draws the cohort, then takes it through the same steps as real slides. -> the cases, what each slide shows."""
    args.preset = "demo"
    recipe = {"train": args.demo_slides, "test": args.demo_slides // 5, "seed": args.seed}
    folder = args.data / "slides"
    if (args.data / "meta.json").exists() and not (args.data / "cohort.json").exists():
        raise UserError(f"{args.data} holds data of your own; give the demo a folder of its own with --data")
    if (args.data / "cohort.json").exists():
        cohort = json.loads((args.data / "cohort.json").read_text())
        if cohort["recipe"] != recipe:
            raise UserError(
                f"{args.data} holds another demo cohort ({cohort['recipe']}, not {recipe}); name another --data"
            )
        cases = cohort["cases"]
    else:
        cases = draw_cohort(args, recipe, folder)
    failures = prepare_slides(args, {case["slide"]: folder / f"{case['slide']}.tif" for case in cases})
    if failures:
        raise UserError(f"{len(failures)} toy slides failed, the first: {failures[0][1]}")
    stand_in_llm(args)
    return cases


def draw_cohort(args, recipe, folder):
    cases = invent_cases(recipe["train"], recipe["test"], args.seed)
    print(
        f"Drawing {len(cases)} toy slides ({recipe['train']} to train on, {recipe['test']} held out) into {folder}: "
        f"tiled, pyramidal TIFFs of {SIDE} x {SIDE} pixels at {TARGET_MPP} um/px."
    )
    for path in (folder, args.data / "qa"):
        path.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{case['slide']}.tif" for case in cases]
    spawn = multiprocessing.get_context("spawn")  # forking a process that has torch's threads can hang
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        for case, planted in zip(
            cases, tqdm(pool.map(draw_case, cases, paths, chunksize=4), total=len(cases), unit="slide")
        ):
            case["planted"] = planted
    rows = {"train": [], "test": []}
    for case in cases:
        rows[case["split"]] += write_questions(case, np.random.default_rng(case["seed"] + 1))
    for split in rows:
        write_qa(args.data / "qa" / f"{split}.jsonl", rows[split])
    with replacing(args.data / "cohort.json") as path:
        path.write_text(json.dumps({"recipe": recipe, "cases": cases}, indent=1))
    return cases


# --------------------------------------------------------------------------------------------------------------------
# A stand-in for Vicuna, where there is none: a tiny Llama that has read the training texts and seen no slide
# --------------------------------------------------------------------------------------------------------------------


def stand_in_llm(args):
    """data/tokenizer.model and data/llm, trained on data/qa/train.jsonl. Does nothing where they fit the texts already."""
    text = (args.data / "qa" / "train.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    mark = hashlib.sha256(f"{args.seed}{text}".encode()).hexdigest()[:16]
    folder = args.data / "llm"
    if (folder / "texts").exists() and (folder / "texts").read_text() == mark:
        return
    talks = [
        [{**turn, "value": turn["value"].replace("<image>\n", "")} for turn in row["conversations"]] for row in rows
    ]
    train_tokenizer(args.data / "tokenizer.model", talks)
    tokenizer = wsi_llava.Tokenizer(args.data / "tokenizer.model")
    samples = [tokenizer.encode_chat(talk)[0] for talk in talks]
    for row, talk in zip(rows, talks):
        if wsi_llava.is_report(row):
            samples.append([tokenizer.bos] + tokenizer.encode(talk[1]["value"]) + [tokenizer.eos])
    torch.manual_seed(args.seed)
    cfg = PRESETS["demo"].llama
    cfg = type(cfg).from_dict({**cfg.to_dict(), "vocab": tokenizer.sp.vocab_size()})
    llama = wsi_llava.Llama(cfg).to(args.device)
    print(
        f"No language model at hand: training a stand-in of {sum(p.numel() for p in llama.parameters()):,} parameters on "
        f"the {len(samples)} training texts alone. It learns to speak as they do; it has seen no slide."
    )
    for p in llama.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.04)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    steps, batch = args.llm_steps, 32
    rng = np.random.default_rng(args.seed)
    with tqdm(range(steps), unit="step") as progress:
        for step in progress:
            chosen = [torch.tensor(samples[i][: cfg.context]) for i in rng.integers(len(samples), size=batch)]
            ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-1).to(args.device)
            logits = llama(ids.clamp(min=0))[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1)
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
            optimizer.step()
            progress.set_postfix_str(f"loss {loss.item():.3f}")
    wsi_llava.save_llama(llama, folder)
    with replacing(folder / "texts") as path:
        path.write_text(mark)


def train_tokenizer(path, talks):
    """SentencePiece with Llama's conventions, so that the stand-in and Vicuna share every line of code."""
    texts = [turn["value"] for talk in talks for turn in talk] + [f"{SYSTEM} USER: ASSISTANT:"] * len(talks)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n")),
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


# --------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--slides", nargs="+", metavar="PATH", help="slides, and folders to search for slides")
    add("--qa", nargs="+", metavar="FILE", help="question files in either of WSI-Bench's shapes")
    add("--split", choices=["train", "test"], help="of --qa (default: test where the file's name says so, else train)")
    add("--demo", action="store_true", help="draw the toy cohort and prepare it")
    add("--mpp", type=float, help="um per pixel at level 0, for slides whose metadata lack or misstate it")
    add("--min-tissue", type=float, default=0.25, help="least share of tissue in a tile (default: 0.25)")
    add("--batch", type=int, default=64, help="tiles a batch through the encoder (default: 64)")
    add("--overwrite", action="store_true", help="make features again that are there already")
    wsi_llava.add_shared_flags(parser)
    add_demo_flags(parser)
    return parser.parse_args(argv)


def with_defaults(args):
    """Another script's flags, completed by the defaults of this one's."""
    return argparse.Namespace(**(vars(parse([])) | vars(args)))


def add_demo_flags(parser):
    parser.add_argument(
        "--demo-slides", type=int, default=500, help="toy slides to train on; a fifth more are held out"
    )
    parser.add_argument("--llm-steps", type=int, default=250, help="training steps of the stand-in language model")


def main(argv=None):
    args = parse(argv)
    if not (args.slides or args.qa or args.demo):
        raise UserError("nothing to do: give --slides DIR, --qa FILE... or --demo (--help explains)")
    if args.mpp is not None and not 0.05 <= args.mpp <= 20:
        raise UserError(f"--mpp {args.mpp}: um per pixel at level 0 lies between 0.05 and 20, mostly 0.25 or 0.5")
    wsi_llava.resolve_device(args)
    if args.demo:
        prepare_demo(args)
    failures = prepare_slides(args, find_slides(args.slides)) if args.slides else []
    if args.qa:
        import_qa(args.qa, args.data, args.split)
    if (args.data / "meta.json").exists() and (args.data / "qa" / "train.jsonl").exists() and not args.llm:
        if wsi_llava.read_meta(args.data)["preset"] == "demo":
            stand_in_llm(args)
    for _, message in failures:
        print(f"failed: {message}", file=sys.stderr)
    if failures:
        raise UserError(f"{len(failures)} slides could not be prepared (listed above); the others are done")


if __name__ == "__main__":
    wsi_llava.run(main, on_interrupt="interrupted; the same command goes on where this one stopped")
