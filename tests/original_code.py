"""Latent diffusion as its papers describe it, with weights called as in the original code: an oracle that shares nothing with diffusers.

Rombach et al. 2022 (arXiv 2112.10752); its U-Net is that of Dhariwal & Nichol 2021 (arXiv 2105.05233), its first stage that of Esser et al. 2020
(arXiv 2012.09841), its sampler that of Song et al. 2020 (arXiv 2010.02502). A module takes the parameters of the original configs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, gelu, interpolate, one_hot, pad, silu

GROUPS = 32


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v over (..., tokens, d)."""
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v


class Heads(nn.Module):
    """Attention of x to a context, without biases but in the last layer."""

    def __init__(self, width: int, context: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, heads * size, bias=False) for n in (width, context, context))
        self.to_out: nn.Module = nn.Linear(heads * size, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        made: torch.Tensor = self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))
        return made


# ---------------------------------------------------------------------------------------------------- the U-Net


class Gate(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        made: torch.Tensor = value * gelu(gate)
        return made


class Block(nn.Module):
    """A transformer's block: attention to itself, to the context, and a gated layer."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        size = width // heads
        self.attn1, self.attn2 = Heads(width, width, heads, size), Heads(width, context, heads, size)
        for attention in (self.attn1, self.attn2):
            attention.to_out = nn.Sequential(attention.to_out)
        self.ff = nn.ModuleDict(
            {"net": nn.Sequential(Gate(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))}
        )
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        normal = self.norm1(x)
        x = x + self.attn1(normal, normal)
        x = x + self.attn2(self.norm2(x), context)
        made: torch.Tensor = x + self.ff["net"](self.norm3(x))
        return made


class Transformer(nn.Module):
    def __init__(self, width: int, context: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(Block(width, context, heads) for _ in range(depth))

    def forward(self, x: torch.Tensor, _time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            y = block(y, context)
        made: torch.Tensor = x + self.proj_out(y.transpose(1, 2).reshape(x.shape))
        return made


class SelfAttention(nn.Module):
    """Queries, keys and values are rows of one matrix, head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv, self.proj_out = nn.Conv1d(width, 3 * width, 1), nn.Conv1d(width, width, 1)

    def forward(self, x: torch.Tensor, _time: torch.Tensor, _context: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2)
        q, k, v = self.qkv(self.norm(flat)).unflatten(1, (self.heads, 3, -1)).transpose(-1, -2).unbind(2)
        made: torch.Tensor = flat + self.proj_out(attend(q, k, v).transpose(-1, -2).flatten(1, 2))
        return made.reshape(x.shape)


class Residual(nn.Module):
    """A residual block that may halve or double the picture, and be scaled by the time instead of shifted."""

    def __init__(self, width: int, out: int, time: int, *, scaled: bool = False, resize: str = "") -> None:
        super().__init__()
        self.scaled, self.resize = scaled, resize
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, (2 if scaled else 1) * out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor, _context: torch.Tensor) -> torch.Tensor:
        y = silu(self.in_layers[0](x))
        if self.resize == "down":
            x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
        elif self.resize == "up":
            x, y = (interpolate(one, scale_factor=2.0) for one in (x, y))
        y, shift = self.in_layers[2](y), self.emb_layers(time)[:, :, None, None]
        if self.scaled:
            scale, shift = shift.chunk(2, dim=1)
            y = self.out_layers[0](y) * (1 + scale) + shift
        else:
            y = self.out_layers[0](y + shift)
        made: torch.Tensor = self.skip_connection(x) + self.out_layers[3](silu(y))
        return made


class Resize(nn.Module):
    def __init__(self, width: int, name: str) -> None:
        super().__init__()
        self.doubles = name == "conv"
        self.add_module(name, nn.Conv2d(width, width, 3, stride=1 if self.doubles else 2, padding=1))

    def forward(self, x: torch.Tensor, _time: torch.Tensor, _context: torch.Tensor) -> torch.Tensor:
        x = interpolate(x, scale_factor=2.0) if self.doubles else x
        made: torch.Tensor = next(self.children())(x)
        return made


class Convolution(nn.Conv2d):
    def forward(self, x: torch.Tensor, *_others: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class UNet(nn.Module):
    def __init__(self, p: dict[str, Any]) -> None:
        super().__init__()
        base, factors, blocks = p["model_channels"], p["channel_mult"], p["num_res_blocks"]
        self.base, time, scaled = base, 4 * base, bool(p.get("use_scale_shift_norm"))

        def attention(width: int) -> nn.Module:
            heads = width // p["num_head_channels"] if "num_head_channels" in p else p["num_heads"]
            if p.get("use_spatial_transformer"):
                return Transformer(width, p["context_dim"], heads, p.get("transformer_depth", 1))
            return SelfAttention(width, heads)

        def resize(width: int, way: str) -> nn.Module:
            if p.get("resblock_updown"):
                return Residual(width, width, time, scaled=scaled, resize=way)
            return Resize(width, "op" if way == "down" else "conv")

        self.time_embed = nn.Sequential(nn.Linear(base, time), nn.SiLU(), nn.Linear(time, time))
        down: list[list[nn.Module]] = [[Convolution(p["in_channels"], base, 3, padding=1)]]
        width, widths, scale = base, [base], 1
        for level, factor in enumerate(factors):
            for _ in range(blocks):
                layers: list[nn.Module] = [Residual(width, base * factor, time, scaled=scaled)]
                width = base * factor
                down.append(layers + ([attention(width)] if scale in p["attention_resolutions"] else []))
                widths.append(width)
            if level < len(factors) - 1:
                down.append([resize(width, "down")])
                widths.append(width)
                scale *= 2
        middle = [
            Residual(width, width, time, scaled=scaled),
            attention(width),
            Residual(width, width, time, scaled=scaled),
        ]
        up: list[list[nn.Module]] = []
        for level, factor in reversed(list(enumerate(factors))):
            for number in range(blocks + 1):
                layers = [Residual(width + widths.pop(), base * factor, time, scaled=scaled)]
                width = base * factor
                layers += [attention(width)] if scale in p["attention_resolutions"] else []
                if level and number == blocks:
                    layers.append(resize(width, "up"))
                    scale //= 2
                up.append(layers)
        self.input_blocks, self.output_blocks = (
            nn.ModuleList(nn.ModuleList(one) for one in side) for side in (down, up)
        )
        self.middle_block = nn.ModuleList(middle)
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, p["out_channels"], 3, padding=1)
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        half = self.base // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        down: Any = self.input_blocks
        up: Any = self.output_blocks
        kept = []
        for block in down:
            for layer in block:
                x = layer(x, time, context)
            kept.append(x)
        for layer in self.middle_block:
            x = layer(x, time, context)
        for block in up:
            x = torch.cat([x, kept.pop()], dim=1)
            for layer in block:
                x = layer(x, time, context)
        made: torch.Tensor = self.out(x)
        return made


# ---------------------------------------------------------------------------------------------------- the first stage


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=1e-6)


class Pixels(nn.Module):
    """A residual block of the first stage."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(out)
        self.conv1, self.conv2 = nn.Conv2d(width, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        made: torch.Tensor = y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)
        return made


class PixelAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = self.norm(x)
        q, k, v = (layer(normal).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        made: torch.Tensor = x + self.proj_out(attend(q, k, v).transpose(1, 2).reshape(x.shape))
        return made


class Coder(nn.Module):
    """The encoder (`way` is `down`) or the decoder (`up`): levels of residual blocks, with a middle at the smallest."""

    def __init__(self, d: dict[str, Any], way: str) -> None:
        super().__init__()
        self.way, encodes = way, way == "down"
        widths = [d["ch"] * factor for factor in d["ch_mult"]]
        ends = d["in_channels"], (2 if d["double_z"] else 1) * d["z_channels"]
        first, last = ends if encodes else (d["z_channels"], d["out_ch"])
        width = widths[0] if encodes else widths[-1]
        self.conv_in = nn.Conv2d(first, width, 3, padding=1)
        levels: dict[int, nn.Module] = {}
        for level in range(len(widths)) if encodes else reversed(range(len(widths))):
            blocks, attentions = [], []
            for _ in range(d["num_res_blocks"] + (0 if encodes else 1)):
                blocks.append(Pixels(width, widths[level]))
                width = widths[level]
                if d["resolution"] // 2**level in d["attn_resolutions"]:
                    attentions.append(PixelAttention(width))
            parts: dict[str, nn.Module] = {"block": nn.ModuleList(blocks), "attn": nn.ModuleList(attentions)}
            if encodes and level < len(widths) - 1:
                parts["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            elif not encodes and level:
                parts["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
            levels[level] = nn.ModuleDict(parts)
        self.add_module(way, nn.ModuleList(levels[level] for level in range(len(widths))))
        deepest = widths[-1]
        self.mid = nn.ModuleDict({"block_1": Pixels(deepest, deepest), "block_2": Pixels(deepest, deepest)})
        if d.get("attn_type") != "none":
            self.mid["attn_1"] = PixelAttention(deepest)
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, last, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        x = x if self.way == "down" else self._middle(x)
        levels = list(getattr(self, self.way))
        for level in levels if self.way == "down" else reversed(levels):
            for number, block in enumerate(level["block"]):
                x = block(x)
                x = level["attn"][number](x) if len(level["attn"]) else x
            if "downsample" in level:
                x = level["downsample"]["conv"](pad(x, (0, 1, 0, 1)))
            elif "upsample" in level:
                x = level["upsample"]["conv"](interpolate(x, scale_factor=2.0))
        x = self._middle(x) if self.way == "down" else x
        made: torch.Tensor = self.conv_out(silu(self.norm_out(x)))
        return made

    def _middle(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid["block_1"](x)
        x = self.mid["attn_1"](x) if "attn_1" in self.mid else x
        made: torch.Tensor = self.mid["block_2"](x)
        return made


class FirstStage(nn.Module):
    """With a codebook of `n_embed` vectors, or without."""

    def __init__(self, p: dict[str, Any]) -> None:
        super().__init__()
        d, z = p["ddconfig"], p["embed_dim"]
        self.encoder, self.decoder = Coder(d, "down"), Coder(d, "up")
        moments = 2 * z if d["double_z"] else z
        self.quant_conv, self.post_quant_conv = nn.Conv2d(moments, moments, 1), nn.Conv2d(z, z, 1)
        if "n_embed" in p:
            self.quantize = nn.ModuleDict({"embedding": nn.Embedding(p["n_embed"], z)})

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.quant_conv(self.encoder(x))
        return made

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        quantize: Any = getattr(self, "quantize", None)
        if quantize is not None:
            codes = quantize["embedding"].weight
            distances = (z.permute(0, 2, 3, 1)[..., None, :] - codes).square().sum(dim=-1)
            z = codes[distances.argmin(dim=-1)].permute(0, 3, 1, 2)
        made: torch.Tensor = self.decoder(self.post_quant_conv(z))
        return made


# ---------------------------------------------------------------------------------------------------- what it is told


class Classes(nn.Module):
    def __init__(self, p: dict[str, Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(p.get("n_classes", 1000), p["embed_dim"])

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.embedding(labels)[:, None]
        return made


class SmallMap(nn.Module):
    """A map of classes, halved with bilinear weights; then a linear map of each pixel."""

    def __init__(self, p: dict[str, Any]) -> None:
        super().__init__()
        self.stages = p["n_stages"]
        self.channel_mapper = nn.Conv2d(p["in_channels"], p["out_channels"], 1, bias=False)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        x = one_hot(labels, self.channel_mapper.in_channels).permute(0, 3, 1, 2).float()
        for _ in range(self.stages):
            x = interpolate(x, scale_factor=0.5, mode="bilinear")
        made: torch.Tensor = self.channel_mapper(x)
        return made


class Words(nn.Module):
    """BERT, its layers numbered one by one: attention, feed-forward, attention, ..."""

    def __init__(self, p: dict[str, Any]) -> None:
        super().__init__()
        width, tokens = p["n_embed"], p["vocab_size"]
        layers: list[nn.Module] = []
        for _ in range(p["n_layer"]):
            inner = nn.Sequential(
                nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()), nn.Identity(), nn.Linear(4 * width, width)
            )
            layers.append(nn.ModuleList([nn.LayerNorm(width), Heads(width, width, 8, 64)]))
            layers.append(nn.ModuleList([nn.LayerNorm(width), nn.ModuleDict({"net": inner})]))
        self.transformer = nn.ModuleDict(
            {
                "token_emb": nn.Embedding(tokens, width),
                "pos_emb": nn.ModuleDict({"emb": nn.Embedding(p.get("max_seq_len", 77), width)}),
                "attn_layers": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
                "norm": nn.LayerNorm(width),
                "to_logits": nn.Linear(width, tokens),
            }
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        parts: Any = self.transformer
        x = parts["token_emb"](ids) + parts["pos_emb"]["emb"].weight[: ids.shape[1]]
        for normal, layer in parts["attn_layers"]["layers"]:
            y = normal(x)
            x = x + (layer["net"](y) if isinstance(layer, nn.ModuleDict) else layer(y, y))
        made: torch.Tensor = parts["norm"](x)
        return made


# ---------------------------------------------------------------------------------------------------- the whole


class LatentDiffusion(nn.Module):
    """A model of a config's `model.params`, its state under the names of the original code."""

    def __init__(self, p: dict[str, Any]) -> None:
        super().__init__()
        self.p = p
        self.model = nn.ModuleDict({"diffusion_model": UNet(p["unet_config"]["params"])})
        self.first_stage_model = FirstStage(p["first_stage_config"]["params"])
        condition = p["cond_stage_config"]
        target = condition["target"].rpartition(".")[2] if isinstance(condition, dict) else ""
        if target == "ClassEmbedder":
            self.cond_stage_model: nn.Module = Classes(condition["params"])
        elif target == "SpatialRescaler":
            self.cond_stage_model = SmallMap(condition["params"])
        elif target == "BERTEmbedder":
            self.cond_stage_model = Words(condition["params"])
        if p.get("scale_by_std"):
            self.register_buffer("scale_factor", torch.tensor(0.7))

    @torch.no_grad()
    def sample(
        self,
        noise: torch.Tensor,
        steps: int,
        *,
        context: torch.Tensor | None = None,
        nothing: torch.Tensor | None = None,
        guidance: float = 1.0,
        beside: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """DDIM without noise (eq. 12 of its paper) at 1, 1 + n, 1 + 2 n, ..., backwards, with guidance (arXiv 2207.12598).

        Args:
            noise: (n, C, h, w).
            steps: how many.
            context: what cross-attention reads.
            nothing: what it reads to be guided by.
            guidance: how far from the latter.
            beside: what is joined to the latents.
        """
        p, network = self.p, self.model["diffusion_model"]
        first, last = math.sqrt(p["linear_start"]), math.sqrt(p["linear_end"])
        share = torch.cumprod(1 - torch.linspace(first, last, p["timesteps"], dtype=torch.float64) ** 2, dim=0)
        times = [1 + number * (p["timesteps"] // steps) for number in range(steps)]
        x = noise
        for t, before in zip(reversed(times), [*reversed(times[:-1]), 0], strict=True):
            a, b = float(share[t]), float(share[before])

            def predicted(told: Any, x: torch.Tensor = x, t: int = t) -> torch.Tensor:
                given = x if beside is None else torch.cat([x, beside], dim=1)
                made: torch.Tensor = network(given, torch.full((len(x),), float(t)), told)
                return made

            error = predicted(context)
            if nothing is not None:
                without = predicted(nothing)
                error = without + guidance * (error - without)
            x = math.sqrt(b) * (x - math.sqrt(1 - a) * error) / math.sqrt(a) + math.sqrt(1 - b) * error
        return x

    @torch.no_grad()
    def picture(self, latents: torch.Tensor) -> torch.Tensor:
        """(n, H, W, 3) in [0, 1]."""
        scale = float(getattr(self, "scale_factor", self.p.get("scale_factor", 1.0)))
        return (self.first_stage_model.decode(latents / scale) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
