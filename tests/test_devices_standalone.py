"""A standalone library on this machine and on emulated boards: its answers, its threads, what opens it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import succeed
from fake_library import INPUT, OUTPUT, VERSION, fake_network
from standalone_libraries import A72, ARMV7, IMAGE, Make, children, maker

from netship.bundle.golden import read_golden
from netship.bundle.store import Bundle
from netship.compile.frontend.limits import MAX_OUTPUTS
from netship.devices.sessions.opening import check_served, open_here, open_on_emulated
from netship.devices.sessions.runner import SOURCE, Command, compile_runner
from netship.devices.sessions.session import Origin
from netship.devices.sessions.standalone import (
    StandaloneSession,
    open_standalone,
    open_standalone_emulated,
)
from netship.runtime_demo.options import open_session
from netship.targets.errors import UserError
from netship.targets.presets import Target
from netship.targets.progress import Progress


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


@pytest.fixture(scope="module")
def library(make: Make) -> Bundle:
    return make()


@pytest.fixture(scope="module")
def a72(make: Make) -> Bundle:
    return make(A72)


@pytest.fixture(scope="module")
def armv7(make: Make) -> Bundle:
    return make(ARMV7)


def check_session(session: StandaloneSession, bundle: Bundle) -> None:
    for [image], [expected], _ in read_golden(bundle):
        [actual] = session.run(image)
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual, expected)
    seconds = session.time([image], 130)
    assert len(seconds) == 130
    assert all(isinstance(value, float) and 0 <= value < 60 for value in seconds)
    assert session.profile([image]) == []
    session.self_test()
    resident, peak = session.memory()
    assert 0 < resident <= peak
    assert (session.version, session.workspace_bytes) == (VERSION, 4096)


@pytest.fixture(autouse=True)
def no_process_is_left() -> object:
    yield
    assert children() == []


def test_this_machine_gives_the_reference(library: Bundle) -> None:
    with open_standalone(library, threads=2) as session:
        assert (session.origin, session.threads) == (Origin.HOST, 2)
        check_session(session, library)
        # A process with the library and little else.
        assert session.memory().peak < 16 << 20


@pytest.mark.parametrize("board", ["a72", "armv7"])
def test_emulated_boards_give_the_reference(
    board: str, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(board)
    stages: list[str] = []
    with open_standalone_emulated(bundle, None, stages.append, threads=2) as session:
        assert (session.origin, session.threads) == (Origin.EMULATED, 2)
        check_session(session, bundle)
    machine, cpu = bundle.manifest.target.machine, bundle.manifest.target.qemu_cpu
    assert stages == [
        f"linking libfake.a for {machine}",
        f"starting an emulated {cpu}",
    ]


def test_the_number_of_threads_is_the_manifests_unless_given(library: Bundle) -> None:
    manifest = library.manifest.model_copy(update={"threads": 3})
    with open_standalone(replace(library, manifest=manifest)) as session:
        assert session.threads == 3


def test_the_last_input_is_what_is_timed_and_outputs_are_kept(library: Bundle) -> None:
    with open_standalone(library) as session:
        [first] = session.run(IMAGE)
        session.time([IMAGE + 1], 1)
        session.run(IMAGE + 2)
        np.testing.assert_array_equal(first, fake_network(IMAGE))
        first[0, 0] = 5  # the caller's own memory


def test_another_shape_is_a_bug_of_the_caller(library: Bundle) -> None:
    with open_standalone(library) as session, pytest.raises(ValueError, match="input"):
        session.run(IMAGE.reshape(1, 12, 1, 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_input_that_is_not_finite_is_refused(library: Bundle, bad: float) -> None:
    image = IMAGE.copy()
    image[0, 1, 1, 0] = bad
    with open_standalone(library) as session:
        for call in (session.run, lambda x: session.time([x], 1)):
            with pytest.raises(UserError, match="'image': has NaN or infinity; give"):
                call(image)
        session.run(IMAGE)


def test_closing_twice_is_once(library: Bundle) -> None:
    session = open_standalone(library)
    session.close()
    session.close()
    with pytest.raises(UserError, match="its process has ended; open it again"):
        session.run(IMAGE)


def test_large_tensors_pass_whole(make: Make) -> None:
    bundle = make(WRITTEN=3 << 20)
    shape = (1, 3, 1024, 1024)
    manifest = bundle.manifest.model_copy(
        update={
            "inputs": (INPUT.model_copy(update={"shape": shape}),),
            "outputs": (OUTPUT.model_copy(update={"shape": shape}),),
        }
    )
    image = np.random.default_rng(0).random(shape, np.float32)
    with open_standalone(replace(bundle, manifest=manifest)) as session:
        [output] = session.run(image)
    np.testing.assert_array_equal(
        output.ravel(), np.resize(2 * image.ravel()[:12] + 1, 3 << 20)
    )


def test_what_a_library_prints_is_no_answer(make: Make) -> None:
    with open_standalone(make(ON_RUN='puts("hello"); fflush(stdout)')) as session:
        np.testing.assert_array_equal(session.run(IMAGE)[0], fake_network(IMAGE))


def test_another_architecture_is_refused_before_loading(a72: Bundle) -> None:
    with pytest.raises(UserError, match="libfake.so is for aarch64 .*--board emulated"):
        open_standalone(a72)


PLACES = "for (int i = 0; i < 3; i++) second[i] = i"


@pytest.mark.parametrize("target", [None, A72, ARMV7])
def test_several_outputs_are_read_apart(make: Make, target: Target | None) -> None:
    bundle = make(target, SECOND=PLACES)
    open_it = open_standalone_emulated if target else open_standalone
    with open_it(bundle) as session:
        first, second = session.run(IMAGE)
        assert len(session.time([IMAGE], 3)) == 3
    np.testing.assert_array_equal(first, fake_network(IMAGE))
    np.testing.assert_array_equal(second, [[0, 1, 2]])
    assert [first.dtype.name, second.dtype.name] == ["float32", "int64"]


def test_too_many_outputs_are_refused(library: Bundle, a72: Bundle) -> None:
    for bundle, open_it in (
        (library, open_standalone),
        (a72, open_standalone_emulated),
    ):
        manifest = bundle.manifest.model_copy(
            update={"outputs": (OUTPUT,) * (MAX_OUTPUTS + 1)}
        )
        with pytest.raises(UserError, match="at most 64 outputs, the manifest says 65"):
            open_it(replace(bundle, manifest=manifest))


def test_no_board_of_this_machines_kind_is_emulated(library: Bundle) -> None:
    with pytest.raises(UserError, match="libfake.a is for x86_64, emulated boards are"):
        open_standalone_emulated(library)


def test_an_unknown_cpu_is_refused_with_the_known_ones(armv7: Bundle) -> None:
    with pytest.raises(UserError, match="knows no CPU 'cortex-x9', only .*cortex-a7"):
        open_standalone_emulated(armv7, cpu="cortex-x9")


def test_no_qemu_gives_the_line_that_installs_it(
    armv7: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="QEMU for arm; .*`apt install qemu-user-stat"):
        open_standalone_emulated(armv7)


@pytest.mark.parametrize("file", ["libfake.a", "fake.h"])
def test_a_file_that_nobody_vouches_for_is_not_linked(a72: Bundle, file: str) -> None:
    files = {name: sha for name, sha in a72.manifest.files.items() if name != file}
    manifest = a72.manifest.model_copy(update={"files": files})
    with pytest.raises(UserError, match=f"it has no {file}; build it again"):
        open_standalone_emulated(replace(a72, manifest=manifest))


def test_a_static_library_that_lacks_a_function_is_one_line(make: Make) -> None:
    with pytest.raises(UserError, match=r"error: .*fake_self_test.*; build it again"):
        open_standalone_emulated(make(A72, NO_SELF_TEST=1))


def test_the_format_decides_what_opens_it(library: Bundle, a72: Bundle) -> None:
    with open_here(library, 2) as session:
        assert isinstance(session, StandaloneSession)
        assert session.threads == 2
    with open_on_emulated(a72, 2) as session:
        assert isinstance(session, StandaloneSession)
        assert (session.origin, session.threads) == (Origin.EMULATED, 2)
    manifest = a72.manifest.model_copy(update={"format": "bundle"})
    with pytest.raises(UserError, match="--threads: an emulated board runs on 1"):
        open_on_emulated(replace(a72, manifest=manifest), 2)
    check_served(replace(a72, manifest=manifest))


@pytest.mark.parametrize(
    "place",
    [
        {"rpc": "local"},
        {"rpc": "127.0.0.1:9"},
        {"tracker": "127.0.0.1:9", "key": "board"},
        {"ssh": "pi@127.0.0.1"},
    ],
)
def test_a_server_is_refused_before_anybody_is_asked(
    library: Bundle, place: dict[str, str]
) -> None:
    names = ("ssh", "rpc", "tracker", "key", "board", "cpu", "threads")
    options = {**dict.fromkeys(names), "wait": 1, "priority": 1}
    arguments = SimpleNamespace(**{**options, **place})
    with pytest.raises(
        UserError,
        match="needs no RPC server; .* ./verify FOLDER of the kit .* fake_self_test",
    ):
        open_session(library, arguments, Progress(quiet=True))  # type: ignore[arg-type]


def test_run_and_check_take_a_standalone_library(library: Bundle) -> None:
    output = succeed("runtime_demo.check", library.path, "--repeat", "3", "--json")
    result = json.loads(output)
    assert result["passed"] is True


def test_the_numbers_of_the_commands_are_the_runners() -> None:
    named = re.search(r"enum \{ (CREATE = 1.*?) \}", SOURCE.read_text())
    assert named
    names = named[1].replace(" = 1", "").split(", ")
    assert names == [command.name for command in Command if command]


@pytest.mark.parametrize("triple", ["x86_64-linux-gnu.2.28", "arm-linux-musleabihf"])
@pytest.mark.parametrize("static", [False, True])
def test_the_runner_compiles_without_a_warning(
    triple: str, static: bool, library: Bundle, tmp_path: Path
) -> None:
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", "-c"]
    name = ["-DSTATIC_NAME=fake", "-iquote", str(library.path)] if static else []
    compile_runner(tmp_path, triple, strict + name)
