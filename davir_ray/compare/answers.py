r"""The final number of a worked answer, as an exact fraction, and whether two texts give the same one.

Two readings, as lm-evaluation-harness gives GSM8K (lm_eval/tasks/gsm8k/gsm8k.yaml, version 3):

    strict     what the text marks as its answer: `#### 18`, GSM8K's own form, or `\boxed{18}`, that of MATH
    flexible   the strict one, else what follows "the answer is", else the last number

The harness's strict-match is the regex `#### (\-?[0-9\.\,]+)`, its flexible-extract the last match of
`(-?[$0-9.,]{2,})|(-?[0-9]+)`; it then compares texts without commas, dollar signs and a final full stop. Here the box,
its braces matched, is read as Minerva's evaluation does (Lewkowycz et al. 2022, appendix D; the harness's
minerva_math), and numbers are compared as numbers: 18.00 = 18, 1/2 = 0.5, where the harness sees two texts. Of several
marks the last counts: models correct themselves. As with the harness's stop word, a line that begins with "Question:"
ends the text: what a model asks itself next is no answer. Of a calculation that is marked or stated the result counts:
of "20 apples + 5 apples = 25 apples" 25.

Units, currencies and per cent signs are passed over: 50% is 50. What is no single plain number (3:45, 5-6, 2^10, 1e5)
is no answer, rather than a part of it.
"""

import re
from decimal import Decimal, localcontext
from fractions import Fraction

ANSWERS_VERSION = 2
"""Raised when a change here may read another answer in the same text."""

_MOST_DIGITS = 1000
"""A model that repeats itself writes longer ones, and Python refuses to read them."""

_NEXT_QUESTION = re.compile(r"(?<=\S)\s*^[ \t]*Question:", re.MULTILINE)

# Spaces that group digits; LaTeX's become one of them.
_THIN = "\u2009"
_GROUPING = f"\u00a0\u202f{_THIN}"

_LATEX = [
    (re.compile(r"[\u2212\u2010\u2011]"), "-"),
    (re.compile(r"\\left|\\right|\\displaystyle|\\\(|\\\)|\\\[|\\\]|\*\*|__|`"), ""),
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"\\[,;:!]|\\ |~"), _THIN),
    (re.compile(r"\^\s*\{?\s*(?:\\circ|\u00b0)\s*\}?"), ""),
    (re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2 "),
    (re.compile(r"\\[dtc]?frac\s*([0-9])\s*([0-9])"), r" \1/\2 "),
    (re.compile(r"\\times|\\cdot"), "×"),
    (re.compile(r"\\approx"), "="),
    (re.compile(r"\\?[$€£¥₹]"), ""),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"^\s*-\s+(?=[.0-9])"), "-"),
    (re.compile(r"[{}]"), ""),
]

_PLAIN = r"(?:[0-9]+(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])|[0-9]{1,3}(?:[SPACES][0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_AMOUNT = rf"(?:{_PLAIN}|(?<![0-9])\.[0-9]+)"
_SIGN = r"(?:(?<![0-9A-Za-z)])[-+])?"
_NUMBER = (
    rf"(?P<sign>{_SIGN})(?:(?P<whole>[0-9]+)\s+(?=[0-9]+/[0-9]))?(?P<amount>{_AMOUNT})(?:\s*/\s*(?P<below>{_AMOUNT}))?"
)
# What makes it part of something else: a list, a time, a range, a product, a power, an exponent, a path of fractions.
_NOT_MORE = r"(?![0-9]|[.,][0-9]|\s*[:×xX*^/+]\s*[-(]?[0-9]|\s*[-\u2013]\s*[0-9]|[eE][-+]?[0-9])"

_IN_TEXT = re.compile(_NUMBER.replace("SPACES", _GROUPING))
_AT_START = re.compile(rf"\s*(?:[A-Z]{{2,3}}\s|Rs\.?)?\s*{_NUMBER.replace('SPACES', _GROUPING + ' ')}{_NOT_MORE}")
# "x = ", "Total: ", "9*2 = ", "20 apples + 5 apples = ", also several of them: the result stands behind the last.
_LEAD = re.compile(
    r"^\s*(?:[A-Za-z][A-Za-z ]{0,40}[=:]|[-+0-9.,\s×*/÷()%]*=|"
    r"[-+(]*[0-9](?:[^=.!?\n]|[.](?=[0-9])){0,80}?[-+×*/÷xX]\s*[(]?[0-9](?:[^=.!?\n]|[.](?=[0-9])){0,80}=)"
)
_HEADING = re.compile(r"\s*[.):]\s+\S")

_MARK = re.compile(r"####|\\(?:boxed|fbox)")
_STATED = re.compile(r"\banswer\s*(?:is|[:=])\s*:?", re.IGNORECASE)


def strict_answer(text: str) -> Fraction | None:
    """The last number that the text marks by #### or a box; None if there is none."""
    text = _of_first_question(text)
    for mark in reversed(list(_MARK.finditer(text))):
        rest = text[mark.end() :]
        found = _after_hashes(rest) if mark.group() == "####" else _in_box(rest)
        if found is not None:
            return found
    return None


def flexible_answer(text: str) -> Fraction | None:
    """The strict answer, else the last that is stated ("the answer is 18"), else the last number; None without any."""
    if (marked := strict_answer(text)) is not None:
        return marked
    text = _simplified(_of_first_question(text))
    for stated in reversed(list(_STATED.finditer(text))):
        line = text[stated.end() :].lstrip().partition("\n")[0]
        found = _leading(line)
        if found is None:
            found = next((value for match in _IN_TEXT.finditer(line) if (value := _value(match)) is not None), None)
        if found is not None:
            return found
    numbers = (_value(match) for match in reversed(list(_IN_TEXT.finditer(text))))
    return next((value for value in numbers if value is not None), None)


def as_text(number: Fraction) -> str:
    """The number in decimals where they end, else as a fraction in lowest terms."""
    with localcontext(prec=4 * _MOST_DIGITS):
        decimal = (Decimal(number.numerator) / Decimal(number.denominator)).normalize()
    return f"{decimal:f}" if Fraction(decimal) == number else str(number)


def _of_first_question(text: str) -> str:
    """The text up to where a model goes on to another question."""
    return _NEXT_QUESTION.split(text, maxsplit=1)[0]


def _after_hashes(rest: str) -> Fraction | None:
    """The number on the line after ####; a Markdown heading ("#### 3. Add up") is no answer."""
    return _leading(_simplified(rest.lstrip(" \t").partition("\n")[0]), may_be_heading=True)


def _in_box(rest: str) -> Fraction | None:
    """The number in the braces that follow, or that stands there without braces."""
    rest = rest.lstrip()
    if not rest.startswith("{"):
        return _leading(_simplified(rest.partition("\n")[0]))
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return _leading(_simplified(rest[1:place]))
    return None  # cut off


def _simplified(text: str) -> str:
    """Without LaTeX's and Markdown's dress, and without currencies."""
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text


def _leading(text: str, *, may_be_heading: bool = False) -> Fraction | None:
    """The number that a simplified text begins with, behind a name or a calculation of it."""
    while lead := _LEAD.match(text):
        text = text[lead.end() :]
    match = _AT_START.match(text)
    if match is None or (may_be_heading and _HEADING.match(text, match.end())):
        return None
    return _value(match)


def _value(match: re.Match[str]) -> Fraction | None:
    """The number that was matched; None for a division by zero, or more digits than any answer has."""
    if len(match.group()) > _MOST_DIGITS:
        return None
    whole, amount, below = (_plain(match[name]) for name in ("whole", "amount", "below"))
    if match["below"] is not None:
        if below == 0:
            return None
        amount = amount / below
    return (-1 if match["sign"] == "-" else 1) * (whole + amount)


def _plain(digits: str | None) -> Fraction:
    return Fraction(re.sub(rf"[,\s{_GROUPING}]", "", digits)) if digits else Fraction(0)
