"""The service itself: validate -> compose -> admit -> score -> stamp. It knows neither HTTP nor gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import structlog

from protos.errors import DeadlineExceeded, EngineFailed, InvalidRequest, TeacherError
from protos.records import (
    Float32,
    GenerateItem,
    GenerateRequest,
    GenerateResult,
    Int32,
    Message,
    Sample,
    ScoreItem,
    ScoreRequest,
    ScoreResult,
    TeacherInfo,
    TokenizerFingerprint,
    crc32_of,
)
from protos.service import GenerateStream, ScoreStream
from protos.verify import errors_held, first
from teacher_server import validate
from teacher_server.admission import Admission, Ticket
from teacher_server.engines.base import Engine, EngineDeadError, GenerateTask, ScoreRows, ScoreTask
from teacher_server.observation import current, phase
from teacher_server.privileged import REFERENCE_TEMPLATES, Context, compose
from teacher_server.teachers import Teachers, Weights

_Result = TypeVar("_Result", ScoreResult, GenerateResult)

_log = structlog.get_logger()


class Tokenizer(Protocol):
    """What the core needs of a tokenizer."""

    eos_token_ids: tuple[int, ...]

    def render(self, messages: tuple[Message, ...]) -> Int32:
        """The chat's ids."""
        ...

    def decode(self, ids: Int32) -> str:
        """The ids' text."""
        ...

    def fingerprint(self, vocab_size: int) -> TokenizerFingerprint:
        """The fingerprint beside a model whose output has `vocab_size` rows."""
        ...


@dataclass(frozen=True)
class _Job(Generic[_Result]):
    """One validated item: what it costs in tokens, and how its teacher does it after `queue_s` seconds in the queue."""

    num_context_tokens: int
    num_new_tokens: int
    teacher: str
    run: Callable[[Weights, float], Awaitable[_Result]]


class TeacherCore:
    """A TeacherService over one engine.

    Attributes:
        dead: set once the engine is gone; the process should then end.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        admission: Admission,
        *,
        teachers: Teachers,
        max_items: int,
        max_top_k: int | None = None,
    ) -> None:
        self.dead = asyncio.Event()
        self._engine = engine
        self._tokenizer = tokenizer
        self._admission = admission
        self._teachers = teachers
        # One thread: chats must not block the event loop, and a tokenizer is not safe to share between threads.
        self._text_thread = ThreadPoolExecutor(1, "text")
        own = engine.info
        self._info = TeacherInfo(
            teachers=(),
            model=own.model,
            revision=own.revision,
            weights_version=0,
            tokenizer=tokenizer.fingerprint(own.vocab_size),
            max_context_tokens=own.max_context_tokens,
            max_top_k=own.max_top_k if max_top_k is None else min(max_top_k, own.max_top_k),
            max_candidates=own.max_candidates,
            max_items=max_items,
            supports=own.supports,
            exact_temperature=own.exact_temperature,
            prefix_cache=own.prefix_cache,
            dtype=own.dtype,
            engine=own.engine,
            engine_version=own.engine_version,
            score_path=own.score_path,
            determinism=own.determinism,
            weights_transfer=own.weights_transfer,
            num_workers=own.num_workers,
            reference_templates=tuple(REFERENCE_TEMPLATES),
        )

    async def info(self) -> TeacherInfo:
        """See TeacherService."""
        return self._info_now()

    def score_stream(self, request: ScoreRequest, *, timeout_s: float | None = None, client: str = "") -> ScoreStream:
        """See teacher_server.gate.Core."""
        return self._stream(request, self._plan_score, timeout_s, client)

    def generate_stream(
        self, request: GenerateRequest, *, timeout_s: float | None = None, client: str = ""
    ) -> GenerateStream:
        """See teacher_server.gate.Core."""
        return self._stream(request, self._plan_generate, timeout_s, client)

    async def died(self) -> None:
        """Returns once the engine is gone, noticed by a request or, while there is none, by the engine's own watch."""
        watches = [asyncio.create_task(self.dead.wait()), asyncio.create_task(self._engine.died())]
        try:
            await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            self.dead.set()
        finally:
            for watch in watches:
                watch.cancel()

    def _info_now(self) -> TeacherInfo:
        served = self._teachers.served
        names = tuple(teacher.name for teacher in served)
        return replace(self._info, teachers=names, weights_version=served[0].weights_version, served=served)

    def close(self) -> None:
        """Ends the tokenizer's thread; the engine is its owner's to close."""
        self._text_thread.shutdown(wait=False)

    async def _stream(
        self,
        request: ScoreRequest | GenerateRequest,
        plan: Callable[[Any, TeacherInfo], _Job[_Result]],
        timeout_s: float | None,
        client: str,
    ) -> AsyncGenerator[tuple[int, _Result | TeacherError], None]:
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        observation = current()
        observation.client, observation.num_items = client, len(request.items)
        tasks: list[asyncio.Task[None]] = []
        try:
            info = self._info_now()
            with phase("compose"):
                jobs = await loop.run_in_executor(self._text_thread, self._plan, request, plan, info)
            with phase("queue"):
                names = {job.teacher for job in jobs}
                await self._teachers.reach(names, request.min_weights_version, request.max_weights_wait_s, deadline)
            tickets = self._admission.admit([job.num_context_tokens + job.num_new_tokens for job in jobs], client)
            outcomes: asyncio.Queue[tuple[int, _Result | TeacherError]] = asyncio.Queue()
            tasks = [
                asyncio.create_task(self._do(i, job, ticket, outcomes, deadline))
                for i, (job, ticket) in enumerate(zip(jobs, tickets, strict=True))
            ]
            async with aclosing(errors_held(first(outcomes, len(jobs)))) as replies:
                async for index, outcome in replies:
                    item = request.items[index]
                    observation.add(item.teacher or info.teachers[0], item, outcome)
                    yield index, outcome
        except TeacherError as error:
            observation.error = error.name
            raise
        except (asyncio.CancelledError, GeneratorExit):
            observation.error = "Cancelled"
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _plan(
        self,
        request: ScoreRequest | GenerateRequest,
        plan: Callable[[Any, TeacherInfo], _Job[_Result]],
        info: TeacherInfo,
    ) -> list[_Job[_Result]]:
        """A job for every item, or the first item's error with its place in the request."""
        validate.check_request(request, info)
        jobs = []
        for i, item in enumerate(request.items):
            try:
                jobs.append(plan(item, info))
            except TeacherError as error:
                raise type(error)(error.message, field=f"items[{i}].{error.field}".rstrip(".")) from error
        return jobs

    def _plan_score(self, item: ScoreItem, info: TeacherInfo) -> _Job[ScoreResult]:
        validate.check_score_item(item, info)
        context = compose(item.prompt, item.privileged, self._tokenizer.render)
        num_tokens = len(item.completion_ids)
        validate.check_fits(context, num_tokens, "of the completion", info)
        return _Job(len(context.ids), num_tokens, item.teacher, partial(self._score, item, context))

    def _plan_generate(self, item: GenerateItem, info: TeacherInfo) -> _Job[GenerateResult]:
        validate.check_generate_item(item, info)
        prompt = compose(item.prompt, item.privileged, self._tokenizer.render)
        context = Context(
            np.concatenate([prompt.ids, item.prefix_ids]),
            prompt.num_prompt_tokens + len(item.prefix_ids),
            prompt.num_privileged_tokens,
        )
        validate.check_fits(context, item.max_new_tokens, "to write", info)
        num_new_tokens = item.max_new_tokens * item.num_samples
        return _Job(len(context.ids), num_new_tokens, item.teacher, partial(self._generate, item, context))

    async def _do(
        self,
        index: int,
        job: _Job[_Result],
        ticket: Ticket,
        outcomes: asyncio.Queue[tuple[int, _Result | TeacherError]],
        deadline: float | None,
    ) -> None:
        """Waits for the ticket, does the job, and reports its result or error."""
        queued_at = time.monotonic()
        outcome: _Result | TeacherError
        timeout = asyncio.timeout_at(deadline)
        try:
            async with timeout, AsyncExitStack() as held:
                with phase("queue"):
                    await ticket.granted.wait()
                    weights = await held.enter_async_context(self._teachers.use(job.teacher))
                with phase("engine"):
                    outcome = await job.run(weights, time.monotonic() - queued_at)
        except TeacherError as error:
            outcome = error
        except ValueError as error:
            outcome = InvalidRequest(f"the engine refuses this item: {error}", field=f"items[{index}]")
        except EngineDeadError as error:
            self.dead.set()
            outcome = EngineFailed(f"the engine is gone and this server is ending: {error}")
        except Exception as error:
            if timeout.expired():
                outcome = DeadlineExceeded("the caller's deadline passed before this item was done")
            else:
                _log.exception("engine failed")
                outcome = EngineFailed(f"the engine failed on this item: {type(error).__name__}: {error}")
        finally:
            self._admission.release(ticket)
        outcomes.put_nowait((index, outcome))

    async def _score(self, item: ScoreItem, context: Context, weights: Weights, queue_s: float) -> ScoreResult:
        started = time.monotonic()
        num_tokens = len(item.completion_ids)
        candidate_ids = np.empty((num_tokens, 0), np.int32) if item.candidate_ids is None else item.candidate_ids
        task = ScoreTask(
            context_ids=context.ids,
            completion_ids=item.completion_ids,
            temperature=item.temperature,
            top_k=item.top_k,
            candidate_ids=candidate_ids,
            entropy=item.entropy,
            adapter=weights.adapter,
        )
        rows = await self._engine.score(task) if num_tokens else _no_rows(task)
        return ScoreResult(
            sampled_logprobs=rows.sampled_logprobs,
            top_ids=rows.top_ids,
            top_logprobs=_as_sent(rows.top_logprobs, item),
            candidate_logprobs=_as_sent(rows.candidate_logprobs, item),
            entropy=rows.entropy,
            weights_version=weights.version,
            num_context_tokens=len(context.ids),
            num_cached_tokens=rows.num_cached_tokens,
            queue_s=queue_s,
            engine_s=time.monotonic() - started,
            completion_crc32=crc32_of(task.completion_ids),
            half_precision=item.half_precision,
        )

    async def _generate(self, item: GenerateItem, context: Context, weights: Weights, queue_s: float) -> GenerateResult:
        started = time.monotonic()
        eos = () if item.ignore_eos else self._tokenizer.eos_token_ids
        task = GenerateTask(
            context_ids=context.ids,
            max_new_tokens=item.max_new_tokens,
            temperature=item.temperature,
            top_p=item.top_p,
            top_k=item.top_k,
            num_samples=item.num_samples,
            seed=item.seed,
            stop_token_ids=tuple(dict.fromkeys(eos + item.stop_token_ids)),
            adapter=weights.adapter,
        )
        written = await self._engine.generate(task)
        loop = asyncio.get_running_loop()
        texts = await loop.run_in_executor(
            self._text_thread, lambda: [self._tokenizer.decode(sample.token_ids) for sample in written.samples]
        )
        return GenerateResult(
            samples=tuple(
                Sample(sample.token_ids, sample.logprobs, sample.finish_reason, text)
                for sample, text in zip(written.samples, texts, strict=True)
            ),
            weights_version=weights.version,
            num_context_tokens=len(context.ids),
            num_cached_tokens=written.num_cached_tokens,
            queue_s=queue_s,
            engine_s=time.monotonic() - started,
        )


def _as_sent(logprobs: Float32, item: ScoreItem) -> Float32:
    """What the item's precision leaves of the log-probs, so that every transport carries the same values."""
    if not item.half_precision:
        return logprobs
    with np.errstate(over="ignore"):  # beyond float16's range a probability is 0 for every purpose
        return logprobs.astype(np.float16).astype(np.float32)


def _no_rows(task: ScoreTask) -> ScoreRows:
    """The answer to an empty completion: empty arrays of the asked widths, without the engine."""
    return ScoreRows(
        sampled_logprobs=np.empty(0, np.float32),
        top_ids=np.empty((0, task.top_k), np.int32),
        top_logprobs=np.empty((0, task.top_k), np.float32),
        candidate_logprobs=np.empty((0, task.candidate_ids.shape[1]), np.float32),
        entropy=np.empty(0, np.float32) if task.entropy else None,
        num_cached_tokens=0,
    )
