"""The worker's half of scoring inside vLLM: exactly the rows a task asks for, computed where the logits are.

Runs in vLLM's worker processes; `VllmEngine` names `ScoringWorker` by import path. What it relies on in vLLM 0.32.0
(pinned by tests/contract/test_vllm_seams.py):

- the V1 model runner calls `_get_prompt_logprobs_dict` once a step with the step's hidden states, before the step is
  counted in `requests[...].num_computed_tokens`;
- `ModelRunnerOutput.prompt_token_id_logprobs_dict` carries one tensor a request, untouched, to
  `RequestOutput.prompt_token_id_logprobs`;
- `reload_weights` takes an iterator over a checkpoint's tensors and redoes what loading does to them afterwards;
- `input_batch.generators` and `discard_request_mask` are indexed alike, and stay so while a step is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator
from vllm.platforms import current_platform
from vllm.v1.outputs import ModelRunnerOutput

from teacher_server.engines import vllm_transfer  # noqa: F401  (vLLM learns of the backend where workers run)
from teacher_server.engines.orphan import end_with_server
from teacher_server.engines.rows import RowsRequest, score_rows
from teacher_server.engines.vllm_lora import GroupedLora, linear_modules

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Runner
else:
    _Runner = object

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as _PlatformWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as _PlatformWorker

    from teacher_server.engines import vllm_attention  # noqa: F401  (vLLM takes it in place of its own from here on)

EXTRA_ARG = "score_rows"
"""The key of `SamplingParams.extra_args` that holds `rows.to_plain(task)`."""

ROWS_PER_CHUNK = 256
"""Rows through the LM head at a time: at 151,936 ids one float32 copy is 156 MB, and about three live at the peak;
five or six where `largest` sorts whole rows, which it does for a K of more than a 64th of them."""


@dataclass
class _Pending:
    """A request whose rows, float32 [T, W], are being filled first to last: chunks of its prefill come in order."""

    request: RowsRequest
    packed: torch.Tensor
    num_filled: int = 0


class RowScoring(_Runner):
    """A mixin over vLLM's V1 model runner that answers `EXTRA_ARG` requests and leaves all others alone.

    A task of C context and T completion tokens is sent as a prompt of C + T - 1 ids, the last completion id left out:
    position p predicts token p + 1, so the wanted rows are the last T positions, and vLLM samples its one token from
    the last of them.

    Rows are complete or absent: where the prefix cache supplied a wanted position, its hidden state was never computed,
    and the request is answered without rows.
    """

    _pending: dict[str, _Pending]
    _complete: dict[str, torch.Tensor]

    @staticmethod
    def install(runner: Any) -> None:
        """Turns a model runner that vLLM built into one that also scores rows."""
        runner.__class__ = type("RowScoringRunner", (RowScoring, type(runner)), {})
        runner._pending, runner._complete = {}, {}

    def _get_prompt_logprobs_dict(self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        for req_id, num_tokens in num_scheduled_tokens.items():
            params = self.requests[req_id].sampling_params
            if params is not None and params.extra_args and EXTRA_ARG in params.extra_args:
                self._score_chunk(req_id, params.extra_args[EXTRA_ARG], hidden_states, num_tokens)
        return super()._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)

    def _score_chunk(self, req_id: str, plain: dict[str, Any], hidden_states: torch.Tensor, num_tokens: int) -> None:
        """Fills the rows of the prompt positions that this step computes."""
        state = self.requests[req_id]
        if req_id not in self._pending:
            request = RowsRequest.from_plain(plain, self.device)
            packed = torch.empty(request.num_rows, request.width, dtype=torch.float32, device=self.device)
            self._pending[req_id] = _Pending(request, packed)
        pending = self._pending[req_id]

        assert state.prompt_token_ids is not None
        first_row = state.num_computed_tokens - (len(state.prompt_token_ids) - pending.request.num_rows)
        start, stop = max(first_row, 0), min(first_row + num_tokens, pending.request.num_rows)
        if start > pending.num_filled:
            return  # rows between were read from the prefix cache, and stay absent
        offset = int(self.query_start_loc.np[self.input_batch.req_id_to_index[req_id]]) - first_row
        model: Any = self.model
        for chunk in range(start, stop, ROWS_PER_CHUNK):
            rows = slice(chunk, min(chunk + ROWS_PER_CHUNK, stop))
            logits_RV = model.compute_logits(hidden_states[offset + rows.start : offset + rows.stop])
            pending.packed[rows] = score_rows(
                logits_RV[:, : self.model_config.get_vocab_size()],
                pending.request.completion_ids[rows],
                pending.request.candidate_ids[rows],
                top_k=pending.request.top_k,
                temperature=pending.request.temperature,
                entropy=pending.request.entropy,
            )
            pending.num_filled = rows.stop
        if pending.num_filled == pending.request.num_rows:
            self._complete[req_id] = self._pending.pop(req_id).packed.cpu()

    def sample_tokens(self, grammar_output: Any) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """vLLM's step output with the rows completed in this step."""
        with self._seeds_of_unfinished_prefills_set_aside():
            output = super().sample_tokens(grammar_output)
        if self._complete:
            step = output if isinstance(output, ModelRunnerOutput) else output._model_runner_output
            step.prompt_token_id_logprobs_dict, self._complete = self._complete, {}
        return output

    @contextmanager
    def _seeds_of_unfinished_prefills_set_aside(self) -> Iterator[None]:
        """vLLM also samples for a request whose prompt is not yet all read, throws that token away and rewinds the
        request's seeded generator; a CPU generator cannot be rewound, and the attempt kills the engine. A generator
        that is not drawn from need not be rewound, and the seed's stream starts at the first real token everywhere.
        """
        generators = self.input_batch.generators
        unfinished = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        set_aside = {index: generators.pop(index) for index in unfinished if index in generators}
        yield
        generators.update(set_aside)

    def load_lora_model(self, model: Any, vllm_config: Any, device: torch.device) -> Any:
        """vLLM's own, without adapters on the LM head: their rows would be those of the step's sampled tokens."""
        vllm_config.lora_config.target_modules = linear_modules(model)
        model = super().load_lora_model(model, vllm_config, device)
        if current_platform.is_cpu():
            GroupedLora.install(self.lora_manager)
        return model

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self._pending.pop(req_id, None)


class ScoringWorker(_PlatformWorker):
    """The platform's own worker, its V1 model runner made a `RowScoring` one."""

    def init_device(self) -> None:
        """Builds the model runner, then adds row scoring to it; from here on the worker lives no longer than its
        server.
        """
        end_with_server()
        super().init_device()
        RowScoring.install(self.model_runner)

    def replace_weights(self, files: list[str]) -> None:
        """Loads these safetensors files in place, as vLLM reloads a checkpoint; every rank reads its own shard."""
        try:
            self.reload_weights(weights_iterator=safetensors_weights_iterator(files, use_tqdm_on_load=False))
        except BaseException:
            abandon_reload(self.model_runner.get_model())
            raise
        repack_tied_heads(self.model_runner.get_model())

    def receive_weights(self, expected: dict[str, Any]) -> None:
        """Loads in place what the sender broadcasts that `init_weight_transfer_engine` met, and parts from it."""
        try:
            self.start_weight_update()
            self.update_weights(expected)
            self.finish_weight_update()
        except BaseException:
            self._weight_update_active = False
            abandon_reload(self.model_runner.get_model())
            raise
        finally:
            self.shutdown_weight_transfer_engine()
        repack_tied_heads(self.model_runner.get_model())


def repack_tied_heads(model: torch.nn.Module) -> None:
    """On a CPU an LM head computes with a packed copy of its weight; vLLM's reload leaves the copy of a tied one old,
    since no tensor of the checkpoint is the head's own. Where the weight is used as it is, this does nothing.
    """
    for layer in model.modules():
        if isinstance(method := getattr(layer, "quant_method", None), UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(layer)


def abandon_reload(model: torch.nn.Module) -> None:
    """Makes a model whole again whose reload broke off, with weights old and new: else a next load would fail on it.

    While vLLM reloads (vllm.model_executor.model_loader.reload.layerwise), a layer's tensors are on the meta device
    until all of them have come.
    """
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            _place_kernel_tensors(layer, info)
        info.reset()
