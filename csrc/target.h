// U2A_TARGET("features") compiles the rest of a file for these CPU features. A pragma rather than an attribute on each
// function, because templates and lambdas do not inherit attributes. It is never undone: templates are compiled at the
// end of the file. The standard headers come first, so that their functions stay with the baseline.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define U2A_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define U2A_TARGET(features) U2A_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define U2A_TARGET_END U2A_PRAGMA(clang attribute pop)
#else
#define U2A_TARGET(features) U2A_PRAGMA(GCC target(features))
#define U2A_TARGET_END
#endif
