"""The language of chat templates: Jinja in its sandbox, with what transformers adds to it.

A template is a program that comes with a model. The sandbox keeps it from files and from Python, but not from loops
within loops, macros that call themselves and texts that double at each step. So this file is run as a process of its
own, by chat.py, in which the operating system bounds seconds and memory.
"""

import json
import resource
import sys
from contextlib import suppress
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}`, by which templates mark what an assistant wrote: shown as it is."""

    tags = {"generation"}  # noqa: RUF012 – declared by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What is inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    """What templates call where messages are not as they want them."""
    raise ValueError(message)


def render(source: str, variables: dict[str, Any]) -> str:
    """What a template makes of its variables. It may fail in any way that a program may."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.globals["raise_exception"] = _raise
    return environment.from_string(source).render(variables)


def _bound_this_process(seconds: int, n_bytes: int) -> None:
    """End this process after so many seconds of computing; let it have no more memory than this, and dump no core."""
    bounds = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_AS: (n_bytes, n_bytes),
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, bound in bounds.items():
        with suppress(ValueError, OSError):  # where it is bounded by less already, or a system knows no such bound
            resource.setrlimit(kind, bound)


def main() -> None:
    """Render a template with each of several sets of variables, all read from standard input, within bounds.

    To standard output goes {"texts": […]}, or {"fault": why there are none}, as JSON.
    """
    asked = json.load(sys.stdin)
    _bound_this_process(asked["seconds"], asked["n_bytes"])
    answer: dict[str, Any]
    try:
        answer = {"texts": [render(asked["source"], variables) for variables in asked["calls"]]}
        if any(len(text) > asked["n_characters"] for text in answer["texts"]):
            raise ValueError(f"it writes more than {asked['n_characters']:,} characters")
    except MemoryError:
        answer = {"fault": None}
    except Exception as error:
        answer = {"fault": f"{error}" or type(error).__name__}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
