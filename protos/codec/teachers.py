"""What is served and what changes it <-> protobuf: the handshake, new weights, the end of an adapter."""

from __future__ import annotations

import zlib
from typing import Any, cast

from protos import records
from protos.codec.messages import build, parse, plain_fields
from protos.errors import Corrupted, InvalidRequest
from protos.teacher.v1 import teacher_pb2 as pb


def encode_info(info: records.TeacherInfo) -> bytes:
    """The handshake as a serialised GetInfoResponse."""
    fields: dict[str, Any] = {name: getattr(info, name) for name in pb.GetInfoResponse.DESCRIPTOR.fields_by_name}
    fields["tokenizer"] = pb.TokenizerFingerprint(**vars(info.tokenizer))
    fields["served"] = [pb.ServedTeacher(**vars(teacher)) for teacher in info.served]
    return pb.GetInfoResponse(**fields).SerializeToString()


def decode_info(data: bytes) -> records.TeacherInfo:
    """The handshake in a serialised GetInfoResponse."""
    message = parse(pb.GetInfoResponse, data)
    fields = plain_fields(message)
    fields["tokenizer"] = records.TokenizerFingerprint(**plain_fields(message.tokenizer))
    fields["served"] = tuple(_served_teacher(teacher) for teacher in message.served)
    return records.TeacherInfo(**fields)


def encode_weights_update(update: records.WeightsUpdate) -> bytes:
    """The first message of an UpdateWeights stream."""
    transfer = None if update.transfer is None else _transfer_message(update.transfer)
    header = build(pb.WeightsHeader, "", vars(update) | {"transfer": transfer})
    return pb.UpdateWeightsRequest(header=header).SerializeToString()


def encode_weights_chunk(chunk: bytes) -> bytes:
    """A further message of an UpdateWeights stream."""
    return pb.UpdateWeightsRequest(chunk=chunk, chunk_crc32=zlib.crc32(chunk)).SerializeToString()


def decode_weights_part(data: bytes) -> records.WeightsUpdate | bytes:
    """The header or the chunk in one message of an UpdateWeights stream."""
    message = parse(pb.UpdateWeightsRequest, data)
    match message.WhichOneof("part"):
        case "header":
            fields = plain_fields(message.header)
            if not message.header.HasField("ema_decay"):
                fields["ema_decay"] = None
            fields["transfer"] = _transfer(message.header.transfer) if message.header.HasField("transfer") else None
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
    return _served_teacher(parse(pb.UpdateWeightsResponse, data).teacher)


def encode_unload(teacher: str) -> bytes:
    """A serialised UnloadTeacherRequest."""
    return build(pb.UnloadTeacherRequest, "teacher", {"teacher": teacher}).SerializeToString()


def decode_unload(data: bytes) -> str:
    """The name in a serialised UnloadTeacherRequest."""
    return parse(pb.UnloadTeacherRequest, data).teacher


def encode_unloaded(teacher: records.ServedTeacher) -> bytes:
    """What was unloaded, as a serialised UnloadTeacherResponse."""
    return pb.UnloadTeacherResponse(teacher=pb.ServedTeacher(**vars(teacher))).SerializeToString()


def decode_unloaded(data: bytes) -> records.ServedTeacher:
    """The teacher in a serialised UnloadTeacherResponse."""
    return _served_teacher(parse(pb.UnloadTeacherResponse, data).teacher)


def _served_teacher(message: pb.ServedTeacher) -> records.ServedTeacher:
    if message.kind not in ("model", "adapter"):
        raise InvalidRequest(f'{message.kind!r}; it must be "model" or "adapter"', field="teacher.kind")
    return records.ServedTeacher(message.name, cast("records.TeacherKind", message.kind), message.weights_version)


def _transfer_message(transfer: records.WeightsTransfer) -> pb.WeightsTransfer:
    tensors = [build(pb.TransferredTensor, "transfer.tensors", vars(tensor)) for tensor in transfer.tensors]
    return build(pb.WeightsTransfer, "transfer", vars(transfer) | {"tensors": tensors})


def _transfer(message: pb.WeightsTransfer) -> records.WeightsTransfer:
    tensors = tuple(records.TransferredTensor(**plain_fields(tensor)) for tensor in message.tensors)
    return records.WeightsTransfer(message.backend, message.rendezvous, tensors)
