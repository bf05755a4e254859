"""Regenerates the protobuf and gRPC code beside teacher.proto: `python -m protos.generate [FOLDER]`.

FOLDER (default: the repository's root) receives the generated files under protos/teacher/v1/.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = "protos/teacher/v1/teacher.proto"


def generate(folder: Path = ROOT) -> None:
    """Writes the generated code under `folder`; raises RuntimeError where protoc refuses the file."""
    from grpc_tools import protoc

    status = protoc.main(
        [
            "protoc",
            f"-I{ROOT}",
            f"--python_out={folder}",
            f"--pyi_out={folder}",
            f"--grpc_python_out={folder}",
            str(ROOT / PROTO),
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status} on {PROTO}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
