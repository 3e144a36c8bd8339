from __future__ import annotations

import pytest

from gpumesh.cli.views.pool.bars import bar_legend, divide, layer_bar, layer_range, memory_bar, memory_use
from gpumesh.pools.base import DeviceOffer
from tests.cli.views.pool.samples import GIB, share


@pytest.mark.parametrize(
    ("length", "sizes", "counts"),
    [
        (10, (5, 5), [5, 5]),
        (10, (1, 1, 1), [3, 4, 3]),
        (10, (1000, 1), [9, 1]),
        (10, (0, 1000, 0), [0, 10, 0]),
        (4, (0, 0), [0, 0]),
        (2, (1, 1, 1), [1, 0, 1]),
    ],
)
def test_each_part_that_is_there_is_seen(length: int, sizes: tuple[int, ...], counts: list[int]) -> None:
    assert divide(length, sizes) == counts


def test_the_bar_of_a_gpu_has_its_whole_memory() -> None:
    planned = share(0, 10, weights_bytes=12 * GIB, kv_bytes=3 * GIB, compute_bytes=1 * GIB)
    use = memory_use(planned)
    assert (use.free, use.others, sum(use.sizes)) == (7 * GIB, 1 * GIB, 24 * GIB)
    assert memory_bar(use, 24).plain == "████████████▓▓▓▒░░░░░░░x"


def test_the_bar_of_a_cpu_has_what_the_plan_may_take() -> None:
    cpu = DeviceOffer("CPU", None, 128 * GIB, 100 * GIB)
    use = memory_use(share(0, 4, device=cpu, weights_bytes=3 * GIB, kv_bytes=0, compute_bytes=0, offered_bytes=8 * GIB))
    assert (use.free, use.others, sum(use.sizes)) == (5 * GIB, 0, 8 * GIB)
    assert memory_bar(use, 8).plain == "███░░░░░"


def test_what_ollama_need_not_unload_stays_its_own() -> None:
    device = DeviceOffer("GPU", 0, 24 * GIB, 8 * GIB, held_by_others=14 * GIB)
    planned = share(0, 20, device=device, weights_bytes=12 * GIB, kv_bytes=0, compute_bytes=0, offered_bytes=20 * GIB)
    use = memory_use(planned)
    assert (use.free, use.ollama, use.others) == (0, 10 * GIB, 2 * GIB)
    assert memory_bar(use, 24).plain == "████████████ooooooooooxx"
    assert bar_legend([use]).plain == "█ weights  o Ollama  x other programs"


def test_a_share_that_does_not_fit_leaves_nothing_free() -> None:
    use = memory_use(share(0, 10, weights_bytes=30 * GIB))
    assert use.free == 0
    assert "░" not in memory_bar(use, 16).plain


def test_the_layers_of_neighbours_share_no_character() -> None:
    bars = [layer_bar(first, layers, 81, 20).plain for first, layers in ((0, 40), (40, 30), (70, 11))]
    assert bars == ["█████████░░░░░░░░░░░", "░░░░░░░░░████████░░░", "░░░░░░░░░░░░░░░░░███"]
    assert layer_bar(80, 1, 81, 4).plain == "░░░█"
    assert layer_bar(0, 0, 81, 4).plain == "░░░░"


def test_layers_are_named_by_their_numbers() -> None:
    assert [layer_range(share(*layers)) for layers in ((0, 40), (80, 1), (0, 0))] == ["0-39", "80", "none"]
