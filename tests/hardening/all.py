"""The whole of the hardening, by hand: python tests/hardening/all.py --cases 1000 --moments 100

prints a table of counts, and every failure with the kind and the seed that make it again:
--only KIND --seed N --cases 1.
"""
import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from hardening import broken, crashes, fuzz, trial  # noqa: E402
from hardening.warm import Warm  # noqa: E402


def table(counts):
    print(f"{'kind':36}{'cases':>7}{trial.OK:>15}{trial.ERROR:>17}{'failures':>10}")
    for name, c in counts.items():
        print(f"{name:36}{c['cases']:7}{c[trial.OK]:15}{c[trial.ERROR]:17}{c['failures']:10}")


def mutate(warm, folder, seed, count):
    """Reads mutated files of each format -> {format: Counter}."""
    counts = {}
    for name in fuzz.FORMATS:
        (folder / name).mkdir()
        read, refused, problems = fuzz.run(warm, folder / name, name, seed, seed + count)
        counts[f"mutated: {name}"] = Counter({"cases": read + refused + len(problems), trial.OK: read,
                                              trial.ERROR: refused, "failures": len(problems)})
        print(*problems, sep="\n", end="\n" if problems else "")
    return counts


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0, help="the first seed")
    p.add_argument("--cases", type=int, default=1000, help="of broken input")
    p.add_argument("--real", type=int, default=50, help="of broken input, through the real commands")
    p.add_argument("--moments", type=int, default=100, help="at which each signal ends train.py and sample.py in turn")
    p.add_argument("--fuzz", type=int, default=2000, help="mutations of each format of pictures and videos")
    p.add_argument("--only", help="kinds of broken input whose name holds this")
    args = p.parse_args()
    names = [name for name in broken.KINDS if not args.only or args.only in name]
    began, warm = time.time(), Warm()
    with tempfile.TemporaryDirectory(prefix="hardening-") as folder:
        stock = trial.stock(Path(folder) / "stock", warm)
        counts = trial.many(warm, stock, range(args.seed, args.seed - (-args.cases // len(names))), names)
        real = trial.many(warm, stock, range(args.seed, args.seed - (-args.real // len(names))), names, real=True) \
            if args.real else {}
        mutations = mutate(warm, Path(folder), args.seed, args.fuzz)
        (Path(folder) / "crashes").mkdir()
        ends = {}
        if args.moments:
            times = crashes.stock(Path(folder) / "crashes", warm)
            ends = crashes.many(warm, Path(folder) / "crashes", times, range(args.seed, args.seed + args.moments // 2))
    sums = {"all of these": counts, "by real commands": real}
    table(counts | {name: sum(part.values(), Counter()) for name, part in sums.items()} | mutations | ends)
    print(f"{time.time() - began:.0f} seconds")


if __name__ == "__main__":
    main()
