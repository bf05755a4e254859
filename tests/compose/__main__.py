"""`make compose-test`: everything in docker/compose.yaml, up on a real engine, with a replica killed in mid-run.

Builds the images; brings all up; once both students learn, adds a third replica of the base teacher, waits until the
pool has found it by its name, and kills the first. Then: both students finish with their gain and their reports,
every replica had its share, nothing was lost, and every container ended as it should.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import tomllib

from tests.compose.stack import ROOT, compose, containers, docker, inspect, read, rows, scored, states, wait_for

STUDENTS = {"student-reverse": "reverse", "student-forward": "forward"}
"""Services, and the names of their configs and runs."""

MIN_GAP_RECOVERED = 0.5
"""Of the accuracy between the untrained student and its teacher. Set before the first run: a student that has closed
half of the gap has learnt from this teacher, and a loss with a wrong sign or shifted rows recovers none of it."""

MIN_SHARE = 0.1
"""Of all items, for a replica that was there from the start: least-loaded routing gives it about a third."""

STEPS_BEFORE_CHANGE = 5
READY_S = 900.0
FINISH_S = 2400.0
KILLED = 137
"""128 and the number of SIGKILL."""


def main() -> None:
    """Brings it up, checks, and takes it down; exits with 1 on the first thing that is not as it should be."""
    compose("down", "--volumes", "--remove-orphans")
    started = time.monotonic()
    try:
        compose("build")
        say(started, "images are built")
        compose("up", "--detach")
        say(started, "teachers are ready, students have started")
        check(started)
    except (AssertionError, subprocess.CalledProcessError) as error:
        compose("logs", "--tail=30")
        sys.exit(f"compose-test: {error}")
    finally:
        compose("down", "--volumes", "--remove-orphans")
    say(started, "passed")


def check(started: float) -> None:
    """From running students to stopped containers."""
    students = {service: containers(service)[0] for service in STUDENTS}
    metrics_token = read(students["student-reverse"], "/secrets/student/metrics.token")
    first, second = containers("teacher")

    def num_done(service: str) -> int:
        return rows(students[service], f"/runs/{STUDENTS[service]}/metrics.jsonl")[-1]["step"]

    for service in STUDENTS:
        wait_for(f"steps of {service}", lambda s=service: has_rows(students[s], s, STEPS_BEFORE_CHANGE), READY_S)
    compose("up", "--detach", "--no-deps", "--no-recreate", "--scale", "teacher=3", "teacher")
    [third] = set(containers("teacher")) - {first, second}
    wait_for("a third replica", lambda: inspect(third)["State"]["Health"]["Status"] == "healthy", READY_S)
    wait_for("work for the third replica", lambda: scored(third, metrics_token)[0] > 0, READY_S)
    say(started, "the pool has found a third replica")

    before = {name: scored(teacher, metrics_token)[0] for name, teacher in (("second", second), ("third", third))}
    killed_items = scored(first, metrics_token)[0]
    done = {service: num_done(service) for service in STUDENTS}
    assert all(num < settings(service)["steps"] for service, num in done.items()), f"too late for a kill: {done}"
    docker("kill", "--signal", "KILL", first)
    say(started, f"killed the first replica, at steps {done}")

    for service, student in students.items():
        wait_for(f"the end of {service}", lambda s=student: inspect(s)["State"]["Status"] == "exited", FINISH_S)
        say(started, f"{service} has ended")
    after = {name: scored(teacher, metrics_token) for name, teacher in (("second", second), ("third", third))}
    items = {"first": killed_items} | {name: num for name, (num, _) in after.items()}
    say(started, f"items scored by each replica: {items}")

    for service, student in students.items():
        check_student(service, student)
    check_shares(items)
    assert not any(failed for _, failed in after.values()), f"items failed: {after}"
    # Whatever was written after the step under way when the replica died was scored by those that were left.
    due = sum((settings(s)["steps"] - done[s] - 1) * settings(s)["problems_per_step"] for s in STUDENTS)
    since = sum(num for num, _ in after.values()) - sum(before.values())
    assert since >= due, f"{due} items were due after the kill, and {since} were asked for"
    check_rlvr()

    compose("stop")
    check_ends(first)


def check_student(service: str, student: str) -> None:
    """Every step is there, the accuracy has risen towards the teacher's, and the report is written."""
    run, steps = f"/runs/{STUDENTS[service]}", settings(service)["steps"]
    logged = rows(student, f"{run}/metrics.jsonl")
    assert [row["step"] for row in logged] == list(range(steps + 1)), f"{service}: steps are missing or doubled"
    assert all(math.isfinite(row["loss"]) for row in logged[1:]), f"{service}: a loss is not finite"
    assert logged[-1]["skipped_steps"] == 0, f"{service}: {logged[-1]['skipped_steps']} updates were skipped"
    teacher = json.loads(read(containers("models")[0], "/models/baselines.json"))["base"]
    before, after = logged[0], logged[-1]
    gap = teacher - before["eval/accuracy"]
    recovered = (after["eval/accuracy"] - before["eval/accuracy"]) / gap
    print(
        f"{service}: accuracy {before['eval/accuracy']:.3f} -> {after['eval/accuracy']:.3f}, teacher {teacher:.3f}; "
        f"{recovered:.0%} of the gap; {sum(row['num_tokens'] for row in logged[1:])} tokens trained on"
    )
    assert gap > 0, f"{service}: the student starts at {before['eval/accuracy']}, the teacher has {teacher}"
    assert recovered >= MIN_GAP_RECOVERED, f"{service}: {recovered:.0%} of the gap, not {MIN_GAP_RECOVERED:.0%}"
    assert after["eval/accuracy_low"] > before["eval/accuracy_high"], f"{service}: the gain may be chance"
    assert "<html" in read(student, f"{run}/report.html"), f"{service} left no report"


def check_shares(items: dict[str, float]) -> None:
    """The replicas that were there from the start had their share."""
    total = sum(items.values())
    for name in ("first", "second"):
        assert items[name] >= MIN_SHARE * total, f"the {name} replica scored {items[name]} of {total} items"


def check_rlvr() -> None:
    """The RLVR teacher answers by its own name, and is another model than the base teacher."""
    command = ["python", "-m", "teacher_server", "info", "--json", "grpc://127.0.0.1:8001"]
    names = []
    for service in ("teacher", "teacher-rlvr"):
        token = read(containers("student-reverse")[0], "/secrets/student/metrics.token")
        teacher = containers(service)[-1]
        names.append(json.loads(docker("exec", "-e", "TEACHER_TOKEN", teacher, *command, env={"TEACHER_TOKEN": token})))
    assert [name["model"] for name in names] == ["/models/base", "/models/rlvr"], names


def check_ends(killed: str) -> None:
    """Jobs and drained servers end with 0, and the killed replica as killed."""
    for container in containers():
        expected = KILLED if container == killed else 0
        code = inspect(container)["State"]["ExitCode"]
        assert code == expected, f"{states([container])} should have ended with {expected}"
    print(f"exit codes: {states()}")


def has_rows(student: str, service: str, num_rows: int) -> bool:
    """Whether a student has logged so many steps; AssertionError when it has ended before."""
    assert inspect(student)["State"]["Status"] == "running", f"{service} has ended early: {states([student])}"
    return len(rows(student, f"/runs/{STUDENTS[service]}/metrics.jsonl")) > num_rows


def settings(service: str) -> dict[str, int]:
    """The config of a student."""
    return tomllib.loads((ROOT / f"docker/students/{STUDENTS[service]}.toml").read_text())


def say(started: float, what: str) -> None:
    """One line of progress."""
    print(f"[{time.monotonic() - started:5.0f} s] {what}", flush=True)


if __name__ == "__main__":
    main()
