"""vLLM's own OpenAI application over our engine: the routes that stock clients use, and none that administer it.

What it relies on in vLLM 0.32.0: `init_app_state` and `init_generate_state` fill an application's state from an
`AsyncLLM` and the defaults of `vllm serve`; each router reads that state. `build_app` is not used, because it adds
every router there is. The two are called apart, since `init_app_state` with the task "generate" also prepares vLLM's
structured decisions, a route that is not served here, by encoding a chat of its own ("x"): it raises for a tokenizer
that has neither UNK nor that letter.
"""

from __future__ import annotations

from fastapi import Depends, FastAPI, Request
from starlette.types import ASGIApp
from vllm.entrypoints.generate.api_router import init_generate_state
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import make_arg_parser, resolve_default_chat_template_kwargs
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.models import api_router as models
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.tokenize import api_router as tokenize
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

REFUSED_FIELDS = ("vllm_xargs", "kv_transfer_params", "ec_transfer_params")
"""Fields that vLLM hands to the worker unread; the worker trusts what it finds there."""


async def openai_app(llm: AsyncLLM, names: tuple[str, ...]) -> ASGIApp:
    """The application, with the defaults of `vllm serve`; each of the names means the base model."""
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    assert args is not None
    args.model, args.served_model_name = llm.model_config.model, list(names)
    app = FastAPI(openapi_url=None)
    app.state.args = args
    init_exception_handler(app)
    for router in (models.router, completion.router, chat.router, tokenize.router):
        app.include_router(router, dependencies=[Depends(_refuse_what_reaches_the_worker)])
    await init_app_state(llm, app.state, args, ())
    await init_generate_state(llm, app.state, args, None, ("generate",), resolve_default_chat_template_kwargs(args))
    return app


async def _refuse_what_reaches_the_worker(request: Request) -> None:
    if request.method != "POST":
        return
    body = await request.json()  # read and parsed once: FastAPI has the same request
    for field in REFUSED_FIELDS:
        if isinstance(body, dict) and body.get(field) is not None:
            raise VLLMValidationError(f"{field} is not taken by this server; leave it out", parameter=field)
