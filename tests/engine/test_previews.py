"""Pictures during training: what is drawn, what they are called, what they say, and that they never end a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorasmith.engine import preview_sheet, previews
from lorasmith.engine.adapters import Adapter, attach_adapter
from lorasmith.engine.config import AdapterSettings, RunConfig
from lorasmith.engine.events import Event, Logged, PreviewReady
from lorasmith.engine.families import BaseIdentity, DrawSettings, Family, PictureRequest, families, identify_base
from lorasmith.engine.preview_sheet import build_run_sheet, build_sheet
from lorasmith.engine.previews import draw_previews, is_flat, preview_parameters, preview_prompts
from lorasmith.engine.sources import locate_base


def make_config(**values: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "knight"},
            "base": {"model": "owner/model"},
            "captions": {"trigger": "zqx"},
            "dataset": {"resolution": 64},
            "previews": {"steps": 2, "guidance": 2.0} | values,
        }
    )


class FakeFamily:
    """Draws noise of the wanted size; `fail` is called before each drawing."""

    def __init__(self, fail: Callable[[int], None] = lambda count: None, level: float | None = None) -> None:
        self.device = torch.device("cpu")
        self.noise_schedule = {"_class_name": "PNDMScheduler"}
        self.spec = families()["sd15"].SPEC
        self.identity = BaseIdentity("sd15", "fake", "1.x", "epsilon", 512, 1, "fp32", details={"draw_steps": 20})
        self.batches: list[list[tuple[str, str, int]]] = []
        self.settings: list[DrawSettings] = []
        self._fail, self._level = fail, level
        self.measures: list[str] = []

    def save_memory(self, measure: str) -> bool:
        self.measures.append(measure)
        return self.measures.count(measure) == 1

    def draw(
        self, requests: Sequence[PictureRequest], settings: DrawSettings, on_step: Callable[[int], None]
    ) -> list[Image.Image]:
        self._fail(len(requests))
        torch.rand(3)  # a pipeline may use the global random state
        self.batches.append([(str(r.positive["name"]), str(r.negative["name"]), r.seed) for r in requests])
        self.settings.append(settings)
        for step in range(settings.steps):
            on_step(step + 1)
        return [self._picture(request.seed, settings) for request in requests]

    def _picture(self, seed: int, settings: DrawSettings) -> Image.Image:
        values = np.random.default_rng(seed).integers(0, 256, (settings.height, settings.width, 3), dtype=np.uint8)
        if self._level is not None:
            values[:] = (int(self._level * 255), 9, 200)
        return Image.fromarray(values)


def conditioned(config: RunConfig, prompts: Sequence[str]) -> dict[str, Any]:
    return {prompt: {"name": prompt} for prompt in [*prompts, config.previews.negative_prompt]}


def draw(
    family: Any, config: RunConfig, folder: Path, stop: Callable[[], bool] = lambda: False
) -> tuple[list[Event], Adapter]:
    events: list[Event] = []
    adapter = Adapter([], [torch.nn.Dropout(0.5)])
    prompts = conditioned(config, preview_prompts(config, "a knight"))
    draw_previews(family, adapter, config, prompts, folder, 100, events.append, stop)
    return events, adapter


def warnings_in(events: Sequence[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Logged) and event.severity == "warning"]


def test_without_prompts_the_first_caption_is_drawn_with_and_without_the_trigger() -> None:
    assert preview_prompts(make_config(), "ZQX, a knight") == ["zqx, a knight", "a knight"]
    assert preview_prompts(make_config(), "") == ["zqx"]


def test_trigger_placeholders_in_prompts_are_replaced() -> None:
    config = make_config(prompts=["photo of [trigger] in snow", "a house"])
    assert preview_prompts(config, "ignored") == ["photo of zqx in snow", "a house"]


def test_every_prompt_is_drawn_with_every_seed_in_batches_of_at_most_four(tmp_path: Path) -> None:
    family, config = FakeFamily(), make_config(prompts=["[trigger] a", "b"], seeds=[1, 5, 9], negative_prompt="ugly")
    events, _ = draw(family, config, tmp_path / "previews")
    assert [len(batch) for batch in family.batches] == [4, 2]
    assert [request for batch in family.batches for request in batch] == [
        (p, "ugly", s) for p in ("zqx a", "b") for s in (1, 5, 9)
    ]
    assert {(s.height, s.width, s.steps, s.guidance) for s in family.settings} == {(64, 64, 2, 2.0)}
    ready = [event for event in events if isinstance(event, PreviewReady)]
    assert [(e.step, e.prompt, e.seed, Path(e.path).name) for e in ready[:2]] == [
        (100, "zqx a", 1, "step-00000100_p0_s1.png"),
        (100, "zqx a", 5, "step-00000100_p0_s5.png"),
    ]
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == sorted(Path(e.path).name for e in ready)


def test_the_png_holds_the_lines_that_a1111_reads(tmp_path: Path) -> None:
    config = make_config(prompts=["[trigger] im Schnee,\nnachts ☃"], negative_prompt="ugly", side=128)
    events, _ = draw(FakeFamily(), config, tmp_path)
    (ready,) = (event for event in events if isinstance(event, PreviewReady))
    with Image.open(ready.path) as picture:
        assert picture.info["parameters"].splitlines() == [
            "zqx im Schnee, nachts ☃ <lora:knight:1>",
            "Negative prompt: ugly",
            "Steps: 2, Sampler: PLMS, CFG scale: 2, Seed: 1, Size: 128x128, Model: model",
        ]
    assert ready.line == " ".join(picture.info["parameters"].split())


def test_a_sampler_without_a_known_short_name_is_named_as_it_is() -> None:
    family: Any = FakeFamily()
    family.noise_schedule = {"_class_name": "HeunDiscreteScheduler"}
    assert "Sampler: HeunDiscreteScheduler" in preview_parameters(make_config(), family, "a", 1, 64)


def test_a_failure_becomes_a_warning_and_training_goes_on(tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise RuntimeError("no kernel image")

    events, _ = draw(FakeFamily(fail), make_config(), tmp_path)
    assert [message for message in warnings_in(events) if "no kernel image" in message and "step 100" in message]
    assert not [event for event in events if isinstance(event, PreviewReady)]


def test_a_missing_conditioning_is_a_warning_too(tmp_path: Path) -> None:
    events: list[Event] = []
    family: Any = FakeFamily()
    draw_previews(family, Adapter([]), make_config(), {}, tmp_path, 1, events.append, lambda: False)
    assert warnings_in(events)


def test_a_keyboard_interrupt_passes(tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(FakeFamily(fail), make_config(), tmp_path)


def test_too_little_memory_for_four_pictures_draws_fewer_at_once(tmp_path: Path) -> None:
    def fail(count: int) -> None:
        if count > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    family = FakeFamily(fail)
    events, _ = draw(family, make_config(prompts=["a"], seeds=[1, 2, 3, 4, 5]), tmp_path)
    assert [len(batch) for batch in family.batches] == [1] * 5
    assert not warnings_in(events)
    assert len([event for event in events if isinstance(event, PreviewReady)]) == 5


def test_too_little_memory_for_one_picture_is_a_warning(tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    events, _ = draw(FakeFamily(fail), make_config(), tmp_path)
    [message] = warnings_in(events)
    assert "The GPU ran out of memory" in message
    assert "previews.side" in message


def test_a_stop_ends_the_drawing_between_two_steps(tmp_path: Path) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 2

    events, _ = draw(FakeFamily(), make_config(), tmp_path, stop)
    assert len(asked) == 3
    assert not warnings_in(events)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_of_one_color_is_flagged(tmp_path: Path) -> None:
    events, _ = draw(FakeFamily(level=0.4), make_config(prompts=["a"]), tmp_path)
    assert any("single color" in message for message in warnings_in(events))
    assert not is_flat(Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)))


def test_drawing_leaves_random_state_and_dropout_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    _, adapter = draw(FakeFamily(), make_config(), tmp_path)
    assert torch.equal(torch.rand(2), expected)
    assert [dropout.training for dropout in adapter.dropouts] == [True]


def test_the_real_pipeline_draws_the_adapter(tiny_sd15: Path, tmp_path: Path) -> None:
    files = locate_base(str(tiny_sd15))
    module, identity = identify_base(files)
    family: Family = module.load(files, identity, torch.device("cpu"), torch.float32)
    adapter = attach_adapter(family, AdapterSettings(rank=2, dropout=0.5), seed=1)
    config = make_config(prompts=["[trigger] a"], seeds=[1, 2])
    with torch.no_grad():
        conditionings = dict(zip(["zqx a", ""], family.encode_prompts(["zqx a", ""]), strict=True))
    events: list[Event] = []

    def pictures(folder: str) -> list[bytes]:
        draw_previews(family, adapter, config, conditionings, tmp_path / folder, 1, events.append, lambda: False)
        return [Image.open(path).tobytes() for path in sorted((tmp_path / folder).iterdir())]

    untrained = pictures("untrained")
    with torch.no_grad():
        for adapted in adapter.modules:
            adapted.up.normal_(std=2.0)
    trained = pictures("trained")
    assert trained == pictures("again")
    assert len(set(trained + untrained)) == 4
    assert not warnings_in(events)
    assert "Sampler: DDIM" in next(event.line for event in events if isinstance(event, PreviewReady))


def test_a_sheet_shows_each_picture_above_its_label(tmp_path: Path) -> None:
    paths = []
    for index, color in enumerate(["red", "lime", "blue"]):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", (64, 64), color).save(paths[-1])
    sheet = build_sheet(
        paths,
        ["step 100", "a label that is far too long for a picture of one hundred and ninety-two pixels", "実験 Zoë"],
    )
    assert sheet == tmp_path / "sheet.png"
    with Image.open(sheet) as picture:
        assert picture.getpixel((preview_sheet.GAP + 5, preview_sheet.GAP + 5)) == (255, 0, 0)
        assert picture.getpixel((2 * preview_sheet.GAP + 192 + 5, preview_sheet.GAP + 5)) == (0, 255, 0)
        label = picture.crop((0, preview_sheet.GAP + 192, 192, preview_sheet.GAP + 192 + preview_sheet.CAPTION_HEIGHT))
        assert label.convert("L").getextrema()[0] < 100  # something dark was written
    with pytest.raises(ValueError, match="labels"):
        build_sheet(paths, ["one"])


def test_the_sheet_of_a_run_has_a_row_for_each_step_and_a_column_for_each_prompt_and_seed(tmp_path: Path) -> None:
    colors = {(5, 0, 3): "red", (5, 1, 3): "lime", (10, 0, 3): "blue", (10, 0, 12): "yellow"}
    for (step, prompt, seed), color in colors.items():
        name = previews.PreviewPicture(prompt, "", seed).file_name(step)
        Image.new("RGB", (64, 64), color).save(tmp_path / name)
    Image.new("RGB", (64, 64)).save(tmp_path / "trigger-sheet.png")
    for _ in range(2):  # its own sheet is none of its pictures
        assert build_run_sheet(tmp_path) == tmp_path / "sheet.png"
    across, down = 192 + preview_sheet.GAP, 192 + preview_sheet.GAP + preview_sheet.CAPTION_HEIGHT
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * across + preview_sheet.GAP, 2 * down + preview_sheet.GAP)
        centers = [[sheet.getpixel((column * across + 38, row * down + 38)) for column in range(3)] for row in range(2)]
    red, lime, blue, yellow, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)
    assert centers == [[red, white, lime], [blue, yellow, white]]


def test_a_sheet_of_many_large_pictures_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("RGB", (600, 300)).save(path)
    with Image.open(build_sheet([path] * 4, max_pixels=4 * 100 * 100, columns=2)) as sheet:
        assert sheet.size == (2 * 100 + 3 * preview_sheet.GAP, 2 * 50 + 3 * preview_sheet.GAP)


def test_a_run_without_previews_has_no_sheet(tmp_path: Path) -> None:
    assert build_run_sheet(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
