"""What the benchmarks measured, as people read it: medians with their intervals, and the tables of scoring."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Median and its 95 % interval, by the percentile bootstrap (Efron 1979)."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (2000, len(values))), axis=1)
    return float(np.median(values)), float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def comparison_table(title: str, results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in (
        "",
        "tokens/s",
        "share of ceiling",
        "times TRL",
        "bytes/token",
        "p50 ms",
        "p99 ms",
        "server MiB",
        "client MiB",
    ):
        table.add_column(column, justify="left" if not column else "right")
    ceiling = np.array(results["ceiling"]["tokens_per_s"])
    for name, result in results.items():
        rates = np.array(result["tokens_per_s"])
        rival = next(
            (
                np.array(results[key]["tokens_per_s"])
                for reader in ("TRL's client", "read as TRL does")
                if (key := f"stock vllm serve, {reader}, K = {64 if 'K = 64' in name else 20}") in results
            ),
            None,
        )
        low_high = "{:,.0f} ({:,.0f} to {:,.0f})".format(*interval(rates))
        share = "{:.0%} ({:.0%} to {:.0%})".format(*interval(rates / ceiling))
        times = "" if rival is None else "{:.1f} ({:.1f} to {:.1f})".format(*interval(rates / rival))
        numbers = [
            f"{result[key]:,.0f}" if key in result else ""
            for key in ("bytes_per_token", "p50_ms", "p99_ms", "server_peak_mib", "client_peak_mib")
        ]
        table.add_row(name, low_high, share, times, *numbers)
    return table


def grid_table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="gRPC, one item a request", title_justify="left")
    for column in ("tokens", "in flight", "K", "support", "tokens/s", "share", "p50 ms", "p99 ms"):
        table.add_column(column, justify="right")
    for cell in results:
        table.add_row(
            *(str(cell[key]) for key in ("completion", "in_flight", "top_k", "support")),
            f"{cell['tokens_per_s']:,.0f}",
            f"{cell['share']:.0%}",
            f"{cell['p50_ms']:,.0f}",
            f"{cell['p99_ms']:,.0f}",
        )
    return table
