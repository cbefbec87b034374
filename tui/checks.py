"""What the wizard tells of a scanned dataset: findings, statistics, buckets, prompts. Runs in a worker thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import LorasmithError

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.dataset.buckets import BucketPlan, BucketRow
    from lorasmith.engine.dataset.check_captions import CaptionStatistics
    from lorasmith.engine.dataset.findings import Finding, Severity
    from lorasmith.engine.dataset.items import ImageItem
    from lorasmith.tui.findings import FoundBase, FoundDataset

NUM_PROMPTS = 3
MARKS: Mapping[str, str] = {"error": "✗", "warning": "!", "note": "·"}
"""A mark for each severity; the word always stands beside it or in the line below."""


@dataclass(frozen=True)
class Question:
    """What a check depends on besides the scanned pictures."""

    config: RunConfig
    base: FoundBase | None = None
    tokenizers: Sequence[Any] = ()
    goal: str = ""


@dataclass(frozen=True)
class Checked:
    """What is known of a dataset with the settings as they stand.

    `problem` is why the captions keep a run from starting, None where they do not. `prompts` are the exact texts of the
    first epoch for the first pictures.
    """

    findings: tuple[Finding, ...]
    statistics: CaptionStatistics
    plan: BucketPlan
    rows: tuple[BucketRow, ...]
    prompts: tuple[tuple[ImageItem, str], ...]
    problem: LorasmithError | None = None

    def errors(self) -> list[Finding]:
        """Return the findings that keep a run from starting."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @cached_property
    def by_file(self) -> dict[str, list[Finding]]:
        """The findings of each picture by its `relative` path, worst first."""
        found: dict[str, list[Finding]] = {}
        for finding in self.findings:
            for relative in dict.fromkeys(finding.files):
                found.setdefault(relative, []).append(finding)
        return found


def find_checks(found: FoundDataset, question: Question, tell: Callable[[str, int, int], None]) -> Checked:
    """Check the scanned pictures for the base, goal and settings of `question`; raises LorasmithError."""
    from lorasmith.engine.dataset.buckets import plan_buckets
    from lorasmith.engine.dataset.captions import sample_prompts
    from lorasmith.engine.dataset.check import build_context, caption_statistics, check_dataset
    from lorasmith.engine.dataset.scan import require_captions

    tell("checking pictures and captions", 0, 0)
    config, base = question.config, question.base
    spec = base.family.SPEC if base is not None else None
    problem, used = None, found.dataset
    try:
        used = require_captions(found.dataset, config.dataset)
    except LorasmithError as error:
        problem = error
    plan = plan_buckets(used.items, config.dataset, spec.pixel_multiple if spec is not None else 8, config.run.seed)
    context = build_context(
        config,
        spec=spec,
        label=base.identity.label if base is not None else "",
        tokenizers=question.tokenizers,
        goal=question.goal,
    )
    return Checked(
        tuple(check_dataset(found.dataset, plan, context)),
        caption_statistics(found.dataset, context),
        plan,
        plan.rows(config.train.batch_size),
        tuple(sample_prompts(used.items, config.captions, config.run.seed, NUM_PROMPTS)),
        problem,
    )


def severity_counts(findings: Sequence[Finding]) -> str:
    """Return how many errors, warnings and notes there are, in words."""
    from lorasmith.engine.dataset.findings import SEVERITIES

    counts = [(severity, sum(finding.severity == severity for finding in findings)) for severity in SEVERITIES]
    words = [f"{count} {severity}{'s' if count > 1 else ''}" for severity, count in counts if count]
    return ", ".join(words) or "nothing to report"


def worst_mark(findings: Sequence[Finding]) -> str:
    """Return the mark of the worst of `findings`, "" where there are none."""
    order: list[Severity] = ["error", "warning", "note"]
    worst = min((order.index(finding.severity) for finding in findings), default=None)
    return "" if worst is None else MARKS[order[worst]]
