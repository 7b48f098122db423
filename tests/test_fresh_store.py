"""Workers that torchrun starts again do not take up what the store holds of those before them."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from tpformer.mesh import fresh_store

TIMEOUT = timedelta(seconds=20)


@pytest.mark.parametrize("stale", ["nothing", "a dead rank's", "another server's"])
def test_all_find_the_store_of_rank_0_that_lives(stale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launchers = dist.HashStore()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    rank = threading.local()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(launchers, rank.number, 3)]))
    before = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if stale != "nothing":
        launchers.set("tpformer_store", f"{before.port} of-before")
    if stale == "a dead rank's":
        del before
    former: list[dict[int, dist.Store]] = []
    for _ in range(2):  # also again, while the first one lives: a rank may make its next mesh before rank 0 does
        former.append(meet(rank))
        assert former[-1].keys() == {0, 1, 2}
        former[-1][1].set("word", f"heard {len(former)}")
    for number, found in enumerate(former, 1):
        assert found[2].get("word") == found[0].get("word") == f"heard {number}".encode()


def meet(rank: threading.local) -> dict[int, dist.Store]:
    """The stores that three ranks find, of which rank 0 comes last."""
    found: dict[int, dist.Store] = {}

    def start(number: int) -> None:
        rank.number = number
        store, *place = fresh_store(TIMEOUT)
        assert place == [number, 3]
        found[number] = store

    threads = [threading.Thread(target=start, args=(number,)) for number in (1, 2, 0)]
    for thread in threads[:2]:
        thread.start()
    threads[0].join(0.3)
    assert found == {}
    threads[2].start()
    for thread in threads:
        thread.join(20)
    return found


def test_without_torchrun_s_store_the_launcher_s_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    launchers = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(launchers, 1, 2)]))
    assert fresh_store(TIMEOUT) == (launchers, 1, 2)
