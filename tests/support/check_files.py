"""Refuses large files and private keys: `python tests/support/check_files.py FILE...`, run before every commit."""

import sys
from pathlib import Path

MAX_BYTES = 1_000_000
PUBLISHED = "outputs/reference/"  # one published report, committed on purpose
KEY_MARK = b"-----BEGIN " + b"%s" + b"PRIVATE KEY-----"
KEY_KINDS = (b"", b"RSA ", b"EC ", b"OPENSSH ", b"ENCRYPTED ")


def faults(path: Path) -> list[str]:
    """What forbids committing this file."""
    data = path.read_bytes()
    found = []
    if len(data) > MAX_BYTES and not path.as_posix().startswith(PUBLISHED):
        found.append(f"{path}: {len(data):,} bytes; keep files under {MAX_BYTES:,} or make them in a step")
    if any(KEY_MARK % kind in data for kind in KEY_KINDS):
        found.append(f"{path}: holds a private key; remove it and replace the key, it counts as known")
    return found


if __name__ == "__main__":
    found = [fault for name in sys.argv[1:] for fault in faults(Path(name))]
    print("\n".join(found), file=sys.stderr)
    sys.exit(bool(found))
