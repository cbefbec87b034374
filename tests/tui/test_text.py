"""Foreign text on the screen is visible, on one line, and nothing but text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.tui.text import masked, safe_str, safe_text

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31mred",
    "\u202egpj.exe",
    "back\x08space\x7f",
    "name\udcff.png",
    "line\u2028separator",
    "[/]",
    "[link=http://evil]x",
    "[@click=app.quit]x[/]",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_becomes_visible_marks(text: str) -> None:
    shown = safe_str(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") and c != "\u202e" for c in shown)
    shown.encode("utf-8")


def test_each_control_has_its_own_mark() -> None:
    assert safe_str("a\x1b\x07\x7fb") == "a␛␇␡b"
    assert safe_str("\u202e\x9b") == "<U+202E><U+009B>"
    assert safe_str("\udcff") == "<FF>"


def test_ordinary_text_of_any_language_stays() -> None:
    for text in ("ünï côdé 日本", "emoji 👩‍🎨", "zqx, a red circle"):
        assert safe_str(text) == text


def test_markup_is_plain_text() -> None:
    text = safe_text("[bold]x[/bold] [@click=app.quit]y[/]")
    assert text.plain == "[bold]x[/bold] [@click=app.quit]y[/]"
    assert text.spans == []


def test_newlines_stay_only_when_asked_for() -> None:
    assert safe_str("a\nb\r\nc") == "a␊b␍␊c"
    assert safe_str("a\nb\r\n\tc", lines=True) == "a\nb\n    c"


@given(st.text(alphabet=st.characters(), max_size=30))
def test_no_text_at_all_passes_a_control(text: str) -> None:
    for shown in (safe_str(text), masked(text)):
        assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in shown)


@given(st.text(max_size=30))
def test_masking_keeps_every_position(text: str) -> None:
    assert len(masked(text)) == len(text)
