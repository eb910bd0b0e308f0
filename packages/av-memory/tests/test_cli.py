"""The command, run as users run it: real processes, real signals, real limits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from av_memory.cli import main
from av_memory.recording import Recording, ScopeRecord, Series, Usage

pytestmark = pytest.mark.skipif(os.name != "posix", reason="av-memory run needs a POSIX system")

FILL = "b = bytearray({mb} * 2**20); b[::4096] = b'x' * len(b[::4096])\n"
AV_MEMORY = [sys.executable, "-m", "av_memory"]


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*AV_MEMORY, "run", *map(str, arguments)]
    return subprocess.run(command, **{"capture_output": True, "text": True, "timeout": 60, **options})


def python(code: str) -> list[str]:
    # Isolated and without site-packages: a small and quick interpreter.
    return [sys.executable, "-I", "-S", "-c", code]


def recorded(path: Path, code: str, *options: object) -> tuple[Recording, subprocess.CompletedProcess[str]]:
    done = run("--json", path, *options, "--", *python(code))
    return Recording.load(path), done


def peak(recording: Recording, name: str) -> float:
    return max(max(one.values_mb) for one in recording.series if one.name == name)


def own_size_mb() -> float:
    """What an interpreter without the allocation takes, by psutil."""
    with subprocess.Popen(python("print(flush=True); input()"), stdin=-1, stdout=-1) as child:
        assert child.stdout is not None
        child.stdout.readline()
        size = psutil.Process(child.pid).memory_info().rss
        child.communicate(b"\n")
    return size / 2**20


def test_the_peak_of_300_mb_is_within_2_percent(tmp_path: Path) -> None:
    recording, done = recorded(tmp_path / "r.json", FILL.format(mb=300) + "import time; time.sleep(1.5)")
    assert done.returncode == 0
    expected = 300 + own_size_mb()
    assert peak(recording, "tree rss") == pytest.approx(expected, rel=0.02)
    assert peak(recording, "tree pss") == pytest.approx(expected, rel=0.03)
    assert [process.name.startswith("python") for process in recording.processes] == [True]
    said = re.search(r"peak RSS (\d+) MB", done.stderr)
    assert said is not None
    assert int(said[1]) == pytest.approx(expected, rel=0.02)


def test_forked_children_are_seen_one_by_one(tmp_path: Path) -> None:
    code = f"""
import os, time
for _ in range(3):
    if os.fork() == 0:
        {FILL.format(mb=50).strip()}
        time.sleep(0.6)
        os._exit(0)
for _ in range(3): os.wait()
"""
    recording, _ = recorded(tmp_path / "r.json", code)
    sizes = sorted(process.peak_rss_mb for process in recording.processes)
    assert len(sizes) == 4
    assert all(50 < size < 80 for size in sizes[1:])
    assert peak(recording, "tree rss") > 3 * 50
    assert peak(recording, "tree pss") < peak(recording, "tree rss"), "they share the interpreter's pages"
    assert len([one for one in recording.series if re.match(r"\d+ ", one.name)]) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans over")
def test_a_double_forked_orphan_stays_in_sight(tmp_path: Path) -> None:
    code = f"""
import os, time
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid()
        {FILL.format(mb=90).strip()}
        time.sleep(0.6)
        os._exit(0)
    os._exit(0)
os.wait()
time.sleep(0.8)
"""
    recording, _ = recorded(tmp_path / "r.json", code)
    assert peak(recording, "tree rss") > 90
    assert max(process.peak_rss_mb for process in recording.processes) > 90


def test_a_child_that_dies_at_once() -> None:
    done = run("--", "true")
    assert done.returncode == 0
    assert "exit code 0" in done.stderr


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL),
        (["sh", "-c", "kill -SEGV $$"], 128 + signal.SIGSEGV),
        (["/nonexistent/program"], 127),
        (["no-such-program-anywhere"], 127),
        (["/"], 126),
        ([""], 127),
        ([__file__], 126),
    ],
)
def test_exit_codes(command: list[str], code: int) -> None:
    assert run("--", *command).returncode == code


def test_more_processes_than_descriptors(tmp_path: Path) -> None:
    script = "for i in $(seq 90); do sleep 1 & done; wait; exit 3"
    command = [*AV_MEMORY, "run", "--json", str(tmp_path / "r.json"), "--", "sh", "-c", script]
    limited = ["sh", "-c", 'ulimit -n 40; exec "$@"', "sh", *command]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert "cannot" not in done.stderr
    sleeps = [one for one in Recording.load(tmp_path / "r.json").processes if one.name == "sleep"]
    assert len(sleeps) > 80


def test_input_output_and_arguments_pass_through() -> None:
    code = "import sys; print(sys.stdin.read().upper(), sys.argv[1:]); print('e', file=sys.stderr)"
    done = run("--quiet", *python(code), "--html", "--", "x", input="hello")
    assert done.stdout == "HELLO ['--html', '--', 'x']\n"
    assert done.stderr == "e\n"


def test_the_command_starts_with_clean_signals_in_the_same_group() -> None:
    code = (
        "import os, signal; print(signal.pthread_sigmask(0, []), os.getpgid(0),"
        " *(signal.getsignal(n).name for n in (signal.SIGTERM, signal.SIGCHLD)))"
    )
    done = run("--quiet", "--", *python(code))
    assert done.stdout.split() == ["set()", str(os.getpgid(0)), "SIG_DFL", "SIG_DFL"]
    # An interpreter ignores SIGPIPE for itself; what av-memory starts must not inherit that.
    assert run("--quiet", "--", "sh", "-c", "kill -PIPE $$").returncode == 128 + signal.SIGPIPE


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [*AV_MEMORY, "run", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_command_and_the_report_is_written(
    tmp_path: Path, number: signal.Signals
) -> None:
    code = """
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda n, frame: sys.exit(40 + n))
print('ready', flush=True)
time.sleep(30)
"""
    process = start("--html", tmp_path / "p.html", "--", *python(code))
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 40 + number
    assert "</html>" in (tmp_path / "p.html").read_text()
    assert f"exit code {40 + number}" in errors


def test_a_signal_that_kills_the_command_gives_its_code(tmp_path: Path) -> None:
    process = start(
        "--json",
        tmp_path / "r.json",
        "--",
        *python("import time; print('ready', flush=True); time.sleep(30)"),
    )
    (child,) = psutil.Process(process.pid).children()
    child.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert process.returncode == 137
    assert Recording.load(tmp_path / "r.json").exit_code == 137


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where a signal comes from")
def test_ctrl_c_is_not_passed_on_as_the_terminal_has_sent_it_to_the_command_too() -> None:
    import pty

    code = """
import fcntl, termios, time
from av_memory._signals import Signals
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with Signals() as signals:
    for _ in range(2):
        print('ready', flush=True)
        began = time.monotonic()
        print(signals.wait(20), time.monotonic() - began < 15, flush=True)
"""
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=terminal,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.write(keyboard, b"\x03")
    assert process.stdout.readline() == "None True\n"
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == f"{signal.SIGINT!s} True\n"
    process.communicate(timeout=20)
    os.close(keyboard)
    os.close(terminal)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_limit_ends_even_what_ignores_sigterm(tmp_path: Path) -> None:
    code = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
print(os.getpid(), flush=True)
if child == 0:
    time.sleep(0.2)
    {FILL.format(mb=200).strip()}
time.sleep(60)
"""
    began = time.monotonic()
    recording, done = recorded(tmp_path / "r.json", code, "--limit", 120)
    assert done.returncode == 125
    assert time.monotonic() - began >= 5, "SIGTERM has five seconds to work"
    assert "passed the limit of 120 MB" in done.stderr
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)
    assert recording.exit_code == 125
    assert recording.limits["limit_mb"] == 120


def test_the_limit_lets_a_command_end_itself(tmp_path: Path) -> None:
    code = f"""
import pathlib, signal, sys, time
def tidy(*_):
    pathlib.Path({str(tmp_path / "tidied")!r}).write_text("yes"); sys.exit(3)
signal.signal(signal.SIGTERM, tidy)
{FILL.format(mb=200)}
time.sleep(60)
"""
    assert run("--limit", 100, "--quiet", "--", *python(code)).returncode == 125
    assert (tmp_path / "tidied").read_text() == "yes"


def test_a_command_below_its_limit_is_left_alone() -> None:
    assert run("--limit", 400, "--", *python(FILL.format(mb=100))).returncode == 0


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel tells no PSS")
def test_shared_pages_do_not_count_against_the_limit_again_and_again() -> None:
    # Five processes that share 80 MB: 400 MB and more of RSS, about 100 MB of PSS.
    code = f"""
{FILL.format(mb=80)}
import os, time
for _ in range(4):
    if os.fork() == 0: time.sleep(0.7); os._exit(0)
for _ in range(4): os.wait()
"""
    done = run("--limit", 250, "--", *python(code))
    assert done.returncode == 0, done.stderr
    said = re.search(r"peak RSS (\d+) MB", done.stderr)
    assert said is not None
    assert int(said[1]) > 350


@pytest.mark.parametrize("limit", ["-1", "0", "nan", "inf", "many", ""])
def test_a_wrong_limit_is_misuse(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", f"--limit={limit}", "true"])
    assert stop.value.code == 2
    assert "not a positive number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["run"], ["run", "--"], ["run", "--interval-ms", "0", "true"], ["walk"], ["report"]]
)
def test_misuse(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_outputs_are_tried_before_the_command_starts(tmp_path: Path) -> None:
    witness, loop = tmp_path / "ran", tmp_path / "loop"
    loop.symlink_to(loop)
    for options in (
        ["--html", tmp_path / "missing" / "p.html"],
        ["--json", tmp_path],
        ["--trace", "/dev/null"],
        ["--html", tmp_path / "same", "--json", tmp_path / "same"],
        ["--html", tmp_path / ("n" * 300)],
        ["--html", loop],
    ):
        done = run(*options, "--", "touch", witness)
        assert done.returncode == 2, done.stderr
        assert options[0] in done.stderr or str(options[1]) in done.stderr
        assert "Traceback" not in done.stderr
    assert not witness.exists()
    assert list(tmp_path.iterdir()) == [loop]


@pytest.mark.parametrize("option", ["--json", "--html", "--trace"])
def test_the_command_may_leave_no_working_directory(tmp_path: Path, option: str) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    done = run(option, "out", "--", "sh", "-c", f"rmdir {folder}; exit 7", cwd=folder)
    assert done.returncode == 7
    assert "cannot write out: No such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_standard_error_the_output_is_the_commands_alone() -> None:
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *AV_MEMORY, "run", "--", "echo", "mine"]
    assert subprocess.run(command, stdout=-1, text=True, timeout=60).stdout == "mine\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_full_standard_error_costs_no_exit_code() -> None:
    with Path("/dev/full").open("w") as full:
        command = [*AV_MEMORY, "run", "--", "sh", "-c", "exit 7"]
        assert subprocess.run(command, stderr=full, timeout=60).returncode == 7


def test_a_report_that_cannot_be_written_costs_a_message_and_not_the_exit_code(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    # The folder is gone when the command has ended.
    done = run("--json", folder / "r.json", "--", "sh", "-c", f"rmdir {folder}; exit 7")
    assert done.returncode == 7
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit makes a small disk")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    command = [
        "prlimit",
        "--fsize=2000",
        *AV_MEMORY,
        "run",
        "--html",
        str(tmp_path / "p.html"),
        "--",
        "sleep",
        "0.1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_all_outputs_hold_the_same_run(tmp_path: Path) -> None:
    html, json_file, trace = (tmp_path / name for name in ("p.html", "r.json", "t.json"))
    done = run("--html", html, "--json", json_file, "--trace", trace, "--quiet", "--", "sleep", "0.3")
    assert (done.returncode, done.stderr) == (0, "")
    recording = Recording.load(json_file)
    assert recording.command == ["sleep", "0.3"]
    assert 0.3 <= recording.wall_s < 5
    assert "<title>sleep 0.3</title>" in html.read_text()
    counters = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "C"]
    assert len(counters) == sum(len(one.times_s) for one in recording.series) > 20


def test_a_process_that_outlives_the_command_is_told_of() -> None:
    done = run("--", "sh", "-c", "sleep 5 >/dev/null 2>&1 & echo $!; sleep 0.3")
    pid = int(done.stdout)
    try:
        assert "1 of them still running" in done.stderr
        assert alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    scopes = [ScopeRecord("load\x1b[2J", "MainThread", 0, 0, 1.5, Usage(10, 60, 90, True))]
    path = tmp_path / "memory.json"
    Recording(1.7e9, 2.0, [Series("cpu", [0, 1, 2], [10, 88, 60])], scopes).to_json(path)
    return path


def test_report_writes_the_page_beside_the_recording(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = saved.with_name("t.json")
    assert main(["report", str(saved), "--trace", str(trace)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"load\\x1b\[2J +1 +1\.50 s +90\.0 MB +50\.0 MB +exact", printed)
    assert "\x1b" not in printed, "a name does not steer the terminal"
    assert "<h2>Scopes</h2>" in saved.with_suffix(".html").read_text()
    assert "traceEvents" in json.loads(trace.read_text())


def test_report_refuses_bad_files(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.json"
    for content in ("", "{}", saved.read_text()[:-20], '{"format": "av-memory-recording", "version": 99}'):
        bad.write_text(content)
        assert main(["report", str(bad)]) == 2
        assert "bad.json" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none.json")]) == 2
    assert "none.json: No such file" in capsys.readouterr().err
    assert main(["report", str(saved), "--html", str(tmp_path / "no" / "p.html")]) == 2
    with pytest.raises(SystemExit):
        main(["report", str(saved), "--html", str(saved)])
    assert Recording.load(saved).scopes, "the recording was not overwritten"


def test_names_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;title\x07\u202e"
    bad = tmp_path / f"{evil}.json"
    assert main(["report", str(bad)]) == 2
    scope = {"name": "s", "surprise\x1b[2J": 1, "cpu": {}, "gpus": {}, "tree": None}
    bad.write_text(json.dumps({**Recording(1, 1, [], []).to_dict(), "scopes": [scope]}))
    assert main(["report", str(bad)]) == 2
    for words in (["report", str(bad), evil], ["run", "--html", f"/{evil}/p", "true"], [evil]):
        with pytest.raises(SystemExit):
            main(words)
    Recording(1, 1, [], [], command=[evil]).to_json(bad)
    assert main(["report", str(bad)]) == 0
    printed = "".join(capsys.readouterr())
    assert "\\x1b]0;title" in printed
    assert not set(printed) & {"\x1b", "\x07", "\u202e"}


def test_report_overwrites_neither_its_source_nor_its_other_output(saved: Path, tmp_path: Path) -> None:
    before = saved.read_bytes()
    (tmp_path / "link").symlink_to(saved)
    (tmp_path / "hard").hardlink_to(saved)
    page = str(tmp_path / "page")
    for options in (
        ["--trace", str(saved)],
        ["--trace", str(tmp_path / "link")],
        ["--html", str(tmp_path / "hard")],
        ["--html", page, "--trace", str(tmp_path / "x" / ".." / "page")],
        ["--trace", str(saved.with_suffix(".html"))],
    ):
        with pytest.raises(SystemExit) as stop:
            main(["report", str(saved), *options])
        assert stop.value.code == 2
    assert saved.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {saved.name, "link", "hard"}


def test_report_takes_regular_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, loop = tmp_path / "pipe", tmp_path / "loop"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for source in (".", "/", "", str(pipe), str(loop), "/dev/zero", str(tmp_path), "n" * 300):
        assert main(["report", source]) == 2
        assert "cannot read" in capsys.readouterr().err


def test_report_writes_the_page_whatever_becomes_of_its_output(saved: Path) -> None:
    page = saved.with_suffix(".html")
    for where, code, said in (
        ("| true", 0, ""),
        ("> /dev/full", 2, "cannot print: No space"),
        (">&-", 0, ""),
    ):
        command = ["bash", "-c", f'set -o pipefail; "$@" {where}', "sh", *AV_MEMORY, "report", str(saved)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        assert said in done.stderr
        assert said or not done.stderr
        page.unlink()


def test_report_prints_where_only_ascii_can_be(saved: Path) -> None:
    scope = ScopeRecord("grün", "MainThread", 0, 0, 1e-5, Usage(10, 60, 90))
    Recording(1.7e9, 2.0, [], [scope]).to_json(saved)
    command = [*AV_MEMORY, "report", str(saved)]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, timeout=60, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert b"gr\\xfcn" in done.stdout
    assert b"10 \\xb5s" in done.stdout


def test_help_teaches_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from av_memory.cli import main\n"
        "try: main(['run', '--help'])\n"
        "finally: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    for word in ("examples:", "--limit MB", "125", "SIGTERM"):
        assert word in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"torch", "numpy", "psutil", "asyncio", "av_memory._watch", "av_memory.report._page"}
