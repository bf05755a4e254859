"""Tables for people: the handshake, a scored text, a load, an examination. It asks nobody and decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from rich.table import Table
from rich.text import Text

from protos.records import ScoreItem, ScoreResult, TeacherInfo
from teacher_server.bench import BenchResult
from teacher_server.check import Finding

_VERDICT_STYLES = {"pass": "green", "FAIL": "bold red", "not offered": "dim"}

Decode = Callable[[int], str]


@dataclass(frozen=True)
class Token:
    """One token with its log-prob in nats; `text` is None where no tokenizer was given."""

    id: int
    text: str | None
    logprob: float

    def __str__(self) -> str:
        return f"{self.id if self.text is None else repr(self.text)} {self.logprob:.3f}"


@dataclass(frozen=True)
class Scored:
    """A scored completion.

    Attributes:
        tokens: the completion's, in order.
        alternatives: for each of them the teacher's most likely ids at its place.
        total_logprob: nats.
        perplexity: exp of the mean negative log-prob.
    """

    tokens: tuple[Token, ...]
    alternatives: tuple[tuple[Token, ...], ...]
    total_logprob: float
    perplexity: float
    num_context_tokens: int
    num_cached_tokens: int
    weights_version: int

    @classmethod
    def of(cls, item: ScoreItem, result: ScoreResult, decode: Decode | None) -> Scored:
        """The result beside the item's ids; `decode` gives an id's text."""

        def token(token_id: int, logprob: float) -> Token:
            return Token(token_id, None if decode is None else decode(token_id), logprob)

        total = float(result.sampled_logprobs.sum(dtype="float64"))
        return cls(
            tokens=tuple(map(token, item.completion_ids.tolist(), result.sampled_logprobs.tolist())),
            alternatives=tuple(
                tuple(map(token, ids, logprobs))
                for ids, logprobs in zip(result.top_ids.tolist(), result.top_logprobs.tolist(), strict=True)
            ),
            total_logprob=total,
            perplexity=math.exp(-total / result.num_tokens),
            num_context_tokens=result.num_context_tokens,
            num_cached_tokens=result.num_cached_tokens,
            weights_version=result.weights_version,
        )


def info_table(url: str, info: TeacherInfo) -> Table:
    """The handshake, one row a field."""
    table = _table(url, "", "")
    for name, value in {field.name: getattr(info, field.name) for field in fields(info)}.items():
        if name == "tokenizer":
            for part, shown in vars(value).items():
                table.add_row(f"tokenizer: {_words(part)}", _plain(shown))
        else:
            table.add_row(_words(name), _plain(value))
    return table


def score_table(scored: Scored) -> Table:
    """One row a token, the alternatives beside it, the total below."""
    table = _table(None, "", "token", "log-prob", "the teacher's alternatives")
    table.columns[0].justify = table.columns[2].justify = "right"
    for i, (token, alternatives) in enumerate(zip(scored.tokens, scored.alternatives, strict=True)):
        shown = token.id if token.text is None else f"{token.id} {token.text!r}"
        table.add_row(str(i), Text(str(shown)), f"{token.logprob:.4f}", Text("  ".join(map(str, alternatives))))
    context = f"{scored.num_context_tokens} tokens of context, {scored.num_cached_tokens} of them cached"
    table.caption = f"total {scored.total_logprob:.4f} nats, perplexity {scored.perplexity:.4g}; {context}"
    table.caption_justify = "left"
    return table


def bench_table(result: BenchResult) -> Table:
    """What a load came to, one row a figure."""
    load = result.config
    title = (
        f"{result.url}: {load.in_flight} requests in flight, {load.items} x {load.prompt_tokens} + "
        f"{load.completion_tokens} tokens each, teacher's {load.top_k}, caller's {load.candidates}"
    )
    table = _table(title, "", "")
    table.columns[1].justify = "right"
    table.add_row("scored tokens a second", f"{result.tokens_per_s:,.0f}")
    table.add_row("requests", f"{result.num_requests} in {result.seconds:.1f} s")
    table.add_row("latency, median", _milliseconds(result.p50_s))
    table.add_row("latency, 99th percentile", _milliseconds(result.p99_s))
    table.add_row("bytes sent for a scored token", _bytes(result.sent_bytes_per_token))
    table.add_row("bytes received for a scored token", _bytes(result.received_bytes_per_token))
    for name, num_requests in sorted(result.errors.items()):
        table.add_row(Text(name, style="red"), str(num_requests))
    return table


def check_table(urls: str, seed: int, findings: Sequence[Finding]) -> Table:
    """One row a check."""
    table = _table(f"{urls} (seed {seed})", "check", "compared", "difference", "bound", "")
    table.columns[2].justify = table.columns[3].justify = "right"
    for finding in findings:
        difference = "" if finding.difference is None else f"{finding.difference:.2g}"
        bound = f"{finding.bound:.2g} {finding.unit}"
        verdict = Text(finding.verdict, style=_VERDICT_STYLES[finding.verdict])
        table.add_row(Text(finding.name), Text(finding.compared), difference, bound, verdict)
    return table


def _table(title: str | None, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: object) -> Text:
    if isinstance(value, tuple):
        return Text(", ".join(map(str, value)))
    return Text(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:,.1f} ms"


def _bytes(count: float | None) -> str:
    return "not metered" if count is None else f"{count:,.1f}"
