import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")


def ended(program: str) -> int:
    return subprocess.run([sys.executable, "-c", program], timeout=60).returncode


def test_a_process_whose_parent_was_gone_already_ends_at_once() -> None:
    assert ended("from hamerspace._processes import end_with_parent; end_with_parent(2**22 + 1)") == 1


def test_a_process_whose_parent_is_there_goes_on() -> None:
    program = "import os; from hamerspace._processes import end_with_parent; end_with_parent(os.getppid())"
    assert ended(program) == 0


def test_a_process_ends_with_its_parent() -> None:
    child = (
        "import sys, time; from hamerspace._processes import end_with_parent\n"
        "end_with_parent(int(sys.argv[1])); print('ready', flush=True); time.sleep(600)"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"command = [sys.executable, '-c', {child!r}, str(os.getpid())]\n"
        "said = subprocess.Popen(command, stdout=subprocess.PIPE).stdout.readline()\n"
        "os._exit(said != b'ready\\n')"
    )
    # The child holds the pipe of standard error, which is at its end once both are gone.
    subprocess.run([sys.executable, "-c", parent], stderr=subprocess.PIPE, check=True, timeout=60)
