"""A `Teacher` over a stock vLLM server (`vllm serve`): what it can give exactly, and a refusal of all else.

A completion is scored by `POST /v1/completions` with `prompt_logprobs`: row p maps ids to log-probs and ranks, the K
most likely ids and the prompt's own (vLLM 0.32.0, `CompletionResponseChoice.prompt_logprobs`). There the server ignores
the temperature and knows no ids of the caller's; nowhere does it name its tokenizer (see `OpenAITeacher.detokenize`).
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import httpx
import numpy as np

from protos import verify
from protos._http import CONNECT_TIMEOUT_S, error_of_status
from protos._openai_limits import check_generate_item, check_request, check_score_item
from protos._openai_rows import read_rows, read_sample
from protos.client import Teacher
from protos.credentials import Credentials
from protos.errors import (
    ContextTooLong,
    Corrupted,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    NotReady,
    TeacherError,
)
from protos.fingerprint import UNKNOWN
from protos.records import (
    Chat,
    GenerateItem,
    GenerateRequest,
    GenerateResult,
    PrivilegedIds,
    ScoreItem,
    ScoreRequest,
    ScoreResult,
    ServedTeacher,
    TeacherInfo,
    WeightsUpdate,
    crc32_of,
)
from protos.service import GenerateStream, ScoreStream
from protos.wire import JSON_TYPE

MAX_ITEMS = 1024
"""Items of one call; each is a request of its own."""

MAX_CONNECTIONS = 64
"""Requests in flight; what vLLM batches at a time on one small GPU, and below any server's limit of open sockets."""

RESERVED_TOKENS = 1
"""A stock server insists on writing one token after a prompt that it scores."""

NEUTRAL = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sent with every sample: a stock server's defaults are those of the model's generation_config.json."""

_Result = TypeVar("_Result", ScoreResult, GenerateResult)


class OpenAITeacher(Teacher):
    """A stock server at `url` ("openai+http://host:port"); see protos.client.Teacher.

    Args:
        own: the bearer token, and the files of openai+https.
    """

    def __init__(self, url: str, own: Credentials) -> None:
        self._url = url
        self._client = httpx.AsyncClient(
            base_url=url.removeprefix("openai+"),
            headers=own.headers(),
            verify=own.verify(),
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS),
        )
        self._info: TeacherInfo | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        return self._url

    async def info(self) -> TeacherInfo:
        """What the server can be asked about; its tokenizer is `fingerprint.UNKNOWN`."""
        if self._info is None:
            cards = (await self._ask("GET", "/v1/models"))["data"]
            names = tuple(card["id"] for card in cards)
            max_context_tokens = cards[0].get("max_model_len")
            if max_context_tokens is None:
                raise InvalidRequest(f"{self._url} does not say max_model_len in /v1/models: it is not a vLLM server")
            self._info = TeacherInfo(
                teachers=names,
                model=cards[0].get("root") or names[0],
                revision="",
                weights_version=0,
                tokenizer=UNKNOWN,
                max_context_tokens=max_context_tokens - RESERVED_TOKENS,
                max_top_k=await self._max_top_k(names[0]),
                max_candidates=0,
                max_items=MAX_ITEMS,
                supports=("sampled", "top_k"),
                exact_temperature=False,
                prefix_cache=False,
                dtype="",
                engine="openai",
                engine_version="",
                score_path="prompt_logprobs",
                determinism="the server does not say",
                privileged_kinds=("ids",),
            )
        return self._info

    async def detokenize(self, ids: Sequence[int]) -> str:
        """See protos.service.Detokenizer."""
        model = (await self.info()).teachers[0]
        return (await self._ask("POST", "/detokenize", {"model": model, "tokens": list(ids)}))["prompt"]

    async def score_stream(self, request: ScoreRequest, *, timeout_s: float | None = None) -> ScoreStream:
        """See TeacherService; refused whole where a stock server cannot give exactly what an item asks."""
        replies = self._stream(request, check_score_item, self._score, timeout_s)
        async with aclosing(verify.each_once(replies, request.items, verify.check_score)) as checked:
            async for reply in checked:
                yield reply

    async def generate_stream(self, request: GenerateRequest, *, timeout_s: float | None = None) -> GenerateStream:
        """See TeacherService; refused whole where a stock server cannot give exactly what an item asks.

        A sample's `text` is the server's: decoded as the prompt's continuation, it may lack a character cut at an end.
        """
        replies = self._stream(request, check_generate_item, self._generate, timeout_s)
        async with aclosing(verify.each_once(replies, request.items, verify.check_generation)) as checked:
            async for reply in checked:
                yield reply

    async def update_weights(
        self, update: WeightsUpdate, chunks: AsyncIterable[bytes] | None = None, *, timeout_s: float | None = None
    ) -> ServedTeacher:
        """Raises InvalidRequest: stock servers have no such operation."""
        raise InvalidRequest(f"{self._url} is a stock server, whose weights cannot be changed; use a teacher-server")

    async def unload(self, teacher: str, *, timeout_s: float | None = None) -> ServedTeacher:
        """Raises InvalidRequest: stock servers have no such operation."""
        raise InvalidRequest(f"{self._url} is a stock server, whose teachers cannot be changed; use a teacher-server")

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def _stream(
        self,
        request: ScoreRequest | GenerateRequest,
        check: Callable[[Any, TeacherInfo], None],
        do: Callable[[Any, list[int], TeacherInfo], Awaitable[_Result]],
        timeout_s: float | None,
    ) -> AsyncGenerator[tuple[int, _Result | TeacherError], None]:
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        late = f"{self._url} did not answer within {timeout_s} s"
        try:
            async with asyncio.timeout_at(deadline):
                info = await self.info()
                check_request(request, info)
                contexts = [await self._checked(i, item, info, check) for i, item in enumerate(request.items)]
        except TimeoutError:
            raise DeadlineExceeded(late) from None
        outcomes: asyncio.Queue[tuple[int, _Result | TeacherError]] = asyncio.Queue()

        async def one(index: int, item: Any) -> None:
            try:
                async with asyncio.timeout_at(deadline):
                    outcome: _Result | TeacherError = await do(item, contexts[index], info)
            except TimeoutError:
                outcome = DeadlineExceeded(late, field=f"items[{index}]")
            except TeacherError as error:
                outcome = _of_item(index, error)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                outcome = EngineFailed(f"{self._url} sent a reply that cannot be read: {error!r}")
            outcomes.put_nowait((index, outcome))

        tasks = [asyncio.create_task(one(i, item)) for i, item in enumerate(request.items)]
        try:
            async with aclosing(verify.errors_held(verify.first(outcomes, len(tasks)))) as replies:
                async for reply in replies:
                    yield reply
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _checked(
        self, index: int, item: ScoreItem | GenerateItem, info: TeacherInfo, check: Callable[[Any, TeacherInfo], None]
    ) -> list[int]:
        """The item's context, or the first thing that is wrong with the item."""
        try:
            check(item, info)
            return await self._context_ids(item, info)
        except TeacherError as error:
            raise _of_item(index, error) from None

    async def _score(self, item: ScoreItem, context_ids: list[int], info: TeacherInfo) -> ScoreResult:
        started = time.monotonic()
        rows: list[Any] = []
        if len(item.completion_ids):
            body = {
                "model": item.teacher or info.teachers[0],
                "prompt": [*context_ids, *item.completion_ids.tolist()],
                "max_tokens": RESERVED_TOKENS,
                "temperature": 0.0,
                "prompt_logprobs": item.top_k,
            }
            rows = (await self._ask("POST", "/v1/completions", body))["choices"][0]["prompt_logprobs"]
            rows = rows[len(context_ids) :]
        sampled_logprobs, top_ids, top_logprobs = read_rows(rows, item.completion_ids, item.top_k)
        return ScoreResult(
            sampled_logprobs=sampled_logprobs,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            candidate_logprobs=np.empty((len(item.completion_ids), 0), np.float32),
            entropy=None,
            weights_version=info.weights_version,
            num_context_tokens=len(context_ids),
            num_cached_tokens=0,  # vLLM does not read the prefix cache where it is asked for prompt log-probs
            queue_s=math.nan,
            engine_s=time.monotonic() - started,
            completion_crc32=crc32_of(item.completion_ids),
        )

    async def _generate(self, item: GenerateItem, context_ids: list[int], info: TeacherInfo) -> GenerateResult:
        started = time.monotonic()
        num_different = 1 if item.temperature == 0 else item.num_samples  # vLLM refuses more than one greedy sample
        body = NEUTRAL | {
            "model": item.teacher or info.teachers[0],
            "prompt": context_ids,
            "max_tokens": item.max_new_tokens,
            "temperature": item.temperature,
            "n": num_different,
            "seed": item.seed,
            "stop_token_ids": list(item.stop_token_ids),
            "ignore_eos": item.ignore_eos,
            "logprobs": 0,
            "return_token_ids": True,
        }
        answer = await self._ask("POST", "/v1/completions", body)
        samples = tuple(read_sample(choice) for choice in sorted(answer["choices"], key=lambda choice: choice["index"]))
        return GenerateResult(
            samples=samples * (item.num_samples // num_different),
            weights_version=info.weights_version,
            num_context_tokens=len(context_ids),
            num_cached_tokens=0,
            queue_s=math.nan,
            engine_s=time.monotonic() - started,
        )

    async def _context_ids(self, item: ScoreItem | GenerateItem, info: TeacherInfo) -> list[int]:
        """Privileged ids, the prompt's and those already written; ContextTooLong where the rest does not fit."""
        privileged = item.privileged.ids.tolist() if isinstance(item.privileged, PrivilegedIds) else []
        prefix = item.prefix_ids.tolist() if isinstance(item, GenerateItem) else []
        if isinstance(item.prompt, Chat):
            body = {
                "model": item.teacher or info.teachers[0],
                "messages": [vars(message) for message in item.prompt.messages],
                "add_generation_prompt": True,
            }
            prompt = (await self._ask("POST", "/tokenize", body))["tokens"]
        else:
            prompt = item.prompt.tolist()
        context_ids = [*privileged, *prompt, *prefix]
        if not context_ids:
            raise InvalidRequest("the context is empty; send at least one prompt token", field="prompt")
        num_new_tokens = item.max_new_tokens if isinstance(item, GenerateItem) else len(item.completion_ids)
        num_tokens = len(context_ids) + num_new_tokens
        if num_tokens > info.max_context_tokens:
            raise ContextTooLong(
                f"{num_tokens} tokens do not fit into the context of {info.max_context_tokens}: {len(context_ids)} of "
                f"the prompt with what goes before and after it, {num_new_tokens} to score or write; nothing is "
                "truncated, send less"
            )
        return context_ids

    async def _max_top_k(self, model: str) -> int:
        """The server's --max-logprobs: it names the number when more is asked for, and nowhere else."""
        body = {"model": model, "prompt": [0], "max_tokens": 1, "prompt_logprobs": 2**31 - 1}
        try:
            await self._ask("POST", "/v1/completions", body)
        except InvalidRequest as error:
            if found := re.search(r"max allowed: (\d+)", error.message):
                return int(found[1])
            raise
        raise InvalidRequest(f"{self._url} ignores prompt_logprobs: it is not a vLLM server, and cannot score")

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The reply's JSON; the server's refusal as the error of the table that fits its status."""
        try:
            response = await self._client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise NotReady(
                f"{self._url} cannot be reached or broke off: {str(error) or type(error).__name__}"
            ) from error
        if response.status_code != httpx.codes.OK:
            error = error_of_status(self._url, response.status_code, response.text, response.headers)
            # vLLM refuses a request with 400 in JSON; 400 in plain text is a web server's, of bytes that are no HTTP.
            if isinstance(error, Corrupted) and response.headers.get("content-type") == JSON_TYPE:
                error = InvalidRequest(error.message)
            raise error
        try:
            return response.json()
        except ValueError as error:
            raise EngineFailed(f"{self._url} sent a reply that is not JSON: {error}") from error


def _of_item(index: int, error: TeacherError) -> TeacherError:
    """The same error, its field seen from the request."""
    field = f"items[{index}].{error.field}".rstrip(".")
    return type(error)(error.message, field=field, retry_after_s=error.retry_after_s)
