"""What a stock server cannot give exactly, refused before anything is sent; fields are relative to the item."""

from __future__ import annotations

from protos.errors import Conflict, InvalidRequest, UnknownTeacher
from protos.records import GenerateItem, GenerateRequest, PrivilegedIds, ScoreItem, ScoreRequest, TeacherInfo

_ADVICE = "ask a teacher-server (grpc:// or http://) for it"


def check_request(request: ScoreRequest | GenerateRequest, info: TeacherInfo) -> None:
    """Raises InvalidRequest on no or too many items, Conflict where a version of weights is asked for."""
    if not 0 < len(request.items) <= info.max_items:
        raise InvalidRequest(
            f"the request has {len(request.items)} items; send from 1 to {info.max_items}", field="items"
        )
    if request.min_weights_version > info.weights_version:
        raise Conflict(
            f"a stock server's weights have no version; version {request.min_weights_version} was asked for",
            field="min_weights_version",
        )


def check_score_item(item: ScoreItem, info: TeacherInfo) -> None:
    """Raises InvalidRequest or UnknownTeacher on the first field that a stock server cannot honour exactly."""
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
    if item.half_precision:
        raise InvalidRequest(
            "half_precision is asked for, and a stock server sends all log-probs in JSON; leave it out",
            field="half_precision",
        )
    if not 0 <= item.top_k <= info.max_top_k:
        raise InvalidRequest(
            f"top_k is {item.top_k}; this server gives from 0 to {info.max_top_k} (its --max-logprobs)", field="top_k"
        )


def check_generate_item(item: GenerateItem, info: TeacherInfo) -> None:
    """Raises InvalidRequest or UnknownTeacher on the first field that a stock server cannot honour exactly."""
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
