"""The tensor code of training on CUDA devices that do not exist: a tensor on the wrong device, or a wait, is an error.

Fake tensors have a shape and a device and no values. An operation on tensors of two devices raises, and so does one whose
result depends on values, such as ``item()``, for which the host would have to wait.
Autograd runs the backward pass of CUDA tensors in a thread of a real device. The tests of it use the fake device ``lazy``,
whose backward pass runs in the calling thread.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily

from scale_mae.config.schema import ClassifyConfig
from scale_mae.data import transforms
from scale_mae.data.mixup import BatchAugmentation
from scale_mae.data.transforms import denormalize, normalize
from scale_mae.engine.activation_checkpointing import apply_activation_checkpointing
from scale_mae.engine.ema import EMA_KEY, WeightEMA
from scale_mae.engine.lars import LARS
from scale_mae.engine.step_skipper import StepSkipper
from scale_mae.model.classifier import build_classifier
from scale_mae.model.mae import build_mae
from scale_mae.model.sizes import SIZES
from scale_mae.model.targets import prediction_to_pixels

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
BATCH, SIDE, PATCH, CLASSES = 4, 32, (8, 8), 5


@pytest.fixture(params=["cuda", "lazy"])
def device(request, monkeypatch):
    """A fake device, inside the mode that makes it."""
    monkeypatch.setattr(torch, "lazy", torch.cpu, raising=False)  # checkpoint looks for the module of a device
    with FakeTensorMode():
        yield torch.device(request.param, 0)
    for cache in (transforms._statistics, transforms._row_statistics):
        cache.cache_clear()  # they keep fake tensors


def made(build, device, dtype=torch.float32):
    """A model with fake parameters of a precision; buffers keep theirs, as they do when the models are cast."""
    with unset_fake_temporarily():
        model = build()
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(tensor.shape, dtype=dtype, device=device))
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return model.train()


def mae(**options):
    return build_mae("nano", image_size=(SIDE, SIDE), patch_size=PATCH, decoder_width=64, decoder_depth=2, **options)


def batch(device):
    return torch.zeros(BATCH, SIDE, SIDE, 3, dtype=torch.uint8, device=device)


def backward(loss, model, device):
    assert loss.device == device
    assert loss.dtype == torch.float32
    if device.type == "lazy":
        loss.backward()
        assert {p.grad.device for p in model.parameters() if p.grad is not None} == {device}


@pytest.mark.parametrize("policy", ["none", "full", "every_k", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["norm_pixel", "pixel"])
def test_a_masked_autoencoder(device, dtype, target, policy):
    model = made(partial(mae, target=target), device, dtype)
    apply_activation_checkpointing(model.transformer_blocks, policy)
    images = normalize(batch(device), MEAN, STD)
    out = model(images, torch.rand(BATCH, model.num_patches, device=device))
    backward(out.loss, model, device)
    assert prediction_to_pixels(out.pred, images, PATCH, target).device == device
    assert denormalize(images, MEAN, STD).device == device


def test_features_of_whole_images(device):
    model = made(mae, device)
    assert model.features(normalize(batch(device), MEAN, STD)).device == device


def test_color_jitter(device):
    images = normalize(batch(device), MEAN, STD, torch.rand(BATCH, 6, device=device))
    assert images.device == device


def classifier(setting):
    options = {"image_size": (SIDE, SIDE), "patch_size": PATCH, "classes": CLASSES, "drop_path": 0.1}
    model = build_classifier(SIZES["nano"], seed=0, from_scratch=False, **options)
    if setting == "last blocks":
        model.freeze(1.5)
    if setting == "probes":
        model.add_probes((0.5, 1.0))
    return model


def classify(model, device):
    images = normalize(batch(device), MEAN, STD)
    backward(model(images, torch.rand(BATCH, CLASSES, device=device)).loss, model, device)
    assert {result.device for result in model.eval()(images)} == {device}


def test_a_classifier(device):
    classify(made(partial(classifier, "whole"), device, torch.bfloat16), device)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)  # autocast rejects the fake device "lazy"
@pytest.mark.parametrize("setting", ["last blocks", "probes"])
def test_a_classifier_with_frozen_parts(device, setting):
    classify(made(partial(classifier, setting), device, torch.bfloat16), device)


@pytest.mark.parametrize("setting", [{}, {"cutmix": 0.0}, {"mixup": 0.0}, {"mixup": 0.0, "cutmix": 0.0}])
def test_mixing(device, setting, monkeypatch):
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: nullcontext())  # it asks the device, which is not there
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    config = ClassifyConfig(**{"mixup": 0.8, "cutmix": 1.0, "random_erasing": 1.0, "label_smoothing": 0.1} | setting)
    labels = torch.zeros(BATCH, dtype=torch.int64, device=device)
    images, targets = BatchAugmentation(config, CLASSES)(normalize(batch(device), MEAN, STD), labels, seed=1)
    assert {images.device, targets.device} == {device}


def updated(device, optimizer, norm):
    """An optimizer and its guard after two updates, without a look at any value."""
    guard = StepSkipper(optimizer, lambda: norm, device)
    WeightEMA(optimizer, 0.99)
    for _ in range(2):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        guard.count_step(overflow=False)
    guard.count_step(overflow=True)
    assert {guard.skipped.device, guard.total.device} == {device}
    for state in optimizer.state.values():
        assert {tensor.device for tensor in state.values()} == {device}
        assert EMA_KEY in state


def parameters(device):
    return [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in ((3, 4), (4,))]


def test_lars(device):
    updated(device, LARS(parameters(device), lr=0.1, weight_decay=0.1), torch.ones((), device=device))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)  # fused AdamW rejects the fake device "lazy"
@pytest.mark.parametrize("norm", ["of the device", "of the host"])
def test_adamw_with_guard_and_average(device, norm):
    of = torch.ones((), device=device) if norm == "of the device" else 1.0
    updated(device, torch.optim.AdamW(parameters(device), fused=True), of)


def test_a_mismatch_and_a_wait_are_errors(device):
    """What all of this file is worth."""
    images = normalize(batch(device), MEAN, STD)
    with pytest.raises(RuntimeError, match="device"):
        images + torch.zeros(SIDE)
    with pytest.raises(DataDependentOutputException):
        images.sum().item()
