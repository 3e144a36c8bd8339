from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.probes.smi_tables import (
    FIELDS,
    MAX_GPUS,
    MAX_LINE_BYTES,
    MAX_LINES,
    MAX_PROCESSES,
    OLD_FIELDS,
    GpuTable,
    read_gpus,
    read_processes,
    split_row,
)
from gpumesh.state import GpuState
from tests.probes.shell_host import OTHER_UUID, UUID, old_row, row

UNKNOWNS = (
    "[N/A]",
    "N/A",
    "[Not Supported]",
    "[Unknown Error]",
    "[Insufficient Permissions]",
    "[Requested functionality has been deprecated]",
    "",
    "ERR!",
    "n/a",
    "nan",
    "inf",
    "-",
    "1e5",
)
WORDLESS = tuple(value for value in UNKNOWNS if value not in ("nan", "inf", "-", "1e5"))
NUMBERS = {
    "memory.total": "memory_total_mib",
    "memory.used": "memory_used_mib",
    "memory.free": "memory_free_mib",
    "utilization.gpu": "utilization_pct",
    "utilization.memory": "memory_utilization_pct",
    "temperature.gpu": "temperature_c",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "clocks.sm": "clock_sm_mhz",
    "fan.speed": "fan_pct",
    "pstate": "pstate",
    "persistence_mode": "persistence",
    "clocks_throttle_reasons.active": "throttle",
}


def read_gpu(text: str) -> GpuState:
    (gpu,) = read_gpus(text.encode()).gpus
    return gpu


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", UNKNOWNS)
def test_a_value_that_is_not_a_number_is_unknown(field: str, value: str) -> None:
    gpu = read_gpu(row(**{field.replace(".", "_"): value}))
    assert getattr(gpu, NUMBERS[field]) is None
    assert gpu.uuid == UUID


@pytest.mark.parametrize("value", WORDLESS)
def test_a_text_that_stands_for_no_value_is_unknown(value: str) -> None:
    table = read_gpus(row(pci_bus_id=value, driver_version=value, name=value).encode())
    assert (table.driver, table.gpus[0].pci_bus_id, table.gpus[0].name) == (None, None, "unknown GPU")


@pytest.mark.parametrize("field", [name for name in NUMBERS if name.startswith(("memory", "utilization", "power"))])
def test_a_negative_amount_is_unknown(field: str) -> None:
    assert getattr(read_gpu(row(**{field.replace(".", "_"): "-1"})), NUMBERS[field]) is None


def test_values_as_the_driver_gives_them() -> None:
    gpu = read_gpu(row(fan_speed="131", temperature_gpu="-3", memory_free="18000"))
    assert (gpu.fan_pct, gpu.temperature_c) == (131, -3), "a fan may pass 100 %"
    assert gpu.memory_free_mib == 18000, "used + free is less than total: free is taken as given"


def test_units_are_read_where_nounits_was_ignored() -> None:
    gpu = read_gpu(row(memory_total="24564 MiB", power_draw="212.50 W", utilization_gpu="42 %", clocks_sm="2640 MHz"))
    assert (gpu.memory_total_mib, gpu.power_w, gpu.utilization_pct, gpu.clock_sm_mhz) == (24564, 212.5, 42, 2640)


@pytest.mark.parametrize(
    ("mask", "value"),
    [
        ("0x0000000000000000", "none"),
        ("0x0000000000000001", "idle"),
        ("0x0000000000000002", "none"),
        ("0x0000000000000004", "power-cap"),
        ("0x0000000000000065", "power-cap,thermal,hw-thermal"),
        ("0x0000000000000110", "sync-boost,display"),
        ("0xffffffffffffffff", "power-cap,hw-slowdown,sync-boost,thermal,hw-thermal,power-brake,display"),
    ],
)
def test_reasons_of_throttling(mask: str, value: str) -> None:
    assert read_gpu(row(clocks_throttle_reasons_active=mask)).throttle == value


def test_fields_that_the_old_query_lacks_are_unknown() -> None:
    (gpu,) = read_gpus(old_row().encode(), OLD_FIELDS).gpus
    assert (gpu.memory_used_mib, gpu.temperature_c) == (5632, 61)
    assert (gpu.power_w, gpu.fan_pct, gpu.throttle, gpu.persistence) == (None, None, None, None)


def test_a_name_with_commas() -> None:
    gpu = read_gpu(row(name="NVIDIA RTX 4090, special, edition"))
    assert (gpu.name, gpu.memory_total_mib) == ("NVIDIA RTX 4090, special, edition", 24564)


def test_warnings_between_rows_are_skipped() -> None:
    table = read_gpus(f"WARNING: something\n{row()}\n\nWARNING: infoROM is corrupted at gpu 0000:01:00.0\n".encode())
    assert len(table.gpus) == 1
    assert table.unread_line == "WARNING: something"


def test_carriage_returns_and_missing_line_end() -> None:
    rows = f"{row()}\r\n{row(index='1', uuid=OTHER_UUID)}"
    assert [gpu.uuid for gpu in read_gpus(rows.encode()).gpus] == [UUID, OTHER_UUID]


@pytest.mark.parametrize("value", ["[N/A]", "", "GARBAGE"])
def test_a_gpu_without_uuid_gets_one_of_its_own(value: str) -> None:
    here, there = (read_gpus(row(uuid=value).encode(), hostname=name).gpus[0].uuid for name in ("read_gpu", "other"))
    assert here != there
    assert "01:00.0" in here
    two = read_gpus(f"{row(uuid=value)}\n{row(uuid=value, index='1', pci_bus_id='00000000:02:00.0')}".encode())
    assert len({gpu.uuid for gpu in two.gpus}) == 2


def test_a_gpu_that_is_listed_twice_counts_once() -> None:
    assert len(read_gpus(f"{row()}\n{row()}".encode()).gpus) == 1


def test_faulty_fields_are_named() -> None:
    table = read_gpus(row(fan_speed="ERR!", power_draw="[Unknown Error]", name="ERR! 4090").encode())
    assert dict(table.faulty_fields) == {UUID: ("power.draw", "fan.speed")}


def test_the_driver_is_read_from_any_row() -> None:
    rows = f"{row(driver_version='[N/A]')}\n{row(index='1', uuid=OTHER_UUID)}"
    assert read_gpus(rows.encode()).driver == "550.54.15"


@pytest.mark.parametrize("text", ["hello", ",".join("a" * 18), ", " * 17, "0,1,2"])
def test_a_line_that_is_not_a_row_is_skipped(text: str) -> None:
    table = read_gpus(text.encode())
    assert table.gpus == ()
    assert table.unread_line


def test_too_many_gpus_are_bounded() -> None:
    rows = "\n".join(row(index=str(number), uuid=f"GPU-{number:08d}-x") for number in range(MAX_GPUS + 10))
    assert len(read_gpus(rows.encode()).gpus) == MAX_GPUS


# -- processes -------------------------------------------------------------------------------------------------------


def test_process_names_hold_blanks_and_commas() -> None:
    processes = read_processes(f"{UUID}, 42, /opt/my app, v2, --x=1,2, 512\n{UUID}, 43, [N/A], [N/A]\n".encode())
    first, second = processes[UUID]
    assert (first.pid, first.name, first.used_memory_mib) == (42, "/opt/my app, v2, --x=1, 2", 512)
    assert (second.pid, second.name, second.used_memory_mib) == (43, "unknown", None)


@pytest.mark.parametrize("text", ["", "No running processes found\n", f"{UUID}, x, name, 5", f"{UUID}, -4, name, 5"])
def test_lines_that_are_not_a_process_are_skipped(text: str) -> None:
    assert read_processes(text.encode()) == {}


def test_too_many_processes_are_bounded() -> None:
    rows = "\n".join(f"{UUID}, {number}, p, 1" for number in range(MAX_PROCESSES + 5))
    assert sum(map(len, read_processes(rows.encode()).values())) == MAX_PROCESSES


# -- anything at all -------------------------------------------------------------------------------------------------

VALUE = st.sampled_from((*UNKNOWNS, "0", "5", "99999999999", "0x41", "P2", "GPU-12345678", "a,b", "\x1b[2J", "é")) | (
    st.text(max_size=8)
)
LINES = st.lists(st.lists(VALUE, min_size=1, max_size=22).map(", ".join), max_size=6).map("\n".join)


def assert_printable(table: GpuTable) -> None:
    assert len({gpu.uuid for gpu in table.gpus}) == len(table.gpus)
    for gpu in table.gpus:
        for value in (gpu.name, gpu.uuid, gpu.pci_bus_id or "", gpu.pstate or "", gpu.throttle or ""):
            assert value.isprintable()
        assert gpu.name
        assert gpu.index >= 0
        for amount in (gpu.memory_total_mib, gpu.memory_used_mib, gpu.utilization_pct, gpu.power_w, gpu.fan_pct):
            assert amount is None or amount >= 0
    assert (table.unread_line or "").isprintable()


@given(st.binary(max_size=400) | LINES.map(str.encode))
def test_no_output_raises(output: bytes) -> None:
    for fields in (FIELDS, OLD_FIELDS):
        assert_printable(read_gpus(output, fields))
    for processes in read_processes(output).values():
        assert all(process.name.isprintable() and process.pid >= 0 for process in processes)


@given(st.integers(0, len(row())), st.binary(max_size=8))
def test_a_row_with_noise_anywhere_never_raises(place: int, noise: bytes) -> None:
    good = row().encode()
    assert_printable(read_gpus(good[:place] + noise + good[place:]))
    assert_printable(read_gpus(good[:place]))


@given(st.lists(st.text(alphabet=st.characters(exclude_characters=",\n")), min_size=len(FIELDS), max_size=30))
def test_a_row_has_all_fields_or_is_not_read(parts: list[str]) -> None:
    read = split_row(",".join(parts), FIELDS)
    assert read is not None
    assert set(read) == set(FIELDS)
    # Counted from both ends: only the name may have been more than one part.
    assert read["index"] == parts[0].strip()
    assert read["clocks_throttle_reasons.active"] == parts[-1].strip()


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("line", [b"\n", b"0,\n", b", ".join([b"1"] * len(FIELDS)) + b"\n", b"a" * 100, b","])
def test_endless_output_of_any_kind_is_read_quickly(line: bytes) -> None:
    output = line * ((1 << 20) // len(line))
    began = time.thread_time()
    read_gpus(output, FIELDS, hostname="h")
    read_processes(output)
    assert time.thread_time() - began < 0.2, "in which nobody else has a turn"


@pytest.mark.parametrize(
    ("field", "attribute", "value"),
    [
        ("utilization_gpu", "utilization_pct", "200"),
        ("utilization_memory", "memory_utilization_pct", "101"),
        ("memory_total", "memory_total_mib", "999999999999"),
        ("memory_total", "memory_total_mib", "0"),
        ("memory_used", "memory_used_mib", "24565"),
        ("memory_free", "memory_free_mib", "99999"),
        ("temperature_gpu", "temperature_c", "-9999"),
        ("temperature_gpu", "temperature_c", "9999"),
        ("power_draw", "power_w", "999999999"),
        ("power_limit", "power_limit_w", "-5"),
        ("clocks_sm", "clock_sm_mhz", "999999999"),
        ("fan_speed", "fan_pct", "1000"),
    ],
)
def test_a_figure_that_no_gpu_has_is_unknown(field: str, attribute: str, value: str) -> None:
    """A pool's total would be that figure, or all of the others' requests go where nobody works."""
    assert getattr(read_gpu(row()), attribute) is not None
    assert getattr(read_gpu(row(**{field: value})), attribute) is None


@pytest.mark.parametrize("value", ["${HOME}", "`id`", "$(id)", "-rf", "a b", "²", "x" * 41, ""])
def test_only_a_version_is_read_as_a_driver(value: str) -> None:
    """`audit --write` writes it into mesh.yaml."""
    assert read_gpus(row(driver_version=value).encode()).driver is None
    assert read_gpus(row(driver_version="550.54.15").encode()).driver == "550.54.15"


def test_an_endless_output_is_read_to_its_bound() -> None:
    """1 MiB of empty lines, or of short ones, would take the time of the whole mesh for half a second."""
    for noise in (b"\n", b"x\n", b",,,\n"):
        flood = noise * MAX_LINES
        assert read_gpus(flood + row().encode()).gpus == ()
        assert read_processes(flood + f"{UUID}, 1, x, 2".encode()) == {}
        assert len(read_gpus(row().encode() + b"\n" + flood).gpus) == 1
    assert read_gpus(b"," * (MAX_LINE_BYTES * 100)).gpus == ()
