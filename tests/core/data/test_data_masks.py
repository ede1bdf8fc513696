"""Masks: found, checked, and seen exactly as their image is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_train.data.batches import BatchPlan
from sdxl_train.data.cache import LatentCache
from sdxl_train.data.dataset_config import DatasetOptions, resolve_datasets
from sdxl_train.data.loader import BatchLoader, PixelLoader
from sdxl_train.masks import masked_mean, shrunk_masks

if TYPE_CHECKING:
    from pathlib import Path

    from sdxl_train.data.batches import Batch
    from sdxl_train.data.sources import Scan
    from tests.core.data.conftest import MakeScan

SIZES = [(64, 64), (100, 60), (61, 130)]


def grey_noise(size: tuple[int, int], seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, size[::-1], dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """Grey images whose masks, and whose alpha channels, are the images themselves."""
    for number, size in enumerate(SIZES):
        grey = grey_noise(size, number)
        for folder, image in (
            ("plain/2_cat", grey),
            ("masks", grey),
            ("alpha/2_cat", Image.merge("RGBA", (grey, grey, grey, grey))),
        ):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / folder / f"{number}_40_30_20_24.png")
    return tmp_path


def loaded(found: Scan, epoch: int = 1, **options: Any) -> list[Batch]:
    pixels = PixelLoader(found.datasets, num_workers=0)
    loader = BatchLoader(BatchPlan(found.datasets, 5), pixels, **options)
    return list(loader.batches(loader.plan.epoch(epoch)))


BUCKETS = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128}
BUCKETS |= {"bucket_reso_steps": 8}


@pytest.mark.parametrize(
    "view",
    [
        {},
        {"flip_aug": True},
        {"random_crop": True},
        {"face_crop_aug_range": "1.5,3"},
        {"face_crop_aug_range": "1.5,3", "random_crop": True, "flip_aug": True},
        BUCKETS,
        BUCKETS | {"random_crop": True, "flip_aug": True},
        {"resize_interpolation": "nearest"},
    ],
)
@pytest.mark.parametrize("source", ["plain", "alpha"])
def test_a_mask_is_seen_exactly_as_its_image(
    twins: Path, make_scan: MakeScan, view: dict[str, Any], source: str
) -> None:
    masks = (
        {"alpha_mask": True}
        if source == "alpha"
        else {"masked_loss": True, "conditioning_data_dir": twins / "masks"}
    )
    found = make_scan(train_data_dir=twins / source, resolution=48, **view, **masks)
    assert found.problems == ()
    for batch in loaded(found):
        assert batch.masks is not None
        assert batch.pixels is not None
        torch.testing.assert_close(batch.masks * 2 - 1, batch.pixels[:, :1])


def test_masks_may_lie_in_a_folder_for_each_image_folder(twins: Path, make_scan: MakeScan) -> None:
    (twins / "parent").mkdir()
    (twins / "masks").rename(twins / "parent" / "2_cat")
    found = make_scan(
        train_data_dir=twins / "plain",
        masked_loss=True,
        conditioning_data_dir=twins / "parent",
    )
    assert all(image.mask is not None for image in found.datasets[0].images)


def test_images_without_a_mask_count_whole_beside_those_that_have_one(
    twins: Path, make_scan: MakeScan
) -> None:
    config = twins / "data.toml"
    config.write_text(
        """
        [[datasets]]
        batch_size = 6
        [[datasets.subsets]]
        image_dir = "plain/2_cat"
        conditioning_data_dir = "masks"
        [[datasets.subsets]]
        image_dir = "alpha/2_cat"
        """,
        encoding="utf-8",
    )
    (batch,) = loaded(make_scan(dataset_config=config, resolution=48, masked_loss=True))
    assert batch.masks is not None
    whole = [
        key for key, mask in zip(batch.keys, batch.masks, strict=True) if bool(mask.eq(1).all())
    ]
    assert len(whole) == 3
    (without,) = loaded(make_scan(train_data_dir=twins / "plain", train_batch_size=6))
    assert without.masks is None


def test_cached_masks_are_the_means_over_each_latent(twins: Path, make_scan: MakeScan) -> None:
    found = make_scan(
        train_data_dir=twins / "plain",
        masked_loss=True,
        conditioning_data_dir=twins / "masks",
        flip_aug=True,
        resolution=48,
    )
    cache = LatentCache(found.datasets)
    cache.fill(
        PixelLoader(found.datasets, num_workers=0),
        lambda images: images[:, :, ::8, ::8],
        batch_size=2,
        progress=lambda *_: None,
    )
    plain, cached = loaded(found), loaded(found, latents=cache)
    for first, second in zip(plain, cached, strict=True):
        assert first.masks is not None
        assert second.masks is not None
        by_hand = first.masks.reshape(-1, 1, 6, 8, 6, 8).mean(dim=(3, 5))
        torch.testing.assert_close(second.masks, by_hand)
        assert torch.equal(shrunk_masks(first.masks, (6, 6)), second.masks)


def test_the_masked_loss_is_the_mean_of_error_times_mask_or_over_the_masked_area() -> None:
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(3, 4, 6, 5, generator=generator)
    fine = torch.rand(3, 1, 48, 40, generator=generator)
    fine[1] = 0.0
    fine[2] = 1.0
    coarse = fine.numpy().reshape(3, 1, 6, 8, 5, 8).mean(axis=(3, 5))
    weighted = (error.numpy() * coarse).sum(axis=(1, 2, 3))
    plain = masked_mean(error, fine, normalize=False)
    np.testing.assert_allclose(plain.numpy(), weighted / (4 * 6 * 5), rtol=1e-5)
    normalized = masked_mean(error, fine, normalize=True)
    area = 4 * coarse.sum(axis=(1, 2, 3))
    np.testing.assert_allclose(
        normalized[[0, 2]].numpy(), (weighted / np.where(area, area, 1))[[0, 2]], rtol=1e-5
    )
    assert normalized[1] == 0
    torch.testing.assert_close(plain[2], error[2].mean())


def faults(**options: Any) -> list[str]:
    _, problems, _ = resolve_datasets(
        DatasetOptions(resolution=(64, 64), **options), lambda name: f"--{name}"
    )
    return [str(problem) for problem in problems]


def test_options_of_masks_without_effect_are_refused(twins: Path) -> None:
    images, masks = {"train_data_dir": twins / "plain"}, {"conditioning_data_dir": twins / "masks"}
    (fault,) = faults(**images, **masks)
    assert fault.startswith("--conditioning_data_dir: has no effect without masked_loss")
    (fault,) = faults(**images, masked_loss=True)
    assert fault.startswith("--masked_loss: has no effect: no subset has masks")
    (fault,) = faults(**images, masked_loss_normalize=True)
    assert fault.startswith("--masked_loss_normalize: has no effect")
    (fault,) = faults(**images, **masks, masked_loss=True, alpha_mask=True)
    assert fault.startswith("--alpha_mask: the masks of")
    (fault,) = faults(**images, conditioning_data_dir=twins / "mask", masked_loss=True)
    assert "did you mean" in fault


def test_17_masks_that_are_missing_of_another_size_or_in_colour(
    twins: Path, make_scan: MakeScan
) -> None:
    masks = twins / "masks"
    first, second, third = sorted(masks.iterdir())
    first.unlink()
    grey_noise((32, 32), 1).save(second)
    grey_noise((61, 130), 2).convert("RGB").save(third)
    grey_noise((8, 8), 3).save(masks / "stray.png")
    options: dict[str, Any] = {"masked_loss": True, "conditioning_data_dir": masks}
    found = make_scan(train_data_dir=twins / "plain", **options)
    (problem,) = found.problems
    assert problem.place == "--conditioning_data_dir"
    assert f"1 of 3 images in {twins / 'plain' / '2_cat'} have no mask" in problem.message
    told = "\n".join(found.warnings)
    assert f"a mask of another size than its image, resized: {second}" in told
    assert f"a mask in colour, its red channel counts: {third}" in told
    assert f"mask without an image, left out: {masks / 'stray.png'}" in told


def test_a_mask_that_is_no_image_is_a_problem(twins: Path, make_scan: MakeScan) -> None:
    bad = sorted((twins / "masks").iterdir())[0]
    bad.write_text("<html>")
    found = make_scan(
        train_data_dir=twins / "plain", masked_loss=True, conditioning_data_dir=twins / "masks"
    )
    (problem,) = found.problems
    assert problem.place == str(bad)
    assert "not an image" in problem.message
