"""Numbers and names as people read them; the page's script formats in the same way."""


def format_mb(size_mb: float) -> str:
    """A size with its unit: MB of 2**20 bytes, GB of 2**30 bytes."""
    magnitude = abs(size_mb)
    if magnitude >= 10240:
        return f"{size_mb / 1024:.1f} GB"
    if magnitude >= 1024:
        return f"{size_mb / 1024:.2f} GB"
    return f"{size_mb:.{0 if magnitude >= 100 else 1}f} MB"


def format_s(seconds: float) -> str:
    """A duration with its unit, from microseconds to hours."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        milliseconds = seconds * 1e3
        return f"{milliseconds:.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def one_line(text: str) -> str:
    """The text with every control character spelt out, so that a name cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
