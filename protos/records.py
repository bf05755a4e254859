"""The contract's records: frozen dataclasses over numpy, with shapes and units.

Shape letters: N prompt tokens, T completion tokens, K the teacher's top-K, M the caller's candidates a position.
Log-probs are natural logarithms (nats). A value that does not exist is NaN, never 0.

    item = ScoreItem(
        prompt=np.array([5, 6, 7], np.int32),              # N = 3
        completion_ids=np.array([8, 2], np.int32),         # T = 2
        top_k=20,
    )
    result.sampled_logprobs[0]   # log q(8 | 5 6 7): row t is the prediction OF completion token t
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from protos import contract

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

PAD_ID = -1
"""A candidate id that pads a row; its log-prob is NaN."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A prompt as chat messages, rendered by the server with its model's chat template and a generation prompt."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class SystemText:
    """Privileged information as a system message; an existing system message follows it after a blank line."""

    text: str


@dataclass(frozen=True)
class UserPrefix:
    """Privileged text before the last user message's own text."""

    text: str


@dataclass(frozen=True)
class UserSuffix:
    """Privileged text after the last user message's own text."""

    text: str


@dataclass(frozen=True)
class Reference:
    """A reference answer or solution, worded by one of the server's named templates."""

    text: str
    template: str = "answer"


@dataclass(frozen=True)
class PrivilegedIds:
    """Privileged information as token ids placed before the prompt's ids."""

    ids: Int32


Privileged = SystemText | UserPrefix | UserSuffix | Reference | PrivilegedIds
"""What the teacher sees and the student does not; a typed choice."""

PRIVILEGED_KINDS = ("system", "user_prefix", "user_suffix", "reference", "ids")
"""The names of the choices on the wire, in the order of `Privileged`."""


@dataclass(frozen=True)
class ScoreItem:
    """One completion to score.

    Attributes:
        prompt: the prompt's ids, int32 [N], or a chat to be rendered.
        completion_ids: int32 [T], appended to the context verbatim, never re-tokenised.
        temperature: log-probs are log_softmax(logits / temperature), for any value from 1e-30 to 1e30.
        top_k: how many of the teacher's most likely ids to return; 0 asks for none.
        candidate_ids: the caller's own ids, int32 [T, M], or [1, M] for the same at every position; PAD_ID pads; None
            asks for none.
        entropy: whether to return the entropy of the teacher's distribution at this temperature.
        privileged: what the teacher sees and the student does not.
        teacher: the served name; "" is the server's first.
        half_precision: whether the log-probs of the top-K and of the candidates travel as float16, which rounds a
            log-prob x by at most |x| / 2048 nats and makes one below -65,520 nats -inf; a sampled log-prob and an
            entropy are float32 always.
    """

    prompt: Int32 | Chat
    completion_ids: Int32
    temperature: float = 1.0
    top_k: int = 0
    candidate_ids: Int32 | None = None
    entropy: bool = False
    privileged: Privileged | None = None
    teacher: str = ""
    half_precision: bool = False


@dataclass(frozen=True)
class ScoreRequest:
    """Items scored together; refused whole, with nothing scored, when any item is wrong.

    Attributes:
        min_weights_version: the oldest weights that each item's teacher may have.
        max_weights_wait_s: seconds to wait for them before a Conflict; never past the deadline.
    """

    items: tuple[ScoreItem, ...]
    min_weights_version: int = 0
    max_weights_wait_s: float = 0.0


@dataclass(frozen=True)
class ScoreResult:
    """The teacher's answer for one item; row t is its prediction of completion token t.

    Attributes:
        sampled_logprobs: float32 [T], log-prob of each completion id.
        top_ids, top_logprobs: int32 and float32 [T, K], most likely first; K = 0 when not asked for.
        candidate_logprobs: float32 [T, M], NaN where the id was PAD_ID; M = 0 when not asked for.
        entropy: float32 [T] in nats, or None when not asked for.
        weights_version: of the weights that scored every row of this result.
        num_context_tokens: tokens of prompt and privileged information together.
        num_cached_tokens: context tokens read from the prefix cache.
        queue_s, engine_s: seconds waiting and seconds in the engine.
        completion_crc32: checksum of the ids that were scored; see `crc32_of`.
        half_precision: whether top_logprobs and candidate_logprobs hold values of float16, and travel as such.
    """

    sampled_logprobs: Float32
    top_ids: Int32
    top_logprobs: Float32
    candidate_logprobs: Float32
    entropy: Float32 | None
    weights_version: int
    num_context_tokens: int
    num_cached_tokens: int
    queue_s: float
    engine_s: float
    completion_crc32: int
    half_precision: bool = False

    @property
    def num_tokens(self) -> int:
        """T, the completion's length in tokens."""
        return len(self.sampled_logprobs)


@dataclass(frozen=True)
class GenerateItem:
    """One text to continue.

    Attributes:
        prompt: the prompt's ids, int32 [N], or a chat to be rendered.
        prefix_ids: int32 [P], the part of the answer already written; appended verbatim.
        max_new_tokens: tokens to write at most, at least 1.
        temperature: 0 is greedy; else from 1e-30 to 1e30, and what the engine samples at.
        top_p, top_k: nucleus and top-k sampling; 1.0 and 0 keep everything.
        num_samples: independent continuations.
        seed: each sample has a stream of random numbers of its own, derived from the seed alone, so what else is in the
            batch changes a sample only where rounding does: vLLM promises equal bits for equal batches, not across
            batches, unless VLLM_BATCH_INVARIANT=1 is set on GPUs that support it (vLLM 0.32, "Reproducibility" and
            "Batch Invariance"). None draws a new one.
        stop_token_ids: added to the model's own EOS ids.
        ignore_eos: whether to write on past EOS.
        privileged, teacher: as in ScoreItem.
    """

    prompt: Int32 | Chat
    prefix_ids: Int32 = field(default_factory=lambda: np.empty(0, np.int32))
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_samples: int = 1
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    privileged: Privileged | None = None
    teacher: str = ""


@dataclass(frozen=True)
class GenerateRequest:
    """Items continued together; refused whole, with nothing written, when any is wrong; fields as in ScoreRequest."""

    items: tuple[GenerateItem, ...]
    min_weights_version: int = 0
    max_weights_wait_s: float = 0.0


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sample:
    """One continuation.

    Attributes:
        token_ids: int32 [T]; the stop or EOS id that ended it is the last.
        logprobs: float32 [T] in nats: of each id under log_softmax(logits / temperature), before top-p and top-k; at
            temperature 0 under log_softmax(logits).
        finish_reason: "stop" (EOS or a stop id) or "length".
        text: the decoded ids, special tokens left out.
    """

    token_ids: Int32
    logprobs: Float32
    finish_reason: FinishReason
    text: str


@dataclass(frozen=True)
class GenerateResult:
    """The continuations of one item; fields as in ScoreResult."""

    samples: tuple[Sample, ...]
    weights_version: int
    num_context_tokens: int
    num_cached_tokens: int
    queue_s: float
    engine_s: float


@dataclass(frozen=True)
class TokenizerFingerprint:
    """What two models must share before the log-probs of one mean anything to the other.

    Attributes:
        vocab_size: the width of the model's output, padding rows included; ids below it are valid.
        vocab_sha256: over the sorted (token, id) pairs.
        special_sha256: over the special tokens and their ids.
        eos_token_ids: the ids that end a text.
        chat_template_sha256: of the chat template; "" when there is none.
    """

    vocab_size: int
    vocab_sha256: str
    special_sha256: str
    eos_token_ids: tuple[int, ...]
    chat_template_sha256: str


TeacherKind = Literal["model", "adapter"]


@dataclass(frozen=True)
class ServedTeacher:
    """One name that items may ask for; `kind` is "model", or "adapter" for a LoRA adapter of the model."""

    name: str
    kind: TeacherKind
    weights_version: int


@dataclass(frozen=True)
class TransferredTensor:
    """One tensor of a transfer; `dtype` as safetensors names it, for example "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightsTransfer:
    """The model's tensors, broadcast by the sender (rank 0) to the engine's workers (ranks 1 and up) meanwhile.

    Attributes:
        backend: TeacherInfo.weights_transfer.
        rendezvous: HOST:PORT of the sender's torch.distributed.TCPStore (gloo), or an ncclUniqueId in base64 (nccl).
        tensors: in the order of the broadcasts.
    """

    backend: str
    rendezvous: str
    tensors: tuple[TransferredTensor, ...]


@dataclass(frozen=True)
class WeightsUpdate:
    """New weights for a teacher, or a LoRA adapter as a new one; the safetensors bytes follow unless there is another
    source, `path` or `transfer`.

    Attributes:
        teacher: the served name; a new one for a new adapter.
        version: above the version served.
        path: a folder or .safetensors file on the server, below its weights root; "" when the bytes follow.
        adapter_config: the text of PEFT's adapter_config.json, for an adapter whose bytes follow; "" otherwise.
        ema_decay: d in [0, 1): the model's new weights are d · current + (1 - d) · these, kept in float32 from one
            update to the next; None for these alone.
        transfer: how the model's tensors come instead; None for another source.
    """

    teacher: str
    version: int
    path: str = ""
    adapter_config: str = ""
    ema_decay: float | None = None
    transfer: WeightsTransfer | None = None


@dataclass(frozen=True)
class TeacherInfo:
    """The handshake: what is served and how exactly.

    Attributes:
        teachers: served names; the first is the default.
        weights_version: of the first.
        max_context_tokens: prompt, privileged information and completion together.
        max_top_k, max_candidates, max_items: limits of one item and one request.
        supports: subset of {"sampled", "top_k", "candidates", "entropy"}.
        exact_temperature: whether any temperature is exact; if not, only 1.0 is taken.
        score_path: how rows are computed ("runner-rows", "official-fields", "forward").
        determinism: what equal requests may differ by, in words.
        served: the same teachers, with what each is.
        weights_transfer: the backend of WeightsTransfer that the server takes, "gloo" or "nccl"; "" when it takes none.
        num_workers: processes that share the model: the ranks of a transfer besides its sender.
        contract_version: see `protos.contract`; 0 from servers that do not say.
    """

    teachers: tuple[str, ...]
    model: str
    revision: str
    weights_version: int
    tokenizer: TokenizerFingerprint
    max_context_tokens: int
    max_top_k: int
    max_candidates: int
    max_items: int
    supports: tuple[str, ...]
    exact_temperature: bool
    prefix_cache: bool
    dtype: str
    engine: str
    engine_version: str
    score_path: str
    determinism: str
    privileged_kinds: tuple[str, ...] = PRIVILEGED_KINDS
    reference_templates: tuple[str, ...] = ()
    served: tuple[ServedTeacher, ...] = ()
    weights_transfer: str = ""
    num_workers: int = 1
    contract_version: int = contract.VERSION


def crc32_of(completion_ids: Int32) -> int:
    """CRC-32 of the ids as little-endian int32: equal on both sides when the same ids were scored."""
    return zlib.crc32(np.ascontiguousarray(completion_ids, "<i4").tobytes())
