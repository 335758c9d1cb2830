"""The replay buffer: what it keeps, what it draws, and that groups of different length meet in one batch."""

import threading

import pytest
import torch

from dam.train import ReplayBuffer

PAD = 9


def batch(values, length):
    """A group for each value: one state and two trajectories, of that many positions, all filled with the value."""
    states = torch.tensor(values)[:, None].expand(-1, length)
    return {
        "states": states,
        "final": states[:, None].expand(-1, 2, -1),
        "first": torch.zeros(len(values), 2, dtype=torch.int64),
        "start": torch.ones(len(values), dtype=torch.int64),
        "weight": torch.ones(len(values), 2),
        "attention_mask": torch.ones_like(states),
    }


def drawn(buffer, size, seed=0):
    (places,) = buffer.choose(size, 1, torch.Generator().manual_seed(seed))
    return buffer.batch(places)


def held(buffer):
    return sorted(drawn(buffer, len(buffer))["states"][:, -1].tolist())


def test_it_keeps_the_last_groups():
    buffer = ReplayBuffer(3, PAD)
    buffer.extend(batch([1, 2], 4))
    assert held(buffer) == [1, 2]
    buffer.extend(batch([3, 4], 4))
    assert held(buffer) == [2, 3, 4]


def test_a_sample_is_without_replacement_and_depends_on_the_generator_only():
    buffer = ReplayBuffer(100, PAD)
    buffer.extend(batch(list(range(50)), 2))
    seen = [drawn(buffer, 20, seed)["states"][:, 0].tolist() for seed in (1, 1, 2)]
    assert seen[0] == seen[1] != seen[2]
    assert len(set(seen[0])) == 20
    assert len(drawn(buffer, 1000)["states"]) == 50


@pytest.mark.parametrize(("groups", "size", "parts"), [(50, 5, 4), (12, 5, 4), (10, 5, 4), (3, 5, 4), (1, 1, 3)])
def test_parts_are_equal_shares_of_what_one_process_draws(groups, size, parts):
    buffer = ReplayBuffer(100, PAD)
    buffer.extend(batch(list(range(groups)), 2))
    whole = buffer.choose(size * parts, 1, torch.Generator().manual_seed(3))[0]
    shares = buffer.choose(size, parts, torch.Generator().manual_seed(3))
    assert torch.equal(shares.flatten()[: len(whole)], whole) and shares.shape[0] == parts
    # Groups are in two parts only where they do not come out even.
    assert shares.numel() - len(whole) < parts and len(whole) == min(groups, size * parts)


def test_shorter_groups_are_padded_on_the_left():
    buffer = ReplayBuffer(4, PAD)
    buffer.extend(batch([1], 5))
    buffer.extend(batch([2], 3))
    sample = drawn(buffer, 2)
    short = sample["states"][:, -1].tolist().index(2)
    assert sample["states"][short].tolist() == [PAD, PAD, 2, 2, 2]
    assert sample["final"][short].tolist() == [[PAD, PAD, 2, 2, 2]] * 2
    assert sample["attention_mask"][short].tolist() == [0, 0, 1, 1, 1]
    # The position of a first jump moves along with its sequence.
    assert sample["first"][short].tolist() == [2, 2]
    assert sample["first"][1 - short].tolist() == [0, 0]
    # And so does the place where a completion starts.
    assert (int(sample["start"][short]), int(sample["start"][1 - short])) == (3, 1)


def test_paths_move_along_with_their_sequences():
    """Positions shift with the padding in front; a path of fewer jumps gets empty ones, whose position stays none."""
    buffer = ReplayBuffer(4, PAD)
    for value, length, position, call in ((1, 5, [4, 0, 2], [0, 0, 1]), (2, 3, [1, 2], [0, 1])):
        paths = {"position": torch.tensor([[position] * 2]), "call": torch.tensor([[call] * 2])}
        buffer.extend({**batch([value], length), **paths})
    group = buffer.batch(torch.tensor([1, 0]))
    assert group["position"].tolist() == [[[3, 4, -1]] * 2, [[4, 0, 2]] * 2]
    assert group["call"].tolist() == [[[0, 1, -1]] * 2, [[0, 0, 1]] * 2]


def test_changing_what_was_put_in_changes_nothing_inside():
    buffer = ReplayBuffer(4, PAD)
    given = {name: value.clone() for name, value in batch([1], 2).items()}
    buffer.extend(given)
    given["states"].fill_(7)
    assert held(buffer) == [1]


def test_its_state_survives_a_file(tmp_path):
    buffer, copy = ReplayBuffer(4, PAD), ReplayBuffer(4, PAD)
    buffer.extend(batch([1, 2, 3], 4))
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    copy.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    ours, theirs = (drawn(b, 2, seed=5) for b in (buffer, copy))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    copy.extend(batch([4, 5], 4))
    assert held(copy) == [2, 3, 4, 5]


def test_capacity_must_be_positive():
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        ReplayBuffer(0, PAD)


class Processes:
    """Three, as threads, that give each other what they ask for."""

    def __init__(self, monkeypatch):
        self.barrier, self.given = threading.Barrier(3), {}
        monkeypatch.setattr("dam.train.replay.exchanged", self.exchanged)

    def exchanged(self, given):
        here = int(threading.current_thread().name)
        self.given[here] = given
        self.barrier.wait(timeout=10)
        found = [self.given[process][here] for process in range(3)]
        self.barrier.wait(timeout=10)
        return found

    def each(self, work):
        found = {}
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: work(n)}), name=str(n), daemon=True) for n in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        return [found[n] for n in range(3)]


def test_processes_that_share_the_groups_find_those_of_one(monkeypatch):
    """Asked for at any place, again, and after older ones have gone; each keeps a third, and all the weights."""
    processes = Processes(monkeypatch)
    buffers = [ReplayBuffer(6, PAD) for _ in range(4)]
    for n, buffer in enumerate(buffers[:3]):
        buffer.share(n, 3)
    for buffer in buffers:
        buffer.extend(batch(list(range(5)), 4))
        buffer.extend(batch([5, 6], 3))
    alone = buffers[3]
    wanted = torch.tensor([[5, 0, 5], [1, 2, 3], [4, 4, 0]])
    found = processes.each(lambda n: buffers[n].batch(wanted[n], list(wanted)))
    for n, groups in enumerate(found):
        expected = alone.batch(wanted[n])
        assert groups.keys() == expected.keys()
        assert all(torch.equal(groups[name], expected[name]) for name in expected)
        assert sum("final" in group for group in buffers[n].state_dict()["groups"]) == 2
        assert torch.equal(buffers[n].weights(torch.arange(6)), alone.weights(torch.arange(6)))
    whole = buffers[0].merged([buffer.state_dict()["groups"] for buffer in buffers[:3]])
    again = ReplayBuffer(6, PAD)
    again.load_whole(whole)
    assert held(again) == held(alone) == [1, 2, 3, 4, 5, 6]
