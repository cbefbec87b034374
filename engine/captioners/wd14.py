"""WD taggers, version 3 (SmilingWolf): Danbooru tags of a picture from an ONNX graph.

The graph takes one picture (1, side, side, 3) as float32 BGR 0..255, padded to a square with white, and gives the
probability of each line in `selected_tags.csv`, whose categories are 9 rating, 0 general, 4 character.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from lorasmith.engine.captioners import CaptionerSpec
from lorasmith.engine.config import Probability, Section
from lorasmith.engine.errors import CaptionerError, HardwareError
from lorasmith.engine.families import License

if TYPE_CHECKING:
    from PIL import Image

_GRAPH, _TAGS = "model.onnx", "selected_tags.csv"
_GENERAL, _CHARACTER, _RATING = 0, 4, 9
SPEC = CaptionerSpec(
    name="wd14",
    label="WD tagger v3",
    kind="tags",
    default_model="SmilingWolf/wd-swinv2-tagger-v3",
    revision="627aef95638667ddcaa3ac8ae625e88ea5b02f51",
    bytes=467_768_978,
    license=License(
        name="Apache 2.0",
        url="https://huggingface.co/SmilingWolf/wd-swinv2-tagger-v3",
        consequence="Free to use, also commercially.",
    ),
    files=(_GRAPH, _TAGS),
    good_for="Danbooru tags for drawings and anime, and for bases that were trained on tags. Fast on a CPU.",
    safetensors=False,
    package="onnxruntime",
    extra="captions",
    sources=(
        "https://huggingface.co/SmilingWolf/wd-swinv2-tagger-v3",
        "https://huggingface.co/spaces/SmilingWolf/wd-tagger",
        "https://github.com/kohya-ss/sd-scripts/blob/main/finetune/tag_images_by_wd14_tagger.py",
    ),
)
# Faces whose underscores are part of the drawing; listed at https://huggingface.co/spaces/SmilingWolf/wd-tagger.
# fmt: off
_KAOMOJI = frozenset((
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^",
    "o_o", "u_u", "x_x", "|_|", "||_||",
))
# fmt: on
_GPU, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_AGAIN = "Download the model again, or choose another one."


class Settings(Section):
    """Which tags are written, and how."""

    general_threshold: Probability = 0.35
    """General tags are written from this probability on: lower writes more tags and more wrong ones."""
    character_threshold: Probability = 0.85
    """Names of known characters are written from this probability on."""
    mcut: bool = False
    """Find the threshold of each picture's general tags at the largest gap between probabilities (MCut)."""
    rating: Literal["no", "first", "last"] = "no"
    """Whether and where the rating (general, sensitive, questionable, explicit) is written."""
    character_first: bool = True
    """Write character names before the general tags."""
    blacklist: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Tags that are never written, with spaces or underscores; e.g. what the trigger word is to stand for."""
    replace: dict[str, str] = Field(default_factory=dict)
    """Tags that are written as another text."""
    underscores: bool = False
    """Keep the underscores of tags; off: spaces, as prompts are written. Faces such as ^_^ always keep theirs."""
    max_tags: Annotated[int, Field(ge=0, le=1000)] = 0
    """At most this many tags besides the rating, the most probable ones; 0: all above their thresholds."""


@dataclass(frozen=True)
class Tag:
    """One line of `selected_tags.csv`: its name and category (9 rating, 0 general, 4 character)."""

    name: str
    category: int


def load(folder: Path, settings: Settings, device: str) -> Wd14:
    """Load the graph and its tags, and prove that they belong together (`CaptionerModule.load`)."""
    tags = read_tags(folder / _TAGS)
    session = _open_graph(folder / _GRAPH, device)
    side = _require_contract(session, folder, len(tags))
    on_gpu = session.get_providers()[0] == _GPU
    where = "GPU, onnxruntime" if on_gpu else "CPU, onnxruntime"
    if device != "cpu" and not on_gpu:
        where += " (the package onnxruntime-gpu would use the GPU)"
    return Wd14(session, tags, side, settings, where)


class Wd14:
    """A loaded WD tagger (`Captioner`)."""

    spec = SPEC

    def __init__(self, session: Any, tags: Sequence[Tag], side: int, settings: Settings, where: str) -> None:
        self.where = where
        self._session = session
        self._tags, self._side, self._settings = tuple(tags), side, settings
        self._input = session.get_inputs()[0].name

    def caption(self, image: Image.Image) -> str:
        """Return the tags of a picture, separated by commas (`Captioner.caption`)."""
        if self._session is None:
            raise CaptionerError("The tagger is no longer in memory.", why="It was closed.")
        answer = self._session.run(None, {self._input: prepare_picture(image, self._side)})[0]
        probabilities = np.asarray(answer[0], dtype=np.float64)
        if not np.isfinite(probabilities).all():
            raise CaptionerError("The tagger's answer holds values that are no numbers.", fix=_AGAIN)
        return ", ".join(choose_tags(self._tags, probabilities, self._settings))

    def close(self) -> None:
        """Drop the graph from memory."""
        self._session = None


def prepare_picture(image: Image.Image, side: int) -> npt.NDArray[np.float32]:
    """Return an RGB picture as (1, side, side, 3) BGR 0..255: centered on a white square, then scaled (bicubic)."""
    from PIL import Image

    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.asarray(square, dtype=np.float32)[:, :, ::-1]
    return np.ascontiguousarray(pixels[np.newaxis])


def choose_tags(tags: Sequence[Tag], probabilities: npt.NDArray[np.float64], settings: Settings) -> list[str]:
    """Return the tags to write, the most probable of each kind first.

    Where no tag reaches its threshold, the most probable general one is written: an empty caption would teach nothing.
    """
    banned = {_plain(name) for name in settings.blacklist}
    best_first = [int(index) for index in np.argsort(-probabilities, kind="stable")]
    allowed = [index for index in best_first if _plain(tags[index].name) not in banned]
    general = [index for index in allowed if tags[index].category == _GENERAL]
    least = settings.general_threshold
    if settings.mcut:
        least = mcut_threshold([probabilities[index] for index in best_first if tags[index].category == _GENERAL])
    chosen = [index for index in general if probabilities[index] >= least]
    chosen += [
        index
        for index in allowed
        if tags[index].category == _CHARACTER and probabilities[index] >= settings.character_threshold
    ]
    chosen = sorted(chosen or general[:1], key=best_first.index)[: settings.max_tags or None]
    if settings.character_first:
        chosen.sort(key=lambda index: tags[index].category != _CHARACTER)
    rating = [index for index in allowed if tags[index].category == _RATING][:1]
    order = {"no": chosen, "first": [*rating, *chosen], "last": [*chosen, *rating]}[settings.rating]
    words = [_written(tags[index].name, settings) for index in order]
    return list(dict.fromkeys(word for word in words if word))


def mcut_threshold(probabilities: Sequence[float]) -> float:
    """Return the middle of the largest gap between neighbours (Largeron et al., MCut, IDA 2012, pp. 172-183)."""
    ranked = np.sort(np.asarray(probabilities, dtype=np.float64))[::-1]
    if ranked.size < 2:
        return 0.0
    widest = int(np.argmax(ranked[:-1] - ranked[1:]))
    return float(ranked[widest] + ranked[widest + 1]) / 2


def read_tags(path: Path) -> list[Tag]:
    """Read `selected_tags.csv` (columns tag_id, name, category, count); raises CaptionerError naming file and line."""
    tags: list[Tag] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                tags.append(_read_tag(path, number, row))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CaptionerError(f"{path} cannot be read.", why=f"{error}.", fix=_AGAIN) from None
    if not any(tag.category == _GENERAL for tag in tags):
        raise CaptionerError(f"{path} names no general tag.", fix=_AGAIN)
    return tags


def _read_tag(path: Path, number: int, row: Mapping[str, str | None]) -> Tag:
    name, category = row.get("name"), row.get("category") or ""
    if not name or not category.isdigit():
        raise CaptionerError(f"{path} is no list of tags.", why=f"Line {number} has no name and category.", fix=_AGAIN)
    return Tag(name, int(category))


def _plain(name: str) -> str:
    return name.strip().replace("_", " ").lower()


def _written(name: str, settings: Settings) -> str:
    spaced = name if name in _KAOMOJI else name.replace("_", " ")
    for spelling in (name, spaced):
        if spelling in settings.replace:
            return settings.replace[spelling].strip()
    return name if settings.underscores else spaced


def _open_graph(path: Path, device: str) -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # its own messages would be written across the wizard
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = _threads()
    # The plain package knows the CPU only, which is fast enough here; `where` tells.
    gpu = device != "cpu" and _GPU in onnxruntime.get_available_providers()
    providers = [_GPU, _CPU] if gpu else [_CPU]
    try:
        return onnxruntime.InferenceSession(str(path), sess_options=options, providers=providers)
    except MemoryError:
        raise HardwareError(f"There is not enough memory to load {path}.", fix="Close other programs.") from None
    except Exception as error:  # onnxruntime's exceptions share no class but this one
        why = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise CaptionerError(f"{path} cannot be loaded.", why=why, fix=_AGAIN) from None


def _threads() -> int:
    """Return the number of threads: one core is left to the screen, as in training."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(asked) if asked.isdigit() and int(asked) > 0 else max(1, cores - 1)


def _require_contract(session: Any, folder: Path, num_tags: int) -> int:
    """Return the side in pixels of the square picture that the graph takes."""
    path = folder / _GRAPH
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = list(inputs[0].shape) if len(inputs) == 1 else []
    sides = shape[1:3]
    whole = len(shape) == 4 and all(isinstance(side, int) and side > 0 for side in sides)
    one = whole and (shape[0] == 1 or not isinstance(shape[0], int))
    if not (one and sides[0] == sides[1] and shape[3] == 3 and inputs[0].type == "tensor(float)"):
        raise CaptionerError(
            f"{path} is no WD tagger.",
            why=f"It takes {shape or f'{len(inputs)} inputs'}, not one picture [1, side, side, 3] of floats.",
            fix=f"Choose {SPEC.default_model}, or a like one.",
        )
    count = outputs[0].shape[-1]
    if isinstance(count, int) and count != num_tags:
        raise CaptionerError(
            f"{path} and {folder / _TAGS} do not belong together.",
            why=f"The graph knows {count} tags, the list names {num_tags}.",
            fix=_AGAIN,
        )
    return int(sides[0])
