"""Where the records of a zip archive lie, as `torch.save` writes it: stored, not compressed."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass

from auto_round._files import shown
from auto_round.exceptions import CheckpointError
from auto_round.low_cpu_mem._sources import Source, SourceFile, read_bytes

_MOST_DIRECTORY_BYTES = 1 << 26
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """One file in the archive."""

    start: int
    """Byte at which its content begins."""
    size: int
    """Bytes of it."""


def is_zip(start: bytes) -> bool:
    """Whether a file begins as an archive does."""
    return start.startswith(b"PK\x03\x04")


def find_records(source: Source) -> dict[str, Record]:
    """Return the records by name, without the folder that all of them are in, having read no content.

    Raises:
        CheckpointError: The archive is damaged or cut short, or a record is compressed, encrypted, reaches
            outside the archive or into another record, or has the name of another.
    """
    path = source.path
    try:
        with zipfile.ZipFile(_Directory(source)) as archive:
            entries = archive.infolist()
            end = archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise CheckpointError(
            f"{path} is a damaged or truncated zip archive: {error}. Fetch or save it again."
        ) from error
    records: dict[str, Record] = {}
    for entry in entries:
        try:
            start = _content_start(source, entry, end)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: record {shown(entry.filename)}: {error}") from None
        _, _, name = entry.filename.partition("/")
        if name in records:
            raise CheckpointError(f"{path} has two records {shown(name)}.")
        records[name] = Record(start=start, size=entry.file_size)
    reached, before = 0, ""
    for name, record in sorted(records.items(), key=lambda item: (item[1].start, item[1].size)):
        if record.start < reached:
            raise CheckpointError(f"{path}: the records {shown(before)} and {shown(name)} overlap.")
        reached, before = record.start + record.size, name
    return records


def _content_start(source: Source, entry: zipfile.ZipInfo, end: int) -> int:
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise CheckpointError("it is compressed, which torch never does; unpack the file first.")
    if entry.flag_bits & _ENCRYPTED:
        raise CheckpointError("it is encrypted.")
    header_end = entry.header_offset + _LOCAL_HEADER.size
    if entry.header_offset < 0 or header_end > end:
        raise CheckpointError("it lies outside the archive.")
    fields = _LOCAL_HEADER.unpack(read_bytes(source, entry.header_offset, _LOCAL_HEADER.size))
    name_length, extra_length = fields[-2:]
    name = read_bytes(source, header_end, name_length)
    start = header_end + name_length + extra_length
    encoding = "utf-8" if fields[2] & 0x800 else "cp437"
    if fields[0] != b"PK\x03\x04" or name.decode(encoding, "replace") != entry.orig_filename:
        raise CheckpointError("its own header does not agree with the archive's directory.")
    if start + entry.file_size > end:
        raise CheckpointError(f"its {entry.file_size} bytes reach outside the archive.")
    return start


class _Directory(SourceFile):
    """Has zipfile read no more at once than a directory may have."""

    def read(self, size: int = -1, /) -> bytes:
        left = self.size - self.tell()
        if min(size, left) > _MOST_DIRECTORY_BYTES or (size < 0 and left > _MOST_DIRECTORY_BYTES):
            raise ValueError(f"its directory is longer than {_MOST_DIRECTORY_BYTES} bytes")
        return super().read(size) or b""
