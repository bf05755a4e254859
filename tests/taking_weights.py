"""A real server of the transformers engine that takes other weights from whoever holds its token."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from teacher_server import auth
from teacher_server.engines.transformers import TransformersEngine
from teacher_server.served_model import ServedModel
from teacher_server.teachers import Teachers
from teacher_server.weights import WeightsAdmin
from tests.harness import Server, core_over, start_server

SECRET = "of-the-run"
ACCESS = auth.Access((auth.Token("trainer", auth.sha256_of(SECRET), frozenset(auth.SCOPES)),))


@asynccontextmanager
async def taking_weights(model: Path, spool: Path) -> AsyncGenerator[Server, None]:
    """Serves `model` until it is sent others; `spool` is an empty folder for what arrives."""
    engine, teachers = TransformersEngine(str(model)), Teachers(("base",))
    core = core_over(engine, model, teachers=teachers)
    admin = WeightsAdmin(engine, teachers, ServedModel.find(str(model), None), spool=spool)
    server = await start_server(None, access=ACCESS)
    server.gate.open(core, admin=admin)
    await server.listeners.set_ready(True)
    try:
        yield server
    finally:
        await server.stop()
        await admin.close()
        core.close()
        await engine.close()
