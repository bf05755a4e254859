"""The place of stock OpenAI clients in the server's one queue: what a request costs, and what the metrics say of it.

The cost is an estimate from the body, which vLLM validates later: for each prompt its ids, or its text at
CHARS_PER_TOKEN characters a token, and `max_tokens` new tokens for each of its `n` continuations. Who states no
`max_tokens` is charged DEFAULT_NEW_TOKENS. What cannot be read costs one token, for vLLM refuses it at once. The
metrics count the tokens that vLLM's own `usage` names, which streamed answers leave out unless they were asked for it.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protos.errors import ERRORS, EngineFailed, InvalidRequest, Overloaded
from teacher_server.admission import Admission, Ticket
from teacher_server.observation import Observation, current
from teacher_server.teachers import Teachers

CHARS_PER_TOKEN = 4
"""Of English text under the vocabularies of today; too many tokens for code and few for rare scripts, by about half."""

DEFAULT_NEW_TOKENS = {"/v1/completions": 16, "/v1/chat/completions": 1024}
"""The paths that cost, and what is written where the body does not say: OpenAI's own default for completions; a chat
may fill its context, which few do."""

USAGE_BYTES = 4096
"""The end of an answer in which its usage is looked for: vLLM writes it after the choices."""

_USAGE = {
    kind: re.compile(rb'"%s":(\d+)' % field)
    for kind, field in (("context", b"prompt_tokens"), ("new", b"completion_tokens"), ("cached", b"cached_tokens"))
}
"""Inside a JSON string the closing quotation mark would be escaped, so text that was written cannot look like these."""


class AdmittedOpenAI:
    """vLLM's application behind the queue that everyone waits in; each answer is from one version of the model.

    Args:
        app: vLLM's, over the model that `base` names.
        max_tokens: the most a request is charged; larger ones enter alone anyway.
    """

    def __init__(self, app: ASGIApp, admission: Admission, teachers: Teachers, base: str, *, max_tokens: int) -> None:
        self._app = app
        self._admission = admission
        self._teachers = teachers
        self._base = base
        self._max_tokens = max_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI; Overloaded is answered as OpenAI's own limits are: 429, retry-after, and an error that says why."""
        if scope["path"] not in DEFAULT_NEW_TOKENS or scope["method"] != "POST":
            await self._answer(scope, receive, send)
            return
        body = await _whole_body(receive)
        if body is None:
            return
        observation = current()
        observation.client, observation.num_items = scope["state"]["client"], 1
        size = min(num_tokens(scope["path"], body), self._max_tokens)
        try:
            [ticket] = self._admission.admit([size], observation.client)
        except Overloaded as error:
            observation.error = error.name
            await _refusal(error)(scope, receive, send)
            return
        try:
            with observation.phases["queue"]:
                granted = await _granted(ticket, receive)
            if not granted:
                observation.error = "Cancelled"
                return
            with observation.phases["engine"]:
                await self._answer(scope, _replayed(body, receive), _observed(send, observation))
        finally:
            self._admission.release(ticket)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._teachers.use(self._base):
            await self._app(scope, receive, send)


def num_tokens(path: str, body: bytes) -> int:
    """What a request is charged, at least 1; see the module's first lines."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return 1
    if not isinstance(asked, dict):
        return 1
    prompts = _prompts(asked.get("prompt")) if "prompt" in asked else [_text_tokens(asked.get("messages"))]
    stated = (_count(asked.get(name)) for name in ("max_completion_tokens", "max_tokens"))
    new = next((count for count in stated if count is not None), DEFAULT_NEW_TOKENS[path])
    num_samples = _count(asked.get("n")) or 1
    return max(1, sum(prompts) + len(prompts) * num_samples * new)


def _prompts(prompt: object) -> list[int]:
    """The tokens of each prompt of one text, one list of ids, or a list of either."""
    if isinstance(prompt, list):
        if prompt and isinstance(prompt[0], int):
            return [len(prompt)]
        return [len(one) if isinstance(one, list) else _text_tokens(one) for one in prompt]
    return [_text_tokens(prompt)]


def _text_tokens(value: object) -> int:
    """Of a text, or of a chat as it is written."""
    text = value if isinstance(value, str) else json.dumps(value)
    return math.ceil(len(text) / CHARS_PER_TOKEN)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


async def _whole_body(receive: Receive) -> bytes | None:
    """None when the client vanished."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            current().error = "Cancelled"
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once more, then what still comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _granted(ticket: Ticket, receive: Receive) -> bool:
    """Waits for the ticket's turn; False when the client vanished first."""
    granted, vanished = asyncio.create_task(ticket.granted.wait()), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((granted, vanished), return_when=asyncio.FIRST_COMPLETED)
        return granted.done()
    finally:
        granted.cancel()
        vanished.cancel()
        await asyncio.gather(granted, vanished, return_exceptions=True)


def _observed(send: Send, observation: Observation) -> Send:
    """Notes how the answer ended, and the tokens that its usage names."""
    end = b""

    async def observe(message: Message) -> None:
        nonlocal end
        if message["type"] == "http.response.start":
            observation.error = _error_of(message["status"])
        else:
            end = (end + message.get("body", b"")[-USAGE_BYTES:])[-USAGE_BYTES:]
            if not message.get("more_body", False) and not observation.error:
                observation.num_succeeded = 1
                observation.num_context_tokens = _last_count("context", end)
                observation.num_new_tokens = _last_count("new", end)
                observation.num_cached_tokens = _last_count("cached", end)
        await send(message)

    return observe


def _last_count(kind: str, end: bytes) -> int:
    counts = _USAGE[kind].findall(end)
    return int(counts[-1]) if counts else 0


def _error_of(status: int) -> str:
    """The table's error of that status; "" for success."""
    if status < 400:
        return ""
    if status == 400:  # what vLLM refuses; in the table it is Corrupted
        return InvalidRequest.__name__
    names = [name for name, error in ERRORS.items() if error.row.http_status == status]
    return names[0] if names else InvalidRequest.__name__ if status < 500 else EngineFailed.__name__


def _refusal(error: Overloaded) -> JSONResponse:
    body = {"message": error.message, "type": "rate_limit_error", "param": None, "code": 429}
    headers = {} if error.retry_after_s is None else {"retry-after": str(math.ceil(error.retry_after_s))}
    return JSONResponse({"error": body}, status_code=429, headers=headers)
