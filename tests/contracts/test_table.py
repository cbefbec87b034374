"""The page says of base models and adapters what the tests prove."""

from __future__ import annotations

from lorasmith.engine.families import families
from tests.contracts.cells import ADAPTERS
from tests.contracts.table import KINDS, LETTERS, README, readme_table, with_table


def test_the_readme_has_the_present_table() -> None:
    page = README.read_text(encoding="utf-8")
    assert with_table(page) == page, "run: python -m tests.contracts.table"


def test_the_table_names_every_base_model_and_every_program_that_one_names() -> None:
    table = readme_table()
    for module in families().values():
        assert module.SPEC.label in table
        assert {key.partition("/")[0] for key in module.SPEC.readers} <= set(module.SPEC.layouts)
        assert {program for programs in module.SPEC.readers.values() for program in programs} <= set(LETTERS)
    assert set(KINDS.values()) <= set(ADAPTERS)
