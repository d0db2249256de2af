#if defined(__x86_64__)
#include "target.h"
U2A_TARGET("avx2,fma")
#define U2A_VECTOR_BYTES 32
#include "kernel_set.h"

namespace u2a {
const Kernels kAvx2 = kernel_set<VectorSet<VectorEngine<float, 6, 2>, VectorEngine<double, 4, 3>>>("AVX2");
}
U2A_TARGET_END
#endif
