"""The documentation: its commands run, its generated parts are fresh, and every name in it exists."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from forked_commands import CommandServer
from images import jpeg

from scale_mae.cli import build_parser
from scale_mae.config import Config, load_config
from scale_mae.slurm.site_config import SiteConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
CLASSES = [f"n0144076{number}" for number in range(3)]
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow"),
    *("frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)

# What the blocks name -> what stands in its place here.
REPLACED = {
    "/data/": "{folder}/data/",
    "/shared/": "{folder}/shared/",
    "/fast/": "{folder}/fast/",
    "/etc/prometheus": "{folder}/etc",
    "demo:train": "{folder}/data/demo/train",
    "demo:val": "{folder}/data/demo/val",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "3, 224, 224": "3, 32, 32",
    "side = 224": "side = 32",
    '"demo", train={"duration": "1 epochs"}': '"debug", train={"duration": "2 steps"}',
}
# Config keys that are added to the commands of these tasks, so that they take a second.
SMALL = {
    "model.size": "nano",
    "model.image_size": 32,
    "model.patch_size": 8,
    "data.decoder": "pillow",
    "data.threads": 1,
    "optim.warmup": "1 steps",
    "train.duration": "2 steps",
    "train.global_batch": 32,
    "train.micro_batch": 16,
    "train.precision": "fp32",
    "engine.compile": False,
    "engine.deepspeed": "zero0",
    "checkpoint.interval": "1 steps",
    "log.interval": 1,
    "log.metrics_port": None,
}
DECODER = {"model.decoder_width": 64, "model.decoder_depth": 1, "model.decoder_heads": 2}
# Commands that do not run here -> why.
NOT_RUN = {
    "make": "a whole job; CI runs these targets",
    ".ci/": "a whole job",
    "pip install": "tests/test_package.py installs the package",
    "python3 -m venv": "tests/test_package.py installs the package",
    "docker": "needs docker's daemon",
    "enroot": "needs enroot",
    "apptainer": "needs Apptainer",
    "ssh": "needs another machine",
    "promtool": "tests/test_monitoring.py runs it",
    "prometheus": "serves until it is stopped; tests/test_monitoring_live.py runs it",
    "srun -N 4": "needs pyxis",
    "srun --nodes=2": "preflight needs several nodes and 20 GB of disk; tests/test_preflight.py runs it",
    "srun scale-mae preflight": "needs several nodes and 20 GB of disk; tests/test_preflight.py runs it",
    "scale-mae cancel": "needs a running job; tests/test_submit.py cancels some",
    "scale-mae convert checkpoints/of_other_code": "needs a checkpoint of other code; tests/test_export.py converts some",
}
EXIT_CODES = {"scale-mae doctor": (0, 1)}  # others must end with 0; doctor reports what this machine lacks


class Block(NamedTuple):
    """A fenced block of a page, without its indentation."""

    page: Path
    language: str
    text: str
    before: str

    @property
    def name(self) -> str:
        """A name for error messages."""
        return f"{self.page.relative_to(ROOT)}: {self.text.splitlines()[0] if self.text else ''}"


def blocks(*languages):
    for page in PAGES:
        text = page.read_text()
        for found in FENCE.finditer(text):
            if found[2] in languages:
                lines = [line.removeprefix(found[1]) for line in found[3].splitlines()]
                yield Block(page, found[2], "\n".join(lines), text[: found.start()].rstrip().rpartition("\n\n")[2])


def commands(block):
    """The commands of a block, continued lines joined."""
    for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
        command = shlex.join(shlex.split(line, comments=True)) and line.split("  #")[0].strip()
        if command and not command.startswith("#"):
            yield command


def reason_not_to_run(command):
    """Why a command does not run here; empty if it does."""
    return next((why for start, why in NOT_RUN.items() if re.match(rf"(\S*/)?{re.escape(start)}", command)), "")


def on_small_data(command, folder):
    """The command with its paths replaced and its training made small."""
    for old, new in REPLACED.items():
        command = re.sub(rf"(?<![\w.}}]){re.escape(old)}", new.replace("{folder}", str(folder)), command)
    found = re.search(r"(?:scale-mae|scale_mae) (pretrain|finetune|linprobe|submit|init \S+) (\S+)", command)
    if not found or "pretrain photos.yaml --dry-run" in command:
        return command
    task, recipe = found.groups()
    pretrains = load_config_task(recipe, folder) == "pretrain"
    keys = SMALL | (DECODER if pretrains else {})
    if recipe.endswith("demo"):
        keys["data.source"] = f"{folder}/data/demo/train"
        keys |= {} if pretrains else {"classify.val_source": f"{folder}/data/demo/val"}
    if task == "submit":
        keys["train.micro_batch"] = 1 if pretrains else 2  # mixup needs pairs; divides over 32 or 16 processes
    words = " ".join(shlex.quote(f"{key}={json.dumps(value) if value is None else value}") for key, value in keys.items())
    dry_run = " --dry-run" if task == "submit" and "--dry-run" not in command else ""
    return f"{command} {words}{dry_run}"


def load_config_task(recipe, folder):
    """``run.task`` of a recipe that ships, or that a page wrote into its folder."""
    path = folder / recipe
    return (
        (yaml.safe_load(path.read_text()).get("run") or {}).get("task", "pretrain")
        if path.is_file()
        else load_config(recipe).run.task
    )


def make_images(root, per_class=4, suffix="jpg"):
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            (root / name / f"{number}.{suffix}").write_bytes(jpeg(48, 40, seed=10 * label + number))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with CommandServer(tmp_path_factory.mktemp("cmd")) as server:
        yield server


def run_shell(server, command, folder):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | server.environment
    environment |= {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder / ".config"), "SLURM_CONF": "/nowhere"}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def prepared(server, tmp_path_factory):
    """Two folders with small data and finished runs: one to work in, and a copy.

    Configurations hold absolute paths, so all pages work in the same folder and get it anew from the copy.
    """
    folder = tmp_path_factory.mktemp("docs") / "reader"
    for name in ("imagenet", "photos", "demo"):
        make_images(folder / "data" / name / "train", per_class=24)
        make_images(folder / "data" / name / "val")
    for corruption in CORRUPTIONS:
        for severity in range(1, 6):
            make_images(folder / "data" / "imagenet-c" / corruption / str(severity), per_class=1, suffix="JPEG")
    for name in ("a", "b"):
        (folder / f"{name}.jpg").write_bytes(jpeg(64, 64))
    (folder / "data" / "a.jpg").write_bytes(jpeg(64, 64))
    for name in ("shared", "fast", "etc"):
        (folder / name).mkdir()
    (folder / "cluster").symlink_to(ROOT / "cluster")
    (folder / ".config" / "scale_mae").mkdir(parents=True)
    steps = [
        "scale-mae index /data/imagenet/train --out imagenet.index",
        "scale-mae index /data/imagenet/train --out /shared/imagenet.index",
        "cp imagenet.index photos.index",
        "scale-mae pretrain vit_base data.source=imagenet.index",
        "scale-mae pretrain demo",
        "scale-mae pretrain vit_large data.source=/shared/imagenet.index run.dir=/shared/runs/vit_large",
        "scale-mae finetune finetune_base data.source=/data/imagenet/train classify.val_source=/data/imagenet/val",
        "scale-mae linprobe linprobe_base data.source=/data/imagenet/train classify.val_source=/data/imagenet/val",
        "scale-mae finetune supervised_base data.source=/data/imagenet/train classify.val_source=",
        "scale-mae finetune finetune_demo model.init_from=runs/demo",
        "scale-mae convert runs/vit_base --to timm --out vit_base.safetensors",
        "scale-mae convert runs/vit_base --to timm --out timm_folder",
        "scale-mae convert runs/vit_base --to mae --out vit_base.pth",
        "cp vit_base.safetensors encoder.safetensors",
        "cp -r runs/vit_base runs/other",
        "mkdir -p runs/demo/images && cp a.jpg runs/demo/images/val-0001.jpg",
        "mkdir results && cp runs/finetune_demo/results/*.json results/",
    ]
    for command in steps:
        done = run_shell(server, on_small_data(command, folder), folder)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy, symlinks=True)
    return folder, copy


def blocks_of(page):
    return [block for block in blocks("bash", "python", "yaml") if block.page == page]


def has_commands(page):
    return any(block.language == "python" or not all(map(reason_not_to_run, commands(block))) for block in blocks_of(page))


@pytest.mark.parametrize("page", list(filter(has_commands, PAGES)), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_run(page, server, prepared):
    mine = blocks_of(page)
    folder, copy = prepared
    shutil.rmtree(folder)
    shutil.copytree(copy, folder, symlinks=True)
    for block in mine:
        if block.language == "yaml":
            if target := re.search(r"into `(\S+\.yaml)`", block.before):
                (folder / target[1].replace("~/", "")).write_text(block.text)
            continue
        if block.language == "python":
            run_block(server, shlex.join(["python", "-c", on_small_data(block.text, folder)]), block.text, folder, page)
            continue
        for command in commands(block):
            if not reason_not_to_run(command):
                run_block(server, on_small_data(command, folder), command, folder, page)


def run_block(server, command, shown, folder, page):
    done = run_shell(server, command, folder)
    allowed = EXIT_CODES.get(shown, (0,))
    assert done.returncode in allowed, f"{page.name}: {shown}\n{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "\nTraceback" not in done.stderr


# Names


def texts():
    """(page, text) of what people wrote: without the generated parts, whose names come from the code."""
    for page in PAGES:
        yield page, re.sub(r"<!-- generated: .*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)


def subcommands():
    (action,) = [
        action for action in build_parser()._actions if hasattr(action, "choices") and isinstance(action.choices, dict)
    ]
    return action.choices


def test_the_generated_parts_are_fresh():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_config_key_in_the_documentation_exists():
    sections = "|".join(Config.model_fields)
    for page, text in texts():
        for section, key in re.findall(rf"(?<![\w./-])({sections})\.([a-z]\w*)(?![\w(]|\.\w)", text):
            if key in FILE_SUFFIXES:
                continue
            known = Config.model_fields[section].annotation.model_fields
            assert key in known, f"{page.relative_to(ROOT)} names the key {section}.{key}"


FILE_SUFFIXES = {"id", "index", "json", "jsonl", "lock", "md", "txt"}  # of log.txt, run.id and others


def test_every_subcommand_and_option_in_the_documentation_exists():
    known = subcommands()
    for page, text in texts():
        for words in re.findall(r"(?:scale-mae|-m scale_mae) ([a-z]+)(?=[ `\n])((?:[^`\n]|\\\n)*)", text):
            name, rest = words
            assert name in known, f"{page.relative_to(ROOT)} names the command scale-mae {name}"
            options = {option for action in known[name]._actions for option in action.option_strings}
            for option in re.findall(r"(?<=\s)--[a-z][\w-]*", re.split(r"[|;&]|  #", rest)[0]):
                assert option in options, f"{page.relative_to(ROOT)} names the option {option} of scale-mae {name}"


def test_every_file_in_the_documentation_exists():
    folders = "scale_mae|tests|benchmarks|cluster|ds_configs|docs"
    for page, text in texts():
        for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", text):
            assert (ROOT / path).exists(), f"{page.relative_to(ROOT)} names {path}"
        for path in re.findall(r"`([a-z_]+/[a-z_0-9]+\.py)`", text):
            assert any((ROOT / folder / path).exists() for folder in ("", "scale_mae")), (
                f"{page.relative_to(ROOT)} names {path}"
            )


def test_every_python_name_in_the_documentation_exists():
    import importlib

    for page, text in texts():
        for name in re.findall(r"(?:^::: |`)(scale_mae(?:\.\w+)+)", text, re.MULTILINE):
            if name in ("scale_mae.run_id", "scale_mae.json"):  # a tag of MLflow, a file
                continue
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), f"{page.relative_to(ROOT)} names {name}"


def test_links_to_files_and_headings_lead_somewhere():
    for page in [*PAGES, ROOT / "cluster" / "README.md", ROOT / "benchmarks" / "README.md"]:
        text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?://", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.relative_to(ROOT)} links to {link}"
            assert not anchor or anchor in headings(target), f"{page.relative_to(ROOT)} links to {link}"


def headings(page):
    """The anchors of a page, as forges and MkDocs make them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def test_recipes_and_site_files_in_the_documentation_are_valid():
    for block in blocks("yaml"):
        content = yaml.safe_load(block.text)
        (SiteConfig if {"partition", "gpus_per_node"} & content.keys() else Config).model_validate(content)


def test_json_in_the_documentation_is_valid():
    for block in blocks("json"):
        json.loads(block.text)


def test_code_that_names_a_page_of_the_documentation_names_one_that_exists():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in listed:
        if name.startswith(("scale_mae/", "cluster/", "benchmarks/", "Dockerfile")) and name.endswith(
            (".py", ".md", ".yml", "file")
        ):
            for path in re.findall(r"\bdocs/[\w/]+\.\w+", (ROOT / name).read_text()):
                assert (ROOT / path).exists(), f"{name} names {path}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_every_extra_in_the_documentation_exists():
    text = (ROOT / "pyproject.toml").read_text()
    extras = set(
        re.findall(
            r"^(\w+) = \[", text.partition("[project.optional-dependencies]")[2].partition("\n[project")[0], re.MULTILINE
        )
    )
    for page, text in texts():
        for named in re.findall(r"pip install [^`\n]*\[([\w,]+)\]", text):
            assert set(named.split(",")) <= extras, f"{page.relative_to(ROOT)} names the extras {named}"
