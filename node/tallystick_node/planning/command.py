"""`tallystick-node plan`: the choice that `run` with span = auto would make, or what a set span brings, and why."""

from __future__ import annotations

import asyncio

from tallystick_node.config import NodeConfig
from tallystick_node.loading import Loading
from tallystick_node.node import find_model
from tallystick_node.planning.report import Plan
from tallystick_protocol.chain.book import load_book
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.peer import Peers
from tallystick_protocol.transport.directory import Directory
from tallystick_protocol.types import ZERO_ADDRESS, Address


async def make_plan(config: NodeConfig) -> Plan:
    """Fetch the manifest alone, measure this machine, survey the network, choose. Raises TallystickErrors.

    With `span` set: what that one would bring. Else, with `node` set and registered: whether it should move from where
    it is.
    """
    told = config.layers
    chain = Chain(config.rpc, load_book(config.book))
    await asyncio.to_thread(chain.check)
    model = await asyncio.to_thread(find_model, chain, config.model)
    node = Address(config.node or ZERO_ADDRESS)
    peers = Peers()
    directory = Directory(peers, chain.book.staking_domain, chain.node_of, chain.locate)
    try:
        loading = Loading(config, chain, directory, model, node)
        record = await asyncio.to_thread(chain.node, node) if config.node else None
        at = record.span if record is not None and record.active and record.model == model else None
        return await loading.plan(at, told=told)
    finally:
        await peers.close()
