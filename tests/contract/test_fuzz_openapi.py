"""Schemathesis over the OpenAPI document: JSON that it allows, or nearly allows, is answered as it promises."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fuzz import NUM_CASES, check_cases
from tests.harness import Server

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
TIMEOUT_S = 5.0
REQUEST_BODIES = ("/v1/score", "/v1/generate")
NUM_WITHOUT_BODY = 5
"""Cases of an operation that takes no body: there is hardly more than one."""


def test_answers_are_those_of_the_document(transformers_server: Server) -> None:
    url = transformers_server.listeners.http_url
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()

    def check(case: schemathesis.Case) -> None:
        answer = case.call(timeout=TIMEOUT_S, headers={"x-timeout-s": str(TIMEOUT_S)})
        seen[case.path, answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    operations: list[Any] = [result.ok() for result in cast("list[Any]", list(schema.get_all_operations()))]
    with_body = [operation for operation in operations if operation.body]
    assert {operation.path for operation in with_body} >= set(REQUEST_BODIES)
    for operation in operations:
        for mode in GenerationMode:
            if not operation.body:
                if mode is GenerationMode.POSITIVE:
                    check_cases(1, operation.as_strategy(mode), check)
                continue
            check_cases(NUM_CASES["schema"] // (2 * len(REQUEST_BODIES)), operation.as_strategy(mode), check)
    for path in REQUEST_BODIES:
        assert seen[path, 422] > 10
