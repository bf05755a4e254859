"""The contract as JSON for people: the protobuf messages with nested lists for arrays and null for NaN.

Only servers use it (programs speak protobuf); unknown keys are refused, and every error names its field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protos import records
from protos.codec import MAX_ERROR_CHARS
from protos.errors import InvalidRequest, TeacherError
from protos.records import Int32

Id = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Version = Annotated[int, Field(ge=-(2**63), lt=2**63)]
LogProb = float | Literal["-Infinity"] | None
"""In nats; null is NaN (there is no such value), and "-Infinity" is written as ProtoJSON writes it."""

_Model = TypeVar("_Model", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MessageJson(_Strict):
    """One turn of a chat."""

    role: str
    content: str


class ChatJson(_Strict):
    """A prompt that the server renders with its model's chat template."""

    messages: list[MessageJson]


class ReferenceJson(_Strict):
    """A reference answer or solution, worded by the named template."""

    text: str
    template: str = "answer"


class PrivilegedJson(_Strict):
    """What the teacher sees and the student does not; exactly one key."""

    system: str | None = None
    user_prefix: str | None = None
    user_suffix: str | None = None
    reference: ReferenceJson | None = None
    ids: list[Id] | None = None

    def to_record(self, field: str) -> records.Privileged:
        """The one choice that is given."""
        choices: list[records.Privileged] = []
        if self.system is not None:
            choices.append(records.SystemText(self.system))
        if self.user_prefix is not None:
            choices.append(records.UserPrefix(self.user_prefix))
        if self.user_suffix is not None:
            choices.append(records.UserSuffix(self.user_suffix))
        if self.reference is not None:
            choices.append(records.Reference(self.reference.text, self.reference.template))
        if self.ids is not None:
            choices.append(records.PrivilegedIds(_ids(self.ids)))
        if len(choices) != 1:
            kinds = ", ".join(records.PRIVILEGED_KINDS)
            raise InvalidRequest(f"{len(choices)} kinds are given; give exactly one of {kinds}", field=field)
        return choices[0]


class _ItemJson(_Strict):
    prompt_ids: list[Id] | None = None
    chat: ChatJson | None = None
    privileged: PrivilegedJson | None = None
    teacher: str = ""

    def prompt_record(self, where: str) -> Int32 | records.Chat:
        if self.prompt_ids is not None and self.chat is None:
            return _ids(self.prompt_ids)
        if self.chat is not None and self.prompt_ids is None:
            return records.Chat(tuple(records.Message(m.role, m.content) for m in self.chat.messages))
        raise InvalidRequest("give exactly one of prompt_ids and chat", field=f"{where}.prompt")

    def privileged_record(self, where: str) -> records.Privileged | None:
        return self.privileged and self.privileged.to_record(f"{where}.privileged")


class ScoreItemJson(_ItemJson):
    """One completion to score; see records.ScoreItem."""

    completion_ids: list[Id]
    temperature: float = 1.0
    top_k: Id = 0
    candidate_ids: list[list[Id]] | None = None
    entropy: bool = False
    half_precision: bool = False

    def to_record(self, where: str) -> records.ScoreItem:
        """The record; InvalidRequest where keys exclude each other or rows differ in length."""
        return records.ScoreItem(
            prompt=self.prompt_record(where),
            completion_ids=_ids(self.completion_ids),
            temperature=self.temperature,
            top_k=self.top_k,
            candidate_ids=_matrix(self.candidate_ids, f"{where}.candidate_ids") if self.candidate_ids else None,
            entropy=self.entropy,
            privileged=self.privileged_record(where),
            teacher=self.teacher,
            half_precision=self.half_precision,
        )


class ScoreRequestJson(_Strict):
    """Items scored together; see records.ScoreRequest."""

    items: list[ScoreItemJson]
    min_weights_version: Version = 0
    max_weights_wait_s: float = 0.0


class GenerateItemJson(_ItemJson):
    """One text to continue; see records.GenerateItem."""

    prefix_ids: list[Id] = []
    max_new_tokens: Id = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Id = 0
    num_samples: Id = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop_token_ids: list[Id] = []
    ignore_eos: bool = False

    def to_record(self, where: str) -> records.GenerateItem:
        """The record; InvalidRequest where keys exclude each other."""
        return records.GenerateItem(
            prompt=self.prompt_record(where),
            prefix_ids=_ids(self.prefix_ids),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            num_samples=self.num_samples,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            privileged=self.privileged_record(where),
            teacher=self.teacher,
        )


class GenerateRequestJson(_Strict):
    """Items continued together; see records.GenerateRequest."""

    items: list[GenerateItemJson]
    min_weights_version: Version = 0
    max_weights_wait_s: float = 0.0


class WeightsUpdateJson(_Strict):
    """New weights that the server reads from its own disk; see records.WeightsUpdate."""

    version: Version
    path: str
    ema_decay: float | None = None


class ServedTeacherJson(_Strict):
    """See records.ServedTeacher."""

    name: str
    kind: records.TeacherKind
    weights_version: int


class ErrorJson(_Strict):
    """One error of the table; see errors."""

    name: str
    message: str
    field: str
    retry_after_s: float | None


class ErrorReplyJson(_Strict):
    """The body of every answer that is an error as a whole."""

    error: ErrorJson


class ScoreResultJson(_Strict):
    """See records.ScoreResult."""

    sampled_logprobs: list[LogProb]
    top_ids: list[list[int]]
    top_logprobs: list[list[LogProb]]
    candidate_logprobs: list[list[LogProb]]
    entropy: list[LogProb] | None
    weights_version: int
    num_context_tokens: int
    num_cached_tokens: int
    queue_s: float
    engine_s: float
    completion_crc32: int
    half_precision: bool


class SampleJson(_Strict):
    """See records.Sample."""

    token_ids: list[int]
    logprobs: list[LogProb]
    finish_reason: records.FinishReason
    text: str


class GenerateResultJson(_Strict):
    """See records.GenerateResult."""

    samples: list[SampleJson]
    weights_version: int
    num_context_tokens: int
    num_cached_tokens: int
    queue_s: float
    engine_s: float


class ScoreReplyJson(_Strict):
    """One item's outcome: a result or an error."""

    index: int
    result: ScoreResultJson | None = None
    error: ErrorJson | None = None


class GenerateReplyJson(_Strict):
    """One item's outcome: a result or an error."""

    index: int
    result: GenerateResultJson | None = None
    error: ErrorJson | None = None


class ScoreRepliesJson(_Strict):
    """The outcomes of a request, in the order of its items."""

    replies: list[ScoreReplyJson]


class GenerateRepliesJson(_Strict):
    """The outcomes of a request, in the order of its items."""

    replies: list[GenerateReplyJson]


def score_request_from_json(data: bytes) -> records.ScoreRequest:
    """The request in a JSON body; InvalidRequest names the field at fault."""
    body = _parse(ScoreRequestJson, data)
    items = tuple(item.to_record(f"items[{i}]") for i, item in enumerate(body.items))
    return records.ScoreRequest(items, body.min_weights_version, body.max_weights_wait_s)


def generate_request_from_json(data: bytes) -> records.GenerateRequest:
    """The request in a JSON body; InvalidRequest names the field at fault."""
    body = _parse(GenerateRequestJson, data)
    items = tuple(item.to_record(f"items[{i}]") for i, item in enumerate(body.items))
    return records.GenerateRequest(items, body.min_weights_version, body.max_weights_wait_s)


def weights_update_from_json(teacher: str, data: bytes) -> records.WeightsUpdate:
    """The update of `teacher` in a JSON body; InvalidRequest names the field at fault."""
    return records.WeightsUpdate(teacher, **vars(_parse(WeightsUpdateJson, data)))


def score_reply_to_json(index: int, outcome: records.ScoreResult | TeacherError) -> ScoreReplyJson:
    """One item's outcome."""
    if isinstance(outcome, TeacherError):
        return ScoreReplyJson(index=index, error=error_to_json(outcome))
    fields = {name: _lists(value) for name, value in vars(outcome).items()}
    return ScoreReplyJson(index=index, result=ScoreResultJson(**fields))


def generate_reply_to_json(index: int, outcome: records.GenerateResult | TeacherError) -> GenerateReplyJson:
    """One item's outcome."""
    if isinstance(outcome, TeacherError):
        return GenerateReplyJson(index=index, error=error_to_json(outcome))
    fields: dict[str, Any] = dict(vars(outcome))
    fields["samples"] = [
        SampleJson(**{name: _lists(value) for name, value in vars(sample).items()}) for sample in outcome.samples
    ]
    return GenerateReplyJson(index=index, result=GenerateResultJson(**fields))


def error_to_json(error: TeacherError) -> ErrorJson:
    """The error, cut as on the other wire."""
    return ErrorJson(
        name=error.name,
        message=error.message[:MAX_ERROR_CHARS],
        field=error.field[:MAX_ERROR_CHARS],
        retry_after_s=error.retry_after_s,
    )


def _parse(model: type[_Model], data: bytes) -> _Model:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidRequest(first["msg"], field=_path(first["loc"])) from error


def _path(location: tuple[int | str, ...]) -> str:
    """("items", 3, "temperature") as "items[3].temperature"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _ids(ids: list[int]) -> Int32:
    return np.array(ids, np.int32)


def _matrix(rows: list[list[int]], field: str) -> Int32:
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise InvalidRequest(f"rows of {sorted(lengths)} ids; all must have one length (-1 pads)", field=field)
    return np.array(rows, np.int32)


def _lists(value: object) -> Any:
    """An array as nested lists, with null for NaN; anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
        return _without_non_finite(value)
    return value.tolist()


def _without_non_finite(values: NDArray[np.floating]) -> list[Any]:
    objects = values.astype(object)
    objects[np.isnan(values)] = None
    objects[np.isneginf(values)] = "-Infinity"
    return objects.tolist()
