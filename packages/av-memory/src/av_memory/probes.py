"""Readings of memory: this process, a tree of processes, the cgroup, the machine, and GPUs.

Everything here is in bytes. On Linux the files under ``/proc`` are read directly, because one reading
costs a microsecond that way and tens of microseconds through a general library; elsewhere psutil is used.

Accuracy on Linux: the kernel keeps resident-set counters per processor and folds them together in
batches, so one reading of ``statm`` can be off by some hundred kB on a machine with few cores
(``Documentation/filesystems/proc.rst``); ``smaps_rollup`` is exact and thousands of times slower.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from weakref import WeakValueDictionary

__all__ = [
    "CgroupMemory",
    "GpuMemory",
    "MachineMemory",
    "MemoryProbeError",
    "ProcessTree",
    "RssProbe",
    "TreeMember",
    "cgroup_memory",
    "gpu_memory",
    "high_water_bytes",
    "lifetime_peak_bytes",
    "machine_memory",
    "reset_high_water",
]

try:
    import resource
except ImportError:  # Windows
    resource = None

_PROC = "/proc"
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_MAXRSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_NO_DESCRIPTOR_LEFT = (errno.EMFILE, errno.ENFILE)


class MemoryProbeError(RuntimeError):
    """A memory reading cannot be had on this system; the message says what was tried."""


class RssProbe:
    """Resident set size of one process, read again and again at little cost.

    Args:
        pid: the process; ``None`` means the calling one. On Linux the probe stays bound to the process
            that had this number when it was made, so a number that the system gives out again is never
            mistaken for it.
        keep_open: hold one descriptor for as long as the probe lives. Without it each reading opens and
            closes a file, which costs tens of microseconds.

    Raises:
        MemoryProbeError: neither ``/proc`` nor psutil can read the process, or no descriptor is left.
        ProcessLookupError: there is no such process.
    """

    __slots__ = ("_statm", "read", "reads_proc")

    read: Callable[[], int]
    """Take one reading, in bytes.

    Raises ``ProcessLookupError`` once the process is gone, and :class:`MemoryProbeError` while it cannot be
    read, which may pass. A descriptor that was closed from outside (``os.closerange``) is replaced.
    """

    def __init__(self, pid: int | None = None, *, keep_open: bool = True) -> None:
        try:
            self._statm = _Statm(pid, keep_open)
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR_LEFT:
                raise MemoryProbeError(
                    f"cannot read the memory of process {pid or os.getpid()}: {error}"
                ) from error
            if (
                isinstance(error, FileNotFoundError | ProcessLookupError)
                and Path(_PROC, "self/statm").exists()
            ):
                raise ProcessLookupError(f"there is no process {pid}") from None
            self._statm = None
            self.read = self._psutil_reader(pid, error)
        else:
            self.read = self._statm.read
        self.reads_proc = self._statm is not None

    @staticmethod
    def _psutil_reader(pid: int | None, proc_error: OSError) -> Callable[[], int]:
        import psutil

        try:
            process = psutil.Process(pid)
            process.memory_info()
        except (psutil.Error, OSError, RuntimeError) as error:
            # Without /proc psutil takes every process of Linux for gone, this one too.
            blind = sys.platform == "linux" and not Path("/proc/self").exists()
            if isinstance(error, psutil.NoSuchProcess) and not blind:
                raise ProcessLookupError(f"there is no process {pid}") from None
            raise MemoryProbeError(
                f"cannot read the memory of process {pid or os.getpid()}: {proc_error}; "
                f"through psutil: {error}. "
                "Mount /proc, or turn tracking off with enable_memory_tracking(False)."
            ) from error

        def read() -> int:
            try:
                return int(process.memory_info().rss)
            except psutil.NoSuchProcess:
                raise ProcessLookupError("the process has ended") from None
            except (psutil.Error, OSError) as error:
                raise MemoryProbeError(
                    f"cannot read the memory of process {pid or os.getpid()}: {error}"
                ) from error

        return read

    def close(self) -> None:
        """Give the descriptor back; the probe must not be read after this."""
        if self._statm is not None:
            self._statm.close()


class _Statm:
    """The file ``statm`` of one process, or ``stat`` where no descriptor is kept."""

    __slots__ = ("_file", "_keeps", "_pid", "_started")

    def __init__(self, pid: int | None, keep_open: bool) -> None:
        self._pid = pid
        self._keeps = keep_open
        self._started = None if pid is None else _start_and_rss(pid)[0]
        self._file = _Descriptor(f"{_PROC}/{pid or 'self'}/statm") if keep_open else None

    def read(self) -> int:
        file = self._file
        if file is None:
            return self._read_once()
        try:
            fields = os.pread(file.number, 96, 0).split(b" ")
        except OSError:
            fields = []
        # The fifth and seventh have been 0 since Linux 2.6; so it is no file that took the number over.
        if len(fields) == 7 and fields[6] == b"0\n" and fields[4] == b"0" and fields[1] != b"0":
            return int(fields[1]) * _PAGE_BYTES
        return self._doubt(file, fields)

    def _doubt(self, file: _Descriptor, fields: list[bytes]) -> int:
        if file.is_ours():
            if len(fields) < 2:
                raise ProcessLookupError("the process has ended")
            return int(fields[1]) * _PAGE_BYTES
        rss = self._read_once()
        if self._keeps:
            with contextlib.suppress(OSError):  # none is left: until there is one, each reading opens its own
                self._file = _Descriptor(f"{_PROC}/{self._pid or 'self'}/statm")
        return rss

    def _read_once(self) -> int:
        try:
            started, rss = _start_and_rss(self._pid or "self")
        except (FileNotFoundError, ProcessLookupError):
            raise ProcessLookupError("the process has ended") from None
        except OSError as error:
            raise MemoryProbeError(
                f"cannot read the memory of process {self._pid or os.getpid()}: {error}"
            ) from error
        if self._started not in (None, started):
            raise ProcessLookupError("the process has ended, and another has its number")
        return rss

    def close(self) -> None:
        self._keeps = False
        if self._file is not None:
            self._file.close()


def _start_and_rss(process: int | str) -> tuple[int, int]:
    """When it started, in ticks since boot, and its resident set in bytes, in one reading."""
    number = os.open(f"{_PROC}/{process}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(number, 4096)
    finally:
        os.close(number)
    # The name in parentheses may hold spaces and parentheses itself.
    fields = text[text.rindex(b")") + 2 :].split(b" ")
    return int(fields[19]), int(fields[21]) * _PAGE_BYTES


class _Descriptor:
    """An open file, closed with its last user, unless somebody else has closed or taken its number."""

    __slots__ = ("__weakref__", "_identity", "number")

    def __init__(self, path: str) -> None:
        self.number = -1
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # The system gave this number out, so whoever is noted for it here has lost it.
        before = _noted.get(number)
        if before is not None:
            before.number = -1
        self._identity = _identity(number)
        self.number = number
        _noted[number] = self

    def is_ours(self) -> bool:
        try:
            return _identity(self.number) == self._identity
        except OSError:
            return False

    def close(self) -> None:
        if self.number >= 0 and self.is_ours():
            # Set first: a number that is closed here may be another file's a moment later.
            number, self.number = self.number, -1
            os.close(number)
        self.number = -1

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.close()


_noted: WeakValueDictionary[int, _Descriptor] = WeakValueDictionary()


def _identity(number: int) -> tuple[int, int]:
    status = os.fstat(number)
    return status.st_dev, status.st_ino


def high_water_bytes() -> int | None:
    """The kernel's high-water mark of the resident set since start or reset; ``None`` where there is none."""
    try:
        status = Path(_PROC, "self/status").read_bytes()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def lifetime_peak_bytes() -> int:
    """Largest resident set of this process since it started; 0 where the system does not tell.

    ``getrusage`` tells at little cost. But Linux hands its figure on through ``fork`` and ``exec``, so
    that a program begins with the size of the one that started it; until that is outgrown, the kernel's
    high-water mark is read, which costs more.
    """
    if resource is None:
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    maximum = resource.getrusage(0).ru_maxrss * _MAXRSS_UNIT_BYTES
    if maximum > _inherited_peak_bytes:
        return maximum
    return high_water_bytes() or maximum


def _inherited_peak() -> int:
    own = high_water_bytes()
    if resource is None or own is None:
        return 0
    maximum = resource.getrusage(0).ru_maxrss * _MAXRSS_UNIT_BYTES
    return maximum if maximum > 1.02 * own else 0


_inherited_peak_bytes = _inherited_peak()


def reset_high_water() -> bool:
    """Set the kernel's high-water mark to the present resident set (Linux).

    ``ru_maxrss`` of this process starts anew as well. Returns whether the kernel did it.
    """
    try:
        Path(_PROC, "self/clear_refs").write_bytes(b"5")
    except OSError:
        return False
    return True


@dataclass(slots=True)
class TreeMember:
    """One process of a tree."""

    pid: int
    name: str
    rss_bytes: int = 0
    """Last reading."""
    peak_rss_bytes: int = 0
    """Largest reading so far."""
    ended: bool = False


class ProcessTree:
    """A process and all its descendants, looked up again on :meth:`refresh`.

    Processes that end are dropped, and their peaks kept in :attr:`members`. A process that both starts
    and ends between two calls of :meth:`refresh` is not seen. At most 128 descriptors are kept, and no
    more than an eighth of those that this process may have.

    Args:
        root_pid: the process at the top; ``None`` means the calling one.
        include_root: whether that process counts too, or only what descends from it.
    """

    def __init__(self, root_pid: int | None = None, *, include_root: bool = True) -> None:
        self.root_pid = os.getpid() if root_pid is None else root_pid
        self.members: list[TreeMember] = []
        """Every process seen so far, in the order in which it was found."""
        self._include_root = include_root
        self._live: dict[int, tuple[RssProbe, TreeMember]] = {}
        self._most_kept = _most_descriptors()
        self.refresh()

    def refresh(self) -> None:
        """Look for processes that have started since, and for names that ``exec`` has changed."""
        root = [self.root_pid] if self._include_root else []
        for pid in [*root, *_descendants(self.root_pid)]:
            if pid in self._live:
                member = self._live[pid][1]
                member.name = _process_name(pid) or member.name
                continue
            try:
                probe = RssProbe(pid, keep_open=len(self._live) < self._most_kept)
                rss = probe.read()
            except (ProcessLookupError, MemoryProbeError):
                continue
            # One that has exited but was not waited for would be found anew each time.
            if rss == 0:
                probe.close()
                continue
            member = TreeMember(pid, _process_name(pid) or "?", rss, rss)
            self.members.append(member)
            self._live[pid] = (probe, member)

    @property
    def live_pids(self) -> list[int]:
        """Processes that answered last, the root first."""
        return list(self._live)

    @property
    def live_members(self) -> list[TreeMember]:
        """The same processes with their readings."""
        return [member for _, member in self._live.values()]

    def rss_bytes(self) -> int:
        """Sum of resident sets now. Pages that several processes share count once for each."""
        total = 0
        for pid, (probe, member) in list(self._live.items()):
            try:
                rss = probe.read()
            except ProcessLookupError:
                rss = 0
            except MemoryProbeError:
                rss = member.rss_bytes  # for want of a descriptor, say; it has not ended for that
            # A process that has exited but was not waited for keeps an entry that reads 0.
            if rss == 0:
                member.ended = True
                probe.close()
                del self._live[pid]
                continue
            member.rss_bytes = rss
            member.peak_rss_bytes = max(member.peak_rss_bytes, rss)
            total += rss
        return total

    def pss_bytes(self) -> int | None:
        """Sum of proportional set sizes, in which a shared page is divided among its users.

        Milliseconds a process. ``None`` where the kernel does not give it for every live process.
        """
        total = 0
        for pid in list(self._live):  # which another thread may change meanwhile
            try:
                text = Path(_PROC, str(pid), "smaps_rollup").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                if not Path(_PROC, "self/smaps_rollup").exists():
                    return None
                continue
            except OSError:
                return None
            for line in text.splitlines():
                if line.startswith(b"Pss:"):
                    total += int(line.split()[1]) * 1024
                    break
        return total

    def close(self) -> None:
        """Give the descriptors back."""
        for probe, _ in self._live.values():
            probe.close()
        self._live.clear()


def _most_descriptors() -> int:
    soft = -1 if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 128 if soft < 0 else min(128, soft // 8)


def _descendants(pid: int) -> Iterator[int]:
    if not os.path.exists(f"{_PROC}/self/task/{os.getpid()}/children"):  # noqa: PTH110 (called 20 times a second)
        import psutil

        with contextlib.suppress(psutil.Error, OSError):
            yield from (child.pid for child in psutil.Process(pid).children(recursive=True))
        return
    pending = [pid]
    while pending:
        task_folder = f"{_PROC}/{pending.pop()}/task"
        try:
            threads = os.listdir(task_folder)  # noqa: PTH208 (called 20 times a second)
        except OSError:
            continue
        for thread in threads:
            try:
                with open(f"{task_folder}/{thread}/children", "rb") as file:  # noqa: PTH123
                    children = [int(word) for word in file.read().split()]
            except OSError:
                continue
            yield from children
            pending.extend(children)


def _process_name(pid: int) -> str:
    """The name, empty where it cannot be had."""
    try:
        with open(f"{_PROC}/{pid}/comm", "rb") as file:  # noqa: PTH123
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """Memory of the whole machine, in bytes."""

    total_bytes: int
    available_bytes: int


def machine_memory() -> MachineMemory:
    """Read the machine's memory. Raises :class:`MemoryProbeError` where the system does not tell."""
    import psutil

    try:
        memory = psutil.virtual_memory()
    except (OSError, RuntimeError) as error:
        raise MemoryProbeError(f"cannot read the machine's memory: {error}") from error
    return MachineMemory(int(memory.total), int(memory.available))


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """The tightest memory limit of the control groups around this process, and that group's use, in bytes."""

    limit_bytes: int | None
    used_bytes: int | None


def cgroup_memory() -> CgroupMemory:
    """Read the tightest limit of versions 1 and 2; both fields are ``None`` where no group sets one."""
    tightest = CgroupMemory(None, None)
    try:
        lines = Path(_PROC, "self/cgroup").read_text().splitlines()
    except OSError:
        return tightest
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, names = _CGROUP_ROOT, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            folder, names = _CGROUP_ROOT / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = folder / path.lstrip("/")
        for level in (group, *group.parents):
            limit = _read_int(level / names[0])
            # Version 1 says "no limit" with a number just below 2**63.
            if (
                limit is not None
                and limit < 2**62
                and (tightest.limit_bytes is None or limit < tightest.limit_bytes)
            ):
                tightest = CgroupMemory(limit, _read_int(level / names[1]))
            if level == folder:
                break
    return tightest


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """What torch's caching allocator holds on one device, in bytes."""

    allocated_bytes: int
    """In tensors that live."""
    reserved_bytes: int
    """Taken from the device, the cache included."""
    peak_allocated_bytes: int
    """Largest ``allocated_bytes`` since start or torch's last reset."""


def initialised_cuda() -> ModuleType | None:
    """``torch.cuda`` if this process has CUDA in use; nothing is imported or started for it."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    # The function is not there yet while another thread imports torch.
    is_initialised = getattr(cuda, "is_initialized", None)
    return cuda if is_initialised is not None and is_initialised() else None


def gpu_memory() -> dict[int, GpuMemory]:
    """Read each CUDA device's allocator, by device index; empty while this process does not use CUDA."""
    cuda = initialised_cuda()
    if cuda is None:
        return {}
    return {
        index: GpuMemory(
            int(cuda.memory_allocated(index)),
            int(cuda.memory_reserved(index)),
            int(cuda.max_memory_allocated(index)),
        )
        for index in range(cuda.device_count())
    }
