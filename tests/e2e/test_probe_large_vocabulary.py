"""`student-trainer probe pi` where the vocabulary is too large to be asked for whole: two passes, over the ids that any
of the teachers finds likely and everything else as one more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from student_trainer.cli import app
from student_trainer.probes.consensus import disagreement, geometric_mean, kl
from student_trainer.probes.pi import WIDEST_LIST
from tests.harness import LoopThread, served
from tests.reference import logprobs_TV, plain_model
from tests.tiny_model import build_tiny_qwen3

VOCAB_SIZE = 1100
"""Above the 1024 ids that a teacher scores at a position."""

PROMPTS = [f"question {n}" for n in range(5)]
ANSWERS = ["north", "east", "south", "west", "up"]
NUM_PIS = 3
TOLERANCE = 1e-4
"""Of float32 log-probs whose probabilities are summed over a thousand ids and then compared, in nats."""


def test_pi_is_measured_over_the_likeliest_ids_of_all_teachers_and_the_rest_as_one(
    tmp_path: Path, run: LoopThread
) -> None:
    """Against the model itself: the same union of lists, cut from its whole distributions."""
    model = build_tiny_qwen3(tmp_path, vocab_size=VOCAB_SIZE)
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "another", "answer": "x"}) + "\n")
    task = tmp_path / "task.toml"
    task.write_text(
        f'[task]\nkind = "jsonl"\npath = "{tmp_path}/train.jsonl"\nheld_out_path = "{tmp_path}/held_out.jsonl"\n'
        f'reward = "exact"\n[rollout]\nmax_new_tokens = 6\n[eval]\nnum_problems = {len(PROMPTS)}\n'
        '[stage]\nkind = "opd"\nprivileged = { kind = "answer", template = "plain" }\n'
    )
    out = tmp_path / "out"
    with served(run, model) as url:
        asked = ["probe", "pi", str(task), "--out", str(out), "--student", str(model), "--teacher", url]
        command, bound, _ = app.parse_args([*asked, "--pis", str(NUM_PIS)], exit_on_error=False, print_error=False)
        command(*bound.args, **bound.kwargs)
    result = json.loads((out / "result.json").read_text())
    raw = {row["key"]: row for row in map(json.loads, (out / "raw.jsonl").read_text().splitlines())}
    assert not result["is_whole_vocabulary"]

    whole_model, tokenizer = plain_model(model), AutoTokenizer.from_pretrained(model)

    def whole_TV(prompt: str, pi: str | None, ids: list[int]) -> np.ndarray:
        messages = [{"role": "user", "content": prompt if pi is None else f"{prompt}\n\n{pi}"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        context = tokenizer(text, add_special_tokens=False)["input_ids"]
        return logprobs_TV(whole_model, context, ids)

    num_tokens = 0
    for place, prompt in enumerate(PROMPTS):
        student, found = raw[f"student/held_out-{place}"], raw[f"scores/held_out-{place}"]
        ids = student["token_ids"]
        pis = [None, *(ANSWERS[(place + i) % len(ANSWERS)] for i in range(NUM_PIS))]
        whole_MTV = np.stack([whole_TV(prompt, pi, ids) for pi in pis])
        expected = [measures(coarse_MS(whole_MTV[:, t])) for t in range(len(ids))]
        exact = [measures(whole_MTV[:, t]) for t in range(len(ids))]
        for name in ("information", "lost", "floor", "disagreement"):
            np.testing.assert_allclose(found[name], [one[name] for one in expected], atol=TOLERANCE)
        for name in ("information", "floor", "disagreement"):  # what is told apart by fewer outcomes is no larger
            assert all(np.array(found[name]) <= np.array([one[name] for one in exact]) + TOLERANCE)
        # Four distributions of each token, each asked for twice.
        assert found["num_tokens"] == 2 * len(pis) * len(ids)
        num_tokens += len(ids)
    # What is compared is far above what may differ: told another problem's answer, these figures would show it.
    assert min(result[name]["mean"] for name in ("information", "lost", "floor", "disagreement")) > 10 * TOLERANCE
    assert 0 < num_tokens <= 6 * len(PROMPTS)


def coarse_MS(whole_MV: np.ndarray) -> np.ndarray:
    """log-probs of the ids in the list of any of M teachers, and of all others together."""
    is_listed_V = np.zeros(whole_MV.shape[1], bool)
    is_listed_V[np.argsort(-whole_MV, -1)[:, :WIDEST_LIST]] = True
    rest_M = np.log(np.exp(whole_MV[:, ~is_listed_V]).sum(-1))
    return np.concatenate([whole_MV[:, is_listed_V], rest_M[:, None]], -1)


def measures(logp_MS: np.ndarray) -> dict[str, float]:
    """Of one position: untold first, then told its own answer, then told those of two other problems."""
    free_S, told_MS = logp_MS[0], logp_MS[1:, None]
    consensus_TS, _ = geometric_mean(told_MS[1:])
    _, floor_T = geometric_mean(told_MS)
    return {
        "information": float(kl(told_MS[0], free_S)[0]),
        "lost": float(kl(told_MS[0], consensus_TS)[0]),
        "floor": float(floor_T[0]),
        "disagreement": float(disagreement(told_MS)[0]),
    }
