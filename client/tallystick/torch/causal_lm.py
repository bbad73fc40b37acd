"""A served causal model as a transformers `PreTrainedModel`: forward runs over the network, `generate` is their own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from tallystick.passes import Hidden
from tallystick.torch import adapter_files
from tallystick.torch.backend import Backend, Passing
from tallystick.torch.caches import REOPENINGS, NetworkCache, Overturned, ReplayCache, SessionCache
from tallystick.torch.contrastive import contrastive_search
from tallystick.torch.lora import Lora
from tallystick.torch.parts import embedding, linear_modules, targeted
from tallystick.torch.passing import Call, run
from tallystick.verdict import Verdict
from tallystick_model.config import build_config
from tallystick_protocol.errors import ConfigError, CorruptResult

_INERT = frozenset({"cache_position", "return_dict", "num_items_in_batch", "tokenizer"})
"""Arguments of forward that change nothing here, or concern the loss or (`tokenizer`) stop strings alone."""


class NetworkModelForCausalLM(PreTrainedModel, GenerationMixin):
    """Layers at nodes, tokens and what is tuned here. `close` it, or use it as a context manager.

    Plain token ids go through sessions: cached, receipted, checked as the policy says. Embeddings, adapters and hidden
    states go through passes, which compute the whole sequence each time and have gradients (docs/sdk.md).
    """

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, backend: Backend) -> None:
        """Raises ConfigError for a model that generates no text."""
        manifest = backend.manifest
        if manifest.output != "logits" or manifest.encoder_layers or not manifest.causal:
            raise ConfigError(f"{manifest.name} is no causal language model")
        super().__init__(build_config(manifest.config))
        self.loss_type = "ForCausalLM"
        self.generation_config = _generation_config(self.config, manifest.generation)
        self.lora: Lora | None = None
        self.verdicts: list[Verdict] = []
        self._backend = backend
        self._passing: Passing | None = None
        self._embedding: list[torch.nn.Module] = []
        self._made: list[NetworkCache] = []

    def __enter__(self) -> NetworkModelForCausalLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every session and pass that is open, without further checks."""
        self._drop_caches()
        if self._passing is not None:
            self._backend.wait(self._passing.close())
            self._passing = None
        self._backend.close()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def verdict(self) -> Verdict | None:
        """What was checked of the last sessions or passes, and what they cost."""
        return self.verdicts[-1] if self.verdicts else None

    # -- what is tuned here

    def get_input_embeddings(self) -> torch.nn.Module:
        """The model's own embedding of token ids, frozen; fetched once. Raises ManifestError, ContentError."""
        if not self._embedding:
            path: Path = self._backend.wait(self._backend.piece("embed"))
            self._embedding.append(embedding(self._backend.manifest, path))
        return self._embedding[0]

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        raise ConfigError("the embedding of a served model is fixed: tune inputs_embeds instead")

    def get_output_embeddings(self) -> None:
        return None

    def attach_lora(self, targets: tuple[str, ...], rank: int = 8, alpha: float = 16.0) -> Lora:
        """Adapters on the linear modules whose names end so; from then on every forward uses them. Raises ConfigError.

        The model's parameters are theirs. `detach_lora` gives the plain model back.
        """
        manifest = self._backend.manifest
        self.lora = Lora(targeted(linear_modules(manifest), targets), rank, alpha, manifest.name)
        return self.lora

    def load_lora(self, folder: Path) -> Lora:
        """Attach the adapters that `Lora.save` or PEFT wrote into a folder.

        Raises ConfigError for those of another model, or with settings that are not supported.
        """
        found, own = adapter_files.read(Path(folder)), linear_modules(self._backend.manifest)
        for name, shape in found.shapes.items():
            if own.get(name) != shape:
                raise ConfigError(f"{folder} adapts {name[:120]} {shape}, the model has {own.get(name)} there")
        lora = Lora(found.shapes, found.rank, found.alpha, self._backend.manifest.name)
        lora.take(found)
        self.lora = lora
        return lora

    def detach_lora(self) -> None:
        self.lora = None

    # -- forward

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: NetworkCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As a causal model of transformers, but a cache is kept only where `use_cache=True` asks for one.

        Columns that attention_mask hides are not sent; their logits are zero. Padding never shifts positions:
        position_ids must be those of the sequence without it. Raises ConfigError for arguments that have no meaning
        here, and what sessions and passes raise; Overturned where a cache that was handed in is of no use any more.
        """
        strange = [name for name, value in kwargs.items() if value is not None and name not in _INERT]
        if strange or output_attentions:
            raise ConfigError(f"a served model takes no {', '.join(strange) or 'output_attentions'}")
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ConfigError("give input_ids or inputs_embeds, one of both")
        if type(logits_to_keep) is not int or not logits_to_keep >= 0:
            raise ConfigError("logits_to_keep is a number of last columns, or 0 for all")
        cache, temporary = self._cache_for(given, past_key_values, bool(use_cache), bool(output_hidden_states))
        shown = _new_columns(cache, given, attention_mask)
        _check_positions(cache, shown, position_ids)
        keep = min(logits_to_keep or given.shape[1], given.shape[1])
        try:
            if isinstance(cache, SessionCache):
                logits, hidden = self._by_sessions(cache, given, shown, keep), None
            else:
                form: Hidden = "all" if output_hidden_states else "none"
                logits, hidden = self._by_passes(cache, given, shown, keep, form)
            if temporary:
                cache.settle()
        except BaseException as error:
            if temporary:
                cache.close()
            if temporary and isinstance(error, Overturned):  # every time on other nodes, until there are none
                return self.forward(
                    input_ids, attention_mask, position_ids, None, inputs_embeds, labels, use_cache,
                    output_hidden_states, output_attentions, logits_to_keep, **kwargs,
                )  # fmt: skip
            raise
        cache.show(shown)
        loss = None
        if labels is not None:
            counted = {"num_items_in_batch": kwargs["num_items_in_batch"]} if "num_items_in_batch" in kwargs else {}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **counted)
        kept = None if temporary else cache
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kept, hidden_states=hidden)

    def _cache_for(
        self, given: torch.Tensor, past: NetworkCache | None, use_cache: bool, states: bool
    ) -> tuple[NetworkCache, bool]:
        """The cache that the rows go to, and whether it ends with this call."""
        replays = self._replays(given.is_floating_point(), states)
        if past is not None:
            if not isinstance(past, NetworkCache) or (replays and isinstance(past, SessionCache)):
                raise ConfigError(
                    "past_key_values is one of this model's own caches; with embeddings, adapters or hidden states,"
                    " from the first token on"
                )
            return past, False
        if not use_cache or torch.is_grad_enabled():
            return self._new_cache(replays, given.shape[1]), True
        self._made.append(self._new_cache(replays, 2 * given.shape[1]))
        return self._made[-1], False

    def _replays(self, embeds: bool, states: bool) -> bool:
        return embeds or states or self.lora is not None

    def _new_cache(self, replays: bool, max_length: int) -> NetworkCache:
        if replays:
            return ReplayCache()
        return SessionCache(self._backend, min(max_length, self._backend.manifest.max_length), self.verdicts.append)

    def _by_sessions(self, cache: SessionCache, ids: torch.Tensor, shown: torch.Tensor, keep: int) -> torch.Tensor:
        fed = [row[real].tolist() for row, real in zip(ids, shown, strict=True)]
        found = cache.extend(fed, shown[:, -keep:].sum(dim=1).tolist())
        return _spread(found, shown[:, -keep:])

    def _by_passes(
        self, cache: NetworkCache, given: torch.Tensor, shown: torch.Tensor, keep: int, form: Hidden
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        assert isinstance(cache, ReplayCache)
        rows = cache.joined([row[real] for row, real in zip(given, shown, strict=True)], self._embed)
        if any(not len(row) for row in rows):
            raise ConfigError("a row of the batch is all padding")
        names, adapters = (self.lora.names, self.lora.tensors()) if self.lora is not None else ([], [])
        wanted = shown[:, -keep:].sum(dim=1).tolist()
        call = Call(self._backend, self._passes(), [max(1, count) for count in wanted], form, names)
        found, states = run(call, rows, adapters)
        cache.rows = [row.detach() for row in rows]
        logits = _spread([one[len(one) - count :] for one, count in zip(found, wanted, strict=True)], shown[:, -keep:])
        if form == "none":
            return logits, None
        new = shown.sum(dim=1).tolist()
        layers = zip(*([layer[len(layer) - count :] for layer in one] for one, count in zip(states, new, strict=True)),
                     strict=True)  # fmt: skip
        return logits, tuple(_spread(list(layer), shown)[..., : self.config.hidden_size] for layer in layers)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.get_input_embeddings()(ids)
        return embedded

    def _passes(self) -> Passing:
        if self._passing is None:
            self._passing = self._backend.wait(self._backend.passes())
            self.verdicts.append(self._passing.verdict)
        return self._passing

    # -- generation

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`, contrastive search included; sessions are checked and paid before it returns.

        When a node was caught after tokens were chosen from its logits, it is begun anew with the same random numbers,
        or CorruptResult is raised where the tokens were streamed already.
        """
        kwargs = self._with_contrastive(args, kwargs)
        state = torch.get_rng_state()
        for _ in range(REOPENINGS):
            before = len(self._made)
            try:
                result = super().generate(*args, **kwargs)
                held = getattr(result, "past_key_values", None)
                for cache in self._made[before:]:
                    if cache is not held:
                        cache.settle()
                self._made[before:] = [held] if isinstance(held, NetworkCache) and held in self._made[before:] else []
                return result
            except Overturned:
                self._drop_caches(before)
                if kwargs.get("streamer") is not None or kwargs.get("past_key_values") is not None:
                    break
                torch.set_rng_state(state)
            except BaseException:
                self._drop_caches(before)
                raise
        raise CorruptResult("what was generated came of a node that was caught in the end; generate it again")

    def _with_contrastive(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        options = {
            name: value for name, value in kwargs.items() if name not in ("generation_config", "custom_generate")
        }
        settings, _ = self._prepare_generation_config(config, **{
            name: value for name, value in options.items() if hasattr(GenerationConfig(), name)
        })  # fmt: skip
        mode = settings.get_generation_mode(kwargs.get("assistant_model"))
        if mode is not GenerationMode.CONTRASTIVE_SEARCH or kwargs.get("custom_generate") is not None:
            return kwargs
        return kwargs | {"custom_generate": functools.partial(contrastive_search, streamer=kwargs.get("streamer"))}

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ConfigError("the cache of a served model is at its nodes: leave cache_implementation out")
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
        elif generation_config.use_cache is not False and generation_mode is not GenerationMode.CONTRASTIVE_SEARCH:
            replays = self._replays(
                model_kwargs.get("inputs_embeds") is not None, bool(generation_config.output_hidden_states)
            )
            self._made.append(self._new_cache(replays, max_cache_length + 1))
            model_kwargs["past_key_values"] = self._made[-1]

    def _drop_caches(self, first: int = 0) -> None:
        for cache in self._made[first:]:
            cache.close()
        del self._made[first:]


def _generation_config(config: Any, said: dict[str, Any]) -> GenerationConfig:
    """The checkpoint's own settings, as the manifest says them."""
    settings = GenerationConfig.from_model_config(config)
    names = {"eos": "eos_token_id", "bos": "bos_token_id"}
    for name, value in said.items():
        value = value[0] if isinstance(value, list) and len(value) == 1 else value or None
        setattr(settings, names.get(name, name), value)
    return settings


def _new_columns(cache: NetworkCache, given: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, n) bool: which of the new columns are real. Raises ConfigError for a mask of another form."""
    past, (batch, count) = cache.get_seq_length(), given.shape[:2]
    if cache.shown and len(cache.shown) != batch:
        raise ConfigError(f"this cache holds a batch of {len(cache.shown)}, not of {batch}")
    if mask is None:
        return torch.ones(batch, count, dtype=torch.bool)
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (count, past + count):
        raise ConfigError(f"attention_mask is (batch, columns): {batch} rows of {past + count}")
    if mask.shape[1] == past + count and past and cache.shown != mask[:, :past].bool().tolist():
        raise ConfigError("attention_mask hides other columns than before")
    return mask[:, -count:].bool()


def _check_positions(cache: NetworkCache, shown: torch.Tensor, position_ids: torch.Tensor | None) -> None:
    if position_ids is None:
        return
    before = torch.tensor([cache.num_rows(row) for row in range(len(cache.shown))] or [0])
    expected = before[:, None] + shown.long().cumsum(dim=1) - 1
    if not bool(((position_ids == expected) | ~shown).all()):
        raise ConfigError("position_ids are others than those of the sequence without its padding")


def _spread(found: list[torch.Tensor], shown: torch.Tensor) -> torch.Tensor:
    """(batch, n, values): each row's found values at its real columns, zero at the others."""
    out = torch.zeros(*shown.shape, found[0].shape[-1])
    return out.masked_scatter(shown[:, :, None].expand_as(out), torch.cat(found))
