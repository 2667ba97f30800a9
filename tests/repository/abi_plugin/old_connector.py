"""A KV connector within one process: what a producer stores, a consumer finds under the same name."""

from dougong.plugins import KVConnector, KVTransferError

STORE = {}
CALLS = []


class OldConnector(KVConnector):
    def __init__(self, context):
        super().__init__(context)
        self.factor = context.options["factor"]

    @property
    def block_tokens(self):
        return self.context.block_tokens * self.factor

    @property
    def hash_key(self):
        return b"old"

    def contains(self, names):
        return [name in STORE for name in names]

    def store(self, names, blocks):
        CALLS.append("store")
        for name, block in zip(names, blocks):
            if len(block) != self.context.block_bytes[name.group] * self.factor:
                raise KVTransferError("a block of another size")
            STORE[name] = bytes(block)

    def load(self, names):
        CALLS.append("load")
        return [STORE[name] for name in names if name in STORE]

    def prefetch(self, names):
        CALLS.append("prefetch")

    def finished(self, request_id, num_tokens):
        CALLS.append("finished")
        return {"from": "old"}

    def reset(self):
        STORE.clear()

    def close(self):
        CALLS.append("close")
