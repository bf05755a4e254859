"""Both engines against a log_softmax of the tests' own, from a plain forward of the model."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from teacher_server.engines.base import Continuations, Engine, EngineDeadError, ScoreRows, ScoreTask
from teacher_server.engines.transformers import TransformersEngine
from tests.engine_tasks import (
    TOLERANCE,
    Reference,
    assert_rows,
    assert_sample,
    assert_scored,
    assert_within,
    generate_task,
    score_task,
    score_task_of,
    scored_together,
)
from tests.harness import START_S, LoopThread
from tests.tiny_model import VOCAB_SIZE, build_tiny_qwen3

MAX_CONTEXT = 640
"""Above vLLM's tokens a step below, so that long prompts are prefilled in two chunks."""

VLLM: dict[str, Any] = {
    "dtype": "float32",
    "max_batched_tokens": 512,  # above vllm_worker.ROWS_PER_CHUNK, so that one step fills several chunks of rows
    # 40 blocks of 32 tokens hold two full contexts; with admission before the memory is there, requests are preempted.
    "engine_args": {"block_size": 32, "num_gpu_blocks_override": 41, "scheduler_reserve_full_isl": False},
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(tmp_path_factory.mktemp("model"), max_context_tokens=MAX_CONTEXT)


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, run: LoopThread, model_path: Path) -> Iterator[Engine]:
    if request.param == "vllm":
        engine = run(
            pytest.importorskip("teacher_server.engines.vllm").VllmEngine.create(str(model_path), **VLLM), START_S
        )
    else:
        engine = TransformersEngine(str(model_path))
    yield engine
    run(engine.close())


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Reference:
    return Reference(model_path)


def test_info_states_the_model(engine: Engine) -> None:
    info = engine.info
    assert (info.vocab_size, info.max_context_tokens, info.max_top_k) == (VOCAB_SIZE, MAX_CONTEXT, VOCAB_SIZE)
    assert info.exact_temperature
    assert info.dtype == "float32"
    assert (info.engine, info.score_path) in {("vllm", "runner-rows"), ("transformers", "forward")}


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("top_k", [1, 20, 64])
def test_rows_are_those_of_log_softmax(
    engine: Engine, run: LoopThread, reference: Reference, temperature: float, top_k: int
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
    engine: Engine, run: LoopThread, reference: Reference, num_context: int, num_completion: int
) -> None:
    """Context plus completion may be exactly max_context_tokens."""
    task = score_task(1, num_context, num_completion, top_k=5, temperature=0.7)
    assert_rows(run(engine.score(task)), task, reference.logprobs_TV(task))


def test_the_whole_vocabulary_sums_to_one(engine: Engine, run: LoopThread) -> None:
    task = score_task(2, 20, 3, top_k=VOCAB_SIZE, temperature=1.3)
    rows = run(engine.score(task))
    np.testing.assert_allclose(np.exp(rows.top_logprobs.astype(np.float64)).sum(1), 1.0, rtol=0, atol=1e-5)
    assert all(sorted(ids) == list(range(VOCAB_SIZE)) for ids in rows.top_ids.tolist())


def test_sampled_alone(engine: Engine, run: LoopThread, reference: Reference) -> None:
    task = score_task(3, 30, 20)
    assert_rows(run(engine.score(task)), task, reference.logprobs_TV(task))


def test_many_at_once(engine: Engine, run: LoopThread, reference: Reference) -> None:
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

    assert_scored(tasks, run(scored_together(engine, tasks)), reference)


def test_repeats_and_prefixes_are_equal(engine: Engine, run: LoopThread, reference: Reference) -> None:
    """The second time the whole text is in the prefix cache, the third time its first half is all of the text."""
    task = score_task(4, 100, 200, top_k=20, temperature=0.7, entropy=True)
    half = replace(task, completion_ids=task.completion_ids[:100], candidate_ids=task.candidate_ids[:100])
    longer = replace(task, context_ids=np.concatenate([task.context_ids, task.completion_ids]))
    for same in (task, task, half, half, longer, longer, task):
        assert_rows(run(engine.score(same)), same, reference.logprobs_TV(same))


def test_the_context_is_read_from_the_prefix_cache(engine: Engine, run: LoopThread, reference: Reference) -> None:
    """Another completion of a known context: 200 tokens are 6 whole blocks of 32, 192 tokens."""
    first = score_task(5, 200, 50, top_k=3)
    second = replace(first, completion_ids=first.completion_ids[::-1].copy())
    run(engine.score(first))
    rows = run(engine.score(second))
    assert_rows(rows, second, reference.logprobs_TV(second))
    assert rows.num_cached_tokens == (192 if engine.info.prefix_cache else 0)


@pytest.mark.parametrize("num_context", [159, 160, 161, 192])
def test_a_group_computes_its_context_once(
    engine: Engine, run: LoopThread, reference: Reference, num_context: int
) -> None:
    """Completions of one context sent together: the first computes it, the others read its whole blocks of 32, save the
    position that predicts their first token, the context's last; then the whole group again, which reads the rest too,
    for the block that a context ends in is in the cache with the completion's first tokens."""
    first = score_task(1000 + num_context, num_context, 20, top_k=3, temperature=0.7)
    rng = np.random.default_rng(num_context)
    group = [replace(first, completion_ids=rng.integers(0, VOCAB_SIZE, 20).astype(np.int32)) for _ in range(6)]
    whole, all_but_one = (num_context // 32 * 32, num_context - 1) if engine.info.prefix_cache else (0, 0)
    for cached in ([0, *[min(whole, all_but_one)] * 5], [all_but_one] * 6):
        results = run(scored_together(engine, group))
        assert_scored(group, results, reference)
        assert [rows.num_cached_tokens for rows in results] == cached


def test_texts_that_part_inside_a_block_share_nothing_of_it(
    engine: Engine, run: LoopThread, reference: Reference
) -> None:
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
        assert_scored(asked, results, reference)
    if engine.info.prefix_cache:  # five whole blocks of the other text, six of a text's own, and all before its rows
        assert [rows.num_cached_tokens for rows in one_by_one] == [0, 160, 192, 192]
        assert [rows.num_cached_tokens for rows in again] == [199] * 4


def test_concurrent_groups_under_pressure(engine: Engine, run: LoopThread, reference: Reference) -> None:
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
    assert_scored(tasks, run(scored_together(engine, tasks)), reference)


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_comparison_sees_a_shift_of_one(engine: Engine, run: LoopThread, reference: Reference, shift: int) -> None:
    """The check of the checker: rows moved by one position, and a temperature ignored, must not pass."""
    task = score_task(6, 50, 40, top_k=20, temperature=0.7)
    rows = run(engine.score(task))
    with pytest.raises(AssertionError):
        assert_rows(rows, task, np.roll(reference.logprobs_TV(task), shift, axis=0))
    at_one = score_task(6, 50, 40, top_k=20, temperature=1.0)
    with pytest.raises(AssertionError):
        assert_rows(rows, task, reference.logprobs_TV(at_one))


def test_a_cancelled_call_frees_its_work(engine: Engine, run: LoopThread, reference: Reference) -> None:
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


def test_greedy_is_the_reference_greedy(engine: Engine, run: LoopThread, reference: Reference) -> None:
    """At temperature 0 the log-probs are those of log_softmax(logits)."""
    context_ids = score_task(9, 60, 1).context_ids
    task = generate_task(context_ids, temperature=0.0)
    (sample,) = run(engine.generate(task)).samples
    assert sample.token_ids.tolist() == reference.greedy(context_ids, 24)
    assert sample.finish_reason == "length"
    assert_sample(reference, task, sample)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.8, 0), (1.0, 5), (0.9, 10)])
def test_samples_carry_the_log_probs_before_truncation(
    engine: Engine, run: LoopThread, reference: Reference, temperature: float, top_p: float, top_k: int
) -> None:
    context_ids = score_task(10, 60, 1).context_ids
    task = generate_task(context_ids, temperature=temperature, top_p=top_p, top_k=top_k, num_samples=3, seed=11)
    samples = run(engine.generate(task)).samples
    assert len({tuple(sample.token_ids.tolist()) for sample in samples}) == 3  # each has a seed of its own
    for sample in samples:
        assert_sample(reference, task, sample)
        assert_within(reference, task, sample.token_ids)


def test_samples_follow_the_distribution(engine: Engine, run: LoopThread, reference: Reference) -> None:
    """400 first tokens at T = 1.3: the most likely id's share is within four standard errors of its probability."""
    context_ids = score_task(12, 30, 1).context_ids
    task = generate_task(context_ids, max_new_tokens=1, temperature=1.3, num_samples=400, seed=5)
    first = [int(sample.token_ids[0]) for sample in run(engine.generate(task)).samples]
    probs_TV = np.exp(reference.logprobs_TV(score_task_of(task, np.zeros(1, np.int32))))
    top, p = int(probs_TV[0].argmax()), float(probs_TV[0].max())
    assert abs(first.count(top) / 400 - p) < 4 * np.sqrt(p * (1 - p) / 400)


@pytest.mark.parametrize("top_p", [1e-3, 1e-300])
def test_the_smallest_nucleus_is_greedy(engine: Engine, run: LoopThread, top_p: float) -> None:
    """At any temperature; 1e-300 is 0 in float32, and the most likely id is in every nucleus."""
    context_ids = score_task(12, 30, 1).context_ids
    nucleus = generate_task(context_ids, max_new_tokens=5, temperature=1.3, top_p=top_p, seed=5)
    greedy = generate_task(context_ids, max_new_tokens=5, temperature=0.0, seed=5)
    [[written], [expected]] = [run(engine.generate(task)).samples for task in (nucleus, greedy)]
    assert written.token_ids.tolist() == expected.token_ids.tolist()


def test_equal_seeds_repeat_and_others_differ(engine: Engine, run: LoopThread) -> None:
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


def test_a_continuation_does_not_depend_on_its_company(engine: Engine, run: LoopThread) -> None:
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


def test_generation_leaves_the_global_generator_alone(engine: Engine, run: LoopThread) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run(engine.generate(generate_task(score_task(14, 10, 1).context_ids, num_samples=2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_scores_and_samples_stay_exact_when_memory_runs_out(
    engine: Engine, run: LoopThread, reference: Reference
) -> None:
    """8 samples grow to 8 blocks each and 6 tasks need 13 each, where vLLM has 40: some are preempted and resumed."""
    growing = [generate_task(score_task(20 + i, 40, 1).context_ids, max_new_tokens=200) for i in range(8)]
    scored = [score_task(40 + i, 200, 200, top_k=5, temperature=0.7) for i in range(6)]

    async def all_at_once() -> tuple[list[Continuations], list[ScoreRows]]:
        samples = asyncio.gather(*(engine.generate(task) for task in growing))
        await asyncio.sleep(0.05)
        rows = await asyncio.gather(*(engine.score(task) for task in scored))
        return await samples, rows

    continuations, rows_of_tasks = run(all_at_once())
    assert_scored(scored, rows_of_tasks, reference)
    for task, continuation in zip(growing, continuations, strict=True):
        (sample,) = continuation.samples
        assert len(sample.token_ids) == 200
        assert_sample(reference, task, sample)


def test_the_stop_id_ends_a_sample_and_is_its_last(engine: Engine, run: LoopThread, reference: Reference) -> None:
    """Stop at the greedy text's fifth id, or at that id's first appearance if it comes before."""
    context_ids = score_task(15, 60, 1).context_ids
    greedy = reference.greedy(context_ids, 24)
    length = greedy.index(greedy[4]) + 1
    task = generate_task(context_ids, temperature=0.0, stop_token_ids=(greedy[4], VOCAB_SIZE - 1))
    (sample,) = run(engine.generate(task)).samples
    assert (sample.token_ids.tolist(), sample.finish_reason) == (greedy[:length], "stop")
    assert_sample(reference, task, sample)
    last = generate_task(context_ids, temperature=0.0, stop_token_ids=(greedy[4],), max_new_tokens=length)
    (sample,) = run(engine.generate(last)).samples
    assert sample.finish_reason == "stop"  # at the last allowed token the stop id still is the reason


def test_generation_fills_the_context_to_its_last_token(engine: Engine, run: LoopThread, reference: Reference) -> None:
    context_ids = score_task(16, MAX_CONTEXT - 8, 1).context_ids
    (sample,) = run(engine.generate(generate_task(context_ids, temperature=0.0, max_new_tokens=8))).samples
    assert sample.token_ids.tolist() == reference.greedy(context_ids, 8)


@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_a_sampling_temperature_is_used_or_refused(
    engine: Engine, run: LoopThread, reference: Reference, temperature: float
) -> None:
    """vLLM would sample at 0.01 where 0.005 was asked for, and not at all above 2."""
    task = generate_task(score_task(19, 10, 1).context_ids, temperature=temperature)
    if engine.info.engine == "vllm":
        with pytest.raises(ValueError, match=f"temperature is {temperature}"):
            run(engine.generate(task))
    else:
        (sample,) = run(engine.generate(task)).samples
        # Logits over 0.005 are 200 times as large, and so is their rounding.
        assert_sample(reference, task, sample, atol=200 * TOLERANCE)


def test_a_closed_engine_is_dead(engine: Engine, run: LoopThread) -> None:
    """What is in flight at the time fails, and so does what comes after. Last, since it ends the file's engine.

    Whoever still holds it then holds nothing of vLLM, whose `AsyncLLM.__del__` fails, with a TypeError on standard
    error, where it comes no sooner than the end of the interpreter.
    """
    llm: Any = getattr(engine, "_llm", None)
    held = llm and weakref.ref(llm)
    processes = llm.engine_core.resources.engine_manager.processes if llm else []
    del llm

    def hear_nothing_of_its_end() -> None:
        while any(process.is_alive() for process in processes):
            time.sleep(0.05)
        time.sleep(1)  # for the thread that closes what is left

    async def close_at_work() -> None:
        call = asyncio.create_task(
            engine.generate(generate_task(score_task(17, 40, 1).context_ids, max_new_tokens=600, num_samples=4))
        )
        await engine.score(score_task(18, 10, 10))
        asyncio.get_running_loop().call_later(0.05, hear_nothing_of_its_end)
        await engine.close()
        await engine.close()  # twice is once
        with pytest.raises(EngineDeadError):
            await call
        with pytest.raises(EngineDeadError):
            await engine.score(score_task(18, 10, 10))

    run(close_at_work())
    gc.collect()
    assert held is None or held() is None
