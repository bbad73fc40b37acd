"""Every task once, on models of a running network: `python examples/tasks_tour.py TASK=MODEL …`.

TALLYSTICK_RPC, TALLYSTICK_BOOK, TALLYSTICK_KEY and TALLYSTICK_PASSWORD_FILE are read as by the command line; MODEL is
an id, part of an id or a name. For example `fill-mask=0x4b1f question-answering=0x91c2`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tallystick
from tallystick_protocol.keystore import open_keystore, read_password

TEXT = "A tally stick was split lengthwise. The lender kept the stock, the borrower kept the foil."


def perform(client: tallystick.Client, task: str, model: str) -> Any:
    """One task's answer: a list in the shape of the Hugging Face task schema."""
    match task:
        case "text-generation":
            return client.text_generation("The split tally", model=model, max_new_tokens=16, num_beams=3)
        case "fill-mask":
            return client.fill_mask("The lender keeps the [MASK].", model=model, top_k=3)
        case "text-classification":
            return client.text_classification(TEXT, model=model)
        case "token-classification":
            return client.token_classification(TEXT, model=model, aggregation_strategy="simple")
        case "question-answering":
            return client.question_answering("Who kept the foil?", TEXT, model=model)
        case "summarization":
            return client.summarization(TEXT, model=model, max_new_tokens=40)
        case "translation":
            return client.translation(TEXT, model=model, max_new_tokens=60)
        case "feature-extraction":
            return [vector.tolist()[:8] for vector in client.feature_extraction(TEXT, model=model)]
    raise SystemExit(f"unknown task {task!r}")


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    key = open_keystore(
        Path(os.environ["TALLYSTICK_KEY"]), read_password(Path(os.environ["TALLYSTICK_PASSWORD_FILE"]))
    )
    settings = tallystick.Settings(
        rpc=os.environ.get("TALLYSTICK_RPC", "http://127.0.0.1:8545"),
        book=Path(os.environ.get("TALLYSTICK_BOOK", "deployments/31337.json")),
        sources=list(filter(None, os.environ.get("TALLYSTICK_SOURCES", "").split(","))),
    )
    with tallystick.Client(key, settings) as client:
        for argument in sys.argv[1:]:
            task, _, model = argument.partition("=")
            print(task, json.dumps(perform(client, task, model), ensure_ascii=False))


if __name__ == "__main__":
    main()
