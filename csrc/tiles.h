// What kernels on the tile unit share: the registers' shapes and their lifetime.
#pragma once

#include "target.h"

namespace u2a {
namespace {

// The tile registers' shapes (Intel Architecture SDM vol. 1, 18.3): all eight hold 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC does not tell its optimizer that tile loads read memory.
inline void memory_fence() { asm volatile("" ::: "memory"); }

// Holds the tile registers, which only their owner may use: an interrupted thread would have to save 8 KiB.
struct TileScope {
  TileScope() {
    const TileConfig config;
    memory_fence();
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};

// Registers 0 to 3 are 2 x 2 sums of 16 x 16: zeros, or what c (32 x 32, rows ldc apart) holds.
inline void start_sums(const float* c, int64_t ldc, bool add) {
  const int64_t row_bytes = ldc * sizeof(float);
  memory_fence();
  if (add) {
    _tile_loadd(0, c, row_bytes);
    _tile_loadd(1, c + 16, row_bytes);
    _tile_loadd(2, c + 16 * ldc, row_bytes);
    _tile_loadd(3, c + 16 * ldc + 16, row_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}

inline void store_sums(float* c, int64_t ldc) {
  const int64_t row_bytes = ldc * sizeof(float);
  memory_fence();
  _tile_stored(0, c, row_bytes);
  _tile_stored(1, c + 16, row_bytes);
  _tile_stored(2, c + 16 * ldc, row_bytes);
  _tile_stored(3, c + 16 * ldc + 16, row_bytes);
  memory_fence();
}

}  // namespace
}  // namespace u2a
