"""A client that does something in the middle of a generation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tallystick import AsyncClient
from tallystick.decoding import Decoder


class Watched(AsyncClient):
    """`act` is called once, in the decoder where a row of `position` is asked for first."""

    def watch(self, position: int, act: Callable[[Decoder], None]) -> None:
        self._at, self._act = position, act

    def decoder(self, *arguments: Any, **options: Any) -> Decoder:
        decoder = super().decoder(*arguments, **options)
        row = decoder.row

        async def watched(position: int, *, beam: int = 0) -> Any:
            if position == self._at:
                self._at = -1
                await asyncio.to_thread(self._act, decoder)
            return await row(position, beam=beam)

        decoder.row = watched  # type: ignore[method-assign]
        return decoder
