"""The service, its files and its package: offline first, then installed and at work under a real systemd."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trigger_daemon
from tests.systemd_box import Box, missing
from trigger_daemon import config, log
from trigger_daemon.config.settings import GlobusSettings, Settings, ThrottleSettings, VolumeSettings

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGING = REPOSITORY / "packaging"
UNIT = PACKAGING / "systemd" / "trigger-daemon.service"
EXPOSURE_MAX = 2.0  # systemd-analyze's scale from 0 to 10; it calls up to 5 "OK"
MINE = "# mine\n"
PAGES = {  # manual page -> what it is made of
    "man1/trigger-daemon.1": "cli.md",
    "man5/trigger-daemon.rules.5": "rules.md",
    "man5/trigger-daemon.conf.5": "settings.md",
}


def run(*command: object, **more: object) -> subprocess.CompletedProcess[str]:
    """Run a program of the system, in a language that messages can be compared in."""
    keys = {"capture_output": True, "text": True, "timeout": 60, "env": {**os.environ, "LC_ALL": "C.UTF-8"}} | more
    return subprocess.run([str(word) for word in command], check=False, **keys)  # type: ignore[call-overload,no-any-return]


def make(*words: str, timeout: float = 110) -> None:
    """Run make as a person would, not as a part of the make that runs the tests."""
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = run("make", "-s", *words, cwd=REPOSITORY, env=env, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------ the unit


def test_systemd_understands_the_unit(tmp_path):
    """systemd has nothing to say about the unit: no unknown key, no value that it would ignore."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/bin/trigger-daemon", "/bin/true"))

    said = run("systemd-analyze", "verify", "--man=no", unit)

    assert (said.returncode, [line for line in said.stderr.splitlines() if UNIT.name in line]) == (0, [])


def test_the_sandbox_stays_tight():
    """The exposure that systemd-analyze sees is far below what it calls OK."""
    limit = f"--threshold={EXPOSURE_MAX * 10:.0f}"
    said = run("systemd-analyze", "security", "--offline=yes", limit, "--no-pager", UNIT)

    assert said.returncode == 0, said.stdout[-200:]


@pytest.mark.parametrize("file", ["trigger-daemon.service", "drop-in.conf", "sysusers.conf", "tmpfiles.conf"])
def test_every_directive_says_why(file):
    """Above each line that systemd reads, or above the few that belong together, a comment gives the reason."""
    unexplained, since_comment = [], 99
    for line in (PACKAGING / "systemd" / file).read_text().splitlines():
        if line.startswith("# "):
            since_comment = 0
        elif not line or line.startswith("["):
            since_comment = 99
        elif not line.startswith(("Description=", "Documentation=", "#\n")):
            since_comment += 1
            if since_comment > 3:
                unexplained.append(line)

    assert unexplained == []


# ------------------------------------------------------------------------- the log


def test_fields_of_the_journal_are_the_keys_of_the_log():
    """Each key is a field that journalctl can look for; the message is one line, of names that are no UTF-8 too."""
    event = {"event": "run.held", "level": "warning", "timestamp": "t", "run": 7, "rule": "movies", "because": "no",
             "path": "a\udcff.tif", "_odd-key": 1, "message": "ours"}  # fmt: skip

    assert log.fields("warning", event) == {
        "MESSAGE": 'run.held run=7 rule=movies because=no path=a\\udcff.tif _odd-key=1 message=ours',
        "PRIORITY": "4", "EVENT": "run.held", "SYSLOG_IDENTIFIER": "trigger-daemon",
        "RUN": "7", "RULE": "movies", "BECAUSE": "no", "PATH": "a\\udcff.tif",
    }  # fmt: skip


# ----------------------------------------------------------------- make install


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make install` puts below DESTDIR, without the optional libraries."""
    destdir = tmp_path_factory.mktemp("destdir")
    (destdir / "etc/trigger-daemon").mkdir(parents=True)
    (destdir / "etc/trigger-daemon/config.yaml").write_text(MINE)
    make("install", f"DESTDIR={destdir}", "EXTRAS=")
    return destdir


@pytest.mark.serial
def test_install_puts_all_below_the_prefix(installed):
    """All but the settings lies below PREFIX, and the unit starts what is there."""
    unit = (installed / "usr/local/lib/systemd/system/trigger-daemon.service").read_text()
    program = installed / "usr/local/lib/trigger-daemon/bin/trigger-daemon"
    outside = [path for path in installed.iterdir() if path.name not in ("usr", "etc")]

    assert "ExecStart=/usr/local/bin/trigger-daemon serve" in unit
    assert os.readlink(installed / "usr/local/bin/trigger-daemon") == "/usr/local/lib/trigger-daemon/bin/trigger-daemon"
    assert program.read_text().startswith("#!/usr/local/lib/trigger-daemon/bin/python3 -I\n")
    assert outside == [] and [path.name for path in (installed / "etc").iterdir()] == ["trigger-daemon"]
    assert (installed / "usr/local/lib/sysusers.d/trigger-daemon.conf").exists()


@pytest.mark.serial
def test_nothing_installed_names_the_directory_it_was_built_in(installed):
    """The environment knows no path but its final one, compiled modules too."""
    named = [
        path for path in installed.rglob("*")
        if path.is_file() and not path.is_symlink()
        and any(os.fsencode(place) in path.read_bytes() for place in (installed, REPOSITORY))
    ]  # fmt: skip

    assert named == []


@pytest.mark.serial
def test_the_installed_program_runs_and_takes_nothing_from_its_caller(installed):
    """The environment is whole: the program runs in it, and PYTHONPATH does not reach it."""
    opt = installed / "usr/local/lib/trigger-daemon"
    said = run(opt / "bin/python3", "-I", opt / "bin/trigger-daemon", "--version", env={"PYTHONPATH": "/nowhere"})

    assert said.stdout.strip() == trigger_daemon.__version__, said.stderr


@pytest.mark.serial
def test_zsh_finds_its_completion(installed):
    """Below /usr/local zsh looks in another directory than below /usr."""
    assert (installed / "usr/local/share/zsh/site-functions/_trigger-daemon").read_text().startswith("#compdef ")


@pytest.mark.serial
def test_settings_that_are_there_already_are_kept(installed):
    """Installing changes nothing that stands in /etc, and adds what does not."""
    etc = installed / "etc/trigger-daemon"

    assert (etc / "config.yaml").read_text() == MINE
    assert (etc / "rules/README").read_text() == (PACKAGING / "rules-README").read_text()


@pytest.mark.serial
@pytest.mark.parametrize(("page", "source"), PAGES.items())
def test_manual_pages_are_whole(installed, page, source):
    """man has nothing to say against a page, and shows all that its source has as code, to the letter."""
    env = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    said = run("man", "--warnings", "-l", installed / "usr/local/share/man" / page, env=env)
    text = (REPOSITORY / "docs/reference" / source).read_text()
    code = [piece.replace("\\|", "|") for piece in re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", text))]
    code += re.findall(r"(?m)^ .+", "\n".join(re.findall(r"(?ms)^```\w*\n(.*?)^```", text)))
    shown = "".join(said.stdout.split())
    missing_there = [piece for piece in code if "".join(piece.split()) not in shown]

    assert (said.returncode, said.stderr, missing_there) == (0, "", [])
    assert re.search(r"^NAME\n +trigger-daemon", said.stdout, re.MULTILINE) and len(code) > 20


def test_every_setting_is_in_the_reference():
    """The page of the settings names each key, as it is written."""
    page = (REPOSITORY / "docs/reference/settings.md").read_text()
    models = (Settings, VolumeSettings, ThrottleSettings, GlobusSettings)
    keys = {field.alias or name for model in models for name, field in model.model_fields.items()}

    assert [key for key in sorted(keys) if f"| `{key}` |" not in page] == []


def test_what_is_shipped_watches_nothing():
    """The settings as shipped are all defaults, and the file beside the rules is none."""
    active = [line for line in (PACKAGING / "config.yaml").read_text().splitlines() if line and line[0] != "#"]

    assert active == [] and dict(config.load_settings(PACKAGING / "config.yaml", {})) == dict(Settings())


# ------------------------------------------------- the package, under a real systemd


class Service:
    """The installed service in a box, and what a person at its workstation does."""

    def __init__(self, box: Box) -> None:
        self.box = box

    def open(self, name: str, **keys: Any) -> None:
        """Make a directory to watch, a destination, the rule from one to the other, and the drop-in that opens it."""
        self.box.sh(f"install -d -m 755 /srv/{name}/in; install -d -o trigger-daemon /srv/{name}/out")
        self.drop_in(name, f"ReadWritePaths=-/srv/{name}/out")
        rule = {
            "name": name, "watch": f"/srv/{name}/in", "match": ["**"], "existing": "process",
            "complete": {"quiescence": "500ms"}, "start": {"copy": {"to": f"/srv/{name}/out"}},
        } | keys  # fmt: skip
        self.box.write(f"/etc/trigger-daemon/rules/{name}.yaml", json.dumps({"rules": [rule]}))
        self.box.sh("systemctl restart trigger-daemon")

    def drop_in(self, name: str, *lines: str) -> None:
        """Add to the unit, as `systemctl edit` does; nothing takes it away again."""
        text = "\n".join(["[Service]", *lines, ""])
        self.box.write(f"/etc/systemd/system/trigger-daemon.service.d/{name}.conf", text)
        self.box.sh("systemctl daemon-reload")

    def clear(self) -> None:
        """Take away every rule and drop-in but those of the first rule."""
        own = "/etc/trigger-daemon/rules/*.yaml /etc/systemd/system/trigger-daemon.service.d/*.conf"
        left = self.box.sh(f"ls {own} | grep -v /first", check=False).stdout.split()
        if left:
            self.box.sh(f"rm -f {' '.join(left)}; systemctl daemon-reload; systemctl reset-failed")
            self.box.sh("systemctl restart trigger-daemon")

    def put(self, path: str, size: int = 1_000) -> None:
        self.box.sh(f"head -c {size} /dev/urandom > {path}.part; mv {path}.part {path}")

    def arrived(self, name: str, *files: str) -> bool:
        """Say whether the copies are what their sources are."""
        return all(
            self.box.sh(f"cmp -s /srv/{name}/in/{file} /srv/{name}/out/{file}", check=False).returncode == 0
            for file in files
        )

    def batches(self, rule: str) -> list[int]:
        """Return how many files each batch of a rule had, as the journal knows it."""
        runs = json.loads(self.box.sh(f"trigger-daemon runs list --rule {rule} -F json", check=False).stdout)["runs"]
        return [run["files"] for run in runs]

    def state(self) -> dict[str, str]:
        names = ("ActiveState", "Result", "StatusText", "MainPID", "NRestarts")
        return self.box.show("trigger-daemon", *names)  # type: ignore[no-any-return]

    def log(self, *matches: str) -> list[dict[str, Any]]:
        lines = self.box.out(f"journalctl -u trigger-daemon -o json --no-pager {' '.join(matches)}").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def package() -> Path:
    """The package of this tree, built once."""
    make("deb", timeout=600)
    (built,) = (REPOSITORY / "build").glob("trigger-daemon_*.deb")
    return built


@pytest.fixture
def service(installation: Service) -> Iterator[Service]:
    """The service that all scenes share, with nothing left of the scene before but the rule `first`."""
    yield installation
    installation.clear()


@pytest.fixture(scope="module")
def installation(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The package, installed as a person installs it, in a box that all scenes share."""
    if found := missing():
        pytest.skip(f"needs {', '.join(found)}")
    newer = tmp_path_factory.mktemp("newer")
    box = Box(tmp_path_factory.mktemp("box") / "b", binds={package.parent: "/mnt", newer: "/media"})
    box.newer = newer
    try:
        box.sh(f"apt-get install -y /mnt/{package.name}")
        yield Service(box)
    finally:
        box.close()


@pytest.mark.serial
def test_an_installed_package_is_a_running_service(service):
    """After installation the service is at work, enabled, as its own user, with its state for its group alone."""
    box = service.box
    state = service.state()
    process = f"/proc/{state['MainPID']}"

    assert (state["ActiveState"], state["StatusText"]) == ("active", "no rules: nothing is watched")
    assert box.out("systemctl is-enabled trigger-daemon") == "enabled"
    assert box.out(f"stat -c %U {process}") == "trigger-daemon"
    assert box.out("stat -c '%U:%G %a' /var/lib/trigger-daemon") == "trigger-daemon:trigger-daemon 2770"
    assert box.out("stat -c '%U %a' /etc/trigger-daemon/config.yaml") == "root 644"
    box.sh("man -w 1 trigger-daemon; man -w 5 trigger-daemon.rules; man -w 5 trigger-daemon.conf")
    assert box.out("trigger-daemon --version") == trigger_daemon.__version__
    box.sh("/opt/trigger-daemon/bin/python3 -I -c 'import globus_sdk, h5py, systemd.journal'")
    box.sh("trigger-daemon rules check /usr/share/doc/trigger-daemon/examples/rules/movies.yaml")


@pytest.mark.serial
def test_a_shell_completes_commands(service):
    """After a start of a word, TAB offers what the program has."""
    offered = service.box.out(
        "bash -c '. /usr/share/bash-completion/completions/trigger-daemon;"
        " COMP_WORDS=(trigger-daemon runs re); COMP_CWORD=2; _trigger_daemon_completion trigger-daemon;"
        ' echo "${COMPREPLY[@]}"\''
    )

    assert offered == "retry"


@pytest.mark.serial
def test_a_first_rule_and_what_journalctl_tells(service, wait_until):
    """A rule and a drop-in for its destination are all it takes; the log has a field for each key."""
    service.open("first")
    service.put("/srv/first/in/a.tif")
    wait_until(lambda: service.arrived("first", "a.tif"), 30, what="the copy")
    wait_until(lambda: "watching 1 directory" in service.state()["StatusText"], what="the status")

    closed = service.log("RULE=first", "EVENT=batch.closed")
    moved = wait_until(lambda: service.log("EVENT=run.moved", "TO=VERIFIED"))
    assert [(line["FILES"], line["PRIORITY"], line["BATCH"]) for line in closed] == [("1", "6", moved[0]["RUN"])]
    assert closed[0]["_SYSTEMD_UNIT"] == "trigger-daemon.service" and "batch.closed" in closed[0]["MESSAGE"]
    assert service.log("EVENT=root.changed", "ROOT=/srv/first/in")


@pytest.mark.serial
def test_reload_takes_what_is_right_and_refuses_what_is_not(service, wait_until):
    """`systemctl reload` puts settings and rules in force while the process stays; a fault is in the status at once."""
    before = service.state()["MainPID"]
    service.box.write("/etc/trigger-daemon/config.yaml", "throttle: {runs: none}\n")
    service.box.sh("systemctl reload trigger-daemon")
    wait_until(lambda: "the settings have a fault" in service.state()["StatusText"], what="the fault of the settings")
    service.box.write("/etc/trigger-daemon/config.yaml", "throttle: {runs: 2}\n")
    service.box.write("/etc/trigger-daemon/rules/broken.yaml", "rules: [{name: broken}]\n")
    service.box.sh("systemctl reload trigger-daemon")
    wait_until(lambda: "rules refused: " in service.state()["StatusText"], what="the fault of the rules")
    assert "the settings have a fault" not in service.state()["StatusText"]
    service.box.sh("rm /etc/trigger-daemon/rules/broken.yaml; systemctl reload trigger-daemon")
    wait_until(lambda: "refused" not in service.state()["StatusText"], what="the rules of before")

    assert (service.state()["MainPID"], service.state()["NRestarts"]) == (before, "0")


@pytest.mark.serial
def test_nothing_is_written_outside_of_state_and_destinations(service, wait_until):
    """A program of a rule can write to the state and opened destinations only, and gains no rights."""
    script = (
        "for d in / /etc /etc/trigger-daemon /usr /opt/trigger-daemon /home /root /srv /srv/walls/in /var/lib /var/log"
        " /dev /sys /proc/sys/kernel /srv/walls/out /var/lib/trigger-daemon /tmp /run/trigger-daemon; do"
        " (: > $d/probe) 2>/dev/null && echo $d; done > /srv/walls/out/said;"
        " grep -E 'NoNewPrivs|CapEff|CapBnd|Seccomp:' /proc/self/status >> /srv/walls/out/said; mv /srv/walls/out/said"
        " /srv/walls/out/probed"
    )
    service.box.sh("install -d -m 1777 /srv/walls; touch /tmp/of-the-machine")
    service.open("walls", start={"command": {"run": ["/bin/sh", "-c", script]}})
    service.box.sh("chmod 777 /srv/walls/in")  # permissions do not stand in the way: the sandbox does
    service.put("/srv/walls/in/go")
    wait_until(lambda: service.box.sh("cat /srv/walls/out/probed", check=False).returncode == 0, 30, what="the probe")
    said = service.box.out("cat /srv/walls/out/probed").split("\n")

    assert said[:4] == ["/srv/walls/out", "/var/lib/trigger-daemon", "/tmp", "/run/trigger-daemon"]
    assert dict(line.split(":\t") for line in said[4:]) == {
        "CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2",
    }  # fmt: skip
    written = service.box.written_by(int(service.box.out("id -u trigger-daemon")))
    allowed = re.compile(r"/(srv/\w+/out|var/lib/trigger-daemon)(/|$)|/(var/)?tmp/systemd-private-")
    assert written and [path for path in written if not allowed.match(path)] == []


@pytest.mark.serial
def test_a_destination_that_is_not_opened_is_named(service, wait_until):
    """A copy to where the sandbox forbids it waits or is held, and says read-only; nothing is written."""
    service.box.sh("install -d -m 777 /srv/closed/out /srv/closed/in; touch /srv/closed/in/a")
    rule = {"name": "closed", "watch": "/srv/closed/in", "match": ["**"], "existing": "process",
            "complete": {"quiescence": "500ms", "allow_empty": True},
            "start": {"copy": {"to": "/srv/closed/out"}}}  # fmt: skip
    service.box.write("/etc/trigger-daemon/rules/closed.yaml", json.dumps({"rules": [rule]}))

    def told() -> str:
        said = service.box.sh("trigger-daemon runs list --rule closed -F json; true").stdout
        return said if "ead-only" in said else ""

    said = wait_until(told, 30, what="the run to say why")
    assert "ReadWritePaths" in said
    assert service.box.out("ls /srv/closed/out") == ""


@pytest.mark.serial
def test_what_the_sandbox_hides_is_found_by_doctor(service, wait_until):
    """Where the service sees less than the person who asks, `doctor` says so, and what to write."""
    service.box.sh("install -d -m 777 /srv/shut/out /srv/shut/in /tmp/hidden")
    own = {"match": ["**"], "existing": "process", "start": {"copy": {"to": "/srv/shut/out"}}}
    rules = [{"name": "shut", "watch": "/srv/shut/in", **own}, {"name": "hidden", "watch": "/tmp/hidden", **own}]
    service.box.write("/etc/trigger-daemon/rules/shut.yaml", json.dumps({"rules": rules}))
    wait_until(lambda: "/tmp/hidden" in service.box.sh("trigger-daemon alarms list", check=False).stdout, 30)
    done = service.box.sh("runuser -u trigger-daemon -- trigger-daemon doctor -F json", check=False)
    faults = {(one["about"], one["hint"]) for one in json.loads(done.stdout)["findings"] if one["level"] == "fault"}

    assert done.returncode == 4 and {about for about, _ in faults} == {"/srv/shut/out", "/tmp/hidden"}
    assert any("ReadWritePaths=-/srv/shut/out" in hint for _, hint in faults)
    assert "a /tmp of its own" in service.box.sh("trigger-daemon alarms list", check=False).stdout


@pytest.mark.serial
def test_a_destination_may_be_mounted_later(service, wait_until):
    """What is mounted over an opened destination after the start is where copies go, not the directory below."""
    service.open("later")
    service.box.sh("mount -t tmpfs -o size=10m,mode=777 share /srv/later/out")
    service.put("/srv/later/in/a")
    wait_until(lambda: service.arrived("later", "a"), 30, what="the copy")
    service.box.sh("umount -l /srv/later/out")

    assert service.box.out("ls /srv/later/out") == ""


@pytest.mark.serial
def test_stopped_in_the_middle_of_a_copy_it_ends_at_once_and_goes_on_later(service, wait_until):
    """A stop does not wait for copies; no partial file has its final name; the next start completes them.

    While they are under way copies have the idle class of the disk: the sandbox does not keep them from it.
    """
    service.open("slow", start={"copy": {"to": "/srv/slow/out", "bandwidth": "4MB/s"}})
    service.put("/srv/slow/in/big", 30_000_000)
    lane = wait_until(
        lambda: service.box.sh("pgrep -u trigger-daemon -f '[_]lane'", check=False).stdout.split(),
        30, what="a copy under way",
    )  # fmt: skip

    wait_until(lambda: service.box.out(f"ionice -p {lane[0]}") == "idle", what="the idle class")
    wait_until(lambda: service.box.sh("ls -A /srv/slow/out", check=False).stdout, 30, what="the copy to begin")
    service.box.sh("systemctl stop trigger-daemon")
    state, left = service.state(), service.box.sh("pgrep -u trigger-daemon", check=False).stdout
    partial = service.box.sh("test -e /srv/slow/out/big", check=False).returncode

    assert (state["ActiveState"], state["Result"], left, partial) == ("inactive", "success", "", 1)
    service.box.sh("systemctl start trigger-daemon")
    wait_until(lambda: service.arrived("slow", "big"), 60, what="the rest of the copy")
    assert service.batches("slow") == [1]


@pytest.mark.serial
def test_a_killed_daemon_is_started_again_and_catches_up(service, wait_until):
    """After SIGKILL systemd starts it again; what came meanwhile is found; nothing is sent twice."""
    service.box.sh("systemctl kill --kill-who=main --signal=KILL trigger-daemon")
    service.put("/srv/first/in/b.tif")
    wait_until(lambda: service.state()["NRestarts"] == "1" and service.state()["ActiveState"] == "active", 30)
    wait_until(lambda: service.arrived("first", "a.tif", "b.tif"), 30, what="what came while it was down")

    assert service.batches("first") == [1, 1]


@pytest.mark.serial
def test_a_stuck_loop_is_ended_by_the_watchdog(service, wait_until):
    """When the loop does not go on, systemd ends the daemon, where it stood is in the log, and the next one goes on."""
    service.drop_in("stuck", "WatchdogSec=4s", "Environment=TRIGGER_FAIL=loop.before_commit:hang@2")
    service.box.sh("systemctl restart trigger-daemon")
    service.put("/srv/first/in/c.tif")  # the rules are the first commit; its batch, the second, sticks
    wait_until(lambda: int(service.state()["NRestarts"]) >= 1, 60, what="the watchdog")
    service.box.sh("rm /etc/systemd/system/trigger-daemon.service.d/stuck.conf; systemctl daemon-reload")
    service.box.sh("systemctl restart trigger-daemon")
    wait_until(lambda: service.arrived("first", "c.tif"), 30, what="the file after all")

    log = service.box.out("journalctl -u trigger-daemon --no-pager -o cat")
    assert "Watchdog timeout" in log and "failpoints.py" in log and "in _write_and_carry" in log
    assert service.batches("first") == [1, 1, 1]


@pytest.mark.serial
def test_the_watchdog_leaves_a_waiting_daemon_alone(service, wait_until):
    """With nothing to do, the loop still feeds the watchdog in time, also a quick one."""
    service.drop_in("quick", "WatchdogSec=1s")
    service.box.sh("systemctl restart trigger-daemon")
    fed = set()
    wait_until(lambda: fed.add(service.box.show("trigger-daemon", "WatchdogTimestampMonotonic")) or len(fed) > 6, 30)

    assert service.state()["NRestarts"] == "0"
    service.box.sh("rm /etc/systemd/system/trigger-daemon.service.d/quick.conf; systemctl daemon-reload")


@pytest.mark.serial
def test_a_program_goes_on_while_the_daemon_restarts(service, wait_until):
    """A restart of the service does not end what a rule has started: it ends once, and is known."""
    run = ["/bin/sh", "-c", "echo begun >> /srv/long/out/said; while [ ! -e /srv/long/in/end ]; do sleep 0.1; done;"
           " echo ended >> /srv/long/out/said"]  # fmt: skip
    service.open("long", match=["go"], start={"command": {"run": run}})
    service.put("/srv/long/in/go")
    wait_until(lambda: service.box.sh("cat /srv/long/out/said", check=False).stdout == "begun\n", 30, what="its begin")
    service.box.sh("systemctl restart trigger-daemon; touch /srv/long/in/end")
    wait_until(lambda: "ended" in service.box.out("cat /srv/long/out/said"), 30, what="its end")
    states = wait_until(
        lambda: json.loads(service.box.out("trigger-daemon runs list --rule long --state SUCCEEDED -F json"))["runs"],
        30, what="the end to be known",
    )  # fmt: skip

    assert len(states) == 1 and service.box.out("cat /srv/long/out/said") == "begun\nended"


@pytest.mark.serial
def test_a_secret_reaches_the_daemon_alone(service, wait_until):
    """A credential is read by the daemon's user, and stands neither in the unit nor in its environment."""
    box = service.box
    box.sh("install -d -m 700 /etc/credstore; echo s3cret > /etc/credstore/trigger-daemon.globus-client-secret")
    box.sh("systemctl restart trigger-daemon")
    pid = service.state()["MainPID"]
    there = f"$(tr '\\0' '\\n' < /proc/{pid}/environ | sed -n s/^CREDENTIALS_DIRECTORY=//p)/globus-client-secret"
    read = box.out(f"nsenter -t {pid} -m setpriv --reuid trigger-daemon --clear-groups cat {there}")
    by_others = box.sh(f"setpriv --reuid nobody --clear-groups cat {there}", check=False).returncode

    assert read == "s3cret" and by_others != 0
    assert "s3cret" not in box.out(f"systemctl show trigger-daemon; tr '\\0' ' ' < /proc/{pid}/environ")


@pytest.mark.serial
def test_a_full_disk_at_the_start_is_waited_for(service, wait_until):
    """A daemon that is started on a full disk says so in its status, and goes on when there is room."""
    box = service.box
    box.sh("systemctl stop trigger-daemon; mount -t tmpfs -o size=8m full /var/lib/trigger-daemon")
    box.sh("dd if=/dev/zero of=/var/lib/trigger-daemon/filled bs=64k status=none || :")
    box.sh("systemctl start --no-block trigger-daemon")
    wait_until(lambda: "no room" in service.state()["StatusText"], 30, what="the status")
    state, said = service.state()["ActiveState"], box.sh("trigger-daemon status", check=False).stdout
    box.sh("rm /var/lib/trigger-daemon/filled")
    wait_until(lambda: service.state()["ActiveState"] == "active", 30, what="the start")

    assert state == "activating" and "is full" in said and service.state()["NRestarts"] == "0"
    box.sh("systemctl stop trigger-daemon; umount /var/lib/trigger-daemon; systemctl start trigger-daemon")


@pytest.mark.serial
def test_a_state_directory_that_cannot_be_written_is_told_as_that(service):
    """Read-only, or not its own: the status names which, and what to do, and does not blame the disk."""
    box = service.box
    box.sh("install -d -o trigger-daemon -g trigger-daemon -m 2770 /srv/state")
    service.drop_in("elsewhere", "Environment=TRIGGER_DAEMON_STATE_DIR=/srv/state")
    box.sh("systemctl restart trigger-daemon", check=False)
    shut = service.state()["StatusText"]
    box.sh("rm /etc/systemd/system/trigger-daemon.service.d/elsewhere.conf; systemctl daemon-reload")
    box.sh("systemctl stop trigger-daemon; cd /var/lib/trigger-daemon; chown root: journal.db; chmod 600 journal.db")
    box.sh("systemctl start trigger-daemon", check=False)
    foreign = service.state()["StatusText"]
    box.sh("cd /var/lib/trigger-daemon; chown trigger-daemon: journal.db; chmod 660 journal.db")
    box.sh("systemctl restart trigger-daemon")

    assert "/srv/state is read-only" in shut and "ReadWritePaths=/srv/state" in shut
    assert "journal.db cannot be written by trigger-daemon, it is root's" in foreign and "chown -R" in foreign


@pytest.mark.serial
def test_what_root_recovers_is_the_daemons(service, wait_until):
    """`journal recover`, as its page has it: what root makes belongs to the daemon's user, and the service goes on."""
    box = service.box
    box.sh("systemctl stop trigger-daemon; cp -a /var/lib/trigger-daemon /srv/backup")
    try:
        box.sh("head -c 16 /dev/zero | dd of=/var/lib/trigger-daemon/journal.db conv=notrunc status=none")
        failed = box.sh("systemctl start trigger-daemon", check=False).returncode
        box.sh("trigger-daemon journal recover")
        foreign = box.out("find /var/lib/trigger-daemon ! -user trigger-daemon ! -path '*/journal.damaged-*/*'")
        box.sh("systemctl start trigger-daemon; trigger-daemon resume")
        state = service.state()["ActiveState"]
    finally:  # the other scenes go on with the journal that was
        box.sh("systemctl stop trigger-daemon; rm -r /var/lib/trigger-daemon; mv /srv/backup /var/lib/trigger-daemon")
        box.sh("systemctl reset-failed trigger-daemon; systemctl start trigger-daemon")

    assert (bool(failed), foreign, state) == (True, "", "active")


@pytest.mark.serial
def test_a_fault_in_the_settings_ends_the_service_and_says_so(service):
    """What only a person can mend is not tried for ever: the unit has failed, and its log has the line and a hint."""
    service.box.write("/etc/trigger-daemon/config.yaml", "trottle: {runs: 2}\n")
    failed = service.box.sh("systemctl restart trigger-daemon", check=False).returncode
    state = service.state()["ActiveState"]
    service.box.write("/etc/trigger-daemon/config.yaml", "throttle: {runs: 2}\n")
    service.box.sh("systemctl restart trigger-daemon")

    assert (bool(failed), state) == (True, "failed")
    assert "config.yaml:1:1" in service.box.out("journalctl -u trigger-daemon -o cat --no-pager")


@pytest.mark.serial
def test_an_upgrade_keeps_settings_and_journal(service, package, wait_until):
    """A newer package replaces the program; edited settings stay as they are, and nothing is sent again."""
    box = service.box
    root = box.newer / "root"
    shutil.copytree(REPOSITORY / "build/deb", root, symlinks=True)
    (root / "etc/trigger-daemon/config.yaml").write_text("# of the newer package\n")
    build = [REPOSITORY / ".venv/bin/python", PACKAGING / "deb/build.py", "--root", root, "--target", box.newer]
    assert run(*build, "--version", f"{trigger_daemon.__version__}+1", timeout=100).returncode == 0
    (newer,) = box.newer.glob("*.deb")
    before, pid = service.batches("first"), service.state()["MainPID"]
    box.sh(f"dpkg --force-confdef -i /media/{newer.name}")
    service.put("/srv/first/in/d.tif")
    wait_until(lambda: service.arrived("first", "d.tif"), 30, what="a file after the upgrade")

    assert box.out("dpkg-query -W -f '${Version}' trigger-daemon") == f"{trigger_daemon.__version__}+1"
    assert box.out("cat /etc/trigger-daemon/config.yaml") == "throttle: {runs: 2}"
    assert before == [1, 1, 1] and service.batches("first") == [*before, 1]
    assert service.state()["MainPID"] != pid and service.state()["ActiveState"] == "active"


@pytest.mark.serial
def test_what_is_disabled_stays_so(service):
    """An upgrade neither enables nor starts a service that its administrator has disabled."""
    service.box.sh("systemctl disable --now trigger-daemon; /var/lib/dpkg/info/trigger-daemon.postinst configure 0.0.1")
    left = service.box.sh("systemctl is-enabled trigger-daemon", check=False).stdout, service.state()["ActiveState"]
    service.box.sh("systemctl enable --now trigger-daemon")

    assert left == ("disabled\n", "inactive")


@pytest.mark.serial
def test_removed_it_stops_and_keeps_what_is_known(service):
    """Removal stops the service and keeps settings and journal; purging takes the settings, and never the journal."""
    box = service.box
    box.sh("dpkg --remove trigger-daemon")
    stopped = box.sh("systemctl is-active trigger-daemon", check=False).stdout.strip()
    kept = box.out("cd /etc/trigger-daemon; ls config.yaml rules/first.yaml /var/lib/trigger-daemon/journal.db")
    gone = box.sh("ls /opt/trigger-daemon /usr/bin/trigger-daemon", check=False).stdout
    purged = box.sh("dpkg --purge trigger-daemon")

    assert (stopped, kept.count("\n"), gone) == ("inactive", 2, "")
    assert box.out("ls -A /etc/trigger-daemon/rules; ls /etc/trigger-daemon") == "first.yaml\nrules"
    assert box.out("ls /var/lib/trigger-daemon/journal.db") and "is kept" in purged.stderr + purged.stdout
    assert box.sh("systemctl cat trigger-daemon", check=False).returncode != 0
