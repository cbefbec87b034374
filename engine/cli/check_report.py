"""The report of `lorasmith check`, for people in at least 60 columns and for scripts as one JSON document."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.cli.output import visible
from lorasmith.engine.dataset.findings import SEVERITIES, Finding
from lorasmith.engine.dataset.items import Dataset

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.dataset.buckets import BucketPlan
    from lorasmith.engine.dataset.check_captions import CaptionStatistics
    from lorasmith.engine.dataset.findings import CheckContext
    from lorasmith.engine.dataset.triggers import Word

_MAX_WIDTH = 110
_NAMED_FILES, _NAMED_TAGS, _TAG_LENGTH, _BAR_CELLS = 4, 15, 30, 20
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
# For terminals whose encoding lacks them; messages hold quotation marks and dashes too.
_ASCII = {
    "✗": "x",
    "·": "-",
    "█": "#",
    "×": "x",
    "…": "...",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "–": "-",
    "—": "-",
}
_MARKS = {"error": "✗", "warning": "!", "note": "·"}


@dataclass(frozen=True)
class CheckReport:
    """Everything that is known of a dataset for one configuration.

    `prompts` are the exact texts of the first pictures as `relative` path and text, `words` the trigger as each of the
    base's tokenizers reads it (empty without a base).
    """

    config: RunConfig
    context: CheckContext
    dataset: Dataset
    plan: BucketPlan
    findings: tuple[Finding, ...]
    statistics: CaptionStatistics
    prompts: tuple[tuple[str, str], ...]
    words: tuple[Word, ...] = ()
    sheets: tuple[Path, ...] = ()

    @property
    def num_errors(self) -> int:
        """How many findings keep a run from starting."""
        return sum(finding.severity == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a script reads it; keys are only ever added."""
        config, dataset = self.config, self.dataset
        return {
            "folder": config.dataset.folder,
            "base": self.context.base_label,
            "goal": self.context.goal,
            "trigger": config.captions.trigger,
            "resolution": config.dataset.resolution,
            "batch_size": config.train.batch_size,
            "found": dataset.found,
            "accepted": len(dataset.items),
            "regularization": sum(item.regularization for item in dataset.items),
            "system": dataset.system,
            "refused": [{"file": refusal.relative, "reason": refusal.reason} for refusal in dataset.refused],
            "counts": {severity: len(self._of(severity)) for severity in SEVERITIES},
            "findings": [asdict(finding) for finding in self.findings],
            "buckets": [asdict(row) for row in self.plan.rows(config.train.batch_size)],
            "captions": asdict(self.statistics)
            | {
                "token_limit": self.context.token_limit,
                "samples": [{"file": file, "text": text} for file, text in self.prompts],
            },
            "trigger_tokens": [asdict(word) for word in self.words],
            "notes": [{"file": item.relative, "note": note} for item in dataset.items for note in item.notes],
            "dataset_notes": list(dataset.notes),
            "sheets": [str(path) for path in self.sheets],
        }

    def _of(self, severity: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == severity]


def print_report(report: CheckReport) -> None:
    """Print the report on stdout, with color where it is a terminal."""
    from rich.console import Console

    console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    with console.capture() as captured:
        _Printer(console).print(report)
    # Tables pad every line to its full width, which a file or a pipe need not have.
    for line in captured.get().splitlines():
        print(line if console.is_terminal else line.rstrip())


def one_line(value: object) -> str:
    """Return foreign text for a cell: safe for the terminal, and without line breaks."""
    return visible(str(value).replace("\r\n", "\n").replace("\n", "\\n"))


class _Printer:
    """Prints the parts of a report one after the other."""

    def __init__(self, console: Console) -> None:
        console.width = min(console.width, _MAX_WIDTH)
        self._console = console
        self._plain = not _can_draw(console.encoding)

    def print(self, report: CheckReport) -> None:
        self._header(report)
        self._findings(report)
        self._buckets(report)
        self._captions(report)
        self._grouped("Refused", [(refusal.reason, refusal.relative) for refusal in report.dataset.refused])
        self._grouped("Notes", [(note, item.relative) for item in report.dataset.items for note in item.notes])
        for note in report.dataset.notes:
            self._line(note)
        if report.sheets:
            first, last = report.sheets[0], report.sheets[-1]
            more = f" to {last.name}, {len(report.sheets)} files" if last != first else ""
            self._heading(f"Contact sheet: {first}{more}")

    def _text(self, value: object, style: str = "") -> Text:
        from rich.text import Text

        text = one_line(value)
        if self._plain:
            text = "".join(_ASCII.get(character, character) for character in text)
        return Text(text, style=style, overflow="fold")

    def _line(self, value: object, style: str = "") -> None:
        self._console.print(self._text(value, style))

    def _heading(self, value: object) -> None:
        self._console.print()
        self._line(value, "bold")

    def _rows(self, rows: Iterable[Sequence[RenderableType]], *, indent: int = 2) -> None:
        """Print rows whose first column is as wide as its longest text and whose last takes the rest."""
        from rich.padding import Padding
        from rich.table import Table

        table = Table.grid(padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(*row)
        self._console.print(Padding(table, (0, 0, 0, indent)))

    def _header(self, report: CheckReport) -> None:
        config, dataset = report.config, report.dataset
        self._line(config.dataset.folder, "bold")
        counts = f"{_files(dataset.found)} found: {len(dataset.items)} accepted, {len(dataset.refused)} refused"
        self._line(counts + (f"; {_files(dataset.system)} of the system" if dataset.system else ""))
        facts = {
            "resolution": f"{config.dataset.resolution} px",
            "base model": report.context.base_label,
            "goal": report.context.goal,
            "trigger": config.captions.trigger,
        }
        self._rows((self._text(label, "dim"), self._text(fact)) for label, fact in facts.items() if fact)

    def _findings(self, report: CheckReport) -> None:
        if not report.findings:
            self._heading("Findings: none")
            return
        counts = [(severity, len(report._of(severity))) for severity in SEVERITIES]
        words = ", ".join(f"{count} {severity}{'s' if count > 1 else ''}" for severity, count in counts if count)
        self._heading(f"Findings: {words}")
        for finding in report.findings:
            self._finding(finding)

    def _finding(self, finding: Finding) -> None:
        from rich.console import Group

        parts = [self._text(finding.title, "bold")]
        parts += [self._text(line, "dim") for line in _concerned(finding)]
        parts += [self._text(f"Why: {finding.why}"), self._text(f"Do:  {finding.fix}{_setting(finding)}")]
        mark = self._text(f"{_MARKS[finding.severity]} {finding.severity:<7}", _STYLES[finding.severity])
        self._rows([(mark, Group(*parts))], indent=0)

    def _buckets(self, report: CheckReport) -> None:
        rows = report.plan.rows(report.config.train.batch_size)
        if not rows:
            return
        self._heading(f"Training sizes, in batches of {report.config.train.batch_size}")
        largest = max(row.pictures for row in rows)
        titles = ("size", "", "pictures", "uses", "batches", "cropped", "enlarged")
        cells = [[self._text(title, "dim") for title in titles]]
        for row in rows:
            bar = "█" * max(1, round(_BAR_CELLS * row.pictures / largest))
            crop = f"{row.crop_loss:.0%}" if row.crop_loss >= 0.005 else "no"
            scale = f"{row.scale:.2f}×" if row.scale > 1.005 else "no"
            values = (row.size, bar, row.pictures, row.uses, row.batches, crop, scale)
            cells.append([self._text(value, "cyan" if value is bar else "") for value in values])
        for line in cells:
            for cell in line[2:]:
                cell.justify = "right"
        self._rows(cells)
        self._line("  uses and batches of one epoch; the largest crop and enlargement of any picture", "dim")

    def _captions(self, report: CheckReport) -> None:
        statistics, limit = report.statistics, report.context.token_limit
        over = f", {len(statistics.over_limit)} over {limit} tokens" if limit and report.words else ""
        self._heading(
            f"Captions: {statistics.found} found, {statistics.missing} missing, {statistics.empty} empty{over}"
        )
        tokens = f" ({statistics.longest_tokens} tokens, {limit} are read)" if statistics.longest_tokens else ""
        rows = [("longest", f"{statistics.longest_words} words{tokens}; typical are {statistics.median_words:.0f}")]
        if statistics.tags:
            rows.append(("frequent", _frequent(statistics.tags)))
        if report.words:
            rows.append(("trigger", "; ".join(_split_word(report.config.captions.trigger, w) for w in report.words)))
        self._rows((self._text(label, "dim"), self._text(text)) for label, text in rows)
        if report.prompts:
            self._heading("Exactly as the text encoder reads them")
            self._rows((self._text(file, "dim"), self._text(text or "(nothing)")) for file, text in report.prompts)

    def _grouped(self, title: str, entries: Sequence[tuple[str, str]]) -> None:
        """Print files by what is said of them, the most frequent first."""
        if not entries:
            return
        files: dict[str, list[str]] = defaultdict(list)
        for reason, relative in entries:
            files[reason].append(relative)
        self._heading(f"{title}: {_files(len(entries))}" if title == "Refused" else title)
        for reason in sorted(files, key=lambda reason: -len(files[reason])):
            text = self._text(f"{reason}: ")
            text.append_text(self._text(_few(files[reason]), "dim"))
            self._rows([(self._text("·"), text)], indent=2)


def _can_draw(encoding: str) -> bool:
    try:
        "".join(_ASCII).encode(encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def _files(count: int) -> str:
    return f"{count:,} file{'' if count == 1 else 's'}"


def _few(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_FILES
    return ", ".join(names[:_NAMED_FILES]) + (f" and {more:,} more" if more > 0 else "")


def _concerned(finding: Finding) -> list[str]:
    """Return the files of a finding in a few lines: one a group, one a file of which there is more to say, else one."""
    details: Mapping[str, str] = finding.details
    if finding.groups:
        lines = [_few(group) for group in finding.groups]
    elif any(details.get(name) for name in finding.files):
        lines = [f"{name}: {details[name]}" if details.get(name) else name for name in finding.files]
    else:
        return [_few(finding.files)] if finding.files else []
    more = len(lines) - _NAMED_FILES
    return lines[:_NAMED_FILES] + ([f"and {more:,} more"] if more > 0 else [])


def _setting(finding: Finding) -> str:
    settings = finding.action.settings if finding.action is not None else {}
    unsaid = [f"set {key} to {value}" for key, value in settings.items() if key not in finding.fix]
    return f" ({', '.join(unsaid)})" if unsaid else ""


def _frequent(tags: Sequence[tuple[str, int]]) -> str:
    repeated = [(tag, count) for tag, count in tags if count > 1][:_NAMED_TAGS]
    if not repeated:
        return "no tag is in two captions"
    return ", ".join(
        f"{tag if len(tag) <= _TAG_LENGTH else tag[: _TAG_LENGTH - 1] + '…'} {count}×" for tag, count in repeated
    )


def _split_word(trigger: str, word: Word) -> str:
    # The marks of the beginning and end of a word, as tokenizers write them.
    tokens = [token.removesuffix("</w>").lstrip("▁Ġ") or token for token in word.tokens]
    unknown = ", with characters unknown to the base" if word.unknown else ""
    return f"{trigger} is {len(tokens)} token{'' if len(tokens) == 1 else 's'}: {' + '.join(tokens)}{unknown}"
