"""What became of each item <-> protobuf: a result behind its checksum, or an error."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from protos import records
from protos.codec.arrays import FLOAT, HALF, INT, array_of, float_bytes, ids_bytes, ids_of
from protos.codec.errors import error_message, error_of
from protos.codec.messages import parse
from protos.errors import InvalidRequest, TeacherError
from protos.teacher.v1 import teacher_pb2 as pb

_Result = TypeVar("_Result", records.ScoreResult, records.GenerateResult)


def encode_score_reply(index: int, outcome: records.ScoreResult | TeacherError) -> bytes:
    """One item's outcome as a serialised ScoreResponse."""
    if isinstance(outcome, TeacherError):
        return pb.ScoreResponse(index=index, error=error_message(outcome)).SerializeToString()
    return pb.ScoreResponse(index=index, result=_score_result_message(index, outcome)).SerializeToString()


def decode_score_reply(data: bytes) -> tuple[int, records.ScoreResult | TeacherError]:
    """The item's index and outcome in a serialised ScoreResponse."""
    message = parse(pb.ScoreResponse, data)
    return message.index, _outcome(message, _score_result)


def encode_generate_reply(index: int, outcome: records.GenerateResult | TeacherError) -> bytes:
    """One item's outcome as a serialised GenerateResponse."""
    if isinstance(outcome, TeacherError):
        return pb.GenerateResponse(index=index, error=error_message(outcome)).SerializeToString()
    return pb.GenerateResponse(index=index, result=_generate_result_message(index, outcome)).SerializeToString()


def decode_generate_reply(data: bytes) -> tuple[int, records.GenerateResult | TeacherError]:
    """The item's index and outcome in a serialised GenerateResponse."""
    message = parse(pb.GenerateResponse, data)
    return message.index, _outcome(message, _generate_result)


def _score_result_message(index: int, result: records.ScoreResult) -> pb.ScoreResult:
    wide = HALF if result.half_precision else FLOAT
    message = pb.ScoreResult(
        num_tokens=result.num_tokens,
        sampled_logprobs=float_bytes(result.sampled_logprobs),
        top_k=result.top_ids.shape[1],
        top_ids=ids_bytes(result.top_ids, "result.top_ids", ndim=2),
        top_logprobs=float_bytes(result.top_logprobs, wide),
        num_candidates=result.candidate_logprobs.shape[1],
        candidate_logprobs=float_bytes(result.candidate_logprobs, wide),
        entropy=None if result.entropy is None else float_bytes(result.entropy),
        weights_version=result.weights_version,
        num_context_tokens=result.num_context_tokens,
        num_cached_tokens=result.num_cached_tokens,
        queue_s=result.queue_s,
        engine_s=result.engine_s,
        completion_crc32=result.completion_crc32,
        half_precision=result.half_precision,
    )
    message.result_crc32 = _score_crc32(index, message)
    return message


def _score_result(index: int, message: pb.ScoreResult) -> records.ScoreResult:
    _check_crc32(message.result_crc32, _score_crc32(index, message))
    shape_T = (message.num_tokens,)
    shape_TK = (message.num_tokens, message.top_k)
    shape_TM = (message.num_tokens, message.num_candidates)
    wide = HALF if message.half_precision else FLOAT
    return records.ScoreResult(
        sampled_logprobs=array_of(message.sampled_logprobs, FLOAT, shape_T, "result.sampled_logprobs"),
        top_ids=array_of(message.top_ids, INT, shape_TK, "result.top_ids"),
        top_logprobs=array_of(message.top_logprobs, wide, shape_TK, "result.top_logprobs").astype(
            np.float32, copy=False
        ),
        candidate_logprobs=array_of(message.candidate_logprobs, wide, shape_TM, "result.candidate_logprobs").astype(
            np.float32, copy=False
        ),
        entropy=array_of(message.entropy, FLOAT, shape_T, "result.entropy") if message.HasField("entropy") else None,
        weights_version=message.weights_version,
        num_context_tokens=message.num_context_tokens,
        num_cached_tokens=message.num_cached_tokens,
        queue_s=message.queue_s,
        engine_s=message.engine_s,
        completion_crc32=message.completion_crc32,
        half_precision=message.half_precision,
    )


def _generate_result_message(index: int, result: records.GenerateResult) -> pb.GenerateResult:
    samples = [
        pb.Sample(
            token_ids=ids_bytes(sample.token_ids, f"result.samples[{i}].token_ids"),
            logprobs=float_bytes(sample.logprobs),
            finish_reason=sample.finish_reason,
            text=sample.text,
        )
        for i, sample in enumerate(result.samples)
    ]
    fields: dict[str, Any] = dict(vars(result), samples=samples)
    message = pb.GenerateResult(**fields)
    message.result_crc32 = _generate_crc32(index, message)
    return message


def _generate_result(index: int, message: pb.GenerateResult) -> records.GenerateResult:
    _check_crc32(message.result_crc32, _generate_crc32(index, message))
    samples = tuple(_sample(sample, f"result.samples[{i}]") for i, sample in enumerate(message.samples))
    return records.GenerateResult(
        samples=samples,
        weights_version=message.weights_version,
        num_context_tokens=message.num_context_tokens,
        num_cached_tokens=message.num_cached_tokens,
        queue_s=message.queue_s,
        engine_s=message.engine_s,
    )


def _sample(message: pb.Sample, where: str) -> records.Sample:
    token_ids = ids_of(message.token_ids, f"{where}.token_ids")
    logprobs = array_of(message.logprobs, FLOAT, token_ids.shape, f"{where}.logprobs")
    if message.finish_reason not in ("stop", "length"):
        raise InvalidRequest(
            f'{message.finish_reason!r}; it must be "stop" or "length"', field=f"{where}.finish_reason"
        )
    return records.Sample(token_ids, logprobs, cast("records.FinishReason", message.finish_reason), message.text)


def _outcome(
    message: pb.ScoreResponse | pb.GenerateResponse, to_record: Callable[[int, Any], _Result]
) -> _Result | TeacherError:
    match message.WhichOneof("outcome"):
        case "result":
            return to_record(message.index, message.result)
        case "error":
            return error_of(message.error)
        case _:
            raise InvalidRequest("the reply holds neither a result nor an error", field="outcome")


def _score_crc32(index: int, message: pb.ScoreResult) -> int:
    """See ScoreResult.result_crc32 in teacher.proto."""
    numbers = struct.pack(
        "<8q2d",
        index,
        message.num_tokens,
        message.top_k,
        message.num_candidates,
        message.weights_version,
        message.num_context_tokens,
        message.num_cached_tokens,
        message.half_precision,
        message.queue_s,
        message.engine_s,
    )
    crc = zlib.crc32(numbers)
    for array in (message.sampled_logprobs, message.top_ids, message.top_logprobs, message.candidate_logprobs):
        crc = zlib.crc32(array, crc)
    return zlib.crc32(message.entropy, crc)


def _generate_crc32(index: int, message: pb.GenerateResult) -> int:
    """See GenerateResult.result_crc32 in teacher.proto."""
    numbers = struct.pack(
        "<4q2d",
        index,
        message.weights_version,
        message.num_context_tokens,
        message.num_cached_tokens,
        message.queue_s,
        message.engine_s,
    )
    crc = zlib.crc32(numbers)
    for sample in message.samples:
        for part in (sample.token_ids, sample.logprobs, sample.finish_reason.encode(), sample.text.encode()):
            crc = zlib.crc32(part, crc)
    return crc


def _check_crc32(sent: int, received: int) -> None:
    if sent != received:
        raise InvalidRequest(f"the result was damaged on its way: CRC-32 {received}, sent as {sent}", field="result")
