"""The name of the `cache_context` in which a pipeline calls its transformer."""

from typing import Any

from diffusers.hooks.hooks import StateManager


class ContextTracker(StateManager):
    """Keeps the name of the current `cache_context`. Diffusers tells it to every attribute of this type."""

    def __init__(self) -> None:
        super().__init__(None)  # the class of the states, of which there are none here
        self.name: str | None = None

    def set_context(self, context: Any) -> None:
        self.name = getattr(context, "name", context)  # diffusers before 0.41 passes the bare name

    def reset(self) -> None:
        self.name = None
