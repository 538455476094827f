"""Slides -> tile features, question files -> one dataset: everything that train.py and sample.py read.

    python prepare.py --slides PATH...             slides, folders of slides: tissue, tiles, features
    python prepare.py --features PATH...           features that were made elsewhere
    python prepare.py --qa FILE... [--split test]  question files
    python prepare.py --demo                       draws a cohort of toy slides, with reports and questions

A slide is cut into 256-px tiles at 0.5 um/px where there is tissue, and every tile becomes one vector:

    data/features/<slide>.safetensors   features float16 [N,C], coords int32 [N,2] (x, y, pixels as tiled)
    data/qc/<slide>.jpg                 its tissue and tiles: look at it (index.html: all, failures first)
    data/failures/<slide>.json          why a slide could not be prepared

Interrupt it, kill it, start it twice: a slide is done once its files are there, and whoever works on it holds
a lock that dies with the process.
"""

import argparse
import collections
import contextlib
import csv
import functools
import hashlib
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import urllib.parse
import zlib
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

import wsi_llava
from wsi_llava import TILE, UserError, at_least, check, count, feature_metadata, few, reading, replacing

with contextlib.suppress(ImportError):  # Windows has none
    import fcntl

TARGET_MPP = 0.5  # um/px; Prov-GigaPath was trained at it
NATIVE = 0.02  # pixels this close to the target's size, or to a whole fraction of it, are not resampled
MPP_RANGE = (0.05, 20)  # um/px of a slide; TIFFs that say 72 dpi mean nothing by it
LONGEST = 256_000  # tiled pixels along a side: the slide encoder has positions for 1000 tiles
MASK = 32  # tiled pixels per pixel of the tissue mask: 8 x 8 mask pixels a tile
PICTURE = 768  # pixels along the longer side of the picture to look at
BATCH = 64  # tiles that pass the encoder together
DROPPED = 0.01  # a slide fails where more of its tiles, or of its thumbnail, cannot be decoded
SUFFIXES = "svs tif tiff ndpi mrxs scn bif vms vmu svslide dcm png jpg jpeg".split()
MICRONS = {"inch": 25400, "centimeter": 10000, "cm": 10000, "mm": 1000, "micron": 1, "um": 1, "nm": 0.001}
Image.MAX_IMAGE_PIXELS = None  # slides are larger than what Pillow takes for an attack


# ---- A slide at the target resolution ----------------------------------------------------------------------


def number(text):
    """What a file says, as a finite number; 0 where it says none."""
    with contextlib.suppress(TypeError, ValueError, ArithmeticError):  # Pillow's fractions can be 0/0
        return float(text) if math.isfinite(float(text)) else 0
    return 0


class Slide:
    """A slide seen as one image of width x height pixels at the tiled resolution.

    mpp: um per level-0 pixel, from `source`. scale: level-0 pixels per tiled pixel. The argument mpp wins
    over what the file says; fallback: those of a file that says nothing. Raises UserError.
    """

    def __init__(self, path, mpp=None, fallback=None):
        # The folder of an MRXS or DICOM slide lies beside the file, not beside a link to it.
        real = os.path.realpath(path)
        self.path, self.notes = path if Path(real).suffix != Path(path).suffix else real, []
        with reading(path, "not a slide that OpenSlide can read"):
            self.open()
        claimed = number(self.get("openslide.level[0].tile-width"))
        check(claimed <= 2**16, f"{path}: says that its tiles are {claimed:.0f} px wide; a damaged file")
        self.mpp, self.source = (mpp, "--mpp-csv") if mpp else self.own_mpp(path, fallback)
        self.scale = TARGET_MPP / self.mpp
        self.width, self.height = (round(side / self.scale) for side in self.file.dimensions)
        large = f"{path}: {self.width} x {self.height} px at {TARGET_MPP} um/px are over {LONGEST}"
        check(max(self.width, self.height) <= LONGEST, f"{large}; --mpp-csv gives other um/px")
        self.downsamples = self.file.level_downsamples  # asked for once: the library counts anew each time
        self.scales = [self.level_scale(level) for level in range(self.file.level_count)]
        self.level = self.level_at(self.scale)
        self.zoom = self.scale / self.scales[self.level]  # level pixels per tiled pixel
        whole = max(1, round(self.zoom))
        self.average = whole if abs(self.zoom / whole - 1) <= NATIVE else None  # the same, if a whole number
        if self.source in ("objective power", "--mpp", "--mpp-csv"):
            self.notes.append(f"um/px taken from {self.source}")

    def open(self):
        """Opens the file, also anew: OpenSlide refuses everything after an error."""
        self.file = openslide.open_slide(self.path)
        self.get = self.file.properties.get

    @property
    def corner(self):
        """Level-0 (x, y) where the scanned area begins, as MRXS tells it: QuPath counts from there."""
        return [int(self.get(f"openslide.bounds-{axis}", 0)) for axis in "xy"]

    def hash(self):
        """What tells this slide from others, wherever it lies: OpenSlide's hash; of a picture, its bytes'."""
        with open(self.path, "rb") as file:
            quick = self.get("openslide.quickhash-1")
            return quick or hashlib.file_digest(file, "sha256").hexdigest()

    def own_mpp(self, path, fallback):
        """The um/px that the file says, or the fallback -> (um/px, where they are from)."""
        text, unit = self.get("tiff.ImageDescription", ""), self.get("tiff.ResolutionUnit", "")
        per_unit = self.get("tiff.XResolution"), self.get("tiff.YResolution")
        if isinstance(self.file, openslide.ImageSlide):  # a plain picture, which Pillow reads
            with Image.open(self.path) as image:
                text, unit = str(getattr(image, "tag_v2", {}).get(270, "")), "inch"
                per_unit = image.info.get("dpi") or image.info.get("resolution") or (0, 0)
        wide, high = (number(side) or math.inf for side in per_unit)
        ome = dict(re.findall(r'PhysicalSize([XY](?:Unit)?)="([^"]*)"', text)[:4])
        imagej = re.search(r"^ImageJ=.*^unit=(\w+|[^\n]+)", text, re.MULTILINE | re.DOTALL)
        power = number(self.get("openslide.objective-power")) or math.inf

        def um(unit):  # its sign for micro is written in several ways
            return MICRONS.get(re.sub(r"[^\x00-\x7f]+|&#\w+;|\\u00b5", "u", unit.strip().lower()), 0)

        sources = {  # the most trusted first
            "OME-XML": [number(ome.get(side)) * um(ome.get(f"{side}Unit", "um")) for side in "XY"],
            "ImageJ": [um(imagej[1]) / wide, um(imagej[1]) / high] if imagej else [0, 0],
            "metadata": [number(self.get(f"openslide.mpp-{side}")) for side in "xy"],
            "resolution": [um(unit) / wide, um(unit) / high],
            "objective power": [10 / power, 10 / power],  # 40x is about 0.25 um/px
        }
        said = {source: max(sides) for source, sides in sources.items() if max(sides)}
        found = [source for source in said if MPP_RANGE[0] <= said[source] <= MPP_RANGE[1]]
        if re.search(r'<Image .*<Image |Size[ZT]="([2-9]|\d\d)', text, re.DOTALL):
            self.notes.append("of several scenes or focal planes, the first is read")
        if not found:
            none = f"{path}: says no um/px from 0.05 to 20 ({said or 'none at all'})"
            check(fallback, f"{none}; give it with --mpp (0.25 is 40x, 0.5 is 20x) or --mpp-csv")
            return fallback, "--mpp"
        wide, high = (side or said[found[0]] for side in sources[found[0]])
        oblong = f"{path}: its pixels are not square ({wide:g} x {high:g} um); give one number by --mpp-csv"
        check(abs(wide / high - 1) <= NATIVE, oblong)
        if max(said[source] for source in found) > 1.5 * min(said[source] for source in found):
            self.notes.append(f"um/px by {' and '.join(found)} differ by more than 1.5 times; took the first")
        return (wide + high) / 2, found[0]

    def level_scale(self, level):
        """Level-0 pixels per pixel of a level, one number for both sides; None where it cannot be told."""
        # OpenSlide's own is the mean of both sides' ratios: on a long strip it drifts, and where levels are
        # padded to whole tiles (Philips' slides, and what is saved anew from them) it is of other places.
        sides, size = self.file.dimensions, self.file.level_dimensions[level]
        tile = number(self.get(f"openslide.level[{level}].tile-width"))

        def padding(scale):  # pixels of the level, right and below
            return [part - whole / scale for part, whole in zip(size, sides)]

        longer = max(sides) / size[sides.index(max(sides))]
        if max(map(abs, padding(max(1, round(longer))))) <= 1:
            return longer
        if tile and size[0] % tile == size[1] % tile == 0:  # padded; a level of one tile may fit several
            fits = [s for s in (2**n for n in range(16)) if -1 <= min(padding(s)) and max(padding(s)) < tile]
            return fits[0] if len(fits) == 1 else None
        return longer if max(map(abs, padding(longer))) <= 1 else None

    def level_at(self, scale):
        """The coarsest level that is at least as fine; the finest there is where none is."""
        fine = [level for level, own in enumerate(self.scales) if own and own <= scale * (1 + NATIVE)]
        return fine[-1] if fine else 0

    def region(self, level, x, y, width, height):
        """Pixels of a level, from its pixel (x, y) on -> RGBA uint8 [height,width,4]; beyond: white."""
        # Corners are in level-0 pixels, by OpenSlide's own number for the level.
        corner = round(x * self.downsamples[level]), round(y * self.downsamples[level])
        region = self.file.read_region(corner, level, (width, height))
        pixels = np.asarray(region)
        if pixels.view("<u4").min() >= 0xFF000000:  # the alpha of every pixel is 255
            return pixels
        return np.asarray(Image.alpha_composite(Image.new("RGBA", region.size, "white"), region))

    def tile(self, x, y):
        """The tile whose corner is at (x, y), in tiled pixels -> uint8 [256,256,4]. Each is the mean of level
        pixels where these are a whole number, give or take 2%; else the tile is resampled."""
        # It lies where the exact scale puts it, to half a level pixel: no error adds up to the right.
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
        """The whole slide, `pixel` tiled pixels a pixel, read square by square: without small levels that
        takes time, and not memory. What cannot be decoded stays white, up to 1%."""
        size = [max(1, round(side / pixel)) for side in (self.width, self.height)]
        picture, self.lost = Image.new("RGB", size, "white"), 0  # pixels of the picture
        level = self.level_at(self.scale * pixel)
        zoom = self.scale * pixel / self.scales[level]  # level pixels per pixel
        step = max(1, int(TILE / zoom))
        for y, x in itertools.product(range(0, picture.height, step), range(0, picture.width, step)):
            right, bottom = min(picture.width, x + step), min(picture.height, y + step)
            left, top = math.floor(x * zoom), math.floor(y * zoom)
            inside = [x * zoom - left, y * zoom - top, right * zoom - left, bottom * zoom - top]
            try:
                part = Image.fromarray(self.region(level, left, top, *map(math.ceil, inside[2:])))
                part = part.convert("RGB").resize((right - x, bottom - y), Image.Resampling.BOX, inside)
                picture.paste(part, (x, y))
            except openslide.OpenSlideError as error:
                self.open()
                self.lost += (right - x) * (bottom - y)
                much = self.lost > DROPPED * picture.width * picture.height
                check(not much, f"{self.path}: over {DROPPED:.0%} of its area cannot be decoded ({error})")
        return picture


# ---- Finding slides, and what they are called --------------------------------------------------------------


def dicom_series(path):
    """A DICOM file's series, if it is of a slide; "" if it is of none, or None where it is no DICOM file."""
    head = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(2**16)
    # Elements come in order of their tags, with whole sequences between them. So the first kind (0008,0016)
    # is the file's own, and the last series (0020,000E) before what tells of pixels (0028,0002).
    kind = re.search(rb"\x08\0\x16\0UI..([0-9.]*)", head, re.DOTALL)
    before = head.partition(b"\x28\0\x02\0US")[0]
    series = re.findall(rb"\x20\0\x0e\0UI..([0-9.]*)", before, re.DOTALL)
    if kind and series and kind[1].endswith(b".77.1.6"):  # VL Whole Slide Microscopy Image Storage
        return series[-1].decode()
    return "" if head[128:132] == b"DICM" else None


def dicom_slides(files):
    """The slides of a folder's .dcm files -> [(name, path)]. A slide is a series: a file for each of its
    levels, perhaps label and macro too. Annotations and segmentations are series as well, and no slides."""
    series_of = {path: dicom_series(path) for path in reversed(files)}
    slides = {series: path for path, series in series_of.items() if series}
    if not slides:  # what can't be read as DICOM may be a damaged slide: its reader will say so
        slides = {series: path for path, series in series_of.items() if series is None}
    several = len(slides) > 1
    return [(path.resolve().parent.name + f"_{x}" * several, path) for x, path in sorted(slides.items())]


def name_slides(slides):
    """[(name, path)] -> {slide id: path}. Names that meet get their folder's name before them."""
    # Some file systems take upper for lower case, and no name that is not UTF-8.
    slides = [(os.fsencode(name).decode(errors="replace"), path) for name, path in slides]
    times, taken, named = collections.Counter(name.casefold() for name, _ in slides), {}, {}
    for name, path in slides:
        if times[name.casefold()] > 1:
            name = f"{path.resolve().parent.name}_{name}"
            print(f"{path}: named {name}, since there are others of its name")
        name = re.sub(r"[/\\\x00-\x1f]", "_", name)
        other = taken.setdefault(name.casefold(), path)
        check(other is path, f"{other} and {path} have the same name, {name}; rename one")
        check(len(name.encode()) <= 200, f"{path}: its name is too long for files beside it; rename it")
        named[name] = path
    return dict(sorted(named.items()))


def find_slides(inputs):
    """Folders (searched through, also by links) and files -> {slide id: path}, sorted. The id is the file's
    stem; a DICOM slide is a folder of .dcm files, named as the folder."""

    def unreadable(error):
        print(f"{error.filename}: this folder cannot be read ({error.strerror}); left out", file=sys.stderr)

    found, seen, suffixes = {}, set(), {f".{suffix}" for suffix in SUFFIXES}
    for entry in map(Path, inputs):
        check(entry.is_file() or entry.is_dir(), f"{entry}: no such file or folder (--slides)")
        if entry.is_file():
            found[os.path.realpath(entry)] = entry.stem, entry
        for folder, folders, files in os.walk(entry, followlinks=True, onerror=unreadable):
            folders[:] = sorted(name for name in folders if name[0] != ".")
            if os.path.realpath(folder) in seen or "meta.json" in files:  # data, with pictures of slides
                folders.clear()
                continue
            seen.add(os.path.realpath(folder))
            paths = [Path(folder, name) for name in sorted(files) if name[0] != "."]
            paths = [path for path in paths if path.is_file() or not path.exists()]  # no pipes
            slides = {suffix: [p for p in paths if p.suffix.lower() == suffix] for suffix in suffixes}
            if slides[".vms"] or slides[".vmu"]:
                slides[".jpg"] = []  # Hamamatsu's: parts of the slide
            for name, path in dicom_slides(slides.pop(".dcm")):
                found.setdefault(os.path.realpath(path), (name, path))
            for path in itertools.chain(*slides.values()):  # perhaps named by itself, too
                found.setdefault(os.path.realpath(path), (path.stem, path))
    check(found, f"no slides below {', '.join(map(str, inputs))} (looked for .{', .'.join(SUFFIXES)})")
    return name_slides(found.values())


def read_mpp_csv(path, slides):
    """Lines of slide,mpp -> {slide id: um/px at level 0}, of these slides {id: path}. A slide is named by its
    id, its file or its path; the first line may be `slide,mpp`."""
    table, given = {}, {}
    with reading(path, "--mpp-csv takes lines of slide,mpp"):
        lines = Path(path).read_text("utf-8-sig").splitlines()
    for i, row in enumerate(csv.reader(lines), 1):
        slide, mpp = row if len(row) == 2 else ("", "")
        if row and (i > 1 or "".join(row).lower() != "slidempp"):
            fits = slide.strip() and MPP_RANGE[0] <= number(mpp) <= MPP_RANGE[1]
            fits = fits and table.setdefault(slide.strip(), number(mpp)) == number(mpp)
            check(
                fits, f"{path}, line {i}: not slide,mpp with 0.05 to 20 um/px, or that slide with other um/px"
            )
    for name, file in slides.items():
        for key in (os.path.realpath(file), str(file), file.name, file.stem, name):
            given |= {name: table[key]} if key in table else {}  # by its id before all
    print(f"{path}: {count(len(table), 'line')}, about {len(given)} of the slides here")
    return given


# ---- Tissue and tiles --------------------------------------------------------------------------------------
#
# Stain is measured against the slide's own glass, as optical density: what it takes of the light. Tissue is
# where it takes more of one colour than of another; glass, dust and black borders take all alike. Ink has
# colours that tissue rarely has, and is smooth; a smooth colour that is most of what is stained is a stain
# all the same, unless it is smoother than any tissue.

WHITE = np.array((244.0, 244, 244))  # glass, where the slide shows none


def box_mean(x, r):
    """Mean over the (2r+1)^2 pixels around each of [h,w], as float32."""
    for _ in range(2):  # columns, then rows
        padded = np.pad(x.astype(np.float32), ((r, r), (0, 0)), mode="edge")
        x = sum(padded[i : i + len(x)] for i in range(2 * r + 1)).T / (2 * r + 1)
    return x


def roughness(x):
    """Standard deviation over the 5 x 5 pixels around each of float [h,w]."""
    return np.sqrt(np.maximum(0, box_mean(x * x, 2) - box_mean(x, 2) ** 2))


def glass_among(rgb, pink):
    """Bright smooth pixels float32 [n,3] -> (the colour of the glass among them, the least colour that is
    stain), or None. pink: by how much glass may lack green; haematoxylin and eosin take green first."""
    grey = rgb.mean(-1)
    # The histogram's rightmost hill, from the brightest grey that is not rare down over the glass's noise.
    counts = np.convolve(np.bincount(grey.astype(int), minlength=256), np.ones(5), "same")
    bright = np.flatnonzero(counts >= counts.max() / 10).max()
    start = max(0, bright - 12)
    pixels = rgb[abs(grey - start - np.argmax(counts[start : bright + 1])) < 6]
    glass = np.median(pixels, axis=0)
    if glass.min() < 178 or np.ptp(glass) > 48 or glass[1] < min(glass[0], glass[2]) - pink:
        return None
    pixels = pixels[abs(pixels - glass).max(-1) < 8]
    # Stain is what has more colour than the glass's own noise: 4.5 deviations of it (told by its median,
    # which a few stained pixels do not move).
    colour = np.ptp(np.log10(glass / pixels), axis=-1)
    noise = 1.4826 * np.median(abs(colour - np.median(colour)))
    least = np.clip(np.median(colour) + 4.5 * noise, 0.015, 0.06) if len(pixels) >= 100 else 0.03
    return glass, float(least)


def find_glass(rgb):
    """Float32 [h,w,3] -> (the RGB of the slide's own glass, or WHITE where none is seen; the least colour
    that is stain). Glass is bright, smooth, and what most of the brightest smooth pixels look like."""
    grey = rgb.mean(-1)
    rough = roughness(grey)
    smooth = (grey > 170) & (rough < 4)
    # White without any noise was painted, or never scanned: no glass, where there is enough of another. (On a
    # slide whose glass is that white, what else is bright is tissue, and hardly as smooth.)
    fill = box_mean(rgb.min(-1), 2) == 255
    scanned = smooth & ~fill & (rough < 1.5)
    found = None
    if scanned.sum() > max(100, 0.15 * (~fill).sum()):
        found = glass_among(rgb[scanned], pink=3)
    if not found and smooth.mean() >= 0.005:
        found = glass_among(rgb[smooth], pink=14)
    return found or (WHITE, 0.03)


def find_tissue(picture):
    """RGB thumbnail -> (tissue bool [h,w]; ink bool [h,w])."""
    pixels = np.asarray(picture.filter(ImageFilter.MedianFilter(3)))
    glass, least = find_glass(pixels.astype(np.float32))
    tables = [np.log10(side / np.arange(256).clip(1)).astype(np.float32) for side in glass]
    r, g, b = (table[pixels[..., i]] for i, table in enumerate(tables))  # optical densities
    dark, most = (r + g + b) / 3, np.maximum(np.maximum(r, g), b)
    colour = most - np.minimum(np.minimum(r, g), b)
    high, low = pixels.max(-1), pixels.min(-1)
    black = (high < 25) | ((high < 75) & (high - low < high // 2))  # its colour is noise
    stained = (colour > least) & (most > 0.02) & ~black
    # Ink takes little light of its own colour: green and blue most of the red, red ink green and blue.
    ink = (r > 0.12) & (r > g + 0.08) & (r > b + 0.05)
    ink |= (r < 0.13) & (g > 0.3) & (b > 0.72 * g)
    rough = roughness(dark)
    smoother_than_tissue = ink.any() and np.median(rough[ink] / dark[ink]) < 0.025
    ink &= rough < 0.004 + 0.036 * dark  # a scanner's noise grows with density
    core = box_mean(ink, 3) > 0.99  # smooth all around; its edges, which are not, come back
    ink = stained & (box_mean(core, 6) > 0)
    if ink.sum() > 0.4 * stained.sum() and not smoother_than_tissue:
        ink[:] = False
    return stained & ~ink, ink


def given_mask(path, slide, size):
    """A mask picture of the whole slide, or a QuPath GeoJSON, -> bool [h,w] of that size (width, height)."""
    hint = "--mask takes a picture of the whole slide, black outside tissue, or QuPath's GeoJSON"
    with reading(path, hint):
        if path.suffix.lower() in (".geojson", ".json"):
            return drawn_mask(path, slide, size)
        picture = Image.open(path)
        stretched = (picture.width / picture.height) / (slide.width / slide.height)
        wrong = f"{path}: {picture.width} x {picture.height} px are not of the slide's shape"
        check(abs(stretched - 1) < 0.02 + 1 / min(picture.size), wrong)
        if picture.mode in ("LA", "RGBA") and all(a == b for a, b in picture.getextrema()[:-1]):
            picture = picture.getchannel("A")
        # A photograph would exchange glass and tissue: it has colour, or greys of all kinds.
        small = picture.resize(size, Image.Resampling.NEAREST).convert("RGB")
        coloured = (np.ptp(np.asarray(small).astype(int), axis=-1) > 40).mean()
        greys = np.bincount(np.asarray(small.convert("L").filter(ImageFilter.MedianFilter(5))).ravel() // 8)
        plain = coloured <= 0.001 and (greys > 0.001 * greys.sum()).sum() <= 8 and picture.mode[0] not in "IF"
        check(plain, f"{path}: a picture of the slide, not a mask of few greys, 8 bits each; {hint}")
        grey = np.asarray(picture.convert("L"))
        marked = Image.fromarray(grey > (127 if grey.max() > 127 else 0))  # labels 0, 1, 2... are masks too
        return np.asarray(marked.convert("L").resize(size, Image.Resampling.BOX)) > 127


def drawn_mask(path, slide, size):
    """The polygons of a GeoJSON, in level-0 pixels counted from the scanned area's corner -> bool [h,w]. What
    QuPath ignores (classes Ignore*, missing cores) is no tissue, also inside of other polygons."""
    found = json.loads(path.read_text(encoding="utf-8-sig"))
    features = found.get("features", [found]) if isinstance(found, dict) else found
    drawn = {False: np.zeros(size[::-1], bool), True: np.zeros(size[::-1], bool)}  # whether it is ignored
    for feature in features:
        about = feature.get("properties") or {}
        geometry = feature.get("geometry", feature if "coordinates" in feature else None)
        if not geometry or about.get("objectType") in ("tile", "cell", "detection"):
            continue
        kind, polygons = geometry["type"], geometry.get("coordinates")
        known = "Polygon" in kind or re.fullmatch("(Multi)?(Point|LineString)", kind)
        check(known, f"{path}: holds a {kind}")
        name = (about.get("classification") or {}).get("name") or ""
        ignored = name.startswith("Ignore") or bool(about.get("isMissing"))
        for rings in {"Polygon": [polygons], "MultiPolygon": polygons}.get(kind, []):
            part = Image.new("L", size)
            for i, ring in enumerate(rings):  # the outer one, then holes; Pillow counts from pixel centres
                corners = (np.array(ring, float)[:, :2] + slide.corner) / (MASK * slide.scale) - 0.5
                ImageDraw.Draw(part).polygon(corners.ravel().tolist(), 0 if i else 255)
            drawn[ignored] |= np.asarray(part) > 0
    return drawn[False] & ~drawn[True]


def tile_grid(mask, min_tissue, step=TILE):
    """Corners of the tiles with at least that share of tissue: int32 [N,2] (x, y) in tiled pixels, in raster
    order. The last tiles of rows and columns may reach beyond the slide, where all is white."""
    n = TILE // MASK
    total = np.pad(mask, ((1, n), (1, n))).astype(np.int32)  # of the tissue above and left of each corner
    total.cumsum(0, out=total).cumsum(1, out=total)
    y, x = (np.arange(0, max(1, side * MASK - TILE + step), step) for side in mask.shape)
    top, left = np.rint(y / MASK).astype(int)[:, None], np.rint(x / MASK).astype(int)
    tissue = total[top + n, left + n] - total[top + n, left] - total[top, left + n] + total[top, left]
    rows, columns = np.nonzero(tissue >= min_tissue * n * n)
    return np.stack([x[columns], y[rows]], axis=1).astype(np.int32)


def draw_tiles(coords, name, max_tiles, seed):
    """At most so many of the tiles (0: all), at random, in raster order: the same for a slide and a seed."""
    if not max_tiles or len(coords) <= max_tiles:
        return coords
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return coords[np.sort(rng.choice(len(coords), max_tiles, replace=False))]


# ---- Pictures to check, tiles for QuPath -------------------------------------------------------------------


def draw_qc(path, picture, pixel, mask, ink, coords):
    """A picture of the whole slide, `pixel` tiled pixels a pixel, with the outlines of its tissue (green), of
    ink that was left out (red) and the kept tiles (blue): what a person checks before trusting."""
    draw, side = ImageDraw.Draw(picture, "RGBA"), TILE / pixel
    for x, y in coords / pixel:
        edge = (30, 80, 255, 140) if side > 6 else None
        draw.rectangle((x, y, x + side, y + side), (30, 80, 255, 24), edge)
    for part, colour in ((ink, (220, 0, 0)), (mask, (0, 150, 60))):
        solid = Image.fromarray(part).convert("L").resize(picture.size, Image.Resampling.BILINEAR)
        solid = solid.point([0] * 128 + [255] * 128)
        edge = np.asarray(solid) > np.asarray(solid.filter(ImageFilter.BoxBlur(2)))
        picture.paste(colour, mask=Image.fromarray(edge))
    with replacing(path) as temporary:
        picture.save(temporary, "JPEG", quality=90)


PAGE = '<!DOCTYPE html><meta charset="utf-8"><style>img {{ width: 240px }}</style><h1>{}</h1>\n'
CARD = '<p><a href="{href}"><img loading="lazy" src="{href}" alt=""></a> <b>{}</b> {}\n'


def write_index(data):
    """data/qc/index.html: every slide's picture, name and number of tiles, what failed first."""
    failures, texts = read_failures(data), {}
    for path in sorted((data / "features").glob("*.safetensors")):
        with contextlib.suppress(UserError):
            texts[path.stem] = count(feature_metadata(path)["tiles"], "tile")
    failed = {name: f"FAILED: {message}" for name, message in failures.items()}
    page = PAGE.format(f"{count(len(failed | texts), 'slide')}, {len(failed)} failed")
    for name, text in (failed | texts | failed).items():
        page += CARD.format(html.escape(name), html.escape(text), href=urllib.parse.quote(f"{name}.jpg"))
    wsi_llava.write_text(data / "qc" / "index.html", page)


# ---- A folder of features, which several runs may work on --------------------------------------------------


def check_same(path, made, params, hint="--overwrite makes it again"):
    """Raises UserError where a file, or a folder, was made with other parameters."""
    for k in params | made:
        other = f"{path} was made with {k} {made.get(k)}, not {params.get(k)}"
        check(made.get(k) == params.get(k), f"{other}; {hint}")


def claim(claims, name):
    """Whether this process alone may work on a slide from now on, until it closes data/.claims or dies."""
    # A byte is locked, at an offset that follows from the name. The first close drops all locks of a process.
    offset = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
    try:
        fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
    except (
        OSError,
        AttributeError,
    ) as error:  # taken; or there are no locks here, and two runs would both do it
        return not isinstance(error, (BlockingIOError, PermissionError))
    return True


def read_failures(data):
    """data/failures -> {slide: why it failed}."""
    hint = "not what prepare.py writes; delete it"
    files = sorted((data / "failures").glob("*.json"))
    return {file.stem: str(wsi_llava.read_json(file, hint).get("message")) for file in files}


def note_failure(data, name, message=None):
    """Puts a slide on the record of failures, or takes it off."""
    file = data / "failures" / f"{name}.json"
    file.unlink(missing_ok=True)
    if message:
        file.parent.mkdir(parents=True, exist_ok=True)
        wsi_llava.write_text(file, json.dumps({"message": message}))


def write_meta(data, preset, encoder):
    """Makes the folder and its meta.json, or checks it: one folder holds the features of one tile encoder."""
    for folder in ("features", "qc", "qa"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    meta = {"version": wsi_llava.VERSION, "preset": preset, "tile_size": TILE, "mpp": TARGET_MPP}
    if not (data / "meta.json").exists():
        wsi_llava.write_text(data / "meta.json", json.dumps(meta | {"encoder": encoder}, indent=2))
    old = wsi_llava.read_meta(data)  # perhaps another process's, which was faster
    made = {"um/px": old["mpp"], "tile encoder": old["encoder"]["fingerprint"]}
    wanted = {"um/px": TARGET_MPP, "tile encoder": encoder["fingerprint"]}
    check_same(data, made, wanted, "name a new folder with --data")


def open_encoder(args):
    """The tile encoder, by default the one that made what the folder holds -> (it, its fingerprint)."""
    if (args.data / "meta.json").exists():
        old = wsi_llava.read_meta(args.data)
        args.preset, source = args.preset or old["preset"], Path(old["encoder"]["source"])
        args.tile_encoder = args.tile_encoder or (source if source.is_file() else None)
    encoder, source = wsi_llava.pick_tile_encoder(args)
    if not source:
        print("No GigaPath weights found or named: a small untrained encoder serves, to try this out.")
    info = {"source": str(source or "untrained"), "fingerprint": wsi_llava.fingerprint(encoder)}
    if not args.dry_run:
        info["width"] = encoder.cfg.width
        write_meta(args.data, args.preset or ("7b" if source else "demo"), info)
    return encoder.to(args.device, args.dtype), info["fingerprint"]


# ---- From slides to features -------------------------------------------------------------------------------
#
# A damaged file may take the process that opens it with it, so slides are opened in others than this one: the
# surveyor sees what there is to read of a slide while the one before it is encoded, and readers read this
# one's tiles, a batch each, into memory that all share.

# Forked, they share what is loaded, PyTorch too.
FORK = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
DIED = "the process that read it died (a damaged file, or no memory left)"
open_slide = functools.lru_cache(maxsize=1)(Slide)  # in each of them: the slide at hand


def begin_reader(memory):
    global shared
    shared = np.frombuffer(memory, np.uint8).reshape(-1, TILE, TILE, 4)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word,
    parent = multiprocessing.parent_process()  # and so does the end of its parent, even by kill -9
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


def start_readers(n, memory=b""):
    return ProcessPoolExecutor(n, FORK, begin_reader, (memory,))


def apart(path, function, *arguments):
    """Calls a function that opens the slide at `path` in a process of its own; UserError where that dies."""
    with start_readers(1) as readers:
        try:
            return readers.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError(f"{path}: {DIED}") from None


def slide_job(args, name, path, given, mask, encoder):
    """One slide of a run -> dict: its files, and the parameters that its features depend on. given: its um/px
    by --mpp-csv, or None. mask: its file of --mask, or None. encoder: a fingerprint."""
    digest = mask and hashlib.sha256(mask.read_bytes()).hexdigest()[:12]
    params = {"tile": TILE, "target_mpp": TARGET_MPP, "min_tissue": args.min_tissue, "mask": digest}
    params |= {"step": args.step, "max_tiles": args.max_tiles, "seed": args.seed if args.max_tiles else None}
    size = os.path.getsize(path) if os.path.exists(path) else 0
    job = {"name": name, "slide": (str(path), given, args.mpp), "file": [os.path.abspath(path), size]}
    job |= {"params": params | {"encoder": encoder}, "mask": mask}
    job["pictures"] = [args.data / "qc" / f"{name}.{ending}" for ending in ("jpg", "geojson")]
    return job | {"features": wsi_llava.features_file(args.data, name)}


def is_done(args, job, digest=None):
    """Whether a slide's files are there: known by its path and size, or, once it is open, by its hash. Raises
    UserError where they are another slide's, or were made with other parameters."""
    path, (_, given, fallback) = job["features"], job["slide"]
    if args.overwrite or not path.exists():
        return False
    made = feature_metadata(path)
    mpp = given or (fallback if made.get("mpp_source") == "--mpp" else None) or made.get("mpp")
    check_same(path, made["params"] | {"mpp": made.get("mpp")}, job["params"] | {"mpp": mpp})
    if digest:
        check(made["file"][2] == digest, f"{path}: of another slide of this name; --overwrite replaces it")
        return True
    pictures = job["pictures"][: 2 if args.geojson else 1]
    return made["file"][:2] == job["file"] and all(picture.exists() for picture in pictures)


def survey(args, job):
    """In a process of its own: what there is to read of a slide -> dict; its pictures are drawn. Raises
    UserError, whatever is wrong with the slide, and OSError where a picture cannot be written."""
    with reading(job["slide"][0], "the slide is damaged, or of a kind that is not read"):
        slide = open_slide(*job["slide"])
        file = [*job["file"], slide.hash()]
        done = is_done(args, job, file[-1])
        # One picture is read, for the mask and to look at: without small levels it takes minutes.
        picture = slide.thumbnail(MASK / max(1, round(MASK * PICTURE / max(slide.width, slide.height))))
        size = [max(1, round(side / MASK)) for side in (slide.width, slide.height)]
        thumbnail = picture.resize(size, Image.Resampling.BOX)
        mask, ink = find_tissue(thumbnail)
        if job["mask"]:
            mask, ink = given_mask(job["mask"], slide, thumbnail.size), np.zeros_like(ink)
        coords = tile_grid(mask, args.min_tissue, args.step)
        small = 0 if len(coords) else len(tile_grid(mask, 0.01, args.step))
        coords = draw_tiles(coords, job["name"], args.max_tiles, args.seed)
    told = dict.fromkeys(slide.notes, True) | {
        f"some places (under {DROPPED:.0%}) not searched for tissue: they cannot be decoded": slide.lost,
        "ink left out, outlined in red in data/qc (--mask decides otherwise)": ink.mean() > 0.001,
        "not in --mask, so tissue was looked for by its colour": args.mask and not job["mask"],
        f"no tile reaches --min-tissue {args.min_tissue:g}; 0.01 would give {small}": small,
        "no tissue found (what has no colour needs --mask)": not len(coords) and not small,
    }
    plan = {"coords": coords, "done": done, "notes": [note for note in told if told[note] and not done]}
    width, height = slide.file.dimensions
    plan["facts"] = {"mpp": slide.mpp, "mpp_source": slide.source, "scale": slide.scale, "file": file}
    plan["facts"] |= {"params": job["params"], "width": width, "height": height}
    size = f"{width} x {height} px, {slide.mpp:.6} um/px ({slide.source}), level {slide.level}"
    plan["line"] = f"{job['name']}: {size}, {count(len(coords), 'tile')}"
    if not args.dry_run:
        picture.thumbnail((PICTURE, PICTURE))
        draw_qc(job["pictures"][0], picture, slide.width / picture.width, mask, ink, coords)
    if args.geojson and not args.dry_run:
        about = {"classification": {"name": "Tile"}, "isLocked": True}
        tiles = [wsi_llava.geojson_tile(*xy, slide.scale, slide.corner, **about) for xy in coords.tolist()]
        wsi_llava.write_text(job["pictures"][1], json.dumps({"type": "FeatureCollection", "features": tiles}))
    return plan


def read_tiles(slide, coords, place):
    """In a reader: tiles into the memory, from `place` on -> (place, which could be read, the last error)."""
    read, failed = [], None
    for n, (x, y) in enumerate(coords.tolist()):
        try:
            shared[place + len(read)] = open_slide(*slide).tile(x, y)
            read.append(n)
        except Exception as error:  # OpenSlide refuses everything after one: the next tile opens it anew
            failed = wsi_llava.one_line(error)
            open_slide.cache_clear()
    return place, read, failed


@torch.inference_mode()
def encode(encoder, tiles, device):
    """uint8 [n,256,256,4] -> features float16 [n,C], on the device."""
    if device.type == "cuda":
        tiles = tiles.pin_memory()  # so that the copy runs beside the encoder
    tiles = tiles.to(device, non_blocking=True)[..., :3]
    return encoder(wsi_llava.preprocess_tiles(tiles).to(encoder.cls_token.dtype)).half()


def prepare_slide(args, encoder, readers, memory, job, plan, bar):
    """Encodes the tiles of a slide that was surveyed and writes its features, in raster order -> how many."""
    coords, read, problem = plan["coords"], [], None
    # All batches are full but the last: a feature's bits depend on the slide alone. Neighbours, 4 x 4, are
    # read one after the other: OpenSlide keeps the last 32 MB of the JPEG tiles that they share.
    order = np.lexsort((*coords.T, *(coords.T // (4 * TILE))))
    batches = np.split(order, range(BATCH, len(order), BATCH))
    tiles = torch.frombuffer(memory, dtype=torch.uint8).view(-1, TILE, TILE, 4)
    places, coming, ahead = itertools.cycle(range(0, len(tiles), BATCH)), iter(batches), collections.deque()
    features = [torch.empty(0, encoder.cfg.width, dtype=torch.float16, device=args.device)]
    for numbers in batches:
        for later in itertools.islice(coming, 1 + args.workers - len(ahead)):  # read while this is encoded
            ahead.append(readers.submit(read_tiles, job["slide"], coords[later], next(places)))
        place, kept, error = ahead.popleft().result()
        if kept:
            features.append(encode(encoder, tiles[place : place + len(kept)], args.device))
        read, problem = read + numbers[kept].tolist(), error or problem
        bar.set_postfix_str(f"{job['name'][:24]}, {len(read)} of {len(coords)} tiles")
    lost = len(coords) - len(read)
    many = f"over {DROPPED:.0%} of its {len(coords)} tiles cannot be decoded ({problem})"
    check(lost <= DROPPED * len(coords), f"{job['slide'][0]}: {many}")
    if lost:
        plan["notes"].append(f"some tiles (under {DROPPED:.0%}) left out that cannot be decoded")
    features = torch.cat(features).cpu()[np.argsort(read)]
    check(features.isfinite().all(), f"{job['slide'][0]}: features that are not finite; try --dtype float32")
    save_features(job["features"], features, coords[sorted(read)], plan["facts"] | {"dropped": lost})
    return len(read)


def save_features(path, features, coords, facts):
    tensors = {"features": features, "coords": torch.from_numpy(coords)}
    wsi_llava.write_tensors(path, tensors, {"wsi_llava": json.dumps(facts)})


def prepare_slides(args, slides, number=0, shares=1):
    """All slides of {id: path}, or every `shares`-th from `number` on -> failures [(path, message)]."""
    started, table = time.time(), read_mpp_csv(args.mpp_csv, slides) if args.mpp_csv else {}
    masks = {file.stem: file for file in sorted(args.mask.iterdir())} if args.mask else {}
    encoder, made_by = open_encoder(args)
    slides = list(slides.items())[number::shares]
    jobs = [slide_job(args, name, path, table.get(name), masks.get(name), made_by) for name, path in slides]
    todo = [job for job in jobs if not is_done(args, job)]
    done = f"{count(len(jobs), 'slide')}, {len(jobs) - len(todo)} done already"
    print(f"Found {done}; {len(todo)} to tile at {TARGET_MPP} um/px and encode on {args.device}.")
    # One batch is at the encoder; each reader is at one, and one lies ready.
    memory = FORK.RawArray("B", (2 + args.workers) * BATCH * TILE * TILE * 4)
    surveyor, readers, plans = start_readers(1), start_readers(args.workers, memory), {}
    failures, notes, written = [], collections.defaultdict(list), []
    claims = None if args.dry_run else open(args.data / ".claims", "ab")  # noqa: SIM115 (open to the end)
    bar = tqdm(todo, unit="slide", disable=not todo)
    for n, job in enumerate(bar):
        path, failure = job["slide"][0], None
        try:
            for i in (n, n + 1):  # this slide's survey, and, once it is there, the next one's
                if i < len(todo) and i not in plans and (args.dry_run or claim(claims, todo[i]["name"])):
                    plans[i] = surveyor.submit(survey, args, todo[i])
                plan = plans[n].result() if n in plans else {"notes": ["left to another run"], "done": True}
            if args.dry_run:
                tqdm.write(plan["line"])
                written.append(len(plan["coords"]))
            elif not plan["done"]:
                written.append(prepare_slide(args, encoder, readers, memory, job, plan, bar))
            for note in plan["notes"]:
                notes[note].append(job["name"])
        except UserError as error:
            failure = str(error)
        except BrokenProcessPool:
            failure = f"{path}: {DIED}"
            surveyor.shutdown()
            readers.shutdown()  # those that live write to the memory no more
            surveyor, readers, plans = start_readers(1), start_readers(args.workers, memory), {n: None}
        failures += [(path, failure)] if failure else []
        if n in plans and not args.dry_run:
            note_failure(args.data, job["name"], failure)
    seconds, tiles = time.time() - started, count(sum(written), "tile")
    wrote = f"{tiles} of {count(len(written), 'slide')}"
    rate = f"{seconds:.0f} s ({sum(written) / seconds:.0f} tiles/s)"
    print(f"Found {wrote}." if args.dry_run else f"Wrote {wrote} to {args.data}/features in {rate}.")
    for note, names in notes.items():
        print(f"{count(len(names), 'slide')}, {note}: {few(names, 5)}")
    return failures


# ---- Features that were made elsewhere ---------------------------------------------------------------------

TOKENS = "visual tokens"  # the kind of a file that holds what a slide encoder made: [V,C], or one vector [C]
MAKERS = {"tile_embeds": "GigaPath", "feats": "STAMP", "features": "TRIDENT or CLAM"}


def read_hdf5(path):
    """-> its datasets {name: tensor}, with the attributes of these and of the file."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: reading it needs h5py: pip install h5py") from None
    with h5py.File(path) as file:
        found = dict(file.attrs)
        for name in file.keys() & {"features", "feats", "coords"}:
            inside = file[name].file == file and not (file[name].external or file[name].is_virtual)
            check(inside, f"{path}: its {name} lie in another file; copy them into this one")
            # Float64 holds every coordinate; torch knows no big-endian numbers and few unsigned ones.
            found |= {**file[name].attrs, name: torch.from_numpy(np.asarray(file[name], np.float64))}
    return found


def read_foreign(path):
    """One file of features -> (their kind, features float16 [N,C], coords float64 [N,2], all that it holds).
    A .pt may hold one tensor. Without coords they are visual tokens [576,C], or a slide's one vector [C]."""
    with reading(path, "features are a .pt or .h5 of features [N,C] and coords [N,2], or visual tokens"):
        found = read_hdf5(path) if path.suffix == ".h5" else wsi_llava.read_tensors(path)
        found = {"features": found} if isinstance(found, torch.Tensor) else found
        name = next((name for name in MAKERS if name in found), None)
        check(name, f"{path}: holds {list(found)[:5]}, neither features, feats nor tile_embeds")
        features, coords = found[name].half(), found.get("coords")
        coords = torch.zeros(0, 2) if coords is None else coords.double().reshape(-1, 2)
        vector = features.numel() and (features.dim() == 1 or found.get("feat_type") in ("slide", "patient"))
        features = features[None] if features.dim() == 1 else features.flatten(0, -2)  # also [1,N,C]
        tokens = vector or "coords" not in found  # a vector comes with the coords of its tiles
        sizes = f"{path}: features {list(found[name].shape)}"
        bare = f"{sizes} of tiles without coordinates; import the .h5 with both (visual tokens are [576,C])"
        check(not tokens or len(features) in (1, 576), bare)
        features = features if tokens or len(coords) else features[:0]  # a slide without tissue
        check(tokens or len(features) == len(coords), f"{sizes}, and {len(coords)} coords")
        finite = features.isfinite().all() and coords.isfinite().all()
        check(finite, f"{path}: some values are not finite in half precision")
    return TOKENS if tokens else MAKERS[name], features, coords, found


def tiled_coords(path, coords, about, mpp, step):
    """A file's coordinates -> (their raster order [N], int32 [N,2] in that order, in tiled pixels). mpp: the
    slide's, if given. Raises UserError where the scale is not known, or tiles do not lie `step` apart."""
    with reading(path, "its attributes are not those of TRIDENT or STAMP"):
        scale, apart = TARGET_MPP / (mpp or math.inf), 0  # of level 0; from tile to tile, if the file says it
        if about.get("target_magnification"):  # TRIDENT's 20x is 0.5 um/px
            zoom = float(about["patch_size_level0"]) / float(about["patch_size"])
            scale = zoom * TARGET_MPP * float(about["target_magnification"]) / 10
            apart = float(about["patch_size_level0"]) - zoom * float(about.get("overlap", 0))
        elif "tile_size_um" in about:  # STAMP's coordinates are in um
            scale, apart = TARGET_MPP, float(about["tile_size_um"])
        check(scale, f"{path}: does not say the um/px of its coordinates (level 0); give --mpp or --mpp-csv")
        order = torch.from_numpy(np.lexsort(coords.numpy().T))  # y, then x
        coords = coords[order] / scale
        steps = coords.diff(dim=0)
        steps = steps[steps[:, 1] == 0, 0].round()  # between neighbours of a row: what lies most often
        apart = apart / scale or (steps.mode().values.item() if len(steps) else step)
        wrong = f"{path}: its tiles lie {apart:.0f} px apart at {TARGET_MPP} um/px, not {step}"
        check(abs(apart / step - 1) <= NATIVE, f"{wrong}: the wrong --mpp, or give --step {apart:.0f}")
        # GigaPath pads a slide on all sides to whole tiles: the first may lie up to a tile outside; all move.
        outside = -coords.amin(0).clamp(max=0) if len(coords) else torch.zeros(2)
        check(outside.max() <= step, f"{path}: negative coordinates, more than a tile outside of the slide")
        coords = (coords + outside).round()
        wsi_llava.grid_cells(coords)
    return order, coords.int()


def import_file(args, name, path, mpp):
    """One slide's features from elsewhere -> their kind. mpp: its um/px, if given."""
    kind, features, coords, about = read_foreign(path)
    old = wsi_llava.read_meta(args.data)["encoder"] if (args.data / "meta.json").exists() else {}
    n, width = features.shape[0], features.shape[1] or old.get("width")
    check(width, f"{path}: has no tiles, nor a width; import it again after another slide")
    info = {"source": f"imported: {kind}", "fingerprint": f"imported:{kind}:{width}", "width": width}
    if kind == TOKENS:  # a model takes as many of every slide
        info["n_visual_tokens"] = there = old.get("n_visual_tokens", n)
        check(there == n, f"{path}: {n} visual tokens, but {args.data} holds {there} of every slide")
        write_meta(args.data, args.preset or "7b", info)
        file = args.data / "visual_tokens" / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        wsi_llava.write_tensors(file, {"visual_tokens": features}, {"made_by": info["source"]})
        return kind
    order, coords = tiled_coords(path, coords, about, mpp, args.step)
    write_meta(args.data, args.preset or "7b", info)
    params = {"imported": kind, "target_mpp": TARGET_MPP, "mpp": mpp, "encoder": info["fingerprint"]}
    params["file"] = [str(path.resolve()), path.stat().st_size]
    file = wsi_llava.features_file(args.data, name)
    if file.exists() and not args.overwrite:
        check_same(file, feature_metadata(file)["params"], params)
    else:
        save_features(file, features.reshape(n, width)[order], coords.numpy(), {"params": params})
    return kind


def import_features(args, number, shares):
    """--features: files, or folders that hold them (CLAM's h5_files, TRIDENT's features_...) ->
    data/features or data/visual_tokens, and the failures [(path, message)]."""
    files, failures, kinds = {}, [], collections.Counter()
    for entry in args.features:
        check(entry.exists(), f"{entry}: no such file or folder (--features)")
        found = [entry] if entry.is_file() else [*entry.glob("[!.]*.pt"), *entry.glob("[!.]*.h5")]
        check(found, f"{entry}: no .pt or .h5 file there; name the folder that holds them")
        for path in found:
            other = files.setdefault(path.stem, path)
            check(other == path, f"{other} and {path} have the same name; rename one, or name one folder")
    table = read_mpp_csv(args.mpp_csv, files) if args.mpp_csv else {}
    for name, path in tqdm(sorted(files.items())[number::shares], unit="file"):
        try:
            kinds[import_file(args, name, path, table.get(name, args.mpp))] += 1
            note_failure(args.data, name)
        except UserError as error:
            failures.append((path, str(error)))
            note_failure(args.data, name, str(error))
    what = ", ".join(f"{count(n, 'slide')} of {kind}" for kind, n in kinds.items()) or "nothing"
    print(f"Imported {what} of {count(len(files), 'file')}.")
    return failures


# ---- Questions ---------------------------------------------------------------------------------------------

# What is read: a kind's name; its fields, in lower case, for the slide, the question (None: a report) and the
# answer ("conversations" are both). A row is of the first kind whose fields it has.
QUESTION_KINDS = [
    ("this project's rows", "slide", "conversations", "conversations"),
    ("WSI-Bench's and SlideInstruction's JSON", "image", "conversations", "conversations"),
    ("WSI-Bench's JSON lines", "image", "question", "t-answer"),
    ("SlideBench's CSV", "slide", "question", "answer"),
    ("WSI-VQA's JSON", "id", "question", "answer"),
    ("a CSV of reports", "slide", None, "report"),
    ("reports of HistGen or PathText", "id", None, "report"),
]
WHAT_IS_READ = [f"{kind} ({', '.join(sorted({*fields} - {None}))})" for kind, *fields in QUESTION_KINDS]
WHAT_IS_READ = "read are " + ", ".join(WHAT_IS_READ)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
FILE_ENDING = rf"(\.({'|'.join(SUFFIXES)}|pth?|h5|hdf5|csv|npy|safetensors))+$"


def words(value, what):
    """A text, or a number that stands for one; pandas writes nan for an empty one. None is none: "None" would
    be taught as the truth."""
    if type(value) not in (str, int, float):
        raise ValueError(f"its {what} is no text: {json.dumps(value)[:60]}")
    str(value).encode()  # half a surrogate pair is no text either
    return "" if str(value).strip().lower() in ("nan", "inf") else str(value)


def slide_id(value):
    """A slide as files name it -> its id: less its folders, Windows' too, and its endings, in any case."""
    return re.sub(FILE_ENDING, "", re.split(r"[/\\]", value.strip())[-1], flags=re.I)


def read_options(entry):
    """The options of a closed question: a list, an object by letter, columns A, B, C... -> {letter: text}."""
    options = entry.get("options") or entry.get("choices") or entry.get("choice") or {}
    if "a" in entry and not options:
        options = {letter: entry[letter.lower()] for letter in LETTERS if letter.lower() in entry}
    if isinstance(options, list):
        options = dict(itertools.zip_longest(LETTERS[: len(options)], options))
    if not isinstance(options, dict) or not set(options) <= set(LETTERS):
        raise ValueError("its options are neither a list of 26 at most nor named by letters")
    options = {letter: words(x, "option").strip() for letter, x in options.items() if x is not None}
    if all(re.match(rf"\(?{letter}[).:] ", text) for letter, text in options.items()):  # said already
        options = {letter: text.partition(" ")[2].strip() for letter, text in options.items()}
    return {letter: text for letter, text in options.items() if text}


def read_turns(entry, question, answer):
    """A row's fields -> its turns [{"from", "value"}]; options stand in the question, a line each, and the
    answer begins with a letter then. question, answer: as in QUESTION_KINDS."""
    if question == "conversations":
        turns = [{"from": turn["from"], "value": words(turn["value"], "text")} for turn in entry[question]]
        if not turns or [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            raise ValueError("is malformed: conversations must alternate human and gpt")
        return turns
    asked = words(entry[question], "question") if question else "Write a report of this slide."
    said, options = words(entry[answer], answer), read_options(entry)
    chosen = said.strip(" ().:").upper()
    for letter, text in options.items():
        asked += f"\n{letter}) {text}"
        if text.lower().split() == re.sub(rf"^\(?{letter}[).:] ", "", said.strip()).lower().split():
            chosen = letter
    said = f"{chosen}) {options[chosen]}" if chosen in options else said
    letter = re.fullmatch(r"\(?([A-Z])[).]*", said.strip())
    if letter and question and not re.search(rf"\b{letter[1]} *[).:]", asked):
        raise ValueError(f"its answer is {said!r}, and it has no such option")
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]


def read_row(entry, stem, number):
    """The number-th entry of a file -> a row of the dataset, with "split" where the entry has one."""
    entry = {field.strip().lower(): value for field, value in entry.items()}
    fit = [kind for kind in QUESTION_KINDS if all(field in entry for field in kind[1:] if field)]
    if not fit:
        raise ValueError(f"its fields ({', '.join(entry)[:100]}) are of no kind that is read")
    kind, slide, question, answer = fit[0]
    names = entry[slide] if isinstance(entry[slide], list) else [entry[slide]]
    names = [words(name, "slide") for name in names]
    own_id = entry.get("question_id", entry.get("id") if slide != "id" else None)
    row = {"id": f"{stem}-{number}" if own_id is None else words(own_id, "id")}
    row["slide"] = names if kind == QUESTION_KINDS[0][0] else [slide_id(name) for name in names]
    # Stages 1 and 2 learn from reports, and know them by their task.
    report = not question or "caption" in stem.lower()
    row["task"] = "Report" if report else re.sub(r"^\d+_|_(test|train|val)$", "", stem)
    row["cancer"] = "".join(re.split(r"[/\\]", names[0])[-2:-1])
    for field in ("narrow category", "metadata", "task", "tumor", "cancer"):
        if type(entry.get(field)) in (str, int) and entry[field] != "":  # objects and lists are passed over
            row["cancer" if field in ("tumor", "cancer") else "task"] = words(entry[field], field)
    row["conversations"] = wsi_llava.slide_first(read_turns(entry, question, answer))
    if entry.get("split"):
        row["split"] = SPLITS.get(str(entry["split"]).lower())
        if not row["split"]:
            raise ValueError(f"its split is {entry['split']!r}, not train, val or test")
    return row


def read_csv(path, text):
    """A table whose first line names its columns -> [(where, {column: text})]."""
    csv.field_size_limit(1 << 30)  # a report may be longer than the module expects
    named = re.match("sep=(.)\r?\n", text)  # as spreadsheets tell it
    text = text[named.end() :] if named else text
    delimiter = named[1] if named else max(",;\t", key=text.partition("\n")[0].count)
    reader, entries = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter), []
    with reading(path, "not CSV"):
        for entry in reader:
            entries.append((f"line {reader.line_num}", entry))
            fits = None not in entry and None not in entry.values()  # the module marks other lines so
            check(fits, f"{path}, line {reader.line_num}: not as many columns as the first line has")
    return entries


def read_entries(path):
    """A list in JSON, an object {split: list}, JSON lines, or CSV -> its entries [(where, entry)]."""
    text = path.read_bytes().decode("utf-8-sig").strip()
    check(text, f"{path}: empty; {WHAT_IS_READ}")
    if text[:1] not in ("[", "{"):
        return read_csv(path, text)
    if text[0] == "[":
        with reading(path, "not JSON"):
            return [(f"item {i}", entry) for i, entry in enumerate(json.loads(text), 1)]
    with contextlib.suppress(json.JSONDecodeError):  # one object, of one line or many
        splits = json.loads(text)
        if all(name.lower() in SPLITS and isinstance(splits[name], list) for name in splits):
            parts = [[{"split": name} | entry for entry in splits[name]] for name in splits]
            return [(f"item {i}", entry) for i, entry in enumerate(itertools.chain(*parts), 1)]
    entries = []
    for i, line in enumerate(text.split("\n"), 1):  # splitlines also splits at U+2028, inside of texts
        with reading(f"{path}, line {i}", "not JSON"):
            entries += [(f"line {i}", json.loads(line))] if line.strip() else []
    return entries


def read_qa(path):
    """One file of questions, of any of QUESTION_KINDS -> rows {"id","slide","task","cancer","conversations"},
    with "split" where the file says it. Raises UserError that names the line or the item."""
    path, rows, left_out = Path(path), [], []
    check(path.is_file(), f"{path}: no such file; python prepare.py --qa FILE... reads questions")
    with reading(path, WHAT_IS_READ):
        entries = read_entries(path)
    for number, (where, entry) in enumerate(entries, 1):
        with reading(f"{path}, {where}", WHAT_IS_READ):
            row = read_row(entry, path.stem, number)
        said = [wsi_llava.without_image(turn["value"]).strip() for turn in row["conversations"]]
        if len(set(row["slide"])) == 1 and all(said):
            rows.append(row | {"slide": row["slide"][0]})
        else:
            left_out.append(where)
    if left_out:
        what = f"{count(len(left_out), 'row')} about several slides or with an empty text"
        print(f"{path}: left out {what}: {few(left_out)}", file=sys.stderr)
    check(rows, f"{path}: holds no questions; {WHAT_IS_READ}")
    return rows


def write_qa(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    wsi_llava.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def match_slides(rows, have):
    """Rows with the slide of `have` in the place of a name that it begins with: a slide's barcode, or a
    patient's, which finds the first of hers. What is not there keeps its name."""
    found = {}
    for name in dict.fromkeys(row["slide"] for row in rows):
        whole = re.compile(rf"{re.escape(name)}(?![^\W_])", re.I)  # 117 is no beginning of 1170
        matches = [name] if name in have else sorted(filter(whole.match, have), key=str.lower)
        found[name] = matches[0] if matches else name
        if len(matches) > 1:
            print(f"{name} is the beginning of {len(matches)} slides' names: took {matches[0]}")
    return [row | {"slide": found[row["slide"]]} for row in rows]


def patient_of(slide):
    """The patient's barcode at the head of a slide's name in TCGA; of any other, the name."""
    barcode = re.match(r"TCGA-\w\w-\w{4}(?!\w)", slide, re.I)
    return barcode[0].upper() if barcode else slide


def import_qa(args):
    """--qa: question files -> data/qa/<split>.jsonl, added to what is there or (--overwrite) in its place."""
    rows_of = {"train": [], "val": [], "test": []}
    for file in args.qa:
        rows, name = read_qa(file), re.split("[^a-z]+", file.stem.lower())
        named = {args.split} if args.split else {SPLITS[word] for word in name if word in SPLITS}
        told = len(named) == 1 or all("split" in row for row in rows)
        check(told, f"{file}: its name does not tell the split; give --split train, val or test")
        for row in rows:
            rows_of[row.pop("split", min(named, default=None))].append(row)
    changed = {split for split in rows_of if rows_of[split]}
    paths = {split: args.data / "qa" / f"{split}.jsonl" for split in rows_of}
    have = [*args.data.glob("features/*.safetensors"), *args.data.glob("visual_tokens/*.safetensors")]
    have = {path.stem for path in have}
    for split, path in paths.items():
        keep = path.exists() and path.stat().st_size and not (args.overwrite and split in changed)
        unique = {}
        for row in match_slides([*(read_qa(path) if keep else []), *rows_of[split]], have):
            unique.setdefault((row["slide"], *(turn["value"] for turn in row["conversations"])), row)
        rows_of[split] = list(unique.values())
    others = {patient_of(row["slide"]) for row in rows_of["test"] + rows_of["val"]}
    clean = [row for row in rows_of["train"] if patient_of(row["slide"]) not in others]
    leaks = len(rows_of["train"]) - len(clean)
    if others and rows_of["train"]:
        what = f"{count(leaks, 'question')} of training about patients of the test"
        print(f"Left out {what}." if args.drop_leaks else f"Found {what} (--drop-leaks leaves them out).")
    if leaks and args.drop_leaks:
        rows_of["train"], changed = clean, changed | {"train"}
    for split in sorted(changed):
        slides = {row["slide"] for row in rows_of[split]}
        write_qa(paths[split], rows_of[split])
        wrote = f"{count(len(rows_of[split]), 'question')} about {count(len(slides), 'slide')}"
        lack = f"{len(slides - have):,} of these have no features: {few(sorted(slides - have))}"
        print(f"Wrote {wrote} to {paths[split]}{'; ' + lack if slides - have else ''}.")


# ---- The toy cohort: slides whose reports and questions are true of what is drawn --------------------------

SIDE = 1536  # pixels of a toy slide, at 0.5 um/px: 6 x 6 tiles
# each type's colour; how many bumps its texture has across a slide
TYPES = {
    "adenocarcinoma": ((176, 104, 168), 48),
    "squamous cell carcinoma": ((214, 112, 146), 96),
    "small cell carcinoma": ((122, 78, 150), 192),
    "mucinous carcinoma": ((186, 190, 226), 24),
}
# the tumour's share of the tissue
GRADES = {"grade 1": (0.15, 0.25), "grade 2": (0.42, 0.54), "grade 3": (0.76, 0.90)}
SHARES = {"grade 1": "about a fifth", "grade 2": "about half", "grade 3": "most"}
QUADRANTS = {"upper left": (-1, -1), "upper right": (1, -1), "lower left": (-1, 1), "lower right": (1, 1)}


def noise(rng, cells, size=SIDE // 8):
    """A smooth random field float32 [size,size], mean 0, with about `cells` bumps across."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def draw_slide(case):
    """A round piece of tissue, in it a tumour whose colour and texture are the type and whose share is the
    grade, a necrosis in one quadrant, and pigment or none -> (RGB image, corners of tiles with pigment)."""
    rng = np.random.default_rng(case["seed"])
    y, x = np.mgrid[: SIDE // 8, : SIDE // 8] / (SIDE // 8) * 2 - 1  # drawn at an eighth of its size
    tissue = np.hypot(x, y) < 0.86 + 0.05 * noise(rng, 5)
    dx, dy = QUADRANTS[case["position"]] * rng.uniform(0.36, 0.46, 2)
    necrosis = tissue & (np.hypot(x - dx, y - dy) < 0.29 + 0.03 * noise(rng, 8))
    field = noise(rng, 5) + 0.25 * noise(rng, 16)
    least = np.quantile(field[tissue & ~necrosis], 1 - rng.uniform(*GRADES[case["grade"]]))
    colour = np.full((*tissue.shape, 3), 244, np.float32)  # glass
    ground, bumps = TYPES[case["type"]]
    for where, rgb, cells in (
        (tissue, (235, 184, 204), 64),
        (tissue & (field > least), ground, bumps),
        (necrosis, (216, 190, 178), 12),
    ):
        colour[where] = (rgb + 9 * noise(rng, cells)[..., None])[where]
    colour = 255 * (colour.clip(0, 255) / 255) ** rng.uniform(0.85, 1.15)  # no two laboratories stain alike
    picture = Image.fromarray(colour.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    draw, planted = ImageDraw.Draw(picture), []
    if case["focus"] == "present":  # in the middle of one or two tiles that hold tissue all over
        inside = np.argwhere(tissue.reshape(SIDE // TILE, 32, -1, 32).mean((1, 3)) > 0.95)
        for row, column in rng.permutation(inside)[: rng.integers(1, 3)]:
            planted.append([int(column) * TILE, int(row) * TILE])
            for x, y in np.add(planted[-1], TILE / 2) + rng.normal(0, 26, (46, 2)).clip(-64, 64):
                draw.ellipse((x - 7, y - 7, x + 7, y + 7), (109, 66, 22))
    return picture, planted


def draw_case(case, path):
    """One toy slide, written as a picture whose dpi say its um/px -> corners of its tiles with pigment."""
    picture, planted = draw_slide(case)
    with replacing(path) as temporary:
        picture.save(temporary, "JPEG", quality=85, dpi=(25400 / TARGET_MPP,) * 2)
    return planted


def invent_cases(n_train, n_test, seed):
    """What each toy slide shows: each value as often as the others, and no finding tells of another."""
    rng, cases = np.random.default_rng(seed), []
    values = {"type": TYPES, "grade": GRADES, "position": QUADRANTS, "focus": ("present", "absent")}
    for split, n in (("train", n_train), ("test", n_test)):
        orders = {finding: rng.permutation(np.arange(n) % len(values[finding])) for finding in values}
        for i in range(n):
            case = {"slide": f"demo_{len(cases):04d}", "split": split, "seed": int(rng.integers(2**31))}
            cases.append(case | {finding: list(values[finding])[orders[finding][i]] for finding in values})
    return cases


# task -> ways to ask, and the answer, filled in from what the slide shows
ASKED = {
    "report": "Write a report of this slide.|What does this slide show?",
    "type": "What is the histological type of the tumor?|Which type of tumor is this?",
    "grade": "What is the grade of the tumor?|How is this tumor graded by its share of the tissue?",
    "position": "Where on the slide is the necrosis?|Which part of the slide is necrotic?",
    "focus": "Is there a focus of brown pigment?|Can brown pigment be found on this slide?",
}
ANSWERS = {
    "type": "The tumor is {a_type}.",
    "grade": "The tumor is {grade}.",
    "position": "The necrosis is at the {position}.",
    "focus": "{yes_no}, brown pigment is {focus}.",
}
# Three pathologists, who differ in their words and in what they mention first.
REPORTS = (
    "The tumor is {a_type}. It takes up {share} of the tissue, which makes it {grade}. Necrosis is seen at "
    "the {position}. Brown pigment is {focus}.",
    "Sections show {a_type} of {grade} with necrosis at the {position}. A focus of brown pigment is {focus}. "
    "Tumor fills {share} of the tissue.",
    "Pigment, brown: {focus}. The {position} is necrotic. With {share} of the tissue taken up, this is "
    "{a_type}, {grade}.",
)


def write_questions(case, rng):
    """Rows of the dataset about one slide: its report, one question of each kind, and a dialogue of three."""
    words = case | {"a_type": f"{'an' if case['type'][0] in 'aeiou' else 'a'} {case['type']}"}
    words |= {"share": SHARES[case["grade"]], "yes_no": "Yes" if case["focus"] == "present" else "No"}
    talks, rows = {}, []
    for task, asked in ASKED.items():
        question, answer = rng.choice(asked.split("|")), ANSWERS.get(task) or rng.choice(REPORTS)
        turns = ("human", question), ("gpt", answer)
        talks[task] = [{"from": who, "value": str(text).format(**words)} for who, text in turns]
    order = rng.permutation(["type", "grade", "position", "focus"])[:3]
    talks["dialogue"] = list(itertools.chain(*(talks[task] for task in order)))
    for task, turns in talks.items():
        row = {"id": f"{case['slide']}-{task}", "slide": case["slide"], "task": task, "cancer": "demo"}
        rows.append(row | {"conversations": wsi_llava.slide_first(turns)})
    return rows


def draw_cohort(args, cases, folder):
    """Slides into the folder, and their questions into data/qa; notes in each case where its pigment is."""
    print(f"Drawing {len(cases)} toy slides into {folder}: {SIDE} x {SIDE} pixels at {TARGET_MPP} um/px.")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{case['slide']}.jpg" for case in cases]
    spawn = multiprocessing.get_context("spawn")  # forking a process that has torch's threads can hang
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        drawn = tqdm(pool.map(draw_case, cases, paths, chunksize=4), total=len(cases), unit="slide")
        for case, planted in zip(cases, drawn):
            case["planted"] = planted
    for split in ("train", "test"):
        about = [case for case in cases if case["split"] == split]
        rows = [write_questions(case, np.random.default_rng(case["seed"] + 1)) for case in about]
        write_qa(args.data / "qa" / f"{split}.jsonl", itertools.chain(*rows))


def prepare_demo(args):
    """--demo: draws the cohort, unless it is there (data/cohort.json), and prepares it as real slides are."""
    args.preset, folder, path = "demo", args.data / "slides", args.data / "cohort.json"
    recipe = {"train": args.demo, "test": args.demo // 5, "seed": args.seed}
    cases = invent_cases(recipe["train"], recipe["test"], args.seed)
    if path.exists():
        old = wsi_llava.read_json(path, "delete the folder, or name another --data").get("recipe")
        other = f"{args.data} holds another demo cohort ({old}, not {recipe}); name another --data"
        check(old == recipe, other)
    else:
        own = f"{args.data} holds data of your own; give the demo a folder of its own with --data"
        check(not (args.data / "meta.json").exists(), own)
        draw_cohort(args, cases, folder)
        wsi_llava.write_text(path, json.dumps({"recipe": recipe, "cases": cases}, indent=1))
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))  # this small encoder takes no more time than the readers
    failures = prepare_slides(args, {case["slide"]: folder / f"{case['slide']}.jpg" for case in cases})
    torch.set_num_threads(threads)
    return failures


# ---- Flags and main --------------------------------------------------------------------------------------


def parse(argv=None):
    parser = wsi_llava.Parser(__doc__)
    yes, paths = {"action": "store_true"}, {"nargs": "+", "metavar": "PATH", "type": Path}
    add = parser.group("what to prepare")
    add("--slides", "slides, folders of slides", **paths)
    add("--features", "features made elsewhere (.pt, .h5), or folders of them", **paths)
    add("--qa", f"question files; {WHAT_IS_READ}", **paths)
    drawn = "draw the toy cohort, N slides to train on (500 if not said) and a fifth more, and prepare it"
    add("--demo", drawn, nargs="?", metavar="N", type=at_least(5), const=500)
    add("--dry-run", "list the slides and their tiles; write nothing", **yes)
    add("--overwrite", "make features and splits of questions again that are there already", **yes)
    add("--shard", "one of N shares of the slides, for job arrays", metavar="I/N", default="1/1")
    add = parser.group("slides and their tiles")
    microns = {"type": at_least(MPP_RANGE[0], float, MPP_RANGE[1])}
    add("--mpp", "um per pixel at level 0 of slides whose metadata do not say it", **microns)
    add("--mpp-csv", "slide by slide, lines of slide,mpp; wins over what slides say", metavar="FILE")
    add("--min-tissue", "least share of a tile (default: 0.1)", type=at_least(0, float, 1), default=0.1)
    add("--mask", "pictures or QuPath's GeoJSON of what is tissue", metavar="DIR", type=Path)
    add("--step", "pixels from tile to tile (default: 256)", type=at_least(1), default=TILE)
    add("--max-tiles", "at most so many of a slide's tiles, drawn at random", type=at_least(0), default=0)
    add("--geojson", "also write qc/<slide>.geojson, the tiles for QuPath", **yes)
    add = parser.group("questions")
    add("--split", "if names or rows of --qa's files do not tell it", choices=["train", "val", "test"])
    add("--drop-leaks", "leave out of training what shares a slide or a patient with the test", **yes)
    gigapath = f"Prov-GigaPath's (default: {wsi_llava.GIGAPATH}/pytorch_model.bin)"
    add("--tile-encoder", gigapath, metavar="FILE", type=Path)
    wsi_llava.add_shared_flags(parser)
    return parser.parse_args(argv)


def with_defaults(args):
    """Another script's flags, completed by the defaults of this one's."""
    return argparse.Namespace(**(vars(parse([])) | vars(args)))


def main(argv=None):
    args = parse(argv)
    given = args.slides or args.features or args.qa or args.demo
    check(given, "nothing to do: give --slides, --features, --qa or --demo (--help explains)")
    check(not (args.dry_run and (args.demo or args.features or args.qa)), "--dry-run is for --slides alone")
    check(not args.mask or args.mask.is_dir(), f"--mask {args.mask}: no such folder")
    share = re.fullmatch("([1-9][0-9]*)/([1-9][0-9]*)", args.shard)
    check(share and int(share[1]) <= int(share[2]), f"--shard {args.shard}: I/N with I from 1 to N, as 3/16")
    wsi_llava.resolve_device(args)
    failures = prepare_demo(args) if args.demo else []
    if args.features:
        failures += import_features(args, int(share[1]) - 1, int(share[2]))
    if args.slides:
        failures += prepare_slides(args, find_slides(args.slides), int(share[1]) - 1, int(share[2]))
    if (args.slides or args.demo) and not args.dry_run:
        write_index(args.data)
    if args.qa:
        import_qa(args)
    for _, message in failures:
        print(f"failed: {wsi_llava.one_line(message, 2000)}", file=sys.stderr)
    where = ")" if args.dry_run else f" and in {args.data}/failures); the others are done"
    check(not failures, f"{count(len(failures), 'slide')} could not be prepared (listed above{where}")


if __name__ == "__main__":
    wsi_llava.run(main, on_interrupt="interrupted; the same command goes on where this one stopped")
