"""A library for families of latent-diffusion models: a U-Net, CLIP's text encoders and a VAE.

A plugin describes its family (:class:`Family`) and subclasses :class:`LdmModel`; loading, text,
pictures and the files of networks come from here. The framework itself imports nothing of this, and
nothing here knows a family by name. The names in ``__all__`` are public and load when first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from sdxl_train.ldm.lean_imports import lean_imports

if TYPE_CHECKING:
    from sdxl_train.ldm.family import (
        LATENT_CHANNELS,
        UNET,
        VAE,
        ClipEncoder,
        Family,
        TinyShape,
        UnetFacts,
    )
    from sdxl_train.ldm.files.algorithms import algorithm_of, rank_of
    from sdxl_train.ldm.files.deltas import bias_delta, delta, factors, scale, square_norm
    from sdxl_train.ldm.files.for_diffusers import adapter_metadata
    from sdxl_train.ldm.files.layers import Layer, parse_layer
    from sdxl_train.ldm.files.merging import Summand, misfit, parameters_of
    from sdxl_train.ldm.files.network_file import ADAPTER_METADATA, NetworkFile, StoredModule
    from sdxl_train.ldm.files.opening import open_networks, value_problems
    from sdxl_train.ldm.headers import BadFileError, counted, read_header
    from sdxl_train.ldm.hub import is_offline, keep_pipes_free_of_bars
    from sdxl_train.ldm.kinds import kind_of
    from sdxl_train.ldm.loaded import LoadedLdm, Modules, Origins
    from sdxl_train.ldm.loading import made_ready, text_attention
    from sdxl_train.ldm.model import LdmModel
    from sdxl_train.ldm.names import UnetLayout
    from sdxl_train.ldm.origins import Origin, clip_origin, openclip_origin
    from sdxl_train.ldm.prediction import Said
    from sdxl_train.ldm.samplers import SAMPLERS, SamplerName
    from sdxl_train.ldm.tiny import BareParts, tiny_parts, write_tiny
    from sdxl_train.ldm.tokenizer import load_tokenizers
    from sdxl_train.ldm.unfilled import fill_position_ids

_HOMES = {
    "tiny_parts": "tiny",
    "text_attention": "loading",
    "made_ready": "loading",
    "load_tokenizers": "tokenizer",
    "fill_position_ids": "unfilled",
    "Said": "prediction",
    "Origins": "loaded",
    "Modules": "loaded",
    "BareParts": "tiny",
    "LATENT_CHANNELS": "family",
    "UNET": "family",
    "VAE": "family",
    "ClipEncoder": "family",
    "Family": "family",
    "TinyShape": "family",
    "UnetFacts": "family",
    "algorithm_of": "files.algorithms",
    "rank_of": "files.algorithms",
    "bias_delta": "files.deltas",
    "delta": "files.deltas",
    "factors": "files.deltas",
    "scale": "files.deltas",
    "square_norm": "files.deltas",
    "adapter_metadata": "files.for_diffusers",
    "Layer": "files.layers",
    "parse_layer": "files.layers",
    "Summand": "files.merging",
    "misfit": "files.merging",
    "parameters_of": "files.merging",
    "ADAPTER_METADATA": "files.network_file",
    "NetworkFile": "files.network_file",
    "StoredModule": "files.network_file",
    "open_networks": "files.opening",
    "value_problems": "files.opening",
    "BadFileError": "headers",
    "counted": "headers",
    "read_header": "headers",
    "is_offline": "hub",
    "keep_pipes_free_of_bars": "hub",
    "kind_of": "kinds",
    "LoadedLdm": "loaded",
    "LdmModel": "model",
    "UnetLayout": "names",
    "Origin": "origins",
    "clip_origin": "origins",
    "openclip_origin": "origins",
    "SAMPLERS": "samplers",
    "SamplerName": "samplers",
    "write_tiny": "tiny",
}

__all__ = [
    "ADAPTER_METADATA",
    "LATENT_CHANNELS",
    "SAMPLERS",
    "UNET",
    "VAE",
    "BadFileError",
    "BareParts",
    "ClipEncoder",
    "Family",
    "Layer",
    "LdmModel",
    "LoadedLdm",
    "Modules",
    "NetworkFile",
    "Origin",
    "Origins",
    "Said",
    "SamplerName",
    "StoredModule",
    "Summand",
    "TinyShape",
    "UnetFacts",
    "UnetLayout",
    "adapter_metadata",
    "algorithm_of",
    "bias_delta",
    "clip_origin",
    "counted",
    "delta",
    "factors",
    "fill_position_ids",
    "is_offline",
    "keep_pipes_free_of_bars",
    "kind_of",
    "lean_imports",
    "load_tokenizers",
    "made_ready",
    "misfit",
    "open_networks",
    "openclip_origin",
    "parameters_of",
    "parse_layer",
    "rank_of",
    "read_header",
    "scale",
    "square_norm",
    "text_attention",
    "tiny_parts",
    "value_problems",
    "write_tiny",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdxl_train.ldm' has no attribute {name!r}")
    home = f"sdxl_train.ldm.{_HOMES[name]}"
    if home not in sys.modules:
        with lean_imports():
            importlib.import_module(home)
    return getattr(sys.modules[home], name)


def __dir__() -> list[str]:
    return __all__
