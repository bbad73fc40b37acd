"""What a checkpoint was trained for, from transformers' own tables, and the names of its scores."""

from __future__ import annotations

from typing import Any

from transformers.models.auto import modeling_auto as auto

from tallystick_model.config import config_class
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest_checks import MAX_LABELS

_TABLES = (
    ("text2text-generation", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ("text-generation", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ("text-generation", auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
    ("fill-mask", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    ("text-classification", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ("token-classification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ("question-answering", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    ("feature-extraction", auto.MODEL_MAPPING_NAMES),
)


def task_of(config: dict[str, Any], architecture: str) -> str:
    """The task of a class by the table that lists it; by its name's ending where none does.

    transformers counts models that read sound as sequence to sequence; on text they are decoders.
    """
    model_type = config.get("model_type")
    for task, table in _TABLES:
        names = table.get(model_type, ())
        if task == "text2text-generation" and not config_class(config).is_encoder_decoder:
            continue
        if architecture in ((names,) if isinstance(names, str) else tuple(names)):
            return task
    endings = {
        "ForCausalLM": "text-generation",
        "LMHeadModel": "text-generation",
        "ForMaskedLM": "fill-mask",
        "ForConditionalGeneration": "text2text-generation",
    }
    return next((task for ending, task in endings.items() if architecture.endswith(ending)), "feature-extraction")


def labels_of(config: dict[str, Any], task: str) -> tuple[str, ...]:
    """The names of a classifier's scores in order; empty for other tasks.

    config: the checkpoint's own, whose `id2label` names them. Raises ManifestError for labels that are not 0 to n - 1,
    or are no printable text of at most 100 characters.
    """
    if task == "question-answering":
        return ("start", "end")
    if task not in ("text-classification", "token-classification"):
        return ()
    table = config.get("id2label")
    if table is None:
        count = config.get("num_labels", 2)
        if type(count) is not int or not 1 <= count <= MAX_LABELS:
            raise ManifestError(f"config num_labels is {str(count)[:40]!r}, not 1 to {MAX_LABELS}")
        return tuple(f"LABEL_{index}" for index in range(count))
    if not isinstance(table, dict) or not 0 < len(table) <= MAX_LABELS:
        raise ManifestError(f"config id2label is an object of 1 to {MAX_LABELS} labels")
    names = {str(key): name for key, name in table.items()}
    if set(names) != {str(index) for index in range(len(names))}:
        raise ManifestError(f"config id2label does not name 0 to {len(names) - 1}, each once")
    found = tuple(names[str(index)] for index in range(len(names)))
    for name in found:
        if not isinstance(name, str) or not 0 < len(name) <= 100 or not name.isprintable():
            raise ManifestError(f"the label {str(name)[:40]!r} is not printable text of at most 100 characters")
    return found
