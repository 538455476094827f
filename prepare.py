"""Slides -> tile features, question files -> one dataset: everything that train.py and sample.py read.

    python prepare.py --slides PATH...             slides, folders of slides, lists: tissue, tiles, features
    python prepare.py --features PATH...           the same from features that were made elsewhere
    python prepare.py --qa FILE... [--split test]  WSI-Bench's question files, either shape, into data/qa/
    python prepare.py --demo                       draws a cohort of toy slides, with reports and questions

A slide is cut into 256-px tiles at 0.5 um/px where there is tissue, and every tile becomes one vector:

    data/features/<slide>.safetensors   features float16 [N,C], coords int32 [N,2] (x, y, pixels as tiled)
    data/qc/<slide>.jpg                 thumbnail with the outlines of tissue and kept tiles: look at it
    data/qc/index.html                  all of these pictures on one page, and what failed
    data/failures/<slide>.json          why a slide could not be prepared

Interrupt it whenever you like, kill it, start it twice: a slide is done once its files are there, and whoever
works on a slide holds a lock that dies with the process.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import datetime
import errno
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
import string
import struct
import sys
import threading
import time
import urllib.parse
import zlib
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where two runs on one folder do the same work twice
    fcntl = None

import numpy as np
import openslide
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

import wsi_llava
from wsi_llava import TILE, UserError, at_least, check, count, feature_metadata, reading, replacing

TARGET_MPP = 0.5  # um/px; Prov-GigaPath was trained at it
NATIVE = 0.02  # pixels this close to the target's size, or to a whole fraction of it, are not resampled
MPP_RANGE = (0.05, 20)  # um/px of a slide; TIFFs that say 72 dpi mean nothing by it
GRID = 1000  # tiles along a side for which the slide encoder has positions
MASK = 32  # tiled pixels per pixel of the tissue mask: 8 x 8 mask pixels a tile
BLOCK = 4  # tiles along each side of a block: neighbours that are read one after the other
PICTURE = 768  # pixels along the longer side of the picture to look at
BATCH = 64  # tiles that pass the encoder together
DROPPED = 0.01  # a slide fails where more of its tiles, or of its thumbnail, cannot be decoded
SUFFIXES = "svs tif tiff ndpi mrxs scn bif vms vmu svslide dcm png jpg jpeg".split()
MICRONS = {"inch": 25400, "centimeter": 10000, "cm": 10000, "mm": 1000, "micron": 1, "um": 1, "nm": 0.001}
Image.MAX_IMAGE_PIXELS = None  # slides are larger than what Pillow takes for an attack


# ---- A slide at the target resolution ----------------------------------------------------------------------


def number(text):
    """What a file says, as a finite number; 0 where it says none."""
    try:
        value = float(text)
    except (TypeError, ValueError, ArithmeticError):  # Pillow's fractions can be 0/0
        return 0
    return value if math.isfinite(value) else 0


class Slide:
    """A slide seen as one image of width x height pixels at the tiled resolution.

    mpp: um per level-0 pixel, from `source`. scale: level-0 pixels per tiled pixel, exactly target / mpp. The
    argument mpp wins over what the file says; fallback: those of a file that says nothing. Raises UserError
    where the file is no slide or its um/px are unknown.
    """

    def __init__(self, path, mpp=None, target=TARGET_MPP, fallback=None):
        # The folder of an MRXS or DICOM slide lies beside the file, not beside a link to it.
        real = os.path.realpath(path)
        self.path, self.notes = path if Path(real).suffix != Path(path).suffix else real, []
        try:
            self.open()
        except Exception as error:  # what OpenSlide and Pillow raise over a damaged file is no short list
            said = wsi_llava.one_line(error)
            raise UserError(f"{path}: not a slide that OpenSlide can read ({said})") from None
        claimed = number(self.get("openslide.level[0].tile-width"))
        check(claimed <= 2**16, f"{path}: says that its tiles are {claimed:.0f} px wide; a damaged file")
        self.mpp, self.source = (mpp, "given") if mpp else self.own_mpp(path, fallback)
        self.scale = target / self.mpp
        self.width, self.height = (round(side / self.scale) for side in self.file.dimensions)
        large = f"{path}: {self.width} x {self.height} px at {target:g} um/px are over {GRID} x {GRID} tiles"
        check(max(self.width, self.height) <= GRID * TILE, f"{large}; --mpp-csv gives other um/px")
        self.downsamples = self.file.level_downsamples  # asked for once: the library counts anew each time
        self.scales = [self.level_scale(level) for level in range(self.file.level_count)]
        self.level = self.level_at(self.scale)
        self.zoom = self.scale / self.scales[self.level]  # level pixels per tiled pixel
        whole = max(1, round(self.zoom))
        self.average = whole if abs(self.zoom / whole - 1) <= NATIVE else None  # the same, if a whole number
        if self.source in ("objective power", "--mpp", "given"):
            self.notes.append(f"um/px taken from {self.source.replace('given', '--mpp-csv')}")
        if self.scale < 1 - NATIVE:
            self.notes.append("coarser than the target, enlarged")

    def open(self):
        """Opens the file, also anew: OpenSlide refuses everything after an error."""
        self.file = openslide.open_slide(self.path)
        self.get = self.file.properties.get

    def hash(self):
        """What tells this slide from others, wherever it lies: OpenSlide's hash; of a picture, its bytes'."""
        if quick := self.get("openslide.quickhash-1"):
            return quick
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def corner(self):
        """Level-0 (x, y) where the scanned area begins, as MRXS tells it: QuPath counts from there."""
        return [int(self.get(f"openslide.bounds-{axis}", 0)) for axis in "xy"]

    def own_mpp(self, path, fallback):
        """The um/px that the file says, or the fallback -> (um/px, where they are from)."""
        text, unit = self.get("tiff.ImageDescription") or "", self.get("tiff.ResolutionUnit")
        per_unit, written = [self.get("tiff.XResolution"), self.get("tiff.YResolution")], "TIFF tags"
        if isinstance(self.file, openslide.ImageSlide):  # a plain picture, which Pillow reads
            with Image.open(self.path) as image:
                text, unit, written = str(getattr(image, "tag_v2", {}).get(270, "")), "inch", "dpi"
                per_unit = image.info.get("dpi") or image.info.get("resolution") or (0, 0)
        per_unit = [number(side) or math.inf for side in per_unit]

        def microns(unit):  # the sign for micro is written in several ways
            return MICRONS.get(re.sub(r"[^\x00-\x7f]+|&#\w+;|\\u00b5", "u", unit.strip().lower()), 0)

        ome = dict(re.findall(r'PhysicalSize([XY](?:Unit)?)="([^"]*)"', text)[:4])
        imagej = re.search(r"^unit=(.+)$", text, re.MULTILINE) if text.startswith("ImageJ=") else None
        power = 10 / (number(self.get("openslide.objective-power")) or math.inf)  # 40x is about 0.25 um/px
        sources = {
            "OME-XML": [number(ome.get(side)) * microns(ome.get(f"{side}Unit", "um")) for side in "XY"],
            "ImageJ": [microns(imagej[1]) / side if imagej else 0 for side in per_unit],
            "metadata": [number(self.get("openslide.mpp-x")), number(self.get("openslide.mpp-y"))],
            written: [MICRONS.get(unit, 0) / side for side in per_unit],
            "objective power": [power, power],
        }
        found, says = {}, "its metadata has no um/px"
        for source, (wide, high) in sources.items():
            wide, high = wide or high, high or wide
            if MPP_RANGE[0] <= min(wide, high) and max(wide, high) <= MPP_RANGE[1]:
                found[source] = wide, high
            elif wide and source not in (written, "objective power"):
                says = f"its um/px are {wide:g} ({source}), not from 0.05 to 20"
        if re.search(r'<Image .*<Image |Size[ZT]="([2-9]|\d\d)', text, re.DOTALL):
            self.notes.append("of several scenes or focal planes, the first is read")
        if not found:
            check(fallback, f"{path}: {says}; give it with --mpp (0.25 is 40x, 0.5 is 20x) or --mpp-csv")
            return fallback, "--mpp"
        source, (wide, high) = next(iter(found.items()))
        oblong = f"{path}: its pixels are not square ({wide:g} x {high:g} um); give one number by --mpp-csv"
        check(abs(wide / high - 1) <= NATIVE, oblong)
        sizes = [wide for wide, _ in found.values()]
        if max(sizes) > 1.5 * min(sizes):
            self.notes.append(f"um/px by {' and '.join(found)} differ by more than 1.5 times; took the first")
        return (wide + high) / 2, source

    def level_scale(self, level):
        """Level-0 pixels per pixel of a level, one number for both sides; None where it cannot be told.

        OpenSlide's own is the mean of both sides' ratios: on a long strip it drifts, and where levels are
        padded to whole tiles (Philips' slides, and what is saved anew from them) it is of other places.
        """
        sides, size = self.file.dimensions, self.file.level_dimensions[level]
        tile = number(self.get(f"openslide.level[{level}].tile-width"))

        def padding(scale):
            return [part - whole / scale for part, whole in zip(size, sides)]

        longer = max(whole / part for part, whole in zip(size, sides) if whole == max(sides))
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
        """The tile whose corner is at (x, y), in tiled pixels -> uint8 [256,256,4].

        It lies where the exact scale puts it, to half a level pixel: no error adds up to the right. Where a
        tiled pixel is a whole number of level pixels, give or take 2%, it is their mean; otherwise the tile
        is resampled with Lanczos' filter, a margin that the filter reaches into read along.
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

    def size_at(self, pixel):  # of the whole slide, `pixel` tiled pixels a pixel
        return [max(1, round(side / pixel)) for side in (self.width, self.height)]

    def thumbnail(self, pixel):
        """The whole slide, `pixel` tiled pixels a pixel, read square by square: without small levels that
        takes time, and not memory. What cannot be decoded stays white, up to 1%."""
        picture, self.lost = Image.new("RGB", self.size_at(pixel), "white"), 0  # pixels of the picture
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
                check(not much, f"over {DROPPED:.0%} of its area cannot be decoded ({error})")
        return picture


# ---- Finding slides, and what they are called --------------------------------------------------------------


def walk(top):
    """Every folder below `top` -> (folder, its visible files, sorted). Follows links, and no folder twice."""

    def unreadable(error):
        print(f"{error.filename}: this folder cannot be read ({error.strerror}); left out", file=sys.stderr)

    seen = set()
    for folder, folders, files in os.walk(top, followlinks=True, onerror=unreadable):
        ours = {"qc"} if "meta.json" in files else set()  # pictures of an earlier run
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in set(folders) - ours if name[0] != ".")  # .snapshot, .Trash-1000
        paths = [Path(folder, name) for name in sorted(files) if name[0] != "."]
        yield Path(folder), [path for path in paths if path.is_file() or not path.exists()]  # no pipes


def dicom_tags(path):
    """A DICOM file's kind (SOP class), series, container and image type, where given -> {name: text}."""
    wanted = {(8, 0x16): "kind", (0x20, 0xE): "series", (0x40, 0x512): "container", (8, 8): "type"}
    tags, depth = {}, 0  # depth: of sequences, whose contents are passed over
    with contextlib.suppress(OSError, struct.error), open(path, "rb") as file:
        if file.read(132)[128:] != b"DICM":
            return tags
        while True:
            group, element, kind, length = struct.unpack("<HH2sH", file.read(8))
            if group == 0xFFFE:  # an item of a sequence, or an end
                depth -= element == 0xE0DD
                continue
            if kind in (b"OB", b"OD", b"OF", b"OL", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT"):
                (length,) = struct.unpack("<I", file.read(4))
            if group > 0x40 or (length == 0xFFFFFFFF and kind != b"SQ"):
                break
            if length == 0xFFFFFFFF:
                depth += 1
            elif not depth and (group, element) in wanted:
                tags[wanted[group, element]] = file.read(length).decode("latin-1").strip("\0 ")
            else:
                file.seek(length, os.SEEK_CUR)
    return tags


def dicom_slides(folder, files):
    """The slides of a folder's .dcm files -> [(name, path)]. A slide is a series: a file for each of its
    levels, perhaps label and macro too. Annotations and segmentations are series as well, and no slides."""
    slides, tags_of = {}, {path: dicom_tags(path) for path in files}
    for path, tags in tags_of.items():
        if tags.get("kind", "").endswith(".77.1.6"):  # VL Whole Slide Microscopy Image Storage
            label = "VOLUME" not in tags.get("type", "")
            slides.setdefault(tags.get("series", ""), []).append((label, path, tags.get("container")))
    if not slides:  # what can't be read as DICOM may be a damaged slide: its reader will say so
        return [(folder.name, path) for path in files if not tags_of[path]][:1]
    firsts = {series: min(slides[series], key=lambda item: item[:2]) for series in slides}
    names = [container or series for series, (_, _, container) in firsts.items()]
    names = names if len(set(names)) == len(names) else list(firsts)
    names = [f"{folder.name}_{name}" for name in names] if len(names) > 1 else [folder.name]
    return [(name, path) for name, (_, path, _) in zip(names, firsts.values())]


def few(names):
    """The first of many names, for people."""
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")


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
    """Folders (searched through), files, and .txt lists of both, one a line -> {slide id: path}, sorted. The
    id is the file's stem; a DICOM slide is a folder of .dcm files, named as the folder."""
    entries, found = [], {}
    for entry in map(Path, inputs):
        if entry.suffix.lower() == ".txt" and entry.is_file():
            lines = entry.read_text("utf-8-sig", "surrogateescape").splitlines()  # names as ls writes them
            entries += [(Path(line.strip()), entry) for line in lines if line.strip()]
        else:
            entries.append((entry, "--slides"))
    for entry, source in entries:
        check(entry.is_file() or entry.is_dir(), f"{entry}: no such file or folder ({source})")
        for folder, files in walk(entry) if entry.is_dir() else [(None, [entry])]:
            slides = [(path.stem, path) for path in files]
            if folder:
                endings = {path.suffix.lower() for path in files}
                known = {f".{suffix}" for suffix in SUFFIXES} - {".dcm"}
                known -= {".jpg"} if endings & {".vms", ".vmu"} else set()  # Hamamatsu's: parts of the slide
                slides = [(name, path) for name, path in slides if path.suffix.lower() in known]
                slides += dicom_slides(folder.resolve(), [p for p in files if p.suffix.lower() == ".dcm"])
            for name, path in slides:  # a slide may be named twice, by its folder and in a list
                found.setdefault((name, os.path.realpath(path)), (name, path))
    check(found, f"no slides below {', '.join(map(str, inputs))} (looked for .{', .'.join(SUFFIXES)})")
    return name_slides(found.values())


def read_mpp_csv(path, slides):
    """Lines of slide,mpp -> {slide id: um/px at level 0}, of these slides {id: path}. A slide is named by its
    id, its file or its path; the first line may be `slide,mpp`."""
    table, given, used = {}, {}, set()
    with reading(path, "--mpp-csv takes lines of slide,mpp"):
        rows = list(csv.reader(io.StringIO(Path(path).read_text("utf-8-sig"), newline="")))
    for line, row in enumerate(rows, 1):
        row = [cell.strip() for cell in row]
        if any(row) and (line > 1 or [cell.lower() for cell in row] != ["slide", "mpp"]):
            fits = len(row) == 2 and row[0] and MPP_RANGE[0] <= number(row[1]) <= MPP_RANGE[1]
            check(fits, f"{path}, line {line}: not slide,mpp with 0.05 to 20 um per pixel")
            again = f"{path}, line {line}: {row[0]} again, with {row[1]} and {table.get(row[0])} um/px"
            check(table.setdefault(row[0], number(row[1])) == number(row[1]), again)
    for name, file in slides.items():
        for key in (os.path.realpath(file), str(file), file.name, file.stem, name):
            if key in table:
                given[name] = table[key]  # by its id before all
                used.add(key)
    lost = [slide for slide in table if slide not in used]
    if lost:
        print(f"{path}: {count(len(lost), 'line')} about no slide here: {few(lost)}")
    return given


# ---- Tissue and tiles --------------------------------------------------------------------------------------
#
# Stain is measured against the slide's own glass, as optical density: what it takes of the light. Tissue is
# where it takes more of one colour than of another; glass, dust and black borders take all alike. Whatever
# else is on the slide, a dark control or a pen, has no say. Ink has colours that tissue rarely has (green and
# blue; a red that takes green and blue alike), and is smooth; a smooth colour that is most of what is stained
# is a stain all the same, unless it is smoother than any tissue.

WHITE = np.array((244.0, 244, 244))  # glass, where the slide shows none
STRIP = 2**18  # pixels that are looked at together: a thumbnail has 10 million
HALO = 12  # pixels that the median, roughness and ink reach into the next strip


def box_mean(x, r):
    """Mean over the (2r+1)^2 pixels around each of float [h,w]."""
    for _ in range(2):  # columns, then rows
        padded = np.pad(x, ((r, r), (0, 0)), mode="edge")
        x = sum(padded[i : i + len(x)] for i in range(2 * r + 1)).T / (2 * r + 1)
    return x


def roughness(x):
    """Standard deviation over the 5 x 5 pixels around each of float [h,w]."""
    return np.sqrt(np.maximum(0, box_mean(x * x, 2) - box_mean(x, 2) ** 2))


def strips(picture, every=1):
    """Every n-th strip of a picture -> (its rows, its pixels uint8 with a margin, where it lies in these)."""
    rows = max(HALO, STRIP // picture.width)
    for top in range(0, picture.height, rows * every):
        above = min(top, HALO)
        bottom = min(picture.height, top + rows)
        part = picture.crop((0, top - above, picture.width, min(picture.height, bottom + HALO)))
        pixels = np.asarray(part.filter(ImageFilter.MedianFilter(3)))
        yield slice(top, bottom), pixels, slice(above, above + bottom - top)


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
    if len(pixels) < 100:
        return glass, 0.03
    # Stain is what has more colour than the glass's own noise: 4.5 deviations of it (told by its median,
    # which a few stained pixels do not move).
    colour = np.ptp(np.log10(glass / pixels), axis=-1)
    noise = 1.4826 * np.median(abs(colour - np.median(colour)))
    return glass, float(np.clip(np.median(colour) + 4.5 * noise, 0.015, 0.06))


def find_glass(picture):
    """The colour of a slide's own glass -> (its RGB, or WHITE where none is seen; the least colour that is
    stain). Glass is bright, smooth, and what most of the brightest smooth pixels look like."""
    every = max(1, picture.width * picture.height // 2**19)
    rgb = np.concatenate([pixels[inside] for _, pixels, inside in strips(picture, every)]).astype(np.float32)
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
    """RGB thumbnail -> (tissue bool [h,w]; ink bool [h,w]; the share that is dark, without colour)."""
    glass, least = find_glass(picture)
    tables = [np.log10(side / np.arange(256).clip(1)).astype(np.float32) for side in glass]
    stained, inked = np.zeros((2, picture.height, picture.width), bool)
    grey = 0  # pixels
    rough_counts = np.zeros(101, int)  # of ink-coloured pixels, by roughness in thousandths of their density
    for rows, pixels, inside in strips(picture):
        r, g, b = (table[pixels[..., i]] for i, table in enumerate(tables))  # optical densities
        dark, most = (r + g + b) / 3, np.maximum(np.maximum(r, g), b)
        colour = most - np.minimum(np.minimum(r, g), b)
        high, low = pixels.max(-1), pixels.min(-1)
        black = (high < 25) | ((high < 75) & (high - low < high // 2))  # its colour is noise
        stained[rows] = ((colour > least) & (most > 0.02) & ~black)[inside]
        grey += ((dark > 0.1) & ~(colour > least))[inside].sum()
        # Ink takes little light of its own colour: green and blue most of the red, red ink green and blue.
        cold = (r > 0.12) & (r > g + 0.08) & (r > b + 0.05)
        red = (r < 0.13) & (g > 0.3) & (b > 0.72 * g)
        if (cold | red).any():
            rough, here = roughness(dark), (cold | red)[inside]
            thousandths = (1000 * rough[inside][here] / dark[inside][here]).clip(0, 100).astype(int)
            rough_counts += np.bincount(thousandths, minlength=101)
            smooth = (cold | red) & (rough < 0.004 + 0.036 * dark)  # a scanner's noise grows with density
            core = Image.fromarray(smooth.view(np.uint8) * 255).filter(ImageFilter.BoxBlur(3))
            core = core.point([0] * 255 + [255])  # smooth all around; its edges, which are not, come back
            inked[rows] = (np.asarray(core.filter(ImageFilter.BoxBlur(6))) > 0)[inside]
    inked &= stained
    smoother_than_tissue = rough_counts[:25].sum() > rough_counts.sum() / 2
    if inked.sum() > 0.4 * stained.sum() and not smoother_than_tissue:
        inked[:] = False
    return stained & ~inked, inked, grey / stained.size


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
        check(picture.mode[0] not in "IF", f"{path}: of more than 8 bits a pixel; save it with 8")
        if picture.mode in ("LA", "RGBA") and all(a == b for a, b in picture.getextrema()[:-1]):
            picture = picture.getchannel("A")
        # A photograph would exchange glass and tissue: it has colour, or greys of all kinds.
        small = picture.resize(size, Image.Resampling.NEAREST).convert("RGB")
        coloured = (np.ptp(np.asarray(small).astype(int), axis=-1) > 40).mean()
        greys = np.bincount(np.asarray(small.convert("L").filter(ImageFilter.MedianFilter(5))).ravel() // 8)
        kinds = (greys > 0.001 * greys.sum()).sum()
        seen = f"{path}: a picture of the slide, not a mask of few greys; {hint}"
        check(coloured <= 0.001 and kinds <= 8, seen)
        grey = picture.convert("L")
        marked = 127 if grey.getextrema()[1] > 127 else 0  # labels 0, 1, 2... are masks too
        grey = grey.point([0] * (marked + 1) + [255] * (255 - marked))
        return np.asarray(grey.resize(size, Image.Resampling.BOX)) > 127


def drawn_mask(path, slide, size):
    """The polygons of a GeoJSON, in level-0 pixels counted from the scanned area's corner -> bool [h,w]. What
    QuPath ignores (classes Ignore*, missing cores) is no tissue, also inside of other polygons."""
    found = json.loads(path.read_text(encoding="utf-8-sig"))
    features = found.get("features", [found]) if isinstance(found, dict) else found
    shapes = []  # (whether it is ignored, the rings of a polygon)
    for feature in features:
        about = feature.get("properties") or {}
        geometry = feature.get("geometry", feature if "coordinates" in feature else None)
        other = about.get("objectType") in ("tile", "cell", "detection")
        if other or not geometry or re.fullmatch("(Multi)?(Point|LineString)", geometry["type"]):
            continue
        check(geometry["type"] in ("Polygon", "MultiPolygon"), f"{path}: a {geometry['type']}, not a polygon")
        polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
        name = (about.get("classification") or {}).get("name") or ""
        ignored = name.startswith("Ignore") or bool(about.get("isMissing"))
        shapes += [(ignored, rings) for rings in polygons]
    check(shapes or not features, f"{path}: holds no polygons")
    mask, scale = Image.new("L", size), MASK * slide.scale
    for ignored, (outer, *holes) in sorted(shapes, key=lambda shape: shape[0]):
        value = 0 if ignored else 255
        part = Image.new("L", size) if holes else mask
        for ring, colour in ((outer, 255 if holes else value), *((hole, 0) for hole in holes)):
            # Pillow counts from pixel centres
            corners = (np.array(ring, float)[:, :2] + slide.corner) / scale - 0.5
            ImageDraw.Draw(part).polygon(corners.ravel().tolist(), colour)
        if holes:
            mask.paste(value, mask=part)
    return np.asarray(mask) > 0


def tissue_of(slide, thumbnail, given=None):
    """-> (bool [h,w]: tissue, by the mask that is given or by its colour; ink; why there may be none)."""
    if given:
        mask = given_mask(given, slide, thumbnail.size)
        return mask, np.zeros_like(mask), ""
    mask, ink, grey = find_tissue(thumbnail)
    return mask, ink, " (no colour: grey, silver and fluorescence slides need --mask)" if grey > 0.01 else ""


def tile_grid(mask, min_tissue, step=TILE):
    """Corners of the tiles with at least that share of tissue: int32 [N,2] (x, y) in tiled pixels, in raster
    order. The last tiles of rows and columns may reach beyond the slide, where all is white."""
    total = np.pad(mask, ((1, 0), (1, 0))).astype(np.int32)  # of the tissue above and left of each corner
    total.cumsum(0, out=total).cumsum(1, out=total)
    y, x = (np.arange(0, max(1, side * MASK - TILE + step), step) for side in mask.shape)
    top, left = np.rint(y / MASK).astype(int), np.rint(x / MASK).astype(int)
    bottom, right = top + TILE // MASK, left + TILE // MASK
    top, bottom = np.minimum([top, bottom], mask.shape[0])
    left, right = np.minimum([left, right], mask.shape[1])
    tissue = total[bottom][:, right] - total[bottom][:, left] - total[top][:, right] + total[top][:, left]
    rows, columns = np.nonzero(tissue >= min_tissue * (TILE // MASK) ** 2)
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
    draw = ImageDraw.Draw(picture, "RGBA")
    side = TILE / pixel
    for x, y in coords / pixel:
        edge = (30, 80, 255, 140) if side > 6 else None
        draw.rectangle((x, y, x + side, y + side), (30, 80, 255, 24), edge)
    for part, colour in ((ink, (220, 0, 0)), (mask, (0, 150, 60))):
        solid = Image.fromarray(part.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.BILINEAR)
        solid = solid.point([0] * 128 + [255] * 128)
        edge = np.asarray(solid) > np.asarray(solid.filter(ImageFilter.BoxBlur(2)))
        picture.paste(colour, mask=Image.fromarray(edge.astype(np.uint8) * 255))
    with replacing(path) as temporary:
        picture.save(temporary, "JPEG", quality=90)


def write_geojson(path, slide, coords):
    """The tiles for QuPath: a FeatureCollection of tile objects, squares in level-0 pixels."""
    about = {"classification": {"name": "Tile"}, "isLocked": True}
    tiles = [wsi_llava.geojson_tile(x, y, slide.scale, slide.corner, **about) for x, y in coords.tolist()]
    wsi_llava.write_text(path, json.dumps({"type": "FeatureCollection", "features": tiles}))


PAGE = """<!DOCTYPE html><meta charset="utf-8"><title>{title}</title><style>
figure {{ display: inline-block; vertical-align: top; width: 240px; overflow-wrap: anywhere }}
img {{ max-width: 240px; max-height: 240px }} .failed {{ outline: 3px solid #c00 }}
</style><h1>{title}</h1>
"""
CARD = """<figure class="{kind}"><a href="{href}"><img loading="lazy" src="{href}" alt=""></a><b>{name}</b>
<br>{text}</figure>
"""


def write_index(data):
    """data/qc/index.html: every slide's picture, name and number of tiles, what failed first."""
    failures, tiles, cards = read_failures(data), {}, []
    for path in (data / "features").glob("*.safetensors"):
        with contextlib.suppress(UserError):
            tiles[path.stem] = feature_metadata(path)["tiles"]
    for name in sorted({*tiles, *failures}, key=lambda name: (name not in failures, name)):
        kind, text = "", count(tiles.get(name, 0), "tile")
        if name in failures:
            kind, text = "failed", f"FAILED: {failures[name]['message']}"
        href = urllib.parse.quote(f"{name}.jpg")
        cards.append(CARD.format(kind=kind, href=href, name=html.escape(name), text=html.escape(text)))
    title = f"{count(len(cards), 'slide')}, {len(failures)} failed"
    wsi_llava.write_text(data / "qc" / "index.html", PAGE.format(title=title) + "".join(cards))


# ---- A folder of features, which several runs may work on --------------------------------------------------


def check_same(path, made, params):
    """Raises UserError where a file of features was made with other parameters."""
    for k in params | made:
        other = f"{path} was made with {k} {made.get(k)}, not {params.get(k)}"
        check(made.get(k) == params.get(k), f"{other}; --overwrite makes it again")


@functools.cache
def warn(text):  # once, however often it is called
    print(text, file=sys.stderr)


def claim(claims, name):
    """Whether this process alone may work on a slide from now on, until it closes the file or dies.

    claims: data/.claims, of which one byte is locked, at an offset that follows from the name: nothing is
    left to clean up. It is opened once: the first close of a file drops all of a process's locks on it.
    """
    offset = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
    try:
        if fcntl:
            fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # another process has it
            return False
        none = f"{claims.name}: its file system has no locks ({error.strerror})"
        warn(f"{none}; don't prepare the same slides in two runs at once")
    return True


def read_failures(data):
    """data/failures -> {slide: {"path", "message"}}."""
    failures, hint = {}, "not what prepare.py writes; delete it"
    for path in sorted((data / "failures").glob("*.json")):
        entry = wsi_llava.read_json(path, hint)
        with reading(path, hint):
            failures[str(entry["slide"])] = {"path": str(entry["path"]), "message": str(entry["message"])}
    return failures


def note_failure(data, name, path, message=None):
    """Puts a slide on the record of failures, or takes it off."""
    file = data / "failures" / f"{name}.json"
    if message:
        file.parent.mkdir(parents=True, exist_ok=True)
        wsi_llava.write_text(file, json.dumps({"slide": name, "path": str(path), "message": message}))
    else:
        file.unlink(missing_ok=True)


def write_meta(data, preset, encoder):
    """Makes the folder and its meta.json, or checks them -> what meta.json holds."""
    for folder in ("features", "qc", "qa"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    meta = {
        "version": wsi_llava.VERSION,
        "preset": preset,
        "tile_size": TILE,
        "mpp": TARGET_MPP,
        "encoder": encoder,
    }
    if not (data / "meta.json").exists():
        wsi_llava.write_text(data / "meta.json", json.dumps(meta, indent=2))
    old = wsi_llava.read_meta(data)  # perhaps another process's, which was faster
    was, now = (f"{made_by['source']}, {made_by.get('width')} wide" for made_by in (old["encoder"], encoder))
    same = old["encoder"]["fingerprint"] == encoder["fingerprint"] and old["mpp"] == TARGET_MPP
    other = f"{data} holds features of another tile encoder ({was}, {old['mpp']} um/px; not {now})"
    check(same, f"{other}; name a new folder with --data")
    return old


def open_data(args):
    """One folder holds the features of one tile encoder -> (data/meta.json, made or checked; the encoder)."""
    old = wsi_llava.read_meta(args.data) if (args.data / "meta.json").exists() else None
    if args.dry_run:
        return old or {"encoder": {"source": "", "fingerprint": None}}, None
    if old:  # by default, the encoder that made what is there
        args.preset, source = args.preset or old["preset"], old["encoder"]["source"]
        if source != "untrained" and not source.startswith("imported"):
            args.tile_encoder = args.tile_encoder or Path(source)
    encoder, source = wsi_llava.pick_tile_encoder(args)
    info = {"source": str(source or "untrained"), "fingerprint": wsi_llava.fingerprint(encoder)}
    info["width"] = encoder.cfg.width
    meta = write_meta(args.data, args.preset or ("7b" if source else "demo"), info)
    return meta, encoder.to(args.device, args.dtype)


def save_features(path, features, coords, metadata):
    # One entry: safetensors writes several in random order, and the same slide should give the same bytes.
    about = {"wsi_llava": json.dumps(metadata)}
    wsi_llava.write_tensors(path, {"features": features, "coords": coords}, about)


# ---- From slides to features -------------------------------------------------------------------------------
#
# Slides are opened in readers alone: processes, since a damaged file may take its process with it. A reader
# surveys a slide (what is there to read of it?), or reads a batch of tiles into memory that all processes
# share. The main process takes one slide after the other: it encodes its batches and writes its features,
# while the readers are at its next batches and survey the slides behind it.

# Forked, they share what is loaded, PyTorch too.
FORK = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
DIED = "the process that read it died (a damaged file, or no memory left)"
open_slide = functools.lru_cache(maxsize=2)(Slide)  # in each reader: the slide at hand, and the next one


def begin_reader(memory):
    """What a reader does first. memory: for tiles, shared by all; None where only results travel."""
    global shared
    shared = None if memory is None else np.frombuffer(memory, np.uint8).reshape(-1, TILE, TILE, 4)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word,
    parent = multiprocessing.parent_process()  # and so does the end of its parent, even by kill -9
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


def start_readers(n, memory=None):
    return ProcessPoolExecutor(n, FORK, begin_reader, (memory,))


def apart(path, function, *arguments):
    """Calls a function that opens the slide at `path` in a process of its own; UserError where that dies."""
    with start_readers(1) as readers:
        try:
            return readers.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError(f"{path}: {DIED}") from None


def slide_job(args, name, path, given, mask, encoder):
    """One slide of a run -> dict: its files, and the parameters that its features depend on. given, mask: its
    um/px by --mpp-csv and its file of --mask, or None."""
    digest, pictures = None, [args.data / "qc" / f"{name}.jpg"]
    if mask:
        with reading(mask, "a mask of --mask"):
            digest = hashlib.sha256(mask.read_bytes()).hexdigest()[:12]
    if args.geojson:
        pictures.append(args.data / "qc" / f"{name}.geojson")
    params = {"tile": TILE, "target_mpp": TARGET_MPP, "min_tissue": args.min_tissue, "mask": digest}
    params |= {"step": args.step, "max_tiles": args.max_tiles, "seed": args.seed if args.max_tiles else None}
    return {
        "name": name,
        "slide": (str(path), given, TARGET_MPP, args.mpp),  # what Slide takes
        "file": [os.path.abspath(path), os.path.getsize(path) if os.path.exists(path) else 0],
        "mask": mask,
        "params": params | {"encoder": encoder},
        "features": wsi_llava.features_file(args.data, name),
        "pictures": pictures,
    }


def is_done(args, job, digest=None):
    """Whether a slide's files are there: known by its path and size, or, once it is open, by its hash. Raises
    UserError where they are another slide's, or were made with other parameters."""
    if args.overwrite or not job["features"].exists():
        return False
    try:
        with reading(job["features"], "a damaged file"):
            made = feature_metadata(job["features"])
            old = made["params"] | {"mpp": made.get("mpp")}
            *file, known = made.get("file", [None, None, None])  # imported features have none
    except UserError:
        return False  # made again
    _, given, _, fallback = job["slide"]
    mpp = given or (fallback if made.get("mpp_source") == "--mpp" else None) or old["mpp"]
    check_same(job["features"], old, job["params"] | {"mpp": mpp})
    if digest is None:
        return file == job["file"] and all(path.exists() for path in job["pictures"])
    other = f"{job['features']}: features of another slide of this name; --overwrite replaces them"
    check(known == digest, other)
    return True


def survey(args, job, place):
    """In a reader: what there is to read of a slide -> dict; its pictures are drawn, and its first batch of
    tiles is read to the `place` in memory while the slide is open.

    Raises UserError, whatever is wrong with the slide, and OSError where a picture cannot be written.
    """
    try:
        slide = open_slide(*job["slide"])
        digest, notes = slide.hash(), list(slide.notes)
        done = is_done(args, job, digest)
        # One picture is read, for the mask and to look at: without small levels it takes minutes.
        pixel = max(slide.width, slide.height) / PICTURE
        picture = slide.thumbnail(MASK / max(1, round(MASK / pixel)))
        thumbnail = picture.resize(slide.size_at(MASK), Image.Resampling.BOX)
        mask, ink, why = tissue_of(slide, thumbnail, job["mask"])
        coords = tile_grid(mask, args.min_tissue, args.step)
        least = len(tile_grid(mask, 0.01, args.step))
        coords = draw_tiles(coords, job["name"], args.max_tiles, args.seed)
    except Exception as error:
        open_slide.cache_clear()  # a handle that has failed once fails for good
        reason, path = wsi_llava.one_line(error, 500), job["slide"][0]
        raise UserError(reason if path in reason else f"{path}: {reason}") from None
    if slide.lost:
        notes.append(f"some places (under {DROPPED:.0%}) not searched for tissue: they cannot be decoded")
    if ink.mean() > 0.001:
        notes.append("ink left out, outlined in red in data/qc (--mask decides otherwise)")
    if args.mask and not job["mask"]:
        notes.append("not in --mask, so tissue was looked for by its colour")
    if not len(coords):
        few_tiles = f"no tile reaches --min-tissue {args.min_tissue:g}; 0.01 would give {least}"
        notes.append((few_tiles if least else "no tissue found") + why)
    # All batches are full but the last: a feature's bits depend on the slide alone. Neighbours are read one
    # after the other: OpenSlide keeps the last 32 MB of the JPEG tiles that they share.
    order = np.lexsort((*coords.T, *(coords.T // (BLOCK * TILE))))
    batches = np.split(order, range(BATCH, len(order), BATCH))
    width, height = slide.file.dimensions
    facts = {"mpp": slide.mpp, "mpp_source": slide.source, "scale": slide.scale, "params": job["params"]}
    facts |= {"file": [*job["file"], digest], "width": width, "height": height}
    plan = {"coords": coords, "batches": batches, "facts": facts, "notes": [] if done else notes}
    size = f"{width} x {height} px, {slide.mpp:.6} um/px ({slide.source})"
    plan["line"] = f"{job['name']}: {size}, level {slide.level}, {count(len(coords), 'tile')}"
    if not args.dry_run:
        picture = picture.resize(slide.size_at(pixel), Image.Resampling.BICUBIC)
        draw_qc(job["pictures"][0], picture, pixel, mask, ink, coords)
        for path in job["pictures"][1:]:
            write_geojson(path, slide, coords)
        if not done:
            plan["first"] = read_tiles(job["slide"], coords[batches[0]], place)
    return plan


def read_tiles(slide, coords, place):
    """In a reader: tiles into the memory, from `place` on -> (place, which could be read, the last error)."""
    read, failed = [], None
    for n, (x, y) in enumerate(coords.tolist()):
        for _ in range(2):
            try:
                shared[place + len(read)] = open_slide(*slide).tile(x, y)
                read.append(n)
                break
            except Exception as error:  # OpenSlide refuses everything after one: opened anew
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
    coords, read, lost, path = plan["coords"], [], 0, job["slide"][0]
    features = [torch.empty(0, encoder.cfg.width, dtype=torch.float16, device=args.device)]
    tiles = torch.frombuffer(memory, dtype=torch.uint8).view(-1, TILE, TILE, 4)
    places = itertools.cycle(range((1 + args.workers) * BATCH, len(tiles), BATCH))
    ahead, coming = collections.deque(), iter(plan["batches"][1:])
    for numbers in plan["batches"]:
        for later in itertools.islice(coming, 1 + args.workers - len(ahead)):  # read while this is encoded
            ahead.append(readers.submit(read_tiles, job["slide"], coords[later], next(places)))
        place, kept, error = plan.pop("first", None) or ahead.popleft().result()
        lost += len(numbers) - len(kept)
        if lost > DROPPED * len(coords):
            concurrent.futures.wait(ahead)  # or they write to the memory when the next slide is there
            many = f"over {DROPPED:.0%} of its {len(coords)} tiles cannot be decoded ({error})"
            raise UserError(f"{path}: {many}")
        if kept:
            features.append(encode(encoder, tiles[place : place + len(kept)], args.device))
        read += numbers[kept].tolist()
        bar.set_postfix_str(f"{job['name'][:24]}, {len(read)} of {len(coords)} tiles")
    if lost:
        plan["notes"].append(f"some tiles (under {DROPPED:.0%}) left out that cannot be decoded")
    features = torch.cat(features).cpu()[np.argsort(read)]
    check(features.isfinite().all(), f"{path}: its features are not finite; try --dtype float32")
    facts = plan["facts"] | {"dropped": lost}
    save_features(job["features"], features, torch.from_numpy(coords[sorted(read)]), facts)
    return len(read)


def prepare_all(args, encoder, todo, claims):
    """The loop over slides. claims: see claim; None for a dry run -> failures [(path, message)], notes
    {text: names of slides}, tiles of each slide that was written."""
    failures, notes, written = [], collections.defaultdict(list), []
    places = 3 + 2 * args.workers  # each surveyed slide's first batch; those on their way and at the encoder
    memory = FORK.RawArray("B", places * BATCH * TILE * TILE * 4)
    readers, surveys, alone, n = start_readers(args.workers, memory), {}, False, 0
    with tqdm(total=len(todo), unit="slide", disable=not todo) as bar:
        while n < len(todo):
            name, path, failure = todo[n]["name"], todo[n]["slide"][0], None
            try:
                # Surveys of this slide, and of those behind it, unless another run is at work on them.
                for i in range(n, min(len(todo), n + 1 if alone else n + 1 + args.workers)):
                    if i not in surveys and (args.dry_run or claim(claims, todo[i]["name"])):
                        place = i % (1 + args.workers) * BATCH
                        surveys[i] = readers.submit(survey, args, todo[i], place)
                plan = surveys[n].result() if n in surveys else {"notes": ["left to another run"]}
                if "first" in plan:
                    written.append(prepare_slide(args, encoder, readers, memory, todo[n], plan, bar))
                elif args.dry_run:
                    tqdm.write(plan["line"])
                    written.append(len(plan["coords"]))
                for note in plan["notes"]:
                    notes[note].append(name)
            except (
                BrokenProcessPool
            ):  # this slide's fault, or that of one behind it: it is tried again, alone
                readers.shutdown()  # the other readers are ended, and write to the memory no more
                readers, surveys, alone = start_readers(args.workers, memory), {}, not alone
                if alone:
                    continue
                failure = f"{path}: {DIED}"
            except UserError as error:
                failure = str(error)
            except torch.OutOfMemoryError:
                full = f"{BATCH} tiles at once do not fit {args.device}'s memory; try --device cpu"
                raise UserError(full) from None
            if failure:
                failures.append((path, failure))
            if not args.dry_run and (failure or n in surveys):
                note_failure(args.data, name, path, failure)
            surveys.pop(n, None)
            alone, n = False, n + 1
            bar.update()
    readers.shutdown()
    return failures, notes, written


def prepare_slides(args, slides, number=0, shares=1):
    """All slides of {id: path}, or every `shares`-th from `number` on -> failures [(path, message)]."""
    started, claims = time.time(), None
    table = read_mpp_csv(args.mpp_csv, slides) if args.mpp_csv else {}
    (meta, encoder), slides = open_data(args), list(slides.items())[number::shares]
    masks = {file.stem: file for file in sorted(args.mask.iterdir())} if args.mask else {}
    facts = [(name, path, table.get(name), masks.get(name)) for name, path in slides]
    jobs = [slide_job(args, *fact, meta["encoder"]["fingerprint"]) for fact in facts]
    todo = {job["name"]: job for job in jobs if not is_done(args, job)}
    if meta["encoder"]["source"] == "untrained":
        print("No GigaPath weights found or named: a small untrained encoder serves, to try this out.")
    print(
        f"Found {count(len(jobs), 'slide')}, {len(jobs) - len(todo)} done already; {len(todo)} to tile at "
        f"{TARGET_MPP} um/px and encode on {args.device}, with {count(args.workers, 'reader')}."
    )
    with contextlib.ExitStack() as stack:
        if not args.dry_run:
            claims = stack.enter_context(open(args.data / ".claims", "ab"))
            names = {job["name"] for job in jobs}
            for half in itertools.chain(args.data.glob("features/.*.part"), args.data.glob("qc/.*.part")):
                name = half.name[1:].rsplit(".", 3)[0]  # .<slide>.<ending>.<at random>.part
                if name in names and claim(claims, name):  # nobody is at work on it: a kill left it
                    half.unlink(missing_ok=True)
        failures, notes, written = prepare_all(args, encoder, list(todo.values()), claims)
    tiles, seconds = sum(written), time.time() - started
    spent = f"{datetime.timedelta(seconds=round(seconds))} ({tiles / seconds:.0f} tiles/s)"
    what = f"{count(tiles, 'tile')} of {count(len(written), 'slide')}"
    print(f"Found {what}." if args.dry_run else f"Wrote {what} to {args.data}/features in {spent}.")
    for note, names in notes.items():
        print(f"{count(len(names), 'slide')}, {note}: {few(names)}")
    return failures


# ---- Features that were made elsewhere ---------------------------------------------------------------------

TOKENS = "visual tokens"  # the kind of a file that holds what a slide encoder made: [V,C], or one vector [C]
MAKERS = {"tile_embeds": "GigaPath", "feats": "STAMP", "features": "TRIDENT or CLAM"}
# Of CLAM's and TRIDENT's folders these tell less of a slide than one beside them.
LESSER = ("patches", "pt_files", "slide_features_")


def find_features(inputs):
    """Files, and folders to search, CLAM's and TRIDENT's as they are -> {slide id: path}, sorted."""
    found, endings = {}, (".pt", ".pth", ".h5", ".hdf5")
    for entry in inputs:
        check(entry.exists(), f"{entry}: no such file or folder (--features)")
        for folder, files in walk(entry) if entry.is_dir() else [(entry, [entry])]:
            files = [path for path in files if path.suffix.lower() in endings or path == entry]
            if files and folder != entry and folder.name.startswith(LESSER):
                print(f"Left out {folder}: a folder beside it tells more. Name it alone to take it.")
                continue
            for path in files:
                other = found.setdefault(path.stem, path)
                check(other == path, f"{other} and {path} have the same name; rename one, or name one folder")
    check(found, f"no .pt or .h5 files below {', '.join(map(str, inputs))}")
    return dict(sorted(found.items()))


def read_hdf5(path):
    """-> its datasets {name: tensor}; the attributes of the file and of these {name: plain value}."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: reading it needs h5py: pip install h5py") from None
    tensors = {}
    with h5py.File(path) as file:
        about = dict(file.attrs)
        for name in file.keys() & {"features", "feats", "coords"}:
            inside = file[name].file == file and not (file[name].external or file[name].is_virtual)
            check(inside, f"{path}: its {name} lie in another file; copy them into this one")
            # Float64 holds every coordinate; torch knows no big-endian numbers and few unsigned ones.
            tensors[name] = torch.from_numpy(np.asarray(file[name], np.float64))
            about |= file[name].attrs
    return tensors, {name: np.ravel(value)[0] for name, value in about.items() if np.size(value) == 1}


def read_foreign(path):
    """One file of features -> (its kind, features float16 [N,C], coords float64 [N,2] or None, attributes).

    A .pt holds a tensor, or a dict of features (GigaPath: tile_embeds) and coords; an .h5 features (STAMP:
    feats) and coords. Without coords they are visual tokens [576,C], or a slide's one vector [C].
    """
    with reading(path, "features are a .pt or .h5 of features [N,C] and coords [N,2], or visual tokens"):
        if path.suffix.lower() in (".h5", ".hdf5"):
            found, about = read_hdf5(path)
        else:
            found = wsi_llava.read_tensors(path)
            found = {"features": found} if isinstance(found, torch.Tensor) else found
            check(
                isinstance(found, dict),
                f"{path}: holds a {type(found).__name__}, neither a tensor nor a dict",
            )
            about = {name: value for name, value in found.items() if isinstance(value, (int, float, str))}
        name = next((name for name in MAKERS if name in found), None)
        check(name, f"{path}: holds keys {list(found)[:5]}, neither features, feats nor tile_embeds")
        for x in (found[name], found.get("coords", found[name])):
            plain = isinstance(x, torch.Tensor) and x.layout is torch.strided and not x.is_complex()
            check(plain, f"{path}: its {name} or coords are no plain tensor of numbers")
            values = x.half() if x is found[name] else x
            check(values.isfinite().all(), f"{path}: some values are not finite in half precision")
        kind, features, coords = MAKERS[name], found[name].half(), found.get("coords")
        vector = features.dim() == 1 or about.get("feat_type") in ("slide", "patient")
        if features.dim() == 3 and len(features) == 1:  # a batch of one slide
            features = features[0]
        coords = None if coords is None else coords.detach().double().reshape(-1, 2)
        if coords is not None and not len(coords):  # a slide without tissue
            features = features.reshape(0, features.shape[-1])
        elif vector or coords is None:  # TRIDENT's vectors come with the places of the tiles they are made of
            kind, coords, features = TOKENS, None, features.reshape(-1, features.shape[-1])
            bag = path.parent.name.startswith(("pt_files", "features_")) or len(features) not in (1, 576)
            bare = f"{path}: features {list(found[name].shape)} of tiles without coordinates"
            check(vector or not bag, f"{bare}; import the .h5 with both (visual tokens are [576,C] or [C])")
        n = len(features) if coords is None else len(coords)
        fits = features.dim() == 2 and n == len(features)
        check(fits, f"{path}: features {list(features.shape)} and {n} coords are not [N,C] and [N,2]")
    return kind, features, coords, about


def tiled_coords(path, coords, about, given, args):
    """A file's coordinates -> (their raster order [N], int32 [N,2] in that order, in tiled pixels).

    given: the slide's um/px by --mpp-csv, or None. Raises UserError where the scale is not known, or makes
    tiles that do not lie --step apart: it is wrong, or the tiles are of another resolution.
    """
    with reading(path, "its attributes are not those of TRIDENT or STAMP"):
        tile, pixels = (float(about.get(name, 0)) for name in ("patch_size_level0", "patch_size"))
        zoom, magnification = tile / (pixels or 1), float(about.get("target_magnification", 0))
        step = tile - zoom * float(about.get("overlap", 0))
        scale = TARGET_MPP / (given or args.mpp or math.inf)
        if "tile_size_um" in about or about.get("unit") == "um":  # STAMP's coordinates are in um
            scale, step = TARGET_MPP, float(about.get("tile_size_um", 0))
        elif zoom > 0 and magnification > 0 and not given:  # 20x is 0.5 um/px there
            scale = zoom * TARGET_MPP * magnification / 10
        check(scale, f"{path}: does not say the um/px of its coordinates (level 0); give --mpp or --mpp-csv")
        order = torch.from_numpy(np.lexsort(coords.numpy().T))  # y, then x
        coords, step = coords[order] / scale, step / scale
        if not step:  # the file does not say: what lies most often between neighbours of a row
            steps = coords.diff(dim=0)
            steps = steps[steps[:, 1] == 0, 0].round()
            step = steps.mode().values.item() if len(steps) else args.step
        apart = f"{path}: its tiles lie {step:.0f} px apart at {TARGET_MPP} um/px, not {args.step}"
        check(abs(step / args.step - 1) <= NATIVE, f"{apart}: the wrong --mpp, or give --step {step:.0f}")
        # GigaPath pads a slide on all sides to whole tiles: the first may lie up to a tile outside; all move.
        outside = -coords.amin(0).clamp(max=0) if len(coords) else torch.zeros(2)
        check(outside.max() <= step, f"{path}: negative coordinates, more than a tile outside of the slide")
        coords = (coords + outside).round()
        wsi_llava.grid_cells(coords)
    return order, coords.int()


def import_file(args, name, path, given, encoder):
    """One slide's features from elsewhere -> their kind. given: its um/px by --mpp-csv, or None. encoder:
    what meta.json is to say of the one that --tile-encoder names, or None."""
    check(len(os.fsencode(name)) <= 200, f"{path}: its name is too long for a file beside it; rename it")
    kind, features, coords, about = read_foreign(path)
    old = wsi_llava.read_meta(args.data)["encoder"] if (args.data / "meta.json").exists() else {}
    n, width = features.shape
    if not n:
        width = old.get("width", width)
        check(width, f"{path}: has no tiles, nor a width; import it again after another slide")
        features = features.new_zeros(0, width)
    info = {"source": f"imported: {kind}", "fingerprint": f"imported:{kind}:{width}", "width": width}
    if kind == TOKENS:  # a model takes as many of every slide
        info["n_visual_tokens"] = there = old.get("n_visual_tokens", n)
        check(there == n, f"{path}: {n} visual tokens, but {args.data} holds {there} of every slide")
        write_meta(args.data, args.preset or "7b", info)
        file = args.data / "visual_tokens" / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        wsi_llava.write_tensors(file, {"visual_tokens": features}, {"made_by": info["source"]})
        return kind
    order, coords = tiled_coords(path, coords, about, given, args)
    info, file = encoder or info, wsi_llava.features_file(args.data, name)
    check(info["width"] == width, f"{path}: {width} wide, and --tile-encoder makes {info['width']}")
    write_meta(args.data, args.preset or "7b", info)
    params = {"imported": kind, "target_mpp": TARGET_MPP, "mpp": given or args.mpp}
    params |= {"encoder": info["fingerprint"], "file": [str(path.resolve()), path.stat().st_size]}
    if file.exists() and not args.overwrite:
        check_same(file, feature_metadata(file)["params"], params)
    else:
        save_features(file, features[order], coords, {"params": params})
    return kind


def import_features(args, number=0, shares=1):
    """--features -> data/features or data/visual_tokens, and the failures [(path, message)]."""
    failures, kinds, encoder, files = [], collections.Counter(), None, find_features(args.features)
    table = read_mpp_csv(args.mpp_csv, files) if args.mpp_csv else {}
    if args.tile_encoder:
        model = wsi_llava.load_tile_encoder(args.tile_encoder)
        encoder = {"source": str(args.tile_encoder), "fingerprint": wsi_llava.fingerprint(model)}
        encoder["width"] = model.cfg.width
    for name, path in tqdm(list(files.items())[number::shares], unit="file"):
        failure = None
        try:
            kinds[import_file(args, name, path, table.get(name), encoder)] += 1
        except UserError as error:
            failure = str(error)
            failures.append((path, failure))
        note_failure(args.data, name, path, failure)
    what = ", ".join(f"{count(n, 'slide')} of {kind}" for kind, n in kinds.items()) or "nothing"
    print(f"Imported {what} of {count(len(files), 'file')}.")
    return failures


# ---- Questions ---------------------------------------------------------------------------------------------

# What is read: a kind's name, and its fields, in lower case, for a row's slide, question (None: a report) and
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
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
FILE_ENDING = rf"(\.({'|'.join(SUFFIXES)}|pth?|h5|hdf5|csv|npy|safetensors))+$"


def words(value, what):
    """A text, or a number that stands for one; pandas writes nan for an empty one. None is none: "None" would
    be taught as the truth."""
    value = str(value) if type(value) in (int, float) and abs(value) != math.inf else value
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise ValueError(f"its {what} is no text: {json.dumps(value)[:60]}")  # nor is half a surrogate pair
    return "" if value.strip().lower() == "nan" else value


def slide_id(value):
    """A slide as files name it -> its id: less its folders, Windows' too, and its endings, in any case."""
    name = re.sub(FILE_ENDING, "", re.split(r"[/\\]", value.strip())[-1], flags=re.I)
    if not name:
        raise ValueError(f"its slide is {value!r}, no name")
    return name


def read_closed(entry, question, answer):
    """A question and its answer with the row's options (a list, an object by letter, columns A, B, C...), if
    there are any -> (the question, an option a line; the answer, its letter first)."""
    letters = string.ascii_uppercase
    options = next((entry[field] for field in ("options", "choices", "choice") if entry.get(field)), None)
    if options is None and "a" in entry:
        options = {letter: entry[letter.lower()] for letter in letters if letter.lower() in entry}
    if isinstance(options, list):
        options = dict(itertools.zip_longest(letters[: len(options)], options))
    options = options or {}
    if not isinstance(options, dict) or not set(options) <= set(letters):
        raise ValueError("its options are neither a list of 26 at most nor named by letters")
    options = {letter: words(text, "option").strip() for letter, text in options.items() if text is not None}
    said_already = all(re.match(rf"\(?{letter}[).:] ", text) for letter, text in options.items())
    chosen = answer.strip(" ().:").upper()
    for letter, text in options.items():
        text = text[text.index(" ") :].strip() if said_already else text
        question += f"\n{letter}) {text}" if text else ""
        options[letter] = text
        if text.lower().split() == re.sub(rf"^\(?{letter}[).:] ", "", answer.strip()).lower().split():
            chosen = letter
    return question, f"{chosen}) {options[chosen]}" if options.get(chosen) else answer


def read_turns(entry, question, answer):
    """A row's fields -> its turns [{"from", "value"}]. question, answer: as in QUESTION_KINDS."""
    if question == "conversations":
        turns = [{"from": turn["from"], "value": words(turn["value"], "text")} for turn in entry[question]]
    else:
        asked = words(entry[question], "question") if question else "Write a report of this slide."
        asked, said = read_closed(entry, asked, words(entry[answer], answer))
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    if not turns or [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError("is malformed: conversations must alternate human and gpt")
    for asked, said in zip(turns[::2], turns[1::2]):
        letter = re.fullmatch(r"\(?([A-Z])[).]*", said["value"].strip())
        closed = letter and question not in (None, "conversations")
        if closed and not re.search(rf"\b{letter[1]} *[).:]", asked["value"]):
            raise ValueError(f"its answer is {said['value']!r}, and it has no such option")
    return turns


def read_row(entry, stem, number):
    """The number-th entry of a file -> a row of the dataset, with "split" where the entry has one. Raises
    ValueError, or what Python raises over other types than expected."""
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
    for name, fields in (("task", ("narrow category", "metadata", "task")), ("cancer", ("tumor", "cancer"))):
        for field in fields:  # objects and lists are passed over
            if type(entry.get(field)) in (str, int) and entry[field] != "":
                row[name] = words(entry[field], field)
    row["conversations"] = wsi_llava.slide_first(read_turns(entry, question, answer))
    if entry.get("split"):
        row["split"] = SPLITS.get(str(entry["split"]).lower())
        if not row["split"]:
            raise ValueError(f"its split is {entry['split']!r}, not train, val or test")
    return row


def parse_json(path, text, line=1):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg})") from None


def read_csv(path, text):
    """A table whose first line names its columns -> [(where, {column: text})]."""
    csv.field_size_limit(1 << 30)  # a report may be longer than the module expects
    named = re.match("sep=(.)\r?\n", text)  # as spreadsheets tell it
    lines = io.StringIO(text[named.end() :] if named else text, newline="")
    delimiter = named[1] if named else max(",;\t", key=text.partition("\n")[0].count)
    reader, entries = csv.DictReader(lines, strict=True, delimiter=delimiter), []
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
    first = {}  # of an object of many lines
    with contextlib.suppress(json.JSONDecodeError):
        first = json.loads(next(filter(str.strip, lines)))
    if any(field.lower() not in SPLITS for field in first):
        numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
        return [(f"line {i}", parse_json(path, line, i)) for i, line in numbered]
    entries = []
    for split, part in parse_json(path, text).items():
        check(isinstance(part, list), f"{path}: '{split}' is no list of rows, one a split; {WHAT_IS_READ}")
        entries += [(f"{split}, item {i}", {"split": split} | entry) for i, entry in enumerate(part, 1)]
    return entries


def read_qa(path):
    """One file of questions, of any of QUESTION_KINDS -> rows {"id","slide","task","cancer","conversations"},
    with "split" where the file says it. Rows about several slides or with an empty text are left out, and
    counted. Raises UserError that names the line or the item."""
    path, rows, left_out = Path(path), [], collections.defaultdict(list)
    check(path.is_file(), f"{path}: no such file; python prepare.py --qa FILE... reads questions")
    with reading(path, WHAT_IS_READ):
        entries = read_entries(path)
    for number, (where, entry) in enumerate(entries, 1):
        with reading(f"{path}, {where}", WHAT_IS_READ):
            row = read_row(entry, path.stem, number)
        if len(set(row["slide"])) != 1:
            left_out["about several slides"].append(where)
        elif not all(wsi_llava.without_image(turn["value"]).strip() for turn in row["conversations"]):
            left_out["with an empty text"].append(where)
        else:
            rows.append(row | {"slide": row["slide"][0]})
    for what, places in left_out.items():
        print(f"{path}: left out {count(len(places), 'row')} {what}, the first: {places[0]}", file=sys.stderr)
    check(rows, f"{path}: holds no questions; {WHAT_IS_READ}")
    return rows


def write_qa(path, rows):
    wsi_llava.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def match_slides(rows, have):
    """Rows with the slide of `have` in the place of a name that it begins with: a slide's barcode finds it, a
    patient's the first of hers, which is said. What is not there keeps its name."""
    beginnings, found = collections.defaultdict(list), []
    for name in sorted(have, key=str.lower):
        for word in re.finditer(r"[^\W_]+", name):  # 117 is no beginning of 1170
            beginnings[name[: word.end()].lower()].append(name)
    for row in rows:
        name = row["slide"]
        matches = [name] if name in have else beginnings.get(name.lower(), [name])
        found.append(row | {"slide": matches[0]})
        if len(matches) > 1:
            warn(f"{name} is the beginning of {len(matches)} slides' names: took {matches[0]}")
    return found


def named_split(path):
    """The split that a file's name tells, between any separators and in any case, or None."""
    name = Path(path).stem.lower()
    if re.search("open[-_ ]question|report[-_ ]only", name):  # WSI-Bench's own names
        return "test"
    named = {SPLITS[word] for word in re.split("[^a-z]+", name) if word in SPLITS}
    return named.pop() if len(named) == 1 else None


def patient_of(slide):
    """The patient's barcode at the head of a slide's name in TCGA; of any other, the name."""
    barcode = re.match(r"TCGA-\w\w-\w{4}(?!\w)", slide, re.I)
    return barcode[0].upper() if barcode else slide


def find_leaks(train, others, drop):
    """Says which patients training shares with test and validation -> training's rows about no such."""
    shared = {patient_of(row["slide"]) for row in train} & {patient_of(row["slide"]) for row in others}
    clean = [row for row in train if patient_of(row["slide"]) not in shared]
    both = count(len(shared), "patient")
    if shared:
        both += f" ({few(sorted(shared))}), {len(train) - len(clean):,} questions of training: "
        both += "left out of it" if drop else "--drop-leaks leaves them out"
    print(f"On both sides of training and test: {both}.")
    return clean


def import_qa(args):
    """--qa: question files -> data/qa/<split>.jsonl, added to what is there or (--overwrite) in its place."""
    new, splits, failures = collections.defaultdict(list), {}, 0
    for file in args.qa:
        try:
            rows, split = read_qa(file), args.split or named_split(file)
            tells = split or all("split" in row for row in rows)
            check(tells, f"{file}: its name does not tell the split; give --split train, val or test")
            for row in rows:
                new[row.pop("split", split)].append(row)
        except UserError as error:
            if len(args.qa) == 1:
                raise
            print(f"failed: {wsi_llava.one_line(error, 2000)}", file=sys.stderr)
            failures += 1
    paths = {name: args.data / "qa" / f"{name}.jsonl" for name in ("train", "val", "test")}
    have = {path.stem for path in args.data.glob("features/*.safetensors")}
    have |= {path.stem for path in args.data.glob("visual_tokens/*.safetensors")}
    for name, path in paths.items():
        keep = path.exists() and path.stat().st_size and not (args.overwrite and name in new)
        rows, unique = match_slides([*(read_qa(path) if keep else []), *new[name]], have), {}
        for row in rows:
            unique.setdefault((row["slide"], *(turn["value"] for turn in row["conversations"])), row)
        splits[name] = list(unique.values())
        if len(unique) < len(rows):
            print(f"{count(len(rows) - len(unique), 'doubled question')} of {name} left out.")
    changed = {name for name in paths if new[name]}
    if changed and splits["train"] and splits["test"] + splits["val"]:
        clean = find_leaks(splits["train"], splits["test"] + splits["val"], args.drop_leaks)
        if args.drop_leaks and len(clean) < len(splits["train"]):
            splits["train"], changed = clean, changed | {"train"}
    for name in sorted(changed):
        rows, slides = splits[name], {row["slide"] for row in splits[name]}
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        write_qa(paths[name], rows)
        lack = sorted(slides - have)
        lack = f"; {len(lack):,} of these have no features: {few(lack)}" if lack else ""
        wrote = f"{count(len(rows), 'question')} about {count(len(slides), 'slide')}"
        print(f"Wrote {wrote} to {paths[name]}{lack}.")
    check(
        not failures, f"{count(failures, 'question file')} could not be read, see above; the others are done"
    )


# ---- The toy cohort: slides whose reports and questions are true of what is drawn --------------------------

SIDE = 1536  # pixels of a toy slide, at 0.5 um/px: 6 x 6 tiles
# each type's colour between the nuclei of the tumour; pixels from one nucleus to the next, their radius
TYPES = {
    "adenocarcinoma": ((214, 160, 200), 84, 5.5),
    "squamous cell carcinoma": ((228, 138, 168), 34, 7),
    "small cell carcinoma": ((186, 160, 206), 17, 6),
    "mucinous carcinoma": ((206, 212, 234), 92, 6),
}
# the tumour's share of the tissue, as a number and in words
GRADES = {
    "grade 1": ((0.15, 0.25), "about a fifth"),
    "grade 2": ((0.42, 0.54), "about half"),
    "grade 3": ((0.76, 0.90), "most"),
}
QUADRANTS = {"upper left": (-1, -1), "upper right": (1, -1), "lower left": (-1, 1), "lower right": (1, 1)}
SUBTYPES = {
    ("positive", "negative"): "luminal A",
    ("positive", "positive"): "luminal B",
    ("negative", "positive"): "HER2-enriched",
    ("negative", "negative"): "basal-like",
}
NUCLEUS, LUMEN = (112, 72, 146), (246, 240, 246)


def noise(rng, cells, size=SIDE // 8):
    """A smooth random field float32 [size,size], mean 0, with about `cells` bumps across."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def scatter(rng, mask, spacing):
    """Jittered grid points (x, y) in full pixels where the mask (at SIDE / 8) is True."""
    grid = np.stack(np.meshgrid(np.arange(0, SIDE, spacing), np.arange(0, SIDE, spacing)), -1).reshape(-1, 2)
    points = (grid + rng.uniform(0, spacing, grid.shape)).clip(0, SIDE - 1)
    return points[mask[points[:, 1].astype(int) // 8, points[:, 0].astype(int) // 8]]


def dots(rng, draw, points, radius, colour):
    """A dot at each point, of about that radius and colour."""
    sizes, shades = radius * rng.uniform(0.85, 1.15, len(points)), rng.uniform(-14, 14, len(points))
    for (x, y), size, shade in zip(points, sizes, shades):
        draw.ellipse((x - size, y - size, x + size, y + size), tuple(int(c + shade) for c in colour))


def draw_tumour(rng, draw, kind, tumour):
    """The nuclei of a tumour, in the arrangement that is its type's."""
    _, spacing, radius = TYPES[kind]
    centres = scatter(rng, tumour, spacing)
    if kind == "adenocarcinoma":  # glands: a lumen in a ring of nuclei
        dots(rng, draw, centres, 22, LUMEN)
        angles = np.linspace(0, 2 * math.pi, 17)[:-1]
        ring = 29 * np.stack([np.cos(angles), np.sin(angles)], -1)
        dots(rng, draw, (centres[:, None] + ring).reshape(-1, 2), radius, NUCLEUS)
    elif kind == "mucinous carcinoma":  # clusters that float in pools of mucin
        cluster = rng.normal(0, 11, (len(centres), 7, 2))
        dots(rng, draw, (centres[:, None] + cluster).reshape(-1, 2), radius, NUCLEUS)
    elif kind == "small cell carcinoma":  # crowded, small, dark
        dots(rng, draw, centres, radius, (78, 38, 112))
    else:  # sheets with keratin pearls
        dots(rng, draw, centres, radius, NUCLEUS)
        for x, y in scatter(rng, tumour, 150):
            for size, shade in ((34, 0), (26, 22), (18, 0), (10, 22)):
                draw.ellipse((x - size, y - size, x + size, y + size), (240 - shade, 104 + shade, 128))


def draw_slide(case, path=None):
    """A round piece of tissue, in it a tumour whose texture is the type and whose share is the grade, a
    necrosis in one quadrant, and pigment or none -> (RGB image, or None where it is written to a path; the
    corners of the tiles that hold the pigment)."""
    rng = np.random.default_rng(case["seed"])
    y, x = np.mgrid[: SIDE // 8, : SIDE // 8] / (SIDE // 8) * 2 - 1
    tissue = np.hypot(x, y) < 0.86 + 0.05 * noise(rng, 5)
    dx, dy = QUADRANTS[case["position"]] * rng.uniform(0.36, 0.46, 2)
    necrosis = tissue & (np.hypot(x - dx, y - dy) < 0.29 + 0.03 * noise(rng, 8))
    viable = tissue & ~necrosis
    field = noise(rng, 5) + 0.25 * noise(rng, 16)
    tumour = viable & (field > np.quantile(field[viable], 1 - rng.uniform(*GRADES[case["grade"]][0])))

    colour = np.full((*tissue.shape, 3), 244, np.float32)  # glass
    ground = TYPES[case["type"]][0]
    for region, rgb in ((viable, (235, 184, 204)), (tumour, ground), (necrosis, (216, 190, 178))):
        colour[region] = rgb
    colour += (tissue * (5 * noise(rng, 12) + 5 * noise(rng, 64)))[..., None]
    picture = Image.fromarray(colour.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))
    picture = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)

    draw = ImageDraw.Draw(picture)
    for x, y in scatter(rng, viable & ~tumour, 46):  # fibroblasts: few, slender
        dx, dy = rng.uniform(-9, 9, 2)
        draw.line((x - dx, y - dy, x + dx, y + dy), (118, 76, 150), width=5)
    dots(rng, draw, scatter(rng, necrosis, 22), 2, (150, 120, 120))  # ghosts and dust, no nuclei
    draw_tumour(rng, draw, case["type"], tumour)
    planted = []
    if case["focus"] == "present":  # in the middle of one or two tiles that hold tissue all over
        inside = np.argwhere(tissue.reshape(SIDE // TILE, 32, -1, 32).mean((1, 3)) > 0.95)
        for row, column in rng.permutation(inside)[: rng.integers(1, 3)]:
            corner = np.array([column, row]) * TILE
            spots = TILE / 2 + rng.uniform(-24, 24, 2) + rng.normal(0, 26, (46, 2)).clip(-64, 64)
            dots(rng, draw, corner + spots, 7, (109, 66, 22))
            planted.append(corner.tolist())
    stain = rng.uniform(0.85, 1.15)  # no two laboratories stain alike
    picture = picture.point([round(255 * (i / 255) ** stain) for i in range(256)] * 3)
    if not path:
        return picture, planted
    with replacing(path) as temporary:
        picture.save(temporary, "JPEG", quality=85, dpi=(25400 / TARGET_MPP,) * 2)
    return None, planted


def invent_cases(n_train, n_test, seed):
    """What each toy slide shows: each value as often as the others, and no finding tells of another."""
    rng, cases = np.random.default_rng(seed), []
    values = {"type": TYPES, "grade": GRADES, "position": QUADRANTS}
    values |= {"focus": ("present", "absent"), "receptors": SUBTYPES}
    for split, n in (("train", n_train), ("test", n_test)):
        orders = {finding: rng.permutation(np.arange(n) % len(values[finding])) for finding in values}
        for i in range(n):
            case = {"slide": f"demo_{len(cases):04d}", "split": split, "seed": int(rng.integers(2**31))}
            cases.append(case | {finding: list(values[finding])[orders[finding][i]] for finding in values})
    return cases


# task -> ways to ask, and the answer, filled in from what the slide shows. The subtype's question gives its
# answer away: a model without the slide does as well, and the table shows it.
ASKED = {
    "report": "Write a report of this slide.|What does this slide show?",
    "type": "What is the histological type of the tumor?|Which type of tumor is this?",
    "grade": "What is the grade of the tumor?|How is this tumor graded by its share of the tissue?",
    "position": "Where on the slide is the necrosis?|Which part of the slide is necrotic?",
    "focus": "Is there a focus of brown pigment?|Can brown pigment be found on this slide?",
    "subtype": "Estrogen receptor is {er} and HER2 is {her2}. What is the molecular subtype?",
}
ANSWERS = {
    "type": "The tumor is {a_type}.",
    "grade": "The tumor is {grade}.",
    "position": "The necrosis is at the {position}.",
    "focus": "{yes_no}, brown pigment is {focus}.",
    "subtype": "The molecular subtype is {subtype}.",
}
# Three pathologists, who differ in their words and in what they mention first.
REPORTS = (
    "The tumor is {a_type}. It takes up {share} of the tissue, which makes it {grade}. Necrosis is seen at "
    "the {position}. {pigment[0]}",
    "Sections show {a_type} of {grade} with necrosis at the {position}. {pigment[1]} Tumor fills {share} of "
    "the tissue.",
    "{pigment[2]} The {position} is necrotic. With {share} of the tissue taken up, this is {a_type}, "
    "{grade}.",
)
PIGMENT = {
    "present": "A focus of brown pigment is present.|There is a focus of brown pigment.|"
    "Brown pigment is found.",
    "absent": "Brown pigment is absent.|There is no brown pigment.|No brown pigment is found.",
}


def write_questions(case, rng):
    """Rows of the dataset about one slide: its report, one question of each kind, and a dialogue of three."""
    er, her2 = case["receptors"]
    words = {**case, "er": er, "her2": her2, "subtype": SUBTYPES[er, her2], "share": GRADES[case["grade"]][1]}
    words["a_type"] = f"{'an' if case['type'][0] in 'aeiou' else 'a'} {case['type']}"
    words["yes_no"] = "Yes" if case["focus"] == "present" else "No"
    words["pigment"], talks, rows = PIGMENT[case["focus"]].split("|"), {}, []
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
    for path in (folder, args.data / "qa"):
        path.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{case['slide']}.jpg" for case in cases]
    spawn = multiprocessing.get_context("spawn")  # forking a process that has torch's threads can hang
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        drawn = tqdm(pool.map(draw_slide, cases, paths, chunksize=4), total=len(cases), unit="slide")
        for case, (_, planted) in zip(cases, drawn):
            case["planted"] = planted
    for split in ("train", "test"):
        about = [case for case in cases if case["split"] == split]
        rows = [write_questions(case, np.random.default_rng(case["seed"] + 1)) for case in about]
        write_qa(args.data / "qa" / f"{split}.jsonl", itertools.chain(*rows))


def prepare_demo(args):
    """--demo: draws the cohort, unless it is there (data/cohort.json), and prepares it as real slides are."""
    args.preset, folder, path = "demo", args.data / "slides", args.data / "cohort.json"
    recipe = {"train": args.demo, "test": args.demo // 5, "seed": args.seed}
    own = (args.data / "meta.json").exists() and not path.exists()
    check(not own, f"{args.data} holds data of your own; give the demo a folder of its own with --data")
    cases = invent_cases(recipe["train"], recipe["test"], args.seed)
    if path.exists():
        old = wsi_llava.read_json(path, "delete the folder, or name another --data").get("recipe")
        check(
            old == recipe, f"{args.data} holds another demo cohort ({old}, not {recipe}); name another --data"
        )
    else:
        draw_cohort(args, cases, folder)
        wsi_llava.write_text(path, json.dumps({"recipe": recipe, "cases": cases}, indent=1))
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))  # this small encoder takes no more time than the readers
    failures = prepare_slides(args, {case["slide"]: folder / f"{case['slide']}.jpg" for case in cases})
    torch.set_num_threads(threads)
    check(not failures, f"{len(failures)} toy slides failed, the first: {failures[0][1] if failures else ''}")
    write_index(args.data)


# ---- Flags and main --------------------------------------------------------------------------------------


def parse(argv=None):
    parser = wsi_llava.Parser(__doc__)
    yes, paths = {"action": "store_true"}, {"nargs": "+", "metavar": "PATH", "type": Path}
    add = parser.group("what to prepare")
    add("--slides", "slides, folders of slides, .txt lists of paths", **paths)
    add("--features", "features made elsewhere (.pt, .h5), or their folders", **paths)
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
    share = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    number, shares = map(int, share.groups()) if share else (0, 0)
    check(1 <= number <= shares, f"--shard {args.shard}: I/N with I from 1 to N, such as 3/16")
    wsi_llava.resolve_device(args)
    if args.demo:
        prepare_demo(args)
    failures = import_features(args, number - 1, shares) if args.features else []
    if args.slides:
        failures += prepare_slides(args, find_slides(args.slides), number - 1, shares)
        if not args.dry_run:
            write_index(args.data)
    if args.qa:
        import_qa(args)
    for _, message in failures:
        print(f"failed: {wsi_llava.one_line(message, 2000)}", file=sys.stderr)
    where = f" and in {args.data}/failures); the others are done" if not args.dry_run else ")"
    check(not failures, f"{count(len(failures), 'slide')} could not be prepared (listed above{where}")


if __name__ == "__main__":
    wsi_llava.run(main, on_interrupt="interrupted; the same command goes on where this one stopped")
