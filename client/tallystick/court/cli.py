"""`tallystick evidence`, `accuse`, `case` and `appeal`: what there is against a node, and the case in Court."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tallystick.court.accusing import accuse, load_evidence
from tallystick.court.appealing import appeal
from tallystick_protocol.chain.court import State
from tallystick_protocol.chain.docket import LAST_ROUND, Docket, Standing
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.evidence.checking import Evidence
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Digest, Wei


def add(
    commands: Any, open_chain: Callable[[argparse.Namespace], Chain], open_key: Callable[[argparse.Namespace], Key]
) -> None:
    """Add the commands. open_chain, open_key: what the parsed options name."""
    evidence = commands.add_parser("evidence", help="check a bundle of evidence, keep it, and tell what it is about")
    evidence.set_defaults(command=lambda options: _evidence(options, open_chain(options)))
    accusing = commands.add_parser("accuse", help="accuse a node in Court of what evidence shows, for a bond")
    accusing.add_argument("--at", action="append", default=[], help="where jurors find it, http://NUMBER:PORT")
    accusing.add_argument("--max-bond", type=int, help="token base units that the bond may take")
    accusing.set_defaults(command=lambda options: _accuse(options, Wallet(open_chain(options), open_key(options))))
    for parser in (evidence, accusing):
        parser.add_argument("what", help="a file, or the CID of evidence in the store")
        parser.add_argument("--store", type=Path, default=os.environ.get("TALLYSTICK_STORE", "content"))
        parser.add_argument("--json", action="store_true", help="one JSON object")
    case = commands.add_parser("case", help="how a case in Court stands")
    case.set_defaults(command=lambda options: _case(options, open_chain(options)))
    appealing = commands.add_parser("appeal", help="appeal against what the jury of a case says, for a bond")
    appealing.add_argument("--max-bond", type=int, help="token base units that the bond may take")
    appealing.add_argument("--json", action="store_true", help="one JSON object")
    appealing.set_defaults(command=lambda options: _appeal(options, Wallet(open_chain(options), open_key(options))))
    for parser in (case, appealing):
        parser.add_argument("id", help="as `tallystick accuse` told it, 0x…")


def _evidence(options: argparse.Namespace, chain: Chain) -> int:
    evidence, cid = load_evidence(options.what, LocalStore(Path(options.store)), chain.book.staking_domain)
    _tell(options, _about(evidence, cid))
    return 0


async def _accuse(options: argparse.Namespace, wallet: Wallet) -> int:
    domain = wallet.chain.book.staking_domain
    evidence, cid = load_evidence(options.what, LocalStore(Path(options.store)), domain)
    most = None if options.max_bond is None else Wei(options.max_bond)
    opened = await asyncio.to_thread(accuse, wallet, evidence, cid, options.at, most)
    _tell(options, {**_about(evidence, cid), "case": "0x" + opened.id.hex(), "bond_wei": opened.bond})
    return 0


def _case(options: argparse.Namespace, chain: Chain) -> int:
    docket, id_ = Docket(chain), _id(options.id)
    standing = docket.standing(id_)
    told = _told(standing)
    if standing.state is State.DRAWN and standing.round < LAST_ROUND:
        times = docket.times()
        begin = standing.commit_end + times.reveal
        told |= {
            "votes_say": docket.verdict_so_far(id_).name.lower(), "appeal_bond_wei": docket.appeal_bond(id_),
            "appeal_from": begin, "appeal_until": begin + times.appeal,
        }  # fmt: skip
    print(json.dumps(told))
    return 0


async def _appeal(options: argparse.Namespace, wallet: Wallet) -> int:
    most = None if options.max_bond is None else Wei(options.max_bond)
    made = await asyncio.to_thread(appeal, wallet, _id(options.id), most)
    _tell(options, {"round": made.round, "against": made.against.name.lower(), "bond_wei": made.bond})
    return 0


def _id(text: str) -> Digest:
    try:
        id_ = Digest(bytes.fromhex(text.removeprefix("0x")))
    except ValueError:
        id_ = Digest(b"")
    if len(id_) != 32:
        raise ConfigError(f"{text!r} is not the id of a case (0x and 64 hex digits)")
    return id_


def _told(standing: Standing) -> dict[str, Any]:
    return {
        "state": standing.state.name.lower(), "verdict": standing.verdict.name.lower(), "round": standing.round,
        "accused": standing.accused, "accuser": standing.accuser, "commit_end": standing.commit_end,
    }  # fmt: skip


def _about(evidence: Evidence, cid: Cid) -> dict[str, Any]:
    accused, bundle = evidence.accused, evidence.bundle
    return {
        "cid": str(cid), "node": accused.node, "model": "0x" + accused.model.hex(),
        "layers": [accused.start, accused.end], "positions": [accused.first, accused.last],
        "class": accused.numeric_class.hex(), "signed_at": accused.at,
        "receipt": "0x" + evidence.digest.hex(), "outputs": bundle.outputs is not None, "bytes": len(bundle.encode()),
    }  # fmt: skip


def _tell(options: argparse.Namespace, value: dict[str, Any]) -> None:
    if options.json:
        print(json.dumps(value))
    else:
        print("\n".join(f"{name}: {told}" for name, told in value.items()))
