"""Eight student processes on a pool of three vLLM servers: what each is given, alone, together, beside a greedy one.

    python -m tests.bench.load --seconds 60

Every answer is compared with the log-probs that the same text had before, when nobody else asked, and with the version
of the weights: one that belongs to another student fails the run, and so does a fairness below MIN_JAIN.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KMP_BLOCKTIME", "0")

from cyclopts import App
from rich.console import Console
from rich.table import Table

from tests.load import NUM_COMPLETION, NUM_ITEMS, NUM_PROMPT, Outcome, jain, run_students, write_texts
from tests.server_process import TINY_VLLM, ServerProcess
from tests.tiny_model import build_tiny_qwen3

MIN_JAIN = 0.95
NUM_REPLICAS = 3
NAMES = [f"student-{index}" for index in range(8)]
TOKENS = {name: f"{name}-0123456789abcdef" for name in NAMES}
IN_FLIGHT, GREEDY_IN_FLIGHT = 4, 32
REQUEST_TOKENS = NUM_ITEMS * (NUM_PROMPT + NUM_COMPLETION)

app = App(help="Loads a pool with many students and fails where one is starved or given another's answer.")


@app.default
def main(*, seconds: float = 60.0) -> None:
    """Starts the servers, measures, prints.

    Args:
        seconds: Of each of the three measurements.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as servers:
        folder = Path(name)
        model = build_tiny_qwen3(folder)
        url = ",".join(_served(servers, model, folder / f"replica-{index}") for index in range(NUM_REPLICAS))
        asyncio.run(write_texts(url, folder, TOKENS))

        def measure(num_in_flight: Mapping[str, int]) -> dict[str, Outcome]:
            return run_students(url, folder, num_in_flight, seconds, tokens=TOKENS)

        alone = measure({NAMES[0]: IN_FLIGHT})
        equal = measure(dict.fromkeys(NAMES, IN_FLIGHT))
        greedy = measure(dict.fromkeys(NAMES, IN_FLIGHT) | {NAMES[0]: GREEDY_IN_FLIGHT})
    others = {name: outcome for name, outcome in greedy.items() if name != NAMES[0]}
    _show({"one alone": alone, "eight": equal, f"{NAMES[0]} greedy": greedy, "its seven neighbours": others}, seconds)
    if (worst := min(_jain(equal), _jain(others))) < MIN_JAIN:
        sys.exit(f"load: Jain's index is {worst:.3f}, below {MIN_JAIN}")


def _served(servers: ExitStack, model: Path, folder: Path) -> str:
    """Starts one replica, which works on two requests at a time; its URL."""
    folder.mkdir()
    tokens = folder / "tokens.toml"
    tokens.touch(mode=0o600)
    digests = {name: hashlib.sha256(token.encode()).hexdigest() for name, token in TOKENS.items()}
    tokens.write_text(
        "".join(f'[{name}]\nsha256 = "{digest}"\nscopes = ["score"]\n' for name, digest in digests.items())
    )
    args = (*TINY_VLLM, "--tokens", str(tokens), "--max-tokens-in-flight", str(2 * REQUEST_TOKENS))
    return servers.enter_context(ServerProcess(model, folder, *args)).ready["grpc_url"]


def _jain(outcomes: Mapping[str, Outcome]) -> float:
    return jain([outcome.num_items for outcome in outcomes.values()])


def _show(measured: Mapping[str, Mapping[str, Outcome]], seconds: float) -> None:
    table = Table(title=f"{NUM_REPLICAS} vLLM replicas, {seconds:g} s each", title_justify="left")
    for column in ("students", "tokens/s in all", "least, items", "most, items", "Jain's index", "slowest median, ms"):
        table.add_column(column)
    for name, outcomes in measured.items():
        items = [outcome.num_items for outcome in outcomes.values()]
        latency_ms = 1000 * max(outcome.latency_s for outcome in outcomes.values())
        rate = sum(items) * NUM_COMPLETION / seconds
        table.add_row(
            name, f"{rate:,.0f}", str(min(items)), str(max(items)), f"{_jain(outcomes):.3f}", f"{latency_ms:.0f}"
        )
    Console().print(table)


if __name__ == "__main__":
    app()
