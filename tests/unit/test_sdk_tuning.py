"""Soft prompts and adapters tuned over spans, against the same tuning of the whole model by plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.sdk_backend import served_llama
from tallystick.torch.lora import Lora
from tallystick_protocol.errors import ConfigError

IDS = torch.arange(2, 22).view(2, 10) * 13 % 300
WIDTH = 72


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


def attach_local(whole: Any, lora: Lora) -> Any:
    """The same adapters on the whole model, by hooks; returns what takes them off again."""

    def hook(a: torch.Tensor, b: torch.Tensor) -> Any:
        return lambda _, args, out: out + torch.nn.functional.linear(args[0] @ a.T, b) * lora.scale

    handles = [
        whole.get_submodule(name).register_forward_hook(hook(a, b))
        for name, a, b in zip(lora.names, lora.a, lora.b, strict=True)
    ]
    return lambda: [handle.remove() for handle in handles]


def test_the_embedding_is_the_models_own() -> None:
    whole, served, _ = served_llama()
    assert torch.equal(served.get_input_embeddings()(IDS), whole.get_input_embeddings()(IDS))
    with pytest.raises(ConfigError):
        served.set_input_embeddings(torch.nn.Embedding(3, 3))


def test_a_soft_prompt_gets_the_loss_and_the_gradient_of_the_whole_model() -> None:
    whole, served, _ = served_llama()
    found = []
    for model in (whole, served):
        torch.manual_seed(0)
        soft = torch.nn.Parameter(torch.randn(1, 4, WIDTH) * 0.5)
        embeds = torch.cat([soft.expand(2, -1, -1), model.get_input_embeddings()(IDS)], dim=1)
        labels = torch.cat([torch.full((2, 4), -100), IDS], dim=1)
        mask = torch.ones_like(labels)
        mask[1, 9:], labels[1, 9:] = 0, -100
        loss = model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
        loss.backward()
        found.append((loss.detach(), soft.grad))
    (loss, grad), (served_loss, served_grad) = found
    assert close(served_loss, loss) and close(served_grad, grad)


def test_adapters_get_the_loss_and_the_gradients_of_the_whole_model() -> None:
    whole, served, _ = served_llama()
    torch.manual_seed(1)
    lora = served.attach_lora(("q_proj", "down_proj"), rank=3, alpha=6.0)
    try:
        assert len(lora.names) == 8 and {id(p) for p in served.parameters()} == {id(p) for p in lora.parameters()}
        with torch.no_grad():
            for b in lora.b:
                b.normal_(std=0.1)
        loss = served(IDS, labels=IDS).loss
        loss.backward()
        grads = [parameter.grad for parameter in lora.parameters()]
        lora.zero_grad()
        detach = attach_local(whole, lora)
        expected = whole(IDS, labels=IDS).loss
        expected.backward()
        assert close(loss, expected)
        assert all(close(one, parameter.grad) for one, parameter in zip(grads, lora.parameters(), strict=True))
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
        assert torch.equal(served.generate(IDS, **options), whole.generate(IDS, **options))
        detach()
        assert not torch.equal(served.generate(IDS, **options), whole.generate(IDS, **options))
    finally:
        served.detach_lora()


def test_a_few_steps_of_tuning_are_those_of_the_whole_model() -> None:
    whole, served, _ = served_llama()
    curves = []
    for model in (whole, served):
        torch.manual_seed(2)
        soft = torch.nn.Parameter(torch.randn(1, 3, WIDTH) * 0.1)
        optimiser = torch.optim.AdamW([soft], lr=0.1)
        labels = torch.cat([torch.full((2, 3), -100), IDS], dim=1)
        curve = []
        for _ in range(4):
            embeds = torch.cat([soft.expand(2, -1, -1), model.get_input_embeddings()(IDS)], dim=1)
            loss = model(inputs_embeds=embeds, labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[1][-1] < curves[1][0]


def test_generates_after_a_soft_prompt() -> None:
    whole, served, _ = served_llama()
    torch.manual_seed(3)
    soft = torch.randn(1, 5, WIDTH)
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        found = [model.generate(inputs_embeds=soft, max_new_tokens=6, pad_token_id=2, **options)
                 for model in (whole, served)]  # fmt: skip
        assert torch.equal(*found)


def test_adapters_are_a_folder_as_peft_writes_it_and_read_again(tmp_path: Path) -> None:
    _, served, _ = served_llama()
    lora = served.attach_lora(("up_proj", "q_proj"), rank=2, alpha=5.0)
    for b in lora.b:
        torch.nn.init.normal_(b)
    lora.save(tmp_path / "adapters")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and config["bias"] == "none"
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 5.0, lora.names)
    stored = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj"
    assert stored[f"{name}.lora_A.weight"].shape == (2, WIDTH) and stored[f"{name}.lora_B.weight"].shape == (100, 2)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = served(ids).logits
        served.detach_lora()
        again = served.load_lora(tmp_path / "adapters")
        assert again.names == lora.names and again.scale == 2.5 and torch.equal(served(ids).logits, before)
    with pytest.raises(ConfigError, match="another rank"):
        served.attach_lora(("up_proj", "q_proj"), rank=3).load(tmp_path / "adapters")
    served.detach_lora()


def _changed(folder: Path, drop: str = "", **settings: Any) -> None:
    lora = Lora({"model.layers.0.mlp.up_proj": (WIDTH, 100)}, rank=2, alpha=4.0)
    lora.save(folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if drop:
        stored = load_file(folder / "adapter_model.safetensors")
        save_file({name: one for name, one in stored.items() if drop not in name}, folder / "adapter_model.safetensors")


def test_loads_adapters_with_the_settings_that_peft_writes(tmp_path: Path) -> None:
    _, served, _ = served_llama()
    _changed(
        tmp_path, alpha_pattern={}, auto_mapping=None, fan_in_fan_out=False, init_lora_weights=True, loftq_config={},
        lora_dropout=0.05, megatron_core="megatron.core", qalora_group_size=16, use_dora=False, use_rslora=False,
        target_modules=["up_proj"], layers_to_transform=[0], peft_version="0.19.1", base_model_name_or_path="../",
    )  # fmt: skip
    assert served.load_lora(tmp_path).names == ["model.layers.0.mlp.up_proj"]
    served.detach_lora()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "does not describe LoRA"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"use_rslora": True}, "use_rslora"),
        ({"alpha_pattern": {"up_proj": 1}}, "alpha_pattern"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"something_new": 1}, "something_new"),
        ({"r": 3}, "two matrices of rank 3"),
        ({"r": True}, "r is no positive number"),
        ({"lora_alpha": "16"}, "lora_alpha is no positive number"),
        ({"drop": "lora_B"}, "two matrices"),
        ({"drop": "lora"}, "holds no adapters"),
    ],
)
def test_refuses_adapters_that_would_be_others_here(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    _, served, _ = served_llama()
    served.detach_lora()
    _changed(tmp_path, **settings)
    with pytest.raises(ConfigError, match=said):
        served.load_lora(tmp_path)
    assert served.lora is None


def test_refuses_adapters_of_another_model(tmp_path: Path) -> None:
    _, served, _ = served_llama()
    for name, width in (("model.layers.9.mlp.up_proj", WIDTH), ("model.layers.0.mlp.up_proj", WIDTH + 1)):
        Lora({name: (width, 100)}, rank=2, alpha=4.0).save(tmp_path)
        with pytest.raises(ConfigError, match="the model has"):
            served.load_lora(tmp_path)


def test_refuses_adapters_that_no_node_takes() -> None:
    _, served, _ = served_llama()
    with pytest.raises(ConfigError, match="there are down_proj"):
        served.attach_lora(("nothing",))
    with pytest.raises(ConfigError, match="rank from 1 to 64"):
        served.attach_lora(("q_proj",), rank=65)
    assert served.lora is None
