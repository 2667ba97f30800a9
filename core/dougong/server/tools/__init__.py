"""Tool calls: how models write them, found while they stream, and forced where the client asks for one."""

from dougong.server.tools.choose import TOOL_FORMATS, choose_tools
from dougong.server.tools.format import Piece, ToolFormat, ToolParser

__all__ = ["TOOL_FORMATS", "Piece", "ToolFormat", "ToolParser", "choose_tools"]
