"""Where stock OpenAI clients come in: which paths, through the gate that all other work passes.

What answers them is the engine's own application, in OpenAI's dialect; this module reads no body.
"""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protos.errors import InvalidRequest
from teacher_server.auth import GENERATE, SCORE, Caller
from teacher_server.gate import Gate

SCOPES_OF = {
    "/v1/models": (),
    "/v1/completions": (SCORE, GENERATE),
    "/v1/chat/completions": (SCORE, GENERATE),
    "/tokenize": (),
    "/detokenize": (),
}
"""All that is let through to the engine's own application, nothing that administers it; and what a caller needs there.
Both scopes where the body, which is not read here, decides between writing and scoring (`prompt_logprobs`)."""

ABSENT = (
    "this server has no OpenAI-compatible endpoints; serve with --engine vllm --openai, "
    "or use /v1/score and /v1/generate"
)


class OpenAIRoutes:
    """An ASGI application that passes requests on to the one the gate was opened with.

    Args:
        max_body_bytes: the largest body that is read.
    """

    def __init__(self, gate: Gate, *, max_body_bytes: int) -> None:
        self._gate = gate
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on; what is inside counts as in flight until its answer is sent.

        Raises:
            PermissionDenied: the caller lacks a scope of the path's.
            NotReady: the gate is closed.
        """
        caller: Caller = scope["state"]["caller"]
        for needed in SCOPES_OF[scope["path"]]:
            caller.require(needed)
        with self._gate.entered() as opened:
            app: ASGIApp = opened.openai or _absent()
            await app(scope, self._bounded(receive), send)

    def _bounded(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def receive_bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise InvalidRequest(f"the request has more than {self._max_body_bytes} bytes, the limit; send less")
            return message

        return receive_bounded


def _absent() -> JSONResponse:
    error = {"message": ABSENT, "type": "NotFoundError", "param": None, "code": 404}
    return JSONResponse({"error": error}, status_code=404)
