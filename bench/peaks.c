// What the arithmetic units of this processor can do, with everything in registers: the limits that bench/limits.py
// prints beside the results. Compiled when a benchmark starts, if there is a C compiler. Each function makes n rounds
// of 12 independent multiply-accumulates and returns how many operations (a multiply and an add count as two) it did.
#include <immintrin.h>

#define CHAINS 12                               // covers the latency of two units of 4 to 6 cycles each
#define KEEP(x) __asm__ volatile("" : "+v"(x))  // the compiler may neither hoist nor merge what depends on x
#define EACH for (int i = 0; i < CHAINS; ++i)
#define UNROLL _Pragma("GCC unroll 12")

__attribute__((target("sse2"))) double fp32_portable(long n) {
  __m128 x = _mm_set1_ps(0.999f), a[CHAINS];
  UNROLL EACH a[i] = _mm_set1_ps(i);
  for (long k = 0; k < n; ++k) {
    UNROLL EACH { a[i] = _mm_add_ps(_mm_mul_ps(a[i], x), x); }
  }
  UNROLL EACH __asm__ volatile("" : "+x"(a[i]));
  return 2.0 * 4 * CHAINS * n;
}

__attribute__((target("avx2,fma"))) double fp32_avx2(long n) {
  __m256 x = _mm256_set1_ps(0.999f), a[CHAINS];
  UNROLL EACH a[i] = _mm256_set1_ps(i);
  for (long k = 0; k < n; ++k) {
    UNROLL EACH a[i] = _mm256_fmadd_ps(a[i], x, x);
  }
  UNROLL EACH __asm__ volatile("" : "+x"(a[i]));
  return 2.0 * 8 * CHAINS * n;
}

__attribute__((target("avx512f"))) double fp32_avx512(long n) {
  __m512 x = _mm512_set1_ps(0.999f), a[CHAINS];
  UNROLL EACH a[i] = _mm512_set1_ps(i);
  for (long k = 0; k < n; ++k) {
    UNROLL EACH a[i] = _mm512_fmadd_ps(a[i], x, x);
  }
  UNROLL EACH KEEP(a[i]);
  return 2.0 * 16 * CHAINS * n;
}

// Without VNNI an exact int8 product-sum is two instructions: int16 pairs to 32 bits, add. (vpmaddubsw
// on whole bytes saturates.)
__attribute__((target("avx2"))) double int8_avx2(long n) {
  __m256i x = _mm256_set1_epi16(3), a[CHAINS];
  UNROLL EACH a[i] = _mm256_set1_epi32(i);
  for (long k = 0; k < n; ++k) {
    UNROLL EACH {
      __asm__ volatile("" : "+x"(x));
      a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(x, x));
    }
  }
  UNROLL EACH __asm__ volatile("" : "+x"(a[i]));
  return 2.0 * 16 * CHAINS * n;
}

__attribute__((target("avx512bw"))) double int8_avx512(long n) {
  __m512i x = _mm512_set1_epi16(3), a[CHAINS];
  UNROLL EACH a[i] = _mm512_set1_epi32(i);
  for (long k = 0; k < n; ++k) {
    UNROLL EACH {
      KEEP(x);
      a[i] = _mm512_add_epi32(a[i], _mm512_madd_epi16(x, x));
    }
  }
  UNROLL EACH KEEP(a[i]);
  return 2.0 * 32 * CHAINS * n;
}

// Codes of 7 bits: two u8 x s8 pair sums are added in 16 bits and widened once.
__attribute__((target("avx2"))) double int7_avx2(long n) {
  __m256i x = _mm256_set1_epi8(3), one = _mm256_set1_epi16(1), a[CHAINS];
  UNROLL EACH a[i] = _mm256_set1_epi32(i);
  for (long k = 0; k < n; ++k) {
    UNROLL EACH {
      __asm__ volatile("" : "+x"(x));
      __m256i part = _mm256_maddubs_epi16(x, x);
      __asm__ volatile("" : "+x"(x));
      part = _mm256_add_epi16(part, _mm256_maddubs_epi16(x, x));
      a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(part, one));
    }
  }
  UNROLL EACH __asm__ volatile("" : "+x"(a[i]));
  return 2.0 * 64 * CHAINS * n;
}

__attribute__((target("avx512bw"))) double int7_avx512(long n) {
  __m512i x = _mm512_set1_epi8(3), one = _mm512_set1_epi16(1), a[CHAINS];
  UNROLL EACH a[i] = _mm512_set1_epi32(i);
  for (long k = 0; k < n; ++k) {
    UNROLL EACH {
      KEEP(x);
      __m512i part = _mm512_maddubs_epi16(x, x);
      KEEP(x);
      part = _mm512_add_epi16(part, _mm512_maddubs_epi16(x, x));
      a[i] = _mm512_add_epi32(a[i], _mm512_madd_epi16(part, one));
    }
  }
  UNROLL EACH KEEP(a[i]);
  return 2.0 * 128 * CHAINS * n;
}

__attribute__((target("avx512bw,avx512vnni"))) double int8_avx512_vnni(long n) {
  __m512i x = _mm512_set1_epi8(3), a[CHAINS];
  UNROLL EACH a[i] = _mm512_set1_epi32(i);
  for (long k = 0; k < n; ++k) {
    UNROLL EACH {
      KEEP(x);
      a[i] = _mm512_dpbusd_epi32(a[i], x, x);
    }
  }
  UNROLL EACH KEEP(a[i]);
  return 2.0 * 64 * CHAINS * n;
}

double int7_avx512_vnni(long n) { return int8_avx512_vnni(n); }

// Products of signs: xor, popcount and an addition; or, without VPOPCNTDQ, a byte of a table of 16 distances for four products, and an addition.
__attribute__((target("popcnt"))) double popcount_portable(long n) {
  unsigned long long x = 0x5555aaaa0f0f3333, a[CHAINS] = {0};
  for (long k = 0; k < n; ++k) {
    UNROLL EACH {
      __asm__ volatile("" : "+r"(x));
      a[i] += (unsigned long long)__builtin_popcountll(x ^ (unsigned long long)k);
    }
  }
  UNROLL EACH __asm__ volatile("" : "+r"(a[i]));
  return 2.0 * 64 * CHAINS * n;
}

__attribute__((target("avx2"))) double popcount_avx2(long n) {
  __m256i x = _mm256_set1_epi8(3), a[CHAINS];
  UNROLL EACH a[i] = _mm256_set1_epi8(i);
  for (long k = 0; k < n; ++k) {
    UNROLL EACH {
      __asm__ volatile("" : "+x"(x));
      a[i] = _mm256_add_epi8(a[i], _mm256_shuffle_epi8(x, x));
    }
  }
  UNROLL EACH __asm__ volatile("" : "+x"(a[i]));
  return 2.0 * 128 * CHAINS * n;
}

__attribute__((target("avx512bw"))) static double looked_up_512(long n) {
  __m512i x = _mm512_set1_epi8(3), a[CHAINS];
  UNROLL EACH a[i] = _mm512_set1_epi8(i);
  for (long k = 0; k < n; ++k) {
    UNROLL EACH {
      KEEP(x);
      a[i] = _mm512_add_epi8(a[i], _mm512_shuffle_epi8(x, x));
    }
  }
  UNROLL EACH KEEP(a[i]);
  return 2.0 * 256 * CHAINS * n;
}

__attribute__((target("avx512bw,avx512vpopcntdq"))) static double counted_512(long n) {
  __m512i x = _mm512_set1_epi8(3), y = x, a[CHAINS];
  UNROLL EACH a[i] = _mm512_set1_epi32(i);
  for (long k = 0; k < n; ++k) {
    UNROLL EACH {
      KEEP(x);
      a[i] = _mm512_add_epi32(a[i], _mm512_popcnt_epi32(_mm512_xor_si512(x, y)));
    }
  }
  UNROLL EACH KEEP(a[i]);
  return 2.0 * 512 * CHAINS * n;
}

double popcount_avx512(long n) { return __builtin_cpu_supports("avx512vpopcntdq") ? counted_512(n) : looked_up_512(n); }

double popcount_avx512_vnni(long n) { return popcount_avx512(n); }
