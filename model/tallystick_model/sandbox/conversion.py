"""Turning a slow tokenizer's files, or a GGUF file's, into tokenizer.json with transformers' own converters: runs in
the worker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tallystick_model.sandbox.gguf_tokens import fit
from tallystick_model.sandbox.limited import Limits, ask
from tallystick_model.sandbox.sentence_pieces import written_out

LIMITS = Limits(cpu_s=120, wall_s=300.0, memory_bytes=16 << 30, output_bytes=1 << 16)


def convert_tokenizer(folder: Path, out: Path, *, gguf: str | None = None) -> None:
    """Write tokenizer.json (and its companions) of a checkpoint folder, or of a GGUF file in it, into `out`.

    Raises ManifestError when transformers has no conversion for it, or it goes over a limit.
    """
    request = {"folder": str(folder.resolve()), "out": str(out.resolve()), "gguf": gguf}
    mapped = (folder / gguf).stat().st_size if gguf else 0
    ask("tokenizer conversion", request, replace(LIMITS, memory_bytes=LIMITS.memory_bytes + mapped))


def convert(request: dict[str, Any]) -> bool:
    """The inner side. Raises whatever transformers raises."""
    from transformers import AutoTokenizer

    options = {"gguf_file": request["gguf"]} if request["gguf"] else {}
    tokenizer = AutoTokenizer.from_pretrained(
        request["folder"], local_files_only=True, trust_remote_code=False, use_fast=True, **options
    )
    if not getattr(tokenizer, "is_fast", False):
        written_out(tokenizer).save(f"{request['out']}/tokenizer.json")
        return True
    tokenizer.save_pretrained(request["out"])
    if request["gguf"]:
        from transformers.integrations.gguf import get_gguf_tokenizer

        fit(Path(request["out"]), get_gguf_tokenizer(f"{request['folder']}/{request['gguf']}")[1]["tokens"])
    return True
