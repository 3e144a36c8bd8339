import asyncio

from gpumesh.mesh.change_notifier import ChangeNotifier


async def test_a_watcher_is_woken_at_once_and_then_once_for_all_changes() -> None:
    changes = ChangeNotifier()
    watcher = changes.watch()
    await anext(watcher)
    for _ in range(5):
        changes.notify()
    async with asyncio.timeout(5):
        await anext(watcher)
    step = asyncio.ensure_future(anext(watcher))
    await asyncio.sleep(0)
    assert not step.done()
    changes.notify()
    async with asyncio.timeout(5):
        await step
    assert changes.version == 6


async def test_a_change_between_two_steps_is_not_missed() -> None:
    changes = ChangeNotifier()
    watcher = changes.watch()
    await anext(watcher)
    changes.notify()
    async with asyncio.timeout(5):
        await anext(watcher)


async def test_repr_tells_the_state() -> None:
    changes = ChangeNotifier()
    watcher = changes.watch()
    await anext(watcher)
    changes.notify()
    assert repr(changes) == "<ChangeNotifier version 1, 1 watchers>"
