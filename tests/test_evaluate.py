"""Nearest neighbours and reconstruction pictures."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from images import jpeg, make_folders
from PIL import Image
from ranks import run_ranks
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from scale_mae import UserError, load_config
from scale_mae.cli import main
from scale_mae.data.errors import DataError
from scale_mae.data.index_builder import list_source
from scale_mae.distributed.process_group import process_group
from scale_mae.evaluation import knn
from scale_mae.evaluation.features import LabeledSource, features
from scale_mae.evaluation.knn import find_nearest, knn_accuracy, vote
from scale_mae.evaluation.logistic_regression import (
    choose_penalty,
    fit_logistic_regression,
    logistic_regression_accuracy,
    logits,
)
from scale_mae.evaluation.models import load_frozen_encoder
from scale_mae.evaluation.reconstruct import draw_reconstructions, reconstruct
from scale_mae.model.targets import compute_target, unpatchify
from scale_mae.system import progress
from scale_mae.weights.metadata import METADATA_KEY, build_metadata
from scale_mae.weights.model_builder import build_mae_from_config, encoder_state


def test_votes_follow_an_independent_implementation(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    train = torch.nn.functional.normalize(torch.randn(300, 8, generator=generator), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=1)
    labels = torch.randint(0, 5, (300,), generator=generator)
    # for unit vectors the Euclidean distance d gives the cosine similarity 1 - d**2 / 2
    theirs = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
    theirs.fit(train.numpy(), labels.numpy())
    wanted = theirs.predict(queries.numpy()).tolist()
    assert vote(*find_nearest(train, labels, queries, 20), 5).tolist() == wanted
    monkeypatch.setattr(knn, "QUERIES", 7)
    monkeypatch.setattr(knn, "BANK", 13)  # fewer than neighbours
    assert vote(*find_nearest(train, labels, queries, 20), 5).tolist() == wanted


def test_logistic_regression_follows_an_independent_implementation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    y = (x[:, :3] + torch.randn(200, 3, generator=generator)).argmax(1)
    ours = fit_logistic_regression(x, y, 3, l2=0.01)
    theirs = LogisticRegression(C=1 / (0.01 * 200), tol=1e-8, max_iter=5000).fit(x.numpy(), y.numpy())
    probabilities = torch.softmax(logits(ours, x), dim=1).numpy()
    assert np.abs(probabilities - theirs.predict_proba(x.numpy())).max() < 1e-3


def test_the_penalty_is_chosen_on_images_held_out():
    """Labels without any relation to the features: the strongest penalty is as good as any."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 50, generator=generator), torch.zeros(100, dtype=torch.int64)
    y[:10] = 1
    assert choose_penalty(x, y, 2) == 0.1


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A MAE, and its exported encoder."""
    config = load_config("debug")
    model = build_mae_from_config(config)
    path = tmp_path_factory.mktemp("encoder") / "e.safetensors"
    metadata = {METADATA_KEY: json.dumps(build_metadata(config, 0))}
    save_file({n: t.contiguous() for n, t in encoder_state(model.state_dict()).items()}, path, metadata)
    return path, model


def measured(measure, path, train, val, *more):
    with process_group() as ranks:
        return measure(load_frozen_encoder(path), LabeledSource.open(str(train)), LabeledSource.open(str(val)), ranks, *more)


def test_features_are_the_mean_patch_token_of_the_encoder(encoder, tmp_path):
    path, mae = encoder
    index = list_source(str(make_folders(tmp_path)))
    found = features(load_frozen_encoder(path), index, range(len(index)), 5).values
    image = Image.open(tmp_path / "class0" / "0.jpg").crop((5, 0, 35, 30)).resize((32, 32), Image.Resampling.BICUBIC)
    x = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 - 0.286) / 0.353
    with torch.inference_mode():
        expected = mae.eval().features(x)[:, 1:].mean(1)
    torch.testing.assert_close(found[:1], expected, atol=1e-5, rtol=1e-4)


def test_identical_sources_classify_themselves(encoder, tmp_path):
    folder = make_folders(tmp_path, classes=4, per_class=3)
    result = measured(knn_accuracy, encoder[0], folder, folder, 1)
    assert (result.scores["top1"], result.data["images"], result.protocol["k"]) == (1.0, 12, 1)
    assert result.model["seed"] == load_config("debug").run.seed


def knn_in_rank(path, k):
    torch.set_num_threads(1)
    with process_group() as ranks:
        train, val = (LabeledSource.open(source) for source in ("demo:val", "demo:val"))
        return knn_accuracy(load_frozen_encoder(path), train, val, ranks, k)


def test_processes_share_the_neighbours(encoder):
    one, three = (run_ranks(size, knn_in_rank, encoder[0], 20)[0] for size in (1, 3))
    assert one.scores == three.scores
    assert one.data == three.data
    assert 0.3 < one.scores["top1"] < 1


def test_a_linear_classifier_of_features(encoder):
    result = measured(logistic_regression_accuracy, encoder[0], "demo:val", "demo:val")
    assert result.scores["top1"] > 0.6
    assert result.data["images"] == 2000


def test_a_rate_is_that_of_one_source(capsys, monkeypatch):
    now = iter([0.0, 0.5, 100.0, 104.0, 104.0, 106.0, 1000.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1)
    with progress.ProgressBar("images") as bar:
        for done, total in ((64, 256), (128, 256), (64, 66), (66, 66), (66, 128), (128, 128), (63, 63)):
            bar.update(done, total)
    lines = ["64 of 256 images", "128 of 256 images, 128/s", "64 of 66 images", "66 of 66 images, 0.5/s"]
    lines += ["66 of 128 images", "128 of 128 images, 31/s", "63 of 63 images"]
    assert capsys.readouterr().err.splitlines() == lines


def measuring(command, encoder, out):
    """Words of a command that would measure, if its sources were there."""
    sources = {
        "evaluate": ["--on", "folder", "--root", "absent"],
        "embed": ["absent"],
    }
    return [command, str(encoder), *sources.get(command, ["--train", "absent", "--val", "absent"]), "--out", str(out)]


@pytest.mark.parametrize("command", ["evaluate", "knn", "logistic", "embed"])
def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(command, encoder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "f.npy").mkdir()
    refused = {"file/r.npy": "Not a directory|File exists", "f.npy": "Is a directory", "n" * 250: "File name too long"}
    for out, reason in refused.items():
        assert main(measuring(command, encoder[0], tmp_path / out)) == 2
        assert re.fullmatch(rf"scale-mae: error: {tmp_path / out}: cannot be written \(({reason})\)\n", capsys.readouterr().err)
    assert main(measuring(command, encoder[0], tmp_path / "new" / "r.npy")) == 2
    assert "cannot be written" not in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir())


def test_sources_that_do_not_fit_are_refused(encoder, tmp_path):
    one, two = make_folders(tmp_path / "one", classes=2), make_folders(tmp_path / "two", classes=3)
    with pytest.raises(DataError, match="fewer than --k 20"):
        measured(knn_accuracy, encoder[0], one, one, 20)
    with pytest.raises(DataError, match="--k 0"):
        measured(knn_accuracy, encoder[0], one, one, 0)
    for measure, more in ((knn_accuracy, [1]), (logistic_regression_accuracy, [])):
        with pytest.raises(DataError, match="classes differ"):
            measured(measure, encoder[0], one, two, *more)


@pytest.mark.parametrize("target", ["pixel", "norm_pixel"])
def test_a_model_that_predicts_its_target_reconstructs_the_image(target, monkeypatch):
    model = build_mae_from_config(load_config("debug", {"model.target": target}))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    perfect = compute_target(images, model.patch_size, target)
    monkeypatch.setattr(model, "decode", lambda latent, ids: perfect)
    filled, mask = reconstruct(model, images, noise, 0.75)
    torch.testing.assert_close(filled, images, atol=1e-4, rtol=1e-4)
    assert mask.mean().item() == 0.75
    assert mask.shape == (2, 1, 32, 32)


def test_visible_patches_are_left_alone_and_hidden_ones_predicted():
    model = build_mae_from_config(load_config("debug", {"model.target": "pixel"}))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    filled, mask = reconstruct(model, images, noise, 0.5)
    with torch.inference_mode():
        output = model(images, noise, 0.5)
    predicted = unpatchify(output.pred, model.patch_size, model.grid)
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
    draw_reconstructions(build_mae_from_config(config), config, paths, out, [0.75, 0.5, 0.9], step=7)
    picture = Image.open(out)
    assert picture.height > picture.width  # six rows of three
    assert ("mean and standard deviation of the true patch" in titles[0]) == (target == "norm_pixel")
    assert "step 7" in titles[0]


def test_pictures_that_cannot_be_drawn(tmp_path):
    config = load_config("debug")
    model = build_mae_from_config(config)
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "b.jpg").write_bytes(b"no")
    a, b = str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")
    for paths, out, ratios, message in (
        ([a, b], tmp_path / "o.png", [0.75], "b.jpg: cannot be read as an image"),
        ([a], tmp_path / "a.jpg" / "o.png", [0.75], "cannot be written"),
        ([a], tmp_path / "o.png", [1.0], "--mask-ratio: mask ratio 1.0 keeps 0"),
    ):
        with pytest.raises(UserError, match=message):
            draw_reconstructions(model, config, paths, out, ratios, step=1)
