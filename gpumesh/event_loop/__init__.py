"""Small helpers for asyncio: when work runs in the event loop, and how it is woken, closed and cancelled.

They know nothing of gpumesh."""
