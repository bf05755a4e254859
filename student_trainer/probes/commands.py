"""`student-trainer probe ...`: flags to probes. Heavy imports happen inside the commands: `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from rich.console import Console

from student_trainer.probes.settings import ProbeOptions, ProbeSettings, load_settings

if TYPE_CHECKING:
    from student_trainer.probes.run import ProbeKind

app = App(
    name="probe", help="Measure, before a run is spent, what it would meet: teacher, loss, privileged information."
)

_Flags = Parameter(name="*")
Overrides = Annotated[str, Parameter()]

CUTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@app.command
def prefix(
    config: Path,
    *overrides: Overrides,
    options: Annotated[ProbeOptions, _Flags],
    cut: Annotated[tuple[float, ...], Parameter(negative=())] = CUTS,
) -> None:
    """How much worse a teacher is when it goes on from the student's answer instead of its own, by where it is cut.

    Args:
        config: A training config, or a TOML file with a [task].
        overrides: KEY.PATH=VALUE, as for train.
        cut: A share of the answer that is given, between 0 and 1; again for another.
    """
    settings = load_settings(config, overrides, options)
    _ = settings.teacher
    from student_trainer.probes.prefix import PrefixProbe

    _run(lambda subjects: PrefixProbe(subjects, cut), settings)


@app.command
def overlap(config: Path, *overrides: Overrides, options: Annotated[ProbeOptions, _Flags], top_k: int = 20) -> None:
    """How close teachers are to the student on its own rollouts; give --teacher again for each one to rank.

    Args:
        config: A training config, or a TOML file with a [task].
        overrides: KEY.PATH=VALUE, as for train.
        top_k: K of both models' lists.
    """
    settings = load_settings(config, overrides, options)
    from student_trainer.probes.overlap import OverlapProbe

    _run(lambda subjects: OverlapProbe(subjects, top_k), settings)


@app.command
def loss(config: Path, *overrides: Overrides, options: Annotated[ProbeOptions, _Flags]) -> None:
    """Where the loss in stage.loss pulls on real rollouts, against the full-vocabulary gradient; warns of leaks.

    Args:
        config: A training config of stage opd or opsd, or a TOML file with a [task].
        overrides: KEY.PATH=VALUE, as for train: stage.loss.kind=tail_reverse_kl stage.loss.top_k=5.
    """
    settings = load_settings(config, overrides, options)
    _ = settings.teacher
    from student_trainer.probes.loss import LossProbe

    _run(LossProbe, settings)


@app.command
def pi(config: Path, *overrides: Overrides, options: Annotated[ProbeOptions, _Flags], pis: int = 8) -> None:
    """What the privileged information in stage.privileged does: a shared rule, or each problem's own?

    Args:
        config: A training config of stage opd or opsd, or a TOML file with a [task].
        overrides: KEY.PATH=VALUE, as for train: stage.privileged.kind=answer.
        pis: Of how many problems' information the teacher is told on each rollout.
    """
    settings = load_settings(config, overrides, options)
    _ = settings.teacher
    from student_trainer.probes.pi import PiProbe

    _run(lambda subjects: PiProbe(subjects, pis), settings)


def _run(make: ProbeKind, settings: ProbeSettings) -> None:
    from student_trainer.probes.run import run_probe
    from student_trainer.progress import quiet_libraries

    quiet_libraries()
    run_probe(make, settings, Console())
