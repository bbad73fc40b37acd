"""Why a contract refused, as a sentence: custom errors are decoded with our ABIs."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from json import loads
from typing import Any

from eth_abi.abi import decode
from eth_abi.exceptions import DecodingError

from tallystick_protocol.chain.book import NAMES
from tallystick_protocol.signing import keccak

_HINTS = {
    "TooLittle": "stake more tokens first",
    "TooMuch": "ask for less",
    "BadRange": "the model has no such layers",
    "KeyTaken": "this hot key belongs to another node for ever: make a new one",
    "Expired": "sign again; is this machine's clock right?",
    "NotSigned": "it was signed for something else, or by another key",
    "InvalidAccountNonce": "its nonce was used, or another order comes first: sign again",
    "ERC3009InvalidSignature": "it was signed for something else, or by another key",
    "ERC3009InvalidAuthorizationTime": "it is too late: sign again",
    "ERC3009UsedAuthorization": "it was used already",
    "NotReady": "the delay has not passed yet",
    "NotServing": "register what the node serves first: tallystick-node run --join",
    "InJail": "a beat of the node frees it",
    "Held": "a dispute is open",
    "OutOfTime": "this step of the dispute has not begun, or is over",
    "NothingToWin": "the node has no stake, or was slashed as much as it may be for now",
    "HeaderAvailable": "draw with the seed block's header",
    "Early": "the epoch is not over yet",
    "ERC20InsufficientBalance": "get tokens first",
    "ERC20InsufficientAllowance": "approve the tokens first",
    "Known": "the model is on chain already",
}


@cache
def _errors() -> dict[bytes, tuple[str, list[str], list[str]]]:
    """selector -> (name, argument types, argument names)"""
    found: dict[bytes, tuple[str, list[str], list[str]]] = {}
    for name in NAMES:
        for entry in loads((files("tallystick_protocol.chain") / "abi" / f"{name}.json").read_text()):
            if entry["type"] == "error":
                kinds = [argument["type"] for argument in entry["inputs"]]
                selector = keccak(f"{entry['name']}({','.join(kinds)})".encode())[:4]
                found[selector] = (entry["name"], kinds, [argument["name"] for argument in entry["inputs"]])
    return found


def explain(error: Exception) -> str:
    """One sentence for what web3 raised: the contract's own error with its values, or the node's message."""
    data = _revert_data(error)
    if data is None or data[:4] not in _errors():
        text = str(getattr(error, "message", None) or error)
        return text[:300]
    name, kinds, names = _errors()[data[:4]]
    try:
        values = decode(kinds, data[4:])
    except (DecodingError, ValueError, OverflowError):
        values = ()
    said = ", ".join(
        f"{key}={('0x' + value.hex()) if isinstance(value, bytes) else value}"
        for key, value in zip(names, values, strict=False)
    )
    hint = _HINTS.get(name)
    return f"the contract refused: {name}({said})" + (f"; {hint}" if hint else "")


def _revert_data(error: Exception) -> bytes | None:
    candidates: list[Any] = [getattr(error, "data", None), *error.args]
    response = getattr(error, "rpc_response", None)
    if isinstance(response, dict) and isinstance(response.get("error"), dict):
        candidates.append(response["error"].get("data"))
    for candidate in candidates:
        if isinstance(candidate, dict):
            candidate = candidate.get("data")
        if isinstance(candidate, str) and candidate.startswith("0x") and len(candidate) >= 10:
            try:
                return bytes.fromhex(candidate[2:])
            except ValueError:
                continue
    return None
