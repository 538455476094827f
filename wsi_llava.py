"""WSI-LLaVA: a multimodal language model for whole slide images, in one file.

Follows WSI-LLaVA (arXiv 2412.02141) on top of Prov-GigaPath (Nature 2024: DINOv2 ViT-g, arXiv 2304.07193,
and LongNet, arXiv 2307.02486), LLaVA-1.5 (arXiv 2310.03744) and Vicuna, a Llama (arXiv 2302.13971). Read it
top to bottom: parts stand in the order in which data flows; the model ends at the banner "The rest".

    tiles [N,256,256,3] uint8, 0.5 um/px             prepare.py cuts them from the slide
      -> preprocess_tiles      [N,3,224,224]
      -> TileEncoder           [N,1536]               one vector a tile
      -> SlideEncoder          [N,768]                tiles see one another: dilated attention (LongNet)
      -> Pool                  [V=576,768]            visual tokens; zero-padded to 1024, as CLIP-L/336's are
      -> mm_projector          [V,4096]               into the language model's embedding space
      -> Llama                 [T+V,32000]            spliced where the prompt says <image>; next-token logits

Words. A whole slide image is a glass slide of tissue, scanned at about 0.25 um a pixel: up to 100,000 pixels
a side, in a file of several resolutions, level 0 the finest. The tiled resolution is the 0.5 um/px at which
tiles are cut, and the unit of coords unless they say level 0. A CLS is a learned token that sums others up.

Glossary of the shape comments, here and everywhere: B batch, S slides, N tiles of a slide, L sequence length
(N + 1 with the CLS), T text tokens, V visual tokens, H heads, D head dim, C channels (C_tile, C_llm: those of
another part), E channels of the space that slides and reports share, W segment length, R dilation.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the torch path serves
    triton = None

TILE = 256  # pixels of a tile's side at the tiled resolution
GRID = 1000  # cells of a tile each along the sides of the position grid


class UserError(Exception):
    """A mistake that the user can mend. Its message is one line: file or flag, what is wrong, what to do."""


def check(holds, message):
    """Raises a UserError with this message unless the condition holds."""
    if not holds:
        raise UserError(message)


# ---- Configs and presets ----


class Config:
    """What the config dataclasses share: a JSON round trip, strict in names and types."""

    def __post_init__(self):
        width, heads = getattr(self, "width", 1), getattr(self, "heads", 1)
        whole = heads > 0 and width % heads == 0  # every head takes the same share of the channels
        check(whole, f"{type(self).__name__}: a width of {width} cannot be shared by {heads} heads")

    def to_json(self):
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_dict(cls, values):
        """Raises UserError for a field that there is not, or a value that it cannot have."""
        types, given = {f.name: f.type for f in dataclasses.fields(cls)}, {}
        for name, value in values.items():
            kind, most = types.get(name), {"depth": 1000, "n_visual_tokens": 100_000}.get(name, 2**31)
            check(kind, f"{cls.__name__} has no field {one_line(name)}: written by another version")
            if issubclass(kind, Config):
                value = kind.from_dict(value)
            given[name] = value = tuple(value) if kind is tuple else value
            numbers = value if kind is tuple else [value] if kind in (int, float) else []
            allowed = (int, float) if kind is float else (kind,)  # 10000 is a float in JSON, true is no int
            fits = type(value) in allowed and all(0 <= number < most for number in numbers)
            check(fits, f"{cls.__name__}: {name} cannot be {one_line(value)}")
        return cls(**given)


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
    dropout: float = 0.25
    drop_path: float = 0.1
    trained_on: str = ""  # fingerprint of the tile encoder whose features stage 1 trained it on


@dataclass
class TextEncoderConfig(Config):
    """Of stage 1. The paper does not name its text encoder; this is a small one of our own."""

    width: int = 512
    depth: int = 6
    heads: int = 8
    mlp_hidden: int = 1408
    max_length: int = 512  # tokens; longer reports are cut
    embed_width: int = 512  # of the space that slides and reports share


@dataclass
class LlamaConfig(Config):
    """The defaults are Vicuna-7b-v1.5; the fields from head_dim on are what other families change."""

    vocab: int = 32000
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32  # 0: as many as heads
    mlp_hidden: int = 11008
    eps: float = 1e-5
    rope_theta: float = 10000.0
    context: int = 4096
    head_dim: int = 0  # 0: width / heads
    rope_scaling: tuple = ()  # Llama 3: factor, low_freq_factor, high_freq_factor, original context
    tied: bool = False  # small models: the embedding is the output matrix too
    family: str = "llama"  # Hugging Face's model_type: mistral, qwen2, qwen3
    adapters: str = ""  # fingerprints of the adapters that were merged into the weights

    def __post_init__(self):
        if not self.head_dim:
            super().__post_init__()
            self.head_dim = self.width // self.heads
        self.kv_heads = self.kv_heads or self.heads


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
    max_tiles: int = 0  # ablation: so many of a slide's tiles, drawn at random (0: all)
    no_slide_encoder: bool = False  # ablation: tile features go straight to the pool


PRESETS = {
    # Small enough for two CPU cores, and the same code in every line.
    "demo": WSILLaVAConfig(
        TileEncoderConfig(width=128, depth=1, heads=2, mlp_hidden=256, layer_scale=1.0),  # untrained
        SlideEncoderConfig(128, 128, 4, 4, 384, (64, 256), (1, 2), dropout=0.0, drop_path=0.0),
        TextEncoderConfig(128, 2, 4, 256, 128, 128),
        LlamaConfig(512, 128, 4, 4, 4, 352, context=512),
        n_visual_tokens=36,
        pad_to=160,
    ),
    "7b": WSILLaVAConfig(),
    "13b": WSILLaVAConfig(llama=LlamaConfig(width=5120, depth=40, heads=40, kv_heads=40, mlp_hidden=13824)),
}


# ---- Tile encoder: a 256-px tile -> one vector (DINOv2 ViT, names as in timm) ----


def preprocess_tiles(tiles):
    """uint8 tiles [B,256,256,3] -> float32 [B,3,224,224]: centre crop, /255, ImageNet mean and std, as
    Prov-GigaPath does (its resize to 256 is the identity here). Raises ValueError for other tiles."""
    if tiles.dtype != torch.uint8 or tiles.shape[1:] != (TILE, TILE, 3):
        raise ValueError(f"tiles must be uint8 [B,256,256,3], not {tiles.dtype} {list(tiles.shape)}")
    x = tiles[:, 16:240, 16:240].permute(0, 3, 1, 2).contiguous().float()  # [B,3,224,224]
    mean = torch.tensor([0.485, 0.456, 0.406], device=x.device).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=x.device).view(3, 1, 1)
    return x.sub_(255 * mean).div_(255 * std)  # in place, channel by channel: memory is what takes the time


class Attention(nn.Module):
    """Self-attention: [B,T,C] -> [B,T,C]. mask: broadcast to [B,H,T,T], True where a query may look."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each [B,H,T,D]
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


class Block(nn.Module):
    """Pre-norm Transformer block of the ViT; stage 1's text encoder reuses it, with a padding mask. A learned
    factor for each channel of a branch starts at layer_scale (arXiv 2103.17239)."""

    def __init__(self, width, heads, mlp_hidden, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = nn.ParameterDict({"gamma": torch.full((width,), layer_scale)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, mlp_hidden)
        self.ls2 = nn.ParameterDict({"gamma": torch.full((width,), layer_scale)})

    def forward(self, x, mask=None):
        x = x + self.ls1["gamma"] * self.attn(self.norm1(x), mask)
        return x + self.ls2["gamma"] * self.mlp(self.norm2(x))


class TileEncoder(nn.Module):
    """Prov-GigaPath's tile encoder: preprocessed images [B,3,224,224] -> [B,C], the CLS after the norm. Names
    are timm's, as in its `pytorch_model.bin`."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        patches = (cfg.image_size // cfg.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, cfg.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, cfg.width, cfg.patch_size, cfg.patch_size)})
        blocks = [Block(cfg.width, cfg.heads, cfg.mlp_hidden, cfg.layer_scale) for _ in range(cfg.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6)

    def forward(self, images):
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # [B,C,14,14] -> [B,196,C]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed  # [B,197,C]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


@torch.no_grad()
def untrained_tile_encoder(cfg=None, seed=0):
    """The demo's tile encoder, with seeded, **untrained** weights: to try the pipeline, not for science. It
    still tells colours and textures apart."""
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


# ---- Dilated attention (LongNet, arXiv 2307.02486) ----
#
# Branch (W, R) cuts the sequence into segments of W tokens. Inside a segment, head h keeps every R-th token,
# starting at token h // ceil(H/R), so that the heads together see all of them. Queries and keys are both the
# kept tokens of one segment. For head 0 and the branches (4, 1) and (16, 2), position 6 sees the keys
#
#     position          0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
#     branch (4, 1)     .  .  .  .  k  k  k  k  .  .  .  .  .  .  .  .      near: its segment, every token
#     branch (16, 2)    k  .  k  .  k  .  k  .  k  .  k  .  k  .  k  .      far: every second token
#     how often, m      1  0  1  0  2  1  2  1  1  0  1  0  1  0  1  0      their multiset union
#
# LongNet runs one softmax attention per branch and mixes the outputs O_j by their softmax denominators Z_j.
# With the scores s_k = q.k_k / sqrt(D), over the keys k of branch j: Z_j = sum_k e^{s_k} and O_j = sum_k
# e^{s_k} v_k / Z_j, so
#
#     sum_j (Z_j / sum_i Z_i) O_j  =  sum_j sum_k e^{s_k} v_k / sum_i Z_i
#                                  =  sum_k m_k e^{s_k} v_k / sum_k m_k e^{s_k}
#
# The Z_j cancel: it is ONE softmax over the union of the branches' keys, a key that two branches keep
# counting twice. So the output O and LSE = log Z of the branches so far are all that has to be carried to the
# next one, as flash attention (arXiv 2205.14135) carries them from one block of keys to the next:
#
#     Z' = Z + Z_j      O' = (Z O + Z_j O_j) / Z'
#
# The backward follows from the same line. With the final LSE = log sum_k m_k e^{s_k} and P_k = m_k e^{s_k -
# LSE}, it is the one of plain attention:
#
#     dv_k = P_k dO      dP_k = dO.v_k      ds_k = P_k (dP_k - sum_i P_i dP_i) = P_k (dO.v_k - dO.O)
#
# m_k counts branches, so each of these is a sum over the branches: the backward of a branch is that of plain
# attention with the final O and LSE in place of its own, and the branches' gradients add up. Upstream takes
# the mixing weights under no_grad and so drops a term; here it is exact.
#
# Zero padding counts: upstream pads segments with zero keys and values and does not mask them, so each padded
# slot adds e^0 = 1 to the denominators of its segment. The released weights were trained so (`pad_keys`).


def _on_cpu(x):
    return x.device.type == "cpu"


def _attend(q, k, v):
    """Softmax attention with its log-sum-exp: [B,H,n,D] each -> out [B,H,n,D], lse [B,H,n]."""
    if _on_cpu(q):  # PyTorch's fused kernel: no n x n matrix, and any strides
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    s = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[3])
    lse = s.logsumexp(-1)
    return (s - lse[..., None]).exp().to(q.dtype) @ v, lse


def _attend_backward(grad, q, k, v, out, lse):
    """Gradients of q, k, v, `out` and `lse` being the union's: P = e^{s - lse}, dS = P (dO v^T - dO.out)."""
    if _on_cpu(q):
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, q, k, v, out, lse, 0.0, False)
    scale = 1 / math.sqrt(q.shape[3])
    p = ((q @ k.transpose(2, 3)).float() * scale - lse[..., None]).exp()
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    ds = (p * ((grad @ v.transpose(2, 3)).float() - delta) * scale).to(q.dtype)
    return ds @ k, ds.transpose(2, 3) @ q, p.to(q.dtype).transpose(2, 3) @ grad


def _branches(L, H, segments, dilations):
    """Yields (where, padded) for all tokens that attend to one another: `where` is what _kept takes, `padded`
    the number of zero keys that upstream's padding adds to each segment."""
    for W, R in zip(segments, dilations):
        W = min(W, L)
        rest = L % W
        sharing = math.ceil(H / R)  # heads that start at the same token
        for offset, head in enumerate(range(0, H, sharing)):
            every, heads = slice(offset, None, R), slice(head, head + sharing)
            for tokens, length in ((slice(L - rest), W), (slice(L - rest, L), rest)):  # whole ones; the rest
                kept = len(range(offset, length, R))
                if kept > 0:
                    yield (tokens, length, every, heads), math.ceil(W / R) - kept


def _kept(x, tokens, length, every, heads):
    """What some heads keep of x [B,L,H,...], as a view [B,S,n,h,...]: n tokens in each of S segments."""
    segments = x[:, tokens].unflatten(1, (-1, length))  # [B,S,length,H,...]
    return segments[:, :, every, heads]


class _DilatedAttention(torch.autograd.Function):
    """The torch path, and the kernels' specification: branch by branch, by views of q, k, v [B,L,H,D]."""

    @staticmethod
    def forward(ctx, q, k, v, segments, dilations, pad_keys):
        B, L, H, D = q.shape
        accumulate = torch.promote_types(q.dtype, torch.float32)
        # [B,L,H,...] as everywhere, but each head's rows lie together in memory: merging is a tenth faster.
        out = torch.zeros(B, H, L, D, dtype=accumulate, device=q.device).transpose(1, 2)
        lse = torch.full((B, H, L), -math.inf, dtype=accumulate, device=q.device).transpose(1, 2)
        for where, padded in _branches(L, H, segments, dilations):
            qv, kv, vv = (_kept(x, *where).flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # [B*S,h,n,D]
            o, l = _attend(qv, kv, vv)  # [B*S,h,n,D], [B*S,h,n]
            total, old = _kept(out, *where), _kept(lse, *where)  # [B,S,n,h,D], [B,S,n,h]
            o = o.transpose(1, 2).view_as(total).to(accumulate)
            l = l.transpose(1, 2).reshape(old.shape).to(accumulate)
            # Z' = Z + Z_j, in logarithms
            new = torch.logaddexp(old, l)
            if pad_keys and padded:
                new = torch.logaddexp(new, torch.full_like(new, math.log(padded)))
            # O' = (Z O + Z_j O_j) / Z'
            total.mul_((old - new).exp().unsqueeze(-1)).addcmul_(o, (l - new).exp().unsqueeze(-1))
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
        for where, _ in _branches(L, H, *ctx.branches):
            # The zero keys of the padding add to the denominator alone, which is in lse already.
            views = (_kept(x, *where).flatten(0, 1).transpose(1, 2) for x in (grad, q, k, v, out, lse))
            gv, qv, kv, vv, ov, lv = views  # [B*S,h,n,D], the last [B*S,h,n]
            for total, part in zip(grads, _attend_backward(gv, qv, kv, vv, ov, lv.contiguous())):
                total = _kept(total, *where)
                total += part.transpose(1, 2).view_as(total)  # [B,S,n,h,D]
        return *(g.to(q.dtype) for g in grads), None, None, None


# ---- Dilated attention as Triton kernels ----
#
# One launch a branch, each plain flash attention over rows that lie R apart. Query i carries m, Z and acc
# through the keys j; what the branch before left as o_i and LSE_i is where this one starts (m = LSE_i, Z = 1,
# acc = o_i):
#
#     s_ij = q_i.k_j / sqrt(D)      m' = max(m, s_ij)      Z' = Z e^(m - m') + e^(s_ij - m')
#                                                        acc' = acc e^(m - m') + e^(s_ij - m') v_j
#     o_i = acc / Z                 LSE_i = m + log Z      (a padded zero key adds e^(0 - m) to Z alone)
#
# and backward, with the final LSE in every branch and delta_i = dO_i.o_i:
#
#     P_ij = e^(s_ij - LSE_i)       dv_j = sum_i P_ij dO_i
#     dS_ij = P_ij (dO_i.v_j - delta_i)
#                                   dq_i = sum_j dS_ij k_j / sqrt(D)      dk_j = sum_i dS_ij q_i / sqrt(D)
#
# One kernel sums over j (dq), one over i (dk, dv). The relation is symmetric: the queries that attend to a
# row are the rows that it attends to, so all three kernels find their tokens alike. A program alone writes
# its rows and the branches come one after the other: no atomics, so the same input gives the same bits.
#
# Memory traffic, counted not measured. Upstream gathers q, k and v of every branch (read and write 3 LC/R),
# attends (4 LC/R), scatters the result into zeros (LC + LC/R) and mixes the branches (15 LC in all): with R =
# 1, 2, 4, 8, 16 in bfloat16 83 LC bytes a layer. Here q, k, v are read in place (6/R bytes), and out is
# carried in float32: zeroed (4), read and written by every branch (8/R), rounded at the end (6); with lse 37
# LC bytes. With C = 768 that is 0.63 against 0.29 GB a layer for L = 10,000. One kernel for all branches
# would move 8 LC bytes, with nested loops and smaller blocks. (The backward carries dq, dk and dv likewise.)
#
# Limits: triton 3; NVIDIA GPUs from sm_80 on; float32 (products in full precision, without tensor cores),
# bfloat16, float16; D from 16 to 128, padded to a power of 2 inside; B * H and the segments of a branch at
# most 65,535 (the grid); offsets inside a segment within 32 bits, so W * H * D < 2^31.

if triton is not None:
    # Triton's interpreter (3.9) multiplies the bit patterns of bfloat16 in tl.dot: there, convert first.
    _INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

    @triton.jit
    def _dot(a, b):
        """a @ b in float32; float32 products in full precision, not TF32."""
        if _INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, input_precision="ieee")

    @triton.jit
    def _segment(L, H, W, R):
        """This program's head and segment in branch (W, R) -> where in [B,L,H] the first token that it keeps
        lies, how many it keeps, and how many slots of the segment are padding."""
        head, batch = tl.program_id(1) % H, tl.program_id(1) // H
        start, offset = tl.program_id(2) * W, head // tl.cdiv(H, R)
        kept = tl.cdiv(tl.maximum(tl.minimum(W, L - start) - offset, 0), R)
        return (batch.to(tl.int64) * L + start + offset) * H + head, kept, tl.cdiv(W, R) - kept

    @triton.jit
    def _tokens(first, kept, stride, D, N: tl.constexpr, BLOCK_D: tl.constexpr):
        """The N kept tokens from `first` on: numbers [N], offsets [N,BLOCK_D], and which of these exist."""
        i, d = first + tl.arange(0, N), tl.arange(0, BLOCK_D)
        return i, (i * stride)[:, None] + d[None, :], (i < kept)[:, None] & (d < D)[None, :]

    @triton.jit(do_not_specialize=["L", "W", "R"])
    def _forward_kernel(
        q, k, v, out, lse, scale, L, H, D, W, R,
        PAD: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Adds a branch's keys to out [B,L,H,D] and lse [B,L,H] (in powers of 2) of a block of queries."""
        place, kept, padded = _segment(L, H, W, R)
        first, step = tl.program_id(0) * BLOCK, R * H
        if first >= kept:
            return
        q, k, v, out, lse = q + place * D, k + place * D, v + place * D, out + place * D, lse + place
        i, rows, inside = _tokens(first, kept, step * D, D, BLOCK, BLOCK_D)
        qs = tl.load(q + rows, inside, other=0.0)
        acc = tl.load(out + rows, inside, other=0.0)
        m = tl.load(lse + i * step, i < kept, other=0.0)
        total = tl.full([BLOCK], 1.0, tl.float32)
        for t in range(0, kept, KEYS):
            j, keys, live = _tokens(t, kept, step * D, D, KEYS, BLOCK_D)
            # s_ij = q_i.k_j / sqrt(D)
            ks = tl.load(k + keys, live, other=0.0)
            s = tl.where((j < kept)[None, :], _dot(qs, tl.trans(ks)) * scale, float("-inf"))
            # m' = max(m, s_ij)
            new = tl.maximum(m, tl.max(s, 1))
            p, shrink = tl.exp2(s - new[:, None]), tl.exp2(m - new)
            # Z' = Z e^(m - m') + e^(s_ij - m')
            total = total * shrink + tl.sum(p, 1)
            # acc' = acc e^(m - m') + e^(s_ij - m') v_j
            vs = tl.load(v + keys, live, other=0.0)
            acc = acc * shrink[:, None] + _dot(p.to(vs.dtype), vs)
            m = new
        if PAD:
            # e^(0 - m) for Z from each zero key, nothing for acc
            new = tl.where(padded > 0, tl.maximum(m, 0.0), m)
            shrink = tl.exp2(m - new)
            total = total * shrink + padded * tl.exp2(tl.minimum(-new, 0.0))
            acc = acc * shrink[:, None]
            m = new
        # o_i = acc / Z;  LSE_i = m + log Z
        tl.store(out + rows, acc / total[:, None], inside)
        tl.store(lse + i * step, m + tl.log2(total), i < kept)

    @triton.jit(do_not_specialize=["L", "W", "R"])
    def _dq_kernel(
        q, k, v, lse, grad, delta, dq, scale, L, H, D, W, R,
        BLOCK: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Adds a branch's share to dq [B,L,H,D] of a block of queries."""
        place, kept, _ = _segment(L, H, W, R)
        first, step = tl.program_id(0) * BLOCK, R * H
        if first >= kept:
            return
        q, k, v, grad = q + place * D, k + place * D, v + place * D, grad + place * D
        lse, delta, dq = lse + place, delta + place, dq + place * D
        i, rows, inside = _tokens(first, kept, step * D, D, BLOCK, BLOCK_D)
        qs = tl.load(q + rows, inside, other=0.0)
        gs = tl.load(grad + rows, inside, other=0.0)
        z = tl.load(lse + i * step, i < kept, other=0.0)
        dl = tl.load(delta + i * step, i < kept, other=0.0)
        acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for t in range(0, kept, KEYS):
            j, keys, live = _tokens(t, kept, step * D, D, KEYS, BLOCK_D)
            # P_ij = e^(s_ij - LSE_i)
            ks = tl.load(k + keys, live, other=0.0)
            s = tl.where((j < kept)[None, :], _dot(qs, tl.trans(ks)) * scale, float("-inf"))
            p = tl.exp2(s - z[:, None])
            # dS_ij = P_ij (dO_i.v_j - delta_i)
            vs = tl.load(v + keys, live, other=0.0)
            ds = p * (_dot(gs, tl.trans(vs)) - dl[:, None])
            # dq_i = sum_j dS_ij k_j / sqrt(D)
            acc += _dot(ds.to(ks.dtype), ks)
        acc = acc * (scale * 0.6931471805599453)  # ln 2: scale carries log2(e)
        tl.store(dq + rows, tl.load(dq + rows, inside, other=0.0) + acc, inside)

    @triton.jit(do_not_specialize=["L", "W", "R"])
    def _dkv_kernel(
        q, k, v, lse, grad, delta, dk, dv, scale, L, H, D, W, R,
        BLOCK: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Adds a branch's share to dk and dv [B,L,H,D] of a block of keys."""
        place, kept, _ = _segment(L, H, W, R)
        first, step = tl.program_id(0) * BLOCK, R * H
        if first >= kept:
            return
        q, k, v, grad = q + place * D, k + place * D, v + place * D, grad + place * D
        lse, delta, dk, dv = lse + place, delta + place, dk + place * D, dv + place * D
        j, rows, inside = _tokens(first, kept, step * D, D, BLOCK, BLOCK_D)
        ks = tl.load(k + rows, inside, other=0.0)
        vs = tl.load(v + rows, inside, other=0.0)
        acc_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        acc_v = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for t in range(0, kept, KEYS):
            i, queries, live = _tokens(t, kept, step * D, D, KEYS, BLOCK_D)
            # No mask here: queries that do not exist are loaded as zeros with zero gradients: they add 0.
            qs = tl.load(q + queries, live, other=0.0)
            gs = tl.load(grad + queries, live, other=0.0)
            z = tl.load(lse + i * step, i < kept, other=0.0)
            dl = tl.load(delta + i * step, i < kept, other=0.0)
            # P_ij = e^(s_ij - LSE_i)
            p = tl.exp2(_dot(ks, tl.trans(qs)) * scale - z[None, :])
            # dv_j = sum_i P_ij dO_i
            acc_v += _dot(p.to(gs.dtype), gs)
            # dS_ij = P_ij (dO_i.v_j - delta_i)
            ds = p * (_dot(vs, tl.trans(gs)) - dl[None, :])
            # dk_j = sum_i dS_ij q_i / sqrt(D)
            acc_k += _dot(ds.to(qs.dtype), qs)
        acc_k = acc_k * (scale * 0.6931471805599453)
        tl.store(dk + rows, tl.load(dk + rows, inside, other=0.0) + acc_k, inside)
        tl.store(dv + rows, tl.load(dv + rows, inside, other=0.0) + acc_v, inside)


def _launch_options(kernel, D, dtype):
    """Rows and keys of a block, warps, stages: the largest that spill nothing on sm_80, 86, 89 and 90."""
    table = {  # float32: D up to 64, up to 128; bfloat16 and float16: D up to 64, up to 128
        _forward_kernel: ((64, 32, 8, 2), (16, 32, 8, 2), (128, 128, 8, 3), (64, 128, 8, 2)),
        _dq_kernel: ((32, 64, 8, 2), (64, 16, 8, 2), (128, 64, 8, 3), (64, 64, 8, 2)),
        _dkv_kernel: ((64, 16, 8, 2), (32, 16, 4, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
    }
    block, keys, warps, stages = table[kernel][2 * (dtype != torch.float32) + (D > 64)]
    width = max(16, triton.next_power_of_2(D))
    return {"BLOCK": block, "KEYS": keys, "BLOCK_D": width, "num_warps": warps, "num_stages": stages}


def _launch(kernel, tensors, branches, **constants):
    """Runs a kernel branch by branch: a program for each block of tokens that a head keeps of a segment."""
    B, L, H, D = tensors[0].shape
    options = _launch_options(kernel, D, tensors[0].dtype)
    scale = math.log2(math.e) / math.sqrt(D)
    for W, R in branches:
        grid = triton.cdiv(triton.cdiv(W, R), options["BLOCK"]), B * H, triton.cdiv(L, W)
        kernel[grid](*tensors, scale, L, H, D, W, R, **constants, **options)


class _TritonDilatedAttention(torch.autograd.Function):
    """The same by the Triton kernels: one forward, two backward."""

    @staticmethod
    def forward(ctx, q, k, v, segments, dilations, pad_keys):
        B, L, H, D = q.shape
        q, k, v = (x.contiguous() for x in (q, k, v))
        out = torch.zeros(B, L, H, D, dtype=torch.float32, device=q.device)
        lse = torch.full((B, L, H), -math.inf, dtype=torch.float32, device=q.device)  # of powers of 2
        # A segment longer than the sequence is the sequence.
        ctx.branches = [(min(W, L), R) for W, R in zip(segments, dilations)]
        _launch(_forward_kernel, (q, k, v, out, lse), ctx.branches, PAD=pad_keys)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        delta = (grad.float() * out.float()).sum(-1)  # [B,L,H]
        dq, dk, dv = (torch.zeros_like(q, dtype=torch.float32) for _ in range(3))
        _launch(_dq_kernel, (q, k, v, lse, grad, delta, dq), ctx.branches)
        _launch(_dkv_kernel, (q, k, v, lse, grad, delta, dk, dv), ctx.branches)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, None, None


def _kernels_serve(q, segments, dilations):
    """Whether the Triton kernels can take this: see their limits."""
    if triton is None or int(triton.__version__.split(".")[0]) < 3:
        return False
    (B, L, H, D), longest = q.shape, min(max(segments), q.shape[1])
    offsets, blocks = max(L, longest * H * D, 2 * max(dilations)), max(B * H, L // min(segments))
    there = q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    fits = q.dtype in (torch.float32, torch.bfloat16, torch.float16) and 16 <= D <= 128
    return there and fits and offsets < 2**31 and blocks <= 65535


def dilated_attention(q, k, v, segments, dilations, pad_keys=True, impl="auto"):
    """LongNet's dilated attention: q, k, v [B,L,H,D] -> [B,L,H,D]. Memory is linear in L (but for MPS's).
    segments, dilations: the branches' W and R, one each. pad_keys: count upstream's zero padding (see above);
    False is the clean variant for training from scratch. A query that no branch keeps gets zeros. impl:
    "torch", "triton", or "auto": Triton on a GPU that it can serve, torch elsewhere. Raises ValueError where
    "triton" cannot serve. Source: torchscale's DilatedAttention as Prov-GigaPath uses it."""
    if len(segments) != len(dilations) or impl not in ("torch", "triton", "auto"):
        raise ValueError(f"as many segments as dilations, and a known impl: {segments}, {dilations}, {impl}")
    serve = (q.is_cuda or impl == "triton") and _kernels_serve(q, segments, dilations)
    if impl == "triton" and not serve:
        what = f"{q.dtype} {list(q.shape)} on {q.device}, segments {segments}"
        raise ValueError(f"the Triton kernels cannot take {what}: see their limits in wsi_llava.py")
    function = _TritonDilatedAttention if serve and impl != "torch" else _DilatedAttention
    return function.apply(q, k, v, tuple(segments), tuple(dilations), pad_keys)


# ---- Slide encoder: all tiles of a slide -> tiles in context (LongNet, names as in Prov-GigaPath) ----


def grid_cells(coords):
    """Tiles' coords [...,2] -> their cells in the position grid. Raises ValueError for one outside of it."""
    cells = torch.div(coords, TILE, rounding_mode="floor")
    if cells.numel() and (cells.min() < 0 or cells.max() >= GRID):  # level-0 coordinates look like this
        what = f"tile position {int(cells.min())}..{int(cells.max())} is outside the grid 0..{GRID - 1}"
        raise ValueError(f"{what}: the coordinates are not in pixels at the tiled resolution")
    return cells


def position_embedding(coords, width):
    """Fixed 2-D sin-cos embedding of tiles: coords [...,2] (x, y) in tiled pixels -> [...,C]. The first half
    of the channels is the row (y), the second the column (x), as [sin | cos] of cell / 10000^(i / (C/4)). One
    table of GRID rows serves both: upstream's has GRID^2 rows, 3 GB at 768."""
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(GRID)[:, None] * frequency  # [grid,C/4]
    table = torch.cat([angle.sin(), angle.cos()], dim=-1).float()  # [grid,C/2]
    cells = grid_cells(coords).long().flip(-1)  # [...,2 (y, x)]
    return table.to(coords.device)[cells].flatten(-2)  # [...,2,C/2] -> [...,C]


class Pool(nn.Module):
    """The tiles in context -> visual tokens, averages along the raster order, [B,N,C] -> [B,n,C]; fewer tiles
    than n repeat. Another pool goes here; stage 1 trains it."""

    def __init__(self, cfg, n):
        super().__init__()
        self.n = n

    def forward(self, tokens):
        return F.adaptive_avg_pool1d(tokens.transpose(1, 2), self.n).transpose(1, 2)


class SlideFFN(nn.Module):
    """LongNet's feed-forward layer, [L,C] -> [L,C], with the sub-LN between its two matrices."""

    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(cfg.width, cfg.mlp_hidden)
        self.ffn_layernorm = nn.LayerNorm(cfg.mlp_hidden, eps=1e-5)
        self.fc2 = nn.Linear(cfg.mlp_hidden, cfg.width)

    def forward(self, x):
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))


SHORT = 128  # tokens of a slide, its CLS included, up to which dilated attention is done densely


@functools.lru_cache(256)
@torch.inference_mode(False)  # kept, and then used where gradients are taken too
def short_bias(L, H, segments, dilations, pad_keys):
    """log m of each query and key, m the number of branches that hold the pair: added to the scores it makes
    dense attention dilated. [H,L,1+L]; key 0 is a zero key, for those of the padding."""
    counts = torch.zeros(H, L, 1 + L)
    positions = torch.arange(L)[None, :, None].expand(1, L, H)
    for where, padded in _branches(L, H, segments, dilations):
        heads = where[-1]
        for kept in _kept(positions, *where)[0, :, :, 0]:  # of each segment [n], alike for all these heads
            counts[heads, kept[:, None], 1 + kept] += 1
            counts[heads, kept, 0] += padded if pad_keys else 0
    counts[..., 0] += counts.sum(-1) == 0  # a query that no branch keeps sees the zero key alone: zeros
    return counts.log()


def attend_short(q, k, v, lengths, cfg):
    """Dilated attention within slides of up to SHORT tokens, [sum of L,H,D] -> the same, in one dense call:
    branch by branch, so few tokens are all overhead."""
    longest = max(lengths)
    bias = torch.full((len(lengths), cfg.heads, longest, 1 + longest), -math.inf)
    bias[..., 0] = 0  # padding sees the zero key alone
    for slide, L in zip(bias, lengths):
        slide[:, :L, : 1 + L] = short_bias(L, cfg.heads, cfg.segments, cfg.dilations, cfg.pad_keys)
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    q, k, v = (pad(x.split(lengths)).transpose(1, 2) for x in (q, k, v))  # [S,H,L,D]
    k, v = (F.pad(x, (0, 0, 1, 0)) for x in (k, v))  # [S,H,1+L,D]
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.device, q.dtype))
    return torch.cat([slide[:L] for slide, L in zip(attended.transpose(1, 2), lengths)])


class SlideAttention(nn.Module):
    """Dilated attention within each slide, [sum of L,C] -> the same, with LongNet's sub-LN."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.q_proj = nn.Linear(cfg.width, cfg.width)
        self.k_proj = nn.Linear(cfg.width, cfg.width)
        self.v_proj = nn.Linear(cfg.width, cfg.width)
        self.inner_attn_ln = nn.LayerNorm(cfg.width, eps=1e-5)  # sub-LN: keeps deep networks stable
        self.out_proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x, lengths):
        cfg, q, k, v = self.cfg, self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [sum of L,C] each
        q, k, v = (y.unflatten(1, (cfg.heads, -1)) for y in (q, k, v))  # [sum of L,H,D] each
        if max(lengths) <= SHORT:
            attended = attend_short(q, k, v, lengths, cfg)
        else:
            attended = []
            for slide in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
                slide = (y[None] for y in slide)  # [1,L,H,D]
                attended += dilated_attention(*slide, cfg.segments, cfg.dilations, cfg.pad_keys)
            attended = torch.cat(attended)
        return self.out_proj(self.inner_attn_ln(attended.flatten(1)))


class SlideLayer(nn.Module):
    """A LongNet layer over packed slides, [sum of L,C] -> the same; lengths: the L of each, for the attention
    and stochastic depth."""

    def __init__(self, cfg, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.dropout = nn.Dropout(cfg.dropout)
        self.self_attn_layer_norm = nn.LayerNorm(cfg.width, eps=1e-5)
        self.self_attn = SlideAttention(cfg)
        self.final_layer_norm = nn.LayerNorm(cfg.width, eps=1e-5)
        self.ffn = SlideFFN(cfg)

    def residual(self, x, update, lengths):
        """x + update, with dropout; in training at times without a slide's update (stochastic depth)."""
        update = self.dropout(update)
        if self.training and self.drop_path > 0:
            keep = torch.rand(len(lengths), device=x.device) >= self.drop_path  # [S]
            keep = keep.repeat_interleave(torch.tensor(lengths, device=x.device))  # [sum of L]
            update = update * keep[:, None] / (1 - self.drop_path)
        return x + update

    def forward(self, x, lengths):
        x = self.residual(x, self.self_attn(self.self_attn_layer_norm(x), lengths), lengths)
        return self.residual(x, self.ffn(self.final_layer_norm(x)), lengths)


class SlideEncoder(nn.Module):
    """Prov-GigaPath's slide encoder (LongNet), named as in its `slide_encoder.pth`: features
    [sum of N,C_tile], coords [sum of N,2] in tiled pixels, lengths: the N of each slide -> (cls [S,C], tokens
    [sum of N,C]), both after the final norm. A slide's results do not depend on its company."""

    def __init__(self, cfg, n_visual_tokens=576):
        super().__init__()
        self.cfg = cfg
        self.checkpointing = False  # True: recompute the layers in the backward pass, for long slides
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(cfg.in_width, cfg.width)})
        self.dropout = nn.Dropout(cfg.dropout)
        rates = [cfg.drop_path * i / max(1, cfg.depth - 1) for i in range(cfg.depth)]
        layers = nn.ModuleList(SlideLayer(cfg, rate) for rate in rates)
        self.encoder = nn.ModuleDict({"layers": layers, "layer_norm": nn.LayerNorm(cfg.width, eps=1e-5)})
        self.pool = Pool(cfg, n_visual_tokens)
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6)

    def encode(self, features, coords, lengths):
        """-> of each slide [1+N,C] before the final norm, the CLS first."""
        x = self.patch_embed["proj"](features)  # [sum of N,C]
        x = x + position_embedding(coords, self.cfg.width).to(x.dtype)
        rows = []
        for slide in x.split(lengths):
            rows += [self.cls_token[0], slide]  # [1,C], without a position; [N,C]
        x, lengths = self.dropout(torch.cat(rows)), [1 + n for n in lengths]  # [sum of 1+N,C]
        for layer in self.encoder["layers"]:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, lengths, use_reentrant=False)
            else:
                x = layer(x, lengths)
        return self.encoder["layer_norm"](x).split(lengths)

    def forward(self, features, coords, lengths):
        slides = [self.norm(slide) for slide in self.encode(features, coords, lengths)]  # [1+N,C] each
        cls = torch.stack([slide[0] for slide in slides])  # [S,C]
        return cls, torch.cat([slide[1:] for slide in slides])  # [sum of N,C]

    def visual_tokens(self, features, coords, lengths):
        """What the language model sees: the tiles in context, without CLS, pooled, then normed, [S,V,C]."""
        slides = self.encode(features, coords, lengths)
        return self.norm(torch.cat([self.pool(slide[None, 1:]) for slide in slides]))

    @torch.no_grad()
    def standardize_inputs(self, features):
        """Sets an untrained encoder's first layer so that features [N,C_tile] enter with mean 0, deviation 1:
        what all tiles have in common is many times what tells them apart, and stalls stage 1."""
        std, mean = torch.std_mean(features.float(), dim=0)  # [C_tile] each
        proj = self.patch_embed["proj"]
        proj.weight /= std.clamp(min=1e-4)
        proj.bias -= proj.weight @ mean


# ---- Stage 1's model: slides and reports in one space ----


class TextEncoder(nn.Module):
    """Reports as the LLM's (frozen) token embeddings [B,T,C_llm], mask [B,T] (True: a token) -> [B,C]."""

    def __init__(self, cfg, in_width):
        super().__init__()
        self.embed = nn.Linear(in_width, cfg.width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, cfg.max_length, cfg.width))
        blocks = [Block(cfg.width, cfg.heads, cfg.mlp_hidden, 1.0) for _ in range(cfg.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6)

    def forward(self, token_embeds, mask):
        _, T, C = token_embeds.shape
        # An LLM's embeddings are small: without the norm, the position embedding drowns them.
        x = self.embed(F.layer_norm(token_embeds, (C,))) + self.pos_embed[:, :T]  # [B,T,C_llm] -> [B,T,C]
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])  # [B,1,1,T]: nobody looks at the padding
        x = self.norm(x) * mask.unsqueeze(-1)  # [B,T,C], zero at the padding
        return x.sum(1) / mask.sum(1, keepdim=True)  # [B,C] / [B,1]


class WSITextAlignment(nn.Module):
    """Stage 1: slide encoder, text encoder, a linear head each to the shared space; CLIP's temperature. A
    slide's embedding is the mean of its visual tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.slide_encoder = SlideEncoder(cfg.slide_encoder, cfg.n_visual_tokens)
        self.text_encoder = TextEncoder(cfg.text_encoder, cfg.llama.width)
        self.slide_head = nn.Linear(cfg.slide_encoder.width, cfg.text_encoder.embed_width, bias=False)
        self.text_head = nn.Linear(cfg.text_encoder.width, cfg.text_encoder.embed_width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_slides(self, features, coords, lengths):
        """features [sum of N,C_tile], coords [sum of N,2], lengths: each N -> [S,E] of unit length."""
        tokens = self.slide_encoder.visual_tokens(features, coords, lengths)  # [S,V,C]
        return F.normalize(self.slide_head(tokens.mean(1)), dim=-1)

    def embed_words(self, ids, words):
        """ids: B lists of tokens; words: the LLM's token embeddings [vocab,C] -> [B,E] of unit length."""
        ids = [torch.tensor(row, device=words.device) for row in ids]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)  # [B,T]
        token_embeds = F.embedding(ids.clamp(min=0), words).to(self.logit_scale.dtype)  # [B,T,C_llm]
        return F.normalize(self.text_head(self.text_encoder(token_embeds, ids >= 0)), dim=-1)

    def loss(self, slides, texts):
        """Symmetric InfoNCE over pairs [B,E]: each slide finds its report, each report its slide."""
        logits = self.logit_scale.exp().clamp(max=100) * slides @ texts.T  # [B slides,B texts]
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# ---- Projector and Llama (names as in LLaVA and in Hugging Face, less their leading "model.") ----


def make_projector(in_width, width):
    """LLaVA-1.5's `mlp2x_gelu`: visual tokens -> the language model's embedding space."""
    return nn.Sequential(nn.Linear(in_width, width), nn.GELU(), nn.Linear(width, width))


def rotary_tables(cfg, start, T, device, dtype):
    """cos and sin [T,D] of the positions from `start` on, half-split: channel i turns with i + D/2."""
    share = torch.arange(0, cfg.head_dim, 2, device=device).float() / cfg.head_dim
    frequency = cfg.rope_theta**-share  # [D/2]
    if cfg.rope_scaling:
        # Llama 3 reads longer texts than it was first trained on: channels that turn `high` times or more
        # over that context stay, those that turn `low` times or less turn slower by `factor`; between, a mix.
        factor, low, high, original = cfg.rope_scaling
        turns = original * frequency / (2 * math.pi)
        stays = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (stays + (1 - stays) / factor)
    angle = torch.arange(start, start + T, device=device).float()[:, None] * frequency  # [T,D/2]
    angle = torch.cat([angle, angle], dim=-1)  # [T,D]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """x [B,H,T,D] turned by its position; channels pair up by halves, as the weights want it."""
    a, b = x.chunk(2, dim=-1)  # [B,H,T,D/2] each
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class KVCache:
    """Keys and values of all positions so far, allocated once: per layer [B,H_kv,capacity,D] twice."""

    def __init__(self, cfg, batch, capacity, device, dtype):
        shape = (cfg.depth, 2, batch, cfg.kv_heads, min(capacity, cfg.context), cfg.head_dim)
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer, k, v):
        """Stores k, v [B,H_kv,T,D] of the new positions; returns all up to them."""
        end = self.length + k.shape[2]
        self.kv[layer, :, :, :, self.length : end] = torch.stack([k, v])
        return self.kv[layer, :, :, :, :end]  # [2,B,H_kv,end,D]


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions, [B,T,C] -> [B,T,C]; query heads may share a key head.
    cos, sin: of the T positions. cache: a KVCache whose `layer` holds those before them, or None."""

    def __init__(self, cfg):
        super().__init__()
        self.head_dim, self.grouped = cfg.head_dim, cfg.kv_heads != cfg.heads
        biased, normed = cfg.family == "qwen2", cfg.family == "qwen3"  # normed head by head, before rotating
        self.q_proj = nn.Linear(cfg.width, cfg.heads * cfg.head_dim, bias=biased)
        self.k_proj = nn.Linear(cfg.width, cfg.kv_heads * cfg.head_dim, bias=biased)
        self.v_proj = nn.Linear(cfg.width, cfg.kv_heads * cfg.head_dim, bias=biased)
        self.o_proj = nn.Linear(cfg.heads * cfg.head_dim, cfg.width, bias=False)
        self.q_norm = nn.RMSNorm(cfg.head_dim, cfg.eps) if normed else nn.Identity()
        self.k_norm = nn.RMSNorm(cfg.head_dim, cfg.eps) if normed else nn.Identity()

    def forward(self, x, cos, sin, cache, layer):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # [B,H,T,D]
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # [B,H_kv,T,D]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B,H_kv,T,D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # [B,H_kv,past+T,D]
        past, mask = k.shape[2] - T, None
        if past and T > 1:  # a later turn of a chat: row t sees everything before it, and itself
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        causal = past == 0 and T > 1
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
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
        self.input_layernorm = nn.RMSNorm(cfg.width, cfg.eps)  # arXiv 1910.07467, in float32
        self.self_attn = LlamaAttention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.width, cfg.eps)
        self.mlp = LlamaMLP(cfg)

    def forward(self, x, cos, sin, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A Llama decoder or its kin (Mistral, Qwen2, Qwen3): ids [B,T] or embeds [B,T,C] -> logits [B,T,vocab].
    cache: a KVCache of the positions before these, and then these too. only: an index into [B,T], as a mask,
    of the n positions whose logits are wanted, [n,vocab]. UserError: the positions exceed the context."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.width)
        self.layers = nn.ModuleList(LlamaLayer(cfg) for _ in range(cfg.depth))
        self.norm = nn.RMSNorm(cfg.width, cfg.eps)
        self.lm_head = None if cfg.tied else nn.Linear(cfg.width, cfg.vocab, bias=False)

    def forward(self, ids=None, embeds=None, cache=None, only=...):
        x = self.embed_tokens(ids) if embeds is None else embeds
        B, T, C = x.shape
        past = cache.length if cache is not None else 0
        room = f"the language model's context holds {self.cfg.context}; shorten it or start a new chat"
        check(past + T <= self.cfg.context, f"the prompt is too long: {past + T} tokens, {room}")
        cos, sin = rotary_tables(self.cfg, past, T, x.device, x.dtype)
        for i, layer in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, cache, i, use_reentrant=False)
            else:
                x = layer(x, cos, sin, cache, i)
        if cache is not None:
            cache.length += T
        x = self.norm(x[only])  # [n,C], or all [B,T,C]
        return F.linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)


# ---- Tokenizer and prompt ----

IMAGE_TOKEN = -200  # stands in a sequence of ids where the visual tokens go; LLaVA's value
IGNORE = -100  # label of a position that carries no loss; PyTorch's ignore_index


@dataclass
class ChatFormat:
    """How a family of language models writes a conversation down: templates whose {} is what was said."""

    start: str  # before the first turn: the system prompt
    human: str  # a question, up to where its answer begins
    end: str  # the token that ends an answer
    between: str = ""  # between an answer's end and the next question
    bos: str = ""  # the token before everything


CHAT_FORMATS = {
    "llama3": ChatFormat(
        "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "chatml": ChatFormat(  # Qwen, SmolLM2
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
        between="\n",
    ),
    "mistral": ChatFormat("", "[INST] {}[/INST]", "</s>", bos="<s>"),
    "vicuna": ChatFormat(  # LLaVA's vicuna_v1, and any model without special tokens for a chat
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        "USER: {} ASSISTANT:",
        "</s>",
        bos="<s>",
    ),
}
SPECIAL_TOKENS = r"<\|\w+\|>|\[/?INST\]"  # of a chat, as the templates name them


def without_image(text):
    """A question without the <image> placeholder, which stands on a line of its own before or after it."""
    return re.sub(r"\n?<image>\n?", "", text)


def slide_first(turns, image=True):
    """Moves <image> to the front of the first turn, as LLaVA does; image False: drops it."""
    turns = [{**turn, "value": without_image(turn["value"])} for turn in turns]
    turns[0]["value"] = "<image>\n" * image + turns[0]["value"]
    return turns


def read_pieces(path):
    """tokenizer.model (SentencePiece) or tokenizer.json -> encode, decode, a special token's id, size."""
    if path.suffix != ".json":
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ids = {model.id_to_piece(i): i for i in range(len(model))}
        return model.encode, model.decode, ids.get, len(model)
    try:
        from tokenizers import Tokenizer as Fast
    except ImportError:
        raise UserError(f"{path}: needs another package to be read; pip install tokenizers") from None
    model = Fast.from_file(str(path))
    model.encode_special_tokens = True  # "<|im_end|>" in a question is text, and ends nothing
    model.no_padding()  # a file may ask for both
    model.no_truncation()
    encode = functools.partial(model.encode, add_special_tokens=False)
    return lambda text: encode(text).ids, model.decode, model.token_to_id, model.get_vocab_size()


class Tokenizer:
    """A language model's tokenizer and its prompts, by default the first of CHAT_FORMATS whose special tokens
    it has. eos ends an answer; ends: every token that does."""

    def __init__(self, path, chat=None):
        self.path = Path(path)
        with reading(path, "copy the language model's tokenizer.model or tokenizer.json again"):
            # encode: a text -> its ids, a list; id: a special token -> its id, or None
            self.encode, self.decode_ids, self.id, self.size = read_pieces(self.path)
        for self.chat in [CHAT_FORMATS[chat]] if chat else CHAT_FORMATS.values():
            tokens = re.findall(SPECIAL_TOKENS, self.chat.start + self.chat.human + self.chat.end)
            lacking = [token for token in tokens if self.id(token) is None]
            if not lacking:  # vicuna, the last, has none
                break
        check(not lacking, f"{path}: lacks {few(lacking)} of --chat-format {chat}; leave it out")
        self.bos = [i for i in [self.id(self.chat.bos)] if i is not None]
        ends = map(self.id, [self.chat.end, "</s>", "<|end_of_text|>", "<|endoftext|>"])
        ends = [end for end in ends if end is not None]
        check(ends, f"{path}: has no {self.chat.end} to end an answer with; take another language model")
        self.eos, self.ends = ends[0], {ends[0]}

    def decode(self, ids):
        """ids -> text, without images' places and ids that an embedding holds beyond the tokenizer."""
        return self.decode_ids([i for i in ids if 0 <= i < self.size])

    def encode_template(self, template, value):
        """A template of CHAT_FORMATS with a value for its {} -> ids. What stands between special tokens, and
        around <image>, is encoded piece by piece, as in LLaVA."""
        ids = []
        for i, part in enumerate(re.split(f"({SPECIAL_TOKENS})", template)):
            pieces = [] if i % 2 else re.split("(<image>)", part.replace("{}", value))
            for piece in pieces:
                ids += [IMAGE_TOKEN] if piece == "<image>" else self.encode(piece)
            ids += [self.id(part)] if i % 2 else []
        return ids

    def encode_turn(self, question, first=True):
        """One question, ready to be answered -> ids. A later one follows an answer's end."""
        before = self.chat.start if first else self.chat.between
        return (self.bos if first else []) + self.encode_template(before + self.chat.human, question)

    def encode_chat(self, turns):
        """Turns [{"from": "human" | "gpt", "value": str}, ...] -> ids, labels (lists): the answers and their
        end, IGNORE elsewhere. After a human's last turn, ids are ready to be continued."""
        ids, labels = [], []
        for turn in turns:
            if turn["from"] == "human":
                new = self.encode_turn(turn["value"], first=not ids)
                labels += [IGNORE] * len(new)
            else:
                new = self.encode(turn["value"]) + [self.eos]
                labels += new
            ids += new
        return ids, labels

    def encode_plain(self, report, image=True):
        """LLaVA's plain form, for stage 2: the image, its report, and eos (LLaVA's ends in a newline)."""
        before = self.bos + ([IMAGE_TOKEN] if image else [])
        answer = self.encode(report) + [self.eos]
        return before + answer, [IGNORE] * len(before) + answer


# ---- The whole model ----


class WSILLaVA(nn.Module):
    """Slide encoder, projector, language model. The tile encoder's features are on disk."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        encoder = None if cfg.no_slide_encoder else SlideEncoder(cfg.slide_encoder, cfg.n_visual_tokens)
        self.slide_encoder = encoder
        self.mm_projector = make_projector(cfg.pad_to, cfg.llama.width)
        self.llama = Llama(cfg.llama)

    @property
    def device(self):
        return self.mm_projector[0].weight.device

    def encode_slide(self, features, coords):
        """features [N,C_tile], coords [N,2] of one slide -> its visual tokens [V,C]."""
        if self.slide_encoder is None:
            pool = Pool(self.cfg.slide_encoder, self.cfg.n_visual_tokens)
            pooled = pool(features[None].to(self.device, torch.float32))[0]
            return F.layer_norm(pooled, pooled.shape[-1:])
        like = self.slide_encoder.cls_token
        features, coords = features.to(like.device, like.dtype), coords.to(like.device)
        return self.slide_encoder.visual_tokens(features, coords, [len(features)])[0]

    def project(self, visual):
        """Visual tokens [...,C] -> [...,C_llm]: zero-padded to the projector's width, then projected."""
        weight = self.mm_projector[0].weight
        return self.mm_projector(F.pad(visual.to(weight.dtype), (0, self.cfg.pad_to - visual.shape[-1])))

    def splice(self, visual, ids, labels=None):
        """Puts projected visual tokens where ids say IMAGE_TOKEN -> embeds [B,T,C], labels [B,T], padded on
        the right. visual: B slides [V,C], each or all may be None; ids, labels: B lists. Raises ValueError
        where a slide has not just one IMAGE_TOKEN in its row."""
        rows, row_labels = [], []
        for b, row in enumerate(ids):
            label = [IGNORE] * len(row) if labels is None else labels[b]
            slide = None if visual is None else visual[b]  # [V,C]
            marks, slides = row.count(IMAGE_TOKEN), int(slide is not None)
            if marks != slides:
                raise ValueError(f"row {b} has {marks} <image> in its text and {slides} slides")
            text = torch.tensor([i for i in row if i != IMAGE_TOKEN], dtype=torch.long, device=self.device)
            embeds = self.llama.embed_tokens(text)  # [T,C_llm]
            if slides:
                at, projected = row.index(IMAGE_TOKEN), self.project(slide.to(self.device))  # [V,C_llm]
                embeds = torch.cat([embeds[:at], projected.to(embeds.dtype), embeds[at:]])  # [T+V,C_llm]
                label = [*label[:at], *[IGNORE] * len(slide), *label[at + 1 :]]
            rows.append(embeds)
            row_labels.append(torch.tensor(label, device=self.device))
        # Padding on the right needs no mask: attention is causal, and IGNORE keeps it out of the loss.
        pad = nn.utils.rnn.pad_sequence
        labels = pad(row_labels, batch_first=True, padding_value=IGNORE)  # [B,T]
        return pad(rows, batch_first=True), labels  # [B,T,C], [B,T]

    def forward(self, visual, ids, labels, reduction="mean"):
        """Next-token loss, the mean over the labelled tokens or their "sum". Arguments as for splice."""
        embeds, labels = self.splice(visual, ids, labels)
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # of the token that follows each position
        labelled = labels != IGNORE
        logits = self.llama(embeds=embeds, only=labelled)  # [n,vocab]: none where nothing is learned
        return F.cross_entropy(logits.float(), labels[labelled], reduction=reduction)

    @torch.no_grad()
    def generate(self, visual, ids, max_new_tokens=256, temperature=0.0, seed=0, ends=(2,), cache=None):
        """Yields a list of each row's next token (None after its end) until all have ended. Rows must be
        of equal length: no padding enters. temperature 0 is greedy. cache: an earlier turn's KVCache, which
        goes on and holds all but the last token. Raises UserError for a prompt beyond the context."""
        if len(set(map(len, ids))) != 1:
            raise ValueError("generate: rows must be of equal length")
        embeds, _ = self.splice(visual, ids)
        B, T, _ = embeds.shape
        cache = cache or KVCache(self.cfg.llama, B, T + max_new_tokens, embeds.device, embeds.dtype)
        generator = torch.Generator(embeds.device).manual_seed(seed)
        ended = [False] * B
        for _ in range(max_new_tokens):
            logits = self.llama(embeds=embeds, cache=cache, only=np.s_[:, -1]).float()  # [B,vocab]
            check(logits.isfinite().all(), "the model's logits are not finite: are its weights damaged?")
            if temperature == 0:
                token = logits.argmax(-1)
            else:  # less their maximum: however small the temperature, no inf
                p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
                token = torch.multinomial(p, 1, generator=generator)[:, 0]
            yield [None if done else t for done, t in zip(ended, token.tolist())]
            ended = [done or t in ends for done, t in zip(ended, token.tolist())]
            if all(ended) or cache.length >= self.cfg.llama.context:
                return
            embeds = self.llama.embed_tokens(token)[:, None]  # [B,1,C]


# ---- The rest: what is around the model, first of all this machine ----

# Left to themselves, Intel's matrix routines split sums by what the cores are doing, and the last bits differ
# from run to run. Read at their first use; it costs no measurable time.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # fused multiply-adds; unset, Triton warns

if sys.platform == "linux":
    # Else glibc keeps freed blocks of up to 32 MB in a heap that fragments: a slide of 10,000 tiles trained
    # in 6.3 GB instead of 2.1.
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(-3, 16 << 20)  # M_MMAP_THRESHOLD


# ---- Adapters (LoRA), and weights in int8 ----


@torch.no_grad()
def add_update(linear, a, b, scale):
    """Adds scale * b a (adapters [r,in], [out,r]) to a weight in its own memory, mapped copy-on-write: a 7B
    takes its size once."""
    linear.weight.data.copy_(linear.weight.data.float() + scale * (b.float() @ a.float()))
    return linear


class LoRALinear(nn.Module):
    """A frozen linear layer and an update of low rank (arXiv 2106.09685): Wx + (alpha / r) BAx."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        dtype = base.weight.dtype
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype))  # so it starts as W
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        update = self.scale * F.linear(self.dropout(x), self.lora_a)  # [...,r]: scaled where it is narrow
        return self.base(x) + F.linear(update, self.lora_b)

    def merged(self):
        return add_update(self.base, self.lora_a, self.lora_b, self.scale)


def replace_linears(llama, make):
    """Puts make(layer) in the place of each linear layer of the decoder's blocks -> the llama. One at a time:
    memory never holds the model twice."""
    for layer in llama.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if name.endswith("_proj"):
                    setattr(part, name, make(child))
    return llama


def add_lora(llama, rank, alpha, dropout=0.0):
    """Freezes the llama, gives the linear layers of its blocks adapters, as LLaVA does -> the llama."""
    llama.requires_grad_(False)
    return replace_linears(llama, lambda linear: LoRALinear(linear, rank, alpha, dropout))


def merge_lora(llama):
    """Puts the sum of weights and adapters in the place of both -> the llama."""
    return replace_linears(llama, lambda x: x.merged() if isinstance(x, LoRALinear) else x)


class Int8Linear(nn.Module):
    """A linear layer in int8: a weight is off by at most half its output channel's scale. For inference; a
    gradient with respect to the input passes."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        # Rounded before the weights are rounded to it, so that storing it in 16 bits loses nothing.
        scale = (weight.abs().amax(1).float().clamp(min=1e-12) / 127).bfloat16()
        self.register_buffer("weight", (weight / scale.float()[:, None]).round_().to(torch.int8))  # [out,in]
        self.register_buffer("scale", scale)  # [out]
        self.bias = getattr(linear, "bias", None)  # an embedding has none

    def product(self, x):
        return x @ self.weight.to(x.dtype).T * self.scale.to(x.dtype)

    def forward(self, x):
        if torch.is_grad_enabled() and x.requires_grad:  # W in full precision is made again, not stored
            y = checkpoint(self.product, x, use_reentrant=False)
        elif _on_cpu(x) and x.shape[:-1].numel() <= 16 and x.shape[-1] % 32 == 0:
            # Of few rows the cost is reading W, which PyTorch's kernel reads as int8. It takes bfloat16, and
            # reads past the end of rows that are no multiple of 32.
            y = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), self.weight, self.scale.bfloat16())
            y = y.view(*x.shape[:-1], -1).to(x.dtype)
        else:
            y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantize_int8(llama):
    """Rounds the linear layers to int8, adapters merged first -> the llama. Of an embedding that is the
    lm_head too, a rounded copy gives the logits."""
    llama.lm_head = Int8Linear(llama.lm_head or llama.embed_tokens)
    return replace_linears(merge_lora(llama), Int8Linear)


# ---- Files: read strictly, written whole or not at all ----

COPY_AGAIN = "copy or download it again"


def one_line(text, limit=200):
    """Text from elsewhere, fit to be printed: its first line, less what steers a terminal."""
    line = (str(text).strip().splitlines() or [""])[0]
    line = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "", line)
    return line if len(line) <= limit else line[:limit] + "..."


def few(names, n=3):
    """The first of many names, for people."""
    names = list(map(str, names))
    return one_line(", ".join(names[:n] + ["..."] * (len(names) > n)))


@contextlib.contextmanager
def reading(path, hint):
    """Whatever goes wrong with a user's file becomes one line: the file, what is wrong, the hint."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what a damaged file makes libraries raise is no short list
        reason = one_line(error, 120) or type(error).__name__
        known = {KeyError: f"lacks {reason}", FileNotFoundError: "no such file"}
        raise UserError(f"{path}: {known.get(type(error), reason)}; {hint}") from None


@contextlib.contextmanager
def replacing(path):
    """A temporary path to write to, renamed to `path` at the end: a reader never sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        temporary.touch(exist_ok=False)  # follows no link that lies in wait
        mode = temporary.stat().st_mode  # by the umask; safetensors' own files only their owner can read
        # What a kill left a day ago. ValueError: a name that is no pattern.
        with contextlib.suppress(OSError, ValueError):
            for left in path.parent.glob(f".{path.name}.*.part"):
                if left.stat().st_mtime < temporary.stat().st_mtime - 86400:
                    left.unlink()
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:  # a full disk
        if type(error) is RuntimeError and "inline_container" not in str(error):  # torch's zip writer
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise OSError(getattr(error, "errno", None), reason, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def first(*paths, hint):
    """The first of these paths that exists, or a UserError."""
    for path in paths:
        if path.exists():
            return path
    raise UserError(f"{' or '.join(map(str, paths))}: no such file; {hint}")


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path, tensors, metadata=None):
    """{name: tensor} -> a .safetensors file. metadata: {text: text}, of one entry: several are written in
    random order, and the same work would not give the same bytes."""
    with replacing(path) as temporary:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary, metadata)


def read_json(path, hint):
    """The object in a JSON file. Raises UserError; `hint` says there what to do."""
    with reading(path, hint):
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        check(isinstance(values, dict), f"{path}: holds no JSON object; {hint}")
        return values


def read_metadata(path):
    """What a .safetensors file says of itself, {text: text}."""
    with reading(path, COPY_AGAIN), safetensors.safe_open(path, framework="np") as file:
        return file.metadata() or {}


def read_tensors(path, hint=COPY_AGAIN):
    """{name: tensor} of a .safetensors file, or what PyTorch wrote, mapped; nothing is ever unpickled."""
    with reading(path, hint):
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        mmap = zipfile.is_zipfile(path)  # PyTorch's format since 1.6
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def on_meta(make, *args):
    """make(*args), a module whose tensors take no memory until load_strict gives it some."""
    with torch.device("meta"):
        return make(*args)


def load_strict(module, tensors, source):
    """Fills `module` from {name: tensor}: all tensors used, all parameters on the meta device filled. Raises
    UserError: the source, the keys and shapes that do not fit."""
    problems, state = [], module.state_dict()
    with reading(source, COPY_AGAIN):
        for name, tensor in tensors.items():
            wanted = list(state[name].shape) if name in state else "a key of the model"
            if list(tensor.shape) != wanted or not tensor.is_floating_point():
                problems.append(f"{name} is {list(tensor.shape)}, not {wanted}")
        problems += [f"{name} is missing" for name, p in state.items() if p.is_meta and name not in tensors]
        check(not problems, f"{source}: no {type(module).__name__} as expected: {few(sorted(problems))}")
    module.load_state_dict(tensors, assign=True, strict=False)  # checked above
    return module


def fingerprint(module):
    """A short hash of a module's weights: names, shapes, the first 4,096 values of each tensor (rounded to
    bfloat16, so that a copy in half precision counts as it)."""
    digest = hashlib.sha256()
    for name, p in sorted(module.state_dict().items()):
        sample = p.detach().flatten()[:4096].to("cpu", torch.bfloat16).float()
        digest.update(f"{name}{list(p.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- Published weights, in and out: GigaPath's, language models', LLaVA's, LoRA adapters ----


def load_tile_encoder(path):
    """Prov-GigaPath's `pytorch_model.bin` -> TileEncoder, its size read off the shapes."""
    tensors = read_tensors(path)
    with reading(path, "not Prov-GigaPath's tile encoder"):
        width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        side = math.isqrt(tensors["pos_embed"].shape[1] - 1)
        hidden = tensors["blocks.0.mlp.fc2.weight"].shape[1]
        depth = sum(key.endswith(".norm1.weight") for key in tensors)
        cfg = TileEncoderConfig(side * patch, patch, width, depth, width // 64, hidden)
        return load_strict(on_meta(TileEncoder, cfg), tensors, path).eval()


def load_slide_encoder(path, n_visual_tokens=576):
    """Prov-GigaPath's `slide_encoder.pth`, its size read off the shapes, or stage 1's file, whose metadata
    tell what shapes do not -> SlideEncoder."""
    tensors = read_tensors(path)
    with reading(path, "not Prov-GigaPath's slide encoder"):
        tensors = tensors.get("model", tensors)
        config = read_metadata(path).get("config") if Path(path).suffix == ".safetensors" else None
        if config:
            cfg = SlideEncoderConfig.from_dict(json.loads(config))
        else:
            width, in_width = tensors["patch_embed.proj.weight"].shape
            hidden = tensors["encoder.layers.0.ffn.fc1.weight"].shape[0]
            depth = sum(key.endswith(".ffn.fc1.weight") for key in tensors)
            cfg = SlideEncoderConfig(in_width, width, depth, mlp_hidden=hidden)
        return load_strict(on_meta(SlideEncoder, cfg, n_visual_tokens), tensors, path).eval()


# A published name -> the name here; None: not read. Before a name stands `model.`, in PEFT `base_model.`, in
# transformers' LLaVA `language_model.`.
NAMES = [
    (r".+\.rotary_emb\.inv_freq", None),  # old exports store it; it is computed here
    (r"(?:.+\.)?vision_tower\..+", None),  # CLIP, whose place the slide encoder takes
    (r"(?:.+\.)?mm_projector\.(.+)", r"mm_projector.\1"),
    (r"(?:.+\.)?multi_modal_projector\.linear_1\.(.+)", r"mm_projector.0.\1"),
    (r"(?:.+\.)?multi_modal_projector\.linear_2\.(.+)", r"mm_projector.2.\1"),
    (r"(?:base_model\.model\.)?(?:model\.)?(?:language_model\.)?(?:model\.)?(.+)", r"\1"),
]
# LLaVA's, trained with adapters or alone, and save_llama's.
PROJECTOR_FILES = ["non_lora_trainables.bin", "mm_projector.bin", "mm_projector.safetensors"]


def read_folder(folder, projector=False):
    """The tensors of a folder's language model or adapters, or of its projector -> {name here: tensor}. As in
    transformers, a whole file comes before an index."""
    folder, tensors = Path(folder), {}
    names = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
    places = [folder / f"{name}{index}" for name in names for index in ("", ".index.json")]
    files = [path for path in places if path.is_file()][:1]
    check(files, f"{folder}: no model.safetensors, pytorch_model.bin, index of shards or adapters here")
    if files[0].suffix == ".json":
        with reading(files[0], COPY_AGAIN):
            names = sorted(set(read_json(files[0], COPY_AGAIN)["weight_map"].values()))
            inside = names and all(name == Path(name).name for name in names)
            check(inside, f"{files[0]}: its weight_map leads out of this folder; {COPY_AGAIN}")
            files = [folder / name for name in names]
    files += [folder / name for name in PROJECTOR_FILES if (folder / name).is_file()]
    for path in files:
        with reading(path, COPY_AGAIN):
            for key, tensor in read_tensors(path).items():
                pattern, here = next(row for row in NAMES if re.fullmatch(row[0], key))
                name = re.sub(pattern, here or "", key)
                if name and name.startswith("mm_projector.") == projector:
                    check(projector or name not in tensors, f"{path}: a second {name}, {key}")
                    tensors[name] = tensor
    return tensors


# config.json of Hugging Face -> LlamaConfig's field, and what transformers means where it is silent.
LLAMA_FIELDS = {
    "vocab_size": ("vocab", 32000),
    "hidden_size": ("width", 4096),
    "num_hidden_layers": ("depth", 32),
    "num_attention_heads": ("heads", 32),
    "num_key_value_heads": ("kv_heads", 0),
    "intermediate_size": ("mlp_hidden", 11008),
    "rms_norm_eps": ("eps", 1e-6),
    "rope_theta": ("rope_theta", 1e4),
    "max_position_embeddings": ("context", 2048),
    "head_dim": ("head_dim", 0),
    "tie_word_embeddings": ("tied", False),
    "wsi_llava_adapters": ("adapters", ""),  # our own
}
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# model_type of a config.json -> the family whose decoder it is.
FAMILIES = {family: family for family in ("llama", "mistral", "qwen2", "qwen3")}
FAMILIES |= {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}


def read_llama_config(folder):
    """`config.json` of a language model or a LLaVA -> LlamaConfig. Refuses what this decoder does not do."""
    path, hint = Path(folder) / "config.json", f"--llm takes a folder of one of these: {', '.join(FAMILIES)}"
    with reading(path, hint):
        c = read_json(path, hint)
        c = c.get("text_config", c)
        kind = c.get("model_type", "llama")
        check(kind in FAMILIES, f"{path}: model_type {one_line(kind)} is not supported; {hint}")
        values = {"family": FAMILIES[kind]}
        for theirs, (ours, default) in LLAMA_FIELDS.items():
            values[ours] = default if c.get(theirs) is None else c[theirs]
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        window = c.get("sliding_window") if c.get("use_sliding_window", kind.endswith("mistral")) else None
        refused = {
            f"hidden_act {c.get('hidden_act')}": c.get("hidden_act", "silu") not in ("silu", "swish"),
            f"rope scaling {rope_type}": rope_type not in ("default", "llama3"),
            f"a sliding window of {window} below the context": window and window < values["context"],
            "biases beside those of Qwen2": c.get("attention_bias") or c.get("mlp_bias"),
        }
        for what, holds in refused.items():
            check(not holds, f"{path}: {one_line(what)} is not supported")
        values["rope_theta"] = rope.get("rope_theta") or values["rope_theta"]
        values["rope_scaling"] = [rope[name] for name in ROPE_SCALING if rope_type == "llama3"]
        return LlamaConfig.from_dict(values)


# What adapter_config.json may say: of these options of plain LoRA, W + alpha / r B A, anything, or one of a
# few values; of any other option, also of one unheard of, what sets nothing.
LORA_FREE = "r lora_alpha lora_dropout target_modules exclude_modules base_model_name_or_path revision"
LORA_FREE += " task_type inference_mode peft_version auto_mapping"
LORA_VALUES = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal"]}
LORA_VALUES |= {"megatron_core": ["megatron.core"], "qalora_group_size": [16]}  # with others, which are off


def merge_adapters(llama, folder):
    """Adds the adapters of a PEFT or LLaVA LoRA folder to the weights that they update, once."""
    path, hint = folder / "adapter_config.json", "--lora takes a PEFT or LLaVA LoRA folder"
    c = read_json(path, hint)
    for name, value in c.items():
        plain = name in LORA_FREE.split() or value in [None, False, {}, [], "", *LORA_VALUES.get(name, [])]
        check(plain, f"{path}: {one_line(name)} {one_line(value)} is not supported: plain LoRA only")
    linears = {name: module for name, module in llama.named_modules() if isinstance(module, nn.Linear)}
    with reading(path, hint):
        tensors, rank, alpha = read_folder(folder), c["r"], float(c["lora_alpha"])
        check(tensors and c["peft_type"] == "LORA" and math.isfinite(alpha), f"{folder}: no adapters; {hint}")
        digest = hashlib.sha256(f"{rank} {alpha}".encode())
        for key in sorted(key for key in tensors if key.endswith(".lora_A.weight")):
            name = key.removesuffix(".lora_A.weight")
            check(name in linears, f"{folder}: has adapters for {name}, which the language model lacks")
            linear, a, b = linears[name], tensors.pop(key), tensors.pop(f"{name}.lora_B.weight")
            fits = a.shape == (rank, linear.in_features) and b.shape == (linear.out_features, rank)
            check(fits, f"{folder}: {name}'s are {list(a.shape)} and {list(b.shape)}, not of rank {rank}")
            add_update(linear, a, b, alpha / rank)
            digest.update(name.encode() + b.flatten()[:4096].float().numpy().tobytes())
    check(not tensors, f"{folder}: keys that are no adapters ({len(tensors)}): {few(tensors)}")
    mark, held = digest.hexdigest()[:16], llama.cfg.adapters.split()
    check(mark not in held, f"{folder}: the language model holds these adapters already; leave --lora out")
    llama.cfg.adapters = " ".join([*held, mark])


def load_llama(folder, dtype=None, lora=None):
    """A Hugging Face folder of a language model or LLaVA -> Llama, a PEFT folder's adapters merged into it.
    Files are mapped: in their own dtype, memory is filled as pages are touched. Strict both ways."""
    folder = Path(folder)
    cfg = read_llama_config(folder)
    adapters = (folder / "adapter_config.json").exists()
    check(not adapters, f"{folder} holds LoRA adapters: name it with --lora, its base model with --llm")
    tensors = read_folder(folder)
    head = tensors.get("lm_head.weight")
    if cfg.tied and head is not None:  # one of its own counts, as in transformers
        cfg.tied = torch.equal(head, tensors.get("embed_tokens.weight", head))
        if cfg.tied:
            del tensors["lm_head.weight"]
    llama = load_strict(on_meta(Llama, cfg), tensors, folder)
    if lora:
        merge_adapters(llama, Path(lora))
    return llama.to(dtype or llama.embed_tokens.weight.dtype).eval()


def load_projector(folder):
    """The projector in a folder -> (Linear, GELU, Linear) in float32, sized by its shapes; or None."""
    with reading(folder, "not a projector of two linear layers (mlp2x_gelu)"):
        tensors = read_folder(folder, projector=True)
        if not tensors:
            return None
        width, in_width = tensors["mm_projector.0.weight"].shape
        found = nn.ModuleDict({"mm_projector": on_meta(make_projector, in_width, width)})
        return load_strict(found, tensors, folder)["mm_projector"].float()


def save_llama(llama, folder, tokenizer=None, projector=None):
    """Writes a folder for load_llama and transformers, adapters merged, a projector beside; no tokenizer.
    config.json comes last, without which the folder is none."""
    folder, cfg = Path(folder), llama.cfg
    folder.mkdir(parents=True, exist_ok=True)
    state = merge_lora(llama).state_dict()
    state = {name if name.startswith("lm_head.") else f"model.{name}": p for name, p in state.items()}
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})
    if projector is not None:
        state = projector.state_dict(prefix="model.mm_projector.")
        write_tensors(folder / "mm_projector.safetensors", state)
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_scaling:
        rope |= {"rope_type": "llama3"} | dict(zip(ROPE_SCALING, cfg.rope_scaling))
    config = {theirs: getattr(cfg, ours) for theirs, (ours, _) in LLAMA_FIELDS.items()}
    config |= {"architectures": [f"{cfg.family.title()}ForCausalLM"], "model_type": cfg.family}
    config |= {"rope_parameters": rope, "sliding_window": None, "hidden_act": "silu"}
    config["torch_dtype"] = str(llama.embed_tokens.weight.dtype).removeprefix("torch.")
    if tokenizer is not None:  # what ends an answer here, whatever the base model says
        tokens = {"bos_token_id": (tokenizer.bos or [None])[0], "eos_token_id": sorted(tokenizer.ends)}
        write_text(folder / "generation_config.json", json.dumps(tokens))
        config |= tokens
    write_text(folder / "config.json", json.dumps(config, indent=2))


# ---- The data on disk ----

VERSION = 1  # of the files on disk; prepare.py writes it into data/meta.json
IMPORTED_TOKENS = "imported: visual tokens"  # the tile encoder in meta.json, where only tokens were imported
PREPARE_AGAIN = "prepare the slide again, or import it by prepare.py --features"


def read_meta(data):
    """data/meta.json, as prepare.py wrote it."""
    path, hint = Path(data) / "meta.json", "not what prepare.py writes; prepare the data again"
    check(path.exists(), f"{path}: no such file; run python prepare.py --slides DIR first (or --demo)")
    with reading(path, hint):
        meta = read_json(path, hint)
        check(meta["version"] == VERSION, f"{path}: made by another version of this project; {hint}")
        encoder = meta["encoder"]
        sizes = [encoder["width"], encoder.get("n_visual_tokens", 1)]
        texts = isinstance(encoder["source"], str) and isinstance(encoder["fingerprint"], str)
        fits = texts and all(type(size) is int and 0 < size < 2**16 for size in sizes)
        check(fits and meta["preset"] in PRESETS and 0 < meta["mpp"] < math.inf, f"{path}: {hint}")
        return meta


def is_report(row):
    """Whether a row of the dataset is a slide's report: what stages 1 and 2 train on."""
    return "report" in row["task"].lower()


def is_slide_name(slide):
    """Whether a text can be a slide's name: wherever it comes from, it cannot lead out of its folder."""
    return isinstance(slide, str) and bool(slide.strip(".")) and not re.search(r"[/\\\0]", slide)


def slide_file(folder, slide):
    """folder/<slide>.safetensors. Raises UserError for what is no name."""
    check(is_slide_name(slide), f"{one_line(slide)!r}: not the name of a slide; a name is no path")
    return Path(folder) / f"{slide}.safetensors"


def features_file(data, slide):
    return slide_file(Path(data) / "features", slide)


def feature_metadata(path):
    """What prepare.py noted of a file of features, and "tiles", their number."""
    hint = "not a file of features; delete it and prepare the slide again"
    with reading(path, hint), safetensors.safe_open(path, framework="np") as file:
        notes = json.loads(file.metadata()["wsi_llava"])
        return notes | {"tiles": file.get_slice("coords").get_shape()[0]}


def read_features(data, slide, max_tiles=0, width=None):
    """data/features of one slide -> features float16 [N,C_tile], coords int32 [N,2]. max_tiles: at most so
    many of them, drawn at random, always the same ones, in raster order (0: all). width: what C_tile must be.
    Raises UserError for a file that is missing, or holds anything else."""
    path, hint = features_file(data, slide), PREPARE_AGAIN
    with reading(path, hint):
        tensors = read_tensors(path, hint)
        features, coords = tensors["features"], tensors["coords"]
        N, C = features.shape
        check(coords.shape == (N, 2), f"{path}: holds {N} features but coords {list(coords.shape)}; {hint}")
        check(width in (None, C), f"{path}: its features are {C} wide, not {width}; {hint}")
        check(features.isfinite().all(), f"{path}: its features are not finite; {hint}")
        grid_cells(coords)
    if max_tiles and max_tiles < N:
        rng = np.random.default_rng(zlib.crc32(slide.encode()))
        chosen = torch.from_numpy(np.sort(rng.choice(N, max_tiles, replace=False)))
        features, coords = features[chosen], coords[chosen]
    return features, coords


def geojson_tile(x, y, scale, origin=(0, 0), **properties):
    """A tile for QuPath, in level-0 pixels from `origin`. x, y: its corner in tiled pixels of `scale` level-0
    ones each."""
    corners = np.array([(x, y), (x + TILE, y), (x + TILE, y + TILE), (x, y + TILE), (x, y)])
    ring = (corners * scale - origin).round(2).tolist()
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "geometry": geometry, "properties": {"objectType": "tile", **properties}}


def visual_tokens_file(data, slide, cfg):
    """Where a slide's visual tokens are kept; an ablation has a folder of its own."""
    tiles = f"max-tiles-{cfg.max_tiles}" if cfg.max_tiles else ""
    return slide_file(Path(data, "visual_tokens", "no-slide-encoder" * cfg.no_slide_encoder, tiles), slide)


def read_visual_tokens(data, slide, cfg):
    """What cache_visual_tokens wrote, or was imported -> float16 [V,C]."""
    path, hint = visual_tokens_file(data, slide, cfg), "delete it and run again"
    with reading(path, hint):
        tokens = read_tensors(path, hint)["visual_tokens"]
        check(tokens.dim() == 2 and tokens.isfinite().all(), f"{path}: not visual tokens of a slide; {hint}")
        return tokens


def keep_visual_tokens(model, data, slide, code):
    """Writes a slide's visual tokens, unless imported or as they would be made now -> whether it did. Beside
    them stands what made them: the slide encoder, its code, the slide's features."""
    cfg, made_by, source = model.cfg, None, features_file(data, slide)
    path = visual_tokens_file(data, slide, cfg)
    with contextlib.suppress(UserError):  # missing or damaged: they are made anew
        read_visual_tokens(data, slide, cfg)
        made_by = read_metadata(path).get("made_by")
    if made_by == IMPORTED_TOKENS:
        return False
    with reading(source, PREPARE_AGAIN), open(source, "rb") as file:
        # Metadata, coords, some features: all of them would be slow to read.
        digest = hashlib.sha256(f"{source.stat().st_size}".encode() + file.read(1 << 18) + code)
    now = f"{cfg.fingerprints.get('slide_encoder')} {cfg.n_visual_tokens} {digest.hexdigest()[:16]}"
    if made_by == now:
        return False
    width = None if cfg.no_slide_encoder else cfg.slide_encoder.in_width
    features, coords = read_features(data, slide, cfg.max_tiles, width)
    check(len(features), f"{source}: no tissue was found on this slide")
    with torch.inference_mode():
        tokens = model.encode_slide(features, coords).half()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {"visual_tokens": tokens}, {"made_by": now})
    return True


def cache_visual_tokens(model, data, slides, progress=iter):
    """Writes the visual tokens that slides lack -> how many it wrote, {slide: why it has none}."""
    # The text of the files that hold the slide encoder's classes, read once for all slides.
    files = {type(part).__module__ for part in (model.slide_encoder or model).modules()}
    own = [name for name in sorted(files) if not name.startswith("torch.")]
    code = "".join(inspect.getsource(sys.modules[name]) for name in own).encode()
    written, problems = 0, {}
    for slide in progress(slides):
        try:
            written += keep_visual_tokens(model, data, slide, code)
        except UserError as error:
            problems[slide] = str(error)
    return written, problems


# ---- Where weights are looked for, and how the stages' results are put together ----

GIGAPATH = Path("weights/gigapath")
LLMS = [Path("weights/vicuna-7b-v1.5"), Path("weights/llava-v1.5-7b")]


def trained_stage(args, stage):
    """out/stageN -> (its model.safetensors, its WSILLaVAConfig). Raises UserError."""
    path = args.out / f"stage{stage}" / "model.safetensors"
    train = f"train it: python train.py --stage {stage}"
    check(path.exists(), f"{path.parent} holds no trained model; {train}")
    config = path.with_name("config.json")
    with reading(config, train):
        return path, WSILLaVAConfig.from_dict(read_json(config, train))


def pick_tile_encoder(args):
    """--tile-encoder's or GigaPath's -> (TileEncoder, its file); or the demo's untrained one."""
    path = args.tile_encoder or GIGAPATH / "pytorch_model.bin"
    if args.tile_encoder or (path.exists() and args.preset != "demo"):
        return load_tile_encoder(path), path
    check(
        args.preset in (None, "demo"), f"--preset {args.preset} needs GigaPath's: name it by --tile-encoder"
    )
    return untrained_tile_encoder(), None


def pick_llm(args, meta):
    """The language model's folder and its tokenizer -> (folder, Tokenizer)."""
    folders = [args.data / "llm"] if meta["preset"] == "demo" else LLMS  # the demo's own stand-in
    folder = args.llm or first(*folders, hint="name a language model with --llm (the demo's: train stage 1)")
    places = [folder, args.lora or folder, folder.parent]  # the stand-in's tokenizer lies beside its folder
    files = [place / name for place in places for name in ("tokenizer.model", "tokenizer.json")]
    path = first(*files, hint="copy it from where the model is from")
    more = path.with_name("tokenizer.json")
    if path != more and more.exists():  # tokens that were added to a tokenizer.model later are in this one
        with reading(more, COPY_AGAIN):
            ids = [token["id"] for token in read_json(more, COPY_AGAIN)["added_tokens"]]
            path = more if max(ids, default=0) >= Tokenizer(path).size else path
    tokenizer = Tokenizer(path, args.chat_format)
    for file in (folder / "generation_config.json", folder / "config.json"):
        ends = read_json(file, COPY_AGAIN).get("eos_token_id") if file.exists() else None
        ends = ends if isinstance(ends, list) else [ends]
        tokenizer.ends |= {end for end in ends if type(end) is int}
    return folder, tokenizer


def check_tile_encoder(cfg, meta, path):
    """A slide encoder reads the features of the tile encoder that it was trained on, and no other's."""
    width, mark = meta["encoder"]["width"], meta["encoder"]["fingerprint"]
    takes = f"{cfg.in_width} wide and of {cfg.trained_on or 'any'}, these are {width} and of {mark}"
    fits = cfg.in_width == width and cfg.trained_on in ("", mark)
    check(fits, f"{path}: takes tile features {takes}; prepare the slides again, or train --from-scratch")


def pick_slide_encoder(args, meta, n_visual_tokens):
    """--slide-encoder's, that of out/stage1, or GigaPath's -> SlideEncoder."""
    files = [args.out / "stage1" / "slide_encoder.safetensors", GIGAPATH / "slide_encoder.pth"]
    hint = "run python train.py --stage 1 first, or name one with --slide-encoder"
    path = args.slide_encoder or first(*files[: 1 if meta["preset"] == "demo" else 2], hint=hint)
    encoder = load_slide_encoder(path, n_visual_tokens)
    check_tile_encoder(encoder.cfg, meta, path)
    return encoder


def pick_projector(args, llm, width, cfg, stage):
    """The published projector that fits, --lora's before the language model's; for stage 2 else a new one."""
    for folder in filter(None, (args.lora, llm)):
        found = load_projector(folder)
        if found:
            break
    if found and found[0].in_features >= width and found[2].out_features == cfg.llama.width:
        return found, f"that of {folder}"
    none = f"no published projector here takes {width} channels and gives {cfg.llama.width}"
    check(stage == 1, f"{args.out}/stage{stage} is not trained, and {none}: train stage {stage} first")
    return make_projector(max(cfg.pad_to, width), cfg.llama.width), f"a new one, since {none}"


def load_model(args, meta, stage=3, dtype=None, int8=False):
    """The model as it stands after `stage` (1: before stage 2) -> (WSILLaVA on the CPU, Tokenizer). Frozen
    parts come from their own files, without training the projector too."""
    dtype, trained = dtype or args.dtype, None
    folder, tokenizer = pick_llm(args, meta)
    llama = load_llama(folder, None if int8 else dtype, args.lora)  # int8: rounded a layer at a time
    sizes = f"{tokenizer.size:,} tokens, more than the language model's {llama.cfg.vocab:,}"
    check(tokenizer.size <= llama.cfg.vocab, f"{tokenizer.path}: {sizes}")
    cfg = copy.deepcopy(PRESETS[args.preset or meta["preset"]])
    if stage == 1:
        cfg.max_tiles, cfg.no_slide_encoder = args.max_tiles, args.no_slide_encoder
    elif any((args.out / f"stage{n}" / "model.safetensors").exists() for n in (2, 3)):
        trained, cfg = trained_stage(args, stage)
    encoder, parts = None, {"tile_encoder": meta["encoder"]["fingerprint"], "llm": fingerprint(llama)}
    if meta["encoder"]["source"] == IMPORTED_TOKENS:  # they have been through a slide encoder
        cfg.n_visual_tokens = meta["encoder"].get("n_visual_tokens", cfg.n_visual_tokens)
    elif not cfg.no_slide_encoder:
        encoder = pick_slide_encoder(args, meta, cfg.n_visual_tokens)
        cfg.slide_encoder, parts["slide_encoder"] = encoder.cfg, fingerprint(encoder)
    for part, mark in parts.items():  # weights trained beside one of them mean nothing beside another
        fits = cfg.fingerprints.get(part, mark) == mark
        check(
            fits, f"{trained}: trained with another {part.replace('_', ' ')}; name that one, or train again"
        )
    cfg.llama, cfg.fingerprints = llama.cfg, parts
    model = on_meta(WSILLaVA, cfg)
    model.cfg, model.slide_encoder, model.llama = cfg, encoder, llama
    if trained:  # the projector, and adapters or, with --full, the llama
        if cfg.lora_rank:
            on_meta(add_lora, llama, cfg.lora_rank, cfg.lora_alpha)
        load_strict(model, read_tensors(trained), trained)
    else:
        width = encoder.cfg.width if encoder else meta["encoder"]["width"]
        model.mm_projector, which = pick_projector(args, folder, width, cfg, stage)
        cfg.pad_to = model.mm_projector[0].in_features
        if os.environ.get("RANK", "0") == "0":
            print(f"Projector: {which}.", file=sys.stderr)
    if int8:
        quantize_int8(llama)
    return model.to(dtype).eval(), tokenizer


def token_embeddings(args, meta):
    """What stage 1 reads reports with: the LLM's token embeddings [vocab,C_llm], frozen; its Tokenizer."""
    folder, tokenizer = pick_llm(args, meta)
    words = load_llama(folder).embed_tokens.weight.detach()
    return words.to(args.device, torch.float32), tokenizer


def load_alignment(args, meta):
    """Stage 1's model -> (its config, WSITextAlignment, token_embeddings' two)."""
    path, cfg = trained_stage(args, 1)
    check_tile_encoder(cfg.slide_encoder, meta, path.parent)
    model = load_strict(on_meta(WSITextAlignment, cfg), read_tensors(path), path)
    return cfg, model.to(args.device).eval(), *token_embeddings(args, meta)


# ---- Flags, and how a script runs ----


def at_least(low, kind=int, high=2**63):
    """A type for argparse: a number from low to high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{one_line(text, 40)} is not from {low} to {high}")
        return value

    return number


class Parser(argparse.ArgumentParser):
    """A script's flags. A wrong one gets one line and exit status 2."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, argv=None):
        if "" in (sys.argv[1:] if argv is None else argv):
            self.error("an empty argument (an unset variable?)")
        return super().parse_args(argv)

    def error(self, message):
        self.exit(2, f"error: {one_line(message.removeprefix('argument '))}; --help lists the flags\n")

    def group(self, title, about=None):
        """-> add(flag, help, **options), which adds a flag to this group of --help's."""
        add = self.add_argument_group(title, about).add_argument
        return lambda flag, help, **options: add(flag, help=help, **options)


def add_shared_flags(parser):
    """The flags that mean the same in every script."""
    add, workers = parser.group("shared by all scripts"), min(8, os.cpu_count() or 1)
    add("--data", "prepared slides and questions (default: data)", type=Path, default=Path("data"))
    add("--out", "what training leaves (default: out)", type=Path, default=Path("out"))
    add("--preset", "sizes of the model (default: what the data were prepared with)", choices=PRESETS)
    add("--device", "cuda, mps or cpu (default: the best there is)", default="auto")
    products = "of matrix products (default: bfloat16 on CUDA, else float32)"
    add("--dtype", products, default="auto", choices=["auto", "float32", "bfloat16"])
    add("--seed", "of all that is drawn at random (default: 0)", type=at_least(0, int, 2**32 - 1), default=0)
    ahead = f"processes that read ahead of the model (default: {workers}, by the cores)"
    add("--workers", ahead, type=at_least(1, int, 512), default=workers)


def add_weights_flags(parser):
    """The flags of published weights."""
    add = parser.group("weights, where they are not where they are looked for")
    add("--slide-encoder", f"default: that of out/stage1, or {GIGAPATH}/slide_encoder.pth", type=Path)
    add("--llm", f"language model, a Hugging Face folder (default: {LLMS[0]} or {LLMS[1]})", type=Path)
    add("--lora", "adapters to merge into the language model, a PEFT or LLaVA folder", type=Path)
    add("--chat-format", "default: told by the tokenizer's special tokens", choices=CHAT_FORMATS)


def resolve_device(args):
    """Turns --device and --dtype into what torch takes. Raises UserError."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        args.device = torch.device(best if args.device == "auto" else args.device)
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {one_line(error)}; use --device cpu") from None
    automatic = "bfloat16" if args.device.type == "cuda" else "float32"
    args.dtype = getattr(torch, automatic if args.dtype == "auto" else args.dtype)


def count(n, thing):
    """So many of a thing, for people: 1 slide, 2,000 slides."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def run(main, on_interrupt="interrupted"):
    """Runs a script's main. What the user can mend, or the system refuses (a full disk), becomes one line and
    exit status 1. Ctrl-C: status 130. A bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding shows what it can
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the pipe's reader has left; Python's own last flush must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit("error: the output was closed before all was printed")
    except (UserError, OSError, UnicodeError) as error:
        sys.exit(f"error: {one_line(error, 2000)}")
    except KeyboardInterrupt:
        print(on_interrupt, file=sys.stderr)
        sys.exit(130)
