import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from av_memory import probes
from av_memory.probes import MemoryProbeError, ProcessTree, RssProbe, cgroup_memory, machine_memory

MB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
HOLD = "b = bytearray({mb} * 2**20); b[::4096] = b'x' * len(b[::4096]); print('ready', flush=True); input()"


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def run(code: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        return child

    yield run
    for child in started:
        if child.poll() is None:
            for descendant in psutil.Process(child.pid).children(recursive=True):
                descendant.kill()
        child.kill()
        child.communicate()


def test_rss_of_another_process_agrees_with_psutil(start: Callable[[str], subprocess.Popen[bytes]]) -> None:
    child = start(HOLD.format(mb=80))
    ours, theirs = RssProbe(child.pid).read(), psutil.Process(child.pid).memory_info().rss
    assert ours > 80 * MB
    assert abs(ours - theirs) < MB


def test_a_probe_of_a_dead_process_says_so(start: Callable[[str], subprocess.Popen[bytes]]) -> None:
    child = start("print('ready', flush=True); input()")
    probe = RssProbe(child.pid)
    child.kill()
    child.wait()
    with pytest.raises(ProcessLookupError):
        probe.read()


def test_there_is_no_probe_for_a_number_without_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(ProcessLookupError):
        RssProbe(child.pid)


FORKING = """
import os, signal
b = bytearray(20 * 2**20); b[::4096] = b'x' * len(b[::4096])
for _ in range(2):
    if os.fork() == 0:
        c = bytearray(30 * 2**20); c[::4096] = b'x' * len(c[::4096])
        os.write(1, b'ready\\n'); signal.pause()
signal.pause()
"""


def test_a_tree_agrees_with_psutil(start: Callable[[str], subprocess.Popen[bytes]]) -> None:
    child = start(FORKING)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    tree = ProcessTree(child.pid)
    root = psutil.Process(child.pid)
    family = [root, *root.children(recursive=True)]
    assert sorted(tree.live_pids) == sorted(process.pid for process in family)
    expected = sum(process.memory_info().rss for process in family)
    assert abs(tree.rss_bytes() - expected) < 2 * MB
    pss = tree.pss_bytes()
    if pss is not None:
        assert abs(pss - sum(process.memory_full_info().pss for process in family)) < 2 * MB
        assert pss < tree.rss_bytes() - 15 * MB, "20 MB that three processes share count once"

    dying = family[1].pid
    os.kill(dying, signal.SIGKILL)
    while family[1].status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    tree.rss_bytes()
    assert dying not in tree.live_pids
    found = len(tree.members)
    tree.refresh()
    assert len(tree.members) == found == 3, "a zombie is not found anew"
    gone = next(member for member in tree.members if member.pid == dying)
    assert gone.ended
    assert gone.peak_rss_bytes > 30 * MB


@linux
def test_the_root_can_be_left_out_and_exec_changes_the_name(
    start: Callable[[str], subprocess.Popen[bytes]],
) -> None:
    child = start("import os; print('ready', flush=True); input(); os.execvp('sleep', ['sleep', '60'])")
    tree = ProcessTree(os.getpid(), include_root=False)
    assert os.getpid() not in tree.live_pids
    assert child.pid in tree.live_pids
    member = next(one for one in tree.members if one.pid == child.pid)
    assert member.name.startswith("python")
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.flush()
    deadline = time.monotonic() + 10
    while member.name != "sleep" and time.monotonic() < deadline:
        time.sleep(0.02)
        tree.refresh()
    assert member.name == "sleep"
    assert tree.rss_bytes() > 0, "the kept descriptor follows the process through exec"
    tree.close()


@linux
def test_a_probe_gets_over_the_loss_of_its_descriptor(
    run_fresh: Callable[..., str], start: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    child = start(HOLD.format(mb=40))
    ours = tmp_path / "users"
    ours.write_text("100000000 99999999 3 4 5 6 7 8\\n" * 10)
    code = f"""
import os, psutil
from av_memory.probes import ProcessTree, RssProbe
def right(probe, pid):
    return abs(probe.read() - psutil.Process(pid).memory_info().rss) < 4 * 2**20
for reuse in (False, True):
    own, others = RssProbe(), [RssProbe({child.pid}) for _ in range(3)]
    os.closerange(3, 200)
    files = [open({str(ours)!r}) for _ in range(6)] if reuse else []
    # In this order each probe that is opened again takes a number that another one still holds.
    for probe, pid in [*((other, {child.pid}) for other in reversed(others)), (own, os.getpid())] * 2:
        assert right(probe, pid), (reuse, pid)
    del own, others, probe
    assert all(os.fstat(file.fileno()).st_size for file in files)
    if os.fork() == 0:
        os._exit(sum(file.read() != files[0].read() for file in files[1:2]))
    assert os.wait()[1] == 0
"""
    run_fresh(code)


@linux
def test_what_took_a_lost_number_over_stays_open() -> None:
    with Path(__file__).open() as file:
        probe = RssProbe()
        taken = os.open("/proc/self/statm", os.O_RDONLY)
        os.close(taken)
        # The next free number was the probe's before: close that, and let a file take it.
        os.close(taken - 1)
        assert os.dup(file.fileno()) == taken - 1, "the probe did not have the last number"
        assert abs(probe.read() - psutil.Process().memory_info().rss) < 4 * MB
        probe.close()
        assert os.fstat(taken - 1).st_size == Path(__file__).stat().st_size
        os.close(taken - 1)


@linux
def test_a_tree_leaves_descriptors_to_the_program(run_fresh: Callable[..., str]) -> None:
    code = """
import errno, os, resource, signal, subprocess
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
children = [subprocess.Popen(["sleep", "60"]) for _ in range(40)]
try:
    before = len(os.listdir("/proc/self/fd"))
    from av_memory.probes import ProcessTree
    tree = ProcessTree()
    assert len(tree.live_pids) == 41
    assert len(os.listdir("/proc/self/fd")) <= before + 64 // 8
    whole = tree.rss_bytes()
    held = []
    try:
        while True: held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError as error:
        assert error.errno == errno.EMFILE
    tree.refresh()
    assert len(tree.live_pids) == 41
    assert tree.rss_bytes() > 0.9 * whole
    for number in held: os.close(number)
    children[-1].kill(); children[-1].wait()
    tree.rss_bytes()
    assert len(tree.live_pids) == 40, "one that has no descriptor of its own is seen to end"
finally:
    for child in children: child.kill()
    for child in children: child.wait()
"""
    run_fresh(code)


@linux
def test_a_number_given_out_again_is_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def live(name: bytes, started: int) -> None:
        fields = [b"S", *[b"1"] * 18, str(started).encode(), b"9", b"300", b"0"]
        (tmp_path / "77" / "stat").write_bytes(b"77 (" + name + b") " + b" ".join(fields))

    (tmp_path / "77").mkdir()
    live(b"a) S (b", 5000)
    monkeypatch.setattr(probes, "_PROC", str(tmp_path))
    probe = RssProbe(77, keep_open=False)
    assert probe.read() == 300 * os.sysconf("SC_PAGE_SIZE")
    live(b"another", 6000)
    with pytest.raises(ProcessLookupError):
        probe.read()


def test_machine_memory_is_psutils() -> None:
    assert machine_memory().total_bytes == psutil.virtual_memory().total


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, str]], None]:
    def make(membership: str, files: dict[str, str]) -> None:
        monkeypatch.setattr(probes, "_PROC", str(tmp_path / "proc"))
        monkeypatch.setattr(probes, "_CGROUP_ROOT", tmp_path / "cgroup")
        files = {"proc/self/cgroup": membership, **{f"cgroup/{name}": text for name, text in files.items()}}
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return make


def test_cgroup_v2_takes_the_tightest_level(made_up: Callable[[str, dict[str, str]], None]) -> None:
    files = {
        "a/memory.max": "3000\n",
        "a/memory.current": "30\n",
        "a/b/memory.max": "2000\n",
        "a/b/memory.current": "20\n",
        "a/b/c/memory.max": "max\n",
        "a/b/c/memory.current": "10\n",
    }
    made_up("0::/a/b/c\n", files)
    assert cgroup_memory() == probes.CgroupMemory(2000, 20)


def test_cgroup_v1_with_and_without_limit(made_up: Callable[[str, dict[str, str]], None]) -> None:
    membership = "12:cpu,cpuacct:/x\n4:memory:/job\n0::/\n"
    made_up(membership, {"memory/job/memory.limit_in_bytes": "9223372036854771712\n"})
    assert cgroup_memory() == probes.CgroupMemory(None, None)
    made_up(
        membership,
        {"memory/job/memory.limit_in_bytes": "500\n", "memory/job/memory.usage_in_bytes": "400\n"},
    )
    assert cgroup_memory() == probes.CgroupMemory(500, 400)


def test_without_cgroups_there_is_no_limit(made_up: Callable[[str, dict[str, str]], None]) -> None:
    made_up("", {})
    assert cgroup_memory() == probes.CgroupMemory(None, None)


def test_without_proc_psutil_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probes, "_PROC", str(tmp_path))
    probe = RssProbe()
    assert not probe.reads_proc
    assert abs(probe.read() - psutil.Process().memory_info().rss) < 4 * MB
    tree = ProcessTree()
    assert tree.live_pids[0] == os.getpid()
    assert tree.pss_bytes() is None
    assert probes.high_water_bytes() is None
    assert not probes.reset_high_water()


@linux
def test_in_a_system_without_proc_the_error_says_what_was_tried() -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare to hide /proc")
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from av_memory.probes import *\n"
        "import os, psutil\n"
        "assert not os.path.exists('/proc/self')\n"
        "try: RssProbe()\n"
        "except MemoryProbeError as error: print(error)\n"
    )
    # The paths are handed over because an interpreter cannot always find its own without /proc.
    command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    done = subprocess.run(
        [*command, sys.executable, "-c", code, *sys.path], capture_output=True, text=True, timeout=60
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"cannot hide /proc here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "statm" in done.stdout
    assert "through psutil" in done.stdout
    assert "enable_memory_tracking(False)" in done.stdout


def test_the_probe_error_is_not_an_os_error() -> None:
    assert not issubclass(MemoryProbeError, OSError)
