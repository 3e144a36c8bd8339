"""``AnswerPainter``: turns the pieces of an answer into lines for the terminal, wrapped at words and lightly coloured.

Nothing is left out: the marks of Markdown stay, so that what is copied from the terminal is what the model wrote. Code
blocks are not wrapped.
"""

from __future__ import annotations

import re
from collections.abc import Callable

BOLD, DIM, CYAN, RESET = "\x1b[1m", "\x1b[2m", "\x1b[36m", "\x1b[0m"
_HEADING = re.compile("#{1,6}")
_FENCES = ("```", "~~~")
_MARKS = re.compile(r"(\*\*|`)")


class AnswerPainter:
    """``columns`` returns the terminal's width, which may change while the answer comes. ``text_width`` returns how
    many columns a text takes. ``is_plain``: without colours. ``base``: the colour of all of it; then the marks of
    Markdown have no meaning.

    A word is held back until its end is there: only then it is known whether it fits into the line."""

    def __init__(
        self, columns: Callable[[], int], text_width: Callable[[str], int], *, is_plain: bool, base: str = ""
    ) -> None:
        self._columns = columns
        self._text_width = text_width
        self._is_plain = is_plain
        self._base = base
        self._word = ""
        self._blanks = ""  # the blanks and tabs before the next word of this line
        self._column = 0
        self._is_line_begin = True  # the line has no word yet
        self._in_block = False  # in a code block
        self._is_fence = False  # this line opens or closes a code block
        self._is_heading = False
        self._in_code = False  # between two marks ` of a line
        self._in_bold = False  # between two marks ** of a line

    def feed(self, text: str) -> str:
        """The part of the answer that can be shown after this piece."""
        parts = []
        for character in text:
            if character == "\n":
                parts.append(self._end_word() + self._end_line())
            elif character in " \t":
                parts.append(self._end_word())
                self._blanks += character
            else:
                is_wide = ord(character) >= 0x1100 and self._text_width(character) > 1
                if is_wide:  # scripts without blanks may be wrapped before each character
                    parts.append(self._end_word())
                self._word += character
                if is_wide:
                    parts.append(self._end_word())
        return "".join(parts)

    def end(self) -> str:
        """The rest of the answer, with a line break if its last line lacks one."""
        rest = self._end_word()
        if self._column > 0:
            rest += self._end_line()
        return rest

    def _end_word(self) -> str:
        """Ends the word that was held back, if there is one. Returns what to show: the blanks before it, or a line
        break if it does not fit into the line, and the word."""
        word, self._word = self._word, ""
        if not word:
            return ""
        if self._is_line_begin:
            self._begin_line(word)
        blanks, self._blanks = self._blanks, ""
        end = len((" " * self._column + blanks).expandtabs()) + self._text_width(word)
        is_code = self._in_block or self._is_fence
        if self._column > 0 and end > self._columns() - 1 and not is_code:
            blanks, end = "\n", self._text_width(word)
        self._column = end
        return blanks + self._colour(word)

    def _begin_line(self, word: str) -> None:
        """Notes what the first word of a line makes of the line."""
        self._is_line_begin = False
        if self._base:
            return
        self._is_fence = word.startswith(_FENCES)
        self._is_heading = not self._in_block and bool(_HEADING.fullmatch(word))

    def _end_line(self) -> str:
        """Forgets what was true of this line only. Returns the line break to show."""
        if self._is_fence:
            self._in_block = not self._in_block
        self._is_line_begin, self._is_fence, self._is_heading = True, False, False
        self._in_code = self._in_bold = False  # a mark that was not closed colours its line only
        self._blanks, self._column = "", 0
        return "\n"

    def _colour(self, word: str) -> str:
        """The word with its colours. Its marks switch bold and code on or off, also for the words after it."""
        if self._is_plain:
            return word
        if self._base:
            return f"{self._base}{word}{RESET}"
        if self._in_block or self._is_fence:
            return f"{CYAN}{word}{RESET}"
        parts = []
        for part in _MARKS.split(word):
            is_bold_mark, is_code_mark = part == "**" and not self._in_code, part == "`"
            was_bold, was_code = self._in_bold, self._in_code
            if is_bold_mark:
                self._in_bold = not self._in_bold
            elif is_code_mark:
                self._in_code = not self._in_code
            if part:
                parts.append(self._style(was_bold or self._in_bold, was_code or self._in_code, part))
        return "".join(parts)

    def _style(self, is_bold: bool, is_code: bool, text: str) -> str:
        start = (BOLD if is_bold or self._is_heading else "") + (CYAN if is_code else "")
        return f"{start}{text}{RESET}" if start else text
