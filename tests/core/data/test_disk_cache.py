"""Encodings on the disk: used again only while they are what they should be."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import struct
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdxl_train.data import entry_file
from sdxl_train.data.cache import LatentCache, TextCache, latent_keys
from sdxl_train.data.disk_store import (
    DiskStore,
    check_unchanged,
    latent_entries,
    text_entries,
)
from sdxl_train.data.listing import CACHE_FOLDER
from sdxl_train.data.loader import PixelLoader
from sdxl_train.data.pruning import prune
from sdxl_train.data.scan_index import ScanIndex
from sdxl_train.errors import TrainingError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.data.cache import LatentKey
    from sdxl_train.data.sources import Scan
    from tests.core.data.conftest import MakeImage, MakeScan

NUM_IMAGES = 3


def encode(images: Tensor) -> Tensor:
    """Stand in for a VAE: shrink, and tell left from right."""
    return torch.nn.functional.avg_pool2d(images, 8) * 0.5


def encode_text(captions: Sequence[str]) -> dict[str, Tensor]:
    lengths = torch.tensor([float(len(caption)) for caption in captions])
    return {"context": lengths[:, None, None].expand(-1, 2, 3), "pooled": lengths[:, None]}


def ignore(done: int, total: int) -> None:
    """Ignore progress."""


@pytest.fixture
def folder(tmp_path: Path, make_image: MakeImage) -> Path:
    for number in range(NUM_IMAGES):
        make_image(tmp_path / "train" / "1_x" / f"{number}.png", caption=f"number {number}")
    return tmp_path / "train" / "1_x"


@pytest.fixture
def look(folder: Path, make_scan: MakeScan) -> Callable[..., Scan]:
    """Scan the folder."""

    def scan(**options: Any) -> Scan:
        return make_scan(train_data_dir=folder.parent, **options)

    return scan


def open_store(found: Scan, *, vae: str = "vae", check: bool = True) -> DiskStore[LatentKey]:
    keys = latent_keys(found.datasets)
    entries = latent_entries(found.datasets, keys, found.index, {"the VAE": vae})
    return DiskStore("latents", entries, found.index, check=check)


def fill(
    found: Scan,
    store: DiskStore[LatentKey],
    encoder: Callable[[Tensor], Tensor] = encode,
    check: Callable[[Path], None] = lambda _: None,
) -> int:
    """Fill the cache and give the number of images that were encoded."""
    encoded = 0

    def counted(images: Tensor) -> Tensor:
        nonlocal encoded
        encoded += len(images)
        return encoder(images)

    LatentCache(found.datasets, store).fill(
        PixelLoader(found.datasets, num_workers=0),
        counted,
        batch_size=2,
        progress=ignore,
        check=check,
    )
    return encoded


def files(folder: Path) -> list[Path]:
    return sorted((folder / CACHE_FOLDER).iterdir())


def test_a_second_run_reads_what_the_first_one_wrote(look: Callable[..., Scan]) -> None:
    first = look()
    store = open_store(first)
    assert fill(first, store) == NUM_IMAGES
    assert store.report() == "latents on disk: 3 built"

    again = look()
    second = open_store(again)
    assert fill(again, second) == 0
    assert second.report() == "latents on disk: 3 reused"
    for key in latent_keys(again.datasets):
        assert torch.equal(second.get(key)["latents"], store.get(key)["latents"])


def test_an_edited_image_is_encoded_anew_and_no_other(
    look: Callable[..., Scan], folder: Path
) -> None:
    fill(look(), open_store(look()))
    Image.new("RGB", (64, 64), "red").save(folder / "1.png")

    found = look()
    store = open_store(found)
    assert store.report() == "latents on disk: 1 rebuilt (the image changed), 2 reused"
    assert fill(found, store) == 1
    red = store.get((0, 1, False))["latents"]
    assert torch.allclose(red[:, 0, 0], torch.tensor([0.5, -0.5, -0.5]))


def test_what_else_shapes_the_latents_gives_the_reason(look: Callable[..., Scan]) -> None:
    fill(look(), open_store(look()))

    other_vae = open_store(look(), vae="another")
    assert other_vae.report() == "latents on disk: 3 rebuilt (the VAE changed)"
    smaller = open_store(look(resolution=32))
    assert smaller.report() == "latents on disk: 3 rebuilt (the resolution changed)"
    assert fill(look(resolution=32), smaller) == NUM_IMAGES
    assert open_store(look()).report() == "latents on disk: 3 reused"  # those of before remain


def test_an_edited_mask_and_another_way_to_resize_rebuild_what_they_touch(
    look: Callable[..., Scan], folder: Path, make_image: MakeImage
) -> None:
    masks = folder.parent.parent / "masks"
    for number in range(NUM_IMAGES):
        make_image(masks / f"{number}.png")
    masked = {"conditioning_data_dir": masks, "masked_loss": True}
    fill(look(**masked), open_store(look(**masked)))

    Image.new("L", (64, 64), 40).save(masks / "2.png")
    found = look(**masked)
    store = open_store(found)
    assert store.report() == "latents on disk: 1 rebuilt (the mask changed), 2 reused"
    fill(found, store)
    mask = store.get((0, 2, False))["mask"]
    assert torch.allclose(mask, torch.full_like(mask, 40 / 255))
    assert open_store(look()).report() == "latents on disk: 3 rebuilt (the mask changed)"
    nearest = open_store(look(**masked, resize_interpolation="nearest"))
    assert nearest.report() == "latents on disk: 3 rebuilt (the interpolation changed)"


def test_mirrored_latents_are_entries_of_their_own(look: Callable[..., Scan]) -> None:
    fill(look(), open_store(look()))

    found = look(flip_aug=True)
    store = open_store(found)
    assert store.report() == "latents on disk: 3 built, 3 reused"
    assert fill(found, store) == NUM_IMAGES
    assert not torch.equal(store.get((0, 0, True))["latents"], store.get((0, 0, False))["latents"])


def test_a_moved_or_renamed_dataset_keeps_no_foreign_latents(
    look: Callable[..., Scan], folder: Path
) -> None:
    fill(look(), open_store(look()))
    # The image trades its name; what is cached under it is another image's.
    (folder / "0.png").replace(folder / "spare")
    (folder / "1.png").replace(folder / "0.png")
    (folder / "spare").replace(folder / "1.png")

    assert open_store(look()).report() == (
        "latents on disk: 2 rebuilt (the image changed), 1 reused"
    )


class Explosive:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("was unpickled",)


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def of_a_later_version(path: Path) -> None:
    tensors = {"latents": torch.zeros(3, 8, 8)}
    metadata = {"slot": "latents-0-", "facts": json.dumps({"the format": "9"}), "crc32": "0"}
    save_file(tensors, path, metadata)


def not_finite(path: Path) -> None:
    """Write what the program itself would have written, were the latents NaN."""
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    body = {"latents": torch.full((3, 8, 8), float("nan"))}
    header["__metadata__"]["crc32"] = entry_file._checksum(body)
    save_file(body, path, header["__metadata__"])


# The numbers are those of the catalogue of bad inputs.
DAMAGES: dict[str, Callable[[Path], object]] = {
    "81 truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "81 empty": lambda path: path.write_bytes(b""),
    "81 a flipped bit": flip_last_bit,
    "84 a pickle": lambda path: path.write_bytes(pickle.dumps(Explosive())),
    "81 a huge header": lambda path: path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
    "82 another program's tensors": lambda path: save_file({"latents": torch.zeros(3, 8, 8)}, path),
    "82 another image's latents": lambda path: path.write_bytes(
        next(p for p in sorted(path.parent.iterdir()) if p != path).read_bytes()
    ),
    "89 a later version's": of_a_later_version,
    "85 not finite": not_finite,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_entry_is_made_anew_with_one_warning(
    damage: str, look: Callable[..., Scan], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = look()
    store = open_store(first)
    fill(first, store)
    whole = store.get((0, 0, False))["latents"]
    bad = store.entries[0, 0, False].path
    DAMAGES[damage](bad)
    with caplog.at_level(logging.WARNING):
        again = open_store(look())

    assert again.report() == "latents on disk: 1 rebuilt (damaged), 2 reused"
    (warning,) = [
        record
        for record in caplog.records
        if record.name.startswith("sdxl_train") and record.levelno == logging.WARNING
    ]
    assert str(bad) in warning.getMessage()
    assert fill(look(), again) == 1
    assert torch.equal(again.get((0, 0, False))["latents"], whole)


def test_what_was_found_sound_is_not_read_again_until_it_is_touched(
    look: Callable[..., Scan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(look(), open_store(look()))
    time.sleep(0.06)  # what was written just now is not remembered
    entries = open_store(look()).entries

    def start() -> str:
        index = ScanIndex(tmp_path / "home")
        store = DiskStore("latents", entries, index, check=True)
        index.save()
        return store.report()

    assert start() == "latents on disk: 3 reused"
    with monkeypatch.context() as patch:
        patch.setattr(entry_file.Entry, "read", lambda _: pytest.fail("was read again"))
        assert start() == "latents on disk: 3 reused"
    flip_last_bit(entries[0, 0, False].path)
    assert start() == "latents on disk: 1 rebuilt (damaged), 2 reused"


def test_an_entry_that_is_damaged_later_stops_the_run_and_is_made_anew_by_the_next(
    look: Callable[..., Scan],
) -> None:
    found = look()
    fill(found, open_store(found))
    store = open_store(found)
    flip_last_bit(store.entries[0, 0, False].path)
    with pytest.raises(TrainingError, match="checksum is wrong; start again, and it is made anew"):
        store.get((0, 0, False))
    assert open_store(found).report() == "latents on disk: 1 rebuilt (damaged), 2 reused"


def test_an_unchecked_bad_entry_stops_the_run_when_it_is_needed(
    look: Callable[..., Scan],
) -> None:
    fill(look(), open_store(look()))
    store = open_store(look(), check=False)
    flip_last_bit(store.entries[0, 0, False].path)
    assert fill(look(), store) == 0
    with pytest.raises(TrainingError, match="checksum is wrong; start again without --skip_cache"):
        store.get((0, 0, False))


def test_files_of_sd_scripts_are_left_alone(look: Callable[..., Scan], folder: Path) -> None:
    theirs = folder / "0_0064x0064_sdxl.npz"
    np.savez(theirs, latents=np.zeros((4, 8, 8), np.float32))
    before = theirs.read_bytes()

    assert fill(look(), open_store(look())) == NUM_IMAGES
    assert theirs.read_bytes() == before


def test_latents_that_are_not_finite_name_the_image_and_are_not_kept(
    look: Callable[..., Scan], folder: Path
) -> None:
    store = open_store(look())
    with pytest.raises(UserError, match=r"0\.png: its latents are not finite"):
        fill(look(), store, lambda images: encode(images) * float("nan"))
    assert not (folder / CACHE_FOLDER).exists()


@pytest.mark.parametrize(
    "number",
    [errno.ENOSPC, errno.EROFS, errno.EACCES],
    ids=["86 full", "86 read-only", "86 not permitted"],
)
def test_a_disk_that_takes_nothing_is_a_users_error_and_leaves_no_part(
    number: int, look: Callable[..., Scan], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(look())

    def refuse(*_: object) -> None:
        raise OSError(number, "no room")

    # The last step of writing, when all of the content is there under another name.
    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(UserError, match=rf"{CACHE_FOLDER}: the cache cannot be written: no room"):
        fill(look(), store)
    assert files(folder) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_file_that_cannot_be_finished_leaves_no_part(
    look: Callable[..., Scan], folder: Path
) -> None:
    import resource

    store = open_store(look())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(UserError, match="the cache cannot be written: File too large"):
            fill(look(), store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(folder) == []


def test_a_file_in_the_place_of_the_folder_is_a_users_error(
    look: Callable[..., Scan], folder: Path
) -> None:
    (folder / CACHE_FOLDER).write_text("mine")
    with pytest.raises(UserError, match="cannot be written: File exists"):
        fill(look(), open_store(look()))


def test_an_image_edited_while_it_is_encoded_is_not_kept_under_its_old_hash(
    look: Callable[..., Scan], folder: Path
) -> None:
    found = look()
    store = open_store(found)
    Image.new("RGB", (64, 64), "blue").save(folder / "0.png")
    with pytest.raises(TrainingError, match=r"0\.png: has changed since the start"):
        fill(found, store, check=lambda path: check_unchanged(found.index, path))


def test_two_runs_that_cache_one_folder_at_once_both_find_whole_entries(
    look: Callable[..., Scan],
) -> None:
    stores = open_store(look()), open_store(look())
    for store in stores:
        assert fill(look(), store) == NUM_IMAGES
    for store in stores:
        for key in latent_keys(look().datasets):
            store.get(key)
    assert open_store(look()).report() == "latents on disk: 3 reused"


def test_pruning_removes_what_nothing_uses_and_only_that(
    look: Callable[..., Scan], folder: Path
) -> None:
    """Catalogue 88: orphaned entries."""
    store = open_store(look())
    fill(look(), store)
    smaller = look(resolution=32)
    fill(smaller, open_store(smaller))
    kept = [entry.path for entry in store.entries.values()]
    bystanders = [
        folder / CACHE_FOLDER / name
        for name in ("mine.safetensors", f"text-{'0' * 16}-{'0' * 32}.safetensors", ".sdxl-train-1")
    ]
    unfinished = folder / CACHE_FOLDER / ".sdxl-train-2"
    for path in (*bystanders, unfinished):
        path.write_bytes(b"12345678")
    os.utime(unfinished, (0, 0))

    (told,) = prune(store.entries.values())
    assert files(folder) == sorted([*kept, *bystanders])
    assert str(told).startswith(f"{folder / CACHE_FOLDER}: 4 files removed (")
    assert str(told).endswith("KB), 3 in use")
    assert open_store(look()).report() == "latents on disk: 3 reused"


def text_store(found: Scan, encoders: str = "encoders") -> DiskStore[str]:
    entries = text_entries(found.datasets, {"the text encoders": encoders})
    return DiskStore("captions", entries, found.index, check=True)


def test_captions_are_kept_by_their_words_and_by_what_encodes_them(
    look: Callable[..., Scan], folder: Path
) -> None:
    found = look(caption_dropout_rate=0.5)
    store = text_store(found)
    text = TextCache(found.datasets, store)
    text.fill(encode_text, batch_size=2, progress=ignore)
    assert set(text.captions) == {"number 0", "number 1", "number 2", ""}
    assert text.text(["", "number 1"])["pooled"].tolist() == [[0.0], [8.0]]

    (folder / "1.txt").write_text("another number")
    again = look(caption_dropout_rate=0.5)
    assert text_store(again).report() == (
        "captions on disk: 1 rebuilt (the caption changed), 3 reused"
    )
    other = text_store(found, "others")
    assert other.report() == "captions on disk: 4 rebuilt (the text encoders changed)"


def test_a_caption_of_its_own_is_not_taken_for_a_changed_one(look: Callable[..., Scan]) -> None:
    plain = look()
    TextCache(plain.datasets, text_store(plain)).fill(encode_text, batch_size=9, progress=ignore)
    dropping = look(caption_dropout_rate=0.5)  # wants the empty caption as well
    assert text_store(dropping).report() == "captions on disk: 1 built, 3 reused"
    prefixed = look(caption_prefix="a photo of")
    assert text_store(prefixed).report() == "captions on disk: 3 rebuilt (the caption changed)"


def test_bfloat16_and_other_bytes_survive(look: Callable[..., Scan]) -> None:
    found = look()
    store = text_store(found)
    tensor = torch.tensor([0.1, -3.0, 1e30], dtype=torch.bfloat16)
    store.put("number 0", {"pooled": tensor, "same": tensor})
    read = store.get("number 0")
    assert read["pooled"].dtype == torch.bfloat16
    assert torch.equal(read["same"], tensor)
