"""The programs that JAX compiles while a test runs."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
    """Context that yields a list, which gets the name of every program that is compiled."""
    names: list[str] = []

    def listener(event: str, duration: float, *, fun_name: str = "", **_) -> None:
        if event.endswith("/backend_compile_duration"):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
