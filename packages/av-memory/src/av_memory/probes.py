"""Readings of memory: this process, a tree of processes, the cgroup, the machine, and GPUs.

Everything here is in bytes. On Linux the files under ``/proc`` are read directly, because one reading
costs a microsecond that way and tens of microseconds through a general library; elsewhere psutil is used.

Accuracy on Linux: the kernel keeps resident-set counters per processor and folds them together in
batches, so one reading of ``statm`` can be off by some hundred kB on a machine with few cores
(``Documentation/filesystems/proc.rst``); ``smaps_rollup`` is exact and thousands of times slower.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

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


class MemoryProbeError(RuntimeError):
    """A memory reading cannot be had on this system; the message says what was tried."""


class RssProbe:
    """Resident set size of one process, read again and again at little cost.

    Args:
        pid: the process; ``None`` means the calling one. On Linux the probe stays bound to the process
            that had this number when it was made, so a number that the system gives out again is never
            mistaken for it.

    Raises:
        MemoryProbeError: neither ``/proc`` nor psutil can read the process.
    """

    __slots__ = ("_descriptor", "read", "reads_proc")

    read: Callable[[], int]
    """Take one reading, in bytes. Raises ``ProcessLookupError`` once the process is gone."""

    def __init__(self, pid: int | None = None) -> None:
        try:
            self._descriptor = _Descriptor(f"{_PROC}/{pid or 'self'}/statm")
        except OSError as error:
            self._descriptor = None
            self.read = self._psutil_reader(pid, error)
        else:
            self.read = self._statm_reader(self._descriptor)
        self.reads_proc = self._descriptor is not None

    @staticmethod
    def _statm_reader(descriptor: _Descriptor) -> Callable[[], int]:
        pread, page_bytes = os.pread, _PAGE_BYTES

        def read() -> int:
            fields = pread(descriptor.number, 96, 0).split(b" ", 2)
            if len(fields) < 3:
                raise ProcessLookupError("the process has ended")
            return int(fields[1]) * page_bytes

        return read

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

        return read

    def close(self) -> None:
        """Give the descriptor back; the probe must not be read after this."""
        if self._descriptor is not None:
            self._descriptor.close()


class _Descriptor:
    """An open file that lives as long as the probe or its ``read``, whichever is kept longer."""

    __slots__ = ("number",)

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        # Set first: a number that is closed here may be another file's a moment later.
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.close()


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
    and ends between two calls of :meth:`refresh` is not seen.

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
                probe = RssProbe(pid)
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
            except (ProcessLookupError, MemoryProbeError):
                rss = 0
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
