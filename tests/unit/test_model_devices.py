"""Layers on several devices: where they go, and that rows, caches and results cross the borders unchanged.

No machine of ours has a GPU: devices are pretended (tests/harness/pretended.py), their arithmetic is the CPU's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harness import checkpoints
from harness.checkpoints import SMALL, Published, published
from harness.pretended import pretending
from tallystick_model.anatomy import dissect
from tallystick_model.canary import check_canary
from tallystick_model.canonical import attention as canonical_attention
from tallystick_model.canonical import products as canonical_products
from tallystick_model.canonical.cache import KvCache
from tallystick_model.config import checkpoint_config
from tallystick_model.devices import CPU, Placement, find_devices, place
from tallystick_model.gradients import Adapter, SpanGradients
from tallystick_model.loader import assemble, load_span, vocabulary
from tallystick_model.memory import device_layer_bytes, largest_piece_bytes, layer_bytes
from tallystick_model.numeric_class import STOCK, numeric_class
from tallystick_model.publishing.trial import trial_manifest
from tallystick_model.segments import Segment
from tallystick_model.skeleton import build_skeleton, named_weights
from tallystick_model.span import Execution, SpanModel
from tallystick_model.stock import StockCache
from tallystick_node.config import NodeConfig
from tallystick_node.placing import accelerators, place_span, room_on
from tallystick_node.planning.measure import check_memory, machine_for
from tallystick_protocol.errors import ConfigError, ManifestError
from tallystick_protocol.types import Span

A, B = torch.device("cuda", 0), torch.device("cuda", 1)
SIZES = (30, 10, 10, 10, 25)
IDS = (torch.arange(22) * 7919 + 13) % 300


@pytest.fixture(autouse=True)
def as_on_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes what devices do: there is no machine code for them."""
    torch.set_num_threads(1)
    monkeypatch.setattr(canonical_products, "products", lambda dtype: None)
    monkeypatch.setattr(canonical_attention, "attention", lambda *sizes: None)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Published:
    root = tmp_path_factory.mktemp("devices")
    torch.set_num_threads(1)
    return published(checkpoints.gpt2(root / "checkpoint"), root)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pretended GPUs, with 1 MB and 200 kB of free memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((1_000_000, 200_000)[device.index], 1 << 30))


@pytest.mark.parametrize(
    ("span", "room", "expected"),
    [
        (Span(0, 5), [], [CPU] * 5),
        (Span(0, 5), [(A, 85)], [A] * 5),
        (Span(0, 5), [(A, 84)], [A] * 4 + [CPU]),
        (Span(0, 5), [(A, 45), (B, 45)], [A, A, B, B, B]),
        (Span(0, 5), [(A, 29), (B, 50)], [B, B, B, CPU, CPU]),
        (Span(1, 4), [(A, 10), (B, 10)], [A, B, CPU]),
        (Span(3, 5), [(A, 9), (B, 9)], [CPU, CPU]),
        (Span(1, 5), [(A, 0), (B, 20)], [B, B, CPU, CPU]),
    ],
)
def test_consecutive_layers_fill_one_device_after_the_other_and_the_cpu_takes_the_rest(
    span: Span, room: list[tuple[torch.device, int]], expected: list[torch.device]
) -> None:
    placement = place(span, SIZES, room)
    assert list(placement.devices) == expected
    assert [placement.of_layer(layer) for layer in range(span.start, span.end)] == expected


def test_what_comes_before_the_layers_is_with_the_first_and_the_head_with_the_last() -> None:
    placement = Placement(3, (A, B, B, CPU))
    roles = ("embed", "shared", "layer.3", "layer.5", "layer.6", "head", "tied")
    assert [placement.of_weight(role) for role in roles] == [A, A, A, B, CPU, CPU, CPU]
    assert str(placement) == "3:4 on cuda:0, 4:6 on cuda:1, 6:7 on cpu"
    assert placement.distinct == (A, B, CPU)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_devices("auto") == find_devices("cpu") == ()
    for setting in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=r'"cuda.*sees no CUDA device here; set device = "cpu" or "auto"'):
            find_devices(setting)


def test_devices_by_name(two_gpus: None) -> None:
    assert find_devices("cpu") == ()
    assert find_devices("auto") == find_devices("cuda") == (A, B)
    assert find_devices("cuda:1") == (B,)
    with pytest.raises(ConfigError, match="sees cuda:0, cuda:1 here"):
        find_devices("cuda:2")


def test_pretended_devices_do_not_mix() -> None:
    with pretending():
        ours, theirs = torch.ones(3).to(A), torch.ones(3, device=B)
        assert (ours.device, theirs.device, (ours * 2 + torch.tensor(1.0)).device) == (A, B, A)
        for other in (theirs, torch.ones(3)):
            with pytest.raises(RuntimeError, match="operands on c"):
                ours + other
        assert torch.equal((ours + theirs.to(A)).to(CPU), torch.full((3,), 2.0))


class Small:
    """A small random model of transformers in spans, without publishing."""

    def __init__(self, cls: Any, config: Any) -> None:
        torch.manual_seed(0)
        self.values, self.name = checkpoint_config(config.to_dict()), cls.__name__
        self.weights = {name: tensor.detach() for name, tensor in named_weights(cls(config).eval()).items()}
        skeleton = build_skeleton(self.values, self.name)
        self.anatomy = dissect(skeleton)
        vocab = vocabulary(skeleton.config)
        self.manifest = trial_manifest(self.values, self.name, (), self.anatomy, vocab)

    def load(self, span: Span, execution: Execution, placement: Placement | None = None) -> SpanModel:
        def source(piece: str, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
            return {name: self.weights[name].clone() for name in wanted}

        skeleton = build_skeleton(self.values, self.name)
        spliced = assemble(skeleton, self.anatomy, span, source, execution, "fp32", placement)
        return SpanModel(self.manifest, span, spliced, execution)


def answers(model: SpanModel, rows: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
    """Chunks, a crop, steps, and a second session that goes on from the first; one call where there is no cache."""
    if not model.causal:
        return model.forward([Segment(None, 0, rows)])[0]
    cache, fork = model.new_cache(64, memory), model.new_cache(64, memory)
    assert cache is not None and fork is not None
    out, at = [], 0
    for count in (13, 1, 5):
        out.append(model.forward([Segment(cache, at, rows[at : at + count])])[0])
        at += count
    cache.crop(at := 17)
    fork.take(cache, 0, at)  # type: ignore[arg-type]
    out.append(model.forward([Segment(fork, at, rows[at : at + 2])])[0])
    out.append(model.forward([Segment(cache, at, rows[at:])])[0])
    return torch.cat(out)


HEADS = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
T5 = {"vocab_size": 320, "d_model": 72, "d_kv": 12, "d_ff": 100, "num_layers": 4, "num_heads": 6}
FAMILIES: dict[str, tuple[Any, Any, Execution]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SMALL), "canonical"),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(**SMALL, head_dim=12, sliding_window=7),
        "canonical",
    ),
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig(**SMALL, num_local_experts=4), "canonical"),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**HEADS), "canonical"),
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config(**T5, decoder_start_token_id=0), "stock"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_span_over_three_devices_computes_what_one_on_the_cpu_does(family: str) -> None:
    cls, config, execution = FAMILIES[family]
    model = Small(cls, config)
    encoder = model.manifest.encoder_layers
    memory = torch.randn(9, model.manifest.width) if encoder else None
    stacks = [Span(0, encoder)] if encoder else []
    for stack in (*stacks, Span(encoder, model.manifest.layers)):
        given = memory if encoder and stack.start else None
        expected = answers(model.load(stack, execution), IDS, given)
        with pretending():
            spread = model.load(stack, execution, Placement(stack.start, (A, B, B, CPU)))
            assert torch.equal(answers(spread, IDS, given), expected)
            assert {weight.device for weight in named_weights(spread._spliced.skeleton.model).values()} >= {A, B}


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_rows_and_an_encoders_output_enter_a_span_inside_the_stack(family: str) -> None:
    cls, config, execution = FAMILIES[family]
    model = Small(cls, config)
    memory = torch.randn(9, model.manifest.width) if model.manifest.encoder_layers else None
    inside = Span(model.manifest.layers - 3, model.manifest.layers)
    rows = torch.randn(len(IDS), model.manifest.width)
    expected = answers(model.load(inside, execution), rows, memory)
    with pretending():
        within = model.load(inside, execution, Placement(inside.start, (CPU, B, A)))
        assert torch.equal(answers(within, rows, memory), expected)


def test_keys_and_values_lie_with_their_layer(served: Published) -> None:
    placement = Placement(1, (B, A))
    with pretending():
        rows = torch.randn(5, 72)
        model = load_span(served.manifest, Span(1, 3), served.open_piece, placement=placement)
        cache = model.new_cache(64)
        out = model.forward([Segment(cache, 0, rows)])[0]
        assert type(out) is torch.Tensor and out.device == CPU
        assert isinstance(cache, KvCache)
        assert {layer: keys.device for layer, (keys, _) in cache.rows(0, 5).items()} == {1: B, 2: A}
        model = load_span(served.manifest, Span(1, 3), served.open_piece, execution="stock", placement=placement)
        stock = model.new_cache(64)
        model.forward([Segment(stock, 0, rows)])
        assert isinstance(stock, StockCache)
        assert [stock._layers[layer].keys.device for layer in (1, 2)] == [B, A]


def test_layers_that_share_weights_stay_on_one_device() -> None:
    config = transformers.AlbertConfig(**HEADS, embedding_size=32)
    model = Small(transformers.AlbertForMaskedLM, config)
    expected = answers(model.load(Span(0, 4), "stock"), IDS, None)
    with pretending():
        with pytest.raises(ManifestError, match="this model runs on one device at a time"):
            model.load(Span(0, 4), "stock", Placement(0, (A, A, B, B)))
        alone = model.load(Span(0, 4), "stock", Placement.on(B, Span(0, 4)))
        assert torch.equal(answers(alone, IDS, None), expected)


def test_stateless_passes_with_adapters_cross_the_borders(served: Published) -> None:
    rows, span = torch.randn(6, 72), Span(1, 4)
    adapters = {"transformer.h.2.mlp.c_fc": Adapter(torch.randn(2, 72), torch.randn(288, 2))}
    expected = SpanGradients(served.load(span)).forward(rows, adapters, hidden="all")
    with pretending():
        spread = load_span(served.manifest, span, served.open_piece, placement=Placement(1, (A, B, CPU)))
        passed = SpanGradients(spread).forward(rows, adapters, hidden="all")
    torch.testing.assert_close(passed.rows, expected.rows)
    torch.testing.assert_close(passed.hidden, expected.hidden)


def test_the_canary_and_the_class_on_a_device(served: Published) -> None:
    span, manifest = Span(0, 4), served.manifest
    with pretending():
        model = load_span(manifest, span, served.open_piece, placement=Placement(0, (A, A, CPU, CPU)))
        assert check_canary(model, manifest, served.store.get_block) < 1e-5
        short = replace(manifest, max_length=20)
        assert numeric_class(short, (A,)) not in (numeric_class(short), STOCK), "plain products, not packed ones"
        assert numeric_class(short, (A, CPU)) == STOCK


def settings(**values: Any) -> NodeConfig:
    return NodeConfig(hot_key=Path("hot.json"), **values)


def test_settings_that_exclude_each_other_are_refused() -> None:
    for setting in ("gpu", "cuda:", "cuda:x", "meta"):
        with pytest.raises(ValueError, match="device"):
            settings(device=setting)
    with pytest.raises(ValueError, match='tensor_parallel = 2 runs on the CPU: set device = "cpu" or "auto"'):
        settings(device="cuda", tensor_parallel=2, execution="stock")


def test_auto_takes_devices_that_pass_the_class_test(
    served: Published, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = replace(served.manifest, max_length=20)
    with pretending():
        assert accelerators(settings(device="cpu"), manifest) == ()
        assert accelerators(settings(tensor_parallel=2, execution="stock"), manifest) == ()
        assert accelerators(settings(execution="stock"), manifest) == (A, B)
        assert accelerators(settings(device="cuda:1"), manifest) == (B,)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert accelerators(settings(), manifest) == (A,)
    # Without the pretended devices, the class test fails as on a GPU that cannot do something.
    assert accelerators(settings(), manifest) == ()


def test_auto_uses_devices_for_a_whole_span_or_not_at_all(served: Published, two_gpus: None) -> None:
    manifest, sizes = served.manifest, device_layer_bytes(served.manifest)
    room = room_on((A, B), manifest, 10_000)
    assert [free for _, free in room] == [900_000 - 10_000 - max(sizes), 0]
    tight = [(A, sizes[1]), (B, sizes[2])]
    assert place_span("auto", manifest, Span(1, 3), tight).devices == (A, B)
    assert place_span("auto", manifest, Span(1, 4), tight).devices == (CPU,) * 3
    spilled = place_span("cuda", manifest, Span(1, 4), tight)
    assert spilled.devices == (A, B, CPU)
    assert place_span("auto", manifest, Span(1, 4), []).devices == (CPU,) * 3
    needed = layer_bytes(manifest)[3] + largest_piece_bytes(manifest, Span(1, 4))
    check_memory(manifest, Span(1, 4), needed, spilled)
    with pytest.raises(ConfigError, match="are missing"):
        check_memory(manifest, Span(1, 4), needed)
    with pretending():
        machine = machine_for(manifest, 10_000_000, 1_000_000, tight)
        assert machine.memory_bytes == sizes[1] + sizes[2]
        mixed = machine_for(manifest, 10_000_000, 1_000_000, tight, mixed=True)
        assert mixed.memory_bytes - machine.memory_bytes == 9_000_000 - largest_piece_bytes(manifest, manifest.whole)
