"""A small copy of a config: the same architecture and, unless told, the same layers, with everything else narrow.

Sizes are known by the names that transformers' config classes give them. What is smaller already stays.
"""

from __future__ import annotations

from typing import Any

from tallystick_model.config_keys import PER_LAYER

_SIZES: dict[int, str] = {
    64: """hidden_size d_model n_embd dim emb_dim embedding_size embedding_dim word_embed_proj_dim mamba_d_ssm
        attention_hidden_size linear_head_dim project_dim width""",
    96: """intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner hidden_dim ffn_hidden_size dff dim_ff
        shared_intermediate_size intermediate_size_mlp prefix_dense_intermediate_size dense_intermediate_size""",
    32: """moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size expert_ffn_hidden_size expert_intermediate_size
        kv_lora_rank q_lora_rank o_lora_rank global_head_dim index_head_dim d_inner feed_forward_size""",
    16: """head_dim d_kv kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim qk_head_dim attention_head_size d_head
        dim_head mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim swa_head_dim state_size
        mamba_d_state ssm_state_size time_step_rank mamba_dt_rank hidden_size_per_layer_input rotary_dim
        laurel_rank gated_norm_rank d_rel global_rotary_dim ssm_cfg chunk_size mamba_chunk_size""",
    8: "n_routed_experts num_experts num_local_experts moe_num_experts moe_num_primary_experts num_buckets",
    4: """num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads index_n_heads
        linear_num_key_heads linear_num_value_heads mamba_n_heads mamba_num_heads swa_num_attention_heads
        linear_num_heads zero_expert_num""",
    2: """num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_topk moe_k top_k_experts
        top_k num_selected_experts n_group topk_group mamba_n_groups n_groups""",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}

_LAYERS = """num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers
    num_encoder_layers num_dec_layers n_layer_decoder"""
LAYERS = frozenset(_LAYERS.split())


def shrink(values: dict[str, Any], *, layers: int | None = None, vocab: int | None = None) -> dict[str, Any]:
    """The same values with sizes cut down; nested configs too. layers: how many at most, None to keep them."""
    small: dict[str, Any] = {}
    equal = values.get("num_key_value_heads") == values.get("num_attention_heads")
    for name, value in values.items():
        if name == PER_LAYER and isinstance(value, dict):
            small[name] = {layer: shrink(fields) for layer, fields in value.items()}
        elif isinstance(value, dict):
            small[name] = shrink(value, layers=layers, vocab=vocab) if "model_type" in value else value
        elif type(value) is not int:
            small[name] = value
        elif name in SIZES:
            small[name] = min(value, 4 if name == "num_key_value_heads" and equal else SIZES[name])
        elif layers is not None and name in LAYERS:
            small[name] = min(value, layers)
        elif vocab is not None and name == "vocab_size":
            small[name] = min(value, vocab)
        else:
            small[name] = value
    return small
