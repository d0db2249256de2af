#if defined(__x86_64__)
#include "target.h"
U2A_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define U2A_VECTOR_BYTES 64
#include "kernel_set.h"

namespace u2a {
const Kernels kAvx512 = kernel_set<VectorSet<Avx512FloatEngine, VectorEngine<double, 8, 3>>>("AVX-512");
}
U2A_TARGET_END
#endif
