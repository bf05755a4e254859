"""Whether a request keeps to what GetInfo promised: pure, whole requests before any work.

Fields in errors are relative to the item ("temperature"); the core adds "items[3]." in front.
"""

from __future__ import annotations

import math

import numpy as np

from protos import verify
from protos.codec import check_candidates
from protos.errors import ContextTooLong, InvalidRequest, UnknownTeacher
from protos.records import (
    PAD_ID,
    Chat,
    GenerateItem,
    GenerateRequest,
    Int32,
    Privileged,
    PrivilegedIds,
    ScoreItem,
    ScoreRequest,
    TeacherInfo,
)
from protos.wire import MAX_MESSAGE_BYTES
from teacher_server.privileged import Context

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e30
"""Engines divide float32 logits by it: beyond these the quotients, of logits up to 1e8, are infinite or all 0."""

MAX_SAMPLES = 1024
"""Continuations of one item: a bound on what one reply can hold."""

MAX_STOP_IDS = 1024
"""Of one item; the engine compares each new token with all of them."""

MAX_CHARS_PER_TOKEN = 128
"""The longest tokens in use are runs of 128 blanks; a text with more characters than a whole context of those cannot
fit, and is refused before the tokenizer spends minutes on it."""


def check_request(request: ScoreRequest | GenerateRequest, info: TeacherInfo) -> None:
    """Raises InvalidRequest on no or too many items, or a wait that is none."""
    verify.check_num_items(len(request.items), info.max_items)
    if not (math.isfinite(request.max_weights_wait_s) and request.max_weights_wait_s >= 0):
        raise InvalidRequest(
            f"max_weights_wait_s is {request.max_weights_wait_s}; it must be finite and at least 0 (0 does not wait)",
            field="max_weights_wait_s",
        )


def check_score_item(item: ScoreItem, info: TeacherInfo) -> None:
    """Raises InvalidRequest or UnknownTeacher on the first field that `info` does not allow."""
    _check_source(item, info)
    _check_ids("completion_ids", item.completion_ids, info)
    if not MIN_TEMPERATURE <= item.temperature <= MAX_TEMPERATURE:
        raise InvalidRequest(
            f"temperature is {item.temperature}; it must be above 0, from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g} "
            "(1.0 is the model's own distribution)",
            field="temperature",
        )
    if item.temperature != 1.0 and not info.exact_temperature:
        raise InvalidRequest(
            f"temperature is {item.temperature}; this engine ({info.engine}, {info.score_path}) is exact at 1.0 only",
            field="temperature",
        )
    max_top_k = min(info.max_top_k, info.tokenizer.vocab_size)
    if not 0 <= item.top_k <= max_top_k:
        raise InvalidRequest(f"top_k is {item.top_k}; it must be from 0 to {max_top_k}", field="top_k")
    num_candidates = 0
    if item.candidate_ids is not None:
        check_candidates(item.candidate_ids, len(item.completion_ids), "candidate_ids")
        num_candidates = item.candidate_ids.shape[1]
        if num_candidates > info.max_candidates:
            raise InvalidRequest(
                f"{num_candidates} candidates a position; send at most {info.max_candidates}", field="candidate_ids"
            )
        _check_ids("candidate_ids", item.candidate_ids, info, lowest=PAD_ID)
    if item.entropy and "entropy" not in info.supports:
        raise InvalidRequest(
            f"entropy is asked for, and this engine ({info.engine}, {info.score_path}) has none to give; leave it out",
            field="entropy",
        )
    num_bytes = len(item.completion_ids) * (8 + 8 * item.top_k + 4 * num_candidates)
    if num_bytes > MAX_MESSAGE_BYTES:
        raise InvalidRequest(
            f"the reply would have {num_bytes} bytes; the limit is {MAX_MESSAGE_BYTES}; ask for a smaller top_k or "
            "fewer candidates",
            field="top_k" if 2 * item.top_k >= num_candidates else "candidate_ids",
        )


def check_generate_item(item: GenerateItem, info: TeacherInfo) -> None:
    """Raises InvalidRequest or UnknownTeacher on the first field that `info` does not allow."""
    _check_source(item, info)
    _check_ids("prefix_ids", item.prefix_ids, info)
    if len(item.stop_token_ids) > MAX_STOP_IDS:
        raise InvalidRequest(
            f"{len(item.stop_token_ids)} stop ids; send at most {MAX_STOP_IDS}", field="stop_token_ids"
        )
    _check_ids("stop_token_ids", np.array(item.stop_token_ids, np.int64), info)
    if item.max_new_tokens < 1:
        raise InvalidRequest(f"max_new_tokens is {item.max_new_tokens}; it must be at least 1", field="max_new_tokens")
    if item.temperature != 0 and not MIN_TEMPERATURE <= item.temperature <= MAX_TEMPERATURE:
        raise InvalidRequest(
            f"temperature is {item.temperature}; it must be 0 (greedy) or from {MIN_TEMPERATURE:g} to "
            f"{MAX_TEMPERATURE:g}",
            field="temperature",
        )
    if not 0 < item.top_p <= 1:
        raise InvalidRequest(f"top_p is {item.top_p}; it must be above 0 and at most 1 (1 keeps all)", field="top_p")
    if not 0 <= item.top_k <= info.tokenizer.vocab_size:
        raise InvalidRequest(
            f"top_k is {item.top_k}; it must be from 0 to {info.tokenizer.vocab_size} (0 keeps all)", field="top_k"
        )
    if not 1 <= item.num_samples <= MAX_SAMPLES:
        raise InvalidRequest(
            f"num_samples is {item.num_samples}; it must be from 1 to {MAX_SAMPLES}", field="num_samples"
        )
    if item.seed is not None and item.seed < 0:
        raise InvalidRequest(f"seed is {item.seed}; it must be at least 0, or absent for a new one", field="seed")


def check_fits(context: Context, num_new_tokens: int, what: str, info: TeacherInfo) -> None:
    """Raises InvalidRequest on an empty context, ContextTooLong when it leaves too little room for `what`."""
    if len(context.ids) == 0:
        raise InvalidRequest("the context is empty; send at least one prompt token", field="prompt")
    num_tokens = len(context.ids) + num_new_tokens
    if num_tokens > info.max_context_tokens:
        raise ContextTooLong(
            f"{num_tokens} tokens do not fit into the context of {info.max_context_tokens}: "
            f"{context.num_prompt_tokens} of the prompt, {context.num_privileged_tokens} privileged, "
            f"{num_new_tokens} {what}; nothing is truncated, send less"
        )


def _check_source(item: ScoreItem | GenerateItem, info: TeacherInfo) -> None:
    """The parts that both kinds of item share: who answers, the prompt and what is privileged."""
    if item.teacher and item.teacher not in info.teachers:
        raise UnknownTeacher(
            f"no teacher {item.teacher[:80]!r} here; served: {', '.join(info.teachers)}", field="teacher"
        )
    if not isinstance(item.prompt, Chat):
        _check_ids("prompt_ids", item.prompt, info)
    privileged: Privileged | None = item.privileged
    if isinstance(privileged, PrivilegedIds):
        _check_ids("privileged.ids", privileged.ids, info)
    _check_num_chars(item.prompt, privileged, info)


def _check_num_chars(prompt: Int32 | Chat, privileged: Privileged | None, info: TeacherInfo) -> None:
    messages = prompt.messages if isinstance(prompt, Chat) else ()
    num_chars = sum(len(message.role) + len(message.content) for message in messages)
    if privileged is not None and not isinstance(privileged, PrivilegedIds):
        num_chars += len(privileged.text)
    limit = MAX_CHARS_PER_TOKEN * info.max_context_tokens
    if num_chars > limit:
        raise ContextTooLong(
            f"the text has {num_chars} characters; a context of {info.max_context_tokens} tokens takes at most "
            f"{limit}; nothing is truncated, send less"
        )


def _check_ids(field: str, ids: Int32 | np.ndarray, info: TeacherInfo, *, lowest: int = 0) -> None:
    vocab_size = info.tokenizer.vocab_size
    if ids.size == 0 or (ids.min() >= lowest and ids.max() < vocab_size):
        return
    place = tuple(int(i) for i in np.argwhere((ids < lowest) | (ids >= vocab_size))[0])
    raise InvalidRequest(
        f"id {ids[place]} at position {', '.join(map(str, place))} is not in the vocabulary; "
        f"ids must be from {lowest} to {vocab_size - 1}",
        field=field,
    )
