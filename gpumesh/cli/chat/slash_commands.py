"""``SlashCommands``: what the lines that begin with ``/`` do in a chat."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path

from gpumesh.cli.chat.answer_printer import terminal_columns
from gpumesh.cli.chat.chat_fleet import ChatFleet
from gpumesh.cli.chat.conversation import Conversation, read_conversation
from gpumesh.cli.chat.message_text import unquote
from gpumesh.cli.fleet_models import unknown_choice
from gpumesh.cli.views.safe_text import clean_line, clean_text
from gpumesh.errors import UsageError
from gpumesh.files import atomic_file

MAX_FILE_BYTES = 64 << 20  # of a saved chat

# The options that Ollama documents, with what they mean. Other kinds of servers get the ones that they know.
PARAMETERS = {
    "temperature": "creativity, 0 to 2",
    "num_ctx": "size of the context, in tokens",
    "num_predict": "longest answer, in tokens",
    "top_k": "choose among so many tokens",
    "top_p": "choose among tokens of this total probability",
    "min_p": "least probability of a token, against the best",
    "seed": "the same seed gives the same answer",
    "stop": "text that ends an answer",
    "repeat_penalty": "against repetitions",
    "repeat_last_n": "how far back repetitions are looked for, in tokens",
    "presence_penalty": "against words that were used",
    "frequency_penalty": "against words that were used often",
    "num_gpu": "layers on the GPU",
    "num_keep": "tokens that stay when the context is full",
    "num_thread": "threads on the CPU",
    "num_batch": "tokens of a prompt that are read at once",
    "mirostat": "0, 1 or 2",
    "mirostat_eta": "rate of mirostat",
    "mirostat_tau": "goal of mirostat",
    "typical_p": "choose typical tokens",
}
_SETTINGS = ("parameter", "system", "think", "nothink", "history", "nohistory", "verbose", "quiet")
_THINK_EFFORTS = ("low", "medium", "high")

COMMAND_HELP: Mapping[str, str] = {
    "/model": "[NAME]  talk to another model; without NAME: list them",
    "/node": "[NAME|auto]  let only this node answer; without NAME: list them",
    "/set": "parameter NAME VALUE, system TEXT, think [low|medium|high], nothink, …",
    "/show": "model, node, system message and parameters",
    "/save": "FILE  write the chat to a file",
    "/load": "FILE  go on with a chat from a file",
    "/clear": "forget what was said",
    "/help": "this list",
    "/bye": "end the chat",
}
KEYS_HELP = (
    ('"""', "begins and ends a message of several lines; so does Alt-Enter for a single line break"),
    ("Ctrl-C", "stops the answer, or clears the line; twice on an empty line ends the chat"),
    ("Ctrl-D", "ends the chat"),
    ("Up, Ctrl-R", "what was typed before"),
)
_OTHER_NAMES = {"?": "help", "exit": "bye", "quit": "bye", "q": "bye", "models": "model", "nodes": "node"}


class SlashCommands:
    """The commands over one conversation. ``confirm`` asks the person a question, ``say`` prints a text. ``is_ended``:
    the chat is to end. ``is_verbose``: a line after each answer says who gave it and how fast. ``keep_history`` is
    called with whether the history is kept from now on."""

    def __init__(
        self,
        conversation: Conversation,
        fleet: ChatFleet,
        *,
        say: Callable[[str], None],
        confirm: Callable[[str], Awaitable[bool]],
        keep_history: Callable[[bool], None],
    ) -> None:
        self.conversation = conversation
        self.is_ended = False
        self.is_verbose = True
        self._fleet = fleet
        self._say = say
        self._confirm = confirm
        self._keep_history = keep_history
        self._handlers: Mapping[str, Callable[[str], Awaitable[None]]] = {
            "model": self._model,
            "node": self._node,
            "set": self._set,
            "show": self._show,
            "save": self._save,
            "load": self._load,
            "clear": self._clear,
            "help": self._help,
            "bye": self._bye,
        }

    async def run(self, name: str, words: str) -> None:
        """Runs the command ``/name words``. Raises GPUMeshError with what is wrong; then nothing has changed."""
        handler = self._handlers.get(_OTHER_NAMES.get(name, name))
        if handler is None:
            error = unknown_choice("command", f"/{name}", list(COMMAND_HELP))
            error.hint = '/help lists the commands; a message that begins with / can be put between """'
            raise error
        await handler(words)

    # -- completion ----------------------------------------------------------------------------------------------

    @property
    def command_help(self) -> Mapping[str, str]:
        """The commands with their ``/``, and a line of help for each."""
        return COMMAND_HELP

    def words_after(self, command: str) -> Sequence[str]:
        """The words that may follow ``/model``, ``/set parameter`` …"""
        choices: Mapping[str, Sequence[str]] = {
            "/model": self._fleet.models.usable,
            "/node": ("auto", *self._fleet.node_names),
            "/set": _SETTINGS,
            "/set parameter": tuple(PARAMETERS),
            "/set think": _THINK_EFFORTS,
        }
        return choices.get(command, ())

    # -- the commands --------------------------------------------------------------------------------------------

    async def _model(self, words: str) -> None:
        """Changes the model; without words, lists the models."""
        await self._fleet.refresh()
        models = self._fleet.models
        if not words:
            lines = [f"{'*' if name == self.conversation.model else ' '} {clean_line(name)}" for name in models.usable]
            self._say("\n".join(lines) or "no node that is up has a model to chat with")
            return
        model = models.find(words)
        if model is None:
            raise models.missing_error(words)
        self.conversation.model = model
        self._say(f"{clean_line(model)} answers from now on")

    async def _node(self, words: str) -> None:
        """Changes the node that answers; without words, lists the nodes."""
        await self._fleet.refresh()
        names = self._fleet.node_names
        if not words:
            current = self.conversation.node
            lines = [f"{'*' if current is None else ' '} auto  the best node for each message"]
            lines += [f"{'*' if name == current else ' '} {text}" for name, text in self._fleet.describe_nodes()]
            self._say(clean_text("\n".join(lines)))
        elif words == "auto":
            self.conversation.node = None
            self._say("the best node for each message answers from now on")
        elif words in names:
            self.conversation.node = words
            self._say(f"only {words} answers from now on")
        else:
            raise unknown_choice("node", words, ("auto", *names))

    async def _set(self, words: str) -> None:
        """Changes one of the settings of the chat."""
        setting, _, value = words.partition(" ")
        value = value.strip()
        conversation = self.conversation
        if setting == "parameter":
            self._set_parameter(value)
        elif setting == "system":
            conversation.system = unquote(value) or None
            self._say("there is no system message now" if conversation.system is None else "the system message is set")
        elif setting == "think":
            if value and value not in _THINK_EFFORTS:
                raise unknown_choice("effort", value, _THINK_EFFORTS)
            conversation.think = value or True
            self._say("the model thinks before it answers, if it can")
        elif setting == "nothink":
            conversation.think = False
            self._say("the model answers without thinking")
        elif setting in ("history", "nohistory"):
            self._keep_history(setting == "history")
            self._say(f"what is typed is {'kept' if setting == 'history' else 'not kept any more'}")
        elif setting in ("verbose", "quiet"):
            self.is_verbose = setting == "verbose"
        elif not setting:
            raise UsageError("set what?", hint=f"there are: {', '.join(_SETTINGS)}")
        else:
            raise unknown_choice("setting", setting, _SETTINGS)

    def _set_parameter(self, words: str) -> None:
        """Changes a parameter of the model; without a value, removes it; without a name, lists the parameters."""
        name, _, text = words.partition(" ")
        if not name:
            self._say(_in_two_columns(PARAMETERS.items()))
            return
        if name not in PARAMETERS:
            raise unknown_choice("parameter", name, tuple(PARAMETERS))
        text = text.strip()
        if not text:
            self.conversation.options.pop(name, None)
            self._say(f"{name} is what the model has by itself")
            return
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # no JSON, so it is text
            value = text
        if name == "stop":
            value = [value] if isinstance(value, (str, int, float)) else value
        elif not isinstance(value, (int, float)):
            raise UsageError(f"{name} is a number", hint=f"for example /set parameter {name} 1")
        self.conversation.options[name] = value
        self._say(f"{name} is {json.dumps(value, ensure_ascii=False)}")

    async def _show(self, _: str) -> None:
        """Shows the settings of the conversation."""
        conversation = self.conversation
        parameters = [f"{name}={json.dumps(value)}" for name, value in conversation.options.items()]
        think = "as the model does by itself" if conversation.think is None else str(conversation.think)
        rows = (
            ("model", conversation.model),
            ("node", conversation.node or "auto"),
            ("system", conversation.system or "none"),
            ("parameters", ", ".join(parameters) or "none"),
            ("thinking", {"True": "yes", "False": "no"}.get(think, think)),
            ("messages", str(len(conversation.messages))),
        )
        self._say(clean_text(_in_two_columns(rows)))

    async def _save(self, words: str) -> None:
        """Writes the conversation to a file. Asks before it replaces one."""
        path = _path_of(words, "/save")
        text = self.conversation.to_json()
        try:
            try:
                atomic_file.create(path, text)
            except FileExistsError:
                if path.is_dir():
                    raise UsageError(f"{path} is a folder") from None
                if not await self._confirm(f"{clean_line(str(path))} exists; overwrite it?"):
                    self._say(clean_text(f"{path} was left as it is"))
                    return
                atomic_file.replace(path, text)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error
        self._say(clean_text(f"saved to {path}"))

    async def _load(self, words: str) -> None:
        """Continues the conversation of a file. Its model answers, if a node has it."""
        path = _path_of(words, "/load")
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        if len(data) > MAX_FILE_BYTES:
            raise UsageError(f"{path} is too large for a chat")
        loaded = read_conversation(data.decode("utf-8", "replace"), str(path))
        conversation = self.conversation
        conversation.messages, conversation.system = loaded.messages, loaded.system
        conversation.options, conversation.think = loaded.options, loaded.think
        text = f"{len(loaded.messages)} messages from {path}"
        await self._fleet.refresh()
        model = self._fleet.models.find(loaded.model)
        if model is None:
            text += f"; no node has its model {loaded.model}, so {conversation.model} answers"
        else:
            conversation.model = model
            text += f"; {model} answers"
        self._say(clean_text(text))

    async def _clear(self, _: str) -> None:
        self.conversation.messages.clear()
        self._say("what was said is forgotten")

    async def _help(self, _: str) -> None:
        rows = (*COMMAND_HELP.items(), *KEYS_HELP)
        self._say(_in_two_columns(rows))

    async def _bye(self, _: str) -> None:
        self.is_ended = True


def _in_two_columns(rows: Iterable[tuple[str, str]]) -> str:
    """The rows as lines that fit into the terminal, with the second texts below each other."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows) + 2
    columns = max(terminal_columns() - 1, width + 20)
    lines: list[str] = []
    for name, text in rows:
        begin, indent = name.ljust(width), " " * width
        for paragraph in text.splitlines() or [""]:  # a system message may have several lines
            lines += textwrap.wrap(paragraph, columns, initial_indent=begin, subsequent_indent=indent) or [begin]
            begin = indent
    return "\n".join(lines)


def _path_of(words: str, command: str) -> Path:
    """The path after ``/save`` or ``/load``, perhaps between quotes. Raises UsageError if there is none."""
    name = words.strip()
    if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'":
        name = name[1:-1]
    if not name or "\0" in name:
        raise UsageError("which file?", hint=f"{command} chat.json")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # there is no such user
        raise UsageError(f"cannot tell which folder {name.partition('/')[0]} is") from error
