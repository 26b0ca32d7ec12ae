"""Griffe extension: functions decorated with `takes_options`, as `help` shows them."""

import inspect

import griffe


class TakesOptions(griffe.Extension):
    """Replaces signature and docstring by those at run time.

    The decorator builds both from a dataclass, which reading the source cannot see.
    """

    def on_function(self, *, func, loader, **kwargs):  # noqa: D102
        if not any("takes_options" in str(d.value) for d in func.decorators):
            return
        function = griffe.dynamic_import(func.path)
        func.docstring.value = inspect.getdoc(function)
        func.parameters = griffe.Parameters(
            *[
                griffe.Parameter(
                    p.name,
                    annotation=_annotation(p.annotation),
                    kind=griffe.ParameterKind(p.kind.description),
                    default=None if p.default is p.empty else repr(p.default),
                )
                for p in inspect.signature(function).parameters.values()
            ]
        )


def _annotation(hint):
    """Source-like text of an annotation."""
    return inspect.formatannotation(hint).replace("typing.", "")
