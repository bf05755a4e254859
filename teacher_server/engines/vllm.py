"""The engine over vLLM's `AsyncLLM`: continuous batching, prefix cache, and exact rows computed in the model runner.

vLLM is imported here and in the `vllm_*` modules only. On a CPU the engine core and its worker share one process, whose
threads follow `OMP_NUM_THREADS` of this process; set `KMP_BLOCKTIME=0` too where a trainer shares the machine.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from starlette.types import ASGIApp
from vllm import RequestOutput, SamplingParams
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import exceptions as vllm_exceptions
from vllm.v1.engine.async_llm import AsyncLLM

from protos.records import FinishReason, Float32, WeightsTransfer
from teacher_server.engines.base import (
    Adapter,
    Continuation,
    Continuations,
    EngineDeadError,
    EngineInfo,
    GenerateTask,
    ScoreRows,
    ScoreTask,
    WeightsUntouchedError,
)
from teacher_server.engines.orphan import adopt_workers
from teacher_server.engines.vllm_config import (
    CPU_BLOCK_SIZE,
    CPU_KV_CACHE_GIB,
    CPU_MAX_BATCHED_TOKENS,
    MAX_BATCHED_TOKENS,
    MAX_TOP_K,
    OWNED_ARGS,
    SCORING_WORKER,
    engine_config,
    engine_info,
    lora_args,
)
from teacher_server.engines.vllm_paths import ScorePath, prefill_params
from teacher_server.engines.vllm_transfer import expected_tensors, rendezvous

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""What vLLM samples at: it refuses more, and replaces less by the minimum without an error. Scoring has no bounds."""

DEATH_POLL_S = 0.1
"""How often `died` looks; vLLM's own watch over its processes sets the flag at once and tells nobody."""


class VllmEngine:
    """The `Engine` over vLLM; build it with `await VllmEngine.create(...)`."""

    def __init__(self, llm: AsyncLLM, path: ScorePath, info: EngineInfo) -> None:
        self._open: AsyncLLM | None = llm
        self._path = path
        self._info = info
        self._request_ids = itertools.count()

    @classmethod
    async def create(
        cls,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        max_context_tokens: int | None = None,
        max_batched_tokens: int | None = None,
        tensor_parallel_size: int = 1,
        kv_cache_gib: float | None = None,
        max_adapters: int = 0,
        max_lora_rank: int = 16,
        weights_transfer: Literal["gloo", "nccl"] | None = None,
        seed: int = 0,
        engine_args: Mapping[str, Any] | None = None,
    ) -> VllmEngine:
        """Starts vLLM in its own process; the event loop stays free meanwhile.

        Args:
            model, revision: a folder or a hub name; remote code is never run.
            dtype: of weights and activations; "auto" is the model's own. Rows are computed in float32 always.
            max_context_tokens: context and completion together; None is the model's own.
            max_batched_tokens: prompt tokens of one step; None is (CPU_)MAX_BATCHED_TOKENS.
            kv_cache_gib: memory for the KV cache in GiB; None lets vLLM fill the GPU, or is CPU_KV_CACHE_GIB on a CPU.
            max_adapters: LoRA adapters loaded at a time; 0 leaves LoRA out of the model.
            max_lora_rank: the largest rank; vLLM reserves memory for `max_adapters` of the next rank that it knows.
            weights_transfer: over what `receive_weights` takes weights; nccl is between GPUs.
            seed: of vLLM's global generator; samples have seeds of their own.
            engine_args: any other field of vLLM's `AsyncEngineArgs`, by name.

        Raises:
            ValueError: an argument the engine owns, speculative decoding, or what vLLM refuses.
            EngineDeadError: vLLM's process ended while it started.
        """
        extra = dict(engine_args or {})
        if owned := OWNED_ARGS & extra.keys():
            raise ValueError(f"engine_args may not set {sorted(owned)}: exact scoring rests on the engine's own values")
        if kv_cache_gib is None and current_platform.is_cpu() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            kv_cache_gib = CPU_KV_CACHE_GIB
        if weights_transfer == "nccl" and current_platform.is_cpu():
            raise ValueError('weights_transfer is "nccl", which needs GPUs, and this vLLM runs on the CPU; take "gloo"')
        if max_batched_tokens is None:
            max_batched_tokens = CPU_MAX_BATCHED_TOKENS if current_platform.is_cpu() else MAX_BATCHED_TOKENS
        args = AsyncEngineArgs(
            **{
                "model": model,
                "revision": revision,
                "dtype": dtype,
                "max_model_len": max_context_tokens,
                "max_num_batched_tokens": max_batched_tokens,
                "tensor_parallel_size": tensor_parallel_size,
                "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
                "seed": seed,
                "enforce_eager": current_platform.is_cpu(),
                "enable_prefix_caching": True,
                "block_size": CPU_BLOCK_SIZE if current_platform.is_cpu() else None,
                "max_logprobs": MAX_TOP_K,
                "logprobs_mode": "processed_logprobs",
                "skip_tokenizer_init": False,
                "generation_config": "vllm",
                "disable_log_stats": True,
                "use_tqdm_on_load": False,
                "worker_cls": SCORING_WORKER,
                "weight_transfer_config": weights_transfer and WeightTransferConfig(backend=weights_transfer),
            }
            | (lora_args(max_adapters, max_lora_rank) if max_adapters else {})
            | extra
        )
        return await asyncio.to_thread(cls._start, args)

    @classmethod
    def _start(cls, args: AsyncEngineArgs) -> VllmEngine:
        adopt_workers()
        config, path = engine_config(args)
        info = engine_info(config, path)
        try:
            llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        except RuntimeError as error:
            raise EngineDeadError("vLLM's engine process ended while it started; its log has the reason") from error
        return cls(llm, path, info)

    @property
    def info(self) -> EngineInfo:
        """What this engine can do."""
        return self._info

    async def openai_app(self, names: tuple[str, ...]) -> ASGIApp:
        """vLLM's own OpenAI application over this engine; each of the names means the base model."""
        from teacher_server.engines.vllm_openai import openai_app

        return await openai_app(self._llm, names)

    @property
    def num_unfinished(self) -> int:
        """Requests that vLLM's front end holds: sent to the engine core, and neither finished nor aborted."""
        return 0 if self._open is None else self._open.get_num_unfinished_requests()

    async def score(self, task: ScoreTask) -> ScoreRows:
        """The rows of one task.

        The prefix cache is read first. Where it holds positions of the completion too (the same text was seen before),
        their rows were never computed; the task is then scored again without it.

        Raises:
            ValueError: the path cannot score this task exactly.
        """
        for read_prefix_cache in (True, False):
            prompt_ids, params = self._path.request(task, read_prefix_cache=read_prefix_cache)
            rows = self._path.rows(task, await self._run(prompt_ids, params, task.adapter))
            if rows is not None:
                return rows
        raise RuntimeError(f"vLLM returned no rows for {len(task.completion_ids)} completion tokens")

    async def generate(self, task: GenerateTask) -> Continuations:
        """The samples of one task, run side by side.

        Raises:
            ValueError: a temperature that vLLM would refuse or replace.
        """
        if task.temperature != 0 and not MIN_TEMPERATURE <= task.temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"temperature is {task.temperature}; vLLM samples at 0 or from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}"
            )
        seeds = np.random.SeedSequence(task.seed).generate_state(task.num_samples, np.uint64)
        outputs = await asyncio.gather(*(self._sample(task, int(seed >> 1)) for seed in seeds))
        return Continuations(
            samples=tuple(sample for sample, _ in outputs),
            num_cached_tokens=outputs[0][1],
        )

    async def _sample(self, task: GenerateTask, seed: int) -> tuple[Continuation, int]:
        """One sample, and the context tokens it read from the prefix cache."""
        params = SamplingParams(
            temperature=task.temperature,
            top_p=task.top_p,
            top_k=task.top_k,
            seed=seed,
            max_tokens=task.max_new_tokens,
            stop_token_ids=list(task.stop_token_ids),
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._run(task.context_ids.tolist(), params, task.adapter)
        (sample,) = output.outputs
        token_ids = np.array(sample.token_ids, np.int32)
        if task.top_p == 1.0 and task.top_k == 0:
            assert isinstance(sample.logprobs, FlatLogprobs)
            logprobs = np.array(sample.logprobs.logprobs, np.float32)
        else:
            logprobs = await self._rescore(task, token_ids)
        finish_reason: FinishReason = "stop" if sample.finish_reason == "stop" else "length"
        return Continuation(token_ids, logprobs, finish_reason), output.num_cached_tokens or 0

    async def _rescore(self, task: GenerateTask, token_ids: np.ndarray) -> Float32:
        """float32 [T]: vLLM's own log-probs are those after top-p and top-k, the contract's are those before."""
        rows = await self.score(
            ScoreTask(
                context_ids=task.context_ids,
                completion_ids=token_ids,
                temperature=task.temperature or 1.0,
                top_k=0,
                candidate_ids=np.empty((len(token_ids), 0), np.int32),
                entropy=False,
                adapter=task.adapter,
            )
        )
        return rows.sampled_logprobs

    async def prefill(self, prompt_ids: list[int]) -> None:
        """Computes a prompt and keeps nothing of it but the prefix cache: what any score of it costs at least."""
        await self._run(prompt_ids, prefill_params(read_prefix_cache=True), None)

    async def load_weights(self, files: Sequence[Path]) -> None:
        """See WeightsEngine; the prefix cache is emptied, since its keys and values are those of the old weights."""
        with _deaths_named():
            await self._llm.collective_rpc("replace_weights", args=([str(file) for file in files],))
            await self._forget_prefixes()

    async def receive_weights(self, transfer: WeightsTransfer, timeout_s: float) -> None:
        """See TransferEngine; nccl never gives up."""
        where, expected = rendezvous(transfer, self._info.num_workers, timeout_s), expected_tensors(transfer)
        with _deaths_named():
            try:
                await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(where))
            except vllm_exceptions.EngineDeadError:
                raise
            except Exception as error:
                raise WeightsUntouchedError(str(error)) from error
            await self._llm.collective_rpc("receive_weights", args=(expected,))
            await self._forget_prefixes()

    async def load_adapter(self, adapter: Adapter) -> None:
        """See WeightsEngine."""
        with _deaths_named():
            await self._llm.add_lora(_lora_request(adapter))

    async def unload_adapter(self, adapter: Adapter) -> None:
        """See WeightsEngine; what the prefix cache holds under its name is never asked for again."""
        with _deaths_named():
            await self._llm.remove_lora(adapter.adapter_id)

    async def died(self) -> None:
        """Returns once vLLM's engine process is gone (`AsyncLLM.errored`), within DEATH_POLL_S of its end."""
        while self._open is not None and not self._open.errored:  # noqa: ASYNC110  (vLLM has no event to wait for)
            await asyncio.sleep(DEATH_POLL_S)

    async def close(self) -> None:
        """Ends vLLM's processes; everything in flight raises EngineDeadError."""
        # Let go of: what is still held when the interpreter ends prints a TypeError, since vLLM's modules are gone by
        # the time that `AsyncLLM.__del__` shuts it down once more.
        llm, self._open = self._open, None
        if llm is None:
            return
        handler = llm.output_handler
        if handler is not None and llm.get_num_unfinished_requests() == 0:
            handler.cancel()  # else it logs the end of an idle engine as a failure
        await asyncio.to_thread(llm.shutdown)
        # vLLM closes its sockets without a look at what has come by them, so that its word of the end may be lost.
        llm.output_processor.propagate_error(vllm_exceptions.EngineDeadError())
        client: Any = llm.engine_core
        # vLLM closes its sockets but leaves their ZeroMQ context, and the context's threads, behind.
        await asyncio.to_thread(client.resources.ctx.destroy, linger=0)

    @property
    def _llm(self) -> AsyncLLM:
        if self._open is None:
            raise EngineDeadError("the engine was closed")
        return self._open

    async def _forget_prefixes(self) -> None:
        # Requests that were cancelled may still be running: they would hold blocks, and the reset would not happen.
        if not await self._llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM could not empty its prefix cache")

    async def _run(self, prompt_ids: list[int], params: SamplingParams, adapter: Adapter | None) -> RequestOutput:
        """One request's final output; cancelling the caller aborts the request in the engine."""
        request_id = str(next(self._request_ids))
        lora_request = None if adapter is None else _lora_request(adapter)
        final: RequestOutput | None = None
        llm = self._llm
        params.skip_clone = True  # made for this request alone: vLLM's deep copy is two fifths of its front end's work
        try:
            with _deaths_named():
                async for output in llm.generate(
                    tokens_input(prompt_ids), params, request_id, lora_request=lora_request
                ):
                    final = output
        except asyncio.CancelledError:
            # AsyncLLM aborts by itself only once the request was sent.
            await llm.abort(request_id)
            raise
        except VLLMClientError as error:
            raise ValueError(str(error)) from error
        assert final is not None
        assert final.finished
        finish_reason = final.outputs[0].finish_reason
        if finish_reason == "abort":
            raise EngineDeadError("vLLM is shutting down and has aborted its requests")
        if finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended request {request_id} with {finish_reason!r}")
        return final


@contextmanager
def _deaths_named() -> Iterator[None]:
    """vLLM's own word for a dead engine as ours."""
    try:
        yield
    except vllm_exceptions.EngineDeadError as error:
        raise EngineDeadError("vLLM's engine process has died; its log has the reason") from error


def _lora_request(adapter: Adapter) -> LoRARequest:
    """The name is part of the prefix cache's keys, so each version of an adapter has its own cache."""
    return LoRARequest(f"adapter-{adapter.adapter_id}", adapter.adapter_id, str(adapter.folder))
