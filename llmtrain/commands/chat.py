"""``llmtrain chat RUN``: talk to a model in the terminal, in the template that it was trained with."""

import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from llmtrain.base.checks import is_unicode, unicode_text
from llmtrain.base.format import visible
from llmtrain.base.invocation import FINISHED, Invocation
from llmtrain.base.process import cache_folder
from llmtrain.data.chat.template import Message
from llmtrain.inference.conversation import Conversation
from llmtrain.run.text_generation import GenerationSettings, check_generates, encoder_of, template_of

COMMANDS = {
    "/reset": "forget the conversation",
    "/save FILE": "append the conversation to a JSONL file, as data=instruction reads it",
    "/system TEXT": "start again with this system message",
    "/undo": "take back the last message and its reply",
    "/retry": "write another reply to the last message",
    "/history": "show the conversation",
    "/help": "show this list",
    "/exit": "leave (also Ctrl-D); Ctrl-C cuts a reply short",
}
LEAVING = ("exit", "quit", "bye")  # typed by people who want to leave; in a file they are messages like any other
HISTORY_LINES = 1000


@dataclass(frozen=True)
class Chat(GenerationSettings):
    """The settings of ``conf/chat.yaml``."""

    template: str | None
    system: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        unicode_text(system=self.system)


def main(settings: Chat, invocation: Invocation) -> int:
    """Read messages and stream replies until the input ends."""
    console = Console(highlight=False, soft_wrap=True)
    with settings.load(invocation.targets[0]) as trained:
        check_generates(trained, invocation.targets[0])
        template = template_of(trained, settings.template, settings.system)
        conversation = Conversation(
            trained.model,
            trained.tokenizer,
            trained.precision,
            template,
            encoder_of(trained, template),
            settings.sampling(),
            settings.max_tokens,
            settings.generator(trained.device),
        )
        if sys.stdin.isatty():
            what = f"{visible(trained.run.name)}, step {trained.state.step:,}"
            reads = f"context {trained.model.context_length:,} tokens"
            console.print(Text(f"{what}, {reads}; /help lists the commands", style="dim"))
        with line_editing() as read:
            while (line := read()) is not None:
                if not line.strip():
                    continue
                if not is_unicode(line):
                    console.print(Text("this line is not UTF-8 text; it was left out", style="yellow"))
                    continue
                if line.strip().lower() in LEAVING and sys.stdin.isatty():
                    console.print(Text("/exit leaves, or Ctrl-D", style="dim"))
                    continue
                if line.startswith("/"):
                    if not obey(line.strip(), conversation, console):
                        break
                    continue
                answer(line, conversation, console)
    return FINISHED


def answer(text: str, conversation: Conversation, console: Console) -> None:
    """Stream the reply to ``text``; Ctrl-C cuts it short."""
    is_terminal = sys.stdout.isatty()
    room = conversation.room
    reply = conversation.reply(text)
    try:
        with contextlib.closing(reply):
            for piece in reply:
                sys.stdout.write(visible(piece) if is_terminal else piece)  # a terminal would obey control characters
                sys.stdout.flush()
    except KeyboardInterrupt:
        console.print(Text(" …", style="dim"), end="")
    sys.stdout.write("\n\n" if is_terminal else "\n")
    if conversation.room < 0 <= room:
        reads = f"{conversation.model.context_length:,} tokens"
        message = f"longer than the {reads} that the model reads: it no longer sees the beginning; /reset starts again"
        console.print(Text(message, style="yellow"))


def obey(line: str, conversation: Conversation, console: Console) -> bool:
    """Carry out a line that begins with a slash; return whether the conversation continues."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    match command:
        case "/exit" | "/quit":
            return False
        case "/reset":
            conversation.reset()
            console.print(Text("forgotten", style="dim"))
        case "/system" if argument:
            conversation.messages = [Message("system", argument)]
            console.print(Text("starting again", style="dim"))
        case "/undo" if any(message.role == "user" for message in conversation.messages):
            console.print(Text(f"taken back: {visible(take_back(conversation))}", style="dim"))
        case "/retry" if any(message.role == "user" for message in conversation.messages):
            answer(take_back(conversation), conversation, console)
        case "/undo" | "/retry":
            console.print(Text("nothing was said yet", style="yellow"))
        case "/save" if argument:
            if not conversation.messages:
                console.print(Text("nothing was said yet, nothing is saved", style="yellow"))
                return True
            try:
                conversation.save(str(Path(argument).expanduser()))
            except (OSError, ValueError) as error:
                reason = f"{argument}: {error.strerror}" if isinstance(error, OSError) else str(error)
                console.print(Text(visible(f"{reason}; nothing was saved"), style="yellow"))
            else:
                console.print(
                    Text(f"{len(conversation.messages)} messages appended to {visible(argument)}", style="dim")
                )
        case "/save":
            console.print(Text("/save FILE: a name is missing", style="yellow"))
        case "/system":
            console.print(Text("/system TEXT: a text is missing", style="yellow"))
        case "/history":
            if not conversation.messages:
                console.print(Text("nothing was said yet", style="yellow"))
            for message in conversation.messages:
                console.print(Text.assemble((f"{message.role}: ", "bold"), visible(message.text)))
        case _:
            if command not in ("/help", "/?"):
                console.print(Text(f"{visible(line)}: no such command", style="yellow"))
            for name, meaning in COMMANDS.items():
                console.print(Text.assemble((f"  {name:<14}", "bold"), meaning))
    return True


def take_back(conversation: Conversation) -> str:
    """Drop the user's last message and all that follows it; return its text."""
    last = max(at for at, message in enumerate(conversation.messages) if message.role == "user")
    text = conversation.messages[last].text
    conversation.messages = conversation.messages[:last]
    return text


@contextlib.contextmanager
def line_editing() -> Iterator:
    """A function that reads a line, None at the end; in a terminal with editing and the history of earlier sessions."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line in another encoding must not end the conversation
    if not sys.stdin.isatty():
        yield lambda: next((line.rstrip("\n") for line in sys.stdin), None)
        return
    try:
        import readline
    except ImportError:  # a Python without readline: lines can still be typed
        yield lambda: _input()
        return
    history = cache_folder() / "chat_history"
    with contextlib.suppress(OSError):  # no history yet
        readline.read_history_file(history)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield lambda: _input()
    finally:
        with contextlib.suppress(OSError):  # a history that cannot be written is no loss
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)


def _input() -> str | None:
    while True:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:  # drop the line that is being typed
            print()
