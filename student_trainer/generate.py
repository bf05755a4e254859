"""What a student writes to a person's own prompts, shown as it is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from protos.records import Message
from student_trainer.config import ModelConfig
from student_trainer.rollout.base import Rollout, SamplingParams
from student_trainer.rollout.transformers import TransformersSampler
from student_trainer.seeds import rollout_seeds
from student_trainer.student import load_student
from student_trainer.tasks import Problem


def generate(
    model: ModelConfig, prompts: Sequence[str], params: SamplingParams, *, system: str | None, seed: int
) -> Iterator[Rollout]:
    """`params.num_samples` completions of each prompt, each as soon as it is finished.

    Raises:
        ConfigError: there is no such model.
        ValueError: a sampling parameter is out of its range.
    """
    checks = (
        ("samples", params.num_samples >= 1, "at least 1", params.num_samples),
        ("temperature", params.temperature >= 0, "0 or above", params.temperature),
        ("top_p", 0 < params.top_p <= 1, "above 0 and at most 1", params.top_p),
        ("max_new_tokens", params.max_new_tokens >= 1, "at least 1", params.max_new_tokens),
    )
    for name, is_valid, range_, value in checks:
        if not is_valid:
            raise ValueError(f"{name} must be {range_}, not {value}")
    student = load_student(model)
    sampler = TransformersSampler(student.model, student.tokenizer, eos_token_ids=student.eos_token_ids)
    before = (Message("system", system),) if system else ()
    problems = [
        Problem(id=str(index), messages=(*before, Message("user", prompt)), answer="")
        for index, prompt in enumerate(prompts)
    ]
    seeds = rollout_seeds(seed, 0, len(problems))
    return (
        rollout
        for problem, its_seed in zip(problems, seeds, strict=True)
        for ended in sampler.stream([problem], params, seeds=[its_seed])
        for rollout in ended.values()
    )


def to_json(rollout: Rollout) -> str:
    """One completion as a JSON object; `logprob` is its tokens' sum, in nats."""
    return json.dumps(
        {
            "prompt": rollout.problem.messages[-1].content,
            "text": rollout.text,
            "num_tokens": len(rollout.completion_ids),
            "is_finished": rollout.is_finished,
            "logprob": float(rollout.logprobs.sum()),
        },
        ensure_ascii=False,
    )


def show(console: Console, model: str, rollout: Rollout) -> None:
    """Prints a completion below its prompt."""
    end = "finished" if rollout.is_finished else "cut at the budget"
    mean = float(rollout.logprobs.mean())
    note = f"{len(rollout.completion_ids)} tokens, {end}, mean log-prob {mean:.3f} nats"
    prompt = Text(rollout.problem.messages[-1].content, style="dim")
    console.print(Panel(Group(prompt, Text(rollout.text)), title=escape(model), subtitle=note))
