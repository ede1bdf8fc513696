"""What differs about an image from time to time: crops, faces, colours."""

from __future__ import annotations

import colorsys
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_train.data.batches import BatchPlan
from sdxl_train.data.buckets import Fit
from sdxl_train.data.dataset_config import DatasetOptions, resolve_datasets
from sdxl_train.data.loader import BatchLoader, PixelLoader
from sdxl_train.data.views import (
    Colour,
    Face,
    coloured,
    draw_colour,
    face_crop,
    random_crop,
    split_face,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.core.data.conftest import MakeImage, MakeScan

FIT = Fit(bucket=(64, 64), resized=(70, 64), crop=(3, 0), aspect_error=0.0)


def test_random_crops_reach_every_place_evenly() -> None:
    crops = [random_crop(FIT, random.Random(n)).crop for n in range(700)]
    lefts = np.bincount([left for left, _ in crops], minlength=7)
    assert len(lefts) == 7
    assert {top for _, top in crops} == {0}
    assert lefts.min() > 60


@pytest.mark.parametrize("workers", [0, 2])
def test_the_crop_in_the_conditioning_is_the_one_in_the_pixels(
    tmp_path: Path, make_scan: MakeScan, workers: int
) -> None:
    # Red is the column and green the row, so the first pixel tells where it lay.
    columns, rows = np.meshgrid(np.arange(120), np.arange(90))
    folder = tmp_path / "images" / "8_a"
    folder.mkdir(parents=True)
    array = np.stack([columns, rows, rows * 0], axis=-1).astype(np.uint8)
    Image.fromarray(array).save(folder / "a.png")
    found = make_scan(
        train_data_dir=tmp_path / "images", random_crop=True, flip_aug=True, resolution=64
    )
    pixels = PixelLoader(found.datasets, num_workers=workers)
    loader = BatchLoader(BatchPlan(found.datasets, 1), pixels)
    seen = set()
    for spec, batch in zip(loader.plan.epoch(1), loader.batches(loader.plan.epoch(1)), strict=True):
        assert batch.pixels is not None
        corner = ((batch.pixels[0, :, 0, 0] * 0.5 + 0.5) * 255).round().int().tolist()
        top, left = batch.crop_top_left[0].tolist()
        column = 120 - 1 - left if spec.samples[0].flipped else left
        assert corner[:2] == [column, top]
        assert batch.original_size[0].tolist() == [90, 120]
        seen.add((top, left))
    pixels.close()
    assert len(seen) == 8


def test_without_buckets_a_random_crop_does_not_shrink_but_enlarges_where_it_must(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "t" / "1_a" / "large.png", (300, 200))
    make_image(tmp_path / "t" / "1_a" / "small.png", (40, 100))
    found = make_scan(train_data_dir=tmp_path / "t", random_crop=True, resolution=64)
    large, small = found.datasets[0].images
    assert large.fit.resized == (300, 200)
    assert small.fit.resized == (64, 160)


def test_a_face_is_read_from_the_end_of_a_name() -> None:
    assert split_face("girl_1_320_240_50_60") == ("girl_1", Face(320, 240, 50, 60))
    assert split_face("girl_1_2") == ("girl_1_2", None)
    assert split_face("girl_a_1_2_3") == ("girl_a_1_2_3", None)


@pytest.mark.parametrize("wanders", [False, True])
def test_face_crops_cover_the_bucket_and_show_the_face_at_the_size_asked(wanders: bool) -> None:
    size, face = (1000, 800), Face(300, 400, 100, 80)
    fit = Fit(bucket=(128, 128), resized=(160, 128), crop=(16, 0), aspect_error=0.25)
    for seed in range(200):
        found = face_crop(fit, size, face, (2.0, 4.0), random.Random(seed), wanders=wanders)
        scale = found.resized[0] / 1000
        # The bucket shows between 2 and 4 faces of 100 pixels.
        assert 2.0 - 0.05 <= 128 / scale / 100 <= 4.0 + 0.05
        assert all(
            0 <= crop <= whole - 128 for crop, whole in zip(found.crop, found.resized, strict=True)
        )
        if not wanders:
            assert found.crop[0] + 64 == pytest.approx(300 * scale, abs=1.5)
            assert found.crop[1] + 64 == pytest.approx(400 * scale, abs=1.5)


def test_a_face_crop_never_enlarges_and_never_leaves_the_bucket_uncovered() -> None:
    fit = Fit(bucket=(128, 128), resized=(160, 128), crop=(16, 0), aspect_error=0.25)
    tiny = face_crop(fit, (500, 400), Face(9, 9, 4, 4), (2, 2), random.Random(0), wanders=False)
    assert tiny.resized == (500, 400)
    assert tiny.crop == (0, 0)
    huge = face_crop(fit, (500, 400), Face(9, 9, 400, 400), (4, 4), random.Random(0), wanders=False)
    assert huge.resized == (160, 128)


def test_a_third_of_the_samples_change_colour_and_half_of_them_their_hue() -> None:
    drawn = [draw_colour(random.Random(n)) for n in range(3000)]
    changed = [colour for colour in drawn if colour is not None]
    assert 0.30 < len(changed) / 3000 < 0.36
    assert 0.45 < sum(colour.gamma == 1.0 for colour in changed) / len(changed) < 0.55
    assert max(abs(colour.hue) for colour in changed) <= 8 / 180
    assert max(abs(colour.gamma - 1) for colour in changed) <= 0.05


def test_gamma_and_hue_change_pixels_by_their_formulas() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    gamma = coloured(pixels, Colour(gamma=0.95))
    np.testing.assert_allclose(gamma, 255 * (pixels / 255.0) ** 0.95, atol=0.51)
    turned = coloured(pixels, Colour(hue=8 / 180))
    by_hand = []
    for red, green, blue in pixels.reshape(-1, 3) / 255.0:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        by_hand.append(colorsys.hsv_to_rgb((hue + 8 / 180) % 1.0, saturation, value))
    # Pillow keeps hue and saturation in 8 bits each.
    np.testing.assert_allclose(turned.reshape(-1, 3), np.array(by_hand) * 255, atol=8)


def test_colours_depend_on_seed_epoch_and_sample_only(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "t" / "9_a" / "a.png")
    found = make_scan(train_data_dir=tmp_path / "t", color_aug=True, resolution=32)

    def pixels(workers: int, epoch: int) -> torch.Tensor:
        loader = BatchLoader(
            BatchPlan(found.datasets, 1), PixelLoader(found.datasets, num_workers=workers)
        )
        batches = list(loader.batches(loader.plan.epoch(epoch)))
        loader.pixels.close()
        return torch.stack([batch.pixels for batch in batches if batch.pixels is not None])

    first = pixels(0, 1)
    assert torch.equal(first, pixels(2, 1))
    assert len({bytes(image.numpy()) for image in first}) > 1
    assert not torch.equal(first, pixels(0, 2))


@pytest.mark.parametrize(
    ("options", "place", "expected"),
    [
        ({"color_aug": True, "cache_latents": True}, "--color_aug", "frozen by --cache_latents"),
        ({"random_crop": True, "cache_latents": True}, "--random_crop", "by --cache_latents"),
        (
            {"face_crop_aug_range": "1,2", "cache_latents": True},
            "--face_crop_aug_range",
            "by --cache_latents",
        ),
        (
            {"face_crop_aug_range": "1,2", "enable_bucket": True},
            "--face_crop_aug_range",
            "has no effect with enable_bucket (--enable_bucket)",
        ),
    ],
)
def test_views_that_a_cache_or_buckets_forbid_are_refused(
    tmp_path: Path, make_image: MakeImage, options: dict[str, Any], place: str, expected: str
) -> None:
    make_image(tmp_path / "t" / "1_a" / "a.png")
    _, problems, _ = resolve_datasets(
        DatasetOptions(train_data_dir=tmp_path / "t", resolution=(64, 64), **options),
        lambda name: f"--{name}",
    )
    (problem,) = problems
    assert problem.place == place
    assert expected in problem.message


@pytest.mark.parametrize("text", ["2", "3,2", "0,1", "a,b", "1,2,3", ""])
def test_a_range_needs_two_numbers_in_order(text: str) -> None:
    with pytest.raises(ValueError, match="range"):
        DatasetOptions(face_crop_aug_range=text)


@pytest.mark.parametrize(
    ("name", "other"), [("nearest", "lanczos"), ("bilinear", "bicubic"), ("area", "box")]
)
def test_each_interpolation_gives_other_pixels(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan, name: str, other: str
) -> None:
    path = make_image(tmp_path / "t" / "1_a" / "a.png", (150, 130))

    def pixels(interpolation: str) -> torch.Tensor:
        found = make_scan(train_data_dir=tmp_path / "t", resize_interpolation=interpolation)
        images = next(
            PixelLoader(found.datasets, num_workers=0).load(BatchPlan(found.datasets, 1).epoch(1))
        )
        return images.pixels

    assert not torch.equal(pixels(name), pixels(other))
    if name == "nearest":
        # 150x130 is resized to 74x64 and its middle cut out.
        with Image.open(path) as image:
            small = np.array(image.resize((74, 64), Image.Resampling.NEAREST))[:, 5:69]
        expected = torch.from_numpy(small).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(pixels(name)[0], expected)
