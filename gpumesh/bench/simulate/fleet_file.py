"""Reads a fleet file: YAML with the nodes that are simulated. All problems are reported at once, with line and key.

    defaults: {slots: 4, prefill_tokens_per_s: 4000, rtt_ms: 20}
    nodes:
      - {name: fast, tokens_per_s: 100, vram_mib: 24564, models: ["llama3.1:8b"], count: 2}
      - name: slow
        tokens_per_s: 50
        models: ["llama3.1:8b", {name: "qwen2.5:14b", tokens_per_s: 25, vram_mib: 10500, load_s: 7}]
        loaded: ["llama3.1:8b"]
        faults: [{kind: away, from_s: 60, to_s: 90}]

``defaults`` are merged under each node. What each key means is said in ``fleet.py``. Pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gpumesh.bench.simulate.fleet import Fault, FaultKind, ModelSpec, NodeSpec
from gpumesh.config.mesh_file.error_messages import did_you_mean, not_one_of, quote_value
from gpumesh.config.mesh_file.yaml_tree import (
    BrokenValue,
    KeyPath,
    ListValue,
    MappingValue,
    Position,
    ScalarValue,
    Value,
    format_path,
    parse_yaml,
)
from gpumesh.config.mesh_file.yaml_tree import Fault as FileFault
from gpumesh.errors import ConfigError, Problem
from gpumesh.text.model_names import full_name

MAX_NODES = 10_000
Entries = Mapping[str, tuple[Position, Value]]


@dataclass(frozen=True, slots=True)
class NumberKey:
    """A key with a number: its bounds (both included), its default (``None``: it must be given, or is left out), and
    whether it is a whole number."""

    low: float
    high: float
    default: float | None = None
    whole: bool = False


# ``tokens_per_s``, ``vram_mib`` and so on of a model are the node's, unless the model has its own.
NODE_NUMBERS: Mapping[str, NumberKey] = {
    "tokens_per_s": NumberKey(0.01, 1e6),
    "slots": NumberKey(1, 4096, 1, whole=True),
    "share": NumberKey(0, 10, 0.2),
    "prefill_tokens_per_s": NumberKey(0.01, 1e7),
    "prefill_stall": NumberKey(0, 1, 0.9),
    "prefill_lanes": NumberKey(1, 4096, 1, whole=True),
    "cache_tokens": NumberKey(0, 1e9, 0, whole=True),
    "lost_tokens": NumberKey(0, 1e9, 0, whole=True),
    "vram_mib": NumberKey(1, 1e8),
    "max_loaded": NumberKey(1, 1000, 3, whole=True),
    "load_s": NumberKey(0, 1e5, 6),
    "rtt_ms": NumberKey(0, 1e5, 0),
    "context": NumberKey(1, 1e8, 4096, whole=True),
    "keep_alive_s": NumberKey(0, 1e9, 300),
    "max_pending": NumberKey(0, 1e6, 512, whole=True),
    "max_parallel": NumberKey(1, 4096, whole=True),
    "weight": NumberKey(0.001, 1000, 1),
    "count": NumberKey(1, MAX_NODES, 1, whole=True),
}
NODE_KEYS = ("name", "models", "loaded", "faults", *NODE_NUMBERS)
MODEL_NUMBERS = ("tokens_per_s", "prefill_tokens_per_s", "load_s", "vram_mib", "slots")
FAULT_NUMBERS = {
    "from_s": NumberKey(0, 1e9, 0),
    "to_s": NumberKey(0, 1e9),
    "factor": NumberKey(0, 1e3, 1),
}
# Keys of a mesh.yaml, and of its nodes, that no fleet file has.
_MESH_KEYS = frozenset({"version", "gateway", "models", "tunnels", "redis"})
_MESH_NODE_KEYS = frozenset({"ssh", "backend", "address_from"})
LEAST_FACTOR = 1e-3  # of a fault; only a count of tokens may be 0 times the true one
PREFILL_SPEEDUP = 20.0  # a prompt is read so many times as fast as an answer is generated, if nothing is said
# A model in 4 bits takes about 0.6 GiB for each thousand million parameters, its context and buffers about 1 GiB.
MIB_PER_BILLION, MIB_FOR_CONTEXT, MIB_UNKNOWN = 620.0, 1000.0, 6000.0
_BILLIONS = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)b(?![a-z])")


def parse_fleet(text: str, *, file: str) -> tuple[NodeSpec, ...]:
    """The nodes of a fleet file. ``file`` is its name in messages. Raises ConfigError with all problems."""
    tree, faults = parse_yaml(text)
    reader = _FleetReader(faults=list(faults))
    nodes = reader.read_fleet(tree)
    if not reader.faults:
        return nodes
    raise ConfigError(
        tuple(
            Problem(
                fault.message,
                file,
                fault.position.line if fault.position else None,
                fault.position.column if fault.position else None,
                format_path(fault.path),
            )
            for fault in reader.faults
        )
    )


@dataclass(slots=True)
class _FleetReader:
    """Turns the tree into nodes, and collects the faults of the file. After a fault the result is not used."""

    faults: list[FileFault] = field(default_factory=list)

    def read_fleet(self, tree: Value | None) -> tuple[NodeSpec, ...]:
        """The nodes of the file. If this adds to ``faults``, the nodes must not be used."""
        if not isinstance(tree, MappingValue):
            if not self.faults:
                position = tree.position if tree is not None else None
                self.faults.append(FileFault("a fleet file has a list `nodes`", position))
            return ()
        if self._is_mesh_file(tree.entries):
            message = "this is a mesh.yaml; a fleet file says how fast simulated nodes are (examples/fleet.yaml)"
            self.faults.append(FileFault(message, tree.position))
            return ()
        self._check_keys(tree.entries, ("nodes", "defaults"), ())
        defaults: Entries = {}
        if "defaults" in tree.entries:
            defaults = self._mapping(tree.entries["defaults"][1], ("defaults",))
            self._check_keys(defaults, NODE_KEYS, ("defaults",))
        members = self._list(tree.entries, "nodes", ())
        if not members and not self.faults:
            self._add("names no node", tree.position, ("nodes",))
        nodes = list(self._read_nodes(members, defaults))
        if len(nodes) > MAX_NODES:
            self._add(f"are more than {MAX_NODES} nodes", tree.position, ("nodes",))
        return tuple(nodes)

    def _read_nodes(self, members: Sequence[Value], defaults: Entries) -> Iterator[NodeSpec]:
        """Yields the nodes of the list ``nodes``, and notes each name that two entries have."""
        first_index_of: dict[str, int] = {}
        for index, member in enumerate(members):
            path: KeyPath = ("nodes", index)
            own = self._mapping(member, path)
            self._check_keys(own, NODE_KEYS, path)
            for node in self._read_node({**defaults, **own}, member.position, path, len(members)):
                first_index = first_index_of.setdefault(node.name, index)
                if first_index != index:
                    self._add(
                        f"{quote_value(node.name)} is a name of nodes[{first_index}] already", member.position, path
                    )
                yield node

    @staticmethod
    def _is_mesh_file(entries: Entries) -> bool:
        """Whether the file has keys that only a mesh.yaml has."""
        nodes = entries["nodes"][1] if "nodes" in entries else None
        members = nodes.values if isinstance(nodes, ListValue) else ()
        keys = {key for member in members if isinstance(member, MappingValue) for key in member.entries}
        return not _MESH_KEYS.isdisjoint(entries) or not _MESH_NODE_KEYS.isdisjoint(keys)

    def _read_node(self, entries: Entries, position: Position, path: KeyPath, siblings: int) -> Iterator[NodeSpec]:
        """Yields the node, or as many as its ``count`` says: ``fast-1``, ``fast-2`` …"""
        numbers = {key: self._number(entries, key, rule, path) for key, rule in NODE_NUMBERS.items()}
        index = path[-1]
        assert isinstance(index, int)
        name = self._text(entries, "name", path) or (f"node{index + 1}" if siblings > 1 else "node")
        models = self._read_models(entries, numbers, position, path)
        loaded = tuple(full_name(text) for text in self._texts(entries, "loaded", path))
        for model in loaded:
            if models and model not in models:
                self._add(f"{quote_value(model)} is none of the node's models", entries["loaded"][0], (*path, "loaded"))
        faults = tuple(self._read_faults(entries, path))
        count = int(numbers["count"] or 1)
        for number in range(1, min(count, MAX_NODES) + 1):
            yield NodeSpec(
                name=name if count == 1 else f"{name}-{number}",
                models=models,
                loaded=loaded,
                share=numbers["share"] or 0.0,
                prefill_stall=numbers["prefill_stall"] or 0.0,
                prefill_lanes=int(numbers["prefill_lanes"] or 1),
                cache_tokens=int(numbers["cache_tokens"] or 0),
                lost_tokens=int(numbers["lost_tokens"] or 0),
                vram_mib=numbers["vram_mib"],
                max_loaded=int(numbers["max_loaded"] or 1),
                context=int(numbers["context"] or 1),
                keep_alive_s=numbers["keep_alive_s"] or 0.0,
                max_pending=int(numbers["max_pending"] or 0),
                max_parallel=_whole(numbers["max_parallel"]),
                rtt_s=(numbers["rtt_ms"] or 0.0) / 1000.0,
                weight=numbers["weight"] or 1.0,
                faults=faults,
            )

    def _read_models(
        self, entries: Entries, node: Mapping[str, float | None], position: Position, path: KeyPath
    ) -> dict[str, ModelSpec]:
        """The node's models by full name. ``node`` has the node's numbers, which count if a model does not give its
        own."""
        models: dict[str, ModelSpec] = {}
        members = self._list(entries, "models", path)
        if "models" not in entries:
            self._add("is missing: give the names of the node's models", position, (*path, "models"))
        for index, member in enumerate(members):
            name, own = self._read_model(member, (*path, "models", index))
            if name is None:
                continue
            speed = own["tokens_per_s"] or node["tokens_per_s"]
            if speed is None:
                self._add("is missing: how fast an answer is generated", position, (*path, "tokens_per_s"))
                continue
            prefill = own["prefill_tokens_per_s"] or node["prefill_tokens_per_s"] or PREFILL_SPEEDUP * speed
            load_s = own["load_s"] if own["load_s"] is not None else node["load_s"]
            models[full_name(name)] = ModelSpec(
                name=full_name(name),
                tokens_per_s=speed,
                prefill_tokens_per_s=prefill,
                load_s=load_s or 0.0,
                vram_mib=own["vram_mib"] or guess_vram_mib(name),
                slots=int(own["slots"] or node["slots"] or 1),
            )
        return models

    def _read_model(self, member: Value, path: KeyPath) -> tuple[str | None, dict[str, float | None]]:
        """The model's name (``None`` after an error), and its own numbers; ``None`` for each number that is not
        given."""
        numbers: dict[str, float | None] = dict.fromkeys(MODEL_NUMBERS)
        if not isinstance(member, MappingValue):
            return self._scalar(member, path), numbers
        self._check_keys(member.entries, ("name", *MODEL_NUMBERS), path)
        name = self._text(member.entries, "name", path)
        for key in MODEL_NUMBERS:
            rule = NODE_NUMBERS[key]
            numbers[key] = self._number(member.entries, key, NumberKey(rule.low, rule.high, None, rule.whole), path)
        if name is None:
            self._add("is missing", member.position, (*path, "name"))
        return name, numbers

    def _read_faults(self, entries: Entries, path: KeyPath) -> Iterator[Fault]:
        """Yields the node's faults. An entry with an error is left out, and the error noted."""
        for index, member in enumerate(self._list(entries, "faults", path)):
            fault_path = (*path, "faults", index)
            own = self._mapping(member, fault_path)
            self._check_keys(own, ("kind", "model", *FAULT_NUMBERS), fault_path)
            numbers = {key: self._number(own, key, rule, fault_path) for key, rule in FAULT_NUMBERS.items()}
            text = self._text(own, "kind", fault_path)
            if text is None:
                self._add(f"is missing: one of {', '.join(FaultKind)}", member.position, (*fault_path, "kind"))
            elif text not in list(FaultKind):
                self._add(not_one_of(text, list(FaultKind)), own["kind"][1].position, (*fault_path, "kind"))
            else:
                kind, model = FaultKind(text), self._text(own, "model", fault_path)
                from_s, to_s, factor = numbers["from_s"] or 0.0, numbers["to_s"], numbers["factor"]
                if to_s is not None and to_s < from_s:
                    self._add("is before from_s", own["to_s"][1].position, (*fault_path, "to_s"))
                if factor is None:
                    factor = 1.0
                if factor < LEAST_FACTOR and kind is not FaultKind.MISCOUNTING:
                    self._add(f"must be at least {LEAST_FACTOR:g}", own["factor"][1].position, (*fault_path, "factor"))
                ends_at = math.inf if to_s is None else to_s
                yield Fault(kind, from_s, ends_at, factor, None if model is None else full_name(model))

    # -- values --------------------------------------------------------------------------------------------------

    def _add(self, message: str, position: Position | None, path: KeyPath) -> None:
        self.faults.append(FileFault(message, position, path))

    def _check_keys(self, entries: Entries, known: tuple[str, ...], path: KeyPath) -> None:
        for key, (position, _) in entries.items():
            if key not in known:
                guess = did_you_mean(key, known)
                hint = f"; did you mean {guess}?" if guess else f": there are {', '.join(known)}"
                self._add(f"unknown key{hint}", position, (*path, key))

    def _mapping(self, value: Value, path: KeyPath) -> Entries:
        if isinstance(value, MappingValue):
            return value.entries
        if not isinstance(value, BrokenValue):
            self._add("must be keys with values, as {name: fast, tokens_per_s: 50}", value.position, path)
        return {}

    def _list(self, entries: Entries, key: str, path: KeyPath) -> tuple[Value, ...]:
        """The members of a list; none if the key is not there."""
        if key not in entries:
            return ()
        position, value = entries[key]
        if isinstance(value, ListValue):
            return value.values
        if not isinstance(value, BrokenValue):
            self._add("must be a list", position, (*path, key))
        return ()

    def _texts(self, entries: Entries, key: str, path: KeyPath) -> list[str]:
        members = self._list(entries, key, path)
        texts = [self._scalar(member, (*path, key, index)) for index, member in enumerate(members)]
        return [text for text in texts if text is not None]

    def _text(self, entries: Entries, key: str, path: KeyPath) -> str | None:
        """The text of a key; ``None`` if the key is not there."""
        return self._scalar(entries[key][1], (*path, key)) if key in entries else None

    def _scalar(self, value: Value, path: KeyPath) -> str | None:
        if isinstance(value, ScalarValue) and value.text:
            return value.text
        if not isinstance(value, BrokenValue):
            self._add("must be a text", value.position, path)
        return None

    def _number(self, entries: Entries, key: str, rule: NumberKey, path: KeyPath) -> float | None:
        """The number of a key; the rule's default if the key is not there."""
        if key not in entries:
            return rule.default
        text = self._scalar(entries[key][1], (*path, key))
        if text is None:
            return rule.default
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        is_in_range = rule.low <= number <= rule.high  # false for NaN
        if not is_in_range or (rule.whole and number != int(number)):
            kind = "a whole number" if rule.whole else "a number"
            message = f"{quote_value(text)} is not {kind} from {rule.low:g} to {rule.high:g}"
            self._add(message, entries[key][1].position, (*path, key))
            return rule.default
        return number


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def guess_vram_mib(model: str) -> float:
    """About the memory that a model takes, in MiB, by the number of parameters in its name (``llama3.1:8b``)."""
    match = _BILLIONS.search(model.lower())
    return MIB_UNKNOWN if match is None else MIB_FOR_CONTEXT + MIB_PER_BILLION * float(match[1])
