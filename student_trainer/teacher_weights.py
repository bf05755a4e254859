"""Sends weights to a teacher's server, which serves them from then on."""

from __future__ import annotations

import asyncio
from pathlib import Path

from protos.client import connect, read_chunks
from protos.credentials import Tls
from protos.records import ServedTeacher, WeightsUpdate
from student_trainer.config import ConfigError, TeacherConfig
from student_trainer.named_teacher import named

WEIGHTS_FILE = "model.safetensors"
"""Of a checkpoint's folder."""


def send_checkpoint(teacher: TeacherConfig, folder: Path) -> ServedTeacher:
    """The teacher takes the weights of that checkpoint, as the version after the one that it serves.

    Raises:
        ConfigError: the folder holds no full weights in one file.
        TeacherError: the server refused, or cannot be reached; it serves what it served before.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ConfigError(f"{folder} has no {WEIGHTS_FILE} to send to the teacher at {teacher.url}")
    return asyncio.run(_send(teacher, file))


async def _send(teacher: TeacherConfig, file: Path) -> ServedTeacher:
    async with connect(teacher.url, tls=Tls(ca=teacher.ca) if teacher.ca else None) as server:
        remote = await named(server, teacher.name) if teacher.name else server
        info = await remote.info()
        update = WeightsUpdate(info.teachers[0], version=info.weights_version + 1)
        return await remote.update_weights(update, read_chunks(file), timeout_s=teacher.timeout_s)
