"""``FleetModels``: the models of a fleet by the names that a person may type, and what a word of a prompt may mean."""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpumesh.balancer.models.model_rules import ModelRules
from gpumesh.errors import ModelMissing, NoNodeError, UsageError
from gpumesh.event_loop.async_iterators import closing_iterator
from gpumesh.mesh.models.default_model import chat_models, choose_model
from gpumesh.state import Health, MeshState, NodeState
from gpumesh.text.model_names import full_name, listed_spellings
from gpumesh.text.quoting import paste_command

if TYPE_CHECKING:
    from gpumesh.daemon.sessions.session import Session
    from gpumesh.topology import Topology

# How long a word that may be a model waits for the nodes that have not reported yet. A mesh that runs has its reports.
REPORT_TIMEOUT_S = 4.0
# So long do others wait for it after the first node has listed its models: a host that does not answer must not hold up
# a prompt that another node can serve.
FIRST_NODE_GRACE_S = 1.0
_LOOK_INTERVAL_S = 0.05
MAX_SHOWN_MODELS = 50  # in a sentence for people

# `llama3.2:1b`, `hf.co/someone/model:Q4_K_M`; not `12:30`, `Note:` or `http://host`.
_WITH_TAG = re.compile(r"(?=[^:]*[A-Za-z])[\w.-]+(?:/[\w.-]+)*:[\w.-]+")
_WITH_REGISTRY = re.compile(r"(?:hf\.co|huggingface\.co|registry\.ollama\.ai)/[\w.-]+(?:/[\w.-]+)*(?::[\w.-]+)?")
_LETTERS_AND_DIGIT = re.compile(r"(?=.*[A-Za-z])(?=.*[0-9])[\w.-]+")  # `llama3`; few other words are so


@dataclass(frozen=True, slots=True)
class FleetModels:
    """``listed``: the models that the nodes list, in the order of the nodes; ``listed_up`` those of nodes that are up.
    ``named``: the names and the aliases that mesh.yaml has for models. ``usable``: the models to chat with on nodes
    that are up. ``is_settled``: each node has reported, or has failed. ``is_complete``: besides, a node is up, and each
    node that is up lists models, so that no other model can be had now. ``rules`` are those of mesh.yaml."""

    listed: tuple[str, ...]
    listed_up: tuple[str, ...]
    named: tuple[str, ...]
    usable: tuple[str, ...]
    is_settled: bool
    is_complete: bool
    rules: ModelRules

    @classmethod
    def of(cls, state: MeshState, topology: Topology) -> FleetModels:
        """The models of a mesh in this state."""
        nodes_up = [node for node in state.nodes if node.health.is_serving]
        named = [name for spec in topology.models for name in (spec.name, *spec.aliases)]
        if topology.gateway.default_model is not None:
            named.append(topology.gateway.default_model)
        named += [name for node in topology.nodes if node.enabled for name in node.expect.models]
        disabled = {node.name for node in topology.nodes if not node.enabled}
        is_settled = all(node.health is not Health.UNKNOWN or node.name in disabled for node in state.nodes)
        return cls(
            listed=_join_lists(state.nodes),
            listed_up=_join_lists(nodes_up),
            named=tuple(dict.fromkeys(named)),
            usable=chat_models(state),
            is_settled=is_settled,
            is_complete=is_settled and bool(nodes_up) and all(node.backend.models for node in nodes_up),
            rules=ModelRules(topology.models),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All names, each once."""
        return tuple(dict.fromkeys((*self.listed, *self.named)))

    def find(self, word: str) -> str | None:
        """The name of the model that ``word`` names by Ollama's rule (a name without a tag means ``:latest``), or of
        which it is an alias; ``None`` if it names none."""
        spellings = listed_spellings(self.names)
        return spellings.get(word) or spellings.get(full_name(word))

    def is_missing(self, model: str) -> bool:
        """Whether it is known that no node that is up has the model, or a model that would take its place."""
        listed = {self.rules.identity(name) for name in self.listed_up}
        wanted = {self.rules.identity(name) for name in (model, *self.rules.fallbacks(model))}
        return self.is_complete and not wanted & listed

    def guess(self, word: str) -> str | None:
        """The model that was probably meant by a word that names none: another tag of the same name, else a name that
        is nearly the same; ``None``: no name is near."""
        base = _base_name(word)
        names = self.usable or self.names
        for name in names:
            if _base_name(name) == base:
                return name
        by_base = {_base_name(name): name for name in reversed(names)}
        near = difflib.get_close_matches(base, by_base, n=1, cutoff=0.75)
        return by_base[near[0]] if near else None

    def looks_like_model(self, word: str) -> bool:
        """Whether a first word that names no model was meant as one: it has a tag or a registry, a model of the fleet
        has this name with another tag, or it has a digit, as few ordinary words have, and is near to such a name."""
        if _WITH_TAG.fullmatch(word) or _WITH_REGISTRY.fullmatch(word):
            return True
        if any(_base_name(name) == _base_name(word) for name in self.names):
            return True
        return bool(_LETTERS_AND_DIGIT.fullmatch(word)) and self.guess(word) is not None

    def missing_error(self, word: str) -> ModelMissing:
        """The error for a model that no node has."""
        shown = self.usable or self.listed
        more = " …" if len(shown) > MAX_SHOWN_MODELS else ""
        guess = self.guess(word)
        hint = "" if guess is None else f"did you mean {guess}? "
        hint += f"there are: {', '.join(shown[:MAX_SHOWN_MODELS]) or 'no models'}{more}; "
        hint += f"{paste_command('gpumesh models pull {MODEL}', MODEL=word)} fetches it"
        return ModelMissing(word, available=shown, hint=hint)


def _join_lists(nodes: Iterable[NodeState]) -> tuple[str, ...]:
    """The models that these nodes list, each once."""
    return tuple(dict.fromkeys(name for node in nodes for name in node.backend.models))


def _base_name(model: str) -> str:
    """The full name of a model without its tag."""
    return full_name(model).rpartition(":")[0]


def may_be_model(word: str) -> bool:
    """Whether a word can name a model at all. A quoted prompt with a blank cannot."""
    return bool(word) and not any(character.isspace() for character in word) and not word.startswith("-")


async def find_models(session: Session, topology: Topology, word: str | None = None) -> FleetModels:
    """The models of the fleet: as soon as ``word`` names one of them, else when each node has reported or has failed,
    at the latest ``FIRST_NODE_GRACE_S`` after the first node has listed its models, and after ``REPORT_TIMEOUT_S``."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + REPORT_TIMEOUT_S
    state = await session.status()
    models = FleetModels.of(state, topology)
    try:
        async with asyncio.timeout_at(deadline) as scope, closing_iterator(session.watch(_LOOK_INTERVAL_S)) as states:
            async for state in states:
                models = FleetModels.of(state, topology)
                is_named = word is not None and models.find(word) is not None
                if is_named or models.is_settled:
                    break
                if models.listed_up:
                    deadline = min(deadline, loop.time() + FIRST_NODE_GRACE_S)  # later iterations cannot make it later
                    scope.reschedule(deadline)
    except TimeoutError:
        pass  # what the nodes have reported by now has to do
    return models


async def require_model(session: Session, topology: Topology, model: str | None, node: str | None) -> str:
    """The model of a prompt that nobody has typed yet: ``model``, else the default model, else the fleet's only chat
    model. Raises ModelMissing if no node that is up has it, NoNodeError if no node is up, and the errors of
    ``choose_model``."""
    wanted = model or topology.gateway.default_model
    if wanted is None:
        await find_models(session, topology)
        return choose_model(await session.status(), node)
    models = await find_models(session, topology)
    if models.is_missing(wanted):
        raise models.missing_error(wanted)
    if not any(node.health.is_serving for node in (await session.status()).nodes):
        raise NoNodeError("no node is usable now")
    return wanted


@dataclass(frozen=True, slots=True)
class PromptWords:
    """The words of a command line, understood. ``model``: the first word, if it names a model; ``text``: the rest."""

    model: str | None
    text: str


async def read_prompt_words(session: Session, topology: Topology, words: Sequence[str]) -> PromptWords:
    """Reads ``[MODEL] PROMPT…`` as Ollama does: a first word that names a model of the fleet is the model. Raises
    ModelMissing if the first word looks like a model and is none."""
    if not words or not may_be_model(words[0]):
        return PromptWords(None, " ".join(words))
    first, rest = words[0], " ".join(words[1:])
    models = await find_models(session, topology, first)
    model = models.find(first)
    if model is not None:
        return PromptWords(model, rest)
    if models.looks_like_model(first):
        # A node that has not reported yet may have it. The mesh itself waits for that node; a person who has probably
        # mistyped a name need not.
        if not models.is_settled and models.guess(first) is None:
            return PromptWords(first, rest)
        error = models.missing_error(first)
        if rest:
            error.hint = f"{error.hint}; words between quotes are always a prompt"
        raise error
    return PromptWords(None, " ".join(words))


def unknown_choice(kind: str, word: str, choices: Sequence[str]) -> UsageError:
    """The error for a word that is none of the choices, with the nearest one."""
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    guess = f"; did you mean {near[0]}?" if near else ""
    return UsageError(f"there is no {kind} {word!r}{guess}", hint=f"there are: {', '.join(choices)}")
