"""The configuration that vLLM runs with: what exact scoring makes of it, and what an engine of it can do."""

from __future__ import annotations

import os
from typing import Any, get_args

import vllm
from transformers import AutoConfig
from vllm.config import VllmConfig
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from teacher_server.engines.base import EngineInfo
from teacher_server.engines.vllm_paths import OfficialFields, RunnerRows, ScorePath

SCORING_WORKER = "teacher_server.engines.vllm_worker.ScoringWorker"
SCORING_SCHEDULER = "teacher_server.engines.vllm_scheduler.ScoringScheduler"
ASYNC_SCORING_SCHEDULER = "teacher_server.engines.vllm_scheduler.AsyncScoringScheduler"

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # The V2 model runner can neither scale by a temperature nor compute an entropy: see vllm_paths.OfficialFields.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # A lone token's keys would be split among threads by what else is in the step: see vllm_attention.
    "VLLM_CPU_ATTN_SPLIT_KV": "0",
}
"""vLLM's own switches, where the user set none."""

MAX_TOP_K = 1024
"""Per row; also the limit of candidates. A bound on the reply, 8 KB a token, not on what the worker can compute."""

MAX_BATCHED_TOKENS = 8192
"""Prompt tokens of one step: longer prompts are prefilled in chunks."""

CPU_MAX_BATCHED_TOKENS = 2048
"""Likewise on a CPU, which such a step fills, and while the engine computes one, the replies of the last are sent."""

CPU_KV_CACHE_GIB = 1.0
"""Small on purpose: vLLM's own default reserves most of a machine that the trainer may share."""

CPU_BLOCK_SIZE = 32
"""Tokens of a block of the KV cache, of which whole ones are shared: the smallest that vLLM's CPU attention takes. Its
default of 128 leaves 64 tokens of an average prompt to be computed again for each completion, this one 16."""

OWNED_ARGS = frozenset(
    {
        "generation_config",
        "logprobs_mode",
        "runner",
        "scheduler_cls",
        "skip_tokenizer_init",
        "trust_remote_code",
        "weight_transfer_config",
        "worker_cls",
    }
)
"""Arguments of vLLM that the engine's exactness or safety rests on."""


def engine_config(args: AsyncEngineArgs) -> tuple[VllmConfig, ScorePath]:
    """The configuration that vLLM derives from `args`, made for scoring, and the way rows come out of it.

    Sets vLLM's own switches in this process's environment.

    Raises:
        ValueError: speculative decoding, or what vLLM refuses.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if current_platform.is_cpu() and args.tensor_parallel_size == args.pipeline_parallel_size == 1:
        # Keeps the worker inside the engine core's process, which starts twice as fast as two processes do.
        args.distributed_executor_backend = args.distributed_executor_backend or "uni"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if args.dtype == "auto":
        args.dtype = _own_dtype(args.model, args.revision)
    config = args.create_engine_config()
    if config.speculative_config is not None:
        raise ValueError("speculative decoding is refused: vLLM's prompt rows are silently wrong with it")
    path: ScorePath = RunnerRows()
    if config.use_v2_model_runner:
        path = OfficialFields()
        config.parallel_config.worker_cls = "vllm.v1.worker.gpu_worker.Worker"
    else:
        scheduler = config.scheduler_config
        scheduler.scheduler_cls = ASYNC_SCORING_SCHEDULER if scheduler.async_scheduling else SCORING_SCHEDULER
    return config, path


def engine_info(config: VllmConfig, path: ScorePath) -> EngineInfo:
    """What an engine of this configuration can do."""
    model = config.model_config
    vocab_size = model.get_vocab_size()
    return EngineInfo(
        model=model.model,
        revision=model.revision or "",
        vocab_size=vocab_size,
        max_context_tokens=model.max_model_len - path.num_reserved_tokens,
        max_top_k=min(MAX_TOP_K, vocab_size),
        max_candidates=MAX_TOP_K,
        supports=path.supports,
        exact_temperature=path.exact_temperature,
        prefix_cache=bool(config.cache_config.enable_prefix_caching),
        dtype=str(model.dtype).removeprefix("torch."),
        engine="vllm",
        engine_version=vllm.__version__,
        score_path=path.name,
        determinism="equal requests agree to rounding: batching and the prefix cache may change the order of sums",
        weights_transfer=config.weight_transfer_config.backend if config.weight_transfer_config else "",
        num_workers=config.parallel_config.world_size_across_dp,
    )


def lora_args(max_adapters: int, max_lora_rank: int) -> dict[str, Any]:
    """vLLM's arguments for this many adapters.

    One slot more than adapters, so that a new version is loaded while the one before it is still in use.

    Raises:
        ValueError: a rank above all that vLLM has kernels for.
    """
    ranks = [rank for rank in get_args(MaxLoRARanks) if rank >= max_lora_rank]
    if not ranks:
        raise ValueError(f"max_lora_rank is {max_lora_rank}; vLLM takes at most {max(get_args(MaxLoRARanks))}")
    return {"enable_lora": True, "max_loras": max_adapters + 1, "max_lora_rank": min(ranks)}


def _own_dtype(model: str, revision: str | None) -> Any:
    """The dtype that the model's config names, float32 where it names none.

    vLLM's own "auto" turns a float32 model into half precision, 1e-3 nats off what the trainer computes.
    """
    config = AutoConfig.from_pretrained(model, revision=revision).get_text_config()
    return str(config.dtype or "float32").removeprefix("torch.")
