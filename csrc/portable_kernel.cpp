#define U2A_VECTOR_BYTES 16
#include "kernel_set.h"

namespace u2a {
const Kernels kPortable = kernel_set<VectorSet<VectorEngine<float, 4, 2>, VectorEngine<double, 4, 2>>>("portable");
}
