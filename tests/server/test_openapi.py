"""The served OpenAPI document against the server: whatever it allows or forbids, nothing ends in an error of ours."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error

from ryzanstein_jax import AsyncLLM
from ryzanstein_jax.server.openapi import openapi
from tests.server.serving import MODEL, Served, serving


@pytest.fixture(scope="module")
def fuzzed(engine: AsyncLLM) -> Iterator[Served]:
    with serving(engine, request_seconds=20) as found:
        yield found
        status, _, body = found.complete("x", max_tokens=2, ignore_eos=True)
        assert status == 200 and body["usage"]["completion_tokens"] == 2, "it answers afterwards"
        assert found.service.admission.num_sequences == 0


OPERATIONS = [(method, path) for path, methods in openapi("1")["paths"].items() for method in methods]


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_nothing_in_the_document_breaks_the_server(
    fuzzed: Served, method: str, path: str, mode: schemathesis.GenerationMode
) -> None:
    status, _, document = fuzzed.request("GET", "/openapi.json")
    assert status == 200
    # Else nearly every request would be for another model.
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"const": MODEL}
    operation = schemathesis.openapi.from_dict(document)[path][method]
    if method == "get" and mode is schemathesis.GenerationMode.NEGATIVE:
        return  # there is nothing to get wrong

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=25, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and path.startswith("/v1"):
            most = {"/v1/responses": "max_output_tokens", "/v1/embeddings": None}.get(path, "max_tokens")
            if most is not None:
                case.body.setdefault(most, 2)  # a chat's default is as many as fit
            case.body.pop("deadline_seconds", None)  # a deadline that is missed is a 504, as it should be
        response = case.call(base_url=fuzzed.url, timeout=60)
        case.validate_response(response, checks=[not_a_server_error])
        assert response.status_code in (200, 400, 404, 405, 413, 415, 421, 429, 431), response.status_code
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    check()
