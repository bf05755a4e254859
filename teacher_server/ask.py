"""Runs the commands that ask a running server, and prints what they found; each returns the exit code."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from protos.client import connect
from protos.errors import InvalidRequest
from protos.records import (
    Chat,
    Int32,
    Message,
    Privileged,
    PrivilegedIds,
    Reference,
    ScoreItem,
    SystemText,
    TeacherInfo,
    UserPrefix,
    UserSuffix,
)
from teacher_server import show
from teacher_server.bench import BenchResult
from teacher_server.bench import bench as run_bench
from teacher_server.check import Finding
from teacher_server.check import check as run_check
from teacher_server.commands import BenchConfig, CheckConfig, ScoreConfig

INFO_TIMEOUT_S = 30.0


def info(url: str, *, as_json: bool) -> int:
    """Prints the handshake."""

    async def ask() -> TeacherInfo:
        async with connect(url) as teacher:
            return await teacher.info()

    found = asyncio.run(ask())
    _print(show.info_table(url, found), TypeAdapter(TeacherInfo).dump_python(found, mode="json"), as_json)
    return 0


def score(url: str, config: ScoreConfig) -> int:
    """Prints the log-prob of every completion token, and what the teacher would rather have seen."""

    async def ask() -> show.Scored:
        async with connect(url) as teacher:
            tokenizer = None if config.tokenizer is None else _load_tokenizer(config.tokenizer, await teacher.info())
            item = _item(config, tokenizer)
            [result] = await teacher.score([item], timeout_s=config.timeout_s)
            decode = None if tokenizer is None else lambda token_id: str(tokenizer.decode([token_id]))
            return show.Scored.of(item, result, decode)

    scored = asyncio.run(ask())
    _print(show.score_table(scored), asdict(scored), config.json)
    return 0


def bench(url: str, config: BenchConfig) -> int:
    """Prints what a load came to; 1 where no request succeeded."""
    if config.seed is None:
        config = replace(config, seed=_new_seed())

    async def ask() -> BenchResult:
        with _progress(config) as on_request:
            return await run_bench(url, config, on_request)

    result = asyncio.run(ask())
    _print(show.bench_table(result), asdict(result), config.json)
    return 0 if result.p50_s is not None else 1


def check(urls: str, config: CheckConfig) -> int:
    """Prints every finding; 1 where one of them fails."""
    seed = _new_seed() if config.seed is None else config.seed

    async def ask() -> list[Finding]:
        async with AsyncExitStack() as open_teachers:
            teachers = [await open_teachers.enter_async_context(connect(url)) for url in urls.split(",")]
            reference = None
            if config.reference is not None:
                reference = _load_reference(config.reference, await teachers[0].info())
            return await run_check(
                teachers, seed=seed, bound=config.bound, timeout_s=config.timeout_s, reference=reference
            )

    findings = asyncio.run(ask())
    passed = all(finding.verdict != "FAIL" for finding in findings)
    plain = [asdict(finding) | {"verdict": finding.verdict} for finding in findings]
    _print(show.check_table(urls, seed, findings), {"passed": passed, "seed": seed, "findings": plain}, config.json)
    return 0 if passed else 1


def _print(table: Table, plain: dict[str, Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(plain, indent=2) + "\n")
    else:
        Console().print(table)


@contextmanager
def _progress(config: BenchConfig) -> Iterator[Any]:
    """A bar on stderr that moves with every request."""
    columns = (TextColumn("{task.completed} requests"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("requests", total=config.requests)
        yield lambda: progress.advance(task)


def _item(config: ScoreConfig, tokenizer: Any) -> ScoreItem:
    if config.prompt is None and config.prompt_ids is None:
        raise InvalidRequest("there is none; give --prompt or --prompt-ids", field="prompt")
    if config.completion is None and config.completion_ids is None:
        raise InvalidRequest("there is none; give --completion or --completion-ids", field="completion")
    if config.completion is not None:
        completion_ids = np.array(tokenizer(config.completion, add_special_tokens=False).input_ids, np.int32)
    else:
        completion_ids = _ids("completion_ids", config.completion_ids or "")
    if not len(completion_ids):
        raise InvalidRequest("the completion has no tokens; give at least one", field="completion")
    prompt = (
        Chat((Message("user", config.prompt),))
        if config.prompt is not None
        else _ids("prompt_ids", config.prompt_ids or "")
    )
    return ScoreItem(
        prompt=prompt,
        completion_ids=completion_ids,
        temperature=config.temperature,
        top_k=config.top_k,
        privileged=_privileged(config),
        teacher=config.teacher,
    )


def _privileged(config: ScoreConfig) -> Privileged | None:
    if config.privileged_system is not None:
        return SystemText(config.privileged_system)
    if config.privileged_prefix is not None:
        return UserPrefix(config.privileged_prefix)
    if config.privileged_suffix is not None:
        return UserSuffix(config.privileged_suffix)
    if config.reference is not None:
        return Reference(config.reference, config.reference_template)
    if config.privileged_ids is not None:
        return PrivilegedIds(_ids("privileged_ids", config.privileged_ids))
    return None


def _ids(field: str, text: str) -> Int32:
    try:
        return np.array([int(part) for part in text.split(",")], np.int32)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"{text[:80]!r} is not a list of token ids; write them as in 1,2,3", field=field
        ) from error


def _load_tokenizer(model: str, teacher: TeacherInfo) -> Any:
    """The model's tokenizer; InvalidRequest where there is none or the teacher's ids mean something else."""
    from transformers import AutoTokenizer

    from protos.fingerprint import tokenizer_fingerprint

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{model} has no tokenizer that can be loaded", field="tokenizer") from error
    own = tokenizer_fingerprint(tokenizer, eos_token_ids=(), vocab_size=teacher.tokenizer.vocab_size)
    if own.vocab_sha256 != teacher.tokenizer.vocab_sha256:
        raise InvalidRequest(
            f"{model} maps tokens to other ids than the teacher, which serves {teacher.model}", field="tokenizer"
        )
    return tokenizer


def _load_reference(model: str, teacher: TeacherInfo) -> Any:
    from teacher_server.reference import TransformersReference

    try:
        return TransformersReference(model, teacher.dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidRequest(f"cannot load {model}: {reason}", field="reference") from error


def _new_seed() -> int:
    return secrets.randbelow(2**31)
