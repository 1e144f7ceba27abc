"""Round to W4A16 with AutoRound's model-free mode. Runs in its own environment.

python autoround_model_free.py SOURCE OUT
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("out")
    args = parser.parse_args()
    from auto_round import AutoRound

    rounder = AutoRound(args.source, scheme="W4A16", iters=0, disable_opt_rtn=True, model_free=True, device_map="cpu")
    rounder.quantize_and_save(args.out, format="auto_round")


if __name__ == "__main__":  # it starts processes that import this file
    main()
