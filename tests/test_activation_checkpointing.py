"""Recomputation changes memory and time, never gradients."""

import pytest
import torch
from test_engine import batch, small_mae
from trainable_models import SmallClassifier, labelled

from scale_mae.engine.activation_checkpointing import apply_activation_checkpointing

POLICIES = ["none", "full", "every_k", "selective", "offload"]


def gradients(policy):
    model = small_mae()
    names = [name for name, _ in model.named_parameters()]
    apply_activation_checkpointing([*model.blocks, *model.decoder_blocks], policy, every=2)
    assert [name for name, _ in model.named_parameters()] == names
    executed = []
    for block in model.blocks:
        block.mlp.fc1.register_forward_hook(lambda *_: executed.append(1))
    model(*batch(0)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, len(executed)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_those_without_recomputation(policy):
    expected, _ = gradients("none")
    got, _ = gradients(policy)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-7, rtol=1e-5, msg=name)


def test_policies_recompute_what_they_say():
    executions = {policy: gradients(policy)[1] for policy in POLICIES}
    assert executions == {"none": 6, "full": 12, "every_k": 9, "selective": 12, "offload": 12}


def drop_path_gradients(policy, seed=3, uses_rng=True, compiled=False):
    """Of two micro-batches of a model that leaves out branches of its blocks at random."""
    model = SmallClassifier(drop_path=0.5)
    apply_activation_checkpointing(model.transformer_blocks, policy, every=2, uses_rng=uses_rng)
    if compiled:
        for block in model.transformer_blocks:
            block.compile(backend="aot_eager")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(2):
            model(*labelled(step)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()} | {"next": torch.rand(1)}


def differing(one, other):
    return [name for name in one if not torch.allclose(one[name], other[name], atol=1e-7, rtol=1e-5)]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_dropped_at_random_is_dropped_again(policy):
    expected = drop_path_gradients("none")
    assert not differing(expected, drop_path_gradients(policy))
    assert differing(expected, drop_path_gradients(policy, seed=4))


@pytest.mark.parametrize("policy", ["full", "every_k", "selective"])
def test_generator_states_are_kept_only_where_they_are_needed(policy):
    assert differing(drop_path_gradients("none"), drop_path_gradients(policy, uses_rng=False))


def test_what_is_dropped_at_random_is_dropped_again_when_compiled():
    torch._dynamo.reset()
    assert not differing(drop_path_gradients("none"), drop_path_gradients("full", compiled=True))


def saved_bytes(policy):
    """Bytes that autograd keeps outside the blocks' own recomputation."""
    model = small_mae()
    apply_activation_checkpointing([*model.blocks, *model.decoder_blocks], policy, every=2)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(*batch(0))
    return sum(kept.values())


def test_recomputing_keeps_less():
    kept = {policy: saved_bytes(policy) for policy in ("none", "full", "every_k")}
    assert kept["full"] < kept["every_k"] < kept["none"]
    assert kept["full"] < 0.4 * kept["none"]


@pytest.mark.parametrize("policy", ["none", "full", "every_k", "selective"])
def test_recomputed_blocks_can_be_compiled(policy):
    from torch._dynamo.utils import counters

    expected, _ = gradients("none")
    torch._dynamo.reset()
    counters.clear()
    model = small_mae()
    blocks = [*model.blocks, *model.decoder_blocks]
    apply_activation_checkpointing(blocks, policy, every=2)
    for block in blocks:
        block.compile(backend="aot_eager")
    model(*batch(0)).loss.backward()
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="unknown"):
        apply_activation_checkpointing([], "sometimes")
