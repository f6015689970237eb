"""Text from outside (names of models, layers, files, labels), made fit for a terminal and for generated files.

A name can hold quotes, line ends, terminal escapes and marks that reverse the direction of writing, or be a
megabyte long. Of ordinary names no function here changes a character.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from decimal import Decimal
from keyword import kwlist
from math import copysign, isfinite, isnan

from markupsafe import Markup, escape

# Besides control characters: marks of the direction of writing, and the byte order mark.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)
_MARKDOWN = re.compile(r"[\\`*\[\]<>&|~]")


def shown(text: object, limit: int = 80) -> str:
    """``text`` on one line, without control characters, at most ``limit`` characters long."""
    clean = _printable(str(text)[: limit + 1], "\N{REPLACEMENT CHARACTER}")
    clean = " ".join(clean.split())
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def ending(text: object, limit: int) -> str:
    """As `shown`; of a longer text its end, by which layers of one network differ.

    A fused operator of a .tflite file is named by all its parts, as "bias;conv": of these the last is taken.
    """
    *_, last = str(text).rstrip(";").split(";")
    clean = shown(last, 1 << 10)
    return clean if len(clean) <= limit else "…" + clean[1 - limit :]


def one_line(text: str, limit: int = 1000) -> str:
    """A message on one line, without control characters, at most ``limit`` characters long."""
    return shown(" ".join(text.split()), limit)


def listed(texts: Sequence[str], most: int) -> str:
    """The first ``most`` of ``texts``, and how many more there are."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def lines(text: str) -> str:
    """A table for the terminal, without control characters but its line ends."""
    return "\n".join(
        _printable(line, "\N{REPLACEMENT CHARACTER}") for line in text.split("\n")
    )


def without_controls(page: str) -> str:
    """A page in which no character is invisible and changes how others are shown."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", page)


def _printable(text: str, instead: str) -> str:
    return "".join(c if c.isprintable() else instead for c in text)


# Identifiers of C.

C_RESERVED = frozenset(
    re.findall(
        r"\w+",
        """
    asm auto break case char const continue default do double else enum extern float for goto if inline int long register
    restrict return short signed sizeof static struct switch typedef typeof union unsigned void volatile while
    int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t intptr_t uintptr_t ptrdiff_t size_t wchar_t
    memchr memcmp memcpy memmove memset strcat strchr strcmp strcoll strcpy strcspn strerror strlen strncat strncmp
    strncpy strpbrk strrchr strspn strstr strtok strxfrm
    """,
    )
)
"""Keywords, and what <stdint.h> and <string.h> declare."""

# libNAME, NAME.h and NAME.py of a build, which -L., -I. and a script in the folder find first: glibc's and the compiler's
# libraries, headers of C and POSIX without the library's own types, and Python's modules with numpy.
_SHADOWED = frozenset(
    re.findall(
        r"\w+",
        """
    c m g rt dl pthread util crypt resolv nsl anl mvec gcc gcc_s gcc_eh atomic gomp quadmath ssp supc asan tsan ubsan
    assert complex ctype errno features fenv inttypes iso646 limits malloc math memory poll sched semaphore setjmp signal
    stdalign stdarg stdatomic stdbool stddef stdint stdio stdlib stdnoreturn string strings tgmath threads unistd wctype
    """,
    )
).union(sys.stdlib_module_names, ["numpy"])

# A library's header is C++ too and defines NAME_t: what C++ and systems' headers have already; and golden.h of a C
# project.
_NO_PREFIX = C_RESERVED.union(
    kwlist,
    _SHADOWED,
    re.findall(
        r"\w+",
        """
    bool catch constexpr decltype delete explicit export false friend mutable namespace new noexcept nullptr operator
    private protected public requires template this throw true typeid typename using virtual xor int8 int16 int32 int64 uint8 uint16 uint32 uint64 intptr uintptr intmax uintmax ptrdiff size ssize wchar max_align
    div ldiv lldiv clock clockid time timer key id pid uid gid mode off dev ino nlink locale va_list golden
    """,
    ),
)
_LONGEST_PREFIX = 64


C_TYPES = {
    **{
        f"{kind}{bits}": f"{kind}{bits}_t"
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
    # As TVM stores it.
    "bool": "int8_t",
    "float32": "float",
    "float64": "double",
}
"""Of stored values, by numpy's names."""


def c_float(value: float, suffix: str = "f") -> str:
    """A C constant of type float, exact: hexadecimal, or a quotient by 0, as <math.h> would declare too many names.

    Args:
        suffix: empty for type double.
    """
    if not isfinite(value):
        number = 0 if isnan(value) else copysign(1, value)
        return f"{number:.1f}{suffix} / 0.0{suffix}"
    digits, exponent = value.hex().split("p")
    return f"{digits.rstrip('0').rstrip('.')}p{exponent}{suffix}"


def is_c_prefix(text: str) -> bool:
    """Whether a library's functions can be called ``text_run`` and so on."""
    valid = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) is not None
    return valid and len(text) <= _LONGEST_PREFIX and not is_taken(text)


def is_taken(text: str) -> bool:
    """Whether C, C++, Python or a system has this name already."""
    return text in _NO_PREFIX


def counted(number: int, noun: str) -> str:
    """Such as "1 image", "2 images" and "3 boxes"."""
    plural = "es" if noun.endswith(("s", "x")) else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def all_counted(number: int, noun: str) -> str:
    """Such as "the one image" and "all 2 images"."""
    return f"the one {noun}" if number == 1 else f"all {counted(number, noun)}"


def milliseconds(time: float, decimals: int = 2) -> str:
    """A time such as "12.60 ms"; below 1 ms three significant digits, such as "0.000591 ms"."""
    text = f"{time:.{decimals}f}" if time >= 1 else f"{Decimal(f'{time:.3g}'):f}"
    return f"{text} ms"


def megabytes(nbytes: float) -> str:
    """A size such as "2.49 MB"; below 1 MB such as "12.3 kB"."""
    return f"{nbytes / 1e6:,.2f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:,.1f} kB"


def magnitude(value: float, decimals: int = 1) -> str:
    """An error or a difference such as "5.7e-06"; none is "0"."""
    return f"{value:.{decimals}e}" if value else "0"


def millions(count: float, decimals: int = 2) -> str:
    """A count such as "300.77 M"; below a million such as "13,568"."""
    return f"{count / 1e6:,.{decimals}f} M" if count >= 1e6 else f"{count:,.0f}"


def c_prefix(text: str) -> str:
    """A prefix for C functions out of any name."""
    name = re.sub(r"\W", "_", text, flags=re.ASCII).lower()[:_LONGEST_PREFIX]
    return name if is_c_prefix(name) else f"model_{name}"[:_LONGEST_PREFIX]


# One filter a language: each gives Markup, which means here that the text is fit for where it goes.


def c_comment(text: str) -> Markup:
    """Inside ``/* */``, which it cannot end."""
    plain = _printable(text, " ").replace("*/", "* /").replace("/*", "/ *")
    return Markup(plain)


def c_string(text: str) -> Markup:
    """A C string literal: printable ASCII as it is, the rest of its UTF-8 in octal."""
    body = "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}"
        for byte in text.encode("utf-8", errors="replace")
    )
    return Markup(f'"{body}"')


def python_docstring(text: str) -> Markup:
    """Inside a triple-quoted string of Python, which it cannot end."""
    return Markup(re.sub(r'([\\"])', r"\\\1", _printable(text, " ")))


def markdown(text: str) -> Markup:
    """A part of a paragraph or of a table's cell: no markup, no HTML, no link."""
    return Markup(_MARKDOWN.sub(r"\\\g<0>", _printable(text, " ")))


def markdown_code(text: str) -> Markup:
    """Inside a code span of Markdown, where no backslash escapes."""
    return Markup(_printable(text, " ").replace("`", "'"))


def xml(text: str) -> Markup:
    """Text of an SVG or an attribute in quotes; XML has no escape for control characters."""
    return escape(_printable(text, " "))


def code(text: str) -> Markup:
    """For what a template or the program around it made itself, of nothing from outside."""
    return Markup(text)


FILTERS = {
    function.__name__: function
    for function in (
        *(c_comment, c_string, python_docstring, markdown, markdown_code, xml),
        code,
    )
}
