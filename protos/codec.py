"""Records <-> serialised protobuf: the only place that knows byte order and dtype.

Every `decode_*` takes bytes from outside and raises InvalidRequest, naming the field and both numbers, on anything that
is not exactly one record; decoded arrays are read-only views of the message where the machine is little-endian.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from google.protobuf.message import DecodeError, Message

from protos import records
from protos.errors import Corrupted, InvalidRequest, TeacherError, error_from_name
from protos.records import Float32, Int32
from protos.teacher.v1 import teacher_pb2 as pb

MAX_ERROR_CHARS = 500
"""Of an error's message and field: gRPC carries them in trailing metadata, which clients limit to a few KiB."""

_INT = np.dtype("<i4")
_FLOAT = np.dtype("<f4")
_HALF = np.dtype("<f2")
_INT_RANGE = np.iinfo(np.int32)

_Message = TypeVar("_Message", bound=Message)
_Result = TypeVar("_Result", records.ScoreResult, records.GenerateResult)


def encode_score_request(request: records.ScoreRequest) -> bytes:
    """The request as a serialised ScoreRequest; InvalidRequest on an array of the wrong shape or type."""
    items = [_score_item_message(item, f"items[{i}]") for i, item in enumerate(request.items)]
    versions = {"min_weights_version": request.min_weights_version, "max_weights_wait_s": request.max_weights_wait_s}
    return _build(pb.ScoreRequest, "", {"items": items, **versions}).SerializeToString()


def decode_score_request(data: bytes) -> records.ScoreRequest:
    """The ScoreRequest in `data`."""
    message = _parse(pb.ScoreRequest, data)
    items = tuple(_score_item(item, f"items[{i}]") for i, item in enumerate(message.items))
    return records.ScoreRequest(items, message.min_weights_version, message.max_weights_wait_s)


def encode_generate_request(request: records.GenerateRequest) -> bytes:
    """The request as a serialised GenerateRequest; InvalidRequest on an array of the wrong shape or type."""
    items = [_generate_item_message(item, f"items[{i}]") for i, item in enumerate(request.items)]
    versions = {"min_weights_version": request.min_weights_version, "max_weights_wait_s": request.max_weights_wait_s}
    return _build(pb.GenerateRequest, "", {"items": items, **versions}).SerializeToString()


def decode_generate_request(data: bytes) -> records.GenerateRequest:
    """The GenerateRequest in `data`."""
    message = _parse(pb.GenerateRequest, data)
    items = tuple(_generate_item(item, f"items[{i}]") for i, item in enumerate(message.items))
    return records.GenerateRequest(items, message.min_weights_version, message.max_weights_wait_s)


def encode_score_reply(index: int, outcome: records.ScoreResult | TeacherError) -> bytes:
    """One item's outcome as a serialised ScoreResponse."""
    if isinstance(outcome, TeacherError):
        return pb.ScoreResponse(index=index, error=_error_message(outcome)).SerializeToString()
    return pb.ScoreResponse(index=index, result=_score_result_message(index, outcome)).SerializeToString()


def decode_score_reply(data: bytes) -> tuple[int, records.ScoreResult | TeacherError]:
    """The item's index and outcome in a serialised ScoreResponse."""
    message = _parse(pb.ScoreResponse, data)
    return message.index, _outcome(message, _score_result)


def encode_generate_reply(index: int, outcome: records.GenerateResult | TeacherError) -> bytes:
    """One item's outcome as a serialised GenerateResponse."""
    if isinstance(outcome, TeacherError):
        return pb.GenerateResponse(index=index, error=_error_message(outcome)).SerializeToString()
    return pb.GenerateResponse(index=index, result=_generate_result_message(index, outcome)).SerializeToString()


def decode_generate_reply(data: bytes) -> tuple[int, records.GenerateResult | TeacherError]:
    """The item's index and outcome in a serialised GenerateResponse."""
    message = _parse(pb.GenerateResponse, data)
    return message.index, _outcome(message, _generate_result)


def encode_info(info: records.TeacherInfo) -> bytes:
    """The handshake as a serialised GetInfoResponse."""
    fields: dict[str, Any] = {name: getattr(info, name) for name in pb.GetInfoResponse.DESCRIPTOR.fields_by_name}
    fields["tokenizer"] = pb.TokenizerFingerprint(**vars(info.tokenizer))
    fields["served"] = [pb.ServedTeacher(**vars(teacher)) for teacher in info.served]
    return pb.GetInfoResponse(**fields).SerializeToString()


def decode_info(data: bytes) -> records.TeacherInfo:
    """The handshake in a serialised GetInfoResponse."""
    message = _parse(pb.GetInfoResponse, data)
    fields = _plain_fields(message)
    fields["tokenizer"] = records.TokenizerFingerprint(**_plain_fields(message.tokenizer))
    fields["served"] = tuple(_served_teacher(teacher) for teacher in message.served)
    return records.TeacherInfo(**fields)


def encode_weights_update(update: records.WeightsUpdate) -> bytes:
    """The first message of an UpdateWeights stream."""
    header = _build(pb.WeightsHeader, "", vars(update))
    return pb.UpdateWeightsRequest(header=header).SerializeToString()


def encode_weights_chunk(chunk: bytes) -> bytes:
    """A further message of an UpdateWeights stream."""
    return pb.UpdateWeightsRequest(chunk=chunk, chunk_crc32=zlib.crc32(chunk)).SerializeToString()


def decode_weights_part(data: bytes) -> records.WeightsUpdate | bytes:
    """The header or the chunk in one message of an UpdateWeights stream."""
    message = _parse(pb.UpdateWeightsRequest, data)
    match message.WhichOneof("part"):
        case "header":
            fields = _plain_fields(message.header)
            if not message.header.HasField("ema_decay"):
                fields["ema_decay"] = None
            return records.WeightsUpdate(**fields)
        case "chunk":
            if zlib.crc32(message.chunk) != message.chunk_crc32:
                raise Corrupted(f"a chunk of {len(message.chunk)} bytes was damaged on its way; send the weights again")
            return message.chunk
        case _:
            raise InvalidRequest("the message holds neither a header nor a chunk", field="part")


def encode_updated(teacher: records.ServedTeacher) -> bytes:
    """What an update left served, as a serialised UpdateWeightsResponse."""
    return pb.UpdateWeightsResponse(teacher=pb.ServedTeacher(**vars(teacher))).SerializeToString()


def decode_updated(data: bytes) -> records.ServedTeacher:
    """The teacher in a serialised UpdateWeightsResponse."""
    return _served_teacher(_parse(pb.UpdateWeightsResponse, data).teacher)


def encode_unload(teacher: str) -> bytes:
    """A serialised UnloadTeacherRequest."""
    return _build(pb.UnloadTeacherRequest, "teacher", {"teacher": teacher}).SerializeToString()


def decode_unload(data: bytes) -> str:
    """The name in a serialised UnloadTeacherRequest."""
    return _parse(pb.UnloadTeacherRequest, data).teacher


def encode_unloaded(teacher: records.ServedTeacher) -> bytes:
    """What was unloaded, as a serialised UnloadTeacherResponse."""
    return pb.UnloadTeacherResponse(teacher=pb.ServedTeacher(**vars(teacher))).SerializeToString()


def decode_unloaded(data: bytes) -> records.ServedTeacher:
    """The teacher in a serialised UnloadTeacherResponse."""
    return _served_teacher(_parse(pb.UnloadTeacherResponse, data).teacher)


def encode_error(error: TeacherError) -> bytes:
    """The error as a serialised Error."""
    return _error_message(error).SerializeToString()


def decode_error(data: bytes) -> TeacherError:
    """The error in a serialised Error, ready to be raised."""
    return _error(_parse(pb.Error, data))


def decode_error_reply(data: bytes, url: str) -> TeacherError:
    """The error that the server at `url` answered with; Corrupted where its bytes are none."""
    try:
        return decode_error(data)
    except InvalidRequest as error:
        return Corrupted(f"{url} sent an error that cannot be read: {error}")


def check_candidates(candidate_ids: Int32, num_tokens: int, field: str) -> None:
    """Raises InvalidRequest unless the array is [T, M] for a completion of `num_tokens` T."""
    if candidate_ids.ndim != 2 or len(candidate_ids) != num_tokens:
        raise InvalidRequest(
            f"candidate_ids has shape {list(candidate_ids.shape)}; the completion has {num_tokens} tokens, "
            f"so it must be [{num_tokens}, M]",
            field=field,
        )


def _parse(message_type: type[_Message], data: bytes) -> _Message:
    message = message_type()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        name = message_type.DESCRIPTOR.name
        raise InvalidRequest(f"the {len(data)} bytes are not a protobuf {name}; see teacher.proto") from error
    return message


def _plain_fields(message: Message) -> dict[str, Any]:
    """The message's fields by name, a repeated one as a tuple."""
    return {
        field.name: tuple(getattr(message, field.name)) if field.is_repeated else getattr(message, field.name)
        for field in message.DESCRIPTOR.fields
    }


def _ids_bytes(ids: Int32, field: str, *, ndim: int = 1) -> bytes:
    array = np.asarray(ids)
    if array.ndim != ndim or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise InvalidRequest(
            f"an array of {array.dtype} with shape {list(array.shape)}; it must be int32 with {ndim} dimension(s)",
            field=field,
        )
    if array.size and not (_INT_RANGE.min <= array.min() and array.max() <= _INT_RANGE.max):
        raise InvalidRequest(f"ids from {array.min()} to {array.max()}; they must fit in int32", field=field)
    return np.ascontiguousarray(array, _INT).tobytes()


def _ids(data: bytes, field: str) -> Int32:
    if len(data) % _INT.itemsize:
        raise InvalidRequest(f"{len(data)} bytes are not a whole number of 4-byte ids", field=field)
    return _array(data, _INT, (len(data) // _INT.itemsize,), field)


def _float_bytes(values: Float32, dtype: np.dtype = _FLOAT) -> bytes:
    return np.ascontiguousarray(values, dtype).tobytes()


def _array(data: bytes, dtype: np.dtype, shape: tuple[int, ...], field: str) -> np.ndarray:
    """A view of `data` as an array of that shape; InvalidRequest when the length is another."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if min(shape) < 0 or len(data) != num_bytes:
        raise InvalidRequest(
            f"{len(data)} bytes; {dtype.name} of shape {list(shape)} is {num_bytes} bytes", field=field
        )
    return np.frombuffer(data, dtype).astype(dtype.newbyteorder("="), copy=False).reshape(shape)


def _prompt_fields(item: records.ScoreItem | records.GenerateItem, where: str) -> dict[str, Any]:
    if isinstance(item.prompt, records.Chat):
        return {"chat": pb.Chat(messages=[pb.Message(role=m.role, content=m.content) for m in item.prompt.messages])}
    return {"prompt_ids": pb.TokenIds(ids=_ids_bytes(item.prompt, f"{where}.prompt_ids"))}


def _prompt(item: pb.ScoreItem | pb.GenerateItem, where: str) -> Int32 | records.Chat:
    match item.WhichOneof("prompt"):
        case "prompt_ids":
            return _ids(item.prompt_ids.ids, f"{where}.prompt_ids")
        case "chat":
            return records.Chat(tuple(records.Message(m.role, m.content) for m in item.chat.messages))
        case _:
            raise InvalidRequest("the item has no prompt; send prompt_ids or chat", field=f"{where}.prompt")


def _privileged_message(privileged: records.Privileged | None, where: str) -> pb.Privileged | None:
    match privileged:
        case None:
            return None
        case records.SystemText(text):
            return pb.Privileged(system=text)
        case records.UserPrefix(text):
            return pb.Privileged(user_prefix=text)
        case records.UserSuffix(text):
            return pb.Privileged(user_suffix=text)
        case records.Reference(text, template):
            return pb.Privileged(reference=pb.Reference(text=text, template=template))
        case records.PrivilegedIds(ids):
            return pb.Privileged(ids=pb.TokenIds(ids=_ids_bytes(ids, f"{where}.privileged.ids")))


def _privileged(item: pb.ScoreItem | pb.GenerateItem, where: str) -> records.Privileged | None:
    if not item.HasField("privileged"):
        return None
    message = item.privileged
    match message.WhichOneof("kind"):
        case "system":
            return records.SystemText(message.system)
        case "user_prefix":
            return records.UserPrefix(message.user_prefix)
        case "user_suffix":
            return records.UserSuffix(message.user_suffix)
        case "reference":
            return records.Reference(message.reference.text, message.reference.template)
        case "ids":
            return records.PrivilegedIds(_ids(message.ids.ids, f"{where}.privileged.ids"))
        case _:
            raise InvalidRequest(
                f"privileged is empty; give one of {', '.join(records.PRIVILEGED_KINDS)} or leave it out",
                field=f"{where}.privileged",
            )


def _build(message_type: Callable[..., _Message], where: str, fields: dict[str, Any]) -> _Message:
    """The message; a number that its wire type cannot hold is an InvalidRequest."""
    try:
        return message_type(**fields)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a value does not fit the contract: {error}", field=where) from error


def _score_item_message(item: records.ScoreItem, where: str) -> pb.ScoreItem:
    fields = _prompt_fields(item, where) | {
        "privileged": _privileged_message(item.privileged, where),
        "completion_ids": _ids_bytes(item.completion_ids, f"{where}.completion_ids"),
        "temperature": item.temperature,
        "top_k": item.top_k,
        "entropy": item.entropy,
        "teacher": item.teacher,
        "half_precision": item.half_precision,
    }
    if item.candidate_ids is not None:
        check_candidates(item.candidate_ids, len(item.completion_ids), f"{where}.candidate_ids")
        fields["candidate_ids"] = _ids_bytes(item.candidate_ids, f"{where}.candidate_ids", ndim=2)
        fields["num_candidates"] = item.candidate_ids.shape[1]
    return _build(pb.ScoreItem, where, fields)


def _score_item(item: pb.ScoreItem, where: str) -> records.ScoreItem:
    completion_ids = _ids(item.completion_ids, f"{where}.completion_ids")
    shape = (len(completion_ids), item.num_candidates)
    candidate_ids = _array(item.candidate_ids, _INT, shape, f"{where}.candidate_ids")
    return records.ScoreItem(
        prompt=_prompt(item, where),
        completion_ids=completion_ids,
        temperature=item.temperature,
        top_k=item.top_k,
        candidate_ids=candidate_ids if item.num_candidates else None,
        entropy=item.entropy,
        privileged=_privileged(item, where),
        teacher=item.teacher,
        half_precision=item.half_precision,
    )


def _generate_item_message(item: records.GenerateItem, where: str) -> pb.GenerateItem:
    fields = _prompt_fields(item, where) | {
        "privileged": _privileged_message(item.privileged, where),
        "prefix_ids": _ids_bytes(item.prefix_ids, f"{where}.prefix_ids"),
        "max_new_tokens": item.max_new_tokens,
        "temperature": item.temperature,
        "top_p": item.top_p,
        "top_k": item.top_k,
        "num_samples": item.num_samples,
        "seed": item.seed,
        "stop_token_ids": item.stop_token_ids,
        "ignore_eos": item.ignore_eos,
        "teacher": item.teacher,
    }
    return _build(pb.GenerateItem, where, fields)


def _generate_item(item: pb.GenerateItem, where: str) -> records.GenerateItem:
    return records.GenerateItem(
        prompt=_prompt(item, where),
        prefix_ids=_ids(item.prefix_ids, f"{where}.prefix_ids"),
        max_new_tokens=item.max_new_tokens,
        temperature=item.temperature,
        top_p=item.top_p,
        top_k=item.top_k,
        num_samples=item.num_samples,
        seed=item.seed if item.HasField("seed") else None,
        stop_token_ids=tuple(item.stop_token_ids),
        ignore_eos=item.ignore_eos,
        privileged=_privileged(item, where),
        teacher=item.teacher,
    )


def _score_result_message(index: int, result: records.ScoreResult) -> pb.ScoreResult:
    wide = _HALF if result.half_precision else _FLOAT
    message = pb.ScoreResult(
        num_tokens=result.num_tokens,
        sampled_logprobs=_float_bytes(result.sampled_logprobs),
        top_k=result.top_ids.shape[1],
        top_ids=_ids_bytes(result.top_ids, "result.top_ids", ndim=2),
        top_logprobs=_float_bytes(result.top_logprobs, wide),
        num_candidates=result.candidate_logprobs.shape[1],
        candidate_logprobs=_float_bytes(result.candidate_logprobs, wide),
        entropy=None if result.entropy is None else _float_bytes(result.entropy),
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
    wide = _HALF if message.half_precision else _FLOAT
    return records.ScoreResult(
        sampled_logprobs=_array(message.sampled_logprobs, _FLOAT, shape_T, "result.sampled_logprobs"),
        top_ids=_array(message.top_ids, _INT, shape_TK, "result.top_ids"),
        top_logprobs=_array(message.top_logprobs, wide, shape_TK, "result.top_logprobs").astype(np.float32, copy=False),
        candidate_logprobs=_array(message.candidate_logprobs, wide, shape_TM, "result.candidate_logprobs").astype(
            np.float32, copy=False
        ),
        entropy=_array(message.entropy, _FLOAT, shape_T, "result.entropy") if message.HasField("entropy") else None,
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
            token_ids=_ids_bytes(sample.token_ids, f"result.samples[{i}].token_ids"),
            logprobs=_float_bytes(sample.logprobs),
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
    token_ids = _ids(message.token_ids, f"{where}.token_ids")
    logprobs = _array(message.logprobs, _FLOAT, token_ids.shape, f"{where}.logprobs")
    if message.finish_reason not in ("stop", "length"):
        raise InvalidRequest(
            f'{message.finish_reason!r}; it must be "stop" or "length"', field=f"{where}.finish_reason"
        )
    return records.Sample(token_ids, logprobs, cast("records.FinishReason", message.finish_reason), message.text)


def _served_teacher(message: pb.ServedTeacher) -> records.ServedTeacher:
    if message.kind not in ("model", "adapter"):
        raise InvalidRequest(f'{message.kind!r}; it must be "model" or "adapter"', field="teacher.kind")
    return records.ServedTeacher(message.name, cast("records.TeacherKind", message.kind), message.weights_version)


def _outcome(
    message: pb.ScoreResponse | pb.GenerateResponse, to_record: Callable[[int, Any], _Result]
) -> _Result | TeacherError:
    match message.WhichOneof("outcome"):
        case "result":
            return to_record(message.index, message.result)
        case "error":
            return _error(message.error)
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


def _error_message(error: TeacherError) -> pb.Error:
    return pb.Error(
        name=error.name,
        message=error.message[:MAX_ERROR_CHARS],
        field=error.field[:MAX_ERROR_CHARS],
        retry_after_s=error.retry_after_s or 0.0,
    )


def _error(message: pb.Error) -> TeacherError:
    return error_from_name(
        message.name, message.message, field=message.field, retry_after_s=message.retry_after_s or None
    )
