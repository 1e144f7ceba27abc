"""One model in one engine, kept loaded: seconds of a prompt and of each new token, each time that it is asked.

The first line of stdin is {"adapter": path, "settings": {...}, "own": bool}: an adapter of qkit/measure/engines, with
its settings; own: transformers' forward instead of qkit's decoding step. After {"ready": ...} every line
{"prompt": tokens, "generated": tokens} is answered by {"first": seconds, "steps": [seconds, ...]}; with "call": true by
{"first": seconds, "rest": seconds} of one call of the engine's own generate, or where the steps are that, of the steps.
Runs in the engine's own Python, which need not have qkit.
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
        prompts = [[1 + i % 200 for i in range(asked["prompt"])]]
        called = engine.generate(prompts, asked["generated"]) if asked.get("call") else None
        if called is not None:
            say(first=called[0] - called[1], rest=called[1])
            continue
        first, steps = engine.run(prompts, asked["generated"])
        if asked.get("call"):
            say(first=first, rest=sum(steps))
        else:
            say(first=first, steps=steps)


if __name__ == "__main__":
    main()
