"""Which characters this terminal can draw: braille, half blocks, or plain ASCII."""

from __future__ import annotations

import locale
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

GlyphName = Literal["braille", "block", "ascii"]
Dots = npt.NDArray[np.bool_]

# Bit of each dot of a braille cell, (4 rows, 2 columns), Unicode chapter 21.1.
_BRAILLE_BITS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


@dataclass(frozen=True)
class GlyphSet:
    """How dots, bars, lines and words of decoration look.

    A cell holds `dots_high` x `dots_wide` dots; `cells[bits]` is its character, bit order as in `draw`.
    """

    name: GlyphName
    dots_high: int
    dots_wide: int
    cells: str
    bar_full: str
    bar_empty: str
    vertical: str
    corner: str
    horizontal: str
    tick: str
    separator: str
    ellipsis: str
    cross: str
    diamond: str
    half_blocks: bool

    def draw(self, dots: Dots) -> list[str]:
        """Turn a grid of dots, shape (rows * dots_high, columns * dots_wide), into rows of characters."""
        rows, columns = dots.shape[0] // self.dots_high, dots.shape[1] // self.dots_wide
        grid = dots.reshape(rows, self.dots_high, columns, self.dots_wide)
        if self.name == "braille":
            bits = np.einsum("rhcw,hw->rc", grid, _BRAILLE_BITS)
        else:
            bits = grid[:, 0, :, 0] + 2 * grid[:, 1, :, 0]
        marks = np.array(list(self.cells))[bits]
        # One string a row out of its characters, without a Python step for each cell.
        return [str(row) for row in np.ascontiguousarray(marks).view(f"<U{columns}")[:, 0].tolist()]


BRAILLE = GlyphSet(
    "braille",
    4,
    2,
    " " + "".join(map(chr, range(0x2801, 0x2900))),
    "━",
    "─",
    "│",
    "└",
    "─",
    "┴",
    "·",
    "…",
    "×",
    "◆",
    True,
)
BLOCK = GlyphSet("block", 2, 1, " ▀▄█", "█", "░", "│", "└", "─", "┴", "·", "…", "×", "■", True)
ASCII = GlyphSet("ascii", 2, 1, " '.:", "#", "-", "|", "+", "-", "+", "-", "~", "x", "o", False)


def detect_glyphs(environ: Mapping[str, str] | None = None, encoding: str | None = None) -> GlyphSet:
    """Choose the richest set that the terminal can show.

    `LORASMITH_ASCII=1` or a locale that is not UTF-8 gives ASCII; the Linux console has no braille in its font.
    """
    environ = os.environ if environ is None else environ
    encoding = locale.getpreferredencoding(False) if encoding is None else encoding
    if environ.get("LORASMITH_ASCII", "0") not in ("", "0"):
        return ASCII
    if encoding.lower().replace("-", "").replace("_", "") != "utf8":
        return ASCII
    return BLOCK if environ.get("TERM", "") in ("linux", "vt100", "vt220") else BRAILLE
