"""Learning-rate schedule, parameter groups and LARS, compared with values of the reference implementation."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors import safe_open
from torch import nn
from trainable_models import SmallClassifier

from scale_mae.config.schema import OptimConfig
from scale_mae.engine.lars import LARS
from scale_mae.engine.optimizer import build_optimizer, build_parameter_groups, set_lr
from scale_mae.engine.schedule import LRSchedule


def reference_values():
    return json.loads((GOLDEN / "recipe.json").read_text())


def test_learning_rates_equal_those_of_the_reference():
    for case in reference_values()["schedule"]:
        per_epoch = 100
        schedule = LRSchedule(case["lr"], case["min_lr"], case["warmup_epochs"] * per_epoch, case["epochs"] * per_epoch)
        steps = [case["epochs"] * per_epoch * i // case["points"] for i in range(case["points"])]
        np.testing.assert_allclose([schedule.lr(s) for s in steps], case["lr_at"], rtol=1e-12)
        assert schedule.lr(0) == 0


def lr_scales_and_weight_decays(model, config):
    """Return a dict: parameter name -> (learning-rate multiplier, weight decay), as the optimizer has them after set_lr."""
    optimizer = build_optimizer(model, config)
    set_lr(optimizer, 2.0)
    values = {p: (group["lr"] / 2, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(values) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {name: values[p] for name, p in model.named_parameters()}


def test_layer_decay_equals_that_of_the_reference_for_every_parameter():
    golden = reference_values()["layer_decay"]["groups"]
    model = SmallClassifier()
    got = lr_scales_and_weight_decays(model, OptimConfig(layer_decay=0.65))
    assert {name.replace("fc_norm", "norm") for name in got} == {name.replace("fc_norm", "norm") for name in golden}
    for name, (scale, decay) in got.items():
        expected = golden.get(name) or golden[name.replace("fc_norm", "norm")]
        assert scale == pytest.approx(expected["lr_scale"], rel=1e-12), name
        assert decay == expected["weight_decay"], name
    groups = build_parameter_groups(model, OptimConfig(layer_decay=0.65))
    assert len(groups) == len({(group.weight_decay, group.lr_scale) for group in groups}) == 12
    assert [group.weight_decay for group in groups] == sorted(group.weight_decay for group in groups)


def test_lr_scales_of_the_model_multiply_layer_decay():
    model = SmallClassifier(lr_scales={"head.weight": 3.0, "blocks.3.attn.qkv.weight": 0.5})
    got = lr_scales_and_weight_decays(model, OptimConfig(layer_decay=0.5))
    assert got["head.weight"] == (3.0, 0.05)
    assert got["head.bias"] == (1.0, 0.0)
    assert got["blocks.3.attn.qkv.weight"] == (0.25, 0.05)
    assert got["blocks.3.attn.proj.weight"] == (0.5, 0.05)


def test_five_steps_of_lars_equal_those_of_the_reference():
    with safe_open(str(GOLDEN / "recipe.safetensors"), "pt") as file:
        golden = {
            name.removeprefix("lars."): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if name.startswith("lars.")
        }
        assert file.metadata()["lars"] == "lr 0.3, weight_decay 1e-4, momentum 0.9, trust coefficient 0.001, 5 steps"
    weight, bias = nn.Parameter(golden["weight0"].clone()), nn.Parameter(golden["bias0"].clone())
    optimizer = LARS([weight, bias], lr=0.3, weight_decay=1e-4, momentum=0.9, trust_coefficient=0.001)
    for weight_grad, bias_grad in zip(golden["grad_weight"], golden["grad_bias"], strict=True):
        weight.grad, bias.grad = weight_grad, bias_grad
        optimizer.step()
    torch.testing.assert_close(weight.detach(), golden["weight5"], atol=1e-6, rtol=0)
    torch.testing.assert_close(bias.detach(), golden["bias5"], atol=1e-6, rtol=0)


def test_lars_updates_weights_that_are_zero_and_skips_steps_with_found_inf():
    zero = nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS([zero], lr=0.1, momentum=0.9, weight_decay=0.1)
    zero.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.1))  # the trust ratio is 1
    before, momentum = zero.detach().clone(), optimizer.state[zero]["momentum_buffer"].clone()
    optimizer.found_inf = torch.ones(())
    zero.grad = torch.full((2, 2), torch.nan)
    optimizer.step()
    assert torch.equal(zero.detach(), before)
    assert torch.equal(optimizer.state[zero]["momentum_buffer"], momentum)
    assert optimizer.state[zero]["step"] == 1
