"""Buckets against the figures of sd-scripts, and the refusal of options that cannot work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sdxl_train.data.buckets import (
    BucketOptions,
    SizeError,
    bucket_sizes,
    bucket_warnings,
    check_buckets,
    fit_to_nearest,
    fit_without_upscaling,
    fitter,
    rounded_limits,
)

if TYPE_CHECKING:
    from tests.core.data.conftest import ReadGolden


def options(minimum: int, maximum: int, steps: int, *, no_upscale: bool = False) -> BucketOptions:
    return BucketOptions(
        enable_bucket=True,
        min_bucket_reso=minimum,
        max_bucket_reso=maximum,
        bucket_reso_steps=steps,
        bucket_no_upscale=no_upscale,
    )


def place(name: str) -> str:
    return f"--{name}"


def problem_of(resolution: tuple[int, int], chosen: BucketOptions, multiple: int = 32) -> str:
    (problem,) = check_buckets(resolution, chosen, multiple=multiple, place=place)
    return f"{problem.place}: {problem.message} -> {problem.remedy}"


def test_every_image_gets_the_golden_bucket_size_and_crop(golden: ReadGolden) -> None:
    rows = 0
    for table in golden("buckets")["settings"]:
        setting = table["setting"]
        chosen = options(
            setting["min"], setting["max"], setting["steps"], no_upscale=setting["no_upscale"]
        )
        fit = fitter(tuple(setting["reso"]), chosen)
        for row in table["rows"]:
            found = fit(tuple(row["size"]))
            assert list(found.bucket) == row["bucket"]
            assert list(found.resized) == row["resized"]
            assert list(found.crop) == row["center_trim_xy"]
            assert found.aspect_error == pytest.approx(row["ar_error"], abs=1e-6)
            rows += 1
    assert rows == 600


def test_bucket_lists_equal_the_golden_ones(golden: ReadGolden) -> None:
    data = golden("buckets")
    for table in data["settings"]:
        setting = table["setting"]
        chosen = options(setting["min"], setting["max"], setting["steps"])
        sizes = [list(size) for size in bucket_sizes(tuple(setting["reso"]), chosen)]
        assert sizes == table["predefined"]
    for name, row in data["make_bucket_resolutions"].items():
        resolution, *limits = name.rsplit("-", 3)
        width, height = resolution.strip("()").split(", ")
        chosen = options(*map(int, limits))
        assert list(rounded_limits(chosen)) == row["adjusted"]
        sizes = [list(size) for size in bucket_sizes((int(width), int(height)), chosen)]
        assert sizes == row["resos"]


# The figures of the reference for bucket_no_upscale: image, step, bucket, resized, crop.
NO_UPSCALE = [
    ((640, 480), 64, (640, 448), (640, 480), (0, 16)),
    ((1000, 1000), 64, (960, 960), (1000, 1000), (20, 20)),
    ((512, 512), 32, (512, 512), (512, 512), (0, 0)),
    ((832, 1216), 32, (832, 1216), (832, 1216), (0, 0)),
    ((2000, 3000), 32, (832, 1248), (832, 1248), (0, 0)),
    ((3000, 2000), 32, (1248, 832), (1248, 832), (0, 0)),
    ((4000, 1000), 32, (2048, 512), (2048, 512), (0, 0)),
    ((5000, 1000), 32, (2240, 448), (2240, 448), (0, 0)),
    ((1023, 1025), 32, (992, 1024), (1023, 1025), (15, 0)),
    ((720, 1280), 32, (704, 1280), (720, 1280), (8, 0)),
    ((100, 4000), 32, (96, 4000), (100, 4000), (2, 0)),
]


@pytest.mark.parametrize(("image", "step", "bucket", "resized", "crop"), NO_UPSCALE)
def test_images_are_never_enlarged_with_no_upscale(
    image: tuple[int, int],
    step: int,
    bucket: tuple[int, int],
    resized: tuple[int, int],
    crop: tuple[int, int],
) -> None:
    fit = fit_without_upscaling(image, (1024, 1024), step)
    assert (fit.bucket, fit.resized, fit.crop) == (bucket, resized, crop)


@pytest.mark.parametrize("image", [(20, 400), (63, 5000), (100000, 20)])
def test_too_small_a_side_is_a_clear_error_with_no_upscale(image: tuple[int, int]) -> None:
    with pytest.raises(SizeError, match=r"is too small.*64 pixels"):
        fit_without_upscaling(image, (1024, 1024), 64)


def test_without_buckets_every_image_covers_the_resolution() -> None:
    fit = fitter((64, 96), BucketOptions())((100, 100))
    assert (fit.bucket, fit.resized, fit.crop) == ((64, 96), (96, 96), (16, 0))


def test_a_flipped_crop_is_measured_from_the_other_side() -> None:
    fit = fit_to_nearest((1023, 1000), [(992, 1024)])
    left, width = fit.crop[0], fit.resized[0]
    assert fit.crop_left(flipped=False) == left
    assert fit.crop_left(flipped=True) == width - left - 992


def test_a_step_that_the_model_forbids_names_the_nearest() -> None:
    text = problem_of((1024, 1024), options(256, 1024, 50))
    assert text == (
        "--bucket_reso_steps: 50 is not a multiple of 32, which this model needs -> use 64"
    )


def test_limits_that_exclude_the_resolution_name_legal_ones() -> None:
    too_long = problem_of((1536, 1536), options(256, 1024, 64))
    assert too_long.startswith("--max_bucket_reso: 1024 is less than")
    assert too_long.endswith("use at least 1536")
    too_short = problem_of((512, 512), options(640, 1024, 64))
    assert too_short.startswith("--min_bucket_reso: 640 is more than")
    assert too_short.endswith("use at most 512")
    below_step = problem_of((512, 512), options(32, 1024, 64))
    assert below_step.endswith("use at least 64")


def test_a_resolution_below_one_step_is_refused() -> None:
    text = problem_of((32, 32), options(32, 64, 64, no_upscale=True))
    assert text.startswith("--resolution: 32x32 is smaller than one step")


def test_without_buckets_the_resolution_itself_must_fit_the_model() -> None:
    text = problem_of((1000, 700), BucketOptions())
    assert text.endswith("use 992,704, or enable_bucket")
    assert check_buckets((1024, 768), BucketOptions(), multiple=32, place=place) == []


def test_limits_do_not_matter_with_no_upscale() -> None:
    chosen = options(256, 1024, 64, no_upscale=True)
    assert check_buckets((1536, 1536), chosen, multiple=32, place=place) == []


def warnings(chosen: BucketOptions, *given: str, resolution: int = 1024) -> str:
    found = bucket_warnings(
        (resolution, resolution),
        chosen,
        is_default=lambda name: name not in given,
        place=lambda name: f"--{name}",
    )
    return "\n".join(found)


def test_the_default_longest_side_is_warned_about_at_1024() -> None:
    assert "Set max_bucket_reso to 2048" in warnings(options(256, 1024, 64))
    assert warnings(options(256, 1024, 64), "max_bucket_reso") == ""
    assert warnings(options(256, 1024, 64), resolution=512) == ""


def test_rounded_limits_and_idle_options_are_said() -> None:
    text = warnings(options(250, 2000, 64), "min_bucket_reso", "max_bucket_reso")
    assert "--min_bucket_reso: 250 counts as 192" in text
    assert "--max_bucket_reso: 2000 counts as 2048" in text
    assert "no effect without enable_bucket" in warnings(BucketOptions(), "bucket_no_upscale")
    idle = warnings(options(256, 512, 64, no_upscale=True), "max_bucket_reso", "bucket_no_upscale")
    assert idle == "--max_bucket_reso: no effect with bucket_no_upscale"
