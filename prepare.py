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
import bisect
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
import struct
import sys
import threading
import time
import urllib.parse
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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
from wsi_llava import (
    TILE,
    UserError,
    at_least,
    check,
    count,
    feature_metadata,
    reading,
    replacing,
    share,
    some_path,
)

TARGET_MPP = 0.5  # um/px; Prov-GigaPath was trained at it
NATIVE = 0.02  # pixels this close to the target's size, or to a whole fraction of it, are not resampled
MPP_RANGE = (0.05, 20)  # um/px of a slide; TIFFs that say 72 dpi mean nothing by it
GRID = 1000  # tiles along a side for which the slide encoder has positions
MASK = 32  # tiled pixels per pixel of the tissue mask: 8 x 8 mask pixels a tile
BLOCK = 4  # tiles along each side of a block: neighbours that are read one after the other
PICTURE = 768  # pixels along the longer side of the picture to look at
PART = 1024  # level pixels along each side of what a thumbnail is made of at a time
DROPPED = 0.01  # a slide fails where more of its tiles, or of its thumbnail, cannot be decoded
SUFFIXES = "svs tif tiff ndpi mrxs scn bif vms vmu svslide dcm png jpg jpeg".split()
MICRONS = {"inch": 25400, "centimeter": 10000, "cm": 10000, "mm": 1000, "micron": 1, "um": 1, "nm": 0.001}
# What OpenSlide and Pillow raise over a damaged file (SyntaxError: Pillow's, of a PNG).
BAD_SLIDE = (openslide.OpenSlideError, OSError, ValueError, LookupError, TypeError, AttributeError)
BAD_SLIDE += (ArithmeticError, RuntimeError, EOFError, MemoryError, SyntaxError)
Image.MAX_IMAGE_PIXELS = None  # slides are larger than what Pillow takes for an attack


# ---- A slide at the target resolution ----------------------------------------------------------------------


def number(text):
    """What a file says, as a finite number; 0 where it says none."""
    try:
        value = float(text)
    except (TypeError, ValueError, ArithmeticError):  # Pillow's fractions can be 0/0
        return 0
    return value if math.isfinite(value) else 0


def written_mpp(text, x, y):
    """(source, um/px in x, in y) by a TIFF's description: OME's XML, or ImageJ's unit with pixels per unit
    x and y."""

    def microns(unit):  # the sign for micro is written in several ways
        return MICRONS.get(re.sub(r"[^\x00-\x7f]+|&#\w+;|\\u00b5", "u", unit.strip().lower()), 0)

    ome = {key: value for key, value in re.findall(r'PhysicalSize([XY](?:Unit)?)="([^"]*)"', text)[:4]}
    if "X" in ome:
        sizes = [number(ome.get(axis)) * microns(ome.get(f"{axis}Unit", "um")) for axis in "XY"]
        return "OME-XML", *sizes
    unit = re.search(r"^unit=(.+)$", text, re.MULTILINE)
    if text.startswith("ImageJ=") and unit:
        return "ImageJ", *(microns(unit[1]) / (number(side) or math.inf) for side in (x, y))
    return "OME-XML", 0, 0


class Slide:
    """A slide seen as one image at the tiled resolution.

    width, height: pixels at the tiled resolution. mpp: um per level-0 pixel; source: where that is from.
    scale: level-0 pixels per tiled pixel, exactly target / mpp. The argument mpp wins over what the file
    says; fallback: those of a file that says nothing. Raises UserError where the file is no slide or its
    um/px are unknown.
    """

    def __init__(self, path, mpp=None, target=TARGET_MPP, fallback=None):
        # The folder of an MRXS or DICOM slide lies beside the file, not beside a link to it.
        real = os.path.realpath(path)
        self.path = path if Path(real).suffix != Path(path).suffix else real
        try:
            self.open()
        except BAD_SLIDE as error:
            reason = wsi_llava.one_line(error)
            raise UserError(f"{path}: not a slide that OpenSlide can read ({reason})") from None
        claimed = number(self.file.properties.get("openslide.level[0].tile-width"))
        check(claimed <= 2**16, f"{path}: says that its tiles are {claimed:.0f} px wide; a damaged file")
        self.mpp, self.source = (mpp, "given") if mpp else self._own_mpp(path, fallback)
        self.scale = target / self.mpp
        self.width, self.height = (round(side / self.scale) for side in self.file.dimensions)
        check(
            max(self.width, self.height) <= GRID * TILE,
            f"{path}: {self.width} x {self.height} px at {target:g} um/px are over {GRID} x {GRID} tiles, "
            f"for which the slide encoder has no positions; a damaged file, or its um/px are not "
            f"{self.mpp:g} ({self.source}): --mpp-csv gives others",
        )
        # The coarsest level that is at least as fine as the target; the finest there is where none is.
        self.downsamples = self.file.level_downsamples  # asked for once: the library counts anew each time
        fine = [level for level, d in enumerate(self.downsamples) if d <= self.scale * (1 + NATIVE)]
        self.level = fine[-1] if fine else 0
        self.zoom = self.scale / self.downsamples[self.level]  # level pixels per tiled pixel
        whole = max(1, round(self.zoom))
        self.average = whole if abs(self.zoom / whole - 1) <= NATIVE else None  # the same, if a whole number

    def open(self):
        """Opens the file, also anew: OpenSlide refuses everything after an error."""
        self.file = openslide.open_slide(self.path)
        self.flat = isinstance(self.file, openslide.ImageSlide)  # a picture that Pillow reads, whole

    @property
    def hash(self):
        """What tells this slide from others, wherever it lies: OpenSlide's hash; of a plain picture, its
        bytes'."""
        quick = self.file.properties.get("openslide.quickhash-1")
        if quick:
            return quick
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def corner(self):
        """Level-0 (x, y) where the scanned area begins, for formats that tell (MRXS): QuPath counts from
        there."""
        return [int(self.file.properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy"]

    @property
    def power(self):
        return number(self.file.properties.get("openslide.objective-power"))

    @property
    def contradicts(self):
        """Whether um/px and objective power cannot both be right: 10x means about 1 um/px, 40x about 0.25."""
        return self.power > 0 and abs(math.log2(self.mpp * self.power / 10)) > 0.5

    @property
    def notes(self):
        """What a person should know of it -> {text: whether it holds}."""
        named = {"objective power": "the objective power", "given": "--mpp-csv"}.get(self.source, self.source)
        return {
            f"um/px taken from {named}": self.source in ("objective power", "--mpp", "given"),
            "um/px and objective power contradict each other": self.contradicts,
            "coarser than the target, enlarged": self.scale < 1 - NATIVE,
        }

    def _own_mpp(self, path, fallback):
        """What the file says of its um/px, the most trusted first, or else the fallback -> (um/px,
        source)."""
        get, written = self.file.properties.get, "TIFF tags"
        text, unit = get("tiff.ImageDescription") or "", get("tiff.ResolutionUnit")
        x, y = get("tiff.XResolution"), get("tiff.YResolution")  # pixels per unit
        if self.flat:
            with Image.open(self.path) as image:
                tags = getattr(image, "tag_v2", {})  # of a TIFF: Pillow makes up the other side's dpi
                text, x, y = str(tags.get(270, "")), tags.get(282), tags.get(283)
                unit = {2: "inch", 3: "centimeter"}.get(tags.get(296))
                if not tags and "dpi" in image.info:
                    (x, y), unit, written = image.info["dpi"], "inch", "dpi"
        tagged = (MICRONS.get(unit, 0) / (number(side) or math.inf) for side in (x, y))
        power = 10 / (self.power or math.inf)
        for source, wide, high in (
            written_mpp(text, x, y),
            ("metadata", number(get("openslide.mpp-x")), number(get("openslide.mpp-y"))),
            (written, *tagged),
            ("objective power", power, power),
        ):
            wide, high = wide or high, high or wide
            if MPP_RANGE[0] <= min(wide, high) and max(wide, high) <= MPP_RANGE[1]:
                oblong = f"{path}: its pixels are not square ({wide:g} x {high:g} um)"
                check(abs(wide / high - 1) <= NATIVE, f"{oblong}; --mpp-csv takes them as if they were")
                return (wide + high) / 2, source
        hint = "give it with --mpp, for example --mpp 0.25 for 40x, or --mpp-csv"
        check(fallback, f"{path}: its metadata has no um/px; {hint}")
        return fallback, "--mpp"

    def region(self, level, x, y, width, height):
        """Pixels of a level, from its pixel (x, y) on -> uint8 [height,width,4], RGBA and opaque: what
        lies beyond the slide, or was not scanned, is white."""
        corner = round(x * self.downsamples[level]), round(y * self.downsamples[level])
        region = self.file.read_region(corner, level, (width, height))
        pixels = np.asarray(region)
        if pixels.view("<u4").min() >= 0xFF000000:  # the alpha of every pixel is 255
            return pixels
        return np.asarray(Image.alpha_composite(Image.new("RGBA", region.size, "white"), region))

    def tile(self, x, y):
        """The tile whose corner is at (x, y), in tiled pixels -> uint8 [256,256,4], RGBA as read: leaving A
        out takes a copy.

        It lies where the exact scale puts it, to half a level pixel, however far to the right: no error adds
        up. Where a tiled pixel is a whole number of level pixels, give or take 2%, it is their mean (of one:
        as scanned); otherwise the tile is resampled with Lanczos' filter, a margin that the filter reaches
        into read along.
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

    def size_at(self, pixel):
        """Width and height of the whole slide at `pixel` tiled pixels a pixel."""
        return [max(1, round(side / pixel)) for side in (self.width, self.height)]

    def thumbnail(self, pixel):
        """The whole slide, `pixel` tiled pixels a pixel. Read part by part: a slide without small levels
        takes time then, and not memory. What cannot be decoded stays white, up to 1%."""
        picture, self.lost = Image.new("RGB", self.size_at(pixel), "white"), 0  # pixels of the picture
        self._paint(picture, pixel, (0, 0, *picture.size), PART)
        return picture

    def _paint(self, picture, pixel, box, side):
        """Pastes a box of the thumbnail, read in squares of `side` level pixels."""
        level = self.file.get_best_level_for_downsample(self.scale * pixel)
        zoom = self.scale * pixel / self.downsamples[level]  # level pixels per pixel
        step = max(1, int(side / zoom))
        for y, x in itertools.product(range(box[1], box[3], step), range(box[0], box[2], step)):
            right, bottom = min(box[2], x + step), min(box[3], y + step)
            corner = left, top = math.floor(x * zoom), math.floor(y * zoom)
            inside = [x * zoom - left, y * zoom - top, right * zoom - left, bottom * zoom - top]
            try:
                part = self.region(level, *corner, *map(math.ceil, inside[2:]))
            except openslide.OpenSlideError as error:  # not Pillow's: it reads a picture whole or not at all
                self.open()
                if side > TILE:  # only the parts of it that are damaged are lost
                    self._paint(picture, pixel, (x, y, right, bottom), TILE)
                    continue
                self.lost += (right - x) * (bottom - y)
                much = self.lost > DROPPED * picture.width * picture.height
                check(not much, f"over {DROPPED:.0%} of its area cannot be decoded ({error})")
                continue
            part = Image.fromarray(part).convert("RGB")
            picture.paste(part.resize((right - x, bottom - y), Image.Resampling.BOX, inside), (x, y))


# ---- Finding slides, and what they are called --------------------------------------------------------------


def walk(top):
    """Every folder below `top` -> (folder, its visible files, sorted). Follows links, and no folder twice."""

    def unreadable(error):
        print(f"{error.filename}: this folder cannot be read ({error.strerror}); left out", file=sys.stderr)

    seen = set()
    for folder, folders, files in os.walk(top, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        ours = {"qc"} if "meta.json" in files else set()  # pictures of an earlier run
        # hidden: .snapshot, .Trash-1000
        folders[:] = sorted(name for name in set(folders) - ours if not name.startswith("."))
        files = [Path(folder, file) for file in sorted(files) if not file.startswith(".")]
        yield Path(folder), [path for path in files if path.is_file() or not path.exists()]  # no pipes


def listed(inputs, flag, source="", seen=()):
    """The files and folders that are named, also in .txt lists -> paths. Raises UserError for one that is
    not there."""
    for text in inputs:
        entry = Path(text)
        check(entry.is_file() or entry.is_dir(), f"{source}{entry}: no such file or folder ({flag})")
        if not (entry.is_file() and entry.suffix.lower() == ".txt"):
            yield entry
            continue
        real = os.path.realpath(entry)
        check(real not in seen, f"{source}{entry}: this list names itself; take it out")
        lines = entry.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
        for line, raw in enumerate(lines, 1):
            name = os.fsdecode(raw.strip())  # as ls writes it
            if not os.path.exists(name) and os.path.exists(raw.decode("latin-1").strip()):
                name = raw.decode("latin-1").strip()
            if name:
                yield from listed([name], flag, f"{entry}, line {line}: ", (*seen, real))


def dicom_tags(path):
    """A DICOM file's kind (SOP class), series, container and image type, as far as they can be read ->
    dict of texts."""
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
    slides, others = {}, []
    for path in files:
        tags = dicom_tags(path)
        if tags.get("kind", "").endswith(".77.1.6"):  # VL Whole Slide Microscopy Image Storage
            label = "VOLUME" not in tags.get("type", "")
            slides.setdefault(tags.get("series"), []).append((label, path, tags))
        elif not tags:
            others.append(path)
    if not slides and others:  # no slide that can be told: its reader will say so
        return [(folder.name, others[0])]
    firsts = [min(series, key=lambda item: item[:2]) for series in slides.values()]
    if len(firsts) == 1:
        return [(folder.name, firsts[0][1])]
    labels = [tags.get("container") or tags.get("series", "") for _, _, tags in firsts]
    if len(set(labels)) < len(labels):
        labels = [tags.get("series", "") for _, _, tags in firsts]
    return [(f"{folder.name}_{label}", path) for label, (_, path, _) in zip(labels, firsts)]


def file_name(text):
    """A slide's id that any file system takes: UTF-8, no separators, at most 180 bytes."""
    raw = os.fsencode(text)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    text = re.sub(r"[/\\\x00-\x1f]", "_", text)
    if len(text.encode()) > 180:  # with .safetensors and a temporary file's ending, 255 is the limit
        start = text.encode()[:170].decode(errors="ignore")
        text = f"{start}-{hashlib.sha256(raw).hexdigest()[:8]}"
    return text


def few(names):
    """The first of many names, for people."""
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")


def name_slides(slides):
    """[(name, path)] -> {slide id: path}. Where names meet, as much of the path is put before them as
    tells them apart."""
    groups, named = collections.defaultdict(list), {}
    for name, path in slides:
        groups[file_name(name).casefold()].append((name, path))  # some file systems take upper for lower case
    for group in groups.values():
        ways = [[name for name, _ in group], [f"{name}_{path.suffix[1:]}" for name, path in group]]
        for depth in range(1, max(len(path.parts) for _, path in group)):
            folders = ["_".join(path.parent.parts[-depth:]).strip("/") for _, path in group]
            ways += [[f"{folder}_{name}" for folder, name in zip(folders, way)] for way in ways[:2]]
        names = next(way for way in ways if len({name.casefold() for name in way}) == len(way))
        if names is not ways[0]:
            print(f"{count(len(group), 'slide')} called {group[0][0]}: named {few(names)}")
        for name, (_, path) in zip(map(file_name, names), group):
            check(name not in named, f"{path} and {named.get(name)} have the same name; rename one")
            named[name] = path
    return dict(sorted(named.items()))


def find_slides(inputs):
    """Folders (searched through), files, and .txt lists of both -> {slide id: path}, sorted. The id is the
    file's stem.

    A DICOM slide is a folder of .dcm files, named as the folder; see dicom_slides. Hidden files and folders
    are left out.
    """
    found = []
    for entry in listed(inputs, "--slides"):
        if not entry.is_dir():
            found.append((entry.stem, entry))
            continue
        for folder, files in walk(entry):
            # Hamamatsu: their JPEGs are parts of them
            parts = any(path.suffix.lower() in (".vms", ".vmu") for path in files)
            dicom = [path for path in files if path.suffix.lower() == ".dcm"]
            found += dicom_slides(folder.resolve(), dicom)
            for path in files:
                suffix = path.suffix.lower().lstrip(".")
                if suffix in SUFFIXES and suffix != "dcm" and not (parts and suffix == "jpg"):
                    found.append((path.stem, path))
    check(found, f"no slides below {', '.join(map(str, inputs))} (looked for .{', .'.join(SUFFIXES)})")
    once = {}  # a slide may be named twice, by its folder and in a list
    for name, path in found:
        once.setdefault((name, os.path.realpath(path)), (name, path))
    return name_slides(once.values())


HEADERS = "mpp mpp_x mpp-x um/px um_per_px microns_per_pixel".split()  # of the columns of --mpp-csv
SLIDE_HEADERS = "slide slide_id wsi path file filename file_name image name id".split()


def read_mpp_csv(path):
    """Lines of slide,mpp -> {slide: um/px at level 0}. A slide is named by its id, its file or its path.

    A first line may be a header; then the columns are those called so, and there may be others.
    """
    table, columns, twice = {}, (0, 1), 0
    lines = "--mpp-csv takes lines of slide,mpp"
    with reading(path, lines):
        rows = list(csv.reader(io.StringIO(Path(path).read_text("utf-8-sig"), newline="")))
    for line, row in enumerate(rows, 1):
        cells = [cell.strip().lower() for cell in row]
        if line == 1 and any(cell in HEADERS for cell in cells):
            mpp = next(i for i, cell in enumerate(cells) if cell in HEADERS)
            others = [i for i in range(len(cells)) if i != mpp] or [0]
            columns = next((i for i in others if cells[i] in SLIDE_HEADERS), others[0]), mpp
            continue
        if not any(cells):
            continue
        wrong = f"{path}, line {line}: not slide,mpp with 0.05 to 20 um per pixel"
        check(len(row) > max(columns) and row[columns[0]].strip(), wrong)
        slide, mpp = row[columns[0]].strip().replace("\\", "/"), number(row[columns[1]])
        check(MPP_RANGE[0] <= mpp <= MPP_RANGE[1], wrong)
        old = table.get(slide, mpp)
        check(old == mpp, f"{path}, line {line}: {slide} again, with {mpp:g} and {old:g} um/px")
        twice += slide in table
        table[slide] = mpp
    if twice:
        print(f"{path}: {count(twice, 'line')} said twice")
    return table


def table_rows(table, name, path):
    """Which rows of --mpp-csv are about a slide: by id, file, stem, or an end of its path."""
    parts = Path(os.path.realpath(path)).parts
    ends = ["/".join(parts[-n:]).replace("//", "/") for n in range(1, len(parts) + 1)]
    return [key for key in (name, path.stem, str(path), *ends) if key in table]


def read_table(args, slides):
    """--mpp-csv -> {slide: um/px}. Says which of its lines are about none of the slides."""
    table = read_mpp_csv(args.mpp_csv) if args.mpp_csv else {}
    used = {row for name, path in slides.items() for row in table_rows(table, name, path)}
    lost = [row for row in table if row not in used]
    if lost:
        print(f"{args.mpp_csv}: {count(len(lost), 'line')} about no slide here: {few(lost)}")
    return table


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
    """A picture strip by strip, or every n-th -> (rows of the strip, its pixels uint8 with a margin, where
    it lies in these)."""
    rows = max(HALO, STRIP // picture.width)
    for top in range(0, picture.height, rows * every):
        above = min(top, HALO)
        bottom = min(picture.height, top + rows)
        part = picture.crop((0, top - above, picture.width, min(picture.height, bottom + HALO)))
        pixels = np.asarray(part.filter(ImageFilter.MedianFilter(3)))
        yield slice(top, bottom), pixels, slice(above, above + bottom - top)


def find_glass(picture):
    """The colour of a slide's own glass -> (its RGB, or WHITE where none is seen; the least colour that is
    stain).

    Glass is bright, smooth, and what most of the brightest smooth pixels look like.
    """
    every = max(1, picture.width * picture.height // 2**19)
    rgb = np.concatenate([pixels[inside] for _, pixels, inside in strips(picture, every)]).astype(np.float32)
    grey = rgb.mean(-1)
    smooth = (grey > 170) & (roughness(grey) < 4)
    if smooth.mean() < 0.005:
        return WHITE, 0.03
    # The histogram's rightmost hill: from the brightest grey that is not rare down over the glass's noise.
    counts = np.convolve(np.bincount(grey[smooth].astype(int), minlength=256), np.ones(5), "same")
    bright = np.flatnonzero(counts >= counts.max() / 10).max()
    start = max(0, bright - 12)
    peak = start + np.argmax(counts[start : bright + 1])
    pixels = rgb[smooth & (abs(grey - peak) < 6)]
    glass = np.median(pixels, axis=0)
    red, green, blue = glass
    # Haematoxylin and eosin take green first: a bright smooth stroma is no glass.
    if glass.min() < 178 or np.ptp(glass) > 48 or green < min(red, blue) - 14:
        return WHITE, 0.03
    pixels = pixels[abs(pixels - glass).max(-1) < 8]
    if len(pixels) < 100:
        return glass, 0.03
    # Stain is what has more colour than the glass's own noise: 4.5 deviations of it (told by its median,
    # which a few stained pixels do not move).
    colour = np.ptp(np.log10(glass / pixels), axis=-1)
    noise = 1.4826 * np.median(abs(colour - np.median(colour)))
    return glass, float(np.clip(np.median(colour) + 4.5 * noise, 0.015, 0.06))


def find_tissue(picture):
    """RGB thumbnail -> (bool [h,w]: tissue; bool [h,w]: ink, left out; the share of what is dark and has
    no colour)."""
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


def mask_file(folder, name):
    """--mask: the slide's file in the folder, or None."""
    for ending in ("png", "tif", "tiff", "bmp", "jpg", "jpeg", "geojson", "json"):
        path = Path(folder) / f"{name}.{ending}"
        if path.is_file():
            return path


def given_mask(path, slide, size):
    """A mask picture of the whole slide, or a QuPath GeoJSON, -> bool [h,w] of that size (width, height)."""
    kinds = "--mask takes a picture of the whole slide, black outside tissue, or QuPath's GeoJSON"
    with reading(path, kinds):
        if path.suffix.lower() in (".geojson", ".json"):
            return drawn_mask(path, slide, size)
        grey = Image.open(path).convert("L")
        stretched = (grey.width / grey.height) / (slide.width / slide.height)
        tolerance = 0.02 + 1 / min(grey.size)
        wrong = f"{path}: {grey.width} x {grey.height} px are not of the slide's shape"
        check(abs(stretched - 1) < tolerance, wrong)
        marked = 127 if grey.getextrema()[1] > 127 else 0  # labels 0, 1, 2... are masks too
        grey = grey.point([0] * (marked + 1) + [255] * (255 - marked))
        return np.asarray(grey.resize(size, Image.Resampling.BOX)) > 127


def drawn_mask(path, slide, size):
    """The polygons of a GeoJSON, in level-0 pixels counted from the scanned area's corner -> bool [h,w]."""
    found = json.loads(path.read_text(encoding="utf-8-sig"))
    features = found.get("features", [found]) if isinstance(found, dict) else found
    mask, scale = Image.new("L", size), MASK * slide.scale
    for feature in features:
        if feature.get("properties", {}).get("objectType") in ("tile", "cell", "detection"):
            continue
        geometry = feature.get("geometry", feature)
        check(geometry["type"] in ("Polygon", "MultiPolygon"), f"{path}: a {geometry['type']}, not a polygon")
        polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
        for outer, *holes in polygons:
            part = Image.new("L", size) if holes else mask
            for ring, value in ((outer, 255), *((hole, 0) for hole in holes)):
                # Pillow counts from pixel centres
                corners = (np.array(ring, float)[:, :2] + slide.corner) / scale - 0.5
                ImageDraw.Draw(part).polygon(corners.ravel().tolist(), value)
            if holes:
                mask.paste(255, mask=part)
    return np.asarray(mask) > 0


def tissue_of(slide, thumbnail, given=None):
    """-> (bool [h,w]: tissue, by the mask that is given or by its colour; ink; why there may be none)."""
    if given:
        mask = given_mask(given, slide, thumbnail.size)
        return mask, np.zeros_like(mask), ""
    mask, ink, grey = find_tissue(thumbnail)
    if max(slide.width, slide.height) < TILE:
        return mask, ink, " (smaller than a tile)"
    colourless = " (no colour: grey, silver and fluorescence slides need --mask)"
    return mask, ink, colourless if grey > 0.01 else ""


def tile_grid(mask, min_tissue, step=TILE):
    """Corners of the tiles with at least that share of tissue: int32 [N,2] (x, y) in tiled pixels, in raster
    order.

    The last tiles of rows and columns may reach beyond the slide, where all is white.
    """
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
    """At most so many of the tiles (0: all), uniformly at random, in raster order: the same ones for a
    slide and a seed."""
    if not max_tiles or len(coords) <= max_tiles:
        return coords
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return coords[np.sort(rng.choice(len(coords), max_tiles, replace=False))]


def blocks(coords, step):
    """Tiles [N,2] -> arrays of indices: up to 4 x 4 neighbours each. Whoever reads them one after the
    other decodes the JPEG tiles of the slide that they share only once: OpenSlide keeps the last 32 MB of
    these."""
    side = int(np.clip((BLOCK - 1) * TILE // step + 1, 1, BLOCK))
    cells = coords // (step * side)
    order = np.lexsort((coords[:, 0], coords[:, 1], cells[:, 0], cells[:, 1]))
    borders = np.flatnonzero((np.diff(cells[order], axis=0) != 0).any(1)) + 1
    return np.split(order, borders) if len(order) else []


# ---- Pictures to check, tiles for QuPath -------------------------------------------------------------------


def draw_qc(path, picture, pixel, mask, ink, coords):
    """The slide with the outlines of its tissue (green) and of ink that was left out (red), and the kept
    tiles (blue): what a person checks before trusting. picture: of the whole slide, `pixel` tiled pixels a
    pixel.
    """
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
    with replacing(path) as temporary, open(temporary, "w") as file:
        # written as it is made: a slide has 100,000 tiles
        file.write('{"type": "FeatureCollection", "features": [')
        about = {"classification": {"name": "Tile"}, "isLocked": True}
        for n, (x, y) in enumerate(coords.tolist()):
            feature = wsi_llava.geojson_tile(x, y, slide.scale, slide.corner, **about)
            file.write(",\n" * (n > 0) + json.dumps(feature))
        file.write("]}\n")


CARD = """<figure class="{kind}"><a href="{href}"><img loading="lazy" src="{href}" alt=""></a><b>{name}</b>
<br>{text}</figure>
"""
PAGE = """<!DOCTYPE html><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px sans-serif }}
figure {{ display: inline-block; vertical-align: top; width: 240px; margin: 6px; overflow-wrap: anywhere }}
img {{ max-width: 240px; max-height: 240px }}
.failed {{ outline: 3px solid #c00 }} .empty {{ outline: 3px solid #d80 }}
</style><h1>{title}</h1>
"""


def write_index(data):
    """data/qc/index.html: every slide's picture, name and number of tiles, what failed first; to open in a
    browser."""
    failures, files = read_failures(data), {}
    for path in (data / "features").glob("*.safetensors"):
        with contextlib.suppress(UserError):
            files[path.name.removesuffix(".safetensors")] = feature_metadata(path)["tiles"]
    cards = []
    for name in sorted({*files, *failures}, key=lambda name: (name not in failures, name)):
        kind, text = "", count(files.get(name, 0), "tile")
        if name in failures:
            kind, text = "failed", f"FAILED: {failures[name]['message']}"
        elif not files[name]:
            kind, text = "empty", "NO TISSUE"
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
def tell_of_no_locks(path, reason):
    none = f"{path}: its file system has no locks ({reason})"
    print(f"{none}; don't prepare the same slides in two runs at once", file=sys.stderr)


def claim(claims, name):
    """Whether this process alone may work on a slide from now on, until it closes the file or dies.

    claims: data/.claims, of which one byte is locked, at an offset that follows from the name: nothing is
    left to clean up. It is opened once: the first close of a file drops all of a process's locks on it.
    """
    if fcntl is None:
        return True
    offset = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
    try:
        fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # another process has it
            return False
        tell_of_no_locks(claims.name, error.strerror)
    return True


def sweep(data, claims, names):
    """Deletes what killed runs left half-written of these slides, unless somebody is at work on them."""
    for path in itertools.chain(data.glob("features/.*.part"), data.glob("qc/.*.part")):
        name = path.name[1:].rsplit(".", 3)[0]  # .<slide>.<ending>.<at random>.part
        if name in names and claim(claims, name):
            path.unlink(missing_ok=True)


def read_failures(data):
    """data/failures -> {slide: {"slide", "path", "message"}}."""
    failures = {}
    for path in sorted((data / "failures").glob("*.json")):
        with reading(path, "not what prepare.py writes; delete it"):
            entry = json.loads(path.read_text(encoding="utf-8"))
            failures[entry["slide"]] = {key: str(entry[key]) for key in ("slide", "path", "message")}
    return failures


def note_failure(data, name, path, message=None):
    """Puts a slide on the record of failures, or takes it off."""
    file = data / "failures" / f"{name}.json"
    if not message:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    wsi_llava.write_text(file, json.dumps({"slide": name, "path": str(path), "message": message}, indent=1))


def write_meta(data, preset, mpp, encoder):
    """Makes the folder and its meta.json, or checks them -> what meta.json holds."""
    for folder in ("features", "qc", "qa"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    meta = {"version": wsi_llava.VERSION, "preset": preset, "tile_size": TILE, "mpp": mpp, "encoder": encoder}
    if not (data / "meta.json").exists():
        wsi_llava.write_text(data / "meta.json", json.dumps(meta, indent=2))
    old = wsi_llava.read_meta(data)  # perhaps another process's, which was faster
    was, now = (f"{made_by['source']}, {made_by.get('width')} wide" for made_by in (old["encoder"], encoder))
    same = old["encoder"]["fingerprint"] == encoder["fingerprint"]
    other = f"{data} holds features of another tile encoder ({was}; not {now})"
    check(same, f"{other}; name a new folder with --data")
    another = f"{data} holds features at {old['mpp']} um/px, not {mpp}; name a new folder with --data"
    check(old["mpp"] == mpp, another)
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
    meta = write_meta(args.data, args.preset or ("7b" if source else "demo"), args.target_mpp, info)
    return meta, encoder.to(args.device, args.dtype)


@contextlib.contextmanager
def disk_errors(data):
    """What goes wrong with a slide is a UserError by now, so an OSError here is the output folder's."""
    try:
        yield
    except BrokenPipeError:  # of what is printed
        raise
    except OSError as error:
        what = "make room or get the permission, then run the same command: it goes on"
        raise UserError(f"{data} cannot be written ({error}); {what}") from None


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
LINE = "{:32} {:>17} {:>8} {:17} {:>5} {:>8}"  # what a dry run tells of a slide
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
    """What a function returns that opens the slide at `path`, called in a process of its own. Raises
    UserError where that dies."""
    with start_readers(1) as readers:
        try:
            return readers.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError(f"{path}: {DIED}") from None


def slide_job(args, name, path, table, encoder):
    """One slide of a run -> dict: its files, and the parameters that its features depend on."""
    rows = table_rows(table, name, path)
    given = table[rows[0]] if rows else None  # um/px by --mpp-csv
    mask, digest = mask_file(args.mask, name) if args.mask else None, None
    if mask:
        with reading(mask, "a mask of --mask"):
            digest = hashlib.sha256(mask.read_bytes()).hexdigest()[:12]
    params = {
        "tile": TILE,
        "target_mpp": args.target_mpp,
        "min_tissue": args.min_tissue,
        "mask": digest,
        "step": args.step,
        "max_tiles": args.max_tiles,
        "seed": args.seed if args.max_tiles else None,
        "encoder": encoder,
    }
    pictures = [args.data / "qc" / f"{name}.jpg"]
    if args.geojson:
        pictures.append(args.data / "qc" / f"{name}.geojson")
    return {
        "name": name,
        "path": path,
        "slide": (str(path), given, args.target_mpp, args.mpp),  # what Slide takes
        "file": [os.path.abspath(path), os.path.getsize(path) if os.path.exists(path) else 0],
        "mask": mask,
        "params": params,
        "features": wsi_llava.features_file(args.data, name),
        "pictures": pictures,
    }


def is_done(args, job, digest=None):
    """Whether a slide's files are there: known by its path and size, or, once it is open, its features by its
    hash. Raises UserError where they are another slide's, or were made with other parameters."""
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
        (width, height), made = slide.file.dimensions, is_done(args, job, slide.hash)
        # One picture is read, for the mask and to look at: without small levels it takes minutes.
        pixel = max(slide.width, slide.height) / PICTURE
        picture = slide.thumbnail(MASK / max(1, round(MASK / pixel)))
        thumbnail = picture.resize(slide.size_at(MASK), Image.Resampling.BOX)
        mask, ink, why = tissue_of(slide, thumbnail, job["mask"])
        coords = tile_grid(mask, args.min_tissue, args.step)
        coords = draw_tiles(coords, job["name"], args.max_tiles, args.seed)
    except Exception as error:
        open_slide.cache_clear()  # a handle that has failed once fails for good
        reason, path = wsi_llava.one_line(error, 500), str(job["path"])
        raise UserError(reason if path in reason else f"{path}: {reason}") from None
    facts = {"mpp": slide.mpp, "mpp_source": slide.source, "scale": slide.scale}
    facts |= {"params": job["params"], "file": [*job["file"], slide.hash], "width": width, "height": height}
    notes = slide.notes | {
        f"some places (under {DROPPED:.0%}) not searched for tissue: they cannot be decoded": slide.lost,
        "ink left out, outlined in red in data/qc (--mask decides otherwise)": ink.mean() > 0.001,
        "not in --mask, so tissue was looked for by its colour": args.mask and not job["mask"],
        f"no tissue found{why}": not len(coords),
    }
    # All batches are full but the last: a feature's bits depend on the slide alone.
    order = np.concatenate([np.zeros(0, int), *blocks(coords, args.step)])
    plan = {"coords": coords, "batches": np.split(order, range(args.batch, len(order), args.batch))}
    plan |= {"facts": facts, "notes": [text for text, holds in notes.items() if holds and not made]}
    about = f"{width} x {height}", f"{slide.mpp:.6}", slide.source, slide.level, len(coords)
    plan["line"] = LINE.format(job["name"], *about)
    if not args.dry_run:
        picture = picture.resize(slide.size_at(pixel), Image.Resampling.BICUBIC)
        draw_qc(job["pictures"][0], picture, pixel, mask, ink, coords)
        for path in job["pictures"][1:]:
            write_geojson(path, slide, coords)
    if not args.dry_run and not made:
        plan["first"] = read_tiles(job["slide"], coords[plan["batches"][0]], place)
    return plan


def read_tiles(slide, coords, place):
    """In a reader: tiles into the memory, from `place` on -> (place, which of them could be read, the last
    error)."""
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
    coords, read, lost = plan["coords"], [], 0
    features = [torch.empty(0, encoder.cfg.width, dtype=torch.float16, device=args.device)]
    tiles = torch.frombuffer(memory, dtype=torch.uint8).view(-1, TILE, TILE, 4)
    places = itertools.cycle(range((1 + args.workers) * args.batch, len(tiles), args.batch))
    ahead, coming = collections.deque(), iter(plan["batches"][1:])
    for numbers in plan["batches"]:
        for later in itertools.islice(coming, 1 + args.workers - len(ahead)):  # read while this is encoded
            ahead.append(readers.submit(read_tiles, job["slide"], coords[later], next(places)))
        place, kept, error = plan.pop("first", None) or ahead.popleft().result()
        lost += len(numbers) - len(kept)
        if lost > DROPPED * len(coords):
            concurrent.futures.wait(ahead)  # or they write to the memory when the next slide is there
            many = f"over {DROPPED:.0%} of its {len(coords)} tiles cannot be decoded ({error})"
            raise UserError(f"{job['path']}: {many}")
        if kept:
            features.append(encode(encoder, tiles[place : place + len(kept)], args.device))
        read += numbers[kept].tolist()
        bar.set_postfix_str(f"{job['name'][:24]}, {len(read)} of {len(coords)} tiles")
    if lost:
        plan["notes"].append(f"some tiles (under {DROPPED:.0%}) left out that cannot be decoded")
    features = torch.cat(features).cpu()[np.argsort(read)]
    finite = features.isfinite().all()
    check(finite, f"{job['path']}: its features are not finite; try --dtype float32")
    facts = plan["facts"] | {"dropped": lost}
    save_features(job["features"], features, torch.from_numpy(coords[sorted(read)]), facts)
    return len(read)


def prepare_all(args, encoder, todo, claims):
    """The loop over slides. claims: see claim; None for a dry run -> failures [(path, message)], notes
    {text: names of slides}, tiles of each slide that was written."""
    failures, notes, written = [], collections.defaultdict(list), []
    places = 3 + 2 * args.workers  # each surveyed slide's first batch; those on their way and at the encoder
    memory = FORK.RawArray("B", places * args.batch * TILE * TILE * 4)
    readers, surveys, alone, n = start_readers(args.workers, memory), {}, False, 0
    bar = tqdm(total=len(todo), unit="slide", disable=not todo)
    while n < len(todo):
        job, failure = todo[n], None
        try:
            # Surveys of this slide, and of those behind it, unless another run is at work on them.
            for i in range(n, min(len(todo), n + 1 if alone else n + 1 + args.workers)):
                if i not in surveys and (args.dry_run or claim(claims, todo[i]["name"])):
                    place = i % (1 + args.workers) * args.batch
                    surveys[i] = readers.submit(survey, args, todo[i], place)
            plan = surveys[n].result() if n in surveys else {"notes": ["left to another run"]}
            if "first" in plan:
                written.append(prepare_slide(args, encoder, readers, memory, job, plan, bar))
            elif args.dry_run:
                tqdm.write(plan["line"])
                written.append(len(plan["coords"]))
            for note in plan["notes"]:
                notes[note].append(job["name"])
        except BrokenProcessPool:  # this slide's fault, or that of one behind it: it is tried again, alone
            readers.shutdown()  # the other readers are ended, and write to the memory no more
            readers, surveys, alone = start_readers(args.workers, memory), {}, not alone
            if alone:
                continue
            failure = f"{job['path']}: {DIED}"
        except UserError as error:
            failure = str(error)
        except torch.OutOfMemoryError:
            full = f"--batch {args.batch} does not fit {args.device}'s memory; try half of it"
            raise UserError(full) from None
        if failure:
            failures.append((job["path"], failure))
        if not args.dry_run and (failure or n in surveys):
            note_failure(args.data, job["name"], job["path"], failure)
        surveys.pop(n, None)
        alone, n = False, n + 1
        bar.update()
    bar.close()
    readers.shutdown()
    return failures, notes, written


def prepare_slides(args, slides, number=0, shares=1):
    """All slides of {id: path}, or every `shares`-th from `number` on, going on where an earlier run stopped.
    Returns the failures, [(path, message)]."""
    started, claims = time.time(), None
    with disk_errors(args.data), contextlib.ExitStack() as stack:
        table = read_table(args, slides)
        slides = list(slides.items())[number::shares]
        meta, encoder = open_data(args)
        made_by = meta["encoder"]["fingerprint"]
        jobs = [slide_job(args, name, path, table, made_by) for name, path in slides]
        todo = [job for job in jobs if not is_done(args, job)]
        if meta["encoder"]["source"] == "untrained":
            print("No GigaPath weights found or named: a small untrained encoder serves, to try this out.")
        print(
            f"Found {count(len(jobs), 'slide')}, {len(jobs) - len(todo)} done already; {len(todo)} to tile at "
            f"{args.target_mpp:g} um/px, step {args.step}, and encode on {args.device} into "
            f"{args.data}/features, with {count(args.workers, 'reader')}."
        )
        if args.dry_run:
            print(LINE.format("slide", "level-0 size", "um/px", "from", "level", "tiles"))
        else:
            wsi_llava.check_regular(args.data / ".claims", "delete it")
            claims = stack.enter_context(open(args.data / ".claims", "ab"))
            sweep(args.data, claims, {job["name"] for job in todo})
        failures, notes, written = prepare_all(args, encoder, todo, claims)
    tiles, seconds = sum(written), time.time() - started
    done = f"{count(tiles, 'tile')} of {count(len(written), 'slide')}"
    spent = f"{datetime.timedelta(seconds=round(seconds))} ({tiles / seconds:.0f} tiles/s)"
    where = f"to {args.data}/features in {spent}, pictures to {args.data}/qc."
    print(f"Found {done}." if args.dry_run else f"Wrote {done} {where}")
    for what, names in notes.items():
        print(f"{count(len(names), 'slide')}, {what}: {few(names)}")
    return failures


# ---- Features that were made elsewhere ---------------------------------------------------------------------

TOKENS = "visual tokens"  # the kind of a file that holds what a slide encoder made: [n,C], or one vector [C]
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
            inside = file[name].file == file and not (file[name].external or file[name].is_virtual)
            check(inside, f"{path}: its {name} lie in another file; copy them into this one")
            # Float64 holds every coordinate; torch knows no big-endian numbers and few unsigned ones.
            dtype = np.float64 if name == "coords" else np.float32
            tensors[name] = torch.from_numpy(np.asarray(file[name], dtype))
            about |= file[name].attrs
    return tensors, {name: np.ravel(value)[0] for name, value in about.items() if np.size(value) == 1}


def check_tokens(path, shape):
    """A tensor [V,C] without coordinates: visual tokens where it has their shape, and no bag of tiles."""
    shaped = shape[0] in (1, 576) and not path.parent.name.startswith(("pt_files", "features_"))
    what = f"{path}: features {list(shape)} of tiles without coordinates, which the slide encoder needs"
    check(shaped, f"{what}: import the .h5 that has both (visual tokens are [576,C], or one vector [C])")


def read_foreign(path):
    """One file of features -> (kind, features float16 [N,C], coords float64 [N,2] or None, its attributes).

    A .pt holds a tensor, or a dict of features (GigaPath: tile_embeds) and coords; an .h5 features (STAMP:
    feats) and coords, with attributes (TRIDENT, STAMP) or without (CLAM). Without coords it is visual tokens
    [576,C]; a slide's one vector [C] is one of these. Raises UserError for anything else.
    """
    if path.suffix.lower() in (".h5", ".hdf5"):
        found, about = read_hdf5(path)
    else:
        found = wsi_llava.read_tensors(path, named=False)
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
            kind = TOKENS
        else:
            kind = "TRIDENT" if "patch_size_level0" in about else "features and coordinates"
            kind = {"tile_embeds": "GigaPath", "feats": "STAMP"}.get(name, kind)
            coords = coords.detach().double()
            shapes = f"features {list(features.shape)} and coords {list(coords.shape)}"
            check(coords.shape == (len(features), 2), f"{path}: {shapes} are not [N,C] and [N,2]")
        shape, features = list(features.shape), features.half()
        check(len(shape) == 2 and features.numel(), f"{path}: features {shape} are not [N,C]")
        if kind == TOKENS and found[name].dim() > 1 and "feat_type" not in about:
            check_tokens(path, shape)
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
    kind, features, coords, about = read_foreign(path)
    (n, width), tokens = features.shape, kind == TOKENS
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
        check_same(file, feature_metadata(file)["params"], params)
    else:
        save_features(file, features, coords, {"params": params})
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
            failure = None
            try:
                counts[import_file(args, name, path, table.get(name, table.get(path.name)), encoder)] += 1
            except UserError as error:
                failure = str(error)
                failures.append((path, failure))
            if not args.dry_run:
                note_failure(args.data, name, path, failure)
    kinds = ", ".join(f"{count(n, 'slide')} of {kind}" for kind, n in counts.items()) or "nothing"
    print("Could import" if args.dry_run else "Imported", kinds)
    return failures


# ---- Questions ---------------------------------------------------------------------------------------------

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
    if kind != "this project's rows":
        row["slide"] = list(map(slide_id, names))
    row["conversations"] = wsi_llava.slide_first(row["conversations"])
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

    "split" is there where the file says it. Rows about several slides, and rows whose question or answer is
    empty, are left out, and counted. Raises UserError that names the line or the item.
    """
    path, rows, empty, several = Path(path), [], [], []
    check(path.is_file(), f"{path}: no such file; python prepare.py --qa FILE... reads questions")
    with reading(path, WHAT_IS_READ):
        entries = read_entries(path)
    for number, (where, entry) in enumerate(entries, 1):
        with reading(f"{path}, {where}", WHAT_IS_READ):
            row = read_row(entry, path.stem, number)
        full = all(wsi_llava.without_image(turn["value"]).strip() for turn in row["conversations"])
        one = len(set(row["slide"])) == 1
        if full and one:
            rows.append(row | {"slide": row["slide"][0]})
        else:
            (empty if one else several).append(where)
    for left_out, what in ((empty, "with an empty text"), (several, "about several slides")):
        if left_out:
            what = f"{count(len(left_out), 'row')} {what}, the first: {left_out[0]}"
            print(f"{path}: left out {what}", file=sys.stderr)
    check(rows, f"{path}: holds no questions; {WHAT_IS_READ}")
    return rows


def write_qa(path, rows):
    wsi_llava.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def match_slides(rows, have):
    """Rows with the slide of `have` in the place of a name that it begins with: a slide's barcode finds the
    slide, a patient's the first of hers, which is said. What is not there keeps its name."""
    names = sorted(have, key=str.lower)
    lower, several = [name.lower() for name in names], {}

    @functools.cache
    def find(name):
        matches, i = [], bisect.bisect_left(lower, name.lower())
        while i < len(names) and lower[i].startswith(name.lower()):
            if not lower[i][len(name) : len(name) + 1].isalnum():  # 117 is no beginning of 1170
                matches.append(names[i])
            i += 1
        if name in have or not matches:
            return name
        if len(matches) > 1:
            several[name] = matches
        return matches[0]

    rows = [row | {"slide": find(row["slide"])} for row in rows]
    for name, matches in several.items():
        print(f"{name} is the beginning of {len(matches)} slides' names: took {matches[0]}", file=sys.stderr)
    return rows


def named_split(path):
    """The split that a file's name tells, between any separators and in any case, or None."""
    name = Path(path).stem.lower()
    if re.search("open[-_ ]question|report[-_ ]only", name):  # WSI-Bench's own names
        return "test"
    told = {SPLITS[word] for word in re.split("[^a-z]+", name) if word in SPLITS}
    return told.pop() if len(told) == 1 else None


def patient_of(slide):
    """The patient's barcode at the head of a slide's name in TCGA, or None."""
    barcode = re.match(r"TCGA-\w\w-\w{4}(?!\w)", slide, re.I)
    return barcode[0].upper() if barcode else None


def report_leaks(splits, args):
    """Says what training shares with the other splits, by slide and by patient (TCGA's barcode), and lists it in qa/leaks.csv.

    splits: {name: rows}. -> the rows of training that share nothing.
    """

    def marks(row):  # what must not be on both sides
        slide = row["slide"]
        return {slide, ("patient", patient_of(slide))} if patient_of(slide) else {slide}

    training, others = splits["train"], splits["test"] + splits["val"]
    shared = set().union(*map(marks, training)) & set().union(*map(marks, others))
    leaks = {"train": [row for row in training if marks(row) & shared]}
    leaks["test"] = [row for row in others if marks(row) & shared]
    lines, path = [("side", "slide", "patient", "questions")], args.data / "qa" / "leaks.csv"
    for side, rows in leaks.items():
        questions = collections.Counter(row["slide"] for row in rows)
        lines += [(side, slide, patient_of(slide), n) for slide, n in sorted(questions.items())]
    people, what = sum(isinstance(mark, tuple) for mark in shared), ""
    if shared:
        what = f", {count(len(leaks['train']), 'question')} of training and {len(leaks['test']):,} of test"
        what += " (left out of training)" if args.drop_leaks else " (--drop-leaks leaves the former out)"
    if not args.dry_run:
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
        what += f"; see {path}"
    slides = f"{count(len(shared) - people, 'slide')}, {count(people, 'patient')}"
    print(f"On both sides of training and test: {slides}{what}.")
    return [row for row in training if not marks(row) & shared]


def merged(name, old, new, have):
    """A split's old and new rows, about the slides that are there by now, none of them twice."""
    rows, unique = match_slides(old + new, have), {}
    for row in rows:
        texts = (turn["value"] for turn in row["conversations"])
        unique.setdefault((row["slide"], *texts), row)
    found = sum(before["slide"] != row["slide"] for before, row in zip(old + new, rows))
    if new and found:
        print(f"{count(found, 'question')} of {name} found slides by the beginning of their names.")
    if new and len(unique) < len(rows):
        print(f"{count(len(rows) - len(unique), 'doubled question')} of {name} left out.")
    return list(unique.values())


def write_split(args, path, rows, have):
    """A split's file; prints what it holds, and which slides lack features."""
    tasks, slides = {row["task"] for row in rows}, {row["slide"] for row in rows}
    missing = sorted(slides - have)
    if not args.dry_run:
        write_qa(path, rows)
    lack = f"; {len(missing)} of these slides have no features: {few(missing)}" if missing else ""
    print(
        f"{'Would write' if args.dry_run else 'Wrote'} {count(len(rows), 'question')} of "
        f"{count(len(tasks), 'task')} about {count(len(slides), 'slide')} to {path}{lack}."
    )


def import_qa(args):
    """--qa: question files -> data/qa/<split>.jsonl, added to what is there or (--overwrite) in its place."""
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
    paths = {name: args.data / "qa" / f"{name}.jsonl" for name in ("train", "val", "test")}
    have = {path.stem for path in args.data.glob("features/*.safetensors")}
    have |= {path.stem for path in args.data.glob("visual_tokens/*.safetensors")}
    for name, path in paths.items():
        keep = path.exists() and path.stat().st_size and not (args.overwrite and name in new)
        splits[name] = merged(name, read_qa(path) if keep else [], new.get(name, []), have)
    if new and not args.dry_run:
        (args.data / "qa").mkdir(parents=True, exist_ok=True)
    if new and splits["train"] and splits["test"] + splits["val"]:
        clean = report_leaks(splits, args)
        if args.drop_leaks and len(clean) < len(splits["train"]):
            splits["train"] = new["train"] = clean
    for name in new:
        write_split(args, paths[name], splits[name], have)
    check(len(args.qa) > 1 or not failures, "".join(failures))  # a single file's is told once
    for message in failures:
        print(f"failed: {wsi_llava.one_line(message, 2000)}", file=sys.stderr)
    what = f"{count(len(failures), 'question file')} could not be read, see above"
    check(not failures, f"{what}; the others are done")


# ---- The toy cohort: slides whose reports and questions are true of what is drawn --------------------------

SIDE = 2048  # pixels of a toy slide, at 0.5 um/px: 8 x 8 tiles
# each type's colour between the nuclei of the tumour; pixels from one nucleus to the next, their radius
TYPES = {
    "adenocarcinoma": ((214, 160, 200), 84, 5.5),
    "squamous cell carcinoma": ((228, 138, 168), 34, 7),
    "small cell carcinoma": ((186, 160, 206), 17, 6),
    "mucinous carcinoma": ((206, 212, 234), 92, 6),
}
# the tumour's share of the tissue
GRADES = {"grade 1": (0.15, 0.25), "grade 2": (0.42, 0.54), "grade 3": (0.76, 0.90)}
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


def draw_slide(case):
    """One toy slide: a round piece of tissue, in it a tumour whose texture is the type and whose share is
    the grade, a necrosis in one quadrant, and pigment or none -> (RGB image, the corners of the tiles that
    hold the pigment)."""
    rng = np.random.default_rng(case["seed"])
    y, x = np.mgrid[: SIDE // 8, : SIDE // 8] / (SIDE // 8) * 2 - 1
    tissue = np.hypot(x, y) < 0.86 + 0.05 * noise(rng, 5)
    dx, dy = QUADRANTS[case["position"]] * rng.uniform(0.36, 0.46, 2)
    necrosis = tissue & (np.hypot(x - dx, y - dy) < 0.29 + 0.03 * noise(rng, 8))
    viable = tissue & ~necrosis
    field = noise(rng, 5) + 0.25 * noise(rng, 16)
    tumour = viable & (field > np.quantile(field[viable], 1 - rng.uniform(*GRADES[case["grade"]])))

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
        inside = np.argwhere(tissue.reshape(8, 32, 8, 32).mean((1, 3)) > 0.95)
        for row, column in rng.permutation(inside)[: rng.integers(1, 3)]:
            corner = np.array([column, row]) * TILE
            spots = TILE / 2 + rng.uniform(-24, 24, 2) + rng.normal(0, 26, (46, 2)).clip(-64, 64)
            dots(rng, draw, corner + spots, 7, (109, 66, 22))
            planted.append(corner.tolist())
    stain = rng.uniform(0.85, 1.15)  # no two laboratories stain alike
    table = [round(255 * (i / 255) ** stain) for i in range(256)]
    return picture.point(table * 3), planted


def draw_case(case, path):
    """One process's share of the drawing -> the tiles of the pigment. A plain picture, whose dpi say its
    um/px."""
    picture, planted = draw_slide(case)
    with replacing(path) as temporary:
        picture.save(temporary, "JPEG", quality=85, dpi=(25400 / TARGET_MPP,) * 2)
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


# task -> (ways to ask, the answer), filled in from what the slide shows
QUESTIONS = {
    "report": ("Write a report of this slide.|What does this slide show?", ""),
    "type": (
        "What is the histological type of the tumor?|Which type of tumor is this?",
        "The tumor is {a_type}.",
    ),
    "grade": (
        "What is the grade of the tumor?|How is this tumor graded by its share of the tissue?",
        "The tumor is {grade}.",
    ),
    "position": (
        "Where on the slide is the necrosis?|Which part of the slide is necrotic?",
        "The necrosis is at the {position}.",
    ),
    "focus": (
        "Is there a focus of brown pigment?|Can brown pigment be found on this slide?",
        "{yes_no}, brown pigment is {focus}.",
    ),
    # The text gives the answer away: a model without the slide does as well, and the table shows it.
    "subtype": (
        "Estrogen receptor is {er} and HER2 is {her2}. What is the molecular subtype?",
        "The molecular subtype is {subtype}.",
    ),
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
SHARES = {"grade 1": "about a fifth", "grade 2": "about half", "grade 3": "most"}


def write_questions(case, rng):
    """Rows of the dataset about one slide: its report, one question of each kind, and a dialogue of three."""
    er, her2 = case["receptors"]
    words = {**case, "er": er, "her2": her2, "subtype": SUBTYPES[er, her2], "share": SHARES[case["grade"]]}
    words["a_type"] = f"{'an' if case['type'][0] in 'aeiou' else 'a'} {case['type']}"
    words |= {
        "pigment": PIGMENT[case["focus"]].split("|"),
        "yes_no": "Yes" if case["focus"] == "present" else "No",
    }
    talks = {}
    for task, (asked, answer) in QUESTIONS.items():
        question, answer = rng.choice(asked.split("|")), answer or rng.choice(REPORTS)
        turns = ("human", question), ("gpt", answer)
        talks[task] = [{"from": who, "value": str(text).format(**words)} for who, text in turns]
    order = rng.permutation(["type", "grade", "position", "focus"])[:3]
    talks["dialogue"] = [turn for task in order for turn in talks[task]]
    rows = []
    for task, turns in talks.items():
        turns = [{**turns[0], "value": f"<image>\n{turns[0]['value']}"}, *turns[1:]]
        row = {"id": f"{case['slide']}-{task}", "slide": case["slide"], "task": task, "cancer": "demo"}
        rows.append(row | {"conversations": turns})
    return rows


def draw_cohort(args, recipe, folder):
    """Slides into the folder, their questions into data/qa, and data/cohort.json, which says what each of
    them shows."""
    cases = invent_cases(recipe["train"], recipe["test"], args.seed)
    print(
        f"Drawing {len(cases)} toy slides ({recipe['train']} to train on, {recipe['test']} held out) into "
        f"{folder}: JPEGs of {SIDE} x {SIDE} pixels at {TARGET_MPP} um/px."
    )
    for path in (folder, args.data / "qa"):
        path.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{case['slide']}.jpg" for case in cases]
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
    """Draws the cohort, then takes it through the same steps as real slides. -> the cases, what each slide
    shows."""
    args.preset, args.max_tiles = "demo", 0  # train.py's --max-tiles is an ablation of the training alone
    recipe = {"train": args.demo_slides, "test": args.demo_slides // 5, "seed": args.seed}
    folder, path = args.data / "slides", args.data / "cohort.json"
    own = (args.data / "meta.json").exists() and not path.exists()
    check(not own, f"{args.data} holds data of your own; give the demo a folder of its own with --data")
    if path.exists():
        with reading(path, "not what --demo writes; delete the folder, or name another --data"):
            cohort = json.loads(path.read_text(encoding="utf-8"))
            clash = f"holds another demo cohort ({cohort['recipe']}, not {recipe}); name another --data"
            check(cohort["recipe"] == recipe, f"{args.data} {clash}")
            cases = cohort["cases"]
            invented = json.loads(json.dumps(invent_cases(recipe["train"], recipe["test"], args.seed)))
            told = [case | {"planted": list(planted["planted"])} for case, planted in zip(invented, cases)]
            other = f"{path}: other slides than its recipe's; delete the folder, or name another"
            check(cases == told, other)
    else:
        cases = draw_cohort(args, recipe, folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))  # this small encoder takes no more time than the readers
    failures = prepare_slides(args, {case["slide"]: folder / f"{case['slide']}.jpg" for case in cases})
    torch.set_num_threads(threads)
    if failures:
        raise UserError(f"{len(failures)} toy slides failed, the first: {failures[0][1]}")
    write_index(args.data)
    return cases


# ---- Flags and main --------------------------------------------------------------------------------------


def add_demo_flags(parser):
    add, slides = parser.group("the demo"), "toy slides to train on (default: 500); a fifth more are held out"
    add("--demo-slides", slides, type=at_least(5), default=500)


def parse(argv=None):
    parser = wsi_llava.Parser(__doc__)
    yes, count, paths = {"action": "store_true"}, at_least(1), {"nargs": "+", "metavar": "PATH"}
    microns = {"type": at_least(MPP_RANGE[0], float, MPP_RANGE[1])}
    add = parser.group("what to prepare")
    add("--slides", "slides, folders of slides, .txt lists of paths", **paths)
    add("--features", "features made elsewhere (.pt, .h5), or their folders", **paths)
    add("--qa", f"question files; {WHAT_IS_READ}", nargs="+", metavar="FILE")
    add("--demo", "draw the toy cohort and prepare it", **yes)
    add("--dry-run", "list the slides and their tiles; write nothing", **yes)
    again = "make features again that are there already; begin anew the splits that --qa writes"
    add("--overwrite", again, **yes)
    add("--shard", "one of N shares of the slides, for job arrays", metavar="I/N", default="1/1")
    add = parser.group("slides and their tiles")
    add("--target-mpp", "um per pixel of the tiles (default: 0.5)", **microns, default=TARGET_MPP)
    add("--mpp", "um per pixel at level 0 of slides whose metadata do not say it", **microns)
    add("--mpp-csv", "slide by slide, lines of slide,mpp; wins over what slides say", metavar="FILE")
    add("--min-tissue", "least share of tissue in a tile (default: 0.25)", type=share, default=0.25)
    masks = "what is tissue: for each slide a picture or QuPath's GeoJSON of its name"
    add("--mask", masks, metavar="DIR", type=some_path)
    add("--step", "pixels from tile to tile (default: 256)", type=count, default=TILE)
    most = "at most so many of a slide's tiles, drawn at random (default: all)"
    add("--max-tiles", most, type=at_least(0), default=0)
    add("--batch", "tiles a batch through the encoder (default: 64)", type=count, default=64)
    add("--geojson", "also write qc/<slide>.geojson, the tiles for QuPath", **yes)
    add = parser.group("questions")
    told = "of --qa's files (default: what their names or rows tell)"
    add("--split", told, choices=["train", "val", "test"])
    add("--drop-leaks", "leave out of training what shares a slide or a patient with the test", **yes)
    add_demo_flags(parser)
    wsi_llava.add_weights_flags(parser, rest=False)
    wsi_llava.add_shared_flags(parser)
    return parser.parse_args(argv)


def with_defaults(args):
    """Another script's flags, completed by the defaults of this one's."""
    return argparse.Namespace(**(vars(parse([])) | vars(args)))


def own_share(args):
    """--shard and torchrun's environment -> (which share of the slides is this process's, from 0; of how
    many)."""
    match = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    i, n = map(int, match.groups()) if match else (0, 0)
    check(1 <= i <= n, f"--shard {args.shard}: I/N with I from 1 to N, such as 3/16")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return (i - 1) * world + rank, n * world


def main(argv=None):
    args = parse(argv)
    given = args.slides or args.features or args.qa or args.demo
    check(given, "nothing to do: give --slides, --features, --qa or --demo (--help explains)")
    drawn = "--demo draws its slides; --dry-run is about slides that are there"
    check(not (args.demo and args.dry_run), drawn)
    check(not args.mask or args.mask.is_dir(), f"--mask {args.mask}: no such folder")
    number, shares = own_share(args)
    together = args.slides and "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if together:  # by torchrun, which ends all as soon as one fails: so they wait for one another below
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
        failures += prepare_slides(args, slides, number, shares)
        if together:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        if not args.dry_run:
            with disk_errors(args.data):
                write_index(args.data)
    if args.qa and os.environ.get("RANK", "0") == "0":
        with disk_errors(args.data):
            import_qa(args)
    for _, message in failures:
        print(f"failed: {wsi_llava.one_line(message, 2000)}", file=sys.stderr)
    if failures:
        where, rest = f"listed above and in {args.data}/failures", "the others are done"
        if args.dry_run:
            where, rest = "listed above", "the others can be"
        raise UserError(f"{count(len(failures), 'slide')} could not be prepared ({where}); {rest}")


if __name__ == "__main__":
    wsi_llava.run(main, on_interrupt="interrupted; the same command goes on where this one stopped")
