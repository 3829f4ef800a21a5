"""Asking agents: what they have, and the samples of a measurement. Statistics are somebody else's."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from paretoprune.cluster.errors import AgentAwayError, AgentError

TOKEN_VARIABLE = "PARETOPRUNE_AGENT_TOKEN"
ANSWER_S = 10.0  # of a device that is there, to a small question
SILENCE_S = 120.0  # the agent says something every few seconds
_MOST_PAUSE_S = 15.0  # between two looks for a device that is away
_LATER = (404, 503, 507)  # a file was dropped meanwhile, the queue or the quota is full: it passes

Answer = TypeVar("Answer")


def read_token(token_file: str | None) -> str:
    """The token from the environment, else from the file. Raises AgentError where neither has one."""
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token and token_file is not None:
        try:
            token = Path(token_file).expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            raise AgentError(f"latency.token_file {token_file} must be readable, but {error.strerror}") from error
    if not token or not token.isascii() or not token.isprintable():
        raise AgentError(
            f"an agent wants its token, but neither {TOKEN_VARIABLE} nor latency.token_file gives one; "
            "set it to what the device's --token-file holds"
        )
    return token


class AgentClient:
    """One device's agent. Every call may raise AgentAwayError (try later) or AgentError (it will not do that)."""

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        self._headers = {"Authorization": f"Bearer {token}"}
        self._sent: set[str] = set()

    def health(self) -> dict[str, Any]:
        """How busy it is; needs no token."""
        return self._small("GET", "/health")

    def info(self) -> dict[str, Any]:
        """The device, its runtimes, its state and its limits."""
        return self._small("GET", "/info")

    def send(self, content: bytes) -> str:
        """Have the device keep a file, unless it does; its hash, by which requests name it."""
        sha = hashlib.sha256(content).hexdigest()
        with self._asked("GET", f"/models/{sha}", ANSWER_S) as answer:
            said: dict[str, Any] = json.loads(answer.read(1 << 20))
            if answer.status == 200:
                return sha
            if answer.status != 404:
                raise self._error(answer.status, said)
        if len(content) > said["max_file_bytes"]:  # sent all the same, the refusal might be lost in the upload's end
            raise AgentError(
                f"the agent at {self.address} takes files of at most {said['max_file_bytes']} bytes, but this network "
                f"has {len(content)}; start it with a larger --max-file-mb"
            )
        with self._asked("PUT", f"/models/{sha}", SILENCE_S, content) as answer:
            self._checked(answer)
        return sha

    def measure(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a measurement as they come; closing the iterator ends it on the device."""
        with self._asked("POST", "/measure", SILENCE_S, json.dumps(request).encode()) as answer:
            if answer.status != 200:
                self._checked(answer)
            while line := self._line(answer):
                event: dict[str, Any] = json.loads(line)
                if event["event"] == "error":
                    raise self._error(int(event["status"]), event)
                yield event
                if event["event"] == "end":
                    return
        raise AgentAwayError(self.address, "it broke the measurement off")

    def enough(self, measurement: str) -> None:
        """Have a measurement end after its round."""
        self._small("POST", f"/measure/{measurement}/enough", b"")

    def _line(self, answer: http.client.HTTPResponse) -> bytes:
        line = answer.readline(1 << 24)
        return line if line.endswith(b"\n") else b""

    def _small(self, verb: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        with self._asked(verb, path, ANSWER_S, body) as answer:
            return self._checked(answer)

    @contextmanager
    def _asked(
        self, verb: str, path: str, timeout_s: float, body: bytes | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        place = urlsplit(self.address)
        kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
        connection = kind(place.hostname or "", place.port, timeout=ANSWER_S)
        with closing(connection):
            try:
                connection.connect()
                connection.sock.settimeout(timeout_s)
                try:
                    connection.request(verb, path, body, self._headers)
                except ConnectionError:  # it answered before it read all, and closed: the answer says why
                    if body is None:
                        raise
                yield connection.getresponse()
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                if isinstance(error, AgentAwayError):
                    raise
                raise AgentAwayError(self.address, str(error) or type(error).__name__) from error

    def _checked(self, answer: http.client.HTTPResponse) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(answer.read(1 << 20))
        if answer.status >= 400:
            raise self._error(answer.status, content)
        return content

    def _error(self, status: int, content: Mapping[str, Any]) -> AgentError:
        said = str(content.get("error", ""))[:500] or f"HTTP status {status}"
        if status in _LATER:
            return AgentAwayError(self.address, said)
        if status == 401:
            return AgentError(
                f"the agent at {self.address} must be sent the right token, but refused the one of {TOKEN_VARIABLE} or "
                "latency.token_file; take what its --token-file holds"
            )
        return AgentError(f"the agent at {self.address} says: {said}")


class AgentPool:
    """Like devices, each measurement wholly on one of them: the one with the shortest queue.

    `wait_s`: how long a measurement waits for a device that is away, from when it was first missed.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        token: str,
        wait_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.clients = [AgentClient(address, token) for address in addresses]
        self._wait_s, self._clock, self._sleep = wait_s, clock, sleep

    def run(self, task: Callable[[AgentClient], Answer]) -> Answer:
        """What `task` gives on one device; where that goes away in the middle, all of it on another, or later.

        Raises AgentAwayError once no device was there for `wait_s`, and AgentError as `task` does.
        """
        missed: float | None = None
        pause = 0.5
        while True:
            away = AgentAwayError(self.clients[0].address, "no agent answers")
            for client in self._by_queue():
                try:
                    return task(client)
                except AgentAwayError as error:
                    away = error
            missed = self._clock() if missed is None else missed
            left = missed + self._wait_s - self._clock()
            if left <= 0:
                raise away
            pause = min(2 * pause, _MOST_PAUSE_S)
            self._sleep(min(pause, left))

    def _by_queue(self) -> list[AgentClient]:
        """Those that answer, the least busy first."""
        if len(self.clients) == 1:
            return self.clients
        queues = []
        for number, client in enumerate(self.clients):
            with suppress(AgentError):
                queues.append((int(client.health().get("queue", 0)), number, client))
        return [client for _, _, client in sorted(queues, key=lambda each: each[:2])]
