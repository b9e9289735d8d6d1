"""`hydra-rlhf chat`: its options, and the conversation at a terminal. Imports torch only when it runs."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_rlhf.cli_evaluation import RUN, add_checkpoint_option, add_trust_option, positive_int
from hydra_rlhf.errors import DataError, HydraError

if TYPE_CHECKING:
    from hydra_rlhf.data.rows import Message, PromptValue
    from hydra_rlhf.reporting.chat_view import LiveView, PlainView, View
    from hydra_rlhf.stages.chat import Speakers, Turn

DESCRIPTION = """\
Talk to a finished run: actor and reference (LoRA on and off) answer side by side, from one set of weights, token by
token, with the reward head's score of each. Both draw with the same random numbers. At a terminal it is a conversation
where the run's prompts have a chat template, else one prompt after the other; /help lists its commands. With --prompt,
or with prompts on standard input (one a line), it answers each by itself and ends."""
COMMANDS = {
    "/help": "this list",
    "/keep actor|reference": "whose last answer stays in the conversation (at first the actor's)",
    "/reset": "begin a new conversation",
    "/example": "ask the next of the run's held-out prompts, in a new conversation",
    "/temperature 0.7": "sample at another temperature; 0 always takes the likeliest token",
    "/max-tokens 64": "end responses after so many tokens",
    "/quit": "leave (also Ctrl-D)",
}
KEYS = (
    "Ctrl-C stops a response, and leaves where there is none to stop. A line that ends in \\ goes on in the next one; "
    "a prompt that begins with / needs a space before it."
)


def add_chat_command(commands: Any) -> None:
    """`chat` with its arguments."""
    text = "talk to actor and reference side by side, token by token, with scores"
    command = commands.add_parser("chat", help=text, description=DESCRIPTION)
    command.add_argument("run", type=Path, help=RUN)
    command.add_argument("--prompt", action="append", metavar="TEXT", help="answer this and end (repeatable)")
    command.add_argument(
        "--temperature", type=temperature, metavar="T", help="0 = the likeliest token (default: as in PPO)"
    )
    command.add_argument("--max-tokens", type=positive_int, metavar="N", help="of each response (default: as in PPO)")
    command.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    add_checkpoint_option(command)
    command.add_argument("--json", action="store_true", help="one JSON object a line for each prompt")
    add_trust_option(command)
    command.set_defaults(command=chat)


def temperature(text: str) -> float:
    """A sampling temperature, for argparse."""
    value = float(text)
    if value != 0 and not 1e-3 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is neither 0 nor at least 0.001")
    return value


def chat(args: argparse.Namespace) -> None:
    """`chat`: a conversation at a terminal, else an answer to each prompt given."""
    from hydra_rlhf.reporting.chat_view import JsonView, view_for
    from hydra_rlhf.stages.chat import open_speakers

    speakers = open_speakers(
        args.run,
        checkpoint=args.checkpoint,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        seed=args.seed,
        trust_remote_code=args.trust_remote_code,
    )
    view = view_for(as_json=args.json)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if args.prompt is None and at_terminal and not isinstance(view, JsonView):
        with terminated_as_an_exit():
            Conversation(speakers, view).hold()
        return
    try:
        for number, prompt in enumerate(args.prompt or lines_of_standard_input()):
            answer(speakers, view, speakers.begin(prompt, number))
    except BrokenPipeError as error:  # who reads the answers wants no more of them
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain when it closes standard output
        raise SystemExit(1) from error


def answer(
    speakers: "Speakers",
    view: "View",
    turn: "Turn",
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Let the roles respond until they end or are `stopped`, then let the reward head look, all in sight of `view`."""
    with view.watching(turn) as update:
        for _ in speakers.rounds(turn):
            update()
            if stopped():
                break
        speakers.judge(turn)


def lines_of_standard_input() -> Iterator[str]:
    """A prompt a line; empty ones are left out. Raises `DataError`."""
    try:
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 ({error}); convert it") from error


@dataclass(slots=True)
class Conversation:
    """What is asked and answered at a terminal. Both roles see the same history."""

    speakers: "Speakers"
    view: "LiveView | PlainView"
    history: "list[Message]" = field(default_factory=list)
    last: "Turn | None" = None
    """The turn whose answers `/keep` chooses between."""
    num_asked: int = 0
    examples: "Iterator[PromptValue] | None" = None

    def hold(self) -> None:
        """Read and answer until the user leaves. KeyboardInterrupt where Ctrl-C finds no response to stop."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` its line editing)
        self.greet()
        while True:
            try:
                line = read_prompt()
            except EOFError:
                print()  # the shell's next prompt begins a line of its own
                return
            if line.strip() == "/quit":
                return
            try:
                if line.startswith("/"):
                    self.obey(line)
                elif line.strip():
                    self.say(line)
            except HydraError as error:  # of this prompt or command; the next one may be better
                self.view.tell(f"{type(error).__name__}: {error}")

    def greet(self) -> None:
        """Who answers, and how."""
        speakers, sampling = self.speakers, self.speakers.sampling
        kind = "a conversation" if speakers.takes_conversations else "each prompt by itself (no chat template)"
        self.view.tell(
            f"{speakers.recipe.name} ({speakers.recipe.method}), {speakers.checkpoint}: {' and '.join(speakers.roles)} "
            f"at temperature {sampling.temperature:g}, up to {sampling.max_response_tokens} tokens; {kind}. "
            "/help lists commands."
        )

    def say(self, text: str) -> None:
        """Ask something, after all that was said before where there is a template for that."""
        if self.speakers.takes_conversations:
            self.ask([*self.history, {"role": "user", "content": text}])
        else:
            self.ask(text)

    def ask(self, prompt: "PromptValue") -> None:
        """Show the answers to a prompt, and keep the actor's."""
        turn = self.speakers.begin(prompt, self.num_asked)
        self.num_asked += 1
        with first_interrupt_only_asks() as stopped:
            answer(self.speakers, self.view, turn, stopped=stopped)
        self.last = turn
        self.keep(next(iter(turn.answers)))

    def keep(self, role: str) -> None:
        """Make a role's last answer the one that the conversation goes on from."""
        if self.last is not None and not isinstance(self.last.prompt, str):
            said: Message = {"role": "assistant", "content": self.last.answers[role].text}
            self.history = [*self.last.prompt, said]

    def obey(self, line: str) -> None:
        """One command. What is wrong with it is told, not raised."""
        name, _, value = line.strip().partition(" ")
        if name == "/help":
            for command, text in COMMANDS.items():
                self.view.tell(f"{command:22} {text}")
            self.view.tell(KEYS)
        elif name == "/reset":
            self.history, self.last = [], None
            self.view.tell("a new conversation")
        elif name == "/example":
            self.ask_example()
        elif name == "/keep":
            self.choose(value.strip())
        elif name in ("/temperature", "/max-tokens"):
            self.set_sampling(name, value.strip())
        else:
            self.view.tell(
                f"{name} is no command; /help lists them. A prompt that begins with / needs a space before it."
            )

    def choose(self, role: str) -> None:
        """`/keep`, if there is something to choose."""
        if not self.speakers.takes_conversations:
            self.view.tell("nothing to keep: each prompt is answered by itself")
        elif self.last is None:
            self.view.tell("nothing to keep: nothing was answered yet")
        elif role not in self.last.answers:
            self.view.tell(f"/keep {role}: choose one of {', '.join(self.last.answers)}")
        else:
            self.keep(role)
            self.view.tell(f"the conversation goes on from the {role}'s answer")

    def set_sampling(self, name: str, value: str) -> None:
        """`/temperature` and `/max-tokens`, from the next prompt on."""
        try:
            if name == "/temperature":
                self.speakers = self.speakers.changed(temperature=temperature(value))
            else:
                self.speakers = self.speakers.changed(max_tokens=positive_int(value))
        except (ValueError, argparse.ArgumentTypeError):
            self.view.tell(f"{name} {value}: give a number, e.g. {next(c for c in COMMANDS if c.startswith(name))}")
        else:
            self.view.tell(f"{name.removeprefix('/')} {value} from here on")

    def ask_example(self) -> None:
        """`/example`: held-out prompts in the order of the data, and again from the first."""
        if self.examples is None:
            prompts = self.speakers.examples()
            self.examples = (prompts[i % len(prompts)] for i in range(sys.maxsize))
        prompt: PromptValue = next(self.examples)
        if isinstance(prompt, str) and self.speakers.takes_conversations:
            prompt = [{"role": "user", "content": prompt}]
        said = [prompt] if isinstance(prompt, str) else [f"{turn['role']}: {turn['content']}" for turn in prompt]
        self.view.tell("\n".join(said))
        self.ask(prompt)


def read_prompt() -> str:
    """What the user types: a line, with those after it as long as they end in a backslash. EOFError at the end."""
    try:
        lines = [input("you> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input("...> "))
    except KeyboardInterrupt:
        print()
        raise
    return "\n".join(lines)


@contextlib.contextmanager
def first_interrupt_only_asks() -> Iterator[Callable[[], bool]]:
    """While entered, the first Ctrl-C is only remembered (the function given says so); the next one is as ever."""
    asked = False

    def remember(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            signal.default_int_handler(number, frame)
        asked = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def terminated_as_an_exit() -> Iterator[None]:
    """While entered, SIGTERM unwinds the program, so that the terminal gets its cursor back."""

    def leave(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
