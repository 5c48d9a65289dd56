"""The process that renders foreign chat templates, under limits of memory and processor time.

It is a script of its own, which needs nothing but jinja2: ``python template_process.py CPU_SECONDS MEMORY_BYTES
FOLDER…``, with the folders of jinja2 and markupsafe.  It reads requests from standard input, a line of JSON each, and
answers each with a line.  A request: ``source`` of the template, ``date`` (ISO), and ``renders``, for each rendering
the ``messages`` and the other ``variables``.  An answer: a list of ``{"text"}`` or ``{"error", "message"}`` for each
rendering, or one ``{"damaged"}``.

The environment is that of transformers' ``apply_chat_template``: sandbox, white space, filters, tags and globals.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

OPEN, CLOSE = "\ufdd1", "\ufdd2"  # noncharacters around the text between {% generation %} and {% endgeneration %}
GUARD = "\ufdd0"  # a noncharacter in messages, which splits the names of special tokens
LONGEST = 64_000_000  # characters of a rendering
TEMPLATES = 8  # compiled templates that are kept


class TextTooLong(Exception):
    """A rendering of more than ``LONGEST`` characters."""


def main(cpu_seconds: float, memory_bytes: int) -> None:
    """Answer requests until standard input ends."""
    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_AS, memory_bytes)
    compiled: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        lower(resource.RLIMIT_CPU, math.ceil(time.process_time() + cpu_seconds))
        try:
            answer = json.dumps(respond(json.loads(line), compiled)).encode()
        except MemoryError:
            answer = json.dumps([{"error": "MemoryError", "message": ""}]).encode()
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


def lower(kind: int, value: int) -> None:
    """Set a limit of this process, as far as the limit above it allows."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def respond(request: dict[str, Any], compiled: dict[str, Any]) -> Any:
    """The answer to a request; ``compiled``: templates by their source and date."""
    key = request["source"] + request["date"]
    if key not in compiled:
        try:
            template = compile_template(request["source"], datetime.fromisoformat(request["date"]))
        except (Exception, RecursionError, MemoryError) as error:
            return {"damaged": f"{type(error).__name__}: {error}".rstrip(": ")}
        while len(compiled) >= TEMPLATES:
            compiled.pop(next(iter(compiled)))
        compiled[key] = template
    return [render(compiled[key], each) for each in request["renders"]]


def render(template: Any, job: dict[str, Any]) -> dict[str, str]:
    """Render one conversation; every exception that a template can raise is part of the answer."""
    pieces, length = [], 0
    try:
        for piece in template.generate(messages=job["messages"], **job["variables"]):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST:
                raise TextTooLong(f"more than {LONGEST:,} characters")
        return {"text": "".join(pieces)}
    except Exception as error:
        pieces.clear()
        return {"error": type(error).__name__, "message": str(error)[:2000]}


def compile_template(source: str, now: datetime) -> Any:
    """Compile a template in an environment like that of transformers."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.nodes import CallBlock, Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """The tag ``{% generation %}…{% endgeneration %}`` around the text that the model writes."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Callable[[], str]) -> str:
            return OPEN + caller() + CLOSE

    class PlainNamespace(Namespace):
        """A namespace without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            values = dict(*args[1:], **kwargs)
            for name in values:
                refuse_private(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_private(name)
            Namespace.__setitem__(self, name, value)

    class Dictionary:
        """``dict``, without its attributes."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def refuse_private(name: str) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace must have no attribute {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    environment.globals["namespace"] = PlainNamespace
    environment.globals["dict"] = Dictionary()
    return environment.from_string(source)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """``value`` as JSON, without the HTML escapes of jinja2's own filter; the guard stays one character."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text.replace("\\ufdd0", GUARD) if ensure_ascii else text


if __name__ == "__main__":
    sys.path += sys.argv[3:]
    main(float(sys.argv[1]), int(sys.argv[2]))
