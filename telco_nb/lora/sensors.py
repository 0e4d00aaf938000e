"""Energy counters of this machine: found, named and read. What cannot be read raises SensorError with the reason.

RAPL counts microjoules per zone (Intel and AMD). A zone is what its `name` file says, not what its number is:
`package-N` is a processor, `core` and `uncore` are parts of one, `dram` is its memory, and `psys` is the whole board,
which contains the packages. NVML counts millijoules per NVIDIA card, or tells its power. An unplugged laptop's battery
tells the power of the whole machine.
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
    return _text(folder / "name")


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


def elapsed_j(zone: RaplZone, first: float, last: float) -> float:
    """Joules between two readings in microjoules; a counter that has wrapped around starts again from 0."""
    return (last - first + (zone.range_uj if last < first else 0)) / 1e6


def find_batteries(root: Path) -> tuple[Path, ...]:
    """The folders of this machine's batteries; empty unless they feed it now and tell their power."""
    batteries = tuple(sorted(p for p in root.glob("*") if _text(p / "type") == "Battery" and not _is_in_a_device(p)))
    try:
        return batteries if batteries and read_battery_w(batteries) > 0 else ()
    except SensorError:
        return ()


def read_battery_w(batteries: tuple[Path, ...]) -> float:
    """The power that the batteries deliver, in W: that of the whole machine.

    A battery counts while its `status` is Discharging. With two of them one may rest (Not charging, Full).

    Raises:
        SensorError: the machine is plugged in, a battery is being charged, or none is discharging.
    """
    for folder in batteries[0].parent.glob("*"):
        if _text(folder / "type") in ("Mains", "USB") and _text(folder / "online") == "1":
            raise SensorError(f"{folder.name} is plugged in")
    status = {folder: _text(folder / "status") for folder in batteries}
    discharging = [folder for folder in batteries if status[folder] == "Discharging"]
    if not discharging or "Charging" in status.values():
        told = ", ".join(f"{folder.name} {status[folder] or 'unknown'}" for folder in batteries)
        raise SensorError(f"no battery feeds the machine: its status must be Discharging ({told})")
    return sum(_battery_w(folder) for folder in discharging)


def _battery_w(folder: Path) -> float:
    if (folder / "power_now").exists():
        return abs(_read_number(folder / "power_now")) / 1e6
    return abs(_read_number(folder / "current_now")) * _read_number(folder / "voltage_now") / 1e12


def _is_in_a_device(folder: Path) -> bool:
    """True for the battery of a mouse or a headset."""
    return _text(folder / "scope") == "Device"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


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
        raise SensorError(f"NVIDIA's library of sensors (NVML) cannot be used: {error}") from None
    _ask("NVIDIA's library of sensors (NVML) does not start", pynvml.nvmlInit)
    unknown = f"NVML does not find the card {uuid}"
    if uuid.startswith(("GPU-", "MIG-")):
        return _ask(unknown, pynvml.nvmlDeviceGetHandleByUUID, uuid)
    try:
        return _ask(unknown, pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{uuid}")
    except SensorError as error:
        try:
            return _ask(unknown, pynvml.nvmlDeviceGetHandleByUUID, f"MIG-{uuid}")
        except SensorError:
            raise error from None


def whole_card(handle: Any) -> tuple[Any, float]:
    """The card that a MIG instance is a part of, and the part's share of its memory; otherwise the card itself and 1.

    Only the card has an energy counter and a power. Raises SensorError.
    """
    import pynvml

    try:
        is_part = bool(_ask("the driver does not know MIG", pynvml.nvmlDeviceIsMigDeviceHandle, handle))
    except SensorError:
        is_part = False
    if not is_part:
        return handle, 1.0
    card = _ask("the card of a MIG instance is not found", pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle)
    unread = "the memory of a MIG instance or of its card cannot be read"
    part_bytes, card_bytes = (_ask(unread, pynvml.nvmlDeviceGetMemoryInfo, h).total for h in (handle, card))
    return card, part_bytes / card_bytes


def read_gpu_j(handle: Any) -> float:
    """The card's energy counter in joules, after all its work is done. Raises SensorError."""
    import pynvml

    finish_gpu_work()
    unread = "the card's energy counter cannot be read"
    return _ask(unread, pynvml.nvmlDeviceGetTotalEnergyConsumption, handle) / 1e3


def finish_gpu_work() -> None:
    """Wait until the card has done all that it was given."""
    import torch

    torch.cuda.synchronize()


def read_gpu_w(handle: Any) -> float:
    """The card's power in W. Raises SensorError."""
    import pynvml

    return _ask("the card's power cannot be read", pynvml.nvmlDeviceGetPowerUsage, handle) / 1e3


def has_power(handle: Any) -> bool:
    """True if the card tells its power, which carbontracker asks for."""
    try:
        return read_gpu_w(handle) >= 0
    except SensorError:
        return False


def gpu_name(handle: Any) -> str:
    import pynvml

    try:
        return str(_ask("the card's name cannot be read", pynvml.nvmlDeviceGetName, handle))
    except SensorError:
        return "GPU"


def _ask(failure: str, query: Any, *arguments: Any) -> Any:
    """The answer of NVML. Raises SensorError, which says `failure` and NVML's reason, instead of NVML's own errors."""
    try:
        return query(*arguments)
    except Exception as error:  # NVMLError, or what the library of a driver that does not fit raises
        raise SensorError(f"{failure}: {error}") from None
