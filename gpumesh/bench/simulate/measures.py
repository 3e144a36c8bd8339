"""Collects what became of each request of a simulation, and summarizes it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpumesh.balancer.base import Priority
from gpumesh.bench.simulate.requests import Attempt, Job
from gpumesh.bench.simulate.servers.server import SimulatedServer
from gpumesh.bench.stats import SampleSummary, ratio, summarize_sample

MAX_CLIENTS = 16  # whose figures are kept apart


@dataclass(frozen=True, slots=True)
class NodeResult:
    """The part of one node. ``share`` is its part of all served requests (0 to 1)."""

    name: str
    served: int
    share: float | None
    loads: int
    prompt_tokens: int
    read_tokens: int


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """The result of one policy. Times are in seconds of the simulated clock, those of ``completion``, ``ttft`` and
    ``queue_wait`` count from the arrival of a request. ``lost``: refused or failed on all nodes. ``moved``: served
    after more than one attempt. ``makespan_s``: from the start to the last end. ``completion_by_priority`` has only the
    classes that occurred, ``completion_by_client`` at most ``MAX_CLIENTS`` clients, those that came first."""

    policy: str
    served: int
    lost: int
    moved: int
    completion: SampleSummary
    ttft: SampleSummary
    queue_wait: SampleSummary
    completion_by_priority: Mapping[str, SampleSummary]
    completion_by_client: Mapping[str, SampleSummary]
    loads: int
    prompt_tokens: int
    read_tokens: int
    makespan_s: float
    nodes: tuple[NodeResult, ...]

    @property
    def read_share(self) -> float | None:
        """The share of the prompts' tokens that the servers read, because their caches had not got them."""
        return ratio(self.read_tokens, self.prompt_tokens)


class Measures:
    """Takes each request that ends, and makes the ``PolicyResult``. Three numbers are kept for each request."""

    def __init__(self, policy: str, nodes: Sequence[str]) -> None:
        self.policy = policy
        self.completion_s = array("d")
        self.ttft_s = array("d")
        self.wait_s = array("d")
        self.lost = 0  # requests that no node has answered
        self.moved = 0  # requests that were served after more than one attempt
        self._by_priority: dict[Priority, array[float]] = {}  # the seconds to completion
        self._by_client: dict[str, array[float]] = {}  # the seconds to completion
        self._served_by_node = dict.fromkeys(nodes, 0)
        self._servers: tuple[SimulatedServer, ...] = ()
        self._ended_at = 0.0  # when the last request ended

    def __repr__(self) -> str:
        return f"<Measures {self.policy} {len(self.completion_s)} served, {self.lost} lost>"

    def add_served(self, job: Job, attempt: Attempt, now: float) -> None:
        """Adds the times of a job that has been served now."""
        request, submitted_at = job.request, job.submitted_at
        completion_s = now - submitted_at
        self.completion_s.append(completion_s)
        self.ttft_s.append((now if job.first_token_at is None else job.first_token_at) - submitted_at)
        self.wait_s.append(0.0 if job.sent_at is None else job.sent_at - submitted_at)
        self._served_by_node[attempt.node] += 1
        if job.attempts > 1:
            self.moved += 1
        class_times_s = self._by_priority.get(request.priority)
        if class_times_s is None:
            class_times_s = self._by_priority[request.priority] = array("d")
        class_times_s.append(completion_s)
        client_times_s = self._by_client.get(request.client)
        if client_times_s is not None:
            client_times_s.append(completion_s)
        elif len(self._by_client) < MAX_CLIENTS:
            self._by_client[request.client] = array("d", (completion_s,))

    def add_lost(self, job: Job) -> None:  # noqa: ARG002  # a person who debugs wants to know which
        self.lost += 1

    def finish(self, now: float, servers: Iterable[SimulatedServer]) -> None:
        """Called once, when all requests have ended."""
        self._ended_at = now
        self._servers = tuple(servers)

    def result(self) -> PolicyResult:
        """Summarizes what was collected."""
        served = len(self.completion_s)
        completion = summarize_sample(self.completion_s)

        def summarize_group(values: array[float]) -> SampleSummary:
            return completion if len(values) == served else summarize_sample(values)

        nodes = tuple(
            NodeResult(
                name=server.spec.name,
                served=self._served_by_node[server.spec.name],
                share=ratio(self._served_by_node[server.spec.name], served),
                loads=server.loads,
                prompt_tokens=server.prompt_tokens,
                read_tokens=server.read_tokens,
            )
            for server in self._servers
        )
        return PolicyResult(
            policy=self.policy,
            served=served,
            lost=self.lost,
            moved=self.moved,
            completion=completion,
            ttft=summarize_sample(self.ttft_s),
            queue_wait=summarize_sample(self.wait_s),
            completion_by_priority={
                priority.value: summarize_group(self._by_priority[priority])
                for priority in Priority
                if priority in self._by_priority
            },
            completion_by_client={name: summarize_group(values) for name, values in self._by_client.items()},
            loads=sum(node.loads for node in nodes),
            prompt_tokens=sum(node.prompt_tokens for node in nodes),
            read_tokens=sum(node.read_tokens for node in nodes),
            makespan_s=self._ended_at,
            nodes=nodes,
        )
