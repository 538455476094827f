"""Slides -> tile features, question files -> one dataset. Everything that train.py and sample.py read comes from here.

    python prepare.py --slides PATH...             slides, folders of slides, lists of slides: tissue, tiles, features
    python prepare.py --features PATH...           the same from features that were made elsewhere
    python prepare.py --qa FILE... [--split test]  question files of WSI-Bench and others, into data/qa/
    python prepare.py --demo                       draws a cohort of toy slides, with reports and questions

A slide is cut into 256-px tiles at 0.5 um/px where there is tissue, and every tile becomes one vector:

    data/features/<slide>.safetensors   features float16 [N,C], coords int32 [N,2] (x, y in pixels at the tiled resolution)
    data/qc/<slide>.jpg                 thumbnail with the outline of the tissue and the kept tiles: look at it
    data/qc/index.jpg                   all of these pictures on one sheet
    data/failures.jsonl                 the slides that could not be prepared: step and message

Interrupt it whenever you like, kill it, start it twice: a slide is done once its file in data/features is there, and
whoever works on a slide holds a lock that dies with the process.
"""

import argparse
import bisect
import collections
import concurrent.futures
import contextlib
import csv
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import struct
import sys
import threading
import time
import zlib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

import numpy as np
import openslide
import safetensors
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

import wsi_llava
from wsi_llava import TILE, UserError, at_least, check, count, reading, replacing

TARGET_MPP = 0.5  # um/px; Prov-GigaPath was trained at it
NATIVE = 0.02  # pixels this close to the target's size, or to a whole fraction of it, are not resampled
MPP_RANGE = (0.05, 20)  # um/px of a slide; TIFFs that say 72 dpi mean nothing by it
MASK = 32  # tiled pixels per pixel of the tissue mask: 8 x 8 mask pixels a tile
BLOCK = 4  # tiles along each side of a block: neighbours that are read one after the other
JOB = 2  # blocks that a reader is given at a time; handing over takes as long as half a tile
PART = 1024  # level pixels along each side of what a thumbnail is made of at a time
DROPPED = 0.01  # a slide fails where more of its tiles cannot be decoded
SUFFIXES = "svs tif tiff ndpi mrxs scn bif vms vmu svslide dcm png jpg jpeg".split()
Image.MAX_IMAGE_PIXELS = None  # slides are larger than what Pillow takes for an attack


# --------------------------------------------------------------------------------------------------------------------
# A slide at the target resolution
# --------------------------------------------------------------------------------------------------------------------


class Slide:
    """A slide seen as one image at the tiled resolution.

    width, height: pixels at the tiled resolution. mpp: um per level-0 pixel; source: where that is from. scale: level-0
    pixels per tiled pixel, exactly target / mpp. Raises UserError where the file is no slide or its um/px are unknown.
    """

    def __init__(self, path, mpp=None, target=TARGET_MPP):
        # The folder of an MRXS or DICOM slide lies beside the file, not beside a link to it.
        real = os.path.realpath(path)
        self.path = path if Path(real).suffix != Path(path).suffix else real
        try:
            self.file = openslide.open_slide(self.path)
        except (openslide.OpenSlideError, OSError) as error:
            raise UserError(f"{path}: not a slide that OpenSlide can read ({error})") from None
        self.mpp, self.source = (mpp, "given") if mpp else self._recorded_mpp(path)
        self.scale = target / self.mpp
        self.width, self.height = (round(side / self.scale) for side in self.file.dimensions)
        # The coarsest level that is at least as fine as the target; the finest there is where none is.
        self.downsamples = self.file.level_downsamples  # asked for once: the library counts anew each time
        fine = [level for level, d in enumerate(self.downsamples) if d <= self.scale * (1 + NATIVE)]
        self.level = fine[-1] if fine else 0
        self.zoom = self.scale / self.downsamples[self.level]  # level pixels per tiled pixel
        whole = max(1, round(self.zoom))
        self.average = whole if abs(self.zoom / whole - 1) <= NATIVE else None  # the same, if a whole number

    @property
    def corner(self):
        """Level-0 (x, y) where the scanned area begins, for formats that tell (MRXS): QuPath counts from there."""
        return [int(self.file.properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy"]

    def _recorded_mpp(self, path):
        get = self.file.properties.get
        sources = [("metadata", get("openslide.mpp-x"), get("openslide.mpp-y"))]
        unit = {"inch": 25400, "centimeter": 10000}.get(get("tiff.ResolutionUnit"))
        if unit and get("tiff.XResolution"):
            sources.append(("TIFF tags", *(unit / max(1e-9, float(get(f"tiff.{axis}Resolution"))) for axis in "XY")))
        if isinstance(self.file, openslide.ImageSlide):
            dpi = Image.open(self.path).info.get("dpi") or (1, 1)
            sources.append(("TIFF tags", *(25400 / max(1e-9, float(x)) for x in dpi)))
        if get("openslide.objective-power"):
            sources.append(("objective power", *[10 / max(1e-9, float(get("openslide.objective-power")))] * 2))
        for source, x, y in sources:
            x, y = float(x or y or 0), float(y or x or 0)
            if MPP_RANGE[0] <= min(x, y) and max(x, y) <= MPP_RANGE[1]:
                if abs(x / y - 1) > NATIVE:
                    raise UserError(
                        f"{path}: its pixels are not square ({x:g} x {y:g} um); --mpp takes them as if they were"
                    )
                return (x + y) / 2, source
        raise UserError(
            f"{path}: its metadata has no um/px; give it with --mpp, for example --mpp 0.25 for 40x, or --mpp-csv"
        )

    def region(self, level, x, y, width, height):
        """Pixels of a level, from its pixel (x, y) on -> uint8 [height,width,4], RGBA and opaque: what lies beyond the slide,
        or was not scanned, is white."""
        place = round(x * self.downsamples[level]), round(y * self.downsamples[level])
        region = self.file.read_region(place, level, (width, height))
        pixels = np.asarray(region)
        if pixels.view("<u4").min() >= 0xFF000000:  # the alpha of every pixel is 255
            return pixels
        return np.asarray(Image.alpha_composite(Image.new("RGBA", region.size, "white"), region))

    def tile(self, x, y):
        """The tile whose corner is at (x, y), in tiled pixels -> uint8 [256,256,4], RGBA as read: leaving A out takes a copy.

        It lies where the exact scale puts it, to half a level pixel, however far to the right: no error adds up.
        Where a tiled pixel is a whole number of level pixels, give or take 2%, it is their mean (of one: as scanned);
        otherwise the tile is resampled with Lanczos' filter, a margin that the filter reaches into read along.
        """
        margin = 0 if self.average else math.ceil(3 / min(1, self.zoom))  # tiled pixels; Lanczos-3
        left, top = (round((corner - margin) * self.zoom) for corner in (x, y))
        side = self.average * TILE if self.average else math.ceil((TILE + 2 * margin) * self.zoom)
        pixels = self.region(self.level, left, top, side, side)
        if self.average == 1:
            return pixels
        if self.average:
            return np.asarray(Image.fromarray(pixels).convert("RGB").reduce(self.average).convert("RGBA"))
        pixels = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]  # [1,4,side,side]
        pixels = F.interpolate(pixels, scale_factor=1 / self.zoom, mode="lanczos", antialias=True)[0]
        return pixels[:, margin : margin + TILE, margin : margin + TILE].permute(1, 2, 0).numpy()

    def thumbnail(self, pixel):
        """The whole slide, `pixel` tiled pixels a pixel. Read part by part: a slide without small levels takes time then,
        and not memory."""
        width, height = (max(1, int(side / pixel)) for side in (self.width, self.height))
        level = self.file.get_best_level_for_downsample(self.scale * pixel)
        zoom = self.scale * pixel / self.downsamples[level]  # level pixels per pixel
        picture, side = Image.new("RGB", (width, height)), max(1, int(PART / zoom))
        for y, x in itertools.product(range(0, height, side), range(0, width, side)):
            size = min(side, width - x), min(side, height - y)
            left, top = math.floor(x * zoom), math.floor(y * zoom)
            right, bottom = (x + size[0]) * zoom, (y + size[1]) * zoom
            part = self.region(level, left, top, math.ceil(right) - left, math.ceil(bottom) - top)
            box = (x * zoom - left, y * zoom - top, right - left, bottom - top)
            picture.paste(Image.fromarray(part).convert("RGB").resize(size, Image.Resampling.BOX, box), (x, y))
        return picture


def walk(top):
    """Every folder below `top` -> (folder, its visible files, sorted). Follows links, and no folder twice."""
    seen = set()
    for folder, folders, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
        else:
            seen.add(real)
            folders.sort()
            yield Path(folder), [Path(folder, file) for file in sorted(files) if not file.startswith(".")]


def find_slides(inputs):
    """Folders (searched through), files, and .txt lists of both -> {slide id: path}, sorted. The id is the file's stem.

    A DICOM slide is a folder of .dcm files: one slide, named as the folder. Hidden files are left out.
    """
    slides = {}

    def add(name, path):
        if re.fullmatch(r"index(-\d+)?", name):
            raise UserError(f"{path}: data/qc/{name}.jpg is the sheet of all slides; rename this one")
        if os.path.realpath(slides.setdefault(name, path)) != os.path.realpath(path):
            raise UserError(f"{slides[name]} and {path} have the same name; rename one: it is the slide's id")

    for entry in map(Path, inputs):
        if not entry.exists():
            raise UserError(f"{entry}: no such file or folder (--slides)")
        if entry.is_file() and entry.suffix.lower() == ".txt":
            lines = [line.strip() for line in entry.read_text(encoding="utf-8").splitlines()]
            for name, path in find_slides([line for line in lines if line]).items():
                add(name, path)
        elif entry.is_file():
            add(entry.stem, entry)
        for folder, files in walk(entry):
            parts = any(p.suffix.lower() in (".vms", ".vmu") for p in files)  # Hamamatsu: their JPEGs are parts of them
            dicom = [p for p in files if p.suffix.lower() == ".dcm"]
            if dicom:
                add(folder.resolve().name, dicom[0])
            for path in files:
                suffix = path.suffix.lower().lstrip(".")
                if suffix in SUFFIXES and suffix != "dcm" and not (parts and suffix == "jpg"):
                    add(path.stem, path)
    if not slides:
        raise UserError(f"no slides below {', '.join(map(str, inputs))} (looked for .{', .'.join(SUFFIXES)})")
    return dict(sorted(slides.items()))


def read_mpp_csv(path):
    """Lines of slide,mpp -> {slide: um/px at level 0}. A slide is named by its id or its file; a first line may be a header."""
    found = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                try:
                    slide, mpp = row
                    found[slide.strip()] = float(mpp)
                    if not MPP_RANGE[0] <= float(mpp) <= MPP_RANGE[1]:
                        raise ValueError
                except ValueError:
                    if row and number > 1:
                        raise UserError(f"{path}, line {number}: not slide,mpp with 0.05 to 20 um per pixel") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a file that can be read ({error}); --mpp-csv takes lines of slide,mpp") from None
    return found


def given_mpp(args, table, name, path):
    """What --mpp-csv and --mpp say of a slide, or None."""
    return table.get(name, table.get(path.name, args.mpp))


# --------------------------------------------------------------------------------------------------------------------
# Tissue and tiles
# --------------------------------------------------------------------------------------------------------------------


def otsu(counts):
    """Otsu's threshold of a histogram of 256 values: the cut that separates them into the two most distinct groups."""
    counts = np.array(counts, float)
    weight = counts.cumsum()
    total = (counts * np.arange(256)).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (total[-1] * weight / weight[-1] - total) ** 2 / (weight * (weight[-1] - weight))
    return int(np.nanargmax(np.where(np.isfinite(between), between, -1)))


def tissue_mask(thumbnail):
    """RGB thumbnail -> bool [h,w]: stained tissue has a colour; glass, white or grey, has none, nor have black borders.

    The measure is max(R,G,B) - min(R,G,B): unlike the saturation, it is small in the dark, where the hue is noise. Otsu
    always finds two groups, also where there is only glass or only tissue: hence the bounds on its threshold. Ink is
    blue or green and far stronger than any stain; around it, where it fades into the glass, nothing counts either.
    """
    colour, rest = np.empty((2, thumbnail.height, thumbnail.width), np.uint8)  # rest: neither black nor ink, 255 or 0
    halo, rows = 8, 256  # strip by strip, for memory's sake; blur and ink reach 6 pixels into the next
    for top in range(0, thumbnail.height, rows):
        above = min(top, halo)
        strip = thumbnail.crop((0, top - above, thumbnail.width, min(thumbnail.height, top + rows + halo)))
        red, green, blue = (np.asarray(band.filter(ImageFilter.GaussianBlur(1))) for band in strip.split())
        high = np.maximum(np.maximum(red, green), blue)
        spread = high - np.minimum(np.minimum(red, green), blue)
        black = (high < 25) | (high < 75) & (spread < high // 2)
        ink = (green > red) & (spread > high // 2 + high // 20) & (spread > 40)
        ink = np.asarray(Image.fromarray(ink.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(7))) > 0
        here = slice(above, above + rows)
        colour[top : top + rows], rest[top : top + rows] = spread[here], ~(black | ink)[here] * np.uint8(255)
    counts = Image.fromarray(colour).histogram(Image.fromarray(rest))
    return (rest > 0) & (colour > np.clip(otsu(counts), 8, 30))


def tile_grid(mask, min_tissue, step=TILE):
    """Corners of the tiles with at least that share of tissue: int32 [N,2] (x, y) in tiled pixels, in raster order."""
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int32)  # of the tissue above and left of each corner
    total[1:, 1:] = mask
    total.cumsum(0, out=total).cumsum(1, out=total)
    y, x = (np.arange(0, side * MASK - TILE + 1, step) for side in mask.shape)  # whole tiles only
    top, left = np.rint(y / MASK).astype(int), np.rint(x / MASK).astype(int)
    bottom, right = top + TILE // MASK, left + TILE // MASK
    top, bottom = np.minimum([top, bottom], mask.shape[0])
    left, right = np.minimum([left, right], mask.shape[1])
    tissue = total[bottom][:, right] - total[bottom][:, left] - total[top][:, right] + total[top][:, left]
    rows, columns = np.nonzero(tissue >= min_tissue * (TILE // MASK) ** 2)
    return np.stack([x[columns], y[rows]], axis=1).astype(np.int32)


def draw_tiles(coords, name, max_tiles, seed):
    """At most so many of the tiles (0: all), uniformly at random, in raster order: the same ones for a slide and a seed."""
    if not max_tiles or len(coords) <= max_tiles:
        return coords
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return coords[np.sort(rng.choice(len(coords), max_tiles, replace=False))]


def blocks(coords, step):
    """Tiles [N,2] -> arrays of indices: up to 4 x 4 neighbours each. Whoever reads them one after the other decodes the
    JPEG tiles of the slide that they share only once: OpenSlide keeps the last 32 MB of these."""
    side = int(np.clip((BLOCK - 1) * TILE // step + 1, 1, BLOCK))
    cells = coords // (step * side)
    order = np.lexsort((coords[:, 0], coords[:, 1], cells[:, 0], cells[:, 1]))
    borders = np.flatnonzero((np.diff(cells[order], axis=0) != 0).any(1)) + 1
    return np.split(order, borders) if len(order) else []


# --------------------------------------------------------------------------------------------------------------------
# Pictures to check, outlines for QuPath
# --------------------------------------------------------------------------------------------------------------------


def draw_qc(path, picture, pixel, mask, coords):
    """The slide with the outline of its tissue (green) and the kept tiles (blue): what a person checks before trusting.

    picture: of the whole slide, `pixel` tiled pixels a pixel.
    """
    draw = ImageDraw.Draw(picture, "RGBA")
    side = TILE / pixel
    for x, y in coords / pixel:
        draw.rectangle((x, y, x + side, y + side), (30, 80, 255, 24), (30, 80, 255, 140) if side > 6 else None)
    solid = Image.fromarray(mask.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.BILINEAR)
    solid = solid.point([0] * 128 + [255] * 128)
    edge = np.asarray(solid) != np.asarray(solid.filter(ImageFilter.MinFilter(5)))
    picture.paste((0, 150, 60), mask=Image.fromarray(edge.astype(np.uint8) * 255))
    with replacing(path) as temporary:
        picture.save(temporary, "JPEG", quality=90)


def contours(mask):
    """Outlines of a bool mask along the edges of its pixels -> polygons [outer ring, hole, ...], rings of corners (x, y).

    Every edge between inside and outside is an arrow from corner to corner with the inside on its right. A ring follows
    the arrows and turns right where it can: pixels that touch at a corner stay apart. Outer rings run clockwise.
    """
    padded = np.pad(mask, 1)
    nw, ne, sw, se = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]  # the pixels around each corner
    arrows = np.zeros(se.shape, np.uint8)  # of each corner, one bit a direction: right, down, left, up
    for bit, (inside, outside) in enumerate(((se, ne), (sw, se), (nw, sw), (ne, nw))):
        arrows |= (inside & ~outside).view(np.uint8) << bit
    width = arrows.shape[1]
    bits, todo, steps = arrows.tobytes(), bytearray(arrows), (1, width, -1, -width)
    polygons, owner = [], {}  # owner: the polygon of an upward arrow
    for start in map(int, np.flatnonzero(arrows & 3)):
        first = 0 if bits[start] & 1 else 1
        if not todo[start] >> first & 1:
            continue
        # In raster order a ring is met at its upper left corner. There an outer ring sets out to the right and a hole
        # down: the hole lies in the polygon of the next upward arrow to the left, which borders on the same pixels.
        if first == 0:
            n = len(polygons)
            polygons.append([])
        else:
            n = owner[next(i for i in range(start, -1, -1) if bits[i] & 8)]
        ring, at, direction = [], start, first
        while todo[at] >> direction & 1:
            todo[at] ^= 1 << direction
            if direction == 3:
                owner[at] = n
            at += steps[direction]
            # right, straight on or left
            turn = next(turn for turn in (1, 0, 3) if bits[at] >> (direction + turn) % 4 & 1)
            if turn:
                ring.append((at % width, at // width))
            direction = (direction + turn) % 4
        polygons[n].append(ring)
    return polygons


def write_geojson(path, slide, mask, coords):
    """Tissue and tiles for QuPath: a FeatureCollection in level-0 pixels, the tissue an annotation, the tiles tile objects."""

    def feature(kind, rings, name, scale):
        about = {"classification": {"name": name}, "isLocked": True}
        return json.dumps(wsi_llava.geojson_feature(kind, rings, scale, slide.corner, **about))

    tissue = (feature("annotation", rings, "Tissue", MASK * slide.scale) for rings in contours(mask))
    tiles = (feature("tile", [wsi_llava.tile_corners(x, y)], "Tile", slide.scale) for x, y in coords.tolist())
    with replacing(path) as temporary, open(temporary, "w") as file:  # written as it is made: a slide has 100,000 tiles
        file.write('{"type": "FeatureCollection", "features": [')
        for i, text in enumerate(itertools.chain(tissue, tiles)):
            file.write(",\n" * (i > 0) + text)
        file.write("]}\n")


# --------------------------------------------------------------------------------------------------------------------
# Readers: processes of their own that survey slides and read tiles (decoding and resizing hold Python's lock too long for
# threads). What they read they leave in shared memory; only numbers travel.
# --------------------------------------------------------------------------------------------------------------------

SLOT = (JOB * BLOCK * BLOCK, TILE, TILE, 4)  # the tiles of one job, RGBA
open_slide = functools.lru_cache(maxsize=2)(Slide)  # in each reader: the slide at hand, and the next one


class SlideError(Exception):
    """Why one slide cannot be prepared: args are the step and the message. The others go on."""


def start_reader(memory):
    global slots
    slots = np.frombuffer(memory, np.uint8).reshape(-1, *SLOT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    torch.set_num_threads(1)  # a reader is one of many; and a fork has none of its parent's threads
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # do not outlive it


def survey(name, path, params, data, geojson):
    """What there is to read of a slide -> dict with its tiles' coords and what Slide knows; its pictures go into data/qc.

    data None: no pictures. Raises SlideError, whatever the file does to its reader; OSError where the pictures cannot be written.
    """
    step, source = "open", (str(path), params["mpp"], params["target_mpp"])
    try:
        slide = open_slide(*source)
        step = "tissue"
        thumbnail = slide.thumbnail(MASK)
        mask = tissue_mask(thumbnail)
        coords = tile_grid(mask, params["min_tissue"], params["step"])
        pixel = max(slide.width, slide.height) / 768
        if pixel > MASK:  # not read again: a slide without small levels takes minutes
            size = [max(1, round(side * MASK / pixel)) for side in thumbnail.size]
            picture = thumbnail.resize(size, Image.Resampling.BOX)
        else:
            picture = slide.thumbnail(pixel)
    except Exception as error:
        open_slide.cache_clear()  # a handle that has failed once fails for good
        raise SlideError(step, f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    coords = draw_tiles(coords, name, params["max_tiles"], params["seed"])
    if data:
        draw_qc(data / "qc" / f"{name}.jpg", picture, pixel, mask, coords)
        if geojson:
            write_geojson(data / "qc" / f"{name}.geojson", slide, mask, coords)
    facts = {key: getattr(slide, key) for key in ("mpp", "source", "scale", "level")}
    about = {"name": name, "path": path, "coords": coords, "size": slide.file.dimensions, "dropped": 0}
    return about | facts | {"reader": source, "step": params["step"]}


def read_tiles(source, coords, slot):
    """Neighbouring tiles -> (which of them could be read, bool [n]; the last error). Their pixels go into the slot."""
    read, failed = np.zeros(len(coords), bool), None
    for i, (x, y) in enumerate(coords.tolist()):
        for _ in range(2):  # OpenSlide refuses everything after an error: so the slide is opened anew
            try:
                slots[slot, i] = open_slide(*source).tile(x, y)
                read[i] = True
                break
            except Exception as error:
                failed = str(error)
                open_slide.cache_clear()
    return read, failed


def ahead(pool, function, jobs, depth):
    """Runs function(*job) in the pool for every (tag, job), `depth` jobs ahead; yields (tag, future) in the jobs' order."""
    waiting = collections.deque()
    for tag, job in jobs:
        waiting.append((tag, pool.submit(function, *job)))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


class Readers:
    """A pool of reader processes -> the tiles of many slides, one stream in a fixed order, read ahead across slides.

    On Linux they are forked: they share what is loaded, PyTorch too. Elsewhere they are spawned.
    """

    def __init__(self, workers):
        kind = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.workers, self.depth = max(1, workers), 2 * max(1, workers) + 2
        memory = kind.RawArray("B", (self.depth + 1) * math.prod(SLOT))  # unnamed: gone with the processes
        self.slots = np.frombuffer(memory, np.uint8).reshape(-1, *SLOT)
        self.pool = concurrent.futures.ProcessPoolExecutor(self.workers, kind, start_reader, (memory,))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown(wait=True, cancel_futures=True)

    def surveys(self, jobs):
        """(name, arguments of survey) -> (name, future)."""
        return ahead(self.pool, survey, jobs, self.workers + 1)

    def tiles(self, plans):
        """Plans from survey -> (plan, indices of tiles, uint8 [n,256,256,4], last error) job by job; the memory is used
        again when the next job is asked for. A plan's last job is followed by (plan, None, None, None)."""
        slots = itertools.cycle(range(len(self.slots)))

        def jobs():
            for plan in plans:
                parts = blocks(plan["coords"], plan["step"])
                for part in [np.concatenate(parts[i : i + JOB]) for i in range(0, len(parts), JOB)]:
                    if plan["dropped"] > DROPPED * len(plan["coords"]):
                        break  # it has failed
                    slot = next(slots)
                    yield (plan, part, slot), (plan["reader"], plan["coords"][part], slot)
                yield (plan, None, 0), (plan["reader"], plan["coords"][:0], 0)  # reads nothing: the end of the slide

        for (plan, part, slot), future in ahead(self.pool, read_tiles, jobs(), self.depth):
            read, error = future.result()
            if part is None:
                yield plan, None, None, None
            else:
                tiles = self.slots[slot, : len(part)]
                plan["dropped"] += len(part) - read.sum()
                yield (plan, part, tiles, error) if read.all() else (plan, part[read], tiles[read], error)


# --------------------------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------------------------


class Batches:
    """Tiles of one slide in, their features out. All batches are full but a slide's last: a feature's bits depend on its
    slide alone. On a GPU, two pinned buffers take turns, so that tiles are copied in while the encoder works."""

    def __init__(self, encoder, batch, device):
        self.encoder, self.device, self.dtype = encoder, device, encoder.cls_token.dtype
        pinned = device.type == "cuda"
        self.buffers = [torch.empty(batch, TILE, TILE, 4, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self.copied = [torch.cuda.Event() if pinned else None for _ in range(2)]
        self.clear()

    def clear(self):
        self.filled, self.features, self.places = 0, [], []

    def add(self, places, tiles):
        """tiles: uint8 [n,256,256,4], RGBA; places: their rows in the features."""
        self.places.append(places)
        while len(tiles):
            n = min(len(tiles), len(self.buffers[0]) - self.filled)
            self.buffers[0][self.filled : self.filled + n] = torch.from_numpy(tiles[:n])
            self.filled, tiles = self.filled + n, tiles[n:]
            if self.filled == len(self.buffers[0]):
                self.encode()

    @torch.inference_mode()
    def encode(self):
        tiles = self.buffers[0][: self.filled].to(self.device, non_blocking=True)
        if self.copied[0]:
            self.copied[0].record()
        self.features.append(self.encoder(wsi_llava.preprocess_tiles(tiles[..., :3]).to(self.dtype)).half())
        self.buffers.reverse()
        self.copied.reverse()
        if self.copied[0]:
            self.copied[0].synchronize()
        self.filled = 0

    def finish(self):
        """-> rows in the features, ascending [n]; features float16 [n,C] in that order."""
        if self.filled:
            self.encode()
        places = np.concatenate([*self.places, np.zeros(0, int)]).astype(int)
        features = torch.cat(self.features).cpu() if self.features else torch.empty(0, self.encoder.cfg.width).half()
        self.clear()
        order = np.argsort(places)
        return places[order], features[torch.from_numpy(order)]


def check_same(path, params):
    """Raises UserError where a file of features was made with other parameters."""
    old = wsi_llava.feature_metadata(path)["params"]
    for k in params | old:
        if old.get(k) != params.get(k):
            raise UserError(f"{path} was made with {k} {old.get(k)}, not {params.get(k)}; --overwrite makes it again")


@functools.cache
def claims_file(data):
    return open(data / ".claims", "ab")  # for good: closing it would give up every lock that this process has on it


def claim(data, name, how="try"):
    """Whether this process alone may work on `name` in the folder from now on, until it gives it up or dies, however it dies.

    how: "try", "wait" or "give up". A lock on one byte of data/.claims, at a place that follows from the name: nothing is
    left to clean up.
    """
    file, place = claims_file(data), int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
    try:
        if fcntl:
            modes = {"try": fcntl.LOCK_EX | fcntl.LOCK_NB, "wait": fcntl.LOCK_EX, "give up": fcntl.LOCK_UN}
            fcntl.lockf(file, modes[how], 1, place)
        else:
            modes = {"try": msvcrt.LK_NBLCK, "wait": msvcrt.LK_LOCK, "give up": msvcrt.LK_UNLCK}
            os.lseek(file.fileno(), place, os.SEEK_SET)
            msvcrt.locking(file.fileno(), modes[how], 1)
    except (BlockingIOError, PermissionError):  # which of the two depends on the system
        return False
    return True


@contextlib.contextmanager
def alone(data, what):
    """Waits until no other process is at `what`."""
    claim(data, f"/{what}", "wait")  # no slide is called so
    try:
        yield
    finally:
        claim(data, f"/{what}", "give up")


def sweep(data):
    """Removes half-written files of runs that were killed: those that nobody is at work on, as their lock tells."""
    patterns = ".meta.json.*.part", ".failures.jsonl.*.part", "features/.*.part", "qc/.*.part"
    for path in itertools.chain(*map(data.glob, patterns)):
        name = re.sub(r"\.[0-9a-f]+\.part$", "", path.name[1:])
        if path.parent == data:
            name = f"/{name}"
        else:
            name = "/sheets" if re.fullmatch(r"index(-\d+)?\.jpg", name) else name.rsplit(".", 1)[0]
        if claim(data, name):
            path.unlink(missing_ok=True)
            claim(data, name, "give up")


def read_failures(data):
    """data/failures.jsonl -> {slide: {"slide", "step", "message"}}."""
    try:
        lines = (data / "failures.jsonl").read_text(encoding="utf-8").splitlines()
        return {entry["slide"]: entry for entry in map(json.loads, lines)}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{data}/failures.jsonl: not what prepare.py writes ({error}); delete it") from None


def note_failure(data, name, step=None, message=None):
    """Puts a slide on the record of failures, or takes it off."""
    with alone(data, "failures.jsonl"):
        old = read_failures(data)
        new = {slide: entry for slide, entry in old.items() if slide != name}
        if step:
            new[name] = {"slide": name, "step": step, "message": message}
        if new != old:
            wsi_llava.write_text(data / "failures.jsonl", "".join(json.dumps(entry) + "\n" for entry in new.values()))


def write_meta(data, preset, mpp, encoder):
    """Makes the folder and its meta.json, or checks them -> what meta.json holds."""
    for folder in ("features", "qc", "qa"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    meta = {"version": wsi_llava.VERSION, "preset": preset, "tile_size": TILE, "mpp": mpp, "encoder": encoder}
    with alone(data, "meta.json"):
        if not (data / "meta.json").exists():
            wsi_llava.write_text(data / "meta.json", json.dumps(meta, indent=2))
        old = wsi_llava.read_meta(data)
    if old["encoder"]["fingerprint"] != encoder["fingerprint"]:
        clash = f"of another tile encoder ({old['encoder']['source']}, not {encoder['source']})"
    elif old["mpp"] != mpp:
        clash = f"at {old['mpp']} um/px, not {mpp}"
    else:
        return old
    raise UserError(f"{data} holds features {clash}; name a new folder with --data")


def open_data(args):
    """data/meta.json, made or checked: one folder holds the features of one tile encoder -> (meta, encoder)."""
    data = Path(args.data)
    old = wsi_llava.read_meta(data) if (data / "meta.json").exists() else None
    if old:  # by default, the encoder that made what is there
        args.preset = args.preset or old["preset"]
        if old["encoder"]["source"] != "untrained" and not old["encoder"]["source"].startswith("imported"):
            args.tile_encoder = args.tile_encoder or Path(old["encoder"]["source"])
    encoder, source = wsi_llava.pick_tile_encoder(args)
    info = {"source": str(source or "untrained"), "fingerprint": wsi_llava.fingerprint(encoder)}
    info["width"] = encoder.cfg.width
    preset = args.preset or ("7b" if source else "demo")
    return {"encoder": info} if args.dry_run else write_meta(data, preset, args.target_mpp, info), encoder


@contextlib.contextmanager
def disk_errors(data):
    """Slides' own errors stay in the readers: an OSError that comes as far as this is the output folder's."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{data} cannot be written ({error}); make room or get the permission, then run the same command: it goes on"
        ) from None


def save_features(path, features, coords, metadata):
    # One entry: safetensors writes several in random order, and the same slide should give the same bytes.
    wsi_llava.write_tensors(path, {"features": features, "coords": coords}, {"wsi_llava": json.dumps(metadata)})


class Preparation:
    """One run over many slides {id: path}: what there is to do, and what came of it. failures: [(path, message)]."""

    def __init__(self, args, slides):
        self.args, self.data, self.slides, self.started = args, Path(args.data), slides, time.time()
        self.given = read_mpp_csv(args.mpp_csv) if args.mpp_csv else {}
        self.meta, self.encoder = open_data(args)
        self.at_hand, self.settled = set(), set()  # slides that are claimed; slides that this run is through with
        self.failures, self.busy, self.notes = [], [], {}
        self.tiles, self.written = 0, []  # tiles encoded; of each slide that was written, their number
        self.bar, self.todo = None, []  # bar: prepare_slides opens it
        for name in slides:
            if not self.is_done(name):
                self.todo.append(name)
            elif not args.dry_run:
                check_same(self.file(name), self.params(name))

    def params(self, name):
        """What a slide's features depend on, beside the slide."""
        args = self.args
        return {
            "tile": TILE,
            "target_mpp": args.target_mpp,
            "mpp": given_mpp(args, self.given, name, self.slides[name]),
            "min_tissue": args.min_tissue,
            "step": args.step,
            "max_tiles": args.max_tiles,
            "seed": args.seed if args.max_tiles else None,
            "encoder": self.meta["encoder"]["fingerprint"],
        }

    def file(self, name):
        return wsi_llava.features_file(self.data, name)

    def is_done(self, name):
        """Whether the slide's features are there; with --overwrite, whether they are newer than this run."""
        file = self.file(name)
        return file.exists() and not (self.args.overwrite and file.stat().st_mtime < self.started)

    def take(self, names):
        """Claims one slide after the other, for as long as it is in hand; yields those that are left to do."""
        for name in names:
            if not claim(self.data, name):
                self.busy.append(name)
                self.settle(name)
                continue
            self.at_hand.add(name)
            if self.is_done(name):  # another process was faster
                self.settle(name)
            else:
                yield name

    def surveys(self, readers, names, data):
        """Yields the plans of the slides that can be opened, in order; the others are failures. data: see survey."""
        jobs = ((n, (n, self.slides[n], self.params(n), data, self.args.geojson)) for n in names)
        for name, future in readers.surveys(jobs):
            try:
                yield future.result()
            except SlideError as error:
                self.fail(name, *error.args)

    def run(self, names):
        """Prepares the slides. Where one kills its reader, those at hand are tried again one by one, to know which it was."""
        try:
            with Readers(self.args.workers) as readers:
                self.encode(readers.tiles(self.surveys(readers, self.take(names), self.data)))
        except BrokenProcessPool:
            suspects = list(self.at_hand)
            if not suspects:
                message = "the reader processes die at once, perhaps for lack of memory; try fewer --workers"
                raise UserError(message) from None
            if len(names) == 1:
                message = f"{self.slides[names[0]]}: the process that read it died (a damaged file, or no memory left)"
                self.fail(names[0], "read", message)
                return
            for name in suspects:
                self.run([name])
            self.run([name for name in names if name not in self.settled])

    def encode(self, stream):
        """Takes the tiles of all slides, job by job, to their features. stream: of Readers.tiles."""
        batches = Batches(self.encoder, self.args.batch, self.args.device)
        for plan, places, tiles, error in stream:
            name, n = plan["name"], len(plan["coords"])
            if name in self.settled:
                continue  # it has failed
            if plan["dropped"] > DROPPED * n:
                batches.clear()
                message = f"{plan['path']}: over {DROPPED:.0%} of its {n} tiles cannot be decoded ({error})"
                self.fail(name, "read", message)
            elif places is None:
                self.finish(plan, *batches.finish())
            else:
                batches.add(places, tiles)
                self.tiles += len(places)
                speed = self.tiles / (time.time() - self.started)
                self.bar.set_postfix_str(f"{speed:.0f} tiles/s, {name[:24]}")

    def finish(self, plan, places, features):
        name, facts = plan["name"], {key: plan[key] for key in ("mpp", "scale")}
        if not features.isfinite().all():
            self.fail(name, "encode", f"{plan['path']}: its features are not finite; try --dtype float32")
            return
        facts |= {"mpp_source": plan["source"], "dropped": int(plan["dropped"]), "params": self.params(name)}
        facts |= dict(zip(("width", "height"), plan["size"]))  # level 0
        save_features(self.file(name), features, torch.from_numpy(plan["coords"][places]), facts)
        note_failure(self.data, name)
        self.written.append(len(places))
        for what, holds in (
            ("um/px taken from the objective power", plan["source"] == "objective power"),
            ("coarser than the target, enlarged", plan["scale"] < 1 - NATIVE),
            (f"some tiles (under {DROPPED:.0%}) left out that cannot be decoded", plan["dropped"]),
            ("no tissue found", not len(plan["coords"])),
        ):
            if holds:
                self.notes.setdefault(what, []).append(name)
        self.settle(name)

    def fail(self, name, step, message):
        self.failures.append((self.slides[name], message))
        if not self.args.dry_run:
            note_failure(self.data, name, step, message)
        self.settle(name)

    def settle(self, name):
        """This run is through with the slide."""
        self.settled.add(name)
        self.bar.update()
        if name in self.at_hand:
            self.at_hand.remove(name)
            claim(self.data, name, "give up")

    def summary(self):
        seconds = time.time() - self.started
        spent, speed = datetime.timedelta(seconds=round(seconds)), self.tiles / seconds
        print(
            f"Wrote {count(sum(self.written), 'tile')} of {count(len(self.written), 'slide')} to {self.data}/features in {spent} "
            f"({speed:.0f} tiles/s), pictures to {self.data}/qc."
        )
        if self.busy:
            self.notes["left to another run that is at work on them"] = self.busy
        for what, names in self.notes.items():
            print(f"{count(len(names), 'slide')}, {what}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}")

    def estimate(self):
        """--dry-run -> the plans of all slides that can be opened; seconds a tile, by a few batches of the largest."""
        with Readers(self.args.workers) as readers:
            plans = list(self.surveys(readers, self.todo, None))
            seconds, batches = 0.0, Batches(self.encoder, self.args.batch, self.args.device)
            largest = max((plan for plan in plans if len(plan["coords"])), key=lambda p: len(p["coords"]), default=None)
            for _ in range(2 if largest else 0):  # the first time warms up
                started, coords = time.time(), largest["coords"][: 3 * self.args.batch]
                for _, places, tiles, _ in readers.tiles([largest | {"coords": coords}]):
                    if places is not None:
                        batches.add(places, tiles)
                batches.finish()
                seconds = (time.time() - started) / len(coords)
        return plans, seconds


def print_table(plans, seconds):
    """What there is and how long it would take. plans, seconds: of Preparation.estimate."""
    width = max([5, *(len(plan["name"]) for plan in plans)])

    def line(name, size, mpp, source, level, n, took):
        print(f"{name:{width}}  {size:>15}  {mpp:>7}  {source:15}  {level:>5}  {n:>8}  {took!s:>8}")

    line("slide", "level-0 size", "um/px", "from", "level", "tiles", "time")
    everything = {"name": "all", "coords": range(sum(len(plan["coords"]) for plan in plans))}
    for plan in [*plans, everything]:
        n, size = len(plan["coords"]), " x ".join(map(str, plan.get("size", ())))
        mpp, source, level = (plan.get(key, "") for key in ("mpp", "source", "level"))
        line(plan["name"], size, f"{mpp:.6}", source, level, n, datetime.timedelta(seconds=round(n * seconds)))


def prepare_slides(args, slides):
    """All slides of {id: path}, resuming where an earlier run stopped. Returns the failures, [(path, message)]."""
    with disk_errors(args.data):
        work = Preparation(args, slides)
        if work.meta["encoder"]["source"] == "untrained":
            print("No GigaPath weights found or named: a small untrained encoder serves, for trying the pipeline only.")
        print(
            f"Found {count(len(slides), 'slide')}, {len(slides) - len(work.todo)} done already; {len(work.todo)} to tile at "
            f"{args.target_mpp:g} um/px, step {args.step}, and encode on {args.device} into {args.data}/features, with "
            f"{count(args.workers, 'reader')}."
        )
        work.encoder.to(args.device, args.dtype)
        with tqdm(total=len(work.todo), unit="slide", disable=not work.todo) as work.bar:
            if args.dry_run:
                found = work.estimate()
                work.bar.close()
                print_table(*found)
                return work.failures
            sweep(args.data)
            try:
                work.run(work.todo)
            except torch.OutOfMemoryError:
                message = f"--batch {args.batch} does not fit {args.device}'s memory; try half of it"
                raise UserError(message) from None
        work.summary()
    return work.failures


def draw_cell(sheet, corner, cell, picture, name, text, colour):
    """One slide's place on a sheet; with a colour, in a frame of it."""
    (x, y), draw, font = corner, ImageDraw.Draw(sheet), ImageFont.load_default(13)
    if picture.exists():
        small = Image.open(picture)
        small.draft("RGB", (cell, cell))
        small.thumbnail((cell - 12, cell - 12))
        sheet.paste(small, (x + (cell - small.width) // 2, y + (cell - small.height) // 2))
    if colour:
        draw.rectangle((x + 2, y + 2, x + cell - 3, y + cell + 33), outline=colour, width=3)
    shown = name if len(name) <= 26 else f"{name[:12]}...{name[-11:]}"
    draw.text((x + cell / 2, y + cell + 2), shown, "black", font, anchor="ma")
    draw.text((x + cell / 2, y + cell + 17), text, colour or (90, 90, 90), font, anchor="ma")


def contact_sheets(data, columns=10, rows=10, cell=192):
    """data/qc/index.jpg, index-2.jpg...: every slide's picture, its name and number of tiles beneath, for a glance at all."""
    failures = read_failures(data)
    counts = {path.stem: wsi_llava.feature_metadata(path)["tiles"] for path in (data / "features").glob("*.safetensors")}
    names, n = sorted({*counts, *failures}), columns * rows
    pages = [names[i : i + n] for i in range(0, len(names), n)]
    paths = [data / "qc" / f"index{f'-{i}' * (i > 1)}.jpg" for i in range(1, len(pages) + 1)]
    for path, page in zip(paths, pages):
        size = min(columns, len(page)) * cell, math.ceil(len(page) / columns) * (cell + 36)
        sheet = Image.new("RGB", size, "white")
        for i, name in enumerate(page):
            text, colour = f"{counts.get(name, 0):,} tiles", None
            if name in failures:
                text, colour = f"FAILED ({failures[name]['step']})", (200, 0, 0)
            elif not counts[name]:
                text, colour = "NO TISSUE", (210, 120, 0)
            corner = i % columns * cell, i // columns * (cell + 36)
            draw_cell(sheet, corner, cell, data / "qc" / f"{name}.jpg", name, text, colour)
        with replacing(path) as temporary:
            sheet.save(temporary, "JPEG", quality=85)
    for path in (data / "qc").glob("index-*.jpg"):  # pages of an earlier run that had more slides
        if re.fullmatch(r"index-\d+", path.stem) and path not in paths:
            path.unlink()


# --------------------------------------------------------------------------------------------------------------------
# Features that were made elsewhere
# --------------------------------------------------------------------------------------------------------------------

TOKENS = "visual tokens"  # the kind of a file that holds what a slide encoder made: [n,C], or one vector [C]
BARE = "tiles without coordinates"
ENDINGS = (".pt", ".pth", ".h5", ".hdf5")
# Folders of CLAM's and TRIDENT's that tell less of a slide than the one beside them: pt_files lacks the
# coordinates that h5_files has, slide_features_* holds one vector a slide, made from features_*.
LESSER = ("pt_files", "slide_features_")


def find_features(inputs):
    """Files, and folders to search, CLAM's and TRIDENT's as they are -> {slide id: path}, sorted."""
    found, chosen = collections.defaultdict(dict), {}
    for entry in map(Path, inputs):
        check(entry.exists(), f"{entry}: no such file or folder (--features)")
        known = entry.is_dir() or entry.suffix.lower() in ENDINGS
        check(known, f"{entry}: features are read from {', '.join(ENDINGS)}, not from '{entry.suffix}'")
        for folder, files in [(None, [entry])] if entry.is_file() else walk(entry):
            if folder and folder != entry and folder.name == "patches":  # bare coordinates, of both tools
                continue
            for path in files:
                if path.suffix.lower() in ENDINGS:
                    found[path.stem][path] = None
    check(found, f"no .pt or .h5 files below {', '.join(map(str, inputs))}")
    for name, paths in sorted(found.items()):
        best = [path for path in paths if not path.parent.name.startswith(LESSER)] or list(paths)
        what = " and ".join(map(str, best[:2]))
        check(len(best) == 1, f"{what} have the same name; rename one, the slide's id, or name one folder")
        chosen[name] = best[0]
    everywhere = {path.parent for paths in found.values() for path in paths}
    for folder in sorted(everywhere - {path.parent for path in chosen.values()}):
        print(f"Left out {folder}: a folder beside it tells more of these slides. Name it alone to take it.")
    return chosen


def read_hdf5(path):
    """-> its datasets {name: tensor}; the attributes of the file and of these {name: plain value}."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: reading it needs h5py: pip install h5py") from None
    tensors = {}
    with reading(path, "not an HDF5 file with datasets features and coords"), h5py.File(path) as file:
        about = dict(file.attrs)
        for name in file.keys() & {"features", "feats", "coords"}:
            # Float64 holds every coordinate; torch knows no big-endian numbers and few unsigned ones.
            dtype = np.float64 if name == "coords" else np.float32
            tensors[name] = torch.from_numpy(np.asarray(file[name], dtype))
            about |= file[name].attrs
    return tensors, {name: np.ravel(value)[0] for name, value in about.items() if np.size(value) == 1}


def bare_kind(path, shape, holds):
    """What a tensor without coordinates holds. holds: what --features-are says, "tiles", "tokens" or None."""
    if len(shape) == 1 or holds == "tokens":
        return TOKENS
    told = holds or path.parent.name.startswith(("pt_files", "features_"))  # CLAM's and TRIDENT's: tiles
    shaped = shape[0] == 1 or tuple(shape) in ((576, 768), (576, 1024))
    return TOKENS if shaped and not told else BARE


def read_foreign(path, holds=None):
    """One file of features -> (kind, features float16 [N,C], coords float64 [N,2] or None, its attributes).

    A .pt holds a tensor, or a dict of features (GigaPath: tile_embeds) and coords; an .h5 features (STAMP:
    feats) and coords, with attributes (TRIDENT, STAMP) or without (CLAM). A slide's one vector [C] is one
    visual token. Raises UserError for anything else. holds: as for bare_kind.
    """
    if path.suffix.lower() in (".h5", ".hdf5"):
        found, about = read_hdf5(path)
    else:
        found = wsi_llava.read_checkpoint(path)
        found = {"features": found} if isinstance(found, torch.Tensor) else found
        check(isinstance(found, dict), f"{path}: holds a {type(found).__name__}, neither a tensor nor a dict")
        about = {name: value for name, value in found.items() if isinstance(value, (int, float, str))}
    name = next((name for name in ("tile_embeds", "feats", "features") if name in found), None)
    check(name, f"{path}: holds keys {list(found)[:5]}, neither features, feats nor tile_embeds")
    features, coords = found[name], found.get("coords")
    for x in (features,) if coords is None else (features, coords):
        plain = isinstance(x, torch.Tensor) and x.layout is torch.strided and not x.is_complex()
        check(plain, f"{path}: its {name} or coords are no plain tensor of numbers")
    with reading(path, "these are no features of tiles"):
        if features.dim() == 3 and len(features) == 1:  # a batch of one slide
            features, coords = features[0], None if coords is None else coords.reshape(-1, 2)
        if features.dim() == 1 or about.get("feat_type") in ("slide", "patient"):
            kind, coords = TOKENS, None  # TRIDENT's coords are those of the tiles that it was made from
            features = features.reshape(-1, features.shape[-1])
        elif coords is None:
            kind = bare_kind(path, features.shape, holds)
        else:
            kind = "TRIDENT" if "patch_size_level0" in about else "features and coordinates"
            kind = {"tile_embeds": "GigaPath", "feats": "STAMP"}.get(name, kind)
            coords = coords.detach().double()
            shapes = f"features {list(features.shape)} and coords {list(coords.shape)}"
            check(coords.shape == (len(features), 2), f"{path}: {shapes} are not [N,C] and [N,2]")
        shape, features = list(features.shape), features.half()
        check(len(shape) == 2 and features.numel(), f"{path}: features {shape} are not [N,C]")
        finite = features.isfinite().all() and (coords is None or coords.isfinite().all())
        check(finite, f"{path}: some features or coordinates are not finite in half precision")
    return kind, features, coords, about


def tiled_coords(path, coords, about, named, args):
    """A file's coordinates -> (their raster order [N], int32 [N,2] in that order, in tiled pixels).

    named: the slide's um/px by --mpp-csv, or None. Raises UserError where the scale is not known, or where it
    makes tiles that do not lie --step apart: then the scale is wrong, or the tiles are of another resolution.
    """
    with reading(path, "its attributes are not those of TRIDENT or STAMP"):
        zoom = float(about.get("patch_size_level0", 0)) / float(about.get("patch_size", 1))
        magnification = float(about.get("target_magnification", 0))
        step = float(about.get("patch_size_level0", 0)) - zoom * float(about.get("overlap", 0))
        if "tile_size_um" in about or about.get("unit") == "um":  # STAMP's coordinates are in um
            scale, step = args.target_mpp, float(about.get("tile_size_um", 0))
        elif named:
            scale = args.target_mpp / named
        elif zoom > 0 and magnification > 0:  # 20x is 0.5 um/px there
            scale = zoom * args.target_mpp * magnification / 10
        else:
            reason = "does not say the um/px of its coordinates (level 0); give --mpp or --mpp-csv"
            check(args.mpp, f"{path}: {reason}")
            scale = args.target_mpp / args.mpp
        order = np.lexsort(coords.numpy().T)  # y, then x
        coords, step = coords[torch.from_numpy(order)] / scale, step / scale
        if not step:  # the file does not say: what lies most often between neighbours of a row
            steps = coords.diff(dim=0)
            steps = steps[steps[:, 1] == 0, 0].round()
            step = steps.mode().values.item() if len(steps) else args.step
        check(
            abs(step / args.step - 1) <= NATIVE,
            f"{path}: its tiles lie {step:.0f} px apart at {args.target_mpp:g} um/px, not {args.step}: "
            f"the wrong --mpp, or tiles of another size; --step {step:.0f} takes them as they are",
        )
        # GigaPath pads a slide on all sides to whole tiles: the first may lie up to a tile outside; all move.
        outside = -coords.min(0).values.clamp(max=0)
        check(outside.max() <= step, f"{path}: negative coordinates, more than a tile outside of the slide")
        coords = (coords + outside).round()
        wsi_llava.grid_cells(coords)
    return order, coords.int()


def import_file(args, name, path, named, encoder):
    """One slide's features from elsewhere -> their kind. named: as for tiled_coords. encoder: what meta.json
    is to say of the one that --tile-encoder names, or None."""
    with reading(path, "rename it"):
        check(len(name.encode()) <= 220, f"{path}: its name is too long for a file beside it; rename it")
    kind, features, coords, about = read_foreign(path, args.features_are)
    (n, width), tokens, facts = features.shape, kind == TOKENS, {}
    info = {"source": f"imported: {kind}", "fingerprint": f"imported:{kind}:{width}", "width": width}
    if tokens:  # a model takes as many of every slide
        old = wsi_llava.read_meta(args.data)["encoder"] if (args.data / "meta.json").exists() else {}
        info["n_visual_tokens"] = there = old.get("n_visual_tokens", n)
        check(there == n, f"{path}: {n} visual tokens, but {args.data} holds {there} of every slide")
    elif encoder:
        info = encoder
        check(info["width"] == width, f"{path}: {width} wide, and --tile-encoder makes {info['width']}")
    if coords is not None:
        order, coords = tiled_coords(path, coords, about, named, args)
        features = features[torch.from_numpy(order)]
    elif not tokens:  # as stored; no tile of a slide lies at -1, so nobody takes these for places
        coords, facts = torch.full((n, 2), -1, dtype=torch.int32), {"coordinates": False}
    if args.dry_run:
        return kind
    write_meta(args.data, args.preset or "7b", args.target_mpp, info)
    params = {"imported": kind, "target_mpp": args.target_mpp, "mpp": named or args.mpp}
    params |= {"encoder": info["fingerprint"], "file": [str(path.resolve()), path.stat().st_size]}
    file = wsi_llava.features_file(args.data, name)
    if tokens:
        path = args.data / "visual_tokens" / file.name
        wsi_llava.write_tensors(path, {"visual_tokens": features}, {"made_by": info["source"]})
    elif file.exists() and not args.overwrite:
        check_same(file, params)
    else:
        save_features(file, features, coords, {"params": params} | facts)
    return kind


def import_features(args, number=0, shares=1):
    """--features: files of any kind that read_foreign takes -> data/features or data/visual_tokens; share
    `number` of `shares`. Returns the failures, [(path, message)]."""
    failures, counts, encoder = [], collections.Counter(), None
    files = list(find_features(args.features).items())[number::shares]
    table = read_mpp_csv(args.mpp_csv) if args.mpp_csv else {}
    if args.tile_encoder:
        model = wsi_llava.load_tile_encoder(args.tile_encoder)
        encoder = {"source": str(args.tile_encoder), "fingerprint": wsi_llava.fingerprint(model)}
        encoder["width"] = model.cfg.width
    print(f"Found {count(len(files), 'file')} of features to import into {args.data}.")
    with disk_errors(args.data):
        if not args.dry_run:
            (args.data / "visual_tokens").mkdir(parents=True, exist_ok=True)
        for name, path in tqdm(files, unit="file"):
            failure = ()
            try:
                counts[import_file(args, name, path, table.get(name, table.get(path.name)), encoder)] += 1
            except UserError as error:
                failures.append((path, str(error)))
                failure = "import", str(error)
            if not args.dry_run:
                note_failure(args.data, name, *failure)
    kinds = ", ".join(f"{count(n, 'slide')} of {kind}" for kind, n in counts.items()) or "nothing"
    print("Could import" if args.dry_run else "Imported", kinds)
    if counts[BARE]:
        print(f"{count(counts[BARE], 'slide')} without coordinates: only --no-slide-encoder takes them.")
    return failures


# --------------------------------------------------------------------------------------------------------------------
# Questions
# --------------------------------------------------------------------------------------------------------------------

# What is read: a kind's name, and its fields, in lower case, for a row's slide, question (None: a report) and
# answer ("conversations" are both). A row is of the first kind whose fields it has.
QUESTION_KINDS = [
    ("this project's rows", "slide", "conversations", "conversations"),
    ("conversations of WSI-Bench or SlideInstruction", "image", "conversations", "conversations"),
    ("WSI-Bench's JSON lines", "image", "question", "t-answer"),
    ("SlideBench's CSV", "slide", "question", "answer"),
    ("WSI-VQA's JSON", "id", "question", "answer"),
    ("a CSV of slide,report", "slide", None, "report"),
    ("reports of HistGen or PathText", "id", None, "report"),
]
WHAT_IS_READ = "read are " + ", ".join(kind[0] for kind in QUESTION_KINDS)
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
LETTERS = "ABCDEFGH"  # of a closed question's options
FILE_ENDING = rf"(\.({'|'.join(SUFFIXES)}|pth?|h5|hdf5|csv|npy|safetensors))+$"


def words(value, what):
    """A text, or a number that stands for one; a None that became "None" would be taught as the truth."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise ValueError(f"its {what} is no text: {json.dumps(value)[:60]}")  # nor is half a surrogate pair
    return value


def slide_id(value):
    """A slide as files name it -> its id: less its folders, Windows' too, and its endings, in any case."""
    name = re.sub(FILE_ENDING, "", re.split(r"[/\\]", value.strip())[-1], flags=re.I)
    if not name:
        raise ValueError(f"its slide is {value!r}, no name")
    return name


def slides_of(row):
    """The ids of the slides that a row is about: mostly one; of a patient's row, several."""
    return row["slide"] if isinstance(row["slide"], list) else [row["slide"]]


def about_slides(row, names):
    """The row as one about these slides, with one <image> each at the head of its first question."""
    names = list(dict.fromkeys(names))
    turns = wsi_llava.slide_first(row["conversations"], image=False)
    turns[0]["value"] = "<image>\n" * len(names) + turns[0]["value"]
    return row | {"slide": names[0] if len(names) == 1 else names, "conversations": turns}


def as_closed(question, answer, options):
    """The question with its options {letter: text}, and the answer as letter and text where it is one."""
    letter = answer.strip(" ().").upper()
    for other, text in options.items():
        question += f"\n{other}) {text}"
        if text.lower().split() == answer.lower().split():
            letter = other
    return question, f"{letter}) {options[letter]}" if letter in options else answer


def read_turns(entry, question, answer):
    """A row's fields -> its turns [{"from", "value"}]. question, answer: as in QUESTION_KINDS."""
    if question == "conversations":
        turns = [{"from": turn["from"], "value": words(turn["value"], "text")} for turn in entry[question]]
        if not turns or [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            raise ValueError("is malformed: conversations must alternate human and gpt")
        return turns
    asked = words(entry[question], "question") if question else "Write a report of this slide."
    options = entry.get("choice") or [entry.get(letter.lower()) for letter in LETTERS]  # a list, or columns
    if not isinstance(options, list) or len(options) > len(LETTERS):
        raise ValueError(f"its choices are no list of at most {len(LETTERS)}")
    options = {letter: words(text, "choice").strip() for letter, text in zip(LETTERS, options) if text}
    asked, told = as_closed(asked, words(entry[answer], answer), options)
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]


def read_row(entry, stem, number):
    """The number-th entry of a file -> a row of the dataset, with "split" where the entry has one.

    Raises ValueError, or what Python raises over other types than expected, where it is of no known kind.
    """
    entry = {field.strip().lower(): value for field, value in entry.items()}
    fit = [kind for kind in QUESTION_KINDS if all(field in entry for field in kind[1:] if field)]
    if not fit:
        raise ValueError(f"its fields ({', '.join(entry)[:100]}) are of no kind that is read")
    kind, slide, question, answer = fit[0]
    names = entry[slide] if isinstance(entry[slide], list) else [entry[slide]]
    names = [words(name, "slide") for name in names]
    cancer = entry.get("cancer") or entry.get("tumor") or "".join(re.split(r"[/\\]", names[0])[-2:-1])
    task = entry.get("task") or entry.get("metadata") or entry.get("narrow category")
    if not task:  # stages 1 and 2 learn from reports, and know them by their task
        report = not question or "caption" in stem.lower()
        task = "Report" if report else re.sub(r"^\d+_|_(test|train|val)$", "", stem)
    own_id = entry.get("question_id", entry.get("id") if slide != "id" else None)
    row = {"id": f"{stem}-{number}" if own_id is None else words(own_id, "id"), "slide": names}
    row |= {"task": words(task, "task"), "cancer": words(cancer, "cancer type")}
    row["conversations"] = read_turns(entry, question, answer)
    if split := entry.get("split"):
        row["split"] = SPLITS.get(str(split).lower())
        if not row["split"]:
            raise ValueError(f"its split is {split!r}, not train, val or test")
    return about_slides(row, names if kind == "this project's rows" else map(slide_id, names))


def parse_json(path, text, line=1):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg})") from None


def read_csv(path, text):
    """A table whose first line names its columns -> [(where, {column: text})]."""
    csv.field_size_limit(1 << 30)  # a report may be longer than the module expects
    reader, entries = csv.DictReader(io.StringIO(text, newline=""), strict=True), []
    try:
        for entry in reader:
            entries.append((f"line {reader.line_num}", entry))
            fits = None not in entry and None not in entry.values()  # the module marks other lines so
            check(fits, f"{path}, line {reader.line_num}: not as many columns as the first line has")
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.reader.line_num}: not CSV ({error})") from None
    return entries


def read_entries(path):
    """A list in JSON, an object {split: list}, JSON lines, or CSV -> its entries [(where, entry)]."""
    text = path.read_bytes().decode("utf-8-sig")
    check(text.strip(), f"{path}: empty; {WHAT_IS_READ}")
    if text.lstrip()[0] not in "[{":
        return read_csv(path, text)
    if text.lstrip()[0] == "[":
        return [(f"item {i}", entry) for i, entry in enumerate(parse_json(path, text), 1)]
    lines = text.split("\n")  # splitlines also splits at U+2028 and U+0085, inside of texts
    try:
        first = json.loads(next(filter(str.strip, lines)))
    except json.JSONDecodeError:
        first = {}  # the beginning of an object of many lines
    if not all(isinstance(part, list) for part in first.values()):
        numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
        return [(f"line {i}", parse_json(path, line, i)) for i, line in numbered]
    entries = []
    for split, part in parse_json(path, text).items():
        check(isinstance(part, list), f"{path}: '{split}' is no list of rows, one a split; {WHAT_IS_READ}")
        entries += [(f"{split}, item {i}", {"split": split} | entry) for i, entry in enumerate(part, 1)]
    return entries


def read_qa(path):
    """One file of questions, of any of QUESTION_KINDS -> rows {"id","slide","task","cancer","conversations"}.

    "slide" is a list where a row is about several; "split" is there where the file says it. Rows whose
    question or answer is empty are left out, and counted. Raises UserError that names the line or the item.
    """
    path, rows, empty = Path(path), [], []
    check(path.is_file(), f"{path}: no such file (--qa)")
    with reading(path, WHAT_IS_READ):
        entries = read_entries(path)
    for number, (where, entry) in enumerate(entries, 1):
        with reading(f"{path}, {where}", WHAT_IS_READ):
            row = read_row(entry, path.stem, number)
        full = all(wsi_llava.without_image(turn["value"]).strip() for turn in row["conversations"])
        (rows if full else empty).append(row if full else where)
    if empty:
        what = f"{count(len(empty), 'row')} with an empty text, the first: {empty[0]}"
        print(f"{path}: left out {what}", file=sys.stderr)
    check(rows, f"{path}: holds no questions; {WHAT_IS_READ}")
    return rows


def write_qa(path, rows):
    wsi_llava.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def match_slides(rows, have):
    """Rows with the slides of `have` in the place of names that these begin with: a slide's barcode finds the
    slide, a patient's all of hers. What is not there keeps its name."""
    names = sorted(have, key=str.lower)
    lower = [name.lower() for name in names]

    @functools.cache
    def find(name):
        matches, i = [], bisect.bisect_left(lower, name.lower())
        while i < len(names) and lower[i].startswith(name.lower()):
            if not lower[i][len(name) : len(name) + 1].isalnum():  # 117 is no beginning of 1170
                matches.append(names[i])
            i += 1
        return [name] if name in have else matches or [name]

    return [about_slides(row, itertools.chain(*map(find, slides_of(row)))) for row in rows]


def named_split(path):
    """The split that a file's name tells, between any separators and in any case, or None."""
    name = Path(path).stem.lower()
    if re.search("open[-_ ]question|report[-_ ]only", name):  # WSI-Bench's own names
        return "test"
    told = {SPLITS[word] for word in re.split("[^a-z]+", name) if word in SPLITS}
    return told.pop() if len(told) == 1 else None


def read_patients(path):
    """--patients, a CSV with columns slide and patient -> {slide: patient}."""
    with reading(path, "--patients takes a CSV whose first line is slide,patient"):
        patients = {}
        for _, entry in read_csv(path, path.read_bytes().decode("utf-8-sig")):
            entry = {column.strip().lower(): text for column, text in entry.items()}
            patients[slide_id(entry["slide"])] = entry["patient"].strip()
        return patients


def report_leaks(splits, patients, args):
    """Says what training shares with the other splits, by slide and by patient, and lists it in qa/leaks.csv.

    splits: {name: rows}. -> the rows of training that share nothing.
    """

    def patient(slide):
        barcode = re.match(r"TCGA-\w\w-\w{4}(?!\w)", slide, re.I)
        return patients.get(slide) or (barcode[0].upper() if barcode else None)

    def marks(row):  # what must not be on both sides
        slides = slides_of(row)
        return {*slides, *(("patient", patient(slide)) for slide in slides if patient(slide))}

    training, others = splits["train"], splits["test"] + splits["val"]
    shared = set().union(*map(marks, training)) & set().union(*map(marks, others))
    leaks = {"train": [row for row in training if marks(row) & shared]}
    leaks["test"] = [row for row in others if marks(row) & shared]
    table, path = io.StringIO("side,slide,patient,questions\n"), args.data / "qa" / "leaks.csv"
    table.seek(0, io.SEEK_END)
    for side, rows in leaks.items():
        questions = collections.Counter(itertools.chain(*map(slides_of, rows)))
        lines = [(side, slide, patient(slide), n) for slide, n in sorted(questions.items())]
        csv.writer(table, lineterminator="\n").writerows(lines)
    if not args.dry_run:
        wsi_llava.write_text(path, table.getvalue())
    people, what = sum(isinstance(mark, tuple) for mark in shared), ""
    if shared:
        what = f", {count(len(leaks['train']), 'question')} of training and {len(leaks['test']):,} of test"
        what += " (left out of training)" if args.drop_leaks else " (--drop-leaks leaves the former out)"
    slides = f"{count(len(shared) - people, 'slide')}, {count(people, 'patient')}"
    print(f"On both sides of training and test: {slides}{what}; see {path}.")
    return [row for row in training if not marks(row) & shared]


def describe_split(path, rows, have, verb):
    """Prints what a split holds, and how much of it is about slides that are there; -> the other slides."""
    tasks, slides = {row["task"] for row in rows}, set(itertools.chain(*map(slides_of, rows)))
    print(
        f"{verb} {count(len(rows), 'question')} of {count(len(tasks), 'task')} about "
        f"{count(len(slides), 'slide')} to {path}; {len(slides & have)} of these slides have features."
    )
    for kind in ("task", "cancer"):
        total = collections.Counter(row[kind] or "none" for row in rows)
        matched = collections.Counter(row[kind] or "none" for row in rows if have.issuperset(slides_of(row)))
        parts = [f"{key} {matched[key]} of {n}" for key, n in sorted(total.items())]
        print(f"  by {kind}: {', '.join(parts)}")
    return sorted(slides - have)


def import_qa(args):
    """--qa: question files -> data/qa/<split>.jsonl, added to what is there or (--overwrite) in its place."""
    patients = read_patients(args.patients) if args.patients else {}
    new, splits, failures = collections.defaultdict(list), {}, []
    for file in args.qa:
        try:
            rows, split = read_qa(file), args.split or named_split(file)
            told = split or all("split" in row for row in rows)
            check(told, f"{file}: its name does not tell the split; give --split train, val or test")
            for row in rows:
                new[row.pop("split", split)].append(row)
        except UserError as error:
            failures.append(str(error))
    # What each split holds then. Old rows too find the slides that are there by now; none stands twice.
    paths = {name: args.data / "qa" / f"{name}.jsonl" for name in ("train", "val", "test")}
    have = {path.stem for path in args.data.glob("features/*.safetensors")}
    have |= {path.stem for path in args.data.glob("visual_tokens/*.safetensors")}
    for name, path in paths.items():
        keep = path.exists() and path.stat().st_size and not (args.overwrite and name in new)
        named, unique = (read_qa(path) if keep else []) + new.get(name, []), {}
        rows = match_slides(named, have)
        for row in rows:
            texts = (turn["value"] for turn in row["conversations"])
            unique.setdefault((*slides_of(row), *texts), row)
        splits[name] = list(unique.values())
        found = sum(a["slide"] != b["slide"] for a, b in zip(named, rows))
        if name in new and found:
            print(f"{count(found, 'question')} of {name} found slides by the beginning of their names.")
        if name in new and len(unique) < len(rows):
            print(f"{count(len(rows) - len(unique), 'doubled question')} of {name} left out.")
    if new and not args.dry_run:
        (args.data / "qa").mkdir(parents=True, exist_ok=True)
    if new and splits["train"] and splits["test"] + splits["val"]:
        clean = report_leaks(splits, patients, args)
        if args.drop_leaks and len(clean) < len(splits["train"]):
            splits["train"] = new["train"] = clean
    for name in new:
        missing = describe_split(paths[name], splits[name], have, "Would write" if args.dry_run else "Wrote")
        unmatched = paths[name].with_suffix(".unmatched.txt")
        if not args.dry_run:
            write_qa(paths[name], splits[name])
            wsi_llava.write_text(unmatched, "".join(f"{slide}\n" for slide in missing))
        if missing:
            few = f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
            print(f"  {count(len(missing), 'slide')} without features, all in {unmatched}: {few}")
    check(len(args.qa) > 1 or not failures, "".join(failures))
    for message in failures:
        print(f"failed: {message}", file=sys.stderr)
    what = f"{count(len(failures), 'question file')} could not be read, see above"
    check(not failures, f"{what}; the others are done")


# --------------------------------------------------------------------------------------------------------------------
# The toy cohort: slides whose reports and questions are true of what is drawn
# --------------------------------------------------------------------------------------------------------------------

SIDE = 2048  # pixels of a toy slide, at 0.5 um/px: 8 x 8 tiles
GROUNDS = {  # each type's colour between the nuclei of the tumour
    "adenocarcinoma": (214, 160, 200),
    "squamous cell carcinoma": (228, 138, 168),
    "small cell carcinoma": (186, 160, 206),
    "mucinous carcinoma": (206, 212, 234),
}
TYPES = list(GROUNDS)
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


def lay_out(rng, case):
    """Where things are, at an eighth of the resolution -> bool masks [256,256]: tissue, necrosis, tumour, stroma."""
    size = SIDE // 8
    y, x = np.mgrid[:size, :size] / size * 2 - 1
    angle = np.arctan2(y, x)
    radius = 0.86 + sum(rng.uniform(-0.05, 0.05) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(2, 6))
    tissue = np.hypot(x, y) < radius
    dx, dy = QUADRANTS[case["position"]]
    cx, cy = dx * rng.uniform(0.36, 0.46), dy * rng.uniform(0.36, 0.46)
    necrosis = tissue & (np.hypot(x - cx, y - cy) < 0.29 + 0.03 * noise(rng, size, 8))
    viable = tissue & ~necrosis
    field = noise(rng, size, 5) + 0.25 * noise(rng, size, 16)
    tumour = viable & (field > np.quantile(field[viable], 1 - rng.uniform(*GRADES[case["grade"]])))
    return tissue, necrosis, tumour, viable & ~tumour


def paint_ground(rng, case, tissue, necrosis, tumour, stroma):
    """What lies between the nuclei -> RGB image SIDE x SIDE."""
    size = len(tissue)
    colour = np.empty((size, size, 3), np.float32)
    colour[:] = (244, 243, 244)  # glass
    for region, rgb in ((stroma, (235, 184, 204)), (tumour, GROUNDS[case["type"]]), (necrosis, (216, 190, 178))):
        colour[region] = rgb
    colour += (tissue * (5 * noise(rng, size, 12) + 5 * noise(rng, size, 64)))[..., None]
    picture = Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))
    return picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def dot(draw, x, y, rx, ry, fill):
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)


def draw_cells(rng, draw, case, necrosis, tumour, stroma):
    """Each region's nuclei, and what they are arranged in."""

    def nucleus(x, y, rx, ry, dark=0):
        shade = rng.uniform(-14, 14) - dark
        dot(draw, x, y, rx, ry, (int(112 + shade), int(72 + shade), int(146 + shade)))

    ring = np.linspace(0, 2 * math.pi, 9)[:-1]
    for x, y in scatter(rng, stroma, 46):  # fibroblasts: few, slender
        along, across = 10 * np.cos(ring), 2.5 * np.sin(ring)
        c, s = np.cos(a := rng.uniform(0, 3.2)), np.sin(a)
        outline = np.stack([x + c * along - s * across, y + s * along + c * across], -1)
        draw.polygon(outline.ravel().tolist(), (118, 76, 150))
    for x, y in scatter(rng, necrosis, 22):  # ghosts and dust, no nuclei
        dot(draw, x, y, *[rng.uniform(1.5, 3)] * 2, (150, 120, 120))
    if case["type"] == "adenocarcinoma":  # glands: a lumen in a ring of nuclei
        for x, y in scatter(rng, tumour, 84):
            r = rng.uniform(17, 27)
            dot(draw, x, y, r, r, (246, 240, 246))
            for a in np.arange(0, 2 * math.pi, 11 / r):
                nucleus(x + (r + 7) * math.cos(a), y + (r + 7) * math.sin(a), 5.5, 5.5)
    elif case["type"] == "squamous cell carcinoma":  # sheets with keratin pearls
        for x, y in scatter(rng, tumour, 34):
            nucleus(x, y, rng.uniform(6, 8), rng.uniform(6, 8))
        for x, y in scatter(rng, tumour, 150):
            for r, shade in ((34, 0), (26, 22), (18, 0), (10, 22)):
                dot(draw, x, y, r, r, (240 - shade, 104 + shade, 128))
    elif case["type"] == "small cell carcinoma":  # crowded, small, dark
        for x, y in scatter(rng, tumour, 17):
            nucleus(x, y, rng.uniform(5, 6.5), rng.uniform(5, 6.5), 34)
    else:  # clusters that float in pools of mucin
        for x, y in scatter(rng, tumour, 92):
            for _ in range(7):
                nucleus(*(np.array((x, y)) + rng.normal(0, 11, 2)), 6, 6)


def plant_pigment(rng, draw, tissue):
    """Brown pigment in the middle of one or two tiles that hold tissue all over -> the corners of these tiles."""
    side = TILE // 8
    inside = np.argwhere(tissue.reshape(SIDE // TILE, side, SIDE // TILE, side).mean((1, 3)) > 0.95)
    planted = []
    for row, column in rng.permutation(inside)[: rng.integers(1, 3)]:
        centre = (np.array((column, row)) + 0.5) * TILE + rng.uniform(-24, 24, 2)
        for x, y in centre + rng.normal(0, 26, (46, 2)).clip(-64, 64):
            dot(draw, x, y, *[rng.uniform(5, 9)] * 2, (int(rng.uniform(96, 122)), int(rng.uniform(58, 74)), 22))
        planted.append([int(column) * TILE, int(row) * TILE])
    return planted


def draw_slide(case):
    """Draws one toy H&E slide -> (RGB image SIDE x SIDE, the corners of the tiles that hold the pigment)."""
    rng = np.random.default_rng(case["seed"])
    tissue, necrosis, tumour, stroma = lay_out(rng, case)
    picture = paint_ground(rng, case, tissue, necrosis, tumour, stroma)
    draw = ImageDraw.Draw(picture)
    draw_cells(rng, draw, case, necrosis, tumour, stroma)
    planted = plant_pigment(rng, draw, tissue) if case["focus"] == "present" else []
    stain = rng.uniform(0.85, 1.15)  # no two laboratories stain alike
    table = [round(255 * (i / 255) ** stain) for i in range(256)]
    return picture.filter(ImageFilter.SMOOTH).point(table * 3), planted


def write_tiff(path, image, mpp=TARGET_MPP, downsamples=(1, 2, 4)):
    """A tiled, pyramidal TIFF with its um/px and JPEG tiles, by default with levels at 1, 1/2 and 1/4: OpenSlide's generic-tiff.

    Pillow cannot write tiles, and this is all that the format asks for: per level one directory of 12-byte entries,
    and every tile a JPEG of its own.
    """
    body, offset_of_next = bytearray(struct.pack("<2sHI", b"II", 42, 0)), 4
    for downsample in downsamples:
        size = tuple(side // downsample for side in image.size)
        picture = image if downsample == 1 else image.resize(size, Image.Resampling.BOX)
        offsets, lengths = [], []
        for y in range(0, size[1], TILE):
            for x in range(0, size[0], TILE):
                tile = io.BytesIO()
                picture.crop((x, y, x + TILE, y + TILE)).save(tile, "JPEG", quality=80)
                offsets.append(len(body))
                lengths.append(len(tile.getvalue()))
                body += tile.getvalue() + b"\0" * (len(tile.getvalue()) % 2)
        values = len(body)
        per_cm = round(1e4 / mpp / downsample)
        body += struct.pack("<3H2x2I", 8, 8, 8, per_cm, 1) + struct.pack(f"<{2 * len(offsets)}I", *offsets, *lengths)
        entries = [  # tag, type (3 short, 4 long, 5 rational), count, value or where it is
            (254, 4, 1, int(downsample > 1)),  # NewSubfileType: a reduced image
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
        findings = TYPES, GRADES, QUADRANTS, ("present", "absent"), SUBTYPES
        columns = [balanced(rng, list(values), n) for values in findings]
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


def draw_cohort(args, recipe, folder):
    """Slides into the folder, their questions into data/qa, and data/cohort.json, which says what each of them shows."""
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
        drawn = tqdm(pool.map(draw_case, cases, paths, chunksize=4), total=len(cases), unit="slide")
        for case, planted in zip(cases, drawn):
            case["planted"] = planted
    rows = {"train": [], "test": []}
    for case in cases:
        rows[case["split"]] += write_questions(case, np.random.default_rng(case["seed"] + 1))
    for split in rows:
        write_qa(args.data / "qa" / f"{split}.jsonl", rows[split])
    wsi_llava.write_text(args.data / "cohort.json", json.dumps({"recipe": recipe, "cases": cases}, indent=1))
    return cases


def prepare_demo(args):
    """Draws the cohort, then takes it through the same steps as real slides. -> the cases, what each slide shows."""
    args.preset, args.max_tiles = "demo", 0  # train.py's --max-tiles is an ablation of the training alone
    recipe = {"train": args.demo_slides, "test": args.demo_slides // 5, "seed": args.seed}
    folder = args.data / "slides"
    if (args.data / "meta.json").exists() and not (args.data / "cohort.json").exists():
        raise UserError(f"{args.data} holds data of your own; give the demo a folder of its own with --data")
    if (args.data / "cohort.json").exists():
        cohort = json.loads((args.data / "cohort.json").read_text())
        if cohort["recipe"] != recipe:
            clash = f"{cohort['recipe']}, not {recipe}"
            raise UserError(f"{args.data} holds another demo cohort ({clash}); name another --data")
        cases = cohort["cases"]
    else:
        cases = draw_cohort(args, recipe, folder)
    failures = prepare_slides(args, {case["slide"]: folder / f"{case['slide']}.tif" for case in cases})
    if failures:
        raise UserError(f"{len(failures)} toy slides failed, the first: {failures[0][1]}")
    contact_sheets(args.data)
    return cases


# --------------------------------------------------------------------------------------------------------------------


def add_demo_flags(parser):
    add = parser.add_argument
    add("--demo-slides", type=at_least(5), default=500, help="toy slides to train on; a fifth more are held out")


def parse(argv=None):
    parser = wsi_llava.Parser(__doc__)
    add = parser.add_argument
    add("--slides", nargs="+", metavar="PATH", help="slides, folders to search for slides, .txt lists of paths")
    add("--features", nargs="+", metavar="PATH", help="features made elsewhere, or folders to search (.pt, .h5)")
    bare = "what tensors without coordinates hold (default: tokens if they have the shape, else tiles)"
    add("--features-are", choices=["tiles", "tokens"], help=bare)
    add("--qa", nargs="+", metavar="FILE", help=f"question files; {WHAT_IS_READ}")
    add("--split", choices=["train", "val", "test"], help="of --qa's files (default: what their names or rows tell)")
    whose = "a CSV of slide,patient: who is on both sides of training and test (default: by TCGA's barcodes)"
    add("--patients", metavar="FILE", type=wsi_llava.some_path, help=whose)
    leaks = "leave out of training what shares a slide or a patient with the test"
    add("--drop-leaks", action="store_true", help=leaks)
    add("--demo", action="store_true", help="draw the toy cohort and prepare it")
    add("--target-mpp", type=float, default=TARGET_MPP, help="um per pixel of the tiles (default: 0.5)")
    add("--mpp", type=float, help="um per pixel at level 0, for slides whose metadata lack or misstate it")
    add("--mpp-csv", metavar="FILE", help="the same slide by slide: lines of slide,mpp; wins over --mpp")
    add("--min-tissue", type=float, default=0.25, help="least share of tissue in a tile (default: 0.25)")
    add("--step", type=at_least(1), default=TILE, help="pixels from tile to tile (default: 256; less: they overlap)")
    add(
        "--max-tiles",
        type=at_least(0),
        default=0,
        help="at most so many of a slide's tiles, drawn at random (default: all)",
    )
    add("--batch", type=at_least(1), default=64, help="tiles a batch through the encoder (default: 64)")
    add("--geojson", action="store_true", help="also write qc/<slide>.geojson, tissue and tiles for QuPath")
    add("--dry-run", action="store_true", help="list the slides, their tiles and the time it would take; write nothing")
    add("--shard", metavar="I/N", default="1/1", help="one of N shares of the slides, for job arrays: 1/16 to 16/16")
    again = "make features again that are there already; begin anew the splits that --qa writes"
    add("--overwrite", action="store_true", help=again)
    wsi_llava.add_shared_flags(parser)
    add_demo_flags(parser)
    return parser.parse_args(argv)


def with_defaults(args):
    """Another script's flags, completed by the defaults of this one's."""
    return argparse.Namespace(**(vars(parse([])) | vars(args)))


def check_flags(args):
    for name, value in (("--mpp", args.mpp), ("--target-mpp", args.target_mpp)):
        if value is not None and not MPP_RANGE[0] <= value <= MPP_RANGE[1]:
            raise UserError(f"{name} {value}: um per pixel lie between 0.05 and 20, mostly at 0.25 or 0.5")
    if not 0 <= args.min_tissue <= 1:
        raise UserError(f"--min-tissue {args.min_tissue}: a share, from 0 to 1")


def share(args):
    """--shard and torchrun's environment -> (which share of the slides is this process's, from 0; of how many)."""
    match = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise UserError(f"--shard {args.shard}: I/N with I from 1 to N, such as 3/16")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return (i - 1) * world + rank, n * world


def main(argv=None):
    args = parse(argv)
    if not (args.slides or args.features or args.qa or args.demo):
        raise UserError("nothing to do: give --slides PATH, --features PATH, --qa FILE... or --demo (--help explains)")
    check_flags(args)
    check(not (args.demo and args.dry_run), "--demo draws its slides first; --dry-run is about slides that are there")
    number, shares = share(args)
    together = args.slides and "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if together:  # by torchrun, which ends all as soon as one of them fails: so they wait for one another below
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        if args.device == "auto" and torch.cuda.is_available():
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    wsi_llava.resolve_device(args)
    if args.demo:
        prepare_demo(args)
    failures = import_features(args, number, shares) if args.features else []
    if args.slides:
        slides = find_slides(args.slides)
        if shares > 1:
            print(f"Share {number + 1} of {shares} of {len(slides)} slides.")
        failures += prepare_slides(args, dict(list(slides.items())[number::shares]))
        if together:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        if not args.dry_run:
            with disk_errors(args.data), alone(args.data, "sheets"):
                contact_sheets(args.data)
    if args.qa and os.environ.get("RANK", "0") == "0":
        with disk_errors(args.data):
            import_qa(args)
    for _, message in failures:
        print(f"failed: {message}", file=sys.stderr)
    if failures:
        where, rest = f"listed above and in {args.data}/failures.jsonl", "the others are done"
        if args.dry_run:
            where, rest = "listed above", "the others can be"
        raise UserError(f"{count(len(failures), 'slide')} could not be prepared ({where}); {rest}")


if __name__ == "__main__":
    wsi_llava.run(main, on_interrupt="interrupted; the same command goes on where this one stopped")
