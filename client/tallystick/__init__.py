"""Tallystick's client: answers from language models that strangers serve, verified and paid for.

with tallystick.Client(key) as client:
    print(client.generate("Once upon a time").text)

`tallystick.AutoModelForCausalLM` (with the extra tallystick[torch]) is a served model for transformers' own generate().
"""

from typing import Any

from tallystick.blocking import Client
from tallystick.client import AsyncClient, Embedding
from tallystick.generation import Answer, Retracted, Stream, Token
from tallystick.settings import Settings
from tallystick.verdict import Verdict
from tallystick_protocol.sampling import Sampling

__all__ = [
    "Answer",
    "AsyncClient",
    "Client",
    "Embedding",
    "Retracted",
    "Sampling",
    "Settings",
    "Stream",
    "Token",
    "Verdict",
]


def __getattr__(name: str) -> Any:
    if name != "AutoModelForCausalLM":
        raise AttributeError(f"module 'tallystick' has no attribute {name!r}")
    try:
        from tallystick.torch.auto import AutoModelForCausalLM
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "safetensors"):
            raise
        raise ImportError(f"{name} takes torch: pip install 'tallystick[torch]'") from error
    return AutoModelForCausalLM
