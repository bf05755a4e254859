"""How much memory a long completion takes at a large vocabulary: a chunk of rows, whatever the request's length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest

from teacher_server.engines.base import ScoreTask
from tests.harness import LoopThread
from tests.tiny_model import build_tiny_qwen3

pytest.importorskip("vllm")

VOCAB, NUM_ROWS = 151_936, 8192
FLOAT_BYTES = 4
CHUNK_BYTES = 256 * VOCAB * FLOAT_BYTES
"""156 MB: one float32 copy of a chunk's logits; 4.98 GB would be one copy of the request's."""


def peak_bytes(process: psutil.Process) -> int:
    """Linux's high-water mark of resident memory."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak(process: psutil.Process) -> None:
    """See proc(5), clear_refs: 5 sets the mark to what is resident now."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


@pytest.mark.slow
def test_peak_memory_is_bounded_by_a_chunk_of_rows(run: LoopThread, tmp_path: Path) -> None:
    from teacher_server.engines.vllm import VllmEngine

    model = build_tiny_qwen3(tmp_path, num_layers=1, max_context_tokens=NUM_ROWS + 1, vocab_size=VOCAB)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    engine = run(VllmEngine.create(str(model), dtype="float32", kv_cache_gib=0.25))
    try:
        (worker,) = (
            process
            for process in psutil.Process().children(recursive=True)
            if process.pid not in before and "EngineCore" in process.name()
        )
        rng = np.random.default_rng(0)
        growth = []
        for num_rows in (256, 256, NUM_ROWS):  # the first warms the allocator up
            task = ScoreTask(
                context_ids=rng.integers(0, VOCAB, 1).astype(np.int32),
                completion_ids=rng.integers(0, VOCAB, num_rows).astype(np.int32),
                temperature=0.7,
                top_k=20,
                candidate_ids=np.empty((num_rows, 0), np.int32),
                entropy=False,
            )
            reset_peak(worker)
            resident = worker.memory_info().rss
            rows = run(engine.score(task), 240)
            growth.append(peak_bytes(worker) - resident)
    finally:
        run(engine.close())
    assert rows.top_logprobs.shape == (NUM_ROWS, 20)
    assert np.isfinite(rows.sampled_logprobs).all()
    # A chunk was really there; of 32 chunks no more than one more copy stays behind.
    assert growth[1] > CHUNK_BYTES
    assert growth[2] < growth[1] + CHUNK_BYTES
