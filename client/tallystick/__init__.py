"""Tallystick's client: answers from language models that strangers serve, verified and paid for.

with tallystick.Client(key) as client:
    print(client.generate("Once upon a time").text)
"""

from tallystick.blocking import Client
from tallystick.client import AsyncClient, Embedding, Settings
from tallystick.generation import Answer, Retracted, Stream, Token
from tallystick.sampling import Sampling
from tallystick.verdict import Verdict

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
