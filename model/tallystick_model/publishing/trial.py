"""A manifest without pieces, for spans whose weights come from somewhere else: trials and examinations."""

from __future__ import annotations

from typing import Any

from tallystick_model.anatomy import Anatomy
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.manifest import Canary, Manifest

TRIAL_LENGTH = 512


def trial_manifest(
    config: dict[str, Any], architecture: str, labels: tuple[str, ...], anatomy: Anatomy, vocab: int
) -> Manifest:
    """What an anatomy says of a model, as a manifest that names no pieces."""
    return Manifest(
        name="trial",
        licence="none",
        architecture=architecture,
        config=config,
        task="feature-extraction",
        output=anatomy.output,
        labels=labels,
        causal=anatomy.causal,
        numerics="fp32",
        quantization=None,
        encoder_layers=anatomy.encoder_layers,
        layers=len(anatomy.layers),
        width=anatomy.width,
        vocab=vocab,
        max_length=TRIAL_LENGTH,
        pieces=(),
        tied=anatomy.tied,
        tokenizer={},
        generation={},
        pooling=None,
        norms=(),
        canary=Canary((), (), Cid.of_raw(b"")),
    )
