"""The node's settings: one TOML file, the environment (TALLYSTICK_NODE_…) and flags, the later ones first.

A key that does not exist is an error wherever it stands, so that a typo never means "default".
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from tallystick_protocol.errors import BadMessage, ConfigError
from tallystick_protocol.signing import address_bytes, checksum_address
from tallystick_protocol.transport.scopes import is_loopback
from tallystick_protocol.types import Address, Span

ENV_PREFIX = "TALLYSTICK_NODE_"
C = TypeVar("C", bound=BaseSettings)


def _is_here(announced: str) -> bool:
    """Whether HOST:PORT is on this machine."""
    return is_loopback(announced.rpartition(":")[0].strip("[]"))


class NodeConfig(BaseSettings):
    """Every setting. Money in token base units (1e-18), times in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    rpc: str = Field("http://127.0.0.1:8545", description="JSON-RPC of the chain")
    book: Path = Field(Path("deployments/31337.json"), description="address book that scripts/deploy.js wrote")
    state: Path = Field(Path("~/.local/state/tallystick-node"), description="folder for databases and pieces")
    host: str = Field("127.0.0.1", description="address to serve on, 0.0.0.0 for all; none: no port, through relays")
    port: int = Field(0, ge=0, le=65535, description="port to serve on; 0 takes a free one")
    tls: Literal["auto", "on", "off"] = Field("auto", description="auto: TLS unless host is loopback; off: never")
    announce: list[str] = Field(default_factory=list, description="HOST:PORT that others dial; empty: host and port")
    relays: list[str] = Field(default_factory=list, description="0xRELAY@HOST:PORT to be reached through")
    relay_max_price: int = Field(10**8, ge=0, description="most that a relay may ask for a byte")
    relay_budget: int = Field(10**19, ge=0, description="most that the hot key puts into the channel to each relay")
    tls_rotate_s: float = Field(30 * 86400.0, ge=60, description="age at which the next TLS key comes into use")
    model: str = Field("", description="model id (0x…) to serve; empty: the only one on chain")
    span: str = Field("auto", description="layers to serve, start:end, for example 0:3; auto: the node chooses")
    execution: Literal["canonical", "stock"] = Field(
        "canonical", description="stock: results cannot be checked by equality, and clients refuse them"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$", description="auto, cpu, cuda (all of them) or cuda:N"
    )
    tensor_parallel: int = Field(1, ge=1, le=64, description="processes that share a span; more than 1 takes stock")
    sources: list[str] = Field(default_factory=list, description="gateways to fetch pieces from, besides other nodes")
    hot_key: Path = Field(..., description="keystore V3 file of the hot key, which signs receipts")
    cold_key: Path | None = Field(None, description="keystore V3 file of the cold key; only needed by `join`")
    password_file: Path | None = Field(None, description="file whose first line opens the keystores")
    node: str = Field("", description="this node's address (its cold key); empty: read from the cold keystore")
    payee: str = Field("", description="address that earnings go to; empty: the node")
    operator: str = Field("", description="who runs this node, self-declared; empty: the node")
    stake: int = Field(10**21, ge=0, description="stake to have when joining")
    price: int = Field(10**12, ge=0, description="price per position and layer")
    credit_positions: int = Field(
        256, ge=128, le=1 << 20, description="positions served before a voucher is due; 32 more for each open session"
    )
    unconfirmed_pool: int = Field(10**16, ge=0, description="credit to all clients against unconfirmed funding")
    max_length: int = Field(4096, ge=32, le=1 << 22, description="positions of one session at most")
    memory: int = Field(0, ge=0, description="memory that weights and caches may take; 0: what is free, less a tenth")
    class_cache: Path = Field(
        Path("~/.cache/tallystick-node/classes"), description="folder for measured numeric classes, which nodes share"
    )
    store: Path | None = Field(None, description="folder for pieces, which nodes may share; empty: in state")
    cache_bytes: int = Field(1 << 30, ge=1 << 20, description="memory for all sessions' caches and kept rows")
    keep_prefix_s: float = Field(
        300.0, ge=0, le=86400, description="how long rows of ended sessions are kept for reuse"
    )
    step_rows: int = Field(0, ge=0, le=4096, description="rows of one forward at most; 0: 96 on the CPU, 256 elsewhere")
    max_sessions: int = Field(64, ge=1, le=4096, description="sessions open at once")
    lease_s: float = Field(30.0, ge=0, le=600, description="how long a session waits for a client that lost its link")
    drain_s: float = Field(15.0, ge=0, le=3600, description="how long clients have to move on when the node is stopped")
    threads: int = Field(0, ge=0, le=256, description="threads for matrix products at most; 0: one for each core")
    check_class_s: float = Field(3600.0, ge=1, description="how often canary and class are checked again")
    look_around_s: float = Field(900.0, ge=1, description="how often a node with span = auto looks for a better place")
    dwell_s: float = Field(7200.0, ge=0, description="how long such a node stays before it moves for more throughput")
    redeem_after_s: float = Field(24 * 3600.0, ge=0.5, description="age at which vouchers are redeemed")
    jury: Literal["on", "off"] = Field("on", description="off: the node leaves its seats in Court, and is fined for it")
    jury_bytes: int = Field(64 << 20, ge=1 << 20, le=64 << 20, description="evidence of one case at most")
    jury_positions: int = Field(4096, ge=32, le=4096, description="positions that are recomputed for a case at most")
    jury_seconds: float = Field(3600.0, ge=1, description="time that recomputing a case may take")
    jury_disk: int = Field(8 << 30, ge=1 << 20, description="evidence and pieces of spans not served here, at most")
    jury_appeal_max: int = Field(0, ge=0, description="bonds of appeals, open or lost, in cases of others at most")
    appeal_max: int = Field(
        3 * 10**20, ge=0, description="bonds of appeals, open or lost, in cases by or against this node at most"
    )
    jury_poll_s: float = Field(15.0, ge=0.1, le=600, description="how often the Court is looked at")
    offer_lifetime_s: int = Field(3600, ge=60, le=86400, description="how long an offer holds")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="what is logged")

    @model_validator(mode="before")
    @classmethod
    def _no_flags(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name, value in values.items():
            if isinstance(value, bool):  # which pydantic would take for 0 or 1
                raise ValueError(f"{name} is not true or false")
        return values

    @property
    def num_threads(self) -> int:
        """Threads of each process that computes: as many as this one may use cores, where nothing else is said."""
        return self.threads or max(_cores() // self.tensor_parallel, 1)

    @field_validator("node", "payee", "operator")
    @classmethod
    def _address(cls, value: str) -> str:
        """The EIP-55 spelling: addresses are compared as text everywhere."""
        try:
            return value and checksum_address(address_bytes(Address(value)))
        except BadMessage as error:
            raise ValueError(error.message) from None

    @model_validator(mode="after")
    def _ranks_are_stock(self) -> NodeConfig:
        if self.tensor_parallel > 1 and self.execution != "stock":
            raise ValueError(
                'tensor_parallel = 2 or more gives results of no numeric class: it takes execution = "stock"'
            )
        if self.tensor_parallel > 1 and self.device.startswith("cuda"):
            raise ValueError(f'tensor_parallel = {self.tensor_parallel} runs on the CPU: set device = "cpu" or "auto"')
        return self

    @model_validator(mode="after")
    def _has_a_way_in(self) -> NodeConfig:
        if self.host == "none" and not self.relays:
            raise ValueError('host = "none" takes relays: without a port nobody could reach this node')
        if self.tls == "off" and (self.relays or not all(map(_is_here, self.announce))):
            raise ValueError('tls = "off" is for loopback alone: leave out relays and what is announced beyond it')
        if len(self.relays) + max(1, len(self.announce)) > 4:
            raise ValueError("four addresses and relays at most")
        return self

    @property
    def is_encrypted(self) -> bool:
        """Whether this node speaks TLS: everywhere but on loopback, where it may."""
        if self.tls == "auto":
            return not is_loopback(self.host) or bool(self.relays or self.announce)
        return self.tls == "on"

    @property
    def layers(self) -> Span | None:
        """The span; None when the node chooses it. Raises ConfigError."""
        if self.span == "auto":
            return None
        start, colon, end = self.span.partition(":")
        if not (colon and self.span.isascii() and start.isdigit() and end.isdigit() and int(start) < int(end)):
            raise ConfigError(f"span = {self.span!r} is neither auto nor start:end with start < end, for example 0:3")
        return Span(int(start), int(end))

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


def load_config(path: Path | None, flags: dict[str, Any]) -> NodeConfig:
    """The node's settings. Raises ConfigError as `load_settings` does."""
    return load_settings(NodeConfig, ENV_PREFIX, path, flags)


def load_settings(cls: type[C], prefix: str, path: Path | None, flags: dict[str, Any]) -> C:
    """Flags over environment over file over defaults. Raises ConfigError naming the key and where it stands."""
    known = cls.model_fields
    for name in os.environ:
        if name.upper().startswith(prefix) and name[len(prefix) :].lower() not in known:
            raise ConfigError(f"the environment sets {name}, which is no setting; see `tallystick-node config show`")
    if path is not None:
        _check_file(path, set(known))
    bound = type("BoundConfig", (cls,), {"model_config": {**cls.model_config, "toml_file": path}})
    try:
        config = bound(**flags)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"setting {name or '?'}: {first['msg']}; see `tallystick-node config show`") from None
    except SettingsError as error:
        raise ConfigError(f'{error}: lists are written as JSON there, for example ["http://…"]') from None
    assert isinstance(config, cls)
    return config


def process_environment() -> dict[str, str]:
    """The environment that the libraries of this process read."""
    return dict(os.environ)


def _check_file(path: Path, known: set[str]) -> None:
    try:
        text = path.read_text("utf-8")
        value = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for key in value:
        if key not in known:
            spelled = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[].=]""")
            line = next((n for n, row in enumerate(text.splitlines(), 1) if spelled.match(row)), 0)
            raise ConfigError(f"{path}:{line}: {key!r} is no setting; see `tallystick-node config show`")


def _cores() -> int:
    """Cores that this process may use, as its affinity and its control group say."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (Path("/sys/fs/cgroup") / "cpu.max").read_text().split()
        return count if quota == "max" else max(min(count, int(quota) // int(period)), 1)
    except (OSError, ValueError, ZeroDivisionError):
        return count
