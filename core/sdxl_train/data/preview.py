"""``--debug_dataset``: samples as they will be trained, in pictures and a page to look at.

The samples are those of the first epoch, in its order: cut out, mirrored, coloured and captioned by
the code that trains them.
"""

from __future__ import annotations

import html
import json
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from sdxl_train.data.images import load_image
from sdxl_train.data.loader import PixelLoader
from sdxl_train.wording import visible

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.data.batches import BatchPlan, BatchSpec, Sample
    from sdxl_train.data.buckets import Fit
    from sdxl_train.data.records import ImageRecord

MOST_SAMPLES = 100
"""More than that nobody looks at."""
_GAP = 8
_BACKGROUND = "#808080"
_BOX = "#ff0000"

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 1em; }}
figure {{ margin: 0 0 2em; }}
img {{ max-width: 100%; image-rendering: auto; border: 1px solid #808080; }}
td {{ padding: 0 1em 0 0; vertical-align: top; }}
</style>
<h1>{title}</h1>
<p>Left: the image and what is cut out of it. Then: what is trained, and its mask if it has one,
white where the loss counts.</p>
{figures}
</html>
"""


def write_preview(plan: BatchPlan, folder: Path) -> Path:
    """Write the first samples of the first epoch as pictures and a page; give the page.

    Besides ``index.html`` there is ``samples.json`` with the same facts.

    Raises:
        TrainingError: If an image cannot be decoded.
        OSError: If the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("sample-*.png"):
        earlier.unlink()
    specs = list(_first(plan.epoch(1)))
    loader = PixelLoader(plan.datasets, num_workers=0)
    facts: list[dict[str, Any]] = []
    for spec, images in zip(specs, loader.load(specs), strict=True):
        captions = plan.captions(spec)
        for index, sample in enumerate(spec.samples):
            record = plan.datasets[spec.dataset].images[sample.image]
            mask = None if images.masks is None else images.masks[index, 0]
            name = f"sample-{len(facts) + 1:04}.png"
            _picture(record, sample, images.pixels[index], mask).save(folder / name)
            facts.append({"file": name, **_facts(record, sample, spec), "caption": captions[index]})
    _write(folder / "samples.json", json.dumps(facts, indent=2, ensure_ascii=False))
    title = f"{len(facts)} of {_num_samples(plan)} samples of the first epoch"
    page = folder / "index.html"
    figures = "\n".join(map(_figure, facts))
    _write(page, _PAGE.format(title=title, figures=figures))
    return page


def _write(path: Path, text: str) -> None:
    # Names of files that are no UTF-8 hold lone surrogates, which stay as JSON's escapes.
    path.write_bytes(text.encode(errors="backslashreplace"))


def _first(specs: Sequence[BatchSpec]) -> Iterator[BatchSpec]:
    """Give whole batches up to the most samples, at least one."""
    count = 0
    for spec in specs:
        if count and count + len(spec.samples) > MOST_SAMPLES:
            return
        count += len(spec.samples)
        yield spec


def _num_samples(plan: BatchPlan) -> int:
    return sum(image.repeats for dataset in plan.datasets for image in dataset.images)


def _facts(record: ImageRecord, sample: Sample, spec: BatchSpec) -> dict[str, Any]:
    fit = sample.fit or record.fit
    return {
        "image": str(record.path),
        "mask": str(record.mask) if record.mask else None,
        "size": list(record.size),
        "bucket": list(fit.bucket),
        "resized": list(fit.resized),
        "crop_left_top": [fit.crop_left(flipped=sample.flipped), fit.crop[1]],
        "flipped": sample.flipped,
        "colour": None
        if sample.colour is None
        else {"hue": sample.colour.hue, "gamma": sample.colour.gamma},
        "repeat": sample.repeat + 1,
        "repeats": record.repeats,
        "regularization": record.is_reg,
        "dataset": spec.dataset + 1,
        "original_caption": record.caption,
    }


def _picture(
    record: ImageRecord, sample: Sample, pixels: Tensor, mask: Tensor | None
) -> Image.Image:
    """Put the image with its crop box, what is trained of it and its mask side by side.

    Args:
        record: The image.
        sample: How it is seen this time.
        pixels: fp32 [3, H, W] in [-1, 1].
        mask: fp32 [H, W] in [0, 1].
    """
    trained = _shades(pixels.permute(1, 2, 0) / 2 + 0.5)
    panels = [_boxed(record, sample.fit or record.fit, trained.height), trained]
    if mask is not None:
        panels.append(_shades(mask))
    width = sum(panel.width for panel in panels) + _GAP * (len(panels) - 1)
    sheet = Image.new("RGB", (width, trained.height), _BACKGROUND)
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + _GAP
    return sheet


def _boxed(record: ImageRecord, fit: Fit, height: int) -> Image.Image:
    """Draw the crop box into the whole image, as high as the picture that is trained."""
    image = load_image(record.path)
    scale = height / image.height
    image = image.resize((max(1, round(image.width * scale)), height))
    across, down = image.width / fit.resized[0], image.height / fit.resized[1]
    left, top = fit.crop
    right, bottom = left + fit.bucket[0], top + fit.bucket[1]
    box = (left * across, top * down, right * across - 1, bottom * down - 1)
    ImageDraw.Draw(image).rectangle(box, outline=_BOX, width=max(1, height // 256))
    return image


def _shades(values: Tensor) -> Image.Image:
    """Make a picture of values in [0, 1]: [H, W], or [H, W, 3] in colour."""
    return Image.fromarray((values * 255).round().byte().numpy())


def _figure(facts: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{_shown(value)}</td></tr>"
        for name, value in facts.items()
        if name != "file" and value not in (None, False)
    )
    return f'<figure><img src="{facts["file"]}" alt=""><table>{rows}</table></figure>'


def _shown(value: object) -> str:
    text = "x".join(map(str, value)) if isinstance(value, list) else visible(str(value))
    return html.escape(text).replace("\n", "<br>") or "<i>empty</i>"
