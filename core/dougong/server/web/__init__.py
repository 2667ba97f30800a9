"""The page at ``/``: a chat playground and a live view of the engine. Plain files, nothing from outside."""

from dougong.server.web.routes import router

__all__ = ["router"]
