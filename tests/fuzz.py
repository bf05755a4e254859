"""Hypothesis strategies for what a stranger may send: valid messages, messages with hostile fields, damaged bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from protos.teacher.v1 import teacher_pb2 as pb
from tests.tiny_model import VOCAB_SIZE

NUM_CASES = {
    "score messages": 1500,
    "generate messages": 1000,
    "damaged bytes": 2000,
    "sockets": 1400,
    "schema": 150,
    "replies": 4000,
    "error bodies": 200,
}
"""How many cases each fuzz test must run at least; every one asserts its own number."""

PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
"""Without `explain`, which runs a failing case many times under a tracer."""

HEALTH_CHECKS = cast("list[HealthCheck]", list(HealthCheck))
"""All are for tests that are meant to be quick and small."""

INTS = (-(2**31), -1, 0, 1, 3, VOCAB_SIZE, 1025, 2**31 - 1)
LONGS = (-(2**63), *INTS, 2**32, 2**63 - 1)
FLOATS = (float("nan"), float("inf"), float("-inf"), -1.0, -0.0, 0.0, 5e-324, 1e-300, 1e-40, 1e-30, 0.5, 1e38, 1e308)
TEXTS = ("", "base", "same", "user", "system", "answer", "\0", "\u202eا", "🦜" * 3, "{{ 7*7 }}", "%s%n", "x" * 3000)
SHORT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def id_bytes(lowest: int = 0, highest: int = VOCAB_SIZE - 1, max_size: int = 6) -> st.SearchStrategy[bytes]:
    """Packed ids."""
    return st.lists(st.integers(lowest, highest), max_size=max_size).map(lambda ids: np.array(ids, "<i4").tobytes())


PROMPT = st.one_of(
    st.builds(pb.TokenIds, ids=st.binary(min_size=1, max_size=6).map(lambda ids: np.array(list(ids), "<i4").tobytes())),
    st.builds(pb.Chat, messages=st.lists(st.builds(pb.Message, role=st.just("user"), content=SHORT), min_size=1)),
)
PRIVILEGED = st.none() | st.one_of(
    st.builds(pb.Privileged, system=SHORT),
    st.builds(pb.Privileged, user_prefix=SHORT),
    st.builds(pb.Privileged, reference=st.builds(pb.Reference, text=SHORT, template=st.just("answer"))),
    st.builds(pb.Privileged, ids=st.builds(pb.TokenIds, ids=id_bytes())),
)


def _with_prompt(item: Any, prompt: pb.TokenIds | pb.Chat) -> Any:
    field = item.chat if isinstance(prompt, pb.Chat) else item.prompt_ids
    field.CopyFrom(prompt)
    return item


@st.composite
def score_items(draw: st.DrawFn) -> pb.ScoreItem:
    """An item that is right, apart from privileged text beside a prompt of ids."""
    num_tokens, num_candidates = draw(st.integers(0, 5)), draw(st.integers(0, 2))
    ids = np.random.default_rng(draw(st.integers(0, 99))).integers(0, VOCAB_SIZE, (num_tokens, 1 + num_candidates))
    # One row of candidates stands for every position.
    candidates = ids[:1, 1:] if draw(st.booleans()) else ids[:, 1:]
    item = pb.ScoreItem(
        privileged=draw(PRIVILEGED),
        completion_ids=ids[:, 0].astype("<i4").tobytes(),
        candidate_ids=candidates.astype("<i4").tobytes(),
        num_candidates=num_candidates,
        temperature=draw(st.floats(0.01, 10)),
        top_k=draw(st.integers(0, 8)),
        entropy=draw(st.booleans()),
    )
    return _with_prompt(item, draw(PROMPT))


@st.composite
def generate_items(draw: st.DrawFn) -> pb.GenerateItem:
    """An item that is right, apart from privileged text beside a prompt of ids; little to write."""
    item = pb.GenerateItem(
        privileged=draw(PRIVILEGED),
        prefix_ids=draw(id_bytes()),
        max_new_tokens=draw(st.integers(1, 3)),
        temperature=draw(st.just(0.0) | st.floats(0.01, 2)),
        top_p=draw(st.just(1.0) | st.floats(0.01, 1)),
        top_k=draw(st.integers(0, 8)),
        num_samples=draw(st.integers(1, 2)),
        seed=draw(st.none() | st.integers(0, 2**63 - 1)),
        ignore_eos=draw(st.booleans()),
    )
    return _with_prompt(item, draw(PROMPT))


def slots(message: Message) -> Iterator[tuple[Message, Any]]:
    """Every field that could be set, of the message and of all messages it holds."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
        if field.message_type is not None:
            value = getattr(message, field.name)
            children = list(value) if field.is_repeated else [value] if message.HasField(field.name) else []
            for child in children:
                yield from slots(child)


HOSTILE: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_INT32: st.sampled_from(INTS),
    FieldDescriptor.TYPE_INT64: st.sampled_from(LONGS),
    FieldDescriptor.TYPE_FIXED32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_DOUBLE: st.sampled_from(FLOATS) | st.floats(),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: st.sampled_from(TEXTS) | SHORT,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=9) | id_bytes(-2, VOCAB_SIZE, 3) | id_bytes(2**31 - 2, 2**31 - 1, 2),
}
"""By a field's type: values that the type allows and the field's meaning may not."""


@st.composite
def spoilt(draw: st.DrawFn, messages: st.SearchStrategy[Any], max_fields: int = 3) -> bytes:
    """A serialised message with up to `max_fields` of its fields, at any depth, emptied, repeated or made hostile."""
    message = type(drawn := draw(messages))()
    message.CopyFrom(drawn)
    for _ in range(draw(st.integers(0, max_fields))):
        fields = list(slots(message))
        owner, field = fields[draw(st.integers(0, len(fields) - 1))]
        if field.is_repeated:
            values = list(getattr(owner, field.name))
            owner.ClearField(field.name)
            if field.message_type is not None:
                getattr(owner, field.name).extend(values * draw(st.sampled_from([0, 2, 70])))
            else:
                getattr(owner, field.name).extend(draw(st.lists(HOSTILE[field.type], max_size=4)))
        elif field.message_type is None:
            setattr(owner, field.name, draw(HOSTILE[field.type]))
        elif owner.HasField(field.name):
            owner.ClearField(field.name)
        else:
            getattr(owner, field.name).SetInParent()
    return message.SerializeToString()


@st.composite
def damaged(draw: st.DrawFn, messages: st.SearchStrategy[bytes]) -> bytes:
    """Bytes that were a message before one or two slices of them were replaced by others, cut out or repeated."""
    data = draw(messages)
    for _ in range(draw(st.integers(1, 2))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 8)))
        data = data[:start] + draw(st.binary(max_size=8) | st.just(data[start:stop] * 2)) + data[stop:]
    return data


SCORE_REQUESTS = st.builds(pb.ScoreRequest, items=st.lists(score_items(), min_size=1, max_size=2))
GENERATE_REQUESTS = st.builds(pb.GenerateRequest, items=st.lists(generate_items(), min_size=1, max_size=2))


def check_cases(num_cases: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Runs `check` on at least `num_cases` draws; Hypothesis shrinks what fails."""
    num_run = 0

    @settings(max_examples=num_cases, deadline=None, phases=PHASES, suppress_health_check=HEALTH_CHECKS)
    @given(strategy)
    def case(drawn: Any) -> None:
        nonlocal num_run
        num_run += 1
        check(drawn)

    case()
    assert num_run >= num_cases
