"""transformers' generate() and tuning over the running network, against the unsharded model in this process."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM as Local
from transformers import AutoTokenizer, TextIteratorStreamer

import tallystick
from conftest import Running
from tallystick.torch.causal_lm import NetworkModelForCausalLM
from tallystick.torch.contrastive import contrastive_search
from tallystick_devnet.demo import cheating_command
from tallystick_devnet.localchain import repository
from tallystick_devnet.localnet import READY_TIMEOUT_S

IDS = torch.arange(40, 58).view(2, 9) * 71 % 4000


@pytest.fixture(scope="module")
def whole(running: Running) -> Any:
    return Local.from_pretrained(running.checkpoint, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[tallystick.Client]:
    """One client for all: its channels are funded once."""
    with tallystick.Client(running.key, running.net.settings()) as client:
        yield client


@pytest.fixture
def fresh(running: Running) -> Iterator[tallystick.Client]:
    """A client that is going to ban a node."""
    with tallystick.Client(running.key, running.net.settings()) as client:
        yield client


def opened(client: tallystick.Client, running: Running, verify: str = "off") -> NetworkModelForCausalLM:
    model: NetworkModelForCausalLM = tallystick.AutoModelForCausalLM.from_network(
        running.id, client=client, verify=verify
    )
    return model


@pytest.mark.parametrize(
    "options",
    [{"do_sample": True}, {"num_beams": 3, "do_sample": False}, {"prompt_lookup_num_tokens": 3, "do_sample": False}],
    ids=["sampling", "beams", "prompt lookup"],
)
def test_generate_gives_the_ids_of_the_local_model(
    running: Running, whole: Any, client: tallystick.Client, options: dict[str, Any]
) -> None:
    prompt = IDS[:1] if "prompt_lookup_num_tokens" in options else IDS
    found = []
    with opened(client, running) as served:
        for model in (whole, served):
            torch.manual_seed(0)
            found.append(model.generate(prompt, max_new_tokens=10, **options))
        assert torch.equal(*found)
        assert served.verdict is not None and sum(served.verdict.paid.values()) > 0


@pytest.mark.nightly
def test_contrastive_search_an_assistant_a_streamer_and_a_stop_string_over_the_network(
    running: Running, whole: Any, client: tallystick.Client
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(running.checkpoint, local_files_only=True)
    contrastive = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 6, "do_sample": False}
    greedy: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    with opened(client, running) as served:
        local = whole.generate(IDS[:1], custom_generate=contrastive_search, **contrastive)
        assert torch.equal(served.generate(IDS[:1], **contrastive), local)
        expected = whole.generate(IDS[:1], **greedy)
        assert torch.equal(served.generate(IDS[:1], assistant_model=whole, **greedy), expected)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        served.generate(IDS[:1], streamer=streamer, **greedy)
        assert "".join(streamer) == tokenizer.decode(expected[0, IDS.shape[1] :])
        stop = {"stop_strings": [tokenizer.decode(expected[0, -3:-2])], "tokenizer": tokenizer}
        assert torch.equal(served.generate(IDS[:1], **greedy, **stop), whole.generate(IDS[:1], **greedy, **stop))


def steps(model: Any, count: int, before: Any = None) -> tuple[list[float], torch.Tensor]:
    """The losses of a few steps on a soft prompt, and the prompt."""
    torch.manual_seed(0)
    soft = torch.nn.Parameter(torch.randn(1, 4, 192) * 0.02)
    optimiser = torch.optim.AdamW([soft], lr=0.05)
    labels = torch.cat([torch.full((2, 4), -100), IDS], dim=1)
    losses = []
    for step in range(count):
        if before is not None:
            before(step)
        embeds = torch.cat([soft.expand(2, -1, -1), model.get_input_embeddings()(IDS)], dim=1)
        loss = model(inputs_embeds=embeds, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, soft.detach()


def test_a_soft_prompt_is_tuned_with_the_numbers_of_the_local_model_and_every_pass_is_checked(
    running: Running, whole: Any, client: tallystick.Client
) -> None:
    expected, prompt = steps(whole, 2)
    with opened(client, running, "full") as served:
        losses, found = steps(served, 2)
        verdict = served.verdict
    assert losses == pytest.approx(expected, rel=1e-5) and losses[-1] < losses[0]
    torch.testing.assert_close(found, prompt, atol=1e-4, rtol=1e-3)
    assert verdict is not None and verdict.failed == 0
    assert verdict.spans == running.spans and verdict.passed == 2 * 2 * 2 * 3, "each pass of each row at each span"
    assert verdict.worst_error < 1e-6 and len(verdict.paid) >= 6 and all(verdict.paid.values())


def test_adapters_get_the_local_models_gradients(running: Running, whole: Any, client: tallystick.Client) -> None:
    with opened(client, running) as served:
        torch.manual_seed(1)
        lora = served.attach_lora(("q_proj", "v_proj"), rank=4, alpha=8.0)
        for b in lora.b:
            torch.nn.init.normal_(b, std=0.02)
        loss = served(IDS, labels=IDS).loss
        loss.backward()
    found = [parameter.grad for parameter in lora.parameters()]
    lora.zero_grad()
    for name, a, b in zip(lora.names, lora.a, lora.b, strict=True):
        whole.get_submodule(name).register_forward_hook(
            lambda _, args, out, a=a, b=b: out + args[0] @ a.T @ b.T * lora.scale
        )
    expected = whole(IDS, labels=IDS).loss
    expected.backward()
    for module in whole.modules():
        module._forward_hooks.clear()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, parameter in zip(found, lora.parameters(), strict=True):
        assert (one - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max()


@pytest.mark.parametrize("name", ["prompt_tuning", "lora"])
def test_the_examples_losses_are_those_of_the_local_model(
    running: Running, whole: Any, client: tallystick.Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repository() / "examples"))
    example = importlib.import_module(name)
    said: list[str] = []
    try:
        expected = example.run(whole, 2, said.append)
    finally:
        for module in whole.modules():
            module._forward_hooks.clear()
    with opened(client, running) as served:
        found = example.run(served, 2, said.append)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(said) % 2 == 0 and said[0] == said[len(said) // 2]


def test_a_session_that_broke_is_opened_again_in_mid_tuning(
    running: Running, whole: Any, client: tallystick.Client
) -> None:
    expected, _ = steps(whole, 2)

    def cut(step: int) -> None:
        if step == 1:
            passing: Any = served._passing
            for bench in passing._lanes[1]._benches.values():
                client.wait(bench.remote.line._channel.close())

    with opened(client, running) as served:
        losses, _ = steps(served, 2, cut)
        assert served.verdict is not None and not served.verdict.replaced
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.nightly
def test_tuning_goes_on_when_a_node_is_killed(running: Running, whole: Any, fresh: tallystick.Client) -> None:
    expected, _ = steps(whole, 3)

    def kill(step: int) -> None:
        if step == 1:
            passing: Any = served._passing
            running.node(passing._lanes[1]._route[1].node).process.kill()

    try:
        with opened(fresh, running) as served:
            losses, _ = steps(served, 3, kill)
            assert served.verdict is not None and len(served.verdict.replaced) == 1
    finally:
        running.revive()
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.nightly
def test_a_cheater_is_overruled_by_two_others_and_not_paid(
    running: Running, whole: Any, fresh: tallystick.Client
) -> None:
    expected, _ = steps(whole, 1)
    cheater = next(node for node in running.nodes if node.span == running.spans[1])
    cheater.process.stop()
    running.net.restart(cheater, running.model, cheating_command(), ["--price", "1"])
    try:
        cheater.process.wait_for("fault: row", READY_TIMEOUT_S)
        cheater.wait()
        with opened(fresh, running, "full") as served:
            losses, _ = steps(served, 1)
        verdict = served.verdict
        assert verdict is not None and verdict.failed == 1 and losses == pytest.approx(expected, rel=1e-5)
        assert fresh.asynchronous.banned == {cheater.address} and not verdict.paid.get(cheater.address)
    finally:
        cheater.process.stop()
        running.net.restart(cheater, running.model)
        cheater.wait()
