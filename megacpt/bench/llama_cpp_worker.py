"""llama.cpp in a process of its own, under whichever Python has the package llama-cpp-python.

Run as a script, ``llama_cpp_worker.py MODEL.gguf THREADS CONTEXT``: it prints a line once the model is loaded. Then,
for each JSON line ``[prompt ids, count]`` it reads, it prints ``[seconds of the prompt, seconds of the tokens, ids]``.
Nothing of megacpt is imported, so that the other Python needs llama-cpp-python and numpy alone.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module


class Model:
    """A model of llama.cpp with a context for one sequence."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        self.api = llama_cpp = import_module("llama_cpp")
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def feed(self, tokens: list[int]) -> int:
        """Read further tokens; the likeliest after them."""
        import numpy as np

        ids = (self.api.llama_token * len(tokens))(*tokens)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def run(self, prompt: list[int], count: int) -> tuple[float, float, list[int]]:
        """The seconds of the prompt and of `count` tokens, each the likeliest, and these."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        start = time.perf_counter()
        found = [self.feed(prompt)]
        read = time.perf_counter()
        while len(found) <= count:
            found.append(self.feed(found[-1:]))
        return read - start, time.perf_counter() - read, found[:-1]


def main() -> None:
    """Serve requests until there are no more."""
    del sys.path[0]  # the folder of this script, whose files have names of their own
    path, threads, context = sys.argv[1:]
    model = Model(path, int(threads), int(context))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(model.run(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
