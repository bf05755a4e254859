"""Records <-> serialised protobuf.

Every `decode_*` takes bytes from outside and raises InvalidRequest, naming the field and both numbers, on anything that
is not exactly one record.
"""

from protos.codec.arrays import check_candidates
from protos.codec.errors import MAX_ERROR_CHARS, decode_error, decode_error_reply, encode_error
from protos.codec.replies import decode_generate_reply, decode_score_reply, encode_generate_reply, encode_score_reply
from protos.codec.requests import (
    decode_generate_request,
    decode_score_request,
    encode_generate_request,
    encode_score_request,
)
from protos.codec.teachers import (
    decode_info,
    decode_unload,
    decode_unloaded,
    decode_updated,
    decode_weights_part,
    encode_info,
    encode_unload,
    encode_unloaded,
    encode_updated,
    encode_weights_chunk,
    encode_weights_update,
)

__all__ = [
    "MAX_ERROR_CHARS",
    "check_candidates",
    "decode_error",
    "decode_error_reply",
    "decode_generate_reply",
    "decode_generate_request",
    "decode_info",
    "decode_score_reply",
    "decode_score_request",
    "decode_unload",
    "decode_unloaded",
    "decode_updated",
    "decode_weights_part",
    "encode_error",
    "encode_generate_reply",
    "encode_generate_request",
    "encode_info",
    "encode_score_reply",
    "encode_score_request",
    "encode_unload",
    "encode_unloaded",
    "encode_updated",
    "encode_weights_chunk",
    "encode_weights_update",
]
