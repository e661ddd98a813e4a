"""`/status`, the files of the page, and the metrics of devices and of the leader."""

import re
from importlib.resources import files

from ryzanstein_jax.server.page import FILES
from tests.server.serving import FakeBackend, serving, wait_until


def test_the_page_comes_without_a_key_and_holds_nothing(fake):
    with serving(fake, api_keys=("a-long-secret",)) as served:
        served.key = None
        for path, name in FILES.items():
            status, headers, text = served.request("GET", path)
            assert status == 200 and text == (files("ryzanstein_jax.server") / "static" / name).read_text()
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert headers["x-content-type-options"] == "nosniff"
        for path in ("/page/", "/page/../gate.py", "/page/%2e%2e/gate.py", "/page/page.py", "/index.html", "//"):
            assert served.request("GET", path)[0] in (401, 404), path
        assert served.request("POST", "/", {})[0] == 405
    named = {item.name for item in (files("ryzanstein_jax.server") / "static").iterdir()}
    assert named == set(FILES.values())


def test_the_page_loads_nothing_from_elsewhere_and_writes_no_markup():
    for name in FILES.values():
        text = (files("ryzanstein_jax.server") / "static" / name).read_text()
        outside = [url for url in re.findall(r"https?://[^\s\"']+", text) if url != "http://www.w3.org/2000/svg"]
        assert outside == [], name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|style=|\son\w+=", text)


def test_status_tells_what_there_is(fake):
    with serving(fake) as served:
        wait_until(lambda: served.request("GET", "/status")[2]["events"])
        assert served.complete(max_tokens=7)[0] == 200
        status, _, found = served.request("GET", "/status")
        assert status == 200 and (found["status"], found["model"], found["version"]) == ("ready", "tiny", "1.2.3")
        assert found["tokens"] == {"prompt": 5, "generation": 7}
        assert found["requests"] == {
            "encoding": 0, "waiting": 0, "running": 0, "sequences": 0, "most_sequences": 512,
        }  # fmt: skip
        engine = found["engine"]
        assert engine["pages"] == {"total": 100, "used": 0, "idle": 0} and engine["device"] == "2 x fake (none)"
        assert engine["ranks"][1] == {"rank": 1, "memory_bytes": 101, "collective_bytes": 10}
        assert found["orchestrator"] is None and found["events"][0]["message"] == "the server answers"
        fake.is_alive = False
        wait_until(lambda: served.request("GET", "/status")[2]["events"][-1]["message"] == "the engine has failed")
        assert served.request("GET", "/status")[2]["status"] == "failed"
    with serving(None, start=False) as served:
        found = served.request("GET", "/status")[2]
        assert (found["status"], found["engine"]) == ("starting", None)


def test_metrics_of_devices_and_of_the_leader(fake: FakeBackend):
    with serving(fake) as served:
        assert served.metric('ryzanstein_device_memory_bytes{rank="1"}') == 101
        assert served.metric('ryzanstein_collective_bytes_total{rank="1"}') == 10
        assert served.metric('ryzanstein_memory_plan_bytes{part="weights"}') == 92
        assert served.metric('ryzanstein_leader_cpu_seconds_total{thread="engine"}') == 1.5
        assert served.metric('ryzanstein_leader_cpu_seconds_total{thread="server"}') > 0
