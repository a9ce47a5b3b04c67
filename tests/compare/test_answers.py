"""The final number of a worked answer: each form and each trap by hand, all of GSM8K, and numbers written anyhow."""

import gzip
import json
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from davir_ray.compare.answers import as_text, flexible_answer, strict_answer

Answer = str | None
# Text, strict answer, flexible answer ("=": the same).
CASES: list[tuple[str, Answer, Answer]] = [
    # ---- a calculation where the number is expected: its result counts
    ("#### 5 x 3 = 15", "15", "="),
    ("\\boxed{5 \\times 3 = 15}", "15", "="),
    ("#### 2 + 3 = 5 = 5", "5", "="),
    ("#### 18 (9 * 2 = 18)", "18", "="),
    ("#### 18 since x = 9", "18", "="),
    ("#### 7 x", "7", "="),
    ("The answer is 20 apples + 5 apples = 25 apples.", None, "25"),
    ("The answer is 5 x 3 = 15", None, "15"),
    ("The answer is $5 + $3 = $8", None, "8"),
    ("The answer is 3.5 + 2.5 = 6 dollars", None, "6"),
    ("The answer is 18 because 20 - 2 = 18", None, "18"),
    ("The answer is 18. Check: 9 * 2 = 17", None, "18"),
    # ---- #### and what may stand around the number
    ("#### 18", "18", "="),
    ("She earns 9 * 2 = $18.\n#### 18", "18", "="),
    ("####18", "18", "="),
    ("####    18   ", "18", "="),
    ("#### 18\n", "18", "="),
    ("#### 18.", "18", "="),
    ("#### 18.00", "18", "="),
    ("#### 018", "18", "="),
    ("#### 0", "0", "="),
    ("#### +5", "5", "="),
    ("#### $18", "18", "="),
    ("#### $ 18", "18", "="),
    ("#### \\$18", "18", "="),
    ("#### 18$", "18", "="),
    ("#### €18.50", "18.5", "="),
    ("#### £1,000", "1000", "="),
    ("#### USD 18", "18", "="),
    ("#### Rs. 18", "18", "="),
    ("#### 18 dollars", "18", "="),
    ("#### 18 km/h", "18", "="),
    ("#### 18km", "18", "="),
    ("#### 18 m^2", "18", "="),
    ("#### 50%", "50", "="),
    ("#### 50 %", "50", "="),
    ("#### 12.5\\%", "12.5", "="),
    ("#### **18**", "18", "="),
    ("**#### 18**", "18", "="),
    ("#### `18`", "18", "="),
    ("#### $18$", "18", "="),
    ("#### \\(18\\)", "18", "="),
    ("#### 70,000", "70000", "="),
    ("#### 1,234,567.89", "1234567.89", "="),
    ("#### 1 234", "1234", "="),
    ("#### 1 234 567", "1234567", "="),
    ("#### 1\u202f234", "1234", "="),
    ("#### 1\u00a0234 km", "1234", "="),
    ("#### 1{,}234", "1234", "="),
    ("#### 12,34,567", "1234567", "="),  # lakhs
    ("#### -7", "-7", "="),
    ("#### - 7", "-7", "="),
    ("#### \u22127", "-7", "="),
    ("#### -$7.25", "-7.25", "="),
    ("#### $-7.25", "-7.25", "="),
    ("#### .5", "0.5", "="),
    ("#### 3.140", "3.14", "="),
    ("#### 1/2", "0.5", "="),
    ("#### 1 / 3", "1/3", "="),
    ("#### 6/4 cups", "1.5", "="),
    ("#### 1 1/2", "1.5", "="),
    ("#### \\frac{1}{4}", "0.25", "="),
    ("#### -\\frac{1}{3}", "-1/3", "="),
    ("#### x = 18", "18", "="),
    ("#### Total: 18", "18", "="),
    ("#### 9*2 = 18", "18", "="),
    ("#### 20-2=18", "18", "="),
    ("#### Total: 9*2 = 18", "18", "="),
    ("#### The answer is 18", None, "18"),
    # ---- which mark counts
    ("#### 3\nNo, wait.\n#### 18", "18", "="),
    ("#### 18\nSo 9 * 2 = 20 is wrong.", "18", "="),
    ("#### 18\n\\boxed{19}", "19", "="),
    ("\\boxed{19}\n#### 18", "18", "="),
    ("#### 18\n####", "18", "="),
    ("#### 18\n#### none", "18", "="),
    ("#### 18\n\nQuestion: Tom has 5 apples.\nAnswer:\n#### 5", "18", "="),
    ("It is 18.\nQuestion: And 5 + 5?\n10", None, "18"),
    ("Question: What is 9 * 2?\nIt is 18.", None, "18"),
    # ---- headings of Markdown
    ("#### Step 2: add\n#### 18", "18", "="),
    ("#### Step 2: add 3 and 4", None, "4"),
    ("#### 3. Add up\nIt makes 18", None, "18"),
    ("#### 2) Add up\nIt makes 18", None, "18"),
    ("### 18", None, "18"),
    # ---- boxes
    ("\\boxed{18}", "18", "="),
    ("So $\\boxed{18}$.", "18", "="),
    ("\\boxed 18", "18", "="),
    ("\\boxed{ 18 }", "18", "="),
    ("\\fbox{18}", "18", "="),
    ("\\boxed{\\$18}", "18", "="),
    ("\\boxed{\\$1,234.50}", "1234.5", "="),
    ("\\boxed{50\\%}", "50", "="),
    ("\\boxed{18 \\text{ dollars}}", "18", "="),
    ("\\boxed{\\text{18 dollars}}", "18", "="),
    ("\\boxed{\\textbf{18}}", "18", "="),
    ("\\boxed{18\\text{ km/h}}", "18", "="),
    ("\\boxed{12\\text{ cm}^2}", "12", "="),
    ("\\boxed{12 \\, \\mathrm{kg}}", "12", "="),
    ("\\boxed{90^\\circ}", "90", "="),
    ("\\boxed{90^{\\circ}}", "90", "="),
    ("\\boxed{\\frac{1}{2}}", "0.5", "="),
    ("\\boxed{\\dfrac{3}{8}}", "0.375", "="),
    ("\\boxed{\\frac12}", "0.5", "="),
    ("\\boxed{-\\frac{1}{2}}", "-0.5", "="),
    ("\\boxed{1\\frac{1}{2}}", "1.5", "="),
    ("\\boxed{\\frac{10}{4} \\text{ cups}}", "2.5", "="),
    ("\\boxed{1{,}234}", "1234", "="),
    ("\\boxed{1,\\!234}", "1234", "="),
    ("\\boxed{1\\,234}", "1234", "="),
    ("\\boxed{x = 18}", "18", "="),
    ("\\boxed{9 \\times 2 = 18}", "18", "="),
    ("\\boxed{{18}}", "18", "="),
    ("\\boxed{3} then \\boxed{18}", "18", "="),
    ("\\boxed{18", None, "18"),
    ("\\boxed{}", None, None),
    ("\\boxed{\\text{none}} 7", None, "7"),
    # ---- no single plain number
    ("#### 3:45", None, "45"),
    ("#### 5-6", None, "6"),
    ("#### 5 to 6", "5", "="),
    ("#### 2^10", None, "10"),
    ("#### 2 \\times 10^3", None, "3"),
    ("#### 1e5", None, "5"),
    ("#### 1,2", None, "2"),
    ("#### 1.234.567", None, "567"),
    ("#### 1/2/3", None, "3"),
    ("#### 3/0", None, None),
    ("#### eighteen", None, None),
    ("#### N/A", None, None),
    ("\\boxed{\\sqrt{2}}", None, "2"),
    ("#### " + "9" * 5000, None, None),
    # ---- stated, not marked
    ("The answer is 18.", None, "18"),
    ("The answer is: 18", None, "18"),
    ("Answer: $18.50", None, "18.5"),
    ("answer = 18", None, "18"),
    ("The answer is **18** apples, not 20.", None, "18"),
    ("The final answer is $18$. I hope it is correct.", None, "18"),
    ("The answer is 3. No: the answer is 18. I used 2 steps.", None, "18"),
    ("The answer is that she earns $18 in 7 days.", None, "18"),
    ("The answer is 9 * 2 = 18.", None, "18"),
    ("The answer is unknown.\nOr 18.", None, "18"),
    # ---- the last number
    ("9 * 2 = 18", None, "18"),
    ("She earns $18 a day.", None, "18"),
    ("She earns $1,234.50.", None, "1234.5"),
    ("It costs 5, 6 or 7.", None, "7"),
    ("It is 20-2", None, "2"),
    ("It is -2", None, "-2"),
    ("It is 3 - 2", None, "2"),
    ("It takes 1/2 hour", None, "0.5"),
    ("<<9*2=18>>18 eggs", None, "18"),
    ("18.", None, "18"),
    ("no number", None, None),
    ("", None, None),
    ("$.,-/", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "strict", "flexible"), CASES)
def test_by_hand(text: str, strict: Answer, flexible: Answer) -> None:
    flexible = strict if flexible == "=" else flexible
    expected = [None if answer is None else Fraction(answer) for answer in (strict, flexible)]
    assert [strict_answer(text), flexible_answer(text)] == expected


def test_there_are_at_least_100_cases() -> None:
    assert len({text for text, *_ in CASES}) == len(CASES) >= 100


@pytest.mark.parametrize("name", ["gsm8k_test", "gsm8k_train"])
def test_every_answer_of_gsm8k_is_read(data_folder: Path, name: str) -> None:
    lines = gzip.decompress((data_folder / f"{name}.jsonl.gz").read_bytes()).decode().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) >= 60
    for answer in answers:
        expected = Fraction(answer.rsplit("\n#### ", 1)[1].replace(",", ""))
        assert strict_answer(answer) == flexible_answer(answer) == expected


def harness_strict(text: str) -> str | None:
    """lm-evaluation-harness 0.4, gsm8k.yaml: strict-match and what exact_match leaves out."""
    found = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    return re.sub(r"\.$", "", re.sub(r",|\$", "", found[0])) if found else None


def test_gsm8k_with_a_model_s_reply_is_read_as_the_harness_reads_it(data_folder: Path) -> None:
    """The same texts, extended and with other numbers; torn groups (2,12) are a number to the harness only."""
    lines = gzip.decompress((data_folder / "gsm8k_test.jsonl.gz").read_bytes()).decode().splitlines()
    for line in lines[:200]:
        answer = json.loads(line)["answer"]
        others = [] if "," in answer.rsplit("#### ", 1)[1] else [answer[:-1], answer + "0"]
        for text in (answer, answer + ".", answer + ",000", answer + "\nDone.", *others):
            theirs, ours = harness_strict(text), strict_answer(text)
            assert (theirs in (None, "")) == (ours is None)
            if theirs:
                assert ours == Fraction(theirs)


NUMBERS = st.one_of(
    st.integers(-(10**12), 10**12).map(Fraction),
    st.decimals(-(10**9), 10**9, allow_nan=False, places=4).map(Fraction),
)


def written(number: Fraction) -> dict[str, str]:
    """A number with finitely many decimals in the forms that people and models write."""
    decimal = Decimal(number.numerator) / Decimal(number.denominator)
    plain, grouped = f"{decimal:f}", f"{decimal:,f}"
    size, sign = grouped.lstrip("-"), "-" if number < 0 else ""
    thin = grouped.replace(",", "\u202f")
    return {
        "plain": plain, "grouped": grouped, "money": f"{sign}${size}", "money first": f"${grouped}", "thin": thin,
        "latex": grouped.replace(",", "{,}"), "more zeros": f"{plain}{'00' if '.' in plain else '.00'}",
        "fraction": f"{number.numerator}/{number.denominator}",
        "minus": grouped.replace("-", "\u2212"), "unit": f"{grouped} apples", "percent": f"{plain}%",
    }  # fmt: skip


@given(NUMBERS)
def test_a_number_is_read_in_every_form_in_every_place(number: Fraction) -> None:
    for form, text in written(number).items():
        for place in (f"So.\n#### {text}", f"So.\n#### **{text}**.", f"It is $\\boxed{{{text}}}$ then"):
            assert strict_answer(place) == number, (form, place)
        for place in (f"1 and 2. The answer is {text}.", f"From 1 and 2 comes {text}"):
            assert (strict_answer(place), flexible_answer(place)) == (None, number), (form, place)


@given(st.fractions(max_denominator=10**6))
def test_a_fraction_is_read_as_latex_and_its_text_is_exact(number: Fraction) -> None:
    sign = "-" if number < 0 else ""
    text = f"\\boxed{{{sign}\\frac{{{abs(number.numerator)}}}{{{number.denominator}}}}}"
    assert strict_answer(text) == number
    assert Fraction(as_text(number)) == number
    assert strict_answer(f"#### {as_text(number)}") == number


@given(st.text() | st.text("0123456789.,-/#$\\{} \nboxedanswris:="))
def test_any_text_is_read_without_an_error(text: str) -> None:
    strict, flexible = strict_answer(text), flexible_answer(text)
    assert strict is None or strict == flexible
