"""From torch modules to artifacts: graphs, exact rewrites, one file per format, and the pipeline.

The package is callable, because ``pocketsam.export`` is both this package and the public verb
``pocketsam.export(...)``: importing a submodule would otherwise replace the function by the module.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See :func:`pocketsam.api.export`."""
        from pocketsam.api import export

        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
