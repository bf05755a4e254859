"""Both engines against a log_softmax that this file computes itself, from a forward of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from protos.records import PAD_ID
from teacher_server.engines.base import Continuations, Engine, EngineDeadError, GenerateTask, ScoreRows, ScoreTask
from tests.tiny_model import VOCAB_SIZE, build_tiny_qwen3

MAX_CONTEXT = 640
"""Above vLLM's tokens a step below, so that long prompts are prefilled in two chunks."""

VLLM: dict[str, Any] = {
    "dtype": "float32",
    "max_batched_tokens": 512,  # above vllm_worker.ROWS_PER_CHUNK, so that one step fills several chunks of rows
    # 40 blocks of 32 tokens hold two full contexts; with admission before the memory is there, requests are preempted.
    "engine_args": {"block_size": 32, "num_gpu_blocks_override": 41, "scheduler_reserve_full_isl": False},
}

TOLERANCE = 1e-5
"""Nats: what batching, the prefix cache and another attention kernel may change in float32 on this model."""

CLEAR_GAP = 1e-4
"""Nats between two neighbours of a ranking above which their order must not depend on rounding."""

Result = TypeVar("Result")
Run = Callable[[Coroutine[Any, Any, Result]], Result]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """One event loop for the module: engines belong to the loop that first used them."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(tmp_path_factory.mktemp("model"), max_context_tokens=MAX_CONTEXT)


async def start_vllm(model_path: Path) -> Engine:
    from teacher_server.engines.vllm import VllmEngine

    return await VllmEngine.create(str(model_path), **VLLM)


async def start_transformers(model_path: Path) -> Engine:
    from teacher_server.engines.transformers import TransformersEngine

    return TransformersEngine(str(model_path))


START = {"transformers": start_transformers, "vllm": start_vllm}


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, run: Run, model_path: Path) -> Iterator[Engine]:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    engine = run(START[request.param](model_path))
    yield engine
    run(engine.close())


class Reference:
    """log q(. | context, completion up to t) from one plain forward over the whole text."""

    def __init__(self, model_path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32").eval()

    def logprobs_TV(self, task: ScoreTask) -> np.ndarray:
        text = torch.tensor([[*task.context_ids, *task.completion_ids]])
        with torch.no_grad():
            logits_NV = self.model(text).logits[0]
        first = len(task.context_ids) - 1  # the position that predicts the first completion token
        logits_TV = logits_NV[first : first + len(task.completion_ids)]
        return torch.log_softmax(logits_TV / task.temperature, dim=-1).numpy()

    def greedy(self, context_ids: np.ndarray, num_tokens: int) -> list[int]:
        text = context_ids.tolist()
        with torch.no_grad():
            for _ in range(num_tokens):
                text.append(int(self.model(torch.tensor([text])).logits[0, -1].argmax()))
        return text[len(context_ids) :]


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Reference:
    return Reference(model_path)


def score_task(
    seed: int,
    num_context: int,
    num_completion: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    num_candidates: int = 0,
    entropy: bool = False,
) -> ScoreTask:
    """Random ids, padding rows of the vocabulary included; every third candidate is padding."""
    rng = np.random.default_rng(seed)
    candidate_ids = rng.integers(0, VOCAB_SIZE, (num_completion, num_candidates)).astype(np.int32)
    candidate_ids[:, 2::3] = PAD_ID
    return ScoreTask(
        context_ids=rng.integers(0, VOCAB_SIZE, num_context).astype(np.int32),
        completion_ids=rng.integers(0, VOCAB_SIZE, num_completion).astype(np.int32),
        temperature=temperature,
        top_k=top_k,
        candidate_ids=candidate_ids,
        entropy=entropy,
    )


async def scored_together(engine: Engine, tasks: Sequence[ScoreTask]) -> list[ScoreRows]:
    return await asyncio.gather(*(engine.score(task) for task in tasks))


def generate_task(context_ids: np.ndarray, **changes: Any) -> GenerateTask:
    plain = GenerateTask(
        context_ids,
        max_new_tokens=24,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        num_samples=1,
        seed=0,
        stop_token_ids=(),
    )
    return replace(plain, **changes)


def assert_rows(rows: ScoreRows, task: ScoreTask, logprobs_TV: np.ndarray) -> None:
    """Every array of `rows` is that of the reference log-probs."""
    num_rows, every_row = len(task.completion_ids), np.arange(len(task.completion_ids))
    assert rows.sampled_logprobs.dtype == rows.top_logprobs.dtype == rows.candidate_logprobs.dtype == np.float32
    assert rows.top_ids.dtype == np.int32
    np.testing.assert_allclose(
        rows.sampled_logprobs, logprobs_TV[every_row, task.completion_ids], rtol=0, atol=TOLERANCE
    )

    assert rows.top_ids.shape == rows.top_logprobs.shape == (num_rows, task.top_k)
    order = np.argsort(-logprobs_TV, axis=1, kind="stable")
    ranked = np.take_along_axis(logprobs_TV, order, 1)
    np.testing.assert_allclose(rows.top_logprobs, ranked[:, : task.top_k], rtol=0, atol=TOLERANCE)
    gap = -np.diff(ranked, axis=1, prepend=np.inf, append=-np.inf)  # to the neighbour before; the last, to none
    clear = (gap[:, :-1] > CLEAR_GAP) & (gap[:, 1:] > CLEAR_GAP)
    assert np.array_equal(rows.top_ids[clear[:, : task.top_k]], order[:, : task.top_k][clear[:, : task.top_k]]), (
        "top ids differ where the ranking is clear"
    )

    assert rows.candidate_logprobs.shape == task.candidate_ids.shape
    wanted = np.take_along_axis(logprobs_TV, np.maximum(task.candidate_ids, 0), 1)
    wanted[task.candidate_ids == PAD_ID] = np.nan
    np.testing.assert_allclose(rows.candidate_logprobs, wanted, rtol=0, atol=TOLERANCE)

    if task.entropy:
        assert rows.entropy is not None
        np.testing.assert_allclose(rows.entropy, -(np.exp(logprobs_TV) * logprobs_TV).sum(1), rtol=0, atol=TOLERANCE)
    else:
        assert rows.entropy is None
    assert 0 <= rows.num_cached_tokens < len(task.context_ids) or rows.num_cached_tokens == 0


def test_info_states_the_model(engine: Engine) -> None:
    info = engine.info
    assert (info.vocab_size, info.max_context_tokens, info.max_top_k) == (VOCAB_SIZE, MAX_CONTEXT, VOCAB_SIZE)
    assert info.exact_temperature
    assert info.dtype == "float32"
    assert (info.engine, info.score_path) in {("vllm", "runner-rows"), ("transformers", "forward")}


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("top_k", [1, 20, 64])
def test_rows_are_those_of_log_softmax(
    engine: Engine, run: Run, reference: Reference, temperature: float, top_k: int
) -> None:
    """Top-K, candidates with padding, and entropy from one call."""
    task = score_task(top_k, 50, 40, temperature=temperature, top_k=top_k, num_candidates=7, entropy=True)
    assert_rows(run(engine.score(task)), task, reference.logprobs_TV(task))


@pytest.mark.parametrize(
    ("num_context", "num_completion"),
    [(50, 40), (50, 1), (1, 1), (1, 30), (MAX_CONTEXT - 1, 1), (MAX_CONTEXT - 600, 600), (1, MAX_CONTEXT - 1)],
    ids=lambda n: str(n),
)
def test_any_shape_up_to_a_full_context(
    engine: Engine, run: Run, reference: Reference, num_context: int, num_completion: int
) -> None:
    """Context plus completion may be exactly max_context_tokens."""
    task = score_task(1, num_context, num_completion, top_k=5, temperature=0.7)
    assert_rows(run(engine.score(task)), task, reference.logprobs_TV(task))


def test_the_whole_vocabulary_sums_to_one(engine: Engine, run: Run) -> None:
    task = score_task(2, 20, 3, top_k=VOCAB_SIZE, temperature=1.3)
    rows = run(engine.score(task))
    np.testing.assert_allclose(np.exp(rows.top_logprobs.astype(np.float64)).sum(1), 1.0, rtol=0, atol=1e-5)
    assert all(sorted(ids) == list(range(VOCAB_SIZE)) for ids in rows.top_ids.tolist())


def test_sampled_alone(engine: Engine, run: Run, reference: Reference) -> None:
    task = score_task(3, 30, 20)
    assert_rows(run(engine.score(task)), task, reference.logprobs_TV(task))


def test_many_at_once(engine: Engine, run: Run, reference: Reference) -> None:
    """More than one step and more than the KV cache hold, every task with wishes of its own."""
    tasks = [
        score_task(
            100 + i,
            1 + 37 * i % 300,
            1 + 53 * i % 200,
            temperature=(0.5, 0.7, 1.0, 1.3)[i % 4],
            top_k=(0, 1, 20)[i % 3],
            num_candidates=i % 5,
            entropy=i % 2 == 0,
        )
        for i in range(24)
    ]

    for task, rows in zip(tasks, run(scored_together(engine, tasks)), strict=True):
        assert_rows(rows, task, reference.logprobs_TV(task))


def test_repeats_and_prefixes_are_equal(engine: Engine, run: Run, reference: Reference) -> None:
    """The second time the whole text is in the prefix cache, the third time its first half is all of the text."""
    task = score_task(4, 100, 200, top_k=20, temperature=0.7, entropy=True)
    half = replace(task, completion_ids=task.completion_ids[:100], candidate_ids=task.candidate_ids[:100])
    longer = replace(task, context_ids=np.concatenate([task.context_ids, task.completion_ids]))
    for same in (task, task, half, half, longer, longer, task):
        assert_rows(run(engine.score(same)), same, reference.logprobs_TV(same))


def test_the_context_is_read_from_the_prefix_cache(engine: Engine, run: Run, reference: Reference) -> None:
    """Another completion of a known context: 200 tokens are 6 whole blocks of 32, 192 tokens."""
    first = score_task(5, 200, 50, top_k=3)
    second = replace(first, completion_ids=first.completion_ids[::-1].copy())
    run(engine.score(first))
    rows = run(engine.score(second))
    assert_rows(rows, second, reference.logprobs_TV(second))
    assert rows.num_cached_tokens == (192 if engine.info.prefix_cache else 0)


@pytest.mark.parametrize("num_context", [159, 160, 161, 192])
def test_a_group_computes_its_context_once(engine: Engine, run: Run, reference: Reference, num_context: int) -> None:
    """Completions of one context sent together: the first computes it, the others read its whole blocks of 32, save the
    position that predicts their first token, the context's last; then the whole group again, which reads the rest too,
    for the block that a context ends in is in the cache with the completion's first tokens."""
    first = score_task(1000 + num_context, num_context, 20, top_k=3, temperature=0.7)
    rng = np.random.default_rng(num_context)
    group = [replace(first, completion_ids=rng.integers(0, VOCAB_SIZE, 20).astype(np.int32)) for _ in range(6)]
    whole, all_but_one = (num_context // 32 * 32, num_context - 1) if engine.info.prefix_cache else (0, 0)
    for cached in ([0, *[min(whole, all_but_one)] * 5], [all_but_one] * 6):
        results = run(scored_together(engine, group))
        for task, rows in zip(group, results, strict=True):
            assert_rows(rows, task, reference.logprobs_TV(task))
        assert [rows.num_cached_tokens for rows in results] == cached


def test_texts_that_part_inside_a_block_share_nothing_of_it(engine: Engine, run: Run, reference: Reference) -> None:
    """Two contexts of 200 tokens with 170 in common, 10 of them in a block of 32 that each goes on with in its own way,
    and two completions of each: one after another; others like them together; and the first ones again, together.
    """

    def four(seed: int) -> list[ScoreTask]:
        common, *own = (score_task(seed + i, size, 1).context_ids for i, size in enumerate((170, 30, 30)))
        contexts = [np.concatenate([common, rest]) for rest in own] * 2
        return [replace(score_task(seed + 3 + i, 1, 40, top_k=3), context_ids=ids) for i, ids in enumerate(contexts)]

    tasks, others = four(4000), four(5000)
    one_by_one = [run(engine.score(task)) for task in tasks]
    together, again = run(scored_together(engine, others)), run(scored_together(engine, tasks))
    for asked, results in ((tasks, one_by_one), (others, together), (tasks, again)):
        for task, rows in zip(asked, results, strict=True):
            assert_rows(rows, task, reference.logprobs_TV(task))
    if engine.info.prefix_cache:  # five whole blocks of the other text, six of a text's own, and all before its rows
        assert [rows.num_cached_tokens for rows in one_by_one] == [0, 160, 192, 192]
        assert [rows.num_cached_tokens for rows in again] == [199] * 4


def test_concurrent_groups_under_pressure(engine: Engine, run: Run, reference: Reference) -> None:
    """Five contexts of 300 tokens are 50 blocks, the cache holds 40: blocks are evicted between a group's members."""
    contexts = [score_task(2000 + i, 300, 1).context_ids for i in range(5)]
    rng = np.random.default_rng(0)
    tasks = [
        replace(
            score_task(3000 + i, 1, 1 + 7 * i % 60, top_k=2, temperature=1.3),
            context_ids=contexts[rng.integers(5)],
        )
        for i in range(40)
    ]
    for task, rows in zip(tasks, run(scored_together(engine, tasks)), strict=True):
        assert_rows(rows, task, reference.logprobs_TV(task))


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_comparison_sees_a_shift_of_one(engine: Engine, run: Run, reference: Reference, shift: int) -> None:
    """The check of the checker: rows moved by one position, and a temperature ignored, must not pass."""
    task = score_task(6, 50, 40, top_k=20, temperature=0.7)
    rows = run(engine.score(task))
    with pytest.raises(AssertionError):
        assert_rows(rows, task, np.roll(reference.logprobs_TV(task), shift, axis=0))
    at_one = score_task(6, 50, 40, top_k=20, temperature=1.0)
    with pytest.raises(AssertionError):
        assert_rows(rows, task, reference.logprobs_TV(at_one))


def test_a_cancelled_call_frees_its_work(engine: Engine, run: Run, reference: Reference) -> None:
    """Nothing of half a minute's work is left a moment after it was cancelled, at whatever stage it was."""
    context_ids = score_task(7, 40, 1).context_ids
    task = score_task(8, 20, 10, top_k=2)

    async def cancel_all() -> tuple[ScoreRows, float]:
        calls = [
            asyncio.create_task(engine.generate(generate_task(context_ids, max_new_tokens=600, num_samples=40))),
            *(asyncio.create_task(engine.score(score_task(50 + i, 300, 300, top_k=20))) for i in range(8)),
        ]
        for call in calls:
            await asyncio.sleep(0.01)
            call.cancel()
        never_started = asyncio.create_task(engine.score(score_task(60, 300, 300)))
        never_started.cancel()
        outcomes = await asyncio.gather(*calls, never_started, return_exceptions=True)
        assert isinstance(outcomes[0], asyncio.CancelledError)
        cancelled_at = time.monotonic()
        return await engine.score(task), time.monotonic() - cancelled_at

    rows, seconds = run(cancel_all())
    assert_rows(rows, task, reference.logprobs_TV(task))
    assert seconds < 3.0
    if engine.info.engine == "vllm":
        assert cast("Any", engine)._llm.get_num_unfinished_requests() == 0


def test_greedy_is_the_reference_greedy(engine: Engine, run: Run, reference: Reference) -> None:
    """At temperature 0 the log-probs are those of log_softmax(logits)."""
    context_ids = score_task(9, 60, 1).context_ids
    (sample,) = run(engine.generate(generate_task(context_ids, temperature=0.0))).samples
    assert sample.token_ids.tolist() == reference.greedy(context_ids, 24)
    assert sample.finish_reason == "length"
    assert_logprobs(reference, context_ids, sample.token_ids, sample.logprobs, temperature=1.0)


def assert_logprobs(
    reference: Reference, context_ids: np.ndarray, token_ids: np.ndarray, logprobs: np.ndarray, *, temperature: float
) -> None:
    """The log-probs are those of the whole distribution at this temperature."""
    assert token_ids.dtype == np.int32
    assert logprobs.dtype == np.float32
    task = ScoreTask(context_ids, token_ids, temperature, 0, np.empty((len(token_ids), 0), np.int32), entropy=False)
    expected = reference.logprobs_TV(task)[np.arange(len(token_ids)), token_ids]
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.8, 0), (1.0, 5), (0.9, 10)])
def test_samples_carry_the_log_probs_before_truncation(
    engine: Engine, run: Run, reference: Reference, temperature: float, top_p: float, top_k: int
) -> None:
    context_ids = score_task(10, 60, 1).context_ids
    task = generate_task(context_ids, temperature=temperature, top_p=top_p, top_k=top_k, num_samples=3, seed=11)
    samples = run(engine.generate(task)).samples
    assert len({tuple(sample.token_ids.tolist()) for sample in samples}) == 3  # each has a seed of its own
    for sample in samples:
        assert_logprobs(reference, context_ids, sample.token_ids, sample.logprobs, temperature=temperature)
        assert_within(reference, task, sample.token_ids)


def assert_within(reference: Reference, task: GenerateTask, token_ids: np.ndarray) -> None:
    """No id lies outside the top-k, nor outside the nucleus of what top-k leaves."""
    for logprobs_V, token_id in zip(reference.logprobs_TV(score_task_of(task, token_ids)), token_ids, strict=True):
        ranked = np.argsort(-logprobs_V)[: task.top_k or None]
        assert token_id in ranked
        kept = np.exp(logprobs_V[ranked]) / np.exp(logprobs_V[ranked]).sum()
        before = kept[: ranked.tolist().index(token_id)].sum()
        assert before < task.top_p + 1e-5


def test_samples_follow_the_distribution(engine: Engine, run: Run, reference: Reference) -> None:
    """400 first tokens at T = 1.3: the most likely id's share is within four standard errors of its probability."""
    context_ids = score_task(12, 30, 1).context_ids
    task = generate_task(context_ids, max_new_tokens=1, temperature=1.3, num_samples=400, seed=5)
    first = [int(sample.token_ids[0]) for sample in run(engine.generate(task)).samples]
    probs_V = np.exp(
        reference.logprobs_TV(ScoreTask(context_ids, np.zeros(1, np.int32), 1.3, 0, np.empty((1, 0), np.int32), False))
    )
    top, p = int(probs_V[0].argmax()), float(probs_V[0].max())
    assert abs(first.count(top) / 400 - p) < 4 * np.sqrt(p * (1 - p) / 400)


@pytest.mark.parametrize("top_p", [1e-3, 1e-300])
def test_the_smallest_nucleus_is_greedy(engine: Engine, run: Run, top_p: float) -> None:
    """At any temperature; 1e-300 is 0 in float32, and the most likely id is in every nucleus."""
    context_ids = score_task(12, 30, 1).context_ids
    nucleus = generate_task(context_ids, max_new_tokens=5, temperature=1.3, top_p=top_p, seed=5)
    greedy = generate_task(context_ids, max_new_tokens=5, temperature=0.0, seed=5)
    [[written], [expected]] = [run(engine.generate(task)).samples for task in (nucleus, greedy)]
    assert written.token_ids.tolist() == expected.token_ids.tolist()


def test_equal_seeds_repeat_and_others_differ(engine: Engine, run: Run) -> None:
    context_ids = score_task(13, 60, 1).context_ids

    def samples(seed: int | None) -> list[list[int]]:
        return [
            s.token_ids.tolist()
            for s in run(engine.generate(generate_task(context_ids, num_samples=2, seed=seed))).samples
        ]

    torch.manual_seed(0)
    first = samples(3)
    torch.rand(1)
    assert samples(3) == first
    assert samples(4) != first
    assert samples(None) != samples(None)
    assert samples(4)[0] != first[1]  # neighbouring seeds share no stream


def test_a_continuation_does_not_depend_on_its_company(engine: Engine, run: Run) -> None:
    """Greedy and seeded samples alone, then in one batch with the others and with prefills that come and go."""
    tasks = [
        generate_task(score_task(60 + i, 20 + 9 * i, 1).context_ids, temperature=float(i % 2), seed=i, num_samples=2)
        for i in range(6)
    ]

    async def in_company() -> list[Continuations]:
        scores = asyncio.gather(*(engine.score(score_task(70 + i, 100 + 50 * i, 30, top_k=2)) for i in range(6)))
        written = await asyncio.gather(*(engine.generate(task) for task in tasks))
        await scores
        return written

    def ids(continuations: Continuations) -> list[list[int]]:
        return [sample.token_ids.tolist() for sample in continuations.samples]

    assert [ids(run(engine.generate(task))) for task in tasks] == [ids(written) for written in run(in_company())]


def test_generation_leaves_the_global_generator_alone(engine: Engine, run: Run) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run(engine.generate(generate_task(score_task(14, 10, 1).context_ids, num_samples=2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_scores_and_samples_stay_exact_when_memory_runs_out(engine: Engine, run: Run, reference: Reference) -> None:
    """8 samples grow to 8 blocks each and 6 tasks need 13 each, where vLLM has 40: some are preempted and resumed."""
    growing = [generate_task(score_task(20 + i, 40, 1).context_ids, max_new_tokens=200) for i in range(8)]
    scored = [score_task(40 + i, 200, 200, top_k=5, temperature=0.7) for i in range(6)]

    async def all_at_once() -> tuple[list[Continuations], list[ScoreRows]]:
        samples = asyncio.gather(*(engine.generate(task) for task in growing))
        await asyncio.sleep(0.05)
        rows = await asyncio.gather(*(engine.score(task) for task in scored))
        return await samples, rows

    continuations, rows_of_tasks = run(all_at_once())
    for task, rows in zip(scored, rows_of_tasks, strict=True):
        assert_rows(rows, task, reference.logprobs_TV(task))
    for task, continuation in zip(growing, continuations, strict=True):
        (sample,) = continuation.samples
        assert len(sample.token_ids) == 200
        assert_logprobs(reference, task.context_ids, sample.token_ids, sample.logprobs, temperature=1.0)


def test_the_stop_id_ends_a_sample_and_is_its_last(engine: Engine, run: Run, reference: Reference) -> None:
    """Stop at the greedy text's fifth id, or at that id's first appearance if it comes before."""
    context_ids = score_task(15, 60, 1).context_ids
    greedy = reference.greedy(context_ids, 24)
    length = greedy.index(greedy[4]) + 1
    task = generate_task(context_ids, temperature=0.0, stop_token_ids=(greedy[4], VOCAB_SIZE - 1))
    (sample,) = run(engine.generate(task)).samples
    assert (sample.token_ids.tolist(), sample.finish_reason) == (greedy[:length], "stop")
    assert_logprobs(reference, context_ids, sample.token_ids, sample.logprobs, temperature=1.0)
    last = generate_task(context_ids, temperature=0.0, stop_token_ids=(greedy[4],), max_new_tokens=length)
    (sample,) = run(engine.generate(last)).samples
    assert sample.finish_reason == "stop"  # at the last allowed token the stop id still is the reason


def test_generation_fills_the_context_to_its_last_token(engine: Engine, run: Run, reference: Reference) -> None:
    context_ids = score_task(16, MAX_CONTEXT - 8, 1).context_ids
    (sample,) = run(engine.generate(generate_task(context_ids, temperature=0.0, max_new_tokens=8))).samples
    assert sample.token_ids.tolist() == reference.greedy(context_ids, 8)


@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_a_sampling_temperature_is_used_or_refused(
    engine: Engine, run: Run, reference: Reference, temperature: float
) -> None:
    """vLLM would sample at 0.01 where 0.005 was asked for, and not at all above 2."""
    task = generate_task(score_task(19, 10, 1).context_ids, temperature=temperature)
    if engine.info.engine == "vllm":
        with pytest.raises(ValueError, match=f"temperature is {temperature}"):
            run(engine.generate(task))
    else:
        (sample,) = run(engine.generate(task)).samples
        expected = reference.logprobs_TV(score_task_of(task, sample.token_ids))[np.arange(24), sample.token_ids]
        # Logits over 0.005 are 200 times as large, and so is their rounding.
        np.testing.assert_allclose(sample.logprobs, expected, rtol=0, atol=200 * TOLERANCE)


def score_task_of(task: GenerateTask, token_ids: np.ndarray) -> ScoreTask:
    """The task that scores a sample at the temperature it was drawn at."""
    return ScoreTask(task.context_ids, token_ids, task.temperature, 0, np.empty((len(token_ids), 0), np.int32), False)


def test_speculative_decoding_is_refused(run: Run, model_path: Path) -> None:
    pytest.importorskip("vllm")
    from teacher_server.engines.vllm import VllmEngine

    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(ValueError, match="speculative decoding is refused"):
        run(VllmEngine.create(str(model_path), dtype="float32", engine_args={"speculative_config": ngram}))


def test_a_context_above_the_model_s_own_is_refused(model_path: Path) -> None:
    from teacher_server.engines.transformers import TransformersEngine

    with pytest.raises(ValueError, match=r"max_context_tokens is 641.*at most 640"):
        TransformersEngine(str(model_path), max_context_tokens=641)


@pytest.mark.slow
def test_a_killed_vllm_is_dead(run: Run, model_path: Path) -> None:
    """The engine's process is gone from one moment to the next: no call waits for it."""
    pytest.importorskip("vllm")

    async def kill_at_work() -> None:
        engine = await start_vllm(model_path)
        calls = [
            asyncio.create_task(engine.generate(generate_task(score_task(i, 40, 1).context_ids, max_new_tokens=600)))
            for i in range(4)
        ]
        await engine.score(score_task(18, 10, 10))
        (process,) = cast("Any", engine)._llm.engine_core.resources.engine_manager.processes
        process.kill()
        outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), timeout=30)
        assert [type(outcome) for outcome in outcomes] == [EngineDeadError] * 4
        with pytest.raises(EngineDeadError):
            await engine.score(score_task(18, 10, 10))
        await engine.close()

    run(kill_at_work())


def test_a_closed_engine_is_dead(engine: Engine, run: Run) -> None:
    """What is in flight at the time fails, and so does what comes after. Last, since it ends the file's engine."""

    async def close_at_work() -> None:
        call = asyncio.create_task(
            engine.generate(generate_task(score_task(17, 40, 1).context_ids, max_new_tokens=600, num_samples=4))
        )
        await engine.score(score_task(18, 10, 10))
        await engine.close()
        await engine.close()  # twice is once
        with pytest.raises(EngineDeadError):
            await call
        with pytest.raises(EngineDeadError):
            await engine.score(score_task(18, 10, 10))

    run(close_at_work())
