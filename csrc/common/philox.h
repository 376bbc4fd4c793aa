// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed as gradmill fixes it:
//   key     = the 64-bit seed (low word, high word)
//   counter = (element/4 low, element/4 high, tensor id << 8 | purpose, step)
//   word    = element % 4
// so that a random word depends on what it is for and never on threads, grids or shards.
#pragma once
#include "common.h"

namespace gradmill {

struct Key {
  uint64_t seed;
  uint32_t step;
  uint32_t stream;  // tensor id << 8 | purpose
  uint64_t first = 0;  // the whole tensor's number of what a kernel calls element 0: above 0 in a shard
};

namespace {

GM_HD void mulhilo(uint32_t a, uint32_t b, uint32_t& hi, uint32_t& lo) {
  uint64_t p = static_cast<uint64_t>(a) * b;
  hi = static_cast<uint32_t>(p >> 32);
  lo = static_cast<uint32_t>(p);
}

// The four words of group `group` (= element/4).
GM_HD void philox4(const Key& key, uint64_t group, uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3) {
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  c0 = static_cast<uint32_t>(group);
  c1 = static_cast<uint32_t>(group >> 32);
  c2 = key.stream;
  c3 = key.step;
  for (int round = 0; round < 10; ++round) {
    uint32_t hi0, lo0, hi1, lo1;
    mulhilo(0xD2511F53u, c0, hi0, lo0);
    mulhilo(0xCD9E8D57u, c2, hi1, lo1);
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

GM_HD uint32_t philox_word(const Key& key, uint64_t element) {
  element += key.first;
  uint32_t w0, w1, w2, w3;
  philox4(key, element >> 2, w0, w1, w2, w3);
  uint32_t i = static_cast<uint32_t>(element & 3);
  return i == 0 ? w0 : i == 1 ? w1 : i == 2 ? w2 : w3;
}

}  // namespace
}  // namespace gradmill
