from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("teachers", "model", "revision", "weights_version", "tokenizer", "max_context_tokens", "max_top_k", "max_candidates", "max_items", "supports", "exact_temperature", "prefix_cache", "dtype", "engine", "engine_version", "score_path", "determinism", "privileged_kinds", "reference_templates", "served", "weights_transfer", "num_workers", "contract_version")
    TEACHERS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    MAX_ITEMS_FIELD_NUMBER: _ClassVar[int]
    SUPPORTS_FIELD_NUMBER: _ClassVar[int]
    EXACT_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SCORE_PATH_FIELD_NUMBER: _ClassVar[int]
    DETERMINISM_FIELD_NUMBER: _ClassVar[int]
    PRIVILEGED_KINDS_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_TEMPLATES_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    NUM_WORKERS_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_VERSION_FIELD_NUMBER: _ClassVar[int]
    teachers: _containers.RepeatedScalarFieldContainer[str]
    model: str
    revision: str
    weights_version: int
    tokenizer: TokenizerFingerprint
    max_context_tokens: int
    max_top_k: int
    max_candidates: int
    max_items: int
    supports: _containers.RepeatedScalarFieldContainer[str]
    exact_temperature: bool
    prefix_cache: bool
    dtype: str
    engine: str
    engine_version: str
    score_path: str
    determinism: str
    privileged_kinds: _containers.RepeatedScalarFieldContainer[str]
    reference_templates: _containers.RepeatedScalarFieldContainer[str]
    served: _containers.RepeatedCompositeFieldContainer[ServedTeacher]
    weights_transfer: str
    num_workers: int
    contract_version: int
    def __init__(self, teachers: _Optional[_Iterable[str]] = ..., model: _Optional[str] = ..., revision: _Optional[str] = ..., weights_version: _Optional[int] = ..., tokenizer: _Optional[_Union[TokenizerFingerprint, _Mapping]] = ..., max_context_tokens: _Optional[int] = ..., max_top_k: _Optional[int] = ..., max_candidates: _Optional[int] = ..., max_items: _Optional[int] = ..., supports: _Optional[_Iterable[str]] = ..., exact_temperature: _Optional[bool] = ..., prefix_cache: _Optional[bool] = ..., dtype: _Optional[str] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., score_path: _Optional[str] = ..., determinism: _Optional[str] = ..., privileged_kinds: _Optional[_Iterable[str]] = ..., reference_templates: _Optional[_Iterable[str]] = ..., served: _Optional[_Iterable[_Union[ServedTeacher, _Mapping]]] = ..., weights_transfer: _Optional[str] = ..., num_workers: _Optional[int] = ..., contract_version: _Optional[int] = ...) -> None: ...

class ServedTeacher(_message.Message):
    __slots__ = ("name", "kind", "weights_version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    weights_version: int
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., weights_version: _Optional[int] = ...) -> None: ...

class TokenizerFingerprint(_message.Message):
    __slots__ = ("vocab_size", "vocab_sha256", "special_sha256", "eos_token_ids", "chat_template_sha256")
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SHA256_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_SHA256_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_SHA256_FIELD_NUMBER: _ClassVar[int]
    vocab_size: int
    vocab_sha256: str
    special_sha256: str
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    chat_template_sha256: str
    def __init__(self, vocab_size: _Optional[int] = ..., vocab_sha256: _Optional[str] = ..., special_sha256: _Optional[str] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., chat_template_sha256: _Optional[str] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: bytes
    def __init__(self, ids: _Optional[bytes] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class Privileged(_message.Message):
    __slots__ = ("system", "user_prefix", "user_suffix", "reference", "ids")
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    USER_PREFIX_FIELD_NUMBER: _ClassVar[int]
    USER_SUFFIX_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    system: str
    user_prefix: str
    user_suffix: str
    reference: Reference
    ids: TokenIds
    def __init__(self, system: _Optional[str] = ..., user_prefix: _Optional[str] = ..., user_suffix: _Optional[str] = ..., reference: _Optional[_Union[Reference, _Mapping]] = ..., ids: _Optional[_Union[TokenIds, _Mapping]] = ...) -> None: ...

class Reference(_message.Message):
    __slots__ = ("text", "template")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    text: str
    template: str
    def __init__(self, text: _Optional[str] = ..., template: _Optional[str] = ...) -> None: ...

class ScoreItem(_message.Message):
    __slots__ = ("prompt_ids", "chat", "privileged", "completion_ids", "temperature", "top_k", "candidate_ids", "num_candidates", "entropy", "teacher", "half_precision")
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    PRIVILEGED_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_IDS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    HALF_PRECISION_FIELD_NUMBER: _ClassVar[int]
    prompt_ids: TokenIds
    chat: Chat
    privileged: Privileged
    completion_ids: bytes
    temperature: float
    top_k: int
    candidate_ids: bytes
    num_candidates: int
    entropy: bool
    teacher: str
    half_precision: bool
    def __init__(self, prompt_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., privileged: _Optional[_Union[Privileged, _Mapping]] = ..., completion_ids: _Optional[bytes] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., candidate_ids: _Optional[bytes] = ..., num_candidates: _Optional[int] = ..., entropy: _Optional[bool] = ..., teacher: _Optional[str] = ..., half_precision: _Optional[bool] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("items", "min_weights_version", "max_weights_wait_s")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    MIN_WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_WEIGHTS_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ScoreItem]
    min_weights_version: int
    max_weights_wait_s: float
    def __init__(self, items: _Optional[_Iterable[_Union[ScoreItem, _Mapping]]] = ..., min_weights_version: _Optional[int] = ..., max_weights_wait_s: _Optional[float] = ...) -> None: ...

class ScoreResult(_message.Message):
    __slots__ = ("num_tokens", "sampled_logprobs", "top_k", "top_ids", "top_logprobs", "num_candidates", "candidate_logprobs", "entropy", "weights_version", "num_context_tokens", "num_cached_tokens", "queue_s", "engine_s", "completion_crc32", "half_precision", "result_crc32")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    ENGINE_S_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_CRC32_FIELD_NUMBER: _ClassVar[int]
    HALF_PRECISION_FIELD_NUMBER: _ClassVar[int]
    RESULT_CRC32_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    sampled_logprobs: bytes
    top_k: int
    top_ids: bytes
    top_logprobs: bytes
    num_candidates: int
    candidate_logprobs: bytes
    entropy: bytes
    weights_version: int
    num_context_tokens: int
    num_cached_tokens: int
    queue_s: float
    engine_s: float
    completion_crc32: int
    half_precision: bool
    result_crc32: int
    def __init__(self, num_tokens: _Optional[int] = ..., sampled_logprobs: _Optional[bytes] = ..., top_k: _Optional[int] = ..., top_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ..., num_candidates: _Optional[int] = ..., candidate_logprobs: _Optional[bytes] = ..., entropy: _Optional[bytes] = ..., weights_version: _Optional[int] = ..., num_context_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., engine_s: _Optional[float] = ..., completion_crc32: _Optional[int] = ..., half_precision: _Optional[bool] = ..., result_crc32: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("name", "message", "field", "retry_after_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    message: str
    field: str
    retry_after_s: float
    def __init__(self, name: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("index", "result", "error")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    index: int
    result: ScoreResult
    error: Error
    def __init__(self, index: _Optional[int] = ..., result: _Optional[_Union[ScoreResult, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class GenerateItem(_message.Message):
    __slots__ = ("prompt_ids", "chat", "privileged", "prefix_ids", "max_new_tokens", "temperature", "top_p", "top_k", "num_samples", "seed", "stop_token_ids", "ignore_eos", "teacher")
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    PRIVILEGED_FIELD_NUMBER: _ClassVar[int]
    PREFIX_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    prompt_ids: TokenIds
    chat: Chat
    privileged: Privileged
    prefix_ids: bytes
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    num_samples: int
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    teacher: str
    def __init__(self, prompt_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., privileged: _Optional[_Union[Privileged, _Mapping]] = ..., prefix_ids: _Optional[bytes] = ..., max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., num_samples: _Optional[int] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., teacher: _Optional[str] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("items", "min_weights_version", "max_weights_wait_s")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    MIN_WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_WEIGHTS_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[GenerateItem]
    min_weights_version: int
    max_weights_wait_s: float
    def __init__(self, items: _Optional[_Iterable[_Union[GenerateItem, _Mapping]]] = ..., min_weights_version: _Optional[int] = ..., max_weights_wait_s: _Optional[float] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("token_ids", "logprobs", "finish_reason", "text")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    token_ids: bytes
    logprobs: bytes
    finish_reason: str
    text: str
    def __init__(self, token_ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., finish_reason: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class GenerateResult(_message.Message):
    __slots__ = ("samples", "weights_version", "num_context_tokens", "num_cached_tokens", "queue_s", "engine_s", "result_crc32")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    ENGINE_S_FIELD_NUMBER: _ClassVar[int]
    RESULT_CRC32_FIELD_NUMBER: _ClassVar[int]
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    weights_version: int
    num_context_tokens: int
    num_cached_tokens: int
    queue_s: float
    engine_s: float
    result_crc32: int
    def __init__(self, samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ..., weights_version: _Optional[int] = ..., num_context_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., engine_s: _Optional[float] = ..., result_crc32: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("index", "result", "error")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    index: int
    result: GenerateResult
    error: Error
    def __init__(self, index: _Optional[int] = ..., result: _Optional[_Union[GenerateResult, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class UpdateWeightsRequest(_message.Message):
    __slots__ = ("header", "chunk", "chunk_crc32")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_CRC32_FIELD_NUMBER: _ClassVar[int]
    header: WeightsHeader
    chunk: bytes
    chunk_crc32: int
    def __init__(self, header: _Optional[_Union[WeightsHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., chunk_crc32: _Optional[int] = ...) -> None: ...

class WeightsHeader(_message.Message):
    __slots__ = ("teacher", "version", "path", "adapter_config", "ema_decay", "transfer")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_CONFIG_FIELD_NUMBER: _ClassVar[int]
    EMA_DECAY_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    version: int
    path: str
    adapter_config: str
    ema_decay: float
    transfer: WeightsTransfer
    def __init__(self, teacher: _Optional[str] = ..., version: _Optional[int] = ..., path: _Optional[str] = ..., adapter_config: _Optional[str] = ..., ema_decay: _Optional[float] = ..., transfer: _Optional[_Union[WeightsTransfer, _Mapping]] = ...) -> None: ...

class WeightsTransfer(_message.Message):
    __slots__ = ("backend", "rendezvous", "tensors")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    backend: str
    rendezvous: str
    tensors: _containers.RepeatedCompositeFieldContainer[TransferredTensor]
    def __init__(self, backend: _Optional[str] = ..., rendezvous: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[TransferredTensor, _Mapping]]] = ...) -> None: ...

class TransferredTensor(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class UpdateWeightsResponse(_message.Message):
    __slots__ = ("teacher",)
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    teacher: ServedTeacher
    def __init__(self, teacher: _Optional[_Union[ServedTeacher, _Mapping]] = ...) -> None: ...

class UnloadTeacherRequest(_message.Message):
    __slots__ = ("teacher",)
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    def __init__(self, teacher: _Optional[str] = ...) -> None: ...

class UnloadTeacherResponse(_message.Message):
    __slots__ = ("teacher",)
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    teacher: ServedTeacher
    def __init__(self, teacher: _Optional[_Union[ServedTeacher, _Mapping]] = ...) -> None: ...
