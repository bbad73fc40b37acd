"""The client for code that is not async."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

from tallystick.client import AsyncClient, Embedding
from tallystick.generation import Answer, Retracted, Token
from tallystick.settings import Settings
from tallystick.tasks.api import WaitingTasks
from tallystick_protocol.signing import Key
from tallystick_protocol.transport.loops import new_event_loop

T = TypeVar("T")


class Client(WaitingTasks):
    """`AsyncClient` for code that is not async: runs an event loop in a thread of its own. Use as a context manager."""

    def __init__(self, key: Key, settings: Settings | None = None) -> None:
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tallystick", daemon=True)
        self._thread.start()
        self._async = AsyncClient(key, settings)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompt: str, **options: Any) -> Answer:
        """As AsyncClient.generate."""
        return self.wait(self._async.generate(prompt, **options))

    def stream(self, prompt: str | list[int], **options: Any) -> Generator[Token | Retracted, None, Answer]:
        """As AsyncClient.stream; the Answer is the generator's return value (`answer = yield from …`)."""
        stream = self._async.stream(prompt, **options)
        events = stream.__aiter__()
        try:
            while True:
                try:
                    yield self.wait(events.__anext__())  # type: ignore[arg-type]
                except StopAsyncIteration:
                    return stream.answer
        finally:
            self.wait(stream.aclose())

    def embed(self, text: str, **options: Any) -> Embedding:
        """As AsyncClient.embed."""
        return self.wait(self._async.embed(text, **options))

    def close(self) -> None:
        self.wait(self._async.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()

    @property
    def asynchronous(self) -> AsyncClient:
        """The client underneath: what it gives is awaited through `wait` alone."""
        return self._async

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work on the client's own event loop. Raises what it raises."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
