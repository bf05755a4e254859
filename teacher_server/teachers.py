"""Which teachers are served, the version of each one's weights, and who may use or change them when.

The model's weights change in place, so a change waits for every item in flight and holds back the rest. An adapter's
new version stands beside the old one, which goes when its last item is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from protos.errors import Conflict, DeadlineExceeded, UnknownTeacher
from protos.records import ServedTeacher
from teacher_server.engines.base import Adapter

FIRST_VERSION = 0
"""Of the weights that the server starts with."""


@dataclass(eq=False)
class Weights:
    """One version of one teacher's weights; `unused` is set while no item is at work on it.

    Attributes:
        adapter: None for the model itself.
    """

    version: int
    adapter: Adapter | None = None
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    _num_users: int = 0

    def __post_init__(self) -> None:
        self.unused.set()

    def enter(self) -> None:
        """An item begins."""
        self._num_users += 1
        self.unused.clear()

    def leave(self) -> None:
        """An item ends."""
        self._num_users -= 1
        if not self._num_users:
            self.unused.set()


class ReadWriteLock:
    """Many readers or one writer; a writer that waits holds back new readers, so that a busy server can be changed."""

    def __init__(self) -> None:
        self._num_readers = 0
        self._num_writers = 0
        self._no_readers, self._no_writers = asyncio.Event(), asyncio.Event()
        self._no_readers.set()
        self._no_writers.set()
        self._one_writer = asyncio.Lock()

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[None, None]:
        """Waits for writers, those that wait themselves included."""
        while self._num_writers:  # a writer may have come between the event and this task's turn
            await self._no_writers.wait()
        self._num_readers += 1
        self._no_readers.clear()
        try:
            yield
        finally:
            self._num_readers -= 1
            if not self._num_readers:
                self._no_readers.set()

    @asynccontextmanager
    async def write(self) -> AsyncGenerator[None, None]:
        """Waits for the readers that are in."""
        self._num_writers += 1
        self._no_writers.clear()
        try:
            async with self._one_writer:
                await self._no_readers.wait()
                yield
        finally:
            self._num_writers -= 1
            if not self._num_writers:
                self._no_writers.set()


class Teachers:
    """The served teachers by name; must be built where the event loop runs.

    Args:
        model_names: what the model itself is called; the first is the default teacher.
        show: told of every change, for metrics.
    """

    def __init__(
        self, model_names: Collection[str], show: Callable[[tuple[ServedTeacher, ...]], None] = lambda _: None
    ) -> None:
        self._model = Weights(FIRST_VERSION)
        self._served = dict.fromkeys(model_names, self._model)
        self._default = next(iter(model_names))
        self._last_versions: dict[str, int] = {}
        self._model_lock = ReadWriteLock()
        self._next_change = asyncio.Event()
        self._show = show
        show(self.served)

    @property
    def served(self) -> tuple[ServedTeacher, ...]:
        """The teachers in the order of their coming, the default first."""
        return tuple(
            ServedTeacher(name, "adapter" if weights.adapter else "model", weights.version)
            for name, weights in self._served.items()
        )

    @property
    def num_adapters(self) -> int:
        """How many of them are adapters."""
        return sum(weights.adapter is not None for weights in self._served.values())

    def find(self, name: str) -> ServedTeacher | None:
        """The teacher of that name."""
        return next((teacher for teacher in self.served if teacher.name == name), None)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncGenerator[Weights, None]:
        """The teacher's weights of the moment ("" is the default's), unchanged while they are in use."""
        async with self._model_lock.read():
            weights = self._weights(name or self._default)
            weights.enter()
            try:
                yield weights
            finally:
                weights.leave()

    async def reach(self, names: Collection[str], min_version: int, max_wait_s: float, deadline: float | None) -> None:
        """Returns once all these teachers have at least `min_version`.

        Args:
            deadline: by the event loop's clock.

        Raises:
            Conflict: not within `max_wait_s` seconds.
            DeadlineExceeded: not by the deadline.
            UnknownTeacher: one is not, or no longer, served.
        """
        loop = asyncio.get_running_loop()
        patience = loop.time() + max_wait_s
        until = patience if deadline is None else min(patience, deadline)
        while behind := self._behind(names, min_version):
            if deadline is not None and loop.time() >= deadline:
                raise DeadlineExceeded(f"the caller's deadline passed before weights of version {min_version} came")
            if loop.time() >= patience:
                waited = f" within {max_wait_s:g} s" if max_wait_s else ""
                raise Conflict(
                    f"teacher {behind!r} has weights of version {self._weights(behind).version}; "
                    f"version {min_version} was asked for and did not come{waited}",
                    field="min_weights_version",
                )
            try:
                async with asyncio.timeout_at(until):
                    await self._next_change.wait()
            except TimeoutError:
                continue

    def check_version(self, name: str, version: int) -> None:
        """Raises Conflict unless `version` is above every one that this name has had."""
        last = self._last_version(name)
        if last is not None and version <= last:
            raise Conflict(
                f"teacher {name!r} has had weights of version {last}; version {version} is not above it",
                field="version",
            )

    @asynccontextmanager
    async def changing_model(self) -> AsyncGenerator[None, None]:
        """While no item is in flight, of whatever teacher; new ones wait."""
        async with self._model_lock.write():
            yield

    def replaced_model(self, version: int) -> None:
        """The model has new weights now; only inside `changing_model`."""
        self._model.version = version
        self._changed()

    def put_adapter(self, name: str, version: int, adapter: Adapter) -> Weights | None:
        """Serves the adapter under that name from now on; what it replaces is the caller's to retire."""
        replaced = self._served.get(name)
        assert replaced is None or replaced.adapter is not None
        self._served[name] = Weights(version, adapter)
        self._changed()
        return replaced

    def remove_adapter(self, name: str) -> Weights:
        """Serves that name no more; what it was is the caller's to retire."""
        weights = self._served.pop(name)
        self._last_versions[name] = weights.version
        self._changed()
        return weights

    def _weights(self, name: str) -> Weights:
        if name not in self._served:
            raise UnknownTeacher(f"no teacher {name[:80]!r} here; served: {', '.join(self._served)}", field="teacher")
        return self._served[name]

    def _behind(self, names: Collection[str], min_version: int) -> str | None:
        """The first of these teachers whose weights are older."""
        names = [name or self._default for name in names]
        return next((name for name in names if self._weights(name).version < min_version), None)

    def _last_version(self, name: str) -> int | None:
        if name in self._served:
            return self._served[name].version
        return self._last_versions.get(name)

    def _changed(self) -> None:
        self._next_change.set()
        self._next_change = asyncio.Event()
        self._show(self.served)
