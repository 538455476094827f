"""What wsi_llava.py, train.py, prepare.py and sample.py promise, in this order, a test a promise; then
benchmarks.

Tests that need the slides and questions of ../shared skip where it is absent; every behaviour also has a test
that needs only this repository.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import email.utils
import errno
import functools
import http.server
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: a thread each, also of what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Benchmarks compile Triton's kernels, tests interpret them on the CPU. Before triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if __name__ == "__main__" else "1")
if os.environ["TRITON_INTERPRET"] == "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what the tests compare are a CPU's numbers

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import prepare
import sample
import train
import wsi_llava
from wsi_llava import IGNORE, IMAGE_TOKEN, PRESETS, UserError

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
GOLDEN = HERE / "assets" / "upstream.safetensors"
slow = pytest.mark.slow  # over two seconds, or asks for the demo: pytest -m "not slow" leaves these tests out
gpu = pytest.mark.gpu  # also on a GPU, with compiled kernels: TRITON_INTERPRET=0 pytest -m gpu


# ---- What several sections use ----


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers alone as among others."""
    torch.manual_seed(0)


def relative(a, b):
    """Largest error as a share of the largest reference value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def agrees(what, got, want, tolerance):
    """Asserts that two tensors are the same within a tolerance; prints how far apart (see pytest -rP)."""
    error = relative(got, want)
    print(f"{what}: error {error:.1e} of the largest value")
    assert error < tolerance, what


def script(name, *arguments, env=None):
    """Runs a script as a user would."""
    command, env = [sys.executable, HERE / name, *map(str, arguments)], os.environ | (env or {})
    return subprocess.run(
        command, capture_output=True, text=True, cwd=HERE, stdin=subprocess.DEVNULL, env=env
    )


def torchrun(processes, *arguments, program="train.py"):
    """The command that a user types, as a list."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return list(map(str, [*run, HERE / program, *arguments]))


def assembled(stage, *arguments):
    """The model as it stands after a stage, by train.py's flags."""
    args = train.parse(list(map(str, arguments)))
    wsi_llava.resolve_device(args)
    return wsi_llava.load_model(args, wsi_llava.read_meta(args.data), stage)[0]


TALK = [
    {"from": "human", "value": "<image>\nWhich type of tumor is this?"},
    {"from": "gpt", "value": "The tumor is an adenocarcinoma."},
    {"from": "human", "value": "What is its grade?"},
    {"from": "gpt", "value": "It is grade 2."},
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    words = "The tumor is an adenocarcinoma. Which type of tumor is this? What is its grade? It is grade 2."
    vicuna = wsi_llava.CHAT_FORMATS["vicuna"]
    train.train_tokenizer(path, [words] * 40 + [vicuna.start + vicuna.human.format("")] * 20)
    return wsi_llava.Tokenizer(path)


@pytest.fixture
def tiny(tokenizer):
    """The demo's model, smaller still."""
    cfg = copy.deepcopy(PRESETS["demo"])
    cfg.llama = wsi_llava.LlamaConfig(tokenizer.size, 64, 2, 4, 2, 96, context=256)
    cfg.n_visual_tokens = 9
    torch.manual_seed(0)
    return wsi_llava.WSILLaVA(cfg).eval()


@torch.no_grad()
def greedy(llama, ids, n, cached):
    """ids [B,T] -> [B,T+n], each time the most likely one more."""
    cache = wsi_llava.KVCache(llama.cfg, len(ids), 4096, "cpu", torch.float32) if cached else None
    new = ids
    for _ in range(n):
        new = llama(new if cached else ids, cache=cache)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], 1)
    return ids


def hf_llama(folder, family="Llama", **changes):
    """A small language model of transformers with random weights, saved to the folder."""
    transformers = pytest.importorskip("transformers")
    config = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, intermediate_size=112)
    config |= dict(num_attention_heads=4, num_key_value_heads=2, rope_theta=5000.0)
    config |= dict(max_position_embeddings=128) | changes
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        if p.dim() == 1:  # biases start at 0 and norms at 1, where a fault would not show
            torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    model.save_pretrained(folder, max_shard_size="60KB")  # so that there is an index of shards
    return model


def write_tiff(path, image, mpp=0.5, downsamples=(1, 2, 4), levels=()):
    """A tiled, pyramidal TIFF with its um/px and JPEG tiles: per level a directory of 12-byte entries. levels:
    pictures of some of them {downsample: picture}."""
    body, offset_of_next = bytearray(struct.pack("<2sHI", b"II", 42, 0)), 4
    for downsample in downsamples:
        size = tuple(side // downsample for side in image.size)
        picture = dict(levels).get(downsample, image.resize(size, Image.Resampling.BOX))
        size, offsets, lengths = picture.size, [], []
        for y, x in itertools.product(range(0, size[1], 256), range(0, size[0], 256)):
            tile = io.BytesIO()
            picture.crop((x, y, x + 256, y + 256)).save(tile, "JPEG", quality=80)
            offsets.append(len(body))
            lengths.append(len(tile.getvalue()))
            body += tile.getvalue() + b"\0" * (len(tile.getvalue()) % 2)
        values = len(body)
        body += struct.pack("<3H2x2I", 8, 8, 8, round(1e4 / mpp / downsample), 1)
        body += struct.pack(f"<{2 * len(offsets)}I", *offsets, *lengths)
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
            (322, 4, 1, 256),
            (323, 4, 1, 256),
            (324, 4, len(offsets), values + 16),  # TileOffsets
            (325, 4, len(offsets), values + 16 + 4 * len(offsets)),  # TileByteCounts
        ]
        assert len(offsets) > 1  # a level of one tile would keep its offset in the entry itself
        struct.pack_into("<I", body, offset_of_next, len(body))
        body += struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        offset_of_next = len(body)
        body += struct.pack("<I", 0)
    path.write_bytes(body)


CASE = {"seed": 5, "type": "adenocarcinoma", "grade": "grade 2", "position": "upper left", "focus": "present"}


def tissue_mask(picture):
    """RGB thumbnail -> bool [h,w]: what is stained, and no ink."""
    return prepare.find_tissue(picture)[0]


@pytest.fixture(scope="session")
def toy_slide(tmp_path_factory):
    """One toy slide -> (its TIFF, the image it was written from, the corners of the tiles with pigment)."""
    path = tmp_path_factory.mktemp("slides") / "toy.tif"
    image, planted = prepare.draw_slide(CASE)
    write_tiff(path, image)
    return path, image, planted


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A demo too short to learn more than to speak -> (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("demo")
    places = ["--data", folder / "data", "--out", folder / "out"]
    done = script("train.py", "--demo", 15, "--epochs", 1, "--val", 0.2, *places)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


# ---- wsi_llava.py: parity with upstream ----

# assets/upstream.safetensors holds outputs of upstream's own code (timm, Prov-GigaPath's LongNet) and the
# names and shapes of its checkpoints, which `fill` fills. Of tokens it has every 13th channel: each sums over
# all channels of the layer before, so a fault shows in any of them.


def fill(name, shape):
    """Weights that are a function of name and shape: norms near 1, small biases, matrices of unit gain."""
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("weight") and x.ndim == 1:
        x = 1 + 0.1 * x
    elif name.endswith("gamma"):
        x = 0.5 + 0.1 * x
    elif name.endswith("bias") or "token" in name or name == "pos_embed":
        x = 0.1 * x
    else:
        x = x / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(x)


def golden(part):
    """-> a part's checkpoint {name: tensor}, what upstream's code computed with it {name: tensor}."""
    with safe_open(GOLDEN, "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])[part]
        names = [name for name in file.keys() if name.startswith(part)]  # noqa: SIM118 (not a dict)
        outputs = {name.removeprefix(f"{part}."): file.get_tensor(name) for name in names}
    return {name: fill(name, shape) for name, shape in shapes.items()}, outputs


@slow
@pytest.mark.parametrize("part, seed, n", [("vit_d2_w192", 0, 3), ("vit_d3_w1536", 1, 1)])
def test_tile_encoder_equals_upstream(tmp_path, part, seed, n):
    state, want = golden(part)
    torch.save(state, tmp_path / "pytorch_model.bin")
    encoder = wsi_llava.load_tile_encoder(tmp_path / "pytorch_model.bin")
    small = np.random.RandomState(seed).randint(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    tiles = [np.array(Image.fromarray(x).resize((256, 256), Image.Resampling.BICUBIC)) for x in small]
    images = wsi_llava.preprocess_tiles(torch.from_numpy(np.stack(tiles)))
    torch.testing.assert_close(images[:, :, ::37, ::41], want["pre"])
    with torch.no_grad():
        agrees(f"tile encoder, {part}", encoder(images), want["cls"], 2e-4)


def test_other_tiles_are_refused():
    tiles = torch.zeros(2, 256, 256, 3, dtype=torch.uint8)
    for wrong in (tiles.float(), tiles[:, :224], tiles[..., :2]):
        with pytest.raises(ValueError, match=r"tiles must be uint8 \[B,256,256,3\]"):
            wsi_llava.preprocess_tiles(wrong)


@slow
def test_slide_encoder_equals_upstream(tmp_path):
    state, want = golden("longnet_12l768d")
    torch.save({"model": state}, tmp_path / "slide_encoder.pth")
    encoder = wsi_llava.load_slide_encoder(tmp_path / "slide_encoder.pth")
    for n in (1, 5, 100, 1024, 1500, 3000):
        rs = np.random.RandomState(n)
        features = torch.from_numpy(rs.standard_normal((n, 1536))).float()
        side = max(1, math.ceil(math.sqrt(1.6 * n)))
        cells = np.sort(rs.permutation(side * side)[:n])
        coords = torch.from_numpy(np.stack([cells % side, cells // side], 1) * 256)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            encoded = encoder.encode(features, coords, [n])
            patch.setattr(encoder, "encode", lambda *_, encoded=encoded: encoded)  # once, for both
            cls, tokens = encoder(features, coords, [n])
            pooled = encoder.visual_tokens(features, coords, [n])
        tokens, pooled = tokens[want[f"n{n}.rows"], ::13], pooled[0, want[f"n{n}.pool_rows"], ::13]
        agrees(f"slide encoder, {n} tiles, CLS", cls[0], want[f"n{n}.cls"], 1e-3)
        agrees(f"slide encoder, {n} tiles, tokens", tokens, want[f"n{n}.tokens"], 1e-3)
        agrees(f"visual tokens of {n} tiles", pooled, want[f"n{n}.pooled"], 1e-3)


LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES = {
    "Vicuna": ("Llama", {}),
    "Llama 3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "Llama 3.2, SmolLM2": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Qwen2.5": ("Qwen2", {}),
    "Qwen2.5, small": ("Qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "Qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_language_models_equal_transformers(tmp_path, name):
    """Logits and greedy ids, from shards; what save_llama writes; with adapters and in int8."""
    transformers = pytest.importorskip("transformers")
    family, changes = FAMILIES[name]
    theirs = hf_llama(tmp_path, family, **changes)
    ours, ids = wsi_llava.load_llama(tmp_path), torch.randint(97, (2, 40))
    want = theirs(ids).logits.detach()
    with torch.no_grad():
        agrees(f"{name} against transformers", ours(ids), want, 1e-5)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    generated = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for cached in (False, True):
        assert torch.equal(greedy(ours, ids, 24, cached), generated)
    wsi_llava.save_llama(ours, tmp_path / "back", projector=wsi_llava.make_projector(160, 64))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(theirs)
    agrees("what save_llama wrote, in transformers", back(ids).logits.detach(), want, 1e-5)
    assert wsi_llava.load_llama(tmp_path / "back").cfg == ours.cfg
    assert wsi_llava.load_projector(tmp_path / "back")[0].in_features == 160
    with torch.no_grad():
        adapted = with_adapters(ours)(ids)
        assert relative(want, adapted) > 0.05
        agrees("adapters, merged", wsi_llava.merge_lora(ours)(ids), adapted, 1e-5)
        assert 0 < relative(wsi_llava.quantize_int8(ours)(ids), adapted) < 0.05


# ---- wsi_llava.py: dilated attention against its definition ----


def dense_dilated_attention(q, k, v, segments, dilations, pad_keys):
    """The definition, head by head with an L x L matrix: how often query i and key j meet."""
    B, L, H, D = q.shape
    out = torch.zeros_like(q)
    position = torch.arange(L)
    for h in range(H):
        meet, padded = torch.zeros(L, L, dtype=q.dtype), torch.zeros(L, dtype=q.dtype)
        for W, R in zip(segments, dilations):
            W = min(W, L)
            kept = position % W % R == h // math.ceil(H / R)
            together = (position[:, None] // W == position // W) & kept[:, None] & kept
            meet += together
            padded += kept * (math.ceil(W / R) - together.sum(1)) * pad_keys
        weight = meet * (q[:, :, h] @ k[:, :, h].transpose(1, 2) / math.sqrt(D)).exp()  # [B,L,L]
        total = weight.sum(-1) + padded
        out[:, :, h] = weight @ v[:, :, h] / torch.where(total > 0, total, 1).unsqueeze(-1)
    return out


SHAPES = [  # B, L, H, D, segments, dilations: chosen to break things
    (1, 1, 1, 16, (4,), (1,)),
    (1, 3, 2, 16, (8, 16, 32), (1, 2, 4)),  # shorter than the shortest segment
    (1, 7, 2, 16, (8, 16), (1, 2)),  # W - 1, then W, and W + 1: a last segment of one token
    (1, 8, 2, 16, (8, 16), (1, 2)),
    (1, 9, 2, 16, (8, 16), (1, 2)),
    (1, 53, 3, 16, (20, 40), (1, 2)),  # a prime; H not divisible by R
    (1, 21, 2, 16, (10, 30), (3, 7)),  # R does not divide W, more offsets than heads: some get nothing
    (1, 29, 5, 24, (16, 64), (1, 4)),  # H not divisible by R, padding in the last head's branch
    (1, 23, 2, 48, (16, 32), (1, 2)),
    (1, 23, 1, 80, (16, 32), (1, 2)),
    (1, 23, 1, 128, (16, 32), (1, 2)),
    (1, 211, 1, 16, (128, 512), (1, 2)),  # several blocks of rows, and of keys
    (1, 300, 2, 16, (290, 600), (1, 2)),  # the same for the larger blocks of half precision
    (1, 19, 8, 16, (16, 2**40), (4, 8)),  # a rest of 3 tokens, fewer than R; 64 bits of offsets
    (2, 26, 3, 16, (5, 13), (5, 4)),  # R = W; every branch pads; a batch of two
]
compiled = os.environ["TRITON_INTERPRET"] == "0"
needs_triton = pytest.mark.skipif(
    wsi_llava.triton is None or compiled and not torch.cuda.is_available(), reason="needs triton"
)


@gpu
@needs_triton
@pytest.mark.parametrize("pad_keys", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "impl, dtype, tolerance",
    [  # in half precision a few roundings of the largest value
        ("torch", torch.float32, 3e-6),
        ("mps", torch.float32, 3e-6),  # where PyTorch's fused CPU kernel is not
        ("triton", torch.float32, 3e-6),
        ("triton", torch.bfloat16, 2e-2),
        ("triton", torch.float16, 2.5e-3),
    ],
)
def test_dilated_attention_equals_its_definition(shape, impl, dtype, tolerance, pad_keys, monkeypatch):
    """Output and gradients, branch by branch and by the kernels, interpreted or on a GPU."""
    B, L, H, D, segments, dilations = shape
    q, k, v, grad = (x.to(dtype) for x in torch.randn(4, B, L, H, D))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = dense_dilated_attention(*leaves, segments, dilations, pad_keys)
    want = [want, *torch.autograd.grad(want, leaves, grad.double())]
    device = machine()[0]
    leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
    if impl == "mps":
        monkeypatch.setattr(wsi_llava, "_on_cpu", lambda x: False)
    impl = impl.replace("mps", "torch")
    got = wsi_llava.dilated_attention(*leaves, segments, dilations, pad_keys, impl=impl)
    got = [got, *torch.autograd.grad(got, leaves, grad.to(device))]
    for name, a, b in zip(("output", "dq", "dk", "dv"), got, want):
        largest = max(1.0, b.abs().max().item())
        error = (a.double().cpu() - b).abs().max() / largest
        print(f"{shape}, {dtype}, {name}: error {error:.1e} of the largest value")
        assert error < tolerance, name


# ---- wsi_llava.py: the Triton kernels, and compiled for GPUs that are not here ----


@gpu
@needs_triton
def test_kernel_takes_any_strides_and_gives_the_same_bits_twice():
    """q, k, v as views of one packed projection, as a fused qkv layer gives them, a transposed gradient."""
    device = machine()[0]
    packed = torch.randn(1, 21, 3, 2, 16, device=device, requires_grad=True)
    grad = torch.randn(1, 2, 21, 16, device=device).transpose(1, 2)
    found = []
    for impl in ("torch", "triton", "triton"):
        out = wsi_llava.dilated_attention(*packed.unbind(2), (8, 32), (1, 2), impl=impl)
        found.append([out, *torch.autograd.grad(out, packed, grad)])
    torch.testing.assert_close(found[0], found[1])
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2]))


@pytest.mark.parametrize(
    "shape, dtype, W",
    [
        ((1, 4, 1, 8), torch.float32, 4),  # heads too narrow, and in double precision
        ((1, 4, 1, 16), torch.float64, 4),
        ((1, 1, 70000, 16), torch.float32, 4),  # too many heads, tokens, offsets in a segment, segments
        ((1, 2**31, 1, 16), torch.float32, 4),
        ((1, 2**22, 16, 48), torch.float32, 2**22),
        ((1, 70000, 1, 16), torch.float32, 1),
    ],
)
def test_kernels_refuse_what_is_beyond_their_limits(shape, dtype, W):
    x = torch.empty(shape, dtype=dtype, device="meta")
    refusal = re.escape(f"the Triton kernels cannot take {dtype} {list(shape)} on meta")
    with pytest.raises(ValueError, match=refusal):
        wsi_llava.dilated_attention(x, x, x, (W,), (1,), impl="triton")


def test_without_triton_torch_serves(monkeypatch):
    x = torch.randn(1, 4, 1, 16)
    with pytest.raises(ValueError, match="as many segments as dilations"):
        wsi_llava.dilated_attention(x, x, x, (4, 8), (1,))
    monkeypatch.setattr(wsi_llava, "triton", None)
    with pytest.raises(ValueError, match="the Triton kernels cannot take"):
        wsi_llava.dilated_attention(x, x, x, (4,), (1,), impl="triton")
    assert wsi_llava.dilated_attention(x, x, x, (4,), (1,)).shape == x.shape


# Bytes of shared memory that a block may use, by compute capability: A100, A40, L40, H100.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}


def kernel_resources():
    """What the kernels take of GPUs that need not be there, off the machine code. spills: stores of registers
    to memory and loads back. mma: tensor core instructions."""
    kernels, rows = (wsi_llava._forward_kernel, wsi_llava._dq_kernel, wsi_llava._dkv_kernel), []
    types = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    cases = [(gpu, 48) for gpu in SHARED_LIMIT] + [(86, 128), (90, 128)]
    for kernel, (gpu, D), dtype in itertools.product(kernels, cases, types):
        row = {"kernel": kernel.__name__, "gpu": f"sm_{gpu}", "dtype": types[dtype], "head_dim": D}
        options = wsi_llava._launch_options(kernel, D, dtype)
        rows.append(row | compiled_resources(kernel, gpu, types[dtype], options))
    return rows


def compiled_resources(kernel, gpu, dtype, options):
    """What one kernel takes on one GPU, by the compiler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in {"PAD": True, **options}.items() if name in kernel.arg_names}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("q", "k", "v", "grad"), f"*{dtype}")
    types |= dict.fromkeys(("out", "lse", "delta", "dq", "dk", "dv"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    # In a real launch pointers and D are multiples of 16, and Triton compiles for that.
    aligned = {}
    for i, name in enumerate(kernel.arg_names):
        if name == "D" or signature[name].startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    compiled = wsi_llava.triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", gpu, 32),
        options={name: options[name] for name in ("num_warps", "num_stages")},
    )
    cuobjdump = Path(wsi_llava.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        said = subprocess.check_output([cuobjdump, "--dump-resource-usage", "-sass", cubin], text=True)
    return {
        "registers": int(re.search(r"REG:(\d+)", said)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", said)),
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[gpu],
        "mma": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", compiled.asm["ptx"])),
    }


@gpu
@slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_pipeline_on_a_gpu(demo, tmp_path):
    """All commands in bfloat16, the default there; what the encoders make is the CPU's in float32."""
    folder, printed = demo
    assert "on cuda" in printed
    places = ["--data", folder / "data", "--out", folder / "out"]
    cpu = ["--data", tmp_path / "data", "--preset", "demo", "--device", "cpu"]
    slide = next((folder / "data" / "slides").iterdir())
    assert script("prepare.py", "--slides", slide, *cpu).returncode == 0
    there, here = (load_file(wsi_llava.features_file(d / "data", slide.stem)) for d in (folder, tmp_path))
    agrees("features", there["features"].float(), here["features"].float(), 3e-2)
    ask = ["sample.py", "--slide", slide.stem, "--ask", "Which type?", "--max-new-tokens", 8, "--int8"]
    for command in ([*ask, "--heatmap", tmp_path / "heat.png"], ["train.py", "--stage", 3, "--full"]):
        done = script(*command, *places)
        assert done.returncode == 0, done.stderr
    subprocess.run(torchrun(1, "--stage", 1, "--epochs", 1, *places), cwd=tmp_path, check=True)  # by NCCL


@slow
@needs_triton
def test_the_kernels_compile_for_real_gpus_without_spills():
    """No GPU needed: sm_80 (A100), sm_86 and sm_89 (whose shared memory is smaller), sm_90 (H100)."""
    code = "import json, test_wsi_llava; print(json.dumps(test_wsi_llava.kernel_resources()))"
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, env=env)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 3 * (4 + 2) * 2  # kernels, GPUs (two with wide heads), dtypes
    for row in rows:
        assert row["spills"] == 0 and row["registers"] <= 255 and row["shared"] <= row["shared_limit"], row
        assert (row["mma"] > 0) == (row["dtype"] == "bf16"), row  # tensor cores wherever the dtype allows


# ---- wsi_llava.py: slide encoder ----


def test_pooling_repeats_few_tiles_and_averages_many():
    tokens = torch.arange(6.0).view(1, 6, 1)
    assert wsi_llava.Pool(None, 3)(tokens).flatten().tolist() == [0.5, 2.5, 4.5]
    assert wsi_llava.Pool(None, 4)(tokens[:, :2]).flatten().tolist() == [0, 0, 1, 1]


def test_stochastic_depth_leaves_out_whole_slides_in_training():
    """And enlarges the others' updates, so that the mean stays; deeper layers are left out more often."""
    cfg = dataclasses.replace(PRESETS["demo"].slide_encoder, depth=5, drop_path=0.2)
    layers = wsi_llava.SlideEncoder(cfg).encoder["layers"]
    assert [layer.drop_path for layer in layers] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    x, update, lengths = torch.zeros(8000, 3), torch.ones(8000, 3), [1, 3] * 2000
    assert torch.equal(layers[4].eval().residual(x, update, lengths), update)
    left = layers[4].train().residual(x, update, lengths).split(lengths)
    assert all((slide == slide[0, 0]).all() for slide in left)
    kept = torch.stack([slide[0, 0] for slide in left])
    assert kept.mean() == pytest.approx(1, abs=0.05) and kept.unique().tolist() == pytest.approx([0, 1.25])


def packed(lengths, width=128):
    """Features and coords of slides one after the other."""
    coords = [torch.stack([torch.arange(n) % 40, torch.arange(n) // 40], -1) * 256 for n in lengths]
    return torch.randn(sum(lengths), width), torch.cat(coords)


def test_a_slide_is_the_same_alone_and_in_company():
    """Forward and backward, what comes of each of the packed slides is its own."""
    lengths, encoder = [70, 1, 300, 33], wsi_llava.SlideEncoder(PRESETS["demo"].slide_encoder, 9)
    features, coords = packed(lengths)
    cls, tokens = encoder(features, coords, lengths)
    visual = encoder.visual_tokens(features, coords, lengths)
    assert cls.shape == (4, 128) and tokens.shape == (404, 128) and visual.shape == (4, 9, 128)
    weight, proj = torch.randn(4, 9, 128), encoder.patch_embed["proj"].weight
    (grad,) = torch.autograd.grad((visual * weight).sum(), proj)
    total = 0
    slides = zip(features.split(lengths), coords.split(lengths), tokens.split(lengths))
    for i, (x, at, want) in enumerate(slides):
        own_cls, own_tokens = encoder(x, at, [len(x)])
        own = encoder.visual_tokens(x, at, [len(x)])[0]
        for what, a, b in (
            ("CLS", own_cls[0], cls[i]),
            ("tokens", own_tokens, want),
            ("visual", own, visual[i]),
        ):
            agrees(what, a, b, 1e-6)
        total = total + torch.autograd.grad((own * weight[i]).sum(), proj)[0]
    agrees("gradient", total, grad, 1e-5)


@pytest.mark.parametrize("pad_keys", [True, False])
@pytest.mark.parametrize(
    "branches", [((64, 256), (1, 2)), ((8, 32), (2, 4)), ((1024, 5792, 32768), (1, 2, 4))], ids=str
)
def test_short_slides_attend_as_the_branches_say(branches, pad_keys, monkeypatch):
    """In one dense call, forward and backward, also where queries get nothing."""
    cfg = wsi_llava.SlideEncoderConfig(
        64, 64, 2, 8, 64, *branches, pad_keys=pad_keys, dropout=0.0, drop_path=0.0
    )
    encoder, lengths = wsi_llava.SlideEncoder(cfg).double(), [1, 40, 127, 63, 64, 126]
    features, coords = packed(lengths, 64)
    found = []
    for short in (1, 128):
        monkeypatch.setattr(wsi_llava, "SHORT", short)
        with torch.inference_mode():
            encoder(features.double(), coords, lengths)
        encoder.zero_grad()
        cls, tokens = encoder(features.double(), coords, lengths)
        (cls.pow(3).sum() + tokens.sin().sum()).backward()
        found.append([cls.detach(), tokens.detach(), *(p.grad for p in encoder.parameters())])
    for branch_by_branch, dense in zip(*found):
        torch.testing.assert_close(dense, branch_by_branch, rtol=1e-5, atol=2e-5)  # log m is float32


# ---- wsi_llava.py: Llama, and what changes it after loading: adapters, weights in int8 ----


@torch.no_grad()
def test_a_later_turn_on_top_of_the_cache_is_all_at_once(tiny):
    ids = torch.randint(len(tiny.llama.embed_tokens.weight), (2, 17))
    cache = wsi_llava.KVCache(tiny.cfg.llama, 2, 64, "cpu", torch.float32)
    parts = [tiny.llama(piece, cache=cache) for piece in ids.split([9, 2, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), tiny.llama(ids), atol=1e-5, rtol=1e-4)


def with_adapters(llama):
    """The llama with adapters that do something: LoRA's own start as zero."""
    wsi_llava.add_lora(llama, 4, 8)
    for name, p in llama.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p, std=0.1)
    return llama


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 6e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    "width, out, rows",
    [(96, 64, 1), (96, 64, 40), (60, 97, 3)],  # kernel; matmul; no kernel
)
def test_int8_linear_multiplies_by_its_rounded_weight(dtype, tolerance, width, out, rows):
    linear = torch.nn.Linear(width, out, bias=False).to(dtype)
    with torch.no_grad():
        linear.weight[3] *= 100
        linear.weight[5] = 0
    int8 = wsi_llava.Int8Linear(linear).to(dtype)  # as load_model casts all it has
    weight, scale = int8.weight.double() * int8.scale.double()[:, None], int8.scale.double()[:, None]
    assert ((weight - linear.weight.double()).abs() <= scale / 2 * (1 + 1e-6)).all()
    x = torch.randn(2, rows, width, dtype=dtype, requires_grad=True)
    y, grad = int8(x), torch.randn(2, rows, out, dtype=dtype)
    assert y.dtype == dtype and relative(y.double(), x.double() @ weight.T) < tolerance
    y.backward(grad)
    assert relative(x.grad.double(), grad.double() @ weight) < tolerance


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_int8_halves_the_linear_layers_of_bfloat16(tied):
    """Of a tied embedding a copy is rounded, and the words going in stay."""
    llama = wsi_llava.Llama(wsi_llava.LlamaConfig(97, 64, 2, 4, 2, 128, tied=tied)).bfloat16()
    words = llama.embed_tokens.weight.clone()
    before = 2 * sum(p.numel() for p in [*llama.layers.parameters(), words])
    wsi_llava.quantize_int8(llama).bfloat16()  # cast, as load_model does
    weights = [x for name, x in llama.named_buffers() if name.endswith("weight")]
    assert len(weights) == 2 * 7 + 1 and sum(x.numel() * x.element_size() for x in weights) < 0.51 * before
    assert torch.equal(llama.embed_tokens.weight, words)


# ---- wsi_llava.py: tokenizer and prompt ----


@pytest.mark.parametrize(
    "said, pieces",
    [  # what stands before and after the slide, as LLaVA encodes it: each piece by itself, as it stands
        ("<image>\nWhy?", ["", "\nWhy? ASSISTANT:"]),
        ("Why is <image> so?", ["Why is ", " so? ASSISTANT:"]),
        ("Why {}?", ["Why {}? ASSISTANT:"]),
    ],
)
def test_ids_around_the_slide_are_llavas(tokenizer, said, pieces):
    """Spaces included: with Llama's tokenizer `USER: <image>` is `:`, `▁`, the slide, `▁`, newline."""
    vicuna, want = wsi_llava.CHAT_FORMATS["vicuna"], [1]
    for i, piece in enumerate([f"{vicuna.start}USER: {pieces[0]}", *pieces[1:]]):
        want += [IMAGE_TOKEN] * (i > 0) + tokenizer.encode(piece)
    ids, labels = tokenizer.encode_chat([{"from": "human", "value": said}])
    assert ids == want and labels == [IGNORE] * len(ids)
    if said.startswith("<image>"):
        place, space = ids.index(IMAGE_TOKEN), tokenizer.id("\N{LOWER ONE EIGHTH BLOCK}")
        assert ids[place - 1] == ids[place + 1] == space is not None


CHAT_TEMPLATES = {  # of the published tokenizers, shortened to what a system prompt and plain turns take
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}",
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        "<|im_end|>",
    ),
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
        "m.content | trim + '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
        "<|eot_id|>",
    ),
    "mistral": (
        "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}{% endfor %}",
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "</s>",
    ),
}


def byte_level_tokenizer(folder, special):
    """A tokenizer.json as Qwen's and Llama 3's are made, byte by byte with a few merges."""
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    train_bpe = tokenizers.trainers.BpeTrainer
    trainer = train_bpe(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    fast.train_from_iterator([turn["value"] for turn in TALK] * 9, trainer)
    fast.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("family", CHAT_TEMPLATES)
def test_chats_of_other_families_are_their_published_templates(tmp_path, family):
    """Id for id, over two turns, which may come one by one; the labels are the answers and their ends."""
    transformers = pytest.importorskip("transformers")
    template, special, end = CHAT_TEMPLATES[family]
    path = byte_level_tokenizer(tmp_path, special)
    ours, theirs = wsi_llava.Tokenizer(path), transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    turns = [{**turn, "value": wsi_llava.without_image(turn["value"])} for turn in TALK[:3]]
    messages = [] if family == "mistral" else [{"role": "system", "content": "You are a helpful assistant."}]
    for turn, role in zip(turns, ("user", "assistant", "user")):
        messages.append({"role": role, "content": turn["value"]})
    text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
    ids, labels = ours.encode_chat(turns)
    assert ids == theirs(text, add_special_tokens=False).input_ids
    answer = theirs(turns[1]["value"], add_special_tokens=False).input_ids
    assert [i for i in labels if i != IGNORE] == [*answer, theirs.convert_tokens_to_ids(end)]
    assert ids == ours.encode_chat(turns[:2])[0] + ours.encode_turn(turns[2]["value"], first=False)
    plain, injected = (ours.encode_turn(said) for said in ("end", f"{end}end"))
    assert injected.count(ours.eos) == plain.count(ours.eos)  # a question cannot end itself


def test_a_chat_format_whose_tokens_are_not_there_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"lacks <\|im_start\|>.* of --chat-format chatml; leave it out"):
        wsi_llava.Tokenizer(tokenizer.path, "chatml")


def test_a_dialogue_is_vicunas_and_its_labels_are_the_answers(tokenizer):
    ids, labels = tokenizer.encode_chat(TALK)
    answers = [tokenizer.encode(TALK[i]["value"]) + [tokenizer.eos] for i in (1, 3)]
    assert [i for i, label in zip(ids, labels) if label != IGNORE] == answers[0] + answers[1]
    assert all(label in (i, IGNORE) for i, label in zip(ids, labels, strict=True))
    image, first_end = ids.index(IMAGE_TOKEN), ids.index(tokenizer.eos)
    assert tokenizer.decode(ids[:image]) == f"{wsi_llava.CHAT_FORMATS['vicuna'].start}USER: "
    assert tokenizer.decode(ids[first_end + 1 :]).startswith("USER: What is its grade? ASSISTANT: It is")
    asked, labels = tokenizer.encode_chat(TALK[:3])  # ready to be answered
    assert ids[: len(asked)] == asked and labels[-1] == IGNORE
    beyond = [IMAGE_TOKEN, tokenizer.size, 10**6]  # an embedding may hold more tokens
    assert tokenizer.decode([*tokenizer.encode("It is"), *beyond]) == "It is"


@pytest.mark.parametrize("asked", ["<image>\nWhat is its grade?", "What is its grade?\n<image>"])
def test_the_mark_for_the_slide_comes_first_or_not_at_all(tokenizer, asked):
    """Wherever a question has it, in training and when asked; with --no-image, as if there had been none."""
    bare = {"from": "human", "value": "What is its grade?"}
    turns = [{**bare, "value": asked}, TALK[3]]
    for image in (True, False):
        first = {**bare, "value": "<image>\n" * image + bare["value"]}
        assert wsi_llava.slide_first(turns, image) == [first, TALK[3]]
        asked_ids = sample.prompt_ids(tokenizer, {"conversations": turns[:1]}, image)
        assert asked_ids == tokenizer.encode_chat([first])[0]


def test_plain_form_is_image_then_report(tokenizer):
    ids, labels = tokenizer.encode_plain("It is grade 2.")
    assert ids[:2] == [*tokenizer.bos, IMAGE_TOKEN] and labels[:2] == [IGNORE, IGNORE]
    assert ids[2:] == labels[2:] == tokenizer.encode("It is grade 2.") + [tokenizer.eos]


# ---- wsi_llava.py: files, and how a script ends ----


def stage_1(out):
    return wsi_llava.trained_stage(argparse.Namespace(out=out), 1)


@pytest.mark.parametrize(
    "read, name, content, message",
    [
        (wsi_llava.read_meta, "meta.json", "{", "not what prepare.py writes; prepare the data again"),
        (wsi_llava.read_meta, "meta.json", "\xff", "not what prepare.py writes"),
        (wsi_llava.read_meta, "meta.json", '{"version": 0}', "made by another version of this project"),
        (stage_1, "stage1", None, "holds no trained model; train it"),
        (wsi_llava.read_llama_config, "config.json", "[]", "holds no JSON object; --llm takes"),
        (wsi_llava.read_folder, "model.safetensors.index.json", "{}", "lacks 'weight_map'; copy or download"),
        (lambda d: wsi_llava.Tokenizer(d / "t.model"), "t.model", "?", "copy the language model's tokenizer"),
        (lambda d: prepare.read_qa(d / "q.jsonl"), "q.jsonl", None, "no such file; python prepare.py"),
        (lambda d: prepare.read_qa(d / "q.jsonl"), "q.jsonl", '{"a": 1}\n', r"line 1: its fields \(a\) are"),
    ],
)
def test_files_that_are_missing_or_of_another_kind_are_named(tmp_path, read, name, content, message):
    if content:
        (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / name))}.*{message}"):
        read(tmp_path)


ODD_CONFIGS = ["", "null", "3", '"text"', "[]", "[" * 200_000, "\xff", '{"wide": 3}', '{"max_tiles": true}']
ODD_CONFIGS += ['{"llama": null}', '{"tile_encoder": []}', '{"n_visual_tokens": 1e9}', '{"pad_to": -1}']
ODD_CONFIGS += ['{"slide_encoder": {"heads": 0}}', '{"text_encoder": {"heads": 7}}', '{"lora_alpha": NaN}']
ODD_CONFIGS += ['{"llama": {"depth": 100000000}}', '{"llama": {"rope_scaling": ["a"]}}']


@pytest.mark.parametrize("text", [*ODD_CONFIGS, *(cfg.to_json() for cfg in PRESETS.values())])
def test_configs_survive_json_and_odd_ones_are_one_line(tmp_path, text):
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "model.safetensors").touch()
    (tmp_path / "stage1" / "config.json").write_text(text, encoding="latin-1")
    if text not in ODD_CONFIGS:
        assert stage_1(tmp_path)[1].to_json() == text and stage_1(tmp_path)[1] in PRESETS.values()
        return
    with pytest.raises(UserError) as caught:
        stage_1(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("ending", ["bin", "safetensors", "json", "model"])
def test_damaged_bytes_are_one_line(tmp_path, tokenizer, ending):
    """A bit flipped or the end missing, anywhere: read all the same, or refused in a line."""
    path, rng, read = tmp_path / f"x.{ending}", np.random.default_rng(0), wsi_llava.Tokenizer
    if ending in ("bin", "safetensors"):
        (torch.save if ending == "bin" else save_file)({"a": torch.randn(9, 9), "b": torch.randn(4)}, path)
        read = wsi_llava.read_tensors
    else:
        made = byte_level_tokenizer(tmp_path, ["</s>"]) if ending == "json" else tokenizer.path
        shutil.copy(made, path)
    good, refused = path.read_bytes(), 0
    for case in range(120):
        bad = bytearray(good)
        place = int(rng.integers(len(bad)))
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad[:place] if case % 3 == 0 else bad)
        try:
            read(path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
    assert refused > 20


def test_nothing_half_written_under_a_final_name(tmp_path):
    target = tmp_path / "a**[1]"
    target.write_text("old")
    with pytest.raises(RuntimeError), wsi_llava.replacing(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "error, status, said",
    [
        (UserError("bad \x1b]0;title\x07 name\nand more"), "error: bad ]0;title name", ""),
        (OSError(28, "No space left", "x"), "error: [Errno 28] No space left: 'x'", ""),
        (KeyboardInterrupt, 130, "bye\n"),
    ],
)
def test_a_script_ends_in_one_line(capsys, error, status, said):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        wsi_llava.run(main, on_interrupt="bye")
    assert caught.value.code == status and capsys.readouterr().err == said


# ---- wsi_llava.py: the whole model ----


def test_splice_puts_visual_tokens_in_place(tiny, tokenizer):
    ids, labels = tokenizer.encode_chat(TALK)
    short, short_labels = tokenizer.encode_plain("It is grade 2.")
    visual = torch.randn(2, 9, 128)
    embeds, spliced = tiny.splice(visual, [ids, short], [labels, short_labels])
    assert embeds.shape == (2, len(ids) - 1 + 9, 64) and spliced.shape == embeds.shape[:2]
    place = ids.index(IMAGE_TOKEN)
    projected = tiny.mm_projector(F.pad(visual, (0, 160 - 128)))
    torch.testing.assert_close(embeds[0, place : place + 9], projected[0])
    torch.testing.assert_close(embeds[0, place + 9], tiny.llama.embed_tokens.weight[ids[place + 1]])
    assert spliced[0][spliced[0] != IGNORE].tolist() == [label for label in labels if label != IGNORE]
    for wrong, row in ((None, ids), (visual, ids[:place]), (visual, [IMAGE_TOKEN, *ids])):
        with pytest.raises(ValueError, match="row 0 has . <image> in its text and . slides"):
            tiny.splice(wrong, [row, short])


def test_loss_is_that_of_all_logits_row_by_row(tiny, tokenizer):
    """Value and gradient: padding and the logits that no label looks at change nothing."""
    rows = [tokenizer.encode_chat(TALK), tokenizer.encode_plain("It is grade 2.")]
    visual, weight, want = torch.randn(2, 9, 128), tiny.mm_projector[0].weight, 0
    for i, (ids, labels) in enumerate(rows):
        embeds, spliced = tiny.splice(visual[i : i + 1], [ids], [labels])
        logits = tiny.llama(embeds=embeds)[:, :-1].transpose(1, 2)
        want = want + F.cross_entropy(logits, spliced[:, 1:], ignore_index=IGNORE, reduction="sum")
    got = tiny(visual, *zip(*rows), reduction="sum")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight)[0] for loss in (got, want)))


def test_sampling_is_seeded_and_greedy_where_it_is_cold(tiny):
    def draw(**options):
        return list(tiny.generate(torch.zeros(1, 9, 128), [[1, IMAGE_TOKEN, 5]], 12, **options))

    assert draw(temperature=1.0, seed=3) == draw(temperature=1.0, seed=3) != draw(temperature=1.0, seed=4)
    assert draw(temperature=1e-30) == draw() != draw(temperature=1.0)


def test_what_cannot_be_generated_from_is_refused(tiny):
    with pytest.raises(ValueError, match="rows must be of equal length"):
        next(tiny.generate(None, [[1], [1, 2]]))
    with pytest.raises(UserError, match="300 tokens, the language model's context holds 256"):
        next(tiny.generate(None, [[1] * 300]))
    with torch.no_grad():
        tiny.llama.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(UserError, match="logits are not finite"):
        next(tiny.generate(None, [[1, 5, 6]]))


@pytest.mark.parametrize("name", ["../s", "a/b", "/etc/passwd", "..", ".", "", "a\\b", "a\0b", 7, None])
def test_a_name_of_a_slide_cannot_leave_its_folder(tmp_path, name):
    with pytest.raises(UserError, match="not the name of a slide"):
        wsi_llava.slide_file(tmp_path, name)


FEATURES = {"features": torch.randn(20, 128), "coords": torch.zeros(20, 2, dtype=torch.int32)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"features": torch.full((20, 128), math.nan)}, "its features are not finite"),
        ({"coords": torch.zeros(19, 2, dtype=torch.int32)}, r"holds 20 features but coords \[19, 2\]"),
        ({"features": torch.randn(20, 64)}, "its features are 64 wide, not 128"),
        ({"features": torch.randn(20)}, "not enough values to unpack"),
        ({"coords": None}, "lacks 'coords'"),
        ({"coords": torch.full((20, 2), 10**6)}, "outside the grid"),
    ],
)
def test_features_are_checked_when_they_are_read(tiny, tmp_path, change, message):
    """In one line with the file's name; in a loop over many slides, that slide alone fails."""
    (tmp_path / "features").mkdir()
    save_file(FEATURES, tmp_path / "features" / "good.safetensors")
    bad = {name: x for name, x in (FEATURES | change).items() if x is not None}
    save_file(bad, tmp_path / "features" / "bad.safetensors")
    written, problems = wsi_llava.cache_visual_tokens(tiny, tmp_path, ["bad", "good"])
    assert written == 1 and re.search(f"features/bad.safetensors: .*{message}", problems.pop("bad"))
    assert not problems


class FirstTokens(torch.nn.Module):
    """A pool of one's own, whose text is in another file than the slide encoder's."""

    def forward(self, tokens):
        return tokens[:, :9]


def test_visual_tokens_are_kept_until_what_made_them_changes(tiny, tmp_path, monkeypatch):
    """The slide's tiles, the encoder, or the text of any file that holds one of its classes, a pool's too."""
    features, edited, text = tmp_path / "features" / "s.safetensors", [], inspect.getsource
    features.parent.mkdir()
    monkeypatch.setattr(inspect, "getsource", lambda file: text(file) + "# edited" * (file in edited))
    for change in (
        lambda: save_file(FEATURES, features),
        lambda: save_file(FEATURES | {"coords": FEATURES["coords"] + 256}, features),
        lambda: tiny.cfg.fingerprints.update(slide_encoder="another"),
        lambda: cut(tmp_path / "visual_tokens" / "s.safetensors"),
        lambda: edited.append(wsi_llava),
        lambda: setattr(tiny.slide_encoder, "pool", FirstTokens()),
        lambda: edited.append(sys.modules[__name__]),
    ):
        change()
        for written in (1, 0):
            found, problems = wsi_llava.cache_visual_tokens(tiny, tmp_path, ["s", "absent"])
            assert found == written and "no such file" in problems["absent"]


# ---- wsi_llava.py: published weights, in miniature ----


def test_loaders_are_strict_both_ways(tmp_path):
    path, good = tmp_path / "encoder.pth", wsi_llava.SlideEncoder(PRESETS["demo"].slide_encoder).state_dict()
    torch.save({"model": good}, path)
    wsi_llava.load_slide_encoder(path)
    whole = torch.zeros(128, dtype=torch.long)
    for tensors, message in (
        (
            {k: v for k, v in good.items() if k != "norm.bias"},
            "no SlideEncoder as expected: norm.bias is missing",
        ),
        (good | {"decoder.weight": torch.zeros(1)}, r"decoder.weight is \[1\], not a key of the model"),
        (good | {"norm.bias": torch.zeros(7)}, r"norm.bias is \[7\], not \[128\]"),
        (good | {"norm.bias": whole}, r"norm.bias is \[128\], not"),
        ([torch.zeros(3)], "not Prov-GigaPath's slide encoder"),
        ({"weights": torch.zeros(1)}, "lacks 'patch_embed.proj.weight'; not Prov-GigaPath's slide encoder"),
        ({"model": {"norm.bias": object()}}, "copy or download it again"),  # a foreign class, never unpickled
    ):
        torch.save(tensors, path)
        with pytest.raises(UserError, match=f"encoder.pth: .*{message}") as caught:
            wsi_llava.load_slide_encoder(path)
        assert "\n" not in str(caught.value)


def test_llama_loader_names_what_is_wrong(tmp_path):
    cfg = wsi_llava.LlamaConfig(50, 32, 1, 2, 2, 48)
    wsi_llava.save_llama(wsi_llava.Llama(cfg), tmp_path)
    assert wsi_llava.load_llama(tmp_path).cfg == cfg
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for changes, message in [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope scaling linear is not supported"),
        ({"model_type": "gpt2"}, "model_type gpt2 is not supported"),
        ({"attention_bias": True}, "biases beside those of Qwen2 is not supported"),
        ({"model_type": "mistral", "sliding_window": 100}, "window of 100 below the context"),
        ({"head_dim": 8}, r"layers.0.self_attn.k_proj.weight is \[32, 32\], not \[16, 32\]"),
        ({"rms_norm_eps": math.nan}, "eps cannot be nan"),
    ]:
        path.write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            wsi_llava.load_llama(tmp_path)
    path.write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        wsi_llava.load_llama(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="config.json: no such file"):
        wsi_llava.load_llama(tmp_path)


def save_shards(tensors, folder, stem="pytorch_model", ending="bin"):
    """Two shards and their index, as Hugging Face cuts a model."""
    names, places = list(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{i:05}-of-00002.{ending}"
        places |= dict.fromkeys(part, file)
        write = save_file if ending == "safetensors" else torch.save
        write({name: tensors[name].clone() for name in part}, folder / file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))


def published_llm(folder, layout, **changes):
    """A miniature in one of the published layouts -> (transformers' Llama, projector or None)."""
    theirs = hf_llama(folder, **changes)
    config, state = json.loads((folder / "config.json").read_text()), theirs.state_dict()
    for file in folder.iterdir():
        file.unlink()
    projector = wsi_llava.make_projector(160, config["hidden_size"])
    if layout == "vicuna":
        projector = None
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    elif layout == "llava":
        state |= {f"model.mm_projector.{k}": v for k, v in projector.state_dict().items()}
        state["model.vision_tower.vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(8)
        config |= {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 160}
    elif layout == "llava-hf":
        state = {f"language_model.{k}": v for k, v in state.items()}
        names = zip(("linear_1", "linear_2"), (projector[0], projector[2]))
        state |= {f"multi_modal_projector.{n}.{k}": v for n, m in names for k, v in m.state_dict().items()}
        state["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(8)
        config = {"model_type": "llava", "text_config": config, "vision_config": {"hidden_size": 160}}
    (folder / "config.json").write_text(json.dumps(config))
    save_shards(state, folder, *(["model", "safetensors"] if layout == "llava-hf" else []))
    return theirs, projector


@pytest.mark.parametrize("layout", ["vicuna", "llava", "llava-hf"])
def test_every_published_layout_equals_transformers(tmp_path, layout):
    theirs, projector = published_llm(tmp_path, layout)
    ours, ids = wsi_llava.load_llama(tmp_path), torch.randint(97, (2, 40))
    with torch.no_grad():
        agrees(f"a folder laid out as {layout}", ours(ids), theirs(ids).logits, 1e-5)
    found = wsi_llava.load_projector(tmp_path)
    assert (found is None) == (projector is None)
    assert projector is None or torch.equal(found[0].weight, projector[0].weight)
    torch.save({"model.mm_projector.weight": torch.zeros(4, 4)}, tmp_path / "mm_projector.bin")  # LLaVA-1.0's
    with pytest.raises(UserError, match="mm_projector"):
        wsi_llava.load_projector(tmp_path)


@pytest.mark.parametrize("own", [False, True])
def test_an_lm_head_beside_a_tied_embedding_counts_where_it_is_another(tmp_path, own):
    theirs = hf_llama(tmp_path, tie_word_embeddings=not own)
    for file in tmp_path.glob("model*"):
        file.unlink()
    state = theirs.state_dict()
    torch.save(state | {"lm_head.weight": state["lm_head.weight"].clone()}, tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    ours, ids = wsi_llava.load_llama(tmp_path), torch.randint(97, (2, 40))
    assert ours.cfg.tied is not own
    with torch.no_grad():
        agrees("tied or not", ours(ids), theirs(ids).logits, 1e-5)


def test_the_tokenizer_with_more_tokens_is_read(tmp_path, tokenizer):
    """Chat tokens that were added to a tokenizer.model later are in tokenizer.json alone."""
    hf_llama(tmp_path)
    shutil.copy(tokenizer.path, tmp_path / "tokenizer.model")
    args = train.parse(["--llm", str(tmp_path)])
    for special, found in (([], "tokenizer.model"), (["<|im_start|>", "<|im_end|>"], "tokenizer.json")):
        path = byte_level_tokenizer(tmp_path, ["</s>"])
        fast = json.loads(path.read_text())
        for i, text in enumerate(special):
            fast["added_tokens"].append(fast["added_tokens"][0] | {"id": 5000 + i, "content": text})
        path.write_text(json.dumps(fast))
        assert wsi_llava.pick_llm(args, {"preset": "7b"})[1].path.name == found


def test_an_export_ends_where_answers_end(tmp_path, tokenizer):
    """By the chat's token as well as the base model's own, whatever transformers reads of the two files."""
    hf_llama(tmp_path)
    shutil.copy(tokenizer.path, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    folder, ends = wsi_llava.pick_llm(train.parse(["--llm", str(tmp_path)]), {"preset": "7b"})
    wsi_llava.save_llama(wsi_llava.load_llama(folder), tmp_path / "export", ends)
    for file in (tmp_path / "export").glob("*config.json"):
        assert json.loads(file.read_text())["eos_token_id"] == [tokenizer.eos, 7]


def test_what_a_config_of_transformers_leaves_out_is_its_default(tmp_path):
    """As in llava-1.5-7b-hf, whose text_config does not give the sizes."""
    text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    assert wsi_llava.read_llama_config(tmp_path) == wsi_llava.LlamaConfig(vocab=32064)


PEFTS_DEFAULTS = {  # as PEFT 0.18 writes them
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "loftq_config": {},
    "layers_to_transform": None, "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_version": "0.18.0", "rank_pattern": {},
    "qalora_group_size": 16, "revision": None, "target_parameters": None, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def published_lora(folder, theirs, projector, r=4, alpha=8.0, ending="safetensors", **changes):
    """A LoRA folder as LLaVA writes it -> transformers' Llama with W + alpha / r B A in its weights."""
    folder.mkdir()
    merged, adapters = copy.deepcopy(theirs), {}
    targets = changes.get("target_modules", ["q_proj", "down_proj"])
    for name, module in merged.named_modules():
        if name.split(".")[-1] in targets:
            a, b = torch.randn(r, module.in_features) / 8, torch.randn(module.out_features, r) / 8
            for letter, x in (("A", a), ("B", b)):
                adapters[f"base_model.model.{name}.lora_{letter}.weight"] = x
            module.weight.data += alpha / r * b @ a
    config = PEFTS_DEFAULTS | {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "bias": "none"}
    config |= {"target_modules": targets} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (save_file if ending == "safetensors" else torch.save)(adapters, folder / f"adapter_model.{ending}")
    prefix = "base_model.model.model.mm_projector."
    torch.save({prefix + k: v for k, v in projector.state_dict().items()}, folder / "non_lora_trainables.bin")
    return merged


@pytest.mark.parametrize("changes", [{}, {"target_modules": ["lm_head", "o_proj"], "ending": "bin"}])
def test_lora_folder_is_merged_into_its_base_once(tmp_path, changes):
    base, lora = tmp_path / "base", tmp_path / "lora"
    theirs, projector = published_llm(base, "llava")
    merged = published_lora(lora, theirs, projector, **changes)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    ours, ids = wsi_llava.load_llama(base, lora=lora), torch.randint(97, (2, 40))
    with torch.no_grad():
        agrees("a LoRA folder, merged on load", ours(ids), merged(ids).logits, 1e-5)
        assert relative(ours(ids), theirs(ids).logits) > 1e-5
    assert before == {file.name: file.read_bytes() for file in base.iterdir()}  # merged in mapped memory
    wsi_llava.save_llama(ours, tmp_path / "export")
    with pytest.raises(UserError, match="the language model holds these adapters already; leave --lora"):
        wsi_llava.load_llama(tmp_path / "export", lora=lora)
    published_lora(tmp_path / "other", theirs, projector)
    wsi_llava.load_llama(tmp_path / "export", lora=tmp_path / "other")


def test_lora_of_another_kind_is_refused_by_name(tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    published_lora(lora, *published_llm(base, "llava"))
    path = lora / "adapter_config.json"
    good = json.loads(path.read_text())
    for changes, message in [
        ({"use_dora": True}, "use_dora True is not supported: plain LoRA only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),  # it also changed the base's weights
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"alpha_pattern": {"model.layers.1.mlp.down_proj": 2}}, "alpha_pattern {"),
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens \[5\]"),
        ({"an_option_of_tomorrow": 0.5}, "an_option_of_tomorrow 0.5"),
        ({"lora_alpha": math.nan}, "no adapters; --lora takes a PEFT or LLaVA LoRA folder"),
        ({"r": 8}, r"layers.0.mlp.down_proj's are \[4, 112\] and \[64, 4\], not of rank 8"),
    ]:
        path.write_text(json.dumps(good | changes))
        with pytest.raises(UserError, match=f"{re.escape(str(lora))}.*{message}"):
            wsi_llava.load_llama(base, lora=lora)
    with pytest.raises(UserError, match="adapter_config.json: no such file; --lora takes"):
        wsi_llava.load_llama(base, lora=base)
    shutil.copy(base / "config.json", lora)
    with pytest.raises(UserError, match="holds LoRA adapters: name it with --lora"):
        wsi_llava.load_llama(lora)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_damaged_shards_are_named_and_a_whole_file_comes_before_them(tmp_path, ending):
    state = hf_llama(tmp_path).state_dict()
    for file in tmp_path.glob("model*"):
        file.unlink()
    stem, norm = "model" if ending == "safetensors" else "pytorch_model", "model.norm.weight"
    second = tmp_path / f"{stem}-00002-of-00002.{ending}"
    for tensors, harm, message in [
        (state, cut, f"{second.name}: .*; copy or download it again"),
        (state, Path.unlink, f"{second.name}: no such file; copy"),
        (state | {"model.x.weight": torch.zeros(3)}, None, r"x.weight is \[3\], not a key of the model"),
        ({k: v for k, v in state.items() if k != norm}, None, "norm.weight is missing"),
        (state | {"norm.weight": state[norm]}, None, "a second norm.weight, .*norm.weight"),
    ]:
        save_shards(tensors, tmp_path, stem, ending)
        if harm:
            harm(second)
        with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}.*{message}"):
            wsi_llava.load_llama(tmp_path)
    cut(tmp_path / f"{stem}.{ending}.index.json")
    with pytest.raises(UserError, match="index.json: .*; copy or download it again"):
        wsi_llava.load_llama(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")  # as transformers takes it
    if ending == "bin":
        assert torch.equal(wsi_llava.load_llama(tmp_path).norm.weight, state[norm])


# ---- wsi_llava.py: the same where a user puts them ----


@pytest.fixture
def published(tmp_path, monkeypatch, toy_slide, tokenizer):
    """A folder to work in: GigaPath's and Vicuna's weights, LoRA folders, one prepared slide, its report."""
    monkeypatch.chdir(tmp_path)
    gigapath, vicuna = tmp_path / "weights" / "gigapath", tmp_path / "weights" / "vicuna-7b-v1.5"
    gigapath.mkdir(parents=True)
    torch.manual_seed(2)
    small = wsi_llava.TileEncoderConfig(width=64, depth=1, heads=1, mlp_hidden=64)
    torch.save(wsi_llava.TileEncoder(small).state_dict(), gigapath / "pytorch_model.bin")
    slide_encoder = wsi_llava.SlideEncoder(wsi_llava.SlideEncoderConfig(64, 128, 1, 16, 128))
    torch.save({"model": slide_encoder.state_dict()}, gigapath / "slide_encoder.pth")
    theirs, _ = published_llm(vicuna, "vicuna", vocab_size=tokenizer.size, max_position_embeddings=1024)
    shutil.copy(tokenizer.path, vicuna / "tokenizer.model")
    projector = wsi_llava.make_projector(160, 64)
    merged = published_lora(tmp_path / "WSI-LLaVA", theirs, projector)
    published_lora(tmp_path / "narrow", theirs, wsi_llava.make_projector(100, 64))
    prepare.main(["--slides", str(toy_slide[0])])
    rows = [{"id": "1", "slide": "toy", "task": "Report", "conversations": TALK[:2]}]
    prepare.write_qa(Path("data/qa/train.jsonl"), rows)
    return merged, projector


def test_published_weights_answer_without_training(published, capsys):
    merged, projector = published
    ask = ["--slide", "toy", "--ask", "What is its grade?", "--max-new-tokens", "5"]
    sample.main([*ask, "--lora", "WSI-LLaVA"])
    printed = capsys.readouterr()
    assert "Projector: that of WSI-LLaVA." in printed.err and "576 visual tokens" in printed.out
    model, ids = assembled(3, "--lora", "WSI-LLaVA"), torch.randint(90, (1, 40))
    assert torch.equal(model.mm_projector[2].weight, projector[2].weight) and model.cfg.pad_to == 160
    with torch.no_grad():
        assert relative(model.llama(ids), merged(ids).logits) < 1e-5


def test_stage_1_starts_from_gigapaths_slide_encoder(published):
    def start(*flags):
        args = train.parse(["--stage", "1", *flags])
        wsi_llava.resolve_device(args)
        task = train.Alignment(1, args, train.RECIPES["7b"][1], wsi_llava.read_meta(args.data))
        return task.model.slide_encoder

    path = Path("weights/gigapath/slide_encoder.pth")
    theirs = torch.load(path)["model"]
    assert all(torch.equal(p, theirs[name]) for name, p in start().state_dict().items())
    new = start("--from-scratch")
    assert new.cfg.in_width == 64 and not torch.equal(new.cls_token, theirs["cls_token"])
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: no such file; name one with --slide-encoder"):
        start()


def test_stage_2_starts_from_the_projector_of_llava_if_it_fits(published, tmp_path, capsys, tokenizer):
    llava = tmp_path / "weights" / "llava-v1.5-7b"
    _, projector = published_llm(llava, "llava", vocab_size=tokenizer.size, max_position_embeddings=1024)
    shutil.copy(tokenizer.path, llava / "tokenizer.model")
    train.main(["--stage", "2", "--llm", str(llava), "--epochs", "0"])
    assert f"Projector: that of {llava}." in capsys.readouterr().err
    trained = load_file("out/stage2/model.safetensors")
    assert torch.equal(trained["mm_projector.0.weight"], projector[0].weight)
    model = assembled(1, "--lora", "narrow", "--llm", llava)  # visual tokens are 128 wide
    news = "Projector: a new one, since no published projector here takes 128 channels and gives 64."
    assert news in capsys.readouterr().err
    assert model.cfg.pad_to == 1024 == model.mm_projector[0].in_features


def test_what_is_missing_or_does_not_fit_is_named(published, tmp_path):
    def refused(message, *flags):
        with pytest.raises(UserError, match=message):
            assembled(3, *flags)

    refused("no published projector here takes 128 channels and gives 64: train stage 3", "--lora", "narrow")
    refused("out/stage3 is not trained, and no published projector")  # Vicuna alone has none
    folder = Path("weights/vicuna-7b-v1.5")
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    small = wsi_llava.LlamaConfig(vocab=90, width=64, depth=1, heads=4, kv_heads=4, mlp_hidden=112)
    wsi_llava.save_llama(wsi_llava.Llama(small), folder)
    refused("tokens, more than the language model's 90")
    shutil.rmtree(folder)
    refused(f"{folder} or weights/llava-v1.5-7b: no such file; name a language model")
    shutil.rmtree("weights/gigapath")
    with pytest.raises(UserError, match="--preset 7b needs GigaPath's: name it by --tile-encoder"):
        wsi_llava.pick_tile_encoder(prepare.parse(["--preset", "7b", "--demo"]))


@pytest.mark.parametrize("width, mark", [(128, "0123"), (1536, "abcd")])
def test_a_slide_encoder_refuses_features_of_another_tile_encoder(width, mark):
    cfg = wsi_llava.SlideEncoderConfig(in_width=128, trained_on="abcd")
    meta = {"encoder": {"width": width, "fingerprint": mark}}
    with pytest.raises(UserError, match=f"stage1: .* 128 wide and of abcd, these are {width} and of {mark}"):
        wsi_llava.check_tile_encoder(cfg, meta, "stage1")


# ---- train.py: what is trained on ----


def train_with(demo, out, *arguments):
    train.main(["--data", str(demo[0] / "data"), "--out", str(out), *map(str, arguments)])


def train_args(*arguments):
    """train.py's flags, as its functions take them."""
    args = train.parse(list(map(str, arguments)))
    wsi_llava.resolve_device(args)
    return args


def same_weights(a, b, tolerance=0.0):
    """Whether two files of weights hold the same, bit for bit or up to a share of the largest value."""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if not tolerance else relative(a[k], b[k]) < tolerance for k in a)


def write_train(data, rows):
    """data/qa/train.jsonl of these rows, given as (slide, task, answer)."""
    written = []
    for i, (slide, task, answer) in enumerate(rows):
        talk = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": answer}]
        written.append({"id": str(i), "slide": slide, "task": task, "cancer": "", "conversations": talk})
    (data / "qa").mkdir(parents=True, exist_ok=True)
    prepare.write_qa(data / "qa" / "train.jsonl", written)


def light_copy(demo, folder):
    """The demo's data without slides and pictures, to be changed -> its folder."""
    ignored = shutil.ignore_patterns("slides", "qc")
    return shutil.copytree(demo[0] / "data", folder / "data", ignore=ignored)


@slow
def test_rows_that_cannot_be_trained_on_are_named(demo, tmp_path, capsys):
    """Slides without features, no reports in stage 2, no answer in a row that somebody wrote by hand."""
    data = light_copy(demo, tmp_path)
    flags = ["--data", data, "--out", demo[0] / "out"]
    write_train(data, [("far2", "Report", "x"), ("far1", "Report", "x")])
    with pytest.raises(UserError, match="names 2 slides without features, the first: far1; prepare them, or"):
        train.load_rows(train_args(*flags))
    assert not train.load_rows(train_args(*flags, "--skip-missing"))
    write_train(data, [("demo_0000", "report", " "), ("demo_0001", "grade", "Grade 2.")])
    assert [row["slide"] for row in train.load_rows(train_args(*flags))] == ["demo_0001"]
    assert "left out 1 row of several slides or with an empty text: line 1" in capsys.readouterr().err
    with pytest.raises(UserError, match="train.jsonl: holds no reports"):
        train.main(list(map(str, ["--stage", "2", *flags])))


@slow
def test_slides_with_visual_tokens_only_need_no_slide_encoder(demo, tmp_path):
    """The authors' published tokens: no tiles, no slide encoder, and stages 2 and 3 take them as they are."""
    tokens, data = torch.randn(576, 1024), tmp_path / "data"
    torch.save(tokens, tmp_path / "T.1.pt")
    prepare.main(["--features", str(tmp_path / "T.1.pt"), "--data", str(data)])
    write_train(data, [("T.1", "Report", "A tumor.")])
    args = train_args("--data", data, "--out", tmp_path / "none", "--llm", demo[0] / "data" / "llm")
    assert len(train.load_rows(args, tokens=True)) == 1
    with pytest.raises(UserError, match="names 1 slides without features"):
        train.load_rows(args)
    model, _ = wsi_llava.load_model(args, wsi_llava.read_meta(data), 1)
    assert model.slide_encoder is None and wsi_llava.cache_visual_tokens(model, data, ["T.1"]) == (0, {})
    visual = wsi_llava.read_visual_tokens(data, "T.1", model.cfg)
    assert torch.equal(visual, tokens.half()) and model.project(visual).shape == (576, 128)


def test_validation_comes_from_the_whole_file_and_keeps_patients_apart():
    rows = []
    for task in ("type", "grade", "report"):
        for i in range(300):
            rows.append({"slide": f"TCGA-AA-{i // 2:04d}-01Z-00-DX{i % 2}.x", "task": task})
    train_rows, val = train.split_validation(rows, train.parse(["--val", "0.2"]), 30)
    assert len(val) == 30 and {row["task"] for row in val} == {"type", "grade", "report"}
    patients = [{row["slide"][:12] for row in side} for side in (train_rows, val)]
    assert not patients[0] & patients[1] and 600 < len(train_rows) < 800
    with pytest.raises(UserError, match="no slide is left to train on, with --val 0.2"):
        train.split_validation(val, train.parse(["--val", "0.2"]), 30)


def test_the_learning_rate_rises_and_then_falls_as_half_a_cosine():
    heights = [train.schedule(step, 104, 0.04) for step in range(104)]
    assert heights[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert heights[29:80:25] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * k / 4) for k in (1, 2, 3)])
    assert 0 < heights[-1] < 1e-3
    assert train.schedule(0, 1, 0.03) == 1


def test_an_epoch_is_every_row_once_and_a_batch_has_some_for_every_process(monkeypatch):
    """37 rows in batches of at most 32: two epochs see all 74; batches are of one size, give or take one."""
    recipe = dataclasses.replace(train.RECIPES["demo"][2], epochs=2)
    batches, steps = train.size_of_run(2, recipe, 37)
    assert (batches, steps) == (2, 4)
    seen = [train.batch_of(step, 37, batches, [0, 2]) for step in range(steps)]
    assert [len(batch) for batch in seen] == [18, 19, 18, 19]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(37)) and seen[0] != seen[2]
    for epochs, steps in ((0, 0), (1e-3, 1)):
        assert train.size_of_run(2, dataclasses.replace(recipe, epochs=epochs), 37)[1] == steps
    with pytest.raises(UserError, match="a batch of 1 is too small for stage 1"):  # it contrasts slides
        train.size_of_run(1, dataclasses.replace(recipe, batch_size=1), 7)
    monkeypatch.setattr(train, "WORLD", 8)
    with pytest.raises(UserError, match="a batch of 7 is too small for stage 2 in 8 processes"):
        train.size_of_run(2, recipe, 7)


def test_every_setting_of_a_recipe_is_a_flag():
    """One whose default is 0 can be set to 0 again; one that is a size cannot."""
    for f in dataclasses.fields(train.Recipe):
        flag = f"--{f.name.replace('_', '-')}"
        if f.type is bool:
            assert train.parse([f"--no-{flag[2:]}"]).__dict__[f.name] is False
        elif f.default == 0 or f.type is float:
            assert train.parse([flag, "0"]).__dict__[f.name] == 0
        else:
            with pytest.raises(SystemExit):
                train.parse([flag, "0"])
    assert train.pick_recipe(3, train.parse(["--lr", "1e-3"]), {"preset": "7b"}).lr == 1e-3


# ---- train.py: the stages ----


@slow
def test_gradient_cache_equals_the_full_batch(demo, monkeypatch):
    """Stage 1's embed, cache, embed again gives the gradients of one big batch."""
    args = train_args("--data", demo[0] / "data", "--stage", "1")
    task = train.Alignment(1, args, train.RECIPES["demo"][1], wsi_llava.read_meta(args.data))
    model, task.words = task.model.double().eval(), task.words.double()  # no dropout: it is drawn in parts
    gradients = []
    for at_once in (60, 4096):
        monkeypatch.setattr(train, "TILES_AT_ONCE", at_once)
        assert (len(task.micro_batches(task.train)) > 1) == (at_once == 60)
        model.zero_grad()
        task.backward(list(range(len(task.train))))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, want in gradients[1].items():
        assert relative(gradients[0][name], want) < 1e-5 or want.abs().max() < 1e-7, name


@slow
@pytest.mark.parametrize("stage, epochs, batch", [(1, 5, 60), (2, 3, 4), (3, 1, 9)])
def test_resumed_run_equals_an_uninterrupted_one(demo, tmp_path, monkeypatch, stage, epochs, batch):
    """Bit for bit; and the same command twice gives the same weights."""
    flags = ["--stage", stage, "--epochs", epochs, "--batch-size", batch]
    flags += ["--lora-dropout", 0.1] if stage == 3 else []
    for earlier in range(1, stage):
        shutil.copytree(demo[0] / "out" / f"stage{earlier}", tmp_path / "out" / f"stage{earlier}")
    result = tmp_path / "out" / f"stage{stage}" / "model.safetensors"
    for name in ("whole", "again"):
        train_with(demo, tmp_path / "out", *flags)
        shutil.copy(result, tmp_path / name)
    assert same_weights(tmp_path / "whole", tmp_path / "again")

    real = train.schedule

    def interrupt(step, steps, warmup):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(step, steps, warmup)

    monkeypatch.setattr(train, "schedule", interrupt)
    with pytest.raises(UserError, match="interrupted after step 4 of .*; see --resume"):
        train_with(demo, tmp_path / "out", *flags)
    assert not result.exists()
    monkeypatch.setattr(train, "schedule", real)
    train_with(demo, tmp_path / "out", *flags, "--resume")
    assert same_weights(tmp_path / "whole", result)
    steps = [json.loads(line)["step"] for line in (result.parent / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


@slow
def test_the_stand_in_is_the_same_again_and_follows_the_texts(demo, tmp_path, monkeypatch):
    """It is trained once, and again where the texts are others; killed amid that, it does not look whole."""
    data = light_copy(demo, tmp_path)
    args, made, mark = train_args("--data", data), data / "llm" / "model.safetensors", data / "llm" / "texts"
    first = made.read_bytes()
    mark.unlink()  # as killed before the end
    train.stand_in(args)
    assert made.read_bytes() == first and mark.exists()
    trained = []
    monkeypatch.setattr(train, "train_stand_in", lambda args: trained.append(mark.exists()))
    train.stand_in(args)
    assert trained == []
    write_train(data, [("demo_0001", "report", "A tumor.")])
    train.stand_in(args)
    assert trained == [False]


@slow
def test_a_run_resumes_as_itself_or_not_at_all(demo, tmp_path):
    """Whatever differs is named; a state that is damaged too. A result that is gone is written again."""
    data, out = light_copy(demo, tmp_path), shutil.copytree(demo[0] / "out", tmp_path / "out")
    flags = f"--stage 3 --epochs 1 --val 0.2 --resume --data {data} --out {out}".split()
    train.main(flags)  # as the demo ran it
    for changed, what in (
        ("--lora-alpha 8", "lora_alpha 32, not 8.0"),
        ("--full", "full False, not True"),
        (f"--seed 5 --llm {data}/llm", "seed 0, not 5"),
        ("--epochs 2", "steps 2, not 4"),
    ):
        with pytest.raises(UserError, match=f"train_state.pt belongs to another run: .*{what}"):
            train.main([*flags, *changed.split()])
    for same in ("--micro-batch 3", "--checkpointing", "--eval-every 1", "--val-rows 7"):
        train.main([*flags, *same.split()])
    result, path = out / "stage3" / "model.safetensors", out / "stage3" / "train_state.pt"
    before = result.read_bytes()
    result.unlink()
    (out / "stage3" / ".train_state.pt.00000000.part").touch()  # of a kill amid writing
    train.main(flags)
    assert result.read_bytes() == before and not list((out / "stage3").glob("*.part"))
    state = torch.load(path, weights_only=True)
    for what in ("the training rows", "what it started from"):
        torch.save(state | {"run": state["run"] | {what: "x"}}, path)
        with pytest.raises(UserError, match=f"another run: {what} x, not"):
            train.main(flags)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="train_state.pt: .*; damaged; leave --resume out"):
        train.main(flags)


@slow
def test_one_run_at_a_time_in_a_stages_folder(demo, tmp_path):
    """The lock is a process's, and dies with it, however it dies."""
    pytest.importorskip("fcntl")
    shutil.copytree(demo[0] / "out" / "stage1", tmp_path / "stage1")
    flags = ["--data", demo[0] / "data", "--out", tmp_path, "--stage", 2, "--epochs", 0]
    with train.alone_in(tmp_path / "stage2"):
        done = script("train.py", *flags)
        assert done.returncode == 1 and "stage2: another run is training here; wait for it" in done.stderr
    train.main(list(map(str, flags)))
    assert (tmp_path / "stage2" / "model.safetensors").exists()


@slow
def test_what_is_not_finite_stops_the_run_and_is_never_done(demo, tmp_path, monkeypatch):
    """A loss, with the ids of its batch (a clip of 0 is none); what is held out; the weights themselves."""
    shutil.copytree(demo[0] / "out" / "stage1", tmp_path / "stage1")
    monkeypatch.setattr(train, "schedule", lambda step, steps, warmup: 1e30)
    flags = ["--stage", 2, "--batch-size", 4]
    with pytest.raises(UserError, match=r"'step': 2, 'loss': (nan|inf).*try a lower --lr.*batch: demo_0\d+-"):
        train_with(demo, tmp_path, *flags, "--epochs", 5, "--clip", 0)
    with pytest.raises(UserError, match=r"'step': 1, .*'val_loss': (nan|inf).*is not finite"):
        train_with(demo, tmp_path, *flags, "--epochs", 0.1, "--val", 0.3)

    def step(optimizer, closure=None):
        for group in optimizer.param_groups:
            group["params"][0].data.view(-1)[3] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(UserError, match="stage2: after step 1 the weights are not finite, and not saved"):
        train_with(demo, tmp_path, "--stage", 2, "--epochs", 0.01, "--val", 0)
    assert not list((tmp_path / "stage2").glob("*.safetensors")) + list((tmp_path / "stage2").glob("*.pt"))


@slow
def test_features_of_any_width_train(tmp_path, capsys):
    """All stages, then an answer, on features of an encoder 48 wide: the slide encoder takes their width."""
    for i in range(7):
        cells = np.argwhere(np.random.default_rng(i).random((7, 6)) < 0.8)[:, ::-1]
        coords, features = torch.from_numpy(cells * 256).float(), torch.randn(len(cells), 48)
        torch.save({"features": features, "coords": coords}, tmp_path / f"s{i}.pt")
    places = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    prepare.main(["--features", str(tmp_path), "--preset", "demo", "--mpp", "0.5", *places])
    write_train(tmp_path / "data", [(f"s{min(i, 6)}", "report", f"This is case {i}.") for i in range(8)])
    flags = [*places, "--val", "0", "--epochs", "1"]
    for stage in "123":
        train.main(["--stage", stage, *flags])
    config = json.loads((tmp_path / "out" / "stage1" / "config.json").read_text())
    assert config["slide_encoder"]["in_width"] == 48
    args, meta = train_args(*flags), wsi_llava.read_meta(tmp_path / "data")
    contrasted = train.Alignment(1, args, train.RECIPES["demo"][1], meta).train
    assert sorted(row["slide"] for row in contrasted) == [f"s{i}" for i in range(7)]  # s6 has two reports
    capsys.readouterr()
    sample.main(["--slide", "s6", "--ask", "What is it?", "--max-new-tokens", "3", *places])
    assert "s6: 36 visual tokens" in capsys.readouterr().out


@slow
def test_a_row_is_its_slide_and_its_talk_and_loses_its_end_where_it_is_too_long(demo):
    """Without room for the answer it teaches nothing. Stage 2 sees a slide and its report, nothing else."""
    args = train_args("--data", demo[0] / "data", "--out", demo[0] / "out")
    meta, recipe = wsi_llava.read_meta(args.data), train.RECIPES["demo"][3]
    task = train.Conversation(3, args, recipe, meta)
    row = next(row for row in task.train if row["task"] == "grade")
    read, talk = task.read(row), wsi_llava.slide_first(row["conversations"])
    assert (read["ids"], read["labels"]) == task.tokenizer.encode_chat(talk) and not read["cut"]
    assert torch.equal(read["visual"], wsi_llava.read_visual_tokens(args.data, row["slide"], task.cfg))
    embeds, _ = task.model.splice([read["visual"]], [read["ids"]])
    assert read["positions"] == embeds.shape[1]
    task.longest = read["positions"] - 1
    cut = task.read(row)
    assert cut["ids"] == read["ids"][:-1] and cut["positions"] == task.longest and cut["cut"]
    for task.longest in (len(read["visual"]), 20):  # no room for the answer, none for the slide
        assert task.read(row)["labels"] == [IGNORE] and task.read(row)["visual"] is None
    with pytest.raises(UserError, match="--max-length 20: no room for the answer of demo_.*; raise it"):
        task.backward([0])
    rates = {group["name"]: group["peak"] for group in task.groups}
    assert rates == {"projector": 1e-3, "LoRA adapters of rank 16": 3e-3}
    reports = train.Conversation(2, args, train.RECIPES["demo"][2], meta)
    plain = task.tokenizer.encode_plain(reports.train[0]["conversations"][-1]["value"])
    read = reports.read(reports.train[0])
    assert (read["ids"], read["labels"]) == plain


def test_only_a_second_ctrl_c_stops_at_once():
    """A job's time limit comes as SIGTERM from several sides: it asks, however often it comes."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), train.stop_signals() as asked:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert len(asked) == 4
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@slow
@pytest.mark.parametrize("flags, looks", [([], True), (["--no-image"], False)])
def test_validation_tells_the_loss_after_another_slide(demo, flags, looks):
    """Every row once after its own slide's tokens, once after another's, where the model sees slides."""
    args = train_args("--data", demo[0] / "data", "--out", demo[0] / "out", "--val", 0.3, *flags)
    task = train.Conversation(3, args, train.RECIPES["demo"][3], wsi_llava.read_meta(args.data))
    slides, read = collections.defaultdict(list), task.read
    task.read = lambda row: slides[row["id"]].append(row["slide"]) or read(row)
    losses = task.validate()
    assert len(set(losses.values())) == len(losses) == 1 + looks
    assert ("loss after another slide" in losses) == looks
    assert all(len(set(shown)) == len(shown) == 1 + looks for shown in slides.values())


@slow
def test_training_goes_on_without_a_slide_that_cannot_be_read(demo, tmp_path, capsys):
    data, out = light_copy(demo, tmp_path), shutil.copytree(demo[0] / "out", tmp_path / "out")
    path = wsi_llava.features_file(data, "demo_0003")
    tensors = load_file(path) | {"features": torch.full((40, 128), math.inf).half()}
    wsi_llava.write_tensors(path, tensors, wsi_llava.read_metadata(path))
    (data / "visual_tokens" / path.name).unlink()
    train.main(["--stage=3", "--epochs=0.1", "--max-length=110", "--data", str(data), "--out", str(out)])
    printed = capsys.readouterr().out
    assert f"Left out slides that cannot be read: 1, such as {path}: " in printed
    assert re.search(r"Stage 3 is done.*; \d+ rows were longer than --max-length, and cut", printed)


@slow
@pytest.mark.parametrize("flags", [["--stage", 1], ["--stage", 3], ["--stage", 3, "--full"]], ids=str)
def test_two_processes_equal_one(demo, tmp_path, flags):
    """Same losses and weights on the same global batches: gathered embeddings, summed gradients, FSDP."""
    flags = [*flags, "--epochs", {1: 4, 3: 0.5}[flags[1]], "--batch-size", 6, "--micro-batch", 2]
    losses, stage = {}, f"stage{flags[1]}"
    for n in "12":
        shutil.copytree(demo[0] / "out", tmp_path / n)
    train_with(demo, tmp_path / "1", *flags)
    command = torchrun(2, *flags, "--data", demo[0] / "data", "--out", tmp_path / "2")
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("processes: 2, each with a share of the weights" in done.stdout) == ("--full" in flags)
    for processes in "12":
        log = (tmp_path / processes / stage / "log.jsonl").read_text().splitlines()
        losses[processes] = [json.loads(line)["loss"] for line in log]
    assert losses["1"] == pytest.approx(losses["2"], rel=1e-5, abs=1.1e-5)  # the log holds five decimals
    one, two = (load_file(tmp_path / n / stage / "model.safetensors") for n in "12")
    for name, want in one.items():  # by the norm: of a gradient that is all rounding AdamW takes the sign
        assert (two[name] - want).norm() < 3e-4 * want.norm(), name


@slow
def test_what_two_processes_began_one_finishes(demo, tmp_path):
    """Shards of the whole model, saved when told to stop, twice, as by a job's time limit; the rest in one
    process gives what one gives from the start."""
    flags = ["--stage", 3, "--full", "--epochs", 1, "--eval-every", 9, "--batch-size", 8, "--micro-batch", 4]
    for n in "12":
        shutil.copytree(demo[0] / "out", tmp_path / n)
    train_with(demo, tmp_path / "1", *flags)
    command = torchrun(2, *flags, "--data", demo[0] / "data", "--out", tmp_path / "2")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **pipes, cwd=HERE) as process:
        for line in process.stdout:
            if line.startswith("stage 3 step 2/"):
                process.terminate()
    assert not (tmp_path / "2" / "stage3" / "model.safetensors").exists()
    assert (tmp_path / "2" / "stage3" / "train_state.pt").exists()
    train_with(demo, tmp_path / "2", *flags, "--resume")
    assert same_weights(*(tmp_path / n / "stage3" / "model.safetensors" for n in "12"), tolerance=1e-3)


# ---- train.py: what comes of it ----


@slow
@pytest.mark.parametrize("flags", [[], ["--full"]], ids=str)
def test_an_exported_model_answers_the_same(demo, tmp_path, flags):
    """To transformers, to our loader, and to sample.py, which then needs no out/ any more."""
    transformers = pytest.importorskip("transformers")
    data, folder = demo[0] / "data", tmp_path / "exported"
    out = shutil.copytree(demo[0] / "out", tmp_path / "out")
    if flags:
        train_with(demo, out, "--stage", 3, *flags)
    train_with(demo, out, "--export", folder)
    model, ids = assembled(3, "--data", data, "--out", out), torch.randint(3, 300, (1, 40))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    llm = ["--llm", folder, "--slide-encoder", folder / "slide_encoder.safetensors"]
    again = assembled(3, *llm, "--data", data, "--out", tmp_path / "none")
    with torch.no_grad():
        agrees("an exported model in transformers", theirs(ids).logits, model.llama(ids), 1e-5)
        assert relative(again.llama(ids), model.llama(ids)) < 1e-5
    assert all(map(torch.equal, model.mm_projector.parameters(), again.mm_projector.parameters()))
    slide = wsi_llava.read_features(data, "demo_0015")
    assert torch.equal(again.encode_slide(*slide), model.encode_slide(*slide))
    assert (folder / "tokenizer.model").exists() and not list(folder.glob(".*"))
    assert theirs.generation_config.eos_token_id == [2]
    with pytest.raises(UserError, match="exported: holds a model already; name a new folder"):
        train_with(demo, out, "--export", folder)
    config = out / "stage3" / "config.json"
    config.write_text(config.read_text().replace('"no_slide_encoder": false', '"no_slide_encoder": true'))
    with pytest.raises(UserError, match="has no slide encoder, which no published layout can say"):
        train_with(demo, out, "--export", tmp_path / "new")


# ---- prepare.py: slides ----


def test_a_tile_at_a_whole_zoom_is_the_mean_of_its_pixels_to_the_bit(tmp_path):
    """As scanned at 0.5 um/px, give or take 2%; else the mean of 2 x 2 or 4 x 4."""
    scan = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1100, 1100, 3), dtype=np.uint8))
    scan.save(tmp_path / "slide.png")
    for mpp, n in ((0.5, 1), (0.495, 1), (0.505, 1), (0.25, 2), (0.247, 2), (0.125, 4)):
        slide = prepare.Slide(tmp_path / "slide.png", mpp=mpp)
        corner = round(8 * slide.zoom)
        box = (corner, corner, corner + 256 * n, corner + 256 * n)
        assert np.array_equal(slide.tile(8, 8)[..., :3], np.asarray(scan.crop(box).reduce(n)))
    assert prepare.Slide(tmp_path / "slide.png", mpp=0.48).average is None


def test_a_tile_resampled_is_that_part_of_the_whole_slide_resampled(tmp_path):
    """With Pillow's Lanczos; an inner tile, and one at the corner, with white around."""
    scan = Image.fromarray(np.random.default_rng(0).integers(0, 256, (320, 320, 3), dtype=np.uint8))
    scan = scan.resize((1280, 1280), Image.Resampling.BICUBIC)
    scan.save(tmp_path / "slide.png")
    white = Image.new("RGB", (1280 + 20, 1280 + 20), "white")
    white.paste(scan, (10, 10))
    # 0.3 um/px: zoom 5/3
    whole = np.asarray(white.resize((780, 780), Image.Resampling.LANCZOS)).astype(int)[6:, 6:]
    slide = prepare.Slide(tmp_path / "slide.png", mpp=0.3)
    for x, y in ((0, 0), (255, 510)):
        tile = slide.tile(x, y)
        assert tile.shape == (256, 256, 4) and tile.dtype == np.uint8
        assert np.abs(tile[..., :3] - whole[y : y + 256, x : x + 256]).max() <= 2


@pytest.mark.parametrize("mpp", [0.495, 0.252, 0.3])
def test_tiles_far_to_the_right_lie_where_the_exact_scale_puts_them(tmp_path, mpp):
    """A black column under the middle of the 25th tile: as it is, averaged, or resampled."""
    scale = 0.5 / mpp
    at = round((24 * 256 + 128) * scale)
    scan = Image.new("RGB", (round(6500 * scale), 300), (255, 255, 255))
    scan.paste((0, 0, 0), (at, 0, at + max(1, round(scale)), 300))
    scan.save(tmp_path / "wide.png")
    tile = prepare.Slide(tmp_path / "wide.png", mpp=mpp).tile(24 * 256, 0).astype(int)
    assert abs(int(tile[100, :, 0].argmin()) - 128) <= 1


@pytest.mark.parametrize(
    "size, levels, scales",
    [
        ((3000, 2220), [(1536, 1280), (768, 768), (256, 256)], [1, 2, 4, None]),  # padded to whole tiles
        ((3984, 3984), [(2048, 2048), (1024, 1024)], [1, 2, 4]),  # both sides by as much
        ((300, 8000), [(75, 2000), (19, 500)], [1, 4, 16]),  # a strip: OpenSlide says 15.9
        ((3000, 2220), [(1500, 1110), (1500, 555)], [1, 2, None]),
        ((3001, 2221), [(1500, 1110), (2000, 1480)], [1, 3001 / 1500, 3001 / 2000]),
    ],
)
def test_levels_are_of_the_places_that_they_show(monkeypatch, tmp_path, size, levels, scales):
    Image.new("RGB", (600, 600)).save(tmp_path / "s.png")
    slide = prepare.Slide(tmp_path / "s.png", mpp=0.5)
    tiles = {f"openslide.level[{i}].tile-width": "256" for i in range(len(scales))}
    slide.file = types.SimpleNamespace(dimensions=size, level_dimensions=(size, *levels))
    slide.get = tiles.get
    assert [slide.level_scale(i) for i in range(len(scales))] == scales


def test_padded_levels_give_the_same_pixels(toy_slide, tmp_path):
    """A level of which a quarter is padding, as in Philips' slides."""
    image, small = toy_slide[1].resize((1600, 1600)), Image.new("RGB", (1024, 1024))
    small.paste(image.resize((800, 800), Image.Resampling.BOX))
    write_tiff(tmp_path / "plain.tif", image, 0.25, (1, 2))
    write_tiff(tmp_path / "padded.tif", image, 0.25, (1, 2), {2: small})
    plain, padded = (prepare.Slide(tmp_path / f"{name}.tif") for name in ("plain", "padded"))
    assert padded.level == 1 and padded.scales == [1, 2] and padded.downsamples[1] < 1.6
    for read in (lambda slide: slide.tile(400, 300), lambda slide: slide.thumbnail(8)):
        got, want = read(padded), read(plain)
        assert np.abs(np.asarray(got).astype(int) - np.asarray(want)).mean() < 3


OME = '<?xml version="1.0"?><OME><Image><Pixels PhysicalSizeX="{}" PhysicalSizeXUnit="{}"/></Image></OME>'
APERIO = "Aperio Image Library v1\n512x512 |"
# What is written into a TIFF -> (source, um/px), or what is said.
WRITTEN = [
    ({"resolution": (4e4, 4e4), "resolutionunit": "CENTIMETER"}, "metadata", 0.25),
    ({"description": OME.format(0.25, "&#181;m")}, "OME-XML", 0.25),
    ({"description": OME.format(0.25, "um") + "<Image SizeZ='1'>" * 2}, "OME-XML", 0.25),
    ({"description": "ImageJ=1.53\nunit=micron\n", "resolution": (4, 4)}, "ImageJ", 0.25),
    ({"description": APERIO + "AppMag = 20"}, "objective power", 0.5),
    ({"description": APERIO + "AppMag = 40|MPP = 0.5"}, "metadata", 0.5),
    ({"description": APERIO + "MPP = 252.1"}, r"in it \({'metadata': 252.1}\); give --mpp", 0),
    ({}, r"no um/px from 0.05 to 20 in it \(none at all\); give --mpp", 0),
]


@pytest.mark.parametrize("tags, source, mpp", WRITTEN)
def test_where_the_resolution_comes_from(tmp_path, tags, source, mpp):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / ("s.svs" if "Aperio" in tags.get("description", "") else "s.tif")
    pixels, tags = np.full((512, 512, 3), 255, np.uint8), {"resolutionunit": "NONE"} | tags
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", metadata=None, **tags)
    if mpp:
        slide = prepare.Slide(path)
        assert (slide.source, round(slide.mpp, 6)) == (source, mpp)
        assert ("differ by over 1.5 times" in str(slide.notes)) == ("AppMag = 40" in str(tags))
        assert ("scenes" in str(slide.notes)) == ("SizeZ" in str(tags))
    else:
        with pytest.raises(UserError, match=source):
            prepare.Slide(path)
        assert prepare.Slide(path, mpp=0.25).source == "--mpp-csv"


def test_the_resolution_of_plain_pictures(tmp_path):
    Image.new("RGB", (512, 512)).save(tmp_path / "tags.tif", dpi=(25400 / 0.25,) * 2)  # in strips
    slide = prepare.Slide(tmp_path / "tags.tif")
    assert (slide.source, round(slide.mpp, 4)) == ("resolution", 0.25)
    Image.new("RGB", (600, 10)).save(tmp_path / "screen.png", dpi=(72, 72))
    for mpp, message in ((None, "no um/px from 0.05 to 20 in it .*352.*; give --mpp"), (500, "too large")):
        with pytest.raises(UserError, match=f"screen.png: {message}"):
            prepare.Slide(tmp_path / "screen.png", mpp=mpp)


def test_the_resolution_can_be_given_slide_by_slide(tmp_path, capsys):
    """--mpp is for slides that say nothing; --mpp-csv wins over everything."""
    for name, options in (
        ("says", {"dpi": (50800, 50800)}),
        ("wrong", {"dpi": (50800, 50800)}),
        ("silent", {}),
    ):
        Image.new("RGB", (300, 300), PINK).save(tmp_path / f"{name}.jpg", **options)
    path = tmp_path / "mpp.csv"
    path.write_text(f"slide,mpp\n{tmp_path}/wrong.jpg,0.25\nnobody,0.5\nnobody,0.5\n")
    common = ["--slides", str(tmp_path), "--data", str(tmp_path / "data"), "--mpp", "0.4"]
    prepare.main([*common, "--mpp-csv", str(path)])
    printed = capsys.readouterr().out
    assert "mpp.csv: 2 lines, about 1 of these slides" in printed
    assert "1 slide, um/px taken from --mpp-csv: wrong" in printed
    files = tmp_path / "data" / "features"
    for name, mpp in (("says", 0.5), ("wrong", 0.25), ("silent", 0.4)):
        assert wsi_llava.feature_metadata(files / f"{name}.safetensors")["mpp"] == mpp
    prepare.main([*common[:-2], "--mpp-csv", str(path)])
    assert "3 done already; 0 to prepare" in capsys.readouterr().out


@pytest.mark.parametrize("row", ["b,250", "b,nan", "b;1", ",1", "a,0.25"])
def test_bad_lines_of_um_px_are_refused(tmp_path, row):
    (tmp_path / "mpp.csv").write_text(f"a,0.5\n{row}\n")
    with pytest.raises(UserError, match=f"line 2: '{row}'; --mpp-csv takes lines of slide,mpp"):
        prepare.read_mpp_csv(tmp_path / "mpp.csv", {})


def touched(folder, *names):
    """Empty files below the folder."""
    for name in names:
        path = Path(os.fsdecode(os.fsencode(folder) + b"/" + os.fsencode(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_slides_are_found_as_an_archive_holds_them(tmp_path):
    """Links, odd names, DICOM folders; hidden files and Hamamatsu's parts are no slides."""
    touched(tmp_path / "all", "a/-x.svs", "a/b c.d.ndpi", "a/\xfc.SVS", "a/._b c.d.ndpi", ".old/e.svs")
    touched(tmp_path / "all", "case 7/1.dcm", "case 7/2.dcm", "v/v.vms", "v/v(1,0).jpg")
    (tmp_path / "all" / "loop").symlink_to(tmp_path / "all", target_is_directory=True)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "linked.svs").symlink_to(tmp_path / "all" / "a" / "-x.svs")
    (tmp_path / "all" / "links").symlink_to(tmp_path / "more", target_is_directory=True)
    found = prepare.find_slides([tmp_path / "all"])
    assert list(found) == ["-x", "b c.d", "case 7", "v", "\xfc"] and found["case 7"].name == "1.dcm"
    with pytest.raises(UserError, match="c.svs: no such file or folder"):
        prepare.find_slides([tmp_path / "c.svs"])


def test_names_of_slides(tmp_path):
    """Names that meet get their folder's; what that does not tell apart is refused."""
    touched(tmp_path, "p1/HE.tif", "p2/HE.tif", "p2/index.svs", b"caf\xe9.svs")
    found = prepare.find_slides([tmp_path, tmp_path / "p1"])
    assert list(found) == ["caf_", "index", "p1_HE", "p2_HE"]
    assert found["p2_HE"] == tmp_path / "p2" / "HE.tif"
    touched(tmp_path / "more", "x/a/1.svs", "y/A/1.svs")
    with pytest.raises(UserError, match="1.svs and .*1.svs have the same name, A_1; rename one"):
        prepare.find_slides([tmp_path / "more"])


def write_dicom(path, kind, series):
    """The header of a DICOM file: its kind and series, behind a sequence that holds another."""
    path.parent.mkdir(exist_ok=True)

    def element(group, number, kind, value):
        value = value.encode() + b"\0" * (len(value) % 2)
        return struct.pack("<HH2sH", group, number, kind, len(value)) + value

    body = element(8, 8, b"CS", "ORIGINAL") + element(8, 0x16, b"UI", kind)
    body += struct.pack("<HH2sHI", 8, 0x1140, b"SQ", 0, 40) + element(8, 0x16, b"UI", "9.9")
    body += element(0x20, 0xE, b"UI", "9.9") + element(0x20, 0xE, b"UI", series)
    body += element(0x28, 2, b"US", "3") + element(0x20, 0xE, b"UI", "8.8")
    path.write_bytes(bytes(128) + b"DICM" + body)


def test_folders_of_dicom_hold_slides_by_series(tmp_path):
    slide, notes = "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.840.10008.5.1.4.1.1.91.1"
    write_dicom(tmp_path / "one" / "0.dcm", notes, "1.1")  # annotations, first in order
    for i in (1, 2):
        write_dicom(tmp_path / "one" / f"{i}.dcm", slide, "1.2")
    for i, series in enumerate(("2.1", "2.2", "2.2")):
        write_dicom(tmp_path / "two" / f"{i}.dcm", slide, series)
    write_dicom(tmp_path / "none" / "0.dcm", notes, "4.1")
    found = {name: path.name for name, path in prepare.find_slides([tmp_path]).items()}
    assert found == {"one": "1.dcm", "two_2.1": "0.dcm", "two_2.2": "1.dcm"}


def test_the_same_picture_at_any_resolution_gives_the_same_features(toy_slide, tmp_path):
    """0.5 um/px as it is, 0.25 averaged, 0.46 resampled: the same grid and, to a small tolerance, the same
    features."""
    image, found = toy_slide[1], {}
    for mpp in (0.5, 0.25, 0.46):
        side = round(1536 * 0.5 / mpp)
        scan = image.resize((side, side), Image.Resampling.BICUBIC)
        write_tiff(tmp_path / f"{mpp}.tif", scan, mpp, (1, 4))
    prepare.main(["--slides", str(tmp_path), "--data", str(tmp_path / "data")])
    for mpp in (0.5, 0.25, 0.46):
        found[mpp] = wsi_llava.read_features(tmp_path / "data", str(mpp))
        about = wsi_llava.feature_metadata(tmp_path / "data" / "features" / f"{mpp}.safetensors")
        assert about["scale"] == pytest.approx(0.5 / mpp, rel=1e-3) and about["tiles"] > 20
        assert torch.equal(found[mpp][1], found[0.5][1])
        similar = F.cosine_similarity(found[mpp][0].float(), found[0.5][0].float())
        assert similar.min() > 0.99, mpp


# ---- prepare.py: tissue and tiles ----


def test_tissue_and_grid(toy_slide):
    slide = prepare.Slide(toy_slide[0])
    mask = tissue_mask(slide.thumbnail(prepare.MASK))
    assert 0.4 < mask.mean() < 0.75
    coords = prepare.tile_grid(mask, 0.25)
    assert 18 < len(coords) < 36 and coords.dtype == np.int32 and (coords % 256 == 0).all()
    raster = coords[:, 1].astype(int) * 10000 + coords[:, 0]
    assert (np.diff(raster) > 0).all()  # y, then x
    half = prepare.tile_grid(mask, 0.5, step=128)
    assert len(half) > 3 * len(coords) and (half % 128 == 0).all()
    border = prepare.tile_grid(np.ones((15, 9), bool), 0.1)  # 288 x 480 px
    assert border.tolist() == [[0, 0], [256, 0], [0, 256], [256, 256]]


def scene(glass, *things, grain=2):
    """A painted thumbnail 256 x 256 -> (it, where its tissue is). things: (colour, where, how much it varies);
    what varies by less than 2 is a pen's."""
    rng, truth = np.random.default_rng(0), np.zeros((256, 256), bool)
    pixels = np.full((256, 256, 3), glass, np.float32)
    for colour, box, varies in things:
        shape = Image.new("L", (256, 256))
        ImageDraw.Draw(shape).ellipse(box, fill=255)
        inside = np.asarray(shape) > 0
        texture = prepare.noise(rng, 64, 256) + prepare.noise(rng, 12, 256) / 2
        pixels[inside] = (np.array(colour) + varies * texture[..., None])[inside]
        truth[inside] = varies >= 2
    pixels += rng.normal(0, grain, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), truth


PINK, GLASS = (222, 150, 190), (244, 244, 242)
WEST, EAST, PALE = (20, 40, 130, 220), (150, 40, 240, 220), (236, 222, 230)
TINTED, TEAL, RED_PEN = (235, 225, 195), (150, 210, 200), (215, 30, 45)
SCENES = {
    "H&E": [GLASS, (PINK, WEST, 12)],
    "a black border": [(6, 5, 8), (PINK, WEST, 12), (GLASS, EAST, 0)],
    "very dark": [GLASS, ((64, 22, 84), WEST, 8)],
    "pale kidney, dark control": [GLASS, (PALE, WEST, 4), ((120, 70, 40), EAST, 14)],
    "pale kidney, red pen": [GLASS, (PALE, WEST, 4), (RED_PEN, EAST, 1)],
    "tinted glass": [TINTED, ((200, 120, 140), WEST, 12)],
    "tinted glass, pale tissue": [TINTED, ((226, 204, 186), WEST, 5)],
    "aniline blue, red": [GLASS, ((70, 120, 190), WEST, 14), ((190, 60, 90), EAST, 14)],
    "fast green": [GLASS, ((60, 160, 140), WEST, 14)],
    "DAB": [GLASS, ((200, 195, 205), WEST, 8), ((130, 80, 40), EAST, 14)],
    "red pen": [GLASS, (PINK, WEST, 12), (RED_PEN, EAST, 1)],
    "blue pen": [GLASS, (PINK, WEST, 12), ((40, 70, 170), EAST, 1)],
    "a teal pen alone": [GLASS, (TEAL, EAST, 1)],
    "glass alone": [GLASS],
}


@pytest.mark.parametrize("name", SCENES)
def test_tissue_is_measured_against_the_slides_own_glass(name):
    """Weak stain beside strong, tinted glass, other stains; and pens, which are none."""
    picture, truth = scene(*SCENES[name])
    mask = tissue_mask(picture)
    assert (truth & ~mask).sum() <= 0.1 * truth.sum(), "tissue was missed"
    assert (mask & ~truth).sum() < 0.1 * max(truth.sum(), 10000), "other things were taken for tissue"


@pytest.mark.parametrize("glass", [GLASS, (244, 240, 233), (235, 240, 243)])
@pytest.mark.parametrize("tissue", [PINK, PALE, (215, 220, 235)])
def test_white_around_the_scanned_area_is_no_glass(glass, tissue):
    """Tinted glass is not tissue. On other slides such white is the glass."""
    picture, truth = scene(glass, (tissue, WEST, 6))
    around = Image.new("RGB", (640, 512), "white")
    around.paste(picture, (100, 100))
    mask = tissue_mask(around)[100:356, 100:356]
    assert (mask & ~truth).sum() < 0.1 * truth.sum() and mask.sum() == tissue_mask(around).sum()
    assert (truth & ~mask).sum() < 0.1 * truth.sum() or tissue != PINK
    bright, truth = scene((255, 255, 255), (tissue, WEST, 6), grain=0)
    assert (tissue_mask(bright) & truth).sum() > 0.9 * truth.sum()


def test_slides_all_of_tissue_are_measured_against_white():
    for colour, share in ((PINK, 1), ((5, 5, 5), 0), ((255, 255, 255), 0)):
        assert tissue_mask(scene(colour)[0]).mean() == share
    stroma = scene((198, 120, 170), ((235, 190, 215), WEST, 6), ((120, 70, 140), EAST, 6))[0]
    assert tissue_mask(stroma).mean() > 0.98


def test_why_there_is_no_tissue_is_said(tmp_path, capsys):
    """No colour, as of silver stains; fragments that are too small. Ink is named."""
    grey = scene(GLASS, ((120, 120, 118), WEST, 14))[0].resize((2048, 2048))
    grey.convert("L").convert("RGB").save(tmp_path / "silver.png")
    Image.new("RGB", (600, 600), (245, 245, 245)).save(tmp_path / "glass.png")
    scene(GLASS, (PINK, (68, 68, 88, 88), 12))[0].resize((1024, 1024)).save(tmp_path / "crumb.png")
    scene(GLASS, (PINK, WEST, 12), (RED_PEN, EAST, 1))[0].resize((2048, 2048)).save(tmp_path / "pen.png")
    flags = ["--mpp", "0.5", "--max-tiles", "1", "--slides", str(tmp_path)]
    prepare.main([*flags, "--data", str(tmp_path / "data")])
    printed = capsys.readouterr().out
    assert "1 slide, no tile reaches --min-tissue 0.1; 0.01 would give 1: crumb" in printed
    assert "1 slide, ink left out, red in data/qc: pen" in printed
    assert "2 slides, no tissue found (what has no colour needs --mask): glass, silver" in printed
    features, coords = wsi_llava.read_features(tmp_path / "data", "glass")
    assert features.shape == (0, 128) and coords.shape == (0, 2)


def test_other_masks_are_other_features(archive, tmp_path, capsys):
    masks, data = tmp_path / "masks", tmp_path / "data"
    masks.mkdir()
    picture = Image.new("L", (128, 128))
    picture.paste(1, (0, 0, 64, 64))  # a label, a quarter of the slide
    picture.save(masks / "s0.png")
    (masks / "s3.json").write_text('{"features": [{"geometry": 3}]}')
    with pytest.raises(UserError, match="1 slide could not be prepared"):
        prepare_all(archive[0], data, "--mask", masks)
    want = [[x, y] for y in range(0, 768, 256) for x in range(0, 768, 256)]
    assert wsi_llava.read_features(data, "s0")[1].tolist() == want
    assert re.search("s3.json: .*--mask takes pictures", prepare.read_failures(data)["s3"])
    assert "not in --mask: tissue by its colour: s1, s2, s4" in capsys.readouterr().out
    picture.save(masks / "s1.png")
    with pytest.raises(UserError, match="s1.safetensors was made with mask .*; --overwrite makes it again"):
        prepare_all(archive[0], data, "--mask", masks)


def masked(tmp_path, mask, name="s.png", **options):
    """What given_mask makes of a picture or a GeoJSON, of a slide of 2048 px -> bool [64,64]."""
    if name.endswith("json"):
        (tmp_path / name).write_text(json.dumps(mask))
    else:
        mask.save(tmp_path / name, **options)
    slide = types.SimpleNamespace(width=2048, height=2048, scale=1, corner=[0, 0])
    return prepare.given_mask(tmp_path / name, slide, (64, 64))


def test_pictures_as_masks(toy_slide, tmp_path):
    """Black and white, labels, alpha; photographs and other shapes are refused."""
    left = Image.new("L", (256, 256))
    ImageDraw.Draw(left).ellipse((-100, 20, 127, 230), 255)
    want = np.asarray(left.resize((64, 64), Image.Resampling.BOX)) > 127
    clear = Image.new("RGBA", left.size, (200, 30, 30))
    clear.putalpha(left)
    labels = Image.fromarray(np.asarray(left) // 128 * 3)
    for mask, name in ((left, "a.png"), (left, "a.jpg"), (labels, "b.png"), (clear, "c.png")):
        assert np.array_equal(masked(tmp_path, mask, name), want), name
    overlay = toy_slide[1].resize((256, 256))
    for mask, message in (
        (overlay, "not a mask of few greys"),
        (overlay.convert("L"), "not a mask of few greys"),
        (left.resize((300, 100)), r"\(300, 100\) px are not of the slide's shape"),
    ):
        for name in ("e.png", "e.jpg"):
            with pytest.raises(UserError, match=f"{name}: {message}"):
                masked(tmp_path, mask, name)


def test_geojson_as_a_mask(tmp_path):
    """Holes, what QuPath ignores, missing cores; points, lines and empty objects are passed over."""

    def thing(left, right, top=0, bottom=2048, kind="Polygon", **about):
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        geometry = {"type": kind, "coordinates": ring if kind == "LineString" else [ring]}
        return {"type": "Feature", "geometry": geometry, "properties": about}

    ignored, missing = {"classification": {"name": "Ignore*"}}, {"isMissing": True}
    tissue = thing(0, 1024)
    tissue["geometry"]["coordinates"] += thing(256, 512)["geometry"]["coordinates"]  # a hole
    bare = {"type": "Feature"}, {"geometry": None, "properties": None}, tissue | {"properties": None}
    odd = thing(0, 2048, kind="LineString"), {"geometry": {"type": "Point", "coordinates": [1, 1]}}
    things = [*bare, *odd, thing(512, 768, **ignored), thing(1024, 2048, **missing)]
    mask = masked(tmp_path, {"type": "FeatureCollection", "features": things}, "s.geojson")
    assert mask[:, :7].all() and mask[:, 25:31].all() and not mask[:, 9:24].any() and not mask[:, 33:].any()
    with pytest.raises(UserError, match="s.geojson: .*; --mask takes pictures"):
        masked(tmp_path, {"features": [{"geometry": {"type": "Polygon"}}]}, "s.geojson")


# ---- prepare.py: many slides, whatever happens ----

FEW = ["--max-tiles", "12", "--geojson"]


@pytest.fixture(scope="session")
def archive(toy_slide, tmp_path_factory):
    """Five small slides, and what an uninterrupted run makes of them -> (their folder, the data folder)."""
    folder = tmp_path_factory.mktemp("archive")
    _, image, _ = toy_slide
    (folder / "slides").mkdir()
    for i in range(4):
        write_tiff(folder / "slides" / f"s{i}.tif", image.rotate(90 * i))
    write_tiff(folder / "slides" / "s4.tif", image.crop((0, 0, 1024, 1024)), downsamples=(1, 2))
    prepare.main(["--slides", str(folder / "slides"), "--data", str(folder / "data"), "--workers", "2", *FEW])
    return folder / "slides", folder / "data"


def contents(data):
    """{file: its bytes} of what a data folder holds of slides."""
    files = [path for part in ("features", "qc") for path in (data / part).glob("[!.]*")]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def prepare_all(slides, data, *flags):
    prepare.main(["--slides", str(slides), "--data", str(data), *map(str, flags)])


def test_shards_and_workers_do_not_change_a_byte(archive, tmp_path):
    slides, whole = archive
    prepare_all(slides, tmp_path, "--workers", 1, "--shard", "2/2", *FEW)
    assert {path.stem for path in (tmp_path / "features").iterdir()} == {"s1", "s3"}
    prepare_all(slides, tmp_path, "--workers", 3, "--shard", "1/2", *FEW)
    assert contents(tmp_path) == contents(whole)
    drawn = [wsi_llava.read_features(tmp_path, name)[1].tolist() for name in ("s0", "s1")]
    raster = [sorted(coords, key=lambda corner: corner[::-1]) for coords in drawn]
    assert drawn == raster and len(drawn[0]) == 12 and drawn[0] != drawn[1]


LOCK = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
import prepare
claims = open(pathlib.Path(sys.argv[2], ".claims"), "ab")
print(prepare.claim(claims, sys.argv[3]), flush=True)
sys.stdin.read()
"""


@slow
def test_a_killed_run_leaves_no_half_file_and_is_completed_to_the_same_bytes(archive, tmp_path):
    slides, whole = archive
    data = tmp_path / "data"
    command = [sys.executable, HERE / "prepare.py", "--slides", slides, "--data", data, *FEW]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(data.glob("features/s*")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = contents(data)
    assert 1 <= len(list(data.glob("features/s*"))) < 5
    assert not [name for name in before if "/s" in name and before[name] != contents(whole)[name]]
    command = [sys.executable, "-c", LOCK, HERE, data, "s4"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.PIPE)
    assert holder.stdout.readline() == "True\n"
    prepare_all(slides, data, *FEW)
    assert not (data / "features" / "s4.safetensors").exists()
    holder.kill()
    holder.wait()
    prepare_all(slides, data, *FEW)
    assert contents(data) == contents(whole)


@slow
def test_two_runs_on_one_folder_share_the_slides(archive, tmp_path):
    slides, whole = archive
    command = [sys.executable, HERE / "prepare.py", "--slides", slides, "--data", tmp_path, *FEW]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(int(re.search(r"tiles? of (\d) slides? in", text)[1]) for text in printed) == 5, printed
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--min-tissue", "0.5"], "min_tissue 0.1, not 0.5; --overwrite makes it again"),
        (["--seed", "3"], "seed 0, not 3"),
        (["--mpp-csv", "mpp.csv"], "mpp 0.5, not 0.4"),
        (["--max-tiles", "9"], "max_tiles 12, not 9"),
        (["--step", "100"], "--step 100: give a multiple of 32"),
    ],
)
def test_other_parameters_stop_and_name_both_values(archive, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("mpp.csv").write_text("s1,0.4\n")
    with pytest.raises(UserError, match=re.escape(message)):
        prepare_all(*archive, *FEW, *flags)


def test_another_slide_of_the_same_name_is_not_done_already(archive, tmp_path, capsys):
    """By path and size, and where these differ by its hash: a moved archive is known again."""
    moved, flags = tmp_path / "s4.tif", (tmp_path / "data", "--max-tiles", 2)
    prepare_all(archive[0] / "s4.tif", *flags)
    before = contents(tmp_path / "data")
    shutil.copy(archive[0] / "s4.tif", moved)
    prepare_all(moved, *flags)
    assert "Wrote 0 tiles of 0 slides" in capsys.readouterr().out and contents(tmp_path / "data") == before
    shutil.copy(archive[0] / "s0.tif", moved)  # siteB/case1.tif, or a rescan
    with pytest.raises(UserError, match="1 slide could not be prepared"):
        prepare_all(moved, *flags)
    assert "is of another slide; --overwrite makes" in prepare.read_failures(tmp_path / "data")["s4"]
    prepare_all(moved, *flags, "--overwrite")
    assert contents(tmp_path / "data") != before and not prepare.read_failures(tmp_path / "data")


def damage(path, tiles):
    """Overwrites JPEG tiles of the finest level of a TIFF by write_tiff."""
    body = bytearray(path.read_bytes())
    starts = [match.start() for match in re.finditer(rb"\xff\xd8\xff\xe0", body)]
    for i in tiles:
        body[starts[i] : starts[i] + 300] = b"\0" * 300
    path.write_bytes(body)


@pytest.fixture(scope="session")
def large(toy_slide):
    """A picture of nine toy slides, cut to 16 x 16 tiles."""
    picture = Image.new("RGB", (4096, 4096))
    for corner in itertools.product(range(0, 4096, 1536), repeat=2):
        picture.paste(toy_slide[1], corner)
    return picture


def test_what_cannot_be_decoded_of_a_thumbnail_stays_white(large, tmp_path):
    """One tile of 256 of the level that it is made of; a third of them fail the slide."""
    for name, tiles in (("one", [100]), ("many", range(16, 96))):
        write_tiff(tmp_path / f"{name}.tif", large, downsamples=(1,))
        damage(tmp_path / f"{name}.tif", tiles)
    slide = prepare.Slide(tmp_path / "one.tif")
    pixels = np.asarray(slide.thumbnail(32))
    assert slide.lost == 1 / 256 and (pixels[48:56, 32:40] == 255).all()
    with pytest.raises(UserError, match="over 1% of it cannot be decoded"):
        prepare.Slide(tmp_path / "many.tif").thumbnail(32)


@slow
def test_damaged_tiles_are_dropped_or_fail_their_slide(large, tmp_path, capsys):
    """One tile of 200 is left out; three are too many. A mended slide leaves the record."""
    slides, data = tmp_path / "slides", tmp_path / "data"
    slides.mkdir()
    for name, tiles in (("one", [16 * 4 + 4]), ("three", [16 * 4 + 4, 16 * 4 + 3, 16 * 3 + 3])):
        write_tiff(slides / f"{name}.tif", large)
        damage(slides / f"{name}.tif", tiles)
    (slides / "bad.svs").write_bytes(b"not a slide")
    with pytest.raises(UserError, match="2 slides could not be prepared"):
        prepare_all(slides, data)
    assert "1 slide, under 1% of its tiles cannot be decoded: one" in capsys.readouterr().out
    features, coords = wsi_llava.read_features(data, "one")
    assert wsi_llava.feature_metadata(data / "features" / "one.safetensors")["dropped"] == 1
    assert len(features) == len(coords) > 150 and [1024, 1024] not in coords.tolist()
    failures = prepare.read_failures(data)
    assert set(failures) == {"bad", "three"} and "cannot be decoded" in failures["three"]
    page = (data / "qc" / "index.html").read_text()
    assert page.index("FAILED: ") < page.index("<b>one</b>")
    write_tiff(slides / "three.tif", large)
    with pytest.raises(UserError, match="1 slide could not be prepared"):
        prepare_all(slides, data)
    assert set(prepare.read_failures(data)) == {"bad"} and (data / "features" / "three.safetensors").exists()


@pytest.mark.parametrize("method", ["own_mpp", "thumbnail", "tile"])
def test_a_slide_that_kills_its_reader_is_found_out(archive, tmp_path, monkeypatch, method):
    slides, whole = archive
    lives = getattr(prepare.Slide, method)

    def deadly(slide, *given):
        if "s2" in str(slide.path):
            os.kill(os.getpid(), signal.SIGKILL)
        return lives(slide, *given)

    monkeypatch.setattr(prepare.Slide, method, deadly)  # the readers are forked, and have it too
    with pytest.raises(UserError, match="1 slide could not be prepared"):
        prepare_all(slides, tmp_path, *FEW)
    made, want = contents(tmp_path), contents(whole)
    features = [name for name in want if name.startswith("features/")]
    assert [name for name in features if made.get(name) != want[name]] == ["features/s2.safetensors"]
    assert "the process that read it died" in prepare.read_failures(tmp_path)["s2"]
    with pytest.raises(UserError, match="s2.tif: the process that read it died"):
        prepare.apart(slides / "s2.tif", die)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dry_run_lists_and_writes_nothing(archive, tmp_path, capsys):
    """Also beside a file of absurd size."""
    absurd = (archive[0] / "s4.tif").read_bytes()
    (tmp_path / "good.tif").write_bytes(absurd)
    for side in (322, 323):
        absurd = absurd.replace(*(struct.pack("<HHII", side, 4, 1, n) for n in (256, 2**31)))
    (tmp_path / "absurd.tif").write_bytes(absurd)
    with pytest.raises(UserError, match="1 slide could not be prepared"):
        prepare_all(tmp_path, tmp_path / "data", "--dry-run")
    printed = capsys.readouterr()
    assert "\ngood: 0.5 um/px (metadata), 14 tiles\n" in printed.out
    assert "absurd.tif: says that its tiles are over 65536 px wide" in printed.err
    assert not (tmp_path / "data").exists()


def test_a_full_disk_stops_with_what_to_do(archive, tmp_path, monkeypatch):
    """One line, no half file, and the next run completes it. So with a picture, which a reader writes."""
    resource = pytest.importorskip("resource")
    slides, whole = archive
    limit, encode = resource.getrlimit(resource.RLIMIT_FSIZE), prepare.encode

    def full(*given):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))
        return encode(*given)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "encode", full)
            with pytest.raises(OSError, match="File too large.*s0.safetensors"):
                prepare_all(slides, tmp_path, *FEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list((tmp_path / "features").iterdir())
    (tmp_path / "qc" / "s0.jpg").unlink()
    (tmp_path / "qc" / "s0.jpg").mkdir()  # nothing can be written there
    with pytest.raises(OSError, match="directory.*s0.jpg"):
        prepare_all(slides, tmp_path, *FEW)
    (tmp_path / "qc" / "s0.jpg").rmdir()
    prepare_all(slides, tmp_path, *FEW)
    assert contents(tmp_path) == contents(whole)


def test_pictures_and_geojson_of_a_slide(tmp_path):
    """The picture of a huge slide is small; QuPath's tiles are in level-0 pixels."""
    Image.new("RGB", (51200, 512), PINK).save(tmp_path / "wide.png")
    prepare_all(tmp_path / "wide.png", tmp_path, "--mpp", 0.25, "--geojson")
    assert Image.open(tmp_path / "qc" / "wide.jpg").size == (768, 8)
    found = json.loads((tmp_path / "qc" / "wide.geojson").read_text())["features"]
    square = [[512, 0], [1024, 0], [1024, 512], [512, 512], [512, 0]]
    assert found[1]["geometry"] == {"type": "Polygon", "coordinates": [square]} and len(found) == 100


def test_each_output_is_made_if_it_is_missing(archive, tmp_path):
    """--geojson on finished slides, a picture that was deleted; features are not touched."""
    slide, path = archive[0] / "s4.tif", tmp_path / "features" / "s4.safetensors"
    prepare_all(slide, tmp_path, "--max-tiles", 2)
    before, made = contents(tmp_path), path.stat().st_mtime_ns
    (tmp_path / "qc" / "s4.jpg").unlink()
    prepare_all(slide, tmp_path, "--max-tiles", 2, "--geojson")
    assert (tmp_path / "qc" / "s4.geojson").exists() and path.stat().st_mtime_ns == made
    path.write_bytes(before["features/s4.safetensors"][:-9])
    with pytest.raises(UserError, match="s4.safetensors: .*; not a file of features; delete it"):
        prepare_all(slide, tmp_path, "--max-tiles", 2)


def test_a_file_system_without_locks_is_worked_on_without(archive, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(prepare.fcntl, "lockf", refused)
    prepare_all(archive[0], tmp_path, *FEW)
    assert contents(tmp_path) == contents(archive[1])


def test_what_is_there_is_gone_on_with_by_the_encoder_that_made_it(archive, tmp_path):
    other, slide = wsi_llava.untrained_tile_encoder(seed=1), archive[0] / "s4.tif"
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    prepare_all(slide, tmp_path / "data", "--max-tiles", 2, "--tile-encoder", tmp_path / "other.safetensors")
    before = contents(tmp_path / "data")
    prepare_all(slide, tmp_path / "data", "--max-tiles", 2, "--overwrite")
    assert contents(tmp_path / "data") == before
    assert wsi_llava.read_meta(tmp_path / "data")["encoder"]["fingerprint"] == wsi_llava.fingerprint(other)


def test_features_that_are_not_finite_fail_their_slide(archive, tmp_path):
    encoder = wsi_llava.untrained_tile_encoder()
    torch.nn.init.constant_(encoder.norm.bias, math.nan)
    save_file(encoder.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="1 slide could not be prepared"):
        prepare_all(archive[0] / "s4.tif", tmp_path, "--tile-encoder", tmp_path / "other.safetensors")
    message = prepare.read_failures(tmp_path)["s4"]
    assert "its features are not finite; try --dtype float32" in message


def test_the_page_of_all_slides_is_safe_to_open(archive, tmp_path):
    data = shutil.copytree(archive[1], tmp_path / "data")
    prepare.note_failure(data, "l<o>st", "no & nothing")
    prepare.write_index(data)
    page = (data / "qc" / "index.html").read_text(encoding="utf-8")
    cards = re.findall(r'<p><a href="(.*?)">.*?<b>(.*?)</b> (.*)', page)
    assert cards[0] == ("l%3Co%3Est.jpg", "l&lt;o&gt;st", "FAILED: no &amp; nothing")
    assert cards[1:] == [(f"s{i}.jpg", f"s{i}", "") for i in range(5)]


# ---- prepare.py: features that were made elsewhere ----

CELLS = np.array([[2, 0], [0, 0], [1, 0], [1, 3], [0, 3], [2, 3]])

TRIDENT = {"patch_size": 256, "patch_size_level0": 512, "target_magnification": 20, "overlap": 0}


def write_foreign(path, tensors, **attributes):
    """A .pt, or an .h5 with attributes of its coords (`of_file`: its own)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save(tensors, path)
        return
    with pytest.importorskip("h5py").File(path, "w") as file:
        file.attrs.update(attributes.pop("of_file", {}))
        for key, value in tensors.items():
            file[key] = value
        if attributes:
            file["coords"].attrs.update(attributes)


def imported(folder, tensors, *flags, name="s.pt", **attributes):
    """Imports one file -> (its folder of data, what --features wrote of it)."""
    write_foreign(folder / name, tensors, **attributes)
    data = folder / f"data-{name.replace('/', '-')}"
    prepare.main(["--features", str(folder / name), "--data", str(data), *flags])
    (file,) = [*data.glob("features/*"), *data.glob("visual_tokens/*")]
    return data, load_file(file)


@pytest.mark.parametrize(
    "name, field, about, flags, coords",
    [
        ("giga.pt", "tile_embeds", {}, ["--mpp", "0.25"], CELLS * 512),
        ("padded.pt", "tile_embeds", {}, ["--mpp", "0.25"], CELLS * 512 - [200, 40]),  # to whole tiles
        ("clam.h5", "features", {}, ["--mpp", "0.25"], CELLS * 512),
        ("trident.h5", "features", TRIDENT, [], (CELLS * 512).astype(">i4")),
        ("stamp.h5", "feats", {"of_file": {"unit": "um", "tile_size_um": 128.0}}, [], CELLS * 128.0),
    ],
)
def test_features_of_others_are_imported(tmp_path, name, field, about, flags, coords):
    """Coordinates of any kind of number become pixels at the target, in raster order."""
    features = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    both = {field: features[None] if name == "clam.h5" else features, "coords": coords}
    if name.endswith(".pt"):
        both = {key: torch.from_numpy(x).float() for key, x in both.items()}
    data, got = imported(tmp_path, both, *flags, name=name, **about)
    order = np.lexsort(CELLS.T)
    assert torch.equal(got["features"], torch.from_numpy(features[order]).half())
    assert got["coords"].tolist() == (CELLS[order] * 256).tolist() and got["coords"].dtype == torch.int32
    encoder = wsi_llava.read_meta(data)["encoder"]
    assert encoder["width"] == 32 and encoder["source"].startswith("imported: ")


def test_visual_tokens_of_the_authors(tmp_path):
    tokens = torch.randn(576, 1024)
    data, got = imported(tmp_path, tokens)
    assert torch.equal(got["visual_tokens"], tokens.half())
    encoder = wsi_llava.read_meta(data)["encoder"]
    assert encoder["source"] == wsi_llava.IMPORTED_TOKENS and encoder["n_visual_tokens"] == 576


GOOD_FOREIGN = {"tile_embeds": torch.zeros(2, 8), "coords": torch.tensor([[0, 0], [512, 0]])}
REFUSED = [
    ({"x": torch.zeros(1)}, r"holds \['x'\], none of tile_embeds, feats, features"),
    (None, "read are .pt and .h5"),
    (torch.zeros(7, 8), r"features \[7, 8\] without coords: not visual tokens \[576,C\]"),
    (GOOD_FOREIGN | {"coords": torch.zeros(3, 2)}, r"features \[2, 8\], and 3 coords"),
    (GOOD_FOREIGN | {"tile_embeds": torch.full((2, 8), 1e6)}, "features not finite in half precision"),
    (GOOD_FOREIGN | {"coords": torch.full((2, 2), torch.nan)}, "not finite"),
    (GOOD_FOREIGN | {"coords": torch.tensor([[-512, 0], [-1024, 0]])}, "more than a tile outside"),
    (GOOD_FOREIGN | {"coords": torch.tensor([[0, 0], [512, 512_000]])}, "outside the grid"),
    (GOOD_FOREIGN | {"coords": torch.tensor([[0, 0], [1024, 0]])}, "512 px apart .* mend --mpp or --step"),
]


@pytest.mark.parametrize("tensors, message", REFUSED)
def test_imports_are_validated(tmp_path, tensors, message):
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(UserError, match="1 slide could not be prepared"):
        prepare.main(["--features", str(tmp_path / "x.pt"), "--mpp", "0.25", "--data", str(tmp_path)])
    assert re.search(message, prepare.read_failures(tmp_path)["x"])


def test_the_step_is_what_the_file_says(tmp_path):
    """Sparse tiles, rarely neighbours; overlapping ones; those of another size."""
    sparse = {"features": np.zeros((3, 8)), "coords": np.array([[0, 0], [1024, 0], [2048, 0]])}
    wide = TRIDENT | {"patch_size": 512, "patch_size_level0": 1024}
    for name, flags, about in (
        ("sparse.h5", [], TRIDENT),
        ("wide.h5", ["--step", "512"], wide),
        ("half.h5", [], wide | {"overlap": 256}),
    ):
        _, got = imported(tmp_path, sparse, *flags, name=name, **about)
        assert got["coords"].tolist() == [[0, 0], [512, 0], [1024, 0]]
    with pytest.raises(UserError, match="1 slide could not be prepared"):
        imported(tmp_path, sparse, name="refused.h5", **wide)


def test_a_slide_without_tiles_is_one_without_tissue(tmp_path):
    """As TRIDENT writes it; the first one has to say how wide it is."""
    for i, features in enumerate((np.zeros((0, 8), np.float32), np.zeros(0, np.float32))):
        empty = {"features": features, "coords": np.zeros((0, 2), int)}
        write_foreign(tmp_path / "in" / f"{i}.h5", empty, **TRIDENT)
    prepare.main(["--features", str(tmp_path / "in"), "--data", str(tmp_path)])
    for name in "01":
        features, coords = wsi_llava.read_features(tmp_path, name)
        assert features.shape == (0, 8) and coords.shape == (0, 2)


def test_a_folder_of_features_is_of_one_encoder(tmp_path):
    write_foreign(tmp_path / "uni" / "a.pt", GOOD_FOREIGN)
    write_foreign(tmp_path / "conch" / "a.pt", GOOD_FOREIGN | {"tile_embeds": torch.zeros(2, 9)})
    flags = ["--mpp", "0.25", "--data", str(tmp_path / "data"), "--features"]
    prepare.main([*flags, str(tmp_path / "uni")])
    with pytest.raises(UserError, match="no .pt or .h5 file there; name their folder"):
        prepare.main([*flags, str(tmp_path)])
    with pytest.raises(UserError, match="uni/a.pt and .*conch/a.pt have the same name; name one folder"):
        prepare.main([*flags, str(tmp_path / "uni"), str(tmp_path / "conch")])
    with pytest.raises(UserError, match="1 slide could not be prepared"):
        prepare.main([*flags, str(tmp_path / "conch")])
    message = prepare.read_failures(tmp_path / "data")["a"]
    assert "is of another tile encoder (imported: GigaPath) or um/px (0.5); name" in message


# ---- prepare.py: questions, the toy cohort ----


def read_texts(tmp_path, name, text):
    """A question file of this content -> its rows, their conversations as [text, text, ...]."""
    (tmp_path / name).write_bytes(text.encode())
    rows = prepare.read_qa(tmp_path / name)
    return [row | {"conversations": [turn["value"] for turn in row["conversations"]]} for row in rows]


def test_qa_in_both_shapes(tmp_path):
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A tumor."}]
    row = {"id": "T-1", "image": "TCGA-LUSC/T.1.pt", "conversations": talk}
    line = {"question_id": "Grade_T-1", "image": row["image"], "metadata": "Grade"}
    line |= {"question": "What is it?", "T-answer": "A tumor."}
    for name, content in (("1_Report_test.json", [row]), ("sample.jsonl", line)):
        (tmp_path / name).write_text(json.dumps(content))
    (first,) = prepare.read_qa(tmp_path / "1_Report_test.json")
    (second,) = prepare.read_qa(tmp_path / "sample.jsonl")
    want = {"id": "T-1", "slide": "T.1", "task": "Report", "cancer": "TCGA-LUSC", "conversations": talk}
    assert first == want and second == first | {"id": "Grade_T-1", "task": "Grade"}
    prepare.write_qa(tmp_path / "own.jsonl", [first, second])
    assert prepare.read_qa(tmp_path / "own.jsonl") == [first, second]


GOOD = json.dumps({"question_id": "1", "image": "a/b.pt", "question": "q", "T-answer": "a"}) + "\n"
MALFORMED = [
    ("", "empty"),
    (GOOD + "{oops\n", "line 2: Expecting .*; not JSON"),
    ('[\n{"id": 1},\n]', "line 3 .*; read are"),
    ('{"messages": [{"role": "user"}]}', r"line 1: its fields \(messages\) .* read are .*conversations"),
    (GOOD + '{"image": "x.pt", "question": "q", "T-answer": null}', "line 2: its t-answer is no text: null"),
    (GOOD + '{"image": "x.pt", "question": "q", "T-answer": "\\ud800"}', "line 2: .*surrogates not allowed"),
    ("slide,report\na.svs\n", "line 2: not as many columns"),
    ("Id,Question,Answer,split\n1,q,a,dev\n", "line 2: its split is 'dev', not train, val or test"),
    ('{"train": [], "info": 7}', "of no kind"),
    ('[{"id": 1, "image": "x", "conversations": [{"from": "gpt", "value": "a"}]}]', "item 1: its conv"),
    ("slide,question,answer,A,B\nx,Which?,C,a,b\n", "line 2: its answer is 'C', and it has no such option"),
    ("slide,question,answer,options\nx,Which?,B,a;b\n", "line 2: its options are neither a list"),
]


@pytest.mark.parametrize("text, message", MALFORMED)
def test_malformed_qa_names_the_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_texts(tmp_path, "qa.jsonl", text)


# Where options stand, what the answer is -> the options in the question, the answer
CLOSED = [
    ({"Choice": ["low", "High", "not given"], "answer": "high"}, "A) low\nB) High\nC) not given", "B) High"),
    ({"options": ["A) low", "B) high"], "answer": "B) high"}, "A) low\nB) high", "B) high"),
    ({"choices": {"A": "low", "B": "high"}, "answer": "(b)"}, "A) low\nB) high", "B) high"),
    ({"options": [0, 1, 2], "answer": 0}, "A) 0\nB) 1\nC) 2", "A) 0"),
    ({"options": ["None", "NA", None], "answer": "NA"}, "A) None\nB) NA", "B) NA"),
    ({"A": "Positive", "B": "Negative", "C": "", "answer": "A"}, "A) Positive\nB) Negative", "A) Positive"),
    ({"options": list("klmnopqrst"), "answer": "t"}, "\nJ) t", "J) t"),
    ({"question": "Which? A. low B. high", "answer": "B"}, "A. low B. high", "B"),
]


@pytest.mark.parametrize("entry, asked, told", CLOSED)
def test_options_of_closed_questions(tmp_path, entry, asked, told):
    entry = {"slide": "x", "question": "Which?"} | entry
    (row,) = read_texts(tmp_path, "q_test.json", json.dumps([entry]))
    assert row["conversations"][0].endswith(asked) and row["conversations"][1] == told


def test_question_files_of_the_field(tmp_path):
    """Each in the layout in which it is published."""
    wsi_vqa = [{"Id": "TCGA-A1", "Question": "what is the grade?", "Answer": "high"}]
    (row,) = read_texts(tmp_path, "WsiVQA_test.json", json.dumps(wsi_vqa))
    assert (row["id"], row["slide"], row["task"]) == ("WsiVQA_test-1", "TCGA-A1", "WsiVQA")

    header = "Slide,Tumor,Broad Category,Narrow Category,Question,A,B,C,D,Answer\r\n"
    line = 'TCGA-A1,BRCA,Microscopy,Grading,"Which, of ""these""?",I,II,III,IV,C\r\n'
    (row,) = read_texts(tmp_path, "SlideBench-VQA-TCGA.csv", "\ufeff" + header + line)
    assert (row["slide"], row["task"], row["cancer"]) == ("TCGA-A1", "Grading", "BRCA")
    assert row["conversations"] == ['<image>\nWhich, of "these"?\nA) I\nB) II\nC) III\nD) IV', "C) III"]

    talk = [{"from": "human", "value": "Why?\n<image>"}, {"from": "gpt", "value": "So."}]
    instruct = {"image": ["TCGA-A1.csv"], "conversations": talk}
    for name, text in (("caption.json", [instruct | {"id": "train::0"}]), ("caption_lines.json", instruct)):
        (row,) = read_texts(tmp_path, name, json.dumps(text))
        assert (row["slide"], row["task"]) == ("TCGA-A1", "Report")
        assert row["conversations"] == ["<image>\nWhy?", "So."]

    report = {"id": "TCGA-A1", "report": "A tumor.", "image_path": ["TCGA-A1.pt"], "split": "train"}
    reports = {"train": [report], "val": [], "test": [report | {"id": "TCGA-A2", "split": "test"}]}
    first, second = read_texts(tmp_path, "histgen.json", json.dumps(reports, indent=1))
    assert (first["slide"], first["split"]) == ("TCGA-A1", "train")
    assert (second["slide"], second["split"]) == ("TCGA-A2", "test")
    assert first["conversations"] == ["<image>\nWrite a report of this slide.", "A tumor."]
    (row,) = read_texts(tmp_path, "mine.csv", 'slide,report,age\ncase/7.NDPI,"Two\nlines.",51\n')
    assert row["slide"] == "7" and row["conversations"][1] == "Two\nlines." and wsi_llava.is_report(row)


def test_texts_ids_and_names_as_people_have_them(tmp_path, capsys):
    row = {"question_id": 7, "image": "C:\\slides\\c.OME.TIFF.h5", "question": "a\u2028b\u0085c"}
    row |= {"metadata": {"stain": "H&E"}, "task": ["a"]}  # passed over
    answers = ["yes", 5.5, "", math.nan, "nan"]
    lines = [json.dumps(row | {"T-answer": answer}, ensure_ascii=False) for answer in answers]
    lines.append(json.dumps(row | {"T-answer": "x", "image": ["a", "b"]}))
    first, second = read_texts(tmp_path, "q.jsonl", "\ufeff" + "\r\n".join(lines))
    assert (first["id"], first["slide"], first["task"]) == ("7", "c.OME", "q")
    assert first["conversations"] == ["<image>\na\u2028b\u0085c", "yes"]
    assert second["conversations"][1] == "5.5"
    left_out = "left out 4 rows of several slides or with an empty text: line 3, line 4, line 5, ..."
    assert left_out in capsys.readouterr().err


def test_questions_find_their_slides_by_the_beginning_of_a_name(capsys):
    have = {"TCGA-A1-A0SF-01Z-00-DX1.6", "TCGA-a1-A0SF-01Z-00-DX2.a", "TCGA-A1-A0SFX-1", "117", "1170", "9-a"}
    asked = ["tcga-a1-a0sf-01z-00-dx1", "TCGA-A1-A0SF", "117", "11", "9"]
    found = [row["slide"] for row in prepare.match_slides([{"slide": name} for name in asked], have)]
    assert found == ["TCGA-A1-A0SF-01Z-00-DX1.6", "TCGA-A1-A0SF-01Z-00-DX1.6", "117", "11", "9-a"]
    several = "TCGA-A1-A0SF is the beginning of 2 slides' names: took TCGA-A1-A0SF-01Z-00-DX1.6"
    assert several in capsys.readouterr().out


def write_reports(path, **reports):
    path.write_text("slide,report\n" + "".join(f"{slide},{text}\n" for slide, text in reports.items()))


def test_question_files_are_added_to_their_split(tmp_path, capsys):
    """Told by their names, --split, or their rows; other splits stay."""
    write_reports(tmp_path / "a.csv", s1="One.", s2="Two.")
    write_reports(tmp_path / "my-TEST.v2.csv", s2="Two.", s3="Three.")
    (tmp_path / "train_test.csv").write_text("nothing")
    (tmp_path / "visual_tokens").mkdir()
    (tmp_path / "visual_tokens" / "s1.safetensors").touch()
    reports = {"train": [{"id": "s7", "report": "x"}], "validation": [{"id": "s8", "report": "x"}]}
    (tmp_path / "latest.json").write_text(json.dumps(reports))

    def put(*flags):
        prepare.main(
            ["--data", str(tmp_path), "--qa", *(str(tmp_path / flag) for flag in flags[:1]), *flags[1:]]
        )
        files = [tmp_path / "qa" / f"{split}.jsonl" for split in ("train", "val", "test")]
        return [[row["slide"] for row in prepare.read_qa(file)] if file.exists() else [] for file in files]

    with pytest.raises(UserError, match="a.csv: its name does not tell the split; give --split"):
        put("a.csv")
    assert put("a.csv", "--split", "test") == [[], [], ["s1", "s2"]]
    assert "Wrote 2 questions about 2 slides to test.jsonl; 1 have no features." in capsys.readouterr().out
    assert put("my-TEST.v2.csv") == [[], [], ["s1", "s2", "s3"]]  # added, s2 once
    assert put("my-TEST.v2.csv", "--overwrite") == [[], [], ["s2", "s3"]]
    assert put("latest.json") == [["s7"], ["s8"], ["s2", "s3"]]
    with pytest.raises(UserError, match="train_test.csv: holds no questions"):  # before anything is written
        put("train_test.csv")
    assert put("latest.json") == [["s7"], ["s8"], ["s2", "s3"]]


def test_what_is_on_both_sides_of_training_and_test_is_said_and_left_out(tmp_path, capsys):
    """By slide, and by TCGA's barcode."""
    train = {"TCGA-A1-A0SF-01Z-00-DX1": "a", "TCGA-A1-A0SG-01Z-00-DX1": "b", "x1": "c", "y3": "e"}
    write_reports(tmp_path / "train.csv", **train)
    write_reports(tmp_path / "test.csv", **{"TCGA-A1-A0SF-01Z-00-DX2": "f", "x1": "g", "y2": "h"})
    common = ["--data", str(tmp_path), "--qa", str(tmp_path / "test.csv")]
    for flags, said in (
        ([str(tmp_path / "train.csv")], "2 questions of training about patients of the test (--drop-leaks"),
        (["--drop-leaks"], "2 questions of training about patients of the test (left out)"),
        ([], "0 questions of training"),
    ):
        prepare.main([*common, *flags])
        assert said in capsys.readouterr().out
    rows = prepare.read_qa(tmp_path / "qa" / "train.jsonl")
    assert [row["slide"] for row in rows] == ["TCGA-A1-A0SG-01Z-00-DX1", "y3"]
    assert len(prepare.read_qa(tmp_path / "qa" / "test.jsonl")) == 3


@pytest.mark.skipif(not (SHARED / "field").exists(), reason="needs the question files in ../shared/field")
def test_real_files_of_the_field_are_read():
    files = [path for path in (SHARED / "field").iterdir() if path.suffix in (".json", ".csv")]
    files.append(SHARED / "wsi_bench" / "test_sample.jsonl")
    counts = {path.name: len(prepare.read_qa(path)) for path in files}
    assert sorted(counts.values()) == [2, 2, 2, 3, 60, 237]
    rows = prepare.read_qa(SHARED / "field" / "wsi_vqa_sample.json")
    closed = [row["conversations"] for row in rows if "\nA) " in row["conversations"][0]["value"]]
    assert len(closed) == 32
    for asked, told in closed:
        assert sample.closed_parser(asked["value"], told["value"])(told["value"]) == told["value"][0]


def test_demo_cohort_is_balanced_and_disjoint():
    cases = prepare.invent_cases(60, 24, seed=0)
    assert len({case["slide"] for case in cases}) == len({case["seed"] for case in cases}) == 84
    test = [case for case in cases if case["split"] == "test"]
    for key, n in (("type", 6), ("grade", 8), ("position", 6), ("focus", 12)):
        assert set(collections.Counter(case[key] for case in test).values()) == {n}
    rows = prepare.write_questions(test[0], np.random.default_rng(0))
    answers = {row["task"]: row["conversations"][1]["value"] for row in rows}
    assert list(answers) == [*prepare.ASKED, "dialogue"]
    for key in ("type", "grade", "position"):
        assert test[0][key] in answers[key] and test[0][key] in answers["report"]


# ---- sample.py: conversations ----


def sample_with(demo, *arguments, data=None):
    sample.main(
        ["--data", str(data or demo[0] / "data"), "--out", str(demo[0] / "out"), *map(str, arguments)]
    )


@slow
def test_zero_shot_equals_stage_one(demo, capsys):
    """The probabilities are the softmax over what training would embed; equal texts are two lines."""
    texts = ["The tumor is an adenocarcinoma.", "squamous cell carcinoma", "mucin", "mucin"]
    sample_with(demo, "--slide", "demo_0015", "--zero-shot", *texts)
    found = sorted(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-len(texts) :])
    args = train.parse(["--data", str(demo[0] / "data"), "--out", str(demo[0] / "out")])
    wsi_llava.resolve_device(args)
    _, model, words, tokenizer = wsi_llava.load_alignment(args, wsi_llava.read_meta(args.data))
    features, coords = wsi_llava.read_features(args.data, "demo_0015")
    with torch.no_grad():
        slides = model.embed_slides(features.float(), coords, [len(coords)])
        embedded = model.embed_words([tokenizer.encode(text) for text in texts], words)
        want = (model.logit_scale.exp() * slides[0] @ embedded.T).softmax(-1).tolist()
    want = sorted([f"{share:.4f}", text] for share, text in zip(want, texts))
    assert [text for _, text in found] == [text for _, text in want]
    assert [float(p) for p, _ in found] == pytest.approx([float(p) for p, _ in want], abs=2e-4)


def test_chat_continues_as_if_read_anew(tiny, tokenizer):
    """The second turn from the kept cache is the answer that the whole dialogue as a prompt gets."""
    visual = torch.randn(9, 128)
    chat = sample.Chat(tiny, tokenizer, visual, max_new_tokens=6)
    "".join(chat.reply("Which type of tumor is this?"))
    seen = list(chat.tail)
    second = "".join(chat.reply("What is its grade?"))
    first, _ = tokenizer.encode_chat(TALK[:1])
    said = [t for (t,) in tiny.generate(visual[None], [first], 6)]
    end = [tokenizer.eos] * (said[-1] != tokenizer.eos)
    ids = first + said + end + tokenizer.encode("USER: What is its grade? ASSISTANT:")
    assert seen[0] == said[-1]
    again = [t for (t,) in tiny.generate(visual[None], [ids], 6)]
    assert second == tokenizer.decode([t for t in again if t != tokenizer.eos])


def test_a_chat_ends_with_its_input(tiny, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is its grade?\n\nWhat is its grade?"))
    said = sample.talk(sample.Chat(tiny, tokenizer, torch.randn(9, 128), max_new_tokens=5))
    out = capsys.readouterr().out
    assert out.count(" s)\n") == 2 and said in out


@slow
def test_a_raw_slide_is_prepared_first(demo, toy_slide, tmp_path, capsys):
    """With nothing in data/ yet, and only the demo's models at hand."""
    flags = ["--llm", demo[0] / "data" / "llm", "--max-new-tokens", 3, "--heatmap", tmp_path / "map.png"]
    sample_with(demo, "--slide", toy_slide[0], "--ask", "Which type?\n<image>", *flags, data=tmp_path / "new")
    printed = capsys.readouterr().out
    assert "toy: 36 visual tokens" in printed and "Wrote " in printed
    assert Image.open(tmp_path / "map.png").width > 1000


# ---- sample.py: many questions ----


def test_batched_answers_equal_single_ones(tiny, tokenizer, monkeypatch):
    """Also where the keys and values of all of them have no room."""
    rows = [{"slide": s, "conversations": TALK[i : i + 1]} for s in "ab" for i in (0, 0)]
    rows[1] = {"slide": "a", "conversations": [{"from": "human", "value": "<image>\nWhat is its grade?"}]}
    visual = {"a": torch.randn(9, 128), "b": torch.randn(9, 128)}
    single = [sample.answer_rows(tiny, tokenizer, [row], visual, max_new_tokens=8)[0] for row in rows]
    for room in (8192, 0):
        monkeypatch.setattr(sample, "ROOM", room)
        assert sample.answer_rows(tiny, tokenizer, rows, visual, max_new_tokens=8) == single
    assert len(set(single)) > 1


def test_a_raw_question_file_finds_its_slides_and_asks_no_training_question(tmp_path):
    (tmp_path / "features").mkdir()
    for name in ("TCGA-AA-0001-01Z", "TCGA-AA-0001-02Z", "TCGA-BB-0002-01Z"):
        (tmp_path / "features" / f"{name}.safetensors").touch()
    row = {"slide": "TCGA-AA-0001", "task": "t", "cancer": "c", "conversations": TALK[:2]}
    rows = [row | {"id": "1", "split": "train"}, row | {"id": "2", "split": "test"}]
    rows.append(row | {"id": "3", "slide": "TCGA-BB-0002"})
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    found = sample.read_questions([tmp_path / "qa.json"], tmp_path)
    assert [row["slide"] for row in found] == ["TCGA-AA-0001-01Z", "TCGA-BB-0002-01Z"]
    assert [row["id"] for row in found] == ["2", "3"] and "split" not in found[0]
    (tmp_path / "qa.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(UserError, match="qa.json: only questions for training"):
        sample.read_questions([tmp_path / "qa.json"], tmp_path)


@slow
def test_a_file_of_questions_is_answered_as_one_by_one(demo, tmp_path, capsys):
    """Grouped, with baselines, cut short by a kill and resumed; a slide that is damaged or not there costs its own
    questions, which are answered when it is."""
    data, path = shutil.copytree(demo[0] / "data", tmp_path / "data"), tmp_path / "predictions.jsonl"
    rows = prepare.read_qa(data / "qa" / "test.jsonl")
    n = sum(len(row["conversations"]) // 2 for row in rows)
    far = {"id": "far-1", "slide": "far", "task": "Grading", "cancer": "demo", "conversations": TALK[:2]}
    long = {**rows[0], "id": "long", "conversations": [{"from": "human", "value": "word " * 600}, TALK[1]]}
    prepare.write_qa(tmp_path / "qa.jsonl", [*rows, far, far | {"slide": "cut"}, long])
    (data / "features" / "cut.safetensors").write_bytes(b"half")
    flags = ["--qa", tmp_path / "qa.jsonl", "--predictions", path, "--max-new-tokens", 6, "--baselines"]

    def answers_of():
        sample_with(demo, *flags, "--evaluate", data=data)
        lines = map(json.loads, path.read_text().splitlines()[1:])
        return {row["n"]: row for row in lines}, capsys.readouterr().out

    answers, printed = answers_of()
    assert f"{n + 3} questions about 5 slides, {n} to ask" in printed and "; 1 too long" in printed
    assert "about far: " in printed and "far.safetensors: no such" in printed
    assert "cut.safetensors: " in printed and sorted(answers) == list(range(n))
    args = sample.parse(["--data", str(data), "--out", str(demo[0] / "out")])
    wsi_llava.resolve_device(args)
    model, tokenizer = sample.load_model(args)
    slides = sorted({row["slide"] for row in rows})
    visual = {s: wsi_llava.read_visual_tokens(data, s, model.cfg) for s in slides}
    questions = sample.read_questions([tmp_path / "qa.jsonl"], data)
    assert [row["turn"] for row in questions if row["task"] == "dialogue"] == [0, 1, 2] * 3
    for row in questions[:n]:
        got = answers[row["n"]]
        assert got["answer"] == sample.answer_rows(model, tokenizer, [row], visual, 6)[0]
        assert got["answer_no_image"] == sample.answer_rows(model, tokenizer, [row], None, 6)[0]
        others = [visual[s] for s in slides if s != row["slide"]]
        others = [sample.answer_rows(model, tokenizer, [row], {row["slide"]: x}, 6)[0] for x in others]
        assert got["answer_shuffled"] in others
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])  # in the middle of a line
    shutil.copy(data / "features" / "demo_0000.safetensors", data / "features" / "far.safetensors")
    again, printed = answers_of()
    assert f"answers {n + 1} of {n + 3} questions" in printed and sorted(again) == list(range(n + 1))
    assert all(again[n]["answer"] == answers[n]["answer"] for n in answers)
    with pytest.raises(UserError, match="was made with max_tiles 0, not 4; name another --predictions"):
        sample_with(demo, *flags, "--max-tiles", 4, data=data)
    path.write_text('{"my": "data"}\n')
    with pytest.raises(UserError, match="predictions.jsonl: lacks 'settings'; not what"):
        sample_with(demo, *flags, data=data)


# ---- sample.py: closed answers and text metrics ----

OPTIONS = (
    "Which? A) Adenocarcinoma B) Squamous cell carcinoma C. Mucinous adenocarcinoma (D) Small cell carcinoma"
)
CLOSED = {  # what is chosen of them: by which answers
    "B": """B|B)|(b)|b.|**B**|'B'|B:|"B"|[B]|B、|B. Squamous cell carcinoma|The answer is B.|Answer: (b) squamous
The answer is B because option A lacks glands.|It is B, not A.|B is likelier than A|It is not A but B.
Adenocarcinoma is unlikely; this is squamous cell carcinoma.|A can be excluded, so B|Between A and B, I choose B.
There is no doubt that it is B|squamous cell carcinoma (B)|B shows sheets not seen in A|A is very unlikely, so B
A is the wrong choice. B.|A is a false lead; B|A could not be confirmed; so B""",
    "C": """It is mucinous adenocarcinoma.|I choose C because of the mucin|The correct option is C, I think.|choice C""",
    "A": "adenocarcinoma|A|The answer is A because of glands",
    None: """|B or C|A and B|The answer is a tumor.|A tumor of unknown origin|None of these|yes|It is not A.|A, B and C
It is neither A nor B.|neither A, B nor C|The answer is A or B|A / B|Option A lacks glands, option B fits
It isn't squamous cell carcinoma|The answer is not B""",
}


def test_closed_answers_are_read():
    options = sample.choices(OPTIONS)
    assert options["B"] == "Squamous cell carcinoma" and list(options) == list("ABCD")
    assert list(sample.choices(" ".join(f"{x}) {x}{x}" for x in "ABCDEFGHI"))) == list("ABCDEFGH")
    for none in ("Is protein A. present or not?", "What is it? B) a tumor A) necrosis"):
        assert sample.choices(none) == {}
    for want, texts in CLOSED.items():
        texts = re.split(r"[|\n]", texts)
        assert {text: sample.parse_choice(text, options) for text in texts} == dict.fromkeys(texts, want)
    for want, texts in {
        "yes": ["Yes", "yes, it is.", "TRUE", "The answer is yes"],
        "no": ["No.", "no", "False, since", "Answer: No"],
        None: ["There is no doubt", "No doubt, yes", "Yes or no?"],
    }.items():
        assert [sample.parse_yes_no(text) for text in texts] == [want] * len(texts)
    assert sample.closed_parser("Is the prognosis poor?", "No")("no way") == "no"
    # Open: more than a word
    assert sample.closed_parser("Is there necrosis?", "Yes, there is necrosis.") is None


@pytest.mark.parametrize(
    "style", ["a) {} b) {}", "[A] {} [B] {}", "A - {} B - {}", "1) {} 2) {}", "A、{} B、{}", "1. {} 2. {}"]
)
def test_options_in_any_style_are_read(style):
    options = sample.choices("Which one? " + style.format("Glands", "Sheets"))
    assert list(options.values()) == ["Glands", "Sheets"]
    second = list(options)[1]
    for form in ("{}", "{})", "The answer is {}.", "sheets", "{}. Sheets", f"({second.lower()})"):
        assert sample.parse_choice(form.format(second), options) == second, form
    assert sample.parse_choice("It has 2 nuclei, a tumor", options) is None


@pytest.mark.skipif(not (SHARED / "wsi_bench").exists(), reason="needs the questions in ../shared/wsi_bench")
def test_every_closed_truth_of_the_benchmark_is_read():
    for file in sorted((SHARED / "wsi_bench").glob("*.json*")):
        for row in sample.read_questions([file], SHARED):
            parser = sample.closed_parser(row["question"], row["truth"])
            closed = any(kind in file.name for kind in ("choice", "TF"))
            assert bool(parser) == closed, (file, row["question"])
            assert not parser or parser(row["truth"]) in ("A", "B", "C", "D", "yes", "no")
            assert row["task"].split("_")[0] in ("Report", *sample.CAPABILITY), row["task"]


def check_metrics(references, candidates):
    """Against nltk and the rouge package, on the same tokens."""
    nltk, rouge = pytest.importorskip("nltk.translate.bleu_score"), pytest.importorskip("rouge").Rouge()
    smooth = nltk.SmoothingFunction().method4
    for reference, candidate in zip(references, candidates):
        r, c = sample.tokenize(reference), sample.tokenize(candidate)
        weights = [(1 / n,) * n + (0,) * (4 - n) for n in range(1, 5)]
        bleu = [nltk.sentence_bleu([r], c, weight, smoothing_function=smooth) for weight in weights]
        assert sample.bleu(r, c) == pytest.approx(bleu, abs=1e-6)
        theirs = rouge.get_scores(" ".join(c), " ".join(r))[0]["rouge-l"]["f"]
        assert sample.rouge_l(r, c) == pytest.approx(theirs, abs=1e-6)


SENTENCES = """The tumor is an adenocarcinoma. It is grade 2.
No necrosis.
Tumor
The tumor is an adenocarcinoma of grade 2, with necrosis (about 3.5 mm) and a focus of pigment. No invasion is seen.
the tumor the tumor the tumor. tumor cells
Glands, e.g. cribriform ones... T2 N0 M0.""".splitlines()


def test_text_metrics_equal_the_packages():
    check_metrics(*zip(*[(a, b) for a in SENTENCES for b in SENTENCES]))


def test_text_metrics_at_their_ends():
    tokens = sample.tokenize("Tumor cells, grade 3+4=7; Barrett's 3.5 cm.")
    assert tokens == ["Tumor", "cells", ",", "grade", "3+4=7", ";", "Barrett", "'s", "3.5", "cm", "."]
    assert sample.bleu(tokens, ["none"]) == [0] * 4
    assert sample.rouge_l(tokens, ["none"]) == sample.rouge_l(tokens, []) == 0


@slow
@pytest.mark.skipif(not (SHARED / "wsi_bench").exists(), reason="needs the reports in ../shared/wsi_bench")
def test_text_metrics_equal_the_packages_on_real_reports():
    reports = [
        row["truth"] for row in sample.read_questions([SHARED / "wsi_bench" / "1_Report_test.json"], SHARED)
    ]
    check_metrics(reports, reports[1:] + [" ".join(reports[0].split()[:7])])
    treebank = pytest.importorskip("nltk.tokenize").NLTKWordTokenizer()
    same = [
        treebank.tokenize(s) == sample.tokenize(s) for r in reports for s in re.split(r"(?<=[.?!])\s+", r)
    ]
    assert np.mean(same) > 0.99


# ---- sample.py: the judge ----


def said(content, finish="stop", **message):
    """A reply of a judge's server: status, headers, text."""
    choice = {"message": {"content": content, **message}, "finish_reason": finish}
    return 200, {}, json.dumps({"choices": [choice]})


def graded(body):
    """What a good judge says: sentences are claims; the score is 0.7 where a claim is about a grade, else 1."""
    content = json.loads(body["messages"][1]["content"])
    if "claims" in content:
        return said(json.dumps({"scores": [0.7 if "grade" in claim else 1 for claim in content["claims"]]}))
    return said(json.dumps({"claims": content["answer"].split(". ")}))


@pytest.fixture
def judge_server(monkeypatch):
    """A judge on loopback: server.script holds what it says first; then server.rule(request) says it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append((self.headers["Authorization"], self.path, body))
                step = server.script.pop(0) if server.script else None
            status, headers, text = step or server.rule(body)
            with contextlib.suppress(OSError):  # the client has given up
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(sample, "BACKOFF", 0.001)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.requests, server.script, server.rule = threading.Lock(), [], [], graded
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def write_predictions(folder, rows, **more):
    """Rows (task, question, truth, answer) -> a file of predictions; a slide for every two of them."""
    path, lines = folder / "predictions.jsonl", [{"settings": {}}]
    for n, row in enumerate(rows):
        known = {"n": n, "id": f"q{n}", "slide": f"s{n // 2}", "cancer": "rare" if n > 5 else "common"}
        known |= zip(("task", "question", "truth", "answer"), row)
        lines.append(known | {name: values[n] for name, values in more.items()})
    prepare.write_qa(path, lines)
    return path


def judged(server, path, *flags):
    """--evaluate with the server as the judge."""
    asked = ["--evaluate", path, "--data", path.parent, "--judge-model", "wise", "--judge-url", server.url]
    sample.main([*map(str, asked), *flags])


def table_of(folder):
    """evaluation.csv's lines, {(kind or group, metric): {column: number}}."""
    with open(folder / "evaluation.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        kind = line["kind"], line["group"], line["metric"]
        line |= {name: float(value) for name, value in line.items() if value and value not in kind}
    return {(name, line["metric"]): line for line in lines for name in (line["kind"], line["group"])}


OPEN = [("open", f"What is it, {n}?", f"Tumor {n}. Its grade is 2.", f"The tumor {n}") for n in range(8)]
MEANS = {"WSI-Precision": 0.85, "WSI-Relevance": 1.0}


def means_of(folder):
    return {metric: pytest.approx(table_of(folder)["all", metric]["model"]) for metric in sample.JUDGED}


def test_what_may_pass_is_tried_again_and_what_is_unusable_asked_again(judge_server, tmp_path, capsys):
    """And no usable reply is paid for twice, also where a kill cut the last one."""
    path = write_predictions(tmp_path, OPEN)
    judge_server.script += [(429, {"Retry-After": "0"}, ""), (500, {}, "busy"), (200, {}, '{"half')]
    judge_server.script += [said("I think so."), said('{"claims": "text"}'), said('{"claims": ["...", "a"]}')]
    judged(judge_server, path)
    printed = capsys.readouterr().out
    assert means_of(tmp_path) == MEANS and "; 0 unusable grades are counted as 0." in printed
    assert "8 open questions, 1 system: up to 32 calls of wise." in printed
    assert len(judge_server.requests) == 32 + 6
    told = str([body["messages"][-1] for _, _, body in judge_server.requests if len(body["messages"]) > 2])
    assert 'no list "claims" of 1' in told and "no JSON" in told
    with open(tmp_path / "judge.jsonl", "r+") as file:
        file.truncate(len(file.read()) - 9)  # in the middle of the last line
    judged(judge_server, path)
    assert len(judge_server.requests) == 32 + 6 + 1 and means_of(tmp_path) == MEANS


@pytest.mark.parametrize("claims, scores", [
    (said('<think>{"claims": ["..."]} is asked for</think>{"claims": ["a", "b"]}'), said('{"scores": [1, 0]} {so}')),
    (said('{"claims": ["x"]}\n```json\n{"claims": ["a", "b"]}\n```'), said('{"scores": ["1", "0.0"]}', finish=None)),
    (said('{"claims": ["a", "b"]}', reasoning_content="Hm."), said('so </think> {"scores": [1, 0]}', "eos_token")),
])  # fmt: skip
def test_a_usable_reply_is_read_however_it_is_wrapped(judge_server, tmp_path, claims, scores):
    judge_server.script += [claims, scores]
    judge = sample.Judge(judge_server.url, "wise", tmp_path / "judge.jsonl")
    assert judge.score("WSI-Precision", "What?", "This.", "That.") == 0.5 and len(judge_server.requests) == 2


EXAMPLE = '{"scores": [1, 0.3]}'


@pytest.mark.parametrize("reply, asked, reason", [
    (said(None, reasoning_content=EXAMPLE), 2, "no whole reply"),
    (said(f"<think>They want {EXAMPLE}"), 2, "no whole reply"),
    (said(EXAMPLE, "length"), 2, "no whole reply (finish_reason length"),
    (said(EXAMPLE, refusal="I do not grade."), 2, "I do not grade."),
    (said(sample.SILENT), 4, "unusable"),
    (said('{"scores": [1]}'), 4, 'unusable (no list "scores" of 2, as asked for)'),
    (said('{"scores": [0.5, 1]}'), 4, "unusable"),
    (said('{"scores": [true, 1]}'), 4, "unusable"),
    (said('{"scores": [null, 1]}'), 4, "unusable"),
    (said('{"a":' * 100_000), 4, "unusable"),
    ((400, {}, '{"error": {"message": "the prompt has a bad word"}}'), 1, "HTTP 400: "),
])  # fmt: skip
def test_no_grade_is_made_up(judge_server, tmp_path, reply, asked, reason):
    """Out of reasoning, of what was cut or refused, of our own prompt, of another form; and none of it is kept."""
    judge_server.script += [said('{"claims": ["a", "b"]}'), *[reply] * 4]
    judge = sample.Judge(judge_server.url, "wise", tmp_path / "judge.jsonl")
    assert judge.score("WSI-Precision", "What?", "This.", "That.") is None
    assert len(judge_server.requests) == 1 + asked and reason in next(iter(judge.problems))
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 1


def test_a_grade_that_a_question_lacks_counts_as_0_and_is_counted(judge_server, tmp_path, capsys):
    path = write_predictions(tmp_path, OPEN)
    judge_server.rule = lambda body: said("?") if "The tumor 3" in str(body) else graded(body)
    judged(judge_server, path)
    assert means_of(tmp_path) == {name: mean * 7 / 8 for name, mean in MEANS.items()}
    note = "2 unusable grades are counted as 0; 2 times unusable (it holds no JSON)."
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("reply, message", [
    ((429, {"Retry-After": "0"}, '{"error": {"message": "quota used up"}}'), "HTTP 429: .*quota used up.*goes on"),
    ((503, {}, "<style>p {}</style><p>Down for repairs"), "HTTP 503: .*Down for repairs; run the same command again"),
    ((402, {}, "no credit"), "HTTP 402: no credit; check it"),
    ((401, {}, "who are you, sk-0123456789"), r"HTTP 401: who are you, \*\*\*; check it, --judge-model, OPENAI"),
    ((307, {"Location": "http://127.0.0.2:1/"}, ""), "HTTP 307: .*check it"),
    ((400, {}, "credit balance too low"), "HTTP 400: credit balance too low"),
    ((200, {}, "<html><p>Log in first"), r"no answer \(JSONDecodeError\): <html><p>Log in first; run the same"),
    ((200, {}, '{"error": {"message": "overloaded"}}'), "no answer .KeyError.*overloaded"),
    (said(None, reasoning_content=EXAMPLE), "no whole reply"),
    ((429, {"Retry-After": "86400"}, ""), "in 86,400 s or later"),
])  # fmt: skip
def test_a_judge_that_does_not_answer_ends_the_run_without_a_table(
    judge_server, tmp_path, monkeypatch, reply, message
):
    """In one line; also after some grades, which are kept."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    path = write_predictions(tmp_path, OPEN * 3)
    judge_server.rule = lambda body: reply
    for first in (0, 20):
        judge_server.script += [said('{"claims": ["a"]}')] * first
        with pytest.raises(UserError, match=f"--judge-url {judge_server.url}: .*{message}") as caught:
            judged(judge_server, path)
        assert "\n" not in str(caught.value) and not (tmp_path / "evaluation.md").exists()
    assert judge_server.requests[0][0] == "Bearer sk-0123456789"


@pytest.mark.parametrize("status, words, unwanted", [
    (400, "Unsupported parameter: 'max_tokens'", ["max_tokens"]),
    (422, '{"detail": [{"loc": ["body", "temperature"]}]}', ["temperature"]),
    (400, "maximum context length is 2048 tokens, you requested 4096 in the completion", ["max_tokens"]),
    (400, "temperature and max_tokens are not known", ["max_tokens", "temperature"]),
])  # fmt: skip
def test_options_that_a_server_refuses_are_dropped_for_all_that_ask_at_once(
    judge_server, tmp_path, status, words, unwanted
):
    path, together = write_predictions(tmp_path, OPEN * 2), threading.Barrier(sample.AT_ONCE)

    def rule(body):
        if not any(name in body for name in unwanted):
            return graded(body)
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.5)
        return status, {}, words

    judge_server.rule = rule
    judged(judge_server, path)
    assert means_of(tmp_path) == MEANS
    assert {"temperature", "max_tokens"} - judge_server.requests[-1][2].keys() == set(unwanted)


def test_a_server_says_when_to_ask_again():
    """As a number or a date; what it says otherwise is not heard."""
    later = email.utils.formatdate(time.time() + 3600, usegmt=True)
    assert 3500 <= sample.retry_after(later, 3) <= 3600
    assert sample.retry_after("Wed, 21 Oct 2015 07:28:00 GMT", 3) == 0 and sample.retry_after("1.5", 3) == 1.5
    assert [sample.retry_after(told, 3) for told in ("soon", "nan", "-1", "", None)] == [3] * 5


def test_the_authors_protocol_differs_in_its_rules(judge_server, tmp_path, capsys):
    """No question for the truth's claims; claims that the truth does not address left out; what is unusable too."""
    path = write_predictions(tmp_path, [("open", "What is it?", "A tumor.", f"Tumor {i}") for i in range(2)])

    def rule(body):
        content = json.loads(body["messages"][1]["content"])
        if "claims" not in content:
            return said('{"claims": ["this", "that"]}')
        if "Tumor 1" in content["text"]:
            return said("?")
        return said('{"scores": [1, null]}' if "null" in str(body) else EXAMPLE)

    judge_server.rule = rule
    judged(judge_server, path, "--judge-protocol", "authors")
    assert means_of(tmp_path) == {"WSI-Precision": 0.65, "WSI-Relevance": 1}
    contents = [json.loads(body["messages"][1]["content"]) for _, _, body in judge_server.requests]
    assert all(("question" in x) == (x.get("answer") != "A tumor.") for x in contents)
    printed = capsys.readouterr().out
    assert "protocol authors; 1 unusable grades are left out; 1 times" in printed


def test_nothing_claimed_is_not_relevant_and_an_empty_answer_is_not_sent(judge_server, tmp_path):
    judge = sample.Judge(judge_server.url, "wise", tmp_path / "judge.jsonl")
    judge_server.script += [said('{"claims": []}')]
    assert judge.score("WSI-Relevance", "What?", "A tumor.", "I cannot tell.") == 0
    assert judge.score("WSI-Relevance", "What?", "A tumor.", " ") == 0 and len(judge_server.requests) == 1


def test_urls_and_keys_are_checked_before_anything_is_sent(tmp_path, monkeypatch):
    for url in ("http://", "https://a b/v1", "https://me@host/v1", "host:1", "file:///etc/passwd"):
        with pytest.raises(UserError, match="not a URL like https://api.openai.com/v1"):
            sample.Judge(url, "wise", tmp_path / "judge.jsonl")
    monkeypatch.setenv("OPENAI_API_KEY", "sec\nret")
    with pytest.raises(UserError, match="OPENAI_API_KEY: not a key"):
        sample.Judge("https://judge.example/v1", "wise", tmp_path / "judge.jsonl")


def test_ctrl_c_leaves_what_waits_for_the_judge_unasked(tmp_path):
    asked, judge = [], sample.Judge("http://localhost", "wise", tmp_path / "judge.jsonl")

    def score(*question):
        asked.append(question)
        time.sleep(0.01)
        raise KeyboardInterrupt

    judge.score = score
    with pytest.raises(KeyboardInterrupt):
        sample.grade(judge, [{"question": "What?", "truth": "That."}] * 200, {"model": ["This."] * 200}, [])
    assert len(asked) < 100


# ---- sample.py: the tables ----


def evaluated(*paths):
    sample.main(["--evaluate", *map(str, paths), "--data", str(paths[0].parent)])


def test_the_tables_count_what_is_missing_and_unreadable(tmp_path, capsys):
    said = ("B)", "squamous cell carcinoma", "<think>B, or A?</think>Adenocarcinoma", "Who knows")
    rows = [("Staging_choice", OPTIONS, "B", answer) for answer in said]
    rows += [("Prognosis_TF_question", "Is it poor?", "No", "no.")]
    rows += [("Report", "Describe it.", "A tumor of grade 2.", "A tumor of grade 2.")]
    rows += [("Report", "Describe it.", "A tumor.", None), ("Grading", "Which grade?", "Grade 2.", "grade 2")]
    path = write_predictions(tmp_path, rows, answer_no_image=["A", "A", "B", "B", "yes", "", None, "grade 3"])
    path.write_text(path.read_text().rstrip("\n"))  # a whole last row is one without its line end
    evaluated(path)
    printed, table = capsys.readouterr().out, table_of(tmp_path)
    choice, report = table["Staging_choice", "accuracy"], table["report", "BLEU-4"]
    assert (choice["questions"], choice["model"], choice["no slide"], choice["no slide - model"]) == (
        4,
        0.5,
        0.5,
        0,
    )
    assert choice["model low"] <= 0.5 <= choice["model high"]
    assert (report["questions"], report["model"], report["no slide"]) == (1, pytest.approx(1), 0)
    published = table["diagnosis", "accuracy"]["published"], table["treatment", "accuracy"]["published"]
    assert published == (0.863, 1.0) and table["Grading", "exact match"]["no slide - model"] == -1
    for note in (
        "7 of 8 questions answered by all: the means are of these",
        "model: 1 closed answer name no option, or several: wrong; the first: 'Who knows'",
    ):
        assert note in printed and note in (tmp_path / "evaluation.md").read_text()
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert rows[2:] == ["all", "all", "Grading", "Prognosis_TF_question", "Report", "Staging_choice"]
    assert {kind for kind, _ in table} >= {"all", "capability", "task", "cancer type", "common", "rare"}


@pytest.mark.parametrize("n", [1, 9])
def test_one_table_fits_the_screen(tmp_path, capsys, n):
    """However many systems there are, and however they are called."""
    rows = [(f"Regional_Structure_Description_{task}", "What?", "This.", "This.") for task in range(3)]
    first = write_predictions(tmp_path, rows)
    more = [tmp_path / f"{'long' * 20}_{i}.jsonl" for i in range(n)]
    for path in more:
        shutil.copy(first, path)
    evaluated(first, *more)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 1 + 3 and max(map(len, table)) <= 160
    names = [name for name in table[0].split("|") if "long" in name]
    assert len(set(names)) == len(names) == min(n, 3)
    assert len([name for name in table_of(tmp_path)["all", "exact match"] if "long_" in name]) == 6 * n


def test_intervals_and_rank_correlations():
    graded = {x: np.array([2.0, 1, 4, 3, 5, 5, np.nan]) for x in sample.JUDGED}
    graded |= {x: np.array([1.0, 4, 9, 16, 25, 25, 1]) for x in sample.TEXTUAL}
    # Pearson's of the ranks 2 1 4 3 5.5 5.5 and 1 2 3 4 5.5 5.5
    assert "ROUGE-L with WSI-Precision 0.88" in sample.correlations(graded)
    values = np.random.default_rng(0).random(400)
    mean, low, high = sample.interval(values, np.arange(400), 0)
    error = values.std() / 20
    assert mean == pytest.approx(values.mean()) and high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    # Four questions that a slide decides are no more than one; what is not a number is left out.
    repeated = np.append(np.repeat(values, 4), np.nan), np.append(np.repeat(np.arange(400), 4), 400)
    assert sample.interval(*repeated, 0) == pytest.approx([mean, low, high])


ASKED = [("Grading", f"Which grade, {n}?", "Grade 2.", "Grade 2.") for n in range(6)]


@pytest.mark.parametrize("column", ["prediction", "output", "generated_text"])
def test_the_truth_is_not_taken_for_the_prediction(tmp_path, capsys, column):
    """Where another column holds what a system said, "answer" is the truth: also in a row that lacks the other."""
    ours, path = write_predictions(tmp_path, ASKED), tmp_path / "theirs.jsonl"
    rows = [{"question_id": f"q{n}", "Answer": "Grade 2.", column: "Grade 3."} for n in range(6)]
    del rows[5][column]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated(ours, path)
    line, printed = table_of(tmp_path)["all", "exact match"], capsys.readouterr().out
    assert (line["questions"], line["predictions"], line["theirs"]) == (5, 1, 0)
    assert f"took question_id for the id, {column} for the answer, answer for the truth" in printed


THEIRS = "id,prediction,seconds\nq0,Grade 2.,1\nq1,Grade 3.,2\n"


@pytest.mark.parametrize("name, text", [
    ("a.txt", THEIRS.replace(",", ";")),
    ("a.tsv", THEIRS.replace(",", "\t")),
    ("a.json", '{"test": [{"id": "q0", "prediction": "Grade 2."},\n{"id": "q1", "prediction": "Grade 3."}]}'),
])  # fmt: skip
def test_predictions_are_read_in_any_shape(tmp_path, name, text):
    ours, path = write_predictions(tmp_path, ASKED), tmp_path / name
    path.write_text(text)
    _, systems, notes = sample.read_systems([ours, path])
    assert systems["a"] == ["Grade 2.", "Grade 3."] and "id for the id, prediction for the answer" in str(
        notes
    )


@pytest.mark.parametrize("text, message", [
    ("id,prediction\nq0,a\nq1,b,c\n", "a.csv, line 3: not as many columns as in line 1"),
    ("id,said\nq0,a\n", "a.csv: no answers among id, said"),
    ("id,answer\nx0,a\nx1,b\n", "a.csv: took id for the id, .*; 2 rows match no question, or .*; the first: x0"),
    ('[{"id": "q0", "answer": ["a", "b"]}]', "a.csv: its answer is no text"),
    ('{"q0": "a", "q1": "b"}', "a.csv: no answers among q0, q1"),
])  # fmt: skip
def test_predictions_that_cannot_be_read_say_what_was_found(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        evaluated(write_predictions(tmp_path, ASKED), tmp_path / "a.csv")


@pytest.mark.parametrize("theirs, right, note", [
    # By id and question, by slide and question, by id alone.
    ([{"id": "q0", "question": "<image>\nwhich grade,  0?"}, {"slide": "T/s1.svs", "question": "Which grade, 2?"}], [0, 2], ""),
    ([{"question_id": "q3", "prompt": "Which grade, 3? Answer briefly."}], [3], ""),
    # A key that fits several fits nothing; the same row does not answer two questions.
    ([{"id": "q0"}, {"slide": "s0"}, {"question": "Which grade, 1?"}], [0], "2 rows match no question"),
    ([{"id": "q1", "question": "Else?"}, {"id": "q1", "question": "What?"}, {"id": "q0"}], [0], "2 rows match no"),
    ([{"id": "q4", "slide": "s0", "question": "Which grade, 0?"}], [0], ""),
    ([{"id": "q0"}, {"id": "q0"}, {"id": "q1"}], [1], "2 rows match no question, or not one alone; the first: q0"),
])  # fmt: skip
def test_answers_go_to_the_one_question_that_they_fit(tmp_path, theirs, right, note):
    ours, path = write_predictions(tmp_path, ASKED), tmp_path / "a.json"
    path.write_text(json.dumps([row | {"text": "Grade 2."} for row in theirs]))
    rows, systems, notes = sample.read_systems([ours, path])
    assert [row["id"] for row in rows] == [f"q{n}" for n in right] and systems["a"] == ["Grade 2."] * len(
        right
    )
    assert note in " ".join(notes)


def test_the_first_files_rows_are_its_own_also_twice(tmp_path):
    ours = write_predictions(tmp_path, ASKED[:1] * 4)
    ours.write_text(re.sub(r'"id": "q\d", "slide": "s\d"', '"id": "same", "slide": "s"', ours.read_text()))
    rows, systems, _ = sample.read_systems([ours])
    assert len(rows) == 4 and list(systems) == ["model"]


@pytest.mark.parametrize("name", ["majority", "no slide", "published", "a - b", "a, no slide"])
def test_a_file_called_like_a_column_gets_its_path_as_its_name(tmp_path, name):
    (tmp_path / "x").mkdir()
    ours = write_predictions(tmp_path, ASKED)
    paths = [ours, tmp_path / f"{name}.jsonl", tmp_path / "x" / "predictions.jsonl"]
    for path in paths[1:]:
        shutil.copy(ours, path)
    assert list(sample.read_systems(paths)[1]) == list(map(str, paths))


def test_majority_is_one_more_system_and_cells_are_no_formulas(tmp_path):
    """Its answers are training's; a cancer type stands beside its number of training slides."""
    rows = [("Staging_choice", f"{OPTIONS} ({n})", "B", "B" if n < 10 else "A") for n in range(14)]
    ours, path = write_predictions(tmp_path, rows), tmp_path / "=1+1.csv"
    path.write_text("id,answer\n" + "".join(f"q{n},It is B.\n" for n in range(13)))
    (tmp_path / "qa").mkdir()
    talk = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "B"}]
    train = {"task": "Staging_choice", "cancer": "rare", "id": "1", "conversations": talk}
    prepare.write_qa(tmp_path / "qa" / "train.jsonl", [train | {"slide": f"t{i}"} for i in range(3)])
    evaluated(ours, path)
    table = table_of(tmp_path)
    line = table["all", "accuracy"]
    means = [
        line[name] for name in ("questions", "predictions", "'=1+1", "majority", "majority - predictions")
    ]
    assert means == [13, pytest.approx(10 / 13), 1, 1, pytest.approx(3 / 13)]
    assert [table[kind, "accuracy"]["training slides"] for kind in ("common", "rare")] == [0, 3]


@pytest.mark.parametrize("text, message", [
    ('{"settings": {}}\n{oops\n', "predictions.jsonl, line 2: .*not JSON"),
    ('{"settings": {}}\n', "predictions.jsonl: no question is answered by all"),
    ('{"id": "q0", "text": "a"}\n', "lacks questions or true answers; name one of --qa first"),
    ('{"settings": {}}\n{"n": 0, "answer": ["a", "b"]}\n', "predictions.jsonl: its answer is no text"),
])  # fmt: skip
def test_bad_files_of_predictions_are_named(tmp_path, text, message):
    path = tmp_path / "predictions.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        evaluated(path)


# ---- sample.py: where the answer comes from ----

QUESTION = "What is its grade?"
GRID = torch.stack([torch.arange(20) % 5, torch.arange(20) // 5], 1) * 256  # 20 tiles for 9 visual tokens


@pytest.fixture
def finder(tiny, tokenizer):
    """A model that has learnt: grade 2 where one tile, anywhere, bears the mark, else grade 3 -> (model,
    draw).

    draw(n): features [n,20,128] of slides, every other of them with the mark, and the tiles that bear it.
    """
    mark = 2 * torch.randn(128, generator=torch.Generator().manual_seed(1))

    def draw(n):
        features, at = torch.randn(n, 20, 128), torch.randint(20, (n,))
        features[range(0, n, 2), at[::2]] = mark
        return features, at

    asked = {"from": "human", "value": f"<image>\n{QUESTION}"}
    answers = [{"from": "gpt", "value": answer} for answer in ("It is grade 2.", "It is grade 3.")]
    ids, labels = zip(*[tokenizer.encode_chat([asked, answer]) for answer in answers])
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=2e-3, weight_decay=0)
    for _ in range(150):
        visual = tiny.slide_encoder.visual_tokens(draw(24)[0].flatten(0, 1), GRID.repeat(24, 1), [20] * 24)
        loss = tiny(visual, ids * 12, labels * 12)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tiny.parameters(), 1.0)
        optimizer.step()
        if loss < 0.2:  # a model that is surer changes its mind within one of the 32 steps
            return tiny, draw
    raise AssertionError(f"the model has not learnt it: loss {loss.item():.3f}")


@slow
def test_relevance_finds_the_tile_that_the_answer_depends_on(finder, tokenizer):
    """And the shares add up to what the slide does for the answer, against a slide of average tiles."""
    model, draw = finder
    features, at = draw(20)
    ids, labels = tokenizer.encode_chat(
        [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "It is grade 2."}]
    )
    labels[-1] = IGNORE  # the </s>
    found = []
    for tiles, place in zip(features[::2], at[::2]):
        relevance = sample.tile_relevance(model, tokenizer, tiles, GRID, QUESTION, "It is grade 2.")
        with torch.no_grad():
            real, average = (
                -model(model.encode_slide(x, GRID)[None], [ids], [labels], "sum").item()
                for x in (tiles, tiles.mean(0).expand(20, -1))
            )
        assert relevance.sum().item() == pytest.approx(real - average, rel=0.25, abs=0.1)
        found.append(relevance.argmax() == place and relevance.max() > 3 * relevance.clamp(min=0).mean())
    assert sum(found) >= 9, found


# Fewer tiles than the 9 visual tokens, so that they repeat; as many; more
@pytest.mark.parametrize("n", [4, 9, 20])
def test_relevance_passes_through_the_pool(tiny, tokenizer, n):
    """Without a slide encoder a tile matters through its visual tokens alone: a tile like the average one,
    not at all."""
    tiny.slide_encoder, tiny.cfg.no_slide_encoder = None, True
    features = torch.randn(n, 128)
    features[1] = features[[i for i in range(n) if i != 1]].mean(0)
    relevance = sample.tile_relevance(tiny, tokenizer, features, GRID[:n], QUESTION, "It is grade 2.")
    assert relevance[1].abs() < 1e-6 < relevance[[0, *range(2, n)]].abs().min()


def test_heatmap_is_darkest_on_the_most_relevant_tile(toy_slide, tmp_path):
    slide = prepare.Slide(toy_slide[0])
    coords = prepare.tile_grid(tissue_mask(slide.thumbnail(32)), 0.25)
    relevance = np.linspace(-1, 0.2, len(coords))
    relevance[7] = 2
    sample.draw_heatmap(tmp_path / "map.png", slide, coords, relevance, "Q\nA")
    picture = np.asarray(Image.open(tmp_path / "map.png").convert("L")).astype(int)
    assert picture.shape == (90 + 560 + 24, 3 * 560 + 4 * 24)
    centres = ((coords + 128) * 560 / 1536).astype(int) + (48 + 560, 90)
    light = [picture[y - 20 : y + 20, x - 20 : x + 20].mean() for x, y in centres]
    assert np.argmin(light) == 7 and sorted(light)[1] - light[7] > 40


def test_geojson_is_in_level_0_pixels(tmp_path, toy_slide):
    coords, relevance, path = np.array([[0, 256], [512, 0]]), np.array([0.5, -1.0]), tmp_path / "map.geojson"
    sample.write_heatmaps([path], (toy_slide[0], 0.25), coords, relevance, "")
    first, second = json.loads(path.read_text())["features"]
    assert first["geometry"]["coordinates"] == [[[0, 512], [512, 512], [512, 1024], [0, 1024], [0, 512]]]
    assert second["geometry"]["coordinates"][0][0] == [1024, 0]
    assert second["properties"]["objectType"] == "tile"
    assert second["properties"]["measurements"] == {"relevance": -1.0}


@pytest.mark.parametrize("flags, message", [
    (["--heatmap", "a.png"], "needs --slide and --ask"),
    (["--ask", "?", "--heatmap", "a.jpg"], "must end in .png or .geojson"),
    (["--ask", "?", "--heatmap", "no/a.png"], "in a folder that is there"),
])  # fmt: skip
def test_heatmap_flags_are_checked_before_the_model_is_loaded(flags, message):
    with pytest.raises(UserError, match=message):
        sample.main(["--slide", "s", *flags])


# ---- All of it: the demo on a cohort of fifteen, mistakes, the README ----

SCRIPTS = {"prepare.py": prepare, "train.py": train, "sample.py": sample}


@slow
def test_demo_runs_end_to_end(demo):
    folder, printed = demo
    for task in ("type", "grade", "position", "focus"):
        assert re.search(rf"\| {task} +\| exact match +\| 3 ", printed), printed
    assert re.search(r"\| model +\| no slide +\| other slide +\| majority +\| ROUGE-L +\|", printed)
    commands = re.findall(r"^\$ python (\w+)\.py ", printed, re.M)
    assert commands == ["prepare", "train", "train", "train", "sample", "sample"]
    assert re.search(r"Took \d+ s: slides \d+, stage 1 \d+, .*heatmap \d+\.", printed)
    assert Image.open(folder / "out" / "heatmap.png").width > 1000
    for stage in (1, 2, 3):
        out = folder / "out" / f"stage{stage}"
        made = {"model.safetensors", "config.json", "train_state.pt", "log.jsonl", "loss.svg", ".claims"}
        made |= {"slide_encoder.safetensors"} if stage == 1 else set()
        assert {p.name for p in out.iterdir()} == made
        curves = (out / "loss.svg").read_text()
        assert curves.count("<polyline") == 1 and curves.count("h0") > 0  # dots
    features = {p.stem for p in (folder / "data" / "features").iterdir()}
    pictures = {p.stem for p in (folder / "data" / "qc").iterdir()}
    assert len(features) == 18 and pictures == features | {"index"}
    sides = [prepare.read_qa(folder / "data" / "qa" / f"{split}.jsonl") for split in ("train", "test")]
    assert not set(train.slides_in(sides[0])) & set(train.slides_in(sides[1]))


def readme_blocks():
    """README's blocks of commands and of output, as lists of lines."""
    return [block.strip().splitlines() for block in (HERE / "README.md").read_text().split("```")[1::2]]


def without_numbers(line):
    """A line of a table or a message, numbers and widths aside."""
    return " ".join(re.sub(r"-{2,}", "-", re.sub(r"\d[\d.,]*", "0", line)).split())


@slow
def test_the_readme_shows_what_the_demo_prints(demo):
    shown = next(block for block in readme_blocks() if block[0].startswith("|"))
    printed = {without_numbers(line) for line in demo[1].splitlines()}
    assert len(shown) > 8 and [line for line in shown if without_numbers(line) not in printed] == []


@slow
def test_the_readmes_commands_run(demo, toy_slide, tmp_path, monkeypatch):
    """All that need no download, judge or shell: on the demo's data, and on two slides of one's own."""
    for name in ("data", "out"):
        shutil.copytree(demo[0] / name, tmp_path / name)
    (tmp_path / "slides").mkdir()
    for name in "ab":
        shutil.copy(toy_slide[0], tmp_path / "slides" / f"{name}.svs")
    for split in ("train", "test"):
        (tmp_path / f"questions_{split}.csv").write_text("slide,report\na,A tumor.\nb,No tumor.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n"))
    ran = 0
    for block in readme_blocks():
        for line in block if "done" not in block else ():  # a loop of the shell
            if line.startswith("python ") and not re.search("--demo|--judge|--lora|test_wsi", line):
                _, script, *flags = shlex.split(line.replace("demo_0400", "demo_0015"), comments=True)
                SCRIPTS[script].main(flags)
                ran += 1
    assert ran >= 12 and (tmp_path / "map.png").exists() and (tmp_path / "mine" / "out" / "stage3").exists()


@pytest.mark.parametrize(
    "program, flags, message",
    [
        (train, "--lr nan", "--lr: nan is not from "),
        (train, "--epochs inf", "--epochs: inf is not from "),
        (train, "--val 1", "--val: 1 is not from "),
        (train, f"--seed {10**400}", "is not from 0 to 4294967295"),
        (prepare, "--slides . --mpp 40", "--mpp: 40 is not from "),
        (prepare, "--demo 4", "--demo: 4 is not from "),
        (sample, "--temperature 101", "--temperature: 101 is not from "),
    ],
)
def test_numbers_out_of_range_are_refused_by_their_flag(capsys, program, flags, message):
    with pytest.raises(SystemExit):
        program.parse(flags.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--slides", ""], ["--features", ""], ["--slides", ".", "--mask", ""]])
def test_an_unset_variable_is_not_the_current_folder(capsys, flags):
    with pytest.raises(SystemExit):
        prepare.parse(flags)
    assert "error: an empty argument (an unset variable?)" in capsys.readouterr().err


def flags_of(name):
    """A script's flags, as argparse keeps them, but those that run anything else than is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wsi_llava.Parser, "parse_args", lambda parser, argv: parser)
        flags = SCRIPTS[name].parse([])._actions
    return [flag for flag in flags if flag.dest not in ("help", "demo", "device")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_defaults_that_help_tells_are_the_defaults(name):
    told = {}
    for flag in flags_of(name):
        number = re.search(r"\(default: ([\d.,]*\d)\b", flag.help or "")
        if number:
            told[flag.dest] = float(number[1].replace(",", "")), flag.default
    assert len(told) >= 3 and all(said == default for said, default in told.values()), told


@slow
@pytest.mark.parametrize(
    "command, message",
    [
        ("train.py", "nothing to do: give --stage, --export or --demo"),
        ("sample.py", "nothing to do: give --slide, --qa or --evaluate"),
        ("prepare.py --slides broken.svs --device abacus", "--device abacus: "),
        ("prepare.py --features nowhere", "nowhere: no such file or folder (--features)"),
        ("prepare.py --demo --dry-run", "--dry-run is for --slides alone"),
        ("prepare.py --slides broken.svs --mpp-csv no.csv", "no.csv: no such file; --mpp-csv takes lines of"),
        ("prepare.py --slides new", "no slides below"),
        ("prepare.py --slides broken.svs --data new", "1 slide could not be prepared"),
        ("prepare.py --qa missing.json", "no such file; python prepare.py --qa"),
        ("train.py --stage 1 --data new", "run python prepare.py"),
        ("train.py --stage 1 --no-slide-encoder", "stage 1 trains it; start with --stage 2"),
        ("train.py --stage 2 --out new", "run python train.py --stage 1 first"),
        ("sample.py --slide nobody", "neither a file nor a slide in"),
        ("sample.py --slide broken.svs --data new", "not a slide that OpenSlide can"),
        (f"sample.py --slide demo_0015 --ask {'word' * 2000}", "the prompt is too long"),
        ("sample.py --slide demo_0015 --llm nowhere", "no such"),
    ],
)
def test_bad_input_is_one_line(demo, tmp_path, monkeypatch, command, message):
    """Each a non-zero exit and one line that names the file or flag and what to do. What was there stays."""
    for name in ("data", "out"):
        (tmp_path / name).symlink_to(demo[0] / name)
    (tmp_path / "broken.svs").write_bytes(b"not a slide")
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path)
    name, *flags = command.split()
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        SCRIPTS[name].main(flags)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out", "broken.svs", "new"}


@slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_mistake_ends_as_a_user_sees_it_in_one_line(name):
    """Also on a terminal that cannot show it."""
    flags = {"prepare.py": "--slides", "train.py": "--stage 1 --data", "sample.py": "--slide"}[name].split()
    done = script(name, *flags, "größe", env={"PYTHONIOENCODING": "ascii:strict"})
    assert done.returncode == 1 and re.fullmatch(r"error: .*gr\S+e.*\n", done.stderr), done.stderr


# ---- Secrets and paths: what files, servers and names that others made cannot do ----


class Payload(str):
    """A path, which is written to when this is unpickled."""

    def __reduce__(self):
        return open, (str(self), "w")


@pytest.mark.parametrize("way", ["zip", "legacy", "bare"])
@pytest.mark.parametrize(
    "name, read",
    [
        ("pytorch_model.bin", wsi_llava.load_tile_encoder),
        ("pytorch_model.bin", lambda path: wsi_llava.read_folder(path.parent)),
        ("slide_encoder.pth", wsi_llava.load_slide_encoder),
        ("mm_projector.bin", wsi_llava.load_projector),
        ("train_state.pt", lambda path: train.resume(path, {}, torch.nn.Linear(1, 1), None)),
        ("features.pt", prepare.read_foreign),
    ],
)
def test_nothing_is_unpickled(tmp_path, name, read, way):
    path, bad = tmp_path / name, {"model": torch.zeros(2), "run": Payload(tmp_path / "ran")}
    if way == "bare":
        path.write_bytes(pickle.dumps(bad))
    else:
        torch.save(bad, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(RuntimeError):  # it is armed: torch unpickles before it looks at what it got
        torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_the_key_is_in_no_file_and_never_printed(judge_server, tmp_path, monkeypatch, capsys):
    """Also where the server repeats it, in an error, in a reply or in an address."""
    monkeypatch.setenv("OPENAI_API_KEY", key := "sk-0123456789abcdef")
    path = write_predictions(tmp_path, [("open", "What is it?", "A tumor.", "A tumor. Large")] * 3)
    argv = ["--evaluate", str(path), "--judge-model", "wise", "--judge-url", judge_server.url]
    echo = {"choices": [{"message": {"content": json.dumps({"claims": [f"The key is {key}."]})}}]}
    judge_server.script += [(500, {"Retry-After": "0"}, f"{key} is busy"), (200, {}, json.dumps(echo))]
    sample.main(argv)
    assert judge_server.requests[0][0] == f"Bearer {key}" and (tmp_path / "judge.jsonl").read_text()
    wrong = json.dumps({"error": {"message": f"Incorrect API key: {key}"}})
    moved = {"Location": f"https://elsewhere/?key={key}"}
    for reply, message in (((401, {}, wrong), "Incorrect API key: ***"), ((302, moved, ""), "HTTP 302: ")):
        judge_server.script += [reply]
        (tmp_path / "judge.jsonl").unlink()
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            sample.main(argv)
        said = capsys.readouterr()
        assert key not in said.out + said.err + str(caught.value)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and key.encode() in file.read_bytes()]


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "..", "a/../../b"])
def test_questions_cannot_name_a_slide_outside(tmp_path, monkeypatch, name):
    write_train(tmp_path / "data", [(name, "report", "A tumor.")])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not the name of a slide"):
        train.load_rows(train.parse([]))
    asked = {"slide": f"{name}.svs", "question": "Q?", "answer": "None"}
    Path("test.json").write_text(json.dumps([asked]))
    assert "/" not in prepare.read_qa("test.json")[0]["slide"]


def test_parts_of_a_file_lie_in_its_folder(tmp_path):
    """Shards that an index names; datasets of HDF5 that are links, kept outside or put together."""
    save_file({"a": torch.zeros(2)}, tmp_path / "secret.safetensors")
    index = tmp_path / "llm" / "model.safetensors.index.json"
    index.parent.mkdir()
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="its weight_map leads out of this folder"):
            wsi_llava.read_folder(index.parent)
    h5py = pytest.importorskip("h5py")
    secret, path, shape = tmp_path / "secret.h5", tmp_path / "features.h5", (3, 4)
    with h5py.File(secret, "w") as file:
        file["features"] = np.zeros(shape, np.float32)
    through = {"x": h5py.ExternalLink(secret, "/"), "features": h5py.SoftLink("/x/features")}
    layout = h5py.VirtualLayout(shape, np.float32)
    layout[:] = h5py.VirtualSource(secret, "features", shape)
    for make in (
        lambda file: file.update({"features": h5py.ExternalLink(secret, "features")}),
        lambda file: file.update(through),
        lambda file: file.create_dataset("features", shape, np.float32, external=[("secret.h5", 0, 48)]),
        lambda file: file.create_virtual_dataset("features", layout),
    ):
        with h5py.File(path, "w") as file:
            make(file)
        with pytest.raises(UserError, match=f"{path}: its features lie in another file"):
            prepare.read_foreign(path)


def test_what_is_no_output_of_ours_is_never_replaced_and_no_link_followed(tmp_path, monkeypatch):
    """A temporary name cannot be foreseen; and if it could, it is a new file or none."""
    mine = tmp_path / "thesis"
    mine.write_text("years of work")
    for path in (mine, tmp_path):
        with pytest.raises(UserError, match=re.escape(str(path))):
            sample.open_lines(path)
    monkeypatch.setattr(os, "urandom", bytes)
    (tmp_path / ".out.00000000.part").symlink_to(mine)
    with pytest.raises(FileExistsError):
        wsi_llava.write_text(tmp_path / "out", "theirs")
    assert mine.read_text() == "years of work" and not (tmp_path / "out").exists()


def test_who_may_read_what_is_replaced_is_the_umasks_to_say(tmp_path):
    umask = os.umask(0o027)
    try:
        for _ in range(2):  # new, and replaced
            wsi_llava.write_text(tmp_path / "text", "a")
            wsi_llava.write_tensors(tmp_path / "tensors", {"a": torch.zeros(2)})
            assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
    finally:
        os.umask(umask)


# ---- Damage: a file or flag of a small demo made odd; commands killed around each of their renames ----

# Command -> the files that it reads, as patterns in the demo's folder.
READERS = {
    "sample.py --slide demo_0010 --ask Which": "data/meta.json data/*/demo_0010.safetensors "
    "data/tokenizer.model data/llm/* out/stage3/*",
    "sample.py --qa asked_test.json": "asked_test.json out/stage3/* data/*/demo_0001* data/qa/train.jsonl",
    "sample.py --evaluate out/said.jsonl": "out/said.jsonl data/qa/train.jsonl",
    "prepare.py --slides data/slides/demo_0003.jpg": "data/slides/demo_0003.jpg data/meta.json "
    "data/failures/* data/features/demo_0003* data/qc/demo_0003.jpg data/.claims",
    "prepare.py --features foreign --mpp 0.5 --data new": "foreign/*",
    "prepare.py --qa asked_test.json": "asked_test.json data/qa/t*.jsonl",
    "prepare.py --demo 10": "data/cohort.json data/meta.json",
    "train.py --stage 1 --epochs 0.1": "data/qa/train.jsonl data/meta.json data/features/demo_000*",
    "train.py --stage 2 --epochs 0.1": "data/llm/* data/tokenizer.model out/stage1/* data/qa/train.jsonl",
    "train.py --stage 3 --epochs 0.1": "out/stage[12]/* data/llm/* data/qa/train.jsonl out/stage3/log*",
    "train.py --stage 3 --epochs 1 --resume": "out/stage3/*",
    "train.py --export exported": "out/stage3/* data/llm/*",
}
# Command -> what it writes, and is taken away before it runs.
WRITERS = {
    "prepare.py --slides data/slides": "data/features/demo_000[0-2]* data/qc/*",
    "prepare.py --features foreign --mpp 0.5 --data new": "",
    "prepare.py --qa asked_test.json --data new": "",
    "train.py --stage 1 --epochs 2 --eval-every 1": "out/stage1",
    "train.py --stage 2 --epochs 2 --eval-every 1": "out/stage2 data/visual_tokens/*0.*",
    "train.py --stage 3 --epochs 1 --eval-every 1": "out/stage3 data/llm data/tokenizer.model",
    "train.py --export exported": "",
    "sample.py --qa asked_test.json --evaluate": "",
}
ODD_TEXTS = ["", "-1", "0", "1e308", "nan", "inf", "9" * 20, "x", "data", "\udcff", "/", "a" * 300]
ODD_JSON = [None, True, -1, 1.5, math.nan, 10**400, "", "\ud800", "x" * 300, [], {}, [None], [[1]], {"a": 1}]


def set_out(folder):
    """Adds to a finished demo a file of each kind that the commands read."""
    (folder / "foreign").mkdir()
    coords = torch.tensor([[0, 0], [256, 0], [512, 0]])
    torch.save({"features": torch.zeros(3, 8), "coords": coords}, folder / "foreign" / "a.pt")
    asked = {"slide": "demo_0001", "question": "Which grade?", "answer": "B", "A": "low", "B": "high"}
    (folder / "asked_test.json").write_text(json.dumps([asked]))
    flags = ["--qa", folder / "asked_test.json", "--predictions", folder / "out" / "said.jsonl"]
    done = script("sample.py", *flags, "--data", folder / "data", "--out", folder / "out")
    assert done.returncode == 0, done.stderr


def mend_json(rng, value):
    """One place of a JSON value, at any depth, of another type, odd, or gone."""
    places = [value]
    for place in places:  # grows
        parts = place.values() if isinstance(place, dict) else place
        places.extend(part for part in parts if isinstance(part, (dict, list)) and part)
    place = places[rng.integers(len(places))]
    keys = list(place) if isinstance(place, dict) else range(len(place))
    key = keys[rng.integers(len(keys))]
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = ODD_JSON[rng.integers(len(ODD_JSON))]
    return value


def damaged(rng, name, body):
    """The bytes of a file, damaged: inside of its JSON, or flipped, cut, lengthened, overwritten, nested."""
    with contextlib.suppress(ValueError, IndexError, struct.error):
        if name.endswith((".json", ".jsonl")) and rng.random() < 0.7:
            lines = [body] if name.endswith(".json") else body.splitlines()
            i = rng.integers(len(lines))
            lines[i] = json.dumps(mend_json(rng, json.loads(lines[i]))).encode()
            return b"\n".join(lines)
        if name.endswith(".safetensors") and rng.random() < 0.5:
            (n,) = struct.unpack("<Q", body[:8])
            header = json.dumps(mend_json(rng, json.loads(body[8 : 8 + n]))).encode()
            return struct.pack("<Q", len(header)) + header + body[8 + n :]
    at, cut = int(rng.integers(max(1, len(body)))), (1, 8, 100, len(body))[rng.integers(4)]
    ways = (
        body[:at] + bytes([rng.integers(256)]) + body[at + 1 :],
        body[:at] + body[at + cut :],
        body[:at],
        body + bytes(cut),
        body[:at] + b"\xff" * cut + body[at + cut :],
        b"[" * 200_000,
    )
    return ways[rng.integers(len(ways))]


def in_child(argv, folder, replace, before):
    """A script's main, in a process that was forked for it: no time goes into imports."""
    os.setsid()
    os.chdir(folder)
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    sys.stdout, sys.stderr = open(".stdout", "w"), open(".stderr", "w")  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    sys.argv, os.replace = argv, replace
    before()
    wsi_llava.run(SCRIPTS[argv[0]].main)


def run_forked(argv, folder, replace=os.replace, before=lambda: None):
    """-> (exit status, or less the signal; stdout; stderr). before: called in the child first."""
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(argv, folder, replace, before))
    child.start()
    child.join(120)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # it, where it hangs; what it left running
    child.join()
    read = [(folder / name).read_bytes().decode(errors="replace") for name in (".stdout", ".stderr")]
    return child.exitcode, *read


def verdict(status, out, err):
    """What became of a command: "worked", "refused" in one line, or the fault."""
    lines = [line for line in re.split("[\r\n]+", err) if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if "Traceback (most recent" in err + out:
        return "traceback"
    if status < 0:
        return "hang or abort"
    if resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 4e6:  # kB, of the largest so far
        return "memory"
    if status == 0:
        return "wrong success" if errors or re.search(r"\bnan\b", out) else "worked"
    return "refused" if len(errors) == 1 and lines[-1] == errors[0] else "not one line"


def fresh_copy(master, gone="", name="case"):
    """A copy of a folder beside it, in the place of an earlier one. gone: what it lacks, patterns."""
    folder = master.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(master, folder)
    for path in itertools.chain(*map(folder.glob, gone.split())):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def fuzz(master, cases=1000, seed=0):
    """Damages one file or flag of a copy of a demo, and runs a command that reads it, again and again. Prints
    how often it worked or refused, and what went wrong -> the faults, (seed, case) each."""
    counts, faults = collections.Counter(), []
    for i in range(int(cases)):
        rng, folder, commands = np.random.default_rng([int(seed), i]), fresh_copy(master), list(READERS)
        command = commands[rng.integers(len(commands))]
        argv, what = command.split(), "a flag"
        if rng.random() < 0.25:
            flags = flags_of(argv[0])
            flag = flags[rng.integers(len(flags))].option_strings[0]
            argv += [flag, ODD_TEXTS[rng.integers(len(ODD_TEXTS))]]
        else:
            files = [path for pattern in READERS[command].split() for path in sorted(folder.glob(pattern))]
            files = [path for path in files if path.is_file()]
            path = files[rng.integers(len(files))]
            what, body = path.relative_to(folder), path.read_bytes()
            path.unlink()
            if rng.random() < 0.05:
                path.mkdir()  # a folder in the place of a file
            else:
                path.write_bytes(damaged(rng, path.name, body))
        status, out, err = run_forked(argv, folder)
        said = verdict(status, "" if argv[-1] == "nan" else out, err)  # a folder that is called so
        counts[said] += 1
        if said not in ("worked", "refused"):
            faults.append((seed, i))
            print(f"seed {seed}, case {i}: {what}: {argv}: {said}\n{err[-2000:]}\n", flush=True)
    print(dict(counts))
    return faults


@pytest.fixture(scope="session")
def finished(demo, tmp_path_factory):
    """A demo and a file of each kind that the commands read -> its folder, whose neighbours are free."""
    folder = shutil.copytree(demo[0], tmp_path_factory.mktemp("finished") / "master")
    set_out(folder)
    return folder


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@slow
@forks
def test_damaged_files_and_odd_flags_are_refused_in_one_line(finished):
    assert not fuzz(finished, 50)


def full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # no file grows beyond


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115


@slow
@forks
@pytest.mark.parametrize(
    "gone, command, before, named",
    [
        ("out/stage1", "train.py --stage 1 --epochs 0.1", full_disk, "out/stage1"),
        ("", "train.py --export exported", full_disk, "exported"),
        ("", "sample.py --slide demo_0010 --ask Which --heatmap new.png", full_disk, "new.png"),
        ("", "prepare.py --qa data/qa/train.jsonl --split train --data new", full_disk, "new/qa"),
        ("", "sample.py --evaluate out/said.jsonl", closed_pipe, ""),
        ("", "prepare.py --slides data/slides --workers 3000", lambda: None, ""),
    ],
)
def test_odd_surroundings_are_one_line_and_leave_whole_files(finished, gone, command, before, named):
    folder = fresh_copy(finished, gone)
    status, _, err = run_forked(command.split(), folder, before=before)
    assert verdict(status, "", err) == "refused", err[-2000:]
    assert re.search(f"error: .*{named}", err), err
    assert not list(folder.rglob(".*.part"))
    for path in folder.rglob("*.safetensors"):
        wsi_llava.read_tensors(path)


def lasting(folder):
    """What must be the same after a kill {file: contents}: all but times and what is written in passing."""
    found = {}
    for path in folder.rglob("*"):
        passing = (".claims", ".stdout", ".stderr", "log.jsonl", "loss.svg")
        if path.is_dir() or path.name in passing:
            continue
        body = b"" if path.name == "train_state.pt" else path.read_bytes()  # it holds the log
        found[str(path.relative_to(folder))] = re.sub(rb'"(seconds|peak_memory)": [\d.]+', b"", body)
    return found


def kills(master, commands=WRITERS):
    """Kills each command right before and right after each of its renames, a stage also where a finished one
    lies, and runs it again: the same files as without. -> the faults."""
    faults = []
    for command in commands:
        start, argv = fresh_copy(master, WRITERS[command], "start"), command.split()
        is_stage = "--stage" in command
        renames = multiprocessing.get_context("fork").Value("i", 0)

        def replace(source, target, kill_at=None, real=os.replace, renames=renames):
            with renames.get_lock():  # another process of the command renames too
                mine, renames.value = renames.value, renames.value + 1
            if kill_at == 2 * mine:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)
            if kill_at == 2 * mine + 1:
                os.kill(os.getpid(), signal.SIGKILL)

        folder = fresh_copy(start)
        status, _, err = run_forked(argv, folder, replace=replace)
        assert status == 0, err
        whole, done, n = lasting(folder), fresh_copy(folder, name="done"), renames.value
        for kill_at in range(2 * n):
            fresh_copy(done if is_stage and kill_at % 3 == 0 else start)
            renames.value = 0
            run_forked(argv, folder, replace=functools.partial(replace, kill_at=kill_at))
            for half in folder.rglob(".*.part"):
                os.utime(half, (0, 0))  # of days ago: the next one to write that file sweeps it up
            status, _, err = run_forked([*argv, *["--resume"] * is_stage], folder)
            again = lasting(folder)
            odd = [name for name in whole.keys() | again.keys() if whole.get(name) != again.get(name)]
            if odd or (status and "holds a model already" not in err):  # a finished export is refused
                faults.append(f"{command}, kill {kill_at}: status {status}, {odd[:4]} {err[-300:]}")
        print(f"{command}: {2 * n} kills; faults so far: {faults}", flush=True)
    return faults


@slow
@forks
@pytest.mark.parametrize("command", [command for command in WRITERS if re.search("--stage [12]", command)])
def test_a_kill_around_any_rename_leaves_what_can_be_finished(finished, command):
    """The resumed run ends with the same bits."""
    assert not kills(finished, [command])


# ---- Benchmarks, not tests: python test_wsi_llava.py NAME [...] ----


def machine():
    """The device that benchmarks run on, and the dtype that is the default there."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def fastest(work, rounds=2):
    """Seconds of the fastest round of work(), a GPU's work done; the first compiles what it needs."""
    took = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return min(took)


def say(what):
    """Prints it, and the most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak
    print(f"{what}, {peak / 1e9:.1f} GB", flush=True)


def fresh(work, *given):
    """Runs work(*given) in a process of its own, since peaks of memory never fall."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        process.submit(work, *given).result()


def at_random(make):
    """What make() makes, on this machine, with random weights."""
    device, dtype = machine()
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device=device).eval()
    for x in module.state_dict().values():
        x.normal_(0, 0.02)
    return module


def upstream_attention(q, k, v, segments, dilations):
    """Dilated attention of [1,L,H,D] as Prov-GigaPath does: each branch's tokens gathered, PyTorch's flash
    attention over them, its result scattered into zeros, and all branches mixed by their log-sum-exp."""
    flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention" + "_for_cpu" * q.is_cpu)
    L, H = q.shape[1:3]
    outs, lses = [], []
    for W, R in zip(segments, dilations):
        W, gathered = min(W, L), []
        for x in (q[0], k[0], v[0]):
            x = F.pad(x, (0, 0, 0, -H % R, 0, -L % W)).unflatten(0, (-1, W))  # [S,W,H,D]
            x = F.pad(x, (0, 0, 0, 0, 0, -W % R))
            x = x.unflatten(1, (-1, R)).unflatten(3, (R, -1))  # [S,n,R,R,H/R,D]
            gathered.append(x.diagonal(dim1=2, dim2=3).permute(0, 4, 2, 1, 3).flatten(1, 2).contiguous())
        for found, x, nothing in zip((outs, lses), flash(*gathered), (0, -1e8)):
            x = x.view(*gathered[0].shape[:3], -1)  # [S,H,n,D or 1]
            S, h, n, d = x.shape
            whole = torch.full((S, n, R, R, h // R, d), nothing, dtype=x.dtype, device=x.device)
            whole.diagonal(dim1=2, dim2=3).copy_(x.unflatten(1, (R, -1)).permute(0, 3, 2, 4, 1))
            found.append(whole.flatten(3, 4).flatten(1, 2)[:, :W].flatten(0, 1)[:L, :H])
    weights = torch.stack(lses).softmax(0).to(q.dtype)
    return sum(out * weight for out, weight in zip(outs, weights))


def benchmark_attention(*tiles):
    """Dilated attention of a 7b layer, forward, beside upstream's way of computing it."""
    device, dtype = machine()
    cfg = PRESETS["7b"].slide_encoder
    for n in map(int, tiles or (1000, 10000, 100000)):
        q, k, v = torch.randn(3, 1, n + 1, cfg.heads, cfg.width // cfg.heads, device=device, dtype=dtype)
        branches = q, k, v, cfg.segments, cfg.dilations
        ours = fastest(functools.partial(wsi_llava.dilated_attention, *branches), 3)
        theirs = fastest(functools.partial(upstream_attention, *branches), 3)
        print(f"{n:>7} tiles: {1e3 * ours:.1f} ms; upstream's way: {1e3 * theirs:.1f} ms", flush=True)


def slide_encoder_cost(n, training):
    """The 7b slide encoder on a slide of n tiles; training: forward and backward with checkpointing."""
    device, dtype = machine()
    cfg = PRESETS["7b"].slide_encoder
    encoder = at_random(lambda: wsi_llava.SlideEncoder(cfg)).train(training)
    encoder.checkpointing = training
    x = torch.arange(n, device=device)
    coords = torch.stack([x % math.isqrt(n), x // math.isqrt(n)], 1) * 256
    features = torch.randn(n, cfg.in_width, device=device, dtype=dtype)

    def work():
        with torch.inference_mode(not training):
            tokens = encoder(features, coords, [n])[1]
        if training:
            tokens.sum().backward()

    say(f"{n:>7} tiles, {'training' if training else 'inference'}: {fastest(work):.3f} s")


def benchmark_slide_encoder(*tiles):
    for n, training in itertools.product(map(int, tiles or (1000, 10000, 100000)), (False, True)):
        if not training or n <= 10000:
            fresh(slide_encoder_cost, n, training)


def answering_model(preset):
    return at_random(lambda: wsi_llava.WSILLaVA(dataclasses.replace(PRESETS[preset], no_slide_encoder=True)))


def conversation_cost(preset, stage, words=256):
    """A step of stage 2 or 3 on a micro-batch: of a row's words the last half is learned."""
    device, dtype = machine()
    cfg, recipe = PRESETS[preset], train.RECIPES[preset][stage]
    args = types.SimpleNamespace(device=device, dtype=dtype, full=False)
    wsi_llava.load_model = lambda *_: (answering_model(preset), None)  # in this process alone
    model, _ = train.model_to_train(args, recipe, None, stage)
    ids = [IMAGE_TOKEN, *range(3, 3 + words)]
    labels = [IGNORE] * (1 + words // 2) + ids[1 + words // 2 :]
    rows = [torch.randn(cfg.n_visual_tokens, cfg.slide_encoder.width)], [ids], [labels]
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad])

    def step():
        with train.autocast(args):
            loss = model(*(row * recipe.micro_batch for row in rows), reduction="sum")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    say(f"stage {stage}, a micro-batch of {recipe.micro_batch}: {fastest(step):.2f} s")


@torch.inference_mode()
def answer_cost(preset, new=64):
    """An answer to one slide, from its second token on."""
    model, cfg = answering_model(preset), PRESETS[preset]
    visual = torch.randn(cfg.n_visual_tokens, cfg.slide_encoder.width)
    answers = functools.partial(model.generate, [visual], [[1, IMAGE_TOKEN, *range(3, 66)]], ends=())
    first, whole = (fastest(lambda n=n: list(answers(n))) for n in (1, new))
    say(f"an answer: {(new - 1) / (whole - first):.1f} tokens/s")


@torch.inference_mode()
def tile_encoder_cost(preset, batch=256):
    """From pixels to features."""
    encoder = at_random(lambda: wsi_llava.TileEncoder(PRESETS[preset].tile_encoder))
    tiles = torch.randint(0, 256, (batch, 256, 256, 4), dtype=torch.uint8)
    took = fastest(lambda: prepare.encode(encoder, tiles, machine()[0]), rounds=5)
    say(f"tile encoder: {batch / took:,.1f} tiles/s")


def benchmark_steps(preset="7b"):
    fresh(tile_encoder_cost, preset)
    fresh(answer_cost, preset)
    for stage in (2, 3):
        fresh(conversation_cost, preset, stage)


def benchmark_relevance(data="data", out="out"):
    """Heatmaps of a demo against the truth, on 20 slides with pigment: how relevant are the tiles that hold
    it to an answer that says so? And is the most relevant tile one of them?"""
    args = train_args("--data", data, "--out", out)
    model, tokenizer = wsi_llava.load_model(args, wsi_llava.read_meta(args.data), 3)
    cases = json.loads((args.data / "cohort.json").read_text())["cases"]
    planted = {case["slide"]: case["planted"] for case in cases}
    rows = [row for row in prepare.read_qa(args.data / "qa" / "test.jsonl") if row["task"] == "focus"]
    times, hits = [], []
    for row in [row for row in rows if planted[row["slide"]]][:20]:
        features, coords = wsi_llava.read_features(args.data, row["slide"])
        holds = np.array([corner in planted[row["slide"]] for corner in coords.tolist()])
        asked, told = (wsi_llava.without_image(turn["value"]) for turn in row["conversations"])
        relevance = sample.tile_relevance(model, tokenizer, features, coords, asked, told).numpy()
        speaking = relevance.clip(min=0)  # negative: evidence against the answer
        times.append(speaking[holds].mean() / speaking.mean())
        hits.append(holds[relevance.argmax()])
    print(f"{len(hits)} slides: {np.mean(times):.1f} times the mean relevance, {np.mean(hits):.0%} found")


def on_a_demo(find_faults, *flags):
    """fuzz [--cases N] [--seed S] and kills, on a demo of their own."""
    options = dict(zip([flag.strip("-") for flag in flags[::2]], flags[1::2]))
    with tempfile.TemporaryDirectory() as folder:
        master = Path(folder, "master")
        args = ["--demo", "10", "--epochs", "1", "--data", str(master / "data"), "--out", str(master / "out")]
        train.main(args)
        set_out(master)
        print("faults:", find_faults(master, **options))


BENCHMARKS = {
    "fuzz": functools.partial(on_a_demo, fuzz),
    "kills": functools.partial(on_a_demo, kills),
    "attention": benchmark_attention,
    "slide-encoder": benchmark_slide_encoder,
    "steps": benchmark_steps,
    "relevance": benchmark_relevance,
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        sys.exit(f"usage: python test_wsi_llava.py {'|'.join(BENCHMARKS)} [...]")
    BENCHMARKS[sys.argv[1]](*sys.argv[2:])
