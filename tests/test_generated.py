"""Kernels that are compiled while a program runs: where they lie, that only what is ours is loaded, and once each."""

import os
import stat
import subprocess
import threading

import pytest

from dam.backends import cpu, generated

TEXT = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DAM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(cache):
    return sorted(path.name for path in cache.iterdir())


def test_a_source_is_compiled_once(cache, monkeypatch):
    assert generated.library("answer", TEXT).answer() == 42
    first = made(cache)
    assert [name.split("_")[0] for name in first] == ["answer", "answer"]
    assert {name.rpartition(".")[2] for name in first} == {"cpp", "so"}
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700

    def run(*arguments, **options):
        raise AssertionError("compiled again")

    monkeypatch.setattr(generated.subprocess, "run", run)
    assert generated.library("answer", TEXT).answer() == 42 and made(cache) == first


def test_what_has_changed_has_another_name(cache, monkeypatch):
    """Source, headers, flags and compiler are all of a file's name."""
    generated.library("answer", TEXT)
    assert generated.library("answer", TEXT.replace("42", "43")).answer() == 43
    monkeypatch.setattr(generated, "_headers", lambda: b"others")
    generated.library("answer", TEXT)
    build = generated._build()
    monkeypatch.setattr(generated, "_build", lambda: {**build, "flags": [*build["flags"], "-DDAM_OTHER"]})
    generated.library("answer", TEXT)
    other = generated.compiler()._replace(identity="another release")
    monkeypatch.setattr(generated, "compiler", lambda: other)
    generated.library("answer", TEXT)
    assert len([name for name in made(cache) if name.endswith(".so")]) == 5


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_library_that_is_cut_is_made_again(cache, size):
    """A crash or a full disk leaves one; to load it would end the process."""
    generated.library("answer", TEXT.replace("42", "7"))
    (library,) = cache.glob("*.so")
    content = library.read_bytes()
    library.unlink()  # what is loaded stays as it is
    library.write_bytes(content[:size])
    library.chmod(0o700)
    assert not generated._is_whole(library)
    assert generated.library("answer", TEXT.replace("42", "7")).answer() == 7 and generated._is_whole(library)


def test_what_lies_there_is_what_was_written(cache):
    """Not what somebody made of it: sources are compared with the text, which their names alone say nothing of."""
    text = "ANSWER = 42\n"
    assert generated.module("answer", text).ANSWER == 42
    (path,) = cache.glob("*.py")
    for other in ("ANSWER = 43\n", "ANSW", ""):
        path.write_text(other)
        assert generated.module("answer", text).ANSWER == 42 and path.read_text() == text
    generated.library("answer", TEXT)
    (source,), (library,) = cache.glob("*.cpp"), cache.glob("*.so")
    library.unlink()
    source.write_text("")
    assert generated.library("answer", TEXT).answer() == 42 and source.read_text() == TEXT


def test_what_does_not_compile_is_not_tried_twice(cache, monkeypatch):
    """Its message is kept, in whatever encoding a compiler writes."""
    calls = []

    def run(command, **options):
        calls.append(command)
        return actual(["sh", "-c", r"printf 'wr\344ng' >&2; exit 1"], **options)

    actual = subprocess.run
    monkeypatch.setattr(generated.subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(generated.NoCompiler, match="wr\ufffdng"):
            generated.library("wrong", TEXT)
    assert len(calls) == 1


def test_several_build_at_once(cache):
    """Each has a library that works, whoever came first, and nothing half written is left."""
    found, start = [], threading.Barrier(4)

    def build():
        start.wait()
        found.append(generated.library("answer", TEXT).answer())

    builders = [threading.Thread(target=build) for _ in range(4)]
    for one in builders:
        one.start()
    for one in builders:
        one.join()
    assert found == [42] * 4 and len(made(cache)) == 2


def test_what_does_not_compile_leaves_no_library(cache):
    with pytest.raises(generated.NoCompiler, match="expected"):
        generated.library("wrong", "int f( {\n")
    assert all(name.endswith(".cpp") for name in made(cache))


def test_a_folder_that_others_may_write_to(cache):
    cache.mkdir(mode=0o700)
    cache.chmod(0o777)
    with pytest.raises(PermissionError, match=r"must be yours and writable by you alone \(chmod 700\)"):
        generated.library("answer", TEXT)


def test_a_file_that_others_may_write_to(cache):
    generated.library("answer", TEXT)
    (library,) = cache.glob("*.so")
    library.chmod(0o777)
    with pytest.raises(PermissionError, match="must be yours"):
        generated.library("answer", TEXT)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_folder_of_another_user(cache):
    cache.mkdir(mode=0o700)
    os.chown(cache, 12345, 12345)
    with pytest.raises(PermissionError, match="must be yours"):
        generated.folder()


def test_where_it_is(tmp_path, monkeypatch):
    monkeypatch.delenv("DAM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert generated.folder() == tmp_path / "xdg" / "dam"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert generated.folder() == tmp_path / "home" / ".cache" / "dam"


def test_the_compiler(tmp_path, monkeypatch):
    """That of the library, without flags of its builder's; else CXX; else one of the usual names; else none."""
    with monkeypatch.context() as patched, pytest.raises(generated.NoCompiler, match="of an older dam"):
        patched.setattr(generated.cpu, "kernels", object())
        generated._build.__wrapped__()
    build = generated._build()
    assert {"compiler", "flags", "isa_flags"} == build.keys() and cpu.isa() in build["isa_flags"]
    assert "-std=c++17" in build["flags"]
    for name in ("built", "asked", "g++"):
        (tmp_path / name).touch(mode=0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(generated, "_build", lambda: {**build, "compiler": ["built", "-pthread"]})
    monkeypatch.setenv("CXX", "asked -m64")
    found = []
    for name in ("built", "asked", "g++"):
        found.append(generated.compiler().command)
        (tmp_path / name).unlink()
    assert found == [(str(tmp_path / "built"),), (str(tmp_path / "asked"), "-m64"), (str(tmp_path / "g++"),)]
    with pytest.raises(generated.NoCompiler, match=r"no C\+\+ compiler here \(built, asked -m64, c\+\+, g\+\+"):
        generated.compiler()
