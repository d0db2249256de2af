// What does not depend on an instruction set: memory, and the choice of the set.
#include <cstdlib>
#include <new>

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace u2a {

namespace {

// Released buffers of one thread. Fresh memory from the system costs a page fault every 4 KiB, which for the panels of
// one call is as much time as a tenth of their product.
class Released {
 public:
  ~Released() {
    for (Block& block : blocks_) std::free(block.data);
  }

  // The smallest block that holds `bytes`, or nothing.
  void* take(size_t* bytes) {
    Block* best = nullptr;
    for (Block& block : blocks_)
      if (block.bytes >= *bytes && (!best || block.bytes < best->bytes)) best = &block;
    if (!best) return nullptr;
    const Block taken = *best;
    *best = Block();
    kept_ -= taken.bytes;
    *bytes = taken.bytes;
    return taken.data;
  }

  // Keeps the block, or gives it back to the system where the thread holds enough.
  void put(void* data, size_t bytes) {
    for (Block& block : blocks_) {
      if (block.data || kept_ + bytes > kMostBytes) continue;
      block = {data, bytes};
      kept_ += bytes;
      return;
    }
    std::free(data);
  }

 private:
  static constexpr size_t kMostBytes = 24 << 20;
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };
  Block blocks_[8];
  size_t kept_ = 0;
};

thread_local Released released;

}  // namespace

Buffer::Buffer(size_t bytes) : data_(nullptr), bytes_(bytes ? bytes : 64) {
  data_ = released.take(&bytes_);
  if (!data_ && posix_memalign(&data_, 64, bytes_) != 0) throw std::bad_alloc();
}

Buffer::~Buffer() { released.put(data_, bytes_); }

#if defined(__x86_64__)
namespace {

// Linux gives a process the tile registers only when it asks (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const Kernels& best_vectors() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
  return kPortable;
}

const Kernels& best_bf16() {
  const Kernels& vectors = best_vectors();
  if (&vectors != &kAvx512 || !__builtin_cpu_supports("avx512bf16")) return vectors;
  if (__builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles()) return kAmxBf16;
  return kAvx512Bf16;
}

}  // namespace

const Kernels& kernels_for(DType dtype) {
  static const Kernels& vectors = best_vectors();
  static const Kernels& bf16 = best_bf16();
  return dtype == DType::kBFloat16 ? bf16 : vectors;
}
#else
const Kernels& kernels_for(DType) { return kPortable; }
#endif

}  // namespace u2a
