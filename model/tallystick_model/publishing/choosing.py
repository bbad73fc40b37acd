"""Which class a checkpoint is published as, and which others its weights would make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tallystick_model.anatomy import dissect
from tallystick_model.architectures import base_class, model_class, served_classes
from tallystick_model.config import build_config
from tallystick_model.publishing.checkpoint import TensorSource
from tallystick_model.publishing.matching import as_stored, match, unmade
from tallystick_model.publishing.precheck import Outline
from tallystick_model.publishing.tasks import labels_of, task_of
from tallystick_model.skeleton import build_skeleton
from tallystick_protocol.errors import ManifestError


def architecture_of(source: TensorSource, config: dict[str, Any], asked: str | None) -> str:
    """The class that is asked for; else the base model where the folder is one of sentence-transformers, whose config
    names the class that it was trained from; else the one class in config.json.

    config: what the manifest will hold. Raises ManifestError, with the classes that these weights make, when that class
    is not served, or none or several are named.
    """
    named = source.config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    base = base_class(config["model_type"])
    if asked is None and base and source.read_json("modules.json") is not None:
        return names[0] if len(names) == 1 and task_of(config, names[0]) == "feature-extraction" else base
    if asked is None and len(names) != 1:
        raise ManifestError("config.json must name one class in `architectures`" + _advice(source, config, ""))
    architecture = asked or names[0]
    with suggesting(source, config, architecture):
        model_class(build_config(config), architecture)
    return architecture


@contextmanager
def suggesting(source: TensorSource, config: dict[str, Any], architecture: str) -> Iterator[None]:
    """While held, a ManifestError also says which other classes the weights make, and how one of them is chosen."""
    try:
        yield
    except ManifestError as error:
        if advice := _advice(source, config, architecture):
            raise ManifestError(error.message + advice) from None
        raise


def _advice(source: TensorSource, config: dict[str, Any], refused: str) -> str:
    others = [name for name in served_classes(config["model_type"]) if name != refused]
    made = [f"{name} ({task_of(config, name)})" for name in others if _makes(Outline(source), config, name)]
    if not made:
        return ""
    return f"; these weights make {', '.join(made)}: choose one with --architecture {made[0].partition(' ')[0]}"


def _makes(source: TensorSource, config: dict[str, Any], architecture: str) -> bool:
    """Whether a checkpoint holds all that a class needs. Most that do not are known by their names alone."""
    task = task_of(config, architecture)
    try:
        skeleton = build_skeleton(as_stored(config, source), architecture, labels_of(source.config, task))
        if any(name.startswith(f"{stack}.") for name in unmade(source, skeleton) for stack in skeleton.stacks):
            return False
        anatomy = dissect(skeleton)
        match(source, skeleton, anatomy)
    except ManifestError:
        return False
    return anatomy.causal or task != "text-generation"
