"""Files of LoRA-family networks for SDXL: what is in them, whatever wrote them.

- :class:`NetworkFile`: a file by layer, from its header; what is wrong with it, in one line each.
- :mod:`~sdxl_lora_plugins.files.deltas`: what the tensors of a layer add to its weight.
- :class:`Layer`: a layer of SDXL, and its names in the namings of kohya, diffusers and OMI.

Importing this package does not import torch; ``deltas`` does.
"""

from __future__ import annotations

from sdxl_lora_plugins.files.layers import Layer, parse_layer
from sdxl_lora_plugins.files.network_file import NetworkFile, StoredModule
from sdxl_lora_plugins.model.headers import BadFileError, Fault

__all__ = ["BadFileError", "Fault", "Layer", "NetworkFile", "StoredModule", "parse_layer"]
