"""Slides -> tile features, question files -> one dataset: everything that train.py and sample.py read.

    python prepare.py --slides PATH...             slides, or folders of them: tissue, tiles, features
    python prepare.py --features PATH...           features that were made elsewhere
    python prepare.py --qa FILE... [--split test]  question files
    python prepare.py --demo                       draws a cohort of toy slides, with reports and questions

A slide is cut into 256-px tiles at 0.5 um/px where there is tissue; every tile becomes one vector:

    data/features/<slide>.safetensors  features float16 [N,C], coords int32 [N,2] (x, y, pixels as tiled)
    data/qc/<slide>.jpg                its tissue and tiles: look at it (index.html: all, failures first)
    data/failures/<slide>.txt          why it could not be prepared

Interrupt it, kill it, start it twice: whoever works on a slide holds a lock that dies with the process.
"""

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
from wsi_llava import TILE, UserError, at_least, check, count, few, one_line, reading, replacing, write_text

with contextlib.suppress(ImportError):  # Windows has none
    import fcntl

TARGET_MPP = 0.5  # um/px; Prov-GigaPath was trained at it
NATIVE = 0.02  # this close to the target's size, or a whole fraction, pixels are not resampled
MPP_RANGE = (0.05, 20)  # um/px; 72 dpi means nothing

MASK = 32  # tiled pixels per pixel of the tissue mask
PICTURE = 768  # pixels of the picture to look at, longer side
BATCH = 64  # tiles that pass the encoder together
DROPPED = 0.01  # a slide fails where more of it cannot be decoded
SUFFIXES = "svs tif tiff ndpi mrxs scn bif vms vmu svslide dcm png jpg jpeg".split()
MICRONS = {"inch": 25400, "centimeter": 10000, "cm": 10000, "mm": 1000, "micron": 1, "um": 1, "nm": 0.001}
Image.MAX_IMAGE_PIXELS = None  # slides are larger


# ---- A slide at the target resolution ----


def number(text):
    """What a file says, as a finite number, or 0."""
    with contextlib.suppress(TypeError, ValueError, ArithmeticError):  # Pillow's fractions can be 0/0
        return float(text) if math.isfinite(float(text)) else 0
    return 0


def microns(unit):
    """um in a unit of length, or 0: the sign for micro has several ways."""
    return MICRONS.get(re.sub(r"[^\x00-\x7f]+|&#\w+;|\\u00b5", "u", unit.strip().lower()), 0)


class Slide:
    """A slide as one image of width x height tiled pixels. mpp: um per level-0 pixel; given, it wins over the
    file's, and that over the fallback. Raises UserError."""

    def __init__(self, path, mpp=None, fallback=None):
        # The folder of an MRXS lies beside the file, not beside a link to it.
        real = os.path.realpath(path)
        self.path, self.notes = path if Path(real).suffix != Path(path).suffix else real, []
        with reading(path, "not a slide that OpenSlide can read"):
            self.open()
            if number(self.get("openslide.level[0].tile-width")) > 2**16:
                raise ValueError("says that its tiles are over 65536 px wide")
        self.mpp, self.source = (mpp, "--mpp-csv") if mpp else self.own_mpp(path, fallback)
        if self.source in ("objective power", "--mpp", "--mpp-csv"):
            self.notes.append(f"um/px taken from {self.source}")
        self.scale = TARGET_MPP / self.mpp  # level-0 pixels per tiled pixel
        self.width, self.height = (round(side / self.scale) for side in self.file.dimensions)
        fits = max(self.width, self.height) <= wsi_llava.GRID * TILE
        check(fits, f"{path}: too large, at {self.mpp:g} um/px; --mpp-csv gives others")
        self.downsamples = self.file.level_downsamples
        self.scales = [self.level_scale(level) for level in range(self.file.level_count)]
        self.level = self.level_at(self.scale)
        self.zoom = self.scale / self.scales[self.level]  # level pixels per tiled pixel
        whole = max(1, round(self.zoom))
        self.average = whole if abs(self.zoom / whole - 1) <= NATIVE else None

    def open(self):
        """Also anew: OpenSlide refuses all after an error."""
        self.file = openslide.open_slide(self.path)
        self.get = self.file.properties.get

    @property
    def corner(self):
        """Level-0 (x, y) from which QuPath counts."""
        return [int(self.get(f"openslide.bounds-{axis}", 0)) for axis in "xy"]

    def hash(self):
        """Tells this slide from others, wherever it lies."""
        with open(self.path, "rb") as file:
            return self.get("openslide.quickhash-1") or hashlib.file_digest(file, "sha256").hexdigest()

    def own_mpp(self, path, fallback):
        """-> (um/px of the file, or the fallback, where they are from)."""
        text, unit = self.get("tiff.ImageDescription", ""), self.get("tiff.ResolutionUnit", "")
        dots, power = self.get("tiff.XResolution"), number(self.get("openslide.objective-power"))
        if isinstance(self.file, openslide.ImageSlide):  # a plain picture, which Pillow reads
            with Image.open(self.path) as image:
                text, unit = str(getattr(image, "tag_v2", {}).get(270, "")), "inch"
                dots = (image.info.get("dpi") or image.info.get("resolution") or [0])[0]
        ome = dict(re.findall(r'PhysicalSizeX(Unit)?="([^"]*)"', text)[:2])
        imagej = re.search(r"(?ms)^ImageJ=.*^unit=([^\n]+)", text)
        dots = number(dots) or math.inf
        wide, high = (number(self.get(f"openslide.mpp-{side}")) for side in "xy")
        if high and abs(wide - high) > NATIVE * wide:
            self.notes.append("its pixels are not square")
        said = {  # the most trusted first
            "OME-XML": number(ome.get("")) * microns(ome.get("Unit", "um")),
            "ImageJ": microns(imagej[1] if imagej else "") / dots,
            "metadata": wide,
            "resolution": microns(unit) / dots,
            "objective power": 10 / (power or math.inf),  # 40x is about 0.25 um/px
        }
        said = {source: mpp for source, mpp in said.items() if mpp}
        found = [source for source in said if MPP_RANGE[0] <= said[source] <= MPP_RANGE[1]]
        if re.search(r'(?s)<Image .*<Image |Size[ZT]="([2-9]|\d\d)', text):
            self.notes.append("only the first of several scenes or focal planes is read")
        if not found:
            check(fallback, f"{path}: no um/px from 0.05 to 20 in it ({said or 'none at all'}); give --mpp")
            return fallback, "--mpp"
        if max(map(said.get, found)) > 1.5 * min(map(said.get, found)):
            self.notes.append(f"um/px by {' and '.join(found)} differ by over 1.5 times; took the first")
        return said[found[0]], found[0]

    def level_scale(self, level):
        """Level-0 pixels per pixel of a level, or None where that cannot be told."""
        # OpenSlide's is the mean of both ratios: wrong on strips, and where levels are padded to tiles.
        sides, size = np.array(self.file.dimensions), np.array(self.file.level_dimensions[level])
        tile = number(self.get(f"openslide.level[{level}].tile-width"))
        longer = float(sides.max() / size[sides.argmax()])
        padded = tile and not (size % tile).any()
        if abs(size - sides / (round(longer) if padded else longer)).max() <= 1:
            return longer
        padding = {2**n: size - sides / 2**n for n in range(16 if padded else 0)}
        fits = [n for n in padding if padding[n].min() >= -1 and padding[n].max() < tile]
        return fits[0] if len(fits) == 1 else None  # a level of one tile may fit several

    def level_at(self, scale):
        """The coarsest level that is at least as fine, or the finest."""
        fine = [level for level, own in enumerate(self.scales) if own and own <= scale * (1 + NATIVE)]
        return fine[-1] if fine else 0

    def region(self, level, x, y, width, height):
        """Pixels of a level, from its (x, y) on -> RGBA uint8 [height,width,4]; beyond: white."""
        own = self.downsamples[level]  # OpenSlide takes level-0 corners, by its own number
        region = self.file.read_region((round(x * own), round(y * own)), level, (width, height))
        pixels = np.asarray(region)
        if pixels.view("<u4").min() >= 0xFF000000:  # alpha is 255
            return pixels
        return np.asarray(Image.alpha_composite(Image.new("RGBA", region.size, "white"), region))

    def tile(self, x, y):
        """The tile at (x, y), in tiled pixels -> uint8 [256,256,4]. It lies where the exact scale puts it: no
        error adds up."""
        margin = 0 if self.average else math.ceil(3 / min(1, self.zoom))  # tiled pixels; Lanczos-3
        left, top = (round((corner - margin) * self.zoom) for corner in (x, y))
        side = self.average * TILE if self.average else math.ceil((TILE + 2 * margin) * self.zoom)
        pixels = self.region(self.level, left, top, side, side)
        if self.average == 1:
            return pixels
        if self.average:  # RGB takes half the time of RGBA
            return np.asarray(Image.fromarray(pixels).convert("RGB").reduce(self.average).convert("RGBA"))
        pixels = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]  # [1,4,side,side]
        pixels = F.interpolate(pixels, scale_factor=1 / self.zoom, mode="lanczos", antialias=True)[0]
        return pixels[:, margin : margin + TILE, margin : margin + TILE].permute(1, 2, 0).numpy()

    def thumbnail(self, pixel):
        """The whole slide, `pixel` tiled pixels a pixel; what cannot be decoded stays white."""
        width, height = (max(1, round(side / pixel)) for side in (self.width, self.height))
        picture, self.lost = Image.new("RGB", (width, height), "white"), 0  # share of the picture
        level = self.level_at(self.scale * pixel)
        zoom = self.scale * pixel / self.scales[level]  # level pixels per pixel
        step = max(1, int(TILE / zoom))  # spares memory
        for y, x in itertools.product(range(0, height, step), range(0, width, step)):
            right, bottom = min(width, x + step), min(height, y + step)
            left, top = math.floor(x * zoom), math.floor(y * zoom)
            inside = [x * zoom - left, y * zoom - top, right * zoom - left, bottom * zoom - top]
            try:
                part = Image.fromarray(self.region(level, left, top, *map(math.ceil, inside[2:])))
                part = part.convert("RGB").resize((right - x, bottom - y), Image.BOX, inside)
                picture.paste(part, (x, y))
            except openslide.OpenSlideError:
                self.open()
                self.lost += (right - x) * (bottom - y) / (width * height)
                check(self.lost <= DROPPED, f"{self.path}: over 1% of it cannot be decoded")
        return picture


# ---- Finding slides, and what they are called ----

FILE_ENDING = rf"(\.({'|'.join(SUFFIXES)}|pth?|h5|hdf5|csv|npy|safetensors))+$"


def slide_id(text):
    """A slide as files name it -> its id: less its folders and its endings."""
    return re.sub(FILE_ENDING, "", re.split(r"[/\\]", text.strip())[-1], flags=re.I)


def dicom_series(path):
    """A DICOM file's series, if it is a slide's; else ""; of another file None."""
    head = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(2**16)
    # In order of tags, sequences between: the first kind (0008,0016) is the file's, and the last series
    # (0020,000E) before the pixels (0028,0002).
    kind = re.search(rb"(?s)\x08\0\x16\0UI..([0-9.]*)", head)
    series = re.findall(rb"(?s)\x20\0\x0e\0UI..([0-9.]*)", head.partition(b"\x28\0\x02\0US")[0])
    if kind and series and kind[1].endswith(b".77.1.6"):  # VL Whole Slide Microscopy Image Storage
        return series[-1].decode()
    return "" if head[128:132] == b"DICM" else None


def dicom_slides(folder, files):
    """A folder's .dcm files -> [(name, path)]. A slide is a series, a file for each level."""
    series_of = {path: dicom_series(path) for path in reversed(files)}
    slides = {series: path for path, series in series_of.items() if series}
    if not slides:  # perhaps damaged
        slides = {series: path for path, series in series_of.items() if series is None}
    name = Path(folder).resolve().name
    if len(slides) == 1:
        return [(name, *slides.values())]
    return [(f"{name}_{series}", path) for series, path in sorted(slides.items())]


def find_slides(inputs):
    """Files and folders -> {slide id: path}. The id is the file's stem, or the folder's name of .dcm files;
    names that meet get their folder's before them."""
    found, seen = {}, set()
    for entry in map(Path, inputs):
        check(entry.exists(), f"{entry}: no such file or folder (--slides)")
        if entry.is_file():
            found[os.path.realpath(entry)] = entry.stem, entry
            continue
        for folder, folders, files in os.walk(entry, followlinks=True, onerror=print):
            folders[:] = sorted(name for name in folders if name[0] != ".")
            if os.path.realpath(folder) in seen or "meta.json" in files:  # data, with pictures of slides
                folders.clear()
                continue
            seen.add(os.path.realpath(folder))
            kinds = {suffix: [] for suffix in SUFFIXES}
            for path in sorted(Path(folder, name) for name in files if name[0] != "."):
                kinds.get(path.suffix.lower()[1:], []).append(path)
            if kinds["vms"] or kinds["vmu"]:
                kinds["jpg"] = []  # Hamamatsu's: parts of the slide
            slides = dicom_slides(folder, kinds.pop("dcm"))
            slides += [(path.stem, path) for path in itertools.chain(*kinds.values())]
            for name, path in slides:
                found.setdefault(os.path.realpath(path), (name, path))
    check(found, f"no slides below {few(inputs)}")
    times, named = collections.Counter(name.casefold() for name, _ in found.values()), {}
    for name, path in found.values():
        if times[name.casefold()] > 1:
            name = f"{path.resolve().parent.name}_{name}"
        name = re.sub(r"[/\\\x00-\x1f\ud800-\udfff]", "_", name)  # also what is not UTF-8
        other = named.setdefault(name.casefold(), (name, path))[1]
        check(other is path, f"{other} and {path} have the same name, {name}; rename one")
        check(len(name.encode()) <= 200, f"{path}: its name is too long")
    return dict(sorted(named.values()))


def read_mpp_csv(path, slides):
    """Lines of slide,mpp, a slide by its id, file or path -> {slide id: um/px}."""
    table, hint = {}, "--mpp-csv takes lines of slide,mpp, from 0.05 to 20 um/px"
    with reading(path, hint):
        lines = Path(path).read_text("utf-8-sig").splitlines()
    for i, line in enumerate(lines, 1):
        slide, _, mpp = line.replace('"', "").rpartition(",")
        slide, mpp = slide_id(slide), number(mpp)
        if line.strip() and (i > 1 or mpp):  # the first may name the columns
            fits = slide and MPP_RANGE[0] <= mpp <= MPP_RANGE[1] and table.setdefault(slide, mpp) == mpp
            check(fits, f"{path}, line {i}: {line[:60]!r}; {hint}")
    given = {name: table[slide_id(name)] for name in slides if slide_id(name) in table}
    print(f"{path}: {count(len(table), 'line')}, about {len(given)} of these slides")
    return given


# ---- Tissue and tiles ----
#
# Stain is measured against the slide's own glass, as optical density: tissue takes more of one colour than of
# another; glass, dust and black borders take all alike. Ink has colours of its own, and is smooth.

WHITE = np.array((244.0, 244, 244))


def box_mean(x, r):
    """Mean over the (2r+1)^2 pixels around each, float32 [h,w]."""
    for _ in range(2):  # columns, then rows
        padded = np.pad(x.astype(np.float32), ((r, r), (0, 0)), mode="edge")
        x = sum(padded[i : i + len(x)] for i in range(2 * r + 1)).T / (2 * r + 1)
    return x


def roughness(x):
    """Standard deviation over the 5 x 5 pixels around each."""
    return np.sqrt(np.maximum(0, box_mean(x * x, 2) - box_mean(x, 2) ** 2))


def find_glass(rgb):
    """RGB float32 [h,w,3] -> (the slide's glass, or WHITE; the least colour that is stain)."""
    grey = rgb.mean(-1)
    rough = roughness(grey)
    smooth, pink = (grey > 170) & (rough < 4), 14  # by how much glass may lack green; stroma lacks more
    # White without any noise was painted, or never scanned: no glass, if there is enough of another. (On a
    # white slide, that would be tissue, hardly as smooth.)
    fill = box_mean(rgb.min(-1), 2) == 255
    scanned = smooth & ~fill & (rough < 1.5)
    if fill.mean() > 0.005 and scanned.sum() > max(100, 0.15 * (~fill).sum()):
        smooth, pink = scanned, 3
    if smooth.mean() < 0.005:
        return WHITE, 0.03
    # The histogram's rightmost hill.
    counts = np.convolve(np.bincount(grey[smooth].astype(int), minlength=256), np.ones(5), "same")
    bright = np.flatnonzero(counts >= counts.max() / 10).max()
    start = max(0, bright - 12)
    peak = start + np.argmax(counts[start : bright + 1])
    pixels = rgb[smooth & (abs(grey - peak) < 6)]
    glass = np.median(pixels, axis=0)
    if glass.min() < 178 or np.ptp(glass) > 48 or glass[1] < min(glass[0], glass[2]) - pink:
        return WHITE, 0.015 if fill.mean() > 0.005 else 0.03
    # Stain has more colour than the glass's own noise, by 4.5 deviations.
    colour = np.ptp(np.log10(glass / pixels[abs(pixels - glass).max(-1) < 8]), axis=-1)
    noise = 1.4826 * np.median(abs(colour - np.median(colour)))
    return glass, float(np.clip(np.median(colour) + 4.5 * noise, 0.015, 0.06)) if len(colour) >= 100 else 0.03


def find_tissue(picture):
    """RGB thumbnail -> (tissue, ink), bool [h,w]."""
    pixels = np.asarray(picture.filter(ImageFilter.MedianFilter(3)))
    glass, least = find_glass(pixels.astype(np.float32))
    tables = [np.log10(side / np.arange(256).clip(1)).astype(np.float32) for side in glass]
    r, g, b = (table[pixels[..., i]] for i, table in enumerate(tables))  # optical densities
    dark, most = (r + g + b) / 3, np.maximum(np.maximum(r, g), b)
    colour = most - np.minimum(np.minimum(r, g), b)
    high, low = pixels.max(-1), pixels.min(-1)
    black = (high < 25) | ((high < 75) & (high - low < high // 2))
    stained = (colour > least) & (most > 0.02) & ~black
    # Green and blue ink take most of the red, red ink green and blue.
    ink = (r > 0.12) & (r > g + 0.08) & (r > b + 0.05)
    ink |= (r < 0.13) & (g > 0.3) & (b > 0.72 * g)
    rough = roughness(dark)
    smoother_than_tissue = ink.any() and np.median(rough[ink] / dark[ink]) < 0.025
    ink &= rough < 0.004 + 0.036 * dark
    core = box_mean(ink, 3) > 0.99  # its edges, not smooth, come back
    ink = stained & (box_mean(core, 6) > 0)
    if ink.sum() > 0.4 * stained.sum() and not smoother_than_tissue:
        ink[:] = False
    return stained & ~ink, ink


def given_mask(path, slide, size):
    """A picture of the slide, or a GeoJSON -> bool [h,w] of that size (w, h)."""
    with reading(path, "--mask takes pictures, black outside tissue, or QuPath's GeoJSON"):
        if path.suffix.lower() in (".geojson", ".json"):
            return drawn_mask(json.loads(path.read_text("utf-8-sig")), slide, size)
        picture = Image.open(path)
        stretched = picture.width / picture.height * slide.height / slide.width
        fits = abs(stretched - 1) <= 0.02 + 1 / min(picture.size)
        check(fits, f"{path}: {picture.size} px are not of the slide's shape")
        if picture.mode in ("LA", "RGBA") and all(a == b for a, b in picture.getextrema()[:-1]):
            picture = picture.getchannel("A")
        # A photograph would exchange glass and tissue.
        small = picture.resize(size, Image.NEAREST).convert("RGB")
        coloured = (np.ptp(np.asarray(small).astype(int), axis=-1) > 40).mean() > 0.001
        greys = np.array(small.convert("L").filter(ImageFilter.MedianFilter(5)).histogram())
        many = sum(greys.reshape(32, 8).sum(1) > 0.001 * greys.sum()) > 8  # JPEG's noise aside
        plain = not (coloured or many or picture.mode[0] in "IF")
        check(plain, f"{path}: not a mask of few greys, 8 bits each")
        grey = np.asarray(picture.convert("L"))
        marked = Image.fromarray(grey > (127 if grey.max() > 127 else 0))  # labels are masks, too
        return np.asarray(marked.convert("L").resize(size, Image.BOX)) > 127


def drawn_mask(found, slide, size):
    """A GeoJSON's polygons, in level-0 pixels -> bool [h,w]. What QuPath ignores is no tissue."""
    drawn = {ignored: np.zeros(size[::-1], bool) for ignored in (False, True)}
    for feature in found.get("features", [found]) if isinstance(found, dict) else found:
        about, shape = feature.get("properties") or {}, feature.get("geometry") or {}
        if about.get("objectType") in ("tile", "cell", "detection"):
            continue
        name = (about.get("classification") or {}).get("name") or ""
        ignored = name.startswith("Ignore") or bool(about.get("isMissing"))
        corners = shape.get("coordinates")
        for rings in {"Polygon": [corners], "MultiPolygon": corners}.get(shape.get("type"), []):
            part = Image.new("1", size)
            for i, ring in enumerate(rings):
                ring = (np.array(ring, float)[:, :2] + slide.corner) / (MASK * slide.scale) - 0.5
                ImageDraw.Draw(part).polygon(ring.ravel().tolist(), i == 0)
            drawn[ignored] |= np.asarray(part)
    return drawn[False] & ~drawn[True]


def tile_grid(mask, min_tissue, step=TILE):
    """Tiles with that share of tissue -> corners int32 [N,2] (x, y), tiled pixels, in raster order."""
    n, apart = TILE // MASK, step // MASK
    # The last ones may reach beyond the slide.
    mask = np.pad(mask, [(0, max(n - side, (n - side) % apart)) for side in mask.shape])
    squares = np.lib.stride_tricks.sliding_window_view(mask, (n, n))[::apart, ::apart]
    return np.argwhere(squares.mean((2, 3)) >= min_tissue)[:, ::-1].astype(np.int32) * step


def draw_qc(path, picture, pixel, mask, ink, coords):
    """Tissue (green), ink (red), tiles (blue) on a picture of `pixel` tiled pixels a pixel."""
    draw, side = ImageDraw.Draw(picture, "RGBA"), TILE / pixel
    for x, y in coords / pixel:
        edge = (30, 80, 255, 140) if side > 6 else None
        draw.rectangle((x, y, x + side, y + side), (30, 80, 255, 24), edge)
    for part, colour in ((ink, (220, 0, 0)), (mask, (0, 150, 60))):
        solid = Image.fromarray(part).convert("L").resize(picture.size)
        edge = np.asarray(solid) > np.asarray(solid.filter(ImageFilter.BoxBlur(2)))
        picture.paste(colour, mask=Image.fromarray(edge))
    with replacing(path) as temporary:
        picture.save(temporary, "JPEG", quality=90)


PAGE = '<!DOCTYPE html><meta charset="utf-8">\n'
CARD = '<p><a href="{href}"><img loading="lazy" src="{href}" width="240"></a> <b>{}</b> {}\n'


def write_index(data):
    """data/qc/index.html: all slides, failures first."""
    texts, page = {name: f"FAILED: {message}" for name, message in read_failures(data).items()}, PAGE
    for path in sorted((data / "features").glob("*.safetensors")):
        texts.setdefault(path.stem, "")
    for name, text in texts.items():
        page += CARD.format(html.escape(name), html.escape(text), href=urllib.parse.quote(f"{name}.jpg"))
    write_text(data / "qc" / "index.html", page)


# ---- A folder of features, which several runs may work on ----


def claim(claims, name):
    """Whether this process alone may work on a slide, until it closes data/.claims or dies."""
    offset = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
    try:
        fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
    except (BlockingIOError, PermissionError):
        return False
    except (OSError, NameError):
        pass  # there are no locks here: two runs would both do it
    return True


def read_failures(data):
    """data/failures -> {slide: why it failed}."""
    files = sorted((data / "failures").glob("*.txt"))
    return {file.stem: file.read_text("utf-8", "replace") for file in files}


def note_failure(data, name, message=None):
    """Puts a slide on record, or takes it off."""
    file = data / "failures" / f"{name}.txt"
    file.unlink(missing_ok=True)
    if message:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, message)


def write_meta(data, preset, encoder):
    """Makes the folder, or checks that it is of this encoder."""
    for folder in ("features", "qc", "qa"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    meta = {"version": wsi_llava.VERSION, "preset": preset, "tile_size": TILE, "mpp": TARGET_MPP}
    if not (data / "meta.json").exists():
        write_text(data / "meta.json", json.dumps(meta | {"encoder": encoder}, indent=2))
    old = wsi_llava.read_meta(data)
    same = old["encoder"]["fingerprint"] == encoder["fingerprint"] and old["mpp"] == TARGET_MPP
    made = f"another tile encoder ({old['encoder']['source']}) or um/px ({old['mpp']})"
    check(same, f"{data} is of {made}; name a new --data")


def open_encoder(args):
    """-> (the tile encoder, by default the one that made what is there, its fingerprint)."""
    if (args.data / "meta.json").exists():
        old = wsi_llava.read_meta(args.data)
        args.preset, source = args.preset or old["preset"], Path(old["encoder"]["source"])
        args.tile_encoder = args.tile_encoder or (source if source.is_file() else None)
    encoder, source = wsi_llava.pick_tile_encoder(args)
    if not source:
        print("No GigaPath weights found or named: a small untrained encoder serves.")
    info = {"source": str(source or "untrained"), "fingerprint": wsi_llava.fingerprint(encoder)}
    if not args.dry_run:
        preset = args.preset or ("7b" if source else "demo")
        write_meta(args.data, preset, info | {"width": encoder.cfg.width})
    return encoder.to(args.device, args.dtype), info["fingerprint"]


# ---- From slides to features ----
#
# A damaged file may kill the process that opens it, so others do: the surveyor sees what there is of a slide
# while the one before is encoded; readers read this one's tiles, a batch each, into shared memory.

FORK = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
DIED = "the process that read it died (damaged, or no memory left)"
open_slide = functools.lru_cache(maxsize=1)(Slide)


def begin_reader(memory):
    global shared
    shared = np.frombuffer(memory, np.uint8).reshape(-1, TILE, TILE, 4)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word,
    parent = multiprocessing.parent_process()  # as does its parent's end
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


def start_readers(n, memory=b""):
    return ProcessPoolExecutor(n, FORK, begin_reader, (memory,))


def apart(path, function, *arguments):
    """Calls a function in a process of its own; UserError where that dies."""
    with start_readers(1) as readers:
        try:
            return readers.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError(f"{path}: {DIED}") from None


def slide_job(args, name, path, given, mask, encoder):
    """-> dict: a slide's files, and the parameters that its features depend on."""
    params = {"encoder": encoder, "min_tissue": args.min_tissue, "step": args.step}
    params |= {"max_tiles": args.max_tiles, "seed": args.max_tiles and args.seed}
    params["mask"] = mask and hashlib.sha256(mask.read_bytes()).hexdigest()[:12]
    size = os.path.getsize(path) if os.path.exists(path) else 0
    job = {"name": name, "slide": (str(path), given, args.mpp), "file": [os.path.abspath(path), size]}
    job["pictures"] = [args.data / "qc" / f"{name}.{ending}" for ending in ("jpg", "geojson")]
    return job | {"params": params, "mask": mask, "features": wsi_llava.features_file(args.data, name)}


def is_done(args, job, digest=None):
    """Whether a slide's files are there, by path and size, or by its hash. UserError if of another slide."""
    path, (_, given, fallback) = job["features"], job["slide"]
    if args.overwrite or not path.exists():
        return False
    made = wsi_llava.feature_metadata(path)
    mpp = given or (made.get("mpp_source") == "--mpp" and fallback) or made.get("mpp")
    for k, now in (job["params"] | {"mpp": mpp}).items():
        then = made["params"].get(k, made.get(k))
        check(then == now, f"{path} was made with {k} {then}, not {now}; --overwrite makes it again")
    if digest:
        check(made["file"][2] == digest, f"{path} is of another slide; --overwrite makes it again")
        return True
    pictures = job["pictures"][: 2 if args.geojson else 1]
    return made["file"][:2] == job["file"] and all(picture.exists() for picture in pictures)


def survey(args, job):
    """What there is to read of a slide -> dict; draws its pictures. UserError if it is damaged."""
    with reading(job["slide"][0], "damaged, or not read here"):
        slide = open_slide(*job["slide"])
        facts = {"params": job["params"], "file": [*job["file"], slide.hash()], "scale": slide.scale}
        facts |= {"mpp": slide.mpp, "mpp_source": slide.source, "size": slide.file.dimensions}
        done = is_done(args, job, facts["file"][2])
        picture = slide.thumbnail(MASK / max(1, round(MASK * PICTURE / max(slide.width, slide.height))))
        size = [max(1, round(side / MASK)) for side in (slide.width, slide.height)]
        mask, ink = find_tissue(picture.resize(size, Image.BOX))
        if job["mask"]:
            mask, ink = given_mask(job["mask"], slide, size), np.zeros_like(ink)
        coords = tile_grid(mask, args.min_tissue, args.step)
        small = 0 if len(coords) else len(tile_grid(mask, 0.01, args.step))
        if 0 < args.max_tiles < len(coords):  # the same for a seed
            rng = np.random.default_rng([args.seed, zlib.crc32(job["name"].encode())])
            coords = coords[np.sort(rng.choice(len(coords), args.max_tiles, replace=False))]
    told = dict.fromkeys(slide.notes, True) | {
        "under 1% of it cannot be decoded": slide.lost,
        "ink left out, red in data/qc": ink.mean() > 0.001,
        "not in --mask: tissue by its colour": args.mask and not job["mask"],
        f"no tile reaches --min-tissue {args.min_tissue:g}; 0.01 would give {small}": small,
        "no tissue found (what has no colour needs --mask)": not len(coords) and not small,
    }
    if not args.dry_run:
        picture.thumbnail((PICTURE, PICTURE))
        draw_qc(job["pictures"][0], picture, slide.width / picture.width, mask, ink, coords)
    if args.geojson and not args.dry_run:
        tiles = [wsi_llava.geojson_tile(*corner, slide.scale, slide.corner) for corner in coords.tolist()]
        write_text(job["pictures"][1], json.dumps({"type": "FeatureCollection", "features": tiles}))
    notes = [note for note in told if told[note] and not done]
    return {"coords": coords, "done": done, "notes": notes, "facts": facts}


def read_tiles(slide, coords, place):
    """Tiles into memory, from `place` on -> (place, which were read, the last error)."""
    read, failed = [], None
    for n, (x, y) in enumerate(coords.tolist()):
        try:
            shared[place + len(read)] = open_slide(*slide).tile(x, y)
            read.append(n)
        except Exception as error:  # OpenSlide refuses everything after one: opened anew
            failed = one_line(error)
            open_slide.cache_clear()
    return place, read, failed


@torch.inference_mode()
def encode(encoder, tiles, device):
    """uint8 [n,256,256,4] -> float16 [n,C], on the device."""
    images = wsi_llava.preprocess_tiles(tiles.to(device)[..., :3])
    return encoder(images.to(encoder.cls_token.dtype)).half()


def prepare_slide(args, encoder, readers, memory, job, plan, bar):
    """Encodes a surveyed slide's tiles, writes its features -> how many."""
    coords, path, problem = plan["coords"], job["slide"][0], None
    # All batches are full but the last: a feature's bits depend on the slide alone. 4 x 4 neighbours follow
    # one another: OpenSlide keeps the JPEG tiles that they share.
    order = np.lexsort((*coords.T, *(coords.T // (4 * TILE))))
    batches = np.split(order, range(BATCH, len(order), BATCH))
    tiles = torch.frombuffer(memory, dtype=torch.uint8).view(-1, TILE, TILE, 4)
    places, coming, ahead = itertools.cycle(range(0, len(tiles), BATCH)), iter(batches), collections.deque()
    features = torch.empty(len(coords), encoder.cfg.width, dtype=torch.float16, device=args.device)
    read = np.zeros(len(coords), bool)
    for numbers in batches:
        for later in itertools.islice(coming, 1 + args.workers - len(ahead)):  # read while this is encoded
            ahead.append(readers.submit(read_tiles, job["slide"], coords[later], next(places)))
        place, kept, error = ahead.popleft().result()
        if kept:
            features[numbers[kept]] = encode(encoder, tiles[place : place + len(kept)], args.device)
            read[numbers[kept]] = True
        problem = error or problem
        bar.set_postfix_str(f"{job['name'][:24]}, {read.sum()} of {len(coords)} tiles")
    lost, features = int(sum(~read)), features.cpu()[read]
    many = f"{path}: {lost} of its {len(coords)} tiles cannot be decoded ({problem})"
    check(lost <= DROPPED * len(coords), many)
    if lost:
        plan["notes"].append("under 1% of its tiles cannot be decoded")
    check(features.isfinite().all(), f"{path}: its features are not finite; try --dtype float32")
    save_features(job["features"], features, coords[read], plan["facts"] | {"dropped": lost})
    return len(features)


def save_features(path, features, coords, facts):
    tensors = {"features": features, "coords": torch.from_numpy(coords)}
    wsi_llava.write_tensors(path, tensors, {"wsi_llava": json.dumps(facts)})


def prepare_slides(args, slides):
    """{id: path} -> why slides failed [message]."""
    check(args.step % MASK == 0, f"--step {args.step}: give a multiple of {MASK}")
    started, table = time.time(), read_mpp_csv(args.mpp_csv, slides) if args.mpp_csv else {}
    masks = {file.stem: file for file in sorted(args.mask.iterdir())} if args.mask else {}
    encoder, made_by = open_encoder(args)
    slides = list(slides.items())[args.shard]
    jobs = [slide_job(args, name, path, table.get(name), masks.get(name), made_by) for name, path in slides]
    todo = [job for job in jobs if not is_done(args, job)]
    print(f"Found {count(len(jobs), 'slide')}, {len(jobs) - len(todo)} done already; {len(todo)} to prepare.")
    # A batch for the encoder, one a reader, and one that lies ready.
    memory = FORK.RawArray("B", (2 + args.workers) * BATCH * TILE * TILE * 4)
    surveyor, readers, plans = start_readers(1), start_readers(args.workers, memory), {}
    failures, notes, written = [], collections.defaultdict(list), []
    claims = None if args.dry_run else open(args.data / ".claims", "ab")  # noqa: SIM115
    bar = tqdm(todo, unit="slide", disable=not todo)
    for n, job in enumerate(bar):
        failure = None
        try:
            for i in range(n, min(n + 2, len(todo))):
                if i not in plans and (args.dry_run or claim(claims, todo[i]["name"])):
                    plans[i] = surveyor.submit(survey, args, todo[i])
            if n not in plans:
                notes["left to another run"].append(job["name"])
                continue
            plan = plans.pop(n).result()
            if args.dry_run:
                written.append(len(plan["coords"]))
                facts, tiles = plan["facts"], count(written[-1], "tile")
                tqdm.write(f"{job['name']}: {facts['mpp']:.6} um/px ({facts['mpp_source']}), {tiles}")
            elif not plan["done"]:
                written.append(prepare_slide(args, encoder, readers, memory, job, plan, bar))
            for note in plan["notes"]:
                notes[note].append(job["name"])
        except UserError as error:
            failure = str(error)
        except BrokenProcessPool:
            failure = f"{job['slide'][0]}: {DIED}"
            surveyor.shutdown()
            readers.shutdown()  # they write no more
            surveyor, readers, plans = start_readers(1), start_readers(args.workers, memory), {}
        failures += [failure] if failure else []
        if not args.dry_run:
            note_failure(args.data, job["name"], failure)
    tiles, seconds = sum(written), time.time() - started
    done = f"{count(tiles, 'tile')} of {count(len(written), 'slide')} in {seconds:.0f} s"
    print(f"{'Found' if args.dry_run else 'Wrote'} {done} ({tiles / seconds:.0f} tiles/s).")
    for note, names in notes.items():
        print(f"{count(len(names), 'slide')}, {note}: {few(names, 5)}")
    return failures


# ---- Features that were made elsewhere ----

MAKERS = {"tile_embeds": "GigaPath", "feats": "STAMP", "features": "TRIDENT or CLAM"}


def read_hdf5(path):
    """-> its datasets {name: tensor}, with all attributes."""
    import h5py

    with h5py.File(path) as file:
        found = dict(file.attrs)
        for name in file.keys() & {"features", "feats", "coords"}:
            inside = file[name].file == file and not (file[name].external or file[name].is_virtual)
            check(inside, f"{path}: its {name} lie in another file")
            # Torch knows no big-endian numbers.
            found |= {**file[name].attrs, name: torch.from_numpy(np.asarray(file[name], np.float64))}
    return found


def read_foreign(path):
    """-> (whose they are, features float16 [N,C], coords float64 [N,2], all that the file holds)."""
    with reading(path, "read are .pt and .h5 of features [N,C] and coords [N,2], or visual tokens"):
        found = read_hdf5(path) if path.suffix == ".h5" else wsi_llava.read_tensors(path)
        found = {"features": found} if isinstance(found, torch.Tensor) else found
        name = next((name for name in MAKERS if name in found), None)
        check(name, f"{path}: holds {list(found)[:5]}, none of {', '.join(MAKERS)}")
        features, coords = found[name].half(), found.get("coords")
        check(features.isfinite().all(), f"{path}: features not finite in half precision")
        shape = f"{path}: features {list(features.shape)}"
        features = features[None] if features.dim() == 1 else features.flatten(0, -2)  # also [1,N,C]
        if coords is None:
            check(len(features) == 576, f"{shape} without coords: not visual tokens [576,C]")
            return "visual tokens", features, torch.zeros(0, 2), found
        coords = coords.double().reshape(-1, 2)
        features = features if features.numel() else features[:0]  # a slide without tissue
        check(len(features) == len(coords), f"{shape}, and {len(coords)} coords")
        check(coords.isfinite().all(), f"{path}: coords not finite")
        return MAKERS[name], features, coords, found


def tiled_coords(path, coords, about, mpp, step):
    """A file's coords -> (their raster order [N], int32 [N,2] in that order, in tiled pixels)."""
    with reading(path, "its attributes are not those of TRIDENT or STAMP"):
        scale, apart = TARGET_MPP / (mpp or math.inf), 0  # from tile to tile, if the file says it
        if about.get("target_magnification"):  # TRIDENT's 20x is 0.5 um/px
            zoom = float(about["patch_size_level0"]) / float(about["patch_size"])
            scale = zoom * TARGET_MPP * float(about["target_magnification"]) / 10
            apart = float(about["patch_size_level0"]) - zoom * float(about.get("overlap", 0))
        elif "tile_size_um" in about:  # STAMP's, in um
            scale, apart = TARGET_MPP, float(about["tile_size_um"])
        check(scale, f"{path}: does not say the um/px of its coords; give --mpp")
        order = torch.from_numpy(np.lexsort(coords.numpy().T))  # y, then x
        coords = coords[order] / scale
        steps = coords.diff(dim=0)
        steps = steps[steps[:, 1] == 0, 0].round()  # the most frequent in rows
        apart = apart / scale or (steps.mode().values.item() if len(steps) else step)
        fits = abs(apart / step - 1) <= NATIVE
        check(fits, f"{path}: tiles {apart:.0f} px apart at {TARGET_MPP} um/px; mend --mpp or --step")
        # GigaPath pads a slide on all sides, by up to a tile.
        outside = -coords.amin(0).clamp(max=0) if len(coords) else torch.zeros(2)
        check(outside.max() <= step, f"{path}: coords more than a tile outside of the slide")
        coords = (coords + outside).round()
        wsi_llava.grid_cells(coords)
    return order, coords.int()


def import_file(args, name, path, mpp):
    """One slide's features -> whose they are. mpp: its um/px, if given."""
    kind, features, coords, about = read_foreign(path)
    old = wsi_llava.read_meta(args.data)["encoder"] if (args.data / "meta.json").exists() else {}
    width = features.shape[1] or old.get("width")
    check(width, f"{path}: no tiles, nor a width; import another slide first")
    info = {"source": f"imported: {kind}", "fingerprint": f"imported:{kind}:{width}", "width": width}
    if kind == "visual tokens":
        write_meta(args.data, args.preset or "7b", info | {"n_visual_tokens": len(features)})
        file = wsi_llava.slide_file(args.data / "visual_tokens", name)
        file.parent.mkdir(exist_ok=True)
        wsi_llava.write_tensors(file, {"visual_tokens": features}, {"made_by": info["source"]})
        return kind
    order, coords = tiled_coords(path, coords, about, mpp, args.step)
    write_meta(args.data, args.preset or "7b", info)
    facts = {"params": {"imported": kind, "file": str(path.resolve())}}
    file = wsi_llava.features_file(args.data, name)
    save_features(file, features.reshape(-1, width)[order], coords.numpy(), facts)
    return kind


def import_features(args):
    """--features: files, folders that hold them -> data/, and why some failed [message]."""
    files, failures, kinds = {}, [], collections.Counter()
    for entry in args.features:
        check(entry.exists(), f"{entry}: no such file or folder (--features)")
        found = [entry] if entry.is_file() else [*entry.glob("[!.]*.pt"), *entry.glob("[!.]*.h5")]
        check(found, f"{entry}: no .pt or .h5 file there; name their folder")
        for path in found:
            other = files.setdefault(path.stem, path)
            check(other == path, f"{other} and {path} have the same name; name one folder")
    table = read_mpp_csv(args.mpp_csv, files) if args.mpp_csv else {}
    for name, path in tqdm(sorted(files.items())[args.shard], unit="file"):
        failure = None
        try:
            kinds[import_file(args, name, path, table.get(name, args.mpp))] += 1
        except UserError as error:
            failure = str(error)
            failures.append(failure)
        note_failure(args.data, name, failure)
    print(f"Imported {dict(kinds)} of {count(len(files), 'file')}.")
    return failures


# ---- Questions ----

# A kind's name; its fields, in lower case, for the slide, the question (None: a report) and the answer
# ("conversations" are both). A row is of the first kind whose fields it has.
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
SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}


def words(value, what):
    """A text, or a number that stands for one; "" for pandas' nan."""
    if type(value) not in (str, int, float):
        raise ValueError(f"its {what} is no text: {json.dumps(value)[:60]}")
    str(value).encode()  # half a surrogate pair is no text
    return "" if str(value).strip().lower() in ("nan", "inf") else str(value)


def read_options(entry):
    """Options in a list, an object by letter, or columns A, B, C... -> {letter: text}."""
    options = entry.get("options") or entry.get("choices") or entry.get("choice") or {}
    if "a" in entry and not options:
        options = {letter: entry[letter.lower()] for letter in LETTERS if letter.lower() in entry}
    if isinstance(options, list):
        options = dict(itertools.zip_longest(LETTERS[: len(options)], options))
    if not isinstance(options, dict) or not set(options) <= set(LETTERS):
        raise ValueError("its options are neither a list of 26 nor named by letters")
    options = {letter: words(x, "option").strip() for letter, x in options.items() if x is not None}
    if all(re.match(rf"\(?{letter}[).:] ", text) for letter, text in options.items()):  # said already
        options = {letter: text.partition(" ")[2].strip() for letter, text in options.items()}
    return {letter: text for letter, text in options.items() if text}


def read_turns(entry, question, answer):
    """A row's fields -> its turns [{"from", "value"}]; an answer to options begins with its letter."""
    if question == "conversations":
        turns = [{"from": turn["from"], "value": words(turn["value"], "text")} for turn in entry[question]]
        if not turns or [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            raise ValueError("its conversations do not alternate human and gpt")
        return turns
    asked = words(entry[question], "question") if question else "Write a report of this slide."
    said, options = words(entry[answer], answer).strip(), read_options(entry)
    chosen = said.strip(" ().:").upper()
    for letter, text in options.items():
        asked += f"\n{letter}) {text}"
        if text.lower().split() == re.sub(rf"^\(?{letter}[).:] ", "", said).lower().split():
            chosen = letter
    if chosen in options:
        said = f"{chosen}) {options[chosen]}"
    letter = re.fullmatch(r"\(?([A-Z])[).]*", said)
    if letter and question and not re.search(rf"\b{letter[1]} *[).:]", asked):
        raise ValueError(f"its answer is {said!r}, and it has no such option")
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]


def read_row(entry, stem, number):
    """The number-th entry of a file -> a row, with "split" if it has one."""
    entry = {field.strip().lower(): value for field, value in entry.items()}
    fit = [kind for kind in QUESTION_KINDS if all(field in entry for field in kind[1:] if field)]
    if not fit:
        raise ValueError(f"its fields ({', '.join(entry)[:100]}) are of no kind that is read")
    kind, slide, question, answer = fit[0]
    names = entry[slide] if isinstance(entry[slide], list) else [entry[slide]]
    names = [words(name, "slide") for name in names]
    own_id = entry.get("question_id", None if slide == "id" else entry.get("id"))
    row = {"id": f"{stem}-{number}" if own_id is None else words(own_id, "id")}
    row["slide"] = names if kind == QUESTION_KINDS[0][0] else [slide_id(name) for name in names]
    # Stages 1 and 2 know reports by their task.
    report = not question or "caption" in stem.lower()
    row["task"] = "Report" if report else re.sub(r"^\d+_|_(test|train|val)$", "", stem)
    row["cancer"] = "".join(re.split(r"[/\\]", names[0])[-2:-1])
    for field in ("narrow category", "metadata", "task", "tumor", "cancer"):
        if type(entry.get(field)) in (str, int) and entry[field] != "":
            row["cancer" if field in ("tumor", "cancer") else "task"] = words(entry[field], field)
    row["conversations"] = wsi_llava.slide_first(read_turns(entry, question, answer))
    if entry.get("split"):
        if str(entry["split"]).lower() not in SPLITS:
            raise ValueError(f"its split is {entry['split']!r}, not train, val or test")
        row["split"] = SPLITS[str(entry["split"]).lower()]
    return row


def read_entries(path):
    """A list in JSON, an object {split: list}, JSON lines, or CSV -> its entries [(where, entry)]."""
    text, entries = path.read_bytes().decode("utf-8-sig").strip(), []
    check(text, f"{path}: empty; {WHAT_IS_READ}")
    if text[0] not in "[{":
        csv.field_size_limit(1 << 30)
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        for entry in table:
            whole = None not in entry and None not in entry.values()
            check(whole, f"{path}, line {table.line_num}: not as many columns as in line 1")
            entries.append((f"line {table.line_num}", entry))
        return entries
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        if text[0] == "[":
            raise
        for i, line in enumerate(text.split("\n"), 1):  # splitlines splits at U+2028, too
            with reading(f"{path}, line {i}", "not JSON"):
                entries += [(f"line {i}", json.loads(line))] if line.strip() else []
        return entries
    if isinstance(found, dict):
        if not all(name.lower() in SPLITS and isinstance(found[name], list) for name in found):
            return [("line 1", found)]
        found = [{"split": name} | entry for name in found for entry in found[name]]
    return [(f"item {i}", entry) for i, entry in enumerate(found, 1)]


def read_qa(path):
    """-> rows {"id","slide","task","cancer","conversations"}, with "split" if the file says it."""
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
        what = f"{count(len(left_out), 'row')} of several slides or with an empty text"
        print(f"{path}: left out {what}: {few(left_out)}", file=sys.stderr)
    check(rows, f"{path}: holds no questions; {WHAT_IS_READ}")
    return rows


def write_qa(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def match_slides(rows, have):
    """Rows with the slide of `have` in the place of the beginning of its name, as a patient's."""
    found = {}
    for name in dict.fromkeys(row["slide"] for row in rows):
        whole = re.compile(rf"{re.escape(name)}(?![^\W_])", re.I)  # 117 is no beginning of 1170
        matches = [name] if name in have else sorted(filter(whole.match, have), key=str.lower)
        found[name] = matches[0] if matches else name
        if len(matches) > 1:
            print(f"{name} is the beginning of {len(matches)} slides' names: took {matches[0]}")
    return [row | {"slide": found[row["slide"]]} for row in rows]


def patient_of(slide):
    """The patient's barcode in TCGA; else the slide's name."""
    barcode = re.match(r"TCGA-\w\w-\w{4}(?!\w)", slide, re.I)
    return barcode[0].upper() if barcode else slide


def import_qa(args):
    """--qa: files -> data/qa/<split>.jsonl, added or (--overwrite) in the place of what is there."""
    rows = {"train": [], "val": [], "test": []}
    for file in args.qa:
        found, name = read_qa(file), re.split("[^a-z]+", file.stem.lower())
        named = {args.split} if args.split else {SPLITS[word] for word in name if word in SPLITS}
        told = len(named) == 1 or all("split" in row for row in found)
        check(told, f"{file}: its name does not tell the split; give --split")
        for row in found:
            rows[row.pop("split", min(named, default=None))].append(row)
    changed = {split for split in rows if rows[split]}
    have = {path.stem for path in args.data.glob("*/*.safetensors")}
    for split in rows:
        path = args.data / "qa" / f"{split}.jsonl"
        keep = path.exists() and path.stat().st_size and not (args.overwrite and split in changed)
        found = match_slides([*(read_qa(path) if keep else []), *rows[split]], have)
        rows[split] = list({str([row["slide"], row["conversations"]]): row for row in found}.values())
    others = {patient_of(row["slide"]) for row in rows["test"] + rows["val"]}
    clean = [row for row in rows["train"] if patient_of(row["slide"]) not in others]
    leaks = len(rows["train"]) - len(clean)
    if others and rows["train"]:
        done = "left out" if args.drop_leaks else "--drop-leaks leaves them out"
        print(f"{count(leaks, 'question')} of training about patients of the test ({done})")
    if leaks and args.drop_leaks:
        rows["train"], changed = clean, changed | {"train"}
    for split in sorted(changed):
        slides = {row["slide"] for row in rows[split]}
        write_qa(args.data / "qa" / f"{split}.jsonl", rows[split])
        wrote = f"{count(len(rows[split]), 'question')} about {count(len(slides), 'slide')}"
        print(f"Wrote {wrote} to {split}.jsonl; {len(slides - have):,} have no features.")


# ---- The toy cohort: slides whose reports and questions are true of what is drawn ----

SIDE = 1536  # pixels of a toy slide: 6 x 6 tiles
# each type's colour, and the bumps of its texture across a slide
TYPES = {
    "adenocarcinoma": ((176, 104, 168), 48),
    "squamous cell carcinoma": ((214, 112, 146), 96),
    "small cell carcinoma": ((122, 78, 150), 192),
    "mucinous carcinoma": ((186, 190, 226), 24),
}
GRADES = {"grade 1": (0.15, 0.25), "grade 2": (0.42, 0.54), "grade 3": (0.76, 0.90)}  # of the tissue
SHARES = {"grade 1": "about a fifth", "grade 2": "about half", "grade 3": "most"}
QUADRANTS = {"upper left": (-1, -1), "upper right": (1, -1), "lower left": (-1, 1), "lower right": (1, 1)}


def noise(rng, cells, size=SIDE // 8):
    """A smooth random field float32 [size,size], mean 0, with about `cells` bumps across."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.BICUBIC))


def draw_slide(case):
    """-> (RGB image of what the case says, corners of the tiles with pigment)."""
    rng = np.random.default_rng(case["seed"])
    y, x = np.mgrid[: SIDE // 8, : SIDE // 8] / (SIDE // 8) * 2 - 1  # at an eighth
    tissue = np.hypot(x, y) < 0.86 + 0.05 * noise(rng, 5)
    dx, dy = QUADRANTS[case["position"]] * rng.uniform(0.36, 0.46, 2)
    necrosis = tissue & (np.hypot(x - dx, y - dy) < 0.36 + 0.03 * noise(rng, 8))
    field = noise(rng, 5) + 0.25 * noise(rng, 16)
    least = np.quantile(field[tissue & ~necrosis], 1 - rng.uniform(*GRADES[case["grade"]]))
    colour = np.full((*tissue.shape, 3), 244, np.float32)  # glass
    ground, bumps = TYPES[case["type"]]
    for where, rgb, cells in (
        (tissue, (235, 184, 204), 64),
        (tissue & (field > least), ground, bumps),
        (necrosis, (206, 198, 128), 12),
    ):
        colour[where] = (rgb + 9 * noise(rng, cells)[..., None])[where]
    colour = 255 * (colour.clip(0, 255) / 255) ** rng.uniform(0.85, 1.15)  # stain
    picture = Image.fromarray(colour.astype(np.uint8)).resize((SIDE, SIDE), Image.BILINEAR)
    draw, planted = ImageDraw.Draw(picture), []
    if case["focus"] == "present":  # in one or two tiles that hold tissue all over
        inside = np.argwhere(tissue.reshape(SIDE // TILE, 32, -1, 32).mean((1, 3)) > 0.95)
        for row, column in rng.permutation(inside)[: rng.integers(1, 3)]:
            planted.append([int(column) * TILE, int(row) * TILE])
            for x, y in np.add(planted[-1], TILE / 2) + rng.normal(0, 30, (80, 2)).clip(-64, 64):
                draw.ellipse((x - 8, y - 8, x + 8, y + 8), (109, 66, 22))
    return picture, planted


def draw_case(case, folder):
    """A picture whose dpi say its um/px -> corners of its tiles with pigment."""
    picture, planted = draw_slide(case)
    with replacing(folder / f"{case['slide']}.jpg") as temporary:
        picture.save(temporary, "JPEG", quality=85, dpi=(25400 / TARGET_MPP,) * 2)
    return planted


def invent_cases(train, test, seed):
    """What slides show: each value equally often, independently."""
    rng, cases = np.random.default_rng(seed), []
    values = {"type": TYPES, "grade": GRADES, "position": QUADRANTS, "focus": ("present", "absent")}
    for split, n in (("train", train), ("test", test)):
        orders = {finding: rng.permutation(np.arange(n) % len(values[finding])) for finding in values}
        for i in range(n):
            case = {"slide": f"demo_{len(cases):04d}", "split": split, "seed": int(rng.integers(2**31))}
            cases.append(case | {finding: list(values[finding])[orders[finding][i]] for finding in values})
    return cases


# task -> ways to ask, and the answer, filled in
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

REPORTS = (
    "The tumor is {a_type}. It takes up {share} of the tissue, which makes it {grade}. Necrosis is seen at "
    "the {position}. Brown pigment is {focus}.",
    "Sections show {a_type} of {grade} with necrosis at the {position}. A focus of brown pigment is {focus}. "
    "Tumor fills {share} of the tissue.",
    "Pigment, brown: {focus}. The {position} is necrotic. With {share} of the tissue taken up, this is "
    "{a_type}, {grade}.",
)


def write_questions(case, rng):
    """Rows about a slide: its report, a question of each kind, a dialogue of three."""
    words = case | {"a_type": f"{'an' if case['type'][0] in 'aeiou' else 'a'} {case['type']}"}
    words |= {"share": SHARES[case["grade"]], "yes_no": "Yes" if case["focus"] == "present" else "No"}
    talks, rows = {}, []
    for task, asked in ASKED.items():
        question, answer = rng.choice(asked.split("|")), ANSWERS.get(task) or rng.choice(REPORTS)
        answer = {"from": "gpt", "value": str(answer).format(**words)}
        talks[task] = [{"from": "human", "value": str(question)}, answer]
    order = rng.permutation(["type", "grade", "position", "focus"])[:3]
    talks["dialogue"] = list(itertools.chain(*(talks[task] for task in order)))
    for task, turns in talks.items():
        row = {"id": f"{case['slide']}-{task}", "slide": case["slide"], "task": task, "cancer": "demo"}
        rows.append(row | {"conversations": wsi_llava.slide_first(turns)})
    return rows


def draw_cohort(args, cases, folder):
    """Slides into the folder, questions into data/qa; notes where pigment is."""
    folder.mkdir(parents=True, exist_ok=True)
    with start_readers(args.workers) as pool:
        drawn = pool.map(draw_case, cases, itertools.repeat(folder), chunksize=4)
        for case, planted in zip(cases, tqdm(drawn, "Drawing toy slides", len(cases), unit="slide")):
            case["planted"] = planted
    for split in ("train", "test"):
        about = [case for case in cases if case["split"] == split]
        rows = [write_questions(case, np.random.default_rng(case["seed"] + 1)) for case in about]
        write_qa(args.data / "qa" / f"{split}.jsonl", itertools.chain(*rows))


def prepare_demo(args):
    """--demo: draws the cohort, unless it is there, and prepares it."""
    args.preset, folder, path = "demo", args.data / "slides", args.data / "cohort.json"
    recipe = {"train": args.demo, "test": args.demo // 5, "seed": args.seed}
    cases = invent_cases(**recipe)
    if path.exists():
        old = wsi_llava.read_json(path, "delete the folder").get("recipe")
        check(old == recipe, f"{args.data} holds another cohort, {old}; name another --data")
    else:
        own = (args.data / "meta.json").exists()
        check(not own, f"{args.data} holds data of your own; name another --data")
        draw_cohort(args, cases, folder)
        write_text(path, json.dumps({"recipe": recipe, "cases": cases}, indent=1))
    return prepare_slides(args, {case["slide"]: folder / f"{case['slide']}.jpg" for case in cases})


# ---- Flags and main ----


def share(text):
    """I/N -> every N-th, from the I-th on."""
    first, n = map(int, text.split("/"))
    if not 0 < first <= n:
        raise ValueError
    return slice(first - 1, None, n)


def parse(argv=None):
    parser = wsi_llava.Parser(__doc__)
    yes, paths = {"action": "store_true"}, {"nargs": "+", "type": Path}
    add = parser.group("what to prepare")
    add("--slides", "slides, or folders of them", **paths)
    add("--features", "features made elsewhere, or folders of them", **paths)
    add("--qa", f"question files; {WHAT_IS_READ}", **paths)
    demo = {"nargs": "?", "metavar": "N", "type": at_least(5), "const": 400}
    add("--demo", "N toy slides (default: 400), and a fifth more to test on", **demo)
    add("--dry-run", "list slides and tiles; write nothing", **yes)
    add("--overwrite", "make features, splits of questions, again", **yes)
    add("--shard", "one of N shares of the slides, as 3/16", metavar="I/N", type=share, default=slice(None))
    add = parser.group("slides and their tiles")
    add("--mpp", "um/px at level 0, where metadata do not say it", type=at_least(0.05, float, 20))
    add("--mpp-csv", "file of lines slide,mpp, which win over the slides")
    add("--min-tissue", "least share of a tile (default: 0.1)", type=at_least(0, float, 1), default=0.1)
    add("--mask", "folder of pictures or GeoJSON of what is tissue", type=Path)
    add("--step", "pixels from tile to tile (default: 256)", type=at_least(1), default=TILE)
    add("--max-tiles", "at most so many of a slide, drawn at random", type=at_least(0), default=0)
    add("--geojson", "also write the tiles for QuPath", **yes)
    gigapath = f"Prov-GigaPath's (default: {wsi_llava.GIGAPATH}/pytorch_model.bin)"
    add("--tile-encoder", gigapath, type=Path)
    add = parser.group("questions")
    add("--split", "if names or rows of files do not tell it", choices=["train", "val", "test"])
    add("--drop-leaks", "leave out of training what shares a patient with the test", **yes)
    wsi_llava.add_shared_flags(parser)
    return parser.parse_args(argv)


def with_defaults(args):
    """Another script's flags, completed by this one's defaults."""
    return type(args)(**(vars(parse([])) | vars(args)))


def main(argv=None):
    args = parse(argv)
    given = args.slides or args.features or args.qa or args.demo
    check(given, "give --slides, --features, --qa or --demo")
    check(not (args.dry_run and (args.demo or args.features or args.qa)), "--dry-run is for --slides alone")
    check(not args.mask or args.mask.is_dir(), f"--mask {args.mask}: no such folder")
    wsi_llava.resolve_device(args)
    failures = prepare_demo(args) if args.demo else []
    if args.features:
        failures += import_features(args)
    if args.slides:
        failures += prepare_slides(args, find_slides(args.slides))
    if (args.slides or args.demo) and not args.dry_run:
        write_index(args.data)
    if args.qa:
        import_qa(args)
    for message in failures:
        print(f"failed: {one_line(message, 2000)}", file=sys.stderr)
    check(not failures, f"{count(len(failures), 'slide')} could not be prepared; the others are done")


if __name__ == "__main__":
    wsi_llava.run(main, on_interrupt="interrupted; the same command goes on")
