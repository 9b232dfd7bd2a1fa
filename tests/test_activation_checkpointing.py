"""Activation checkpointing changes memory and time, but not gradients."""

import pytest
import torch
from test_engine import batch, small_mae
from trainable_models import SmallClassifier, labeled_batch

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
def test_gradients_equal_those_without_activation_checkpointing(policy):
    expected, _ = gradients("none")
    got, _ = gradients(policy)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-7, rtol=1e-5, msg=name)


def test_each_policy_recomputes_the_expected_number_of_blocks():
    executions = {policy: gradients(policy)[1] for policy in POLICIES}
    assert executions == {"none": 6, "full": 12, "every_k": 9, "selective": 12, "offload": 12}


def drop_path_gradients(policy, seed=3, uses_rng=True, compiled=False):
    """Return the gradients of two micro-batches of a model with stochastic depth."""
    model = SmallClassifier(drop_path=0.5)
    apply_activation_checkpointing(model.transformer_blocks, policy, every=2, uses_rng=uses_rng)
    if compiled:
        for block in model.transformer_blocks:
            block.compile(backend="aot_eager")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(2):
            model(*labeled_batch(step)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()} | {"next": torch.rand(1)}


def different_names(one, other):
    return [name for name in one if not torch.allclose(one[name], other[name], atol=1e-7, rtol=1e-5)]


@pytest.mark.parametrize("policy", POLICIES)
def test_recomputation_drops_the_same_paths(policy):
    expected = drop_path_gradients("none")
    assert not different_names(expected, drop_path_gradients(policy))
    assert different_names(expected, drop_path_gradients(policy, seed=4))


@pytest.mark.parametrize("policy", ["full", "every_k", "selective"])
def test_the_generator_state_is_not_saved_without_uses_rng(policy):
    assert different_names(drop_path_gradients("none"), drop_path_gradients(policy, uses_rng=False))


def test_recomputation_of_compiled_blocks_drops_the_same_paths():
    torch._dynamo.reset()
    assert not different_names(drop_path_gradients("none"), drop_path_gradients("full", compiled=True))


def saved_bytes(policy):
    """Return the bytes that autograd saves for the backward pass."""
    model = small_mae()
    apply_activation_checkpointing([*model.blocks, *model.decoder_blocks], policy, every=2)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(*batch(0))
    return sum(saved.values())


def test_recomputation_saves_memory():
    saved = {policy: saved_bytes(policy) for policy in ("none", "full", "every_k")}
    assert saved["full"] < saved["every_k"] < saved["none"]
    assert saved["full"] < 0.4 * saved["none"]


@pytest.mark.parametrize("policy", ["none", "full", "every_k", "selective"])
def test_checkpointed_blocks_can_be_compiled(policy):
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


def test_an_unknown_policy_is_an_error():
    with pytest.raises(ValueError, match="unknown"):
        apply_activation_checkpointing([], "sometimes")
