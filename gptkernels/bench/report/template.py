"""The templates of pages, and the style that all pages share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2

from gptkernels.bench import text

_HERE = "gptkernels.bench.report"  # style.html.j2


def template(package: str, name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """The template `name` of `package`, which may include `style.html.j2`, with these filters and
    `seconds`. A name that it is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(p, ".") for p in (package, _HERE)]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters, seconds=text.seconds)
    return environment.get_template(name)
