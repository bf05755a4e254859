"""What `docker/` promises, as far as it shows without an engine; `make compose-test` shows the rest."""

from __future__ import annotations

import hashlib
import re
import shutil
import ssl
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from student_trainer.config import load_config
from teacher_server.cli import app
from teacher_server.tokens import parse_tokens
from tests.harness import ROOT

DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
STUDENTS = sorted((DOCKER / "students").glob("*.toml"))
LOCKS = sorted((DOCKER / "requirements").glob("*.txt"))
UNUSED = {"intel-cmplr-lib-ur==2024.2.1"}
"""Asked for by intel-openmp, and in no universal resolution: the tests run without it."""
_VARIABLE = re.compile(r"\$\{\w+:-([^}]*)\}")


def services() -> dict[str, dict[str, Any]]:
    """The services of compose.yaml, each variable at its default."""
    return yaml.safe_load(_VARIABLE.sub(r"\1", COMPOSE.read_text()))["services"]


def pins(path: Path) -> set[str]:
    return {line.partition(";")[0].strip() for line in path.read_text().splitlines()}


@pytest.mark.parametrize("name", services())
def test_a_service_is_confined(name: str) -> None:
    service = services()[name]
    assert service["read_only"]
    assert service["init"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "ports", "user", "network_mode", "pid"}


@pytest.mark.parametrize("name", [name for name in services() if name.startswith("student")])
def test_students_start_when_their_teachers_are_ready_and_have_a_token_by_file(name: str) -> None:
    service = services()[name]
    assert {needed["condition"] for needed in service["depends_on"].values()} == {"service_healthy"}
    assert service["environment"]["TEACHER_TOKEN_FILE"].startswith("/secrets/student/")
    assert "TEACHER_TOKEN" not in service["environment"]


@pytest.mark.parametrize("name", [name for name in services() if name.startswith("teacher")])
def test_a_teachers_command_line_is_one(name: str) -> None:
    _, bound, ignored = app.parse_args(services()[name]["command"], exit_on_error=False, print_error=False)
    [config] = bound.args
    assert not ignored
    assert config.host == "0.0.0.0"
    assert config.tokens == Path("/secrets/teacher/tokens.toml")


def test_nothing_else_given_starts_a_pool_of_two_an_rlvr_teacher_and_two_students() -> None:
    default = {name: service for name, service in services().items() if "profiles" not in service}
    assert set(default) == {"secrets", "models", "teacher", "teacher-rlvr", "student-reverse", "student-forward"}
    assert default["teacher"]["deploy"]["replicas"] == 2
    # Nobody has a GPU who did not ask for the profile.
    assert not any("resources" in service.get("deploy", {}) for service in default.values())


@pytest.mark.parametrize("path", STUDENTS, ids=lambda path: path.stem)
def test_a_students_config_shares_the_pool_and_the_held_out_problems(path: Path) -> None:
    config, other = load_config(path, ()), load_config(STUDENTS[0], ())
    assert config.teacher is not None
    assert config.teacher.url == "dns+grpc://teacher:8001"
    assert (config.run, config.model.path) == (f"/runs/{path.stem}", "/models/student")
    assert (config.task, config.eval) == (other.task, other.eval)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_runs_as_another_user_in_exec_form_with_a_health_check(path: Path) -> None:
    lines = path.read_text().replace("\\\n", " ").splitlines()
    last = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line and not line.startswith("#")}
    assert last["USER"] == "opd"
    assert last["ENTRYPOINT"].startswith('["python", "-m", ')
    assert re.search(r'CMD \["python", ', last["HEALTHCHECK"])
    assert re.search(r":\d+\.\d+\S*$", next(line for line in lines if line.startswith("ARG PYTHON_IMAGE")))


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_package_is_pinned(path: Path) -> None:
    assert all(re.fullmatch(r"[a-z0-9._-]+==\S+", pin) for pin in pins(path))
    if path.stem.endswith("-cpu"):
        assert pins(path) - pins(ROOT / "requirements/cpu.txt") <= UNUSED


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_secrets_are_made_once_and_fit_together(tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    teacher.mkdir()
    student.mkdir()
    command = [sys.executable, str(DOCKER / "make_secrets.py"), str(teacher), str(student)]
    subprocess.run(command, check=True)
    first = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    access = parse_tokens(first["tokens.toml"].decode(), "tokens.toml")
    assert {token.name: token.sha256 for token in access.tokens} == {
        name.removesuffix(".token"): hashlib.sha256(text).digest()
        for name, text in first.items()
        if name.endswith(".token")
    }
    assert len(access.tokens) == 3
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(teacher / "tls.pem", teacher / "tls.key")
    assert first["ca.pem"] == first["tls.pem"]
    # 0o600: nobody but the owner.
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()} == {0o600}
    subprocess.run(command, check=True)
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == first


def compose_command() -> list[str] | None:
    """Compose v2, docker-compose, or None."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        return ["docker", "compose"]
    return None


@pytest.mark.skipif(compose_command() is None, reason="needs Compose")
@pytest.mark.parametrize("profile", ["tls", "gpu"])
def test_compose_reads_the_file(profile: str) -> None:
    command = [*(compose_command() or ()), "--profile", profile, "-f", str(COMPOSE), "config", "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
