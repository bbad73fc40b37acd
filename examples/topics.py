"""A small real task: is a sentence of Python's own documentation about networks or about numbers?

The sentences are the first ones of docstrings in the standard library. The model reads a sentence and then "Topic:",
and its next token should be the label's first one.
"""

from __future__ import annotations

import importlib
import inspect
import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

LABELS = {
    " network": ("socket", "ssl", "http.client", "ftplib", "smtplib", "imaplib", "poplib", "urllib.request", "asyncio",
                 "socketserver", "http.server", "http.cookiejar", "xmlrpc.client", "ipaddress"),
    " number": ("math", "cmath", "decimal", "fractions", "statistics", "random", "numbers", "operator", "array"),
}  # fmt: skip
MAX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Batch:
    """ids (batch, n), padded on the left, the label last; mask: what is real; labels: -100 but for the label."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


class Topics:
    """The task's sentences as tokens, the same in every run on one Python version."""

    def __init__(self, tokenizer: Tokenizer, per_label: int = 80, held_out: int = 24) -> None:
        self.label_ids = [tokenizer.encode(label, add_special_tokens=False).ids[0] for label in LABELS]
        rows: list[list[int]] = []
        for label, modules in zip(self.label_ids, LABELS.values(), strict=True):
            sentences = random.Random(0).sample(_sentences(modules), per_label)
            rows += [
                [*tokenizer.encode(f"{sentence}\nTopic:", add_special_tokens=False).ids[-MAX_TOKENS:], label]
                for sentence in sentences
            ]
        random.Random(1).shuffle(rows)
        self.test, self.train = rows[:held_out], rows[held_out:]

    def batch(self, step: int, size: int) -> Batch:
        """Training rows of a step."""
        return as_batch([self.train[(step * size + at) % len(self.train)] for at in range(size)])


def as_batch(rows: list[list[int]]) -> Batch:
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    return Batch(ids, mask, labels)


def _sentences(modules: tuple[str, ...]) -> list[str]:
    """First sentences of the docstrings in these modules, sorted."""
    found = set()
    for name in modules:
        module = importlib.import_module(name)
        for _, member in inspect.getmembers(module):
            members = (
                [member, *(inner for _, inner in inspect.getmembers(member))] if inspect.isclass(member) else [member]
            )
            for one in members:
                text = (inspect.getdoc(one) or "") if getattr(one, "__module__", "") == name else ""
                sentence = " ".join(text.split("\n\n")[0].split())
                if 30 < len(sentence) < 160:
                    found.add(sentence)
    return sorted(found)


def accuracy(logits: torch.Tensor, batch: Batch, label_ids: list[int]) -> float:
    """Share of sentences whose right label is the likelier one; logits (sentences, tokens, vocabulary)."""
    right = torch.tensor([label_ids.index(int(one)) for one in batch.ids[:, -1]])
    return float((logits[:, -2, label_ids].argmax(dim=1) == right).float().mean())
