"""Floor 6: the server. HTTP in this process, the engine in its own.

Importing this package loads no web framework: `dougong.server.run` and `dougong.server.app` do.
"""
