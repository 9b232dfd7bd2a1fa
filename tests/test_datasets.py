"""Each evaluation data set in its published folders, made of Fashion-MNIST: missing files, competing classes, exact scores."""

import functools
import io
import json
from importlib import resources
from statistics import fmean

import numpy as np
import pytest
import torch
from classifiers import (
    MEAN,
    STD,
    WNIDS,
    class_folders,
    classes_file,
    copy_folder,
    corrupted_folders,
    fashion,
    fitted_classifier,
    vit,
    write_image,
    write_timm,
)
from PIL import Image
from ranks import run_ranks
from torchvision import transforms

from scale_mae.cli import main
from scale_mae.data.crop_boxes import reference_crop_pct
from scale_mae.data.errors import DataError, ImageError
from scale_mae.data.pillow import decode_center_crop
from scale_mae.distributed.process_group import process_group
from scale_mae.evaluation.accuracy import class_rank
from scale_mae.evaluation.corruption_error import ALEXNET_ERROR, CORRUPTIONS, mean_corruption_error, unnormalized_error
from scale_mae.evaluation.dataset_checks import find_deviations
from scale_mae.evaluation.datasets import DATASETS, list_parts, read_classes, synsets
from scale_mae.evaluation.evaluate import evaluate
from scale_mae.evaluation.models import load_classifier
from scale_mae.evaluation.results import Result


def measure(name, root, model=None, report=lambda _: None, **options):
    """Measure with one process. The reported lines are ignored."""
    with process_group() as ranks:
        return evaluate(load_classifier(model or fitted_classifier()), name, str(root), ranks, report=report, **options)


def outputs(paths, transform, model=None):
    """An evaluation loop of its own, with torchvision's transforms."""
    model = load_classifier(model or fitted_classifier()).model
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.inference_mode():
        return model(images)


def standard(crop_pct=0.875):
    resize = [transforms.Resize(int(32 / crop_pct), transforms.InterpolationMode.BICUBIC)] if crop_pct else []
    return transforms.Compose([*resize, transforms.CenterCrop(32), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def label_of(path):
    return WNIDS.index(path.parent.name)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (301, 200), (256, 256), (80, 64)])
@pytest.mark.parametrize("side", [224, 32])
def test_pixels_are_those_of_the_references_transforms(size, side):
    small = np.random.default_rng(0).integers(0, 255, (size[1] // 5, size[0] // 5, 3), np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)
    data = io.BytesIO()
    image.save(data, "PNG")
    crop = reference_crop_pct(side)
    theirs = transforms.Compose(
        [transforms.Resize(int(side / crop), transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(side)]
    )
    difference = np.abs(decode_center_crop(data.getvalue(), side, crop).astype(int) - np.asarray(theirs(image)).astype(int))
    if size[0] >= size[1]:
        assert difference.max() == 0
    else:  # Pillow from 13 on scales tall images in the other order
        assert difference.mean() < 0.5


def test_nothing_is_scaled_without_a_crop_share():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (41, 44, 3), np.uint8))
    data = io.BytesIO()
    image.save(data, "PNG")
    theirs = np.asarray(transforms.CenterCrop(32)(image))
    assert np.array_equal(decode_center_crop(data.getvalue(), 32, None), theirs)
    with pytest.raises(ImageError, match="44 x 41 pixels, smaller than the crop of 224 x 224"):
        decode_center_crop(data.getvalue(), 224, None)


def test_the_reference_cuts_nothing_off_above_224():
    assert [int(size / reference_crop_pct(size)) for size in (224, 448, 32)] == [256, 448, 36]


# ---------------------------------------------------------------- accuracy


def test_class_folders_score_as_a_loop_with_torchvision_does(tmp_path):
    root = class_folders(tmp_path / "data", size=48, per_class=6)
    paths = sorted(root.glob("*/*"))
    labels = torch.tensor([label_of(path) for path in paths])
    logits = outputs(paths, standard())
    result, issues = measure("folder", root, batch=7)
    assert result.data["images"] == len(paths) == 60
    assert result.scores["top1"] == (logits.argmax(1) == labels).double().mean().item()
    assert result.scores["top5"] == (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert result.scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)
    assert 0.15 < result.scores["top1"] < 1  # else the test would compare nothing
    assert "no published model is a ViT-32x3/8, 32 px" in issues
    cropped, _ = measure("folder", root, crop_pct=1.0)
    assert cropped.scores["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(outputs(paths, standard(1.0)), labels).item(), abs=1e-5
    )


def test_equal_outputs_are_in_the_order_of_the_classes():
    logits = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0], [3.0, 1.0, 2.0]])
    assert class_rank(logits, torch.tensor([0, 2, 1])).tolist() == [0, 1, 2]
    assert class_rank(logits, torch.tensor([2, 0, 0])).tolist() == [2, 2, 0]


def test_any_number_of_processes_counts_each_image_once(tmp_path):
    """32 images, which neither three processes nor batches of four and three processes divide."""
    root = class_folders(tmp_path / "data", per_class=4, classes=range(8))
    model = str(fitted_classifier())
    (tmp_path / "classes.txt").write_text("\n".join(WNIDS))
    results = []
    for size in (1, 2, 3):
        found = run_ranks(size, evaluate_in_rank, model, str(root), str(tmp_path / "classes.txt"))
        assert all(each.scores == found[0].scores for each in found)
        results.append(found[0])
    for result in results:
        assert result.data["images"] == 32
        assert result.data["digest"] == results[0].data["digest"]
        assert [result.scores[name] for name in ("top1", "top5")] == [results[0].scores[name] for name in ("top1", "top5")]
        assert result.scores["loss"] == pytest.approx(results[0].scores["loss"], abs=1e-6)
    assert [result.environment["processes"] for result in results] == [1, 2, 3]


def evaluate_in_rank(model, root, classes):
    with process_group() as ranks:
        return evaluate(load_classifier(model), "folder", root, ranks, batch=4, classes=classes, report=lambda _: None)[0]


def test_a_damaged_image_is_one_error_on_every_process(tmp_path):
    root = class_folders(tmp_path / "data", per_class=2)
    bad = sorted(root.glob("*/*"))[1]  # the second process's
    bad.write_bytes(bad.read_bytes()[:200])
    found = run_ranks(2, error_in_rank, str(fitted_classifier()), str(root))
    assert found[0] == found[1]
    assert f"{bad}: damaged" in found[0]


def error_in_rank(model, root):
    with process_group() as ranks, pytest.raises(DataError) as caught:
        evaluate(load_classifier(model), "folder", root, ranks, batch=4)
    return str(caught.value)


def test_the_digest_tells_images_and_labels_not_names(tmp_path):
    root = class_folders(tmp_path / "data", per_class=2)
    digest = measure("folder", root)[0].data["digest"]
    moved = copy_folder(root, tmp_path / "moved")
    first = sorted(moved.glob("*/*"))[0]
    first.rename(first.with_name("z.JPEG"))
    assert measure("folder", moved)[0].data["digest"] == digest
    (moved / WNIDS[0] / "z.JPEG").rename(moved / WNIDS[1] / "z.JPEG")
    assert measure("folder", moved)[0].data["digest"] != digest


def test_outputs_that_are_not_finite_are_an_error(tmp_path):
    root = class_folders(tmp_path / "data", per_class=1)
    subject = load_classifier(fitted_classifier())
    with torch.no_grad():
        subject.model.head.weight.fill_(torch.inf)
    with process_group() as ranks, pytest.raises(Exception, match="folder: the model's output is not finite"):
        evaluate(subject, "folder", str(root), ranks)


# ---------------------------------------------------------------- the sets


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_only_classes_that_are_there_compete(tmp_path, name):
    present = [1, 4, 7]
    root = class_folders(tmp_path / name.replace("_", "-"), classes=present, per_class=20)
    paths = sorted(root.glob("*/*"))
    labels = torch.tensor([label_of(path) for path in paths])
    logits = outputs(paths, standard())
    among = (torch.tensor(present)[logits[:, present].argmax(1)] == labels).double().mean().item()
    over_all = (logits.argmax(1) == labels).double().mean().item()
    result, _ = measure(name, tmp_path, classes=classes_file(tmp_path / "classes.txt"))
    assert result.scores["top1"] == among > over_all
    with pytest.raises(
        DataError, match="3 classes, but the model has 10; give the name of each output, one per line, with --classes FILE"
    ):
        measure(name, tmp_path)
    with pytest.raises(DataError, match="the model has no class n00000001 .1 of 3 classes"):
        measure(name, tmp_path, classes=classes_file(tmp_path / "classes.txt", ["x", "y", *WNIDS[2:]]))


def test_classes_in_another_order_are_found_by_name(tmp_path):
    root = class_folders(tmp_path / "sketch", per_class=4)
    straight, _ = measure("imagenet_sketch", tmp_path)
    assert straight.data["images"] == 40
    order = np.random.default_rng(0).permutation(10)
    for number, wnid in enumerate(WNIDS):
        (root / wnid).rename(root / f"was{order[number]}")
    for number in range(10):
        (root / f"was{number}").rename(root / f"n9000000{number}")
    names = [f"n9000000{order[number]}" for number in range(10)]
    shuffled, _ = measure("imagenet_sketch", tmp_path, classes=classes_file(tmp_path / "classes.txt", names))
    assert shuffled.scores["top1"] == straight.scores["top1"]
    assert measure("imagenet_sketch", tmp_path)[0].scores["top1"] < straight.scores["top1"]


def test_names_of_classes_come_from_a_file_an_index_or_imagenet(tmp_path):
    assert read_classes(None, 1000)[:2] == ["n01440764", "n01443537"]
    assert read_classes(None, 10) is None
    with pytest.raises(DataError, match="9 different names, but the model has 10 classes"):
        read_classes(classes_file(tmp_path / "classes.txt", WNIDS[1:]), 10)
    with pytest.raises(DataError, match="cannot be read"):
        read_classes(str(tmp_path / "absent.txt"), 10)
    root = class_folders(tmp_path / "data", per_class=1)
    assert main(["index", str(root), "--out", str(tmp_path / "d.index")]) == 0
    assert read_classes(str(tmp_path / "d.index"), 10) == WNIDS


def test_sets_as_they_are_handed_out(tmp_path):
    """ImageNet-1k with Kaggle's list of labels, iNaturalist with its annotations, Places with their lists."""
    images, labels = tmp_path / "images", {}
    for i, (c, image) in enumerate(fashion(3)):
        write_image(images / f"{i}.jpg", image)
        labels[i] = c
    kaggle = tmp_path / "kaggle"
    copy_folder(images, kaggle / "val")
    for i in labels:
        (kaggle / "val" / f"{i}.jpg").rename(kaggle / "val" / f"{i}.JPEG")
    rows = "".join(f"{i},{WNIDS[c]} 1 2 3 4\n" for i, c in labels.items())
    (kaggle / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{rows}")
    inat = tmp_path / "inat"
    copy_folder(images, inat / "val")
    reported = {
        "images": [{"id": i, "file_name": f"val/{i}.jpg"} for i in labels],
        "annotations": [{"image_id": i, "category_id": c} for i, c in labels.items()],
        "categories": [{"id": c, "name": f"species {c}"} for c in range(10)],
    }
    for year in (2017, 2018, 2019):
        (inat / f"val{year}.json").write_text(json.dumps(reported))
    places = tmp_path / "places"
    copy_folder(images, places / "images256")
    copy_folder(images, places / "val_256")
    for name in ("val_places205.csv", "places365_val.txt"):
        (places / name).write_text("".join(f"{i}.jpg {c}\n" for i, c in labels.items()))
    roots = {"imagenet1k": kaggle, "places205": places, "places365": places}
    roots |= {f"inat{year}": inat for year in (2017, 2018, 2019)}
    scores = {name: measure(name, root)[0] for name, root in roots.items()}
    assert {result.data["images"] for result in scores.values()} == {30}
    assert len({result.scores["top1"] for result in scores.values()}) == 1
    assert len({result.data["digest"] for result in scores.values()}) == 1
    assert scores["imagenet1k"].scores["top1"] > 0.15


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "folder"])
def test_an_empty_folder_is_one_line_that_says_what_is_missing(tmp_path, name):
    with pytest.raises(DataError, match=r"missing|no class folders .such as n01440764|no class folders of") as caught:
        measure(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_unlabelled_unknown_and_unusable_images(tmp_path):
    flat = tmp_path / "flat"
    for i, (_, image) in enumerate(fashion(1)):
        write_image(flat / f"{i}.jpg", image)
    with pytest.raises(DataError, match="10 of 10 images have no label"):
        measure("folder", flat)
    (flat / "list.txt").write_text("0.jpg 3\n1.jpg 10\n")
    with pytest.raises(DataError, match="contains class 10, but the model only has classes 0 to 9"):
        measure("folder", flat / "list.txt")
    root = class_folders(tmp_path / "data", per_class=1)
    bad = next(root.glob("*/*"))
    bad.write_bytes(b"no image")
    assert main(["index", str(root), "--out", str(tmp_path / "d.index")]) == 0
    with pytest.raises(DataError, match="1 images cannot be read .*a score needs all images"):
        measure("folder", tmp_path / "d.index")


@pytest.mark.parametrize("where", ["list", "index"])
def test_files_that_are_told_of_and_absent_are_found_before_anything_is_scored(tmp_path, where):
    places, reported = tmp_path / "places", []
    for i, (_, image) in enumerate(fashion(1)):
        write_image(places / "val_256" / f"{i}.jpg", image)
    (places / "places365_val.txt").write_text("".join(f"{i}.jpg {i}\n" for i in range(10)))
    name, root = "places365", places
    if where == "index":
        assert main(["index", f"places365:val:{places}", "--out", str(tmp_path / "p.index")]) == 0
        name, root = "folder", tmp_path / "p.index"
    for i in (3, 7):
        (places / "val_256" / f"{i}.jpg").unlink()
    with pytest.raises(DataError, match=r"val_256/3.jpg is missing .2 of 10 listed files are missing") as caught:
        measure(name, root, progress=lambda *done: reported.append(done))
    assert str(root) in str(caught.value)
    assert not reported


# ---------------------------------------------------------------- ImageNet's classes


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """A folder with a classifier of ImageNet's 1,000 classes that prefers them in their order."""
    model = vit(num_classes=1000)
    with torch.no_grad():
        model.head.bias.copy_(torch.linspace(1000, 0, 1000))
    return write_timm(tmp_path_factory.mktemp("thousand"), model)


def real_folders(root, wnids):
    """``root/n01498041/I.JPEG``, an image each."""
    for i, wnid in enumerate(wnids):
        write_image(root / wnid / f"{i}.JPEG", fashion(1)[i % 10][1])
    return root


@functools.cache
def lines(name):
    return resources.files("timm.data").joinpath(f"_info/{name}.txt").read_text().split()


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_the_published_classes_compete_also_where_a_folder_is_missing(tmp_path, thousand, name):
    competing = [int(number) for number in lines(f"{name}_indices")]
    wnids, reported = [lines("imagenet_synsets")[number] for number in competing], []
    assert wnids == list(synsets(name))
    root = real_folders(tmp_path / name.replace("_", "-"), wnids[1:])
    logits = outputs(sorted(root.glob("*/*")), standard(), thousand)[:, competing]
    result, issues = measure(name, tmp_path, thousand, reported.append)
    assert result.data["images"] == 199
    labels = torch.arange(1, 200)
    assert result.scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.scores["top5"] == (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item() == 4 / 199
    assert issues[-2:] == ["199 images are not the published set", f"199 of 200 classes: {wnids[0]} missing"]
    assert reported == [f"{name}: 199 of 200 classes: {wnids[0]} missing"]
    write_image(root / "n01440764" / "0.JPEG", fashion(1)[0][1])  # a class of ImageNet that both leave out, or one has
    (root / wnids[5]).rename(root / "moved")
    (root / "moved").rename(root / wnids[0])
    (root / wnids[2] / "1.JPEG").unlink()
    extra = "" if "n01440764" in wnids else ", n01440764 extra"
    assert measure(name, tmp_path, thousand)[1][-1] == f"198 of 200 classes: {wnids[5]} missing, {wnids[2]} empty{extra}"


def test_a_whole_set_has_nothing_to_tell(tmp_path, thousand):
    real_folders(tmp_path, synsets("imagenet_a"))
    _, issues = measure("imagenet_a", tmp_path, thousand)
    assert not [reason for reason in issues if "classes:" in reason]


def test_an_empty_class_folder_is_named(tmp_path, thousand):
    names = synsets("imagenet")
    for root, wnids, phrase in (
        ("theirs", names[:2], f"1 of 1000 classes: {names[2]} and 997 more missing, {names[1]} empty"),
        ("own", WNIDS[:2], f"1 of 2 classes: {WNIDS[1]} empty"),
    ):
        real_folders(tmp_path / root / "val", wnids)
        (tmp_path / root / "val" / wnids[1] / "1.JPEG").unlink()
        model, classes = (thousand, None) if root == "theirs" else (None, classes_file(tmp_path / "classes.txt"))
        _, issues = measure("imagenet1k", tmp_path / root, model, classes=classes)
        assert issues[1:] == ["1 images are not the published set", *issues[2:-1], phrase]


# ---------------------------------------------------------------- ImageNet-C


def test_alexnets_errors_are_the_means_of_its_published_ones():
    """github.com/hendrycks/robustness, issue 10: errors of AlexNet at severities 1 to 5."""
    each = {
        "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
        "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
        "impulse_noise": (0.78374, 0.89808, 0.9487, 0.9872, 0.99548),
        "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
        "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
        "motion_blur": (0.5843, 0.70048, 0.82108, 0.8975, 0.92638),
        "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
        "snow": (0.71726, 0.88392, 0.86468, 0.9187, 0.94952),
        "frost": (0.6139, 0.79734, 0.8879, 0.89942, 0.9343),
        "fog": (0.67474, 0.7605, 0.84378, 0.8726, 0.945),
        "brightness": (0.4514, 0.48502, 0.54048, 0.62166, 0.7244),
        "contrast": (0.64548, 0.7615, 0.88874, 0.9776, 0.9927),
        "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    }
    for name, errors in each.items():
        assert ALEXNET_ERROR[name] == pytest.approx(fmean(errors), abs=1e-6), name
    assert len(ALEXNET_ERROR) == 15


def test_mce_of_values_worked_out_by_hand():
    top1 = {f"{corruption}/{severity}": 0.5 for corruption in CORRUPTIONS for severity in range(1, 6)}
    # the mean of 1 / error over the 15 is 1.292983...; half of it with every error at one half
    assert mean_corruption_error(top1) == pytest.approx(sum(0.5 / e for e in ALEXNET_ERROR.values()) / 15)
    alexnet = {f"{c}/{s}": 1 - ALEXNET_ERROR[c] for c in CORRUPTIONS for s in range(1, 6)}
    assert mean_corruption_error(alexnet) == pytest.approx(1.0)
    # brightness alone worse by 0.1 at two severities: 0.2 / 5 / 0.564592 / 15
    worse = alexnet | {"brightness/1": alexnet["brightness/1"] - 0.1, "brightness/5": alexnet["brightness/5"] - 0.1}
    assert mean_corruption_error(worse) == pytest.approx(1 + 0.00472318, abs=1e-7)
    assert unnormalized_error(top1) is None
    top1 |= {f"{c}/{s}": 0.0 for c in ("speckle_noise", "gaussian_blur", "spatter", "saturate") for s in range(1, 6)}
    assert unnormalized_error(top1) == pytest.approx((15 * 0.5 + 4) / 19)


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory):
    return corrupted_folders(tmp_path_factory.mktemp("imagenet_c"))


def test_mce_on_its_folders(corrupted, tmp_path):
    """Against a loop of its own with torchvision's transforms: the stored images, centre-cropped only."""
    error = {}
    for name in (*CORRUPTIONS, "speckle_noise", "gaussian_blur", "spatter", "saturate"):
        wrong = []
        for severity in range(1, 6):
            paths = sorted((corrupted / name / str(severity)).glob("*/*"))
            labels = torch.tensor([label_of(path) for path in paths])
            wrong.append((outputs(paths, standard(None)).argmax(1) != labels).double().mean().item())
        error[name] = sum(wrong) / 5
    result, issues = measure("imagenet_c", corrupted)
    mce = sum(error[name] / ALEXNET_ERROR[name] for name in CORRUPTIONS) / 15
    assert result.scores["mce"] == pytest.approx(mce, abs=1e-12)
    assert result.scores["error_19_unnormalized"] == pytest.approx(sum(error.values()) / 19, abs=1e-12)
    assert abs(mce - sum(error.values()) / 19) > 0.05  # two quantities, not one under two names
    assert result.data["images"] == 95 * 10
    assert result.parts["fog/3"]["images"] == 10
    assert result.parts["fog"]["error_over_alexnet"] == pytest.approx(error["fog"] / ALEXNET_ERROR["fog"])
    assert result.protocol["resize"] == "none"
    assert any("950 images are not the published set" in reason for reason in issues)


def test_what_is_missing_of_imagenet_c(corrupted, tmp_path):
    root = tmp_path / "c"
    for name in CORRUPTIONS[:3]:
        copy_folder(corrupted / name, root / "noise" / name)  # as the archives unpack
    with pytest.raises(DataError, match="c: defocus_blur is missing; 3 of the 15 corruptions exist"):
        measure("imagenet_c", root)
    for name in CORRUPTIONS[3:]:
        copy_folder(corrupted / name, root / name)
    (root / "snow" / "4").rename(root / "snow" / "6")
    with pytest.raises(DataError, match="snow/4: no such folder; every corruption has the severities 1 to 5"):
        measure("imagenet_c", root)
    (root / "snow" / "6").rename(root / "snow" / "4")
    result, _ = measure("imagenet_c", root)
    assert "error_19_unnormalized" not in result.scores
    with pytest.raises(Exception, match="center crops already"):
        measure("imagenet_c", root, crop_pct=0.875)
    assert Result(**vars(result)).scores["mce"] > 0


def test_an_empty_part_ends_it_before_anything_is_scored(corrupted, tmp_path):
    root, reported = copy_folder(corrupted, tmp_path / "c"), []
    for image in (root / "jpeg_compression" / "5").glob("*/*"):
        image.unlink()
    with pytest.raises(DataError, match="jpeg_compression/5: no images found") as caught:
        measure("imagenet_c", root, report=reported.append)
    assert "\n" not in str(caught.value)
    assert not reported


def test_a_part_that_is_unlike_the_others_is_named(corrupted, tmp_path):
    root, reported = copy_folder(corrupted, tmp_path / "c"), []
    classes = classes_file(tmp_path / "classes.txt")
    (root / "fog" / "3" / WNIDS[4] / "4.JPEG").unlink()
    (root / "fog" / "3" / WNIDS[4]).rmdir()
    result, issues = measure("imagenet_c", root, report=reported.append, classes=classes)
    assert issues[-1] == f"fog/3: 9 images, others 10; {WNIDS[4]} missing"
    assert reported[0] == f"imagenet_c: {issues[-1]}"
    assert reported[1].startswith("gaussian_noise/1: top-1")
    assert result.parts["fog/3"]["images"] == 9
    (root / "snow" / "1" / WNIDS[2] / "2.JPEG").rename(root / "snow" / "1" / WNIDS[4] / "2.JPEG")
    (root / "pixelate" / "5" / WNIDS[2] / "2.JPEG").rename(root / "pixelate" / "5" / WNIDS[2] / "2.txt")
    found = find_deviations(list_parts("imagenet_c", str(root), WNIDS, 10), DATASETS["imagenet_c"])
    assert found == [f"snow/1: {WNIDS[2]} empty (the first of 3 such parts)"]


def test_two_processes_are_told_the_same_of_what_deviates(tmp_path):
    root = class_folders(tmp_path / "data" / "imagenet-r", per_class=2)
    for image in (root / WNIDS[3]).iterdir():
        image.unlink()
    found = run_ranks(2, deviating_in_rank, str(fitted_classifier()), str(root), classes_file(tmp_path / "classes.txt"))
    assert found[0] == found[1]
    assert found[0][:2] == (18, [f"imagenet_r: 9 of 10 classes: {WNIDS[3]} empty"])
    for image in root.glob("*/*"):
        image.unlink()
    assert "no images found" in run_ranks(2, deviating_in_rank, str(fitted_classifier()), str(root), None)[1]


def deviating_in_rank(model, root, classes):
    reported = []
    with process_group() as ranks:
        try:
            result, issues = evaluate(
                load_classifier(model), "imagenet_r", root, ranks, classes=classes, report=reported.append
            )
        except DataError as error:
            return str(error)
    return result.data["images"], reported, issues, result.scores


def test_through_the_command_line(tmp_path, capsys):
    root = class_folders(tmp_path / "imagenet-r", per_class=1)
    words = ["evaluate", str(fitted_classifier()), "--on", "imagenet_r", "--root", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path / "results" / "r.json"), "--seed", "4"]) == 0
    text = capsys.readouterr().out
    assert "(10 images, ViT-32x3/8, 32 px)" in text
    assert "paper, table 13" in text
    assert "not comparable: no published model is a ViT-32x3/8, 32 px; 10 images are not the published set" in text
    written = Result.read(tmp_path / "results" / "r.json")
    assert (written.model["seed"], written.data["root"]) == (4, str(root.parent))
    assert len(written.model["sha256"]) == 64
    assert main(["results", str(tmp_path / "results")]) == 0
    assert "imagenet_r" in capsys.readouterr().out
    assert main([*words, "--crop-pct", "2"]) == 2
    assert "--crop-pct 2.0: must be above 0 and at most 1" in capsys.readouterr().err
