"""The C as the ecosystems take a library: each layout is built by CMake or the compiler as the ecosystem does it, and runs.

CMake runs itself. Of Zephyr, ESP-IDF, PlatformIO and Arduino stubs stand for what their build systems define.
"""

from __future__ import annotations

import json
import subprocess
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import onnx
import pytest
from conftest import run, succeed
from cortex_m_projects import Projects
from integers import quantised, residuals

from netship.compile.backends.c import packages
from netship.compile.build import parser

FLAGS = ["-std=c99", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Werror"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    networks = {"residuals": quantised(residuals(), folder)}
    bundle = Projects(networks, tmp_path_factory.mktemp("p"))["residuals", "cortex-m4"]
    for kind in packages.KINDS:
        packages.write(bundle.path, kind, "small", "cortex-m4")
    return bundle.path


def _said(*command: str | Path) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def _cmake(source: Path, build: Path, *options: str) -> Path:
    _said("cmake", "-S", source, "-B", build, "-Wdev", *options)
    _said("cmake", "--build", build)
    return build


@pytest.mark.parametrize("kind", packages.KINDS)
def test_the_c_is_the_project_s_own(project: Path, kind: str) -> None:
    root = project / "package" / kind / "small"
    sources = {path.name: path.read_bytes() for path in project.glob("*.[ch]")}
    assert sources == {x.name: x.read_bytes() for x in (root / "src").iterdir()}
    assert (root / "LICENSES").exists() == (project / "LICENSES").exists()
    for path in root.rglob("*"):
        if path.is_file():
            assert "{{" not in path.read_text() and "/tmp" not in path.read_text()


def test_the_option_takes_every_kind() -> None:
    (option,) = (a for a in parser()._actions if a.dest == "package")
    assert tuple(option.choices or ()) == packages.KINDS


def test_a_cmsis_pack_describes_every_file(project: Path, tmp_path: Path) -> None:
    folder = project / "package" / "cmsis-pack"
    (pack,) = folder.glob("*.pack")
    with zipfile.ZipFile(pack) as packed:
        packed.extractall(tmp_path)
    package = ET.parse(tmp_path / "netship.small.pdsc").getroot()
    names = [package.findtext(each) for each in ("vendor", "name")]
    (release,) = package.findall("releases/release")
    assert ".".join([*map(str, names), release.attrib["version"], "pack"]) == pack.name
    (component,) = package.findall("components/component")
    assert component.attrib["Cclass"] in {
        each.attrib["Cclass"] for each in package.findall("taxonomy/description")
    }
    files = component.findall("files/file")
    described = {x.attrib["name"] for x in files if x.attrib["category"] != "include"}
    assert described == {
        x.relative_to(tmp_path).as_posix() for x in tmp_path.rglob("*.[ch]")
    }
    assert (tmp_path / str(package.findtext("license"))).exists() == (
        project / "LICENSES"
    ).exists()
    (include,) = (x for x in files if x.attrib["category"] == "include")
    cpu = ["-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard"]
    for name in (x.attrib["name"] for x in files if x.attrib["category"] == "sourceC"):
        made = tmp_path / "made.o"
        search = f"-I{tmp_path / include.attrib['name']}"
        options = [*cpu, *FLAGS, search, "-c"]
        _said("arm-none-eabi-gcc", *options, "-o", made, tmp_path / name)
    before = pack.read_bytes()
    packages._zip(folder / "small", folder / "small", pack)
    assert pack.read_bytes() == before


def test_an_arduino_sketch_runs(project: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(project / "package" / "arduino" / "small.zip") as packed:
        packed.extractall(tmp_path)
    root = tmp_path / "small"
    lines = (root / "library.properties").read_text().splitlines()
    properties = dict(line.split("=", 1) for line in lines)
    wanted = (
        "name version author maintainer sentence paragraph category url architectures"
    )
    assert properties.keys() >= set(wanted.split())
    assert all(properties.values())
    assert properties["category"] == "Data Processing"
    sketch = root / "examples" / "small_example" / "small_example.ino"
    (tmp_path / "Arduino.h").write_text(
        "#include <stdio.h>\nstruct S { void begin(long) {} operator bool() { return true; }\n"
        'void print(const char *x) { printf("%s", x); } void println(int x) { printf("%d", x); } };\n'
        "static S Serial; void setup(); void loop();\n"
        "int main() { setup(); loop(); return 0; }\n"
    )
    library = []
    for source in sorted((root / "src").glob("*.c")):
        library.append(tmp_path / f"{source.stem}.o")
        _said("gcc", "-std=gnu11", "-Os", "-c", source, "-o", library[-1])
    program = tmp_path / "sketch"
    include = [f"-I{root / 'src'}", "-include", str(tmp_path / "Arduino.h")]
    options = ["-Wall", "-Wextra", "-Werror", *include, "-x", "c++", str(sketch)]
    _said("g++", *options, "-x", "none", *library, "-lm", "-o", program)
    assert _said(program) == "small: 0"


ZEPHYR = """
set(CONFIG_SMALL y)
file(STRINGS ${APPLICATION_SOURCE_DIR}/prj.conf wanted)
if(NOT "CONFIG_SMALL=y" IN_LIST wanted)
  message(FATAL_ERROR "not asked for")
endif()
function(zephyr_include_directories)
  include_directories(${ARGN})
  set(SEEN ${CMAKE_CURRENT_SOURCE_DIR}/${ARGN} PARENT_SCOPE)
endfunction()
macro(zephyr_library_named name)
  set(ZEPHYR_CURRENT_LIBRARY ${name})
  add_library(${name} STATIC)
endmacro()
function(zephyr_library_sources)
  target_sources(${ZEPHYR_CURRENT_LIBRARY} PRIVATE ${ARGN})
endfunction()
function(zephyr_library_compile_options)
  target_compile_options(${ZEPHYR_CURRENT_LIBRARY} PRIVATE ${ARGN})
endfunction()
enable_language(C)
foreach(module ${ZEPHYR_EXTRA_MODULES})
  add_subdirectory(${module} module)
  include_directories(${module}/src)
endforeach()
add_executable(app)
target_link_libraries(app small m)
"""


def test_a_zephyr_module_and_its_sample_are_built(
    project: Path, tmp_path: Path
) -> None:
    root = project / "package" / "zephyr" / "small"
    assert "cmake: .\n  kconfig: Kconfig" in (root / "zephyr/module.yml").read_text()
    assert "config SMALL\n\tbool " in (root / "Kconfig").read_text()
    (tmp_path / "ZephyrConfig.cmake").write_text(
        f"set(APPLICATION_SOURCE_DIR ${{CMAKE_CURRENT_SOURCE_DIR}})\n{ZEPHYR}"
    )
    made = _cmake(
        root / "samples/small", tmp_path / "build", f"-DZephyr_DIR={tmp_path}"
    )
    _said(made / "app")


def test_a_platformio_library_runs(project: Path, tmp_path: Path) -> None:
    root = project / "package" / "platformio" / "small"
    described = json.loads((root / "library.json").read_text())
    assert (described["name"], described["version"]) == ("small", "1.0.0")
    build = described["build"]
    assert (root / build["includeDir"] / described["headers"][0]).exists()
    program = tmp_path / "program"
    sources = [*(root / build["srcDir"]).glob("*.c")]
    example = root / "examples" / "small_example"
    command = ["gcc", *FLAGS, *build["flags"], f"-I{root / build['includeDir']}"]
    _said(*command, *sources, example / "src/main.c", "-lm", "-o", program)
    _said(program)
    assert "lib_deps = symlink://../.." in (example / "platformio.ini").read_text()


IDF = """
macro(idf_component_register)
  cmake_parse_arguments(A "" "" "SRCS;INCLUDE_DIRS;REQUIRES" ${ARGN})
  get_filename_component(COMPONENT ${CMAKE_CURRENT_SOURCE_DIR} NAME)
  set(COMPONENT_LIB idf_${COMPONENT})
  add_library(${COMPONENT_LIB} STATIC ${A_SRCS})
  target_include_directories(${COMPONENT_LIB} PUBLIC ${A_INCLUDE_DIRS})
endmacro()
macro(project name)
  _project(${name} C)
  add_subdirectory(main)
  file(STRINGS main/idf_component.yml override REGEX override_path)
  string(REGEX REPLACE ".*\\"(.*)\\"" "\\\\1" override "${override}")
  get_filename_component(component main/${override} ABSOLUTE)
  add_subdirectory(${component} component)
  target_link_libraries(idf_main idf_small)
  file(WRITE ${CMAKE_BINARY_DIR}/start.c "void app_main(void); int main(void) { app_main(); return 0; }")
  add_executable(app ${CMAKE_BINARY_DIR}/start.c)
  target_link_libraries(app idf_main m)
endmacro()
"""


def test_an_esp_idf_component_and_its_example_run(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = project / "package" / "esp-idf" / "small"
    assert 'version: "1.0.0"' in (root / "idf_component.yml").read_text()
    idf = tmp_path / "tools" / "cmake"
    idf.mkdir(parents=True)
    (idf / "project.cmake").write_text(IDF)
    monkeypatch.setenv("IDF_PATH", str(tmp_path))
    made = _cmake(root / "examples" / "small_example", tmp_path / "build")
    assert _said(made / "app") == "small: 0\n"


def test_a_cmake_package_is_found_after_its_installation(
    project: Path, tmp_path: Path
) -> None:
    root = project / "package" / "cmake" / "small"
    for where, options in (
        ("host", []),
        ("arm", [f"-DCMAKE_TOOLCHAIN_FILE={root / 'toolchain.cmake'}"]),
    ):
        made = _cmake(root, tmp_path / where, *options)
        _said("cmake", "--install", made, "--prefix", tmp_path / "installed" / where)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.13)\nproject(mine C)\n"
        f"find_package(small 1.0 REQUIRED)\nadd_executable(app {root}/example/main.c)\n"
        "target_link_libraries(app small::small)\n"
    )
    prefix = f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed' / 'host'}"
    _said(_cmake(mine, tmp_path / "app", prefix) / "app")
    archive = tmp_path / "installed" / "arm" / "lib" / "libsmall.a"
    assert "VFP registers" in _said("arm-none-eabi-readelf", "-A", archive)


def test_a_build_writes_packages(tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--target", "c99", "--package", "arduino", "cmake"]
    model = tmp_path / "small.onnx"
    onnx.save(residuals(), model)
    small = ["--model", model, "--name", "net", "--output", output]
    refused = run("compile.build", *small, "--package", "cmake", "--target", "native")
    assert refused.returncode == 2 and "--package: is for" in refused.stderr
    succeed("compile.build", *small, *options)
    assert sorted(x.name for x in (output / "package").iterdir()) == [
        "arduino",
        "cmake",
    ]
    assert "package/cmake/net/src/net.c" in (output / "manifest.json").read_text()
    assert not (output / "package/cmake/net/toolchain.cmake").exists()
