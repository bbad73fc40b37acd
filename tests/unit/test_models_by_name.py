"""A model is found by its name although others on the chain have manifests that nobody holds."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tallystick.network import Network
from tallystick_protocol.errors import BlockMissing, UnknownModel


def finder(names: dict[bytes, str | None]) -> Any:
    """A Network over a chain of these models; None: its manifest cannot be had."""
    network = Network.__new__(Network)
    network.chain = SimpleNamespace(all_models=lambda: [SimpleNamespace(id=id_) for id_ in names])  # type: ignore[assignment]

    async def manifest(record: Any) -> Any:
        if names[record.id] is None:
            raise BlockMissing("bafk", [])
        return SimpleNamespace(name=names[record.id])

    network.manifest = manifest  # type: ignore[method-assign,assignment]
    return network


def test_a_manifest_that_nobody_holds_does_not_hide_other_models() -> None:
    network = finder({b"\x01" * 32: None, b"\x02" * 32: "wanted", b"\x03" * 32: "other"})
    assert asyncio.run(network.find("wanted")).id == b"\x02" * 32


def test_unread_manifests_are_told_when_no_name_matches() -> None:
    network = finder({b"\x01" * 32: None, b"\x03" * 32: "other"})
    with pytest.raises(UnknownModel, match=r"0 models match 'wanted'.* of 1 the manifest cannot be read .*bafk"):
        asyncio.run(network.find("wanted"))
