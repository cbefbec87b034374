"""Foreign text made safe for the screen: file names, captions, exceptions, log lines, metadata.

Textual hands ESC bytes of any text to the terminal and reads markup in strings, so a caption could repaint the screen
or become a button. What passes through here is plain `Text` in which every control, bidi and surrogate character is a
visible mark.
"""

from __future__ import annotations

import unicodedata

from rich.text import Text

_KEEP_FORMAT = {"\u200c", "\u200d"}  # joiners that scripts and emoji need; they neither move nor hide text


def _visible(character: str) -> str:
    code = ord(character)
    category = unicodedata.category(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if category == "Cs":
        return f"<{code:02X}>" if not 0xDC80 <= code <= 0xDCFF else f"<{code - 0xDC00:02X}>"
    if category in ("Cc", "Zl", "Zp") or (category == "Cf" and character not in _KEEP_FORMAT):
        return f"<U+{code:04X}>"
    return character


def safe_str(value: object, *, lines: bool = False) -> str:
    """Return `value` as one harmless line: ESC as ␛, bidi overrides as <U+202E>, a stray byte as <FF>.

    With `lines`, newlines stay newlines and tabs become four spaces.
    """
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    if lines:
        text = text.replace("\r\n", "\n").expandtabs(4)
        return "\n".join(safe_str(line) for line in text.split("\n"))
    return "".join(map(_visible, text))


def safe_text(value: object, style: str = "", *, lines: bool = False) -> Text:
    """Return `value` as rich Text without markup, made harmless like `safe_str`."""
    return Text(safe_str(value, lines=lines), style=style)


def masked(text: str) -> str:
    """Return `text` with one visible character for each unsafe one, so that cursor positions in it stay right."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(shown if len(shown := _visible(character)) == 1 else "\ufffd" for character in text)
