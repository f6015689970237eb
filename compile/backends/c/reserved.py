"""Names in a C project that no layer may have."""

from __future__ import annotations

import re

# What the templates call theirs, by themselves and after the network's name.
OWN_NAMES = ("overlap", "golden_output", "golden_tolerance", "nn_table", "near")
FILE_SCOPE = ("weights", "bias", "scales", "run", "self_test", "input_is_finite")
# What functions of one value and the run function use, and <math.h>.
LOCAL_NAMES = re.findall(
    r"\w+",
    "x i from to count input output arena base byte crc expf fabsf sqrtf tanhf truncf",
)
# What <math.h> declares for double, and with f and l for the other two; the second line is beyond C99, in newlib or glibc.
MATH_NAMES = re.findall(
    r"\w+",
    """
    acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp2 expm1 fabs fdim floor fma fmax
    fmin fmod frexp hypot ilogb ldexp lgamma llrint llround log log10 log1p log2 logb lrint lround modf nan nearbyint
    nextafter nexttoward pow remainder remquo rint round scalbln scalbn sin sinh sqrt tan tanh tgamma trunc
    drem exp10 finite gamma isinf isnan j0 j1 jn pow10 scalb signgam significand sincos y0 y1 yn
    """,
)
