"""The relay's settings: a TOML file of its own, the environment (TALLYSTICK_RELAY_…), flags; the later ones first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from tallystick_node.config import load_settings

RELAY_PREFIX = "TALLYSTICK_RELAY_"


class RelayConfig(BaseSettings):
    """Every setting. Money in token base units (1e-18), times in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix=RELAY_PREFIX, extra="forbid", frozen=True)

    rpc: str = Field("http://127.0.0.1:8545", description="JSON-RPC of the chain")
    book: Path = Field(Path("deployments/31337.json"), description="address book that scripts/deploy.js wrote")
    state: Path = Field(Path("~/.local/state/tallystick-relay"), description="folder for the ledger and TLS keys")
    host: str = Field("0.0.0.0", description="address to listen on")
    port: int = Field(443, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    announce: list[str] = Field(default_factory=list, description="HOST:PORT that others dial; empty: host and port")
    key: Path = Field(..., description="keystore V3 file of the relay's key: its name, and who is paid")
    password_file: Path | None = Field(None, description="file whose first line opens the keystore")
    price: int = Field(10**7, ge=0, description="price of a byte that is copied, either way; 0: free")
    credit_bytes: int = Field(64 << 20, ge=1 << 20, le=1 << 36, description="copied for a node before a voucher is due")
    bytes_per_s: int = Field(0, ge=0, description="most that is copied for one node in a second; 0: no limit")
    max_nodes: int = Field(256, ge=1, le=1 << 16, description="nodes registered at once")
    sockets_per_node: int = Field(64, ge=1, le=4096, description="connections to one node at once")
    max_sockets: int = Field(2048, ge=1, le=1 << 16, description="connections to all nodes at once")
    idle_s: float = Field(120.0, ge=20, description="a connection on which nothing moves is cut after this")
    redeem_after_s: float = Field(24 * 3600.0, ge=0.5, description="age at which vouchers are redeemed")
    tls_rotate_s: float = Field(30 * 86400.0, ge=60, description="age at which the next TLS key comes into use")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="what is logged")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls))


def load_relay_config(path: Path | None, flags: dict[str, Any]) -> RelayConfig:
    """Raises ConfigError as `load_settings` does."""
    return load_settings(RelayConfig, RELAY_PREFIX, path, flags)
