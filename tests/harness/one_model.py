"""What the tasks' stand-in backends share: one model, its tokenizer, no network."""

from __future__ import annotations

from pathlib import Path

from tallystick.tasks.api import Tasks
from tallystick.tokens import Tokens
from tallystick_protocol.chain.reads import ModelRecord
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Digest, ModelId


class OneModel(Tasks):
    """Whatever model is asked for, it is this one."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """folder: where the checkpoint's tokenizer lies."""
        self.manifest = manifest
        self.network = self
        self._tokens = Tokens(folder / "tokenizer.json", folder / "tokenizer_config.json")

    async def tokens(self, record: ModelRecord) -> Tokens:
        return self._tokens

    async def model(self, text: str) -> tuple[ModelRecord, Manifest]:
        zero = Digest(bytes(32))
        return ModelRecord(ModelId(bytes(32)), zero, zero, self.manifest.layers), self.manifest
