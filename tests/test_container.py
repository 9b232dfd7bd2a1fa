"""The container image. The tests marked long build it and run it as its own user, as other users, and on a read-only root."""

import os
import re
import shlex
import shutil
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest
from container_image import Image

import scale_mae

ROOT = Path(__file__).parent.parent
SHORT = ["train.duration=4 steps", "optim.warmup=1 steps", "checkpoint.interval=2 steps"]
FAKE = '#!/bin/sh\ntest "$1" = info && exit {info}\necho "$0 $*"\n'


def instructions():
    """Return the instructions of the Dockerfile with their arguments. Continued lines are joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [tuple(line.split(maxsplit=1)) for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]


@pytest.fixture
def make_image(tmp_path):
    """Return ``make_image(docker=1, podman=0)``, which runs ``make image`` with fake builders.

    The numbers are the exit codes of their ``info`` commands.
    """

    def run(*arguments, **builders):
        for tool in ("make", "git", "sed", "id", "cat"):
            (tmp_path / tool).symlink_to(shutil.which(tool))
        for name, code in builders.items():
            (tmp_path / name).write_text(FAKE.format(info=code))
            (tmp_path / name).chmod(0o755)
        command = ["make", "--silent", "image", *arguments]
        return subprocess.run(command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)

    return run


def test_make_image_without_a_builder_is_one_error(make_image):
    done = make_image(docker=1)  # a client without a running daemon
    assert done.returncode
    assert done.stdout == (
        "docker (with a running daemon), podman or buildah is required, but none works here. Install one of them.\n"
    )


def test_make_image_takes_the_first_builder_that_works(make_image):
    done = make_image("BASE=debian:12", "TAG=mine:1", "IMAGE_FLAGS=--layers", docker=1, podman=0, buildah=0)
    assert done.returncode == 0, done.stderr
    program, *words = shlex.split(done.stdout)
    assert Path(program).name == "podman"
    assert words[0] == "build"
    assert {"BASE_IMAGE=debian:12", f"VERSION={scale_mae.__version__}", "mine:1", "--layers"} <= set(words)
    assert words[-1] == "."


def test_dockerfile_has_one_numeric_user_pins_packages_and_ends_with_doctor():
    lines = instructions()
    stages = [n for n, (word, _) in enumerate(lines) if word == "FROM"]
    assert len(stages) == 2
    assert all(lines[n][1].startswith("${BASE_IMAGE}") for n in stages)
    arguments = {rest.partition("=")[0] for word, rest in lines if word == "ARG"}
    assert arguments == {"BASE_IMAGE", "PYTHON", "VERSION", "REVISION", "SOURCE"}
    last = lines[stages[-1] :]
    users = [n for n, (word, _) in enumerate(last) if word == "USER"]
    assert len(users) == 1, "no instruction switches back to root"
    assert last[users[0]][1] == "10001", "a number shows a cluster that the user is not root"
    runs = [n for n, (word, _) in enumerate(last) if word == "RUN"]
    assert last[runs[-1]][1].endswith("scale-mae doctor")
    assert runs[-1] > users[0]
    for word, rest in lines:
        if word == "RUN" and "pip " in rest:
            assert "--no-cache-dir" in rest
            assert "--constraint constraints.txt" in rest or "--no-deps" in rest


def test_build_sees_only_sources():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert kept <= {Path(name).parts[0] for name in listed}
    assert not kept & {".git", ".venv", ".github", "runs", "tests"}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    if os.geteuid():
        pytest.fail("debootstrap and chroot need root: sudo env PATH=$PATH .ci/long")
    with Image(tmp_path_factory.mktemp("image")) as image:
        yield image


@pytest.mark.long
@pytest.mark.service("buildah", "debootstrap")
@pytest.mark.timeout(3600)
class TestImage:
    def test_config_and_labels_describe_the_image(self, image):
        assert image.config["User"] == "10001"
        assert image.config["Entrypoint"] == ["scale-mae"]
        assert image.config["Cmd"] == ["--help"]
        assert image.config["WorkingDir"] == "/workspace"
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        labels = {k.removeprefix("org.opencontainers.image."): v for k, v in image.config["Labels"].items()}
        assert labels["version"] == scale_mae.__version__
        assert labels["revision"] == head
        assert "source" in labels
        assert image.run("id", "--user", entry_point=False) == "10001"

    def test_image_contains_only_pinned_packages(self, image):
        listed = image.run("pip", "freeze", "--all", "--disable-pip-version-check", entry_point=False).splitlines()
        pins = set(re.findall(r"^[^#\s]+", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
        installed = {
            re.sub(r"[-_.]+(?=.*==)", "-", line).lower() for line in listed if not line.startswith(("pip==", "scale-mae "))
        }
        assert installed <= pins
        for requirement in [r for r in requires("scale-mae") if not re.search("dev|docs", r.partition(";")[2])]:
            name = re.match(r"[\w.-]+", requirement)[0]
            assert any(line.startswith(f"{name}==") for line in installed), name

    def test_image_contains_no_caches_secrets_or_build_files(self, image):
        for absent in ("source", "wheel", "root/.cache", "etc/pip.conf", "run/secrets", "opt/scale_mae/pip.conf"):
            assert not (image.root / absent).exists(), absent
        for empty in ("tmp", "workspace", "root/.config", "var/lib/apt/lists", "var/cache/apt"):
            assert not [*(image.root / empty).glob("*")], empty
        assert not [p for p in image.root.rglob("*") if p.name in {".git", ".netrc", ".pypirc", "pip.conf", ".venv"}]
        venv = image.root / "opt" / "scale_mae"
        assert not [p for p in venv.rglob("*") if not p.is_symlink() and (p.stat().st_uid or p.stat().st_mode & 0o002)]
        assert list(venv.glob("lib/python3*/site-packages/scale_mae/**/*.pyc")), (
            "compiled files, because a read-only root cannot store them"
        )
        names = {variable.partition("=")[0] for variable in image.config["Env"]}
        assert names == {"PATH", "HOME", "PYTHONUNBUFFERED", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}
        for text in (image.secret, str(image.folder)):
            assert text not in image.metadata
            found = subprocess.run(
                ["grep", "-rlF", "--devices=skip", text, image.root], capture_output=True, text=True, check=False
            )
            assert found.stdout == ""

    def test_doctor_and_c_compiler_work(self, image):
        assert "no problems" in image.run("doctor")
        compile_c = (
            "from triton.runtime.build import _build as b; b('x', '/tmp/x.c', '/tmp', [], [], [], [])"  # for engine.compile
        )
        image.run("sh", "-c", f"echo '#include <Python.h>' >/tmp/x.c && python -c {shlex.quote(compile_c)}", entry_point=False)

    @pytest.mark.parametrize("read_only", [False, True], ids=["", "read-only root"])
    @pytest.mark.parametrize("user", ["", "1234:0", "54321:54321"])
    def test_image_pretrains_and_converts(self, image, user, read_only):
        name = f"run-{user.partition(':')[0]}-{read_only}"
        options = {"user": user, "read_only": read_only}
        image.run("pretrain", "demo", f"run.dir={name}", *SHORT, **options)
        image.run("convert", name, "--to", "timm", "--out", f"{name}.safetensors", **options)
        assert (image.workspace / name / "checkpoints" / "step-00000004" / "manifest.json").exists()
        assert (image.workspace / f"{name}.safetensors").stat().st_uid == int(user.partition(":")[0] or image.config["User"])

    def test_several_processes_and_dali_work(self, image):
        local = ["--local-addr", "127.0.0.1"]  # unlike a container runtime, buildah does not add the host name to /etc/hosts
        command = ["torchrun", "--standalone", *local, "--nproc-per-node", "2", "-m", "scale_mae", "pretrain", "demo"]
        image.run(*command, "run.dir=two", "data.decoder=dali_cpu", *SHORT, user="1234:0", entry_point=False)
        assert (image.workspace / "two" / "checkpoints" / "step-00000004" / "manifest.json").exists()
