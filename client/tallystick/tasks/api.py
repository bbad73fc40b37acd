"""The tasks as methods of the SDK's clients."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from tallystick.tasks.backend import Answers, Backend, TaskAnswers, check_ids, look_up
from tallystick.tasks.classification import text_classification, token_classification
from tallystick.tasks.features import feature_extraction
from tallystick.tasks.fill_mask import fill_mask
from tallystick.tasks.passes import one_pass, plain
from tallystick.tasks.prompts import Message
from tallystick.tasks.question_answering import question_answering
from tallystick.tasks.text2text import summarization, translation
from tallystick.tasks.text_generation import text_generation
from tallystick.verdict import Policy

T = TypeVar("T")


class Tasks:
    """What `AsyncClient` offers besides generate, stream and embed. Options: see the functions in `tallystick.tasks`.

    Every answer is a list in the shape of the Hugging Face task schema, with `.route` and `.verdict`.
    """

    async def text_generation(
        self: Backend, inputs: str | Sequence[Message] | list[int], **options: Any
    ) -> TaskAnswers:
        """[{"generated_text"}]: a text, a conversation or ids go on. See `tasks.text_generation`."""
        return await text_generation(self, inputs, **options)

    async def fill_mask(self: Backend, text: str, **options: Any) -> Answers[Any]:
        """[{"sequence", "score", "token", "token_str"}]. See `tasks.fill_mask`."""
        return await fill_mask(self, text, **options)

    async def text_classification(self: Backend, text: str, **options: Any) -> TaskAnswers:
        """[{"label", "score"}]. See `tasks.classification`."""
        return await text_classification(self, text, **options)

    async def token_classification(self: Backend, text: str, **options: Any) -> TaskAnswers:
        """[{"entity" or "entity_group", "score", "word", "start", "end"}]. See `tasks.classification`."""
        return await token_classification(self, text, **options)

    async def question_answering(self: Backend, question: str, context: str, **options: Any) -> TaskAnswers:
        """[{"answer", "score", "start", "end"}]. See `tasks.question_answering`."""
        return await question_answering(self, question, context, **options)

    async def summarization(self: Backend, text: str, **options: Any) -> TaskAnswers:
        """[{"summary_text"}]. See `tasks.text2text`."""
        return await summarization(self, text, **options)

    async def translation(self: Backend, text: str, **options: Any) -> TaskAnswers:
        """[{"translation_text"}]. See `tasks.text2text`."""
        return await translation(self, text, **options)

    async def feature_extraction(self: Backend, text: str, **options: Any) -> Answers[np.ndarray]:
        """[array]: a vector, or the hidden states of all positions. See `tasks.features`."""
        return await feature_extraction(self, text, **options)

    async def encode(self: Backend, text: str, *, model: str = "") -> list[int]:
        """A text's token ids, special ones included."""
        record, _ = await self.model(model)
        return (await self.network.tokens(record)).encode(text)

    async def decode(self: Backend, ids: list[int], *, model: str = "", special: bool = False) -> str:
        """The text of token ids; special ones are left out unless wanted. Raises ConfigError for other ids."""
        record, manifest = await self.model(model)
        check_ids(manifest, ids)
        return (await self.network.tokens(record)).decode(ids, special=special)

    async def predictions(
        self: Backend, ids: list[int], *, model: str = "", verify: Policy = "audit"
    ) -> Answers[np.ndarray]:
        """[rows]: what leaves a one-stack encoder at every position (tokens, values): logits, states or scores."""
        served = await look_up(self, model, ("logits", "hidden", "scores"), "predictions for every position")
        rows, route, verdict = await one_pass(self, served, plain(ids), None, verify)
        return Answers([rows], route, verdict)


class _Waits(Protocol):
    """What the synchronous client has: the asynchronous one, and a way to wait for it."""

    @property
    def _async(self) -> Any: ...

    def wait(self, work: Coroutine[Any, Any, T]) -> T: ...


class WaitingTasks:
    """The same methods for `Client`, which waits for them."""

    def text_generation(self: _Waits, inputs: str | Sequence[Message] | list[int], **options: Any) -> TaskAnswers:
        """As AsyncClient.text_generation."""
        return self.wait(self._async.text_generation(inputs, **options))

    def fill_mask(self: _Waits, text: str, **options: Any) -> Answers[Any]:
        """As AsyncClient.fill_mask."""
        return self.wait(self._async.fill_mask(text, **options))

    def text_classification(self: _Waits, text: str, **options: Any) -> TaskAnswers:
        """As AsyncClient.text_classification."""
        return self.wait(self._async.text_classification(text, **options))

    def token_classification(self: _Waits, text: str, **options: Any) -> TaskAnswers:
        """As AsyncClient.token_classification."""
        return self.wait(self._async.token_classification(text, **options))

    def question_answering(self: _Waits, question: str, context: str, **options: Any) -> TaskAnswers:
        """As AsyncClient.question_answering."""
        return self.wait(self._async.question_answering(question, context, **options))

    def summarization(self: _Waits, text: str, **options: Any) -> TaskAnswers:
        """As AsyncClient.summarization."""
        return self.wait(self._async.summarization(text, **options))

    def translation(self: _Waits, text: str, **options: Any) -> TaskAnswers:
        """As AsyncClient.translation."""
        return self.wait(self._async.translation(text, **options))

    def feature_extraction(self: _Waits, text: str, **options: Any) -> Answers[np.ndarray]:
        """As AsyncClient.feature_extraction."""
        return self.wait(self._async.feature_extraction(text, **options))

    def encode(self: _Waits, text: str, **options: Any) -> list[int]:
        """As AsyncClient.encode."""
        return self.wait(self._async.encode(text, **options))

    def decode(self: _Waits, ids: list[int], **options: Any) -> str:
        """As AsyncClient.decode."""
        text: str = self.wait(self._async.decode(ids, **options))
        return text

    def predictions(self: _Waits, ids: list[int], **options: Any) -> Answers[np.ndarray]:
        """As AsyncClient.predictions."""
        return self.wait(self._async.predictions(ids, **options))
