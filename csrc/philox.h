// Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405): ten rounds that turn a counter of four 32-bit words
// and a key of two into four random words.
#pragma once

#include "vector.h"

namespace u2a {
namespace {

// Counters taken at once: the compiler makes vectors of the loops over them.
constexpr int kPhiloxLanes = 16;

// words[w][l] = word w at counter (c0, c1 + l, c2, 0) under the key `seed`, low half first.
inline void philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t (&words)[4][kPhiloxLanes]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int l = 0; l < kPhiloxLanes; ++l) {
    words[0][l] = c0;
    words[1][l] = c1 + l;
    words[2][l] = c2;
    words[3][l] = 0;
  }
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    for (int l = 0; l < kPhiloxLanes; ++l) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * words[0][l], p1 = uint64_t{0xCD9E8D57u} * words[2][l];
      words[0][l] = static_cast<uint32_t>(p1 >> 32) ^ words[1][l] ^ key0;
      words[1][l] = static_cast<uint32_t>(p1);
      words[2][l] = static_cast<uint32_t>(p0 >> 32) ^ words[3][l] ^ key1;
      words[3][l] = static_cast<uint32_t>(p0);
    }
  }
}

}  // namespace
}  // namespace u2a
