from gpumesh.lab import demo_hosts, profile
from gpumesh.lab.profile import Faults, HostProfile, SimCounters, SmiMode
from gpumesh.wire import from_json, to_json


def test_default_hosts_are_4090s_with_uuids_that_last() -> None:
    hosts = demo_hosts.make_hosts(8)
    uuids = [gpu.uuid for host in hosts for gpu in host.gpus]
    assert len(set(uuids)) == len(uuids) == 8
    assert uuids == [gpu.uuid for host in demo_hosts.make_hosts(8) for gpu in host.gpus]
    assert all((gpu.name, gpu.memory_mib) == ("NVIDIA GeForce RTX 4090", 24564) for host in hosts for gpu in host.gpus)
    assert all(host.hostname.startswith("sim-") and host.version.endswith("-lab") for host in hosts)
    assert len({host.name for host in demo_hosts.make_hosts(12)}) == 12


def test_profiles_faults_and_counters_cross_to_the_hosts_process() -> None:
    for host in (*demo_hosts.make_hosts(4), profile.make_instant_host()):
        assert from_json(HostProfile, to_json(host)) == host
    faults = Faults(status=503, paths=("/api/chat",), times=2, nvidia_smi=SmiMode.ESCAPES, slow=2.5)
    assert from_json(Faults, to_json(faults)) == faults
    assert from_json(SimCounters, to_json(SimCounters(started=3))) == SimCounters(started=3)
