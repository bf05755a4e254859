"""The student, in this process or behind a URL: what it writes, and its log-probs of what is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from protos.fingerprint import differences, tokenizer_fingerprint
from protos.records import PAD_ID, Int32, ScoreItem, ScoreResult, TokenizerFingerprint, crc32_of
from student_trainer import losses, monitor
from student_trainer.collate import collate, completion_logits
from student_trainer.config import ConfigError, ModelConfig, TeacherConfig
from student_trainer.probes.remote import RemoteModel
from student_trainer.rollout.base import Rollout, SamplingParams
from student_trainer.rollout.generated import generate_item, rollout_of
from student_trainer.rollout.transformers import TransformersSampler
from student_trainer.student import load_student
from student_trainer.tasks import Problem
from student_trainer.teacher_identity import TeacherMismatch
from student_trainer.text import render_prompt


class ProbedStudent(Protocol):
    """A student that is read and never changed."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, in this process."""
        ...

    @property
    def fingerprint(self) -> TokenizerFingerprint:
        """What a teacher must share."""
        ...

    @property
    def max_top_k(self) -> int:
        """How many of its own most likely ids it can give."""
        ...

    def sample(self, problems: Sequence[Problem], params: SamplingParams, seeds: Sequence[int]) -> list[Rollout]:
        """`params.num_samples` completions of each problem, grouped by problem; `top_ids` of a rollout are empty."""
        ...

    def score(self, items: Sequence[ScoreItem]) -> list[ScoreResult]:
        """Its log-probs, as a teacher gives its own; prompts are ids."""
        ...

    def close(self) -> None:
        """Frees what it opened."""
        ...


def open_student(config: ModelConfig, teacher: TeacherConfig, url: str | None) -> ProbedStudent:
    """The model of `config`, run here, or at `url`, with the tokenizer of `config.path`.

    Raises:
        ConfigError: there is no such model or tokenizer.
        TeacherMismatch: the tokenizer is not that of the model at the URL.
        TeacherError: the URL could not be asked.
    """
    return LocalStudent(config) if url is None else RemoteStudent(url, config.path, teacher)


class LocalStudent:
    """A transformers model in this process."""

    def __init__(self, config: ModelConfig) -> None:
        self._student = load_student(config)
        self._student.model.eval()
        self.tokenizer = self._student.tokenizer
        self.fingerprint = self._student.fingerprint
        self.max_top_k = self._student.vocab_size

    def sample(self, problems: Sequence[Problem], params: SamplingParams, seeds: Sequence[int]) -> list[Rollout]:
        """See `ProbedStudent`."""
        student = self._student
        sampler = TransformersSampler(student.model, student.tokenizer, eos_token_ids=student.eos_token_ids)
        return sampler.sample(problems, params, seeds=seeds)

    def score(self, items: Sequence[ScoreItem]) -> list[ScoreResult]:
        """See `ProbedStudent`."""
        return [self._score(item) for item in items]

    def close(self) -> None:
        """Nothing to free."""

    @torch.no_grad()
    def _score(self, item: ScoreItem) -> ScoreResult:
        assert isinstance(item.prompt, np.ndarray)
        batch = collate([item.prompt], [item.completion_ids]).to(self._student.model.device)
        logp_TV = losses.log_probs(completion_logits(self._student.model, batch), item.temperature)[0].cpu().float()
        wanted = np.empty((len(item.completion_ids), 0), np.int32) if item.candidate_ids is None else item.candidate_ids
        ids_TM = torch.from_numpy(wanted.astype(np.int64)).expand(len(item.completion_ids), -1)
        top = logp_TV.topk(item.top_k)
        candidate_logp_TM = logp_TV.gather(-1, ids_TM.clamp_min(0)).masked_fill(ids_TM == PAD_ID, torch.nan)
        completion_T1 = torch.from_numpy(item.completion_ids.astype(np.int64))[:, None]
        return ScoreResult(
            sampled_logprobs=logp_TV.gather(-1, completion_T1)[:, 0].numpy(),
            top_ids=top.indices.numpy().astype(np.int32),
            top_logprobs=top.values.numpy(),
            candidate_logprobs=candidate_logp_TM.numpy(),
            entropy=monitor.entropy(logp_TV.exp(), logp_TV).numpy() if item.entropy else None,
            weights_version=0,
            num_context_tokens=len(item.prompt),
            num_cached_tokens=0,
            queue_s=0.0,
            engine_s=0.0,
            completion_crc32=crc32_of(item.completion_ids),
        )


class RemoteStudent:
    """A teacher server that runs the student; the tokenizer is loaded here, and must be the server's."""

    def __init__(self, url: str, tokenizer: str, teacher: TeacherConfig) -> None:
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.path {tokenizer!r} has no tokenizer for the student at {url}: {str(error).splitlines()[0]}"
            ) from error
        self._model = RemoteModel(teacher.model_copy(update={"url": url}))
        self.fingerprint = theirs = self._model.info.tokenizer
        ours = tokenizer_fingerprint(self.tokenizer, eos_token_ids=theirs.eos_token_ids, vocab_size=theirs.vocab_size)
        if found := differences(theirs, ours):
            self._model.close()
            raise TeacherMismatch(f"model.path {tokenizer} is not what the student at {url} is: " + "; ".join(found))
        self.max_top_k = self._model.info.max_top_k

    def sample(self, problems: Sequence[Problem], params: SamplingParams, seeds: Sequence[int]) -> list[Rollout]:
        """See `ProbedStudent`."""
        prompts = [render_prompt(self.tokenizer, problem.messages) for problem in problems]
        items = [generate_item(prompt, params, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [
            rollout_of(problem, prompt, sample)
            for problem, prompt, result in zip(problems, prompts, self._model.generate(items), strict=True)
            for sample in result.samples
        ]

    def score(self, items: Sequence[ScoreItem]) -> list[ScoreResult]:
        """See `ProbedStudent`."""
        has_entropy = "entropy" in self._model.info.supports
        return self._model.score([replace(item, entropy=item.entropy and has_entropy) for item in items])

    def close(self) -> None:
        """Closes the connection."""
        self._model.close()


def text_of(tokenizer: PreTrainedTokenizerBase, token_ids: Int32) -> str:
    """Decoded, special tokens left out."""
    return str(tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))
