"""One model in one engine, kept loaded: seconds of a prompt and of each new token, each time that it is asked.

The first line of stdin is {"adapter": path, "settings": {...}, "own": bool}: an adapter of qkit/measure/engines, with
its settings; own: transformers' forward instead of qkit's decoding step. After {"ready": ...} every line
{"prompt": tokens, "generated": tokens} is answered by {"first": seconds, "steps": [seconds, ...]}. Runs in the engine's
own Python, which need not have qkit.
"""

import json
import os
import runpy
import sys


def main() -> None:
    # Libraries print to stdout as they like: the answers keep a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**answer) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    request = json.loads(sys.stdin.readline())
    engine = runpy.run_path(request["adapter"])["Engine"](request["settings"])
    if request["own"]:
        from qkit.runtime import decoder, head

        decoder.detach(engine.model)
        head.as_it_was(engine.model)
    say(ready=engine.version)
    for line in sys.stdin:
        asked = json.loads(line)
        first, steps = engine.run([[1 + i % 200 for i in range(asked["prompt"])]], asked["generated"])
        say(first=first, steps=steps)


if __name__ == "__main__":
    main()
