"""The student's weights on their way into a teacher server, which then answers as the student of that step does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from protos.client import Teacher
from protos.errors import Conflict, InvalidRequest, PermissionDenied, TeacherError
from protos.records import ServedTeacher, WeightsUpdate
from protos.wire import MAX_CHUNK_BYTES
from student_trainer import distributed
from student_trainer.client_thread import ClientThread
from student_trainer.plain_weights import plain_weights

RETRY_WAITS_S = (0.5, 2.0, 8.0)
"""Between attempts that failed for a reason which may pass."""


class Carry(Protocol):
    """A way to get weights to a server: one attempt at the update, whose header says only teacher and version."""

    async def __call__(
        self, teacher: Teacher, update: WeightsUpdate, weights: Mapping[str, torch.Tensor], timeout_s: float
    ) -> ServedTeacher:
        """What is served once they are."""
        ...


async def stream(
    teacher: Teacher, update: WeightsUpdate, weights: Mapping[str, torch.Tensor], timeout_s: float
) -> ServedTeacher:
    """Carries them as the bytes of one safetensors file, inside the call itself."""
    return await teacher.update_weights(update, _chunks(weights_file(weights)), timeout_s=timeout_s)


class WeightsSync:
    """Pushes a model's weights to the server behind `client`.

    Versions only rise on a server, and a resumed run steps through optimiser steps that its killed self has pushed
    already; so versions are counted on the server, from the one it serves, and never taken from the step.

    Args:
        client: a connection whose token has the scope `admin`.
        carry: `stream`, or `weights_transfer.transfer`.
        teacher: the served name; "" is the server's first.
        timeout_s: for one attempt, in seconds.

    Attributes:
        version: of the last weights pushed, or of those the server had at the start.
    """

    def __init__(self, client: ClientThread, *, carry: Carry = stream, teacher: str = "", timeout_s: float) -> None:
        self._client = client
        self._carry = carry
        self._teacher = teacher or client.info.teachers[0]
        served = {one.name: one.weights_version for one in client.info.served}
        self.version = served.get(self._teacher, client.info.weights_version)
        self._unheard_of: int | None = None
        self._timeout_s = timeout_s

    def push(self, model: PreTrainedModel, dtype: torch.dtype) -> int:
        """`send` of the model's weights in that dtype, for a synchronous caller.

        Every rank calls it; rank 0 sends, once no rank can still be asking for the weights before.
        """
        weights = plain_weights(model, dtype)
        distributed.agreed(lambda: None)
        self.version = distributed.by_main(lambda: self._client.wait(self.send(weights)))
        return self.version

    async def send(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Sends these weights and returns their version, once later requests are answered by them.

        Args:
            weights: as `plain_weights` names them.

        Raises:
            PermissionDenied: the token has no admin scope, or the server takes no weights in this way.
            InvalidRequest: the server's model is another.
            TeacherError: the server refused the weights, or could not be reached in `len(RETRY_WAITS_S)` retries.
        """
        self.version = await self._send(weights)
        return self.version

    async def _send(self, weights: Mapping[str, torch.Tensor]) -> int:
        update = WeightsUpdate(self._teacher, self.version + 1)
        for wait_s in (*RETRY_WAITS_S, None):
            try:
                served = await self._carry(self._client.teacher, update, weights, self._timeout_s)
            except PermissionDenied as error:
                if error.field == "transfer":
                    raise
                raise PermissionDenied(
                    f"{self._client.teacher.url} must take the student's weights, and TEACHER_TOKEN has no admin scope "
                    f"there ({error}): start the server with --tokens and give the trainer a token with that scope"
                ) from error
            except InvalidRequest as error:
                raise InvalidRequest(
                    f"{self._client.teacher.url} serves {self._client.info.model}, which the student's weights do not "
                    f"fit ({error}): serve the student's own model there"
                ) from error
            except Conflict:
                # Somebody else's, unless an attempt of ours whose reply was lost has gone through.
                if self._unheard_of != update.version:
                    raise
                info = await self._client.teacher.info()
                if {one.name: one.weights_version for one in info.served}.get(self._teacher) != update.version:
                    raise
                return update.version
            except TeacherError as error:
                self._unheard_of = update.version
                if wait_s is None or not error.row.retryable:
                    raise
                await asyncio.sleep(wait_s)
            else:
                return served.weights_version
        raise AssertionError("the last attempt returns or raises")


def weights_file(weights: Mapping[str, torch.Tensor]) -> bytes:
    """One safetensors file."""
    return save({name: tensor.contiguous() for name, tensor in weights.items()})


async def _chunks(file: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(file), MAX_CHUNK_BYTES):
        yield file[start : start + MAX_CHUNK_BYTES]
