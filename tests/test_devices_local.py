"""A bundle on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_bundle

from netship.bundle.golden import read_golden
from netship.bundle.manifest import Tensor
from netship.bundle.store import Bundle
from netship.devices.sessions import huge_pages
from netship.devices.sessions.local import open_local
from netship.devices.sessions.session import Origin
from netship.targets.errors import UserError
from netship.targets.presets import native, resolve
from netship.targets.toolchain import run_zig


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("local"), native())


def shared_library_without_a_network(path: Path) -> None:
    source = path.with_suffix(".c")
    source.write_text("int answer(void) { return 42; }")
    run_zig("cc", path, "-target", native().linker, "-shared", source)


def changed(bundle: Bundle, part: str, **update: object) -> Bundle:
    """The bundle with a manifest that says something else."""
    told = getattr(bundle.manifest, part)
    lie: object
    if part == "inputs":
        lie = (told[0].model_copy(update=update),)
    else:
        lie = told.model_copy(update=update)
    manifest = bundle.manifest.model_copy(update={part: lie})
    return replace(bundle, manifest=manifest)


def test_numbers_are_the_reference(bundle: Bundle) -> None:
    with open_local(bundle) as session:
        assert (session.origin, session.threads) == (Origin.HOST, 1)
        for [image], [expected], _ in read_golden(bundle):
            [actual] = session.run(image)
            assert actual.dtype == np.float32
            np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_an_output_does_not_change_when_the_next_inference_runs(bundle: Bundle) -> None:
    ([first], [expected], _), ([second], _, _), *_ = read_golden(bundle)
    with open_local(bundle) as session:
        [kept] = session.run(first)
        session.run(second)
        np.testing.assert_allclose(kept, expected, atol=1e-6)


def test_an_input_that_is_not_finite_is_refused(bundle: Bundle) -> None:
    """The network would make an ordinary score of NaN."""
    image = np.zeros((1, 3, 16, 16), np.float32)
    with open_local(bundle) as session:
        for bad in (np.nan, np.inf, -np.inf):
            image[0, 2, 3, 4] = bad
            for call in (
                session.run,
                lambda x: session.time([x], 1),
                lambda x: session.profile([x]),
            ):
                with pytest.raises(UserError, match="'image': has NaN or infinity;"):
                    call(image)


def test_time_and_profile_cover_what_ran(bundle: Bundle) -> None:
    [image], _, _ = read_golden(bundle)[0]
    with open_local(bundle) as session:
        assert len(session.time([image], 3)) == 3
        operators = session.profile([image])
        assert operators[-1].output_shape == (1, 5)
        assert sum("conv2d" in operator.name for operator in operators) == 2
        assert all(operator.seconds > 0 for operator in operators)


def test_all_parameters_are_put_into_huge_pages(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        huge_pages, "use_for", lambda spans: asked.extend(size for _, size in spans)
    )
    with open_local(bundle):
        # The image, and in some order of channels 8 filters 3×3 of 3 channels and 5 of 8.
        assert {4 * 3 * 16 * 16, 4 * 8 * 3 * 3 * 3, 4 * 5 * 8} <= set(asked)


def test_closing_twice_is_once(bundle: Bundle) -> None:
    session = open_local(bundle)
    session.close()
    session.close()


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (
            {"shape": (1, 3, 32, 8)},
            r"model.so has input image float32\[1,3,16,16\].* says image float32\[1,3,32,8\]",
        ),
        ({"name": "data"}, "input image .* says data"),
    ],
)
def test_a_manifest_that_lies_about_the_input_is_refused(
    bundle: Bundle, lie: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        open_local(changed(bundle, "inputs", **lie))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([(5, 1)], r"output float32\[1,5\], the manifest says float32\[5,1\]; build"),
        ([(1, 5), (1, 5)], r"output float32\[1,5\], the manifest says .* and "),
    ],
)
def test_a_manifest_that_lies_about_the_outputs_is_refused(
    bundle: Bundle, shapes: list[tuple[int, ...]], words: str
) -> None:
    outputs = tuple(Tensor(name="scores", shape=shape) for shape in shapes)
    manifest = bundle.manifest.model_copy(update={"outputs": outputs})
    with pytest.raises(UserError, match=words):
        open_local(replace(bundle, manifest=manifest))


def test_another_architecture_is_refused_before_loading(bundle: Bundle) -> None:
    other = resolve("arm-cortex-a72" if native().machine == "x86_64" else "x86-64-v2")
    foreign = changed(bundle, "target", machine=other.machine, name=other.name)
    with pytest.raises(
        UserError, match=f"model.so is for {other.machine} .*this machine is"
    ):
        open_local(foreign)


def test_a_cpu_feature_that_is_missing_is_named(bundle: Bundle) -> None:
    fancy = changed(bundle, "target", features=("warp_drive", "avx_1e6"))
    with pytest.raises(UserError, match=r"lacks avx_1e6, warp_drive; build it with"):
        open_local(fancy)


def test_a_library_that_cannot_be_loaded_is_one_line(
    bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "model.so").write_bytes(bytes(100))
    with pytest.raises(UserError, match="cannot be loaded"):
        open_local(replace(bundle, path=tmp_path))


def test_a_library_without_a_network_is_one_line(
    bundle: Bundle, tmp_path: Path
) -> None:
    shared_library_without_a_network(tmp_path / "model.so")
    with pytest.raises(UserError, match="no network"):
        open_local(replace(bundle, path=tmp_path))
