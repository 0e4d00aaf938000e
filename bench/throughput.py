"""How much of a provider's rate limit is used: the generator and a judge, each against a server that keeps to one.

`python bench/throughput.py [requests per minute, 360] [calls, 200]`: a server on loopback refuses what is over it,
by fixed windows with Retry-After or by a token bucket without. Prints requests per minute that were let through after
the first burst, their share of the limit, and calls that were lost or doubled. About two and a half minutes.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from telco_nb import ROOT
from telco_nb.corpus import llm_writer
from telco_nb.hosted import attempts
from telco_nb.judge.store import VerdictStore

for folder in ("support", "unit/hosted", "unit/corpus", "unit/judge"):
    sys.path.insert(0, str(ROOT / "tests" / folder))  # the servers and the studies are those of the tests
import hosted_fixtures  # noqa: E402
import test_language_model as judging  # noqa: E402
import test_llm_writer  # noqa: E402
import test_session  # noqa: E402
from provider_server import Server  # noqa: E402

LIMITS = {"fixed window, Retry-After": (True, None), "token bucket, no Retry-After": (False, 6.0)}
Found = tuple[int, attempts.AttemptStore]  # calls planned, what is stored


def generate(server: Server, folder: Path, n: int) -> Found:
    planned = test_llm_writer.few(-(-n // 4))
    session = test_llm_writer.session(server, folder / "a.jsonl", planned)
    session.run(llm_writer.call_chains(planned, session))
    return sum(map(len, planned)), session.store


def judge(server: Server, folder: Path, n: int) -> Found:
    store = VerdictStore(folder / "v.jsonl")
    prompts = next(p for p in range(1, len(judging.CARDS) + 1) if len(judging.plan(p)[0]) >= n)
    pairs = judging.put(judging.hosted("openai-compatible", server.url, folder, in_flight=16), store, prompts)
    return len(pairs), store


def measure(ask: Callable[..., Found], answer: Callable[[dict, int], str], limit: tuple, rate: float, n: int) -> int:
    """Prints a line; returns how many calls were lost or doubled."""
    server_limit = test_session.Limited(rate, *limit, answer=answer)
    with tempfile.TemporaryDirectory() as name, Server("openai-compatible", server_limit) as server:
        planned, store = ask(server, Path(name), n)
        lines = hosted_fixtures.lines(store.path)
    good = Counter(line[store.key] for line in lines if line.get("status") == "ok")
    wrong = planned - len(good) + sum(good.values()) - len(good)
    used = server_limit.used()
    print(
        f"{60 * used * server_limit.rate:6.1f} of {rate:.0f} requests a minute ({used:.1%}), {len(server_limit.good)} "
        f"let through for {planned} calls, {store.statuses['rate_limited']} refused, {wrong} lost or doubled",
        flush=True,
    )
    return wrong


def main(rate: float = 360.0, n: int = 200) -> None:
    asked = {
        "generator": (generate, test_llm_writer.good),
        "judge": (judge, lambda body, number: judging.PAIR),
    }
    wrong = 0
    for who, (ask, answer) in asked.items():
        for name, limit in LIMITS.items():
            print(f"{who}, {name}: ", end="", flush=True)
            wrong += measure(ask, answer, limit, rate, n)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
