"""`lorasmith caption auto`: captions by a model, written beside the dataset and not into it."""

from __future__ import annotations

import shlex
import signal
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from lorasmith.engine.cli.caption_list import list_captioners
from lorasmith.engine.cli.output import columns, say, say_json, visible
from lorasmith.engine.cli.progress import SECONDS_BETWEEN_LINES, default_stream, duration, size
from lorasmith.engine.errors import EXIT_STOPPED, ConfigError, DatasetError

if TYPE_CHECKING:
    from lorasmith.engine.captioners import Captioner
    from lorasmith.engine.dataset.captioning import CaptioningPlan, CaptioningResult, CaptioningStep
    from lorasmith.engine.dataset.items import ImageItem

caption_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Write captions with a model, and edit them.",
)
_SHOWN = 100


@dataclass(frozen=True)
class _Job:
    """One `caption auto`: which captioner with which model and settings, where to, and how to say it."""

    captioner: str
    model: str
    settings: Mapping[str, Any]
    device: str
    overlay: Path
    again: bool
    stream: TextIO


@caption_app.command("auto")
def auto(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder with the pictures; only read.")],
    captioner: Annotated[str, typer.Option("--with", metavar="NAME", help="See lorasmith caption list.")],
    model: Annotated[str, typer.Option(help="A folder or Hub id of another model than the captioner's own.")] = "",
    overlay: Annotated[
        Path | None, typer.Option(help="File for the captions; without it NAME.captions.jsonl in the current folder.")
    ] = None,
    general_threshold: Annotated[float | None, typer.Option(help="Least probability of a tag (taggers).")] = None,
    character_threshold: Annotated[float | None, typer.Option(help="The same for character names.")] = None,
    blacklist: Annotated[
        list[str] | None, typer.Option(metavar="TAGS", help="Tags never to write, with commas; may be repeated.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Words to begin with, or the question to ask.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting that `caption list NAME` shows."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or a GPU's UUID.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Caption at most so many pictures.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also caption pictures that a captioner has captioned before.")
    ] = False,
    replace_captions: Annotated[
        bool, typer.Option("--replace-captions", help="Also caption pictures with captions of their own; files stay.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, and progress on stderr.")] = False,
) -> None:
    """Caption the pictures of a folder that have no caption yet.

    The captions go to a file of their own (the overlay): nothing is written into FOLDER, and neither a caption of yours
    nor one that you edited is replaced. Ctrl-C keeps what is done; the same command goes on from there.
    """
    from lorasmith.engine.dataset.overlay import default_overlay

    named = {"general_threshold": general_threshold, "character_threshold": character_threshold, "prompt": prompt}
    settings = _settings(captioner, named, blacklist or [], sets or [])
    place = overlay or default_overlay(folder)
    if place.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{place} is inside the dataset, which is only read.", fix="Choose another --overlay.")
    job = _Job(captioner, model, settings, device, place, again, default_stream(as_json))
    plan = _plan(folder, job, replace_captions)
    wanted = plan.wanted[:limit]
    if dry_run or not wanted:
        _tell_plan(job, plan, len(wanted), as_json)
        return
    started = time.monotonic()
    result = _caption(job, wanted)
    result.skipped |= plan.skipped
    _tell_result(job, result, time.monotonic() - started, as_json)
    if result.stopped:
        raise typer.Exit(EXIT_STOPPED)
    if result.failed:
        raise typer.Exit(DatasetError.exit_code)


caption_app.command("list")(list_captioners)


def _settings(captioner: str, named: Mapping[str, Any], blacklist: list[str], assignments: list[str]) -> dict[str, Any]:
    """Return the settings that were given, checked before any picture is read."""
    from lorasmith.engine.captioners import read_settings

    given = {key: value for key, value in named.items() if value is not None}
    if blacklist:
        given["blacklist"] = [tag.strip() for text in blacklist for tag in text.split(",") if tag.strip()]
    given |= _parse_settings(captioner, assignments)
    read_settings(captioner, given)
    return given


def _parse_settings(captioner: str, assignments: list[str]) -> dict[str, Any]:
    """Turn `key=value` into settings of the captioner: values are TOML, but plain text for settings that are text."""
    from lorasmith.engine.captioners import find_captioner

    fields = find_captioner(captioner).Settings.model_fields
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or not key:
            raise ConfigError(f"Cannot read --set {assignment}.", fix="Write it as key=value.")
        is_text = key in fields and isinstance(fields[key].get_default(call_default_factory=True), str)
        values[key] = text if is_text else _toml_value(text)
    return values


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _plan(folder: Path, job: _Job, replace_captions: bool) -> CaptioningPlan:
    from lorasmith.engine.config import DatasetSettings
    from lorasmith.engine.dataset.captioning import plan_captioning, without_own_captions
    from lorasmith.engine.dataset.overlay import read_overlay
    from lorasmith.engine.dataset.scan import scan_dataset

    # Without the overlay, so that a picture's own caption is seen behind a captioner's.
    dataset = scan_dataset(DatasetSettings(folder=str(folder)))
    items: list[ImageItem] = list(dataset.items)
    if replace_captions:
        items = without_own_captions(items)
    return plan_captioning(items, read_overlay(job.overlay), job.captioner, replace_machine=job.again)


def _caption(job: _Job, wanted: tuple[ImageItem, ...]) -> CaptioningResult:
    from lorasmith.engine.captioners import load_captioner
    from lorasmith.engine.dataset.captioning import caption_pictures

    _line(job.stream, _loading_line(job))
    captioner: Captioner = load_captioner(
        job.captioner, job.model, job.settings, job.device, on_progress=_download_lines(job.stream)
    )
    _line(job.stream, f"{captioner.spec.label} on {captioner.where}: {len(wanted)} pictures into {job.overlay}")
    try:
        with _stop_on_signal(job.stream) as should_stop:
            return caption_pictures(
                wanted,
                captioner,
                job.overlay,
                replace_machine=job.again,
                on_progress=lambda step: _line(job.stream, _step_line(step)),
                should_stop=should_stop,
            )
    finally:
        captioner.close()


def _loading_line(job: _Job) -> str:
    """Say what is loaded, and what it may cost to get it."""
    from lorasmith.engine.captioners import find_captioner

    spec = find_captioner(job.captioner).SPEC
    if job.model:
        return f"Loading {spec.label} from {job.model} …"
    return f"Loading {spec.label} ({spec.default_model}, {spec.license.name}, {size(spec.bytes)} once) …"


def _download_lines(stream: TextIO) -> Callable[[str, int, int], None]:
    last = float("-inf")

    def show(name: str, done: int, total: int) -> None:
        nonlocal last
        if done >= total or time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            _line(stream, f"  downloading {name}: {size(done)} of {size(total)}")

    return show


def _step_line(step: CaptioningStep) -> str:
    text = f"failed: {step.failed}" if step.failed else f"skipped: {step.skipped}" if step.skipped else step.caption
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
    left = f"  ({duration(step.seconds_left)} left)" if step.seconds_left is not None and step.done < step.total else ""
    return f"  [{step.done}/{step.total}] {step.relative}: {shown}{left}"


def _line(stream: TextIO, text: str) -> None:
    print(visible(text), file=stream, flush=True)


@contextmanager
def _stop_on_signal(stream: TextIO) -> Iterator[Callable[[], bool]]:
    """Let the first SIGINT or SIGTERM end after the current picture, and the second one at once."""
    asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        _line(stream, "  Ending after this picture. Once more ends at once.")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reasons(skipped: Mapping[str, str]) -> list[list[str]]:
    return [[str(count), f"skipped: {reason}"] for reason, count in Counter(skipped.values()).most_common()]


def _tell_plan(job: _Job, plan: CaptioningPlan, count: int, as_json: bool) -> None:
    if as_json:
        names = [item.relative for item in plan.wanted[:count]]
        say_json({"overlay": str(job.overlay), "captioner": job.captioner, "wanted": names, "skipped": plan.skipped})
        return
    if not count:
        say("No picture needs a caption.")
    else:
        say(f"{job.captioner} would caption {count} pictures into {job.overlay}.")
    for line in columns(_reasons(plan.skipped)):
        print(line)


def _tell_result(job: _Job, result: CaptioningResult, seconds: float, as_json: bool) -> None:
    if as_json:
        document = {"overlay": str(job.overlay), "captioner": job.captioner, "seconds": round(seconds, 3)}
        outcome = {"done": result.done, "failed": result.failed, "skipped": result.skipped, "stopped": result.stopped}
        say_json(document | outcome)
        return
    say(f"{'Stopped' if result.stopped else 'Done'} after {duration(seconds)}:")
    rows = [[str(len(result.done)), "captioned"], *_reasons(result.skipped)]
    rows += [["1", f"failed: {relative}: {reason}"] for relative, reason in result.failed.items()]
    for line in columns(rows):
        print(line)
    if result.done:
        say(f"Captions: {job.overlay}")
        say(f"To train with them: lorasmith train RUN.toml --set {shlex.quote(f'dataset.overlay={job.overlay}')}")
    if result.stopped and not job.again:
        say("The same command goes on with the rest.")
