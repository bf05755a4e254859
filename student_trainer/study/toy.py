"""The toy world: chained sums, a character tokenizer and models small enough to train in a minute.

    <bos>3+5+7:      3+5=8;8+7=15;m15<eos>      the sums written out, then the answer after its marker
    <bos>R⏎3+5+7:    3+5=8;8+7=15;m51<eos>      system message "R": the answer's digits reversed
    <bos>T⏎3+5+7:    m15<eos>                   system message "T": the answer alone
    <bos>3+5+7⏎⏎15:  3+5=8;8+7=15;m15<eos>      privileged information: the answer ends the user message
    <bos>3+5+7:      3+5=9w8;8+7=15;m15<eos>    a wrong sum, "wait", the right one

⏎ is a line break. A message with any other character is an error, never an unknown token.
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from protos.records import Message
from student_trainer.tasks.config import ToyTask
from student_trainer.tasks.problem import Problem, SplitTask, is_held_out, prompt_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ANSWER_MARK = "m"
WAIT = "w"
LINE_BREAK = "\n"
RULE_MARKS = {"reversed": "R", "terse": "T"}
"""The system message that asks for each rule."""

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCABULARY = (*SPECIAL_TOKENS, *"0123456789+=;:", ANSWER_MARK, WAIT, *RULE_MARKS.values(), LINE_BREAK)
"""Token i is VOCABULARY[i]: three special tokens and nineteen characters."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ message['content'] + ':' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)

HEAD_DIM = 32
"""The narrowest head that vLLM's attention on CPUs takes."""

MAX_POSITIONS = 512
"""Tokens of the longest context; twelve two-digit terms with every sum corrected take about 200."""

HELD_OUT_FRACTION = 0.2
"""Of all sums, by hash. A constant, so that no two runs disagree about the side of a sum."""

DRAWS_PER_PROBLEM = 100
"""Before the space of sums counts as used up."""

_WELL_FORMED = re.compile(r"(?:\d+\+\d+=\d+(?:w\d+)?;)*m(\d+)")


@dataclass(frozen=True)
class Sum:
    """A chain of terms and the rule its answer obeys (a key of RULE_MARKS), or None."""

    terms: tuple[int, ...]
    rule: str | None = None

    @property
    def question(self) -> str:
        """The user message: "3+5+7"."""
        return "+".join(map(str, self.terms))

    @property
    def answer(self) -> str:
        """The digits expected after the marker."""
        total = str(sum(self.terms))
        return total[::-1] if self.rule == "reversed" else total


def trace(chain: Sum, rng: random.Random, error_rate: float = 0.0) -> str:
    """The worked solution of `chain`.

    Args:
        chain: the sum to work out.
        rng: where errors are drawn from; untouched at error_rate 0.
        error_rate: the chance a step that its sum is first written one off, then taken back: `3+5=9w8;`.
    """
    answer = ANSWER_MARK + chain.answer
    if chain.rule == "terse":
        return answer
    steps: list[str] = []
    total = chain.terms[0]
    for term in chain.terms[1:]:
        wrong = ""
        if error_rate and rng.random() < error_rate:
            wrong = f"{total + term + rng.choice((-1, 1))}{WAIT}"
        steps.append(f"{total}+{term}={wrong}{total + term};")
        total += term
    return "".join(steps) + answer


def told(question: str, answer: str) -> str:
    """The user message of a teacher that is told the answer, as a teacher server joins privileged text to it."""
    return question + 2 * LINE_BREAK + answer


def toy_task(config: ToyTask) -> SplitTask:
    """The toy world's problems; `Problem.reference` is the trace to train on.

    Raises:
        ValueError: the settings allow fewer different sums than are asked for.
    """
    return _drawn(config.model_dump_json())


@functools.lru_cache(maxsize=8)
def _drawn(settings: str) -> SplitTask:
    """The task of these settings; to draw 20,000 sums and to check them takes seconds, and runs share a task."""
    config = ToyTask.model_validate_json(settings)
    return SplitTask(
        name="toy",
        train=_draw(config, held_out=False),
        held_out=_draw(config, held_out=True),
        score=lambda problem, text: float(answer_of(text) == problem.answer),
        well_formed=lambda _, text: answer_of(text) is not None,
    )


def answer_of(text: str) -> str | None:
    """The digits after the marker, or None when the text is not sums and then one answer."""
    match = _WELL_FORMED.fullmatch(text)
    return match[1] if match else None


def _draw(config: ToyTask, *, held_out: bool) -> list[Problem]:
    side, size = ("held_out", config.held_out_size) if held_out else ("train", config.train_size)
    rng = random.Random(f"{side} {config.seed}")
    problems: dict[tuple[int, ...], Problem] = {}
    for _ in range(DRAWS_PER_PROBLEM * size):
        if len(problems) == size:
            break
        num_terms = rng.randint(config.min_terms, config.max_terms)
        terms = tuple(rng.randint(1, config.max_operand) for _ in range(num_terms))
        # The side depends on the sum alone, not on its rule or hint: the same sum under a rule is no new question.
        key = prompt_key([Message("user", Sum(terms).question)])
        if terms not in problems and is_held_out(key, HELD_OUT_FRACTION) == held_out:
            problems[terms] = _problem(f"{side}-{len(problems)}", terms, config)
    if len(problems) < size:
        raise ValueError(
            f"toy {side}: {size} sums asked for, {len(problems)} different ones found; "
            "raise max_terms or max_operand, or ask for fewer"
        )
    return list(problems.values())


def _problem(name: str, terms: tuple[int, ...], config: ToyTask) -> Problem:
    # A source of its own: the sums drawn, and their order, are the same at every rate.
    rng = random.Random(f"{terms} {config.seed}")
    rule = rng.choice(config.rules) if rng.random() < config.rule_rate else None
    chain = Sum(terms, rule)
    question = told(chain.question, chain.answer) if rng.random() < config.hint_rate else chain.question
    system = (Message("system", RULE_MARKS[rule]),) if rule and config.show_rule else ()
    return Problem(
        id=name,
        messages=(*system, Message("user", question)),
        answer=chain.answer,
        reference=trace(chain, rng, config.error_rate),
    )


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; decoding gives back exactly what was encoded."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def build_toy_model(folder: Path, *, hidden_size: int = 128, num_layers: int = 2, seed: int = 0) -> Path:
    """Writes an untrained Qwen3 (float32, tied embeddings) with the toy tokenizer; transformers and vLLM load it.

    Args:
        folder: where model, tokenizer and generation settings go; made if missing.
        hidden_size: a multiple of HEAD_DIM; 64 gives about 0.13 M parameters in two layers, 128 about 0.5 M.
        num_layers: transformer blocks.
        seed: of the initial weights; the caller's random state is left as it was.

    Returns:
        `folder`.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    if hidden_size % HEAD_DIM:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of the head width {HEAD_DIM}")
    pad_id, bos_id, eos_id = range(len(SPECIAL_TOKENS))
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=hidden_size // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=pad_id, bos_token_id=bos_id, eos_token_id=eos_id)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder
