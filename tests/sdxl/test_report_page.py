"""The page of a run: whole, small, safe against what captions hold, and usable in a browser."""

from __future__ import annotations

import copy
import random
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from sdxl_lora_plugins.commands.compare import Compare, read_run
from sdxl_lora_plugins.model import SDXL
from sdxl_lora_plugins.observers.flops import PASSES, forward_flops, peak_of
from sdxl_lora_plugins.observers.norms import block_norms
from sdxl_lora_plugins.report.curves import smoothed, thinned
from sdxl_lora_plugins.report.page import ShownRun, page
from sdxl_lora_plugins.report.pictures import BUDGET_BYTES, Pictures, sample_grid
from sdxl_train import History, Pace, StepResult, UserError
from sdxl_train import document as run_document

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'
"""What a caption, a prompt or a file's name may hold."""
STEPS = 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "sample").mkdir()
    noise = random.Random(0)
    for step in range(60):
        pixels = noise.randbytes(64 * 64 * 3)
        image = Image.frombytes("RGB", (64, 64), pixels).resize((512, 512))
        image.save(folder / "sample" / f"{step}.png", compress_level=1)
    Image.new("RGB", (32, 32), "teal").save(folder / "cat.png")
    return folder


@pytest.fixture(scope="module")
def document(folder: Path) -> dict[str, Any]:
    """The record of a run of 10,000 steps, on two images with hostile names."""
    images = [f"cats/{HOSTILE}.png", "cats/cat.png"]
    history = History(images, steps_per_epoch=10)
    noise = random.Random(1)
    for step in range(1, STEPS + 1):
        history.add(
            StepResult(
                step=step,
                epoch=1,
                loss=torch.tensor(noise.random() + 100 / (step + 100)),
                grad_norm=torch.tensor(noise.random()),
                learning_rates={"unet": 1e-4, "textencoder": 1e-5},
                keys=tuple(images),
                timesteps=torch.tensor([noise.randrange(1000), noise.randrange(1000)]),
                sample_losses=torch.tensor([2.0, 1.0]),
            ),
            0.5,
        )
    history.read()
    request = {
        "prompt": HOSTILE, "negative_prompt": "", "width": 512, "height": 512, "steps": 30,
        "guidance_scale": 7.5, "seed": 1, "sampler": "ddim", "multiplier": 1.0,
    }  # fmt: skip
    return {
        "schema_version": run_document.SCHEMA_VERSION,
        **run_document.software(),
        "name": "cat",
        "plugins": [],
        "command": ["sdxl-train", "--output_name", "a cat"],
        "options": {
            "learning_rate": {"value": 1e-4, "origin": "command line"},
            "training_comment": {"value": HOSTILE, "origin": "run.toml:3"},
            "seed": {"value": None, "origin": "default"},
        },
        "steps": {"optimizer_steps": STEPS},
        "machine": run_document.machine(torch.device("cpu")),
        "plan": {
            "dataset": {
                "images": 2, "repeats": 2, "with_caption": 2, "regularization": 0, "validation": 1,
                "buckets": [{"resolution": [64, 64], "images": 2}],
                "skipped": [{"path": f"cats/{HOSTILE}.txt", "reason": "no image"}],
            },
            "modules": {"unet": {"modules": 1, "parameters": 1234}},
        },
        "warnings": [HOSTILE],
        "history": history.as_json(),
        "loss_by_timestep": history.loss_by_timestep(),
        "loss_by_image": run_document.with_paths(
            history.loss_by_image(), {"cats/cat.png": folder / "cat.png"}
        ),
        "speed": run_document.speed(history),
        "memory": run_document.peak_memory(torch.device("cpu")),
        "notes": {
            "samples": [
                {**request, "index": index, "step": 100 * step, "epoch": 1, "fault": None,
                 "path": f"sample/{2 * step + index}.png"}
                for step in range(30) for index in range(2)
            ],
            "weight_norms": {"steps": [0, 100], "blocks": {"te1": [0.0, 1.0]}, "why": None},
            "mfu": {
                "value": 0.25, "rate": 1e12, "peak": 4e12, "peak_of": "measured", "why": None,
            },
        },
        "results": {
            "status": "complete", "steps": STEPS, "skipped_steps": 3,
            "validations": [
                {"step": 100, "loss": 1.5, "losses": [1.0, 2.0], "timesteps": [200, 800]}
            ],
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def written(document: dict[str, Any], folder: Path) -> Path:
    path = folder / "cat.report.html"
    path.write_bytes(page([ShownRun(name="cat", document=document, folder=folder)], Pictures()))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """Open a page without a network; give it and what went wrong in it."""
    view = browser.new_context(offline=True, **options).new_page()
    wrong: list[str] = []
    view.on("pageerror", lambda error: wrong.append(str(error)))
    view.on("console", lambda said: wrong.extend([said.text] if said.type == "error" else []))
    view.on("request", lambda asked: wrong.extend(re.findall("^http.*", asked.url)))
    view.goto(path.as_uri())
    return view, wrong


def test_page_of_10000_steps_is_small_and_asks_for_nothing(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert len(text.encode()) < 5e6
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text) == []
    assert "@import" not in text
    assert "url(" not in text


def test_nothing_hostile_is_markup(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert "hacked" in text
    assert "<script>window" not in text
    assert "<img src=x" not in text


def test_steps_of_pictures_are_left_out_evenly_beyond_the_budget(
    document: dict[str, Any], folder: Path
) -> None:
    pictures = Pictures()
    samples = document["notes"]["samples"]
    whole = sample_grid(samples, folder, pictures, 10**9)
    assert len(whole["steps"]) == 30
    cut = sample_grid(samples, folder, pictures, 600_000)
    assert cut["left_out"] == 30 - len(cut["steps"]) > 0
    assert (cut["steps"][0], cut["steps"][-1]) == (0, 2900)
    size = sum(len(cell["picture"]) for prompt in cut["prompts"] for cell in prompt["cells"])
    assert size <= 600_000 < BUDGET_BYTES


def test_page_works_in_a_browser_by_keyboard(browser: Any, written: Path) -> None:
    view, wrong = opened(browser, written, color_scheme="light")
    assert view.locator(".chart canvas").count() == view.locator(".chart").count() >= 5
    slider = view.locator("input[type=range]")
    shown = view.locator(".stage > div:not([hidden]) img")
    before = [shown.nth(index).get_attribute("alt") for index in range(2)]
    slider.focus()
    view.keyboard.press("ArrowLeft")
    after = [shown.nth(index).get_attribute("alt") for index in range(2)]
    assert before != after
    assert all(shown.nth(i).evaluate("image => image.naturalWidth") == 384 for i in range(2))
    view.keyboard.press("Home")
    assert view.locator("[data-step]").text_content() == "0"
    details = view.locator("details", has_text="Numbers").first
    details.locator("summary").focus()
    view.keyboard.press("Enter")
    assert details.evaluate("one => one.open")
    assert view.evaluate("window.hacked") is None
    assert wrong == []


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_page_is_light_or_dark_as_the_reader_likes(
    browser: Any, written: Path, scheme: str, dark: bool
) -> None:
    view, wrong = opened(browser, written, color_scheme=scheme)
    red, green, blue = (
        int(part)
        for part in re.findall(
            r"\d+", view.evaluate("getComputedStyle(document.body).backgroundColor")
        )
    )
    assert (red + green + blue < 384) is dark
    assert wrong == []


def test_page_fits_a_phone(browser: Any, written: Path) -> None:
    view, wrong = opened(browser, written, viewport={"width": 375, "height": 700})
    assert view.evaluate("document.documentElement.scrollWidth") <= 375
    assert wrong == []


def test_runs_side_by_side(
    browser: Any, document: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    paths = []
    for name, rate in (("first", 1e-4), ("second", 5e-4)):
        one = copy.deepcopy(document)
        one["name"] = name
        one["options"]["learning_rate"]["value"] = rate
        path = folder / f"{name}.run.json"
        path.write_bytes(run_document.write_document(one))
        paths.append(path)
    output = tmp_path / "both.html"
    assert Compare(runs=paths, output=output).run() == 0
    view, wrong = opened(browser, output)
    assert wrong == []
    rows = view.locator("#options tbody tr")
    assert [rows.nth(i).inner_text().split() for i in range(rows.count())] == [
        ["learning_rate", "0.0001", "0.0005"]
    ]
    legend = view.locator("[data-chart=loss] .u-legend").inner_text()
    assert "first: smoothed" in legend
    assert "second: smoothed" in legend
    assert view.locator("input[type=range]").count() == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "is not JSON"), ("[]", "schema version"), ('{"schema_version": 1}', "version is 1")],
)
def test_what_is_no_record_is_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "x.run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        read_run(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_run(tmp_path / "gone.run.json")
    (tmp_path / "y.run.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="has 2 records"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="expected two or more"):
        Compare(runs=[path]).run()


def test_thin_curves_keep_their_spikes() -> None:
    values: list[float | None] = [0.0] * 5000
    values[1234], values[4321] = 9.0, -9.0
    steps, kept = thinned(range(5000), values, 100)
    assert len(kept) <= 100
    assert dict(zip(steps, kept, strict=True)).items() >= {1234: 9.0, 4321: -9.0}.items()


def test_smoothing_is_a_mean_that_starts_right() -> None:
    assert smoothed([3.0, 3.0, None, 3.0]) == pytest.approx([3.0] * 4)
    # Half of the weight is kept: (1 * .25 + 2 * .5) / .75.
    assert smoothed([1.0, 2.0])[1] == pytest.approx(5 / 3)


def test_norms_by_block_are_those_of_the_deltas() -> None:
    generator = torch.Generator().manual_seed(0)
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_{}"
    state, squares = {}, 0.0
    for layer in "qk":
        down = torch.randn(2, 640, generator=generator)
        up = torch.randn(640, 2, generator=generator)
        key = name.format(layer)
        state[f"{key}.lora_down.weight"] = down
        state[f"{key}.lora_up.weight"] = up
        state[f"{key}.alpha"] = torch.tensor(1.0)
        squares += float((up @ down / 2).square().sum())
    assert block_norms(state, SDXL) == pytest.approx({"input_blocks.4": squares**0.5})
    assert block_norms({"foreign.weight": torch.zeros(1)}, SDXL) == {}


@pytest.mark.parametrize(("width", "height"), [(8, 4), (12, 20), (9, 7)])
def test_operations_are_counted_as_torch_counts_a_real_pass(
    width: int, height: int, tmp_path: Path
) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from sdxl_lora_plugins.model import Sdxl

    path = Sdxl.write_tiny(tmp_path / "tiny")
    options = Sdxl(pretrained_model_name_or_path=str(path), max_token_length=150)
    model = options.build("cpu", torch.float32)
    size = torch.zeros(1, 2, dtype=torch.int64)
    condition = {
        **model.encode_text([""]), "original_size": size, "crop_top_left": size,
        "target_size": size,
    }  # fmt: skip
    # Fused attention on the CPU is not counted.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        model.predict(
            torch.zeros(1, 4, height, width), torch.zeros(1, dtype=torch.int64), condition
        )
    counted = forward_flops(model.denoiser, width, height, model.max_tokens + 2)
    assert counted == counter.get_total_flops() > 1e6


def test_peaks_are_those_of_data_sheets() -> None:
    assert PASSES == 2
    assert peak_of("NVIDIA H200") == peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of("Unknown") is None


def test_work_takes_no_more_than_its_share() -> None:
    now = [0.0]
    pace = Pace(seconds=30, share=0.01, clock=lambda: now[0])
    assert pace.is_due()
    with pace.at_work():
        now[0] += 2
    now[0] += 199
    assert not pace.is_due()
    now[0] += 1
    assert pace.is_due()
    assert pace.spent == 2
