import pytest

from student_trainer.config import parse_config
from student_trainer.progress import RECENT_STEPS, Progress, Rates, duration


def test_rates_are_those_of_the_last_steps():
    rates = Rates(100.0)
    assert rates.describe(10) == ""
    rates.add(104.0, 400)
    # One step of 4 s and 400 tokens; 10 more take 40 s.
    assert rates.describe(10) == "4.0 s/step  100 tokens/s  40 s left"
    for step in range(RECENT_STEPS):
        rates.add(104.0 + (step + 1) / 4, 300)
    # The slow step has left the window: 1/4 s and 300 tokens a step, 600 steps in 150 s.
    assert rates.describe(600) == "4.0 steps/s  1,200 tokens/s  2 min 30 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (7500, "2 h 05 min"), (97200, "1 d 03 h")],
)
def test_durations_are_read_in_two_units(seconds, text):
    assert duration(seconds) == text


def test_a_log_has_the_rates_and_the_time_left(capsys):
    tables = {"model": {"path": "m"}, "task": {"kind": "toy"}, "stage": {"kind": "sft"}}
    with Progress(parse_config({"run": "runs/x", "steps": 8, **tables}), start=3) as progress:
        progress.advance({"step": 4, "num_tokens": 10, "loss": 0.5})
    line = capsys.readouterr().err
    assert line.startswith("sft runs/x: step 4/8  ")
    assert " steps/s  " in line
    assert " tokens/s  0 s left  loss 0.500" in line
