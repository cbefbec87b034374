from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.engine.dataset.captions import compose, with_class
from lorasmith.engine.dataset.epochs import Epochs
from lorasmith.engine.dataset.loader import Batch
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.learner import Learner
from tests.engine.running import tiny_config
from tests.engine.test_trainer import tiny_learner
from tests.tiny import tiny_pictures

CLASS: dict[str, Any] = {"preserve": "class", "preserve_class": "toy"}


@pytest.fixture(scope="module")
def learner(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    """Four pictures and two for regularization, in batches of three, with an adapter that has learnt something."""
    folder = tmp_path_factory.mktemp("preserved")
    tiny_pictures(folder / "pictures", 4, captions=["a zqx, red", "", "blue"])
    tiny_pictures(folder / "regular", 2, captions=["a toy"])
    config = tiny_config(
        tiny_sd15,
        folder,
        dataset={"regularization_folder": str(folder / "regular"), "missing_captions": "trigger"},
        objective=CLASS | {"preserve_weight": 0.5},
        train={"batch_size": 3},
    )
    learner = tiny_learner(config)
    change(learner)
    return learner


def change(learner: Learner) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in learner.adapter.modules:
            module.up.copy_(torch.randn(module.up.shape, generator=generator) * 0.2)


def mixed(learner: Learner) -> Batch:
    """A batch with pictures to preserve and one for regularization."""
    batches = map(learner.loader.batch, range(20))
    return next(batch for batch in batches if None in batch.preserved and batch.preserved.count(None) == 1)


def gradients(learner: Learner, batch: Batch, part: int = 0) -> list[torch.Tensor]:
    learner.optimizer.zero_grad()
    learner._add_gradients(batch, 3, part)
    return [p.grad.clone() for p in learner.adapter.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("zqx, red", "a toy, red"), ("zqx", "a toy"), (compose("a ZQX's hat, zqx", "zqx"), "a toy, a hat")],
)
def test_the_class_takes_the_triggers_place(prompt: str, expected: str) -> None:
    assert with_class(prompt, " zqx ", " a  toy") == expected


def test_the_batches_know_what_to_preserve(learner: Learner) -> None:
    for number in range(8):
        batch = learner.loader.batch(number)
        for caption, preserved, weight in zip(batch.captions, batch.preserved, batch.weights, strict=True):
            assert float(weight) == 1.0
            regular = caption == "a toy"
            assert preserved == (None if regular else caption.replace("zqx", "toy"))
            assert not regular or "zqx" not in caption
    batch = mixed(learner)
    assert batch.pictures(1, 3).preserved == batch.preserved[1:3]


def test_the_prompts_to_preserve_are_encoded_before_the_encoders_go(learner: Learner) -> None:
    assert learner.conditionings is not None
    assert {"toy", "toy, blue", "zqx", "zqx, blue", "a toy"} <= set(learner.conditionings)
    assert not learner.family.text_encoders


def test_the_loss_is_the_difference_to_the_base_model_for_the_same_noise(learner: Learner) -> None:
    batch, family = mixed(learner), learner.family
    assert learner.conditionings is not None
    kept = [place for place, prompt in enumerate(batch.preserved) if prompt is not None]
    noisy = learner.objective.prepare(batch.latents, batch.weights, 3, 0)
    total = 0.0
    for place in kept:
        conditioning = family.collate([learner.conditionings[str(batch.preserved[place])]])
        inputs = noisy.noisy[place : place + 1], noisy.timesteps[place : place + 1], conditioning
        with torch.no_grad():
            with_adapter = family.predict(*inputs)
            learner.adapter.set_enabled(False)
            without = family.predict(*inputs)
            learner.adapter.set_enabled(True)
        total += float((with_adapter - without).square().mean())
    assert total > 0.0
    loss = learner.preservation_loss(batch, 3, 0)
    assert float(loss.detach()) == pytest.approx(0.5 * total / len(batch.captions), rel=1e-4)


def test_the_step_adds_both_gradients_and_reports_both_losses(learner: Learner) -> None:
    batch = mixed(learner)
    together = gradients(learner, batch)
    reported = learner._add_gradients(batch, 3, 0)
    learner.optimizer.zero_grad()
    own, kept = learner.batch_loss(batch, 3, 0), learner.preservation_loss(batch, 3, 0)
    assert float(reported) == pytest.approx(float((own + kept).detach()), rel=1e-6)
    assert float(kept.detach()) > 0.0
    (own + kept).backward()  # type: ignore[no-untyped-call]
    for one, parameter in zip(together, learner.adapter.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(one, parameter.grad, rtol=1e-4, atol=1e-7)


def test_pieces_of_a_batch_have_its_gradient(learner: Learner) -> None:
    batch = mixed(learner)
    whole = gradients(learner, batch)
    learner.pictures_at_once = 1
    try:
        pieces = gradients(learner, batch)
    finally:
        learner.pictures_at_once = 0
    assert all(torch.allclose(one, two, rtol=1e-3, atol=1e-6) for one, two in zip(whole, pieces, strict=True))


def test_a_fresh_adapter_has_nothing_to_undo(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in learner.adapter.modules:
        monkeypatch.setattr(module.up, "data", torch.zeros_like(module.up))
    learner.optimizer.zero_grad()
    loss = learner.preservation_loss(mixed(learner), 3, 0)
    assert float(loss.detach()) == 0.0
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in learner.adapter.parameters())


def test_the_adapter_is_on_again_whatever_happens(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    batch = mixed(learner)
    before = float(learner.batch_loss(batch, 3, 0).detach())
    with monkeypatch.context() as patched:
        patched.setattr(learner.family, "predict", fail)
        with pytest.raises(RuntimeError):
            learner.preservation_loss(batch, 3, 0)
    assert float(learner.batch_loss(batch, 3, 0).detach()) == before


def test_training_on_the_preservation_alone_leads_back_to_the_base_model(learner: Learner) -> None:
    batch = mixed(learner)
    first = float(learner.preservation_loss(batch, 3, 0).detach())
    optimizer = torch.optim.Adam(learner.adapter.parameters(), lr=2e-2)
    saved = learner.adapter.state_dict()
    for _ in range(15):
        optimizer.zero_grad()
        learner.preservation_loss(batch, 3, 0).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(learner.preservation_loss(batch, 3, 0).detach()) < 0.3 * first
    learner.adapter.load_state_dict(saved)


def test_an_empty_prompt_is_preserved_instead(learner: Learner) -> None:
    config = learner.config.model_copy(deep=True)
    config.objective.preserve = "blank"
    epochs = Epochs(learner.loader.epochs._plan, config)
    for number in range(4):
        captions = epochs.captions(number)
        assert epochs.preserved(number, captions) == [None if caption == "a toy" else "" for caption in captions]
    assert "" in (epochs.all_captions(8) or ())
    config.objective.preserve = "off"
    assert epochs.preserved(0, epochs.captions(0)) == []
    assert "" not in (epochs.all_captions(8) or ())


@pytest.mark.parametrize("captions", [{}, {"dropout": 0.5}, {"shuffle": True, "tag_dropout": 0.3}])
def test_every_prompt_to_preserve_is_known_beforehand(learner: Learner, captions: dict[str, Any]) -> None:
    config = learner.config.model_copy(deep=True)
    config.captions = config.captions.model_copy(update=captions)
    epochs = Epochs(learner.loader.epochs._plan, config)
    asked: set[str | None] = set()
    for number in range(12):
        asked |= {*epochs.captions(number), *epochs.preserved(number, epochs.captions(number))}
    asked.discard(None)
    assert epochs.all_captions(12) == asked
    assert epochs.all_captions(12, len(asked) - 1) is None


def test_without_a_trigger_or_a_class_it_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"captions\.trigger"):
        tiny_config(tiny_sd15, tmp_path, objective=CLASS, captions={"trigger": ""})
    with pytest.raises(ConfigError, match="preserve_class"):
        tiny_config(tiny_sd15, tmp_path, objective={"preserve": "class"})


def test_it_resumes_bit_for_bit_and_the_fused_step_is_the_same(tiny_sd15: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"objective": CLASS, "captions": {"trigger": "zqx", "dropout": 0.3}}

    def build(**optimizer: Any) -> Learner:
        config = tiny_config(
            tiny_sd15, tmp_path, **sections, optimizer={"max_grad_norm": 0.0} | optimizer, train={"batch_size": 2}
        )
        return tiny_learner(config)

    whole, resumed, fused = build(), build(), build(fused_backward=True)
    losses = [whole.run_step(step)[0] for step in range(2)]
    state, rest = whole.state()
    losses.append(whole.run_step(2)[0])
    resumed.load_state(state, rest)
    assert torch.equal(resumed.run_step(2)[0], losses[2])
    assert [fused.run_step(step)[0] for step in range(3)] == losses
    expected = whole.adapter.state_dict()
    for other in (resumed, fused):
        found = other.adapter.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
