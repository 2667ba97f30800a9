"""A vendor's plugin: every hook that existed when its contract was current, with the arguments of that time.

Do not bring this up to date: that it goes on working unchanged is what it is here for. Only when the contract's major
number changes is it written anew, for the new (major, 0).
"""

from dougong.plugins import BackendSpec, KernelSpec, KVConnectorSpec, Probe, hookimpl

ABI = (1, 0)
STEPS = []


def probe():
    return Probe(ok=True, reason="always there", devices=("old:0",))


@hookimpl
def dougong_backends():
    return [BackendSpec(name="old", abi=ABI, target="old_kernels:OldDevice", probe=probe, score=-50)]


@hookimpl
def dougong_kernels(device, backend):
    if backend != "old":
        return []
    return [
        KernelSpec(
            op="attention", provider="old", abi=ABI, target="old_kernels:OldAttention",
            features=frozenset({"window", "strided"}), layouts=("nhd",), dtypes=frozenset({"float32"}), priority=1000,
        ),
        KernelSpec(op="silu_mul", provider="old", abi=ABI, target="old_kernels:silu_mul", priority=-(10**7)),
    ]  # fmt: skip


@hookimpl
def dougong_select_kernel(op, query, candidates):
    if op == "silu_mul":
        assert str(query.dtype) == "torch.float32" and query.layout is None
        return next((one for one in candidates if one.provider == "old"), None)
    return None


@hookimpl
def dougong_models():
    return []


@hookimpl
def dougong_quantizations():
    return []


@hookimpl
def dougong_schedulers():
    return []


@hookimpl
def dougong_kv_connectors():
    return [KVConnectorSpec(name="old", abi=ABI, target="old_connector:OldConnector", options={"factor": 1})]


@hookimpl
def dougong_cli(app):
    @app.command("old-plugin")
    def command():
        """A command of the old plugin."""
        print("old plugin here")


@hookimpl
def dougong_observers():
    class Observer:
        def on_step(self, record):
            STEPS.append((record.num_rows, record.num_tokens, record.kv_usage))

    return [Observer()]


@hookimpl
def dougong_compat_cases(device, backend):
    return []
