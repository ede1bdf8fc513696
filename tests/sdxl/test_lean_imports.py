"""What a training does not use of its libraries is imported when somebody uses it, and works."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from sdxl_train.ldm import lean_imports

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

# In a process of its own: this one has imported everything long ago.
_TRAINS = """
import sys
import torch
from sdxl_lora_plugins.model import Sdxl
from sdxl_train.without_compiler import build_without_compiler
file, folder = sys.argv[1:]
options = Sdxl(pretrained_model_name_or_path=file, gradient_checkpointing=True)
model = options.build("cpu", torch.float32)
sizes = dict.fromkeys(("original_size", "crop_top_left", "target_size"), torch.zeros(1, 2).long())
trained = [p.requires_grad_(True) for p in model.denoiser.conv_in.parameters()]
optimizer = build_without_compiler(lambda: torch.optim.AdamW(trained, lr=1e-3))
before = [p.detach().clone() for p in trained]
noisy = model.encode_images(torch.zeros(1, 3, 32, 32))
told = {**model.encode_text(["a cat"]), **sizes}
torch.autograd.backward(model.predict(noisy, torch.tensor([5]), told).square().mean())
optimizer.step()
optimizer.zero_grad()
assert not any(torch.equal(p, b) for p, b in zip(trained, before, strict=True))
UNUSED = ("bitsandbytes", "peft", "scipy", "sympy", "torch._dynamo", "torch.distributed.tensor",
          "diffusers.hooks.layerwise_casting", "diffusers.models.transformers.transformer_flux",
          "requests", "transformers.models.auto.processing_auto", "transformers.processing_utils")
there = [name for name in UNUSED if name in sys.modules]
assert not there, there
"""
_USES_THE_REST = """
# Everything is there for whoever asks for it, in this order or another.
from diffusers.utils import import_utils as diffusers_utils
from torch.distributed.tensor import DTensor, Shard
from transformers.distributed import sharding_utils
assert isinstance(DTensor, type)
assert not isinstance(trained[0], sharding_utils.DTensor)
assert sharding_utils.Shard(1) == Shard(1)
import peft.tuners.tuners_utils
from diffusers.loaders import lora_base
layer = peft.tuners.tuners_utils.BaseTunerLayer()
assert isinstance(layer, lora_base.BaseTunerLayer)
assert not isinstance(model, lora_base.BaseTunerLayer)
from diffusers.hooks import apply_layerwise_casting
from diffusers import AutoencoderTiny, FluxTransformer2DModel, StableDiffusionXLPipeline
from transformers import BertModel, CLIPVisionModel
from transformers import BertTokenizer, CLIPProcessor, CLIPTextModel, __version__
assert CLIPTextModel is type(model.text_encoders[0])
assert "attention_mask" in BertModel.forward.__doc__
import transformers
assert transformers.__version__ == __version__ and transformers.CLIPTextModel is CLIPTextModel
assert transformers.processing_utils.transformers_module.CLIPProcessor.__name__ == "CLIPProcessor"
assert "diffusers" in diffusers_utils._package_map
import transformers.models
assert transformers.models.bert.BertModel is BertModel
import diffusers.models.transformers
assert diffusers.models.transformers.FluxTransformer2DModel is FluxTransformer2DModel
pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
pipeline.unet.add_adapter(config)
added = {"text_embeds": told["pooled"], "time_ids": torch.ones(1, 6)}
plain, half = (
    pipeline.unet(noisy, 5, told["context"], cross_attention_kwargs={"scale": scale},
                  added_cond_kwargs=added)[0]
    for scale in (1.0, 0.5)
)
assert not torch.equal(plain, half)
compiled = torch.compile(lambda x: 2 * x, backend="eager")
assert compiled(torch.ones(1)).item() == 2
torch.autograd.backward(model.predict(noisy, torch.tensor([5]), told).square().mean())
optimizer.step()
assert "torch._dynamo" in sys.modules and torch._dynamo.config is not None
"""


def test_training_imports_little_and_nothing_is_lost(tiny_file: Path, tiny_folder: Path) -> None:
    program = _TRAINS + _USES_THE_REST
    words = [sys.executable, "-c", program, str(tiny_file), str(tiny_folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_variable_of_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    finders = list(sys.meta_path)
    with lean_imports():
        assert sys.meta_path != finders
    monkeypatch.setenv("LEAN_IMPORTS", "0")
    with lean_imports():
        assert sys.meta_path == finders
