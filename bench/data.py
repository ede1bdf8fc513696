"""Measure the data side: the scan, caching, and how long a step waits for its batch.

    python bench/data.py [--images 100000] [--json]

Everything is made up on the spot; times are of this machine, so compare ratios. What is compared
is measured in turns, in one process, and the median of the turns counts.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdxl_train.data.sources import Scan

SIZES = ((1024, 1024), (832, 1216), (1216, 832), (1500, 1000), (768, 1344))
TURNS = 5


def main() -> None:
    """Measure what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000, help="images to scan")
    parser.add_argument("--to_cache", type=int, default=64, help="images to encode")
    parser.add_argument("--steps", type=int, default=60, help="steps to train")
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--to_decode", type=int, default=500, help="images to scan for training")
    parser.add_argument("--only", choices=("scan", "caching", "waiting"), help="measure only this")
    parser.add_argument("--scan_once", nargs=2, metavar=("FOLDER", "HOME"), help=argparse.SUPPRESS)
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.scan_once:
        folder, home = map(Path, options.scan_once)
        print(json.dumps(scan_once(folder, home, decode=options.decode)))
        return
    with tempfile.TemporaryDirectory(prefix="sdxl-train-bench-") as name:
        folder = Path(name)
        works: dict[str, Callable[[], dict[str, float]]] = {
            "scan": lambda: {
                **measure_scan(folder / "many", options.images),
                **measure_scan(folder / "decoded", options.to_decode, "--decode"),
            },
            "caching": lambda: measure_caching(folder / "few", options.to_cache),
            "waiting": lambda: measure_waiting(folder / "train", options.steps),
        }
        figures = {title: work() for title, work in works.items() if options.only in (None, title)}
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    for title, values in figures.items():
        print(title)
        for key, value in values.items():
            print(f"  {key:<44} {value:.4g}")


# ----------------------------------------------------------------------------------------- scan


def measure_scan(folder: Path, count: int, *flags: str) -> dict[str, float]:
    """Scan a folder of images with captions twice, each time in a process of its own.

    With ``--decode`` as a training starts, which decodes each image that it never saw; else as
    ``plan`` does, which reads heads only.
    """
    write_images(folder / "data", 50, count, "1_thing")
    forget(folder / "data" / "1_thing")
    home = str(folder / "home")
    title = "training" if flags else "plan"
    first, second = (
        json.loads(
            subprocess.run(
                [sys.executable, __file__, "--scan_once", str(folder / "data"), home, *flags],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for _ in range(2)
    )
    return {
        f"{title}: images": count,
        f"{title}: first start, s": first["seconds"],
        f"{title}: first start, s of CPU": first["cpu"],
        f"{title}: second start, s": second["seconds"],
        f"{title}: second start, s of CPU": second["cpu"],
        f"{title}: first / second": first["seconds"] / second["seconds"],
        f"{title}: first / second, of CPU": first["cpu"] / second["cpu"],
        f"{title}: memory, KB for each image": second["kilobytes"] / count,
    }


def forget(folder: Path) -> None:
    """Have the system drop the files from its memory: that of a real first start is elsewhere."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def scan_once(folder: Path, home: Path, *, decode: bool) -> dict[str, float]:
    """Scan a folder, and give the seconds, the processor's seconds and the growth of memory."""
    from sdxl_train.data.scan_index import ScanIndex

    found = scan_of(home / "warm-up", ScanIndex())  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, computed = time.perf_counter(), time.process_time()
    index = ScanIndex(home)
    found = scan_of(folder, index, decode=decode)
    index.save()
    assert found.datasets[0].images
    return {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - computed,
        "kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
    }


def scan_of(folder: Path, index: Any, resolution: int = 1024, *, decode: bool = False) -> Scan:
    """Scan a folder at the usual settings."""
    from sdxl_train.data.dataset_config import resolve_datasets
    from sdxl_train.data.dataset_options import DatasetOptions
    from sdxl_train.data.sources import scan

    if not folder.is_dir():
        write_images(folder.parent, 1, 1, folder.name)
    options = DatasetOptions(
        train_data_dir=folder, resolution=resolution, enable_bucket=True, max_bucket_reso=2048
    )
    datasets, problems, _ = resolve_datasets(options, str)
    assert not problems, problems
    return scan(datasets, bucket_multiple=32, place=str, index=index, decode=decode)


def write_images(parent: Path, kinds: int, count: int, name: str = "images") -> None:
    """Write pictures with captions, of which ``kinds`` differ in more than a few bytes."""
    folder = parent / name
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    kinds = min(kinds, count)
    pictures = [picture(rng, number, blocks=count > 10 * kinds) for number in range(kinds)]
    for number in range(count):
        data, ending = pictures[number % kinds], "jpg" if number % kinds % 2 else "png"
        path = folder / f"img_{number:06d}.{ending}"
        path.write_bytes(with_remark(data, f"{number:0{rng.integers(9, 9000)}}"))
        caption = f"tag{number % 997}, number {number}, a photo, outdoors, looking at the viewer"
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def picture(rng: np.random.Generator, number: int, *, blocks: bool) -> bytes:
    """Give a picture file: JPEG where the number is odd, else PNG; of blocks, it is small."""
    width, height = SIZES[number % len(SIZES)]
    grain = 256 if blocks else 32
    coarse = rng.integers(0, 255, (height // grain, width // grain, 3), dtype=np.uint8)
    way = Image.Resampling.NEAREST if blocks else Image.Resampling.BICUBIC
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), way).save(file, "JPEG" if number % 2 else "PNG")
    return file.getvalue()


def with_remark(data: bytes, text: str) -> bytes:
    """Put a text into a picture file, so that no two files are the same."""
    if data.startswith(b"\xff\xd8"):
        return data[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text.encode() + data[2:]
    chunk = b"tEXtnumber\0" + text.encode()
    size, check = struct.pack(">I", len(chunk) - 4), struct.pack(">I", zlib.crc32(chunk))
    return data[:33] + size + chunk + check + data[33:]  # after signature and IHDR


# -------------------------------------------------------------------------------------- caching


def measure_caching(folder: Path, count: int) -> dict[str, float]:
    """Encode images with VAEs of two sizes: in a plain loop, and as a run does."""
    import torch
    from diffusers import AutoencoderKL

    from sdxl_train.data.scan_index import ScanIndex

    write_images(folder, count, count)
    found = scan_of(folder / "images", ScanIndex(), resolution=256)
    figures: dict[str, float] = {"images": count, "threads": torch.get_num_threads()}
    for title, widths in (("tiny VAE", (8, 8, 16, 16)), ("mid-size VAE", (16, 32, 64, 64))):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=widths,
            latent_channels=4,
            norm_num_groups=8,
            layers_per_block=1,
        ).eval()

        def encode(images: torch.Tensor, vae: Any = vae) -> torch.Tensor:
            with torch.no_grad():
                latents: torch.Tensor = vae.encode(images).latent_dist.mode()
            return latents

        times = in_turns(
            {
                "decode alone": lambda: decode_all(found),
                "plain": lambda: plain_loop(found, encode),
                "ours": lambda encode=encode: fill(found, encode),
            }
        )
        figures |= {
            f"{title}: decoding's share of the plain loop": times["decode alone"] / times["plain"],
            f"{title}: plain loop, img/s": count / times["plain"],
            f"{title}: caching, img/s": count / times["ours"],
            f"{title}: caching / plain loop": times["plain"] / times["ours"],
        }
    return figures


def in_turns(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Give the median seconds of each work, done in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(TURNS):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def pixels_of(found: Scan) -> Iterator[Any]:
    """Give the images as a script would load them: fp32 [1, 3, H, W]."""
    import torch

    from sdxl_train.data.images import fit_image, load_image

    for image in found.datasets[0].images:
        pixels = fit_image(load_image(image.path), image.fit)
        yield torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def decode_all(found: Scan) -> None:
    """Load the images only."""
    for _ in pixels_of(found):
        pass


def plain_loop(found: Scan, encode: Callable[[Any], Any]) -> list[Any]:
    """Load and encode one image after the other."""
    return [encode(pixels) for pixels in pixels_of(found)]


def fill(found: Scan, encode: Callable[[Any], Any]) -> None:
    """Fill a cache in memory as a run does."""
    from sdxl_train.data.cache import LatentCache
    from sdxl_train.data.loader import PixelLoader

    loader = PixelLoader(found.datasets, num_workers=8)
    cache = LatentCache(found.datasets)
    cache.fill(loader, encode, batch_size=4, progress=lambda done, total: None)
    loader.close()


# -------------------------------------------------------------------------------------- waiting


def measure_waiting(folder: Path, steps: int) -> dict[str, float]:
    """Train the tiny model from caches on the disk, and time the waits for batches."""
    import torch

    import sdxl_train
    from sdxl_lora_plugins.model import SDXL, TINY
    from sdxl_train.ldm.tiny import write_tiny
    from sdxl_train.supply import Supply

    write_images(folder, 8, 40)
    model = write_tiny(folder / "tiny.safetensors", SDXL, TINY, seed=0, single_file=True)
    torch.set_num_threads(1)
    waits: list[float] = []
    ends: list[float] = []
    steps_of = Supply.steps

    def timed(self: Supply, start: int = 0) -> Iterator[Any]:
        batches = steps_of(self, start)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            waits.append(time.perf_counter() - began)
            if batch is None:
                return
            yield batch

    Supply.steps = timed  # type: ignore[method-assign]
    sdxl_train.train(
        {
            "pretrained_model_name_or_path": str(model),
            "train_data_dir": str(folder / "images"),
            "output_dir": str(folder / "output"),
            "resolution": 64,
            "network_module": "networks.lora",
            "network_train_unet_only": True,
            "cache_latents_to_disk": True,
            "cache_text_encoder_outputs_to_disk": True,
            "max_train_steps": steps,
            "seed": 1,
            "progress": False,
        },
        events={"step_finished": lambda step: ends.append(time.perf_counter())},
    )
    Supply.steps = steps_of  # type: ignore[method-assign]
    durations = [later - earlier for earlier, later in pairwise(ends)]
    return {
        "steps": steps,
        "step, ms": 1000 * median(durations),
        "wait for a batch, ms": 1000 * median(waits[1:-1]),
        "share of the step, %": 100 * sum(waits[1:-1]) / sum(durations),
    }


if __name__ == "__main__":
    main()
