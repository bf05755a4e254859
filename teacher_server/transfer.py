"""What must hold of a transfer before any worker waits for its sender; pure."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import urlsplit

from protos.errors import InvalidRequest, PermissionDenied
from protos.records import WeightsTransfer
from teacher_server.served_model import ServedModel
from teacher_server.tensor_files import TensorSpec, check_fits_model

NCCL_ID_BYTES = 128
"""NCCL_UNIQUE_ID_BYTES of nccl.h."""


def check_transfer(transfer: WeightsTransfer, offered: str, model: ServedModel) -> None:
    """Refuses what the engine's workers would wait for in vain, or take for other weights.

    Args:
        offered: the backend that the engine takes; "" for none.

    Raises:
        PermissionDenied: it takes none.
        InvalidRequest: another backend, no place to meet, or tensors that are not the model's.
    """
    if not offered:
        raise PermissionDenied(
            "weights do not come by transfer here; send the bytes, or start the server with --engine vllm "
            "--weights-transfer gloo, or nccl on GPUs",
            field="transfer",
        )
    if transfer.backend != offered:
        raise InvalidRequest(
            f"backend is {transfer.backend[:80]!r}; this server takes {offered!r}", field="transfer.backend"
        )
    if not (_is_address if offered == "gloo" else _is_nccl_id)(transfer.rendezvous):
        wanted = "HOST:PORT" if offered == "gloo" else f"{NCCL_ID_BYTES} bytes in base64"
        raise InvalidRequest(
            f"rendezvous is {transfer.rendezvous[:80]!r}; {offered} needs {wanted}", field="transfer.rendezvous"
        )
    specs = {tensor.name: TensorSpec(tensor.dtype, tensor.shape) for tensor in transfer.tensors}
    if len(specs) != len(transfer.tensors):
        names = [tensor.name for tensor in transfer.tensors]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"{twice!r} comes twice; send each tensor once", field="transfer.tensors")
    check_fits_model(specs, model.files.specs, model.tied)


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(f"//{text}")
        return bool(parts.hostname and parts.port) and parts.netloc == text and "@" not in text
    except ValueError:
        return False


def _is_nccl_id(text: str) -> bool:
    try:
        return len(base64.b64decode(text, validate=True)) == NCCL_ID_BYTES
    except binascii.Error:
        return False
