from __future__ import annotations

from pathlib import Path

import pytest

from ldmrt.config import THREADS, Config, from_env, share_cores
from ldmrt.errors import BadRequest


def test_nothing_set() -> None:
    assert from_env({"HOME": "/home/a"}) == Config(cache=Path("/home/a/.cache/ldmrt"))
    assert from_env({}).cache == Path.home() / ".cache" / "ldmrt"


def test_everything_set() -> None:
    environ = {"LDMRT_CACHE": "/c", "LDMRT_DEVICE": "CUDA:1", "LDMRT_THREADS": "4"}
    assert from_env(environ) == Config(cache=Path("/c"), device="cuda:1", threads=4)


def test_empty_is_not_set() -> None:
    environ = dict.fromkeys(("LDMRT_CACHE", "LDMRT_DEVICE", "LDMRT_THREADS", "XDG_CACHE_HOME"), "")
    assert from_env(environ | {"HOME": "/h"}) == from_env({"HOME": "/h"})


@pytest.mark.parametrize(
    ("environ", "cache"),
    [
        ({"XDG_CACHE_HOME": "/x"}, "/x/ldmrt"),
        ({"XDG_CACHE_HOME": "relative"}, "/h/.cache/ldmrt"),
        ({"XDG_CACHE_HOME": "/x", "LDMRT_CACHE": "/own"}, "/own"),
        ({"LDMRT_CACHE": "here"}, str(Path.cwd() / "here")),
    ],
)
def test_cache(environ: dict[str, str], cache: str) -> None:
    assert from_env({"HOME": "/h"} | environ).cache == Path(cache)


@pytest.mark.parametrize(
    ("name", "text"),
    [("LDMRT_THREADS", text) for text in ("-1", "two", "1.5", " ", "\u0663")]
    + [("LDMRT_DEVICE", text) for text in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "cuda:1 2", " ")],
)
def test_garbage_names_the_variable(name: str, text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        from_env({name: text})
    assert caught.value.param == name
    assert str(caught.value).startswith(f"{name} is {text!r}, expected ")


def test_threads_make_way_unless_the_user_has_said_how_they_wait() -> None:
    environ = {"HOME": "/h"}
    share_cores(environ)
    assert environ == {"HOME": "/h", **THREADS}


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}])
def test_what_the_user_has_said_of_threads_stays(given: dict[str, str]) -> None:
    environ = dict(given)
    share_cores(environ)
    assert environ == given
