"""What the original code of Stable Diffusion (CompVis, Stability AI) calls the weights that diffusers and transformers call otherwise.

The original code numbers the blocks of a U-Net in the order in which they run (`input_blocks.4.1`), diffusers by level and kind
(`down_blocks.1.attentions.0`). Names that are not known here are left as they are: those inside a transformer block are alike.
Sources: https://github.com/CompVis/latent-diffusion (ldm/modules), https://github.com/mlfoundations/open_clip.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Of the attention of U-Nets without text.
_UNET_ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
_ATTENTION_THIRDS = ("to_q", "to_k", "to_v")
_VAE_PARTS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_BERT = {"embed_tokens": "token_emb", "embed_positions": "pos_emb.emb", "layer_norm": "norm"}
_BERT_LAYER = {
    "self_attn_layer_norm": (0, "0"),
    "self_attn.q_proj": (0, "1.to_q"),
    "self_attn.k_proj": (0, "1.to_k"),
    "self_attn.v_proj": (0, "1.to_v"),
    "self_attn.out_proj": (0, "1.to_out"),
    "final_layer_norm": (1, "0"),
    "fc1": (1, "1.net.0.0"),
    "fc2": (1, "1.net.2"),
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# Of one matrix, in this order.
_THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def unet_pieces(names: Iterable[str], heads: Mapping[str, int]) -> dict[str, Piece]:
    """Where a U-Net's weights lie: by diffusers' names.

    Args:
        names: all of diffusers' names.
        heads: how many heads each attention of a U-Net without text has, by its path; its queries, keys and values are one matrix, head by
            head.
    """
    found = {}
    for name, called in unet(names).items():
        path, _, part = name.rpartition(".")[0].rpartition(".")
        third = _ATTENTION_THIRDS.index(part) if path in heads and part in _ATTENTION_THIRDS else None
        found[name] = Piece(called) if third is None else Piece(called, third=third, heads=heads[path])
    return found


def unet(names: Iterable[str]) -> dict[str, str]:
    """The names of a U-Net's weights: diffusers' -> the original.

    Args:
        names: all of diffusers' names; the numbering depends on how many blocks a level has, and whether it attends.
    """
    names = list(names)
    blocks = len({name.split(".")[3] for name in names if name.startswith("down_blocks.0.resnets.")})
    attending = {name.split(".")[1] for name in names if name.startswith("up_blocks.") and ".attentions." in name}
    return {name: _unet(name, blocks, attending) for name in names}


def _unet(name: str, blocks: int, attending: set[str]) -> str:
    """One name of a U-Net.

    Args:
        name: diffusers'.
        blocks: residual blocks of a level on the way down; on the way up there is one more.
        attending: the levels on the way up that have attention.
    """
    module, _, last = name.rpartition(".")
    found = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", module)
    if found is None:
        return f"{_UNET.get(module, module)}.{last}"
    way, level, kind, number, part = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "attentions":
        part = _UNET_ATTENTION.get(part, part)
    elif part != "conv":  # of residual blocks, which may also be what makes a picture smaller or larger
        part = _UNET_RESNET.get(part, part)
    else:
        part = "op" if kind == "downsamplers" else part
    first = level * (blocks + 1)
    if way == "mid":
        place = f"middle_block.{1 if kind == 'attentions' else 2 * number}"
    elif kind == "downsamplers":
        place = f"input_blocks.{first + blocks + 1}.0"
    elif kind == "upsamplers":
        place = f"output_blocks.{first + blocks}.{2 if found[2] in attending else 1}"
    else:
        block = f"input_blocks.{first + number + 1}" if way == "down" else f"output_blocks.{first + number}"
        place = f"{block}.{int(kind == 'attentions')}"
    return f"{place}.{part}.{last}"


def vae(names: Iterable[str]) -> dict[str, str]:
    """The names of a first stage's weights: diffusers' -> the original. Its attention is made of convolutions of one pixel there.

    Args:
        names: all of diffusers' names; the original code counts the decoder's levels from the other end.
    """
    names = list(names)
    levels = len({name.split(".")[2] for name in names if name.startswith("decoder.up_blocks.")})
    return {name: _vae(name, levels) for name in names}


def _vae(name: str, levels: int) -> str:
    module, _, last = name.rpartition(".")
    module = re.sub(r"^(\w+coder)\.conv_norm_out$", r"\1.norm_out", module)
    found = re.fullmatch(r"(\w+coder)\.(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", module)
    if found is None:
        return f"{module}.{last}"
    coder, way, kind, number, part = found[1], found[2], found[4], int(found[5]), found[6]
    part = _VAE_PARTS.get(part, part)
    if way == "mid":
        place = f"mid.block_{number + 1}" if kind == "resnets" else f"mid.attn_{number + 1}"
    else:
        level = int(found[3]) if way == "down" else levels - 1 - int(found[3])
        inner = {"resnets": f"block.{number}", "attentions": f"attn.{number}"}.get(kind, f"{way}sample")
        place = f"{way}.{level}.{inner}"
    return f"{coder}.{place}.{part}.{last}"


def bert(name: str) -> str:
    """What the original code calls a weight of diffusers' LDMBert, the text encoder of its first models: its layers are numbered one by
    one, attention and feed-forward, each behind its norm.
    """
    name = name.removeprefix("model.")
    module, _, last = name.rpartition(".")
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    if found is None:
        return f"{_BERT.get(module, module)}.{last}"
    offset, part = _BERT_LAYER.get(found[2], (0, found[2]))
    return f"attn_layers.layers.{2 * int(found[1]) + offset}.{part}.{last}"


@dataclass(frozen=True)
class Piece:
    """A weight of transformers as it lies in the original file.

    Attributes:
        name: the original name.
        third: which third of its rows, where queries, keys and values are one matrix; None for all.
        transposed: whether rows and columns are exchanged.
        heads: the rows of one head after the other's, each with its thirds; 1 where the matrix as a whole has them.
    """

    name: str
    third: int | None = None
    transposed: bool = False
    heads: int = 1

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The weight, out of the tensor that it is a part of."""
        if self.third is not None:
            whole = whole.reshape(self.heads, 3, -1, *whole.shape[1:])[:, self.third].flatten(0, 1)
        return whole.T if self.transposed else whole


def open_clip(name: str) -> Piece:
    """What OpenCLIP, the text encoder of Stable Diffusion 2 and the second of XL, calls a weight of transformers' CLIP."""
    if name == "text_projection.weight":
        return Piece("text_projection", transposed=True)
    name = name.removeprefix("text_model.")
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None:
        return Piece(_OPEN_CLIP.get(name, name))
    layer, part, last = f"transformer.resblocks.{found[1]}", found[2], found[3]
    if part in _THIRDS:
        return Piece(f"{layer}.attn.in_proj_{last}", third=_THIRDS.index(part))
    return Piece(f"{layer}.{_OPEN_CLIP_LAYER.get(part, part)}.{last}")
