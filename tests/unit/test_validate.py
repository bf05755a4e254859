"""The limits that the tiny model's servers never meet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from protos.errors import InvalidRequest
from protos.records import ScoreItem
from protos.wire import MAX_MESSAGE_BYTES
from teacher_server.validate import check_score_item
from tests import records

INFO = replace(
    records.INFO,
    max_context_tokens=2**20,
    max_top_k=1024,
    max_candidates=1024,
    tokenizer=replace(records.INFO.tokenizer, vocab_size=100_000),
    score_path="official-fields",
)
IDS = np.array([1], np.int32)


def test_an_engine_that_is_exact_at_1_only_takes_only_1() -> None:
    info = replace(INFO, exact_temperature=False)
    check_score_item(ScoreItem(IDS, IDS, temperature=1.0), info)
    with pytest.raises(InvalidRequest, match=r"temperature is 0.5; .*official-fields.* exact at 1.0 only"):
        check_score_item(ScoreItem(IDS, IDS, temperature=0.5), info)


def test_a_reply_that_no_transport_can_carry_is_refused_before_any_work() -> None:
    # 8 bytes a token, and 8 for each of 1024 ids: 8200 bytes a token against 2**28.
    most = MAX_MESSAGE_BYTES // 8200
    check_score_item(ScoreItem(IDS, np.zeros(most, np.int32), top_k=1024), INFO)
    with pytest.raises(InvalidRequest, match=f"{(most + 1) * 8200} bytes; the limit is {MAX_MESSAGE_BYTES}"):
        check_score_item(ScoreItem(IDS, np.zeros(most + 1, np.int32), top_k=1024), INFO)


def test_entropy_is_refused_where_the_engine_has_none() -> None:
    with pytest.raises(InvalidRequest, match="entropy is asked for, and this engine"):
        check_score_item(ScoreItem(IDS, IDS, entropy=True), INFO)
    check_score_item(ScoreItem(IDS, IDS, entropy=True), replace(INFO, supports=("entropy",)))
