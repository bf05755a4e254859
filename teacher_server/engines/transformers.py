"""The reference engine: one item at a time through a plain transformers forward, with nothing clever between.

It serves where vLLM does not run, and every other engine is tested against it; so it shares no code with them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open

from protos.records import PAD_ID, Int32
from teacher_server.engines.base import (
    ALL_SUPPORTS,
    Adapter,
    Continuation,
    Continuations,
    EngineDeadError,
    EngineInfo,
    GenerateTask,
    ScoreRows,
    ScoreTask,
)

MAX_TOP_K = 1024
"""Per row; also the limit of candidates. A bound on the reply, 8 KB a token."""

Result = TypeVar("Result")


class TransformersEngine:
    """The `Engine` over `AutoModelForCausalLM`, its forward in one worker thread.

    Args:
        model, revision: a folder or a hub name; remote code is never run.
        dtype: of weights and activations, a torch name or "auto"; log-probs are computed in float32 always.
        max_context_tokens: context and completion together; None is the model's own.
        device: "cpu", "cuda", ...

    Raises:
        ValueError: max_context_tokens above the model's own.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        max_context_tokens: int | None = None,
        device: str = "cpu",
    ) -> None:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=dtype)
        self._model: Any = loaded.to(device).eval()
        self._adapted: PeftModel | None = None  # around the same model, while it has adapters
        config = loaded.config.get_text_config()
        own_limit = config.max_position_embeddings
        if max_context_tokens is not None and max_context_tokens > own_limit:
            raise ValueError(f"max_context_tokens is {max_context_tokens}; {model} takes at most {own_limit}")
        self._info = EngineInfo(
            model=model,
            revision=revision or "",
            vocab_size=config.vocab_size,
            max_context_tokens=max_context_tokens or own_limit,
            max_top_k=min(MAX_TOP_K, config.vocab_size),
            max_candidates=MAX_TOP_K,
            supports=ALL_SUPPORTS,
            exact_temperature=True,
            prefix_cache=False,
            dtype=str(loaded.dtype).removeprefix("torch."),
            engine="transformers",
            engine_version=transformers.__version__,
            score_path="forward",
            determinism="equal requests give equal bits on the same machine and number of threads",
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transformers-engine")
        self._unfinished: set[Future[Any]] = set()
        self._closed = threading.Event()

    @property
    def info(self) -> EngineInfo:
        """What this engine can do."""
        return self._info

    @property
    def num_unfinished(self) -> int:
        """Calls that wait for the worker thread or are at work in it."""
        return len(self._unfinished)

    async def score(self, task: ScoreTask) -> ScoreRows:
        """The rows of one task: float32 log_softmax(logits / temperature), then top-K, gather and entropy."""
        return await self._run(lambda _: self._score(task))

    async def generate(self, task: GenerateTask) -> Continuations:
        """The samples of one task, one after the other; a cancelled call stops after the token it is at."""
        return await self._run(lambda cancelled: self._generate(task, cancelled))

    async def died(self) -> None:
        """Waits for ever: a model in this process does not go before it."""
        await asyncio.Event().wait()

    async def load_weights(self, files: Sequence[Path]) -> None:
        """See WeightsEngine."""
        await self._run(lambda _: self._load_weights(files))

    async def load_adapter(self, adapter: Adapter) -> None:
        """See WeightsEngine."""
        await self._run(lambda _: self._load_adapter(adapter))

    async def unload_adapter(self, adapter: Adapter) -> None:
        """See WeightsEngine."""
        await self._run(lambda _: self._unload_adapter(adapter))

    async def close(self) -> None:
        """Waits for the item at work, refuses the rest, and frees the model."""
        self._closed.set()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
        self._model = self._adapted = None

    async def _run(self, work: Callable[[threading.Event], Result]) -> Result:
        """Runs in the worker thread; tells the work when its caller is gone."""
        if self._closed.is_set():
            raise EngineDeadError("the transformers engine is closed")
        cancelled = threading.Event()
        future = self._thread.submit(work, cancelled)
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            cancelled.set()
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise EngineDeadError("the transformers engine was closed") from None

    @torch.no_grad()
    def _load_weights(self, files: Sequence[Path]) -> None:
        """Copies tensor by tensor, and insists that all of them came."""
        parameters = self._model.state_dict()
        missing = parameters.keys() - self._model.all_tied_weights_keys.keys()
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    parameters[name].copy_(opened.get_tensor(name))
                    missing.discard(name)
        if missing:
            raise ValueError(f"the files have no {min(missing)}")

    def _load_adapter(self, adapter: Adapter) -> None:
        name = _peft_name(adapter)
        if self._adapted is None:
            self._adapted = PeftModel.from_pretrained(self._model, str(adapter.folder), adapter_name=name)
        else:
            self._adapted.load_adapter(str(adapter.folder), adapter_name=name)

    def _unload_adapter(self, adapter: Adapter) -> None:
        """After the last one the model is plain again."""
        assert self._adapted is not None
        name = _peft_name(adapter)
        others = self._adapted.peft_config.keys() - {name}
        if others:
            self._adapted.set_adapter(min(others))  # PEFT warns where the active one goes
            self._adapted.delete_adapter(name)
        else:
            self._model, self._adapted = self._adapted.unload(), None

    @contextmanager
    def _with(self, adapter: Adapter | None) -> Generator[None, None, None]:
        """The model as this adapter, or none, leaves it."""
        if self._adapted is None:
            assert adapter is None
            yield
        elif adapter is None:
            with self._adapted.disable_adapter():
                yield
        else:
            self._adapted.set_adapter(_peft_name(adapter))
            yield

    @torch.inference_mode()
    def _score(self, task: ScoreTask) -> ScoreRows:
        num_rows = len(task.completion_ids)
        input_ids = self._tensor(np.concatenate([task.context_ids, task.completion_ids[:-1]]))
        # Position p predicts token p + 1, so the last T positions of context + completion[:-1] are the T rows.
        with self._with(task.adapter):
            logits_TV = self._model(input_ids[None], logits_to_keep=num_rows, use_cache=False).logits[0]
        assert logits_TV.shape == (num_rows, self._info.vocab_size), logits_TV.shape
        logprobs_TV = torch.log_softmax(logits_TV.float() / task.temperature, dim=-1)

        completion_ids_T = self._tensor(task.completion_ids)
        candidate_ids_TM = self._tensor(task.candidate_ids).expand(num_rows, -1)
        top_logprobs_TK, top_ids_TK = logprobs_TV.topk(task.top_k, dim=-1)
        candidates_TM = logprobs_TV.gather(1, candidate_ids_TM.clamp_min(0))
        candidates_TM[candidate_ids_TM == PAD_ID] = float("nan")
        entropy_T = torch.special.entr(logprobs_TV.exp()).sum(-1)
        return ScoreRows(
            sampled_logprobs=logprobs_TV.gather(1, completion_ids_T[:, None])[:, 0].cpu().numpy(),
            top_ids=top_ids_TK.to(torch.int32).cpu().numpy(),
            top_logprobs=top_logprobs_TK.cpu().numpy(),
            candidate_logprobs=candidates_TM.cpu().numpy(),
            entropy=entropy_T.cpu().numpy() if task.entropy else None,
            num_cached_tokens=0,
        )

    @torch.inference_mode()
    def _generate(self, task: GenerateTask, cancelled: threading.Event) -> Continuations:
        seeds = np.random.SeedSequence(task.seed).generate_state(task.num_samples, np.uint64)
        with self._with(task.adapter):
            samples = tuple(self._continue(task, int(seed >> 1), cancelled) for seed in seeds)
        return Continuations(samples, num_cached_tokens=0)

    def _continue(self, task: GenerateTask, seed: int, cancelled: threading.Event) -> Continuation:
        """One sample from a generator of its own; torch's global one is left alone."""
        generator = torch.Generator(self._model.device).manual_seed(seed)
        token_ids: list[int] = []
        logprobs: list[float] = []
        inputs, cache = self._tensor(task.context_ids), None
        while len(token_ids) < task.max_new_tokens:
            if cancelled.is_set() or self._closed.is_set():
                raise EngineDeadError("the call was cancelled, or the transformers engine was closed")
            output = self._model(inputs[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            logprobs_V = torch.log_softmax(output.logits[0, -1].float() / (task.temperature or 1.0), dim=-1)
            inputs = sample(logprobs_V, task, generator)
            token_ids.append(int(inputs))
            logprobs.append(float(logprobs_V[inputs]))
            if token_ids[-1] in task.stop_token_ids:
                return _continuation(token_ids, logprobs, stopped=True)
        return _continuation(token_ids, logprobs, stopped=False)

    def _tensor(self, ids: Int32) -> torch.Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self._model.device)


def _peft_name(adapter: Adapter) -> str:
    return f"adapter{adapter.adapter_id}"


def sample(logprobs_V: torch.Tensor, task: GenerateTask, generator: torch.Generator) -> torch.Tensor:
    """One id, int64 [1]: the most likely at temperature 0, else drawn from the top-k and then the nucleus (Holtzman et
    al. 2020, arXiv:1904.09751): the fewest most likely ids whose probabilities, renormalised after top-k, reach top_p.
    """
    if task.temperature == 0:
        return logprobs_V.argmax(keepdim=True)
    sorted_V, ids_V = logprobs_V.sort(descending=True)
    kept_K = sorted_V[: task.top_k or None].softmax(-1)
    outside_K = kept_K.cumsum(-1) - kept_K >= task.top_p
    outside_K[0] = False  # a top_p below float32's smallest number compares as 0
    return ids_V[torch.multinomial(kept_K.masked_fill(outside_K, 0.0), 1, generator=generator)]


def _continuation(token_ids: list[int], logprobs: list[float], *, stopped: bool) -> Continuation:
    return Continuation(
        np.array(token_ids, np.int32), np.array(logprobs, np.float32), finish_reason="stop" if stopped else "length"
    )
