"""Requests to score and to continue <-> protobuf."""

from __future__ import annotations

from typing import Any

from protos import records
from protos.codec.arrays import INT, array_of, check_candidates, ids_bytes, ids_of
from protos.codec.messages import build, parse
from protos.errors import InvalidRequest
from protos.records import Int32
from protos.teacher.v1 import teacher_pb2 as pb


def encode_score_request(request: records.ScoreRequest) -> bytes:
    """The request as a serialised ScoreRequest; InvalidRequest on an array of the wrong shape or type."""
    items = [_score_item_message(item, f"items[{i}]") for i, item in enumerate(request.items)]
    versions = {"min_weights_version": request.min_weights_version, "max_weights_wait_s": request.max_weights_wait_s}
    return build(pb.ScoreRequest, "", {"items": items, **versions}).SerializeToString()


def decode_score_request(data: bytes) -> records.ScoreRequest:
    """The ScoreRequest in `data`."""
    message = parse(pb.ScoreRequest, data)
    items = tuple(_score_item(item, f"items[{i}]") for i, item in enumerate(message.items))
    return records.ScoreRequest(items, message.min_weights_version, message.max_weights_wait_s)


def encode_generate_request(request: records.GenerateRequest) -> bytes:
    """The request as a serialised GenerateRequest; InvalidRequest on an array of the wrong shape or type."""
    items = [_generate_item_message(item, f"items[{i}]") for i, item in enumerate(request.items)]
    versions = {"min_weights_version": request.min_weights_version, "max_weights_wait_s": request.max_weights_wait_s}
    return build(pb.GenerateRequest, "", {"items": items, **versions}).SerializeToString()


def decode_generate_request(data: bytes) -> records.GenerateRequest:
    """The GenerateRequest in `data`."""
    message = parse(pb.GenerateRequest, data)
    items = tuple(_generate_item(item, f"items[{i}]") for i, item in enumerate(message.items))
    return records.GenerateRequest(items, message.min_weights_version, message.max_weights_wait_s)


def _prompt_fields(item: records.ScoreItem | records.GenerateItem, where: str) -> dict[str, Any]:
    if isinstance(item.prompt, records.Chat):
        return {"chat": pb.Chat(messages=[pb.Message(role=m.role, content=m.content) for m in item.prompt.messages])}
    return {"prompt_ids": pb.TokenIds(ids=ids_bytes(item.prompt, f"{where}.prompt_ids"))}


def _prompt(item: pb.ScoreItem | pb.GenerateItem, where: str) -> Int32 | records.Chat:
    match item.WhichOneof("prompt"):
        case "prompt_ids":
            return ids_of(item.prompt_ids.ids, f"{where}.prompt_ids")
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
            return pb.Privileged(ids=pb.TokenIds(ids=ids_bytes(ids, f"{where}.privileged.ids")))


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
            return records.PrivilegedIds(ids_of(message.ids.ids, f"{where}.privileged.ids"))
        case _:
            raise InvalidRequest(
                f"privileged is empty; give one of {', '.join(records.PRIVILEGED_KINDS)} or leave it out",
                field=f"{where}.privileged",
            )


def _score_item_message(item: records.ScoreItem, where: str) -> pb.ScoreItem:
    fields = _prompt_fields(item, where) | {
        "privileged": _privileged_message(item.privileged, where),
        "completion_ids": ids_bytes(item.completion_ids, f"{where}.completion_ids"),
        "temperature": item.temperature,
        "top_k": item.top_k,
        "entropy": item.entropy,
        "teacher": item.teacher,
        "half_precision": item.half_precision,
    }
    if item.candidate_ids is not None:
        check_candidates(item.candidate_ids, len(item.completion_ids), f"{where}.candidate_ids")
        fields["candidate_ids"] = ids_bytes(item.candidate_ids, f"{where}.candidate_ids", ndim=2)
        fields["num_candidates"] = item.candidate_ids.shape[1]
    return build(pb.ScoreItem, where, fields)


def _score_item(item: pb.ScoreItem, where: str) -> records.ScoreItem:
    completion_ids = ids_of(item.completion_ids, f"{where}.completion_ids")
    is_shared = len(item.candidate_ids) == item.num_candidates * INT.itemsize
    shape = (1 if is_shared else len(completion_ids), item.num_candidates)
    candidate_ids = array_of(item.candidate_ids, INT, shape, f"{where}.candidate_ids")
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
        "prefix_ids": ids_bytes(item.prefix_ids, f"{where}.prefix_ids"),
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
    return build(pb.GenerateItem, where, fields)


def _generate_item(item: pb.GenerateItem, where: str) -> records.GenerateItem:
    return records.GenerateItem(
        prompt=_prompt(item, where),
        prefix_ids=ids_of(item.prefix_ids, f"{where}.prefix_ids"),
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
