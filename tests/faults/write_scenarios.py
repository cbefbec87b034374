"""Everything but checkpoints that a run writes, each as a scenario of `fault_server.py`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lorasmith.engine.dataset.examine import examine_picture
from lorasmith.engine.dataset.overlay import Edit, append_edits, read_overlay
from lorasmith.engine.dataset.scan_cache import ScanCache
from lorasmith.engine.dataset.tensor_cache import TensorCache
from lorasmith.engine.errors import LorasmithError
from lorasmith.engine.events import Event, HardwareSampled, Logged, RunEnded, StepsDone
from lorasmith.engine.export import export_lora
from lorasmith.engine.families import Family
from lorasmith.engine.journal import Journal, replay
from lorasmith.engine.preview_sheet import build_sheet
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_folder import create_run
from lorasmith.engine.storage import require_writable
from tests.engine.running import load_tiny, tiny_config
from tests.faults.fault_server import Fault


def make_run(fault: Fault, folder: str, overlay: str) -> str:
    """Make a run folder with edited captions in it."""
    values = {
        "run": {"output_folder": folder, "name": "tiny"},
        "captions": {"trigger": "zqx"},
        "dataset": {"overlay": overlay},
    }
    resolved = resolve_config([Layer("test", values)])
    with fault.armed(folder):
        return create_run(resolved).name


def keep_journal(fault: Fault, folder: str) -> dict[str, Any]:
    """Journal six steps with gauges between them while the disk errs, then one more on a sound disk."""
    path = Path(folder) / "journal.jsonl"
    with fault.armed(folder):
        journal = Journal(path)
        written = []
        for step in range(1, 7):
            written.append(journal.append(_step(step)))
            journal.append(_gauge())
    problem = journal.problem
    journal.append(RunEnded(outcome="finished", step=6, message="Done."))
    complete = journal.close()
    found = list(replay(path))
    return {
        "steps": [event.step for event in found if isinstance(event, StepsDone)],
        "damaged": [event.message for event in found if isinstance(event, Logged)],
        "ended": sum(isinstance(event, RunEnded) for event in found),
        "complete": complete,
        "waited": not all(written),
        "problem": problem,
    }


def _step(step: int) -> Event:
    return StepsDone(step=step, epoch=1, losses=[0.5], learning_rate=1e-4, grad_norm=1.0, seconds_per_step=0.1)


def _gauge() -> Event:
    return HardwareSampled(
        vram_used_gib=None,
        vram_total_gib=None,
        gpu_utilization_percent=None,
        temperature_c=None,
        power_w=None,
        ram_used_gib=1.0,
        ram_total_gib=2.0,
        process_ram_gib=0.5,
    )


def write_sheet(fault: Fault, folder: str, shade: int) -> None:
    """Write the sheet of two previews over an older one."""
    paths = []
    for number in range(2):
        paths.append(Path(folder).parent / f"picture-{shade}-{number}.png")
        Image.new("RGB", (64, 64), (shade, number, 0)).save(paths[-1])
    with fault.armed(folder):
        build_sheet(paths, target=Path(folder) / "sheet.png")


def edit_captions(fault: Fault, folder: str, number: int) -> list[str]:
    """Add an edit to an overlay; return the files that it then knows, on a sound disk."""
    path = Path(folder) / "edits.jsonl"
    try:
        with fault.armed(folder):
            append_edits(path, {f"{number}.png": Edit((f"caption {number}",)), f"{number}-b.png": Edit(("two",))})
    except LorasmithError as error:
        return ["refused", str(error), *read_overlay(path)]
    return ["written", "", *read_overlay(path)]


def cache_tensor(fault: Fault, folder: str, value: float) -> dict[str, Any]:
    """Store a tensor and load it again: it is there as written, or not there."""
    cache, key = TensorCache("latents", Path(folder)), {"picture": str(value)}
    with fault.armed(folder):
        cache.store(key, {"latents": torch.full((4, 8, 8), value)})
        loaded = cache.load(key)
    again = cache.load(key)
    return {
        "loaded": loaded is not None and float(loaded["latents"].mean()),
        "again": again is not None and float(again["latents"].mean()),
    }


def remember_facts(fault: Fault, folder: str, pictures: str) -> list[bool]:
    """Look pictures up in a scan cache, remember what is new, and look again on a sound disk: what is known then."""
    paths = sorted(Path(pictures).iterdir())
    facts = [examine_picture(path) for path in paths]
    with fault.armed(folder), ScanCache(Path(folder)) as cache:
        for index, known in enumerate(cache.look_up(paths)):
            assert known in (None, facts[index])
            cache.remember(index, facts[index])
    with ScanCache(Path(folder)) as cache:
        found = cache.look_up(paths)
        for index, known in enumerate(found):
            assert known in (None, facts[index])
            cache.remember(index, facts[index])
    with ScanCache(Path(folder)) as cache:
        return [known == fact for known, fact in zip(cache.look_up(paths), facts, strict=True)]


def probe(fault: Fault, folder: str) -> None:
    """Ask whether a folder takes files."""
    with fault.armed(folder):
        require_writable(Path(folder) / "run", 1000)


@functools.cache
def _trained(base: str, root: str) -> tuple[Family, Any, Any]:
    """Return a tiny base model with an adapter that changes it."""
    from lorasmith.engine.adapters import attach_adapter

    config = tiny_config(Path(base), Path(root), export={"layouts": ["kohya"]})
    family = load_tiny(Path(base))
    adapter = attach_adapter(family, config.adapter, config.run.seed)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapter.train(False)
    return family, adapter, config


def load_trained(base: str, root: str) -> None:
    """Load the tiny base model in the server, for every child."""
    family, adapter, config = _trained(base, root)
    folder = Path(root) / "warm"
    export_lora(family, adapter, config, folder, "tiny", {}, 1)


def write_export(fault: Fault, base: str, root: str, folder: str, step: int) -> list[str]:
    """Export the adapter over an older file of the same name."""
    family, adapter, config = _trained(base, root)
    with fault.armed(folder):
        results = export_lora(family, adapter, config, Path(folder), "tiny", {"ss_note": str(step)}, step)
    return [result.path.name for result in results]


def steps_of_export(path: Path) -> int:
    """Return the step that an exported file says it has; raises where it cannot be read whole."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    if len(data) != 8 + length + end:
        raise ValueError(f"{path} has {len(data)} bytes")
    return int(header["__metadata__"]["ss_steps"])
