"""Builds the Dockerfile and runs the image as it is meant to run, without Docker and without an image registry.

For Debian, as root, with debootstrap, buildah and runc. A Debian made by debootstrap stands in for the base image, so
Python is Debian's: what is proved is the Dockerfile and the container, not the base. Takes two to five minutes, and a
GB or two below the temporary folder, which is removed at the end.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from testbed.servers import Port, Servers

ROOT = Path(__file__).parents[1]
BASE, IMAGE = "localhost/python-stand-in", "localhost/sms-gateway"
CERTIFICATES = (
    "/etc/ssl/certs"  # of this machine, for the build alone: a package index may be behind a proxy of its own
)
READY_WITHIN_S = 30.0
DRAIN_WITHIN_S = 30.0  # the grace period that README and manifests give


class Workshop:
    """Images and containers in one folder, and nothing of the machine's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        storage = folder / "storage.conf"
        storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/images"\nrunroot = "{folder}/run"\n')
        self._environment = os.environ | {"CONTAINERS_STORAGE_CONF": str(storage), "STORAGE_DRIVER": "vfs"}

    def buildah(self, *arguments: str | Path) -> str:
        done = subprocess.run(
            ["buildah", *arguments], env=self._environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"image: buildah {arguments[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout.strip()

    def build(self) -> None:
        """The stand-in for the base, and the image on it."""
        debian = self.folder / "debian"
        packages = "--include=python3,python3-venv,python3-pip"
        subprocess.run(
            ["debootstrap", "--variant=minbase", packages, "stable", debian], stdout=subprocess.DEVNULL, check=True
        )
        (debian / "usr/bin/python").symlink_to("python3")
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, debian, "/")
        self.buildah("commit", "--quiet", container, BASE)
        certificates = f"{CERTIFICATES}:{CERTIFICATES}:ro"
        options = ["--isolation", "chroot", "--format", "docker", "--volume", certificates, "--tag", IMAGE]
        self.buildah("build", *options, "--build-arg", f"PYTHON_IMAGE={BASE}", ".")

    def unpack(self) -> tuple[Path, dict[str, Any]]:
        """The image's files, and what it says of itself."""
        files = Path(self.buildah("mount", self.buildah("from", "--pull-never", IMAGE)))
        return files, json.loads(self.buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]


class Container:
    """The image under runc: read-only, without a capability, on this machine's network."""

    def __init__(self, folder: Path, files: Path, image: dict[str, Any], settings: dict[str, str]) -> None:
        self._folder, self._files, self._image, self._settings = folder, files, image, settings

    def command(self, name: str, *arguments: str) -> list[str]:
        """The command that runs the image's entry point with these arguments."""
        return self._runc(name, [*self._image["Entrypoint"], *arguments])

    def health_check(self) -> list[str]:
        """The command that runs the image's own health check, in a container beside the first."""
        return self._runc("health", self._image["Healthcheck"]["Test"][1:])

    def _runc(self, name: str, command: list[str]) -> list[str]:
        user, _, group = self._image["User"].partition(":")
        nothing: list[str] = []
        sets = ("bounding", "effective", "permitted", "inheritable", "ambient")
        bundle = self._folder / f"bundle-{name}"
        bundle.mkdir(exist_ok=True)
        configuration = {
            "ociVersion": "1.0.2",
            "root": {"path": str(self._files), "readonly": True},
            "process": {
                "user": {"uid": int(user), "gid": int(group)},
                "args": command,
                "cwd": self._image["WorkingDir"],
                "env": [*self._image["Env"], *(f"{key}={value}" for key, value in self._settings.items())],
                "noNewPrivileges": True,
                "capabilities": dict.fromkeys(sets, nothing),
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=64k"]},
            ],
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]},
        }
        (bundle / "config.json").write_text(json.dumps(configuration))
        state = str(self._folder / "runc")
        return ["runc", "--root", state, "run", "--bundle", str(bundle), f"sms-gateway-{os.getpid()}-{name}"]


def run(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        sys.exit(f"image: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def send(port: Port, key: str, number: str) -> dict[str, Any]:
    message = {"to": "+14155551234", "list_number": number, "body": "Hello"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/v2/send/bulk",
        data=json.dumps({"messages": [message] * 10}).encode(),
        headers={"X-Api-Key": key, "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=15) as answer:  # noqa: S310 - of our own making
        decoded: dict[str, Any] = json.load(answer)
        return decoded


def main() -> None:
    missing = [name for name in ("debootstrap", "buildah", "runc") if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        sys.exit(f"image: this needs root, and: apt-get install {' '.join(missing) or '(nothing more)'}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sms-gateway-image-")))
        workshop = Workshop(folder)
        workshop.build()
        print("built by buildah from the Dockerfile", flush=True)
        files, image = workshop.unpack()
        servers = stack.enter_context(Servers())
        api, ops = Port(), Port()
        settings = {
            **servers.environment(),
            "GATEWAY_API_HOST": "127.0.0.1",
            "GATEWAY_API_PORT": str(api),
            "GATEWAY_OPS_HOST": "127.0.0.1",
            "GATEWAY_OPS_PORT": str(ops),
        }
        container = Container(folder, files, image, settings)
        run(container.command("migrate", "migrate"))
        print("migrated by the container")

        def administer(*arguments: str) -> dict[str, Any]:
            row: dict[str, Any] = json.loads(run(container.command("administer", *arguments, "--json")))
            return row

        account = str(administer("account", "create", "Acme")["id"])
        key, number = administer("key", "create", account)["key"], "+18005551000"
        administer("list", "add", account, number)

        log = stack.enter_context((folder / "log").open("w"))
        gateway = subprocess.Popen(container.command("serve", *image["Cmd"]), stdin=subprocess.DEVNULL, stderr=log)
        stack.callback(gateway.kill)
        deadline = time.monotonic() + READY_WITHIN_S
        while not is_ready(ops):
            if gateway.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"image: the gateway did not get ready:\n{(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)
        run(container.health_check())
        print("ready; the image's own health check agrees")
        answer = send(api, key, number)
        print(f"sent: {answer}")
        told = time.monotonic()
        gateway.terminate()  # runc hands it on
        status = gateway.wait(DRAIN_WITHIN_S)
        print(f"SIGTERM: drained in {time.monotonic() - told:.1f} s, exit status {status}")
        if (answer["queued_count"], status) != (10, 0):
            sys.exit("image: not as promised")


def is_ready(port: Port) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    main()
