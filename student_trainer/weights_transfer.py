"""The student's weights broadcast straight into the workers of the server's engine: no file, no copy on a disk."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from urllib.parse import urlsplit

import torch

from protos.client import Teacher, is_pool
from protos.errors import PermissionDenied, TeacherError
from protos.records import ServedTeacher, TeacherInfo, TransferredTensor, WeightsTransfer, WeightsUpdate
from protos.wire import TENSOR_DTYPES
from student_trainer.config import ConfigError
from student_trainer.weights_senders import GlooSender, NcclSender, Sender

TENSOR_NAMES = {getattr(torch, name): key for key, name in TENSOR_DTYPES.items()}
"""safetensors' name of each type."""


def check_takes_transfers(info: TeacherInfo, url: str, table: str) -> None:
    """Refuses, before a run begins, a server that `transfer` cannot carry weights to.

    Args:
        table: of the config, in which `url` and `weights_by` are.

    Raises:
        ConfigError: it is a pool, or takes none.
    """
    if is_pool(url):
        raise ConfigError(
            f'{table}.weights_by is "transfer" and {table}.url {url} a pool, and a transfer is to one server: name '
            f'that server, or set {table}.weights_by to "stream", which sends them to every replica'
        )
    if not info.weights_transfer:
        raise ConfigError(
            f'{table}.weights_by is "transfer" and {table}.url {url} takes none: start that server with '
            f'--weights-transfer, or set {table}.weights_by to "stream"'
        )


async def transfer(
    teacher: Teacher, update: WeightsUpdate, weights: Mapping[str, torch.Tensor], timeout_s: float
) -> ServedTeacher:
    """Carries the weights over the backend that the server takes; see `weights_sync.Carry`.

    Raises:
        ConfigError: that backend is not to be had here.
        PermissionDenied: the server takes none.
        TeacherError: the server refused, or lost the sender.
    """
    info = await teacher.info()
    sender = _sender(info, teacher.url, timeout_s)
    tensors = [TransferredTensor(name, TENSOR_NAMES[one.dtype], tuple(one.shape)) for name, one in weights.items()]
    moving = replace(update, transfer=WeightsTransfer(info.weights_transfer, sender.rendezvous, tuple(tensors)))
    failures: list[str] = []

    def send() -> None:
        try:
            sender.send(weights.values())
        except Exception as error:
            failures.append(str(error))  # the exception itself would keep the group open
            sender.close()

    # Not a thread of a pool, which would be waited for when the process ends.
    threading.Thread(target=send, name="weights-sender", daemon=True).start()
    try:
        return await teacher.update_weights(moving, timeout_s=timeout_s)
    except TeacherError as error:
        if failures:
            raise type(error)(f"{error.message} (the sender: {failures[0]})", field=error.field) from error
        raise
    finally:
        sender.close()


def _sender(info: TeacherInfo, url: str, timeout_s: float) -> Sender:
    where = urlsplit(url)
    match info.weights_transfer:
        case "gloo" if where.hostname:
            return GlooSender(where.hostname, where.port or 443, info.num_workers, timeout_s)
        case "nccl":
            try:
                return NcclSender(info.num_workers)
            except (ImportError, OSError, ValueError) as error:
                raise ConfigError(
                    f'weights_by is "transfer", and {url} takes them over nccl, which needs vLLM and a GPU beside the '
                    f'trainer ({error}): install the extra `vllm`, or set weights_by to "stream"'
                ) from error
        case _:
            raise PermissionDenied(
                f'weights_by is "transfer", and {url} takes none: start it as one server with --weights-transfer, or '
                'set weights_by to "stream"',
                field="transfer",
            )
