"""Make the pictures of the README: `python screenshots/make.py [RUN_FOLDER]`.

The real wizard goes through its pages on the demo base, and the real monitor replays a demo run's journal: that of
RUN_FOLDER, else of the newest demo run in ./runs, else of a short one that is trained for the purpose.
Paths of this machine stay out: everything runs in a neutral folder, and the run is shown from there.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from picture import save_png
from PIL import Image
from textual.pilot import Pilot

from lorasmith.engine.commands import Command
from lorasmith.engine.events import Event, RunStarted, StepsDone
from lorasmith.engine.families import families, identify_base
from lorasmith.engine.hardware import Disk, Gpu, GpuProcess, HardwareSnapshot, Memory
from lorasmith.engine.journal import replay
from lorasmith.engine.run_file import parse_assignments
from lorasmith.engine.sources import locate_base
from lorasmith.presets import demo
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.draft import PAGES, Draft
from lorasmith.tui.findings import FoundBase, Probes
from lorasmith.tui.screens.monitor import MonitorScreen
from lorasmith.tui.theme import THEME
from lorasmith.tui.widgets.gallery import Gallery

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from tests.sparse_base import build_sparse_base  # noqa: E402

SIZES = {"": (120, 36), "-80x24": (80, 24)}
SMALL = ("dataset", "findings", "gallery", "settings", "review", "monitor", "monitor-finished", "card-settings")
"""The pictures that are also made for the smallest terminal."""
CARD = HardwareSnapshot(
    gpus=(
        Gpu("GPU-1", 0, "NVIDIA GeForce RTX 3060", 12.0, 11.3, (8, 6), "580.95.05", 0.0, 41.0, 14.0,
            (GpuProcess(2291, 0.5, "gnome-shell"),)),
    ),
    note="",
    cuda_driver=(13, 0),
    memory=Memory(32.0, 27.5),
    disks=(Disk(Path("/home"), 930.0, 412.0),),
    cpu="AMD Ryzen 7 5800X",
    cores=16,
)  # fmt: skip
"""An example, for the pictures of what the wizard says of a card."""
SHOWN_SHARE = 0.7
"""How much of the run the monitor has seen in its picture."""
SHORT_RUN = ["train.steps=80", "previews.every=20", "schedule.warmup_steps=5"]


class Replayed:
    """Events of a run that is over, as if they came now."""

    finished = False

    def __init__(self, waiting: list[Event]) -> None:
        self._waiting = waiting

    def drain(self) -> list[Event]:
        """Return all events at the first call."""
        taken, self._waiting = self._waiting, []
        return taken

    def send(self, command: Command) -> None:
        """Do nothing: the run is over."""


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a demo run")
    given = parser.parse_args().run
    found = given.resolve() if given else newest_demo_run(Path("runs").resolve())
    with neutral_folder() as folder:
        run = bring(found, folder) if found else train(folder)
        asyncio.run(take_all(list(replay(run / "journal.jsonl"))))


def newest_demo_run(runs: Path) -> Path | None:
    """Return the newest finished run in `runs` that `lorasmith demo` made."""
    name = demo.settings()["run"]["name"]
    finished = [path.parent.parent for path in runs.glob(f"{name}-*/export/{name}.safetensors")]
    return max(finished, key=lambda path: path.stat().st_mtime, default=None)


@contextmanager
def neutral_folder() -> Iterator[Path]:
    """Work in a new folder whose name may be shown, with the demo's own files and the wizard's state inside it."""
    folder = Path(tempfile.gettempdir()).resolve() / "my-loras"
    folder.mkdir()
    before = Path.cwd()
    os.environ |= {
        "LORASMITH_STATE": str(folder / ".lorasmith"),
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
        "HF_HUB_OFFLINE": "1",
    }
    for name in ("NO_COLOR", "SSH_CONNECTION", "TEXTUAL_THEME"):
        os.environ.pop(name, None)
    try:
        os.chdir(folder)
        (folder / "demo").symlink_to(demo.FOLDER)
        demo.FOLDER = Path("demo")
        demo.BASE, demo.PICTURES, demo.REGULAR = (demo.FOLDER / part for part in ("base", "pictures", "regular"))
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def bring(run: Path, folder: Path) -> Path:
    """Copy a run into `folder`, its journal telling paths as they are there."""
    here = folder / "runs" / run.name
    shutil.copytree(run, here, ignore=shutil.ignore_patterns("checkpoints", "lock"))
    journal = here / "journal.jsonl"
    journal.write_text(journal.read_text(encoding="utf-8").replace(str(run), str(here)), encoding="utf-8")
    return here


def train(folder: Path) -> Path:
    """Train the demo for a few steps and return the run's folder."""
    from lorasmith.engine.demo_run import resolve_demo
    from lorasmith.engine.session import Session, create_run

    resolved = resolve_demo(parse_assignments(SHORT_RUN))
    session = Session(create_run(resolved), resolved.config)
    print(f"No demo run was found: training {SHORT_RUN[0]}", flush=True)
    session.start()
    session.join()
    return session.run.path


async def take_all(events: list[Event]) -> None:
    """Take every picture at every size that it is made for."""
    total = next(event.total_steps for event in events if isinstance(event, RunStarted))
    last = next(
        n for n, event in enumerate(events) if isinstance(event, StepsDone) and event.step >= SHOWN_SHARE * total
    )
    for suffix, size in SIZES.items():
        await take_pages(suffix, size)
        await take_dataset(suffix, size)
        await take_card(suffix, size)
        await take_monitor("monitor", suffix, size, events[: last + 1])
        await take_monitor("monitor-finished", suffix, size, events)


async def take_pages(suffix: str, size: tuple[int, int]) -> None:
    """Go through the wizard's pages with Enter and take each."""
    app = LorasmithApp(Draft())
    async with app.run_test(size=size) as pilot:
        for page in PAGES:
            await settle(pilot, app)
            take(app, page, suffix)
            if page != "review":
                await pilot.press("enter")


def odd_folder() -> Path:
    """Make a folder as people have them: the demo's pictures, some twice, one tiny, one without a caption."""
    folder = Path("photos")
    if folder.exists():
        return folder
    shutil.copytree(demo.PICTURES, folder)
    pictures = sorted(folder.glob("*.png"))
    for path in pictures[:3]:
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
        shutil.copy(path.with_suffix(".txt"), path.with_name(f"copy of {path.stem}.txt"))
    pictures[4].with_suffix(".txt").unlink()
    with Image.open(pictures[5]) as picture:
        picture.resize((24, 24)).save(folder / "thumbnail.png")
    (folder / "thumbnail.txt").write_text("a small one\n", encoding="utf-8")
    (folder / "notes.docx").write_bytes(b"not a picture")
    return folder


async def take_dataset(suffix: str, size: tuple[int, int]) -> None:
    """Take the findings about an odd folder, and its gallery."""
    draft = Draft()
    draft.put("dataset.folder", str(odd_folder()))
    app = LorasmithApp(draft)
    async with app.run_test(size=size) as pilot:
        app.visit("dataset")
        await settle(pilot, app)
        app.screen.query_one("#next").focus()
        for name, key, moves in (("findings", "f", ["down"]), ("gallery", "g", ["right", "right"])):
            await pilot.press(key, *moves)
            await settle(pilot, app)
            while any(gallery.busy() for gallery in app.screen.query(Gallery)):
                await asyncio.sleep(0.1)
            await pilot.pause(0.2)
            take(app, name, suffix)
            await pilot.press("escape")


async def take_card(suffix: str, size: tuple[int, int]) -> None:
    """Take what the pages say of a card of 12 GB, with the headers of a large base model whose weights are a hole."""
    folder = Path("models")
    if not folder.exists():
        build_sparse_base(folder / "FLUX.1-dev", "flux1", "dev")
    files = locate_base(str(folder / "FLUX.1-dev"))
    base = FoundBase(files, families()["flux1"], identify_base(files)[1])
    model = str(base.files.path)
    draft = Draft(kept={"choice": "local", "local": model}, answers={"base.model": model})
    app = LorasmithApp(draft, Probes(hardware=lambda tell: CARD, base=lambda *rest: base, unusable=lambda *rest: {}))
    async with app.run_test(size=size) as pilot:
        await pilot.pause(0.5)
        await settle(pilot, app)
        take(app, "card", suffix)
        app.known.look_at_base()
        await settle(pilot, app)
        for page, name in (("base_model", "card-base"), ("settings", "card-settings")):
            app.visit(page)
            await settle(pilot, app)
            take(app, name, suffix)


async def take_monitor(name: str, suffix: str, size: tuple[int, int], events: list[Event]) -> None:
    """Take the monitor after `events`."""
    app = LorasmithApp(Draft())
    async with app.run_test(size=size) as pilot:
        await app.push_screen(MonitorScreen(Replayed(list(events))))
        await pilot.pause(1.5)
        await settle(pilot, app)
        take(app, name, suffix)


async def settle(pilot: Pilot[int], app: LorasmithApp) -> None:
    """Wait until everything that is looked up is shown."""
    await pilot.pause(0.2)
    while app.known.looking() or app.workers._workers:
        await asyncio.sleep(0.1)
    await pilot.pause(0.2)


def take(app: LorasmithApp, name: str, suffix: str) -> None:
    """Write the picture of what `app` shows now."""
    if suffix and name not in SMALL:
        return
    path = HERE / f"{name}{suffix}.png"
    save_png(app.screen._compositor.render_strips(), path, str(THEME.foreground), str(THEME.background))
    print(path.name, flush=True)


if __name__ == "__main__":
    main()
