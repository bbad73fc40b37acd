"""A span dealt out to two ranks (gloo, two processes) against the unsharded one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from harness import checkpoints
from harness.checkpoints import ENDS, SMALL, Published, Session, published
from tallystick_model.canary import check_canary
from tallystick_model.gradients import SpanGradients
from tallystick_model.parallel import ParallelSpan, load_parallel
from tallystick_model.segments import Segment
from tallystick_model.shards import _slice
from tallystick_protocol.errors import BadPosition, ConfigError, ManifestError, Rejected
from tallystick_protocol.types import Span

IDS = (torch.arange(48) * 7919 + 13) % 300
CHUNKS = [20, 1, 1, 5, 21]


def qwen3(folder: Path) -> Path:
    """Norms within heads, and a head that is tied to the embedding."""
    config = transformers.Qwen3Config(**{**SMALL, **ENDS, "head_dim": 12, "tie_word_embeddings": True})
    return checkpoints.save(transformers.Qwen3ForCausalLM, config, folder, seed=0)


@dataclass(slots=True)
class Dealt:
    served: Published
    whole: ParallelSpan


@pytest.fixture(scope="module", params=[checkpoints.llama, pytest.param(qwen3, marks=pytest.mark.nightly)])
def dealt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dealt]:
    root = tmp_path_factory.mktemp("dealt")
    torch.set_num_threads(1)
    served = published(request.param(root / "checkpoint"), root)
    span = load_parallel(served.manifest, served.manifest.whole, served.open_piece, 2)
    try:
        yield Dealt(served, span)
    finally:
        span.close()


def test_two_ranks_compute_what_one_process_computes(dealt: Dealt) -> None:
    alone = Session([dealt.served.load(dealt.served.manifest.whole, "stock")]).steps(IDS, CHUNKS)
    together = Session([dealt.whole]).steps(IDS, CHUNKS)
    assert (together - alone).abs().max() <= 1e-5 * max(1.0, float(alone.abs().max()))
    assert torch.equal(Session([dealt.whole]).steps(IDS, CHUNKS), together), "another session, the same steps"
    assert check_canary(dealt.whole, dealt.served.manifest, dealt.served.store.get_block) < 1e-5


def test_a_rank_holds_its_half_of_what_the_plan_deals_out(dealt: Dealt) -> None:
    weights = dealt.whole._spliced.skeleton.weights()
    dealt_out = [cast(Any, weight) for weight in weights.values() if hasattr(weight, "to_local")]
    assert sum(weight.to_local().numel() for weight in dealt_out) * 2 == sum(weight.numel() for weight in dealt_out)
    assert sum(weight.numel() for weight in dealt_out) > 0.5 * sum(weight.numel() for weight in weights.values())


def test_sessions_are_cropped_and_refused_as_in_one_process(dealt: Dealt) -> None:
    session = Session([dealt.whole])
    session.step(IDS[:20])
    expected = session.step(IDS[20:25])
    session.crop(20)
    assert torch.equal(session.step(IDS[20:25]), expected)
    with pytest.raises(BadPosition):
        dealt.whole.forward([Segment(session.caches[0], 3, IDS[:2])])
    assert session.step(IDS[25:27]).shape[0] == 2, "what was refused did not reach the other rank"
    other = dealt.whole.new_cache(64)
    with pytest.raises(BadPosition, match="does not fork"):
        cast(Any, other).take(session.caches[0], 0, 4)
    with pytest.raises(Rejected, match="dealt out"):
        SpanGradients(dealt.whole)


def test_a_follower_that_dies_is_noticed_and_nothing_hangs(dealt: Dealt) -> None:
    assert dealt.whole.alive
    follower = dealt.whole.followers[0]
    follower.kill()
    follower.wait(timeout=10)
    assert not dealt.whole.alive
    with pytest.raises(RuntimeError):
        Session([dealt.whole]).step(IDS[:4])


def test_what_cannot_be_dealt_out_is_refused_with_the_reason(tmp_path: Path) -> None:
    served = published(checkpoints.gpt2(tmp_path / "gpt2"), tmp_path)
    with pytest.raises(ManifestError, match="no plan for tensor parallelism") as raised:
        load_parallel(served.manifest, Span(0, 4), served.open_piece, 2)
    assert raised.value.fields["reason"] == "no_tp_plan"
    odd = published(checkpoints.llama(tmp_path / "llama"), tmp_path / "odd")
    with pytest.raises(ConfigError, match="2 key value heads cannot be dealt to 3 ranks"):
        load_parallel(odd.manifest, Span(0, 4), odd.open_piece, 3)


@pytest.mark.parametrize("rank", [0, 1])
def test_slices_are_those_of_torch(rank: int) -> None:
    weight = torch.arange(40.0).view(10, 4)
    read: Any = weight
    assert torch.equal(_slice(read, (10, 4), Shard(0), rank, 2), weight.chunk(2, 0)[rank])
    assert torch.equal(_slice(read, (10, 4), Shard(-1), rank, 2), weight.chunk(2, 1)[rank])
    packed = torch.arange(48.0).view(12, 4)
    halves = [half.chunk(2, 0)[rank] for half in packed.chunk(2, 0)]
    assert torch.equal(_slice(packed, (12, 4), _StridedShard(0, split_factor=2), rank, 2), torch.cat(halves))
