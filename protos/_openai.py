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
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Self, TypeVar

import httpx
import numpy as np

from protos import verify
from protos._http import CONNECT_TIMEOUT_S, error_of_status
from protos.errors import (
    Conflict,
    ContextTooLong,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    NotReady,
    TeacherError,
    UnknownTeacher,
)
from protos.fingerprint import UNKNOWN
from protos.records import (
    PAD_ID,
    Chat,
    Float32,
    GenerateItem,
    GenerateRequest,
    GenerateResult,
    Int32,
    PrivilegedIds,
    Sample,
    ScoreItem,
    ScoreRequest,
    ScoreResult,
    TeacherInfo,
    crc32_of,
)
from protos.service import GenerateStream, ScoreStream

MAX_ITEMS = 1024
"""Items of one call; each is a request of its own."""

MAX_CONNECTIONS = 64
"""Requests in flight; what vLLM batches at a time on one small GPU, and below any server's limit of open sockets."""

MINUS_INFINITY = -9999.0
"""What vLLM writes for -inf, which JSON lacks."""

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

_ADVICE = "ask a teacher-server (grpc:// or http://) for it"

_Result = TypeVar("_Result", ScoreResult, GenerateResult)


class OpenAITeacher:
    """A stock server at `url` ("openai+http://host:port"); see protos.client.Teacher.

    Args:
        token: sent as the bearer token; None sends none.
    """

    def __init__(self, url: str, *, token: str | None = None) -> None:
        self.url = url
        self._client = httpx.AsyncClient(
            base_url=url.removeprefix("openai+"),
            headers={} if token is None else {"authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS),
        )
        self._info: TeacherInfo | None = None

    async def info(self) -> TeacherInfo:
        """What the server can be asked about; its tokenizer is `fingerprint.UNKNOWN`."""
        if self._info is None:
            cards = (await self._ask("GET", "/v1/models"))["data"]
            names = tuple(card["id"] for card in cards)
            max_context_tokens = cards[0].get("max_model_len")
            if max_context_tokens is None:
                raise InvalidRequest(f"{self.url} does not say max_model_len in /v1/models: it is not a vLLM server")
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
        replies = self._stream(request, _check_score_item, self._score, timeout_s)
        async with aclosing(replies), aclosing(verify.each_once(replies, request.items, verify.check_score)) as checked:
            async for reply in checked:
                yield reply

    async def generate_stream(self, request: GenerateRequest, *, timeout_s: float | None = None) -> GenerateStream:
        """See TeacherService; refused whole where a stock server cannot give exactly what an item asks.

        A sample's `text` is the server's: decoded as the prompt's continuation, it may lack a character cut at an end.
        """
        replies = self._stream(request, _check_generate_item, self._generate, timeout_s)
        async with (
            aclosing(replies),
            aclosing(verify.each_once(replies, request.items, verify.check_generation)) as checked,
        ):
            async for reply in checked:
                yield reply

    async def score(
        self, request: ScoreRequest | Sequence[ScoreItem], *, timeout_s: float | None = None
    ) -> list[ScoreResult]:
        """See Teacher."""
        request = request if isinstance(request, ScoreRequest) else ScoreRequest(tuple(request))
        return await verify.in_order(self.score_stream(request, timeout_s=timeout_s), len(request.items))

    async def generate(
        self, request: GenerateRequest | Sequence[GenerateItem], *, timeout_s: float | None = None
    ) -> list[GenerateResult]:
        """See Teacher."""
        request = request if isinstance(request, GenerateRequest) else GenerateRequest(tuple(request))
        return await verify.in_order(self.generate_stream(request, timeout_s=timeout_s), len(request.items))

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def _stream(
        self,
        request: ScoreRequest | GenerateRequest,
        check: Callable[[Any, TeacherInfo], None],
        do: Callable[[Any, TeacherInfo], Awaitable[_Result]],
        timeout_s: float | None,
    ) -> AsyncGenerator[tuple[int, _Result | TeacherError], None]:
        info = await self.info()
        _check_request(request, info)
        for i, item in enumerate(request.items):
            try:
                check(item, info)
            except TeacherError as error:
                raise type(error)(error.message, field=f"items[{i}].{error.field}") from None
        outcomes: asyncio.Queue[tuple[int, _Result | TeacherError]] = asyncio.Queue()

        async def one(index: int, item: Any) -> None:
            try:
                async with asyncio.timeout(timeout_s):
                    outcome: _Result | TeacherError = await do(item, info)
            except TimeoutError:
                outcome = DeadlineExceeded(f"{self.url} did not answer within {timeout_s:g} s", field=f"items[{index}]")
            except TeacherError as error:
                outcome = type(error)(
                    error.message, field=f"items[{index}].{error.field}".rstrip("."), retry_after_s=error.retry_after_s
                )
            except (KeyError, IndexError, TypeError, ValueError) as error:
                outcome = EngineFailed(f"{self.url} sent a reply that cannot be read: {error!r}")
            outcomes.put_nowait((index, outcome))

        tasks = [asyncio.create_task(one(i, item)) for i, item in enumerate(request.items)]
        try:
            async with aclosing(verify.errors_held(outcomes, len(tasks))) as replies:
                async for reply in replies:
                    yield reply
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _score(self, item: ScoreItem, info: TeacherInfo) -> ScoreResult:
        started = time.monotonic()
        context_ids = await self._context_ids(item, info, len(item.completion_ids))
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

    async def _generate(self, item: GenerateItem, info: TeacherInfo) -> GenerateResult:
        started = time.monotonic()
        context_ids = await self._context_ids(item, info, item.max_new_tokens)
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
        samples = tuple(_sample(choice) for choice in sorted(answer["choices"], key=lambda choice: choice["index"]))
        return GenerateResult(
            samples=samples * (item.num_samples // num_different),
            weights_version=info.weights_version,
            num_context_tokens=len(context_ids),
            num_cached_tokens=0,
            queue_s=math.nan,
            engine_s=time.monotonic() - started,
        )

    async def _context_ids(self, item: ScoreItem | GenerateItem, info: TeacherInfo, num_new_tokens: int) -> list[int]:
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
        raise InvalidRequest(f"{self.url} ignores prompt_logprobs: it is not a vLLM server, and cannot score")

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The reply's JSON; the server's refusal as the error of the table that fits its status."""
        try:
            response = await self._client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise NotReady(
                f"{self.url} cannot be reached or broke off: {str(error) or type(error).__name__}"
            ) from error
        if response.status_code != httpx.codes.OK:
            raise error_of_status(self.url, response.status_code, response.text, response.headers)
        try:
            return response.json()
        except ValueError as error:
            raise EngineFailed(f"{self.url} sent a reply that is not JSON: {error}") from error


def read_rows(rows: Sequence[Any], completion_ids: Int32, top_k: int) -> tuple[Float32, Int32, Float32]:
    """Sampled log-probs [T], top-K ids and log-probs [T, K] of vLLM's `prompt_logprobs` for the completion's positions.

    A row holds the K most likely ids, ranks 1 to K, and the completion's own id, whose rank is above K unless it is one
    of them.

    Raises:
        ValueError: a row is missing, or lacks its own id or one of the ranks.
    """
    num_tokens = len(completion_ids)
    if len(rows) != num_tokens:
        raise ValueError(f"{len(rows)} rows for {num_tokens} completion tokens")
    sampled_logprobs = np.empty(num_tokens, np.float32)
    top_ids = np.full((num_tokens, top_k), PAD_ID, np.int32)
    top_logprobs = np.empty((num_tokens, top_k), np.float32)
    for t, (row, own_id) in enumerate(zip(rows, completion_ids.tolist(), strict=True)):
        if str(own_id) not in row:
            raise ValueError(f"row {t} has no log-prob of the completion's own id {own_id}")
        sampled_logprobs[t] = row[str(own_id)]["logprob"]
        for token_id, entry in row.items():
            if entry["rank"] <= top_k:
                top_ids[t, entry["rank"] - 1] = int(token_id)
                top_logprobs[t, entry["rank"] - 1] = entry["logprob"]
    if (top_ids == PAD_ID).any():
        raise ValueError(f"a row has fewer than the {top_k} most likely ids")
    for logprobs in (sampled_logprobs, top_logprobs):
        logprobs[logprobs <= MINUS_INFINITY] = -np.inf
    return sampled_logprobs, top_ids, top_logprobs


def _sample(choice: dict[str, Any]) -> Sample:
    if choice["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"the server ended a sample with {choice['finish_reason']!r}")
    logprobs = np.array(choice["logprobs"]["token_logprobs"], np.float32)
    return Sample(np.array(choice["token_ids"], np.int32), logprobs, choice["finish_reason"], choice["text"])


def _check_request(request: ScoreRequest | GenerateRequest, info: TeacherInfo) -> None:
    if not 0 < len(request.items) <= info.max_items:
        raise InvalidRequest(
            f"the request has {len(request.items)} items; send from 1 to {info.max_items}", field="items"
        )
    if request.min_weights_version > info.weights_version:
        raise Conflict(
            f"a stock server's weights have no version; version {request.min_weights_version} was asked for",
            field="min_weights_version",
        )


def _check_score_item(item: ScoreItem, info: TeacherInfo) -> None:
    _check_source(item, info)
    if item.temperature != 1.0:
        raise InvalidRequest(
            f"temperature is {item.temperature}; a stock server's prompt_logprobs ignore it and are those at 1.0; "
            f"{_ADVICE}",
            field="temperature",
        )
    if item.candidate_ids is not None:
        raise InvalidRequest(
            f"a stock server cannot score ids of the caller's choice; {_ADVICE}", field="candidate_ids"
        )
    if item.entropy:
        raise InvalidRequest(f"a stock server gives no entropy; {_ADVICE}", field="entropy")
    if not 0 <= item.top_k <= info.max_top_k:
        raise InvalidRequest(
            f"top_k is {item.top_k}; this server gives from 0 to {info.max_top_k} (its --max-logprobs)", field="top_k"
        )


def _check_generate_item(item: GenerateItem, info: TeacherInfo) -> None:
    _check_source(item, info)
    if item.max_new_tokens < 1 or item.num_samples < 1:
        raise InvalidRequest(
            f"max_new_tokens is {item.max_new_tokens} and num_samples {item.num_samples}; both must be at least 1",
            field="max_new_tokens",
        )
    if item.temperature not in (0.0, 1.0) or item.top_p != 1.0 or item.top_k != 0:
        raise InvalidRequest(
            f"temperature is {item.temperature}, top_p {item.top_p}, top_k {item.top_k}; the log-probs of a stock "
            f"server's samples are exact at temperature 0 or 1 with top_p 1 and top_k 0 only; {_ADVICE}",
            field="temperature",
        )


def _check_source(item: ScoreItem | GenerateItem, info: TeacherInfo) -> None:
    if item.teacher and item.teacher not in info.teachers:
        raise UnknownTeacher(
            f"no teacher {item.teacher[:80]!r} here; served: {', '.join(info.teachers)}", field="teacher"
        )
    if item.privileged is not None and not isinstance(item.privileged, PrivilegedIds):
        raise InvalidRequest(
            f"a stock server cannot place privileged text, only privileged ids; {_ADVICE}", field="privileged"
        )
