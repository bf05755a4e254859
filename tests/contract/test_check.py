"""`teacher_server.check` on real teachers, sound and broken: a break shows in the rows that are about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from protos.client import Teacher
from protos.records import PrivilegedIds, ScoreItem, ScoreRequest, ScoreResult, TeacherInfo
from teacher_server.check import CHECKS, Finding, check
from teacher_server.check.examination import default_bound, examination
from teacher_server.check.repeats import after_a_cache_hit
from teacher_server.engines.base import Engine
from teacher_server.reference import TransformersReference
from tests.harness import LoopThread, Server, core_over, serving
from tests.teacher_over import TeacherOver
from tests.tiny_model import build_tiny_qwen3

Change = Callable[[ScoreItem], ScoreItem]
Break = Callable[[ScoreItem, ScoreResult], ScoreResult]


class Altered(TeacherOver):
    """A real teacher that is asked something else than it was told, or whose answers are changed."""

    def __init__(
        self,
        inner: Teacher,
        *,
        change: Change = lambda item: item,
        damage: Break = lambda _, result: result,
        info: Callable[[TeacherInfo], TeacherInfo] = lambda info: info,
    ) -> None:
        super().__init__(inner)
        self._change = change
        self._damage = damage
        self._alter_info = info

    async def info(self) -> TeacherInfo:
        return self._alter_info(await self._inner.info())

    async def score(
        self, request: ScoreRequest | Sequence[ScoreItem], *, timeout_s: float | None = None
    ) -> list[ScoreResult]:
        items = request.items if isinstance(request, ScoreRequest) else request
        results = await self._inner.score([self._change(item) for item in items], timeout_s=timeout_s)
        return [self._damage(item, result) for item, result in zip(items, results, strict=True)]


def failed(findings: list[Finding]) -> set[str]:
    return {finding.name for finding in findings if finding.verdict == "FAIL"}


def test_a_sound_teacher_passes_every_check(run: LoopThread, teacher: Teacher, tiny_model: Path) -> None:
    reference = TransformersReference(str(tiny_model), "float32")
    findings = run(check([teacher, teacher], seed=1, reference=reference))
    assert failed(findings) == set(), findings
    assert len(findings) == len(CHECKS) + 2 + 2
    assert all(finding.difference is not None for finding in findings)


@pytest.mark.slow
def test_the_cache_is_really_hit(run: LoopThread, vllm_server: Server) -> None:
    async def scenario() -> Finding:
        async with vllm_server.connect("grpc") as teacher:
            exam = await examination(teacher, seed=3, bound=None, timeout_s=60)
            return await after_a_cache_hit(exam)

    finding = run(scenario())
    assert finding.verdict == "pass"
    # The prompt has 132 tokens: 4 more than the largest block of vLLM's CPU cache.
    assert "128 of 132 context tokens" in finding.compared, finding.compared


def rolled(_: ScoreItem, result: ScoreResult) -> ScoreResult:
    return replace(
        result,
        sampled_logprobs=np.roll(result.sampled_logprobs, 1),
        top_ids=np.roll(result.top_ids, 1, axis=0),
        top_logprobs=np.roll(result.top_logprobs, 1, axis=0),
        candidate_logprobs=np.roll(result.candidate_logprobs, 1, axis=0),
        entropy=None if result.entropy is None else np.roll(result.entropy, 1),
    )


def padding_as_zero(_: ScoreItem, result: ScoreResult) -> ScoreResult:
    return replace(result, candidate_logprobs=np.nan_to_num(result.candidate_logprobs))


def sampled_at_one(item: ScoreItem, result: ScoreResult) -> ScoreResult:
    return replace(result, sampled_logprobs=result.sampled_logprobs + np.float32(0.01))


def least_first(_: ScoreItem, result: ScoreResult) -> ScoreResult:
    return replace(result, top_ids=result.top_ids[:, ::-1], top_logprobs=result.top_logprobs[:, ::-1])


def not_normalised(_: ScoreItem, result: ScoreResult) -> ScoreResult:
    return replace(result, top_logprobs=result.top_logprobs + np.float32(0.02))


def one_too_low(_: ScoreItem, result: ScoreResult) -> ScoreResult:
    """As if the second of the top-K had been overlooked."""
    if result.top_ids.shape[1] < 2:
        return result
    without_second = np.delete(result.top_logprobs, 1, axis=1)
    return replace(result, top_logprobs=np.concatenate([without_second, without_second[:, -1:]], axis=1))


def ignores_temperature(item: ScoreItem) -> ScoreItem:
    return replace(item, temperature=1.0)


def ignores_privileged(item: ScoreItem) -> ScoreItem:
    return replace(item, privileged=None) if isinstance(item.privileged, PrivilegedIds) else item


def forgets_the_last_prompt_token(item: ScoreItem) -> ScoreItem:
    assert isinstance(item.prompt, np.ndarray)
    return replace(item, prompt=item.prompt[:-1])


def as_it_is(item: ScoreItem) -> ScoreItem:
    return item


def no_damage(_: ScoreItem, result: ScoreResult) -> ScoreResult:
    return result


BROKEN: dict[str, tuple[Change, Break, set[str]]] = {
    "rows shifted by one": (
        as_it_is,
        rolled,
        {
            "no row sees its own token",
            "rows see the token before",
            "split elsewhere",
            "padding",
            "top-K is the highest",
            "top-K as candidates",
            "temperature",  # the padding, NaN, is not where it was asked for
        },
    ),
    "temperature ignored": (ignores_temperature, no_damage, {"temperature"}),
    "padding filled with 0": (as_it_is, padding_as_zero, {"padding"}),
    "sampled and candidates apart": (as_it_is, sampled_at_one, {"sampled as candidate"}),
    "least likely first": (as_it_is, least_first, {"top-K order"}),
    "top-K not normalised": (as_it_is, not_normalised, {"probabilities", "top-K as candidates"}),
    "top-K with a hole": (as_it_is, one_too_low, {"top-K as candidates", "probabilities"}),
    "privileged ids ignored": (ignores_privileged, no_damage, {"privileged ids"}),
    "the last prompt token forgotten": (forgets_the_last_prompt_token, no_damage, {"split elsewhere"}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_teacher_fails_the_checks_about_it(run: LoopThread, transformers_server: Server, case: str) -> None:
    change, damage, expected = BROKEN[case]

    async def scenario() -> list[Finding]:
        async with transformers_server.connect("grpc") as teacher:
            return await check([Altered(teacher, change=change, damage=damage)], seed=1)

    assert failed(run(scenario())) == expected


def test_a_teacher_that_is_not_the_same_twice_fails(run: LoopThread, transformers_server: Server) -> None:
    rng = np.random.default_rng(0)

    def noisy(_: ScoreItem, result: ScoreResult) -> ScoreResult:
        noise = rng.normal(0, 0.01, result.sampled_logprobs.shape).astype(np.float32)
        return replace(result, sampled_logprobs=result.sampled_logprobs + noise)

    async def scenario() -> list[Finding]:
        async with transformers_server.connect("grpc") as teacher:
            return await check([Altered(teacher, damage=noisy)], seed=1)

    assert {"in a batch", "again", "after a cache hit"} <= failed(run(scenario()))


def test_another_model_among_the_replicas_fails(
    run: LoopThread, transformers_server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    from teacher_server.engines.transformers import TransformersEngine

    engine: Engine = TransformersEngine(str(build_tiny_qwen3(tmp_path, seed=9)))

    def other_vocabulary(info: TeacherInfo) -> TeacherInfo:
        return replace(info, tokenizer=replace(info.tokenizer, vocab_sha256="0"))

    async def scenario() -> tuple[set[str], set[str], str]:
        core = core_over(engine, tiny_model)
        async with (
            transformers_server.connect("grpc") as first,
            serving(core) as server,
            server.connect("http") as second,
        ):
            sound = failed(await check([first, first], seed=1))
            strange = Altered(second, info=other_vocabulary)
            broken = failed(await check([first, strange], seed=1))
            url = second.url
        core.close()
        await engine.close()
        return sound, broken, url

    sound, broken, url = run(scenario())
    assert sound == set()
    assert broken == {f"tokenizer of {url}", f"log-probs of {url}"}


def test_another_reference_fails(run: LoopThread, transformers_server: Server, tmp_path: Path) -> None:
    other = TransformersReference(str(build_tiny_qwen3(tmp_path, seed=9)), "float32")

    async def scenario() -> set[str]:
        async with transformers_server.connect("grpc") as teacher:
            return failed(await check([teacher], seed=1, reference=other))

    # The tokenizer is the same, the weights are not.
    assert run(scenario()) == {"reference's log-probs"}


def test_what_a_teacher_does_not_offer_is_said(run: LoopThread, transformers_server: Server) -> None:
    def without_candidates(info: TeacherInfo) -> TeacherInfo:
        return replace(info, supports=("sampled", "top_k"), exact_temperature=False)

    async def scenario() -> list[Finding]:
        async with transformers_server.connect("grpc") as teacher:
            return await check([Altered(teacher, info=without_candidates)], seed=1)

    findings = run(scenario())
    assert failed(findings) == set()
    assert {finding.name for finding in findings if finding.verdict == "not offered"} == {
        "top-K is the highest",
        "top-K as candidates",
        "sampled as candidate",
        "padding",
        "temperature",
    }


def test_the_bound_follows_the_dtype() -> None:
    assert default_bound("float32") == 1e-4
    assert default_bound("bfloat16") == default_bound("float16") == 5e-2


@pytest.mark.parametrize(
    ("difference", "verdict"), [(0.1, "pass"), (0.11, "FAIL"), (np.nan, "FAIL"), (None, "not offered")]
)
def test_a_finding_s_verdict(difference: float | None, verdict: str) -> None:
    assert Finding("", "", difference, 0.1).verdict == verdict
