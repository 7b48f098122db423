import numpy as np
import pytest
import torch

from tpformer.data.sampler import TokenSampler

TOKENS = np.arange(100, 204, dtype=np.uint16)  # 104 tokens: 20 windows of 5 + 1, three tokens left over


def make(seed: int = 7, shuffle: bool = True) -> TokenSampler:
    return TokenSampler(TOKENS, seq_len=5, seed=seed, vocab_size=300, shuffle=shuffle)


def test_windows_without_shuffle_are_the_text_in_order_and_wrap() -> None:
    batch = make(shuffle=False).samples(19, 2)
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[195, 196, 197, 198, 199, 200], [100, 101, 102, 103, 104, 105]]


def test_each_epoch_visits_every_window_once_in_its_own_order() -> None:
    sampler = make()
    assert sampler.num_samples == 20
    windows = {tuple(range(first, first + 6)) for first in range(100, 200, 5)}
    epochs = [[tuple(row) for row in sampler.samples(20 * epoch, 20).tolist()] for epoch in range(4)]
    for epoch in epochs:
        assert set(epoch) == windows and len(epoch) == 20
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != sorted(epochs[0])


def test_samples_are_a_pure_function_of_their_numbers() -> None:
    whole = make().samples(0, 70)
    sampler = make()
    for start, count in ((60, 10), (0, 1), (19, 2), (38, 4), (5, 60), (59, 2), (0, 70)):
        assert torch.equal(sampler.samples(start, count), whole[start : start + count])


def test_the_position_survives_a_change_of_data_parallel_degree() -> None:
    """Global batches of 8, shared out over 1, 2 and 4 data-parallel ranks, resumed at step 3 by new processes."""
    runs = []
    for degree in (1, 2, 4):
        share = 8 // degree
        ranks = [[make().samples(8 * step + share * rank, share) for rank in range(degree)] for step in range(3, 6)]
        runs.append(torch.cat([rows for step in ranks for rows in step]))
    assert torch.equal(runs[0], make().samples(24, 24))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_the_order_does_not_depend_on_or_disturb_torch_state() -> None:
    torch.manual_seed(1)
    first, after = make().samples(0, 20), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(first, make().samples(0, 20))


def test_seeds_differ_and_do_not_share_epochs() -> None:
    orders = {tuple(make(seed).samples(20 * e, 20)[:, 0].tolist()) for seed in range(4) for e in range(4)}
    assert len(orders) == 16


def test_the_order_of_a_seed_never_changes() -> None:
    """A run resumed under a newer release must go on with the same data."""
    order = [(first - 100) // 5 for first in make(seed=7).samples(20, 20)[:, 0].tolist()]
    mixed = int(np.random.SeedSequence([7, 1]).generate_state(1)[0])
    assert mixed == 369571992
    assert order == [17, 3, 6, 9, 7, 19, 2, 0, 10, 18, 13, 14, 8, 12, 1, 5, 16, 11, 4, 15]


def test_only_two_orders_are_kept() -> None:
    sampler = make()
    sampler.samples(0, 100)
    assert sorted(sampler._orders) == [3, 4]


def test_the_shortest_corpus_and_one_token_less() -> None:
    assert TokenSampler(TOKENS[:6], 5, 0, 300).samples(0, 2).tolist() == [list(range(100, 106))] * 2
    # The last of 10 tokens has no window of its own: it would need an 11th to be a target.
    assert [TokenSampler(TOKENS[:n], 5, 0, 300).num_samples for n in (6, 10, 11, 12)] == [1, 1, 2, 2]
    with pytest.raises(ValueError, match=r"5 tokens are fewer than seq_len \+ 1 = 6"):
        TokenSampler(TOKENS[:5], 5, 0, 300)


def test_bad_arguments() -> None:
    for start, count in ((-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=rf"samples\({start}, {count}\): expected start >= 0 and count >= 1"):
            make().samples(start, count)
    for seq_len, seed in ((0, 0), (5, -1)):
        with pytest.raises(ValueError, match=f"seq_len = {seq_len} and seed = {seed}"):
            TokenSampler(TOKENS, seq_len, seed, 300)
    for tokens in (TOKENS.reshape(2, 52), TOKENS.astype(np.float32)):
        with pytest.raises(ValueError, match=r"tokens have shape .* expected 1-D integers"):
            TokenSampler(tokens, 5, 0, 300)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [300, -4])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(bad: int) -> None:
    tokens = TOKENS.astype(np.int32)
    tokens[42] = bad  # inside window 8 only
    sampler = TokenSampler(tokens, 5, 7, 300)
    number = make().samples(0, 20)[:, 0].tolist().index(140)
    with pytest.raises(ValueError, match=rf"sample {number} holds id {bad} at token 42, .* has 300 ids \(0\.\.299\)"):
        sampler.samples(0, 20)
    others = [n for n in range(20) if n != number]
    assert [sampler.samples(n, 1).shape for n in others] == [(1, 6)] * 19
