"""Runs and their data: the index of a run, the choice of the decoder, and unreadable images."""

import json
import os
import signal
import time

import pytest
from images import jpeg, make_folders
from ranks import RankError, run_ranks
from test_trainer import log, make_config, train, train_until

from scale_mae.config import UserError
from scale_mae.data import index_builder as building
from scale_mae.data.index import Index
from scale_mae.data.index_builder import build_index
from scale_mae.data.pack import pack
from scale_mae.distributed import process_group
from scale_mae.distributed.signals import StopRequest
from scale_mae.runs.run_index import find_or_build_index


def test_a_run_without_an_index_builds_one_and_logs_it(tmp_path):
    data = make_folders(tmp_path / "data", per_class=8)
    (data / "class1" / "3.jpg").write_bytes(b"")
    config = make_config(tmp_path / "run", **{"data.source": str(data)})
    assert run_ranks(2, train, config)[0].finished
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "has no index" in text
    assert "headers of 23 images" in text
    assert "Quarantined images: 1 empty file" in text
    assert "class1/3.jpg\tempty file" in (tmp_path / "run" / "data.index.quarantined.txt").read_text()


def test_folders_and_their_index_give_the_same_losses_and_packed_data_can_be_trained_on(tmp_path):
    data = make_folders(tmp_path / "data", per_class=8)
    build_index(str(data), tmp_path / "x.index")
    pack(str(data), tmp_path / "packed", short_side=24)
    losses = {}
    for name, source in (("folders", data), ("index", tmp_path / "x.index"), ("packed", tmp_path / "packed")):
        config = make_config(tmp_path / name, **{"data.source": str(source)})
        assert run_ranks(1, train, config)[0].finished
        losses[name] = log(tmp_path / name, "loss")
        assert ("has no index" in (tmp_path / name / "log.txt").read_text()) == (name == "folders")
    assert losses["folders"] == losses["index"] != losses["packed"]


def test_a_run_does_not_resume_with_another_index(tmp_path):
    data = make_folders(tmp_path / "data", per_class=8)
    build_index(str(data), tmp_path / "x.index")
    config = make_config(tmp_path / "run", **{"data.source": str(tmp_path / "x.index")})
    assert not run_ranks(2, train_until, config, 3)[0].finished
    (data / "class0" / "new.jpg").write_bytes(jpeg())
    build_index(str(data), tmp_path / "x.index")
    with pytest.raises(RankError, match=r"was trained with index .* change the order of the samples") as caught:
        run_ranks(2, train, config)
    assert caught.value.kinds == ["UserError"] * 2
    (data / "class0" / "new.jpg").unlink()
    build_index(str(data), tmp_path / "x.index")
    assert run_ranks(2, train, config)[0].finished


@pytest.mark.parametrize("decoder", ["pillow", "dali_cpu"])
def test_bad_images_do_not_end_a_run_and_are_logged_and_counted(tmp_path, decoder):
    data = make_folders(tmp_path / "data", per_class=20)
    setting = {"data.source": str(data), "train.micro_batch": 2, "train.global_batch": 8, "train.duration": "30 steps"}
    setting |= {"checkpoint.interval": "100 steps", "data.decoder": decoder}
    configs = [make_config(tmp_path / name, **setting) for name in ("a", "b")]
    for config in configs:  # the images are damaged after they were indexed
        build_index(str(data), tmp_path / config.run.dir / "data.index", verify=False)
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
    assert f"data.decoder={decoder} (as configured)" in text
    last = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[-1])
    for cause, image in (("unreadable", "class0/3.jpg"), ("damaged", "class1/7.jpg")):
        assert last[f"decode_failures_{cause}"] == text.count(f"{image}: {cause} (") >= 4  # once per epoch, and as substitutes
    assert last["decode_failures"] == last["decode_failures_unreadable"] + last["decode_failures_damaged"]
    assert last["decoder_fallbacks"] == 0
    resumed = json.loads((tmp_path / "b" / "log.jsonl").read_text().splitlines()[-1])
    assert {k: v for k, v in resumed.items() if "decode_" in k} == {k: v for k, v in last.items() if "decode_" in k}


def test_too_many_bad_images_stop_all_ranks_with_one_error_after_a_save(tmp_path):
    data = make_folders(tmp_path / "data", per_class=20)
    config = make_config(
        tmp_path / "run", **{"data.source": str(data), "data.max_failure_ratio": 0.00002, "train.duration": "60 steps"}
    )
    build_index(str(data), tmp_path / "run" / "data.index", verify=False)
    spoilt = data / "class1" / "7.jpg"
    whole = spoilt.read_bytes()
    spoilt.write_bytes(b"x" * len(whole))
    with pytest.raises(
        RankError, match=r"[34] of the last \d+ images were unreadable \([34] not an image since the start\)"
    ) as caught:
        run_ranks(2, train, config)
    assert caught.value.kinds == ["DataError"] * 2
    done = max(log(tmp_path / "run", "loss"), default=0)
    saved = max(int(path.name[-8:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == done
    spoilt.write_bytes(whole)
    assert run_ranks(2, train, config)[0].finished


def train_until_signal(config, step):
    """Train. At ``step``, between two log lines, the process signals itself."""
    from scale_mae.engine.deepspeed import Engine

    original = Engine.step

    def signal_then_step(self, lr, return_norm):
        if self._engine.global_steps == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, lr, return_norm=return_norm)

    Engine.step = signal_then_step
    return train(config)


def test_decode_failures_between_log_lines_are_logged_before_a_run_stops(tmp_path):
    data = make_folders(tmp_path / "data", per_class=5)
    setting = {"data.source": str(data), "log.interval": 1000, "train.duration": "500 steps"}
    config = make_config(tmp_path / "run", **setting)
    build_index(str(data), tmp_path / "run" / "data.index", verify=False)
    (data / "class0" / "3.jpg").unlink()
    result = run_ranks(1, train_until_signal, config, 20)[0]
    assert not result.finished
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count("class0/3.jpg: unreadable") >= result.step * 16 // 15 - 1
    assert text.index("class0/3.jpg: unreadable") < text.index("stopped by SIGTERM")


def test_a_signal_stops_an_index_build_that_resumes_later(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "CHUNK", 2)
    data = make_folders(tmp_path / "data")
    stop = StopRequest()
    stop.request("SIGTERM")
    with pytest.raises(UserError, match="stopped by SIGTERM while building .* to continue"):
        find_or_build_index(tmp_path, str(data), [], stop)
    assert (tmp_path / "data.index.partial").exists()
    notes = []
    path = find_or_build_index(tmp_path, str(data), notes, StopRequest())
    assert len(Index.open(path)) == 12
    assert "has no index" in notes[0]
    find_or_build_index(tmp_path, str(data), notes, StopRequest())
    assert "does not contain images that were added to data.source later" in notes[-1]


def test_all_ranks_fall_back_to_pillow_if_dali_fails_on_one(tmp_path):
    config = make_config(tmp_path, **{"data.decoder": "auto"})
    assert run_ranks(2, train_with_broken_dali, config)[0].finished
    assert "data.decoder=pillow (data.decoder=dali_cpu: does not start (driver too old)" in (tmp_path / "log.txt").read_text()


def train_with_broken_dali(config):
    from scale_mae.data import dali

    def broken(self, *args):
        raise RuntimeError("driver too old")

    if os.environ["RANK"] == "1":
        dali.DaliDecoder.__init__ = broken
    return train(config)


def wait_for_a_slow_action(seconds):
    from datetime import timedelta

    process_group.TIMEOUT, process_group.HEARTBEAT = timedelta(seconds=3), 0.5

    def action():
        time.sleep(seconds)
        return 7

    with process_group.process_group() as world:
        return world.run_on_main(action)


def test_an_action_of_run_on_main_may_take_longer_than_the_timeout():
    assert run_ranks(2, wait_for_a_slow_action, 6) == [7, 7]
