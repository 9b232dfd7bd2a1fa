"""Build the container image with buildah, on a base that debootstrap creates from this machine's own distribution.

    with Image(folder) as image:
        image.run("doctor")                      # the entry point, as the user of the image
        image.run("id", user="1234:0", entry_point=False, read_only=True)

buildah needs no daemon and no registry, and with chroot isolation no container runtime. The build uses this machine's pip
configuration, certificates and proxies. They are mounted and not copied into the image.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CERTIFICATES = "/etc/ssl/certs"
BASE, NAME = "localhost/base", "localhost/scale-mae:test"
# The equivalent of a container runtime's `--read-only --tmpfs /tmp --volume ...:/workspace`, with docker's options for a tmpfs.
READ_ONLY = """\
mount --bind {root} {root} && mount -o remount,bind,ro {root} &&
mount -t tmpfs -o nosuid,nodev,noexec,mode=1777 tmpfs {root}/tmp && mount -t proc proc {root}/proc &&
mount --rbind /dev {root}/dev && mount --bind {workspace} {root}/workspace &&
exec chroot --userspec={user} {root} /usr/bin/env --ignore-environment --chdir=/workspace {command}
"""


class Image:
    """The image and one container of it. Entering builds them, and leaving deletes them.

    Args:
        folder: Folder for base, storage and workspace. It takes 20 GB.

    Attributes:
        config: The runtime configuration of the image (``User``, ``Env``, ``Labels``, ...).
        metadata: All metadata of the image as text.
        root: Root of the container's file system.
        workspace: Folder of this machine that is mounted at /workspace and that every user may write to.
        secret: A string that occurs only in the pip.conf of the build.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.workspace = folder, folder / "workspace"
        self.secret = secrets.token_hex(16)
        buildah = {"CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"), "BUILDAH_ISOLATION": "chroot"}
        self.env = os.environ | _proxies() | buildah

    def __enter__(self) -> Image:
        self.workspace.mkdir()
        self.workspace.chmod(0o777)
        self._choose_storage()
        try:
            self._make_base()
            self._build()
            self._container = self._buildah("from", "--pull-never", NAME)
            self.root = Path(self._buildah("mount", self._container))
            self.metadata = self._buildah("inspect", "--type", "image", NAME)
        except BaseException:
            self.__exit__()
            raise
        self.config = json.loads(self.metadata)["OCIv1"]["config"]
        return self

    def __exit__(self, *_: object) -> None:
        self._buildah("rm", "--all")
        self._buildah("rmi", "--all", "--force")
        shutil.rmtree(self.folder)

    def run(self, *words: str, user: str = "", entry_point: bool = True, read_only: bool = False) -> str:
        """Run a command in the container and return its standard output. Fail if the command fails.

        Args:
            words: The arguments of the entry point, or a whole command.
            user: User as ``uid:gid``. Empty means the user of the image.
            entry_point: Whether to put the entry point of the image before ``words``.
            read_only: Whether only /tmp and /workspace are writable. Programs in /tmp then cannot be executed.
        """
        command = [*(self.config["Entrypoint"] if entry_point else []), *words]
        if read_only:
            user = user or f"{self.config['User']}:{self.config['User']}"
            line = shlex.join([*self.config["Env"], *command])
            script = READ_ONLY.format(root=self.root, workspace=self.workspace, user=user, command=line)
            return self._call("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script)
        options = ["--user", user] if user else []
        return self._buildah("run", *options, "--volume", f"{self.workspace}:/workspace", self._container, "--", *command)

    def _choose_storage(self) -> None:
        for driver in ("overlay", "vfs"):  # vfs copies layers instead of linking them, but works on any file system
            text = f'[storage]\ndriver = "{driver}"\ngraphroot = "{self.folder}/graph"\nrunroot = "{self.folder}/run"\n'
            (self.folder / "storage.conf").write_text(text)
            if not subprocess.run(["buildah", "info"], env=self.env, capture_output=True, check=False).returncode:
                return

    def _make_base(self) -> None:
        system = platform.freedesktop_os_release()
        suite = system["VERSION_CODENAME"]
        parts = "main,universe" if system["ID"] == "ubuntu" else "main"
        listed = self._call("apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages")
        mirrors = [line.split()[1] for line in listed.splitlines() if line.startswith(f"{suite} http")]
        options = ["--variant=minbase", f"--components={parts}", "--include=ca-certificates"]
        self._call("debootstrap", *options, suite, str(self.folder / "base"), *mirrors[:1])
        container = self._buildah("from", "scratch")
        self._buildah("add", "--quiet", container, str(self.folder / "base"), "/")
        self._buildah("commit", "--quiet", "--rm", container, BASE)
        shutil.rmtree(self.folder / "base")

    def _build(self) -> None:
        secret = self.folder / "pip.conf"
        secret.write_text(f"# {self.secret}\n{_pip_configuration()}")
        flags = f"--pull-never --secret id=pip.conf,src={secret} --volume {CERTIFICATES}:{CERTIFICATES}:ro"
        self._call("make", "image", "BUILDERS=buildah", f"BASE={BASE}", f"TAG={NAME}", f"IMAGE_FLAGS={flags}", cwd=ROOT)

    def _buildah(self, *words: str) -> str:
        return self._call("buildah", *words)

    def _call(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(command, env=self.env, cwd=cwd or self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
        return done.stdout.strip()


def _pip_configuration() -> str:
    """Return pip's configuration on this machine, without values that refer to files that a container does not have."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    options = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        words = ast.literal_eval(value).split()
        kept = [word for word in words if word.startswith(CERTIFICATES) or not word.startswith(("/", "~", "file:"))]
        if kept:
            options[name.rpartition(".")[2]] = " ".join(kept)
    return "\n".join(["[global]", *(f"{name} = {value}" for name, value in options.items()), ""])


def _proxies() -> dict[str, str]:
    """Return the proxies of apt as environment variables. buildah passes them to a build and keeps them out of the image."""
    variables = {}
    for scheme in ("http", "https"):
        listed = subprocess.run(["apt-config", "dump", f"Acquire::{scheme}::Proxy"], capture_output=True, text=True, check=True)
        value = listed.stdout.partition('"')[2].partition('"')[0]
        if value and value != "DIRECT":
            variables[f"{scheme}_proxy"] = value
    return variables
