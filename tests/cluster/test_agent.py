"""The agent of a device: the real server, and real processes of it that time tiny networks."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from paretoprune.cluster.agent import agent
from paretoprune.cluster.agent.client import AgentClient, AgentPool, read_token
from paretoprune.cluster.errors import AgentAwayError, AgentError
from tests.cluster.agents import AGENT, TOKEN, RunningAgent, agent_process, tiny_onnx

SIDE = 32
RIGHT = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """A process of its own, with commands that print, crash and hang."""
    options = [
        "--command", "prints=sh -c 'echo Median: 1.25 ms' {model}", "--pattern", r"Median: ([0-9.]+)",
        "--command", "crashes=sh -c 'kill -9 $PPID' {model}", "--pattern", r"([0-9.]+)",
        "--command", "hangs=sh -c 'sleep 600' {model}", "--pattern", r"([0-9.]+)",
    ]  # fmt: skip
    with agent_process(tmp_path_factory.mktemp("device"), *options) as found:
        yield found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[agent.Server]:
    """A server in this process, with room for 2 MB."""
    with serving(tmp_path) as found:
        yield found


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[agent.Server]:
    options = agent.parser().parse_args(["--token-file", "t", "--store", str(folder / "s"), "--max-file-mb", "1"])
    options.commands, options.quota_mb = {}, 2
    found = agent.Server(("127.0.0.1", 0), agent.Agent(options, TOKEN.encode(), contextlib.nullcontext))
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield found
    finally:
        found.shutdown()
        found.server_close()
        thread.join()


def ask(server: agent.Server, verb: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    with contextlib.closing(connection):
        with contextlib.suppress(ConnectionError):  # refused before all was read
            connection.request(verb, path, body, {**RIGHT, **headers})
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if content else None


def raw(server: agent.Server, sent: bytes, timeout: float = 20) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(4096), b""))


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def request_of(candidate: str, baseline: str, runner: str = "onnx", **more: Any) -> dict[str, Any]:
    models = {
        name: {"files": {"model": each}, "shape": [1, 3, SIDE, SIDE]}
        for name, each in (("candidate", candidate), ("baseline", baseline))
    }
    return {**models, "runner": runner, "seconds": 0.3, "threads": 1, **more}


def test_the_file_stands_alone_on_python_3_8() -> None:
    """Nothing but the standard library at its head, and no younger syntax; run where such a Python is at hand."""
    tree = ast.parse(AGENT.read_text(encoding="utf-8"), feature_version=(3, 8))
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names
    with contextlib.suppress(FileNotFoundError):
        old = subprocess.run(["python3.8", "-c", "0"], capture_output=True, check=False).returncode == 0
        if old:
            subprocess.run(["python3.8", str(AGENT), "--help"], capture_output=True, check=True)


class Scripted(agent.Runner):
    """Takes the times of a list, and notes whose turn it was."""

    def __init__(self, name: str, turns: list[str], times: list[float]) -> None:
        self.name, self.turns, self.times = name, turns, iter(times)

    def time_ms(self) -> float:
        self.turns.append(self.name)
        return next(self.times)


@pytest.mark.parametrize("max_seconds", [0.2, 4.0])
def test_the_device_pairs_as_local_measuring_does(max_seconds: float) -> None:
    """Oracle: `time_pair` on sessions with the same times calls them in the same order and gets the same blocks."""
    import numpy as np

    from paretoprune.pruning.latency.pair import WARMUP_SHARE, pair_block_ms, time_pair

    rng = np.random.default_rng(0)
    falling = [5.0 / (1 + k) + 3 for k in range(40)]
    script = {name: falling + list(ms + rng.random(9000)) for name, ms in (("A", 3), ("B", 6))}
    local: list[str] = []
    candidate, baseline = (Scripted(name, local, script[name]) for name in "AB")
    times = time_pair(candidate, baseline, max_seconds, 1e-9, clock=lambda: len(local) * 0.004)
    there: list[str] = []
    candidate, baseline = (Scripted(name, there, script[name]) for name in "AB")
    warm = agent.warm_up(candidate, baseline, WARMUP_SHARE * max_seconds, lambda: len(there) * 0.004)
    timed = agent.rounds(candidate, baseline, warm, pair_block_ms(max_seconds))
    found = [next(timed) for _ in times.quads]
    assert there == local
    assert len(warm[0]) == times.warmup_iterations
    assert [[[tuple(b) for b in each] for each in pair] for pair in found] == [
        [list(quad.candidate), list(quad.baseline)] for quad in times.quads
    ]


def test_networks_loaded_anew_take_turns_in_being_first() -> None:
    """Oracle: a place in memory that costs the network loaded second 3 % leaves the mean of the ratios at 1."""
    orders: list[bool] = []

    def load(baseline_first: bool = False) -> tuple[Scripted, Scripted]:
        orders.append(baseline_first)
        slow = iter([1.0, 1.03] if not baseline_first else [1.03, 1.0])
        return Scripted("A", [], [next(slow)] * 99), Scripted("B", [], [next(slow)] * 99)

    timed = agent.rounds(*load(), ([1.0] * 10, [1.0] * 10), 4.0, load)
    found = [next(timed) for _ in range(6)]
    ratios = [sum(map(sum, theirs)) / sum(map(sum, ours)) for ours, theirs in found]
    assert orders == [False, True, False, True, False, True]
    assert statistics.geometric_mean(ratios) == pytest.approx(1)
    assert max(ratios) / min(ratios) == pytest.approx(1.03**2)  # and the interval sees it


class TestToken:
    def test_without_it_everything_but_health_is_401(self, server: agent.Server) -> None:
        verbs = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PARETO")
        paths = (
            "/",
            "/info",
            "/measure",
            "/models/" + "0" * 64,
            "/unknown",
            "/health/",
            "/health/../info",
            "/health?x",
        )
        headers = ("", f"Bearer {TOKEN[:-1]}", TOKEN, f"Bearer {TOKEN}\xe9")
        asked = [(verb, path, header) for verb in verbs for path in paths for header in headers]
        answers = {each: ask(server, each[0], each[1], Authorization=each[2])[0] for each in asked}
        assert {each: status for each, status in answers.items() if status != 401} == {}

    def test_health_needs_none_and_says_nothing_of_the_device(self, server: agent.Server) -> None:
        status, content = ask(server, "GET", "/health", Authorization="")
        assert (status, content["status"], content["queue"], content["running"]) == (200, "ok", 0, None)
        assert "host" not in content

    def test_no_body_is_invited_without_it(self, server: agent.Server) -> None:
        head = b"PUT /models/%s HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n" % (b"0" * 64)
        assert raw(server, head).startswith(b"HTTP/1.1 401 ")

    @pytest.mark.parametrize("content", [None, "", " \n", "two\nlines", "x" * 2000])
    def test_no_start_without_a_usable_one(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / "token").write_text(content)
        with pytest.raises(agent.RefusedError, match="token file"):
            agent.read_token(str(tmp_path / "token"))

    def test_the_client_wants_one_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PARETOPRUNE_AGENT_TOKEN", raising=False)
        with pytest.raises(AgentError, match="PARETOPRUNE_AGENT_TOKEN"):
            read_token(None)
        with pytest.raises(AgentError, match=r"token_file .* must be readable"):
            read_token(str(tmp_path / "none"))
        (tmp_path / "token").write_text(TOKEN + "\n")
        assert read_token(str(tmp_path / "token")) == TOKEN

    def test_the_client_says_that_it_is_wrong(self, server: agent.Server) -> None:
        with pytest.raises(AgentError, match="must be sent the right token"):
            AgentClient(f"http://127.0.0.1:{server.server_address[1]}", "wrong").info()


class TestFiles:
    def test_a_file_is_kept_by_its_content(self, server: agent.Server) -> None:
        content = b"network"
        assert ask(server, "GET", f"/models/{sha(content)}")[0] == 404
        assert ask(server, "PUT", f"/models/{sha(content)}", content)[0] == 201
        assert ask(server, "GET", f"/models/{sha(content)}")[0] == 200
        assert (server.agent.store.folder / sha(content)).read_bytes() == content

    def test_the_client_sends_each_file_once_and_none_that_is_too_large(self, server: agent.Server) -> None:
        client = AgentClient(f"http://127.0.0.1:{server.server_address[1]}", TOKEN)
        assert client.send(b"network") == client.send(b"network") == sha(b"network")
        with pytest.raises(AgentError, match=r"at most 1048576 bytes, .* has 1048577; .*--max-file-mb"):
            client.send(bytes(1048577))

    def test_another_hash_or_an_early_end_keeps_nothing(self, server: agent.Server) -> None:
        assert ask(server, "PUT", f"/models/{sha(b'other')}", b"network")[0] == 422
        head = (
            f"PUT /models/{sha(b'short')} HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 99\r\n\r\nshort"
        )
        with socket.create_connection(("127.0.0.1", server.server_address[1]), 20) as connection:
            connection.sendall(head.encode())
            connection.shutdown(socket.SHUT_WR)
            assert b"ended 94 bytes early" in b"".join(iter(lambda: connection.recv(4096), b""))
        assert list(server.agent.store.folder.iterdir()) == []

    @pytest.mark.parametrize(
        "name",
        [
            "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e", "a" * 63, "A" * 64, "0" * 64 + "\x00", "", ".",
            "0" * 64 + ".x",
        ],
    )  # fmt: skip
    def test_names_are_hashes_and_nothing_else(self, server: agent.Server, name: str) -> None:
        line = f"PUT /models/{name} HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 1\r\n\r\nx"
        assert raw(server, line.encode()).split()[1] in (b"400", b"404")
        assert list(server.agent.store.folder.iterdir()) == []

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ("Content-Length: 1048577", 413), ("Content-Length: -1", 400), ("Content-Length: 1_0", 400),
            ("Content-Length: 9\r\nContent-Length: 1", 411), ("Transfer-Encoding: chunked", 411), ("X: y", 411),
            ("Content-Length: " + "9" * 400, 400),
        ],
    )  # fmt: skip
    def test_sizes_are_bounded_before_a_byte_is_read(self, server: agent.Server, headers: str, status: int) -> None:
        head = f"PUT /models/{'0' * 64} HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n{headers}\r\n\r\n"
        assert raw(server, head.encode()).startswith(f"HTTP/1.1 {status} ".encode())

    def test_the_quota_drops_what_was_not_used_for_longest(self, server: agent.Server) -> None:
        """Two MB hold two files of 900 kB: the one that was asked for meanwhile stays."""
        files = [bytes([number]) * 900_000 for number in range(3)]
        for content in files[:2]:
            assert ask(server, "PUT", f"/models/{sha(content)}", content)[0] == 201
            time.sleep(0.02)
        ask(server, "GET", f"/models/{sha(files[0])}")
        assert ask(server, "PUT", f"/models/{sha(files[2])}", files[2])[0] == 201
        assert [ask(server, "GET", f"/models/{sha(content)}")[0] for content in files] == [200, 404, 200]
        with server.agent.store.pinned([sha(files[0]), sha(files[2])]):
            assert ask(server, "PUT", f"/models/{sha(files[1])}", files[1])[0] == 507
        assert ask(server, "PUT", f"/models/{sha(files[1])}", files[1])[0] == 201

    def test_what_a_dead_upload_left_is_cleaned_at_the_next_start(self, tmp_path: Path) -> None:
        (tmp_path / ".upload-1").write_bytes(b"half")
        (tmp_path / "work-1").mkdir()
        agent.Store(tmp_path, 10, 10)
        assert list(tmp_path.iterdir()) == []


class TestHostileRequests:
    @pytest.mark.parametrize(
        "body",
        [
            b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 60_000, b'{"a":' * 12_000, b"1" * 60_000,
            *(
                json.dumps({**request_of("0" * 64, "0" * 64), **change}).encode()
                for change in (
                    {"runner": "__import__('os')"}, {"runner": ["onnx"]}, {"runner": "command:sh"}, {"runner": None},
                    {"seconds": -1}, {"seconds": 1e9}, {"seconds": float("nan")}, {"seconds": True}, {"seconds": "1"},
                    {"threads": 0}, {"threads": 1.5}, {"threads": 10**9}, {"device": "cuda:0"}, {"half": 1},
                    {"command": "rm"}, {"block_ms": 0}, {"candidate": "0" * 64}, {"candidate": {"files": {}}},
                    {"candidate": {"files": {"model": "../x"}, "shape": [1]}},
                    {"candidate": {"files": {"model": "0" * 64, "../x": "0" * 64}, "shape": [1]}},
                    {"candidate": {"files": {"model": "0" * 64}, "shape": [1, 65536, 65536]}},
                    {"candidate": {"files": {"model": "0" * 64}, "shape": [True]}},
                    {"candidate": {"files": {"model": "0" * 64}, "shape": []}},
                )
            ),
        ],
    )  # fmt: skip
    def test_a_malformed_measurement_is_400_and_starts_nothing(self, server: agent.Server, body: bytes) -> None:
        status, content = ask(server, "POST", "/measure", body)
        assert status == 400, content
        assert "\n" not in content["error"]
        assert server.agent.health()["queue"] == 0

    @pytest.mark.parametrize("name", ["0" * 32, "", "\xe9", "x/y"])
    def test_another_measurement_is_not_ended(self, server: agent.Server, name: str) -> None:
        head = f"POST /measure/{name}/enough HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
        assert raw(server, head.encode("latin-1")).startswith(b"HTTP/1.1 404 ")

    def test_files_that_are_not_there_are_asked_for(self, server: agent.Server) -> None:
        status, content = ask(server, "POST", "/measure", json.dumps(request_of("0" * 64, "1" * 64)).encode())
        assert (status, content["error"]) == (404, f"the device has no file {'0' * 64}; send it first")

    @pytest.mark.parametrize(
        "sent",
        [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"y" * 70_000],
    )  # fmt: skip
    def test_what_is_no_http_is_refused(self, server: agent.Server, sent: bytes) -> None:
        assert raw(server, sent).split(b"\r\n")[0].split()[1][:1] in (b"4", b"5")
        assert ask(server, "GET", "/health")[0] == 200

    def test_slow_heads_and_too_many_connections_keep_nobody_out(
        self, server: agent.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(agent, "MOST_CONNECTIONS", 8)
        monkeypatch.setattr(agent, "HEAD_SECONDS", 1.0)
        place = ("127.0.0.1", server.server_address[1])
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(socket.create_connection(place, 20)) for _ in range(20)]
            for connection in slow:
                with contextlib.suppress(OSError):
                    connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
            assert ask(server, "GET", "/health")[0] == 200  # the oldest makes room
            for connection in slow:  # and the others are closed in time, though each has sent something
                with contextlib.suppress(OSError):
                    assert connection.recv(1) in (b"", b"H")
        assert ask(server, "GET", "/health")[0] == 200

    def test_many_at_once_are_answered(self, server: agent.Server) -> None:
        content = [bytes([number]) * 50_000 for number in range(12)]
        statuses: list[int] = []

        def put(each: bytes) -> None:
            statuses.append(ask(server, "PUT", f"/models/{sha(each)}", each)[0])

        threads = [threading.Thread(target=put, args=(each,)) for each in content]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [201] * 12


@pytest.fixture
def client(device: RunningAgent) -> AgentClient:
    return AgentClient(device.address, TOKEN)


@pytest.fixture
def files(client: AgentClient) -> list[str]:
    return [client.send(tiny_onnx(channels, SIDE)) for channels in (4, 48)]


class TestMeasuring:
    def test_samples_of_both_come_back_with_the_device(self, client: AgentClient, files: list[str]) -> None:
        events = list(client.measure(request_of(*files)))
        kinds = [event["event"] for event in events if event["event"] not in ("alive", "queued")]
        assert kinds[:4] == ["started", "state", "prepared", "warm"]
        assert kinds[-1] == "end"
        seen = {event["event"]: event for event in events}
        assert seen["prepared"]["version"].startswith("onnxruntime ")
        assert (seen["prepared"]["precision"], seen["prepared"]["threads"]) == ("fp32", 1)
        assert seen["started"]["facts"]["memory_mb"] > 0
        assert set(seen["state"]) - {"event"} == set(seen["end"]["state"])
        timed = [pair for event in events if event["event"] == "rounds" for pair in event["rounds"]]
        assert len(timed) == seen["end"]["rounds"] >= 4
        best = [min(ms for pair in timed for block in pair[which] for ms in block) for which in (0, 1)]
        assert 0 < best[0] < best[1]  # 90 times the work

    def test_a_client_can_have_enough(self, client: AgentClient, files: list[str]) -> None:
        events = client.measure(request_of(*files, seconds=500.0, warmup_seconds=0.1))
        started = next(event for event in events if event["event"] == "started")
        next(event for event in events if event["event"] == "rounds")
        client.enough(started["id"])
        assert list(events)[-1]["reason"] == "enough"

    def test_a_client_that_dies_ends_its_work_and_the_next_has_its_turn(
        self, device: RunningAgent, client: AgentClient, files: list[str]
    ) -> None:
        dying = client.measure(request_of(*files, "command:hangs"))
        assert next(event for event in dying if event["event"] == "started")
        waiting = client.measure(request_of(*files))
        assert next(waiting)["event"] == "queued"
        health = client.health()
        assert (health["queue"], health["running"]["phase"]) == (2, "preparing")
        dying.close()
        assert [event["event"] for event in waiting][-1] == "end"
        assert psutil.Process(device.process.pid).children(recursive=True) == []
        assert "client gone, 0 rounds" in device.log.read_text()

    def test_a_command_of_the_start_is_timed(self, client: AgentClient, files: list[str]) -> None:
        events = list(client.measure(request_of(*files, "command:prints")))
        timed = [pair for event in events if event["event"] == "rounds" for pair in event["rounds"]]
        assert timed[0] == [[[1.25], [1.25]], [[1.25], [1.25]]]

    @pytest.mark.parametrize(
        ("runner", "said"),
        [
            ("command:crashes", "the measuring process ended by itself"),
            ("onnx", "Fail|InvalidProtobuf|INVALID"),
            ("hailo", "the device has no hailo_platform"),
        ],
    )
    def test_what_cannot_be_run_is_one_line(self, client: AgentClient, runner: str, said: str) -> None:
        broken = client.send(b"this is no network")
        with pytest.raises(AgentError, match=said):
            list(client.measure(request_of(broken, broken, runner)))
        assert client.health()["queue"] == 0

    def test_a_second_agent_is_refused(self, device: RunningAgent, tmp_path: Path) -> None:
        lock = device.store.parent / "lock"
        command = [sys.executable, str(AGENT), "--token-file", str(lock.parent / "token"), "--port", "0"]
        done = subprocess.run(
            [*command, "--store", str(tmp_path), "--lock-file", str(lock)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "another agent runs on this device" in done.stderr


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class TestPool:
    def pool(self, clock: FakeClock, wait_s: float, *addresses: str) -> AgentPool:
        return AgentPool(addresses or ("http://127.0.0.1:9",), TOKEN, wait_s, clock, clock.sleep)

    def test_a_device_that_comes_back_is_waited_for(self) -> None:
        clock = FakeClock()

        def task(client: AgentClient) -> float:
            if clock.now < 100:
                raise AgentAwayError(client.address, "it is off")
            return clock.now

        assert 100 <= self.pool(clock, 1800).run(task) <= 120

    def test_one_that_does_not_is_given_up_in_time(self) -> None:
        clock = FakeClock()
        with pytest.raises(AgentAwayError, match=r"http://127\.0\.0\.1:9"):
            self.pool(clock, 60).run(lambda client: client.health())
        assert clock.now == 60

    def test_a_refusal_is_not_repeated(self) -> None:
        clock = FakeClock()

        def task(client: AgentClient) -> None:
            raise AgentError("it will not")

        with pytest.raises(AgentError, match="it will not"):
            self.pool(clock, 60).run(task)
        assert clock.now == 0

    def test_the_least_busy_device_is_taken_and_one_that_is_away_passed_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        with serving(tmp_path / "a") as one, serving(tmp_path / "b") as other:
            addresses = [f"http://127.0.0.1:{each.server_address[1]}" for each in (one, other)]
            busy = one.agent.health
            monkeypatch.setattr(one.agent, "health", lambda: {**busy(), "queue": 3})
            pool = self.pool(FakeClock(), 0, "http://127.0.0.1:9", *addresses)
            assert pool.run(lambda client: client.address) == addresses[1]


def test_addresses_are_plain() -> None:
    assert urlsplit(AgentClient("http://[::1]:8765", TOKEN).address).port == 8765
