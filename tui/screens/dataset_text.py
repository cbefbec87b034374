"""What the dataset page says in words: counts, findings, buckets, prompts, files that are not used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from lorasmith.tui.checks import MARKS, Checked, severity_counts
from lorasmith.tui.text import safe_str

if TYPE_CHECKING:
    from lorasmith.engine.dataset.buckets import BucketRow
    from lorasmith.engine.dataset.check_captions import CaptionStatistics
    from lorasmith.engine.dataset.findings import Finding
    from lorasmith.engine.dataset.items import ImageItem
    from lorasmith.tui.findings import FoundDataset

MAX_REFUSALS = 200
MAX_NOTES = 3
MAX_TAGS = 6


def dataset_text(found: FoundDataset) -> Text:
    """Return the counts: found = used + not used, captions, edits, notes about pictures."""
    from lorasmith.engine.dataset.findings import counted

    dataset, pictures = found.dataset, found.pictures
    text = Text()
    text.append("✓ ")
    regular = len(dataset.items) - len(pictures)
    also = f" and {counted(regular, 'regularization picture', 'regularization pictures')}" if regular else ""
    text.append(f"{counted(len(pictures), 'picture', 'pictures')}{also}", "bold")
    text.append(f" · {len(dataset.refused)} of {dataset.found} files not used\n")
    text.append(f"  Captions: {len(dataset.items) - len(found.captionless)} found, {len(found.captionless)} missing")
    edited = sum(edit.captions is not None for edit in found.edits.values())
    left_out = sum(edit.exclude for edit in found.edits.values())
    if edited:
        text.append(f" · {edited} edited here")
    if left_out:
        text.append(f" · {counted(left_out, 'picture', 'pictures')} left out here")
    text.append("\n")
    notes = Counter(note for item in dataset.items for note in item.notes)
    for words in dataset.notes[:MAX_NOTES]:
        text.append(f"  {safe_str(words)}\n", "dim")
    for note, count in notes.most_common(MAX_NOTES):
        text.append(f"  {count}× {safe_str(note)}\n", "dim")
    if len(notes) + len(dataset.notes) > 2 * MAX_NOTES:
        text.append("  … more with `lorasmith check`\n", "dim")
    text.rstrip()
    return text


def findings_text(findings: Sequence[Finding]) -> Text:
    """Return the titles of the findings, worst first."""
    text = Text()
    if not findings:
        text.append("✓ Checked: nothing to report")
        return text
    text.append(f"Findings: {severity_counts(findings)}\n", "bold")
    for finding in findings:
        text.append(f"{MARKS[finding.severity]} ", "bold")
        text.append(f"{finding.severity}: ", "bold" if finding.severity == "error" else "")
        text.append(f"{safe_str(finding.title)}\n")
    text.rstrip()
    return text


def buckets_text(rows: Sequence[BucketRow]) -> Text:
    """Return the bucket table: size, pictures, uses and batches of an epoch, what is cut off, how much is enlarged."""
    from lorasmith.engine.dataset.buckets import MAX_ENLARGEMENT

    text = Text()
    text.append("Size          pictures   uses  batches  cut off  enlarged\n", "bold")
    for row in rows:
        size = row.size.replace("x", " × ")
        enlarged = f"{row.scale:.2f}×" if row.scale > 1 else "–"
        mark = " !" if row.scale > MAX_ENLARGEMENT else ""
        uses = f"{row.uses:g}"
        text.append(f"{size:<12}{row.pictures:>10}{uses:>7}{row.batches:>9}{row.crop_loss:>9.1%}{enlarged:>10}{mark}\n")
    text.append("Uses and batches are those of one epoch; cut off and enlarged are the worst of each size.", "dim")
    return text


def prompts_text(prompts: Sequence[tuple[ImageItem, str]]) -> Text:
    """Return the first prompts exactly as they reach the text encoder."""
    text = Text()
    text.append("Prompts as the text encoder reads them\n", "bold")
    for item, prompt in prompts:
        text.append(f"  {safe_str(prompt) or '(nothing)'}\n")
        text.append(f"    {safe_str(item.relative)}{' (regularization)' if item.regularization else ''}\n", "dim")
    text.rstrip()
    return text


def captions_text(statistics: CaptionStatistics) -> Text:
    """Return how long the captions are, and their most frequent tags."""
    text = Text()
    if not statistics.found:
        return text
    text.append("Captions\n", "bold")
    tokens = f", {statistics.longest_tokens} tokens" if statistics.longest_tokens else ""
    over = f" · {len(statistics.over_limit)} cut off" if statistics.over_limit else ""
    text.append(
        f"  {statistics.median_words:g} words in the middle, {statistics.longest_words}{tokens} at most{over}\n"
    )
    tags = ", ".join(f"{safe_str(tag)} ({count})" for tag, count in statistics.tags[:MAX_TAGS] if count > 1)
    text.append(f"  Most frequent: {tags}\n" if tags else "")
    text.rstrip()
    return text


def refusals_text(found: FoundDataset) -> Text:
    """Return every file that is not used, with its reason."""
    refused = found.dataset.refused
    text = Text()
    if refused:
        text.append(f"Not used ({len(refused)})\n", "bold")
    for refusal in refused[:MAX_REFUSALS]:
        text.append(f"  {safe_str(refusal.relative)}: {safe_str(refusal.reason)}\n")
    if len(refused) > MAX_REFUSALS:
        text.append(f"  … and {len(refused) - MAX_REFUSALS} more; the gallery (g) lists all\n")
    text.rstrip()
    return text


def details_text(found: FoundDataset, checked: Checked) -> Text:
    """Return what stands below the findings: buckets, prompts, captions, files that are not used."""
    parts = [
        buckets_text(checked.rows),
        prompts_text(checked.prompts),
        captions_text(checked.statistics),
        refusals_text(found),
    ]
    return Text("\n\n").join(part for part in parts if part.plain)


def missing_text(missing: Sequence[ImageItem]) -> Text:
    """Return the question what pictures without a caption shall do, with what each answer means."""
    names = ", ".join(item.relative for item in missing[:4]) + ("…" if len(missing) > 4 else "")
    return Text(
        safe_str(
            f"! {len(missing)} without a caption: {names}\n"
            "trigger: the word alone · filename: the file's name · folder: the name in 10_name · exclude: left out",
            lines=True,
        )
    )
