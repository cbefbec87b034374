"""What can be done with a run that nobody works on: find, rename, delete."""

from __future__ import annotations

from pathlib import Path

from lorasmith.engine.errors import ConfigError
from lorasmith.engine.run_folder import RunFolder, open_run

OUTPUT_FOLDER = Path("runs")


def resolve_run(text: str, output_folder: Path = OUTPUT_FOLDER) -> RunFolder:
    """Return the run that `text` means: a run folder, its name in `output_folder`, or a unique beginning of the name.

    Raises ConfigError that names the candidates where no run or more than one fits.
    """
    if (Path(text).expanduser() / "run.toml").is_file():
        return open_run(Path(text))
    if not text or "/" in text:
        return open_run(Path(text))
    names = _run_names(output_folder)
    fitting = [text] if text in names else [name for name in names if name.startswith(text)]
    if len(fitting) == 1:
        return open_run(output_folder.expanduser() / fitting[0])
    if fitting:
        raise ConfigError(
            f"{text} may mean {len(fitting)} runs in {output_folder}.",
            why=f"They are {_listed(fitting)}.",
            fix="Give more of the name.",
        )
    raise ConfigError(
        f"No run in {output_folder} is named {text}, or begins so.",
        why=f"There are {_listed(names)}." if names else "There is no run in that folder.",
        fix="Give the run's folder, or the name that `lorasmith runs` shows.",
    )


def _run_names(output_folder: Path) -> list[str]:
    """Return the names of the run folders in `output_folder`, in order; an unreadable folder has none."""
    try:
        return sorted(path.name for path in output_folder.expanduser().iterdir() if (path / "run.toml").is_file())
    except OSError:
        return []


def _listed(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
