"""Runs to cut and resume: a covering array of settings, and everything that a run leaves behind, to be compared.

A full product of the settings would be 100,000 runs; most faults need two settings to meet, so each pair of values is
in at least one configuration (Cohen et al., IEEE Trans. Softw. Eng. 23(7), 1997).
"""

from __future__ import annotations

import importlib
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from lorasmith.engine.checkpoints import load_checkpoint
from lorasmith.engine.combinations import ONE_RATE, SCHEDULE_FREE
from lorasmith.engine.commands import Command
from lorasmith.engine.config import OptimizerSettings, RunConfig, ScheduleSettings
from lorasmith.engine.events import RunStarted, StepsDone
from lorasmith.engine.run_folder import RunFolder
from tests.engine.running import RecordingHost, new_run, run_training, tiny_config
from tests.faults.fault_server import Fault
from tests.tiny import tiny_pictures

STEPS = 30
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "lion")
FURTHER_OPTIMIZERS = tuple(
    name for name in get_args(OptimizerSettings.model_fields["name"].annotation) if name not in OPTIMIZERS
)
"""Those that meet one configuration each; `OPTIMIZERS` meet each value of every other setting."""
Row = dict[str, Any]
FACTORS: dict[str, tuple[Any, ...]] = {
    "accumulation": (1, 2, 4),
    "workers": (0, 2),
    "average": (0.0, 0.9),
    "dropout": (0.0, 0.3),
    "captions": ("plain", "drawn"),
    "crop": ("center", "random and flipped"),
    "pictures": ("one shape", "several shapes", "odd"),
    "text_encoder": (False, True),
    "optimizer": OPTIMIZERS,
    "schedule": get_args(ScheduleSettings.model_fields["name"].annotation),
    "precision": ("fp32", "bf16", "fp16"),
}
EVERYTHING: dict[str, Row] = {
    "everything on, fp32": {
        "accumulation": 2,
        "workers": 2,
        "average": 0.9,
        "dropout": 0.3,
        "captions": "drawn",
        "crop": "random and flipped",
        "pictures": "several shapes",
        "text_encoder": True,
        "optimizer": "adamw",
        "schedule": "cosine_restarts",
        "precision": "fp32",
        "kind": "locon",
    },
    "everything on, bf16": {
        "accumulation": 1,
        "workers": 2,
        "average": 0.9,
        "dropout": 0.3,
        "captions": "drawn",
        "crop": "random and flipped",
        "pictures": "odd",
        "text_encoder": True,
        "optimizer": "prodigy",
        "schedule": "cosine",
        "precision": "bf16",
    },
}
_PLACES_OF_TIMES = ("ss_training_started_at", "ss_training_finished_at", "modelspec.date")


@dataclass
class Trace:
    """What a run showed and left: loss, rate and gradient norm of each step, then the files of its end.

    `resumed_from` has one number for each start. Numbers are compared as they are, files byte by byte.
    """

    steps: dict[int, tuple[float, float, float]]
    resumed_from: list[int]
    state: dict[str, bytes]
    rest: str
    export: dict[str, tuple[dict[str, str], bytes]]

    def differs_from(self, other: Trace, since: int = 0) -> list[str]:
        """Return in words what is not the same as in `other` after `since` steps."""
        wanted = {step: values for step, values in other.steps.items() if step > since}
        different = [
            f"step {step}" for step in wanted.keys() | self.steps.keys() if wanted.get(step) != self.steps.get(step)
        ]
        different += [
            name for name in self.state.keys() | other.state.keys() if self.state.get(name) != other.state.get(name)
        ]
        different += ["the rest of the state"] if self.rest != other.rest else []
        return sorted(different) + (["the exported file"] if self.export != other.export else [])


def covering_rows() -> list[Row]:
    """Return rows in which any two values of two factors meet at least once; the same rows each time."""
    names = list(FACTORS)
    missing = {pair for one, other in itertools.combinations(names, 2) for pair in _pairs(one, other)}
    rng, rows = random.Random(2), []
    while missing:
        candidates = [_candidate(sorted(missing, key=str)[0], missing, rng) for _ in range(30)]
        row = max(candidates, key=lambda candidate: len(missing & _met(candidate)))
        missing -= _met(row)
        rows.append({name: row[name] for name in names})
    return rows


def row_of(optimizer: str) -> Row:
    """Return a configuration for one of `FURTHER_OPTIMIZERS`, with as much on as it may have."""
    row = EVERYTHING["everything on, fp32"] | {"kind": "lora", "text_encoder": False, "optimizer": optimizer}
    return row | ({"schedule": "constant", "average": 0.0} if optimizer in SCHEDULE_FREE else {"schedule": "wsd"})


def uncovered(rows: list[Row]) -> set[Any]:
    """Return the pairs of values that meet in none of `rows`."""
    wanted = {pair for one, other in itertools.combinations(FACTORS, 2) for pair in _pairs(one, other)}
    return wanted.difference(*(_met(row) for row in rows))


def _pairs(one: str, other: str) -> set[Any]:
    return {((one, a), (other, b)) for a in FACTORS[one] for b in FACTORS[other]}


def _met(row: Row) -> set[Any]:
    return set(itertools.combinations([(name, row[name]) for name in FACTORS if name in row], 2))


def _candidate(start: Any, missing: set[Any], rng: random.Random) -> Row:
    row: Row = dict(start)
    rest = [name for name in FACTORS if name not in row]
    rng.shuffle(rest)
    for name in rest:
        values = list(FACTORS[name])
        rng.shuffle(values)
        row[name] = max(values, key=lambda value: len(missing & _met(row | {name: value})))
    return row


def settings(row: Row, base: Path, folder: Path, steps: int = STEPS, **sections: dict[str, Any]) -> RunConfig:
    """Return the settings of a run of `steps` steps over pictures in `folder`, which are written where missing."""
    values: dict[str, dict[str, Any]] = {
        "train": {
            "steps": steps,
            "log_every": 1,
            "gradient_accumulation": row["accumulation"],
            "loader_workers": row["workers"],
            "ema_decay": row["average"],
            "precision": row["precision"],
        },
        "adapter": {
            "dropout": row["dropout"],
            "text_encoder": row["text_encoder"],
            "kind": row.get("kind", "lora"),
            "conv_rank": 1,
        },
        "optimizer": {"name": row["optimizer"], "learning_rate": 1.0 if row["optimizer"] in ONE_RATE else 1e-3},
        "schedule": {"name": row["schedule"], "warmup_steps": 0 if row["schedule"] == "constant" else 4},
        "objective": {"min_snr_gamma": 5.0, "noise_offset": 0.1},
        "captions": {},
        "dataset": {"flip": row["crop"] != "center", "crop": row["crop"].partition(" ")[0]},
    }
    if "8bit" in row["optimizer"]:
        # Smaller weights keep their state in 32 bits.
        values["adapter"] |= {"rank": 64}
        values["optimizer"] |= {"lora_plus_ratio": 4.0}
    if row["captions"] == "drawn":
        values["captions"] = {"shuffle": True, "dropout": 0.2, "tag_dropout": 0.3, "wildcards": True, "lines": "choose"}
    values["dataset"] |= _dataset(row["pictures"], folder)
    if row["pictures"] == "odd":
        values["objective"] |= {"unmasked_weight": 0.2, "prior_weight": 0.5}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return tiny_config(base, folder, **values)


def _dataset(pictures: str, folder: Path) -> dict[str, Any]:
    """Write the dataset where it is missing, and return its settings."""
    lines = ["a circle, red, {big|small}\na ball", "a ball, blue\na toy, {red|blue}, round, old"]
    sizes = {
        "one shape": ((80, 80),),
        "several shapes": ((80, 80), (160, 72), (72, 150)),
        "odd": ((160, 128), (128, 160)),
    }
    fresh = not (folder / "pictures").exists()
    if fresh:
        tiny_pictures(folder / "pictures", 3 if pictures == "odd" else 5, sizes=sizes[pictures], captions=lines)
    if pictures != "odd":
        return {}
    if fresh:
        _write_odd_pictures(folder, lines)
    return {
        "more_folders": [str(folder / "more")],
        "regularization_folder": str(folder / "regular"),
        "buckets": False,
        "more_resolutions": [128],
        "weights": [1.0, 1.5],
        "masks": "alpha",
        "alpha_background": "checker",
    }


def _write_odd_pictures(folder: Path, lines: list[str]) -> None:
    """Write a second dataset with a transparent picture and a mask, and a regularization picture."""
    more = tiny_pictures(folder / "more", 3, sizes=((300, 128),), captions=lines)
    tiny_pictures(folder / "regular", 1, sizes=((130, 140),))
    with Image.open(more[0]) as picture:
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(more[0])
    mask = Image.linear_gradient("L").rotate(90).resize((300, 128))
    mask.save(folder / "more" / "01-masklabel.png")


@dataclass
class Told:
    """What one start of a run told: where it began, and (step, loss, rate, gradient norm) of each step."""

    resumed_from: int
    steps: list[tuple[int, float, float, float]]


def train(config: RunConfig, run: RunFolder, cut: int | None = None) -> Told:
    """Start the run, and stop it after `cut` steps, else at its end."""
    host = RecordingHost(at={} if cut is None else {cut: [Command.STOP]})
    run_training(config, host, run)
    steps = [(event.step, event.losses[-1], event.learning_rate, event.grad_norm) for event in host.of(StepsDone)]
    return Told(host.of(RunStarted)[0].resumed_from, steps)


def train_whole(config: RunConfig) -> tuple[RunFolder, Trace]:
    """Train without a cut."""
    run = new_run(config)
    return run, trace(run, config, train(config, run))


def train_with_cuts(config: RunConfig, cuts: list[int], run: RunFolder | None = None) -> tuple[RunFolder, Trace]:
    """Stop after each of the steps in `cuts` and go on with nothing but the run folder, then to the end."""
    run = run or new_run(config)
    return run, trace(run, config, *[train(config, run, cut) for cut in (*cuts, None)])


def trace(run: RunFolder, config: RunConfig, *starts: Told) -> Trace:
    """Return what the starts of a run told, and what is in its folder now; no step may be told twice."""
    steps = [step for start in starts for step in start.steps]
    numbers = [number for number, *_ in steps]
    assert len(numbers) == len(set(numbers)), f"steps were trained twice: {numbers}"
    checkpoint = load_checkpoint(run.checkpoints, config.train.steps)
    files = sorted(checkpoint.path.glob("*.safetensors"))
    return Trace(
        steps={number: (loss, rate, norm) for number, loss, rate, norm in steps},
        resumed_from=[start.resumed_from for start in starts],
        state={file.name: file.read_bytes() for file in files},
        rest=json.dumps(checkpoint.state["learner"], sort_keys=True),
        export={file.name: exported(file) for file in sorted(run.export.glob("*.safetensors"))},
    )


def exported(path: Path) -> tuple[dict[str, str], bytes]:
    """Return the header of a LoRA file without times, and its tensors."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for key in _PLACES_OF_TIMES:
        header["__metadata__"].pop(key, None)
    return header, data[end:]


def import_engine() -> None:
    """Import what a training needs, without training."""
    for module, name in (
        ("diffusers", "StableDiffusionPipeline"),
        ("transformers", "CLIPTextModel"),
        ("peft", "LoraConfig"),
    ):
        getattr(importlib.import_module(module), name)


def train_in_a_process_of_its_own(_: Fault, run_folder: str, cut: int | None) -> tuple[int, list[Any]]:
    """Do one start of a run; a scenario of the fault server, in which nothing is spoilt."""
    run = RunFolder(Path(run_folder))
    told = train(run.load_config().config, run, cut)
    return told.resumed_from, told.steps
