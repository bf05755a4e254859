"""The pure parts of a pool: breaker, budget, backoff, split, agreement, and the URLs it is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.client import connect
from protos.errors import InvalidRequest, NotReady
from protos.pool import PoolOptions, TeacherPool, agreement, resolve
from protos.pool.breaker import Breaker
from protos.pool.dispatch import split
from protos.pool.retry import RetryBudget, full_jitter
from protos.records import TeacherInfo, TokenizerFingerprint
from tests import records
from tests.harness import LoopThread

INFO = replace(
    records.INFO,
    revision="r",
    weights_version=3,
    tokenizer=TokenizerFingerprint(10, "v", "s", (1,), "c"),
    max_context_tokens=100,
    max_top_k=20,
    max_candidates=30,
    max_items=40,
    supports=("sampled", "top_k", "entropy"),
    prefix_cache=True,
    dtype="float32",
    engine="vllm",
    reference_templates=("plain", "answer"),
)


def test_the_breaker_opens_on_consecutive_failures_only() -> None:
    breaker = Breaker(3, 5.0)
    for failure in (True, True, False, True, True):
        breaker.failed(0.0) if failure else breaker.succeeded()
    assert (breaker.state, breaker.allows) == ("closed", True)
    breaker.failed(0.0)  # the third in a row
    assert (breaker.state, breaker.allows) == ("open", False)


def test_an_open_breaker_lets_one_trial_through_once_cool_and_probed() -> None:
    breaker = Breaker(1, 5.0)
    breaker.failed(10.0)
    breaker.probed(14.9)
    assert breaker.state == "open"
    breaker.probed(15.0)
    assert (breaker.state, breaker.allows) == ("half_open", True)
    breaker.begin()
    assert not breaker.allows
    breaker.failed(16.0)
    breaker.end()
    assert breaker.state == "open"
    breaker.probed(21.0)
    breaker.begin()
    breaker.succeeded()
    breaker.end()
    assert (breaker.state, breaker.allows) == ("closed", True)


def test_the_budget_is_a_share_of_what_is_sent() -> None:
    budget = RetryBudget(0.2, 0.0, now=0.0)
    granted = 0
    for _ in range(1000):
        budget.deposit()
        granted += budget.withdraw(0.0)
    assert granted == pytest.approx(0.2 * 1000, abs=1)


def test_the_budget_has_a_floor_and_a_burst() -> None:
    budget = RetryBudget(0.0, 2.0, now=0.0)
    assert sum(budget.withdraw(0.0) for _ in range(100)) == 20  # 10 s of 2 a second
    assert sum(budget.withdraw(3.0) for _ in range(100)) == 6  # 3 s later
    assert sum(budget.withdraw(1000.0) for _ in range(100)) == 20  # no more than the burst is saved up


def test_full_jitter_fills_a_range_that_doubles_up_to_its_cap() -> None:
    random = Random(0)
    # After failure n the range is min(1, 0.1 * 2 ** (n - 1)): 0.1, 0.2, 0.4, 0.8, 1, 1.
    for num_failures, bound in enumerate((0.1, 0.2, 0.4, 0.8, 1.0, 1.0), start=1):
        waits = [full_jitter(num_failures, 0.1, 1.0, random) for _ in range(2000)]
        assert 0 <= min(waits) < 0.05 * bound
        assert 0.95 * bound < max(waits) <= bound
        # Uniform: mean bound / 2, standard error bound / sqrt(12 * 2000) = 0.0065 bound; five of those.
        assert sum(waits) / 2000 == pytest.approx(bound / 2, abs=0.033 * bound)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(0, 5), st.integers(1, 100))
def test_a_split_keeps_every_item_once_and_in_runs(sizes: list[int], num_parts: int, min_tokens: int) -> None:
    parts = split(sizes, num_parts, min_tokens)
    assert [index for part in parts for index in part] == list(range(len(sizes)))
    assert all(parts)
    assert len(parts) <= max(1, num_parts)
    # Each run is at most its share and the one item that straddles its end.
    assert max(sum(sizes[i] for i in part) for part in parts) <= sum(sizes) / max(
        1, min(num_parts, sum(sizes) // min_tokens)
    ) + max(sizes)


def test_a_small_request_is_not_split() -> None:
    assert split([100] * 8, 4, 2048) == [list(range(8))]
    assert split([1024] * 8, 4, 2048) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert split([1024] * 8, 100, 2048) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_agreeing_replicas_may_differ_in_engine_and_limits() -> None:
    other = replace(INFO, engine="transformers", max_top_k=10, max_items=50, weights_version=2, exact_temperature=False)
    other = replace(other, teachers=("base", "rl"))
    assert agreement.differences("a", INFO, "b", other) == ""
    pool = agreement.merged([INFO, replace(other, supports=("sampled", "candidates"), reference_templates=("plain",))])
    assert (pool.max_top_k, pool.max_items, pool.weights_version) == (10, 40, 2)
    assert pool.teachers == ("base",)
    assert (pool.supports, pool.reference_templates) == (("sampled",), ("plain",))
    assert not pool.exact_temperature
    assert pool.engine == "vllm; transformers"
    assert (pool.model, pool.tokenizer) == (INFO.model, INFO.tokenizer)
    taking = replace(INFO, weights_transfer="gloo")
    assert agreement.merged([taking]).weights_transfer == "gloo"
    assert agreement.merged([taking, taking]).weights_transfer == ""  # a transfer is to one server


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(INFO, model="n"), "model is 'm' and 'n'"),
        (replace(INFO, revision="q"), "revision is 'r' and 'q'"),
        (replace(INFO, dtype="bfloat16"), "dtype is 'float32' and 'bfloat16'"),
        (replace(INFO, teachers=("rl", "base")), "the default teacher is ('base',) and ('rl',)"),
        (
            replace(INFO, tokenizer=replace(INFO.tokenizer, eos_token_ids=(2,))),
            "tokenizer.eos_token_ids is (1,) and (2,)",
        ),
    ],
)
def test_a_difference_names_both_urls_and_both_values(other: TeacherInfo, words: str) -> None:
    sentence = agreement.differences("grpc://a:1", INFO, "grpc://b:2", other)
    assert sentence == f"grpc://a:1 and grpc://b:2 are not replicas of one teacher: {words}"


@pytest.mark.parametrize("url", ["grpc://a:1,http://b:2", "grpc://a:1, grpc://b:2", "dns+grpc://teachers:8001"])
def test_a_pool_is_connected_by_its_url(url: str) -> None:
    teacher = connect(url)
    assert isinstance(teacher, TeacherPool)
    assert teacher.url == url


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("grpc://a:1,", "'' is not a teacher's URL"),
        ("grpc://a:1,ftp://b:2", "'ftp://b:2' is not a teacher's URL"),
        ("grpc://a:1,grpc://a:1", "'grpc://a:1' is twice"),
        ("dns+grpc://teachers", "it must be dns+grpc://host:port"),
        ("dns+ftp://teachers:1", "it must be dns+grpc://host:port"),
        ("dns+grpc://teachers:99999", "it must be dns+grpc://host:port"),
        ("dns+https://teachers:443", "list the replicas' own names"),
    ],
)
def test_a_malformed_pool_is_refused(url: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        connect(url)
    assert words in caught.value.message


def test_names_become_one_url_for_each_address(run: LoopThread) -> None:
    async def look_up(host: str, port: int) -> Sequence[str]:
        assert (host, port) == ("teachers", 8001)
        return ["10.0.0.1", "fd00::1"]

    urls = run(resolve.replica_urls("dns+grpc://teachers:8001", look_up))
    assert urls == ["grpc://10.0.0.1:8001", "grpc://[fd00::1]:8001"]
    for url in urls:
        connect(url)


def test_the_machine_s_own_resolver(run: LoopThread) -> None:
    assert "127.0.0.1" in run(resolve.look_up("localhost", 8001))
    with pytest.raises(NotReady, match=r"dns\+grpc://no.such.host.invalid:1 cannot be looked up"):
        run(resolve.replica_urls("dns+grpc://no.such.host.invalid:1", resolve.look_up))


@pytest.mark.parametrize(
    "options", [{"max_attempts": 0}, {"hedge_after_s": 0.0}, {"retry_ratio": -0.1}, {"probe_timeout_s": float("nan")}]
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
        PoolOptions(**options)  # pyright: ignore[reportArgumentType]


def test_the_budget_never_saves_up_less_than_one_retry() -> None:
    budget = RetryBudget(0.5, 0.0, now=0.0)
    for _ in range(3):
        budget.deposit()
        budget.deposit()
        assert budget.withdraw(0.0)
        assert not budget.withdraw(0.0)
