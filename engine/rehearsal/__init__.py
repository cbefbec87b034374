"""A rehearsal: every stage of a run done once for real, and measured, before hours are spent on it.

Base and adapter are loaded, pictures of the largest size and their prompts encoded, two steps trained on them, the
previews that are drawn at once drawn, a checkpoint saved and read back. It all happens in a folder of its own below the
cache folder, which is removed at the end, and neither the run's own folder nor its cache is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lorasmith.engine.adapters import Adapter
from lorasmith.engine.card_meter import CardMeter, ProcessMeter, meter_of
from lorasmith.engine.checkpoints import newest_checkpoint
from lorasmith.engine.commands import Command
from lorasmith.engine.compute import Compute, choose_compute, deterministic_kernels, engine_threads
from lorasmith.engine.config import RunConfig, ScheduleSettings
from lorasmith.engine.controls import Controls
from lorasmith.engine.dataset.cache import EncodedPictures, LatentCache, TextCache, cache_latents, cache_prompts
from lorasmith.engine.dataset.cache_size import PREVIEWS_AT_ONCE, pictures_at_once
from lorasmith.engine.dataset.epochs import Epochs
from lorasmith.engine.dataset.loader import Loader
from lorasmith.engine.errors import HardwareError, LorasmithError, TrainingError
from lorasmith.engine.events import Event, Logged, PreviewReady
from lorasmith.engine.families import Conditioning, Family
from lorasmith.engine.finishing import draw
from lorasmith.engine.hardware import resolve_device
from lorasmith.engine.learner import Learner, build_learner
from lorasmith.engine.memory.calibration import card_key, record
from lorasmith.engine.memory.forecast import Forecast, Stage
from lorasmith.engine.memory.measured import Rehearsal, RehearsalProgress, StageMeasure, estimate_total, measure_words
from lorasmith.engine.memory.of_run import Known, subject_of
from lorasmith.engine.memory_ladder import MemoryLadder
from lorasmith.engine.not_finite import take_over
from lorasmith.engine.out_of_memory import Phase, Rungs, is_out_of_memory
from lorasmith.engine.preflight import require_ready
from lorasmith.engine.rehearsal.largest import largest_material
from lorasmith.engine.run_file import Layer, ResolvedConfig, resolve_config
from lorasmith.engine.run_folder import RunFolder, create_run
from lorasmith.engine.run_setup import FoundBase, Material, adapt, find_base, load_base, read_dataset, settle_denoiser
from lorasmith.engine.saving import Saver
from lorasmith.engine.step_calibration import with_precision
from lorasmith.engine.step_time import card_speed, step_seconds
from lorasmith.engine.storage import cache_folder
from lorasmith.engine.training_adapter import TrainingAdapter
from lorasmith.engine.training_parts import TrainingParts

STEPS = 2
"""The first one chooses kernels and makes the optimizer's state; the second one is timed."""
_FIXES: dict[Stage, str] = {
    "load": "Set memory.apart to true, or memory.quantize to int8 or nf4.",
    "image encode": "Set memory.apart or memory.tile_pictures to true, or lower dataset.resolution.",
    "text encode": "Set memory.apart to true, or memory.quantize_text_encoders to int8.",
    "step": "Switch train.gradient_checkpointing on, lower train.batch_size or dataset.resolution, or raise "
    "memory.swapped_blocks.",
    "preview": "Lower previews.side, set memory.tile_pictures to true, or set previews.every to 0.",
    "save": "Lower adapter.rank.",
}
_SOLVER = "`lorasmith plan --fit RUN.toml` finds settings that fit this card."

Tell = Callable[[RehearsalProgress], None]


class RehearsalStoppedError(TrainingError):
    """The user stopped the rehearsal."""

    def __init__(self) -> None:
        super().__init__("The rehearsal was stopped; nothing of it is kept.")


def rehearse(resolved: ResolvedConfig, on_progress: Tell, should_stop: Callable[[], bool] = lambda: False) -> Rehearsal:
    """Do each stage of a run once, measure it, and return what it took; see the module.

    `on_progress` is called in this thread. Raises what a run would raise, HardwareError naming the stage where memory
    runs out, and RehearsalStoppedError soon after `should_stop` turned true. Nothing is left behind in any case.
    """
    config = resolved.config
    require_ready(config)
    resolve_device(config.train.device)
    folder = cache_folder() / "rehearsals"
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="rehearsal-", ignore_cleanup_errors=True) as own,
        engine_threads(),
        deterministic_kernels(config.train.deterministic, lambda _: None),
    ):
        compute = choose_compute(config.train)
        return _Rehearsing(config, compute, Path(own), on_progress, should_stop).run()


@dataclass
class _Rehearsing:
    """One rehearsal on its way."""

    config: RunConfig
    compute: Compute
    folder: Path
    on_progress: Tell
    should_stop: Callable[[], bool]
    measures: list[StageMeasure] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Of one picture, prompt, step, preview and save."""
    warnings: list[str] = field(default_factory=list)
    previews: int = 0
    stage: Stage = "load"

    def __post_init__(self) -> None:
        self.meter: CardMeter | ProcessMeter = meter_of(self.compute.device)
        self.rungs = Rungs(self.emit)
        self.forecast: Forecast | None = None
        self.forecast_note = ""

    def run(self) -> Rehearsal:
        """Go through the stages."""
        base = find_base(self.config, self.emit)
        material = read_dataset(self.config, base.module.SPEC.pixel_multiple, self.emit)
        largest = largest_material(material, self.config)
        with self.measured("load"):
            family = load_base(base, self.compute, self.emit, self.rungs, self.config.memory)
            adapter, beside = adapt(self.config, base, family, None, self.emit)
        learner = self._learner(base, family, adapter, largest)
        with contextlib.closing(learner):
            self._forecast(learner, base, material, largest)
            parts = self._parts(learner, largest, beside)
            self._train(parts)
            self._save(parts)
            self._preview(parts)
        return self._result(learner, material, largest)

    @contextlib.contextmanager
    def measured(self, stage: Stage) -> Iterator[None]:
        """Measure one stage; tells it before and after, and names it where memory runs out."""
        if self.should_stop():
            raise RehearsalStoppedError
        self.stage = stage
        self.on_progress(RehearsalProgress(stage, _WORDS[stage]))
        phase: Phase = stage
        before, begun = len(self.rungs.taken(phase)), time.perf_counter()
        try:
            with self.meter.watch() as peak:
                yield
                self.meter.wait()
        except Exception as error:
            raise self._explained(error, stage) from error
        if self.should_stop():
            raise RehearsalStoppedError
        taken = self.rungs.taken(phase)[before:]
        note = f"memory ran out as it is set, and it went on with less ({', '.join(taken)})" if taken else ""
        self.measures.append(StageMeasure(stage, peak.gib, time.perf_counter() - begun, note=note))
        self.on_progress(RehearsalProgress(stage, measure_words(self.measures[-1]), self.measures[-1]))

    def emit(self, event: Event) -> None:
        """Take an event of the engine: warnings are shown, drawn previews counted."""
        if isinstance(event, Logged) and event.severity != "info":
            self.warnings.append(event.message)
            self.on_progress(RehearsalProgress(self.stage, event.message))
        elif isinstance(event, PreviewReady):
            self.previews += 1

    def next_commands(self) -> list[Command]:
        """Return the user's stop, for what asks between pictures or denoising steps."""
        return [Command.STOP] if self.should_stop() else []

    def wait_command(self, timeout: float) -> Command | None:
        """Return a stop: nothing of a rehearsal waits for a person."""
        return Command.STOP

    def _learner(self, base: FoundBase, family: Family, adapter: Adapter, material: Material) -> Learner:
        config, samples = self._short_config(), material.plan.samples
        with self.measured("image encode"):
            pictures = cache_latents(
                samples,
                family,
                base.files.fingerprint("vae"),
                config.dataset,
                should_stop=self.should_stop,
                cache=LatentCache(self.folder / "latents"),
                rungs=self.rungs,
            )
        self.seconds["picture"] = self.measures[-1].seconds / max(1, len(pictures))
        conditionings = self._conditionings(family, material)
        settle_denoiser(family, config, keep_text=conditionings is None, rungs=self.rungs)
        return self._built(family, adapter, material, pictures, conditionings)

    def _conditionings(self, family: Family, material: Material) -> dict[str, Conditioning] | None:
        """Return the encoded prompts of the steps and previews; None where they are encoded as they come."""
        if self.config.adapter.text_encoder:
            return None
        config = self._short_config()
        micro = config.train.steps * config.train.gradient_accumulation
        prompts = Epochs(material.plan, config).all_captions(micro, 10_000) or set()
        wanted = sorted(prompts | {*material.prompts, config.previews.negative_prompt})
        with self.measured("text encode"):
            found = cache_prompts(
                wanted, family, "rehearsal", should_stop=self.should_stop, cache=TextCache(self.folder / "prompts"),
                rungs=self.rungs,
            )  # fmt: skip
        self.seconds["prompt"] = self.measures[-1].seconds / max(1, len(found))
        return found

    def _built(
        self,
        family: Family,
        adapter: Adapter,
        material: Material,
        pictures: EncodedPictures,
        conditionings: dict[str, Conditioning] | None,
    ) -> Learner:
        config = self._short_config()
        loader = Loader(material.plan, pictures.latents, config, pictures.masks)
        return build_learner(family, adapter, loader, conditionings, config)

    def _parts(self, learner: Learner, material: Material, beside: TrainingAdapter | None) -> TrainingParts:
        config = learner.config.model_dump()
        config["run"]["output_folder"] = str(self.folder / "runs")
        run: RunFolder = create_run(resolve_config([Layer("rehearsal", config)]))
        controls = Controls(self, 0)
        return TrainingParts(run, learner.config, self, controls, learner, material, self.rungs, beside)

    def _train(self, parts: TrainingParts) -> None:
        ladder = MemoryLadder(parts)
        with self.measured("step"):
            for _ in range(STEPS):
                begun = time.perf_counter()
                parts.meter.add(*ladder.run_step(parts.step))
                parts.controls.step += 1
                self.meter.wait()
                self.seconds["step"] = time.perf_counter() - begun

    def _save(self, parts: TrainingParts) -> None:
        """Write a checkpoint and read it back."""
        with self.measured("save"):
            Saver(parts).save_finally()
            problems: list[str] = []
            checkpoint = newest_checkpoint(parts.run.checkpoints, lambda _, reason: problems.append(reason))
            if checkpoint is None:
                raise TrainingError("The checkpoint of the rehearsal cannot be read back.", why="; ".join(problems))
            take_over(parts, checkpoint)
        self.seconds["save"] = self.measures[-1].seconds

    def _preview(self, parts: TrainingParts) -> None:
        if not self.config.previews.every:
            return
        with self.measured("preview"):
            draw(parts)
            if not self.previews and not self.should_stop():
                raise TrainingError(self.warnings[-1] if self.warnings else "No preview was drawn.")
        self.seconds["preview"] = self.measures[-1].seconds / max(1, self.previews)

    def _short_config(self) -> RunConfig:
        """Return the settings of a run of two steps that draws what is drawn at once."""
        config = self.config
        side = config.previews.side or config.dataset.resolution
        most = min(PREVIEWS_AT_ONCE, pictures_at_once(side * side))
        prompts, seeds = config.previews.prompts[:most], list(dict.fromkeys(config.previews.seeds))
        previews = {"prompts": prompts, "seeds": seeds[: max(1, most // (len(prompts) or 2))]}
        update = {
            "train": config.train.model_copy(update={"steps": STEPS, "log_every": 1}),
            "schedule": ScheduleSettings(),
            "previews": config.previews.model_copy(update=previews),
        }
        return config.model_copy(update=update)

    def _known(self, learner: Learner, base: FoundBase, material: Material, largest: Material) -> Known:
        bucket = largest.plan.samples[0].bucket
        return Known(
            spec=learner.family.spec,
            files=base.files,
            pixels=bucket.width * bucket.height,
            num_parameters=learner.adapter.num_parameters(),
            number_of_pictures=len(material.plan.samples),
            keeps_text=learner.conditionings is None,
        )

    def _forecast(self, learner: Learner, base: FoundBase, material: Material, largest: Material) -> None:
        config = with_precision(self.config, learner)
        if self.compute.device.type == "cpu":
            config = config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})
        self.subject, self.forecast_note = subject_of(config, self._known(learner, base, material, largest))
        if self.subject is not None:
            from lorasmith.engine.memory.forecast import forecast

            self.forecast = forecast(self.subject)
            self.forecast_note = self.forecast.basis

    def _result(self, learner: Learner, material: Material, largest: Material) -> Rehearsal:
        bucket = str(largest.plan.samples[0].bucket)
        told = {stage.stage: stage.without_slack for stage in self.forecast.stages} if self.forecast else {}
        stages = tuple(dataclasses.replace(each, forecast_gib=told.get(each.stage, 0.0)) for each in self.measures)
        return Rehearsal(
            device=self.compute.label,
            size=bucket,
            measured_by=self.meter.words,
            stages=stages,
            forecast=self.forecast,
            forecast_note=self.forecast_note,
            seconds_per_step=self.seconds["step"],
            total_seconds=estimate_total(self.config, material.plan, self.seconds, stages[0].seconds),
            calibrated=self._calibrate(learner),
        )

    def _calibrate(self, learner: Learner) -> bool:
        """Keep what the steps took beside their forecast, where they ran on a card as they are set."""
        if not isinstance(self.meter, CardMeter) or self.forecast is None or self.subject is None:
            return False
        gpu = self.meter.gpu()
        if gpu is None or self.rungs.taken("step"):
            return False
        measured = next(each for each in self.measures if each.stage == "step")
        pace = step_seconds(self.subject, card_speed(gpu.name, gpu.compute_capability)).seconds
        key, told = card_key(gpu, learner.family.spec.name), self.forecast.step.without_slack
        record(key, told, measured.gib, pace, self.seconds["step"])
        return True

    def _explained(self, error: Exception, stage: Stage) -> Exception:
        """Return an error that names the stage and what to do; those that tell something else are left as they are."""
        if isinstance(error, HardwareError) or is_out_of_memory(error):
            why = error.what if isinstance(error, LorasmithError) else (str(error).splitlines() or [""])[0]
            fix = f"{_FIXES[stage]} {_SOLVER}"
            return HardwareError(f"The rehearsal ran out of memory in the stage “{stage}”.", why=why, fix=fix)
        return error


_WORDS: dict[Stage, str] = {
    "load": "Loading the base model and attaching the LoRA",
    "image encode": "Encoding pictures of the largest size",
    "text encode": "Encoding their captions",
    "step": f"Training {STEPS} steps on the largest pictures",
    "save": "Saving a checkpoint",
    "preview": "Drawing a preview",
}
