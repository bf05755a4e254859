"""The contract's package: light to import, generated code fresh, wire file lint-free, error table whole."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import grpc
import pytest

import protos
from protos.errors import ERRORS, TeacherError, error_from_name
from tests.harness import ROOT

HEAVY = {"torch", "vllm", "transformers", "fastapi", "teacher_server", "student_trainer"}


@pytest.mark.parametrize("module", ["protos", "protos.client", "protos._http", "protos._grpc", "protos.json_models"])
def test_the_contract_is_light(module: str) -> None:
    script = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_a_client_loads_only_its_own_transport() -> None:
    script = (
        "import sys; from protos.client import connect; connect('grpc://a:1');"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "grpc" in done.stdout.split()
    assert "httpx" not in done.stdout.split()


def test_every_module_of_the_contract_imports() -> None:
    names = [module.name for module in pkgutil.walk_packages(protos.__path__, "protos.")]
    assert "protos.client" in names
    for name in names:
        importlib.import_module(name)


def test_the_generated_code_is_fresh(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "protos.generate", str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == 0
    for name in ("teacher_pb2.py", "teacher_pb2.pyi", "teacher_pb2_grpc.py"):
        generated = tmp_path / "protos/teacher/v1" / name
        assert generated.read_text() == (ROOT / "protos/teacher/v1" / name).read_text(), (
            "run: python -m protos.generate"
        )


def test_the_wire_file_passes_buf_lint() -> None:
    buf = Path(sysconfig.get_path("scripts")) / "buf"
    done = subprocess.run([buf, "lint"], cwd=ROOT / "protos", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# The table of the contract, copied from its specification: name -> (HTTP, gRPC, retryable).
TABLE = {
    "InvalidRequest": (422, "INVALID_ARGUMENT", False),
    "ContextTooLong": (422, "OUT_OF_RANGE", False),
    "Unauthenticated": (401, "UNAUTHENTICATED", False),
    "PermissionDenied": (403, "PERMISSION_DENIED", False),
    "UnknownTeacher": (404, "NOT_FOUND", False),
    "Conflict": (409, "FAILED_PRECONDITION", False),
    "Overloaded": (429, "RESOURCE_EXHAUSTED", True),
    "NotReady": (503, "UNAVAILABLE", True),
    "DeadlineExceeded": (504, "DEADLINE_EXCEEDED", True),
    "EngineFailed": (500, "INTERNAL", False),
    "Corrupted": (400, "DATA_LOSS", True),
}


def test_the_error_table_is_the_specified_one() -> None:
    rows = {name: (error.row.http_status, error.row.grpc_code, error.row.retryable) for name, error in ERRORS.items()}
    assert rows == TABLE
    assert set(TeacherError.__subclasses__()) == set(ERRORS.values())


@pytest.mark.parametrize("name", ERRORS)
def test_grpc_codes_exist_and_names_rebuild(name: str) -> None:
    assert hasattr(grpc.StatusCode, ERRORS[name].row.grpc_code)
    error = error_from_name(name, "m", field="f", retry_after_s=1.0)
    assert (type(error), str(error), error.retry_after_s) == (ERRORS[name], "f: m", 1.0)
