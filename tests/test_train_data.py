"""Runs and their data: the index they are bound to, the decoder, images that cannot be had."""

import json
import time

import pytest
from images import jpeg, make_folders
from ranks import RankError, run_ranks
from test_train import log, make_config, train, train_until

from scale_mae.data.build import build
from scale_mae.data.pack import pack
from scale_mae.engine import distributed


def test_a_run_without_an_index_builds_one_and_says_so(tmp_path):
    data = make_folders(tmp_path / "data", per_class=8)
    (data / "class1" / "3.jpg").write_bytes(b"")
    config = make_config(tmp_path / "run", **{"data.source": str(data)})
    assert run_ranks(2, train, config)[0].finished
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "brings no index; built" in text
    assert "headers of 23 images" in text
    assert "left out of the index: 1 no bytes" in text
    assert "class1/3.jpg\tno bytes" in (tmp_path / "run" / "data.index.quarantined.txt").read_text()


def test_an_index_a_packing_and_the_source_itself_can_be_trained_on(tmp_path):
    data = make_folders(tmp_path / "data", per_class=8)
    build(str(data), tmp_path / "x.index")
    pack(str(data), tmp_path / "packed", short_side=24)
    losses = {}
    for name, source in (("folders", data), ("index", tmp_path / "x.index"), ("packed", tmp_path / "packed")):
        config = make_config(tmp_path / name, **{"data.source": str(source)})
        assert run_ranks(1, train, config)[0].finished
        losses[name] = log(tmp_path / name, "loss")
        assert ("brings no index" in (tmp_path / name / "log.txt").read_text()) == (name == "folders")
    assert losses["folders"] == losses["index"] != losses["packed"]


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    data = make_folders(tmp_path / "data", per_class=8)
    build(str(data), tmp_path / "x.index")
    config = make_config(tmp_path / "run", **{"data.source": str(tmp_path / "x.index")})
    assert not run_ranks(2, train_until, config, 3)[0].finished
    (data / "class0" / "new.jpg").write_bytes(jpeg())
    build(str(data), tmp_path / "x.index")
    with pytest.raises(RankError, match=r"was trained on index .* sample order would change") as caught:
        run_ranks(2, train, config)
    assert caught.value.kinds == ["UserError"] * 2
    (data / "class0" / "new.jpg").unlink()
    build(str(data), tmp_path / "x.index")
    assert run_ranks(2, train, config)[0].finished


@pytest.mark.parametrize("decoder", ["pillow", "dali_cpu"])
def test_bad_images_never_end_a_run_and_are_named_and_counted(tmp_path, decoder):
    data = make_folders(tmp_path / "data", per_class=20)
    setting = {"data.source": str(data), "train.micro_batch": 2, "train.global_batch": 8, "train.duration": "30 steps"}
    setting |= {"checkpoint.every": "100 steps", "data.decoder": decoder}
    configs = [make_config(tmp_path / name, **setting) for name in ("a", "b")]
    for config in configs:  # the images go bad after they were indexed
        build(str(data), tmp_path / config.run.dir / "data.index", verify=False)
    (data / "class0" / "3.jpg").unlink()
    cut = data / "class1" / "7.jpg"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:300] + bytes(len(whole) - 300))
    assert run_ranks(2, train, configs[0])[0].finished
    assert not run_ranks(2, train_until, configs[1], 11)[0].finished
    assert run_ranks(2, train, configs[1])[0].finished
    assert log(tmp_path / "a", "loss", "grad_norm") == log(tmp_path / "b", "loss", "grad_norm")
    assert sorted(log(tmp_path / "a", "loss")) == list(range(1, 31))
    text = (tmp_path / "a" / "log.txt").read_text()
    assert f"data.decoder={decoder} (as asked for)" in text
    last = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[-1])
    for cause, image in (("unreadable", "class0/3.jpg"), ("damaged", "class1/7.jpg")):
        assert last[f"decode_failures_{cause}"] == text.count(f"{image}: {cause} (") >= 4  # once an epoch, and as substitutes
    assert last["decode_failures"] == last["decode_failures_unreadable"] + last["decode_failures_damaged"]
    assert last["decoder_fallbacks"] == 0


def test_too_many_bad_images_stop_all_ranks_with_one_error_and_lose_nothing(tmp_path):
    data = make_folders(tmp_path / "data", per_class=20)
    config = make_config(
        tmp_path / "run", **{"data.source": str(data), "data.max_failures": 0.00002, "train.duration": "60 steps"}
    )
    build(str(data), tmp_path / "run" / "data.index", verify=False)
    spoilt = data / "class1" / "7.jpg"
    whole = spoilt.read_bytes()
    spoilt.write_bytes(b"x" * len(whole))
    with pytest.raises(RankError, match=r"[34] of the last \d+ images could not be used \([34] not an image\)") as caught:
        run_ranks(2, train, config)
    assert caught.value.kinds == ["DataError"] * 2
    done = max(log(tmp_path / "run", "loss"), default=0)
    saved = max(int(path.name[-8:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == done + 1
    spoilt.write_bytes(whole)
    assert run_ranks(2, train, config)[0].finished


def slow_main(seconds):
    from datetime import timedelta

    distributed.TIMEOUT, distributed.HEARTBEAT = timedelta(seconds=3), 0.5

    def action():
        time.sleep(seconds)
        return 7

    with distributed.world() as ranks:
        return ranks.on_main(action)


def test_what_rank_0_does_for_all_may_take_longer_than_the_others_wait():
    assert run_ranks(2, slow_main, 6) == [7, 7]
