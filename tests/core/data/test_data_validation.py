"""Held-out images: a partition that is disjoint, steady and counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sdxl_train.data.batches import BatchPlan
from sdxl_train.data.dataset_config import DatasetOptions, resolve_datasets
from sdxl_train.data.report import dataset_report
from sdxl_train.data.sources import Scan, scan

if TYPE_CHECKING:
    from pathlib import Path

    from tests.core.data.conftest import MakeImage, MakeScan


def names(side: tuple[object, ...]) -> set[str]:
    return {image.path.name for dataset in side for image in dataset.images}  # type: ignore[attr-defined]


@pytest.fixture
def folder(tmp_path: Path, make_image: MakeImage) -> Path:
    for number in range(10):
        make_image(tmp_path / "images" / "3_cat" / f"{number}.png", caption=f"cat {number}")
    return tmp_path / "images"


@pytest.mark.parametrize(("share", "held"), [(0.1, 1), (0.3, 3), (0.25, 2), (0.99, 10), (1.0, 10)])
def test_both_sides_make_the_whole_and_have_nothing_in_common(
    folder: Path, share: float, held: int
) -> None:
    configs, problems, _ = resolve_datasets(
        DatasetOptions(train_data_dir=folder, resolution=64, validation_split=share),
        lambda name: f"--{name}",
    )
    assert problems == []
    found = scan(configs, bucket_multiple=8, place=lambda name: f"--{name}")
    assert len(names(found.validation)) == held
    assert not names(found.validation) & names(found.datasets)
    if held == 10:
        (problem,) = found.problems
        assert problem.place == "--validation_split"
        assert "holds out every image" in problem.message
    else:
        assert len(names(found.datasets)) == 10 - held


def test_another_seed_holds_out_others_and_the_same_seed_the_same(
    folder: Path, make_scan: MakeScan
) -> None:
    def held(seed: int) -> set[str]:
        found = make_scan(train_data_dir=folder, validation_split=0.3, validation_seed=seed)
        return names(found.validation)

    assert held(1) == held(1)
    assert len({frozenset(held(seed)) for seed in range(8)}) > 4


def test_what_is_held_out_does_not_depend_on_place_or_on_new_images_much(
    folder: Path, make_scan: MakeScan, make_image: MakeImage
) -> None:
    before = names(make_scan(train_data_dir=folder, validation_split=0.3).validation)
    moved = folder.rename(folder.with_name("elsewhere"))
    assert names(make_scan(train_data_dir=moved, validation_split=0.3).validation) == before
    make_image(moved / "3_cat" / "new.png")
    after = names(make_scan(train_data_dir=moved, validation_split=0.3).validation)
    assert len(before & after) >= 2


def test_held_out_images_count_once_and_are_not_augmented(
    folder: Path, make_scan: MakeScan
) -> None:
    found = make_scan(
        train_data_dir=folder,
        validation_split=0.5,
        shuffle_caption=True,
        caption_dropout_rate=1.0,
        caption_prefix="photo,",
        flip_aug=True,
        train_batch_size=2,
    )
    plan = BatchPlan(found.validation, 0)
    assert plan.batches_per_epoch == 3
    batches = plan.epoch(1)
    assert batches == plan.epoch(1)
    samples = [sample for batch in batches for sample in batch.samples]
    assert sorted(sample.image for sample in samples) == [0, 1, 2, 3, 4]
    assert not any(sample.flipped for sample in samples)
    captions = {caption for batch in batches for caption in plan.captions(batch)}
    assert captions == {f"photo, {image.caption}" for image in found.validation[0].images}
    assert dataset_report(found)["validation"] == 5
    assert dataset_report(found)["repeats"] == 15


def test_regularization_images_are_not_held_out_and_match_what_is_trained(
    folder: Path, tmp_path: Path, make_scan: MakeScan, make_image: MakeImage
) -> None:
    for number in range(4):
        make_image(tmp_path / "reg" / "1_animal" / f"{number}.png")
    found = make_scan(train_data_dir=folder, reg_data_dir=tmp_path / "reg", validation_split=0.5)
    assert dataset_report(found)["regularization"] == 4
    images = found.datasets[0].images
    assert sum(i.repeats for i in images if i.is_reg) == 15  # 5 images, 3 times
    assert not any(image.is_reg for image in found.validation[0].images)


def file_scan(path: Path, text: str) -> Scan:
    path.write_text(text, encoding="utf-8")
    configs, problems, _ = resolve_datasets(
        DatasetOptions(dataset_config=path, resolution=(64, 64)), lambda name: f"--{name}"
    )
    assert problems == []
    return scan(configs, bucket_multiple=8, place=lambda name: f"--{name}")


def test_an_image_held_out_by_one_dataset_is_trained_by_none(folder: Path) -> None:
    found = file_scan(
        folder / "data.toml",
        """
        [[datasets]]
        resolution = 64
        validation_split = 0.4
        [[datasets.subsets]]
        image_dir = "3_cat"
        [[datasets]]
        resolution = 32
        [[datasets.subsets]]
        image_dir = "3_cat"
        """,
    )
    assert len(found.validation) == 1
    held = names(found.validation)
    assert len(held) == 4
    assert [len(dataset.images) for dataset in found.datasets] == [6, 6]
    assert not held & names(found.datasets)


def test_a_dataset_of_its_own_can_be_held_out_whole(folder: Path, make_image: MakeImage) -> None:
    make_image(folder / "held" / "a.png")
    found = file_scan(
        folder / "data.toml",
        """
        [[datasets]]
        [[datasets.subsets]]
        image_dir = "3_cat"
        [[datasets]]
        validation_split = 1
        [[datasets.subsets]]
        image_dir = "held"
        """,
    )
    assert found.problems == ()
    assert names(found.validation) == {"a.png"}
    assert len(found.datasets) == 1


def test_a_share_that_holds_out_nothing_is_told(folder: Path, make_scan: MakeScan) -> None:
    found = make_scan(train_data_dir=folder, validation_split=0.01)
    assert found.validation == ()
    assert "--validation_split: 0.01 of 10 images holds out none" in found.warnings
