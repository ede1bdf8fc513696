"""The plan of an epoch, and the batches that come of it, with and without caches and workers."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pytest
import torch

from sdxl_train.data.batches import Batch, BatchPlan, BatchSpec
from sdxl_train.data.cache import LatentCache, TextCache
from sdxl_train.data.images import fit_image, load_image
from sdxl_train.data.loader import BatchLoader, PixelLoader
from sdxl_train.errors import TrainingError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.data.sources import Scan
    from tests.core.data.conftest import MakeImage, MakeScan

BUCKETS = {
    "enable_bucket": True,
    "min_bucket_reso": 32,
    "max_bucket_reso": 128,
    "bucket_reso_steps": 8,
}
# Python 3.12 and later warn of fork in a process that has threads; torch always has some.
FORK = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path, make_image: MakeImage) -> Path:
    """Seven images of three shapes, with 2 and 3 repeats, and one regularization image."""
    shapes = [(64, 64), (100, 50), (50, 100), (65, 64)]
    for number in range(5):
        make_image(
            tmp_path / "train" / "2_cat" / f"{number}.png",
            shapes[number % 4],
            caption=f"cat, tag {number}, x, y",
        )
    for number in range(2):
        make_image(tmp_path / "train" / "3_dog" / f"{number}.png", shapes[number])
    make_image(tmp_path / "reg" / "1_cat" / "r.png", (64, 64))
    return tmp_path


def scanned(folder: Path, make_scan: MakeScan, **options: Any) -> Scan:
    found = make_scan(train_data_dir=folder / "train", **BUCKETS | options)
    assert found.problems == ()
    return found


class MakeLoader(Protocol):
    def __call__(
        self, found: Scan, *, seed: int = 1, workers: int = 0, **parts: Any
    ) -> BatchLoader: ...


@pytest.fixture
def loader() -> Iterator[MakeLoader]:
    opened = []

    def make(found: Scan, *, seed: int = 1, workers: int = 0, **parts: Any) -> BatchLoader:
        pixels = PixelLoader(found.datasets, num_workers=workers, persistent_workers=workers > 0)
        opened.append(pixels)
        return BatchLoader(BatchPlan(found.datasets, seed), pixels, **parts)

    yield make
    for pixels in opened:
        pixels.close()


def encode_images(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, 8)


def encode_text(captions: Sequence[str]) -> dict[str, Tensor]:
    values = torch.tensor(
        [[float(len(caption)), float(sum(caption.encode()))] for caption in captions]
    )
    return {"hidden": values[:, None].repeat(1, 3, 1), "pooled": values}


def ignore(done: int, total: int) -> None:
    pass


def test_every_sample_comes_exactly_once_an_epoch(folder: Path, make_scan: MakeScan) -> None:
    found = scanned(folder, make_scan, train_batch_size=3)
    plan = BatchPlan(found.datasets, 7)
    for epoch in (1, 2, 3):
        batches = plan.epoch(epoch)
        samples = Counter((s.image, s.repeat) for batch in batches for s in batch.samples)
        images = found.datasets[0].images
        expected = {(i, n) for i, image in enumerate(images) for n in range(image.repeats)}
        assert set(samples) == expected
        assert set(samples.values()) == {1}
        assert len(batches) == plan.batches_per_epoch
        assert {batch.epoch for batch in batches} == {epoch}


def test_batches_hold_one_bucket_and_only_its_last_is_smaller(
    folder: Path, make_scan: MakeScan
) -> None:
    found = scanned(folder, make_scan, train_batch_size=3)
    images = found.datasets[0].images
    sizes: dict[tuple[int, int], list[int]] = {}
    for batch in BatchPlan(found.datasets, 7).epoch(1):
        assert {images[s.image].fit.bucket for s in batch.samples} == {batch.bucket}
        sizes.setdefault(batch.bucket, []).append(len(batch.samples))
    totals = Counter[tuple[int, int]]()
    for image in images:
        totals[image.fit.bucket] += image.repeats
    assert len(totals) > 2
    for bucket, total in totals.items():
        rest = [total % 3] if total % 3 else []
        assert sorted(sizes[bucket], reverse=True) == [3] * (total // 3) + rest


def test_the_order_depends_on_seed_and_epoch_alone(folder: Path, make_scan: MakeScan) -> None:
    found = scanned(folder, make_scan, flip_aug=True)
    plan = BatchPlan(found.datasets, 7)
    third = plan.epoch(3)
    assert BatchPlan(found.datasets, 7).epoch(3) == third
    assert plan.epoch(4) != third
    assert BatchPlan(found.datasets, 8).epoch(3) != third
    first_images = {plan.epoch(epoch)[0].samples[0].image for epoch in range(1, 30)}
    assert len(first_images) > 4


def test_specifications_can_be_pickled(folder: Path, make_scan: MakeScan) -> None:
    for spec in BatchPlan(scanned(folder, make_scan).datasets, 7).epoch(1):
        assert pickle.loads(pickle.dumps(spec)) == spec


def test_half_of_the_samples_are_mirrored(folder: Path, make_scan: MakeScan) -> None:
    found = scanned(folder, make_scan, flip_aug=True)
    plan = BatchPlan(found.datasets, 7)
    flips = [s.flipped for e in range(1, 60) for b in plan.epoch(e) for s in b.samples]
    assert 0.4 < sum(flips) / len(flips) < 0.6
    plain = BatchPlan(scanned(folder, make_scan).datasets, 7)
    assert not any(s.flipped for b in plain.epoch(1) for s in b.samples)


def test_several_datasets_are_mixed_with_their_own_batch_sizes(
    folder: Path, make_scan: MakeScan, tmp_path: Path
) -> None:
    config = tmp_path / "data.toml"
    config.write_text(
        "".join(
            f"[[datasets]]\nresolution = {size}\nbatch_size = {batch}\n"
            f"[[datasets.subsets]]\nimage_dir = '{folder / 'train' / '2_cat'}'\nnum_repeats = 4\n"
            for size, batch in ((64, 2), (96, 4))
        ),
        encoding="utf-8",
    )
    plan = BatchPlan(make_scan(dataset_config=config).datasets, 7)
    batches = plan.epoch(1)
    assert [sum(b.dataset == n for b in batches) for n in (0, 1)] == [10, 5]
    assert {(b.dataset, b.bucket, len(b.samples)) for b in batches} == {
        (0, (64, 64), 2),
        (1, (96, 96), 4),
    }
    order = [b.dataset for b in batches]
    assert order not in (sorted(order), sorted(order, reverse=True))


def test_a_batch_holds_what_its_fields_promise(
    folder: Path, make_scan: MakeScan, loader: MakeLoader
) -> None:
    found = scanned(
        folder,
        make_scan,
        reg_data_dir=folder / "reg",
        train_batch_size=2,
        flip_aug=True,
        prior_loss_weight=0.25,
    )
    images = {image.key: image for image in found.datasets[0].images}
    seen = 0
    loads = loader(found, prior_loss_weight=0.25)
    specs = loads.plan.epoch(1)
    for spec, batch in zip(specs, loads.batches(specs), strict=True):
        assert batch.pixels is not None
        assert batch.latents is None
        assert batch.text is None
        width, height = spec.bucket
        assert batch.pixels.shape == (len(batch), 3, height, width)
        assert batch.pixels.dtype == torch.float32
        assert batch.original_size.dtype == torch.int64
        for index, (key, sample) in enumerate(zip(batch.keys, spec.samples, strict=True)):
            image = images[key]
            pixels = fit_image(load_image(image.path), image.fit).astype(np.float64)
            left = image.fit.crop[0]
            if sample.flipped:
                pixels = pixels[:, ::-1]
                left = image.fit.resized[0] - width - left
            expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1
            torch.testing.assert_close(batch.pixels[index].double(), expected, atol=1e-6, rtol=0)
            assert batch.original_size[index].tolist() == [image.size[1], image.size[0]]
            assert batch.crop_top_left[index].tolist() == [image.fit.crop[1], left]
            assert batch.target_size[index].tolist() == [height, width]
            assert batch.loss_weights[index].item() == (0.25 if image.is_reg else 1.0)
            assert batch.captions[index] == image.caption
            seen += 1
    assert seen == 2 * (5 * 2 + 2 * 3)


def equal(first: Batch, second: Batch) -> bool:
    tensors = ("original_size", "crop_top_left", "target_size", "loss_weights", "pixels")
    same = all(
        torch.equal(a, b) if a is not None and b is not None else a is b
        for a, b in ((getattr(first, name), getattr(second, name)) for name in tensors)
    )
    return same and first.captions == second.captions and first.keys == second.keys


RANDOM = {
    "flip_aug": True,
    "shuffle_caption": True,
    "caption_dropout_rate": 0.2,
    "caption_tag_dropout_rate": 0.3,
    "train_batch_size": 2,
}


@FORK
def test_worker_processes_change_nothing(
    folder: Path, make_scan: MakeScan, loader: MakeLoader
) -> None:
    found = scanned(folder, make_scan, **RANDOM)
    alone, helped = loader(found), loader(found, workers=2)
    for epoch in (1, 2):
        specs = alone.plan.epoch(epoch)
        pairs = zip(alone.batches(specs), helped.batches(specs), strict=True)
        assert all(equal(first, second) for first, second in pairs)


@FORK
def test_an_epoch_can_be_left_and_resumed_anywhere(
    folder: Path, make_scan: MakeScan, loader: MakeLoader
) -> None:
    found = scanned(folder, make_scan, **RANDOM)
    specs = loader(found).plan.epoch(2)
    whole = list(loader(found).batches(specs))
    resumed = loader(found, workers=1)
    next(iter(resumed.batches(specs)))
    rest = list(resumed.batches(specs[3:]))
    assert len(rest) == len(whole) - 3
    assert all(equal(a, b) for a, b in zip(rest, whole[3:], strict=True))


def test_captions_of_a_sample_change_from_epoch_to_epoch(folder: Path, make_scan: MakeScan) -> None:
    plan = BatchPlan(scanned(folder, make_scan, shuffle_caption=True, keep_tokens=1).datasets, 3)
    seen = set()
    for epoch in range(1, 20):
        for spec in plan.epoch(epoch):
            for sample, caption in zip(spec.samples, plan.captions(spec), strict=True):
                if (sample.image, sample.repeat) == (0, 0):
                    seen.add(caption)
                    assert caption.startswith("cat, ")
    assert len(seen) == 6


def test_cached_batches_equal_uncached_ones(
    folder: Path, make_scan: MakeScan, loader: MakeLoader
) -> None:
    options = {"flip_aug": True, "caption_dropout_rate": 0.3, "caption_prefix": "P,"}
    found = scanned(folder, make_scan, train_batch_size=2, **options)
    plain = loader(found)
    latents, text = LatentCache(found.datasets), TextCache(found.datasets)
    told: list[tuple[int, int]] = []
    latents.fill(
        plain.pixels, encode_images, batch_size=3, progress=lambda *done: told.append(done)
    )
    assert told[-1] == (14, 14)  # seven images, plain and mirrored
    assert "" in text.captions
    text.fill(encode_text, batch_size=2, progress=ignore)
    cached = loader(found, latents=latents, text=text)
    dropped = 0
    for epoch in (1, 2):
        specs = plain.plan.epoch(epoch)
        for first, second in zip(plain.batches(specs), cached.batches(specs), strict=True):
            assert second.pixels is None
            assert second.latents is not None
            assert second.text is not None
            assert first.pixels is not None
            torch.testing.assert_close(second.latents, encode_images(first.pixels))
            assert first.captions == second.captions
            for name, tensor in encode_text(first.captions).items():
                assert torch.equal(second.text[name], tensor)
            assert torch.equal(first.crop_top_left, second.crop_top_left)
            dropped += first.captions.count("")
    assert dropped > 0


def test_the_empty_caption_is_cached_only_where_captions_drop(
    folder: Path, make_scan: MakeScan
) -> None:
    captions = TextCache(scanned(folder, make_scan).datasets).captions
    assert captions == (*(f"cat, tag {n}, x, y" for n in range(5)), "dog")


def test_latents_that_are_not_finite_name_the_image(
    folder: Path, make_scan: MakeScan, loader: MakeLoader
) -> None:
    found = scanned(folder, make_scan)

    def overflow(images: Tensor) -> Tensor:
        return encode_images(images) / 0.0

    with pytest.raises(UserError, match=r"0\.png: its latents are not finite"):
        LatentCache(found.datasets).fill(
            loader(found).pixels, overflow, batch_size=1, progress=ignore
        )


@FORK
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_during_the_run_is_named(
    folder: Path, make_scan: MakeScan, loader: MakeLoader, workers: int
) -> None:
    found = scanned(folder, make_scan)
    victim = found.datasets[0].images[2].path
    victim.write_bytes(victim.read_bytes()[:60])
    loads = loader(found, workers=workers)
    with pytest.raises(TrainingError) as error:
        list(loads.batches(loads.plan.epoch(1)))
    assert str(error.value).startswith(f"{victim}: is damaged")


def test_an_image_that_changes_size_during_the_run_is_named(
    folder: Path, make_scan: MakeScan, make_image: MakeImage, loader: MakeLoader
) -> None:
    found = scanned(folder, make_scan)
    victim = make_image(found.datasets[0].images[0].path, (80, 64))
    loads = loader(found)
    with pytest.raises(TrainingError, match="80x64 instead of 64x64") as error:
        list(loads.batches(loads.plan.epoch(1)))
    assert str(error.value).startswith(str(victim))


@FORK
def test_loading_leaves_the_global_generators_alone(
    folder: Path, make_scan: MakeScan, loader: MakeLoader
) -> None:
    found = scanned(folder, make_scan, **RANDOM)
    before = (torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state()))
    for workers in (0, 1):
        loads = loader(found, workers=workers)
        list(loads.batches(loads.plan.epoch(1)))
    after = (torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state()))
    assert after == before


def test_to_moves_every_tensor(folder: Path, make_scan: MakeScan, loader: MakeLoader) -> None:
    found = scanned(folder, make_scan)
    text = TextCache(found.datasets)
    text.fill(encode_text, batch_size=4, progress=ignore)
    loads = loader(found, text=text)
    (batch,) = loads.batches(loads.plan.epoch(1)[:1])
    moved = batch.to(torch.device("meta"))
    assert moved.pixels is not None
    assert moved.text is not None
    tensors = [moved.pixels, moved.original_size, moved.crop_top_left, moved.target_size]
    tensors += [moved.loss_weights, *moved.text.values()]
    assert {str(tensor.device) for tensor in tensors} == {"meta"}
    assert (moved.keys, moved.captions, moved.latents) == (batch.keys, batch.captions, None)


def test_batch_specifications_of_one_epoch_are_hashable(folder: Path, make_scan: MakeScan) -> None:
    specs: list[BatchSpec] = BatchPlan(scanned(folder, make_scan).datasets, 1).epoch(1)
    assert len(set(specs)) == len(specs)


def test_tags_warm_up_by_optimizer_steps(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    for number in range(5):
        make_image(tmp_path / "1_cat" / f"{number}.png", caption="a,b,c,d")
    found = make_scan(train_data_dir=tmp_path, token_warmup_step=0.75)
    plan = BatchPlan(found.datasets, 7, accumulation=2, total_steps=8)
    specs = [spec for epoch in (1, 2, 3) for spec in plan.epoch(epoch)]
    # Five batches make three steps, the last of one batch.
    steps = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8]
    assert [spec.step for spec in specs] == steps
    # Full after 0.75 * 8 = 6 steps: 1 + floor(step * 3 / 6) tags before.
    lengths = [len(plan.captions(spec)[0].split(",")) for spec in specs]
    assert lengths == [min(1 + step // 2, 4) for step in steps]
