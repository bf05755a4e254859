"""Two real processes (gloo) agree: whichever fails, wherever, both know it, and what they do next is in step."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from student_trainer.collate import collate
from student_trainer.distributed import agreed, by_main, gather, joined, rank
from student_trainer.in_step import by_shares, micro_batches, num_tokens_of_all
from tests.warm import start

pytestmark = pytest.mark.slow

FAILS = "fails"


def of_two(folder: Path, work: Callable[[], object]) -> list:
    """What `work` returns on rank 0 and on rank 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(_as_rank, number, port, folder, work) for number in (0, 1)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [json.loads((folder / str(number)).read_text()) for number in (0, 1)]


def _as_rank(number: int, port: int, folder: Path, work: Callable[[], object]) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined():
        (folder / str(number)).write_text(json.dumps(work()))


def fail_on(failing: int) -> None:
    if rank() == failing:
        raise ValueError(FAILS)


def said(work: Callable[[], object]) -> str:
    """What came of it, once both have gone on: their next meeting is the same one."""
    try:
        outcome = str(work())
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    assert gather(rank()) == [0, 1]
    return outcome


def agreements() -> list[str]:
    def first(failing: int) -> object:
        """That rank fails before it comes to the inner agreement, where the other one waits."""

        def work() -> object:
            fail_on(failing)
            return agreed(lambda: "never")

        return agreed(work)

    def inside(failing: int) -> object:
        return agreed(lambda: (agreed(lambda: fail_on(failing)), agreed(lambda: "never")))

    def of_main() -> object:
        return agreed(lambda: (by_main(lambda: fail_on(0)), by_main(lambda: "never")))

    outcomes = [
        said(lambda failing=failing, where=where: where(failing)) for where in (first, inside) for failing in (0, 1)
    ]
    return [*outcomes, said(of_main), said(lambda: agreed(lambda: by_main(lambda: "done")))]


def test_an_error_on_one_rank_is_the_others_whatever_they_were_agreeing_on(tmp_path):
    lost = "PeerLost: rank {}: rank {} could not go on; its own message says why"
    own = f"ValueError: {FAILS}"
    of_main, of_other = of_two(tmp_path, agreements)
    assert of_main == [own, lost.format(0, 1), own, lost.format(0, 1), own, "done"]
    assert of_other == [lost.format(1, 0), own, lost.format(1, 0), own, lost.format(1, 0), "done"]


def shares() -> list:
    """Of three sequences of 1, 2 and 3 tokens in two minibatches, and of the last one alone."""
    ids = [np.full(length, length, np.int32) for length in (1, 2, 3)]
    batch = collate([np.array([9], np.int32)] * 3, ids)
    whole = by_shares(lambda part: torch.where(part.mask_BT, part.completion_ids_BT.float(), math.nan), batch)
    single = by_shares(lambda part: part.completion_ids_BT.float(), batch.rows([2]))
    updates = batch.shares(2)
    return [
        whole.nan_to_num(0).tolist(),
        single.tolist(),
        [update.num_tokens for update in updates],
        [num_tokens_of_all(update) for update in updates],
        [len(list(micro_batches(update, 1, torch.device("cpu")))) for update in updates],
    ]


def test_each_rank_does_its_share_and_none_is_left_out(tmp_path):
    """Two sequences of the first minibatch are one each; the second has one, which is rank 1's."""
    for of_rank, tokens in zip(of_two(tmp_path, shares), ([1, 0], [2, 3]), strict=True):
        rows = [[1.0, 0.0, 0.0], [2.0, 2.0, 0.0], [3.0, 3.0, 3.0]]
        assert of_rank == [rows, rows[2:], tokens, [3, 3], [1, 1]]
