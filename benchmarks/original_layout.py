"""A Stable Diffusion 1.x checkpoint of the diffusers layout as one file of the original layout, for programs that read only that.

    python benchmarks/original_layout.py MODEL OUT.safetensors

Names are those of CompVis' modules (https://github.com/CompVis/stable-diffusion, ldm/modules).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

# (a name of diffusers', what it is there), the first that fits; numbers may be computed from the ones found.
Rule = tuple[str, str | Callable[[re.Match[str]], str]]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Each level of the U-Net has two blocks on the way down, and what makes the picture smaller; three on the way up.
_UNET: tuple[Rule, ...] = (
    (r"time_embedding\.linear_1", "time_embed.0"),
    (r"time_embedding\.linear_2", "time_embed.2"),
    (r"conv_in", "input_blocks.0.0"),
    (r"conv_norm_out", "out.0"),
    (r"conv_out", "out.2"),
    (
        r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)",
        lambda m: f"input_blocks.{3 * int(m[1]) + int(m[3]) + 1}.{int(m[2] == 'attentions')}",
    ),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op"),
    (r"mid_block\.attentions\.0", "middle_block.1"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (
        r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)",
        lambda m: f"output_blocks.{3 * int(m[1]) + int(m[3])}.{int(m[2] == 'attentions')}",
    ),
    # Behind the attention, where the level has it.
    (
        r"up_blocks\.(\d)\.upsamplers\.0\.conv",
        lambda m: f"output_blocks.{3 * int(m[1]) + 2}.{1 if m[1] == '0' else 2}.conv",
    ),
)
_VAE_LEVELS = 4
_VAE: tuple[Rule, ...] = (
    (r"(encoder\.down)_blocks\.(\d)\.resnets\.(\d)", r"\1.\2.block.\3"),
    (r"(encoder\.down)_blocks\.(\d)\.downsamplers\.0\.conv", r"\1.\2.downsample.conv"),
    (
        r"decoder\.up_blocks\.(\d)\.resnets\.(\d)",
        lambda m: f"decoder.up.{_VAE_LEVELS - 1 - int(m[1])}.block.{m[2]}",
    ),
    (
        r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.conv",
        lambda m: f"decoder.up.{_VAE_LEVELS - 1 - int(m[1])}.upsample.conv",
    ),
    (r"(\w+coder)\.mid_block\.resnets\.(\d)", lambda m: f"{m[1]}.mid.block_{int(m[2]) + 1}"),
    (r"(\w+coder)\.mid_block\.attentions\.0\.group_norm", r"\1.mid.attn_1.norm"),
    (r"(\w+coder)\.mid_block\.attentions\.0\.to_([qkv])", r"\1.mid.attn_1.\2"),
    (r"(\w+coder)\.mid_block\.attentions\.0\.to_out\.0", r"\1.mid.attn_1.proj_out"),
    (r"(\w+coder)\.conv_norm_out", r"\1.norm_out"),
)


def _renamed(name: str, rules: tuple[Rule, ...], inner: Mapping[str, str]) -> str:
    for pattern, replacement in rules:
        found = re.match(rf"{pattern}\.", name)
        if found is not None:
            rest = name[found.end() :]
            head = found.expand(replacement) if isinstance(replacement, str) else replacement(found)
            part, _, last = rest.rpartition(".")
            return ".".join(piece for piece in (head, inner.get(part, part), last) if piece)
    return name


def original(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint by its original name."""
    for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        inner = _RESNET if "resnets" in name else {}
        yield f"model.diffusion_model.{_renamed(name, _UNET, inner)}", tensor
    for name, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        renamed = _renamed(name, _VAE, {"conv_shortcut": "nin_shortcut"})
        # Its attention is made of convolutions of one pixel there.
        pixel = ".attn_1." in renamed and tensor.dim() == 2
        yield f"first_stage_model.{renamed}", tensor[:, :, None, None] if pixel else tensor
    for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items():
        # transformers has left the middle out since its version 5.
        yield f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}", tensor


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    save_file({name: tensor.contiguous() for name, tensor in original(arguments.model)}, arguments.out)


if __name__ == "__main__":
    main()
