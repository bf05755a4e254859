"""One suite over {http, grpc, a pool of both} x {transformers, vllm}: equal arrays, equal errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from protos import contract
from protos.client import Teacher
from protos.errors import Conflict, ContextTooLong, InvalidRequest, TeacherError, UnknownTeacher
from protos.fingerprint import tokenizer_fingerprint
from protos.records import (
    Chat,
    GenerateItem,
    GenerateRequest,
    Message,
    PrivilegedIds,
    Reference,
    ScoreItem,
    ScoreRequest,
    ScoreResult,
    SystemText,
    UserPrefix,
    UserSuffix,
    crc32_of,
)
from teacher_server.privileged import REFERENCE_TEMPLATES
from tests.harness import LoopThread, Server
from tests.reference import logprobs_TV, plain_model
from tests.tiny_model import CHATML, VOCAB_SIZE, byte_tokenizer

CONTEXT = 256
"""Of the tiny model, in tokens."""

ENGINE_ATOL = 1e-5
"""Between engines, in nats: float32 sums in another order. An off-by-one row differs by nats."""

PROMPT = np.array([72, 105, 33, 10], np.int32)
COMPLETION = np.array([65, 66, 67, 68, 69], np.int32)
ITEM = ScoreItem(PROMPT, COMPLETION)
CHAT = Chat((Message("user", "2+2?"),))


@pytest.fixture(params=["http", "grpc", "pool"])
def scheme(request: pytest.FixtureRequest) -> str:
    """Each transport in turn, and both as the replicas of a pool."""
    return request.param


def full_item() -> ScoreItem:
    candidates = np.array([[1, 2, -1], [3, -1, -1], [4, 5, 6], [-1, -1, -1], [303, 0, 7]], np.int32)
    return ScoreItem(PROMPT, COMPLETION, temperature=0.7, top_k=5, candidate_ids=candidates, entropy=True)


def assert_close(got: np.ndarray | None, expected: np.ndarray | None, atol: float = ENGINE_ATOL) -> None:
    """Equal within `atol` nats, NaN where NaN is expected, and None for None."""
    if got is None or expected is None:
        assert got is expected
        return
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def assert_equal(a: ScoreResult, b: ScoreResult, atol: float = ENGINE_ATOL) -> None:
    np.testing.assert_array_equal(a.top_ids, b.top_ids)
    assert_close(a.sampled_logprobs, b.sampled_logprobs, atol)
    assert_close(a.top_logprobs, b.top_logprobs, atol)
    assert_close(a.candidate_logprobs, b.candidate_logprobs, atol)
    assert_close(a.entropy, b.entropy, atol)


def raised(run: LoopThread, teacher: Teacher, request: ScoreRequest) -> TeacherError:
    with pytest.raises(TeacherError) as caught:
        run(teacher.score(request))
    return caught.value


def test_arrays_are_those_of_the_model(run: LoopThread, teacher: Teacher, tiny_model: Path) -> None:
    item = full_item()
    [result] = run(teacher.score([item]))
    rows_TV = logprobs_TV(plain_model(tiny_model), PROMPT, COMPLETION, 0.7)

    assert_close(result.sampled_logprobs, rows_TV[np.arange(5), COMPLETION])
    order_TK = np.argsort(-rows_TV, axis=1)[:, :5]
    np.testing.assert_array_equal(result.top_ids, order_TK)
    assert_close(result.top_logprobs, np.take_along_axis(rows_TV, order_TK, 1))
    assert item.candidate_ids is not None
    expected = np.take_along_axis(rows_TV, np.maximum(item.candidate_ids, 0), 1)
    expected[item.candidate_ids == -1] = np.nan
    assert_close(result.candidate_logprobs, expected)
    assert_close(result.entropy, -(np.exp(rows_TV) * rows_TV).sum(1))
    assert result.completion_crc32 == crc32_of(COMPLETION)
    assert result.num_context_tokens == 4
    assert result.weights_version == 0


def test_ids_that_are_sent_once_are_scored_at_every_position(
    run: LoopThread, teacher: Teacher, tiny_model: Path
) -> None:
    """The whole vocabulary in its order, and a padded id behind it."""
    every_id = np.append(np.arange(VOCAB_SIZE, dtype=np.int32), np.int32(-1))[None]
    [result] = run(teacher.score([ScoreItem(PROMPT, COMPLETION, temperature=0.7, candidate_ids=every_id)]))
    rows_TV = logprobs_TV(plain_model(tiny_model), PROMPT, COMPLETION, 0.7)
    assert_close(result.candidate_logprobs, np.append(rows_TV, np.full((5, 1), np.nan), 1))


def test_transports_give_equal_bits(run: LoopThread, transformers_server: Server) -> None:
    items = [full_item(), replace(full_item(), temperature=1.3, top_k=VOCAB_SIZE, entropy=False)]
    over = {}
    for scheme in ("http", "grpc"):
        teacher = transformers_server.connect(scheme)
        over[scheme] = run(teacher.score(items))
        run(teacher.aclose())
    for a, b in zip(over["http"], over["grpc"], strict=True):
        assert_equal(a, b, atol=0.0)


def test_half_precision_rounds_the_wide_log_probs_alone(run: LoopThread, teacher: Teacher) -> None:
    # At T = 1e-5 a log-prob is a hundred thousand times a difference of logits, so some leave float16's range.
    for temperature, some_lost in ((0.7, False), (1e-5, True)):
        item = replace(full_item(), temperature=temperature, top_k=VOCAB_SIZE)
        [whole], [half] = run(teacher.score([item])), run(teacher.score([replace(item, half_precision=True)]))
        assert_close(half.sampled_logprobs, whole.sampled_logprobs, abs(whole.sampled_logprobs).max() * 1e-6)
        assert_close(half.entropy, whole.entropy)
        for rounded, exact in (
            (half.top_logprobs, whole.top_logprobs),
            (half.candidate_logprobs, whole.candidate_logprobs),
        ):
            lost = np.isneginf(rounded)
            assert lost.any() == some_lost
            assert (exact[lost] < -65_500).all()
            # float16 has 11 significant bits: half a unit in the last place is |x| / 2048 at most.
            np.testing.assert_allclose(rounded[~lost], exact[~lost], rtol=1 / 2048 + 1e-6, atol=ENGINE_ATOL)


def test_many_items_come_back_in_order(run: LoopThread, teacher: Teacher) -> None:
    # Item i scores i + 1 tokens, so a reply in another's place has the wrong length and checksum.
    items = [ScoreItem(PROMPT, np.arange(1, i + 2, dtype=np.int32)) for i in range(20)]
    results = run(teacher.score(items))
    assert [result.num_tokens for result in results] == list(range(1, 21))
    assert [result.completion_crc32 for result in results] == [crc32_of(item.completion_ids) for item in items]


def test_info_is_the_handshake(run: LoopThread, teacher: Teacher) -> None:
    info = run(teacher.info())
    tokenizer = byte_tokenizer()
    assert info.teachers == ("base", "same")
    assert info.max_context_tokens == CONTEXT
    assert info.tokenizer == tokenizer_fingerprint(tokenizer, eos_token_ids=[258], vocab_size=VOCAB_SIZE)
    assert info.supports == ("sampled", "top_k", "candidates", "entropy")
    assert info.reference_templates == ("plain", "answer", "solution")
    assert tokenizer.chat_template == CHATML
    assert info.contract_version == contract.VERSION


@pytest.mark.parametrize("name", ["", "base", "same"])
def test_served_names_are_taken(run: LoopThread, teacher: Teacher, name: str) -> None:
    [result] = run(teacher.score([ScoreItem(PROMPT, COMPLETION, teacher=name)]))
    assert result.num_tokens == 5


def test_empty_completion(run: LoopThread, teacher: Teacher) -> None:
    empty = np.empty(0, np.int32)
    [result] = run(
        teacher.score([ScoreItem(PROMPT, empty, top_k=3, candidate_ids=np.empty((0, 2), np.int32), entropy=True)])
    )
    assert result.sampled_logprobs.shape == (0,)
    assert result.top_ids.shape == result.top_logprobs.shape == (0, 3)
    assert result.candidate_logprobs.shape == (0, 2)
    assert result.entropy is not None
    assert result.entropy.shape == (0,)


def test_one_token(run: LoopThread, teacher: Teacher, tiny_model: Path) -> None:
    one = np.array([65], np.int32)
    [result] = run(teacher.score([ScoreItem(PROMPT, one)]))
    expected = logprobs_TV(plain_model(tiny_model), PROMPT, one)[0, 65]
    assert_close(result.sampled_logprobs, np.array([expected]))


def test_context_exactly_full_and_one_over(run: LoopThread, teacher: Teacher) -> None:
    completion = np.full(CONTEXT - 4, 65, np.int32)
    [result] = run(teacher.score([replace(ITEM, completion_ids=completion)]))
    assert result.num_tokens == CONTEXT - 4
    assert np.isfinite(result.sampled_logprobs).all()

    secret = PrivilegedIds(np.array([1, 2], np.int32))
    item = replace(ITEM, completion_ids=completion[1:], privileged=secret)
    error = raised(run, teacher, ScoreRequest((item,)))
    # 4 of the prompt + 2 privileged + 251 of the completion = 257.
    assert (type(error), error.field) == (ContextTooLong, "items[0]")
    for number in ("257", "256", "4 of the prompt", "2 privileged", "251 of the completion"):
        assert number in error.message


REFUSED = {
    "prompt id": (replace(ITEM, prompt=np.array([1, 304], np.int32)), "prompt_ids", "id 304 at position 1"),
    "completion id": (replace(ITEM, completion_ids=np.array([-1], np.int32)), "completion_ids", "id -1"),
    "candidate id": (
        replace(ITEM, candidate_ids=np.full((5, 2), -2, np.int32)),
        "candidate_ids",
        "id -2 at position 0, 0",
    ),
    "privileged id": (replace(ITEM, privileged=PrivilegedIds(np.array([400], np.int32))), "privileged.ids", "id 400"),
    "candidates' shape": (replace(ITEM, candidate_ids=np.zeros((4, 2), np.int32)), "candidate_ids", "[4, 2]"),
    "temperature 0": (replace(ITEM, temperature=0.0), "temperature", "temperature is 0.0"),
    "temperature below 0": (replace(ITEM, temperature=-0.1), "temperature", "temperature is -0.1;"),
    "temperature nan": (replace(ITEM, temperature=float("nan")), "temperature", "temperature is nan"),
    "temperature inf": (replace(ITEM, temperature=float("inf")), "temperature", "temperature is inf"),
    "K above": (replace(ITEM, top_k=305), "top_k", "from 0 to 304"),
    "K below": (replace(ITEM, top_k=-1), "top_k", "top_k is -1"),
    "M above": (replace(ITEM, candidate_ids=np.zeros((5, 1025), np.int32)), "candidate_ids", "at most 1024"),
    "teacher": (replace(ITEM, teacher="rlvr"), "teacher", "served: base, same"),
    "no prompt": (replace(ITEM, prompt=np.empty(0, np.int32)), "prompt", "empty"),
    "text into ids": (replace(ITEM, privileged=SystemText("x")), "privileged", "send the prompt as chat"),
    "empty chat": (replace(ITEM, prompt=Chat(())), "chat.messages", "at least one"),
    "role": (replace(ITEM, prompt=Chat((Message("boss", "x"),))), "chat.messages[0].role", "'boss'"),
    "reference template": (
        replace(ITEM, prompt=CHAT, privileged=Reference("4", "poem")),
        "privileged.reference.template",
        "answer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_item_refuses_the_whole_request(run: LoopThread, teacher: Teacher, case: str) -> None:
    bad, field, words = REFUSED[case]
    error = raised(run, teacher, ScoreRequest((ITEM, ITEM, ITEM, bad)))
    assert type(error) is (UnknownTeacher if field == "teacher" else InvalidRequest)
    assert error.field == f"items[3].{field}"
    assert words in error.message


@pytest.mark.parametrize("case", REFUSED)
def test_transports_refuse_in_equal_words(run: LoopThread, transformers_server: Server, case: str) -> None:
    errors = []
    for scheme in ("http", "grpc"):
        teacher = transformers_server.connect(scheme)
        errors.append(raised(run, teacher, ScoreRequest((REFUSED[case][0],))))
        run(teacher.aclose())
    over_http, over_grpc = errors
    assert (over_http.name, over_http.message, over_http.field) == (over_grpc.name, over_grpc.message, over_grpc.field)


def test_requests_are_refused_whole(run: LoopThread, teacher: Teacher) -> None:
    error = raised(run, teacher, ScoreRequest(()))
    assert (type(error), error.field) == (InvalidRequest, "items")
    error = raised(run, teacher, ScoreRequest((ITEM,) * 65))
    assert (type(error), error.field) == (InvalidRequest, "items")
    assert "65 items" in error.message
    assert "at most 64" in error.message
    error = raised(run, teacher, ScoreRequest((ITEM,), min_weights_version=3))
    assert (type(error), error.field) == (Conflict, "min_weights_version")
    assert "version 0" in error.message
    assert "version 3" in error.message


ANSWER = REFERENCE_TEMPLATES["answer"]
SOLUTION = REFERENCE_TEMPLATES["solution"]
COMPOSED = {
    "nothing": (None, "<|im_start|>user\n2+2?<|im_end|>\n"),
    "system": (
        SystemText("It is {4}."),
        "<|im_start|>system\nIt is {4}.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n",
    ),
    "prefix": (UserPrefix("Even."), "<|im_start|>user\nEven.\n\n2+2?<|im_end|>\n"),
    "suffix": (UserSuffix("Even."), "<|im_start|>user\n2+2?\n\nEven.<|im_end|>\n"),
    "answer": (Reference("4"), f"<|im_start|>user\n2+2?\n\n{ANSWER.before}4{ANSWER.after}<|im_end|>\n"),
    "solution": (
        Reference("{text}", "solution"),
        f"<|im_start|>user\n2+2?\n\n{SOLUTION.before}{{text}}{SOLUTION.after}<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("kind", COMPOSED)
def test_privileged_text_is_scored_as_its_composed_ids(run: LoopThread, teacher: Teacher, kind: str) -> None:
    privileged, text = COMPOSED[kind]
    ids = byte_tokenizer()(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    composed = ScoreItem(np.array(ids, np.int32), COMPLETION, top_k=3)
    [told, plain] = run(teacher.score([replace(composed, prompt=CHAT, privileged=privileged), composed]))
    assert_equal(told, plain)
    assert told.num_context_tokens == len(ids)


def test_privileged_ids_stand_before_the_prompt(run: LoopThread, teacher: Teacher) -> None:
    secret = np.array([200, 201], np.int32)
    told, composed, plain = run(
        teacher.score(
            [
                replace(ITEM, privileged=PrivilegedIds(secret)),
                replace(ITEM, prompt=np.concatenate([secret, PROMPT])),
                ITEM,
            ]
        )
    )
    assert_equal(told, composed)
    assert np.abs(told.sampled_logprobs - plain.sampled_logprobs).max() > 0.01


def test_generation_continues_the_prefix(run: LoopThread, teacher: Teacher, tiny_model: Path) -> None:
    prefix = np.array([70, 71], np.int32)
    item = GenerateItem(PROMPT, prefix, max_new_tokens=6, temperature=0.0, ignore_eos=True)
    [result] = run(teacher.generate([item]))
    [sample] = result.samples
    assert sample.finish_reason == "length"
    rows_TV = logprobs_TV(plain_model(tiny_model), [*PROMPT, *prefix], sample.token_ids)
    # Greedy: each written id is the row's most likely one, with its log-prob under log_softmax(logits).
    np.testing.assert_array_equal(sample.token_ids, rows_TV.argmax(1))
    assert_close(sample.logprobs, rows_TV.max(1))
    assert result.num_context_tokens == 6
    assert sample.text == byte_tokenizer().decode(sample.token_ids, skip_special_tokens=True)


def test_samples_score_as_they_were_drawn(run: LoopThread, teacher: Teacher) -> None:
    item = GenerateItem(CHAT, max_new_tokens=8, temperature=0.8, num_samples=3, seed=7, privileged=SystemText("Even."))
    [result] = run(teacher.generate([item]))
    [again] = run(teacher.generate([item]))
    assert len(result.samples) == 3
    items = [
        ScoreItem(CHAT, sample.token_ids, temperature=0.8, privileged=SystemText("Even.")) for sample in result.samples
    ]
    for sample, repeated, score in zip(result.samples, again.samples, run(teacher.score(items)), strict=True):
        np.testing.assert_array_equal(sample.token_ids, repeated.token_ids)
        assert_close(sample.logprobs, score.sampled_logprobs)


GENERATE = GenerateItem(PROMPT, max_new_tokens=4)

GENERATE_REFUSED = {
    "max_new_tokens": (replace(GENERATE, max_new_tokens=0), "max_new_tokens"),
    "temperature": (replace(GENERATE, temperature=-1.0), "temperature"),
    "top_p 0": (replace(GENERATE, top_p=0.0), "top_p"),
    "top_p 1.1": (replace(GENERATE, top_p=1.1), "top_p"),
    "top_k": (replace(GENERATE, top_k=-1), "top_k"),
    "num_samples": (replace(GENERATE, num_samples=0), "num_samples"),
    "stop id": (replace(GENERATE, stop_token_ids=(304,)), "stop_token_ids"),
    "prefix": (replace(GENERATE, prefix_ids=np.array([304], np.int32)), "prefix_ids"),
    "seed": (replace(GENERATE, seed=-1), "seed"),
}


@pytest.mark.parametrize("case", GENERATE_REFUSED)
def test_bad_generation_is_refused(run: LoopThread, teacher: Teacher, case: str) -> None:
    item, field = GENERATE_REFUSED[case]
    with pytest.raises(InvalidRequest) as caught:
        run(teacher.generate([GENERATE, item]))
    assert caught.value.field == f"items[1].{field}"


def test_generation_must_fit(run: LoopThread, teacher: Teacher) -> None:
    # 4 of the prompt and 253 to write are one more than 256.
    with pytest.raises(ContextTooLong, match="253 to write"):
        run(teacher.generate([replace(GENERATE, max_new_tokens=CONTEXT - 3)]))


def test_older_weights_are_refused_for_generation_too(run: LoopThread, teacher: Teacher) -> None:
    with pytest.raises(Conflict):
        run(teacher.generate(GenerateRequest((GENERATE,), min_weights_version=1)))


@pytest.mark.slow
def test_engines_agree(run: LoopThread, transformers_server: Server, vllm_server: Server) -> None:
    items = [full_item(), replace(full_item(), temperature=1.3), ITEM]
    results = []
    for server in (transformers_server, vllm_server):
        teacher = server.connect("grpc")
        results.append(run(teacher.score(items)))
        run(teacher.aclose())
    for a, b in zip(*results, strict=True):
        assert_equal(a, b)
