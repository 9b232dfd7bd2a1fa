"""Tests of the masked autoencoder, against values of the reference implementation among others."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scale_mae.config.schema import OptimConfig
from scale_mae.engine.optimizer import build_optimizer
from scale_mae.model.mae import MAE, build_mae
from scale_mae.model.masking import num_visible_patches, random_masking
from scale_mae.model.pos_embed import sincos_pos_embed
from scale_mae.model.sizes import SIZES, EncoderSize
from scale_mae.model.targets import compute_target, patchify, prediction_to_pixels, unpatchify

TINY = EncoderSize(width=48, depth=3, heads=4, patch_size=4)


def tiny(target="norm_pixel"):
    return MAE(TINY, image_size=(32, 32), patch_size=(4, 4), decoder_width=32, decoder_depth=2, decoder_heads=4, target=target)


def golden_weights(tensors):
    return {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}


@pytest.mark.parametrize(("target", "prefix"), [("norm_pixel", "norm_pix"), ("pixel", "raw_pix")])
def test_forward_and_every_gradient_equal_the_reference(golden, target, prefix):
    tensors, _ = golden("mae_tiny.safetensors")
    model = tiny(target)
    model.load_state_dict(golden_weights(tensors), strict=True)
    out = model(tensors["images"], tensors["noise"])
    out.loss.backward()
    assert out.loss.item() == pytest.approx(tensors[f"{prefix}.loss"].item(), abs=1e-5)
    for got, name in ((out.pred, f"{prefix}.pred"), (out.mask, "mask"), (out.latent, "latent")):
        torch.testing.assert_close(got, tensors[name], atol=1e-5, rtol=0)
    for name, parameter in model.named_parameters():
        expected = tensors[f"{prefix}.grad.{name}"]
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name


def test_twelve_adamw_steps_equal_the_reference(golden):
    tensors, _ = golden("mae_tiny.safetensors")
    model = tiny()
    model.load_state_dict(golden_weights(tensors), strict=True)
    optimizer = build_optimizer(model, OptimConfig())
    losses = []
    for images, noise in zip(tensors["trajectory.images"], tensors["trajectory.noise"], strict=True):
        loss = model(images, noise).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
    assert len(losses) == 12
    np.testing.assert_allclose(losses, tensors["trajectory.losses"], atol=1e-5)


@pytest.mark.parametrize(("size", "parameters"), [("base", 111_907_840), ("large", 329_541_888), ("huge", 657_074_508)])
def test_parameter_counts_equal_the_paper(size, parameters):
    with torch.device("meta"):
        model = build_mae(size, image_size=(224, 224))
    assert sum(t.numel() for t in [*model.parameters(), *model.buffers()]) == parameters


@pytest.mark.parametrize(
    ("size", "forward", "train"), [("base", 19.56, 58.46), ("large", 41.51, 124.23), ("huge", 97.12, 290.99)]
)
def test_operation_counts_equal_the_analytic_table(size, forward, train):
    with torch.device("meta"):
        flops = build_mae(size, image_size=(224, 224)).flops()
    assert flops.forward / 1e9 == pytest.approx(forward, abs=0.006)
    assert flops.train / 1e9 == pytest.approx(train, abs=0.006)


def test_the_operation_count_equals_that_of_pytorch():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = build_mae("nano", image_size=(32, 48), patch_size=(8, 8), decoder_width=64, decoder_depth=2, decoder_heads=2)
    # use plain attention: PyTorch also counts the products that fused attention recomputes in its backward pass
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(3, 3, 32, 48), torch.rand(3, 24)).loss.backward()
    assert counter.get_total_flops() == 3 * model.flops().train


@pytest.mark.parametrize("size", [s for s in SIZES if s not in ("giant", "2b", "huge", "large")])
def test_small_sizes_support_non_square_images_and_patches(size):
    model = build_mae(
        size, image_size=(32, 96), patch_size=(16, 32), decoder_depth=1, decoder_width=64, decoder_heads=4, mask_ratio=0.5
    )
    out = model(torch.randn(2, 3, 32, 96), torch.rand(2, 6))
    assert out.pred.shape == (2, 6, 16 * 32 * 3)
    assert out.mask.sum(1).tolist() == [3, 3]


@pytest.mark.parametrize("size", ["large", "huge", "giant", "2b"])
def test_large_sizes_have_the_right_shapes(size):
    with torch.device("meta"):
        model = build_mae(size, image_size=(224, 224))
        out = model(torch.empty(2, 3, 224, 224), torch.empty(2, model.num_patches))
    assert out.latent.shape == (2, 1 + num_visible_patches(model.num_patches, 0.75), SIZES[size].width)


def test_a_patch_size_that_does_not_divide_the_image_raises_an_error():
    with pytest.raises(ValueError, match="not divisible"):
        build_mae("nano", image_size=(30, 32), patch_size=(8, 8))
    with pytest.raises(ValueError, match="mask ratio"):
        build_mae("nano", image_size=(32, 32), patch_size=(32, 32))


def test_position_embeddings_equal_the_reference(golden):
    tensors, _ = golden("recipe.safetensors")
    assert torch.equal(sincos_pos_embed(48, (3, 3))[0], tensors["sincos.dim48.grid3"].float())
    torch.testing.assert_close(sincos_pos_embed(64, (7, 7))[0], tensors["sincos.dim64.grid7"].float(), atol=1e-6, rtol=0)


def test_position_embeddings_of_a_non_square_grid_distinguish_rows_and_columns():
    table = sincos_pos_embed(16, (2, 5))[0, 1:].view(2, 5, 16)
    assert torch.equal(table[0, :, :8], table[1, :, :8])  # the first half encodes the column
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])  # the second half encodes the row
    assert not torch.equal(table[:, 0, :8], table[:, 4, :8])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_model_keeps_position_embeddings_exact(dtype):
    model = tiny().to(dtype)
    assert model.blocks[0].attn.qkv.weight.dtype == dtype
    assert torch.equal(model.pos_embed, sincos_pos_embed(48, (8, 8)))
    assert torch.equal(model.decoder_pos_embed, sincos_pos_embed(32, (8, 8)))


def test_the_loss_of_a_bf16_model_is_fp32_and_accurate():
    model = tiny()
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 64)
    expected = model(images, noise).loss
    loss = model.bfloat16()(images, noise).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)


def test_target_statistics_are_fp32_for_bf16_images():
    images = (100 + torch.randn(1, 3, 8, 8)).bfloat16()  # computed in bf16, deviations from a mean of 100 would vanish
    target = compute_target(images, (4, 4), "norm_pixel")
    torch.testing.assert_close(target, compute_target(images.double().float(), (4, 4), "norm_pixel"))
    assert target.dtype == torch.float32
    torch.testing.assert_close(target.var(dim=-1), torch.ones(1, 4), atol=1e-3, rtol=0)


def test_the_loss_counts_removed_patches_only():
    model = tiny("pixel")
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    out = model(images, noise)
    error = (out.pred - patchify(images, (4, 4))).square().mean(-1)
    assert out.loss.item() == pytest.approx(error[out.mask.bool()].mean().item(), rel=1e-5)


def test_initial_weights_follow_the_reference():
    model = build_mae("base", image_size=(224, 224), seed=0)
    for weight, fan_in, fan_out in (
        (model.blocks[0].attn.qkv.weight, 768, 3 * 768),
        (model.patch_embed.proj.weight, 3 * 16 * 16, 768),  # initialized as one linear map
        (model.decoder_pred.weight, 512, 768),
    ):
        limit = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * limit < weight.abs().max() <= limit
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert not model.blocks[0].attn.qkv.bias.any()
    assert model.patch_embed.proj.bias.any()  # PyTorch's default, as in the reference
    assert (model.norm.weight == 1).all()


def test_initial_weights_depend_on_the_seed_only_and_the_global_generator_is_restored():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, two, other = (build_mae("nano", image_size=(32, 32), seed=s).state_dict() for s in (5, 5, 6))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["cls_token"], other["cls_token"])


@given(st.integers(1, 4), st.integers(2, 40), st.integers(0, 2**31), st.data())
def test_masking_keeps_the_patches_with_the_smallest_noise(batch, length, seed, data):
    keep = data.draw(st.integers(1, length - 1))
    noise = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    ids_keep, ids_restore, mask = random_masking(noise, keep)
    assert (mask.sum(1) == length - keep).all()
    for b in range(batch):
        assert (
            set(ids_keep[b].tolist()) == set(noise[b].argsort()[:keep].tolist()) == set((mask[b] == 0).nonzero()[:, 0].tolist())
        )
        shuffled = noise[b].argsort(stable=True)
        assert torch.equal(shuffled[ids_restore[b]], torch.arange(length))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_unpatchify_inverts_patchify(batch, rows, columns, height, width):
    images = torch.arange(batch * 3 * rows * height * columns * width).float().view(batch, 3, rows * height, columns * width)
    patches = patchify(images, (height, width))
    assert patches.shape == (batch, rows * columns, height * width * 3)
    assert patches[0, 0, :3].tolist() == images[0, :, 0, 0].tolist()  # row, column, channel
    assert torch.equal(unpatchify(patches, (height, width), (rows, columns)), images)


def test_a_perfect_prediction_converts_to_the_original_pixels():
    images = torch.randn(2, 3, 16, 16)
    for target in ("pixel", "norm_pixel"):
        pixels = prediction_to_pixels(compute_target(images, (4, 4), target), images, (4, 4), target)
        torch.testing.assert_close(unpatchify(pixels, (4, 4), (4, 4)), images, atol=1e-5, rtol=1e-5)


def test_features_use_the_whole_image():
    model = tiny().eval()
    images = torch.randn(2, 3, 32, 32)
    features = model.features(images)
    assert features.shape == (2, 65, 48)
    changed = images.clone()
    changed[:, :, -4:, -4:] += 1
    assert not torch.allclose(model.features(changed)[:, 0], features[:, 0])
