import pytest

from pages.parts.progress import estimate_in_words, seconds_in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (89, "89 s"),
        (90, "2 min"),
        (3600, "60 min"),
        (9000, "2.5 hours"),
        (100_000, "28 hours"),
        (300_000, "3.5 days"),
    ],
)
def test_durations_are_told_in_units_that_fit(seconds, words):
    assert seconds_in_words(seconds) == words


def test_an_estimate_goes_on_after_takes():
    assert estimate_in_words(1) == "a few seconds"
    assert estimate_in_words(240) == "about 4 min"
    assert "not known" in estimate_in_words(None)
