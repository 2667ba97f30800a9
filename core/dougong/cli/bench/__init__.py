"""``dougong bench``: one command per question, one JSON line each."""

from dougong.cli.bench.app import bench_app

__all__ = ["bench_app"]
