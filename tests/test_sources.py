"""Tests of listing every kind of source. Listing opens no image, so a few bytes stand for an image here."""

import contextlib
import gzip
import io
import json
import os
import random
import re
import tarfile

import pytest

from scale_mae.data.errors import DataError
from scale_mae.data.image_list import NO_LABEL
from scale_mae.data.sources import list_images
from scale_mae.data.storage import file_size, read


def write(root, *names, content=b"x"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def tar_bytes(*members, format=tarfile.PAX_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def listed(source):
    listing = list_images(str(source))
    return [(listing.shards[s], label) for s, label in zip(listing.shard, listing.label, strict=True)]


def labels(source):
    listing = list_images(str(source))
    return list(listing.label), listing.classes


def contents(listing):
    columns = zip(listing.shard, listing.offset, listing.length, strict=True)
    places = [(os.path.join(listing.root, listing.shards[s]), offset, length) for s, offset, length in columns]
    return [read(path, offset, length or (0 if offset else file_size(path))) for path, offset, length in places]


def check_error(source, *words):
    with pytest.raises(DataError) as caught:
        list_images(str(source))
    text = str(caught.value)
    assert text.isprintable()
    assert all(str(word) in text for word in words), text


def test_class_folders_are_listed_at_any_depth_in_alphabetical_order(tmp_path):
    root = write(
        tmp_path / "data", "b/2.PNG", "b/deep/1.jpg", "b/also/1.jpg", "a/3.webp", "a/notes.md", "10/x.tiff", "empty/no.txt"
    )
    write(root, "b/._2.png", ".hidden/1.jpg", "b/.ipynb_checkpoints/2.jpg")
    write(tmp_path, "elsewhere/z.jpeg")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    paths = ["10/x.tiff", "a/3.webp", "b/2.PNG", "b/also/1.jpg", "b/deep/1.jpg", "link/z.jpeg"]
    assert listed(root) == list(zip(paths, [0, 1, 2, 2, 2, 3], strict=True))
    listing = list_images(str(root))
    assert (listing.classes, contents(listing), any(listing.length)) == (["10", "a", "b", "link"], [b"x"] * 6, False)
    flat = write(tmp_path / "flat", "b.jpg", "a.JPG")
    assert listed(f"{flat}/") == [("a.JPG", NO_LABEL), ("b.jpg", NO_LABEL)]
    assert listed(write(flat, "7/1.jpg"))[-1] == ("7/1.jpg", 0)


def test_paths_that_are_not_utf8_are_supported(tmp_path):
    names = ["a\nb.jpg", "\udcff.jpg", "a:b:c.jpg"]
    root = write(tmp_path / "x:y:z", *(f"\udcfe/{name}" for name in names))
    assert [path for path, _ in listed(root)] == [f"\udcfe/{name}" for name in sorted(names)]
    write(tmp_path, "list.txt", content=b"x:y:z/\xfe/\xff.jpg 4\n")
    assert listed(tmp_path / "list.txt") == [("x:y:z/\udcfe/\udcff.jpg", 4)]
    cut = tar_bytes(("1.jpg", b"one"), ("\udcff\n.jpg", b"two" * 400), format=tarfile.GNU_FORMAT)[:2000]
    listing = list_images(str(write(tmp_path / "\udcfd", "s.tar", content=cut)))
    assert (contents(listing), listing.problems[0].isprintable()) == ([b"one"], True)
    check_error(tmp_path / "\udcff\n", "no such folder")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_tar_shards_are_listed_from_a_folder_or_a_brace_list(tmp_path, suffix, monkeypatch):
    samples = [("a/1.jpg", b"one"), ("a/1.json", b"{}"), ("a/1.cls", b"7\n"), ("a/2.cls", b"5"), ("a/2.png", b"two" * 400)]
    for number in range(20):
        data = tar_bytes(*samples, (f"./{number}.jpg", b"%d" % number), ("._1.jpg", b"mac"))
        write(tmp_path, f"s-{number:03d}{suffix}", content=data if suffix == ".tar" else gzip.compress(data))
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path, f"{tmp_path}/s-{{000..019}}{suffix}", f"s-{{000..019}}{suffix}"):
        listing = list_images(str(source))
        assert (listing.problems, listing.classes, list(listing.label)) == ([], [], [7, 5, NO_LABEL] * 20)
        assert contents(listing) == [c for n in range(20) for c in (b"one", b"two" * 400, b"%d" % n)]
    check_error(f"s-{{018..020}}{suffix}", f"s-020{suffix}: no such shard")
    monkeypatch.setattr("scale_mae.system.process_pool._start_worker", lambda given: os._exit(1))
    check_error(tmp_path, "a process that listed shards was killed")


def test_data_after_the_end_mark_of_a_tar_is_reported(tmp_path):
    one, two = (tar_bytes((f"{n}.jpg", b"x" * 600), (f"{n}b.jpg", b"y")) for n in "12")
    cases = (one + two, one[:1536] + bytes(512) + one[2048:], one[:1536] + bytes(2 << 20))
    for number, content in enumerate(cases):
        write(tmp_path, f"{number}/s.tar", content=content)
        listing = list_images(str(tmp_path / str(number)))
        assert "an end mark, but more data follows" in listing.problems[0]
    link = tarfile.TarInfo("l.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "1.jpg"
    write(tmp_path, "l/s.tar", content=one[:2560] + link.tobuf() + bytes(1024))
    assert "skipped links and sparse files: 1" in list_images(str(tmp_path / "l")).problems[0]


def test_class_numbers_follow_numbers_names_or_the_classes_file(tmp_path):
    write(tmp_path, "1.tar", content=tar_bytes(("1.jpg", b"1"), ("1.cls", b"dog"), ("2.jpg", b"2"), ("2.cls", b"-1")))
    write(tmp_path, "2.tar", content=tar_bytes(("3.jpg", b"3"), ("3.cls", "Äsche".encode()), ("4.jpg", b"4"), ("4.cls", b"12")))
    assert labels(tmp_path) == ([1, NO_LABEL, 2, 0], ["12", "dog", "Äsche"])
    write(tmp_path, "classes.txt", content="Äsche\ndog\n")
    assert labels(tmp_path) == ([1, NO_LABEL, 0, NO_LABEL], ["Äsche", "dog"])
    problems = "\n".join(list_images(str(tmp_path)).problems)
    assert "labels without a class: 1 of 3, such as 12" in problems
    assert "labels that are not numbers: 2 of 3, such as dog" in problems
    write(tmp_path, "n/classes.txt", content="cat\ndog\n")
    write(tmp_path, "n/n.tar", content=tar_bytes(("1.jpg", b"1"), ("1.cls", b"1"), ("2.jpg", b"2"), ("2.cls", b"2")))
    assert labels(tmp_path / "n") == ([1, NO_LABEL], ["cat", "dog"])


def test_a_truncated_tar_yields_its_complete_images(tmp_path):
    samples = [(f"{n}.jpg", bytes([65 + n]) * size) for n, size in enumerate((3, 512, 900, 1, 1500))]
    samples.insert(2, ("long/" * 40 + "name.jpg", b"far"))
    intact = tar_bytes(*samples, format=tarfile.GNU_FORMAT)
    ends = [intact.index(content) + len(content) for _, content in samples]
    path = tmp_path / "s.tar"
    for cut in [*range(0, len(intact), 97), *(end + d for end in ends for d in (-1, 0, 1))]:
        path.write_bytes(intact[:cut])
        expected = [content for (_, content), end in zip(samples, ends, strict=True) if end <= cut]
        if not expected:
            check_error(path, "no images found", "damaged after byte 0")
        elif cut >= -(-ends[-1] // 512) * 512 + 512:  # the end mark is complete
            assert (contents(list_images(str(path))), list_images(str(path)).problems) == (expected, [])
        else:
            assert contents(list_images(str(path))) == expected
            [problem] = list_images(str(path)).problems
            assert re.fullmatch(
                rf"{path}: damaged after byte \d+ .*\. Only the {len(expected)} images before it are used\.", problem
            )


def test_a_randomly_damaged_tar_is_listed_or_raises_an_error(tmp_path):
    rng = random.Random(0)
    pieces = [("a.jpg", b"A" * 700), ("x" * 120 + ".jpg", b"B"), ("ä.png", b"C"), ("n01.tar", tar_bytes(("1.jpg", b"one")))]
    for _ in range(700):
        data = bytearray(tar_bytes(*pieces, format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))))
        for _ in range(rng.choice((1, 1, 3, 40))):
            start = rng.randrange(0, len(data) // 2, 512)
            data[start + rng.choice((124, 156, rng.randrange(512)))] = rng.choice((0, 55, 76, 120, 128, 255))
            if rng.random() < 0.7:  # make the checksum valid, so that tarfile accepts the header
                header = data[start : start + 148] + b" " * 8 + data[start + 156 : start + 512]
                data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        write(tmp_path, "s.tar", content=bytes(data[: rng.choice((len(data), rng.randrange(len(data))))]))
        with contextlib.suppress(DataError):
            assert all(content in data for content in contents(list_images(str(tmp_path / "s.tar"))))


def test_intact_shards_are_used_next_to_damaged_ones(tmp_path):
    intact = tar_bytes(("1.jpg", b"one"), ("2.jpg", b""), ("3.jpg", b"two"), ("3.cls", b"\xff\xfe"))
    huge = tarfile.TarInfo("no file")
    huge.type, huge.size = b"V", 2**62  # larger than any file system supports
    shards = {"a.tar": intact, "b.tar": b"", "c.tar": b"<html>" * 999, "d.tar.gz": gzip.compress(intact)[:-20]}
    shards["e.tar"] = tar_bytes(("n00000001.tar", tar_bytes(("1.jpg", b"one"))[:1024]), ("2.jpg", b"two"))
    shards["f.tar"] = tar_bytes(("1.jpg", b"one"))[:1024] + huge.tobuf(tarfile.GNU_FORMAT)
    assert all(write(tmp_path, name, content=data) for name, data in shards.items())
    listing = list_images(str(tmp_path))
    assert contents(listing) == [b"one", b"", b"two", b"one", b"two", b"one"]
    assert list(listing.label) == [NO_LABEL] * 3 + [0, NO_LABEL, NO_LABEL]
    starts = "a.tar: skip|b.tar: damaged after byte 0 (empty|c.tar: dam|d.tar.gz: damaged (|e.tar/n00000001.tar: dam|f.tar: dam"
    assert all(p.startswith(f"{tmp_path}/{s}") for p, s in zip(listing.problems, starts.split("|"), strict=True))


def test_class_tars_and_tars_of_class_tars_as_in_imagenet(tmp_path):
    classes = {f"n0000000{c}": [b"%d-%d" % (c, i) * (200 * i + 1) for i in range(3)] for c in (2, 1)}
    tars = {c: tar_bytes(*((f"{c}_{i}.JPEG", image) for i, image in enumerate(i))) for c, i in classes.items()}
    assert all(write(tmp_path, f"21k/{name}.tar", content=data) for name, data in tars.items())
    outer = tar_bytes(*((f"{name}.tar", data) for name, data in tars.items()))
    write(tmp_path, "1k/ILSVRC2012_img_train.tar", content=outer)
    for source, order in ((f"imagenet21k:train:{tmp_path}/21k", [0, 1]), (f"imagenet1k:train:{tmp_path}/1k", [1, 0])):
        listing = list_images(source)
        assert (listing.problems, listing.classes, listing.label[::3].tolist()) == ([], sorted(classes), order)
        assert contents(listing) == [image for n in order for image in classes[listing.classes[n]]]
    damaged = bytearray(outer)
    damaged[outer.index(b"n00000002_1.JPEG") + 100] = 255  # in the first tar; the second one stays intact
    for data, images in ((damaged, 4), (outer[: outer.index(b"1-1") + 700], 5), (outer[: outer.index(b"1-1")], 4)):
        write(tmp_path, "1k/ILSVRC2012_img_train.tar", content=bytes(data))
        listing = list_images(f"imagenet1k:train:{tmp_path}/1k")
        assert len(listing) == len(set(contents(listing)) & {i for c in classes.values() for i in c}) == images
        assert "img_train.tar/n0000000" in listing.problems[0]
    write(tmp_path, "21k/x.jpg", "21k/folder/1.jpg", "imagenet21k_train/n00000002/1.JPEG", "imagenet21k_val/n00000002/9.JPEG")
    assert "contains tar shards, so 1 folders and 1 images are skipped" in list_images(str(tmp_path / "21k")).problems[0]
    assert listed(f"imagenet21k:train:{tmp_path}") == [("n00000002/1.JPEG", 0)]


def test_text_lists_and_tables(tmp_path):
    write(tmp_path, "a b.jpg", "c.png", "d/e", "sub/._c.png", "a,b.jpg")
    text = f"# files\r\n\r\na b.jpg 3\nc.png\t12\n  d/e\n{tmp_path}/a b.jpg -1\nmy 5.jpg\nsub/._c.png 1\n"
    expected = [("a b.jpg", 3), ("c.png", 12), ("d/e", NO_LABEL), ("a b.jpg", NO_LABEL), ("my 5.jpg", NO_LABEL)]
    for name, content, rows in (
        ("l.txt", "\ufeff" + text, expected),
        ("L.TXT", "a b.jpg zebra\nc.png ant\nc.png 7\n", [("a b.jpg", 2), ("c.png", 1), ("c.png", 0)]),
        ("l.csv", 'id,File_Name,x,Category\n1,"a,b.jpg",,dog\n\n#,no\n2,c.png,,ant\n', [("a,b.jpg", 1), ("c.png", 0)]),
        ("l.csv", "c.png,4\na b.jpg\n", [("c.png", 4), ("a b.jpg", NO_LABEL)]),
        ("l.tsv", "label\tpath\n2\tc.png\n\ta b.jpg\n", [("c.png", 2), ("a b.jpg", NO_LABEL)]),
    ):
        write(tmp_path, name, content=content)
        assert listed(tmp_path / name) == rows
    write(tmp_path / "other", "l.txt", content=f"../c.png\n{tmp_path}/c.png\n")
    (tmp_path / "d" / "link").symlink_to(tmp_path / "other")
    assert contents(list_images(str(tmp_path / "d" / "link" / "l.txt"))) == [b"x", b"x"]


def annotate(path, names, categories=(), **more):
    pairs = [{"id": i, "image_id": 100 + i, "category_id": c, **more} for i, c in enumerate(categories)]
    known = [{"id": 9, "name": "z"}, {"id": 3, "name": "y"}, {"id": 5, "name": "x"}]
    images = [{"id": 100 + i, "file_name": name} for i, name in enumerate(names)]
    write(path.parent, path.name, content=json.dumps({"images": images, "categories": known, "annotations": pairs}))


def test_coco_annotations(tmp_path):
    path, names = tmp_path / "l.json", ["d/1.jpg", "2.jpg", "3.jpg"]
    write(tmp_path, *names)
    annotate(path, names, [9, 3])
    assert labels(path) == ([2, 0, NO_LABEL], ["y", "x", "z"])
    for detection in ({"bbox": [1, 2, 3, 4]}, {"image_id": 100}):
        annotate(path, names, [9, 3], **detection)
        assert labels(path) == ([NO_LABEL] * 3, [])


def test_imagenet1k_layout(tmp_path):
    train = ["n00000001/n00000001_1.JPEG", "n00000002/n00000002_1.JPEG"]
    val = [f"ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2)]
    solution = "ImageId,PredictionString\n{:.23},n00000002 85 1 499 272 n00000002 1 2 3 4\n{:.23},n00000001 1 2 3 4\n"
    for root, folder in ((tmp_path / "plain", ""), (tmp_path / "kaggle", "ILSVRC/Data/CLS-LOC/")):
        write(root, *(f"{folder}train/{name}" for name in train), *(f"{folder}val/{name}" for name in val))
        assert labels(f"imagenet1k:train:{root}") == ([0, 1], ["n00000001", "n00000002"])
        assert labels(f"imagenet1k:val:{root}") == ([NO_LABEL] * 2, [])
        assert "Put LOC_val_solution.csv or val_map.txt there" in list_images(f"imagenet1k:val:{root}").problems[0]
        texts = {"val.txt": "{} 1\n{} 0\n", "val_map.txt": "{}\tn00000002\n{}\tn00000001\n", "LOC_val_solution.csv": solution}
        for name, text in texts.items():
            write(root, name, content=text.format(*val))
            assert labels(f"imagenet1k:val:{root}") == ([1, 0], [] if name == "val.txt" else ["n00000001", "n00000002"])
            assert contents(list_images(f"imagenet1k:val:{root}")) == [b"x", b"x"]
    write(tmp_path / "sorted", "val.txt", *(f"val/{name}" for name in train))
    assert listed(f"imagenet1k:val:{tmp_path}/sorted") == [(train[0], 0), (train[1], 1)]


def test_inaturalist_and_coco_layouts(tmp_path):
    for year, folder in ((2017, "train_val_images"), (2018, "train_val2018"), (2019, "train_val2019")):
        names = [f"{folder}/Plantae/7477/{i}.jpg" for i in "ab"]
        annotate(write(tmp_path, *names) / f"val{year}.json", names, [9, 5])
        annotate(write(tmp_path, f"test{year}/1.jpg") / f"test{year}.json", [f"test{year}/1.jpg"])
        assert listed(f"inat{year}:val:{tmp_path}") == [(names[0], 2), (names[1], 1)]
        assert listed(f"inat{year}:test:{tmp_path}") == [(f"test{year}/1.jpg", NO_LABEL)]
        check_error(f"inat{year}:train:{tmp_path}", tmp_path, f"train{year}.json")
    write(tmp_path, "train2017/1.jpg", "images/unlabeled2017/1.jpg", "test2017/1.jpg")
    for kind in ("instances_train2017", "image_info_unlabeled2017", "image_info_test-dev2017"):
        annotate(tmp_path / f"annotations/{kind}.json", ["1.jpg"], [9] * kind.startswith("instances"), bbox=[1, 2, 3, 4])
        listing = list_images(f"coco:{kind.split('_')[-1]}:{tmp_path}")
        assert (listing.shards, list(listing.label), contents(listing)) == (["1.jpg"], [NO_LABEL], [b"x"])
    check_error(f"coco:val2017:{tmp_path}", tmp_path, "annotations/instances_val2017.json")
    (tmp_path / "train2017").rename(tmp_path / "gone")
    check_error(f"coco:train2017:{tmp_path}", "images are missing", "train2017 or images/train2017")


def test_places_layouts(tmp_path):
    write(tmp_path, "trainvalsplit_places205/train_places205.csv", content="a/abbey/gsun_x.jpg 0\nz/zoo/gsun y.jpg 204\n")
    check_error(f"places205:train:{tmp_path}", "images are missing", "data/vision/torralba/deeplearning/images256")
    write(tmp_path, "data/vision/torralba/deeplearning/images256/a/abbey/gsun_x.jpg", "testSet_resize/1.jpg")
    assert listed(f"places205:train:{tmp_path}") == [("a/abbey/gsun_x.jpg", 0), ("z/zoo/gsun y.jpg", 204)]
    assert listed(f"places205:test:{tmp_path}") == [("1.jpg", NO_LABEL)]
    write(tmp_path, "test_places205.csv", content="a/abbey/gsun_x.jpg\n")
    assert listed(f"places205:test:{tmp_path}") == [("a/abbey/gsun_x.jpg", NO_LABEL)]
    write(tmp_path, "places365_train_standard.txt", content="/b/bar/1.jpg 1\n/a/airfield/2.jpg 0\n")
    write(tmp_path, "filelist_places365-standard/places365_val.txt", content="Places365_val_1.jpg 1\n")
    write(tmp_path, "data_256/b/bar/1.jpg", "data_large/b/bar/1.jpg", "val_large/Places365_val_1.jpg")
    assert listed(f"places365:train:{tmp_path}") == [("b/bar/1.jpg", 1), ("a/airfield/2.jpg", 0)]
    write(tmp_path, "filelist_places365-standard/categories_places365.txt", content="/a/airfield 0\n/b/bar 1\n")
    assert labels(f"places365:val:{tmp_path}") == ([1], ["/a/airfield", "/b/bar"])


def test_unusable_sources_raise_one_line_errors(tmp_path, monkeypatch):
    here = write(tmp_path, "film.mp4", "f/c/notes.md", "l/1.jpg")
    for source, text, *words in (
        ("gone.txt", "l/nowhere.jpg 1\n", "nowhere.jpg: no such image", "gone.txt", here),
        ("binary.txt", "1.jpg 1\n\0\0\n", "binary.txt, line 2", "not text"),
        ("head.csv", "name,number\nl/1.jpg,3\n", "head.csv, line 1", "no column named path"),
        ("torn.csv", 'path,label\nl/1.jpg,"3\n', "torn.csv, line 2", "malformed"),
        ("short.csv", "label,path\n3,l/1.jpg\n4\n", "short.csv, line 3", "no path in column 2"),
        ("torn.json", '{"images": [\n{"id": 1', "torn.json, line 2", "not JSON"),
        ("key.json", '{"images": [{"id": 1}]}', "key.json: 'file_name' is missing", "Expected images"),
        ("list.json", "[1, 2]", "list.json: malformed"),
        ("deep.tar", tar_bytes(("a.tar", tar_bytes(("b.tar", tar_bytes(("1.jpg", b"x")))))), "no images found"),
        ("x.tar", "x" * 5000, "no images found", "x.tar: damaged after byte 0"),
        (f"{here}/film.mp4", None, "not a source of images", ".csv"),
        (f"{here}/f", None, "no images found", "Expected root/class"),
        ("demo:nothing", None, "no such shard"),
        ("imagenet:train:/data", None, "no data set layout imagenet", "imagenet1k", "places365", "demo"),
        ("coco:train2016:/data", None, "coco has no split 'train2016'", "train2017"),
        ("places365:val", None, "no such folder", "places365:val:ROOT"),
        (f"imagenet1k:train:{here}", None, f"{here}: training images are missing", "ILSVRC2012_img_train.tar"),
        (f"imagenet21k:train:{here}", None, here, "n01440764", "imagenet21k_train"),
    ):
        check_error(write(here, source, content=text) / source if text else source, *words)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scandir(path if str(path)[-3:] != "f/c" else f"{path}/gone"))
    check_error(here / "f", "f/c/gone: cannot be read (No such file or directory)")
