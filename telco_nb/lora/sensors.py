"""Energy counters of this machine: found, named and read. What cannot be read raises SensorError with the reason.

RAPL counts microjoules per zone (Intel and AMD). A zone is what its `name` file says, not what its number is:
`package-N` is a processor, `core` and `uncore` are parts of one, `dram` is its memory, and `psys` is the whole board,
which contains the packages. NVML counts millijoules per NVIDIA card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ZONE = re.compile(r"intel-rapl:\d+(:\d+)*")  # also on AMD; intel-rapl-mmio is the same counter a second time
PACKAGE = re.compile(r"package-\d+(-die-\d+)?")


class SensorError(RuntimeError):
    """A counter cannot be read; the message names the counter and the reason."""


@dataclass(frozen=True)
class RaplZone:
    """One counter: its folder, its name (`package-0`, or `package-0 dram` for a part) and where it wraps around."""

    folder: Path
    name: str
    range_uj: int

    def read_uj(self) -> int:
        """The counter in microjoules. Raises SensorError."""
        return _read_number(self.folder / "energy_uj")


def _read_number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"no number in it ({error})"
        raise SensorError(f"{path} cannot be read: {reason}") from None


def _zone_numbers(folder: Path) -> list[int]:
    return [int(number) for number in folder.name.split(":")[1:]]


@dataclass(frozen=True)
class RaplZones:
    """The zones of a machine: `packages` make up the processors' energy, `apart` are shown and never added to it.

    Without a usable counter `packages` is empty, and `reason` says why.
    """

    packages: tuple[RaplZone, ...] = ()
    apart: tuple[RaplZone, ...] = ()
    reason: str | None = None


def find_rapl(root: Path) -> RaplZones:
    """Probe every zone below `root` once, in the order of their numbers, each name once.

    A part of the processors is no figure of all of them: if one package cannot be read, no package is used.
    """
    folders = [p for p in root.glob("intel-rapl:*") if ZONE.fullmatch(p.name)] if root.is_dir() else []
    found: dict[str, RaplZone] = {}
    for folder in sorted(folders, key=_zone_numbers):
        parent = next((z.name for z in found.values() if z.folder.name == folder.name.rpartition(":")[0]), "")
        try:
            zone = _probe(folder, parent)
        except SensorError as error:
            if not parent and _may_be_package(folder):
                return RaplZones(reason=str(error))
            continue
        found.setdefault(zone.name, zone)
    packages = tuple(zone for name, zone in found.items() if PACKAGE.fullmatch(name))
    apart = tuple(zone for name, zone in found.items() if not PACKAGE.fullmatch(name))
    return RaplZones(packages, apart, None if packages else f"{root} lists no processor package")


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _may_be_package(folder: Path) -> bool:
    return len(_zone_numbers(folder)) == 1 and (not _name(folder) or bool(PACKAGE.fullmatch(_name(folder))))


def _probe(folder: Path, parent: str) -> RaplZone:
    """The zone of a folder. Raises SensorError if it has no name, reads 0, or cannot be read."""
    name = f"{parent} {_name(folder)}".strip()
    if not _name(folder):
        raise SensorError(f"{folder / 'name'} cannot be read")
    zone = RaplZone(folder, name, _read_number(folder / "max_energy_range_uj"))
    if zone.read_uj() <= 0:
        raise SensorError(f"{folder / 'energy_uj'} reads 0")
    return zone


def elapsed_j(zone: RaplZone, first: int, last: int) -> float:
    """Joules between two readings in microjoules; a counter that has wrapped around starts again from 0."""
    return (last - first + (zone.range_uj if last < first else 0)) / 1e6


def nvml_handle() -> Any | None:
    """NVML handle of the CUDA device in use, matched by UUID; None without an NVIDIA card. Raises SensorError."""
    import torch

    from telco_nb.lora.device import on_gpu

    if not on_gpu():
        return None
    try:
        import pynvml

        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    except (ImportError, AttributeError) as error:
        raise SensorError(f"no NVML: {error}") from None
    _ask(pynvml.nvmlInit)
    return _ask(pynvml.nvmlDeviceGetHandleByUUID, uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


def read_gpu_j(handle: Any) -> float:
    """The card's energy counter in joules, after all its work is done. Raises SensorError."""
    import pynvml
    import torch

    torch.cuda.synchronize()
    return _ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle) / 1e3


def has_power(handle: Any) -> bool:
    """True if the card tells its power, which carbontracker asks for."""
    import pynvml

    try:
        return _ask(pynvml.nvmlDeviceGetPowerUsage, handle) >= 0
    except SensorError:
        return False


def gpu_name(handle: Any) -> str:
    import pynvml

    try:
        return str(_ask(pynvml.nvmlDeviceGetName, handle))
    except SensorError:
        return "GPU"


def _ask(query: Any, *arguments: Any) -> Any:
    """The answer of NVML. Raises SensorError instead of NVML's own errors."""
    try:
        return query(*arguments)
    except Exception as error:  # NVMLError, or what the library of a driver that does not fit raises
        raise SensorError(f"{getattr(query, '__name__', 'NVML')}: {error}") from None
