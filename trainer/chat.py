"""The chat stage: a conversation in the terminal, or over a pipe, with any Hugging Face model folder."""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .disk import write_text
from .generate import check_folders, load_for_generation, stream_answer
from .model import DTYPES
from .report_terminal import printable
from .spec import TrainError
from .template import load_template
from .template_difference import template_difference

COMMANDS = """\
/reset          forget the conversation
/system TEXT    set the system prompt and start over; without TEXT, show it
/save FILE      write this session's conversations as JSON lines (OpenAI messages), ready to train on
/help           this list
/exit           leave (so do Ctrl-D, and Ctrl-C at the prompt; Ctrl-C stops an answer)"""

Stream = Callable[[list[tuple[str, str]]], Iterable[str]]
"""Messages to the pieces of an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `-m trainer.worker chat`."""
    parser.add_argument("--model", required=True, help="Hugging Face model folder, such as merged/ of a run")
    parser.add_argument("--adapter", help="PEFT adapter folder on top of the model")
    parser.add_argument(
        "--template",
        default="model",
        help="chat template: model (the tokenizer's own), a template's name or a Jinja file",
    )
    parser.add_argument("--system", help="system prompt; default: the template's own behaviour")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer, in tokens")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: always the likeliest token; above: more variety"
    )
    parser.add_argument("--seed", type=int, help="makes answers at a temperature above 0 repeatable")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="number format of the model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def run(args: argparse.Namespace) -> None:
    """Chat until /exit or the end of the input. Raises KeyboardInterrupt for Ctrl-C at the prompt, TrainError for bad folders."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # A parent that ignores Ctrl-C, to leave it to the chat, has passed that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if args.temperature < 0:
        raise TrainError(f"--temperature {args.temperature:g} is negative", "Give 0 (greedy) or more, for example 0.7.")
    check_folders(args.model, args.adapter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    template = load_template(args.model, args.template, args.trust_remote_code)
    template.prompt_text([("user", "Hi")])
    if args.template != "model":
        print("\n".join(template_difference(template, args.template)), flush=True)
    model = load_for_generation(args.model, DTYPES[args.dtype], device, args.adapter, args.trust_remote_code)
    limit = getattr(model.config, "max_position_embeddings", None)

    def stream(messages: list[tuple[str, str]]) -> Iterable[str]:
        length = len(template.prompt_ids(messages))
        if limit is not None and length + 1 > limit:
            raise TrainError(
                f"the conversation is {length} tokens long, the model can read {limit}", "Start over with /reset."
            )
        room = args.max_new_tokens if limit is None else min(args.max_new_tokens, limit - length)
        return stream_answer(model, template, messages, room, args.temperature, args.seed)

    converse(Session(stream, args.system), f"{args.model} on {device}. /help lists the commands.")


def converse(session: Session, greeting: str) -> None:
    """Read lines and answer them, on a terminal with editing and history, else line by line without prompts."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # gives input() editing and history

        print(greeting)
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    while True:
        try:
            line = input("\n> ") if interactive else _read_line()
        except EOFError:
            return
        if not session.handle(line.strip()):
            return


def _read_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


class Session:
    """The conversation so far and what was said before it; `handle` takes one line of the user."""

    def __init__(self, stream: Stream, system: str | None) -> None:
        self.stream = stream
        self.system = system
        self.messages: list[tuple[str, str]] = []
        """User and assistant turns in pairs, without the system prompt."""
        self.finished: list[str] = []
        """Earlier conversations of this session, each as a line of JSON."""
        self.files: set[Path] = set()
        """Files that this session has written, and may write again."""

    def handle(self, line: str) -> bool:
        """Obey a command or answer a question, on stdout. Returns False when the chat is over."""
        if line.startswith("/"):
            return self._command(line)
        if line:
            self._answer(line)
        return True

    def _answer(self, line: str) -> None:
        messages = [*self._system_turn(), *self.messages, ("user", line)]
        pieces: list[str] = []
        try:
            for piece in self.stream(messages):
                pieces.append(piece)
                print(printable(piece), end="", flush=True)
            print(flush=True)
        except TrainError as e:
            print(e, flush=True)
            return
        except KeyboardInterrupt:
            print("\n(stopped; this question and answer are forgotten)", flush=True)
            return
        self.messages += [("user", line), ("assistant", "".join(pieces))]

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/exit":
            return False
        if name == "/reset":
            self._start_over()
            print("(conversation forgotten)")
        elif name == "/system":
            self._set_system(rest)
        elif name == "/save":
            self._save(rest)
        elif name == "/help":
            print(COMMANDS)
        else:
            print(f"unknown command {printable(name)}. Commands:\n{COMMANDS}")
        sys.stdout.flush()
        return True

    def _set_system(self, text: str) -> None:
        if text:
            self._start_over()
            self.system = text
            print("(system prompt set; the conversation starts over)")
        else:
            print("(no system prompt of your own)" if self.system is None else self.system)

    def _save(self, name: str) -> None:
        """Whole file each time: earlier conversations, then the current one; a file of others is never touched."""
        rows = [*self.finished, *self._current_row()]
        path = Path(name).expanduser().resolve()
        if not name:
            print("give a file: /save FILE")
        elif not rows:
            print("nothing to save yet")
        elif path.exists() and path not in self.files:
            print(f"{path} exists and is not of this session; nothing was written. Give another name.")
        elif not path.parent.is_dir():
            print(f"{path.parent} is not a folder; nothing was written")
        else:
            try:
                write_text(path, "".join(row + "\n" for row in rows))
            except TrainError as e:
                print(e)
                return
            self.files.add(path)
            print(f"saved {len(rows)} conversation{'s' if len(rows) > 1 else ''} to {path}")

    def _start_over(self) -> None:
        self.finished += self._current_row()
        self.messages = []

    def _system_turn(self) -> list[tuple[str, str]]:
        return [] if self.system is None else [("system", self.system)]

    def _current_row(self) -> list[str]:
        """The current conversation as one line of JSON, or nothing when it is empty."""
        if not self.messages:
            return []
        turns = [{"role": role, "content": content} for role, content in (*self._system_turn(), *self.messages)]
        return [json.dumps({"messages": turns}, ensure_ascii=False)]
