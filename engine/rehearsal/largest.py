"""The part of a dataset whose batches take the most memory: what a rehearsal works on."""

from __future__ import annotations

import dataclasses

from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.buckets import BucketPlan, View
from lorasmith.engine.dataset.cache_size import PREVIEWS_AT_ONCE, pictures_at_once
from lorasmith.engine.run_setup import Material


def largest_material(material: Material, config: RunConfig) -> Material:
    """Return the dataset with the pictures of the one size alone whose batches take most, as many as are needed.

    Preview prompts are those that are drawn at once.
    """
    rows: dict[str, list[View]] = {}
    for view in material.plan.views:
        rows.setdefault(str(view.samples[0].bucket), []).append(view)

    def pixels(views: list[View]) -> float:
        bucket, uses = views[0].samples[0].bucket, sum(view.repeats for view in views)
        return bucket.width * bucket.height * min(uses, config.train.batch_size)

    views = max(rows.values(), key=pixels)
    bucket = views[0].samples[0].bucket
    wanted = max(config.train.batch_size, pictures_at_once(bucket.width * bucket.height))
    chosen: list[View] = []
    index = 0
    for view in views[:wanted]:
        samples = tuple(dataclasses.replace(each, index=index + place) for place, each in enumerate(view.samples))
        index += len(samples)
        chosen.append(dataclasses.replace(view, samples=samples))
    plan = BucketPlan(tuple(sample for view in chosen for sample in view.samples), tuple(chosen))
    side = config.previews.side or config.dataset.resolution
    most = min(PREVIEWS_AT_ONCE, pictures_at_once(side * side))
    return Material(material.dataset, plan, material.prompts[:most])
