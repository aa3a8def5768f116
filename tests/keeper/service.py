"""The unit under a real systemd, in a container on this host's files: `python -m tests.keeper.service`, as root.

Needs systemd-nspawn. Prints how long after each kind of end the clocks were restored, and which rights of root remain.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.keeper.client import Client
from tools.nvml import build
from tools.nvml.machine import Machine, a100

SERVICE = "throttllem-keeper"
ROOT = Path(__file__).parents[2]
LIMIT_S = 180
TRIES = 5
OUTER = """
[Service]
Type=oneshot
WorkingDirectory={root}
ExecStart={python} -m tests.keeper.service inside {folder}
ExecStopPost=systemctl poweroff --no-block
StandardOutput=file:{folder}/output
StandardError=file:{folder}/failed
"""


# ---- outside --------------------------------------------------------------------------------------------------


def run(*command, check=True):
    return subprocess.run(command, check=check, capture_output=True, text=True).stdout


def outside():
    """Boot a container on an overlay of this host's root, which runs `inside`."""
    made = Path(tempfile.mkdtemp(prefix="service", dir="/opt"))
    folder, layer, root = made / "shared", made / "layer", made / "layer/root"
    for each in (folder, layer):
        each.mkdir()
    Machine.create(folder / "gpus", a100(1, switch_ms=(0, 0)), library=build.library(folder / "library")).close()
    (folder / "try.service").write_text(OUTER.format(root=ROOT, python=sys.executable, folder=folder))
    run("mount", "-t", "tmpfs", "tmpfs", str(layer))
    for each in ("upper", "work", "root"):
        (layer / each).mkdir()
    where = f"lowerdir=/,upperdir={layer}/upper,workdir={layer}/work"
    run("mount", "-t", "overlay", "overlay", "-o", where, str(root))
    try:
        subprocess.run(
            [
                *(
                    "systemd-nspawn",
                    "--quiet",
                    f"--directory={root}",
                    "--private-network",
                    "--register=no",
                    "--keep-unit",
                ),
                *(f"--bind={folder}", f"--bind-ro={ROOT}"),
                f"--bind-ro={folder}/try.service:/etc/systemd/system/try.service",
                *("--boot", "systemd.unit=basic.target", "systemd.wants=try.service"),
            ],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=LIMIT_S,
        )
        print((folder / "output").read_text(), (folder / "failed").read_text(), sep="", end="")
    finally:
        run("umount", str(root))
        run("umount", str(layer))
        shutil.rmtree(made)


# ---- inside ---------------------------------------------------------------------------------------------------


def main_pid():
    return int(run("systemctl", "show", "-p", "MainPID", "--value", SERVICE))


def leased(uuid):
    """A connection that holds the GPU at 1005 MHz."""
    ends_s = time.monotonic() + 10
    while time.monotonic() < ends_s:
        try:
            client = Client("/run/throttllem/keeper.sock")
            if client.request("lease", gpus=[uuid], ttl_s=60)["ok"] and client.request("set", mhz=1005)["ok"]:
                return client
            client.close()
        except OSError:
            pass
        time.sleep(0.01)
    raise SystemExit("no lease")


def restored_s(machine, act):
    """From the act to the unlocked GPU."""
    with leased(machine.gpus[0].uuid):
        begun_s = time.monotonic()
        act()
        while machine.gpus[0].lock is not None:
            time.sleep(0.002)
            assert time.monotonic() - begun_s < 20
        return time.monotonic() - begun_s


def inside(folder):
    """Install the service with the fake NVML, and measure."""
    machine = Machine.open(folder / "gpus", library=folder / "library")
    units = Path("/run/systemd/system")
    command = [
        sys.executable,
        "-c",
        "from throttllem.cli.app import main; main()",
        "keeper",
        "--unit",
        "--user",
        "nobody",
    ]
    unit = run(*command, "--gpu", f"{machine.gpus[0].uuid}=210-1410")
    (units / f"{SERVICE}.service").write_text(unit)
    fake = "\n".join(f'Environment="{name}={value}"' for name, value in machine.environment(base={}).items())
    (units / f"{SERVICE}.service.d").mkdir()
    (units / f"{SERVICE}.service.d/fake.conf").write_text(f"[Service]\n{fake}\nReadWritePaths={folder}\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "start", SERVICE)
    print(run("systemctl", "--version").splitlines()[0])
    acts = {
        "killed": lambda: os.kill(main_pid(), signal.SIGKILL),
        "stopped (SIGSTOP), and killed by the watchdog": lambda: os.kill(main_pid(), signal.SIGSTOP),
        "restarted": lambda: run("systemctl", "restart", "--no-block", SERVICE),
    }
    for what, act in acts.items():
        took_s = [restored_s(machine, act) for _ in range(TRIES)]
        print(f"{what}: restored after {min(took_s):.2f} to {max(took_s):.2f} s")
    leased(machine.gpus[0].uuid).close()
    status = Path(f"/proc/{main_pid()}/status").read_text()
    print(*re.findall(r"^(?:CapEff|CapBnd|NoNewPrivs|Seccomp|VmRSS):.*", status, re.MULTILINE), sep="\n")
    print(run("systemd-analyze", "security", "--no-pager", SERVICE, check=False).splitlines()[-1])


if __name__ == "__main__":
    inside(Path(sys.argv[2])) if sys.argv[1:2] == ["inside"] else outside()
