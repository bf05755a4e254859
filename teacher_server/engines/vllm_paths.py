"""The two ways to get a completion's rows out of vLLM: our own rows in the model runner, or vLLM's official fields.

A path words a task as one vLLM request and reads the rows from its output; it neither sends nor retries.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from vllm import RequestOutput, SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind

from protos.records import PAD_ID, Float32, Int32
from teacher_server.engines.base import ALL_SUPPORTS, ScoreRows, ScoreTask
from teacher_server.engines.rows import to_plain, unpack_rows
from teacher_server.engines.vllm_worker import EXTRA_ARG


class ScorePath(Protocol):
    """How a task becomes a vLLM request and its output becomes rows.

    Attributes:
        name: EngineInfo.score_path.
        supports: EngineInfo.supports.
        exact_temperature: whether any temperature is exact; if not, only 1.0 is taken.
        num_reserved_tokens: tokens of vLLM's context that no task can use.
    """

    name: str
    supports: tuple[str, ...]
    exact_temperature: bool
    num_reserved_tokens: int

    def request(self, task: ScoreTask, *, read_prefix_cache: bool) -> tuple[list[int], SamplingParams]:
        """Prompt ids and parameters; ValueError for a task this path cannot score exactly."""
        ...

    def rows(self, task: ScoreTask, output: RequestOutput) -> ScoreRows | None:
        """All rows of the task, or None where the prefix cache hid some of them."""
        ...


class RunnerRows:
    """Rows computed by `vllm_worker.RowScoring`; exact at any temperature, with entropy."""

    name = "runner-rows"
    supports: tuple[str, ...] = ALL_SUPPORTS
    exact_temperature = True
    num_reserved_tokens = 0

    def request(self, task: ScoreTask, *, read_prefix_cache: bool) -> tuple[list[int], SamplingParams]:
        """The prompt is all but the last completion id: vLLM's own sampled token takes that one's place."""
        params = prefill_params(read_prefix_cache=read_prefix_cache)
        params.extra_args = {EXTRA_ARG: to_plain(task)}
        return [*task.context_ids.tolist(), *task.completion_ids[:-1].tolist()], params

    def rows(self, task: ScoreTask, output: RequestOutput) -> ScoreRows | None:
        """The packed rows, if the worker sent any: it sends all or none."""
        packed_TW = output.prompt_token_id_logprobs
        return None if packed_TW is None else unpack_rows(packed_TW, task, output.num_cached_tokens or 0)


class OfficialFields:
    """`prompt_logprob_token_ids` and `prompt_logprobs` of vLLM's V2 model runner; exact at temperature 1, no entropy.

    vLLM scores prompt rows but the last, so the whole completion is in the prompt and one token of context is lost.
    """

    name = "official-fields"
    supports: tuple[str, ...] = ("sampled", "top_k", "candidates")
    exact_temperature = False
    num_reserved_tokens = 1

    def request(self, task: ScoreTask, *, read_prefix_cache: bool) -> tuple[list[int], SamplingParams]:
        """The sampled id is the first candidate of its row; a top-K needs every row of the prompt, so no cache."""
        if task.temperature != 1.0:
            raise ValueError(f"temperature is {task.temperature}; the V2 model runner scores at 1.0 only")
        if task.entropy:
            raise ValueError("entropy is not among the fields of the V2 model runner")
        params = prefill_params(read_prefix_cache=read_prefix_cache and task.top_k == 0)
        candidate_ids = np.broadcast_to(task.candidate_ids, (len(task.completion_ids), task.candidate_ids.shape[1]))
        params.prompt_logprob_token_ids = np.concatenate([task.completion_ids[:, None], candidate_ids], axis=1)
        params.prompt_logprob_start = len(task.context_ids) - 1
        if task.top_k > 0:
            params.prompt_logprobs = task.top_k
            params.flat_logprobs = True
        return [*task.context_ids.tolist(), *task.completion_ids.tolist()], params

    def rows(self, task: ScoreTask, output: RequestOutput) -> ScoreRows | None:
        """vLLM marks padding with -inf; the contract's mark is NaN."""
        scores = output.prompt_token_id_logprobs
        if scores is None:
            return None
        top_ids, top_logprobs = _top_k(task, output.prompt_logprobs)
        return ScoreRows(
            sampled_logprobs=np.ascontiguousarray(scores[:, 0], np.float32),
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            candidate_logprobs=np.where(task.candidate_ids == PAD_ID, np.float32(np.nan), scores[:, 1:]),
            entropy=None,
            num_cached_tokens=output.num_cached_tokens or 0,
        )


def _top_k(task: ScoreTask, prompt_logprobs: object) -> tuple[Int32, Float32]:
    """The last T rows of vLLM's flat list, whose rows hold the prompt's own token and then the K most likely."""
    num_rows = len(task.completion_ids)
    if task.top_k == 0:
        return np.empty((num_rows, 0), np.int32), np.empty((num_rows, 0), np.float32)
    assert isinstance(prompt_logprobs, FlatLogprobs)
    num_values = num_rows * (1 + task.top_k)
    ids = np.array(prompt_logprobs.token_ids[-num_values:], np.int32).reshape(num_rows, -1)
    logprobs = np.array(prompt_logprobs.logprobs[-num_values:], np.float32).reshape(num_rows, -1)
    assert np.array_equal(ids[:, 0], task.completion_ids), "vLLM's rows are not those of the completion"
    return ids[:, 1:], logprobs[:, 1:]


def prefill_params(*, read_prefix_cache: bool) -> SamplingParams:
    """A prefill alone: one greedy token that nobody reads, which vLLM insists on."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_reading_prefix_cache=not read_prefix_cache,
    )
