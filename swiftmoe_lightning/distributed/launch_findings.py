"""What is wrong with a launch, from the facts of its ranks: a pure function."""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from swiftmoe_lightning.distributed.launch_facts import RankFacts


@dataclass(frozen=True)
class Finding:
    """Something found.

    Attributes:
        is_problem: whether training would fail, or hang; else it would be slow.
        what: what was found, in one sentence.
        fix: what to do about it.
    """

    is_problem: bool
    what: str
    fix: str


def find_problems(ranks: Sequence[RankFacts], world_size: int) -> list[Finding]:
    """Everything that would make a training on these ranks fail, hang or be slow.

    Args:
        ranks: those that came, at least one, in order.
        world_size: how many there should be.
    """
    findings = []
    for check in (_differing, _gpus, _shared_gpus, _addresses, _peers, _interfaces, _order):
        findings += check(ranks)
    return _missing(ranks, world_size) + findings


def hosts_of(ranks: Sequence[RankFacts]) -> dict[str, list[int]]:
    """Host -> its ranks."""
    hosts = defaultdict(list)
    for facts in ranks:
        hosts[facts.host].append(facts.rank)
    return dict(hosts)


def ranks_per_host(ranks: Sequence[RankFacts]) -> int:
    """n, where every host has n neighbouring ranks; else 0."""
    hosts = hosts_of(ranks).values()
    first, *others = {len(those) for those in hosts}
    return 0 if others or not all(map(_are_neighbours, hosts)) else first


def ranks_text(ranks: Sequence[int]) -> str:
    """ "rank 3", or "ranks 0-2, 5".

    Args:
        ranks: rising numbers.
    """
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    numbers = ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"rank{'' if len(ranks) == 1 else 's'} {numbers}"


def _missing(ranks: Sequence[RankFacts], world_size: int) -> list[Finding]:
    came = [facts.rank for facts in ranks]
    missing = [rank for rank in range(world_size) if rank not in came]
    if not missing:
        return []
    master = ranks[0].master_address
    fix = f"Start the missing processes, and let their hosts reach {master} (a firewall?)."
    if _is_loopback(master):
        fix = (
            f"Start the missing processes. MASTER_ADDR is {master}, which other hosts take for themselves: if there "
            "are several, give the first one's own address."
        )
    return [
        Finding(True, f"{_capital(ranks_text(missing))} of {world_size} did not come; {ranks_text(came)} did.", fix)
    ]


def _differing(ranks: Sequence[RankFacts]) -> list[Finding]:
    findings = []
    for name in ("WORLD_SIZE", *ranks[0].versions):
        is_size = name == "WORLD_SIZE"
        ranks_with = defaultdict(list)
        for facts in ranks:
            ranks_with[facts.world_size if is_size else facts.versions.get(name)].append(facts.rank)
        if len(ranks_with) > 1:
            said = "; ".join(f"{value or 'none'} on {ranks_text(those)}" for value, those in ranks_with.items())
            fix = "Start all ranks with one WORLD_SIZE." if is_size else f"Install one {name} on all hosts."
            findings.append(Finding(True, f"{name} differs: {said}.", fix))
    return findings


def _gpus(ranks: Sequence[RankFacts]) -> list[Finding]:
    findings = []
    blind = [facts.rank for facts in ranks if facts.has_nvidia_driver and not facts.gpus]
    if blind:
        findings.append(
            Finding(
                True,
                f"The hosts of {ranks_text(blind)} have an NVIDIA driver, but torch sees no GPU there.",
                "Install a CUDA build of torch that the driver is new enough for, and look at CUDA_VISIBLE_DEVICES.",
            )
        )
    without = [facts.rank for facts in ranks if not facts.gpus]
    if without and len(without) < len(ranks):
        fix = "Start ranks only where there are GPUs, or hide them everywhere (CUDA_VISIBLE_DEVICES='')."
        findings.append(Finding(True, f"{_capital(ranks_text(without))} see no GPU, and others do.", fix))
    for facts in ranks:
        if facts.gpus and facts.gpu is None:
            findings.append(
                Finding(
                    True,
                    f"Rank {facts.rank} is number {facts.local_rank} on {facts.host}, and sees {len(facts.gpus)} GPUs.",
                    "Start as many ranks on a host as it has GPUs, and let each rank see all of them.",
                )
            )
    return findings


def _shared_gpus(ranks: Sequence[RankFacts]) -> list[Finding]:
    fix = "Start as many ranks on a host as it has GPUs, each with a LOCAL_RANK and a GPU of its own."
    users = defaultdict(list)
    for facts in ranks:
        if facts.gpu is not None:
            users[facts.gpu].append(facts.rank)
    return [
        Finding(True, f"{_capital(ranks_text(those))} share one GPU ({gpu}).", fix)
        for gpu, those in users.items()
        if len(those) > 1
    ]


def _addresses(ranks: Sequence[RankFacts]) -> list[Finding]:
    """Gloo listens where the host's name leads; at the loopback no other host can reach it."""
    if len(hosts_of(ranks)) == 1:
        return []
    findings = []
    lost = [facts for facts in ranks if facts.backend == "gloo" and facts.chosen_interface is None]
    for host, address in dict.fromkeys((facts.host, facts.host_address) for facts in lost):
        if address is None or _is_loopback(address):
            leads = "does not resolve" if address is None else f"resolves to {address} there"
            findings.append(
                Finding(
                    True,
                    f"The name of host {host} {leads}, where other hosts cannot reach it.",
                    f"Set GLOO_SOCKET_IFNAME on {host} to the interface of its network, or mend its /etc/hosts.",
                )
            )
    return findings


def _peers(ranks: Sequence[RankFacts]) -> list[Finding]:
    findings = []
    for host in hosts_of(ranks):
        pairs = [f"{f.local_rank}-{other}" for f in ranks if f.host == host for other in f.gpus_out_of_reach]
        if pairs:
            findings.append(
                Finding(
                    False,
                    f"On {host} GPUs cannot access each other's memory: {', '.join(pairs)}. The host copies for them.",
                    "Look at `nvidia-smi topo -p2p r`: ACS and the IOMMU, or a virtual machine, may forbid it.",
                )
            )
    return findings


def _interfaces(ranks: Sequence[RankFacts]) -> list[Finding]:
    hosts = hosts_of(ranks)
    several = {f.host: f.interfaces for f in ranks if len(f.interfaces) > 1 and f.chosen_interface is None}
    if len(hosts) == 1 or not several:
        return []
    host, names = next(iter(several.items()))
    others = f" (and {len(several) - 1} more hosts)" if len(several) > 1 else ""
    return [
        Finding(
            False,
            f"Host {host} has several networks: {', '.join(names)}{others}. Ranks need not choose the fastest.",
            "If the speed between hosts is less than it should be, set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME.",
        )
    ]


def _order(ranks: Sequence[RankFacts]) -> list[Finding]:
    if ranks_per_host(ranks):
        return []
    hosts = hosts_of(ranks)
    scattered = next((those for those in hosts.values() if not _are_neighbours(those)), None)
    if scattered is not None:
        what = (
            f"{_capital(ranks_text(scattered))} share a host, but are no neighbours. Expert groups are of neighbours."
        )
        return [
            Finding(False, what, "Number the ranks host by host: torchrun does, and SLURM with --distribution=block.")
        ]
    said = ", ".join(f"{len(those)} on {host}" for host, those in hosts.items())
    what = f"Hosts have different numbers of ranks: {said}. Tokens then travel at one level."
    return [Finding(False, what, "Start equally many ranks on each host.")]


def _are_neighbours(ranks: Sequence[int]) -> bool:
    return ranks[-1] - ranks[0] + 1 == len(ranks)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
