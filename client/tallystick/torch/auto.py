"""The door: a model of the network by its name, as transformers users open one."""

from __future__ import annotations

from tallystick.blocking import Client
from tallystick.settings import Settings
from tallystick.torch.backend import NetworkBackend
from tallystick.torch.causal_lm import NetworkModelForCausalLM
from tallystick.verdict import Policy
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.signing import Key


class AutoModelForCausalLM:
    """Opens served causal models for transformers' own `generate()`, and for tuning."""

    @staticmethod
    def from_network(
        model: str = "",
        *,
        client: Client | None = None,
        key: Key | None = None,
        settings: Settings | None = None,
        verify: Policy = "audit",
    ) -> NetworkModelForCausalLM:
        """The model by id, part of an id or name; empty takes the only one on chain.

        client: one that is open, or `key` (and `settings`) for one of its own, which the model's `close` closes.
        verify: as for `Client.generate`. Raises ConfigError, UnknownModel, ChainError, ContentError.
        """
        if (client is None) == (key is None):
            raise ConfigError("give from_network a client or a key")
        own = None if key is None else Client(key, settings)
        try:
            backend = NetworkBackend(own or client, model, verify, owned=own is not None)  # type: ignore[arg-type]
            return NetworkModelForCausalLM(backend)
        except BaseException:
            if own is not None:
                own.close()
            raise
