"""Whether replicas are one teacher, and what the pool of them is; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from protos.records import ServedTeacher, TeacherInfo

_IDENTITY = ("model", "revision", "dtype")
"""What decides the log-probs besides the tokenizer. Engines may differ: they are tested to agree."""

_SHOWN_CHARS = 60


def differences(url: str, info: TeacherInfo, other_url: str, other: TeacherInfo) -> str:
    """What keeps two replicas from being one teacher, as one sentence that names both; "" when nothing does."""
    pairs = [(name, getattr(info, name), getattr(other, name)) for name in _IDENTITY]
    # Other names and the weights' versions come and go while replicas are updated one after the other.
    pairs.append(("the default teacher", info.teachers[:1], other.teachers[:1]))
    pairs += [
        (f"tokenizer.{field.name}", getattr(info.tokenizer, field.name), getattr(other.tokenizer, field.name))
        for field in fields(info.tokenizer)
    ]
    differing = [f"{name} is {_shown(a)} and {_shown(b)}" for name, a, b in pairs if a != b]
    if not differing:
        return ""
    return f"{url} and {other_url} are not replicas of one teacher: {'; '.join(differing)}"


def merged(infos: Sequence[TeacherInfo]) -> TeacherInfo:
    """What a pool of agreeing replicas is: the smallest limits, what all of them can, the oldest weights."""
    return replace(
        infos[0],
        teachers=_common([info.teachers for info in infos]),
        weights_version=min(info.weights_version for info in infos),
        max_context_tokens=min(info.max_context_tokens for info in infos),
        max_top_k=min(info.max_top_k for info in infos),
        max_candidates=min(info.max_candidates for info in infos),
        max_items=min(info.max_items for info in infos),
        supports=_common([info.supports for info in infos]),
        exact_temperature=all(info.exact_temperature for info in infos),
        prefix_cache=all(info.prefix_cache for info in infos),
        engine=_joined([info.engine for info in infos]),
        engine_version=_joined([info.engine_version for info in infos]),
        score_path=_joined([info.score_path for info in infos]),
        determinism=_joined([info.determinism for info in infos]),
        privileged_kinds=_common([info.privileged_kinds for info in infos]),
        served=_served([info.served for info in infos]),
        reference_templates=_common([info.reference_templates for info in infos]),
        contract_version=min(info.contract_version for info in infos),
        weights_transfer=infos[0].weights_transfer if len(infos) == 1 else "",
    )


def _common(names: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(name for name in names[0] if all(name in others for others in names))


def _served(replicas: Sequence[tuple[ServedTeacher, ...]]) -> tuple[ServedTeacher, ...]:
    """The teachers that every replica has, each with its oldest weights."""
    versions = [{teacher.name: teacher.weights_version for teacher in served} for served in replicas]
    return tuple(
        replace(teacher, weights_version=min(of_replica[teacher.name] for of_replica in versions))
        for teacher in replicas[0]
        if all(teacher.name in of_replica for of_replica in versions)
    )


def _joined(texts: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
