"""What a page may say of a test."""

from dataclasses import replace

import pytest

from davir_ray.report.contrasts import Contrast, corrected

CONTRAST = Contrast(
    measure="loss", source=None, rows=100, reading="epochs", arm="selection", against="random", question="on average",
    num_heldout=400, num_differing=400, mean=-0.2, low=-0.3, high=-0.1, margin=0.02, degrees=8.0, p=0.01, p_level=0.9,
    p_models=0.001, untested=None, lower_is_better=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({}, "better"),
        ({"mean": 0.2}, "worse"),
        ({"lower_is_better": False}, "worse"),
        ({"p": 0.2}, "not resolved"),
        ({"p": 0.2, "p_level": 0.01}, "level"),
        ({"p": 0.01, "p_level": 0.01}, "better"),
        ({"p": None, "p_level": None, "untested": "one model each"}, ""),
    ],
)
def test_the_words_follow_from_the_tests(fields: dict[str, object], verdict: str) -> None:
    (found,) = corrected([replace(CONTRAST, **fields)], lambda _: True)
    assert found.verdict == verdict


def test_the_others_are_corrected_and_the_primary_is_not() -> None:
    tests = [replace(CONTRAST, p=0.02, arm=arm) for arm in ("selection", "rho", "lowest")]
    found = corrected(tests, lambda one: one.arm == "rho")
    assert [one.p_holm for one in found] == pytest.approx([0.04, 0.02, 0.04])
    many = corrected([replace(CONTRAST, p=0.02, rows=rows) for rows in range(5)], lambda one: one.rows == 0)
    assert [one.verdict for one in many] == ["better", *["not resolved"] * 4]
