"""Which of this machine's devices a node uses, and which layers go where: the setting `device`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from tallystick_model.devices import CPU, Placement, find_devices, forbid_tf32, free_bytes, place
from tallystick_model.memory import device_layer_bytes
from tallystick_model.numeric_class import numeric_class
from tallystick_node.config import NodeConfig
from tallystick_node.planning.measure import KEPT_FREE
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Digest, Span

log = logging.getLogger(__name__)


def accelerators(
    config: NodeConfig,
    manifest: Manifest,
    classify: Callable[[Manifest, Sequence[torch.device]], Digest] = numeric_class,
) -> tuple[torch.device, ...]:
    """The devices to be used beside the CPU, in order. Raises ConfigError for one that is not there.

    device = "auto" with canonical execution uses them only if they pass the class test for this model.
    """
    found = find_devices(config.device) if config.tensor_parallel == 1 else ()
    if not found:
        return ()
    forbid_tf32()
    if config.device == "auto" and config.execution == "canonical":
        names = ", ".join(map(str, found))
        try:
            canonical = any(classify(manifest, found))
        except RuntimeError as error:  # which torch raises for whatever a device cannot do, or has no memory for
            log.warning("the class test fails on %s, %s runs on the CPU: %.160s", names, manifest.name, error)
            return ()
        if not canonical:
            log.warning(
                '%s is not canonical for %s, which runs on the CPU; execution = "stock" would use it',
                names, manifest.name,
            )  # fmt: skip
            return ()
    return found


def room_on(devices: Sequence[torch.device], manifest: Manifest, cache_bytes: int) -> list[tuple[torch.device, int]]:
    """Bytes for weights on each device: what is free, less a tenth, all caches, and one layer for the class test."""
    aside = cache_bytes + max(device_layer_bytes(manifest))
    return [(device, max(0, int(free_bytes(device) * (1 - KEPT_FREE)) - aside)) for device in devices]


def place_span(setting: str, manifest: Manifest, span: Span, room: Sequence[tuple[torch.device, int]]) -> Placement:
    """Where the layers go. room: accelerators, and bytes for weights there.

    setting: "auto" uses accelerators for a whole span or not at all; with others the CPU takes what does not fit.
    """
    placement = place(span, device_layer_bytes(manifest), room)
    if setting != "auto" or CPU not in placement.devices:
        return placement
    if room:
        names = ", ".join(str(device) for device, _ in room)
        log.warning("layers %s do not fit the free memory of %s: they run on the CPU", span, names)
    return Placement.on(CPU, span)
