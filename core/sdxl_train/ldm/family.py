"""What tells one family of latent-diffusion models from another, as data. Light to import.

A family has a U-Net that is told texts, one or two text encoders of CLIP and a VAE (Rombach et al.
2022). :class:`Family` says what none of its files says; the rest is read off shapes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from sdxl_train.ldm.names import UnetLayout

UNET: Final = "model.diffusion_model."
VAE: Final = "first_stage_model."
"""What stands before the names of the U-Net's and the VAE's tensors in a single file."""
LATENT_CHANNELS: Final = 4

Naming: TypeAlias = Literal[
    "kohya", "kohya-diffusers", "kohya-ldm", "diffusers", "omi", "comfy", "peft", "lycoris"
]
"""The namings of network files; see :mod:`.files.layers`."""


@dataclass(frozen=True, kw_only=True)
class ClipEncoder:
    """A text encoder of a family.

    Attributes:
        name: Of the part, as in plans: ``te1``.
        title: For people: ``text encoder 1 (CLIP ViT-L/14)``.
        folder: Its subfolder in a diffusers folder.
        tokenizer: That of its tokenizer.
        key: What stands before the names of its tensors in a single file.
        naming: What a single file names it after.
        files: What stands before its layers in network files, by naming, with the separator.
        padding: The token that fills up its texts; None for the last token of a text.
        projects: Whether its pooled output is told to the U-Net too.
        unused_layers: Last layers that a single file has and the model does not use.
        cache_name: Its folder in a tokenizer cache: the hub id with ``/`` as ``_``.
    """

    name: str
    title: str
    folder: str
    tokenizer: str
    key: str
    naming: Literal["transformers", "openclip"]
    files: Mapping[Naming, str]
    padding: Literal["!"] | None = None
    projects: bool = False
    unused_layers: int = 0
    cache_name: str

    @property
    def short_title(self) -> str:
        """The title without what stands in brackets."""
        return self.title.partition(" (")[0]


@dataclass(frozen=True, kw_only=True)
class UnetFacts:
    """What tells which family a U-Net is of, read off a file's shapes or a folder's configuration.

    Attributes:
        in_channels: Of its first convolution.
        context_width: Of the text that it attends to; None if nothing tells.
        pooled: Whether it is told a pooled text and sizes.
        linear: Whether its transformers project by matrices; None if nothing tells.
        names: Names of the other tensors of its file; empty for a folder.
    """

    in_channels: int
    context_width: int | None
    pooled: bool
    linear: bool | None = None
    names: Sequence[str] = field(default=(), repr=False)

    def has(self, prefix: str) -> bool:
        """Tell whether its file has tensors under a prefix."""
        return any(name.startswith(prefix) for name in self.names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A family of latent-diffusion models.

    Attributes:
        title: ``Stable Diffusion 1.x``: no article.
        checkpoint: What its base models are: ``a Stable Diffusion 1.x checkpoint``.
        text_encoders: In the order in which their outputs are joined.
        layout: Of its U-Net.
        unet_naming: Whose names of the U-Net's layers network files have.
        blocks: The U-Net's blocks in the order in which users give values by block.
        recognize: Says what a U-Net of four input channels belongs to, with an article;
            ``checkpoint`` for this family.
        model_types: The ``--model_type`` of other families, by what ``recognize`` says of theirs.
        other_network: Says which other model a network is for, by the names of its tensors and its
            metadata, where the width of the text does not tell; None where nothing says so.
        contexts: Titles of families, this one's too, by the width of the text that their U-Nets
            attend to.
        latent_scaling: Factor that gives its latents unit variance.
        usual_layer: The layer of the text encoders whose states it was trained on, counted from
            the last one as 1.
        final_norm: Whether the encoder's last norm comes after that layer.
        num_heads: Heads of the U-Net's attention; None for heads 64 wide.
        pipeline: diffusers' class that makes pictures with it.
        npz: How sd-scripts ends the names of its cached latents, before ``.npz``.
        pickles: Whether files that torch wrote are read too, by its loader that builds tensors and
            nothing else.
        metadata: What network files say of their base model, by whether it predicts velocity.
    """

    title: str
    checkpoint: str
    text_encoders: tuple[ClipEncoder, ...]
    layout: UnetLayout
    unet_naming: Literal["ldm", "diffusers"]
    blocks: tuple[str, ...]
    recognize: Callable[[UnetFacts], str]
    other_network: Callable[[Collection[str], Mapping[str, str]], str | None]
    contexts: Mapping[int, str]
    latent_scaling: float
    usual_layer: int
    final_norm: bool
    num_heads: int | None = None
    pipeline: str
    npz: str
    pickles: bool = False
    metadata: Callable[[bool], Mapping[str, str]]
    model_types: Mapping[str, str] = field(default_factory=dict)

    @property
    def pooled(self) -> bool:
        """Whether the U-Net is told a pooled text, and the sizes and the crop of the image."""
        return any(encoder.projects for encoder in self.text_encoders)

    @cached_property
    def folders(self) -> dict[str, tuple[str, str]]:
        """The subfolders of a diffusers folder with weights: title and stem of their files."""
        encoders = {e.folder: (e.title, "model") for e in self.text_encoders}
        stem = "diffusion_pytorch_model"
        return {"unet": ("U-Net", stem), **encoders, "vae": ("VAE", stem)}

    @cached_property
    def unet_blocks(self) -> dict[str, str]:
        """The U-Net's resnets, transformers and samplers: from diffusers' names to LDM's."""
        return self.layout.present_blocks()

    def encoder(self, name: str) -> ClipEncoder:
        """Give a text encoder by the name of its part."""
        return next(encoder for encoder in self.text_encoders if encoder.name == name)

    def part_title(self, name: str) -> str:
        """Give what a part is called in short: ``U-Net``, ``text encoder 1``."""
        return "U-Net" if name == "unet" else self.encoder(name).short_title

    def block_of(self, path: str) -> str | None:
        """Name the block that a layer of the U-Net is in, by its path in single files.

        None if values by block do not reach it.
        """
        match = re.match(r"(input|middle|output)_blocks?\.(\d+)", path)
        if match:
            candidates: tuple[str, ...] = (f"{match[1]}_{match[2]}", match[1])
        else:
            stem = "time_embed" if path.startswith(("time_embed", "label_emb")) else "out"
            candidates = (stem,)
        return next((name for name in candidates if name in self.blocks), None)


@dataclass(frozen=True, kw_only=True)
class TinyShape:
    """How large the tiny model of a family is; see :mod:`.tiny`.

    Attributes:
        unet_widths: Channels of each level of the U-Net.
        depths: Transformer blocks of each level.
        text_encoders: Width and layers of each text encoder.
        linear_projection: Whether the U-Net's transformers project by matrices.
    """

    unet_widths: tuple[int, ...]
    depths: tuple[int, ...]
    text_encoders: tuple[tuple[int, int], ...]
    linear_projection: bool
