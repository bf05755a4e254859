"""One of the teachers that a server has, as if it were the server's only one."""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import replace

from protos.client import Teacher
from protos.errors import UnknownTeacher
from protos.records import GenerateRequest, ScoreRequest, ServedTeacher, TeacherInfo, WeightsUpdate
from protos.service import GenerateStream, ScoreStream


async def named(teacher: Teacher, name: str) -> Teacher:
    """`teacher` itself where `name` is its default's; else that other teacher of its server, closed with it.

    Raises:
        UnknownTeacher: the server has no teacher of that name.
        TeacherError: it could not be asked.
    """
    info = await teacher.info()
    return teacher if _known(info, name) == info.teachers[0] else NamedTeacher(teacher, name)


class NamedTeacher(Teacher):
    """The teacher `name` behind `inner`; items that name none are its own, and it comes first in what `info` says."""

    def __init__(self, inner: Teacher, name: str) -> None:
        self._inner = inner
        self._name = name

    @property
    def url(self) -> str:
        """Where it is."""
        return self._inner.url

    async def info(self) -> TeacherInfo:
        """See TeacherService.

        Raises:
            UnknownTeacher: the server has no such teacher, or no longer.
        """
        info = await self._inner.info()
        name = _known(info, self._name)
        others = tuple(other for other in info.teachers if other != name)
        versions = {one.name: one.weights_version for one in info.served}
        return replace(info, teachers=(name, *others), weights_version=versions.get(name, info.weights_version))

    def score_stream(self, request: ScoreRequest, *, timeout_s: float | None = None) -> ScoreStream:
        """See TeacherService."""
        items = tuple(replace(item, teacher=item.teacher or self._name) for item in request.items)
        return self._inner.score_stream(replace(request, items=items), timeout_s=timeout_s)

    def generate_stream(self, request: GenerateRequest, *, timeout_s: float | None = None) -> GenerateStream:
        """See TeacherService."""
        items = tuple(replace(item, teacher=item.teacher or self._name) for item in request.items)
        return self._inner.generate_stream(replace(request, items=items), timeout_s=timeout_s)

    async def update_weights(
        self, update: WeightsUpdate, chunks: AsyncIterable[bytes] | None = None, *, timeout_s: float | None = None
    ) -> ServedTeacher:
        """See TeacherAdmin."""
        return await self._inner.update_weights(update, chunks, timeout_s=timeout_s)

    async def unload(self, teacher: str, *, timeout_s: float | None = None) -> ServedTeacher:
        """See TeacherAdmin."""
        return await self._inner.unload(teacher, timeout_s=timeout_s)

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._inner.aclose()


def _known(info: TeacherInfo, name: str) -> str:
    if name not in info.teachers:
        raise UnknownTeacher(
            f"teacher.name is {name!r}, which this server does not have; it has {', '.join(info.teachers)}",
            field="teacher.name",
        )
    return name
