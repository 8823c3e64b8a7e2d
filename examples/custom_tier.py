"""Uses a tier of one's own in a configuration: `module_path` names its module, `type` its class.

    python examples/custom_tier.py --blocks /var/tmp/zipped

Run it twice: the second run loads what the first one computed. In vLLM and transformers the entry of
`secondary_tiers` is the same.
"""

import argparse

from own_engine import Engine


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--blocks", default="/var/tmp/zipped", help="directory of the blocks")
    chosen = options.parse_args()
    engine = Engine({"type": "ZippedTier", "module_path": "zipped_tier", "path": chosen.blocks})
    try:
        prompt = list(range(200))
        _, sources = engine.answer(prompt)
        print(f"{len(prompt)} tokens, {len(sources)} blocks restored from {sorted(set(sources)) or 'nowhere'}")
    finally:
        engine.close()


if __name__ == "__main__":
    main()
