"""Measure time and memory of the tools on full-size files of random values, made on the spot.

    python bench/tools.py [--folder DIR] [--rank 32]

A checkpoint of SDXL's shapes in fp16 (7 GB), one of other values, and a LoRA for every linear layer
and convolution. Needs 30 GB of disk for a while. Each tool runs as the installed command; the
memory is the peak resident set without what is mapped from files, which the system takes back.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_lora_plugins.made_up_parts import TE1, TE2, UNET, VAE
from sdxl_lora_plugins.model import SDXL
from sdxl_train import TensorEntry, write_tensors
from sdxl_train.ldm import checkpoint, family

POOL = torch.randn(80_000_000, generator=torch.Generator().manual_seed(0))
"""Random values of which every tensor takes some."""


def sdxl_shapes() -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Give the shapes of a single-file SDXL, and of the layers that a LoRA can be for."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        te1 = CLIPTextModel(CLIPTextConfig(**TE1))
        te2 = CLIPTextModelWithProjection(CLIPTextConfig(**TE2))
        vae = AutoencoderKL(**VAE)
    origins = (
        (unet, checkpoint.unet_origins(unet)),
        (te1, checkpoint.clip_origins(te1, SDXL.encoder("te1"))),
        (te2, checkpoint.clip_origins(te2, SDXL.encoder("te2"))),
        (vae, checkpoint.vae_origins(vae, {"first_stage_model.": ()})),
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for module, found in origins:
        state = module.state_dict()
        for path, origin in found.items():
            shape = tuple(state[path].shape)
            if origin.third is not None:
                shape = (3 * shape[0], *shape[1:])
            shapes[origin.name] = shape[::-1] if origin.transposed else shape
    prefix = family.UNET
    layers = {
        f"lora_unet_{name.removeprefix(prefix).removesuffix('.weight').replace('.', '_')}": shape
        for name, shape in shapes.items()
        if name.startswith(prefix) and name.endswith(".weight") and len(shape) > 1
    }
    return shapes, layers


def values(name: str, shape: tuple[int, ...], scale: float, seed: str = "") -> torch.Tensor:
    """Give random values, other ones for each name and seed."""
    count = torch.Size(shape).numel()
    start = hash(name + seed) % (len(POOL) - count)
    return scale * POOL[start : start + count].reshape(shape)


def write(path: Path, shapes: dict[str, tuple[int, ...]], scale: float, seed: str = "") -> Path:
    """Write a file of random values in fp16."""
    entries = {name: TensorEntry(torch.float16, shape) for name, shape in shapes.items()}
    write_tensors(path, entries, lambda name: values(name, shapes[name], scale, seed), {})
    return path


def lora_shapes(layers: dict[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
    """Give the shapes of a LoRA for these layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in layers.items():
        ones = (1,) * (len(shape) - 2)
        shapes |= {
            f"{name}.lora_down.weight": (rank, *shape[1:]),
            f"{name}.lora_up.weight": (shape[0], rank, *ones),
            f"{name}.alpha": (),
        }
    return shapes


def measured(words: list[str]) -> None:
    """Run a command and print its time and its peak of anonymous memory."""
    command = str(Path(sys.executable).with_name("sdxl-train"))
    began, peak = time.monotonic(), 0
    with subprocess.Popen([command, *words], stdout=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]))
            time.sleep(0.02)
    seconds = time.monotonic() - began
    print(f"| `{words[0]}` | {seconds:.0f} s | {peak / 1e6:.2f} GB | {process.returncode} |")


def main() -> None:
    """Make the files and run the tools."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        shapes, layers = sdxl_shapes()
        base = str(write(folder / "base.safetensors", shapes, 0.02))
        lora = str(write(folder / "a.safetensors", lora_shapes(layers, options.rank), 0.01))
        out = folder / "out.safetensors"
        to = ["--save_to", str(out), "--overwrite"]
        for path in (base, lora):
            print(f"{Path(path).name}: {Path(path).stat().st_size / 1e9:.2f} GB")
        print("| tool | time | memory | exit |\n|---|---|---|---|")
        measured(["inspect", lora])
        measured(["convert", lora, "--to", "diffusers", *to])
        measured(["merge", lora, lora, *to])
        measured(["resize", lora, "--new_rank", "8", *to])
        measured(["resize", lora, "-r", "fro_ckpt=1,size=40", "--sd_model", base, *to])
        measured(["merge", lora, "--sd_model", base, *to])
        out.unlink()
        tuned = str(write(folder / "tuned.safetensors", shapes, 0.02, "tuned"))
        measured(["extract", "--model_org", base, "--model_tuned", tuned, "--dim", "16", *to])


if __name__ == "__main__":
    main()
