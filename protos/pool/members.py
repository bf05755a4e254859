"""Who is in a pool: replicas that join, are probed, agree, are chosen, and leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from random import Random

from protos.client import Teacher
from protos.errors import DeadlineExceeded, InvalidRequest, NotReady, TeacherError
from protos.pool import agreement, resolve
from protos.pool.options import PoolOptions
from protos.pool.replica import Replica
from protos.records import TeacherInfo

_log = logging.getLogger("protos.pool")


class Members:
    """The replicas behind a pool's URL.

    Args:
        url: see `protos.pool.resolve`.
        connect_one: the teacher at the URL of one replica.
        look_up: how names become addresses.

    Raises:
        InvalidRequest: the URL names no pool.
    """

    def __init__(
        self,
        url: str,
        connect_one: Callable[[str], Teacher],
        options: PoolOptions,
        random: Random,
        look_up: resolve.Resolve,
    ) -> None:
        self._url = url
        self._connect_one = connect_one
        self._options = options
        self._random = random
        self._look_up = look_up
        self._entries = resolve.entries(url)
        self._replicas: dict[str, Replica] = {}
        self._reference: tuple[str, TeacherInfo] | None = None
        self._info: TeacherInfo | None = None
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._looking_up: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._handshaking = asyncio.Lock()
        self._changed = asyncio.Event()
        self._closed = False
        for entry in self._entries:
            if not entry.startswith(resolve.DNS):
                self._join(entry)

    @property
    def replicas(self) -> Sequence[Replica]:
        """Those of now."""
        return tuple(self._replicas.values())

    @property
    def num_usable(self) -> int:
        """How many may be given work now."""
        return sum(replica.is_usable for replica in self._replicas.values())

    async def agreed_info(self) -> TeacherInfo:
        """What the pool is, as the last handshake found it; makes the first."""
        return self._info or await self.handshake()

    async def handshake(self) -> TeacherInfo:
        """Asks every replica what it is, and from then on keeps asking.

        After the first time a replica that is known to be away, or another teacher, is left to its own probes, which no
        caller waits for.

        Raises:
            InvalidRequest: two replicas are not the same teacher.
            TeacherError: none answers.
        """
        async with self._handshaking:
            self._check_open()
            await self._look_up_all()
            known = [replica for replica in self.replicas if not replica.refusal] if self._info else ()
            replicas = known or self.replicas
            replies = dict(zip(replicas, await asyncio.gather(*map(self._probe, replicas)), strict=True))
            infos = {replica: reply for replica, reply in replies.items() if isinstance(reply, TeacherInfo)}
            if not infos:
                raise _none_answers(self._url, [reply for reply in replies.values() if isinstance(reply, TeacherError)])
            self._check_open()
            self._agree(infos)
            self._info = agreement.merged(list(infos.values()))
            self._keep_asking()
            return self._info

    async def acquire(self, avoid: Collection[Replica], timeout_s: float | None) -> Replica:
        """A usable replica, at once where there is one; the caller counts its work (`Replica.loaded`) before it awaits.

        Raises:
            NotReady: none was usable within `unavailable_after_s`.
            DeadlineExceeded: none was usable within `timeout_s`.
        """
        patience_s = self._options.unavailable_after_s
        wait_s = patience_s if timeout_s is None else min(patience_s, timeout_s)
        try:
            async with asyncio.timeout(wait_s):
                while True:
                    self._check_open()
                    if (replica := self.choose(avoid)) is not None:
                        return replica
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            kind = NotReady if wait_s == patience_s else DeadlineExceeded
            raise kind(f"no replica of {self._url} took work for {wait_s:g} s: {self._reasons()}") from None

    def choose(self, avoid: Collection[Replica], *, strictly: bool = False) -> Replica | None:
        """The usable replica with the fewest tokens in flight; one to avoid only where there is no other.

        The plain minimum, ties broken at random. Two random choices (Mitzenmacher, 2001) would spare a look at every
        replica and the herding of clients that share stale loads; a pool knows its own few loads exactly.
        """
        usable = [replica for replica in self._replicas.values() if replica.is_usable]
        others = [replica for replica in usable if replica not in avoid]
        candidates = others or ([] if strictly else usable)
        return min(candidates, key=lambda replica: (replica.tokens_in_flight, self._random.random()), default=None)

    def changed(self) -> None:
        """Lets those who wait for a replica look again."""
        self._changed.set()

    async def aclose(self) -> None:
        """Ends the probes and closes every replica's connections; work in flight fails."""
        self._closed = True
        self.changed()
        tasks = [*self._watching.values(), *self._leaving]
        if self._looking_up is not None:
            tasks.append(self._looking_up)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(replica.teacher.aclose() for replica in self._replicas.values()))

    def _check_open(self) -> None:
        if self._closed:
            raise NotReady(f"the pool {self._url} is closed")

    def _join(self, url: str) -> None:
        self._replicas[url] = Replica(self._connect_one(url), self._options)

    async def _look_up_all(self) -> None:
        """Lets the replicas join that the URL stands for now, and those leave that it no longer does."""
        urls: list[str] = []
        for entry in self._entries:
            urls += await resolve.replica_urls(entry, self._look_up)
        for url in self._replicas.keys() - set(urls):
            replica = self._replicas.pop(url)
            _log.warning("%s has left %s", url, self._url)
            if watching := self._watching.pop(url, None):
                watching.cancel()
            leaving = asyncio.create_task(_leave(replica))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        for url in urls:
            if url not in self._replicas:
                self._join(url)

    async def _probe(self, replica: Replica) -> TeacherInfo | TeacherError:
        """Asks the replica what it is, and admits it if that is what the pool is; its answer or its error."""
        try:
            info = await replica.ask_info()
        except TeacherError as error:
            replica.refuse(error.message)
            return error
        if self._reference is not None:
            self._compare(replica, info, *self._reference)
        return info

    def _compare(self, replica: Replica, info: TeacherInfo, url: str, reference: TeacherInfo) -> str:
        """Admits the replica if it is what the pool is; else says what differs."""
        problem = agreement.differences(url, reference, replica.url, info)
        if problem:
            replica.refuse(problem)
        else:
            replica.admit()
            self.changed()
        return problem

    def _agree(self, infos: Mapping[Replica, TeacherInfo]) -> None:
        """Admits those that are one teacher, the first that ever answered; InvalidRequest when another is not."""
        first, info = next(iter(infos.items()))
        url, reference = self._reference or (first.url, info)
        problems = [self._compare(replica, info, url, reference) for replica, info in infos.items()]
        if any(problems):
            raise InvalidRequest("; ".join(filter(None, problems)))
        self._reference = url, reference

    def _keep_asking(self) -> None:
        for url, replica in self._replicas.items():
            if url not in self._watching:
                self._watching[url] = asyncio.create_task(self._watch(replica))
        if self._looking_up is None and any(entry.startswith(resolve.DNS) for entry in self._entries):
            self._looking_up = asyncio.create_task(self._look_up_again())

    async def _watch(self, replica: Replica) -> None:
        """Probes at intervals that differ from client to client, and at once when it is wanted."""
        while True:
            interval_s = self._options.probe_interval_s * self._random.uniform(0.5, 1.5)
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await replica.wanted.wait()
            replica.wanted.clear()
            try:
                await self._probe(replica)
            except Exception as error:  # whatever a network library raises, the replica must be asked again
                replica.refuse(f"{replica.url}: {type(error).__name__}: {error}")

    async def _look_up_again(self) -> None:
        while True:
            await asyncio.sleep(self._options.resolve_interval_s)
            try:
                await self._look_up_all()
            except Exception as error:  # whatever a resolver raises, the name must be looked up again
                _log.warning("%s; its replicas stay as they are", error)
            self._keep_asking()

    def _reasons(self) -> str:
        return "; ".join(
            f"{replica.url}: {replica.refusal or 'it failed too often'}" for replica in self._replicas.values()
        )


async def _leave(replica: Replica) -> None:
    """Lets what is in flight end, then closes the connections."""
    try:
        await replica.idle.wait()
    finally:
        await replica.teacher.aclose()


def _none_answers(url: str, errors: Sequence[TeacherError]) -> TeacherError:
    """One error for all: of their kind where they agree on it, so that a wrong token is not taken for an outage."""
    kinds = {type(error) for error in errors}
    kind = kinds.pop() if len(kinds) == 1 else NotReady
    return kind(f"no replica of {url} answers: {'; '.join(error.message for error in errors)}")
