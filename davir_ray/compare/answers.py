r"""The final number of a worked answer, as an exact fraction, and whether two texts give the same one.

There are two ways to extract it, as in lm-evaluation-harness for GSM8K (lm_eval/tasks/gsm8k/gsm8k.yaml, version 3):

    strict     the number that the text marks: `#### 18`, as in GSM8K, or `\boxed{18}`, as in MATH
    flexible   the strict answer, else the number after "the answer is", else the last number

The harness's strict-match is the regex `#### (\-?[0-9\.\,]+)`, its flexible-extract the last match of
`(-?[$0-9.,]{2,})|(-?[0-9]+)`; it then compares texts without commas, dollar signs and a final full stop. Here a box is
read with its braces matched, as in Minerva's evaluation (Lewkowycz et al. 2022, appendix D; minerva_math in the
harness), and numbers are compared as numbers: 18.00 = 18 and 1/2 = 0.5, where the harness compares different texts.

- If there are several marks, the last one counts: models correct themselves.
- A line that begins with "Question:" ends the text, like the harness's stop word: a model may go on to ask itself
  another question.
- If a calculation is marked or stated, its result counts: 25 in "20 apples + 5 apples = 25 apples".
- Units, currencies and percent signs are ignored: 50% is 50.
- Anything but a single plain number (3:45, 5-6, 2^10, 1e5) is not an answer, and neither is a part of it.

The package math-verify extracts other numbers from about a third of the cases in this module's tests ("50%", "1/2",
"#### 18 since x = 9", "-$7.25") and would add sympy and an ANTLR parser, so it is not used.
"""

import re
from collections.abc import Iterable
from decimal import Decimal, localcontext
from fractions import Fraction

ANSWERS_VERSION = 2
"""Increased when a change here may extract another answer from the same text; part of the stage's fingerprint."""

_MAX_DIGITS = 1000
"""Longer numbers are not answers: models that repeat themselves write them, and Python refuses to convert them."""

_NEXT_QUESTION = re.compile(r"(?<=\S)\s*^[ \t]*Question:", re.MULTILINE)

# Spaces that group digits; the spaces of LaTeX are replaced by the thin one.
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
# What makes a number part of something else: a list, time, range, product, power, exponent or chain of fractions.
_NOT_MORE = r"(?![0-9]|[.,][0-9]|\s*[:×xX*^/+]\s*[-(]?[0-9]|\s*[-\u2013]\s*[0-9]|[eE][-+]?[0-9])"

_IN_TEXT = re.compile(_NUMBER.replace("SPACES", _GROUPING))
_AT_START = re.compile(rf"\s*(?:[A-Z]{{2,3}}\s|Rs\.?)?\s*{_NUMBER.replace('SPACES', _GROUPING + ' ')}{_NOT_MORE}")
# What may stand before the result: "x = ", "Total: ", "9*2 = ", "20 apples + 5 apples = ", or several of these.
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
        if mark.group() == "####":  # a Markdown heading ("#### 3. Add up") is not an answer
            found = _leading(_simplified(rest.lstrip(" \t").partition("\n")[0]), may_be_heading=True)
        else:
            found = _in_box(rest)
        if found is not None:
            return found
    return None


def flexible_answer(text: str) -> Fraction | None:
    """The strict answer, else the last stated one ("the answer is 18"), else the last number; None if there is none."""
    if (marked := strict_answer(text)) is not None:
        return marked
    text = _simplified(_of_first_question(text))
    for stated in reversed(list(_STATED.finditer(text))):
        line = text[stated.end() :].lstrip().partition("\n")[0]
        found = _leading(line)
        if found is None:
            found = _first(map(_value, _IN_TEXT.finditer(line)))
        if found is not None:
            return found
    return _first(map(_value, reversed(list(_IN_TEXT.finditer(text)))))


def _first(values: Iterable[Fraction | None]) -> Fraction | None:
    return next((value for value in values if value is not None), None)


def as_text(number: Fraction) -> str:
    """The number as a decimal if that is finite, else as a fraction in lowest terms."""
    with localcontext(prec=4 * _MAX_DIGITS):
        decimal = (Decimal(number.numerator) / Decimal(number.denominator)).normalize()
    return f"{decimal:f}" if Fraction(decimal) == number else str(number)


def _of_first_question(text: str) -> str:
    """The text up to the point where a model goes on to another question."""
    return _NEXT_QUESTION.split(text, maxsplit=1)[0]


def _in_box(rest: str) -> Fraction | None:
    """The number in the braces that follow the mark, or directly after it if there are no braces."""
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
    """The text without LaTeX and Markdown markup and without currency signs."""
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text


def _leading(text: str, *, may_be_heading: bool = False) -> Fraction | None:
    """The number that a simplified text begins with, after a name (x =) or a calculation."""
    while lead := _LEAD.match(text):
        text = text[lead.end() :]
    match = _AT_START.match(text)
    if match is None or (may_be_heading and _HEADING.match(text, match.end())):
        return None
    return _value(match)


def _value(match: re.Match[str]) -> Fraction | None:
    """The number that was matched; None for a division by zero or for too many digits."""
    if len(match.group()) > _MAX_DIGITS:
        return None
    whole, amount, below = (_plain(match[name]) for name in ("whole", "amount", "below"))
    if match["below"] is not None:
        if below == 0:
            return None
        amount = amount / below
    return (-1 if match["sign"] == "-" else 1) * (whole + amount)


def _plain(digits: str | None) -> Fraction:
    return Fraction(re.sub(rf"[,\s{_GROUPING}]", "", digits)) if digits else Fraction(0)
