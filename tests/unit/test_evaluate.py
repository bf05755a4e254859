import pytest

from student_trainer.evaluate import wilson_interval


def test_wilson_interval_of_a_known_case():
    """81 of 263, Newcombe 1998 (Statistics in Medicine 17:857), table I: .2553 to .3662."""
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_wilson_interval_stays_inside_at_the_ends():
    """0 of 20, same table: 0 to .1611."""
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)
