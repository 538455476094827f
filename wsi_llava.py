"""WSI-LLaVA: a multimodal language model for whole slide images, in one file.

Follows WSI-LLaVA (arXiv 2412.02141) on top of Prov-GigaPath (Nature 2024; tile encoder: DINOv2 ViT-g, arXiv
2304.07193; slide encoder: LongNet, arXiv 2307.02486), LLaVA-1.5 (arXiv 2310.03744) and Vicuna, which is a Llama
(arXiv 2302.13971). Read it top to bottom: the parts stand in the order in which data flows.

    tiles [N,256,256,3] uint8, 0.5 um/px             prepare.py cuts them from the slide
      -> preprocess_tiles      [N,3,224,224]
      -> TileEncoder           [N,1536]               one vector a tile
      -> SlideEncoder          [N,768]                tiles see one another: dilated attention (LongNet)
      -> pool_tokens           [V=576,768]            visual tokens; zero-padded to 1024, the width of CLIP-L/336
      -> mm_projector          [V,4096]               into the language model's embedding space
      -> Llama                 [T+V,32000]            spliced where the prompt says <image>; next-token logits

Words. A whole slide image is a glass slide of tissue, scanned at about 0.25 um a pixel: up to 100,000 pixels a side, in
a file that holds it at several resolutions, level 0 the finest. The tiled resolution is the 0.5 um/px at which tiles
are cut, and the unit of all coords unless they say level 0. A CLS is a learned token put before the others, to sum
them up.

Glossary of the shape comments, here and everywhere: B batch, N tiles of a slide, L sequence length (N + 1 with the
CLS), T text tokens, V visual tokens, H heads, D head dim, C channels (C_tile, C_llm: those of another part), E channels
of the space that slides and reports share, S slides of a case (in dilated attention: segments), W segment length,
R dilation.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

# Intel's matrix library may otherwise split sums by what the cores happen to be doing: the last bits would differ from
# run to run. It costs no measurable time. Read at the library's first use, so set before it.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # fused multiply-adds; unset, Triton warns of a changing default

if sys.platform == "linux":
    # Left to itself, glibc keeps freed blocks of up to 32 MB in a heap that fragments: one slide of 10,000 tiles, whose
    # activations are 31 MB each, trained in 6.3 GB instead of 2.1. So: blocks from 16 MB on go back to the system.
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(-3, 16 << 20)  # M_MMAP_THRESHOLD

import numpy as np
import safetensors
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the torch path serves
    triton = None

TILE = 256  # pixels of a tile's side at the tiled resolution
VERSION = 1  # of the files on disk; prepare.py writes it into data/meta.json
IMPORTED_TOKENS = "imported: visual tokens"  # the tile encoder in meta.json, where only tokens were imported


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: the file or flag, what is wrong, what to do."""


def check(holds, message):
    """Raises a UserError with this message unless the condition holds."""
    if not holds:
        raise UserError(message)


# --------------------------------------------------------------------------------------------------------------------
# Configs and presets
# --------------------------------------------------------------------------------------------------------------------


class Config:
    """What the config dataclasses share: a JSON round trip that refuses unknown fields."""

    def to_dict(self):
        return dataclasses.asdict(self)

    def to_json(self):
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values):
        types = {f.name: f.type for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(types))
        if unknown:
            raise UserError(
                f"{cls.__name__} has no field {', '.join(unknown)}: the file was written by another version"
            )
        kwargs = {}
        for name, value in values.items():
            if isinstance(value, dict) and types[name] is not dict:
                value = types[name].from_dict(value)
            kwargs[name] = tuple(value) if isinstance(value, list) else value
        return cls(**kwargs)

    @classmethod
    def from_json(cls, text):
        return cls.from_dict(json.loads(text))


@dataclass
class TileEncoderConfig(Config):
    """The defaults are Prov-GigaPath's tile encoder (ViT-g/16, 1.13 B parameters)."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 1536
    depth: int = 40
    heads: int = 24
    mlp_hidden: int = 4096  # after the SwiGLU gate; fc1 is twice as wide
    layer_scale: float = 1e-5  # initial value only; a checkpoint brings its own


@dataclass
class SlideEncoderConfig(Config):
    """The defaults are Prov-GigaPath's slide encoder `gigapath_slide_enc12l768d` (86 M parameters)."""

    in_width: int = 1536
    width: int = 768
    depth: int = 12
    heads: int = 16
    mlp_hidden: int = 3072
    segments: tuple = (1024, 5792, 32768, 185363, 1048576)
    dilations: tuple = (1, 2, 4, 8, 16)
    pad_keys: bool = True  # the released weights were trained with it, see dilated_attention
    tile_size: int = TILE  # pixels of the tiled resolution that one cell of the position grid covers
    grid: int = 1000  # cells along each side of the position grid
    dropout: float = 0.25
    drop_path: float = 0.1


@dataclass
class TextEncoderConfig(Config):
    """Stage 1 only. The paper does not say which text encoder it uses; this is a small one of our own."""

    in_width: int = 4096  # of the LLM's token embeddings
    width: int = 512
    depth: int = 6
    heads: int = 8
    mlp_hidden: int = 1408
    max_length: int = 512  # tokens; longer reports are cut
    embed_width: int = 512  # of the space that slides and reports share


@dataclass
class LlamaConfig(Config):
    """The defaults are Vicuna-7b-v1.5."""

    vocab: int = 32000
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp_hidden: int = 11008
    eps: float = 1e-5
    rope_theta: float = 10000.0
    context: int = 4096


@dataclass
class WSILLaVAConfig(Config):
    """The whole model. The defaults are the paper's, with Vicuna-7b-v1.5."""

    tile_encoder: TileEncoderConfig = field(default_factory=TileEncoderConfig)
    slide_encoder: SlideEncoderConfig = field(default_factory=SlideEncoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    llama: LlamaConfig = field(default_factory=LlamaConfig)
    fingerprints: dict = field(default_factory=dict)  # of the parts that these weights were trained with
    n_visual_tokens: int = 576  # 24 x 24, as CLIP-L/336 gives LLaVA-1.5
    pad_to: int = 1024  # CLIP-L's width: visual tokens are zero-padded to it, so that LLaVA's projector fits
    lora_rank: int = 0  # 0: the LLM has no adapters
    lora_alpha: float = 0.0
    lora_target: str = ".*"  # which of the decoder's linear layers have adapters, a pattern
    max_tiles: int = 0  # ablation: so many of a slide's tiles, drawn at random (0: all)
    no_slide_encoder: bool = False  # ablation: tile features go straight to the pool


PRESETS = {
    # Small enough to train on two CPU cores in minutes, and the same code in every line.
    "demo": WSILLaVAConfig(
        TileEncoderConfig(width=128, depth=2, heads=2, mlp_hidden=256, layer_scale=1.0),  # TileEncoder, untrained
        SlideEncoderConfig(128, 128, 4, 4, 384, (64, 256), (1, 2), dropout=0.0, drop_path=0.0),
        TextEncoderConfig(128, 128, 2, 4, 256, 128, 128),
        LlamaConfig(512, 128, 4, 4, 4, 352, context=512),
        n_visual_tokens=36,
        pad_to=160,
    ),
    "7b": WSILLaVAConfig(),
    "13b": WSILLaVAConfig(
        text_encoder=TextEncoderConfig(in_width=5120),
        llama=LlamaConfig(width=5120, depth=40, heads=40, kv_heads=40, mlp_hidden=13824),
    ),
}


# --------------------------------------------------------------------------------------------------------------------
# Tile encoder: a 256-px tile -> one vector (DINOv2 ViT, names as in timm)
# --------------------------------------------------------------------------------------------------------------------


def preprocess_tiles(tiles):
    """uint8 tiles [B,256,256,3] -> float32 [B,3,224,224]: centre crop, /255, ImageNet mean and std.

    This is Prov-GigaPath's preprocessing. Its resize to 256 is the identity here: tiles are cut at 256 px. Raises
    ValueError for anything but such tiles.
    """
    _, height, width, channels = tiles.shape
    if tiles.dtype != torch.uint8 or (height, width, channels) != (TILE, TILE, 3):
        raise ValueError(f"tiles must be uint8 [B,256,256,3], not {tiles.dtype} {list(tiles.shape)}")
    x = tiles[:, 16:240, 16:240].permute(0, 3, 1, 2).float() / 255  # [B,3,224,224]
    mean = torch.tensor([0.485, 0.456, 0.406], device=x.device).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=x.device).view(3, 1, 1)
    return (x - mean) / std


class Attention(nn.Module):
    """Multi-head self-attention: [B,T,C] -> [B,T,C]. mask: broadcast to [B,H,T,T], True where a query may look."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each [B,H,T,D]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).reshape(B, T, C))  # the heads side by side again


class SwiGLU(nn.Module):
    """Packed as in timm's SwiGLUPacked: one fc1 makes the gate (first half) and the value (second half)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.fc1(x).chunk(2, dim=-1)  # [B,T,hidden] each
        return self.fc2(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (arXiv 2103.17239); it starts small."""

    def __init__(self, width, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(value)))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm Transformer block of the ViT; the text encoder of stage 1 reuses it, with a padding mask."""

    def __init__(self, width, heads, mlp_hidden, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, mlp_hidden)
        self.ls2 = LayerScale(width, layer_scale)

    def forward(self, x, mask=None):
        x = x + self.ls1(self.attn(self.norm1(x), mask))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Images [B,3,224,224] -> one token a patch, [B,196,C]."""

    def __init__(self, patch_size, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # [B,C,14,14] -> [B,C,196] -> [B,196,C]


class TileEncoder(nn.Module):
    """Prov-GigaPath's tile encoder: images [B,3,224,224] from preprocess_tiles -> [B,C], the CLS after the final norm.

    Parameter names are those of the published `pytorch_model.bin` (timm's vit_giant_patch14_dinov2 at patch 16).
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        patches = (cfg.image_size // cfg.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, cfg.width))
        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.width)
        self.blocks = nn.ModuleList(
            Block(cfg.width, cfg.heads, cfg.mlp_hidden, cfg.layer_scale) for _ in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6)

    def forward(self, images):
        B, _, _, _ = images.shape
        x = self.patch_embed(images)  # [B,196,C]
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1) + self.pos_embed  # [B,197,C]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


@torch.no_grad()
def untrained_tile_encoder(cfg=None, seed=0):
    """The demo's tile encoder: fixed, seeded, **untrained** weights, for trying the pipeline and not for science.

    A random network still tells colours and textures apart (a random projection of every patch, a random
    non-linearity, an average over the tile), which is all that the toy cohort asks of it.
    """
    encoder = TileEncoder(cfg or PRESETS["demo"].tile_encoder).eval()
    rng = np.random.default_rng(seed)
    for name, p in encoder.named_parameters():
        noise = rng.standard_normal(tuple(p.shape), dtype=np.float32)
        if p.dim() >= 2 and name.endswith("weight"):
            noise /= math.sqrt(p[0].numel())  # unit gain
        elif name.endswith(("gamma", "weight")):
            noise = np.ones_like(noise)
        elif name.endswith("pos_embed"):
            noise *= 0  # where in the tile something lies says nothing in pathology
        else:
            noise *= 0.5
        p.copy_(torch.from_numpy(noise))
    return encoder


# --------------------------------------------------------------------------------------------------------------------
# Dilated attention (LongNet, arXiv 2307.02486)
#
# Branch (W, R) cuts the sequence into segments of W tokens. Inside a segment, head h keeps every R-th token, starting
# at token h // ceil(H/R), so that the heads together see all of them. Only kept tokens ask, only kept tokens of the
# same segment answer. For head 0 and the branches (4, 1) and (16, 2), the query at position 6 sees the keys
#
#     position          0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
#     branch (4, 1)     .  .  .  .  k  k  k  k  .  .  .  .  .  .  .  .      near: its segment, every token
#     branch (16, 2)    k  .  k  .  k  .  k  .  k  .  k  .  k  .  k  .      far: every second token
#     how often, m      1  0  1  0  2  1  2  1  1  0  1  0  1  0  1  0      their multiset union
#
# LongNet runs one softmax attention per branch and mixes the outputs O_j by their softmax denominators Z_j. With the
# scores s_k = q.k_k / sqrt(D), over the keys k of branch j: Z_j = sum_k e^{s_k} and O_j = sum_k e^{s_k} v_k / Z_j, so
#
#     sum_j (Z_j / sum_i Z_i) O_j  =  sum_j sum_k e^{s_k} v_k / sum_i Z_i  =  sum_k m_k e^{s_k} v_k / sum_k m_k e^{s_k}
#
# The Z_j cancel: it is ONE softmax over the union of the branches' keys, a key that two branches keep counting twice.
# So a running log-sum-exp is carried through the branches and nothing is stored per branch. The backward follows from
# the same line. With LSE = log sum_k m_k e^{s_k} and P_k = m_k e^{s_k - LSE}, it is the one of plain attention:
#
#     dv_k = P_k dO      dP_k = dO.v_k      ds_k = P_k (dP_k - sum_i P_i dP_i) = P_k (dO.v_k - dO.O)
#
# m_k counts branches, so every one of these sums falls apart into one sum per branch, each with the same LSE and the
# same dO.O: the backward of each branch is that of plain attention with the final output and the final log-sum-exp in
# place of its own, and they add up. Upstream takes the mixing weights under no_grad and so drops a term; here it is
# exact.
#
# Zero padding counts: upstream pads segments with zero keys and values and does not mask them, so each padded slot adds
# e^0 = 1 to the denominators of its segment. The released weights were trained so (`pad_keys=True`).
# --------------------------------------------------------------------------------------------------------------------


def _fused(x):
    """Whether PyTorch's fused CPU kernel takes it: no n x n matrix, and any strides."""
    return x.device.type == "cpu"


def _attend(q, k, v):
    """Softmax attention with its log-sum-exp: [B,H,n,D] each -> out [B,H,n,D], lse [B,H,n]."""
    if _fused(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for i in range(0, q.shape[2], 1024):  # elsewhere a block of queries at a time, so memory stays linear
        s = (q[:, :, i : i + 1024] @ k.transpose(2, 3)).float() / math.sqrt(q.shape[3])
        lse[:, :, i : i + 1024] = s.logsumexp(-1)
        out[:, :, i : i + 1024] = (s - lse[:, :, i : i + 1024, None]).exp().to(q.dtype) @ v
    return out, lse


def _attend_backward(grad, q, k, v, out, lse):
    """Gradients of q, k, v, given `out` and `lse` of the whole union: P = e^{s - lse}, dS = P (dO v^T - dO.out)."""
    if _fused(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
    scale = 1 / math.sqrt(q.shape[3])
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i in range(0, q.shape[2], 1024):
        rows = slice(i, i + 1024)
        p = ((q[:, :, rows] @ k.transpose(2, 3)).float() * scale - lse[:, :, rows, None]).exp()
        delta = (grad[:, :, rows].float() * out[:, :, rows].float()).sum(-1, keepdim=True)
        ds = (p * ((grad[:, :, rows] @ v.transpose(2, 3)).float() - delta) * scale).to(q.dtype)
        dq[:, :, rows] = ds @ k
        dk += ds.transpose(2, 3) @ q[:, :, rows]
        dv += p.to(q.dtype).transpose(2, 3) @ grad[:, :, rows]
    return dq, dk, dv


def _branch_views(L, H, segments, dilations):
    """Yields (view, padded): every set of tokens that attend to one another, as a strided view.

    view: [B,L,H,...] -> [B,S,n,h,...]: S segments, the n tokens that h heads keep in each; no copy.
    padded: the number of zero keys that upstream's padding adds to each of these segments.
    """
    for W, R in zip(segments, dilations):
        W = min(W, L)
        slots = -(-W // R)  # keys a head sees in a segment, padding included
        per_offset = -(-H // R)  # heads that share an offset
        for offset in range(min(W, -(-H // per_offset))):
            heads = slice(offset * per_offset, min(H, (offset + 1) * per_offset))
            whole = L // W
            for start, count, length in ((0, whole, W), (whole * W, 1, L - whole * W)):  # whole segments; the rest
                kept = len(range(offset, length, R))
                if kept:

                    def view(x, start=start, count=count, length=length, offset=offset, R=R, heads=heads):
                        x = x[:, start : start + count * length].unflatten(1, (count, length))
                        return x[:, :, offset::R, heads]

                    yield view, slots - kept


class _DilatedAttention(torch.autograd.Function):
    """The torch path, and the specification of the kernels: branch by branch, through views of q, k, v [B,L,H,D]."""

    @staticmethod
    def forward(ctx, q, k, v, segments, dilations, pad_keys):
        B, L, H, D = q.shape
        accumulate = torch.promote_types(q.dtype, torch.float32)
        # [B,L,H,...] as everywhere, but each head's rows lie together in memory: a tenth faster to merge into.
        out = torch.zeros(B, H, L, D, dtype=accumulate, device=q.device).transpose(1, 2)
        lse = torch.full((B, H, L), -math.inf, dtype=accumulate, device=q.device).transpose(1, 2)
        for view, padded in _branch_views(L, H, segments, dilations):
            qv, kv, vv = (view(x).flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # [B*S,h,n,D]
            o, l = _attend(qv, kv, vv)  # [B*S,h,n,D], [B*S,h,n]
            old, total = view(lse), view(out)  # [B,S,n,h], [B,S,n,h,D]
            o = o.transpose(1, 2).view_as(total)  # [B,S,n,h,D]
            l = l.transpose(1, 2).reshape(old.shape).to(accumulate)  # [B,S,n,h]
            new = torch.logaddexp(old, l)
            if pad_keys and padded:
                new = torch.logaddexp(new, torch.full_like(new, math.log(padded)))
            total.mul_((old - new).exp().unsqueeze(-1)).addcmul_(o.to(accumulate), (l - new).exp().unsqueeze(-1))
            old.copy_(new)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.branches = segments, dilations
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        B, L, H, D = q.shape
        grads = [torch.zeros(B, L, H, D, dtype=lse.dtype, device=q.device) for _ in range(3)]
        for view, _ in _branch_views(L, H, *ctx.branches):
            # The zero keys of the padding add to the denominator alone, which is in lse already.
            gv, qv, kv, vv, ov = (view(x).flatten(0, 1).transpose(1, 2) for x in (grad, q, k, v, out))  # [B*S,h,n,D]
            lv = view(lse).flatten(0, 1).transpose(1, 2).contiguous()  # [B*S,h,n]
            for total, part in zip(grads, _attend_backward(gv, qv, kv, vv, ov, lv)):
                total = view(total)
                total += part.transpose(1, 2).view_as(total)  # [B,S,n,h,D]
        return *(g.to(q.dtype) for g in grads), None, None, None


# --------------------------------------------------------------------------------------------------------------------
# Dilated attention as Triton kernels
#
# The recurrence, for query i over the keys j of all branches one after the other (FlashAttention's, arXiv 2205.14135):
#
#     s_ij = q_i.k_j / sqrt(D)      m' = max(m, s_ij)      Z' = Z e^(m - m') + e^(s_ij - m')
#                                                        acc' = acc e^(m - m') + e^(s_ij - m') v_j
#     o_i = acc / Z                 LSE_i = m + log Z      (a padded zero key adds e^(0 - m) to Z and nothing to acc)
#
# and backward, with the same LSE in every branch and delta_i = dO_i.o_i:
#
#     P_ij = e^(s_ij - LSE_i)       dv_j = sum_i P_ij dO_i
#     dS_ij = P_ij (dO_i.v_j - delta_i)      dq_i = sum_j dS_ij k_j / sqrt(D)      dk_j = sum_i dS_ij q_i / sqrt(D)
#
# What it saves. Upstream gathers q, k and v of every branch (read and write 3 LC/R), attends (4 LC/R), scatters the
# result into zeros (LC + LC/R) and mixes the branches (15 LC in all): with R = 1, 2, 4, 8, 16, counted not measured,
# about 41 LC elements of memory traffic a layer. Here q, k, v are read in place and the output is written: 4 LC.
# In bfloat16 with C = 768 that is 0.63 against 0.06 GB a layer for L = 10,000, and 6.3 against 0.61 GB for L = 100,000.
# (Keys are read once per block of queries; those further reads hit the L2 cache as in any flash attention.)
#
# How. A program owns BLOCK rows of one head, every STEP-th position, STEP being the largest dilation: so a branch keeps
# all of a program's rows or none, and does no work for rows that it drops. It walks through the branches, in each
# through the segments that its rows touch, in each through the kept keys at segment start + offset + R t. In the
# backward the same walk serves twice: rows as queries (dq), rows as keys (dk, dv: who asks a key is whom it asks). No
# atomics, so the same input gives the same bits. The kernels repeat some lines of one another: with their masked loads
# in a shared function, one of them spilled registers.
#
# Limits, asserted by the wrapper: NVIDIA GPUs from sm_80 on; float32, bfloat16, float16 (accumulation in float32;
# float32 products in full precision, without tensor cores); D from 16 to 128, padded to a power of 2 inside; B * H <
# 65536; L below 2^31 / 16, the strides of a block's rows within 32 bits (L itself is addressed with 64).
# --------------------------------------------------------------------------------------------------------------------

if triton is not None:
    # Triton's interpreter (3.9) multiplies the bit patterns of bfloat16 in tl.dot: there, convert first.
    _INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

    @triton.jit
    def _dot(a, b, acc):
        """a @ b + acc, accumulated in float32; float32 products in full precision, not TF32."""
        if _INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc, input_precision="ieee")

    @triton.jit
    def _block_rows(STEP, BLOCK: tl.constexpr):
        """This program's rows: the first, and all of them int32 [BLOCK]. Every STEP-th position: with STEP the largest
        dilation, a branch keeps all rows of a block or none (up to segment borders): no lane idles."""
        block = tl.program_id(0)
        start = (block // STEP) * STEP * BLOCK + block % STEP
        return start, start + STEP * tl.arange(0, BLOCK)

    @triton.jit
    def _segment(branches, j, s, head, H, L, rows):
        """Segment s of branch j -> first kept position, R, how many it keeps, its padded slots, which rows it keeps."""
        W = tl.minimum(tl.load(branches + 2 * j), L)
        R = tl.load(branches + 2 * j + 1)
        offset = head // ((H + R - 1) // R)
        start = s * W
        length = tl.minimum(W, L - start)
        kept = tl.maximum(0, (length - offset + R - 1) // R)
        mine = (rows >= start) & (rows < start + length) & ((rows - start) % R == offset)
        return start + offset, R, kept, (W + R - 1) // R - kept, mine

    @triton.jit
    def _spread(N: tl.constexpr, stride, BLOCK_D: tl.constexpr):
        """Offsets [N,BLOCK_D] of N rows `stride` apart. 32 bits do inside a block, and take half the registers."""
        return (tl.arange(0, N) * stride)[:, None] + tl.arange(0, BLOCK_D)[None, :]

    @triton.jit
    def _forward_kernel(
        q, k, v, out, lse, branches, scale, L, H, D, STEP,
        q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
        N_BRANCHES: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """out [B,L,H,D] and lse [B,L,H] (in powers of 2) of a block of queries."""
        head, batch = tl.program_id(1) % H, (tl.program_id(1) // H).to(tl.int64)
        start, rows = _block_rows(STEP, BLOCK)
        channels = (tl.arange(0, BLOCK_D) < D)[None, :]
        inside = (rows < L)[:, None] & channels
        q += batch * q_b + head * q_h + start.to(tl.int64) * q_l
        k += batch * k_b + head * k_h
        v += batch * v_b + head * v_h
        qs = tl.load(q + _spread(BLOCK, STEP * q_l, BLOCK_D), inside, other=0.0)
        # In powers of 2, whose exponential the GPU has in hardware. m is finite, so that no inf - inf arises.
        m = tl.full([BLOCK], -1e30, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for j in range(N_BRANCHES):
            W = tl.minimum(tl.load(branches + 2 * j), L)
            for s in range(start // W, tl.minimum(start + STEP * (BLOCK - 1), L - 1) // W + 1):
                first, R, kept, padded, mine = _segment(branches, j, s, head, H, L, rows)
                if tl.max(mine.to(tl.int32)) > 0:
                    for t in range(0, kept, KEYS):
                        at = first.to(tl.int64) + R * t
                        live = t + tl.arange(0, KEYS) < kept
                        ks = tl.load(
                            k + at * k_l + _spread(KEYS, R * k_l, BLOCK_D), live[:, None] & channels, other=0.0
                        )
                        # s_ij = q_i k_j / sqrt(D)
                        x = _dot(qs, tl.trans(ks), None) * scale
                        x = tl.where(mine[:, None] & live[None, :], x, float("-inf"))
                        # m' = max(m, max_j s_ij);  Z' = Z e^(m - m') + sum_j e^(s_ij - m');  acc likewise
                        new = tl.maximum(m, tl.max(x, 1))
                        p = tl.exp2(x - new[:, None])
                        shrink = tl.exp2(m - new)
                        total = total * shrink + tl.sum(p, 1)
                        vs = tl.load(
                            v + at * v_l + _spread(KEYS, R * v_l, BLOCK_D), live[:, None] & channels, other=0.0
                        )
                        acc = _dot(p.to(vs.dtype), vs, acc * shrink[:, None])
                        m = new
                    if PAD:  # upstream's zero keys: e^0 each for Z, and nothing for acc
                        if padded > 0:
                            new = tl.where(mine, tl.maximum(m, 0.0), m)
                            shrink = tl.exp2(m - new)
                            total = total * shrink + tl.where(mine, padded * tl.exp2(-tl.maximum(new, 0.0)), 0.0)
                            acc = acc * shrink[:, None]
                            m = new
        asked = total > 0  # some branch keeps the query; the others get zeros
        total = tl.where(asked, total, 1.0)
        place = (batch * L + start) * H + head
        out += place * D
        tl.store(out + _spread(BLOCK, STEP * H * D, BLOCK_D), (acc / total[:, None]).to(out.dtype.element_ty), inside)
        lse += place
        tl.store(lse + STEP * H * tl.arange(0, BLOCK), tl.where(asked, m + tl.log2(total), 0.0), rows < L)

    @triton.jit
    def _dq_kernel(
        q, k, v, out, lse, grad, delta, dq, branches, scale, L, H, D, STEP,
        q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
        N_BRANCHES: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """dq [B,L,H,D] and delta [B,L,H] of a block of queries."""
        head, batch = tl.program_id(1) % H, (tl.program_id(1) // H).to(tl.int64)
        start, rows = _block_rows(STEP, BLOCK)
        channels = (tl.arange(0, BLOCK_D) < D)[None, :]
        inside = (rows < L)[:, None] & channels
        q += batch * q_b + head * q_h + start.to(tl.int64) * q_l
        k += batch * k_b + head * k_h
        v += batch * v_b + head * v_h
        place = (batch * L + start) * H + head  # out, grad and dq are contiguous [B,L,H,D]
        spread = _spread(BLOCK, STEP * H * D, BLOCK_D)
        qs = tl.load(q + _spread(BLOCK, STEP * q_l, BLOCK_D), inside, other=0.0)
        gs = tl.load(grad + place * D + spread, inside, other=0.0)
        os = tl.load(out + place * D + spread, inside, other=0.0)
        # delta_i = dO_i . O_i, which the kernel of dk and dv needs as well
        d = tl.sum(gs.to(tl.float32) * os.to(tl.float32), 1)
        tl.store(delta + place + STEP * H * tl.arange(0, BLOCK), d, rows < L)
        z = tl.load(lse + place + STEP * H * tl.arange(0, BLOCK), rows < L, other=0.0)
        acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for j in range(N_BRANCHES):
            W = tl.minimum(tl.load(branches + 2 * j), L)
            for s in range(start // W, tl.minimum(start + STEP * (BLOCK - 1), L - 1) // W + 1):
                first, R, kept, padded, mine = _segment(branches, j, s, head, H, L, rows)
                if tl.max(mine.to(tl.int32)) > 0:
                    for t in range(0, kept, KEYS):
                        at = first.to(tl.int64) + R * t
                        live = t + tl.arange(0, KEYS) < kept
                        ks = tl.load(
                            k + at * k_l + _spread(KEYS, R * k_l, BLOCK_D), live[:, None] & channels, other=0.0
                        )
                        vs = tl.load(
                            v + at * v_l + _spread(KEYS, R * v_l, BLOCK_D), live[:, None] & channels, other=0.0
                        )
                        x = _dot(qs, tl.trans(ks), None) * scale
                        # P_ij = e^(s_ij - LSE_i), the LSE that of the whole union
                        p = tl.exp2(tl.where(mine[:, None] & live[None, :], x - z[:, None], float("-inf")))
                        # dS_ij = P_ij (dO_i . v_j - delta_i);  dq_i = sum_j dS_ij k_j / sqrt(D)
                        ds = p * (_dot(gs, tl.trans(vs), None) - d[:, None])
                        acc = _dot(ds.to(ks.dtype), ks, acc)
        acc = acc * (scale * 0.6931471805599453)  # ln 2: scale carries log2(e)
        tl.store(dq + place * D + spread, acc.to(dq.dtype.element_ty), inside)

    @triton.jit
    def _dkv_kernel(
        q, k, v, lse, grad, delta, dk, dv, branches, scale, L, H, D, STEP,
        q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
        N_BRANCHES: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """dk and dv [B,L,H,D] of a block of keys. The queries that ask them are those that the same segments keep."""
        head, batch = tl.program_id(1) % H, (tl.program_id(1) // H).to(tl.int64)
        start, rows = _block_rows(STEP, BLOCK)
        channels = (tl.arange(0, BLOCK_D) < D)[None, :]
        inside = (rows < L)[:, None] & channels
        q += batch * q_b + head * q_h
        k += batch * k_b + head * k_h + start.to(tl.int64) * k_l
        v += batch * v_b + head * v_h + start.to(tl.int64) * v_l
        ks = tl.load(k + _spread(BLOCK, STEP * k_l, BLOCK_D), inside, other=0.0)
        vs = tl.load(v + _spread(BLOCK, STEP * v_l, BLOCK_D), inside, other=0.0)
        grad += batch * L * H * D + head * D
        lse += batch * L * H + head
        delta += batch * L * H + head
        acc_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        acc_v = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for j in range(N_BRANCHES):
            W = tl.minimum(tl.load(branches + 2 * j), L)
            for s in range(start // W, tl.minimum(start + STEP * (BLOCK - 1), L - 1) // W + 1):
                first, R, kept, padded, mine = _segment(branches, j, s, head, H, L, rows)
                if tl.max(mine.to(tl.int32)) > 0:
                    for t in range(0, kept, KEYS):
                        at = first.to(tl.int64) + R * t
                        live = t + tl.arange(0, KEYS) < kept
                        z = tl.load(lse + at * H + R * H * tl.arange(0, KEYS), live, other=0.0)
                        d = tl.load(delta + at * H + R * H * tl.arange(0, KEYS), live, other=0.0)
                        qs = tl.load(
                            q + at * q_l + _spread(KEYS, R * q_l, BLOCK_D), live[:, None] & channels, other=0.0
                        )
                        x = _dot(ks, tl.trans(qs), None) * scale
                        p = tl.exp2(tl.where(mine[:, None] & live[None, :], x - z[None, :], float("-inf")))
                        gs = tl.load(
                            grad + at * H * D + _spread(KEYS, R * H * D, BLOCK_D), live[:, None] & channels, other=0.0
                        )
                        # dv_j = sum_i P_ij dO_i;  dk_j = sum_i dS_ij q_i / sqrt(D)
                        acc_v = _dot(p.to(gs.dtype), gs, acc_v)
                        ds = p * (_dot(vs, tl.trans(gs), None) - d[None, :])
                        acc_k = _dot(ds.to(qs.dtype), qs, acc_k)
        place = ((batch * L + start) * H + head) * D
        spread = _spread(BLOCK, STEP * H * D, BLOCK_D)
        tl.store(dk + place + spread, (acc_k * (scale * 0.6931471805599453)).to(dk.dtype.element_ty), inside)
        tl.store(dv + place + spread, acc_v.to(dv.dtype.element_ty), inside)


def _launch_options(kernel, D, dtype):
    """Rows and keys of a block, warps, pipeline stages: the largest that spill nothing on sm_80 to sm_90 (D <= 64)."""
    table = {  # float32; 16 bits
        _forward_kernel: ((32, 32, 8, 2), (64, 64, 4, 1)),
        _dq_kernel: ((64, 32, 8, 2), (64, 32, 4, 1)),
        _dkv_kernel: ((32, 16, 4, 2), (64, 32, 8, 2)),
    }
    rows, keys, warps, stages = table[kernel][dtype != torch.float32]
    if D > 64:
        rows, keys = rows // 2, 16
    width = max(16, 1 << (D - 1).bit_length())
    return {"BLOCK": rows, "KEYS": keys, "BLOCK_D": width, "num_warps": warps, "num_stages": stages}


def _launch(kernel, tensors, sizes, strides, **constants):
    """Runs a kernel on the grid that covers every row of every head."""
    _, L, H, D, step = sizes
    options = _launch_options(kernel, D, tensors[0].dtype)
    grid = (step * -(-L // (step * options["BLOCK"])), tensors[0].shape[0] * H)
    kernel[grid](*tensors, *sizes, *strides, **constants, **options)


class _TritonDilatedAttention(torch.autograd.Function):
    """The same by the Triton kernels: one forward, two backward."""

    @staticmethod
    def forward(ctx, q, k, v, segments, dilations, pad_keys):
        B, L, H, D = q.shape
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty(B, L, H, D, dtype=q.dtype, device=q.device)
        lse = torch.empty(B, L, H, dtype=torch.float32, device=q.device)  # of powers of 2
        # A segment longer than the sequence is the sequence: so W fits into 32 bits, whatever the schedule.
        branches = [(min(W, L), R) for W, R in zip(segments, dilations)]
        branches = torch.tensor(branches, dtype=torch.int32, device=q.device)
        ctx.sizes = math.log2(math.e) / math.sqrt(D), L, H, D, max(dilations)
        ctx.strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
        ctx.save_for_backward(q, k, v, out, lse, branches)
        tensors = q, k, v, out, lse, branches
        _launch(_forward_kernel, tensors, ctx.sizes, ctx.strides, N_BRANCHES=len(segments), PAD=pad_keys)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, branches = ctx.saved_tensors
        grad, delta = grad.contiguous(), torch.empty_like(lse)
        dq, dk, dv = (torch.empty_like(out) for _ in range(3))
        # The first also fills delta, which the second reads.
        tensors = q, k, v, out, lse, grad, delta, dq, branches
        _launch(_dq_kernel, tensors, ctx.sizes, ctx.strides, N_BRANCHES=len(branches))
        tensors = q, k, v, lse, grad, delta, dk, dv, branches
        _launch(_dkv_kernel, tensors, ctx.sizes, ctx.strides, N_BRANCHES=len(branches))
        return dq, dk, dv, None, None, None


def _kernel_refuses(q, k, v, dilations):
    """Why the Triton kernels cannot take this, or None."""
    B, L, H, D = q.shape
    if triton is None:
        return 'triton is not installed (Linux only); use impl="torch"'
    if int(triton.__version__.split(".")[0]) < 3:
        return f"triton {triton.__version__} is too old, 3.0 is needed"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the Triton kernels need a GPU, the tensors are on {q.device}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels take float32, bfloat16 or float16, not {q.dtype}"
    if not 16 <= D <= 128:
        return f"the Triton kernels take a head dim from 16 to 128, not {D}"
    if B * H > 65535:
        return f"the Triton kernels take at most 65,535 heads in all, not {B * H}"
    if max(64 * max(dilations) * max(x.stride(1) for x in (q, k, v)), L + 64 * max(dilations)) >= 2**31:
        return f"a sequence of {L} with these strides is too long for the Triton kernels"
    return None


def dilated_attention(q, k, v, segments, dilations, pad_keys=True, impl="auto"):
    """LongNet's dilated attention: q, k, v [B,L,H,D] -> [B,L,H,D]. Differentiable; memory is linear in L.

    segments, dilations: the branches' W and R, one each. pad_keys: count upstream's zero padding (see above); False is
    the clean variant for training from scratch. A query that no branch keeps gets zeros. impl: "torch", "triton", or
    "auto": Triton on a GPU that it can serve, torch elsewhere. Raises ValueError where "triton" is named and cannot
    serve. Source: torchscale's DilatedAttention as Prov-GigaPath uses it.
    """
    if len(segments) != len(dilations) or q.shape != k.shape or q.shape != v.shape or q.dim() != 4:
        raise ValueError(
            f"q, k, v must be [B,L,H,D] alike and segments as many as dilations, not {list(q.shape)}, {list(k.shape)}, "
            f"{list(v.shape)}, {segments}, {dilations}"
        )
    if impl not in ("torch", "triton", "auto"):
        raise ValueError(f'impl must be "torch", "triton" or "auto", not "{impl}"')
    refusal = _kernel_refuses(q, k, v, dilations) if impl == "triton" or q.is_cuda else "not on a GPU"
    if impl == "triton" and refusal:
        raise ValueError(refusal)
    function = _DilatedAttention if refusal or impl == "torch" else _TritonDilatedAttention
    return function.apply(q, k, v, tuple(segments), tuple(dilations), pad_keys)


# --------------------------------------------------------------------------------------------------------------------
# Slide encoder: all tiles of a slide -> tiles in context (LongNet, names as in Prov-GigaPath)
# --------------------------------------------------------------------------------------------------------------------


def grid_cells(coords, tile_size=TILE, grid=1000):
    """Tiles' coords [...,2] -> their places in the position grid. Raises ValueError for a place outside of it: level-0
    coordinates given instead of 0.5 um/px look like this."""
    cells = torch.div(coords, tile_size, rounding_mode="floor")
    if cells.numel() and (cells.min() < 0 or cells.max() >= grid):
        raise ValueError(
            f"tile position {cells.min().item():.0f}..{cells.max().item():.0f} is outside the grid 0..{grid - 1}: "
            f"are the coordinates in pixels at the tiled resolution?"
        )
    return cells


def position_embedding(coords, width, tile_size=TILE, grid=1000):
    """Fixed 2-D sin-cos embedding of tiles: coords [...,2] (x, y) in pixels at the tiled resolution -> [...,C].

    The first half of the channels encodes the row (y), the second the column (x), each as [sin | cos] of
    cell / 10000^(i / (C/4)). Computed from the cells: upstream looks them up in a table of grid^2 rows, 3 GB at 768.
    Raises ValueError for a cell outside the grid.
    """
    cells = grid_cells(coords, tile_size, grid)
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    angle = cells.cpu().double().flip(-1).unsqueeze(-1) * frequency  # [...,2 (y, x),C/4]
    embedding = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)  # [...,2,C/2] -> [...,C]
    return embedding.to(coords.device, torch.float32)


def pool_tokens(tokens, n):
    """Average [B,N,C] along the raster-ordered sequence into n visual tokens [B,n,C]; fewer than n tokens repeat."""
    return F.adaptive_avg_pool1d(tokens.transpose(1, 2), n).transpose(1, 2)  # [B,C,N] -> [B,C,n] -> [B,n,C]


def in_parts(function, *tensors):
    """function(*tensors), tensors [...,L,C] that it treats token by token, a part of the sequence at a time.

    On a CPU, what lies between two matmuls then stays in the cache, a tenth of the time of a slide of 10,000 tiles;
    everywhere, the 4 times wider rows of an FFN add up on long slides. With gradients, they are kept anyway: in one
    piece.
    """
    rows = 512 if tensors[0].device.type == "cpu" else 16384
    if torch.is_grad_enabled() or tensors[0].shape[-2] <= rows:
        return function(*tensors)
    parts = [function(*part) for part in zip(*(x.split(rows, dim=-2) for x in tensors))]
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(part, dim=-2) for part in zip(*parts))
    return torch.cat(parts, dim=-2)


class SlideAttention(nn.Module):
    """LongNet's attention, less the attention itself: what comes before it and after it is done token by token."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.q_proj = nn.Linear(cfg.width, cfg.width)
        self.k_proj = nn.Linear(cfg.width, cfg.width)
        self.v_proj = nn.Linear(cfg.width, cfg.width)
        self.inner_attn_ln = nn.LayerNorm(cfg.width, eps=1e-5)  # sub-LN: keeps deep, wide-gain networks stable
        self.out_proj = nn.Linear(cfg.width, cfg.width)

    def heads(self, x):
        """[B,L,C] -> q, k, v, each [B,H,L,D]."""
        B, L, C = x.shape
        shape = (B, L, self.cfg.heads, C // self.cfg.heads)
        return tuple(proj(x).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))

    def merge(self, attended):
        """[B,H,L,D] -> [B,L,C]."""
        x = attended.transpose(1, 2).flatten(2)  # [B,L,H,D] -> [B,L,C]
        return self.out_proj(self.inner_attn_ln(x))


class SlideFFN(nn.Module):
    """LongNet's feed-forward layer, [B,L,C] -> [B,L,C], with the sub-LN between its two matrices."""

    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(cfg.width, cfg.mlp_hidden)
        self.ffn_layernorm = nn.LayerNorm(cfg.mlp_hidden, eps=1e-5)
        self.fc2 = nn.Linear(cfg.mlp_hidden, cfg.width)

    def forward(self, x):
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))


class SlideLayer(nn.Module):
    """A LongNet layer, [B,L,C] -> [B,L,C]. All but the attention is done token by token, in parts."""

    def __init__(self, cfg, drop_path):
        super().__init__()
        self.cfg, self.drop_path = cfg, drop_path
        self.dropout = nn.Dropout(cfg.dropout)
        self.self_attn_layer_norm = nn.LayerNorm(cfg.width, eps=1e-5)
        self.self_attn = SlideAttention(cfg)
        self.final_layer_norm = nn.LayerNorm(cfg.width, eps=1e-5)
        self.ffn = SlideFFN(cfg)

    def residual(self, x, update):
        """x + update, with dropout, and in training now and then without the update at all (stochastic depth)."""
        update = self.dropout(update)
        if self.training and self.drop_path > 0:
            keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path  # [B,1,1]: whole slides
            update = update * keep / (1 - self.drop_path)
        return x + update

    def before(self, x):
        """[B,L,C] -> q, k, v, each [B,H,L,D]."""
        return self.self_attn.heads(self.self_attn_layer_norm(x))

    def after(self, x, attended):
        """The layer's input [B,L,C], what attention made of it [B,H,L,D] -> the layer's output [B,L,C]."""
        x = self.residual(x, self.self_attn.merge(attended))
        return self.residual(x, self.ffn(self.final_layer_norm(x)))

    def forward(self, x):
        q, k, v = (y.transpose(1, 2) for y in in_parts(self.before, x))  # [B,L,H,D]
        attended = dilated_attention(q, k, v, self.cfg.segments, self.cfg.dilations, self.cfg.pad_keys)
        return in_parts(self.after, x, attended.transpose(1, 2))  # attended: [B,L,H,D] -> [B,H,L,D]


class SlideEncoder(nn.Module):
    """Prov-GigaPath's slide encoder (LongNet): tiles see one another through dilated attention.

    (features [B,N,C_tile], coords [B,N,2] in pixels at the tiled resolution) -> (cls [B,C], tokens [B,N,C]), both after
    the final norm. Parameter names are those of the published `slide_encoder.pth`. Slides in one batch have the same N.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.checkpointing = False  # True: recompute the layers in the backward pass, for long slides
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(cfg.in_width, cfg.width)})
        self.dropout = nn.Dropout(cfg.dropout)
        rates = [cfg.drop_path * i / max(1, cfg.depth - 1) for i in range(cfg.depth)]
        layers = nn.ModuleList(SlideLayer(cfg, rate) for rate in rates)
        self.encoder = nn.ModuleDict({"layers": layers, "layer_norm": nn.LayerNorm(cfg.width, eps=1e-5)})
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6)

    def encode(self, features, coords):
        """-> [B,1+N,C] before the final norm, the CLS first."""
        B, _, _ = features.shape
        x = self.patch_embed["proj"](features)  # [B,N,C]
        x = x + position_embedding(coords, self.cfg.width, self.cfg.tile_size, self.cfg.grid).to(x.dtype)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)  # [B,1+N,C]; the CLS has no position
        x = self.dropout(x)
        recompute = self.checkpointing and torch.is_grad_enabled()
        for layer in self.encoder["layers"]:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return self.encoder["layer_norm"](x)

    @torch.no_grad()
    def standardize_inputs(self, features):
        """Sets an untrained encoder's first layer so that these features [N,C_tile] enter with mean 0 and deviation 1.

        What all tiles have in common is many times what tells them apart; untreated, it stalls the training of stage 1.
        """
        std, mean = torch.std_mean(features.float(), dim=0)  # [C_tile] each
        proj = self.patch_embed["proj"]
        proj.weight /= std.clamp(min=1e-4)
        proj.bias -= proj.weight @ mean

    def forward(self, features, coords):
        x = self.norm(self.encode(features, coords))  # [B,1+N,C]
        return x[:, 0], x[:, 1:]

    def visual_tokens(self, features, coords, n):
        """What the language model sees: the tiles in context, pooled to n tokens, then normed [B,n,C]. No CLS."""
        return self.norm(pool_tokens(self.encode(features, coords)[:, 1:], n))


# --------------------------------------------------------------------------------------------------------------------
# Text encoder and the model of stage 1: slides and reports meet in one space (CLIP, arXiv 2103.00020)
# --------------------------------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """Reports -> [B,C]: the LLM's (frozen) token embeddings [B,T,C_llm], a mask [B,T] (True: a token), a small
    bidirectional Transformer, mean over the tokens.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Linear(cfg.in_width, cfg.width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, cfg.max_length, cfg.width))
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, cfg.mlp_hidden, 1.0) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6)

    def forward(self, token_embeds, mask):
        _, T, C = token_embeds.shape
        # An LLM's embeddings are small, and differ in size from one LLM to the next: normed, or the words drown.
        x = self.embed(F.layer_norm(token_embeds, (C,))) + self.pos_embed[:, :T]  # [B,T,C_llm] -> [B,T,C]
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])  # [B,1,1,T]: nobody looks at the padding
        x = self.norm(x) * mask.unsqueeze(-1)  # [B,T,C], zero at the padding
        return x.sum(1) / mask.sum(1, keepdim=True)  # [B,C] / [B,1]


class WSITextAlignment(nn.Module):
    """Stage 1: slide encoder, text encoder, a linear head each to the shared space, and CLIP's temperature.

    A slide's embedding is the mean of its visual tokens, not the CLS: the tokens are what the language model reads
    later, and a loss on the CLS alone would leave their last layer untrained.
    """

    def __init__(self, cfg):
        super().__init__()
        self.n_visual_tokens = cfg.n_visual_tokens
        self.slide_encoder = SlideEncoder(cfg.slide_encoder)
        self.text_encoder = TextEncoder(cfg.text_encoder)
        self.slide_head = nn.Linear(cfg.slide_encoder.width, cfg.text_encoder.embed_width, bias=False)
        self.text_head = nn.Linear(cfg.text_encoder.width, cfg.text_encoder.embed_width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_slides(self, features, coords):
        """features [B,N,C_tile], coords [B,N,2] -> [B,E] of unit length."""
        tokens = self.slide_encoder.visual_tokens(features, coords, self.n_visual_tokens)
        return F.normalize(self.slide_head(tokens.mean(1)), dim=-1)

    def embed_texts(self, token_embeds, mask):
        """token_embeds [B,T,C_llm], mask [B,T] -> [B,E] of unit length."""
        return F.normalize(self.text_head(self.text_encoder(token_embeds, mask)), dim=-1)

    def embed_words(self, ids, words):
        """ids: B lists of tokens; words: the LLM's token embeddings [vocab,C] -> [B,E] of unit length."""
        ids = [torch.tensor(row, device=words.device) for row in ids]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)  # [B,T]
        return self.embed_texts(F.embedding(ids.clamp(min=0), words).to(self.logit_scale.dtype), ids >= 0)

    def loss(self, slides, texts):
        """Symmetric InfoNCE over a batch of pairs [B,E]: each slide finds its report, each report its slide."""
        logits = self.logit_scale.exp().clamp(max=100) * slides @ texts.T  # [B slides,B texts]
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# --------------------------------------------------------------------------------------------------------------------
# Llama (names as in Hugging Face, less their leading "model.")
# --------------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """[...,C] divided by its root mean square (arXiv 1910.07467), in float32 whatever the dtype."""

    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)  # [...,C] * [...,1]
        return self.weight * y.to(x.dtype)


def rotary_tables(start, T, D, theta, device, dtype):
    """cos and sin [T,D] for positions start..start+T-1, in the half-split layout: channel i turns with i + D/2."""
    frequency = theta ** -(torch.arange(0, D, 2, device=device).float() / D)  # [D/2]
    angle = torch.arange(start, start + T, device=device).float()[:, None] * frequency  # [T,D/2]
    angle = torch.cat([angle, angle], dim=-1)  # [T,D]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """x [B,H,T,D] turned by its position. Channels pair up by halves, as the weights want it, not as neighbours."""
    a, b = x.chunk(2, dim=-1)  # [B,H,T,D/2] each
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class KVCache:
    """Keys and values of all positions so far, allocated once: per layer [B,H_kv,capacity,D] twice."""

    def __init__(self, cfg, batch, capacity, device, dtype):
        shape = (cfg.depth, 2, batch, cfg.kv_heads, min(capacity, cfg.context), cfg.width // cfg.heads)
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer, k, v):
        """Stores k, v [B,H_kv,T,D] of the new positions; returns all up to them."""
        end = self.length + k.shape[2]
        if end > self.kv.shape[4]:
            raise ValueError(f"the cache holds {self.kv.shape[4]} positions, {end} are needed")
        self.kv[layer, 0, :, :, self.length : end] = k
        self.kv[layer, 1, :, :, self.length : end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions, [B,T,C] -> [B,T,C]. A key head may serve a group of query heads.

    cos, sin: rotary_tables of the T positions. cache: the KVCache that holds the positions before them in its `layer`,
    or None: there are none.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.head_dim = cfg, cfg.width // cfg.heads
        self.q_proj = nn.Linear(cfg.width, cfg.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.width, cfg.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.width, cfg.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.heads * self.head_dim, cfg.width, bias=False)

    def forward(self, x, cos, sin, cache, layer):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B,H,T,D]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B,H_kv,T,D]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B,H_kv,T,D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # [B,H_kv,past+T,D]
        past, mask = k.shape[2] - T, None
        if past and T > 1:  # a later turn of a chat: row t sees everything before it, and itself
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        causal = past == 0 and T > 1
        grouped = self.cfg.kv_heads != self.cfg.heads
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return self.o_proj(x.transpose(1, 2).reshape(B, T, -1))  # [B,H,T,D] -> [B,T,H*D]


class LlamaMLP(nn.Module):
    """SwiGLU, [B,T,C] -> [B,T,C], its gate and value in separate matrices, unlike the ViT's."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.width, cfg.mlp_hidden, bias=False)
        self.up_proj = nn.Linear(cfg.width, cfg.mlp_hidden, bias=False)
        self.down_proj = nn.Linear(cfg.mlp_hidden, cfg.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    """Pre-norm decoder layer, [B,T,C] -> [B,T,C]. Arguments as for LlamaAttention."""

    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.self_attn = LlamaAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.mlp = LlamaMLP(cfg)

    def forward(self, x, cos, sin, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A Llama decoder: ids [B,T] or embeds [B,T,C] -> logits [B,T,vocab].

    cache: a KVCache that holds the positions before these, and then these too. last_only: logits of the last position
    alone, [B,1,vocab]. only: a mask [B,T] of the n positions whose logits are wanted, [n,vocab]. Raises UserError where
    the positions exceed the context that the weights were trained for.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.width)
        self.layers = nn.ModuleList(LlamaLayer(cfg) for _ in range(cfg.depth))
        self.norm = RMSNorm(cfg.width, cfg.eps)
        self.lm_head = nn.Linear(cfg.width, cfg.vocab, bias=False)

    def forward(self, ids=None, embeds=None, cache=None, last_only=False, only=None):
        x = self.embed_tokens(ids) if embeds is None else embeds
        B, T, C = x.shape
        past = cache.length if cache is not None else 0
        if past + T > self.cfg.context:
            raise UserError(
                f"the prompt is too long: {past + T} tokens, the language model's context holds {self.cfg.context}; "
                f"shorten the question or start a new chat"
            )
        cos, sin = rotary_tables(past, T, C // self.cfg.heads, self.cfg.rope_theta, x.device, x.dtype)
        for i, layer in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, cache, i, use_reentrant=False)
            else:
                x = layer(x, cos, sin, cache, i)
        if cache is not None:
            cache.length += T
        if last_only:
            x = x[:, -1:]  # [B,1,C]
        elif only is not None:
            x = x[only]  # [n,C]
        return self.lm_head(self.norm(x))


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update (LoRA, arXiv 2106.09685): W x + (alpha / r) B A x."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, dtype=base.weight.dtype))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=base.weight.dtype))  # so it starts as W
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        update = self.scale * F.linear(self.dropout(x), self.lora_a)  # [...,r]: scaled here, where it is narrow
        return self.base(x) + F.linear(update, self.lora_b)

    @torch.no_grad()
    def merged(self, dtype=None):
        """-> the linear layer with W + (alpha / r) B A for W, summed in float32, then cast to dtype (None: W's).

        In W's own memory where the dtype stays: files are mapped copy-on-write, so a merged 7B takes its size once.
        """
        weight = self.base.weight.data
        total = weight.float() + self.scale * (self.lora_b.float() @ self.lora_a.float())
        self.base.weight.data = weight.copy_(total) if dtype in (None, weight.dtype) else total.to(dtype)
        return self.base


def decoder_linears(llama):
    """The linear layers of the decoder's blocks, the lm_head not -> [(module that holds it, name, layer)]."""
    return [
        (part, name, child)
        for layer in llama.layers
        for part in (layer.self_attn, layer.mlp)
        for name, child in part.named_children()
    ]


def add_lora(llama, rank, alpha, target=".*", dropout=0.0):
    """Wraps the linear layers of the decoder's blocks whose names match `target` and freezes the rest. The default is
    LLaVA's choice: all of them, the lm_head not. Raises UserError where none matches."""
    llama.requires_grad_(False)
    for part, name, child in decoder_linears(llama):
        if re.fullmatch(target, name):
            setattr(part, name, LoRALinear(child, rank, alpha, dropout))
    if not any(isinstance(module, LoRALinear) for module in llama.modules()):
        raise UserError(
            f"--lora-target {target} matches none of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
        )


def merge_lora(llama, dtype=None):
    """Takes the adapters out again, their sum with the weights in their place -> the llama. dtype: as for merged."""
    for part, name, child in decoder_linears(llama):
        if isinstance(child, LoRALinear):
            setattr(part, name, child.merged(dtype))
    return llama


class _Int8Product(torch.autograd.Function):
    """x W^T, where W is `weight` int8 [out,in] times `scale` [out]. Only x gets a gradient, and W never lasts in full
    precision: the backward makes it anew."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        rows = x.numel() // x.shape[-1]
        # A few rows cost what reading the weights costs, and PyTorch's CPU kernel reads them as int8. It takes
        # bfloat16, and reads past the end of rows that are no multiple of 32. Many rows are worth a real matmul; |int8|
        # < 2^8 is exact in every dtype.
        if x.device.type == "cpu" and rows <= 16 and x.shape[-1] % 32 == 0:
            y = torch._weight_int8pack_mm(x.reshape(rows, -1).bfloat16(), weight, scale.bfloat16())
            return y.view(*x.shape[:-1], -1).to(x.dtype)  # [rows,out] -> [...,out]
        return x @ weight.to(x.dtype).T * scale.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        return (grad * scale.to(grad.dtype)) @ weight.to(grad.dtype), None, None


class Int8Linear(nn.Module):
    """A linear layer's weight rounded to int8, with a scale for each output channel: half of bfloat16's memory.

    Every weight is off by at most scale / 2. The scale is rounded to bfloat16 before the weights are rounded to it, so
    storing it in 16 bits loses nothing. For inference; a gradient with respect to the input passes.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1).clamp(min=1e-12) / 127).bfloat16()
        self.register_buffer("weight", (weight / scale.float()[:, None]).round().to(torch.int8))  # [out,in]
        self.register_buffer("scale", scale)  # [out]

    def forward(self, x):
        return _Int8Product.apply(x, self.weight, self.scale)


def quantize_int8(llama):
    """Rounds the linear layers of the decoder's blocks to int8, adapters merged first, layer by layer -> the llama.

    So memory holds one layer twice, not the model (what is mapped from a file is read a layer at a time as well). The
    embedding and the lm_head stay: 4% of a 7B model, one of them only looked up, and the other's error would go
    straight into the logits.
    """
    for part, name, child in decoder_linears(llama):
        setattr(part, name, Int8Linear(child.merged() if isinstance(child, LoRALinear) else child))
    return llama


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer and prompt
# --------------------------------------------------------------------------------------------------------------------

IMAGE_TOKEN = -200  # stands in a sequence of ids where the visual tokens go; LLaVA's value
IGNORE = -100  # label of a position that carries no loss; PyTorch's ignore_index
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def without_image(text):
    """A question without the mark for the slide, which stands on a line of its own before or after it."""
    return re.sub(r"\n?<image>\n?", "", text)


def slide_first(turns, image=True):
    """Turns as the model is taught and asked them: the slide comes first, wherever a row has its mark, as in LLaVA; or,
    with image False, not at all."""
    turns = [{**turn, "value": without_image(turn["value"])} for turn in turns]
    turns[0]["value"] = "<image>\n" * image + turns[0]["value"]
    return turns


class Tokenizer:
    """SentencePiece with Llama's conventions (BOS 1, EOS 2) and LLaVA's prompts (`vicuna_v1` and plain)."""

    def __init__(self, path):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such tokenizer; a language model's folder holds it as tokenizer.model")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(
                f"{path}: not a SentencePiece model; copy the language model's tokenizer.model again"
            ) from None
        self.bos, self.eos = self.sp.bos_id(), self.sp.eos_id()

    def encode(self, text, bos=False):
        """-> ids, a list; bos: with the BOS before them."""
        return [self.bos] * bos + self.sp.encode(text)

    def decode(self, ids):
        """ids -> text; the places of images are left out."""
        return self.sp.decode([i for i in ids if i >= 0])

    def encode_chat(self, turns):
        """LLaVA's vicuna_v1 prompt: turns [{"from": "human" | "gpt", "value": str}, ...] -> ids, labels (lists).

        <image> in a human turn becomes IMAGE_TOKEN; the text before and after it is encoded separately. Labels are the
        answers and their </s>, IGNORE elsewhere. Where the last turn is the human's, the ids end in "ASSISTANT:", ready
        to be continued.
        """
        ids, labels, prompt = [self.bos], [IGNORE], SYSTEM + " "
        for turn in turns:
            if turn["from"] == "human":
                prompt += f"USER: {turn['value']} ASSISTANT:"
                pieces = prompt.split("<image>")
                new = self.encode(pieces[0].rstrip(" ") if pieces[1:] else pieces[0])
                for piece in pieces[1:]:
                    new += [IMAGE_TOKEN] + self.encode(piece)
                ids += new
                labels += [IGNORE] * len(new)
            else:
                new = self.encode(turn["value"]) + [self.eos]
                ids += new
                labels += new
            prompt = ""
        return ids, labels

    def encode_plain(self, report):
        """LLaVA's plain form, for stage 2: the image, then its report, nothing else -> ids, labels."""
        answer = self.encode(report) + [self.eos]
        return [self.bos, IMAGE_TOKEN] + answer, [IGNORE, IGNORE] + answer


# --------------------------------------------------------------------------------------------------------------------
# Files: read strictly, written whole or not at all
# --------------------------------------------------------------------------------------------------------------------


# What Python, PyTorch, safetensors and zipfile raise over a damaged file, or over values of another type than expected.
BAD_FILE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, EOFError)
BAD_FILE += (MemoryError, pickle.PickleError, safetensors.SafetensorError, zipfile.BadZipFile, zlib.error, struct.error)


def one_line(text, limit=200):
    """Text of a file, a server or an exception, fit to be printed: its first line, without control characters."""
    lines = printable(str(text)).strip().splitlines() or [""]
    return lines[0] if len(lines[0]) <= limit else lines[0][:limit] + "..."


def printable(text):
    """The text without what steers a terminal: control characters but line ends and tabs, and changes of direction."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "", text)


@contextlib.contextmanager
def reading(path, hint):
    """Whatever goes wrong inside, with a file of the user's, becomes one line: the file, what is wrong, the hint.

    Every reader of a file stands inside of one, and checks there the types and shapes that it relies on.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {hint}") from None
    except BAD_FILE as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else one_line(error) or type(error).__name__
        raise UserError(f"{path}: {reason}; {hint}") from None


@contextlib.contextmanager
def replacing(path):
    """A temporary path to write to, renamed to `path` at the end: a reader never sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")  # no other's, on whatever machine that is
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the user's umask; safetensors makes files that their owner alone can read
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path, tensors, metadata=None):
    """{name: tensor}, on whatever device, -> a .safetensors file. metadata: {text: text}."""
    with replacing(path) as temporary:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary, metadata)


def read_json(path, hint):
    """The object in a JSON file. Raises UserError; `hint` says there what the file would be part of."""
    try:
        values = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {hint}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {hint}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object; {hint}")
    return values


def read_tensors(path):
    """{name: tensor} of a .safetensors or a PyTorch file, mapped and not copied. Nothing is ever unpickled.

    Raises UserError for a file that is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6: not mappable
    except (safetensors.SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason}); copy or download it again") from None


def load_strict(module, tensors, source, table=(), dtype=None, only=r".*"):
    """Fills `module` (on any device, also meta) from {name: tensor}: every tensor used, every parameter filled.

    table: (pattern, replacement) rows, tried in order by re.fullmatch; a replacement of None drops the key on purpose.
    only: the parameters to fill, a pattern for re.fullmatch, where a file holds a part of the module.
    Raises UserError that names the missing and extra keys and the wrong shapes, with `source` first.
    """
    expected = {name: p for name, p in module.state_dict().items() if re.fullmatch(only, name)}
    found, problems = {}, []
    for key, tensor in tensors.items():
        name = key
        for pattern, replacement in table:
            if re.fullmatch(pattern, key):
                name = replacement and re.sub(pattern, replacement, key)
                break
        if name is None:
            continue
        if not isinstance(tensor, torch.Tensor) or name not in expected:
            problems.append(("keys that the model lacks", key))
        elif name in found:
            problems.append(("two keys of one parameter", key))
        elif tensor.shape != expected[name].shape:
            problems.append(("wrong shapes", f"{key} is {list(tensor.shape)}, not {list(expected[name].shape)}"))
            found[name] = None
        else:
            found[name] = tensor if dtype is None else tensor.to(dtype)
    problems += [("missing keys", name) for name in expected if name not in found]
    if problems:
        kinds = {}
        for kind, what in problems:
            kinds.setdefault(kind, []).append(what)
        text = "; ".join(f"{kind} ({len(x)}): {', '.join(x[:3])}{', ...' * (len(x) > 3)}" for kind, x in kinds.items())
        raise UserError(f"{source}: does not fit {type(module).__name__}: {text}")
    module.load_state_dict(found, assign=True, strict=False)  # checked above
    return module


def fingerprint(module):
    """A short hash of a module's weights: names, shapes and the first 4,096 values of each tensor (bf16-rounded, so
    that a copy saved in half precision counts as the same). What one model made carries it, so that it meets only that
    model.
    """
    digest = hashlib.sha256()
    for name, p in sorted(module.state_dict().items()):
        sample = p.detach().flatten()[:4096].to("cpu", torch.bfloat16).float()
        digest.update(f"{name}{list(p.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def load_config(folder):
    """The WSILLaVAConfig in `folder`/config.json, as a training stage or WSILLaVA.save left it."""
    path = Path(folder) / "config.json"
    try:
        return WSILLaVAConfig.from_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {folder} holds no trained model") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a config of this project ({error})") from None


# --------------------------------------------------------------------------------------------------------------------
# The whole model
# --------------------------------------------------------------------------------------------------------------------


def make_projector(in_width, width):
    """LLaVA-1.5's `mlp2x_gelu`: visual tokens -> the language model's embedding space."""
    return nn.Sequential(nn.Linear(in_width, width), nn.GELU(), nn.Linear(width, width))


def _sample(logits, top_p, top_k, generator):
    """One token a row from logits [B,vocab] (nucleus sampling, arXiv 1904.09751)."""
    logits, order = logits.sort(dim=-1, descending=True)
    p = logits.softmax(-1)
    drop = p.cumsum(-1) - p >= top_p  # the mass before a token is enough already
    drop[:, 0] = False  # the first always stays
    if top_k:
        drop[:, top_k:] = True
    choice = torch.multinomial(p.masked_fill(drop, 0), 1, generator=generator)
    return order.gather(-1, choice)[:, 0]


def _repeating(ids, n):
    """The tokens that would complete an n-gram which the ids already hold."""
    last = ids[len(ids) - n + 1 :]
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == last]


class WSILLaVA(nn.Module):
    """Slide encoder, projector and language model. The tile encoder stays outside: its features are on disk."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.slide_encoder = None if cfg.no_slide_encoder else SlideEncoder(cfg.slide_encoder)
        self.mm_projector = make_projector(cfg.pad_to, cfg.llama.width)
        self.llama = Llama(cfg.llama)
        if cfg.lora_rank:
            add_lora(self.llama, cfg.lora_rank, cfg.lora_alpha, cfg.lora_target)

    @property
    def device(self):
        return self.mm_projector[0].weight.device

    def encode_slide(self, features, coords):
        """features [N,C_tile], coords [N,2] of one slide -> its visual tokens [V,C]."""
        if self.slide_encoder is None:
            pooled = pool_tokens(features[None].to(self.device, torch.float32), self.cfg.n_visual_tokens)[0]
            return F.layer_norm(pooled, pooled.shape[-1:])
        like = self.slide_encoder.cls_token
        features, coords = features.to(like.device, like.dtype), coords.to(like.device)
        return self.slide_encoder.visual_tokens(features[None], coords[None], self.cfg.n_visual_tokens)[0]

    def project(self, visual):
        """Visual tokens [V,C] -> [V,C_llm]: zero-padded to the width that the projector takes, then projected."""
        weight = self.mm_projector[0].weight
        return self.mm_projector(F.pad(visual.to(weight.dtype), (0, self.cfg.pad_to - visual.shape[-1])))

    def splice(self, visual, ids, labels=None):
        """Puts projected visual tokens where the ids say IMAGE_TOKEN.

        visual: [B,V,C], one slide a row, or a list of B tensors [slides,V,C] (or None: no slide), or None. ids: a list
        of B lists. labels: the same, or None. -> embeds [B,T,C], labels [B,T], both padded on the right to the longest
        row. Raises ValueError where a row holds another number of IMAGE_TOKENs than of slides.
        """
        rows, row_labels = [], []
        for b, row in enumerate(ids):
            row = torch.as_tensor(row, device=self.device)
            label = (
                torch.as_tensor(labels[b], device=self.device) if labels is not None else torch.full_like(row, IGNORE)
            )
            slides = None if visual is None else visual[b]
            slides = [] if slides is None else slides if slides.dim() == 3 else slides[None]
            places = (row == IMAGE_TOKEN).nonzero().flatten().tolist()
            if len(places) != len(slides):
                raise ValueError(f"row {b} has {len(places)} <image> in its text and {len(slides)} slides")
            text = self.llama.embed_tokens(row.clamp(min=0))  # [T,C]
            parts, part_labels, start = [], [], 0
            for place, slide in zip(places, slides):
                parts += [text[start:place], self.project(slide.to(self.device)).to(text.dtype)]
                part_labels += [label[start:place], label.new_full((len(slide),), IGNORE)]
                start = place + 1
            rows.append(torch.cat(parts + [text[start:]]))
            row_labels.append(torch.cat(part_labels + [label[start:]]))
        # Padding on the right needs no mask: attention is causal, and IGNORE keeps it out of the loss.
        pad = nn.utils.rnn.pad_sequence
        return pad(rows, batch_first=True), pad(row_labels, batch_first=True, padding_value=IGNORE)  # [B,T,C], [B,T]

    def forward(self, visual, ids, labels, reduction="mean"):
        """Next-token loss, the mean over the labelled tokens or their "sum". Arguments as for splice."""
        embeds, labels = self.splice(visual, ids, labels)
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # of the token that follows each position
        labelled = labels != IGNORE
        logits = self.llama(embeds=embeds, only=labelled)  # [n,vocab]: no logits where nothing is learned, most of them
        return F.cross_entropy(logits.float(), labels[labelled], reduction=reduction)

    @torch.no_grad()
    def generate(
        self,
        visual,
        ids,
        max_new_tokens=256,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        seed=0,
        eos=2,
        cache=None,
        no_repeat_ngram=0,
    ):
        """Yields the next token of each row, a list of B ids, until all rows have ended in `eos` (None after its end).

        Rows must be of equal length, so that no padding enters. temperature 0 is greedy; otherwise sampled from the
        top_k most likely (0: all) and the smallest set of probability top_p. cache: a KVCache of an earlier turn, which
        is then continued; it ends up holding all but the last token. no_repeat_ngram: no answer says so many tokens in
        a row twice (0: it may). Raises UserError where the prompt exceeds the context.
        """
        embeds, _ = self.splice(visual, ids)
        B, T, _ = embeds.shape
        if len({len(row) for row in ids}) != 1:
            raise ValueError("generate: rows must be of equal length")
        cache = cache or KVCache(self.cfg.llama, B, T + max_new_tokens, embeds.device, embeds.dtype)
        generator = torch.Generator(embeds.device).manual_seed(seed)
        ended, said = [False] * B, [[] for _ in range(B)]
        for _ in range(max_new_tokens):
            logits = self.llama(embeds=embeds, cache=cache, last_only=True)[:, 0].float()  # [B,vocab]
            if no_repeat_ngram:
                for b, row in enumerate(said):
                    logits[b, _repeating(row, no_repeat_ngram)] = -math.inf
            token = logits.argmax(-1) if temperature == 0 else _sample(logits / temperature, top_p, top_k, generator)
            yield [None if done else t for done, t in zip(ended, token.tolist())]
            ended = [done or t == eos for done, t in zip(ended, token.tolist())]
            said = [row + [t] for row, t in zip(said, token.tolist())]
            if all(ended) or cache.length >= self.cfg.llama.context:
                return
            embeds = self.llama.embed_tokens(token)[:, None]  # [B,1,C]

    def save(self, folder, prefixes=("",)):
        """Writes config.json and model.safetensors: all weights, or only those whose names start with a prefix."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: p for name, p in self.state_dict().items() if name.startswith(tuple(prefixes))}
        write_tensors(folder / "model.safetensors", state)
        write_text(folder / "config.json", self.cfg.to_json())

    @classmethod
    def load(cls, folder):
        """The model that save() wrote whole. Raises UserError that names what is missing, extra or of another shape."""
        cfg = load_config(folder)
        with torch.device("meta"):
            model = cls(cfg)
        path = Path(folder) / "model.safetensors"
        load_strict(model, read_tensors(path), path)
        return model.eval()


# --------------------------------------------------------------------------------------------------------------------
# Published weights, in and out: GigaPath's, Llama's, LLaVA's, LoRA adapters
# --------------------------------------------------------------------------------------------------------------------


def _depth(tensors, pattern):
    """The number of blocks that a checkpoint holds, read off its keys."""
    found = [int(m[1]) for m in (re.match(pattern, key) for key in tensors) if m]
    return max(found) + 1


def _require(tensors, keys, source):
    """Raises UserError where a checkpoint lacks the keys off whose shapes the model's size is read."""
    missing = [key for key in keys if key not in tensors]
    if missing:
        raise UserError(f"{source}: missing keys ({len(missing)}): {', '.join(missing)}")


def load_tile_encoder(path):
    """Prov-GigaPath's `pytorch_model.bin` (or safetensors; timm's names) -> TileEncoder, sized by the shapes."""
    tensors = read_tensors(path)
    _require(tensors, ["patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc2.weight"], path)
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    side = math.isqrt(tensors["pos_embed"].shape[1] - 1)
    cfg = TileEncoderConfig(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        depth=_depth(tensors, r"blocks\.(\d+)\."),
        heads=width // 64,
        mlp_hidden=tensors["blocks.0.mlp.fc2.weight"].shape[1],
    )
    with torch.device("meta"):
        encoder = TileEncoder(cfg)
    return load_strict(encoder, tensors, path).eval()


def load_slide_encoder(path):
    """Prov-GigaPath's `slide_encoder.pth` (tensors under "model", or bare) -> SlideEncoder, its size read off the
    shapes; or save_slide_encoder's file, which holds its own config."""
    tensors = read_tensors(path)
    tensors = tensors.get("model", tensors)
    _require(tensors, ["patch_embed.proj.weight", "encoder.layers.0.ffn.fc1.weight"], path)
    width, in_width = tensors["patch_embed.proj.weight"].shape
    cfg = SlideEncoderConfig(
        in_width=in_width,
        width=width,
        depth=_depth(tensors, r"encoder\.layers\.(\d+)\."),
        mlp_hidden=tensors["encoder.layers.0.ffn.fc1.weight"].shape[0],
    )
    if Path(path).suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            if "config" in (file.metadata() or {}):
                cfg = SlideEncoderConfig.from_json(file.metadata()["config"])
    with torch.device("meta"):
        encoder = SlideEncoder(cfg)
    return load_strict(encoder, tensors, path).eval()


def save_slide_encoder(encoder, path):
    """One file under GigaPath's names, with the config that shapes do not tell: heads, segments, dilations."""
    write_tensors(path, encoder.state_dict(), {"config": encoder.cfg.to_json()})


# The published layouts of the language model -> the names here. Their names begin with `model.` (Llama, LLaVA), with
# `language_model.model.` or `model.language_model.` (transformers' conversion of LLaVA); PEFT puts `base_model.model.`
# before.
PROJECTOR_KEYS = [
    (r"(?:.+\.)?mm_projector\.(.+)", r"\1"),
    (r"(?:.+\.)?multi_modal_projector\.linear_1\.(.+)", r"0.\1"),
    (r"(?:.+\.)?multi_modal_projector\.linear_2\.(.+)", r"2.\1"),
]
LLAMA_KEYS = [
    (r".+\.rotary_emb\.inv_freq", None),  # old exports store it; it is computed here
    (r"(?:.+\.)?vision_tower\..+", None),  # CLIP, whose place the slide encoder takes
    *((pattern, None) for pattern, _ in PROJECTOR_KEYS),  # load_projector reads it
    (r"base_model\.model\.(?:model\.)?(?:language_model\.)?(?:model\.)?(.+)\.lora_A\.weight", r"\1.lora_a"),
    (r"base_model\.model\.(?:model\.)?(?:language_model\.)?(?:model\.)?(.+)\.lora_B\.weight", r"\1.lora_b"),
    (r"(?:model\.)?(?:language_model\.)?(?:model\.)?(.+)", r"\1"),
]
# What a config.json means where it is silent: transformers leaves out of `text_config` whatever is the default.
LLAMA_DEFAULTS = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_DEFAULTS |= {"intermediate_size": 11008, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}


def read_llama_config(folder):
    """`config.json` of a Llama or LLaVA folder -> LlamaConfig. Raises UserError for what this decoder does not do."""
    path = Path(folder) / "config.json"
    c = read_json(path, "--llm takes a Hugging Face folder of a Llama or a LLaVA, such as vicuna-7b-v1.5")
    kind = c.get("model_type", "llama")
    if "text_config" in c:
        c = LLAMA_DEFAULTS | c["text_config"]
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    try:
        cfg = LlamaConfig(
            vocab=c["vocab_size"],
            width=c["hidden_size"],
            depth=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            mlp_hidden=c["intermediate_size"],
            eps=c.get("rms_norm_eps", LLAMA_DEFAULTS["rms_norm_eps"]),
            rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0),
            context=c.get("max_position_embeddings", LLAMA_DEFAULTS["max_position_embeddings"]),
        )
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a Llama's config.json ({type(error).__name__}: {error})") from None
    unsupported = []
    if kind not in ("llama", "llava", "llava_llama") or c.get("model_type", kind) not in ("llama", kind):
        unsupported.append(f"model_type {kind}")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        unsupported.append(f"rope scaling {rope}")
    if c.get("attention_bias") or c.get("mlp_bias"):
        unsupported.append("biases")
    if (c.get("head_dim") or cfg.width // cfg.heads) != cfg.width // cfg.heads:
        unsupported.append(f"head_dim {c['head_dim']}")
    if c.get("tie_word_embeddings"):
        unsupported.append("tied embeddings")
    if unsupported:
        raise UserError(f"{path}: not supported here: {', '.join(unsupported)}")
    return cfg


def read_folder(folder):
    """All tensors of a Hugging Face, LLaVA or PEFT folder -> {name: tensor}, mapped. A LLaVA LoRA folder keeps what was
    trained without adapters, the projector, in a file beside them. Raises UserError where a shard is missing."""
    for stem, ending in itertools.product(("model", "pytorch_model", "adapter_model"), ("safetensors", "bin")):
        index = folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            names = read_json(index, "copy or download it again").get("weight_map")
            if not isinstance(names, dict) or not names:
                raise UserError(f"{index}: has no weight_map; copy or download it again")
            files = [folder / name for name in sorted(set(names.values()))]
            break
        if (folder / f"{stem}.{ending}").is_file():
            files = [folder / f"{stem}.{ending}", folder / "non_lora_trainables.bin"]
            files = files[: 1 + (stem == "adapter_model" and files[1].is_file())]
            break
    else:
        raise UserError(f"{folder}: no model.safetensors, pytorch_model.bin, index of shards or adapter_model here")
    tensors = {}
    for file in files:
        tensors |= read_tensors(file)
    return tensors


# What adapter_config.json may say: read here, or without effect on the numbers. Whatever else is set is refused.
LORA_OPTIONS = (
    "r lora_alpha use_rslora target_modules modules_to_save base_model_name_or_path task_type inference_mode lora_dropout "
    "peft_version revision auto_mapping megatron_core qalora_group_size layers_pattern runtime_config"
).split()


LORA_VALUES = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal"]}


def load_lora(llama, folder):
    """Adds the adapters of a PEFT folder (`adapter_config.json`, `adapter_model.*`) to a Llama, beside its weights."""
    path = folder / "adapter_config.json"
    c = read_json(path, "--lora takes a PEFT or LLaVA LoRA folder")
    unsupported = [f"{k} {v}" for k, v in c.items() if k not in LORA_OPTIONS and v and v not in LORA_VALUES.get(k, ())]
    unsupported += [f"modules_to_save {m}" for m in c.get("modules_to_save") or [] if "projector" not in m]
    if unsupported:
        raise UserError(f"{path}: not supported here: {', '.join(unsupported)}")
    tensors = read_folder(folder)
    try:
        rank, alpha, targets = c["r"], c["lora_alpha"], c["target_modules"]
        if c.get("use_rslora"):
            alpha *= math.sqrt(rank)  # the update is then scaled by alpha / sqrt(r)
        if isinstance(targets, str):  # a pattern over PEFT's names, or "all-linear": see what it chose
            targets = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
        target = "|".join({re.escape(name.split(".")[-1]) for name in targets})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a LoRA's adapter_config.json ({type(error).__name__}: {error})") from None
    with torch.device("meta"):
        add_lora(llama, rank, alpha, target)
    load_strict(llama, tensors, folder, LLAMA_KEYS, only=r".+\.lora_[ab]")


def load_llama(folder, dtype=None, lora=None):
    """A Hugging Face folder of a Llama or LLaVA (safetensors or `pytorch_model*.bin`, in shards or not) -> Llama.

    lora: a PEFT folder, whose adapters are merged into the weights. The files are mapped: in their own dtype, memory is
    filled as pages are touched. Raises UserError, strict both ways.
    """
    folder = Path(folder)
    with torch.device("meta"):
        llama = Llama(read_llama_config(folder))
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds LoRA adapters: name it with --lora, and the model that they stand on with --llm"
        )
    load_strict(llama, read_folder(folder), folder, LLAMA_KEYS)
    if lora:
        load_lora(llama, Path(lora))
        merge_lora(llama, dtype)
    return llama.to(dtype or llama.lm_head.weight.dtype).eval()


def load_projector(folder, dtype=None):
    """The projector in a LLaVA folder, merged or LoRA -> (Linear, GELU, Linear), sized by its shapes; or None."""
    patterns = [pattern for pattern, _ in PROJECTOR_KEYS]
    tensors = {k: v for k, v in read_folder(Path(folder)).items() if any(re.fullmatch(p, k) for p in patterns)}
    if not tensors:
        return None
    widths = [tuple(v.shape) for k, v in tensors.items() if re.fullmatch(r".*(?:0|linear_1)\.weight", k)]
    if len(widths) != 1 or len(widths[0]) != 2:
        raise UserError(f"{folder}: not a projector of two linear layers (mlp2x_gelu): {', '.join(tensors)}")
    with torch.device("meta"):
        projector = make_projector(*reversed(widths[0]))
    return load_strict(projector, tensors, folder, PROJECTOR_KEYS, dtype)


def write_llama_config(llama, folder, projector=None):
    """config.json of a Llama, or with its projector of a LLaVA."""
    cfg = llama.cfg
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "intermediate_size": cfg.mlp_hidden,
        "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rope_theta,
        "max_position_embeddings": cfg.context,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(llama.lm_head.weight.dtype).removeprefix("torch."),
    }
    if projector is not None:
        config |= {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}
        config |= {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": projector[0].in_features}
    write_text(folder / "config.json", json.dumps(config, indent=2))


SHARD = 5 * 10**9  # bytes of a file of weights, as Hugging Face cuts them


def save_llama(llama, folder, projector=None):
    """Writes a folder for load_llama and transformers, less the tokenizer: a Llama's, or with its projector a LLaVA's.

    Adapters are merged. config.json comes last, without which the folder is none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merge_lora(llama)
    state = {name if name.startswith("lm_head.") else f"model.{name}": p for name, p in llama.state_dict().items()}
    if projector is not None:
        state |= {f"model.mm_projector.{name}": p for name, p in projector.state_dict().items()}
    shards, room = [[]], SHARD
    for name, p in state.items():
        if p.nbytes > room and shards[-1]:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= p.nbytes
    places = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(names, file)
        write_tensors(folder / file, {name: state[name] for name in names}, {"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(p.nbytes for p in state.values())}, "weight_map": places}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2))
    write_llama_config(llama, folder, projector)


def save_lora(model, folder, base):
    """Writes a WSILLaVA's adapters and projector as a LLaVA LoRA folder, for load_llama(base, lora=folder) and PEFT."""
    folder, cfg = Path(folder), model.cfg
    folder.mkdir(parents=True, exist_ok=True)
    prefix, adapters, targets = "base_model.model.model.", {}, set()
    for name, module in model.llama.named_modules():
        if isinstance(module, LoRALinear):
            targets.add(name.split(".")[-1])
            for kind, p in (("A", module.lora_a), ("B", module.lora_b)):
                adapters[f"{prefix}{name}.lora_{kind}.weight"] = p
    projector = {f"{prefix}mm_projector.{k}": p.cpu() for k, p in model.mm_projector.state_dict().items()}
    write_tensors(folder / "adapter_model.safetensors", adapters, {"format": "pt"})
    with replacing(folder / "non_lora_trainables.bin") as path:
        torch.save(projector, path)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "bias": "none"}
    config |= {"r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "target_modules": sorted(targets)}
    write_llama_config(model.llama, folder, model.mm_projector)
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2))


# --------------------------------------------------------------------------------------------------------------------
# What the scripts share: the data on disk
# --------------------------------------------------------------------------------------------------------------------


def read_meta(data):
    """data/meta.json, as prepare.py wrote it."""
    path = Path(data) / "meta.json"
    try:
        meta = json.loads(path.read_text())
        if meta["version"] != VERSION:
            raise UserError(
                f"{path}: made by version {meta['version']} of this project, not {VERSION}; prepare the data again"
            )
        return meta
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run python prepare.py --slides DIR first (or --demo)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what prepare.py writes ({error}); prepare the data again") from None


def is_report(row):
    """Whether a row of the dataset is a slide's report: what stages 1 and 2 train on."""
    return "report" in row["task"].lower()


def features_file(data, slide):
    return Path(data) / "features" / f"{slide}.safetensors"


def feature_metadata(path):
    """What prepare.py noted of a file of features, and "tiles", their number. Raises UserError where nothing is."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return json.loads(file.metadata()["wsi_llava"]) | {"tiles": file.get_slice("coords").get_shape()[0]}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of features ({error}); delete it and run again") from None


def read_features(data, slide, max_tiles=0):
    """data/features of one slide -> features float16 [N,C], coords int32 [N,2].

    max_tiles: at most so many of them, drawn at random, always the same ones, in raster order (0: all). Raises UserError
    where there is no such file, or its tiles lie where no slide is that large.
    """
    path = features_file(data, slide)
    tensors = read_tensors(path)
    features, coords = tensors["features"], tensors["coords"]
    try:
        grid_cells(coords)
    except ValueError as error:
        raise UserError(f"{path}: {error} prepare.py --features brings level-0 coordinates there") from None
    if max_tiles and len(features) > max_tiles:
        rng = np.random.default_rng(zlib.crc32(slide.encode()))
        chosen = torch.from_numpy(np.sort(rng.choice(len(features), max_tiles, replace=False)))
        features, coords = features[chosen], coords[chosen]
    return features, coords


def tile_corners(x, y):
    return [(x, y), (x + TILE, y), (x + TILE, y + TILE), (x, y + TILE)]


def geojson_feature(kind, rings, scale, origin=(0, 0), **properties):
    """A polygon for QuPath: rings of corners (x, y) times `scale` -> in level-0 pixels counted from `origin`, closed.

    kind: "tile" or "annotation". properties: what else QuPath is to know of it.
    """
    x0, y0 = origin
    rings = [[[round(x * scale - x0, 2), round(y * scale - y0, 2)] for x, y in [*ring, ring[0]]] for ring in rings]
    geometry = {"type": "Polygon", "coordinates": rings}
    return {"type": "Feature", "geometry": geometry, "properties": {"objectType": kind, **properties}}


def visual_tokens_file(data, slide, cfg):
    """Where a slide's visual tokens are kept; a model of an ablation has a folder of its own."""
    variant = "no-slide-encoder" * cfg.no_slide_encoder + f"max-tiles-{cfg.max_tiles}" * bool(cfg.max_tiles)
    return Path(data) / "visual_tokens" / variant / f"{slide}.safetensors"


def read_visual_tokens(data, slide, cfg):
    """What cache_visual_tokens wrote of one slide -> float16 [V,C]."""
    return read_tensors(visual_tokens_file(data, slide, cfg))["visual_tokens"]


def cache_visual_tokens(model, data, slides, progress=iter):
    """Writes data/visual_tokens for the slides that lack them or have another slide encoder's. -> how many it wrote.

    The slide encoder is frozen after stage 1 and a slide is asked about many times, so it runs once a slide.
    """
    written, mark = 0, model.cfg.fingerprints.get("slide_encoder", "none")
    for slide in progress(slides):
        path = visual_tokens_file(data, slide, model.cfg)
        if path.exists():
            with safetensors.safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("slide_encoder") in (mark, IMPORTED_TOKENS):
                    continue
        with torch.inference_mode():
            tokens = model.encode_slide(*read_features(data, slide, model.cfg.max_tiles))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"visual_tokens": tokens.half()}, {"slide_encoder": mark})
        written += 1
    return written


# --------------------------------------------------------------------------------------------------------------------
# What the scripts share: flags, where weights are looked for, how the stages' results are put together
# --------------------------------------------------------------------------------------------------------------------

WEIGHTS = Path("weights")


def at_least(low, kind=int, high=math.inf):
    """A type for argparse: a finite number from low to high."""

    def number(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        for wrong, reason in (
            (not math.isfinite(value), f"is no {'whole ' * (kind is int)}number"),
            (value < low, f"is less than {low}"),
            (value > high, f"is more than {high}"),
        ):
            if wrong:
                raise argparse.ArgumentTypeError(f"{text} {reason}")
        return value

    return number


def share(text):
    """A type for argparse: a number from 0 to 1."""
    return at_least(0, float, 1)(text)


def some_text(text):
    """A type for argparse: a text that is not empty, and can be written to a file."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None
    return text


def some_path(text):
    """A type for argparse: a path, where the current folder is "." and not nothing at all."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("an empty path; the current folder is .")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """A script's flags. A wrong one gets one line and exit status 2, not a screen of all there are."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"error: {one_line(message.removeprefix('argument '))}; --help lists the flags\n")


def add_device_flags(add):
    """--device and --dtype, which resolve_device reads."""
    add("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    kinds = ["auto", "float32", "bfloat16"]
    add("--dtype", default="auto", choices=kinds, help="of matrix products (default: bfloat16 on CUDA, else float32)")


def add_shared_flags(parser):
    """The flags that mean the same in every script."""
    add = parser.add_argument_group("shared by all scripts").add_argument
    add("--data", metavar="DIR", type=Path, default=Path("data"), help="prepared slides and questions (default: data)")
    add("--out", metavar="DIR", type=Path, default=Path("out"), help="what training leaves, by stage (default: out)")
    add("--preset", choices=PRESETS, help="sizes of the model (default: what the data were prepared with)")
    add_device_flags(add)
    seed = "of all that is drawn at random; the same gives the same run (default: 0)"
    add("--seed", type=at_least(0), default=0, help=seed)
    readers = "processes that read ahead of the model (default: one a core, 8 at most)"
    add("--workers", type=at_least(1), default=min(8, os.cpu_count() or 1), help=readers)
    tile, slide = f"{WEIGHTS}/gigapath/pytorch_model.bin", f"{WEIGHTS}/gigapath/slide_encoder.pth"
    add("--tile-encoder", metavar="FILE", type=Path, help=f"Prov-GigaPath's, published (default: {tile})")
    add("--slide-encoder", metavar="FILE", type=Path, help=f"the same (default: out/stage1's, or {slide})")
    llms = f"{WEIGHTS}/vicuna-7b-v1.5, or {WEIGHTS}/llava-v1.5-7b; the demo has its own"
    add("--llm", metavar="DIR", type=Path, help=f"the language model, a Hugging Face folder (default: {llms})")
    add("--lora", metavar="DIR", type=Path, help="adapters to merge into the language model, a PEFT or LLaVA folder")


def resolve_device(args):
    """Turns --device and --dtype into what torch takes. Raises UserError for a device that is not there."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        args.device = torch.device(args.device)
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}; use --device cpu") from None
    automatic = "bfloat16" if args.device.type == "cuda" else "float32"
    args.dtype = getattr(torch, automatic if args.dtype == "auto" else args.dtype)


def count(n, thing):
    """So many of a thing, for people: 1 slide, 2,000 slides."""
    return f"{n:,} {thing}{'s' * (n != 1)}"


class Printable:
    """A stream whose text loses its control characters: names, answers and servers' messages cannot steer a terminal."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.stream.write(printable(text))

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run(main, on_interrupt="interrupted"):
    """Runs a script's main. What the user can mend becomes one line and exit status 1: a UserError, and whatever the
    system refuses (a full disk, a read-only folder, a closed pipe). Ctrl-C: exit status 130. What is left is a bug, and
    keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding shows what it can
        stream.reconfigure(errors="backslashreplace")
    sys.stdout = Printable(sys.stdout)  # not stderr: progress bars move the cursor there
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {one_line(error, 2000)}")
    except BrokenPipeError:  # the next program of a pipe has read enough; Python's own last flush must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit("error: the output was closed before all was printed")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {one_line(where, 1000)}{one_line(error.strerror or error)}; nothing that was finished is lost")
    except KeyboardInterrupt:
        print(on_interrupt, file=sys.stderr)
        sys.exit(130)


def pick_tile_encoder(args):
    """(TileEncoder, its file); None for a file is the demo's untrained encoder, where no weights are found or named."""
    path = args.tile_encoder or WEIGHTS / "gigapath" / "pytorch_model.bin"
    if args.tile_encoder is None and (args.preset == "demo" or not path.exists()):
        if args.preset not in (None, "demo"):
            raise UserError(f"--preset {args.preset} needs Prov-GigaPath's tile encoder: name it with --tile-encoder")
        return untrained_tile_encoder(), None
    return load_tile_encoder(path), path


def pick_llm(args, meta):
    """The language model's folder and its tokenizer -> (folder, Tokenizer)."""
    if args.llm:
        folder = args.llm
    elif meta["preset"] == "demo":
        folder = args.data / "llm"  # the stand-in that prepare.py trains
        if not folder.exists():
            raise UserError(
                f"{folder}: no language model there; run python prepare.py --qa FILE... first, or name one with --llm"
            )
    else:
        choices = [WEIGHTS / "vicuna-7b-v1.5", WEIGHTS / "llava-v1.5-7b"]
        folder = next((c for c in choices if c.exists()), None)
        if folder is None:
            raise UserError(f"no language model: neither {choices[0]} nor {choices[1]} exists; name one with --llm")
    places = [folder, args.lora or folder, folder.parent]  # beside its folder: where prepare.py puts the stand-in's
    tokenizers = [place / "tokenizer.model" for place in places]
    return folder, Tokenizer(next((path for path in tokenizers if path.exists()), tokenizers[0]))


def read_stage(args, stage):
    """What a stage left in out/stageN -> (config, {name: tensor}, file)."""
    folder = args.out / f"stage{stage}"
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder} holds no trained model: run python train.py --stage {stage} first")
    return load_config(folder), read_tensors(folder / "model.safetensors"), folder / "model.safetensors"


def check_fingerprints(cfg, present, source):
    """Weights trained beside one tile encoder, slide encoder or LLM mean nothing beside another."""
    for part, value in cfg.fingerprints.items():
        if part in present and present[part] != value:
            raise UserError(
                f"{source} was trained with another {part.replace('_', ' ')} ({value}) than the one here ({present[part]}): "
                f"name the one that it fits, or train this stage again"
            )


def check_tile_width(cfg, meta, data):
    """A SlideEncoderConfig against the features in data/: the first mismatch that a user of several encoders meets."""
    if cfg.in_width != meta["encoder"]["width"]:
        raise UserError(
            f"the slide encoder takes tile features of width {cfg.in_width}, {data} holds {meta['encoder']['width']}: "
            f"made by another tile encoder; prepare the slides with the one that fits"
        )


def pick_slide_encoder(args, meta, prints):
    """--slide-encoder, that of out/stage1, or GigaPath's. Raises UserError where there is none, or it does not fit."""
    path, gigapath = args.slide_encoder, WEIGHTS / "gigapath" / "slide_encoder.pth"
    if not path and meta["preset"] != "demo" and not (args.out / "stage1" / "model.safetensors").exists():
        path = gigapath if gigapath.exists() else None
    if path:
        slide_encoder = load_slide_encoder(path)
    else:
        cfg, weights, source = read_stage(args, 1)
        check_fingerprints(cfg, prints, source)
        with torch.device("meta"):
            slide_encoder = SlideEncoder(cfg.slide_encoder)
        load_strict(slide_encoder, weights, source, [(r"slide_encoder\.(.+)", r"\1"), (r".+", None)])
    check_tile_width(slide_encoder.cfg, meta, args.data)
    return slide_encoder


def fitting_projector(projector, origin, width, llm_width, stage):
    """A published projector, if it takes visual tokens of `width` (zero-padded to its own) and gives the language
    model's; else None, for a new one before stage 2, and later a UserError. Says which."""
    if projector is None:
        news = f"a new one, since {origin} holds none"
    elif width <= projector[0].in_features and projector[2].out_features == llm_width:
        news = f"that of {origin}"
    else:
        shape = f"{projector[0].in_features} -> {projector[2].out_features}, not {width} -> {llm_width}"
        if stage > 1:
            raise UserError(f"{origin}: its projector does not fit ({shape}); train one with --stage 2 and 3")
        projector, news = None, f"a new one, since that of {origin} does not fit ({shape})"
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        print(f"Projector: {news}.", file=sys.stderr)
    return projector


def trained_names(cfg):
    """The parameters that stages 2 and 3 train and save, as a pattern."""
    return r"mm_projector\..*|llama\..*\.lora_[ab]" if cfg.lora_rank else r"mm_projector\..*"


def assemble(args, meta, stage, dtype=None, int8=False):
    """The model as it stands after `stage` (1: before stage 2) -> (WSILLaVA on the CPU, Tokenizer). dtype: --dtype.
    int8: with the language model's weights rounded, see quantize_int8.

    The slide encoder: pick_slide_encoder. The language model: --llm's with --lora merged, and out/stage3's adapters.
    The projector: that of out/stage2 or 3; where there is neither, the one published in --lora's folder or --llm's, so
    that weights trained elsewhere answer at once. Raises UserError where a piece is missing or was trained beside other
    pieces.
    """
    folder, tokenizer = pick_llm(args, meta)
    # int8: mapped in its own dtype, and rounded below a layer at a time.
    llama = load_llama(folder, None if int8 else dtype or args.dtype, args.lora)
    prints = {"tile_encoder": meta["encoder"]["fingerprint"], "llm": fingerprint(llama)}
    cfg, tensors = WSILLaVAConfig.from_dict(PRESETS[args.preset or meta["preset"]].to_dict()), None
    projector = slide_encoder = None
    if stage == 1:
        cfg.max_tiles, cfg.no_slide_encoder = args.max_tiles, args.no_slide_encoder
    if stage == 1 or not any((args.out / f"stage{n}" / "model.safetensors").exists() for n in (2, 3)):
        found = ((load_projector(place, torch.float32), place) for place in (args.lora, folder) if place)
        projector, origin = next((pair for pair in found if pair[0] is not None), (None, folder))
    if stage > 1 and projector is None:
        cfg, tensors, source = read_stage(args, stage)
    if not cfg.no_slide_encoder and meta["encoder"]["source"] != IMPORTED_TOKENS:  # those have been through one
        slide_encoder = pick_slide_encoder(args, meta, prints)
        prints["slide_encoder"] = fingerprint(slide_encoder)
    if tensors is None:
        cfg.slide_encoder, cfg.llama = slide_encoder.cfg if slide_encoder else cfg.slide_encoder, llama.cfg
        cfg.fingerprints = prints
        width = slide_encoder.cfg.width if slide_encoder else meta["encoder"]["width"]
        projector = fitting_projector(projector, origin, width, llama.cfg.width, stage)
        cfg.pad_to = projector[0].in_features if projector else max(cfg.pad_to, width)
    else:
        check_fingerprints(cfg, prints, source)
    with torch.device("meta"):
        model = WSILLaVA(dataclasses.replace(cfg, lora_rank=0))
    model.cfg, model.slide_encoder, model.llama = cfg, slide_encoder, llama
    if projector:
        model.mm_projector = projector
    else:
        model.mm_projector.to_empty(device="cpu")
        for part in (model.mm_projector[0], model.mm_projector[2]):
            part.reset_parameters()
    if cfg.lora_rank:
        add_lora(llama, cfg.lora_rank, cfg.lora_alpha, cfg.lora_target)
    if tensors is not None:
        full = any(name.startswith("llama.") for name in tensors) and not cfg.lora_rank
        load_strict(model, tensors, source, only=r"mm_projector\..*|llama\..*" if full else trained_names(cfg))
    if int8:
        quantize_int8(llama)
    return model.to(dtype or args.dtype).eval(), tokenizer


def token_embeddings(args, meta):
    """What stage 1 reads reports with: the LLM's token embeddings [vocab,C_llm], frozen, and its Tokenizer."""
    folder, tokenizer = pick_llm(args, meta)
    words = load_llama(folder).embed_tokens.weight.detach()
    return words.to(args.device, torch.float32), tokenizer


def load_alignment(args, meta):
    """Stage 1's model -> (its config, WSITextAlignment, the LLM's token embeddings [vocab,C_llm], Tokenizer)."""
    cfg, tensors, source = read_stage(args, 1)
    check_fingerprints(cfg, {"tile_encoder": meta["encoder"]["fingerprint"]}, source)
    model = load_strict(WSITextAlignment(cfg), tensors, source).to(args.device).eval()
    return cfg, model, *token_embeddings(args, meta)


# --------------------------------------------------------------------------------------------------------------------
# Self-check: python wsi_llava.py
# --------------------------------------------------------------------------------------------------------------------


def peak_memory(device=None):
    """The most memory this process has held so far, in bytes: a GPU's, or else the CPU's (not a number on Windows)."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def seconds(work, device, repeats=2):
    """Wall time of work(), the last of the repeats."""
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - started


def parameter_table():
    """Lines of a table: parameters of each part, for every preset. Built on the meta device, so it costs nothing."""
    rows = [["part"] + list(PRESETS)]
    columns = []
    for cfg in PRESETS.values():
        with torch.device("meta"):
            model, tile, text = WSILLaVA(cfg), TileEncoder(cfg.tile_encoder), TextEncoder(cfg.text_encoder)
        columns.append([tile, model.slide_encoder, text, model.mm_projector, model.llama])
    names = ["tile encoder", "slide encoder", "text encoder (stage 1)", "projector", "language model"]
    for name, parts in zip(names, zip(*columns)):
        rows.append([name] + [f"{sum(p.numel() for p in part.parameters()):,}" for part in parts])
    return ["".join(cell.ljust(24) if i == 0 else cell.rjust(16) for i, cell in enumerate(row)) for row in rows]


# Bytes of shared memory that a block may use, by compute capability.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}


def kernel_resources():
    """Compiles the kernels for GPUs that need not be there; reads what they take off the machine code -> list of dicts.

    spills: stores of registers to memory and loads back, counted in the disassembly. mma: tensor core instructions.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    kernels, types = (_forward_kernel, _dq_kernel, _dkv_kernel), {torch.bfloat16: "bf16", torch.float32: "fp32"}
    rows = []
    for kernel, gpu, dtype, D in itertools.product(kernels, SHARED_LIMIT, types, (48, 64)):
        options = _launch_options(kernel, D, dtype)
        constants = {"N_BRANCHES": 5, "PAD": True, **options}
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        kinds = {"lse": "*fp32", "delta": "*fp32", "branches": "*i32", "scale": "fp32"}
        kinds |= dict.fromkeys(("q", "k", "v", "out", "grad", "dq", "dk", "dv"), f"*{types[dtype]}")
        signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
        # Pointers, strides and D are multiples of 16 in a real launch, and Triton compiles for that.
        aligned = [
            i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name == "D" or "_" in name
        ]
        aligned = {(i,): [["tt.divisibility", 16]] for i in aligned if kernel.arg_names[i] not in constants}
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, aligned),
            target=GPUTarget("cuda", gpu, 32),
            options={name: options[name] for name in ("num_warps", "num_stages")},
        )
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            usage, code = (
                subprocess.run([cuobjdump, flag, cubin], capture_output=True, text=True, check=True).stdout
                for flag in ("--dump-resource-usage", "-sass")
            )
        rows.append(
            {
                "kernel": kernel.__name__.strip("_"),
                "gpu": f"sm_{gpu}",
                "dtype": str(dtype).removeprefix("torch."),
                "head_dim": D,
                "registers": int(re.search(r"REG:(\d+)", usage)[1]),
                "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
                "shared": compiled.metadata.shared,
                "shared_limit": SHARED_LIMIT[gpu],
                "mma": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", compiled.asm["ptx"])),
            }
        )
    return rows


def attention_flops(L, cfg):
    """Multiply-adds (two each) of one layer's dilated attention, forward: q.k and p.v over all pairs that meet."""
    pairs = 0
    for view, _ in _branch_views(L, cfg.heads, cfg.segments, cfg.dilations):
        _, S, n, h = view(torch.empty(1, L, cfg.heads, device="meta")).shape
        pairs += S * h * n * n
    return 4 * pairs * (cfg.width // cfg.heads)


def shape_trace():
    """One made-up slide through the demo's model -> lines of names and shapes."""
    cfg = WSILLaVAConfig.from_dict(PRESETS["demo"].to_dict())
    model, tile_encoder = WSILLaVA(cfg).eval(), untrained_tile_encoder()
    tiles = torch.randint(0, 256, (12, 256, 256, 3), dtype=torch.uint8)
    coords = torch.stack([torch.arange(12) % 4, torch.arange(12) // 4], 1) * 256
    ids = [1, 10, IMAGE_TOKEN, 11, 12]
    with torch.no_grad():
        images = preprocess_tiles(tiles)
        features = tile_encoder(images)
        cls, tokens = model.slide_encoder(features[None], coords[None])
        visual = model.encode_slide(features, coords)
        embeds, _ = model.splice(visual[None], [ids])
        logits = model.llama(embeds=embeds)
    named = {"tiles": tiles, "preprocess_tiles": images, "TileEncoder": features, "SlideEncoder, CLS": cls}
    named |= {"SlideEncoder, tokens": tokens, "pool_tokens, norm": visual}
    named |= {f"spliced into {len(ids) - 1} text tokens": embeds, "Llama, logits": logits}
    return [f"{name:32}{list(x.shape)}" for name, x in named.items()]


def measure_attention(n_tiles, impl, device, dtype):
    """Seconds of a layer of the 7b slide encoder's dilated attention, forward, and with backward; FLOP/s forward."""
    cfg, L = PRESETS["7b"].slide_encoder, n_tiles + 1
    q, k, v = (torch.randn(1, L, cfg.heads, cfg.width // cfg.heads, device=device, dtype=dtype) for _ in range(3))

    def both():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        dilated_attention(*leaves, cfg.segments, cfg.dilations, impl=impl).sum().backward()

    forward = seconds(lambda: dilated_attention(q, k, v, cfg.segments, cfg.dilations, impl=impl), device)
    rate = attention_flops(L, cfg) / forward
    return {
        "tiles": n_tiles,
        "impl": impl,
        "forward_s": forward,
        "forward_backward_s": seconds(both, device),
        "flop_per_s": rate,
    }


def slide_encoder_cost(n_tiles, training, device, dtype):
    """What one slide costs the 7b slide encoder: seconds, FLOP, the share of this machine's matmul rate, peak bytes.

    training: forward and backward with activation checkpointing, counted as 4 forwards. The rate that it is held
    against is that of a square matmul, the better of one before and one after. For a process of its own: peaks never
    fall.
    """
    cfg, L = PRESETS["7b"].slide_encoder, n_tiles + 1
    encoder = SlideEncoder(cfg).to(device, dtype).train(training)
    encoder.checkpointing = training
    side = math.ceil(math.sqrt(n_tiles))
    coords = torch.stack([torch.arange(n_tiles) % side, torch.arange(n_tiles) // side], 1)[None].to(device) * 256
    features = torch.randn(1, n_tiles, cfg.in_width, device=device, dtype=dtype)
    square = torch.randn(4096, 4096, device=device, dtype=dtype)

    def work():
        if training:
            encoder(features, coords)[1].sum().backward()
        else:
            with torch.inference_mode():
                encoder(features, coords)

    fastest = min(seconds(lambda: square @ square, device), seconds(lambda: square @ square, device))
    encoder(features[:, :64], coords[:, :64])  # warms up
    took = seconds(work, device, repeats=2 if n_tiles <= 1000 else 1)  # a short one is mostly first touches
    fastest = min(fastest, seconds(lambda: square @ square, device))
    per_token = cfg.in_width * cfg.width + cfg.depth * cfg.width * (4 * cfg.width + 2 * cfg.mlp_hidden)
    flop = (2 * L * per_token + cfg.depth * attention_flops(L, cfg)) * (4 if training else 1)
    matmul = 2 * 4096**3 / fastest
    return {
        "tiles": n_tiles,
        "work": "training" if training else "inference",
        "seconds": took,
        "flop": flop,
        "matmul_flop_per_s": matmul,
        "share": flop / took / matmul,
        "peak_bytes": peak_memory(device),
    }


def kernel_error(device, dtype):
    """Largest error of each path against float64, as a share of the largest value, at the 7b slide encoder's size."""
    cfg, L = PRESETS["7b"].slide_encoder, 1501
    q, k, v = (torch.randn(1, L, 16, 48, dtype=torch.float64) for _ in range(3))
    want = dilated_attention(q, k, v, cfg.segments, cfg.dilations, impl="torch")
    errors = {}
    for impl in ["torch"] + ["triton"] * (device.type == "cuda" and triton is not None):
        got = dilated_attention(*(x.to(device, dtype) for x in (q, k, v)), cfg.segments, cfg.dilations, impl=impl)
        errors[impl] = ((got.double().cpu() - want).abs().max() / want.abs().max()).item()
    return errors


def benchmark(args):
    """The 7b slide encoder with random weights on made-up slides, each in a process of its own."""
    show = (lambda *text: None) if args.json else print
    show(f"The 7b slide encoder, {args.dtype} on {args.device}; matmul: 4096 x 4096 in the same process")
    jobs, rows = [(n, False) for n in args.tiles] + [(n, True) for n in args.tiles if n <= 10000], []
    for n, training in jobs:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as fresh:
            row = fresh.submit(slide_encoder_cost, n, training, args.device, args.dtype).result()
        rows.append(row)
        show(
            f"  {n:>7} tiles  {row['work']:9}  {row['seconds']:7.2f} s  {1e6 * row['seconds'] / n:6.0f} us/tile  "
            f"{row['flop'] / 1e12:6.2f} TFLOP  {row['flop'] / row['seconds'] / 1e9:6,.0f} of matmul's "
            f"{row['matmul_flop_per_s'] / 1e9:6,.0f} GFLOP/s ({row['share']:.2f})  peak {row['peak_bytes'] / 1e9:.2f} GB"
        )
    if args.json:
        print(json.dumps(rows))


def show_resources(show):
    """For want of a GPU: what the Triton kernels need, by arithmetic and off the machine code -> kernel_resources'."""
    cfg = PRESETS["7b"].slide_encoder
    show("\nNo GPU here. What the Triton kernels need, by arithmetic (estimates) and as compiled for GPUs:")
    for n in (1000, 10000, 100000):
        gflop, megabytes = attention_flops(n + 1, cfg) / 1e9, 4 * (n + 1) * cfg.width * 2 / 1e6
        show(f"  {n:>7} tiles  {gflop:9,.1f} GFLOP  {megabytes:9,.1f} MB read and written (bf16)")
    resources = kernel_resources()
    table = [list(resources[0])] + [list(map(str, row.values())) for row in resources]
    for row in table:
        show("  " + "  ".join(cell.ljust(max(len(r[i]) for r in table)) for i, cell in enumerate(row)))
    return resources


def main():
    parser = argparse.ArgumentParser(
        description="Checks this machine: versions, the model's sizes and shapes, the attention's error and speed."
    )
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object instead of tables")
    add("--tiles", type=int, nargs="*", default=[1000, 10000, 100000], help="slide sizes to time, in tiles")
    add("--benchmark", action="store_true", help="time the whole 7b slide encoder instead")
    add_device_flags(add)
    args = parser.parse_args()
    resolve_device(args)
    if args.benchmark:
        benchmark(args)
        return
    report = {
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else str(args.device),
        "threads": torch.get_num_threads(),
        "dtype": str(args.dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "triton": triton.__version__ if triton else None},
        "error": kernel_error(args.device, args.dtype),
        "times": [],
    }
    show = (lambda *text: None) if args.json else print
    show(", ".join(f"{k} {v}" for k, v in [*report["versions"].items(), *list(report.items())[:3]]))
    show("\nParameters\n" + "\n".join(parameter_table()))
    show("\nShapes, for a slide of 12 tiles through the demo's model\n" + "\n".join(shape_trace()))
    show("\nDilated attention against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in report["error"].items()))
    for n in args.tiles:
        for impl in report["error"]:
            try:
                row = measure_attention(n, impl, args.device, args.dtype)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if "memory" not in str(error):
                    raise
                show(f"  {n:>7} tiles  {impl:6}  does not fit")
                continue
            report["times"].append(row)
            show(
                f"  {n:>7} tiles  {impl:6}  forward {row['forward_s']:8.3f} s ({row['flop_per_s'] / 1e9:,.0f} GFLOP/s)  "
                f"with backward {row['forward_backward_s']:8.3f} s   (one layer of the 7b slide encoder)"
            )
    if args.device.type != "cuda" and triton is not None:
        report["resources"] = show_resources(show)
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    run(main)
