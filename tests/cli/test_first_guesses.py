"""What people type first who know kubectl, ollama, docker, ssh and gh. Nothing runs: the words are only understood."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from typer.main import get_command

from gpumesh.cli.command_group import COMMANDS
from gpumesh.cli.first_guesses.options import OPTION_POINTERS
from gpumesh.cli.first_guesses.words import ALIASES, POINTERS
from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.root_command import app
from gpumesh.errors import UsageError
from tests.cli.in_process import invoke

# A guess, and the command that it runs; after "?", the command that the answer names.
GUESSES = """
# kubectl
get nodes                           status
get node                            status
get no                              status
get node iceland                    status iceland
get node/iceland                    status iceland
get nodes -o wide                   status
get nodes -o json                   status
get nodes -o yaml                   status
get nodes -o name                   status
get nodes -w                        status
get nodes -l site=home              status
get pods                            status
get po                              status
get pods -A                         status
get pods --all-namespaces           status
get all                             status
get gpus                            status
get svc                             status
get models                          models list
get models -o json                  models list
get events                          logs
get configmap                       config show
get secrets                         ? status
get deployments                     ? status
get                                 ? status
describe iceland                    describe iceland
describe node iceland               describe iceland
describe nodes iceland              describe iceland
describe node/iceland               describe iceland
describe pod iceland -o yaml        describe iceland
logs                                logs
logs iceland                        logs iceland
logs -f                             logs
logs -f iceland                     logs iceland
logs node/iceland                   logs iceland
logs --tail 20                      logs
logs --tail=20 iceland              logs iceland
logs --since 1h                     logs
logs --since=10m -f iceland         logs iceland
logs --previous                     ? logs
logs -p                             ? logs
logs --timestamps                   ? logs
logs --watch                        ? logs
exec iceland -- nvidia-smi          exec iceland
exec node/iceland -- ls             exec iceland
exec iceland vengeance -- uptime    exec iceland
exec --all -- df -h /               exec
exec -it iceland -- bash            ? ssh
exec -ti iceland bash               ? ssh
exec -i -t iceland -- sh            ? ssh
exec --tty iceland -- sh            ? ssh
top                                 status
top nodes                           status
top node                            status
top node iceland                    status iceland
top pods                            status
cordon iceland                      drain iceland
uncordon iceland                    resume iceland
drain iceland                       drain iceland
drain node/iceland                  drain iceland
drain iceland --ignore-daemonsets   ? drain
taint node iceland x=y              ? node edit
apply -f mesh.yaml                  ? reload
create -f mesh.yaml                 ? models sync
delete node iceland                 ? node rm
delete pod iceland                  ? node rm
edit node iceland                   ? node edit
patch node iceland                  ? node edit
replace -f mesh.yaml                ? node edit
set image x                         ? node edit
label node iceland site=home        ? node edit
annotate node iceland a=b           ? node edit
scale --replicas 2 x                ? reload
autoscale x                         ? reload
rollout restart x                   ? reload
rollout status                      ? reload
port-forward iceland 8888:8888      ? ssh
port-forward node/iceland 8888      ? ssh
proxy                               ? ssh
expose iceland                      ? up
cp iceland:/x .                     ? models sync
attach iceland                      ? ssh
debug node/iceland                  ? doctor
config view                         config show
config show                         config show
config get-contexts                 ? config check
config use-context home             ? config check
config current-context              ? config check
config set x y                      ? node edit
cluster-info                        status
version                             version
version -o json                     version
version --client                    ? version
wait --for=condition=Ready x        ? status --check
diff                                audit
explain same-gpu                    explain
auth can-i get pods                 ? env
completion bash                     completion
completion zsh                      completion
# ollama
serve                               up
list                                models list
ls                                  models list
ps                                  status
pull qwen2.5:7b                     models pull
pull qwen2.5:7b --all               models pull
rm qwen2.5:7b                       models rm
stop qwen2.5:7b                     models unload
show qwen2.5:7b                     ? models
show --modelfile qwen2.5:7b         ? models
cp a b                              ? models sync
create mine -f Modelfile            ? models sync
push me/mine                        ? models sync
run qwen2.5:7b                      run
run qwen2.5:7b hi                   run
run qwen2.5:7b 'Why is it blue?'    run
run -m qwen2.5:7b hi                run
run qwen2.5:7b --verbose            run
ollama list                         models list
ollama ps                           status
signin                              ? ssh
embed x                             ? env
chat                                chat
chat qwen2.5:7b                     chat
qwen2.5:7b                          ? run
load qwen2.5:7b                     models load
unload qwen2.5:7b                   models unload
model list                          models list
models ls                           models list
models list                         models list
models ps                           models list
models show                         models list
models rm qwen2.5:7b                models rm
models remove qwen2.5:7b            models rm
models delete qwen2.5:7b            models rm
models download qwen2.5:7b          models pull
models stop qwen2.5:7b              models unload
models cp a b                       ? models sync
models create mine                  ? models sync
models run qwen2.5:7b               ? run
models --json                       models
models -o yaml                      models
sync --from iceland                 models sync
download qwen2.5:7b                 models pull
# docker and docker compose
ps -a                               status
ps --all                            status
ps -q                               status
images                              models list
rmi qwen2.5:7b                      models rm
run -it qwen2.5:7b                  ? chat
run --rm x                          ? chat
stats                               status
stats --no-stream                   ? status
info                                ? status
system info                         ? status
inspect iceland                     describe iceland
compose up                          up
compose up -d                       up
compose down                        down
compose ps                          status
compose logs -f                     logs
container ls                        status
image ls                            models list
kubectl get nodes                   status
status all                          status
up                                  up
up -d                               up
up --build                          ? up
up --wait                           ? up
down                                down
down -v                             down
down --remove-orphans               ? down
start                               up
start iceland                       ? up
stop                                down
stop iceland                        ? down
kill                                ? down
kill iceland                        ? down
restart                             ? reload
restart iceland                     ? reconnect
pause iceland                       drain iceland
unpause iceland                     resume iceland
rm iceland                          ? node rm
build .                             ? models sync
tag a b                             ? node edit
login                               ? ssh
logout                              ? ssh
search llama                        ? models pull
port iceland                        ? up
events                              logs
# ssh
ssh iceland                         ssh iceland
ssh iceland nvidia-smi              ssh iceland
ssh iceland -- ls -la               ssh iceland
ssh iceland ls -la                  ? ssh
ssh -L 8888:localhost:8888 iceland  ssh iceland
ssh -v iceland                      ssh iceland
ssh -p 17445 root@1.2.3.4           ? node edit
ssh -J gate iceland                 ? node edit
ssh -i ~/.ssh/id iceland            ? node edit
ssh -N -L 1:localhost:1 iceland     ? ssh
'ssh root@1.2.3.4 -p 17445'         ? node add
root@1.2.3.4                        ? node add
shell iceland                       ssh iceland
sh iceland                          ssh iceland
connect iceland                     ? reconnect
connect                             ? up
login iceland                       ? ssh
scp iceland:x .                     ? ssh
sftp iceland                        ? ssh
rsync iceland:x .                   ? ssh
ssh-copy-id iceland                 ? trust
ssh-keyscan iceland                 ? trust
tunnel                              ? up
tunnels                             ? up
forward 8888                        ? ssh
# gh and git
auth login                          ? ssh
auth status                         ? ssh
browse                              ui
config list                         config show
config get x                        ? config show
config edit                         ? node edit
completion -s bash                  ? completion
api /api/tags                       ? env
codespace ssh                       ? ssh
secret list                         ? config show
# nvitop, nvidia-smi, k9s, systemctl
nvidia-smi                          status
nvtop                               status
nvitop                              status
htop                                status
gpus                                status
monitor                             status
watch                               status
reload                              reload
service install                     service install
service status                      service status
service start                       ? up
service logs                        ? logs
status iceland                      status iceland
status -A                           ? status
status --all                        ? status
status -f                           ? status
status --watch                      status
status nodes                        status
enable iceland                      ? resume
disable iceland                     ? drain
daemon                              ? service install
metrics                             ? env
# words of nobody in particular
nodes                               status
hosts                               status
add root@1.2.3.4                    ? node add
add                                 ? init
remove iceland                      ? node rm
new                                 ? init
setup                               ? init
configure                           ? node edit
update                              ? reload
upgrade                             ? version
install                             ? version
node add 'ssh root@1.2.3.4'         node add
node rm iceland                     node rm iceland
node list                           node list
node ls                             node list
node remove iceland                 node rm iceland
node delete iceland                 node rm iceland
node status                         ? status
node ssh iceland                    ? ssh
test                                ? status --check
ping iceland                        ? status --check
check                               ? status --check
health                              status
config validate                     config check
config path                         ? doctor
validate                            config check
context                             ? config check
use home                            ? config check
keys                                ? config show
token                               ? env
queue                               ? logs --access
history                             ? logs --access
usage                               usage
usage --by key                      usage
ui                                  ui
web                                 ui
open                                ui
dashboard                           ui
doctor                              doctor
env                                 env
benchmark                           bench --help
bench start                         bench run
generate 'Why is the sky blue?'     run
ask 'Why is the sky blue?'          run
'Why is the sky blue?'              ? run
same-gpu                            ? explain
docs                                ? help
man                                 help
help                                help
help models                         help
models help                         ? help models
-v                                  --version
-V                                  --version
--version                           --version
-h                                  --help
--help                              --help
-help                               --help
-?                                  --help
/?                                  --help
status -h                           status --help
status --help                       status --help
status -?                           status --help
models -h                           models --help
--json status                       ? status
--watch                             ? help
-n ns get pods                      ? help
exec pod -- ls                      exec pod
logs pod -n 50                      logs pod
logs pod                            logs pod
models list -help                   models list --help
# pools
pools                               pool status
get pools                           pool status
pool ls                             pool status
pool show big                       pool status big
pool start big                      pool up big
pool load big                       pool up big
pool stop big                       pool down big
pool rm big                         pool down big
pool check big                      pool plan big
pool restart big                    ? pool down
pool add big                        ? pool plan
pool logs                           ? logs
pool up -d big                      ? pool up
pool status -w                      ? status
batches                             batch list
batch ls                            batch list
batch create prompts.jsonl          batch submit prompts.jsonl
batch status                        batch show
batch watch                         batch show
batch download batch_1              batch results batch_1
batch errors batch_1                batch results batch_1
batch resume batch_1                batch retry batch_1
batch stop batch_1                  batch cancel batch_1
batch delete batch_1                batch rm batch_1
batch pause batch_1                 ? batch cancel
batch show -f batch_1               ? batch show
batch submit -f prompts.jsonl       ? batch submit
"""
ROWS = [
    tuple(re.split(r"\s{2,}", line, maxsplit=1)) for line in GUESSES.strip().splitlines() if not line.startswith("#")
]


@pytest.fixture(autouse=True)
def no_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUMESH_CONFIG", "/no/mesh.yaml")


@pytest.fixture(scope="module")
def root() -> Any:
    return get_command(app)


def understand(root: Any, words: list[str]) -> tuple[list[str], Any]:
    """The commands that the words lead to, and the values of the last one. Raises what the command line would say."""
    path: list[str] = []
    context, command, rest = None, root, words
    while True:
        context = command.make_context(path[-1] if path else "gpumesh", rest, parent=context, obj=GlobalOptions())
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not hasattr(command, "commands") or not rest:
            return path, context.params
        name, command, rest = command.resolve_command(context, rest)
        path.append(name)


def problem_of(root: Any, guess: str, expected: str) -> str | None:
    """What is wrong with the answer to a guess; ``None`` if it is right."""
    names_command = expected.startswith("? ")
    wanted = expected.removeprefix("? ")
    try:
        path, values = understand(root, shlex.split(guess))
    except UsageError as error:
        assert error.hint is not None
        assert error.exit_code == 2
        right = names_command and re.search(rf"`gpumesh {re.escape(wanted)}\b", error.hint)
        return None if right else f"it is answered: {error.message}: {error.hint}"
    except BaseException as error:
        if type(error).__name__ in ("Exit", "NoArgsIsHelpError"):  # what they print is printed
            return None if wanted.endswith(("--help", "--version")) else "it printed something and ended"
        return f"{type(error).__name__}: {error}"
    if names_command:
        return f"it runs {path}"
    named = [
        str(name) for value in values.values() for name in (value if isinstance(value, (list, tuple)) else [value])
    ]
    *commands, last = wanted.split()
    if (path == wanted.split() and not values.get("nodes")) or (path == commands and last in named):
        return None
    return f"it runs {path} with {values}"


def test_each_guess_works_or_is_answered_with_the_command_that_does(root: Any) -> None:
    assert len({guess for guess, _ in ROWS}) == len(ROWS) >= 200
    problems = {guess: problem_of(root, guess, expected) for guess, expected in ROWS}
    assert {guess: problem for guess, problem in problems.items() if problem is not None} == {}


def test_what_a_person_sees() -> None:
    assert invoke("metrics", code=2).err.splitlines() == [
        "error: there is no command 'gpumesh metrics'",
        f"hint: {POINTERS[()]['metrics']}",
    ]
    assert "`gpumesh ssh NODE -- CMD`" in invoke("exec", "-it", "iceland", "bash", code=2).err
    assert invoke("help", "get", "nodes").out == invoke("status", "--help").out


def test_guesses_are_no_commands() -> None:
    """A guess that became a command, or that stands in both tables, is never answered."""
    assert not set(ALIASES[()]) & set(COMMANDS)
    assert not set(POINTERS[()]) & set(COMMANDS)
    for path, words in ALIASES.items():
        assert not set(words) & set(POINTERS.get(path, {}))


def test_the_commands_that_answers_name_exist(root: Any) -> None:
    sentences = [*OPTION_POINTERS.values(), *(text for table in POINTERS.values() for text in table.values())]
    for sentence in set(sentences):
        named = re.findall(r"`gpumesh ([^`]+)`", sentence)
        assert named, sentence
        for command in named:
            if command == "--config FILE …":  # any command
                continue
            words = shlex.split(command.replace("…", "X"))
            try:
                understand(root, words)
            except Exception as error:
                assert type(error).__name__ == "MissingParameter", f"{command}: {error}"


def test_a_node_of_the_mesh(root: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "mesh.yaml"
    config.write_text("nodes: [{name: iceland, backend: {url: http://127.0.0.1:1}}]")
    monkeypatch.setenv("GPUMESH_CONFIG", str(config))
    with pytest.raises(UsageError) as caught:
        understand(root, ["iceland"])
    assert caught.value.hint is not None
    assert "`gpumesh describe iceland`" in caught.value.hint
    config.write_text("nodes: [{name: pod, backend: {url: http://127.0.0.1:1}}]")
    for words in (["exec", "pod", "ls"], ["logs", "pod", "gone"], ["status", "pod"], ["describe", "pod", "-o", "json"]):
        _, values = understand(root, words)
        assert "pod" in (values.get("nodes") or values["words"]), "a node may be called so"
    with pytest.raises(Exception, match="No such command"):
        understand(root, ["greenland"])


def test_the_usual_way_imports_no_guesses() -> None:
    import subprocess
    import sys

    script = (
        "import sys; from gpumesh.cli.root_command import app; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['status', '--help']).exit_code == 0\n"
        "assert not [name for name in sys.modules if 'first_guesses' in name]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
