"""Everything that is to be said of a dataset before a run: the worst first, each with what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.buckets import BucketPlan
from lorasmith.engine.dataset.check_amount import check_amount
from lorasmith.engine.dataset.check_caption_files import check_caption_files
from lorasmith.engine.dataset.check_captions import Captions, CaptionStatistics, caption_statistics, token_limit
from lorasmith.engine.dataset.check_characters import check_characters
from lorasmith.engine.dataset.check_duplicates import check_duplicates
from lorasmith.engine.dataset.check_masks import check_masks
from lorasmith.engine.dataset.check_pictures import check_pictures
from lorasmith.engine.dataset.check_trigger_use import check_trigger_use
from lorasmith.engine.dataset.check_wording import check_wording
from lorasmith.engine.dataset.findings import SEVERITIES, CheckContext, Finding
from lorasmith.engine.dataset.items import Dataset
from lorasmith.engine.dataset.trained_triggers import find_other_triggers
from lorasmith.engine.dataset.triggers import check_trigger
from lorasmith.engine.families import FamilySpec

__all__ = ["CaptionStatistics", "build_context", "caption_statistics", "check_dataset"]


def build_context(
    config: RunConfig,
    *,
    spec: FamilySpec | None = None,
    label: str = "",
    tokenizers: Sequence[Any] = (),
    goal: str = "",
    other_triggers: Mapping[str, str] | None = None,
) -> CheckContext:
    """Collect what a dataset is checked for; reads the triggers of earlier runs in `run.output_folder` if none come.

    `spec` and `label` are those of the base, where it is known.
    """
    if other_triggers is None:
        other_triggers = find_other_triggers(Path(config.run.output_folder), own=config)
    return CheckContext(
        config,
        base_label=label or (spec.label if spec is not None else ""),
        caption_style=spec.caption_style if spec is not None else "",
        token_limit=token_limit(spec, tokenizers),
        tokenizers=tokenizers,
        pixel_multiple=spec.pixel_multiple if spec is not None else 8,
        goal=goal,
        other_triggers=other_triggers,
    )


def check_dataset(dataset: Dataset, plan: BucketPlan, context: CheckContext) -> list[Finding]:
    """Return everything found about a scanned dataset: errors first, then warnings, then notes.

    `plan` is that of the pictures that would be used. The same dataset gives the same findings in the same order.
    """
    captions = Captions(dataset, context)
    findings = [
        *check_caption_files(captions),
        *check_duplicates(dataset, plan, context),
        *check_pictures(dataset, plan, context),
        *check_masks(dataset, context),
        *check_amount(dataset, plan, context),
        *check_characters(captions),
        *check_wording(captions),
        *check_trigger(context.config.captions.trigger, context.tokenizers, context.other_triggers),
        *check_trigger_use(captions),
    ]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
