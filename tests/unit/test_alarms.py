import math

import numpy as np
import pytest
import torch

from student_trainer import monitor
from student_trainer.alarms import Alarms, unknown_signals
from student_trainer.config import ConfigError, Rule, WatchConfig, parse_config
from student_trainer.roll_back import RollBack, adjusted, marks

TABLES = {"run": "r", "steps": 5, "model": {"path": "m"}, "task": {"kind": "toy"}}
OPD = TABLES | {"stage": {"kind": "opd"}, "teacher": {"url": "grpc://h:1"}}


def watch(*rules, **settings) -> WatchConfig:
    return WatchConfig(rules=tuple(Rule(**rule) for rule in rules), **settings)


def sounded(alarms: Alarms, values, signal="x", first_step=1):
    """The steps and actions of what sounds while the signal takes these values; None is a step that logs nothing."""
    rows = [
        {"step": step} | ({} if value is None else {signal: value}) for step, value in enumerate(values, first_step)
    ]
    return [(alarm.step, alarm.action) for row in rows for alarm in alarms.observe(row)]


def test_a_warning_sounds_once_each_time_the_signal_leaves_its_bounds():
    alarms = Alarms(watch({"signal": "x", "above": 1.0, "for_steps": 2}))
    # Out at 2, 3, 4: sounds at 3, the second on end. Back at 5. Out at 6 and 7: sounds at 7.
    assert sounded(alarms, [0, 2, 2, 2, 1, 2, 2]) == [(3, "warn"), (7, "warn")]


def test_steps_that_do_not_log_the_signal_or_log_nan_neither_count_nor_break():
    alarms = Alarms(watch({"signal": "x", "below": 0.0, "for_steps": 3}))
    assert sounded(alarms, [-1, None, -1, math.nan, -1, None]) == [(5, "warn")]


def test_steps_before_from_step_do_not_count():
    alarms = Alarms(watch({"signal": "x", "above": 0.0, "for_steps": 2, "from_step": 3}))
    assert sounded(alarms, [9, 9, 9, 9]) == [(4, "warn")]


def test_an_infinite_signal_is_above_every_threshold():
    assert sounded(Alarms(watch({"signal": "x", "above": 1e300})), [math.inf]) == [(1, "warn")]


def test_the_alarm_names_signal_value_threshold_and_steps():
    undone = [RollBack(from_step=30, to_step=20, sentence="", lr_scale=0.5, loss=None)]
    alarms = Alarms(watch({"signal": "x", "below": -0.05, "for_steps": 2}), roll_backs=undone)
    alarms.observe({"step": 24, "x": -0.1})
    (alarm,) = alarms.observe({"step": 25, "x": -0.12345})
    # Ten steps were undone: 35 in all.
    sentence = "step 25: x is -0.1235, below -0.05 since step 24, after 35 steps in all"
    assert alarm.row() == {
        "step": 25,
        "signal": "x",
        "value": -0.12345,
        "threshold": -0.05,
        "side": "below",
        "action": "warn",
        "num_steps": 35,
        "sentence": sentence,
    }


def test_a_rule_that_stops_stops_a_run_that_is_started_again():
    rule = {"signal": "x", "above": 1.0, "action": "stop"}
    alarms = Alarms(watch(rule))
    assert sounded(alarms, [0, 2]) == [(2, "stop")]
    history = [{"step": 1, "x": 0}, {"step": 2, "x": 2}]
    standing = Alarms(watch(rule), history).standing()
    assert standing is not None
    assert standing.step == 2
    assert "the run stops here, and goes on when the rule in `watch` is changed" in standing.sentence
    assert Alarms(watch(rule | {"above": 3.0}), history).standing() is None


def test_history_counts_and_does_not_sound_again():
    """Resumed after step 2, the signal sounds at step 3 as in the unbroken run; resumed after 3, no more."""
    rules = watch({"signal": "x", "above": 0.0, "for_steps": 3})
    history = [{"step": step, "x": 1} for step in (1, 2, 3)]
    assert sounded(Alarms(rules, history[:2]), [1], first_step=3) == [(3, "warn")]
    assert sounded(Alarms(rules, history), [1], first_step=4) == []


def test_roll_backs_are_counted_and_the_next_one_stops():
    rule = {"signal": "x", "above": 0.0, "action": "roll_back", "lr_scale": 0.5}
    once = [RollBack(from_step=5, to_step=3, sentence="", lr_scale=0.5, loss=None)]
    assert sounded(Alarms(watch(rule, max_roll_backs=1)), [1]) == [(1, "roll_back")]
    alarms = Alarms(watch(rule, max_roll_backs=1), roll_backs=once)
    assert sounded(alarms, [1]) == [(1, "stop")]
    standing = alarms.standing()
    assert standing is not None
    assert "as often as watch.max_roll_backs allows" in standing.sentence


def test_a_breach_that_may_roll_back_is_known_from_its_first_step():
    rule = {"signal": "x", "above": 0.0, "for_steps": 5, "action": "roll_back", "lr_scale": 0.5}
    alarms = Alarms(watch(rule))
    assert alarms.breached_since == math.inf
    sounded(alarms, [0, 1, 1])
    assert alarms.breached_since == 2


def test_the_gravest_alarm_is_last():
    alarms = Alarms(
        watch(
            {"signal": "x", "above": 0.0, "action": "stop"},
            {"signal": "x", "above": 0.0, "action": "roll_back", "lr_scale": 0.5},
            {"signal": "x", "above": 0.0},
        )
    )
    assert [action for _, action in sounded(alarms, [1])] == ["warn", "roll_back", "stop"]


def test_skipped_steps_past_the_limit_stop_the_run():
    alarms = Alarms(watch(max_skipped_steps=2))
    assert sounded(alarms, [0, 1, 2, 2, 3], signal="skipped_steps") == [(5, "stop")]


def test_a_signal_that_no_step_logs_is_named_with_the_one_that_was_meant():
    rules = [Rule(signal=name, above=0) for name in ("suport_gap", "eval/accuracy", "full/entropy", "loss")]
    assert unknown_signals(rules, {"loss": 0, "support_gap": 0}) == [
        "watch.rules: this run logs no 'suport_gap', so the rule never sounds; did you mean 'support_gap'?"
    ]


def test_roll_backs_change_the_rate_and_the_loss():
    config = parse_config(OPD | {"optim": {"lr": 0.8}})
    halved = RollBack(from_step=5, to_step=3, sentence="a", lr_scale=0.5, loss=None)
    changed = RollBack(from_step=6, to_step=4, sentence="b", lr_scale=None, loss={"kind": "forward_kl"})
    assert adjusted(config, []) == config
    after = adjusted(config, [halved, halved, changed])
    assert after.optim.lr == 0.2
    assert after.stage.loss.kind == "forward_kl"  # pyright: ignore[reportAttributeAccessIssue]
    assert marks([], 4) == {}
    assert marks([halved, changed], 5) == {"roll_backs": 2, "event": "rolled back: b"}
    assert marks([halved, changed], 6) == {"roll_backs": 2}


def test_a_rise_is_counted_from_the_lowest_mean_of_as_many_steps():
    alarms = Alarms(watch({"signal": "x", "above_lowest": 1.0, "for_steps": 2}))
    # Means of two: 4.5, 3, 2.5, 3.25, 4, 4.1: lowest 2.5 from step 4 on. 4 and 4.2 are above 3.5; 3.5 is not.
    rows = [{"step": step, "x": x} for step, x in enumerate((5, 4, 2, 3, 3.5, 4, 4.2), 1)]
    (alarm,) = [alarm for row in rows for alarm in alarms.observe(row)]
    assert (alarm.step, alarm.since, alarm.threshold) == (7, 6, 3.5)
    assert alarm.row()["threshold"] == 3.5
    assert alarm.sentence == (
        "step 7: x is 4.2, above 3.5 (its lowest so far and 1) since step 6, after 7 steps in all"
    )


def test_a_rise_in_standard_errors_is_of_means():
    alarms = Alarms(watch({"signal": "x", "errors_above_lowest": 2.0, "for_steps": 2}))
    # Means of two: 1, 1, 1, 1, 3, 6. At 6 the squares of the changes have the mean 4: error sqrt(4 / (2 * 2)) = 1,
    # threshold 1 + 2. At 7 they are 4, 4, 4, 4 and 36: error sqrt(10.4 / 4) = 1.612, threshold 4.225.
    rows = [{"step": step, "x": x} for step, x in enumerate((0, 2, 0, 2, 0, 6, 6), 1)]
    (alarm,) = [alarm for row in rows for alarm in alarms.observe(row)]
    assert (alarm.step, alarm.since, alarm.value) == (7, 6, 6)
    assert alarm.threshold == pytest.approx(1 + 2 * math.sqrt(10.4 / 4))
    assert alarm.sentence == (
        "step 7: x is 6, above 4.225 (its lowest so far and 2 standard errors, as means of 2 steps) since step 6, "
        "after 7 steps in all"
    )


def test_a_signal_that_never_changed_has_no_noise_to_be_measured_by():
    rule = {"signal": "x", "errors_above_lowest": 2.0}
    assert sounded(Alarms(watch(rule)), [0, 0, 0, 0.1]) == []
    assert sounded(Alarms(watch(rule)), [1, 2]) == []


def test_a_mean_may_roll_back_to_before_its_first_step():
    rule = {"signal": "x", "errors_above_lowest": 2.0, "for_steps": 3, "action": "roll_back", "lr_scale": 0.5}
    alarms = Alarms(watch(rule))
    assert sounded(alarms, [math.inf, 0, 1, 0, 1, 0]) == []
    assert alarms.breached_since == 4
    # Lowest mean 1/3, error sqrt(1 / (2 * 3)) = .41: the mean of steps 5 to 7, 10/3, is above 1.15.
    assert sounded(alarms, [9], first_step=7) == [(7, "roll_back")]
    assert alarms.breached_since == 5


def test_a_steady_divergence_sounds_no_default_rule_and_a_drift_within_its_noise_does():
    noise = np.random.default_rng(0).normal(0.02, 0.02, 2000)
    assert sounded(Alarms(WatchConfig()), noise, signal="reverse_kl") == []
    # Up by a noise of .02 in 20 steps: 10 errors of a mean of ten, .0632, in some 63 and the 5 to a mean's middle.
    drift = noise + 0.001 * np.maximum(0, np.arange(2000) - 500)
    (first, action), *_ = sounded(Alarms(WatchConfig()), drift, signal="reverse_kl")
    assert action == "warn"
    assert 500 < first < 600


def test_a_fall_is_counted_from_the_highest_mean_of_as_many_steps():
    alarms = Alarms(watch({"signal": "x", "below_highest": 0.5, "for_steps": 2}))
    # One high step alone is no peak: means .3, .55, .5, .15, .05; below .275 at 4 and 5.
    rows = [{"step": step, "x": x} for step, x in enumerate((0.3, 0.3, 0.8, 0.2, 0.1, 0.0), 1)]
    (alarm,) = [alarm for row in rows for alarm in alarms.observe(row)]
    assert (alarm.step, alarm.since, alarm.threshold) == (5, 4, 0.275)
    assert "below 0.275 (0.5 of its highest so far)" in alarm.sentence


def test_before_as_many_steps_as_a_mean_takes_nothing_is_high_or_low():
    alarms = Alarms(watch({"signal": "x", "above_lowest": 1.0, "for_steps": 3}))
    assert sounded(alarms, [0, 100, 100]) == []


def test_infinite_values_are_no_peak():
    alarms = Alarms(watch({"signal": "x", "below_highest": 0.5}))
    assert sounded(alarms, [1, math.inf, 1, 0.4]) == [(4, "warn")]


def test_the_lowest_and_highest_come_back_with_the_history():
    """Resumed at any step, the alarm is the unbroken run's."""
    rules = watch({"signal": "x", "above_lowest": 1.0, "for_steps": 2, "from_step": 2})
    values = [-9, 2, 2, 3, 4, 4]  # step 1 does not count: lowest 2, above 3 at 5 and 6
    rows = [{"step": step, "x": x} for step, x in enumerate(values, 1)]
    for done in range(6):
        assert sounded(Alarms(rules, rows[:done]), values[done:], first_step=done + 1) == [(6, "warn")]


def test_default_rules_stop_a_run_whose_divergence_or_answers_have_gone():
    """A stop undoes nothing; a roll-back would need a checkpoint of step 0 in every run."""
    acting = {(rule.signal, rule.action) for rule in WatchConfig().rules if rule.action != "warn"}
    assert acting == {("reverse_kl", "stop"), ("eval/accuracy_high", "stop")}


def test_the_default_rule_on_the_accuracy_waits_for_a_second_evaluation():
    """Upper ends of .8 (twice), then .39 twice, below half of .8; between them other steps, which are not evaluated."""
    alarms = Alarms(WatchConfig())
    assert sounded(alarms, [0.8, None, 0.8, None, 0.39, 0.39], signal="eval/accuracy_high") == [(6, "stop")]


def test_a_loss_below_a_twentieth_leaves_a_gap_at_least_as_wide():
    """Why no default rule reads the unnormalised loss: L >= P - Q at every token, for any p, q and support."""
    generator = torch.Generator().manual_seed(0)
    logp, logq = (torch.randn(1000, 22, generator=generator).mul(4).log_softmax(-1) for _ in range(2))
    logp, logq = logp[:, :3], logq[:, :3]
    everything = torch.ones_like(logp, dtype=torch.bool)
    gap = monitor.support_mass(logp, logq, everything).gap_BT
    assert (monitor.unnormalised_loss(logp, logq, everything) - gap).min() > -1e-6


ALL = "above, below, above_lowest, errors_above_lowest, below_highest"


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (
            {"signal": "x"},
            f"rule on x: no threshold given; give one of {ALL}",
        ),
        (
            {"signal": "x", "above": 1, "below": 0},
            f"rule on x: above and below given; give one of {ALL}",
        ),
        ({"signal": "x", "above": 1, "action": "roll_back"}, "roll_back needs lr_scale or loss"),
        ({"signal": "x", "above": 1, "lr_scale": 0.5}, 'lr_scale and loss are for action = "roll_back"'),
        ({"signal": "x", "above": 1, "for_step": 2}, "unknown key; did you mean 'for_steps'?"),
    ],
)
def test_a_rule_that_cannot_be_kept_is_one_sentence(rule, sentence):
    with pytest.raises(ConfigError) as caught:
        parse_config(OPD | {"watch": {"rules": [rule]}})
    assert sentence in str(caught.value)


def test_a_stage_without_a_loss_cannot_change_it():
    rule = {"signal": "x", "above": 1, "action": "roll_back", "loss": {"kind": "forward_kl"}}
    with pytest.raises(ConfigError, match="stage sft has no loss that a roll-back could change"):
        parse_config(TABLES | {"stage": {"kind": "sft"}, "watch": {"rules": [rule]}})
