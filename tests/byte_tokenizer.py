"""A tokenizer whose ids are bytes: what stands in a shard can then be written down without a library."""

BOS, EOS = 256, 257


class Bytes:
    """The ids of a text are its UTF-8 bytes, between 256 for BOS and 257 for EOS."""

    vocab_size, bos_id, eos_id, adds_bos = 258, BOS, EOS, True

    def __init__(self, path):
        self.path = path

    def encode(self, text, bos=True, eos=False):
        return [BOS, *text.encode(), EOS]

    def vocabulary(self):
        return [(i, "", bytes([i])) for i in range(256)]
