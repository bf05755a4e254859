"""The demo's line from end to end, at a hundredth of its size: that it runs, not what it gains."""

import json

import pytest

from student_trainer.report import write_report
from student_trainer.study import demo

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_the_demo_runs_from_end_to_end(tmp_path, capsys):
    sizes = demo.Sizes(
        teacher_steps=3, student_steps=2, opd_steps=3, swap_steps=1, opsd_steps=2, num_train=200, num_held_out=40
    )
    result = demo.run(demo.Demo(tmp_path, seed=0, sizes=sizes))
    # The student is the same and so are its rollouts, so the transports must agree on the first loss.
    assert result["loss_http"] == pytest.approx(result["loss_grpc"], abs=1e-5)
    assert result["closeness_before"]["num_tokens"] > 0
    assert result["closeness_after"] != result["closeness_before"]
    assert json.loads(json.dumps(result)).keys() == result.keys()
    report = write_report(tmp_path / "opd")
    demo.show(result, report)
    assert "share of the gap recovered" in capsys.readouterr().out
    assert report.stat().st_size > 10_000
