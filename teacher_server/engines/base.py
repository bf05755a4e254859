"""What an engine is: it scores and continues ids; it knows neither requests, chats, privileged information nor errors
of the wire.

Shape letters as in protos.records: C context tokens, T completion tokens, K top-K, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from protos.records import FinishReason, Float32, Int32, WeightsTransfer

ALL_SUPPORTS = ("sampled", "top_k", "candidates", "entropy")
"""What a row may hold, by its name on the wire."""


@dataclass(frozen=True)
class EngineInfo:
    """What an engine can do; fields as in protos.records.TeacherInfo."""

    model: str
    revision: str
    vocab_size: int
    max_context_tokens: int
    max_top_k: int
    max_candidates: int
    supports: tuple[str, ...]
    exact_temperature: bool
    prefix_cache: bool
    dtype: str
    engine: str
    engine_version: str
    score_path: str
    determinism: str
    weights_transfer: str = ""
    num_workers: int = 1


@dataclass(frozen=True)
class Adapter:
    """One version of a LoRA adapter (Hu et al. 2021, arXiv:2106.09685) as engines know it.

    Attributes:
        adapter_id: from 1, never used twice: no cached state of one version can be read by another.
        folder: adapter_config.json and adapter_model.safetensors, unchanged while the adapter is loaded.
    """

    adapter_id: int
    folder: Path


@dataclass(frozen=True)
class ScoreTask:
    """One validated item: C >= 1, T >= 1, C + T <= max_context_tokens, all ids below vocab_size.

    Attributes:
        context_ids: int32 [C], prompt and privileged information.
        completion_ids: int32 [T].
        temperature: above 0.
        top_k: K, 0 for none.
        candidate_ids: int32 [T, M] with -1 as padding, or [1, M] for the same at every position; M = 0 for none.
        entropy: whether to compute it.
        adapter: a loaded one, or None for the model itself.
    """

    context_ids: Int32
    completion_ids: Int32
    temperature: float
    top_k: int
    candidate_ids: Int32
    entropy: bool
    adapter: Adapter | None = None


@dataclass(frozen=True)
class ScoreRows:
    """The rows of one task; row t predicts completion token t. Shapes and NaN rule as in protos.records.ScoreResult."""

    sampled_logprobs: Float32
    top_ids: Int32
    top_logprobs: Float32
    candidate_logprobs: Float32
    entropy: Float32 | None
    num_cached_tokens: int


@dataclass(frozen=True)
class GenerateTask:
    """One validated text to continue: C >= 1 and C + max_new_tokens <= max_context_tokens.

    Fields as in protos.records.GenerateItem; `context_ids` ends with the prefix, `stop_token_ids` holds EOS too unless
    it is ignored, and `adapter` is as in ScoreTask.
    """

    context_ids: Int32
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    num_samples: int
    seed: int | None
    stop_token_ids: tuple[int, ...]
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Continuation:
    """One continuation: ids int32 [T] with the stop id last, log-probs float32 [T] as in protos.records.Sample."""

    token_ids: Int32
    logprobs: Float32
    finish_reason: FinishReason


@dataclass(frozen=True)
class Continuations:
    """All samples of one GenerateTask."""

    samples: tuple[Continuation, ...]
    num_cached_tokens: int


class Engine(Protocol):
    """Scores and continues ids, many at a time; a cancelled call frees its work at once.

    Raises:
        EngineDeadError: the engine is gone and will not come back in this process.
    """

    @property
    def info(self) -> EngineInfo:
        """What this engine can do."""
        ...

    @property
    def num_unfinished(self) -> int:
        """Requests that the engine still holds, waiting or at work; 0 once every call has returned or was cancelled."""
        ...

    async def score(self, task: ScoreTask) -> ScoreRows:
        """The rows of one task."""
        ...

    async def generate(self, task: GenerateTask) -> Continuations:
        """The samples of one task."""
        ...

    async def died(self) -> None:
        """Returns once the engine is gone, also while nothing is asked of it; waits for ever where that cannot be."""
        ...

    async def close(self) -> None:
        """Frees the engine's processes and memory."""
        ...


class WeightsEngine(Engine, Protocol):
    """An engine whose weights can change while it runs; the caller has checked the files against the model."""

    async def load_weights(self, files: Sequence[Path]) -> None:
        """Puts the tensors of these safetensors files into the model and forgets everything cached under the old ones.

        Nothing may be in flight and no adapter loaded. On any error the weights are undefined until a next call
        succeeds.
        """
        ...

    async def load_adapter(self, adapter: Adapter) -> None:
        """Makes `adapter` ready for tasks; work in flight goes on."""
        ...

    async def unload_adapter(self, adapter: Adapter) -> None:
        """Forgets `adapter`, which no task uses."""
        ...


@runtime_checkable
class TransferEngine(WeightsEngine, Protocol):
    """An engine whose workers also take weights that a sender broadcasts to them (EngineInfo.weights_transfer)."""

    async def receive_weights(self, transfer: WeightsTransfer, timeout_s: float) -> None:
        """Puts the sender's tensors into the model, as `load_weights` does those of files.

        Args:
            transfer: checked against the model.
            timeout_s: after which workers give up, where their backend can.

        Raises:
            WeightsUntouchedError: sender and workers did not meet.
        """
        ...


class WeightsUntouchedError(RuntimeError):
    """New weights did not come, and those of before are as they were."""


class EngineDeadError(RuntimeError):
    """The engine is gone and will not come back in this process."""
