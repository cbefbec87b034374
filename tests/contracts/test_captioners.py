"""What holds for every captioner, on tiny random models of the real classes."""

from __future__ import annotations

import gc
import json
import random
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.engine.captioners import (
    Captioner,
    captioners,
    find_captioner,
    load_captioner,
    read_settings,
    require_package,
)
from lorasmith.engine.errors import CaptionerError, ConfigError, HardwareError
from tests.test_architecture import ROOT, strings
from tests.tiny_captioners import TINY_CAPTIONERS

NAMES = sorted(captioners())
QUICK: dict[str, dict[str, Any]] = {
    "blip": {"max_tokens": 12, "beams": 2},
    "florence2": {"max_tokens": 12, "beams": 2},
    "joycaption": {"max_tokens": 16},
}
"""Settings that keep the models' answers short."""
OF_TRANSFORMERS = sorted(name for name in NAMES if captioners()[name].SPEC.safetensors)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each captioner: read only."""
    root = tmp_path_factory.mktemp("captioners")
    return {name: build(root / name) for name, build in TINY_CAPTIONERS.items()}


def load(name: str, models: dict[str, Path], **settings: Any) -> Captioner:
    """Load a tiny captioner onto the CPU."""
    return load_captioner(name, str(models[name]), QUICK.get(name, {}) | settings, "cpu")


@pytest.fixture(params=NAMES)
def loaded(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[Captioner]:
    captioner = load(request.param, models)
    yield captioner
    captioner.close()


def pictures() -> list[Image.Image]:
    """Pictures of every proportion, among them one pixel and a line."""
    rng = random.Random(1)
    sizes = [(64, 64), (1, 1), (1, 300), (500, 3), (120, 80)]
    found = [Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3))) for size in sizes]
    return [
        *found,
        Image.radial_gradient("L").convert("RGB"),
        Image.frombytes("RGB", (90, 60), rng.randbytes(90 * 60 * 3)),
    ]


def inner_model(captioner: Any) -> Any:
    """The object that holds the weights."""
    return captioner._session if hasattr(captioner, "_session") else captioner._writer.model


def test_every_captioner_has_a_tiny_model() -> None:
    assert set(TINY_CAPTIONERS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_facts_of_a_captioner_are_complete(name: str) -> None:
    module = find_captioner(name)
    spec = module.SPEC
    assert module.__name__.endswith(f".{name}")  # type: ignore[attr-defined]
    assert re.fullmatch(r"[0-9a-f]{40}", spec.revision)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", spec.default_model)
    assert spec.bytes > 10_000_000
    assert all(part.startswith("https://") for part in (*spec.sources, spec.license.url))
    assert all(text.endswith(".") for text in (spec.good_for, spec.license.consequence))
    assert all((field.description or "").strip() for field in module.Settings.model_fields.values())


def test_no_module_outside_asks_which_captioner_it_is() -> None:
    sources = [path for part in ("engine", "tui") for path in (ROOT / part).rglob("*.py")]
    assert len(sources) > 100
    for path in sources:
        if path.parent.name != "captioners":
            named = [text for _, text in strings(path) if text in NAMES]
            assert not named, f"{path}: what differs between captioners is a field of CaptionerSpec"


def test_listing_captioners_loads_neither_torch_nor_onnxruntime() -> None:
    code = """
import sys
from lorasmith.engine.captioners import captioners, read_settings
import lorasmith.engine.dataset.captioning, lorasmith.engine.cli.caption
for name in captioners():
    read_settings(name, {})
print([name for name in ("torch", "transformers", "onnxruntime", "huggingface_hub", "rich") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_picture_gets_the_same_text_each_time_and_never_none(loaded: Captioner) -> None:
    first = [loaded.caption(picture) for picture in pictures()]
    assert all(text.strip() for text in first)
    assert [loaded.caption(picture) for picture in pictures()] == first
    assert len(set(first)) > 1, "the picture does not matter"
    assert loaded.where.startswith("CPU")


@pytest.mark.parametrize("name", NAMES)
def test_another_load_gives_the_same_text_and_leaves_the_random_state_alone(name: str, models: dict[str, Path]) -> None:
    import torch

    before = torch.random.get_rng_state()
    texts = []
    for _ in range(2):
        captioner = load(name, models)
        texts.append([captioner.caption(picture) for picture in pictures()[:2]])
        captioner.close()
    assert texts[0] == texts[1]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_closing_lets_the_memory_go(name: str, models: dict[str, Path]) -> None:
    captioner = load(name, models)
    captioner.caption(pictures()[0])
    model = weakref.ref(inner_model(captioner))
    captioner.close()
    gc.collect()
    assert model() is None
    with pytest.raises(CaptionerError, match="no longer in memory"):
        captioner.caption(pictures()[0])
    captioner.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_torn_file_is_named(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    for victim in sorted(path.name for path in models[name].iterdir()):
        if victim in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
            continue
        folder = shutil.copytree(models[name], tmp_path / f"missing-{victim}")
        (folder / victim).unlink()
        with pytest.raises(CaptionerError) as missing:
            load_captioner(name, str(folder), device="cpu")
        assert victim in str(missing.value) or "safetensors weights" in str(missing.value)
        data = (models[name] / victim).read_bytes()
        for kept in (0, len(data) // 2):
            (folder / victim).write_bytes(data[:kept])
            with pytest.raises(CaptionerError) as torn:
                load_captioner(name, str(folder), device="cpu")
            assert victim in str(torn.value) or str(folder) in str(torn.value)
            assert torn.value.fix


@pytest.mark.parametrize("name", NAMES)
def test_the_model_of_another_captioner_is_refused_by_its_kind(name: str, models: dict[str, Path]) -> None:
    for other in NAMES:
        if other != name:
            with pytest.raises(CaptionerError, match=r"which .* needs|of type"):
                load_captioner(name, str(models[other]), device="cpu")


def test_what_is_no_model_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(CaptionerError, match=r"There is no folder ./nowhere"):
        load_captioner("blip", "./nowhere")
    with pytest.raises(CaptionerError, match=r"has no config\.json"):
        load_captioner("blip", str(tmp_path))
    with pytest.raises(ConfigError, match="There is no captioner gpt") as unknown:
        load_captioner("gpt")
    assert "wd14" in unknown.value.fix


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("wd14", {"prompt": "x"}, "has no setting prompt"),
        ("wd14", {"general_threshold": 1.5}, "general_threshold = 1.5"),
        ("wd14", {"blacklist": ["a", 3]}, r"blacklist\.1 = 3"),
        ("florence2", {"length": "endless"}, "length = endless"),
        ("blip", {"beams": "3"}, "beams = 3"),
        ("joycaption", {"temperature": -1.0}, "temperature = -1.0"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_settings(name, settings)
    assert caught.value.why or caught.value.fix


def test_a_missing_package_is_told_with_its_one_line_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in NAMES:
        spec = captioners()[name].SPEC
        if spec.package:
            with pytest.raises(CaptionerError, match=spec.package) as caught:
                load_captioner(name)
            assert caught.value.fix == f"Install it: pip install 'lorasmith[{spec.extra}]'"
        else:
            require_package(spec)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_pickles_and_code_of_a_repository_are_never_opened(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    pickled = shutil.copytree(models[name], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CaptionerError, match=r"only as a pickle, pytorch_model\.bin"):
        load_captioner(name, str(pickled), device="cpu")
    coded = shutil.copytree(models[name], tmp_path / "coded")
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    (coded / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CaptionerError, match="needs program code of its own"):
        load_captioner(name, str(coded), device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_weights_that_are_missing_are_not_replaced_by_random_ones(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models[name], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    victim = next(key for key in sorted(weights) if "layers" in key or "blocks" in key)
    del weights[victim]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CaptionerError, match="do not fit its config") as caught:
        load_captioner(name, str(folder), device="cpu")
    assert "1 weights are missing" in caught.value.why


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_a_model_larger_than_the_memory_is_refused_before_it_is_loaded(
    name: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasmith.engine import hardware

    monkeypatch.setattr(hardware, "read_memory", lambda: hardware.Memory(64.0, 1e-6, False))
    with pytest.raises(HardwareError, match=r"takes 0\.0 GiB, and 0\.0 GiB of this machine's memory are free"):
        load_captioner(name, str(models[name]), device="cpu")


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_folders_as_they_were_published_load_too(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Repositories made by transformers 4: picture settings in a file of their own, SigLIP one level deeper."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models[name], tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings.pop("image_processor")))
    (folder / "processor_config.json").write_text(json.dumps(settings))
    if len(settings) == 1:
        (folder / "processor_config.json").unlink()
    weights = load_file(folder / "model.safetensors")
    deeper = {
        re.sub(r"^vision_tower\.(?!blocks|convs)", "vision_tower.vision_model.", key): weights[key] for key in weights
    }
    save_file(deeper, folder / "model.safetensors", metadata={"format": "pt"})
    texts = []
    for path in (models[name], folder):
        captioner = load_captioner(name, str(path), QUICK[name], "cpu")
        texts.append([captioner.caption(picture) for picture in pictures()[-2:]])
        captioner.close()
    assert texts[0] == texts[1]


# ------------------------------------------------------------------------------------------- what each of them reads


def written_tokens(captioner: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Record the token numbers that the model is given with each picture."""
    seen: list[list[int]] = []
    write = captioner._writer.write

    def record(inputs: Any, **options: Any) -> Any:
        seen.append(inputs["input_ids"][0].tolist() if "input_ids" in inputs else [])
        return write(inputs, **options)

    monkeypatch.setattr(captioner._writer, "write", record)
    return seen


def test_the_chat_of_joycaption_has_one_start_and_the_picture_inside_the_question(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner: Any = load("joycaption", models, prompt="what is this")
    seen = written_tokens(captioner, monkeypatch)
    captioner.caption(pictures()[0])
    tokenizer = captioner._writer.processor.tokenizer
    (tokens,) = seen
    image = tokenizer.convert_tokens_to_ids("<|reserved_special_token_69|>")
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens.count(image) == 4, "28 pixels are 2 x 2 patches of 14"
    text = tokenizer.decode(tokens)
    assert "you are a helpful" in text.lower() or "are a helpful" in text
    assert text.rstrip().endswith("<|end_header_id|>"), "the answer begins here"
    assert text.index("<|reserved_special_token_69|>") < text.index("what is this") < text.rindex("<|eot_id|>")


def test_drawn_text_depends_on_the_picture_alone(models: dict[str, Path]) -> None:
    texts = []
    for temperature in (0.0, 1.5, 1.5):
        captioner = load("joycaption", models, temperature=temperature)
        texts.append([captioner.caption(picture) for picture in pictures()])
        captioner.close()
    assert texts[1] == texts[2]
    assert texts[0] != texts[1]


def test_a_chat_template_without_a_place_for_the_picture_is_refused(tmp_path: Path) -> None:
    from tests.tiny_captioners import JOY_TEMPLATE, build_joycaption

    folder = build_joycaption(tmp_path / "model", JOY_TEMPLATE.replace("<|reserved_special_token_69|>", ""))
    with pytest.raises(CaptionerError, match="no place for a picture"):
        load_captioner("joycaption", str(folder), device="cpu")


def test_blip_goes_on_from_the_prompt(models: dict[str, Path]) -> None:
    captioner = load("blip", models, prompt=" a painting of ")
    assert captioner.caption(pictures()[0]).startswith("a painting of")
    captioner.close()


def test_each_length_of_florence_asks_another_question(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = set()
    for length in ("short", "detailed", "long"):
        captioner: Any = load("florence2", models, length=length)
        seen = written_tokens(captioner, monkeypatch)
        captioner.caption(pictures()[0])
        asked.add(tuple(seen[0]))
        image = captioner._writer.processor.image_token_id
        assert seen[0].count(image) == 5, "64 pixels are 2 x 2 patches of 32 and their mean"
        captioner.close()
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The image shows a cat on a mat.", "A cat on a mat."),
        ("In this image we can see two dogs.", "Two dogs."),
        ("This is a photo of the sea.", "This is a photo of the sea."),
        ("The image is a portrait of a man.", "A man."),
        ("The image shows.", "The image shows."),
        ("The image shows .", "The image shows ."),
        ("A cat. The image shows a cat.", "A cat. The image shows a cat."),
        ("", ""),
    ],
)
def test_openings_that_say_nothing_of_the_picture_are_cut(text: str, expected: str) -> None:
    from lorasmith.engine.captioners.florence2 import cut_opening

    assert cut_opening(text) == expected


def test_every_style_of_joycaption_asks_one_whole_sentence() -> None:
    from lorasmith.engine.captioners.joycaption import Settings, question

    styles = Settings.model_fields["style"].annotation.__args__  # type: ignore[union-attr]
    lengths = Settings.model_fields["length"].annotation.__args__  # type: ignore[union-attr]
    asked = [question(Settings(style=style, length=length)) for style in styles for length in lengths]
    assert len(set(asked)) == len(styles) * len(lengths)
    assert all("  " not in text and "{" not in text and text.endswith(".") for text in asked)
    assert question(Settings(prompt=" Which color? ")) == "Which color?"
