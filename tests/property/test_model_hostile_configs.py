"""Any config either builds and can be probed, or is refused with a ManifestError: nothing else ever escapes."""

from __future__ import annotations

from typing import Any

import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoints import BERT, GPT2, SMALL
from tallystick_model.anatomy import dissect
from tallystick_model.config import checkpoint_config
from tallystick_model.skeleton import build_skeleton
from tallystick_protocol.errors import ManifestError

BASES = [
    (checkpoint_config(transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 1}).to_dict()), "LlamaForCausalLM"),
    (checkpoint_config(transformers.GPT2Config(**GPT2 | {"n_layer": 1}).to_dict()), "GPT2LMHeadModel"),
    (checkpoint_config(transformers.BertConfig(**BERT | {"num_hidden_layers": 1}).to_dict()), "BertModel"),
]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.sampled_from([1 << 17, 1 << 31, 1 << 62, -(1 << 40)]),
    st.floats(), st.sampled_from(["", "gelu", "silu", "32", "default", "yarn", "../x", "a\x00"]),
)  # fmt: skip
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor", "x"]), SCALARS, max_size=4),
)
LENGTHS = ("num_hidden_layers", "n_layer")


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(BASES), st.data())
def test_a_hostile_config_is_built_or_refused(base: tuple[dict[str, Any], str], data: st.DataObject) -> None:
    config, architecture = base
    keys = [key for key in sorted(config) if key not in LENGTHS] + ["x", "model_type"]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=2))
    try:
        dissect(build_skeleton({**config, **changes}, architecture))
    except ManifestError as error:
        assert len(error.message) < 600
