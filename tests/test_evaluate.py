"""Nearest neighbours and reconstruction pictures."""

import numpy as np
import pytest
import torch
from images import jpeg, make_folders
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from scale_mae import UserError, load_config
from scale_mae.checkpoint.export import build_encoder, model_from_config
from scale_mae.checkpoint.facts import describe
from scale_mae.data.build import open_source
from scale_mae.data.storage import DataError
from scale_mae.evaluate.knn import features, knn_accuracy, vote
from scale_mae.evaluate.reconstruct import draw, reconstruct
from scale_mae.model.targets import make_target, unpatchify


def test_vote_follows_an_independent_implementation():
    generator = torch.Generator().manual_seed(0)
    train = torch.nn.functional.normalize(torch.randn(300, 8, generator=generator), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=1)
    labels = torch.randint(0, 5, (300,), generator=generator)
    # for unit vectors the Euclidean distance d gives the cosine similarity 1 - d**2 / 2
    theirs = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
    theirs.fit(train.numpy(), labels.numpy())
    assert vote(train, labels, queries, 20).tolist() == theirs.predict(queries.numpy()).tolist()


@pytest.fixture(scope="module")
def encoder():
    config = load_config("debug")
    model = model_from_config(config)
    encoder = build_encoder(describe(config, 0))
    encoder.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith(("decoder", "mask_token"))})
    return encoder, model


def test_features_are_the_mean_patch_token_of_the_encoder(encoder, tmp_path):
    timm_model, mae = encoder
    index = open_source(str(make_folders(tmp_path)))
    found = features(timm_model, index)
    image = Image.open(tmp_path / "class0" / "0.jpg").crop((5, 0, 35, 30)).resize((32, 32), Image.Resampling.BICUBIC)
    x = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 - 0.286) / 0.353
    with torch.inference_mode():
        expected = mae.eval().features(x)[:, 1:].mean(1)
    torch.testing.assert_close(found[:1], expected / expected.norm(), atol=1e-5, rtol=1e-4)


def test_identical_sources_classify_themselves(encoder, tmp_path):
    folder = str(make_folders(tmp_path, classes=4, per_class=3))
    result = knn_accuracy(encoder[0], folder, folder, k=1)
    assert (result.top1, result.images, result.k) == (1.0, 12, 1)


def test_sources_that_do_not_fit_are_refused(encoder, tmp_path):
    one, two = make_folders(tmp_path / "one", classes=2), make_folders(tmp_path / "two", classes=3)
    with pytest.raises(DataError, match="fewer than k=20"):
        knn_accuracy(encoder[0], str(one), str(one))
    with pytest.raises(DataError, match="--k 0"):
        knn_accuracy(encoder[0], str(one), str(one), k=0)
    with pytest.raises(DataError, match="classes differ"):
        knn_accuracy(encoder[0], str(one), str(two), k=1)


@pytest.mark.parametrize("target", ["pixel", "norm_pixel"])
def test_a_model_that_predicts_its_target_reconstructs_the_image(target, monkeypatch):
    model = model_from_config(load_config("debug", {"model.target": target}))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    perfect = make_target(images, model.patch, target)
    monkeypatch.setattr(model, "decode", lambda latent, ids: perfect)
    filled, mask = reconstruct(model, images, noise, 0.75)
    torch.testing.assert_close(filled, images, atol=1e-4, rtol=1e-4)
    assert mask.mean().item() == 0.75
    assert mask.shape == (2, 1, 32, 32)


def test_visible_patches_are_left_alone_and_hidden_ones_predicted():
    model = model_from_config(load_config("debug", {"model.target": "pixel"}))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    filled, mask = reconstruct(model, images, noise, 0.5)
    with torch.inference_mode():
        output = model(images, noise, 0.5)
    predicted = unpatchify(output.pred, model.patch, model.grid)
    assert torch.equal(filled * (1 - mask), images * (1 - mask))
    torch.testing.assert_close(filled * mask, predicted * mask)


@pytest.mark.parametrize("target", ["pixel", "norm_pixel"])
def test_picture_has_a_row_an_image_and_ratio(tmp_path, target, monkeypatch):
    from matplotlib.figure import Figure

    titles = []
    original = Figure.suptitle
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **kw: titles.append(text) or original(self, text, **kw))
    config = load_config("debug", {"model.target": target})
    paths = []
    for i in range(2):
        paths.append(str(tmp_path / f"{i}.jpg"))
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(90, 60, seed=i))
    out = tmp_path / "out.png"
    draw(model_from_config(config), config, paths, out, [0.75, 0.5, 0.9], step=7)
    picture = Image.open(out)
    assert picture.height > picture.width  # six rows of three
    assert ("mean and deviation of the true patch" in titles[0]) == (target == "norm_pixel")
    assert "step 7" in titles[0]


def test_pictures_that_cannot_be_drawn(tmp_path):
    config = load_config("debug")
    model = model_from_config(config)
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "b.jpg").write_bytes(b"no")
    a, b = str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")
    for paths, out, ratios, message in (
        ([a, b], tmp_path / "o.png", [0.75], "b.jpg: cannot be read as an image"),
        ([a], tmp_path / "a.jpg" / "o.png", [0.75], "cannot be written"),
        ([a], tmp_path / "o.png", [1.0], "--mask-ratio: mask ratio 1.0 keeps 0"),
    ):
        with pytest.raises(UserError, match=message):
            draw(model, config, paths, out, ratios, step=1)
