"""The language of chat templates: Jinja in its sandbox, with what transformers adds to it."""

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
