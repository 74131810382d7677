"""CTranslate2 in a process of its own, fed by peers.py with a JSON object a line.

Beside it in one process torch runs at half its speed: the two bring an OpenMP library each, whose threads get into each
other's way. Needs ctranslate2 alone.
"""

import json
import sys
import time

import ctranslate2


def main() -> None:
    opened, translator = None, None
    for line in sys.stdin:
        order = json.loads(line)
        if opened != order["translator"]:
            opened, translator = order["translator"], None  # the old one goes before the new one comes
            translator = ctranslate2.Translator(**opened)
        options = order["options"]
        if (lengths := order["lengths"]) is not None:
            n_each = options.get("num_hypotheses", 1)

            def is_at_its_end(result, lengths=lengths, n_each=n_each) -> bool:
                return result.step + 1 >= lengths[result.batch_id * n_each + result.hypothesis_id]

            options["callback"] = is_at_its_end
        started = time.perf_counter()
        results = translator.translate_batch(order["prompts"], beam_size=1, return_end_token=True, **options)
        seconds = time.perf_counter() - started
        completions = [[*map(int, ids)] for result in results for ids in result.hypotheses]
        print(json.dumps({"seconds": seconds, "completions": completions}), flush=True)


if __name__ == "__main__":
    main()
