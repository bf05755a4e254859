"""Fine-tuning with and without packing: completion tokens a second over the same texts, in the same order.

    python -m tests.bench.training_packing [--repeats 5]

Worked sums of 2 to 12 terms, whose texts differ tenfold in length; micro-batches of 16. Repeats are interleaved, and
ratios are taken within one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import numpy as np

from student_trainer.config import parse_config
from student_trainer.loop import train
from student_trainer.run_folder import read_rows
from student_trainer.study.toy import build_toy_model
from tests.bench.tables import interval

STEPS, WARM_STEPS = 12, 2


def tokens_per_s(model: Path, run: Path, *, packing: bool) -> float:
    """The median over the steps but the first ones."""
    config = parse_config(
        {
            "run": str(run),
            "steps": STEPS,
            "problems_per_step": 64,
            "model": {"path": str(model)},
            "task": {"kind": "toy", "train_size": 1000, "held_out_size": 10, "min_terms": 2, "max_terms": 12},
            "stage": {"kind": "sft", "packing": packing},
            "optim": {"micro_batch_size": 16},
            "eval": {"num_problems": 1},
            "checkpoint": {"every_steps": STEPS},
        }
    )
    train(config, quiet=True)
    rows = read_rows(run / "metrics.jsonl")[1 + WARM_STEPS :]
    return statistics.median(row["num_tokens"] / row["step_s"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    medians: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        model = build_toy_model(Path(folder) / "model", hidden_size=128, num_layers=2)
        for repeat in range(repeats):
            for packing in (False, True) if repeat % 2 else (True, False):
                run = Path(folder) / f"{packing}-{repeat}"
                medians[packing].append(tokens_per_s(model, run, packing=packing))
    for packing, name in ((False, "padded"), (True, "packed")):
        print("{:7} {:9,.0f} tokens/s ({:,.0f} to {:,.0f})".format(name, *interval(np.array(medians[packing]))))
    ratios = np.array(medians[True]) / np.array(medians[False])
    print("packed / padded: {:.2f} (95 % interval {:.2f} to {:.2f})".format(*interval(ratios)))


if __name__ == "__main__":
    main()
