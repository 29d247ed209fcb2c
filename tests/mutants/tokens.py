"""Just enough of a C++ tokenizer to find the places of a kernel that can be made wrong.

Sources are formatted by clang-format: a comparison has spaces around it, template brackets have none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""(?P<skip>//[^\n]*|/\*.*?\*/|^[ \t]*\#(?:[^\n]*\\\n)*[^\n]*)
    |"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[A-Za-z_]\w*|\d[\w.]*
    |::|->|<<|<=|>=|==|!=|&&|\|\||\+\+|--|\+=|-=|\*=|/=|%=|\|=|&=|\S""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
_CONSTANT = re.compile(
    r"k[A-Z]\w*|\d.*|sizeof|T|Out|In|int|float|unsigned|long|static_cast|is_half|nullptr|true|false"
)
_CONSTANT_BEFORE = ("static_assert", "alignas", "__align__", "__launch_bounds__")
OPEN, CLOSE = ("(", "[", "{"), (")", "]", "}")


@dataclass(frozen=True)
class Token:
    """A piece of the text, and where it is."""

    text: str
    start: int
    end: int
    spaced: bool
    """Whether white space is on both of its sides."""


class Source:
    """The tokens of a file, without comments and directives.

    Attributes:
        tokens: All tokens.
        constant: For each, whether it is in code that only the compiler evaluates.
        match: Of each bracket, the index of its partner.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = [
            Token(
                found[0],
                found.start(),
                found.end(),
                text[found.start() - 1].isspace() and text[found.end() : found.end() + 1].isspace(),
            )
            for found in _TOKEN.finditer(text)
            if not found["skip"]
        ]
        self.match: dict[int, int] = {}
        stack = []
        for i, token in enumerate(self.tokens):
            if token.text in OPEN:
                stack.append(i)
            elif token.text in CLOSE:
                self.match[i] = stack.pop()
                self.match[self.match[i]] = i
        self.constant = [False] * len(self.tokens)
        self._mark_constants()

    def __getitem__(self, i: int) -> str:
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def __len__(self) -> int:
        return len(self.tokens)

    def slice(self, first: int, last: int) -> str:
        """The text of tokens ``first`` to ``last``, both included."""
        return self.text[self.tokens[first].start : self.tokens[last].end]

    def is_constant(self, first: int, last: int) -> bool:
        """Whether an expression has the compiler's constants only."""
        words = [self[i] for i in range(first, last + 1)]
        return all(_CONSTANT.fullmatch(word) for word in words if re.match(r"\w", word))

    def operand(self, i: int, step: int) -> int:
        """The last token, leftwards (-1) or rightwards (1), of the primary expression that ends at i."""
        while True:
            if i in self.match:
                i = self.match[i]
            nearby = self[i + step]
            joined = nearby in ("::", ".", "->") or (
                step < 0
                and self[i] in ("(", "[")
                and re.match(r"\w|\]|\)|>", nearby) is not None
                and nearby not in ("return", "if", "for", "while")
                and not self.tokens[i + step].spaced
            )
            if step > 0 and nearby in ("(", "[") and re.match(r"\w|\]|\)", self[i]):
                joined = True
            if not joined:
                return i
            i += step
            if self[i] in ("::", ".", "->"):
                i += step
            elif self[i] == ">" and step < 0:  # of a template's arguments: its name comes before
                while self[i] != "<":
                    i -= 1
                i -= 1

    def left_end(self, i: int, stops: tuple[str, ...]) -> int:
        """The first token of the expression that ends at i, back to a token of `stops` or its bracket."""
        while i >= 0:
            if self[i] in OPEN or self[i] in stops or self[i] in (";", "{", "}"):
                return i + 1
            i = self.match[i] - 1 if self[i] in CLOSE else i - 1
        return 0

    def right_end(self, i: int, stops: tuple[str, ...]) -> int:
        """The last token of the expression that starts at i."""
        while self[i] not in CLOSE and self[i] not in stops and self[i] != ";":
            i = self.match[i] + 1 if self[i] in OPEN else i + 1
        return i - 1

    def _mark_constants(self) -> None:
        for i in range(len(self)):
            if self[i] in _CONSTANT_BEFORE or (self[i] == "constexpr" and self[i - 1] == "if"):
                self._mark(i, self.match[i + 1])
            elif self[i] in ("constexpr", "enum"):
                end = i
                while self[end] not in (";", "=", "("):
                    end += 1
                if self[end] != "(":  # else a function
                    while self[end] != ";":
                        end = self.match[end] + 1 if self[end] in OPEN else end + 1
                    self._mark(i, end)
            elif self[i] == "<" and (not self.tokens[i].spaced):
                self._mark(i, self._closing_angle(i))

    def _closing_angle(self, i: int) -> int:
        depth = 0
        while i < len(self):
            if self[i] in ("(", "["):
                i = self.match[i]
            depth += (self[i] == "<") - (self[i] == ">")
            if depth == 0:
                return i
            i += 1
        raise ValueError(f"no > in {self.text[:200]}")

    def _mark(self, first: int, last: int) -> None:
        for i in range(first, last + 1):
            self.constant[i] = True
