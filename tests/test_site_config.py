"""The site file ``site.yaml`` and the options of ``scale-mae submit`` that replace its values."""

from __future__ import annotations

import pytest

from scale_mae.slurm.job_script import CLUSTER_DIR
from scale_mae.slurm.site_config import SiteConfigError, load_site_config, parse_time_limit


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory without any site file, also not in the user's configuration directory."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_run_directory_comes_before_current_directory_and_user_directory(folder):
    for place, partition in ((folder / "config" / "scale_mae", "user"), (folder, "current"), (folder / "run", "run")):
        place.mkdir(parents=True, exist_ok=True)
        (place / "site.yaml").write_text(f"partition: {partition}\nqos: null\n")
        assert load_site_config(folder / "run", {"time": "1:00:00", "qos": None}).partition == partition


def test_option_replaces_value_of_site_file(folder):
    (folder / "site.yaml").write_text("partition: current\n")
    assert load_site_config(folder / "run", {"partition": "option"}).partition == "option"


def test_shipped_example_is_valid(folder):
    (folder / "site.yaml").write_text((CLUSTER_DIR / "site.example.yaml").read_text())
    (folder / "x.sif").touch()
    site = load_site_config(folder / "run", {"image": "x.sif"})
    assert site.tasks_per_node == 8
    assert (site.container.chosen_runtime, site.container.mounts) == ("apptainer", ("/data",))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("partion: gpu", {}, "site.yaml: partion: unknown key. The known keys are partition, account"),
        ("container: {img: a}", {}, "site.yaml: container.img: unknown key. The known keys are image, runtime, mounts."),
        (
            "time: 24:00:00",
            {},
            'site.yaml: time=86400: not in quotes, so YAML reads a number. Write it in quotes, as in "24:00:00"',
        ),
        ("time: soon", {}, "site.yaml: time=soon: not a time limit. Write minutes, HH:MM:SS or D-HH:MM:SS."),
        ("nodes: 0", {}, "site.yaml: nodes=0: not a number of nodes. Write a number such as 4, or a range such as 2-8."),
        ("- a", {}, "site.yaml: the file must contain keys with values, not a list"),
        ("a: [", {}, "site.yaml: cannot be read"),
        ("{}", {"nodes": "3-2"}, "--nodes=3-2: the first number of the range is larger than the second"),
        ("container: x.sqsh", {}, "site.yaml: container=x.sqsh: Input should be"),
        ("env: {A B: 1}", {}, "site.yaml: env.A B=A B: not a name of an environment variable"),
        ("{}", {"gpus_per_node": 0}, "--gpus-per-node=0: Input should be greater than 0"),
    ],
)
def test_invalid_site_file_or_option_is_a_one_line_error(folder, text, options, message):
    (folder / "site.yaml").write_text(text)
    with pytest.raises(SiteConfigError) as error:
        load_site_config(folder / "run", options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:00", 5400),
        ("1-6", 108000),
        ("1-06:30", 109800),
        ("2-00:00:05", 172805),
        ("infinite", None),
    ],
)
def test_time_limits_in_all_forms_of_slurm(text, seconds):
    assert parse_time_limit(text) == seconds
