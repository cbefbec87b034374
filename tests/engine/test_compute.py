"""Kernels that give the same bits each time: switched on for one run of the process, and off again for the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lorasmith.engine.compute import deterministic_kernels
from lorasmith.engine.errors import TrainingError


def switches() -> tuple[bool, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Set first, so that it is put back afterwards whoever changes it.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = switches()
    yield
    assert switches() == before


def test_every_switch_is_on_inside_and_as_before_afterwards() -> None:
    torch.backends.cudnn.benchmark = True
    try:
        with deterministic_kernels(True, pytest.fail):
            assert switches() == (True, False, True, False, False)
        assert switches()[2:] == (False, True, True)
    finally:
        torch.backends.cudnn.benchmark = False


def test_the_switches_are_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), deterministic_kernels(True, pytest.fail):
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_that_does_not_ask_for_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    before = switches()
    with deterministic_kernels(False, pytest.fail):
        assert switches() == before
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_the_workspace_of_cublas_is_set_before_the_gpu_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    warnings: list[str] = []
    for given, wanted in (("", ":4096:8"), (":16:8", ":16:8"), (":4096:2:16:8", ":4096:8")):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
        with deterministic_kernels(True, warnings.append):
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == wanted
    assert warnings == []


def test_where_the_gpu_has_started_already_the_run_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    warnings: list[str] = []
    for _ in range(2):
        with deterministic_kernels(True, warnings.append):
            pass
    assert len(warnings) == 1
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in warnings[0]


def test_an_operation_without_such_a_kernel_ends_the_run_in_words() -> None:
    with pytest.raises(TrainingError) as caught, deterministic_kernels(True, pytest.fail):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
    assert "put_" in caught.value.why
    assert caught.value.fix == "Set train.deterministic to false."


def test_other_errors_are_left_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="size"), deterministic_kernels(True, pytest.fail):
        torch.ones(2) @ torch.ones(3)
