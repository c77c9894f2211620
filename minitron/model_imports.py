"""The import of transformers' models without libraries that language models do not use.

`transformers.modeling_utils` imports scipy for the losses of object detection and torchao for checkpoints in its format: a
seventh of the start of a process with a model. Here they wait until a function of theirs is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

DEFERRED = {
    "scipy.optimize": ("linear_sum_assignment",),
    "torchao.prototype.safetensors.safetensors_support": ("flatten_tensor_state_dict", "unflatten_tensor_state_dict"),
}
"""Functions that transformers imports when models are imported, by module."""


@cache
def import_models() -> None:
    """Import what the models of transformers have in common. To be called before anything else that imports them; later it
    changes nothing."""
    deferred = [_Deferred(name, functions) for name, functions in DEFERRED.items() if name not in sys.modules]
    sys.modules.update({module.__name__: module for module in deferred})
    try:
        import_module("transformers.modeling_utils")
    finally:
        for module in deferred:
            module.withdraw()


class _Deferred(ModuleType):
    """Stands in `sys.modules` for a module from which functions are imported: each imports the module when it is called.

    Any other name, for which another thread may ask meanwhile, imports it at once.
    """

    def __init__(self, name: str, functions: tuple[str, ...]) -> None:
        super().__init__(name)
        for function in functions:
            setattr(self, function, self._calling(function))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by the import system
            raise AttributeError(name)
        return getattr(self._module(), name)

    def withdraw(self) -> None:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]

    def _calling(self, function: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            return getattr(self._module(), function)(*arguments, **named)

        return call

    def _module(self) -> ModuleType:
        self.withdraw()
        return import_module(self.__name__)
