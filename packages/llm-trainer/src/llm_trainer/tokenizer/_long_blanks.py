"""Cutting text around long runs of white space, at which a backtracking regex engine gives up."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# Unicode's White_Space, which is what \s of the split pattern means; Python's has four characters more.
_BLANKS = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG_RUN = re.compile(f"(?<![{_BLANKS}])[{_BLANKS}]{{1024,}}")
_LINE_BREAKS = re.compile("[\r\n]*")


def cut_around_long_blanks(text: str, *, line_breaks: bool = True) -> Iterator[tuple[str, bool]]:
    """Yield the parts of `text`, each with whether it is one piece that the split pattern would not divide.

    Cuts are made only where the split pattern makes them too, so that the parts' ids, one after the other,
    are the ids of the text. In a long run of blanks these places are:

    - behind the line breaks at its start, if they follow punctuation, whose piece takes them;
    - behind its last line break;
    - before its last blank, which the next word may take; or at the end of the text, behind it.

    The first two are for patterns to which line breaks are special (`line_breaks`); to GPT-2's they are not.
    """
    start = 0
    for run in _LONG_RUN.finditer(text):
        first, end = run.span()
        if line_breaks and first and unicodedata.category(text[first - 1])[0] not in "LN":
            breaks = _LINE_BREAKS.match(text, first, end)
            first = breaks.end() if breaks else first
        last_break = 0
        if line_breaks:
            last_break = max(text.rfind("\n", first, end), text.rfind("\r", first, end)) + 1
        tail = max(first, last_break)
        tail_end = end if end == len(text) else max(tail, end - 1)
        yield text[start:first], False
        yield text[first:tail], True
        yield text[tail:tail_end], True
        start = tail_end
    yield text[start:], False
