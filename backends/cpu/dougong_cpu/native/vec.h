// SIMD abstraction: one vector type `vf` of W floats per instruction set, built on the compilers' vector
// extensions (GCC >= 9, Clang >= 10) plus a few intrinsics where the generic code would be slow.
//
// Every translation unit compiles this with its own -m flags, so everything lives in an anonymous namespace:
// two instruction sets must never share one inline symbol.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define DG_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32 vector registers
#else
constexpr bool kManyRegisters = false;  // 16
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef uint8_t vub __attribute__((vector_size(W)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };

// Not `vf{} + x`: adding zero is an instruction of its own, since it turns -0 into 0.
DG_INLINE vf set1(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#elif defined(__x86_64__)
  return _mm_set1_ps(x);
#elif defined(__aarch64__)
  return vdupq_n_f32(x);
#else
  return vf{x, x, x, x};
#endif
}
DG_INLINE vi set1i(int32_t x) { return vi{} + x; }

// Run f(std::integral_constant-like index) for 0 … N-1, unrolled by the front end: arrays indexed by it become registers.
template <int I> struct Index {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};
template <int... I> struct seq {};
template <int N, int... I> struct make_seq : make_seq<N - 1, N - 1, I...> {};
template <int... I> struct make_seq<0, I...> { typedef seq<I...> type; };
template <class F, int... I> DG_INLINE void each_in(F&& f, seq<I...>) { (f(Index<I>{}), ...); }
template <int N, class F> DG_INLINE void each(F&& f) { each_in(f, typename make_seq<N>::type{}); }
#define DG_EACH(i) [&](auto i) __attribute__((always_inline))
DG_INLINE vf bits_f(vi x) { vf r; memcpy(&r, &x, sizeof r); return r; }
DG_INLINE vf bits_f(vu x) { vf r; memcpy(&r, &x, sizeof r); return r; }
DG_INLINE vi bits_i(vf x) { vi r; memcpy(&r, &x, sizeof r); return r; }
DG_INLINE vu bits_u(vf x) { vu r; memcpy(&r, &x, sizeof r); return r; }

DG_INLINE vi iota() {
  vi r;
  for (int i = 0; i < W; i++) r[i] = i;
  return r;
}

DG_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

DG_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
DG_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
DG_INLINE vf vabs(vf a) { return bits_f(bits_i(a) & 0x7fffffff); }
DG_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

DG_INLINE float reduce_add(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float t[W];
  memcpy(t, &x, sizeof x);
  for (int s = W / 2; s; s /= 2)
    for (int i = 0; i < s; i++) t[i] += t[i + s];
  return t[0];
#endif
}

DG_INLINE float reduce_max(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float t[W];
  memcpy(t, &x, sizeof x);
  for (int s = W / 2; s; s /= 2)
    for (int i = 0; i < s; i++) t[i] = t[i] > t[i + s] ? t[i] : t[i + s];
  return t[0];
#endif
}

// ---- scalar conversions -------------------------------------------------------------------------------

DG_INLINE float bits_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
DG_INLINE uint32_t float_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

DG_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = (h >> 10) & 31, man = h & 1023;
  if (exp == 31) return bits_float(sign | 0x7f800000u | man << 13);
  if (exp) return bits_float(sign | (exp + 112) << 23 | man << 13);
  float sub = (float)(int)man * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -sub : sub;
}

DG_INLINE uint16_t float_to_half(float f) {
  uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);  // rounds to infinity
  if (a >= 0x38800000u) {                                  // normal in half
    uint32_t r = a + 0xfff + ((a >> 13) & 1);
    return (uint16_t)(sign | ((r - 0x38000000u) >> 13));
  }
  // Subnormal: adding 0.5 leaves the value, rounded to a multiple of 2^-24, in the low bits.
  float t = bits_float(a) + 0.5f;
  return (uint16_t)(sign | (float_bits(t) - 0x3f000000u));
}

DG_INLINE uint16_t float_to_bf16(float f) {
  uint32_t u = float_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

DG_INLINE float e4m3_to_float(uint8_t b) {
  uint32_t exp = (b >> 3) & 15, man = b & 7;
  float v;
  if ((b & 0x7f) == 0x7f) v = bits_float(0x7fc00000u);
  else if (exp) v = bits_float((exp + 120) << 23 | man << 20);
  else v = (float)(int)man * 0.001953125f;  // 2^-9
  return b & 0x80 ? -v : v;
}

// Round to nearest even, saturating at ±448 as torch's conversion with saturation does; NaN stays NaN.
DG_INLINE uint8_t float_to_e4m3(float f) {
  uint32_t u = float_bits(f), sign = (u >> 24) & 0x80, a = u & 0x7fffffff;
  if (a > 0x7f800000u) return (uint8_t)(sign | 0x7f);
  if (a >= 0x43e00000u) return (uint8_t)(sign | 0x7e);
  if (a >= 0x3c800000u) {  // 2^-6: normal in e4m3
    uint32_t r = a + 0x7ffff + ((a >> 20) & 1);
    return (uint8_t)(sign | ((r - (120u << 23)) >> 20));
  }
  float t = bits_float(a) + 16384.0f;  // one ulp of 2^14 is 2^-9
  return (uint8_t)(sign | (float_bits(t) - 0x46800000u));
}

DG_INLINE float scalar(float x) { return x; }
DG_INLINE float scalar(bf16 x) { return bits_float((uint32_t)x.bits << 16); }
DG_INLINE float scalar(f16 x) { return half_to_float(x.bits); }
DG_INLINE float scalar(int8_t x) { return (float)x; }
DG_INLINE float scalar(e4m3 x) { return e4m3_to_float(x.bits); }
DG_INLINE void put(float* p, float x) { *p = x; }
DG_INLINE void put(bf16* p, float x) { p->bits = float_to_bf16(x); }
DG_INLINE void put(f16* p, float x) { p->bits = float_to_half(x); }
DG_INLINE void put(e4m3* p, float x) { p->bits = float_to_e4m3(x); }
DG_INLINE void put(int8_t* p, float x) {
  x = x < -127.f ? -127.f : x > 127.f ? 127.f : x;  // symmetric, so that -x quantises to minus the code of x
  if (!(x == x)) x = 0.f;
  *p = (int8_t)__builtin_rintf(x);
}

// ---- vector loads and stores with conversion ----------------------------------------------------------

DG_INLINE vf load(const float* p) { vf r; memcpy(&r, p, sizeof r); return r; }
DG_INLINE vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16));
#elif defined(__AVX2__)
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16));
#else
  return bits_f(__builtin_convertvector(h, vu) << 16);
#endif
}
DG_INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
#else
  vf r;
  for (int i = 0; i < W; i++) r[i] = half_to_float(p[i].bits);
  return r;
#endif
}
DG_INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vb b;
  memcpy(&b, p, sizeof b);
  return to_float(__builtin_convertvector(b, vi));
#endif
}
DG_INLINE vf load(const e4m3* p) {
  vub b;
  memcpy(&b, p, sizeof b);
#if defined(__AVX512F__)
  vi x = (vi)_mm512_cvtepu8_epi32((__m128i)b);
#else
  vi x = __builtin_convertvector(b, vi);
#endif
  vi exp = (x >> 3) & 15, man = x & 7, sign = (x & 0x80) << 24;
  vf normal = bits_f(((exp + 120) << 23) | (man << 20));
  vf sub = to_float(man) * set1(0.001953125f);
  vf v = exp == 0 ? sub : normal;
  v = (x & 0x7f) == 0x7f ? bits_f(set1i(0x7fc00000)) : v;
  return bits_f(bits_i(v) | sign);
}

template <class T> DG_INLINE vf load_n(const T* p, int n) {  // the first n < W lanes, the rest 0; reads nothing beyond
  T t[W];
  memset(t, 0, sizeof t);
  memcpy(t, p, n * sizeof(T));
  return load(t);
}

DG_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
DG_INLINE void store(bf16* p, vf x) {
  vu u = bits_u(x);
  vu r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  r = x == x ? r : ((u >> 16) | 0x40);
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)r));
#else
  vh h = __builtin_convertvector(r, vh);
  memcpy(p, &h, sizeof h);
#endif
}
DG_INLINE void store(f16* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32(x)));
#else
  for (int i = 0; i < W; i++) p[i].bits = float_to_half(x[i]);
#endif
}
DG_INLINE void store(int8_t* p, vf x) { for (int i = 0; i < W; i++) put(p + i, x[i]); }
DG_INLINE void store(e4m3* p, vf x) { for (int i = 0; i < W; i++) put(p + i, x[i]); }

template <class T> DG_INLINE void store_n(T* p, vf x, int n) {
  T t[W];
  store(t, x);
  memcpy(p, t, n * sizeof(T));
}

// ---- functions ----------------------------------------------------------------------------------------

// e^x to about 1 ulp for x in [-87.3, 88.3]; 0 below, clamped above. NaN gives NaN.
DG_INLINE vf vexp(vf x0) {
  vf x = vmin(x0, set1(88.3762626647949f));
  vf low = set1(-87.3365478515625f);
  vf xc = vmax(x, low);
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  vf t = fma(xc, set1(1.44269504088896341f), magic);
  vi n = bits_i(t) - 0x4b400000;
  vf nf = t - magic;
  vf r = fma(nf, set1(-0.693359375f), xc);
  r = fma(nf, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1.0f);
  vf y = p * bits_f((n + 127) << 23);
  y = x0 < low ? set1(0.0f) : y;
  return x0 == x0 ? y : x0;
}

// tanh with small relative error also near 0 (a soft cap multiplies it by 30 to 50).
DG_INLINE vf vtanh(vf x) {
  vf a = vabs(x), z = x * x;
  vf p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  vf small = fma(p * z, x, x);
  vf e = vexp(a + a);
  vf big = set1(1.0f) - set1(2.0f) / (e + set1(1.0f));
  big = bits_f(bits_i(big) | (bits_i(x) & (int32_t)0x80000000));
  return a < set1(0.625f) ? small : big;
}

// In-place transpose of W vectors of W lanes: log2(W) rounds of the perfect shuffle.
#if defined(__clang__)
template <int... I> DG_INLINE vf zip_lo(vf a, vf b, seq<I...>) {
  return __builtin_shufflevector(a, b, (I % 2 ? W + I / 2 : I / 2)...);
}
template <int... I> DG_INLINE vf zip_hi(vf a, vf b, seq<I...>) {
  return __builtin_shufflevector(a, b, (I % 2 ? W + W / 2 + I / 2 : W / 2 + I / 2)...);
}
#else
template <int... I> DG_INLINE vf zip_lo(vf a, vf b, seq<I...>) {
  return __builtin_shuffle(a, b, vi{(I % 2 ? W + I / 2 : I / 2)...});
}
template <int... I> DG_INLINE vf zip_hi(vf a, vf b, seq<I...>) {
  return __builtin_shuffle(a, b, vi{(I % 2 ? W + W / 2 + I / 2 : W / 2 + I / 2)...});
}
#endif
DG_INLINE void transpose(vf* r) {
  typename make_seq<W>::type s;
  vf t[W];
#pragma GCC unroll 4
  for (int n = 1; n < W; n *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; i++) {
      t[2 * i] = zip_lo(r[i], r[i + W / 2], s);
      t[2 * i + 1] = zip_hi(r[i], r[i + W / 2], s);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) r[i] = t[i];
  }
}

}  // namespace
